//! A retention folder read without a master target: no lock is needed, no byte is written, read-only media will do.
//!
//! What a crash left is read as the next start would find it: a torn end of the log is left out, images behind the
//! certain length of the open undo run count as far as they are whole, entries that are not on the target yet are laid
//! over it, and a rollback that was interrupted is seen as finished.
//!
//! Invariants: every file is opened for reading; what is handed out was checked by a CRC or stands on the target; a
//! folder that a running master target writes to must not be read with this (its files change between two reads),
//! which is the caller's to see to. Units: bytes, entry numbers. Called by the offline commands.

use std::path::Path;
use std::sync::Arc;

use super::applier::{Applier, identity, run_path, shape};
use super::error::JournalError;
use super::indexed::{FoundIndex, read_index};
use super::log::segment_path;
use super::manifest::{Manifest, superblock_copies, walk_manifest};
use super::ongoing::inspect;
use super::points::{Point, all_points_and_ruins, is_state};
use super::recovery::{Damage, LogEntry, Scan, Seen, scan, scan_showing};
use super::strays::{check_known, sort_files};
use super::tolerant::Tolerant;
use super::undo::{ActiveRun, Hole, SealedRun};
use super::view::{At, View};
use super::watched::Watched;
use super::{Journal, JournalSettings, Recovered, Run, Shape};
use crate::format::FormatError;
use crate::format::manifest::{Edit, EditHead, SegmentOpened, Superblock};
use crate::format::segment::Applied;
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::store::crc_map::{CrcMap, MapOwner};
use crate::store::files::Files;
use crate::units::{DiskId, SECTOR_BYTES};

/// A retention folder, open for reading.
pub struct Offline {
    pub(super) journal: Journal,
    found: Recovered,
    superblock: Superblock,
    durable_group: u64,
}

/// A recovery point of a disk, and whether it can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The point.
    pub point: Point,
    /// Why it cannot be had.
    pub refused: Option<String>,
}

/// Which state of a disk is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Everything the journal holds.
    Newest,
    /// A point.
    At(At),
}

impl Offline {
    /// Opens a retention folder.
    ///
    /// # Errors
    /// When there is none, a newer version wrote it, its manifest is damaged, or files of another journal are among its
    /// own. Damage to the log is part of [`Self::damage`].
    pub fn open(files: Arc<dyn Files>, folder: &Path) -> Result<Self, JournalError> {
        let (manifest, opened) = Manifest::open_to_read(Arc::clone(&files), folder)?;
        let (slots, strangers) = sort_files(&*files, folder, &manifest)?;
        let superblock = manifest.superblock();
        let mut scan = scan(&*files, folder, manifest.journal(), manifest.shape(), opened.durable_group)?;
        scan.believe_order(opened.clean, opened.durable_group);
        check_known(&*files, folder, &manifest, &slots, &strangers, &scan)?;
        let settings = JournalSettings::default();
        let (mut journal, found) = Journal::scanned(files, folder, settings, manifest, &slots, scan);
        journal.log.forbid_writes();
        let found = Recovered { set_aside: strangers, clean: opened.clean, ..found };
        Ok(Self { journal, found, superblock, durable_group: opened.durable_group })
    }

    /// What the journal consists of.
    #[must_use]
    pub const fn shape(&self) -> &Shape {
        self.journal.shape()
    }

    /// What the folder's log holds, where it is torn, and files that belong to nothing (not moved).
    #[must_use]
    pub const fn found(&self) -> &Recovered {
        &self.found
    }

    /// What is damaged in the log, as far as opening reads it: `verify` reads all.
    #[must_use]
    pub fn damage(&self) -> &[Damage] {
        &self.found.damage
    }

    /// The copy of the superblock that counts.
    #[must_use]
    pub const fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Entries of a disk in the log, as [`Journal::entries`].
    #[must_use]
    pub fn entries(&self, disk: DiskId) -> &[LogEntry] {
        self.journal.entries(disk)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.journal.folder()
    }

    /// Each copy of the superblock as it stands; `None` where none was ever written.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn superblock_copies(&self) -> Result<Vec<Option<Result<Superblock, FormatError>>>, JournalError> {
        superblock_copies(&**self.journal.files(), self.folder())
    }

    /// Shows every edit of the manifest: where it stands, its head, what it says. Answers whether something torn stands
    /// behind the last.
    ///
    /// # Errors
    /// When the manifest cannot be read.
    pub fn edits(&self, mut see: impl FnMut(u64, &EditHead, &Edit)) -> Result<bool, JournalError> {
        walk_manifest(&**self.journal.files(), self.folder(), &self.superblock, &mut see)
            .map(|read| read.torn)
    }

    /// Reads the whole log again and shows what is in it.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn log(&self, mut see: impl FnMut(Seen<'_>)) -> Result<Scan, JournalError> {
        let (files, journal) = (&**self.journal.files(), self.journal.id());
        let mut scan =
            scan_showing(files, self.folder(), journal, self.shape(), self.durable_group, &mut see)?;
        scan.believe_order(self.found.clean, self.durable_group);
        Ok(scan)
    }

    /// What stands where the index of a segment belongs.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn index(&self, segment: &SegmentOpened) -> Result<FoundIndex, JournalError> {
        let path = segment_path(self.folder(), segment.slot);
        if self.journal.files().facts(&path)?.is_none() {
            return Ok(FoundIndex::None);
        }
        read_index(&mut Tolerant::open(&**self.journal.files(), &path)?, self.journal.id(), segment)
    }

    /// Number of the newest entry of a disk, and of the newest one known to be on the target.
    #[must_use]
    pub fn numbers(&self, disk: DiskId) -> (u64, u64) {
        let Some(log) = self.found.disks.get(&disk) else { return (0, 0) };
        (log.newest(), log.on_target)
    }

    /// The points of a disk, oldest first: those that are kept, and the marks in the log. What is not there of that which
    /// one needs is said, also where a mark itself cannot be read; single images are not read: `verify` does that.
    ///
    /// # Errors
    /// When the disk is not in the journal.
    pub fn points(&mut self, disk: DiskId) -> Result<Vec<Listed>, JournalError> {
        let found = all_points_and_ruins(&mut self.journal, disk)?;
        let runs = &shape(&self.journal, disk)?.runs;
        let broken: Vec<(Run, String)> =
            runs.iter().filter_map(|run| Some((*run, self.run(disk, *run).err()?.to_string()))).collect();
        let listed = |point: Point| {
            let ruined = point.damaged.filter(|rot| rot.entry == Some(point.at.number));
            let refused = match View::plan(&self.journal, disk, point.at) {
                Ok(plan) => {
                    let run = broken.iter().find(|(run, _)| plan.needs(run)).map(|(_, why)| why.clone());
                    let inside = ruined.filter(|_| !plan.is_at_border());
                    run.or_else(|| {
                        inside.map(|rot| format!("its mark cannot be read: {}", rot.cause.as_str()))
                    })
                }
                Err(error) => Some(error.to_string()),
            };
            Listed { point, refused }
        };
        Ok(found.into_iter().map(listed).collect())
    }

    /// Whether the disk was ever as a place would show it, as [`is_state`]; where the log cannot be read nobody knows, and
    /// what can be had is not refused for that.
    ///
    /// # Errors
    /// When the disk is not in the journal.
    pub fn is_state(&mut self, disk: DiskId, at: At) -> Result<bool, JournalError> {
        shape(&self.journal, disk)?;
        Ok(is_state(&mut self.journal, disk, at).unwrap_or(true))
    }

    /// A sealed undo run of a disk.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn run(&self, disk: DiskId, run: Run) -> Result<SealedRun, JournalError> {
        let identity = identity(&self.journal, disk, &run)?;
        let path = run_path(&self.journal, disk, run.file);
        Ok(SealedRun::open(&**self.journal.files(), &path, &identity)?)
    }

    /// The undo run of the epoch that goes on, as far as it is whole, and what is damaged in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_run(&self, disk: DiskId) -> Result<(Option<ActiveRun>, Vec<Hole>), JournalError> {
        let shape = shape(&self.journal, disk)?;
        let Some(epoch) = shape.open_epoch() else { return Ok((None, Vec::new())) };
        let nothing = Applied { number: 0, epoch: 0, undo_bytes: 0 };
        let log = self.found.disks.get(&disk);
        let applied = log.and_then(|log| log.applied).map_or(nothing, |(applied, _)| applied);
        inspect(&self.journal, &epoch.opened, shape.size_sectors(), &applied)
    }

    /// The target of a disk, compared with what its CRC map says was written there as it is read, unless it is `accepted` as it is.
    ///
    /// # Errors
    /// When the disk is not in the journal, or the map cannot be read.
    pub fn watched<T: BlockFile>(
        &self,
        disk: DiskId,
        target: T,
        accepted: bool,
    ) -> Result<Watched<T>, JournalError> {
        let owner = MapOwner {
            journal: self.journal.id(),
            disk,
            size_sectors: shape(&self.journal, disk)?.size_sectors(),
        };
        let map = CrcMap::open_to_read(&**self.journal.files(), self.folder(), owner)?;
        Ok(Watched::new(target, map, accepted))
    }

    /// A disk with its target, which may be behind the log.
    ///
    /// # Errors
    /// When the disk is not in the journal, or its open undo run cannot be read.
    pub fn disk<T: BlockFile>(
        &mut self,
        disk: DiskId,
        target: T,
    ) -> Result<OfflineDisk<'_, T>, JournalError> {
        let applied = self.found.disks.get(&disk).and_then(|log| log.applied).map(|(applied, _)| applied);
        let (applier, holes) = Applier::open_to_read(&self.journal, disk, target, applied)?;
        Ok(OfflineDisk { journal: &mut self.journal, applier, holes })
    }
}

/// A disk of a folder that is read offline.
pub struct OfflineDisk<'a, T> {
    journal: &'a mut Journal,
    applier: Applier<T>,
    holes: Vec<Hole>,
}

impl<'a, T: BlockFile> OfflineDisk<'a, T> {
    /// What is damaged in the open undo run.
    #[must_use]
    pub fn holes(&self) -> &[Hole] {
        &self.holes
    }

    /// The disk's size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.applier.size_sectors() * SECTOR_BYTES
    }

    /// The target's size in bytes: another one than the disk's is the target of another disk.
    #[must_use]
    pub fn target_bytes(&mut self) -> u64 {
        self.applier.target().size_bytes()
    }

    /// The disk as it was, as a file to be read.
    ///
    /// # Errors
    /// When the point is not kept, or what it needs is damaged.
    pub fn into_file(mut self, which: Which) -> Result<PointFile<'a, T>, JournalError> {
        let disk = self.applier.disk();
        let view = match which {
            Which::At(at) => View::open(self.journal, disk, at)?,
            Which::Newest => View::newest(self.journal, disk, self.applier.applied().number)?,
        };
        let runs = view.open_runs(self.journal, &mut self.applier)?;
        let name = match which {
            Which::At(at) => format!("{disk} at {}.{}", at.epoch, at.number),
            Which::Newest => format!("{disk} at its newest state"),
        };
        Ok(PointFile { disk: self, view, runs, name })
    }
}

/// A disk as it was, read from folder and target; takes no writes.
pub struct PointFile<'a, T> {
    disk: OfflineDisk<'a, T>,
    view: View,
    runs: Vec<Run>,
    name: String,
}

impl<T> PointFile<'_, T> {
    fn error(&self, op: BlockOp, offset: u64, len: u64, error: impl Into<Error>) -> BlockError {
        BlockError { name: self.name.clone(), op, offset, len, source: std::io::Error::other(error) }
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

const TO_READ: &str = "a point is read, never written";

impl<T: BlockFile> BlockFile for PointFile<'_, T> {
    fn size_bytes(&self) -> u64 {
        self.view.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for ReadAt { offset, data } in reads {
            let len = data.len() as u64;
            let read = self.view.read(&self.runs, &mut self.disk.applier, *offset, data);
            read.map_err(|error| self.error(BlockOp::Read, *offset, len, error))?;
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        let offset = writes.first().map_or(0, |write| write.offset);
        Err(self.error(BlockOp::Write, offset, 0, TO_READ))
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        Err(self.error(BlockOp::Zero, range.start, range.len(), TO_READ))
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let found = self.view.allocated(&self.runs, &mut self.disk.applier, range);
        found.map_err(|error| self.error(BlockOp::Map, range.start, range.len(), error))
    }
}
