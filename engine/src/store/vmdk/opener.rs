//! How the VMDK layer reaches files: a seam, so that all of it runs on memory files and none of it knows a backend.
//!
//! # Files of fixed size and extents that grow
//! A [`BlockFile`] has a fixed size, a sparse extent grows. The two meet here: a sparse extent that is opened for
//! writing is first made as long as it can ever become ([`ExtentOpener::resize`]; the tail is a hole and costs
//! nothing), and cut to what is used when it is closed cleanly. After a crash the file is merely long; every reader
//! goes by the tables, and the next open finds the append position from the tables, never from the length.
//!
//! Called by `store::vmdk` and `store::target`. Units: bytes.

use std::path::Path;

use super::error::TargetError;
use crate::io::BlockFile;

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

/// Opens, makes and measures the files of a disk. Implementations must not follow a path anywhere but where it says.
pub trait ExtentOpener: Send + Sync {
    /// What is at `path`; `None` when nothing is.
    ///
    /// # Errors
    /// When the path cannot be examined.
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, TargetError>;

    /// Names in the directory of `path`, of files and directories, `path` itself included.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn neighbours(&self, path: &Path) -> Result<Vec<String>, TargetError>;

    /// Bytes free in the directory of `path`; `None` when that cannot be known.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, TargetError>;

    /// The first `bytes_max` bytes of a file, less when it is shorter.
    ///
    /// # Errors
    /// When it is missing or unreadable.
    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, TargetError>;

    /// Opens an existing file or device. Writable ones exclusively: a second writer is an error.
    ///
    /// # Errors
    /// [`TargetError::InUse`] when somebody else has it, [`TargetError::MissingFile`] when it is not there.
    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, TargetError>;

    /// Makes a new file of `size_bytes` zeros, as a hole; durable, name included, when this returns.
    ///
    /// # Errors
    /// [`TargetError::Exists`] when there is one.
    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), TargetError>;

    /// Sets the length of a file nobody has open through this opener; new bytes are zeros.
    ///
    /// # Errors
    /// When the file system refuses.
    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), TargetError>;

    /// Writes a small file whole, replacing what was there: after a crash it is the old or the new one. Durable when
    /// this returns.
    ///
    /// # Errors
    /// When any step fails; the old file then still stands.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), TargetError>;

    /// Removes a file that this program created; one that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    fn remove(&self, path: &Path) -> Result<(), TargetError>;
}
