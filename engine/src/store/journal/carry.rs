//! What keeps the oldest segment of the redo log from being given back, and what is done about it.
//!
//! A disk whose target stands, or whose machine is away in the middle of a stretch, needs its entries for longer than
//! the others. They are carried to the head of the log, with their numbers; where there is no room for that, they are
//! given up: the manifest says so, nothing more is taken for the disk, and its next start has it compared. A pinned point
//! inside an undo epoch needs the epoch's entries up to it for good: they are carried whenever their segment is to go.
//!
//! Invariants: a copy is durable before the segment it came from is given back; where an entry stands twice, the copy
//! counts; nothing that is on no target leaves the log without a durable word about it. Units: bytes, entry and segment
//! numbers. Called by retention.

use std::collections::BTreeSet;

use super::log::{NewEntry, Room};
use super::recovery::LogEntry;
use super::rollback::goes_to;
use super::view::View;
use super::{DiskLog, DiskShape, Journal, JournalError};
use crate::format::disk_state::DiskState;
use crate::format::manifest::{Edit, EntriesLost};
use crate::format::wire::Text;
use crate::units::{DiskId, Timestamp};

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

    /// Carries what stands in a segment and on no target to the head of the log: then it may be released, and only points
    /// inside undo epochs that go on are lost with it. The segment is not the one that is written. Of a disk of which
    /// something there cannot be read nothing is carried; these are answered, each with the reason: they are to be given
    /// up before the segment is released.
    ///
    /// # Errors
    /// When the medium is full, or fails between two reads; nothing is lost by that.
    pub fn carry(&mut self, segment: u64, now: Timestamp) -> Result<Vec<(DiskId, String)>, JournalError> {
        self.commit(now)?;
        let inside = |entry: &&LogEntry| entry.place.segment == segment;
        let waiting = |disk: &DiskId| (*disk, self.waiting(*disk).iter().filter(inside).copied().collect());
        let waiting = self.disks.keys().map(waiting).collect();
        self.carry_entries(waiting, now)
    }

    /// As [`Self::carry`], of what pinned points inside undo epochs need. What cannot be read is not carried, and the
    /// points that need it go with the segment: these disks are answered, each with the reason.
    ///
    /// # Errors
    /// As for [`Self::carry`].
    pub fn carry_pinned(
        &mut self,
        segment: u64,
        now: Timestamp,
    ) -> Result<Vec<(DiskId, String)>, JournalError> {
        self.commit(now)?;
        let disks: Vec<DiskId> = self.disks.keys().copied().collect();
        let needed = |disk: DiskId| self.pinned_entries(disk).filter(|entry| entry.place.segment == segment);
        let needed = disks.into_iter().map(|disk| (disk, needed(disk).copied().collect())).collect();
        self.carry_entries(needed, now)
    }

    /// Bytes of the log that pinned points inside undo epochs need: in a segment, and in the whole log.
    #[must_use]
    pub fn pinned_in(&self, segment: u64) -> (u64, u64) {
        let all = || self.disks.keys().flat_map(|disk| self.pinned_entries(*disk)).map(|entry| entry.place);
        let here = all().filter(|place| place.segment == segment);
        (here.map(|place| place.bytes).sum(), all().map(|place| place.bytes).sum())
    }

    /// The applied entries of a disk that its pinned points inside undo epochs need, ascending, each once.
    fn pinned_entries(&self, disk: DiskId) -> impl Iterator<Item = &LogEntry> {
        let known = self.shape().disks.get(&disk);
        let needed: Vec<(u64, u64)> = known.map(DiskShape::pinned_inside).unwrap_or_default();
        let is_needed = move |entry: &&LogEntry| {
            needed.iter().any(|(after, number)| entry.number > *after && entry.number <= *number)
        };
        self.applied(disk).iter().filter(is_needed)
    }

    fn carry_entries(
        &mut self,
        wanted: Vec<(DiskId, Vec<LogEntry>)>,
        now: Timestamp,
    ) -> Result<Vec<(DiskId, String)>, JournalError> {
        let (mut carried, mut unreadable) = (Vec::new(), Vec::new());
        for (disk, wanted) in wanted {
            // All or none: who tries again must not fill the log with copies of the first of them.
            if let Some(error) = wanted.iter().find_map(|entry| self.read(entry.place).err()) {
                unreadable.push((disk, error.to_string()));
                continue;
            }
            for entry in wanted {
                let (head, body) = self.read(entry.place)?;
                let body: &[&[u8]] = &[&body];
                let (kind, number, room) = (head.kind, entry.number, Room::Data);
                let new = NewEntry { kind, disk, number, body, room, carried: true };
                carried.push((disk, number, self.log.append(&mut self.manifest, now, &new)?));
            }
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
        Ok(unreadable)
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
