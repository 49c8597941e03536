//! A sealed undo run: found by its trailer, read through its index pages, and readable without either.
//!
//! Invariants: index pages are read when they are needed and a bounded number of them is kept; a damaged page is made
//! again from the frames it named, a damaged trailer or fence page by walking all frames; where even the frames do not
//! say what was there, the blocks are lost and never "not in the run", which would let a later image stand in their
//! place. Nothing is written. Units: bytes and blocks. Called by views, merges, scrub and the offline tools.

use std::collections::BTreeMap;
use std::path::Path;

use super::undo_error::{Hole, UndoError};
use super::undo_file::{FrameReader, RunFile};
use super::undo_index::RunIndex;
use super::undo_scan::{Extent, Scanner, Step};
use crate::format::FormatError;
use crate::format::undo::frame::{EMPTY_FRAME_BLOCKS_MAX, UndoCodec};
use crate::format::undo::index::{IndexEntry, PagePlace, Trailer, read_fence_page, read_index_page};
use crate::format::undo::{BlockRange, RunHeader, RunIdentity, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, BlockIndex, ByteOffset};

/// Index pages kept in memory: 1 MiB.
const PAGES_KEPT: usize = 16;

/// A part of a run that a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The blocks, all of them asked for.
    pub blocks: BlockRange,
    /// Where their images are.
    pub place: Place,
}

/// Where the images of some blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// They were zeros.
    Zeros,
    /// In the frame at this place of the file.
    Stored(ByteOffset),
    /// Nowhere: they are lost, and nothing may be shown in their stead.
    Lost,
}

impl Found {
    pub(super) fn new(entry: &IndexEntry, asked: BlockRange) -> Self {
        let place = match entry.codec {
            UndoCodec::Zeros => Place::Zeros,
            UndoCodec::Raw | UndoCodec::Zstd => Place::Stored(ByteOffset(entry.offset)),
            UndoCodec::Lost => Place::Lost,
        };
        Self { blocks: entry.blocks().intersect(asked), place }
    }
}

/// Where a sealed run finds its entries.
enum Index {
    /// In its pages.
    Pages {
        trailer: Trailer,
        fences: Vec<u64>,
        /// The newest pages, the last used at the end.
        kept: Vec<(u64, Vec<IndexEntry>)>,
        /// Damaged pages, made again.
        remade: BTreeMap<u64, Vec<IndexEntry>>,
    },
    /// In memory, rebuilt from the frames.
    Walked(RunIndex),
}

/// An undo run that is complete and never changes again.
pub struct SealedRun {
    pub(super) run: RunFile,
    pub(super) reader: FrameReader,
    index: Index,
    page: PoolBuf,
    damage: Vec<Hole>,
}

impl std::fmt::Debug for SealedRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedRun")
            .field("path", &self.run.path)
            .field("undo_epoch", &self.run.header.undo_epoch)
            .field("damage", &self.damage)
            .finish_non_exhaustive()
    }
}

impl SealedRun {
    /// Opens a sealed run. Damage that opening it met is in [`Self::damage`].
    ///
    /// # Errors
    /// When the file is not that run, or cannot be read.
    pub fn open(files: &dyn Files, path: &Path, expected: &RunIdentity) -> Result<Self, UndoError> {
        let (mut run, mut damage) = RunFile::open(files, path, expected, false)?;
        let mut page = PoolBuf::alone(crate::format::undo::index::PAGE_BYTES_MAX)?;
        let index = match read_trailer(&mut run, &mut page)? {
            Ok((trailer, fences)) => {
                Index::Pages { trailer, fences, kept: Vec::new(), remade: BTreeMap::new() }
            }
            Err(hole) => {
                damage.push(hole);
                Index::Walked(walk_all(&mut run, &mut damage)?)
            }
        };
        Ok(Self { run, reader: FrameReader::new()?, index, page, damage })
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &RunHeader {
        &self.run.header
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.run.path
    }

    /// The trailer; `None` where it is damaged.
    #[must_use]
    pub const fn trailer(&self) -> Option<&Trailer> {
        match &self.index {
            Index::Pages { trailer, .. } => Some(trailer),
            Index::Walked(_) => None,
        }
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.run.file.size_bytes()
    }

    /// Damage that was met so far. [`Self::verify`](SealedRun::verify) looks for all of it.
    #[must_use]
    pub fn damage(&self) -> &[Hole] {
        &self.damage
    }

    /// Notes damage, once.
    pub(super) fn note(&mut self, hole: Hole) {
        note(&mut self.damage, hole);
    }

    /// Frames, and blocks with a payload.
    pub(super) fn totals(&self) -> (u64, u64) {
        match &self.index {
            Index::Pages { trailer, .. } => (trailer.frames, trailer.data_blocks),
            Index::Walked(index) => (index.len(), index.block_counts().1),
        }
    }

    /// Lets the next lookups read the pages from the file.
    pub(super) fn forget_pages(&mut self) {
        if let Index::Pages { kept, remade, .. } = &mut self.index {
            kept.clear();
            remade.clear();
        }
    }

    /// What is wrong with the trailer and the fences in the file now.
    pub(super) fn reread_trailer(&mut self) -> Result<Option<Hole>, UndoError> {
        Ok(read_trailer(&mut self.run, &mut self.page)?.err())
    }

    /// The parts of `range` that the run holds images of (or lost), ascending.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn lookup(&mut self, range: BlockRange) -> Result<Vec<Found>, UndoError> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let entries = self.entries_from(at, range.end)?;
            found.extend(entries.iter().map(|entry| Found::new(entry, range)));
            at = entries.last().map_or(range.end, |last| last.blocks().end);
        }
        Ok(found)
    }

    /// Fills `out` with the images of the blocks from `first` on, all of which a lookup found.
    ///
    /// # Errors
    /// [`UndoError::Damaged`] or [`UndoError::Lost`], naming the first blocks whose images cannot be had;
    /// [`UndoError::NotHere`] for blocks that the run does not hold; when the file cannot be read.
    ///
    /// # Panics
    /// When `out` is not whole blocks.
    pub fn read(&mut self, first: BlockIndex, out: &mut [u8]) -> Result<(), UndoError> {
        assert!((out.len() as u64).is_multiple_of(BLOCK_BYTES));
        let blocks = BlockRange::new(first.0, first.0.saturating_add(out.len() as u64 / BLOCK_BYTES));
        let mut at = blocks.start;
        while at < blocks.end {
            let entries = self.entries_from(at, blocks.end)?;
            let end = entries.last().map_or(blocks.end, |last| last.blocks().end.min(blocks.end));
            let part = BlockRange::new(at, end);
            let from = ((at - blocks.start) * BLOCK_BYTES) as usize;
            let to = ((end - blocks.start) * BLOCK_BYTES) as usize;
            self.reader.read_all(&mut self.run, entries.into_iter().map(Ok), part, &mut out[from..to])?;
            at = end;
        }
        Ok(())
    }

    /// Entries that end behind block `first` and begin before block `end`, ascending: at most one page of them, and
    /// none only when there is none.
    pub(super) fn entries_from(&mut self, first: u64, end: u64) -> Result<Vec<IndexEntry>, UndoError> {
        const AT_ONCE: usize = 1024;
        let (fences, pages) = match &self.index {
            Index::Walked(index) => {
                return Ok(index.overlap(BlockRange { start: first, end }).take(AT_ONCE).collect());
            }
            Index::Pages { fences, trailer, .. } => (fences, trailer.index_pages),
        };
        let before = fences.partition_point(|fence| *fence <= first) as u64;
        for number in before.saturating_sub(1)..pages {
            if self.fence(number) >= end {
                break;
            }
            let page = self.page_entries(number)?;
            let from = page.partition_point(|entry| entry.blocks().end <= first);
            let to = page.partition_point(|entry| entry.first_block < end);
            let entries = page.get(from..to).unwrap_or_default().to_vec();
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
        Ok(Vec::new())
    }

    /// The first block of an index page; behind the last page, the end of the run.
    fn fence(&self, number: u64) -> u64 {
        match &self.index {
            Index::Pages { fences, trailer, .. } => {
                fences.get(number as usize).copied().unwrap_or(trailer.end_block)
            }
            Index::Walked(_) => 0,
        }
    }

    /// The entries of an index page, from memory, from the file, or made again from the frames.
    fn page_entries(&mut self, number: u64) -> Result<&[IndexEntry], UndoError> {
        let span = BlockRange { start: self.fence(number), end: self.fence(number + 1) };
        let Index::Pages { trailer, kept, remade, .. } = &mut self.index else { return Ok(&[]) };
        if !remade.contains_key(&number) {
            if let Some(at) = kept.iter().position(|(kept, _)| *kept == number) {
                kept[at..].rotate_left(1);
            } else {
                let place = trailer.places().index_page(number);
                match read_page(&mut self.run, &mut self.page, number, place, trailer.frames_end)? {
                    Ok(entries) => {
                        if kept.len() >= PAGES_KEPT {
                            kept.remove(0);
                        }
                        kept.push((number, entries));
                    }
                    Err(reason) => {
                        let file = ByteRange { start: place.offset, end: place.offset + place.bytes as u64 };
                        note(&mut self.damage, Hole { file, lost: Vec::new(), reason });
                        let entries = walk_page(&mut self.run, trailer, span, place.items, &mut self.damage)?;
                        remade.insert(number, entries);
                    }
                }
            }
        }
        Ok(match remade.get(&number) {
            Some(entries) => entries,
            None => kept.last().map_or(&[], |(_, entries)| entries.as_slice()),
        })
    }
}

/// Notes damage, once.
fn note(damage: &mut Vec<Hole>, hole: Hole) {
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
#[expect(clippy::type_complexity, reason = "an I/O error and damage are different things")]
fn read_trailer(
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

fn read_page(
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
fn walk_all(run: &mut RunFile, damage: &mut Vec<Hole>) -> Result<RunIndex, UndoError> {
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
fn walk_page(
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
