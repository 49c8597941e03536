//! A disk behind the journal that goes back to a point, in place, and is held afterwards.
//!
//! Invariants: what waits is applied before, or it would be applied over the point; what the target held stays a point;
//! nobody writes to a disk that went back until it went forward again. Units: entry numbers. Used by `points` and
//! `failback`, on the disk's own thread.

use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::rollback::{RolledBack, rollback};
use reprotect_engine::store::journal::view::At;

use super::Journaled;
use crate::disk_store::NotDone;

impl Journaled {
    /// Takes the target back to a point; what it held stays a point.
    ///
    /// # Errors
    /// When the point is not kept, or something cannot be written.
    pub fn rollback(&mut self, at: At) -> Result<RolledBack, JournalError> {
        // What waits comes first, or it would be applied over the point.
        if let Err(NotDone::Full(why) | NotDone::Failed(why)) = self.apply_all() {
            return Err(JournalError::Failed { path: "the target".into(), why });
        }
        self.retention.commit()?;
        self.last_mark = None;
        let position = self.position();
        let before = self.applier.open_epoch().unwrap_or(0);
        self.map.forget_all()?;
        let mut locked = self.retention.lock();
        let done = rollback(locked.get()?, &mut self.applier, at, position, wall_clock())?;
        drop(locked);
        self.flushed();
        let number = self.applier.applied().number;
        let name = format!("before-rollback-{before}");
        self.keep_point(At::entry(before, number), wall_clock(), MarkClass::Fuzzy, &name)?;
        self.begin_epoch(EpochCause::Time)?;
        Ok(done)
    }

    /// Why nobody may write: the target was taken back, and the newest state is a point.
    pub(crate) fn held(&self) -> Option<String> {
        let mut locked = self.retention.lock();
        let shape = locked.get().ok()?.shape().disks.get(&self.id)?;
        let last = shape.epochs.iter().rev().find(|epoch| epoch.closed.is_some())?.opened;
        if last.cause != EpochCause::Rollback || last.after != self.newest.0 {
            return None;
        }
        // Back at the end of an epoch of writes, at the newest entry: that is forward again.
        let to = shape.epochs.iter().find(|epoch| epoch.opened.epoch == last.to_epoch);
        if last.to_number == last.after && to.is_some_and(|to| to.opened.cause != EpochCause::Rollback) {
            return None;
        }
        Some(format!(
            "the disk was rolled back to point {}.{} and is held; roll it forward (`points` shows the newest state as before-rollback-N), or stop replicating it with `unprotect`",
            last.to_epoch, last.to_number
        ))
    }
}
