//! The CRC map of a target: one CRC-32 per 4 KiB block, in pages that can be believed one by one.
//!
//! Invariants: a page is one 4 KiB block of the file and believed only when its checksum, its place and the file's salt
//! are right and it is not marked open; anything else, zeros too, means "nothing is known of these blocks". An entry of
//! zero is unknown, so a block whose CRC is zero has the entry 1. Units: blocks. Called by `store::crc_map`.
//!
//! Layout: [`MapHeader`] in a block of its own, then the pages, each a [`MapPageHead`] and [`PAGE_ENTRIES`] entries of
//! four bytes.

use super::FormatError;
use super::segment::JournalId;
use super::wire::wire;
use crate::checksum::crc32;
use crate::units::{BLOCK_BYTES, DiskId};

/// First eight bytes of a map; the last one is the version.
pub const MAP_MAGIC: [u8; 8] = *b"RPCRCM\x00\x01";
/// First four bytes of a page.
pub const MAP_PAGE_MAGIC: u32 = u32::from_le_bytes(*b"CRCP");
/// Blocks of a page: about 4 MiB of the disk.
pub const PAGE_ENTRIES: u64 = (BLOCK_BYTES - MapPageHead::BYTES as u64) / 4;
/// What an entry says of a block of which nothing is known.
pub const UNKNOWN: u32 = 0;

wire! {
    /// The head of a CRC map.
    pub struct MapHeader / MapHeaderWire = 64 {
        /// Always [`MAP_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// The journal it belongs to.
        journal: JournalId,
        /// The disk.
        disk: DiskId,
        /// Random for each file, repeated in every page.
        salt: u64,
        /// Size of the disk in sectors.
        size_sectors: u64,
        ; reserved: [u8; 4],
    }
}

wire! {
    /// The head of a page.
    pub struct MapPageHead / MapPageHeadWire = 32 {
        /// Always [`MAP_PAGE_MAGIC`].
        magic: u32,
        /// CRC-32 of everything after this field, entries included.
        crc: u32,
        /// The map's salt.
        salt: u64,
        /// Number of the page.
        page: u64,
        /// Blocks of it are being written: nothing in it holds.
        open: bool,
        ; reserved: [u8; 7],
    }
}

impl MapHeader {
    /// The header's block, checksum filled in.
    #[must_use]
    pub fn to_block(&self) -> Vec<u8> {
        let mut block = Self { crc: self.expected_crc(), ..*self }.to_bytes().to_vec();
        block.resize(BLOCK_BYTES as usize, 0);
        block
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// When it is no map of this version, or damaged.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "MapHeader";
        let (header, _) = Self::read_prefix(bytes)?;
        if header.magic != MAP_MAGIC {
            let got = header.magic.last().copied().unwrap_or(0).into();
            return Err(FormatError::Field {
                what: WHAT,
                field: "magic",
                got,
                expected: "a CRC map of version 1",
            });
        }
        let expected = header.expected_crc();
        if header.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: header.crc, expected });
        }
        Ok(header)
    }

    fn expected_crc(&self) -> u32 {
        crc32(self.to_bytes().get(12..).unwrap_or_default())
    }
}

/// The entry of a block that holds `data`.
#[must_use]
pub fn entry_of(data: &[u8]) -> u32 {
    crc32(data).max(1)
}

/// The block of a page. An open page says nothing of its blocks.
#[must_use]
pub fn encode_page(salt: u64, page: u64, open: bool, entries: &[u32]) -> Vec<u8> {
    let head = MapPageHead { magic: MAP_PAGE_MAGIC, crc: 0, salt, page, open };
    let mut block = head.to_bytes().to_vec();
    if !open {
        block.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
    }
    block.resize(BLOCK_BYTES as usize, 0);
    let crc = crc32(block.get(8..).unwrap_or_default());
    if let Some(place) = block.get_mut(4..8) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
    block
}

/// The entries of a page; `None` where nothing can be believed.
#[must_use]
pub fn decode_page(block: &[u8], salt: u64, page: u64) -> Option<Vec<u32>> {
    let (head, entries) = MapPageHead::read_prefix(block).ok()?;
    let expected = crc32(block.get(8..)?);
    let own = head.magic == MAP_PAGE_MAGIC && head.crc == expected && head.salt == salt && head.page == page;
    if !own || head.open {
        return None;
    }
    let words = entries.chunks_exact(4).take(PAGE_ENTRIES as usize);
    Some(words.filter_map(|word| word.try_into().ok().map(u32::from_le_bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_reads_back_and_every_flipped_bit_makes_it_unknown() {
        let entries: Vec<u32> = (0..PAGE_ENTRIES as u32).map(|at| at * 7).collect();
        let block = encode_page(9, 3, false, &entries);
        assert_eq!(block.len() as u64, BLOCK_BYTES);
        assert_eq!(decode_page(&block, 9, 3), Some(entries));
        for bit in 0..block.len() * 8 {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_page(&damaged, 9, 3), None, "bit {bit}");
        }
    }

    #[test]
    fn pages_of_another_map_or_place_open_and_unwritten_ones_say_nothing() {
        let block = encode_page(9, 3, false, &[1, 2]);
        assert_eq!(decode_page(&block, 8, 3), None);
        assert_eq!(decode_page(&block, 9, 4), None);
        assert_eq!(decode_page(&encode_page(9, 3, true, &[1, 2]), 9, 3), None);
        assert_eq!(decode_page(&[0; BLOCK_BYTES as usize], 9, 3), None);
        assert_eq!(decode_page(&[], 9, 3), None);
    }

    #[test]
    fn a_header_reads_back_and_flipped_bits_are_noticed() {
        let header = MapHeader {
            magic: MAP_MAGIC,
            crc: 0,
            journal: [1; 16],
            disk: DiskId([2; 16]),
            salt: 3,
            size_sectors: 4,
        };
        let block = header.to_block();
        assert_eq!(MapHeader::open(&block).unwrap().salt, 3);
        for bit in 0..MapHeader::BYTES * 8 {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(MapHeader::open(&damaged).is_err(), "bit {bit}");
        }
    }
}
