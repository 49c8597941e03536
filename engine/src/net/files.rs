//! Small files of identities, invitations and revocations: read with a bound, private ones refused when others may
//! read them, replaced atomically.
//!
//! Invariants: a reader sees the old or the new content, never a mixture; a private file is created 0600 and is
//! never wider in between. Called by the rest of `net`.

use std::fs::{DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Answer, Severity};
pub use crate::io::durable::Access;
use crate::io::durable::replace_file;

/// Largest file read here: a few thousand invitations or revocations.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a small file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Others may read a private file.
    #[error(
        "{} is readable by others (mode {mode:04o}) and may have been copied; run `chmod 600 {}` and, if others had access, enrol again",
        path.display(), path.display()
    )]
    TooWide {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Longer than any valid file of its kind.
    #[error("{} has more than {max} bytes, which no valid file of its kind has; restore it from a backup", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The bound in bytes.
        max: u64,
    },
}

impl FileError {
    /// Whether the file is simply not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Answer for FileError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileError {
    move |source| FileError::Io { action, path: path.to_owned(), source }
}

/// Reads a file of at most [`FILE_BYTES_MAX`] bytes.
///
/// # Errors
/// [`FileError::Io`], [`FileError::TooLong`].
pub fn read_public(path: &Path) -> Result<Vec<u8>, FileError> {
    read(path, File::open(path).map_err(io_error("open", path))?)
}

/// Reads a private file; the permissions are checked on the open file, so that it cannot be exchanged in between.
///
/// # Errors
/// Also [`FileError::TooWide`] when group or others have any permission.
pub fn read_private(path: &Path) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let mode = file.metadata().map_err(io_error("examine", path))?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::TooWide { path: path.to_owned(), mode });
    }
    read(path, file)
}

fn read(path: &Path, file: File) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(FileError::TooLong { path: path.to_owned(), max: FILE_BYTES_MAX });
    }
    Ok(bytes)
}

/// Creates a directory, and its parents, for private files (0700); an existing one is left as it is.
///
/// # Errors
/// [`FileError::Io`].
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create directory", path))
}

/// Replaces `path` atomically and durably with `bytes`.
///
/// # Errors
/// [`FileError::Io`]; the old content is then still in place.
pub fn replace(path: &Path, bytes: &[u8], access: Access) -> Result<(), FileError> {
    replace_file(path, bytes, access).map_err(|error| io_error(error.step, &error.path)(error.source))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn private_files_are_created_0600_and_refused_when_wider() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        replace(&path, b"one", Access::Private).unwrap();
        replace(&path, b"two", Access::Private).unwrap();
        assert_eq!(read_private(&path).unwrap(), b"two");
        for wide in [0o640, 0o604, 0o660, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(wide)).unwrap();
            let error = read_private(&path).unwrap_err();
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn files_beyond_the_bound_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        fs::write(&path, vec![0; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(matches!(read_public(&path), Err(FileError::TooLong { .. })));
        assert!(read_public(&dir.path().join("none")).unwrap_err().is_missing());
    }
}
