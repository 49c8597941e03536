//! A disk behind the retention journal: what waits to be applied, its undo epochs and its points.
//!
//! Invariants: entries get their numbers in the order the core accepted their batches and marks; a window is applied
//! only when all its entries are durable, and lies in one undo epoch (I4); an undo epoch ends at a mark, once that mark
//! is applied and APPLIED is durable. The marks at which undo epochs end are told by the source's clock, so that all
//! disks of a machine end theirs at the same marks; a named, commanded or application-consistent mark ends one, too.
//! The first undo epoch of a target that we created begins at the first mark after its initial sync, of an existing
//! one before anything is written. `backlog` bounds the memory.
//! Units: entry numbers, sequences. Used by the disk's second thread only.

pub(crate) mod back;
mod degrading;
#[cfg(test)]
pub(crate) mod full;
mod grow;
mod leave;
mod let_go;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use reprotect_engine::format::batch::{Mark, MarkCause, MarkClass};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::RecordKind;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, EpochOpened, LossMended, PointKept};
use reprotect_engine::format::message::{PassMode, PointDegrade};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::BlockFile as _;
use reprotect_engine::limits::MARKS_PENDING_MAX;
use reprotect_engine::net::{mono_clock, wall_clock};
use reprotect_engine::proto::target_disk::Piece;
use reprotect_engine::store::crc_map::Checked;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::{Content, Write, bulk_prefix};
use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::store::journal::points::own_id;
use reprotect_engine::store::journal::rot::{Found, reach};
use reprotect_engine::store::journal::undo::Hole;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{DiskLog, DiskShape, Journal, JournalError};
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};

use self::back::{may_have_stopped, unfinished};
use crate::backlog::Backlog;
use crate::disk_status::DiskStatus;
use crate::disk_store::{NotDone, write_pieces};
use crate::guard::Guard;
use crate::lost::take_up;
use crate::redo::{applied_sequence, found, keep_last_point, kept_point, newest_marks, window_from_log};
use crate::retention::Retention;
use crate::rot::note_error;
use crate::target_map::TargetMap;

/// A DIFF stretch is not held back any longer once this many segments of the log are its own.
const HELD_SEGMENTS: u64 = 2;

/// What the core accepted and the log does not hold yet.
enum Coming {
    /// Its kind, its body, and the newest sequence with it.
    Batch(EntryKind, Bytes, Sequence),
    Mark(Mark),
}

/// A disk behind the journal.
pub struct Journaled {
    id: DiskId,
    retention: Arc<Retention>,
    applier: Applier<Target>,
    guard: Guard,
    coming: VecDeque<Coming>,
    /// What waits to be applied.
    backlog: Backlog,
    /// Number and sequence of the newest entry.
    newest: (u64, Sequence),
    /// The newest sequence whose state is durable.
    durable: Sequence,
    /// The newest sequence on the target.
    applied: Sequence,
    /// Marks that are not applied, by their entry's number.
    marks: VecDeque<(u64, Mark)>,
    /// The marks behind the newest batch: one of them that comes again after a reconnect is not a second one.
    newest_marks: Vec<Mark>,
    /// Parts of the stream whose points promise less, not recorded yet.
    degrading: VecDeque<PointDegrade>,
    /// The newest entry, if it is a mark and applied: an undo epoch can end there.
    last_mark: Option<(u64, Mark)>,
    /// Bulk passed the journal by and is not flushed.
    bulk_unflushed: bool,
    /// Something of ours was written since the guard last looked.
    unguarded: bool,
    /// The disk is to be closed: a rollback ends on its way.
    stopping: Arc<AtomicBool>,
    /// Where others see that one goes on.
    status: Option<Arc<DiskStatus>>,
    /// One stopped for want of room, and nobody was told yet who goes on with it.
    stopped_on_its_way: bool,
    /// The last one got there.
    got_back: bool,
    /// The newest entry is a mark at which the undo epoch ends, and has not yet.
    at_border: bool,
    /// It was handed over: no undo epoch goes on, and none is begun.
    is_left: bool,
    /// What the core last said.
    state: DiskState,
    /// CRCs of what is on the target.
    map: TargetMap,
}

impl Journaled {
    /// A disk whose entries of the log have all been applied. Where some of them are lost, its [`Self::state`] says that
    /// it has to be compared.
    ///
    /// # Errors
    /// When the disk cannot be added to the journal, its undo run cannot be used, or what the log holds cannot be
    /// applied.
    pub fn open(
        retention: &Arc<Retention>,
        mut target: Target,
        guard: Guard,
        mut state: DiskState,
        machine: [u8; 16],
        log: Option<&DiskLog>,
    ) -> Result<Self, JournalError> {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        let now = wall_clock();
        let id = state.disk;
        if !journal.shape().disks.contains_key(&id) {
            let size_sectors = state.size_sectors;
            journal.add_disk(DiskAdded { disk: id, machine, size_sectors, time: now }, now)?;
        }
        take_up(journal, &mut state, log, &target.repair().dropped)?;
        target.flush()?;
        let applied = log.and_then(|log| log.applied).map(|(applied, _)| applied);
        let target_sectors = target.size_bytes() / SECTOR_BYTES;
        let (mut applier, holes) = Applier::open(journal, id, target, applied)?;
        if target_sectors > applier.size_sectors() {
            // The daemon ended between the growth of the target and the note of it.
            applier.grow(journal, target_sectors, now)?;
        }
        state.size_sectors = applier.size_sectors();
        note_holes(journal, id, &holes)?;
        let scrubbed = retention.scrub().bytes_per_second > 0;
        let mut map = TargetMap::open(journal, id, applier.size_sectors(), scrubbed)?;
        if unfinished(journal, id).is_some() {
            // It is gone on with on the disk's own thread, which may take hours: see `go_on_back`.
            map.forget_all()?;
        }
        let tracked = journal.shape().disks.get(&id).is_some_and(is_tracked);
        if tracked && applier.open_epoch().is_none() {
            // The daemon ended between two undo epochs; nothing is applied outside of one (I1).
            let position =
                Position { lineage: state.lineage, generation: state.generation, sequence: state.sequence };
            // Where it may have stopped on its way back it goes back once more, which finds nothing to do if it had not.
            let to = may_have_stopped(journal, id);
            let cause = if to.is_some() { EpochCause::Rollback } else { EpochCause::Time };
            applier.begin_epoch(journal, cause, position, to, now)?;
        }
        keep_last_point(journal, id, now)?;
        let newest_marks = newest_marks(journal, id)?;
        drop(locked);
        let (backlog, waiting) = found(retention, &applier, &state)?;
        let at = applier.applied().number;
        let newest = (waiting.max(at), state.sequence);
        let applied = match waiting > at {
            true => applied_sequence(retention.lock().get()?, id, at, &state)?,
            false => state.sequence,
        };
        let mut disk = Self {
            id,
            retention: Arc::clone(retention),
            applier,
            guard,
            coming: VecDeque::new(),
            backlog,
            newest,
            durable: state.sequence,
            applied,
            marks: VecDeque::new(),
            newest_marks: newest_marks.iter().map(|(_, mark)| *mark).collect(),
            degrading: VecDeque::new(),
            last_mark: None,
            bulk_unflushed: false,
            unguarded: false,
            stopping: Arc::default(),
            status: None,
            stopped_on_its_way: false,
            got_back: false,
            at_border: false,
            is_left: false,
            state,
            map,
        };
        disk.redo()?;
        let at = disk.applier.applied().number;
        disk.last_mark = newest_marks.last().filter(|(number, _)| *number == at).copied();
        disk.unguarded = true; // opening it may have put its tables in order
        disk.flushed();
        Ok(disk)
    }

    /// From now on a rollback ends on its way where `stopping` is set, and `status` says that one goes on.
    pub(crate) fn shown_by(&mut self, status: &Arc<DiskStatus>, stopping: &Arc<AtomicBool>) {
        (self.status, self.stopping) = (Some(Arc::clone(status)), Arc::clone(stopping));
    }

    /// From now on what is overwritten is saved first: before the first write to a disk that was found.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn keep_as_found(&mut self) -> Result<(), JournalError> {
        let Some(epoch) = self.begin_first_epoch()? else { return Ok(()) };
        let at = At::entry(epoch, self.applier.applied().number);
        self.keep_point(at, wall_clock(), MarkClass::Frozen, "as-found")
    }

    /// Begins the first undo epoch, and answers it; `None` where it began and has its point.
    fn begin_first_epoch(&mut self) -> Result<Option<u64>, JournalError> {
        let applied = self.applier.applied().number;
        // It began, and a stop or a full drive kept its point from being noted.
        let begun = self.shape_says(|shape| {
            let is_bare = shape.points.is_empty() && shape.expired == 0;
            let opened = shape.open_epoch().filter(|_| is_bare).map(|epoch| epoch.opened)?;
            (opened.cause == EpochCause::First && opened.after == applied).then_some(opened.epoch)
        })?;
        match begun.flatten() {
            Some(epoch) => Ok(Some(epoch)),
            None if self.is_tracked()? => Ok(None),
            None => self.begin_epoch(EpochCause::First).map(Some),
        }
    }

    fn is_tracked(&self) -> Result<bool, JournalError> {
        Ok(self.shape_says(is_tracked)?.unwrap_or(false))
    }

    /// Something that the journal's shape says of the disk.
    fn shape_says<T>(&self, what: impl FnOnce(&DiskShape) -> T) -> Result<Option<T>, JournalError> {
        let mut locked = self.retention.lock();
        Ok(locked.get()?.shape().disks.get(&self.id).map(what))
    }

    /// A batch was accepted; with it `newest` is the newest sequence.
    pub(crate) fn accepted(&mut self, kind: EntryKind, body: Bytes, newest: Sequence) {
        self.newest_marks.clear();
        self.coming.push_back(Coming::Batch(kind, body, newest));
    }

    pub(crate) fn marked(&mut self, mark: &Mark) {
        let is_same = |known: &Mark| known.sequence == mark.sequence && known.label() == mark.label();
        if self.newest_marks.iter().any(is_same) {
            return; // sent again, because its acknowledgement was lost
        }
        if self.newest_marks.len() == MARKS_PENDING_MAX {
            self.newest_marks.remove(0); // an agent has no more of them under way
        }
        self.newest_marks.push(*mark);
        self.coming.push_back(Coming::Mark(*mark));
    }

    pub(crate) const fn target(&mut self) -> &mut Target {
        self.applier.target()
    }

    pub(crate) fn into_target(mut self) -> Target {
        self.map.settle(); // every window was flushed
        self.applier.into_target()
    }

    /// The next batch: into the log and onto what waits.
    pub(crate) fn write(&mut self, pieces: &[Piece]) -> Result<(), NotDone> {
        // Before anything of this batch is done, so that a full medium can be tried again.
        self.make_room()?;
        self.first_epoch()?;
        self.begin_next_epoch()?;
        self.append_marks()?;
        let Some(Coming::Batch(kind, body, newest)) = self.coming.front() else {
            return Err(NotDone::Failed("a batch came without its bytes".to_owned()));
        };
        let (kind, body, newest) = (*kind, body.clone(), *newest);
        if kind == EntryKind::Bulk && !self.applier.is_tracked() {
            self.check_guard()?;
            (self.unguarded, self.bulk_unflushed) = (true, true);
            self.map.forget_all()?; // there is none before before-images are kept
            write_pieces(self.applier.target(), pieces)?;
            self.coming.pop_front();
            return Ok(());
        }
        let keep: Vec<SectorRange> = pieces.iter().flat_map(|piece| piece.keep.iter().copied()).collect();
        let prefix = if kind == EntryKind::Bulk { bulk_prefix(&keep) } else { Vec::new() };
        let (number, place) =
            self.retention.lock().get()?.append(self.id, kind, &[&prefix, &body], wall_clock())?;
        self.coming.pop_front();
        self.last_mark = None;
        let parts = pieces.iter().flat_map(|piece| piece.keep.iter().map(|keep| part_of(piece, *keep)));
        let holds = kind == EntryKind::Batch && self.may_hold_back();
        self.backlog.push(number, newest, place.bytes, holds, Some(parts.collect()));
        self.newest = (number, newest);
        Ok(())
    }

    /// Whether a DIFF stretch may wait for its mark.
    fn may_hold_back(&self) -> bool {
        let bytes_max = HELD_SEGMENTS * self.retention.segment_bytes();
        self.state.mode == PassMode::Done
            && self.backlog.log_bytes() < bytes_max
            && self.retention.pressure() == Pressure::None
    }

    fn make_room(&mut self) -> Result<(), NotDone> {
        self.look_at_runs()?;
        self.let_go_if_asked()?; // also while nothing is taken in: others wait for it
        if self.retention.pressure() == Pressure::Stop {
            return Err(NotDone::Full(self.retention.no_room()));
        }
        if self.backlog.is_full() {
            self.apply_ready()?;
        }
        if self.backlog.is_full() {
            self.backlog.leave_to_log();
        }
        Ok(())
    }

    /// Marks that stand before the next batch go into the log; one at which the undo epoch ends is applied at once, so
    /// that nothing behind it gets into the same window (I4).
    fn append_marks(&mut self) -> Result<(), NotDone> {
        self.end_epoch_at_border()?; // one that a full medium kept from it
        while let Some(Coming::Mark(mark)) = self.coming.front() {
            let mark = *mark;
            let body = mark.to_bytes();
            self.mend()?;
            let (number, place) =
                self.retention.lock().get()?.append(self.id, EntryKind::Mark, &[&body], wall_clock())?;
            self.coming.pop_front();
            self.backlog.push(number, mark.sequence, place.bytes, false, None);
            self.newest = (number, mark.sequence);
            self.marks.push_back((number, mark));
            self.at_border = self.is_border(number, &mark)?;
            self.end_epoch_at_border()?;
        }
        Ok(())
    }

    /// Where the newest mark is one at which the undo epoch ends.
    fn end_epoch_at_border(&mut self) -> Result<(), NotDone> {
        if self.at_border {
            self.apply_ready()?;
            self.end_epoch_at_mark()?;
            self.at_border = false;
        }
        Ok(())
    }

    /// Before a mark goes into the log: if the disk was compared since entries of it were lost, what stands behind the
    /// mark lacks none of them any more.
    fn mend(&self) -> Result<(), JournalError> {
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        let lost = journal.shape().disks.get(&self.id).and_then(DiskShape::lost_through);
        if lost.is_none() || self.state.mode != PassMode::Done {
            return Ok(());
        }
        let number = journal.newest(self.id) + 1;
        journal.edit(&[Edit::LossMended(LossMended { disk: self.id, number })], wall_clock())?;
        tracing::info!(disk = %self.id, "compared since entries of it were lost: its points are sound again");
        Ok(())
    }

    pub(crate) fn checkpoint(&mut self, state: &DiskState) -> Result<(), NotDone> {
        self.append_marks()?;
        if self.bulk_unflushed {
            self.applier.target().flush()?;
            self.flushed();
        }
        self.retention.lock().get()?.append_state(state, wall_clock())?;
        self.retention.commit()?;
        self.state.clone_from(state);
        self.durable = state.sequence;
        Ok(())
    }

    /// Applies what may be applied; answers the newest durable sequence on the target.
    pub(crate) fn apply(&mut self) -> Result<Sequence, NotDone> {
        self.look_at_runs()?;
        match self.record_degraded() {
            Err(error) if !error.is_full() => return Err(error.into()),
            _ => {} // where the drive is full, below
        }
        self.apply_ready()?;
        self.record_degraded()?;
        self.begin_next_epoch()?; // which a full medium kept from beginning
        self.end_old_epoch()?;
        self.let_go_if_asked()?;
        self.map.idle();
        Ok(self.applied_sequence())
    }

    /// As [`Self::apply`], and what waits for its mark, too.
    fn apply_all(&mut self) -> Result<(), NotDone> {
        self.append_marks()?;
        self.backlog.release();
        self.apply_ready()
    }

    /// Makes the target show what it will hold in `range`.
    pub(crate) fn settle(&mut self, range: SectorRange) -> Result<(), NotDone> {
        if self.backlog.touches(range) {
            self.apply_ready()?;
        }
        // What waits for its mark is applied only where it is asked for: after a reconnect within a scan round.
        if self.backlog.touches(range) { self.apply_all() } else { Ok(()) }
    }

    fn apply_ready(&mut self) -> Result<(), NotDone> {
        let first = self.first_epoch(); // where a full medium kept it from beginning
        self.hindered(first)?;
        let Some(through) = self.backlog.applicable() else { return Ok(()) };
        self.begin_next_epoch()?;
        if self.backlog.writes().is_none_or(|window| !window.is_empty()) {
            self.check_guard()?;
        }
        match self.backlog.writes() {
            Some(window) => {
                // The entries, and how much of the undo run is durable, with one commit.
                let saved = self.applier.save_images(window);
                if let Some(named) = self.hindered(saved)? {
                    self.retention.lock().get()?.append_applied(self.id, named, wall_clock())?;
                }
                self.retention.commit()?;
                self.map.before(window)?;
                self.unguarded |= !window.is_empty();
                self.applier.write_window(window)?;
                self.map.after(window);
                self.note_applied(through)?;
            }
            None => {
                self.retention.commit()?;
                self.apply_from_log(through)?;
            }
        }
        self.flushed();
        Ok(self.first_epoch()?)
    }

    /// Applies entries whose writes are not in memory; they are durable.
    fn apply_from_log(&mut self, through: u64) -> Result<(), JournalError> {
        while self.applier.applied().number < through {
            let (window, number) = window_from_log(&self.retention, &self.applier, through)?;
            let saved = self.applier.save_images(&window);
            if let Some(named) = self.hindered(saved)? {
                let mut locked = self.retention.lock();
                let journal = locked.get()?;
                journal.append_applied(self.id, named, wall_clock())?;
                journal.commit(wall_clock())?;
            }
            self.map.before(&window)?;
            self.unguarded |= !window.is_empty();
            self.applier.write_window(&window)?;
            self.map.after(&window);
            self.note_applied(number)?;
        }
        Ok(())
    }

    /// Entries up to `number` are on the target.
    fn note_applied(&mut self, number: u64) -> Result<(), JournalError> {
        let applied = self.applier.applied_through(number);
        self.retention.lock().get()?.append_applied(self.id, applied, wall_clock())?;
        if let Some(sequence) = self.backlog.applied(number) {
            self.applied = sequence;
        }
        while let Some((mark_number, mark)) = self.marks.front().copied() {
            if mark_number > number {
                break;
            }
            self.marks.pop_front();
            // One with something behind it is a point inside the epoch.
            self.last_mark = (mark_number == number).then_some((mark_number, mark));
        }
        Ok(())
    }

    /// The newest state that is durable.
    #[must_use]
    pub const fn state(&self) -> &DiskState {
        &self.state
    }

    /// After a start: what the log holds and may be applied. What is lost and recorded as that is passed over.
    fn redo(&mut self) -> Result<(), JournalError> {
        let lost = self.shape_says(DiskShape::lost_through)?.flatten().unwrap_or(0);
        self.newest.0 = self.newest.0.max(lost);
        let through = self.backlog.applicable().unwrap_or(0).max(lost);
        if through <= self.applier.applied().number {
            return Ok(());
        }
        let from = self.applier.applied().number;
        self.apply_from_log(through)?;
        self.retention.lock().get()?.commit(wall_clock())?;
        tracing::info!(disk = %self.id, entries = through - from, "the redo log was applied");
        Ok(())
    }

    /// Nobody else may have written since our last flush; what we wrote since then is ours, also where it failed. From the
    /// first byte that we write on, `unguarded` says so: not before, for a full medium may keep us from it for hours.
    fn check_guard(&self) -> Result<(), NotDone> {
        if self.unguarded { Ok(()) } else { self.guard.check().map_err(NotDone::Failed) }
    }

    /// The target was flushed. What changed where we wrote nothing was not us, and is not taken for ours.
    fn flushed(&mut self) {
        if std::mem::take(&mut self.unguarded) {
            self.guard.flushed();
        }
        self.bulk_unflushed = false;
    }

    /// The first undo epoch of a disk whose initial sync is done begins at its first mark.
    fn first_epoch(&mut self) -> Result<(), JournalError> {
        let Some((number, mark)) = self.last_mark else { return Ok(()) };
        if self.state.mode == PassMode::Done
            && let Some(epoch) = self.begin_first_epoch()?
        {
            let point = self.point(At::entry(epoch, number), &mark);
            self.retention.lock().get()?.edit(&[Edit::PointKept(point)], wall_clock())?;
        }
        Ok(())
    }

    /// Whether the undo epoch ends at a mark: somebody wants it kept, or a new slot of the source's clock began.
    fn is_border(&self, number: u64, mark: &Mark) -> Result<bool, JournalError> {
        let Some((epoch, began)) = self.epoch_began(number)? else { return Ok(false) };
        let wanted = mark.class == MarkClass::App
            || matches!(mark.cause, MarkCause::Command | MarkCause::Stop)
            || !mark.name.as_str().is_empty();
        let length = epoch_nanos(&self.retention);
        let is_old = wall_clock().0.saturating_sub(epoch.time.0) >= length.saturating_mul(2);
        Ok(wanted || is_old || mark.source_time.0 / length > began.0 / length)
    }

    /// Also while nothing comes: an undo epoch that goes on keeps its part of the log from being given back.
    fn end_old_epoch(&mut self) -> Result<(), JournalError> {
        let Some((number, _)) = self.last_mark else { return Ok(()) };
        let Some((epoch, _)) = self.epoch_began(number)? else { return Ok(()) };
        let age = wall_clock().0.saturating_sub(epoch.time.0);
        if age >= epoch_nanos(&self.retention) { self.end_epoch_at_mark() } else { Ok(()) }
    }

    /// The undo epoch that goes on, if an entry up to `number` lies in it, and the source's time at its beginning.
    fn epoch_began(&self, number: u64) -> Result<Option<(EpochOpened, Timestamp)>, JournalError> {
        let mut locked = self.retention.lock();
        let Some(shape) = locked.get()?.shape().disks.get(&self.id) else { return Ok(None) };
        let open = shape.open_epoch().map(|epoch| epoch.opened).filter(|opened| opened.after < number);
        let newest = shape.points.values().max_by_key(|point| (point.epoch, point.number));
        let began = newest.map(|point| point.source_time);
        Ok(open.map(|opened| (opened, began.unwrap_or(opened.time))))
    }

    /// Ends the undo epoch at the newest entry, which is a mark and applied.
    fn end_epoch_at_mark(&mut self) -> Result<(), JournalError> {
        let applied = self.applier.applied().number;
        let Some((number, mark)) = self.last_mark.filter(|(number, _)| *number == applied) else {
            return Ok(());
        };
        self.retention.commit()?; // what was applied is durably said to be
        let Some(epoch) = self.applier.open_epoch() else { return Ok(()) };
        let point = self.point(At::entry(epoch, number), &mark);
        self.turn_epoch(Some(point))
    }

    /// Ends the undo epoch and begins the next. Where the medium is full in between, the next begins before anything more is
    /// written.
    fn turn_epoch(&mut self, point: Option<PointKept>) -> Result<(), JournalError> {
        self.close_epoch(point)?;
        self.begin_next_epoch()
    }

    /// Ends the undo epoch; where that fails, it goes on, and may be ended later.
    fn close_epoch(&mut self, point: Option<PointKept>) -> Result<(), JournalError> {
        let now = wall_clock();
        let sealed = self.applier.seal_run(now); // others commit meanwhile
        self.hindered(sealed)?;
        let closed = self.applier.close_epoch_at(self.retention.lock().get()?, point, now);
        self.hindered(closed)?;
        self.last_mark = None;
        Ok(())
    }

    /// After an undo epoch that ended without the next beginning. Where that was one of a rollback which may have stopped on its
    /// way, another to the same point is begun, as at a start.
    fn begin_next_epoch(&mut self) -> Result<(), JournalError> {
        if !self.applier.is_tracked() || self.applier.open_epoch().is_some() || self.is_left {
            return Ok(());
        }
        let goes_back = self.goes_back_again()?;
        let begun = self.begin_epoch_to(goes_back);
        self.hindered(begun)?;
        self.stopped_on_its_way |= goes_back.is_some();
        Ok(())
    }

    /// Closes undo runs that nobody reads, and tells of damage in one that was opened again.
    fn look_at_runs(&mut self) -> Result<(), JournalError> {
        if self.applier.runs_open() > 0 {
            self.applier.close_runs(self.retention.lock().get()?, mono_clock());
        }
        let holes = self.applier.take_holes();
        if holes.is_empty() { Ok(()) } else { note_holes(self.retention.lock().get()?, self.id, &holes) }
    }

    fn point(&self, at: At, mark: &Mark) -> PointKept {
        let mut locked = self.retention.lock();
        let shape = locked.get().ok().and_then(|journal| journal.shape().disks.get(&self.id));
        let degraded = shape.is_some_and(|shape| shape.is_degraded_mark(mark, at.number));
        PointKept { degraded, ..kept_point(self.id, at, self.applied, mark) }
    }

    fn begin_epoch(&mut self, cause: EpochCause) -> Result<u64, JournalError> {
        let position = self.position();
        self.is_left = false;
        let mut locked = self.retention.lock();
        self.applier.begin_epoch(locked.get()?, cause, position, None, wall_clock())
    }

    /// Of a rollback, where the disk goes to a point.
    fn begin_epoch_to(&mut self, goes_back: Option<At>) -> Result<u64, JournalError> {
        let Some(at) = goes_back else { return self.begin_epoch(EpochCause::Time) };
        let position = self.position();
        let mut locked = self.retention.lock();
        self.applier.begin_epoch(locked.get()?, EpochCause::Rollback, position, Some(at), wall_clock())
    }

    /// The newest durable sequence on the target.
    pub(crate) fn applied_sequence(&self) -> Sequence {
        self.applied.min(self.durable)
    }

    fn position(&self) -> Position {
        Position { lineage: self.state.lineage, generation: self.state.generation, sequence: self.applied }
    }

    fn keep_point(
        &self,
        at: At,
        source_time: Timestamp,
        class: MarkClass,
        name: &str,
    ) -> Result<(), JournalError> {
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        let shape = journal.shape().disks.get(&self.id);
        let degraded =
            shape.is_some_and(|shape| shape.is_degraded(self.state.lineage, self.newest.1, at.number));
        let point = PointKept {
            disk: self.id,
            point: own_id(self.id, at),
            number: at.number,
            sequence: self.applied,
            epoch: at.epoch,
            source_time,
            class,
            pinned: false,
            degraded,
            name: Text::new(name),
            cause: MarkCause::Pass,
        };
        journal.edit(&[Edit::PointKept(point)], wall_clock())
    }

    /// What an error of reading these bytes of a point says to be damaged is recorded.
    fn noted<T>(&self, read: Result<T, JournalError>, bytes: (u64, u64)) -> Result<T, JournalError> {
        read.inspect_err(|error| note_error(&self.retention, self.id, error, bytes))
    }

    /// Reads a view.
    ///
    /// # Errors
    /// When it is damaged, or the target cannot be read.
    pub fn read_view(&mut self, view: &View, offset: u64, out: &mut [u8]) -> Result<(), JournalError> {
        let bytes = (offset, offset + out.len() as u64);
        let opened = view.open_runs(self.retention.lock().get()?, &mut self.applier);
        let runs = self.noted(opened, bytes)?;
        let read = view.read(&runs, &mut self.applier, offset, out);
        self.noted(read, bytes)
    }

    /// The parts of a view that may hold something.
    ///
    /// # Errors
    /// As for [`Self::read_view`].
    pub fn view_allocated(
        &mut self,
        view: &View,
        range: reprotect_engine::io::ByteRange,
    ) -> Result<Vec<reprotect_engine::io::ByteRange>, JournalError> {
        let bytes = (range.start, range.end);
        let opened = view.open_runs(self.retention.lock().get()?, &mut self.applier);
        let runs = self.noted(opened, bytes)?;
        view.allocated(&runs, &mut self.applier, range)
    }

    /// Compares a part of the target with what was written there; `None` where nothing is kept of it.
    ///
    /// # Errors
    /// When target or map cannot be read.
    pub fn scrub(&mut self, range: reprotect_engine::io::ByteRange) -> Result<Option<Checked>, JournalError> {
        if self.applier.open_epoch().is_none() || self.bulk_unflushed {
            return Ok(None);
        }
        self.map.check(self.applier.target(), range)
    }
}

/// What is damaged in the run of the epoch that goes on, found when it was opened.
fn note_holes(journal: &mut Journal, id: DiskId, holes: &[Hole]) -> Result<(), JournalError> {
    for hole in holes {
        tracing::error!(disk = %id, ?hole, "the undo run is damaged; older points lack these blocks");
    }
    let found = Found::of_holes(holes);
    let Some(place) = journal.open_run_place(id)?.filter(|_| !found.is_empty()) else { return Ok(()) };
    let reached = reach(&**journal.files(), &journal.older_runs(&place)?, found);
    journal.note_run(&place, &reached, false, wall_clock()).map(|_| ())
}

/// Whether before-images of a disk are kept.
fn is_tracked(shape: &DiskShape) -> bool {
    !shape.epochs.is_empty() || shape.expired > 0
}

/// Whether a rollback was interrupted.
fn part_of(piece: &Piece, keep: SectorRange) -> Write {
    let content = if piece.record.kind() == RecordKind::Data {
        let from = ((keep.start - piece.record.range().start) * SECTOR_BYTES) as usize;
        Content::Data(piece.record.payload().slice(from..from + keep.bytes() as usize))
    } else {
        Content::Zeros
    };
    Write { range: keep, content }
}

/// Length of an undo epoch.
fn epoch_nanos(retention: &Retention) -> u64 {
    u64::try_from(retention.undo_epoch().as_nanos()).unwrap_or(u64::MAX).max(1)
}
