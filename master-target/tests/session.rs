//! Sessions at the running daemon, by peers that keep to the protocol's bytes and to nothing else: agents that are
//! revoked behind a process server, and agents that ask for ever and never read an answer.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/daemon.rs"]
mod daemon;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use daemon::*;
use reprotect_engine::format::frame::Frame;
use reprotect_engine::format::handshake::Hello;
use reprotect_engine::format::message::{Auth, ErrorCode, InventoryHead, Message, OpenDiskHead};
use reprotect_engine::format::wire::Text;
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::enroll;
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::tls;
use reprotect_engine::net::token::Token;
use reprotect_engine::net::trust::{PeerRule, ROOTS_FILE, Trust};
use reprotect_engine::proto::{Outgoing, session_proof_message};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, Sequence};
use reprotect_master_target::api::{MachineInfo, PolicyAnswer, PolicyRequest, RevokeAnswer, RevokeRequest};
use tokio::sync::mpsc;

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// An enrolled peer.
struct Peer {
    identity: Identity,
    trust: Arc<Trust>,
}

impl Peer {
    async fn enrolled(daemon: &Daemon, role: &str, place: &Path) -> Self {
        let token: Token = daemon.invite(role).await.token.parse().unwrap();
        let identity = enroll(&token, token.role, role, place).await.unwrap();
        let roots = place.join(ROOTS_FILE);
        let trust = Arc::new(Trust::load(&roots, Arc::new(Revocations::in_memory())).unwrap());
        Self { identity, trust }
    }

    fn id(&self) -> PeerId {
        self.identity.own().peer
    }

    async fn dial(&self, daemon: &Daemon, settings: TransportSettings) -> Line {
        let address = daemon.status().await.listen.parse().unwrap();
        let dialer = Dialer::bind("127.0.0.1:0".parse().unwrap(), settings).unwrap();
        let rule = PeerRule::of_site("lyon", &[Role::MasterTarget]);
        let tls = tls::client_config(&self.identity, Arc::clone(&self.trust), rule).unwrap();
        let peer = dialer.connect(address, tls, None, self.trust.revocations()).await.unwrap();
        let (reader, writer, written) = lanes::dialled(&peer.connection).await.unwrap();
        Line { _peer: peer, reader, writer, written, _dialer: dialer }
    }

    fn prove(&self, nonce: &[u8; 32], target: PeerId) -> Auth {
        let message = session_proof_message(nonce, self.id(), target);
        Auth {
            agent: self.id(),
            signature: self.identity.sign(Purpose::SessionProof, &message).unwrap().into(),
            certificates: self.identity.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect(),
        }
    }
}

/// A connection with its lanes.
struct Line {
    _peer: PeerConnection,
    reader: LaneReader,
    writer: LaneWriter<()>,
    written: mpsc::UnboundedReceiver<()>,
    _dialer: Dialer,
}

impl Line {
    fn send(&mut self, frame: Frame) {
        self.writer.send(Outgoing::control(frame), ());
    }

    async fn next(&mut self) -> Result<Message, String> {
        match tokio::time::timeout(PATIENCE, self.reader.next()).await.expect("an answer within a minute") {
            Arrival::Frame(kind, body) => Ok(Message::decode(kind, &body).unwrap()),
            Arrival::Over(error) => Err(error.to_string()),
        }
    }

    /// HELLO and AUTH as `agent`, through `relays` process servers; what the target says at the end.
    async fn handshake(&mut self, agent: &Peer, relays: u8) -> Message {
        let mut hello = Hello::new(agent.id(), PeerId::NONE, [0; 16]);
        hello.relays = relays;
        self.send(Message::Hello(hello).encode());
        let Ok(Message::HelloAck(ack)) = self.next().await else { panic!("no answer to HELLO") };
        self.send(Message::Auth(agent.prove(&ack.nonce, ack.target)).encode());
        self.next().await.unwrap()
    }

    /// Tells a host name; answers when the target lists it.
    async fn tells(&mut self, daemon: &Daemon, host_name: &str) {
        let head = InventoryHead { host_name: Text::new(host_name), disk_count: 0 };
        self.send(Message::Inventory(head, Vec::new()).encode());
        for _ in 0..6000 {
            let machines: Vec<MachineInfo> = daemon.client.get_json("/v1/machines").await.unwrap();
            if machines.iter().any(|machine| machine.host_name == host_name) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{host_name} is not listed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_agent_is_cut_off_behind_a_process_server_and_its_neighbours_are_not() {
    let dir = dir();
    let daemon = start(dir.path()).await;
    let relay = Peer::enrolled(&daemon, "process-server", &dir.path().join("relay")).await;
    let doomed = Peer::enrolled(&daemon, "agent", &dir.path().join("doomed")).await;
    let honest = Peer::enrolled(&daemon, "agent", &dir.path().join("honest")).await;
    let mut cut = relay.dial(&daemon, TransportSettings::default()).await;
    let mut kept = relay.dial(&daemon, TransportSettings::default()).await;
    assert!(matches!(cut.handshake(&doomed, 1).await, Message::Welcome(_)));
    assert!(matches!(kept.handshake(&honest, 1).await, Message::Welcome(_)));
    cut.tells(&daemon, "before").await;

    let request = RevokeRequest { peer: doomed.id().to_string() };
    let _: RevokeAnswer = daemon.client.post_json("/v1/revoke", &request).await.unwrap();
    let Ok(Message::Error(head, text)) = cut.next().await else { panic!("the agent is not told") };
    assert_eq!((head.disk, head.code), (DiskId::NONE, ErrorCode::Identity));
    assert!(text.contains("revoked") && text.contains("enrol"), "{text}");
    assert!(cut.next().await.is_err(), "and the connection is closed");

    let mut again = relay.dial(&daemon, TransportSettings::default()).await;
    let refused = again.handshake(&doomed, 1).await;
    assert!(matches!(&refused, Message::Error(head, _) if head.code == ErrorCode::Identity), "{refused:?}");
    kept.tells(&daemon, "after").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_told_live_and_at_every_session_and_survives_a_restart() {
    let dir = dir();
    let daemon = start(dir.path()).await;
    let agent = Peer::enrolled(&daemon, "agent", &dir.path().join("agent")).await;
    let mut live = agent.dial(&daemon, TransportSettings::default()).await;
    assert!(matches!(live.handshake(&agent, 0).await, Message::Welcome(_)));
    live.tells(&daemon, "web1").await;
    let ask = |points_every_ms| PolicyRequest {
        machine: "web1".to_owned(),
        points_every_ms,
        app_points_every_ms: None,
    };
    let none: PolicyAnswer = daemon.client.post_json("/v1/policy", &ask(None)).await.unwrap();
    assert_eq!((none.revision, none.connected), (0, true));
    let set: PolicyAnswer = daemon.client.post_json("/v1/policy", &ask(Some(5000))).await.unwrap();
    assert_eq!((set.revision, set.points_every_ms), (1, 5000));
    let Ok(Message::Policy(told)) = live.next().await else { panic!("not told") };
    assert_eq!((told.revision, told.points_every_ms), (1, 5000));
    let refused = daemon.client.post_json::<_, PolicyAnswer>("/v1/policy", &ask(Some(1))).await.unwrap_err();
    assert!(refused.to_string().contains("from 100ms to 7d"), "{refused}");
    drop(live);
    let set: PolicyAnswer = daemon.client.post_json("/v1/policy", &ask(Some(9000))).await.unwrap();
    assert_eq!(set.revision, 2);
    daemon.stop().await;

    let daemon = start(dir.path()).await;
    let mut later = agent.dial(&daemon, TransportSettings::default()).await;
    assert!(matches!(later.handshake(&agent, 0).await, Message::Welcome(_)));
    let Ok(Message::Policy(again)) = later.next().await else { panic!("not told") };
    assert_eq!((again.revision, again.points_every_ms, again.target), (2, 9000, told.target));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_reads_its_answers_is_not_read_for_ever_either() {
    // An endless reader takes all of this; one that waits for its answers to be read stops far earlier, at what the
    // windows of the transport hold (16 MiB) and what may wait (4 MiB of answers).
    const FAR_TOO_MUCH: u64 = 96 << 20;
    let dir = dir();
    let daemon = start(dir.path()).await;
    let agent = Peer::enrolled(&daemon, "agent", &dir.path().join("agent")).await;
    let settings = TransportSettings { stream_window_bytes: 64 << 10, ..TransportSettings::default() };
    let mut deaf = agent.dial(&daemon, settings).await;
    assert!(matches!(deaf.handshake(&agent, 0).await, Message::Welcome(_)));

    let head = OpenDiskHead {
        disk: DiskId([7; 16]),
        size_sectors: 8,
        generation: Generation(1),
        lineage: LineageId::NONE,
        durable: Sequence::ZERO,
        grant_bytes: 0,
    };
    let frame = Message::OpenDisk(head, Bytes::new()).encode();
    let bytes = frame.encoded_bytes() as u64;
    let taken = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&taken);
    let flood = tokio::spawn(async move {
        while counter.load(Ordering::Relaxed) < FAR_TOO_MUCH {
            for _ in 0..1000 {
                deaf.send(frame.clone());
            }
            for _ in 0..1000 {
                if deaf.written.recv().await.is_none() {
                    return;
                }
                counter.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    });
    let mut before = 0;
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = taken.load(Ordering::Relaxed);
        assert!(now < FAR_TOO_MUCH, "the target reads on while nobody reads its answers");
        if now == before && now > 0 {
            break; // it stands still
        }
        before = now;
    }
    let other = Peer::enrolled(&daemon, "agent", &dir.path().join("other")).await;
    let mut line = other.dial(&daemon, TransportSettings::default()).await;
    assert!(matches!(line.handshake(&other, 0).await, Message::Welcome(_)));
    line.tells(&daemon, "unharmed").await;
    assert!(!flood.is_finished(), "the flood was not taken");
    flood.abort();
    daemon.stop().await;
}
