//! What writes the target beside the apply worker: bulk without points, and rollback in place.
//!
//! Invariants: bulk bypasses the journal only until the first point; a rollback is an undo epoch whose writes are the
//! view at its point, so it can be repeated after a crash at any step and be rolled forward again.

use super::device::Stop;
use super::machine::Journal;
use super::manifest::{Change, Kind};
use super::mutations::Rule;
use super::records::{At, BLOCKS, Block, Frame, SECTORS};

impl Journal {
    /// One block of the initial sync, straight to the target.
    pub(crate) fn bulk(&mut self, disk: usize, block: usize, content: Block) -> Result<(), Stop> {
        self.chaos.step()?;
        self.note(|| format!("disk {disk}: bulk block {block}: {content:?}"));
        for (at, value) in content.into_iter().enumerate() {
            self.targets[disk].write(block * SECTORS + at, value);
        }
        Ok(())
    }

    /// Bulk blocks are durable when the target is flushed; only then their progress is written down.
    pub(crate) fn bulk_progress(&mut self, disk: usize, blocks: Vec<usize>) -> Result<(), Stop> {
        if self.keeps(Rule::BulkFlushFirst) {
            self.targets[disk].flush(&mut self.chaos)?;
        }
        self.commit(Change::Bulk { disk, blocks })
    }

    /// Opens the epoch of a rollback; the disk must be drained.
    pub(crate) fn begin_rollback(&mut self, disk: usize, to: At) -> Result<(), Stop> {
        self.note(|| format!("disk {disk}: roll back to {to:?}"));
        let mark = self.mark_here(disk);
        self.end_epoch(disk, self.disks[disk].applied, mark, Kind::Rollback(to))
    }

    /// The mark a disk stands at, if it does: an epoch that ends here ends at it, so that the point outlives its redo.
    pub(crate) fn mark_here(&self, disk: usize) -> Option<usize> {
        let catalogue = &self.catalogue.disks[disk];
        let (active, before) = (catalogue.active(), catalogue.active().saturating_sub(1));
        let is_empty = catalogue.epochs[active].first == self.disks[disk].applied + 1;
        let (known, before) = (&self.disks[disk], &catalogue.epochs[before]);
        match before.kind {
            Kind::Rollback(_) if is_empty => None,
            _ if is_empty => before.mark,
            _ => known.marks.iter().find(|mark| *mark.1 == known.applied).map(|mark| *mark.0),
        }
    }

    /// Rolls some blocks back; closes the epoch when all are.
    pub(crate) fn roll_back(&mut self, disk: usize) -> Result<(), Stop> {
        let Kind::Rollback(to) = self.catalogue.disks[disk].kind() else { return Ok(()) };
        let (room, mut wanted) = (self.chaos.rng.between(1, 3), self.view_of_all(disk, to));
        if !self.keeps(Rule::RollbackTakesAllBlocks) {
            wanted.iter_mut().skip(self.size_at(disk, to.upto)).for_each(|block| *block = [None; SECTORS]);
        }
        let known = |block: &usize| wanted[*block].iter().all(Option::is_some);
        let differs = |block: &usize| {
            let live = self.live(disk, *block);
            wanted[*block].iter().zip(live).any(|(wanted, live)| *wanted != Some(live))
        };
        // A hole stays as the target has it; the rollback is reported as incomplete.
        let batch: Vec<usize> = (0..BLOCKS).filter(known).filter(differs).take(room).collect();
        if batch.is_empty() {
            self.targets[disk].flush(&mut self.chaos)?;
            return self.end_epoch(disk, self.disks[disk].applied, None, Kind::Normal);
        }
        if self.keeps(Rule::RollbackCaptures) {
            self.capture_for_rollback(disk, &batch)?;
        }
        for block in batch {
            self.note(|| format!("disk {disk}: roll back block {block} to {:?}", wanted[block]));
            for (at, value) in wanted[block].iter().enumerate() {
                if let Some(value) = value {
                    self.targets[disk].write(block * SECTORS + at, *value);
                }
            }
            self.chaos.step()?;
        }
        self.targets[disk].flush(&mut self.chaos)
    }

    fn capture_for_rollback(&mut self, disk: usize, batch: &[usize]) -> Result<(), Stop> {
        for block in batch {
            if !self.disks[disk].captured.contains(block) {
                let image = Some(self.live(disk, *block));
                self.add_frame(disk, Frame { block: *block, image, covers: [true; SECTORS] })?;
            }
        }
        self.flush_run(disk)?;
        let frames = self.disks[disk].frames.len();
        if self.keeps(Rule::RollbackNamesFrames) && frames > self.catalogue.disks[disk].rollback_named {
            self.commit(Change::RollbackNamed { disk, frames })?;
        }
        Ok(())
    }
}
