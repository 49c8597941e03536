//! Arbitrary values of every structure, for the property tests.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::batch::{Mark, MarkCause, MarkClass};
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::format::message::{
    Ack, Auth, BulkAckHead, CompareAnswer, CompareHashesHead, CompareRequestHead, Credit, ErrorCode, Fenced,
    GrantHead, GrowDisk, InventoryDisk, InventoryHead, MarkRefused, MarkRequest, Message, Nack, NackReason,
    OfferHead, OpenDiskHead, PassBegin, PassCause, PassEnd, PassMode, PassState, PointDegrade, Policy,
    RefineUnit, Welcome,
};
use reprotect_engine::format::standby::{Load, Probe};
use reprotect_engine::format::wire::Text;
use reprotect_engine::limits::DISK_BYTES_MAX;
use reprotect_engine::units::{
    DiskId, Generation, LineageId, PeerId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

pub(crate) const DISK_SECTORS_MAX: u64 = DISK_BYTES_MAX / SECTOR_BYTES;

pub(crate) fn id() -> impl Strategy<Value = [u8; 16]> {
    any::<[u8; 16]>()
}

pub(crate) fn counter() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::MAX >> 1), 0..=u64::MAX >> 1]
}

pub(crate) fn range() -> impl Strategy<Value = SectorRange> {
    (any::<u64>(), any::<u64>()).prop_map(|(a, b)| SectorRange::new(a.min(b), a.max(b)))
}

pub(crate) fn blob(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

pub(crate) fn of<T: Copy + std::fmt::Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(all)
}

pub(crate) fn key() -> impl Strategy<Value = (DiskId, Generation)> {
    (id(), counter()).prop_map(|(disk, generation)| (DiskId(disk), Generation(generation)))
}

pub(crate) fn auth() -> impl Strategy<Value = Message> {
    (id(), blob(513), vec(blob(200), 0..=4)).prop_map(|(agent, signature, certificates)| {
        Message::Auth(Auth { agent: PeerId(agent), signature, certificates })
    })
}

pub(crate) fn inventory() -> impl Strategy<Value = Message> {
    let disk = (id(), any::<u64>(), id(), any::<u32>(), 0_u8..=8, any::<bool>(), "[a-zé/ -]{0,90}").prop_map(
        |(source, size_sectors, gpt_guid, mbr_signature, fs_count, selected, name)| InventoryDisk {
            source,
            size_sectors,
            gpt_guid,
            mbr_signature,
            fs_count,
            selected,
            name: Text::new(&name),
            fs_uuids: [fs_count; 128],
        },
    );
    ("[a-zäö.]{0,70}", vec(disk, 0..5)).prop_map(|(host, disks)| {
        let head = InventoryHead { host_name: Text::new(&host), disk_count: disks.len() as u32 };
        Message::Inventory(head, disks)
    })
}

pub(crate) fn opening() -> impl Strategy<Value = Message> {
    let offer =
        (key(), id(), 0..=DISK_SECTORS_MAX, blob(513)).prop_map(|(key, source, size_sectors, grant)| {
            let grant_bytes = grant.len() as u16;
            Message::Offer(
                OfferHead { disk: key.0, source, size_sectors, generation: key.1, grant_bytes },
                grant,
            )
        });
    let open = (key(), any::<u64>(), id(), counter(), blob(513)).prop_map(
        |((disk, generation), size_sectors, lineage, durable, grant)| {
            let grant_bytes = grant.len() as u16;
            let (lineage, durable) = (LineageId(lineage), Sequence(durable));
            let head = OpenDiskHead { disk, size_sectors, generation, lineage, durable, grant_bytes };
            Message::OpenDisk(head, grant)
        },
    );
    let grant =
        (key(), id(), counter(), id(), any::<u64>(), of(PassMode::ALL), vec(range(), 0..20), blob(513))
            .prop_map(|((disk, generation), lineage, durable, chain, pass, mode, ranges, grant)| {
                let head = GrantHead {
                    disk,
                    generation,
                    lineage: LineageId(lineage),
                    durable: Sequence(durable),
                    chain,
                    pass,
                    mode,
                    range_count: ranges.len() as u32,
                    grant_bytes: grant.len() as u16,
                };
                Message::Grant(head, ranges, grant)
            });
    prop_oneof![offer, open, grant]
}

pub(crate) fn flow() -> impl Strategy<Value = Message> {
    let ack = (key(), [counter(), counter(), counter(), counter()], any::<u64>()).prop_map(
        |((disk, generation), s, mark)| {
            let [received, durable, applied, marked] = s.map(Sequence);
            Message::Ack(Ack { disk, generation, received, durable, applied, marked, mark })
        },
    );
    let bulk_ack =
        (key(), any::<u64>(), vec(range(), 0..20)).prop_map(|((disk, generation), pass, ranges)| {
            let range_count = ranges.len() as u32;
            Message::BulkAck(BulkAckHead { disk, generation, pass, range_count }, ranges)
        });
    let credit = (key(), any::<u64>())
        .prop_map(|((disk, generation), limit)| Message::Credit(Credit { disk, generation, limit }));
    let nack =
        (key(), counter(), of(NackReason::ALL)).prop_map(|((disk, generation), resume_from, reason)| {
            Message::Nack(Nack { disk, generation, resume_from: Sequence(resume_from), reason })
        });
    let fenced = key().prop_map(|(disk, generation)| Message::Fenced(Fenced { disk, generation }));
    let label = (id(), any::<u64>(), of(MarkClass::ALL), of(MarkCause::ALL), "[a-zA-Z0-9 ]{0,60}");
    let mark = (key(), id(), counter(), id(), any::<u64>(), label, any::<u32>()).prop_map(
        |(
            (disk, generation),
            lineage,
            sequence,
            chain,
            source_time,
            (point, number, class, cause, name),
            unread_blocks,
        )| {
            Message::Mark(Mark {
                disk,
                lineage: LineageId(lineage),
                generation,
                sequence: Sequence(sequence),
                chain,
                source_time: Timestamp(source_time),
                point,
                number,
                class,
                cause,
                name: Text::new(&name),
                unread_blocks,
            })
        },
    );
    prop_oneof![ack, bulk_ack, credit, nack, fenced, mark]
}

pub(crate) fn passes() -> impl Strategy<Value = Message> {
    let request = (key(), any::<u64>(), 0..u64::MAX - 8192, 1_u64..=8192, any::<[u32; 16]>()).prop_flat_map(
        |((disk, generation), request, start, len, crcs)| {
            prop::collection::btree_set(0_u16..64, 0..20).prop_map(move |units| {
                let head = CompareRequestHead {
                    disk,
                    generation,
                    request,
                    range: SectorRange::new(start, start + len),
                    unit_count: units.len() as u16,
                };
                Message::CompareRequest(
                    head,
                    units.into_iter().map(|unit| RefineUnit { unit, crcs }).collect(),
                )
            })
        },
    );
    let answer = (vec(id().prop_map(UnitHash), 0..=64), vec(any::<u16>(), 0..=64));
    let hashes = (key(), any::<u64>(), answer).prop_map(|((disk, generation), request, (hashes, masks))| {
        let (hash_count, mask_count) = (hashes.len() as u32, masks.len() as u16);
        let head = CompareHashesHead { disk, generation, request, hash_count, mask_count };
        Message::CompareHashes(head, CompareAnswer { hashes, masks })
    });
    let begin = (key(), of(PassCause::ALL))
        .prop_map(|((disk, generation), cause)| Message::PassBegin(PassBegin { disk, generation, cause }));
    let state = (key(), any::<u64>(), of(PassMode::ALL)).prop_map(|((disk, generation), pass, mode)| {
        Message::PassState(PassState { disk, generation, pass, mode })
    });
    let end = (key(), any::<u64>())
        .prop_map(|((disk, generation), pass)| Message::PassEnd(PassEnd { disk, generation, pass }));
    let error = (id(), of(ErrorCode::ALL), ".{0,60}")
        .prop_map(|(disk, code, text)| Message::error(DiskId(disk), code, &text));
    let policy = (any::<u64>(), any::<u64>(), any::<u64>(), id()).prop_map(
        |(revision, points_every_ms, app_points_every_ms, target)| {
            Message::Policy(Policy { revision, points_every_ms, target: PeerId(target), app_points_every_ms })
        },
    );
    let degrade = (key(), id(), 0..u64::MAX >> 2, 0..u64::MAX >> 2, "[a-zA-Z0-9 ]{0,100}").prop_map(
        |((disk, generation), lineage, from, more, cause)| {
            Message::PointDegrade(PointDegrade {
                disk,
                lineage: LineageId(lineage),
                generation,
                from: Sequence(from),
                to: Sequence(from + more),
                cause: Text::new(&cause),
            })
        },
    );
    let wanted = (id(), any::<u64>(), of(MarkCause::ALL), any::<bool>()).prop_map(
        |(point, freeze_limit_ms, cause, freeze)| {
            Message::MarkRequest(MarkRequest { point, freeze_limit_ms, cause, freeze })
        },
    );
    let refused = (id(), "[a-zA-Z0-9 ]{0,200}")
        .prop_map(|(point, reason)| Message::MarkRefused(MarkRefused { point, reason: Text::new(&reason) }));
    let grow = (key(), 0..=DISK_SECTORS_MAX).prop_map(|((disk, generation), size_sectors)| {
        Message::GrowDisk(GrowDisk { disk, generation, size_sectors })
    });
    let probe = any::<u64>().prop_map(|token| Message::Probe(Probe { token }));
    let load = (any::<u64>(), any::<u32>(), any::<u32>(), any::<u16>(), any::<bool>()).prop_map(
        |(token, target_micros, sessions, room_permille, accepts)| {
            Message::Load(Load { token, target_micros, sessions, room_permille, accepts })
        },
    );
    let welcome = any::<u32>().prop_map(|offers| Message::Welcome(Welcome { offers }));
    prop_oneof![
        request, hashes, begin, state, end, policy, degrade, wanted, refused, grow, probe, load, error,
        welcome
    ]
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    prop_oneof![auth(), inventory(), opening(), flow(), passes()]
}

/// Plain data of `sectors` that compress well or not.
pub(crate) fn plain(sectors: usize) -> impl Strategy<Value = Vec<u8>> {
    let bytes = sectors * 512;
    prop_oneof![vec(any::<u8>(), bytes), any::<u8>().prop_map(move |byte| vec![byte; bytes])]
}

pub(crate) fn data_record(start: u64) -> impl Strategy<Value = Record> {
    ((1_usize..24).prop_flat_map(plain), any::<bool>()).prop_map(move |(plain, recode)| {
        let record = Record::data(start, plain.into());
        if recode { compressed(&record).unwrap_or(record) } else { record }
    })
}

/// One to five records, ascending from `start`.
pub(crate) fn records(start: u64) -> impl Strategy<Value = Vec<Record>> {
    vec((0_u64..3, 0_u64..9, data_record(0), 1_u64..4096), 1..6).prop_map(move |shapes| {
        let mut at = start;
        let mut out = Vec::new();
        for (kind, gap, data, len) in shapes {
            at += gap;
            let record = match kind {
                0 => Record::data(at, plain_of(&data).into()),
                1 => Record::zeros(SectorRange::new(at, at + len)),
                _ => Record::discard(SectorRange::new(at, at + len)),
            };
            at = record.range().end;
            out.push(record);
        }
        out
    })
}

/// The record with its payload as one zstd frame, where that is shorter.
pub(crate) fn compressed(record: &Record) -> Option<Record> {
    let stored = zstd::bulk::compress(record.payload(), 1).unwrap();
    (record.codec() == Codec::Raw && stored.len() < record.payload().len())
        .then(|| record.recoded(stored.into()))
}

pub(crate) fn open(record: &Record) -> Result<Vec<u8>, FormatError> {
    let mut plain = vec![0; record.plain_bytes() as usize];
    record.open_into(&mut Decompressor::new().unwrap(), &mut plain).map(|()| plain)
}

pub(crate) fn plain_of(record: &Record) -> Vec<u8> {
    open(record).unwrap()
}
