//! Known values of the structures of a journal: superblock, manifest, segments. Called by the golden test.

use reprotect_engine::checksum::crc32;
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{
    DiskAdded, DiskGrown, DiskRemoved, Edit, EntriesLost, EntryDamaged, EntrySound, EpochCause, EpochClosed,
    EpochOpened, EpochsExpired, ImagesDamaged, ImagesSound, LossMended, MANIFEST_MAGIC, ManifestHeader,
    PointDropped, PointKept, Released, RunsMerged, SUPERBLOCK_MAGIC, SegmentOpened, StretchDegraded,
    Superblock,
};
use reprotect_engine::format::segment::{
    Applied, EntryHead, EntryKind, GROUP_MAGIC, GroupHeader, SEGMENT_MAGIC, SegmentHeader,
};
use reprotect_engine::format::segment_index::{SEGMENT_INDEX_MAGIC, SegmentIndexHead, SegmentIndexItem};
use reprotect_engine::format::wire::Text;
use reprotect_engine::units::{Sequence, Timestamp};

use crate::samples::{DISK, GENERATION, LINEAGE};

const JOURNAL: [u8; 16] = [0x10; 16];
const MACHINE: [u8; 16] = [0x3a; 16];
const POINT: [u8; 16] = [0x90; 16];
const SALT: u64 = 0x5a17_5a17_5a17_5a17;
const TIME: Timestamp = Timestamp(1_700_000_000_000_000_000);

pub(crate) fn superblock() -> Superblock {
    Superblock {
        magic: SUPERBLOCK_MAGIC,
        crc: 0,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        journal: JOURNAL,
        generation: 9,
        previous: 0x1234_5678,
        clean: true,
        manifest: 2,
        durable_group: 77,
        time: TIME,
        manifest_edits: 11,
    }
    .sealed()
}

pub(crate) fn manifest_header() -> ManifestHeader {
    ManifestHeader { magic: MANIFEST_MAGIC, crc: 0, incompatible: 0, journal: JOURNAL, number: 2 }.sealed()
}

/// One edit of each kind.
pub(crate) fn edits() -> Vec<Edit> {
    let point = PointKept {
        disk: DISK,
        point: POINT,
        number: 40,
        sequence: Sequence(41),
        epoch: 5,
        source_time: TIME,
        class: MarkClass::ALL[0],
        pinned: true,
        degraded: false,
        name: Text::new("before the upgrade"),
        cause: MarkCause::Command,
    };
    vec![
        Edit::SegmentOpened(SegmentOpened {
            number: 3,
            slot: 1,
            salt: SALT,
            first_group: 60,
            bytes: 1 << 28,
        }),
        Edit::SegmentReleased(Released { number: 2 }),
        Edit::DiskAdded(DiskAdded { disk: DISK, machine: MACHINE, size_sectors: 1 << 21, time: TIME }),
        Edit::DiskRemoved(DiskRemoved { disk: DISK }),
        Edit::EpochOpened(EpochOpened {
            disk: DISK,
            lineage: LINEAGE,
            generation: GENERATION,
            epoch: 6,
            after: 40,
            sequence: Sequence(41),
            salt: SALT,
            time: TIME,
            to_epoch: 3,
            to_number: 20,
            cause: EpochCause::Rollback,
            to_records: 4,
        }),
        Edit::EpochClosed(EpochClosed { disk: DISK, epoch: 5, last: 40, run_bytes: 1 << 20, time: TIME }),
        Edit::RunsMerged(RunsMerged { disk: DISK, first: 4, last: 5, run: 1, run_bytes: 3 << 20 }),
        Edit::EpochsExpired(EpochsExpired { disk: DISK, through: 3 }),
        Edit::PointKept(point),
        Edit::PointChanged(PointKept { pinned: false, degraded: true, ..point }),
        Edit::PointDropped(PointDropped { disk: DISK, point: POINT }),
        Edit::StretchDegraded(StretchDegraded {
            disk: DISK,
            lineage: LINEAGE,
            from: Sequence(30),
            to: Sequence(41),
            time: TIME,
            cause: Text::new("events were lost"),
        }),
        Edit::EntriesLost(EntriesLost {
            disk: DISK,
            first: 42,
            last: 44,
            time: TIME,
            cause: Text::new("the redo log is damaged"),
        }),
        Edit::LossMended(LossMended { disk: DISK, number: 50 }),
        Edit::ImagesDamaged(ImagesDamaged {
            disk: DISK,
            first: 4,
            last: 5,
            start: 16,
            end: 32,
            since: 3,
            time: TIME,
            cause: Text::new("checksum"),
        }),
        Edit::ImagesSound(ImagesSound { disk: DISK, first: 4, last: 5, start: 20, end: 21 }),
        Edit::EntryDamaged(EntryDamaged {
            disk: DISK,
            number: 41,
            segment: 3,
            time: TIME,
            cause: Text::new("checksum"),
        }),
        Edit::EntrySound(EntrySound { disk: DISK, number: 41 }),
        Edit::DiskGrown(DiskGrown { disk: DISK, size_sectors: 1 << 22, after: 50, time: TIME }),
    ]
}

pub(crate) fn segment_header() -> SegmentHeader {
    SegmentHeader {
        magic: SEGMENT_MAGIC,
        crc: 0,
        incompatible: 0,
        journal: JOURNAL,
        number: 3,
        salt: SALT,
        first_group: 60,
        bytes: 1 << 28,
        created: TIME,
    }
}

/// Of [`segment_header`]; counts and checksums are filled in when it is written.
pub(crate) fn segment_index() -> (SegmentIndexHead, Vec<SegmentIndexItem>) {
    let head = SegmentIndexHead {
        magic: SEGMENT_INDEX_MAGIC,
        crc: 0,
        incompatible: 0,
        journal: JOURNAL,
        number: 3,
        salt: SALT,
        bytes: 1 << 28,
        first_group: 60,
        last_group: 75,
        groups_end: 9 << 20,
        previous: 0x8765_4321,
        last_crc: 0x1357_2468,
        items: 0,
        items_crc: 0,
    };
    let item = |kind: &EntryKind, at: u64| SegmentIndexItem {
        disk: DISK,
        number: (40 + at) * u64::from(kind.is_numbered()),
        offset: 4096 + 1000 * at,
        time: TIME,
        bytes: 900,
        kind: *kind,
    };
    (head, EntryKind::ALL.iter().zip(1..).map(|(kind, at)| item(kind, at)).collect())
}

pub(crate) fn applied() -> Applied {
    Applied { number: 40, epoch: 5, undo_bytes: 1 << 20 }
}

/// Head and body of an entry of each kind.
pub(crate) fn entries() -> Vec<(EntryKind, Vec<u8>)> {
    let body = |kind| match kind {
        EntryKind::Applied => applied().to_bytes().to_vec(),
        _ => b"the body of the frame as it came".to_vec(),
    };
    let numbered = |kind| u64::from(!matches!(kind, EntryKind::State | EntryKind::Applied));
    let entry = |kind: &EntryKind| {
        let body = body(*kind);
        let head = EntryHead::new(*kind, DISK, 41 * numbered(*kind), body.len() as u32, crc32(&body));
        (*kind, [head.to_bytes().as_slice(), &body].concat())
    };
    EntryKind::ALL.iter().map(entry).collect()
}

/// A group of all these entries, without the padding that follows.
pub(crate) fn group() -> Vec<u8> {
    let payload: Vec<u8> = entries().into_iter().flat_map(|(_, entry)| entry).collect();
    let header = GroupHeader {
        magic: GROUP_MAGIC,
        crc: 0,
        salt: SALT,
        group: 61,
        payload_bytes: payload.len() as u32,
        entry_count: EntryKind::ALL.len() as u32,
        payload_crc: crc32(&payload),
        previous: 0x8765_4321,
        durable_group: 60,
        time: TIME,
    };
    [header.sealed().to_bytes().as_slice(), &payload].concat()
}
