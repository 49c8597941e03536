//! A disk behind the journal that goes back to a point, in place, and is held afterwards.
//!
//! Invariants: what waits is applied before, or it would be applied over the point; nothing is begun that may not fit; what the target held is a point before
//! anything of it is changed; nobody writes to a disk that went back until it went forward again, nor to one that did not
//! get there; other disks use the journal meanwhile. Units: entry numbers. Used by `points` and `failback`, on the disk's
//! own thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::io::BlockFile as _;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::rollback::{self, Begun, RolledBack};
use reprotect_engine::store::journal::undo::{BlockRange, images_bytes_max};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{DiskShape, Journal, JournalError};
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{BLOCK_SECTORS, DiskId};

use super::Journaled;
use crate::disk_status::GoingBack;
use crate::disk_store::NotDone;
use crate::retention::Retention;

impl Journaled {
    /// Takes the target back to a point; what it held stays a point.
    ///
    /// # Errors
    /// When the point is not kept, or there is no room for what it would overwrite (nothing has changed then); when
    /// something cannot be written.
    pub fn rollback(&mut self, at: At) -> Result<RolledBack, JournalError> {
        let _hold = self.retention.hold_to_go_back(self.id, at);
        let _shown = self.show_going_back(at);
        // What waits comes first, or it would be applied over the point.
        self.apply_all().map_err(|error| self.not_done(error))?;
        self.retention.commit()?;
        if !self.coming.is_empty() {
            // It would be applied over the point when there is room again.
            let what = "what its agent sent waits for room in the redo log, and the disk cannot go back before that is written";
            return Err(JournalError::Full {
                path: self.retention.folder().to_owned(),
                what: what.to_owned(),
            });
        }
        let (position, now, id) = (self.position(), wall_clock(), self.id);
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        let plan = View::plan(journal, id, at)?;
        let begun = unfinished(journal, id).is_some();
        drop(locked);
        // What cannot be read is refused before anything is changed.
        let view = self.noted(plan.open(), (0, 0))?;
        if is_interrupted(&self.retention, &self.stopping) {
            return Err(JournalError::Stops { disk: id });
        }
        // Nobody else may have written there: it would be taken for ours from here on.
        self.check_guard().map_err(|error| self.not_done(error))?;
        let (blocks, needed) = self.images_to_go_back(&view)?;
        if let Some(free) = self.retention.usable_bytes()?.filter(|free| needed > *free) {
            let path = self.retention.folder().to_owned();
            return Err(JournalError::NoRoom { disk: id, path, blocks, needed, free });
        }
        self.last_mark = None;
        self.map.forget_all()?;
        // What one that did not get to its end left is no state anybody wants; the one before it is a point already.
        if let Some(before) = self.applier.open_epoch().filter(|_| !begun) {
            let number = self.applier.applied().number;
            let name = format!("before-rollback-{before}");
            self.keep_point(At::entry(before, number), now, MarkClass::Fuzzy, &name)?;
        }
        self.applier.seal_run(now)?; // others commit meanwhile
        self.got_back = false;
        rollback::begin(self.retention.lock().get()?, &mut self.applier, at, position, now)?;
        self.go_back(view)
    }

    /// What a write said that cannot be done, as an error of a command.
    pub(super) fn not_done(&self, error: NotDone) -> JournalError {
        match error {
            NotDone::Full(what) => JournalError::Full { path: self.retention.folder().to_owned(), what },
            NotDone::Failed(why) | NotDone::GivenUp(why) => {
                JournalError::Failed { path: "the target".into(), why }
            }
        }
    }

    /// Says that the disk goes back until the answer is dropped.
    fn show_going_back(&self, at: At) -> Option<GoingBack> {
        let text =
            format!("the disk goes back to point {}.{}, and is held until it is there", at.epoch, at.number);
        self.status.as_ref().map(|status| GoingBack::of(status, text))
    }

    /// Takes back what differs, and begins the undo epoch after it, unless the medium is full: then that is begun before
    /// anything more is written.
    fn go_back(&mut self, view: View) -> Result<RolledBack, JournalError> {
        let (retention, stopping) = (Arc::clone(&self.retention), Arc::clone(&self.stopping));
        (self.unguarded, self.got_back) = (true, false);
        let went = take_back(&retention, &mut self.applier, view, &|| is_interrupted(&retention, &stopping));
        self.stopped_on_its_way = went.as_ref().is_err_and(JournalError::is_full);
        // Between two steps all is flushed; where there is no room it may wait for hours, and nobody else's write is ours.
        let is_between = matches!(went, Ok(_) | Err(JournalError::Interrupted { .. }));
        if is_between || (self.stopped_on_its_way && self.applier.target().flush().is_ok()) {
            self.flushed();
        }
        let done = self.noted(went, (0, 0))?;
        self.got_back = true;
        if let Some(status) = &self.status {
            status.note_went_back();
        }
        match self.begin_next_epoch() {
            Err(error) if !error.is_full() => Err(error),
            _ => Ok(done),
        }
    }

    /// Where a disk goes to whose last rollback was ended, not known to have got there.
    pub(super) fn goes_back_again(&self) -> Result<Option<At>, JournalError> {
        if self.got_back {
            return Ok(None);
        }
        Ok(may_have_stopped(self.retention.lock().get()?, self.id))
    }

    /// Whether a rollback stopped for want of room since this was asked last: it is to be gone on with when there is some.
    pub(crate) const fn take_stopped_on_its_way(&mut self) -> bool {
        std::mem::replace(&mut self.stopped_on_its_way, false)
    }

    /// Goes on with a rollback that was begun and stopped; does nothing where there is none.
    ///
    /// # Errors
    /// When the point is not kept any more, something is damaged or cannot be written, or it was interrupted again: the disk
    /// stays held, and can be taken back to another point.
    pub(crate) fn go_on_back(&mut self) -> Result<RolledBack, JournalError> {
        let goes_to = rollback::goes_to(self.retention.lock().get()?, self.id)?;
        let Some(at) = goes_to else { return Ok(RolledBack::default()) };
        let _hold = self.retention.hold_to_go_back(self.id, at);
        let _shown = self.show_going_back(at);
        let view = self.retention.view(self.id, at)?;
        self.map.forget_all()?;
        self.check_guard().map_err(|error| self.not_done(error))?;
        self.go_back(view)
    }

    /// The most that going back to a point may take of the retention drive; nothing where the target stands there. What waits is
    /// applied for that, and the point is opened; nothing else is changed. Bytes.
    ///
    /// # Errors
    /// When the point is not kept, or what it needs is damaged; when something cannot be written.
    pub(crate) fn needed_to_go_back(&mut self, at: At) -> Result<u64, JournalError> {
        self.drain()?;
        if self.stands_at(at)? {
            return Ok(0);
        }
        let plan = View::plan(self.retention.lock().get()?, self.id, at)?;
        let view = self.noted(plan.open(), (0, 0))?;
        Ok(self.images_to_go_back(&view)?.1)
    }

    /// What a rollback overwrites is kept, and it must not end on its way for want of room: the worst case, as blocks and as
    /// bytes of an undo run.
    fn images_to_go_back(&mut self, view: &View) -> Result<(u64, u64), JournalError> {
        let opened = view.open_runs(self.retention.lock().get()?, &mut self.applier);
        let runs = self.noted(opened, (0, 0))?;
        let whole = BlockRange::new(0, self.applier.size_sectors().div_ceil(BLOCK_SECTORS));
        let differing = view.differing(&runs, &mut self.applier, whole)?;
        let blocks = differing.iter().map(|range| range.end - range.start).sum();
        Ok((blocks, images_bytes_max(blocks)))
    }

    /// Why nobody may write: the target was taken back, and the newest state is a point.
    pub(crate) fn held(&self) -> Option<String> {
        let mut locked = self.retention.lock();
        let journal = locked.get().ok()?;
        if let Some(why) = unfinished(journal, self.id) {
            return Some(why);
        }
        let shape = journal.shape().disks.get(&self.id)?;
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

/// Whether a rollback is to end on its way: the daemon stops, or the disk is closed.
fn is_interrupted(retention: &Retention, stopping: &AtomicBool) -> bool {
    retention.is_interrupted() || stopping.load(Ordering::Acquire)
}

/// Where the last undo epoch went back to, when it ended and none was begun since. Then nobody knows whether the disk got there:
/// a rollback that had stopped on its way is ended to begin another, and the program may end in between.
pub(super) fn may_have_stopped(journal: &Journal, disk: DiskId) -> Option<At> {
    let last = journal.shape().disks.get(&disk)?.epochs.last().filter(|epoch| epoch.closed.is_some())?.opened;
    let at = At { epoch: last.to_epoch, number: last.to_number, records: last.to_records };
    // One that is not kept any more had been reached: it is kept until then.
    (last.cause == EpochCause::Rollback && View::check(journal, disk, at).is_ok()).then_some(at)
}

/// Takes everything back and ends the rollback; the journal is locked for each commit only.
fn take_back(
    retention: &Retention,
    applier: &mut Applier<Target>,
    view: View,
    is_interrupted: &dyn Fn() -> bool,
) -> Result<RolledBack, JournalError> {
    let id = applier.disk();
    let mut name = |named| {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        journal.append_applied(id, named, wall_clock())?;
        journal.commit(wall_clock())
    };
    let begun = Begun::of(retention.lock().get()?, applier, Some(view))?;
    let done = match begun {
        Some(begun) => begun.find(applier)?.take_back(applier, &mut name, is_interrupted)?,
        None => RolledBack::default(),
    };
    rollback::end(applier, &mut name, wall_clock())?;
    applier.close_epoch(retention.lock().get()?, wall_clock())?;
    Ok(done)
}

/// Why nobody may write to a disk whose rollback goes on or stopped on its way: the target may hold parts of two states.
pub(crate) fn unfinished(journal: &Journal, disk: DiskId) -> Option<String> {
    let open = journal.shape().disks.get(&disk).and_then(DiskShape::open_epoch)?.opened;
    (open.cause == EpochCause::Rollback).then(|| {
        format!(
            "a rollback to point {}.{} did not get to its end yet, and the disk is held; if it stopped, the log says why: where a drive is full free space there, and it is gone on with; else restart the master target, or roll back to another point",
            open.to_epoch, open.to_number
        )
    })
}
