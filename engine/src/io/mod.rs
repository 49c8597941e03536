//! The storage seam: one trait, several backends, nothing above it knows which.
//!
//! Invariants: a call returns when every one of its operations has completed; short reads and writes are errors;
//! operations of one call have no order among themselves, calls have the order in which they return; nothing is
//! durable before [`BlockFile::flush`] returned `Ok`; a failed write or flush leaves the file *failed* (I6): the
//! caller stops using it, reopens and verifies, and never retries the flush.
//! Units: bytes. Called by `store` and the programs, on threads of their own, never on an async runtime.

pub mod buffer;
#[cfg(feature = "io")]
pub mod durable;
#[cfg(feature = "io")]
pub mod file;
#[cfg(feature = "io")]
mod handle;
pub mod memory;
#[cfg(feature = "io")]
pub mod open;
#[cfg(feature = "io")]
mod plan;
#[cfg(feature = "uring")]
pub mod uring;

#[cfg(feature = "uring")]
pub use self::open::uring_permitted;
#[cfg(feature = "io")]
pub use self::open::{Backend, OpenOptions, open, open_reporting};
use crate::error::{Answer, Severity};

/// A half-open run of bytes in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds no byte.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Adds a range to an ascending list, joining it to the last one where they touch.
pub(crate) fn push_range(ranges: &mut Vec<ByteRange>, range: ByteRange) {
    if range.is_empty() {
        return;
    }
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// One read of a batch: fill `data` from `offset`.
#[derive(Debug)]
pub struct ReadAt<'a> {
    /// Byte position in the file.
    pub offset: u64,
    /// Where the bytes go; its length is the length of the read.
    pub data: &'a mut [u8],
}

/// One write of a batch: put `data` at `offset`.
#[derive(Clone, Copy, Debug)]
pub struct WriteAt<'a> {
    /// Byte position in the file.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
}

/// A file or block device of fixed size, read and written in batches that the backend may run in parallel.
pub trait BlockFile: Send {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// Fills every buffer; returns when all are filled.
    ///
    /// # Errors
    /// The first operation that failed, with its place; buffers are then unspecified.
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError>;

    /// Writes every buffer; returns when all are written (not yet durable). Ranges must not overlap.
    ///
    /// # Errors
    /// The first operation that failed; any part of the batch may then be on the medium.
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError>;

    /// Makes `range` read as zeros, as a hole where the medium can.
    ///
    /// # Errors
    /// As for [`Self::write`].
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// A failed flush loses what it covered; it is never retried on the same open file.
    fn flush(&mut self) -> Result<(), BlockError>;

    /// The parts of `range` that may hold something else than zeros, ascending, not touching one another.
    /// A backend that cannot tell answers the whole range.
    ///
    /// # Errors
    /// When the medium cannot be asked.
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError>;
}

impl<T: BlockFile + ?Sized> BlockFile for Box<T> {
    fn size_bytes(&self) -> u64 {
        (**self).size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        (**self).read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        (**self).write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        (**self).zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        (**self).flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        (**self).allocated(range)
    }
}

/// What was being done when a [`BlockFile`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Opening the file or device.
    Open,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Zeroing or punching a hole.
    Zero,
    /// Flushing.
    Flush,
    /// Asking for allocated ranges.
    Map,
}

impl std::fmt::Display for BlockOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Flush => "flush",
            Self::Map => "map",
        })
    }
}

/// A failed operation on a file or device; names the thing, the place and the reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {name} at byte {offset}, {len} bytes: {source}")]
pub struct BlockError {
    /// The file or device as the operator knows it.
    pub name: String,
    /// What was being done.
    pub op: BlockOp,
    /// Where; zero for operations on the whole file.
    pub offset: u64,
    /// How many bytes; zero for operations on the whole file.
    pub len: u64,
    /// The operating system's reason.
    #[source]
    pub source: std::io::Error,
}

impl BlockError {
    /// Whether the medium is full: the disk pauses until there is space, nothing else is wrong.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
    }
}

impl Answer for BlockError {
    fn severity(&self) -> Severity {
        if self.is_full() { Severity::Retry } else { Severity::Stop }
    }
}
