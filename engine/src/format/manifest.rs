//! Superblock and manifest: which segments, undo runs and points make up a journal.
//!
//! Invariants: an edit says which edit before it was durable when it was written, so that a torn end is told from
//! damage; the superblock has four copies in blocks of their own, written in turn; the valid one with the highest
//! generation counts. It names one manifest file. A manifest is a header block, then edits, each beginning at a
//! multiple of 4 KiB, numbered from 1 without gap, with checksums over head and body; the journal's shape is what the
//! edits say, read in order. Both carry the newest group known durable, which tells a torn log from a damaged one.
//! Units: bytes, numbers as named. Called by `store::journal`.
//!
//! Layout of a manifest: [`ManifestHeader`] in a block of its own, then [`EditHead`], the body of its kind, zeros up
//! to the next 4 KiB.

use super::FormatError;
use super::batch::{MarkCause, MarkClass};
use super::message::check_size;
use super::segment::JournalId;
use super::wire::{Text, wire, wire_enum};
use crate::checksum::crc32;
use crate::units::{BLOCK_BYTES, DiskId, Generation, LineageId, Sequence, Timestamp};

/// First eight bytes of a superblock copy; the last one is the version.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"RPSUPR\x00\x01";
/// First eight bytes of a manifest; the last one is the version.
pub const MANIFEST_MAGIC: [u8; 8] = *b"RPMANI\x00\x01";
/// First four bytes of an edit.
pub const EDIT_MAGIC: u32 = 0x5444_4552;
/// Compatible feature: full segments of the redo log have an index at their end.
pub const COMPATIBLE_SEGMENT_INDEXES: u32 = 1;
/// Copies of the superblock.
pub const SUPERBLOCK_COPIES: u64 = 4;
/// Largest body of an edit.
pub const EDIT_BODY_BYTES_MAX: u32 = 64 << 10;

wire! {
    /// One copy of the superblock.
    pub struct Superblock / SuperblockWire = 128 {
        /// Always [`SUPERBLOCK_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// Features without which nothing must be read: none yet.
        incompatible: u32,
        /// Features without which nothing must be written: none yet.
        read_only_compatible: u32,
        /// Features that an older program may ignore: bit 0, segments of the redo log have indexes.
        compatible: u32,
        /// The journal.
        journal: JournalId,
        /// Counts the writes of the superblock; the highest counts.
        generation: u64,
        /// `crc` of the copy written before this one.
        previous: u32,
        /// The journal was closed in order, and nothing was written since.
        clean: bool,
        /// Number of the manifest file.
        manifest: u64,
        /// Newest group of the redo log known durable.
        durable_group: u64,
        /// When this copy was written.
        time: Timestamp,
        /// Edits of that manifest known durable: fewer in it are damage, not a torn end.
        manifest_edits: u64,
        ; reserved: [u8; 43],
    }
}

wire! {
    /// The head of a manifest file.
    pub struct ManifestHeader / ManifestHeaderWire = 64 {
        /// Always [`MANIFEST_MAGIC`]; its last byte is the version.
        magic: [u8; 8],
        /// CRC-32 of everything after this field.
        crc: u32,
        /// Features without which a reader must not read: none yet.
        incompatible: u32,
        /// The journal.
        journal: JournalId,
        /// The manifest's number.
        number: u64,
        ; reserved: [u8; 24],
    }
}

wire_enum! {
    /// What an edit changes.
    pub enum EditKind: u8 {
        /// A segment file is used (again); the body is [`SegmentOpened`].
        SegmentOpened = 1,
        /// A segment is no longer needed; the body is [`Released`].
        SegmentReleased = 2,
        /// A disk is in the journal; the body is [`DiskAdded`].
        DiskAdded = 3,
        /// A disk is not in the journal any more; the body is [`DiskRemoved`].
        DiskRemoved = 4,
        /// An undo epoch begins, and with it an undo run; the body is [`EpochOpened`].
        EpochOpened = 5,
        /// An undo epoch is over and its run is sealed; the body is [`EpochClosed`].
        EpochClosed = 6,
        /// One run replaces those of several epochs; the body is [`RunsMerged`].
        RunsMerged = 7,
        /// The oldest epochs of a disk are forgotten; the body is [`EpochsExpired`].
        EpochsExpired = 8,
        /// A point of one disk is kept beyond the redo log; the body is [`PointKept`].
        PointKept = 9,
        /// A point has another name, pin or promise; the body is [`PointKept`] with the new values.
        PointChanged = 10,
        /// A point is gone; the body is [`PointDropped`].
        PointDropped = 11,
        /// Points of a part of a disk's stream promise less than their marks say; the body is [`StretchDegraded`].
        StretchDegraded = 16,
        /// Entries of a disk that were durable are on no target and not in the log; the body is [`EntriesLost`].
        EntriesLost = 17,
        /// A disk was compared with its source since entries of it were lost; the body is [`LossMended`].
        LossMended = 18,
        /// Before-images of a run cannot be read; the body is [`ImagesDamaged`].
        ImagesDamaged = 19,
        /// Before-images of a run can be read again; the body is [`ImagesSound`].
        ImagesSound = 20,
        /// An applied entry of the redo log cannot be read; the body is [`EntryDamaged`].
        EntryDamaged = 21,
        /// An applied entry of the redo log can be read again; the body is [`EntrySound`].
        EntrySound = 22,
        /// A disk is larger; the body is [`DiskGrown`].
        DiskGrown = 23,
    }
}

wire! {
    /// The head of an edit.
    pub struct EditHead / EditHeadWire = 64 {
        /// Always [`EDIT_MAGIC`].
        magic: u32,
        /// CRC-32 of everything after this field, up to the end of the head.
        crc: u32,
        /// The manifest it belongs to.
        manifest: u64,
        /// Its number in the manifest, contiguous from 1.
        index: u64,
        /// Newest group of the redo log known durable.
        durable_group: u64,
        /// Bytes of body.
        body_bytes: u32,
        /// CRC-32 of the body.
        body_crc: u32,
        /// The newest edit known durable when this one was written.
        durable_index: u64,
        /// What it changes.
        kind: EditKind,
        ; reserved: [u8; 15],
    }
}

wire! {
    /// Body of [`EditKind::SegmentOpened`].
    pub struct SegmentOpened / SegmentOpenedWire = 48 {
        /// Number of this use.
        number: u64,
        /// Number of the file.
        slot: u64,
        /// Salt of its groups.
        salt: u64,
        /// Number of its first group.
        first_group: u64,
        /// Length of the file.
        bytes: u64,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Body of [`EditKind::SegmentReleased`].
    pub struct Released / ReleasedWire = 16 {
        /// Number of the segment.
        number: u64,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Body of [`EditKind::DiskAdded`].
    pub struct DiskAdded / DiskAddedWire = 64 {
        /// The disk.
        disk: DiskId,
        /// The machine's identity, so that points of its disks belong together.
        machine: [u8; 16],
        /// Size in sectors.
        size_sectors: u64,
        /// When.
        time: Timestamp,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::DiskRemoved`].
    pub struct DiskRemoved / DiskRemovedWire = 16 {
        /// The disk.
        disk: DiskId,
    }
}

wire_enum! {
    /// Why an undo epoch was opened.
    pub enum EpochCause: u8 {
        /// The epoch before it was old enough.
        Time = 1,
        /// The first before-images of a disk.
        First = 2,
        /// An existing disk is compared and repaired.
        Resync = 3,
        /// A rollback, or the way forward again.
        Rollback = 4,
    }
}

wire! {
    /// Body of [`EditKind::EpochOpened`].
    pub struct EpochOpened / EpochOpenedWire = 112 {
        /// The disk.
        disk: DiskId,
        /// The history its entries belong to.
        lineage: LineageId,
        /// The generation in force.
        generation: Generation,
        /// Its number, per disk, never reused.
        epoch: u64,
        /// The last entry before it.
        after: u64,
        /// The last sequence before it.
        sequence: Sequence,
        /// Salt of its run.
        salt: u64,
        /// When.
        time: Timestamp,
        /// For a rollback: the undo epoch it goes back into …
        to_epoch: u64,
        /// … and the last entry of that epoch that counts as a whole …
        to_number: u64,
        /// Why.
        cause: EpochCause,
        /// … and how many records of the entry behind it count.
        to_records: u32,
        ; reserved: [u8; 11],
    }
}

wire! {
    /// Body of [`EditKind::EpochClosed`].
    pub struct EpochClosed / EpochClosedWire = 64 {
        /// The disk.
        disk: DiskId,
        /// Its number.
        epoch: u64,
        /// The last entry in it.
        last: u64,
        /// Bytes of its sealed run; zero when it has none.
        run_bytes: u64,
        /// When.
        time: Timestamp,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::RunsMerged`].
    pub struct RunsMerged / RunsMergedWire = 64 {
        /// The disk.
        disk: DiskId,
        /// The oldest of the epochs.
        first: u64,
        /// The newest of them.
        last: u64,
        /// Number of the file of the merged run, never reused.
        run: u64,
        /// Its bytes.
        run_bytes: u64,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::EpochsExpired`].
    pub struct EpochsExpired / EpochsExpiredWire = 24 {
        /// The disk.
        disk: DiskId,
        /// The newest epoch that is gone.
        through: u64,
    }
}

wire! {
    /// Body of [`EditKind::PointKept`]: one disk's part of a recovery point.
    pub struct PointKept / PointKeptWire = 192 {
        /// The disk.
        disk: DiskId,
        /// The point; the parts of one machine's point have the same.
        point: [u8; 16],
        /// The last entry before it.
        number: u64,
        /// The last sequence before it.
        sequence: Sequence,
        /// The undo epoch whose images lead to it: it ends with the point, or, for what the target itself kept, begins
        /// with it, or, where it is pinned, has it inside.
        epoch: u64,
        /// Its time by the source's clock.
        source_time: Timestamp,
        /// What it promises.
        class: MarkClass,
        /// Kept until somebody says otherwise.
        pinned: bool,
        /// It promised more once; something was found since.
        degraded: bool,
        /// Its name; empty without one.
        name: Text<64>,
        /// Why its mark was placed.
        cause: MarkCause,
        ; reserved: [u8; 60],
    }
}

wire! {
    /// Body of [`EditKind::PointDropped`].
    pub struct PointDropped / PointDroppedWire = 32 {
        /// The disk.
        disk: DiskId,
        /// The point.
        point: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::StretchDegraded`].
    pub struct StretchDegraded / StretchDegradedWire = 192 {
        /// The disk.
        disk: DiskId,
        /// The history the sequences belong to.
        lineage: LineageId,
        /// The first sequence concerned …
        from: Sequence,
        /// … and the last.
        to: Sequence,
        /// When it was told.
        time: Timestamp,
        /// What was found, in the agent's words.
        cause: Text<120>,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::EntriesLost`].
    pub struct EntriesLost / EntriesLostWire = 176 {
        /// The disk.
        disk: DiskId,
        /// The first entry that is lost …
        first: u64,
        /// … and the last.
        last: u64,
        /// When that was found, or decided.
        time: Timestamp,
        /// What became of them.
        cause: Text<120>,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::LossMended`].
    pub struct LossMended / LossMendedWire = 32 {
        /// The disk.
        disk: DiskId,
        /// The first mark behind the compare; what was lost concerns no point from here on.
        number: u64,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Body of [`EditKind::ImagesDamaged`]. Goes with the run.
    pub struct ImagesDamaged / ImagesDamagedWire = 192 {
        /// The disk.
        disk: DiskId,
        /// The oldest epoch of the run …
        first: u64,
        /// … and the newest.
        last: u64,
        /// The first block whose image is damaged …
        start: u64,
        /// … and one past the last.
        end: u64,
        /// Points that are made from the runs from this epoch on need these images; older ones have older images of the
        /// blocks.
        since: u64,
        /// When that was found.
        time: Timestamp,
        /// What was found.
        cause: Text<120>,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Body of [`EditKind::ImagesSound`].
    pub struct ImagesSound / ImagesSoundWire = 64 {
        /// The disk.
        disk: DiskId,
        /// The oldest epoch of the run …
        first: u64,
        /// … and the newest.
        last: u64,
        /// The first block whose image can be read …
        start: u64,
        /// … and one past the last.
        end: u64,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::EntryDamaged`]. Goes with the segment.
    pub struct EntryDamaged / EntryDamagedWire = 176 {
        /// The disk.
        disk: DiskId,
        /// The entry.
        number: u64,
        /// The segment it stands in.
        segment: u64,
        /// When that was found.
        time: Timestamp,
        /// What was found.
        cause: Text<120>,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// Body of [`EditKind::EntrySound`].
    pub struct EntrySound / EntrySoundWire = 32 {
        /// The disk.
        disk: DiskId,
        /// The entry.
        number: u64,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Body of [`EditKind::DiskGrown`].
    pub struct DiskGrown / DiskGrownWire = 64 {
        /// The disk.
        disk: DiskId,
        /// Its size in sectors from here on.
        size_sectors: u64,
        /// The last entry of the disk while it had its old size: points up to there have that.
        after: u64,
        /// When.
        time: Timestamp,
        ; reserved: [u8; 24],
    }
}

/// One change of the journal's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// A segment file is used (again).
    SegmentOpened(SegmentOpened),
    /// A segment is no longer needed.
    SegmentReleased(Released),
    /// A disk is in the journal.
    DiskAdded(DiskAdded),
    /// A disk is not in the journal any more.
    DiskRemoved(DiskRemoved),
    /// An undo epoch begins.
    EpochOpened(EpochOpened),
    /// An undo epoch is over.
    EpochClosed(EpochClosed),
    /// One run replaces several.
    RunsMerged(RunsMerged),
    /// The oldest epochs are forgotten.
    EpochsExpired(EpochsExpired),
    /// A point is kept.
    PointKept(PointKept),
    /// A point has new values.
    PointChanged(PointKept),
    /// A point is gone.
    PointDropped(PointDropped),
    /// Points promise less than their marks say.
    StretchDegraded(StretchDegraded),
    /// See [`EditKind::EntriesLost`].
    EntriesLost(EntriesLost),
    /// See [`EditKind::LossMended`].
    LossMended(LossMended),
    /// See [`EditKind::ImagesDamaged`].
    ImagesDamaged(ImagesDamaged),
    /// See [`EditKind::ImagesSound`].
    ImagesSound(ImagesSound),
    /// See [`EditKind::EntryDamaged`].
    EntryDamaged(EntryDamaged),
    /// See [`EditKind::EntrySound`].
    EntrySound(EntrySound),
    /// See [`EditKind::DiskGrown`].
    DiskGrown(DiskGrown),
}

/// A block-sized structure: magic, checksum over what follows it, and no feature this program does not know.
macro_rules! checked_block {
    ($name:ident, $magic:expr, $what:literal) => {
        impl $name {
            /// The block with its checksum filled in.
            #[must_use]
            pub fn to_block(&self) -> Vec<u8> {
                let mut block = self.sealed().to_bytes().to_vec();
                block.resize(BLOCK_BYTES as usize, 0);
                block
            }

            /// The same with its checksum filled in.
            #[must_use]
            pub fn sealed(&self) -> Self {
                Self { crc: self.expected_crc(), ..*self }
            }

            /// Reads and checks it.
            ///
            /// # Errors
            /// When it is of another kind or version, is damaged, or needs a feature this program does not have.
            pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
                let (value, _) = Self::read_prefix(bytes)?;
                let field =
                    |field, got, expected| Err(FormatError::Field { what: $what, field, got, expected });
                if value.magic != $magic {
                    let version = value.magic.last().copied().unwrap_or(0);
                    return field("magic", version.into(), concat!("a ", $what, " of version 1"));
                }
                let expected = value.expected_crc();
                if value.crc != expected {
                    return Err(FormatError::Checksum { what: $what, got: value.crc, expected });
                }
                if value.incompatible != 0 {
                    let bits = value.incompatible.into();
                    return field("incompatible", bits, "no feature bits; use a newer program");
                }
                Ok(value)
            }

            fn expected_crc(&self) -> u32 {
                crc32(self.to_bytes().get(12..).unwrap_or_default())
            }
        }
    };
}

checked_block!(Superblock, SUPERBLOCK_MAGIC, "superblock");

impl Superblock {
    /// Whether a block is a whole copy of a later version. From version 2 on `crc` is of the magic, too (of bytes 0 to 7, then
    /// 12 to 127): a version that flipped bits make is told from one that a program wrote.
    #[must_use]
    pub fn is_of_later_version(block: &[u8]) -> bool {
        let Ok((value, _)) = Self::read_prefix(block) else { return false };
        let [name @ .., version] = value.magic;
        let [ours @ .., this] = SUPERBLOCK_MAGIC;
        name == ours && version > this && value.crc == value.later_crc()
    }

    /// The same as a program of a later version would write it.
    #[must_use]
    pub fn sealed_as(&self, version: u8) -> Self {
        let [a, b, c, d, e, f, g, _] = SUPERBLOCK_MAGIC;
        let later = Self { magic: [a, b, c, d, e, f, g, version], ..*self };
        Self { crc: later.later_crc(), ..later }
    }

    fn later_crc(&self) -> u32 {
        let bytes = [&self.magic, self.to_bytes().get(12..).unwrap_or_default()].concat();
        crc32(&bytes)
    }
}

checked_block!(ManifestHeader, MANIFEST_MAGIC, "manifest");

impl EditHead {
    /// Bytes the edit takes in its manifest, padding included.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        (Self::BYTES as u64 + self.body_bytes as u64).next_multiple_of(BLOCK_BYTES)
    }

    /// Reads and checks a head.
    ///
    /// # Errors
    /// When the bytes are no edit, or it is damaged.
    pub fn open(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "EditHead";
        let (head, _) = Self::read_prefix(bytes)?;
        let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        if head.magic != EDIT_MAGIC {
            return field("magic", head.magic.into(), "an edit");
        }
        let expected = head.expected_crc();
        if head.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: head.crc, expected });
        }
        if head.body_bytes > EDIT_BODY_BYTES_MAX {
            return field("body_bytes", head.body_bytes.into(), "at most 64 KiB");
        }
        Ok(head)
    }

    fn expected_crc(&self) -> u32 {
        crc32(self.to_bytes().get(8..).unwrap_or_default())
    }
}

impl Edit {
    /// The disk it is about; `None` for edits of the redo log.
    #[must_use]
    pub const fn disk(&self) -> Option<DiskId> {
        match self {
            Self::SegmentOpened(_) | Self::SegmentReleased(_) => None,
            Self::DiskAdded(body) => Some(body.disk),
            Self::DiskRemoved(body) => Some(body.disk),
            Self::EpochOpened(body) => Some(body.disk),
            Self::EpochClosed(body) => Some(body.disk),
            Self::RunsMerged(body) => Some(body.disk),
            Self::EpochsExpired(body) => Some(body.disk),
            Self::PointKept(body) | Self::PointChanged(body) => Some(body.disk),
            Self::PointDropped(body) => Some(body.disk),
            Self::StretchDegraded(body) => Some(body.disk),
            Self::EntriesLost(body) => Some(body.disk),
            Self::LossMended(body) => Some(body.disk),
            Self::ImagesDamaged(body) => Some(body.disk),
            Self::ImagesSound(body) => Some(body.disk),
            Self::EntryDamaged(body) => Some(body.disk),
            Self::EntrySound(body) => Some(body.disk),
            Self::DiskGrown(body) => Some(body.disk),
        }
    }

    const fn kind(&self) -> EditKind {
        match self {
            Self::SegmentOpened(_) => EditKind::SegmentOpened,
            Self::SegmentReleased(_) => EditKind::SegmentReleased,
            Self::DiskAdded(_) => EditKind::DiskAdded,
            Self::DiskRemoved(_) => EditKind::DiskRemoved,
            Self::EpochOpened(_) => EditKind::EpochOpened,
            Self::EpochClosed(_) => EditKind::EpochClosed,
            Self::RunsMerged(_) => EditKind::RunsMerged,
            Self::EpochsExpired(_) => EditKind::EpochsExpired,
            Self::PointKept(_) => EditKind::PointKept,
            Self::PointChanged(_) => EditKind::PointChanged,
            Self::PointDropped(_) => EditKind::PointDropped,
            Self::StretchDegraded(_) => EditKind::StretchDegraded,
            Self::EntriesLost(_) => EditKind::EntriesLost,
            Self::LossMended(_) => EditKind::LossMended,
            Self::ImagesDamaged(_) => EditKind::ImagesDamaged,
            Self::ImagesSound(_) => EditKind::ImagesSound,
            Self::EntryDamaged(_) => EditKind::EntryDamaged,
            Self::EntrySound(_) => EditKind::EntrySound,
            Self::DiskGrown(_) => EditKind::DiskGrown,
        }
    }

    fn body(&self) -> Vec<u8> {
        match self {
            Self::SegmentOpened(body) => body.to_bytes().to_vec(),
            Self::SegmentReleased(body) => body.to_bytes().to_vec(),
            Self::DiskAdded(body) => body.to_bytes().to_vec(),
            Self::DiskRemoved(body) => body.to_bytes().to_vec(),
            Self::EpochOpened(body) => body.to_bytes().to_vec(),
            Self::EpochClosed(body) => body.to_bytes().to_vec(),
            Self::RunsMerged(body) => body.to_bytes().to_vec(),
            Self::EpochsExpired(body) => body.to_bytes().to_vec(),
            Self::PointKept(body) | Self::PointChanged(body) => body.to_bytes().to_vec(),
            Self::PointDropped(body) => body.to_bytes().to_vec(),
            Self::StretchDegraded(body) => body.to_bytes().to_vec(),
            Self::EntriesLost(body) => body.to_bytes().to_vec(),
            Self::LossMended(body) => body.to_bytes().to_vec(),
            Self::ImagesDamaged(body) => body.to_bytes().to_vec(),
            Self::ImagesSound(body) => body.to_bytes().to_vec(),
            Self::EntryDamaged(body) => body.to_bytes().to_vec(),
            Self::EntrySound(body) => body.to_bytes().to_vec(),
            Self::DiskGrown(body) => body.to_bytes().to_vec(),
        }
    }

    /// The edit's bytes, padded to whole blocks.
    #[must_use]
    pub fn encode(&self, manifest: u64, index: u64, durable_index: u64, durable_group: u64) -> Vec<u8> {
        let body = self.body();
        let head = EditHead {
            magic: EDIT_MAGIC,
            crc: 0,
            manifest,
            index,
            durable_group,
            durable_index,
            body_bytes: body.len() as u32,
            body_crc: crc32(&body),
            kind: self.kind(),
        };
        let head = EditHead { crc: head.expected_crc(), ..head };
        let mut bytes = head.to_bytes().to_vec();
        bytes.extend_from_slice(&body);
        bytes.resize(head.stored_bytes() as usize, 0);
        bytes
    }

    /// Whether it could be read back: what cannot must not be written, or no start would get past it.
    ///
    /// # Errors
    /// What a reader would say.
    pub fn check_readable(&self) -> Result<(), FormatError> {
        let body = self.body();
        let (body_bytes, body_crc, kind) = (body.len() as u32, crc32(&body), self.kind());
        let head = EditHead {
            magic: EDIT_MAGIC,
            crc: 0,
            manifest: 0,
            index: 0,
            durable_group: 0,
            durable_index: 0,
            body_bytes,
            body_crc,
            kind,
        };
        Self::decode(&head, &body).map(drop)
    }

    /// Reads the body of an edit.
    ///
    /// # Errors
    /// When it is damaged or not what the head says.
    pub fn decode(head: &EditHead, body: &[u8]) -> Result<Self, FormatError> {
        let expected = crc32(body);
        if body.len() != head.body_bytes as usize {
            let expected = head.body_bytes as usize;
            return Err(FormatError::Short { what: "Edit", got: body.len(), expected });
        }
        if head.body_crc != expected {
            return Err(FormatError::Checksum { what: "Edit", got: head.body_crc, expected });
        }
        Ok(match head.kind {
            EditKind::SegmentOpened => Self::SegmentOpened(SegmentOpened::read_exact(body)?),
            EditKind::SegmentReleased => Self::SegmentReleased(Released::read_exact(body)?),
            EditKind::DiskAdded => Self::DiskAdded(DiskAdded::read_exact(body)?),
            EditKind::DiskRemoved => Self::DiskRemoved(DiskRemoved::read_exact(body)?),
            EditKind::EpochOpened => Self::EpochOpened(EpochOpened::read_exact(body)?),
            EditKind::EpochClosed => Self::EpochClosed(EpochClosed::read_exact(body)?),
            EditKind::RunsMerged => Self::RunsMerged(RunsMerged::read_exact(body)?),
            EditKind::EpochsExpired => Self::EpochsExpired(EpochsExpired::read_exact(body)?),
            EditKind::PointKept => Self::PointKept(PointKept::read_exact(body)?),
            EditKind::PointChanged => Self::PointChanged(PointKept::read_exact(body)?),
            EditKind::PointDropped => Self::PointDropped(PointDropped::read_exact(body)?),
            EditKind::StretchDegraded => Self::StretchDegraded(StretchDegraded::read_exact(body)?),
            EditKind::EntriesLost => Self::EntriesLost(EntriesLost::read_exact(body)?),
            EditKind::LossMended => Self::LossMended(LossMended::read_exact(body)?),
            EditKind::ImagesDamaged => Self::ImagesDamaged(ImagesDamaged::read_exact(body)?),
            EditKind::ImagesSound => Self::ImagesSound(ImagesSound::read_exact(body)?),
            EditKind::EntryDamaged => Self::EntryDamaged(EntryDamaged::read_exact(body)?),
            EditKind::EntrySound => Self::EntrySound(EntrySound::read_exact(body)?),
            EditKind::DiskGrown => {
                let grown = DiskGrown::read_exact(body)?;
                check_size("DiskGrown", grown.size_sectors)?;
                Self::DiskGrown(grown)
            }
        })
    }
}

#[cfg(test)]
mod tests;
