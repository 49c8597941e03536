//! A disk behind the journal that lets go of its part of the redo log, for others need the room.
//!
//! What waits for its mark is applied: the target then stands inside a stretch, and the last mark is a point that its
//! before-images lead to. The undo epoch ends, for its points are made from the log.
//!
//! Where the retention drive is too full for that, it is hindered: what it has in the log is not given up for it before that
//! of a disk that takes nothing.
//!
//! Invariants: where the target stands at a mark, that mark is kept as a point before anything is applied over it.
//! Units: entry numbers. Used by `journaled`, on the disk's own thread.

use reprotect_engine::format::batch::Mark;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::view::At;

use super::Journaled;
use super::back::unfinished;
use crate::disk_store::NotDone;
use crate::redo::if_readable;

impl Journaled {
    /// Keeps nothing of the log from being given back, where that was asked for.
    pub(super) fn let_go_if_asked(&mut self) -> Result<(), NotDone> {
        // What a rollback goes to that stopped on its way cannot be let go of; it is carried.
        if !self.retention.is_asked(self.id) || unfinished(self.retention.lock().get()?, self.id).is_some() {
            return Ok(());
        }
        self.apply_ready()?;
        self.end_epoch_here()?;
        self.backlog.release();
        self.apply_ready()?;
        self.end_epoch_here()?;
        self.retention.let_go(self.id);
        tracing::info!(disk = %self.id, "what waited for its mark was applied: others need its part of the redo log");
        Ok(())
    }

    /// Where room on the retention drive is all that was missing, this disk does not stand.
    pub(super) fn hindered<T>(&self, done: Result<T, JournalError>) -> Result<T, JournalError> {
        done.inspect_err(|error| {
            if error.is_full() {
                self.retention.hinder(self.id);
            }
        })
    }

    /// Ends the undo epoch at what is applied, if there is anything in it: with a point, where that is a mark.
    fn end_epoch_here(&mut self) -> Result<(), JournalError> {
        let number = self.applier.applied().number;
        let Some((epoch, _)) = self.epoch_began(number)? else { return Ok(()) };
        self.retention.commit()?; // what was applied is durably said to be
        let point = self.mark_at(number)?.map(|mark| self.point(At::entry(epoch.epoch, number), &mark));
        self.turn_epoch(point)
    }

    fn mark_at(&self, number: u64) -> Result<Option<Mark>, JournalError> {
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        let entry = journal.entries(self.id).iter().rfind(|entry| entry.number <= number).copied();
        let mark = entry.filter(|entry| entry.number == number && entry.kind == EntryKind::Mark);
        let Some(entry) = mark else { return Ok(None) };
        let mark = journal.mark(self.id, &entry);
        if_readable(journal, self.id, mark)
    }
}
