//! Reading superblock and manifest, without changing anything.
//!
//! Invariants: an edit that the superblock or a later edit knew durable and that cannot be read is damage, never a torn
//! end; of a manifest that is damaged nothing is handed out. Units: bytes, numbers of edits. Called by `manifest` and the
//! offline tools.

use std::collections::BTreeSet;
use std::path::Path;

use super::super::error::{JournalError, RESTORE};
use super::super::is_ours;
use super::super::shape::Shape;
use super::super::tolerant::head_of;
use super::{SUPERBLOCK_NAME, manifest_path, number_of_name};
use crate::format::FormatError;
use crate::format::manifest::{Edit, EditHead, ManifestHeader, SUPERBLOCK_COPIES, Superblock};
use crate::io::{BlockFile, ReadAt};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, DiskId};

/// All copies of the superblock, each for itself where the medium does not give them all.
fn read_copies(files: &dyn Files, path: &Path) -> Result<Vec<u8>, JournalError> {
    let bytes_max = SUPERBLOCK_COPIES * BLOCK_BYTES;
    // Read as a whole it may be in use by this process itself.
    files.read_head(path, bytes_max as usize).or_else(|_| head_of(files, path, bytes_max))
}

/// What the superblock says, read without changing anything.
///
/// # Errors
/// [`JournalError::NoJournal`] when there is none, [`JournalError::NoSuperblock`] when there was one; else when no copy is
/// valid or a newer version wrote it.
pub(in crate::store::journal) fn read_superblock(
    files: &dyn Files,
    folder: &Path,
) -> Result<Superblock, JournalError> {
    let path = folder.join(SUPERBLOCK_NAME);
    if files.facts(&path)?.is_none() {
        return Err(without_superblock(files, folder)?);
    }
    let bytes = read_copies(files, &path)?;
    let mut newest: Option<Superblock> = None;
    let (mut refused, mut newer) = (None, None);
    for copy in bytes.chunks(BLOCK_BYTES as usize) {
        match Superblock::open(copy) {
            Ok(superblock) => {
                if newest.is_none_or(|known| superblock.generation > known.generation) {
                    newest = Some(superblock);
                }
            }
            // A copy that only a newer program understands must not be passed over for an older one, nor for damage. Its
            // checksum is right: what flipped bits make of a copy is neither.
            Err(error) if needs_newer(copy, &error) => newer = newer.or(Some(error)),
            // A copy that was never written says nothing.
            Err(error) if copy.iter().any(|byte| *byte != 0) => refused = Some(error),
            Err(_) => {}
        }
    }
    if let Some(error) = newer {
        return Err(JournalError::format(&path, 0, "use the program that wrote it")(error));
    }
    match (newest, refused) {
        (Some(superblock), _) => Ok(superblock),
        (None, Some(error)) => {
            let remedy = "no copy in it is whole: put it back from a copy of the folder; nothing was changed";
            Err(JournalError::format(&path, 0, remedy)(error))
        }
        (None, None) => Err(without_superblock(files, folder)?),
    }
}

/// Whether a copy of the superblock that was refused is whole, and of a newer program.
fn needs_newer(copy: &[u8], refused: &FormatError) -> bool {
    matches!(refused, FormatError::Field { field: "incompatible", .. })
        || Superblock::is_of_later_version(copy)
}

/// What a folder is that has no superblock: one that never had a journal, or one that lost it. The making of a journal that
/// was interrupted before the first copy was there leaves the first manifest, and that without an edit.
pub(super) fn without_superblock(files: &dyn Files, folder: &Path) -> Result<JournalError, JournalError> {
    for found in files.neighbours(&folder.join(SUPERBLOCK_NAME))? {
        if found == SUPERBLOCK_NAME || !is_ours(&found) {
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
pub(in crate::store::journal) struct Read {
    pub(in crate::store::journal) shape: Shape,
    pub(in crate::store::journal) index: u64,
    pub(in crate::store::journal) at: u64,
    /// Newest group of the redo log that any edit knew durable.
    pub(in crate::store::journal) durable_group: u64,
    /// Disks that were removed by one of the edits, and are not there again.
    pub(in crate::store::journal) removed: BTreeSet<DiskId>,
    /// Something that was torn stands behind the last edit.
    pub(in crate::store::journal) torn: bool,
}

/// Each copy of the superblock as it stands; `None` where none was ever written.
///
/// # Errors
/// When the file cannot be read.
pub(in crate::store::journal) fn superblock_copies(
    files: &dyn Files,
    folder: &Path,
) -> Result<Vec<Option<Result<Superblock, FormatError>>>, JournalError> {
    let path = folder.join(SUPERBLOCK_NAME);
    let bytes = read_copies(files, &path)?;
    let written = |copy: &[u8]| copy.iter().any(|byte| *byte != 0);
    Ok(bytes.chunks(BLOCK_BYTES as usize).map(|copy| written(copy).then(|| Superblock::open(copy))).collect())
}

/// Reads a manifest from its file.
///
/// # Errors
/// When it is missing, foreign or damaged.
pub(in crate::store::journal) fn read_manifest(
    files: &dyn Files,
    folder: &Path,
    superblock: &Superblock,
) -> Result<Read, JournalError> {
    walk_manifest(files, folder, superblock, &mut |_, _, _| {})
}

/// As [`read_manifest`], and shows every edit: where it stands, its head, what it says.
pub(in crate::store::journal) fn walk_manifest(
    files: &dyn Files,
    folder: &Path,
    superblock: &Superblock,
    see: &mut dyn FnMut(u64, &EditHead, &Edit),
) -> Result<Read, JournalError> {
    let path = manifest_path(folder, superblock.manifest);
    let mut file = files.open(&path, false)?;
    let size = file.size_bytes();
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut block }])?;
    let header = ManifestHeader::open(&block).map_err(JournalError::format(&path, 0, RESTORE))?;
    if header.journal != superblock.journal || header.number != superblock.manifest {
        return Err(JournalError::Foreign { path });
    }
    let mut read = Read {
        shape: Shape::default(),
        index: 1,
        at: BLOCK_BYTES,
        durable_group: 0,
        removed: BTreeSet::new(),
        torn: false,
    };
    let mut ahead = Ahead { start: 0, bytes: Vec::new() };
    while read.at < size {
        let edit = match read_edit(&mut *file, &mut ahead, read.at, size, &header, read.index)? {
            Ok(edit) => edit,
            Err(_) if rest_is_zero(&mut *file, read.at, size)? => break,
            Err(error) => {
                if read.index <= superblock.manifest_edits
                    || knows_durable(&mut *file, read.at, size, &header, read.index)?
                {
                    return Err(JournalError::format(&path, read.at, RESTORE)(error));
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
        match &edit {
            Edit::DiskRemoved(removed) => _ = read.removed.insert(removed.disk),
            Edit::DiskAdded(added) => _ = read.removed.remove(&added.disk),
            _ => {}
        }
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
pub(in crate::store::journal) fn rest_is_zero(
    file: &mut dyn BlockFile,
    at: u64,
    size: u64,
) -> Result<bool, JournalError> {
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
