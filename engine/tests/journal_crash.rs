//! Crash enumeration: small workloads of the whole journal, power lost behind each of their I/Os, every state judged.
//!
//! A workload is a seed. A journal with one to three disks is made and used for a while; then up to [`IOS_MAX`] writes,
//! flushes and changes of names are recorded while it goes on: batches of either stretch and of a pass, marks, states,
//! commits, windows, undo epochs, merges, expiry, release and recycling of segments, rollback and the way forward, entries
//! carried forward or given up and the compare behind that, growth, damage that becomes known, pins, opening, closing, or
//! the making of a journal. For each prefix of these, subsets of what no flush covered reach the medium: all, none, all but one write,
//! one write only, a write torn at 512 B, single sectors; a file that was made without its name, a removal or a new name
//! undone. The journal is opened, perhaps crashed while it opens, up to three times, and held against the oracle. So are
//! a program that was killed, its writes still in a cache, and the folder read without opening it.
//!
//! Allowed is: all that was durable is there; every point that was kept before and after the step shows the disk as it
//! was, in its size, pinned, degraded or damaged as it was; what is given up is known to be lost, or is there; marks behind
//! it promise less until the compare; nothing else is shown at any place; nothing is damaged, nothing is left lying about. In the suite few subsets of
//! each prefix are tried and counted, with `CRASH_CASES` workloads more of them (`make crash`). `CRASH_SEED=n` plays one workload.
//! Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "journal_crash/enumerate.rs"]
mod enumerate;
mod journal_lab;
#[path = "journal_crash/oracle.rs"]
mod oracle;
#[path = "journal_crash/rare.rs"]
mod rare;
mod seeds;
#[path = "journal_crash/store.rs"]
mod store;
#[path = "journal_crash/workload.rs"]
mod workload;

use std::panic::{AssertUnwindSafe, catch_unwind};

use enumerate::{Enumeration, Sum};

/// The longest workload.
const IOS_MAX: usize = 30;
/// Workloads of the quick form, and subsets of what was not flushed that are tried for each prefix; the long form's.
const WORKLOADS: u64 = 200;
/// How many more are played at a time while a step was not seen, and how many at most.
const WORKLOADS_MORE: u64 = 20;
const WORKLOADS_MAX: u64 = 600;
const SUBSETS: usize = 3;
const SUBSETS_LONG: usize = 24;

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().expect("a number"))
}

/// Enumerates one workload; a failure says how to play it again.
fn enumerate(seed: u64, subsets: usize) -> Result<Sum, String> {
    let mut enumeration = Enumeration::new(seed, subsets);
    match catch_unwind(AssertUnwindSafe(|| enumeration.run())) {
        Ok(()) => Ok(enumeration.sum),
        Err(_) => Err(format!("CRASH_SEED={seed}, {}", enumeration.at)),
    }
}

/// Enumerates the seeds.
fn enumerate_all(seeds: &[u64], subsets: usize) -> (Sum, Vec<String>) {
    seeds::play_all(seeds.iter().copied(), 3, |seed| enumerate(seed, subsets), Sum::add)
}

#[test]
fn after_power_loss_behind_any_io_of_any_workload_the_journal_is_in_an_allowed_state() {
    let long = number("CRASH_CASES");
    let seeds: Vec<u64> = match number("CRASH_SEED") {
        Some(seed) => vec![seed],
        None => (0..long.unwrap_or(WORKLOADS)).collect(),
    };
    let one = number("CRASH_SEED").is_some();
    let subsets = if long.is_some() || one { SUBSETS_LONG } else { SUBSETS };
    let (mut sum, mut failures) = enumerate_all(&seeds, subsets);
    // A step that is seldom taken may be in none of them: then some more are played.
    let mut next = seeds.len() as u64;
    while !one && !sum.never_seen().is_empty() && next < WORKLOADS_MAX {
        let more: Vec<u64> = (next..next + WORKLOADS_MORE).collect();
        let (found, failed) = enumerate_all(&more, subsets);
        sum.add(&found);
        failures.extend(failed);
        next += WORKLOADS_MORE;
    }
    eprintln!("{sum}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // A test that tries nothing proves nothing.
    assert!(one || sum.never_seen().is_empty(), "no workload came to {:?}", sum.never_seen());
}
