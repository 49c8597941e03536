//! Where a program keeps its state, its socket and its configuration, and which ports it uses.
//!
//! Invariants: without `--state-dir` (or `state_dir`) the places are the packaged ones; with it *everything* moves
//! below that directory, so that several daemons of one kind can live on one machine (demo, tests). A socket path is
//! checked against the kernel's limit here, before anything is bound. Called by the three programs.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Answer, Severity};

/// Longest socket path in bytes: the kernel's 108 with its closing zero, less the `.new` used while binding.
pub const SOCKET_PATH_BYTES_MAX: usize = 108 - 1 - 4;

/// One of the three programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// `reprotect-agent`.
    Agent,
    /// `reprotect-process-server`.
    ProcessServer,
    /// `reprotect-master-target`.
    MasterTarget,
}

/// Default port of a master target, UDP.
pub const MASTER_TARGET_PORT: u16 = 7443;
/// Default port of a process server, UDP.
pub const PROCESS_SERVER_PORT: u16 = 7444;

impl Program {
    /// Short name, as used in paths: `agent`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::ProcessServer => "process-server",
            Self::MasterTarget => "master-target",
        }
    }

    /// Name of the executable.
    #[must_use]
    pub const fn binary(self) -> &'static str {
        match self {
            Self::Agent => "reprotect-agent",
            Self::ProcessServer => "reprotect-process-server",
            Self::MasterTarget => "reprotect-master-target",
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.binary())
    }
}

/// Where one daemon keeps what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Identity, certificates, progress; mode 0700.
    pub state_dir: PathBuf,
    /// The admin interface's Unix socket.
    pub socket: PathBuf,
}

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The socket's path does not fit the kernel's limit.
    #[error("the admin socket path {} has {bytes} bytes and the system allows {SOCKET_PATH_BYTES_MAX}; choose a shorter --state-dir", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        bytes: usize,
    },
    /// A directory cannot be made or used.
    #[error("the directory {} cannot be used: {source}; create it or name another with --state-dir", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Answer for PlaceError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

impl Places {
    /// The places of `program`, all below `state_dir` where one is given.
    ///
    /// # Errors
    /// When the socket's path would be too long, or a relative directory cannot be made absolute.
    pub fn resolve(program: Program, state_dir: Option<&Path>) -> Result<Self, PlaceError> {
        let places = match state_dir {
            None => Self {
                state_dir: Path::new("/var/lib/reprotect").join(program.name()),
                socket: Path::new("/run/reprotect").join(format!("{}.sock", program.name())),
            },
            Some(dir) => {
                let dir = std::path::absolute(dir)
                    .map_err(|source| PlaceError::Directory { path: dir.to_owned(), source })?;
                Self { socket: dir.join(format!("{}.sock", program.name())), state_dir: dir }
            }
        };
        let bytes = places.socket.as_os_str().as_bytes().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(PlaceError::SocketPathTooLong { path: places.socket, bytes });
        }
        Ok(places)
    }

    /// Creates the state directory (mode 0700) where it is missing.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn create_state_dir(&self) -> Result<(), PlaceError> {
        create_dir(&self.state_dir, 0o700)
    }
}

/// Creates `dir` and its parents with `mode`; an existing directory is left as it is.
///
/// # Errors
/// What the operating system said, or that something else stands there.
pub fn create_dir(dir: &Path, mode: u32) -> Result<(), PlaceError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .map_err(|source| PlaceError::Directory { path: dir.to_owned(), source })
}

/// The configuration file to read, and whether the operator named it (then it must exist).
///
/// `--config` wins; with `--state-dir` it is `<program>.toml` in that directory; else `/etc/reprotect/`.
#[must_use]
pub fn config_path(program: Program, config: Option<&Path>, state_dir: Option<&Path>) -> (PathBuf, bool) {
    let file = format!("{}.toml", program.name());
    match (config, state_dir) {
        (Some(config), _) => (config.to_owned(), true),
        (None, Some(dir)) => (dir.join(file), false),
        (None, None) => (Path::new("/etc/reprotect").join(file), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_dir_moves_everything() {
        let packaged = Places::resolve(Program::Agent, None).unwrap();
        assert_eq!(packaged.state_dir, Path::new("/var/lib/reprotect/agent"));
        assert_eq!(packaged.socket, Path::new("/run/reprotect/agent.sock"));
        let moved = Places::resolve(Program::MasterTarget, Some(Path::new("/tmp/x"))).unwrap();
        assert_eq!(moved.state_dir, Path::new("/tmp/x"));
        assert_eq!(moved.socket, Path::new("/tmp/x/master-target.sock"));
        assert_eq!(
            config_path(Program::Agent, None, Some(Path::new("/tmp/x"))),
            ("/tmp/x/agent.toml".into(), false)
        );
        assert_eq!(config_path(Program::Agent, None, None), ("/etc/reprotect/agent.toml".into(), false));
        assert_eq!(
            config_path(Program::Agent, Some(Path::new("a")), Some(Path::new("b"))),
            ("a".into(), true)
        );
    }

    #[test]
    fn a_socket_path_beyond_the_kernels_limit_is_refused_before_it_is_bound() {
        let fits = format!("/{}", "d".repeat(SOCKET_PATH_BYTES_MAX - "//agent.sock".len()));
        assert!(Places::resolve(Program::Agent, Some(Path::new(&fits))).is_ok());
        let long = format!("{fits}d");
        let error = Places::resolve(Program::Agent, Some(Path::new(&long))).unwrap_err();
        assert!(error.to_string().contains("shorter --state-dir"), "{error}");
    }
}
