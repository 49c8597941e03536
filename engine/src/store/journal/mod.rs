//! The retention journal: every change before it is applied, and what it overwrote, so that any point can be had back.
//!
//! | file | what |
//! |---|---|
//! | `log` | the redo log: groups, segments, commit |
//! | `manifest` | what the journal consists of, durably; `shape` is that as a value |
//! | `strays` | files that the manifest does not name: left over, foreign, or proof that it lost something |
//! | `recovery` | reading the redo log after a stop or a crash |
//! | `tolerant` | what a medium cannot read of the log, read as damage |
//! | `indexed` | what is read of a segment instead of its groups |
//! | `applier` | one disk: undo run, target, and the order in which they are written |
//! | `ongoing` | the undo epoch that goes on, and its run |
//! | `carry` | what keeps the log from being given back: carried forward, or given up |
//! | `capture` | before-images of a window: read, and saved beside the reading |
//! | `view` | a disk as it was at a point |
//! | `redo_index` | what entries of the log wrote, read as it is asked for |
//! | `points` | what can be had of a disk: marks, times, sequences |
//! | `ladder`, `thin` | which points stay, and their undo runs made one |
//! | `offline`, `verify` | a folder that nobody has open: read, and judged |
//! | `scrub`, `rot` | what lies still, read again; and what is known to be damaged |
//! | `rollback` | a disk goes back to a point, and forward again |
//! | `entry`, `window` | what an entry writes; many of them coalesced |
//! | `undo` | the first before-images of one undo epoch |
//!
//! Invariants: what [`Journal::commit`] answered for survives a crash; numbers of a disk's entries are contiguous;
//! a segment is released only when every disk has applied past it, durably (I3), its states are kept elsewhere, and
//! its marks are points or given up. One program has a journal open at a time. A file that is not the journal's is
//! moved aside, never deleted. Units: bytes, group and entry numbers. Called by the master target's threads.

pub mod applier;
mod capture;
mod carry;
pub mod entry;
pub mod error;
pub mod indexed;
pub mod ladder;
pub mod log;
pub mod manifest;
pub mod offline;
mod ongoing;
pub mod points;
pub mod recovery;
mod redo_index;
pub mod rollback;
pub mod rot;
pub mod scrub;
pub mod shape;
mod strays;
pub mod thin;
mod tolerant;
pub mod undo;
pub mod verify;
pub mod view;
pub mod watched;
pub mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use carry::{Carried, CarriedPins, LostPin};
pub use error::JournalError;
pub(super) use error::random_u64;
pub use log::{Place, Room};
pub use recovery::{Damage, DiskLog, LogEntry};
pub use shape::{DiskShape, Epoch, Loss, Needed, Run, RunFile, Shape};

use crate::format::batch::Mark;
use crate::format::disk_state::DiskState;
use crate::format::manifest::{DiskAdded, DiskRemoved, Edit};
use crate::format::segment::{Applied, EntryHead, EntryKind, JournalId};
use crate::limits::{SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MIN};
use crate::mutants::{Mutant, mutant};
use crate::store::crc_map::MAP_PREFIX;
use crate::store::files::Files;
use crate::units::{DiskId, Timestamp};
pub use log::{FreeSegment, PlannedSegment};
use log::{Log, NewEntry};
use manifest::Manifest;
use strays::sort_files;

/// How a journal is laid out.
#[derive(Clone, Copy, Debug)]
pub struct JournalSettings {
    /// Length of a new segment; at least [`SEGMENT_BYTES_MIN`] outside of tests.
    pub segment_bytes: u64,
}

impl Default for JournalSettings {
    fn default() -> Self {
        const { assert!(SEGMENT_BYTES_DEFAULT >= SEGMENT_BYTES_MIN) };
        Self { segment_bytes: SEGMENT_BYTES_DEFAULT }
    }
}

/// An open journal.
pub struct Journal {
    files: Arc<dyn Files>,
    folder: PathBuf,
    manifest: Manifest,
    log: Log,
    disks: BTreeMap<DiskId, DiskNumbers>,
    /// Numbered entries in the log, by disk, ascending.
    entries: BTreeMap<DiskId, Vec<LogEntry>>,
    /// Marks that were read or added, by disk and number.
    marks: BTreeMap<(DiskId, u64), Mark>,
    /// For each segment, the disks with entries in it and their highest number there.
    segments: BTreeMap<u64, BTreeMap<DiskId, u64>>,
    /// Disks whose waiting entries were given up since the opening: nothing is taken for them any more.
    given_up: BTreeSet<DiskId>,
    /// The medium did not give all of the log at the opening, and may do so at the next.
    partly_read: bool,
}

/// How far a disk is.
#[derive(Clone, Debug, Default)]
struct DiskNumbers {
    /// Number of its newest entry.
    newest: u64,
    /// What the newest APPLIED says; at an opening more, where the manifest knows more.
    applied: u64,
    /// As much of that as is durable.
    applied_durable: u64,
    /// Its newest state as it stands in the log, and where: what is written again needs not be read.
    state: Option<(Vec<u8>, Place)>,
    /// The newest APPLIED, and where it lies.
    applied_entry: Option<(Applied, Place)>,
}

/// What opening a journal found.
#[derive(Debug, Default)]
pub struct Recovered {
    /// What the log says of each disk of the journal.
    pub disks: BTreeMap<DiskId, DiskLog>,
    /// Durable things that cannot be read.
    pub damage: Vec<Damage>,
    /// Where the log's end was torn and is cut.
    pub torn: Option<(PathBuf, u64)>,
    /// The manifest ended in a torn edit, which nobody was told of as durable: where the file is now.
    pub torn_manifest: Option<PathBuf>,
    /// Files that belong to nothing, under their new names.
    pub set_aside: Vec<PathBuf>,
    /// The journal was closed in order.
    pub clean: bool,
    /// Segments of the redo log that were not read, for their indexes say what is in them.
    pub indexed: usize,
    /// Indexes that are damaged; their segments were read instead.
    pub doubted: Vec<Damage>,
}

/// Suffix of files that were moved aside.
const ASIDE: &str = ".aside";

impl Journal {
    /// Makes a journal in an empty folder.
    ///
    /// # Errors
    /// When the folder is not empty, holds a journal already, or cannot be written.
    pub fn create(
        files: Arc<dyn Files>,
        folder: &Path,
        settings: JournalSettings,
        now: Timestamp,
    ) -> Result<Self, JournalError> {
        // A superblock that cannot be read or is gone was a journal's, too: it is put back, never written over.
        match manifest::read_superblock(&*files, folder) {
            Err(JournalError::NoJournal { .. }) => {}
            Err(error @ JournalError::NoSuperblock { .. }) => return Err(error),
            _ => {
                let path = folder.join(manifest::SUPERBLOCK_NAME);
                return Err(crate::store::files::FilesError::Exists { path }.into());
            }
        }
        if let Occupant::Foreign(found) = occupant(&*files, folder)? {
            return Err(JournalError::NotEmpty { path: folder.into(), found });
        }
        // What an interrupted making left behind is ours, and so is what lies beside any journal.
        for name in files.neighbours(&folder.join(manifest::SUPERBLOCK_NAME))? {
            if is_ours(&name) {
                files.set_aside(&folder.join(&name), ASIDE)?;
            }
        }
        let mut journal = JournalId::default();
        let refused = |error: getrandom::Error| JournalError::NoRandomness {
            path: folder.into(),
            reason: error.to_string(),
        };
        getrandom::fill(&mut journal).map_err(refused)?;
        let manifest = Manifest::create(Arc::clone(&files), folder, journal, settings.segment_bytes, now)?;
        let log = Log::new(Arc::clone(&files), folder, settings.segment_bytes, &[], &manifest, 0, 0);
        let (disks, entries, segments) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let marks = BTreeMap::new();
        let given_up = BTreeSet::new();
        let partly_read = false;
        let folder = folder.into();
        Ok(Self { files, folder, manifest, log, disks, entries, marks, segments, given_up, partly_read })
    }

    /// Opens an existing journal; the log goes on in a new segment.
    ///
    /// # Errors
    /// When there is none, somebody else has it open, a newer version wrote it, its manifest is damaged, or files of
    /// another journal are among its own. Damage to the log is not an error but part of the answer.
    pub fn open(
        files: Arc<dyn Files>,
        folder: &Path,
        settings: JournalSettings,
        now: Timestamp,
    ) -> Result<(Self, Recovered), JournalError> {
        let (mut manifest, opened) = Manifest::open(Arc::clone(&files), folder, settings.segment_bytes)?;
        let (slots, strangers) = sort_files(&*files, folder, &manifest)?;
        let mut scan =
            recovery::scan(&*files, folder, manifest.journal(), manifest.shape(), opened.durable_group)?;
        scan.believe_order(opened.clean, opened.durable_group);
        scan.check_readable(manifest.shape())?;
        // Up to here nothing was changed: a manifest that lost something is refused as it is.
        strays::check_known(&*files, folder, &manifest, &slots, &strangers, &scan)?;
        let torn_manifest = manifest.start(now, &opened)?;
        // Another manifest may count now, under a name that was a stranger's.
        let (slots, strangers) = sort_files(&*files, folder, &manifest)?;
        let slots = log::finished_slots(&*files, folder, &manifest, slots)?;
        let mut set_aside = Vec::new();
        for path in strangers {
            // Behind a torn end stands perhaps what named them, but for those that were named before and are not any more.
            let is_certain = !opened.torn || strays::was_let_go(&path, &manifest);
            if is_certain && strays::is_leftover(&*files, &path, &manifest, &opened.removed)? {
                files.remove(&path)?;
                continue;
            }
            set_aside.push(files.set_aside(&path, ASIDE)?);
        }
        let wanting = std::mem::take(&mut scan.indexes.wanting);
        // The last group may stand in a cache only, if the program before us was killed between write and flush: it is
        // made durable before anybody is told of it.
        if let Some(newest) = manifest.shape().segments.values().next_back() {
            let path = log::segment_path(folder, newest.slot);
            if files.facts(&path)?.is_some() {
                files.open(&path, true)?.flush()?;
            }
        }
        let (mut journal, recovered) = Self::scanned(files, folder, settings, manifest, &slots, scan);
        journal.log.index_older(&journal.manifest, wanting);
        Ok((journal, Recovered { set_aside, torn_manifest, clean: opened.clean, ..recovered }))
    }

    /// A journal of what its manifest and the scan of its log said.
    fn scanned(
        files: Arc<dyn Files>,
        folder: &Path,
        settings: JournalSettings,
        manifest: Manifest,
        slots: &[u64],
        scan: recovery::Scan,
    ) -> (Self, Recovered) {
        let log = Log::new(
            Arc::clone(&files),
            folder,
            settings.segment_bytes,
            slots,
            &manifest,
            scan.last_group,
            scan.previous,
        );
        let mut logs = scan.disks;
        logs.retain(|disk, _| manifest.shape().disks.contains_key(disk));
        let disks = logs.iter().map(|(disk, log)| (*disk, DiskNumbers::recovered(log))).collect();
        let entries = logs.iter().map(|(disk, log)| (*disk, log.entries.clone())).collect();
        let segments = scan.segments;
        let marks = BTreeMap::new();
        let given_up = BTreeSet::new();
        let folder = folder.into();
        let partly_read = !scan.unreadable.is_empty();
        let journal =
            Self { files, folder, manifest, log, disks, entries, marks, segments, given_up, partly_read };
        let (damage, torn) = (scan.damage, scan.torn);
        let (indexed, doubted) = (scan.indexes.believed.len(), scan.indexes.doubted);
        let (disks, set_aside, clean, torn_manifest) = (logs, Vec::new(), false, None);
        (journal, Recovered { disks, damage, torn, torn_manifest, set_aside, clean, indexed, doubted })
    }

    /// What the journal consists of.
    #[must_use]
    pub const fn shape(&self) -> &Shape {
        self.manifest.shape()
    }

    /// The journal's identity.
    #[must_use]
    pub const fn id(&self) -> JournalId {
        self.manifest.journal()
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The seam to its files.
    #[must_use]
    pub fn files(&self) -> &Arc<dyn Files> {
        &self.files
    }

    /// Takes a disk in.
    ///
    /// # Errors
    /// When it is in already, or the manifest cannot be written.
    pub fn add_disk(&mut self, added: DiskAdded, now: Timestamp) -> Result<(), JournalError> {
        self.edit(&[Edit::DiskAdded(added)], now)?;
        self.disks.insert(added.disk, DiskNumbers::default());
        Ok(())
    }

    /// Forgets a disk; its undo runs must have been removed by then or are set aside at the next opening.
    ///
    /// # Errors
    /// When it is not in the journal, or the manifest cannot be written.
    pub fn remove_disk(&mut self, disk: DiskId, now: Timestamp) -> Result<(), JournalError> {
        self.edit(&[Edit::DiskRemoved(DiskRemoved { disk })], now)?;
        self.disks.remove(&disk);
        self.given_up.remove(&disk);
        self.entries.remove(&disk);
        self.marks.retain(|(known, _), _| *known != disk);
        Ok(())
    }

    /// Makes changes to the journal's shape durable.
    ///
    /// # Errors
    /// As for [`Manifest::append`].
    pub fn edit(&mut self, edits: &[Edit], now: Timestamp) -> Result<(), JournalError> {
        self.manifest.append(edits, now, self.log.durable_group())
    }

    /// Adds what is to be applied: a batch, a bulk batch or a mark, its body as received, in parts. Answers its number
    /// and place; it is durable after [`Self::commit`].
    ///
    /// # Errors
    /// When the medium is full (try again when segments were released), or the log failed.
    pub fn append(
        &mut self,
        disk: DiskId,
        kind: EntryKind,
        body: &[&[u8]],
        now: Timestamp,
    ) -> Result<(u64, Place), JournalError> {
        self.is_taken(disk)?;
        let number = self.disks.get(&disk).map_or(0, |disk| disk.newest) + 1;
        let entry = NewEntry { kind, disk, number, body, room: Room::Data, carried: false };
        let place = self.log.append(&mut self.manifest, now, &entry)?;
        self.disks.entry(disk).or_default().newest = number;
        self.entries.entry(disk).or_default().push(LogEntry {
            number,
            kind,
            place,
            time: now,
            carried: false,
        });
        self.segments.entry(place.segment).or_default().insert(disk, number);
        Ok((number, place))
    }

    /// The numbered entries of a disk that the log holds and that can be read, ascending; what was added since the
    /// last commit is not among them.
    #[must_use]
    pub fn entries(&self, disk: DiskId) -> &[LogEntry] {
        let all = self.entries.get(&disk).map_or(&[][..], Vec::as_slice);
        let written = all.partition_point(|entry| self.log.is_written(entry.place));
        all.get(..written).unwrap_or_default()
    }

    /// The number of a disk's newest entry, committed or not.
    #[must_use]
    pub fn newest(&self, disk: DiskId) -> u64 {
        self.disks.get(&disk).map_or(0, |disk| disk.newest)
    }

    /// The mark of an entry; read once.
    ///
    /// # Errors
    /// When it cannot be read, or is no mark.
    pub fn mark(&mut self, disk: DiskId, entry: &LogEntry) -> Result<Mark, JournalError> {
        if let Some(mark) = self.marks.get(&(disk, entry.number)) {
            return Ok(*mark);
        }
        let (_, body) = self.read(entry.place)?;
        let remedy = "choose another point";
        let mark = Mark::read_exact(&body).map_err(JournalError::format(
            &self.folder,
            entry.place.offset,
            remedy,
        ))?;
        self.marks.insert((disk, entry.number), mark);
        Ok(mark)
    }

    /// Adds the state of a disk with everything added before.
    ///
    /// # Errors
    /// As for [`Self::append`]; it may use the segment that is kept back.
    pub fn append_state(&mut self, state: &DiskState, now: Timestamp) -> Result<(), JournalError> {
        self.is_taken(state.disk)?;
        self.put_state(state.disk, state.to_bytes(), now)
    }

    fn put_state(&mut self, disk: DiskId, body: Vec<u8>, now: Timestamp) -> Result<(), JournalError> {
        let (kind, room) = (EntryKind::State, Room::Control);
        let entry = NewEntry { kind, disk, number: 0, body: &[&body], room, carried: false };
        let place = self.log.append(&mut self.manifest, now, &entry)?;
        self.segments.entry(place.segment).or_default().entry(disk).or_default();
        self.disks.entry(disk).or_default().state = Some((body, place));
        Ok(())
    }

    /// Adds that entries are on the target.
    ///
    /// # Errors
    /// As for [`Self::append_state`].
    pub fn append_applied(
        &mut self,
        disk: DiskId,
        applied: Applied,
        now: Timestamp,
    ) -> Result<(), JournalError> {
        self.is_taken(disk)?;
        self.put_applied(disk, applied, now)
    }

    fn put_applied(&mut self, disk: DiskId, applied: Applied, now: Timestamp) -> Result<(), JournalError> {
        let body = applied.to_bytes();
        let (kind, room) = (EntryKind::Applied, Room::Control);
        let entry = NewEntry { kind, disk, number: 0, body: &[&body], room, carried: false };
        let place = self.log.append(&mut self.manifest, now, &entry)?;
        self.segments.entry(place.segment).or_default().entry(disk).or_default();
        let numbers = self.disks.entry(disk).or_default();
        // What is written again may be older than what the manifest knows, where a newer one was damaged.
        numbers.applied = numbers.applied.max(applied.number);
        numbers.applied_entry = Some((applied, place));
        Ok(())
    }

    /// What went wrong since this was last asked and hinders nobody, for a log; at most a few.
    pub fn take_notices(&mut self) -> Vec<String> {
        self.manifest.notices.take()
    }

    /// Makes everything added so far durable.
    ///
    /// # Errors
    /// When it cannot be written: the log has failed then, and nothing more is acknowledged.
    pub fn commit(&mut self, now: Timestamp) -> Result<(), JournalError> {
        self.log.commit(&mut self.manifest, now)?;
        self.applied_is_durable();
        Ok(())
    }

    /// After a pause: an empty group says that the last one is durable.
    ///
    /// # Errors
    /// As for [`Self::commit`].
    pub fn seal(&mut self, now: Timestamp) -> Result<(), JournalError> {
        self.log.seal(&mut self.manifest, now)?;
        self.applied_is_durable();
        Ok(())
    }

    fn applied_is_durable(&mut self) {
        for disk in self.disks.values_mut() {
            disk.applied_durable = disk.applied;
        }
    }

    /// Reads an entry back, checked.
    ///
    /// # Errors
    /// When it cannot be read, or is not what it was.
    pub fn read(&mut self, place: Place) -> Result<(EntryHead, Vec<u8>), JournalError> {
        self.log.read(&self.manifest, place)
    }

    /// The redo log's own figures and its free segments.
    #[must_use]
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// Makes free segments ahead of need.
    ///
    /// # Errors
    /// When the medium is full.
    pub fn prepare(&mut self, segments: usize) -> Result<(), JournalError> {
        while self.log.free_segments() < segments {
            self.log.prepare()?;
        }
        Ok(())
    }

    /// As [`Self::prepare`], one segment at a time, for who does not keep the journal locked while it is made; `None`
    /// when there are enough. What was made goes to [`Self::adopt`].
    pub fn plan_segment(&mut self, segments: usize) -> Option<PlannedSegment> {
        (self.log.free_segments() < segments).then(|| self.log.plan_segment())
    }

    /// Takes a segment in that [`Self::plan_segment`] named.
    pub fn adopt(&mut self, made: FreeSegment) {
        self.log.adopt(made);
    }

    /// Gives free segments beyond a number back to the medium.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn shrink(&mut self, segments: usize) -> Result<(), JournalError> {
        self.log.shrink(segments)
    }

    /// Segments that hold nothing to be applied any more, and nothing of an undo epoch that goes on (its points are
    /// had by laying its entries over its images), oldest first. The caller releases what its retention does not need.
    #[must_use]
    pub fn releasable(&self) -> Vec<u64> {
        let current = self.log.current_segment();
        let needed = self.disks.keys().filter_map(|disk| self.oldest_needed(*disk)).min().unwrap_or(u64::MAX);
        let needed = if mutant(Mutant::ReleaseUnapplied) { u64::MAX } else { needed };
        let segments = self.manifest.shape().segments.keys().copied();
        segments.take_while(|number| Some(*number) != current && *number < needed).collect()
    }

    /// When the newest numbered entry of a segment was added; `None` where it has none, or what was the newest of each disk
    /// was carried on, which is done with what is past its time.
    #[must_use]
    pub fn newest_in(&self, segment: u64) -> Option<Timestamp> {
        let newest = |(disk, number): (&DiskId, &u64)| {
            let entries = self.entries.get(disk)?;
            let at = entries.binary_search_by_key(number, |entry| entry.number).ok()?;
            entries.get(at).filter(|entry| entry.place.segment == segment).map(|entry| entry.time)
        };
        self.segments.get(&segment)?.iter().filter_map(newest).max()
    }

    /// Releases a segment that [`Self::releasable`] named. The newest state and APPLIED of a disk that stand in it are
    /// written again first, so that there always is one in the log.
    ///
    /// # Errors
    /// When log or manifest cannot be written.
    pub fn release(&mut self, number: u64, now: Timestamp) -> Result<(), JournalError> {
        // What replaces an older STATE or APPLIED must be durable before the older one is given up.
        self.commit(now)?;
        let inside = |place: Place| place.segment == number;
        let mut kept = false;
        let disks: Vec<(DiskId, DiskNumbers)> =
            self.disks.iter().map(|(disk, numbers)| (*disk, numbers.clone())).collect();
        for (disk, numbers) in disks {
            if let Some((state, _)) = numbers.state.filter(|(_, place)| inside(*place)) {
                self.put_state(disk, state, now)?;
                kept = true;
            }
            if let Some((applied, _)) = numbers.applied_entry.filter(|(_, place)| inside(*place)) {
                self.put_applied(disk, applied, now)?;
                kept = true;
            }
        }
        if kept {
            self.commit(now)?;
        }
        self.log.release(&mut self.manifest, now, number)?;
        self.segments.remove(&number);
        for (disk, entries) in &mut self.entries {
            // What was carried forward stands before older ones by its number, and behind them in the log.
            entries.retain(|entry| {
                let stays = entry.place.segment > number;
                if !stays {
                    self.marks.remove(&(*disk, entry.number));
                }
                stays
            });
        }
        Ok(())
    }

    /// Closes the journal in order.
    ///
    /// # Errors
    /// When the last writes fail; the next opening then treats it as after a crash.
    pub fn close(mut self, now: Timestamp) -> Result<(), JournalError> {
        self.commit(now)?;
        self.seal(now)?;
        let durable = self.log.durable_group();
        self.manifest.close(now, durable)
    }
}

impl DiskNumbers {
    fn recovered(log: &DiskLog) -> Self {
        Self {
            newest: log.newest(),
            applied: log.on_target,
            applied_durable: log.on_target,
            state: log.state.as_ref().map(|(state, place)| (state.to_bytes(), *place)),
            applied_entry: log.applied,
        }
    }
}

/// Whether a file keeps a journal from being made beside it; what any drive has and what was moved aside does not.
fn is_foreign(name: &str) -> bool {
    !is_ours(name) && name != "lost+found" && !name.contains(ASIDE)
}

/// What a folder is to somebody who wants a journal in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// It has a journal, sound or not.
    Journal,
    /// Nothing is in the way of a new one.
    Nothing,
    /// This file is.
    Foreign(String),
}

/// Looks what a folder holds, by names alone; a folder that is missing holds nothing. [`Journal::create`] goes by it.
///
/// # Errors
/// When the folder cannot be listed.
pub fn occupant(files: &dyn Files, folder: &Path) -> Result<Occupant, JournalError> {
    let names = files.neighbours(&folder.join(manifest::SUPERBLOCK_NAME))?;
    if names.iter().any(|name| name == manifest::SUPERBLOCK_NAME) {
        return Ok(Occupant::Journal);
    }
    let foreign = names.into_iter().find(|name| is_foreign(name));
    Ok(foreign.map_or(Occupant::Nothing, Occupant::Foreign))
}

/// Reads superblock and manifest, as an opening would, and changes nothing.
///
/// # Errors
/// What an opening would say of them; while somebody else has the journal open, perhaps of a change under way.
pub fn examine(files: &Arc<dyn Files>, folder: &Path) -> Result<Occupant, JournalError> {
    match Manifest::open_to_read(Arc::clone(files), folder) {
        Ok(_) => Ok(Occupant::Journal),
        Err(JournalError::NoJournal { .. }) => occupant(&**files, folder),
        Err(error) => Err(error),
    }
}

/// Whether a file's name is one that a journal gives.
fn is_ours(name: &str) -> bool {
    name == manifest::SUPERBLOCK_NAME
        || log::segment_slot(name).is_some()
        || (["manifest-", "undo-", MAP_PREFIX].iter().any(|ours| name.starts_with(ours))
            && !name.contains(ASIDE))
}
