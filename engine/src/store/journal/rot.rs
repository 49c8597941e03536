//! What cannot be read of the journal's past, as durable knowledge: which points need it, and when it is forgotten.
//!
//! A before-image is needed by every point that is made from its run or an older one, unless an older run has an image of
//! the same block: then by those behind that run only. An entry that is applied is needed by the points behind it inside its
//! undo epoch. The newest state needs neither.
//!
//! Invariants: damage is in the manifest before anybody is told that a point is whole; it goes with its run or segment,
//! and where a later reading finds the bytes sound; told twice is told once. A merge hands it on: what is lost stays lost for
//! the points that are left. Units: blocks, epochs, entry numbers. Called by the master target's threads; `points` asks.

use std::fmt;
use std::path::Path;

use super::applier::{identity, run_of_name, run_path};
use super::error::JournalError;
use super::log::segment_path;
use super::scrub::{EntryPlace, RunPlace};
use super::shape::{DiskShape, Run, RunFile};
use super::tolerant::is_of_medium;
use super::undo::{BlockRange, Hole, SealedRun, UndoError};
use super::view::At;
use super::{Journal, LogEntry};
use crate::format::manifest::{Edit, EntryDamaged, EntrySound, ImagesDamaged, ImagesSound, RunsMerged};
use crate::format::wire::Text;
use crate::io::BlockError;
use crate::store::files::{Files, FilesError};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, DiskId, Timestamp};

/// Damaged ranges that are told apart in one run; more are taken for one, from the first to the last.
const RANGES_MAX: usize = 256;

/// What a point lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rot {
    /// Bytes of the disk whose images cannot be read; zero where an entry of the log is damaged.
    pub bytes: u64,
    /// The entry of the log, where it is one.
    pub entry: Option<u64>,
    /// What was found.
    pub cause: Text<120>,
}

impl fmt::Display for Rot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cause = self.cause.as_str();
        match self.entry {
            Some(number) => {
                write!(f, "entry {number} of the redo log, which it is made from, is damaged: {cause}")
            }
            None => write!(f, "before-images of up to {} KiB of it are damaged: {cause}", self.bytes >> 10),
        }
    }
}

/// What a reading found damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Blocks whose images cannot be had.
    pub blocks: BlockRange,
    /// What is wrong.
    pub cause: String,
}

impl Found {
    /// What a hole takes.
    #[must_use]
    pub fn of_holes(holes: &[Hole]) -> Vec<Self> {
        let found = |hole: &Hole| {
            let cause = hole.reason.to_string();
            hole.lost.iter().map(|blocks| Self { blocks: *blocks, cause: cause.clone() }).collect::<Vec<_>>()
        };
        holes.iter().flat_map(found).collect()
    }
}

impl DiskShape {
    /// All blocks of the disk as large as it is now: what is lost where nobody can say which part.
    #[must_use]
    pub fn whole(&self) -> BlockRange {
        BlockRange::new(0, self.size_sectors().div_ceil(BLOCK_SECTORS))
    }

    /// What is damaged of that which a point is made from; `None` for one that is whole as far as is known.
    #[must_use]
    pub fn rot(&self, at: At) -> Option<Rot> {
        // Asked of every point of every disk; hardly ever is there anything.
        if self.damaged.is_empty() && self.damaged_entries.is_empty() {
            return None;
        }
        self.rot_of_entry(at).or_else(|| self.rot_of_images(at))
    }

    fn rot_of_images(&self, at: At) -> Option<Rot> {
        let from = self.runs_from(at.epoch, at.number).filter(|_| at.records == 0).unwrap_or(at.epoch);
        let needs = |damaged: &&ImagesDamaged| (damaged.since..=damaged.last).contains(&from);
        let first = self.damaged.iter().find(needs)?;
        let blocks: u64 = self.damaged.iter().filter(needs).map(|damaged| damaged.end - damaged.start).sum();
        Some(Rot { bytes: blocks.saturating_mul(BLOCK_BYTES), entry: None, cause: first.cause })
    }

    fn rot_of_entry(&self, at: At) -> Option<Rot> {
        let epoch = self.epochs.iter().find(|epoch| epoch.opened.epoch == at.epoch)?;
        let at_end = at.records == 0 && epoch.closed.is_some_and(|closed| closed.last == at.number);
        let last = at.through();
        let needs =
            |entry: &&EntryDamaged| entry.number > epoch.opened.after && entry.number <= last && !at_end;
        let damaged = self.damaged_entries.iter().find(needs)?;
        Some(Rot { bytes: 0, entry: Some(damaged.number), cause: damaged.cause })
    }

    /// Whether it is known that an entry, or one before it in its undo epoch, cannot be read: of several the first says it all.
    #[must_use]
    pub fn is_log_damaged(&self, number: u64) -> bool {
        self.epoch_of(number).is_some_and(|epoch| {
            let is_before =
                |entry: &EntryDamaged| entry.number > epoch.opened.after && entry.number <= number;
            self.damaged_entries.iter().any(is_before)
        })
    }

    /// Whether an applied entry is known to be damaged.
    #[must_use]
    pub fn is_entry_damaged(&self, number: u64) -> bool {
        self.damaged_entries.iter().any(|entry| entry.number == number)
    }

    /// The run of these epochs, also where it is still written.
    fn has_run_of(&self, first: u64, last: u64) -> bool {
        let open = self.open_epoch().is_some_and(|epoch| epoch.opened.epoch == first && first == last);
        open || self.runs.iter().any(|run| (run.first, run.last) == (first, last))
    }

    pub(super) fn note_damaged(&mut self, damaged: &ImagesDamaged) -> Result<(), String> {
        let ImagesDamaged { first, last, start, end, .. } = *damaged;
        if start >= end || !self.has_run_of(first, last) {
            return Err(format!(
                "blocks {start} to {end} are damaged in epochs {first} to {last}, which have no such run"
            ));
        }
        if !self.damaged.iter().any(|known| covers(known, damaged)) {
            self.damaged.retain(|known| !covers(damaged, known));
            self.damaged.push(*damaged);
        }
        Ok(())
    }

    pub(super) fn note_sound(&mut self, sound: &ImagesSound) -> Result<(), String> {
        if sound.start > sound.end {
            return Err(format!("blocks {} to {} are sound and are none", sound.start, sound.end));
        }
        let mut left = Vec::new();
        for damaged in self.damaged.drain(..) {
            if (damaged.first, damaged.last) != (sound.first, sound.last) {
                left.push(damaged);
                continue;
            }
            let before = ImagesDamaged { end: damaged.end.min(sound.start), ..damaged };
            let behind = ImagesDamaged { start: damaged.start.max(sound.end), ..damaged };
            left.extend([before, behind].into_iter().filter(|part| part.start < part.end));
        }
        self.damaged = left;
        Ok(())
    }

    pub(super) fn note_entry_damaged(&mut self, damaged: &EntryDamaged) {
        let at = self.damaged_entries.partition_point(|known| known.number < damaged.number);
        match self.damaged_entries.get_mut(at).filter(|known| known.number == damaged.number) {
            Some(known) => *known = *damaged,
            None => self.damaged_entries.insert(at, *damaged),
        }
    }

    /// Runs became one. What only points between them needed is not needed any more: the older image won.
    pub(super) fn merge_damaged(&mut self, merged: &RunsMerged) {
        let inside = |damaged: &ImagesDamaged| damaged.first >= merged.first && damaged.last <= merged.last;
        self.damaged.retain(|damaged| !inside(damaged) || damaged.since <= merged.first);
        for damaged in self.damaged.iter_mut().filter(|damaged| inside(damaged)) {
            (damaged.first, damaged.last) = (merged.first, merged.last);
        }
    }
}

/// Whether one says all that another does.
fn covers(one: &ImagesDamaged, other: &ImagesDamaged) -> bool {
    (one.first, one.last) == (other.first, other.last)
        && one.since <= other.since
        && one.start <= other.start
        && one.end >= other.end
}

impl Journal {
    /// Where a run of a disk lies.
    ///
    /// # Errors
    /// When the journal contradicts itself.
    pub fn run_place(&self, disk: DiskId, run: Run) -> Result<RunPlace, JournalError> {
        let (path, identity) = (run_path(self, disk, run.file), identity(self, disk, &run)?);
        Ok(RunPlace { disk, run, path, identity })
    }

    /// Where the run of the undo epoch that goes on lies.
    ///
    /// # Errors
    /// When the journal contradicts itself.
    pub fn open_run_place(&self, disk: DiskId) -> Result<Option<RunPlace>, JournalError> {
        let open = self.shape().disks.get(&disk).and_then(DiskShape::open_epoch);
        let run = |number| Run { first: number, last: number, file: RunFile::Epoch(number), bytes: 0 };
        open.map(|epoch| self.run_place(disk, run(epoch.opened.epoch))).transpose()
    }

    /// The sealed runs before one of the same disk, the newest first.
    ///
    /// # Errors
    /// When the journal contradicts itself.
    pub fn older_runs(&self, place: &RunPlace) -> Result<Vec<RunPlace>, JournalError> {
        let runs = self.shape().disks.get(&place.disk).map_or(&[][..], |shape| shape.runs.as_slice());
        let older = runs.iter().rev().filter(|run| run.last < place.run.first);
        older.map(|run| self.run_place(place.disk, *run)).collect()
    }

    /// The run that an error tells of, and what it says is damaged there; `asked` is what was to be read. `None` where the
    /// error is no damage of a run.
    #[must_use]
    pub fn run_of_error(
        &self,
        disk: DiskId,
        error: &JournalError,
        asked: BlockRange,
    ) -> Option<(RunPlace, Found)> {
        let whole = self.shape().disks.get(&disk)?.whole();
        let (path, blocks) = match error {
            JournalError::Undo(
                UndoError::Damaged { path, blocks, .. } | UndoError::Lost { path, blocks, .. },
            ) => (path.as_path(), *blocks),
            JournalError::Undo(UndoError::Header { path, .. } | UndoError::Foreign { path, .. })
            | JournalError::Undo(UndoError::Files(FilesError::Missing { path }))
            | JournalError::Files(FilesError::Missing { path }) => (path.as_path(), whole),
            JournalError::Undo(UndoError::Block(error) | UndoError::Files(FilesError::Block(error)))
                if is_of_medium(error) =>
            {
                (Path::new(&error.name), asked)
            }
            _ => return None,
        };
        let (of, file) = run_of_name(&path.file_name()?.to_string_lossy())?;
        let blocks = BlockRange { start: blocks.start.min(whole.end), end: blocks.end.min(whole.end) };
        let known = self.shape().disks.get(&disk).filter(|_| of == disk)?;
        let place = match known.runs.iter().find(|run| run.file == file) {
            Some(run) => self.run_place(disk, *run).ok()?,
            None => self.open_run_place(disk).ok()?.filter(|place| place.run.file == file)?,
        };
        Some((place, Found { blocks, cause: error.to_string() }))
    }

    /// The applied entry that an error of reading the log tells of.
    #[must_use]
    pub fn entry_of_error(&self, disk: DiskId, error: &JournalError) -> Option<EntryPlace> {
        let (path, offset) = match error {
            JournalError::Format { path, offset, .. } => (path.as_path(), *offset),
            JournalError::Block(BlockError { name, offset, .. }) => (Path::new(name), *offset),
            _ => return None,
        };
        let is_it = |entry: &&LogEntry| {
            let segment = self.shape().segments.get(&entry.place.segment);
            (entry.place.offset..entry.place.offset + entry.place.bytes).contains(&offset)
                && segment.is_some_and(|segment| segment_path(self.folder(), segment.slot) == path)
        };
        let entry = self.applied(disk).iter().find(is_it)?;
        Some(EntryPlace { disk, number: entry.number, path: path.to_owned(), place: entry.place })
    }

    /// Records what a reading of a run found. `whole`: all of it was read, so what was damaged and is not among this is
    /// sound. Answers whether anything is new. `reach` is what [`reach`] said of the same.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn note_run(
        &mut self,
        place: &RunPlace,
        reach: &[(u64, Found)],
        whole: bool,
        now: Timestamp,
    ) -> Result<bool, JournalError> {
        if !self.is_run(place) {
            return Ok(false);
        }
        let (disk, first, last) = (place.disk, place.run.first, place.run.last);
        let Some(shape) = self.shape().disks.get(&disk) else { return Ok(false) };
        let damaged = |since: u64, blocks: BlockRange, cause: &str| {
            let (start, end, cause) = (blocks.start, blocks.end, Text::new(cause));
            ImagesDamaged { disk, first, last, start, end, since, time: now, cause }
        };
        let mut found: Vec<ImagesDamaged> = reach
            .iter()
            .filter(|(_, found)| !found.blocks.is_empty())
            .map(|(since, found)| damaged(*since, found.blocks, &found.cause))
            .collect();
        let mut edits = Vec::new();
        let ours: Vec<ImagesDamaged> = shape
            .damaged
            .iter()
            .filter(|known| (known.first, known.last) == (first, last))
            .copied()
            .collect();
        if whole {
            edits = sound(&ours, &found);
        }
        found.retain(|found| !ours.iter().any(|known| covers(known, found)));
        if found.len() + ours.len() > RANGES_MAX {
            found = joined(&found, &ours).into_iter().collect();
            edits.clear();
        }
        let is_new = !found.is_empty();
        // What is damaged comes first: a crash in between leaves too much said, not too little.
        edits.splice(0..0, found.into_iter().map(Edit::ImagesDamaged));
        if !edits.is_empty() {
            self.edit(&edits, now)?;
        }
        Ok(is_new)
    }

    /// Whether a run still is part of the journal, of the same epochs and under its file's name. Its length may have become
    /// known meanwhile.
    fn is_run(&self, place: &RunPlace) -> bool {
        let Some(shape) = self.shape().disks.get(&place.disk) else { return false };
        let open = shape.open_epoch().map(|epoch| epoch.opened.epoch);
        let open = open.map(|epoch| (epoch, epoch, RunFile::Epoch(epoch)));
        let identity = |run: &Run| (run.first, run.last, run.file);
        shape.runs.iter().map(identity).chain(open).any(|run| run == identity(&place.run))
    }

    /// Records whether an applied entry can be read; of several of one undo epoch the first says it all. Answers whether
    /// that is new.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn note_entry(
        &mut self,
        place: &EntryPlace,
        damage: Option<&str>,
        now: Timestamp,
    ) -> Result<bool, JournalError> {
        let (disk, number, segment) = (place.disk, place.number, place.place.segment);
        let Some(shape) = self.shape().disks.get(&disk) else { return Ok(false) };
        let known = shape.is_entry_damaged(number);
        let edit = match damage {
            None if known => Edit::EntrySound(EntrySound { disk, number }),
            Some(cause) if !known && self.has_segment(segment) => {
                let Some(epoch) = shape.epoch_of(number) else { return Ok(false) };
                let after = epoch.opened.after;
                if shape.damaged_entries.iter().any(|known| known.number > after && known.number < number) {
                    return Ok(false);
                }
                let cause = Text::new(cause);
                Edit::EntryDamaged(EntryDamaged { disk, number, segment, time: now, cause })
            }
            _ => return Ok(false),
        };
        self.edit(&[edit], now)?;
        Ok(damage.is_some())
    }
}

/// What was damaged and is not any more.
fn sound(known: &[ImagesDamaged], found: &[ImagesDamaged]) -> Vec<Edit> {
    let mut edits = Vec::new();
    for ImagesDamaged { disk, first, last, start, end, .. } in known.iter().copied() {
        let mut holes: Vec<(u64, u64)> = found.iter().map(|found| (found.start, found.end)).collect();
        holes.sort_unstable();
        let mut at = start;
        for (from, to) in holes.into_iter().chain([(end, end)]) {
            let until = from.min(end);
            if at < until {
                edits.push(Edit::ImagesSound(ImagesSound { disk, first, last, start: at, end: until }));
            }
            at = at.max(to);
        }
    }
    edits
}

/// One that says all that these do.
fn joined(found: &[ImagesDamaged], known: &[ImagesDamaged]) -> Option<ImagesDamaged> {
    let all = || found.iter().chain(known);
    let (since, start) = (all().map(|one| one.since).min()?, all().map(|one| one.start).min()?);
    let end = all().map(|one| one.end).max()?;
    found.first().map(|first| ImagesDamaged { since, start, end, ..*first })
}

/// From which epoch on points need what was found: `older` are the runs before, the newest first. One of these that cannot
/// be read counts as having no image.
#[must_use]
pub fn reach(files: &dyn Files, older: &[RunPlace], found: Vec<Found>) -> Vec<(u64, Found)> {
    let mut reached = Vec::new();
    let mut left = found;
    for place in older {
        if left.is_empty() {
            break;
        }
        let Ok(mut run) = SealedRun::open(files, &place.path, &place.identity) else { continue };
        let mut next = Vec::new();
        for Found { blocks, cause } in left {
            let images = run.lookup(blocks).unwrap_or_default();
            let mut at = blocks.start;
            for image in images.iter().map(|found| found.blocks) {
                let part = |start, end| Found { blocks: BlockRange::new(start, end), cause: cause.clone() };
                if at < image.start {
                    next.push(part(at, image.start));
                }
                reached.push((place.run.first + 1, part(image.start, image.end)));
                at = image.end;
            }
            if at < blocks.end {
                next.push(Found { blocks: BlockRange::new(at, blocks.end), cause });
            }
        }
        left = next;
    }
    reached.extend(left.into_iter().map(|found| (0, found)));
    reached
}
