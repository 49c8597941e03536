//! A disk behind the retention journal: what waits to be applied, its undo epochs and its points.
//!
//! Invariants: entries get their numbers in the order the core accepted their batches and marks; a window is applied
//! only when all its entries are durable, and lies in one undo epoch (I4); an undo epoch ends at a mark, once that mark
//! is applied and APPLIED is durable; memory is bounded by `WAITING_MAX` batches. The first undo epoch of a target
//! that we created begins at the first mark after its initial sync, of an existing one before anything is written.
//! Units: entry numbers, sequences. Used by the disk's second thread only.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{Mark, MarkClass, decode_batch};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::RecordKind;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, PointKept, StretchDegraded};
use reprotect_engine::format::message::{PassMode, PointDegrade};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::BlockFile as _;
use reprotect_engine::limits::MARKS_PENDING_MAX;
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::target_disk::Piece;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::{Content, Write, bulk_prefix, entry_writes};
use reprotect_engine::store::journal::rollback::{RolledBack, resume, rollback};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{DiskLog, DiskShape, Journal, JournalError};
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};

use crate::disk_store::{NotDone, write_pieces};
use crate::guard::Guard;
use crate::retention::Retention;

/// Batches that may wait to be applied: their plain bytes are held in the disk's ten buffers.
const WAITING_MAX: usize = 4;
/// Parts of a stream whose points are to be degraded and wait for a full medium.
const DEGRADING_MAX: usize = 64;
/// Plain bytes of entries that are read back from the log and applied at once after a start.
const REDO_BYTES: u64 = 16 << 20;

/// What the core accepted and the log does not hold yet.
enum Coming {
    Batch(EntryKind, Bytes),
    Mark(Mark),
}

/// A disk behind the journal.
pub struct Journaled {
    id: DiskId,
    retention: Arc<Retention>,
    applier: Applier<Target>,
    guard: Guard,
    coming: VecDeque<Coming>,
    /// Coalesced writes that wait.
    window: Window,
    /// Batches in it.
    waiting: usize,
    /// Number and sequence of the newest entry.
    newest: (u64, Sequence),
    applied: Sequence,
    /// Marks that wait with it, by their entry's number.
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
    /// What the core last said.
    state: DiskState,
}

impl Journaled {
    /// A disk whose entries of the log have all been applied.
    ///
    /// # Errors
    /// When the disk cannot be added to the journal, its undo run cannot be used, or what the log holds cannot be
    /// applied.
    pub fn open(
        retention: &Arc<Retention>,
        mut target: Target,
        guard: Guard,
        state: DiskState,
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
        target.flush()?;
        let applied = log.and_then(|log| log.applied).map(|(applied, _)| applied);
        let (mut applier, holes) = Applier::open(journal, id, target, applied)?;
        for hole in holes {
            tracing::error!(disk = %id, ?hole, "the undo run is damaged; older points lack these blocks");
        }
        resume(journal, &mut applier, now)?;
        let tracked = journal.shape().disks.get(&id).is_some_and(is_tracked);
        if tracked && applier.open_epoch().is_none() {
            // The daemon ended between two undo epochs; nothing is applied outside of one (I1).
            let position =
                Position { lineage: state.lineage, generation: state.generation, sequence: state.sequence };
            applier.begin_epoch(journal, EpochCause::Time, position, (0, 0), now)?;
        }
        let redone = redo(journal, &mut applier, now)?;
        if redone > 0 {
            tracing::info!(disk = %id, entries = redone, "the redo log was applied");
        }
        let newest = (applier.applied().number, state.sequence);
        let applied = state.sequence;
        let newest_marks = newest_marks(journal, id)?;
        let at_end = newest_marks.last().filter(|(number, _)| *number == newest.0);
        let last_mark = at_end.copied();
        let newest_marks = newest_marks.into_iter().map(|(_, mark)| mark).collect();
        drop(locked);
        let mut disk = Self {
            id,
            retention: Arc::clone(retention),
            applier,
            guard,
            coming: VecDeque::new(),
            window: Window::default(),
            waiting: 0,
            newest,
            applied,
            marks: VecDeque::new(),
            newest_marks,
            degrading: VecDeque::new(),
            last_mark,
            bulk_unflushed: false,
            unguarded: false,
            state,
        };
        disk.guard.flushed();
        Ok(disk)
    }

    /// From now on what is overwritten is saved first: before the first write to a disk that was found.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn keep_as_found(&mut self) -> Result<(), JournalError> {
        if self.is_tracked()? {
            return Ok(());
        }
        let epoch = self.begin_epoch(EpochCause::First)?;
        let at = At { epoch, number: self.applier.applied().number };
        self.keep_point(at, wall_clock(), MarkClass::Frozen, "as-found")
    }

    fn is_tracked(&self) -> Result<bool, JournalError> {
        let mut locked = self.retention.lock();
        Ok(locked.get()?.shape().disks.get(&self.id).is_some_and(is_tracked))
    }

    pub(crate) fn accepted(&mut self, kind: EntryKind, body: Bytes) {
        self.newest_marks.clear();
        self.coming.push_back(Coming::Batch(kind, body));
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

    /// Points in a part of the stream promise less than was said: recorded when nothing else waits, and tried again
    /// where the medium is full.
    pub(crate) fn degrade(&mut self, degrade: &PointDegrade) {
        let full = self.degrading.len() >= DEGRADING_MAX;
        match self.degrading.back_mut().filter(|last| full && last.lineage == degrade.lineage) {
            // One that says too much is better than one that is forgotten.
            Some(last) => (last.from, last.to) = (last.from.min(degrade.from), last.to.max(degrade.to)),
            None => self.degrading.push_back(*degrade),
        }
    }

    /// What was said of points becomes durable: for those that are kept, and for marks in the log.
    fn record_degraded(&mut self) -> Result<(), JournalError> {
        while let Some(degrade) = self.degrading.front() {
            let now = wall_clock();
            let mut locked = self.retention.lock();
            let journal = locked.get()?;
            let Some(shape) = journal.shape().disks.get(&self.id) else { break };
            let lineage_of = |number: u64| {
                // The last entry of an epoch belongs to it; so does the point a first epoch begins at.
                let epoch = shape.epoch_of(number).or(shape.epochs.first());
                epoch.map(|epoch| epoch.opened.lineage)
            };
            let concerned = shape.points.values().filter(|point| {
                !point.degraded
                    && (degrade.from..=degrade.to).contains(&point.sequence)
                    && lineage_of(point.number) == Some(degrade.lineage)
            });
            let changed = concerned.map(|point| Edit::PointChanged(PointKept { degraded: true, ..*point }));
            let part = StretchDegraded {
                disk: self.id,
                lineage: degrade.lineage,
                from: degrade.from,
                to: degrade.to,
                time: now,
                cause: degrade.cause,
            };
            let edits: Vec<Edit> = std::iter::once(Edit::StretchDegraded(part)).chain(changed).collect();
            journal.edit(&edits, now)?;
            drop(locked);
            self.degrading.pop_front();
        }
        Ok(())
    }

    pub(crate) const fn target(&mut self) -> &mut Target {
        self.applier.target()
    }

    pub(crate) fn into_target(self) -> Target {
        self.applier.into_target()
    }

    /// The next batch: into the log and onto what waits.
    pub(crate) fn write(&mut self, pieces: &[Piece]) -> Result<(), NotDone> {
        self.last_mark = None;
        if self.waiting >= WAITING_MAX {
            self.apply()?; // before anything of this batch is done, so that a full medium can be tried again
        }
        self.append_marks()?;
        let Some(Coming::Batch(kind, body)) = self.coming.front() else {
            return Err(NotDone::Failed("a batch came without its bytes".to_owned()));
        };
        let (kind, body) = (*kind, body.clone());
        if kind == EntryKind::Bulk && self.applier.open_epoch().is_none() {
            self.before_writing()?;
            self.bulk_unflushed = true;
            write_pieces(self.applier.target(), pieces)?;
            self.coming.pop_front();
            return Ok(());
        }
        let keep: Vec<SectorRange> = pieces.iter().flat_map(|piece| piece.keep.iter().copied()).collect();
        let prefix = if kind == EntryKind::Bulk { bulk_prefix(&keep) } else { Vec::new() };
        let (number, _) =
            self.retention.lock().get()?.append(self.id, kind, &[&prefix, &body], wall_clock())?;
        self.coming.pop_front();
        for piece in pieces {
            for keep in &piece.keep {
                self.window.put(part_of(piece, *keep));
            }
        }
        self.waiting += 1;
        self.newest.0 = number;
        Ok(())
    }

    /// Marks that stand before the next batch go into the log.
    fn append_marks(&mut self) -> Result<(), JournalError> {
        while let Some(Coming::Mark(mark)) = self.coming.front() {
            let mark = *mark;
            let body = mark.to_bytes();
            let mut locked = self.retention.lock();
            let (number, _) = locked.get()?.append(self.id, EntryKind::Mark, &[&body], wall_clock())?;
            drop(locked);
            self.coming.pop_front();
            self.newest.0 = number;
            self.marks.push_back((number, mark));
        }
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
        self.newest.1 = state.sequence;
        Ok(())
    }

    /// Applies what waits; answers the newest sequence on the target.
    pub(crate) fn apply(&mut self) -> Result<Sequence, NotDone> {
        if self.waiting > 0 || !self.marks.is_empty() {
            self.retention.commit()?;
            if self.waiting > 0 {
                self.before_writing()?;
            }
            self.apply_window()?;
            self.flushed();
            self.handle_marks()?;
        }
        self.record_degraded()?;
        // Also while nothing comes: an undo epoch that goes on keeps its part of the log from being given back.
        self.end_epoch_if_due()?;
        Ok(self.applied)
    }

    /// Nobody else may have written since our last flush; what we wrote since then is ours, also where it failed.
    fn before_writing(&mut self) -> Result<(), NotDone> {
        if !self.unguarded {
            self.guard.check().map_err(NotDone::Failed)?;
        }
        self.unguarded = true;
        Ok(())
    }

    /// The target was flushed.
    fn flushed(&mut self) {
        self.guard.flushed();
        (self.unguarded, self.bulk_unflushed) = (false, false);
    }

    fn apply_window(&mut self) -> Result<(), JournalError> {
        // Taken out of `self` only when it is on the target: a full medium is tried again with all of it.
        self.applier.write_window(&self.window)?;
        self.window = Window::default();
        let number = self.newest.0;
        let applied = self.applier.applied_through(number);
        self.retention.lock().get()?.append_applied(self.id, applied, wall_clock())?;
        self.waiting = 0;
        // The state says the durable sequence; what was accepted since the last one is on the target, too.
        self.applied = self.newest.1;
        Ok(())
    }

    /// The marks of the window that was applied: the first undo epoch begins, or one that is old enough ends.
    fn handle_marks(&mut self) -> Result<(), JournalError> {
        let applied = self.applier.applied().number;
        // One with something behind it is a point inside the epoch.
        self.last_mark = self.marks.drain(..).next_back().filter(|(number, _)| *number == applied);
        let Some((number, mark)) = self.last_mark else { return Ok(()) };
        if self.state.mode == PassMode::Done && !self.is_tracked()? {
            let epoch = self.begin_epoch(EpochCause::First)?;
            self.keep_point(At { epoch, number }, mark.source_time, mark.class, "")?;
        }
        Ok(())
    }

    /// Ends the undo epoch at the newest mark, if it is old enough and holds anything.
    fn end_epoch_if_due(&mut self) -> Result<(), JournalError> {
        let Some((number, mark)) = self.last_mark else { return Ok(()) };
        if !self.epoch_is_due(number)? {
            return Ok(());
        }
        let epoch = self.end_epoch()?;
        self.keep_point(At { epoch, number }, mark.source_time, mark.class, "")?;
        self.begin_epoch(EpochCause::Time)?;
        Ok(())
    }

    /// Whether the undo epoch is old enough and an entry up to `number` lies in it.
    fn epoch_is_due(&self, number: u64) -> Result<bool, JournalError> {
        let mut locked = self.retention.lock();
        let shape = locked.get()?.shape().disks.get(&self.id);
        let open = shape.and_then(|shape| shape.open_epoch()).map(|epoch| epoch.opened);
        let Some(opened) = open.filter(|opened| opened.after < number) else { return Ok(false) };
        let age = wall_clock().0.saturating_sub(opened.time.0);
        Ok(u128::from(age) >= self.retention.settings().undo_epoch.as_nanos())
    }

    fn begin_epoch(&mut self, cause: EpochCause) -> Result<u64, JournalError> {
        let position = self.position();
        let mut locked = self.retention.lock();
        self.applier.begin_epoch(locked.get()?, cause, position, (0, 0), wall_clock())
    }

    /// Ends the undo epoch; what was applied in it is durably said to be first.
    fn end_epoch(&mut self) -> Result<u64, JournalError> {
        self.retention.commit()?;
        let epoch = self.applier.open_epoch().unwrap_or(0);
        let mut locked = self.retention.lock();
        self.applier.close_epoch(locked.get()?, wall_clock())?;
        Ok(epoch)
    }

    fn position(&self) -> Position {
        Position { lineage: self.state.lineage, generation: self.state.generation, sequence: self.newest.1 }
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
        let degraded = shape.is_some_and(|shape| shape.is_degraded(self.state.lineage, self.newest.1));
        let point = PointKept {
            disk: self.id,
            point: point_id(self.id, at),
            number: at.number,
            sequence: self.newest.1,
            epoch: at.epoch,
            source_time,
            class,
            pinned: false,
            degraded,
            name: Text::new(name),
        };
        journal.edit(&[Edit::PointKept(point)], wall_clock())
    }

    /// The disk as it was at a point.
    ///
    /// # Errors
    /// When it is not kept any more or damaged.
    pub fn view(&mut self, at: At) -> Result<View, JournalError> {
        View::open(self.retention.lock().get()?, self.id, at)
    }

    /// Reads a view.
    ///
    /// # Errors
    /// When it is damaged, or the target cannot be read.
    pub fn read_view(&mut self, view: &View, offset: u64, out: &mut [u8]) -> Result<(), JournalError> {
        let runs = view.open_runs(self.retention.lock().get()?, &mut self.applier)?;
        view.read(&runs, &mut self.applier, offset, out)
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
        let runs = view.open_runs(self.retention.lock().get()?, &mut self.applier)?;
        view.allocated(&runs, &mut self.applier, range)
    }

    /// Takes the target back to a point; what it held stays a point.
    ///
    /// # Errors
    /// When the point is not kept, or something cannot be written.
    pub fn rollback(&mut self, at: At) -> Result<RolledBack, JournalError> {
        // What waits comes first, or it would be applied over the point.
        if let Err(NotDone::Full(why) | NotDone::Failed(why)) = self.apply() {
            return Err(JournalError::Failed { path: "the target".into(), why });
        }
        self.retention.commit()?;
        self.last_mark = None;
        let position = self.position();
        let before = self.applier.open_epoch().unwrap_or(0);
        let mut locked = self.retention.lock();
        let done = rollback(locked.get()?, &mut self.applier, at, position, wall_clock())?;
        drop(locked);
        self.flushed();
        let number = self.applier.applied().number;
        let name = format!("before-rollback-{before}");
        self.keep_point(At { epoch: before, number }, wall_clock(), MarkClass::Fuzzy, &name)?;
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

/// The identity of a disk's point that belongs to no machine's: the same each time it is made.
#[must_use]
pub fn point_id(disk: DiskId, at: At) -> [u8; 16] {
    let mut id = disk.0;
    let place = at.epoch.to_le_bytes().into_iter().chain(at.number.to_le_bytes());
    for (slot, byte) in id.iter_mut().zip(place) {
        *slot ^= byte;
    }
    id
}

/// The newest state of a disk: what the log says, and every batch that stands behind it.
///
/// # Errors
/// When a batch cannot be read back.
pub fn newest_state(journal: &mut Journal, log: &DiskLog) -> Result<Option<DiskState>, JournalError> {
    let Some((mut state, place)) = log.state.clone() else { return Ok(None) };
    for entry in log.entries.iter().filter(|entry| entry.place > place && entry.kind == EntryKind::Batch) {
        let (_, body) = journal.read(entry.place)?;
        let (header, records) = decode_batch(body.into()).map_err(|source| JournalError::Format {
            path: journal.folder().into(),
            offset: entry.place.offset,
            source,
            remedy: "the disk is compared with its source",
        })?;
        if header.lineage == state.lineage && header.first_sequence == state.sequence.next() {
            state.sequence = header.last_sequence();
            state.chain = header.chain_after(&records);
            for record in records.iter().filter(|_| state.mode != PassMode::Done) {
                for unsettled in state.settled.missing(record.range()) {
                    state.touched.insert(unsettled);
                }
            }
        }
    }
    Ok(Some(state))
}

/// Whether before-images of a disk are kept.
fn is_tracked(shape: &DiskShape) -> bool {
    !shape.epochs.is_empty() || shape.expired > 0
}

/// The marks behind a disk's newest batch, with their entries' numbers, oldest first.
fn newest_marks(journal: &mut Journal, disk: DiskId) -> Result<Vec<(u64, Mark)>, JournalError> {
    let newest = journal.entries(disk).iter().rev().take_while(|entry| entry.kind == EntryKind::Mark);
    let mut entries: Vec<_> = newest.take(MARKS_PENDING_MAX).copied().collect();
    entries.reverse();
    let mut marks = Vec::with_capacity(entries.len());
    for entry in entries {
        let (_, body) = journal.read(entry.place)?;
        marks.extend(Mark::read_exact(&body).ok().map(|mark| (entry.number, mark)));
    }
    Ok(marks)
}

fn part_of(piece: &Piece, keep: SectorRange) -> Write {
    let content = if piece.record.kind() == RecordKind::Data {
        let from = ((keep.start - piece.record.range().start) * SECTOR_BYTES) as usize;
        Content::Data(piece.record.payload().slice(from..from + keep.bytes() as usize))
    } else {
        Content::Zeros
    };
    Write { range: keep, content }
}

/// Applies what the log holds beyond APPLIED; answers how many entries.
fn redo(journal: &mut Journal, applier: &mut Applier<Target>, now: Timestamp) -> Result<usize, JournalError> {
    let from = applier.applied().number;
    let disk = applier.disk();
    let entries: Vec<_> = journal.entries(disk).iter().filter(|entry| entry.number > from).copied().collect();
    let mut decompressor =
        Decompressor::new().map_err(|error| JournalError::Zstd { reason: error.to_string() })?;
    let mut window = Window::default();
    for entry in &entries {
        let (head, body) = journal.read(entry.place)?;
        let writes = entry_writes(head.kind, body.into(), &mut decompressor).map_err(|source| {
            JournalError::Format {
                path: journal.folder().into(),
                offset: entry.place.offset,
                source,
                remedy: "the disk is compared with its source",
            }
        })?;
        for write in writes {
            window.put(write);
        }
        if window.bytes() >= REDO_BYTES {
            applier.apply(journal, entry.number, &std::mem::take(&mut window), now)?;
        }
    }
    if let Some(last) = entries.last() {
        applier.apply(journal, last.number, &window, now)?;
        journal.commit(now)?;
    }
    Ok(entries.len())
}
