//! Rebuilds what is known of an undo run that was being written when its program ended, from its frames.
//!
//! Invariants: a frame before the certain length is kept whatever is wrong with it, because its blocks were captured;
//! behind it only whole groups count, up to the first one that is torn. Nothing is written here. Units: bytes, blocks.
//! Called by `ActiveRun::reopen`.

use super::error::{Hole, UndoError};
use super::file::RunFile;
use super::index::RunIndex;
use super::scan::{Extent, Scanner, Step, Wrong};
use crate::format::FormatError;
use crate::format::undo::BlockRange;
use crate::format::undo::index::IndexEntry;
use crate::io::ByteRange;

/// Something before the certain length that is no frame.
pub(super) struct Gap {
    pub(super) file: ByteRange,
    pub(super) blocks: BlockRange,
    pub(super) reason: FormatError,
}

/// What a scan of an active run found.
pub(super) struct Rebuilt {
    pub(super) index: RunIndex,
    pub(super) end: u64,
    pub(super) next_number: u64,
    pub(super) holes: Vec<Hole>,
    pub(super) gaps: Vec<Gap>,
}

impl Rebuilt {
    /// Walks the frames; `certain` is a multiple of 4096.
    pub(super) fn scan(run: &mut RunFile, certain: u64) -> Result<Self, UndoError> {
        let extent = Extent { end: run.file.size_bytes().max(certain), certain, until_index: false };
        let mut scanner = Scanner::new(extent)?;
        let mut found = Self {
            index: RunIndex::new(),
            end: certain,
            next_number: 0,
            holes: Vec::new(),
            gaps: Vec::new(),
        };
        let mut group: Vec<IndexEntry> = Vec::new(); // behind `certain`, until it is whole
        loop {
            let before = scanner.next_number();
            match scanner.step(run)? {
                Step::Frame { entry, wrong, .. } if entry.offset < certain => {
                    found.take_certain(entry, wrong)
                }
                Step::Frame { entry, wrong, group_left, end } => {
                    let ascends = group.last().is_none_or(|last| last.blocks().end <= entry.first_block);
                    if wrong.is_some() || !ascends || !found.index.is_free(entry.blocks()) {
                        found.next_number = before;
                        break;
                    }
                    group.push(entry);
                    if group_left == 0 {
                        group.drain(..).for_each(|entry| found.index.insert(&entry));
                        found.end = end;
                    }
                }
                Step::Gap { file, blocks, reason } => found.gaps.push(Gap { file, blocks, reason }),
                Step::End { .. } => {
                    found.next_number = before;
                    break;
                }
            }
        }
        found.next_number -= group.len() as u64; // their numbers are used again
        Ok(found)
    }

    /// A frame before the certain length: kept whatever is wrong with its payload, so that its blocks stay captured.
    fn take_certain(&mut self, entry: IndexEntry, wrong: Option<Wrong>) {
        let file = ByteRange { start: entry.offset, end: entry.offset + entry.frame_bytes() };
        if !self.index.is_free(entry.blocks()) {
            let (field, got) = ("first_block", entry.first_block);
            let reason = FormatError::Field { what: "Frame", field, got, expected: "blocks captured once" };
            self.holes.push(Hole { file, lost: Vec::new(), reason });
            return;
        }
        self.index.insert(&entry);
        if let Some(Wrong { lost, reason }) = wrong {
            self.holes.push(Hole { file, lost, reason });
        }
    }
}
