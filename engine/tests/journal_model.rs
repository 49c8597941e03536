//! The executable model of the retention journal: its rules in their smallest form, tried by stops at every step.
//!
//! A rule holds when the intact journal passes every seed and when breaking the rule is seen within a few. The rules
//! are listed in `journal_model/mutations.rs`; the protocol is in `machine.rs`. `MODEL_SEED=n` replays one seed with a
//! line per event (`MODEL_RULE=name` without that rule), `MODEL_SEEDS=n` plays that many. Called by `make model` and
//! `cargo test`.

#[path = "journal_model/device.rs"]
mod device;
#[path = "journal_model/log.rs"]
mod log;
#[path = "journal_model/machine.rs"]
mod machine;
#[path = "journal_model/manifest.rs"]
mod manifest;
#[path = "journal_model/mutations.rs"]
mod mutations;
#[path = "journal_model/open.rs"]
mod open;
#[path = "journal_model/oracle.rs"]
mod oracle;
#[path = "journal_model/play.rs"]
mod play;
#[path = "journal_model/records.rs"]
mod records;
#[path = "journal_model/retention.rs"]
mod retention;
#[path = "journal_model/rng.rs"]
mod rng;
#[path = "journal_model/rollback.rs"]
mod rollback;
#[path = "journal_model/source.rs"]
mod source;
#[path = "journal_model/undo.rs"]
mod undo;
#[path = "journal_model/view.rs"]
mod view;

use mutations::{RULES, Rule};
use play::play;

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().expect("a number"))
}

#[test]
fn every_promised_state_reads_back_after_any_stop() {
    let rule = std::env::var("MODEL_RULE").ok();
    let rule = rule.map(|name| RULES.iter().find(|rule| format!("{:?}", rule.0) == name).expect("a rule").0);
    if let Some(seed) = number("MODEL_SEED") {
        let report = play(seed, rule, true).unwrap_or_else(|failure| panic!("{failure}"));
        return eprintln!("{report:#?}");
    }
    let seeds = number("MODEL_SEEDS").unwrap_or(2000);
    let mut failures = Vec::new();
    for seed in 0..seeds {
        match play(seed, rule, false) {
            Err(failure) => failures.push(failure),
            Ok(r) => {
                if seed % 1000 == 0 {
                    eprintln!("{r:?}")
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} seeds failed:\n{}",
        failures.len(),
        failures[..failures.len().min(15)].join("\n")
    );
}

#[test]
fn every_broken_rule_is_seen() {
    let n = number("MODEL_SEEDS").unwrap_or(2000);
    for (rule, _) in RULES {
        let mut seen = Vec::new();
        for seed in 0..n {
            let r = std::panic::catch_unwind(|| play(seed, Some(*rule), false));
            match r {
                Ok(Ok(_)) => {}
                Ok(Err(e)) => seen.push((seed, e)),
                Err(_) => seen.push((seed, "PANIC".into())),
            }
        }
        eprintln!(
            "RULE {rule:?}: {} first {:?}",
            seen.len(),
            seen.iter().take(2).map(|s| (s.0, s.1.chars().take(110).collect::<String>())).collect::<Vec<_>>()
        );
    }
}
