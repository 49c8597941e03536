//! The retention journal of a running master target: one log for all disks, committed for all of them at once.
//!
//! A disk's thread adds entries under the lock, then waits for a commit; the committer takes all that were added
//! meanwhile with one write and one flush. After a pause it writes an empty group, which proves the last one durable.
//! `housekeeping` gives back what is past its time, on a thread of its own.
//!
//! Invariants: what [`Retention::commit`] answered for is durable; a failed commit stops every disk of the journal (I6);
//! only the log is held while it is flushed, no target is; a point somebody reads is held until it is let go,
//! and the log below it unless the drive is nearly full.
//! Units: bytes, times by the target's clock. Started by `daemon`, used by the disks' threads and by commands.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use reprotect_engine::format::segment::JournalId;
use reprotect_engine::io::durable::create_dir_durable;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::crc_map::map_path;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::ladder::{Ladder, Pressure};
use reprotect_engine::store::journal::rollback::goes_to;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings, Recovered, RunFile, Shape};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::housekeeping::Room;
use crate::journaled::back::unfinished;
use crate::pinned::loss_text;
use crate::rot::note_error;
use crate::scrub::ScrubSettings;
use crate::staying::{self, FailingBack};

/// After this pause the last group is proven durable by an empty one.
const SEAL_AFTER: Duration = Duration::from_millis(50);
/// An undo run that cannot be read is tried again to be merged after so long: a medium may come back.
const MERGE_AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// How long the committer sleeps when nothing comes.
const IDLE: Duration = Duration::from_secs(2);

/// What the operator chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionSettings {
    /// An undo epoch is closed at the first mark after this long.
    pub undo_epoch: Duration,
    /// How long what is kept; may be changed while it runs.
    pub ladder: Ladder,
    /// Length of a log segment in bytes.
    pub segment_bytes: u64,
    /// Bytes of the drive that stay free, so that a full one can still recover and expire.
    pub reserve_bytes: u64,
    /// How what lies still is read again.
    pub scrub: ScrubSettings,
}

/// A disk that is to let go of its part of the log.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// At how many looks it was asked.
    looks: u32,
    /// It would, and the retention drive has no room for it.
    is_hindered: bool,
}

#[derive(Debug, Default)]
struct Progress {
    requested: u64,
    done: u64,
    failed: Option<String>,
    stopping: bool,
}

/// The journal, shared by all disks.
pub struct Retention {
    folder: PathBuf,
    journal: Mutex<Option<Journal>>,
    settings: RetentionSettings,
    ladder: Mutex<Ladder>,
    pressure: Mutex<Pressure>,
    /// Disks that keep the log from being given back.
    asked: Mutex<BTreeMap<DiskId, Asked>>,
    /// Points that are held now, by who holds them.
    held: Mutex<BTreeMap<u64, Held>>,
    /// The segment of which what pins need could not be read, and at how many looks it could not.
    unreadable: Mutex<(u64, u32)>,
    /// How many open disks now.
    opening: AtomicU32,
    /// Rollbacks are to end on their way.
    interrupted: AtomicBool,
    failing_back: Mutex<FailingBack>,
    /// Undo runs that could not be read to be merged, and when.
    passed_over: Mutex<BTreeMap<(DiskId, RunFile), Instant>>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl std::fmt::Debug for Retention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retention").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Disks are being opened; see [`Retention::opening`].
pub struct Opening(Arc<Retention>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.opening.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The locked journal.
pub struct Locked<'a>(MutexGuard<'a, Option<Journal>>);

impl Locked<'_> {
    /// The journal.
    ///
    /// # Errors
    /// When the daemon is stopping.
    pub fn get(&mut self) -> Result<&mut Journal, JournalError> {
        self.0.as_mut().ok_or_else(|| JournalError::Failed {
            path: "the journal".into(),
            why: "it was closed because the daemon stops".to_owned(),
        })
    }
}

impl Retention {
    /// Opens the journal in a folder, or makes one where the folder is empty or missing.
    ///
    /// # Errors
    /// When it cannot be opened; the text says why and what to do.
    pub fn open(
        files: Arc<dyn Files>,
        folder: &Path,
        settings: RetentionSettings,
    ) -> anyhow::Result<(Arc<Self>, Recovered)> {
        create_dir_durable(folder)
            .with_context(|| format!("the retention folder {} cannot be made", folder.display()))?;
        let layout = JournalSettings { segment_bytes: settings.segment_bytes };
        let now = wall_clock();
        let (journal, recovered) = match Journal::open(Arc::clone(&files), folder, layout, now) {
            Err(JournalError::NoJournal { .. }) => {
                tracing::info!(folder = %folder.display(), "a new retention journal is made");
                (Journal::create(files, folder, layout, now)?, Recovered::default())
            }
            opened => opened?,
        };
        report(&recovered);
        let retention = Self {
            folder: folder.to_owned(),
            journal: Mutex::new(Some(journal)),
            ladder: Mutex::new(settings.ladder.clone()),
            settings,
            pressure: Mutex::default(),
            asked: Mutex::default(),
            held: Mutex::default(),
            unreadable: Mutex::default(),
            opening: AtomicU32::new(0),
            interrupted: AtomicBool::new(false),
            failing_back: Mutex::default(),
            passed_over: Mutex::default(),
            progress: Mutex::default(),
            changed: Condvar::new(),
        };
        Ok((Arc::new(retention), recovered))
    }

    /// Starts the committer.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let this = Arc::clone(self);
        std::thread::Builder::new().name("committer".to_owned()).spawn(move || {
            // Disks that wait for a commit must learn that none will come.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| this.run())) {
                tracing::error!(?panic, "a defect of the master target stopped the retention journal");
                this.progress().failed = Some("a defect of the master target stopped it".to_owned());
                this.changed.notify_all();
            }
        })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How what lies still is read again.
    #[must_use]
    pub const fn scrub(&self) -> ScrubSettings {
        self.settings.scrub
    }

    /// Length of an undo epoch.
    #[must_use]
    pub const fn undo_epoch(&self) -> Duration {
        self.settings.undo_epoch
    }

    /// Length of a segment of the log.
    #[must_use]
    pub const fn segment_bytes(&self) -> u64 {
        self.settings.segment_bytes
    }

    /// Bytes of the drive that stay free.
    #[must_use]
    pub const fn reserve_bytes(&self) -> u64 {
        self.settings.reserve_bytes
    }

    /// Bytes of the drive that may be used now; `None` where the system does not say.
    ///
    /// # Errors
    /// When the drive cannot be asked.
    pub(crate) fn usable_bytes(&self) -> Result<Option<u64>, JournalError> {
        let files = Arc::clone(self.lock().get()?.files());
        let Some(free_bytes) = files.free_bytes(&self.folder.join("any"))? else { return Ok(None) };
        let occupied = Room::of(&self.folder).map_or(0, |room| room.total_bytes - room.free_bytes);
        let room = Room { free_bytes, total_bytes: free_bytes.saturating_add(occupied) };
        Ok(Some(room.usable_bytes(self.settings.reserve_bytes)))
    }

    /// How long what is kept.
    #[must_use]
    pub fn ladder(&self) -> Ladder {
        unpoisoned(&self.ladder).clone()
    }

    /// From now on this is kept.
    pub fn set_ladder(&self, ladder: Ladder) {
        *unpoisoned(&self.ladder) = ladder;
    }

    /// How full the drive is.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        *unpoisoned(&self.pressure)
    }

    /// Answers what it was before.
    pub(crate) fn set_pressure(&self, pressure: Pressure) -> Pressure {
        std::mem::replace(&mut *unpoisoned(&self.pressure), pressure)
    }

    /// These disks, and no others, are to let go of their part of the log.
    pub(crate) fn ask_back(&self, disks: &BTreeSet<DiskId>) {
        let mut asked = unpoisoned(&self.asked);
        asked.retain(|disk, _| disks.contains(disk));
        for disk in disks {
            asked.entry(*disk).or_default().looks += 1;
        }
    }

    /// The fewest looks at which one of these disks was asked.
    pub(crate) fn looks(&self, disks: &BTreeSet<DiskId>) -> u32 {
        let asked = unpoisoned(&self.asked);
        disks.iter().map(|disk| asked.get(disk).map_or(0, |asked| asked.looks)).min().unwrap_or(0)
    }

    /// A disk that is to let go cannot, for the retention drive has no room for it.
    pub(crate) fn hinder(&self, disk: DiskId) {
        if let Some(asked) = unpoisoned(&self.asked).get_mut(&disk) {
            asked.is_hindered = true;
        }
    }

    /// Whether a disk that is to let go is kept from it by the retention drive.
    pub(crate) fn is_hindered(&self, disk: DiskId) -> bool {
        unpoisoned(&self.asked).get(&disk).is_some_and(|asked| asked.is_hindered)
    }

    /// Something came free: disks that were hindered are asked anew.
    pub(crate) fn ask_hindered_again(&self) {
        for asked in unpoisoned(&self.asked).values_mut().filter(|asked| asked.is_hindered) {
            *asked = Asked::default();
        }
    }

    /// Whether a disk is to let go of its part of the log.
    pub(crate) fn is_asked(&self, disk: DiskId) -> bool {
        unpoisoned(&self.asked).contains_key(&disk)
    }

    /// A disk has let go.
    pub(crate) fn let_go(&self, disk: DiskId) {
        unpoisoned(&self.asked).remove(&disk);
    }

    /// What the journal knows to be wrong with disks, for people: a rollback that did not get to its end yet, or what is
    /// lost and was not made up for by a compare.
    #[must_use]
    pub fn losses(&self) -> BTreeMap<DiskId, String> {
        let mut locked = self.lock();
        let Ok(journal) = locked.get() else { return BTreeMap::new() };
        let disks: Vec<DiskId> = journal.shape().disks.keys().copied().collect();
        let text = |disk| unfinished(journal, disk).or_else(|| loss_text(journal, disk));
        disks.iter().filter_map(|disk| Some((*disk, text(*disk)?))).collect()
    }

    /// Why nothing is taken in.
    pub(crate) fn no_room(&self) -> String {
        let stays = self.stays().map_or_else(String::new, |stays| format!("; {stays}"));
        format!("the retention drive at {} is full{stays}", self.folder.display())
    }

    /// What only a person can let go of, for people whose drive is short; `None` where nothing is.
    pub(crate) fn stays(&self) -> Option<String> {
        let (ladder, pressure) = (self.ladder(), self.pressure());
        let failbacks = unpoisoned(&self.failing_back).text();
        let mut locked = self.lock();
        let others = staying::text(locked.get().ok()?, &ladder, pressure, wall_clock());
        let all: Vec<String> = failbacks.into_iter().chain(others).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Machines for whose failbacks points are held: that are to be finished, and that are done and may be taken back.
    pub(crate) fn set_failing_back(&self, to_finish: BTreeSet<String>, away: BTreeSet<String>) {
        *unpoisoned(&self.failing_back) = FailingBack { to_finish, away };
    }

    /// One more look at which what pins need of a segment could not be read; answers how many there were.
    pub(crate) fn could_not_read(&self, segment: u64) -> u32 {
        let mut unreadable = unpoisoned(&self.unreadable);
        *unreadable = (segment, if unreadable.0 == segment { unreadable.1 + 1 } else { 1 });
        unreadable.1
    }

    /// An undo run could not be read to be merged: for a while others are.
    pub(crate) fn pass_over(&self, disk: DiskId, run: RunFile) {
        unpoisoned(&self.passed_over).insert((disk, run), Instant::now());
    }

    /// The undo runs of a disk that are not to be merged now.
    pub(crate) fn passed_over(&self, disk: DiskId) -> Vec<RunFile> {
        let mut passed = unpoisoned(&self.passed_over);
        passed.retain(|_, at| at.elapsed() < MERGE_AGAIN_AFTER);
        passed.keys().filter(|(of, _)| *of == disk).map(|(_, run)| *run).collect()
    }

    /// While somebody opens disks by what a start found in the log: it stays in its place, and a disk that is not open yet
    /// is not taken for one that stands.
    #[must_use]
    pub fn opening(self: &Arc<Self>) -> Opening {
        self.opening.fetch_add(1, Ordering::AcqRel);
        Opening(Arc::clone(self))
    }

    /// Whether disks are being opened.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening.load(Ordering::Acquire) > 0
    }

    /// Rollbacks end on their way from now on, for the daemon stops: who waits for their disks does not wait for hours. They are
    /// gone on with by the next start.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
    }

    /// Whether rollbacks are to end on their way.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }

    /// Holds a point while somebody reads it: its runs are neither merged away nor forgotten, and what it needs of the log
    /// stays there, unless the drive is nearly full.
    pub fn hold(self: &Arc<Self>, disk: DiskId, at: At) -> Hold {
        self.hold_as(disk, at, Holds::ToRead)
    }

    /// As [`Self::hold`], while a disk goes back to it: it would stop on its way, so it is held however full the drive is.
    pub(crate) fn hold_to_go_back(self: &Arc<Self>, disk: DiskId, at: At) -> Hold {
        self.hold_as(disk, at, Holds::ToGoBack)
    }

    /// As [`Self::hold`], for as long as somebody wants to have it: of its runs only. Days may pass, and the log is
    /// everybody's; what a pinned point needs of it is carried on.
    pub(crate) fn hold_runs(self: &Arc<Self>, disk: DiskId, at: At) -> Hold {
        self.hold_as(disk, at, Holds::Runs)
    }

    fn hold_as(self: &Arc<Self>, disk: DiskId, at: At, holds: Holds) -> Hold {
        let mut held = unpoisoned(&self.held);
        let id = held.last_key_value().map_or(1, |(newest, _)| newest + 1);
        held.insert(id, Held { disk, at, holds });
        drop(held);
        Hold { retention: Arc::clone(self), id }
    }

    /// The points of a disk that are held now, and the one that a rollback goes to which did not get there yet: without it the
    /// rollback could never be finished. Who does away with something looks with the journal locked, and keeps it so until that is
    /// done: who holds a point plans its view afterwards.
    pub(crate) fn held(&self, journal: &Journal, disk: DiskId) -> Vec<At> {
        let goes_to = goes_to(journal, disk).ok().flatten();
        let held = unpoisoned(&self.held);
        held.values().filter(|held| held.disk == disk).map(|held| held.at).chain(goes_to).collect()
    }

    /// A point of a disk, opened. What is read of the log for that is read without the lock. Blocks.
    ///
    /// # Errors
    /// When it is not kept any more or damaged.
    pub fn view(&self, disk: DiskId, at: At) -> Result<View, JournalError> {
        let plan = View::plan(self.lock().get()?, disk, at)?;
        plan.open().inspect_err(|error| note_error(self, disk, error, (0, 0)))
    }

    /// The oldest segment of the log that must stay in its place: for what is read, as long as the drive is not nearly full,
    /// and for rollbacks that go on. What pins and a rollback that stopped on its way need is carried instead.
    /// Who gives something back looks with the journal locked, and keeps it so until that is done.
    pub(crate) fn oldest_held(&self, journal: &Journal) -> Option<u64> {
        let has_room = self.pressure() < Pressure::Least;
        let mut held: Vec<Held> = unpoisoned(&self.held).values().copied().collect();
        held.retain(|held| match held.holds {
            Holds::ToRead => has_room,
            Holds::ToGoBack => true,
            Holds::Runs => false,
        });
        held.iter().filter_map(|held| View::oldest_segment(journal, held.disk, held.at)).min()
    }

    /// The journal, for short changes and reads.
    pub fn lock(&self) -> Locked<'_> {
        // A panic elsewhere leaves the journal between two calls, never inside one that matters: the log is
        // append-only, and what was not committed is not acknowledged.
        Locked(self.journal.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The journal's identity; zeros once the daemon stops.
    #[must_use]
    pub fn id(&self) -> JournalId {
        self.lock().get().map(|journal| journal.id()).unwrap_or_default()
    }

    /// Forgets a disk whose threads have ended: its points and before-images go.
    ///
    /// # Errors
    /// When manifest or folder cannot be written.
    pub fn forget(&self, disk: DiskId) -> Result<(), JournalError> {
        let mut locked = self.lock();
        let journal = locked.get()?;
        let Some(shape) = journal.shape().disks.get(&disk).cloned() else { return Ok(()) };
        journal.remove_disk(disk, wall_clock())?;
        let open = shape.open_epoch().map(|epoch| RunFile::Epoch(epoch.opened.epoch));
        for file in shape.runs.iter().map(|run| run.file).chain(open) {
            journal.files().remove(&run_path(journal, disk, file))?;
        }
        journal.files().remove(&map_path(journal.folder(), disk))?;
        Ok(())
    }

    /// What the journal consists of now.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.lock().get().map(|journal| journal.shape().clone()).unwrap_or_default()
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        unpoisoned(&self.progress)
    }

    /// Waits until everything that this thread added is durable.
    ///
    /// # Errors
    /// When it cannot be made durable: the journal has failed.
    pub fn commit(&self) -> Result<(), JournalError> {
        let mut progress = self.progress();
        progress.requested += 1;
        let wanted = progress.requested;
        self.changed.notify_all();
        loop {
            if progress.done >= wanted {
                return Ok(());
            }
            if let Some(why) = &progress.failed {
                return Err(JournalError::Failed { path: "the journal".into(), why: why.clone() });
            }
            progress = self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        let mut sealed = true;
        loop {
            let (upto, stopping) = self.wait_for_work(if sealed { IDLE } else { SEAL_AFTER });
            let worked = match upto {
                Some(upto) => {
                    sealed = false;
                    self.commit_now(upto)
                }
                None if !sealed => {
                    sealed = true;
                    self.with(|journal, now| journal.seal(now))
                }
                None => Ok(()),
            };
            if let Err(error) = worked {
                tracing::error!(%error, "the retention journal has failed; every disk in it stops");
                self.progress().failed = Some(error.to_string());
                self.changed.notify_all();
                return;
            }
            if stopping && upto.is_none() {
                return;
            }
        }
    }

    fn wait_for_work(&self, pause: Duration) -> (Option<u64>, bool) {
        let mut progress = self.progress();
        if progress.requested == progress.done && !progress.stopping {
            let waited = self.changed.wait_timeout(progress, pause);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let upto = (progress.requested > progress.done).then_some(progress.requested);
        (upto, progress.stopping)
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&mut Journal, Timestamp) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        work(self.lock().get()?, wall_clock())
    }

    fn commit_now(&self, upto: u64) -> Result<(), JournalError> {
        self.with(|journal, now| journal.commit(now))?;
        self.progress().done = upto;
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the daemon stops.
    pub(crate) fn is_stopping(&self) -> bool {
        self.progress().stopping
    }

    /// Commits what is left and closes the journal; the disks have stopped.
    pub fn close(&self, threads: Vec<std::thread::JoinHandle<()>>) {
        self.progress().stopping = true;
        self.changed.notify_all();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the retention journal panicked");
            }
        }
        let journal = self.lock().0.take();
        let failed = self.progress().failed.is_some();
        if let Some(journal) = journal.filter(|_| !failed)
            && let Err(error) = journal.close(wall_clock())
        {
            tracing::error!(%error, "the retention journal could not be closed in order");
        }
    }
}

/// What is held of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// Its runs, and its part of the log unless the drive is nearly full.
    ToRead,
    /// Both, whatever happens.
    ToGoBack,
    /// Its runs.
    Runs,
}

/// A point that is held.
#[derive(Clone, Copy, Debug)]
struct Held {
    disk: DiskId,
    at: At,
    holds: Holds,
}

/// Somebody reads a point; dropped, it is let go.
#[must_use = "a point that is not held may be thinned away while it is read"]
pub struct Hold {
    retention: Arc<Retention>,
    id: u64,
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        unpoisoned(&self.retention.held).remove(&self.id);
    }
}

/// What these locks guard are single values: a panic elsewhere leaves them whole.
fn unpoisoned<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report(found: &Recovered) {
    for damage in &found.damage {
        tracing::error!(
            path = %damage.path.display(), offset = damage.offset, reason = damage.reason,
            "the retention journal is damaged; disks that lost entries are compared with their source"
        );
    }
    if let Some((path, offset)) = &found.torn {
        tracing::info!(path = %path.display(), offset, "the redo log ends in a torn write, as after a power cut");
    }
    if let Some(path) = &found.torn_manifest {
        tracing::warn!(
            path = %path.display(),
            "the manifest of the retention journal ended in a torn write, as after a power cut: what was being changed had not happened; the file is kept"
        );
    }
    if found.indexed > 0 {
        tracing::debug!(
            segments = found.indexed,
            "segments of the redo log were not read: they have an index"
        );
    }
    for index in &found.doubted {
        tracing::warn!(
            path = %index.path.display(), offset = index.offset, reason = index.reason,
            "the index of a segment of the redo log cannot be used; the segment was read instead"
        );
    }
    for path in &found.set_aside {
        tracing::warn!(path = %path.display(), "a file that belongs to nothing was moved aside");
    }
}
