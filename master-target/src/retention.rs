//! The retention journal of a running master target: one log for all disks, committed for all of them at once.
//!
//! A disk's thread adds entries under the lock, then waits for a commit; the committer takes all that were added
//! meanwhile with one write and one flush. After a pause it writes an empty group, which proves the last one durable.
//! Between commits it keeps house: free segments ahead of need, segments and undo epochs that are past their time.
//!
//! Invariants: what [`Retention::commit`] answered for is durable; a failed commit stops every disk of the journal (I6);
//! only the log is held while it is flushed, no target is. Units: bytes, times by the target's clock.
//! Started by `daemon`, used by the disks' threads and by commands.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use reprotect_engine::format::manifest::{Edit, EpochsExpired};
use reprotect_engine::format::segment::JournalId;
use reprotect_engine::io::durable::create_dir_durable;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::crc_map::map_path;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::{
    DiskShape, Journal, JournalError, JournalSettings, Recovered, RunFile, Shape,
};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::scrub::ScrubSettings;

/// After this pause the last group is proven durable by an empty one.
const SEAL_AFTER: Duration = Duration::from_millis(50);
/// How often old segments and epochs are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// Segments kept free ahead of need, the one for control entries included.
const FREE_SEGMENTS: usize = 2;

/// What the operator chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionSettings {
    /// An undo epoch is closed at the first mark after this long.
    pub undo_epoch: Duration,
    /// The redo log is kept this long: within it every mark can be had, and every write where they were ordered.
    pub any_write: Duration,
    /// Points are kept this long.
    pub keep: Duration,
    /// Length of a log segment in bytes.
    pub segment_bytes: u64,
    /// How what lies still is read again.
    pub scrub: ScrubSettings,
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
    journal: Mutex<Option<Journal>>,
    settings: RetentionSettings,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl std::fmt::Debug for Retention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retention").field("settings", &self.settings).finish_non_exhaustive()
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
        let (journal, progress) = (Mutex::new(Some(journal)), Mutex::default());
        Ok((Arc::new(Self { journal, settings, progress, changed: Condvar::new() }), recovered))
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

    /// What the operator chose.
    #[must_use]
    pub const fn settings(&self) -> &RetentionSettings {
        &self.settings
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
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut kept_house = std::time::Instant::now();
        loop {
            let (upto, stopping) = self.wait_for_work(if sealed { HOUSEKEEPING } else { SEAL_AFTER });
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
            if kept_house.elapsed() >= HOUSEKEEPING {
                kept_house = std::time::Instant::now();
                if let Err(error) = self.keep_house(wall_clock()) {
                    tracing::warn!(%error, "the retention journal could not be tidied up");
                }
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

    /// Gives back what nobody needs, and makes room ahead of need.
    fn keep_house(&self, now: Timestamp) -> Result<(), JournalError> {
        let old = now.0.saturating_sub(nanos(self.settings.any_write));
        loop {
            let mut locked = self.lock();
            let journal = locked.get()?;
            let Some(number) = journal.releasable().first().copied() else { break };
            if journal.newest_in(number).is_some_and(|newest| newest.0 > old) {
                break;
            }
            journal.release(number, now)?;
        }
        self.expire(now)?;
        self.with(|journal, _| match journal.prepare(FREE_SEGMENTS) {
            // Without free segments replication goes on in those there are, then waits; that is said where it waits.
            Err(error) if error.is_full() => Ok(()),
            prepared => prepared,
        })
    }

    /// Forgets undo epochs whose newest point is past its time: one edit, then the files go.
    fn expire(&self, now: Timestamp) -> Result<(), JournalError> {
        let old = Timestamp(now.0.saturating_sub(nanos(self.settings.keep)));
        let mut locked = self.lock();
        let journal = locked.get()?;
        let disks: Vec<(DiskId, DiskShape)> =
            journal.shape().disks.iter().map(|(disk, shape)| (*disk, shape.clone())).collect();
        for (disk, shape) in disks {
            let Some(through) = expired(&shape, old) else { continue };
            let files: Vec<RunFile> =
                shape.runs.iter().filter(|run| run.last <= through).map(|run| run.file).collect();
            let gone = shape.points.values().filter(|point| point.epoch <= through);
            let mut edits: Vec<Edit> = gone
                .map(|point| {
                    Edit::PointDropped(reprotect_engine::format::manifest::PointDropped {
                        disk,
                        point: point.point,
                    })
                })
                .collect();
            edits.push(Edit::EpochsExpired(EpochsExpired { disk, through }));
            journal.edit(&edits, now)?;
            for file in files {
                journal.files().remove(&run_path(journal, disk, file))?;
            }
        }
        Ok(())
    }

    /// Commits what is left and closes the journal; the disks have stopped.
    pub fn close(&self, committer: std::thread::JoinHandle<()>) {
        self.progress().stopping = true;
        self.changed.notify_all();
        if committer.join().is_err() {
            tracing::error!("the committer of the retention journal panicked");
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

/// The newest epoch of a disk that is past its time, with all epochs before it; a pinned point keeps its own and all
/// later ones, for its view needs them.
fn expired(shape: &DiskShape, old: Timestamp) -> Option<u64> {
    let pinned = shape.points.values().filter(|point| point.pinned).map(|point| point.epoch).min();
    let past = shape.epochs.iter().take_while(|epoch| epoch.closed.is_some_and(|closed| closed.time < old));
    let free = past.map(|epoch| epoch.opened.epoch).take_while(|epoch| pinned.is_none_or(|pin| *epoch < pin));
    free.filter(|epoch| !shape.runs.iter().any(|run| run.first <= *epoch && run.last > *epoch)).last()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
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
    for path in &found.set_aside {
        tracing::warn!(path = %path.display(), "a file that belongs to nothing was moved aside");
    }
}
