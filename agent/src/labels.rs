//! The times that streamed batches of a machine carry.
//!
//! A time between two points is looked up on each disk by the labels of its batches. A clock that is set back between them
//! would give what one disk wrote later the older label, and a state of the machine would have it without what another
//! disk wrote before. So between two points of all disks labels ascend over all of them; with each point they start anew from the
//! clock, whose own steps the target shows (points have the time that the clock said).
//!
//! Invariants: between two points no label is before one that was given out. Units: times by the source's clock. Called by
//! `following` and `marking`.

use reprotect_engine::units::Timestamp;

/// The newest label since the last point of all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Labels {
    newest: Timestamp,
}

impl Labels {
    /// The label of what is sent at this time.
    pub(crate) fn at(&mut self, now: Timestamp) -> Timestamp {
        self.newest = self.newest.max(now);
        self.newest
    }

    /// A point of all disks stands behind everything that was labelled.
    pub(crate) fn restart(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_between_two_points_makes_no_label_older_and_with_the_next_point_it_counts() {
        let mut labels = Labels::default();
        let given: Vec<u64> = [10, 20, 15, 19, 21, 3].map(|now| labels.at(Timestamp(now)).0).into();
        assert_eq!(given, [10, 20, 20, 20, 21, 21]);
        labels.restart();
        assert_eq!(labels.at(Timestamp(4)), Timestamp(4));
    }
}
