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
    /// When the sequence is durable, everything written before the time is.
    waiting: VecDeque<(Sequence, Timestamp)>,
    /// Something was missed, and the disk is not compared yet.
    doubtful: bool,
}

impl Freshness {
    /// Everything written before `time` is durable.
    pub(crate) fn covers(&mut self, time: Timestamp) {
        if !self.doubtful {
            self.durable_as_of = self.durable_as_of.max(time);
        }
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
            self.covers(time);
        }
    }

    /// The whole disk is read from now on: what was said of sequences to come does not hold any more, and doubts will be over
    /// with it.
    pub(crate) fn begin_pass(&mut self) {
        self.waiting.clear();
        self.doubtful = false;
    }

    /// What was written after `time` may be missing.
    pub(crate) fn set_back(&mut self, time: Timestamp) {
        self.durable_as_of = self.durable_as_of.min(time);
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
        fresh.covers(at(10));
        fresh.streamed(Sequence(5), at(11));
        fresh.streamed(Sequence(7), at(12));
        fresh.streamed(Sequence(7), at(13));
        fresh.durable(Sequence(4));
        assert_eq!(fresh.durable_as_of(), at(10));
        fresh.durable(Sequence(6));
        assert_eq!(fresh.durable_as_of(), at(11));
        fresh.durable(Sequence(7));
        assert_eq!(fresh.age(at(15)), Some(Duration::from_secs(2)), "nothing was written since");
        fresh.covers(at(3));
        assert_eq!(fresh.durable_as_of(), at(13), "an older state changes nothing");
        fresh.set_back(at(8));
        fresh.covers(at(20));
        assert_eq!(fresh.durable_as_of(), at(8), "something was missed since");
        fresh.begin_pass();
        fresh.covers(at(21));
        assert_eq!(fresh.durable_as_of(), at(21), "compared");
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
