//! The manifest and the superblock: what the journal consists of, durably.
//!
//! Invariants: an edit is durable when [`Manifest::append`] returned; a batch of edits may be torn by a crash from its
//! end only, as far as the next opening is concerned: what stands behind the first invalid edit is dropped, unless the
//! superblock or an edit behind it knew that one durable, which is damage and refused. After an opening that dropped
//! anything, and when it has grown, the manifest is written anew into a file of the next number; the superblock names
//! it before the old one is removed. A failed write or flush stops it for good (I6). Units: bytes. Called by
//! `store::journal`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::JournalError;
use super::shape::Shape;
use crate::format::FormatError;
use crate::format::manifest::{
    COMPATIBLE_SEGMENT_INDEXES, Edit, EditHead, MANIFEST_MAGIC, ManifestHeader, SUPERBLOCK_COPIES,
    SUPERBLOCK_MAGIC, Superblock,
};
use crate::format::segment::JournalId;
use crate::io::{BlockFile, ReadAt, WriteAt};
use crate::limits::{MANIFEST_BYTES_MAX, MANIFEST_CHECKPOINT_BYTES};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, Timestamp};

/// Why a journal that was opened for reading takes no writes.
pub(super) const TO_READ: &str = "it was opened for reading only";
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
    shape: Shape,
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

/// What the superblock says, read without changing anything.
///
/// # Errors
/// [`JournalError::NoJournal`] when there is none, [`JournalError::NoSuperblock`] when there was one; else when no copy is
/// valid or a newer version wrote it.
pub(super) fn read_superblock(files: &dyn Files, folder: &Path) -> Result<Superblock, JournalError> {
    let path = folder.join(SUPERBLOCK_NAME);
    if files.facts(&path)?.is_none() {
        return Err(without_superblock(files, folder)?);
    }
    let bytes = files.read_head(&path, (SUPERBLOCK_COPIES * BLOCK_BYTES) as usize)?;
    let mut newest: Option<Superblock> = None;
    let mut refused: Option<FormatError> = None;
    for copy in bytes.chunks(BLOCK_BYTES as usize) {
        match Superblock::open(copy) {
            Ok(superblock) => {
                if newest.is_none_or(|known| superblock.generation > known.generation) {
                    newest = Some(superblock);
                }
            }
            // A copy that was never written says nothing.
            Err(error) if copy.iter().any(|byte| *byte != 0) => refused = Some(error),
            Err(_) => {}
        }
    }
    // A copy that only a newer program understands must not be passed over for an older one.
    // Its magic ends in a higher version; other bytes of the magic differ by damage only.
    let newer = match &refused {
        Some(FormatError::Field { field: "magic", got, .. }) => *got > u64::from(SUPERBLOCK_MAGIC[7]),
        Some(FormatError::Field { field, .. }) => *field == "incompatible",
        _ => false,
    };
    match (newest, refused) {
        (Some(superblock), _) if !newer => Ok(superblock),
        (_, Some(error)) => {
            let remedy = if newer {
                "use the program that wrote it"
            } else {
                "no copy in it is whole: put it back from a copy of the folder; nothing was changed"
            };
            Err(JournalError::format(&path, 0, remedy)(error))
        }
        (_, None) => Err(without_superblock(files, folder)?),
    }
}

/// What a folder is that has no superblock: one that never had a journal, or one that lost it. The making of a journal that
/// was interrupted before the first copy was there leaves the first manifest, and that without an edit.
fn without_superblock(files: &dyn Files, folder: &Path) -> Result<JournalError, JournalError> {
    for found in files.neighbours(&folder.join(SUPERBLOCK_NAME))? {
        if found == SUPERBLOCK_NAME || !super::is_ours(&found) {
            continue;
        }
        let head = files.read_head(&folder.join(&found), 2 * BLOCK_BYTES as usize)?;
        let edits = head.get(BLOCK_BYTES as usize..).unwrap_or_default();
        if number_of_name(&found) != Some(1) || edits.iter().any(|byte| *byte != 0) {
            return Ok(JournalError::NoSuperblock { path: folder.into(), found });
        }
    }
    Ok(JournalError::NoJournal { path: folder.into() })
}

/// What reading a manifest found.
pub(super) struct Read {
    pub(super) shape: Shape,
    pub(super) index: u64,
    pub(super) at: u64,
    /// Newest group of the redo log that any edit knew durable.
    pub(super) durable_group: u64,
    /// Something that was torn stands behind the last edit.
    pub(super) torn: bool,
}

/// Each copy of the superblock as it stands; `None` where none was ever written.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn superblock_copies(
    files: &dyn Files,
    folder: &Path,
) -> Result<Vec<Option<Result<Superblock, FormatError>>>, JournalError> {
    let path = folder.join(SUPERBLOCK_NAME);
    let bytes = files.read_head(&path, (SUPERBLOCK_COPIES * BLOCK_BYTES) as usize)?;
    let written = |copy: &[u8]| copy.iter().any(|byte| *byte != 0);
    Ok(bytes.chunks(BLOCK_BYTES as usize).map(|copy| written(copy).then(|| Superblock::open(copy))).collect())
}

/// Reads a manifest from its file.
///
/// # Errors
/// When it is missing, foreign or damaged.
pub(super) fn read_manifest(
    files: &dyn Files,
    folder: &Path,
    superblock: &Superblock,
) -> Result<Read, JournalError> {
    walk_manifest(files, folder, superblock, &mut |_, _, _| {})
}

/// As [`read_manifest`], and shows every edit: where it stands, its head, what it says.
pub(super) fn walk_manifest(
    files: &dyn Files,
    folder: &Path,
    superblock: &Superblock,
    see: &mut dyn FnMut(u64, &EditHead, &Edit),
) -> Result<Read, JournalError> {
    const REMEDY: &str = "restore the folder from its newest copy, or run `journal verify` on it";
    let path = manifest_path(folder, superblock.manifest);
    let mut file = files.open(&path, false)?;
    let size = file.size_bytes();
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut block }])?;
    let header = ManifestHeader::open(&block).map_err(JournalError::format(&path, 0, REMEDY))?;
    if header.journal != superblock.journal || header.number != superblock.manifest {
        return Err(JournalError::Foreign { path });
    }
    let mut read = Read { shape: Shape::default(), index: 1, at: BLOCK_BYTES, durable_group: 0, torn: false };
    let mut ahead = Ahead { start: 0, bytes: Vec::new() };
    while read.at < size {
        let edit = match read_edit(&mut *file, &mut ahead, read.at, size, &header, read.index)? {
            Ok(edit) => edit,
            Err(_) if rest_is_zero(&mut *file, read.at, size)? => break,
            Err(error) => {
                if read.index <= superblock.manifest_edits
                    || knows_durable(&mut *file, read.at, size, &header, read.index)?
                {
                    return Err(JournalError::format(&path, read.at, REMEDY)(error));
                }
                read.torn = true;
                break;
            }
        };
        let (head, edit) = edit;
        see(read.at, &head, &edit);
        read.shape
            .apply(&edit)
            .map_err(|what| JournalError::damaged(&path, format!("edit {}: {what}", head.index)))?;
        read.durable_group = read.durable_group.max(head.durable_group);
        read.index += 1;
        read.at += head.stored_bytes();
    }
    // Zeros, or the file's end, where there were edits.
    if read.index <= superblock.manifest_edits {
        let (got, known) = (read.index - 1, superblock.manifest_edits);
        return Err(JournalError::damaged(&path, format!("it has {got} edits, and {known} were durable")));
    }
    Ok(read)
}

/// A part of the manifest that was read ahead: edits are small and many.
struct Ahead {
    start: u64,
    bytes: Vec<u8>,
}

impl Ahead {
    const BYTES: u64 = 1 << 20;

    /// `len` bytes of the file, fewer (none) where it ends at `size` before them.
    fn read(
        &mut self,
        file: &mut dyn BlockFile,
        at: u64,
        len: u64,
        size: u64,
    ) -> Result<&[u8], JournalError> {
        if at < self.start || at + len > self.start + self.bytes.len() as u64 {
            self.bytes.resize(Self::BYTES.max(len).min(size.saturating_sub(at)) as usize, 0);
            self.start = at;
            file.read(&mut [ReadAt { offset: at, data: &mut self.bytes }])?;
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..).and_then(|rest| rest.get(..len as usize)).unwrap_or_default())
    }
}

/// The edit at a place, or why there is none.
fn read_edit(
    file: &mut dyn BlockFile,
    ahead: &mut Ahead,
    at: u64,
    size: u64,
    header: &ManifestHeader,
    index: u64,
) -> Result<Result<(EditHead, Edit), FormatError>, JournalError> {
    let head = match EditHead::open(ahead.read(file, at, BLOCK_BYTES, size)?) {
        Ok(head) => head,
        Err(error) => return Ok(Err(error)),
    };
    let field = |field, got, expected| Err(FormatError::Field { what: "EditHead", field, got, expected });
    if head.manifest != header.number {
        return Ok(field("manifest", head.manifest, "the number of its manifest"));
    }
    if head.index != index {
        return Ok(field("index", head.index, "the next number"));
    }
    if at + head.stored_bytes() > size {
        return Ok(field("body_bytes", head.body_bytes.into(), "a body that ends inside the file"));
    }
    let (body, padding) = ahead
        .read(file, at, head.stored_bytes(), size)?
        .get(EditHead::BYTES..)
        .and_then(|rest| rest.split_at_checked(head.body_bytes as usize))
        .unwrap_or_default();
    if padding.iter().any(|byte| *byte != 0) {
        return Ok(field("padding", 1, "zeros"));
    }
    Ok(Edit::decode(&head, body).map(|edit| (head, edit)))
}

/// Whether everything from here on was never written. Files are made as holes, so only allocated parts are read.
pub(super) fn rest_is_zero(file: &mut dyn BlockFile, at: u64, size: u64) -> Result<bool, JournalError> {
    let mut block = vec![0; 64 << 10];
    for part in file.allocated(crate::io::ByteRange { start: at, end: size })? {
        let mut at = part.start;
        while at < part.end {
            let len = (part.end - at).min(block.len() as u64) as usize;
            let data = block.get_mut(..len).unwrap_or_default();
            file.read(&mut [ReadAt { offset: at, data }])?;
            if data.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += len as u64;
        }
    }
    Ok(true)
}

/// Whether an edit behind `at` says that edit `index` was durable when it was written.
fn knows_durable(
    file: &mut dyn BlockFile,
    at: u64,
    size: u64,
    header: &ManifestHeader,
    index: u64,
) -> Result<bool, JournalError> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    for part in file.allocated(crate::io::ByteRange { start: at, end: size })? {
        let mut at = part.start / BLOCK_BYTES * BLOCK_BYTES;
        while at + BLOCK_BYTES <= size && at < part.end {
            file.read(&mut [ReadAt { offset: at, data: &mut block }])?;
            if let Ok(head) = EditHead::open(&block)
                && head.manifest == header.number
                && head.durable_index >= index
            {
                return Ok(true);
            }
            at += BLOCK_BYTES;
        }
    }
    Ok(false)
}

impl Manifest {
    /// Makes the manifest and superblock of a new journal.
    ///
    /// # Errors
    /// When the folder holds a journal already, or cannot be written.
    pub(super) fn create(
        files: Arc<dyn Files>,
        folder: &Path,
        journal: JournalId,
        now: Timestamp,
    ) -> Result<Self, JournalError> {
        let number = 1;
        let file = start_file(&*files, folder, journal, number)?;
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
            shape: Shape::default(),
            failed: None,
        };
        manifest.write_superblock(now, 0, false)?;
        Ok(manifest)
    }

    /// Opens the manifest of an existing journal for writing; answers with it whether the journal was closed in order,
    /// and the newest group of the redo log known durable.
    ///
    /// # Errors
    /// When somebody else has it open, or it is missing, foreign, damaged, or of a newer version.
    pub(super) fn open(
        files: Arc<dyn Files>,
        folder: &Path,
        now: Timestamp,
    ) -> Result<(Self, Opened), JournalError> {
        // Opened for writing first: that is the lock against a second program.
        let path = folder.join(SUPERBLOCK_NAME);
        if files.facts(&path)?.is_none() {
            return Err(without_superblock(&*files, folder)?);
        }
        let superblock_file = files.open(&path, true)?;
        let superblock = read_superblock(&*files, folder)?;
        let path = folder.join(SUPERBLOCK_NAME);
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
        let mut file = files.open(&manifest_path(folder, superblock.manifest), true)?;
        // What was read may stand in a cache only, if the program before us was killed between write and flush.
        file.flush()?;
        let torn = read.torn;
        let (mut manifest, opened) = Self::of(files, folder, superblock_file, superblock, file, read);
        if torn {
            manifest.checkpoint(now, opened.durable_group)?;
        } else {
            manifest.write_superblock(now, opened.durable_group, false)?;
        }
        Ok((manifest, opened))
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
        };
        let manifest = Self {
            files,
            folder: folder.into(),
            superblock_file,
            superblock,
            file,
            at: read.at,
            index: read.index,
            base: read.at,
            shape: read.shape,
            failed: None,
        };
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
    /// When an edit contradicts the shape, or it cannot be written; nothing is written from then on.
    pub fn append(&mut self, edits: &[Edit], now: Timestamp, durable_group: u64) -> Result<(), JournalError> {
        let path = manifest_path(&self.folder, self.superblock.manifest);
        if let Some(why) = &self.failed {
            return Err(JournalError::Failed { path, why: why.clone() });
        }
        for edit in edits {
            if let Err(what) = self.shape.apply(edit) {
                // Ours is wrong now, and what is on the medium is not: nothing more is written there.
                self.failed = Some(what.clone());
                return Err(JournalError::damaged(&path, what));
            }
        }
        let mut bytes = Vec::new();
        for (edit, index) in edits.iter().zip(self.index..) {
            bytes.extend(edit.encode(self.superblock.manifest, index, self.index - 1, durable_group));
        }
        if self.at + bytes.len() as u64 > self.file.size_bytes() {
            return self.checkpoint(now, durable_group); // it holds these edits, too
        }
        let written =
            self.file.write(&[WriteAt { offset: self.at, data: &bytes }]).and_then(|()| self.file.flush());
        self.note(written)?;
        self.at += bytes.len() as u64;
        self.index += edits.len() as u64;
        if self.at - self.base > MANIFEST_CHECKPOINT_BYTES.max(self.base) {
            self.checkpoint(now, durable_group)?;
        }
        Ok(())
    }

    /// Writes the shape into a new manifest, makes it the one that counts, and removes the old one.
    fn checkpoint(&mut self, now: Timestamp, durable_group: u64) -> Result<(), JournalError> {
        let (old, number) = (self.superblock.manifest, self.superblock.manifest + 1);
        // A crash may have left one of this number behind that no superblock ever named.
        self.files.remove(&manifest_path(&self.folder, number))?;
        let mut file = start_file(&*self.files, &self.folder, self.superblock.journal, number)?;
        let mut at = BLOCK_BYTES;
        let mut index = 1;
        for edit in self.shape.edits() {
            let bytes = edit.encode(number, index, 0, durable_group);
            file.write(&[WriteAt { offset: at, data: &bytes }])?;
            at += bytes.len() as u64;
            index += 1;
        }
        file.flush()?;
        (self.file, self.at, self.index, self.base) = (file, at, index, at);
        self.superblock.manifest = number;
        self.write_superblock(now, durable_group, false)?;
        self.files.remove(&manifest_path(&self.folder, old))?;
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
        let written = self
            .superblock_file
            .write(&[WriteAt { offset, data: &next.to_block() }])
            .and_then(|()| self.superblock_file.flush());
        self.note(written)?;
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

    fn note<T>(&mut self, result: Result<T, crate::io::BlockError>) -> Result<T, JournalError> {
        result.map_err(|error| {
            self.failed = Some(error.to_string());
            error.into()
        })
    }
}

/// What opening found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    pub(super) clean: bool,
    pub(super) durable_group: u64,
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
