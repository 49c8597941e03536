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
//! or flush stops the disk (I6). Units: sectors, bytes, entry numbers. Called by the thread that owns the target.

use std::path::PathBuf;

use super::capture::{Known, capture};
use super::entry::{Content, Write};
use super::error::{JournalError, random_u64};
use super::shape::{Epoch, Run, RunFile};
use super::undo::{ActiveRun, FRAMES_START, Hole, RunHeader, RunIdentity, SealedRun, run_bytes_max};
use super::view::At;
use super::window::Window;
use super::{DiskShape, Journal};
use crate::format::manifest::{DiskGrown, Edit, EpochCause, EpochClosed, EpochOpened, PointKept};
use crate::format::segment::Applied;
use crate::io::{BlockFile, ByteRange, WriteAt};
use crate::store::files::FilesError;
use crate::units::{DiskId, Generation, LineageId, SECTOR_BYTES, Sequence, Timestamp};

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

/// One disk of a journal.
pub struct Applier<T> {
    disk: DiskId,
    size_sectors: u64,
    target: T,
    active: Option<ActiveRun>,
    /// Sealed runs that were opened, by their first epoch.
    sealed: Vec<(Run, SealedRun)>,
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
        Self::open_with(journal, disk, target, applied, |journal, opened, size_sectors, applied| {
            reopen(journal, opened, size_sectors, applied).map(|(run, holes)| (Some(run), holes))
        })
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
        Self::open_with(journal, disk, target, applied, inspect)
    }

    fn open_with(
        journal: &Journal,
        disk: DiskId,
        target: T,
        applied: Option<Applied>,
        reopen: OpenRun,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        let shape = shape(journal, disk)?;
        let size_sectors = shape.size_sectors();
        let mut applied = applied.unwrap_or(Applied { number: 0, epoch: 0, undo_bytes: 0 });
        // An undo epoch is closed only when all of it is applied, whatever became of the entry that said so.
        applied.number = applied.number.max(shape.closed_through());
        let (active, holes) = match shape.open_epoch() {
            Some(epoch) => reopen(journal, &epoch.opened, size_sectors, &applied)?,
            None => (None, Vec::new()),
        };
        // What is applied from here on is applied in the epoch that goes on, though the log has not said so yet.
        if let Some(epoch) = shape.open_epoch().filter(|epoch| epoch.opened.epoch != applied.epoch) {
            applied = Applied { epoch: epoch.opened.epoch, undo_bytes: 0, ..applied };
        }
        Ok((Self { disk, size_sectors, target, active, sealed: Vec::new(), applied, version: 0 }, holes))
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
        self.active.as_ref().map(|run| run.header().undo_epoch)
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
        } else if size_sectors <= self.size_sectors || self.active.is_some() {
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

    /// Begins an undo epoch: from here on, what is overwritten is saved first.
    ///
    /// # Errors
    /// When one goes on, or manifest or run cannot be written.
    pub fn begin_epoch(
        &mut self,
        journal: &mut Journal,
        cause: EpochCause,
        position: Position,
        to: Option<At>,
        now: Timestamp,
    ) -> Result<u64, JournalError> {
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
        journal.edit(&[Edit::EpochOpened(opened)], now)?;
        self.active = Some(create_run(journal, &opened, self.size_sectors)?);
        self.applied = Applied { epoch: opened.epoch, undo_bytes: 0, ..self.applied };
        Ok(opened.epoch)
    }

    /// Ends the undo epoch. Everything applied in it was durably said to be (the caller committed).
    ///
    /// # Errors
    /// When run or manifest cannot be written.
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
        let Some(run) = self.active.take() else { return Ok(()) };
        let epoch = run.header().undo_epoch;
        let path = run.path().to_owned();
        let run_bytes = if run.counts().0 == 0 {
            drop(run);
            0
        } else {
            let sealed = run.seal(&**journal.files(), now)?;
            let bytes = journal.files().facts(&path)?.map_or(0, |facts| facts.size_bytes);
            let entry = Run { first: epoch, last: epoch, file: RunFile::Epoch(epoch), bytes };
            self.sealed.push((entry, sealed));
            bytes
        };
        let closed = EpochClosed { disk: self.disk, epoch, last: self.applied.number, run_bytes, time: now };
        let edits: Vec<Edit> =
            std::iter::once(Edit::EpochClosed(closed)).chain(point.map(Edit::PointKept)).collect();
        journal.edit(&edits, now)?;
        if run_bytes == 0 {
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
        if let Some(run) = &self.active {
            self.applied.undo_bytes = run.len_bytes();
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
        let Some(run) = &mut self.active else { return Ok(None) };
        capture(&mut self.target, run, self.size_sectors, window, known)?;
        if !run.is_flushed() {
            run.flush()?; // barrier 1
        }
        if run.counts().0 == 0 || run.len_bytes() == self.applied.undo_bytes {
            return Ok(None);
        }
        self.applied.undo_bytes = run.len_bytes();
        Ok(Some(self.applied))
    }

    /// Steps 5 and 6, for who does not hold the journal meanwhile: the images of the window are saved and named.
    ///
    /// # Errors
    /// As for [`Self::apply`].
    pub fn write_window(&mut self, window: &Window) -> Result<(), JournalError> {
        self.save_over(window, &[])?; // I1, also where nobody asked for it
        self.version += 1;
        self.write_target(window)?;
        self.target.flush()?; // barrier 2
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
        if self.sealed.iter().any(|(known, _)| *known == run) {
            return Ok(());
        }
        // A run of the same epochs under another name was merged away.
        self.sealed.retain(|(known, _)| known.last < run.first || known.first > run.last);
        let path = run_path(journal, self.disk, run.file);
        let identity = identity(journal, self.disk, &run)?;
        self.sealed.push((run, SealedRun::open(&**journal.files(), &path, &identity)?));
        Ok(())
    }

    /// A run that [`Self::open_run`] opened.
    pub(super) fn sealed_run(&mut self, run: Run) -> Result<&mut SealedRun, JournalError> {
        let known = self.sealed.iter_mut().find(|(known, _)| *known == run).map(|(_, sealed)| sealed);
        known.ok_or_else(|| JournalError::Gone {
            disk: self.disk,
            what: format!("the undo run of epochs {} to {} is not open", run.first, run.last),
        })
    }

    /// The run that is being written, for a thread beside; [`Self::put_active`] gives it back.
    pub(super) const fn take_active(&mut self) -> Option<ActiveRun> {
        self.active.take()
    }

    pub(super) fn put_active(&mut self, run: Option<ActiveRun>) {
        self.active = run;
    }

    pub(super) const fn active_run(&mut self) -> Option<&mut ActiveRun> {
        self.active.as_mut()
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

fn run_header(journal: &Journal, opened: &EpochOpened, size_sectors: u64) -> RunHeader {
    let identity = RunIdentity {
        journal: journal.id(),
        disk: opened.disk,
        lineage: opened.lineage,
        generation: opened.generation,
        undo_epoch: opened.epoch,
        undo_epoch_last: opened.epoch,
    };
    RunHeader::new(identity, opened.salt, size_sectors, opened.time)
}

fn create_run(journal: &Journal, opened: &EpochOpened, size_sectors: u64) -> Result<ActiveRun, JournalError> {
    let path = run_path(journal, opened.disk, RunFile::Epoch(opened.epoch));
    let header = run_header(journal, opened, size_sectors);
    Ok(ActiveRun::create(&**journal.files(), &path, header, run_bytes_max(size_sectors))?)
}

/// How the run of the epoch that goes on is opened.
type OpenRun =
    fn(&Journal, &EpochOpened, u64, &Applied) -> Result<(Option<ActiveRun>, Vec<Hole>), JournalError>;

/// Whether anything can be in the run of the epoch that goes on. Its header is durable before the first image is saved:
/// where there is no image, the header may be torn.
fn is_begun(journal: &Journal, opened: &EpochOpened, certain: u64) -> Result<bool, JournalError> {
    let path = run_path(journal, opened.disk, RunFile::Epoch(opened.epoch));
    let there = journal.files().facts(&path)?.is_some();
    if certain > FRAMES_START {
        // Images were durable in it: an empty run in its place would save what is newer as if it were older.
        return if there { Ok(true) } else { Err(FilesError::Missing { path }.into()) };
    }
    Ok(there && !is_blank(journal, &path)?)
}

/// Up to where images are certain to be in the run of the epoch that goes on.
const fn certain_bytes(opened: &EpochOpened, applied: &Applied) -> u64 {
    if applied.epoch == opened.epoch { applied.undo_bytes } else { 0 }
}

/// Reads the run of the epoch that goes on, and changes nothing; none where nothing was saved in it.
pub(super) fn inspect(
    journal: &Journal,
    opened: &EpochOpened,
    size_sectors: u64,
    applied: &Applied,
) -> Result<(Option<ActiveRun>, Vec<Hole>), JournalError> {
    let certain = certain_bytes(opened, applied);
    if !is_begun(journal, opened, certain)? {
        return Ok((None, Vec::new()));
    }
    let path = run_path(journal, opened.disk, RunFile::Epoch(opened.epoch));
    let identity = run_header(journal, opened, size_sectors).identity();
    let (run, holes) = ActiveRun::open_to_read(&**journal.files(), &path, &identity, certain)?;
    Ok((Some(run), holes))
}

/// Opens the run of the epoch that goes on, or makes it where the crash came before it was there.
fn reopen(
    journal: &Journal,
    opened: &EpochOpened,
    size_sectors: u64,
    applied: &Applied,
) -> Result<(ActiveRun, Vec<Hole>), JournalError> {
    let files = &**journal.files();
    let path = run_path(journal, opened.disk, RunFile::Epoch(opened.epoch));
    let certain = certain_bytes(opened, applied);
    if !is_begun(journal, opened, certain)? {
        files.remove(&path)?;
        return Ok((create_run(journal, opened, size_sectors)?, Vec::new()));
    }
    let identity = run_header(journal, opened, size_sectors).identity();
    let (mut run, holes) = ActiveRun::reopen(files, &path, &identity, certain, run_bytes_max(size_sectors))?;
    run.flush()?; // its frames may stand in a cache only, and the target is written because they are there
    Ok((run, holes))
}

/// Whether no image was ever saved in a run.
fn is_blank(journal: &Journal, path: &std::path::Path) -> Result<bool, JournalError> {
    let mut file = journal.files().open(path, false)?;
    let end = file.size_bytes();
    Ok(end <= FRAMES_START || file.allocated(ByteRange { start: FRAMES_START, end })?.is_empty())
}

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
