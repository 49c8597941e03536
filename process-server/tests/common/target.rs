//! A scripted master target: real session and disk cores over bytes in memory.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{Mark, credit_cost, decode_batch, decode_bulk};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::{Codec, Record, RecordKind};
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake;
use reprotect_engine::format::message::{
    Auth, ErrorCode, GrowDisk, InventoryDisk, Message, PassMode, PointDegrade, Policy, SourceId,
};
use reprotect_engine::format::standby::{Load, Probe};
use reprotect_engine::net::endpoint::{Accepted, PeerConnection, Server, TransportSettings, bind_server};
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::lanes::{self, Arrival, LaneReader};
use reprotect_engine::net::standby::{self, stand_by};
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::{mono_clock, tls, wall_clock};
use reprotect_engine::proto::compare::answer;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::master_target::{DiskInput, SessionEvent, TargetSession, Transport};
use reprotect_engine::proto::target_disk::{DiskAction, SessionId, TargetDisk};
use reprotect_engine::proto::{Authority, Outgoing, session_proof_message};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SectorRange};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::{Site, wait_for};

/// What arrived, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// In which session it came; later ones are greater.
    pub session: SessionId,
    pub disk: DiskId,
    /// Sequence of a delta record, `None` for bulk.
    pub sequence: Option<u64>,
    pub range: SectorRange,
    pub codec: Codec,
    pub stored_bytes: u64,
    pub plain_bytes: u64,
}

struct Disk {
    core: TargetDisk,
    agent: PeerId,
    bytes: Vec<u8>,
    /// What it last promised to remember.
    state: DiskState,
}

#[derive(Default)]
struct World {
    disks: BTreeMap<DiskId, Disk>,
    sessions: BTreeMap<SessionId, mpsc::UnboundedSender<Message>>,
    next_session: u64,
    seen: Vec<Seen>,
    relays: Vec<u8>,
    marks: Vec<Mark>,
    degraded: Vec<PointDegrade>,
    policy: Option<Policy>,
    inventories: Vec<Vec<InventoryDisk>>,
    /// Disks that whoever is connected is to be offered.
    offers: Vec<DiskId>,
    /// Nothing is executed: no write, so no credit.
    stalled: bool,
    /// Why no disk can grow, if none can.
    refuses_growth: Option<String>,
    /// So many delta batches from now on are found damaged.
    damaged: u32,
}

struct Judge {
    id: PeerId,
    trust: Arc<Trust>,
}

impl Authority for Judge {
    fn check_proof(&self, auth: &Auth, nonce: &[u8; 32]) -> Result<(), String> {
        let chain: Vec<CertificateDer<'_>> =
            auth.certificates.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let rule = PeerRule::of_site("berlin", &[Role::Agent]).only(auth.agent);
        let message = session_proof_message(nonce, auth.agent, self.id);
        self.trust
            .verify_signed(&chain, &rule, Purpose::SessionProof, &message, &auth.signature, wall_clock())
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn issue(&self, disk: DiskId, size: u64, generation: Generation, agent: PeerId) -> Bytes {
        format!("{disk} {size} {generation} {agent}").into()
    }

    fn check_grant(
        &self,
        grant: &[u8],
        disk: DiskId,
        size: u64,
        generation: Generation,
        agent: PeerId,
    ) -> Result<(), String> {
        if self.issue(disk, size, generation, agent) == grant { Ok(()) } else { Err("another grant".into()) }
    }
}

/// A scripted target; dropping it leaves its tasks to the runtime.
pub struct FakeTarget {
    pub address: SocketAddr,
    pub id: PeerId,
    identity: Identity,
    trust: Arc<Trust>,
    settings: TransportSettings,
    limits: FlowLimits,
    world: Arc<Mutex<World>>,
    /// Sessions do not read while this is set.
    deaf: Arc<AtomicBool>,
    server: Option<Arc<Server>>,
}

impl FakeTarget {
    pub fn start(site: &Site) -> Self {
        Self::with(site, TransportSettings::default(), FlowLimits::default())
    }

    pub fn with(site: &Site, settings: TransportSettings, limits: FlowLimits) -> Self {
        let identity = site.identity(Role::MasterTarget);
        let trust = site.trust();
        let server = listen("127.0.0.1:0".parse().unwrap(), &identity, &trust, &settings).unwrap();
        let target = Self {
            address: server.local_address().unwrap(),
            id: identity.own().peer,
            identity,
            trust,
            settings,
            limits,
            world: Arc::default(),
            deaf: Arc::default(),
            server: Some(Arc::new(server)),
        };
        target.accept();
        target
    }

    fn accept(&self) {
        let server = self.server.clone().expect("it listens");
        let (world, deaf) = (Arc::clone(&self.world), Arc::clone(&self.deaf));
        let (id, trust) = (self.id, Arc::clone(&self.trust));
        tokio::spawn(async move {
            while let Some(accepted) = server.accept().await {
                let Accepted::Peer(peer) = accepted else { continue };
                let authority = Arc::new(Judge { id, trust: Arc::clone(&trust) });
                tokio::spawn(serve(peer, id, authority, Arc::clone(&world), Arc::clone(&deaf)));
            }
        });
    }

    /// Closes every connection, forgets who was connected, and listens again at the same address.
    pub async fn restart(&mut self) {
        self.kill().await;
        self.server = None;
        let server = wait_for("the port is free again", async || {
            listen(self.address, &self.identity, &self.trust, &self.settings).ok().map(Arc::new)
        })
        .await;
        self.server = Some(server);
        self.accept();
    }

    /// Closes every connection and listens no more.
    pub async fn kill(&self) {
        if let Some(server) = &self.server {
            server.close().await;
        }
    }

    /// Protects a disk of `agent`; it is offered at the agent's next session.
    pub fn protect(&self, agent: PeerId, size_bytes: usize) -> DiskId {
        let disk = DiskId::random().unwrap();
        let lineage = LineageId::random().unwrap();
        let size_sectors = size_bytes as u64 / 512;
        let state = TargetDisk::new_state(disk, agent, disk.0, size_sectors, lineage, PassMode::Copy);
        let core = TargetDisk::new(state.clone(), self.limits);
        self.world().disks.insert(disk, Disk { core, agent, bytes: vec![0; size_bytes], state });
        disk
    }

    /// Protects the disk `source` of `agent` over what the target already holds; [`PassMode::Copy`] only over zeros.
    pub fn protect_source(&self, agent: PeerId, source: SourceId, bytes: Vec<u8>, mode: PassMode) -> DiskId {
        let disk = DiskId::random().unwrap();
        let lineage = LineageId::random().unwrap();
        let size_sectors = bytes.len() as u64 / 512;
        let state = TargetDisk::new_state(disk, agent, source, size_sectors, lineage, mode);
        let core = TargetDisk::new(state.clone(), self.limits);
        self.world().disks.insert(disk, Disk { core, agent, bytes, state });
        disk
    }

    /// Offers a disk to the agent that is connected, and only to it.
    pub fn offer(&self, disk: DiskId) {
        self.world().offers.push(disk);
    }

    /// Whom it trusts; revocations there end live connections too.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// What agents said they have, newest last.
    pub fn inventories(&self) -> Vec<Vec<InventoryDisk>> {
        self.world().inventories.clone()
    }

    /// Marks that were accepted, in order.
    pub fn marks(&self) -> Vec<Mark> {
        self.world().marks.clone()
    }

    /// What was said of points later, where it counts.
    pub fn degraded(&self) -> Vec<PointDegrade> {
        self.world().degraded.clone()
    }

    /// What agents are told when they prove themselves, from now on.
    pub fn set_policy(&self, policy: Policy) {
        self.world().policy = Some(policy);
    }

    /// Runs `look` on a disk's bytes without copying them.
    pub fn with_bytes<T>(&self, disk: DiskId, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.world().disks[&disk].bytes)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub fn bytes(&self, disk: DiskId) -> Vec<u8> {
        self.world().disks[&disk].bytes.clone()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.world().seen.clone()
    }

    /// Through how many relays each session came.
    pub fn relays(&self) -> Vec<u8> {
        self.world().relays.clone()
    }

    /// Finds the next `count` delta batches damaged.
    pub fn damage(&self, count: u32) {
        self.world().damaged = count;
    }

    /// How many of them are still to come.
    pub fn still_damages(&self) -> u32 {
        self.world().damaged
    }

    /// What a disk promised to remember, and its content.
    pub fn promised(&self, disk: DiskId) -> (DiskState, Vec<u8>) {
        let world = self.world();
        let disk = &world.disks[&disk];
        (disk.state.clone(), disk.bytes.clone())
    }

    /// A disk that lost what it promised since; its sessions must be over.
    pub fn lose(&self, disk: DiskId, (state, bytes): (DiskState, Vec<u8>)) {
        let mut world = self.world();
        let lost = world.disks.get_mut(&disk).expect("it is protected");
        lost.core = TargetDisk::new(state.clone(), self.limits);
        (lost.state, lost.bytes) = (state, bytes);
    }

    /// Ends the protection of a disk and tells whoever is connected.
    pub fn unprotect(&self, disk: DiskId) {
        let mut world = self.world();
        world.disks.remove(&disk);
        let message = Message::error(disk, ErrorCode::UnknownDisk, "the disk is no longer protected");
        for session in world.sessions.values() {
            let _ = session.send(message.clone());
        }
    }

    /// No disk grows from now on, for this reason; or each does.
    pub fn refuse_growth(&self, why: Option<&str>) {
        self.world().refuses_growth = why.map(str::to_owned);
    }

    pub fn stall(&self, stalled: bool) {
        self.world().stalled = stalled;
    }

    pub fn deafen(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::SeqCst);
    }
}

fn listen(
    address: SocketAddr,
    identity: &Identity,
    trust: &Arc<Trust>,
    settings: &TransportSettings,
) -> Result<Server, reprotect_engine::net::endpoint::EndpointError> {
    let rule = PeerRule::of_site("berlin", &[Role::Agent, Role::ProcessServer]);
    let tls = tls::server_config(identity, Arc::clone(trust), rule, false).unwrap();
    bind_server(address, tls, Arc::clone(trust.revocations()), settings.clone())
}

async fn next(first: &mut Option<Arrival>, reader: &mut LaneReader) -> Arrival {
    match first.take() {
        Some(first) => first,
        None => reader.next().await,
    }
}

async fn serve(
    peer: PeerConnection,
    id: PeerId,
    authority: Arc<Judge>,
    world: Arc<Mutex<World>>,
    deaf: Arc<AtomicBool>,
) {
    let Ok(mut lanes) = lanes::accepted::<()>(&peer.connection).await else {
        return;
    };
    let load = |probe: Probe| Load {
        token: probe.token,
        target_micros: 0,
        sessions: 0,
        room_permille: 1000,
        accepts: true,
    };
    let Ok((kind, body)) = stand_by(&mut lanes, || (), load).await else { return };
    let (mut reader, mut writer, _written) = lanes;
    let mut first = Some(Arrival::Frame(kind, body));
    let (replies_in, mut replies) = mpsc::unbounded_channel();
    let session_id = {
        let mut world = world.lock().unwrap();
        world.next_session += 1;
        let id = SessionId(world.next_session);
        world.sessions.insert(id, replies_in);
        id
    };
    let role = match peer.peer.role {
        Role::Agent => handshake::Role::Agent,
        Role::ProcessServer => handshake::Role::ProcessServer,
        Role::MasterTarget => handshake::Role::MasterTarget,
    };
    let transport = Transport { role, peer: peer.peer.peer };
    let nonce = [session_id.0 as u8; 32];
    let mut session = TargetSession::new(session_id, id, transport, authority, nonce, mono_clock());
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            arrival = next(&mut first, &mut reader), if !deaf.load(Ordering::SeqCst) => {
                let Arrival::Frame(kind, body) = arrival else { break };
                if kind == FrameKind::Probe {
                    writer.send(standby::answer(&body, load).unwrap(), ());
                    continue;
                }
                if let Err(error) = session.handle_frame(kind, body) {
                    let message = Message::error(DiskId::NONE, error.code(), &error.to_string());
                    writer.send(Outgoing::control(message.encode()), ());
                    let _ = tokio::time::timeout(Duration::from_secs(2), peer.connection.closed()).await;
                    break;
                }
            }
            Some(message) = replies.recv() => {
                let disk = match &message { Message::Grant(head, ..) => Some(head.disk), _ => None };
                let world = world.lock().unwrap();
                let size = disk
                    .and_then(|disk| world.disks.get(&disk))
                    .map_or(0, |disk| disk.core.state().size_sectors);
                session.send_reply(message, size);
            }
            _ = tick.tick() => {}
            _ = peer.connection.closed() => break,
        }
        let mut world = world.lock().unwrap();
        while let Some(event) = session.poll_event() {
            world.take(&mut session, event);
        }
        for id in std::mem::take(&mut world.offers) {
            let state = world.disks[&id].core.state();
            session.offer(id, state.source, state.size_sectors, state.generation);
        }
        world.turn();
        while let Some(outgoing) = session.poll_transmit() {
            writer.send(outgoing, ());
        }
    }
    let mut world = world.lock().unwrap();
    world.sessions.remove(&session_id);
    for disk in world.disks.values_mut() {
        disk.core.handle_session_lost(mono_clock(), session_id);
    }
    world.turn();
}

impl World {
    fn take(&mut self, session: &mut TargetSession, event: SessionEvent) {
        match event {
            SessionEvent::Ready { agent, relays } => {
                self.relays.push(relays);
                if let Some(policy) = self.policy {
                    session.send_policy(policy);
                }
                for (id, disk) in self.disks.iter().filter(|(_, disk)| disk.agent == agent) {
                    let state = disk.core.state();
                    session.offer(*id, state.source, state.size_sectors, state.generation);
                }
            }
            SessionEvent::Inventory { disks, .. } => self.inventories.push(disks),
            SessionEvent::ToDisk(id, input) => self.input(session.id(), id, input),
            SessionEvent::MarkRefused(_) => {} // nothing is asked for here
            SessionEvent::Grow(asked) => self.grow(session, &asked),
        }
    }

    /// A disk whose growth is refused has its reason in `refuses_growth`.
    fn grow(&mut self, session: &mut TargetSession, asked: &GrowDisk) {
        if let Some(why) = &self.refuses_growth {
            return session.send_reply(Message::error(asked.disk, ErrorCode::Size, why), 0);
        }
        let Some(disk) = self.disks.get_mut(&asked.disk) else { return };
        disk.core.handle_growing(mono_clock());
        self.turn();
        let Some(disk) = self.disks.get_mut(&asked.disk) else { return };
        assert!(disk.core.is_settled() && disk.core.state().generation == asked.generation);
        disk.bytes.resize(asked.size_sectors as usize * 512, 0);
        disk.core.handle_grown(mono_clock(), asked.size_sectors);
        let state = disk.core.state();
        session.offer(asked.disk, state.source, state.size_sectors, state.generation);
    }

    fn input(&mut self, session: SessionId, id: DiskId, input: DiskInput) {
        let now = mono_clock();
        let Some(disk) = self.disks.get_mut(&id) else { return };
        match input {
            DiskInput::Open(head) => disk.core.handle_open(now, session, &head),
            DiskInput::Batch(body) => {
                let (header, records) = decode_batch(body).unwrap();
                if self.damaged > 0 {
                    self.damaged -= 1;
                    return disk.core.handle_damaged(session, header.generation, credit_cost(&records));
                }
                for (number, record) in records.iter().enumerate() {
                    self.seen.push(see(session, id, Some(header.first_sequence.0 + number as u64), record));
                }
                disk.core.handle_batch(now, session, &header, records);
            }
            DiskInput::Bulk(body) => {
                let (header, records) = decode_bulk(body).unwrap();
                self.seen.extend(records.iter().map(|record| see(session, id, None, record)));
                disk.core.handle_bulk(now, session, &header, records);
            }
            DiskInput::PointDegrade(degrade) => {
                if disk.core.handle_degrade(session, &degrade) {
                    self.degraded.push(degrade);
                }
            }
            DiskInput::Mark(mark) => {
                let before = disk.core.marks_accepted();
                disk.core.handle_mark(now, session, &mark);
                if disk.core.marks_accepted() > before {
                    self.marks.push(mark);
                }
            }
            DiskInput::Compare(head, units) => disk.core.handle_compare(session, head, units),
            DiskInput::PassBegin(begin) => disk.core.handle_pass_begin(now, session, &begin),
            DiskInput::PassEnd(end) => disk.core.handle_pass_end(now, session, &end),
        }
    }

    fn turn(&mut self) {
        if self.stalled {
            return;
        }
        let now = mono_clock();
        for disk in self.disks.values_mut() {
            disk.core.handle_timeout(now);
            while let Some(action) = disk.core.poll_action() {
                match action {
                    DiskAction::Write { pieces, cost } => {
                        for piece in &pieces {
                            write(&mut disk.bytes, &piece.record, &piece.keep);
                        }
                        disk.core.handle_written(cost);
                    }
                    DiskAction::Hash { session, request, units } => {
                        let from = request.range.byte_start() as usize;
                        let chunk = &disk.bytes[from..from + request.range.bytes() as usize];
                        disk.core.handle_hashed(session, &request, answer(&units, chunk));
                    }
                    DiskAction::Checkpoint { state, .. } => {
                        disk.state = *state;
                        disk.core.handle_checkpointed(now);
                    }
                    DiskAction::Reply { session, message } => {
                        if let Some(replies) = self.sessions.get(&session) {
                            let _ = replies.send(message);
                        }
                    }
                }
            }
        }
    }
}

fn see(session: SessionId, disk: DiskId, sequence: Option<u64>, record: &Record) -> Seen {
    Seen {
        session,
        disk,
        sequence,
        range: record.range(),
        codec: record.codec(),
        stored_bytes: record.payload().len() as u64,
        plain_bytes: record.plain_bytes(),
    }
}

fn write(bytes: &mut [u8], record: &Record, keep: &[SectorRange]) {
    let mut plain = vec![0; record.range().bytes() as usize];
    if record.kind() == RecordKind::Data {
        record.open_into(&mut Decompressor::new().unwrap(), &mut plain).unwrap();
    }
    for range in keep {
        let at = range.byte_start() as usize;
        let from = at - record.range().byte_start() as usize;
        let len = range.bytes() as usize;
        bytes[at..at + len].copy_from_slice(&plain[from..from + len]);
    }
}
