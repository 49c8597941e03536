//! How the store reaches files: a seam, so that all of it runs on memory files and none of it knows a backend.
//!
//! # Files of fixed size and files that grow
//! A [`BlockFile`] has a fixed size; a sparse extent and an undo run grow. The two meet here: a file that grows is
//! first made as long as it can ever become ([`Files::resize`]; the tail is a hole and costs nothing), and cut to what
//! is used when it is closed cleanly. After a crash the file is merely long; every reader goes by what the file says
//! of itself, never by its length.
//!
//! Called by `store`; `fs` is the real side, `memory` the one of tests. Units: bytes.

#[cfg(feature = "io")]
pub mod fs;
#[cfg(any(test, feature = "sim"))]
pub mod memory;

use std::path::{Path, PathBuf};

use crate::error::{Answer, Severity};
use crate::io::{BlockError, BlockFile};

/// Why a file cannot be reached, each with what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// Somebody else has the file open.
    #[error("{} is in use ({sign}): stop what uses it", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        sign: String,
    },
    /// A new file would overwrite something.
    #[error("{} exists already: choose another name, or move it away", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It is not there.
    #[error("{} is missing: put the file back", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The folder that something is to be made in is not there.
    #[error("the folder {} does not exist: make it, or name another", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {doing} {}: {source}", path.display())]
    System {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Opening, reading or writing failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl FilesError {
    /// Whether the medium is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Block(error) => error.is_full(),
            Self::System { source, .. } => {
                matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// An operating system's refusal.
    pub fn system(doing: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::System { doing, path: path.into(), source }
    }
}

impl Answer for FilesError {
    fn severity(&self) -> Severity {
        if self.is_full() { Severity::Retry } else { Severity::Stop }
    }
}

/// The path with `suffix`, and a number where that is taken.
#[cfg(any(test, feature = "io", feature = "sim"))]
fn free_name(files: &(impl Files + ?Sized), path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
    let taken = files.neighbours(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let free = (0_u32..)
        .map(
            |number| if number == 0 { format!("{name}{suffix}") } else { format!("{name}{suffix}-{number}") },
        )
        .find(|candidate| !taken.contains(candidate));
    Ok(path.with_file_name(free.unwrap_or_default()))
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Length of a file, capacity of a device.
    pub size_bytes: u64,
    /// A block device and not a file.
    pub is_device: bool,
    /// The file's number on its file system (NFS lock files are named by it); zero where there is none.
    pub inode: u64,
}

/// Opens, makes and measures files. Implementations must not follow a path anywhere but where it says.
pub trait Files: Send + Sync {
    /// What is at `path`; `None` when nothing is.
    ///
    /// # Errors
    /// When the path cannot be examined.
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError>;

    /// Names in the directory of `path`, of files and directories, `path` itself included.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError>;

    /// Bytes free in the directory of `path`; `None` when that cannot be known.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, FilesError>;

    /// The first `bytes_max` bytes of a file, less when it is shorter.
    ///
    /// # Errors
    /// When it is missing or unreadable.
    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError>;

    /// Opens an existing file or device. Writable ones exclusively: a second writer is an error.
    ///
    /// # Errors
    /// [`FilesError::InUse`] when somebody else has it, [`FilesError::Missing`] when it is not there.
    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError>;

    /// Makes a new file of `size_bytes` zeros, as a hole; durable, name included, when this returns.
    ///
    /// # Errors
    /// [`FilesError::Exists`] when there is one.
    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError>;

    /// Sets the length of a file nobody has open through this opener; new bytes are zeros.
    ///
    /// # Errors
    /// When the file system refuses.
    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError>;

    /// Writes a small file whole, replacing what was there: after a crash it is the old or the new one. Durable when
    /// this returns.
    ///
    /// # Errors
    /// When any step fails; the old file then still stands.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError>;

    /// Removes a file that this program created; one that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    fn remove(&self, path: &Path) -> Result<(), FilesError>;

    /// As [`Self::remove`]; durable when this returns, also where it was gone.
    ///
    /// # Errors
    /// When it cannot be removed.
    fn remove_durably(&self, path: &Path) -> Result<(), FilesError>;

    /// Renames a file nobody has open, in its directory, to its name with `suffix` (and a number where that is
    /// taken); durable when this returns. Answers the new path.
    ///
    /// # Errors
    /// When it cannot be renamed.
    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError>;
}
