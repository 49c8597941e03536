//! Known values of every structure on wire and disk: what the golden files pin and the property tests damage.
//!
//! Invariant: nothing here depends on a compressor, a clock or randomness, so the encoded bytes never change unless a
//! format does. Called by the tests beside this folder.

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, CHAIN_START, Mark, MarkCause, MarkClass, Stretch,
};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::handshake::{HELLO_MAGIC, Hello, HelloAck, Role};
use reprotect_engine::format::message::{
    Ack, Auth, BulkAckHead, CompareAnswer, CompareHashesHead, CompareRequestHead, Credit, ErrorCode, Fenced,
    GrantHead, GrowDisk, InventoryDisk, InventoryHead, MarkRefused, MarkRequest, Message, Nack, NackReason,
    OfferHead, OpenDiskHead, PassBegin, PassCause, PassEnd, PassMode, PassState, PointDegrade, Policy,
    RefineUnit, Welcome,
};
use reprotect_engine::format::standby::{Load, Probe};
use reprotect_engine::format::wire::Text;
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence, Timestamp};

pub(crate) const DISK: DiskId = DiskId([0xd1; 16]);
pub(crate) const AGENT: PeerId = PeerId([0xa1; 16]);
pub(crate) const TARGET: PeerId = PeerId([0x71; 16]);
pub(crate) const LINEAGE: LineageId = LineageId([0x11; 16]);
pub(crate) const GENERATION: Generation = Generation(7);
pub(crate) const CHAIN: [u8; 16] = [0xc4; 16];

/// 4096 times `A` as one zstd frame with its content size, made of one run-length block.
pub(crate) const ZSTD_4096_A: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x0f, 0x03, 0x80, 0x00, b'A'];

pub(crate) fn hello() -> Hello {
    Hello { required: 0, optional: 0x8000_0000_0000_0001, relays: 1, ..Hello::new(AGENT, TARGET, [0x5e; 16]) }
}

pub(crate) fn hello_ack() -> HelloAck {
    HelloAck {
        magic: HELLO_MAGIC,
        version: 1,
        role: Role::MasterTarget,
        features: 0,
        target: TARGET,
        nonce: [0x0e; 32],
    }
}

pub(crate) fn mark() -> Mark {
    Mark {
        disk: DISK,
        lineage: LINEAGE,
        generation: GENERATION,
        sequence: Sequence(42),
        chain: CHAIN,
        source_time: Timestamp(1_700_000_000_000_000_000),
        point: [0x0b; 16],
        number: 3,
        class: MarkClass::Crash,
        cause: MarkCause::Command,
        name: Text::new("before the upgrade"),
        unread_blocks: 0,
    }
}

fn inventory() -> Message {
    let mut fs_uuids = [0; 128];
    fs_uuids[..16].fill(0xf5);
    let disk = InventoryDisk {
        source: [0x50; 16],
        size_sectors: 1 << 21,
        gpt_guid: [0x69; 16],
        mbr_signature: 0x1234_5678,
        fs_count: 1,
        selected: true,
        name: Text::new("/dev/sdb"),
        fs_uuids,
    };
    Message::Inventory(InventoryHead { host_name: Text::new("kräuter-01"), disk_count: 1 }, vec![disk])
}

fn session_messages() -> Vec<(&'static str, Message)> {
    let grant = Bytes::from_static(b"signed grant");
    let auth = Auth {
        agent: AGENT,
        signature: Bytes::from_static(b"signature"),
        certificates: vec![Bytes::from_static(b"leaf"), Bytes::from_static(b"issuer")],
    };
    let offer = OfferHead {
        disk: DISK,
        source: [0x50; 16],
        size_sectors: 1 << 21,
        generation: GENERATION,
        grant_bytes: 12,
    };
    let open = OpenDiskHead {
        disk: DISK,
        size_sectors: 1 << 21,
        generation: GENERATION,
        lineage: LINEAGE,
        durable: Sequence(40),
        grant_bytes: 12,
    };
    let head = GrantHead {
        disk: DISK,
        generation: GENERATION,
        lineage: LINEAGE,
        durable: Sequence(40),
        chain: CHAIN,
        pass: 3,
        mode: PassMode::Compare,
        range_count: 2,
        grant_bytes: 12,
    };
    let ranges = vec![SectorRange::new(0, 8192), SectorRange::new(16384, 16392)];
    vec![
        ("AUTH", Message::Auth(auth)),
        ("WELCOME", Message::Welcome(Welcome { offers: 2 })),
        ("INVENTORY", inventory()),
        ("OFFER", Message::Offer(offer, grant.clone())),
        ("OPEN_DISK", Message::OpenDisk(open, grant.clone())),
        ("GRANT", Message::Grant(head, ranges, grant)),
    ]
}

fn disk_messages() -> Vec<(&'static str, Message)> {
    let (disk, generation) = (DISK, GENERATION);
    let ack = Ack {
        disk,
        generation,
        received: Sequence(44),
        durable: Sequence(43),
        applied: Sequence(42),
        marked: Sequence(41),
        mark: 3,
    };
    let bulk_ack = BulkAckHead { disk, generation, pass: 3, range_count: 1 };
    let nack = Nack { disk, generation, resume_from: Sequence(45), reason: NackReason::Gap };
    let request = CompareRequestHead {
        disk,
        generation,
        request: 9,
        range: SectorRange::new(8192, 16384),
        unit_count: 2,
    };
    let hashes = CompareHashesHead { disk, generation, request: 9, hash_count: 1, mask_count: 2 };
    let crcs = std::array::from_fn(|block| 0xc0de_0000 + block as u32);
    let answer = CompareAnswer { hashes: vec![UnitHash([0x4a; 16])], masks: vec![0xfff7, 0x0001] };
    let degrade = PointDegrade {
        disk,
        lineage: LINEAGE,
        generation,
        from: Sequence(40),
        to: Sequence(42),
        cause: Text::new("512 bytes differ"),
    };
    vec![
        ("MARK", Message::Mark(mark())),
        ("ACK", Message::Ack(ack)),
        ("BULK_ACK", Message::BulkAck(bulk_ack, vec![SectorRange::new(8192, 16384)])),
        ("CREDIT", Message::Credit(Credit { disk, generation, limit: 32 << 20 })),
        ("NACK", Message::Nack(nack)),
        ("FENCED", Message::Fenced(Fenced { disk, generation })),
        (
            "COMPARE_REQUEST",
            Message::CompareRequest(request, [1, 63].map(|unit| RefineUnit { unit, crcs }).to_vec()),
        ),
        ("COMPARE_HASHES", Message::CompareHashes(hashes, answer)),
        ("PASS_BEGIN", Message::PassBegin(PassBegin { disk, generation, cause: PassCause::TrackingLost })),
        ("PASS_STATE", Message::PassState(PassState { disk, generation, pass: 4, mode: PassMode::Copy })),
        ("PASS_END", Message::PassEnd(PassEnd { disk, generation, pass: 4 })),
        (
            "POLICY",
            Message::Policy(Policy {
                revision: 5,
                points_every_ms: 300_000,
                target: TARGET,
                app_points_every_ms: 3_600_000,
            }),
        ),
        ("POINT_DEGRADE", Message::PointDegrade(degrade)),
        (
            "MARK_REQUEST",
            Message::MarkRequest(MarkRequest {
                point: [0x57; 16],
                freeze_limit_ms: 30_000,
                cause: MarkCause::Stop,
                freeze: true,
            }),
        ),
        (
            "MARK_REFUSED",
            Message::MarkRefused(MarkRefused { point: [0x57; 16], reason: Text::new("sdb is paused") }),
        ),
        ("GROW_DISK", Message::GrowDisk(GrowDisk { disk, generation, size_sectors: 1 << 22 })),
        ("PROBE", Message::Probe(Probe { token: 0x70be })),
        (
            "LOAD",
            Message::Load(Load {
                token: 0x70be,
                target_micros: 1_250,
                sessions: 200,
                room_permille: 875,
                accepts: true,
            }),
        ),
        ("ERROR", Message::error(disk, ErrorCode::Size, "the source has 8 sectors, the target 16")),
    ]
}

/// Every message but the frozen handshake.
pub(crate) fn messages() -> Vec<(&'static str, Message)> {
    session_messages().into_iter().chain(disk_messages()).collect()
}

/// Plain data that no two blocks have alike.
pub(crate) fn pattern(bytes: usize) -> Bytes {
    (0..bytes).map(|at| (at / 512 + at % 7) as u8).collect()
}

pub(crate) fn raw_record() -> Record {
    Record::data(7, pattern(1024)) // two sectors in two blocks of the disk: two fragments
}

pub(crate) fn zstd_record() -> Record {
    Record::data(16, Bytes::from_static(&[b'A'; 4096])).recoded(Bytes::from_static(ZSTD_4096_A))
}

pub(crate) fn records() -> Vec<(&'static str, Record)> {
    vec![
        ("RAW", raw_record()),
        ("ZSTD", zstd_record()),
        ("ZERO", Record::zeros(SectorRange::new(4096, 1 << 20))),
        ("DISCARD", Record::discard(SectorRange::new(1 << 20, (1 << 20) + 8))),
    ]
}

pub(crate) fn all_records() -> Vec<Record> {
    records().into_iter().map(|(_, record)| record).collect()
}

pub(crate) fn batch_header(record_count: u32) -> BatchHeader {
    BatchHeader {
        disk: DISK,
        lineage: LINEAGE,
        generation: GENERATION,
        first_sequence: Sequence(41),
        chain: CHAIN_START,
        source_time: Timestamp(1_700_000_000_000_000_000),
        record_count,
        stretch: Stretch::Diff,
    }
}

pub(crate) fn bulk_header(cover: SectorRange, record_count: u32) -> BulkHeader {
    BulkHeader {
        disk: DISK,
        lineage: LINEAGE,
        generation: GENERATION,
        pass: 3,
        as_of: Sequence(40),
        cover,
        record_count,
    }
}

pub(crate) fn disk_state() -> DiskState {
    DiskState {
        disk: DISK,
        agent: AGENT,
        source: [0x50; 16],
        size_sectors: 1 << 21,
        generation: GENERATION,
        lineage: LINEAGE,
        sequence: Sequence(42),
        chain: CHAIN,
        marked: Sequence(40),
        pass: 3,
        mode: PassMode::Compare,
        settled: [SectorRange::new(0, 8192), SectorRange::new(16384, 16392)].into_iter().collect(),
        touched: [SectorRange::new(9000, 9001)].into_iter().collect(),
    }
}
