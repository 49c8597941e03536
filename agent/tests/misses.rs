//! The daemon where capture misses something, cannot be had, is taken away, or finds no moment: it says so and goes on.
//!
//! A miss is made by switching the programs in the kernel off for a moment, by their own control word. Called by `cargo test`;
//! needs root and eBPF, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod capture_lab;
mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aya::maps::MapData;
use capture_lab::{Direct, Loop, Mounted, Nowait};
use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, write_config};
use reprotect_agent::api::StatusInfo;
use reprotect_agent::check;
use reprotect_agent::config::Settings;
use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::preflight::Verdict;
use reprotect_engine::units::{DiskId, PeerId};

const MIB: usize = 1 << 20;
const SIZE: usize = 16 * MIB;

/// An agent with one loop device, and the target that protects it.
struct Setup {
    site: Site,
    target: FakeTarget,
    state_dir: PathBuf,
    // Dropped in this order.
    device: Loop,
    _memory: Mounted,
    disk: DiskId,
    agent: PeerId,
}

impl Setup {
    /// The disk is in memory.
    fn new(capture: &str) -> Self {
        Self::sized(capture, SIZE)
    }

    fn sized(capture: &str, size: usize) -> Self {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent) = site.state_dir("agent");
        let at = site.path("memory");
        std::fs::create_dir(&at).unwrap();
        capture_lab::run("mount", &["-t", "tmpfs", "tmpfs", at.to_str().unwrap()]);
        let memory = Mounted { at: at.clone() };
        let image = at.join("disk.img");
        std::fs::write(&image, noise(size, 5)).unwrap();
        let device = Loop::existing(&image);
        write_config(&state_dir, target.address, &[&device.path], capture);
        let disk = target.protect_source(agent, source_id(&device.path), vec![0; size], PassMode::Copy);
        Self { site, target, state_dir, device, _memory: memory, disk, agent }
    }

    /// Up to which sequence everything was seen, as the next process will know it.
    fn account(&self) -> Option<u64> {
        let text = std::fs::read_to_string(self.state_dir.join(format!("stream-{}", self.disk))).ok()?;
        text.split_whitespace().nth(5)?.parse().ok()
    }

    fn equal(&self) -> bool {
        capture_lab::run("blockdev", &["--flushbufs", self.device.path.to_str().unwrap()]);
        let content = std::fs::read(&self.device.path).unwrap();
        self.target.with_bytes(self.disk, |bytes| bytes == content)
    }

    /// The agent's place in the kernel.
    fn place(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/reprotect").join(format!("agent-{}", self.agent))
    }

    /// Does something that no program in the kernel sees.
    fn unseen(&self, act: impl FnOnce()) {
        let map = MapData::from_pin(self.place().join("control")).unwrap();
        let page = ControlPage::of(&map);
        let mode = page.mode();
        page.set_mode(mode & !0xff);
        act();
        page.set_mode(mode);
    }
}

/// The page the agent and its programs share; its first word is the mode, 0 in the low byte for none.
struct ControlPage(*mut u64);

impl ControlPage {
    #[expect(unsafe_code, reason = "mapping memory")]
    fn of(map: &MapData) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let bytes = rustix::param::page_size();
        // SAFETY: a new mapping at a place the kernel chooses overlaps nothing.
        Self(
            unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, map.fd(), 0) }
                .unwrap()
                .cast(),
        )
    }

    #[expect(unsafe_code, reason = "a word that others change")]
    fn mode(&self) -> u64 {
        // SAFETY: the page is mapped as long as `self` lives, and the word is aligned.
        unsafe { self.0.read_volatile() }
    }

    #[expect(unsafe_code, reason = "as above")]
    fn set_mode(&self, word: u64) {
        // SAFETY: as above.
        unsafe { self.0.write_volatile(word) };
    }
}

impl Drop for ControlPage {
    #[expect(unsafe_code, reason = "unmapping memory")]
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no view of it outlives `self`.
        unsafe { rustix::mm::munmap(self.0.cast(), rustix::param::page_size()) }.unwrap();
    }
}

fn has(status: &StatusInfo, code: &str, cause: &str) -> bool {
    status.health.iter().any(|event| event.code == code && event.cause.contains(cause))
}

#[test]
fn a_write_that_no_program_saw_is_told_demotes_points_and_is_put_right_by_a_compare() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        // Windows have a say in the mode, too.
        let setup = Setup::new("capture.mode = \"bitmap\"\ncapture.interval = \"1s\"");
        let agent = AgentDaemon::start(&setup.state_dir);
        agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        assert!(setup.equal());
        Direct::open(&setup.device.path).write(3 << 20, 0x11, 4096).unwrap();
        let clean =
            common::wait_for("a clean account that is kept", async || setup.account().filter(|at| *at > 0))
                .await;
        agent.stop().await;
        let agent = AgentDaemon::start(&setup.state_dir);
        let before = agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        setup.unseen(|| Direct::open(&setup.device.path).write(5 << 20, 0x5a, 8192).unwrap());
        assert!(!setup.equal(), "nothing knows of it");
        // The account is looked at every half a minute.
        let status = agent.until("it is told", |status| has(status, "CAPTURE_MISSED", "16 sectors")).await;
        assert!(status.ladder.iter().any(|step| step.to == "compare"), "{:?}", status.ladder);
        let info = agent.until_disk("counted", setup.disk, |info| info.unaccounted == 1).await;
        assert_eq!(info.capture, "bitmap", "{info:?}");
        let read = before.read_bytes + SIZE as u64;
        agent.until_disk("the whole disk was read", setup.disk, |info| info.read_bytes >= read).await;
        agent.until("it is put right", |status| !has(status, "CAPTURE_MISSED", "")).await;
        assert!(setup.equal());
        let degraded = setup.target.degraded();
        assert!(!degraded.is_empty() && degraded.iter().all(|told| told.disk == setup.disk), "{degraded:?}");
        let first = degraded[0];
        assert!(
            first.from.0 >= clean,
            "points up to the last clean account of the process before are good: {first:?}"
        );
        // Whether the target wrote it down nobody knows.
        agent.stop().await;
        let agent = AgentDaemon::start(&setup.state_dir);
        agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        let again = setup.target.degraded();
        let same = again[degraded.len()..].iter().find(|told| (told.from, told.to) == (first.from, first.to));
        assert!(same.is_some_and(|told| told.lineage == first.lineage), "it is said again: {again:?}");
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_stops_counting_or_whose_programs_are_taken_away_is_scanned_and_followed_again() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new("capture.mode = \"window\"\ncapture.interval = \"1s\"");
        let agent = AgentDaemon::start(&setup.state_dir);
        agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        setup.device.queue("iostats", "0");
        let fell = |info: &reprotect_agent::api::DiskInfo, why: &str| {
            info.capture.starts_with("scan") && info.capture.contains(why)
        };
        agent.until_disk("scanned", setup.disk, |info| fell(info, "iostats")).await;
        let overrides = Overrides { state_dir: Some(setup.state_dir.clone()), ..Overrides::default() };
        let settings = Settings::load(&overrides).unwrap();
        let findings = check::all(&settings).await;
        let found = findings.iter().find(|finding| finding.name == "capture").unwrap();
        assert_eq!(found.verdict, Verdict::Warn, "{found:?}");
        let said = format!("{found:?}");
        assert!(said.contains("iostats is 0") && said.contains("write 1 to"), "{said}");
        setup.device.queue("iostats", "1");
        agent.until_disk("followed", setup.disk, |info| info.capture == "window").await;
        agent.until("nothing is wrong", |status| !has(status, "CAPTURE_FELL_BACK", "")).await;
        // As a tool that cleans up the bpf file system does.
        std::fs::remove_file(setup.place().join("link_on_queue")).unwrap();
        Direct::open(&setup.device.path).write(6 << 20, 0x5b, 8192).unwrap();
        agent.until_disk("noticed", setup.disk, |info| info.unaccounted > 1).await;
        agent.until_disk("followed by new programs", setup.disk, |info| info.capture == "window").await;
        common::wait_for("the compare puts it right", async || setup.equal().then_some(())).await;
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_another_agent_follows_is_scanned_until_that_one_lets_go() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new("capture.mode = \"window\"\ncapture.interval = \"1s\"");
        let other_dir = setup.site.path("other");
        std::fs::create_dir(&other_dir).unwrap();
        let mut other = capture_lab::capture("other", &other_dir);
        other.follow(setup.device.disk(), "x").unwrap();
        let agent = AgentDaemon::start(&setup.state_dir);
        let info = agent.until_disk("scanned", setup.disk, |info| info.scan_rounds > 0).await;
        assert!(info.capture.starts_with("scan") && info.capture.contains("another agent"), "{info:?}");
        let told = |status: &StatusInfo| has(status, "CAPTURE_FELL_BACK", "stop that agent");
        agent.until("it is told", told).await;
        drop(other);
        agent.until_disk("followed", setup.disk, |info| info.capture == "window").await;
        agent.stop().await;
    });
}

/// In the low byte of the mode word while a window is open.
const DATA_MODE: u64 = 2;

/// Crash-consistent points so far.
fn crash(setup: &Setup) -> usize {
    setup.target.marks().iter().filter(|mark| mark.class == MarkClass::Crash).count()
}

#[test]
fn a_window_in_which_a_write_was_refused_is_followed_at_once_by_one_that_closes() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new("capture.mode = \"window\"\ncapture.interval = \"1s\"");
        setup.device.queue("scheduler", "none");
        setup.device.queue("nr_requests", "4");
        let agent = AgentDaemon::start(&setup.state_dir);
        agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers: Vec<_> = (0..8_u64)
            .map(|lane| {
                let (stop, path) = (Arc::clone(&stop), setup.device.path.clone());
                std::thread::spawn(move || {
                    let mut direct = Direct::open(&path);
                    for number in 1.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        direct.write(lane << 20, number as u8, 64 << 10).unwrap();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                })
            })
            .collect();
        let (ended, count, path) = (Arc::clone(&stop), Arc::clone(&refused), setup.device.path.clone());
        let control = MapData::from_pin(setup.place().join("control")).unwrap();
        writers.push(std::thread::spawn(move || {
            let (mut nowait, page) = (Nowait::open(&path), ControlPage::of(&control));
            let (mut last, mut number) = (0, 0);
            while !ended.load(Ordering::Relaxed) {
                let mode = page.mode();
                if mode & 0xff != DATA_MODE || mode == last {
                    std::thread::sleep(Duration::from_micros(100));
                    continue;
                }
                (last, number) = (mode, number + 1);
                // Every second window is left alone.
                while number % 2 == 1 && page.mode() == mode {
                    if nowait.write(12 << 20, 0xee).is_err() {
                        count.fetch_add(u64::from(page.mode() == mode), Ordering::Relaxed);
                        break;
                    }
                }
            }
        }));
        let marks = crash(&setup);
        common::wait_for("windows with refused writes", async || {
            (refused.load(Ordering::Relaxed) > 3).then_some(())
        })
        .await;
        common::wait_for("points", async || (crash(&setup) > marks + 3).then_some(())).await;
        let status = agent.until("a status", |_| true).await;
        assert_eq!(status.windows_failed, 0, "another window is opened at once");
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        common::wait_for("the target is equal", async || setup.equal().then_some(())).await;
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_changes_faster_than_a_window_holds_says_so_and_has_its_points_again_when_it_calms_down() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let size = 256 * MIB;
        let setup = Setup::sized("capture.mode = \"window\"\ncapture.interval = \"1s\"", size);
        let agent = AgentDaemon::start(&setup.state_dir);
        agent.until_disk("a round", setup.disk, |info| info.scan_rounds > 0).await;
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, path) = (Arc::clone(&stop), setup.device.path.clone());
        let writer = std::thread::spawn(move || {
            let mut direct = Direct::open(&path);
            for number in 1_u64.. {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                direct.write((number % 256) << 20, number as u8, 1 << 20).unwrap();
            }
        });
        let told = |status: &StatusInfo| has(status, "WINDOWS_FAIL", "more than the");
        agent.until("the cause is named", told).await;
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let marks = crash(&setup);
        agent.until("windows close again", |status| !has(status, "WINDOWS_FAIL", "")).await;
        common::wait_for("points", async || (crash(&setup) > marks).then_some(())).await;
        assert!(setup.equal());
        let info = agent.until_disk("a status", setup.disk, |_| true).await;
        assert_eq!((info.capture.as_str(), info.unaccounted), ("window", 0), "{info:?}");
        agent.stop().await;
    });
}

/// Programs that nobody takes out run at every write of the machine until it is rebooted.
#[test]
fn what_a_test_followed_is_taken_out_of_the_kernel_also_when_it_fails() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    let place = std::sync::Mutex::new(PathBuf::new());
    let failed = std::panic::catch_unwind(|| {
        run(async {
            let setup = Setup::new("capture.mode = \"window\"\ncapture.interval = \"1s\"");
            *place.lock().unwrap() = setup.place();
            let agent = AgentDaemon::start(&setup.state_dir);
            agent.until_disk("followed", setup.disk, |info| info.capture == "window").await;
            assert!(!setup.place().join("link_on_queue").exists(), "this fails on purpose");
        });
    });
    assert!(failed.is_err());
    let place = place.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert!(place.is_absolute() && !place.exists(), "{}", place.display());
}
