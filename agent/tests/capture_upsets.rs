//! What happens to capture besides writes: agents that leave and come back, disks that go, a state directory that is full,
//! disks that are never idle. None of it makes it forget a write, or accuse itself of one.
//!
//! Called by `cargo test`; needs root and eBPF, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use capture_lab::{
    Direct, Loop, Nothing, PATIENCE, Running, capable, capture, differences, fio, image, machine, run, until,
};
use reprotect_agent::capture::{
    Capture, CompareCause, Continuity, DiskSlot, Kind, Loss, Verdict, WindowEnd, WindowPlan,
};

/// Writes that are always on their way.
fn never_idle(device: &Path) -> Running {
    fio(&format!(
        "[global]\nfilename={}\ntime_based=1\nruntime=120\nthread=1\ndirect=1\nioengine=libaio\nnorandommap=1\n\
         [deep]\nrw=randwrite\nbs=64k\niodepth=32\nrate_iops=2000\n[deeper]\nrw=randwrite\nbs=4k\niodepth=64\n",
        device.display()
    ))
}

/// A device that holds each write for a while, and threads that see to it that it always holds some.
struct Held {
    slow: capture_lab::Slow,
    stop: Arc<AtomicBool>,
    writers: Vec<std::thread::JoinHandle<()>>,
}

impl Held {
    fn new(dir: &Path) -> Self {
        Self { slow: capture_lab::Slow::new(dir, 32, 100), stop: Arc::default(), writers: Vec::new() }
    }

    fn path(&self) -> &Path {
        &self.slow.device().path
    }

    /// Begins to write.
    fn write(&mut self) {
        for lane in 0..4_u64 {
            let (path, stop) = (self.path().to_owned(), Arc::clone(&self.stop));
            let write = move || {
                let mut direct = Direct::open(&path);
                for number in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    direct.write(lane << 20, number as u8, 4096).unwrap();
                }
            };
            self.writers.push(std::thread::spawn(write));
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    /// Stops to, and answers when nothing is on its way.
    fn rest(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.drain(..).for_each(|writer| writer.join().unwrap());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Whether one of several windows closes; a busy machine may drop records of some.
fn closes(capture: &mut Capture, slot: DiskSlot) -> bool {
    (0..8).any(|_| {
        let stretch = capture.open_stretch(slot).unwrap().unwrap();
        let plan =
            WindowPlan { patience: Duration::from_millis(500), ..WindowPlan::new(vec![(slot, stretch)]) };
        let end = capture.window(&plan, &mut Nothing, &mut ()).unwrap();
        capture.give_back(slot, stretch).unwrap();
        println!("{end:?}");
        matches!(end, WindowEnd::Closed(_))
    })
}

#[test]
fn an_interruption_is_said_by_every_agent_until_it_is_written_down_whichever_was_killed_before() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut first = capture("owed", dir.path());
    first.follow(device.disk(), "x").unwrap();
    first.leave();
    std::fs::remove_file("/sys/fs/bpf/reprotect/agent-owed/link_on_queue").unwrap();
    // One that did not get to its disk, one that did not get to writing it down.
    capture("owed", dir.path()).leave();
    for (owed, tell) in [(true, false), (true, true), (false, false)] {
        let mut next = capture("owed", dir.path());
        let (_, known) = next.follow(device.disk(), "x").unwrap();
        let is_said = matches!(known, Continuity::Compare(CompareCause::PinsChanged { .. }));
        assert_eq!(is_said, owed, "{known:?}");
        if tell {
            next.told_interrupted("x");
        }
        if owed {
            next.leave(); // the last one takes everything out of the kernel
        }
    }
}

/// The next one does not know whether the one before lived to say it.
#[test]
fn a_miss_that_was_not_written_down_is_found_again_by_the_next_agent_and_one_that_was_is_not() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut first = capture("untold", dir.path());
    let (slot, _) = first.follow(device.disk(), "x").unwrap();
    assert!(matches!(first.check(slot, PATIENCE).unwrap().verdict, Verdict::Clean { .. }));
    first.lose(Kind::Write, Loss::Both, 1);
    Direct::open(&device.path).write(1 << 20, 1, 16384).unwrap();
    let found = Verdict::Short { sectors: 32 };
    assert_eq!(first.check(slot, PATIENCE).unwrap().verdict, found);
    assert!(matches!(first.check(slot, PATIENCE).unwrap().verdict, Verdict::Clean { .. }), "it is said once");
    first.leave();
    let mut next = capture("untold", dir.path());
    let (slot, known) = next.follow(device.disk(), "x").unwrap();
    assert!(matches!(known, Continuity::Continued { .. }), "{known:?}");
    assert_eq!(next.check(slot, PATIENCE).unwrap().verdict, found);
    next.told(slot);
    next.leave();
    let mut last = capture("untold", dir.path());
    let (slot, _) = last.follow(device.disk(), "x").unwrap();
    assert!(matches!(last.check(slot, PATIENCE).unwrap().verdict, Verdict::Clean { .. }));
}

#[test]
fn an_agent_that_leaves_and_comes_back_knows_what_was_written_and_closes_windows_at_once() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut held = Held::new(dir.path());
    let copy = image(held.path(), &dir.path().join("copy"));
    let mut first = capture("leaves", dir.path());
    let (slot, _) = first.follow(held.slow.device().disk(), "x").unwrap();
    let stretch = first.open_stretch(slot).unwrap().unwrap();
    first.prove_data(slot).unwrap();
    first.record_all(true).unwrap();
    let mut direct = Direct::open(held.path());
    direct.write(8 << 20, 1, 8192).unwrap();
    assert_eq!(first.harvest(slot, stretch).unwrap().sector_count(), 16);
    first.leave();
    direct.write(9 << 20, 2, 16384).unwrap();
    held.write();
    let mut second = capture("leaves", dir.path());
    assert_eq!(second.mode(), reprotect_agent::capture::Mode::Bitmap, "nobody would have read the ring");
    let (slot, continuity) = second.follow(held.slow.device().disk(), "x").unwrap();
    assert!(
        matches!(continuity, Continuity::Continued { dirty_blocks } if dirty_blocks >= 6),
        "{continuity:?}"
    );
    assert!(closes(&mut second, slot), "writes that nobody knows of may be in flight, it thinks");
    held.rest();
    let stretch = second.open_stretch(slot).unwrap().unwrap();
    let found = second.harvest(slot, stretch).unwrap();
    Direct::open(held.path()).copy_ranges(&found, &copy);
    assert_eq!(differences(held.path(), &copy).len(), 0);
    let check = second.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "{check:?}");
}

/// Takes the device away altogether; the kernel then knows nothing of it any more.
fn remove(device: &Loop) {
    run("losetup", &["-d", device.path.to_str().unwrap()]);
    let control = std::fs::File::open("/dev/loop-control").unwrap();
    let number: libc::c_long = device.name().trim_start_matches("loop").parse().unwrap();
    until("the device can be removed", || remove_loop(control.as_raw_fd(), number));
}

#[expect(unsafe_code, reason = "a request that no library makes")]
fn remove_loop(control: i32, number: libc::c_long) -> bool {
    const LOOP_CTL_REMOVE: libc::c_ulong = 0x4c81;
    // SAFETY: the request takes a number and touches no memory of ours.
    unsafe { libc::ioctl(control, LOOP_CTL_REMOVE, number) >= 0 }
}

#[test]
fn a_disk_that_is_gone_holds_up_nothing_of_the_others() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (stays, goes) = (Loop::new(dir.path(), "stays", 16), Loop::new(dir.path(), "goes", 16));
    let mut capture = capture("gone", dir.path());
    let (slot, _) = capture.follow(stays.disk(), "stays").unwrap();
    let (gone, _) = capture.follow(goes.disk(), "goes").unwrap();
    remove(&goes);
    assert!(capture.check(gone, Duration::ZERO).is_err(), "it says so itself");
    // A completion that is lost is explained only by a look at all disks.
    capture.lose(Kind::Write, Loss::Completion, 1);
    Direct::open(&stays.path).write(4096, 1, 4096).unwrap();
    let check = capture.check(slot, PATIENCE).unwrap();
    assert_eq!(check.verdict, Verdict::Clean { explained: 8 });
    assert!(closes(&mut capture, slot));
}

/// Completions that are lost in a burst leave entries that nothing overwrites soon.
#[test]
fn on_a_disk_that_is_never_idle_what_lost_completions_left_behind_is_no_miss() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut held = Held::new(dir.path());
    let mut capture = capture("burst", dir.path());
    let (slot, _) = capture.follow(held.slow.device().disk(), "x").unwrap();
    let clean = capture.check(slot, PATIENCE).unwrap();
    assert!(matches!(clean.verdict, Verdict::Clean { .. }), "{clean:?}");
    held.write();
    let mut undecided = 0;
    for round in 0..4 {
        capture.lose(Kind::Write, Loss::Completion, 40);
        fio(&format!(
            "[burst]\nfilename={}\nrw=randwrite\nbs=4k\niodepth=64\nioengine=libaio\ndirect=1\nthread=1\nnumber_ios=64\noffset=8m\nsize=8m\n",
            held.path().display()
        ))
        .wait();
        until("it is lost", || capture.lost() > round);
        for _ in 0..3 {
            let check = capture.check(slot, Duration::from_millis(5)).unwrap();
            assert!(!matches!(check.verdict, Verdict::Short { .. }), "round {round}: {check:?}");
            undecided += u64::from(check.verdict == Verdict::Undecided);
        }
    }
    println!("undecided in {undecided} of 12 checks; {:?}", capture.counts(slot));
    held.rest();
    let check = capture.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "explained once nothing is in flight: {check:?}");
}

#[test]
fn on_a_disk_that_is_never_idle_lost_completions_are_no_miss_and_a_write_that_nobody_saw_is() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut capture = capture("busy", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    capture.check(slot, PATIENCE).unwrap();
    let load = never_idle(&device.path);
    let mut left = 0;
    for round in 0..12 {
        let lost = capture.lost();
        capture.lose(Kind::Write, Loss::Completion, 7);
        until("it is lost", || capture.lost() > lost);
        let check = capture.check(slot, Duration::from_millis(5)).unwrap();
        assert!(!matches!(check.verdict, Verdict::Short { .. }), "round {round}: {check:?}");
        left += u64::from(check.verdict == Verdict::Undecided);
    }
    println!("undecided in {left} of 12 checks; {:?}", capture.counts(slot));
    let lost = capture.lost();
    let found = (0..40).any(|_| {
        capture.lose(Kind::Write, Loss::Both, 3);
        until("it is lost", || capture.lost() >= lost + 2);
        let check = capture.check(slot, Duration::from_millis(5)).unwrap();
        matches!(check.verdict, Verdict::Short { .. })
    });
    assert!(found, "a write that nobody saw is missing in the account");
    drop(load);
    let check = capture.check(slot, PATIENCE).unwrap();
    println!("{check:?}");
}

#[test]
fn a_disk_that_is_let_go_under_load_holds_up_no_window_of_another() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (busy, mut other) = (Loop::new(dir.path(), "busy", 64), Held::new(dir.path()));
    let mut capture = capture("letgo", dir.path());
    let (slot, _) = capture.follow(other.slow.device().disk(), "other").unwrap();
    let (leaving, _) = capture.follow(busy.disk(), "busy").unwrap();
    // Both were seen quiet.
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    capture.give_back(slot, stretch).unwrap();
    let load = never_idle(&busy.path);
    // The other one is never quiet again, so that nothing can be given up.
    other.write();
    until("it is on its way", || busy.disk().writes_in_flight().unwrap() > 32);
    capture.unfollow(leaving).unwrap();
    assert!(closes(&mut capture, slot), "writes of a disk that nobody follows are waited for");
    drop(load);
    other.rest();
}

#[test]
fn a_full_state_directory_ends_nothing() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=64k", "tmpfs", state.to_str().unwrap()]);
    let _mounted = capture_lab::Mounted { at: state.clone() };
    let device = Loop::new(dir.path(), "disk", 16);
    let mut first = capture("full", &state);
    let (slot, _) = first.follow(device.disk(), "x").unwrap();
    let filled = std::fs::write(state.join("filler"), vec![1; 64 << 10]);
    assert!(filled.is_err(), "the directory is full");
    for loss in [Loss::Completion, Loss::Both] {
        first.lose(Kind::Write, loss, 1);
        Direct::open(&device.path).write(4096, 1, 4096).unwrap();
        let check = first.check(slot, PATIENCE).unwrap();
        let missed = matches!(check.verdict, Verdict::Short { sectors: 8 });
        assert_eq!(missed, loss == Loss::Both, "{check:?}");
    }
    // A disk that cannot be followed now can be later, and one that is let go is not followed by anybody.
    let other = Loop::new(dir.path(), "other", 16);
    let error = first.follow(other.disk(), "y").unwrap_err();
    assert!(error.to_string().contains("state"), "{error}");
    std::fs::remove_file(state.join("filler")).unwrap();
    let (leaving, _) = first.follow(other.disk(), "y").unwrap();
    assert!(std::fs::write(state.join("filler"), vec![1; 64 << 10]).is_err());
    first.unfollow(leaving).unwrap();
    let before = first.counts(leaving);
    Direct::open(&other.path).write(4096, 1, 4096).unwrap();
    assert_eq!(first.counts(leaving), before, "no program looks at it any more");
    first.kill();
    // What was stored once there was room again is what the next process begins with.
    let mut second = capture("full", &state);
    let (slot, continuity) = second.follow(device.disk(), "x").unwrap();
    assert!(matches!(continuity, Continuity::Continued { .. }), "{continuity:?}");
    let check = second.check(slot, PATIENCE).unwrap();
    assert_eq!(check.verdict, Verdict::Short { sectors: 8 }, "nobody wrote it down: {check:?}");
    let check = second.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "told already: {check:?}");
    std::fs::remove_file(state.join("filler")).unwrap();
}

#[test]
fn events_that_the_kernel_left_out_are_told_once() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut capture = capture("skips", dir.path());
    let there = capture.newly_skipped().unwrap();
    capture.skip(3);
    let found = capture.newly_skipped().unwrap();
    assert!(found >= 3, "{there} before, {found} now");
    assert!(capture.newly_skipped().unwrap() < 3);
}
