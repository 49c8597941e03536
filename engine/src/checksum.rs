//! Checksums: CRC-32 per fragment of a record, and hashes of compare units.
//!
//! Invariants: a fragment is the part of a record inside one 4 KiB-aligned block of the disk; its CRC is computed
//! once, at the source, over plain bytes (I8). A hash of all zeros means "this unit reads as zeros" and is never
//! the hash of anything else. Units: bytes and sectors.

use crate::units::{BLOCK_SECTORS, SECTOR_BYTES, SectorRange};

/// Bytes of a compare hash.
pub const HASH_BYTES: usize = 16;

/// The hash of a compare unit; [`UnitHash::ZEROS`] for a unit that reads as zeros.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
    zerocopy::Unaligned,
)]
#[repr(transparent)]
pub struct UnitHash(pub [u8; HASH_BYTES]);

impl UnitHash {
    /// Stands for a unit that reads as zeros.
    pub const ZEROS: Self = Self([0; HASH_BYTES]);
}

/// Number of 4 KiB-aligned fragments a run of sectors touches.
#[must_use]
pub const fn fragment_count(range: SectorRange) -> u64 {
    if range.is_empty() { 0 } else { (range.end - 1) / BLOCK_SECTORS - range.start / BLOCK_SECTORS + 1 }
}

/// The fragments of `data`, which starts at sector `start` of the disk: split at 4 KiB boundaries of the disk.
/// `data` must be whole sectors.
pub fn fragments(start: u64, data: &[u8]) -> impl Iterator<Item = &[u8]> {
    debug_assert!((data.len() as u64).is_multiple_of(SECTOR_BYTES));
    let head = ((BLOCK_SECTORS - start % BLOCK_SECTORS) % BLOCK_SECTORS * SECTOR_BYTES) as usize;
    let (first, rest) = data.split_at(head.min(data.len()));
    std::iter::once(first)
        .filter(|part| !part.is_empty())
        .chain(rest.chunks((BLOCK_SECTORS * SECTOR_BYTES) as usize))
}

/// CRC-32 (IEEE) of one fragment.
#[must_use]
pub fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

/// Whether all bytes are zero, at memory speed: wide words, early exit every 256 bytes.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let mut chunks = data.chunks_exact(256);
    for chunk in &mut chunks {
        if chunk.iter().fold(0_u8, |any, byte| any | byte) != 0 {
            return false;
        }
    }
    chunks.remainder().iter().all(|byte| *byte == 0)
}

/// The hash of one compare unit.
#[must_use]
pub fn unit_hash(data: &[u8]) -> UnitHash {
    if is_zero(data) {
        return UnitHash::ZEROS;
    }
    shortened(&blake3::hash(data))
}

/// The hash of some parts one after another; never [`UnitHash::ZEROS`], whatever they hold.
pub fn hash_of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> UnitHash {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    shortened(&hasher.finalize())
}

fn shortened(full: &blake3::Hash) -> UnitHash {
    let mut short = [0_u8; HASH_BYTES];
    short.copy_from_slice(&full.as_bytes()[..HASH_BYTES]);
    if short == UnitHash::ZEROS.0 {
        short[0] = 1; // keeps the meaning of ZEROS exact
    }
    UnitHash(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_split_at_blocks_of_the_disk_not_of_the_record() {
        let data = vec![1_u8; 10 * 512];
        let lens: Vec<usize> = fragments(6, &data).map(<[u8]>::len).collect();
        assert_eq!(lens, [1024, 4096]);
        assert_eq!(fragment_count(SectorRange::new(6, 16)), 2);
        assert_eq!(fragments(8, &data).map(<[u8]>::len).collect::<Vec<_>>(), [4096, 1024]);
        assert_eq!(fragments(3, &data[..512]).count(), 1);
    }

    #[test]
    fn zero_detection_sees_a_single_bit_anywhere() {
        let mut data = vec![0_u8; 4096 + 77];
        assert!(is_zero(&data));
        for at in [0, 255, 256, 4095, 4096, 4172] {
            data[at] = 0x80;
            assert!(!is_zero(&data), "bit at {at}");
            data[at] = 0;
        }
    }

    #[test]
    fn zeros_have_the_reserved_hash_and_nothing_else_has() {
        assert_eq!(unit_hash(&[0; 4096]), UnitHash::ZEROS);
        assert_ne!(unit_hash(&[1; 4096]), UnitHash::ZEROS);
    }
}
