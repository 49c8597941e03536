//! One disk of a journal: its target, its undo runs, and the order in which they are written.
//!
//! The order of a window, and why it is safe to crash anywhere in it:
//!
//! | step | what | if it ends here |
//! |---:|---|---|
//! | 1 | the entries are durable in the redo log | they are applied again |
//! | 2 | before-images of blocks not yet saved in this undo epoch go into its run | they are saved once, the first wins |
//! | 3 | the run is flushed (barrier 1) | nothing on the target has changed yet (I1) |
//! | 4 | its length is durable in the redo log: APPLIED with the number of before, where the run has grown | as above |
//! | 5 | the target is written, in address order | what it held is in the run; what is damaged there is known to be |
//! | 6 | the target is flushed (barrier 2) | applying again writes the same |
//! | 7 | APPLIED goes into the redo log | |
//!
//! Step 4 is what tells damage from a torn end: images that the log names were durable before the target was touched, and
//! one of them that cannot be read is lost, never cut. Nothing behind them has been overwritten.
//!
//! Invariants: I1 to I4. An undo epoch is closed when all its entries are applied and durably said to be. A failed write
//! or flush stops the disk (I6); what a full medium refused may be tried again, and `ongoing` sees to it that until then
//! nothing is written without its before-image. Units: sectors, bytes, entry numbers. Called by the thread that owns the target.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::capture::{Known, capture};
use super::entry::{Content, Write};
use super::error::{JournalError, random_u64};
use super::ongoing::{Ongoing, run_header};
use super::shape::{Epoch, Run, RunFile};
use super::undo::{ActiveRun, Hole, RunIdentity, SealedRun};
use super::view::At;
use super::window::Window;
use super::{DiskShape, Journal};
use crate::format::manifest::{DiskGrown, Edit, EpochCause, EpochClosed, EpochOpened, PointKept};
use crate::format::segment::Applied;
use crate::io::{BlockFile, ByteRange, WriteAt};
use crate::mutants::{Mutant, mutant};
use crate::units::{DiskId, Generation, LineageId, MonoTime, SECTOR_BYTES, Sequence, Timestamp};

/// Bytes written to the target in one call.
const WRITE_BYTES: usize = 8 << 20;

/// Which history an undo epoch belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The history.
    pub lineage: LineageId,
    /// The generation in force.
    pub generation: Generation,
    /// The last sequence before.
    pub sequence: Sequence,
}

/// A sealed run that nobody read for so long is closed: long enough that who reads a point again and again opens each run
/// once, however often [`Applier::close_runs`] is called meanwhile.
pub const RUN_IDLE_MAX: Duration = Duration::from_secs(60);

/// A sealed run that is read.
struct Opened {
    run: Run,
    sealed: SealedRun,
    /// When it was first looked whether somebody reads it, since somebody did.
    idle_since: Option<MonoTime>,
}

/// One disk of a journal.
pub struct Applier<T> {
    disk: DiskId,
    size_sectors: u64,
    target: T,
    ongoing: Ongoing,
    /// Sealed runs that are open because somebody reads a point, by their first epoch.
    sealed: BTreeMap<u64, Opened>,
    applied: Applied,
    /// Counts windows that changed the target: a reader of a view looks whether it moved under its feet.
    version: u64,
}

/// Path of an undo run.
#[must_use]
pub fn run_path(journal: &Journal, disk: DiskId, file: RunFile) -> PathBuf {
    journal.folder().join(run_name(disk, file))
}

/// Name of an undo run's file.
pub(super) fn run_name(disk: DiskId, file: RunFile) -> String {
    match file {
        RunFile::Epoch(epoch) => format!("undo-{disk}-{epoch:08}"),
        RunFile::Merged(number) => format!("undo-{disk}-m{number:08}"),
    }
}

/// Which disk's undo run a file is by its name.
pub(super) fn run_of_name(name: &str) -> Option<(DiskId, RunFile)> {
    let (disk, file) = name.strip_prefix("undo-")?.rsplit_once('-')?;
    let disk = DiskId::parse(disk).ok()?;
    let file = match file.strip_prefix('m') {
        Some(number) => RunFile::Merged(number.parse().ok()?),
        None => RunFile::Epoch(file.parse().ok()?),
    };
    (run_name(disk, file) == name).then_some((disk, file))
}

impl<T: BlockFile> Applier<T> {
    /// A disk of the journal with its target. `applied` is what the redo log says last. What is damaged in the open
    /// undo run is answered.
    ///
    /// # Errors
    /// When the disk is not in the journal, or its open run cannot be used.
    pub fn open(
        journal: &Journal,
        disk: DiskId,
        target: T,
        applied: Option<Applied>,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        Self::open_with(journal, disk, target, applied, Ongoing::open)
    }

    /// As [`Self::open`], for reading: no file is changed, and a window is not taken.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_to_read(
        journal: &Journal,
        disk: DiskId,
        target: T,
        applied: Option<Applied>,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        Self::open_with(journal, disk, target, applied, Ongoing::open_to_read)
    }

    fn open_with(
        journal: &Journal,
        disk: DiskId,
        target: T,
        applied: Option<Applied>,
        open: OpenOngoing,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        let shape = shape(journal, disk)?;
        let size_sectors = shape.size_sectors();
        let mut applied = applied.unwrap_or(Applied { number: 0, epoch: 0, undo_bytes: 0 });
        // An undo epoch is closed only when all of it is applied, whatever became of the entry that said so.
        applied.number = applied.number.max(shape.closed_through());
        let (ongoing, holes) = open(journal, shape, &applied)?;
        // What is applied from here on is applied in the epoch that goes on, though the log has not said so yet.
        if let Some(epoch) = shape.open_epoch().filter(|epoch| epoch.opened.epoch != applied.epoch) {
            applied = Applied { epoch: epoch.opened.epoch, undo_bytes: 0, ..applied };
        }
        Ok((
            Self { disk, size_sectors, target, ongoing, sealed: BTreeMap::new(), applied, version: 0 },
            holes,
        ))
    }

    /// What is on the target, flushed.
    #[must_use]
    pub const fn applied(&self) -> &Applied {
        &self.applied
    }

    /// The target.
    pub const fn target(&mut self) -> &mut T {
        &mut self.target
    }

    /// Gives the target back.
    pub fn into_target(self) -> T {
        self.target
    }

    /// Counts the windows that changed the target.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// The number of the undo epoch that goes on.
    #[must_use]
    pub fn open_epoch(&self) -> Option<u64> {
        self.ongoing.epoch()
    }

    /// Whether before-images are kept: nothing is written then while no undo epoch goes on.
    #[must_use]
    pub const fn is_tracked(&self) -> bool {
        self.ongoing.is_tracked()
    }

    /// What was found damaged in the open undo run since it was last asked: a full medium has it opened again.
    pub fn take_holes(&mut self) -> Vec<Hole> {
        self.ongoing.take_holes()
    }

    /// The target is larger, and the undo epoch that went on before was ended: from here on the disk has that size.
    ///
    /// # Errors
    /// When the target is not as large, an undo epoch goes on, or the manifest cannot be written.
    pub fn grow(
        &mut self,
        journal: &mut Journal,
        size_sectors: u64,
        now: Timestamp,
    ) -> Result<(), JournalError> {
        // Looked at here: a manifest that refuses an edit is not written to any more.
        let why = if self.target.size_bytes() != size_sectors * SECTOR_BYTES {
            Some(format!("the target has {} bytes, not {size_sectors} sectors", self.target.size_bytes()))
        } else if size_sectors <= self.size_sectors || self.open_epoch().is_some() {
            Some(format!("the disk has {} sectors, or its undo epoch goes on", self.size_sectors))
        } else {
            None
        };
        if let Some(why) = why {
            return Err(JournalError::Failed { path: journal.folder().into(), why });
        }
        // A start may have found the size in a cache only: it must not be said before it is certain.
        self.target.flush()?;
        let (disk, after) = (self.disk, self.applied.number);
        journal.edit(&[Edit::DiskGrown(DiskGrown { disk, size_sectors, after, time: now })], now)?;
        self.size_sectors = size_sectors;
        Ok(())
    }

    /// Begins an undo epoch: from here on, what is overwritten is saved first. Where the medium is too full for its run, that
    /// is made before the first window.
    ///
    /// # Errors
    /// When one goes on, or the manifest cannot be written.
    pub fn begin_epoch(
        &mut self,
        journal: &mut Journal,
        cause: EpochCause,
        position: Position,
        to: Option<At>,
        now: Timestamp,
    ) -> Result<u64, JournalError> {
        if let Some(epoch) = self.open_epoch() {
            // Looked at here: a manifest that refuses an edit is not written to any more.
            let why = format!("undo epoch {epoch} of disk {} goes on", self.disk);
            return Err(JournalError::Failed { path: journal.folder().into(), why });
        }
        let shape = shape(journal, self.disk)?;
        let newest = shape.epochs.last().map_or(shape.expired, |epoch| epoch.opened.epoch);
        let opened = EpochOpened {
            disk: self.disk,
            lineage: position.lineage,
            generation: position.generation,
            epoch: newest + 1,
            after: self.applied.number,
            sequence: position.sequence,
            salt: random_u64(journal.folder())?,
            time: now,
            to_epoch: to.map_or(0, |to| to.epoch),
            to_number: to.map_or(0, |to| to.number),
            cause,
            to_records: to.map_or(0, |to| to.records),
        };
        // The manifest comes first: so a run file without an epoch cannot exist, and an epoch without one is empty.
        let edited = journal.edit(&[Edit::EpochOpened(opened)], now);
        if self.epoch_of_shape(journal) == Some(opened.epoch) {
            self.ongoing.begin(journal, &opened, self.size_sectors);
            self.applied = Applied { epoch: opened.epoch, undo_bytes: 0, ..self.applied };
        }
        match edited {
            // Nothing of it was done.
            Err(error) if self.open_epoch().is_none() => return Err(error),
            edited => self.sure(edited)?,
        }
        match self.ongoing.run() {
            Err(error) if !error.is_full() => Err(error),
            _ => Ok(opened.epoch),
        }
    }

    /// The undo epoch that goes on, by the manifest.
    fn epoch_of_shape(&self, journal: &Journal) -> Option<u64> {
        let shape = shape(journal, self.disk).ok()?;
        shape.open_epoch().map(|epoch| epoch.opened.epoch)
    }

    /// An edit that failed, and that is part of the shape all the same, may be durable or not: nothing is built on it.
    fn sure(&mut self, edited: Result<(), JournalError>) -> Result<(), JournalError> {
        edited.inspect_err(|error| self.ongoing.fail(error.to_string()))
    }

    /// Seals the run of the undo epoch that goes on, which takes as long as its index is long and needs nothing of the
    /// journal: by who does not hold it before [`Self::close_epoch_at`], which does it otherwise.
    ///
    /// # Errors
    /// When the run cannot be written. Where the medium is full it may be tried again, and windows may come in between.
    pub fn seal_run(&mut self, now: Timestamp) -> Result<(), JournalError> {
        self.ongoing.seal(now).map(drop)
    }

    /// Ends the undo epoch. Everything applied in it was durably said to be (the caller committed).
    ///
    /// # Errors
    /// As for [`Self::seal_run`], and when the manifest cannot be written. The epoch goes on then.
    pub fn close_epoch(&mut self, journal: &mut Journal, now: Timestamp) -> Result<(), JournalError> {
        self.close_epoch_at(journal, None, now)
    }

    /// As [`Self::close_epoch`], and keeps the point at its end with the same write.
    ///
    /// # Errors
    /// As for [`Self::close_epoch`].
    pub fn close_epoch_at(
        &mut self,
        journal: &mut Journal,
        point: Option<PointKept>,
        now: Timestamp,
    ) -> Result<(), JournalError> {
        let Some(epoch) = self.open_epoch() else { return Ok(()) };
        let run_bytes = self.ongoing.seal(now)?;
        let closed = EpochClosed { disk: self.disk, epoch, last: self.applied.number, run_bytes, time: now };
        let edits: Vec<Edit> =
            std::iter::once(Edit::EpochClosed(closed)).chain(point.map(Edit::PointKept)).collect();
        let edited = journal.edit(&edits, now);
        if self.epoch_of_shape(journal) == Some(epoch) {
            return edited;
        }
        let path = self.ongoing.end();
        self.sure(edited)?;
        if let Some(path) = path.filter(|_| run_bytes == 0) {
            journal.files().remove(&path)?; // ours, empty, and no longer named
        }
        Ok(())
    }

    /// Applies a window: writes of consecutive entries up to `number`, all of them durable in the redo log, none of
    /// them beyond the undo epoch. Commits what is in the log already, and adds APPLIED to it, which the caller commits.
    ///
    /// # Errors
    /// When run, target or log cannot be written; the disk must then be opened anew.
    pub fn apply(
        &mut self,
        journal: &mut Journal,
        number: u64,
        window: &Window,
        now: Timestamp,
    ) -> Result<(), JournalError> {
        self.apply_over(journal, window, &[], now)?;
        let applied = self.applied_through(number);
        journal.append_applied(self.disk, applied, now)
    }

    /// Steps 2 to 6, by who has read parts of the target already; nothing else writes to it meanwhile.
    ///
    /// # Errors
    /// As for [`Self::apply`].
    pub(super) fn apply_over(
        &mut self,
        journal: &mut Journal,
        window: &Window,
        known: &[Known<'_>],
        now: Timestamp,
    ) -> Result<(), JournalError> {
        if let Some(named) = self.save_over(window, known)? {
            journal.append_applied(self.disk, named, now)?;
            journal.commit(now)?;
        }
        self.write_window(window)
    }

    /// Notes that a window up to `number` was written; answers what is to go into the log, step 7.
    pub fn applied_through(&mut self, number: u64) -> Applied {
        self.applied.number = number;
        if self.open_epoch().is_some() {
            self.applied.undo_bytes = self.ongoing.certain_bytes();
        }
        self.applied
    }

    /// Steps 2 and 3, for who does not hold the journal meanwhile. Answers what must be durable in the log before
    /// [`Self::write_window`], step 4; `None` where the images were there before.
    ///
    /// # Errors
    /// As for [`Self::apply`].
    pub fn save_images(&mut self, window: &Window) -> Result<Option<Applied>, JournalError> {
        self.save_over(window, &[])
    }

    /// As [`Self::save_images`], by who has read parts of the target already; nothing else writes to it meanwhile.
    ///
    /// # Errors
    /// As for [`Self::apply`].
    pub(super) fn save_over(
        &mut self,
        window: &Window,
        known: &[Known<'_>],
    ) -> Result<Option<Applied>, JournalError> {
        if window.is_empty() && self.open_epoch().is_none() {
            return Ok(None); // marks need no epoch
        }
        let Some(run) = self.ongoing.run()? else { return Ok(None) };
        capture(&mut self.target, run, self.size_sectors, window, known)?;
        if !run.is_flushed() && !mutant(Mutant::UndoUnflushed) {
            run.flush()?; // barrier 1
        }
        let (undo_bytes, is_empty) = (run.len_bytes(), run.counts().0 == 0);
        self.ongoing.flushed(undo_bytes);
        // Named until an APPLIED says so: what was to name it may have met a full medium.
        let named = Applied { undo_bytes, ..self.applied };
        Ok((!is_empty && undo_bytes != self.applied.undo_bytes).then_some(named))
    }

    /// Steps 5 and 6, for who does not hold the journal meanwhile: the images of the window are saved and named.
    ///
    /// # Errors
    /// As for [`Self::apply`].
    pub fn write_window(&mut self, window: &Window) -> Result<(), JournalError> {
        self.save_over(window, &[])?; // I1, also where nobody asked for it
        self.version += 1;
        self.write_target(window)?;
        if !mutant(Mutant::TargetUnflushed) {
            self.target.flush()?; // barrier 2
        }
        Ok(())
    }

    fn write_target(&mut self, window: &Window) -> Result<(), JournalError> {
        let mut writes: Vec<WriteAt<'_>> = Vec::new();
        let mut bytes = 0;
        for Write { range, content } in window.runs() {
            match content {
                Content::Data(data) => {
                    writes.push(WriteAt { offset: range.byte_start(), data });
                    bytes += data.len();
                }
                Content::Zeros => {
                    let start = range.byte_start();
                    self.target.zero(ByteRange { start, end: start + range.bytes() })?;
                }
            }
            if bytes >= WRITE_BYTES {
                self.target.write(&writes)?;
                (writes, bytes) = (Vec::new(), 0);
            }
        }
        if !writes.is_empty() {
            self.target.write(&writes)?;
        }
        Ok(())
    }

    /// Opens a sealed run of the disk, once.
    pub(super) fn open_run(&mut self, journal: &Journal, run: Run) -> Result<(), JournalError> {
        if let Some(known) = self.sealed.get_mut(&run.first).filter(|known| known.run == run) {
            known.idle_since = None;
            return Ok(());
        }
        let path = run_path(journal, self.disk, run.file);
        let identity = identity(journal, self.disk, &run)?;
        let sealed = SealedRun::open(&**journal.files(), &path, &identity)?;
        // A run of the same epochs under another name was merged away.
        self.sealed.retain(|_, known| known.run.last < run.first || known.run.first > run.last);
        self.sealed.insert(run.first, Opened { run, sealed, idle_since: None });
        Ok(())
    }

    /// Closes the sealed runs that the manifest does not name any more, so that the medium has their space back, and those
    /// that nobody has read for [`RUN_IDLE_MAX`]. Cheap where none is open.
    pub fn close_runs(&mut self, journal: &Journal, now: MonoTime) {
        if self.sealed.is_empty() {
            return;
        }
        let named = shape(journal, self.disk).map_or(&[][..], |shape| shape.runs.as_slice());
        let is_named = |run: &Run| {
            named.binary_search_by_key(&run.first, |named| named.first).is_ok_and(|at| named[at] == *run)
        };
        self.sealed.retain(|_, known| {
            let since = *known.idle_since.get_or_insert(now);
            u128::from(now.nanos_since(since)) < RUN_IDLE_MAX.as_nanos() && is_named(&known.run)
        });
    }

    /// How many sealed runs are open.
    #[must_use]
    pub fn runs_open(&self) -> usize {
        self.sealed.len()
    }

    /// A run that [`Self::open_run`] opened.
    pub(super) fn sealed_run(&mut self, run: Run) -> Result<&mut SealedRun, JournalError> {
        let known = self.sealed.get_mut(&run.first).filter(|known| known.run == run);
        known.map(|known| &mut known.sealed).ok_or_else(|| JournalError::Gone {
            disk: self.disk,
            what: format!("the undo run of epochs {} to {} is not open", run.first, run.last),
        })
    }

    /// The run that is being written, for a thread beside; [`Self::put_active`] gives it back.
    pub(super) fn take_active(&mut self) -> Result<Option<ActiveRun>, JournalError> {
        self.ongoing.lend()
    }

    pub(super) fn put_active(&mut self, run: Option<ActiveRun>) {
        self.ongoing.take_back(run);
    }

    /// The run that is being written, to read from.
    pub(super) fn active_run(&mut self) -> Result<Option<&mut ActiveRun>, JournalError> {
        self.ongoing.readable()
    }

    /// The disk.
    #[must_use]
    pub const fn disk(&self) -> DiskId {
        self.disk
    }

    /// Its size.
    #[must_use]
    pub const fn size_sectors(&self) -> u64 {
        self.size_sectors
    }
}

pub(super) fn shape(journal: &Journal, disk: DiskId) -> Result<&DiskShape, JournalError> {
    journal
        .shape()
        .disks
        .get(&disk)
        .ok_or_else(|| JournalError::damaged(journal.folder(), format!("disk {disk} is not in the journal")))
}

/// How the undo epoch that goes on is found.
type OpenOngoing = fn(&Journal, &DiskShape, &Applied) -> Result<(Ongoing, Vec<Hole>), JournalError>;

pub(super) fn identity(journal: &Journal, disk: DiskId, run: &Run) -> Result<RunIdentity, JournalError> {
    let shape = shape(journal, disk)?;
    let epoch = |number| shape.epochs.iter().find(|epoch: &&Epoch| epoch.opened.epoch == number);
    match epoch(run.first) {
        Some(first) => {
            let mut identity = run_header(journal, &first.opened, shape.size_sectors()).identity();
            identity.undo_epoch_last = run.last;
            Ok(identity)
        }
        None => {
            Err(JournalError::damaged(journal.folder(), format!("undo epoch {} is not known", run.first)))
        }
    }
}
