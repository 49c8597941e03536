//! A coalescing set of sector ranges: progress of a pass, ranges touched by delta, allocated ranges.
//!
//! Invariants: ranges are non-empty, ascending, and do not touch (`a.end < b.start`), so that equal sets are equal
//! values. Units: sectors. Cost: O(log n) per insert that does not merge.

use std::collections::BTreeMap;

use crate::units::SectorRange;

/// A set of sectors, kept as maximal runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// start → end of each run.
    runs: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { runs: BTreeMap::new() }
    }

    /// Adds every sector of `range`.
    pub fn insert(&mut self, range: SectorRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.runs.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.runs.range(start..=end).next() {
            end = end.max(e);
            self.runs.remove(&s);
        }
        self.runs.insert(start, end);
    }

    /// Removes every sector of `range`.
    pub fn remove(&mut self, range: SectorRange) {
        if range.is_empty() {
            return;
        }
        let mut from = range.start;
        if let Some((&s, &e)) = self.runs.range(..range.start).next_back() {
            if e > range.start {
                self.runs.insert(s, range.start);
            }
            if e > range.end {
                self.runs.insert(range.end, e);
            }
            from = from.max(s);
        }
        while let Some((&s, &e)) = self.runs.range(from.max(range.start)..range.end).next() {
            self.runs.remove(&s);
            if e > range.end {
                self.runs.insert(range.end, e);
            }
        }
    }

    /// Adds all of another set.
    pub fn extend(&mut self, other: &Self) {
        for range in other.iter() {
            self.insert(range);
        }
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = SectorRange> + Clone + '_ {
        self.runs.iter().map(|(&start, &end)| SectorRange { start, end })
    }

    /// The parts of `within` that are in the set, ascending.
    pub fn overlap(&self, within: SectorRange) -> impl Iterator<Item = SectorRange> + '_ {
        let first = self
            .runs
            .range(..=within.start)
            .next_back()
            .filter(|(_, end)| **end > within.start)
            .map_or(within.start, |(start, _)| *start);
        self.runs
            .range(first..within.end.max(first))
            .map(move |(&start, &end)| SectorRange { start, end }.intersect(within))
            .filter(|range| !range.is_empty())
    }

    /// The parts of `within` that are not in the set, ascending.
    #[must_use]
    pub fn missing(&self, within: SectorRange) -> Vec<SectorRange> {
        let mut gaps = Vec::new();
        let mut at = within.start;
        for have in self.overlap(within) {
            if at < have.start {
                gaps.push(SectorRange::new(at, have.start));
            }
            at = have.end;
        }
        if at < within.end {
            gaps.push(SectorRange::new(at, within.end));
        }
        gaps
    }

    /// Whether every sector of `range` is in the set.
    #[must_use]
    pub fn contains(&self, range: SectorRange) -> bool {
        range.is_empty()
            || self.runs.range(..=range.start).next_back().is_some_and(|(_, &end)| end >= range.end)
    }

    /// Number of runs.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// Number of sectors in the set.
    #[must_use]
    pub fn sector_count(&self) -> u64 {
        self.iter().map(SectorRange::len).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// Keeps only the `count` longest runs, so that a message or file of bounded size can carry the set. What is
    /// dropped is merely not remembered.
    pub fn truncate_to_longest(&mut self, count: usize) {
        if self.runs.len() <= count {
            return;
        }
        let mut by_length: Vec<SectorRange> = self.iter().collect();
        by_length.sort_unstable_by_key(|range| (std::cmp::Reverse(range.len()), range.start));
        by_length.truncate(count);
        self.runs = by_length.into_iter().map(|range| (range.start, range.end)).collect();
    }
}

impl FromIterator<SectorRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = SectorRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(SectorRange),
        Remove(SectorRange),
    }

    fn range() -> impl Strategy<Value = SectorRange> {
        (0_u64..200, 0_u64..40).prop_map(|(start, len)| SectorRange::new(start, start + len))
    }

    proptest! {
        #[test]
        fn agrees_with_a_bit_per_sector(ops in proptest::collection::vec(
            prop_oneof![range().prop_map(Op::Insert), range().prop_map(Op::Remove)], 0..60), ask in range()) {
            let mut set = RangeSet::new();
            let mut bits = [false; 256];
            for op in ops {
                match op {
                    Op::Insert(r) => { set.insert(r); bits[r.start as usize..r.end as usize].fill(true); }
                    Op::Remove(r) => { set.remove(r); bits[r.start as usize..r.end as usize].fill(false); }
                }
            }
            let runs: Vec<_> = set.iter().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start), "coalesced: {runs:?}");
            prop_assert!(runs.iter().all(|r| !r.is_empty()));
            let mut seen = [false; 256];
            for r in &runs { seen[r.start as usize..r.end as usize].fill(true); }
            prop_assert_eq!(seen, bits);
            let inside = &bits[ask.start as usize..ask.end as usize];
            prop_assert_eq!(set.contains(ask), inside.iter().all(|b| *b));
            let missing: u64 = set.missing(ask).iter().map(|r| r.len()).sum();
            prop_assert_eq!(missing as usize, inside.iter().filter(|b| !**b).count());
            let overlap: u64 = set.overlap(ask).map(SectorRange::len).sum();
            prop_assert_eq!(overlap as usize, inside.iter().filter(|b| **b).count());
        }
    }

    #[test]
    fn truncation_keeps_the_longest_runs() {
        let mut set: RangeSet = [SectorRange::new(0, 1), SectorRange::new(10, 20), SectorRange::new(30, 33)]
            .into_iter()
            .collect();
        set.truncate_to_longest(2);
        assert_eq!(set.iter().collect::<Vec<_>>(), [SectorRange::new(10, 20), SectorRange::new(30, 33)]);
    }
}
