//! `bitmap` on real loop devices: what is harvested while the disk is under fire makes a byte-identical copy.
//!
//! Called by `cargo test`; needs root, eBPF and fio, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use capture_lab::{
    Captured, Direct, Loop, Mounted, PATIENCE, capable, capture, differences, fio_mix, fio_raw, image,
};
use capture_lab::{machine, seed};
use reprotect_agent::capture::{
    BlockDisk, Capture, CaptureError, CaptureSettings, CompareCause, Continuity, DiskSlot, Verdict,
};

/// Harvests once into the copy; answers the blocks.
fn harvest(capture: &mut Capture, slot: DiskSlot, direct: &mut Direct, copy: &File) -> u64 {
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found = capture.harvest(slot, stretch).unwrap();
    direct.copy_ranges(&found, copy);
    capture.confirm(slot, stretch).unwrap();
    found.sector_count() / 8
}

fn follow(capture: &mut Capture, device: &Loop) -> (DiskSlot, Continuity) {
    capture.follow(device.disk(), &device.name()).unwrap()
}

/// Everything that completed is in the copy or marked: harvest until nothing comes, compare.
fn assert_equal(capture: &mut Capture, slot: DiskSlot, device: &Path, copy: &File) {
    let mut direct = Direct::open(device);
    let check = capture.check(slot, PATIENCE).unwrap();
    println!("oracle: {check:?}; {:?}; {:?}", capture.counts(slot), capture.costs().unwrap());
    assert!(matches!(check.verdict, Verdict::Clean { .. }), "{check:?}");
    while harvest(capture, slot, &mut direct, copy) > 0 {}
    let different = differences(device, copy);
    assert!(
        different.is_empty(),
        "{} blocks differ: {:?}",
        different.len(),
        &different[..different.len().min(20)]
    );
}

fn under_fire(file_system: &str, scheduler: &str) {
    let _turn = machine();
    if !capable() {
        return;
    }
    let (dir, seed) = (tempfile::tempdir().unwrap(), seed());
    let device = Loop::new(dir.path(), "disk", if file_system == "xfs" { 320 } else { 160 });
    device.queue("scheduler", scheduler);
    let mounted = Mounted::new(dir.path(), &device, file_system);
    let mut capture = capture(&format!("fire-{file_system}-{scheduler}"), dir.path());
    let (slot, continuity) = follow(&mut capture, &device);
    assert_eq!(continuity, Continuity::Compare(CompareCause::FirstTime));
    // The copy begins while the load runs: tracked before it is read.
    let mut load = fio_mix(&mounted.at, seed, 4, "0");
    let copy = image(&device.path, &dir.path().join("copy"));
    let (mut direct, mut rounds, mut blocks) = (Direct::open(&device.path), 0, 0);
    while load.is_running() {
        blocks += harvest(&mut capture, slot, &mut direct, &copy);
        rounds += 1;
    }
    load.wait();
    capture_lab::run("fstrim", &[mounted.at.to_str().unwrap()]);
    mounted.unmount();
    println!("{file_system} {scheduler}: {rounds} harvests, {blocks} blocks");
    assert!(rounds > 1 && blocks > 0);
    assert_equal(&mut capture, slot, &device.path, &copy);
}

#[test]
fn a_copy_of_ext4_without_scheduler_is_identical_after_continuous_harvest() {
    under_fire("ext4", "none");
}

#[test]
fn a_copy_of_ext4_with_deadlines_is_identical_after_continuous_harvest() {
    under_fire("ext4", "mq-deadline");
}

#[test]
fn a_copy_of_xfs_without_scheduler_is_identical_after_continuous_harvest() {
    under_fire("xfs", "none");
}

#[test]
fn a_copy_of_xfs_with_deadlines_is_identical_after_continuous_harvest() {
    under_fire("xfs", "mq-deadline");
}

#[test]
fn overlapping_direct_writes_and_discards_of_the_bare_device_are_all_found() {
    let _turn = machine();
    if !capable() {
        return;
    }
    for (scheduler, plainest) in [("none", false), ("mq-deadline", false), ("mq-deadline", true)] {
        let (dir, seed) = (tempfile::tempdir().unwrap(), seed());
        let device = Loop::new(dir.path(), "disk", 96);
        device.queue("scheduler", scheduler);
        let settings = CaptureSettings { plainest, ..CaptureSettings::new("raw", dir.path().to_owned()) };
        let mut capture = Captured::start(&settings).unwrap();
        let (slot, _) = follow(&mut capture, &device);
        let mut load = fio_raw(&device.path, seed, 4, true);
        let copy = image(&device.path, &dir.path().join("copy"));
        let mut direct = Direct::open(&device.path);
        while load.is_running() {
            harvest(&mut capture, slot, &mut direct, &copy);
        }
        load.wait();
        assert_equal(&mut capture, slot, &device.path, &copy);
    }
}

#[test]
fn what_was_harvested_and_not_confirmed_is_harvested_again_after_the_process_is_gone() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut first = capture("gone", dir.path());
    let (slot, _) = follow(&mut first, &device);
    let mut direct = Direct::open(&device.path);
    let copy = image(&device.path, &dir.path().join("copy"));
    direct.write(8192, 1, 4096).unwrap();
    let stretch = first.open_stretch(slot).unwrap().unwrap();
    assert_eq!(first.harvest(slot, stretch).unwrap().sector_count(), 8);
    direct.write(1 << 20, 2, 65536).unwrap();
    // Nothing is closed in order but by the kernel.
    first.kill();
    direct.write(2 << 20, 3, 4096).unwrap();
    let mut second = capture("gone", dir.path());
    let (slot, continuity) = follow(&mut second, &device);
    assert_eq!(continuity, Continuity::Continued { dirty_blocks: 1 + 16 + 1 });
    assert_equal(&mut second, slot, &device.path, &copy);
}

#[test]
fn two_agents_never_follow_one_disk_and_never_share_their_pins() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let device = Loop::new(dir.path(), "disk", 16);
    let mut first = capture("one", dir.path());
    follow(&mut first, &device);
    let error = Capture::start(&CaptureSettings::new("one", other_dir.path().to_owned())).unwrap_err();
    assert!(matches!(error, CaptureError::InUse { .. }), "{error}");
    let mut second = capture("two", other_dir.path());
    let error = second.follow(device.disk(), "x").unwrap_err();
    assert!(matches!(&error, CaptureError::InUse { what, .. } if *what == device.name()), "{error}");
    drop(first);
    second.follow(device.disk(), "x").unwrap();
}

#[test]
fn a_disk_that_grew_is_followed_whole_and_its_new_part_is_dirty() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 16);
    let mut capture = capture("grow", dir.path());
    let (slot, _) = follow(&mut capture, &device);
    Direct::open(&device.path).write(0, 7, 4096).unwrap();
    device.grow(48);
    // Before the growth is noticed: beyond the old map.
    Direct::open(&device.path).write(40 << 20, 7, 4096).unwrap();
    assert_eq!(capture.check_size(slot).unwrap().0, (48 << 20) / 512);
    assert_eq!(capture.dirty_blocks(slot).unwrap(), 1 + (32 << 20) / 4096);
    let copy = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.path().join("copy"))
        .unwrap();
    copy.set_len(48 << 20).unwrap();
    Direct::open(&device.path).write(47 << 20, 9, 8192).unwrap();
    assert_equal(&mut capture, slot, &device.path, &copy);
}

#[test]
fn devices_that_cannot_be_followed_are_refused_with_the_reason() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 16);
    device.queue("iostats", "0");
    let error = BlockDisk::at(&device.path).unwrap_err();
    assert!(matches!(error, CaptureError::NotCounting { .. }), "{error}");
    device.queue("iostats", "1");
    let disk = device.disk();
    let mut capture = capture("refused", dir.path());
    let (slot, _) = capture.follow(disk, "x").unwrap();
    device.queue("iostats", "0");
    let error = capture.check(slot, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("iostats"), "{error}");
    device.queue("iostats", "1");
    capture_lab::run("blockdev", &["--setro", device.path.to_str().unwrap()]);
    let error = BlockDisk::at(&device.path).unwrap_err().to_string();
    capture_lab::run("blockdev", &["--setrw", device.path.to_str().unwrap()]);
    assert!(error.contains("read-only"), "{error}");
}
