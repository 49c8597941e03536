//! What live capture costs the machine that is protected: IOPS and latency of fio with and without it in turns, and
//! nanoseconds per event as the kernel counts them.
//!
//! Two runs of the same thing differ by 10 to 20 per cent here, so a mode is compared with the bare run of its own round: each
//! round runs bare and every mode once, in an order drawn anew; the mean of the ratios is printed with its 95 % interval.
//! Modes: `bitmap`; `window`, which is bitmap and a closing window every `INTERVAL` seconds that reads the changed blocks, as
//! the agent does; `data`, whose ring is drained by the same cores. Called by `make bench-capture` as root. Environment:
//! ROUNDS (30; 0: events only), SECONDS (1), INTERVAL (10), SEED, RING_MIB (the agent's size), LOADS, MODES (comma lists).

mod disk;
mod modes;
mod rounds;

use std::path::Path;
use std::process::{Command, ExitCode};

use disk::MemoryDisk;
use modes::Mode;
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
    // A thread instead of a process, and no look at the disk's counters, so that a run is hardly longer than its load.
    let output = Command::new("fio")
        .args(["--name=x", &filename, "--direct=1", "--ioengine=libaio", "--time_based=1", &runtime])
        .args(["--norandommap=1", "--output-format=json", "--size=512m", "--thread", "--disk_util=0"])
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

/// One run under measurement: the kernel's time per write in microseconds, and of each program in nanoseconds per run.
fn measured(dir: &Path, disk: &MemoryDisk, load: &Load, mode: Mode) -> (f64, Vec<(&'static str, f64)>, f64) {
    let mut capture = Capture::start(&modes::settings("bench-events", dir)).expect("live capture works here");
    let slot = modes::follow(&mut capture, &disk.path);
    let before = capture.costs().expect("the kernel tells");
    let (iops, _) = modes::drained(&mut capture, slot, mode, || {
        fio(&disk.path, load.arguments, number("SECONDS", rounds::SECONDS))
    });
    let (mut programs, mut nanos, mut submitted) = (Vec::new(), 0, 1);
    for (before, after) in before.iter().zip(capture.costs().expect("the kernel tells")) {
        let (runs, spent) = (after.runs - before.runs, after.run_ns - before.run_ns);
        nanos += spent;
        submitted = submitted.max(runs);
        programs.push((after.name, spent as f64 / runs.max(1) as f64));
    }
    drop(capture);
    capture::let_go("bench-events").expect("capture ends in order");
    (nanos as f64 / submitted as f64 / 1000.0, programs, iops)
}

/// Nanoseconds of each program per event, and of all of them per write; a few runs of each in turns.
fn events(dir: &Path, disk: &MemoryDisk) {
    let times = number("ROUNDS", rounds::ROUNDS).div_ceil(6).max(1);
    let _measuring = Measuring::begin().expect("the kernel measures programs");
    for load in LOADS.iter().filter(|load| wanted("LOADS", load.name) && load.name != "buffered") {
        let mut runs = [("bitmap", Mode::Bitmap, Vec::new()), ("data", Mode::Data, Vec::new())];
        for _ in 0..times {
            for (_, mode, found) in &mut runs {
                found.push(measured(dir, disk, load, *mode));
            }
        }
        for (name, _, found) in &runs {
            let (micros, half) = interval(&found.iter().map(|(micros, ..)| *micros).collect::<Vec<_>>());
            let iops = found.iter().map(|(.., iops)| iops).sum::<f64>() / times as f64;
            let mut line = String::new();
            for at in 0..found[0].1.len() {
                let of: Vec<f64> = found.iter().map(|(_, programs, _)| programs[at].1).collect();
                line += &format!("; {} {:.0} ns", found[0].1[at].0, interval(&of).0);
            }
            println!(
                "{:9} {name:7} {micros:.2} us ± {half:.2} of the kernel's time per write at {iops:.0} IOPS, {times} runs{line}",
                load.name
            );
        }
    }
}

fn main() -> ExitCode {
    let dir = std::env::temp_dir().join(format!("bench-capture-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder to measure in");
    if let Err(error) = Capture::start(&CaptureSettings::new("probe", dir.clone()))
        .map(drop)
        .and_then(|()| capture::let_go("probe"))
    {
        eprintln!("nothing can be measured here: {error}");
        return ExitCode::FAILURE;
    }
    let disk = MemoryDisk::new(&dir);
    events(&dir, &disk);
    rounds::rounds(&dir, &disk);
    drop(disk);
    // What stays is a folder of our own in the folder for such things.
    let _removed = std::fs::remove_dir_all(&dir);
    ExitCode::SUCCESS
}
