//! Files on a real file system.
//!
//! Invariants: new files never replace old ones; a new file's name is durable before it is used; `replace` leaves the
//! old or the new content after a crash. How an open file is read and written is the backend's business, which is
//! injected: this file knows names, lengths and free space only. Made by the programs, called by `store`.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::{FileFacts, Files, FilesError};
use crate::io::durable::{Access, replace_file};
use crate::io::{BlockError, BlockFile};

/// Opens a file or device at a path, writable and then exclusively, or for reading.
pub type Backend = dyn Fn(&Path, bool) -> Result<Box<dyn BlockFile>, BlockError> + Send + Sync;

/// [`Files`] over the file system, with a backend for the open files.
pub struct FsFiles {
    backend: Box<Backend>,
}

impl FsFiles {
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

fn sync_directory(path: &Path) -> Result<(), FilesError> {
    let directory = directory(path);
    File::open(directory)
        .and_then(|opened| opened.sync_all())
        .map_err(|source| FilesError::system("flush the directory", directory, source))
}

fn missing_or(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FilesError {
    let path = PathBuf::from(path);
    move |source| match source.kind() {
        ErrorKind::NotFound => FilesError::Missing { path },
        _ => FilesError::system(doing, path, source),
    }
}

/// Opens what can be read to an end: a FIFO or a terminal in a datastore would hold the reader for ever, and with it
/// everyone who waits for the reader.
fn open_readable(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() || kind.is_dir() {
        return Ok(file); // reading a directory is refused by the kernel, in its own words
    }
    Err(std::io::Error::new(
        ErrorKind::InvalidInput,
        "neither a regular file nor a block device; name a disk descriptor, an image file or a device",
    ))
}

impl Files for FsFiles {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FilesError::system("examine", path, error)),
        };
        let is_device = metadata.file_type().is_block_device();
        let size_bytes = if is_device {
            // A device's metadata has no length; its end is where seeking to the end arrives.
            File::open(path)
                .and_then(|mut device| std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0)))
                .map_err(|source| FilesError::system("measure", path, source))?
        } else {
            metadata.len()
        };
        Ok(Some(FileFacts { size_bytes, is_device, inode: metadata.ino() }))
    }

    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        let directory = directory(path);
        let refused = |source| FilesError::system("list the directory", directory, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(refused)? {
            names.push(entry.map_err(refused)?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, FilesError> {
        let directory = directory(path);
        let facts = rustix::fs::statvfs(directory).map_err(|errno| match errno {
            rustix::io::Errno::NOENT => FilesError::NoFolder { path: directory.into() },
            _ => FilesError::system("measure the free space of", directory, errno.into()),
        })?;
        Ok(Some(facts.f_bavail.saturating_mul(facts.f_frsize)))
    }

    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        let mut bytes = Vec::new();
        open_readable(path)
            .and_then(|file| file.take(bytes_max as u64).read_to_end(&mut bytes))
            .map_err(missing_or("read", path))?;
        Ok(bytes)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        (self.backend)(path, writable).map_err(|error| match error.source.kind() {
            ErrorKind::NotFound => FilesError::Missing { path: path.into() },
            ErrorKind::WouldBlock | ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => {
                FilesError::InUse { path: path.into(), sign: error.source.to_string() }
            }
            _ => error.into(),
        })
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error
            .kind()
        {
            ErrorKind::AlreadyExists => FilesError::Exists { path: path.into() },
            _ => FilesError::system("create", path, error),
        })?;
        let sized = file.set_len(size_bytes).and_then(|()| file.sync_all());
        if let Err(error) = sized {
            let _ = fs::remove_file(path); // ours and empty; the error that matters is the one below
            return Err(FilesError::system("set the length of", path, error));
        }
        sync_directory(path)
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| file.set_len(size_bytes).and_then(|()| file.sync_all()))
            .map_err(missing_or("set the length of", path))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        replace_file(path, content, Access::AsBefore)
            .map_err(|error| FilesError::system(error.step, error.path, error.source))
    }

    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(FilesError::system("remove", path, error))
            }
            _ => Ok(()),
        }
    }

    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        self.remove(path)?;
        sync_directory(path)
    }

    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        let aside = super::free_name(self, path, suffix)?;
        fs::rename(path, &aside).map_err(missing_or("rename", path))?;
        sync_directory(path)?;
        Ok(aside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_of_files_only_and_nothing_else_holds_the_reader() {
        let dir = tempfile::tempdir().expect("directory");
        let files = FsFiles::new(|path, _| unreachable!("{} is not opened here", path.display()));
        let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
        fs::write(&file, b"content").expect("write");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("fifo");
        assert_eq!(files.read_head(&file, 4).expect("read"), b"cont");
        assert!(matches!(files.read_head(&dir.path().join("none"), 4), Err(FilesError::Missing { .. })));
        for odd in [&fifo, Path::new("/dev/zero"), dir.path()] {
            assert!(matches!(files.read_head(odd, 4), Err(FilesError::System { .. })), "{}", odd.display());
        }
    }
}
