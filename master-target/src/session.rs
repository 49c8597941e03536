//! One connection at the master target: the session core between the lanes and the disks.
//!
//! Invariants: a session task never touches a disk itself, it routes; when it ends, every disk it opened is told; a
//! peer's error ends this session only and is logged once; a revoked agent's session ends, whoever relays it; a peer
//! that does not read its answers is not read either, so what waits for it is bounded by `REPLY_BYTES_MAX` and what
//! its disks still owe it. Started by `daemon` for each accepted connection.

use std::sync::Arc;
use std::time::Duration;

use reprotect_engine::error::Answer;
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake::Role;
use reprotect_engine::format::message::{ErrorCode, GrowDisk, Message};
use reprotect_engine::format::standby::{Load, Probe};
use reprotect_engine::net::endpoint::{CloseCode, PeerConnection};
use reprotect_engine::net::lanes::{self, Arrival, LaneError, LaneReader, LaneWriter};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::standby::{self, stand_by};
use reprotect_engine::net::{identity, mono_clock};
use reprotect_engine::proto::master_target::{DiskInput, SessionEvent, TargetSession, Transport};
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::proto::{Authority, Outgoing, ProtoError};
use reprotect_engine::units::{DiskId, PeerId};
use tokio::sync::mpsc;

use crate::disk_worker::{DiskGone, Replies};
use crate::registry::{News, Offer, Registry};

/// How long a connection may take to open its control lane.
const CONTROL_WAIT: Duration = Duration::from_secs(10);
/// Bytes of answers that may wait for a peer; beyond, nothing more is read from it until it has read some.
const REPLY_BYTES_MAX: u64 = 4 << 20;

/// Serves a connection to its end.
pub async fn serve(
    peer: PeerConnection,
    target: PeerId,
    authority: Arc<dyn Authority>,
    registry: Arc<Registry>,
    revocations: Arc<Revocations>,
) {
    let address = peer.place();
    let role = match peer.peer.role {
        identity::Role::Agent => Role::Agent,
        identity::Role::ProcessServer => Role::ProcessServer,
        identity::Role::MasterTarget => return CloseCode::Violation.close(&peer.connection),
    };
    let relay = (role == Role::ProcessServer).then_some(peer.peer.peer);
    let Ok(Ok(mut lanes)) =
        tokio::time::timeout(CONTROL_WAIT, lanes::accepted::<u64>(&peer.connection)).await
    else {
        tracing::info!(%address, "a connection opened no control stream in time");
        return CloseCode::Violation.close(&peer.connection);
    };
    let first = match stand_by(&mut lanes, || 0, |probe| load(&registry, probe)).await {
        Ok((kind, body)) => Arrival::Frame(kind, body),
        Err(error) => {
            tracing::debug!(%address, %error, "a connection that stood by is over");
            return CloseCode::Finished.close(&peer.connection);
        }
    };
    let (reader, writer, written) = lanes;
    let mut nonce = [0_u8; 32];
    if getrandom::fill(&mut nonce).is_err() {
        tracing::error!("the system has no randomness; the session is refused");
        return CloseCode::Violation.close(&peer.connection);
    }
    let (id, news) = registry.begin_session(address.clone(), relay);
    let transport = Transport { role, peer: peer.peer.peer };
    let (replies, from_disks) = mpsc::unbounded_channel();
    let mut session = Session {
        id,
        core: TargetSession::new(id, target, transport, authority, nonce, mono_clock()),
        registry: Arc::clone(&registry),
        revocations,
        peer: peer.clone(),
        writer,
        written,
        unwritten_bytes: 0,
        replies,
    };
    let result = session.run((first, reader), news, from_disks).await;
    if let Err(error) = &result {
        let message = Message::error(DiskId::NONE, error.code(), &error.to_string());
        session.queue(Outgoing::control(message.encode()));
        if error.severity() == reprotect_engine::error::Severity::Retry {
            tracing::info!(session = id.0, %address, %error, "session ended");
        } else {
            tracing::warn!(session = id.0, %address, %error, "session refused");
        }
        // Time for the error to reach the peer before the connection goes.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    session.tell_disks().await;
    registry.end_session(id);
    CloseCode::Finished.close(&peer.connection);
}

/// How this master target stands.
fn load(registry: &Registry, probe: Probe) -> Load {
    let sessions = u32::try_from(registry.sessions().len()).unwrap_or(u32::MAX);
    Load { token: probe.token, target_micros: 0, sessions, room_permille: 1000, accepts: true }
}

struct Session {
    id: SessionId,
    core: TargetSession,
    registry: Arc<Registry>,
    revocations: Arc<Revocations>,
    peer: PeerConnection,
    writer: LaneWriter<u64>,
    /// Comes back when a frame was handed to the transport.
    written: mpsc::UnboundedReceiver<u64>,
    unwritten_bytes: u64,
    replies: Replies,
}

impl Session {
    async fn run(
        &mut self,
        (first, mut reader): (Arrival, LaneReader),
        mut news: mpsc::UnboundedReceiver<News>,
        mut from_disks: mpsc::UnboundedReceiver<Message>,
    ) -> Result<(), ProtoError> {
        if let Arrival::Frame(kind, body) = first {
            self.core.handle_frame(kind, body)?;
            self.handle_events().await;
            self.transmit();
        }
        loop {
            let now = mono_clock();
            let wait = self
                .core
                .poll_timeout()
                .map_or(Duration::from_secs(3600), |at| Duration::from_nanos(at.nanos_since(now)));
            let congested = self.unwritten_bytes > REPLY_BYTES_MAX;
            tokio::select! {
                Some(bytes) = self.written.recv() => self.unwritten_bytes -= bytes,
                agent = revoked(&self.revocations, self.core.agent()) => {
                    return Err(ProtoError::Identity(format!(
                        "agent {agent} was revoked; if that was a mistake, enrol it again with a new token"
                    )));
                }
                reason = self.peer.connection.closed(), if congested => {
                    tracing::info!(session = self.id.0, agent = ?self.core.agent(), %reason, "session over");
                    return Ok(());
                }
                arrival = reader.next(), if !congested => match arrival {
                    Arrival::Frame(FrameKind::Probe, body) => {
                        match standby::answer(&body, |probe| load(&self.registry, probe)) {
                            Ok(answer) => self.queue(answer),
                            Err(LaneError::Format(error)) => return Err(error.into()),
                            Err(LaneError::Ended(_)) => {}
                        }
                    }
                    Arrival::Frame(kind, body) => self.core.handle_frame(kind, body)?,
                    Arrival::Over(error) => {
                        tracing::info!(session = self.id.0, agent = ?self.core.agent(), %error, "session over");
                        return Ok(());
                    }
                },
                Some(news) = news.recv() => match news {
                    News::Offer(offer) => self.offer(&offer),
                    News::Policy(policy) => self.core.send_policy(policy),
                    News::MarkRequest(request) => self.core.request_mark(request),
                    News::NotGrown(disk, why) => {
                        self.core.send_reply(Message::error(disk, ErrorCode::Size, &why), 0);
                    }
                },
                Some(message) = from_disks.recv() => {
                    if let Message::Error(head, text) = &message
                        && head.disk == DiskId::NONE
                    {
                        return Err(ProtoError::Peer { code: head.code, text: text.clone() });
                    }
                    self.send_reply(message);
                }
                () = tokio::time::sleep(wait) => self.core.handle_timeout(mono_clock())?,
            }
            self.handle_events().await;
            self.transmit();
        }
    }

    fn offer(&mut self, offer: &Offer) {
        self.core.offer(offer.disk, offer.source, offer.size_sectors, offer.generation);
    }

    fn send_reply(&mut self, message: Message) {
        let size = match &message {
            Message::Grant(head, ..) => {
                self.registry.disk_inputs(head.disk).map_or(0, |(_, sectors)| sectors)
            }
            _ => 0,
        };
        self.core.send_reply(message, size);
    }

    fn transmit(&mut self) {
        while let Some(outgoing) = self.core.poll_transmit() {
            self.queue(outgoing);
        }
    }

    fn queue(&mut self, outgoing: Outgoing) {
        let bytes = outgoing.frame.encoded_bytes() as u64;
        self.unwritten_bytes += bytes;
        self.writer.send(outgoing, bytes);
    }

    async fn handle_events(&mut self) {
        while let Some(event) = self.core.poll_event() {
            match event {
                SessionEvent::Ready { agent, relays } => {
                    tracing::info!(session = self.id.0, %agent, relays, "agent connected");
                    let offers = self.registry.session_ready(self.id, agent);
                    if let Some(policy) = self.registry.policy(agent) {
                        self.core.send_policy(policy);
                    }
                    offers.iter().for_each(|offer| self.offer(offer));
                }
                SessionEvent::Inventory { host_name, disks } => self.take_inventory(host_name, disks).await,
                SessionEvent::ToDisk(disk, input) => self.route(disk, input).await,
                SessionEvent::MarkRefused(refused) => self.registry.mark_refused(&refused),
                SessionEvent::Grow(asked) => self.grow(asked),
            }
        }
    }

    async fn take_inventory(
        &self,
        host_name: String,
        disks: Vec<reprotect_engine::format::message::InventoryDisk>,
    ) {
        let Some(agent) = self.core.agent() else { return };
        let registry = Arc::clone(&self.registry);
        let saved =
            tokio::task::spawn_blocking(move || registry.take_inventory(agent, &host_name, &disks)).await;
        if let Ok(Err(error)) = saved {
            tracing::error!(%agent, "the inventory could not be recorded: {error:#}");
        }
    }

    /// Off this task: what waits of the disk is applied first, and the others go on meanwhile.
    fn grow(&self, asked: GrowDisk) {
        let Some(agent) = self.core.agent() else { return };
        let (registry, session) = (Arc::clone(&self.registry), self.id);
        tokio::task::spawn_blocking(move || registry.handle_grow(session, agent, &asked));
    }

    async fn route(&mut self, disk: DiskId, input: DiskInput) {
        let opens = matches!(input, DiskInput::Open(_));
        if opens && let Some(why) = self.registry.fence_text(disk) {
            return self.core.send_reply(Message::error(disk, ErrorCode::Target, &why), 0);
        }
        // Its thread would answer when it is there, perhaps in hours; the agent is offered it again then.
        let going_back = || self.registry.disk_status(disk).and_then(|status| status.going_back());
        if opens && let Some(why) = going_back() {
            return self.core.send_reply(Message::error(disk, ErrorCode::Target, &why), 0);
        }
        let sent = match self.registry.disk_inputs(disk) {
            Some((inputs, _)) => inputs.send(self.id, input, self.replies.clone()).await,
            None => Err(DiskGone),
        };
        // Told once: what else is on its way for this disk is answered by silence.
        if let Err(gone) = sent
            && opens
        {
            self.core.send_reply(Message::error(disk, ErrorCode::Target, &gone.to_string()), 0);
        }
    }

    async fn tell_disks(&self) {
        for disk in self.core.opened() {
            if let Some((inputs, _)) = self.registry.disk_inputs(disk) {
                inputs.lost(self.id).await;
            }
        }
    }
}

/// Waits until the session's agent is revoked and answers who it is; for ever while nobody has proved anything.
async fn revoked(revocations: &Revocations, agent: Option<PeerId>) -> PeerId {
    let Some(agent) = agent else { return std::future::pending().await };
    revocations.peer_revoked(agent).await;
    agent
}
