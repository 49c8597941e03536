//! The executable model of the retention journal: its rules in their smallest form, tried by stops at every step.
//!
//! To read the rules: `mutations.rs` lists them, `machine.rs` is the apply protocol, `open.rs` what follows a stop,
//! `view.rs` what a point is. A rule holds when the intact journal passes every seed and when the journal without it
//! fails within few. `against_store.rs` holds the real store against it. `MODEL_SEED=n` replays one seed with a line per event (with `MODEL_RULE=name`, without that rule),
//! `MODEL_SEEDS=n` plays that many. Called by `make model` and `cargo test`.

mod actions;
#[cfg(feature = "sim")]
mod against_store;
mod device;
mod faults;
#[cfg(feature = "sim")]
#[path = "../journal_lab/mod.rs"]
mod journal_lab;
mod log;
mod machine;
mod manifest;
#[cfg(feature = "sim")]
#[path = "../journal_lab/merge.rs"]
mod merge;
mod mutations;
mod open;
mod operators;
mod oracle;
mod play;
mod records;
mod report;
mod retention;
mod rng;
mod rollback;
#[path = "../seeds/mod.rs"]
mod seeds;
mod source;
#[cfg(feature = "sim")]
mod store;
mod undo;
mod view;

use std::panic::{AssertUnwindSafe, catch_unwind};

use mutations::{RULES, Rule};
use play::{Report, play};

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().expect("a number"))
}

/// The rule that a replay is to break, if any.
fn broken_rule() -> Option<Rule> {
    let name = std::env::var("MODEL_RULE").ok()?;
    let rule = RULES.iter().find(|rule| format!("{:?}", rule.0) == name);
    Some(rule.unwrap_or_else(|| panic!("no rule {name}")).0)
}

/// Plays the seeds. Answers the sum of those that passed, and what failed.
fn play_all(seeds: u64) -> (Report, Vec<String>) {
    seeds::play_all(0..seeds, 5, |seed| play(seed, None, false), Report::add)
}

#[test]
fn every_promised_state_reads_back_after_any_stop() {
    if let Some(seed) = number("MODEL_SEED") {
        let report = play(seed, broken_rule(), true).unwrap_or_else(|failure| panic!("{failure}"));
        return eprintln!("{report}");
    }
    let seeds = number("MODEL_SEEDS").unwrap_or(2000);
    let (sum, failures) = play_all(seeds);
    eprintln!("{seeds} seeds: {sum}");
    assert!(failures.is_empty(), "replay with make model SEED=n:\n{}", failures.join("\n"));
    // A model that tries nothing proves nothing.
    assert_eq!(sum.never_seen(), Vec::<&str>::new(), "no seed came to these");
}

#[test]
fn every_broken_rule_is_seen() {
    if number("MODEL_SEED").is_some() {
        return;
    }
    // A journal without a rule may also trip over its own arithmetic; that counts as seen.
    let fails = |seed: &u64, rule| {
        !matches!(catch_unwind(AssertUnwindSafe(|| play(*seed, Some(rule), false))), Ok(Ok(_)))
    };
    let mut unseen = Vec::new();
    for (rule, within) in RULES {
        match (0..*within).find(|seed| fails(seed, *rule)) {
            Some(seed) => eprintln!("{rule:?}: seed {seed}"),
            None => unseen.push(format!("{rule:?} is not missed in {within} seeds")),
        }
    }
    assert!(unseen.is_empty(), "{}", unseen.join("\n"));
}

#[test]
fn the_same_seed_is_the_same_play() {
    for seed in [1, 17, 400] {
        assert_eq!(play(seed, None, false), play(seed, None, false));
    }
}
