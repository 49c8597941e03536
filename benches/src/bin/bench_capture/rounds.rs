//! Rounds of runs: bare and each mode once in every round, in an order drawn by a seed, compared within the round only.
//!
//! `window` is not measured by a run as long as the interval between two windows, which would take most of the time: of the
//! interval's seconds, those of one run have the window in them, from its beginning to its end and over a map in which every
//! block is marked, as a long interval leaves it at worst; the others are as in the round's `bitmap` run. Its ratio is the
//! mean of the two, weighted by their seconds. A window that outlasts its run would hide some of its cost: it is told.
//! Units: shares of the bare run. Called by `main`.

use std::path::Path;

use reprotect_benches::Seeded;

use super::disk::MemoryDisk;
use super::modes::{MODES, Mode, with_capture};
use super::{LOADS, Load, fio, interval, number, wanted};

/// Rounds, and the seconds of a run, where nobody says.
pub(crate) const ROUNDS: u64 = 30;
pub(crate) const SECONDS: u64 = 1;
/// A run with a window in it lasts longer than a window under load.
const WINDOW_SECONDS_MIN: u64 = 3;

/// What a run found: IOPS and the 99th percentile of latency, as shares of the bare run.
#[derive(Clone, Copy)]
struct Share {
    iops: f64,
    p99: f64,
}

/// The runs of a round: `None` is bare.
fn runs() -> Vec<Option<Mode>> {
    let is_wanted = |mode: Mode| MODES.iter().any(|(name, of)| *of == mode && wanted("MODES", name));
    let mut runs = vec![None];
    // A window's interval is for the most part bitmap.
    if is_wanted(Mode::Bitmap) || is_wanted(Mode::Window) {
        runs.push(Some(Mode::Bitmap));
    }
    runs.extend([Mode::Window, Mode::Data].into_iter().filter(|mode| is_wanted(*mode)).map(Some));
    runs
}

fn shuffle<T>(seeded: &mut Seeded, runs: &mut [T]) {
    for at in (1..runs.len()).rev() {
        runs.swap(at, (seeded.next_u64() >> 33) as usize % (at + 1));
    }
}

/// Seconds of a run.
fn seconds_of(mode: Option<Mode>) -> u64 {
    let seconds = number("SECONDS", SECONDS);
    if mode == Some(Mode::Window) { seconds.max(WINDOW_SECONDS_MIN) } else { seconds }
}

/// One round; the shares of the modes, `window` already over its whole interval.
fn round(dir: &Path, disk: &MemoryDisk, load: &Load, order: &[Option<Mode>]) -> Vec<(Mode, Share)> {
    let mut bare = (1.0, 1.0);
    let mut found = Vec::new();
    for mode in order {
        let run = || fio(&disk.path, load.arguments, seconds_of(*mode));
        match mode {
            None => bare = run(),
            Some(mode) => found.push((*mode, with_capture(dir, &disk.path, *mode, run))),
        }
    }
    let share = |(iops, p99): (f64, f64)| Share { iops: iops / bare.0, p99: p99 / bare.1 };
    let bitmap = found.iter().find(|(mode, _)| *mode == Mode::Bitmap).map(|(_, run)| share(*run));
    let part = seconds_of(Some(Mode::Window)) as f64 / number("INTERVAL", 10) as f64;
    let whole = |mode: Mode, with: Share| match bitmap {
        Some(without) if mode == Mode::Window && part < 1.0 => {
            Share { iops: with.iops * part + without.iops * (1.0 - part), ..with }
        }
        _ => with,
    };
    found.iter().map(|(mode, run)| (*mode, whole(*mode, share(*run)))).collect()
}

/// All of them, and what they say.
pub(crate) fn rounds(dir: &Path, disk: &MemoryDisk) {
    let (rounds, seed) = (number("ROUNDS", ROUNDS), number("SEED", 1).max(1));
    if rounds == 0 {
        return;
    }
    println!("{rounds} rounds, seed {seed}");
    let mut seeded = Seeded::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for load in LOADS.iter().filter(|load| wanted("LOADS", load.name)) {
        let mut found = Vec::new();
        for _ in 0..rounds {
            let mut order = runs();
            shuffle(&mut seeded, &mut order);
            found.extend(round(dir, disk, load, &order));
        }
        for (name, mode) in MODES.into_iter().filter(|(name, _)| wanted("MODES", name)) {
            let of = |what: fn(&Share) -> f64| -> Vec<f64> {
                found.iter().filter(|(of, _)| *of == mode).map(|(_, share)| what(share)).collect()
            };
            let ((iops, iops_half), (p99, p99_half)) =
                (interval(&of(|share| share.iops)), interval(&of(|share| share.p99)));
            let goal = (load.goal)(mode).map_or(String::new(), |goal| {
                let met = match (iops - iops_half >= goal, iops + iops_half < goal) {
                    (true, _) => "met",
                    (_, true) => "MISSED",
                    _ => "not decided, the interval has both",
                };
                format!("  goal >= {:.0} %: {met}", goal * 100.0)
            });
            let p99_of = if mode == Mode::Window { "p99 with the window" } else { "p99" };
            println!(
                "{:9} {name:7} IOPS {:5.1} % ± {:.1} of bare, {p99_of} {:5.1} % ± {:.1}; runs of {} s{goal}",
                load.name,
                iops * 100.0,
                iops_half * 100.0,
                p99 * 100.0,
                p99_half * 100.0,
                seconds_of(Some(mode)),
            );
        }
    }
}
