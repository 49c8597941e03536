//! What a journal consists of: the sum of its manifest's edits.
//!
//! Invariants: the same edits in the same order make the same shape; an edit that contradicts what is there is refused
//! and changes nothing (a batch of them is taken back through `Parts`); [`Shape::edits`] makes an equal shape from nothing, in which what a merge would have folded away
//! already is. Epochs and runs of a disk ascend and do not overlap. Pure: no files, no clocks. Called by `manifest` and whoever asks what the journal holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::batch::Mark;
use crate::format::manifest::{
    DiskAdded, DiskGrown, Edit, EntriesLost, EntryDamaged, EpochCause, EpochClosed, EpochOpened,
    EpochsExpired, ImagesDamaged, LossMended, PointKept, RunsMerged, SegmentOpened, StretchDegraded,
};
use crate::units::{DiskId, LineageId, Sequence, Timestamp};

/// An undo epoch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// How it began.
    pub opened: EpochOpened,
    /// How it ended; `None` while it goes on.
    pub closed: Option<EpochClosed>,
}

/// Which file an undo run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunFile {
    /// The run of one epoch.
    Epoch(u64),
    /// A merged run.
    Merged(u64),
}

/// A sealed undo run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The oldest epoch whose before-images it holds.
    pub first: u64,
    /// The newest one.
    pub last: u64,
    /// Its file.
    pub file: RunFile,
    /// Its bytes.
    pub bytes: u64,
}

/// Entries of a disk that were durable and are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Which.
    pub entries: EntriesLost,
    /// The first mark after the disk was compared with its source; `None` as long as it was not.
    pub mended: Option<u64>,
}

/// Applied entries without which a point inside its undo epoch is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    /// The pinned point; `None` for the one that a rollback goes to.
    pub point: Option<[u8; 16]>,
    /// The entry before the first.
    pub after: u64,
    /// The last one.
    pub through: u64,
}

impl Needed {
    /// Whether an entry is one of them.
    #[must_use]
    pub const fn has(&self, number: u64) -> bool {
        number > self.after && number <= self.through
    }
}

/// What a journal holds of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskShape {
    /// How it was added.
    pub added: DiskAdded,
    /// Its undo epochs, ascending; only the last may be open.
    pub epochs: Vec<Epoch>,
    /// Its sealed runs, ascending.
    pub runs: Vec<Run>,
    /// The newest epoch whose before-images are gone.
    pub expired: u64,
    /// Its points, by identity.
    pub points: BTreeMap<[u8; 16], PointKept>,
    /// Parts of its stream whose points promise less than their marks say, as they were told.
    pub degraded: Vec<StretchDegraded>,
    /// Entries that were durable and are lost, as they were found.
    pub lost: Vec<Loss>,
    /// Before-images that cannot be read, as they were found.
    pub damaged: Vec<ImagesDamaged>,
    /// Applied entries that cannot be read, ascending.
    pub damaged_entries: Vec<EntryDamaged>,
    /// How it grew, oldest first.
    pub grown: Vec<DiskGrown>,
}

impl DiskShape {
    /// Its size now, in sectors.
    #[must_use]
    pub fn size_sectors(&self) -> u64 {
        self.grown.last().map_or(self.added.size_sectors, |grown| grown.size_sectors)
    }

    /// Its size behind an entry, in sectors.
    #[must_use]
    pub fn size_at(&self, number: u64) -> u64 {
        let before = self.grown.iter().rev().find(|grown| grown.after < number);
        before.map_or(self.added.size_sectors, |grown| grown.size_sectors)
    }

    /// The epoch that goes on.
    #[must_use]
    pub fn open_epoch(&self) -> Option<&Epoch> {
        self.epochs.last().filter(|epoch| epoch.closed.is_none())
    }

    /// Whether a mark at a sequence, which is entry `number`, promises less than it says.
    #[must_use]
    pub fn is_degraded(&self, lineage: LineageId, sequence: Sequence, number: u64) -> bool {
        let concerns =
            |part: &StretchDegraded| part.lineage == lineage && (part.from..=part.to).contains(&sequence);
        self.is_doubtful(number) || self.degraded.iter().any(concerns)
    }

    /// Whether what stands behind an entry lacks others that are lost: from the first of these on, up to the first mark
    /// after the compare.
    #[must_use]
    pub fn is_doubtful(&self, number: u64) -> bool {
        let concerns =
            |loss: &Loss| number >= loss.entries.first && loss.mended.is_none_or(|mended| number < mended);
        self.lost.iter().any(concerns)
    }

    /// The newest entry that is lost and was not made up for by a compare yet.
    #[must_use]
    pub fn lost_through(&self) -> Option<u64> {
        let open = self.lost.iter().filter(|loss| loss.mended.is_none());
        open.map(|loss| loss.entries.last).max()
    }

    /// The newest entry that is surely on the target, whatever the log says: undo epochs end, and begin, and a disk grows,
    /// only when all of them are. Where all that ended is expired, the beginning of the one that goes on still says it.
    #[must_use]
    pub fn closed_through(&self) -> u64 {
        let ended = self.epochs.iter().rev().find_map(|epoch| epoch.closed).map_or(0, |closed| closed.last);
        let begun = self.epochs.last().map_or(0, |epoch| epoch.opened.after);
        ended.max(begun).max(self.grown.last().map_or(0, |grown| grown.after))
    }

    /// The newest entry that a kept point stands at: its number is not another entry's.
    pub(super) fn kept_through(&self) -> u64 {
        self.points.values().map(|point| point.number).max().unwrap_or(0)
    }

    /// Whether the mark that is entry `number` promises less than its class says: it was found out later, or it says so
    /// itself.
    #[must_use]
    pub fn is_degraded_mark(&self, mark: &Mark, number: u64) -> bool {
        mark.unread_blocks > 0 || self.is_degraded(mark.lineage, mark.sequence, number)
    }

    /// The epoch an entry belongs to; `None` before the first, and in epochs that were folded away.
    #[must_use]
    pub fn epoch_of(&self, number: u64) -> Option<&Epoch> {
        let epoch = self.epochs.iter().rev().find(|epoch| number > epoch.opened.after)?;
        epoch.closed.is_none_or(|closed| number <= closed.last).then_some(epoch)
    }

    /// When the disk was as it was at a kept point, by the target's clock: where the undo epoch ends or begins there, that
    /// is known; inside it, when it ended. `None` where it goes on.
    #[must_use]
    pub fn time_of(&self, point: &PointKept) -> Option<Timestamp> {
        let epoch = self.epochs.iter().find(|epoch| epoch.opened.epoch == point.epoch)?;
        match epoch.closed {
            Some(closed) if closed.last == point.number => Some(closed.time),
            _ if epoch.opened.after == point.number => Some(epoch.opened.time),
            closed => closed.map(|closed| closed.time),
        }
    }

    /// Whether a kept point lies inside its undo epoch: it is made from the epoch's images and the log.
    #[must_use]
    pub fn is_inside(&self, point: &PointKept) -> bool {
        let epoch = self.epochs.iter().find(|epoch| epoch.opened.epoch == point.epoch);
        epoch.is_some_and(|epoch| {
            let is_end = epoch.closed.is_some_and(|closed| closed.last == point.number);
            point.number > epoch.opened.after && !is_end
        })
    }

    /// What pinned points inside undo epochs need of the log, and a point that a rollback goes to which did not get
    /// there yet.
    #[must_use]
    pub fn needed_inside(&self) -> Vec<Needed> {
        let pinned = self.points.values().filter(|point| point.pinned && self.is_inside(point));
        let epoch = |number: u64| self.epochs.iter().find(|epoch| epoch.opened.epoch == number);
        let needed = |point: &PointKept| {
            let after = epoch(point.epoch)?.opened.after;
            Some(Needed { point: Some(point.point), after, through: point.number })
        };
        let open = self.open_epoch().map(|epoch| epoch.opened);
        let back = open.filter(|opened| opened.cause == EpochCause::Rollback).and_then(|opened| {
            let to = epoch(opened.to_epoch)?;
            let at_end = opened.to_records == 0 && to.closed.is_some_and(|end| end.last == opened.to_number);
            let (after, through) =
                (to.opened.after, opened.to_number.saturating_add(u64::from(opened.to_records > 0)));
            (through > after && !at_end).then_some(Needed { point: None, after, through })
        });
        pinned.filter_map(needed).chain(back).collect()
    }

    /// The epoch from which on undo runs make up the disk as it was behind an entry of `epoch`: the one behind it at
    /// its end, itself at its beginning and inside it; `None` where the epoch is not kept.
    #[must_use]
    pub fn runs_from(&self, epoch: u64, number: u64) -> Option<u64> {
        let known = self.epochs.iter().find(|known| known.opened.epoch == epoch)?;
        let at_end = known.closed.is_some_and(|closed| closed.last == number);
        Some(if at_end { epoch + 1 } else { epoch })
    }

    /// Whether a run holds images of epochs before `from` and of later ones: what needs runs from there on is gone.
    #[must_use]
    pub fn is_merged_across(&self, from: u64) -> bool {
        self.runs.iter().any(|run| run.first < from && run.last >= from)
    }

    /// Whether a point is kept that one run of all epochs from `first` to `last` would do away with.
    #[must_use]
    pub fn has_point_inside(&self, first: u64, last: u64) -> bool {
        let mut needed = self.points.values().filter_map(|point| self.runs_from(point.epoch, point.number));
        needed.any(|from| first < from && last >= from)
    }

    /// Forgets closed epochs that nothing needs: without a run's end, a point, or a rollback that names them.
    fn fold(&mut self) {
        let newest = self.epochs.iter().rev().find(|epoch| epoch.closed.is_some());
        let newest = newest.map_or(0, |epoch| epoch.opened.epoch);
        let mut needed: BTreeSet<u64> = self.points.values().map(|point| point.epoch).collect();
        needed.extend(self.runs.iter().flat_map(|run| [run.first, run.last]));
        needed.extend(self.epochs.iter().map(|epoch| epoch.opened.to_epoch));
        needed.insert(newest);
        self.epochs.retain(|epoch| epoch.closed.is_none() || needed.contains(&epoch.opened.epoch));
    }
}

/// Everything a journal consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Segments in use, by number.
    pub segments: BTreeMap<u64, SegmentOpened>,
    /// The highest segment number ever used.
    pub segment_newest: u64,
    /// Disks.
    pub disks: BTreeMap<DiskId, DiskShape>,
}

/// Parts of a shape as they were, or are: what a batch of edits can change.
#[derive(Debug)]
pub(super) struct Parts {
    segments: BTreeMap<u64, SegmentOpened>,
    segment_newest: u64,
    /// `None`: no such disk is there.
    disks: BTreeMap<DiskId, Option<DiskShape>>,
}

impl Shape {
    /// What these edits can change, as it is now.
    pub(super) fn before(&self, edits: &[Edit]) -> Parts {
        let mut touched: BTreeSet<DiskId> = edits.iter().filter_map(Edit::disk).collect();
        for edit in edits {
            if let Edit::SegmentReleased(released) = edit {
                let damaged = |shape: &DiskShape| {
                    shape.damaged_entries.iter().any(|entry| entry.segment == released.number)
                };
                touched.extend(self.disks.iter().filter(|(_, shape)| damaged(shape)).map(|(disk, _)| *disk));
            }
        }
        self.parts(touched)
    }

    fn parts(&self, disks: impl IntoIterator<Item = DiskId>) -> Parts {
        let disks = disks.into_iter().map(|disk| (disk, self.disks.get(&disk).cloned())).collect();
        Parts { segments: self.segments.clone(), segment_newest: self.segment_newest, disks }
    }

    /// Makes parts as they were.
    pub(super) fn restore(&mut self, parts: Parts) {
        (self.segments, self.segment_newest) = (parts.segments, parts.segment_newest);
        for (disk, shape) in parts.disks {
            match shape {
                Some(shape) => _ = self.disks.insert(disk, shape),
                None => _ = self.disks.remove(&disk),
            }
        }
    }

    /// As [`Self::restore`], and answers what they were.
    pub(super) fn exchange(&mut self, parts: Parts) -> Parts {
        let now = self.parts(parts.disks.keys().copied());
        self.restore(parts);
        now
    }

    /// Makes a change.
    ///
    /// # Errors
    /// Says what the edit contradicts; the shape is then as before.
    pub fn apply(&mut self, edit: &Edit) -> Result<(), String> {
        match edit {
            Edit::SegmentOpened(opened) => self.open_segment(opened),
            Edit::SegmentReleased(released) => self.release_segment(released.number),
            Edit::DiskAdded(added) => self.add_disk(added),
            Edit::DiskRemoved(removed) => match self.disks.remove(&removed.disk) {
                Some(_) => Ok(()),
                None => Err(format!("disk {} is removed and was not there", removed.disk)),
            },
            Edit::EpochOpened(opened) => self.disk(opened.disk)?.open(opened),
            Edit::EpochClosed(closed) => self.disk(closed.disk)?.close(closed),
            Edit::RunsMerged(merged) => self.disk(merged.disk)?.merge(merged),
            Edit::EpochsExpired(expired) => self.disk(expired.disk)?.expire(expired),
            Edit::PointKept(point) => {
                let points = &mut self.disk(point.disk)?.points;
                // A point kept twice is the same point: the edit may be repeated after a crash, and one that was pinned
                // inside its undo epoch may be the end of it in the end.
                let pinned = points.get(&point.point).filter(|known| known.pinned);
                let name = pinned.map_or(point.name, |known| known.name);
                let pinned = point.pinned || pinned.is_some();
                points.insert(point.point, PointKept { pinned, name, ..*point });
                Ok(())
            }
            Edit::PointChanged(point) => {
                let known = self.disk(point.disk)?.points.insert(point.point, *point);
                known.map(|_| ()).ok_or_else(|| "a point is changed and was not there".to_owned())
            }
            Edit::StretchDegraded(part) => {
                let shape = self.disk(part.disk)?;
                // Told twice is told once: the edit may be repeated after a crash.
                let known = |other: &StretchDegraded| {
                    (other.lineage, other.from, other.to) == (part.lineage, part.from, part.to)
                };
                if !shape.degraded.iter().any(known) {
                    shape.degraded.push(*part);
                }
                Ok(())
            }
            Edit::EntriesLost(lost) => self.disk(lost.disk)?.lose(lost),
            Edit::LossMended(mended) => {
                let open = self.disk(mended.disk)?.lost.iter_mut().filter(|loss| loss.mended.is_none());
                open.for_each(|loss| loss.mended = Some(mended.number));
                Ok(())
            }
            Edit::ImagesDamaged(damaged) => self.disk(damaged.disk)?.note_damaged(damaged),
            Edit::ImagesSound(sound) => self.disk(sound.disk)?.note_sound(sound),
            Edit::EntryDamaged(damaged) => {
                if !self.segments.contains_key(&damaged.segment) {
                    return Err(format!(
                        "an entry is damaged in segment {}, which is not in use",
                        damaged.segment
                    ));
                }
                self.disk(damaged.disk)?.note_entry_damaged(damaged);
                Ok(())
            }
            Edit::EntrySound(sound) => {
                self.disk(sound.disk)?.damaged_entries.retain(|known| known.number != sound.number);
                Ok(())
            }
            Edit::DiskGrown(grown) => self.disk(grown.disk)?.grow(grown),
            Edit::PointDropped(dropped) => {
                let disk = self.disk(dropped.disk)?;
                let known = disk.points.remove(&dropped.point);
                disk.fold();
                known.map(|_| ()).ok_or_else(|| "a point is dropped and was not there".to_owned())
            }
        }
    }

    fn disk(&mut self, disk: DiskId) -> Result<&mut DiskShape, String> {
        self.disks.get_mut(&disk).ok_or_else(|| format!("disk {disk} is not in the journal"))
    }

    fn release_segment(&mut self, number: u64) -> Result<(), String> {
        if self.segments.remove(&number).is_none() {
            return Err(format!("segment {number} is released and was not in use"));
        }
        for disk in self.disks.values_mut() {
            disk.damaged_entries.retain(|entry| entry.segment != number);
        }
        Ok(())
    }

    fn open_segment(&mut self, opened: &SegmentOpened) -> Result<(), String> {
        if opened.number <= self.segment_newest {
            return Err(format!("segment {} is opened after {}", opened.number, self.segment_newest));
        }
        if self.segments.values().any(|used| used.slot == opened.slot) {
            return Err(format!("segment file {} is used twice", opened.slot));
        }
        self.segment_newest = opened.number;
        self.segments.insert(opened.number, *opened);
        Ok(())
    }

    fn add_disk(&mut self, added: &DiskAdded) -> Result<(), String> {
        if self.disks.contains_key(&added.disk) {
            return Err(format!("disk {} is added twice", added.disk));
        }
        let shape = DiskShape {
            added: *added,
            epochs: Vec::new(),
            runs: Vec::new(),
            expired: 0,
            points: BTreeMap::new(),
            degraded: Vec::new(),
            lost: Vec::new(),
            damaged: Vec::new(),
            damaged_entries: Vec::new(),
            grown: Vec::new(),
        };
        self.disks.insert(added.disk, shape);
        Ok(())
    }

    /// Edits that make this shape from nothing.
    #[must_use]
    pub fn edits(&self) -> Vec<Edit> {
        let mut edits: Vec<Edit> =
            self.segments.values().map(|segment| Edit::SegmentOpened(*segment)).collect();
        for shape in self.disks.values() {
            shape.edits(&mut edits);
        }
        edits
    }
}

impl DiskShape {
    fn open(&mut self, opened: &EpochOpened) -> Result<(), String> {
        if self.open_epoch().is_some() {
            return Err(format!("epoch {} is opened while another goes on", opened.epoch));
        }
        let newest = self.epochs.last().map_or(self.expired, |epoch| epoch.opened.epoch);
        if opened.epoch <= newest {
            return Err(format!("epoch {} is opened after {newest}", opened.epoch));
        }
        self.epochs.push(Epoch { opened: *opened, closed: None });
        Ok(())
    }

    fn close(&mut self, closed: &EpochClosed) -> Result<(), String> {
        let open = self.epochs.last_mut().filter(|epoch| epoch.closed.is_none());
        let Some(epoch) = open.filter(|epoch| epoch.opened.epoch == closed.epoch) else {
            return Err(format!("epoch {} is closed and was not open", closed.epoch));
        };
        epoch.closed = Some(*closed);
        if closed.run_bytes > 0 {
            let file = RunFile::Epoch(closed.epoch);
            self.runs.push(Run { first: closed.epoch, last: closed.epoch, file, bytes: closed.run_bytes });
        } else {
            self.damaged.retain(|damaged| damaged.first != closed.epoch);
        }
        Ok(())
    }

    fn merge(&mut self, merged: &RunsMerged) -> Result<(), String> {
        let inside = |run: &Run| run.first >= merged.first && run.last <= merged.last;
        let touched = |run: &Run| run.last >= merged.first && run.first <= merged.last;
        if merged.first > merged.last || !self.runs.iter().any(inside) {
            return Err(format!("epochs {} to {} are merged and have no run", merged.first, merged.last));
        }
        if self.runs.iter().any(|run| touched(run) && !inside(run)) {
            return Err(format!("epochs {} to {} are merged across a run", merged.first, merged.last));
        }
        if self.has_point_inside(merged.first, merged.last) {
            return Err(format!("epochs {} to {} are merged across a point", merged.first, merged.last));
        }
        let at = self.runs.iter().position(inside).unwrap_or(0);
        self.runs.retain(|run| !inside(run));
        let file = RunFile::Merged(merged.run);
        self.runs.insert(at, Run { first: merged.first, last: merged.last, file, bytes: merged.run_bytes });
        self.merge_damaged(merged);
        self.fold();
        Ok(())
    }

    fn lose(&mut self, lost: &EntriesLost) -> Result<(), String> {
        if lost.first == 0 || lost.first > lost.last {
            return Err(format!("entries {} to {} are lost and are none", lost.first, lost.last));
        }
        // Told twice is told once: the edit may be repeated after a crash.
        let same = |loss: &Loss| (loss.entries.first, loss.entries.last) == (lost.first, lost.last);
        if !self.lost.iter().any(same) {
            self.lost.push(Loss { entries: *lost, mended: None });
        }
        Ok(())
    }

    fn grow(&mut self, grown: &DiskGrown) -> Result<(), String> {
        let (size, after) = (self.size_sectors(), self.grown.last().map_or(0, |grown| grown.after));
        // Images of a run lie within the size that its disk had when it was begun.
        if let Some(epoch) = self.open_epoch() {
            return Err(format!("the disk grows while epoch {} goes on", epoch.opened.epoch));
        }
        if grown.size_sectors <= size || grown.after < after {
            let DiskGrown { size_sectors, after: at, .. } = grown;
            return Err(format!(
                "the disk grows to {size_sectors} sectors at entry {at} from {size} at {after}"
            ));
        }
        self.grown.push(*grown);
        Ok(())
    }

    fn expire(&mut self, expired: &EpochsExpired) -> Result<(), String> {
        if self.runs.iter().any(|run| run.first <= expired.through && run.last > expired.through) {
            return Err(format!("epochs through {} expire inside a merged run", expired.through));
        }
        self.runs.retain(|run| run.last > expired.through);
        self.damaged.retain(|damaged| damaged.last > expired.through);
        self.epochs.retain(|epoch| epoch.opened.epoch > expired.through || epoch.closed.is_none());
        self.expired = self.expired.max(expired.through);
        // What no point of a remaining epoch can lie in is not asked for again.
        let epochs = &self.epochs;
        self.degraded.retain(|part| {
            let mut same = epochs.iter().filter(|epoch| epoch.opened.lineage == part.lineage);
            same.next().is_some_and(|epoch| part.to >= epoch.opened.sequence)
        });
        let oldest = epochs.first().map_or(u64::MAX, |epoch| epoch.opened.after);
        self.lost.retain(|loss| loss.mended.is_none_or(|mended| mended > oldest));
        Ok(())
    }

    fn edits(&self, edits: &mut Vec<Edit>) {
        let disk = self.added.disk;
        edits.push(Edit::DiskAdded(self.added));
        if self.expired > 0 {
            edits.push(Edit::EpochsExpired(EpochsExpired { disk, through: self.expired }));
        }
        // Before the epochs, of which the last may go on: a disk grows between two.
        edits.extend(self.grown.iter().map(|grown| Edit::DiskGrown(*grown)));
        for epoch in &self.epochs {
            edits.push(Edit::EpochOpened(epoch.opened));
            edits.extend(epoch.closed.map(Edit::EpochClosed));
        }
        edits.extend(self.points.values().map(|point| Edit::PointKept(*point)));
        for run in &self.runs {
            if let RunFile::Merged(number) = run.file {
                let (first, last) = (run.first, run.last);
                let merged = RunsMerged { disk, first, last, run: number, run_bytes: run.bytes };
                edits.push(Edit::RunsMerged(merged));
            }
        }
        edits.extend(self.degraded.iter().map(|part| Edit::StretchDegraded(*part)));
        // A mend concerns every loss before it that is open, so those that are mended stand first.
        for Loss { entries, mended } in &self.lost {
            edits.push(Edit::EntriesLost(*entries));
            edits.extend(mended.map(|number| Edit::LossMended(LossMended { disk, number })));
        }
        edits.extend(self.damaged.iter().map(|damaged| Edit::ImagesDamaged(*damaged)));
        edits.extend(self.damaged_entries.iter().map(|damaged| Edit::EntryDamaged(*damaged)));
    }
}
