//! The agent daemon over live loop devices: rounds by capture instead of scans, points by closing windows, and what a
//! restart goes on from.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod capture_lab;
mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capture_lab::Loop;
use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, write_config};
use reprotect_agent::capture;
use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, PeerId};

const MIB: usize = 1 << 20;
const SIZE: usize = 48 * MIB;

/// An agent with loop devices, and the target that protects them.
struct Setup {
    _site: Site,
    target: FakeTarget,
    state_dir: PathBuf,
    loops: Vec<Loop>,
    disks: Vec<DiskId>,
    agent: PeerId,
}

impl Setup {
    fn new(count: usize, capture: &str) -> Self {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent) = site.state_dir("agent");
        let loops: Vec<Loop> = (0..count)
            .map(|number| {
                let image = site.path(&format!("disk-{number}.img"));
                std::fs::write(&image, noise(SIZE, 3 + number as u64)).unwrap();
                Loop::existing(&image)
            })
            .collect();
        let paths: Vec<_> = loops.iter().map(|device| device.path.as_path()).collect();
        write_config(&state_dir, target.address, &paths, capture);
        let protect = |device: &Loop| {
            target.protect_source(agent, source_id(&device.path), vec![0; SIZE], PassMode::Copy)
        };
        let disks = loops.iter().map(protect).collect();
        Self { _site: site, target, state_dir, loops, disks, agent }
    }

    fn start(&self) -> AgentDaemon {
        AgentDaemon::start(&self.state_dir)
    }

    fn equal(&self) -> bool {
        self.loops.iter().zip(&self.disks).all(|(device, disk)| {
            capture_lab::run("blockdev", &["--flushbufs", device.path.to_str().unwrap()]);
            let content = std::fs::read(&device.path).unwrap();
            self.target.with_bytes(*disk, |bytes| bytes == content)
        })
    }

    fn write(&self, device: usize, at: usize, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.loops[device].path).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
        file.sync_all().unwrap();
    }

    /// Waits until the target has the size of the device, and everything on it.
    async fn grown(&self, agent: &AgentDaemon, device: usize, mib: usize) {
        let disk = self.disks[device];
        common::wait_for("the target is as large", async || {
            (self.target.with_bytes(disk, <[u8]>::len) == mib * MIB).then_some(())
        })
        .await;
        let info = agent.until_disk("it goes on", disk, |info| info.size_bytes == (mib * MIB) as u64).await;
        assert_eq!((info.unaccounted, info.lost_at_target), (0, 0), "{info:?}");
        self.settled(agent).await;
    }

    /// Waits until rounds or points that began after now are durable on every disk.
    async fn settled(&self, agent: &AgentDaemon) {
        let since = wall_clock().0 / 1_000_000;
        for disk in &self.disks {
            agent.until_disk("a newer state", *disk, |info| info.durable_as_of_ms > since).await;
        }
    }
}

#[test]
fn rounds_of_a_followed_disk_read_what_changed_and_their_points_are_crash_consistent() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(2, "capture.interval = \"1s\"");
        let agent = setup.start();
        for disk in &setup.disks {
            let info = agent.until_disk("a round", *disk, |info| info.scan_rounds > 0).await;
            assert_eq!(info.capture, "window", "{info:?}");
        }
        assert!(setup.equal());
        let before = agent.until("a status", |_| true).await;
        setup.write(0, 5 * MIB, &noise(8192, 77));
        setup.write(1, 9 * MIB + 4096, &noise(4096, 78));
        setup.settled(&agent).await;
        assert!(setup.equal());
        let after = agent.until("a status", |_| true).await;
        for (before, after) in before.disks.iter().zip(&after.disks) {
            assert!(after.read_bytes - before.read_bytes <= MIB as u64, "{before:?} {after:?}");
            assert_eq!(after.unaccounted, 0);
        }
        let newest = setup.target.marks();
        let crash: Vec<_> = newest.iter().filter(|mark| mark.class == MarkClass::Crash).collect();
        assert!(crash.len() >= 4, "{newest:?}");
        let last = crash[crash.len() - 1].point;
        assert_eq!(crash.iter().filter(|mark| mark.point == last).count(), 2, "one point of both disks");
        agent.stop().await;
    });
}

#[test]
fn every_write_of_a_streamed_disk_arrives_without_another_round_and_its_points_follow() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(2, "capture.mode = \"data\"\ncapture.interval = \"2s\"");
        let agent = setup.start();
        for disk in &setup.disks {
            let info = agent.until_disk("a round", *disk, |info| info.scan_rounds > 0).await;
            assert_eq!(info.capture, "data", "{info:?}");
        }
        let before = agent.until("a status", |_| true).await;
        for number in 0..20 {
            setup.write(number % 2, number * MIB + 512, &noise(4096 + 512 * number, 500 + number as u64));
        }
        let crash =
            |setup: &Setup| setup.target.marks().iter().filter(|mark| mark.class == MarkClass::Crash).count();
        let marks = crash(&setup);
        common::wait_for("two points more", async || (crash(&setup) >= marks + 4).then_some(())).await;
        assert!(setup.equal());
        let after = agent.until("a status", |_| true).await;
        for (before, after) in before.disks.iter().zip(&after.disks) {
            assert_eq!(
                (before.scan_rounds, before.read_bytes),
                (after.scan_rounds, after.read_bytes),
                "{after:?}"
            );
            assert!(after.durable > before.durable);
        }
        agent.stop().await;
    });
}

#[test]
fn how_fresh_the_target_is_and_how_changes_are_found_is_told_to_people_and_to_prometheus() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let setup = Setup::new(
            1,
            &format!(
                "capture.mode = \"data\"\ncapture.interval = \"1s\"\nmetrics.listen = \"{free}\"\nrpo_threshold = \"3s\""
            ),
        );
        let agent = setup.start();
        let disk = setup.disks[0];
        agent.until_disk("every write is known", disk, |info| info.streaming).await;
        // Nothing is written, and still it gets no older.
        let first = agent.until_disk("a state", disk, |info| info.durable_as_of_ms > 0).await;
        agent
            .until_disk("a newer one", disk, |info| info.durable_as_of_ms > first.durable_as_of_ms + 500)
            .await;
        setup.write(0, MIB, &noise(4096, 8));
        let written = wall_clock().0 / 1_000_000;
        agent.until_disk("the write", disk, |info| info.durable_as_of_ms > written).await;
        let status = agent.until("a status", |_| true).await;
        let steps: Vec<_> = status.ladder.iter().map(|step| step.to.as_str()).collect();
        // A loaded machine may have taken a step back and forth, each to somewhere else.
        assert_eq!((steps.first(), steps.last()), (Some(&"window"), Some(&"data")), "{:?}", status.ladder);
        assert!(steps.windows(2).all(|pair| pair[0] != pair[1]), "{:?}", status.ladder);
        assert_eq!(steps.len() as u64, status.ladder_steps);
        let text = scrape(free);
        assert!(text.contains(&format!("reprotect_agent_rpo_seconds{{disk=\"{disk}\"")), "{text}");
        // The number may grow between two questions.
        common::wait_for("the same number of steps in both", async || {
            let steps = agent.until("a status", |_| true).await.ladder_steps;
            scrape(free).contains(&format!("reprotect_agent_ladder_steps_total {steps}\n")).then_some(())
        })
        .await;
        setup.target.stall(true);
        setup.write(0, MIB, &noise(4096, 9));
        let over = |status: &reprotect_agent::api::StatusInfo| {
            status.health.iter().any(|event| event.code == "RPO_EXCEEDED")
        };
        agent.until("a health event", over).await;
        setup.target.stall(false);
        agent.until("it is over", |status| !over(status)).await;
        // Without a session it gets older all the same.
        setup.target.kill().await;
        agent.until("a health event without a session", |status| !status.connected && over(status)).await;
        agent.stop().await;
    });
}

fn scrape(address: std::net::SocketAddr) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_disk_under_fire_is_equal_once_it_is_left_alone_whatever_happened_to_the_session() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        for mode in ["window", "data", "bitmap"] {
            let mut setup = Setup::new(2, &format!("capture.mode = \"{mode}\"\ncapture.interval = \"1s\""));
            let fire = Arc::new(AtomicBool::new(true));
            let writers: Vec<_> = setup
                .loops
                .iter()
                .enumerate()
                .map(|(number, device)| {
                    let (path, fire) = (device.path.clone(), Arc::clone(&fire));
                    std::thread::spawn(move || {
                        let file = OpenOptions::new().write(true).open(path).unwrap();
                        let mut seed = 100 + number as u64;
                        while fire.load(Ordering::Relaxed) {
                            seed = seed
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1_442_695_040_888_963_407);
                            let length = 512 << (seed >> 60 & 7);
                            let at = (seed >> 20) as usize % (SIZE - length) / 512 * 512;
                            file.write_all_at(&noise(length, seed), at as u64).unwrap();
                            if seed >> 40 & 7 == 0 {
                                file.sync_data().unwrap();
                            }
                        }
                        file.sync_all().unwrap();
                    })
                })
                .collect();
            let agent = setup.start();
            setup.settled(&agent).await;
            setup.target.restart().await;
            setup.settled(&agent).await;
            agent.stop().await;
            let agent = setup.start();
            setup.settled(&agent).await;
            fire.store(false, Ordering::Relaxed);
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            setup.settled(&agent).await;
            assert!(setup.equal(), "{mode}");
            agent.stop().await;
        }
    });
}

#[test]
fn after_a_clean_stop_a_disk_goes_on_whatever_was_written_meanwhile() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(1, "capture.interval = \"1s\"");
        let agent = setup.start();
        agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        agent.stop().await;
        let agent = setup.start();
        let info = agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        assert!(info.read_bytes < MIB as u64, "nothing was read again: {info:?}");
        agent.stop().await;

        // A target that lost durable data while no agent ran: no map knows of it, the stream's position does.
        let agent = setup.start();
        agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        let promised = setup.target.promised(setup.disks[0]);
        setup.write(0, 3 * MIB, &noise(4096, 6));
        setup.settled(&agent).await;
        agent.stop().await;
        setup.target.lose(setup.disks[0], promised);
        assert!(!setup.equal());
        let agent = setup.start();
        let info = agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        assert!(info.read_bytes >= SIZE as u64, "it was compared: {info:?}");
        assert!(setup.equal());
        agent.stop().await;

        // As in an upgrade: the programs see what is written while no agent runs.
        setup.write(0, 7 * MIB, &noise(4096, 5));
        let agent = setup.start();
        let info = agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        assert!(info.read_bytes < MIB as u64, "only what was written was read: {info:?}");
        assert_eq!(info.plain_bytes_sent, 4096);
        assert!(setup.equal());
        agent.stop().await;

        // Unless somebody took them away.
        assert!(capture::let_go(&setup.agent.to_string()).unwrap());
        setup.write(0, 9 * MIB, &noise(4096, 8));
        let agent = setup.start();
        let info = agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
        assert!(info.read_bytes >= SIZE as u64, "it was compared: {info:?}");
        assert!(setup.equal());
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_could_not_be_followed_is_followed_once_that_is_mended() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(1, "capture.interval = \"1s\"");
        setup.loops[0].queue("iostats", "0");
        let agent = setup.start();
        let info = agent.until_disk("scanned", setup.disks[0], |info| info.scan_rounds > 0).await;
        assert!(info.capture.starts_with("scan") && info.capture.contains("iostats"), "{info:?}");
        setup.loops[0].queue("iostats", "1");
        let info = agent.until_disk("followed", setup.disks[0], |info| info.capture == "window").await;
        assert_eq!(info.problem, None);
        setup.write(0, 5 * MIB, &noise(4096, 5));
        setup.settled(&agent).await;
        let marks = setup.target.marks().len();
        common::wait_for("a consistent point", async || {
            setup.target.marks()[marks..].iter().any(|mark| mark.class == MarkClass::Crash).then_some(())
        })
        .await;
        assert!(setup.equal());
        let steps: Vec<String> =
            agent.until("a status", |_| true).await.ladder.into_iter().map(|step| step.to).collect();
        assert_eq!(steps, ["scan", "window"], "down and up, each once");
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_grows_while_it_is_written_to_is_followed_at_its_new_size_without_a_compare() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        for mode in ["window", "data", "bitmap"] {
            let setup = Setup::new(2, &format!("capture.mode = \"{mode}\"\ncapture.interval = \"1s\""));
            let agent = setup.start();
            for disk in &setup.disks {
                agent.until_disk("a round", *disk, |info| info.scan_rounds > 0).await;
            }
            let before = agent.until_disk("a status", setup.disks[0], |_| true).await;
            let fire = Arc::new(AtomicBool::new(true));
            let (path, burning) = (setup.loops[0].path.clone(), Arc::clone(&fire));
            let writer = std::thread::spawn(move || {
                let file = OpenOptions::new().write(true).open(path).unwrap();
                for seed in 1.. {
                    if !burning.load(Ordering::Relaxed) {
                        return file.sync_all().unwrap();
                    }
                    file.write_all_at(&noise(4096, seed), seed % 1000 * 8192).unwrap();
                    if seed % 64 == 0 {
                        file.sync_data().unwrap();
                    }
                }
            });
            // Twice, and behind the old end before anybody can have noticed.
            for mib in [60, 61] {
                setup.loops[0].grow(mib);
                setup.write(0, (mib as usize - 2) * MIB, &noise(64 << 10, mib));
                setup.write(0, mib as usize * MIB - 4096, &noise(4096, mib + 1));
                setup.grown(&agent, 0, mib as usize).await;
            }
            fire.store(false, Ordering::Relaxed);
            writer.join().unwrap();
            setup.settled(&agent).await;
            assert!(setup.equal(), "{mode}");
            let after = agent.until_disk("a status", setup.disks[0], |_| true).await;
            assert_eq!(after.capture, mode, "{after:?}");
            let steps = agent.until("a status", |_| true).await.ladder;
            assert!(steps.iter().all(|step| step.to != "compare" && step.to != "scan"), "{steps:?}");
            // Points are consistent again.
            let crash = || setup.target.marks().iter().filter(|mark| mark.class == MarkClass::Crash).count();
            let marks = crash();
            if mode != "bitmap" {
                common::wait_for("points", async || (crash() > marks + 2).then_some(())).await;
            }
            println!("{mode}: {} bytes read for 13 MiB more", after.read_bytes - before.read_bytes);
            agent.stop().await;
            // And after a restart it goes on where it was, at its new size.
            let agent = setup.start();
            let info = agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
            assert!(info.read_bytes < 8 * MIB as u64, "nothing was read again: {info:?}");
            setup.write(0, 60 * MIB, &noise(4096, 99));
            setup.settled(&agent).await;
            assert!(setup.equal(), "{mode}");
            agent.stop().await;
        }
    });
}

#[test]
fn a_disk_that_grew_while_no_agent_ran_or_that_is_scanned_grows_at_the_target_too() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        for mode in ["window", "scan"] {
            let setup = Setup::new(1, &format!("capture.mode = \"{mode}\"\ncapture.interval = \"1s\""));
            let agent = setup.start();
            agent.until_disk("a round", setup.disks[0], |info| info.scan_rounds > 0).await;
            setup.loops[0].grow(52);
            setup.write(0, 51 * MIB, &noise(4096, 7));
            setup.grown(&agent, 0, 52).await;
            agent.stop().await;
            setup.loops[0].grow(56);
            setup.write(0, 55 * MIB, &noise(4096, 8));
            let agent = setup.start();
            setup.grown(&agent, 0, 56).await;
            assert!(setup.equal(), "{mode}");
            agent.stop().await;
        }
    });
}

#[test]
fn a_target_that_cannot_grow_and_a_source_that_shrank_stop_the_disk_with_reason_and_remedy() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(2, "capture.interval = \"1s\"");
        let agent = setup.start();
        for disk in &setup.disks {
            agent.until_disk("a round", *disk, |info| info.scan_rounds > 0).await;
        }
        setup.target.refuse_growth(Some("the device has 48 MiB: enlarge it"));
        setup.loops[0].grow(50);
        let info = agent.until_disk("stopped", setup.disks[0], |info| info.state == "stopped").await;
        assert!(info.problem.unwrap().contains("enlarge it"));
        // The other one goes on, and this one when its target can.
        setup.write(1, MIB, &noise(4096, 3));
        let since = wall_clock().0 / 1_000_000;
        agent.until_disk("a newer state", setup.disks[1], |info| info.durable_as_of_ms > since).await;
        setup.target.refuse_growth(None);
        setup.write(0, 49 * MIB, &noise(4096, 4));
        agent.reload();
        setup.grown(&agent, 0, 50).await;
        assert!(setup.equal());
        setup.loops[1].grow(40);
        let info = agent.until_disk("stopped", setup.disks[1], |info| info.state == "stopped").await;
        let problem = info.problem.unwrap();
        assert!(problem.contains("never made smaller") && problem.contains("protect it anew"), "{problem}");
        agent.stop().await;
    });
}
