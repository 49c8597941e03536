//! Bits of changed blocks over memory that others write too: one bit per 4 KiB block of a disk.
//!
//! Invariants: at every moment, also between any two instructions of [`DirtyMap::harvest_into`], a block that was
//! marked and not cleared has its bit in the live map or in the pending map: bits are set there before they are
//! cleared here, and only those that were seen are cleared (I7). So a process killed in the middle forgets
//! nothing, and a mark that races with a harvest is found by it or by the next. Who harvests reads the blocks
//! *after* the harvest returned. Bits beyond the disk are ignored. Units: sectors outside, blocks inside.
//!
//! The words may lie in a file mapping or in memory shared with the kernel; mapping them is not done here.
//! Called by the agent (live and pending map of each disk) and by the simulator.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::{BLOCK_SECTORS, SectorCount, SectorRange};

const WORD_BITS: u64 = u64::BITS as u64;

/// Words a map of a disk of this size needs.
#[must_use]
pub const fn words_for(disk: SectorCount) -> u64 {
    disk.0.div_ceil(BLOCK_SECTORS).div_ceil(WORD_BITS)
}

/// A map in memory of its own, all clean.
///
/// # Panics
/// When the disk is too large for the address space of this machine.
#[must_use]
pub fn new_words(disk: SectorCount) -> Box<[AtomicU64]> {
    (0..words_for(disk)).map(|_| AtomicU64::new(0)).collect()
}

/// The dirty bits of one disk; a view that is cheap to copy and safe to use from many threads.
#[derive(Clone, Copy, Debug)]
pub struct DirtyMap<'a> {
    words: &'a [AtomicU64],
    disk: SectorCount,
}

impl<'a> DirtyMap<'a> {
    /// A view of the bits in `words`, bit `n` of word `w` standing for block `64 w + n`; `None` when there are too
    /// few words for a disk of this size.
    #[must_use]
    pub fn new(words: &'a [AtomicU64], disk: SectorCount) -> Option<Self> {
        let needed = usize::try_from(words_for(disk)).ok()?;
        Some(Self { words: words.get(..needed)?, disk })
    }

    /// Size of the disk.
    #[must_use]
    pub fn disk(&self) -> SectorCount {
        self.disk
    }

    /// Marks every block that `range` touches; what lies beyond the disk is ignored.
    pub fn mark(&self, range: SectorRange) {
        let end = range.end.min(self.disk.0);
        if range.start >= end {
            return;
        }
        self.each_word(range.start / BLOCK_SECTORS, end.div_ceil(BLOCK_SECTORS), |word, mask| {
            // Always written, even where the bit is set: a mark must come after the harvest that clears the bit, or be
            // seen by it, and only a modification has a place in that order.
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Clears the blocks that lie wholly in `range` (the disk's last block may be short): they are durable at the
    /// master target. For pending maps; a live map is only ever cleared by a harvest.
    pub fn clear(&self, range: SectorRange) {
        let first = range.start.div_ceil(BLOCK_SECTORS);
        let last = if range.end >= self.disk.0 {
            self.disk.0.div_ceil(BLOCK_SECTORS)
        } else {
            range.end / BLOCK_SECTORS
        };
        self.each_word(first, last, |word, mask| {
            word.fetch_and(!mask, Ordering::AcqRel);
        });
    }

    /// Moves every bit into `pending` and returns how many blocks were found here, those pending already included.
    ///
    /// # Panics
    /// When the maps are of disks of different size.
    pub fn harvest_into(&self, pending: &DirtyMap<'_>) -> u64 {
        assert_eq!(self.disk, pending.disk, "maps of one disk");
        let mut found = 0;
        for (live, pending) in self.words.iter().zip(pending.words) {
            let seen = live.load(Ordering::Acquire);
            if seen == 0 {
                continue; // most of the map, most of the time: not written to
            }
            pending.fetch_or(seen, Ordering::AcqRel);
            live.fetch_and(!seen, Ordering::AcqRel);
            found += u64::from(seen.count_ones());
        }
        found
    }

    /// Moves every pending bit back into `live`: what was harvested and not made durable is found again.
    ///
    /// # Panics
    /// When the maps are of disks of different size.
    pub fn restore_into(&self, live: &DirtyMap<'_>) -> u64 {
        // The same order of operations protects both directions.
        self.harvest_into(live)
    }

    /// Number of marked blocks.
    #[must_use]
    pub fn count(&self) -> u64 {
        (0..self.words.len()).map(|index| u64::from(self.word(index).count_ones())).sum()
    }

    /// Whether no block is marked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        (0..self.words.len()).all(|index| self.word(index) == 0)
    }

    /// The marked parts of the disk, ascending, coalesced, as whole blocks (the last one cut at the end of the
    /// disk). Bits marked meanwhile may be seen or not.
    pub fn ranges(&self) -> impl Iterator<Item = SectorRange> + 'a {
        let map = *self;
        let mut block = 0;
        std::iter::from_fn(move || {
            let start = map.next_block(block, true)?;
            let end = map.next_block(start, false).unwrap_or(map.words.len() as u64 * WORD_BITS);
            block = end;
            Some(SectorRange {
                start: start * BLOCK_SECTORS,
                end: end.saturating_mul(BLOCK_SECTORS).min(map.disk.0),
            })
        })
    }

    /// The first block at or after `from` whose bit is `marked`.
    fn next_block(&self, from: u64, marked: bool) -> Option<u64> {
        let mut index = usize::try_from(from / WORD_BITS).ok()?;
        let mut mask = u64::MAX << (from % WORD_BITS);
        while index < self.words.len() {
            let word = self.word(index);
            let wanted = if marked { word } else { !word } & mask;
            if wanted != 0 {
                return Some(index as u64 * WORD_BITS + u64::from(wanted.trailing_zeros()));
            }
            index += 1;
            mask = u64::MAX;
        }
        None
    }

    /// A word without the bits beyond the disk.
    fn word(&self, index: usize) -> u64 {
        let Some(word) = self.words.get(index) else { return 0 };
        let value = word.load(Ordering::Acquire);
        let blocks = self.disk.0.div_ceil(BLOCK_SECTORS);
        let inside = blocks.saturating_sub(index as u64 * WORD_BITS);
        if inside >= WORD_BITS { value } else { value & ((1 << inside) - 1) }
    }

    /// Visits the words of the blocks `[first, last)` with the mask of their bits.
    fn each_word(&self, first: u64, last: u64, mut visit: impl FnMut(&AtomicU64, u64)) {
        let mut block = first;
        while block < last {
            let index = block / WORD_BITS;
            let stop = ((index + 1) * WORD_BITS).min(last);
            let mask = (u64::MAX >> (WORD_BITS - (stop - block))) << (block % WORD_BITS);
            let Some(word) = usize::try_from(index).ok().and_then(|index| self.words.get(index)) else {
                return;
            };
            visit(word, mask);
            block = stop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: SectorCount = SectorCount(300 * BLOCK_SECTORS + 3); // 301 blocks, the last one short

    #[derive(Clone, Debug)]
    enum Op {
        Mark(SectorRange),
        Clear(SectorRange),
        Harvest,
        Restore,
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = || {
            (0..DISK.0 + 100, prop_oneof![0..20_u64, 0..1500_u64])
                .prop_map(|(start, len)| SectorRange::new(start, start + len))
        };
        prop_oneof![
            5 => range().prop_map(Op::Mark),
            2 => range().prop_map(Op::Clear),
            1 => Just(Op::Harvest),
            1 => Just(Op::Restore),
        ]
    }

    fn block_range(block: usize) -> SectorRange {
        let start = block as u64 * BLOCK_SECTORS;
        SectorRange::new(start, (start + BLOCK_SECTORS).min(DISK.0))
    }

    fn marked(map: &DirtyMap<'_>) -> [bool; 301] {
        let mut bits = [false; 301];
        for range in map.ranges() {
            bits[(range.start / 8) as usize..range.end.div_ceil(8) as usize].fill(true);
        }
        bits
    }

    proptest! {
        #[test]
        fn behaves_like_two_arrays_of_bits(ops in proptest::collection::vec(op(), 0..40)) {
            let (live_words, pending_words) = (new_words(DISK), new_words(DISK));
            let live = DirtyMap::new(&live_words, DISK).expect("words");
            let pending = DirtyMap::new(&pending_words, DISK).expect("words");
            let (mut live_bits, mut pending_bits) = ([false; 301], [false; 301]);
            for op in ops {
                match op {
                    Op::Mark(range) => {
                        live.mark(range);
                        for (block, bit) in live_bits.iter_mut().enumerate() {
                            *bit |= !block_range(block).intersect(range).is_empty();
                        }
                    }
                    Op::Clear(range) => {
                        pending.clear(range);
                        for (block, bit) in pending_bits.iter_mut().enumerate() {
                            *bit &= !range.contains(block_range(block));
                        }
                    }
                    Op::Harvest => {
                        let found = live.harvest_into(&pending);
                        prop_assert_eq!(found as usize, live_bits.iter().filter(|bit| **bit).count());
                        for (to, from) in pending_bits.iter_mut().zip(&mut live_bits) { *to |= std::mem::take(from); }
                    }
                    Op::Restore => {
                        pending.restore_into(&live);
                        for (to, from) in live_bits.iter_mut().zip(&mut pending_bits) { *to |= std::mem::take(from); }
                    }
                }
                prop_assert_eq!(marked(&live), live_bits);
                prop_assert_eq!(marked(&pending), pending_bits);
                prop_assert_eq!(live.count() as usize, live_bits.iter().filter(|bit| **bit).count());
                prop_assert_eq!(live.is_clean(), live.count() == 0);
                let runs: Vec<_> = live.ranges().collect();
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert!(runs.iter().all(|run| !run.is_empty() && run.end <= DISK.0));
            }
        }
    }

    /// Marks from several threads while a harvester runs: each mark is found by a harvest that ends after it.
    #[test]
    fn no_mark_is_lost_to_a_concurrent_harvest() {
        const THREADS: usize = 3;
        const ROUNDS: u64 = 3000;
        let (live_words, pending_words) = (new_words(DISK), new_words(DISK));
        let live = DirtyMap::new(&live_words, DISK).expect("words");
        let pending = DirtyMap::new(&pending_words, DISK).expect("words");
        // What each "write" put on the disk, written before its mark; neighbours share words on purpose.
        let data: Vec<AtomicU64> = (0..301).map(|_| AtomicU64::new(0)).collect();
        let mut copy = vec![0_u64; 301];
        let take = |copy: &mut Vec<u64>| {
            live.harvest_into(&pending);
            let found: Vec<SectorRange> = pending.ranges().collect();
            for range in found {
                for block in (range.start / 8) as usize..range.end.div_ceil(8) as usize {
                    copy[block] = data[block].load(Ordering::SeqCst);
                }
                pending.clear(range);
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let data = &data;
                    scope.spawn(move || {
                        for round in 1..=ROUNDS {
                            let block = (round as usize * 7 * THREADS + thread) % 300;
                            data[block].store(round, Ordering::SeqCst);
                            live.mark(block_range(block));
                        }
                    })
                })
                .collect();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                take(&mut copy);
            }
        });
        take(&mut copy);
        let now: Vec<u64> = data.iter().map(|value| value.load(Ordering::SeqCst)).collect();
        assert_eq!(copy, now);
        assert!(live.is_clean() && pending.is_clean());
    }

    /// Whoever dies in the middle of a harvest leaves every bit in at least one of the maps.
    #[test]
    fn every_bit_is_in_one_of_the_maps_at_every_moment_of_a_harvest() {
        let disk = SectorCount(1000 * WORD_BITS * BLOCK_SECTORS);
        for _ in 0..50 {
            let (live_words, pending_words) = (new_words(disk), new_words(disk));
            let live = DirtyMap::new(&live_words, disk).expect("words");
            let pending = DirtyMap::new(&pending_words, disk).expect("words");
            live.mark(SectorRange::new(0, disk.0));
            std::thread::scope(|scope| {
                let harvester = scope.spawn(|| live.harvest_into(&pending));
                loop {
                    let finished = harvester.is_finished();
                    for (live, pending) in live_words.iter().zip(&pending_words) {
                        // Live first: a bit on its way is then seen in pending.
                        let seen = live.load(Ordering::SeqCst);
                        assert_eq!(seen | pending.load(Ordering::SeqCst), u64::MAX);
                    }
                    if finished {
                        break;
                    }
                }
            });
        }
    }

    #[test]
    fn a_slice_too_short_is_refused_and_bits_beyond_the_disk_are_ignored() {
        let words = new_words(DISK);
        assert!(DirtyMap::new(&words[1..], DISK).is_none());
        words[4].store(u64::MAX, Ordering::SeqCst);
        let map = DirtyMap::new(&words, DISK).expect("words");
        assert_eq!(map.count(), 301 - 256);
        assert_eq!(map.ranges().collect::<Vec<_>>(), [SectorRange::new(256 * 8, DISK.0)]);
        assert_eq!(words_for(SectorCount(0)), 0);
        assert!(DirtyMap::new(&[], SectorCount(0)).expect("empty").is_clean());
    }
}
