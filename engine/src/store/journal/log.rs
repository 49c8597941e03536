//! The redo log: entries go into groups, groups into segments, and a group that was flushed is durable.
//!
//! Invariants: one group is in flight at a time, so a valid group behind an invalid one proves damage, never a torn
//! end; an entry lies in one group and a group in one segment; a segment's use is in the manifest before its first
//! group is written; the fast path writes into space that was written once before, so it changes no metadata and
//! meets no full medium; one segment is kept back for control entries. A failed write or flush stops the log (I6).
//! Units: bytes, group and entry numbers. Called by `store::journal`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{JournalError, random_u64};
use super::indexed::IndexBuilder;
use super::manifest::Manifest;
use crate::checksum::crc32;
use crate::format::manifest::{Edit, Released, SegmentOpened};
use crate::format::segment::{
    EntryHead, EntryKind, GROUP_MAGIC, GROUP_PAYLOAD_BYTES_MAX, GroupHeader, SEGMENT_MAGIC, SegmentHeader,
};
use crate::io::{BlockFile, ByteRange, ReadAt, WriteAt};
use crate::mutants::{Mutant, mutant};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, DiskId, Timestamp};

/// Where an entry lies in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Number of the segment.
    pub segment: u64,
    /// Byte position of the entry's head in it.
    pub offset: u64,
    /// Bytes of head and body.
    pub bytes: u64,
}

/// Whether an entry may use the segment that is kept back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// What comes from the source: waits for space.
    Data,
    /// What frees space: never waits.
    Control,
}

/// The redo log of an open journal.
pub struct Log {
    files: Arc<dyn Files>,
    folder: PathBuf,
    segment_bytes: u64,
    /// Segment files that hold nothing anybody needs.
    free: Vec<u64>,
    /// The highest number of a segment file.
    slot_newest: u64,
    current: Option<Current>,
    /// The newest segment at the opening: it gets its index when the next one is in use.
    left: Option<(SegmentOpened, IndexBuilder)>,
    group: GroupBuilder,
    next_group: u64,
    previous: u32,
    durable_group: u64,
    /// Segments opened for reading, by number.
    readers: BTreeMap<u64, Box<dyn BlockFile>>,
    failed: Option<String>,
}

/// The segment that is written.
struct Current {
    opened: SegmentOpened,
    file: Box<dyn BlockFile>,
    at: u64,
    index: IndexBuilder,
}

impl Current {
    /// Whether a group of so many bytes fits behind what is there, and later the index. An entry that is alone in its
    /// segment may take the room of the index.
    fn fits(&self, pending: u64, bytes: u64) -> bool {
        let end = self.at + (GroupHeader::BYTES as u64 + pending + bytes).next_multiple_of(BLOCK_BYTES);
        let is_alone = self.at == BLOCK_BYTES && pending == 0;
        let kept = if is_alone { 0 } else { self.index.room_bytes() };
        end + kept <= self.opened.bytes
    }
}

/// The group that is being filled: room for its head, then entries.
#[derive(Default)]
struct GroupBuilder {
    bytes: Vec<u8>,
    entries: u32,
}

/// Path of a segment file.
pub(super) fn segment_path(folder: &Path, slot: u64) -> PathBuf {
    folder.join(segment_name(slot))
}

/// Name of a segment file.
pub(super) fn segment_name(slot: u64) -> String {
    format!("redo-{slot:06}")
}

/// The number in a segment file's name.
pub(super) fn segment_slot(name: &str) -> Option<u64> {
    let slot = name.strip_prefix("redo-")?.parse().ok()?;
    (segment_name(slot) == name).then_some(slot)
}

/// A free segment that has its name and is to be made, with or without the journal's lock.
pub struct PlannedSegment {
    files: Arc<dyn Files>,
    path: PathBuf,
    slot: u64,
    bytes: u64,
}

/// A segment every byte of which was written; see [`super::Journal::adopt`].
#[derive(Debug)]
#[must_use]
pub struct FreeSegment {
    slot: u64,
}

impl PlannedSegment {
    /// Makes it. Blocks for as long as writing it takes.
    ///
    /// # Errors
    /// When the medium is full; nothing is left behind then.
    pub fn make(self) -> Result<FreeSegment, JournalError> {
        self.files.create(&self.path, self.bytes)?;
        if let Err(error) = fill(&*self.files, &self.path) {
            let _ = self.files.remove(&self.path); // the error that matters is the one below
            return Err(error);
        }
        Ok(FreeSegment { slot: self.slot })
    }
}

/// Of the segment files found in the folder, those in use and those every byte of which was written. Making a segment may
/// have been interrupted: such a one would fail, or meet a full medium, when it is written. It holds nothing and is removed.
///
/// # Errors
/// When one cannot be looked at or removed.
pub(super) fn finished_slots(
    files: &dyn Files,
    folder: &Path,
    manifest: &Manifest,
    mut slots: Vec<u64>,
) -> Result<Vec<u64>, JournalError> {
    let used: Vec<u64> = manifest.shape().segments.values().map(|segment| segment.slot).collect();
    for slot in std::mem::take(&mut slots) {
        let path = segment_path(folder, slot);
        if used.contains(&slot) || is_filled(&mut *files.open(&path, false)?)? {
            slots.push(slot);
        } else {
            files.remove(&path)?;
        }
    }
    Ok(slots)
}

fn is_filled(file: &mut dyn BlockFile) -> Result<bool, JournalError> {
    let whole = ByteRange { start: 0, end: file.size_bytes() };
    Ok(!whole.is_empty() && file.allocated(whole)? == [whole])
}

/// Readers kept open at a time.
const READERS_MAX: usize = 16;

impl Log {
    /// A log that goes on behind `last_group`, in a segment of its own.
    pub(super) fn new(
        files: Arc<dyn Files>,
        folder: &Path,
        segment_bytes: u64,
        slots: &[u64],
        manifest: &Manifest,
        last_group: u64,
        previous: u32,
    ) -> Self {
        let used: Vec<u64> = manifest.shape().segments.values().map(|segment| segment.slot).collect();
        Self {
            files,
            folder: folder.into(),
            segment_bytes,
            free: slots.iter().copied().filter(|slot| !used.contains(slot)).collect(),
            slot_newest: slots.iter().chain(&used).copied().max().unwrap_or(0),
            current: None,
            left: None,
            group: GroupBuilder::default(),
            next_group: last_group + 1,
            previous,
            durable_group: last_group,
            readers: BTreeMap::new(),
            failed: None,
        }
    }

    /// Newest group known durable.
    #[must_use]
    pub const fn durable_group(&self) -> u64 {
        self.durable_group
    }

    /// Whether entries wait for a commit.
    #[must_use]
    pub const fn is_pending(&self) -> bool {
        self.group.entries > 0
    }

    /// Bytes of entries that wait for a commit.
    #[must_use]
    pub fn pending_bytes(&self) -> u64 {
        self.group.bytes.len() as u64
    }

    /// Adds an entry whose body is the concatenation of `body`; answers where it will lie. It is durable after the
    /// next [`Self::commit`]; where the group or segment is full, what came before is committed first.
    ///
    /// # Errors
    /// When the medium is full (nothing was added, try again), or the log failed.
    pub fn append(
        &mut self,
        manifest: &mut Manifest,
        now: Timestamp,
        entry: &NewEntry<'_>,
    ) -> Result<Place, JournalError> {
        self.check()?;
        let body_bytes: usize = entry.body.iter().map(|part| part.len()).sum();
        let bytes = (EntryHead::BYTES + body_bytes) as u64;
        if self.group.payload_bytes() + bytes > GROUP_PAYLOAD_BYTES_MAX {
            self.commit(manifest, now)?;
        }
        let pending = self.group.payload_bytes();
        if self.current.as_ref().is_none_or(|current| !current.fits(pending, bytes)) {
            self.commit(manifest, now)?;
            if self.current.as_ref().is_none_or(|current| !current.fits(0, bytes)) {
                self.next_segment(manifest, now, entry.room)?;
            }
        }
        let pending = self.group.payload_bytes();
        let Some(current) = self.current.as_mut().filter(|current| current.fits(pending, bytes)) else {
            let what = format!("an entry of {bytes} bytes fits no segment of {} bytes", self.segment_bytes);
            return Err(JournalError::Full { path: self.folder.clone(), what });
        };
        let offset = current.at + GroupHeader::BYTES as u64 + pending;
        self.group.push(entry);
        current.index.push(entry.kind, entry.disk, entry.number, offset, bytes);
        if entry.carried {
            current.index.give_up();
        }
        Ok(Place { segment: current.opened.number, offset, bytes })
    }

    /// Writes and flushes what was added; answers the number of the newest durable group. Without entries nothing
    /// happens, unless `even_empty`: then an empty group says that the one before it is durable.
    ///
    /// # Errors
    /// When it cannot be written: the log has failed then.
    pub fn commit(&mut self, manifest: &mut Manifest, now: Timestamp) -> Result<u64, JournalError> {
        if self.group.entries == 0 { Ok(self.durable_group) } else { self.write_group(manifest, now) }
    }

    /// Writes an empty group where the newest group is not known durable by a later one: so a damaged last group can
    /// be told from one that was torn.
    ///
    /// # Errors
    /// As for [`Self::commit`].
    pub fn seal(&mut self, manifest: &mut Manifest, now: Timestamp) -> Result<u64, JournalError> {
        match &self.current {
            Some(current) if current.at + BLOCK_BYTES <= current.opened.bytes => {
                self.write_group(manifest, now)
            }
            _ => self.commit(manifest, now),
        }
    }

    fn write_group(&mut self, _manifest: &mut Manifest, now: Timestamp) -> Result<u64, JournalError> {
        self.check()?;
        let Some(current) = &mut self.current else { return Ok(self.durable_group) };
        let group = self.next_group;
        let (bytes, header) =
            self.group.close(current.opened.salt, group, self.previous, self.durable_group, now);
        let written = current
            .file
            .write(&[WriteAt { offset: current.at, data: bytes }])
            .and_then(|()| if mutant(Mutant::GroupUnflushed) { Ok(()) } else { current.file.flush() });
        if let Err(error) = written {
            self.failed = Some(error.to_string());
            return Err(error.into());
        }
        current.at += header.stored_bytes();
        current.index.close_group(&header, current.at);
        self.group.clear();
        self.previous = header.crc;
        self.next_group += 1;
        self.durable_group = group;
        Ok(group)
    }

    /// Uses the next segment; the manifest learns of it before its header is written.
    fn next_segment(
        &mut self,
        manifest: &mut Manifest,
        now: Timestamp,
        room: Room,
    ) -> Result<(), JournalError> {
        let kept_back = usize::from(room == Room::Data);
        while self.free.len() <= kept_back {
            self.prepare()?;
        }
        let Some(slot) = self.free.last().copied() else {
            return Err(JournalError::damaged(&self.folder, "no segment is free"));
        };
        let path = segment_path(&self.folder, slot);
        let mut file = self.files.open(&path, true)?;
        let opened = SegmentOpened {
            number: manifest.shape().segment_newest + 1,
            slot,
            salt: random_u64(&path)?,
            first_group: self.next_group,
            bytes: file.size_bytes(),
        };
        // It stays free where the manifest has no room to name it: the next attempt takes the same one.
        manifest.append(&[Edit::SegmentOpened(opened)], now, self.durable_group)?;
        self.free.pop();
        let header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            crc: 0,
            incompatible: 0,
            journal: manifest.journal(),
            number: opened.number,
            salt: opened.salt,
            first_group: opened.first_group,
            bytes: opened.bytes,
            created: now,
        };
        let written =
            file.write(&[WriteAt { offset: 0, data: &header.to_block() }]).and_then(|()| file.flush());
        if let Err(error) = written {
            self.failed = Some(error.to_string());
            return Err(error.into());
        }
        let index = IndexBuilder::new(&opened, self.previous);
        let before = self.current.replace(Current { opened, file, at: BLOCK_BYTES, index });
        self.index_before(manifest, before);
        Ok(())
    }

    /// Nothing is added any more to the segment before the one that is in use now: it gets its index.
    fn index_before(&mut self, manifest: &Manifest, before: Option<Current>) {
        if let Some(Current { opened, mut file, index, .. }) = before {
            index.write(&mut *file, manifest.journal(), &opened);
        } else if let Some((opened, index)) = self.left.take()
            && manifest.shape().segments.contains_key(&opened.number)
            && let Ok(mut file) = self.files.open(&segment_path(&self.folder, opened.slot), true)
        {
            index.write(&mut *file, manifest.journal(), &opened);
        }
    }

    /// Gives the segments that were read at the opening the index they lack, the newest when the next is in use.
    pub(super) fn index_older(&mut self, manifest: &Manifest, wanting: Vec<(SegmentOpened, IndexBuilder)>) {
        let newest = manifest.shape().segments.keys().next_back().copied();
        for (opened, index) in wanting {
            if Some(opened.number) == newest {
                self.left = Some((opened, index));
            } else if let Ok(mut file) = self.files.open(&segment_path(&self.folder, opened.slot), true) {
                index.write(&mut *file, manifest.journal(), &opened);
            }
        }
    }

    /// Makes one more free segment, every byte of it written.
    ///
    /// # Errors
    /// When the medium is full; nothing is left behind then.
    pub(super) fn prepare(&mut self) -> Result<(), JournalError> {
        let made = self.plan_segment().make()?;
        self.adopt(made);
        Ok(())
    }

    /// Names one more free segment. Making it takes long and needs nothing of the log.
    pub(super) fn plan_segment(&mut self) -> PlannedSegment {
        self.slot_newest += 1;
        let slot = self.slot_newest;
        let path = segment_path(&self.folder, slot);
        PlannedSegment { files: Arc::clone(&self.files), path, slot, bytes: self.segment_bytes }
    }

    /// Takes a segment in that was made.
    pub(super) fn adopt(&mut self, made: FreeSegment) {
        self.free.push(made.slot);
    }

    /// Whether an entry's group was written.
    #[must_use]
    pub(super) fn is_written(&self, place: Place) -> bool {
        let current = self.current.as_ref();
        current.is_none_or(|current| place.segment != current.opened.number || place.offset < current.at)
    }

    /// Removes free segments beyond a number.
    pub(super) fn shrink(&mut self, segments: usize) -> Result<(), JournalError> {
        while self.free.len() > segments {
            let Some(slot) = self.free.first().copied() else { break };
            self.files.remove(&segment_path(&self.folder, slot))?;
            self.free.remove(0);
        }
        Ok(())
    }

    /// Segments that may be used without asking the medium for space.
    #[must_use]
    pub const fn free_segments(&self) -> usize {
        self.free.len()
    }

    /// The segment that is written, if any.
    #[must_use]
    pub fn current_segment(&self) -> Option<u64> {
        self.current.as_ref().map(|current| current.opened.number)
    }

    /// Gives a segment back: nobody needs what is in it.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub(super) fn release(
        &mut self,
        manifest: &mut Manifest,
        now: Timestamp,
        number: u64,
    ) -> Result<(), JournalError> {
        let Some(slot) = manifest.shape().segments.get(&number).map(|segment| segment.slot) else {
            return Ok(());
        };
        debug_assert_ne!(self.current_segment(), Some(number));
        manifest.append(&[Edit::SegmentReleased(Released { number })], now, self.durable_group)?;
        self.readers.remove(&number);
        self.free.insert(0, slot);
        Ok(())
    }

    /// Reads an entry back, checked.
    ///
    /// # Errors
    /// When it cannot be read, or is not what it was.
    pub fn read(&mut self, manifest: &Manifest, place: Place) -> Result<(EntryHead, Vec<u8>), JournalError> {
        let Some(segment) = manifest.shape().segments.get(&place.segment).copied() else {
            let what = format!("segment {} is not in the log any more", place.segment);
            return Err(JournalError::damaged(&self.folder, what));
        };
        let path = segment_path(&self.folder, segment.slot);
        let file = match &mut self.current {
            Some(current) if current.opened.number == place.segment => &mut current.file,
            _ => {
                if !self.readers.contains_key(&place.segment) {
                    if self.readers.len() >= READERS_MAX {
                        self.readers.pop_first();
                    }
                    self.readers.insert(place.segment, self.files.open(&path, false)?);
                }
                match self.readers.get_mut(&place.segment) {
                    Some(file) => file,
                    None => return Err(JournalError::damaged(&path, "it cannot be opened")),
                }
            }
        };
        let mut bytes = vec![0; place.bytes as usize];
        file.read(&mut [ReadAt { offset: place.offset, data: &mut bytes }])?;
        let remedy = "the disk is compared with its source";
        let head = EntryHead::open(&bytes).map_err(JournalError::format(&path, place.offset, remedy))?;
        let body = bytes.split_off(EntryHead::BYTES.min(bytes.len()));
        head.check_body(&body).map_err(JournalError::format(&path, place.offset, remedy))?;
        Ok((head, body))
    }

    /// Refuses all writes from now on: the journal was opened for reading.
    pub(super) fn forbid_writes(&mut self) {
        self.failed = Some(super::manifest::TO_READ.to_owned());
    }

    fn check(&self) -> Result<(), JournalError> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(JournalError::Failed { path: self.folder.clone(), why: why.clone() }),
        }
    }
}

/// An entry to be added.
pub struct NewEntry<'a> {
    /// What it says.
    pub kind: EntryKind,
    /// The disk.
    pub disk: DiskId,
    /// Its place among the disk's, or zero.
    pub number: u64,
    /// Its body, in parts.
    pub body: &'a [&'a [u8]],
    /// Whether it may use the segment that is kept back.
    pub room: Room,
    /// Whether it stands further back in the log already.
    pub carried: bool,
}

impl GroupBuilder {
    fn payload_bytes(&self) -> u64 {
        self.bytes.len().saturating_sub(GroupHeader::BYTES) as u64
    }

    fn push(&mut self, entry: &NewEntry<'_>) {
        if self.bytes.is_empty() {
            self.bytes.resize(GroupHeader::BYTES, 0);
        }
        let mut crc = crc32fast::Hasher::new();
        let mut body_bytes = 0;
        for part in entry.body {
            crc.update(part);
            body_bytes += part.len() as u32;
        }
        let head = EntryHead::new(entry.kind, entry.disk, entry.number, body_bytes, crc.finalize());
        let head = if entry.carried { head.carried() } else { head };
        self.bytes.extend_from_slice(&head.to_bytes());
        for part in entry.body {
            self.bytes.extend_from_slice(part);
        }
        self.entries += 1;
    }

    /// The group's bytes, padded, with its head.
    fn close(
        &mut self,
        salt: u64,
        group: u64,
        previous: u32,
        durable_group: u64,
        time: Timestamp,
    ) -> (&[u8], GroupHeader) {
        self.bytes.resize(self.bytes.len().max(GroupHeader::BYTES), 0);
        let payload = self.bytes.get(GroupHeader::BYTES..).unwrap_or_default();
        let header = GroupHeader {
            magic: GROUP_MAGIC,
            crc: 0,
            salt,
            group,
            payload_bytes: payload.len() as u32,
            entry_count: self.entries,
            payload_crc: crc32(payload),
            previous,
            durable_group,
            time,
        }
        .sealed();
        if let Some(head) = self.bytes.get_mut(..GroupHeader::BYTES) {
            head.copy_from_slice(&header.to_bytes());
        }
        self.bytes.resize(header.stored_bytes() as usize, 0);
        (&self.bytes, header)
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.entries = 0;
    }
}

/// Writes every byte of a new segment file.
fn fill(files: &dyn Files, path: &Path) -> Result<(), JournalError> {
    const PIECE: usize = 1 << 20;
    let mut file = files.open(path, true)?;
    let zeros = vec![0; PIECE];
    let size = file.size_bytes();
    let mut at = 0;
    while at < size {
        let len = (size - at).min(PIECE as u64);
        file.write(&[WriteAt { offset: at, data: zeros.get(..len as usize).unwrap_or_default() }])?;
        at += len;
    }
    file.flush()?;
    Ok(())
}
