//! A simulated target disk and its state file: what survives a crash is decided here.
//!
//! Invariants: a write is volatile until a flush; at a crash each 512-byte sector keeps its flushed content or any
//! content written to it since, independently of its neighbours; the state file is replaced whole or not at all.
//! Units: sectors of 512 B. Called by `sim::target`.

use std::collections::BTreeMap;

use super::rng::Rng;
use crate::units::{SECTOR_BYTES, SectorRange};

/// The disk.
#[derive(Clone, Debug)]
pub(super) struct SimDisk {
    /// What reads see.
    volatile: Vec<u8>,
    /// What a crash cannot take away.
    flushed: Vec<u8>,
    /// Sector → contents written since the last flush, oldest first.
    unflushed: BTreeMap<u64, Vec<Vec<u8>>>,
    /// The state file.
    pub(super) state_file: Vec<u8>,
}

impl SimDisk {
    pub(super) fn new(content: Vec<u8>, state_file: Vec<u8>) -> Self {
        Self { volatile: content.clone(), flushed: content, unflushed: BTreeMap::new(), state_file }
    }

    /// Writes whole sectors.
    pub(super) fn write(&mut self, start: u64, data: &[u8]) {
        for (index, sector) in data.chunks_exact(SECTOR_BYTES as usize).enumerate() {
            let at = start + index as u64;
            let from = (at * SECTOR_BYTES) as usize;
            self.volatile[from..from + sector.len()].copy_from_slice(sector);
            self.unflushed.entry(at).or_default().push(sector.to_vec());
        }
    }

    /// Everything written so far survives from now on.
    pub(super) fn flush(&mut self) {
        for at in std::mem::take(&mut self.unflushed).into_keys() {
            let from = (at * SECTOR_BYTES) as usize;
            let to = from + SECTOR_BYTES as usize;
            self.flushed[from..to].copy_from_slice(&self.volatile[from..to]);
        }
    }

    /// What a read sees.
    pub(super) fn read(&self, range: SectorRange) -> &[u8] {
        let from = range.byte_start() as usize;
        &self.volatile[from..from + range.bytes() as usize]
    }

    /// Everything a read sees.
    pub(super) fn content(&self) -> &[u8] {
        &self.volatile
    }

    /// Power is lost: any subset of what was not flushed survives.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let keep_per_mille = rng.pick(&[0, 100, 500, 900, 1000]);
        for (at, contents) in std::mem::take(&mut self.unflushed) {
            if rng.chance(keep_per_mille) {
                let survivor = &contents[rng.below(contents.len() as u64) as usize];
                let from = (at * SECTOR_BYTES) as usize;
                self.flushed[from..from + survivor.len()].copy_from_slice(survivor);
            }
        }
        self.volatile.clone_from(&self.flushed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_keeps_what_was_flushed_and_tears_what_was_not_at_sectors() {
        let mut outcomes = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut disk = SimDisk::new(vec![0; 2048], Vec::new());
            disk.write(0, &[1; 2048]);
            disk.flush();
            disk.write(1, &[2; 1024]);
            disk.write(2, &[3; 512]);
            assert_eq!(disk.read(SectorRange::new(2, 3)), [3; 512]);
            disk.crash(&mut Rng::new(seed));
            let sectors: Vec<u8> = disk.content().chunks(512).map(|sector| sector[0]).collect();
            assert_eq!((sectors[0], sectors[3]), (1, 1));
            outcomes.insert((sectors[1], sectors[2]));
        }
        assert_eq!(outcomes.len(), 6, "every combination happens: {outcomes:?}");
    }
}
