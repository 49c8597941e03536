//! Capture in each of its modes around a measurement, with what the agent does meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reprotect_agent::capture::{
    BlockDisk, Capture, CaptureError, CaptureSettings, DiskSlot, Record, WindowEnd, WindowPlan, WindowSink,
};
use reprotect_engine::io::{self, BlockFile, ReadAt};
use reprotect_engine::range_set::RangeSet;

/// Longest read of a window.
const READ_SECTORS: u64 = 2048;
/// How often the ring is read.
const DRAIN_EVERY: Duration = Duration::from_millis(5);

/// How changes are found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Bitmap,
    Window,
    Data,
}

/// All of them, by name.
pub(crate) const MODES: [(&str, Mode); 3] =
    [("bitmap", Mode::Bitmap), ("window", Mode::Window), ("data", Mode::Data)];

/// Reads what a window asks for, as the agent does, and drops it.
struct Reading(Box<dyn BlockFile>);

impl WindowSink for Reading {
    fn read(&mut self, _: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
        let pieces: Vec<_> = sectors.iter().flat_map(|range| range.aligned_pieces(READ_SECTORS)).collect();
        for pieces in pieces.chunks(64) {
            let mut data: Vec<Vec<u8>> = pieces.iter().map(|piece| vec![0; piece.bytes() as usize]).collect();
            let mut reads: Vec<ReadAt<'_>> = pieces
                .iter()
                .zip(&mut data)
                .map(|(piece, data)| ReadAt { offset: piece.byte_start(), data })
                .collect();
            self.0.read(&mut reads).expect("memory can be read");
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
        std::hint::black_box(record.data.to_vec());
        Ok(())
    }
}

/// Follows the device.
pub(crate) fn follow(capture: &mut Capture, device: &Path) -> DiskSlot {
    let disk = BlockDisk::at(device).expect("a disk that can be followed");
    capture.follow(disk, "bench").expect("it is followed").0
}

/// One closing window; answers whether it closed.
fn window(capture: &mut Capture, slot: DiskSlot, device: &Path) -> bool {
    let (file, _) = io::open_reporting(device, &io::OpenOptions::reading()).expect("the device opens");
    let stretch = capture.open_stretch(slot).expect("the maps answer").expect("a free stretch");
    let end = capture.window(&WindowPlan::new(vec![(slot, stretch)]), &mut Reading(file), &mut ());
    capture.confirm(slot, stretch).expect("the maps answer");
    matches!(end, Ok(WindowEnd::Closed(_)))
}

/// Measures with a thread that does what the agent would.
pub(crate) fn drained<T>(
    capture: &mut Capture,
    slot: DiskSlot,
    mode: Mode,
    measure: impl FnOnce() -> T,
) -> T {
    if mode == Mode::Data {
        capture.prove_data(slot).expect("data capture is proven");
        capture.record_all(true).expect("it can be switched on");
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let drain = capture.drain::<CaptureError>(capture.stream_end(), |record| {
                    std::hint::black_box(record.data.to_vec());
                    Ok(())
                });
                drain.expect("the ring can be read");
                std::thread::sleep(DRAIN_EVERY);
            }
        });
        let result = measure();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// With a window in the middle of the measurement.
fn windowed<T>(capture: &mut Capture, slot: DiskSlot, device: &Path, measure: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let windows = scope.spawn(|| {
            let begun = Instant::now();
            // Once per measurement, which lasts as long as the interval between two windows.
            while begun.elapsed() < Duration::from_secs(2) && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(DRAIN_EVERY);
            }
            window(capture, slot, device)
        });
        let result = measure();
        stop.store(true, Ordering::Relaxed);
        if !windows.join().expect("the window's thread ends") {
            println!("  a window found no moment");
        }
        result
    })
}

/// Measures with capture in a mode.
pub(crate) fn with_capture<T>(dir: &Path, device: &Path, mode: Mode, measure: impl FnOnce() -> T) -> T {
    let mut capture =
        Capture::start(&CaptureSettings::new("bench", dir.to_owned())).expect("live capture works");
    let slot = follow(&mut capture, device);
    let result = match mode {
        Mode::Window => windowed(&mut capture, slot, device, measure),
        Mode::Bitmap | Mode::Data => drained(&mut capture, slot, mode, measure),
    };
    let counts = capture.counts(slot);
    if counts.unrecorded > 0 {
        println!("  {} of {} writes not recorded", counts.unrecorded, counts.unrecorded + counts.records);
    }
    capture.stop().expect("capture ends in order");
    result
}
