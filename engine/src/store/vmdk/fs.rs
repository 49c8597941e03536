//! The files of a disk on a real file system.
//!
//! Invariants: new files never replace old ones; a new file's name is durable before it is used; `replace` leaves the
//! old or the new content after a crash. How an open file is read and written is the backend's business, which is
//! injected: this file knows names, lengths and free space only. Called by the programs, through `store::target`.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::error::TargetError;
use super::opener::{ExtentOpener, FileFacts};
use crate::io::durable::{Access, replace_file};
use crate::io::{BlockError, BlockFile};

/// Opens a file or device at a path, writable and then exclusively, or for reading.
pub type Backend = dyn Fn(&Path, bool) -> Result<Box<dyn BlockFile>, BlockError> + Send + Sync;

/// [`ExtentOpener`] over the file system, with a backend for the open files.
pub struct FsOpener {
    backend: Box<Backend>,
}

impl FsOpener {
    /// An opener whose files are opened by `backend(path, writable)`.
    #[must_use]
    pub fn new(
        backend: impl Fn(&Path, bool) -> Result<Box<dyn BlockFile>, BlockError> + Send + Sync + 'static,
    ) -> Self {
        Self { backend: Box::new(backend) }
    }
}

/// The directory of a path; a bare name stands in the current one.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_directory(path: &Path) -> Result<(), TargetError> {
    let directory = directory(path);
    File::open(directory)
        .and_then(|opened| opened.sync_all())
        .map_err(|source| TargetError::system("flush the directory", directory, source))
}

fn missing_or(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TargetError {
    let path = PathBuf::from(path);
    move |source| match source.kind() {
        ErrorKind::NotFound => TargetError::MissingFile { by: path.clone(), path },
        _ => TargetError::system(doing, path, source),
    }
}

impl ExtentOpener for FsOpener {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, TargetError> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TargetError::system("examine", path, error)),
        };
        let is_device = metadata.file_type().is_block_device();
        let size_bytes = if is_device {
            // A device's metadata has no length; its end is where seeking to the end arrives.
            File::open(path)
                .and_then(|mut device| std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0)))
                .map_err(|source| TargetError::system("measure", path, source))?
        } else {
            metadata.len()
        };
        Ok(Some(FileFacts { size_bytes, is_device, inode: metadata.ino() }))
    }

    fn neighbours(&self, path: &Path) -> Result<Vec<String>, TargetError> {
        let directory = directory(path);
        let refused = |source| TargetError::system("list the directory", directory, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(refused)? {
            names.push(entry.map_err(refused)?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, TargetError> {
        let directory = directory(path);
        let facts = rustix::fs::statvfs(directory)
            .map_err(|errno| TargetError::system("measure the free space of", directory, errno.into()))?;
        Ok(Some(facts.f_bavail.saturating_mul(facts.f_frsize)))
    }

    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, TargetError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(bytes_max as u64).read_to_end(&mut bytes))
            .map_err(missing_or("read", path))?;
        Ok(bytes)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, TargetError> {
        (self.backend)(path, writable).map_err(|error| match error.source.kind() {
            ErrorKind::NotFound => TargetError::MissingFile { path: path.into(), by: path.into() },
            ErrorKind::WouldBlock | ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => {
                TargetError::InUse { path: path.into(), sign: error.source.to_string() }
            }
            _ => error.into(),
        })
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), TargetError> {
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error
            .kind()
        {
            ErrorKind::AlreadyExists => TargetError::Exists { path: path.into() },
            _ => TargetError::system("create", path, error),
        })?;
        let sized = file.set_len(size_bytes).and_then(|()| file.sync_all());
        if let Err(error) = sized {
            let _ = fs::remove_file(path); // ours and empty; the error that matters is the one below
            return Err(TargetError::system("set the length of", path, error));
        }
        sync_directory(path)
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), TargetError> {
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| file.set_len(size_bytes).and_then(|()| file.sync_all()))
            .map_err(missing_or("set the length of", path))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), TargetError> {
        replace_file(path, content, Access::AsBefore)
            .map_err(|error| TargetError::system(error.step, error.path, error.source))
    }

    fn remove(&self, path: &Path) -> Result<(), TargetError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(TargetError::system("remove", path, error))
            }
            _ => Ok(()),
        }
    }
}
