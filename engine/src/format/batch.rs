//! Batches: ordered lists of records of one disk, the unit that is sent, credited and made durable.
//!
//! Invariants: at most 4 MiB of plain payload and [`BATCH_RECORDS_MAX`] records; a delta batch's records have the
//! contiguous sequences `first_sequence ..= last_sequence`; the chain digest covers canonical plaintext fields only,
//! so a relay may recompress but not reorder, drop or alter. A bulk batch says which sectors it settles
//! (`cover`), including those that needed no record. The head has a CRC of its own, because nothing else would notice
//! a wrong `cover`, and a wrong `chain` would look like a fork. Units: sectors, bytes, sequences.
//!
//! Layout: [`BatchHeader`] or [`BulkHeader`], CRC-32 of it (4 bytes), then the records.

use bytes::{BufMut, Bytes, BytesMut};

use super::FormatError;
use super::extent::{Record, RecordKind};
use super::frame::{Frame, FrameKind};
use super::wire::{COUNTER_MAX, Text, wire, wire_enum};
use crate::checksum::crc32;
use crate::limits::{BATCH_PLAIN_BYTES_MAX, BATCH_RECORDS_MAX, DELTA_RECORD_BYTES_MAX};
use crate::units::{
    BLOCK_BYTES, DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

/// Digest of a delta stream up to a batch.
pub type Chain = [u8; 16];

const HEAD_CRC_BYTES: usize = 4;

/// The chain before the first batch of a lineage.
pub const CHAIN_START: Chain = [0; 16];

wire_enum! {
    /// What the sequences of a stretch promise.
    pub enum Stretch: u8 {
        /// Captured in submission order: every sequence is a crash-consistent state.
        Ordered = 1,
        /// Harvested: only marks are states.
        Diff = 2,
    }
}

wire! {
    /// Head of a delta batch.
    pub struct BatchHeader / BatchHeaderWire = 96 {
        /// The disk.
        disk: DiskId,
        /// Its history.
        lineage: LineageId,
        /// The sender's fencing token.
        generation: Generation,
        /// Sequence of the first record.
        first_sequence: Sequence,
        /// Chain digest of everything before this batch.
        chain: Chain,
        /// When the newest change in it was captured, by the source's clock.
        source_time: Timestamp,
        /// Number of records.
        record_count: u32,
        /// What its sequences promise.
        stretch: Stretch,
        ; reserved: [u8; 19],
    }
}

wire! {
    /// Head of a bulk batch.
    pub struct BulkHeader / BulkHeaderWire = 96 {
        /// The disk.
        disk: DiskId,
        /// Its history.
        lineage: LineageId,
        /// The sender's fencing token.
        generation: Generation,
        /// The pass it belongs to.
        pass: u64,
        /// Newest delta sequence when the data were read.
        as_of: Sequence,
        /// The sectors this batch settles.
        cover: SectorRange,
        /// Number of records; zero where the sectors proved equal.
        record_count: u32,
        ; reserved: [u8; 20],
    }
}

wire_enum! {
    /// What a mark says of the disk at its sequence.
    pub enum MarkClass: u8 {
        /// Crash-consistent.
        Crash = 1,
        /// Taken while file systems were frozen.
        Frozen = 2,
        /// Application-consistent.
        App = 3,
        /// Blocks of different times: never offered as a point.
        Fuzzy = 4,
    }
}

wire_enum! {
    /// Why a mark was placed.
    pub enum MarkCause: u8 {
        /// A scan or resync pass ended there.
        Pass = 1,
        /// A timer of the policy.
        Timer = 2,
        /// Somebody asked for it.
        Command = 3,
        /// The source was stopped: nothing comes after it.
        Stop = 4,
    }
}

wire! {
    /// A mark: says what the stream stands for at a sequence.
    pub struct Mark / MarkWire = 168 {
        /// The disk.
        disk: DiskId,
        /// Its history.
        lineage: LineageId,
        /// The sender's fencing token.
        generation: Generation,
        /// The last sequence before the mark.
        sequence: Sequence,
        /// Chain digest of everything before the mark.
        chain: Chain,
        /// The mark's time by the source's clock.
        source_time: Timestamp,
        /// The machine's point it is part of: the marks of one point have the same on all disks. Zeros: of this disk only.
        point: [u8; 16],
        /// Counts the marks of this generation from 1: a higher one was placed later, also at the same sequence.
        number: u64,
        /// What it promises.
        class: MarkClass,
        /// Why it was placed.
        cause: MarkCause,
        /// The name somebody gave the point; empty without one.
        name: Text<64>,
        /// Blocks of 4 KiB that could not be read from the source: the target may hold older content there, or none. Above
        /// zero the point is degraded, whatever its class.
        unread_blocks: u32,
        ; reserved: [u8; 2],
    }
}

/// What whoever places a mark says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkLabel {
    /// The machine's point it is part of; zeros: of this disk only.
    pub point: [u8; 16],
    /// What it promises.
    pub class: MarkClass,
    /// Why it is placed.
    pub cause: MarkCause,
    /// The name somebody gave the point; empty without one.
    pub name: Text<64>,
    /// The mark's time by the source's clock.
    pub source_time: Timestamp,
}

impl MarkLabel {
    /// A mark of one disk without a name.
    #[must_use]
    pub fn of_disk(class: MarkClass, cause: MarkCause, source_time: Timestamp) -> Self {
        Self { point: [0; 16], class, cause, name: Text::new(""), source_time }
    }
}

impl Mark {
    /// Whether the source was in this state: it was read at one moment, and all of it was.
    #[must_use]
    pub fn is_state(&self) -> bool {
        self.class != MarkClass::Fuzzy && self.unread_blocks == 0
    }

    /// What was said of it when it was placed.
    #[must_use]
    pub const fn label(&self) -> MarkLabel {
        MarkLabel {
            point: self.point,
            class: self.class,
            cause: self.cause,
            name: self.name,
            source_time: self.source_time,
        }
    }
}

/// What sending records costs in credit: their plain payload, a sector for each record and a block for the batch, so
/// that empty ones are not free.
#[must_use]
pub fn credit_cost(records: &[Record]) -> u64 {
    records.iter().map(|record| record.plain_bytes() + SECTOR_BYTES).sum::<u64>() + BLOCK_BYTES
}

/// What the dearest batch costs in credit.
pub const BATCH_COST_MAX: u64 = BATCH_PLAIN_BYTES_MAX + BATCH_RECORDS_MAX as u64 * SECTOR_BYTES + BLOCK_BYTES;

impl BatchHeader {
    /// Sequence of the last record.
    #[must_use]
    pub const fn last_sequence(&self) -> Sequence {
        Sequence(self.first_sequence.0 + self.record_count as u64 - 1)
    }

    /// The chain digest after this batch with these records.
    #[must_use]
    pub fn chain_after(&self, records: &[Record]) -> Chain {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.chain);
        hasher.update(&self.disk.0);
        hasher.update(&self.lineage.0);
        hasher.update(&self.first_sequence.0.to_le_bytes());
        hasher.update(&[self.stretch as u8]);
        for record in records {
            record.digest(&mut hasher);
        }
        let mut chain = CHAIN_START;
        for (slot, byte) in chain.iter_mut().zip(hasher.finalize().as_bytes()) {
            *slot = *byte;
        }
        chain
    }
}

/// Encodes a batch as a frame; payload is shared, not copied.
fn encode(kind: FrameKind, head: &[u8], records: &[Record]) -> Frame {
    let mut parts = Vec::with_capacity(1 + 2 * records.len());
    let mut pending = BytesMut::from(head);
    pending.put_u32_le(crc32(head));
    for record in records {
        record.put_head(&mut pending);
        // Small payloads ride with the heads; large ones stay where they are.
        if record.payload().len() <= 1024 {
            pending.extend_from_slice(record.payload());
        } else {
            parts.push(pending.split().freeze());
            parts.push(record.payload().clone());
        }
    }
    if !pending.is_empty() {
        parts.push(pending.freeze());
    }
    Frame::from_parts(kind, parts)
}

/// A delta batch as a frame.
#[must_use]
pub fn encode_batch(header: &BatchHeader, records: &[Record]) -> Frame {
    debug_assert_eq!(header.record_count as usize, records.len());
    encode(FrameKind::Batch, &header.to_bytes(), records)
}

/// A bulk batch as a frame.
#[must_use]
pub fn encode_bulk(header: &BulkHeader, records: &[Record]) -> Frame {
    debug_assert_eq!(header.record_count as usize, records.len());
    encode(FrameKind::Bulk, &header.to_bytes(), records)
}

/// Reads a delta batch's body.
///
/// # Errors
/// When any length, checksum or count is not what the format says.
pub fn decode_batch(mut body: Bytes) -> Result<(BatchHeader, Vec<Record>), FormatError> {
    let (header, rest) = BatchHeader::read_prefix(&body)?;
    check_head("Batch head", &body, rest)?;
    let records = take_records(&mut body, BatchHeader::BYTES, header.record_count)?;
    if records.is_empty() {
        return Err(FormatError::Field {
            what: "Batch",
            field: "record_count",
            got: 0,
            expected: "at least one record",
        });
    }
    if header.first_sequence.0 == 0 || header.last_sequence().0 > COUNTER_MAX {
        return Err(FormatError::Field {
            what: "Batch",
            field: "first_sequence",
            got: header.first_sequence.0,
            expected: "sequences from 1 to below 2^63",
        });
    }
    if let Some(long) = records.iter().find(|record| record.plain_bytes() > DELTA_RECORD_BYTES_MAX) {
        return Err(FormatError::Field {
            what: "Batch",
            field: "record",
            got: long.plain_bytes(),
            expected: "at most 64 KiB plain in a delta record",
        });
    }
    Ok((header, records))
}

/// Reads a bulk batch's body.
///
/// # Errors
/// When any length, checksum or count is not what the format says, or a record lies outside the cover.
pub fn decode_bulk(mut body: Bytes) -> Result<(BulkHeader, Vec<Record>), FormatError> {
    let (header, rest) = BulkHeader::read_prefix(&body)?;
    check_head("Bulk head", &body, rest)?;
    let records = take_records(&mut body, BulkHeader::BYTES, header.record_count)?;
    let mut at = header.cover.start;
    for record in &records {
        if record.range().start < at || record.range().end > header.cover.end {
            return Err(FormatError::Field {
                what: "Bulk",
                field: "record",
                got: record.range().start,
                expected: "ascending records inside the cover",
            });
        }
        at = record.range().end;
    }
    Ok((header, records))
}

/// Checks the CRC that stands between the head of `body` and the `rest`.
fn check_head(what: &'static str, body: &[u8], rest: &[u8]) -> Result<(), FormatError> {
    let Some(got) = rest.first_chunk().map(|crc| u32::from_le_bytes(*crc)) else {
        return Err(FormatError::Short { what, got: rest.len(), expected: HEAD_CRC_BYTES });
    };
    let head = body.get(..body.len().saturating_sub(rest.len())).unwrap_or_default();
    let expected = crc32(head);
    if got == expected { Ok(()) } else { Err(FormatError::Checksum { what, got, expected }) }
}

fn take_records(body: &mut Bytes, head_bytes: usize, count: u32) -> Result<Vec<Record>, FormatError> {
    if count > BATCH_RECORDS_MAX {
        return Err(FormatError::Field {
            what: "Batch",
            field: "record_count",
            got: count.into(),
            expected: "at most 8192",
        });
    }
    let _ = body.split_to((head_bytes + HEAD_CRC_BYTES).min(body.len()));
    let mut records = Vec::with_capacity(count.min(64) as usize);
    let mut plain = 0_u64;
    for _ in 0..count {
        let record = Record::take(body)?;
        debug_assert!(record.kind() == RecordKind::Data || record.payload().is_empty());
        plain += record.plain_bytes();
        if plain > BATCH_PLAIN_BYTES_MAX {
            return Err(FormatError::Field {
                what: "Batch",
                field: "plain bytes",
                got: plain,
                expected: "at most 4 MiB",
            });
        }
        records.push(record);
    }
    if body.is_empty() { Ok(records) } else { Err(FormatError::Trailing { what: "Batch", got: body.len() }) }
}
