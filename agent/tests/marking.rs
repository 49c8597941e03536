//! Points of the whole machine: `mark` over the admin socket, frozen file systems, and that they are thawed whatever
//! becomes of the agent, its guard or the time.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, write_config};
use reprotect_agent::api::{MarkAnswer, MarkRequest};
use reprotect_agent::freeze::{Freeze, FreezeError, Limits, thaw_left_behind};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::message::{PassMode, Policy};
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::places::Program;
use reprotect_engine::units::PeerId;

const MIB: usize = 1 << 20;

fn request(name: &str, freeze: bool, limit: Duration) -> MarkRequest {
    let freeze_limit_ms = limit.as_millis() as u64;
    MarkRequest { name: name.to_owned(), freeze, freeze_limit_ms, app: false }
}

async fn mark(state_dir: &Path, request: &MarkRequest) -> Result<MarkAnswer, String> {
    let client = AdminClient::new(Program::Agent, &state_dir.join("agent.sock"));
    client.post_json("/v1/mark", request).await.map_err(|error| error.to_string())
}

/// With rounds so far apart that none comes in between.
fn configure(state_dir: &Path, target: SocketAddr, disk: &Path, pause: &str, more: &str) {
    write_config(state_dir, target, &[disk], more);
    let path = state_dir.join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"100ms\"", &format!("{pause:?}"))).unwrap();
}

/// A loop device with an ext4 file system, mounted; all gone on drop.
struct Volume {
    device: PathBuf,
    mount: PathBuf,
}

fn quiet(program: &str, args: &[&str]) -> bool {
    let (out, err) = (Stdio::null(), Stdio::null());
    Command::new(program).args(args).stdout(out).stderr(err).status().is_ok_and(|status| status.success())
}

impl Volume {
    /// None where this machine does not let us.
    fn new(site: &Path, name: &str) -> Option<Self> {
        let image = site.join(format!("{name}.img"));
        std::fs::File::create(&image).unwrap().set_len(24 * MIB as u64).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().ok()?;
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        let volume = Self { device, mount: site.join(name) };
        std::fs::create_dir(&volume.mount).unwrap();
        let (device, mount) = (volume.device.to_str().unwrap(), volume.mount.to_str().unwrap());
        let made = output.status.success()
            && quiet("mkfs.ext4", &["-q", "-F", device])
            && quiet("mount", &[device, mount]);
        if !made {
            eprintln!("left out: loop devices and mounts need root");
        }
        made.then_some(volume)
    }

    /// Whether a file can be written now, within a second. A writer that waits for a thaw cannot be killed: it is left
    /// to end by itself.
    fn is_writable(&self) -> bool {
        let target = format!("of={}", self.mount.join("probe").display());
        let args = ["if=/dev/zero", "bs=4k", "count=1", "conv=fsync", &target];
        let mut writer = Command::new("dd").args(args).stderr(Stdio::null()).spawn().unwrap();
        for _ in 0..100 {
            if writer.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    fn until_writable(&self) {
        for _ in 0..60 {
            if self.is_writable() {
                return;
            }
        }
        panic!("{} stays frozen", self.mount.display());
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// Processes whose parent is this one, by the kernel's tables.
fn children() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let of = |task: PathBuf| std::fs::read_to_string(task.join("children")).unwrap_or_default();
    tasks
        .flat_map(|task| of(task.unwrap().path()).split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_point_of_all_disks_has_one_identity_a_name_and_is_durable_when_told() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        let images = [site.path("a.img"), site.path("b.img")];
        for (seed, image) in images.iter().enumerate() {
            std::fs::write(image, noise(3 * MIB, seed as u64 + 1)).unwrap();
        }
        write_config(&state_dir, target.address, &[&images[0], &images[1]], "");
        let disks = images
            .each_ref()
            .map(|image| target.protect_source(agent_id, source_id(image), vec![0; 3 * MIB], PassMode::Copy));
        let agent = AgentDaemon::start(&state_dir);
        for disk in disks {
            agent.until_synced(disk).await;
        }
        // Synced disks may be in the middle of a round of their own: the point waits for its turn.
        let answer = mark(&state_dir, &request("before", false, Duration::from_secs(1))).await.unwrap();
        assert_eq!((answer.class.as_str(), answer.name.as_str(), answer.disks.len()), ("fuzzy", "before", 2));
        // The timer makes points, too.
        let ours: Vec<_> =
            target.marks().into_iter().filter(|mark| mark.cause == MarkCause::Command).collect();
        assert_eq!(ours.len(), 2);
        assert!(ours.iter().all(|mark| mark.point == ours[0].point && mark.name.as_str() == "before"));
        assert!(ours.iter().all(|mark| (mark.class, mark.cause) == (MarkClass::Fuzzy, MarkCause::Command)));
        assert_ne!(ours[0].disk, ours[1].disk);
        // Rounds go on by the clock, and another point can be made.
        let rounds = agent.until_disk("a look", disks[0], |_| true).await.scan_rounds;
        agent.until_disk("rounds go on", disks[0], |info| info.scan_rounds > rounds + 1).await;
        let other = mark(&state_dir, &request("", false, Duration::from_secs(1))).await.unwrap();
        assert_ne!(other.point, answer.point);
        // While both are synced, the timer reads them together, and their marks are one point.
        let timers: Vec<_> =
            target.marks().into_iter().filter(|mark| mark.cause == MarkCause::Timer).collect();
        assert!(timers.iter().all(|mark| mark.point != [0; 16] && mark.class == MarkClass::Fuzzy));
        let on = |disk| timers.iter().filter(move |mark| mark.disk == disk).map(|mark| mark.point);
        let common = on(disks[0]).filter(|point| on(disks[1]).any(|other| other == *point)).count();
        assert!(common > 0 && common + 1 >= on(disks[0]).count(), "{timers:?}");
        let refused = mark(&state_dir, &request("", true, Duration::from_secs(5))).await.unwrap_err();
        assert!(refused.contains("nothing to freeze"), "{refused}");
        let refused = mark(&state_dir, &request("", true, Duration::from_millis(1))).await.unwrap_err();
        assert!(refused.contains("--freeze-limit"), "{refused}");
        agent.stop().await;
    });
}

#[test]
fn a_frozen_point_is_a_clean_file_system_and_what_takes_too_long_is_thawed_and_no_point() {
    let site = Site::new();
    let Some(volume) = Volume::new(site.dir.path(), "volume") else { return };
    run(async {
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        configure(&state_dir, target.address, &volume.device, "1h", "");
        let id = source_id(&volume.device);
        let disk = target.protect_source(agent_id, id, vec![0; 24 * MIB], PassMode::Copy);
        let agent = AgentDaemon::start(&state_dir);
        agent.until_synced(disk).await;
        // Somebody writes all the time.
        let script = "i=0; while true; do i=$((i+1)); dd if=/dev/urandom of=$0/f$((i%9)) bs=16k count=3 2>/dev/null; done";
        let writer = Writer(Command::new("sh").arg("-c").arg(script).arg(&volume.mount).spawn().unwrap());
        let answer = mark(&state_dir, &request("frozen", true, Duration::from_secs(60))).await.unwrap();
        assert_eq!((answer.class.as_str(), answer.frozen.len()), ("frozen", 1));
        assert!(volume.is_writable(), "it is thawed");
        let placed = target.marks().into_iter().rfind(|mark| mark.point != [0; 16]).unwrap();
        assert_eq!((placed.class, placed.name.as_str()), (MarkClass::Frozen, "frozen"));
        // The next round is an hour away: the target still holds the point.
        let copy = site.path("point.img");
        std::fs::write(&copy, target.bytes(disk)).unwrap();
        let judged = Command::new("e2fsck").arg("-fn").arg(&copy).output().unwrap();
        let text = [judged.stdout, judged.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(judged.status.success(), "{text}");
        // "skipping journal recovery", says e2fsck of one that is dirty, and judges what it finds without it.
        assert!(!text.contains("journal recovery"), "{text}");

        // Reading takes far longer than the freeze may last.
        configure(&state_dir, target.address, &volume.device, "59m", "read_rate = \"6 MB/s\"");
        agent.reload();
        agent.until("the reload", |status| status.scan_interval_ms == 59 * 60_000).await;
        let marks = target.marks().len();
        let late = mark(&state_dir, &request("late", true, Duration::from_secs(1))).await.unwrap_err();
        assert!(late.contains("--freeze-limit"), "{late}");
        volume.until_writable();
        assert!(!target.marks()[marks..].iter().any(|mark| mark.class == MarkClass::Frozen));
        drop(writer);
        agent.stop().await;
    });
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_policy_holds_from_when_it_came_also_after_a_restart_without_a_session() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, _) = site.state_dir("agent");
        let image = site.path("a.img");
        std::fs::write(&image, noise(MIB, 1)).unwrap();
        write_config(&state_dir, target.address, &[&image], "");
        target.set_policy(Policy {
            revision: 4,
            points_every_ms: 123_000,
            target: PeerId::NONE,
            app_points_every_ms: 0,
        });
        let agent = AgentDaemon::start(&state_dir);
        let status = agent.until("the policy", |status| status.policy_revision == 4).await;
        assert_eq!(status.scan_interval_ms, 123_000);
        agent.stop().await;
        target.kill().await;
        let kept = state_dir.join("policy.json");
        assert!(kept.exists());
        let agent = AgentDaemon::start(&state_dir);
        let status = agent.until("an attempt", |status| status.problem.is_some()).await;
        assert_eq!((status.connected, status.policy_revision, status.scan_interval_ms), (false, 4, 123_000));
        agent.stop().await;
    });
}

#[test]
fn a_freeze_ends_when_told_at_its_limit_and_when_its_guard_is_killed() {
    let site = Site::new();
    let state = site.dir.path();
    let (Some(one), Some(two)) = (Volume::new(state, "one"), Volume::new(state, "two")) else { return };
    let mounts = [one.mount.clone(), two.mount.clone()];
    let long = Duration::from_secs(600);

    let freeze = Freeze::begin(&mounts, Limits::of(long), state).unwrap();
    assert!(!one.is_writable() && !two.is_writable());
    // What somebody froze already is neither frozen twice nor thawed by the one who came later.
    let busy = Freeze::begin(&mounts[1..], Limits::of(long), &site.path("ca")).unwrap_err();
    assert!(matches!(busy, FreezeError::Freeze { .. }), "{busy}");
    assert!(!two.is_writable(), "still frozen");
    assert!(freeze.end().held, "it held");
    one.until_writable();
    two.until_writable();

    let freeze = Freeze::begin(&mounts, Limits::of(Duration::from_millis(300)), state).unwrap();
    one.until_writable();
    two.until_writable();
    assert!(!freeze.end().held, "the limit was reached");

    let before = children();
    let freeze = Freeze::begin(&mounts, Limits::of(long), state).unwrap();
    let guard: Vec<String> = children().into_iter().filter(|child| !before.contains(child)).collect();
    assert_eq!(guard.len(), 1, "{guard:?}");
    assert!(quiet("kill", &["-KILL", &guard[0]]));
    assert!(!freeze.end().held, "nobody can say that it held");
    one.until_writable();
    two.until_writable();

    // One of several is frozen by somebody else: none is.
    assert!(quiet("fsfreeze", &["--freeze", two.mount.to_str().unwrap()]));
    assert!(Freeze::begin(&mounts, Limits::of(long), state).is_err());
    one.until_writable();
    assert!(quiet("fsfreeze", &["--unfreeze", two.mount.to_str().unwrap()]));
    // One is of a kind that cannot be frozen, as a boot partition's: the others are.
    let kinds = [one.mount.clone(), PathBuf::from("/proc")];
    let freeze = Freeze::begin(&kinds, Limits::of(long), state).unwrap();
    assert!(!one.is_writable());
    let end = freeze.end();
    assert_eq!((end.held, end.unfrozen), (true, vec![PathBuf::from("/proc")]));
    one.until_writable();
    assert!(!state.join("frozen").exists());
}

/// Run by the next test in a process of its own, which is killed.
#[test]
fn freezes_and_waits_to_be_killed() {
    let Ok(mount) = std::env::var("FREEZE_AND_WAIT") else { return };
    let state = PathBuf::from(std::env::var("FREEZE_STATE").unwrap());
    let held = Duration::from_millis(std::env::var("FREEZE_HELD_MS").unwrap().parse().unwrap());
    let limits = Limits { in_all: Duration::from_secs(600), held };
    let freeze = Freeze::begin(&[mount.into()], limits, &state).unwrap();
    std::fs::write(state.join("is-frozen"), b"").unwrap();
    std::thread::sleep(Duration::from_secs(300));
    drop(freeze);
}

/// A process of its own that has frozen the volume, for so long at most.
fn frozen_by_another(volume: &Volume, state: &Path, held: Duration) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "freezes_and_waits_to_be_killed", "--nocapture"])
        .env("FREEZE_AND_WAIT", &volume.mount)
        .env("FREEZE_STATE", state)
        .env("FREEZE_HELD_MS", held.as_millis().to_string())
        .spawn()
        .unwrap();
    while !state.join("is-frozen").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the child ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

#[test]
fn an_agent_that_hangs_leaves_nothing_frozen() {
    let site = Site::new();
    let Some(volume) = Volume::new(site.dir.path(), "volume") else { return };
    let mut child = frozen_by_another(&volume, site.dir.path(), Duration::from_secs(3));
    assert!(quiet("kill", &["-STOP", &child.id().to_string()]));
    assert!(!volume.is_writable(), "it hangs, and is frozen");
    volume.until_writable();
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn an_agent_that_is_killed_leaves_nothing_frozen() {
    let site = Site::new();
    let Some(volume) = Volume::new(site.dir.path(), "volume") else { return };
    let state = site.dir.path();
    let mut child = frozen_by_another(&volume, state, Duration::from_secs(600));
    assert!(!volume.is_writable());
    child.kill().unwrap();
    child.wait().unwrap();
    volume.until_writable();
    assert!(state.join("frozen").exists(), "and for the case that its guard had been killed too …");
    assert!(quiet("fsfreeze", &["--freeze", volume.mount.to_str().unwrap()]));
    thaw_left_behind(state);
    volume.until_writable();
    assert!(!state.join("frozen").exists());
}
