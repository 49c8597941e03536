//! The agent daemon brings a live machine to rest for a point: file systems frozen inside a closing window, applications
//! by hooks, on command and on schedule, and everything goes on whatever fails.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod capture_lab;
mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use capture_lab::{Loop, Mounted};
use common::target::FakeTarget;
use common::{AgentDaemon, Site, run, source_id, write_config};
use reprotect_agent::api::{MarkAnswer, MarkRequest};
use reprotect_agent::freeze::{Freeze, Limits};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::message::{PassMode, Policy};
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::places::Program;
use reprotect_engine::units::{DiskId, PeerId};

const SIZE_MIB: u64 = 64;

/// An agent with one mounted loop device, followed, with rounds so far apart that none comes in between.
struct Setup {
    site: Site,
    target: FakeTarget,
    state_dir: PathBuf,
    mounted: Option<Mounted>,
    _device: Loop,
    disk: DiskId,
}

impl Drop for Setup {
    /// Before its device.
    fn drop(&mut self) {
        self.mounted = None;
    }
}

impl Setup {
    fn new(file_system: &str, more: &str) -> Self {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent) = site.state_dir("agent");
        let mib = if file_system == "xfs" { 320 } else { SIZE_MIB };
        let device = Loop::new(site.dir.path(), "disk.img", mib);
        let mounted = Some(Mounted::new(site.dir.path(), &device, file_system));
        write_config(
            &state_dir,
            target.address,
            &[&device.path],
            &format!("capture.mode = \"window\"\ncapture.interval = \"1h\"\n{more}"),
        );
        let bytes = vec![0; (mib << 20) as usize];
        let disk = target.protect_source(agent, source_id(&device.path), bytes, PassMode::Copy);
        Self { site, target, state_dir, mounted, _device: device, disk }
    }

    /// Applications are brought to rest this often.
    fn schedule(&self, revision: u64, app_points_every_ms: u64) {
        let target = PeerId::NONE;
        self.target.set_policy(Policy { revision, points_every_ms: 0, target, app_points_every_ms });
    }

    async fn start(&self) -> AgentDaemon {
        let agent = AgentDaemon::start(&self.state_dir);
        let info = agent.until_disk("a round", self.disk, |info| info.scan_rounds > 0).await;
        assert_eq!(info.capture, "window", "{info:?}");
        agent
    }

    fn mount(&self) -> &Path {
        &self.mounted.as_ref().unwrap().at
    }

    /// Somebody who writes all the time.
    fn writer(&self) -> Writer {
        let script = "i=0; while true; do i=$((i+1)); dd if=/dev/urandom of=$0/f$((i%9)) bs=16k count=3 2>/dev/null; done";
        Writer(Command::new("sh").arg("-c").arg(script).arg(self.mount()).spawn().unwrap())
    }

    /// Checks the target's bytes as a file system, without the replay of its journal.
    fn is_clean(&self, file_system: &str) {
        let copy = self.site.path("point.img");
        self.target.with_bytes(self.disk, |bytes| std::fs::write(&copy, bytes).unwrap());
        let (program, arguments) =
            if file_system == "ext4" { ("e2fsck", "-fn") } else { ("xfs_repair", "-n") };
        if file_system == "xfs" {
            // A frozen xfs keeps a record in its log on purpose, so that whoever mounts a copy looks for unlinked inodes.
            let at = self.site.path("judged");
            std::fs::create_dir_all(&at).unwrap();
            let (copy, at) = (copy.to_str().unwrap(), at.to_str().unwrap());
            capture_lab::run("mount", &["-o", "loop,nouuid", copy, at]);
            capture_lab::run("umount", &[at]);
        }
        let judged = Command::new(program).arg(arguments).arg(&copy).output().unwrap();
        let text = [judged.stdout, judged.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(judged.status.success(), "{text}");
        // "skipping journal recovery", says e2fsck of one that is dirty, and judges what it finds without it.
        assert!(!text.contains("journal recovery") && !text.contains("log which needs"), "{text}");
    }

    fn placed(&self, cause: MarkCause) -> Vec<MarkClass> {
        let marks = self.target.marks();
        marks.iter().filter(|mark| mark.cause == cause).map(|mark| mark.class).collect()
    }
}

#[test]
fn subvolumes_of_one_btrfs_are_frozen_once_and_thawed() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk.img", 256);
    let path = device.path.to_str().unwrap();
    capture_lab::run("mkfs.btrfs", &["-q", "-f", path]);
    let mount = |name: &str, options: &str| {
        let at = dir.path().join(name);
        std::fs::create_dir(&at).unwrap();
        capture_lab::run("mount", &["-t", "btrfs", "-o", options, path, at.to_str().unwrap()]);
        Mounted { at }
    };
    let whole = mount("whole", "defaults");
    for name in ["root", "home"] {
        capture_lab::run("btrfs", &["-q", "subvolume", "create", whole.at.join(name).to_str().unwrap()]);
    }
    let (root, home) = (mount("root", "subvol=root"), mount("home", "subvol=home"));
    let limits = Limits::of(Duration::from_secs(10));
    let freeze = Freeze::begin(&[root.at.clone(), home.at.clone()], limits, dir.path()).unwrap();
    assert!(freeze.end().held);
    for mounted in [&root, &home] {
        std::fs::write(mounted.at.join("file"), "it goes on").unwrap();
    }
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn mark(setup: &Setup, app: bool) -> Result<MarkAnswer, String> {
    let client = AdminClient::new(Program::Agent, &setup.state_dir.join("agent.sock"));
    let request = MarkRequest { name: String::new(), freeze: true, freeze_limit_ms: 30_000, app };
    client.post_json("/v1/mark", &request).await.map_err(|error| error.to_string())
}

fn capable() -> bool {
    capture_lab::capable()
}

/// A hook that adds its name to `log`, and what `then` does.
fn hooks(log: &Path, pre_freeze: &str, post_thaw: &str, limit: &str) -> String {
    let log = log.display();
    let line = |then: &str| format!("[\"/bin/sh\", \"-c\", \"echo $REPROTECT_HOOK >> {log}; {then}\"]");
    let (pre, post) = (line(pre_freeze), line(post_thaw));
    format!("hooks.pre_freeze = {pre}\nhooks.post_thaw = {post}\nhooks.limit = \"{limit}\"")
}

fn said(log: &Path) -> Vec<String> {
    std::fs::read_to_string(log).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn frozen_points_are_clean(file_system: &str) {
    let _machine = capture_lab::machine();
    if !capable() {
        return;
    }
    run(async {
        let setup = Setup::new(file_system, "");
        let agent = setup.start().await;
        let writer = setup.writer();
        for _ in 0..5 {
            let answer = mark(&setup, false).await.unwrap();
            assert_eq!((answer.class.as_str(), answer.frozen.len()), ("frozen", 1));
            println!("frozen for {} us beyond the call of {} us", answer.frozen_us, answer.freeze_call_us);
            setup.is_clean(file_system);
        }
        drop(writer);
        assert_eq!(setup.placed(MarkCause::Command), vec![MarkClass::Frozen; 5]);
        assert!(!setup.state_dir.join("frozen").exists());
        agent.stop().await;
    });
}

#[test]
fn ext4_frozen_in_a_window_is_clean_without_its_journal() {
    frozen_points_are_clean("ext4");
}

#[test]
fn xfs_frozen_in_a_window_is_clean() {
    frozen_points_are_clean("xfs");
}

#[test]
fn applications_rest_for_a_point_on_command_and_on_schedule() {
    let _machine = capture_lab::machine();
    if !capable() {
        return;
    }
    run(async {
        let log = tempfile::NamedTempFile::new().unwrap();
        let setup = Setup::new("ext4", &hooks(log.path(), "true", "true", "30s"));
        let agent = setup.start().await;
        let answer = mark(&setup, true).await.unwrap();
        assert_eq!((answer.class.as_str(), answer.frozen.len()), ("application-consistent", 1));
        assert_eq!(said(log.path()), ["pre_freeze", "post_thaw"], "the answer comes after both");
        setup.is_clean("ext4");
        agent.stop().await;
        setup.schedule(1, 300);
        let agent = setup.start().await;
        let scheduled =
            || setup.placed(MarkCause::Timer).iter().filter(|class| **class == MarkClass::App).count();
        agent.until("scheduled points", |_| scheduled() >= 2).await;
        agent.stop().await;
        setup.schedule(2, Policy::NEVER_MS);
        let agent = setup.start().await;
        agent.until("the policy", |status| status.policy_revision == 2).await;
        let before = scheduled();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(scheduled(), before, "there are none any more");
        agent.stop().await;
    });
}

#[test]
fn a_hook_that_fails_or_hangs_costs_the_promise_and_applications_go_on() {
    let _machine = capture_lab::machine();
    if !capable() {
        return;
    }
    run(async {
        let log = tempfile::NamedTempFile::new().unwrap();
        let setup = Setup::new("ext4", &hooks(log.path(), "echo busy; exit 7", "exit 9", "1s"));
        let agent = setup.start().await;
        let refused = mark(&setup, true).await.unwrap_err();
        assert!(refused.contains("exit status: 7") && refused.contains("busy"), "{refused}");
        let released = |count: usize| {
            let log = log.path().to_owned();
            move || said(&log).iter().filter(|line| *line == "post_thaw").count() >= count
        };
        capture_lab::until("the post_thaw hook runs all the same", released(1));
        // On schedule there is a point, which promises clean file systems only.
        agent.stop().await;
        setup.schedule(1, 200);
        let agent = setup.start().await;
        agent.until("a point", |_| setup.placed(MarkCause::Timer).contains(&MarkClass::Frozen)).await;
        assert!(!setup.placed(MarkCause::Timer).contains(&MarkClass::App));
        agent.stop().await;
        drop(setup);

        let setup = Setup::new("ext4", &hooks(log.path(), "sleep 100", "true", "1s"));
        let agent = setup.start().await;
        let refused = mark(&setup, true).await.unwrap_err();
        assert!(refused.contains("hooks.limit"), "{refused}");
        // Without hooks that bring anything to rest the point is still to be had.
        assert_eq!(mark(&setup, false).await.unwrap().class, "frozen");
        agent.stop().await;
    });
}

#[test]
fn a_hook_whose_run_fails_meanwhile_is_ended_before_applications_go_on() {
    let _machine = capture_lab::machine();
    if !capable() {
        return;
    }
    run(async {
        let log = tempfile::NamedTempFile::new().unwrap();
        let rest = format!("sleep 60; echo rests >> {}", log.path().display());
        let mut setup = Setup::new("ext4", &hooks(log.path(), &rest, "true", "5m"));
        let agent = setup.start().await;
        let marked = async { mark(&setup, true).await.unwrap_err() };
        let upset = async {
            agent.until("the hook", |_| said(log.path()) == ["pre_freeze"]).await;
            setup.target.kill().await;
        };
        let (refused, ()) = tokio::join!(marked, upset);
        assert!(refused.contains("meanwhile"), "{refused}");
        agent.until("applications go on", |_| said(log.path()) == ["pre_freeze", "post_thaw"]).await;
        agent.until("it is not due any more", |_| !setup.state_dir.join("post-thaw-due").exists()).await;
        // And the next one is made as if nothing had been.
        setup.target.restart().await;
        agent.until_disk("synced again", setup.disk, |info| info.state == "synced").await;
        assert_eq!(mark(&setup, false).await.unwrap().class, "frozen");
        agent.stop().await;
    });
}

#[test]
fn a_machine_that_is_scanned_is_not_frozen_on_schedule() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        let image = site.path("disk.img");
        std::fs::write(&image, common::noise(1 << 20, 5)).unwrap();
        let log = site.path("log");
        write_config(&state_dir, target.address, &[&image], &hooks(&log, "true", "true", "30s"));
        target.protect_source(agent_id, source_id(&image), vec![0; 1 << 20], PassMode::Copy);
        let policy =
            Policy { revision: 1, points_every_ms: 0, target: PeerId::NONE, app_points_every_ms: 100 };
        target.set_policy(policy);
        let agent = AgentDaemon::start(&state_dir);
        agent.until("rounds", |status| status.disks.iter().any(|disk| disk.scan_rounds > 5)).await;
        assert_eq!(said(&log), Vec::<String>::new());
        assert!(target.marks().iter().all(|mark| mark.class == MarkClass::Fuzzy));
        agent.stop().await;
    });
}

#[test]
fn applications_that_a_killed_agent_left_at_rest_go_on_at_its_next_start() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, _) = site.state_dir("agent");
        let log = site.path("log");
        write_config(&state_dir, target.address, &[], &hooks(&log, "true", "true", "30s"));
        std::fs::write(state_dir.join("post-thaw-due"), "a1").unwrap();
        let agent = AgentDaemon::start(&state_dir);
        agent.until("it goes on", |_| said(&log) == ["post_thaw"]).await;
        agent.until("it is not due any more", |_| !state_dir.join("post-thaw-due").exists()).await;
        agent.stop().await;
    });
}
