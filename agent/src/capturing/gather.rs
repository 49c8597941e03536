//! What a closing window reads and records, kept in memory and made into batches.
//!
//! Invariants: the blocks that were read come first, later reads of a block behind earlier ones, then the records in
//! their order: so each disk's batches, one after another, make it what it was when the window closed, except what could
//! not be read, which is told; memory is bounded by [`WINDOW_BYTES_MAX`], beyond which the window fails, and what was to be
//! read then is told to be read again. Units: sectors, bytes. Called by `capturing` only.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reprotect_engine::format::batch::Stretch as StretchKind;
use reprotect_engine::format::extent::Record as Change;
use reprotect_engine::io::buffer::PoolBuf;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::limits::{
    BATCH_PLAIN_BYTES_MAX, BATCH_RECORDS_MAX, DELTA_RECORD_BYTES_MAX, ZERO_RECORD_BYTES_MAX,
};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};

use super::{BLOCK_SECTORS, Batch};
use crate::capture::{
    CaptureError, DiskSlot, GROUP_BYTES_MAX, Kind, Record, Span, WindowSink, groups, spans,
};
use crate::salvage::{Salvaged, is_alive};

/// Bytes that a window may gather.
const WINDOW_BYTES_MAX: u64 = 128 << 20;
/// How long reading around what fails may take: the ring fills meanwhile.
const PARTS_LIMIT: Duration = Duration::from_secs(2);

/// Disks by their slots' numbers: who they are, how they are read, and how far they go.
type Files<'a> = BTreeMap<usize, (DiskId, &'a mut Box<dyn BlockFile>, SectorRange)>;

fn disk_at<'f>(
    files: &'f mut Files<'_>,
    slot: DiskSlot,
) -> Option<(DiskId, &'f mut dyn BlockFile, SectorRange)> {
    files
        .get_mut(&slot.index())
        .map(|(disk, file, whole)| (*disk, &mut ***file as &mut dyn BlockFile, *whole))
}

pub(super) struct Gatherer<'a> {
    files: Files<'a>,
    read: BTreeMap<DiskId, Vec<Change>>,
    recorded: BTreeMap<DiskId, Vec<Change>>,
    /// What is to be read again in the next round: discarded, behind the end of a disk as it is known, or too much.
    again: Vec<(DiskSlot, SectorRange)>,
    /// What could not be read, and not later either.
    unread: BTreeMap<DiskId, RangeSet>,
    bytes: u64,
    /// What is read goes here first: aligned, so that no read needs another buffer.
    buffer: Option<PoolBuf>,
}

impl<'a> Gatherer<'a> {
    pub(super) const fn new(files: Files<'a>) -> Self {
        Self {
            files,
            read: BTreeMap::new(),
            recorded: BTreeMap::new(),
            again: Vec::new(),
            unread: BTreeMap::new(),
            bytes: 0,
            buffer: None,
        }
    }

    fn count(&mut self, bytes: u64) -> Result<(), CaptureError> {
        let bytes = self.bytes + bytes;
        if bytes > WINDOW_BYTES_MAX {
            return Err(CaptureError::WindowTooLarge { bytes, max: WINDOW_BYTES_MAX });
        }
        self.bytes = bytes;
        Ok(())
    }

    /// A window failed, and another one is opened: what is recorded from then on is all that counts. What was discarded is
    /// read again all the same.
    pub(super) fn forget_records(&mut self) {
        let recorded = self.recorded.values().flatten().map(Change::plain_bytes).sum::<u64>();
        self.bytes = self.bytes.saturating_sub(recorded);
        self.recorded.clear();
    }

    /// What could not be read.
    pub(super) fn unread(&self) -> Vec<(DiskId, SectorRange)> {
        let of = |(disk, ranges): (&DiskId, &RangeSet)| {
            ranges.iter().map(|range| (*disk, range)).collect::<Vec<_>>()
        };
        self.unread.iter().flat_map(of).collect()
    }

    /// Batches in the order in which they are to be submitted, with the records if the window `closed`, and the ranges
    /// that are to be read again.
    pub(super) fn into_batches(self, closed: bool) -> (Vec<Batch>, Vec<(DiskSlot, SectorRange)>) {
        let mut batches = Vec::new();
        for (disk, changes) in self.read {
            batches.extend(split(disk, StretchKind::Diff, changes));
        }
        for (disk, changes) in self.recorded.into_iter().filter(|_| closed) {
            batches.extend(split(disk, StretchKind::Ordered, changes));
        }
        (batches, self.again)
    }
}

/// Reads what can be read of the spans' parts; answers what cannot.
fn read_in_parts(file: &mut dyn BlockFile, spans: &[Span], buffer: &mut [u8]) -> RangeSet {
    let limit = Instant::now() + PARTS_LIMIT;
    let mut salvaged = Salvaged::default();
    for (span, data) in spans.iter().zip(cut(buffer, spans)) {
        for part in &span.parts {
            let at = ((part.start - span.whole.start) * SECTOR_BYTES) as usize;
            let data = &mut data[at..at + part.bytes() as usize];
            salvaged.read(file, *part, data, &|| Instant::now() >= limit);
        }
    }
    salvaged.unread
}

/// The places of spans in the buffer.
fn cut<'b>(mut buffer: &'b mut [u8], spans: &[Span]) -> Vec<&'b mut [u8]> {
    let part = |span: &Span| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(span.room_bytes() as usize);
        buffer = rest;
        &mut part[..span.whole.bytes() as usize]
    };
    spans.iter().map(part).collect()
}

/// A span's parts as changes, but for what is missing.
fn changes_read(span: &Span, data: &[u8], missing: &RangeSet) -> Vec<Change> {
    let mut content = BytesMut::with_capacity(span.parts.iter().map(|part| part.bytes() as usize).sum());
    for part in &span.parts {
        let at = ((part.start - span.whole.start) * SECTOR_BYTES) as usize;
        content.extend_from_slice(&data[at..at + part.bytes() as usize]);
    }
    let (content, mut at, mut changes) = (content.freeze(), 0, Vec::new());
    for part in &span.parts {
        let end = at + part.bytes() as usize;
        let there = missing.missing(*part);
        changes.extend(cut_records(part.start, &content.slice(at..end), &there, DELTA_RECORD_BYTES_MAX));
        at = end;
    }
    changes
}

/// Cuts into batches as large as they may be.
pub(super) fn split(disk: DiskId, kind: StretchKind, changes: Vec<Change>) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut plain = u64::MAX;
    for change in changes {
        let bytes = change.plain_bytes();
        let full = |batch: &Batch| batch.records.len() >= BATCH_RECORDS_MAX as usize;
        if plain.saturating_add(bytes) > BATCH_PLAIN_BYTES_MAX || batches.last().is_none_or(full) {
            batches.push(Batch { disk, kind, records: Vec::new() });
            plain = 0;
        }
        plain += bytes;
        if let Some(batch) = batches.last_mut() {
            batch.records.push(change);
        }
    }
    batches
}

/// Whether what the device makes of it is the device's own affair.
pub(super) const fn is_discard(record: &Record<'_>) -> bool {
    matches!(record.kind, Some(Kind::Discard | Kind::SecureErase))
}

/// Why there is no moment while a disk is larger than it is read to.
pub(super) const OUTGROWN: &str =
    "it was written behind its end as it is known: it grew, and is consistent again when its target did, too";

/// Whether something was written behind the end of the disk as it is known. Changes of the last block end there at most.
pub(super) const fn is_outgrown(record: &Record<'_>, whole: SectorRange) -> bool {
    record.range.end > whole.end && !record.range.is_empty()
}

/// A record of the ring as changes of the stream.
pub(super) fn changes_of(record: &Record<'_>, whole: SectorRange) -> Vec<Change> {
    let range = record.range.intersect(whole);
    let zero_sectors = ZERO_RECORD_BYTES_MAX / SECTOR_BYTES;
    match record.kind {
        Some(Kind::Write) => {
            let data = Bytes::copy_from_slice(record.data);
            let piece = |piece: SectorRange| {
                let at = ((piece.start - range.start) * SECTOR_BYTES) as usize;
                Change::data(piece.start, data.slice(at..at + piece.bytes() as usize))
            };
            range.aligned_pieces(DELTA_RECORD_BYTES_MAX / SECTOR_BYTES).map(piece).collect()
        }
        Some(Kind::Zeroes) => range.aligned_pieces(zero_sectors).map(Change::zeros).collect(),
        Some(Kind::Discard | Kind::SecureErase) => {
            range.aligned_pieces(zero_sectors).map(Change::discard).collect()
        }
        Some(Kind::Flush | Kind::Passthrough | Kind::Zone) | None => Vec::new(),
    }
}

impl WindowSink for Gatherer<'_> {
    fn read(&mut self, slot: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
        if let Err(error) = self.count(sectors.sector_count() * SECTOR_BYTES) {
            self.again.extend(sectors.iter().map(|range| (slot, range)));
            return Err(error);
        }
        let Some((disk, file, whole)) = disk_at(&mut self.files, slot) else { return Ok(()) };
        // The disk grew since it is read to there; the last block of its map may be longer than it.
        let behind = SectorRange::new(whole.end.next_multiple_of(BLOCK_SECTORS), u64::MAX);
        self.again.extend(sectors.overlap(behind).map(|range| (slot, range)));
        let inside = sectors.iter().map(|range| range.intersect(whole)).filter(|range| !range.is_empty());
        let spans = spans(inside);
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            none => none.insert(PoolBuf::alone(GROUP_BYTES_MAX as usize).map_err(CaptureError::Memory)?),
        };
        let mut changes = Vec::new();
        let unread = self.unread.entry(disk).or_default();
        for spans in groups(&spans) {
            let mut reads: Vec<ReadAt<'_>> = spans
                .iter()
                .zip(cut(buffer, spans))
                .map(|(span, data)| ReadAt { offset: span.whole.byte_start(), data })
                .collect();
            let mut missing = RangeSet::new();
            if let Err(source) = file.read(&mut reads) {
                missing = read_in_parts(file, spans, buffer);
                if !is_alive(file, whole.end, 0) {
                    return Err(CaptureError::Read { disk: disk.to_string(), source });
                }
            }
            for (span, data) in spans.iter().zip(cut(buffer, spans)) {
                changes.extend(changes_read(span, data, &missing));
                let there = span.parts.iter().flat_map(|part| missing.missing(*part));
                there.for_each(|range| unread.remove(range));
            }
            unread.extend(&missing);
        }
        self.read.entry(disk).or_default().extend(changes);
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
        if !self.files.contains_key(&record.slot.index()) {
            return Ok(()); // of a disk that nobody asked for yet
        }
        self.count(record.data.len() as u64)?;
        let Some((disk, _, whole)) = disk_at(&mut self.files, record.slot) else { return Ok(()) };
        if is_outgrown(record, whole) {
            return Err(CaptureError::Unsupported { disk: disk.to_string(), reason: OUTGROWN.to_owned() });
        }
        let changes = changes_of(record, whole);
        if is_discard(record) {
            self.again.push((record.slot, record.range.intersect(whole)));
        }
        self.recorded.entry(disk).or_default().extend(changes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::io::WriteAt;
    use reprotect_engine::io::memory::MemoryFile;

    use super::*;
    use crate::salvage::tests::Failing;

    const DISK: DiskId = DiskId([1; 16]);

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        ranges.iter().map(|(start, end)| SectorRange::new(*start, *end)).collect()
    }

    #[test]
    fn a_window_goes_on_without_what_cannot_be_read_unless_nothing_can() {
        let whole = SectorRange::new(0, 4096);
        let mut disk = MemoryFile::new(whole.bytes());
        disk.write(&[WriteAt { offset: 0, data: &vec![7; whole.bytes() as usize] }]).unwrap();
        let failing = Failing::new(disk, &[SectorRange::new(16, 17), SectorRange::new(800, 808)]);
        let bad = std::sync::Arc::clone(&failing.bad);
        let mut file: Box<dyn BlockFile> = Box::new(failing);
        let slot = DiskSlot(0);
        let mut gatherer = Gatherer::new(BTreeMap::from([(slot.index(), (DISK, &mut file, whole))]));
        gatherer.read(slot, &set(&[(8, 32), (800, 816)])).unwrap();
        let unread = vec![(DISK, SectorRange::new(16, 24)), (DISK, SectorRange::new(800, 808))];
        assert_eq!(gatherer.unread(), unread);
        // Read again in a later round: one of them can be read now, and something else cannot any more.
        *bad.lock().unwrap() = set(&[(800, 808), (24, 32)]);
        gatherer.read(slot, &set(&[(16, 32)])).unwrap();
        let unread = vec![(DISK, SectorRange::new(24, 32)), (DISK, SectorRange::new(800, 808))];
        assert_eq!(gatherer.unread(), unread);
        bad.lock().unwrap().insert(whole);
        assert!(matches!(gatherer.read(slot, &set(&[(0, 8)])), Err(CaptureError::Read { .. })));
        let (batches, _) = gatherer.into_batches(true);
        let read = batches.iter().flat_map(|batch| batch.records.iter().map(Change::range));
        assert_eq!(read.collect::<RangeSet>(), set(&[(8, 32), (808, 816)]), "nothing in place of the rest");
    }

    #[test]
    fn what_changed_behind_the_end_of_a_disk_that_grew_is_read_again_in_a_later_round() {
        let whole = SectorRange::new(0, 801);
        let mut file: Box<dyn BlockFile> = Box::new(MemoryFile::new(801 * SECTOR_BYTES));
        let slot = DiskSlot(3);
        let mut gatherer = Gatherer::new(BTreeMap::from([(slot.index(), (DISK, &mut file, whole))]));
        gatherer.read(slot, &set(&[(8, 16), (800, 840), (4096, 8192)])).unwrap();
        let (batches, again) = gatherer.into_batches(true);
        let read = batches.iter().flat_map(|batch| batch.records.iter().map(Change::range));
        assert_eq!(read.collect::<RangeSet>(), set(&[(8, 16), (800, 801)]));
        assert_eq!(again, [(slot, SectorRange::new(808, 840)), (slot, SectorRange::new(4096, 8192))]);
    }

    #[test]
    fn a_window_that_is_too_large_has_what_was_read_before_and_says_what_was_not() {
        let whole = SectorRange::new(0, 1 << 20);
        let mut file: Box<dyn BlockFile> = Box::new(MemoryFile::new(whole.bytes()));
        let slot = DiskSlot(0);
        let mut gatherer = Gatherer::new(BTreeMap::from([(slot.index(), (DISK, &mut file, whole))]));
        gatherer.read(slot, &set(&[(8, 16)])).unwrap();
        let max = WINDOW_BYTES_MAX / SECTOR_BYTES;
        let error = gatherer.read(slot, &set(&[(16, 24), (1024, 1024 + max)])).unwrap_err();
        assert!(matches!(error, CaptureError::WindowTooLarge { .. }), "{error}");
        gatherer.read(slot, &set(&[(32, 40)])).unwrap();
        let (batches, again) = gatherer.into_batches(false);
        let read = batches.iter().flat_map(|batch| batch.records.iter().map(Change::range));
        assert_eq!(read.collect::<RangeSet>(), set(&[(8, 16), (32, 40)]));
        assert_eq!(again, [(slot, SectorRange::new(16, 24)), (slot, SectorRange::new(1024, 1024 + max))]);
    }

    #[test]
    fn a_second_window_takes_what_was_read_and_nothing_of_what_the_first_recorded() {
        let whole = SectorRange::new(0, 4096);
        let mut file: Box<dyn BlockFile> = Box::new(MemoryFile::new(whole.bytes()));
        let slot = DiskSlot(0);
        let mut gatherer = Gatherer::new(BTreeMap::from([(slot.index(), (DISK, &mut file, whole))]));
        gatherer.read(slot, &set(&[(8, 16)])).unwrap();
        let record = |kind, start, data: &'static [u8]| Record {
            slot,
            kind: Some(kind),
            range: SectorRange::new(start, start + 8),
            data,
            drops: 0,
            generation: 1,
        };
        gatherer.record(&record(Kind::Write, 16, &[1; 4096])).unwrap();
        gatherer.record(&record(Kind::Discard, 24, &[])).unwrap();
        let bytes = gatherer.bytes;
        gatherer.forget_records();
        assert_eq!(gatherer.bytes, bytes - 4096);
        gatherer.record(&record(Kind::Write, 32, &[2; 4096])).unwrap();
        let (batches, again) = gatherer.into_batches(true);
        let all: Vec<SectorRange> =
            batches.iter().flat_map(|batch| batch.records.iter().map(Change::range)).collect();
        assert_eq!(all, [SectorRange::new(8, 16), SectorRange::new(32, 40)]);
        assert_eq!(again, [(slot, SectorRange::new(24, 32))]);
    }
}
