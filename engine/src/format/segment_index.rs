//! The index of a redo log segment: what opening needs to know of it, so that its payload is not read.
//!
//! It stands at the end of the segment's own file: [`SegmentIndexHead`] in the last block, in front of it the items, one
//! [`SegmentIndexItem`] each, filled up with zeros to a multiple of 4 KiB. Like a group it belongs to one use of the file by
//! that use's salt, so a file that is used again has no index until it is written anew.
//!
//! Invariants: the head's checksum covers the head, and it names that of the items and their padding; what was read
//! ascends in the log, lies inside it, and numbers ascend per disk. Units: bytes, group and entry numbers. Called by
//! `store::journal`.

use std::collections::BTreeMap;

use super::FormatError;
use super::segment::{EntryHead, EntryKind, JournalId};
use super::wire::wire;
use crate::checksum::{crc32, is_zero};
use crate::units::{BLOCK_BYTES, DiskId, SECTOR_BYTES, Timestamp};

/// First eight bytes of an index head; the last one is the version.
pub const SEGMENT_INDEX_MAGIC: [u8; 8] = *b"RPSEGI\x00\x01";

wire! {
    /// The head of a segment's index.
    pub struct SegmentIndexHead / SegmentIndexHeadWire = 128 {
        /// Always [`SEGMENT_INDEX_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// Features without which it must not be used: none yet.
        incompatible: u32,
        /// The journal it belongs to.
        journal: JournalId,
        /// Number of the segment.
        number: u64,
        /// Salt of the segment.
        salt: u64,
        /// Length of the segment.
        bytes: u64,
        /// Number of its first group.
        first_group: u64,
        /// Number of its last group; one less than the first where it has none.
        last_group: u64,
        /// Where its last group ends.
        groups_end: u64,
        /// What the first group says of the one before it.
        previous: u32,
        /// `crc` of the last group; `previous` where it has none.
        last_crc: u32,
        /// Number of items.
        items: u32,
        /// CRC-32 of the items and their padding.
        items_crc: u32,
        ; reserved: [u8; 32],
    }
}

wire! {
    /// An entry of the segment: each numbered one, and of each disk the newest STATE and the newest APPLIED.
    pub struct SegmentIndexItem / SegmentIndexItemWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its place among the disk's; zero for STATE and APPLIED.
        number: u64,
        /// Where its head stands in the segment.
        offset: u64,
        /// When its group was closed.
        time: Timestamp,
        /// Bytes of head and body.
        bytes: u32,
        /// What it says.
        kind: EntryKind,
        ; reserved: [u8; 3],
    }
}

const _: () = assert!(SegmentIndexHead::BYTES <= SECTOR_BYTES as usize, "no crash tears a head");

/// Bytes that items take, padding included.
#[must_use]
pub const fn items_bytes(items: u64) -> u64 {
    (items * SegmentIndexItem::BYTES as u64).next_multiple_of(BLOCK_BYTES)
}

/// Bytes that an index of so many items takes at the end of a segment.
#[must_use]
pub const fn index_bytes(items: u64) -> u64 {
    items_bytes(items) + BLOCK_BYTES
}

/// Items and head as they stand at the end of the segment; counts and checksums are filled in.
#[must_use]
pub fn encode_index(head: &SegmentIndexHead, items: &[SegmentIndexItem]) -> Vec<u8> {
    let padded = items_bytes(items.len() as u64) as usize;
    let mut bytes = Vec::with_capacity(padded + BLOCK_BYTES as usize);
    for item in items {
        bytes.extend_from_slice(&item.to_bytes());
    }
    bytes.resize(padded, 0);
    let items_crc = crc32(&bytes);
    let head = SegmentIndexHead { items: items.len() as u32, items_crc, ..*head };
    bytes.extend_from_slice(&SegmentIndexHead { crc: head.expected_crc(), ..head }.to_bytes());
    bytes.resize(padded + BLOCK_BYTES as usize, 0);
    bytes
}

const HEAD: &str = "SegmentIndexHead";
const ITEM: &str = "SegmentIndexItem";

fn field<T>(
    what: &'static str,
    field: &'static str,
    got: u64,
    expected: &'static str,
) -> Result<T, FormatError> {
    Err(FormatError::Field { what, field, got, expected })
}

impl SegmentIndexHead {
    /// Whether a block was once the head of this use's index, whole or damaged; any other was never written by it.
    #[must_use]
    pub fn is_of(block: &[u8], salt: u64) -> bool {
        let read_salt = block.get(SALT_OFFSET..SALT_OFFSET + 8);
        read_salt == Some(&salt.to_le_bytes()[..])
            || (block.starts_with(&SEGMENT_INDEX_MAGIC) && Self::open(block).is_err())
    }

    /// Reads and checks a head; whether it belongs where it was found is the caller's question.
    ///
    /// # Errors
    /// When the bytes are no head of this version, are damaged, or need a feature this program does not have.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        let (head, _) = Self::read_prefix(bytes)?;
        if head.magic != SEGMENT_INDEX_MAGIC {
            let got = head.magic.last().copied().unwrap_or(0).into();
            return field(HEAD, "magic", got, "an index of version 1");
        }
        let expected = head.expected_crc();
        if head.crc != expected {
            return Err(FormatError::Checksum { what: HEAD, got: head.crc, expected });
        }
        if head.incompatible != 0 {
            return field(
                HEAD,
                "incompatible",
                head.incompatible.into(),
                "no feature bits; use a newer program",
            );
        }
        if head.last_group.checked_add(1).is_none_or(|next| next < head.first_group) {
            return field(HEAD, "last_group", head.last_group, "not before the first");
        }
        if head.groups_end < BLOCK_BYTES || head.items_offset().is_none_or(|at| at < head.groups_end) {
            return field(HEAD, "groups_end", head.groups_end, "groups in front of the items");
        }
        Ok(head)
    }

    /// Where the items begin; `None` where a segment of this length has no room for them.
    #[must_use]
    pub const fn items_offset(&self) -> Option<u64> {
        self.bytes.checked_sub(index_bytes(self.items as u64))
    }

    /// Reads and checks the items; `bytes` are those from [`Self::items_offset`] up to the head.
    ///
    /// # Errors
    /// When they are not what the head says, or contradict one another.
    pub fn open_items(&self, bytes: &[u8]) -> Result<Vec<SegmentIndexItem>, FormatError> {
        let expected = crc32(bytes);
        if self.items_crc != expected {
            return Err(FormatError::Checksum { what: ITEM, got: self.items_crc, expected });
        }
        if bytes.len() as u64 != items_bytes(self.items.into()) {
            let expected = items_bytes(self.items.into()) as usize;
            return Err(FormatError::Short { what: ITEM, got: bytes.len(), expected });
        }
        let used = self.items as usize * SegmentIndexItem::BYTES;
        if !is_zero(bytes.get(used..).unwrap_or_default()) {
            return field(ITEM, "padding", 1, "zeros");
        }
        let mut items = Vec::with_capacity(self.items as usize);
        // Neighbours are mostly of one disk: only where it changes the map is asked.
        let (mut end, mut newest, mut last) = (BLOCK_BYTES, BTreeMap::new(), (DiskId::default(), 0));
        for bytes in bytes.chunks_exact(SegmentIndexItem::BYTES).take(self.items as usize) {
            let item = SegmentIndexItem::read_exact(bytes)?;
            end = item.check(end, self.groups_end)?;
            if item.kind.is_numbered() {
                if item.disk != last.0 {
                    newest.insert(last.0, last.1);
                    last = (item.disk, newest.get(&item.disk).copied().unwrap_or(0));
                }
                if item.number <= last.1 {
                    return field(ITEM, "number", item.number, "more than the one before it");
                }
                last.1 = item.number;
            }
            items.push(item);
        }
        Ok(items)
    }

    fn expected_crc(&self) -> u32 {
        crc32(self.to_bytes().get(12..).unwrap_or_default())
    }
}

/// Where the salt stands in a head.
const SALT_OFFSET: usize = 40;

impl SegmentIndexItem {
    /// Checks that it lies between `from` and `groups_end`; answers its end.
    fn check(&self, from: u64, groups_end: u64) -> Result<u64, FormatError> {
        let end = self.offset.checked_add(self.bytes.into());
        let Some(end) = end.filter(|end| self.offset >= from && *end <= groups_end) else {
            return field(ITEM, "offset", self.offset, "behind the entry before it, inside the groups");
        };
        if (self.bytes as usize) < EntryHead::BYTES {
            return field(ITEM, "bytes", self.bytes.into(), "an entry's head at least");
        }
        if self.kind.is_numbered() != (self.number > 0) {
            return field(ITEM, "number", self.number, "a number for what is applied, zero for the rest");
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> SegmentIndexHead {
        SegmentIndexHead {
            magic: SEGMENT_INDEX_MAGIC,
            crc: 0,
            incompatible: 0,
            journal: [1; 16],
            number: 4,
            salt: 0x0102_0304_0506_0708,
            bytes: 1 << 20,
            first_group: 6,
            last_group: 9,
            groups_end: 5 * BLOCK_BYTES,
            previous: 11,
            last_crc: 12,
            items: 0,
            items_crc: 0,
        }
    }

    fn item(number: u64, offset: u64) -> SegmentIndexItem {
        let kind = if number == 0 { EntryKind::Applied } else { EntryKind::Batch };
        SegmentIndexItem { disk: DiskId([3; 16]), number, offset, time: Timestamp(8), bytes: 100, kind }
    }

    fn read(bytes: &[u8]) -> Result<(SegmentIndexHead, Vec<SegmentIndexItem>), FormatError> {
        let (items, head) = bytes.split_at(bytes.len() - BLOCK_BYTES as usize);
        let head = SegmentIndexHead::open(head)?;
        Ok((head, head.open_items(items)?))
    }

    #[test]
    fn the_salt_stands_where_it_is_looked_for() {
        let row = SegmentIndexHead::TABLE.iter().find(|row| row.field == "salt");
        assert_eq!(row.map(|row| row.offset), Some(SALT_OFFSET));
        let block = encode_index(&head(), &[]);
        assert!(SegmentIndexHead::is_of(&block, head().salt));
        assert!(!SegmentIndexHead::is_of(&block, 7), "the index of another use is none of this one");
        assert!(!SegmentIndexHead::is_of(&[0; 4096], head().salt) && !SegmentIndexHead::is_of(&[], 0));
    }

    #[test]
    fn an_index_reads_back_and_every_flipped_bit_is_noticed() {
        let items = [item(7, 4200), item(0, 4300), item(8, 5000)];
        let bytes = encode_index(&head(), &items);
        assert_eq!(bytes.len() as u64, index_bytes(3));
        let (read_head, read_items) = read(&bytes).unwrap();
        assert_eq!((read_head.items, read_items.as_slice()), (3, &items[..]));
        let head_bits = (bytes.len() - 4096) * 8..(bytes.len() - 4096 + SegmentIndexHead::BYTES) * 8;
        for bit in (0..(bytes.len() - 4096) * 8).chain(head_bits) {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&flipped).is_err(), "bit {bit}");
            assert!(SegmentIndexHead::is_of(&flipped[bytes.len() - 4096..], head().salt), "bit {bit}");
        }
    }

    #[test]
    fn items_that_contradict_one_another_are_refused() {
        let wrong: [&[SegmentIndexItem]; 5] = [
            &[item(7, 4200), item(8, 4299)],
            &[item(7, 4200), item(7, 5000)],
            &[item(7, 100)],
            &[item(7, 5 * BLOCK_BYTES - 99)],
            &[SegmentIndexItem { kind: EntryKind::State, ..item(7, 4200) }],
        ];
        for items in wrong {
            assert!(read(&encode_index(&head(), items)).is_err(), "{items:?}");
        }
        assert!(read(&encode_index(&SegmentIndexHead { groups_end: 1 << 20, ..head() }, &[])).is_err());
        assert!(read(&encode_index(&SegmentIndexHead { last_group: 4, ..head() }, &[])).is_err());
    }
}
