//! Disks that grow: the size of a point, and the step in which a target becomes larger.
//!
//! Invariants: everything is applied and the epoch is ended before the manifest says the new size; a point has the size its
//! disk had behind its last record; behind the old end stood nothing (zeros). Units: blocks. Called by the driver, and by
//! views.

use super::device::Stop;
use super::machine::Journal;
use super::manifest::{Change, Kind};
use super::play::Player;
use super::records::{BLOCKS, SECTORS, Sequence};

/// Blocks of a disk that will grow.
pub(crate) const SMALL: usize = BLOCKS - 1;

impl Journal {
    /// Blocks of a disk behind a record.
    pub(crate) fn size_at(&self, disk: usize, sequence: Sequence) -> usize {
        let grown = self.catalogue.disks[disk].grown.iter().rev().find(|grown| grown.0 < sequence);
        grown.map_or(self.found_blocks[disk], |grown| grown.1)
    }

    pub(crate) fn size(&self, disk: usize) -> usize {
        self.catalogue.disks[disk].grown.last().map_or(self.found_blocks[disk], |grown| grown.1)
    }

    /// The target of a disk on which nothing waits becomes larger.
    fn grow(&mut self, disk: usize) -> Result<(), Stop> {
        let (after, mark) = (self.disks[disk].applied, self.mark_here(disk));
        self.end_epoch(disk, after, mark, Kind::Normal)?;
        self.commit(Change::Grow { disk, after, blocks: BLOCKS })
    }
}

impl Player {
    /// A source disk was enlarged, and its target follows.
    pub(crate) fn grow(&mut self, disk: usize) -> Result<(), Stop> {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let rolling = self.rollback.as_ref().is_some_and(|rollback| rollback.disk == disk);
        let waits = known.applied < known.received || !known.missing.is_empty();
        let is_normal = self.journal.catalogue.disks[disk].kind() == Kind::Normal;
        if self.journal.size(disk) == BLOCKS || own.suspended || own.bulk || rolling || waits || !is_normal {
            return Ok(());
        }
        self.journal.grow(disk)?;
        self.grow_with_target();
        Ok(())
    }

    /// What the source writes behind the old end is taken once the manifest says the new size.
    pub(crate) fn grow_with_target(&mut self) {
        for disk in 0..self.source.disks.len() {
            let own = &mut self.source.disks[disk];
            if let Some((after, _)) = self.journal.catalogue.disks[disk].grown.last()
                && own.now.len() < BLOCKS * SECTORS
            {
                own.now.resize(BLOCKS * SECTORS, 0);
                self.oracle.grows(disk, *after);
                self.report.grown += 1;
            }
        }
    }
}
