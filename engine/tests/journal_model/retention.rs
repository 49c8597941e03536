//! Giving space back: freeing redo-log segments, merging adjacent undo runs, letting the oldest one expire.
//!
//! Invariants: redo goes only when it is applied, older than the any-write window, and no epoch of the window starts in
//! it; files change by *new file flushed → edit flushed → inputs unlinked*; a point that is pinned, or that a rollback
//! still reads, keeps all it needs. Called by the driver.

use super::device::{Slot, Stop};
use super::machine::Journal;
use super::manifest::{Change, Kind, Run, Segment};
use super::mutations::Rule;
use super::records::{Applied, Entry, Frame, SEGMENT_GROUPS, Sequence, WINDOW};

impl Journal {
    /// Oldest state of a disk inside the any-write window: the last one from before it.
    pub(crate) fn window_start(&self, disk: usize) -> Sequence {
        let old = self.disks[disk].places.iter().filter(|place| place.1.time + WINDOW <= self.now);
        old.map(|place| *place.0).max().unwrap_or(0).max(self.catalogue.disks[disk].freed)
    }

    fn rolls_back(&self, disk: usize) -> bool {
        matches!(self.catalogue.disks[disk].kind(), Kind::Rollback(_)) && self.keeps(Rule::RollbackPins)
    }

    /// First record of a disk that must stay.
    fn keep_from(&self, disk: usize) -> Sequence {
        let (known, catalogue) = (&self.disks[disk], &self.catalogue.disks[disk]);
        if self.rolls_back(disk) {
            return 0;
        }
        let mut keep = known.received + 1;
        if self.keeps(Rule::FreeOnlyApplied) {
            keep = keep.min(known.applied + 1);
        }
        if catalogue.kind() == Kind::Bypass {
            return keep; // There is no point that could need more.
        }
        if self.keeps(Rule::FreeOnlyOld) {
            keep = keep.min(self.window_start(disk) + 1);
        }
        if self.keeps(Rule::FreeWholeEpochs) && self.keeps(Rule::FreeOnlyOld) {
            keep = keep.min(catalogue.epochs[catalogue.epoch_of(keep)].first);
        }
        keep
    }

    /// Frees the oldest segment if nothing needs it.
    pub(crate) fn free_segment(&mut self) -> Result<(), Stop> {
        let [oldest, next, ..] = self.catalogue.segments[..] else { return Ok(()) };
        let high = self.high_of(oldest, next.first_group);
        let needed = |disk: usize| {
            // Of what was carried from here before a stop the copy counts.
            let mut behind = self.disks[disk].places.range(self.keep_from(disk)..);
            behind.any(|place| place.1.file == oldest.file)
        };
        if (0..high.len()).any(needed) {
            return Ok(());
        }
        self.free_oldest(high)
    }

    /// The highest sequences that a segment or one before it had; `next` is the first group behind it.
    pub(crate) fn high_of(&self, segment: Segment, next: usize) -> Vec<Sequence> {
        let mut high: Vec<Sequence> = self.catalogue.disks.iter().map(|disk| disk.freed).collect();
        for slot in 0..SEGMENT_GROUPS.min(next.saturating_sub(segment.first_group)) {
            let Some(group) = self.segments[segment.file].good(slot) else { continue };
            for entry in &group.entries {
                // What was given up is not there already.
                if let Entry::Record(record) = entry
                    && !self.catalogue.disks[record.disk].is_given_up(record.sequence)
                {
                    high[record.disk] = high[record.disk].max(record.sequence);
                }
            }
        }
        high
    }

    /// The oldest segment goes; `high` is what [`Self::high_of`] says of it.
    pub(crate) fn free_oldest(&mut self, high: Vec<Sequence>) -> Result<(), Stop> {
        let [oldest, ..] = self.catalogue.segments[..] else { return Ok(()) };
        let carried = (0..high.len()).map(|disk| Applied {
            disk,
            sequence: self.disks[disk].applied,
            epoch: self.catalogue.disks[disk].active(),
            frames: if self.keeps(Rule::UndoBeforeTarget) { self.disks[disk].frames.len() } else { 0 },
        });
        let carried = if self.keeps(Rule::CarryApplied) { carried.collect() } else { Vec::new() };
        self.commit(Change::FreeSegment { carried, high: high.clone() })?;
        for (disk, high) in self.disks.iter_mut().zip(high) {
            disk.places.retain(|sequence, place| *sequence > high || place.file != oldest.file);
            disk.missing.retain(|sequence| *sequence > high);
        }
        Ok(())
    }

    /// Merges the run that starts at epoch `low` with the one after it.
    pub(crate) fn merge_runs(&mut self, disk: usize, low: usize) -> Result<(), Stop> {
        let runs = &self.catalogue.disks[disk].runs;
        let Some(at) = runs.iter().position(|run| run.low == low) else { return Ok(()) };
        let Some([older, newer]) = runs.get(at..at + 2).and_then(|pair| <[Run; 2]>::try_from(pair).ok())
        else {
            return Ok(());
        };
        if !self.may_go(disk, newer.high) || (self.is_pinned(disk, older.high) && self.keeps(Rule::PinsStay))
        {
            return Ok(());
        }
        let output = self.new_file();
        self.write_merged(disk, older, newer, output);
        if let Some(file) = self.runs.get_mut(&output).filter(|_| self.broken != Some(Rule::MergeBeforeEdit))
        {
            file.frames.flush(&mut self.chaos)?;
            file.index.flush(&mut self.chaos)?;
        }
        let inputs = [older.file, newer.file];
        if !self.keeps(Rule::EditBeforeUnlink) {
            inputs.iter().for_each(|file| _ = self.runs.remove(file));
        }
        let hands_on = self.keeps(Rule::DamageIsHandedOn);
        self.commit(Change::Merge { disk, inputs, output, hands_on })?;
        inputs.iter().for_each(|file| _ = self.runs.remove(file));
        Ok(())
    }

    /// The union of two runs; the older image of a block wins, and a hole is an image.
    fn write_merged(&mut self, disk: usize, older: Run, newer: Run, output: usize) {
        let mut merged: Vec<Frame> = Vec::new();
        let order = if self.keeps(Rule::OlderImageWins) { [older, newer] } else { [newer, older] };
        for run in order {
            for (at, block) in self.blocks_of(disk, run).into_iter().enumerate() {
                let Some(block) = block.filter(|block| merged.iter().all(|frame| frame.block != *block))
                else {
                    continue;
                };
                match self.runs.get(&run.file).map(|file| file.frames.read(at)) {
                    Some(Slot::Good(frame)) if frame.image.is_some() => merged.push(frame.clone()),
                    _ if self.keeps(Rule::MergeKeepsHoles) => merged.push(Frame::hole(block)),
                    _ => {}
                }
            }
        }
        let Some(file) = self.runs.get_mut(&output) else { return };
        for (at, frame) in merged.into_iter().enumerate() {
            file.index.write(at, frame.block);
            file.frames.write(at, frame);
        }
    }

    /// Drops the oldest run.
    pub(crate) fn expire(&mut self, disk: usize) -> Result<(), Stop> {
        let catalogue = &self.catalogue.disks[disk];
        let [oldest, .., newest_closed, _] = catalogue.runs[..] else { return Ok(()) };
        let run = if self.keeps(Rule::OldestExpires) { oldest } else { newest_closed };
        let pinned = (0..run.high).any(|epoch| catalogue.keeps_end_of(epoch) && self.is_pinned(disk, epoch));
        if !self.may_go(disk, run.high) || pinned {
            return Ok(());
        }
        let floor = if run.file == oldest.file { run.high + 1 } else { catalogue.floor };
        self.commit(Change::Expire { disk, file: run.file, floor })?;
        self.runs.remove(&run.file);
        Ok(())
    }

    /// Whether no state of the any-write window, and no rollback under way, has its base in this epoch or before. The
    /// time of the epoch's last record is not enough: a rollback's epoch has no records.
    fn may_go(&self, disk: usize, epoch: usize) -> bool {
        let catalogue = &self.catalogue.disks[disk];
        epoch < catalogue.locate(self.window_start(disk)).base
            && epoch < catalogue.active()
            && !self.rolls_back(disk)
    }

    fn is_pinned(&self, disk: usize, epoch: usize) -> bool {
        let mark = self.catalogue.disks[disk].epochs[epoch].mark;
        mark.is_some_and(|mark| self.catalogue.pinned.contains(&mark))
    }

    /// Recovery points of the machine: marks that are durable on all its disks and still kept on all of them.
    pub(crate) fn points(&self) -> Vec<usize> {
        let marks = self.disks.iter().flat_map(|disk| disk.marks.keys());
        let closing =
            self.catalogue.disks.iter().flat_map(|disk| &disk.epochs).filter_map(|epoch| epoch.mark.as_ref());
        let mut marks: Vec<usize> = marks.chain(closing).copied().collect();
        marks.sort_unstable();
        marks.dedup();
        let all = self.keeps(Rule::EveryDiskOfPoint);
        marks.retain(|mark| {
            let mut has = (0..self.disks.len()).map(|disk| self.point_on(disk, *mark).is_some());
            if all { has.all(|has| has) } else { has.any(|has| has) }
        });
        marks
    }

    /// The sequence of a durable mark on a disk, if the state there is kept.
    pub(crate) fn point_on(&self, disk: usize, mark: usize) -> Option<Sequence> {
        let (known, catalogue) = (&self.disks[disk], &self.catalogue.disks[disk]);
        if let Some(epoch) = catalogue.kept_end(mark) {
            return catalogue.epochs[epoch].last;
        }
        let in_window = |sequence: &Sequence| {
            let number = catalogue.epoch_of(*sequence);
            let epoch = catalogue.epochs[number];
            let has_log = catalogue.has_log_of(catalogue.locate(*sequence).base);
            (has_log || !self.keeps(Rule::NoPointsWithoutLog))
                && *sequence >= self.window_start(disk)
                && epoch.kind != Kind::Bypass
                && *sequence <= known.durable
        };
        known.marks.get(&mark).copied().filter(in_window)
    }
}
