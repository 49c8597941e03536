//! How fast data may leave: a rate for the data of several connections together, of which bulk keeps a tenth.
//!
//! | what waits | delta has | bulk has |
//! |---|---|---|
//! | both | nine tenths of the rate | a tenth |
//! | one of them | all of it | all of it |
//!
//! Control frames are not counted and never wait. Without a rate nothing waits here.
//!
//! Invariants: a piece reserves its share of time before it leaves, so the mean never passes the rate, however many lanes
//! there are; after an idle time nothing is owed and nothing saved up; a changed rate holds at once, also for who waits.
//! Units: bytes, bytes per second. Called by `lanes`; the rate is set by the daemons.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Bytes that are reserved at a time: bounds how long one lane holds up another.
const PIECE_BYTES: usize = 64 << 10;
/// Of the rate, bulk has this part while delta wants more than there is.
const BULK_PART: u32 = 10;
/// Delta that came so lately counts as wanting more.
const LATELY: Duration = Duration::from_millis(200);
/// What may leave so soon leaves now: clocks are no finer.
const AT_ONCE: Duration = Duration::from_millis(2);

/// What kind of data wants to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// New writes.
    Delta,
    /// What was there before.
    Bulk,
}

/// The limiter; shared by all lanes that a rate is for.
#[derive(Debug, Default)]
pub struct Shaper {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    bytes_per_second: Option<u64>,
    /// When what was reserved so far is paid for.
    free_at: Option<Instant>,
    /// When bulk may have its next part, while delta wants more than there is.
    bulk_free_at: Option<Instant>,
    /// When delta came last.
    delta_at: Option<Instant>,
}

impl State {
    /// Reserves `bytes` at `now`: when they may leave.
    fn reserve(&mut self, now: Instant, class: Class, bytes: u64) -> Instant {
        let Some(rate) = self.bytes_per_second else { return now };
        let span = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let later = |at: Option<Instant>| at.map_or(now, |at| at.max(now));
        let line = later(self.free_at);
        let is_contended = self.delta_at.is_some_and(|at| now.saturating_duration_since(at) < LATELY);
        let start = match class {
            Class::Delta => {
                self.delta_at = Some(now);
                line
            }
            // In a line of its own, which goes on slower.
            Class::Bulk if is_contended => later(self.bulk_free_at),
            Class::Bulk => line,
        };
        if class == Class::Bulk {
            let part = span.checked_mul(if is_contended { BULK_PART } else { 1 });
            self.bulk_free_at = part.and_then(|part| start.checked_add(part));
        }
        self.free_at = line.checked_add(span);
        start
    }
}

impl Shaper {
    /// With a rate, or without.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let shaper = Self::default();
        shaper.set_rate(bytes_per_second);
        shaper
    }

    /// Another rate, from now on.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        let mut state = self.lock();
        if state.bytes_per_second != bytes_per_second {
            *state = State { bytes_per_second, ..State::default() };
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// The rate that holds now.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.lock().bytes_per_second
    }

    /// Bytes that are best let pass together.
    pub(super) fn piece_bytes(&self) -> usize {
        if self.rate().is_some() { PIECE_BYTES } else { usize::MAX }
    }

    /// Waits until `bytes` may leave. Given up, what it reserved is not given back: the next waits a little longer.
    pub async fn pass(&self, class: Class, bytes: usize) {
        let changed = self.changed.notified();
        let (now, start) = {
            let mut state = self.lock();
            let now = Instant::now();
            (now, state.reserve(now, class, bytes as u64))
        };
        if start.saturating_duration_since(now) > AT_ONCE {
            tokio::select! {
                () = tokio::time::sleep_until(start.into()) => {}
                () = changed => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a whole value.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = PIECE_BYTES as u64;
    const RATE: u64 = 10 << 20;

    fn limited() -> State {
        State { bytes_per_second: Some(RATE), ..State::default() }
    }

    /// Lanes that always have more, each with one piece at a time; answers the bytes of delta and of bulk in so many seconds.
    fn play(deltas: usize, bulks: usize, seconds: u64) -> (u64, u64) {
        let (mut state, begin) = (limited(), Instant::now());
        let classes: Vec<Class> = std::iter::repeat_n(Class::Delta, deltas)
            .chain(std::iter::repeat_n(Class::Bulk, bulks))
            .collect();
        let mut next: Vec<Instant> = vec![begin; classes.len()];
        let (mut delta, mut bulk) = (0, 0);
        loop {
            let lane = (0..next.len()).min_by_key(|lane| next[*lane]).unwrap();
            let now = next[lane];
            if now >= begin + Duration::from_secs(seconds) {
                return (delta, bulk);
            }
            next[lane] = state.reserve(now, classes[lane], PIECE);
            match classes[lane] {
                Class::Delta => delta += PIECE,
                Class::Bulk => bulk += PIECE,
            }
            // It comes again once its piece has left; a lane that never waited would never end.
            next[lane] = next[lane].max(now + Duration::from_nanos(1));
        }
    }

    #[test]
    fn all_lanes_together_keep_to_the_rate_and_bulk_has_a_tenth_of_it() {
        for (deltas, bulks) in [(1, 1), (1, 8), (20, 1), (16, 16)] {
            let (delta, bulk) = play(deltas, bulks, 20);
            let slack = (deltas + bulks) as u64 * PIECE;
            assert!(delta + bulk <= 20 * RATE + slack, "{deltas} and {bulks}: {delta} + {bulk}");
            assert!(delta + bulk >= 20 * RATE - slack, "{deltas} and {bulks}: {delta} + {bulk}");
            let share = bulk as f64 / (delta + bulk) as f64;
            assert!((0.095..=0.11).contains(&share), "{deltas} and {bulks}: bulk has {share}");
        }
    }

    #[test]
    fn whoever_is_alone_has_all_of_it() {
        for (deltas, bulks) in [(3, 0), (0, 3)] {
            let (delta, bulk) = play(deltas, bulks, 10);
            assert!((delta + bulk).abs_diff(10 * RATE) <= 4 * PIECE, "{delta} + {bulk}");
        }
    }

    #[test]
    fn delta_that_stopped_leaves_all_to_bulk_again() {
        let (mut state, begin) = (limited(), Instant::now());
        state.reserve(begin, Class::Delta, PIECE);
        let first = state.reserve(begin, Class::Bulk, PIECE);
        let second = state.reserve(first, Class::Bulk, PIECE);
        assert_eq!(second - first, Duration::from_secs_f64(10.0 * PIECE as f64 / RATE as f64), "a tenth");
        let later = begin + Duration::from_secs(1);
        let third = state.reserve(later, Class::Bulk, PIECE);
        let fourth = state.reserve(later, Class::Bulk, PIECE);
        assert_eq!(fourth - third, Duration::from_secs_f64(PIECE as f64 / RATE as f64), "all of it");
    }

    #[test]
    fn an_idle_time_is_not_saved_up_and_without_a_rate_nothing_waits() {
        let (mut state, begin) = (limited(), Instant::now());
        state.reserve(begin, Class::Delta, RATE);
        let later = begin + Duration::from_secs(3600);
        assert_eq!(state.reserve(later, Class::Delta, RATE), later);
        assert_eq!(state.reserve(later, Class::Delta, RATE), later + Duration::from_secs(1));
        let mut free = State::default();
        assert_eq!(free.reserve(begin, Class::Bulk, u64::MAX), begin);
    }

    #[tokio::test]
    async fn a_wait_of_a_year_ends_by_another_rate() {
        let shaper = std::sync::Arc::new(Shaper::new(Some(1)));
        shaper.pass(Class::Delta, 1 << 25).await;
        let waiting = tokio::spawn({
            let shaper = std::sync::Arc::clone(&shaper);
            async move { shaper.pass(Class::Delta, 1).await }
        });
        tokio::task::yield_now().await;
        shaper.set_rate(None);
        tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap();
        assert_eq!(shaper.rate(), None);
    }
}
