//! Why a journal cannot be opened, written or read, each with what to do about it.
//!
//! Invariant: every message names the file, the reason and the remedy; only a full medium is tried again.
//! Called by everything in `store::journal`.

use std::path::{Path, PathBuf};

use super::undo::UndoError;
use crate::error::{Answer, Severity};
use crate::format::FormatError;
use crate::io::BlockError;
use crate::store::files::FilesError;
use crate::units::{DiskId, Timestamp};

/// What to do about a file of the folder that the journal cannot do without.
pub(super) const RESTORE: &str = "keep the folder as it is and put the file back from a copy of it; without a copy have a new journal in another folder, and every disk is compared with its source";

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The folder holds no journal.
    #[error("{} holds no journal: name the folder that `retention.path` of the master target names", path.display())]
    NoJournal {
        /// The folder.
        path: PathBuf,
    },
    /// The superblock of a journal that was in use is gone.
    #[error(
        "{} has no `superblock`, or an empty one, and {found} of a journal lies there: put `superblock` back from a copy of the folder, or have a new journal in another folder; nothing was changed", path.display()
    )]
    NoSuperblock {
        /// The folder.
        path: PathBuf,
        /// What shows that there was one.
        found: String,
    },
    /// The folder holds something else.
    #[error("{} is not empty and holds no journal ({found}): choose an empty folder", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
        /// The first thing found.
        found: String,
    },
    /// A file belongs to another journal.
    #[error("{} belongs to another journal: somebody mixed two retention folders; take it away", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The bytes of a file are not what the format says.
    #[error("{} at byte {offset}: {source}; {remedy}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: FormatError,
        /// What to do.
        remedy: &'static str,
    },
    /// The files contradict one another.
    #[error("{} is damaged: {what}; {remedy}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The medium does not give a part of the redo log in which changes may stand that are on no target.
    #[error(
        "{} at byte {offset} cannot be read, and changes that are on no target may stand there: {reason}; start again; if it stays so, copy the folder to a sound drive with `ddrescue` and name that one: what it leaves out costs the disks concerned a compare, and no others", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Where the first such part begins.
        offset: u64,
        /// The medium's reason.
        reason: String,
    },
    /// There is no room for what is to be written.
    #[error("{} is full: {what}; free some space or shorten the retention", path.display())]
    Full {
        /// The folder.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A rollback would not fit.
    #[error(
        "disk {disk} can differ from the point in {blocks} blocks of 4 KiB; to keep what they hold now, up to {needed} bytes are needed at {}, and {free} may be used there: free some space or shorten the retention, then try again, or choose a newer point; nothing was changed", path.display()
    )]
    NoRoom {
        /// The disk.
        disk: DiskId,
        /// The folder.
        path: PathBuf,
        /// Blocks that may be overwritten.
        blocks: u64,
        /// Bytes that their images take at most.
        needed: u64,
        /// Bytes that may be used.
        free: u64,
    },
    /// A rollback was to end on its way, because its disk is closed.
    #[error(
        "the rollback of disk {disk} was interrupted: the disk is held, and it is gone on with when the master target starts again; repeat the command then for what other disks of the machine it was for"
    )]
    Interrupted {
        /// The disk.
        disk: DiskId,
    },
    /// A rollback is not begun, because its disk is closed.
    #[error(
        "the master target stops, and the rollback of disk {disk} was not begun: repeat the command when it runs again; nothing was changed"
    )]
    Stops {
        /// The disk.
        disk: DiskId,
    },
    /// A write or flush failed before.
    #[error("{} has failed before ({why}): repair the medium, then restart", path.display())]
    Failed {
        /// The file or folder.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// Something is to be written where nothing would save what it overwrites.
    #[error(
        "nothing is written to disk {disk}: no undo epoch of it goes on, so its older points would show what is written now; restart the master target"
    )]
    NoEpoch {
        /// The disk.
        disk: DiskId,
    },
    /// What waited for a target was given up, because the retention drive was short.
    #[error(
        "what waited for the target of disk {disk} is lost, for the retention drive was full or could not be read: repair what is in the way; the disk is then opened again by itself, and compared with its source"
    )]
    GivenUp {
        /// The disk.
        disk: DiskId,
    },
    /// A point is not kept any more.
    #[error("disk {disk}: {what}; `points` lists what is kept")]
    Gone {
        /// The disk.
        disk: DiskId,
        /// What is not there.
        what: String,
    },
    /// No state of a disk is at or before what was asked for.
    #[error("disk {disk} has no consistent state there ({}); `points` and `timeline` show what there is", oldest_text(*oldest))]
    NoState {
        /// The disk.
        disk: DiskId,
        /// Time of its oldest one.
        oldest: Option<Timestamp>,
    },
    /// zstd cannot be used.
    #[error("zstd cannot be used: {reason}; free some memory, then try again")]
    Zstd {
        /// Why.
        reason: String,
    },
    /// An undo run cannot be written or read.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// There were no random numbers for a salt or an identity.
    #[error("cannot get random numbers for {}: {reason}", path.display())]
    NoRandomness {
        /// What they were for.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The files cannot be reached.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Reading or writing failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl JournalError {
    /// Whether the medium is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Full { .. } => true,
            Self::Files(error) => error.is_full(),
            Self::Block(error) => error.is_full(),
            Self::Undo(error) => error.is_full(),
            _ => false,
        }
    }

    pub(super) fn format(path: &Path, offset: u64, remedy: &'static str) -> impl FnOnce(FormatError) -> Self {
        move |source| Self::Format { path: path.into(), offset, source, remedy }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), what: what.into(), remedy: RESTORE }
    }
}

impl Answer for JournalError {
    fn severity(&self) -> Severity {
        if self.is_full() { Severity::Retry } else { Severity::Stop }
    }
}

fn oldest_text(oldest: Option<Timestamp>) -> String {
    oldest.map_or_else(
        || "none is kept".to_owned(),
        |oldest| format!("the oldest is of {} s since 1970", oldest.0 / 1_000_000_000),
    )
}

/// A random number for `path`; never zero.
pub(in crate::store) fn random_u64(path: &Path) -> Result<u64, JournalError> {
    let mut bytes = [0_u8; 8];
    let refused =
        |error: getrandom::Error| JournalError::NoRandomness { path: path.into(), reason: error.to_string() };
    getrandom::fill(&mut bytes).map_err(refused)?;
    Ok(u64::from_le_bytes(bytes).max(1))
}
