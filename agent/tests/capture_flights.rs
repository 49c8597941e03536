//! The table of writes in flight when it is small: what stands in the set beside its own is found again, what finds no place
//! is counted, fails the window, and loses nothing.
//!
//! Called by `cargo test`; needs root, eBPF and fio, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::path::Path;

use capture_lab::{
    Direct, Loop, Nothing, PATIENCE, Running, capable, differences, fio, image, machine, seed,
};
use reprotect_agent::capture::{
    Capture, CaptureSettings, DiskSlot, Verdict, WindowEnd, WindowFailure, WindowPlan, let_go,
};

/// Places in the table: two sets of eight, which are beside each other.
const PLACES: u32 = 16;

fn small(name: &str, dir: &Path, plainest: bool) -> Capture {
    let usual = CaptureSettings::new(name, dir.to_owned());
    Capture::start(&CaptureSettings { flights_max: PLACES, plainest, ..usual }).unwrap()
}

/// Random writes, so many of them in flight, submitted all at once.
fn load(device: &Path, depth: u32, seed: u64, seconds: u64) -> Running {
    fio(&format!(
        "[load]\nfilename={}\ntime_based=1\nruntime={seconds}\nrandseed={seed}\ndirect=1\nioengine=libaio\niodepth={depth}\n\
         iodepth_batch_submit={depth}\niodepth_batch_complete_min={depth}\nrw=randwrite\nbs=4k\nnorandommap=1\nrandrepeat=0\n",
        device.display()
    ))
}

fn window(capture: &mut Capture, slot: DiskSlot) -> WindowEnd {
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let end = capture.window(&WindowPlan::new(vec![(slot, stretch)]), &mut Nothing, &mut ()).unwrap();
    capture.give_back(slot, stretch).unwrap();
    end
}

/// What was not harvested is marked, whatever became of the table.
fn assert_found(capture: &mut Capture, slot: DiskSlot, device: &Path, copy: &std::fs::File) {
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let found = capture.harvest(slot, stretch).unwrap();
    Direct::open(device).copy_ranges(&found, copy);
    capture.confirm(slot, stretch).unwrap();
    assert_eq!(differences(device, copy), Vec::<u64>::new());
}

#[test]
fn as_many_writes_as_there_are_places_find_one_whatever_their_addresses() {
    let _turn = machine();
    if !capable() {
        return;
    }
    for plainest in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let device = Loop::new(dir.path(), "disk", 64);
        let copy = image(&device.path, &dir.path().join("copy"));
        let mut capture = small("spilling", dir.path(), plainest);
        let (slot, _) = capture.follow(device.disk(), "x").unwrap();
        // Some places are left for writes whose completions a kernel loses.
        load(&device.path, PLACES - 3, seed(), 3).wait();
        let check = capture.check(slot, PATIENCE).unwrap();
        assert!(matches!(check.verdict, Verdict::Clean { .. }), "{check:?}");
        let counts = capture.counts(slot);
        println!("{counts:?}");
        assert!(counts.completed > 1000, "{counts:?}");
        assert_eq!((counts.full, counts.orphans), (0, 0), "{counts:?}");
        let end = window(&mut capture, slot);
        assert!(matches!(end, WindowEnd::Closed(_)), "nothing is left in flight: {end:?}");
        assert_found(&mut capture, slot, &device.path, &copy);
        drop(capture);
        let_go("spilling").unwrap();
    }
}

#[test]
fn a_write_that_finds_no_place_fails_the_window_and_is_marked() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let copy = image(&device.path, &dir.path().join("copy"));
    let mut capture = small("full", dir.path(), false);
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let mut refused = false;
    // On a busy machine the load may be over before a window was, or one fails for something else first.
    for turn in 0..8 {
        let mut busy = load(&device.path, 8 * PLACES, seed() + turn, 4);
        while busy.is_running() && !refused {
            let full = capture.counts(slot).full;
            let end = window(&mut capture, slot);
            refused |= matches!(end, WindowEnd::Failed(WindowFailure::TooMany(_)));
            // At its beginning or its end the load stands still.
            println!("{end:?}, {full} without a place before");
        }
        busy.wait();
        if refused {
            break;
        }
    }
    let counts = capture.counts(slot);
    println!("{counts:?}");
    assert!(refused && counts.full > 0, "{counts:?}");
    // A completion that the kernel loses, of a write without a place, leaves nothing behind that explains it: it is called a miss.
    let check = capture.check(slot, PATIENCE).unwrap();
    assert!(matches!(check.verdict, Verdict::Clean { .. } | Verdict::Short { .. }), "{check:?}");
    let end = window(&mut capture, slot);
    assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    assert_found(&mut capture, slot, &device.path, &copy);
    drop(capture);
    let_go("full").unwrap();
}
