//! What entries of the redo log wrote, read from the log as it is asked for.
//!
//! A point inside an undo epoch is the images of the epoch and the epoch's entries up to the point over them. Those may be
//! gigabytes: so they are read once to see which records they have, and a record again when somebody reads where it wrote.
//!
//! Invariants: nothing of the journal is locked while the log is read; a segment that was used again meanwhile is noticed,
//! for an entry says whose it is, and a record is known by the checksum of its head, which covers those of its data (I8);
//! memory is some 60 bytes for a record, whatever it holds, and the records of one request. Units: sectors, bytes, entry
//! numbers. Called by `view`.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use bytes::Bytes;

use super::Journal;
use super::entry::{Cut, Write, entry_records, kept};
use super::error::JournalError;
use super::log::{Place, segment_path};
use super::recovery::LogEntry;
use super::undo::BlockRange;
use super::window::Window;
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::extent::{Record, RecordHeader, RecordKind};
use crate::format::segment::{EntryHead, EntryKind};
use crate::io::{BlockFile, ReadAt};
use crate::store::files::{Files, FilesError};
use crate::units::{BLOCK_SECTORS, DiskId, SECTOR_BYTES, SectorRange};

/// Bytes of the log that are read in one go.
const READ_BYTES: u64 = 8 << 20;
/// Bytes that nobody asked for and that are read along, for it is one read less.
const GAP_BYTES: u64 = 4 << 10;
/// Segments that are open at a time.
const READERS_MAX: usize = 32;
/// Groups of entries that were read and not looked at yet.
const GROUPS_AHEAD: usize = 2;

const REMEDY: &str = "choose another point";

/// The entries of a disk behind `after` up to `number`.
///
/// # Errors
/// The number of the first one that is not kept.
pub(super) fn entries_between(
    journal: &Journal,
    disk: DiskId,
    after: u64,
    number: u64,
) -> Result<&[LogEntry], u64> {
    let all = journal.entries(disk);
    let from = all.partition_point(|entry| entry.number <= after);
    let to = all.partition_point(|entry| entry.number <= number);
    let entries = all.get(from..to).unwrap_or_default();
    // They ascend, so as many as there are numbers are all of them.
    if entries.len() as u64 == number.saturating_sub(after) {
        return Ok(entries);
    }
    let gap = entries.iter().zip(after + 1..).find(|(entry, next)| entry.number != *next);
    Err(gap.map_or(after + 1 + entries.len() as u64, |(_, next)| next))
}

/// Entries whose writes are wanted, and where they lie: taken with the journal's lock, read without it.
#[derive(Debug)]
pub(super) struct Wanted {
    disk: DiskId,
    /// With the number of records that count.
    entries: Vec<(LogEntry, usize)>,
    segments: Segments,
}

impl Wanted {
    /// The entries behind `after` up to `whole`, and of so many records of the next.
    ///
    /// # Errors
    /// The number of the first one that is not kept.
    pub(super) fn of(
        journal: &Journal,
        disk: DiskId,
        after: u64,
        (whole, records): (u64, u32),
    ) -> Result<Self, u64> {
        let found = entries_between(journal, disk, after, whole.saturating_add(u64::from(records > 0)))?;
        let counts = |entry: &LogEntry| if entry.number > whole { records as usize } else { usize::MAX };
        let entries = found.iter().map(|entry| (*entry, counts(entry))).collect();
        Ok(Self { disk, entries, segments: Segments::of(journal, found) })
    }

    /// These, and others over them.
    pub(super) fn and(mut self, later: Self) -> Self {
        self.entries.extend(later.entries);
        self.segments.paths.extend(later.segments.paths);
        self
    }

    /// Just these entries, whole.
    pub(super) fn these(journal: &Journal, disk: DiskId, entries: &[LogEntry]) -> Self {
        let segments = Segments::of(journal, entries);
        Self { disk, entries: entries.iter().map(|entry| (*entry, usize::MAX)).collect(), segments }
    }

    /// Reads them, to see what they wrote.
    ///
    /// # Errors
    /// When one cannot be read, is damaged, or was given up meanwhile.
    pub(super) fn index(self) -> Result<RedoIndex, JournalError> {
        let mut builder = Builder { runs: Window::default(), records: Vec::new() };
        self.read(|entry, counts, kind, body| {
            let has = builder.add(entry, kind, body, counts)?;
            Ok(if counts != usize::MAX && counts > has { Err(has) } else { Ok(()) })
        })?;
        let Builder { runs, records } = builder;
        Ok(RedoIndex { runs, records, segments: self.segments, open: Mutex::default() })
    }

    /// Reads them one after the other, each checked, and shows their bodies.
    ///
    /// # Errors
    /// When one cannot be read, is damaged, or was given up meanwhile.
    pub(super) fn each(
        &self,
        mut see: impl FnMut(&LogEntry, &Bytes) -> Result<(), FormatError>,
    ) -> Result<(), JournalError> {
        self.read(|entry, _, _, body| see(entry, &body).map(Ok))
    }

    /// Shows each entry with the number of records that count; who sees it may answer that it has only so many.
    fn read(
        &self,
        mut see: impl FnMut(&LogEntry, usize, EntryKind, Bytes) -> Result<Result<(), usize>, FormatError>,
    ) -> Result<(), JournalError> {
        let Self { disk, entries, segments } = self;
        // One thread reads, this one looks at what was read.
        let (send, receive) = mpsc::sync_channel(GROUPS_AHEAD);
        thread::scope(|scope| {
            let read = || {
                let mut open = Open::default();
                for group in groups(entries) {
                    let read = segments.read_entries(&mut open, group).map(|bytes| (group, bytes));
                    let failed = read.is_err();
                    if send.send(read).is_err() || failed {
                        break;
                    }
                }
                drop(send);
            };
            let reader = thread::Builder::new().name("read-log".to_owned()).spawn_scoped(scope, read);
            reader
                .map_err(|source| FilesError::system("start a thread to read", &segments.folder, source))?;
            for read in receive {
                let (group, bytes) = read?;
                for ((entry, counts), bytes) in group.iter().zip(bytes) {
                    let seen = body_of(*disk, entry, bytes)
                        .and_then(|(kind, body)| see(entry, *counts, kind, body))
                        .map_err(|error| segments.error(entry.place, error))?;
                    if let Err(has) = seen {
                        let what = format!("entry {} has {has} records, not {counts}", entry.number);
                        return Err(JournalError::Gone { disk: *disk, what });
                    }
                }
            }
            Ok(())
        })
    }
}

/// The body of an entry as it was read, if it is the one that is wanted.
fn body_of(disk: DiskId, entry: &LogEntry, mut bytes: Vec<u8>) -> Result<(EntryKind, Bytes), FormatError> {
    let head = EntryHead::open(&bytes)?;
    if (head.disk, head.number) != (disk, entry.number) {
        let expected = "the entry that stood here: its space was given to others";
        return Err(FormatError::Field { what: "EntryHead", field: "number", got: head.number, expected });
    }
    let body = bytes.split_off(EntryHead::BYTES.min(bytes.len()));
    head.check_body(&body)?;
    Ok((head.kind, body.into()))
}

/// Entries that are read in one go.
fn groups(entries: &[(LogEntry, usize)]) -> impl Iterator<Item = &[(LogEntry, usize)]> {
    let mut rest = entries;
    std::iter::from_fn(move || {
        let (first, _) = rest.first()?;
        let mut bytes = 0;
        let fits = |(entry, _): &&(LogEntry, usize)| {
            bytes += entry.place.bytes;
            entry.place.segment == first.place.segment && bytes <= READ_BYTES
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (group, tail) = rest.split_at(count);
        rest = tail;
        Some(group)
    })
}

/// Where the log's files are, of the segments that are needed.
struct Segments {
    files: Arc<dyn Files>,
    folder: PathBuf,
    paths: BTreeMap<u64, PathBuf>,
}

impl std::fmt::Debug for Segments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segments").field("paths", &self.paths).finish_non_exhaustive()
    }
}

/// Segments that are open for reading, and what opens records.
#[derive(Default)]
struct Open {
    readers: BTreeMap<u64, Box<dyn BlockFile>>,
    decompressor: Option<Decompressor>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").finish_non_exhaustive()
    }
}

impl Segments {
    fn of(journal: &Journal, entries: &[LogEntry]) -> Self {
        let folder = journal.folder().to_owned();
        let segments = &journal.shape().segments;
        let path = |entry: &LogEntry| {
            let number = entry.place.segment;
            segments.get(&number).map(|opened| (number, segment_path(&folder, opened.slot)))
        };
        let paths = entries.iter().filter_map(path).collect();
        Self { files: Arc::clone(journal.files()), folder, paths }
    }

    fn error(&self, place: Place, source: FormatError) -> JournalError {
        let path = self.paths.get(&place.segment).unwrap_or(&self.folder);
        JournalError::format(path, place.offset, REMEDY)(source)
    }

    /// Reads from a segment. What belongs to it may be gone: the caller sees that.
    fn read(&self, open: &mut Open, segment: u64, reads: &mut [ReadAt<'_>]) -> Result<(), JournalError> {
        if !open.readers.contains_key(&segment) {
            let Some(path) = self.paths.get(&segment) else {
                let what = format!("segment {segment} is not in the log any more");
                return Err(JournalError::damaged(&self.folder, what));
            };
            if open.readers.len() >= READERS_MAX {
                open.readers.pop_first();
            }
            open.readers.insert(segment, self.files.open(path, false)?);
        }
        match open.readers.get_mut(&segment) {
            Some(file) => Ok(file.read(reads)?),
            None => Ok(()),
        }
    }

    /// Reads entries of one segment, heads and bodies.
    fn read_entries(
        &self,
        open: &mut Open,
        entries: &[(LogEntry, usize)],
    ) -> Result<Vec<Vec<u8>>, JournalError> {
        let Some((first, _)) = entries.first() else { return Ok(Vec::new()) };
        let mut bytes: Vec<Vec<u8>> =
            entries.iter().map(|(entry, _)| vec![0; entry.place.bytes as usize]).collect();
        let mut reads: Vec<ReadAt<'_>> = entries
            .iter()
            .zip(&mut bytes)
            .map(|((entry, _), data)| ReadAt { offset: entry.place.offset, data })
            .collect();
        self.read(open, first.place.segment, &mut reads)?;
        Ok(bytes)
    }
}

/// What stands in a run of sectors.
#[derive(Clone, Copy, Debug)]
enum Logged {
    Zeros,
    /// The data of a record, by its place in the index.
    Data(u32),
}

impl Cut for Logged {
    fn cut(&self, _from: usize, _bytes: usize) -> Self {
        *self
    }
}

/// A record with data, and where it lies.
#[derive(Clone, Copy, Debug)]
struct LoggedRecord {
    segment: u64,
    offset: u64,
    bytes: u32,
    /// By this it is known again.
    head_crc: u32,
}

struct Builder {
    runs: Window<Logged>,
    records: Vec<LoggedRecord>,
}

impl Builder {
    /// Puts the first `counts` records of an entry over what is there; answers how many it has.
    fn add(
        &mut self,
        entry: &LogEntry,
        kind: EntryKind,
        body: Bytes,
        counts: usize,
    ) -> Result<usize, FormatError> {
        let (keep, records) = entry_records(kind, body.clone())?;
        let all: usize = records.iter().map(Record::encoded_bytes).sum();
        let (has, mut at) = (records.len(), body.len().saturating_sub(all));
        for record in records.into_iter().take(counts) {
            let (range, bytes) = (record.range(), record.encoded_bytes());
            let content = if record.kind() == RecordKind::Data {
                let (header, _) = RecordHeader::read_prefix(body.get(at..).unwrap_or_default())?;
                self.records.push(LoggedRecord {
                    segment: entry.place.segment,
                    offset: entry.place.offset + (EntryHead::BYTES + at) as u64,
                    bytes: bytes as u32, // an entry's body has 32 bits of length
                    head_crc: header.head_crc,
                });
                Logged::Data(self.records.len() as u32 - 1)
            } else {
                Logged::Zeros
            };
            match &keep {
                None => self.runs.put(Write { range, content }),
                Some(keep) => kept(range, keep).for_each(|range| self.runs.put(Write { range, content })),
            }
            at += bytes;
        }
        Ok(has)
    }
}

/// What the entries wrote, and where it is.
#[derive(Debug)]
pub(super) struct RedoIndex {
    runs: Window<Logged>,
    records: Vec<LoggedRecord>,
    segments: Segments,
    open: Mutex<Open>,
}

/// Blocks of a disk, and what is read of them.
pub(super) type Part<'a> = (BlockRange, &'a mut [u8]);

/// Sectors of a part that a record wrote.
struct Piece {
    record: u32,
    part: usize,
    range: SectorRange,
}

/// Bytes of a segment that are read in one go.
struct Span {
    start: u64,
    data: Bytes,
}

impl Span {
    /// The bytes of a record that lies in it.
    fn record(&self, known: LoggedRecord) -> Option<Bytes> {
        let from = usize::try_from(known.offset.checked_sub(self.start)?).ok()?;
        let to = from + known.bytes as usize;
        (to <= self.data.len()).then(|| self.data.slice(from..to))
    }
}

impl RedoIndex {
    /// Ranges inside `range` that were written, ascending.
    pub(super) fn ranges(&self, range: SectorRange) -> impl Iterator<Item = SectorRange> + '_ {
        self.runs.overlap(range).map(|write| write.range)
    }

    /// Lays what was written over what stood there before.
    ///
    /// # Errors
    /// When a record cannot be read, is damaged, or was given up meanwhile.
    pub(super) fn lay_over(&self, parts: &mut [Part<'_>]) -> Result<(), JournalError> {
        let mut pieces = Vec::new();
        for (part, (blocks, plain)) in parts.iter_mut().enumerate() {
            let whole = sectors(*blocks);
            for write in self.runs.overlap(whole) {
                match write.content {
                    Logged::Zeros => place_of(whole, plain, write.range).fill(0),
                    Logged::Data(record) => pieces.push(Piece { record, part, range: write.range }),
                }
            }
        }
        // As they lie in the log.
        pieces.sort_unstable_by_key(|piece| piece.record);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = &pieces[..];
        while let Some(first) = rest.first() {
            let (mut bytes, mut last) = (0, None);
            let segment = self.record(first).segment;
            let count = rest
                .iter()
                .take_while(|piece| {
                    let record = self.record(piece);
                    bytes += if last == Some(piece.record) { 0 } else { u64::from(record.bytes) };
                    last = Some(piece.record);
                    record.segment == segment && (bytes <= READ_BYTES || piece.record == first.record)
                })
                .count();
            let (group, tail) = rest.split_at(count.max(1));
            self.lay_group(&mut open, segment, group, parts)?;
            rest = tail;
        }
        Ok(())
    }

    fn record(&self, piece: &Piece) -> LoggedRecord {
        self.records[piece.record as usize]
    }

    /// Reads the records of pieces that lie in one segment, close ones together.
    fn read_spans(
        &self,
        open: &mut Open,
        segment: u64,
        pieces: &[Piece],
    ) -> Result<VecDeque<Span>, JournalError> {
        let mut wanted: Vec<(u64, u64)> = Vec::new();
        for piece in pieces {
            let record = self.record(piece);
            let end = record.offset + u64::from(record.bytes);
            match wanted.last_mut() {
                Some(last) if record.offset >= last.0 && record.offset <= last.1 + GAP_BYTES => {
                    last.1 = last.1.max(end);
                }
                _ => wanted.push((record.offset, end)),
            }
        }
        let mut buffers: Vec<Vec<u8>> =
            wanted.iter().map(|(start, end)| vec![0; (end - start) as usize]).collect();
        let reads = wanted.iter().zip(&mut buffers);
        let mut reads: Vec<ReadAt<'_>> =
            reads.map(|((start, _), data)| ReadAt { offset: *start, data }).collect();
        self.segments.read(open, segment, &mut reads)?;
        let spans = wanted.into_iter().zip(buffers);
        Ok(spans.map(|((start, _), data)| Span { start, data: data.into() }).collect())
    }

    /// Lays pieces over whose records lie in one segment, ascending by them.
    fn lay_group(
        &self,
        open: &mut Open,
        segment: u64,
        pieces: &[Piece],
        parts: &mut [Part<'_>],
    ) -> Result<(), JournalError> {
        let mut spans = self.read_spans(open, segment, pieces)?;
        for pieces in pieces.chunk_by(|left, right| left.record == right.record) {
            let Some(known) = pieces.first().map(|first| self.record(first)) else { continue };
            // Spans stand in the order of the records.
            let bytes = loop {
                let Some(span) = spans.front() else { break Bytes::new() };
                match span.record(known) {
                    Some(bytes) => break bytes,
                    None => spans.pop_front(),
                };
            };
            let place = Place { segment, offset: known.offset, bytes: u64::from(known.bytes) };
            let (record, plain) = open_record(bytes, known, &mut open.decompressor)?
                .map_err(|error| self.segments.error(place, error))?;
            for piece in pieces {
                let Some((blocks, out)) = parts.get_mut(piece.part) else { continue };
                let from = ((piece.range.start - record.range().start) * SECTOR_BYTES) as usize;
                let bytes = plain.get(from..from + piece.range.bytes() as usize).unwrap_or_default();
                place_of(sectors(*blocks), out, piece.range).copy_from_slice(bytes);
            }
        }
        Ok(())
    }
}

fn sectors(blocks: BlockRange) -> SectorRange {
    SectorRange::new(blocks.start * BLOCK_SECTORS, blocks.end * BLOCK_SECTORS)
}

/// The bytes of a range in those of a larger one.
fn place_of(whole: SectorRange, plain: &mut [u8], range: SectorRange) -> &mut [u8] {
    let from = ((range.start - whole.start) * SECTOR_BYTES) as usize;
    plain.get_mut(from..from + range.bytes() as usize).unwrap_or_default()
}

/// Opens a record; it must be the one that was indexed.
fn open_record(
    mut bytes: Bytes,
    known: LoggedRecord,
    decompressor: &mut Option<Decompressor>,
) -> Result<Result<(Record, Vec<u8>), FormatError>, JournalError> {
    let decompressor = match decompressor {
        Some(decompressor) => decompressor,
        none => {
            let made = Decompressor::new();
            none.insert(made.map_err(|error| JournalError::Zstd { reason: error.to_string() })?)
        }
    };
    let mut open = || {
        let (header, _) = RecordHeader::read_prefix(&bytes)?;
        let (got, expected) = (header.head_crc, known.head_crc);
        if got != expected {
            return Err(FormatError::Checksum { what: "Record", got, expected });
        }
        let record = Record::take(&mut bytes)?;
        let mut plain = vec![0; record.plain_bytes() as usize];
        record.open_into(decompressor, &mut plain)?;
        Ok((record, plain))
    };
    Ok(open())
}
