//! Walks the frames of a run from front to back: to rebuild the index of a run that was being written, or to do without
//! a damaged one.
//!
//! Invariants: a frame follows its predecessor by number, by its place in the group and by its address in the file, or
//! something between them is missing, and then it is named as a gap with the widest range of blocks it can have held;
//! behind `certain` nothing is skipped: the first thing that does not follow ends the walk there. Units: bytes, blocks.
//! Called by the runs of this folder.

use super::error::UndoError;
use super::file::RunFile;
use crate::checksum::is_zero;
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::undo::frame::{
    FRAME_ALIGN_BYTES, FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, FRAME_MAGIC, Frame, FrameHead,
};
use crate::format::undo::index::{IndexEntry, IndexPlaces, PAGE_BYTES_MAX, PageHead, read_index_page};
use crate::format::undo::{BlockRange, FRAMES_START, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::units::BLOCK_BYTES;

const WINDOW_BYTES: usize = 1 << 20;
/// Most bytes one look at the file needs: a frame and the padding behind it, or a page.
const LOOK_BYTES: u64 = FRAME_BYTES_MAX + UNDO_ALIGN_BYTES;

const _: () = {
    assert!(LOOK_BYTES + 2 * UNDO_ALIGN_BYTES <= WINDOW_BYTES as u64);
    assert!(PAGE_BYTES_MAX as u64 <= LOOK_BYTES);
};

/// A part of a file in memory that moves forward with the walk.
struct Window {
    buffer: PoolBuf,
    start: u64,
}

impl Window {
    fn new() -> Result<Self, UndoError> {
        let mut buffer = PoolBuf::alone(WINDOW_BYTES)?;
        buffer.set_len(0);
        Ok(Self { buffer, start: 0 })
    }

    /// The bytes from `at` on, at most `len`, fewer at the end of the file.
    fn look(&mut self, file: &mut dyn BlockFile, at: u64, len: u64) -> Result<&[u8], UndoError> {
        let size = file.size_bytes();
        let end = at.saturating_add(len).min(size);
        if at >= end {
            return Ok(&[]);
        }
        if at < self.start || end > self.start + self.buffer.len() as u64 {
            self.start = at / UNDO_ALIGN_BYTES * UNDO_ALIGN_BYTES;
            self.buffer.set_len((size - self.start).min(WINDOW_BYTES as u64) as usize);
            if let Err(error) = file.read(&mut [ReadAt { offset: self.start, data: &mut self.buffer }]) {
                self.buffer.set_len(0);
                return Err(error.into());
            }
        }
        Ok(&self.buffer[(at - self.start) as usize..(end - self.start) as usize])
    }
}

/// How far to walk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Frames end here at the latest.
    pub(super) end: u64,
    /// Up to here frames are certain to have been written: what is invalid before it is damage.
    pub(super) certain: u64,
    /// The run was sealed, and the place of its index is not known: the walk ends at the first index page.
    pub(super) until_index: bool,
}

/// One step of a walk.
#[derive(Debug)]
pub(super) enum Step {
    /// A frame with a sound head.
    Frame {
        /// Where it is, as an index says it.
        entry: IndexEntry,
        /// How many frames of its group follow; zero: the group is whole here.
        group_left: u32,
        /// One past the frame and its padding.
        end: u64,
        /// What is wrong with its payload, or with the zeros behind it.
        wrong: Option<Wrong>,
    },
    /// Something that is no frame, where frames must have been.
    Gap {
        /// The bytes.
        file: ByteRange,
        /// Every block the lost frames held is one of these.
        blocks: BlockRange,
        /// What is wrong with the first frame in it.
        reason: FormatError,
    },
    /// The walk is over.
    End {
        /// All frames that were ever written have been seen, or named as a gap.
        complete: bool,
    },
}

/// What is wrong with a frame whose head is sound.
#[derive(Debug)]
pub(super) struct Wrong {
    /// The blocks that cannot be had; none where only padding is damaged.
    pub(super) lost: Vec<BlockRange>,
    /// What is wrong with the first of them.
    pub(super) reason: FormatError,
}

/// Judges payloads.
struct Judge {
    decompressor: Decompressor,
    plain: PoolBuf,
    /// Compressed payloads are decompressed too, which finds what was wrong before it was compressed.
    deep: bool,
}

impl Judge {
    /// What is wrong with a frame's payload or padding.
    fn judge(&mut self, frame: &Frame<'_>) -> Option<Wrong> {
        let head = &frame.head;
        let stored = frame.check_stored();
        if head.codec.has_payload() && (stored.is_err() || self.deep) {
            match frame.open_into(&mut self.decompressor, &mut self.plain) {
                Ok((_, None)) => {}
                Ok((sound, Some(reason))) => return Some(Wrong { lost: unsound(head, sound), reason }),
                Err(reason) => return Some(Wrong { lost: vec![head.blocks()], reason }),
            }
        }
        let padding = frame.padding;
        if padding.len() == usize::from(head.pad_bytes) && is_zero(padding) {
            return None;
        }
        let reason = FormatError::Field { what: "Frame", field: "padding", got: 1, expected: "zeros" };
        Some(Wrong { lost: Vec::new(), reason })
    }
}

/// The runs of blocks whose bit is not set.
fn unsound(head: &FrameHead, sound: u32) -> Vec<BlockRange> {
    let blocks = head.blocks();
    let mut runs: Vec<BlockRange> = Vec::new();
    for block in (blocks.start..blocks.end).filter(|block| sound & (1 << (block - blocks.start)) == 0) {
        match runs.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => runs.push(BlockRange::new(block, block + 1)),
        }
    }
    runs
}

/// A walk over the frames of a run.
pub(super) struct Scanner {
    window: Window,
    judge: Judge,
    extent: Extent,
    at: u64,
    last: Option<FrameHead>,
    /// A gap was just passed: the next frame need not follow the last.
    after_gap: bool,
}

impl Scanner {
    pub(super) fn new(extent: Extent) -> Result<Self, UndoError> {
        let plain = PoolBuf::alone((FRAME_BLOCKS_MAX * BLOCK_BYTES) as usize)?;
        let judge = Judge { decompressor: Decompressor::new()?, plain, deep: false };
        Ok(Self { window: Window::new()?, judge, extent, at: FRAMES_START, last: None, after_gap: false })
    }

    /// The same walk, with every payload decompressed.
    pub(super) fn deep(mut self) -> Self {
        self.judge.deep = true;
        self
    }

    /// A number above that of every frame there was.
    pub(super) fn next_number(&self) -> u64 {
        // Frames lost in a gap have numbers too; each has a head at least.
        let passed = if self.after_gap { self.at / FrameHead::BYTES as u64 } else { 0 };
        self.last.map_or(0, |last| last.number + 1) + passed
    }

    /// Goes on to the next frame or gap.
    pub(super) fn step(&mut self, run: &mut RunFile) -> Result<Step, UndoError> {
        let group_whole = self.last.is_none_or(|last| last.group_left == 0) || self.after_gap;
        if self.extent.until_index && group_whole && self.index_begins(run, self.at)? {
            return Ok(Step::End { complete: true });
        }
        if self.at >= self.extent.end {
            return Ok(Step::End { complete: group_whole && !self.extent.until_index });
        }
        match self.frame_at(run, self.at)? {
            Ok((step, head)) => {
                self.at += head.whole_bytes();
                self.last = Some(head);
                self.after_gap = false;
                Ok(step)
            }
            Err(_) if self.at >= self.extent.certain => Ok(Step::End { complete: false }),
            Err(reason) => self.gap(run, reason),
        }
    }

    /// The frame at `at`, where it follows the last one.
    fn frame_at(
        &mut self,
        run: &mut RunFile,
        at: u64,
    ) -> Result<Result<(Step, FrameHead), FormatError>, UndoError> {
        let (last, after_gap, end) = (self.last, self.after_gap, self.extent.end);
        let bytes = self.window.look(&mut *run.file, at, LOOK_BYTES.min(end - at))?;
        let frame = match Frame::read(bytes, run.header.salt, at) {
            Ok(frame) => frame,
            Err(reason) => return Ok(Err(reason)),
        };
        let head = frame.head;
        if head.blocks().end > run.header.disk_blocks().end {
            let (field, got) = ("first_block", head.first_block);
            return Ok(Err(FormatError::Field {
                what: "Frame",
                field,
                got,
                expected: "a block of the disk",
            }));
        }
        let follows = match last {
            None if after_gap => true,
            Some(last) if after_gap => head.number > last.number,
            None => head.number == 0 && head.group_at == 0,
            Some(last) => follows(&last, &head),
        };
        if !follows {
            let (field, got) = ("number", head.number);
            return Ok(Err(FormatError::Field { what: "Frame", field, got, expected: "the next frame" }));
        }
        let wrong = self.judge.judge(&frame);
        let entry = IndexEntry {
            first_block: head.first_block,
            offset: at,
            block_count: head.block_count,
            frame_units: head.used_bytes().div_ceil(FRAME_ALIGN_BYTES) as u16, // FRAME_BYTES_MAX fits
            codec: head.codec,
        };
        let end = at + head.whole_bytes();
        Ok(Ok((Step::Frame { entry, group_left: head.group_left, end, wrong }, head)))
    }

    /// Looks for the next frame (or the index) behind something that is none.
    fn gap(&mut self, run: &mut RunFile, reason: FormatError) -> Result<Step, UndoError> {
        let start = self.at;
        self.after_gap = true;
        let limit = self.extent.certain.min(self.extent.end);
        let mut at = start + FRAME_ALIGN_BYTES;
        let mut next = None;
        while at < limit {
            if self.candidate(run, at)?
                && let Ok((_, head)) = self.frame_at(run, at)?
            {
                next = Some(head);
                break;
            }
            if self.extent.until_index && self.index_begins(run, at)? {
                break;
            }
            at += FRAME_ALIGN_BYTES;
        }
        self.at = at.min(limit);
        let blocks = gap_blocks(self.last.as_ref(), next.as_ref(), run.header.disk_blocks());
        Ok(Step::Gap { file: ByteRange { start, end: self.at }, blocks, reason })
    }

    fn candidate(&mut self, run: &mut RunFile, at: u64) -> Result<bool, UndoError> {
        let bytes = self.window.look(&mut *run.file, at, 4)?;
        Ok(bytes == FRAME_MAGIC.to_le_bytes())
    }

    /// Whether the first index page stands at `at`.
    fn index_begins(&mut self, run: &mut RunFile, at: u64) -> Result<bool, UndoError> {
        if !at.is_multiple_of(UNDO_ALIGN_BYTES) {
            return Ok(false);
        }
        let bytes = self.window.look(&mut *run.file, at, PAGE_BYTES_MAX as u64)?;
        let Ok((head, _)) = PageHead::read_prefix(bytes) else { return Ok(false) };
        // A page is as long as its items need, and its checksum covers exactly that.
        let page = IndexPlaces { frames_end: at, frames: head.count.into() }.index_page(0);
        let page = bytes.get(..page.bytes).unwrap_or_default();
        Ok(read_index_page(page, run.header.salt, 0, at).is_ok())
    }
}

/// Whether `next` is the frame that was written after `last`.
fn follows(last: &FrameHead, next: &FrameHead) -> bool {
    let in_group = if last.group_left == 0 {
        next.group_at == 0
    } else {
        next.group_at.checked_sub(1) == Some(last.group_at) && next.group_left == last.group_left - 1
    };
    next.number == last.number + 1 && in_group
}

/// The widest range that the frames between `before` and `after` can have covered: groups ascend, so a neighbour of
/// the same group bounds it.
fn gap_blocks(before: Option<&FrameHead>, after: Option<&FrameHead>, disk: BlockRange) -> BlockRange {
    let next_number = before.map_or(0, |head| head.number + 1);
    let group_ends = before.map_or(0, |head| head.number + 1 + u64::from(head.group_left));
    let lower = before.filter(|head| head.group_left > 0).map(|head| head.blocks().end);
    let Some(after) = after else { return disk };
    let Some(group_starts) = after.number.checked_sub(after.group_at.into()) else { return disk };
    let upper = after.first_block;
    match lower {
        // Both in one group.
        Some(lower) if group_starts < next_number && lower <= upper => BlockRange::new(lower, upper),
        // The end of one group, and nothing else.
        Some(lower) if group_starts == group_ends && after.group_at == 0 => BlockRange::new(lower, disk.end),
        // The beginning of one group, and nothing else.
        None if group_starts == next_number => BlockRange::new(disk.start, upper.min(disk.end)),
        _ => disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::undo::frame::UndoCodec;

    fn head(number: u64, first_block: u64, group_at: u32, group_left: u32) -> FrameHead {
        FrameHead {
            magic: FRAME_MAGIC,
            head_crc: 0,
            salt: 0,
            offset: 0,
            number,
            first_block,
            block_count: 2,
            stored_bytes: 0,
            stored_crc: 0,
            group_at,
            group_left,
            pad_bytes: 0,
            codec: UndoCodec::Zeros,
        }
    }

    #[test]
    fn a_gap_is_as_narrow_as_its_neighbours_prove() {
        let disk = BlockRange::new(0, 1000);
        let gap = |before: Option<FrameHead>, after: Option<FrameHead>| {
            gap_blocks(before.as_ref(), after.as_ref(), disk)
        };
        let before = Some(head(4, 50, 1, 3)); // numbers 3 to 7 are one group
        assert_eq!(gap(before, Some(head(6, 90, 3, 1))), BlockRange::new(52, 90), "inside one group");
        assert_eq!(gap(before, Some(head(8, 7, 0, 2))), BlockRange::new(52, 1000), "the end of a group");
        assert_eq!(gap(before, Some(head(9, 7, 1, 2))), disk, "the end of one and the front of another");
        assert_eq!(gap(before, Some(head(20, 7, 0, 2))), disk, "whole groups");
        assert_eq!(gap(before, None), disk);
        let whole = Some(head(7, 80, 4, 0));
        assert_eq!(gap(whole, Some(head(9, 33, 1, 2))), BlockRange::new(0, 33), "the front of a group");
        assert_eq!(gap(whole, Some(head(30, 33, 1, 2))), disk);
        assert_eq!(gap(None, Some(head(2, 33, 2, 2))), BlockRange::new(0, 33), "the first frames of the run");
        assert_eq!(gap(None, Some(head(2, 33, 1, 2))), disk);
    }

    #[test]
    fn frames_follow_by_number_and_by_group() {
        let last = head(4, 50, 1, 1);
        assert!(follows(&last, &head(5, 60, 2, 0)));
        assert!(!follows(&last, &head(6, 60, 2, 0)));
        assert!(!follows(&last, &head(5, 60, 0, 0)));
        assert!(!follows(&last, &head(5, 60, 2, 1)));
        assert!(follows(&head(4, 50, 1, 0), &head(5, 1, 0, 9)));
    }
}
