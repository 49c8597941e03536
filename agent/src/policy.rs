//! The policy that the master target gave, kept so that it holds while there is no session and after a restart.
//!
//! Invariants: only a newer revision of the same target, or another target's, replaces it; it holds from the moment it
//! came, also where it could not be written; the file is written by a thread, because the state directory may be on a
//! file system that is frozen at the moment. Units: milliseconds. Owned by `machine`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reprotect_engine::format::message::Policy;
use reprotect_engine::io::durable::{Access, read_bounded, replace_file};
use serde::{Deserialize, Serialize};

/// The file in the state directory.
const POLICY_FILE: &str = "policy.json";
/// Largest file read.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    target: String,
    revision: u64,
    points_every_ms: u64,
    #[serde(default)]
    app_points_every_ms: u64,
}

/// The policy in force.
#[derive(Debug)]
pub(crate) struct PolicyKeeper {
    path: PathBuf,
    newest: Arc<Mutex<Option<Record>>>,
}

impl PolicyKeeper {
    /// What was kept. Blocks.
    pub(crate) fn load(state_dir: &Path) -> Self {
        let path = state_dir.join(POLICY_FILE);
        let known = match read_bounded(&path, FILE_BYTES_MAX) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(record) => Some(record),
                Err(error) => {
                    tracing::warn!(
                        path = %path.display(), %error,
                        "the kept policy is damaged; the agent's own configuration holds until the next session"
                    );
                    None
                }
            },
            Err(error) if error.is_not_found() => None,
            Err(error) => {
                tracing::warn!("{error}; the agent's own configuration holds until the next session");
                None
            }
        };
        Self { path, newest: Arc::new(Mutex::new(known)) }
    }

    fn newest(&self) -> Option<Record> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a policy over and keeps it; answers whether it is new.
    pub(crate) fn take(&self, policy: &Policy) -> bool {
        let record = Record {
            target: policy.target.to_string(),
            revision: policy.revision,
            points_every_ms: policy.points_every_ms,
            app_points_every_ms: policy.app_points_every_ms,
        };
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let known = newest.as_ref();
        if known.is_some_and(|known| known.target == record.target && known.revision >= record.revision) {
            return false;
        }
        *newest = Some(record);
        drop(newest);
        let (path, newest) = (self.path.clone(), Arc::clone(&self.newest));
        let write = move || {
            // Under the lock: of two writers the later one writes what is newest.
            let newest = newest.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let written = newest.map_or(Ok(()), |record| {
                let bytes = serde_json::to_vec_pretty(&record).unwrap_or_default();
                replace_file(&path, &bytes, Access::Private)
            });
            if let Err(error) = written {
                tracing::error!("{error}; the policy holds until this agent ends");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("policy".into()).spawn(write) {
            tracing::error!(%error, "no thread to keep the policy; it holds until this agent ends");
        }
        true
    }

    /// Pause between two scan rounds, where the policy says one.
    pub(crate) fn points_every(&self) -> Option<Duration> {
        let pause = self.newest()?.points_every_ms;
        (pause > 0).then(|| Duration::from_millis(pause))
    }

    /// Pause between two points that bring the machine to rest, where the policy says; inside, `None` is never.
    pub(crate) fn app_points_every(&self) -> Option<Option<Duration>> {
        match self.newest()?.app_points_every_ms {
            0 => None,
            Policy::NEVER_MS => Some(None),
            pause => Some(Some(Duration::from_millis(pause))),
        }
    }

    /// The revision in force; zero without a policy.
    pub(crate) fn revision(&self) -> u64 {
        self.newest().map_or(0, |record| record.revision)
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::units::PeerId;

    use super::*;

    fn policy(target: PeerId, revision: u64, points_every_ms: u64) -> Policy {
        Policy { revision, points_every_ms, app_points_every_ms: 0, target }
    }

    const TARGET: PeerId = PeerId([7; 16]);

    fn reloaded(dir: &Path, revision: u64) -> PolicyKeeper {
        for _ in 0..1000 {
            let keeper = PolicyKeeper::load(dir);
            if keeper.revision() == revision {
                return keeper;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("revision {revision} was never written");
    }

    #[test]
    fn the_newest_revision_holds_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = PolicyKeeper::load(dir.path());
        assert_eq!((keeper.revision(), keeper.points_every()), (0, None));
        assert!(keeper.take(&policy(TARGET, 3, 5000)));
        assert!(!keeper.take(&policy(TARGET, 2, 9000)), "older");
        assert!(!keeper.take(&policy(TARGET, 3, 9000)), "known");
        assert_eq!(keeper.points_every(), Some(Duration::from_secs(5)));
        let again = reloaded(dir.path(), 3);
        assert_eq!(again.points_every(), Some(Duration::from_secs(5)));
        assert!(again.take(&policy(PeerId([8; 16]), 1, 0)), "of another target");
        assert_eq!(again.points_every(), None, "zero: the agent's own configuration");
        reloaded(dir.path(), 1);
    }

    #[test]
    fn a_damaged_file_is_as_no_policy() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(POLICY_FILE), b"{\"revision\":").unwrap();
        assert_eq!(PolicyKeeper::load(dir.path()).revision(), 0);
    }
}
