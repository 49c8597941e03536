//! Looks at every byte of a sealed run: what scrub and the offline verification do.
//!
//! Invariant: a flipped bit anywhere in the file is found, padding included; lost blocks are named as exactly as index
//! and frames together allow. Units: bytes and blocks. Called by scrub and the offline tools.

use super::error::{Hole, UndoError};
use super::file::read_header;
use super::scan::{Extent, Scanner, Step, Wrong};
use super::sealed::SealedRun;
use crate::format::undo::BlockRange;
use crate::io::ByteRange;

impl SealedRun {
    /// Reads the whole run, payloads decompressed, and answers all damage in it; empty for a sound run.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn verify(&mut self) -> Result<Vec<Hole>, UndoError> {
        let path = self.run.path.clone();
        let (_, mut holes) = read_header(&mut *self.run.file, &path)?;
        self.forget_pages();
        holes.extend(self.reread_trailer()?);
        let size = self.run.file.size_bytes();
        let extent = match self.trailer() {
            Some(trailer) => {
                Extent { end: trailer.frames_end, certain: trailer.frames_end, until_index: false }
            }
            None => Extent { end: size, certain: size, until_index: true },
        };
        let gaps = self.verify_frames(extent, &mut holes)?;
        self.verify_index(gaps, &mut holes)?;
        for found in self.damage() {
            if !holes.contains(found) {
                holes.push(found.clone());
            }
        }
        holes.sort_by_key(|hole| hole.file);
        Ok(holes)
    }

    /// Walks all frames; what is wrong with one goes to `holes`, where frames are missing is answered.
    fn verify_frames(&mut self, extent: Extent, holes: &mut Vec<Hole>) -> Result<Vec<Hole>, UndoError> {
        let mut scanner = Scanner::new(extent)?.deep();
        let mut gaps = Vec::new();
        loop {
            match scanner.step(&mut self.run)? {
                Step::Frame { entry, wrong: Some(Wrong { lost, reason }), end, .. } => {
                    holes.push(Hole { file: ByteRange { start: entry.offset, end }, lost, reason });
                }
                Step::Frame { .. } => {}
                Step::Gap { file, reason, .. } => gaps.push(Hole { file, lost: Vec::new(), reason }),
                Step::End { .. } => return Ok(gaps),
            }
        }
    }

    /// Reads all index pages (the damaged ones note themselves), and asks them which blocks were in the gaps.
    fn verify_index(&mut self, mut gaps: Vec<Hole>, holes: &mut Vec<Hole>) -> Result<(), UndoError> {
        let mut at = 0;
        loop {
            let entries = self.entries_from(at, u64::MAX)?;
            let Some(last) = entries.last() else { break };
            at = last.blocks().end;
            // Zeros need no frame: the index says it all.
            for entry in entries.iter().filter(|entry| entry.codec.has_payload()) {
                let gap = gaps.partition_point(|gap| gap.file.end <= entry.offset);
                if let Some(gap) = gaps.get_mut(gap).filter(|gap| gap.file.start <= entry.offset) {
                    push_blocks(&mut gap.lost, entry.blocks());
                }
            }
        }
        if self.trailer().is_some() {
            holes.append(&mut gaps); // without a trailer, opening the run has named them
        }
        Ok(())
    }
}

/// Adds ascending blocks to a list, joined to the last ones where they touch.
fn push_blocks(list: &mut Vec<BlockRange>, blocks: BlockRange) {
    match list.last_mut() {
        Some(last) if last.end == blocks.start => last.end = blocks.end,
        _ => list.push(blocks),
    }
}
