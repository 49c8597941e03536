//! Which blocks an undo run holds and where: the index in memory of a run that is being written, or whose index on disk
//! is damaged.
//!
//! Invariants: entries do not overlap (I2: a block is captured once); 16 bytes an entry in one sorted vector, plus a
//! small ordered map of the newest ones, which is merged in once it is a sixteenth of the vector: ten million entries
//! take about 180 MB, and an insertion moves about 16 entries on average. Units: blocks and bytes.
//! Called by the runs of this folder.

use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;

use crate::format::undo::BlockRange;
use crate::format::undo::frame::{EMPTY_FRAME_BLOCKS_MAX, FRAME_ALIGN_BYTES, UndoCodec};
use crate::format::undo::index::IndexEntry;

/// The ordered map is never merged before it has this many entries.
const RECENT_MIN: usize = 4096;
/// The ordered map is merged once it has this part of the vector's entries.
const RECENT_PART: usize = 16;
/// Every so many entries of the vector, the first block stands in a vector of its own, which fits the processor's cache:
/// with ten million entries a lookup touches two pages of memory instead of twenty.
const FENCE_EVERY: usize = 256;

const FIRST_SHIFT: u32 = 28;
const COUNT_SHIFT: u32 = 4;
const COUNT_MASK: u64 = (1 << (FIRST_SHIFT - COUNT_SHIFT)) - 1;
const _: () = {
    assert!(crate::format::undo::DISK_BLOCKS_MAX <= 1 << (64 - FIRST_SHIFT));
    assert!(EMPTY_FRAME_BLOCKS_MAX <= COUNT_MASK);
    assert!(crate::format::undo::RUN_BYTES_MAX / FRAME_ALIGN_BYTES <= 1 << 48);
};

/// An entry in 16 bytes; ordered by its first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed {
    /// First block, number of blocks, codec.
    key: u64,
    /// Place in the file and length of the frame, both in units of eight bytes.
    place: u64,
}

impl Packed {
    fn new(entry: &IndexEntry) -> Self {
        let count = u64::from(entry.block_count);
        Self {
            key: (entry.first_block << FIRST_SHIFT) | (count << COUNT_SHIFT) | entry.codec as u64,
            place: ((entry.offset / FRAME_ALIGN_BYTES) << 16) | u64::from(entry.frame_units),
        }
    }

    const fn start(self) -> u64 {
        self.key >> FIRST_SHIFT
    }

    const fn end(self) -> u64 {
        self.start() + ((self.key >> COUNT_SHIFT) & COUNT_MASK)
    }

    fn entry(self) -> IndexEntry {
        let codec = match self.key & 3 {
            0 => UndoCodec::Zeros,
            1 => UndoCodec::Raw,
            2 => UndoCodec::Zstd,
            _ => UndoCodec::Lost,
        };
        IndexEntry {
            first_block: self.start(),
            offset: (self.place >> 16) * FRAME_ALIGN_BYTES,
            block_count: ((self.key >> COUNT_SHIFT) & COUNT_MASK) as u32,
            frame_units: self.place as u16,
            codec,
        }
    }
}

/// The index of a run in memory.
#[derive(Clone, Debug, Default)]
pub struct RunIndex {
    settled: Vec<Packed>,
    /// First block of every [`FENCE_EVERY`]th settled entry.
    fences: Vec<u64>,
    recent: BTreeMap<u64, u64>,
    blocks: u64,
    data_blocks: u64,
    lost_blocks: u64,
}

impl RunIndex {
    /// An empty index.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            settled: Vec::new(),
            fences: Vec::new(),
            recent: BTreeMap::new(),
            blocks: 0,
            data_blocks: 0,
            lost_blocks: 0,
        }
    }

    /// Adds an entry.
    ///
    /// # Panics
    /// In debug builds, when one of its blocks is in the index already: callers ask [`Self::is_free`] first.
    pub fn insert(&mut self, entry: &IndexEntry) {
        debug_assert!(self.is_free(entry.blocks()), "{} are captured twice", entry.blocks());
        let packed = Packed::new(entry);
        self.recent.insert(packed.key, packed.place);
        let count = u64::from(entry.block_count);
        self.blocks += count;
        self.data_blocks += if entry.codec.has_payload() { count } else { 0 };
        self.lost_blocks += if entry.codec == UndoCodec::Lost { count } else { 0 };
        if self.recent.len() >= RECENT_MIN.max(self.settled.len() / RECENT_PART) {
            self.settle();
        }
    }

    /// Merges the newest entries into the vector, from the back, in place.
    fn settle(&mut self) {
        let mut from = self.settled.len();
        self.settled.reserve_exact(self.recent.len());
        self.settled.resize(from + self.recent.len(), Packed { key: 0, place: 0 });
        let mut to = self.settled.len();
        for (&key, &place) in self.recent.iter().rev() {
            while from > 0 && self.settled[from - 1].key > key {
                from -= 1;
                to -= 1;
                self.settled[to] = self.settled[from];
            }
            to -= 1;
            self.settled[to] = Packed { key, place };
        }
        debug_assert_eq!(from, to);
        self.recent.clear();
        self.fences.clear();
        self.fences.extend(self.settled.iter().step_by(FENCE_EVERY).map(|packed| packed.start()));
    }

    /// Number of the first settled entry that ends behind block `first`.
    fn settled_from(&self, first: u64) -> usize {
        let piece = self.fences.partition_point(|start| *start <= first);
        // Everything before the piece ends before its first entry begins, and everything behind it begins later.
        let start = piece.saturating_sub(1) * FENCE_EVERY;
        let end = (piece * FENCE_EVERY).min(self.settled.len());
        start + self.settled[start..end].partition_point(|packed| packed.end() <= first)
    }

    /// The entries that touch `range`, ascending.
    pub fn overlap(&self, range: BlockRange) -> impl Iterator<Item = IndexEntry> + '_ {
        self.from(range.start)
            .take_while(move |entry| entry.first_block < range.end)
            .filter(move |_| !range.is_empty())
    }

    /// The entries that end behind block `first`, ascending.
    pub fn from(&self, first: u64) -> Entries<'_> {
        let at = self.settled_from(first);
        let key = first << FIRST_SHIFT;
        let before = self.recent.range(..key).next_back().map(|(key, _)| *key);
        let start = before.filter(|key| Packed { key: *key, place: 0 }.end() > first).unwrap_or(key);
        Entries {
            settled: self.settled[at..].iter().peekable(),
            recent: self.recent.range(start..).peekable(),
        }
    }

    /// Whether no block of `range` is in the index.
    #[must_use]
    pub fn is_free(&self, range: BlockRange) -> bool {
        self.overlap(range).next().is_none()
    }

    /// Whether every block of `range` is in the index.
    #[must_use]
    pub fn contains(&self, range: BlockRange) -> bool {
        self.missing(range).is_empty()
    }

    /// The parts of `range` that are not in the index, ascending.
    #[must_use]
    pub fn missing(&self, range: BlockRange) -> Vec<BlockRange> {
        let (mut gaps, mut at) = (Vec::new(), range.start);
        for entry in self.overlap(range) {
            if at < entry.first_block {
                gaps.push(BlockRange::new(at, entry.first_block));
            }
            at = entry.blocks().end;
        }
        if at < range.end {
            gaps.push(BlockRange::new(at, range.end));
        }
        gaps
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> u64 {
        (self.settled.len() + self.recent.len()) as u64
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of blocks: all, those with a payload, those that are lost.
    #[must_use]
    pub const fn block_counts(&self) -> (u64, u64, u64) {
        (self.blocks, self.data_blocks, self.lost_blocks)
    }

    /// From the first block to one past the last.
    #[must_use]
    pub fn span(&self) -> BlockRange {
        let start = self.from(0).next().map_or(0, |entry| entry.first_block);
        let settled = self.settled.last().map_or(start, |packed| packed.end());
        let recent =
            self.recent.last_key_value().map_or(start, |(key, _)| Packed { key: *key, place: 0 }.end());
        BlockRange::new(start, settled.max(recent))
    }

    /// Bytes of memory the index takes, the ordered map estimated by its nodes at two thirds full.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        const NODE_BYTES_PER_ENTRY: usize = 28;
        self.settled.capacity() * size_of::<Packed>()
            + self.fences.capacity() * size_of::<u64>()
            + self.recent.len() * NODE_BYTES_PER_ENTRY
    }
}

/// Entries of a [`RunIndex`], ascending.
#[derive(Debug)]
pub struct Entries<'a> {
    settled: Peekable<std::slice::Iter<'a, Packed>>,
    recent: Peekable<btree_map::Range<'a, u64, u64>>,
}

impl Iterator for Entries<'_> {
    type Item = IndexEntry;

    fn next(&mut self) -> Option<IndexEntry> {
        let settled_first = match (self.settled.peek(), self.recent.peek()) {
            (Some(settled), Some((key, _))) => settled.key < **key,
            (settled, _) => settled.is_some(),
        };
        let packed = if settled_first {
            *self.settled.next()?
        } else {
            let (&key, &place) = self.recent.next()?;
            Packed { key, place }
        };
        Some(packed.entry())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(first_block: u64, block_count: u32, codec: UndoCodec) -> IndexEntry {
        IndexEntry { first_block, offset: 8192 + first_block * 8, block_count, frame_units: 9, codec }
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_from_block_to_entry(
            adds in proptest::collection::vec((0..400_u64, 1..9_u32, 0..4_u8), 0..80),
            settle_every in 1..20_usize, ask in (0..420_u64, 0..60_u64),
        ) {
            let (mut index, mut model) = (RunIndex::new(), BTreeMap::new());
            for (at, (first, count, codec)) in adds.into_iter().enumerate() {
                let entry = entry(first, count, UndoCodec::ALL[usize::from(codec)]);
                let blocks = entry.blocks();
                let free = (blocks.start..blocks.end).all(|block| !model.contains_key(&block));
                prop_assert_eq!(index.is_free(blocks), free);
                if free {
                    index.insert(&entry);
                    model.extend((blocks.start..blocks.end).map(|block| (block, entry)));
                }
                if at % settle_every == 0 {
                    index.settle();
                }
            }
            let ask = BlockRange::new(ask.0, ask.0 + ask.1);
            let expected: Vec<IndexEntry> = {
                let mut found: Vec<IndexEntry> = model.range(ask.start..ask.end).map(|(_, entry)| *entry).collect();
                found.dedup();
                found
            };
            prop_assert_eq!(index.overlap(ask).collect::<Vec<_>>(), expected);
            let missing: Vec<u64> = index.missing(ask).iter().flat_map(|gap| gap.start..gap.end).collect();
            let absent: Vec<u64> = (ask.start..ask.end).filter(|block| !model.contains_key(block)).collect();
            prop_assert_eq!(index.contains(ask), absent.is_empty());
            prop_assert_eq!(missing, absent);
            prop_assert_eq!(index.block_counts().0, model.len() as u64);
            let span = match (model.first_key_value(), model.last_key_value()) {
                (Some((first, _)), Some((last, _))) => BlockRange::new(*first, last + 1),
                _ => BlockRange::default(),
            };
            prop_assert_eq!(index.span(), span);
        }
    }

    #[test]
    fn the_largest_values_survive_packing() {
        let largest = IndexEntry {
            first_block: crate::format::undo::DISK_BLOCKS_MAX - EMPTY_FRAME_BLOCKS_MAX,
            offset: crate::format::undo::RUN_BYTES_MAX - 8,
            block_count: EMPTY_FRAME_BLOCKS_MAX as u32,
            frame_units: u16::MAX,
            codec: UndoCodec::Lost,
        };
        assert_eq!(Packed::new(&largest).entry(), largest);
    }

    #[test]
    fn lookups_agree_with_a_search_through_everything_across_fences() {
        let mut index = RunIndex::new();
        for at in 0..4 * FENCE_EVERY as u64 {
            index.insert(&entry(at * 7 + at % 3, 1 + (at % 4) as u32, UndoCodec::Raw));
            if at == 3 * FENCE_EVERY as u64 {
                index.settle();
            }
        }
        let all: Vec<IndexEntry> = index.from(0).collect();
        assert_eq!(all.len(), 4 * FENCE_EVERY);
        for first in 0..4 * 7 * FENCE_EVERY as u64 + 20 {
            let expected = all.iter().find(|entry| entry.blocks().end > first);
            assert_eq!(index.from(first).next().as_ref(), expected, "{first}");
        }
    }

    #[test]
    fn many_entries_take_little_more_than_sixteen_bytes_each() {
        let mut index = RunIndex::new();
        for at in 0..200_000_u64 {
            index.insert(&entry(at.wrapping_mul(0x9E37_79B9) % (1 << 32) * 4, 1, UndoCodec::Raw));
        }
        assert_eq!(index.len(), 200_000);
        let bytes = index.memory_bytes() as u64 / index.len();
        assert!((16..=19).contains(&bytes), "{bytes} bytes an entry");
    }
}
