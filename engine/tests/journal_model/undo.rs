//! Undo runs: where a before-image comes from, sealing, reading one back, and the choice between image and hole.
//!
//! Invariants: the first frame of a block in a run is its before-image; a frame that fails its check, or that says so
//! itself, is a hole. Called by the apply worker, views, thinning and rollback.

use super::device::{Slot, Stop};
use super::machine::Journal;
use super::manifest::{Kind, Run};
use super::mutations::Rule;
use super::records::{Block, Frame, SECTORS, Sequence};

/// What a run says of a block.
pub(crate) enum Image {
    Known(Frame),
    Hole,
}

impl Journal {
    pub(crate) fn add_frame(&mut self, disk: usize, frame: Frame) -> Result<(), Stop> {
        self.chaos.step()?;
        let Some(run) = self.catalogue.disks[disk].active_run() else { return Ok(()) };
        let known = &mut self.disks[disk];
        let at = known.frames.len();
        known.frames.push(Some(frame.block));
        known.captured.insert(frame.block);
        self.note(|| format!("disk {disk}: epoch {} frame {at}: {frame:?}", run.low));
        self.runs.entry(run.file).or_insert_with(super::machine::RunFile::new).frames.write(at, frame);
        Ok(())
    }

    pub(crate) fn flush_run(&mut self, disk: usize) -> Result<(), Stop> {
        let Some(run) = self.catalogue.disks[disk].active_run() else { return Ok(()) };
        match self.runs.get_mut(&run.file) {
            Some(file) => file.frames.flush(&mut self.chaos),
            None => Ok(()),
        }
    }

    /// Writes the index of the active run and flushes both.
    pub(crate) fn seal(&mut self, disk: usize) -> Result<(), Stop> {
        let Some(run) = self.catalogue.disks[disk].active_run() else { return Ok(()) };
        let Some(file) = self.runs.get_mut(&run.file) else { return Ok(()) };
        for (at, block) in self.disks[disk].frames.iter().enumerate() {
            if let Some(block) = block {
                file.index.write(at, *block);
            }
        }
        file.frames.flush(&mut self.chaos)?;
        file.index.flush(&mut self.chaos)
    }

    /// What an uncaptured block held before the record `before`, as far as that can be known; `None` is a hole.
    /// `wanted` is what a window is about to write.
    pub(crate) fn before_image(
        &self,
        disk: usize,
        block: usize,
        before: Sequence,
        wanted: Option<&[(u32, bool); SECTORS]>,
    ) -> Option<Block> {
        // A version from the redo log is right even where the target was overwritten already.
        if let Some(image) = self.redo_version(disk, block, before) {
            return Some(image);
        }
        let live = self.live(disk, block);
        (!self.is_suspect(disk, block, &live, wanted)).then_some(live)
    }

    /// The block as the records before `before` left it, if they alone tell all its sectors.
    fn redo_version(&self, disk: usize, block: usize, before: Sequence) -> Option<Block> {
        let catalogue = &self.catalogue.disks[disk];
        let since = |kind: &Kind| match kind {
            Kind::Rollback(_) => self.keeps(Rule::RedoImageNotAcrossRollback),
            Kind::Bypass => true,
            Kind::Normal => false,
        };
        let excluded =
            catalogue.epochs.iter().filter(|epoch| since(&epoch.kind)).filter_map(|epoch| epoch.last);
        let from = excluded.max().unwrap_or(0).max(catalogue.freed) + 1;
        let mut seen = [None; SECTORS];
        for sequence in from..before {
            let Some(record) = self.record(disk, sequence) else {
                if self.keeps(Rule::RedoImageNotAcrossGap) {
                    seen = [None; SECTORS];
                }
                continue;
            };
            for (sector, value) in record.writes().filter(|write| write.0 / SECTORS == block) {
                seen[sector % SECTORS] = Some(value);
            }
        }
        let mut image = [0; SECTORS];
        for (image, seen) in image.iter_mut().zip(seen) {
            *image = seen?;
        }
        Some(image)
    }

    /// Whether the block may carry a write whose before-image was cut off.
    fn is_suspect(
        &self,
        disk: usize,
        block: usize,
        live: &Block,
        wanted: Option<&[(u32, bool); SECTORS]>,
    ) -> bool {
        let known = &self.disks[disk];
        if known.applied >= known.suspect_until || !self.keeps(Rule::WrittenUncapturedIsHole) {
            return false;
        }
        if !self.keeps(Rule::CompareEveryRecord) {
            return wanted
                .is_some_and(|wanted| wanted.iter().zip(live).all(|(wanted, live)| wanted.0 == *live));
        }
        let first = self.catalogue.disks[disk].epochs[self.catalogue.disks[disk].active()].first;
        let unapplied = first.max(known.applied + 1)..=known.suspect_until;
        // A record that cannot be read may have been the one.
        unapplied.into_iter().any(|sequence| {
            self.record(disk, sequence).is_none_or(|record| {
                record.writes().any(|write| write.0 / SECTORS == block && live[write.0 % SECTORS] == write.1)
            })
        })
    }

    /// Blocks of a run's frames, in the order of the frames.
    pub(crate) fn blocks_of(&self, disk: usize, run: Run) -> Vec<Option<usize>> {
        if self.catalogue.disks[disk].active_run().is_some_and(|active| active.file == run.file) {
            return self.disks[disk].frames.clone();
        }
        let Some(file) = self.runs.get(&run.file) else { return Vec::new() };
        (0..file.index.len()).map(|at| file.index.good(at).copied()).collect()
    }

    /// What a run says of a block; nothing if the block was not touched in its epochs.
    pub(crate) fn image(&self, disk: usize, run: Run, block: usize) -> Option<Image> {
        let blocks = self.blocks_of(disk, run);
        let mut found =
            blocks.iter().enumerate().filter(|entry| *entry.1 == Some(block)).map(|entry| entry.0);
        let at = if self.keeps(Rule::FirstTouchWins) { found.next() } else { found.next_back() };
        match self.runs.get(&run.file)?.frames.read(at?) {
            Slot::Good(frame) if frame.block == block && frame.image.is_some() => {
                Some(Image::Known(frame.clone()))
            }
            _ if self.keeps(Rule::BadImageIsHole) => Some(Image::Hole),
            _ => None,
        }
    }
}
