//! The journal of a workload with its disks, opened and used as the master target does.
//!
//! Invariant: opening finds nothing damaged, nothing missing but what was given up, and no hole, for nothing was injected;
//! a target that is larger than the manifest says is taken at its size. Units: entry numbers,
//! sectors. Called by the workload, which goes on with it, and the oracle, which judges what a crash left.

use std::path::Path;

use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::format::segment::Applied;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::rollback::resume;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{DiskLog, Journal, JournalError, JournalSettings};
use reprotect_engine::units::SECTOR_BYTES;

use crate::journal_lab::{self as lab, NOW, POSITION, id};

pub(crate) const FOLDER: &str = "/retention";
/// Some ten commits fill a segment.
pub(crate) const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 48 << 10 };
/// Six blocks, the last of them short.
pub(crate) const SECTORS: u64 = 5 * 8 + 3;
pub(crate) const DISK_BYTES: usize = (SECTORS * SECTOR_BYTES) as usize;

pub(crate) fn target_path(disk: usize) -> String {
    format!("/datastore/disk-{disk}")
}

/// An open journal.
pub(crate) struct Store {
    pub(crate) journal: Journal,
    pub(crate) disks: Vec<Applier<Box<dyn BlockFile>>>,
    /// What opening found of each disk.
    pub(crate) logs: Vec<DiskLog>,
}

impl Store {
    /// Opens what is there, finishes what was interrupted, and begins an undo epoch where none goes on. Only the disks the
    /// manifest knows, which are the first ones.
    pub(crate) fn open(files: &MemoryFiles, disks: usize) -> Result<Self, JournalError> {
        let (journal, found) = Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW)?;
        assert_eq!(found.damage, [], "opening calls something damaged");
        assert_eq!(found.doubted, [], "opening doubts an index");
        assert!(found.set_aside.is_empty(), "opening moves {:?} aside", found.set_aside);
        let known = (0..disks).take_while(|disk| journal.shape().disks.contains_key(&id(*disk)));
        let logs: Vec<DiskLog> = known.map(|disk| found.disks[&id(disk)].clone()).collect();
        let mut store = Self { journal, disks: Vec::new(), logs };
        for disk in 0..store.logs.len() {
            let log = &store.logs[disk];
            let given_up = |number| {
                let mut lost = store.journal.shape().disks[&id(disk)].lost.iter();
                lost.any(|loss| (loss.entries.first..=loss.entries.last).contains(&number))
            };
            let mut missing = log.missing.iter().flat_map(|(start, end)| *start..*end);
            assert!(missing.all(given_up), "entries {:?} of disk {disk} are missing", log.missing);
            let applied = log.applied.map(|(applied, _)| applied);
            let target = files.opener().open(Path::new(&target_path(disk)), true)?;
            let (applier, holes) = Applier::open(&store.journal, id(disk), target, applied)?;
            assert_eq!(holes, [], "the open run of disk {disk} has holes");
            store.disks.push(applier);
            store.go_on(disk)?;
        }
        Ok(store)
    }

    /// What the start of a disk does with one that was opened.
    pub(crate) fn go_on(&mut self, disk: usize) -> Result<u64, JournalError> {
        let applier = &mut self.disks[disk];
        resume(&mut self.journal, applier, NOW)?;
        let size_sectors = applier.target().size_bytes() / SECTOR_BYTES;
        if size_sectors > applier.size_sectors() {
            applier.grow(&mut self.journal, size_sectors, NOW)?;
        }
        self.begin(disk)
    }

    /// Closes a disk and opens it as a start does; `between` has it meanwhile. `applied` is what the log says last.
    pub(crate) fn open_again(
        &mut self,
        files: &MemoryFiles,
        disk: usize,
        applied: Option<Applied>,
        between: impl FnOnce(&mut Journal),
    ) -> Result<(), JournalError> {
        drop(self.disks.remove(disk));
        between(&mut self.journal);
        let target = files.opener().open(Path::new(&target_path(disk)), true)?;
        let (applier, holes) = Applier::open(&self.journal, id(disk), target, applied)?;
        assert_eq!(holes, [], "the open run of disk {disk} has holes");
        self.disks.insert(disk, applier);
        Ok(())
    }

    /// Begins an undo epoch where none goes on; the first of a disk is its first.
    pub(crate) fn begin(&mut self, disk: usize) -> Result<u64, JournalError> {
        if let Some(epoch) = self.disks[disk].open_epoch() {
            return Ok(epoch);
        }
        let first = self.journal.shape().disks[&id(disk)].epochs.is_empty();
        let cause = if first { EpochCause::First } else { EpochCause::Time };
        self.disks[disk].begin_epoch(&mut self.journal, cause, POSITION, None, NOW)
    }

    /// Applies entries up to a number.
    pub(crate) fn apply(&mut self, disk: usize, through: u64) -> Result<(), JournalError> {
        lab::apply_through(&mut self.journal, &mut self.disks[disk], through)
    }

    /// The newest entry that is there, logged or applied.
    pub(crate) fn newest(&self, disk: usize) -> u64 {
        self.journal.newest(id(disk)).max(self.disks[disk].applied().number)
    }

    pub(crate) fn view(&mut self, disk: usize, at: At) -> Result<Vec<u8>, JournalError> {
        lab::view(&mut self.journal, &mut self.disks[disk], at)
    }

    pub(crate) fn target(&mut self, disk: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.disks[disk].target().size_bytes() as usize];
        self.disks[disk].target().read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
        bytes
    }
}
