//! The executable model of the retention journal: its rules in their smallest form, tried by crashes at every step.
//!
//! A rule holds when the intact model passes every seed and when each way of breaking it is seen within a few.
//! Called by `cargo test`.

#[path = "journal_model/port.rs"]
mod port;
#[path = "journal_model/rng.rs"]
mod rng;

use port::{Broken, play};

#[test]
fn every_boundary_reads_back_after_any_power_loss() {
    let failures: Vec<String> = (0..2000).filter_map(|seed| play(seed, None).err()).collect();
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_broken_rule_is_seen() {
    for broken in [Broken::NoUndoBarrier, Broken::Recapture, Broken::NewestWins, Broken::NoTargetFlush] {
        let seen = (0..400).filter(|seed| play(*seed, Some(broken)).is_err()).count();
        assert!(seen > 0, "{broken:?} was not seen in 400 seeds");
        eprintln!("{broken:?}: {seen} of 400");
    }
}
