//! A scripted agent: the real agent core over disks in memory, one connection at a time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::format::batch::{MarkCause, MarkClass, MarkLabel, Stretch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{Auth, ErrorCode};
use reprotect_engine::limits::{BULK_RECORD_BYTES_MAX, DELTA_RECORD_BYTES_MAX};
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{CloseCode, EndpointError, PeerConnection, TransportSettings};
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::{tls, wall_clock};
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::proto::compare::unit_hashes;
use reprotect_engine::proto::pass::{PassAction, Sink};
use reprotect_engine::proto::{ProtoError, Prover, session_proof_message};
use reprotect_engine::units::{DiskId, PeerId, SectorRange};
use tokio::sync::mpsc;

use super::Site;

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

/// Why a connection's loop ended.
#[derive(Debug)]
pub enum Ended {
    /// What was waited for came.
    Done,
    /// The protocol said so: the other end's error, or a violation.
    Proto(ProtoError),
    /// The connection is gone.
    Gone(String),
}

impl Ended {
    /// Code and text of the error that the other end sent.
    #[track_caller]
    pub fn peer(self) -> (ErrorCode, String) {
        match self {
            Self::Proto(ProtoError::Peer { code, text }) => (code, text),
            other => panic!("not an error of the peer: {other:?}"),
        }
    }
}

/// A live connection.
pub struct Link {
    pub peer: PeerConnection,
    pub reader: LaneReader,
    pub writer: LaneWriter<()>,
    _written: mpsc::UnboundedReceiver<()>,
    _dialer: Dialer,
}

impl Link {
    /// As a crash looks from the other side: no farewell.
    pub fn cut(&self) {
        CloseCode::Finished.close(&self.peer.connection);
    }
}

pub struct FakeAgent {
    pub id: PeerId,
    pub core: Agent,
    identity: Arc<Identity>,
    trust: Arc<Trust>,
    disks: BTreeMap<DiskId, Bytes>,
    pub events: Vec<AgentEvent>,
}

pub async fn dial(
    identity: &Identity,
    trust: &Arc<Trust>,
    address: SocketAddr,
) -> Result<(PeerConnection, Dialer), EndpointError> {
    let dialer = Dialer::bind("127.0.0.1:0".parse().unwrap(), TransportSettings::default())?;
    let rule = PeerRule::of_site("berlin", &[Role::ProcessServer]);
    let config = tls::client_config(identity, Arc::clone(trust), rule).unwrap();
    let peer = dialer.connect(address, config, None, trust.revocations()).await?;
    Ok((peer, dialer))
}

impl FakeAgent {
    pub fn new(site: &Site, target: PeerId) -> Self {
        let identity = Arc::new(site.identity(Role::Agent));
        let id = identity.own().peer;
        Self::with(site, identity, id, target)
    }

    /// An agent that says in its HELLO to be `id`, whatever its certificate says.
    pub fn with(site: &Site, identity: Arc<Identity>, id: PeerId, target: PeerId) -> Self {
        let core = Agent::new(id, target, Box::new(Signer(Arc::clone(&identity))));
        Self { id, core, identity, trust: site.trust(), disks: BTreeMap::new(), events: Vec::new() }
    }

    pub fn add_disk(&mut self, disk: DiskId, bytes: Bytes) {
        self.disks.insert(disk, bytes);
    }

    pub async fn connect(&mut self, address: SocketAddr) -> Link {
        let (peer, dialer) = dial(&self.identity, &self.trust, address).await.unwrap();
        let (reader, writer, written) = lanes::dialled(&peer.connection).await.unwrap();
        self.core.handle_connected([7; 16]);
        Link { peer, reader, writer, _written: written, _dialer: dialer }
    }

    /// Goes on until `done`, or until the session ends; then the core is disconnected.
    pub async fn go(&mut self, link: &mut Link, mut done: impl FnMut(&mut Self) -> bool) -> Ended {
        loop {
            self.turn(link);
            if done(self) {
                return Ended::Done;
            }
            let ended = match link.reader.next().await {
                Arrival::Frame(kind, body) => match self.core.handle_frame(kind, &body) {
                    Ok(()) => continue,
                    Err(error) => Ended::Proto(error),
                },
                Arrival::Over(error) => Ended::Gone(error.to_string()),
            };
            link.cut();
            self.core.handle_disconnected();
            return ended;
        }
    }

    /// Connects and goes on until every disk is synced.
    pub async fn sync(&mut self, address: SocketAddr) -> Link {
        let mut link = self.connect(address).await;
        let ended = self.go(&mut link, Self::is_synced).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        link
    }

    pub fn is_synced(&mut self) -> bool {
        let synced = self.events.iter().filter(|event| matches!(event, AgentEvent::Synced { .. })).count();
        synced >= self.disks.len()
    }

    /// Sends delta records and a mark, and goes on until they are durable.
    pub async fn send_delta(&mut self, link: &mut Link, disk: DiskId, batches: Vec<Vec<Record>>) -> Ended {
        for records in batches {
            self.core.submit_delta(disk, Stretch::Ordered, wall_clock(), records).unwrap();
        }
        let label = MarkLabel::of_disk(MarkClass::Crash, MarkCause::Timer, wall_clock());
        assert!(self.core.submit_mark(disk, label));
        self.go(link, |agent| agent.core.position(disk).is_some_and(|(durable, last)| durable == last)).await
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
        match &event {
            AgentEvent::Offered { disk, .. } => {
                if let Some(bytes) = self.disks.get(disk) {
                    self.core.open(*disk, bytes.len() as u64 / 512);
                }
            }
            AgentEvent::Work { disk, epoch, sink, as_of, action } => {
                let bytes = self.disks[disk].clone();
                let slice = |chunk: SectorRange| {
                    bytes.slice(chunk.byte_start() as usize..(chunk.byte_start() + chunk.bytes()) as usize)
                };
                match action {
                    PassAction::Read { chunk, hash, .. } => {
                        let hashes = hash.then(|| unit_hashes(&slice(*chunk)));
                        self.core.handle_read(*disk, *epoch, *chunk, hashes).unwrap();
                    }
                    PassAction::Compute { chunk, question } => {
                        let computed = question.answer(&slice(*chunk));
                        self.core.handle_computed(*disk, *epoch, *chunk, computed).unwrap();
                    }
                    PassAction::Send { chunk, pieces } => {
                        let max = match sink {
                            Sink::Bulk => BULK_RECORD_BYTES_MAX,
                            Sink::Delta => DELTA_RECORD_BYTES_MAX,
                        };
                        let records = cut_records(chunk.start, &slice(*chunk), pieces, max);
                        self.core.submit_chunk(*disk, *epoch, *chunk, *as_of, wall_clock(), records);
                    }
                    PassAction::Ask { .. } => unreachable!("the core asks by itself"),
                }
                return;
            }
            _ => {}
        }
        self.events.push(event);
    }
}
