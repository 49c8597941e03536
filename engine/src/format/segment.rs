//! Redo log segments: what a segment file, a commit group and an entry look like.
//!
//! Invariants: a segment is one header block, then groups, each beginning at a multiple of 4 KiB and padded to one with
//! zeros; a group belongs to a segment by its salt, which is fresh each time the file is used again, and to its place
//! in the log by its number and the header checksum of the group before it; the body of an entry is the frame's body
//! as it was received, byte for byte. Every header and every body has a CRC-32 of its own, so that damage is known to
//! the entry. Units: bytes, group numbers, entry numbers. Called by `store::journal`.
//!
//! Layout: [`SegmentHeader`] in a block of its own, then groups of [`GroupHeader`], entries and padding; an entry is
//! [`EntryHead`] and its body.

use super::FormatError;
use super::wire::{wire, wire_enum};
use crate::checksum::crc32;
use crate::limits::FRAME_BODY_BYTES_MAX;
use crate::units::{BLOCK_BYTES, DiskId, Timestamp};

/// Names a journal: a retention folder and everything in it. Random, chosen when the folder is made.
pub type JournalId = [u8; 16];

/// First eight bytes of a segment; the last one is the version.
pub const SEGMENT_MAGIC: [u8; 8] = *b"RPSEGM\x00\x01";
/// First four bytes of a group.
pub const GROUP_MAGIC: u32 = 0x5047_5052;
/// Flag of an entry that was carried forward.
const ENTRY_CARRIED: u8 = 1;
/// Largest payload of one group: two of the largest frames and what goes with them.
pub const GROUP_PAYLOAD_BYTES_MAX: u64 = 2 * FRAME_BODY_BYTES_MAX as u64 + (64 << 10);

wire! {
    /// The head of a segment file.
    pub struct SegmentHeader / SegmentHeaderWire = 96 {
        /// Always [`SEGMENT_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// Features without which a reader must not read: none yet.
        incompatible: u32,
        /// The journal it belongs to.
        journal: JournalId,
        /// Its number: counts uses of segment files, never reused.
        number: u64,
        /// Salt of its groups, random for each use.
        salt: u64,
        /// Number of its first group.
        first_group: u64,
        /// Length of the file.
        bytes: u64,
        /// When this use began.
        created: Timestamp,
        ; reserved: [u8; 24],
    }
}

wire! {
    /// The head of a commit group.
    pub struct GroupHeader / GroupHeaderWire = 80 {
        /// Always [`GROUP_MAGIC`].
        magic: u32,
        /// CRC-32 of everything after this field, up to the end of the head.
        crc: u32,
        /// The segment's salt.
        salt: u64,
        /// Its number, counted over all segments.
        group: u64,
        /// Bytes of entries that follow.
        payload_bytes: u32,
        /// Number of entries.
        entry_count: u32,
        /// CRC-32 of the entries.
        payload_crc: u32,
        /// `crc` of the group before it; zero for the very first.
        previous: u32,
        /// Newest group that was durable when this one was written.
        durable_group: u64,
        /// When it was closed, by the target's clock.
        time: Timestamp,
        ; reserved: [u8; 24],
    }
}

wire_enum! {
    /// What an entry of the redo log says.
    pub enum EntryKind: u8 {
        /// A delta batch of a DIFF stretch; the body is that of the frame.
        Batch = 1,
        /// A bulk batch; the body is a count and the ranges to be written, then that of the frame.
        Bulk = 2,
        /// A mark; the body is that of the frame.
        Mark = 3,
        /// The state of a disk with all entries before it; the body is a disk state.
        State = 4,
        /// Entries up to a number are on the target; the body is [`Applied`].
        Applied = 5,
        /// A delta batch of an ORDERED stretch: the disk stood as it says after each of its records. The body is that of
        /// the frame.
        Ordered = 6,
    }
}

wire! {
    /// The head of an entry.
    pub struct EntryHead / EntryHeadWire = 48 {
        /// What it says.
        kind: EntryKind,
        /// Bit 0: it was carried forward from further back in the log, where it may stand, too. The rest is zero.
        flags: u8,
        /// Bytes of body.
        body_bytes: u32,
        /// CRC-32 of the body.
        body_crc: u32,
        /// The disk.
        disk: DiskId,
        /// For batches, bulk and marks: their place among the disk's, contiguous from 1. Zero for others.
        number: u64,
        /// CRC-32 of this head with zero here.
        crc: u32,
        ; reserved: [u8; 10],
    }
}

wire! {
    /// Body of an [`EntryKind::Applied`] entry.
    pub struct Applied / AppliedWire = 48 {
        /// Entries up to this number are on the target and flushed.
        number: u64,
        /// The undo epoch they belong to; zero when before-images are not kept yet.
        epoch: u64,
        /// Bytes of that epoch's undo run that were durable before the target was written.
        undo_bytes: u64,
        ; reserved: [u8; 24],
    }
}

impl EntryKind {
    /// Whether it is a delta batch.
    #[must_use]
    pub const fn is_batch(self) -> bool {
        matches!(self, Self::Batch | Self::Ordered)
    }

    /// Whether it has a place among the disk's entries.
    #[must_use]
    pub const fn is_numbered(self) -> bool {
        matches!(self, Self::Batch | Self::Ordered | Self::Bulk | Self::Mark)
    }
}

impl SegmentHeader {
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
    /// When it is no segment of this version, is damaged, or needs a feature this program does not have.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "SegmentHeader";
        let (header, _) = Self::read_prefix(bytes)?;
        let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        if header.magic != SEGMENT_MAGIC {
            return field(
                "magic",
                header.magic.last().copied().unwrap_or(0).into(),
                "a segment of version 1",
            );
        }
        let expected = header.expected_crc();
        if header.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: header.crc, expected });
        }
        if header.incompatible != 0 {
            return field("incompatible", header.incompatible.into(), "no feature bits; use a newer program");
        }
        Ok(header)
    }

    fn expected_crc(&self) -> u32 {
        crc32(self.to_bytes().get(12..).unwrap_or_default())
    }
}

impl GroupHeader {
    /// The same header with its checksum filled in.
    #[must_use]
    pub fn sealed(self) -> Self {
        Self { crc: self.expected_crc(), ..self }
    }

    /// Reads and checks a header; whether it belongs where it was found is the caller's question.
    ///
    /// # Errors
    /// When the bytes are no group header, or it is damaged.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "GroupHeader";
        let (header, _) = Self::read_prefix(bytes)?;
        if header.magic != GROUP_MAGIC {
            return Err(FormatError::Field {
                what: WHAT,
                field: "magic",
                got: header.magic.into(),
                expected: "a group",
            });
        }
        let expected = header.expected_crc();
        if header.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: header.crc, expected });
        }
        if u64::from(header.payload_bytes) > GROUP_PAYLOAD_BYTES_MAX {
            return Err(FormatError::Field {
                what: WHAT,
                field: "payload_bytes",
                got: header.payload_bytes.into(),
                expected: "two frames at most",
            });
        }
        Ok(header)
    }

    /// Bytes the group takes in its segment, padding included.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        (Self::BYTES as u64 + self.payload_bytes as u64).next_multiple_of(BLOCK_BYTES)
    }

    /// Checks the entries against the header.
    ///
    /// # Errors
    /// When there are too few bytes, or the checksum does not match.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), FormatError> {
        let expected = crc32(payload);
        if payload.len() as u64 != u64::from(self.payload_bytes) {
            return Err(FormatError::Short {
                what: "Group",
                got: payload.len(),
                expected: self.payload_bytes as usize,
            });
        }
        if self.payload_crc == expected {
            Ok(())
        } else {
            Err(FormatError::Checksum { what: "Group", got: self.payload_crc, expected })
        }
    }

    fn expected_crc(&self) -> u32 {
        crc32(self.to_bytes().get(8..).unwrap_or_default())
    }
}

impl EntryHead {
    /// The head of an entry whose body has these bytes and this checksum.
    #[must_use]
    pub fn new(kind: EntryKind, disk: DiskId, number: u64, body_bytes: u32, body_crc: u32) -> Self {
        let head = Self { kind, flags: 0, body_bytes, body_crc, disk, number, crc: 0 };
        Self { crc: crc32(&head.to_bytes()), ..head }
    }

    /// The same head of an entry that is carried forward.
    #[must_use]
    pub fn carried(self) -> Self {
        let head = Self { flags: ENTRY_CARRIED, crc: 0, ..self };
        Self { crc: crc32(&head.to_bytes()), ..head }
    }

    /// Whether it was carried forward: entries with higher numbers may stand before it.
    #[must_use]
    pub const fn is_carried(&self) -> bool {
        self.flags & ENTRY_CARRIED != 0
    }

    /// Reads and checks a head.
    ///
    /// # Errors
    /// When the bytes are no entry, or it is damaged.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "EntryHead";
        let (head, _) = Self::read_prefix(bytes)?;
        let expected = crc32(&Self { crc: 0, ..head }.to_bytes());
        if head.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: head.crc, expected });
        }
        let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        let may_be_carried = if head.kind.is_numbered() { ENTRY_CARRIED } else { 0 };
        if head.flags & !may_be_carried != 0 {
            return field("flags", head.flags.into(), "one that says that a numbered entry was carried");
        }
        if head.body_bytes > FRAME_BODY_BYTES_MAX + (64 << 10) {
            return field("body_bytes", head.body_bytes.into(), "a frame's body at most");
        }
        if head.kind.is_numbered() != (head.number > 0) {
            return field("number", head.number, "a number for what is applied, zero for the rest");
        }
        Ok(head)
    }

    /// Checks a body against the head.
    ///
    /// # Errors
    /// When its length or checksum is not what the head says.
    pub fn check_body(&self, body: &[u8]) -> Result<(), FormatError> {
        if body.len() != self.body_bytes as usize {
            return Err(FormatError::Short {
                what: "Entry",
                got: body.len(),
                expected: self.body_bytes as usize,
            });
        }
        let expected = crc32(body);
        if self.body_crc == expected {
            Ok(())
        } else {
            Err(FormatError::Checksum { what: "Entry", got: self.body_crc, expected })
        }
    }
}

/// Reads the entries of a group one after another, each checked; stops at the first that is not one.
pub fn entries(payload: &[u8]) -> impl Iterator<Item = Result<(usize, EntryHead, &[u8]), FormatError>> {
    walk(payload, true)
}

/// As [`entries`], of a group whose payload was checked as a whole: the bodies are not checked once more.
pub fn entries_unchecked(
    payload: &[u8],
) -> impl Iterator<Item = Result<(usize, EntryHead, &[u8]), FormatError>> {
    walk(payload, false)
}

fn walk(payload: &[u8], check: bool) -> impl Iterator<Item = Result<(usize, EntryHead, &[u8]), FormatError>> {
    let mut at = 0;
    let mut broken = false;
    std::iter::from_fn(move || {
        let rest = payload.get(at..)?;
        if rest.is_empty() || broken {
            return None;
        }
        let entry = take_entry(rest, check).map(|(head, body)| (at, head, body));
        match &entry {
            Ok((_, _, body)) => at += EntryHead::BYTES + body.len(),
            Err(_) => broken = true,
        }
        Some(entry)
    })
}

fn take_entry(bytes: &[u8], check: bool) -> Result<(EntryHead, &[u8]), FormatError> {
    let head = EntryHead::open(bytes)?;
    let body = bytes.get(EntryHead::BYTES..).unwrap_or_default();
    let body = body.get(..head.body_bytes as usize).ok_or(FormatError::Short {
        what: "Entry",
        got: body.len(),
        expected: head.body_bytes as usize,
    })?;
    if check {
        head.check_body(body)?;
    }
    Ok((head, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> EntryHead {
        EntryHead::new(EntryKind::Batch, DiskId([3; 16]), 7, 5, crc32(b"hello"))
    }

    #[test]
    fn entries_read_back_in_order_and_stop_at_damage() {
        let mut payload = Vec::new();
        for _ in 0..3 {
            payload.extend_from_slice(&head().to_bytes());
            payload.extend_from_slice(b"hello");
        }
        assert_eq!(entries(&payload).map(|entry| entry.unwrap().0).collect::<Vec<_>>(), [0, 53, 106]);
        payload[53 + 50] ^= 1;
        let read: Vec<_> = entries(&payload).collect();
        assert_eq!(read.len(), 2);
        assert!(read[1].is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let segment = SegmentHeader {
            magic: SEGMENT_MAGIC,
            crc: 0,
            incompatible: 0,
            journal: [1; 16],
            number: 4,
            salt: 5,
            first_group: 6,
            bytes: 7,
            created: Timestamp(8),
        };
        let group = GroupHeader {
            magic: GROUP_MAGIC,
            crc: 0,
            salt: 5,
            group: 9,
            payload_bytes: 10,
            entry_count: 1,
            payload_crc: 11,
            previous: 12,
            durable_group: 8,
            time: Timestamp(13),
        }
        .sealed();
        let bits = |bytes: &[u8]| 0..bytes.len() * 8;
        let flip = |bytes: &[u8], bit: usize| {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        };
        let block = segment.to_block();
        let (head, group) = (head().to_bytes(), group.to_bytes());
        assert!(SegmentHeader::open(&block).is_ok() && EntryHead::open(&head).is_ok());
        assert!(GroupHeader::open(&group).is_ok());
        assert!(
            bits(&block[..SegmentHeader::BYTES]).all(|bit| SegmentHeader::open(&flip(&block, bit)).is_err())
        );
        assert!(bits(&group).all(|bit| GroupHeader::open(&flip(&group, bit)).is_err()));
        assert!(bits(&head).all(|bit| EntryHead::open(&flip(&head, bit)).is_err()));
    }
}
