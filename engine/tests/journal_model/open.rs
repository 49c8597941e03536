//! Opening after any kind of end, and resuming with the peer.
//!
//! Invariants: nothing is relied on that is not flushed; nothing that was durable is dropped without its name; a record
//! that may have reached the target without a before-image never becomes one. Called by the driver after every [`Stop`].

use super::device::{Slot, Stop};
use super::machine::{Disk, Journal};
use super::manifest::{Catalogue, Change, Kind};
use super::mutations::Rule;
use super::records::{Applied, BLOCKS, Frame, Sequence};

impl Journal {
    pub(crate) fn open(&mut self) -> Result<(), Stop> {
        if self.keeps(Rule::FlushAtOpen) {
            self.flush_everything()?;
        }
        self.read_manifest();
        self.disks = self.catalogue.disks.iter().map(|_| Disk::default()).collect();
        self.passed.clear();
        let (said, must_cut) = self.scan_log();
        for disk in 0..self.disks.len() {
            self.settle_positions(disk, &said);
        }
        if must_cut && self.keeps(Rule::FreshSegmentAfterCut) {
            self.add_segment()?;
        }
        for disk in 0..self.disks.len() {
            let applied = self.last_applied(disk, &said);
            self.read_active_run(disk, applied)?;
        }
        self.note(|| "open".to_owned());
        Ok(())
    }

    fn flush_everything(&mut self) -> Result<(), Stop> {
        self.manifest.flush(&mut self.chaos)?;
        self.segments.iter_mut().try_for_each(|file| file.flush(&mut self.chaos))?;
        self.targets.iter_mut().try_for_each(|file| file.flush(&mut self.chaos))?;
        for run in self.runs.values_mut() {
            run.frames.flush(&mut self.chaos)?;
            run.index.flush(&mut self.chaos)?;
        }
        Ok(())
    }

    fn read_manifest(&mut self) {
        self.catalogue = Catalogue::new(&self.created);
        self.edits = 0;
        while let Some(edit) = self.manifest.good(self.edits) {
            self.catalogue.add(&edit.clone());
            self.edits += 1;
        }
        self.manifest.truncate(self.edits);
    }

    /// The furthest of: APPLIED records, what freed segments said, the end of the last closed epoch.
    fn last_applied(&self, disk: usize, said: &[Applied]) -> Applied {
        let catalogue = &self.catalogue.disks[disk];
        let ended = catalogue.epochs.iter().filter_map(|epoch| epoch.last).max();
        let ended = ended.filter(|_| self.keeps(Rule::EndIsApplied)).unwrap_or(0);
        let ended = Applied { disk, sequence: ended, epoch: catalogue.active(), frames: 0 };
        let said = said.iter().copied().filter(|applied| applied.disk == disk);
        // The later of two with the same position knows more frames.
        let order = |applied: &Applied| (applied.sequence, applied.epoch, applied.frames);
        said.chain([catalogue.carried, ended]).max_by_key(order).unwrap_or(ended)
    }

    /// Where the disk stands, and which of its records are missing.
    fn settle_positions(&mut self, disk: usize, said: &[Applied]) {
        let applied = self.last_applied(disk, said).sequence;
        self.forget_given_up(disk);
        let catalogue = &self.catalogue.disks[disk];
        let known = &mut self.disks[disk];
        let last_given_up = catalogue.lost.iter().map(|range| range.1).max().unwrap_or(0);
        known.applied = applied;
        known.received = known.received.max(applied).max(catalogue.freed).max(last_given_up);
        known.durable = known.received;
        // What was carried stands behind what was freed.
        let all = self.broken != Some(Rule::CarriedAreMissed);
        let from = if all { catalogue.freed.min(applied) } else { catalogue.freed };
        let expected = from + 1..=known.durable;
        known.missing = expected
            .filter(|sequence| !known.places.contains_key(sequence) && !catalogue.is_given_up(*sequence))
            .collect();
    }

    /// Rebuilds the index of the active run and judges its invalid frames.
    fn read_active_run(&mut self, disk: usize, applied: Applied) -> Result<(), Stop> {
        let (catalogue, active) = (&self.catalogue.disks[disk], self.catalogue.disks[disk].active());
        let Some(run) = catalogue.active_run() else { return Ok(()) };
        let rolls_back = matches!(catalogue.kind(), Kind::Rollback(_));
        let named = match applied.epoch == active {
            _ if rolls_back => catalogue.rollback_named,
            true => applied.frames,
            false => 0,
        };
        if catalogue.suspect.0 == active {
            self.disks[disk].suspect_until = catalogue.suspect.1;
        }
        let Some(file) = self.runs.get(&run.file) else { return Ok(()) };
        let (mut blocks, mut unknown) = (Vec::new(), false);
        for at in 0..file.frames.len().max(named) {
            match file.frames.read(at) {
                Slot::Good(frame) => blocks.push(Some(frame.block)),
                _ if at >= named || !self.keeps(Rule::NamedFrameIsHole) => break,
                Slot::BadBody(frame) => blocks.push(Some(frame.block)),
                Slot::Bad | Slot::Empty => {
                    blocks.push(None);
                    unknown = true;
                }
            }
        }
        let (kept, len) = (blocks.len(), file.frames.len());
        self.disks[disk].captured = blocks.iter().copied().flatten().collect();
        self.disks[disk].frames = blocks;
        if kept < len || unknown {
            self.suspect_run(disk, rolls_back)?;
        }
        if kept < len {
            self.cut_run(disk, kept)?;
        }
        if unknown {
            self.add_holes(disk, rolls_back)?;
        }
        Ok(())
    }

    /// Frames of the active run are gone. In a rollback the target was not written past the named ones; in an epoch of
    /// the stream it may have been, until all that is durable now was applied again. A named frame that cannot be read
    /// may also belong to a record after APPLIED: windows are cut anew after each opening.
    fn suspect_run(&mut self, disk: usize, rolls_back: bool) -> Result<(), Stop> {
        let (epoch, durable) = (self.catalogue.disks[disk].active(), self.disks[disk].durable);
        let until = durable.max(self.disks[disk].suspect_until);
        if !rolls_back {
            if self.keeps(Rule::CutIsRecorded) {
                self.commit(Change::Suspect { disk, epoch, until })?;
            }
            self.disks[disk].suspect_until = until;
        }
        Ok(())
    }

    /// Cuts the active run at its first invalid frame.
    fn cut_run(&mut self, disk: usize, kept: usize) -> Result<(), Stop> {
        let epoch = self.catalogue.disks[disk].active();
        let Some(run) = self.catalogue.disks[disk].active_run() else { return Ok(()) };
        if let Some(file) = self.runs.get_mut(&run.file) {
            let dropped =
                (kept..file.frames.len()).filter_map(|at| file.frames.good(at)).map(|frame| frame.block);
            self.dropped.push((disk, epoch, dropped.collect()));
            file.frames.truncate(kept);
            file.index.truncate(kept);
        }
        self.note(|| format!("disk {disk}: run of epoch {epoch} cut to {kept} frames"));
        Ok(())
    }

    /// Frames that are named and cannot be read: whatever block they may have held gets a hole.
    fn add_holes(&mut self, disk: usize, rolls_back: bool) -> Result<(), Stop> {
        let blocks: Vec<usize> = (0..BLOCKS)
            .filter(|block| {
                !self.disks[disk].captured.contains(block) && self.may_be_lost(disk, *block, rolls_back)
            })
            .collect();
        for block in blocks {
            self.found.holes += 1;
            self.add_frame(disk, Frame::hole(block))?;
        }
        self.flush_run(disk)
    }

    /// Whether an uncaptured block may have had a frame: an applied record of the epoch wrote it, or may have. A
    /// rollback goes through the disk in order of address, so there the frames before and after say where to look; and
    /// it only writes what a run since its point has.
    fn may_be_lost(&self, disk: usize, block: usize, rolls_back: bool) -> bool {
        let catalogue = &self.catalogue.disks[disk];
        if let (true, Kind::Rollback(to)) = (rolls_back, catalogue.kind()) {
            let mut since =
                catalogue.runs.iter().filter(|run| run.low >= to.base && run.high < catalogue.active());
            let gap = self.gaps_of_rollback(disk).iter().any(|gap| gap.0 <= block && block < gap.1);
            return gap && since.any(|run| self.image(disk, *run, block).is_some());
        }
        let first = catalogue.epochs[catalogue.active()].first;
        (first..=self.disks[disk].applied)
            .any(|sequence| self.record(disk, sequence).is_none_or(|record| record.touches(block)))
    }

    /// Ranges of blocks in which the unreadable frames of a rollback's run lie.
    fn gaps_of_rollback(&self, disk: usize) -> Vec<(usize, usize)> {
        let Some(run) = self.catalogue.disks[disk].active_run() else { return Vec::new() };
        let Some(file) = self.runs.get(&run.file) else { return Vec::new() };
        let (mut gaps, mut from, mut open) = (Vec::new(), 0, false);
        for (at, block) in self.disks[disk].frames.iter().enumerate() {
            let is_hole = file.frames.good(at).is_some_and(|frame| frame.image.is_none());
            match block {
                None => open = true,
                Some(_) if is_hole => {} // Added by an opening, out of order.
                Some(block) => {
                    if std::mem::take(&mut open) {
                        gaps.push((from, *block));
                    }
                    from = block + 1;
                }
            }
        }
        if open {
            gaps.push((from, BLOCKS));
        }
        gaps
    }

    /// Compares positions with the peer: `acknowledged` is what it was told is durable, `grace` the oldest record it
    /// still has. Answers what it is to send again; what is gone for good is in the catalogue. Nothing is applied
    /// before this.
    pub(crate) fn resume(
        &mut self,
        disk: usize,
        acknowledged: Sequence,
        grace: Sequence,
    ) -> Result<Vec<Sequence>, Stop> {
        let durable = self.disks[disk].durable;
        if acknowledged > durable {
            if self.keeps(Rule::PeerGuard) {
                self.note(|| {
                    format!("disk {disk}: {}..={acknowledged} was durable and is gone", durable + 1)
                });
                self.found.by_peer += 1;
                self.disks[disk].missing.extend(durable + 1..=acknowledged);
                self.widen_suspicion(disk, acknowledged)?;
            }
            let known = &mut self.disks[disk];
            (known.received, known.durable) = (acknowledged, acknowledged);
        }
        let missing: Vec<Sequence> = self.disks[disk].missing.iter().copied().collect();
        let (again, gone): (Vec<_>, Vec<_>) = missing.into_iter().partition(|sequence| *sequence >= grace);
        let applied = self.disks[disk].applied;
        for sequence in gone.into_iter().filter(|sequence| *sequence > applied) {
            self.give_up(disk, sequence)?;
        }
        self.disks[disk].awaited = again.iter().copied().collect();
        Ok(again)
    }

    /// What the peer knows to be lost may have been written too before the run was cut, even if nothing that is left is
    /// unapplied.
    fn widen_suspicion(&mut self, disk: usize, until: Sequence) -> Result<(), Stop> {
        let (known, epoch) = (&self.disks[disk], self.catalogue.disks[disk].active());
        let was_cut = self.catalogue.disks[disk].suspect.0 == epoch && known.suspect_until >= known.applied;
        if was_cut && until > known.suspect_until {
            self.commit(Change::Suspect { disk, epoch, until })?;
            self.disks[disk].suspect_until = until;
        }
        Ok(())
    }

    /// A record that is not applied is gone for good.
    fn give_up(&mut self, disk: usize, sequence: Sequence) -> Result<(), Stop> {
        self.commit(Change::Lost { disk, from: sequence, to: sequence })?;
        self.disks[disk].missing.remove(&sequence);
        Ok(())
    }

    /// Before the apply worker passes records that were given up: if the run has lost frames, these records may have
    /// been written and their before-images lost, for any block.
    pub(crate) fn hole_what_lost_records_wrote(&mut self, disk: usize, last: Sequence) -> Result<(), Stop> {
        let (known, catalogue) = (&self.disks[disk], &self.catalogue.disks[disk]);
        let passes = (known.applied + 1..=last).any(|sequence| catalogue.is_given_up(sequence));
        if known.suspect_until <= known.applied || !passes {
            return Ok(());
        }
        let blocks = (0..BLOCKS).filter(|block| !known.captured.contains(block));
        for block in blocks.collect::<Vec<_>>() {
            self.found.holes += 1;
            self.add_frame(disk, Frame::hole(block))?;
        }
        self.flush_run(disk)
    }
}
