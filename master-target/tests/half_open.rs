//! What thousands of half-open handshakes cost the master target's process: a bound on its memory, measured from outside.
//!
//! The daemon is the built program in a process of its own, so that the attackers' memory is not counted. Two kinds of
//! attackers: forged senders, who never see an answer, and real ones behind a proxy that lets the retry through and
//! swallows the rest, so that they fill the places that forged ones cannot reach. The bound is a number of handshakes
//! times bytes for each; nothing here depends on how long something takes.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/daemon.rs"]
mod daemon;

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use daemon::{configure, overrides};
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::places::Program;
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::TransportSettings;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::{tls, wall_clock};
use reprotect_engine::units::PeerId;
use reprotect_master_target::api::StatusInfo;
use reprotect_master_target::config::Settings;

/// Forged senders' first packets.
const FORGED: usize = 4000;
/// Clients that answer the retry and then fall silent: more than there are places.
const STALLED: usize = 700;
/// What one unfinished handshake may cost. Measured: 26 KiB, with everything that follows.
const HANDSHAKE_BYTES_MAX: u64 = 48 << 10;
/// What the flood touches once: receive buffers, stacks, the allocator's arenas.
const FIXED_BYTES_MAX: u64 = 16 << 20;

/// The program, killed at the end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// A field of the process' status in bytes.
    fn memory(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

async fn start(dir: &Path) -> (Running, SocketAddr) {
    configure(dir, "site = \"lyon\"\n[log]\nlevel = \"error\"\n");
    let child = Command::new(env!("CARGO_BIN_EXE_reprotect-master-target"))
        .args(["run", "--state-dir", dir.to_str().unwrap()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let program = Running(child);
    let client =
        AdminClient::new(Program::MasterTarget, &Settings::load(&overrides(dir)).unwrap().places.socket);
    for _ in 0..6000 {
        if let Ok(status) = client.get_json::<StatusInfo>("/v1/status").await {
            return (program, status.listen.parse().unwrap());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the daemon does not answer");
}

/// An agent of the site, as the daemon's own authority would certify it.
struct Client {
    identity: Identity,
    trust: Arc<Trust>,
}

impl Client {
    fn of(dir: &Path) -> Self {
        let ca = Ca::open_or_create(&dir.join("ca"), "lyon", wall_clock()).unwrap();
        let identity = ca.issue_identity(Role::Agent, PeerId::random().unwrap(), wall_clock()).unwrap();
        let revocations = Arc::new(Revocations::in_memory());
        Self { identity, trust: Arc::new(Trust::new(&[ca.certificate().clone()], revocations).unwrap()) }
    }

    async fn dial(&self, address: SocketAddr, settings: TransportSettings) -> bool {
        let dialer = Dialer::bind("127.0.0.1:0".parse().unwrap(), settings).unwrap();
        self.dial_with(&dialer, address).await
    }

    async fn dial_with(&self, dialer: &Dialer, address: SocketAddr) -> bool {
        let rule = PeerRule::of_site("lyon", &[Role::MasterTarget]);
        let tls = tls::client_config(&self.identity, Arc::clone(&self.trust), rule).unwrap();
        dialer.connect(address, tls, None, self.trust.revocations()).await.is_ok()
    }
}

/// Whether a datagram begins with a long-header packet of this type.
fn is_long(datagram: &[u8], kind: u8) -> bool {
    datagram.first().is_some_and(|first| first & 0xf0 == 0xc0 | kind << 4)
}
const INITIAL: u8 = 0;
const RETRY: u8 = 3;

/// Starts `count` handshakes with whoever listens on `address`, one dialler for all, and keeps them going.
fn begin(client: &Arc<Client>, address: SocketAddr, count: usize) -> Vec<tokio::task::JoinHandle<bool>> {
    let settings =
        TransportSettings { handshake_timeout: Duration::from_secs(300), ..TransportSettings::default() };
    let settings = TransportSettings { idle_timeout: Duration::from_secs(300), ..settings };
    let dialer = Arc::new(Dialer::bind("127.0.0.1:0".parse().unwrap(), settings).unwrap());
    (0..count)
        .map(|_| {
            let (client, dialer) = (Arc::clone(client), Arc::clone(&dialer));
            tokio::spawn(async move { client.dial_with(&dialer, address).await })
        })
        .collect()
}

/// First packets of `count` connections, as clients send them to nobody.
fn first_packets(client: &Arc<Client>, count: usize) -> Vec<Vec<u8>> {
    let hole = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut packets = Vec::with_capacity(count);
    let mut seen = std::collections::BTreeSet::new();
    let mut bytes = [0; 2048];
    while packets.len() < count {
        let dials = begin(client, hole.local_addr().unwrap(), 50.min(count - packets.len()));
        let wanted = packets.len() + dials.len();
        while packets.len() < wanted {
            let (len, _) = hole.recv_from(&mut bytes).unwrap();
            // The connection's identifier follows flags, version and its own length.
            if len >= 1200 && is_long(&bytes, INITIAL) && seen.insert(bytes[6..14].to_vec()) {
                packets.push(bytes[..len].to_vec());
            }
        }
        dials.iter().for_each(tokio::task::JoinHandle::abort);
    }
    packets
}

/// Forwards first packets to `server` and only retries back: its clients stand in the middle of their handshake.
fn stalling_proxy(server: SocketAddr) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
    let address = front.local_addr().unwrap();
    let client = Arc::new(std::sync::Mutex::new(None));
    let (to_server, from_client, known) = (Arc::clone(&back), Arc::clone(&front), Arc::clone(&client));
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((len, from)) = from_client.recv_from(&mut bytes) {
            *known.lock().unwrap() = Some(from);
            if is_long(&bytes[..len], INITIAL) {
                let _ = to_server.send_to(&bytes[..len], server);
            }
        }
    });
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((len, _)) = back.recv_from(&mut bytes) {
            let to = *client.lock().unwrap();
            if let Some(to) = to.filter(|_| is_long(&bytes[..len], RETRY)) {
                let _ = front.send_to(&bytes[..len], to);
            }
        }
    });
    address
}

#[test]
fn thousands_of_half_open_handshakes_cost_a_bounded_number_times_a_bounded_size() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (program, address) = runtime.block_on(start(dir.path()));
    let client = Arc::new(Client::of(dir.path()));
    let _inside = runtime.enter();
    assert!(runtime.block_on(client.dial(address, TransportSettings::default())), "an honest one gets in");
    let before = program.memory("VmRSS");

    let packets = first_packets(&client, FORGED);
    let sockets: Vec<_> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (at, packet) in packets.iter().enumerate() {
        sockets[at % sockets.len()].send_to(packet, address).unwrap();
    }
    let stalled = begin(&client, stalling_proxy(address), STALLED);
    // An honest one answers its retry too; when all places are taken it is refused and comes again.
    for attempt in 0.. {
        if runtime.block_on(client.dial(address, TransportSettings::default())) {
            break;
        }
        assert!(attempt < 600, "nobody gets in any more");
        std::thread::sleep(Duration::from_millis(100));
    }
    let grown = program.memory("VmHWM").saturating_sub(before);
    let slots = TransportSettings::default().unfinished_handshakes_max as u64;
    println!(
        "{} KiB more at the most: {} KiB for each of {slots} places",
        grown >> 10,
        (grown >> 10) / slots
    );
    assert!(grown <= slots * HANDSHAKE_BYTES_MAX + FIXED_BYTES_MAX, "{} KiB", grown >> 10);
    stalled.iter().for_each(tokio::task::JoinHandle::abort);
    runtime.shutdown_background();
}
