//! Where a disk's writes go: straight to its target, or through the retention journal.
//!
//! | | straight | through the journal |
//! |---|---|---|
//! | a batch | is written to the target | goes into the redo log as it was received, and waits |
//! | durable | target flushed, then the state file replaced | the log was committed, the state in it |
//! | applied | the same | the batches that wait were written, what they overwrite saved first |
//!
//! Invariants: whoever reads the target sees every write that returned; a target somebody else wrote to is not written
//! again; a failed write or flush is the caller's to stop the disk (I6). Bulk of a target that we created and that has
//! no point yet passes the journal by. Units: bytes, sectors, entry numbers. Used by `disk_writer`.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::error::{Answer as _, Severity};
use reprotect_engine::format::batch::Mark;
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::RecordKind;
use reprotect_engine::format::message::PointDegrade;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::durable::{Access, replace_file};
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::proto::target_disk::Piece;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{SECTOR_BYTES, SectorRange, Sequence};

use crate::guard::Guard;
use crate::journaled::Journaled;

/// Why something was not done.
pub(crate) enum NotDone {
    /// A medium is full: it may be tried again.
    Full(String),
    /// Something broke: the disk stops.
    Failed(String),
    /// What waited for the target was given up: the disk stops until it is taken again, which needs no restart.
    GivenUp(String),
}

/// Why a target did not grow.
pub(crate) enum NotGrown {
    /// It has its old size, and goes on with that.
    Refused(String),
    /// It cannot be used any more: the disk stops.
    Failed(String),
}

impl From<BlockError> for NotDone {
    fn from(error: BlockError) -> Self {
        // A failed flush may never be tried again, whatever the reason.
        match error.is_full() && error.op != BlockOp::Flush {
            true => Self::Full(error.to_string()),
            false => Self::Failed(error.to_string()),
        }
    }
}

impl From<JournalError> for NotDone {
    fn from(error: JournalError) -> Self {
        match error.severity() {
            _ if matches!(error, JournalError::GivenUp { .. }) => Self::GivenUp(error.to_string()),
            Severity::Retry => Self::Full(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Where a disk's writes go.
pub enum DiskStore {
    /// To the target.
    Direct(Box<Direct>),
    /// Through the journal.
    Journaled(Box<Journaled>),
}

impl DiskStore {
    /// Straight to the target, with the state in a file.
    #[must_use]
    pub fn direct(target: Target, guard: Guard, state_path: PathBuf) -> Self {
        Self::Direct(Box::new(Direct { target, guard, unguarded: false, state_path }))
    }

    /// A batch was accepted; its write follows.
    pub(crate) fn accepted(&mut self, kind: EntryKind, body: Bytes, newest: Sequence) {
        if let Self::Journaled(store) = self {
            store.accepted(kind, body, newest);
        }
    }

    /// A mark was accepted; it stands behind every write that was.
    pub(crate) fn marked(&mut self, mark: &Mark) {
        if let Self::Journaled(store) = self {
            store.marked(mark);
        }
    }

    /// Points in a part of the stream promise less than was said; answers whether that is news.
    pub(crate) fn degrade(&mut self, degrade: &PointDegrade) -> bool {
        match self {
            Self::Journaled(store) => store.degrade(degrade),
            Self::Direct(_) => false, // there are no points
        }
    }

    /// Takes the pieces of the next batch.
    pub(crate) fn write(&mut self, pieces: &[Piece]) -> Result<(), NotDone> {
        match self {
            Self::Direct(store) => store.write(pieces),
            Self::Journaled(store) => store.write(pieces),
        }
    }

    /// Makes a state durable, and everything written before it.
    pub(crate) fn checkpoint(&mut self, state: &DiskState) -> Result<(), NotDone> {
        match self {
            Self::Direct(store) => store.checkpoint(state),
            Self::Journaled(store) => store.checkpoint(state),
        }
    }

    /// Why nobody may write to the disk now.
    pub(crate) fn held(&self) -> Option<String> {
        match self {
            Self::Direct(_) => None,
            Self::Journaled(store) => store.held(),
        }
    }

    /// What can be done now that nobody waits: a window is applied. Answers the newest applied sequence where that is
    /// not the durable one.
    pub(crate) fn apply(&mut self) -> Result<Option<Sequence>, NotDone> {
        match self {
            Self::Direct(_) => Ok(None),
            Self::Journaled(store) => store.apply().map(Some),
        }
    }

    /// The target with every write to a range that returned.
    fn settled(&mut self, range: SectorRange) -> Result<&mut Target, NotDone> {
        match self {
            Self::Direct(store) => Ok(&mut store.target),
            Self::Journaled(store) => {
                store.settle(range)?;
                Ok(store.target())
            }
        }
    }

    /// Whether nothing of a range is there: it reads as zeros.
    pub(crate) fn is_hole(&mut self, range: ByteRange) -> Result<bool, NotDone> {
        Ok(self.settled(sectors(range))?.allocated(range)?.is_empty())
    }

    /// Reads the target as it is with every write that returned.
    pub(crate) fn read(&mut self, range: ByteRange, data: &mut [u8]) -> Result<(), NotDone> {
        Ok(self.settled(sectors(range))?.read(&mut [ReadAt { offset: range.start, data }])?)
    }

    /// Reads parts of a range, each to where it belongs in `data`, which holds all of the range. Holes read as zeros; what lies
    /// between the parts keeps what `data` held. One call for all: scattered parts one after another would cost a round trip to
    /// the medium each.
    pub(crate) fn read_parts(
        &mut self,
        range: SectorRange,
        parts: &[SectorRange],
        data: &mut [u8],
    ) -> Result<(), NotDone> {
        let target = self.settled(range)?;
        let mut reads = Vec::with_capacity(parts.len());
        let (mut rest, mut at) = (data, range.byte_start());
        for part in parts {
            let part = byte_range(*part);
            let (_, from) = rest.split_at_mut_checked((part.start - at) as usize).unwrap_or_default();
            let (piece, after) = from.split_at_mut_checked(part.len() as usize).unwrap_or_default();
            (rest, at) = (after, part.end);
            if target.allocated(part)?.is_empty() {
                piece.fill(0);
            } else {
                reads.push(ReadAt { offset: part.start, data: piece });
            }
        }
        Ok(target.read(&mut reads)?)
    }

    /// Makes the target larger. Nothing waits to be written, and nobody has the disk open.
    pub(crate) fn grow(&mut self, opener: &Arc<dyn Files>, size_bytes: u64) -> Result<(), NotGrown> {
        match self {
            Self::Direct(store) => store.grow(opener, size_bytes),
            Self::Journaled(store) => store.grow(opener, size_bytes),
        }
    }

    /// Leaves the target as any reader expects it.
    pub(crate) fn close(self) -> Result<(), String> {
        let target = match self {
            Self::Direct(store) => store.target,
            Self::Journaled(store) => store.into_target(),
        };
        target.close().map_err(|error| error.to_string())
    }
}

/// A target that is written at once.
pub struct Direct {
    target: Target,
    guard: Guard,
    /// Something of ours was written since the guard last looked.
    unguarded: bool,
    state_path: PathBuf,
}

impl Direct {
    fn write(&mut self, pieces: &[Piece]) -> Result<(), NotDone> {
        if !self.unguarded {
            self.guard.check().map_err(NotDone::Failed)?;
        }
        self.unguarded = true;
        Ok(write_pieces(&mut self.target, pieces)?)
    }

    fn grow(&mut self, opener: &Arc<dyn Files>, size_bytes: u64) -> Result<(), NotGrown> {
        if !self.unguarded {
            self.guard.check().map_err(NotGrown::Failed)?;
        }
        grow_target(&mut self.target, &mut self.guard, opener, size_bytes)
    }

    fn checkpoint(&mut self, state: &DiskState) -> Result<(), NotDone> {
        // A sparse target may want space for its tables before it flushes; that may be tried again, a flush may not.
        self.target.flush()?;
        if self.unguarded {
            self.guard.flushed();
            self.unguarded = false;
        }
        replace_file(&self.state_path, &state.to_bytes(), Access::Private).map_err(|error| {
            match error.severity() {
                Severity::Retry => NotDone::Full(error.to_string()),
                _ => NotDone::Failed(error.to_string()),
            }
        })
    }
}

/// Makes an open target larger, and watches its files from then on.
pub(crate) fn grow_target(
    target: &mut Target,
    guard: &mut Guard,
    opener: &Arc<dyn Files>,
    size_bytes: u64,
) -> Result<(), NotGrown> {
    let grown = target.grow(opener, size_bytes).map_err(|error| error.to_string());
    if target.is_closed() {
        return grown.map_err(NotGrown::Failed);
    }
    *guard = Guard::new(&**opener, &target.facts().path, target.facts().kind);
    grown.map_err(NotGrown::Refused)
}

/// Writes pieces to a target, in their order where they overlap.
pub(crate) fn write_pieces(target: &mut Target, pieces: &[Piece]) -> Result<(), BlockError> {
    let mut writes: Vec<WriteAt<'_>> = Vec::with_capacity(pieces.len());
    let mut gathered = RangeSet::new();
    for piece in pieces {
        for keep in &piece.keep {
            let zero = piece.record.kind() != RecordKind::Data;
            // Operations of one call have no order among themselves, so what overlaps goes into the next call.
            if !writes.is_empty() && (zero || gathered.overlap(*keep).next().is_some()) {
                target.write(&writes)?;
                writes.clear();
                gathered.clear();
            }
            if zero {
                target.zero(byte_range(*keep))?;
                continue;
            }
            let from = ((keep.start - piece.record.range().start) * SECTOR_BYTES) as usize;
            let data = piece.record.payload().get(from..from + keep.bytes() as usize).unwrap_or_default();
            writes.push(WriteAt { offset: keep.byte_start(), data });
            gathered.insert(*keep);
        }
    }
    if writes.is_empty() { Ok(()) } else { target.write(&writes) }
}

const fn sectors(range: ByteRange) -> SectorRange {
    SectorRange { start: range.start / SECTOR_BYTES, end: range.end.div_ceil(SECTOR_BYTES) }
}

pub(crate) const fn byte_range(range: SectorRange) -> ByteRange {
    ByteRange { start: range.byte_start(), end: range.byte_start() + range.bytes() }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::units::DiskId;

    use super::*;

    #[test]
    fn a_disk_whose_waiting_writes_were_given_up_is_not_told_to_wait_for_a_restart() {
        let disk = DiskId([7; 16]);
        let NotDone::GivenUp(text) = NotDone::from(JournalError::GivenUp { disk }) else {
            panic!("a disk that is opened again by itself counts as broken for good");
        };
        assert!(text.contains(&disk.to_string()) && text.contains("opened again by itself"), "{text}");
        assert!(!text.contains("restart"), "{text}");
    }
}
