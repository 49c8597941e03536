//! One daemon per state directory.
//!
//! Invariants: the lock is the kernel's (`flock`), so it ends with the process whatever happens to it; the file's
//! content is only the holder's pid for messages; the file is never deleted, because deleting a lock file lets two
//! processes lock two files of one name. Called first thing by the programs' `run`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::places::Program;
use crate::error::{Answer, Severity};

/// The held lock; dropping it lets the next daemon start.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RunLockError {
    /// Another daemon works in this directory.
    #[error("{program} already runs with the state in {} ({holder}); stop it first, or give this one its own --state-dir", state_dir.display())]
    Held {
        /// The program.
        program: Program,
        /// The directory.
        state_dir: PathBuf,
        /// `pid N`, or that it is unknown.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("the lock file {} cannot be used: {source}; check that the directory is writable and on a local file system", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl Answer for RunLockError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

impl RunLock {
    /// Takes the lock of `state_dir`, which must exist.
    ///
    /// # Errors
    /// [`RunLockError::Held`] names the holder.
    pub fn acquire(program: Program, state_dir: &Path) -> Result<Self, RunLockError> {
        let path = state_dir.join("run.lock");
        let failed = |source| RunLockError::Io { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(source)) => return Err(failed(source)),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // Only for the message; a holder that has not written its pid yet is "unknown".
                let _ = file.take(32).read_to_string(&mut text);
                let holder = match text.trim().parse::<u32>() {
                    Ok(pid) => format!("pid {pid}"),
                    Err(_) => "its pid is unknown".to_owned(),
                };
                return Err(RunLockError::Held { program, state_dir: state_dir.to_owned(), holder });
            }
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_daemon_is_told_who_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(Program::Agent, dir.path()).unwrap();
        let error = RunLock::acquire(Program::Agent, dir.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        drop(lock);
        std::fs::write(dir.path().join("run.lock"), "garbage that is longer than any process id can be")
            .unwrap();
        let lock = RunLock::acquire(Program::Agent, dir.path()).expect("a left-over file is no lock");
        drop(lock);
        assert!(matches!(
            RunLock::acquire(Program::Agent, Path::new("/nonexistent")),
            Err(RunLockError::Io { .. })
        ));
    }
}
