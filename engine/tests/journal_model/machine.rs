//! The journal as a whole: what survives, what memory knows of it, and the apply protocol.
//!
//! Invariants: `received ≥ durable ≥ applied` per disk (I5); the order of steps in [`Journal::apply`] *is* the protocol.
//! Every `?` is a place where the machine may stop. Called by the driver in `play.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::device::{Chaos, Media, Stop};
use super::manifest::{Catalogue, Change, Edit, Kind};
use super::mutations::Rule;
use super::records::{
    Applied, BLOCKS, Block, Body, Entry, Frame, Group, Record, SECTORS, SEGMENT_GROUPS, Sequence,
};

/// An undo run: frames, and the index that sealing adds (the block of each frame).
pub(crate) struct RunFile {
    pub(crate) frames: Media<Frame>,
    pub(crate) index: Media<usize>,
}

impl RunFile {
    pub(crate) const fn new() -> Self {
        Self { frames: Media::file(), index: Media::file() }
    }
}

/// Where a record lies in the redo log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) slot: usize,
    pub(crate) at: usize,
    pub(crate) time: usize,
}

/// What memory knows of a disk; rebuilt by opening.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub(crate) places: BTreeMap<Sequence, Place>,
    pub(crate) marks: BTreeMap<usize, Sequence>,
    pub(crate) received: Sequence,
    pub(crate) durable: Sequence,
    pub(crate) applied: Sequence,
    /// Sequences up to `received` that cannot be read and were not given up.
    pub(crate) missing: BTreeSet<Sequence>,
    /// Of these, the ones the peer was asked for again.
    pub(crate) awaited: BTreeSet<Sequence>,
    /// Block of each frame of the active run; `None` where it cannot be told.
    pub(crate) frames: Vec<Option<usize>>,
    /// Blocks with a before-image, or a hole, in the active run.
    pub(crate) captured: BTreeSet<usize>,
    /// Until this sequence is applied, before-images of the active run may be missing.
    pub(crate) suspect_until: Sequence,
}

/// State of the redo log's writer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Writer {
    pub(crate) slot: usize,
    pub(crate) next_group: usize,
    pub(crate) in_flight: usize,
    pub(crate) durable_group: usize,
}

/// How corrupt groups came to light.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub(crate) by_later_groups: usize,
    pub(crate) by_manifest: usize,
    pub(crate) by_peer: usize,
    pub(crate) holes: usize,
}

pub(crate) struct Journal {
    pub(crate) chaos: Chaos,
    pub(crate) broken: Option<Rule>,
    pub(crate) trace: bool,
    pub(crate) now: usize,
    pub(crate) found: Found,

    // What survives.
    pub(crate) created: Vec<bool>,
    /// Blocks of each disk when it was found.
    pub(crate) found_blocks: Vec<usize>,
    pub(crate) targets: Vec<Media<u32>>,
    pub(crate) segments: Vec<Media<Group>>,
    pub(crate) manifest: Media<Edit>,
    pub(crate) runs: BTreeMap<usize, RunFile>,
    pub(crate) files_made: usize,

    // What memory knows.
    pub(crate) catalogue: Catalogue,
    pub(crate) edits: usize,
    pub(crate) disks: Vec<Disk>,
    pub(crate) writer: Writer,
    /// Marks that some disk passed without ending its epoch.
    pub(crate) passed: BTreeSet<usize>,
    /// Highest mark the source had placed when this opening resumed.
    pub(crate) opened_at_mark: usize,
    /// Blocks dropped from an active run by the last opening: `(disk, epoch, blocks)`.
    pub(crate) dropped: Vec<(usize, usize, Vec<usize>)>,
}

impl Journal {
    /// A fresh journal with nothing in it, not even a segment.
    pub(crate) fn new(
        chaos: Chaos,
        broken: Option<Rule>,
        trace: bool,
        targets: Vec<Vec<u32>>,
        created: Vec<bool>,
    ) -> Self {
        let disks = targets.len();
        Self {
            chaos,
            broken,
            trace,
            now: 0,
            found: Found::default(),
            targets: targets.into_iter().map(Media::disk).collect(),
            segments: Vec::new(),
            manifest: Media::file(),
            runs: (0..disks).map(|file| (file, RunFile::new())).collect(),
            files_made: disks,
            catalogue: Catalogue::new(&created),
            edits: 0,
            disks: vec![Disk::default(); disks],
            writer: Writer { slot: SEGMENT_GROUPS, next_group: 1, ..Writer::default() },
            passed: BTreeSet::new(),
            opened_at_mark: 0,
            dropped: Vec::new(),
            created,
            found_blocks: vec![BLOCKS; disks],
        }
    }

    pub(crate) fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:4}  {}", self.now, what());
        }
    }

    /// Adds an edit to the manifest and flushes it.
    pub(crate) fn commit(&mut self, change: Change) -> Result<(), Stop> {
        self.commit_lazily(change)?;
        self.manifest.flush(&mut self.chaos)
    }

    /// Adds an edit without waiting for it.
    pub(crate) fn commit_lazily(&mut self, change: Change) -> Result<(), Stop> {
        self.chaos.step()?;
        self.note(|| format!("manifest: {change:?}"));
        let edit = Edit { durable_group: self.writer.durable_group, change };
        self.manifest.write(self.edits, edit.clone());
        self.edits += 1;
        self.catalogue.add(&edit);
        Ok(())
    }

    pub(crate) fn new_file(&mut self) -> usize {
        let file = self.files_made;
        self.files_made += 1;
        self.runs.insert(file, RunFile::new());
        file
    }

    /// Reads a record back from the log; `None` if it is not there or fails its check.
    pub(crate) fn record(&self, disk: usize, sequence: Sequence) -> Option<&Record> {
        let place = self.disks[disk].places.get(&sequence)?;
        match self.segments[place.file].good(place.slot)?.entries.get(place.at)? {
            Entry::Record(record) if record.disk == disk && record.sequence == sequence => Some(record),
            _ => None,
        }
    }

    pub(crate) fn live(&self, disk: usize, block: usize) -> Block {
        std::array::from_fn(|at| self.targets[disk].good(block * SECTORS + at).copied().unwrap_or(u32::MAX))
    }

    /// The next records of one disk, all durable, readable and of one epoch; ends after a mark.
    fn window(&mut self, disk: usize) -> Result<Vec<Record>, Stop> {
        let (room, mut window) = (self.chaos.rng.between(1, 6), Vec::new());
        let known = &self.disks[disk];
        let first = known.applied + 1;
        for sequence in first..=known.durable {
            if window.len() == room {
                break;
            }
            if known.missing.contains(&sequence) {
                if self.keeps(Rule::WaitAtGap) {
                    break;
                }
                continue;
            }
            let unknown = !known.places.contains_key(&sequence) && !self.keeps(Rule::PeerGuard);
            if unknown || self.catalogue.disks[disk].is_given_up(sequence) {
                continue;
            }
            let record = self.record(disk, sequence).ok_or(Stop::Unreadable)?;
            let is_mark = matches!(record.body, Body::Mark { .. });
            window.push(record.clone());
            if is_mark && self.keeps(Rule::WindowInsideEpoch) {
                break;
            }
        }
        Ok(window)
    }

    /// Applies one window of a disk, or ends its epoch.
    pub(crate) fn apply(&mut self, disk: usize) -> Result<(), Stop> {
        if matches!(self.catalogue.disks[disk].kind(), Kind::Rollback(_)) {
            return Ok(());
        }
        if self.end_epoch_at_mark(disk)? {
            return Ok(());
        }
        let window = self.window(disk)?;
        let (Some(first), Some(last)) = (window.first(), window.last()) else { return self.pass_lost(disk) };
        let (first, last) = (first.sequence, last.sequence);
        self.note(|| format!("disk {disk}: window {first}..={last}"));
        self.pass_marks(disk, first - 1);
        let epoch = self.catalogue.disks[disk].epoch_of(first);
        let merged = self.merge_window(disk, &window);
        self.hole_what_lost_records_wrote(disk, last)?;

        // Always so, unless an epoch that ended is applied again; that is what `EndIsApplied` is for.
        let captures = epoch == self.catalogue.disks[disk].active();
        if captures && self.catalogue.disks[disk].kind() == Kind::Normal {
            self.capture(disk, first, &merged)?;
        }
        self.write_blocks(disk, &merged)?;
        if self.keeps(Rule::TargetBeforeApplied) {
            self.targets[disk].flush(&mut self.chaos)?; // barrier 2
        }
        self.disks[disk].applied = last;
        let (epoch, frames) = (self.catalogue.disks[disk].active(), self.disks[disk].frames.len());
        self.append(vec![Entry::Applied(Applied { disk, sequence: last, epoch, frames })])
    }

    /// Records that were given up at the end of what is durable are passed without a window.
    fn pass_lost(&mut self, disk: usize) -> Result<(), Stop> {
        let next = self.disks[disk].applied + 1;
        if next > self.disks[disk].durable || !self.catalogue.disks[disk].is_given_up(next) {
            return Ok(());
        }
        self.hole_what_lost_records_wrote(disk, next)?;
        self.disks[disk].applied = next;
        let (epoch, frames) = (self.catalogue.disks[disk].active(), self.disks[disk].frames.len());
        self.append(vec![Entry::Applied(Applied { disk, sequence: next, epoch, frames })])
    }

    /// The window's blocks as they shall be: sub-block writes merged into what the target holds. `bool`: sector written.
    fn merge_window(&self, disk: usize, window: &[Record]) -> BTreeMap<usize, [(u32, bool); SECTORS]> {
        let mut merged = BTreeMap::new();
        for (sector, value) in window.iter().flat_map(Record::writes) {
            let block = merged
                .entry(sector / SECTORS)
                .or_insert_with(|| self.live(disk, sector / SECTORS).map(|value| (value, false)));
            block[sector % SECTORS] = (value, true);
        }
        merged
    }

    /// Steps 2 and 3: before-images of the blocks that have none in this epoch, made durable.
    fn capture(
        &mut self,
        disk: usize,
        before: Sequence,
        merged: &BTreeMap<usize, [(u32, bool); SECTORS]>,
    ) -> Result<(), Stop> {
        for (block, sectors) in merged {
            if self.disks[disk].captured.contains(block) && self.keeps(Rule::FirstTouchWins) {
                continue;
            }
            let image = self.before_image(disk, *block, before, Some(sectors));
            let whole = self.keeps(Rule::WholeBlocks);
            let covers = std::array::from_fn(|at| whole || sectors[at].1);
            self.add_frame(disk, Frame { block: *block, image, covers })?;
        }
        if self.keeps(Rule::UndoBeforeTarget) {
            self.flush_run(disk)?; // barrier 1
        }
        Ok(())
    }

    /// Step 4: in any order, each sector on its own.
    fn write_blocks(
        &mut self,
        disk: usize,
        merged: &BTreeMap<usize, [(u32, bool); SECTORS]>,
    ) -> Result<(), Stop> {
        for (block, sectors) in merged {
            for (at, (value, _)) in sectors.iter().enumerate() {
                self.targets[disk].write(block * SECTORS + at, *value);
            }
            self.chaos.step()?;
        }
        Ok(())
    }

    /// Marks at or before `sequence` are passed now: records after them are about to be written.
    fn pass_marks(&mut self, disk: usize, sequence: Sequence) {
        let marks = self.disks[disk].marks.iter().filter(|mark| *mark.1 <= sequence).map(|mark| *mark.0);
        self.passed.extend(marks.collect::<Vec<_>>());
    }

    /// If the disk stands at a mark that ends its epoch: seals the run and opens the next epoch.
    fn end_epoch_at_mark(&mut self, disk: usize) -> Result<bool, Stop> {
        let (mut at, catalogue) = (self.disks[disk].applied, &self.catalogue.disks[disk]);
        if !self.keeps(Rule::WindowInsideEpoch) {
            // The window ran over the mark: its epoch ends behind what was written.
            at = self.disks[disk].marks.values().copied().filter(|mark| *mark <= at).max().unwrap_or(0);
        }
        if at < catalogue.epochs[catalogue.active()].first {
            return Ok(false);
        }
        let (mark, state) = match self.record(disk, at).map(|record| &record.body) {
            Some(Body::Mark { mark, state }) => (*mark, *state),
            Some(Body::Write { .. }) => return Ok(false),
            // It may be the mark that was decided on; if it comes again, it must find its epoch here.
            None if self.disks[disk].awaited.contains(&at) => return Ok(self.keeps(Rule::WaitForLastApplied)),
            None if self.disks[disk].places.contains_key(&at) && self.keeps(Rule::WaitForLastApplied) => {
                return Err(Stop::Unreadable);
            }
            None => return Ok(false),
        };
        // The bypass ends only at a mark after the last bulk block: the first state there is.
        if catalogue.kind() == Kind::Bypass && !(state && catalogue.bulk_done.len() == BLOCKS) {
            return Ok(false);
        }
        if !self.catalogue.decided.contains(&mark) {
            let passed = self.passed.contains(&mark) && self.keeps(Rule::PassedMarkStays);
            let replayed = mark <= self.opened_at_mark && self.keeps(Rule::NoNewEndOnReplay);
            if passed || replayed || self.chaos.rng.chance(400) {
                return Ok(false);
            }
            self.commit(Change::Decide { mark })?;
        }
        self.end_epoch(disk, at, Some(mark), Kind::Normal)?;
        Ok(true)
    }

    /// Ends the active epoch after `last`, which is what is applied: seals its run, then the edit.
    pub(crate) fn end_epoch(
        &mut self,
        disk: usize,
        last: Sequence,
        mark: Option<usize>,
        next: Kind,
    ) -> Result<(), Stop> {
        self.seal(disk)?;
        let file = self.new_file();
        let change = Change::Close { disk, last, mark, next, file };
        if self.keeps(Rule::EpochEditFirst) {
            self.commit(change)?;
        } else {
            self.commit_lazily(change)?;
        }
        let known = &mut self.disks[disk];
        (known.frames, known.captured) = (Vec::new(), BTreeSet::new());
        known.suspect_until = 0;
        Ok(())
    }
}
