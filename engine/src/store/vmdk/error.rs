//! Why a target cannot be opened, created or written, each with what to do about it.
//!
//! Invariant: every message names the file, the reason and the remedy; nothing here is retried except a full medium.
//! Called by everything in `store::vmdk` and by `store::target`.

use std::path::PathBuf;

use crate::error::{Answer, Severity};
use crate::format::vmdk::descriptor::{DescriptorError, DiskUuid};
use crate::format::vmdk::sparse::HeaderError;
use crate::io::BlockError;
use crate::store::files::FilesError;

/// Why a target cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The disk has snapshots, or is one.
    #[error("{} is part of a snapshot chain ({sign}): consolidate snapshots first, then try again", path.display())]
    Snapshot {
        /// The descriptor or extent.
        path: PathBuf,
        /// How it shows.
        sign: String,
    },
    /// The disk is not as large as the source.
    #[error("{} has {got} bytes, the source disk {expected}: choose the disk that was failed over, or create a new target", path.display())]
    SizeDiffers {
        /// The target.
        path: PathBuf,
        /// Its size in bytes.
        got: u64,
        /// The size it must have in bytes.
        expected: u64,
    },
    /// Somebody else has the disk open.
    #[error("{} is in use ({sign}): power the virtual machine off and release the disk; remove a lock only when nothing runs", path.display())]
    InUse {
        /// The target.
        path: PathBuf,
        /// The lock, or what the operating system said.
        sign: String,
    },
    /// The same UUID is known of another disk.
    #[error("{} has ddb.uuid {uuid}, which another disk has too (a template clone?): give one of them a new UUID, for instance with vmkfstools -J setuuid", path.display())]
    DuplicateUuid {
        /// The target.
        path: PathBuf,
        /// The UUID.
        uuid: DiskUuid,
    },
    /// The medium cannot hold the disk.
    #[error("{} needs {needed} bytes, {free} are free: free some space or choose another datastore", path.display())]
    NoSpace {
        /// The target.
        path: PathBuf,
        /// Bytes it needs when full.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A new target would overwrite something.
    #[error("{} exists already: choose another name, or open it as an existing target", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The folder that a new target is to be made in is not there.
    #[error("the folder {} does not exist: make it, or name another", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A file of the disk is not there.
    #[error("{} is missing (named by {}): put the file back or correct the descriptor", path.display(), by.display())]
    MissingFile {
        /// The missing file.
        path: PathBuf,
        /// The file that names it; the same file for the descriptor itself.
        by: PathBuf,
    },
    /// A file is shorter than the descriptor says.
    #[error("{} has {got} bytes, its extent line needs {expected}: the copy is incomplete, copy it again", path.display())]
    ExtentShort {
        /// The extent.
        path: PathBuf,
        /// Bytes it has.
        got: u64,
        /// Bytes it must have.
        expected: u64,
    },
    /// An extent outside the descriptor's directory.
    #[error("{} names the extent {file:?}, which is not beside it: only extents in the same directory are opened; move the file", path.display())]
    ExtentOutside {
        /// The descriptor.
        path: PathBuf,
        /// The name as written.
        file: String,
    },
    /// A disk that cannot have the size that is wanted.
    #[error("{} cannot grow: {what}; {remedy}", path.display())]
    CannotGrow {
        /// The target.
        path: PathBuf,
        /// What is in the way.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A kind of disk that cannot be a target.
    #[error("{} is {what}, which cannot be a target: {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A descriptor that cannot be understood.
    #[error("{}: {source}", path.display())]
    Descriptor {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: DescriptorError,
    },
    /// A sparse header that cannot be understood.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// Header and descriptor disagree, or the tables are damaged beyond what may be repaired.
    #[error("{} is damaged: {what}; restore the file, or create a new target and synchronise it from the source", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Parameters no disk can have.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would do.
        what: String,
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
    /// Reading or writing failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl TargetError {
    /// Whether the medium is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Block(error) => error.is_full(),
            _ => false,
        }
    }

    /// An operating system's refusal.
    pub fn system(doing: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::System { doing, path: path.into(), source }
    }
}

impl From<FilesError> for TargetError {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::InUse { path, sign } => Self::InUse { path, sign },
            FilesError::Exists { path } => Self::Exists { path },
            FilesError::Missing { path } => Self::MissingFile { by: path.clone(), path },
            FilesError::NoFolder { path } => Self::NoFolder { path },
            FilesError::System { doing, path, source } => Self::System { doing, path, source },
            FilesError::Block(error) => Self::Block(error),
        }
    }
}

impl Answer for TargetError {
    fn severity(&self) -> Severity {
        match self {
            Self::Block(error) => error.severity(),
            Self::NoSpace { .. } => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}
