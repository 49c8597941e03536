//! Thinning: two adjacent undo runs become one that serves every point the older one served.
//!
//! Invariants: the result holds every block of either, and **the older image wins**, a lost one too (for points before
//! the older run the newer image would be a guess); a frame that is taken whole is copied as it is stored, after its
//! checksum was checked; a damaged image becomes a lost one and is named in [`SealedRun::damage`] of its run. The
//! inputs are not changed; the result is complete and durable when it is answered, and no file is left otherwise.
//! Memory is bounded whatever the size of the runs. Units: bytes and blocks. Called by retention.

use std::collections::VecDeque;
use std::path::Path;

use super::error::{Hole, UndoError};
use super::run::write_header;
use super::seal::IndexWriter;
use super::sealed::SealedRun;
use super::write::{FrameWriter, frames_bytes_max};
use crate::format::undo::frame::UndoCodec;
use crate::format::undo::index::{IndexEntry, IndexPlaces};
use crate::format::undo::{
    BlockRange, FRAMES_START, RUN_BYTES_MAX, RunHeader, RunIdentity, UNDO_ALIGN_BYTES,
};
use crate::io::{BlockFile, ByteRange};
use crate::mutants::{Mutant, mutant};
use crate::store::files::Files;
use crate::units::BLOCK_BYTES;

/// The header of the merge of two runs; `salt` is random, and never used for another file.
#[must_use]
pub fn merged_header(older: &RunHeader, newer: &RunHeader, salt: u64) -> RunHeader {
    let identity = RunIdentity { undo_epoch_last: newer.undo_epoch_last, ..older.identity() };
    RunHeader::new(identity, salt, older.size_sectors.max(newer.size_sectors), older.created)
}

/// Merges two adjacent runs of one disk into a new file.
///
/// # Errors
/// [`UndoError::NotAdjacent`] when the runs or the header do not fit; when reading or writing fails. Damaged images are
/// no error.
pub fn merge(
    older: &mut SealedRun,
    newer: &mut SealedRun,
    files: &dyn Files,
    path: &Path,
    header: RunHeader,
) -> Result<SealedRun, UndoError> {
    check_fit(older, newer, &header)?;
    // Everything raw and alone, every newer frame cut by every older one: a hole costs nothing.
    let (older_frames, older_data) = older.totals();
    let (newer_frames, newer_data) = newer.totals();
    let (data, pieces) = (older_data + newer_data, 2 * (older_frames + newer_frames));
    let base =
        (FRAMES_START + frames_bytes_max(data, pieces)).next_multiple_of(UNDO_ALIGN_BYTES).min(RUN_BYTES_MAX);
    files.create(path, IndexPlaces { frames_end: base, frames: data + pieces }.file_bytes())?;
    let closed = newer.trailer().map_or(newer.header().created, |trailer| trailer.closed);
    let written = files.open(path, true).map_err(UndoError::from).and_then(|mut file| {
        write_header(&mut *file, &header)?;
        let mut output = Output {
            writer: FrameWriter::new(header.salt, FRAMES_START, 0)?,
            index: IndexWriter::new(&header, base)?,
            made: Vec::new(),
            file,
        };
        if mutant(Mutant::MergeNewestWins) {
            output.fill(newer, older)?;
        } else {
            output.fill(older, newer)?;
        }
        let Output { index, writer, mut file, .. } = output;
        let trailer = index.finish(&mut *file, writer.end(), closed)?;
        file.flush()?;
        Ok(trailer.places().file_bytes())
    });
    let opened = written.and_then(|file_bytes| {
        files.resize(path, file_bytes)?;
        SealedRun::open(files, path, &header.identity())
    });
    if opened.is_err() {
        let _ = files.remove(path); // ours and useless; the error that matters is the one that is answered
    }
    opened
}

fn check_fit(older: &SealedRun, newer: &SealedRun, header: &RunHeader) -> Result<(), UndoError> {
    let (a, b) = (older.header(), newer.header());
    let expected = merged_header(a, b, header.salt);
    let wrong = [
        (a.journal != b.journal, "journal"),
        (a.disk != b.disk, "disk"),
        (a.lineage != b.lineage, "lineage"),
        (a.undo_epoch_last >= b.undo_epoch, "order of undo epochs"),
        (
            header.identity() != expected.identity() || header.size_sectors != expected.size_sectors,
            "new header",
        ),
        (header.salt == a.salt || header.salt == b.salt, "new salt"),
    ];
    match wrong.into_iter().find(|(wrong, _)| *wrong) {
        None => Ok(()),
        Some((_, field)) => {
            Err(UndoError::NotAdjacent { older: older.path().into(), newer: newer.path().into(), field })
        }
    }
}

/// Walks the entries of a run, ascending, a page at a time.
struct Cursor<'a> {
    run: &'a mut SealedRun,
    queue: VecDeque<IndexEntry>,
    at: u64,
    done: bool,
}

impl<'a> Cursor<'a> {
    const fn new(run: &'a mut SealedRun) -> Self {
        Self { run, queue: VecDeque::new(), at: 0, done: false }
    }

    fn peek(&mut self) -> Result<Option<IndexEntry>, UndoError> {
        if self.queue.is_empty() && !self.done {
            self.queue.extend(self.run.entries_from(self.at, u64::MAX)?);
            self.at = self.queue.back().map_or(self.at, |last| last.blocks().end);
            self.done = self.queue.is_empty();
        }
        Ok(self.queue.front().copied())
    }

    fn pop(&mut self) {
        self.queue.pop_front();
    }
}

/// The run that is being made.
struct Output {
    file: Box<dyn BlockFile>,
    writer: FrameWriter,
    index: IndexWriter,
    /// Frames that were put and are not in the index yet.
    made: Vec<IndexEntry>,
}

impl Output {
    fn fill(&mut self, older: &mut SealedRun, newer: &mut SealedRun) -> Result<(), UndoError> {
        let (mut older, mut newer) = (Cursor::new(older), Cursor::new(newer));
        let mut from = 0; // newer images before this block are done with
        loop {
            let old = older.peek()?;
            let Some(new) = newer.peek()? else {
                let Some(old) = old else { break };
                self.take(older.run, &old, old.blocks())?;
                older.pop();
                continue;
            };
            let free_start = new.first_block.max(from);
            let free_end = old.map_or(u64::MAX, |old| old.first_block).min(new.blocks().end);
            match old {
                _ if free_start >= new.blocks().end => newer.pop(),
                Some(old) if old.first_block <= free_start => {
                    self.take(older.run, &old, old.blocks())?;
                    from = old.blocks().end;
                    older.pop();
                }
                _ => {
                    self.take(newer.run, &new, BlockRange::new(free_start, free_end))?;
                    from = free_end;
                }
            }
        }
        self.writer.finish_images(&mut *self.file, &mut self.made)?;
        self.writer.finish_group(&mut *self.file)?;
        self.settle()
    }

    /// Hands what was put to the index.
    fn settle(&mut self) -> Result<(), UndoError> {
        for entry in self.made.drain(..) {
            self.index.push(&mut *self.file, entry)?;
        }
        Ok(())
    }

    /// Takes the images of `part` of an entry.
    fn take(&mut self, run: &mut SealedRun, entry: &IndexEntry, part: BlockRange) -> Result<(), UndoError> {
        if !entry.codec.has_payload() {
            self.writer.finish_images(&mut *self.file, &mut self.made)?;
            self.writer.push_empty(&mut *self.file, part, entry.codec, &mut self.made)?;
        } else if part != entry.blocks() || !self.copy(run, entry)? {
            self.cut(run, entry, part)?;
        }
        self.settle()
    }

    /// Copies a whole frame as it is stored; `false` when it is damaged.
    fn copy(&mut self, run: &mut SealedRun, entry: &IndexEntry) -> Result<bool, UndoError> {
        self.writer.finish_images(&mut *self.file, &mut self.made)?;
        match run.reader.fetch(&mut run.run, entry) {
            Ok(frame) if frame.check_stored().is_ok() => {
                self.writer.push_frame(&mut *self.file, &frame, &mut self.made)?;
                Ok(true)
            }
            Ok(_) | Err(UndoError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a part of a frame block by block; what is damaged is lost from now on.
    fn cut(&mut self, run: &mut SealedRun, entry: &IndexEntry, part: BlockRange) -> Result<(), UndoError> {
        let mut image = [0; BLOCK_BYTES as usize];
        for block in part.start..part.end {
            let one = BlockRange::new(block, block + 1);
            match run.reader.read(&mut run.run, entry, one, &mut image) {
                Ok(()) => self.writer.push_bytes(&mut *self.file, block, &image, &mut self.made)?,
                Err(UndoError::Damaged { source, .. }) => {
                    let end = entry.offset + entry.frame_bytes();
                    let file = ByteRange { start: entry.offset, end };
                    run.note(Hole { file, lost: vec![one], reason: source });
                    self.writer.finish_images(&mut *self.file, &mut self.made)?;
                    self.writer.push_empty(&mut *self.file, one, UndoCodec::Lost, &mut self.made)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
