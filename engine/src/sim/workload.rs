//! The source disks: what they hold, who wrote it, and the stream of writes.
//!
//! Invariants: every sector's content is derived from the write that put it there (`content`), so that the checker
//! can tell which write a sector holds; write ids count up per disk and 0 is what was there at the beginning.
//! Units: sectors. Called by `sim::agent` (reads), `sim::world` (writes) and `sim::checker`.

use bytes::Bytes;

use super::hashes::Hashes;
use super::rng::{Rng, mix};
use crate::checksum::{UnitHash, is_zero};
use crate::units::{SECTOR_BYTES, SectorRange};

/// What a write put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteKind {
    /// Data that compress well or not at all.
    Data,
    /// Zeros.
    Zero,
    /// A discard, which reads as zeros.
    Discard,
}

/// Write id of what a target held before it was protected.
pub(super) const OLD_TARGET: u64 = u64::MAX;
/// Write id of what a target held that differs from the source's first content and has the same CRC-32 all the same.
pub(super) const COLLIDES: u64 = u64::MAX - 1;

/// A source disk.
#[derive(Debug)]
pub(super) struct Source {
    salt: u64,
    /// Its size in sectors.
    pub(super) sectors: u64,
    bytes: Vec<u8>,
    hashes: Hashes,
    /// Kind of each write; index 0 stands for the first content.
    kinds: Vec<WriteKind>,
    /// The writes that touched each sector, ascending; begins with 0.
    history: Vec<Vec<u64>>,
}

impl Source {
    /// A disk of `sectors` with some content.
    pub(super) fn new(salt: u64, sectors: u64) -> Self {
        let mut source = Self {
            salt,
            sectors,
            bytes: vec![0; (sectors * SECTOR_BYTES) as usize],
            hashes: Hashes::default(),
            kinds: vec![WriteKind::Data],
            history: vec![vec![0]; sectors as usize],
        };
        for sector in 0..sectors {
            source.put(0, sector);
        }
        source
    }

    /// What a target may hold before it is protected: partly equal, partly older, partly foreign, partly such that only
    /// a hash tells it from the source.
    pub(super) fn old_target(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for sector in 0..self.sectors {
            match mix(self.salt ^ (sector / 24)) % 4 {
                0 => bytes[span(sector)].fill(0),
                1 => bytes[span(sector)].copy_from_slice(&self.content(OLD_TARGET, sector)),
                2 if sector.is_multiple_of(8) => {
                    bytes[span(sector)].copy_from_slice(&self.content(COLLIDES, sector));
                }
                _ => {}
            }
        }
        bytes
    }

    /// The newest write's id.
    pub(super) const fn newest(&self) -> u64 {
        self.kinds.len() as u64 - 1
    }

    /// Applies a write and answers its id.
    pub(super) fn write(&mut self, range: SectorRange, kind: WriteKind) -> u64 {
        self.kinds.push(kind);
        let id = self.newest();
        self.hashes.changed(range);
        for sector in range.start..range.end {
            self.put(id, sector);
            self.history[sector as usize].push(id);
        }
        id
    }

    fn put(&mut self, id: u64, sector: u64) {
        let content = self.content(id, sector);
        self.bytes[span(sector)].copy_from_slice(&content);
    }

    /// The bytes of a run now.
    pub(super) fn read(&self, range: SectorRange) -> &[u8] {
        let from = range.byte_start() as usize;
        &self.bytes[from..from + range.bytes() as usize]
    }

    /// The bytes of a run as a write left it.
    pub(super) fn read_as_of(&self, range: SectorRange, write: u64) -> Bytes {
        let newest = |sector: u64| {
            let mut history = self.history(sector).iter().rev();
            history.find(|id| **id <= write).copied().unwrap_or(0)
        };
        (range.start..range.end).flat_map(|sector| self.content(newest(sector), sector)).collect()
    }

    /// The hash of every unit of a chunk now.
    pub(super) fn unit_hashes(&mut self, chunk: SectorRange) -> Vec<UnitHash> {
        let from = chunk.byte_start() as usize;
        self.hashes.of_units(chunk, &self.bytes[from..from + chunk.bytes() as usize])
    }

    /// All bytes now.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The writes that touched a sector, ascending.
    pub(super) fn history(&self, sector: u64) -> &[u64] {
        &self.history[sector as usize]
    }

    /// What write `id` left in `sector`.
    pub(super) fn content(&self, id: u64, sector: u64) -> [u8; SECTOR_BYTES as usize] {
        let mut out = [0; SECTOR_BYTES as usize];
        if id == COLLIDES {
            out = self.content(0, sector);
            collide(&mut out);
            return out;
        }
        match self.stamp(id, sector) {
            None => {}
            Some((stamp, noisy)) => {
                for (index, word) in out.chunks_exact_mut(8).enumerate() {
                    word.copy_from_slice(&word_of(stamp, noisy, index).to_le_bytes());
                }
            }
        }
        out
    }

    /// Whether `held` is what write `id` left in `sector`; mostly the first word tells.
    pub(super) fn left(&self, id: u64, sector: u64, held: &[u8]) -> bool {
        if id == COLLIDES {
            return held == self.content(id, sector);
        }
        match self.stamp(id, sector) {
            None => is_zero(held),
            Some((stamp, noisy)) => held
                .chunks_exact(8)
                .enumerate()
                .all(|(index, word)| word == word_of(stamp, noisy, index).to_le_bytes()),
        }
    }

    /// What a sector's words are made of as write `id` left it, and whether each is another; `None` for zeros.
    fn stamp(&self, id: u64, sector: u64) -> Option<(u64, bool)> {
        let zero = match id {
            0 => mix(self.salt ^ (sector / 200)).is_multiple_of(2),
            OLD_TARGET => false,
            _ => self.kinds[id as usize] != WriteKind::Data,
        };
        let stamp = mix(self.salt ^ id.wrapping_mul(0x1_0000_0001)) ^ mix(sector);
        (!zero).then_some((stamp, id % 3 == 1))
    }
}

const fn word_of(stamp: u64, noisy: bool, index: usize) -> u64 {
    if noisy { mix(stamp ^ index as u64) } else { stamp }
}

/// Changes data to others of the same length with the same CRC-32: a multiple of its polynomial is added.
fn collide(data: &mut [u8]) {
    // The 33 bits of the polynomial, as the reflected algorithm takes them: from the lowest bit of each byte on.
    let polynomial = (u64::from(0xedb8_8320_u32) << 1 | 1).to_le_bytes();
    data.iter_mut().zip(polynomial).for_each(|(byte, change)| *byte ^= change);
}

/// The bytes of a sector.
pub(super) fn span(sector: u64) -> std::ops::Range<usize> {
    let from = (sector * SECTOR_BYTES) as usize;
    from..from + SECTOR_BYTES as usize
}

/// The next write: often to the same few places, so that order matters.
pub(super) fn next_write(rng: &mut Rng, sectors: u64) -> (SectorRange, WriteKind) {
    let hot = rng.chance(500);
    let start = if hot { rng.below(sectors.min(96)) } else { rng.below(sectors) };
    let length = match rng.below(10) {
        0..=4 => rng.between(1, 8),
        5..=8 => rng.between(1, 64),
        _ => rng.between(64, 300),
    };
    let kind = match rng.below(10) {
        0 => WriteKind::Zero,
        1 => WriteKind::Discard,
        _ => WriteKind::Data,
    };
    (SectorRange::new(start, (start + length).min(sectors)), kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::crc32;

    #[test]
    fn what_collides_differs_and_has_the_same_crc() {
        let source = Source::new(1, 8);
        let (ours, theirs) = (source.content(0, 3), source.content(COLLIDES, 3));
        assert!(ours != theirs && crc32(&ours) == crc32(&theirs));
    }
}
