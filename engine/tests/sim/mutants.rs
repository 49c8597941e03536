//! Proof that the simulator sees bugs of the real cores: each is put in force and must break a rule of the checker.
//!
//! A bug is played on the suite's own seeds, as they are, from 0 on, until the checker's verdict; the same seeds keep
//! every rule without it, which `every_seed_keeps_every_rule` shows. A core that trips over its own assertion gives no
//! verdict. `SIM_MUTANTS=n` plays `n` seeds of each to the end and prints how many of them see it (`make sim-mutants`);
//! `SIM_MUTANT=name` with `SIM_SEED` replays one. Called by `sim.rs`.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use reprotect_engine::mutants::{Judge, Known, MUTANTS, Mutant, with};
use reprotect_engine::sim::{Rule, Scenario, run};

/// The bug that `SIM_MUTANT` names, if any.
pub(crate) fn named() -> Option<Mutant> {
    let name = std::env::var("SIM_MUTANT").ok()?;
    let known = MUTANTS.iter().find(|known| format!("{:?}", known.mutant) == name);
    Some(known.unwrap_or_else(|| panic!("no mutant {name}")).mutant)
}

/// What came of a bug.
struct Row {
    known: &'static Known,
    /// The first seed that saw it, and the rule it broke.
    caught: Option<(u64, Rule)>,
    /// Seeds that saw it, seeds in which a core asserted first, seeds played.
    counts: [u64; 3],
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Known { mutant, text, within, .. } = self.known;
        let [seen, asserted, played] = self.counts;
        let name = format!("{mutant:?}");
        let caught = match self.caught {
            Some((seed, rule)) => format!("{rule:?} at seed {seed}"),
            None => "NOT CAUGHT".into(),
        };
        let shares = format!("{seen} of {played}, {asserted} asserted");
        write!(f, "{name:<19} {caught:<28} within {within:>4}  {shares:<26} {}", text.trim())
    }
}

/// Plays a bug until it is seen, or `all` seeds of it.
fn judge(known: &'static Known, all: Option<u64>) -> Row {
    let mut row = Row { known, caught: None, counts: [0; 3] };
    for seed in 0..all.unwrap_or(known.within).max(known.within) {
        if row.caught.is_some() && all.is_none_or(|all| seed >= all) {
            break;
        }
        let scenario = Scenario::from_seed(seed);
        let played = with(Some(known.mutant), || catch_unwind(AssertUnwindSafe(|| run(&scenario))));
        row.counts[2] += 1;
        match played {
            Ok(Ok(_)) => {}
            Ok(Err(failure)) => {
                row.counts[0] += 1;
                row.caught = row.caught.or(Some((seed, failure.rule)));
            }
            Err(_) => row.counts[1] += 1,
        }
    }
    row
}

#[test]
fn mutants_of_the_cores_are_caught_within_their_seeds() {
    let all = std::env::var("SIM_MUTANTS").ok().map(|text| text.parse().expect("a number of seeds"));
    let only = named();
    let wanted =
        |known: &&Known| known.judge == Judge::Simulator && only.is_none_or(|mutant| mutant == known.mutant);
    let known: Vec<&'static Known> = MUTANTS.iter().filter(wanted).collect();
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(known) = known.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let row = judge(known, all);
                    rows.lock().expect("no panic holds it").push(row);
                }
            });
        }
    });
    let mut rows = rows.into_inner().expect("no panic held it");
    rows.sort_by_key(|row| row.known.mutant as usize);
    println!();
    for row in &rows {
        println!("{row}");
    }
    let late = |row: &&Row| row.caught.is_none_or(|(seed, _)| seed >= row.known.within);
    let missed: Vec<String> = rows.iter().filter(late).map(ToString::to_string).collect();
    assert!(missed.is_empty(), "not caught within their seeds:\n{}", missed.join("\n"));
    // What the suite does not play by itself proves nothing of the suite.
    assert!(rows.iter().all(|row| row.known.within <= super::SEEDS));
}
