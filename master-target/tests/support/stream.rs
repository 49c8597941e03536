//! An agent that captures in order: the real agent core over real QUIC, fed by a [`LoggedDisk`]'s log.
//!
//! It sends what the disk holds as bulk, then the log as ORDERED batches of at most 200 ms, and places crash marks.
//! Invariant: a mark stands behind exactly the changes it says. Used by the test `ordered`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "test support: a failed step is a failed test")]
#![allow(dead_code, unreachable_pub, clippy::allow_attributes, reason = "each test program uses its part")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::format::batch::{MarkCause, MarkClass, MarkLabel, Stretch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{Auth, InventoryDisk};
use reprotect_engine::format::wire::Text;
use reprotect_engine::limits::{BATCH_PLAIN_BYTES_MAX, BULK_RECORD_BYTES_MAX, DELTA_RECORD_BYTES_MAX};
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{CloseCode, PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::enroll;
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::token::Token;
use reprotect_engine::net::trust::{PeerRule, ROOTS_FILE, Trust};
use reprotect_engine::net::{tls, wall_clock};
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::proto::compare::unit_hashes;
use reprotect_engine::proto::pass::{PassAction, Sink};
use reprotect_engine::proto::{Prover, session_proof_message};
use reprotect_engine::units::{DiskId, PeerId, SECTOR_BYTES, SectorRange, Timestamp};
use tokio::sync::mpsc;

use super::logged::{Change, LoggedDisk};

/// Longest time from a change to its batch.
const TICK: Duration = Duration::from_millis(100);
/// Changes taken at once.
const CHANGES_MAX: usize = 2000;
/// What may be under way before the log is left to wait.
const UNDURABLE_MAX: u64 = 64 << 20;
pub const SOURCE: [u8; 16] = [0x51; 16];

struct Signer(Arc<Identity>);

impl Prover for Signer {
    fn prove(&self, nonce: &[u8; 32], target: PeerId) -> Auth {
        let message = session_proof_message(nonce, self.0.own().peer, target);
        Auth {
            agent: self.0.own().peer,
            signature: self.0.sign(Purpose::SessionProof, &message).unwrap().into(),
            certificates: self.0.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect(),
        }
    }
}

/// A mark, and what the source was there.
#[derive(Clone, Copy, Debug)]
pub struct PlacedMark {
    /// Changes of the log before it.
    pub changes: usize,
    /// The last sequence before it.
    pub sequence: u64,
    pub time: Timestamp,
    pub point: [u8; 16],
    pub durable: bool,
}

/// What the test sees and wants.
#[derive(Debug, Default)]
pub struct Shared {
    pub connected: bool,
    pub synced: bool,
    pub marks: Vec<PlacedMark>,
    /// The last sequence of each change of the log that was submitted.
    pub sequences: Vec<u64>,
    /// The time of each batch, and how many changes are in it and those before.
    pub batches: Vec<(Timestamp, usize)>,
    /// Break the connection once.
    pub cut: bool,
    /// Place a last mark behind everything and end when it is durable.
    pub stop: bool,
}

pub struct Stream {
    core: Agent,
    identity: Arc<Identity>,
    trust: Arc<Trust>,
    disk: LoggedDisk,
    base: Bytes,
    id: Option<DiskId>,
    open: bool,
    submitted: usize,
    mark_every: Duration,
    marked_at: Instant,
    shared: Arc<Mutex<Shared>>,
}

struct Link {
    peer: PeerConnection,
    reader: LaneReader,
    writer: LaneWriter<()>,
    _written: mpsc::UnboundedReceiver<()>,
    _dialer: Dialer,
}

impl Stream {
    /// Enrols with a token and gets ready to send `base`, then the disk's log.
    pub async fn enrolled(token: &str, place: &Path, disk: LoggedDisk, mark_every: Duration) -> Self {
        let token: Token = token.parse().unwrap();
        let identity = Arc::new(enroll(&token, token.role, "ordered", place).await.unwrap());
        let trust =
            Arc::new(Trust::load(&place.join(ROOTS_FILE), Arc::new(Revocations::in_memory())).unwrap());
        let signer = Box::new(Signer(Arc::clone(&identity)));
        let mut core = Agent::new(identity.own().peer, PeerId::NONE, signer);
        let base = disk.base();
        let inventory = InventoryDisk {
            source: SOURCE,
            size_sectors: base.len() as u64 / SECTOR_BYTES,
            gpt_guid: [0; 16],
            mbr_signature: 0,
            fs_count: 0,
            selected: true,
            name: Text::new("logged"),
            fs_uuids: [0; 128],
        };
        core.set_inventory("ordered", vec![inventory]);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (id, open, submitted, marked_at) = (None, false, 0, Instant::now());
        Self { core, identity, trust, disk, base, id, open, submitted, mark_every, marked_at, shared }
    }

    pub fn base(&self) -> Bytes {
        self.base.clone()
    }

    pub fn shared(&self) -> Arc<Mutex<Shared>> {
        Arc::clone(&self.shared)
    }

    async fn dial(&mut self, address: SocketAddr) -> Link {
        let dialer = Dialer::bind("127.0.0.1:0".parse().unwrap(), TransportSettings::default()).unwrap();
        let site = self.identity.own().site.clone();
        let rule = PeerRule::of_site(&site, &[Role::MasterTarget]);
        let tls = tls::client_config(&self.identity, Arc::clone(&self.trust), rule).unwrap();
        let peer = dialer.connect(address, tls, None, self.trust.revocations()).await.unwrap();
        let (reader, writer, written) = lanes::dialled(&peer.connection).await.unwrap();
        self.core.handle_connected([9; 16]);
        Link { peer, reader, writer, _written: written, _dialer: dialer }
    }

    /// Runs until it is told to stop and everything is durable.
    pub async fn run(mut self, address: SocketAddr) {
        let mut link = self.dial(address).await;
        let mut tick = tokio::time::interval(TICK);
        let mut last_mark = None;
        loop {
            self.turn(&mut link);
            tokio::select! {
                arrival = link.reader.next() => match arrival {
                    Arrival::Frame(kind, body) => self.core.handle_frame(kind, &body).unwrap(),
                    Arrival::Over(error) => panic!("the session ended: {error}"),
                },
                _ = tick.tick() => {
                    if std::mem::take(&mut self.shared.lock().unwrap().cut) {
                        CloseCode::Finished.close(&link.peer.connection);
                        self.core.handle_disconnected();
                        self.open = false;
                        link = self.dial(address).await;
                        continue;
                    }
                    self.capture();
                    let stop = self.shared.lock().unwrap().stop;
                    if stop && last_mark.is_none() && self.submitted == self.disk.log_len() {
                        self.mark();
                        last_mark = Some(());
                    }
                }
            }
            let shared = self.shared.lock().unwrap();
            if last_mark.is_some() && shared.marks.iter().all(|mark| mark.durable) {
                return;
            }
        }
    }

    fn is_synced(&self) -> bool {
        self.shared.lock().unwrap().synced
    }

    /// Submits what the log holds by now, and a mark if one is due.
    fn capture(&mut self) {
        let Some(id) = self.id.filter(|_| self.is_synced()) else { return };
        while self.core.undurable_bytes(id) < UNDURABLE_MAX {
            let changes = self.disk.changes(self.submitted, CHANGES_MAX);
            if changes.is_empty() {
                break;
            }
            self.submit(id, &changes);
        }
        if self.marked_at.elapsed() >= self.mark_every && self.submitted == self.disk.log_len() {
            self.mark();
        }
    }

    fn submit(&mut self, id: DiskId, changes: &[Change]) {
        let mut batch: Vec<Record> = Vec::new();
        let mut ends = Vec::new(); // sequence of each change, counted from the records before
        let (_, last) = self.core.position(id).unwrap();
        let mut sequence = last.0;
        let mut bytes = 0;
        for change in changes {
            let records = records_of(change);
            let more: u64 = records.iter().map(Record::plain_bytes).sum();
            if !batch.is_empty() && bytes + more > BATCH_PLAIN_BYTES_MAX {
                self.core
                    .submit_delta(id, Stretch::Ordered, wall_clock(), std::mem::take(&mut batch))
                    .unwrap();
                bytes = 0;
            }
            bytes += more;
            sequence += records.len() as u64;
            ends.push(sequence);
            batch.extend(records);
        }
        let time = wall_clock();
        self.core.submit_delta(id, Stretch::Ordered, time, batch).unwrap();
        self.submitted += changes.len();
        let mut shared = self.shared.lock().unwrap();
        shared.sequences.extend(ends);
        shared.batches.push((time, self.submitted));
    }

    fn mark(&mut self) {
        let Some(id) = self.id else { return };
        self.marked_at = Instant::now();
        let mut point = [0x0d; 16];
        let mut shared = self.shared.lock().unwrap();
        point[..8].copy_from_slice(&(shared.marks.len() as u64 + 1).to_le_bytes());
        let time = wall_clock();
        let label = MarkLabel {
            point,
            class: MarkClass::Crash,
            cause: MarkCause::Timer,
            name: Text::new(""),
            source_time: time,
        };
        assert!(self.core.submit_mark(id, label), "too many marks wait");
        let (_, last) = self.core.position(id).unwrap();
        let (changes, sequence) = (self.submitted, last.0);
        shared.marks.push(PlacedMark { changes, sequence, time, point, durable: false });
    }

    fn turn(&mut self, link: &mut Link) {
        loop {
            let mut idle = true;
            while let Some(event) = self.core.poll_event() {
                idle = false;
                self.handle(event);
            }
            while let Some(outgoing) = self.core.poll_transmit() {
                idle = false;
                link.writer.send(outgoing, ());
            }
            if idle {
                return;
            }
        }
    }

    fn handle(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Ready => self.shared.lock().unwrap().connected = true,
            AgentEvent::Offered { disk, .. } => {
                self.id = Some(disk);
                self.core.open(disk, self.base.len() as u64 / SECTOR_BYTES);
            }
            AgentEvent::Opened { .. } => self.open = true,
            AgentEvent::Synced { .. } => {
                self.shared.lock().unwrap().synced = true;
                self.mark();
            }
            AgentEvent::Work { disk, epoch, sink, as_of, action } => {
                let base = self.base.clone();
                let slice = |chunk: SectorRange| {
                    base.slice(chunk.byte_start() as usize..(chunk.byte_start() + chunk.bytes()) as usize)
                };
                match action {
                    PassAction::Read { chunk, hash, .. } => {
                        let hashes = hash.then(|| unit_hashes(&slice(chunk)));
                        self.core.handle_read(disk, epoch, chunk, hashes).unwrap();
                    }
                    PassAction::Compute { chunk, question } => {
                        let computed = question.answer(&slice(chunk));
                        self.core.handle_computed(disk, epoch, chunk, computed).unwrap();
                    }
                    PassAction::Send { chunk, pieces } => {
                        let max =
                            if sink == Sink::Bulk { BULK_RECORD_BYTES_MAX } else { DELTA_RECORD_BYTES_MAX };
                        let records = cut_records(chunk.start, &slice(chunk), &pieces, max);
                        self.core.submit_chunk(disk, epoch, chunk, as_of, wall_clock(), records);
                    }
                    PassAction::Ask { .. } => unreachable!("the core asks by itself"),
                }
            }
            AgentEvent::Marked { label, .. } => {
                let mut shared = self.shared.lock().unwrap();
                let mark = shared.marks.iter_mut().find(|mark| mark.point == label.point);
                let mark = mark.expect("a mark that was placed");
                assert!(!std::mem::replace(&mut mark.durable, true), "told twice");
            }
            AgentEvent::MarkLost { .. }
            | AgentEvent::TargetLost { .. }
            | AgentEvent::Resync { .. }
            | AgentEvent::Stopped { .. } => {
                panic!("the stream broke: {event:?}")
            }
            AgentEvent::ScanDone { .. }
            | AgentEvent::ScanRead { .. }
            | AgentEvent::Policy(_)
            | AgentEvent::MarkRequested(_)
            | AgentEvent::Warned { .. } => {}
        }
    }
}

fn records_of(change: &Change) -> Vec<Record> {
    let whole = |offset: u64, len: u64| {
        assert!(offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES), "whole sectors");
        SectorRange::new(offset / SECTOR_BYTES, (offset + len) / SECTOR_BYTES)
    };
    match change {
        Change::Data(offset, data) => {
            let range = whole(*offset, data.len() as u64);
            cut_records(range.start, data, &[range], DELTA_RECORD_BYTES_MAX)
        }
        Change::Zeros(range) => vec![Record::zeros(whole(range.start, range.len()))],
    }
}

/// Marks that are durable, by their times in milliseconds; those that share one with another are left out.
pub fn durable_marks(shared: &Mutex<Shared>) -> Vec<PlacedMark> {
    let shared = shared.lock().unwrap();
    let mut seen = BTreeSet::new();
    let fresh = |mark: &&PlacedMark| seen.insert(mark.time.0 / 1_000_000);
    shared.marks.iter().filter(|mark| mark.durable).filter(fresh).copied().collect()
}
