//! Reading again what lies still: sealed undo runs, and entries of the redo log that are applied.
//!
//! Where things are is asked under the journal's lock, which takes no I/O; they are then read through whatever files the
//! caller chooses, without the lock. Meanwhile a run may be merged or expired and a segment used again: what looks
//! damaged counts only if [`Journal::has_run`] or [`Journal::has_segment`] still says yes.
//!
//! Invariant: nothing is written. Units: bytes, entry numbers. Called by the master target's scrub.

use std::path::PathBuf;

use bytes::Bytes;

use super::applier::{identity, run_path};
use super::entry::entry_writes;
use super::error::JournalError;
use super::log::{Place, segment_path};
use super::undo::{Hole, RunIdentity, SealedRun};
use super::{Journal, Run};
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::segment::EntryHead;
use crate::io::{BlockFile, ReadAt};
use crate::store::files::Files;
use crate::units::DiskId;

/// A sealed undo run to be read.
#[derive(Clone, Debug)]
pub struct RunPlace {
    /// Its disk.
    pub disk: DiskId,
    /// Which one.
    pub run: Run,
    /// Its file.
    pub path: PathBuf,
    identity: RunIdentity,
}

/// An entry to be read.
#[derive(Clone, Debug)]
pub struct EntryPlace {
    /// Its disk.
    pub disk: DiskId,
    /// Its number.
    pub number: u64,
    /// The file of its segment.
    pub path: PathBuf,
    /// Where it lies.
    pub place: Place,
}

impl Journal {
    /// Every sealed undo run.
    ///
    /// # Errors
    /// When the journal contradicts itself.
    pub fn run_places(&self) -> Result<Vec<RunPlace>, JournalError> {
        let mut places = Vec::new();
        for (disk, shape) in &self.shape().disks {
            for run in &shape.runs {
                let (path, identity) = (run_path(self, *disk, run.file), identity(self, *disk, run)?);
                places.push(RunPlace { disk: *disk, run: *run, path, identity });
            }
        }
        Ok(places)
    }

    /// Every entry that is applied and therefore durable, in the order of the log.
    #[must_use]
    pub fn entry_places(&self) -> Vec<EntryPlace> {
        let mut places = Vec::new();
        for (disk, entries) in &self.entries {
            let applied = self.disks.get(disk).map_or(0, |numbers| numbers.applied_durable);
            for entry in entries.iter().filter(|entry| entry.number <= applied) {
                let Some(segment) = self.shape().segments.get(&entry.place.segment) else { continue };
                let path = segment_path(self.folder(), segment.slot);
                places.push(EntryPlace { disk: *disk, number: entry.number, path, place: entry.place });
            }
        }
        places.sort_by_key(|entry| entry.place);
        places
    }

    /// Whether a run still is part of the journal.
    #[must_use]
    pub fn has_run(&self, place: &RunPlace) -> bool {
        self.shape().disks.get(&place.disk).is_some_and(|shape| shape.runs.contains(&place.run))
    }

    /// Whether a segment still is part of the journal.
    #[must_use]
    pub fn has_segment(&self, number: u64) -> bool {
        self.shape().segments.contains_key(&number)
    }
}

/// Reads a whole run; answers what is damaged, and its bytes.
///
/// # Errors
/// When it cannot be read.
pub fn check_run(files: &dyn Files, place: &RunPlace) -> Result<(Vec<Hole>, u64), JournalError> {
    let mut run = SealedRun::open(files, &place.path, &place.identity)?;
    let bytes = run.len_bytes();
    Ok((run.verify()?, bytes))
}

/// Reads an entry from the file of its segment: head, body, every fragment. The inner error is damage.
///
/// # Errors
/// When it cannot be read.
pub fn check_entry(
    file: &mut dyn BlockFile,
    place: &EntryPlace,
    decompressor: &mut Decompressor,
) -> Result<Result<(), FormatError>, JournalError> {
    let mut bytes = vec![0; place.place.bytes as usize];
    file.read(&mut [ReadAt { offset: place.place.offset, data: &mut bytes }])?;
    Ok(judge(bytes, decompressor))
}

fn judge(mut bytes: Vec<u8>, decompressor: &mut Decompressor) -> Result<(), FormatError> {
    let head = EntryHead::open(&bytes)?;
    let body = bytes.split_off(EntryHead::BYTES.min(bytes.len()));
    head.check_body(&body)?;
    entry_writes(head.kind, Bytes::from(body), decompressor).map(|_| ())
}
