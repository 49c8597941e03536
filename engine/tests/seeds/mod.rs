//! Seeds of a test, played on two threads.
//!
//! Invariant: once one thread has so many failures, no other seed is begun. Used by the tests of the journal.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Plays the seeds. Answers the sum of those that passed, and what failed.
pub(crate) fn play_all<S: Default + Send>(
    seeds: impl Iterator<Item = u64> + Send,
    failures_max: usize,
    play: impl Fn(u64) -> Result<S, String> + Sync,
    add: impl Fn(&mut S, &S) + Sync,
) -> (S, Vec<String>) {
    let (seeds, enough) = (Mutex::new(seeds), AtomicBool::new(false));
    let next = || seeds.lock().expect("a seed is taken without a panic").next();
    let work = || {
        let (mut sum, mut failures) = (S::default(), Vec::new());
        while let Some(seed) = next().filter(|_| !enough.load(Ordering::Relaxed)) {
            match play(seed) {
                Ok(one) => add(&mut sum, &one),
                Err(failure) => failures.push(failure),
            }
            enough.fetch_or(failures.len() >= failures_max, Ordering::Relaxed);
        }
        (sum, failures)
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(work), scope.spawn(work)];
        let (mut sum, mut failures) = (S::default(), Vec::new());
        for worker in workers {
            let (one, failed) = worker.join().expect("a worker");
            add(&mut sum, &one);
            failures.extend(failed);
        }
        (sum, failures)
    })
}
