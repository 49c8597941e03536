//! Proof that the model sees bugs of the real store: each is put in force and must show within its seeds.
//!
//! The store with a bug is played as in `against_store.rs` until it differs from the model; the same seeds pass without
//! it. A store that trips over its own assertion gives no verdict: only what this test asserts counts, and errors that
//! it did not expect. Called by `make sim-mutants` and `cargo test`.

use std::cell::Cell;
use std::panic::{set_hook, take_hook};
use std::sync::Once;

use reprotect_engine::mutants::{Judge, MUTANTS, with};

use super::against_store::play;

thread_local! {
    /// Whether the last panic of this thread was the test's own verdict.
    static JUDGED: Cell<bool> = const { Cell::new(false) };
}

/// From now on it is known where a panic came from.
fn note_verdicts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            let place = panic.location().map_or("", |location| location.file());
            JUDGED.set(place.contains("tests/"));
            before(panic);
        }));
    });
}

#[test]
fn mutants_of_the_store_are_caught_within_their_seeds() {
    note_verdicts();
    let (mut rows, mut missed) = (Vec::new(), Vec::new());
    for known in MUTANTS.iter().filter(|known| known.judge == Judge::Model) {
        let caught = |seed: &u64| {
            JUDGED.set(false);
            let played = with(Some(known.mutant), || play(*seed, false));
            played.err().filter(|_| JUDGED.get()).map(|failure| (*seed, failure))
        };
        let name = format!("{:?}", known.mutant);
        match (0..known.within).find_map(|seed| caught(&seed)) {
            Some((seed, _)) => {
                let (within, text) = (known.within, known.text.trim());
                rows.push(format!(
                    "{name:<19} the model at seed {seed:<3}        within {within:>4}  {text}"
                ));
                if let Err(failure) = play(seed, false) {
                    missed.push(format!("without {name}: {failure}"));
                }
            }
            None => missed.push(format!("{name} is not seen in {} seeds", known.within)),
        }
    }
    println!("\n{}", rows.join("\n"));
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
