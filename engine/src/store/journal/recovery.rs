//! Opening the redo log: what is in it, where it ends, and whether that end is a torn write or damage.
//!
//! The tail rule. Groups are written one at a time, each flushed before the next. So the first invalid group is the
//! torn end of the log only if nothing says otherwise; it is *damage* when (1) a valid group with the segment's salt
//! and a higher number follows it, (2) superblock or manifest knew it durable, or a later segment was opened behind
//! it. (The third guard, the peer's own durable position, belongs to the protocol.) A torn end is cut; damage is never
//! cut: what can still be read behind it is kept, and each disk whose entries do not number on without gap is named. What
//! was the last of a disk leaves no gap: then the head of its entry tells, and where not even that can be read, every disk
//! that has nothing behind the damage is *doubtful*, until its agent has been asked what it knows to be durable.
//! Either way the log goes on in a new segment with a fresh salt.
//!
//! Of a segment that is wholly applied its index is read where it has one (`indexed`): opening is not longer because the
//! log is. What is damaged in such a segment is found when it is read, by the scrub, or by `journal verify`.
//!
//! What the medium does not give is damage of these bytes, and named (`tolerant`): one bad sector costs what lies in it. At
//! the end of the log it is never called a torn write.
//!
//! Invariants: nothing is written here; what is reported intact was checked by a CRC over every byte of it, or stands in
//! an index that was.
//! Units: bytes, group and entry numbers. Called by `store::journal` and by the offline tools.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::error::JournalError;
use super::indexed::{Belief, IndexBuilder, Indexes};
use super::log::{Place, segment_path};
use super::shape::{DiskShape, Shape};
use super::tolerant::Tolerant;
use crate::format::FormatError;
use crate::format::disk_state::DiskState;
use crate::format::manifest::SegmentOpened;
use crate::format::segment::{
    Applied, EntryHead, EntryKind, GroupHeader, JournalId, SegmentHeader, entries_unchecked,
};
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, DiskId, Timestamp};

/// An entry that is applied in the order of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its place among the disk's.
    pub number: u64,
    /// What it is.
    pub kind: EntryKind,
    /// Where it lies.
    pub place: Place,
    /// When its group was closed, by the target's clock.
    pub time: Timestamp,
    /// It was carried forward: entries with higher numbers may have stood before it, and may be gone.
    pub carried: bool,
}

/// What the log says of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskLog {
    /// Its newest state, and where it lies.
    pub state: Option<(DiskState, Place)>,
    /// What was last said to be on the target, and where.
    pub applied: Option<(Applied, Place)>,
    /// Every numbered entry still in the log, ascending.
    pub entries: Vec<LogEntry>,
    /// Numbers that should be there and are not, as half-open runs, ascending.
    pub missing: Vec<(u64, u64)>,
    /// The newest entry that is surely on the target.
    pub on_target: u64,
    /// The newest entry whose head a damaged group still shows, though nothing else of it.
    pub seen: u64,
    /// Why nobody knows whether these are all: something durable is lost behind them, and whose it was is lost with it. Until
    /// the agent was asked, or the disk compared.
    pub doubtful: Option<String>,
}

/// Something that was durable and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// Where.
    pub offset: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// What the log holds.
#[derive(Debug, Default)]
pub struct Scan {
    /// By disk.
    pub disks: BTreeMap<DiskId, DiskLog>,
    /// Newest valid group.
    pub last_group: u64,
    /// Its header's checksum.
    pub previous: u32,
    /// The end was torn and is cut: file and place.
    pub torn: Option<(PathBuf, u64)>,
    /// What was durable and is damaged.
    pub damage: Vec<Damage>,
    /// Of the damage, what the medium did not give: it may do so another time.
    pub unreadable: Vec<Damage>,
    /// For each segment, the disks with entries in it and their highest number there.
    pub segments: BTreeMap<u64, BTreeMap<DiskId, u64>>,
    /// What was taken from indexes instead.
    pub indexes: Indexes,
}

impl Scan {
    /// A journal that was closed in order has all its groups: what stands behind the newest is of an earlier use of the file, and
    /// no torn write.
    pub(super) fn believe_order(&mut self, is_closed: bool, durable_group: u64) {
        if is_closed && self.last_group == durable_group {
            self.torn = None;
        }
    }

    /// Refuses a log of which the medium does not give everything, where changes that are on no target are missed: they may be
    /// readable another time, and would then stand beside what was written instead.
    ///
    /// # Errors
    /// [`JournalError::Unreadable`].
    pub(super) fn check_readable(&self, shape: &Shape) -> Result<(), JournalError> {
        let Some(first) = self.unreadable.first() else { return Ok(()) };
        let misses = |(disk, log): (&DiskId, &DiskLog)| {
            let known = shape.disks.get(disk);
            let is_known = |(from, to): (u64, u64)| {
                let mut losses = known.into_iter().flat_map(|known| &known.lost);
                losses.any(|loss| loss.entries.first <= from && to <= loss.entries.last)
            };
            log.doubtful.is_some() || !log.lost().all(is_known)
        };
        if !self.disks.iter().any(misses) {
            return Ok(());
        }
        let (path, offset, reason) = (first.path.clone(), first.offset, first.reason.clone());
        Err(JournalError::Unreadable { path, offset, reason })
    }
}

/// What a scan comes by, in the order of the log; shown to who wants to see more than [`Scan`].
#[derive(Debug)]
pub enum Seen<'a> {
    /// A segment.
    Segment(&'a SegmentOpened, &'a Path),
    /// A group whose every byte was checked.
    Group {
        /// Its segment.
        segment: u64,
        /// Where it stands.
        offset: u64,
        /// Its head.
        header: &'a GroupHeader,
    },
    /// An entry that was checked, of the last group or taken out of a damaged one.
    Entry {
        /// Where it stands.
        place: Place,
        /// Its head.
        head: &'a EntryHead,
        /// Its body.
        body: &'a [u8],
    },
}

/// Bytes of the log that are read at once, ahead of what is looked at.
const AHEAD_BYTES: u64 = 8 << 20;

/// A segment that is read from its beginning to its end in long pieces, each byte once.
struct Ahead<'a> {
    file: &'a mut Tolerant,
    /// End of the segment.
    end: u64,
    /// Where the bytes stand, and how many of them there are.
    start: u64,
    fill: usize,
    bytes: Vec<u8>,
}

impl<'a> Ahead<'a> {
    fn new(file: &'a mut Tolerant, segment: &SegmentOpened) -> Self {
        let end = segment.bytes.min(file.size_bytes());
        Self { file, end, start: 0, fill: 0, bytes: Vec::new() }
    }

    /// Bytes of the segment; those in front of `at` are not kept. Shorter where the segment ends.
    fn get(&mut self, at: u64, len: u64) -> Result<&[u8], JournalError> {
        let len = len.min(self.end.saturating_sub(at));
        let filled = self.start + self.fill as u64;
        if at < self.start || at + len > filled {
            let wanted = AHEAD_BYTES.max(len).min(self.end.saturating_sub(at)) as usize;
            let kept = if (self.start..filled).contains(&at) { (filled - at) as usize } else { 0 };
            self.bytes.copy_within(self.fill - kept..self.fill, 0);
            if self.bytes.len() < wanted {
                self.bytes.resize(wanted, 0);
            }
            // Nothing is believed of a read that failed halfway.
            (self.start, self.fill) = (at, 0);
            let data = self.bytes.get_mut(kept..wanted).unwrap_or_default();
            self.file.read(&mut [ReadAt { offset: at + kept as u64, data }])?;
            self.fill = wanted.max(kept);
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..from + len as usize).unwrap_or_default())
    }
}

/// Reads the log from its oldest segment to its newest.
pub(super) struct Scanner<'a> {
    see: &'a mut dyn FnMut(Seen<'_>),
    pub(super) files: &'a dyn Files,
    pub(super) folder: &'a Path,
    pub(super) journal: JournalId,
    /// Newest group that superblock or manifest knew durable.
    known_durable: u64,
    pub(super) belief: Belief<'a>,
    pub(super) scan: Scan,
    pub(super) next_group: u64,
    /// What the index of the segment that is read would say, and whether it has a sound one.
    index: Option<IndexBuilder>,
    pub(super) has_index: bool,
    /// The newest place where something was lost of which nobody knows whose it was, as segment and offset, and what.
    unsure: Option<((u64, u64), String)>,
}

/// Reads the log: of the segments that are wholly applied their indexes, as far as these can be believed.
///
/// # Errors
/// When a file cannot be read or belongs to another journal; damage is not an error but part of the answer.
pub(super) fn scan(
    files: &dyn Files,
    folder: &Path,
    journal: JournalId,
    shape: &Shape,
    known_durable: u64,
) -> Result<Scan, JournalError> {
    let mut not = BTreeSet::new();
    let mut doubted = Vec::new();
    // What must be read says how far the disks are, so what it is shows only now. The second reading may show more of
    // it, where an APPLIED is damaged: the third believes nothing.
    for _ in 0..2 {
        let see = &mut |_: Seen<'_>| {};
        let mut scanner = Scanner::new(files, folder, journal, known_durable, Belief::AllBut(&not), see);
        scanner.log(shape)?;
        let more = scanner.doubtful(shape)?;
        let mut scan = scanner.finish(shape);
        if more.is_empty() {
            return Ok(scan);
        }
        doubted = std::mem::take(&mut scan.indexes.doubted);
        not.extend(more);
    }
    let mut scan = scan_showing(files, folder, journal, shape, known_durable, &mut |_| {})?;
    scan.indexes.doubted = doubted;
    Ok(scan)
}

/// Reads every group of the log, and shows what it comes by.
///
/// # Errors
/// As for [`scan`].
pub(super) fn scan_showing(
    files: &dyn Files,
    folder: &Path,
    journal: JournalId,
    shape: &Shape,
    known_durable: u64,
    see: &mut dyn FnMut(Seen<'_>),
) -> Result<Scan, JournalError> {
    let mut scanner = Scanner::new(files, folder, journal, known_durable, Belief::Nothing, see);
    scanner.log(shape)?;
    Ok(scanner.finish(shape))
}

impl<'a> Scanner<'a> {
    fn new(
        files: &'a dyn Files,
        folder: &'a Path,
        journal: JournalId,
        known_durable: u64,
        belief: Belief<'a>,
        see: &'a mut dyn FnMut(Seen<'_>),
    ) -> Self {
        let scan = Scan::default();
        Self {
            see,
            files,
            folder,
            journal,
            known_durable,
            belief,
            scan,
            next_group: 0,
            index: None,
            has_index: false,
            unsure: None,
        }
    }

    /// All segments, oldest first.
    fn log(&mut self, shape: &Shape) -> Result<(), JournalError> {
        let segments: Vec<&SegmentOpened> = shape.segments.values().collect();
        for (at, segment) in segments.iter().enumerate() {
            let next = segments.get(at + 1).map(|next| next.first_group);
            let damage = self.scan.damage.len();
            (self.index, self.has_index) = (None, false);
            self.segment(segment, next)?;
            // An index would hide what is damaged from the next opening.
            let is_sound = self.scan.damage.len() == damage && !self.has_index;
            if let Some(index) = self.index.take().filter(|_| is_sound) {
                self.scan.indexes.wanting.push((**segment, index));
            }
        }
        // Segments are released from the oldest on, so a durable group that is not older than all of them is in one.
        let (known, first_group) =
            (self.known_durable, segments.first().map_or(u64::MAX, |segment| segment.first_group));
        if self.scan.last_group < known && known >= first_group {
            let reason =
                format!("the log ends at group {}, and group {known} was durable", self.scan.last_group);
            let newest = segments.last().map_or(0, |segment| segment.number);
            self.unsure = Some(((newest, u64::MAX), reason.clone()));
            self.damaged(self.folder.into(), 0, reason);
            self.scan.last_group = known;
            self.scan.torn = None;
            // What the newest segment lost at its end must be missed at the next opening, too.
            self.scan
                .indexes
                .wanting
                .pop_if(|(last, _)| segments.last().is_some_and(|newest| newest.number == last.number));
        }
        self.scan.last_group = self.scan.last_group.max(known);
        Ok(())
    }

    fn finish(mut self, shape: &Shape) -> Scan {
        // Of a disk the log may say nothing any more, and the manifest how far it is.
        for disk in shape.disks.keys() {
            self.scan.disks.entry(*disk).or_default();
        }
        if let Some((place, reason)) = self.unsure.take() {
            for disk in shape.disks.keys() {
                let log = self.scan.disks.entry(*disk).or_default();
                // What it added later follows on what it had: its agent has been asked.
                let is_later = |entry: &&LogEntry| (entry.place.segment, entry.place.offset) > place;
                if !log.entries.iter().rev().any(|entry| !entry.carried && is_later(&entry)) {
                    log.doubtful = Some(reason.clone());
                }
            }
        }
        for (disk, log) in &mut self.scan.disks {
            log.find_missing(shape.disks.get(disk));
        }
        self.scan
    }
}

impl Scanner<'_> {
    fn damaged(&mut self, path: PathBuf, offset: u64, reason: String) {
        self.scan.damage.push(Damage { path, offset, reason });
    }

    /// One segment; `next` is the first group of the one behind it.
    fn segment(&mut self, segment: &SegmentOpened, next: Option<u64>) -> Result<(), JournalError> {
        self.scan.segments.entry(segment.number).or_default();
        let path = segment_path(self.folder, segment.slot);
        if self.files.facts(&path)?.is_none() {
            let reason = format!("segment {} is missing", segment.number);
            self.unsure = Some(((segment.number, u64::MAX), reason.clone()));
            self.damaged(path, 0, reason);
            self.next_group = 0;
            return Ok(());
        }
        (self.see)(Seen::Segment(segment, &path));
        let mut file = Tolerant::open(self.files, &path)?;
        self.segment_in(&path, &mut file, segment, next)?;
        for (bytes, reason) in file.into_bad() {
            let damage = Damage { path: path.clone(), offset: bytes.start, reason };
            self.scan.unreadable.push(damage.clone());
            self.scan.damage.push(damage);
        }
        Ok(())
    }

    fn segment_in(
        &mut self,
        path: &Path,
        file: &mut Tolerant,
        segment: &SegmentOpened,
        next: Option<u64>,
    ) -> Result<(), JournalError> {
        // A file that is shorter has no header, and is judged like one whose header was never written.
        let mut block = vec![0; BLOCK_BYTES.min(file.size_bytes()) as usize];
        file.read(&mut [ReadAt { offset: 0, data: &mut block }])?;
        match SegmentHeader::open(&block) {
            Ok(header) if header.journal != self.journal => {
                return Err(JournalError::Foreign { path: path.into() });
            }
            Ok(header) if header.number == segment.number && header.salt == segment.salt => {
                if self.believe(path, file, segment, next)? {
                    return Ok(());
                }
            }
            // Its checksum is right: that is no damage.
            Err(error @ FormatError::Field { field: "incompatible", .. }) => {
                return Err(JournalError::format(path, 0, "use the program that wrote it")(error));
            }
            // The manifest names a use before the file's header does: a crash came between, nothing was ever in it.
            Ok(_) | Err(_)
                if next.is_none_or(|next| next == segment.first_group)
                    && self.is_empty(file, segment)?
                    && !file.is_bad(ByteRange { start: BLOCK_BYTES, end: 2 * BLOCK_BYTES }) =>
            {
                return Ok(());
            }
            Ok(header) => {
                let reason = format!("its header is of segment {}, not {}", header.number, segment.number);
                self.damaged(path.into(), 0, reason);
            }
            // Salt and first group stand in the manifest, too: the groups can be read all the same.
            Err(error) => self.damaged(path.into(), 0, error.to_string()),
        }
        self.groups(path, file, segment, next.is_none())
    }

    fn is_empty(&self, file: &mut dyn BlockFile, segment: &SegmentOpened) -> Result<bool, JournalError> {
        Ok(self.find_group(file, segment, BLOCK_BYTES, 0)?.is_none())
    }

    /// The first valid group of the segment at or behind `from` whose number is at least `group`.
    fn find_group(
        &self,
        file: &mut dyn BlockFile,
        segment: &SegmentOpened,
        from: u64,
        group: u64,
    ) -> Result<Option<(u64, GroupHeader)>, JournalError> {
        let end = segment.bytes.min(file.size_bytes());
        let mut window = vec![0; AHEAD_BYTES.min(end.saturating_sub(from)) as usize];
        let mut at = from;
        while at < end {
            let len = (end - at).min(AHEAD_BYTES);
            let data = window.get_mut(..len as usize).unwrap_or_default();
            file.read(&mut [ReadAt { offset: at, data }])?;
            for (block, bytes) in data.chunks(BLOCK_BYTES as usize).enumerate() {
                if let Ok(header) = GroupHeader::open(bytes)
                    && header.salt == segment.salt
                    && header.group >= group
                {
                    return Ok(Some((at + block as u64 * BLOCK_BYTES, header)));
                }
            }
            at += len;
        }
        Ok(None)
    }

    fn groups(
        &mut self,
        path: &Path,
        file: &mut Tolerant,
        segment: &SegmentOpened,
        newest: bool,
    ) -> Result<(), JournalError> {
        if self.next_group != 0 && segment.first_group > self.next_group {
            let reason = format!("groups {} to {} are missing", self.next_group, segment.first_group - 1);
            self.unsure = Some(((segment.number, 0), reason.clone()));
            self.damaged(path.into(), BLOCK_BYTES, reason);
        }
        self.next_group = segment.first_group;
        self.index = Some(IndexBuilder::new(segment, self.scan.previous));
        let end = segment.bytes.min(file.size_bytes());
        let mut at = BLOCK_BYTES;
        let mut ahead = Ahead::new(file, segment);
        while at + BLOCK_BYTES <= end {
            match self.group(path, &mut ahead, segment, at)? {
                Ok(stored) => at += stored,
                Err(reason) => {
                    match self.find_group(ahead.file, segment, at + BLOCK_BYTES, self.next_group + 1)? {
                        Some((next, header)) => {
                            let reason = format!("group {}: {reason}", self.next_group);
                            self.damaged(path.into(), at, reason.clone());
                            let all = self.salvage(path, ahead.file, segment, at, next)?;
                            if !all || header.group > self.next_group + 1 {
                                self.unsure = Some(((segment.number, at), reason));
                            }
                            self.next_group = header.group;
                            at = next;
                        }
                        None => return self.end(path, ahead.file, segment, at, &reason, newest),
                    }
                }
            }
        }
        Ok(())
    }

    /// Nothing valid follows: the end of a segment that was left for the next, a torn write, or damage.
    fn end(
        &mut self,
        path: &Path,
        file: &mut Tolerant,
        segment: &SegmentOpened,
        at: u64,
        reason: &str,
        newest: bool,
    ) -> Result<(), JournalError> {
        if self.next_group <= self.known_durable && newest {
            let reason = format!("group {}, known durable: {reason}", self.next_group);
            self.damaged(path.into(), at, reason.clone());
            let end = segment.bytes.min(file.size_bytes());
            if !self.salvage(path, file, segment, at, end)? {
                self.unsure = Some(((segment.number, at), reason));
            }
        } else if newest && is_unreadable(file, segment, at)? {
            // What is torn can be read. It is missed at the next opening, too.
            let reason = format!("group {} cannot be read", self.next_group);
            self.damaged(path.into(), at, reason.clone());
            let end = segment.bytes.min(file.size_bytes());
            if !self.salvage(path, file, segment, at, end)? {
                self.unsure = Some(((segment.number, at), reason));
            }
            self.scan.last_group = self.next_group;
        } else if newest && !is_unwritten(file, segment, at)? {
            self.scan.torn = Some((path.into(), at));
        }
        // In an older segment the next one's first group tells whether something is missing here.
        Ok(())
    }

    /// The group at `at`, if it is the one that belongs there; answers the bytes it takes.
    fn group(
        &mut self,
        path: &Path,
        ahead: &mut Ahead<'_>,
        segment: &SegmentOpened,
        at: u64,
    ) -> Result<Result<u64, String>, JournalError> {
        let header = match GroupHeader::open(ahead.get(at, BLOCK_BYTES)?) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if header.salt != segment.salt || header.group != self.next_group {
            return Ok(Err(format!("group {} of another use of the file", header.group)));
        }
        let chained = self.scan.previous == header.previous || self.scan.previous == 0;
        if !chained && self.scan.last_group + 1 == header.group {
            return Ok(Err("it does not follow the group before it".to_owned()));
        }
        if at + header.stored_bytes() > ahead.end {
            return Ok(Err("it ends behind the segment".to_owned()));
        }
        let bytes = ahead.get(at, header.stored_bytes())?;
        let (payload, padding) = bytes
            .get(GroupHeader::BYTES..)
            .and_then(|rest| rest.split_at_checked(header.payload_bytes as usize))
            .unwrap_or_default();
        if let Err(error) = header.check_payload(payload) {
            return Ok(Err(error.to_string()));
        }
        if padding.iter().any(|byte| *byte != 0) {
            return Ok(Err("its padding is not zero".to_owned()));
        }
        (self.see)(Seen::Group { segment: segment.number, offset: at, header: &header });
        let mut count = 0;
        for entry in entries_unchecked(payload) {
            match entry {
                Ok((offset, head, body)) => {
                    let offset = at + (GroupHeader::BYTES + offset) as u64;
                    if let Err(reason) = self.entry(segment.number, offset, header.time, &head, body) {
                        self.damaged(path.into(), offset, reason);
                    }
                    count += 1;
                }
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        if count != header.entry_count {
            return Ok(Err(format!("it has {count} entries, not {}", header.entry_count)));
        }
        self.scan.last_group = header.group;
        self.scan.previous = header.crc;
        self.next_group = header.group + 1;
        if let Some(index) = &mut self.index {
            index.close_group(&header, at + header.stored_bytes());
        }
        Ok(Ok(header.stored_bytes()))
    }

    /// Takes the entries out of a damaged group that can be read one by one. Which disks lost one is seen from the
    /// numbers, those in whole heads included; answers whether all heads are whole, so that nothing else was in it.
    fn salvage(
        &mut self,
        path: &Path,
        file: &mut dyn BlockFile,
        segment: &SegmentOpened,
        at: u64,
        end: u64,
    ) -> Result<bool, JournalError> {
        let len = (end - at).min(crate::format::segment::GROUP_PAYLOAD_BYTES_MAX + BLOCK_BYTES);
        let mut bytes = vec![0; len as usize];
        file.read(&mut [ReadAt { offset: at, data: &mut bytes }])?;
        // Only a group of this use: its head must be whole, or what follows may be years old.
        let Ok(header) = GroupHeader::open(&bytes) else { return Ok(false) };
        if header.salt != segment.salt || header.group != self.next_group {
            return Ok(false);
        }
        let payload = bytes.get(GroupHeader::BYTES..GroupHeader::BYTES + header.payload_bytes as usize);
        let (mut from, mut heads) = (0, 0);
        let payload = payload.unwrap_or_default();
        while let Some(rest) = payload.get(from..).filter(|rest| rest.len() >= EntryHead::BYTES) {
            // An entry whose head is whole says where the next one begins, even if its body is damaged.
            let Ok(head) = EntryHead::open(rest) else { break };
            let body =
                rest.get(EntryHead::BYTES..EntryHead::BYTES + head.body_bytes as usize).unwrap_or_default();
            let offset = at + (GroupHeader::BYTES + from) as u64;
            heads += 1;
            if head.check_body(body).is_err() {
                let log = self.scan.disks.entry(head.disk).or_default();
                log.seen = log.seen.max(head.number);
            } else if let Err(reason) = self.entry(segment.number, offset, header.time, &head, body) {
                self.damaged(path.into(), offset, reason);
            }
            from += EntryHead::BYTES + head.body_bytes as usize;
        }
        self.scan.last_group = header.group;
        self.scan.previous = header.crc;
        Ok(heads == header.entry_count)
    }

    fn entry(
        &mut self,
        segment: u64,
        offset: u64,
        time: Timestamp,
        head: &EntryHead,
        body: &[u8],
    ) -> Result<(), String> {
        let disk = self.scan.disks.entry(head.disk).or_default();
        let newest = self.scan.segments.entry(segment).or_default().entry(head.disk).or_default();
        let place = Place { segment, offset, bytes: (EntryHead::BYTES + body.len()) as u64 };
        (self.see)(Seen::Entry { place, head, body });
        if let Some(index) = &mut self.index {
            index.push(head.kind, head.disk, head.number, offset, place.bytes);
            if head.is_carried() {
                index.give_up();
            }
        }
        // What an older segment's index says of these is not the newest any more.
        let unread = &mut self.scan.indexes.unread;
        match head.kind {
            EntryKind::State => {
                head.check_body(body).map_err(|error| error.to_string())?;
                let state = DiskState::decode(body).map_err(|error| error.to_string())?;
                disk.state = Some((state, place));
                unread.remove(&(head.disk, false));
            }
            EntryKind::Applied => {
                head.check_body(body).map_err(|error| error.to_string())?;
                let applied = Applied::read_exact(body).map_err(|error| error.to_string())?;
                disk.applied = Some((applied, place));
                unread.remove(&(head.disk, true));
            }
            EntryKind::Batch | EntryKind::Ordered | EntryKind::Bulk | EntryKind::Mark => {
                let (number, kind, carried) = (head.number, head.kind, head.is_carried());
                let entry = LogEntry { number, kind, place, time, carried };
                if head.is_carried() {
                    disk.carried(entry);
                } else if disk.entries.last().is_some_and(|last| last.number >= head.number) {
                    return Err(format!("entry {} of disk {} comes twice", head.number, head.disk));
                } else {
                    disk.entries.push(entry);
                }
                *newest = (*newest).max(head.number);
            }
        }
        Ok(())
    }
}

/// Whether the group at a place, or what stands there instead, could not be read.
fn is_unreadable(file: &mut Tolerant, segment: &SegmentOpened, at: u64) -> Result<bool, JournalError> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read(&mut [ReadAt { offset: at, data: &mut block }])?;
    let bytes = match GroupHeader::open(&block) {
        Ok(header) if header.salt != segment.salt => return Ok(false),
        Ok(header) => header.stored_bytes(),
        Err(_) => BLOCK_BYTES,
    };
    Ok(file.is_bad(ByteRange { start: at, end: at + bytes }))
}

/// Whether no group of this use was ever written at a place: zeros, or what an earlier use left there.
fn is_unwritten(file: &mut dyn BlockFile, segment: &SegmentOpened, at: u64) -> Result<bool, JournalError> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read(&mut [ReadAt { offset: at, data: &mut block }])?;
    let old = GroupHeader::open(&block).is_ok_and(|header| header.salt != segment.salt);
    Ok(old || block.iter().all(|byte| *byte == 0))
}

impl DiskLog {
    /// What the log says of a disk, as far as it is known without reading it.
    pub(super) fn of(
        state: Option<(DiskState, Place)>,
        applied: Option<(Applied, Place)>,
        entries: Vec<LogEntry>,
        known: Option<&DiskShape>,
    ) -> Self {
        let mut log = Self { state, applied, entries, ..Self::default() };
        log.find_missing(known);
        log
    }

    /// The number of the newest entry, also where the log does not hold it any more: it was applied, or it is lost. What the
    /// manifest says counts like what the log says, for a number that was given once is never given again.
    #[must_use]
    pub fn newest(&self) -> u64 {
        let missing = self.missing.last().map_or(0, |(_, end)| end.saturating_sub(1));
        self.entries.last().map_or(0, |entry| entry.number).max(self.on_target).max(missing)
    }

    /// The runs of missing entries that are on no target either: first and last of each.
    pub fn lost(&self) -> impl Iterator<Item = (u64, u64)> {
        let from = self.on_target + 1;
        let lost = self.missing.iter().filter(move |(_, end)| *end > from);
        lost.map(move |(start, end)| ((*start).max(from), end - 1))
    }

    /// An entry that stands, or stood, further back in the log, too: where it was carried to counts.
    fn carried(&mut self, entry: LogEntry) {
        match self.entries.binary_search_by_key(&entry.number, |known| known.number) {
            Ok(at) => self.entries.splice(at..=at, [entry]).for_each(drop),
            Err(at) => self.entries.insert(at, entry),
        }
    }

    fn find_missing(&mut self, known: Option<&DiskShape>) {
        let given_up = |number: u64| {
            let mut lost = known.into_iter().flat_map(|known| &known.lost).map(|loss| loss.entries);
            lost.any(|lost| (lost.first..=lost.last).contains(&number))
        };
        // What is said to be lost stays lost, also where it can be read: nobody counts on it.
        self.entries.retain(|entry| !given_up(entry.number));
        let applied = self.applied.map_or(0, |(applied, _)| applied.number);
        self.on_target = applied.max(known.map_or(0, DiskShape::closed_through));
        // A segment is released only when all of it is on the target, or was carried: what was carried and is on the
        // target may stand before others that were released since.
        let counts = |entry: &&LogEntry| !(entry.carried && entry.number <= self.on_target);
        let first = self.entries.iter().find(counts).map_or(u64::MAX, |entry| entry.number);
        let mut next = first.min(self.on_target + 1);
        // Behind one that counts nothing was released: what was carried from there is there, too.
        for entry in self.entries.iter().filter(|entry| entry.number >= first) {
            if next < entry.number {
                self.missing.push((next, entry.number));
            }
            next = entry.number + 1;
        }
        // Something was applied that should still be here, or given up, or its head is all that is left of it.
        let applied = if first == u64::MAX { 0 } else { applied };
        // Also where a compare made up for it: its number is not another entry's, for as long as the manifest knows of it.
        let lost = known.into_iter().flat_map(|known| &known.lost).map(|loss| loss.entries.last).max();
        // A point that is kept inside the undo epoch stands at an entry that was durable.
        let kept = known.map_or(0, DiskShape::kept_through);
        let end = applied.max(lost.unwrap_or(0)).max(kept).max(self.seen) + 1;
        if next < end {
            self.missing.push((next, end));
        }
    }
}
