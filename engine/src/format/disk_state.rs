//! What a master target remembers of a disk in its state folder: identity, generation, position and the progress of
//! the pass.
//!
//! Invariants: written only after the target was flushed, so every settled range and the sequence are true of the
//! medium; replaced whole and durably; a state that fails its checksum is refused, never guessed (I10).
//! Units: sectors and sequences. Called by the master target's disk threads and by the simulator.
//!
//! Layout: [`DiskStateHead`], then the settled ranges, then the touched ranges (16 bytes each).

use bytes::{BufMut, BytesMut};

use super::FormatError;
use super::batch::Chain;
use super::message::{PassMode, SourceId, check_size};
use super::wire::{COUNTER_MAX, put_items, take_items, wire};
use crate::range_set::RangeSet;
use crate::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence};

/// First eight bytes of a state file.
pub const DISK_STATE_MAGIC: [u8; 8] = *b"RPDISK\x00\x01";

wire! {
    /// The fixed head of a state file.
    pub struct DiskStateHead / DiskStateHeadWire = 192 {
        /// Always [`DISK_STATE_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// Number of settled ranges.
        settled_count: u32,
        /// Number of touched ranges.
        touched_count: u32,
        /// What the pass needs.
        mode: PassMode,
        /// The disk.
        disk: DiskId,
        /// The agent that may write it.
        agent: PeerId,
        /// The source disk on that agent.
        source: [u8; 16],
        /// Size in sectors.
        size_sectors: u64,
        /// The newest generation ever granted.
        generation: Generation,
        /// The history.
        lineage: LineageId,
        /// Durable (and applied) sequence.
        sequence: Sequence,
        /// Chain digest at that sequence.
        chain: Chain,
        /// Sequence of the last mark.
        marked: Sequence,
        /// Number of the pass.
        pass: u64,
        ; reserved: [u8; 51],
    }
}

/// The state of one disk at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskState {
    /// The disk.
    pub disk: DiskId,
    /// The agent that may write it.
    pub agent: PeerId,
    /// The source disk on that agent.
    pub source: SourceId,
    /// Size in sectors.
    pub size_sectors: u64,
    /// The newest generation ever granted.
    pub generation: Generation,
    /// The history.
    pub lineage: LineageId,
    /// Durable (and applied) sequence.
    pub sequence: Sequence,
    /// Chain digest at that sequence.
    pub chain: Chain,
    /// Sequence of the last mark.
    pub marked: Sequence,
    /// Number of the pass.
    pub pass: u64,
    /// What the pass needs.
    pub mode: PassMode,
    /// What the pass has settled, durably.
    pub settled: RangeSet,
    /// What delta has written since the pass began, outside `settled`: bulk must not overwrite it.
    pub touched: RangeSet,
}

impl DiskState {
    /// The whole disk.
    #[must_use]
    pub const fn whole(&self) -> SectorRange {
        SectorRange { start: 0, end: self.size_sectors }
    }

    /// The file's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut head = DiskStateHead {
            magic: DISK_STATE_MAGIC,
            crc: 0,
            settled_count: self.settled.run_count() as u32,
            touched_count: self.touched.run_count() as u32,
            mode: self.mode,
            disk: self.disk,
            agent: self.agent,
            source: self.source,
            size_sectors: self.size_sectors,
            generation: self.generation,
            lineage: self.lineage,
            sequence: self.sequence,
            chain: self.chain,
            marked: self.marked,
            pass: self.pass,
        };
        let mut tail = BytesMut::new();
        put_items(&mut tail, self.settled.iter());
        put_items(&mut tail, self.touched.iter());
        head.crc = checksum(&head, &tail);
        let mut out = Vec::with_capacity(DiskStateHead::BYTES + tail.len());
        out.put_slice(&head.to_bytes());
        out.put_slice(&tail);
        out
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// When they are damaged, of another version or not a disk state at all.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "DiskState";
        if bytes.first_chunk() != Some(&DISK_STATE_MAGIC) {
            return Err(FormatError::Field {
                what: WHAT,
                field: "magic",
                got: bytes.get(7).copied().unwrap_or(0).into(),
                expected: "a disk state of version 1",
            });
        }
        let (head, tail) = DiskStateHead::read_prefix(bytes)?;
        let expected = checksum(&head, tail);
        if head.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: head.crc, expected });
        }
        check_size(WHAT, head.size_sectors)?;
        let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        if head.marked > head.sequence {
            return field("marked", head.marked.0, "no mark behind the sequence");
        }
        if head.pass > COUNTER_MAX {
            return field("pass", head.pass, "a number below 2^63");
        }
        let whole = SectorRange { start: 0, end: head.size_sectors };
        let (settled, rest) = take_ranges(tail, head.settled_count, whole)?;
        let (touched, rest) = take_ranges(rest, head.touched_count, whole)?;
        if !rest.is_empty() {
            return Err(FormatError::Trailing { what: WHAT, got: rest.len() });
        }
        Ok(Self {
            disk: head.disk,
            agent: head.agent,
            source: head.source,
            size_sectors: head.size_sectors,
            generation: head.generation,
            lineage: head.lineage,
            sequence: head.sequence,
            chain: head.chain,
            marked: head.marked,
            pass: head.pass,
            mode: head.mode,
            settled,
            touched,
        })
    }
}

/// Reads one set of ranges, which must be what [`RangeSet`] would write: a state that says one thing in two ways was
/// not written by us.
fn take_ranges(bytes: &[u8], count: u32, whole: SectorRange) -> Result<(RangeSet, &[u8]), FormatError> {
    let (ranges, rest) = take_items::<SectorRange>(bytes, count as usize, "DiskState")?;
    let mut at = None; // end of the range before
    for range in &ranges {
        if range.is_empty() || !whole.contains(*range) || at.is_some_and(|end| range.start <= end) {
            return Err(FormatError::Field {
                what: "DiskState",
                field: "ranges",
                got: range.start,
                expected: "non-empty runs inside the disk, ascending and apart",
            });
        }
        at = Some(range.end);
    }
    Ok((ranges.into_iter().collect(), rest))
}

fn checksum(head: &DiskStateHead, tail: &[u8]) -> u32 {
    let bytes = DiskStateHead { crc: 0, ..*head }.to_bytes();
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes.get(12..).unwrap_or_default());
    hasher.update(tail);
    hasher.finalize()
}
