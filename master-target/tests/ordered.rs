//! An ordered stream under real load: ext4 and SQLite on a disk whose every write is logged, points every few seconds,
//! and each point judged: its bytes against the log replayed to its mark, its file system by `e2fsck`, its database by
//! SQLite itself, its files by their own checksums.
//!
//! `ORDERED_POINTS=50` judges that many (`make ordered-test`); `ORDERED_BETWEEN=50` as many between marks, by their
//! sequence, and as many by a time. Needs root, FUSE and loop
//! devices; says so where it has none.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/logged.rs"]
mod logged;
#[path = "support/stream.rs"]
mod stream;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bytes::Bytes;
use daemon::Daemon;
use logged::LoggedDisk;
use reprotect_engine::io::BlockFile;
use reprotect_engine::net::nbd::listen::Address;
use reprotect_engine::net::nbd::{Export, ExportBy, Server, Settings};
use reprotect_engine::units::Timestamp;
use reprotect_master_target::api::{
    MountAnswer, MountInfo, MountRequest, PointInfo, PointsAnswer, PointsRequest, UnmountRequest,
};
use reprotect_master_target::protect::{ProtectAnswer, ProtectRequest};
use stream::{PlacedMark, Shared, Stream, durable_marks};
use tokio::runtime::Runtime;

/// Longer than any step takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text}")))
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program; its output is the reason where it fails.
#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    let output =
        Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let more = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{more}", output.status);
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An NBD address as a block device: `nbdfuse`, and a loop device over its file.
struct Device {
    folder: PathBuf,
    fuse: Child,
    path: PathBuf,
}

impl Device {
    fn attach(uri: &str, folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let mut fuse = Command::new("nbdfuse").arg(folder).arg(uri).stdin(Stdio::null()).spawn().unwrap();
        let file = folder.join("nbd");
        until("nbdfuse is ready", || {
            assert!(fuse.try_wait().unwrap().is_none(), "nbdfuse ended");
            file.exists().then_some(())
        });
        let path = run("losetup", &["--find", "--show", text(&file)]);
        Self { folder: folder.to_owned(), fuse, path: path.trim().into() }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
        for _ in 0..100 {
            let ended = Command::new("umount").arg(&self.folder).stderr(Stdio::null()).status();
            if ended.is_ok_and(|status| status.success()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = self.fuse.wait();
    }
}

/// A mounted file system.
struct Mounted(PathBuf);

impl Mounted {
    fn at(device: &Path, folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        run("mount", &[text(device), text(folder)]);
        Self(folder.to_owned())
    }

    fn load(&self, task: &str) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/load.py");
        let mut command = Command::new("python3");
        command.arg(script).arg(&self.0).arg(task);
        command
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The load, told to end on drop.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// The whole of it.
struct Site {
    runtime: Runtime,
    dir: tempfile::TempDir,
    daemon: Daemon,
    server: Server,
    disk: LoggedDisk,
    base: Bytes,
    id: String,
    shared: Arc<Mutex<Shared>>,
    stream: tokio::task::JoinHandle<()>,
}

impl Site {
    /// A disk with a file system, protected and synced.
    fn start(size_bytes: u64, mark_every: Duration) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let dir = daemon::dir();
        let path = |name: &str| dir.path().join(name);
        for name in ["ds", "retention"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        let more = format!(
            "site = \"lyon\"\ndatastores = [{:?}]\n[retention]\npath = {:?}\nundo_epoch = \"3s\"\n",
            path("ds"),
            path("retention")
        );
        daemon::configure(dir.path(), &more);
        let disk = LoggedDisk::new(size_bytes);
        let served = disk.clone();
        let open = move || Ok(Box::new(served.clone()) as Box<dyn BlockFile>);
        let export: Arc<dyn Export> = Arc::new(ExportBy::new("", size_bytes, true, open));
        let address = Address::Unix(path("source.sock"));
        let server = runtime.block_on(Server::start(&address, vec![export], Settings::default())).unwrap();
        {
            let device = Device::attach(&uri(&path("source.sock")), &path("source"));
            run("mkfs.ext4", &["-q", "-F", text(&device.path)]);
            let mounted = Mounted::at(&device.path, &path("first"));
            assert!(mounted.load("prepare").status().unwrap().success());
        }
        let daemon = runtime.block_on(daemon::start(dir.path()));
        let token = runtime.block_on(daemon.invite("agent")).token;
        let place = path("agent");
        let stream = runtime.block_on(Stream::enrolled(&token, &place, disk.clone(), mark_every));
        let (base, shared) = (stream.base(), stream.shared());
        let listen = runtime.block_on(daemon.status()).listen.parse().unwrap();
        let stream = runtime.spawn(stream.run(listen));
        let mut site = Self { runtime, dir, daemon, server, disk, base, id: String::new(), shared, stream };
        site.protect();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn protect(&mut self) {
        until("the agent is there", || self.shared.lock().unwrap().connected.then_some(()));
        let request = ProtectRequest {
            machine: "ordered".to_owned(),
            datastore: Some(self.path("ds")),
            yes: true,
            ..ProtectRequest::default()
        };
        let answer = until("the disk is protected", || {
            // Refused until the inventory is recorded.
            let asked = self.daemon.client.post_json::<_, ProtectAnswer>("/v1/protect", &request);
            self.runtime.block_on(asked).ok()
        });
        self.id = answer.disks[0].disk.clone().unwrap();
        until("the disk is synced", || self.shared.lock().unwrap().synced.then_some(()));
    }

    fn points(&self) -> Vec<PointInfo> {
        let request = PointsRequest { disk: self.id.clone(), all: true };
        let asked = self.daemon.client.post_json::<_, PointsAnswer>("/v1/points", &request);
        self.runtime.block_on(asked).map(|answer| answer.points).unwrap_or_default()
    }

    fn mount(&self, point: &str, writable: bool) -> MountInfo {
        let request =
            MountRequest { disk: self.id.clone(), point: point.to_owned(), writable, accept_damage: false };
        let mounted = self.daemon.client.post_json::<_, MountAnswer>("/v1/mount", &request);
        self.runtime.block_on(mounted).unwrap().mounts.swap_remove(0)
    }

    fn unmount(&self, mount: &MountInfo) {
        let request = UnmountRequest { id: mount.id.clone() };
        let _: MountInfo =
            self.runtime.block_on(self.daemon.client.post_json("/v1/unmount", &request)).unwrap();
    }

    /// A mark's point as the target lists it.
    fn point_of(&self, mark: &PlacedMark) -> PointInfo {
        let millis = mark.time.0 / 1_000_000;
        until("the mark is listed", || self.points().into_iter().find(|point| point.source_time_ms == millis))
    }

    /// Judges a point: its bytes, and what programs find on it.
    fn judge(&self, point: &str, changes: usize) {
        let expected = self.disk.replay(&self.base, changes);
        let mount = self.mount(point, false);
        let copy = self.path("copy.raw");
        run("nbdcopy", &[&mount.uri, text(&copy)]);
        let got = std::fs::read(&copy).unwrap();
        std::fs::remove_file(&copy).unwrap();
        assert_eq!(got.len(), expected.len());
        let differs = got.chunks(4096).zip(expected.chunks(4096)).position(|(got, expected)| got != expected);
        assert_eq!(differs, None, "block of point {point} that is not the source's after {changes} changes");
        self.unmount(&mount);
        let mount = self.mount(point, true);
        {
            let device = Device::attach(&mount.uri, &self.path("point"));
            {
                // Mounting replays the file system's journal, opening replays the database's.
                let mounted = Mounted::at(&device.path, &self.path("inside"));
                let judged = mounted.load("judge").output().unwrap();
                let why = String::from_utf8_lossy(&judged.stderr).into_owned();
                assert!(judged.status.success(), "point {point}: {why}");
            }
            run("e2fsck", &["-fn", text(&device.path)]);
        }
        self.unmount(&mount);
    }

    fn end(self) {
        self.shared.lock().unwrap().stop = true;
        let stream = self.stream;
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, stream).await.expect("the last mark is durable").unwrap();
            self.daemon.stop().await;
            self.server.stop().await;
        });
    }
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn is_possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    let there = |path: &str| Path::new(path).exists();
    let tools = ["nbdfuse", "nbdcopy", "losetup", "mkfs.ext4", "e2fsck", "python3"];
    let missing = tools.iter().find(|tool| Command::new(tool).arg("--version").output().is_err());
    let possible = root && there("/dev/fuse") && there("/dev/loop-control") && missing.is_none();
    if !possible {
        eprintln!("SKIPPED: needs root, FUSE, loop devices and {tools:?} (missing: {missing:?})");
    }
    possible
}

/// A fresh number below `bound`.
fn random(bound: usize) -> usize {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    (u64::from_le_bytes(bytes) % bound.max(1) as u64) as usize
}

#[test]
fn every_point_of_an_ordered_stream_is_what_the_source_was() {
    if !is_possible() {
        return;
    }
    let points = setting("ORDERED_POINTS", 4) as usize;
    let mark_every = Duration::from_millis(setting("ORDERED_MILLISECONDS", 1000));
    let site = Site::start(setting("ORDERED_MEBIBYTES", 64) << 20, mark_every);
    {
        let device = Device::attach(&uri(&site.path("source.sock")), &site.path("source"));
        let mounted = Mounted::at(&device.path, &site.path("live"));
        let load = Load(mounted.load("load").spawn().unwrap());
        let marked =
            |count: usize| until("marks", || (durable_marks(&site.shared).len() > count).then_some(()));
        let mut early = None;
        for count in 1..=points + 2 {
            marked(count);
            if count == points / 2 {
                site.shared.lock().unwrap().cut = true;
            }
            if count == 2 + points / 2 {
                // One while the load goes on.
                let mark = *durable_marks(&site.shared).last().unwrap();
                site.judge(&site.point_of(&mark).point, mark.changes);
                early = Some(mark.changes);
            }
        }
        drop(load);
        assert!(early.is_some_and(|changes| changes > 0), "the load wrote nothing");
    }
    let mut marks = durable_marks(&site.shared);
    marks.retain(|mark| mark.changes > 0);
    assert!(marks.len() >= points, "{} marks", marks.len());
    for _ in 0..points {
        let mark = marks.swap_remove(random(marks.len()));
        let point = site.point_of(&mark);
        assert_eq!((point.class.as_str(), point.degraded), ("crash-consistent", false));
        site.judge(&point.point, mark.changes);
        eprintln!("point {} after {} changes: as the source was", point.point, mark.changes);
    }
    between(&site, setting("ORDERED_BETWEEN", 1) as usize);
    let (log, flushes) = (site.disk.log_len(), site.disk.flushes());
    eprintln!("{points} points judged; {log} changes, {flushes} flushes of the source");
    assert_eq!(site.disk.replay(&site.base, log), site.disk.bytes(), "the log is the disk");
    site.end();
}

/// Points that no mark names: any change of the stream is one, and any time is one of them.
fn between(site: &Site, points: usize) {
    let (sequences, batches) = {
        let shared = site.shared.lock().unwrap();
        (shared.sequences.clone(), shared.batches.clone())
    };
    let durable = durable_marks(&site.shared).last().map_or(0, |mark| mark.changes);
    for _ in 0..points {
        let changes = 1 + random(durable);
        let point = format!("seq:{}", sequences[changes - 1]);
        site.judge(&point, changes);
        eprintln!("{point} after {changes} changes: as the source was");
        let ago = batches.partition_point(|(_, changes)| *changes <= durable);
        let (time, _) = batches[random(ago)];
        // Somewhere behind it, perhaps behind others, too.
        let time = Timestamp(time.0 + random(400_000_000) as u64);
        let changes = batches[..ago].iter().rev().find(|(at, _)| *at <= time).unwrap().1;
        let at = UNIX_EPOCH + Duration::from_nanos(time.0);
        let point = format!("@{}", humantime::format_rfc3339_nanos(at));
        site.judge(&point, changes);
        eprintln!("{point} after {changes} changes: as the source was");
    }
}
