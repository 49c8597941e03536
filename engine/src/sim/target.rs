//! Driver of the master target's cores: sessions, and for each disk a queue of actions executed strictly in order.
//!
//! Invariants: one action of a disk runs at a time; a crash may hit it half done; what a restart knows is the disk's
//! surviving sectors and its state file. Called by `sim::world`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::agent::{agent_id, proof};
use super::checker::Rule;
use super::codec::open;
use super::disk::SimDisk;
use super::network::Endpoint;
use super::scenario::{Sabotage, Scenario};
use super::workload::Source;
use super::world::{Event, World};
use crate::checksum::UnitHash;
use crate::format::FormatError;
use crate::format::batch::{BatchHeader, credit_cost, decode_batch, decode_bulk};
use crate::format::disk_state::DiskState;
use crate::format::extent::{Record, RecordKind};
use crate::format::frame::FrameKind;
use crate::format::handshake::Role;
use crate::format::message::{
    Auth, CompareAnswer, CompareRequestHead, ErrorCode, Message, PassMode, RefineUnit,
};
use crate::limits::HANDSHAKE_NANOS_MAX;
use crate::proto::Authority;
use crate::proto::compare::answer;
use crate::proto::master_target::{DiskInput, SessionEvent, TargetSession, Transport};
use crate::proto::state::TargetDiskPhase;
use crate::proto::target_disk::{DiskAction, DiskNotice, Piece, SessionId, TargetDisk};
use crate::units::{DiskId, Generation, LineageId, MonoTime, PeerId, SECTOR_BYTES};

/// The master target.
pub(super) struct TargetNode {
    pub(super) alive: bool,
    life: u64,
    pub(super) disks: Vec<DiskNode>,
    sessions: BTreeMap<SessionId, Session>,
    authority: Arc<SimAuthority>,
}

struct Session {
    core: TargetSession,
    connection: u64,
}

/// A disk of the target.
pub(super) struct DiskNode {
    pub(super) id: DiskId,
    pub(super) td: TargetDisk,
    pub(super) sim: SimDisk,
    /// What the core ordered, with the generation that caused it.
    queue: VecDeque<(Generation, DiskAction)>,
    busy: Option<(Generation, DiskAction)>,
    timer: Option<u64>,
    unwritten: u64,
    undurable: u64,
    /// Kept to be written wrongly later (sabotage).
    fenced: Option<(Generation, Vec<Piece>)>,
    /// Marks that were accepted and are not durable, and how many ever became so.
    marks: VecDeque<[u8; 16]>,
    marks_durable: u64,
    /// How many marks each ordered checkpoint covers.
    covered: VecDeque<u64>,
}

/// Signs and checks, with a secret that never leaves it.
struct SimAuthority;

impl Authority for SimAuthority {
    fn check_proof(&self, auth: &Auth, nonce: &[u8; 32]) -> Result<(), String> {
        if auth.signature == proof(auth.agent, nonce) { Ok(()) } else { Err("the signature is wrong".into()) }
    }

    fn issue(&self, disk: DiskId, size_sectors: u64, generation: Generation, agent: PeerId) -> Bytes {
        let mut bytes = b"a secret".to_vec();
        bytes.extend_from_slice(&disk.0);
        bytes.extend_from_slice(&size_sectors.to_le_bytes());
        bytes.extend_from_slice(&generation.0.to_le_bytes());
        bytes.extend_from_slice(&agent.0);
        Bytes::copy_from_slice(blake3::hash(&bytes).as_bytes())
    }

    fn check_grant(
        &self,
        grant: &[u8],
        disk: DiskId,
        size_sectors: u64,
        generation: Generation,
        agent: PeerId,
    ) -> Result<(), String> {
        let right = self.issue(disk, size_sectors, generation, agent);
        if right == grant { Ok(()) } else { Err("the grant was signed for something else".into()) }
    }
}

/// How long until a disk is offered again, at most.
const AGAIN_NANOS: u64 = 200_000_000;

const TARGET_ID: PeerId = PeerId([0xee; 16]);
const RELAY_ID: PeerId = PeerId([0xdd; 16]);

impl TargetNode {
    pub(super) fn new(plan: &Scenario, sources: &[Source]) -> Self {
        let disk = |(index, source): (usize, &Source)| {
            let (agent, sectors, existing) = plan.disks[index];
            let mode = if existing { PassMode::Compare } else { PassMode::Copy };
            let content =
                if existing { source.old_target() } else { vec![0; (sectors * SECTOR_BYTES) as usize] };
            let id = DiskId([index as u8 + 1; 16]);
            let lineage = LineageId([0x80 | index as u8; 16]);
            let state = TargetDisk::new_state(id, agent_id(agent), [index as u8; 16], sectors, lineage, mode);
            let sim = SimDisk::new(content, state.to_bytes());
            DiskNode::new(id, TargetDisk::new(state, plan.flow), sim)
        };
        Self {
            alive: true,
            life: 0,
            disks: sources.iter().enumerate().map(disk).collect(),
            sessions: BTreeMap::new(),
            authority: Arc::new(SimAuthority),
        }
    }

    pub(super) fn any_failed(&self) -> bool {
        self.disks.iter().any(|disk| disk.td.phase() == TargetDiskPhase::Failed)
    }
}

impl DiskNode {
    const fn new(id: DiskId, td: TargetDisk, sim: SimDisk) -> Self {
        Self {
            id,
            td,
            sim,
            queue: VecDeque::new(),
            busy: None,
            timer: None,
            unwritten: 0,
            undurable: 0,
            fenced: None,
            marks: VecDeque::new(),
            marks_durable: 0,
            covered: VecDeque::new(),
        }
    }

    /// A checkpoint is on the medium: the marks that are durable with it.
    fn marks_persisted(&mut self) -> Vec<[u8; 16]> {
        let covered = self.covered.pop_front().unwrap_or(0);
        let fresh = covered.saturating_sub(self.marks_durable) as usize;
        self.marks_durable = self.marks_durable.max(covered);
        self.marks.drain(..fresh.min(self.marks.len())).collect()
    }
}

impl World {
    pub(super) fn disk_index(&self, id: DiskId) -> usize {
        self.target.disks.iter().position(|disk| disk.id == id).unwrap_or_default()
    }

    pub(super) fn target_accepts_agent(&mut self, from: Endpoint, identity: usize) -> Option<u64> {
        self.target_accepts(from, Transport { role: Role::Agent, peer: agent_id(identity) })
    }

    pub(super) fn target_accepts_relay(&mut self, from: Endpoint) -> Option<u64> {
        self.target_accepts(from, Transport { role: Role::ProcessServer, peer: RELAY_ID })
    }

    fn target_accepts(&mut self, from: Endpoint, transport: Transport) -> Option<u64> {
        if !self.target.alive {
            return None;
        }
        let id = SessionId(self.fresh_name());
        let connection = self.net.connect(self.now, from, Endpoint::Target(id))?;
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&self.rng.bits().to_le_bytes());
        let authority = Arc::clone(&self.target.authority);
        let now = MonoTime(self.now);
        let core = TargetSession::new(id, TARGET_ID, transport, authority, nonce, now);
        self.target.sessions.insert(id, Session { core, connection });
        self.after(HANDSHAKE_NANOS_MAX, Event::SessionTimeout { session: id });
        Some(connection)
    }

    pub(super) fn session_gets(&mut self, id: SessionId, kind: FrameKind, body: Bytes) {
        let Some(session) = self.target.sessions.get_mut(&id) else { return };
        if let Err(error) = session.core.handle_frame(kind, body) {
            return self.session_refused(id, error.code(), &error.to_string());
        }
        while let Some(event) = self.target.sessions.get_mut(&id).and_then(|s| s.core.poll_event()) {
            match event {
                SessionEvent::Ready { agent, .. } => self.offer_all(id, agent),
                // Disks here have one size for ever, and nobody asks for a point.
                SessionEvent::Inventory { .. } | SessionEvent::MarkRefused(_) | SessionEvent::Grow(_) => {}
                SessionEvent::ToDisk(disk, input) => self.disk_gets(id, disk, input),
            }
        }
        self.session_pump(id);
    }

    fn offer_all(&mut self, id: SessionId, agent: PeerId) {
        let Some(session) = self.target.sessions.get_mut(&id) else { return };
        for disk in &self.target.disks {
            let state = disk.td.state();
            if state.agent == agent {
                session.core.offer(state.disk, state.source, state.size_sectors, state.generation);
            }
        }
    }

    /// A disk that was taken away from a session may be opened again in it.
    pub(super) fn offer_again(&mut self, id: SessionId, disk: usize) {
        if let Some(session) = self.target.sessions.get_mut(&id) {
            let state = self.target.disks[disk].td.state();
            session.core.offer(state.disk, state.source, state.size_sectors, state.generation);
            self.session_pump(id);
        }
    }

    fn session_pump(&mut self, id: SessionId) {
        while let Some(session) = self.target.sessions.get_mut(&id)
            && let Some(outgoing) = session.core.poll_transmit()
        {
            let connection = session.connection;
            self.send(connection, 1, &outgoing);
        }
    }

    /// The session broke the protocol: say so and leave.
    fn session_refused(&mut self, id: SessionId, code: ErrorCode, text: &str) {
        self.note(|| format!("target ends {id:?}: {text}"));
        if let Some(session) = self.target.sessions.get(&id) {
            let message = Message::error(DiskId::NONE, code, text);
            let connection = session.connection;
            self.send(connection, 1, &crate::proto::Outgoing::control(message.encode()));
        }
        self.session_ends(id, true);
    }

    pub(super) fn session_timeout(&mut self, id: SessionId) {
        let now = MonoTime(self.now);
        if self.target.sessions.get_mut(&id).is_some_and(|session| session.core.handle_timeout(now).is_err())
        {
            self.session_refused(id, ErrorCode::Protocol, "too slow");
        }
    }

    /// A session is over: its disks are told, sometimes twice.
    pub(super) fn session_ends(&mut self, id: SessionId, leave: bool) {
        let Some(session) = self.target.sessions.remove(&id) else { return };
        if leave {
            self.leave(session.connection, 1);
        }
        let opened: Vec<DiskId> = session.core.opened().collect();
        let life = self.target.life;
        for disk in opened {
            let disk = self.disk_index(disk);
            let twice = self.rng.chance(self.plan.faults.late_notices_per_mille);
            if twice || self.rng.chance(100) {
                let delay = self.rng.below(1_000_000_000);
                self.after(delay, Event::LateNotice { disk, life, session: id });
            } else {
                self.late_notice(disk, life, id);
            }
            if twice {
                self.late_notice(disk, life, id);
            }
        }
    }

    pub(super) fn late_notice(&mut self, disk: usize, life: u64, session: SessionId) {
        if self.target.alive && self.target.life == life {
            self.target.disks[disk].td.handle_session_lost(MonoTime(self.now), session);
            self.disk_pump(disk, Generation::ZERO);
        }
    }

    fn disk_gets(&mut self, id: SessionId, disk_id: DiskId, input: DiskInput) {
        let now = MonoTime(self.now);
        let disk = self.disk_index(disk_id);
        let node = &mut self.target.disks[disk];
        let mut generation = node.td.state().generation;
        match input {
            DiskInput::Open(head) => node.td.handle_open(now, id, &head),
            DiskInput::Batch(body) => match decode_batch(body) {
                Ok((header, records)) => {
                    generation = header.generation;
                    self.batch_comes(id, disk, &header, records);
                }
                Err(error) => return self.session_refused(id, ErrorCode::Protocol, &error.to_string()),
            },
            DiskInput::Bulk(body) => match decode_bulk(body) {
                Ok((header, records)) => {
                    let trust = self.plan.sabotage == Some(Sabotage::TrustPayload);
                    match open_all(&records, trust) {
                        Ok(records) => {
                            generation = header.generation;
                            node.td.handle_bulk(now, id, &header, records);
                        }
                        Err(error) => {
                            return self.session_refused(id, ErrorCode::Protocol, &error.to_string());
                        }
                    }
                }
                Err(error) => return self.session_refused(id, ErrorCode::Protocol, &error.to_string()),
            },
            DiskInput::Mark(mark) => {
                let before = node.td.marks_accepted();
                node.td.handle_mark(now, id, &mark);
                if node.td.marks_accepted() > before {
                    node.marks.push_back(mark.point);
                }
            }
            DiskInput::PointDegrade(_) => {} // no agent here says so
            DiskInput::Compare(head, units) => node.td.handle_compare(id, head, units),
            DiskInput::PassBegin(begin) => {
                let before = node.td.state().pass;
                node.td.handle_pass_begin(now, id, &begin);
                let pass = node.td.state().pass;
                if pass > before {
                    self.count("resyncs", 1);
                    let newest = self.sources[disk].newest() - self.captured_of(disk);
                    self.checker.pass_begun(disk, pass, begin.generation, newest);
                }
            }
            DiskInput::PassEnd(end) => node.td.handle_pass_end(now, id, &end),
        }
        self.disk_pump(disk, generation);
    }

    fn batch_comes(&mut self, id: SessionId, disk: usize, header: &BatchHeader, records: Vec<Record>) {
        let now = MonoTime(self.now);
        let sabotage = self.plan.sabotage;
        let trust = sabotage == Some(Sabotage::TrustPayload);
        let records = match open_all(&records, trust) {
            Ok(opened) => opened,
            Err(error) => {
                self.count("damaged batches", 1);
                let node = &mut self.target.disks[disk];
                node.td.handle_damaged(id, header.generation, credit_cost(&records));
                return self.note(|| format!("target: {error}"));
            }
        };
        let node = &mut self.target.disks[disk];
        let before = node.td.state().sequence;
        if node.td.state().generation > header.generation
            && sabotage == Some(Sabotage::WriteFenced)
            && node.fenced.is_none()
        {
            let pieces = records.iter().map(|r| Piece { keep: vec![r.range()], record: r.clone() }).collect();
            node.fenced = Some((header.generation, pieces));
        }
        node.td.handle_batch(now, id, header, records.clone());
        if node.td.state().sequence > before {
            let state = node.td.state().clone();
            self.count("batches applied", 1);
            self.count("records applied", records.len() as u64);
            self.checker.batch_accepted(disk, header, &records, &state);
            if sabotage == Some(Sabotage::ApplyTwice) && self.rng.chance(100) {
                self.apply_twice(id, disk, header, records);
            }
        }
    }

    /// Sabotage: what was accepted is handed in again as if it were new.
    fn apply_twice(&mut self, id: SessionId, disk: usize, header: &BatchHeader, records: Vec<Record>) {
        let td = &mut self.target.disks[disk].td;
        let chain = td.chain();
        let again = BatchHeader { first_sequence: td.state().sequence.next(), chain, ..*header };
        let now = MonoTime(self.now);
        self.target.disks[disk].td.handle_batch(now, id, &again, records);
    }

    /// Takes everything out of a disk's core and starts what may run.
    fn disk_pump(&mut self, disk: usize, generation: Generation) {
        let mut replies = Vec::new();
        let node = &mut self.target.disks[disk];
        while let Some(action) = node.td.poll_action() {
            if let DiskAction::Reply { session, message } = action {
                replies.push((session, message));
                continue;
            }
            if let DiskAction::Write { cost, .. } = &action {
                node.unwritten += cost;
                node.undurable += cost;
                if self.plan.sabotage == Some(Sabotage::IgnoreCredit) {
                    node.td.handle_written(*cost);
                }
            }
            if matches!(action, DiskAction::Checkpoint { .. }) {
                node.covered.push_back(node.td.marks_accepted());
            }
            node.queue.push_back((generation, action));
        }
        let (unwritten, undurable) = (node.unwritten, node.undurable);
        let mut seen = Vec::new();
        while let Some(notice) = node.td.poll_notice() {
            seen.push(notice);
        }
        for notice in seen {
            self.note(|| format!("target disk{disk}: {notice:?}"));
            if matches!(notice, DiskNotice::FencedSession(_)) {
                self.count("sessions fenced", 1);
            }
        }
        for (session, message) in replies {
            self.disk_replies(disk, session, message);
        }
        let flow = self.plan.flow;
        self.checker.bounded("the target unwritten", disk, unwritten, flow.unwritten_bytes);
        self.checker.bounded("the target undurable", disk, undurable, flow.undurable_bytes);
        self.disk_start(disk);
        self.disk_timer_set(disk);
    }

    fn disk_start(&mut self, disk: usize) {
        while self.target.disks[disk].busy.is_none() {
            let Some((generation, action)) = self.target.disks[disk].queue.pop_front() else { return };
            self.target.disks[disk].busy = Some((generation, action));
            let usual = self.plan.disk_nanos;
            let delay = self.rng.between(usual / 8, usual * 2);
            let life = self.target.life;
            self.after(delay, Event::DiskDone { disk, life });
        }
    }

    fn disk_replies(&mut self, disk: usize, session: SessionId, message: Message) {
        if let Message::Grant(head, ..) = &message {
            let persisted = DiskState::decode(&self.target.disks[disk].sim.state_file);
            let persisted = persisted.map_or(Generation::ZERO, |state| state.generation);
            self.checker.granted(disk, head.generation, persisted);
        }
        let taken = matches!(&message, Message::Fenced(_))
            || matches!(&message, Message::Error(head, _) if head.code != ErrorCode::Full);
        if taken && self.rng.chance(500) {
            let delay = self.rng.below(AGAIN_NANOS);
            self.after(delay, Event::OfferAgain { session, disk });
        }
        let size = self.target.disks[disk].td.state().size_sectors;
        if let Some(state) = self.target.sessions.get_mut(&session) {
            state.core.send_reply(message, size);
        }
        self.session_pump(session);
    }

    fn disk_timer_set(&mut self, disk: usize) {
        let life = self.target.life;
        let node = &mut self.target.disks[disk];
        let wanted = node.td.poll_timeout().map(|at| at.0.max(self.now));
        if wanted.is_some() && node.timer.is_none_or(|at| Some(at) > wanted) {
            node.timer = wanted;
            self.at(wanted.unwrap_or(self.now), Event::DiskTimer { disk, life });
        }
    }

    pub(super) fn disk_timer(&mut self, disk: usize, life: u64) {
        if self.target.life != life || !self.target.alive {
            return;
        }
        self.target.disks[disk].timer = None;
        self.target.disks[disk].td.handle_timeout(MonoTime(self.now));
        self.disk_pump(disk, Generation::ZERO);
    }

    /// The running action of a disk ends.
    pub(super) fn disk_done(&mut self, disk: usize, life: u64) {
        if self.target.life != life || !self.target.alive {
            return;
        }
        let Some((generation, action)) = self.target.disks[disk].busy.take() else { return };
        match action {
            DiskAction::Write { pieces, cost } => self.write_done(disk, generation, pieces, cost),
            DiskAction::Hash { session, request, units } => {
                self.hash_done(disk, session, &request, &units);
            }
            DiskAction::Checkpoint { state } => self.checkpoint_done(disk, &state),
            DiskAction::Reply { .. } => {}
        }
        let generation = self.target.disks[disk].td.state().generation;
        self.disk_pump(disk, generation);
    }

    fn write_done(&mut self, disk: usize, generation: Generation, pieces: Vec<Piece>, cost: u64) {
        if !self.calm && self.rng.chance(self.plan.faults.full_per_mille) {
            self.count("full disks", 1);
            let node = &mut self.target.disks[disk];
            node.td.handle_full("no space left; it goes on when there is some");
            node.busy = Some((generation, DiskAction::Write { pieces, cost }));
            let delay = self.rng.below(200_000_000);
            let life = self.target.life;
            return self.after(delay, Event::DiskDone { disk, life });
        }
        self.checker.write_executed(disk, generation);
        let skip = self.plan.sabotage == Some(Sabotage::LoseWrites) && self.rng.chance(50);
        if !skip {
            self.write_pieces(disk, &pieces);
        }
        let node = &mut self.target.disks[disk];
        node.unwritten -= cost;
        if self.plan.sabotage != Some(Sabotage::IgnoreCredit) {
            node.td.handle_written(cost);
        }
        if node.fenced.as_ref().is_some_and(|(old, _)| *old < generation)
            && let Some((old, late)) = node.fenced.take()
        {
            self.checker.write_executed(disk, old);
            self.write_pieces(disk, &late);
        }
    }

    fn write_pieces(&mut self, disk: usize, pieces: &[Piece]) {
        let stale = self.plan.sabotage == Some(Sabotage::StaleBulk);
        for piece in pieces {
            write_piece(&mut self.target.disks[disk].sim, piece, stale);
        }
    }

    fn hash_done(
        &mut self,
        disk: usize,
        session: SessionId,
        request: &CompareRequestHead,
        units: &[RefineUnit],
    ) {
        let node = &mut self.target.disks[disk];
        let mut answer = match units.is_empty() {
            true => CompareAnswer { hashes: node.sim.unit_hashes(request.range), masks: Vec::new() },
            false => answer(units, node.sim.read(request.range)),
        };
        if self.plan.sabotage == Some(Sabotage::BelieveCrcs) && !units.is_empty() {
            answer.hashes = vec![UnitHash::ZEROS]; // what the agent confirms then, whatever it holds
        }
        node.td.handle_hashed(session, request, answer);
    }

    fn checkpoint_done(&mut self, disk: usize, state: &DiskState) {
        let now = MonoTime(self.now);
        self.count("checkpoints", 1);
        if !self.calm && self.rng.chance(self.plan.faults.flush_fails_per_mille) {
            self.count("failed flushes", 1);
            let node = &mut self.target.disks[disk];
            node.sim.crash(&mut self.rng);
            node.td.handle_failed("a flush failed; look at the disk, then restart the master target");
            node.queue.clear();
            node.covered.clear();
            node.busy = None;
            (node.unwritten, node.undurable) = (0, 0);
            return;
        }
        let sabotage = self.plan.sabotage;
        let node = &mut self.target.disks[disk];
        if sabotage != Some(Sabotage::ForgetFlush) {
            node.sim.flush();
        }
        node.undurable = node.unwritten;
        if sabotage != Some(Sabotage::AcknowledgeEarly) || self.rng.chance(500) {
            node.sim.checkpoint(state.to_bytes());
            let mut marks = node.marks_persisted();
            if sabotage == Some(Sabotage::LoseMarks) {
                marks.pop();
            }
            self.checker.persisted(disk, state);
            marks.into_iter().for_each(|mark| self.checker.mark_persisted(disk, mark));
        }
        self.target.disks[disk].td.handle_checkpointed(now);
    }

    pub(super) fn target_crashes(&mut self) {
        if !std::mem::replace(&mut self.target.alive, false) {
            return;
        }
        self.note(|| "target crashes".into());
        self.count("target crashes", 1);
        self.target.life += 1;
        let sessions: Vec<SessionId> = self.target.sessions.keys().copied().collect();
        for id in sessions {
            if let Some(session) = self.target.sessions.remove(&id) {
                self.leave(session.connection, 1);
            }
        }
        for (disk, node) in self.target.disks.iter_mut().enumerate() {
            match node.busy.take() {
                Some((_, DiskAction::Write { pieces, .. })) => {
                    let done = self.rng.below(pieces.len() as u64 + 1) as usize;
                    for piece in &pieces[..done] {
                        write_piece(&mut node.sim, piece, false); // as far as the disk's cache
                    }
                }
                Some((_, DiskAction::Checkpoint { state })) => match self.rng.below(3) {
                    0 => {}
                    1 => node.sim.flush(),
                    _ => {
                        node.sim.flush();
                        node.sim.checkpoint(state.to_bytes());
                        let marks = node.marks_persisted();
                        marks.into_iter().for_each(|mark| self.checker.mark_persisted(disk, mark));
                    }
                },
                _ => {}
            }
            node.sim.crash(&mut self.rng);
        }
        let lost = self.plan.faults.lost_tails_per_mille;
        if !self.calm && lost > 0 && self.rng.chance(lost) {
            for disk in 0..self.target.disks.len() {
                self.tail_is_lost(disk);
            }
        }
        let delay = self.rng.between(1_000_000, 2_000_000_000);
        self.after(delay, Event::TargetStart);
    }

    /// The newest checkpoints of a disk are gone, as with the end of a log that rotted. Which generation was granted is
    /// known from elsewhere.
    fn tail_is_lost(&mut self, disk: usize) {
        let sim = &mut self.target.disks[disk].sim;
        let Ok(newest) = DiskState::decode(&sim.state_file) else { return };
        for _ in 0..self.rng.below(4) {
            let Some(Ok(before)) = sim.state_before().map(DiskState::decode) else { break };
            // A pass that began or ended, or went on, is written down elsewhere, too.
            if before.pass != newest.pass || before.mode != PassMode::Done {
                break;
            }
            sim.lose_checkpoint();
        }
        let Ok(mut state) = DiskState::decode(&sim.state_file) else { return };
        state.generation = newest.generation;
        sim.state_file = state.to_bytes();
        if state.sequence < newest.sequence || state.marked < newest.marked {
            self.checker.tail_lost(disk, newest.generation);
            self.count("lost tails", 1);
            self.note(|| {
                format!("target disk{disk} goes from {} back to {}", newest.sequence, state.sequence)
            });
        }
    }

    pub(super) fn target_starts(&mut self) {
        self.note(|| "target starts".into());
        self.target.alive = true;
        for disk in 0..self.target.disks.len() {
            let node = &self.target.disks[disk];
            let mut state = match DiskState::decode(&node.sim.state_file) {
                Ok(state) => state,
                Err(error) => {
                    return self
                        .checker
                        .broke(Rule::Prefix, format!("disk {disk}: state unreadable: {error}"));
                }
            };
            self.checker.recovered(disk, &state, &node.sim, &self.sources[disk]);
            if self.plan.sabotage == Some(Sabotage::ReuseGeneration) {
                state.generation = Generation(state.generation.0.saturating_sub(1));
            }
            let node = &mut self.target.disks[disk];
            let (id, sim) = (node.id, std::mem::take(&mut node.sim));
            *node = DiskNode::new(id, TargetDisk::new(state, self.plan.flow), sim);
        }
    }
}

/// The records with their plain data; an error names the first damaged one.
fn open_all(records: &[Record], trust: bool) -> Result<Vec<Record>, FormatError> {
    records.iter().map(|record| open(record, trust)).collect()
}

/// Writes what may be written of a record; `whole` is sabotage.
fn write_piece(sim: &mut SimDisk, piece: &Piece, whole: bool) {
    let range = piece.record.range();
    let zeros;
    let plain = match piece.record.kind() {
        RecordKind::Data => piece.record.payload(),
        RecordKind::Zero | RecordKind::Discard => {
            zeros = Bytes::from(vec![0; range.bytes() as usize]);
            &zeros
        }
    };
    for part in if whole { std::slice::from_ref(&range) } else { &piece.keep } {
        let from = ((part.start - range.start) * SECTOR_BYTES) as usize;
        sim.write(part.start, &plain[from..from + part.bytes() as usize]);
    }
}
