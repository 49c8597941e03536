//! One session at the master target: handshake, the agent's proof, and routing of frames to disks.
//!
//! Call order: [`TargetSession::handle_frame`] for every frame of any stream; drain
//! [`TargetSession::poll_transmit`] and [`TargetSession::poll_event`]; replies of disks go out through
//! [`TargetSession::send_reply`].
//!
//! Invariants: nothing but HELLO and AUTH is read before the agent's proof held; a frame reaches a disk only if that
//! disk was granted to this session's agent; batches are routed by their disk without being decoded here; requests for
//! hashes, whose answers are far longer than they, are routed only while few of that disk wait for their answer.
//! Units: none. Called by `master-target/src/session.rs` and the simulator.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::state::TargetLink;
use super::target_disk::{HASHES_WAITING_MAX, SessionId};
use super::{Authority, Outgoing, ProtoError, frame_name};
use crate::format::batch::Mark;
use crate::format::frame::FrameKind;
use crate::format::handshake::{HELLO_MAGIC, Hello, HelloAck, Role};
use crate::format::message::{
    CompareRequestHead, ErrorCode, GrowDisk, InventoryDisk, MarkRefused, MarkRequest, Message, OfferHead,
    OpenDiskHead, PassBegin, PassEnd, PointDegrade, Policy, RefineUnit, SourceId, Welcome,
};
use crate::limits::HANDSHAKE_NANOS_MAX;
use crate::units::{DiskId, Generation, MonoTime, PeerId};

/// Who is at the other end of the connection, from its certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Its role.
    pub role: Role,
    /// Its identity.
    pub peer: PeerId,
}

/// A frame for a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskInput {
    /// The session opens it; the grant was checked.
    Open(OpenDiskHead),
    /// A delta batch's body, not yet decoded.
    Batch(Bytes),
    /// A bulk batch's body, not yet decoded.
    Bulk(Bytes),
    /// A mark.
    Mark(Mark),
    /// A request for hashes.
    Compare(CompareRequestHead, Vec<RefineUnit>),
    /// A compare pass is asked for.
    PassBegin(PassBegin),
    /// The disk is covered.
    PassEnd(PassEnd),
    /// Points promise less than was said.
    PointDegrade(PointDegrade),
}

/// What the driver is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// The agent proved itself: offer it its disks by [`TargetSession::offer`].
    Ready {
        /// The agent.
        agent: PeerId,
        /// Through how many relays it comes.
        relays: u8,
    },
    /// The agent's disks.
    Inventory {
        /// The machine's host name.
        host_name: String,
        /// The disks.
        disks: Vec<InventoryDisk>,
    },
    /// A frame for a disk.
    ToDisk(DiskId, DiskInput),
    /// A point that was asked for cannot be had.
    MarkRefused(MarkRefused),
    /// A disk that was offered is to grow: answer with [`TargetSession::offer`] or an ERROR of it.
    Grow(GrowDisk),
}

/// One session at the master target.
pub struct TargetSession {
    id: SessionId,
    target: PeerId,
    transport: Transport,
    authority: Arc<dyn Authority>,
    nonce: [u8; 32],
    deadline: MonoTime,
    link: TargetLink,
    agent: PeerId,
    relays: u8,
    offered: BTreeMap<DiskId, SourceId>,
    /// Disks whose OPEN_DISK was not answered yet.
    opening: BTreeMap<DiskId, Generation>,
    opened: BTreeSet<DiskId>,
    /// Requests for hashes that a disk owes an answer: it answers in order, so a refusal or a grant ends them all.
    asked: BTreeMap<DiskId, usize>,
    outbox: VecDeque<Outgoing>,
    events: VecDeque<SessionEvent>,
}

impl std::fmt::Debug for TargetSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetSession")
            .field("id", &self.id)
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

impl TargetSession {
    /// A session that began at `now`; `nonce` must be fresh randomness.
    #[must_use]
    pub fn new(
        id: SessionId,
        target: PeerId,
        transport: Transport,
        authority: Arc<dyn Authority>,
        nonce: [u8; 32],
        now: MonoTime,
    ) -> Self {
        Self {
            id,
            target,
            transport,
            authority,
            nonce,
            deadline: now.plus_nanos(HANDSHAKE_NANOS_MAX),
            link: TargetLink::Fresh,
            agent: PeerId::NONE,
            relays: 0,
            offered: BTreeMap::new(),
            opening: BTreeMap::new(),
            opened: BTreeSet::new(),
            asked: BTreeMap::new(),
            outbox: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }

    /// The agent, once it proved itself.
    #[must_use]
    pub fn agent(&self) -> Option<PeerId> {
        (self.link == TargetLink::Ready).then_some(self.agent)
    }

    /// Disks this session opened: tell them when it is gone.
    pub fn opened(&self) -> impl Iterator<Item = DiskId> + '_ {
        self.opened.iter().copied()
    }

    /// Takes a frame of any stream.
    ///
    /// # Errors
    /// When the session cannot go on: send the error, close the connection.
    pub fn handle_frame(&mut self, kind: FrameKind, body: Bytes) -> Result<(), ProtoError> {
        if self.link == TargetLink::Ready && matches!(kind, FrameKind::Batch | FrameKind::Bulk) {
            return self.route_batch(kind, body);
        }
        let message = match (self.link, kind) {
            (TargetLink::Fresh, FrameKind::Hello)
            | (TargetLink::ProofWanted, FrameKind::Auth)
            | (TargetLink::Ready, _) => Message::decode(kind, &body)?,
            (state, _) => return Err(ProtoError::Unexpected { got: frame_name(kind), state: state.name() }),
        };
        match message {
            Message::Hello(hello) if self.link == TargetLink::Fresh => self.handle_hello(&hello),
            Message::Auth(auth) if self.link == TargetLink::ProofWanted => {
                self.authority.check_proof(&auth, &self.nonce).map_err(ProtoError::Identity)?;
                if auth.agent != self.agent {
                    return Err(ProtoError::Identity("the proof is of another agent than the hello".into()));
                }
                self.link.become_state(TargetLink::Ready);
                self.control(&Message::Welcome(Welcome { offers: 0 }));
                self.events.push_back(SessionEvent::Ready { agent: self.agent, relays: self.relays });
                Ok(())
            }
            Message::Inventory(head, disks) => {
                let host_name = head.host_name.as_str().to_owned();
                self.events.push_back(SessionEvent::Inventory { host_name, disks });
                Ok(())
            }
            Message::OpenDisk(head, grant) => self.handle_open(head, &grant),
            Message::Mark(mark) => self.route(mark.disk, DiskInput::Mark(mark)),
            Message::CompareRequest(head, units) => {
                let asked = self.asked.entry(head.disk).or_default();
                if *asked >= HASHES_WAITING_MAX {
                    return Err(ProtoError::Limit("too many requests for hashes at once".into()));
                }
                *asked += 1;
                self.route(head.disk, DiskInput::Compare(head, units))
            }
            Message::PassBegin(begin) => self.route(begin.disk, DiskInput::PassBegin(begin)),
            Message::PassEnd(end) => self.route(end.disk, DiskInput::PassEnd(end)),
            Message::PointDegrade(degrade) => self.route(degrade.disk, DiskInput::PointDegrade(degrade)),
            Message::MarkRefused(refused) => {
                self.events.push_back(SessionEvent::MarkRefused(refused));
                Ok(())
            }
            Message::GrowDisk(grow) if self.offered.contains_key(&grow.disk) => {
                self.events.push_back(SessionEvent::Grow(grow));
                Ok(())
            }
            Message::GrowDisk(grow) => {
                self.refuse(grow.disk, ErrorCode::UnknownDisk, "this disk is not offered to this agent");
                Ok(())
            }
            Message::Error(head, text) => Err(ProtoError::Peer { code: head.code, text }),
            _ => Err(ProtoError::Unexpected { got: frame_name(kind), state: self.link.name() }),
        }
    }

    fn handle_hello(&mut self, hello: &Hello) -> Result<(), ProtoError> {
        let Some(version) = hello.common_version() else {
            return Err(ProtoError::Version("the agent speaks none of this target's versions".into()));
        };
        if hello.unknown_required() != 0 {
            return Err(ProtoError::Version(format!("unknown feature bits {:#x}", hello.unknown_required())));
        }
        if hello.target != PeerId::NONE && hello.target != self.target {
            return Err(ProtoError::Identity(format!(
                "this is target {}, not {}",
                self.target, hello.target
            )));
        }
        let direct = self.transport.role == Role::Agent;
        if direct && (self.transport.peer != hello.agent || hello.relays != 0) {
            return Err(ProtoError::Identity("the certificate is of another agent than the hello".into()));
        }
        if !direct && (self.transport.role != Role::ProcessServer || hello.relays == 0) {
            return Err(ProtoError::Identity("only agents and process servers may connect here".into()));
        }
        self.agent = hello.agent;
        self.relays = hello.relays;
        self.link.become_state(TargetLink::ProofWanted);
        self.control(&Message::HelloAck(HelloAck {
            magic: HELLO_MAGIC,
            version: version as u16,
            role: Role::MasterTarget,
            features: 0,
            target: self.target,
            nonce: self.nonce,
        }));
        Ok(())
    }

    fn handle_open(&mut self, head: OpenDiskHead, grant: &[u8]) -> Result<(), ProtoError> {
        if !self.offered.contains_key(&head.disk) {
            self.refuse(head.disk, ErrorCode::UnknownDisk, "this disk is not offered to this agent");
            return Ok(());
        }
        let checked =
            self.authority.check_grant(grant, head.disk, head.size_sectors, head.generation, self.agent);
        if let Err(reason) = checked {
            self.refuse(head.disk, ErrorCode::Grant, &reason);
            return Ok(());
        }
        self.opened.insert(head.disk);
        self.opening.insert(head.disk, head.generation);
        self.events.push_back(SessionEvent::ToDisk(head.disk, DiskInput::Open(head)));
        Ok(())
    }

    fn route_batch(&mut self, kind: FrameKind, body: Bytes) -> Result<(), ProtoError> {
        let disk = body.first_chunk::<16>().map_or(DiskId::NONE, |id| DiskId(*id));
        let input = if kind == FrameKind::Batch { DiskInput::Batch(body) } else { DiskInput::Bulk(body) };
        self.route(disk, input)
    }

    fn route(&mut self, disk: DiskId, input: DiskInput) -> Result<(), ProtoError> {
        if !self.opened.contains(&disk) {
            return Err(ProtoError::Identity(format!("disk {disk} was not opened in this session")));
        }
        self.events.push_back(SessionEvent::ToDisk(disk, input));
        Ok(())
    }

    /// Offers a disk to the agent: now, and whenever it connects again the driver does so again.
    pub fn offer(&mut self, disk: DiskId, source: SourceId, size_sectors: u64, generation: Generation) {
        self.offered.insert(disk, source);
        let grant = self.authority.issue(disk, size_sectors, generation, self.agent);
        let grant_bytes = grant.len() as u16;
        self.control(&Message::Offer(
            OfferHead { disk, source, size_sectors, generation, grant_bytes },
            grant,
        ));
    }

    /// Tells the agent its machine's policy: when it proved itself, and at every change.
    pub fn send_policy(&mut self, policy: Policy) {
        self.control(&Message::Policy(Policy { target: self.target, ..policy }));
    }

    /// Asks the agent for a point of the machine; its marks come on their own, a refusal as an event.
    pub fn request_mark(&mut self, request: MarkRequest) {
        self.control(&Message::MarkRequest(request));
    }

    /// Sends a disk's reply; a GRANT gets the signed grant of its new generation here. An OPEN_DISK that came too late
    /// for the offer it answers is fenced and gets a new offer: nobody else would make one while the session lasts.
    pub fn send_reply(&mut self, message: Message, size_sectors: u64) {
        let message = match message {
            Message::CompareHashes(head, hashes) => {
                if let Some(asked) = self.asked.get_mut(&head.disk) {
                    *asked = asked.saturating_sub(1);
                }
                Message::CompareHashes(head, hashes)
            }
            Message::Fenced(fenced) => {
                self.asked.remove(&fenced.disk);
                self.control(&Message::Fenced(fenced));
                let presented = self.opening.get(&fenced.disk).copied();
                if presented.is_some_and(|generation| generation != fenced.generation)
                    && let Some(source) = self.offered.get(&fenced.disk).copied()
                {
                    self.opening.remove(&fenced.disk);
                    self.offer(fenced.disk, source, size_sectors, fenced.generation);
                }
                return;
            }
            Message::Error(head, text) => {
                self.asked.remove(&head.disk);
                self.opening.remove(&head.disk);
                Message::Error(head, text)
            }
            Message::Grant(mut head, ranges, _) => {
                self.asked.remove(&head.disk);
                self.opening.remove(&head.disk);
                let grant = self.authority.issue(head.disk, size_sectors, head.generation, self.agent);
                head.grant_bytes = grant.len() as u16;
                Message::Grant(head, ranges, grant)
            }
            other => other,
        };
        self.control(&message);
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<MonoTime> {
        (self.link != TargetLink::Ready).then_some(self.deadline)
    }

    /// Time passed.
    ///
    /// # Errors
    /// When the peer did not finish its handshake in time.
    pub fn handle_timeout(&mut self, now: MonoTime) -> Result<(), ProtoError> {
        if self.poll_timeout().is_some_and(|at| now >= at) { Err(ProtoError::Timeout) } else { Ok(()) }
    }

    /// The next frame to send.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        self.outbox.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    fn refuse(&mut self, disk: DiskId, code: ErrorCode, text: &str) {
        self.control(&Message::error(disk, code, text));
    }

    fn control(&mut self, message: &Message) {
        self.outbox.push_back(Outgoing::control(message.encode()));
    }
}
