//! A sealed undo run: found by its trailer, read through its index pages, and readable without either.
//!
//! Invariants: index pages are read when they are needed and a bounded number of them is kept; a damaged page is made
//! again from the frames it named, a damaged trailer or fence page by walking all frames; where even the frames do not
//! say what was there, the blocks are lost and never "not in the run", which would let a later image stand in their
//! place. Nothing is written. Units: bytes and blocks. Called by views, merges, scrub and the offline tools.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::{Hole, UndoError};
use super::file::{FrameReader, RunFile};
use super::index::RunIndex;
use super::pages::{note, read_page, read_trailer, walk_all, walk_page};
use crate::format::undo::frame::UndoCodec;
use crate::format::undo::index::{IndexEntry, PAGE_BYTES_MAX, Trailer};
use crate::format::undo::{BlockRange, RunHeader, RunIdentity};
use crate::io::ByteRange;
use crate::io::buffer::PoolBuf;
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
        let mut page = PoolBuf::alone(PAGE_BYTES_MAX)?;
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

    /// Reads what the run holds of these blocks ahead, all together, in place of what was read ahead before. Bounds
    /// nothing: the caller bounds the blocks. Damage shows when they are read.
    ///
    /// # Errors
    /// When index or file cannot be read.
    pub fn preload(&mut self, ranges: &[BlockRange]) -> Result<(), UndoError> {
        let mut entries = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let found = self.entries_from(at, range.end)?;
                at = found.last().map_or(range.end, |last| last.blocks().end);
                entries.extend(found.into_iter().filter(|entry| entry.codec.has_payload()));
            }
        }
        self.reader.preload(&mut self.run, entries)
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
        self.load_page(number)?;
        let Index::Pages { kept, remade, .. } = &self.index else { return Ok(&[]) };
        let newest = kept.last().map_or(&[][..], |(_, entries)| entries.as_slice());
        Ok(remade.get(&number).map_or(newest, Vec::as_slice))
    }

    /// Puts a page at the end of the kept ones, or among those that were made again.
    fn load_page(&mut self, number: u64) -> Result<(), UndoError> {
        let span = BlockRange { start: self.fence(number), end: self.fence(number + 1) };
        let Index::Pages { trailer, kept, remade, .. } = &mut self.index else { return Ok(()) };
        if remade.contains_key(&number) {
            return Ok(());
        }
        if let Some(at) = kept.iter().position(|(kept, _)| *kept == number) {
            kept[at..].rotate_left(1);
            return Ok(());
        }
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
        Ok(())
    }
}
