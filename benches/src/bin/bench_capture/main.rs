//! What live capture costs the machine that is protected: IOPS and latency of fio with and without it in turns, and
//! nanoseconds per event as the kernel counts them.
//!
//! Pairs alternate which comes first, because two runs of the same thing differ by 10 to 20 per cent here; the mean of the
//! ratios is printed with its 95 % interval. Modes: `bitmap`; `window`, which is bitmap and a closing window every
//! `INTERVAL` seconds that reads the changed blocks, as the agent does; `data`, whose ring is drained by the same cores.
//! Called by `make bench-capture` as root. Environment: PAIRS (30), SECONDS (3), INTERVAL (10), RING_MIB (the agent's
//! size), LOADS, MODES (comma lists).

mod disk;
mod modes;

use std::path::Path;
use std::process::{Command, ExitCode};

use disk::MemoryDisk;
use modes::{MODES, Mode, with_capture};
use reprotect_agent::capture::{self, Capture, CaptureSettings, Measuring};

/// A load of fio, with the share of bare IOPS that is wanted in each mode.
struct Load {
    name: &'static str,
    arguments: &'static [&'static str],
    goal: fn(Mode) -> Option<f64>,
}

const LOADS: [Load; 4] = [
    Load { name: "4k-1", arguments: &["--rw=randwrite", "--bs=4k", "--iodepth=1"], goal: |_| None },
    Load {
        name: "4k-32",
        arguments: &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
        goal: |mode| match mode {
            Mode::Bitmap => None,
            Mode::Window => Some(0.95),
            Mode::Data => Some(0.80),
        },
    },
    Load { name: "1m", arguments: &["--rw=write", "--bs=1m", "--iodepth=4"], goal: |_| None },
    Load {
        name: "buffered",
        arguments: &["--rw=randwrite", "--bs=16k", "--direct=0", "--ioengine=psync", "--fsync=32"],
        goal: |_| None,
    },
];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn wanted(name: &str, one: &str) -> bool {
    std::env::var(name)
        .ok()
        .filter(|list| !list.is_empty())
        .is_none_or(|list| list.split(',').any(|word| word == one))
}

/// IOPS and the 99th percentile in microseconds of one run.
fn fio(device: &Path, arguments: &[&str], seconds: u64) -> (f64, f64) {
    let (filename, runtime) = (format!("--filename={}", device.display()), format!("--runtime={seconds}"));
    let output = Command::new("fio")
        .args(["--name=x", &filename, "--direct=1", "--ioengine=libaio", "--time_based=1", &runtime])
        .args(["--norandommap=1", "--output-format=json", "--size=512m"])
        .args(arguments)
        .output()
        .expect("fio is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("fio writes JSON");
    let write = &result["jobs"][0]["write"];
    let p99 = write["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1000.0;
    (write["iops"].as_f64().unwrap_or(0.0), p99)
}

/// Mean and half the width of its 95 % interval.
fn interval(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    (mean, 1.96 * (variance / count).sqrt())
}

fn pairs(dir: &Path, disk: &MemoryDisk) {
    let (pairs, seconds) = (number("PAIRS", 30), number("SECONDS", 3));
    for load in LOADS.iter().filter(|load| wanted("LOADS", load.name)) {
        for (name, mode) in MODES.into_iter().filter(|(name, _)| wanted("MODES", name)) {
            let (mut iops, mut p99) = (Vec::new(), Vec::new());
            // A window's duty must be what it is in service.
            let seconds = if mode == Mode::Window { seconds.max(number("INTERVAL", 10)) } else { seconds };
            for pair in 0..pairs {
                let bare = || fio(&disk.path, load.arguments, seconds);
                let captured =
                    || with_capture(dir, &disk.path, mode, || fio(&disk.path, load.arguments, seconds));
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
            let goal = (load.goal)(mode).map_or(String::new(), |goal| {
                format!("  goal >= {:.0} %: {}", goal * 100.0, if iops >= goal { "met" } else { "MISSED" })
            });
            println!(
                "{:9} {name:7} IOPS {:5.1} % ± {:.1} of bare, p99 {:5.1} % ± {:.1}; {pairs} pairs of {seconds} s{goal}",
                load.name,
                iops * 100.0,
                iops_half * 100.0,
                p99 * 100.0,
                p99_half * 100.0
            );
        }
    }
}

/// Nanoseconds of each program per event, and of all of them per write.
fn events(dir: &Path, disk: &MemoryDisk) {
    let seconds = number("SECONDS", 3);
    let _measuring = Measuring::begin().expect("the kernel measures programs");
    for load in LOADS.iter().filter(|load| wanted("LOADS", load.name) && load.name != "buffered") {
        for (name, mode) in [("bitmap", Mode::Bitmap), ("data", Mode::Data)] {
            let mut capture =
                Capture::start(&modes::settings("bench-events", dir)).expect("live capture works here");
            let slot = modes::follow(&mut capture, &disk.path);
            let before = capture.costs().expect("the kernel tells");
            let (iops, _) =
                modes::drained(&mut capture, slot, mode, || fio(&disk.path, load.arguments, seconds));
            let (mut line, mut nanos, mut submitted) = (String::new(), 0, 1);
            for (before, after) in before.iter().zip(capture.costs().expect("the kernel tells")) {
                let runs = after.runs - before.runs;
                if runs > 0 {
                    let spent = after.run_ns - before.run_ns;
                    nanos += spent;
                    submitted = submitted.max(runs);
                    line += &format!("; {} {:.0} ns", after.name, spent as f64 / runs as f64);
                }
            }
            println!(
                "{:9} {name:7} {:.2} us of the kernel's time per write at {iops:.0} IOPS{line}",
                load.name,
                nanos as f64 / submitted as f64 / 1000.0
            );
            drop(capture);
            capture::let_go("bench-events").expect("capture ends in order");
        }
    }
}

fn main() -> ExitCode {
    let dir = std::env::temp_dir().join(format!("bench-capture-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder to measure in");
    if let Err(error) =
        Capture::start(&CaptureSettings::new("probe", dir.clone())).and_then(|_| capture::let_go("probe"))
    {
        eprintln!("nothing can be measured here: {error}");
        return ExitCode::FAILURE;
    }
    let disk = MemoryDisk::new(&dir);
    events(&dir, &disk);
    pairs(&dir, &disk);
    drop(disk);
    // What stays is a folder of our own in the folder for such things.
    let _removed = std::fs::remove_dir_all(&dir);
    ExitCode::SUCCESS
}
