//! A disk as it was, copied into files of its own: flat, sparse or stream-optimised VMDK, or raw.
//!
//! Invariants: nothing that exists is overwritten; what was begun and not finished is removed; when this returns `Ok`
//! the copy is durable, name included. Blocks of zeros are left out where the format can. The copy has a UUID of its
//! own. Units: bytes. Called by the master target's `export` and by the offline tools, on a thread of their own.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{Files, FilesError};
use super::target::{
    AdapterType, CreateOptions, DiskUuid, TargetError, TargetKind, TargetSpec, create_target,
};
use super::vmdk::open::check_vmdk;
use super::vmdk::random_cid;
use super::vmdk::stream::{GRAIN_BYTES, StreamSpec, StreamWriter};
use crate::checksum::is_zero;
use crate::error::{Answer, Severity};
use crate::io::{BlockError, BlockFile, ByteRange, ReadAt, WriteAt};
use crate::units::SECTOR_BYTES;

/// Bytes read and written in one go; whole grains. A live disk answers between two windows, so smaller pieces wait
/// longer all together.
const PIECE_BYTES: u64 = 64 * GRAIN_BYTES;
/// Bytes of the disk whose holes are asked for in one go.
const MAP_BYTES: u64 = 256 * PIECE_BYTES;

/// How a copy is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// Descriptor and one flat file.
    Flat,
    /// One file that grows, readable and writable by hosted products.
    Sparse,
    /// One compressed file, for upload.
    Stream,
    /// The plain sectors.
    Raw,
}

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// The files of the copy.
    pub files: Vec<PathBuf>,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes that held something.
    pub data_bytes: u64,
    /// Length of the files together; a sparse file system may store less.
    pub file_bytes: u64,
}

/// Why a disk cannot be copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// What is copied cannot be read.
    #[error("the point cannot be read: {0}; nothing was left behind; `verify` tells which points are whole")]
    Source(#[source] BlockError),
    /// The disk cannot be made.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A file cannot be made or measured.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The copy cannot be written.
    #[error("{0}; nothing was left behind: free some space or choose another place, then try again")]
    Write(#[source] BlockError),
    /// The stream cannot be written.
    #[error("cannot write {}: {source}; nothing was left behind: free some space or choose another place, then try again", path.display())]
    Stream {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Answer for ExportError {
    fn severity(&self) -> Severity {
        match self {
            Self::Source(error) | Self::Write(error) => error.severity(),
            Self::Target(error) => error.severity(),
            Self::Files(error) => error.severity(),
            Self::Stream { .. } => Severity::Stop,
        }
    }
}

/// Takes bytes of the disk at a place.
type Put<'a> = dyn FnMut(u64, &[u8]) -> Result<(), ExportError> + 'a;

/// Copies `source` into new files; `progress` is told bytes of the disk that are done.
///
/// # Errors
/// When something of that name exists, the source cannot be read, or the copy cannot be written.
pub fn export(
    files: &Arc<dyn Files>,
    source: &mut dyn BlockFile,
    out: &Path,
    format: ExportFormat,
    progress: &mut dyn FnMut(u64),
) -> Result<Exported, ExportError> {
    let mut made = Vec::new();
    let copied = match format {
        ExportFormat::Flat => vmdk(files, source, out, TargetKind::MonolithicFlat, &mut made, progress),
        ExportFormat::Sparse => vmdk(files, source, out, TargetKind::MonolithicSparse, &mut made, progress),
        ExportFormat::Stream => stream(source, out, &mut made, progress),
        ExportFormat::Raw => raw(files, source, out, &mut made, progress),
    };
    let data_bytes = copied.inspect_err(|_| {
        for path in made.iter().rev() {
            let _ = files.remove(path); // the error that matters is the one that is answered
        }
    })?;
    let mut exported = Exported { size_bytes: source.size_bytes(), data_bytes, ..Exported::default() };
    for path in made {
        exported.file_bytes += files.facts(&path)?.map_or(0, |facts| facts.size_bytes);
        exported.files.push(path);
    }
    Ok(exported)
}

fn vmdk(
    files: &Arc<dyn Files>,
    source: &mut dyn BlockFile,
    out: &Path,
    kind: TargetKind,
    made: &mut Vec<PathBuf>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, ExportError> {
    let spec = TargetSpec { path: out.into(), kind };
    let size = source.size_bytes();
    let mut target = create_target(files, &spec, size, &BTreeSet::new(), &CreateOptions::default())?;
    made.push(out.into());
    let checked = check_vmdk(&**files, out)?;
    let extents = checked.descriptor.extents().iter().filter_map(|extent| extent.file.as_deref());
    made.extend(extents.map(|name| out.with_file_name(name)).filter(|path| path != out));
    let copied = copy(source, progress, &mut |offset, data| {
        target.write(&[WriteAt { offset, data }]).map_err(ExportError::Write)
    })?;
    target.close()?;
    Ok(copied)
}

fn raw(
    files: &Arc<dyn Files>,
    source: &mut dyn BlockFile,
    out: &Path,
    made: &mut Vec<PathBuf>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, ExportError> {
    files.create(out, source.size_bytes())?;
    made.push(out.into());
    let mut file = files.open(out, true)?;
    let copied = copy(source, progress, &mut |offset, data| {
        file.write(&[WriteAt { offset, data }]).map_err(ExportError::Write)
    })?;
    file.flush().map_err(ExportError::Write)?;
    Ok(copied)
}

fn stream(
    source: &mut dyn BlockFile,
    out: &Path,
    made: &mut Vec<PathBuf>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, ExportError> {
    let failed = |source| ExportError::Stream { path: out.into(), source };
    let file =
        OpenOptions::new().write(true).create_new(true).open(out).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => FilesError::Exists { path: out.into() },
            _ => FilesError::system("create", out, error),
        })?;
    made.push(out.into());
    let spec = stream_spec(out, source.size_bytes() / SECTOR_BYTES).map_err(failed)?;
    let buffered = BufWriter::with_capacity(PIECE_BYTES as usize, file);
    let mut writer = StreamWriter::begin(buffered, &spec).map_err(failed)?;
    let copied = copy(source, progress, &mut |offset, data| {
        for (grain, data) in (offset / GRAIN_BYTES..).zip(data.chunks(GRAIN_BYTES as usize)) {
            writer.grain(grain, data).map_err(failed)?;
        }
        Ok(())
    })?;
    let file = writer.finish().map_err(failed)?.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    let folder = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    Ok(copied)
}

fn stream_spec(out: &Path, sectors: u64) -> std::io::Result<StreamSpec> {
    let random = || -> std::io::Result<[u8; 16]> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(bytes)
    };
    Ok(StreamSpec {
        name: out.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        sectors,
        uuid: DiskUuid::from_random(random()?),
        adapter: AdapterType::default(),
        cid: random_cid(0)?,
        long_content_id: random()?,
    })
}

/// Reads what may hold something, in whole grains, and hands on runs of grains that are not all zeros; answers the bytes
/// handed on.
fn copy(
    source: &mut dyn BlockFile,
    progress: &mut dyn FnMut(u64),
    put: &mut Put<'_>,
) -> Result<u64, ExportError> {
    let size = source.size_bytes();
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let (mut copied, mut done) = (0, 0);
    let mut start = 0;
    while start < size {
        let window = ByteRange { start, end: size.min(start + MAP_BYTES) };
        for part in source.allocated(window).map_err(ExportError::Source)? {
            // Parts may share a grain: what was read is not read again.
            let mut at = (part.start / GRAIN_BYTES * GRAIN_BYTES).max(done);
            let end = part.end.next_multiple_of(GRAIN_BYTES).min(window.end);
            while at < end {
                let len = (end - at).min(PIECE_BYTES);
                let data = buffer.get_mut(..len as usize).unwrap_or_default();
                source.read(&mut [ReadAt { offset: at, data }]).map_err(ExportError::Source)?;
                copied += hand_on(at, data, put)?;
                at += len;
                progress(at);
            }
            done = done.max(end);
        }
        start = window.end;
        done = done.max(start);
        progress(start);
    }
    Ok(copied)
}

fn hand_on(at: u64, data: &[u8], put: &mut Put<'_>) -> Result<u64, ExportError> {
    let grain = GRAIN_BYTES as usize;
    let (mut from, mut copied) = (0, 0);
    while from < data.len() {
        let rest = data.get(from..).unwrap_or_default();
        let full = rest.chunks(grain).take_while(|grain| !is_zero(grain)).map(<[u8]>::len).sum::<usize>();
        if full > 0 {
            put(at + from as u64, rest.get(..full).unwrap_or_default())?;
            copied += full as u64;
        }
        from += full + grain; // the grain behind it is zeros, or beyond the end
    }
    Ok(copied)
}
