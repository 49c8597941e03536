//! A journal with its disks for tests: noise is written, applied, made into points, and read back at each.
//!
//! Invariant: what a write holds follows from its seed, so that a reader needs no copy. Works over any [`Files`], memory
//! or real. Units: sectors, entry numbers. Called by the tests of faults and of flipped bits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::BlockFile;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::undo::Hole;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings, Recovered};
use reprotect_engine::units::SECTOR_BYTES;

use super::journal_lab::{NOW, POSITION, apply_through, batch, id, view};

/// Where a journal lies, and its disks.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) files: Arc<dyn Files>,
    pub(crate) folder: PathBuf,
    pub(crate) targets: Vec<PathBuf>,
    pub(crate) size_sectors: u64,
    pub(crate) segment_bytes: u64,
}

/// An open journal with its disks.
pub(crate) struct Lab {
    pub(crate) journal: Journal,
    pub(crate) disks: Vec<Applier<Box<dyn BlockFile>>>,
    pub(crate) found: Recovered,
    /// Damage of the undo runs that go on, by disk.
    pub(crate) holes: Vec<Vec<Hole>>,
}

/// Bytes that do not compress and follow from a number.
pub(crate) fn noise(number: u64, bytes: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..bytes.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(bytes).collect()
}

impl Place {
    fn settings(&self) -> JournalSettings {
        JournalSettings { segment_bytes: self.segment_bytes }
    }

    /// Makes the journal; the targets are there already.
    pub(crate) fn create(&self) -> Result<Lab, JournalError> {
        let mut journal = Journal::create(Arc::clone(&self.files), &self.folder, self.settings(), NOW)?;
        let mut disks = Vec::new();
        for (number, path) in self.targets.iter().enumerate() {
            let disk = id(number);
            let added = DiskAdded { disk, machine: [7; 16], size_sectors: self.size_sectors, time: NOW };
            journal.add_disk(added, NOW)?;
            let (mut applier, _) = Applier::open(&journal, disk, self.target(path)?, None)?;
            applier.begin_epoch(&mut journal, EpochCause::First, POSITION, None, NOW)?;
            disks.push(applier);
        }
        Ok(Lab { journal, disks, found: Recovered::default(), holes: Vec::new() })
    }

    fn target(&self, path: &Path) -> Result<Box<dyn BlockFile>, JournalError> {
        Ok(self.files.open(path, true)?)
    }

    /// Opens the journal and all its disks.
    pub(crate) fn open(&self) -> Result<Lab, JournalError> {
        let (journal, found) = Journal::open(Arc::clone(&self.files), &self.folder, self.settings(), NOW)?;
        let (mut disks, mut holes) = (Vec::new(), Vec::new());
        for (number, path) in self.targets.iter().enumerate() {
            let said = found.disks.get(&id(number)).and_then(|log| log.applied);
            let (applier, damage) =
                Applier::open(&journal, id(number), self.target(path)?, said.map(|(applied, _)| applied))?;
            disks.push(applier);
            holes.push(damage);
        }
        Ok(Lab { journal, disks, found, holes })
    }
}

impl Lab {
    /// Logs a write of noise that follows from `seed`; answers its number. Durable after a commit.
    pub(crate) fn write(
        &mut self,
        disk: usize,
        start: u64,
        sectors: u64,
        seed: u64,
    ) -> Result<u64, JournalError> {
        let plain = noise(seed, (sectors * SECTOR_BYTES) as usize);
        let body = batch(id(disk), seed, &[Record::data(start, plain.into())]);
        Ok(self.journal.append(id(disk), EntryKind::Batch, &[&body], NOW)?.0)
    }

    pub(crate) fn commit(&mut self) -> Result<(), JournalError> {
        self.journal.commit(NOW)
    }

    /// Applies everything that waits, in one window. As in the master target, an undo epoch begins where a stop came between
    /// two: nothing is applied outside of one.
    pub(crate) fn apply(&mut self, disk: usize) -> Result<(), JournalError> {
        if self.disks[disk].open_epoch().is_none() {
            self.disks[disk].begin_epoch(&mut self.journal, EpochCause::Time, POSITION, None, NOW)?;
        }
        apply_through(&mut self.journal, &mut self.disks[disk], u64::MAX)
    }

    /// Ends the undo epoch and begins the next.
    pub(crate) fn epoch(&mut self, disk: usize) -> Result<(), JournalError> {
        self.journal.commit(NOW)?;
        self.disks[disk].close_epoch(&mut self.journal, NOW)?;
        self.disks[disk].begin_epoch(&mut self.journal, EpochCause::Time, POSITION, None, NOW)?;
        Ok(())
    }

    pub(crate) fn view(&mut self, disk: usize, at: At) -> Result<Vec<u8>, JournalError> {
        view(&mut self.journal, &mut self.disks[disk], at)
    }
}
