//! What both ends compute of a chunk when source and target are compared: hashes of units, CRCs of blocks, and the one
//! hash that confirms what equal CRCs only suggest.
//!
//! | step | the agent asks with | the target answers with |
//! |---|---|---|
//! | compare | nothing | a hash of every unit |
//! | refine | the CRCs of the blocks of the units that differ | which blocks have the same CRC, and one hash over all of them |
//!
//! Invariants: two blocks are called equal only when a 16-byte hash over both ends' bytes says so, never by CRCs alone
//! ([`confirm_hash`]): the agent hashes the very bytes its CRCs were made of. Units and blocks are counted from the
//! chunk's first sector; the last of each may be short. No function here trusts a number it was sent: what lies behind the
//! chunk's end is empty. Units: bytes; a unit is 64 KiB, a block 4 KiB. Called by [`super::pass`], and by whoever holds
//! the data: the agent's workers, the target's disk thread, the simulator.

use std::ops::Range;

use crate::checksum::{UnitHash, crc32, hash_of_parts, unit_hash};
use crate::format::message::{BLOCKS_PER_UNIT, CompareAnswer, RefineUnit};
use crate::limits::{COMPARE_FINE_BYTES, COMPARE_UNIT_BYTES};
use crate::units::{SECTOR_BYTES, SectorRange};

const UNIT_BYTES: usize = COMPARE_UNIT_BYTES as usize;
const BLOCK: usize = COMPARE_FINE_BYTES as usize;

/// A unit of a chunk, and which of its blocks are meant: bit 0 is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitMask {
    /// Counted from the chunk's first sector.
    pub unit: u16,
    /// The blocks.
    pub mask: u16,
}

/// What a walk wants computed of a chunk's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// The CRCs of the blocks of these units.
    Crcs(Vec<u16>),
    /// The hash over these blocks.
    Confirm(Vec<UnitMask>),
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Computed {
    /// To [`Question::Crcs`].
    Crcs(Vec<RefineUnit>),
    /// To [`Question::Confirm`].
    Confirmed(UnitHash),
}

impl Question {
    /// Computes the answer; `data` is all of the chunk.
    #[must_use]
    pub fn answer(&self, data: &[u8]) -> Computed {
        match self {
            Self::Crcs(units) => Computed::Crcs(units.iter().map(|unit| block_crcs(data, *unit)).collect()),
            Self::Confirm(masks) => Computed::Confirmed(confirm_hash(data, masks)),
        }
    }
}

/// The hash of every unit of a chunk.
#[must_use]
pub fn unit_hashes(data: &[u8]) -> Vec<UnitHash> {
    data.chunks(UNIT_BYTES).map(unit_hash).collect()
}

/// What a target answers to a request; `data` is all of the requested range as it stands there, or where `units` are
/// given at least [`wanted`] of it.
#[must_use]
pub fn answer(units: &[RefineUnit], data: &[u8]) -> CompareAnswer {
    if units.is_empty() {
        return CompareAnswer { hashes: unit_hashes(data), masks: Vec::new() };
    }
    let equal: Vec<UnitMask> =
        units.iter().map(|refine| UnitMask { unit: refine.unit, mask: equal_blocks(data, refine) }).collect();
    CompareAnswer {
        hashes: vec![confirm_hash(data, &equal)],
        masks: equal.iter().map(|unit| unit.mask).collect(),
    }
}

/// What of a range an answer needs, ascending: all of it, or the units to refine.
#[must_use]
pub fn wanted(range: SectorRange, units: &[RefineUnit]) -> Vec<SectorRange> {
    if units.is_empty() {
        return vec![range];
    }
    let mut runs: Vec<SectorRange> = Vec::new();
    for refine in units {
        let start = range.start + u64::from(refine.unit) * (COMPARE_UNIT_BYTES / SECTOR_BYTES);
        let unit = SectorRange { start, end: (start + COMPARE_UNIT_BYTES / SECTOR_BYTES).min(range.end) };
        match runs.last_mut() {
            Some(last) if last.end == unit.start && start < range.end => last.end = unit.end,
            _ if start < range.end => runs.push(unit),
            _ => {}
        }
    }
    runs
}

/// The hash over some blocks of a chunk, in the order of `units`. It binds which blocks they are.
#[must_use]
pub fn confirm_hash(data: &[u8], units: &[UnitMask]) -> UnitHash {
    let mut names = Vec::with_capacity(units.len() * 4);
    for unit in units {
        names.extend_from_slice(&unit.unit.to_le_bytes());
        names.extend_from_slice(&unit.mask.to_le_bytes());
    }
    // The names come last: before the data they would shift them off the hash's wide path.
    let parts = runs(data.len(), units).into_iter().map(|run| data.get(run).unwrap_or_default());
    hash_of_parts(parts.chain(std::iter::once(names.as_slice())))
}

/// The byte runs of some blocks, joined where they touch: the longer a run, the faster its hash.
fn runs(bytes: usize, units: &[UnitMask]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for unit in units {
        for index in (0..BLOCKS_PER_UNIT).filter(|index| unit.mask & (1 << index) != 0) {
            let from = (usize::from(unit.unit) * UNIT_BYTES + index * BLOCK).min(bytes);
            let to = (from + BLOCK).min(bytes);
            match runs.last_mut() {
                Some(last) if last.end == from => last.end = to,
                _ => runs.push(from..to),
            }
        }
    }
    runs
}

fn unit_of(data: &[u8], unit: u16) -> &[u8] {
    let from = (usize::from(unit) * UNIT_BYTES).min(data.len());
    data.get(from..(from + UNIT_BYTES).min(data.len())).unwrap_or_default()
}

/// The CRCs of a unit's blocks; zero for those behind the chunk's end.
fn block_crcs(data: &[u8], unit: u16) -> RefineUnit {
    let mut crcs = [0; BLOCKS_PER_UNIT];
    for (crc, block) in crcs.iter_mut().zip(unit_of(data, unit).chunks(BLOCK)) {
        *crc = crc32(block);
    }
    RefineUnit { unit, crcs }
}

/// Which blocks have the CRCs they should have.
fn equal_blocks(data: &[u8], refine: &RefineUnit) -> u16 {
    let blocks = unit_of(data, refine.unit).chunks(BLOCK).zip(&refine.crcs).enumerate();
    blocks.filter(|(_, (block, crc))| crc32(block) == **crc).fold(0, |mask, (index, _)| mask | 1 << index)
}

#[cfg(test)]
mod tests;
