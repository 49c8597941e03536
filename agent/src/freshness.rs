//! How old the newest state of a disk is that the target holds durably: the recovery point objective, as it is met.
//!
//! Everything that was written before `durable_as_of` is durable at the target. A round tells it when its mark is
//! durable (what it read is not older than its beginning), a point tells its moment, and a stream of every write tells
//! it batch by batch: up to which time everything is handed over, and by which sequence that is durable.
//! Invariants: it is never younger than the truth, so it grows, unless something is found to have been missed: then it is
//! set back, and stays so until the whole disk was compared. Units: nanoseconds by the source's clock. One per disk,
//! owned by `protected`.

use std::collections::VecDeque;
use std::time::Duration;

use reprotect_engine::units::{Sequence, Timestamp};

/// Batches remembered that are not durable; beyond, the oldest is forgotten, and the answer is coarser, not wrong.
const WAITING_MAX: usize = 1024;

/// How fresh the durable state of a disk is.
#[derive(Debug, Default)]
pub(crate) struct Freshness {
    durable_as_of: Timestamp,
    /// What `durable_as_of` was at the latest when a sequence was durable, ascending: for when sequences are lost again.
    reached: VecDeque<(Sequence, Timestamp)>,
    /// When the sequence is durable, everything written before the time is.
    waiting: VecDeque<(Sequence, Timestamp)>,
    /// Something was missed, and the disk is not compared yet.
    doubtful: bool,
}

impl Freshness {
    /// Everything written before `time` is durable, as everything up to `durable` is.
    pub(crate) fn covers(&mut self, durable: Sequence, time: Timestamp) {
        if self.doubtful || time <= self.durable_as_of {
            return;
        }
        self.durable_as_of = time;
        self.reached.push_back((durable, time));
        if self.reached.len() > WAITING_MAX {
            self.reached.pop_front();
        }
    }

    /// Sequences from `from` on were durable, are not any more, and are sent again.
    pub(crate) fn lost(&mut self, from: Sequence) {
        while let Some(known) = self.reached.pop_back_if(|(sequence, _)| *sequence >= from) {
            self.waiting.push_front(known);
        }
        self.durable_as_of = self.reached.back().map_or(Timestamp::ZERO, |(_, time)| *time);
    }

    /// Everything written before `time` has a sequence up to `last`.
    pub(crate) fn streamed(&mut self, last: Sequence, time: Timestamp) {
        match self.waiting.back_mut() {
            Some((known, until)) if *known == last => *until = time,
            _ => self.waiting.push_back((last, time)),
        }
        if self.waiting.len() > WAITING_MAX {
            self.waiting.pop_front();
        }
    }

    /// Everything up to `durable` is.
    pub(crate) fn durable(&mut self, durable: Sequence) {
        while let Some((last, time)) = self.waiting.front().copied()
            && last <= durable
        {
            self.waiting.pop_front();
            self.covers(last, time);
        }
    }

    /// The whole disk is read from now on: what was said of sequences to come does not hold any more, and doubts will be over
    /// with it.
    pub(crate) fn begin_pass(&mut self) {
        self.waiting.clear();
        self.reached.clear();
        self.doubtful = false;
    }

    /// What was written after `time` may be missing.
    pub(crate) fn set_back(&mut self, time: Timestamp) {
        self.durable_as_of = self.durable_as_of.min(time);
        while self.reached.pop_back_if(|(_, known)| *known > time).is_some() {}
        self.doubtful = true;
    }

    /// Everything written before is durable; zero as long as nothing is.
    pub(crate) const fn durable_as_of(&self) -> Timestamp {
        self.durable_as_of
    }

    /// How much would be lost if the source were gone now; `None` as long as there is no whole state at the target.
    pub(crate) fn age(&self, now: Timestamp) -> Option<Duration> {
        (self.durable_as_of != Timestamp::ZERO)
            .then(|| Duration::from_nanos(now.0.saturating_sub(self.durable_as_of.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(seconds * 1_000_000_000)
    }

    #[test]
    fn a_stream_is_as_fresh_as_its_last_durable_batch() {
        let mut fresh = Freshness::default();
        assert_eq!(fresh.age(at(9)), None, "nothing is durable yet");
        fresh.covers(Sequence(4), at(10));
        fresh.streamed(Sequence(5), at(11));
        fresh.streamed(Sequence(7), at(12));
        fresh.streamed(Sequence(7), at(13));
        fresh.durable(Sequence(4));
        assert_eq!(fresh.durable_as_of(), at(10));
        fresh.durable(Sequence(6));
        assert_eq!(fresh.durable_as_of(), at(11));
        fresh.durable(Sequence(7));
        assert_eq!(fresh.age(at(15)), Some(Duration::from_secs(2)), "nothing was written since");
        fresh.covers(Sequence(7), at(3));
        assert_eq!(fresh.durable_as_of(), at(13), "an older state changes nothing");
        fresh.set_back(at(8));
        fresh.covers(Sequence(8), at(20));
        assert_eq!(fresh.durable_as_of(), at(8), "something was missed since");
        fresh.begin_pass();
        fresh.covers(Sequence(9), at(21));
        assert_eq!(fresh.durable_as_of(), at(21), "compared");
    }

    #[test]
    fn what_a_target_lost_is_not_durable_until_it_is_there_again() {
        let mut fresh = Freshness::default();
        fresh.covers(Sequence(4), at(10));
        fresh.covers(Sequence(6), at(12));
        fresh.streamed(Sequence(9), at(15));
        fresh.durable(Sequence(9));
        fresh.streamed(Sequence(11), at(16));
        fresh.lost(Sequence(6));
        assert_eq!(fresh.durable_as_of(), at(10));
        fresh.durable(Sequence(5));
        assert_eq!(fresh.durable_as_of(), at(10));
        fresh.durable(Sequence(9));
        assert_eq!(fresh.durable_as_of(), at(15), "sent again");
        fresh.durable(Sequence(11));
        assert_eq!(fresh.durable_as_of(), at(16));
        fresh.set_back(at(12));
        fresh.lost(Sequence(5));
        assert_eq!(fresh.durable_as_of(), at(10), "also of what was doubtful");
        fresh.lost(Sequence(1));
        assert_eq!(fresh.age(at(20)), None, "there is no state at all");
    }

    #[test]
    fn what_is_forgotten_makes_it_older_and_a_stream_that_ended_says_nothing() {
        let mut fresh = Freshness::default();
        for number in 0..2 * WAITING_MAX as u64 {
            fresh.streamed(Sequence(number), at(number));
        }
        fresh.durable(Sequence(WAITING_MAX as u64 - 1));
        assert_eq!(fresh.durable_as_of(), Timestamp::ZERO);
        fresh.durable(Sequence(WAITING_MAX as u64));
        assert_eq!(fresh.durable_as_of(), at(WAITING_MAX as u64));
        fresh.begin_pass();
        fresh.durable(Sequence(u64::MAX));
        assert_eq!(fresh.durable_as_of(), at(WAITING_MAX as u64));
    }
}
