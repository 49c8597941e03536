//! The agent's end of the protocol: one session with one master target (directly or through a process server), and
//! all disks it may open there.
//!
//! Call order: [`Agent::handle_connected`], then frames by [`Agent::handle_frame`]; after every call drain
//! [`Agent::poll_transmit`] and [`Agent::poll_event`]; [`Agent::handle_disconnected`] when the connection is gone,
//! after which the next `handle_connected` goes on where durable progress stands.
//!
//! Invariants: a delta batch is forgotten only a while after the target called it durable (I7, `grace`); nothing is sent beyond the
//! credit granted; every mark is told of once, as durable or as lost; a disk's work items carry the epoch of
//! the walk that wanted them and are ignored when it is over.
//! Units: sectors, sequences, bytes of credit cost. Called by `agent/src/session.rs` and by the simulator.

mod growing;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::agent_disk::{AgentDisk, ScanEnd, SentBatch, WaitingBulk, WantedPass, next_bulk, next_delta};
pub use super::agent_disk::{SentBytes, StreamPosition};
pub use super::agent_event::AgentEvent;
use super::compare::Computed;
use super::credit::Balance;
use super::pass::{Pass, PassAction, Sink};
use super::resume::{Decision, Ours, Theirs, decide};
use super::state::{AgentDiskPhase, AgentLink};
use super::{Outgoing, ProtoError, Prover, frame_name};
use crate::checksum::UnitHash;
use crate::format::batch::{
    BatchHeader, BulkHeader, MarkCause, MarkClass, MarkLabel, Stretch, credit_cost, encode_bulk,
};
use crate::format::extent::Record;
use crate::format::frame::FrameKind;
use crate::format::handshake::{Hello, Version};
use crate::format::message::{
    Ack, CompareRequestHead, ErrorCode, Fenced, GrantHead, InventoryDisk, InventoryHead, MarkRefused,
    Message, Nack, NackReason, OfferHead, PassBegin, PassCause, PassEnd, PassMode, PassState, PointDegrade,
};
use crate::format::wire::Text;
use crate::limits::{CHUNK_BYTES, DAMAGED_BATCHES_MAX, DISKS_PER_AGENT_MAX, GRACE_BYTES};
use crate::mutants::{Mutant, mutant};
use crate::range_set::RangeSet;
use crate::units::{
    BLOCK_BYTES, DiskId, Generation, LineageId, PeerId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

/// The agent's end of a session.
pub struct Agent {
    id: PeerId,
    target: PeerId,
    prover: Box<dyn Prover>,
    link: AgentLink,
    host_name: Text<64>,
    inventory: Vec<InventoryDisk>,
    disks: BTreeMap<DiskId, AgentDisk>,
    next_disk: usize,
    /// The highest epoch of disks that were forgotten: one of them that is offered again begins above, so that late
    /// answers to its old work are still known as such.
    epochs_used: u64,
    chunk_bytes: u64,
    outbox: VecDeque<Outgoing>,
    events: VecDeque<AgentEvent>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("id", &self.id).field("link", &self.link).finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent that knows no disk yet; `target` may be [`PeerId::NONE`] for whichever target answers.
    #[must_use]
    pub fn new(id: PeerId, target: PeerId, prover: Box<dyn Prover>) -> Self {
        Self {
            id,
            target,
            prover,
            link: AgentLink::Down,
            host_name: Text::new(""),
            inventory: Vec::new(),
            disks: BTreeMap::new(),
            next_disk: 0,
            epochs_used: 0,
            chunk_bytes: CHUNK_BYTES,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Tells which disks the machine has; sent now if the session is up, and at every later one.
    pub fn set_inventory(&mut self, host_name: &str, disks: Vec<InventoryDisk>) {
        self.host_name = Text::new(host_name);
        self.inventory = disks;
        self.inventory.truncate(DISKS_PER_AGENT_MAX);
        if self.link == AgentLink::Ready {
            self.send_inventory();
        }
    }

    /// Sets how many bytes a walk handles at once: a multiple of the compare unit, at most [`CHUNK_BYTES`]. Sixteen
    /// chunks a disk are held in memory.
    pub const fn set_chunk_bytes(&mut self, bytes: u64) {
        self.chunk_bytes = bytes;
    }

    /// Whether disks may be opened.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.link == AgentLink::Ready
    }

    /// A connection is up; `session` names the attempt in both ends' logs.
    pub fn handle_connected(&mut self, session: [u8; 16]) {
        self.link.become_state(AgentLink::HelloSent);
        self.control(&Message::Hello(Hello::new(self.id, self.target, session)));
    }

    /// The connection is gone. What was not durable waits for the next one.
    pub fn handle_disconnected(&mut self) {
        if self.link != AgentLink::Down {
            self.link.become_state(AgentLink::Down);
        }
        self.outbox.clear();
        for disk in self.disks.values_mut() {
            if disk.phase != AgentDiskPhase::Closed {
                disk.phase.become_state(AgentDiskPhase::Closed);
            }
            disk.end_walk();
            disk.balance = Balance::default();
            if mutant(Mutant::ForgetUndurable) {
                disk.forget_undurable();
            }
            disk.wanted = disk.wanted.filter(|_| !mutant(Mutant::ForgetWantedPass));
        }
    }

    /// Takes a frame from the control stream.
    ///
    /// # Errors
    /// When the session cannot go on: close the connection, tell the operator by the error's severity.
    pub fn handle_frame(&mut self, kind: FrameKind, body: &Bytes) -> Result<(), ProtoError> {
        let message = Message::decode(kind, body)?;
        match (self.link, message) {
            (_, Message::Error(head, text)) => return self.handle_error(head.disk, head.code, text),
            (AgentLink::HelloSent, Message::HelloAck(ack)) => {
                if ack.version != Version::V1 as u16 {
                    return Err(ProtoError::Version(format!("the target answered version {}", ack.version)));
                }
                if self.target != PeerId::NONE && ack.target != self.target {
                    return Err(ProtoError::Identity(format!(
                        "target {} instead of {}",
                        ack.target, self.target
                    )));
                }
                let proof = self.prover.prove(&ack.nonce, ack.target);
                self.link.become_state(AgentLink::ProofSent);
                self.control(&Message::Auth(proof));
            }
            (AgentLink::ProofSent, Message::Welcome(_)) => {
                self.link.become_state(AgentLink::Ready);
                self.send_inventory();
                self.events.push_back(AgentEvent::Ready);
            }
            (AgentLink::Ready, Message::Offer(head, grant)) => self.handle_offer(&head, grant)?,
            (AgentLink::Ready, Message::Grant(head, ranges, grant)) => {
                self.handle_grant(&head, &ranges, grant)
            }
            (AgentLink::Ready, Message::Ack(ack)) => self.handle_ack(&ack),
            (AgentLink::Ready, Message::BulkAck(head, ranges)) => {
                if let Some(pass) =
                    self.open_disk(head.disk, head.generation).and_then(|disk| disk.pass.as_mut())
                    && pass.number() == head.pass
                {
                    pass.handle_settled(&ranges);
                }
            }
            (AgentLink::Ready, Message::Credit(credit)) => {
                if let Some(disk) = self.open_disk(credit.disk, credit.generation) {
                    disk.balance.raise(credit.limit);
                }
            }
            (AgentLink::Ready, Message::Nack(nack)) => self.handle_nack(&nack),
            (AgentLink::Ready, Message::Fenced(fenced)) => self.handle_fenced(&fenced),
            (AgentLink::Ready, Message::CompareHashes(head, answer)) => {
                if let Some(disk) = self.open_disk(head.disk, head.generation)
                    && let Some(chunk) = disk.requests.remove(&head.request)
                    && let Some(pass) = disk.pass.as_mut()
                {
                    pass.handle_remote(chunk, answer)
                        .map_err(|error| ProtoError::Limit(error.to_string()))?;
                }
            }
            (AgentLink::Ready, Message::PassState(state)) => self.handle_pass_state(&state),
            (AgentLink::Ready, Message::Policy(policy)) => {
                self.events.push_back(AgentEvent::Policy(policy));
            }
            (AgentLink::Ready, Message::MarkRequest(request)) => {
                self.events.push_back(AgentEvent::MarkRequested(request));
            }
            (state, _) => return Err(ProtoError::Unexpected { got: frame_name(kind), state: state.name() }),
        }
        Ok(())
    }

    fn handle_error(&mut self, disk: DiskId, code: ErrorCode, text: String) -> Result<(), ProtoError> {
        if disk == DiskId::NONE {
            return Err(ProtoError::Peer { code, text });
        }
        if code == ErrorCode::Full {
            self.events.push_back(AgentEvent::Warned { disk, code, text });
        } else {
            self.stop_disk(disk, code, text);
        }
        Ok(())
    }

    /// Somebody else has the disk, unless the words are about what this agent sent under an older generation.
    fn handle_fenced(&mut self, fenced: &Fenced) {
        let Some(disk) = self.disks.get(&fenced.disk) else { return };
        let own_past = match disk.phase {
            AgentDiskPhase::Opening => fenced.generation == disk.generation,
            _ => fenced.generation <= disk.generation,
        };
        if own_past {
            return;
        }
        let text = format!("generation {} was granted to another session", fenced.generation);
        self.stop_disk(fenced.disk, ErrorCode::Grant, text);
    }

    fn stop_disk(&mut self, disk: DiskId, code: ErrorCode, text: String) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if matches!(state.phase, AgentDiskPhase::Open | AgentDiskPhase::Opening | AgentDiskPhase::Growing) {
            state.phase.become_state(AgentDiskPhase::Stopped);
            state.end_walk();
            self.events.push_back(AgentEvent::Stopped { disk, code, text });
        }
    }

    /// Drops all that is known of a disk: it is not protected any more.
    pub fn forget(&mut self, disk: DiskId) {
        if let Some(mut gone) = self.disks.remove(&disk) {
            self.epochs_used = self.epochs_used.max(gone.epoch);
            gone.lose_marks();
            self.events.extend(gone.mark_news.drain(..).map(|news| AgentEvent::of_mark(disk, news)));
        }
    }

    fn share_grace(&mut self) {
        let share = GRACE_BYTES / self.disks.len().max(1) as u64;
        self.disks.values_mut().for_each(|disk| disk.grace.set_limit(share));
    }

    /// A source is protected once: what was offered of it before is not protected any more.
    fn handle_offer(&mut self, head: &OfferHead, grant: Bytes) -> Result<(), ProtoError> {
        let gone = |(id, known): (&DiskId, &AgentDisk)| {
            (*id != head.disk && known.source == head.source).then_some(*id)
        };
        let gone: Vec<DiskId> = self.disks.iter().filter_map(gone).collect();
        gone.into_iter().for_each(|disk| self.forget(disk));
        if self.disks.len() >= DISKS_PER_AGENT_MAX && !self.disks.contains_key(&head.disk) {
            return Err(ProtoError::Limit(format!("more than {DISKS_PER_AGENT_MAX} disks offered")));
        }
        let epochs_used = self.epochs_used;
        let disk = self.disks.entry(head.disk).or_insert_with(|| AgentDisk::new(head, epochs_used));
        if !matches!(disk.phase, AgentDiskPhase::Closed | AgentDiskPhase::Stopped | AgentDiskPhase::Growing) {
            return Ok(()); // offered twice: the first stands
        }
        disk.phase.become_state(AgentDiskPhase::Offered);
        disk.source = head.source;
        disk.size_sectors = head.size_sectors;
        disk.generation = head.generation;
        disk.grant = grant;
        self.events.push_back(AgentEvent::Offered {
            disk: head.disk,
            source: head.source,
            size_sectors: head.size_sectors,
        });
        self.share_grace();
        Ok(())
    }

    /// Opens an offered disk whose source has `size_sectors` now.
    pub fn open(&mut self, disk: DiskId, size_sectors: u64) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if state.phase != AgentDiskPhase::Offered {
            return;
        }
        let message = state.ask_to_open(disk, size_sectors);
        self.control(&message);
    }

    fn handle_grant(&mut self, head: &GrantHead, ranges: &[SectorRange], grant: Bytes) {
        let Some(disk) = self.disks.get_mut(&head.disk) else { return };
        if disk.phase != AgentDiskPhase::Opening {
            return;
        }
        disk.phase.become_state(AgentDiskPhase::Open);
        let foreign = disk.take_grant(head.generation, grant);
        disk.balance = Balance::default();
        // Of a pass that was asked for nothing is settled yet: its agent did not hear that it began.
        disk.set_target_pass(head.pass, head.mode == PassMode::Compare && ranges.is_empty());
        let ours = Ours {
            lineage: disk.lineage,
            durable: disk.durable,
            last: disk.last,
            chain_there: disk.chain_at(head.durable),
        };
        let theirs = Theirs { lineage: head.lineage, durable: head.durable, chain: head.chain };
        let mut cause = disk.wanted.map(|wanted| wanted.cause).or(foreign.then_some(PassCause::OtherSession));
        if ours.lineage.is_none()
            && let Some(known) = disk.recalled.take()
        {
            cause = cause.or_else(|| known.contradiction(head));
        }
        match decide(&ours, &theirs) {
            Decision::Adopt => disk.adopt(head),
            // The compare reads everything anew: older changes sent behind its beginning would stand above what it read.
            Decision::Continue { .. } | Decision::Resend { .. } if cause.is_some() => disk.adopt(head),
            Decision::Continue { .. } => disk.go_on(head),
            Decision::Resend { from } => {
                self.events.push_back(AgentEvent::TargetLost { disk: head.disk, from, to: disk.durable });
                disk.take_back(head.durable, head.chain);
                disk.go_on(head);
            }
            Decision::Compare(why) => {
                disk.adopt(head);
                cause = Some(why);
            }
        }
        if head.mode == PassMode::Done {
            disk.end_walk();
        } else {
            let settled: RangeSet = ranges.iter().copied().collect();
            let pass =
                Pass::new(head.pass, head.mode, Sink::Bulk, disk.whole(), settled).with_first(&disk.first);
            disk.begin_walk(pass.with_chunk_bytes(self.chunk_bytes));
        }
        self.events.push_back(AgentEvent::Opened { disk: head.disk, mode: head.mode });
        if let Some(cause) = cause {
            self.ask_for_pass(head.disk, cause);
        }
    }

    /// Asks for a compare pass over the whole disk: now if it is open, and again whenever it is opened until the
    /// target says that the pass began.
    pub fn begin_pass(&mut self, disk: DiskId, cause: PassCause) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if state.wanted.is_some() {
            return; // that one has not begun, so it will see everything this one would
        }
        state.wanted = Some(WantedPass { cause, asked_in: None });
        if state.phase == AgentDiskPhase::Open {
            self.ask_for_pass(disk, cause);
        }
    }

    fn ask_for_pass(&mut self, disk: DiskId, cause: PassCause) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        state.wanted = Some(WantedPass { cause, asked_in: Some(state.target_pass) });
        state.end_walk(); // the wanted one covers it
        let message = Message::PassBegin(PassBegin { disk, generation: state.generation, cause });
        self.control(&message);
        self.events.push_back(AgentEvent::Resync { disk, cause });
    }

    /// Begins a scan round: everything that differs goes by the delta stream, a fuzzy mark ends it. Answers whether
    /// it began: the disk is open, synced, not already being walked, and all it submitted is durable. Without the last,
    /// hashes would overtake older data on their way, and find equal what those are about to overwrite.
    pub fn begin_scan(&mut self, disk: DiskId) -> bool {
        self.begin_round(disk, None, ScanEnd::Itself)
    }

    /// As [`Self::begin_scan`], but with a mark that the caller submits after [`AgentEvent::ScanRead`].
    pub fn begin_scan_to_mark(&mut self, disk: DiskId) -> bool {
        self.begin_round(disk, None, ScanEnd::Told)
    }

    /// Begins a round over what changed: it is read and goes by the delta stream, with a mark of its own as for
    /// [`Self::begin_scan`], or, `to_mark`, as for [`Self::begin_scan_to_mark`]. Answers whether it began.
    pub fn begin_delta(&mut self, disk: DiskId, changed: &RangeSet, to_mark: bool) -> bool {
        let end = if to_mark { ScanEnd::Told } else { ScanEnd::Itself };
        self.begin_round(disk, Some(changed), end)
    }

    /// Whether a round may begin.
    #[must_use]
    pub fn is_idle(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|state| {
            let walking = state.pass.is_some() || state.wanted.is_some();
            let drained = state.marks.is_empty() && state.unacked.is_empty();
            state.phase == AgentDiskPhase::Open && !walking && drained
        })
    }

    fn begin_round(&mut self, disk: DiskId, changed: Option<&RangeSet>, end: ScanEnd) -> bool {
        if !self.is_idle(disk) {
            return false;
        }
        let Some(state) = self.disks.get_mut(&disk) else { return false };
        let pass = match changed {
            None => Pass::new(0, PassMode::Compare, Sink::Delta, state.whole(), RangeSet::new()),
            Some(changed) => Pass::of_changes(state.whole(), changed),
        };
        state.begin_walk(pass.with_chunk_bytes(self.chunk_bytes));
        state.scan_end = end;
        true
    }

    fn handle_pass_state(&mut self, state: &PassState) {
        let chunk_bytes = self.chunk_bytes;
        let Some(disk) = self.open_disk(state.disk, state.generation) else { return };
        disk.set_target_pass(state.pass, true);
        if state.mode == PassMode::Done {
            if disk.pass.as_ref().is_some_and(|pass| pass.number() == state.pass) {
                disk.end_walk();
                if disk.wanted.is_none() {
                    self.events.push_back(AgentEvent::Synced { disk: state.disk });
                }
            }
        } else {
            let pass = Pass::new(state.pass, state.mode, Sink::Bulk, disk.whole(), RangeSet::new())
                .with_first(&disk.first);
            disk.begin_walk(pass.with_chunk_bytes(chunk_bytes));
        }
    }

    fn handle_ack(&mut self, ack: &Ack) {
        let Some(disk) = self.open_disk(ack.disk, ack.generation) else { return };
        disk.forget_durable(ack.durable);
        disk.marks_durable(ack.mark);
        // The walk's mark was the last one, or a later one was: either way all it submitted is durable.
        let walked = disk.pass.as_ref().is_some_and(|pass| pass.sink() == Sink::Delta && pass.has_ended());
        if walked && disk.scan_end == ScanEnd::Placed && disk.marks.is_empty() {
            disk.end_walk();
            self.events.push_back(AgentEvent::ScanDone { disk: ack.disk });
        }
    }

    /// Sends again from where the target wants it. What it finds damaged every time is broken here or on the way, and
    /// sending it once more mends nothing: the disk is opened anew, which fences what is still under way, and compared.
    fn handle_nack(&mut self, nack: &Nack) {
        let Some(disk) = self.open_disk(nack.disk, nack.generation) else { return };
        if nack.reason == NackReason::Damaged && disk.note_damaged(nack.resume_from) >= DAMAGED_BATCHES_MAX {
            disk.give_up_stream(PassCause::DamagedStream);
            let message = disk.ask_to_open(nack.disk, disk.size_sectors);
            return self.control(&message);
        }
        if mutant(Mutant::ForgetNack) {
            return;
        }
        let from = disk.unacked.iter().position(|batch| batch.header.last_sequence() >= nack.resume_from);
        disk.unsent_from = from.unwrap_or(disk.unacked.len());
        disk.resend_marks(Sequence(nack.resume_from.0.saturating_sub(1)));
    }

    fn open_disk(&mut self, disk: DiskId, generation: Generation) -> Option<&mut AgentDisk> {
        self.disks
            .get_mut(&disk)
            .filter(|disk| disk.phase == AgentDiskPhase::Open && disk.generation == generation)
    }

    /// The chunk was read; `hashes` where the work item asked for them.
    ///
    /// # Errors
    /// When the number of hashes does not fit the chunk: a bug of the reader.
    pub fn handle_read(
        &mut self,
        disk: DiskId,
        epoch: u64,
        chunk: SectorRange,
        hashes: Option<Vec<UnitHash>>,
    ) -> Result<(), ProtoError> {
        match self.pass_of(disk, epoch) {
            Some(pass) => {
                pass.handle_read(chunk, hashes).map_err(|error| ProtoError::Limit(error.to_string()))
            }
            None => Ok(()),
        }
    }

    /// Parts of a chunk of the current walk that cannot be read: the walk goes on without them. Said before
    /// [`Self::handle_read`] of the chunk, whose hashes of them mean nothing.
    pub fn handle_unread(&mut self, disk: DiskId, epoch: u64, chunk: SectorRange, unread: &[SectorRange]) {
        if let Some(pass) = self.pass_of(disk, epoch) {
            pass.handle_unread(chunk.start, unread);
        }
    }

    /// Passes over the whole disk that begin from now on begin with these parts, in this order.
    pub fn set_first(&mut self, disk: DiskId, first: Vec<SectorRange>) {
        if let Some(state) = self.disks.get_mut(&disk) {
            state.first = first;
        }
    }

    /// How many sectors of the source are not at the target because they cannot be read: marks say so from now on.
    pub fn set_unread(&mut self, disk: DiskId, sectors: u64) {
        if let Some(state) = self.disks.get_mut(&disk) {
            let blocks = sectors.div_ceil(BLOCK_BYTES / SECTOR_BYTES);
            state.unread_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        }
    }

    /// What a work item wanted computed of a kept chunk.
    ///
    /// # Errors
    /// When it does not fit what was asked: a bug of the reader.
    pub fn handle_computed(
        &mut self,
        disk: DiskId,
        epoch: u64,
        chunk: SectorRange,
        computed: Computed,
    ) -> Result<(), ProtoError> {
        match self.pass_of(disk, epoch) {
            Some(pass) => {
                pass.handle_computed(chunk, computed).map_err(|error| ProtoError::Limit(error.to_string()))
            }
            None => Ok(()),
        }
    }

    fn pass_of(&mut self, disk: DiskId, epoch: u64) -> Option<&mut Pass> {
        self.disks
            .get_mut(&disk)
            .filter(|disk| disk.epoch == epoch || mutant(Mutant::LateAnswers))?
            .pass
            .as_mut()
    }

    /// Submits the records of a chunk of the current pass; `as_of` as handed out with the work item, `time` when the
    /// data were read. Answers whether the pass still goes on.
    pub fn submit_chunk(
        &mut self,
        disk: DiskId,
        epoch: u64,
        chunk: SectorRange,
        as_of: Sequence,
        time: Timestamp,
        records: Vec<Record>,
    ) -> bool {
        let Some((sink, pass)) = self.pass_of(disk, epoch).map(|pass| (pass.sink(), pass.number())) else {
            return false;
        };
        let Some(state) = self.disks.get_mut(&disk) else { return false };
        state.newest_time = state.newest_time.max(time);
        match sink {
            Sink::Bulk => {
                let header = BulkHeader {
                    disk,
                    lineage: state.lineage.unwrap_or(LineageId::NONE),
                    generation: state.generation,
                    pass,
                    as_of,
                    cover: chunk,
                    record_count: records.len() as u32,
                };
                let cost = credit_cost(&records);
                let frame = encode_bulk(&header, &records);
                let plain_bytes = records.iter().map(Record::plain_bytes).sum();
                state.bulk.push_back(WaitingBulk { chunk: chunk.start, cost, plain_bytes, frame });
            }
            Sink::Delta if records.is_empty() => {
                if let Some(pass) = state.pass.as_mut() {
                    pass.handle_sent(chunk.start);
                }
            }
            Sink::Delta => {
                self.submit_delta(disk, Stretch::Diff, time, records);
                if let Some(batch) = self.disks.get_mut(&disk).and_then(|disk| disk.unacked.back_mut()) {
                    batch.chunk = Some(chunk.start);
                }
            }
        }
        true
    }

    /// Gives records their sequences and queues them; answers the last sequence.
    ///
    /// # Panics
    /// When `records` is empty or more than a batch holds: the caller cuts.
    pub fn submit_delta(
        &mut self,
        disk: DiskId,
        stretch: Stretch,
        source_time: Timestamp,
        records: Vec<Record>,
    ) -> Option<Sequence> {
        assert!(!records.is_empty());
        let state = self.disks.get_mut(&disk)?;
        let header = BatchHeader {
            disk,
            lineage: state.lineage?,
            generation: state.generation,
            first_sequence: state.last.next(),
            chain: state.last_chain,
            source_time,
            record_count: records.len() as u32,
            stretch,
        };
        let chain_after = header.chain_after(&records);
        state.last = header.last_sequence();
        state.last_chain = chain_after;
        let cost = credit_cost(&records);
        state.unacked.push_back(SentBatch { header, records, chain_after, cost, chunk: None });
        Some(state.last)
    }

    /// Places a mark after everything submitted so far. Answers whether it could be: the disk has a stream, and fewer
    /// than [`MARKS_PENDING_MAX`] marks wait to become durable.
    ///
    /// [`MARKS_PENDING_MAX`]: crate::limits::MARKS_PENDING_MAX
    pub fn submit_mark(&mut self, disk: DiskId, label: MarkLabel) -> bool {
        self.disks.get_mut(&disk).is_some_and(|state| state.place_mark(disk, label))
    }

    /// Says that points between two sequences of a history of a disk (none: its present one) promise less than their marks
    /// did; answers whether it could be sent: the disk is open.
    pub fn degrade(
        &mut self,
        disk: DiskId,
        lineage: Option<LineageId>,
        from: Sequence,
        to: Sequence,
        cause: &str,
    ) -> bool {
        let Some(state) = self.disks.get(&disk).filter(|state| state.phase == AgentDiskPhase::Open) else {
            return false;
        };
        let Some(lineage) = lineage.or(state.lineage).filter(|_| from <= to) else { return false };
        let generation = state.generation;
        let cause = Text::new(cause);
        self.control(&Message::PointDegrade(PointDegrade { disk, lineage, generation, from, to, cause }));
        true
    }

    /// Tells the target that a point it asked for cannot be had; without a session it learns that from its absence.
    pub fn refuse_mark(&mut self, point: [u8; 16], reason: &str) {
        if self.link == AgentLink::Ready {
            self.control(&Message::MarkRefused(MarkRefused { point, reason: Text::new(reason) }));
        }
    }

    /// The next frame to send, if credit allows one.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        if let Some(outgoing) = self.outbox.pop_front() {
            return Some(outgoing);
        }
        let count = self.disks.len();
        for step in 0..count {
            let index = (self.next_disk + step) % count;
            let Some((id, disk)) = self.disks.iter_mut().nth(index) else { continue };
            if disk.phase != AgentDiskPhase::Open {
                continue;
            }
            if let Some(outgoing) = next_delta(*id, disk).or_else(|| next_bulk(*id, disk)) {
                self.next_disk = (index + 1) % count;
                return Some(outgoing);
            }
        }
        None
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<AgentEvent> {
        self.advance_passes();
        self.events.pop_front()
    }

    fn advance_passes(&mut self) {
        let mut out = Vec::new();
        for (id, disk) in &mut self.disks {
            self.events.extend(disk.mark_news.drain(..).map(|news| AgentEvent::of_mark(*id, news)));
            if disk.phase != AgentDiskPhase::Open {
                continue;
            }
            let Some(pass) = disk.pass.as_mut() else { continue };
            while let Some(action) = pass.poll_action() {
                if let PassAction::Ask { chunk, units } = action {
                    let request = disk.next_request;
                    disk.next_request += 1;
                    disk.requests.insert(request, chunk.start);
                    out.push(Message::CompareRequest(
                        CompareRequestHead {
                            disk: *id,
                            generation: disk.generation,
                            request,
                            range: chunk,
                            unit_count: units.len() as u16,
                        },
                        units,
                    ));
                } else {
                    self.events.push_back(AgentEvent::Work {
                        disk: *id,
                        epoch: disk.epoch,
                        sink: pass.sink(),
                        as_of: disk.last,
                        action,
                    });
                }
            }
            if pass.take_end() {
                match pass.sink() {
                    Sink::Bulk => out.push(Message::PassEnd(PassEnd {
                        disk: *id,
                        generation: disk.generation,
                        pass: pass.number(),
                    })),
                    Sink::Delta if disk.scan_end == ScanEnd::Told => {
                        self.events.push_back(AgentEvent::ScanRead { disk: *id });
                    }
                    Sink::Delta => {
                        let time = disk.newest_time;
                        disk.place_mark(*id, MarkLabel::of_disk(MarkClass::Fuzzy, MarkCause::Pass, time));
                        disk.scan_end = ScanEnd::Placed;
                    }
                }
            }
        }
        for message in out {
            self.control(&message);
        }
    }

    /// Bytes of plain delta payload that are not durable yet.
    #[must_use]
    pub fn undurable_bytes(&self, disk: DiskId) -> u64 {
        self.disks.get(&disk).map_or(0, |disk| disk.unacked.iter().map(|batch| batch.cost).sum())
    }

    /// What was handed to the transport for a disk.
    #[must_use]
    pub fn sent_bytes(&self, disk: DiskId) -> SentBytes {
        self.disks.get(&disk).map_or_else(SentBytes::default, |disk| disk.sent)
    }

    /// Sectors settled and in all of the running walk, if one runs.
    #[must_use]
    pub fn pass_progress(&self, disk: DiskId) -> Option<(u64, u64)> {
        Some(self.disks.get(&disk)?.pass.as_ref()?.progress())
    }

    /// Whether a mark waits to become durable.
    #[must_use]
    pub fn mark_pending(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|disk| !disk.marks.is_empty())
    }

    /// Whether the disk is open at the target.
    #[must_use]
    pub fn is_open(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|state| state.phase == AgentDiskPhase::Open)
    }

    /// Whether this agent remembers the disk's stream by itself.
    #[must_use]
    pub fn has_stream(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|state| state.lineage.is_some())
    }

    /// Where the stream stands, to be [`Self::recall`]ed by an agent that comes after this one.
    #[must_use]
    pub fn stream_position(&self, disk: DiskId) -> Option<StreamPosition> {
        let state = self.disks.get(&disk)?;
        let (generation, durable) = (state.granted, state.durable);
        Some(StreamPosition { lineage: state.lineage?, generation, durable })
    }

    /// What an agent before this one knew of the disk's stream. A target that contradicts it is compared.
    pub fn recall(&mut self, disk: DiskId, known: StreamPosition) {
        if let Some(state) = self.disks.get_mut(&disk) {
            state.recalled = Some(known);
        }
    }

    /// The durable and the last given sequence.
    #[must_use]
    pub fn position(&self, disk: DiskId) -> Option<(Sequence, Sequence)> {
        self.disks.get(&disk).map(|disk| (disk.durable, disk.last))
    }

    fn send_inventory(&mut self) {
        let head = InventoryHead { host_name: self.host_name, disk_count: self.inventory.len() as u32 };
        self.control(&Message::Inventory(head, self.inventory.clone()));
    }

    fn control(&mut self, message: &Message) {
        self.outbox.push_back(Outgoing::control(message.encode()));
    }
}
