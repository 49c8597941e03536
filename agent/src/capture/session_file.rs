//! The session file: what was captured, by which programs, in which boot.
//!
//! Invariants: the file is durable before a program is attached and before a disk is followed, so that whatever it does not
//! vouch for is compared; it vouches only for what programs saw without a break, in the boot it names. Between boots
//! nothing holds: the file system was mounted and its log replayed before the agent could start. Called by `tracker`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use reprotect_engine::io::durable::{Access, read_bounded, replace_file};
use serde::{Deserialize, Serialize};

use super::sysfs::Account;
use super::{Anchor, BlockDisk, CaptureError};

/// The file in the state directory.
const SESSION_FILE: &str = "capture.json";
/// Largest file read: 64 disks need a few KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Version of the file and of the layout of maps; another version is as no file.
pub(crate) const VERSION: u32 = 3;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) version: u32,
    pub(crate) boot: String,
    /// Numbers of the pinned maps and programs.
    pub(crate) pins: Vec<u32>,
    /// Which build of the programs they are.
    #[serde(default)]
    pub(crate) object: String,
    pub(crate) disks: Vec<SessionDisk>,
    /// Disks, by who they are, of which capture was interrupted, which is not known to be written down.
    #[serde(default)]
    pub(crate) owed: BTreeSet<String>,
}

/// A disk in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SessionDisk {
    /// Who it is, as the agent knows it.
    pub(crate) identity: String,
    pub(crate) name: String,
    pub(crate) number: (u32, u32),
    pub(crate) sequence: u64,
    pub(crate) size_sectors: u64,
    pub(crate) slot: usize,
    /// What its accounting is compared with.
    pub(crate) anchor: Option<Anchor>,
    /// It was seen without a write in flight since it is followed: every one since then is known by its generation.
    #[serde(default)]
    pub(crate) seen_quiet: bool,
    /// Sectors of entries that were given up since the anchor was taken.
    #[serde(default)]
    pub(crate) reaped: Account,
    /// Something was missed that is not written down: the anchor is from before that.
    #[serde(default)]
    pub(crate) untold: bool,
}

impl SessionDisk {
    /// Whether it is the disk that is there now, whatever its size.
    pub(crate) fn is(&self, disk: &BlockDisk, identity: &str) -> bool {
        self.identity == identity && self.number == disk.number && self.sequence == disk.sequence
    }
}

/// Why a disk must be compared with the target from end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompareCause {
    /// It was not followed before.
    FirstTime,
    /// The machine was started since.
    NewBoot,
    /// Programs, maps or the session file are not as they were left.
    PinsChanged {
        /// What is missing or different.
        what: String,
    },
    /// It is smaller than it was, or another disk in its place.
    OtherDisk,
    /// The accounting oracle found writes that were never seen.
    Unaccounted {
        /// Sectors.
        sectors: u64,
    },
}

impl std::fmt::Display for CompareCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::FirstTime => f.write_str("the disk was not followed before"),
            Self::NewBoot => f.write_str("the machine was started since, and wrote before the agent ran"),
            Self::PinsChanged { what } => write!(f, "capture was interrupted: {what}"),
            Self::OtherDisk => f.write_str("the disk shrank or was replaced"),
            Self::Unaccounted { sectors } => {
                write!(f, "the kernel wrote {sectors} sectors that capture did not see")
            }
        }
    }
}

/// What is known of a disk's changes when following begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// Every change since the session before is in the map.
    Continued {
        /// Blocks that the next harvest finds, at least.
        dirty_blocks: u64,
    },
    /// Nothing is known: everything is compared.
    Compare(CompareCause),
}

/// The directory of the file.
#[derive(Clone, Debug)]
pub(crate) struct SessionStore {
    dir: PathBuf,
}

impl SessionStore {
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// What was written last; `None` where there is nothing that can be used, which is told to the log.
    pub(crate) fn load(&self) -> Option<Session> {
        let path = self.dir.join(SESSION_FILE);
        match read_bounded(&path, FILE_BYTES_MAX) {
            Ok(bytes) => match serde_json::from_slice::<Session>(&bytes) {
                Ok(session) if session.version == VERSION => Some(session),
                Ok(session) => {
                    tracing::warn!(path = %path.display(), version = session.version, "capture session of another version; all disks are compared");
                    None
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the capture session is damaged; all disks are compared");
                    None
                }
            },
            Err(error) if error.is_not_found() => None,
            Err(error) => {
                tracing::warn!("{error}; all disks are compared");
                None
            }
        }
    }

    /// Makes it durable.
    pub(crate) fn store(&self, session: &Session) -> Result<(), CaptureError> {
        let bytes = serde_json::to_vec_pretty(session).unwrap_or_default();
        let path = self.dir.join(SESSION_FILE);
        replace_file(&path, &bytes, Access::Private)
            .map_err(|error| CaptureError::File { path, source: std::io::Error::other(error) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let disk = SessionDisk {
            identity: "id".into(),
            name: "loop0".into(),
            number: (7, 0),
            sequence: 9,
            size_sectors: 4096,
            slot: 3,
            anchor: Some(Anchor::exact(Account { written: 8, discarded: 0 })),
            seen_quiet: true,
            reaped: Account { written: 16, discarded: 8 },
            untold: true,
        };
        let (boot, object) = ("b".into(), "o".into());
        let owed = BTreeSet::from(["wwn".to_owned()]);
        Session { version: VERSION, boot, pins: vec![1, 2], object, disks: vec![disk], owed }
    }

    #[test]
    fn a_session_is_read_as_it_was_written_and_another_version_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = SessionStore::at(dir.path());
        assert_eq!(store.load(), None);
        store.store(&session()).unwrap();
        assert_eq!(store.load(), Some(session()));
        store.store(&Session { version: VERSION + 1, ..session() }).unwrap();
        assert_eq!(store.load(), None);
        std::fs::write(dir.path().join(SESSION_FILE), "{").unwrap();
        assert_eq!(store.load(), None);
    }
}
