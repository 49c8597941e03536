//! Opening a file or device with the best backend this host allows.
//!
//! Invariants: the choice changes speed, never meaning: every backend keeps the contract of [`BlockFile`]. io_uring
//! is tried first; where the kernel or a container forbids it, pread/pwrite threads take over without an error.
//! Called by the programs for source disks, targets and journals.

use std::path::Path;
use std::sync::Arc;

use super::buffer::BufferArena;
use super::file::DirectFile;
use super::{BlockError, BlockFile};

/// How a file or device is opened. The default reads, with direct I/O where possible, shared.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for writing too; a read-only file or device is then refused.
    pub write: bool,
    /// Bypass the page cache (O_DIRECT) where the file system allows it. Otherwise the page cache is used, which
    /// costs host memory and makes a flush wait for what it collected. A disk that something else has mounted must
    /// be read directly, or the page cache may answer with what it read before: check [`Backend::is_direct`].
    pub direct: bool,
    /// Refuse to share: O_EXCL on a block device, a lock on a file. A second exclusive open fails.
    pub exclusive: bool,
    /// Operations io_uring keeps in flight, 1 to 1024. Each may pin up to 256 KiB more where buffers are unaligned.
    pub queue_depth: u32,
    /// An arena whose buffers io_uring registers with the kernel, so that reads and writes in them save the page
    /// lookups. Registration counts as locked memory; where the limit forbids it, the buffers work unregistered.
    pub arena: Option<Arc<BufferArena>>,
}

/// Scattered blocks of 4 KiB: on a virtual disk 128 in flight wrote a fifth more than 32, and 256 no more than that.
/// Not more bytes than one call has are ever pinned.
const QUEUE_DEPTH_DEFAULT: u32 = 128;

impl Default for OpenOptions {
    fn default() -> Self {
        Self { write: false, direct: true, exclusive: false, queue_depth: QUEUE_DEPTH_DEFAULT, arena: None }
    }
}

impl OpenOptions {
    /// Direct, shared, for reading: a source disk.
    #[must_use]
    pub fn reading() -> Self {
        Self::default()
    }

    /// Direct, exclusive, for reading and writing: a target or journal.
    #[must_use]
    pub fn writing() -> Self {
        Self { write: true, exclusive: true, ..Self::default() }
    }
}

/// Which backend serves a file, for the log and the status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring; `direct` tells whether the page cache is bypassed.
    Uring {
        /// O_DIRECT is in use.
        direct: bool,
    },
    /// pread and pwrite on a few threads.
    Threads {
        /// O_DIRECT is in use.
        direct: bool,
    },
}

impl Backend {
    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(self) -> bool {
        match self {
            Self::Uring { direct } | Self::Threads { direct } => direct,
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, direct) = match self {
            Self::Uring { direct } => ("io_uring", direct),
            Self::Threads { direct } => ("pread/pwrite", direct),
        };
        write!(f, "{name}, {}", if *direct { "direct" } else { "buffered" })
    }
}

/// Whether this host permits io_uring; otherwise threads do the same work for more CPU.
#[cfg(feature = "uring")]
#[must_use]
pub fn uring_permitted() -> bool {
    super::uring::Ring::new(1).is_ok()
}

/// Opens `path`, a regular file or block device, with the best backend there is.
///
/// # Errors
/// When it does not exist, may not be opened so, is neither file nor block device, or is in use and
/// [`OpenOptions::exclusive`] was asked for.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn BlockFile>, BlockError> {
    open_reporting(path, options).map(|(file, _)| file)
}

/// As [`open`], telling which backend was chosen.
///
/// # Errors
/// As for [`open`].
pub fn open_reporting(
    path: &Path,
    options: &OpenOptions,
) -> Result<(Box<dyn BlockFile>, Backend), BlockError> {
    #[cfg(feature = "uring")]
    if let Ok(ring) = super::uring::Ring::new(options.queue_depth) {
        let file = super::uring::UringFile::with_ring(ring, path, options)?;
        let backend = Backend::Uring { direct: file.is_direct() };
        return Ok((Box::new(file), backend));
    }
    let file = DirectFile::open(path, options)?;
    let backend = Backend::Threads { direct: file.is_direct() };
    Ok((Box::new(file), backend))
}
