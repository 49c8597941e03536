//! A site in one process: a CA, a process server, a scripted target and a scripted agent over loopback QUIC, all with
//! real certificates and the real protocol cores; only the disks are in memory.
//!
//! Called by the behaviour tests of this crate.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail in the files that use everything")]

pub mod agent;
pub mod target;

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::{self, Overrides};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::shutdown::{Shutdown, ShutdownTrigger};
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::trust::{ROOTS_FILE, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::PeerId;
use reprotect_process_server::config::Settings;
use reprotect_process_server::daemon::{self, RunError};
use reprotect_process_server::status::Status;
use tokio::task::JoinHandle;

/// Longer than anything here takes; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A certificate authority in a directory of its own.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub ca: Ca,
}

impl Site {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(&dir.path().join("ca"), "berlin", wall_clock()).unwrap();
        Self { dir, ca }
    }

    pub fn identity(&self, role: Role) -> Identity {
        self.ca.issue_identity(role, PeerId::random().unwrap(), wall_clock()).unwrap()
    }

    pub fn trust(&self) -> Arc<Trust> {
        let roots = [self.ca.certificate().clone()];
        Arc::new(Trust::new(&roots, Arc::new(Revocations::in_memory())).unwrap())
    }

    /// An enrolled process server's state directory.
    pub fn state_dir(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        self.identity(Role::ProcessServer).save(&dir).unwrap();
        std::fs::copy(self.dir.path().join("ca").join(ROOTS_FILE), dir.join(ROOTS_FILE)).unwrap();
        dir
    }
}

pub fn settings(state_dir: &Path, text: &str) -> Settings {
    let text = format!("listen = \"127.0.0.1:0\"\n{text}");
    let loaded = config::parse(Path::new("test.toml"), text).unwrap();
    let overrides = Overrides { state_dir: Some(state_dir.to_owned()), ..Overrides::default() };
    Settings::resolve(&loaded, &overrides).unwrap()
}

/// A running process server.
pub struct Server {
    pub address: SocketAddr,
    pub socket: PathBuf,
    trigger: ShutdownTrigger,
    task: JoinHandle<Result<(), RunError>>,
}

impl Server {
    pub async fn start(state_dir: &Path, target: SocketAddr, more: &str) -> Self {
        let settings = settings(state_dir, &format!("targets = [\"{target}\"]\n{more}"));
        let socket = settings.places.socket.clone();
        let (trigger, shutdown) = Shutdown::new();
        let task = tokio::spawn(daemon::run(settings, shutdown));
        let status = wait_for("the daemon answers", async || {
            assert!(!task.is_finished(), "the daemon ended");
            read_status(&socket).await
        })
        .await;
        Self { address: status.listen.parse().unwrap(), socket, trigger, task }
    }

    pub async fn status(&self) -> Status {
        read_status(&self.socket).await.unwrap()
    }

    /// Waits until the status is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        wait_for(what, async || Some(self.status().await).filter(|status| wanted(status))).await
    }

    pub async fn stop(self) {
        self.trigger.request();
        patiently("the daemon stops", self.task).await.unwrap().unwrap();
    }
}

async fn read_status(socket: &Path) -> Option<Status> {
    AdminClient::new(Program::ProcessServer, socket).get_json("/v1/status").await.ok()
}

/// Asks until there is an answer.
pub async fn wait_for<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    patiently(what, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

pub async fn patiently<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Text that zstd halves and more.
pub fn compressible(len: usize) -> Bytes {
    (0..len)
        .map(|at| b"every block of this disk reads much alike; "[at % 43] ^ u8::from(at % 611 == 7))
        .collect()
}

/// Bytes that zstd cannot make smaller.
pub fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    }
    out.truncate(len);
    out.into()
}
