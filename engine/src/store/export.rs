//! A disk as it was, copied into files of its own: flat, sparse or stream-optimised VMDK, or raw.
//!
//! Invariants: nothing that exists is overwritten; a copy is made in a folder of its own, `NAME.partial`, and gets its names when
//! it is whole and durable, so that what a kill leaves looks like nothing else; what fails is removed. Blocks of zeros are left out where the format can. The copy has a UUID of its
//! own. Units: bytes. Called by the master target's `export` and by the offline tools, on a thread of their own.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags};

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
    /// Somebody else makes the same copy, or was killed while doing so.
    #[error("{} is there: another export makes this copy, or one that was killed left it; if none runs, remove that folder", path.display())]
    Partial {
        /// The folder.
        path: PathBuf,
    },
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
            Self::Partial { .. } | Self::Stream { .. } => Severity::Stop,
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
    let mut partial = Partial::begin(out)?;
    let place = partial.folder.join(out.file_name().unwrap_or_default());
    let made = &mut partial.made;
    let data_bytes = match format {
        ExportFormat::Flat => vmdk(files, source, &place, TargetKind::MonolithicFlat, made, progress),
        ExportFormat::Sparse => vmdk(files, source, &place, TargetKind::MonolithicSparse, made, progress),
        ExportFormat::Stream => stream(source, &place, made, progress),
        ExportFormat::Raw => raw(files, source, &place, made, progress),
    }?;
    let mut exported = Exported { size_bytes: source.size_bytes(), data_bytes, ..Exported::default() };
    exported.files = partial.finish()?;
    for path in &exported.files {
        exported.file_bytes += files.facts(path)?.map_or(0, |facts| facts.size_bytes);
    }
    Ok(exported)
}

/// A copy that is not whole, in its folder; dropped, it is removed.
struct Partial {
    folder: PathBuf,
    /// Where it will be.
    home: PathBuf,
    /// Its files, the one that makes it a disk first.
    made: Vec<PathBuf>,
}

impl Partial {
    fn begin(out: &Path) -> Result<Self, ExportError> {
        if std::fs::symlink_metadata(out).is_ok() {
            return Err(FilesError::Exists { path: out.into() }.into());
        }
        let home = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let folder = home.join(name);
        std::fs::create_dir(&folder).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => ExportError::Partial { path: folder.clone() },
            ErrorKind::NotFound => FilesError::NoFolder { path: home.into() }.into(),
            _ => FilesError::system("create", &folder, error).into(),
        })?;
        Ok(Self { folder, home: home.to_owned(), made: Vec::new() })
    }

    /// The copy is whole and durable where it is: it gets its names. Answers its files.
    fn finish(mut self) -> Result<Vec<PathBuf>, ExportError> {
        // What makes it a disk comes last. What fails removes those that have their names, too.
        for path in self.made.iter_mut().rev() {
            let to = self.home.join(path.file_name().unwrap_or_default());
            rename_to_new(path, &to)?;
            *path = to;
        }
        let synced = File::open(&self.home).and_then(|home| home.sync_all());
        synced.map_err(|error| FilesError::system("make durable the directory", &self.home, error))?;
        Ok(std::mem::take(&mut self.made))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let _ = std::fs::remove_file(path); // the error that matters is the one that is answered
        }
        let _ = std::fs::remove_dir_all(&self.folder); // made by this export, with nothing of others in it
    }
}

/// Never over something that exists.
fn rename_to_new(from: &Path, to: &Path) -> Result<(), FilesError> {
    let exists = || FilesError::Exists { path: to.into() };
    let renamed = rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
    match renamed {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => Err(exists()),
        // Not every file system knows how.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if std::fs::symlink_metadata(to).is_ok() => {
            Err(exists())
        }
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            std::fs::rename(from, to).map_err(|error| FilesError::system("rename", from, error))
        }
        Err(error) => Err(FilesError::system("rename", from, error.into())),
    }
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
    // Before the first byte is copied.
    let home = out.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let taken = made.iter().map(|path| home.join(path.file_name().unwrap_or_default()));
    if let Some(path) = taken.into_iter().find(|path| std::fs::symlink_metadata(path).is_ok()) {
        return Err(FilesError::Exists { path }.into());
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::files::fs::FsFiles;
    use crate::store::files::memory::MemoryFiles;

    const SIZE: u64 = 1 << 20;

    fn real() -> Arc<dyn Files> {
        Arc::new(FsFiles::new(|path, writable| {
            let options =
                if writable { crate::io::OpenOptions::writing() } else { crate::io::OpenOptions::reading() };
            crate::io::open(path, &options)
        }))
    }

    fn source() -> Box<dyn BlockFile> {
        let (files, path) = (MemoryFiles::default().opener(), Path::new("/disk"));
        files.create(path, SIZE).unwrap();
        let mut disk = files.open(path, true).unwrap();
        disk.write(&[WriteAt { offset: 0, data: &[7; 8192] }]).unwrap();
        disk
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_copy_has_its_name_when_it_is_whole_and_not_before() {
        for format in [ExportFormat::Flat, ExportFormat::Sparse, ExportFormat::Stream, ExportFormat::Raw] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("web.vmdk");
            let seen = std::cell::RefCell::new(Vec::new());
            let mut look = |_| seen.borrow_mut().push(names(dir.path()));
            let made = export(&real(), &mut *source(), &out, format, &mut look).unwrap();
            assert!(!seen.borrow().is_empty());
            assert!(seen.borrow().iter().all(|names| *names == ["web.vmdk.partial"]), "{format:?}: {seen:?}");
            let listed: Vec<PathBuf> = names(dir.path()).iter().map(|name| dir.path().join(name)).collect();
            assert!(made.files.len() == listed.len() && made.files.iter().all(|file| listed.contains(file)));
            let again = export(&real(), &mut *source(), &out, format, &mut |_| ()).unwrap_err();
            assert!(again.to_string().contains("exists"), "{format:?}: {again}");
            assert_eq!(names(dir.path()).len(), listed.len(), "{format:?}");
        }
    }

    #[test]
    fn what_a_killed_export_left_is_named_and_what_fails_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("web.vmdk");
        // In the way of the second file.
        std::fs::write(dir.path().join("web-flat.vmdk"), "mine").unwrap();
        let refused = export(&real(), &mut *source(), &out, ExportFormat::Flat, &mut |_| ()).unwrap_err();
        assert!(refused.to_string().contains("web-flat.vmdk"), "{refused}");
        assert_eq!(names(dir.path()), ["web-flat.vmdk"]);
        std::fs::create_dir(dir.path().join("web.vmdk.partial")).unwrap();
        let refused = export(&real(), &mut *source(), &out, ExportFormat::Raw, &mut |_| ()).unwrap_err();
        assert!(refused.to_string().contains("was killed"), "{refused}");
        assert_eq!(names(dir.path()), ["web-flat.vmdk", "web.vmdk.partial"]);
    }
}
