//! One disk at the target: who may write it, in what order, with how much credit, and when its writes are durable.
//!
//! Call order: `handle_*`, then drain [`TargetDisk::poll_action`]; the driver executes [`DiskAction`]s **strictly in
//! the order they come**, one after another, and reports each, but sends replies at once (also by
//! [`TargetDisk::poll_reply`] while it waits for space); [`TargetDisk::handle_timeout`] at
//! [`TargetDisk::poll_timeout`]. A driver that took actions out and did not start them when it reports
//! [`TargetDisk::handle_failed`] forgets them.
//!
//! Invariants: a generation is durable before its GRANT is sent, and lower ones are refused from the moment it is
//! chosen (I9); the state that a checkpoint records was true when the checkpoint was ordered, and everything ordered
//! before it was executed before it, so `durable` never runs ahead of the medium (I5); a failed write or flush stops
//! the disk (I6); bulk never overwrites what delta wrote since the pass began.
//! Units: sectors, sequences, credit cost in bytes. Called by `master-target/src/disk_worker.rs` and the simulator.

mod answers;
mod fence;
mod grow;

use std::collections::VecDeque;

use super::credit::{FlowLimits, Window};
use super::state::TargetDiskPhase;
use crate::format::batch::{BatchHeader, BulkHeader, CHAIN_START, Chain, Mark, credit_cost};
use crate::format::disk_state::DiskState;
use crate::format::extent::Record;
use crate::format::message::{
    CompareAnswer, CompareHashesHead, CompareRequestHead, ErrorCode, Message, NackReason, OpenDiskHead,
    PassBegin, PassCause, PassEnd, PassMode, PointDegrade, RefineUnit, SourceId,
};
use crate::limits::CHUNKS_OPEN_MAX;
use crate::mutants::{Mutant, mutant};
use crate::range_set::RangeSet;
use crate::units::{DiskId, Generation, LineageId, MonoTime, PeerId, SectorRange, Sequence};

/// Requests for hashes that may wait for a disk: a walk has two for each of its chunks under way, and four walks may
/// follow each other before their answers do.
pub(super) const HASHES_WAITING_MAX: usize = 8 * CHUNKS_OPEN_MAX;

/// Names a session at the target; never reused while the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A record to be written and the parts of it that bulk may still write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The record; its payload was checked before it was handed in.
    pub record: Record,
    /// Which of its sectors to write, ascending.
    pub keep: Vec<SectorRange>,
}

/// What the driver is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskAction {
    /// Write these; then [`TargetDisk::handle_written`] with the cost.
    Write {
        /// The pieces; later ones win where delta overlaps itself.
        pieces: Vec<Piece>,
        /// To be reported back.
        cost: u64,
    },
    /// Compare the target as [`super::compare::answer`] says; then [`TargetDisk::handle_hashed`].
    Hash {
        /// Who asked.
        session: SessionId,
        /// What was asked.
        request: CompareRequestHead,
        /// Units to refine; empty for hashes of the whole range.
        units: Vec<RefineUnit>,
    },
    /// Flush the target, then make the state durable; then [`TargetDisk::handle_checkpointed`].
    Checkpoint {
        /// The state.
        state: Box<DiskState>,
    },
    /// Send to a session (GRANTs get their signature there). Replies keep their own order and wait for nothing else: they
    /// speak of what is already done.
    Reply {
        /// To whom.
        session: SessionId,
        /// What.
        message: Message,
    },
}

/// Something an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskNotice {
    /// The disk is open.
    Opened(Generation),
    /// The whole disk is on the target.
    Synced,
    /// A compare pass began.
    Resync(PassCause),
    /// A session that had the disk open was fenced.
    FencedSession(SessionId),
    /// A mark is durable.
    Marked(Sequence),
}

#[derive(Debug)]
struct Checkpoint {
    cost: u64,
    sequence: Sequence,
    marked: Sequence,
    /// Number of the last mark, of this generation.
    mark: u64,
    generation: Generation,
    /// The pass that `settled` and `ends_pass` speak of: another may have begun when the checkpoint is done.
    pass: u64,
    settled: RangeSet,
    ends_pass: bool,
    /// Who is granted the disk when this is done, and the generation that is then durable.
    grants: Option<(SessionId, Generation)>,
    announces_pass: bool,
}

/// One disk at the target.
#[derive(Debug)]
pub struct TargetDisk {
    phase: TargetDiskPhase,
    /// What the next checkpoint records.
    state: DiskState,
    /// Whether `state` says more than the last ordered checkpoint.
    dirty: bool,
    session: Option<SessionId>,
    received: Sequence,
    nacked: bool,
    window: Window,
    unflushed_bytes: u64,
    dirty_since: Option<MonoTime>,
    fresh_settled: RangeSet,
    pass_end_wanted: bool,
    pass_announce: bool,
    opening: Option<SessionId>,
    running: Option<Checkpoint>,
    durable: Sequence,
    /// What is on the target, flushed; `None` where that is the same as durable.
    applied: Option<Sequence>,
    /// How many writes were ever ordered.
    writes_ordered: u64,
    /// Number of the last mark accepted in this generation, and of the last one that a finished checkpoint recorded.
    mark: u64,
    durable_mark: u64,
    /// How many marks were ever accepted.
    marks_accepted: u64,
    /// Sequence of the last mark that a finished checkpoint recorded.
    durable_marked: Sequence,
    ever_opened: bool,
    hashes_waiting: usize,
    limits: FlowLimits,
    actions: VecDeque<DiskAction>,
    replies: VecDeque<DiskAction>,
    notices: VecDeque<DiskNotice>,
}

impl TargetDisk {
    /// The state of a disk that was never opened; `mode` is [`PassMode::Copy`] only for a target that is known to
    /// read as zeros everywhere.
    #[must_use]
    pub fn new_state(
        disk: DiskId,
        agent: PeerId,
        source: SourceId,
        size_sectors: u64,
        lineage: LineageId,
        mode: PassMode,
    ) -> DiskState {
        DiskState {
            disk,
            agent,
            source,
            size_sectors,
            generation: Generation::ZERO,
            lineage,
            sequence: Sequence::ZERO,
            chain: CHAIN_START,
            marked: Sequence::ZERO,
            pass: 1,
            mode,
            settled: RangeSet::new(),
            touched: RangeSet::new(),
        }
    }

    /// A disk whose state was read back (or is new).
    #[must_use]
    pub fn new(state: DiskState, limits: FlowLimits) -> Self {
        Self {
            phase: TargetDiskPhase::Closed,
            received: state.sequence,
            durable: state.sequence,
            applied: None,
            writes_ordered: 0,
            mark: 0,
            durable_mark: 0,
            marks_accepted: 0,
            durable_marked: state.marked,
            ever_opened: state.generation > Generation::ZERO,
            state,
            dirty: false,
            session: None,
            nacked: false,
            window: Window::new(limits),
            unflushed_bytes: 0,
            dirty_since: None,
            fresh_settled: RangeSet::new(),
            pass_end_wanted: false,
            pass_announce: false,
            opening: None,
            running: None,
            hashes_waiting: 0,
            limits,
            actions: VecDeque::new(),
            replies: VecDeque::new(),
            notices: VecDeque::new(),
        }
    }

    /// The state as the next checkpoint would record it.
    #[must_use]
    pub const fn state(&self) -> &DiskState {
        &self.state
    }

    /// Where the disk stands.
    #[must_use]
    pub const fn phase(&self) -> TargetDiskPhase {
        self.phase
    }

    /// The durable (and applied) sequence.
    #[must_use]
    pub const fn durable(&self) -> Sequence {
        self.durable
    }

    /// From now on what is durable is not on the target yet: the driver says what is with [`Self::handle_applied`].
    pub fn set_applied(&mut self, applied: Sequence) {
        debug_assert!(applied <= self.durable);
        self.applied = Some(applied);
    }

    /// Everything up to a sequence is on the target and flushed (I5).
    pub fn handle_applied(&mut self, applied: Sequence) {
        debug_assert!(self.applied.is_none_or(|before| before <= applied));
        self.applied = Some(applied.min(self.durable));
    }

    /// How many writes were ever ordered: tells a driver whether what it handed in was accepted.
    #[must_use]
    pub const fn writes_ordered(&self) -> u64 {
        self.writes_ordered
    }

    /// How many marks were ever accepted: tells a driver whether what it handed in was.
    #[must_use]
    pub const fn marks_accepted(&self) -> u64 {
        self.marks_accepted
    }

    /// OPEN_DISK by a session whose grant was checked.
    pub fn handle_open(&mut self, now: MonoTime, session: SessionId, open: &OpenDiskHead) {
        if self.phase == TargetDiskPhase::Failed {
            let text = "the target failed; look at the master target's log, then restart it";
            return self.refuse(session, ErrorCode::Target, text);
        }
        if open.size_sectors != self.state.size_sectors {
            let text = format!(
                "the source has {} sectors, the target {}; reload the agent, or protect the disk anew",
                open.size_sectors, self.state.size_sectors
            );
            return self.refuse(session, ErrorCode::Size, &text);
        }
        if open.generation != self.state.generation {
            return self.reply(session, Message::Fenced(self.fenced()));
        }
        self.phase.become_state(TargetDiskPhase::Opening);
        if !(mutant(Mutant::ReuseGeneration) && self.ever_opened) {
            self.state.generation = self.state.generation.next();
        }
        if self.ever_opened && self.state.mode == PassMode::Copy {
            self.state.mode = PassMode::Compare; // something was perhaps written and not recorded
        }
        self.ever_opened = true;
        let opening = self.opening.replace(session);
        for old in [self.session.take(), opening].into_iter().flatten().filter(|old| *old != session) {
            self.reply(old, Message::Fenced(self.fenced()));
            self.notices.push_back(DiskNotice::FencedSession(old));
        }
        self.received = self.state.sequence;
        (self.mark, self.durable_mark) = (0, 0);
        self.nacked = false;
        self.pass_end_wanted = false;
        self.pass_announce = false;
        self.touch(now);
        self.checkpoint_if_due(now, true);
        if mutant(Mutant::GrantEarly) {
            self.grant(session);
        }
    }

    /// A delta batch whose payload was checked. What a peer does wrong is answered, never an error here.
    pub fn handle_batch(
        &mut self,
        now: MonoTime,
        session: SessionId,
        header: &BatchHeader,
        records: Vec<Record>,
    ) {
        if !self.may_write(session, header.generation) {
            return self.fence(session);
        }
        let cost = credit_cost(&records);
        if !self.window.accept(cost) {
            return self.expel(session, ErrorCode::Limit, "a batch was sent without credit");
        }
        let chain = (header.lineage == self.state.lineage).then_some(self.state.chain);
        let last = header.last_sequence();
        let twice = mutant(Mutant::AcceptTwice) && last <= self.received;
        if chain.is_some() && last <= self.received && !twice {
            self.window_dropped(cost);
            if last <= self.durable {
                self.ack(session);
            }
            return;
        }
        let gap = header.first_sequence > self.received.next();
        if gap && !mutant(Mutant::ContinueOverGap) {
            self.window_dropped(cost);
            if !self.nacked {
                self.nacked = true;
                self.nack(session, NackReason::Gap);
            }
            return;
        }
        let follows = header.first_sequence == self.received.next() && chain == Some(header.chain);
        if !follows && !twice && !gap {
            let text = "the stream's history does not fit what the target holds; a person must choose a side";
            return self.expel(session, ErrorCode::Fork, text);
        }
        if let Some(bad) = records.iter().find(|record| record.range().end > self.state.size_sectors) {
            let text = format!("{} lie outside the granted disk", bad.range());
            return self.expel(session, ErrorCode::Grant, &text);
        }
        self.nacked = false;
        self.received = last;
        self.state.sequence = last;
        self.state.chain = header.chain_after(&records);
        if self.state.mode != PassMode::Done {
            for record in &records {
                for unsettled in self.state.settled.missing(record.range()) {
                    self.state.touched.insert(unsettled);
                }
            }
        }
        let piece = |record: Record| Piece { keep: vec![record.range()], record };
        let mut pieces: Vec<Piece> = records.into_iter().map(piece).collect();
        if mutant(Mutant::ReverseRecords) {
            pieces.reverse();
        }
        self.order_write(now, pieces, cost);
    }

    /// A delta batch whose head could be read and whose payload failed its checks; `cost` is its credit cost. One whose
    /// head cannot be read ends the session instead: nobody can tell what it was.
    pub fn handle_damaged(&mut self, session: SessionId, generation: Generation, cost: u64) {
        if !self.may_write(session, generation) {
            return self.fence(session);
        }
        if !self.window.accept(cost) {
            return self.expel(session, ErrorCode::Limit, "a batch was sent without credit");
        }
        self.window_dropped(cost);
        self.nacked = true; // what follows it is a gap that is known
        self.nack(session, NackReason::Damaged);
    }

    /// A mark in the delta stream.
    pub fn handle_mark(&mut self, now: MonoTime, session: SessionId, mark: &Mark) {
        if !self.may_write(session, mark.generation) {
            return self.fence(session);
        }
        if mark.lineage != self.state.lineage || mark.sequence > self.received {
            return; // its batches were refused and are being sent again, the mark with them
        }
        if mark.sequence == self.received && mark.chain == self.state.chain && mark.number > self.mark {
            self.state.marked = mark.sequence;
            self.mark = mark.number;
            self.marks_accepted += 1;
            self.touch(now);
            self.checkpoint_if_due(now, true);
        }
    }

    /// Points promise less than was said; answers whether the driver is to record it.
    pub fn handle_degrade(&mut self, session: SessionId, degrade: &PointDegrade) -> bool {
        if !self.may_write(session, degrade.generation) {
            self.fence(session);
            return false;
        }
        true
    }

    /// A bulk batch whose payload was checked.
    pub fn handle_bulk(
        &mut self,
        now: MonoTime,
        session: SessionId,
        header: &BulkHeader,
        records: Vec<Record>,
    ) {
        if !self.may_write(session, header.generation) {
            return self.fence(session);
        }
        let cost = credit_cost(&records);
        if !self.window.accept(cost) {
            return self.expel(session, ErrorCode::Limit, "a batch was sent without credit");
        }
        if header.pass != self.state.pass || self.state.mode == PassMode::Done {
            return self.window_dropped(cost); // of a pass that is over
        }
        if !self.state.whole().contains(header.cover) {
            let text = format!("{} lie outside the granted disk", header.cover);
            return self.expel(session, ErrorCode::Grant, &text);
        }
        let pieces = records
            .into_iter()
            .map(|record| Piece { keep: self.bulk_may_write(record.range()), record })
            .filter(|piece| !piece.keep.is_empty())
            .collect::<Vec<_>>();
        self.state.settled.insert(header.cover);
        self.state.touched.remove(header.cover);
        self.fresh_settled.insert(header.cover);
        self.order_write(now, pieces, cost);
    }

    /// What bulk may write of a range: not what delta wrote since the pass began, and nothing twice in one pass, for
    /// what came after the first time is not remembered.
    fn bulk_may_write(&self, range: SectorRange) -> Vec<SectorRange> {
        let unsettled = self.state.settled.missing(range);
        if mutant(Mutant::BulkOverDelta) {
            return unsettled;
        }
        unsettled.into_iter().flat_map(|part| self.state.touched.missing(part)).collect()
    }

    /// A request for hashes.
    pub fn handle_compare(
        &mut self,
        session: SessionId,
        request: CompareRequestHead,
        units: Vec<RefineUnit>,
    ) {
        if !self.may_write(session, request.generation) {
            return self.fence(session);
        }
        if !self.state.whole().contains(request.range) {
            let text = format!("{} lie outside the granted disk", request.range);
            return self.expel(session, ErrorCode::Grant, &text);
        }
        if self.hashes_waiting >= HASHES_WAITING_MAX {
            return self.expel(session, ErrorCode::Limit, "too many requests for hashes at once");
        }
        self.hashes_waiting += 1;
        self.actions.push_back(DiskAction::Hash { session, request, units });
    }

    /// The agent asks for a compare pass.
    pub fn handle_pass_begin(&mut self, now: MonoTime, session: SessionId, begin: &PassBegin) {
        if !self.may_write(session, begin.generation) {
            return self.fence(session);
        }
        self.state.pass += 1;
        self.state.mode = PassMode::Compare;
        if !mutant(Mutant::KeepSettled) {
            self.state.settled.clear();
        }
        self.state.touched.clear();
        self.fresh_settled.clear();
        self.pass_end_wanted = false;
        self.pass_announce = true;
        self.notices.push_back(DiskNotice::Resync(begin.cause));
        self.touch(now);
        self.checkpoint_if_due(now, true);
    }

    /// The agent says that it covered the disk.
    pub fn handle_pass_end(&mut self, now: MonoTime, session: SessionId, end: &PassEnd) {
        if !self.may_write(session, end.generation) {
            return self.fence(session);
        }
        if end.pass != self.state.pass {
            return;
        }
        if self.state.mode == PassMode::Done {
            return self.reply(session, Message::PassState(self.pass_state()));
        }
        if self.state.settled.contains(self.state.whole()) {
            self.pass_end_wanted = true;
            self.touch(now);
            self.checkpoint_if_due(now, true);
        } else {
            self.refuse(session, ErrorCode::Protocol, "the pass was ended before it covered the disk");
        }
    }

    /// A session is gone.
    pub fn handle_session_lost(&mut self, now: MonoTime, session: SessionId) {
        if self.opening == Some(session) {
            self.opening = None;
        }
        if self.session == Some(session) {
            self.session = None;
        }
        if self.session.is_none()
            && self.opening.is_none()
            && matches!(self.phase, TargetDiskPhase::Open | TargetDiskPhase::Opening)
        {
            self.phase.become_state(TargetDiskPhase::Closed);
        }
        if let Some(running) = &mut self.running
            && running.grants.is_some_and(|(granted, _)| granted == session)
        {
            running.grants = None;
        }
        self.checkpoint_if_due(now, self.dirty);
    }

    /// A [`DiskAction::Write`] is done.
    pub fn handle_written(&mut self, cost: u64) {
        self.window_written(cost);
    }

    /// A [`DiskAction::Hash`] is done.
    pub fn handle_hashed(&mut self, session: SessionId, request: &CompareRequestHead, answer: CompareAnswer) {
        self.hashes_waiting = self.hashes_waiting.saturating_sub(1);
        let head = CompareHashesHead {
            disk: request.disk,
            generation: request.generation,
            request: request.request,
            hash_count: answer.hashes.len() as u32,
            mask_count: answer.masks.len() as u16, // at most a chunk's units
        };
        self.reply(session, Message::CompareHashes(head, answer));
    }

    /// A [`DiskAction::Checkpoint`] is done: what it recorded is durable.
    pub fn handle_checkpointed(&mut self, now: MonoTime) {
        let Some(done) = self.running.take() else { return };
        self.durable = if mutant(Mutant::AcknowledgeEarly) { self.state.sequence } else { done.sequence };
        self.durable_marked = done.marked;
        if done.generation == self.state.generation {
            self.durable_mark = if mutant(Mutant::MarkEarly) { self.mark } else { done.mark };
        }
        self.window.made_durable(done.cost);
        if done.marked > Sequence::ZERO && done.marked == done.sequence {
            self.notices.push_back(DiskNotice::Marked(done.marked));
        }
        if done.ends_pass {
            self.notices.push_back(DiskNotice::Synced);
        }
        if let Some((session, generation)) = done.grants
            && self.opening == Some(session)
            && self.state.generation == generation
        {
            self.grant(session);
        } else if let Some(session) = self.session {
            self.acknowledge(session, &done);
        }
        self.checkpoint_if_due(now, false);
    }

    /// The driver could not write or flush: the disk stops (I6).
    pub fn handle_failed(&mut self, reason: &str) {
        if self.phase == TargetDiskPhase::Failed {
            return;
        }
        self.phase.become_state(TargetDiskPhase::Failed);
        self.actions.clear();
        self.hashes_waiting = 0;
        self.running = None;
        for session in [self.session.take(), self.opening.take()].into_iter().flatten() {
            self.refuse(session, ErrorCode::Target, reason);
        }
    }

    /// The driver waits for space: tell the session, nothing else changes.
    pub fn handle_full(&mut self, reason: &str) {
        if let Some(session) = self.session {
            self.refuse(session, ErrorCode::Full, reason);
        }
    }

    /// The daemon stops: sessions are forgotten, what was written is made durable.
    pub fn handle_stop(&mut self, now: MonoTime) {
        self.session = None;
        self.opening = None;
        if matches!(self.phase, TargetDiskPhase::Open | TargetDiskPhase::Opening) {
            self.phase.become_state(TargetDiskPhase::Closed);
        }
        self.checkpoint_if_due(now, self.dirty);
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<MonoTime> {
        self.dirty_since
            .filter(|_| self.running.is_none() && self.phase != TargetDiskPhase::Failed)
            .map(|since| since.plus_nanos(self.limits.flush_nanos))
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: MonoTime) {
        let due = self.poll_timeout().is_some_and(|at| now >= at);
        self.checkpoint_if_due(now, due);
    }

    /// The next thing to do; replies come first.
    pub fn poll_action(&mut self) -> Option<DiskAction> {
        self.poll_reply().or_else(|| self.actions.pop_front())
    }

    /// The next reply alone: what a driver sends while it is busy with an action, or waits for space.
    pub fn poll_reply(&mut self) -> Option<DiskAction> {
        self.replies.pop_front()
    }

    /// The next thing to tell.
    pub fn poll_notice(&mut self) -> Option<DiskNotice> {
        self.notices.pop_front()
    }

    fn may_write(&self, session: SessionId, generation: Generation) -> bool {
        let granted = self.session == Some(session) && generation == self.state.generation;
        self.phase == TargetDiskPhase::Open && (granted || mutant(Mutant::AcceptOldGeneration))
    }

    fn order_write(&mut self, now: MonoTime, pieces: Vec<Piece>, cost: u64) {
        self.unflushed_bytes += cost;
        self.touch(now);
        self.writes_ordered += 1;
        self.actions.push_back(DiskAction::Write { pieces, cost });
        self.checkpoint_if_due(now, false);
    }

    const fn touch(&mut self, now: MonoTime) {
        self.dirty = true;
        if self.dirty_since.is_none() {
            self.dirty_since = Some(now);
        }
    }

    /// Orders a checkpoint when one is due and none runs; everything ordered before it is covered by it.
    fn checkpoint_if_due(&mut self, now: MonoTime, wanted: bool) {
        let wanted = wanted
            || self.unflushed_bytes >= self.limits.flush_bytes
            || self.opening.is_some()
            || self.pass_end_wanted
            || self.pass_announce
            || self.is_covered()
            || self.dirty_since.is_some_and(|since| now >= since.plus_nanos(self.limits.flush_nanos));
        if !wanted || !self.dirty || self.running.is_some() || self.phase == TargetDiskPhase::Failed {
            return;
        }
        let ends_pass = std::mem::take(&mut self.pass_end_wanted);
        if ends_pass {
            self.state.mode = PassMode::Done;
            self.state.settled.clear();
            self.state.touched.clear();
        }
        self.dirty = false;
        self.dirty_since = None;
        self.running = Some(Checkpoint {
            cost: std::mem::take(&mut self.unflushed_bytes),
            sequence: self.state.sequence,
            marked: self.state.marked,
            mark: self.mark,
            generation: self.state.generation,
            pass: self.state.pass,
            settled: std::mem::take(&mut self.fresh_settled),
            ends_pass,
            grants: self.opening.map(|session| (session, self.state.generation)),
            announces_pass: std::mem::take(&mut self.pass_announce),
        });
        self.actions.push_back(DiskAction::Checkpoint { state: Box::new(self.state.clone()) });
    }

    /// The last batch of a pass came: its agent ends the pass when it hears that all of it is durable, so nothing more comes
    /// that a flush could wait for.
    fn is_covered(&self) -> bool {
        !self.fresh_settled.is_empty() && self.state.settled.contains(self.state.whole())
    }

    /// The chain digest of everything accepted.
    #[must_use]
    pub const fn chain(&self) -> Chain {
        self.state.chain
    }
}
