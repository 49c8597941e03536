//! One undo run as an open file: its header, found in either copy, and checked reads of single frames.
//!
//! Invariants: a header is believed only when its checksum, its version and its identity are right; a frame is believed
//! only when it is the one the index names; a block is handed out only when its own CRC matches. Units: bytes, blocks.
//! Called by the runs of this folder.

use std::path::{Path, PathBuf};

use super::error::{Hole, UndoError};
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::undo::frame::{FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, Frame, UndoCodec};
use crate::format::undo::index::IndexEntry;
use crate::format::undo::{BlockRange, FRAMES_START, RunHeader, RunIdentity, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::store::files::Files;
use crate::units::BLOCK_BYTES;

/// An undo run whose header was checked.
pub(super) struct RunFile {
    pub(super) path: PathBuf,
    pub(super) header: RunHeader,
    pub(super) file: Box<dyn BlockFile>,
}

impl RunFile {
    /// Opens a run and finds its header; what is wrong with one copy of it is answered as a hole that loses nothing.
    pub(super) fn open(
        files: &dyn Files,
        path: &Path,
        expected: &RunIdentity,
        writable: bool,
    ) -> Result<(Self, Vec<Hole>), UndoError> {
        let mut file = files.open(path, writable)?;
        let (header, holes) = read_header(&mut *file, path)?;
        if let Some(field) = difference(&header.identity(), expected) {
            return Err(UndoError::Foreign { path: path.into(), field });
        }
        Ok((Self { path: path.into(), header, file }, holes))
    }

    pub(super) fn damaged(&self, offset: u64, blocks: BlockRange, source: FormatError) -> UndoError {
        UndoError::Damaged { path: self.path.clone(), epoch: self.header.undo_epoch, offset, blocks, source }
    }

    pub(super) fn lost(&self, blocks: BlockRange) -> UndoError {
        UndoError::Lost { path: self.path.clone(), epoch: self.header.undo_epoch, blocks }
    }

    pub(super) fn not_here(&self, blocks: BlockRange) -> UndoError {
        UndoError::NotHere { path: self.path.clone(), epoch: self.header.undo_epoch, blocks }
    }
}

pub(super) fn read_header(
    file: &mut dyn BlockFile,
    path: &Path,
) -> Result<(RunHeader, Vec<Hole>), UndoError> {
    let mut bytes = PoolBuf::alone(FRAMES_START as usize)?;
    let there = file.size_bytes().min(FRAMES_START) as usize; // a file of three bytes is no run, and no I/O error
    bytes.set_len(there);
    if there > 0 {
        file.read(&mut [ReadAt { offset: 0, data: &mut bytes }])?;
    }
    let block = UNDO_ALIGN_BYTES as usize;
    let copies = [bytes.get(..block), bytes.get(block..2 * block)]
        .map(|copy| RunHeader::from_block(copy.unwrap_or_default()));
    let hole = |copy: u64, reason: &FormatError| Hole {
        file: ByteRange { start: copy * UNDO_ALIGN_BYTES, end: (copy + 1) * UNDO_ALIGN_BYTES },
        lost: Vec::new(),
        reason: reason.clone(),
    };
    match &copies {
        [Ok(first), Ok(second)] if first == second => Ok((*first, Vec::new())),
        // Sound copies that differ were not written by us; which one is true cannot be known.
        [Ok(_), Ok(second)] => {
            let source = FormatError::Field {
                what: "RunHeader",
                field: "salt",
                got: second.salt,
                expected: "two copies that are alike",
            };
            Err(UndoError::Header { path: path.into(), source })
        }
        [Ok(header), Err(reason)] if !RunHeader::is_refusal(reason) => Ok((*header, vec![hole(1, reason)])),
        [Err(reason), Ok(header)] if !RunHeader::is_refusal(reason) => Ok((*header, vec![hole(0, reason)])),
        [Err(refused), _] | [_, Err(refused)] => {
            Err(UndoError::Header { path: path.into(), source: refused.clone() })
        }
    }
}

/// The first thing in which two identities differ, in words.
fn difference(got: &RunIdentity, expected: &RunIdentity) -> Option<&'static str> {
    let differs = [
        (got.journal != expected.journal, "journal"),
        (got.disk != expected.disk, "disk"),
        (got.lineage != expected.lineage, "lineage"),
        (got.generation != expected.generation, "generation"),
        (got.undo_epoch != expected.undo_epoch, "undo epoch"),
        (got.undo_epoch_last != expected.undo_epoch_last, "last undo epoch"),
    ];
    differs.into_iter().find_map(|(differs, field)| differs.then_some(field))
}

/// Reads frames one at a time; keeps the last one open, so that neighbouring blocks cost one read.
pub(super) struct FrameReader {
    stored: PoolBuf,
    plain: PoolBuf,
    decompressor: Decompressor,
    open: Option<Opened>,
    /// Parts of the file that were read ahead, ascending: where each begins, and its bytes.
    ahead: Vec<(u64, Vec<u8>)>,
}

/// What `plain` holds.
struct Opened {
    offset: u64,
    sound: u32,
    wrong: Option<FormatError>,
}

impl FrameReader {
    pub(super) fn new() -> Result<Self, UndoError> {
        Ok(Self {
            stored: PoolBuf::alone((FRAME_BYTES_MAX + 2 * UNDO_ALIGN_BYTES) as usize)?,
            plain: PoolBuf::alone((FRAME_BLOCKS_MAX * BLOCK_BYTES) as usize)?,
            decompressor: Decompressor::new()?,
            open: None,
            ahead: Vec::new(),
        })
    }

    /// Reads the frames of these entries ahead, in one call; forgets what was read ahead before.
    pub(super) fn preload(
        &mut self,
        run: &mut RunFile,
        mut entries: Vec<IndexEntry>,
    ) -> Result<(), UndoError> {
        self.ahead.clear();
        entries.sort_unstable_by_key(|entry| entry.offset);
        for entry in &entries {
            let ByteRange { start, end } = stored_at(run, entry);
            match self.ahead.last_mut() {
                Some((at, bytes)) if *at + bytes.len() as u64 >= start => {
                    bytes.resize((end.max(*at + bytes.len() as u64) - *at) as usize, 0);
                }
                _ => self.ahead.push((start, vec![0; (end - start) as usize])),
            }
        }
        let mut reads: Vec<ReadAt<'_>> =
            self.ahead.iter_mut().map(|(offset, data)| ReadAt { offset: *offset, data }).collect();
        if reads.is_empty() { Ok(()) } else { Ok(run.file.read(&mut reads)?) }
    }

    /// Reads the frame of an entry; its payload is not checked yet.
    pub(super) fn fetch(&mut self, run: &mut RunFile, entry: &IndexEntry) -> Result<Frame<'_>, UndoError> {
        fetch_into(&mut self.stored, &self.ahead, run, entry)
    }

    /// Fills `out` with the images of `blocks`, all of which are in `entry`.
    pub(super) fn read(
        &mut self,
        run: &mut RunFile,
        entry: &IndexEntry,
        blocks: BlockRange,
        out: &mut [u8],
    ) -> Result<(), UndoError> {
        assert_eq!(out.len() as u64, blocks.len() * BLOCK_BYTES);
        match entry.codec {
            UndoCodec::Zeros => out.fill(0),
            UndoCodec::Lost => return Err(run.lost(blocks)),
            UndoCodec::Raw | UndoCodec::Zstd => {
                self.open(run, entry)?;
                self.hand_out(run, entry, blocks, out)?;
            }
        }
        Ok(())
    }

    /// Fills `out` with the images of `blocks`, found in `entries`, which ascend.
    pub(super) fn read_all(
        &mut self,
        run: &mut RunFile,
        entries: impl Iterator<Item = Result<IndexEntry, UndoError>>,
        blocks: BlockRange,
        out: &mut [u8],
    ) -> Result<(), UndoError> {
        let mut at = blocks.start;
        for entry in entries {
            let entry = entry?;
            let part = entry.blocks().intersect(blocks);
            if part.start != at {
                break;
            }
            let from = ((at - blocks.start) * BLOCK_BYTES) as usize;
            let to = ((part.end - blocks.start) * BLOCK_BYTES) as usize;
            self.read(run, &entry, part, &mut out[from..to])?;
            at = part.end;
        }
        if at == blocks.end { Ok(()) } else { Err(run.not_here(BlockRange::new(at, blocks.end))) }
    }

    fn open(&mut self, run: &mut RunFile, entry: &IndexEntry) -> Result<(), UndoError> {
        if self.open.as_ref().is_some_and(|open| open.offset == entry.offset) {
            return Ok(());
        }
        self.open = None;
        let frame = fetch_into(&mut self.stored, &self.ahead, run, entry)?;
        let (sound, wrong) = frame
            .open_into(&mut self.decompressor, &mut self.plain)
            .map_err(|reason| run.damaged(entry.offset, entry.blocks(), reason))?;
        self.open = Some(Opened { offset: entry.offset, sound, wrong });
        Ok(())
    }

    fn hand_out(
        &self,
        run: &RunFile,
        entry: &IndexEntry,
        blocks: BlockRange,
        out: &mut [u8],
    ) -> Result<(), UndoError> {
        let Some(open) = &self.open else { return Err(run.not_here(blocks)) };
        let bad = |block: &u64| open.sound & (1 << (block - entry.first_block)) == 0;
        if let (Some(wrong), Some(first)) = (&open.wrong, (blocks.start..blocks.end).find(bad)) {
            let end = (first..blocks.end).find(|block| !bad(block)).unwrap_or(blocks.end);
            return Err(run.damaged(entry.offset, BlockRange::new(first, end), wrong.clone()));
        }
        let start = ((blocks.start - entry.first_block) * BLOCK_BYTES) as usize;
        out.copy_from_slice(&self.plain[start..start + out.len()]);
        Ok(())
    }
}

/// Where the frame of an entry is stored, in whole blocks, as far as the file reaches.
fn stored_at(run: &RunFile, entry: &IndexEntry) -> ByteRange {
    let start = entry.offset / UNDO_ALIGN_BYTES * UNDO_ALIGN_BYTES;
    let end = (entry.offset + entry.frame_bytes()).next_multiple_of(UNDO_ALIGN_BYTES);
    ByteRange { start, end: end.min(run.file.size_bytes()).max(start) }
}

/// Reads the frame of an entry and checks that it is the one the entry means.
fn fetch_into<'a>(
    stored: &'a mut PoolBuf,
    ahead: &[(u64, Vec<u8>)],
    run: &mut RunFile,
    entry: &IndexEntry,
) -> Result<Frame<'a>, UndoError> {
    let ByteRange { start, end } = stored_at(run, entry);
    stored.set_len(((end - start) as usize).min(stored.capacity()));
    let before = ahead.partition_point(|(at, _)| *at <= start).checked_sub(1).and_then(|at| ahead.get(at));
    let known = before.and_then(|(at, bytes)| bytes.get((start - at) as usize..(end - at) as usize));
    if let Some(known) = known.filter(|known| known.len() == stored.len()) {
        stored.copy_from_slice(known);
    } else if !stored.is_empty() {
        run.file.read(&mut [ReadAt { offset: start, data: &mut *stored }])?;
    }
    let bytes = stored.get((entry.offset - start) as usize..).unwrap_or_default();
    let damaged = |source| run.damaged(entry.offset, entry.blocks(), source);
    let frame = Frame::read(bytes, run.header.salt, entry.offset).map_err(damaged)?;
    if (frame.head.blocks(), frame.head.codec) != (entry.blocks(), entry.codec) {
        let (what, field, got) = ("Frame", "first_block", frame.head.first_block);
        return Err(damaged(FormatError::Field { what, field, got, expected: "the blocks the index names" }));
    }
    Ok(frame)
}
