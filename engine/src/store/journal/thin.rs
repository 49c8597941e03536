//! Thinning: undo runs between which no point stands any more are made one.
//!
//! The merged run is written beside the others while replication goes on; then the manifest names it instead of them;
//! then they are removed. What a crash leaves of it belongs to nothing and is removed at the next opening.
//!
//! Invariants: no run is merged across a kept point or one that is read now, nor into the window in which points
//! inside an undo epoch are offered; the older image wins. Units: bytes, epochs. Called by retention, on a thread of its own.

use super::applier::{identity, run_path};
use super::error::{JournalError, random_u64};
use super::rot::{Found, reach};
use super::shape::{DiskShape, Run, RunFile};
use super::undo::{SealedRun, merge, merged_header};
use super::{Journal, applier};
use crate::format::manifest::{Edit, RunsMerged};
use crate::store::files::Files;
use crate::units::{DiskId, Timestamp};
use std::path::PathBuf;
use std::sync::Arc;

/// Two runs that may become one, and where it goes.
pub struct Merge {
    disk: DiskId,
    older: Run,
    newer: Run,
    number: u64,
    files: Arc<dyn Files>,
    paths: [PathBuf; 3],
    runs: [SealedRun; 2],
    salt: u64,
}

/// What a merge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The disk.
    pub disk: DiskId,
    /// The epochs of the run.
    pub epochs: (u64, u64),
    /// Bytes of the two runs before.
    pub before_bytes: u64,
    /// Bytes of the one that replaces them.
    pub after_bytes: u64,
    /// Images that were damaged and are lost from now on.
    pub lost: usize,
}

/// The next two runs of a disk to be merged, the smallest first; `None` when there are none. `before`: only epochs that
/// ended by then; `held`: epochs from which on runs are read now; `not`: runs that are left as they are.
///
/// # Errors
/// When a run cannot be opened.
pub fn next(
    journal: &Journal,
    disk: DiskId,
    before: Timestamp,
    held: &[u64],
    not: &[RunFile],
) -> Result<Option<Merge>, JournalError> {
    let Some(known) = journal.shape().disks.get(&disk) else { return Ok(None) };
    let Some((older, newer)) = candidate(known, before, held, not) else { return Ok(None) };
    let number = merged_number(older.first, newer.last);
    let files = Arc::clone(journal.files());
    let open = |run: &Run| -> Result<SealedRun, JournalError> {
        let path = run_path(journal, disk, run.file);
        Ok(SealedRun::open(&*files, &path, &identity(journal, disk, run)?)?)
    };
    let runs = [open(&older)?, open(&newer)?];
    let paths =
        [older.file, newer.file, RunFile::Merged(number)].map(|file| applier::run_path(journal, disk, file));
    let salt = random_u64(journal.folder())?;
    Ok(Some(Merge { disk, older, newer, number, files, paths, runs, salt }))
}

/// The number of the file of a run of these epochs. Runs only grow, and epochs are never used again: so it is never used
/// again either, whatever is merged or expires. (Older programs counted from 1 on: these numbers are far above.)
fn merged_number(first: u64, last: u64) -> u64 {
    const WIDTH_BITS: u32 = 24;
    (last << WIDTH_BITS) | (last - first).min((1 << WIDTH_BITS) - 1)
}

fn candidate(known: &DiskShape, before: Timestamp, held: &[u64], not: &[RunFile]) -> Option<(Run, Run)> {
    let epoch = |number| known.epochs.iter().find(|epoch| epoch.opened.epoch == number);
    let pairs = known.runs.windows(2).filter_map(|pair| match pair {
        [older, newer] => Some((*older, *newer)),
        _ => None,
    });
    pairs
        .filter(|(older, newer)| {
            let is_old =
                epoch(newer.last).and_then(|epoch| epoch.closed).is_some_and(|end| end.time < before);
            let one_history =
                epoch(older.first).map(|e| e.opened.lineage) == epoch(newer.first).map(|e| e.opened.lineage);
            let read = held.iter().any(|from| older.last < *from && *from <= newer.first);
            let passed = not.contains(&older.file) || not.contains(&newer.file);
            is_old && one_history && !read && !passed && !known.has_point_inside(older.first, newer.last)
        })
        .min_by_key(|(older, newer)| older.bytes + newer.bytes)
}

impl Merge {
    /// The most that its run may take: as much as both.
    #[must_use]
    pub const fn bytes_max(&self) -> u64 {
        self.older.bytes + self.newer.bytes
    }

    /// Writes the merged run; takes as long as reading both does. Nothing of the journal has changed afterwards.
    ///
    /// # Errors
    /// When reading or writing fails; nothing is left behind then.
    pub fn write(&mut self) -> Result<u64, JournalError> {
        let [_, _, path] = &self.paths;
        self.files.remove(path)?; // what a crash left: the manifest never named it
        let [older, newer] = &mut self.runs;
        let header = merged_header(older.header(), newer.header(), self.salt);
        merge(older, newer, &*self.files, path, header)?;
        Ok(self.files.facts(path)?.map_or(0, |facts| facts.size_bytes))
    }

    /// Gives the merge up: the two runs stay as they are.
    ///
    /// # Errors
    /// When the new file cannot be removed.
    pub fn discard(self) -> Result<(), JournalError> {
        let [_, _, path] = &self.paths;
        Ok(self.files.remove(path)?)
    }

    /// Puts the run that [`Self::write`] made in the place of the two; the disk may have been forgotten meanwhile.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn settle(
        self,
        journal: &mut Journal,
        run_bytes: u64,
        now: Timestamp,
    ) -> Result<Option<Merged>, JournalError> {
        let [older_path, newer_path, path] = &self.paths;
        let known = journal.shape().disks.get(&self.disk);
        let unchanged = known.is_some_and(|known| {
            known.runs.contains(&self.older)
                && known.runs.contains(&self.newer)
                && !known.has_point_inside(self.older.first, self.newer.last)
        });
        if !unchanged {
            self.files.remove(path)?;
            return Ok(None);
        }
        // What was met while they were read is lost in the merged one, and known before the two are gone.
        for (run, sealed) in [self.older, self.newer].iter().zip(&self.runs) {
            let found = Found::of_holes(sealed.damage());
            let place = journal.run_place(self.disk, *run)?;
            let reached = reach(&*self.files, &journal.older_runs(&place)?, found);
            journal.note_run(&place, &reached, false, now)?;
        }
        let (disk, epochs) = (self.disk, (self.older.first, self.newer.last));
        let merged = RunsMerged { disk, first: epochs.0, last: epochs.1, run: self.number, run_bytes };
        if let Err(error) = journal.edit(&[Edit::RunsMerged(merged)], now) {
            let is_named = journal.shape().disks.get(&disk).is_some_and(|known| {
                known
                    .runs
                    .iter()
                    .any(|run| (run.first, run.last) == epochs && run.file == RunFile::Merged(self.number))
            });
            if !is_named {
                // It would take room on a drive that may have none; the error that matters is the one above.
                let _ = self.files.remove(path);
            }
            return Err(error);
        }
        self.files.remove(older_path)?;
        self.files.remove(newer_path)?;
        let lost = self.runs.iter().map(|run| run.damage().len()).sum();
        let before_bytes = self.older.bytes + self.newer.bytes;
        Ok(Some(Merged { disk, epochs, before_bytes, after_bytes: run_bytes, lost }))
    }
}
