//! Capture in each of its modes around a measurement, with what the agent does meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reprotect_agent::capture::{
    self, BlockDisk, Capture, CaptureError, CaptureSettings, DiskSlot, GROUP_BYTES_MAX, Record, WindowEnd,
    WindowPlan, WindowSink, groups, spans,
};
use reprotect_engine::io::buffer::PoolBuf;
use reprotect_engine::io::{self, BlockFile, ReadAt};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{SECTOR_BYTES, SectorRange};

/// How often the ring is read.
const DRAIN_EVERY: Duration = Duration::from_millis(5);

/// A load that wrote so often has begun.
const LOAD_BEGUN: u64 = 50;

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

/// Reads what a window asks for, as the agent does, copies it, and drops it.
struct Reading {
    file: Box<dyn BlockFile>,
    buffer: PoolBuf,
}

impl WindowSink for Reading {
    fn read(&mut self, _: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError> {
        for group in groups(&spans(sectors.iter())) {
            let mut rest: &mut [u8] = &mut self.buffer;
            let mut reads: Vec<ReadAt<'_>> = Vec::new();
            for span in group {
                let (place, behind) = std::mem::take(&mut rest).split_at_mut(span.room_bytes() as usize);
                rest = behind;
                let data = &mut place[..span.whole.bytes() as usize];
                reads.push(ReadAt { offset: span.whole.byte_start(), data });
            }
            self.file.read(&mut reads).expect("memory can be read");
            for (span, read) in group.iter().zip(&reads) {
                for part in &span.parts {
                    let at = ((part.start - span.whole.start) * SECTOR_BYTES) as usize;
                    std::hint::black_box(read.data[at..at + part.bytes() as usize].to_vec());
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError> {
        std::hint::black_box(record.data.to_vec());
        Ok(())
    }
}

/// The usual settings, but for the size of the ring where `RING_MIB` says so.
pub(crate) fn settings(name: &str, dir: &Path) -> CaptureSettings {
    let usual = CaptureSettings::new(name, dir.to_owned());
    let mib = std::env::var("RING_MIB").ok().and_then(|text| text.parse::<u32>().ok());
    CaptureSettings { ring_bytes: mib.map_or(usual.ring_bytes, |mib| mib << 20), ..usual }
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
    let buffer = PoolBuf::alone(GROUP_BYTES_MAX as usize).expect("memory");
    let mut reading = Reading { file, buffer };
    let end = capture.window(&WindowPlan::new(vec![(slot, stretch)]), &mut reading, &mut ());
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

/// With a window in the measurement, over a map in which all is marked.
fn windowed<T>(capture: &mut Capture, slot: DiskSlot, device: &Path, measure: impl FnOnce() -> T) -> T {
    let size = BlockDisk::at(device).expect("a disk that can be followed").size;
    let before = capture.counts(slot).submitted;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let windows = scope.spawn(|| {
            // As soon as the load has begun.
            while capture.counts(slot).submitted < before + LOAD_BEGUN && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(DRAIN_EVERY);
            }
            capture.mark(slot, SectorRange::new(0, size.0)).expect("it is followed");
            (window(capture, slot, device), stop.load(Ordering::Relaxed))
        });
        let result = measure();
        stop.store(true, Ordering::Relaxed);
        let (closed, outlasted) = windows.join().expect("the window's thread ends");
        if !closed {
            println!("  a window found no moment");
        }
        if outlasted {
            println!("  a window outlasted its run");
        }
        result
    })
}

/// Measures with capture in a mode.
pub(crate) fn with_capture<T>(dir: &Path, device: &Path, mode: Mode, measure: impl FnOnce() -> T) -> T {
    let mut capture = Capture::start(&settings("bench", dir)).expect("live capture works");
    let slot = follow(&mut capture, device);
    if mode != Mode::Bitmap {
        // Once in a process's life.
        capture.prove_data(slot).expect("data capture is proven");
    }
    let result = match mode {
        Mode::Window => windowed(&mut capture, slot, device, measure),
        Mode::Bitmap | Mode::Data => drained(&mut capture, slot, mode, measure),
    };
    let counts = capture.counts(slot);
    if counts.unrecorded > 0 {
        println!("  {} of {} writes not recorded", counts.unrecorded, counts.unrecorded + counts.records);
    }
    drop(capture);
    capture::let_go("bench").expect("capture ends in order");
    result
}
