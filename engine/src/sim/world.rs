//! Clock, event queue, workload and faults of one run.
//!
//! Invariants: events run in order of time, ties in a seeded order; the same scenario gives the same run, event by
//! event. Units: nanoseconds since the start. Called by [`super::run`]'s callers; the drivers are `impl World` blocks
//! in `agent`, `relay` and `target`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

use super::agent::{AgentNode, Job};
use super::checker::{Checker, Failure, Rule};
use super::network::{Endpoint, Network, Node};
use super::relay::RelayNode;
use super::rng::Rng;
use super::scenario::{Mode, Scenario};
use super::target::TargetNode;
use super::workload::{Source, next_write};
use crate::format::FormatError;
use crate::format::extent::Record;
use crate::format::frame::{FrameHeader, FrameKind};
use crate::proto::Outgoing;
use crate::proto::target_disk::SessionId;
use crate::units::DiskId;

/// A crash, a cut or a visitor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Disconnect,
    Partition,
    AgentCrash,
    RelayCrash,
    TargetCrash,
    Twin,
}

/// Something that happens at a time.
#[derive(Debug)]
pub(super) enum Event {
    Deliver { connection: u64, to: usize, bytes: Bytes },
    Lost { connection: u64, end: usize },
    AgentDial { agent: usize, life: u64 },
    AgentOpen { agent: usize, life: u64, disk: usize },
    AgentJob { agent: usize, life: u64, job: Job },
    AgentScan { agent: usize, life: u64, disk: usize },
    AgentHarvest { agent: usize, life: u64, disk: usize },
    AgentStart { agent: usize },
    AgentGivesUp { agent: usize, connection: u64 },
    TwinLeaves { agent: usize },
    RelayDial { relay: usize, session: u64 },
    RelayJob { relay: usize, session: u64, job: u64, records: Vec<Record> },
    RelaySent { relay: usize, session: u64, disk: DiskId, cost: u64 },
    RelayTimeout { relay: usize, session: u64 },
    RelayStart { relay: usize },
    DiskDone { disk: usize, life: u64 },
    DiskTimer { disk: usize, life: u64 },
    LateNotice { disk: usize, life: u64, session: SessionId },
    OfferAgain { session: SessionId, disk: usize },
    SessionTimeout { session: SessionId },
    TargetStart,
    Write { disk: usize },
    Mark { disk: usize },
    Fault(Fault),
    FaultsEnd,
}

/// What happened in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Seeds that were played.
    pub seeds: u64,
    /// Simulated time in nanoseconds.
    pub nanos: u64,
    /// Events.
    pub events: u64,
    /// How often what was counted happened.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Adds another run's numbers.
    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.nanos += other.nanos;
        self.events += other.events;
        for (name, count) in &other.counts {
            *self.counts.entry(name).or_default() += count;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} seeds, {:.0} s simulated, {} events",
            self.seeds,
            self.nanos as f64 / 1e9,
            self.events
        )?;
        for (name, count) in &self.counts {
            write!(f, ", {count} {name}")?;
        }
        Ok(())
    }
}

/// Everything of one run.
pub(super) struct World {
    pub(super) plan: Scenario,
    pub(super) now: u64,
    pub(super) rng: Rng,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// Events by the number the queue knows them by, and the numbers that are free again.
    pending: Vec<Option<Event>>,
    free: Vec<usize>,
    pub(super) net: Network,
    pub(super) sources: Vec<Source>,
    pub(super) agents: Vec<AgentNode>,
    pub(super) relays: Vec<RelayNode>,
    pub(super) target: TargetNode,
    pub(super) checker: Checker,
    pub(super) report: Report,
    /// Whether faults and writes are over.
    pub(super) calm: bool,
    next_name: u64,
}

/// How long after the last fault everything must be synced.
const CALM_NANOS_MAX: u64 = 600_000_000_000;
/// Events one run may need.
const EVENTS_MAX: u64 = 3_000_000;

/// Plays a scenario to its end.
///
/// # Errors
/// The first rule that was broken.
pub fn run(scenario: &Scenario) -> Result<Report, Box<Failure>> {
    let mut world = World::new(scenario.clone());
    world
        .play()
        .map_err(|(rule, text)| Box::new(Failure { seed: scenario.seed, at_nanos: world.now, rule, text }))
}

impl World {
    fn new(plan: Scenario) -> Self {
        let mut rng = Rng::new(plan.seed);
        let sources: Vec<Source> =
            plan.disks.iter().map(|(_, sectors, _)| Source::new(rng.bits(), *sectors)).collect();
        let mut world = Self {
            now: 0,
            queue: BinaryHeap::new(),
            pending: Vec::new(),
            free: Vec::new(),
            net: Network::new(plan.delay_nanos, plan.faults.spikes_per_mille),
            agents: (0..plan.agents).map(|index| AgentNode::new(index, None)).collect(),
            relays: (0..plan.relays).map(|_| RelayNode::new()).collect(),
            target: TargetNode::new(&plan, &sources),
            checker: Checker::new(plan.mode, plan.disks.len()),
            report: Report { seeds: 1, ..Report::default() },
            calm: false,
            next_name: 1,
            sources,
            rng,
            plan,
        };
        world.schedule();
        world
    }

    /// Writes, faults and the first steps.
    fn schedule(&mut self) {
        for agent in 0..self.agents.len() {
            let at = self.rng.below(50_000_000);
            self.at(at, Event::AgentDial { agent, life: 0 });
        }
        let active = self.plan.active_nanos;
        for disk in 0..self.sources.len() {
            for _ in 0..self.plan.writes {
                let at = self.rng.below(active);
                self.at(at, Event::Write { disk });
                if self.rng.chance(self.plan.marks_per_mille) {
                    self.at(at + 1, Event::Mark { disk });
                }
            }
        }
        let faults = self.plan.faults;
        for (fault, mean) in [
            (Fault::Disconnect, faults.disconnects),
            (Fault::Partition, faults.partitions),
            (Fault::AgentCrash, faults.agent_crashes),
            (Fault::RelayCrash, faults.relay_crashes),
            (Fault::TargetCrash, faults.target_crashes),
            (Fault::Twin, faults.twins),
        ] {
            for _ in 0..self.rng.between(mean.div_ceil(2), mean + mean / 2) {
                let at = self.rng.below(active);
                self.at(at, Event::Fault(fault));
            }
        }
        self.at(active, Event::FaultsEnd);
    }

    /// Something happens at a time.
    pub(super) fn at(&mut self, time: u64, event: Event) {
        let id = self.free.pop().unwrap_or(self.pending.len());
        self.queue.push(Reverse((time, self.rng.bits(), id)));
        if id == self.pending.len() {
            self.pending.push(None);
        }
        self.pending[id] = Some(event);
    }

    /// Something happens after a delay.
    pub(super) fn after(&mut self, nanos: u64, event: Event) {
        self.at(self.now + nanos, event);
    }

    /// A name that is used once.
    pub(super) const fn fresh_name(&mut self) -> u64 {
        self.next_name += 1;
        self.next_name
    }

    pub(super) fn count(&mut self, what: &'static str, by: u64) {
        *self.report.counts.entry(what).or_default() += by;
    }

    /// One line of the trace.
    pub(super) fn note(&self, line: impl FnOnce() -> String) {
        if self.plan.trace {
            eprintln!("{:>14.6} {}", self.now as f64 / 1e9, line());
        }
    }

    fn play(&mut self) -> Result<Report, (Rule, String)> {
        while let Some(Reverse((time, _, id))) = self.queue.pop() {
            let Some(event) = self.pending[id].take() else { continue };
            self.free.push(id);
            self.now = time;
            self.report.events += 1;
            self.happen(event);
            if let Some(broken) = self.checker.take_broken() {
                return Err(broken);
            }
            if self.calm && self.all_synced() {
                return self.finish();
            }
            if self.report.events > EVENTS_MAX || self.now > self.plan.active_nanos + CALM_NANOS_MAX {
                break;
            }
        }
        Err((Rule::Liveness, format!("not synced after {} events: {}", self.report.events, self.stuck())))
    }

    fn finish(&mut self) -> Result<Report, (Rule, String)> {
        for disk in 0..self.sources.len() {
            let node = &self.target.disks[disk];
            let state = node.td.state().clone();
            self.checker.equal(disk, node.sim.content(), &self.sources[disk]);
            self.checker.prefix(disk, &state, node.sim.content(), &self.sources[disk]);
        }
        self.report.nanos = self.now;
        self.checker.take_broken().map_or_else(|| Ok(self.report.clone()), Err)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { connection, to, bytes } => self.deliver(connection, to, bytes),
            Event::Lost { connection, end } => self.lost(connection, end),
            Event::AgentDial { agent, life } => self.agent_dials(agent, life),
            Event::AgentOpen { agent, life, disk } => self.agent_opens(agent, life, disk),
            Event::AgentJob { agent, life, job } => self.agent_job_done(agent, life, job),
            Event::AgentHarvest { agent, life, disk } => self.agent_harvested(agent, life, disk),
            Event::AgentScan { agent, life, disk } => self.agent_scans(agent, life, disk),
            Event::AgentStart { agent } => self.agent_starts(agent),
            Event::AgentGivesUp { agent, connection } => {
                self.agent_gives_up_if_stopped(agent, connection);
            }
            Event::OfferAgain { session, disk } => self.offer_again(session, disk),
            Event::Mark { disk } => self.agent_marks(disk),
            Event::TwinLeaves { agent } => self.agent_stops(agent),
            Event::RelayDial { relay, session } => self.relay_dials(relay, session),
            Event::RelayJob { relay, session, job, records } => {
                self.relay_job_done(relay, session, job, &records);
            }
            Event::RelaySent { relay, session, disk, cost } => {
                self.relay_sent(relay, session, disk, cost);
            }
            Event::RelayTimeout { relay, session } => self.relay_timeout(relay, session),
            Event::RelayStart { relay } => self.relays[relay].alive = true,
            Event::DiskDone { disk, life } => self.disk_done(disk, life),
            Event::DiskTimer { disk, life } => self.disk_timer(disk, life),
            Event::LateNotice { disk, life, session } => self.late_notice(disk, life, session),
            Event::SessionTimeout { session } => self.session_timeout(session),
            Event::TargetStart => self.target_starts(),
            Event::Write { disk } => self.source_write(disk),
            Event::Fault(fault) => self.fault(fault),
            Event::FaultsEnd => self.faults_end(),
        }
    }

    fn source_write(&mut self, disk: usize) {
        let (range, kind) = next_write(&mut self.rng, self.sources[disk].sectors);
        let id = self.sources[disk].write(range, kind);
        self.count("writes", 1);
        self.note(|| format!("disk{disk} write {id} {kind:?} {range}"));
        if self.plan.mode == Mode::Ordered {
            self.agent_captures(disk, id, range, kind);
        }
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Disconnect => {
                let live = self.net.live();
                if !live.is_empty() {
                    let connection = self.rng.pick(&live);
                    self.count("disconnects", 1);
                    self.sever(connection);
                }
            }
            Fault::Partition => self.partition(),
            Fault::AgentCrash => {
                let agent = self.rng.below(self.plan.agents as u64) as usize;
                self.agent_crashes(agent);
            }
            Fault::RelayCrash if self.relays.is_empty() => {}
            Fault::RelayCrash => {
                let relay = self.rng.below(self.relays.len() as u64) as usize;
                self.relay_crashes(relay);
            }
            Fault::TargetCrash => self.target_crashes(),
            Fault::Twin => self.twin_appears(),
        }
    }

    fn partition(&mut self) {
        let agent = Node::Agent(self.rng.below(self.plan.agents as u64) as usize);
        let (a, b) = match self.relays.len() as u64 {
            0 => (agent, Node::Target),
            count => {
                let relay = Node::Relay(self.rng.below(count) as usize);
                if self.rng.chance(500) { (agent, relay) } else { (relay, Node::Target) }
            }
        };
        let until = self.now + self.rng.between(100_000_000, 3_000_000_000);
        self.count("partitions", 1);
        self.note(|| format!("partition {a:?} {b:?} until {until}"));
        for connection in self.net.block(a, b, until) {
            self.sever(connection);
        }
    }

    fn faults_end(&mut self) {
        self.note(|| "faults end".into());
        self.calm = true;
        self.net.heal();
        self.net.spike_per_mille = 0;
        for agent in self.plan.agents..self.agents.len() {
            self.agent_stops(agent);
        }
        if self.target.alive && self.target.any_failed() {
            self.note(|| "a person restarts the target".into());
            self.target_crashes();
        }
    }

    /// A connection breaks: frames under way are lost, both ends learn of it at their own time.
    pub(super) fn sever(&mut self, connection: u64) {
        let Some(state) = self.net.get_mut(connection) else { return };
        state.severed = true;
        self.note(|| format!("connection {connection} severed"));
        for end in 0..2 {
            let delay = self.rng.pick(&[1_000_000, 30_000_000, 1_000_000_000]);
            let delay = self.rng.below(delay);
            self.after(delay, Event::Lost { connection, end });
        }
    }

    /// One end leaves; the other learns of it later, and may or may not get what is under way.
    pub(super) fn leave(&mut self, connection: u64, end: usize) {
        let quick = self.rng.chance(500);
        let Some(state) = self.net.get_mut(connection) else { return };
        state.open[end] = false;
        state.severed |= quick;
        let delay = self.rng.below(300_000_000);
        self.after(delay, Event::Lost { connection, end: 1 - end });
        self.net.forget_if_over(connection);
    }

    fn lost(&mut self, connection: u64, end: usize) {
        let Some(state) = self.net.get_mut(connection) else { return };
        state.severed = true;
        if !std::mem::replace(&mut state.open[end], false) {
            return;
        }
        let endpoint = state.ends[end];
        self.net.forget_if_over(connection);
        self.note(|| format!("{endpoint:?} lost connection {connection}"));
        match endpoint {
            Endpoint::Agent(agent) => self.agent_lost(agent, connection),
            Endpoint::RelayDown(relay, session) | Endpoint::RelayUp(relay, session) => {
                self.relay_ends(relay, session);
            }
            Endpoint::Target(session) => self.session_ends(session, false),
        }
    }

    /// Puts a frame on a connection as bytes, perhaps with a flipped bit.
    pub(super) fn send(&mut self, connection: u64, from: usize, outgoing: &Outgoing) {
        let mut bytes = BytesMut::with_capacity(outgoing.frame.encoded_bytes());
        for part in outgoing.frame.parts() {
            bytes.put_slice(part);
        }
        let kind = outgoing.frame.kind();
        let batch = matches!(kind, FrameKind::Batch | FrameKind::Bulk);
        if batch && !self.calm && self.rng.chance(self.plan.faults.flips_per_mille) {
            let body = (bytes.len() - FrameHeader::BYTES) as u64;
            let span = if self.rng.chance(500) { body } else { body.min(200) };
            let at = FrameHeader::BYTES + self.rng.below(span) as usize;
            bytes[at] ^= 1 << self.rng.below(8);
            self.count("flipped bits", 1);
            self.note(|| format!("flip in {kind:?} at {at} on connection {connection}"));
        }
        if let Some(at) = self.net.arrival(&mut self.rng, self.now, connection, from, outgoing.lane) {
            self.at(at, Event::Deliver { connection, to: 1 - from, bytes: bytes.freeze() });
        }
    }

    fn deliver(&mut self, connection: u64, to: usize, bytes: Bytes) {
        let Some(state) = self.net.get(connection) else { return };
        if state.severed || !state.open[to] {
            return;
        }
        let endpoint = state.ends[to];
        let (kind, body) = match parse(&bytes) {
            Ok(frame) => frame,
            Err(error) => {
                let text = format!("{endpoint:?} got a frame it cannot read: {error}");
                return self.checker.broke(Rule::Blame, text);
            }
        };
        self.note(|| format!("{endpoint:?} gets {kind:?} of {} bytes", body.len()));
        match endpoint {
            Endpoint::Agent(agent) => self.agent_gets(agent, connection, kind, &body),
            Endpoint::RelayDown(relay, session) | Endpoint::RelayUp(relay, session) => {
                self.relay_gets(relay, session, to == 1, kind, body);
            }
            Endpoint::Target(session) => self.session_gets(session, kind, body),
        }
    }

    /// Whether nothing is left to be done.
    fn all_synced(&self) -> bool {
        self.target.alive && (0..self.sources.len()).all(|disk| self.disk_synced(disk))
    }

    fn stuck(&self) -> String {
        let lines: Vec<String> = (0..self.sources.len())
            .filter(|disk| !self.disk_synced(*disk))
            .map(|disk| self.describe(disk))
            .collect();
        lines.join("; ")
    }
}

/// Reads a frame as a transport does.
fn parse(bytes: &Bytes) -> Result<(FrameKind, Bytes), FormatError> {
    let short = FormatError::Short { what: "Frame", got: bytes.len(), expected: FrameHeader::BYTES };
    let head = bytes.first_chunk().ok_or_else(|| short.clone())?;
    let header = FrameHeader::decode(head)?;
    let body = bytes.slice(FrameHeader::BYTES..);
    if body.len() == header.body_bytes as usize { Ok((header.kind, body)) } else { Err(short) }
}
