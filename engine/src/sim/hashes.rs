//! Hashes of a simulated disk, computed again only where it changed: scans ask for the same ones over and over.
//!
//! Invariant: what is remembered is the hash of what the disk holds now, as long as every change is told to
//! [`Hashes::changed`]. Units: sectors; no run asked for is longer than a compare unit. Called by `sim::disk` and
//! `sim::workload`.

use std::collections::BTreeMap;

use crate::checksum::{UnitHash, unit_hash};
use crate::limits::COMPARE_UNIT_BYTES;
use crate::units::{SECTOR_BYTES, SectorRange};

/// The hashes of one disk.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    /// By start and end of the run.
    known: BTreeMap<(u64, u64), UnitHash>,
}

impl Hashes {
    /// The hash of a run that holds `data`.
    pub(super) fn of(&mut self, range: SectorRange, data: &[u8]) -> UnitHash {
        debug_assert!(range.bytes() <= COMPARE_UNIT_BYTES);
        *self.known.entry((range.start, range.end)).or_insert_with(|| unit_hash(data))
    }

    /// The hash of every unit of a chunk that holds `data`.
    pub(super) fn of_units(&mut self, chunk: SectorRange, data: &[u8]) -> Vec<UnitHash> {
        let sectors = COMPARE_UNIT_BYTES / SECTOR_BYTES;
        let starts = (chunk.start..chunk.end).step_by(sectors as usize);
        let units = starts.map(|start| SectorRange::new(start, (start + sectors).min(chunk.end)));
        units.zip(data.chunks(COMPARE_UNIT_BYTES as usize)).map(|(unit, data)| self.of(unit, data)).collect()
    }

    /// A run of the disk changed.
    pub(super) fn changed(&mut self, range: SectorRange) {
        let reach = COMPARE_UNIT_BYTES / SECTOR_BYTES;
        let near = self.known.range((range.start.saturating_sub(reach), 0)..(range.end, 0));
        let stale: Vec<(u64, u64)> =
            near.map(|(key, _)| *key).filter(|(_, end)| *end > range.start).collect();
        for key in stale {
            self.known.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::rng::Rng;

    #[test]
    fn what_is_remembered_is_what_a_fresh_hash_says() {
        let mut rng = Rng::new(1);
        let mut bytes = vec![0_u8; 1024 * 512];
        let mut hashes = Hashes::default();
        for _ in 0..5000 {
            let start = rng.below(1023);
            let range = SectorRange::new(start, (start + rng.between(1, 128)).min(1024));
            let span = range.byte_start() as usize..(range.byte_start() + range.bytes()) as usize;
            if rng.chance(300) {
                bytes[span].fill(rng.below(3) as u8);
                hashes.changed(range);
            } else {
                let start = range.start / 8 * 8;
                let range = SectorRange::new(start, (start + rng.pick(&[8, 128])).min(1024));
                let span = range.byte_start() as usize..(range.byte_start() + range.bytes()) as usize;
                assert_eq!(hashes.of(range, &bytes[span.clone()]), unit_hash(&bytes[span]));
            }
        }
    }
}
