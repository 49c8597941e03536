//! The undo epoch of a disk that goes on, and its run.
//!
//! Invariants: while before-images of a disk are kept, nothing is written to it without the run of an epoch that the manifest
//! says goes on (I1): whoever asks for the run gets it, or an error, never nothing. What a full medium kept from being made,
//! cut or sealed is done at the next asking, from what is certain to be in the file; after any other error nothing is
//! written to the disk until it is opened anew (I6). Units: bytes. Used by the applier.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::applier::run_path;
use super::error::JournalError;
use super::shape::RunFile;
use super::undo::{ActiveRun, FRAMES_START, Hole, RunHeader, RunIdentity, run_bytes_max};
use super::{DiskShape, Journal};
use crate::format::manifest::EpochOpened;
use crate::format::segment::Applied;
use crate::io::ByteRange;
use crate::store::files::{Files, FilesError};
use crate::units::{DiskId, Timestamp};

/// Where the run of an epoch is, and what its header says.
struct Place {
    path: PathBuf,
    header: RunHeader,
    max_bytes: u64,
}

/// The epoch that goes on, if one does.
pub(super) struct Ongoing {
    files: Arc<dyn Files>,
    disk: DiskId,
    /// Before-images of the disk are kept.
    is_tracked: bool,
    /// Of the epoch that the manifest says goes on; none where nothing may be written.
    place: Option<Place>,
    /// Its run; none where it is to be opened again, and where another thread has it.
    run: Option<ActiveRun>,
    /// In its stead, for readers, until it can be opened again.
    to_read: Option<ActiveRun>,
    is_lent: bool,
    /// Up to where images are certain to be in the run.
    certain_bytes: u64,
    /// The run is sealed, with this length, and the manifest does not say so yet.
    sealed_bytes: Option<u64>,
    /// What was found damaged when the run was opened again.
    holes: Vec<Hole>,
    /// Why nothing is written to the disk any more.
    failed: Option<String>,
}

impl Ongoing {
    /// Of a disk that is opened; what is damaged in its run is answered.
    pub(super) fn open(
        journal: &Journal,
        shape: &DiskShape,
        applied: &Applied,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        let mut ongoing = Self::of(journal, shape);
        if let Some(epoch) = shape.open_epoch() {
            ongoing.begin(journal, &epoch.opened, shape.size_sectors());
            ongoing.certain_bytes = certain_bytes(&epoch.opened, applied);
            ongoing.reopen()?;
        }
        let holes = std::mem::take(&mut ongoing.holes);
        Ok((ongoing, holes))
    }

    /// As [`Self::open`], for reading: no file is changed, and nothing can be written.
    pub(super) fn open_to_read(
        journal: &Journal,
        shape: &DiskShape,
        applied: &Applied,
    ) -> Result<(Self, Vec<Hole>), JournalError> {
        let mut ongoing = Self::of(journal, shape);
        let Some(epoch) = shape.open_epoch() else { return Ok((ongoing, Vec::new())) };
        let (run, holes) = inspect(journal, &epoch.opened, shape.size_sectors(), applied)?;
        ongoing.run = run;
        Ok((ongoing, holes))
    }

    fn of(journal: &Journal, shape: &DiskShape) -> Self {
        Self {
            files: Arc::clone(journal.files()),
            disk: shape.added.disk,
            is_tracked: !shape.epochs.is_empty() || shape.expired > 0,
            place: None,
            run: None,
            to_read: None,
            is_lent: false,
            certain_bytes: 0,
            sealed_bytes: None,
            holes: Vec::new(),
            failed: None,
        }
    }

    /// The manifest says that this epoch goes on. Its run is made when it is asked for.
    pub(super) fn begin(&mut self, journal: &Journal, opened: &EpochOpened, size_sectors: u64) {
        self.place = Some(Place {
            path: run_path(journal, opened.disk, RunFile::Epoch(opened.epoch)),
            header: run_header(journal, opened, size_sectors),
            max_bytes: run_bytes_max(size_sectors),
        });
        (self.is_tracked, self.certain_bytes) = (true, 0);
        self.close();
    }

    /// The manifest says that it ended; answers where its run is.
    pub(super) fn end(&mut self) -> Option<PathBuf> {
        self.close();
        self.place.take().map(|place| place.path)
    }

    fn close(&mut self) {
        (self.run, self.to_read, self.sealed_bytes) = (None, None, None);
    }

    /// Its number.
    pub(super) fn epoch(&self) -> Option<u64> {
        self.place.as_ref().map(|place| place.header.identity().undo_epoch)
    }

    /// Whether before-images of the disk are kept.
    pub(super) const fn is_tracked(&self) -> bool {
        self.is_tracked
    }

    /// Nothing is written to the disk any more until it is opened anew.
    pub(super) fn fail(&mut self, why: String) {
        self.failed.get_or_insert(why);
    }

    /// What was found damaged since it was last asked.
    pub(super) fn take_holes(&mut self) -> Vec<Hole> {
        std::mem::take(&mut self.holes)
    }

    /// The run, to write to; none where no before-images are kept, and where another thread has it.
    ///
    /// # Errors
    /// When no epoch goes on, or its run cannot be opened. Where the medium is full that may be tried again.
    pub(super) fn run(&mut self) -> Result<Option<&mut ActiveRun>, JournalError> {
        if let Some(why) = &self.failed {
            let path = self.place.as_ref().map_or_else(PathBuf::new, |place| place.path.clone());
            return Err(JournalError::Failed { path, why: why.clone() });
        }
        if self.is_lent || !self.is_tracked {
            return Ok(None);
        }
        if self.place.is_none() {
            return Err(JournalError::NoEpoch { disk: self.disk });
        }
        if let Some(run) = self.run.take_if(|run| run.met_full()) {
            let cut = run.cut_back(&*self.files);
            self.run = Some(self.noted(cut.map_err(JournalError::from))?);
        } else if self.run.is_none() {
            let reopened = self.reopen();
            self.noted(reopened)?;
        }
        Ok(self.run.as_mut())
    }

    /// The run, to read from; none where nothing is in it. Nothing is written for that, so that a full medium is read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn readable(&mut self) -> Result<Option<&mut ActiveRun>, JournalError> {
        if let Some(Place { path, header, .. }) = self.place.as_ref().filter(|_| !self.is_lent)
            && self.run.is_none()
        {
            let (files, certain) = (&*self.files, self.certain_bytes);
            if self.to_read.is_none() && is_begun(files, path, certain)? {
                let (run, _) = ActiveRun::open_to_read(files, path, &header.identity(), certain)?;
                self.to_read = Some(run);
            }
            return Ok(self.to_read.as_mut());
        }
        Ok(self.run.as_mut())
    }

    /// Everything that was appended is durable, so long is the run.
    pub(super) const fn flushed(&mut self, len_bytes: u64) {
        self.certain_bytes = len_bytes;
    }

    /// Up to where images are certain to be in the run.
    pub(super) const fn certain_bytes(&self) -> u64 {
        self.certain_bytes
    }

    /// The run, for a thread beside; [`Self::take_back`] gives it back.
    pub(super) fn lend(&mut self) -> Result<Option<ActiveRun>, JournalError> {
        self.run()?;
        self.is_lent = true;
        Ok(self.run.take())
    }

    pub(super) fn take_back(&mut self, run: Option<ActiveRun>) {
        (self.run, self.is_lent) = (run, false);
    }

    /// Seals the run; answers its length, zero where nothing is in it. Done once, however often it is asked for.
    ///
    /// # Errors
    /// When it cannot be written. Where the medium is full that may be tried again, and windows may come in between.
    pub(super) fn seal(&mut self, now: Timestamp) -> Result<u64, JournalError> {
        if let Some(bytes) = self.sealed_bytes {
            return Ok(bytes);
        }
        let Some(place) = &self.place else { return Ok(0) };
        if self.run.is_none() && !is_begun(&*self.files, &place.path, self.certain_bytes)? {
            return Ok(0);
        }
        let Some(run) = self.run()? else { return Ok(0) };
        if run.counts().0 == 0 {
            return Ok(0);
        }
        let Some(run) = self.run.take() else { return Ok(0) };
        let sealed = run.seal(&*self.files, now);
        let bytes = self.noted(sealed.map_err(JournalError::from))?.len_bytes();
        self.sealed_bytes = Some(bytes);
        Ok(bytes)
    }

    /// Opens the run, or makes it where there is none yet.
    fn reopen(&mut self) -> Result<(), JournalError> {
        let Some(Place { path, header, max_bytes }) = &self.place else { return Ok(()) };
        let (files, certain) = (&*self.files, self.certain_bytes);
        (self.sealed_bytes, self.to_read) = (None, None);
        if !is_begun(files, path, certain)? {
            files.remove(path)?;
            let run = ActiveRun::create(files, path, *header, *max_bytes)?;
            self.certain_bytes = run.len_bytes();
            self.run = Some(run);
            return Ok(());
        }
        let (mut run, holes) = ActiveRun::reopen(files, path, &header.identity(), certain, *max_bytes)?;
        run.flush()?; // its frames may stand in a cache only, and the target is written because they are there
        self.holes.extend(holes);
        self.certain_bytes = run.len_bytes();
        self.run = Some(run);
        Ok(())
    }

    /// An error that is more than a full medium is final.
    fn noted<T>(&mut self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        result.inspect_err(|error| {
            let is_waited_out = match error {
                JournalError::Undo(error) => error.may_be_waited_out(),
                JournalError::Files(FilesError::Block(_)) | JournalError::Block(_) => false,
                other => other.is_full(),
            };
            if !is_waited_out {
                self.fail(error.to_string());
            }
        })
    }
}

pub(super) fn run_header(journal: &Journal, opened: &EpochOpened, size_sectors: u64) -> RunHeader {
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

/// Up to where images are certain to be in the run of the epoch that goes on.
const fn certain_bytes(opened: &EpochOpened, applied: &Applied) -> u64 {
    if applied.epoch == opened.epoch { applied.undo_bytes } else { 0 }
}

/// Whether anything can be in the run of the epoch that goes on. Its header is durable before the first image is saved:
/// where there is no image, the header may be torn.
fn is_begun(files: &dyn Files, path: &Path, certain: u64) -> Result<bool, JournalError> {
    let there = files.facts(path)?.is_some();
    if certain > FRAMES_START {
        // Images were durable in it: an empty run in its place would save what is newer as if it were older.
        return if there { Ok(true) } else { Err(FilesError::Missing { path: path.into() }.into()) };
    }
    Ok(there && !is_blank(files, path)?)
}

/// Whether no image was ever saved in a run.
fn is_blank(files: &dyn Files, path: &Path) -> Result<bool, JournalError> {
    let mut file = files.open(path, false)?;
    let end = file.size_bytes();
    Ok(end <= FRAMES_START || file.allocated(ByteRange { start: FRAMES_START, end })?.is_empty())
}

/// Reads the run of the epoch that goes on, and changes nothing; none where nothing was saved in it.
pub(super) fn inspect(
    journal: &Journal,
    opened: &EpochOpened,
    size_sectors: u64,
    applied: &Applied,
) -> Result<(Option<ActiveRun>, Vec<Hole>), JournalError> {
    let (files, certain) = (&**journal.files(), certain_bytes(opened, applied));
    let path = run_path(journal, opened.disk, RunFile::Epoch(opened.epoch));
    if !is_begun(files, &path, certain)? {
        return Ok((None, Vec::new()));
    }
    let identity = run_header(journal, opened, size_sectors).identity();
    let (run, holes) = ActiveRun::open_to_read(files, &path, &identity, certain)?;
    Ok((Some(run), holes))
}
