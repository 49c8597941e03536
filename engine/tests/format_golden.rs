//! Golden files: the bytes of every structure, so that a change of a format shows in review and old bytes stay
//! readable. `UPDATE_GOLDEN=1 cargo test -p reprotect-engine --test format_golden` rewrites them, except the handshake,
//! whose bytes are frozen for ever and stand a second time in this file.
//!
//! Layout of a golden file: a line `== NAME`, then lines of up to 16 bytes, `offset: hex`.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "samples/journal.rs"]
mod journal_samples;
mod samples;
#[path = "samples/undo.rs"]
mod undo_samples;

use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{decode_batch, decode_bulk, encode_batch, encode_bulk};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::frame::{Frame, FrameHeader, FrameKind};
use reprotect_engine::format::handshake::{Hello, HelloAck};
use reprotect_engine::format::manifest::{Edit, EditHead, ManifestHeader, Superblock};
use reprotect_engine::format::message::Message;
use reprotect_engine::format::segment::{Applied, EntryKind, GroupHeader, SegmentHeader, entries};
use reprotect_engine::format::segment_index::{SegmentIndexHead, encode_index};
use reprotect_engine::format::undo::frame::{Frame as UndoFrame, FrameHead, UndoCodec};
use reprotect_engine::format::undo::index::{
    Trailer, put_fence_page, put_index_page, read_fence_page, read_index_page,
};
use reprotect_engine::format::undo::{BlockRange, RunHeader};
use reprotect_engine::units::SectorRange;
use samples::{DISK, batch_header, bulk_header};

type Sections = Vec<(String, Vec<u8>)>;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn dump(sections: &Sections) -> String {
    let mut out = String::new();
    for (name, bytes) in sections {
        writeln!(out, "== {name}").unwrap();
        for (at, line) in bytes.chunks(16).enumerate() {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(out, "{:04x}: {}", at * 16, hex.join(" ")).unwrap();
        }
    }
    out
}

fn parse(text: &str) -> Sections {
    let mut sections = Sections::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            sections.push((name.to_owned(), Vec::new()));
        } else if let Some((_, hex)) = line.split_once(": ") {
            let bytes = hex.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap());
            sections.last_mut().unwrap().1.extend(bytes);
        }
    }
    sections
}

/// Compares with the file (or rewrites it where that is asked for and allowed) and answers what the file holds.
fn check(name: &str, sections: &Sections, frozen: bool) -> Sections {
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !frozen {
        std::fs::write(path(name), dump(sections)).unwrap();
    }
    let golden = std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(
        dump(sections),
        golden,
        "{name}: the format changed; if that is meant, bump its version, then set UPDATE_GOLDEN=1"
    );
    parse(&golden)
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    frame.parts().concat()
}

/// Header and body of an encoded frame.
fn split(bytes: &[u8]) -> (FrameHeader, Bytes) {
    let (head, body) = bytes.split_first_chunk().unwrap();
    let header = FrameHeader::decode(head).unwrap();
    assert_eq!(header.body_bytes as usize, body.len());
    (header, Bytes::copy_from_slice(body))
}

#[rustfmt::skip]
const HELLO_FROZEN: [u8; 128] = [
    b'R', b'E', b'P', b'R', b'O', b'T', b'E', b'C',
    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                                                 // versions
    0, 0, 0, 0, 0, 0, 0, 0,                                                                         // required
    1, 0, 0, 0, 0, 0, 0, 0x80,                                                                      // optional
    0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, // agent
    0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, // target
    0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, 0x5e, // session
    1, 1,                                                                                           // role, relays
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[rustfmt::skip]
const HELLO_ACK_FROZEN: [u8; 96] = [
    b'R', b'E', b'P', b'R', b'O', b'T', b'E', b'C',
    1, 0, 3,                                                                                        // version, role
    0, 0, 0, 0, 0, 0, 0, 0,                                                                         // features
    0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, 0x71, // target
    0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, // nonce
    0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e, 0x0e,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn the_handshake_is_frozen_for_ever() {
    let (hello, ack) = (samples::hello(), samples::hello_ack());
    assert_eq!(hello.to_bytes(), HELLO_FROZEN);
    assert_eq!(ack.to_bytes(), HELLO_ACK_FROZEN);
    let sections = vec![
        ("HELLO".into(), hello.to_bytes().to_vec()),
        ("HELLO_ACK".into(), ack.to_bytes().to_vec()),
        ("HELLO in its frame".into(), bytes_of(&Message::Hello(hello).encode())),
        ("HELLO_ACK in its frame".into(), bytes_of(&Message::HelloAck(ack).encode())),
    ];
    let golden = check("handshake.txt", &sections, true);
    assert_eq!(Hello::decode(&golden[0].1).unwrap(), hello);
    assert_eq!(HelloAck::decode(&golden[1].1).unwrap(), ack);
}

#[test]
fn every_message_has_the_bytes_it_always_had() {
    let messages = samples::messages();
    let sections =
        messages.iter().map(|(name, m)| ((*name).to_owned(), bytes_of(&m.encode()))).collect::<Sections>();
    let golden = check("messages.txt", &sections, false);
    for ((name, message), (_, bytes)) in messages.iter().zip(&golden) {
        let (header, body) = split(bytes);
        assert_eq!(&Message::decode(header.kind, &body).unwrap(), message, "{name}");
    }
}

#[test]
fn every_frame_kind_has_a_golden_file() {
    let mut kinds: Vec<FrameKind> = samples::messages().iter().map(|(_, m)| m.encode().kind()).collect();
    kinds.extend([FrameKind::Hello, FrameKind::HelloAck, FrameKind::Batch, FrameKind::Bulk]);
    for kind in FrameKind::ALL {
        assert!(kinds.contains(kind), "{kind:?} is missing from samples/mod.rs");
    }
}

#[test]
fn frame_headers_have_the_bytes_they_always_had() {
    let sections = FrameKind::ALL
        .iter()
        .map(|kind| {
            let header = FrameHeader::new(*kind, kind.body_bytes_max());
            (format!("{kind:?}, {} bytes", header.body_bytes), header.to_bytes().to_vec())
        })
        .collect::<Sections>();
    for ((_, bytes), kind) in check("frame_headers.txt", &sections, false).iter().zip(FrameKind::ALL) {
        assert_eq!(FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap().kind, *kind);
    }
}

#[test]
fn records_have_the_bytes_they_always_had() {
    let records = samples::records();
    let encoded = |record: &Record| {
        let mut out = BytesMut::new();
        record.put_head(&mut out);
        out.extend_from_slice(record.payload());
        out.to_vec()
    };
    let sections =
        records.iter().map(|(name, record)| ((*name).to_owned(), encoded(record))).collect::<Sections>();
    let mut decompressor = Decompressor::new().unwrap();
    for ((name, record), (_, bytes)) in records.iter().zip(check("records.txt", &sections, false)) {
        let mut bytes = Bytes::from(bytes);
        let taken = Record::take(&mut bytes).unwrap();
        assert!(bytes.is_empty(), "{name}");
        assert_eq!(&taken, record, "{name}");
        let mut plain = vec![0; taken.plain_bytes() as usize];
        taken.open_into(&mut decompressor, &mut plain).unwrap();
        if *name == "ZSTD" {
            assert_eq!(plain, [b'A'; 4096]);
        }
    }
}

#[test]
fn batches_have_the_bytes_they_always_had() {
    let records = samples::all_records();
    let batch = batch_header(records.len() as u32);
    let cover = SectorRange::new(0, 1 << 21);
    let bulk = bulk_header(cover, records.len() as u32);
    let nothing = bulk_header(SectorRange::new(8, 16), 0);
    let sections = vec![
        ("BATCH".into(), bytes_of(&encode_batch(&batch, &records))),
        ("BULK".into(), bytes_of(&encode_bulk(&bulk, &records))),
        ("BULK that settles without records".into(), bytes_of(&encode_bulk(&nothing, &[]))),
        ("chain digest after BATCH".into(), batch.chain_after(&records).to_vec()),
    ];
    let golden = check("batches.txt", &sections, false);
    assert_eq!(decode_batch(split(&golden[0].1).1).unwrap(), (batch, records.clone()));
    assert_eq!(decode_bulk(split(&golden[1].1).1).unwrap(), (bulk, records));
    assert_eq!(decode_bulk(split(&golden[2].1).1).unwrap(), (nothing, Vec::new()));
}

#[test]
fn the_state_file_has_the_bytes_it_always_had() {
    let state = samples::disk_state();
    let golden = check("disk_state.txt", &vec![("DiskState".into(), state.to_bytes())], false);
    let read = DiskState::decode(&golden[0].1).unwrap();
    assert_eq!(read, state);
    assert_eq!(read.disk, DISK);
}

/// The bytes of a 4 KiB block up to its last that is not zero, so that the golden file stays readable.
fn without_padding(block: &[u8]) -> Vec<u8> {
    let used = block.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    block[..used].to_vec()
}

#[test]
fn undo_runs_have_the_bytes_they_always_had() {
    let (header, frames, entries, trailer) = (
        undo_samples::run_header(),
        undo_samples::undo_frames(),
        undo_samples::index_entries(),
        undo_samples::trailer(),
    );
    let mut index = vec![0; 4096];
    put_index_page(&mut index, header.salt, 0, &entries);
    let mut fences = vec![0; 4096];
    put_fence_page(&mut fences, header.salt, 0, &[7, 4096]);
    let mut sections = vec![("RunHeader".to_owned(), without_padding(&header.to_block()))];
    sections.extend(frames.iter().map(|(name, bytes)| (format!("frame, {name}"), without_padding(bytes))));
    sections.extend([
        ("index page".to_owned(), without_padding(&index)),
        ("fence page".to_owned(), without_padding(&fences)),
        ("Trailer".to_owned(), without_padding(&trailer.to_block())),
    ]);
    let golden = check("undo_run.txt", &sections, false);
    let padded = |at: usize| {
        let mut bytes = golden[at].1.clone();
        bytes.resize(4096, 0);
        bytes
    };
    let read = RunHeader::from_block(&padded(0)).unwrap();
    assert_eq!((read.identity(), read.salt), (header.identity(), header.salt));
    let codecs = [UndoCodec::Zeros, UndoCodec::Zstd, UndoCodec::Lost];
    for (at, codec) in (1..).zip(codecs) {
        let bytes = padded(at);
        let frame = UndoFrame::read(&bytes, header.salt, 8192).unwrap();
        assert_eq!((frame.head.codec, frame.head.blocks()), (codec, BlockRange::new(7, 7 + at as u64)));
        assert_eq!(frame.head.whole_bytes(), 4096);
        assert!(frame.check_stored().is_ok());
    }
    let mut plain = vec![0; 2 * 4096];
    let bytes = padded(2);
    let zstd = UndoFrame::read(&bytes, header.salt, 8192).unwrap();
    assert_eq!(zstd.open_into(&mut Decompressor::new().unwrap(), &mut plain).unwrap(), (3, None));
    assert_eq!(plain, [b'A'; 2 * 4096]);
    assert_eq!(FrameHead::BYTES, 64);
    assert_eq!(read_index_page(&padded(4), header.salt, 0, trailer.frames_end).unwrap(), entries);
    assert_eq!(read_fence_page(&padded(5), header.salt, 0).unwrap(), [7, 4096]);
    let read = Trailer::from_block(&padded(6), header.salt, trailer.places().file_bytes()).unwrap();
    assert_eq!(read.places(), trailer.places());
    assert_eq!((read.blocks, read.span(), read.closed), (trailer.blocks, trailer.span(), trailer.closed));
}

#[test]
fn superblock_and_manifest_have_the_bytes_they_always_had() {
    let (superblock, header) = (journal_samples::superblock(), journal_samples::manifest_header());
    let edits = journal_samples::edits();
    let mut sections = vec![
        ("Superblock".to_owned(), without_padding(&superblock.to_block())),
        ("ManifestHeader".to_owned(), without_padding(&header.to_block())),
    ];
    for (edit, index) in edits.iter().zip(1..) {
        let name = format!("{edit:?}").split('(').next().unwrap().to_owned();
        let bytes = edit.encode(header.number, index, index - 1, superblock.durable_group);
        sections.push((format!("edit {name}"), without_padding(&bytes)));
    }
    let golden = check("manifest.txt", &sections, false);
    let padded = |at: usize| {
        let mut bytes = golden[at].1.clone();
        bytes.resize(4096, 0);
        bytes
    };
    assert_eq!(Superblock::open(&padded(0)).unwrap(), superblock);
    assert_eq!(ManifestHeader::open(&padded(1)).unwrap(), header);
    for ((at, edit), index) in (2..).zip(&edits).zip(1..) {
        let bytes = padded(at);
        let head = EditHead::open(&bytes).unwrap();
        assert_eq!((head.manifest, head.index, head.durable_index), (header.number, index, index - 1));
        let body = &bytes[EditHead::BYTES..][..head.body_bytes as usize];
        assert_eq!(&Edit::decode(&head, body).unwrap(), edit);
    }
    // Edits of a kind that is missing from the samples would not be pinned.
    let kinds: std::collections::BTreeSet<u8> =
        (2..golden.len()).map(|at| EditHead::open(&padded(at)).unwrap().kind as u8).collect();
    assert_eq!(kinds.len(), reprotect_engine::format::manifest::EditKind::ALL.len());
}

#[test]
fn segment_indexes_have_the_bytes_they_always_had() {
    let (head, items) = journal_samples::segment_index();
    let whole = encode_index(&head, &items);
    let (body, block) = whole.split_at(whole.len() - 4096);
    let sections = vec![
        ("items".to_owned(), without_padding(body)),
        ("SegmentIndexHead".to_owned(), without_padding(block)),
    ];
    let golden = check("segment_index.txt", &sections, false);
    let [body, block] = [0, 1].map(|at: usize| {
        let mut bytes = golden[at].1.clone();
        bytes.resize(4096, 0);
        bytes
    });
    let read = SegmentIndexHead::open(&block).unwrap();
    assert_eq!(SegmentIndexHead { crc: 0, items: 0, items_crc: 0, ..read }, head);
    assert_eq!(read.open_items(&body).unwrap(), items);
}

#[test]
fn segments_have_the_bytes_they_always_had() {
    let (header, group) = (journal_samples::segment_header(), journal_samples::group());
    let sections = vec![
        ("SegmentHeader".to_owned(), without_padding(&header.to_block())),
        ("group with an entry of each kind".to_owned(), group),
    ];
    let golden = check("segment.txt", &sections, false);
    let mut block = golden[0].1.clone();
    block.resize(4096, 0);
    let read = SegmentHeader::open(&block).unwrap();
    assert_eq!(SegmentHeader { crc: 0, ..read }, header);
    let group = &golden[1].1;
    let head = GroupHeader::open(group).unwrap();
    let payload = &group[GroupHeader::BYTES..];
    assert!(head.check_payload(payload).is_ok());
    assert_eq!((head.group, head.entry_count, head.stored_bytes()), (61, 6, 4096));
    let read: Vec<_> = entries(payload).map(Result::unwrap).collect();
    for ((kind, bytes), (_, head, body)) in journal_samples::entries().iter().zip(&read) {
        assert_eq!((head.kind, head.disk), (*kind, DISK));
        assert!(bytes.ends_with(body));
        if *kind == EntryKind::Applied {
            assert_eq!(Applied::read_exact(body).unwrap(), journal_samples::applied());
        }
    }
    assert_eq!(read.len(), EntryKind::ALL.len());
}
