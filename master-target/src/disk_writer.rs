//! The second thread of a disk: the core and the store behind it.
//!
//! Invariants: the core's actions are executed strictly in order, one after another; while the medium is full the
//! action in hand waits and nothing behind it is executed, but inputs are still taken (their actions queue up behind,
//! bounded by credit), so that nobody else is held up; a failed write or flush stops this disk and no other (I6). What
//! durable means is the store's business.
//! Units: bytes and sectors. Started by `disk_worker`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as sync_mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::format::batch::{Mark, Stretch};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{CompareAnswer, CompareRequestHead, ErrorCode, Message, RefineUnit};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::ByteRange;
use reprotect_engine::limits::{CHUNK_BYTES, COMPARE_UNIT_BYTES};
use reprotect_engine::net::mono_clock;
use reprotect_engine::proto::compare::{answer, unit_hashes, wanted};
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::proto::pass::unit_count;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::{DiskAction, DiskNotice, Piece, SessionId, TargetDisk};
use reprotect_engine::units::{DiskId, Generation, SECTOR_BYTES};

use crate::compare_cache::CompareCache;
use crate::disk_status::DiskStatus;
use crate::disk_store::{DiskStore, NotDone, NotGrown, byte_range};
use crate::disk_worker::{GrowOrder, Opened, Replies};
use crate::journaled::Journaled;
use crate::receipts::Keeper;

/// How often a full medium is tried again, and a stop noticed meanwhile.
const FULL_RETRY: Duration = Duration::from_millis(500);
/// How often a rollback is tried again that a full drive stopped on its way.
const BACK_RETRY: Duration = Duration::from_secs(30);
/// At the latest so long after the last time what is accepted is applied, whatever else there is to do.
const APPLY_EVERY: Duration = Duration::from_millis(200);
/// Longest sleep when nothing is due.
const IDLE: Duration = Duration::from_millis(500);

/// Second thread: the core and the storage behind it.
pub(crate) struct Writer {
    pub(crate) disk: TargetDisk,
    pub(crate) id: DiskId,
    pub(crate) store: DiskStore,
    pub(crate) status: Arc<DiskStatus>,
    /// The daemon stops, or this disk does.
    pub(crate) stopping: Arc<AtomicBool>,
    /// Why nobody may open the disk.
    pub(crate) fenced: Option<String>,
    pub(crate) receipts: Keeper,
    /// Who waits for the fence to be durable.
    pub(crate) fencing: Vec<sync_mpsc::SyncSender<Result<Generation, String>>>,
    /// The target is to become larger, once everything that was accepted is durable.
    pub(crate) growing: Option<GrowOrder>,
    /// The medium is full.
    pub(crate) waiting: bool,
    pub(crate) sessions: Vec<(SessionId, Replies)>,
    /// When a rollback that a full drive stopped on its way is tried again.
    back_again: Option<Instant>,
    /// When what was accepted was last applied.
    applied_at: Instant,
    /// What was compared a moment ago.
    pub(crate) compared: CompareCache,
    pub(crate) chunk: Vec<u8>,
}

impl Writer {
    pub(crate) fn new(
        disk: TargetDisk,
        store: DiskStore,
        status: Arc<DiskStatus>,
        stopping: Arc<AtomicBool>,
        fenced: Option<String>,
        receipts: Keeper,
    ) -> Self {
        Self {
            id: disk.state().disk,
            disk,
            store,
            status,
            stopping,
            fenced,
            receipts,
            fencing: Vec::new(),
            growing: None,
            waiting: false,
            sessions: Vec::new(),
            back_again: None,
            applied_at: Instant::now(),
            compared: CompareCache::default(),
            chunk: Vec::new(),
        }
    }

    /// A rollback that was begun and stopped is gone on with, while other disks go on. One that cannot be finished leaves the
    /// disk held, so that it can be taken back to another point.
    pub(crate) fn go_on_back(&mut self) {
        self.back_again = None;
        let (disk, DiskStore::Journaled(store)) = (self.id, &mut self.store) else { return };
        match store.go_on_back() {
            Ok(done) if done.compared_bytes > 0 => {
                tracing::warn!(%disk, written = done.written_bytes, "a rollback that had stopped on its way was finished");
            }
            Ok(_) => {}
            Err(error) => {
                self.back_again = error.is_full().then(|| Instant::now() + BACK_RETRY);
                tracing::error!(%disk, %error, "a rollback did not get to its end; the disk is held");
            }
        }
    }

    /// A rollback that stopped for want of room is gone on with after a while.
    fn go_back_again(&mut self) {
        if let DiskStore::Journaled(store) = &mut self.store
            && store.take_stopped_on_its_way()
        {
            self.back_again = Some(Instant::now() + BACK_RETRY);
        }
        if self.back_again.is_some_and(|at| Instant::now() >= at)
            && self.disk.phase() != TargetDiskPhase::Failed
        {
            self.go_on_back();
        }
    }

    pub(crate) fn run(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        let mut ready = None;
        loop {
            let now = mono_clock();
            let wait = self
                .disk
                .poll_timeout()
                .map_or(IDLE, |at| Duration::from_nanos(at.nanos_since(now)).min(IDLE));
            match ready.take().map_or_else(|| inputs.recv_timeout(wait), Ok) {
                Ok(Opened::Stop) | Err(sync_mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(input) => self.handle(input),
                Err(sync_mpsc::RecvTimeoutError::Timeout) => {}
            }
            self.compared.tick();
            self.disk.handle_timeout(mono_clock());
            self.execute(inputs);
            self.answer_fences();
            self.grow(inputs);
            self.go_back_again();
            // What is there already joins the window before it is applied, but readers of points must not keep it waiting. Nothing
            // is taken out before that: where the medium is full, `apply` goes on taking in what comes, in its order.
            if self.applied_at.elapsed() < APPLY_EVERY {
                ready = inputs.try_recv().ok();
            }
            if ready.is_none() {
                self.apply(inputs);
                self.applied_at = Instant::now();
            }
        }
    }

    fn handle(&mut self, input: Opened) {
        let now = mono_clock();
        match input {
            Opened::Batch(session, header, records, body) => {
                let kind = match header.stretch {
                    Stretch::Ordered => EntryKind::Ordered,
                    Stretch::Diff => EntryKind::Batch,
                };
                let _accepted =
                    self.accept(kind, body, |disk| disk.handle_batch(now, session, &header, records));
            }
            Opened::Bulk(session, header, records, body) => {
                let moved = records.iter().map(Record::range).collect();
                let accepted = self.accept(EntryKind::Bulk, body, |disk| {
                    disk.handle_bulk(now, session, &header, records);
                });
                if accepted {
                    self.receipts.moved(moved);
                }
            }
            Opened::Ask(ask) => {
                self.compared.forget_all(); // it may go back to a point
                ask(self.journaled());
            }
            Opened::Look(ask) => ask(self.journaled()),
            Opened::Fence(reason, answer) => {
                self.disk.handle_fence(now, &reason);
                self.fenced = Some(reason);
                self.fencing.push(answer);
            }
            Opened::Grow(order) => {
                self.compared.forget_all();
                self.disk.handle_growing(now);
                self.growing = Some(order);
            }
            Opened::Damaged(session, reason) => self.end_session(session, &reason),
            Opened::DamagedDelta(session, generation, cost) => {
                self.disk.handle_damaged(session, generation, cost);
            }
            Opened::Other(session, input, replies) => self.handle_other(session, input, replies),
            Opened::Lost(session) => {
                self.disk.handle_session_lost(now, session);
                self.sessions.retain(|(known, _)| *known != session);
            }
            Opened::Broken(panic) => self.fail(&broken(&panic)),
            Opened::Retire => {
                self.receipts.retired();
                self.tell_sessions(ErrorCode::UnknownDisk, "the disk is no longer protected");
            }
            Opened::Stop => {}
        }
    }

    /// The disk behind the journal, where it is there and did not stop.
    fn journaled(&mut self) -> Option<&mut Journaled> {
        match &mut self.store {
            DiskStore::Journaled(store) if self.disk.phase() != TargetDiskPhase::Failed => Some(store),
            _ => None,
        }
    }

    fn handle_other(&mut self, session: SessionId, input: DiskInput, replies: Replies) {
        let now = mono_clock();
        match input {
            DiskInput::Open(head) => {
                self.sessions.retain(|(known, _)| *known != session);
                if let Some(why) = self.fenced.clone().or_else(|| self.store.held()) {
                    // A closed channel means that the session ended already.
                    let _ = replies.send(Message::error(self.id, ErrorCode::Target, &why));
                    return;
                }
                self.sessions.push((session, replies));
                self.disk.handle_open(now, session, &head);
            }
            DiskInput::Mark(mark) => self.accept_mark(session, &mark),
            DiskInput::Compare(request, units) => self.disk.handle_compare(session, request, units),
            DiskInput::PassBegin(begin) => self.disk.handle_pass_begin(now, session, &begin),
            DiskInput::PassEnd(end) => self.disk.handle_pass_end(now, session, &end),
            DiskInput::PointDegrade(degrade) => {
                if self.disk.handle_degrade(session, &degrade) {
                    let (from, to, cause) = (degrade.from, degrade.to, degrade.cause.as_str());
                    if self.store.degrade(&degrade) {
                        tracing::warn!(disk = %self.id, %from, %to, cause, "points are degraded by the agent");
                    }
                }
            }
            DiskInput::Batch(_) | DiskInput::Bulk(_) => {} // taken by the opener
        }
    }

    /// A fence is answered when its generation is durable, or never will be. Who asked may have given up.
    fn answer_fences(&mut self) {
        if self.disk.phase() == TargetDiskPhase::Failed {
            let why = "the disk is stopped; see `status`";
            self.fencing.drain(..).for_each(|answer| drop(answer.send(Err(why.to_owned()))));
        } else if self.disk.is_settled() {
            let generation = self.disk.state().generation;
            self.fencing.drain(..).for_each(|answer| drop(answer.send(Ok(generation))));
        }
    }

    /// The target grows when everything that was accepted is durable. Who asked may have given up.
    fn grow(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        let failed = self.disk.phase() == TargetDiskPhase::Failed;
        let Some(order) = self.growing.take_if(|_| failed || self.disk.is_settled()) else { return };
        let stands = failed.then(|| "the disk is stopped; see `status`".to_owned());
        if let Some(why) = stands.or_else(|| self.fenced.clone()).or_else(|| self.store.held()) {
            return drop(order.answer.send(Err(why)));
        }
        let grown = match self.store.grow(&order.opener, order.size_bytes) {
            Ok(()) => {
                self.disk.handle_grown(mono_clock(), order.size_bytes / SECTOR_BYTES);
                self.execute(inputs);
                Ok(())
            }
            Err(NotGrown::Refused(why)) => Err(why),
            Err(NotGrown::Failed(why)) => {
                self.fail(&why);
                self.execute(inputs);
                Err(why)
            }
        };
        drop(order.answer.send(grown));
    }

    /// A batch failed its checks: the transport guards its bytes, so a memory or a program at the other end is broken.
    /// The session ends; the agent comes back and sends what is not durable again.
    fn end_session(&self, session: SessionId, reason: &str) {
        tracing::warn!(disk = %self.id, session = session.0, reason, "a batch failed its checks; the session ends");
        if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
            let text = format!("a batch of disk {} failed its checks: {reason}", self.id);
            // A closed channel means that the session ended already.
            let _ = replies.send(Message::error(DiskId::NONE, ErrorCode::Protocol, &text));
        }
    }

    /// Executes what the core ordered, in order.
    fn execute(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        while let Some(action) = self.disk.poll_action() {
            match action {
                DiskAction::Write { pieces, cost } => {
                    if !self.write(&pieces, inputs) {
                        continue;
                    }
                    self.status.wrote(&pieces);
                    self.disk.handle_written(cost);
                }
                DiskAction::Hash { session, request, units } => {
                    if let Some(answer) = self.hash(&request, &units, inputs) {
                        if units.is_empty() {
                            self.receipts.compared(request.range.bytes());
                        }
                        self.disk.handle_hashed(session, &request, answer);
                    }
                }
                DiskAction::Checkpoint { state } => self.checkpoint(&state, Some(inputs)),
                DiskAction::Reply { session, message } => {
                    if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
                        // A closed channel means that the session ended; Lost is on its way.
                        let _ = replies.send(message);
                    }
                }
            }
        }
        while let Some(notice) = self.disk.poll_notice() {
            self.log(&notice);
            self.write_down(&notice);
            self.status.notice(&notice);
        }
        self.receipts.tick();
        self.status.update(&self.disk);
    }

    /// Passes have receipts.
    fn write_down(&mut self, notice: &DiskNotice) {
        let state = self.disk.state();
        let (mode, pass, size_bytes) = (state.mode, state.pass, state.whole().bytes());
        match notice {
            DiskNotice::Opened(_) => self.receipts.opened(mode, pass, size_bytes),
            DiskNotice::Resync(cause) => self.receipts.begin(*cause, size_bytes),
            DiskNotice::Synced => self.receipts.done(),
            DiskNotice::FencedSession(_) | DiskNotice::Marked(_) => {}
        }
    }

    fn log(&self, notice: &DiskNotice) {
        match notice {
            DiskNotice::Opened(generation) => {
                tracing::info!(disk = %self.id, %generation, "opened by its agent")
            }
            DiskNotice::Synced => tracing::info!(disk = %self.id, "the whole disk is on the target"),
            DiskNotice::Resync(cause) => tracing::warn!(disk = %self.id, ?cause, "a compare pass begins"),
            DiskNotice::FencedSession(session) => {
                tracing::warn!(disk = %self.id, session = session.0, "an older session was fenced");
            }
            DiskNotice::Marked(sequence) => tracing::debug!(disk = %self.id, %sequence, "mark durable"),
        }
    }

    /// Writes the pieces; waits while the medium is full. Answers whether it succeeded; if not, the disk is stopped.
    fn write(&mut self, pieces: &[Piece], inputs: &sync_mpsc::Receiver<Opened>) -> bool {
        for keep in pieces.iter().flat_map(|piece| &piece.keep) {
            self.compared.forget(*keep);
        }
        loop {
            match self.store.write(pieces) {
                Ok(()) => {
                    self.there_is_space();
                    return true;
                }
                Err(NotDone::Full(text)) => {
                    if !self.wait_for_space(&text, Some(inputs)) {
                        return false;
                    }
                }
                Err(NotDone::Failed(text)) => {
                    self.fail(&text);
                    return false;
                }
                Err(NotDone::GivenUp(text)) => {
                    self.stop(&text);
                    return false;
                }
            }
        }
    }

    /// Tells once that the medium is full, then waits a little and takes what comes meanwhile: that only queues up
    /// behind the action in hand. Answers whether to try again.
    fn wait_for_space(&mut self, error: &str, inputs: Option<&sync_mpsc::Receiver<Opened>>) -> bool {
        let text = format!("{error}; free space there, replication goes on by itself");
        if !self.waiting {
            tracing::error!(disk = %self.id, "{text}");
            self.status.set_problem(Some(text.clone()));
            self.disk.handle_full(&text);
            self.waiting = true;
        }
        if let Some(order) = self.growing.take() {
            // Who waits for it keeps others from changing the set of disks.
            drop(order.answer.send(Err(text.clone())));
        }
        self.fencing.drain(..).for_each(|answer| drop(answer.send(Err(text.clone()))));
        self.flush_replies();
        self.status.update(&self.disk);
        let stopped = "stopped while the medium was full";
        let Some(inputs) = inputs.filter(|_| !self.stopping.load(Ordering::Acquire)) else {
            self.fail(stopped);
            return false;
        };
        match inputs.recv_timeout(FULL_RETRY) {
            Ok(Opened::Stop) | Err(sync_mpsc::RecvTimeoutError::Disconnected) => {
                self.fail(stopped);
                false
            }
            Ok(other) => {
                self.handle(other);
                self.disk.phase() != TargetDiskPhase::Failed
            }
            Err(sync_mpsc::RecvTimeoutError::Timeout) => true,
        }
    }

    fn there_is_space(&mut self) {
        if std::mem::take(&mut self.waiting) {
            tracing::info!(disk = %self.id, "there is space again; going on");
            self.status.set_problem(None);
        }
    }

    /// Sends the replies that stand first in the queue, without executing anything else.
    fn flush_replies(&mut self) {
        while let Some(DiskAction::Reply { session, message }) = self.disk.poll_reply() {
            if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
                let _ = replies.send(message);
            }
        }
    }

    fn checkpoint(&mut self, state: &DiskState, inputs: Option<&sync_mpsc::Receiver<Opened>>) {
        loop {
            match self.store.checkpoint(state) {
                Ok(()) => {
                    self.there_is_space();
                    return self.disk.handle_checkpointed(mono_clock());
                }
                Err(NotDone::Full(text)) => {
                    if !self.wait_for_space(&text, inputs) {
                        return;
                    }
                }
                Err(NotDone::Failed(text)) => return self.fail(&text),
                Err(NotDone::GivenUp(text)) => return self.stop(&text),
            }
        }
    }

    /// What a compare asks for; waits while the medium is too full for what must be applied before. `None`: the disk is
    /// stopped.
    fn hash(
        &mut self,
        request: &CompareRequestHead,
        units: &[RefineUnit],
        inputs: &sync_mpsc::Receiver<Opened>,
    ) -> Option<CompareAnswer> {
        loop {
            match self.hash_once(request, units) {
                Ok(answer) => {
                    self.there_is_space();
                    return Some(answer);
                }
                Err(NotDone::Full(text)) => {
                    if !self.wait_for_space(&text, Some(inputs)) {
                        return None;
                    }
                }
                Err(NotDone::Failed(text)) => {
                    self.fail(&text);
                    return None;
                }
                Err(NotDone::GivenUp(text)) => {
                    self.stop(&text);
                    return None;
                }
            }
        }
    }

    /// A chunk is kept for the question that follows; where it is not any more, the units that differ are read again.
    fn hash_once(
        &mut self,
        request: &CompareRequestHead,
        units: &[RefineUnit],
    ) -> Result<CompareAnswer, NotDone> {
        let len = request.range.bytes() as usize;
        if !units.is_empty() {
            if let Some(kept) = self.compared.take(request.range) {
                return Ok(answer(units, kept.get(..len).unwrap_or_default()));
            }
            self.chunk.resize(CHUNK_BYTES as usize, 0);
            let data = self.chunk.get_mut(..len).unwrap_or_default();
            self.store.read_parts(request.range, &wanted(request.range, units), data)?;
            return Ok(answer(units, data));
        }
        if self.store.is_hole(byte_range(request.range))? {
            let hashes = vec![UnitHash::ZEROS; unit_count(request.range)];
            return Ok(CompareAnswer { hashes, masks: Vec::new() });
        }
        let mut kept = self.compared.buffer();
        if kept.is_none() {
            self.chunk.resize(CHUNK_BYTES as usize, 0);
        }
        let whole = kept.as_deref_mut().unwrap_or(&mut self.chunk);
        let data = whole.get_mut(..len).unwrap_or_default();
        let hashes = read_and_hash(&mut self.store, byte_range(request.range), data)?;
        if let Some(kept) = kept {
            self.compared.keep(request.range, kept);
        }
        Ok(CompareAnswer { hashes, masks: Vec::new() })
    }

    /// A batch, and its bytes as they were received; answers whether it was accepted.
    fn accept(&mut self, kind: EntryKind, body: Bytes, hand_in: impl FnOnce(&mut TargetDisk)) -> bool {
        let before = self.disk.writes_ordered();
        hand_in(&mut self.disk);
        let accepted = self.disk.writes_ordered() > before;
        if accepted {
            self.store.accepted(kind, body, self.disk.state().sequence);
        }
        accepted
    }

    fn accept_mark(&mut self, session: SessionId, mark: &Mark) {
        let before = self.disk.marks_accepted();
        self.disk.handle_mark(mono_clock(), session, mark);
        if self.disk.marks_accepted() > before {
            self.status.set_unread(mark.unread_blocks);
            self.store.marked(mark);
        }
    }

    /// Nothing is under way: what waits in the journal is applied.
    fn apply(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        while self.disk.phase() != TargetDiskPhase::Failed {
            match self.store.apply() {
                Ok(None) => return,
                Ok(Some(applied)) => {
                    self.there_is_space();
                    return self.disk.handle_applied(applied);
                }
                Err(NotDone::Full(text)) => {
                    if !self.wait_for_space(&text, Some(inputs)) {
                        return;
                    }
                }
                Err(NotDone::Failed(text)) => return self.fail(&text),
                Err(NotDone::GivenUp(text)) => return self.stop(&text),
            }
        }
    }

    fn fail(&mut self, reason: &str) {
        self.stop(&format!(
            "{reason}; nothing more is written to this disk; repair the medium, then restart"
        ));
    }

    /// Nothing more is written to this disk; `text` says why and what is to be done.
    fn stop(&mut self, text: &str) {
        tracing::error!(disk = %self.id, "{text}");
        self.status.set_problem(Some(text.to_owned()));
        self.disk.handle_failed(text);
        self.flush_replies();
    }

    /// A panic ended the thread: says so and leaves the target as after a crash.
    pub(crate) fn panicked(&mut self, panic: &str) {
        let text = broken(panic);
        tracing::error!(disk = %self.id, "{text}");
        self.status.set_failed(&text);
        self.tell_sessions(ErrorCode::Target, &text);
    }

    fn tell_sessions(&self, code: ErrorCode, text: &str) {
        for (_, replies) in &self.sessions {
            // A closed channel means that the session ended already.
            let _ = replies.send(Message::error(self.id, code, text));
        }
    }

    /// Makes what was written durable and leaves the target as any reader expects it.
    pub(crate) fn close(mut self) {
        self.disk.handle_stop(mono_clock());
        while let Some(action) = self.disk.poll_action() {
            if let DiskAction::Checkpoint { state } = action {
                self.checkpoint(&state, None);
            }
        }
        // What waits was acknowledged as durable and is in the log; it is applied now so that the target is complete.
        let applied =
            if self.disk.phase() == TargetDiskPhase::Failed { Ok(None) } else { self.store.apply() };
        if let Err(NotDone::Full(text) | NotDone::Failed(text)) = applied {
            tracing::error!(disk = %self.id, "{text}; it is applied at the next start");
        }
        if let Err(error) = self.store.close() {
            tracing::error!(disk = %self.id, %error, "the target could not be closed cleanly");
            self.status.set_failed(&format!("the target could not be closed cleanly: {error}"));
        }
        self.status.set_closed();
    }
}

/// Reads a part of the target in two halves: while the second is read, the first is hashed, so that the medium has something to
/// do meanwhile.
fn read_and_hash(store: &mut DiskStore, range: ByteRange, data: &mut [u8]) -> Result<Vec<UnitHash>, NotDone> {
    let middle = (data.len() / 2).next_multiple_of(COMPARE_UNIT_BYTES as usize).min(data.len());
    let border = range.start + middle as u64;
    let (first, second) = data.split_at_mut(middle);
    store.read(ByteRange { end: border, ..range }, first)?;
    let first = &*first;
    std::thread::scope(|scope| {
        let helper = std::thread::Builder::new().name("hash".to_owned());
        let hashing = helper.spawn_scoped(scope, || unit_hashes(first));
        if !second.is_empty() {
            store.read(ByteRange { start: border, ..range }, second)?;
        }
        let rest = unit_hashes(second);
        let mut hashes = match hashing.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(hashes)) => hashes,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => unit_hashes(first), // no thread to be had
        };
        hashes.extend(rest);
        Ok(hashes)
    })
}

fn broken(panic: &str) -> String {
    format!(
        "a defect of the master target stopped this disk: {panic}; restart it and report this with its log"
    )
}

#[cfg(test)]
mod comparing;
#[cfg(test)]
mod full;
