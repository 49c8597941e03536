//! The simulator's suite: many seeds, every seed that once failed, and proof that each rule can fail.
//!
//! `SIM_SEED=n` replays one seed with a line per event; `SIM_SEEDS=a..b` (or a number) plays that many instead of the
//! suite's. `mutants` plays them with a bug in force. Called by `make sim`, `make sim-mutants` and `cargo test`.
#![cfg(feature = "sim")]

#[path = "sim/mutants.rs"]
mod mutants;

use std::panic::{AssertUnwindSafe, catch_unwind};

use reprotect_engine::sim::{Report, Rule, Sabotage, Scenario, run};

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

/// Seeds of the suite.
const SEEDS: u64 = 2000;

fn seeds() -> std::ops::Range<u64> {
    let text = std::env::var("SIM_SEEDS").unwrap_or_else(|_| SEEDS.to_string());
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
        let played = reprotect_engine::mutants::with(mutants::named(), || play(&scenario));
        let report = played.unwrap_or_else(|failure| panic!("{failure}"));
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

/// Seeds that broke a rule once, and what was wrong. The numbers stay although their runs change with the code: the
/// rule itself is tested in `protocol/`.
#[test]
fn seeds_that_once_failed_keep_every_rule() {
    let found = [
        (24, "a mark was acknowledged before a checkpoint recorded it"),
        (26, "a failed disk asked for a timer without end"),
        (10, "bulk of an ended pass was acknowledged into the next one"),
        (87, "a flipped bit in a batch head looked like a fork"),
        (156, "a flipped bit moved the cover of a bulk batch"),
        (1242, "a compare pass that was asked for was forgotten with the session"),
        (51, "a mark that was overtaken by a batch waited for ever"),
        (45, "a walk got answers that were meant for the one before"),
        (755, "refused batches used up the credit"),
        (8592, "an opener was replaced and never told"),
        (12_952, "hashes overtook older data of the scan before"),
        (36_259, "another session's bulk was taken for one's own"),
        (37_164, "another session ended the pass before this one tracked writes"),
        (2529, "a disk was called synced although a compare pass was wanted"),
        (3445, "delta overtook the beginning of the pass that was to bring what is missing before it"),
        (11_423, "the same, with another disk"),
    ];
    for (seed, what) in found {
        play(&Scenario::from_seed(seed)).unwrap_or_else(|failure| panic!("again: {what}\n{failure}"));
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [3, 51, 755] {
        let scenario = Scenario::from_seed(seed);
        assert_eq!(play(&scenario), play(&scenario));
    }
}

/// Breaks a rule in the drivers over some seeds and answers which rules the checker saw broken.
fn seen(sabotage: Sabotage) -> Vec<Rule> {
    // A stale session rarely gets to write: its agent must miss that it was replaced.
    let seeds = if sabotage == Sabotage::WriteFenced { 400 } else { 80 };
    let mut rules: Vec<Rule> = (0..seeds)
        .filter_map(|seed| {
            let mut scenario = Scenario { sabotage: Some(sabotage), ..Scenario::from_seed(seed) };
            scenario.faults.target_crashes += 2;
            scenario.faults.disconnects += 2;
            scenario.writes = scenario.writes.max(40);
            match sabotage {
                Sabotage::TrustPayload => scenario.faults.flips_per_mille = 300,
                Sabotage::IgnoreCredit => scenario.flow.undurable_bytes = 8 * scenario.flow.unwritten_bytes,
                _ => {}
            }
            // A core may assert before the checker sees anything; that is not what is tested here.
            catch_unwind(AssertUnwindSafe(|| run(&scenario))).ok()?.err().map(|failure| failure.rule)
        })
        .collect();
    rules.sort_unstable();
    rules.dedup();
    rules
}

macro_rules! every_rule_can_fail {
    ($($name:ident: $sabotage:ident => $($rule:ident)|+;)*) => {$(
        #[test]
        fn $name() {
            let seen = seen(Sabotage::$sabotage);
            $(assert!(seen.contains(&Rule::$rule), "{:?} not among {seen:?}", Rule::$rule);)+
        }
    )*};
}

every_rule_can_fail! {
    an_early_acknowledgement_is_seen: AcknowledgeEarly => Acknowledgement;
    a_forgotten_flush_is_seen: ForgetFlush => Prefix;
    stale_bulk_is_seen: StaleBulk => Equality;
    lost_writes_are_seen: LoseWrites => Equality | Prefix;
    a_batch_applied_twice_is_seen: ApplyTwice => ExactlyOnce;
    a_generation_used_twice_is_seen: ReuseGeneration => Generation;
    a_write_of_a_fenced_session_is_seen: WriteFenced => Generation;
    memory_without_bound_is_seen: IgnoreCredit => Bounded;
    a_payload_nobody_checked_is_seen: TrustPayload => Prefix;
    a_mark_that_nobody_kept_is_seen: LoseMarks => Acknowledgement;
    crcs_that_nobody_confirmed_are_seen: BelieveCrcs => Equality;
    a_disk_that_never_gets_synced_is_seen: NeverRead => Liveness;
    a_harvest_in_reverse_order_is_seen: HarvestReversed => Equality;
    a_harvest_that_a_lost_connection_forgot_is_seen: HarvestForgotten => Equality;
}
