//! Known values of the structures of undo runs, independent of the compressor. Called by the golden test.

use reprotect_engine::checksum::crc32;
use reprotect_engine::format::undo::frame::{FRAME_MAGIC, FrameHead, UndoCodec};
use reprotect_engine::format::undo::index::{IndexEntry, IndexPlaces, TRAILER_MAGIC, Trailer};
use reprotect_engine::format::undo::{FRAMES_START, RunHeader, RunIdentity};
use reprotect_engine::units::Timestamp;

use crate::samples::{DISK, GENERATION, LINEAGE};

const SALT: u64 = 0x5a17_5a17_5a17_5a17;

/// 8192 times `A` as one zstd frame with its content size, made of one run-length block.
const ZSTD_8192_A: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x1f, 0x03, 0x00, 0x01, b'A'];

pub(crate) fn run_header() -> RunHeader {
    let identity = RunIdentity {
        journal: [0x10; 16],
        disk: DISK,
        lineage: LINEAGE,
        generation: GENERATION,
        undo_epoch: 5,
        undo_epoch_last: 6,
    };
    RunHeader::new(identity, SALT, 1 << 21, Timestamp(1_700_000_000_000_000_000))
}

/// Frames of one, two and three blocks from block 7 on, each alone in its group behind the header.
pub(crate) fn undo_frames() -> Vec<(&'static str, Vec<u8>)> {
    let crc = crc32(&[b'A'; 4096]).to_le_bytes();
    vec![
        ("zeros", frame(0, 1, UndoCodec::Zeros, &[], &[])),
        ("zstd", frame(0, 2, UndoCodec::Zstd, &[crc, crc].concat(), ZSTD_8192_A)),
        ("lost", frame(0, 3, UndoCodec::Lost, &[], &[])),
    ]
}

fn frame(number: u64, block_count: u32, codec: UndoCodec, crcs: &[u8], payload: &[u8]) -> Vec<u8> {
    let head = FrameHead {
        magic: FRAME_MAGIC,
        head_crc: 0,
        salt: SALT,
        offset: FRAMES_START,
        number,
        first_block: 7,
        block_count,
        stored_bytes: payload.len() as u32,
        stored_crc: if payload.is_empty() { 0 } else { crc32(payload) },
        group_at: 0,
        group_left: 0,
        pad_bytes: 0,
        codec,
    }
    .with_padding();
    let mut bytes = [head.sealed_bytes(crcs).as_slice(), crcs, payload].concat();
    bytes.resize(head.whole_bytes() as usize, 0);
    bytes
}

pub(crate) fn index_entries() -> Vec<IndexEntry> {
    let entry = |first_block, offset, block_count, frame_units, codec| IndexEntry {
        first_block,
        offset,
        block_count,
        frame_units,
        codec,
    };
    vec![
        entry(7, FRAMES_START, 2, 11, UndoCodec::Zstd),
        entry(9, FRAMES_START + 88, 1, 521, UndoCodec::Raw),
        entry(4096, FRAMES_START + 8192, 1 << 18, 8, UndoCodec::Zeros),
    ]
}

pub(crate) fn trailer() -> Trailer {
    let places = IndexPlaces { frames_end: FRAMES_START + (1 << 20), frames: 3 };
    Trailer {
        magic: TRAILER_MAGIC,
        crc: 0,
        fence_pages: places.fence_pages() as u32,
        salt: SALT,
        undo_epoch: 5,
        frames: places.frames,
        blocks: 3 + (1 << 18),
        data_blocks: 3,
        lost_blocks: 0,
        frames_end: places.frames_end,
        index_pages: places.index_pages(),
        first_block: 7,
        end_block: 4096 + (1 << 18),
        opened: Timestamp(1_700_000_000_000_000_000),
        closed: Timestamp(1_700_000_300_000_000_000),
    }
}
