//! One relayed session: an agent's connection, an own connection to the master target, and the frames between them.
//!
//! Order of a session: the agent stands by, if it likes → its HELLO → its share of the memory → the target is dialled →
//! HELLO passes on → frames both ways until either side is gone. The protocol is `proto::process_server`; this file
//! moves its frames, and answers probes, which are not passed on.
//!
//! Invariants: an agent has exactly one upstream connection and nobody shares it, so a slow target disk holds back one
//! machine only; every open disk has its window in the memory budget before the target hears of it; frames of a side
//! are not read while too many control frames for the other side wait; whatever ends a session is told to the agent
//! (where it still listens) and logged once, both connections close, and nothing of it stays: the agent reconnects and
//! resumes. Units: bytes. Called by `daemon`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::frame::{FrameHeader, FrameKind};
use reprotect_engine::format::message::{ErrorCode, Message};
use reprotect_engine::format::standby::{Load, Probe};
use reprotect_engine::host::output::Estimate;
use reprotect_engine::host::shutdown::Shutdown;
use reprotect_engine::limits::HANDSHAKE_NANOS_MAX;
use reprotect_engine::net::endpoint::{CloseCode, PeerConnection};
use reprotect_engine::net::lanes::{self, Arrival, LaneError, LaneReader, LaneWriter};
use reprotect_engine::net::mono_clock;
use reprotect_engine::net::shaper::Shaper;
use reprotect_engine::net::silence::Silence;
use reprotect_engine::net::standby::{self, Lanes, stand_by};
use reprotect_engine::proto::process_server::{RelayAction, RelaySession, Side};
use reprotect_engine::proto::{Lane, Outgoing, ProtoError};
use reprotect_engine::units::{DiskId, PeerId};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::budget::{Budget, Share};
use crate::recode::{RecodePool, Recoded};
use crate::status::{DiskStatus, Entry, Register, SessionState, SessionStatus};
use crate::upstream::{Upstream, UpstreamError};

/// How often windows follow the budget and numbers are published.
const TICK: Duration = Duration::from_millis(250);
/// How long an agent is given to read why its session ended.
const FAREWELL: Duration = Duration::from_secs(2);
/// Ticks in a row without a sign of life from the target after which it counts as lost. The transport would take 5 s.
const SILENT_TICKS: u32 = 8;
/// Control frames waiting for one side; beyond, nothing more is read from the other.
const CONTROL_BYTES_MAX: u64 = 4 << 20;

/// What all sessions share.
#[derive(Debug)]
pub struct Relay {
    /// The way to the targets.
    pub upstream: Upstream,
    /// Compression.
    pub pool: RecodePool,
    /// Memory.
    pub budget: Arc<Budget>,
    /// Who is here.
    pub register: Arc<Register>,
    /// How fast data may leave for the targets.
    pub shaper: Arc<Shaper>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the agent's connection ended: {0}")]
    AgentGone(String),
    #[error("the agent sent bytes that are no frame: {0}")]
    AgentGarbage(FormatError),
    #[error(transparent)]
    Proto(#[from] ProtoError),
    #[error(transparent)]
    Unreachable(#[from] UpstreamError),
    #[error(
        "the connection with master target {target} at {address} was lost: {reason}; reconnect, the session resumes where the target stands"
    )]
    TargetLost { target: PeerId, address: String, reason: String },
    #[error("{0}")]
    NoMemory(String),
    #[error("the process server is stopping")]
    Stopping,
}

impl End {
    /// What the agent is told, if it can be told.
    const fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::AgentGone(_) | Self::Stopping => None,
            Self::AgentGarbage(_) => Some(ErrorCode::Protocol),
            Self::Proto(error) => Some(error.code()),
            Self::Unreachable(_) | Self::TargetLost { .. } => Some(ErrorCode::Upstream),
            Self::NoMemory(_) => Some(ErrorCode::Limit),
        }
    }
}

/// Comes back when a frame was handed to the transport.
#[derive(Clone, Copy, Debug)]
struct Token {
    lane: Lane,
    disk: DiskId,
    cost: u64,
    wire_bytes: u64,
}

impl Token {
    /// Of a frame that nobody waits for.
    const IDLE: Self = Self { lane: Lane::Control, disk: DiskId::NONE, cost: 0, wire_bytes: 0 };
}

/// One side's connection with its lanes.
#[derive(Debug)]
struct Line {
    peer: PeerConnection,
    reader: LaneReader,
    writer: LaneWriter<Token>,
    written: mpsc::UnboundedReceiver<Token>,
    /// Control bytes queued and not yet handed to the transport.
    control_bytes: u64,
}

impl Line {
    fn new(peer: PeerConnection, (reader, writer, written): Lanes<Token>) -> Self {
        Self { peer, reader, writer, written, control_bytes: 0 }
    }

    fn send(&mut self, outgoing: Outgoing, disk: DiskId, cost: u64) {
        let wire_bytes = outgoing.frame.encoded_bytes() as u64;
        let lane = outgoing.lane;
        if lane == Lane::Control {
            self.control_bytes += wire_bytes;
        }
        self.writer.send(outgoing, Token { lane, disk, cost, wire_bytes });
    }

    const fn is_congested(&self) -> bool {
        self.control_bytes > CONTROL_BYTES_MAX
    }
}

/// What the loop waits for.
enum Event {
    Arrived(Side, Arrival),
    Written(Side, Token),
    Recoded(Recoded),
    Tick,
    Stop,
}

/// What a disk of the session has beside the protocol's state.
#[derive(Debug)]
struct DiskShare {
    share: Share,
    batch_bytes: u64,
    estimate: Estimate,
}

struct Session {
    relay: Arc<Relay>,
    core: RelaySession,
    agent: Line,
    target: Option<Line>,
    target_silence: Silence,
    send_share: Share,
    /// Reserved with the session, for the first disk it opens.
    first_window: Option<Share>,
    disks: BTreeMap<DiskId, DiskShare>,
    recoded_in: mpsc::UnboundedSender<Recoded>,
    recoded: mpsc::UnboundedReceiver<Recoded>,
    status: SessionStatus,
    entry: Entry,
    began: Instant,
}

impl Relay {
    /// Serves one agent's connection to its end.
    pub async fn serve(self: Arc<Self>, peer: PeerConnection, shutdown: Shutdown) {
        let agent = peer.peer.peer;
        let address = peer.place();
        let begun = tokio::select! {
            begun = self.begin(&peer) => begun,
            () = shutdown.requested() => return CloseCode::ShuttingDown.close(&peer.connection),
        };
        let (lanes, first) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                tracing::debug!(%agent, %address, %error, "no session begun");
                return CloseCode::Violation.close(&peer.connection);
            }
        };
        let entry = self.register.enter(SessionStatus {
            agent: agent.to_string(),
            address: address.clone(),
            ..SessionStatus::default()
        });
        let mut line = Line::new(peer, lanes);
        let Some((send_share, first_window)) = self.budget.session() else {
            self.register.count_refused();
            let end = End::NoMemory(format!(
                "this process server's memory budget of {} bytes is given to other machines; raise `memory` there, or \
                 use another process server",
                self.budget.total_bytes()
            ));
            tracing::warn!(%agent, %address, reason = %end, "session refused");
            return farewell(&mut line, &end).await;
        };
        tracing::info!(%agent, %address, "session began");
        let mut session = Session::new(self, line, (send_share, first_window), entry);
        let end = session.run(first, &shutdown).await;
        session.finish(&end).await;
    }

    /// Opens the lanes and answers probes until the agent sends a session's first frame.
    async fn begin(&self, peer: &PeerConnection) -> Result<(Lanes<Token>, Arrival), LaneError> {
        let limit = Duration::from_nanos(HANDSHAKE_NANOS_MAX);
        let mut lanes = timeout(limit, lanes::accepted(&peer.connection))
            .await
            .map_err(|_| LaneError::Ended("no control stream within 10 s".to_owned()))??;
        let (kind, body) = stand_by(&mut lanes, || Token::IDLE, |probe| self.load(probe)).await?;
        Ok((lanes, Arrival::Frame(kind, body)))
    }

    /// How this process server stands.
    fn load(&self, probe: Probe) -> Load {
        Load {
            token: probe.token,
            target_micros: self.upstream.target_micros(),
            sessions: self.register.sessions(),
            room_permille: self.budget.room_permille(),
            accepts: self.budget.has_room_for_a_session(),
        }
    }
}

/// Tells the agent why, waits until it has gone or has had time to read it, and closes.
async fn farewell(agent: &mut Line, end: &End) {
    let close = match end {
        End::Stopping => CloseCode::ShuttingDown,
        End::AgentGarbage(_) | End::Proto(_) => CloseCode::Violation,
        _ => CloseCode::Finished,
    };
    if let Some(code) = end.code() {
        let message = Message::error(DiskId::NONE, code, &end.to_string());
        agent.send(Outgoing::control(message.encode()), DiskId::NONE, 0);
        // Closing at once would throw away what the agent has not yet received.
        let _ = timeout(FAREWELL, agent.peer.connection.closed()).await;
    }
    close.close(&agent.peer.connection);
}

impl Session {
    fn new(relay: Arc<Relay>, agent: Line, (send_share, first_window): (Share, Share), entry: Entry) -> Self {
        let peer = agent.peer.peer.peer;
        let (recoded_in, recoded) = mpsc::unbounded_channel();
        let status = SessionStatus {
            agent: peer.to_string(),
            address: agent.peer.place(),
            ..SessionStatus::default()
        };
        Self {
            // No disk has a window before it has its share.
            core: RelaySession::new(peer, 0, mono_clock()),
            relay,
            agent,
            target: None,
            target_silence: Silence::default(),
            send_share,
            first_window: Some(first_window),
            disks: BTreeMap::new(),
            recoded_in,
            recoded,
            status,
            entry,
            began: Instant::now(),
        }
    }

    async fn run(&mut self, first: Arrival, shutdown: &Shutdown) -> End {
        match self.open(first, shutdown).await {
            Ok(()) => self.pass_frames(shutdown).await,
            Err(end) => end,
        }
    }

    /// Takes the agent's HELLO and connects with the target it leads to.
    async fn open(&mut self, first: Arrival, shutdown: &Shutdown) -> Result<(), End> {
        self.handle_arrival(Side::Agent, first)?;
        let Some(RelayAction::Dial(wanted)) = self.core.poll_action() else {
            return Err(ProtoError::Unexpected { got: "a frame", state: "waiting for HELLO" }.into());
        };
        self.status.state = SessionState::Dialling;
        self.publish();
        let relay = Arc::clone(&self.relay);
        let peer = tokio::select! {
            dialled = relay.upstream.dial(wanted) => dialled?,
            reason = self.agent.peer.connection.closed() => return Err(End::AgentGone(reason.to_string())),
            () = shutdown.requested() => return Err(End::Stopping),
        };
        peer.connection.set_send_window(self.send_share.bytes());
        let lost = |reason: String| End::TargetLost { target: peer.peer.peer, address: peer.place(), reason };
        let lanes = lanes::dialled(&peer.connection).await.map_err(|error| lost(error.to_string()))?;
        tracing::info!(
            agent = %self.agent.peer.peer.peer,
            target = %peer.peer.peer,
            address = %peer.place(),
            "connected with the master target"
        );
        self.status.target = Some(format!("{} at {}", peer.peer.peer, peer.place()));
        self.status.state = SessionState::Relaying;
        let mut line = Line::new(peer, lanes);
        line.writer.shape(Arc::clone(&relay.shaper));
        self.target = Some(line);
        self.core.handle_dialled();
        Ok(())
    }

    async fn pass_frames(&mut self, shutdown: &Shutdown) -> End {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Err(end) = self.perform_actions() {
                return end;
            }
            let Some(event) = self.next_event(&mut tick, shutdown).await else { return End::Stopping };
            let result = match event {
                Event::Arrived(side, arrival) => self.handle_arrival(side, arrival),
                Event::Written(side, token) => {
                    self.handle_written(side, token);
                    Ok(())
                }
                Event::Recoded(Recoded { job, records }) => {
                    self.core.handle_recoded(job, &records);
                    Ok(())
                }
                Event::Tick => self.handle_tick(),
                Event::Stop => Err(End::Stopping),
            };
            if let Err(end) = result {
                return end;
            }
        }
    }

    /// The next thing that happens; `None` only without a target.
    async fn next_event(&mut self, tick: &mut tokio::time::Interval, shutdown: &Shutdown) -> Option<Event> {
        let target = self.target.as_mut()?;
        // An agent that does not read its answers is not read.
        let read_target = !self.agent.is_congested();
        let read_agent = !target.is_congested() && read_target;
        Some(tokio::select! {
            Some(token) = target.written.recv() => Event::Written(Side::Target, token),
            Some(token) = self.agent.written.recv() => Event::Written(Side::Agent, token),
            arrival = target.reader.next(), if read_target => Event::Arrived(Side::Target, arrival),
            Some(recoded) = self.recoded.recv() => Event::Recoded(recoded),
            arrival = self.agent.reader.next(), if read_agent => Event::Arrived(Side::Agent, arrival),
            _ = tick.tick() => Event::Tick,
            () = shutdown.requested() => Event::Stop,
        })
    }

    fn handle_arrival(&mut self, side: Side, arrival: Arrival) -> Result<(), End> {
        match arrival {
            Arrival::Over(error) => Err(self.over(side, error)),
            Arrival::Frame(kind, body) => {
                let wire_bytes = (FrameHeader::BYTES + body.len()) as u64;
                match side {
                    Side::Agent => {
                        self.status.traffic.from_agent_bytes += wire_bytes;
                        self.handle_agent_frame(kind, body)
                    }
                    Side::Target => {
                        self.status.traffic.from_target_bytes += wire_bytes;
                        self.handle_target_frame(kind, body)
                    }
                }
            }
        }
    }

    fn handle_agent_frame(&mut self, kind: FrameKind, body: Bytes) -> Result<(), End> {
        if kind == FrameKind::Probe {
            let answer = standby::answer(&body, |probe| self.relay.load(probe));
            let answer = answer.map_err(|error| self.over(Side::Agent, error))?;
            self.agent.send(answer, DiskId::NONE, 0);
            return Ok(());
        }
        if kind == FrameKind::OpenDisk
            && let Message::OpenDisk(head, _) = Message::decode(kind, &body).map_err(ProtoError::from)?
            && !self.disks.contains_key(&head.disk)
        {
            let Some(share) = self.first_window.take().or_else(|| self.relay.budget.disk()) else {
                self.refuse_disk(head.disk);
                return Ok(());
            };
            self.core.set_window(head.disk, share.bytes());
            let entry = DiskShare { share, batch_bytes: 0, estimate: Estimate::default() };
            self.disks.insert(head.disk, entry);
        }
        self.core.handle_frame(Side::Agent, kind, body)?;
        self.status.held_bytes_max = self.status.held_bytes_max.max(self.core.held_bytes());
        Ok(())
    }

    fn refuse_disk(&mut self, disk: DiskId) {
        let budget = &self.relay.budget;
        let text = format!(
            "this process server's memory budget of {} bytes has no room for another disk; raise `memory` there, or \
             use another process server",
            budget.total_bytes()
        );
        tracing::warn!(agent = %self.agent.peer.peer.peer, %disk, reason = text, "disk refused");
        self.relay.register.count_refused();
        let message = Message::error(disk, ErrorCode::Limit, &text);
        self.agent.send(Outgoing::control(message.encode()), DiskId::NONE, 0);
    }

    fn handle_target_frame(&mut self, kind: FrameKind, body: Bytes) -> Result<(), End> {
        let (refused, retired) = match kind {
            FrameKind::Error | FrameKind::Fenced => match Message::decode(kind, &body) {
                Ok(Message::Error(head, _)) => (Some(head.disk), head.code == ErrorCode::UnknownDisk),
                Ok(Message::Fenced(fenced)) => (Some(fenced.disk), false),
                _ => (None, false),
            },
            _ => (None, false),
        };
        self.core.handle_frame(Side::Target, kind, body)?;
        if let Some(disk) = refused.filter(|_| retired) {
            self.core.retire(disk);
        }
        // A disk that the target never opened needs no memory; one that was open keeps it until its bytes are gone.
        if let Some(disk) = refused
            && !self.core.disks().any(|open| open.disk == disk)
        {
            self.disks.remove(&disk);
        }
        Ok(())
    }

    fn over(&self, side: Side, error: LaneError) -> End {
        match (side, error) {
            (Side::Agent, LaneError::Format(error)) => End::AgentGarbage(error),
            (Side::Agent, LaneError::Ended(reason)) => End::AgentGone(reason),
            (Side::Target, error) => match &self.target {
                Some(line) => End::TargetLost {
                    target: line.peer.peer.peer,
                    address: line.peer.place(),
                    reason: error.to_string(),
                },
                None => End::Stopping,
            },
        }
    }

    fn handle_written(&mut self, side: Side, token: Token) {
        let line = match side {
            Side::Agent => Some(&mut self.agent),
            Side::Target => self.target.as_mut(),
        };
        if let Some(line) = line
            && token.lane == Lane::Control
        {
            line.control_bytes = line.control_bytes.saturating_sub(token.wire_bytes);
        }
        if side == Side::Agent {
            self.status.traffic.to_agent_bytes += token.wire_bytes;
            return;
        }
        self.status.traffic.to_target_bytes += token.wire_bytes;
        if token.cost == 0 {
            return;
        }
        self.status.traffic.batch_bytes += token.wire_bytes;
        self.status.sending_bytes = self.status.sending_bytes.saturating_sub(token.cost);
        if let Some(disk) = self.disks.get_mut(&token.disk) {
            disk.batch_bytes += token.wire_bytes;
        }
        self.core.handle_forwarded(token.disk, token.cost);
        self.follow_budget(Some(token.disk));
    }

    /// Moves windows towards their equal part of the budget.
    fn follow_budget(&mut self, only: Option<DiskId>) {
        let states: Vec<_> =
            self.core.disks().filter(|state| only.is_none_or(|id| id == state.disk)).collect();
        for state in states {
            let Some(disk) = self.disks.get_mut(&state.disk) else { continue };
            let before = disk.share.bytes();
            let window = disk.share.adjust(state.outstanding_bytes);
            if window != before {
                self.core.set_window(state.disk, window);
            }
        }
    }

    fn perform_actions(&mut self) -> Result<(), End> {
        while let Some(action) = self.core.poll_action() {
            match action {
                RelayAction::Dial(_) => {} // taken where the session opens; there is one per session
                RelayAction::Recode { job, records } => {
                    let reply = self.recoded_in.clone();
                    self.relay
                        .pool
                        .submit(job, records, reply)
                        .map_err(|error| ProtoError::Limit(error.to_string()))?;
                }
                RelayAction::Forward { to: Side::Agent, outgoing, disk, cost } => {
                    self.agent.send(outgoing, disk, cost);
                }
                RelayAction::Forward { to: Side::Target, outgoing, disk, cost } => {
                    self.status.sending_bytes += cost;
                    if let Some(target) = &mut self.target {
                        target.send(outgoing, disk, cost);
                    }
                }
            }
        }
        Ok(())
    }

    fn handle_tick(&mut self) -> Result<(), End> {
        self.core.handle_timeout(mono_clock())?;
        if let Some(target) = &self.target
            && self.target_silence.look(&target.peer.connection) >= SILENT_TICKS
        {
            return Err(self.over(Side::Target, LaneError::Ended("nothing came from it for 2 s".to_owned())));
        }
        // A side that is not being read for the other's congestion is noticed here when it is gone.
        if self.target.as_ref().is_some_and(Line::is_congested)
            && let Some(reason) = self.agent.peer.connection.close_reason()
        {
            return Err(End::AgentGone(reason.to_string()));
        }
        if self.agent.is_congested()
            && let Some(reason) = self.target.as_ref().and_then(|line| line.peer.connection.close_reason())
        {
            return Err(self.over(Side::Target, LaneError::Ended(reason.to_string())));
        }
        self.follow_budget(None);
        let before = self.send_share.bytes();
        let window = self.send_share.adjust(0);
        if window != before
            && let Some(target) = &self.target
        {
            target.peer.connection.set_send_window(window);
        }
        self.publish();
        Ok(())
    }

    fn publish(&mut self) {
        let now = Instant::now();
        let mut disks = Vec::with_capacity(self.disks.len());
        let mut plain_bytes = 0;
        for state in self.core.disks() {
            plain_bytes += state.plain_bytes;
            let Some(disk) = self.disks.get_mut(&state.disk) else { continue };
            disk.estimate.update(state.plain_bytes, now);
            disks.push(DiskStatus {
                disk: state.disk.to_string(),
                plain_bytes: state.plain_bytes,
                batch_bytes: disk.batch_bytes,
                held_bytes: state.held_bytes,
                window_bytes: disk.share.bytes(),
                bytes_per_second: disk.estimate.rate(),
            });
        }
        let status = &mut self.status;
        status.traffic.plain_bytes = plain_bytes;
        status.ratio = status.traffic.ratio();
        status.since_seconds = now.duration_since(self.began).as_secs();
        status.held_bytes = self.core.held_bytes();
        status.window_bytes = self.disks.values().map(|disk| disk.share.bytes()).sum();
        status.send_window_bytes = self.send_share.bytes();
        status.disks = disks;
        self.entry.publish(status.clone());
    }

    async fn finish(mut self, end: &End) {
        self.publish();
        let agent = self.agent.peer.peer.peer;
        let traffic = self.status.traffic;
        let seconds = self.began.elapsed().as_secs();
        if matches!(end, End::AgentGone(_) | End::Stopping) {
            tracing::info!(%agent, reason = %end, seconds, plain_bytes = traffic.plain_bytes, "session ended");
        } else {
            tracing::warn!(%agent, reason = %end, seconds, plain_bytes = traffic.plain_bytes, "session ended");
        }
        if let Some(target) = &self.target {
            let code =
                if matches!(end, End::Stopping) { CloseCode::ShuttingDown } else { CloseCode::Finished };
            code.close(&target.peer.connection);
        }
        // Memory and place go to others before the agent has read its farewell.
        let Self { mut agent, target, send_share, first_window, disks, recoded, entry, .. } = self;
        drop((target, send_share, first_window, disks, recoded, entry));
        farewell(&mut agent, end).await;
    }
}
