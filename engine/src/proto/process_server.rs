//! One relayed session: what comes from an agent goes to the master target, recompressed, and back.
//!
//! Call order: [`RelaySession::handle_frame`] for frames of either side, [`RelaySession::handle_recoded`] for
//! finished compression jobs; drain [`RelaySession::poll_action`]; [`RelaySession::handle_forwarded`] when a frame
//! was handed to the transport.
//!
//! Invariants: frames of a lane leave in the order they came, whatever order compression finishes in; checksums,
//! positions and order are never touched (a batch keeps its canonical fields); a relay acknowledges nothing by
//! itself, so losing it loses nothing (I7); what it holds for a disk is bounded by the credit it passes on.
//! Units: credit cost in bytes. Called by `process-server/src/relay.rs` and the simulator.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use super::state::RelayLink;
use super::{Lane, Outgoing, ProtoError, frame_name};
use crate::format::batch::{
    BatchHeader, BulkHeader, credit_cost, decode_batch, decode_bulk, encode_batch, encode_bulk,
};
use crate::format::extent::{Codec, Record};
use crate::format::frame::{Frame, FrameKind};
use crate::format::handshake::Hello;
use crate::format::message::{Credit, GrantHead, Message};
use crate::limits::{DISKS_PER_AGENT_MAX, HANDSHAKE_NANOS_MAX};
use crate::mutants::{Mutant, mutant};
use crate::units::{DiskId, Generation, MonoTime, PeerId, SECTOR_BYTES};

/// Frames of one lane that may wait for a compression job: batches are bounded by credit, marks by this.
const LANE_FRAMES_MAX: usize = 4096;

/// One side of a relayed session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The agent.
    Agent,
    /// The master target.
    Target,
}

/// What the driver is to do.
#[derive(Clone, Debug)]
pub enum RelayAction {
    /// Connect to this target ([`PeerId::NONE`]: the configured one); then [`RelaySession::handle_dialled`].
    Dial(PeerId),
    /// Compress each raw record that is worth it; then [`RelaySession::handle_recoded`].
    Recode {
        /// Names the job.
        job: u64,
        /// The records.
        records: Vec<Record>,
    },
    /// Send; then [`RelaySession::handle_forwarded`] with the cost.
    Forward {
        /// To whom.
        to: Side,
        /// What.
        outgoing: Outgoing,
        /// The disk whose window it frees.
        disk: DiskId,
        /// Credit cost it frees.
        cost: u64,
    },
}

/// Head of a batch that waits for its records.
#[derive(Clone, Copy, Debug)]
enum BatchHead {
    Delta(BatchHeader),
    Bulk(BulkHeader),
}

impl BatchHead {
    const fn generation(&self) -> Generation {
        match self {
            Self::Delta(header) => header.generation,
            Self::Bulk(header) => header.generation,
        }
    }
}

#[derive(Debug)]
enum Slot {
    /// Compression runs.
    Waiting { job: u64, head: BatchHead, cost: u64 },
    /// May leave when it is first.
    Ready { frame: Frame, cost: u64 },
}

#[derive(Debug, Default)]
struct RelayDisk {
    size_sectors: u64,
    /// What the target allows since the grant.
    upstream_limit: u64,
    /// What came since the grant, and what was passed on to the agent as its limit.
    received: u64,
    announced: u64,
    /// What was handed to the transport since the grant.
    forwarded: u64,
    /// Cost of batches from before the disk was opened again that are still held: they free no window of this grant.
    stale: u64,
    plain_bytes: u64,
    generation: Generation,
}

/// What a relayed disk holds and has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayDiskState {
    /// The disk.
    pub disk: DiskId,
    /// Plain payload received since the session began.
    pub plain_bytes: u64,
    /// Credit cost held and not yet handed to the transport.
    pub held_bytes: u64,
    /// Credit cost the agent may have under way towards this relay or holds here: what memory must be kept for.
    pub outstanding_bytes: u64,
}

/// One relayed session.
#[derive(Debug)]
pub struct RelaySession {
    link: RelayLink,
    agent: PeerId,
    transport_agent: PeerId,
    deadline: MonoTime,
    window_bytes: u64,
    hello: Option<Hello>,
    lanes: BTreeMap<Lane, VecDeque<Slot>>,
    disks: BTreeMap<DiskId, RelayDisk>,
    sizes: BTreeMap<DiskId, u64>,
    /// Disks that are not protected any more: what is still under way for them is dropped.
    retired: BTreeSet<DiskId>,
    windows: BTreeMap<DiskId, u64>,
    next_job: u64,
    held_bytes: u64,
    actions: VecDeque<RelayAction>,
}

impl RelaySession {
    /// A session of the agent that the connection's certificate names; at most `window_bytes` are held per disk, which
    /// must be more than the dearest batch costs, or that one waits for ever.
    #[must_use]
    pub fn new(transport_agent: PeerId, window_bytes: u64, now: MonoTime) -> Self {
        Self {
            link: RelayLink::Fresh,
            agent: PeerId::NONE,
            transport_agent,
            deadline: now.plus_nanos(HANDSHAKE_NANOS_MAX),
            window_bytes,
            hello: None,
            lanes: BTreeMap::new(),
            disks: BTreeMap::new(),
            sizes: BTreeMap::new(),
            retired: BTreeSet::new(),
            windows: BTreeMap::new(),
            next_job: 0,
            held_bytes: 0,
            actions: VecDeque::new(),
        }
    }

    /// Plain bytes (credit cost) held and not yet handed to the transport.
    #[must_use]
    pub const fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Changes how much may be held for `disk`, from its next credit on; what was announced stays announced, so a
    /// smaller window takes effect as [`RelayDiskState::outstanding_bytes`] falls.
    pub fn set_window(&mut self, disk: DiskId, window_bytes: u64) {
        let raised = self.windows.insert(disk, window_bytes).is_some_and(|old| window_bytes > old);
        if raised {
            self.announce_credit(disk);
        }
    }

    /// A disk is not protected any more: its window and its place go to others. What it still has on its way to the
    /// target leaves as it is, what its agent sent meanwhile is dropped when it comes.
    pub fn retire(&mut self, disk: DiskId) {
        self.disks.remove(&disk);
        self.sizes.remove(&disk);
        self.windows.remove(&disk);
        self.retired.insert(disk);
        if self.retired.len() > DISKS_PER_AGENT_MAX {
            self.retired.pop_first(); // long ago, as far as the order of identities tells; it costs a session at worst
        }
    }

    /// The disks open in this session.
    pub fn disks(&self) -> impl Iterator<Item = RelayDiskState> + '_ {
        self.disks.iter().map(|(disk, state)| RelayDiskState {
            disk: *disk,
            plain_bytes: state.plain_bytes,
            held_bytes: state.received.saturating_sub(state.forwarded) + state.stale,
            outstanding_bytes: state.announced.saturating_sub(state.forwarded) + state.stale,
        })
    }

    /// Takes a frame from one side.
    ///
    /// # Errors
    /// When the session cannot go on: tell the agent, close both connections.
    pub fn handle_frame(&mut self, from: Side, kind: FrameKind, body: Bytes) -> Result<(), ProtoError> {
        match (from, self.link) {
            (Side::Agent, RelayLink::Fresh) if kind == FrameKind::Hello => self.handle_hello(&body),
            (Side::Target, RelayLink::Waiting) if kind == FrameKind::HelloAck => {
                self.link.become_state(RelayLink::Open);
                self.pass_on(Side::Agent, Lane::Control, Frame::new(kind, body));
                Ok(())
            }
            (Side::Target, RelayLink::Waiting | RelayLink::Open) if kind == FrameKind::Error => {
                self.pass_on(Side::Agent, Lane::Control, Frame::new(kind, body));
                Ok(())
            }
            (Side::Agent, RelayLink::Open) => self.take_from_agent(kind, body),
            (Side::Target, RelayLink::Open) => self.take_from_target(kind, body),
            (_, state) => Err(ProtoError::Unexpected { got: frame_name(kind), state: state.name() }),
        }
    }

    fn handle_hello(&mut self, body: &[u8]) -> Result<(), ProtoError> {
        let mut hello = Hello::decode(body)?;
        if hello.agent != self.transport_agent {
            return Err(ProtoError::Identity("the certificate is of another agent than the hello".into()));
        }
        if hello.common_version().is_none() {
            return Err(ProtoError::Version(
                "the agent speaks none of this process server's versions".into(),
            ));
        }
        self.agent = hello.agent;
        hello.relays = hello.relays.saturating_add(1);
        self.hello = Some(hello);
        self.link.become_state(RelayLink::Dialling);
        self.actions.push_back(RelayAction::Dial(hello.target));
        Ok(())
    }

    /// The target is connected.
    pub fn handle_dialled(&mut self) {
        if let Some(hello) = self.hello.take() {
            self.link.become_state(RelayLink::Waiting);
            self.pass_on(Side::Target, Lane::Control, Message::Hello(hello).encode());
        }
    }

    fn take_from_agent(&mut self, kind: FrameKind, body: Bytes) -> Result<(), ProtoError> {
        match kind {
            FrameKind::Batch => {
                let (header, records) = decode_batch(body)?;
                self.take_batch(Lane::Delta(header.disk), header.disk, BatchHead::Delta(header), records)
            }
            FrameKind::Bulk => {
                let (header, records) = decode_bulk(body)?;
                self.take_batch(Lane::Bulk(header.disk), header.disk, BatchHead::Bulk(header), records)
            }
            FrameKind::Mark => {
                let Message::Mark(mark) = Message::decode(kind, &body)? else { return Ok(()) };
                if self.retired.contains(&mark.disk) {
                    return Ok(());
                }
                if !self.disks.contains_key(&mark.disk) {
                    return Err(not_granted(mark.disk));
                }
                let waiting = self.lanes.get(&Lane::Delta(mark.disk)).map_or(0, VecDeque::len);
                if waiting >= LANE_FRAMES_MAX {
                    return Err(ProtoError::Limit(format!("{waiting} frames wait for one disk")));
                }
                self.queue(Lane::Delta(mark.disk), Slot::Ready { frame: Frame::new(kind, body), cost: 0 });
                Ok(())
            }
            FrameKind::Auth
            | FrameKind::Inventory
            | FrameKind::OpenDisk
            | FrameKind::CompareRequest
            | FrameKind::PassBegin
            | FrameKind::PassEnd
            | FrameKind::PointDegrade
            | FrameKind::MarkRefused
            | FrameKind::GrowDisk
            | FrameKind::Error => {
                // The target decodes the others; here their kind and length are enough.
                if kind == FrameKind::OpenDisk
                    && let Message::OpenDisk(head, _) = Message::decode(kind, &body)?
                {
                    if self.sizes.len() >= DISKS_PER_AGENT_MAX && !self.sizes.contains_key(&head.disk) {
                        return Err(ProtoError::Limit(format!(
                            "more than {DISKS_PER_AGENT_MAX} disks opened"
                        )));
                    }
                    self.sizes.insert(head.disk, head.size_sectors);
                    self.retired.remove(&head.disk);
                }
                self.pass_on(Side::Target, Lane::Control, Frame::new(kind, body));
                Ok(())
            }
            _ => Err(ProtoError::Unexpected { got: frame_name(kind), state: "relaying from the agent" }),
        }
    }

    fn take_batch(
        &mut self,
        lane: Lane,
        disk_id: DiskId,
        head: BatchHead,
        records: Vec<Record>,
    ) -> Result<(), ProtoError> {
        if self.retired.contains(&disk_id) {
            return Ok(());
        }
        let Some(disk) = self.disks.get_mut(&disk_id) else {
            return Err(not_granted(disk_id));
        };
        if head.generation() != disk.generation {
            return Ok(()); // sent before the disk was opened again: the target would refuse it (I9)
        }
        let cost = credit_cost(&records);
        disk.received += cost;
        if disk.received > disk.announced {
            return Err(ProtoError::Limit("a batch was sent without credit".into()));
        }
        for record in &records {
            if record.range().end > disk.size_sectors {
                return Err(ProtoError::Limit(format!("{} lie outside the granted disk", record.range())));
            }
            record.check_stored()?;
        }
        disk.plain_bytes += records.iter().map(Record::plain_bytes).sum::<u64>();
        self.held_bytes += cost;
        if records.iter().any(|record| record.codec() == Codec::Raw) {
            let job = self.next_job;
            self.next_job += 1;
            self.queue(lane, Slot::Waiting { job, head, cost });
            self.actions.push_back(RelayAction::Recode { job, records });
        } else {
            let frame = encode_head(&head, &records);
            self.queue(lane, Slot::Ready { frame, cost });
        }
        Ok(())
    }

    /// A compression job is done.
    pub fn handle_recoded(&mut self, job: u64, records: &[Record]) {
        for slots in self.lanes.values_mut() {
            for slot in slots.iter_mut() {
                if let Slot::Waiting { job: waiting, head, cost } = slot
                    && *waiting == job
                {
                    *slot = Slot::Ready { frame: encode_head(head, records), cost: *cost };
                    return self.drain_lanes();
                }
            }
        }
    }

    fn queue(&mut self, lane: Lane, slot: Slot) {
        self.lanes.entry(lane).or_default().push_back(slot);
        self.drain_lanes();
    }

    /// Lets go what stands first in its lane and is ready.
    fn drain_lanes(&mut self) {
        for (lane, slots) in &mut self.lanes {
            if mutant(Mutant::RelayReorders) {
                slots.make_contiguous().sort_by_key(|slot| matches!(slot, Slot::Waiting { .. }));
            }
            while let Some(Slot::Ready { .. }) = slots.front() {
                let Some(Slot::Ready { frame, cost }) = slots.pop_front() else { break };
                let disk = match lane {
                    Lane::Delta(disk) | Lane::Bulk(disk) => *disk,
                    Lane::Control => DiskId::NONE,
                };
                let outgoing = Outgoing { lane: *lane, frame };
                self.actions.push_back(RelayAction::Forward { to: Side::Target, outgoing, disk, cost });
            }
        }
    }

    fn take_from_target(&mut self, kind: FrameKind, body: Bytes) -> Result<(), ProtoError> {
        match kind {
            FrameKind::Welcome
            | FrameKind::Offer
            | FrameKind::Ack
            | FrameKind::BulkAck
            | FrameKind::Nack
            | FrameKind::Fenced
            | FrameKind::CompareHashes
            | FrameKind::PassState
            | FrameKind::Policy
            | FrameKind::MarkRequest
            | FrameKind::Grant
            | FrameKind::Credit => {}
            _ => {
                return Err(ProtoError::Unexpected {
                    got: frame_name(kind),
                    state: "relaying from the target",
                });
            }
        }
        match kind {
            FrameKind::Grant => {
                if let Message::Grant(head, ..) = Message::decode(kind, &body)? {
                    self.handle_grant(&head);
                }
            }
            FrameKind::Credit => {
                if let Message::Credit(credit) = Message::decode(kind, &body)? {
                    self.handle_credit(&credit);
                }
                return Ok(()); // passed on as far as this relay's own window allows
            }
            _ => {}
        }
        self.pass_on(Side::Agent, Lane::Control, Frame::new(kind, body));
        Ok(())
    }

    fn handle_grant(&mut self, head: &GrantHead) {
        let size_sectors = self.sizes.get(&head.disk).copied().unwrap_or(0).min(u64::MAX / SECTOR_BYTES);
        let before = self.disks.remove(&head.disk).unwrap_or_default();
        let disk = RelayDisk {
            size_sectors,
            generation: head.generation,
            stale: before.stale + before.received.saturating_sub(before.forwarded),
            plain_bytes: before.plain_bytes,
            ..RelayDisk::default()
        };
        self.disks.insert(head.disk, disk);
    }

    fn handle_credit(&mut self, credit: &Credit) {
        if let Some(disk) = self.disks.get_mut(&credit.disk) {
            disk.upstream_limit = disk.upstream_limit.max(credit.limit);
        }
        self.announce_credit(credit.disk);
    }

    /// Bytes of a disk were handed to the transport: the window opens.
    pub fn handle_forwarded(&mut self, disk: DiskId, cost: u64) {
        self.held_bytes = self.held_bytes.saturating_sub(cost);
        if let Some(state) = self.disks.get_mut(&disk) {
            let stale = state.stale.min(cost);
            state.stale -= stale;
            state.forwarded += cost - stale;
        }
        if cost > 0 {
            self.announce_credit(disk);
        }
    }

    /// Passes on credit: never more than the target gave, never more than this relay will hold.
    fn announce_credit(&mut self, id: DiskId) {
        let window = self.windows.get(&id).copied().unwrap_or(self.window_bytes);
        let Some(disk) = self.disks.get_mut(&id) else { return };
        let limit = disk.upstream_limit.min((disk.forwarded + window).saturating_sub(disk.stale));
        let limit = if mutant(Mutant::RelayCreditTwice) { disk.upstream_limit } else { limit };
        let worth_it = limit >= disk.announced + window / 8 || limit == disk.upstream_limit;
        if limit > disk.announced && worth_it {
            disk.announced = limit;
            let credit = Credit { disk: id, generation: disk.generation, limit };
            self.pass_on(Side::Agent, Lane::Control, Message::Credit(credit).encode());
        }
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<MonoTime> {
        (!matches!(self.link, RelayLink::Open | RelayLink::Over)).then_some(self.deadline)
    }

    /// Time passed.
    ///
    /// # Errors
    /// When a side did not finish its handshake in time.
    pub fn handle_timeout(&mut self, now: MonoTime) -> Result<(), ProtoError> {
        if self.poll_timeout().is_some_and(|at| now >= at) { Err(ProtoError::Timeout) } else { Ok(()) }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<RelayAction> {
        self.actions.pop_front()
    }

    fn pass_on(&mut self, to: Side, lane: Lane, frame: Frame) {
        let outgoing = Outgoing { lane, frame };
        self.actions.push_back(RelayAction::Forward { to, outgoing, disk: DiskId::NONE, cost: 0 });
    }
}

fn not_granted(disk: DiskId) -> ProtoError {
    ProtoError::Identity(format!("disk {disk} was not granted in this session"))
}

fn encode_head(head: &BatchHead, records: &[Record]) -> Frame {
    match head {
        BatchHead::Delta(header) => encode_batch(header, records),
        BatchHead::Bulk(header) => encode_bulk(header, records),
    }
}
