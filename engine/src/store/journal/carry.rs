//! What keeps the oldest segment of the redo log from being given back, and what is done about it.
//!
//! A disk whose target stands, or whose machine is away in the middle of a stretch, needs its entries for longer than
//! the others. They are carried to the head of the log, with their numbers; where there is no room for that, they are
//! given up: the manifest says so, nothing more is taken for the disk, and its next start has it compared. A pinned point
//! inside an undo epoch needs the epoch's entries up to it for good, and so does one that a rollback goes to until it is
//! there: they are carried whenever their segment is to go.
//!
//! Invariants: a copy is durable before the segment it came from is given back; where an entry stands twice, the copy
//! counts; nothing that is on no target leaves the log without a durable word about it. Units: bytes, entry and segment
//! numbers. Called by retention.

use std::collections::BTreeSet;

use super::log::{NewEntry, Room};
use super::recovery::LogEntry;
use super::redo_index::entries_between;
use super::rollback::goes_to;
use super::view::View;
use super::{DiskLog, DiskShape, Journal, JournalError, Needed};
use crate::format::disk_state::DiskState;
use crate::format::manifest::{Edit, EntriesLost};
use crate::format::segment::EntryKind;
use crate::format::wire::Text;
use crate::units::{DiskId, Timestamp};

/// A point inside an undo epoch that was to be kept, and whose part of the redo log cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostPin {
    /// The disk.
    pub disk: DiskId,
    /// The pinned point; `None` for the one that a rollback goes to which did not get there.
    pub point: Option<[u8; 16]>,
    /// Why not.
    pub reason: String,
}

/// What became of a piece that was to be carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Nothing that can be read is left there.
    pub is_all: bool,
    /// Disks of which something there cannot be read, and why.
    pub unreadable: Vec<(DiskId, String)>,
}

/// What became of a piece of what pinned points need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarriedPins {
    /// Nothing that can be read is left there.
    pub is_all: bool,
    /// Points of which something there cannot be read, and why.
    pub lost: Vec<LostPin>,
}

/// An entry that is to be added again: its disk, its number, what it is and its body.
type Copied = (DiskId, u64, EntryKind, Vec<u8>);

impl Journal {
    /// The oldest segment, where it is no longer written and cannot be released, and the disks that need it.
    #[must_use]
    pub fn pinned(&self) -> Option<(u64, BTreeSet<DiskId>)> {
        let oldest = self.shape().segments.keys().next().copied()?;
        if self.log.current_segment() == Some(oldest) {
            return None;
        }
        let needs = |disk: &&DiskId| self.oldest_needed(**disk).is_some_and(|segment| segment <= oldest);
        let disks: BTreeSet<DiskId> = self.disks.keys().filter(needs).copied().collect();
        (!disks.is_empty()).then_some((oldest, disks))
    }

    /// The oldest segment that a disk needs: for what is not on its target, for points inside its undo epoch, or for the
    /// point that it is going back to.
    pub(super) fn oldest_needed(&self, disk: DiskId) -> Option<u64> {
        let open = self.shape().disks.get(&disk).and_then(DiskShape::open_epoch);
        let needed = open.map_or(u64::MAX, |epoch| epoch.opened.after);
        let applied = self.disks.get(&disk).map_or(0, |numbers| numbers.applied_durable);
        let going_to = goes_to(self, disk).ok().flatten();
        let back = going_to.and_then(|at| View::oldest_segment(self, disk, at));
        self.behind(disk, applied.min(needed)).iter().map(|entry| entry.place.segment).chain(back).min()
    }

    /// The entries of a disk behind a number.
    fn behind(&self, disk: DiskId, number: u64) -> &[LogEntry] {
        let entries = self.entries.get(&disk).map_or(&[][..], Vec::as_slice);
        entries.get(entries.partition_point(|entry| entry.number <= number)..).unwrap_or_default()
    }

    /// The entries of a disk that are on no target.
    fn waiting(&self, disk: DiskId) -> &[LogEntry] {
        self.behind(disk, self.disks.get(&disk).map_or(0, |numbers| numbers.applied_durable))
    }

    /// Bytes of the log that hold entries of a disk which are on no target.
    #[must_use]
    pub fn waiting_bytes(&self, disk: DiskId) -> u64 {
        self.waiting(disk).iter().map(|entry| entry.place.bytes).sum()
    }

    /// Whether a segment has an entry of a disk that is on no target.
    #[must_use]
    pub fn waits_in(&self, disk: DiskId, segment: u64) -> bool {
        self.waiting(disk).iter().any(|entry| entry.place.segment == segment)
    }

    /// As [`Self::waiting_bytes`], of all disks: in a segment, and in the whole log.
    #[must_use]
    pub fn waiting_in(&self, segment: u64) -> (u64, u64) {
        let all = || self.disks.keys().flat_map(|disk| self.waiting(*disk)).map(|entry| entry.place);
        let here = all().filter(|place| place.segment == segment);
        (here.map(|place| place.bytes).sum(), all().map(|place| place.bytes).sum())
    }

    /// Bytes of the segments that are in use.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.shape().segments.values().map(|segment| segment.bytes).sum()
    }

    /// Carries what stands in a segment and on no target to the head of the log, about so many bytes of it at a time, so that
    /// others have the journal meanwhile; what was carried is not carried again. When all is, the segment may be released, and
    /// only points inside undo epochs that go on are lost with it. It is not the one that is written. Of a disk of which
    /// something there cannot be read nothing behind that is carried; these are answered, each with the reason: they are to be
    /// given up before the segment is released.
    ///
    /// # Errors
    /// When the medium is full, or the log failed; nothing is lost by that.
    pub fn carry_piece(
        &mut self,
        segment: u64,
        bytes_max: u64,
        now: Timestamp,
    ) -> Result<Carried, JournalError> {
        self.commit(now)?;
        let inside = |entry: &&LogEntry| entry.place.segment == segment;
        let of = |disk: &DiskId| (*disk, self.waiting(*disk).iter().filter(inside).copied().collect());
        let waiting: Vec<(DiskId, Vec<LogEntry>)> = self.disks.keys().map(of).collect();
        let (mut copies, mut bytes, mut unreadable) = (Vec::new(), 0, Vec::new());
        let mut is_all = true;
        'disks: for (disk, entries) in waiting {
            for entry in entries {
                if bytes >= bytes_max {
                    is_all = false;
                    break 'disks;
                }
                match self.read(entry.place) {
                    Ok((head, body)) => copies.push((disk, entry.number, head.kind, body)),
                    Err(error) => {
                        unreadable.push((disk, error.to_string()));
                        continue 'disks;
                    }
                }
                bytes += entry.place.bytes;
            }
        }
        self.add_copies(copies, now)?;
        Ok(Carried { is_all, unreadable })
    }

    /// As [`Self::carry_piece`], of what pinned points inside undo epochs need, and a rollback that is not at its end. A point of
    /// which something there cannot be read is answered, and nothing behind that is carried that only such points need: it is
    /// to be dropped before the segment is released.
    ///
    /// # Errors
    /// As for [`Self::carry_piece`].
    pub fn carry_pinned_piece(
        &mut self,
        segment: u64,
        bytes_max: u64,
        now: Timestamp,
    ) -> Result<CarriedPins, JournalError> {
        self.commit(now)?;
        let inside = |entry: &&LogEntry| entry.place.segment == segment;
        let of = |disk: &DiskId| (*disk, self.pinned_entries(*disk).filter(inside).copied().collect());
        let pinned: Vec<(DiskId, Vec<LogEntry>)> = self.disks.keys().map(of).collect();
        let (mut copies, mut bytes, mut lost) = (Vec::new(), 0, Vec::new());
        let mut is_all = true;
        'disks: for (disk, entries) in pinned {
            let mut sound = self.shape().disks.get(&disk).map(DiskShape::needed_inside).unwrap_or_default();
            for entry in entries {
                if !sound.iter().any(|needed| needed.has(entry.number)) {
                    continue;
                }
                if bytes >= bytes_max {
                    is_all = false;
                    break 'disks;
                }
                match self.read(entry.place) {
                    Ok((head, body)) => {
                        copies.push((disk, entry.number, head.kind, body));
                        bytes += entry.place.bytes;
                    }
                    Err(error) => {
                        let reason = error.to_string();
                        let bad = sound.extract_if(.., |needed| needed.has(entry.number));
                        let of =
                            |needed: Needed| LostPin { disk, point: needed.point, reason: reason.clone() };
                        lost.extend(bad.map(of));
                    }
                }
            }
        }
        self.add_copies(copies, now)?;
        Ok(CarriedPins { is_all, lost })
    }

    /// The pinned points inside undo epochs that can never be had again: an entry that they are made from is not in the log
    /// any more, for it was damaged when the log was read, or given up. What the medium only did not give is not lost yet.
    #[must_use]
    pub fn lost_pins(&self) -> Vec<LostPin> {
        if self.partly_read {
            return Vec::new();
        }
        let lost = |(disk, shape): (&DiskId, &DiskShape)| {
            let of = |needed: Needed| {
                let number = entries_between(self, *disk, needed.after, needed.through).err()?;
                let reason =
                    format!("entry {number} of the redo log, which it is made from, is not there any more");
                needed.point.map(|point| LostPin { disk: *disk, point: Some(point), reason })
            };
            shape.needed_inside().into_iter().filter_map(of).collect::<Vec<_>>()
        };
        self.shape().disks.iter().flat_map(lost).collect()
    }

    /// Bytes of the log that pinned points inside undo epochs need, and a rollback that is not at its end: in a segment,
    /// and in the whole log.
    #[must_use]
    pub fn pinned_in(&self, segment: u64) -> (u64, u64) {
        let places = self.disks.keys().flat_map(|disk| self.pinned_entries(*disk)).map(|entry| entry.place);
        places.fold((0, 0), |(here, everywhere), place| {
            (here + if place.segment == segment { place.bytes } else { 0 }, everywhere + place.bytes)
        })
    }

    /// As [`Self::pinned_in`], of the whole log.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        self.disks.keys().flat_map(|disk| self.pinned_entries(*disk)).map(|entry| entry.place.bytes).sum()
    }

    /// The applied entries of a disk that its pinned points inside undo epochs need, and a rollback that is not at its end,
    /// ascending, each once. Costs nothing where there are none.
    fn pinned_entries(&self, disk: DiskId) -> impl Iterator<Item = &LogEntry> {
        let needed = self.shape().disks.get(&disk).map(DiskShape::needed_inside).unwrap_or_default();
        let applied = self.applied(disk);
        let behind = |number: u64| applied.partition_point(|entry| entry.number <= number);
        let mut parts: Vec<(usize, usize)> =
            needed.iter().map(|needed| (behind(needed.after), behind(needed.through))).collect();
        parts.sort_unstable();
        let mut done = 0;
        parts.into_iter().flat_map(move |(from, to)| {
            let from = from.max(done);
            done = done.max(to);
            applied.get(from..to).unwrap_or_default()
        })
    }

    /// Adds copies of entries to the head of the log, durably; they count from then on.
    fn add_copies(&mut self, copies: Vec<Copied>, now: Timestamp) -> Result<(), JournalError> {
        let mut carried = Vec::new();
        for (disk, number, kind, body) in copies {
            let new = NewEntry { kind, disk, number, body: &[&body], room: Room::Data, carried: true };
            carried.push((disk, number, self.log.append(&mut self.manifest, now, &new)?));
        }
        self.commit(now)?;
        for (disk, number, place) in carried {
            let entries = self.entries.entry(disk).or_default();
            if let Ok(at) = entries.binary_search_by_key(&number, |entry| entry.number)
                && let Some(entry) = entries.get_mut(at)
            {
                (entry.place, entry.time, entry.carried) = (place, now, true);
            }
            let newest = self.segments.entry(place.segment).or_default().entry(disk).or_default();
            *newest = (*newest).max(number);
        }
        Ok(())
    }

    /// Gives up what waits for the target of a disk: durably lost from here on, up to the compare after the disk's next
    /// start. Nothing is taken for it any more. Answers the first and the last entry.
    ///
    /// # Errors
    /// When log or manifest cannot be written; nothing is given up then.
    pub fn give_up(
        &mut self,
        disk: DiskId,
        cause: &str,
        now: Timestamp,
    ) -> Result<Option<(u64, u64)>, JournalError> {
        self.commit(now)?;
        let waiting = self.waiting(disk);
        let (Some(first), Some(last)) = (waiting.first(), waiting.last()) else { return Ok(None) };
        let (first, last) = (first.number, last.number);
        let cause = Text::new(cause);
        self.edit(&[Edit::EntriesLost(EntriesLost { disk, first, last, time: now, cause })], now)?;
        self.given_up.insert(disk);
        if let Some(entries) = self.entries.get_mut(&disk) {
            entries.retain(|entry| entry.number < first);
        }
        Ok(Some((first, last)))
    }

    /// Disks whose waiting entries were given up, and of which nothing is taken since.
    #[must_use]
    pub const fn given_up(&self) -> &BTreeSet<DiskId> {
        &self.given_up
    }

    /// Entries of a disk that were given up are taken again from here on. Answers what a start would find of it. Nobody has the
    /// disk open; who opens it next has it compared.
    ///
    /// # Errors
    /// When the log cannot be written, or holds no state that this program can read.
    pub fn take_again(&mut self, disk: DiskId, now: Timestamp) -> Result<DiskLog, JournalError> {
        self.commit(now)?;
        let numbers = self.disks.get(&disk).cloned().unwrap_or_default();
        let remedy = "the disk is compared with its source";
        let state = match &numbers.state {
            Some((body, place)) => {
                let refused = JournalError::format(&self.folder, place.offset, remedy);
                Some((DiskState::decode(body).map_err(refused)?, *place))
            }
            None => None,
        };
        let entries = self.entries.get(&disk).cloned().unwrap_or_default();
        let known = self.shape().disks.get(&disk);
        let log = DiskLog::of(state, numbers.applied_entry, entries, known);
        self.given_up.remove(&disk);
        Ok(log)
    }

    /// A disk that was to be taken again could not be opened: as before.
    pub fn refuse_again(&mut self, disk: DiskId) {
        self.given_up.insert(disk);
    }

    /// Whether entries of a disk are taken.
    pub(super) fn is_taken(&self, disk: DiskId) -> Result<(), JournalError> {
        if self.given_up.contains(&disk) { Err(JournalError::GivenUp { disk }) } else { Ok(()) }
    }
}
