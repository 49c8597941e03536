//! An apply window: the writes of several entries, coalesced into sorted runs that do not overlap.
//!
//! Invariants: of two writes to one sector the later one stays; runs ascend and touch nowhere inside each other; bytes
//! are shared, not copied. Units: sectors. Called by the applier and by views.

use std::collections::BTreeMap;

use super::entry::{Content, Cut, Write};
use crate::units::{BLOCK_SECTORS, SectorRange};

/// Coalesced writes, of bytes or of what tells where they are.
#[derive(Debug)]
pub struct Window<C = Content> {
    /// By first sector.
    runs: BTreeMap<u64, Write<C>>,
    bytes: u64,
}

impl<C> Default for Window<C> {
    fn default() -> Self {
        Self { runs: BTreeMap::new(), bytes: 0 }
    }
}

impl<C: Cut> Window<C> {
    /// Puts a write over what is there.
    pub fn put(&mut self, write: Write<C>) {
        if write.range.is_empty() {
            return;
        }
        self.cut(write.range);
        self.bytes += write.range.bytes();
        self.runs.insert(write.range.start, write);
    }

    /// Removes a range from the runs.
    fn cut(&mut self, range: SectorRange) {
        let mut overlapping = Vec::new();
        for (start, run) in self.runs.range(..range.end).rev() {
            if run.range.end <= range.start {
                break; // runs do not overlap, so those before it end even earlier
            }
            overlapping.push(*start);
        }
        for start in overlapping {
            let Some(run) = self.runs.remove(&start) else { continue };
            self.bytes -= run.range.bytes();
            for rest in [
                SectorRange { start: run.range.start, end: range.start.max(run.range.start) },
                SectorRange { start: range.end.min(run.range.end), end: run.range.end },
            ] {
                if !rest.is_empty() {
                    self.bytes += rest.bytes();
                    self.runs.insert(rest.start, run.part(rest));
                }
            }
        }
    }

    /// Puts everything of another window over what is there.
    pub fn append(&mut self, later: Self) {
        if self.runs.is_empty() {
            *self = later;
            return;
        }
        for write in later.runs.into_values() {
            self.put(write);
        }
    }

    /// Whether it writes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = &Write<C>> {
        self.runs.values()
    }

    /// The parts of the runs inside `range`, ascending.
    pub fn overlap(&self, range: SectorRange) -> impl Iterator<Item = Write<C>> + '_ {
        let before = self.runs.range(..range.start).next_back().map(|(_, run)| run);
        before
            .into_iter()
            .chain(self.runs.range(range.start..range.end).map(|(_, run)| run))
            .filter(move |run| !run.range.intersect(range).is_empty())
            .map(move |run| run.part(range))
    }

    /// The blocks that are touched, as runs of sectors aligned to blocks, ascending and joined.
    #[must_use]
    pub fn blocks(&self) -> Vec<SectorRange> {
        let mut blocks: Vec<SectorRange> = Vec::new();
        for run in self.runs.values() {
            let start = run.range.start / BLOCK_SECTORS * BLOCK_SECTORS;
            let end = run.range.end.next_multiple_of(BLOCK_SECTORS);
            match blocks.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => blocks.push(SectorRange { start, end }),
            }
        }
        blocks
    }

    /// Bytes of all runs.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::SECTOR_BYTES;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn later_writes_win_sector_by_sector(
            writes in proptest::collection::vec((0..60_u64, 1..20_u64, any::<bool>()), 0..40),
        ) {
            let mut window = Window::default();
            let mut model = [None; 80];
            for (version, (start, len, zeros)) in (1_u8..).zip(&writes) {
                let range = SectorRange::new(*start, start + len);
                let data = vec![version; range.bytes() as usize];
                let content = if *zeros { Content::Zeros } else { Content::Data(data.into()) };
                window.put(Write { range, content });
                model[*start as usize..(start + len) as usize].fill(Some(if *zeros { 0 } else { version }));
            }
            let mut found = [None; 80];
            let mut at = 0;
            for run in window.overlap(SectorRange::new(0, 80)) {
                prop_assert!(run.range.start >= at);
                at = run.range.end;
                for sector in run.range.start..run.range.end {
                    let byte = match &run.content {
                        Content::Zeros => 0,
                        Content::Data(data) => data[((sector - run.range.start) * SECTOR_BYTES) as usize],
                    };
                    found[sector as usize] = Some(byte);
                }
            }
            prop_assert_eq!(&found[..], &model[..]);
            let touched = model.iter().filter(|sector| sector.is_some()).count() as u64;
            prop_assert_eq!(window.bytes(), touched * SECTOR_BYTES);
            for block in window.blocks() {
                prop_assert!(block.start.is_multiple_of(BLOCK_SECTORS) && block.end.is_multiple_of(BLOCK_SECTORS));
            }
        }
    }
}
