//! The undo run: one file per disk and undo epoch that holds the first before-image of each overwritten block.
//!
//! Invariants: every byte of a run belongs to a structure that checks it: two copies of [`RunHeader`] (a 4 KiB block
//! each), groups of frames ([`frame`]), and on sealing the index and a trailer ([`index`]). A frame says how many bytes
//! of padding follow it, so a reader never guesses where the next one stands. A block is in at most one frame of a run.
//! Every frame and page carries the run's salt and frames their own place, so that nothing left over from another use
//! of the medium can be taken for a part of the run. Units: bytes and 4 KiB blocks. Called by `store::journal`.

pub mod frame;
pub mod index;

use std::fmt;

use super::FormatError;
use super::wire::{COUNTER_MAX, wire};
use crate::checksum::{crc32, is_zero};
use crate::limits::DISK_BYTES_MAX;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockIndex, DiskId, Generation, LineageId, Timestamp};

/// First eight bytes of an undo run.
pub const RUN_MAGIC: [u8; 8] = *b"RPUNDRUN";
/// The version this program writes, and the newest it reads.
pub const RUN_VERSION: u32 = 1;
/// Compatible features this program knows: none. Unknown ones are ignored.
pub const FEATURES_COMPATIBLE: u64 = 0;
/// Incompatible features this program knows: none. A run with an unknown one is refused.
pub const FEATURES_INCOMPATIBLE: u64 = 0;

/// Headers, groups of frames, index pages and the trailer begin at multiples of this.
pub const UNDO_ALIGN_BYTES: u64 = 4096;
/// Where the first frame stands: behind the two copies of the header.
pub const FRAMES_START: u64 = 2 * UNDO_ALIGN_BYTES;
/// Blocks of the largest disk.
pub const DISK_BLOCKS_MAX: u64 = DISK_BYTES_MAX / BLOCK_BYTES;
/// Largest file a run may be: 64 TiB of single raw blocks with their heads and index fit.
pub const RUN_BYTES_MAX: u64 = 1 << 47;

/// A half-open run of 4 KiB blocks `[start, end)`, absolute on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: u64,
    /// One past the last block; never below `start`.
    pub end: u64,
}

impl BlockRange {
    /// The run `[start, end)`.
    ///
    /// # Panics
    /// When `end < start`: a programming error; outside data goes through [`Self::from_len`].
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        assert!(start <= end);
        Self { start, end }
    }

    /// The run of `len` blocks from `first`; `None` where it would pass 2^64.
    #[must_use]
    pub const fn from_len(first: BlockIndex, len: u64) -> Option<Self> {
        match first.0.checked_add(len) {
            Some(end) => Some(Self { start: first.0, end }),
            None => None,
        }
    }

    /// Length in blocks.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds no block.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// The common part of two runs; empty (at an unspecified place) when there is none.
    #[must_use]
    pub const fn intersect(self, other: Self) -> Self {
        let start = if self.start > other.start { self.start } else { other.start };
        let end = if self.end < other.end { self.end } else { other.end };
        if start < end { Self { start, end } } else { Self { start, end: start } }
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}..{}", self.start, self.end)
    }
}

wire! {
    /// The head of an undo run; the first 4 KiB of the file are this and zeros, the second 4 KiB are the same again.
    pub struct RunHeader / RunHeaderWire = 128 {
        /// Always [`RUN_MAGIC`].
        magic: [u8; 8],
        /// CRC-32 of this structure with this field zero.
        crc: u32,
        /// Version of everything in the file.
        version: u32,
        /// Features that a reader may ignore.
        features_compatible: u64,
        /// Features without which the file cannot be read; an unknown bit is refused.
        features_incompatible: u64,
        /// The journal the run belongs to.
        journal: [u8; 16],
        /// The disk.
        disk: DiskId,
        /// The history.
        lineage: LineageId,
        /// The generation in force when the run was begun.
        generation: Generation,
        /// The undo epoch; of a merged run, the oldest one in it.
        undo_epoch: u64,
        /// The newest undo epoch in the run; the same as `undo_epoch` unless runs were merged.
        undo_epoch_last: u64,
        /// Random number of this file, repeated in every frame and page.
        salt: u64,
        /// Size of the disk in sectors.
        size_sectors: u64,
        /// When the undo epoch began.
        created: Timestamp,
    }
}

/// What a run is of, as the manifest knows it: a file that says otherwise is not the one that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunIdentity {
    /// The journal.
    pub journal: [u8; 16],
    /// The disk.
    pub disk: DiskId,
    /// The history.
    pub lineage: LineageId,
    /// The generation in force when the run was begun.
    pub generation: Generation,
    /// The oldest undo epoch in the run.
    pub undo_epoch: u64,
    /// The newest undo epoch in the run.
    pub undo_epoch_last: u64,
}

impl RunHeader {
    /// The header of a new run; `salt` is random, and never used for another file.
    #[must_use]
    pub const fn new(identity: RunIdentity, salt: u64, size_sectors: u64, created: Timestamp) -> Self {
        Self {
            magic: RUN_MAGIC,
            crc: 0,
            version: RUN_VERSION,
            features_compatible: FEATURES_COMPATIBLE,
            features_incompatible: FEATURES_INCOMPATIBLE,
            journal: identity.journal,
            disk: identity.disk,
            lineage: identity.lineage,
            generation: identity.generation,
            undo_epoch: identity.undo_epoch,
            undo_epoch_last: identity.undo_epoch_last,
            salt,
            size_sectors,
            created,
        }
    }

    /// What the run is of.
    #[must_use]
    pub const fn identity(&self) -> RunIdentity {
        RunIdentity {
            journal: self.journal,
            disk: self.disk,
            lineage: self.lineage,
            generation: self.generation,
            undo_epoch: self.undo_epoch,
            undo_epoch_last: self.undo_epoch_last,
        }
    }

    /// Every block of the disk; the last one may reach beyond the end of the disk.
    #[must_use]
    pub const fn disk_blocks(&self) -> BlockRange {
        BlockRange { start: 0, end: self.size_sectors.div_ceil(BLOCK_SECTORS) }
    }

    /// The 4 KiB block that stands twice at the front of the file.
    #[must_use]
    pub fn to_block(&self) -> [u8; UNDO_ALIGN_BYTES as usize] {
        let head = Self { crc: crc32(&Self { crc: 0, ..*self }.to_bytes()), ..*self };
        padded(&head.to_bytes())
    }

    /// Reads one copy of the header.
    ///
    /// # Errors
    /// When it is damaged, or needs a program that this one is not.
    pub fn from_block(block: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "RunHeader";
        let (head, rest) = Self::read_prefix(block)?;
        let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        if head.magic != RUN_MAGIC {
            return field("magic", u64::from_le_bytes(head.magic), "the magic of an undo run");
        }
        let expected = crc32(&Self { crc: 0, ..head }.to_bytes());
        if head.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: head.crc, expected });
        }
        check_padding(WHAT, rest)?;
        if head.version == 0 || head.version > RUN_VERSION {
            return field(
                "version",
                head.version.into(),
                "version 1; read it with the program that wrote it",
            );
        }
        let unknown = head.features_incompatible & !FEATURES_INCOMPATIBLE;
        if unknown != 0 {
            return field(
                "features_incompatible",
                unknown,
                "no bits unknown here; read it with the program that wrote it",
            );
        }
        if head.undo_epoch > head.undo_epoch_last || head.undo_epoch_last > COUNTER_MAX {
            return field(
                "undo_epoch_last",
                head.undo_epoch_last,
                "an epoch below 2^63, not before the first",
            );
        }
        if head.size_sectors == 0 || head.disk_blocks().end > DISK_BLOCKS_MAX {
            return field("size_sectors", head.size_sectors, "the size of a disk of at most 64 TiB");
        }
        Ok(head)
    }

    /// Whether an error of [`Self::from_block`] is about a sound header that this program must not read, rather than
    /// about damage.
    #[must_use]
    pub fn is_refusal(error: &FormatError) -> bool {
        matches!(error, FormatError::Field { field: "version" | "features_incompatible", .. })
    }
}

/// `head` and zeros up to a 4 KiB block.
fn padded(head: &[u8]) -> [u8; UNDO_ALIGN_BYTES as usize] {
    let mut block = [0; UNDO_ALIGN_BYTES as usize];
    for (slot, byte) in block.iter_mut().zip(head) {
        *slot = *byte;
    }
    block
}

/// The padding of a block must be zeros, so that no byte of the file is unchecked.
fn check_padding(what: &'static str, padding: &[u8]) -> Result<(), FormatError> {
    if is_zero(padding) {
        return Ok(());
    }
    Err(FormatError::Field { what, field: "padding", got: 1, expected: "zeros" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> RunIdentity {
        RunIdentity {
            journal: [1; 16],
            disk: DiskId([2; 16]),
            lineage: LineageId([3; 16]),
            generation: Generation(4),
            undo_epoch: 5,
            undo_epoch_last: 6,
        }
    }

    fn header() -> RunHeader {
        RunHeader::new(identity(), 0x5A17, 1 << 21, Timestamp(7))
    }

    #[test]
    fn a_header_reads_back_and_every_flipped_bit_is_found() {
        let block = header().to_block();
        let read = RunHeader::from_block(&block).unwrap();
        assert_eq!((read.identity(), read.salt, read.size_sectors), (identity(), 0x5A17, 1 << 21));
        for bit in 0..block.len() * 8 {
            let mut damaged = block;
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = RunHeader::from_block(&damaged).unwrap_err();
            assert!(!RunHeader::is_refusal(&error), "bit {bit}: {error}");
        }
        for len in 0..RunHeader::BYTES {
            assert!(RunHeader::from_block(&block[..len]).is_err());
        }
    }

    #[test]
    fn newer_versions_and_unknown_features_are_refused_and_named() {
        let refused = |header: RunHeader| {
            let error = RunHeader::from_block(&header.to_block()).unwrap_err();
            assert!(RunHeader::is_refusal(&error), "{error}");
            error.to_string()
        };
        assert!(refused(RunHeader { version: 2, ..header() }).contains("version is 2"));
        let features = RunHeader { features_incompatible: 1 << 40, ..header() };
        assert!(refused(features).contains("program that wrote it"));
        assert!(RunHeader::from_block(&RunHeader { features_compatible: 9, ..header() }.to_block()).is_ok());
    }

    #[test]
    fn impossible_sizes_and_epochs_are_refused() {
        for damaged in [
            RunHeader { size_sectors: 0, ..header() },
            RunHeader { size_sectors: u64::MAX, ..header() },
            RunHeader { undo_epoch: 7, ..header() },
            RunHeader { undo_epoch_last: u64::MAX, ..header() },
        ] {
            assert!(RunHeader::from_block(&damaged.to_block()).is_err(), "{damaged:?}");
        }
    }
}
