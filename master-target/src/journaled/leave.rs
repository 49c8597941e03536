//! A disk behind the journal that is handed over to its virtual machine, and taken back.
//!
//! Invariants: a disk is left with everything applied, its undo epoch closed and its newest state in the log, so that
//! whatever opens it next finds nothing to redo; after that nothing can be written to it, for there is no undo epoch
//! (I1). What is taken back has another history: points of the one before are degraded where somebody wrote meanwhile.
//! Units: entry numbers, bytes. Used by `failback`, on the disk's own thread.

use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::manifest::{EpochCause, PointKept};
use reprotect_engine::format::message::PointDegrade;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile as _, ByteRange, ReadAt};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{BLOCK_BYTES, LineageId, Sequence};

use super::Journaled;
use super::back::unfinished;
use crate::disk_store::NotDone;

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

impl Journaled {
    /// Puts everything that is durable on the target.
    ///
    /// # Errors
    /// When that cannot be done; it may be tried again where the medium is full.
    pub(crate) fn drain(&mut self) -> Result<(), JournalError> {
        match self.apply_all() {
            Ok(()) => self.retention.commit(),
            Err(NotDone::Full(why) | NotDone::Failed(why) | NotDone::GivenUp(why)) => {
                Err(JournalError::Failed { path: "the target".into(), why })
            }
        }
    }

    /// Whether the drained target is the disk as it was at a point.
    pub(crate) fn stands_at(&self, at: At) -> Result<bool, JournalError> {
        let newest = self.applier.applied().number;
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        // Of a rollback that did not get to its end the target may hold parts only.
        if unfinished(journal, self.id).is_some() {
            return Ok(false);
        }
        let Some(shape) = journal.shape().disks.get(&self.id) else { return Ok(false) };
        let back = |cause| cause == EpochCause::Rollback;
        let last = shape.epochs.iter().map(|epoch| epoch.opened).rev().find(|opened| back(opened.cause));
        Ok(match last.filter(|opened| opened.epoch > at.epoch) {
            // Somebody went back since: to here, and nothing came after it.
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

    /// Ends the undo epoch and flushes: the target may be closed and handed over. Answers the state it is left in.
    ///
    /// # Errors
    /// When something cannot be written; it may be tried again.
    pub(crate) fn leave(&mut self) -> Result<DiskState, JournalError> {
        self.drain()?;
        self.record_degraded()?;
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
        Ok(self.state.clone())
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
            self.degrade(&PointDegrade {
                disk: self.id,
                lineage: before,
                generation: self.state.generation,
                from: Sequence::ZERO,
                to: self.state.sequence,
                cause: Text::new("the target was written by others after a failback"),
            });
            self.record_degraded()?;
        }
        if let Some(epoch) = self.applier.open_epoch() {
            let at = At::entry(epoch, self.applier.applied().number);
            // Fuzzy, so that it is never taken for the newest consistent state of the source.
            self.keep_point(at, wall_clock(), MarkClass::Fuzzy, &format!("before-undo-{epoch}"))?;
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
