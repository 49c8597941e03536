//! A site in one process: a CA, agents with their state directories, and a scripted target over loopback QUIC, with
//! real certificates and the real protocol cores; only the target's disks are in memory.
//!
//! Called by the behaviour tests of this crate. The target is the one the process server's tests use.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses its part")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail in the files that use everything")]

#[path = "../../../process-server/tests/common/target.rs"]
pub mod target;

use std::cell::RefCell;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_agent::api::{DiskInfo, StatusInfo};
use reprotect_agent::capture::{self, CaptureError};
use reprotect_agent::config::{DisksConfig, Settings};
use reprotect_agent::{daemon, sources};
use reprotect_engine::format::message::SourceId;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::shutdown::{Shutdown, ShutdownTrigger};
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::trust::{ROOTS_FILE, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, PeerId};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longer than anything here takes; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Every disk of the machine the tests run on.
pub const REAL_DISKS: &str =
    r#""sd*", "vd*", "nvme*", "xvd*", "loop*", "dm-*", "md*", "zram*", "nbd*", "sr*", "hd*", "mmcblk*""#;

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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An enrolled agent's state directory, and who it is.
    pub fn state_dir(&self, name: &str) -> (PathBuf, PeerId) {
        let (dir, identity) = (self.path(name), self.identity(Role::Agent));
        identity.save(&dir).unwrap();
        std::fs::copy(self.path("ca").join(ROOTS_FILE), dir.join(ROOTS_FILE)).unwrap();
        let agent = identity.own().peer;
        AGENTS.with_borrow_mut(|agents| agents.push(agent.to_string()));
        (dir, agent)
    }
}

/// The identity of an image or device as the agent tells it.
pub fn source_id(path: &Path) -> SourceId {
    let include = vec![path.display().to_string()];
    let found = sources::find(&DisksConfig { include, exclude: Vec::new() }).unwrap();
    found.sources.values().find(|known| known.source.path == path).expect("it is a source").id
}

/// A configuration whose disks are scanned, also where they could be followed, unless `more` says otherwise.
pub fn write_config(state_dir: &Path, target: SocketAddr, include: &[&Path], more: &str) {
    let include: Vec<String> =
        include.iter().map(|path| format!("{:?}", path.display().to_string())).collect();
    let include = include.join(", ");
    let capture = if more.contains("capture.") { "" } else { "capture.mode = \"scan\"" };
    let text = format!(
        "upstream = [\"{target}\"]\n{capture}\nscan_interval = \"100ms\"\n{more}\n[disks]\ninclude = [{include}]\nexclude = [{}]\n",
        excluded(&include)
    );
    std::fs::write(state_dir.join("agent.toml"), text).unwrap();
}

/// The real disks, without the loop devices where one of them is what the test is about.
fn excluded(include: &str) -> String {
    if include.contains("/dev/loop") { REAL_DISKS.replace("\"loop*\", ", "") } else { REAL_DISKS.to_owned() }
}

/// A running agent.
pub struct AgentDaemon {
    socket: PathBuf,
    trigger: ShutdownTrigger,
    reloads: watch::Sender<u64>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl AgentDaemon {
    pub fn start(state_dir: &Path) -> Self {
        let overrides = Overrides { state_dir: Some(state_dir.to_owned()), ..Overrides::default() };
        let settings = Settings::load(&overrides).unwrap();
        let socket = settings.places.socket.clone();
        let (trigger, shutdown) = Shutdown::new();
        let (reloads, count) = watch::channel(0);
        let task = tokio::spawn(daemon::run_reloading(settings, count, shutdown));
        Self { socket, trigger, reloads, task }
    }

    /// As SIGHUP.
    pub fn reload(&self) {
        self.reloads.send_modify(|count| *count += 1);
    }

    /// Waits until the status is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&StatusInfo) -> bool) -> StatusInfo {
        let mut last = None;
        let asked = tokio::time::timeout(PATIENCE, async {
            loop {
                assert!(!self.task.is_finished(), "the daemon ended while waiting for: {what}");
                if let Ok(status) =
                    AdminClient::new(Program::Agent, &self.socket).get_json("/v1/status").await
                {
                    if wanted(&status) {
                        return status;
                    }
                    last = Some(status);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match asked.await {
            Ok(status) => status,
            Err(_) => panic!("not within {PATIENCE:?}: {what}: {last:#?}"),
        }
    }

    /// Waits until the disk is as wanted.
    pub async fn until_disk(&self, what: &str, disk: DiskId, wanted: impl Fn(&DiskInfo) -> bool) -> DiskInfo {
        let name = disk.to_string();
        let status = self
            .until(what, |status| status.disks.iter().any(|info| info.disk == name && wanted(info)))
            .await;
        status.disks.into_iter().find(|info| info.disk == name).unwrap()
    }

    pub async fn until_synced(&self, disk: DiskId) -> DiskInfo {
        self.until_disk("synced", disk, |info| info.scan_rounds > 0 || info.state == "synced").await
    }

    pub async fn stop(self) {
        self.trigger.request();
        patiently("the daemon stops", self.task).await.unwrap().unwrap();
    }
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

thread_local! {
    /// Agents that this thread's test made.
    static AGENTS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Takes out of the kernel what the test's agents followed, however the test ends.
struct LetGo;

impl Drop for LetGo {
    fn drop(&mut self) {
        for agent in AGENTS.take() {
            // Threads of a runtime that is gone end by themselves.
            let deadline = Instant::now() + PATIENCE;
            while let Err(CaptureError::InUse { .. }) = capture::let_go(&agent)
                && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

pub fn run<F: Future>(future: F) -> F::Output {
    // Dropped after the runtime.
    let _let_go = LetGo;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_background();
    output
}

/// Text that zstd halves and more.
pub fn compressible(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| b"every block of this disk reads much alike; "[at % 43] ^ u8::from(at % 611 == 7))
        .collect()
}

/// Bytes that zstd cannot make smaller.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    }
    out.truncate(len);
    out
}
