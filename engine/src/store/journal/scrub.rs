//! Reading again what lies still: superblock and manifest, indexes of segments, sealed undo runs, and entries of the redo log
//! that are applied.
//!
//! Where things are is asked under the journal's lock, which takes no I/O; they are then read through whatever files the
//! caller chooses, without the lock. Meanwhile a run may be merged or expired and a segment used again: what looks
//! damaged counts only if [`Journal::has_run`] or [`Journal::has_segment`] still says yes.
//!
//! Invariant: nothing is written but superblock and manifest, which are known in memory: [`Journal::heal_own`] looks again
//! under the lock and writes them anew. Units: bytes, entry numbers. Called by the master target's scrub.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::entry::entry_writes;
use super::error::JournalError;
use super::indexed::{FoundIndex, read_index};
use super::log::{Place, segment_path};
use super::manifest::{SUPERBLOCK_NAME, manifest_path, read_manifest, read_superblock, superblock_copies};
use super::recovery::Damage;
use super::rot::Found;
use super::undo::{BlockRange, Hole, Place as ImagePlace, RunIdentity, SealedRun, UndoError};
use super::{Journal, LogEntry, Run};
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::manifest::SegmentOpened;
use crate::format::segment::{EntryHead, JournalId};
use crate::io::{BlockFile, ReadAt};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, BlockIndex, DiskId, Timestamp};

/// A sealed undo run to be read.
#[derive(Clone, Debug)]
pub struct RunPlace {
    /// Its disk.
    pub disk: DiskId,
    /// Which one.
    pub run: Run,
    /// Its file.
    pub path: PathBuf,
    pub(super) identity: RunIdentity,
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
                places.push(self.run_place(*disk, *run)?);
            }
        }
        Ok(places)
    }

    /// Every entry that is applied and therefore durable, in the order of the log.
    #[must_use]
    pub fn entry_places(&self) -> Vec<EntryPlace> {
        let mut places = Vec::new();
        for disk in self.entries.keys() {
            for entry in self.applied(*disk) {
                let Some(segment) = self.shape().segments.get(&entry.place.segment) else { continue };
                let path = segment_path(self.folder(), segment.slot);
                places.push(EntryPlace { disk: *disk, number: entry.number, path, place: entry.place });
            }
        }
        places.sort_by_key(|entry| entry.place);
        places
    }

    /// The entries of a disk that are applied and therefore durable.
    pub(super) fn applied(&self, disk: DiskId) -> &[LogEntry] {
        let applied = self.disks.get(&disk).map_or(0, |numbers| numbers.applied_durable);
        let entries = self.entries.get(&disk).map_or(&[][..], Vec::as_slice);
        entries.get(..entries.partition_point(|entry| entry.number <= applied)).unwrap_or_default()
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

/// The segment of the redo log whose index is to be read.
#[derive(Clone, Debug)]
pub struct IndexPlace {
    /// Number of the segment.
    pub segment: u64,
    /// Its file.
    pub path: PathBuf,
    opened: SegmentOpened,
    journal: JournalId,
}

impl Journal {
    /// Whether the superblock is what was written last: an older one in its place is whole, and will be wrong.
    #[must_use]
    pub fn has_own_superblock(&self) -> bool {
        self.manifest.has_its_superblock()
    }

    /// Reads superblock and manifest again, and where they are damaged writes them anew from memory. Answers what was
    /// damaged and is whole now: it was read once more.
    ///
    /// # Errors
    /// When they cannot be written, what was there stays then; or when they are not whole afterwards.
    pub fn heal_own(&mut self, now: Timestamp) -> Result<Vec<Damage>, JournalError> {
        let mut damage = check_own(&*self.files, &self.folder);
        if damage.is_empty() {
            let superblock = read_superblock(&*self.files, &self.folder)?;
            let edits = read_manifest(&*self.files, &self.folder, &superblock)?.index - 1;
            let known = self.manifest.next_edit() - 1;
            if edits != known || superblock.manifest != self.manifest.number() {
                let path = manifest_path(&self.folder, superblock.manifest);
                let reason = format!("it has {edits} edits, and {known} were written");
                damage.push(Damage { path, offset: 0, reason });
            } else if !self.has_own_superblock() {
                let path = self.folder.join(SUPERBLOCK_NAME);
                damage.push(Damage { path, offset: 0, reason: "it is not what was written last".to_owned() });
            }
        }
        if !damage.is_empty() {
            self.manifest.write_anew(now, self.log.durable_group())?;
            if let Some(left) = check_own(&*self.files, &self.folder).into_iter().next() {
                return Err(JournalError::damaged(&left.path, left.reason));
            }
        }
        Ok(damage)
    }

    /// Where the indexes of segments lie; the newest has none yet.
    #[must_use]
    pub fn index_places(&self) -> Vec<IndexPlace> {
        let mut segments: Vec<SegmentOpened> = self.shape().segments.values().copied().collect();
        segments.pop();
        let place = |opened: SegmentOpened| IndexPlace {
            segment: opened.number,
            path: segment_path(self.folder(), opened.slot),
            opened,
            journal: self.id(),
        };
        segments.into_iter().map(place).collect()
    }
}

/// Reads every copy of the superblock and every edit of the manifest. Without the journal's lock this may meet a change under
/// way: [`Journal::heal_own`] looks again.
#[must_use]
pub fn check_own(files: &dyn Files, folder: &Path) -> Vec<Damage> {
    let path = folder.join(SUPERBLOCK_NAME);
    let at = |offset: u64, reason: String| Damage { path: path.clone(), offset, reason };
    let copies = match superblock_copies(files, folder) {
        Ok(copies) => copies,
        Err(error) => return vec![at(0, error.to_string())],
    };
    let mut damage = Vec::new();
    for (copy, offset) in copies.iter().zip((0..).step_by(BLOCK_BYTES as usize)) {
        match copy {
            Some(Ok(_)) => {}
            Some(Err(error)) => damage.push(at(offset, error.to_string())),
            None => damage.push(at(offset, "a copy is not there".to_owned())),
        }
    }
    let read = read_superblock(files, folder)
        .and_then(|superblock| Ok((superblock, read_manifest(files, folder, &superblock)?)));
    match read {
        Ok((superblock, read)) if read.torn => damage.push(Damage {
            path: manifest_path(folder, superblock.manifest),
            offset: read.at,
            reason: "something that is no edit stands behind the last".to_owned(),
        }),
        Ok(_) => {}
        Err(error) => damage.push(at(0, error.to_string())),
    }
    damage
}

/// Reads the index of a segment; answers what is wrong with it. Nothing is lost with one: the segment itself is read when the
/// journal is opened.
///
/// # Errors
/// When it cannot be read.
pub fn check_index(files: &dyn Files, place: &IndexPlace) -> Result<Option<FormatError>, JournalError> {
    let found = read_index(&mut *files.open(&place.path, false)?, place.journal, &place.opened)?;
    Ok(match found {
        FoundIndex::Damaged(error) => Some(error),
        FoundIndex::None | FoundIndex::Whole(..) => None,
    })
}

/// What reading a run found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunCheck {
    /// What is damaged in the file.
    pub holes: Vec<Hole>,
    /// Blocks that the run itself says are lost: they were damaged in runs that it was merged from.
    pub lost: Vec<BlockRange>,
    /// Length of the file.
    pub bytes: u64,
}

impl RunCheck {
    /// Blocks whose images cannot be had, and why.
    #[must_use]
    pub fn found(&self) -> Vec<Found> {
        let lost = self.lost.iter().map(|blocks| Found {
            blocks: *blocks,
            cause: "damaged when undo runs were made one".to_owned(),
        });
        Found::of_holes(&self.holes).into_iter().chain(lost).collect()
    }
}

/// Reads a whole run.
///
/// # Errors
/// When it cannot be read.
pub fn check_run(files: &dyn Files, place: &RunPlace) -> Result<RunCheck, JournalError> {
    let mut run = SealedRun::open(files, &place.path, &place.identity)?;
    let bytes = run.len_bytes();
    let holes = run.verify()?;
    let whole = run.header().disk_blocks();
    let lost = run.lookup(whole)?.into_iter().filter(|found| found.place == ImagePlace::Lost);
    Ok(RunCheck { holes, lost: lost.map(|found| found.blocks).collect(), bytes })
}

/// The blocks of a run whose images cannot be read, where the medium fails: what else is in it is read.
///
/// # Errors
/// When not even its index can be read.
pub fn unreadable(files: &dyn Files, place: &RunPlace) -> Result<Vec<BlockRange>, JournalError> {
    const STEP_BLOCKS: u64 = 16;
    let mut run = SealedRun::open(files, &place.path, &place.identity)?;
    let whole = run.header().disk_blocks();
    let mut plain = vec![0; (STEP_BLOCKS * BLOCK_BYTES) as usize];
    let mut lost: Vec<BlockRange> = Vec::new();
    for found in run.lookup(whole)? {
        let mut at = found.blocks.start;
        while at < found.blocks.end {
            let end = found.blocks.end.min((at / STEP_BLOCKS + 1) * STEP_BLOCKS);
            let out = plain.get_mut(..((end - at) * BLOCK_BYTES) as usize).unwrap_or_default();
            let bad = match found.place {
                ImagePlace::Lost => true,
                ImagePlace::Stored(_) => match run.read(BlockIndex(at), out) {
                    Ok(()) => false,
                    Err(UndoError::Damaged { .. } | UndoError::Lost { .. } | UndoError::Block(_)) => true,
                    Err(error) => return Err(error.into()),
                },
                _ => false,
            };
            if bad {
                match lost.last_mut().filter(|last| last.end == at) {
                    Some(last) => last.end = end,
                    None => lost.push(BlockRange::new(at, end)),
                }
            }
            at = end;
        }
    }
    Ok(lost)
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
