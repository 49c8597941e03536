//! How fast data may leave: a rate for the data of several connections together, of which bulk keeps a tenth.
//!
//! | what waits | delta has | bulk has |
//! |---|---|---|
//! | delta more than nine tenths of the rate, and bulk | nine tenths | a tenth |
//! | otherwise | what it wants | what is left |
//!
//! Control frames are not counted and never wait. Without a rate nothing waits here.
//!
//! Invariants: a piece reserves its share of time before it leaves, so the mean never passes the rate, however many lanes
//! there are; after an idle time nothing is owed and nothing saved up; a changed rate holds at once, also for who waits.
//! Units: bytes, bytes per second. Called by `lanes`; the rate is set by the daemons.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Bytes that are reserved at a time: what leaves in so long, for so long one lane holds up another.
const PIECE: Duration = Duration::from_millis(10);
const PIECE_BYTES_MIN: u64 = 4 << 10;
const PIECE_BYTES_MAX: u64 = 64 << 10;
/// Of the rate, bulk has this part while delta wants more than there is.
const BULK_PART: u32 = 10;
/// What may leave so soon leaves now: clocks are no finer.
const AT_ONCE: Duration = Duration::from_millis(2);
/// A waker comes late; so much of that is made up for.
const LATE: Duration = Duration::from_millis(5);

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
    /// The same of delta alone, at nine tenths of the rate: delta wants more than that as long as this lies ahead.
    delta_free_at: Option<Instant>,
    /// When bulk may have its next part meanwhile.
    bulk_free_at: Option<Instant>,
}

impl State {
    /// Reserves `bytes` at `now`: when they may leave.
    fn reserve(&mut self, now: Instant, class: Class, bytes: u64) -> Instant {
        let Some(rate) = self.bytes_per_second else { return now };
        let span = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let later = |at: Option<Instant>| at.map_or(now, |at| at.max(now));
        let forgiven =
            |at: Option<Instant>| at.map_or(now, |at| at.max(now.checked_sub(LATE).unwrap_or(now)));
        let line = forgiven(self.free_at);
        let is_contended = self.delta_free_at.is_some_and(|at| at > now);
        let start = match class {
            Class::Delta => {
                let own = span.saturating_mul(BULK_PART) / (BULK_PART - 1);
                self.delta_free_at = later(self.delta_free_at).checked_add(own);
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

    fn piece_bytes(&self) -> Option<usize> {
        let bytes = (self.bytes_per_second? as f64 * PIECE.as_secs_f64()) as u64;
        Some(bytes.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX) as usize)
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

    /// Bytes that are best let pass together; `None` where nothing is limited.
    pub(super) fn piece_bytes(&self) -> Option<usize> {
        self.lock().piece_bytes()
    }

    /// Waits until `bytes` may leave. Given up, what it reserved is not given back: the next waits a little longer.
    pub async fn pass(&self, class: Class, bytes: usize) {
        loop {
            let changed = self.changed.notified();
            let start = self.lock().reserve(Instant::now(), class, bytes as u64);
            if start.saturating_duration_since(Instant::now()) <= AT_ONCE {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(start.into()) => return,
                // At another rate it is paid anew.
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

    const PIECE: u64 = PIECE_BYTES_MAX;
    const RATE: u64 = 10 << 20;

    fn limited() -> State {
        State { bytes_per_second: Some(RATE), ..State::default() }
    }

    /// Lanes that always have more, each with one piece at a time, and delta that is `trickle` bytes every 150 ms; answers the
    /// bytes of delta and of bulk in so many seconds.
    fn play(rate: u64, (deltas, bulks): (usize, usize), trickle: u64, seconds: u64) -> (u64, u64) {
        let mut state = State { bytes_per_second: Some(rate), ..State::default() };
        let (begin, piece) = (Instant::now(), state.piece_bytes().unwrap() as u64);
        let mut lanes: Vec<(Class, u64, Instant)> = std::iter::repeat_n((Class::Delta, piece, begin), deltas)
            .chain(std::iter::repeat_n((Class::Bulk, piece, begin), bulks))
            .collect();
        lanes.extend((trickle > 0).then_some((Class::Delta, trickle, begin)));
        let (mut delta, mut bulk) = (0, 0);
        loop {
            let lane = (0..lanes.len()).min_by_key(|lane| lanes[*lane].2).unwrap();
            let (class, bytes, now) = lanes[lane];
            if now >= begin + Duration::from_secs(seconds) {
                return (delta, bulk);
            }
            // It comes again once its piece has left; a lane that never waited would never end.
            let left = state.reserve(now, class, bytes).max(now + Duration::from_nanos(1));
            let is_trickle = trickle > 0 && lane + 1 == lanes.len();
            lanes[lane].2 = if is_trickle { left.max(now + Duration::from_millis(150)) } else { left };
            match class {
                Class::Delta => delta += bytes,
                Class::Bulk => bulk += bytes,
            }
        }
    }

    #[test]
    fn all_lanes_together_keep_to_the_rate_and_bulk_has_a_tenth_of_it_whatever_the_rate() {
        for rate in [250_000, RATE, 125_000_000] {
            for lanes in [(1, 1), (1, 8), (20, 1), (16, 16)] {
                let (delta, bulk) = play(rate, lanes, 0, 20);
                let slack = (lanes.0 + lanes.1 + 2) as u64 * PIECE;
                assert!((delta + bulk).abs_diff(20 * rate) <= slack, "{rate} {lanes:?}: {delta} + {bulk}");
                let share = bulk as f64 / (delta + bulk) as f64;
                assert!((0.08..=0.12).contains(&share), "{rate} {lanes:?}: bulk has {share}");
            }
        }
    }

    #[test]
    fn whoever_is_alone_has_all_of_it_and_what_a_trickle_of_delta_leaves_is_bulks() {
        for (lanes, trickle) in [((3, 0), 0), ((0, 3), 0), ((0, 3), 4096), ((0, 1), 4096)] {
            let (delta, bulk) = play(RATE, lanes, trickle, 10);
            assert!(
                (delta + bulk).abs_diff(10 * RATE) <= 4 * PIECE,
                "{lanes:?}, {trickle}: {delta} + {bulk}"
            );
            assert!(trickle == 0 || delta >= 60 * trickle, "{lanes:?}, {trickle}: delta waits, {delta}");
        }
        // Behind bursts of delta bulk waits a little longer than it had to, for it knows no end of them.
        let (delta, bulk) = play(RATE, (0, 1), 100_000, 10);
        assert!(delta >= 6_000_000 && delta + bulk >= 10 * RATE * 3 / 4, "{delta} + {bulk}");
    }

    #[test]
    fn delta_that_stopped_leaves_all_to_bulk_again() {
        let (mut state, begin) = (limited(), Instant::now());
        state.reserve(begin, Class::Delta, RATE);
        let first = state.reserve(begin, Class::Bulk, PIECE);
        let second = state.reserve(first, Class::Bulk, PIECE);
        assert_eq!(second - first, Duration::from_secs_f64(10.0 * (PIECE as f64 / RATE as f64)), "a tenth");
        let later = begin + Duration::from_secs(20);
        let third = state.reserve(later, Class::Bulk, PIECE);
        let fourth = state.reserve(third, Class::Bulk, PIECE);
        assert!(fourth - third <= Duration::from_secs_f64(PIECE as f64 / RATE as f64), "all of it");
    }

    #[test]
    fn an_idle_time_is_not_saved_up_and_without_a_rate_nothing_waits() {
        let (mut state, begin) = (limited(), Instant::now());
        state.reserve(begin, Class::Delta, RATE);
        let later = begin + Duration::from_secs(3600);
        let begun = state.reserve(later, Class::Delta, RATE);
        assert!(begun <= later && later - begun <= LATE);
        assert_eq!(state.reserve(later, Class::Delta, RATE), begun + Duration::from_secs(1));
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
