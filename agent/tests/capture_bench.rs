//! What capture costs: nanoseconds per event as the kernel counts them, and fio with and without capture in turns.
//!
//! Called by `make bench-capture` (ignored otherwise): `PAIRS` pairs of runs of `SECONDS` each on a loop device over memory.
//! Pairs alternate which comes first; the mean of the ratios is printed with its 95 % interval.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod capture_lab;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use capture_lab::{Loop, Mounted, capable, machine};
use reprotect_agent::capture::{Capture, CaptureError, CaptureSettings, Measuring};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A disk over memory, the hardest case: nothing else takes time.
fn memory_disk(dir: &Path) -> (Mounted, Loop) {
    let at = dir.join("memory");
    std::fs::create_dir_all(&at).unwrap();
    capture_lab::run("mount", &["-t", "tmpfs", "-o", "size=1g", "tmpfs", at.to_str().unwrap()]);
    let mounted = Mounted { at: at.clone() };
    // The device is dropped first.
    let device = Loop::new(&at, "disk", 512);
    (mounted, device)
}

/// IOPS and the 99th percentile in microseconds of one run.
fn run(device: &Path, arguments: &[&str], seconds: u64) -> (f64, f64) {
    let (path, runtime) = (device.display().to_string(), format!("--runtime={seconds}"));
    let filename = format!("--filename={path}");
    let output = Command::new("fio")
        .args(["--name=x", &filename, "--direct=1", "--ioengine=libaio", "--time_based=1", &runtime])
        .args(["--norandommap=1", "--output-format=json", "--size=512m"])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let write = &result["jobs"][0]["write"];
    let p99 = write["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1000.0;
    (write["iops"].as_f64().unwrap(), p99)
}

/// With capture in a mode; data are drained and dropped by a thread, as a reader that keeps up would.
fn with_capture(dir: &Path, device: &Loop, data: bool, measure: impl FnOnce() -> (f64, f64)) -> (f64, f64) {
    let settings = CaptureSettings::new("bench", dir.to_owned());
    let mut capture = Capture::start(&settings).unwrap();
    let (slot, _) = capture.follow(device.disk(), "bench").unwrap();
    if data {
        capture.prove_data(slot).unwrap();
        capture.record_all(true).unwrap();
    }
    let stop = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                capture
                    .drain::<CaptureError>(capture.stream_end(), |record| {
                        bytes += record.data.iter().step_by(64).map(|byte| u64::from(*byte)).sum::<u64>();
                        Ok(())
                    })
                    .unwrap();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            std::hint::black_box(bytes);
        });
        let result = measure();
        stop.store(true, Ordering::Relaxed);
        result
    });
    let counts = capture.counts(slot);
    if counts.unrecorded > 0 {
        println!("  {} of {} not recorded", counts.unrecorded, counts.unrecorded + counts.records);
    }
    capture.stop().unwrap();
    result
}

/// Mean and half the width of its 95 % interval.
fn interval(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    (mean, 1.96 * (variance / count).sqrt())
}

const LOADS: [(&str, &[&str]); 3] = [
    ("4 KiB, depth 1", &["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    ("4 KiB, depth 32", &["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    ("1 MiB sequential", &["--rw=write", "--bs=1m", "--iodepth=4"]),
];

#[test]
#[ignore = "a measurement: make bench-capture"]
fn pairs_against_no_agent() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let (pairs, seconds) = (number("PAIRS", 30), number("SECONDS", 3));
    let dir = tempfile::tempdir().unwrap();
    let (_mounted, device) = memory_disk(dir.path());
    for (name, arguments) in LOADS {
        for (mode, data) in [("bitmap", false), ("data", true)] {
            let (mut iops, mut p99) = (Vec::new(), Vec::new());
            for pair in 0..pairs {
                let bare = || run(&device.path, arguments, seconds);
                let captured =
                    || with_capture(dir.path(), &device, data, || run(&device.path, arguments, seconds));
                let (bare, captured) = if pair % 2 == 0 {
                    let first = bare();
                    (first, captured())
                } else {
                    let first = captured();
                    (bare(), first)
                };
                iops.push(captured.0 / bare.0);
                p99.push(captured.1 / bare.1);
            }
            let ((iops, iops_half), (p99, p99_half)) = (interval(&iops), interval(&p99));
            println!(
                "{name}, {mode}: IOPS {:.1} % ± {:.1} of bare, p99 {:.1} % ± {:.1}; {pairs} pairs of {seconds} s",
                iops * 100.0,
                iops_half * 100.0,
                p99 * 100.0,
                p99_half * 100.0
            );
        }
    }
}

#[test]
#[ignore = "a measurement: make bench-capture"]
fn nanoseconds_per_event() {
    let _turn = machine();
    if !capable() {
        return;
    }
    let seconds = number("SECONDS", 3);
    let dir = tempfile::tempdir().unwrap();
    let (_mounted, device) = memory_disk(dir.path());
    let _measuring = Measuring::begin().unwrap();
    for (name, arguments) in LOADS {
        for (mode, data) in [("bitmap", false), ("data", true)] {
            let settings = CaptureSettings::new("bench-events", dir.path().to_owned());
            let mut capture = Capture::start(&settings).unwrap();
            let (slot, _) = capture.follow(device.disk(), "bench").unwrap();
            if data {
                capture.prove_data(slot).unwrap();
                capture.record_all(true).unwrap();
            }
            let before = capture.costs().unwrap();
            let stop = AtomicBool::new(false);
            let (iops, _) = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        capture.drain::<CaptureError>(capture.stream_end(), |_| Ok(())).unwrap();
                        std::thread::sleep(std::time::Duration::from_millis(2));
                    }
                });
                let result = run(&device.path, arguments, seconds);
                stop.store(true, Ordering::Relaxed);
                result
            });
            let mut line = format!("{name}, {mode}: {iops:.0} IOPS");
            for (before, after) in before.iter().zip(capture.costs().unwrap()) {
                let runs = after.runs - before.runs;
                if runs > 0 {
                    let mean = (after.run_ns - before.run_ns) as f64 / runs as f64;
                    line += &format!(
                        "; {} {mean:.0} ns × {runs}, skipped {}",
                        after.name,
                        after.skipped - before.skipped
                    );
                }
            }
            println!("{line}; {:?}", capture.counts(slot));
            capture.stop().unwrap();
        }
    }
}
