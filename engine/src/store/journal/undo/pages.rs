//! How a sealed run finds its entries: trailer, fences and index pages, and what to do where one is damaged.
//!
//! Invariants: what cannot be read is made again from the frames; blocks that may have been in frames which cannot be
//! found any more are entered as lost, so that nothing else is shown in their place. Units: bytes and blocks.
//! Called by `undo_sealed.rs`.

use std::collections::BTreeMap;

use super::error::{Hole, UndoError};
use super::file::RunFile;
use super::index::RunIndex;
use super::scan::{Extent, Scanner, Step};
use crate::format::FormatError;
use crate::format::undo::frame::{EMPTY_FRAME_BLOCKS_MAX, UndoCodec};
use crate::format::undo::index::{IndexEntry, PagePlace, Trailer, read_fence_page, read_index_page};
use crate::format::undo::{BlockRange, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ByteRange, ReadAt};

/// Notes damage, once.
pub(super) fn note(damage: &mut Vec<Hole>, hole: Hole) {
    if !damage.contains(&hole) {
        damage.push(hole);
    }
}

/// Reads `page` whole from `offset`; what is behind the end of the file is missing.
fn fetch(file: &mut dyn BlockFile, page: &mut PoolBuf, offset: u64, bytes: usize) -> Result<(), UndoError> {
    let there = file.size_bytes().saturating_sub(offset).min(bytes as u64);
    page.set_len(there as usize);
    if there > 0 {
        file.read(&mut [ReadAt { offset, data: page }])?;
    }
    Ok(())
}

/// Trailer and fences, or the damage that makes them useless.
pub(super) fn read_trailer(
    run: &mut RunFile,
    page: &mut PoolBuf,
) -> Result<Result<(Trailer, Vec<u64>), Hole>, UndoError> {
    let (size, salt) = (run.file.size_bytes(), run.header.salt);
    let hole = |start: u64, end: u64, reason| {
        Ok(Err(Hole { file: ByteRange { start, end }, lost: Vec::new(), reason }))
    };
    let offset = size.saturating_sub(UNDO_ALIGN_BYTES) / UNDO_ALIGN_BYTES * UNDO_ALIGN_BYTES;
    fetch(&mut *run.file, page, offset, UNDO_ALIGN_BYTES as usize)?;
    let trailer = match Trailer::from_block(page, salt, size) {
        Ok(trailer) => trailer,
        Err(reason) => return hole(offset, size, reason),
    };
    let (places, mut fences) = (trailer.places(), Vec::new());
    for number in 0..places.fence_pages() {
        let place = places.fence_page(number);
        fetch(&mut *run.file, page, place.offset, place.bytes)?;
        let read =
            read_fence_page(page, salt, number).and_then(|read| check_fences(&fences, read, place, &trailer));
        match read {
            Ok(read) => fences.extend(read),
            Err(reason) => return hole(place.offset, place.offset + place.bytes as u64, reason),
        }
    }
    Ok(Ok((trailer, fences)))
}

/// Fences must be as many as there are pages, and ascend inside the run.
fn check_fences(
    before: &[u64],
    fences: Vec<u64>,
    place: PagePlace,
    trailer: &Trailer,
) -> Result<Vec<u64>, FormatError> {
    let first = before.last().map_or(trailer.first_block, |last| last + 1);
    let ascend = fences.is_sorted() && fences.first().is_none_or(|fence| *fence >= first);
    let inside = fences.last().is_none_or(|last| *last <= trailer.end_block);
    if fences.len() as u64 == place.items && ascend && inside {
        return Ok(fences);
    }
    let (what, field) = ("Page", "fences");
    Err(FormatError::Field {
        what,
        field,
        got: fences.len() as u64,
        expected: "one for each page, ascending",
    })
}

pub(super) fn read_page(
    run: &mut RunFile,
    page: &mut PoolBuf,
    number: u64,
    place: PagePlace,
    frames_end: u64,
) -> Result<Result<Vec<IndexEntry>, FormatError>, UndoError> {
    fetch(&mut *run.file, page, place.offset, place.bytes)?;
    let read = read_index_page(page, run.header.salt, number, frames_end);
    Ok(read.and_then(|entries| {
        if entries.len() as u64 == place.items {
            return Ok(entries);
        }
        let (what, field, got) = ("Page", "count", entries.len() as u64);
        Err(FormatError::Field { what, field, got, expected: "the items that belong on this page" })
    }))
}

/// Rebuilds the whole index from the frames of a run without a trailer. Blocks that may have been in lost frames are
/// entered as lost.
pub(super) fn walk_all(run: &mut RunFile, damage: &mut Vec<Hole>) -> Result<RunIndex, UndoError> {
    let size = run.file.size_bytes();
    let mut scanner = Scanner::new(Extent { end: size, certain: size, until_index: true })?;
    let (mut index, mut gaps) = (RunIndex::new(), Vec::new());
    loop {
        match scanner.step(run)? {
            // A payload's damage shows when it is read; a block that was captured twice keeps its first image.
            Step::Frame { entry, .. } => {
                if index.is_free(entry.blocks()) {
                    index.insert(&entry);
                }
            }
            Step::Gap { file, blocks, reason } => gaps.push((file, blocks, reason)),
            Step::End { complete: true } => break,
            Step::End { complete: false } => {
                let (what, field, expected) = ("undo run", "end", "an index behind the frames");
                let reason = FormatError::Field { what, field, got: size, expected };
                gaps.push((ByteRange { start: size, end: size }, run.header.disk_blocks(), reason));
                break;
            }
        }
    }
    for (file, blocks, reason) in gaps {
        let lost = index.missing(blocks);
        for entry in lost.iter().flat_map(|blocks| lost_entries(*blocks)) {
            index.insert(&entry);
        }
        note(damage, Hole { file, lost, reason });
    }
    Ok(index)
}

/// Makes the entries of a damaged page again: all frames whose first block is in its span. Where there are fewer than
/// the page had, what is uncovered is entered as lost.
pub(super) fn walk_page(
    run: &mut RunFile,
    trailer: &Trailer,
    span: BlockRange,
    items: u64,
    damage: &mut Vec<Hole>,
) -> Result<Vec<IndexEntry>, UndoError> {
    let end = trailer.frames_end;
    let mut scanner = Scanner::new(Extent { end, certain: end, until_index: false })?;
    let (mut found, mut gaps) = (BTreeMap::new(), Vec::new());
    loop {
        match scanner.step(run)? {
            Step::Frame { entry, .. } if (span.start..span.end).contains(&entry.first_block) => {
                found.entry(entry.first_block).or_insert(entry);
            }
            Step::Frame { .. } => {}
            Step::Gap { file, reason, .. } => gaps.push((file, reason)),
            Step::End { .. } => break,
        }
    }
    let complete = found.len() as u64 == items;
    let mut index = RunIndex::new();
    for entry in found.values() {
        if index.is_free(entry.blocks()) {
            index.insert(entry);
        }
    }
    let lost = if complete { Vec::new() } else { index.missing(span) };
    lost.iter().flat_map(|blocks| lost_entries(*blocks)).for_each(|entry| index.insert(&entry));
    for (at, (file, reason)) in gaps.into_iter().enumerate() {
        let lost = if at == 0 { lost.clone() } else { Vec::new() };
        note(damage, Hole { file, lost, reason });
    }
    Ok(index.from(0).collect())
}

/// Entries that say of blocks that they are lost, without a frame.
fn lost_entries(blocks: BlockRange) -> impl Iterator<Item = IndexEntry> {
    let mut start = blocks.start;
    std::iter::from_fn(move || {
        let end = blocks.end.min(start + EMPTY_FRAME_BLOCKS_MAX);
        let entry = IndexEntry {
            first_block: start,
            offset: 0,
            block_count: (end - start) as u32, // at most EMPTY_FRAME_BLOCKS_MAX
            frame_units: 0,
            codec: UndoCodec::Lost,
        };
        (start < end).then(|| {
            start = end;
            entry
        })
    })
}
