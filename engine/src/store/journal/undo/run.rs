//! The undo run of the open undo epoch of a disk: before-images are appended, found again and read back.
//!
//! Invariants: a block is captured once (I2, asserted); what [`ActiveRun::flush`] covered survives a crash, and
//! [`ActiveRun::len_bytes`] at that moment is the undo length that the log records as applied; on reopening, a frame
//! before that length is never cut away: it is read, or it is a hole, and its blocks count as captured (a later image
//! would be a guess); behind it, the run is cut at the first group that is not whole. After a failed write or flush the
//! run refuses to go on (I6); where nothing was wrong but that the medium is full, it goes on once it was cut back to what
//! it held before. Units: bytes and blocks. Called by the apply workers and by view readers.
//!
//! Call order: `create` or `reopen`; any number of `append` and `flush`, `cut_back` where [`ActiveRun::met_full`]; `seal`.

use std::path::Path;

use super::error::{Hole, UndoError};
use super::file::{FrameReader, RunFile};
use super::index::RunIndex;
use super::rebuild::{Gap, Rebuilt};
use super::seal::IndexWriter;
use super::sealed::{Found, SealedRun};
use super::write::{FrameWriter, frames_bytes_max};
use crate::format::undo::frame::{EMPTY_FRAME_BLOCKS_MAX, UndoCodec};
use crate::format::undo::index::{IndexEntry, IndexPlaces};
use crate::format::undo::{
    BlockRange, FRAMES_START, RUN_BYTES_MAX, RunHeader, RunIdentity, UNDO_ALIGN_BYTES,
};
use crate::io::{BlockFile, WriteAt};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, BlockIndex, Timestamp};

/// Before-images of adjacent blocks.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The first block.
    pub first: BlockIndex,
    /// What the blocks held.
    pub data: ImageData<'a>,
}

/// What blocks held.
#[derive(Clone, Copy, Debug)]
pub enum ImageData<'a> {
    /// So many blocks of zeros, known without reading them.
    Zeros(u64),
    /// Bytes of whole blocks. The last block of a disk is filled up with zeros.
    Bytes(&'a [u8]),
}

impl Image<'_> {
    /// The blocks.
    ///
    /// # Panics
    /// When they pass 2^64, or the bytes are not whole blocks.
    #[must_use]
    pub fn blocks(&self) -> BlockRange {
        let count = match self.data {
            ImageData::Zeros(count) => count,
            ImageData::Bytes(bytes) => {
                assert!((bytes.len() as u64).is_multiple_of(BLOCK_BYTES), "before-images are whole blocks");
                bytes.len() as u64 / BLOCK_BYTES
            }
        };
        BlockRange::new(self.first.0, self.first.0.saturating_add(count))
    }
}

/// An undo run that is being written.
pub struct ActiveRun {
    run: RunFile,
    writer: FrameWriter,
    reader: FrameReader,
    index: RunIndex,
    max_bytes: u64,
    flushed: bool,
    health: Health,
}

/// What the writes and flushes so far came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Sound,
    /// The last append met a full medium: what it wrote is behind `end`, in parts.
    Full,
    /// What reached the medium is not known, or the run was opened for reading.
    Failed,
}

impl std::fmt::Debug for ActiveRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveRun")
            .field("path", &self.run.path)
            .field("len_bytes", &self.len_bytes())
            .field("frames", &self.index.len())
            .finish_non_exhaustive()
    }
}

impl ActiveRun {
    /// Makes the file of a new run, which can take up to `max_bytes` (a hole at first, so a generous number costs
    /// nothing; see [`run_bytes_max`]). Header and name are durable when this returns.
    ///
    /// # Errors
    /// When there is a file of that name, or it cannot be made.
    pub fn create(
        files: &dyn Files,
        path: &Path,
        header: RunHeader,
        max_bytes: u64,
    ) -> Result<Self, UndoError> {
        let max_bytes = max_bytes.min(RUN_BYTES_MAX) / UNDO_ALIGN_BYTES * UNDO_ALIGN_BYTES;
        let needed = IndexPlaces { frames_end: FRAMES_START, frames: 0 }.file_bytes();
        if max_bytes < needed {
            return Err(UndoError::Full {
                path: path.into(),
                epoch: header.undo_epoch,
                needed,
                max: max_bytes,
            });
        }
        files.create(path, max_bytes)?;
        let made = Self::begin(files, path, header, max_bytes);
        if made.is_err() {
            let _ = files.remove(path); // ours and useless; the error that matters is the one that is answered
        }
        made
    }

    fn begin(files: &dyn Files, path: &Path, header: RunHeader, max_bytes: u64) -> Result<Self, UndoError> {
        let mut file = files.open(path, true)?;
        write_header(&mut *file, &header)?;
        file.flush()?;
        let run = RunFile { path: path.into(), header, file };
        Self::new(run, FRAMES_START, 0, RunIndex::new(), max_bytes)
    }

    /// Opens a run that was being written when its program ended. `certain_bytes` is the undo length that the log
    /// recorded as applied, zero when it recorded none. What is damaged is answered; it is final, and recorded in the
    /// run, so that it stays known.
    ///
    /// # Errors
    /// When the file is not that run, or cannot be read or cut.
    pub fn reopen(
        files: &dyn Files,
        path: &Path,
        expected: &RunIdentity,
        certain_bytes: u64,
        max_bytes: u64,
    ) -> Result<(Self, Vec<Hole>), UndoError> {
        let max_bytes = max_bytes.min(RUN_BYTES_MAX) / UNDO_ALIGN_BYTES * UNDO_ALIGN_BYTES;
        let certain = certain_bytes.max(FRAMES_START).next_multiple_of(UNDO_ALIGN_BYTES);
        if certain > max_bytes {
            let (epoch, max) = (expected.undo_epoch, max_bytes);
            return Err(UndoError::Full { path: path.into(), epoch, needed: certain, max });
        }
        let (mut run, mut holes) = RunFile::open(files, path, expected, false)?;
        let header_damaged = !holes.is_empty();
        let rebuilt = Rebuilt::scan(&mut run, certain)?;
        let header = run.header;
        drop(run);
        // Cut, so that nothing behind the end can ever be taken for a frame; and made long again.
        files.resize(path, rebuilt.end)?;
        files.resize(path, max_bytes.max(rebuilt.end))?;
        let mut file = files.open(path, true)?;
        if header_damaged {
            write_header(&mut *file, &header)?;
            file.flush()?;
        }
        let run = RunFile { path: path.into(), header, file };
        let mut active = Self::new(run, rebuilt.end, rebuilt.next_number, rebuilt.index, max_bytes)?;
        active.record_gaps(&rebuilt.gaps, &mut holes)?;
        holes.extend(rebuilt.holes);
        holes.sort_by_key(|hole| hole.file);
        Ok((active, holes))
    }

    /// Opens such a run to read it: nothing is cut, recorded or written. What is damaged is answered, and blocks that it
    /// may have lost are lost.
    ///
    /// # Errors
    /// When the file is not that run, or cannot be read.
    pub fn open_to_read(
        files: &dyn Files,
        path: &Path,
        expected: &RunIdentity,
        certain_bytes: u64,
    ) -> Result<(Self, Vec<Hole>), UndoError> {
        let certain = certain_bytes.max(FRAMES_START).next_multiple_of(UNDO_ALIGN_BYTES);
        let (mut run, mut holes) = RunFile::open(files, path, expected, false)?;
        let rebuilt = Rebuilt::scan(&mut run, certain)?;
        let mut index = rebuilt.index;
        for gap in rebuilt.gaps {
            let lost = index.missing(gap.blocks);
            for blocks in &lost {
                lose(&mut index, *blocks);
            }
            holes.push(Hole { file: gap.file, lost, reason: gap.reason });
        }
        holes.extend(rebuilt.holes);
        holes.sort_by_key(|hole| hole.file);
        let mut active = Self::new(run, rebuilt.end, rebuilt.next_number, index, 0)?;
        active.health = Health::Failed; // whatever wants to write is refused
        Ok((active, holes))
    }

    fn new(run: RunFile, end: u64, number: u64, index: RunIndex, max_bytes: u64) -> Result<Self, UndoError> {
        let writer = FrameWriter::new(run.header.salt, end, number)?;
        let reader = FrameReader::new()?;
        Ok(Self { run, writer, reader, index, max_bytes, flushed: false, health: Health::Sound })
    }

    /// Writes frames that say what the gaps lost; durable when this returns.
    fn record_gaps(&mut self, gaps: &[Gap], holes: &mut Vec<Hole>) -> Result<(), UndoError> {
        let mut wrote = false;
        for gap in gaps {
            let missing = self.index.missing(gap.blocks);
            self.check_room(
                0,
                missing.iter().map(|blocks| blocks.len().div_ceil(EMPTY_FRAME_BLOCKS_MAX)).sum(),
            )?;
            wrote |= !missing.is_empty();
            for blocks in missing {
                self.write(|writer, file, made| writer.push_empty(file, blocks, UndoCodec::Lost, made))?;
            }
            let lost = self.index.overlap(gap.blocks).filter(|entry| entry.codec == UndoCodec::Lost);
            let lost = lost.map(|entry| entry.blocks().intersect(gap.blocks)).collect();
            holes.push(Hole { file: gap.file, lost, reason: gap.reason.clone() });
        }
        if wrote { self.flush() } else { Ok(()) }
    }

    /// Appends before-images, ascending and of blocks that the run does not hold yet. Written when this returns, not
    /// durable before [`Self::flush`].
    ///
    /// # Errors
    /// [`UndoError::Full`] when they might not fit, before anything is written. Where the medium was full, the run goes on
    /// after [`Self::cut_back`]. After any other error it must be reopened: what reached the medium is not known.
    ///
    /// # Panics
    /// When a block is captured twice, images do not ascend, or a block is not on the disk.
    pub fn append(&mut self, images: &[Image<'_>]) -> Result<(), UndoError> {
        let (mut at, mut data_blocks, mut empty_frames) = (0, 0, 0);
        for image in images {
            let blocks = image.blocks();
            assert!(blocks.start >= at, "before-images ascend");
            assert!(blocks.end <= self.run.header.disk_blocks().end, "{blocks} are not on the disk");
            assert!(self.index.is_free(blocks), "{blocks} are captured twice in one undo epoch");
            at = blocks.end;
            match image.data {
                ImageData::Zeros(count) => empty_frames += count.div_ceil(EMPTY_FRAME_BLOCKS_MAX),
                ImageData::Bytes(_) => data_blocks += blocks.len(),
            }
        }
        self.check_room(data_blocks, empty_frames)?;
        self.write(|writer, file, made| {
            for image in images {
                match image.data {
                    ImageData::Zeros(_) => {
                        writer.finish_images(file, made)?;
                        writer.push_empty(file, image.blocks(), UndoCodec::Zeros, made)?;
                    }
                    ImageData::Bytes(bytes) => writer.push_bytes(file, image.first.0, bytes, made)?,
                }
            }
            writer.finish_images(file, made)
        })
    }

    /// Whether so much more, and then the index, fits the file.
    fn check_room(&self, data_blocks: u64, empty_frames: u64) -> Result<(), UndoError> {
        let frames_end = self.writer.end().saturating_add(frames_bytes_max(data_blocks, empty_frames));
        let frames = self.index.len().saturating_add(data_blocks).saturating_add(empty_frames);
        let end = frames_end.next_multiple_of(UNDO_ALIGN_BYTES).min(RUN_BYTES_MAX);
        let needed = IndexPlaces { frames_end: end, frames }.file_bytes();
        if needed <= self.max_bytes {
            return Ok(());
        }
        let (path, epoch, max) = (self.run.path.clone(), self.run.header.undo_epoch, self.max_bytes);
        Err(UndoError::Full { path, epoch, needed, max })
    }

    /// Lets `put` push frames, writes the last group of them and adds them to the index.
    fn write(
        &mut self,
        put: impl FnOnce(&mut FrameWriter, &mut dyn BlockFile, &mut Vec<IndexEntry>) -> Result<(), UndoError>,
    ) -> Result<(), UndoError> {
        self.check_alive()?;
        self.flushed = false;
        let mut made = Vec::new();
        let file = &mut *self.run.file;
        let (end, number) = (self.writer.end(), self.writer.number());
        let result = put(&mut self.writer, file, &mut made).and_then(|()| self.writer.finish_group(file));
        match &result {
            Ok(()) => made.iter().for_each(|entry| self.index.insert(entry)),
            Err(error) => {
                self.health = if error.may_be_waited_out() { Health::Full } else { Health::Failed };
                self.writer.go_back(end, number);
            }
        }
        result
    }

    fn check_alive(&self) -> Result<(), UndoError> {
        match self.health {
            Health::Sound => Ok(()),
            Health::Full | Health::Failed => Err(UndoError::Failed { path: self.run.path.clone() }),
        }
    }

    /// Whether the last append met a full medium, and nothing else is wrong: [`Self::cut_back`] comes next.
    #[must_use]
    pub fn met_full(&self) -> bool {
        self.health == Health::Full
    }

    /// After a full medium: what the append that met it wrote is cut off, and the run goes on behind what it held before.
    ///
    /// # Errors
    /// When the file cannot be cut; it must then be reopened.
    pub fn cut_back(self, files: &dyn Files) -> Result<Self, UndoError> {
        let Self { run: RunFile { path, header, file }, writer, index, max_bytes, .. } = self;
        let (end, number) = (writer.end(), writer.number());
        drop((file, writer));
        // Groups of the append that were whole must not be taken for frames of a later one.
        files.resize(&path, end)?;
        files.resize(&path, max_bytes.max(end))?;
        let file = files.open(&path, true)?;
        Self::new(RunFile { path, header, file }, end, number, index, max_bytes)
    }

    /// Makes everything appended durable: barrier 1 of the apply protocol.
    ///
    /// # Errors
    /// When it fails, once and for all: nothing is known of what was appended since the last flush.
    pub fn flush(&mut self) -> Result<(), UndoError> {
        self.check_alive()?;
        let result = self.run.file.flush();
        self.flushed = result.is_ok();
        if result.is_err() {
            self.health = Health::Failed;
        }
        Ok(result?)
    }

    /// Whether everything that was appended since the run was opened is durable.
    #[must_use]
    pub const fn is_flushed(&self) -> bool {
        self.flushed
    }

    /// Length of the run in bytes: what the log records as applied, after a flush.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.writer.end()
    }

    /// Whether every block of `range` was captured.
    #[must_use]
    pub fn contains(&self, range: BlockRange) -> bool {
        self.index.contains(range)
    }

    /// The parts of `range` that were not captured yet, ascending.
    #[must_use]
    pub fn missing(&self, range: BlockRange) -> Vec<BlockRange> {
        self.index.missing(range)
    }

    /// The captured parts of `range`, ascending.
    #[must_use]
    pub fn lookup(&self, range: BlockRange) -> Vec<Found> {
        self.index.overlap(range).map(|entry| Found::new(&entry, range)).collect()
    }

    /// Fills `out` with the images of the blocks from `first` on, all of which were captured.
    ///
    /// # Errors
    /// When one was not, or its image is damaged or lost.
    ///
    /// # Panics
    /// When `out` is not whole blocks.
    pub fn read_blocks(&mut self, first: BlockIndex, out: &mut [u8]) -> Result<(), UndoError> {
        let blocks = Image { first, data: ImageData::Bytes(out) }.blocks();
        self.reader.read_all(&mut self.run, self.index.overlap(blocks).map(Ok), blocks, out)
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

    /// Frames and blocks so far: frames, blocks, blocks with a payload, lost blocks.
    #[must_use]
    pub fn counts(&self) -> (u64, u64, u64, u64) {
        let (blocks, data, lost) = self.index.block_counts();
        (self.index.len(), blocks, data, lost)
    }

    /// Bytes of memory the index takes.
    #[must_use]
    pub fn index_memory_bytes(&self) -> usize {
        self.index.memory_bytes()
    }

    /// The zstd level from the next frame on; the default is a fast one, since this is on the way of every apply.
    ///
    /// # Errors
    /// When zstd refuses it.
    pub fn set_level(&mut self, level: i32) -> Result<(), UndoError> {
        self.writer.set_level(level)
    }

    /// Ends the run: index and trailer are written, everything is durable, the file is cut to its length.
    ///
    /// # Errors
    /// When writing fails; the file can then be reopened as a run that is not sealed.
    pub fn seal(self, files: &dyn Files, closed: Timestamp) -> Result<SealedRun, UndoError> {
        self.check_alive()?;
        let Self { run: RunFile { path, header, mut file }, writer, index, .. } = self;
        let frames_end = writer.end();
        let mut out = IndexWriter::new(&header, frames_end)?;
        for entry in index.from(0) {
            out.push(&mut *file, entry)?;
        }
        let trailer = out.finish(&mut *file, frames_end, closed)?;
        file.flush()?;
        drop((file, index));
        files.resize(&path, trailer.places().file_bytes())?;
        SealedRun::open(files, &path, &header.identity())
    }
}

/// Notes blocks as lost in an index.
fn lose(index: &mut RunIndex, blocks: BlockRange) {
    let mut at = blocks.start;
    while at < blocks.end {
        let count = (blocks.end - at).min(EMPTY_FRAME_BLOCKS_MAX);
        let codec = UndoCodec::Lost;
        index.insert(&IndexEntry {
            first_block: at,
            offset: 0,
            block_count: count as u32,
            frame_units: 0,
            codec,
        });
        at += count;
    }
}

pub(super) fn write_header(file: &mut dyn BlockFile, header: &RunHeader) -> Result<(), UndoError> {
    let block = header.to_block();
    file.write(&[WriteAt { offset: 0, data: &block }, WriteAt { offset: UNDO_ALIGN_BYTES, data: &block }])?;
    Ok(())
}

/// The longest a run can become in which so many blocks are saved in long pieces, as by a rollback: each a raw frame of its
/// own, and groups that are at least a quarter full.
#[must_use]
pub fn images_bytes_max(blocks: u64) -> u64 {
    let padding = blocks.div_ceil(64).saturating_mul(UNDO_ALIGN_BYTES);
    let end = FRAMES_START.saturating_add(frames_bytes_max(blocks, 0)).saturating_add(padding);
    let frames_end = end.min(RUN_BYTES_MAX).next_multiple_of(UNDO_ALIGN_BYTES);
    IndexPlaces { frames_end, frames: blocks }.file_bytes()
}

/// The longest an undo run of a disk can become: every block a raw frame of its own. A file of this length is a hole
/// where it is not written; where the file system does not allow it, a smaller one does.
#[must_use]
pub fn run_bytes_max(size_sectors: u64) -> u64 {
    let blocks = size_sectors.div_ceil(crate::units::BLOCK_SECTORS);
    // Every window of the applier ends its last group early; one group of padding a block is more than enough.
    let frames = frames_bytes_max(blocks, 0).saturating_add(blocks.saturating_mul(UNDO_ALIGN_BYTES));
    let end = FRAMES_START.saturating_add(frames).min(RUN_BYTES_MAX);
    IndexPlaces { frames_end: end.next_multiple_of(UNDO_ALIGN_BYTES), frames: blocks }
        .file_bytes()
        .min(RUN_BYTES_MAX)
}
