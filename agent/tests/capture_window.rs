//! `data` and `window` on real loop devices: what is read and what is streamed make the disk of one moment.
//!
//! Called by `cargo test`; needs root, eBPF and fio, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use capture_lab::{
    Captured, Direct, Loop, Mounted, capable, capture, differences, fio_mix, image, machine, seed,
};
use reprotect_agent::capture::{
    Capture, CaptureError, CaptureSettings, DiskSlot, Kind, Loss, Mode, Record, WindowEnd, WindowFailure,
    WindowPlan, WindowSink,
};
use reprotect_engine::range_set::RangeSet;

/// Copies of disks, to which blocks and then records are applied.
#[derive(Default)]
struct Copies {
    disks: HashMap<DiskSlot, (Direct, File)>,
    records: Vec<(DiskSlot, u64, Vec<u8>, u64)>,
}

impl Copies {
    fn add(&mut self, slot: DiskSlot, device: &Path, copy: File) {
        self.disks.insert(slot, (Direct::open(device), copy));
    }

    fn keep(&mut self, record: &Record<'_>) {
        // Discards and zeroes read as zeros on a loop device.
        let data = if record.kind == Some(Kind::Write) { record.data.to_vec() } else { Vec::new() };
        self.records.push((record.slot, record.range.byte_start(), data, record.range.bytes()));
    }

    fn overlay(&mut self) {
        for (slot, at, data, bytes) in self.records.drain(..) {
            let copy = &self.disks[&slot].1;
            if data.is_empty() {
                copy.write_all_at(&vec![0; bytes as usize], at).unwrap();
            } else {
                copy.write_all_at(&data, at).unwrap();
            }
        }
    }
}

impl WindowSink for Copies {
    fn read(&mut self, slot: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
        let (direct, copy) = self.disks.get_mut(&slot).unwrap();
        direct.copy_ranges(sectors, copy);
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
        self.keep(record);
        Ok(())
    }
}

fn assert_same(device: &Path, copy: &File) {
    let different = differences(device, copy);
    assert!(
        different.is_empty(),
        "{} blocks differ: {:?}",
        different.len(),
        &different[..different.len().min(20)]
    );
}

#[test]
fn the_self_test_finds_memory_and_every_write_comes_through_the_ring() {
    comes_through(false);
}

#[test]
fn with_the_programs_for_the_oldest_kernels_every_write_comes_through_as_well() {
    comes_through(true);
}

fn comes_through(plainest: bool) {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let settings = CaptureSettings { plainest, ..CaptureSettings::new("through", dir.path().to_owned()) };
    let mut capture = Captured::start(&settings).unwrap();
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    assert!(matches!(capture.record_all(true), Err(CaptureError::SelfTest { .. })), "not proven");
    let begun = std::time::Instant::now();
    capture.prove_data(slot).unwrap();
    println!("proven in {:?}", begun.elapsed());
    let drops = capture.drops();
    capture.record_all(true).unwrap();
    let mut direct = Direct::open(&device.path);
    for (index, len) in [512, 1024, 4096, 8192, 12288, 65536, 1 << 20].into_iter().enumerate() {
        direct.write(index as u64 * (2 << 20), index as u8 + 1, len).unwrap();
    }
    capture_lab::run("blkdiscard", &["-o", "33554432", "-l", "65536", device.path.to_str().unwrap()]);
    let mut seen = Vec::new();
    let drained = capture
        .drain::<CaptureError>(capture.stream_end(), |record| {
            let fill = record.data.first().copied().unwrap_or(0);
            assert!(record.data.iter().all(|byte| *byte == fill));
            seen.push((record.kind.unwrap(), record.range.byte_start(), record.range.bytes(), fill));
            Ok(())
        })
        .unwrap();
    assert!(drained.complete);
    let mut written: Vec<(Kind, u64, u64, u8)> = Vec::new();
    for (kind, start, bytes, fill) in seen.iter().filter(|(kind, ..)| *kind == Kind::Write).copied() {
        match written.last_mut() {
            // The plain programs make several records of a large write.
            Some(last) if plainest && last.1 + last.2 == start => last.2 += bytes,
            _ => written.push((kind, start, bytes, fill)),
        }
    }
    // The device splits at its own limit after the bio was seen, so each write is one record.
    let expected: Vec<_> = [512, 1024, 4096, 8192, 12288, 65536, 1 << 20]
        .into_iter()
        .enumerate()
        .map(|(index, len)| (Kind::Write, index as u64 * (2 << 20), len as u64, index as u8 + 1))
        .collect();
    assert_eq!(written, expected);
    assert!(seen.contains(&(Kind::Discard, 33_554_432, 65536, 0)), "{seen:?}");
    assert_eq!(drained.drops, drops);
    capture.record_all(false).unwrap();
    assert_eq!(capture.mode(), Mode::Bitmap);
}

/// Replays what a load wrote.
fn replay(file_system: &str) {
    let _turn = machine();
    if !capable() {
        return;
    }
    let (dir, seed) = (tempfile::tempdir().unwrap(), seed());
    let device = Loop::new(dir.path(), "disk", 320);
    let mounted = Mounted::new(dir.path(), &device, file_system);
    // All that the load writes finds place, however late the reader comes on a busy machine.
    let settings = CaptureSettings::new("replay", dir.path().to_owned());
    let mut capture = Captured::start(&CaptureSettings { ring_bytes: 512 << 20, ..settings }).unwrap();
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    capture.prove_data(slot).unwrap();
    // Nothing is in flight yet, so the stream is whole from here.
    capture_lab::run("sync", &[]);
    let drops = capture.drops();
    capture.record_all(true).unwrap();
    let mut copies = Copies::default();
    copies.add(slot, &device.path, image(&device.path, &dir.path().join("copy")));
    let mut load = fio_mix(&mounted.at, seed, 4, "20m");
    let mut records = 0;
    let mut take = |capture: &Capture, copies: &mut Copies| {
        let drained = capture.drain::<CaptureError>(capture.stream_end(), |record| {
            copies.keep(&record);
            records += 1;
            Ok(())
        });
        copies.overlay();
        drained.unwrap()
    };
    while load.is_running() {
        take(&capture, &mut copies);
    }
    load.wait();
    capture_lab::run("fstrim", &[mounted.at.to_str().unwrap()]);
    mounted.unmount();
    let drained = take(&capture, &mut copies);
    println!("{file_system}: {records} records, {:?}, {drained:?}", capture.counts(slot));
    assert!(drained.complete);
    assert_eq!(drained.drops, drops, "{}", capture.unrecorded(drained.drops - drops));
    assert_same(&device.path, &copies.disks[&slot].1);
}

#[test]
fn a_replay_of_the_whole_stream_of_ext4_is_byte_identical() {
    replay("ext4");
}

#[test]
fn a_replay_of_the_whole_stream_of_xfs_is_byte_identical() {
    replay("xfs");
}

fn plan(capture: &mut Capture, slots: &[DiskSlot]) -> WindowPlan {
    let disks = slots.iter().map(|slot| (*slot, capture.open_stretch(*slot).unwrap().unwrap())).collect();
    WindowPlan { patience: Duration::from_secs(20), ..WindowPlan::new(disks) }
}

fn confirm(capture: &mut Capture, plan: &WindowPlan) {
    for (slot, stretch) in &plan.disks {
        capture.confirm(*slot, *stretch).unwrap();
    }
}

/// Windows under fire; each image is a file system that recovers, and the last one, at rest, is the disk.
fn windows(file_system: &str) {
    let _turn = machine();
    if !capable() {
        return;
    }
    let (dir, seed) = (tempfile::tempdir().unwrap(), seed());
    let device = Loop::new(dir.path(), "disk", 320);
    device.queue("scheduler", "mq-deadline");
    let mounted = Mounted::new(dir.path(), &device, file_system);
    let mut capture = capture("windows", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut load = fio_mix(&mounted.at, seed, 6, "20m");
    let copy_path = dir.path().join("copy");
    let mut copies = Copies::default();
    copies.add(slot, &device.path, image(&device.path, &copy_path));
    let (mut closed, mut failed) = (0, 0);
    while load.is_running() {
        let plan = plan(&mut capture, &[slot]);
        let end = capture.window(&plan, &mut copies, &mut ()).unwrap();
        match end {
            WindowEnd::Closed(what) => {
                println!("window: {what:?}");
                copies.overlay();
                closed += 1;
                check_image(&copy_path, &dir.path().join("check"), file_system);
            }
            WindowEnd::Failed(why) => {
                println!("window failed: {why}");
                copies.records.clear();
                failed += 1;
            }
        }
        confirm(&mut capture, &plan);
    }
    load.wait();
    mounted.unmount();
    let plan = plan(&mut capture, &[slot]);
    let end = capture.window(&plan, &mut copies, &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    copies.overlay();
    println!("{file_system}: {closed} windows closed, {failed} failed; {:?}", capture.counts(slot));
    assert!(closed > 0);
    assert_same(&device.path, &copies.disks[&slot].1);
}

/// Recovers the log of a copy of the image, then checks it.
fn check_image(image: &Path, scratch: &Path, file_system: &str) {
    capture_lab::run("cp", &["--sparse=always", image.to_str().unwrap(), scratch.to_str().unwrap()]);
    let scratch_text = scratch.to_str().unwrap();
    if file_system == "ext4" {
        // Replays the log and repairs nothing but what a replay leaves to do; a second run must find nothing.
        capture_lab::run("e2fsck", &["-p", scratch_text]);
        capture_lab::run("e2fsck", &["-fn", scratch_text]);
    } else {
        let at = scratch.with_extension("mnt");
        std::fs::create_dir_all(&at).unwrap();
        capture_lab::run("mount", &["-o", "loop,nouuid", scratch_text, at.to_str().unwrap()]);
        capture_lab::run("umount", &[at.to_str().unwrap()]);
        capture_lab::run("xfs_repair", &["-n", scratch_text]);
    }
}

#[test]
fn images_of_windows_of_ext4_recover_and_the_last_is_the_disk() {
    windows("ext4");
}

#[test]
fn images_of_windows_of_xfs_recover_and_the_last_is_the_disk() {
    windows("xfs");
}

#[test]
fn a_window_that_overflowed_has_failed_and_has_lost_nothing() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let settings =
        CaptureSettings { ring_bytes: 1 << 20, ..CaptureSettings::new("overflow", dir.path().to_owned()) };
    let mut capture = Captured::start(&settings).unwrap();
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut copies = Copies::default();
    copies.add(slot, &device.path, image(&device.path, &dir.path().join("copy")));
    /// Writes more than the ring holds while it is asked to read.
    struct Overflowing<'a>(&'a mut Copies, Direct);
    impl WindowSink for Overflowing<'_> {
        fn read(&mut self, slot: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
            for block in 0..512 {
                self.1.write((1 << 20) + block * 4096, 5, 4096).unwrap();
            }
            self.0.read(slot, sectors)
        }
        fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
            self.0.record(record)
        }
    }
    Direct::open(&device.path).write(0, 1, 4096).unwrap();
    let plan_one = WindowPlan { rounds_max: 0, ..plan(&mut capture, &[slot]) };
    let end = capture
        .window(&plan_one, &mut Overflowing(&mut copies, Direct::open(&device.path)), &mut ())
        .unwrap();
    assert!(matches!(end, WindowEnd::Failed(WindowFailure::Dropped(_))), "{end:?}");
    copies.records.clear();
    assert_eq!(capture.mode(), Mode::Bitmap);
    confirm(&mut capture, &plan_one);
    let plan_two = plan(&mut capture, &[slot]);
    let end = capture.window(&plan_two, &mut copies, &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    copies.overlay();
    assert_same(&device.path, &copies.disks[&slot].1);
}

#[test]
fn a_window_gives_up_on_lost_completions_only_when_the_kernel_has_none_in_flight() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut capture = capture("givesup", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut copies = Copies::default();
    copies.add(slot, &device.path, image(&device.path, &dir.path().join("copy")));
    capture.lose(Kind::Write, Loss::Completion, 1);
    Direct::open(&device.path).write(8192, 1, 4096).unwrap();
    assert_eq!(capture.lost(), 1);
    let patience = Duration::from_millis(200);
    let first = WindowPlan { patience, ..plan(&mut capture, &[slot]) };
    let end = capture.window(&first, &mut copies, &mut ()).unwrap();
    let WindowEnd::Closed(closed) = end else { panic!("{end:?}") };
    assert!(closed.open_for >= patience);
    confirm(&mut capture, &first);
    // The repaired entry explains what the oracle misses.
    let check = capture.check(slot, Duration::from_secs(1)).unwrap();
    assert_eq!(check.verdict, reprotect_agent::capture::Verdict::Clean { explained: 8 });
    // It is never waited for again, however often the counters of its generation are used.
    for number in 0..20 {
        Direct::open(&device.path).write(number * 4096, 2, 4096).unwrap();
        let next = WindowPlan { patience: Duration::from_secs(20), ..plan(&mut capture, &[slot]) };
        let end = capture.window(&next, &mut copies, &mut ()).unwrap();
        let WindowEnd::Closed(closed) = end else { panic!("window {number}: {end:?}") };
        assert!(closed.open_for < next.patience, "window {number} waited for what was given up: {closed:?}");
        confirm(&mut capture, &next);
    }
    copies.overlay();
    assert_same(&device.path, &copies.disks[&slot].1);
}

/// An application writes A, waits until it is on the disk, then writes B: no moment has B without its A. The device holds every
/// write for a while, and other blocks of it are read meanwhile, so that reads overtake writes that are in flight at t0.
#[test]
fn over_a_device_that_holds_its_writes_no_window_has_b_without_a() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let slow = capture_lab::Slow::new(dir.path(), 16, 60);
    let device = slow.device();
    let mut capture = capture("slow", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut copies = Copies::default();
    copies.add(slot, &slow.file, image(&slow.file, &dir.path().join("copy")));
    // While nothing is in flight: later there is always something.
    capture.check(slot, Duration::ZERO).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let lanes = 4_u64;
    std::thread::scope(|scope| {
        for lane in 0..lanes {
            let (stop, path) = (&stop, &device.path);
            scope.spawn(move || {
                let (mut direct, mut number) = (Direct::open(path), 0_u8);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    number = number.wrapping_add(1);
                    // A direct write that returned is on the device.
                    direct.write(lane << 20, number, 4096).unwrap();
                    direct.write((lane << 20) + (64 << 10), number, 4096).unwrap();
                }
            });
        }
        let mut open_for = Vec::new();
        for _ in 0..8 {
            let plan = plan(&mut capture, &[slot]);
            let end = capture.window(&plan, &mut copies, &mut ()).unwrap();
            confirm(&mut capture, &plan);
            let WindowEnd::Closed(closed) = end else { panic!("{end:?}") };
            open_for.push(closed.open_for);
            copies.overlay();
            for lane in 0..lanes {
                let byte = |at: u64| {
                    let mut byte = [0];
                    copies.disks[&slot].1.read_exact_at(&mut byte, at).unwrap();
                    byte[0]
                };
                let (a, b) = (byte(lane << 20), byte((lane << 20) + (64 << 10)));
                assert!(b == a || b.wrapping_add(1) == a, "lane {lane}: A is {a}, B is {b}");
            }
        }
        println!("open for {open_for:?}; {:?}", capture.counts(slot));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_window_fails_while_the_device_holds_an_older_write_and_says_so() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let slow = capture_lab::Slow::new(dir.path(), 16, 3000);
    let mut capture = capture("held", dir.path());
    let (slot, _) = capture.follow(slow.device().disk(), "x").unwrap();
    let mut copies = Copies::default();
    copies.add(slot, &slow.file, image(&slow.file, &dir.path().join("copy")));
    let mut direct = Direct::open(&slow.device().path);
    let writer = std::thread::spawn(move || direct.write(4096, 1, 4096).unwrap());
    capture_lab::until("it is on its way", || capture.counts(slot).submitted > 0);
    // The self-test reads through the device, behind the write.
    capture.prove_data(slot).unwrap();
    writer.join().unwrap();
    let mut direct = Direct::open(&slow.device().path);
    let submitted = capture.counts(slot).submitted;
    let writer = std::thread::spawn(move || direct.write(8192, 2, 4096).unwrap());
    capture_lab::until("it is on its way", || capture.counts(slot).submitted > submitted);
    let hasty = WindowPlan { patience: Duration::from_millis(100), ..plan(&mut capture, &[slot]) };
    /// Reads nothing: here a read would wait for the write.
    struct Blind;
    impl WindowSink for Blind {
        fn read(&mut self, _: DiskSlot, _: &RangeSet) -> Result<(), CaptureError> {
            Ok(())
        }
        fn record(&mut self, _: &Record<'_>) -> Result<(), CaptureError> {
            Ok(())
        }
    }
    let end = capture.window(&hasty, &mut Blind, &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Failed(WindowFailure::NotDrained { writes: 1, .. })), "{end:?}");
    for (slot, stretch) in &hasty.disks {
        capture.give_back(*slot, *stretch).unwrap();
    }
    // With patience the window closes as soon as the write is done.
    let patient = plan(&mut capture, &[slot]);
    let end = capture.window(&patient, &mut copies, &mut ()).unwrap();
    assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    writer.join().unwrap();
    copies.overlay();
    assert_same(&slow.file, &copies.disks[&slot].1);
}

#[test]
fn one_window_closes_two_disks_together() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let devices = [Loop::new(dir.path(), "a", 32), Loop::new(dir.path(), "b", 32)];
    let mut capture = capture("pair", dir.path());
    let mut copies = Copies::default();
    let mut slots = Vec::new();
    for device in &devices {
        let (slot, _) = capture.follow(device.disk(), &device.name()).unwrap();
        copies.add(slot, &device.path, image(&device.path, &dir.path().join(device.name())));
        slots.push(slot);
    }
    // One writer: number n goes to the first disk, then to the second. At every moment the second has the same
    // number or the one before.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut disks = devices.each_ref().map(|device| Direct::open(&device.path));
            let mut number = 0_u8;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                number = number.wrapping_add(1);
                disks[0].write(4096, number, 4096).unwrap();
                disks[1].write(4096, number, 4096).unwrap();
            }
        });
        for _ in 0..10 {
            let plan = plan(&mut capture, &slots);
            let end = capture.window(&plan, &mut copies, &mut ()).unwrap();
            confirm(&mut capture, &plan);
            assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
            copies.overlay();
            let numbers: Vec<u8> = slots
                .iter()
                .map(|slot| {
                    let mut byte = [0];
                    copies.disks[slot].1.read_exact_at(&mut byte, 4096).unwrap();
                    byte[0]
                })
                .collect();
            assert!(
                numbers[1] == numbers[0] || numbers[1].wrapping_add(1) == numbers[0],
                "A without B or B without A: {numbers:?}"
            );
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
