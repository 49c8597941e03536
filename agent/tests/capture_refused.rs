//! Writes that never reach the disk, or are too long to be recorded: the window they fall into fails with its cause, their
//! blocks are read again, and the next one closes.
//!
//! Called by `cargo test`; needs root and eBPF, and says SKIPPED without.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use capture_lab::{Direct, Huge, Loop, Nowait, capable, capture, differences, image, machine};
use reprotect_agent::capture::{
    Capture, CaptureError, DiskSlot, Kind, Record, WindowEnd, WindowFailure, WindowPlan, WindowSink,
};
use reprotect_engine::range_set::RangeSet;

const MIB: u64 = 1 << 20;

/// A copy of a disk, and what is done to the disk while it is read.
struct Copy<'a> {
    direct: Direct,
    copy: &'a File,
    records: Vec<(u64, Vec<u8>)>,
    meanwhile: Box<dyn FnMut() + 'a>,
}

impl<'a> Copy<'a> {
    fn new(read: &Path, copy: &'a File, meanwhile: impl FnMut() + 'a) -> Self {
        Self { direct: Direct::open(read), copy, records: Vec::new(), meanwhile: Box::new(meanwhile) }
    }

    fn overlay(&mut self) {
        for (at, data) in self.records.drain(..) {
            self.copy.write_all_at(&data, at).unwrap();
        }
    }
}

impl WindowSink for Copy<'_> {
    fn read(&mut self, _: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
        (self.meanwhile)();
        self.direct.copy_ranges(sectors, self.copy);
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
        assert_eq!(record.kind, Some(Kind::Write));
        self.records.push((record.range.byte_start(), record.data.to_vec()));
        Ok(())
    }
}

fn window(capture: &mut Capture, slot: DiskSlot, sink: &mut Copy<'_>) -> WindowEnd {
    let stretch = capture.open_stretch(slot).unwrap().unwrap();
    let plan = WindowPlan {
        rounds_max: 0,
        patience: Duration::from_secs(20),
        ..WindowPlan::new(vec![(slot, stretch)])
    };
    let end = capture.window(&plan, sink, &mut ()).unwrap();
    capture.confirm(slot, stretch).unwrap();
    end
}

/// As a database on io_uring writes: without waiting first. Where the queue is full, the kernel refuses such a write after
/// it was submitted.
#[test]
fn writes_that_were_refused_for_want_of_room_are_not_on_the_copy_once_a_window_closed() {
    let _turn = machine();
    if !capable() || !capture_lab::has_slow_devices() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let slow = capture_lab::Slow::new(dir.path(), 32, 60);
    let device = slow.device();
    device.queue("scheduler", "none");
    device.queue("nr_requests", "4");
    let mut capture = capture("refusals", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    capture.prove_data(slot).unwrap();
    let copy = image(&slow.file, &dir.path().join("copy"));
    capture.check(slot, Duration::ZERO).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..8 {
            let (stop, path) = (&stop, &device.path);
            scope.spawn(move || {
                let mut direct = Direct::open(path);
                for number in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    direct.write(lane * MIB, number as u8, 4096).unwrap();
                }
            });
        }
        let mut nowait = Nowait::open(&device.path);
        let refused = || capture_lab::until("a write is refused", || nowait.write(20 * MIB, 0xee).is_err());
        let mut sink = Copy::new(&slow.file, &copy, refused);
        let end = window(&mut capture, slot, &mut sink);
        assert!(matches!(end, WindowEnd::Failed(WindowFailure::FailedWrites(_))), "{end:?}");
        let WindowEnd::Failed(failure) = end else { unreachable!() };
        assert!(failure.may_pass() && failure.to_string().contains("read again"), "{failure}");
        sink.records.clear();
        sink.meanwhile = Box::new(|| ());
        // Others go on writing all the time.
        let end = window(&mut capture, slot, &mut sink);
        assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
        sink.overlay();
        let mut byte = [0];
        let on_disk = Direct::open(&slow.file).read(20 * MIB, 4096)[0];
        copy.read_exact_at(&mut byte, 20 * MIB).unwrap();
        assert_eq!(byte[0], on_disk, "a refused write is not on the disk");
        stop.store(true, Ordering::Relaxed);
    });
    let mut sink = Copy::new(&slow.file, &copy, || ());
    let end = window(&mut capture, slot, &mut sink);
    assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    sink.overlay();
    assert_eq!(differences(&slow.file, &copy), Vec::<u64>::new());
    println!("{:?}", capture.counts(slot));
}

/// Through a window, a write from large pages, and how that ended; where the records began, and their bytes.
fn long_write(mebibytes: u64, from: usize) -> (WindowEnd, Vec<(u64, u64)>) {
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), "disk", 64);
    let mut capture = capture("long", dir.path());
    let (slot, _) = capture.follow(device.disk(), "x").unwrap();
    let copy = image(&device.path, &dir.path().join("copy"));
    Direct::open(&device.path).write(0, 1, 4096).unwrap();
    let length = (mebibytes * MIB) as usize;
    let huge = Huge::new(length + from, |block| (block * 7 + block / 251) as u8 | 1);
    let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(&device.path).unwrap();
    let bytes = &huge.bytes()[from..from + length];
    let mut is_written = false;
    let once = || {
        if !std::mem::replace(&mut is_written, true) {
            file.write_all_at(bytes, 16 * MIB).unwrap();
        }
    };
    let mut sink = Copy::new(&device.path, &copy, once);
    let end = window(&mut capture, slot, &mut sink);
    let records = sink.records.iter().map(|(at, data)| (*at, data.len() as u64)).collect();
    if matches!(end, WindowEnd::Failed(_)) {
        // The next one reads what this one did not have.
        sink.records.clear();
        sink.meanwhile = Box::new(|| ());
        let end = window(&mut capture, slot, &mut sink);
        assert!(matches!(end, WindowEnd::Closed(_)), "{end:?}");
    }
    sink.overlay();
    assert_eq!(differences(&device.path, &copy), Vec::<u64>::new());
    (end, records)
}

#[test]
fn a_write_that_is_longer_than_a_record_has_several() {
    let _turn = machine();
    if !capable() {
        return;
    }
    // The end of a record is the end of a large page, and inside of one.
    for (mebibytes, from) in [(4, 0), (5, 0), (8, 4096), (32, 0), (32, 12288)] {
        let (end, records) = long_write(mebibytes, from);
        assert!(matches!(end, WindowEnd::Closed(_)), "{mebibytes} MiB: {end:?}");
        if records.iter().all(|(_, bytes)| *bytes < 4 * MIB) {
            println!("SKIPPED: this kernel makes no single request of {mebibytes} MiB in large pages");
            continue;
        }
        let expected: Vec<_> =
            (0..mebibytes).step_by(4).map(|at| ((16 + at) * MIB, (mebibytes - at).min(4) * MIB)).collect();
        assert_eq!(records, expected, "{mebibytes} MiB from {from}");
    }
}

#[test]
fn a_write_that_is_longer_than_its_records_may_be_is_named_and_not_called_an_overflow() {
    let _turn = machine();
    if !capable() {
        return;
    }
    match long_write(40, 0) {
        (WindowEnd::Closed(_), records) if records.len() > 10 => {
            println!("SKIPPED: this kernel makes no single request of 40 MiB in large pages");
        }
        (end, _) => assert!(matches!(end, WindowEnd::Failed(WindowFailure::TooLong(1))), "{end:?}"),
    }
}
