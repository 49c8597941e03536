//! The manifest and the superblock: what the journal consists of, durably.
//!
//! Invariants: an edit is durable when [`Manifest::append`] returned, and then the superblock says so, which lies in a file
//! of its own: what it knows never runs ahead of what is durable. A batch of edits may be torn by a crash from its end only,
//! as far as the next opening is concerned: what stands behind the first invalid edit is dropped, unless the superblock or
//! an edit behind it knew that one durable, which is damage and refused. After an opening that dropped anything, and when
//! it has grown, the manifest is written anew into a file of the next number; two copies of the superblock name it before
//! the old one is removed (one that was torn is moved aside). Edits are written where zeros were written before, so a full
//! medium is met before anything is changed and is tried again; any other failed write or flush stops it for good (I6). The
//! shape is what the medium holds: an edit that contradicts it, or could not be written, changes nothing. Units: bytes.
//! Called by `store::journal`.

mod read;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) use read::{Read, read_manifest, read_superblock, rest_is_zero, superblock_copies, walk_manifest};

use super::ASIDE;
use super::error::JournalError;
use super::shape::Shape;
use crate::format::FormatError;
use crate::format::manifest::{
    COMPATIBLE_SEGMENT_INDEXES, Edit, MANIFEST_MAGIC, ManifestHeader, SUPERBLOCK_COPIES, SUPERBLOCK_MAGIC,
    Superblock,
};
use crate::format::segment::JournalId;
use crate::io::{BlockError, BlockFile, ByteRange, WriteAt};
use crate::limits::{MANIFEST_BYTES_MAX, MANIFEST_CHECKPOINT_BYTES, MANIFEST_PREPARED_BYTES};
use crate::store::files::{Files, FilesError};
use crate::units::{BLOCK_BYTES, DiskId, Timestamp};

/// Why a journal that was opened for reading takes no writes.
pub(super) const TO_READ: &str = "it was opened for reading only";
/// After a checkpoint that failed the next one is tried when so many more bytes of edits were written.
const CHECKPOINT_AGAIN_BYTES: u64 = 64 << 10;
/// Things that an operator should know of and that stop nothing, for who has a log to write them to.
#[derive(Debug, Default)]
pub(super) struct Notices(Vec<String>);

impl Notices {
    /// Most that are kept until somebody takes them.
    const MAX: usize = 16;

    fn note(&mut self, what: &str, error: &dyn std::error::Error) {
        if self.0.len() < Self::MAX {
            self.0.push(format!("{what}: {error}"));
        }
    }

    pub(super) fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.0)
    }
}

/// Name of the superblock's file.
pub(super) const SUPERBLOCK_NAME: &str = "superblock";

/// The manifest of an open journal.
pub struct Manifest {
    files: Arc<dyn Files>,
    folder: PathBuf,
    superblock_file: Box<dyn BlockFile>,
    superblock: Superblock,
    file: Box<dyn BlockFile>,
    /// Where the next edit goes.
    at: u64,
    /// Number of the next edit.
    index: u64,
    /// Length after the last checkpoint.
    base: u64,
    /// Where the next checkpoint is due; further on after one that failed.
    due: u64,
    /// Up to here every byte was written once.
    prepared: u64,
    /// How many bytes behind the newest edit are written ahead.
    ahead_bytes: u64,
    shape: Shape,
    /// What went wrong and hinders nobody.
    pub(super) notices: Notices,
    failed: Option<String>,
}

/// Path of a manifest.
pub(super) fn manifest_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("manifest-{number:08}"))
}

/// The number in a manifest's name.
pub(super) fn number_of_name(name: &str) -> Option<u64> {
    let number = name.strip_prefix("manifest-")?.parse().ok()?;
    (manifest_path(Path::new(""), number) == Path::new(name)).then_some(number)
}

impl Manifest {
    /// Makes the manifest and superblock of a new journal. `ahead_bytes`: how much room of the medium is taken ahead.
    ///
    /// # Errors
    /// When the folder holds a journal already, or cannot be written.
    pub(super) fn create(
        files: Arc<dyn Files>,
        folder: &Path,
        journal: JournalId,
        ahead_bytes: u64,
        now: Timestamp,
    ) -> Result<Self, JournalError> {
        let number = 1;
        let mut file = start_file(&*files, folder, journal, number)?;
        let ahead_bytes = ahead_bytes.min(MANIFEST_PREPARED_BYTES);
        let prepared = prepare(&mut *file, BLOCK_BYTES, BLOCK_BYTES + ahead_bytes)?;
        file.flush()?;
        // The superblock comes last: a folder without one holds no journal, whatever else lies in it.
        let path = folder.join(SUPERBLOCK_NAME);
        files.create(&path, SUPERBLOCK_COPIES * BLOCK_BYTES)?;
        let superblock = Superblock {
            magic: SUPERBLOCK_MAGIC,
            crc: 0,
            incompatible: 0,
            read_only_compatible: 0,
            compatible: COMPATIBLE_SEGMENT_INDEXES,
            journal,
            generation: 0,
            previous: 0,
            clean: false,
            manifest: number,
            durable_group: 0,
            time: now,
            manifest_edits: 0,
        };
        let superblock_file = files.open(&path, true)?;
        let mut manifest = Self {
            files,
            folder: folder.into(),
            superblock_file,
            superblock,
            file,
            at: BLOCK_BYTES,
            index: 1,
            base: BLOCK_BYTES,
            due: 0,
            prepared,
            ahead_bytes,
            shape: Shape::default(),
            notices: Notices::default(),
            failed: None,
        };
        manifest.due = manifest.checkpoint_due();
        manifest.write_every_copy(now)?;
        Ok(manifest)
    }

    /// Opens the manifest of an existing journal for writing, and changes nothing before [`Self::start`]; answers with it
    /// whether the journal was closed in order, and the newest group of the redo log known durable.
    ///
    /// # Errors
    /// When somebody else has it open, or it is missing, foreign, damaged, or of a newer version.
    pub(super) fn open(
        files: Arc<dyn Files>,
        folder: &Path,
        ahead_bytes: u64,
    ) -> Result<(Self, Opened), JournalError> {
        // Opened for writing first: that is the lock against a second program.
        let path = folder.join(SUPERBLOCK_NAME);
        if files.facts(&path)?.is_none() {
            return Err(read::without_superblock(&*files, folder)?);
        }
        let superblock_file = files.open(&path, true)?;
        let superblock = read_superblock(&*files, folder)?;
        if superblock.read_only_compatible != 0 {
            let source = FormatError::Field {
                what: "superblock",
                field: "read_only_compatible",
                got: superblock.read_only_compatible.into(),
                expected: "no feature bits",
            };
            return Err(JournalError::format(&path, 0, "use the program that wrote it")(source));
        }
        let read = read_manifest(&*files, folder, &superblock)?;
        let file = files.open(&manifest_path(folder, superblock.manifest), true)?;
        let (mut manifest, opened) = Self::of(files, folder, superblock_file, superblock, file, read);
        manifest.ahead_bytes = ahead_bytes.min(MANIFEST_PREPARED_BYTES);
        Ok((manifest, opened))
    }

    /// From here on the journal is in use. Answers, after a torn end, where the manifest is that had it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn start(&mut self, now: Timestamp, opened: &Opened) -> Result<Option<PathBuf>, JournalError> {
        // What was read may stand in a cache only, if the program before us was killed between write and flush.
        self.file.flush()?;
        self.lengthen_superblock()?;
        let mut torn = None;
        if opened.torn {
            let path = manifest_path(&self.folder, self.number());
            torn = match self.checkpoint(now, opened.durable_group, |files, old| files.set_aside(old, ASIDE))
            {
                // On a full medium nothing could be given back if this stopped here.
                Err(error) if error.is_full() && self.failed.is_none() => {
                    self.cut(self.file.size_bytes())?;
                    Some(path)
                }
                moved => Some(moved?.unwrap_or(path)),
            };
        }
        self.write_superblock(now, opened.durable_group, false)?;
        self.write_every_copy(now)?;
        self.prepared = self.written_end()?;
        self.prepare_ahead();
        Ok(torn)
    }

    /// Where the superblock was cut off behind a whole copy the next copies need their places.
    fn lengthen_superblock(&mut self) -> Result<(), JournalError> {
        const BYTES: u64 = SUPERBLOCK_COPIES * BLOCK_BYTES;
        if self.superblock_file.size_bytes() < BYTES {
            let path = self.folder.join(SUPERBLOCK_NAME);
            // Nobody may have it open for writing meanwhile.
            self.superblock_file = self.files.open(&path, false)?;
            self.files.resize(&path, BYTES)?;
            self.superblock_file = self.files.open(&path, true)?;
        }
        Ok(())
    }

    /// Opens the manifest of a journal to which nothing is written: no file is opened for writing, and
    /// [`Self::append`] refuses.
    ///
    /// # Errors
    /// As for [`Self::open`]; features that only forbid writing are no hindrance.
    pub(super) fn open_to_read(files: Arc<dyn Files>, folder: &Path) -> Result<(Self, Opened), JournalError> {
        let superblock = read_superblock(&*files, folder)?;
        let superblock_file = files.open(&folder.join(SUPERBLOCK_NAME), false)?;
        let read = read_manifest(&*files, folder, &superblock)?;
        let file = files.open(&manifest_path(folder, superblock.manifest), false)?;
        let (mut manifest, opened) = Self::of(files, folder, superblock_file, superblock, file, read);
        manifest.failed = Some(TO_READ.to_owned());
        Ok((manifest, opened))
    }

    /// What was read, with the files it was read from.
    fn of(
        files: Arc<dyn Files>,
        folder: &Path,
        superblock_file: Box<dyn BlockFile>,
        superblock: Superblock,
        file: Box<dyn BlockFile>,
        read: Read,
    ) -> (Self, Opened) {
        let opened = Opened {
            clean: superblock.clean,
            durable_group: superblock.durable_group.max(read.durable_group),
            torn: read.torn,
            removed: read.removed,
        };
        let mut manifest = Self {
            files,
            folder: folder.into(),
            superblock_file,
            superblock,
            file,
            at: read.at,
            index: read.index,
            base: read.at,
            due: 0,
            prepared: read.at,
            ahead_bytes: 0,
            shape: read.shape,
            notices: Notices::default(),
            failed: None,
        };
        manifest.due = manifest.checkpoint_due();
        (manifest, opened)
    }

    /// The journal's identity.
    #[must_use]
    pub const fn journal(&self) -> JournalId {
        self.superblock.journal
    }

    /// Its number.
    pub(super) const fn number(&self) -> u64 {
        self.superblock.manifest
    }

    /// The copy of the superblock that counts.
    pub(super) const fn superblock(&self) -> Superblock {
        self.superblock
    }

    /// What the journal consists of.
    #[must_use]
    pub const fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Names of the files that belong to it.
    pub(super) fn names(&self) -> [String; 2] {
        let path = manifest_path(&self.folder, self.superblock.manifest);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        [SUPERBLOCK_NAME.to_owned(), name.unwrap_or_default()]
    }

    /// Makes changes durable, all of them or (after a crash) the first few.
    ///
    /// # Errors
    /// When an edit contradicts the shape, or the medium is full: nothing is changed then, and the next one may come. When
    /// it cannot be written for another reason nothing is written from then on.
    pub fn append(&mut self, edits: &[Edit], now: Timestamp, durable_group: u64) -> Result<(), JournalError> {
        self.check()?;
        if let Some(error) = edits.iter().find_map(|edit| edit.check_readable().err()) {
            let why = format!(
                "a defect of the master target: it is not written what no start could read ({error})"
            );
            return Err(JournalError::Failed { path: manifest_path(&self.folder, self.number()), why });
        }
        let before = self.shape.before(edits);
        for edit in edits {
            if let Err(what) = self.shape.apply(edit) {
                self.shape.restore(before);
                return Err(JournalError::damaged(&manifest_path(&self.folder, self.number()), what));
            }
        }
        // A checkpoint on the way must not hold these yet.
        let with_edits = self.shape.exchange(before);
        self.write_edits(edits, now, durable_group)?;
        self.shape.restore(with_edits);
        match self.write_superblock(now, durable_group, false) {
            // The edits are durable; what is missing is who else knows it, and the next edit says it.
            Err(error) if error.is_full() && self.failed.is_none() => {
                self.notices
                    .note("the superblock does not know the newest edits of the manifest yet", &error);
            }
            written => written?,
        }
        self.tidy_up(now, durable_group);
        Ok(())
    }

    fn write_edits(
        &mut self,
        edits: &[Edit],
        now: Timestamp,
        durable_group: u64,
    ) -> Result<(), JournalError> {
        let encode = |manifest, first: u64| {
            let numbered = edits.iter().zip(first..);
            numbered.fold(Vec::new(), |mut bytes, (edit, index)| {
                bytes.extend(edit.encode(manifest, index, first - 1, durable_group));
                bytes
            })
        };
        let mut bytes = encode(self.number(), self.index);
        let len = bytes.len() as u64;
        if self.at + len > self.file.size_bytes() {
            self.checkpoint(now, durable_group, remove)?;
            bytes = encode(self.number(), self.index);
        }
        if self.at + len > self.prepared {
            self.prepare_to(self.at + len + self.ahead_bytes)?;
            if self.at + len > self.prepared {
                let what = "there is no room for an edit of the manifest".to_owned();
                return Err(JournalError::Full { path: self.folder.clone(), what });
            }
        }
        match self.file.write(&[WriteAt { offset: self.at, data: &bytes }]) {
            // A medium that takes new room for what was written before, too. Some of it may stand there.
            Err(error) if error.is_full() => {
                self.cut(self.at + len)?;
                return Err(error.into());
            }
            written => self.note(written)?,
        }
        let flushed = self.file.flush();
        self.note(flushed)?;
        self.at += len;
        self.index += edits.len() as u64;
        Ok(())
    }

    /// What is due behind edits that are durable: none of it may make them look as if they were not.
    fn tidy_up(&mut self, now: Timestamp, durable_group: u64) {
        self.prepare_ahead();
        if self.at < self.due || self.failed.is_some() {
            return;
        }
        if let Err(error) = self.checkpoint(now, durable_group, remove) {
            self.notices
                .note("the manifest could not be written anew; it goes on, and that is tried again", &error);
            self.due = self.at + CHECKPOINT_AGAIN_BYTES;
        }
    }

    const fn checkpoint_due(&self) -> u64 {
        let grown = if self.base > MANIFEST_CHECKPOINT_BYTES { self.base } else { MANIFEST_CHECKPOINT_BYTES };
        self.base + grown + 1
    }

    /// Writes the shape into a new manifest, makes it the one that counts, and does away with the old one. An error leaves
    /// the old one in force, unless the superblock could not be written: nobody knows then which one it names.
    fn checkpoint<T>(
        &mut self,
        now: Timestamp,
        durable_group: u64,
        retire: impl FnOnce(&dyn Files, &Path) -> Result<T, FilesError>,
    ) -> Result<Option<T>, JournalError> {
        let (old, path) = (self.superblock, manifest_path(&self.folder, self.number() + 1));
        // A crash may have left one of this number behind that no superblock ever named.
        self.files.remove(&path)?;
        let made = self.write_shape(durable_group).inspect_err(|_| {
            let _ = self.files.remove(&path); // ours, and half made; the error that matters is the one above
        })?;
        let place = (self.at, self.index, self.base, self.prepared);
        let old_file = std::mem::replace(&mut self.file, made.file);
        (self.at, self.index, self.base, self.prepared) = (made.at, made.index, made.at, made.prepared);
        self.superblock.manifest += 1;
        if let Err(error) = self.write_superblock(now, durable_group, false) {
            if self.failed.is_none() {
                (self.file, self.superblock) = (old_file, old);
                (self.at, self.index, self.base, self.prepared) = place;
                let _ = self.files.remove(&path); // as above
            }
            return Err(error);
        }
        self.due = self.checkpoint_due();
        // Twice: one copy that rots must not lead to a manifest that is gone.
        match self.write_superblock(now, durable_group, false) {
            Err(error) if error.is_full() && self.failed.is_none() => {
                self.notices.note("one copy of the superblock names the new manifest", &error);
            }
            written => written?,
        }
        drop(old_file);
        match retire(&*self.files, &manifest_path(&self.folder, old.manifest)) {
            Ok(done) => Ok(Some(done)),
            Err(error) => {
                self.notices.note("a manifest that was replaced stays until the next start", &error);
                Ok(None)
            }
        }
    }

    /// The shape as a manifest of the next number, durable and not named yet.
    fn write_shape(&self, durable_group: u64) -> Result<Written, JournalError> {
        let number = self.number() + 1;
        let mut file = start_file(&*self.files, &self.folder, self.superblock.journal, number)?;
        let mut at = BLOCK_BYTES;
        let mut index = 1;
        for edit in self.shape.edits() {
            let bytes = edit.encode(number, index, 0, durable_group);
            file.write(&[WriteAt { offset: at, data: &bytes }])?;
            at += bytes.len() as u64;
            index += 1;
        }
        let prepared = prepare(&mut *file, at, at + self.ahead_bytes)?;
        file.flush()?;
        Ok(Written { file, at, index, prepared })
    }

    /// Puts superblock and manifest back as they are known here, each copy and each edit; also where the superblock is gone,
    /// or another file stands in its place, which is moved aside.
    ///
    /// # Errors
    /// When they cannot be written; what was there stays.
    pub(super) fn write_anew(&mut self, now: Timestamp, durable_group: u64) -> Result<(), JournalError> {
        self.check()?;
        self.write_superblock(now, durable_group, false)?;
        if !self.has_its_superblock() {
            self.remake_superblock()?;
        }
        self.checkpoint(now, durable_group, remove)?;
        for _ in 0..SUPERBLOCK_COPIES {
            self.write_superblock(now, durable_group, false)?;
        }
        Ok(())
    }

    /// Whether what was written last is what stands under the superblock's name.
    pub(super) fn has_its_superblock(&self) -> bool {
        let stands = read_superblock(&*self.files, &self.folder);
        stands.is_ok_and(|stands| stands.crc == self.superblock.crc)
    }

    /// Makes the file anew, with the copy that counts: the one that is open has no name any more.
    fn remake_superblock(&mut self) -> Result<(), JournalError> {
        let path = self.folder.join(SUPERBLOCK_NAME);
        let mut blocks = vec![0; (SUPERBLOCK_COPIES * BLOCK_BYTES) as usize];
        let counts = (self.superblock.generation % SUPERBLOCK_COPIES) as usize;
        if let Some(block) = blocks.chunks_mut(BLOCK_BYTES as usize).nth(counts) {
            block.copy_from_slice(&self.superblock.to_block());
        }
        if self.files.facts(&path)?.is_some() {
            self.files.set_aside(&path, ASIDE)?;
        }
        self.files.replace(&path, &blocks)?;
        // The lock on the one without a name is given back before the new one is locked.
        self.superblock_file = self.files.open(&path, false)?;
        self.superblock_file = self.files.open(&path, true)?;
        Ok(())
    }

    /// Number of the next edit.
    pub(super) const fn next_edit(&self) -> u64 {
        self.index
    }

    /// Sees to it that the edits of some time need no room of the medium.
    fn prepare_ahead(&mut self) {
        if self.failed.is_none()
            && self.prepared < self.at + self.ahead_bytes / 2
            && let Err(error) = self.prepare_to(self.at + self.ahead_bytes)
        {
            self.notices.note("no room could be taken ahead for the manifest", &error);
        }
    }

    /// Writes zeros up to a place, as far as the medium has room.
    fn prepare_to(&mut self, end: u64) -> Result<(), JournalError> {
        let written = prepare(&mut *self.file, self.prepared, end);
        match written {
            Ok(prepared) => self.prepared = prepared,
            // As far as it came is found by looking.
            Err(error) if error.is_full() => self.prepared = self.written_end()?,
            Err(error) => return self.note(Err(error)),
        }
        let flushed = self.file.flush();
        self.note(flushed)
    }

    /// Where what was ever written to the file ends, without a gap from the newest edit on.
    fn written_end(&mut self) -> Result<u64, JournalError> {
        let range = ByteRange { start: self.at, end: self.file.size_bytes() };
        let first = self.file.allocated(range)?.into_iter().next();
        Ok(first
            .filter(|part| part.start <= self.at)
            .map_or(self.at, |part| part.end / BLOCK_BYTES * BLOCK_BYTES))
    }

    /// Makes zeros of what stands behind the newest edit.
    fn cut(&mut self, end: u64) -> Result<(), JournalError> {
        let range = ByteRange { start: self.at, end };
        let parts = self.file.allocated(range);
        for part in self.note(parts)? {
            let cut = self.file.zero(part);
            self.note(cut)?;
        }
        let flushed = self.file.flush();
        self.note(flushed)?;
        self.prepared = self.written_end()?;
        Ok(())
    }

    /// Writes the superblock until each of its copies was written once: it needs no room of the medium from then on.
    fn write_every_copy(&mut self, now: Timestamp) -> Result<(), JournalError> {
        while self.superblock.generation < SUPERBLOCK_COPIES {
            self.write_superblock(now, 0, false)?;
        }
        Ok(())
    }

    /// Writes the next copy of the superblock.
    fn write_superblock(&mut self, now: Timestamp, durable: u64, clean: bool) -> Result<(), JournalError> {
        let next = Superblock {
            generation: self.superblock.generation + 1,
            previous: self.superblock.crc,
            compatible: self.superblock.compatible | COMPATIBLE_SEGMENT_INDEXES,
            clean,
            durable_group: durable.max(self.superblock.durable_group),
            time: now,
            manifest_edits: self.index - 1,
            ..self.superblock
        }
        .sealed();
        let offset = next.generation % SUPERBLOCK_COPIES * BLOCK_BYTES;
        match self.superblock_file.write(&[WriteAt { offset, data: &next.to_block() }]) {
            Err(error) if error.is_full() => return Err(error.into()), // nothing was written
            written => self.note(written)?,
        }
        let flushed = self.superblock_file.flush();
        self.note(flushed)?;
        self.superblock = next;
        Ok(())
    }

    /// Says that the journal is closed in order.
    ///
    /// # Errors
    /// When that cannot be written; the next opening then treats it as after a crash.
    pub(super) fn close(mut self, now: Timestamp, durable_group: u64) -> Result<(), JournalError> {
        self.write_superblock(now, durable_group, true)
    }

    fn check(&self) -> Result<(), JournalError> {
        match &self.failed {
            None => Ok(()),
            Some(why) => {
                let path = manifest_path(&self.folder, self.number());
                Err(JournalError::Failed { path, why: why.clone() })
            }
        }
    }

    fn note<T>(&mut self, result: Result<T, BlockError>) -> Result<T, JournalError> {
        result.map_err(|error| {
            self.failed = Some(error.to_string());
            error.into()
        })
    }
}

/// A manifest that was written and is not named yet.
struct Written {
    file: Box<dyn BlockFile>,
    at: u64,
    index: u64,
    prepared: u64,
}

/// What opening found.
#[derive(Clone, Debug)]
pub(super) struct Opened {
    pub(super) clean: bool,
    pub(super) durable_group: u64,
    /// Something that was torn stands behind the last edit.
    pub(super) torn: bool,
    /// Disks that were removed since the manifest was written anew, and are not there again.
    pub(super) removed: BTreeSet<DiskId>,
}

/// What becomes of a manifest that was replaced.
fn remove(files: &dyn Files, old: &Path) -> Result<(), FilesError> {
    files.remove(old)
}

/// Writes zeros from a place on, where edits will stand; answers where they end.
fn prepare(file: &mut dyn BlockFile, from: u64, end: u64) -> Result<u64, BlockError> {
    const PIECE: usize = 64 << 10;
    let zeros = vec![0; PIECE];
    let end = end.next_multiple_of(BLOCK_BYTES).min(file.size_bytes());
    let mut at = from;
    while at < end {
        let len = (end - at).min(PIECE as u64);
        file.write(&[WriteAt { offset: at, data: zeros.get(..len as usize).unwrap_or_default() }])?;
        at += len;
    }
    Ok(at)
}

/// A new manifest file with its header.
fn start_file(
    files: &dyn Files,
    folder: &Path,
    journal: JournalId,
    number: u64,
) -> Result<Box<dyn BlockFile>, JournalError> {
    let path = manifest_path(folder, number);
    files.create(&path, MANIFEST_BYTES_MAX)?;
    let mut file = files.open(&path, true)?;
    let header = ManifestHeader { magic: MANIFEST_MAGIC, crc: 0, incompatible: 0, journal, number };
    file.write(&[WriteAt { offset: 0, data: &header.to_block() }])?;
    file.flush()?;
    Ok(file)
}
