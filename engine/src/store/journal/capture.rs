//! Before-images of a window: what its blocks hold is read from the target and saved in the undo run.
//!
//! Scattered blocks are read and saved together, up to [`CAPTURE_BLOCKS`] at a time: one read deep enough for any medium,
//! one write. Of a window with more than that, a second thread compresses and writes while the next are read.
//!
//! Invariants: every block of the window that the run did not hold is in it when this returns, not durable yet (the
//! caller flushes: barrier 1); a block is saved once (I2); holes of the target are not read. Memory: three times
//! [`CAPTURE_BLOCKS`]. Units: blocks, bytes. Called by the applier.

use std::sync::mpsc::sync_channel;
use std::thread;

use super::error::JournalError;
use super::undo::{ActiveRun, BlockRange, Image, ImageData};
use super::window::Window;
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockIndex, SECTOR_BYTES};

/// Blocks whose before-images are read and saved in one go: bounds the memory of a window.
const CAPTURE_BLOCKS: u64 = 1024;
const BLOCK: usize = BLOCK_BYTES as usize;

/// What the target is known to hold: it was just read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    /// The blocks.
    pub(super) blocks: BlockRange,
    /// Their bytes; the last block of the disk may be a part of one.
    pub(super) bytes: &'a [u8],
}

/// Saves what the blocks of a window hold, where the undo epoch has not saved it yet. `known` ascends.
///
/// # Errors
/// When the target cannot be read or the run not be written.
pub(super) fn capture<T: BlockFile>(
    target: &mut T,
    run: &mut ActiveRun,
    size_sectors: u64,
    window: &Window,
    known: &[Known<'_>],
) -> Result<(), JournalError> {
    let parts = parts(run, window);
    let mut read = |pieces: &[BlockRange]| match Images::known(known, pieces) {
        Some(images) => Ok(images),
        None => Images::read(target, size_sectors, pieces),
    };
    let side_by_side = if parts.len() > 1 { save_beside(run, &parts, &mut read) } else { None };
    side_by_side.unwrap_or_else(|| parts.iter().try_for_each(|pieces| read(pieces)?.save(run)))
}

/// As [`capture`], as far as it is known what the blocks hold; the rest is left to that.
///
/// # Errors
/// When the run cannot be written.
pub(super) fn save_known(
    run: &mut ActiveRun,
    window: &Window,
    known: &[Known<'_>],
) -> Result<(), JournalError> {
    let known = |pieces: &Vec<BlockRange>| Images::known(known, pieces);
    parts(run, window).iter().filter_map(known).try_for_each(|images| images.save(run))
}

/// The blocks of a window that the run does not hold, ascending, in parts of [`CAPTURE_BLOCKS`].
fn parts(run: &ActiveRun, window: &Window) -> Vec<Vec<BlockRange>> {
    let (mut parts, mut pieces, mut room) = (Vec::new(), Vec::new(), CAPTURE_BLOCKS);
    for blocks in window.blocks() {
        let range = BlockRange::new(blocks.start / BLOCK_SECTORS, blocks.end / BLOCK_SECTORS);
        for missing in run.missing(range) {
            let mut first = missing.start;
            while first < missing.end {
                let end = missing.end.min(first + room);
                pieces.push(BlockRange::new(first, end));
                room -= end - first;
                first = end;
                if room == 0 {
                    parts.push(std::mem::take(&mut pieces));
                    room = CAPTURE_BLOCKS;
                }
            }
        }
    }
    if !pieces.is_empty() {
        parts.push(pieces);
    }
    parts
}

/// Reads part after part, while another thread saves what was read before: the medium and the processor work at the
/// same time. `None` when there is no thread to be had; nothing was saved then.
fn save_beside(
    run: &mut ActiveRun,
    parts: &[Vec<BlockRange>],
    read: &mut impl FnMut(&[BlockRange]) -> Result<Images, JournalError>,
) -> Option<Result<(), JournalError>> {
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Images>(1);
        let save = move || receiver.iter().try_for_each(|images| images.save(run));
        let saving =
            thread::Builder::new().name("before-images".to_owned()).spawn_scoped(scope, save).ok()?;
        let mut result = Ok(());
        for pieces in parts {
            let sent = match read(pieces) {
                Ok(images) => sender.send(images),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            if sent.is_err() {
                break; // the other thread has failed, and says why
            }
        }
        drop(sender);
        match saving.join() {
            Ok(saved) => Some(saved.and(result)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Before-images on their way from the target to the run.
struct Images {
    /// Bytes of all blocks, holes included.
    plain: Vec<u8>,
    /// The blocks in the order of the bytes, and whether they lie in a hole.
    parts: Vec<(BlockRange, bool)>,
}

impl Images {
    /// What was read already, if that is all of the pieces.
    fn known(known: &[Known<'_>], pieces: &[BlockRange]) -> Option<Self> {
        let total: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let mut plain = Vec::with_capacity((total * BLOCK_BYTES) as usize);
        for piece in pieces {
            let mut at = piece.start;
            let from = known.partition_point(|known| known.blocks.end <= at);
            for part in known.iter().skip(from) {
                if at == piece.end || part.blocks.start > at {
                    break;
                }
                let end = piece.end.min(part.blocks.end);
                let [first, last] = [at, end].map(|block| (block - part.blocks.start) as usize);
                let bytes = part.bytes.get(first * BLOCK..part.bytes.len().min(last * BLOCK))?;
                plain.extend_from_slice(bytes);
                plain.resize(plain.len().next_multiple_of(BLOCK), 0);
                at = end;
            }
            if at < piece.end {
                return None;
            }
        }
        Some(Self { plain, parts: pieces.iter().map(|piece| (*piece, false)).collect() })
    }

    /// Reads ascending pieces of up to [`CAPTURE_BLOCKS`] blocks: holes of the target without reading them.
    fn read(
        target: &mut impl BlockFile,
        size_sectors: u64,
        pieces: &[BlockRange],
    ) -> Result<Self, JournalError> {
        let total: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let mut plain = vec![0; (total * BLOCK_BYTES) as usize];
        let (mut reads, mut parts, mut map) = (Vec::new(), Vec::new(), Map::new());
        let mut rest = plain.as_mut_slice();
        for piece in pieces {
            let own_bytes = ((piece.end - piece.start) * BLOCK_BYTES) as usize;
            let (mut own, tail) = std::mem::take(&mut rest).split_at_mut(own_bytes);
            rest = tail;
            let mut at = piece.start * BLOCK_BYTES;
            let end = (piece.end * BLOCK_BYTES).min(size_sectors * SECTOR_BYTES);
            let allocated =
                map.allocated(target, ByteRange { start: at, end }, size_sectors * SECTOR_BYTES)?;
            for part in &allocated {
                let (_, tail) = std::mem::take(&mut own).split_at_mut((part.start - at) as usize);
                let (data, tail) = tail.split_at_mut(part.len() as usize);
                reads.push(ReadAt { offset: part.start, data });
                (own, at) = (tail, part.end);
            }
            parts.extend(hole_blocks(*piece, &allocated));
        }
        if !reads.is_empty() {
            target.read(&mut reads)?;
        }
        drop(reads);
        Ok(Self { plain, parts })
    }

    fn save(&self, run: &mut ActiveRun) -> Result<(), JournalError> {
        let mut images = Vec::with_capacity(self.parts.len());
        let mut rest = self.plain.as_slice();
        for (blocks, hole) in &self.parts {
            let count = blocks.end - blocks.start;
            let (bytes, tail) = rest.split_at((count * BLOCK_BYTES) as usize);
            rest = tail;
            let data = if *hole { ImageData::Zeros(count) } else { ImageData::Bytes(bytes) };
            images.push(Image { first: BlockIndex(blocks.start), data });
        }
        Ok(run.append(&images)?)
    }
}

/// What is allocated around the blocks asked for, so that scattered ones do not ask the file system one by one.
struct Map {
    known: ByteRange,
    parts: Vec<ByteRange>,
    /// The target has so many holes that looking ahead costs more than it saves.
    holey: bool,
}

impl Map {
    /// Bytes looked ahead, and the parts in them above which that is given up for the next question.
    const AHEAD: u64 = 64 << 20;
    const PARTS_MAX: usize = 64;

    const fn new() -> Self {
        Self { known: ByteRange { start: 0, end: 0 }, parts: Vec::new(), holey: false }
    }

    /// The allocated parts of `range`; ranges ascend, and nothing is written between the questions.
    fn allocated(
        &mut self,
        target: &mut impl BlockFile,
        range: ByteRange,
        size_bytes: u64,
    ) -> Result<Vec<ByteRange>, JournalError> {
        if range.start < self.known.start || range.end > self.known.end {
            let ahead = if self.holey { 0 } else { Self::AHEAD };
            let end = range.end.max((range.start + ahead).min(size_bytes));
            self.known = ByteRange { start: range.start, end };
            self.parts = target.allocated(self.known)?;
            self.holey = self.parts.len() > Self::PARTS_MAX;
        }
        let from = self.parts.partition_point(|part| part.end <= range.start);
        let inside = self.parts.iter().skip(from).take_while(|part| part.start < range.end);
        Ok(inside
            .map(|part| ByteRange { start: part.start.max(range.start), end: part.end.min(range.end) })
            .collect())
    }
}

/// Cuts blocks into runs that lie wholly in a hole (true) and the rest (false).
fn hole_blocks(blocks: BlockRange, allocated: &[ByteRange]) -> Vec<(BlockRange, bool)> {
    let mut runs: Vec<(BlockRange, bool)> = Vec::new();
    let mut push = |start: u64, end: u64, zeros: bool| match runs.last_mut() {
        Some((last, same)) if *same == zeros => last.end = end,
        _ if start < end => runs.push((BlockRange::new(start, end), zeros)),
        _ => {}
    };
    let mut at = blocks.start;
    for part in allocated {
        let start = (part.start / BLOCK_BYTES).max(at);
        let end = part.end.div_ceil(BLOCK_BYTES).clamp(start, blocks.end);
        if at < start {
            push(at, start, true);
        }
        if start < end {
            push(start, end, false);
        }
        at = at.max(end);
    }
    if at < blocks.end {
        push(at, blocks.end, true);
    }
    runs
}
