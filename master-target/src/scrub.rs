//! The scrub: reads again, slowly, what lies still, and says what is not as it was written.
//!
//! A round reads the journal's superblock and manifest and the indexes of its segments, every sealed undo run, every applied
//! entry of the redo log, and every target, which it compares with its CRC map. Rot is found before it is needed, and a write to a target by somebody else is named with its range.
//!
//! Invariants: nothing is written but the CRC maps, what is damaged into the journal's manifest, and superblock and manifest
//! where they are damaged themselves; reads stay under the byte budget, and under a quarter of it while
//! the disks have work; a finding stands in `status` until a round no longer finds it; what was merged, expired or
//! released meanwhile is no finding. Units: bytes. Started by `daemon`, on a thread of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};
use reprotect_engine::store::journal::rot::Found;
use reprotect_engine::store::journal::scrub::{
    RunPlace, check_entry, check_index, check_own, check_run, unreadable,
};
use reprotect_engine::store::journal::undo::UndoError;
use reprotect_engine::store::journal::{DiskShape, JournalError};
use reprotect_engine::units::{BLOCK_BYTES, DiskId, SECTOR_BYTES};

use crate::registry::{Registry, fs_opener};
use crate::retention::Retention;
use crate::rot;

/// Bytes of a target that are read in one go, on the disk's own thread.
const PIECE_BYTES: u64 = 256 << 10;
/// While the disks work, the budget is divided by this.
const YIELD: u32 = 4;
/// How often it is looked whether they work.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest sleep without looking whether to stop.
const NAP: Duration = Duration::from_millis(50);
/// Findings kept per disk; more are counted in the log only.
const FINDINGS_MAX: usize = 50;

/// What the operator chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubSettings {
    /// Bytes read per second; zero: no scrub, and no CRC maps.
    pub bytes_per_second: u64,
    /// Between two rounds.
    pub pause: Duration,
}

/// What the scrub found at one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubState {
    /// Rounds that ended.
    pub rounds: u64,
    /// Bytes of the disk's target, undo runs and entries that were read.
    pub read_bytes: u64,
    /// What is not as it was written.
    pub findings: Vec<String>,
}

/// A running scrub.
pub struct Scrub {
    stopping: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Scrub {
    /// Starts it; `None` where it is off.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(registry: &Arc<Registry>, retention: &Arc<Retention>) -> anyhow::Result<Option<Self>> {
        let settings = retention.scrub();
        if settings.bytes_per_second == 0 {
            return Ok(None);
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let budget = Arc::new(Budget {
            bytes_per_second: settings.bytes_per_second,
            stopping: Arc::clone(&stopping),
            registry: Arc::clone(registry),
            look: Mutex::new(Look { at: Instant::now(), counted: 0, busy: false }),
        });
        let mut round = Round {
            files: Arc::new(SlowFiles { inner: fs_opener(), budget: Arc::clone(&budget) }),
            registry: Arc::clone(registry),
            retention: Arc::clone(retention),
            budget,
            found: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("scrub".to_owned())
            .spawn(move || round.run(settings.pause))
            .context("no thread for the scrub")?;
        Ok(Some(Self { stopping, thread }))
    }

    /// Ends it. Blocks for as long as one read takes.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        if self.thread.join().is_err() {
            tracing::error!("the scrub panicked; nothing else is touched by that");
        }
    }
}

/// How fast may be read.
struct Budget {
    bytes_per_second: u64,
    stopping: Arc<AtomicBool>,
    registry: Arc<Registry>,
    look: Mutex<Look>,
}

struct Look {
    at: Instant,
    counted: u64,
    busy: bool,
}

/// The daemon stops.
#[derive(Debug, thiserror::Error)]
#[error("the scrub stops with the daemon")]
struct Stopped;

impl Budget {
    /// Waits for as long as `bytes` may take.
    fn take(&self, bytes: u64) -> Result<(), Stopped> {
        let span = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.sleep(if self.is_busy() { span * YIELD } else { span })
    }

    fn sleep(&self, span: Duration) -> Result<(), Stopped> {
        let end = Instant::now() + span;
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return Err(Stopped);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(NAP));
        }
    }

    /// Whether something was received since the last look.
    fn is_busy(&self) -> bool {
        let mut look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        if look.at.elapsed() >= LOOK_EVERY {
            let disks = self.registry.disks();
            let counted = disks.iter().filter_map(|disk| disk.status.as_ref());
            let counted = counted.map(|status| status.counters().wire_bytes).sum();
            look.busy = counted != look.counted;
            (look.at, look.counted) = (Instant::now(), counted);
        }
        look.busy
    }
}

/// One round after the other.
struct Round {
    files: Arc<dyn Files>,
    registry: Arc<Registry>,
    retention: Arc<Retention>,
    budget: Arc<Budget>,
    /// Findings of the round that goes on.
    found: BTreeMap<DiskId, ScrubState>,
}

/// A segment of the redo log that is read, or why it cannot be opened.
struct OpenSegment {
    number: u64,
    file: Result<Box<dyn BlockFile>, String>,
}

impl Round {
    fn run(&mut self, pause: Duration) {
        loop {
            self.found.clear();
            let begun = Instant::now();
            let mut is_whole = true;
            for part in [Self::own, Self::indexes, Self::runs, Self::entries, Self::targets] {
                match part(self) {
                    Ok(()) => {}
                    Err(error) if error.is::<Stopped>() => return,
                    // Stopping shows in the middle of a read as an error of that.
                    Err(_) if self.budget.stopping.load(Ordering::Acquire) => return,
                    Err(error) => {
                        is_whole = false;
                        tracing::warn!(%error, "a part of a scrub round could not be ended");
                    }
                }
            }
            self.publish(begun, is_whole);
            if self.budget.sleep(pause).is_err() {
                return;
            }
        }
    }

    /// Superblock and manifest: what they say is known in memory, so they are written anew.
    fn own(&mut self) -> anyhow::Result<()> {
        let folder = self.retention.folder().to_owned();
        if check_own(&*self.files, &folder).is_empty() && self.retention.lock().get()?.has_own_superblock() {
            return Ok(());
        }
        self.budget.take(0)?; // what a stop interrupts is no damage
        let healed = self.retention.lock().get()?.heal_own(wall_clock());
        match healed {
            Ok(damage) => {
                for damage in damage {
                    tracing::error!(
                        path = %damage.path.display(), offset = damage.offset, reason = damage.reason,
                        "the retention journal was damaged there; it was written anew and is whole"
                    );
                }
            }
            Err(error) => {
                let what = format!(
                    "superblock or manifest of the retention journal at {} is damaged and could not be written anew ({error}): do not stop the master target before that is mended",
                    folder.display()
                );
                let disks: Vec<DiskId> = self.retention.shape().disks.keys().copied().collect();
                disks.into_iter().for_each(|disk| self.find(disk, what.clone()));
            }
        }
        Ok(())
    }

    fn indexes(&mut self) -> anyhow::Result<()> {
        let places = self.retention.lock().get()?.index_places();
        for place in places {
            let wrong = match check_index(&*self.files, &place) {
                Ok(wrong) => wrong.map(|error| error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            self.budget.take(0)?;
            if let Some(reason) = wrong
                && self.retention.lock().get()?.has_segment(place.segment)
            {
                tracing::warn!(
                    path = %place.path.display(), reason,
                    "the index of a segment of the redo log is damaged; nothing is lost: the next start reads the segment"
                );
            }
        }
        Ok(())
    }

    fn runs(&mut self) -> anyhow::Result<()> {
        let places = self.retention.lock().get()?.run_places()?;
        for place in places {
            match check_run(&*self.files, &place) {
                Ok(check) => {
                    self.read(place.disk, check.bytes);
                    let found = check.found();
                    let lost: u64 = check.lost.iter().map(|blocks| blocks.len()).sum();
                    if lost > 0 {
                        let what = format!(
                            "undo run {} lacks {} bytes of older points: they were damaged before runs were made one; choose other points",
                            place.path.display(),
                            lost * BLOCK_BYTES
                        );
                        self.find_run(&place, what)?;
                    }
                    for hole in check.holes {
                        let lost: u64 = hole.lost.iter().map(|blocks| blocks.len()).sum();
                        let what = format!(
                            "undo run {} is damaged at byte {} ({}): {} bytes of older points are lost; restore the file, or choose newer points",
                            place.path.display(),
                            hole.file.start,
                            hole.reason,
                            lost * BLOCK_BYTES
                        );
                        self.find_run(&place, what)?;
                    }
                    rot::note_run(&self.retention, &place, found, true)?;
                }
                Err(error) => {
                    self.budget.take(0)?;
                    self.find_run(&place, error.to_string())?;
                    self.unreadable_run(&place, &error)?;
                }
            }
        }
        Ok(())
    }

    /// A run that cannot be read to its end: what is left of it is found out image by image.
    fn unreadable_run(&self, place: &RunPlace, error: &JournalError) -> anyhow::Result<()> {
        if !is_damage(error) {
            return Ok(());
        }
        let blocks = match unreadable(&*self.files, place) {
            Ok(blocks) => blocks,
            Err(_) => {
                let shape = self.retention.shape();
                shape.disks.get(&place.disk).map(DiskShape::whole).into_iter().collect()
            }
        };
        self.budget.take(0)?; // what a stop interrupts is no damage
        let cause = error.to_string();
        let found = blocks.into_iter().map(|blocks| Found { blocks, cause: cause.clone() }).collect();
        Ok(rot::note_run(&self.retention, place, found, true)?)
    }

    fn find_run(&mut self, place: &RunPlace, what: String) -> anyhow::Result<()> {
        if self.retention.lock().get()?.has_run(place) {
            self.find(place.disk, what);
        }
        Ok(())
    }

    fn entries(&mut self) -> anyhow::Result<()> {
        let places = self.retention.lock().get()?.entry_places();
        let mut decompressor = Decompressor::new()?;
        let mut open: Option<OpenSegment> = None;
        // Once for each disk, not for each entry.
        let mut unopened = BTreeMap::new();
        for place in places {
            let segment = place.place.segment;
            if open.as_ref().is_none_or(|open| open.number != segment) {
                if !self.retention.lock().get()?.has_segment(segment) {
                    continue;
                }
                let opened = self.files.open(&place.path, false);
                let file = opened.map_err(|error| error.to_string());
                open = Some(OpenSegment { number: segment, file });
            }
            let Some(open) = &mut open else { continue };
            let file = match &mut open.file {
                Ok(file) => file,
                Err(error) => {
                    self.budget.take(0)?;
                    let what = format!(
                        "a part of the redo log is not there ({error}): restore it, or the points inside the undo epochs that it holds are lost"
                    );
                    if self.retention.lock().get()?.has_segment(segment) {
                        unopened.insert(place.disk, what);
                    }
                    continue;
                }
            };
            let wrong = match check_entry(&mut **file, &place, &mut decompressor) {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => {
                    self.budget.take(0)?;
                    Some(error.to_string())
                }
            };
            self.read(place.disk, place.place.bytes);
            if let Some(wrong) = &wrong
                && self.retention.lock().get()?.has_segment(segment)
            {
                let what = format!(
                    "entry {} in {} at byte {} is damaged ({wrong}): it is on the target, but points inside its undo epoch are lost from it on; choose the end of an undo epoch",
                    place.number,
                    place.path.display(),
                    place.place.offset
                );
                self.find(place.disk, what);
            }
            self.retention.lock().get()?.note_entry(&place, wrong.as_deref(), wall_clock())?;
        }
        unopened.into_iter().for_each(|(disk, what)| self.find(disk, what));
        Ok(())
    }

    fn targets(&mut self) -> anyhow::Result<()> {
        for view in self.registry.disks() {
            let Some(status) = view.status.filter(|status| status.snapshot().mode == PassMode::Done) else {
                continue;
            };
            let disk = DiskId::parse(&view.record.disk)?;
            let size = status.snapshot().size_sectors * SECTOR_BYTES;
            let mut different: Vec<ByteRange> = Vec::new();
            let mut at = 0;
            while at < size {
                let range = ByteRange { start: at, end: size.min(at + PIECE_BYTES) };
                self.budget.take(range.len())?;
                if !self.piece(disk, range, &mut different)? {
                    break; // the disk stands, or has no before-images yet
                }
                self.read(disk, range.len());
                at = range.end;
            }
            for range in different {
                let what = format!(
                    "the target {} differs at bytes {} to {} from what was written there: somebody else wrote it, or it is rotten; older points lack the change too. Compare the disk with its source",
                    view.record.path.display(),
                    range.start,
                    range.end
                );
                self.find(disk, what);
            }
        }
        Ok(())
    }

    /// A piece of a target; answers whether the disk can be read on.
    fn piece(
        &mut self,
        disk: DiskId,
        range: ByteRange,
        different: &mut Vec<ByteRange>,
    ) -> anyhow::Result<bool> {
        let Some((inputs, _)) = self.registry.disk_inputs(disk) else { return Ok(false) };
        let Ok(Some(answer)) = inputs.look(move |store| store.map(|store| store.scrub(range))) else {
            return Ok(false);
        };
        match answer {
            Ok(None) => return Ok(false),
            Ok(Some(checked)) => {
                for blocks in checked.different {
                    let found =
                        ByteRange { start: blocks.start * BLOCK_BYTES, end: blocks.end * BLOCK_BYTES };
                    match different.last_mut() {
                        Some(last) if last.end == found.start => last.end = found.end,
                        _ => different.push(found),
                    }
                }
            }
            Err(error) => self.find(disk, format!("bytes {} to {}: {error}", range.start, range.end)),
        }
        Ok(true)
    }

    fn read(&mut self, disk: DiskId, bytes: u64) {
        self.found.entry(disk).or_default().read_bytes += bytes;
    }

    /// Says it at once, and keeps it for the end of the round.
    fn find(&mut self, disk: DiskId, what: String) {
        let status = self.status(disk);
        let known = status.as_ref().is_some_and(|status| status.scrub().findings.contains(&what));
        if !known {
            tracing::error!(%disk, "{what}");
        }
        let findings = &mut self.found.entry(disk).or_default().findings;
        if findings.len() < FINDINGS_MAX {
            findings.push(what.clone());
        }
        if let Some(status) = status.filter(|_| !known) {
            status.update_scrub(|scrub| {
                if scrub.findings.len() < FINDINGS_MAX {
                    scrub.findings.push(what);
                }
            });
        }
    }

    fn status(&self, disk: DiskId) -> Option<Arc<crate::disk_status::DiskStatus>> {
        let name = disk.to_string();
        self.registry.disks().into_iter().find(|view| view.record.disk == name)?.status
    }

    /// What a round found that is not whole was said when it was found, beside what was known before.
    fn publish(&mut self, begun: Instant, is_whole: bool) {
        let mut bytes = 0;
        for (disk, found) in std::mem::take(&mut self.found) {
            bytes += found.read_bytes;
            if let Some(status) = self.status(disk) {
                status.update_scrub(|scrub| {
                    scrub.read_bytes += found.read_bytes;
                    if is_whole {
                        scrub.rounds += 1;
                        scrub.findings = found.findings;
                    }
                });
            }
        }
        tracing::debug!(bytes, seconds = begun.elapsed().as_secs(), "a scrub round ended");
    }
}

/// Whether an error of reading says something about what was to be read, and not about us.
const fn is_damage(error: &JournalError) -> bool {
    matches!(error, JournalError::Undo(error) if !matches!(error, UndoError::Memory(_) | UndoError::Compress(_)))
        || matches!(error, JournalError::Files(_) | JournalError::Block(_))
}

/// Files that are read no faster than the budget allows, and never written.
struct SlowFiles {
    inner: Arc<dyn Files>,
    budget: Arc<Budget>,
}

fn not_written(path: &Path) -> FilesError {
    FilesError::system("write", path, std::io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Files for SlowFiles {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        self.inner.facts(path)
    }
    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        self.inner.neighbours(path)
    }
    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, FilesError> {
        self.inner.free_bytes(path)
    }
    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        self.inner.read_head(path, bytes_max)
    }
    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        if writable {
            return Err(not_written(path));
        }
        let (file, budget) = (self.inner.open(path, false)?, Arc::clone(&self.budget));
        Ok(Box::new(SlowFile { file, budget, name: path.display().to_string() }))
    }
    fn create(&self, path: &Path, _: u64) -> Result<(), FilesError> {
        Err(not_written(path))
    }
    fn resize(&self, path: &Path, _: u64) -> Result<(), FilesError> {
        Err(not_written(path))
    }
    fn replace(&self, path: &Path, _: &[u8]) -> Result<(), FilesError> {
        Err(not_written(path))
    }
    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        Err(not_written(path))
    }
    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        Err(not_written(path))
    }

    fn set_aside(&self, path: &Path, _: &str) -> Result<PathBuf, FilesError> {
        Err(not_written(path))
    }
}

struct SlowFile {
    file: Box<dyn BlockFile>,
    budget: Arc<Budget>,
    name: String,
}

impl BlockFile for SlowFile {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let len = reads.iter().map(|read| read.data.len() as u64).sum();
        self.budget.take(len).map_err(|stopped| BlockError {
            name: self.name.clone(),
            op: BlockOp::Read,
            offset: reads.first().map_or(0, |read| read.offset),
            len,
            source: std::io::Error::other(stopped),
        })?;
        self.file.read(reads)
    }
    fn write(&mut self, _: &[WriteAt<'_>]) -> Result<(), BlockError> {
        Err(self.refused(BlockOp::Write))
    }
    fn zero(&mut self, _: ByteRange) -> Result<(), BlockError> {
        Err(self.refused(BlockOp::Zero))
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}

impl SlowFile {
    fn refused(&self, op: BlockOp) -> BlockError {
        let source = std::io::ErrorKind::ReadOnlyFilesystem.into();
        BlockError { name: self.name.clone(), op, offset: 0, len: 0, source }
    }
}
