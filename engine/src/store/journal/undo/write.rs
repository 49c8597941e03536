//! Packs before-images into groups of frames and writes each group at once.
//!
//! Invariants: what was written is never written again, so a torn write can only hurt the group it belongs to; a group
//! begins at a 4 KiB boundary, is a multiple of 4 KiB long and at most 1 MiB; the frames of a group ascend. The writer
//! knows nothing of durability: its owner flushes. After an error it must not write again, since what reached the
//! medium is unknown. Units: bytes and blocks. Called by the runs of this folder.

use super::error::UndoError;
use crate::checksum::{crc32, is_zero};
use crate::compress::{Compressor, LEVEL_DEFAULT};
use crate::format::undo::frame::{
    EMPTY_FRAME_BLOCKS_MAX, FRAME_ALIGN_BYTES, FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, FRAME_MAGIC, Frame,
    FrameHead, UndoCodec,
};
use crate::format::undo::index::IndexEntry;
use crate::format::undo::{BlockRange, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, WriteAt};
use crate::units::BLOCK_BYTES;

/// Longest group: one write that keeps a disk busy.
pub(super) const GROUP_BYTES_MAX: usize = 1 << 20;
const BLOCK: usize = BLOCK_BYTES as usize;

const _: () = assert!(GROUP_BYTES_MAX as u64 > 4 * FRAME_BYTES_MAX);

/// Writes frames behind one another.
pub(super) struct FrameWriter {
    salt: u64,
    buffer: PoolBuf,
    /// Bytes of the buffer in use.
    fill: usize,
    /// The group's frames: where their heads stand in the buffer, and the heads, whose group fields come last.
    group: Vec<(usize, FrameHead)>,
    /// Where the group will stand in the file.
    end: u64,
    /// Number of the next frame.
    number: u64,
    compressor: Compressor,
    stored: Vec<u8>,
    plain: Vec<u8>,
    /// First block of `plain`.
    plain_first: u64,
}

/// Stored content of one frame.
struct Content<'a> {
    blocks: BlockRange,
    codec: UndoCodec,
    stored_crc: u32,
    crcs: &'a [u8],
    payload: &'a [u8],
}

impl FrameWriter {
    /// A writer that puts its first group at `end` and numbers frames from `number`.
    pub(super) fn new(salt: u64, end: u64, number: u64) -> Result<Self, UndoError> {
        assert!(end.is_multiple_of(UNDO_ALIGN_BYTES));
        Ok(Self {
            salt,
            buffer: PoolBuf::alone(GROUP_BYTES_MAX)?,
            fill: 0,
            group: Vec::new(),
            end,
            number,
            compressor: Compressor::new(LEVEL_DEFAULT)?,
            stored: Vec::new(),
            plain: Vec::with_capacity(FRAME_BLOCKS_MAX as usize * BLOCK),
            plain_first: 0,
        })
    }

    /// End of the last group that was written.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// Number of the next frame.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// Forgets what was pushed since the writer stood there. Before anything more is written, its owner cuts the file.
    pub(super) fn go_back(&mut self, end: u64, number: u64) {
        (self.end, self.number, self.fill) = (end, number, 0);
        self.group.clear();
        self.plain.clear();
    }

    pub(super) fn set_level(&mut self, level: i32) -> Result<(), UndoError> {
        Ok(self.compressor.set_level(level)?)
    }

    /// Adds whole blocks of plain bytes. Blocks of zeros are found; frames end at multiples of sixteen blocks of the
    /// disk, so that the frames of two runs meet when the runs are merged. The last blocks wait for
    /// [`Self::finish_images`].
    pub(super) fn push_bytes(
        &mut self,
        file: &mut dyn BlockFile,
        first: u64,
        bytes: &[u8],
        made: &mut Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        for (block, image) in (first..).zip(bytes.chunks_exact(BLOCK)) {
            if block != self.plain_first + (self.plain.len() / BLOCK) as u64 || block % FRAME_BLOCKS_MAX == 0
            {
                self.finish_images(file, made)?;
            }
            if self.plain.is_empty() {
                self.plain_first = block;
            }
            self.plain.extend_from_slice(image);
        }
        Ok(())
    }

    /// Makes frames of the blocks that still wait.
    pub(super) fn finish_images(
        &mut self,
        file: &mut dyn BlockFile,
        made: &mut Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        let (plain, first) = (std::mem::take(&mut self.plain), self.plain_first);
        let mut at = 0;
        let mut result = Ok(());
        while at < plain.len() && result.is_ok() {
            let zero = is_zero(&plain[at..at + BLOCK]);
            let alike = plain[at..].chunks_exact(BLOCK).take_while(|block| is_zero(block) == zero).count();
            let blocks = BlockRange::new(first, first + alike as u64);
            let blocks =
                BlockRange::new(blocks.start + (at / BLOCK) as u64, blocks.end + (at / BLOCK) as u64);
            result = if zero {
                self.push_empty(file, blocks, UndoCodec::Zeros, made)
            } else {
                self.push_plain(file, blocks, &plain[at..at + alike * BLOCK], made)
            };
            at += alike * BLOCK;
        }
        self.plain = plain;
        self.plain.clear();
        result
    }

    /// Adds frames without payload.
    pub(super) fn push_empty(
        &mut self,
        file: &mut dyn BlockFile,
        blocks: BlockRange,
        codec: UndoCodec,
        made: &mut Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        assert!(!codec.has_payload());
        let mut start = blocks.start;
        while start < blocks.end {
            let end = blocks.end.min(start + EMPTY_FRAME_BLOCKS_MAX);
            let blocks = BlockRange::new(start, end);
            made.push(self.put(file, &Content { blocks, codec, stored_crc: 0, crcs: &[], payload: &[] })?);
            start = end;
        }
        Ok(())
    }

    /// Adds one frame with a payload, compressed where that pays.
    fn push_plain(
        &mut self,
        file: &mut dyn BlockFile,
        blocks: BlockRange,
        plain: &[u8],
        made: &mut Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        let mut crcs = [0_u8; 4 * FRAME_BLOCKS_MAX as usize];
        let crcs = &mut crcs[..4 * blocks.len() as usize];
        for (slot, block) in crcs.chunks_exact_mut(4).zip(plain.chunks_exact(BLOCK)) {
            slot.copy_from_slice(&crc32(block).to_le_bytes());
        }
        let mut stored = std::mem::take(&mut self.stored);
        let compressed = self.compressor.compress_into(plain, &mut stored);
        let entry = compressed.map_err(UndoError::from).and_then(|compressed| {
            let (codec, payload) =
                if compressed { (UndoCodec::Zstd, stored.as_slice()) } else { (UndoCodec::Raw, plain) };
            let stored_crc = if compressed { crc32(payload) } else { 0 };
            self.put(file, &Content { blocks, codec, stored_crc, crcs, payload })
        });
        self.stored = stored;
        made.push(entry?);
        Ok(())
    }

    /// Adds a frame of another run as it is; its payload was checked.
    pub(super) fn push_frame(
        &mut self,
        file: &mut dyn BlockFile,
        frame: &Frame<'_>,
        made: &mut Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        let Frame { head, crcs, payload, .. } = *frame;
        let (blocks, codec, stored_crc) = (head.blocks(), head.codec, head.stored_crc);
        made.push(self.put(file, &Content { blocks, codec, stored_crc, crcs, payload })?);
        Ok(())
    }

    /// Puts one frame into the buffer; writes the group first where there is no room left in it, or where the frame
    /// would not ascend.
    fn put(&mut self, file: &mut dyn BlockFile, content: &Content<'_>) -> Result<IndexEntry, UndoError> {
        let ascends = self.group.last().is_none_or(|(_, last)| last.blocks().end <= content.blocks.start);
        if !ascends || self.fill + FRAME_BYTES_MAX as usize > GROUP_BYTES_MAX {
            self.finish_group(file)?;
        }
        let head = FrameHead {
            magic: FRAME_MAGIC,
            head_crc: 0,
            salt: self.salt,
            offset: self.end + self.fill as u64,
            number: self.number,
            first_block: content.blocks.start,
            block_count: content.blocks.len() as u32, // at most EMPTY_FRAME_BLOCKS_MAX
            stored_bytes: content.payload.len() as u32, // at most 64 KiB
            stored_crc: content.stored_crc,
            group_at: self.group.len() as u32, // a group of 1 MiB has at most 16384 frames
            group_left: 0,
            pad_bytes: 0,
            codec: content.codec,
        };
        let crcs_at = self.fill + FrameHead::BYTES;
        let payload_at = crcs_at + content.crcs.len();
        let end = payload_at + content.payload.len();
        self.buffer[crcs_at..payload_at].copy_from_slice(content.crcs);
        self.buffer[payload_at..end].copy_from_slice(content.payload);
        let next = end.next_multiple_of(FRAME_ALIGN_BYTES as usize);
        self.buffer[end..next].fill(0);
        self.group.push((self.fill, head));
        let entry = IndexEntry {
            first_block: head.first_block,
            offset: head.offset,
            block_count: head.block_count,
            frame_units: ((next - self.fill) as u64 / FRAME_ALIGN_BYTES) as u16, // FRAME_BYTES_MAX fits, asserted there
            codec: head.codec,
        };
        self.fill = next;
        self.number += 1;
        Ok(entry)
    }

    /// Writes the group, if there is one. Not durable before the file is flushed.
    pub(super) fn finish_group(&mut self, file: &mut dyn BlockFile) -> Result<(), UndoError> {
        let frames = self.group.len();
        if frames == 0 {
            return Ok(());
        }
        let len = self.fill.next_multiple_of(UNDO_ALIGN_BYTES as usize);
        self.buffer[self.fill..len].fill(0);
        for (at, head) in self.group.drain(..) {
            let left = frames as u32 - 1 - head.group_at;
            let head = FrameHead { group_left: left, ..head }.with_padding();
            let crcs_end = at + head.used_bytes() as usize - head.stored_bytes as usize;
            let bytes = head.sealed_bytes(&self.buffer[at + FrameHead::BYTES..crcs_end]);
            self.buffer[at..at + FrameHead::BYTES].copy_from_slice(&bytes);
        }
        file.write(&[WriteAt { offset: self.end, data: &self.buffer[..len] }])?;
        self.end += len as u64;
        self.fill = 0;
        Ok(())
    }
}

/// The most bytes `data_blocks` blocks of plain bytes and `empty_frames` frames without payload can take, however they
/// are packed: every block a raw frame of its own, and a part of every group lost to padding.
pub(super) const fn frames_bytes_max(data_blocks: u64, empty_frames: u64) -> u64 {
    let data = data_blocks.saturating_mul(FrameHead::BYTES as u64 + 4 + BLOCK_BYTES + 4); // 4: to a multiple of 8
    let bytes = data.saturating_add(empty_frames.saturating_mul(FrameHead::BYTES as u64));
    // A group is closed by its owner or when less than one largest frame is left in it.
    let groups = bytes / (GROUP_BYTES_MAX as u64 - FRAME_BYTES_MAX) + 1;
    bytes.saturating_add(groups * UNDO_ALIGN_BYTES)
}
