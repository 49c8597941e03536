//! The limit on reading: all disks together read no faster than `read_rate`.
//!
//! Invariants: a read reserves its share of time before it begins, so the mean never passes the rate whatever the
//! number of readers; after an idle time nothing is owed and nothing saved up; a changed rate holds at once, also for
//! readers that are waiting. Units: bytes, bytes per second. Called by the reader threads; the session changes the
//! rate on SIGHUP.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest sleep at once: bounds how late a reader sees that it is to stop.
const SLICE: Duration = Duration::from_millis(50);

/// The limiter.
#[derive(Debug)]
pub struct Throttle {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes_per_second: Option<u64>,
    /// When the reads reserved so far are paid for.
    free_at: Option<Instant>,
    /// Counts changes of the rate: a wait under an older one is over.
    version: u64,
}

impl State {
    /// Reserves `bytes` at `now`: when they may be read.
    fn reserve(&mut self, now: Instant, bytes: u64) -> Instant {
        let Some(rate) = self.bytes_per_second else { return now };
        let start = self.free_at.map_or(now, |free_at| free_at.max(now));
        let span = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.free_at = start.checked_add(span);
        start
    }
}

impl Throttle {
    /// A limit, or none.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { state: Mutex::new(State { bytes_per_second, free_at: None, version: 0 }) }
    }

    /// Another limit, from now on.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        let mut state = self.state();
        if state.bytes_per_second != bytes_per_second {
            *state = State { bytes_per_second, free_at: None, version: state.version + 1 };
        }
    }

    /// Waits until `bytes` may be read, or until `stop` is set.
    pub fn wait(&self, bytes: u64, stop: &AtomicBool) {
        let (start, version) = {
            let mut state = self.state();
            (state.reserve(Instant::now(), bytes), state.version)
        };
        loop {
            let left = start.saturating_duration_since(Instant::now());
            if left.is_zero() || stop.load(Ordering::Relaxed) || self.state().version != version {
                return;
            }
            std::thread::sleep(left.min(SLICE));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a whole value: every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limited(rate: u64) -> State {
        State { bytes_per_second: Some(rate), free_at: None, version: 0 }
    }

    #[test]
    fn reads_of_all_disks_together_keep_to_the_rate() {
        let (mut state, begin) = (limited(100 * MIB), Instant::now());
        // Two readers that come back as soon as they may: each read begins when all before it are paid for.
        let mut now = begin;
        let mut starts = Vec::new();
        for _ in 0..50 {
            starts.push(state.reserve(now, 16 * MIB));
            starts.push(state.reserve(now, 4 * MIB));
            now = starts[starts.len() - 1];
        }
        assert!(starts.is_sorted());
        let read = 50 * 20 * MIB - 4 * MIB;
        let span = starts[99].duration_since(begin);
        assert_eq!(span.as_millis() as u64, read * 1000 / (100 * MIB));
    }

    #[test]
    fn an_idle_time_is_not_saved_up() {
        let (mut state, begin) = (limited(MIB), Instant::now());
        assert_eq!(state.reserve(begin, 4 * MIB), begin);
        let later = begin + Duration::from_secs(3600);
        assert_eq!(state.reserve(later, 4 * MIB), later);
        assert_eq!(state.reserve(later, 4 * MIB), later + Duration::from_secs(4));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut state = State { bytes_per_second: None, free_at: None, version: 0 };
        let now = Instant::now();
        for _ in 0..10 {
            assert_eq!(state.reserve(now, u64::MAX), now);
        }
    }

    #[test]
    fn a_wait_of_a_year_ends_by_another_rate_and_by_a_stop() {
        let throttle = Throttle::new(Some(1));
        let (go_on, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        throttle.wait(1 << 25, &go_on);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| throttle.wait(1, &go_on));
            let stopped = scope.spawn(|| throttle.wait(1, &stop));
            stop.store(true, Ordering::Relaxed);
            stopped.join().unwrap();
            throttle.set_rate(None);
            waiting.join().unwrap();
        });
        throttle.wait(u64::MAX, &go_on);
    }
}
