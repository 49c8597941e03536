//! Every cause of a miss is made to happen, and noticed: lost events of each kind, failed writes, killed agents, changed pins.
//!
//! Called by `cargo test`; needs root and eBPF, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use capture_lab::{
    Direct, Loop, PATIENCE, Running, capable, capture, differences, image, machine, run, until,
};
use reprotect_agent::capture::{
    Capture, CaptureError, CompareCause, Continuity, DiskSlot, Kind, Loss, Record, Verdict, WindowEnd,
    WindowFailure, WindowPlan, WindowSink,
};
use reprotect_engine::range_set::RangeSet;

/// Does one operation of that kind on 16 KiB at 1 MiB.
fn operate(device: &Loop, kind: Kind) {
    let path = device.path.to_str().unwrap();
    match kind {
        Kind::Discard => drop(run("blkdiscard", &["-o", "1048576", "-l", "16384", path])),
        Kind::Zeroes => drop(run("blkdiscard", &["-z", "-o", "1048576", "-l", "16384", path])),
        _ => Direct::open(&device.path).write(1 << 20, 7, 16384).unwrap(),
    }
}

fn dirty(capture: &mut Capture, slot: DiskSlot) -> u64 {
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found = capture.harvest(slot, stretch).unwrap();
    capture.confirm(slot, stretch).unwrap();
    found.sector_count()
}

/// What the oracle says after one event of each kind is lost.
fn after_a_loss(loss: Loss, expected: impl Fn(Kind) -> Verdict, marked: u64) {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut capture = capture("losses", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    for (index, kind) in [Kind::Write, Kind::Discard, Kind::Zeroes].into_iter().enumerate() {
        operate(&device, kind);
        until("it is seen", || capture.completed(slot, kind) > 0);
        dirty(&mut capture, slot);
        let clean = capture.check(slot, PATIENCE).unwrap();
        assert!(matches!(clean.verdict, Verdict::Clean { .. }), "{clean:?}");
        capture.lose(kind, loss, 1);
        operate(&device, kind);
        assert_eq!(capture.lost(), (index as u64 + 1) * if loss == Loss::Both { 2 } else { 1 }, "{kind:?}");
        let check = capture.check(slot, PATIENCE).unwrap();
        assert_eq!(check.verdict, expected(kind), "{kind:?}");
        if matches!(check.verdict, Verdict::Short { .. }) {
            assert_eq!(check.last_clean, clean.last_clean, "points since then are doubtful");
        }
        assert_eq!(dirty(&mut capture, slot), marked, "{kind:?}");
        // It is said once.
        let check = capture.check(slot, PATIENCE).unwrap();
        assert_eq!(check.verdict, Verdict::Clean { explained: 0 }, "{kind:?}");
    }
    println!("{:?}", capture.counts(slot));
}

#[test]
fn a_lost_submission_of_each_kind_is_marked_by_its_completion() {
    after_a_loss(Loss::Submission, |_| Verdict::Clean { explained: 0 }, 32);
}

#[test]
fn a_lost_completion_of_each_kind_is_explained_by_what_it_left_in_flight() {
    after_a_loss(Loss::Completion, |_| Verdict::Clean { explained: 32 }, 32);
}

#[test]
fn a_write_that_was_lost_altogether_is_missing_in_the_account() {
    after_a_loss(Loss::Both, |_| Verdict::Short { sectors: 32 }, 0);
}

#[test]
fn a_lost_submission_is_counted_and_fails_the_window() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut capture = capture("orphan", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    /// Writes with a lost submission when it is asked to read.
    struct Losing(Direct);
    impl WindowSink for Losing {
        fn read(&mut self, _: DiskSlot, _: &RangeSet) -> Result<(), CaptureError> {
            self.0.write(1 << 20, 1, 4096).unwrap();
            Ok(())
        }
        fn record(&mut self, _: &Record<'_>) -> Result<(), CaptureError> {
            Ok(())
        }
    }
    Direct::open(&device.path).write(0, 1, 4096).unwrap();
    capture.prove_data(slot).unwrap();
    capture.lose(Kind::Write, Loss::Submission, 1);
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let plan = WindowPlan { rounds_max: 0, ..WindowPlan::new(vec![(slot, stretch)]) };
    let end = capture.window(&plan, &mut Losing(Direct::open(&device.path)), &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Failed(WindowFailure::Unmatched(1))), "{end:?}");
    assert_eq!(capture.counts(slot).orphans, 1);
}

/// A device whose writes beyond 4 MiB fail: its image lies on a file system that is full then.
struct Failing {
    // Dropped in this order.
    device: Loop,
    _mounted: capture_lab::Mounted,
}

fn failing(dir: &std::path::Path) -> Failing {
    let at = dir.join("small");
    std::fs::create_dir_all(&at).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=4m", "tmpfs", at.to_str().unwrap()]);
    let mounted = capture_lab::Mounted { at: at.clone() };
    Failing { device: Loop::new(&at, "disk", 64), _mounted: mounted }
}

#[test]
fn failed_writes_are_counted_and_marked_again_when_they_end() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lab = failing(dir.path());
    let device = &lab.device;
    let mut capture = capture("failed", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut direct = Direct::open(&device.path);
    let mut failed = 0;
    for at in 0..16 {
        failed += u64::from(direct.write(at << 20, 1, 1 << 20).is_err());
    }
    assert!(failed >= 8, "{failed}");
    assert!(capture.counts(slot).failed >= failed, "{:?}", capture.counts(slot));
    let check = capture.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "{check:?}");
    assert_eq!(dirty(&mut capture, slot), (16 << 20) / 512);
    /// Fails writes when it is asked to read.
    struct FailingWrites(Direct);
    impl WindowSink for FailingWrites {
        fn read(&mut self, _: DiskSlot, _: &RangeSet) -> Result<(), CaptureError> {
            assert!(self.0.write(40 << 20, 1, 1 << 20).is_err());
            Ok(())
        }
        fn record(&mut self, _: &Record<'_>) -> Result<(), CaptureError> {
            Ok(())
        }
    }
    direct.write(0, 9, 4096).unwrap();
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let plan = WindowPlan { rounds_max: 0, ..WindowPlan::new(vec![(slot, stretch)]) };
    let end = capture.window(&plan, &mut FailingWrites(Direct::open(&device.path)), &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Failed(WindowFailure::FailedWrites(_))), "{end:?}");
}

/// What the process that is killed does: follows, harvests, says so, and waits for its end.
#[test]
fn helper_that_is_killed() {
    let Ok(arguments) = std::env::var("CAPTURE_VICTIM") else { return };
    let (dir, path) = arguments.split_once('|').unwrap();
    let mut capture = capture("victim", dir.as_ref());
    let disk = reprotect_agent::capture::BlockDisk::at(path.as_ref()).unwrap();
    let (slot, continuity) = capture.follow(disk, "x").unwrap();
    let mut direct = Direct::open(path.as_ref());
    direct.write(4096, 3, 4096).unwrap();
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found = capture.harvest(slot, stretch).unwrap();
    capture.prove_data(slot).unwrap();
    capture.record_all(true).unwrap();
    println!("VICTIM {continuity:?} {}", found.sector_count());
    std::thread::sleep(PATIENCE);
}

#[test]
fn an_agent_killed_between_harvest_and_confirmation_loses_nothing_and_its_programs_go_on() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let copy = image(&device.path, &dir.path().join("copy"));
    let victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_that_is_killed", "--nocapture"])
        .env("CAPTURE_VICTIM", format!("{}|{}", dir.path().display(), device.path.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut victim = Running(victim);
    let lines = BufReader::new(victim.0.stdout.take().unwrap()).lines();
    let said = lines.map(Result::unwrap).find(|line| line.contains("VICTIM")).unwrap();
    assert!(said.contains("FirstTime") && said.ends_with(" 8"), "{said}");
    victim.0.kill().unwrap();
    victim.0.wait().unwrap();
    // Nobody is there, the programs are.
    Direct::open(&device.path).write(1 << 20, 4, 8192).unwrap();
    let mut capture = capture("victim", dir.path());
    assert_eq!(capture.mode(), reprotect_agent::capture::Mode::Bitmap, "nobody would read the ring");
    let (slot, continuity) = capture.follow(device.disk(), "x").unwrap();
    assert_eq!(continuity, Continuity::Continued { dirty_blocks: 3 });
    let check = capture.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "{check:?}");
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found = capture.harvest(slot, stretch).unwrap();
    Direct::open(&device.path).copy_ranges(&found, &copy);
    assert_eq!(differences(&device.path, &copy), Vec::<u64>::new());
}

#[test]
fn pins_that_were_removed_or_replaced_are_noticed_at_once_and_at_the_next_start() {
    let _turn = machine();
    if !capable() {
        return;
    }
    for pin in ["link_on_queue", "link_on_request", "control", "dirty_0"] {
        let dir = tempfile::tempdir().unwrap();
        let device = Loop::new(dir.path(), "disk", 16);
        let mut first = capture("pins", dir.path());
        let (slot, _) = first.follow(device.disk(), "x").unwrap();
        std::fs::remove_file(format!("/sys/fs/bpf/reprotect/agent-pins/{pin}")).unwrap();
        if pin != "dirty_0" {
            let error = first.check(slot, Duration::ZERO).unwrap_err();
            assert!(matches!(error, CaptureError::PinChanged { .. }), "{error}");
            assert!(error.to_string().contains(pin), "{error}");
        }
        first.kill();
        let mut second = capture("pins", dir.path());
        let (_, continuity) = second.follow(device.disk(), "x").unwrap();
        let Continuity::Compare(CompareCause::PinsChanged { what }) = continuity else {
            panic!("{continuity:?}")
        };
        assert!(what.contains(pin), "{what}");
    }
}

/// Somebody else's program runs where the agent's did: its events go to other maps.
#[test]
fn a_program_a_link_or_a_map_that_another_took_the_place_of_is_noticed_at_once_and_at_the_next_start() {
    let _turn = machine();
    if !capable() {
        return;
    }
    for pin in ["on_queue", "link_on_queue", "link_on_request", "link_on_bio", "tallies", "dirty_0"] {
        let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let device = Loop::new(dir.path(), "disk", 16);
        let other_device = Loop::new(other_dir.path(), "disk", 16);
        let mut first = capture("replaced", dir.path());
        let (slot, _) = first.follow(device.disk(), "x").unwrap();
        let mut other = capture("replacing", other_dir.path());
        other.follow(other_device.disk(), "y").unwrap();
        let place = std::path::Path::new("/sys/fs/bpf/reprotect");
        std::fs::rename(place.join("agent-replacing").join(pin), place.join("agent-replaced").join(pin))
            .unwrap();
        if pin != "dirty_0" {
            let error = first.check(slot, Duration::ZERO).unwrap_err();
            assert!(matches!(error, CaptureError::PinChanged { .. }), "{error}");
            assert!(error.to_string().contains(pin), "{error}");
        }
        first.kill();
        let mut second = capture("replaced", dir.path());
        let (_, continuity) = second.follow(device.disk(), "x").unwrap();
        let Continuity::Compare(CompareCause::PinsChanged { what }) = continuity else {
            panic!("{pin}: {continuity:?}")
        };
        assert!(what.contains(pin) || what.contains("agent-replaced"), "{pin}: {what}");
    }
}

#[test]
fn a_session_of_another_boot_is_compared() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 16);
    let mut first = capture("boot", dir.path());
    first.follow(device.disk(), "x").unwrap();
    first.kill();
    let path = dir.path().join("capture.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert!(text.contains(boot.trim()));
    std::fs::write(&path, text.replace(boot.trim(), "another")).unwrap();
    let mut second = capture("boot", dir.path());
    let (_, continuity) = second.follow(device.disk(), "x").unwrap();
    assert_eq!(continuity, Continuity::Compare(CompareCause::NewBoot));
}

#[test]
fn a_write_is_seen_where_it_lands_whatever_partition_it_was_made_through() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let path = device.path.to_str().unwrap();
    let script = format!(
        "echo 'start=40960, size=40960' | sfdisk -q --no-reread --no-tell-kernel {path} && partx -a {path}"
    );
    run("sh", &["-c", &script]);
    let mut capture = capture("partition", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let partition = format!("{path}p1");
    until("the partition is there", || std::fs::metadata(&partition).is_ok());
    Direct::open(partition.as_ref()).write(8192, 5, 4096).unwrap();
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found: Vec<_> = capture.harvest(slot, stretch).unwrap().iter().collect();
    assert_eq!(found, [reprotect_engine::units::SectorRange::new(40960 + 16, 40960 + 24)]);
    let error = reprotect_agent::capture::BlockDisk::at(partition.as_ref()).unwrap_err();
    assert!(error.to_string().contains("partition"), "{error}");
    run("partx", &["-d", path]);
    let copy = image(&device.path, &dir.path().join("copy"));
    let mut byte = [0];
    copy.read_exact_at(&mut byte, 40960 * 512 + 8192).unwrap();
    assert_eq!(byte, [5]);
}
