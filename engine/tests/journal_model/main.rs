//! The executable model of the retention journal: its rules in their smallest form, tried by stops at every step.
//!
//! To read the rules: `mutations.rs` lists them, `machine.rs` is the apply protocol, `open.rs` what follows a stop,
//! `view.rs` what a point is. A rule holds when the intact journal passes every seed and when the journal without it
//! fails within few, by the oracle's verdict, on a seed that the intact journal passes under the same weights and faults.
//! `against_store.rs` holds the real store against it. `MODEL_SEED=n` replays one seed with a line per event (with
//! `MODEL_RULE=name`, without that rule; with `MODEL_CONTROL=name`, as it is played without it, and with it),
//! `MODEL_SEEDS=n` plays that many. Called by `make model` and `cargo test`.

mod actions;
#[cfg(feature = "sim")]
mod against_store;
mod carry;
mod damage;
mod device;
mod faults;
mod growth;
#[cfg(feature = "sim")]
#[path = "../journal_lab/mod.rs"]
mod journal_lab;
mod log;
mod machine;
mod manifest;
#[cfg(feature = "sim")]
#[path = "../journal_lab/merge.rs"]
mod merge;
#[cfg(feature = "sim")]
mod mutants;
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
use play::{Profile, Report, play};

/// Seeds that the intact journal is played with under the weights and faults of each rule, besides the one that shows
/// its loss.
const CONTROLS: u64 = 10;

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().expect("a number"))
}

/// The rule that a variable names, if any.
fn named_rule(variable: &str) -> Option<Rule> {
    let name = std::env::var(variable).ok()?;
    let rule = RULES.iter().find(|rule| format!("{:?}", rule.0) == name);
    Some(rule.unwrap_or_else(|| panic!("no rule {name}")).0)
}

/// Plays the seeds. Answers the sum of those that passed, and what failed.
fn play_all(seeds: u64) -> (Report, Vec<String>) {
    seeds::play_all(0..seeds, 5, |seed| play(seed, Profile::default(), false), Report::add)
}

#[test]
fn every_promised_state_reads_back_after_any_stop() {
    if let Some(seed) = number("MODEL_SEED") {
        let without = named_rule("MODEL_RULE").map(Profile::without);
        let profile = without.or(named_rule("MODEL_CONTROL").map(Profile::control)).unwrap_or_default();
        let report = play(seed, profile, true).unwrap_or_else(|failure| panic!("{failure}"));
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
    let mut unseen = Vec::new();
    for (rule, within) in RULES {
        // A journal without a rule may trip over its own arithmetic before anybody judges it: that is no verdict.
        let verdict = |seed: &u64| {
            let played = catch_unwind(AssertUnwindSafe(|| play(*seed, Profile::without(*rule), false)));
            played.ok()?.err()
        };
        match (0..*within).find_map(|seed| Some((seed, verdict(&seed)?))) {
            Some((seed, verdict)) => {
                eprintln!("{rule:?}: {verdict}");
                unseen.extend(controls(*rule, seed));
            }
            None => unseen.push(format!("{rule:?} is not missed in {within} seeds")),
        }
    }
    assert!(unseen.is_empty(), "{}", unseen.join("\n"));
}

/// What the oracle says of the intact journal where it is played as without a rule: on the seed that showed that the rule is
/// missing, and on the first ones.
fn controls(rule: Rule, caught: u64) -> Vec<String> {
    let seeds = (0..CONTROLS.min(caught)).chain([caught]);
    let failures = seeds.filter_map(|seed| play(seed, Profile::control(rule), false).err());
    failures.map(|failure| format!("with {rule:?}, which it is to be caught without: {failure}")).collect()
}

#[test]
fn the_same_seed_is_the_same_play() {
    for seed in [1, 17, 400] {
        assert_eq!(play(seed, Profile::default(), false), play(seed, Profile::default(), false));
    }
}
