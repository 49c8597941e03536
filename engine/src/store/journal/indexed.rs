//! Indexes of segments: gathered while a segment is written, written behind its last group, read instead of it.
//!
//! An index is written when the next segment is in use, durably: so only a segment that nothing is added to any more
//! has one, and the newest is always read. It stands in space that was written once before and belongs to the segment's
//! use by the salt: a segment that is used again has lost it. Its head, less than a sector, is written when the items are
//! durable: a crash leaves a whole index or none.
//!
//! Invariant: an index that is missing, damaged or does not fit costs time and nothing else; so nothing here fails an
//! opening or a commit. Units: bytes, group and entry numbers. Called by `log` and `recovery`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::error::JournalError;
use super::log::{Place, segment_path};
use super::recovery::{Damage, LogEntry, Scanner};
use super::shape::Shape;
use super::tolerant::Tolerant;
use crate::format::FormatError;
use crate::format::disk_state::DiskState;
use crate::format::manifest::SegmentOpened;
use crate::format::segment::{Applied, EntryHead, EntryKind, GroupHeader, JournalId};
use crate::format::segment_index::{
    SEGMENT_INDEX_MAGIC, SegmentIndexHead, SegmentIndexItem, encode_index, index_bytes,
};
use crate::io::{BlockFile, ReadAt, WriteAt};
use crate::units::{BLOCK_BYTES, DiskId, Timestamp};

/// What the index of a segment will say.
#[derive(Clone, Debug)]
pub struct IndexBuilder {
    numbered: Vec<SegmentIndexItem>,
    /// The newest STATE and APPLIED of each disk.
    newest: BTreeMap<(DiskId, bool), SegmentIndexItem>,
    /// Items of the group that is not closed yet begin here.
    waiting: usize,
    last_group: u64,
    groups_end: u64,
    previous: u32,
    last_crc: u32,
    is_empty: bool,
    /// An entry was carried into the segment: which of two copies counts is seen by reading.
    given_up: bool,
}

impl IndexBuilder {
    /// Of a segment without groups; `previous` is the checksum of the group before it.
    pub(super) const fn new(opened: &SegmentOpened, previous: u32) -> Self {
        Self {
            numbered: Vec::new(),
            newest: BTreeMap::new(),
            waiting: 0,
            last_group: opened.first_group.saturating_sub(1),
            groups_end: BLOCK_BYTES,
            previous,
            last_crc: previous,
            is_empty: true,
            given_up: false,
        }
    }

    /// The segment gets no index and is read.
    pub(super) const fn give_up(&mut self) {
        self.given_up = true;
    }

    /// An entry that was added.
    pub(super) fn push(&mut self, kind: EntryKind, disk: DiskId, number: u64, offset: u64, bytes: u64) {
        let bytes = bytes as u32; // an entry's body has 32 bits of length
        let item = SegmentIndexItem { disk, number, offset, time: Timestamp(0), bytes, kind };
        if kind.is_numbered() {
            self.numbered.push(item);
        } else {
            self.newest.insert((disk, kind == EntryKind::Applied), item);
        }
    }

    /// The group of the entries that were added is closed; it ends at `end`.
    pub(super) fn close_group(&mut self, header: &GroupHeader, end: u64) {
        for item in self.numbered.iter_mut().skip(self.waiting) {
            item.time = header.time;
        }
        if self.is_empty {
            self.previous = header.previous;
        }
        self.waiting = self.numbered.len();
        (self.last_group, self.last_crc, self.groups_end) = (header.group, header.crc, end);
        self.is_empty = false;
    }

    /// Bytes at the end of the segment that the index needs when one more entry is in it, and with them a block for the
    /// empty group that seals the last one.
    pub(super) fn room_bytes(&self) -> u64 {
        index_bytes((self.numbered.len() + self.newest.len() + 1) as u64) + BLOCK_BYTES
    }

    /// The same where the checksum of the group before is known from elsewhere: a segment without groups does not tell it,
    /// and neither does anything before the oldest.
    pub(super) fn knowing(&self, previous: u32) -> Self {
        let mut known = self.clone();
        if known.is_empty && known.previous == 0 {
            (known.previous, known.last_crc) = (previous, previous);
        }
        known
    }

    /// The index as it stands at the end of the segment; `None` where there is no room for it.
    pub(super) fn encode(&self, journal: JournalId, opened: &SegmentOpened) -> Option<Vec<u8>> {
        let mut items: Vec<SegmentIndexItem> =
            self.numbered.iter().chain(self.newest.values()).copied().collect();
        let needed = index_bytes(items.len() as u64);
        if self.given_up || opened.first_group == 0 || self.groups_end.checked_add(needed)? > opened.bytes {
            return None;
        }
        items.sort_unstable_by_key(|item| item.offset);
        let head = SegmentIndexHead {
            magic: SEGMENT_INDEX_MAGIC,
            crc: 0,
            incompatible: 0,
            journal,
            number: opened.number,
            salt: opened.salt,
            bytes: opened.bytes,
            first_group: opened.first_group,
            last_group: self.last_group,
            groups_end: self.groups_end,
            previous: self.previous,
            last_crc: self.last_crc,
            items: 0,
            items_crc: 0,
        };
        Some(encode_index(&head, &items))
    }

    /// Writes it, where there is room. Whatever goes wrong: every group of the segment was flushed before, so only the
    /// index is not there, and opening reads the segment.
    pub(super) fn write(&self, file: &mut dyn BlockFile, journal: JournalId, opened: &SegmentOpened) {
        let Some(bytes) = self.encode(journal, opened) else { return };
        let (items, head) = bytes.split_at(bytes.len() - BLOCK_BYTES as usize);
        let at = opened.bytes - BLOCK_BYTES;
        if opened.bytes <= file.size_bytes() {
            // The head is torn nowhere, and names nothing that is not there: after a crash there is an index or none.
            let items = WriteAt { offset: at - items.len() as u64, data: items };
            let _ = file
                .write(&[items])
                .and_then(|()| file.flush())
                .and_then(|()| file.write(&[WriteAt { offset: at, data: head }]))
                .and_then(|()| file.flush());
        }
    }
}

/// What stands where a segment's index belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundIndex {
    /// None of this use: it was never written, or there was no room.
    None,
    /// One that cannot be used, and why.
    Damaged(FormatError),
    /// One whose every byte was checked.
    Whole(SegmentIndexHead, Vec<SegmentIndexItem>),
}

/// Reads the index of a segment.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn read_index(
    file: &mut dyn BlockFile,
    journal: JournalId,
    segment: &SegmentOpened,
) -> Result<FoundIndex, JournalError> {
    let Some(at) = segment.bytes.checked_sub(BLOCK_BYTES).filter(|at| at + BLOCK_BYTES <= file.size_bytes())
    else {
        return Ok(FoundIndex::None);
    };
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read(&mut [ReadAt { offset: at, data: &mut block }])?;
    if !SegmentIndexHead::is_of(&block, segment.salt) {
        return Ok(FoundIndex::None);
    }
    let head = match SegmentIndexHead::open(&block) {
        Ok(head) => head,
        Err(error) => return Ok(FoundIndex::Damaged(error)),
    };
    let field = |field, got, expected| FormatError::Field { what: "SegmentIndexHead", field, got, expected };
    let misfit = [
        (head.journal == journal, field("journal", 0, "the journal it lies in")),
        (head.number == segment.number, field("number", head.number, "the number of its segment")),
        (head.salt == segment.salt, field("salt", head.salt, "the salt of its segment")),
        (head.bytes == segment.bytes, field("bytes", head.bytes, "the length of its segment")),
        (head.first_group == segment.first_group, field("first_group", head.first_group, "its segment's")),
    ];
    if let Some((_, error)) = misfit.into_iter().find(|(fits, _)| !fits) {
        return Ok(FoundIndex::Damaged(error));
    }
    // Opening the head has checked that the items lie between the groups and the head.
    let from = head.items_offset().unwrap_or(at);
    let mut bytes = vec![0; (at - from) as usize];
    file.read(&mut [ReadAt { offset: from, data: &mut bytes }])?;
    Ok(match head.open_items(&bytes) {
        Ok(items) => FoundIndex::Whole(head, items),
        Err(error) => FoundIndex::Damaged(error),
    })
}

/// Which indexes a reading of the log believes.
#[derive(Debug)]
pub(super) enum Belief<'a> {
    /// None: every group is read.
    Nothing,
    /// All but those of these segments.
    AllBut(&'a BTreeSet<u64>),
}

/// What a reading took from indexes.
#[derive(Debug, Default)]
pub struct Indexes {
    /// Segments that were not read.
    pub believed: BTreeSet<u64>,
    /// Indexes that are damaged or do not fit, and why.
    pub doubted: Vec<Damage>,
    /// Sound segments that were read and have no index, or none that can be used, with what it would say.
    pub wanting: Vec<(SegmentOpened, IndexBuilder)>,
    /// The newest STATE (false) and APPLIED (true) of a disk, as far as an index says where they are.
    pub(super) unread: BTreeMap<(DiskId, bool), Place>,
}

impl Scanner<'_> {
    /// Takes what is to be known of a segment from its index; answers whether that was possible. `next` is the first
    /// group of the segment behind it: the newest segment has none, and is read.
    pub(super) fn believe(
        &mut self,
        path: &Path,
        file: &mut dyn BlockFile,
        segment: &SegmentOpened,
        next: Option<u64>,
    ) -> Result<bool, JournalError> {
        let (Belief::AllBut(not), Some(next)) = (&self.belief, next) else { return Ok(false) };
        let doubt = |reason: String| Damage {
            path: path.to_owned(),
            offset: segment.bytes.saturating_sub(BLOCK_BYTES),
            reason,
        };
        let (head, items) = match read_index(file, self.journal, segment)? {
            FoundIndex::None => return Ok(false),
            FoundIndex::Damaged(error) => {
                self.scan.indexes.doubted.push(doubt(error.to_string()));
                return Ok(false);
            }
            FoundIndex::Whole(head, items) => (head, items),
        };
        self.has_index = true;
        if not.contains(&segment.number) {
            return Ok(false);
        }
        if let Some(reason) = self.misfit(&head, &items, next) {
            self.has_index = false;
            self.scan.indexes.doubted.push(doubt(reason));
            return Ok(false);
        }
        self.take(segment.number, &items);
        self.scan.indexes.believed.insert(segment.number);
        (self.scan.last_group, self.scan.previous) = (head.last_group, head.last_crc);
        self.next_group = next;
        Ok(true)
    }

    /// Why an index does not fit what stands before and behind its segment.
    fn misfit(&self, head: &SegmentIndexHead, items: &[SegmentIndexItem], next: u64) -> Option<String> {
        if head.last_group + 1 != next {
            return Some(format!(
                "it ends at group {}, and the next segment begins at {next}",
                head.last_group
            ));
        }
        if self.next_group != 0 && self.next_group != head.first_group {
            return Some(format!("it begins at group {}, not {}", head.first_group, self.next_group));
        }
        let follows = self.scan.last_group + 1 == head.first_group;
        if follows && self.scan.previous != 0 && self.scan.previous != head.previous {
            return Some("its first group does not follow the group before it".to_owned());
        }
        let comes_twice = |item: &&SegmentIndexItem| {
            let known = self.scan.disks.get(&item.disk).and_then(|disk| disk.entries.last());
            item.kind.is_numbered() && known.is_some_and(|last| last.number >= item.number)
        };
        let twice = items.iter().find(comes_twice)?;
        Some(format!("entry {} of disk {} comes twice", twice.number, twice.disk))
    }

    fn take(&mut self, segment: u64, items: &[SegmentIndexItem]) {
        let highest = self.scan.segments.entry(segment).or_default();
        // Neighbours are mostly of one disk.
        for items in items.chunk_by(|one, two| one.disk == two.disk) {
            let Some(SegmentIndexItem { disk: id, .. }) = items.first() else { continue };
            let disk = self.scan.disks.entry(*id).or_default();
            let newest = highest.entry(*id).or_default();
            for item in items {
                let place = Place { segment, offset: item.offset, bytes: item.bytes.into() };
                if item.kind.is_numbered() {
                    *newest = item.number;
                    let (number, kind, time) = (item.number, item.kind, item.time);
                    disk.entries.push(LogEntry { number, kind, place, time, carried: false });
                } else {
                    let is_applied = item.kind == EntryKind::Applied;
                    self.scan.indexes.unread.insert((*id, is_applied), place);
                }
            }
        }
    }

    /// Reads the newest STATE and APPLIED of each disk where an index says they are; answers the segments whose index
    /// must not be believed: one of these cannot be read, or the segment has entries that are to be applied yet, and
    /// what is wrong with those must be known now.
    pub(super) fn doubtful(&mut self, shape: &Shape) -> Result<BTreeSet<u64>, JournalError> {
        let mut doubtful = BTreeSet::new();
        for ((disk, is_applied), place) in std::mem::take(&mut self.scan.indexes.unread) {
            let known = shape.disks.contains_key(&disk);
            if known && !self.read_newest(shape, disk, is_applied, place)? {
                doubtful.insert(place.segment);
            }
        }
        for segment in &self.scan.indexes.believed {
            let disks = self.scan.segments.get(segment);
            let waits = |(disk, number): (&DiskId, &u64)| {
                let Some(known) = shape.disks.get(disk) else { return false };
                // An undo epoch is closed only when all of it is applied.
                let closed = known.epochs.iter().rev().find_map(|epoch| epoch.closed);
                let said = self.scan.disks.get(disk).and_then(|log| log.applied);
                let applied = said.map_or(0, |(applied, _)| applied.number);
                *number > applied.max(closed.map_or(0, |closed| closed.last))
            };
            if disks.is_some_and(|disks| disks.iter().any(waits)) {
                doubtful.insert(*segment);
            }
        }
        Ok(doubtful)
    }

    fn read_newest(
        &mut self,
        shape: &Shape,
        id: DiskId,
        is_applied: bool,
        place: Place,
    ) -> Result<bool, JournalError> {
        let Some(segment) = shape.segments.get(&place.segment) else { return Ok(false) };
        let mut file = Tolerant::open(self.files, &segment_path(self.folder, segment.slot))?;
        let mut bytes = vec![0; place.bytes as usize];
        file.read(&mut [ReadAt { offset: place.offset, data: &mut bytes }])?;
        let Ok(head) = EntryHead::open(&bytes) else { return Ok(false) };
        let body = bytes.get(EntryHead::BYTES..).unwrap_or_default();
        let wanted = if is_applied { EntryKind::Applied } else { EntryKind::State };
        if head.check_body(body).is_err() || head.disk != id || head.kind != wanted {
            return Ok(false);
        }
        let disk = self.scan.disks.entry(id).or_default();
        if is_applied {
            let Ok(applied) = Applied::read_exact(body) else { return Ok(false) };
            disk.applied = Some((applied, place));
        } else {
            let Ok(state) = DiskState::decode(body) else { return Ok(false) };
            disk.state = Some((state, place));
        }
        Ok(true)
    }
}
