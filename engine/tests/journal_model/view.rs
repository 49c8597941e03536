//! A disk as of a point.
//!
//! Invariant: base of a block is the earliest run at or after the point's epoch that has the block, else the target;
//! over it lie the records of that epoch up to the point. What cannot be known is a hole,
//! sector by sector; guessed data is never served. Called by the oracle, rollback and nothing else.

use std::collections::BTreeSet;

use super::machine::Journal;
use super::mutations::Rule;
use super::records::{At, BLOCKS, Block, SECTORS, Seen, Sequence};
use super::undo::Image;

impl Journal {
    /// The disk as of a point, in the size that it had.
    pub(crate) fn view(&self, disk: usize, at: At) -> Vec<Seen> {
        let mut seen = self.view_of_all(disk, at);
        let keeps = self.keeps(Rule::PointsKeepTheirSize);
        seen.truncate(if keeps { self.size_at(disk, at.upto) } else { self.size(disk) });
        seen
    }

    /// Also what is behind the end that it had: what stood there before the first write.
    pub(crate) fn view_of_all(&self, disk: usize, at: At) -> Vec<Seen> {
        let mut seen: Vec<Seen> = (0..BLOCKS).map(|block| self.base(disk, at.base, block)).collect();
        for sequence in self.overlay_from(disk, at)..=at.upto {
            let Some(record) = self.record(disk, sequence) else {
                if self.keeps(Rule::GapIsHole) {
                    for block in self.may_have_written(disk, sequence) {
                        seen[block] = [None; SECTORS];
                    }
                }
                continue;
            };
            for (sector, value) in record.writes() {
                seen[sector / SECTORS][sector % SECTORS] = Some(value);
            }
        }
        seen
    }

    fn base(&self, disk: usize, base: usize, block: usize) -> Seen {
        let mut seen = [None; SECTORS];
        let mut open = [true; SECTORS];
        let own = usize::from(!self.keeps(Rule::BaseFromOwnEpoch));
        let runs = self.catalogue.disks[disk].runs.iter().filter(|run| run.low >= base + own);
        for run in runs {
            match self.image(disk, *run, block) {
                None => continue,
                Some(Image::Hole) => return seen,
                Some(Image::Known(frame)) => {
                    for at in (0..SECTORS).filter(|at| frame.covers[*at]) {
                        if std::mem::take(&mut open[at]) {
                            seen[at] = frame.image.map(|image| image[at]);
                        }
                    }
                }
            }
            if frame_is_whole(&open) {
                return seen;
            }
        }
        let live = self.uncaptured(disk, base, block);
        for at in (0..SECTORS).filter(|at| open[*at]) {
            seen[at] = live.map(|live| live[at]);
        }
        seen
    }

    /// A block that no run since `base` has: the target's, unless it may have been written by a window that was cut.
    fn uncaptured(&self, disk: usize, base: usize, block: usize) -> Option<Block> {
        let known = &self.disks[disk];
        let suspect = known.applied < known.suspect_until && base <= self.catalogue.disks[disk].active();
        if suspect && self.keeps(Rule::ViewsSeeSuspects) {
            self.before_image(disk, block, known.applied + 1, None)
        } else {
            Some(self.live(disk, block))
        }
    }

    /// First record that lies over the base. What is not applied yet belongs to the active epoch.
    fn overlay_from(&self, disk: usize, at: At) -> Sequence {
        self.catalogue.disks[disk].epochs.get(at.base).map_or(at.upto + 1, |epoch| epoch.first)
    }

    /// Blocks that an unreadable record may have written: those its epoch captured, once it is applied.
    fn may_have_written(&self, disk: usize, sequence: Sequence) -> BTreeSet<usize> {
        let catalogue = &self.catalogue.disks[disk];
        let epoch = catalogue.epoch_of(sequence);
        let run = catalogue.runs.iter().find(|run| run.low <= epoch && epoch <= run.high);
        match run {
            Some(run) if sequence <= self.disks[disk].applied => {
                self.blocks_of(disk, *run).into_iter().flatten().collect()
            }
            _ => (0..BLOCKS).collect(),
        }
    }
}

fn frame_is_whole(open: &[bool; SECTORS]) -> bool {
    open.iter().all(|open| !open)
}
