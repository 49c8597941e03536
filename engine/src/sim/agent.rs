//! Driver of the agent's core: reads the source, answers work, opens what is offered, connects again.
//!
//! Invariants: what a crash forgets is everything; a chunk's data are held from its read to its send and at most
//! [`CHUNKS_OPEN_MAX`] at once per disk; after a crash in ordered mode a compare pass is asked for at the first open.
//! Called by `sim::world`.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::checker::Rule;
use super::network::Endpoint;
use super::scenario::{Mode, Sabotage};
use super::workload::{Source, WriteKind};
use super::world::{Event, World};
use crate::checksum::UnitHash;
use crate::format::batch::{MarkCause, MarkClass, MarkLabel, Stretch, credit_cost};
use crate::format::extent::Record;
use crate::format::frame::FrameKind;
use crate::format::message::{Auth, ErrorCode, Message, PassCause, PassMode};
use crate::limits::{BULK_RECORD_BYTES_MAX, CHUNKS_OPEN_MAX, DELTA_RECORD_BYTES_MAX};
use crate::proto::Prover;
use crate::proto::agent::{Agent, AgentEvent};
use crate::proto::batch::cut_records;
use crate::proto::compare::{Computed, Question, unit_hashes};
use crate::proto::pass::{PassAction, Sink};
use crate::proto::state::TargetDiskPhase;
use crate::units::{DiskId, PeerId, SectorRange, Sequence, Timestamp};

/// A piece of work that takes time.
#[derive(Clone, Debug)]
pub(super) enum Job {
    Read {
        disk: usize,
        epoch: u64,
        chunk: SectorRange,
        hash: bool,
    },
    Compute {
        disk: usize,
        epoch: u64,
        chunk: SectorRange,
        question: Question,
    },
    Submit {
        disk: usize,
        epoch: u64,
        chunk: SectorRange,
        as_of: Sequence,
        time: Timestamp,
        records: Vec<Record>,
    },
}

/// An agent, or a stale twin of one.
pub(super) struct AgentNode {
    pub(super) identity: usize,
    pub(super) twin: bool,
    /// A twin that was restored from a snapshot reads each disk as this write left it.
    snapshot: Option<Vec<u64>>,
    pub(super) alive: bool,
    life: u64,
    core: Agent,
    /// Names this core in the checker.
    core_name: u64,
    connection: Option<u64>,
    dialling: bool,
    /// Disks opened since the start.
    opened: BTreeSet<usize>,
    kept: BTreeMap<(usize, u64, u64), Bytes>,
    synced: BTreeSet<usize>,
    /// Disks the target took away in this session.
    stopped: BTreeSet<usize>,
    /// Captured writes of each disk that are not harvested yet, oldest first.
    captured: BTreeMap<usize, Vec<Captured>>,
    /// Running scan rounds: when they began.
    scans: BTreeMap<usize, u64>,
    /// Disks with a scan round that began after the last write and ended.
    pub(super) scanned: BTreeSet<usize>,
}

/// A write as it was captured.
struct Captured {
    write: u64,
    records: Vec<Record>,
}

/// Proves an identity to the simulated authority.
struct SimProver(PeerId);

impl Prover for SimProver {
    fn prove(&self, nonce: &[u8; 32], _target: PeerId) -> Auth {
        Auth { agent: self.0, signature: proof(self.0, nonce), certificates: Vec::new() }
    }
}

/// The signature of an agent over a nonce.
pub(super) fn proof(agent: PeerId, nonce: &[u8; 32]) -> Bytes {
    let mut bytes = agent.0.to_vec();
    bytes.extend_from_slice(nonce);
    Bytes::copy_from_slice(blake3::hash(&bytes).as_bytes())
}

pub(super) const fn agent_id(index: usize) -> PeerId {
    PeerId([index as u8 + 1; 16])
}

fn new_core(identity: usize) -> Agent {
    let id = agent_id(identity);
    Agent::new(id, PeerId::NONE, Box::new(SimProver(id)))
}

impl AgentNode {
    pub(super) fn new(index: usize, twin_of: Option<usize>) -> Self {
        let identity = twin_of.unwrap_or(index);
        Self {
            identity,
            twin: twin_of.is_some(),
            snapshot: None,
            alive: true,
            life: 0,
            core: new_core(identity),
            core_name: index as u64,
            connection: None,
            dialling: true,
            opened: BTreeSet::new(),
            kept: BTreeMap::new(),
            synced: BTreeSet::new(),
            stopped: BTreeSet::new(),
            captured: BTreeMap::new(),
            scans: BTreeMap::new(),
            scanned: BTreeSet::new(),
        }
    }
}

/// How long until a broken or refused agent tries again.
const AGAIN_NANOS: u64 = 300_000_000;
/// What a harvested batch of several writes may cost, in bytes: what the smallest window always has room for, once all is
/// written (7/8 of it, for smaller steps are not announced).
const HARVEST_COST_MAX: u64 = 168 << 10;

impl World {
    pub(super) fn agent_dials(&mut self, agent: usize, life: u64) {
        let node = &mut self.agents[agent];
        if !node.alive || node.life != life || node.connection.is_some() {
            return;
        }
        node.dialling = false;
        let (from, identity) = (Endpoint::Agent(agent), node.identity);
        let direct = self.relays.is_empty() || (self.plan.mixed_routes && self.rng.chance(400));
        let connection = if direct {
            self.target_accepts_agent(from, identity)
        } else {
            let relay = self.rng.below(self.relays.len() as u64) as usize;
            self.relay_accepts(relay, from, identity)
        };
        let Some(connection) = connection else { return self.dial_later(agent) };
        let session = self.fresh_name();
        let mut name = [0; 16];
        name[..8].copy_from_slice(&session.to_le_bytes());
        self.note(|| format!("agent{agent} dials: connection {connection}"));
        let chunk_bytes = self.plan.chunk_bytes;
        let node = &mut self.agents[agent];
        node.connection = Some(connection);
        node.core.set_chunk_bytes(chunk_bytes);
        node.core.handle_connected(name);
        self.count("sessions", 1);
        self.agent_pump(agent);
    }

    fn dial_later(&mut self, agent: usize) {
        let node = &mut self.agents[agent];
        if !std::mem::replace(&mut node.dialling, true) {
            let life = node.life;
            let delay = AGAIN_NANOS / 2 + self.rng.below(AGAIN_NANOS);
            self.after(delay, Event::AgentDial { agent, life });
        }
    }

    /// The connection is gone.
    pub(super) fn agent_lost(&mut self, agent: usize, connection: u64) {
        let node = &mut self.agents[agent];
        if node.connection != Some(connection) {
            return;
        }
        node.connection = None;
        node.core.handle_disconnected();
        if self.plan.sabotage == Some(Sabotage::HarvestForgotten) {
            node.captured.clear();
        }
        node.scans.clear();
        node.synced.clear();
        node.stopped.clear();
        self.agent_pump(agent);
        if self.agents[agent].alive {
            self.dial_later(agent);
        }
    }

    /// The agent gives up its session and tries a new one.
    fn agent_gives_up(&mut self, agent: usize) {
        if let Some(connection) = self.agents[agent].connection {
            self.leave(connection, 0);
            self.agent_lost(agent, connection);
        }
    }

    pub(super) fn agent_crashes(&mut self, agent: usize) {
        if !self.agents[agent].alive {
            return;
        }
        self.note(|| format!("agent{agent} crashes"));
        self.count("agent crashes", 1);
        self.agent_stops(agent);
        for disk in 0..self.sources.len() {
            if self.plan.disks[disk].0 == agent {
                self.checker.untracked(disk);
            }
        }
        let delay = self.rng.between(1_000_000, 2_000_000_000);
        self.after(delay, Event::AgentStart { agent });
    }

    pub(super) fn agent_stops(&mut self, agent: usize) {
        if !std::mem::replace(&mut self.agents[agent].alive, false) {
            return;
        }
        if let Some(connection) = self.agents[agent].connection.take() {
            self.leave(connection, 0);
        }
    }

    pub(super) fn agent_starts(&mut self, agent: usize) {
        let name = self.fresh_name();
        let old = &self.agents[agent];
        let (identity, life) = (old.identity, old.life + 1);
        self.agents[agent] =
            AgentNode { life, core_name: name, ..AgentNode::new(agent, None).with_identity(identity) };
        self.note(|| format!("agent{agent} starts"));
        self.after(0, Event::AgentDial { agent, life });
    }

    /// A second agent of the same identity and machine appears for a while.
    pub(super) fn twin_appears(&mut self) {
        let identity = self.rng.below(self.plan.agents as u64) as usize;
        let agent = self.agents.len();
        let name = self.fresh_name();
        let snapshot = self.rng.chance(500).then(|| {
            let newest: Vec<u64> = self.sources.iter().map(Source::newest).collect();
            newest.into_iter().map(|newest| self.rng.below(newest + 1)).collect()
        });
        self.agents.push(AgentNode { core_name: name, snapshot, ..AgentNode::new(agent, Some(identity)) });
        self.count("twins", 1);
        self.note(|| format!("agent{agent} is a twin of agent{identity}"));
        self.after(0, Event::AgentDial { agent, life: 0 });
        let stays = self.rng.between(10_000_000, 2_000_000_000);
        self.after(stays, Event::TwinLeaves { agent });
    }

    pub(super) fn agent_gets(&mut self, agent: usize, connection: u64, kind: FrameKind, body: &Bytes) {
        if self.agents[agent].connection != Some(connection) {
            return;
        }
        self.check_message(agent, kind, body);
        if let Err(error) = self.agents[agent].core.handle_frame(kind, body) {
            self.note(|| format!("agent{agent} ends its session: {error}"));
            self.count("sessions ended by errors", 1);
            return self.agent_gives_up(agent);
        }
        self.agent_pump(agent);
    }

    /// The checker reads what the agent reads.
    fn check_message(&mut self, agent: usize, kind: FrameKind, body: &Bytes) {
        let name = self.agents[agent].core_name;
        match Message::decode(kind, body) {
            Ok(Message::Ack(ack)) => self.checker.acknowledged(self.disk_index(ack.disk), name, &ack),
            Ok(Message::BulkAck(head, ranges)) => {
                self.checker.bulk_acknowledged(self.disk_index(head.disk), &head, &ranges);
            }
            Ok(Message::Error(head, text)) => {
                let fair = match head.code {
                    ErrorCode::Fork | ErrorCode::Limit | ErrorCode::Size | ErrorCode::UnknownDisk => false,
                    // A flipped bit makes the other end complain, rightly.
                    ErrorCode::Protocol | ErrorCode::Grant => head.disk == DiskId::NONE,
                    _ => true,
                };
                if !fair {
                    self.checker.broke(Rule::Blame, format!("agent{agent} is told {:?}: {text}", head.code));
                }
                self.note(|| format!("agent{agent} is told {:?}: {text}", head.code));
            }
            _ => {}
        }
    }

    /// Takes everything out of the core.
    fn agent_pump(&mut self, agent: usize) {
        loop {
            let node = &mut self.agents[agent];
            if let Some(event) = node.core.poll_event() {
                self.agent_event(agent, event);
                continue;
            }
            let Some(outgoing) = node.core.poll_transmit() else { return };
            if let Some(connection) = node.connection {
                self.send(connection, 0, &outgoing);
            }
        }
    }

    fn agent_event(&mut self, agent: usize, event: AgentEvent) {
        let life = self.agents[agent].life;
        match event {
            AgentEvent::Ready
            | AgentEvent::Warned { .. }
            | AgentEvent::Policy(_)
            | AgentEvent::MarkRequested(_)
            | AgentEvent::ScanRead { .. } => {}
            AgentEvent::Marked { disk, label } => {
                self.checker.mark_acknowledged(self.disk_index(disk), label.point);
                self.count("marks durable", 1);
            }
            AgentEvent::MarkLost { .. } => self.count("marks lost", 1),
            AgentEvent::TargetLost { disk, from, to } => {
                self.count("sequences a target lost and got again", to.0 + 1 - from.0);
                let disk = self.disk_index(disk);
                self.note(|| format!("agent{agent} sends {from} to {to} of disk{disk} again: they are lost"));
            }
            AgentEvent::Resync { disk, cause } => {
                let disk = self.disk_index(disk);
                self.note(|| format!("agent{agent} asks for a compare pass of disk{disk}: {cause:?}"));
                let node = &mut self.agents[agent];
                node.synced.remove(&disk);
                node.scans.remove(&disk);
            }
            AgentEvent::Offered { disk, .. } => {
                let disk = self.disk_index(disk);
                let usual = self.rng.pick(&[0, 1_000_000, 200_000_000]);
                let delay = self.rng.below(usual);
                self.after(delay, Event::AgentOpen { agent, life, disk });
            }
            AgentEvent::Opened { disk, mode } => self.agent_opened(agent, disk, mode),
            AgentEvent::Work { disk, epoch, sink, as_of, action } => {
                self.agent_work(agent, disk, epoch, sink, as_of, action);
            }
            AgentEvent::Synced { disk } => {
                self.note(|| format!("agent{agent} synced disk{}", self.disk_index(disk)));
                self.agent_synced(agent, self.disk_index(disk));
            }
            AgentEvent::ScanDone { disk } => {
                let disk = self.disk_index(disk);
                let calm_since = self.plan.active_nanos;
                let node = &mut self.agents[agent];
                if node.scans.remove(&disk).is_some_and(|begun| begun >= calm_since) {
                    node.scanned.insert(disk);
                }
                self.count("scan rounds", 1);
                let delay = self.rng.below(1_000_000_000);
                self.after(delay, Event::AgentScan { agent, life, disk });
            }
            AgentEvent::Stopped { disk, code, text } => {
                let disk = self.disk_index(disk);
                self.note(|| format!("agent{agent} stopped disk{disk}: {code:?} {text}"));
                self.count("disks stopped", 1);
                self.agents[agent].synced.remove(&disk);
                self.agents[agent].scans.remove(&disk);
                self.agents[agent].stopped.insert(disk);
                self.agent_reopens(agent, code);
            }
        }
    }

    /// A stopped disk may be offered again in this session, and is at the next one.
    fn agent_reopens(&mut self, agent: usize, code: ErrorCode) {
        if code == ErrorCode::Target && !self.calm {
            return; // a person must look first
        }
        if self.agents[agent].twin {
            return;
        }
        match self.agents[agent].connection {
            Some(connection) if self.rng.chance(600) => {
                self.after(AGAIN_NANOS, Event::AgentGivesUp { agent, connection });
            }
            _ => self.agent_gives_up(agent),
        }
    }

    /// The disk was not offered again: a new session helps.
    pub(super) fn agent_gives_up_if_stopped(&mut self, agent: usize, connection: u64) {
        let node = &self.agents[agent];
        if node.connection == Some(connection) && !node.stopped.is_empty() {
            self.agent_gives_up(agent);
        }
    }

    pub(super) fn agent_opens(&mut self, agent: usize, life: u64, disk: usize) {
        let node = &mut self.agents[agent];
        if node.alive && node.life == life {
            node.core.open(self.target.disks[disk].id, self.sources[disk].sectors);
            self.agent_pump(agent);
        }
    }

    fn agent_opened(&mut self, agent: usize, id: DiskId, mode: PassMode) {
        let disk = self.disk_index(id);
        self.note(|| format!("agent{agent} opened disk{disk}: {mode:?}"));
        self.count("opens", 1);
        if self.agents[agent].twin {
            self.checker.untracked(disk);
        }
        let first = self.agents[agent].opened.insert(disk);
        self.agents[agent].stopped.remove(&disk);
        self.agents[agent].synced.remove(&disk);
        self.agents[agent].scans.remove(&disk);
        if mode == PassMode::Done {
            self.agent_synced(agent, disk);
        }
        if first && mode != PassMode::Copy && self.plan.mode == Mode::Ordered && !self.agents[agent].twin {
            self.agents[agent].core.begin_pass(id, PassCause::TrackingLost);
        }
    }

    fn agent_synced(&mut self, agent: usize, disk: usize) {
        let node = &mut self.agents[agent];
        node.synced.insert(disk);
        node.scans.remove(&disk);
        let life = node.life;
        if self.plan.mode == Mode::Scan {
            let delay = self.rng.below(500_000_000);
            self.after(delay, Event::AgentScan { agent, life, disk });
        }
    }

    pub(super) fn agent_scans(&mut self, agent: usize, life: u64, disk: usize) {
        let node = &mut self.agents[agent];
        if !node.alive || node.life != life || !node.synced.contains(&disk) {
            return;
        }
        if node.core.begin_scan(self.target.disks[disk].id) {
            node.scans.insert(disk, self.now);
            self.note(|| format!("agent{agent} scans disk{disk}"));
        } else if !node.scans.contains_key(&disk) {
            self.after(200_000_000, Event::AgentScan { agent, life, disk });
        }
        self.agent_pump(agent);
    }

    fn agent_work(
        &mut self,
        agent: usize,
        id: DiskId,
        epoch: u64,
        sink: Sink,
        as_of: Sequence,
        action: PassAction,
    ) {
        let disk = self.disk_index(id);
        let life = self.agents[agent].life;
        let job = match action {
            PassAction::Read { chunk, hash, .. } => Job::Read { disk, epoch, chunk, hash },
            PassAction::Compute { chunk, question } => Job::Compute { disk, epoch, chunk, question },
            PassAction::Send { chunk, pieces } => {
                return self.agent_sends(agent, disk, epoch, sink, as_of, chunk, &pieces);
            }
            PassAction::Ask { .. } => {
                return self.checker.broke(Rule::Blame, "the core asks its driver to ask".into());
            }
        };
        if self.plan.sabotage != Some(Sabotage::NeverRead) {
            let usual = self.plan.disk_nanos;
            let delay = self.rng.between(usual / 4, usual * 4);
            self.after(delay, Event::AgentJob { agent, life, job });
        }
    }

    pub(super) fn agent_job_done(&mut self, agent: usize, life: u64, job: Job) {
        let node = &mut self.agents[agent];
        if !node.alive || node.life != life {
            return;
        }
        let credulous = self.plan.sabotage == Some(Sabotage::BelieveCrcs);
        let result = match job {
            Job::Read { disk, epoch, chunk, hash } => {
                let source = &mut self.sources[disk];
                let data = match &node.snapshot {
                    Some(writes) => source.read_as_of(chunk, writes[disk]),
                    None => Bytes::copy_from_slice(source.read(chunk)),
                };
                let unit_hashes = hash.then(|| match node.snapshot.is_some() {
                    true => unit_hashes(&data),
                    false => source.unit_hashes(chunk),
                });
                node.kept.retain(|(other, old, _), _| *other != disk || *old >= epoch);
                node.kept.insert((disk, epoch, chunk.start), data);
                let held = node.kept.keys().filter(|key| (key.0, key.1) == (disk, epoch)).count() as u64;
                self.checker.bounded("an agent", disk, held, CHUNKS_OPEN_MAX as u64);
                node.core.handle_read(self.target.disks[disk].id, epoch, chunk, unit_hashes)
            }
            Job::Compute { disk, epoch, chunk, question } => {
                let data = node.kept.get(&(disk, epoch, chunk.start)).cloned();
                match data {
                    Some(data) => {
                        let computed = match question.answer(&data) {
                            Computed::Confirmed(_) if credulous => Computed::Confirmed(UnitHash::ZEROS),
                            computed => computed,
                        };
                        node.core.handle_computed(self.target.disks[disk].id, epoch, chunk, computed)
                    }
                    None => Ok(()), // of a walk that is over
                }
            }
            Job::Submit { disk, epoch, chunk, as_of, time, records } => {
                node.core.submit_chunk(self.target.disks[disk].id, epoch, chunk, as_of, time, records);
                Ok(())
            }
        };
        if let Err(error) = result {
            self.checker.broke(Rule::Blame, format!("agent{agent} cannot answer its own core: {error}"));
        }
        self.agent_pump(agent);
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one event of the core")]
    fn agent_sends(
        &mut self,
        agent: usize,
        disk: usize,
        epoch: u64,
        sink: Sink,
        as_of: Sequence,
        chunk: SectorRange,
        pieces: &[SectorRange],
    ) {
        let time = Timestamp(self.now);
        let node = &mut self.agents[agent];
        let Some(data) = node.kept.remove(&(disk, epoch, chunk.start)) else { return };
        let record_bytes_max =
            if sink == Sink::Bulk { BULK_RECORD_BYTES_MAX } else { DELTA_RECORD_BYTES_MAX };
        let records = cut_records(chunk.start, &data, pieces, record_bytes_max);
        let (life, within) = (node.life, self.plan.submit_nanos);
        let job = Job::Submit { disk, epoch, chunk, as_of, time, records };
        if within == 0 {
            return self.agent_job_done(agent, life, job);
        }
        let delay = self.rng.below(within);
        self.after(delay, Event::AgentJob { agent, life, job });
    }

    /// Somebody wants a mark.
    pub(super) fn agent_marks(&mut self, disk: usize) {
        let agent = self.plan.disks[disk].0;
        if self.agents[agent].alive {
            self.agent_harvests(agent, disk);
            let (id, source_time) = (self.target.disks[disk].id, Timestamp(self.now));
            // Several at one sequence, too: each is durable or lost by itself.
            for _ in 0..self.rng.between(1, 4) {
                let mut point = [0; 16];
                point[..8].copy_from_slice(&self.fresh_name().to_le_bytes());
                let label = MarkLabel {
                    point,
                    ..MarkLabel::of_disk(MarkClass::Crash, MarkCause::Timer, source_time)
                };
                let placed = self.agents[agent].core.submit_mark(id, label);
                self.count(if placed { "marks" } else { "marks without room" }, 1);
            }
            self.agent_pump(agent);
        }
    }

    /// A write of the source in ordered mode.
    pub(super) fn agent_captures(&mut self, disk: usize, write: u64, range: SectorRange, kind: WriteKind) {
        let agent = self.plan.disks[disk].0;
        if !self.agents[agent].alive {
            return;
        }
        let records: Vec<Record> = match kind {
            WriteKind::Zero => vec![Record::zeros(range)],
            WriteKind::Discard => vec![Record::discard(range)],
            WriteKind::Data => {
                let data = Bytes::copy_from_slice(self.sources[disk].read(range));
                cut_records(range.start, &data, &[range], DELTA_RECORD_BYTES_MAX)
            }
        };
        let node = &mut self.agents[agent];
        let waiting = node.captured.entry(disk).or_default();
        waiting.push(Captured { write, records });
        let (first, life, within) = (waiting.len() == 1, node.life, self.plan.harvest_nanos);
        if within == 0 {
            self.agent_harvested(agent, life, disk);
        } else if first {
            let delay = self.rng.below(within);
            self.after(delay, Event::AgentHarvest { agent, life, disk });
        }
    }

    pub(super) fn agent_harvested(&mut self, agent: usize, life: u64, disk: usize) {
        if self.agents[agent].alive && self.agents[agent].life == life {
            self.agent_harvests(agent, disk);
            self.agent_pump(agent);
        }
    }

    /// What was captured goes into batches, as much into each as its credit allows.
    fn agent_harvests(&mut self, agent: usize, disk: usize) {
        let id = self.target.disks[disk].id;
        let mut waiting = self.agents[agent].captured.remove(&disk).unwrap_or_default();
        if self.plan.sabotage == Some(Sabotage::HarvestReversed) {
            waiting.reverse();
        }
        let mut waiting = waiting.into_iter().peekable();
        while let Some(first) = waiting.next() {
            let mut writes = vec![(first.write, first.records.len())];
            let mut records = first.records;
            let mut cost = credit_cost(&records);
            while let Some(more) =
                waiting.next_if(|more| cost + credit_cost(&more.records) <= HARVEST_COST_MAX)
            {
                cost += credit_cost(&more.records);
                writes.push((more.write, more.records.len()));
                records.extend(more.records);
            }
            let (count, time) = (records.len() as u64, Timestamp(self.now));
            let Some(last) = self.agents[agent].core.submit_delta(id, Stretch::Ordered, time, records) else {
                continue;
            };
            let mut sequence = last.0 - count;
            for (write, records) in writes {
                sequence += records as u64;
                self.checker.assigned(disk, Sequence(sequence), records, write);
            }
        }
    }

    /// How many of the newest writes of a disk are captured and not harvested.
    pub(super) fn captured_of(&self, disk: usize) -> u64 {
        let captured = &self.agents[self.plan.disks[disk].0].captured;
        captured.get(&disk).map_or(0, |waiting| waiting.len() as u64)
    }

    /// Whether a disk is synced, as far as its agent knows, and really.
    pub(super) fn disk_synced(&self, disk: usize) -> bool {
        let node = &self.agents[self.plan.disks[disk].0];
        let target = &self.target.disks[disk];
        let position = node.core.position(target.id);
        node.alive
            && target.td.phase() == TargetDiskPhase::Open
            && target.td.state().mode == PassMode::Done
            && position.is_some_and(|(durable, last)| durable == last && target.td.durable() == last)
            && node.synced.contains(&disk)
            && node.core.pass_progress(target.id).is_none()
            && !node.core.mark_pending(target.id)
            && self.captured_of(disk) == 0
            && (self.plan.mode == Mode::Ordered || node.scanned.contains(&disk))
    }

    pub(super) fn describe(&self, disk: usize) -> String {
        let node = &self.agents[self.plan.disks[disk].0];
        let target = &self.target.disks[disk];
        format!(
            "disk{disk}: agent alive {} connected {:?} ready {} position {:?} pass {:?} synced {} scans {:?} mark {}, \
             target {:?} durable {} state {:?}",
            node.alive,
            node.connection,
            node.core.is_ready(),
            node.core.position(target.id),
            node.core.pass_progress(target.id),
            node.synced.contains(&disk),
            node.scans,
            node.core.mark_pending(target.id),
            target.td.phase(),
            target.td.durable(),
            (target.td.state().mode, target.td.state().pass, target.td.state().settled.sector_count()),
        )
    }
}

impl AgentNode {
    fn with_identity(self, identity: usize) -> Self {
        Self { identity, ..self }
    }
}
