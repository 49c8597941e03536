//! Why an undo run cannot be written or read, each with what to do about it; and what was found damaged in one.
//!
//! Invariant: every message names the file, the place, the reason and the remedy; a damaged image is an error or a named
//! hole, never data. Called by everything in `store::journal` that touches undo runs.

use std::path::PathBuf;

use crate::compress::CompressError;
use crate::error::{Answer, Severity};
use crate::format::FormatError;
use crate::format::undo::BlockRange;
use crate::io::buffer::ArenaError;
use crate::io::{BlockError, BlockOp, ByteRange};
use crate::store::files::FilesError;

/// A damaged place in an undo run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The damaged bytes of the file.
    pub file: ByteRange,
    /// Blocks whose images cannot be had any more: points older than the run are degraded for them. Empty where only
    /// something was damaged that can be made again from the rest of the run, or padding.
    pub lost: Vec<BlockRange>,
    /// What is wrong.
    pub reason: FormatError,
}

/// Why an undo run cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UndoError {
    /// Neither copy of the header can be read.
    #[error("{} is no undo run this program can read: {source}; restore the file, or drop the points that are older than it", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with the first copy.
        #[source]
        source: FormatError,
    },
    /// The file is a run, but not the one that is looked for.
    #[error("{} is the undo run of another {field}: the file was moved or replaced; put the right one back", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        field: &'static str,
    },
    /// A frame is damaged.
    #[error("undo run {} (undo epoch {epoch}), byte {offset}: the images of {blocks} are damaged ({source}); choose a point that is newer than the run, or take other blocks", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its undo epoch.
        epoch: u64,
        /// Where the frame stands.
        offset: u64,
        /// The blocks that cannot be read.
        blocks: BlockRange,
        /// What is wrong.
        #[source]
        source: FormatError,
    },
    /// The images were found lost earlier.
    #[error("undo run {} (undo epoch {epoch}): the images of {blocks} were lost to damage; choose a point that is newer than the run, or take other blocks", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// Its undo epoch.
        epoch: u64,
        /// The blocks that cannot be read.
        blocks: BlockRange,
    },
    /// The run holds no image of these blocks.
    #[error("undo run {} (undo epoch {epoch}) holds no image of {blocks}: read only what a lookup found in it", path.display())]
    NotHere {
        /// The file.
        path: PathBuf,
        /// Its undo epoch.
        epoch: u64,
        /// The blocks.
        blocks: BlockRange,
    },
    /// The run has reached the length it was given.
    #[error("undo run {} (undo epoch {epoch}) needs {needed} bytes, it was given {max}: close the undo epoch and go on in a new run", path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// Its undo epoch.
        epoch: u64,
        /// Bytes it would need.
        needed: u64,
        /// Bytes it may have.
        max: u64,
    },
    /// An earlier write or flush failed.
    #[error("undo run {} failed earlier: what was written last is uncertain; open it again from the undo length that was applied", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
    },
    /// Runs that are not neighbours of one disk cannot become one.
    #[error("{} and {} cannot be merged, their {field} does not fit: merge adjacent runs of one disk, the older one first", older.display(), newer.display())]
    NotAdjacent {
        /// The older run.
        older: PathBuf,
        /// The newer run.
        newer: PathBuf,
        /// What does not fit.
        field: &'static str,
    },
    /// zstd failed on our side.
    #[error(transparent)]
    Compress(#[from] CompressError),
    /// No memory for a buffer.
    #[error(transparent)]
    Memory(#[from] ArenaError),
    /// A file cannot be reached.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Reading or writing failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl UndoError {
    /// Whether the medium is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Files(error) => error.is_full(),
            Self::Block(error) => error.is_full(),
            _ => false,
        }
    }

    /// Whether the medium was full, and what reached it is known all the same. A flush that failed is never tried again,
    /// whatever the reason (I6).
    pub(in crate::store::journal) fn may_be_waited_out(&self) -> bool {
        let block = match self {
            Self::Block(error) | Self::Files(FilesError::Block(error)) => Some(error),
            _ => None,
        };
        self.is_full() && block.is_none_or(|error| error.op != BlockOp::Flush)
    }
}

impl Answer for UndoError {
    fn severity(&self) -> Severity {
        match self {
            Self::Files(error) => error.severity(),
            Self::Block(error) => error.severity(),
            Self::Compress(error) => error.severity(),
            Self::Memory(error) => error.severity(),
            Self::Full { .. } => Severity::Retry,
            Self::Damaged { .. } | Self::Lost { .. } => Severity::Resync,
            Self::Header { .. }
            | Self::Foreign { .. }
            | Self::NotHere { .. }
            | Self::Failed { .. }
            | Self::NotAdjacent { .. } => Severity::Stop,
        }
    }
}
