//! Entry functions of the decoders: bytes in, and whatever is accepted must be written back as the same bytes.
//!
//! Checksums would hide most of a decoder from mutated input, so each function also tries the input with its checksums
//! put right.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};
use reprotect_engine::checksum::{crc32, fragment_count};
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, decode_batch, decode_bulk, encode_batch, encode_bulk,
};
use reprotect_engine::format::disk_state::{DiskState, DiskStateHead};
use reprotect_engine::format::extent::{Record, RecordHeader, RecordKind};
use reprotect_engine::format::frame::{FrameHeader, FrameKind};
use reprotect_engine::format::handshake::{Hello, HelloAck};
use reprotect_engine::format::message::Message;
use reprotect_engine::format::wire::{COUNTER_MAX, Row};
use reprotect_engine::limits::BULK_RECORD_BYTES_MAX;
use reprotect_engine::units::SectorRange;

/// A frame as it comes from a stream: header, then the body its kind says.
pub fn frame(data: &[u8]) {
    frame_once(data);
    if let Some(fixed) = with_frame_crc(data) {
        frame_once(&fixed);
    }
}

fn frame_once(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<{ FrameHeader::BYTES }>() else { return };
    let Ok(header) = FrameHeader::decode(head) else { return };
    assert_eq!(header.to_bytes(), *head);
    assert!(header.body_bytes <= header.kind.body_bytes_max());
    if let Some(body) = rest.get(..header.body_bytes as usize) {
        body_of(header.kind, body);
    }
}

/// One body of a kind.
pub fn body_of(kind: FrameKind, body: &[u8]) {
    match kind {
        FrameKind::Batch => batch(body),
        FrameKind::Bulk => bulk(body),
        _ => {
            if let Ok(message) = Message::decode(kind, &Bytes::copy_from_slice(body)) {
                let frame = message.encode();
                assert_eq!(frame.kind(), kind);
                assert_eq!(frame.body(), body, "{kind:?} is not written back as it was read");
            }
        }
    }
}

/// HELLO and HELLO_ACK.
pub fn hello(data: &[u8]) {
    if let Ok(hello) = Hello::decode(data) {
        assert_eq!(hello.to_bytes(), data);
        let _ = (hello.common_version(), hello.unknown_required());
    }
    if let Ok(ack) = HelloAck::decode(data) {
        assert_eq!(ack.to_bytes(), data);
    }
}

/// A body of any kind: the first byte says which.
pub fn message(data: &[u8]) {
    if let Some((kind, body)) = data.split_first() {
        body_of(FrameKind::ALL[usize::from(*kind) % FrameKind::ALL.len()], body);
    }
}

/// A delta batch.
pub fn batch(data: &[u8]) {
    for input in [data.to_vec(), with_batch_crcs(data, BatchHeader::BYTES)] {
        let input = Bytes::from(input);
        if let Ok((header, records)) = decode_batch(input.clone()) {
            assert!(header.last_sequence().0 <= COUNTER_MAX);
            assert_eq!(header.last_sequence().0 - header.first_sequence.0 + 1, records.len() as u64);
            let _ = header.chain_after(&records);
            assert_eq!(encode_batch(&header, &records).body(), input);
        }
    }
}

/// A bulk batch.
pub fn bulk(data: &[u8]) {
    for input in [data.to_vec(), with_batch_crcs(data, BulkHeader::BYTES)] {
        let input = Bytes::from(input);
        if let Ok((header, records)) = decode_bulk(input.clone()) {
            assert!(records.iter().all(|record| header.cover.contains(record.range())));
            assert_eq!(encode_bulk(&header, &records).body(), input);
        }
    }
}

thread_local! {
    static OPENER: RefCell<Option<(Decompressor, Vec<u8>)>> = const { RefCell::new(None) };
}

/// A record: its head, its stored payload, and its plain data.
pub fn record(data: &[u8]) {
    for input in [data.to_vec(), with_record_crcs(data, 0)] {
        let mut rest = Bytes::from(input.clone());
        let Ok(record) = Record::take(&mut rest) else { continue };
        let mut out = BytesMut::new();
        record.put_head(&mut out);
        out.extend_from_slice(record.payload());
        assert_eq!(out, input[..input.len() - rest.len()]);
        assert!(record.plain_bytes() <= BULK_RECORD_BYTES_MAX);
        let _ = record.check_stored();
        OPENER.with_borrow_mut(|opener| {
            if opener.is_none() {
                *opener = Decompressor::new().ok().map(|new| (new, vec![0; BULK_RECORD_BYTES_MAX as usize]));
            }
            if let Some((decompressor, buffer)) = opener {
                let plain = &mut buffer[..record.plain_bytes() as usize];
                if record.open_into(decompressor, plain).is_ok() && record.kind() == RecordKind::Data {
                    let again = Record::data(record.range().start, Bytes::copy_from_slice(plain));
                    assert_eq!(again.fragment_crcs(), record.fragment_crcs());
                }
            }
        });
    }
}

/// A state file.
pub fn disk_state(data: &[u8]) {
    let mut fixed = data.to_vec();
    if let Some(after) = data.get(12..) {
        let crc = crc32(after).to_le_bytes();
        put(&mut fixed, DiskStateHead::TABLE, "crc", 0, &crc);
    }
    for input in [data, &fixed] {
        if let Ok(state) = DiskState::decode(input) {
            assert_eq!(state.to_bytes(), input);
        }
    }
}

/// Puts `bytes` where the table says `field` is, in the structure at `at`.
fn put(out: &mut [u8], table: &[Row], field: &str, at: usize, bytes: &[u8]) {
    if let Some(row) = table.iter().find(|row| row.field == field)
        && let Some(slot) = out.get_mut(at + row.offset..at + row.offset + bytes.len())
    {
        slot.copy_from_slice(bytes);
    }
}

fn with_frame_crc(data: &[u8]) -> Option<Vec<u8>> {
    let mut fixed = data.to_vec();
    put(&mut fixed, FrameHeader::TABLE, "head_crc", 0, &[0; 4]);
    let crc = crc32(fixed.get(..FrameHeader::BYTES)?);
    put(&mut fixed, FrameHeader::TABLE, "head_crc", 0, &crc.to_le_bytes());
    Some(fixed)
}

/// The input with the checksum of its batch head and those of its records put right.
fn with_batch_crcs(data: &[u8], head_bytes: usize) -> Vec<u8> {
    let mut fixed = with_record_crcs(data, head_bytes + 4);
    if let Some((head, rest)) = fixed.split_at_mut_checked(head_bytes)
        && let Some(slot) = rest.first_chunk_mut::<4>()
    {
        *slot = crc32(head).to_le_bytes();
    }
    fixed
}

/// The input with the head checksum of every record from byte `at` on put right, and the checksum of its stored
/// payload where it is compressed, as far as records can be told apart.
fn with_record_crcs(data: &[u8], mut at: usize) -> Vec<u8> {
    let mut fixed = data.to_vec();
    while let Some((header, _)) =
        data.get(at..).filter(|rest| !rest.is_empty()).and_then(|rest| RecordHeader::read_prefix(rest).ok())
    {
        let range = SectorRange::from_len(header.sector, header.sector_count.into());
        let fragments = range.filter(|_| header.kind == RecordKind::Data).map_or(0, fragment_count) as usize;
        let head_end = at + RecordHeader::BYTES + fragments * 4;
        let end = head_end.saturating_add(header.stored_bytes as usize);
        if header.stored_crc != 0
            && let Some(stored) = data.get(head_end..end)
        {
            put(&mut fixed, RecordHeader::TABLE, "stored_crc", at, &crc32(stored).to_le_bytes());
        }
        put(&mut fixed, RecordHeader::TABLE, "head_crc", at, &[0; 4]);
        let Some(head) = fixed.get(at..head_end) else { break };
        let crc = crc32(head).to_le_bytes();
        put(&mut fixed, RecordHeader::TABLE, "head_crc", at, &crc);
        at = end;
    }
    fixed
}
