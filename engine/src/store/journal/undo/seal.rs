//! Writes what makes a run sealed: index pages, fence pages, trailer.
//!
//! Invariants: entries come ascending; memory is one page and eight bytes a page, however many entries there are; where
//! the end of the frames is not known yet, pages are written further back first and moved down at the end, which is safe
//! because nobody refers to the file before it is finished. Nothing is durable before the owner flushes. Units: bytes.
//! Called when a run is sealed or merged.

use super::error::UndoError;
use crate::format::undo::frame::UndoCodec;
use crate::format::undo::index::{
    IndexEntry, IndexPlaces, PAGE_BYTES_MAX, PAGE_ENTRIES, PAGE_FENCES, TRAILER_MAGIC, Trailer,
    put_fence_page, put_index_page,
};
use crate::format::undo::{RunHeader, UNDO_ALIGN_BYTES};
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ReadAt, WriteAt};
use crate::units::Timestamp;

/// Writes the index of a run, entry by entry.
pub(super) struct IndexWriter {
    header: RunHeader,
    /// Where page 0 is written for now.
    base: u64,
    /// Full pages written so far.
    pages: u64,
    entries: Vec<IndexEntry>,
    fences: Vec<u64>,
    page: PoolBuf,
    trailer: Trailer,
}

impl IndexWriter {
    /// A writer that puts its pages from `base` on.
    pub(super) fn new(header: &RunHeader, base: u64) -> Result<Self, UndoError> {
        assert!(base.is_multiple_of(UNDO_ALIGN_BYTES));
        let trailer = Trailer {
            magic: TRAILER_MAGIC,
            crc: 0,
            fence_pages: 0,
            salt: header.salt,
            undo_epoch: header.undo_epoch,
            frames: 0,
            blocks: 0,
            data_blocks: 0,
            lost_blocks: 0,
            frames_end: base,
            index_pages: 0,
            first_block: 0,
            end_block: 0,
            opened: header.created,
            closed: header.created,
        };
        Ok(Self {
            header: *header,
            base,
            pages: 0,
            entries: Vec::with_capacity(PAGE_ENTRIES as usize),
            fences: Vec::new(),
            page: PoolBuf::alone(PAGE_BYTES_MAX)?,
            trailer,
        })
    }

    /// Adds the next entry.
    pub(super) fn push(&mut self, file: &mut dyn BlockFile, entry: IndexEntry) -> Result<(), UndoError> {
        assert!(entry.first_block >= self.trailer.end_block, "entries ascend");
        if self.entries.len() as u64 == PAGE_ENTRIES {
            self.write_page(file, self.base)?;
        }
        let count = u64::from(entry.block_count);
        let trailer = &mut self.trailer;
        if trailer.frames == 0 {
            trailer.first_block = entry.first_block;
        }
        trailer.end_block = entry.blocks().end;
        trailer.frames += 1;
        trailer.blocks += count;
        trailer.data_blocks += if entry.codec.has_payload() { count } else { 0 };
        trailer.lost_blocks += if entry.codec == UndoCodec::Lost { count } else { 0 };
        self.entries.push(entry);
        Ok(())
    }

    /// Writes the entries that wait as the next page of an index that begins at `base`.
    fn write_page(&mut self, file: &mut dyn BlockFile, base: u64) -> Result<(), UndoError> {
        let places = IndexPlaces { frames_end: base, frames: self.trailer.frames };
        let place = places.index_page(self.pages);
        assert_eq!(place.items, self.entries.len() as u64);
        self.page.set_len(place.bytes);
        put_index_page(&mut self.page, self.header.salt, self.pages, &self.entries);
        file.write(&[WriteAt { offset: place.offset, data: &self.page }])?;
        self.fences.push(self.entries.first().map_or(0, |entry| entry.first_block));
        self.entries.clear();
        self.pages += 1;
        Ok(())
    }

    /// Writes everything that is left, for frames that end at `frames_end`; answers the trailer.
    pub(super) fn finish(
        mut self,
        file: &mut dyn BlockFile,
        frames_end: u64,
        closed: Timestamp,
    ) -> Result<Trailer, UndoError> {
        assert!(frames_end <= self.base && frames_end.is_multiple_of(UNDO_ALIGN_BYTES));
        self.move_pages(file, frames_end)?;
        self.write_page(file, frames_end)?; // the last one; the only one, and empty, of a run without frames
        let places = IndexPlaces { frames_end, frames: self.trailer.frames };
        assert_eq!(self.pages, places.index_pages());
        for (number, fences) in (0..).zip(self.fences.chunks(PAGE_FENCES as usize)) {
            let place = places.fence_page(number);
            self.page.set_len(place.bytes);
            put_fence_page(&mut self.page, self.header.salt, number, fences);
            file.write(&[WriteAt { offset: place.offset, data: &self.page }])?;
        }
        let trailer = Trailer {
            frames_end,
            index_pages: places.index_pages(),
            fence_pages: places.fence_pages() as u32, // one for 22 million frames; a disk has at most 2^34 blocks
            closed,
            ..self.trailer
        };
        self.page.set_len(UNDO_ALIGN_BYTES as usize);
        self.page.copy_from_slice(&trailer.to_block());
        file.write(&[WriteAt { offset: places.trailer(), data: &self.page }])?;
        Ok(trailer)
    }

    /// Moves the full pages from where they were written to `to`.
    fn move_pages(&mut self, file: &mut dyn BlockFile, to: u64) -> Result<(), UndoError> {
        if to == self.base {
            return Ok(());
        }
        self.page.set_len(PAGE_BYTES_MAX);
        // Front to back: a page never lands on one that was not moved yet.
        for number in 0..self.pages {
            let inside = number * PAGE_BYTES_MAX as u64;
            file.read(&mut [ReadAt { offset: self.base + inside, data: &mut self.page }])?;
            file.write(&[WriteAt { offset: to + inside, data: &self.page }])?;
        }
        Ok(())
    }
}
