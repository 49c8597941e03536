//! A whole daemon in the test's process, on a state directory of its own, asked through its admin socket.
//!
//! Invariant: a daemon that does not answer within a minute, or ends, fails the test. Used by the behaviour tests.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]
#![expect(unreachable_pub, reason = "shared by several test programs")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test program uses its part")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::shutdown::{Shutdown, ShutdownTrigger};
use reprotect_master_target::api::{InviteAnswer, InviteRequest, StatusInfo};
use reprotect_master_target::config::Settings;
use reprotect_master_target::daemon::{Reload, run_reloading};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A running daemon.
pub struct Daemon {
    pub client: AdminClient,
    pub stop: ShutdownTrigger,
    pub reload: Arc<watch::Sender<u64>>,
    pub task: JoinHandle<anyhow::Result<()>>,
}

pub fn overrides(dir: &Path) -> Overrides {
    Overrides { state_dir: Some(dir.to_owned()), ..Overrides::default() }
}

pub fn configure(dir: &Path, more: &str) {
    std::fs::write(dir.join("master-target.toml"), format!("listen = \"127.0.0.1:0\"\n{more}")).unwrap();
}

pub fn spawn(dir: &Path) -> Daemon {
    let settings = Settings::load(&overrides(dir)).unwrap();
    let client = AdminClient::new(Program::MasterTarget, &settings.places.socket);
    let (stop, shutdown) = Shutdown::new();
    let (reload, asked) = watch::channel(0);
    let reloading = Reload { asked, overrides: overrides(dir) };
    let task = tokio::spawn(run_reloading(settings, shutdown, Some(reloading)));
    Daemon { client, stop, reload: Arc::new(reload), task }
}

pub async fn start(dir: &Path) -> Daemon {
    let daemon = spawn(dir);
    for _ in 0..6000 {
        if daemon.client.get_json::<StatusInfo>("/v1/status").await.is_ok() {
            return daemon;
        }
        assert!(!daemon.task.is_finished(), "{:?}", daemon.task.await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the daemon does not answer");
}

impl Daemon {
    pub async fn stop(self) {
        self.stop.request();
        self.task.await.unwrap().unwrap();
    }

    pub async fn status(&self) -> StatusInfo {
        self.client.get_json("/v1/status").await.unwrap()
    }

    pub async fn invite(&self, role: &str) -> InviteAnswer {
        let request = InviteRequest { role: role.to_owned(), valid_seconds: 900 };
        self.client.post_json("/v1/invite", &request).await.unwrap()
    }
}

pub fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), "site = \"lyon\"\n");
    dir
}
