//! A simulated target disk and its state file: what survives a crash is decided here.
//!
//! Invariants: a write is volatile until a flush; at a crash each 512-byte sector keeps its flushed content or any
//! content written to it since, independently of its neighbours; the state file is replaced whole or not at all. A disk
//! that loses its newest checkpoints is in the state of the one before, whole.
//! Units: sectors of 512 B. Called by `sim::target`.

use std::collections::{BTreeMap, VecDeque};

use super::hashes::Hashes;
use super::rng::Rng;
use super::workload::span;
use crate::checksum::UnitHash;
use crate::units::{SECTOR_BYTES, SectorRange};

/// How many checkpoints a crash may take back, at most.
const TAIL_MAX: usize = 4;

/// A run of sectors: where it begins, and what it holds.
type Run = (u64, Vec<u8>);

/// The disk.
#[derive(Debug, Default)]
pub(super) struct SimDisk {
    /// What reads see.
    volatile: Vec<u8>,
    /// What a crash cannot take away.
    flushed: Vec<u8>,
    /// What was written since the last flush, oldest first, and where it begins.
    unflushed: Vec<Run>,
    hashes: Hashes,
    /// What the newest checkpoints overwrote, oldest first, and the state file they replaced.
    past: VecDeque<(Vec<Run>, Vec<u8>)>,
    /// What was flushed since the last checkpoint overwrote.
    overwritten: Vec<Run>,
    /// The state file.
    pub(super) state_file: Vec<u8>,
}

impl SimDisk {
    pub(super) fn new(content: Vec<u8>, state_file: Vec<u8>) -> Self {
        let volatile = content.clone();
        Self { volatile, flushed: content, state_file, ..Self::default() }
    }

    /// Writes whole sectors.
    pub(super) fn write(&mut self, start: u64, data: &[u8]) {
        let range = SectorRange::new(start, start + data.len() as u64 / SECTOR_BYTES);
        self.volatile[bytes_of(range)].copy_from_slice(data);
        self.unflushed.push((start, data.to_vec()));
        self.hashes.changed(range);
    }

    /// Everything written so far survives from now on.
    pub(super) fn flush(&mut self) {
        for (start, data) in self.unflushed.drain(..) {
            let range = SectorRange::new(start, start + data.len() as u64 / SECTOR_BYTES);
            let bytes = &mut self.flushed[bytes_of(range)];
            self.overwritten.push((start, bytes.to_vec()));
            bytes.copy_from_slice(&data);
        }
    }

    /// After a flush: the state file is replaced.
    pub(super) fn checkpoint(&mut self, state_file: Vec<u8>) {
        let before = std::mem::replace(&mut self.state_file, state_file);
        self.past.push_back((std::mem::take(&mut self.overwritten), before));
        if self.past.len() > TAIL_MAX {
            self.past.pop_front();
        }
    }

    /// The state file before the newest checkpoint, if it is remembered.
    pub(super) fn state_before(&self) -> Option<&[u8]> {
        self.past.back().map(|(_, state_file)| &state_file[..])
    }

    /// After a crash: the newest checkpoint is lost, as the end of a log may be.
    pub(super) fn lose_checkpoint(&mut self) {
        let Some((overwritten, state_file)) = self.past.pop_back() else { return };
        let since = std::mem::take(&mut self.overwritten);
        for (start, data) in since.iter().rev().chain(overwritten.iter().rev()) {
            let range = SectorRange::new(*start, start + data.len() as u64 / SECTOR_BYTES);
            self.flushed[bytes_of(range)].copy_from_slice(data);
            self.volatile[bytes_of(range)].copy_from_slice(data);
            self.hashes.changed(range);
        }
        self.state_file = state_file;
    }

    /// The hash of every unit of a chunk, as a read sees it.
    pub(super) fn unit_hashes(&mut self, chunk: SectorRange) -> Vec<UnitHash> {
        self.hashes.of_units(chunk, &self.volatile[bytes_of(chunk)])
    }

    /// What a read sees.
    pub(super) fn read(&self, range: SectorRange) -> &[u8] {
        &self.volatile[bytes_of(range)]
    }

    /// Everything a read sees.
    pub(super) fn content(&self) -> &[u8] {
        &self.volatile
    }

    /// Power is lost: any subset of what was not flushed survives.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let keep_per_mille = rng.pick(&[0, 100, 500, 900, 1000]);
        let unflushed = std::mem::take(&mut self.unflushed);
        let mut contents: BTreeMap<u64, Vec<&[u8]>> = BTreeMap::new();
        for (start, data) in &unflushed {
            for (at, sector) in (*start..).zip(data.chunks_exact(SECTOR_BYTES as usize)) {
                contents.entry(at).or_default().push(sector);
            }
        }
        // Everywhere else both are the same.
        for (at, contents) in contents {
            if rng.chance(keep_per_mille) {
                let survivor = contents[rng.below(contents.len() as u64) as usize];
                self.overwritten.push((at, self.flushed[span(at)].to_vec()));
                self.flushed[span(at)].copy_from_slice(survivor);
            }
            self.volatile[span(at)].copy_from_slice(&self.flushed[span(at)]);
            self.hashes.changed(SectorRange::new(at, at + 1));
        }
    }
}

/// The bytes of a run.
fn bytes_of(range: SectorRange) -> std::ops::Range<usize> {
    let from = range.byte_start() as usize;
    from..from + range.bytes() as usize
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
            assert_eq!(disk.content()[1024..1536], [3; 512]);
            disk.crash(&mut Rng::new(seed));
            let sectors: Vec<u8> = disk.content().chunks(512).map(|sector| sector[0]).collect();
            assert_eq!((sectors[0], sectors[3]), (1, 1));
            outcomes.insert((sectors[1], sectors[2]));
        }
        assert_eq!(outcomes.len(), 6, "every combination happens: {outcomes:?}");
    }
}
