//! A disk behind the journal that is handed over to its virtual machine, and taken back.
//!
//! Invariants: a disk is left with everything applied, its undo epoch closed and its newest state in the log, so that
//! whatever opens it next finds nothing to redo; after that nothing can be written to it, for there is no undo epoch
//! (I1). What is taken back has another history: points of the one before are degraded where somebody wrote meanwhile.
//! Units: entry numbers, bytes. Used by `failback`, on the disk's own thread.

use std::collections::BTreeSet;

use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::manifest::{EpochCause, PointKept};
use reprotect_engine::format::message::PointDegrade;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile as _, ByteRange, ReadAt};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{DiskShape, JournalError};
use reprotect_engine::units::{BLOCK_BYTES, LineageId, Sequence};

use super::Journaled;
use super::back::unfinished;

/// What was found in a part of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Looked {
    /// Blocks that are as they were written.
    pub(crate) same: u64,
    /// Blocks that could be read, and of which nothing is known.
    pub(crate) read: u64,
    /// Blocks that hold something else.
    pub(crate) different: Vec<BlockRange>,
}

/// A disk that was left to others.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// Its newest state.
    pub(crate) state: DiskState,
    /// Somebody else has written to the target.
    pub(crate) is_foreign: bool,
}

impl Journaled {
    /// Puts everything that is durable on the target.
    ///
    /// # Errors
    /// When that cannot be done; it may be tried again where the medium is full.
    pub(crate) fn drain(&mut self) -> Result<(), JournalError> {
        self.apply_all().map_err(|error| self.not_done(error))?;
        self.retention.commit()
    }

    /// Whether the drained target is the disk as it was at a point. Never where entries before that are lost.
    pub(crate) fn stands_at(&self, at: At) -> Result<bool, JournalError> {
        let newest = self.applier.applied().number;
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        // Of a rollback that did not get to its end the target may hold parts only.
        if unfinished(journal, self.id).is_some() {
            return Ok(false);
        }
        let Some(shape) = journal.shape().disks.get(&self.id) else { return Ok(false) };
        if shape.is_doubtful(at.number) {
            return Ok(false);
        }
        let back = |cause| cause == EpochCause::Rollback;
        let last = shape.epochs.iter().map(|epoch| epoch.opened).rev().find(|opened| back(opened.cause));
        let lineage = shape.epochs.last().map(|epoch| epoch.opened.lineage);
        Ok(match last.filter(|opened| opened.epoch > at.epoch) {
            // Somebody went back since: to here, and nothing came after it, nor was the disk handed over in between.
            Some(went) if Some(went.lineage) != lineage => false,
            Some(went) => {
                let to = At { epoch: went.to_epoch, number: went.to_number, records: went.to_records };
                to == at && went.after == newest
            }
            None => at.number == newest && at.records == 0,
        })
    }

    /// Compares a part of the target, whole blocks of it, with what was written there; reads where nothing is known.
    ///
    /// # Errors
    /// When target or map cannot be read.
    pub(crate) fn look_at(&mut self, range: ByteRange) -> Result<Looked, JournalError> {
        if let Some(checked) = self.map.check(self.applier.target(), range)? {
            return Ok(Looked { same: checked.same, read: checked.learnt, different: checked.different });
        }
        let mut data = vec![0; range.len() as usize];
        let target = self.applier.target();
        for part in target.allocated(range)? {
            let (from, to) = ((part.start - range.start) as usize, (part.end - range.start) as usize);
            let data = data.get_mut(from..to).unwrap_or_default();
            target.read(&mut [ReadAt { offset: part.start, data }])?;
        }
        Ok(Looked { read: range.len().div_ceil(BLOCK_BYTES), ..Looked::default() })
    }

    /// Ends the undo epoch and flushes: the target may be closed and handed over. Answers the state it is left in, and whether
    /// somebody else wrote to the target, which is refused unless it is `accepted`.
    ///
    /// # Errors
    /// When somebody else wrote, or something cannot be written; it may be tried again.
    pub(crate) fn leave(&mut self, accepted: bool) -> Result<Left, JournalError> {
        self.drain()?;
        self.record_degraded()?;
        let foreign = self.check_guard().err();
        let is_foreign = foreign.is_some();
        if let Some(error) = foreign.filter(|_| !accepted) {
            return Err(self.not_done(error));
        }
        let point = self.point_to_end_at()?;
        self.applier.target().flush()?;
        self.flushed();
        // A rollback that did not get to its end stays one, or it would be taken for a finished one: `take_back` ends it.
        let is_on_its_way = unfinished(self.retention.lock().get()?, self.id).is_some();
        if !is_on_its_way {
            self.close_epoch(point)?;
        }
        self.is_left = true;
        self.map.settle();
        self.retention.lock().get()?.append_state(&self.state, wall_clock())?;
        self.retention.commit()?;
        Ok(Left { state: self.state.clone(), is_foreign })
    }

    /// The newest entry, where it is a mark of the undo epoch that goes on.
    fn point_to_end_at(&self) -> Result<Option<PointKept>, JournalError> {
        let applied = self.applier.applied().number;
        let Some((number, mark)) = self.last_mark.filter(|(number, _)| *number == applied) else {
            return Ok(None);
        };
        let began = self.epoch_began(number)?;
        Ok(began.map(|(epoch, _)| self.point(At::entry(epoch.epoch, number), &mark)))
    }

    /// The disk was opened anew after somebody else had it: what it holds now is kept as a point, and where it was
    /// written meanwhile (`changed`), the points before promise less.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub(crate) fn take_back(&mut self, before: LineageId, changed: bool) -> Result<(), JournalError> {
        self.map.forget_all()?;
        if changed {
            // Of all histories that are kept: none has an image of what others overwrote.
            let kept = |shape: &DiskShape| shape.epochs.iter().map(|epoch| epoch.opened.lineage).collect();
            let mut kept: BTreeSet<LineageId> = self.shape_says(kept)?.unwrap_or_default();
            kept.insert(before);
            kept.remove(&self.state.lineage);
            for lineage in kept {
                self.degrade(&PointDegrade {
                    disk: self.id,
                    lineage,
                    generation: self.state.generation,
                    from: Sequence::ZERO,
                    to: Sequence::LAST,
                    cause: Text::new("the target was written by others after a failback"),
                });
                self.record_degraded()?;
            }
        }
        let number = self.applier.applied().number;
        let has_point = |shape: &DiskShape, epoch| {
            shape.points.values().any(|point| (point.epoch, point.number) == (epoch, number))
        };
        if let Some(mut epoch) = self.applier.open_epoch() {
            // It was not closed in order, and ends where a point is. Others changed what that shows: this is another one.
            let is_kept = self.shape_says(|shape| has_point(shape, epoch))?.unwrap_or(false);
            if is_kept && changed {
                self.close_epoch(None)?;
                epoch = self.begin_epoch(EpochCause::Time)?;
            }
            if changed || !is_kept {
                // Fuzzy, so that it is never taken for the newest consistent state of the source.
                let (at, name) = (At::entry(epoch, number), format!("before-undo-{epoch}"));
                self.keep_point(at, wall_clock(), MarkClass::Fuzzy, &name)?;
            }
            // Also where it went back for the failback, or a part of the way: it is compared now, and not held at that point.
            while self.held().is_some() {
                self.close_epoch(None)?;
                self.begin_epoch(EpochCause::Time)?;
            }
        }
        self.retention.lock().get()?.append_state(&self.state, wall_clock())?;
        self.retention.commit()
    }
}
