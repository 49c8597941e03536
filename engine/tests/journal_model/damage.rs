//! Damage known of points: what a reading of the runs found, and which points need it.
//!
//! Invariants: a point that is made from an image that was found damaged is known to be, durably, until the run is gone; one
//! that has an older image of the block is not. A merge hands on what points outside the merged run need. Called by the
//! driver.

use super::device::Stop;
use super::machine::Journal;
use super::manifest::{Change, DiskCatalogue, Edit};
use super::mutations::Rule;
use super::records::At;
use super::undo::Image;

/// An image that cannot be read: the run's epochs, its block, and from which base on points need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Damaged {
    pub(crate) low: usize,
    pub(crate) high: usize,
    pub(crate) block: usize,
    pub(crate) since: usize,
}

impl DiskCatalogue {
    /// Whether something that a point is made from is known to be damaged.
    pub(crate) fn is_damaged(&self, at: At) -> bool {
        self.damaged.iter().any(|damaged| damaged.since <= at.base && at.base <= damaged.high)
    }

    /// Two runs became one.
    pub(crate) fn merge_damaged(&mut self, low: usize, high: usize, hands_on: bool) {
        let inside = |damaged: &Damaged| damaged.low >= low && damaged.high <= high;
        self.damaged.retain(|damaged| !inside(damaged) || (damaged.since <= low && hands_on));
        for damaged in self.damaged.iter_mut().filter(|damaged| inside(damaged)) {
            (damaged.low, damaged.high) = (low, high);
        }
    }
}

impl Journal {
    /// Reads all runs of a disk, and writes down what is damaged in them.
    pub(crate) fn scrub(&mut self, disk: usize) -> Result<(), Stop> {
        let runs = self.catalogue.disks[disk].runs.clone();
        for (at, run) in runs.iter().enumerate() {
            let mut blocks: Vec<usize> = self.blocks_of(disk, *run).into_iter().flatten().collect();
            blocks.sort_unstable();
            blocks.dedup();
            for block in blocks {
                if !matches!(self.image(disk, *run, block), Some(Image::Hole)) {
                    continue;
                }
                let older = runs[..at].iter().rev().find(|older| self.image(disk, **older, block).is_some());
                let since =
                    older.filter(|_| self.keeps(Rule::OlderImagesHide)).map_or(0, |older| older.low + 1);
                let found = Damaged { low: run.low, high: run.high, block, since };
                if !self.catalogue.disks[disk].damaged.contains(&found) {
                    self.note_damaged(disk, found)?;
                }
            }
        }
        Ok(())
    }

    fn note_damaged(&mut self, disk: usize, found: Damaged) -> Result<(), Stop> {
        let change = Change::Damaged { disk, found };
        if self.keeps(Rule::DamageIsWritten) {
            return self.commit(change);
        }
        self.catalogue.add(&Edit { durable_group: 0, change });
        Ok(())
    }
}
