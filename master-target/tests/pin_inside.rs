//! A mark inside an undo epoch, pinned: it stays when the log that it is made from is given back, over a restart, until it
//! is unpinned. A whole daemon, a real agent core, an ordered stream.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/logged.rs"]
mod logged;
#[path = "support/stream.rs"]
mod stream;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use daemon::Daemon;
use logged::LoggedDisk;
use reprotect_engine::io::{BlockFile as _, WriteAt};
use reprotect_master_target::api::{
    ExportAnswer, ExportRequest, MountAnswer, MountInfo, MountRequest, PinAnswer, PinRequest, PointInfo,
    PointsAnswer, PointsRequest, UnmountRequest,
};
use reprotect_master_target::protect::{ProtectAnswer, ProtectRequest};
use stream::{Shared, Stream, durable_marks};

/// Longer than any step takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(240);
const SIZE: u64 = 16 << 20;
const MARK_EVERY: Duration = Duration::from_millis(300);

/// Asks until there is an answer.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A protected disk whose every write is in the log.
struct Site {
    dir: tempfile::TempDir,
    daemon: Daemon,
    disk: LoggedDisk,
    base: bytes::Bytes,
    id: String,
    shared: Arc<Mutex<Shared>>,
    stream: tokio::task::JoinHandle<()>,
    written: u64,
}

impl Site {
    async fn start() -> Self {
        let dir = daemon::dir();
        let path = |name: &str| dir.path().join(name);
        for name in ["ds", "retention"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        // Nothing of the log is kept for its age.
        let more = format!(
            "site = \"lyon\"\ndatastores = [{:?}]\n[retention]\npath = {:?}\nundo_epoch = \"6s\"\nany_write = \"0s\"\nsegment_bytes = \"32MiB\"\nreserve = \"0\"\n",
            path("ds"),
            path("retention")
        );
        daemon::configure(dir.path(), &more);
        let disk = LoggedDisk::new(SIZE);
        let daemon = daemon::start(dir.path()).await;
        let token = daemon.invite("agent").await.token;
        let stream = Stream::enrolled(&token, &path("agent"), disk.clone(), MARK_EVERY).await;
        let (base, shared) = (stream.base(), stream.shared());
        let listen = daemon.status().await.listen.parse().unwrap();
        let stream = tokio::spawn(stream.run(listen));
        until("the agent is there", async || shared.lock().unwrap().connected.then_some(())).await;
        let request = ProtectRequest {
            machine: "ordered".to_owned(),
            datastore: Some(path("ds")),
            yes: true,
            ..ProtectRequest::default()
        };
        // Refused until the inventory is recorded.
        let protect =
            async || daemon.client.post_json::<_, ProtectAnswer>("/v1/protect", &request).await.ok();
        let id = until("the disk is protected", protect).await.disks[0].disk.clone().unwrap();
        until("the disk is synced", async || shared.lock().unwrap().synced.then_some(())).await;
        Self { dir, daemon, disk, base, id, shared, stream, written: 0 }
    }

    /// So many bytes that do not compress.
    fn write(&mut self, bytes: u64) {
        for _ in 0..bytes >> 16 {
            let mut data = vec![0; 1 << 16];
            getrandom::fill(&mut data).unwrap();
            let offset = self.written % SIZE;
            self.disk.write(&[WriteAt { offset, data: &data }]).unwrap();
            self.written += 1 << 16;
        }
    }

    async fn points(&self) -> Vec<PointInfo> {
        let request = PointsRequest { disk: self.id.clone(), all: true };
        let asked = self.daemon.client.post_json::<_, PointsAnswer>("/v1/points", &request).await;
        asked.unwrap().points
    }

    async fn pin(&self, point: &str, pinned: bool) {
        let request = PinRequest {
            disk: self.id.clone(),
            point: point.to_owned(),
            pinned: Some(pinned),
            name: pinned.then(|| "kept inside".to_owned()),
        };
        let answer: PinAnswer = self.daemon.client.post_json("/v1/pin", &request).await.unwrap();
        assert_eq!(answer.parts.len(), 1);
    }

    /// The point is mounted, and copied to compare it.
    async fn judge(&self, point: &str, changes: usize, copy: &Path) {
        let request = MountRequest {
            disk: self.id.clone(),
            point: point.to_owned(),
            writable: false,
            accept_damage: false,
        };
        let mounted: MountAnswer = self.daemon.client.post_json("/v1/mount", &request).await.unwrap();
        let unmount = UnmountRequest { id: mounted.mounts[0].id.clone() };
        let _: MountInfo = self.daemon.client.post_json("/v1/unmount", &unmount).await.unwrap();
        let request = ExportRequest {
            what: self.id.clone(),
            point: point.to_owned(),
            format: "raw".to_owned(),
            path: copy.to_owned(),
            accept_damage: false,
        };
        let _: ExportAnswer = self.daemon.client.post_json("/v1/export", &request).await.unwrap();
        let (got, expected) = (std::fs::read(copy).unwrap(), self.disk.replay(&self.base, changes));
        assert!(got == expected, "point {point} is not the disk after {changes} changes");
    }

    async fn restart(self) -> Self {
        self.shared.lock().unwrap().stop = true;
        self.stream.await.unwrap();
        self.daemon.stop().await;
        let daemon = daemon::start(self.dir.path()).await;
        Self { daemon, stream: tokio::spawn(async {}), ..self }
    }
}

fn epoch(point: &PointInfo) -> &str {
    point.point.split_once('.').unwrap().0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_mark_inside_an_undo_epoch_outlives_its_part_of_the_log_and_a_restart() {
    let mut site = Site::start().await;
    // A mark with something in it, and two behind it in the same undo epoch: newest first.
    let (pinned, witness, changes) = loop {
        site.write(256 << 10);
        tokio::time::sleep(MARK_EVERY).await;
        let listed = site.points().await;
        let inside: Vec<&PointInfo> = listed.iter().filter(|point| !point.kept).collect();
        let [newest, witness, pinned, ..] = inside.as_slice() else { continue };
        let mark = durable_marks(&site.shared)
            .into_iter()
            .find(|mark| mark.changes > 0 && mark.time.0 / 1_000_000 == pinned.source_time_ms);
        if let Some(mark) = mark.filter(|_| epoch(pinned) == epoch(newest)) {
            break (pinned.point.clone(), witness.point.clone(), mark.changes);
        }
    };
    site.pin(&pinned, true).await;
    // Its part of the log is given back: the mark behind it is gone.
    loop {
        site.write(4 << 20);
        tokio::time::sleep(MARK_EVERY).await;
        if !site.points().await.iter().any(|point| point.point == witness) {
            break;
        }
        assert!(site.written < 1 << 30, "the log is kept");
    }
    let copy = |name: &str| site.dir.path().join(name);
    let (running, restarted) = (copy("running.raw"), copy("restarted.raw"));
    site.judge(&pinned, changes, &running).await;
    let site = site.restart().await;
    let listed = site.points().await;
    let found = listed.iter().find(|point| point.point == pinned).unwrap();
    assert!(found.pinned && found.kept && found.name == "kept inside", "{found:?}");
    site.judge("kept inside", changes, &restarted).await;
    site.pin(&pinned, false).await;
    assert!(site.points().await.iter().all(|point| !point.pinned));
    site.restart().await.daemon.stop().await;
}
