//! Endpoints, over UDP or through tunnels: transport limits, accepting with every doubt resolved first, dialling.
//!
//! Invariants: a [`PeerConnection`] exists only for a peer whose chain was verified in this very handshake; until
//! then the other side can open no stream and send no more than [`UNVERIFIED_WINDOW_BYTES`]; a connection is closed
//! when its peer is revoked or its certificate expires; unfinished handshakes are bounded in number and time, and
//! the second half of them is open only to addresses that answered a retry, so that forged senders cannot fill it;
//! verified connections are bounded in all and by peer, so that one peer cannot take the places of the others.
//! Units: bytes and `Duration`s. Called by the three programs.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{
    AsyncUdpSocket, Connection, EndpointConfig, Incoming, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};

use crate::error::{Answer, Severity};
use crate::limits::{DISKS_PER_AGENT_MAX, HANDSHAKE_NANOS_MAX, KEEP_ALIVE_NANOS};
use crate::net::identity::{PeerIdentity, Role};
use crate::net::revocations::Revocations;
use crate::net::socket;
use crate::net::tunnel::{self, Way};
use crate::net::{ALPN_DATA, ALPN_ENROLL, wall_clock};
use crate::units::PeerId;

/// What an unverified or enrolling peer may have in flight towards us.
pub const UNVERIFIED_WINDOW_BYTES: u32 = 64 << 10;
/// Verified connections waiting for the daemon to take them.
const ACCEPTED_MAX: usize = 16;
/// Longest wait for an expiry, so that a clock that is set forward is noticed within it.
const EXPIRY_CHECK_MAX: Duration = Duration::from_secs(60);

/// Why a connection was closed by us, as the other side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// Done.
    Finished,
    /// The data protocol needs a certificate.
    NoCertificate,
    /// The peer was revoked.
    Revoked,
    /// The peer's certificate expired: renew, then dial again.
    Expired,
    /// The daemon is stopping: dial again later.
    ShuttingDown,
    /// The other side broke the rules of the protocol.
    Violation,
    /// There are too many connections, of this peer or in all: dial again later.
    Busy,
}

impl CloseCode {
    /// Every code.
    pub const ALL: [Self; 7] = [
        Self::Finished,
        Self::NoCertificate,
        Self::Revoked,
        Self::Expired,
        Self::ShuttingDown,
        Self::Violation,
        Self::Busy,
    ];

    /// On the wire; frozen.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Finished => 0,
            Self::NoCertificate => 1,
            Self::Revoked => 2,
            Self::Expired => 3,
            Self::ShuttingDown => 4,
            Self::Violation => 5,
            Self::Busy => 6,
        }
    }

    /// The code a lost connection carries, if the other side closed it with one.
    #[must_use]
    pub fn of(error: &quinn::ConnectionError) -> Option<Self> {
        let quinn::ConnectionError::ApplicationClosed(close) = error else { return None };
        Self::ALL.into_iter().find(|code| u64::from(code.code()) == close.error_code.into_inner())
    }

    /// Closes `connection` with this code.
    pub fn close(self, connection: &Connection) {
        let reason: &[u8] = match self {
            Self::Finished => b"finished",
            Self::NoCertificate => b"a client certificate is required; enrol first",
            Self::Revoked => b"this peer is revoked",
            Self::Expired => b"the certificate expired; renew it",
            Self::ShuttingDown => b"shutting down",
            Self::Violation => b"protocol violation",
            Self::Busy => b"too many connections of this peer or in all; dial again later",
        };
        connection.close(VarInt::from_u32(self.code()), reason);
    }
}

/// Why a peer was refused for what it is, with what to do; `None` for what another attempt may well mend.
///
/// Refusals come as our codes, or as TLS alerts of whichever side did not believe the other's certificate.
#[must_use]
pub fn refusal(error: &quinn::ConnectionError) -> Option<String> {
    let ours = match CloseCode::of(error) {
        Some(CloseCode::Revoked) => {
            Some("this machine is revoked there; if that was a mistake, enrol it again with a new token")
        }
        Some(CloseCode::Expired) => {
            Some("this machine's certificate expired; enrol it again with a new token")
        }
        Some(CloseCode::NoCertificate) => Some("the other side saw no certificate; enrol this machine"),
        _ => None,
    };
    if let Some(text) = ours {
        return Some(text.to_owned());
    }
    let (code, reason, whose) = match error {
        quinn::ConnectionError::TransportError(error) => {
            (u64::from(error.code), error.reason.clone(), "its certificate is not believed here")
        }
        quinn::ConnectionError::ConnectionClosed(close) => (
            u64::from(close.error_code),
            String::from_utf8_lossy(&close.reason).into_owned(),
            "this machine's certificate is not believed there",
        ),
        _ => return None,
    };
    let alert = code.checked_sub(TLS_ALERTS_FROM).filter(|alert| *alert <= 0xff)?;
    Some(alert_text(whose, alert, &reason))
}

/// What a TLS alert says, and what to do.
fn alert_text(whose: &str, alert: u64, reason: &str) -> String {
    let remedy = match alert {
        44 => "it was revoked: enrol again with a new token",
        45 => "it expired, or a clock is wrong: check the clocks, then enrol again with a new token",
        48 => "another authority signed it, so the other side belongs to another site: check the address",
        120 => {
            "the other side does not speak this protocol: check address and port, update the older program"
        }
        _ => "check the address, the clocks and the site, then enrol again with a new token",
    };
    format!("{whose} (TLS alert {alert}: {reason}); {remedy}")
}

/// As [`refusal`], where a tunnel said it: its own TLS, or the connection inside.
pub(super) fn refusal_of_tunnel(error: &io::Error) -> Option<String> {
    let inner = error.get_ref()?;
    if let Some(error) = inner.downcast_ref::<quinn::ConnectionError>() {
        return refusal(error);
    }
    match inner.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => {
            let whose = "this machine's certificate is not believed there";
            Some(alert_text(whose, u8::from(*alert).into(), &format!("{alert:?}")))
        }
        error @ rustls::Error::InvalidCertificate(_) => Some(format!(
            "its certificate is not believed here ({error}); check the address, the clocks and the site, then enrol again with a new token"
        )),
        _ => None,
    }
}

/// QUIC carries TLS alerts as transport errors from this code on.
const TLS_ALERTS_FROM: u64 = 0x100;

/// Transport limits. Every field states its cost.
///
/// Measured on loopback, both ends in one process on two shared (busy) cores, AES-128, in CPU seconds per 10^9 bytes
/// of both ends together: packets of 8,900 bytes 0.8 to 1.1 (1 MiB writes) and 1.5 (4 KiB writes); of 6,500 bytes 1.0
/// to 1.6 and 1.6 to 1.8; on a path of 1,500 bytes 2.2 to 3.9, mostly 2.6. Four streams cost what one does. Fewer
/// acknowledgements (the ACK frequency extension, every 10 and 40 packets) changed nothing beyond noise: left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportSettings {
    /// Flow-control window of one stream; memory a peer can make us hold per stream. 16 MiB fill 1 Gbit/s × 100 ms.
    pub stream_window_bytes: u32,
    /// Receive window of a connection: the most a verified peer can make us hold.
    pub receive_window_bytes: u32,
    /// Unacknowledged bytes kept for sending again per connection.
    pub send_window_bytes: u64,
    /// Streams of each direction a verified peer may have open: bounds the table of streams.
    pub streams_max: u32,
    /// A silent connection is given up after this. Shorter finds dead peers sooner and forgives less.
    pub idle_timeout: Duration,
    /// Something is sent at least this often.
    pub keep_alive: Duration,
    /// Largest UDP payload probed for. Fewer, larger packets are the largest saving of CPU there is. 8,900 fits
    /// Ethernet with jumbo frames (9,000 bytes less IP, UDP and tunnel headers); a path that carries less stays at what
    /// it carries, after a few lost probes. Above 6,550 fewer than ten packets go into one offloaded send (see
    /// `socket`), which made no difference beyond noise. Receive buffers grow with it (32 buffers of 64 packets).
    pub udp_payload_bytes_max: u16,
    /// Kernel buffer of the socket in each direction: absorbs bursts while the process is not scheduled.
    pub socket_buffer_bytes: usize,
    /// Handshakes in progress on a listening endpoint; about 20 KiB each.
    pub unfinished_handshakes_max: usize,
    /// A handshake not finished in this time is dropped.
    pub handshake_timeout: Duration,
    /// Connections of verified peers on a listening endpoint, all together.
    pub connections_max: usize,
    /// … and of one agent: it needs one, and a few that died lie about until they are given up. Each may make us hold
    /// a receive window.
    pub connections_per_agent_max: usize,
    /// … and of one process server, which has one for each machine it relays.
    pub connections_per_relay_max: usize,
}

impl Default for TransportSettings {
    fn default() -> Self {
        Self {
            stream_window_bytes: 16 << 20,
            receive_window_bytes: 128 << 20,
            send_window_bytes: 128 << 20,
            // One delta and one bulk stream per disk, one control stream, one to spare.
            streams_max: 2 * DISKS_PER_AGENT_MAX as u32 + 2,
            idle_timeout: Duration::from_secs(5),
            keep_alive: Duration::from_nanos(KEEP_ALIVE_NANOS),
            udp_payload_bytes_max: 8900,
            socket_buffer_bytes: 8 << 20,
            unfinished_handshakes_max: 512,
            handshake_timeout: Duration::from_nanos(HANDSHAKE_NANOS_MAX),
            connections_max: 1024,
            connections_per_agent_max: 8,
            connections_per_relay_max: 512,
        }
    }
}

impl TransportSettings {
    /// What both sides have in common.
    pub(super) fn transport(&self) -> Result<TransportConfig, EndpointError> {
        let idle = self
            .idle_timeout
            .try_into()
            .map_err(|_| EndpointError::Setting { name: "idle_timeout", remedy: "use less than a day" })?;
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.udp_payload_bytes_max);
        let mut config = TransportConfig::default();
        config
            .stream_receive_window(VarInt::from_u32(self.stream_window_bytes))
            .receive_window(VarInt::from_u32(self.receive_window_bytes))
            .send_window(self.send_window_bytes)
            .max_concurrent_bidi_streams(VarInt::from_u32(self.streams_max))
            .max_concurrent_uni_streams(VarInt::from_u32(self.streams_max))
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            .mtu_discovery_config(Some(mtu))
            .datagram_receive_buffer_size(None)
            .enable_segmentation_offload(true);
        Ok(config)
    }

    /// For accepted connections: nothing is allowed until the peer is known; then [`Self::open_up`].
    fn unverified_transport(&self) -> Result<TransportConfig, EndpointError> {
        let mut config = self.transport()?;
        config
            .receive_window(VarInt::from_u32(UNVERIFIED_WINDOW_BYTES))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .max_concurrent_uni_streams(VarInt::from_u32(0));
        Ok(config)
    }

    fn open_up(&self, connection: &Connection) {
        connection.set_receive_window(VarInt::from_u32(self.receive_window_bytes));
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(self.streams_max));
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(self.streams_max));
    }
}

/// Why an endpoint or a connection cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket.
    #[error(
        "cannot {action} {address}: {source}; check that the address is this machine's and that no other program has the port"
    )]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Where.
        address: SocketAddr,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A transport setting out of range.
    #[error("setting `{name}` is out of range; {remedy}")]
    Setting {
        /// The field.
        name: &'static str,
        /// What to write.
        remedy: &'static str,
    },
    /// The TLS configuration has no cipher QUIC can start with.
    #[error("the TLS configuration lacks AES-128-GCM, which QUIC starts with")]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// Dialling was refused locally.
    #[error("cannot dial {address}: {source}")]
    Dial {
        /// Whom.
        address: SocketAddr,
        /// Why.
        #[source]
        source: quinn::ConnectError,
    },
    /// The connection was not established, or was lost.
    #[error("no connection with {address}: {source}")]
    Connection {
        /// With whom.
        address: SocketAddr,
        /// Why.
        #[source]
        source: quinn::ConnectionError,
    },
    /// Nobody finished the handshake in time, and there is no way over TCP.
    #[error(
        "no connection with {address}: no answer in time over UDP; over TCP: {tcp}; check address, port and firewall"
    )]
    TimedOut {
        /// Whom.
        address: SocketAddr,
        /// Why not over TCP.
        tcp: String,
        /// What the other side, or this one, thinks of the other's certificate, where that is why.
        refusal: Option<String>,
    },
    /// The other side has no certificate that can be read (cannot happen after a verified handshake).
    #[error("no connection with {0}: it showed no certificate")]
    Unidentified(SocketAddr),
}

impl EndpointError {
    /// As [`refusal`], for an attempt to connect.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        match self {
            Self::Connection { source, .. } => refusal(source),
            Self::TimedOut { refusal, .. } => refusal.clone(),
            _ => None,
        }
    }
}

impl Answer for EndpointError {
    fn severity(&self) -> Severity {
        match self {
            Self::Connection { .. } | Self::TimedOut { .. } => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

/// A connection with a peer that is believed. Cloning shares the connection.
#[derive(Clone, Debug)]
pub struct PeerConnection {
    /// The connection; it is closed by itself when the peer is revoked or its certificate expires.
    pub connection: Connection,
    /// The peer, verified in the handshake.
    pub peer: Arc<PeerIdentity>,
}

impl PeerConnection {
    /// As [`refusal`], for a connection that is over.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        refusal(&self.connection.close_reason()?)
    }

    /// How its packets travel.
    #[must_use]
    pub fn way(&self) -> Way {
        tunnel::way(self.connection.remote_address())
    }

    /// Where the peer is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        tunnel::unmarked(self.connection.remote_address())
    }

    /// The same for people, with the way where it is not the usual one.
    #[must_use]
    pub fn place(&self) -> String {
        match self.way() {
            Way::Udp => self.address().to_string(),
            Way::Tcp => format!("{} over TCP", self.address()),
        }
    }
}

/// What a listening endpoint hands over.
#[derive(Debug)]
pub enum Accepted {
    /// A data connection.
    Peer(PeerConnection),
    /// An enrolment, or a renewal when the client showed its present certificate. It may open one stream.
    Enrolment {
        /// The connection.
        connection: Connection,
        /// Who renews.
        peer: Option<PeerIdentity>,
    },
}

/// A listening endpoint.
#[derive(Debug)]
pub struct Server {
    endpoint: quinn::Endpoint,
    tunnels: tunnel::Listening,
    settings: TransportSettings,
    accepted: Mutex<mpsc::Receiver<Accepted>>,
}

/// Listens on `address` (port 0: any free one). Must be called inside a tokio runtime.
///
/// # Errors
/// When the address cannot be had or a setting is out of range.
pub fn bind_server(
    address: SocketAddr,
    tls: rustls::ServerConfig,
    revocations: Arc<Revocations>,
    settings: TransportSettings,
) -> Result<Server, EndpointError> {
    let config = quic_server_config(tls.clone(), &settings)?;
    let error = |action, source| EndpointError::Socket { action, address, source };
    let (udp, tcp) = both_sockets(address, &settings)?;
    let (socket, tunnels) = tunnel::listen(tcp, udp, tls, &settings, Arc::clone(&revocations))
        .map_err(|source| error("use TCP", source))?;
    let endpoint = endpoint(socket, Some(config), &settings)?.map_err(|source| error("use UDP", source))?;
    let (deliver, accepted) = mpsc::channel(ACCEPTED_MAX);
    let gate = Gate {
        endpoint: endpoint.clone(),
        believed: Arc::new(Believed::default()),
        slots: Arc::new(Semaphore::new(settings.unfinished_handshakes_max)),
        settings: settings.clone(),
        revocations,
        deliver,
    };
    tokio::spawn(accept_all(gate));
    Ok(Server { endpoint, tunnels, settings, accepted: Mutex::new(accepted) })
}

impl Server {
    /// The next connection; `None` after [`Self::close`]. Safe to drop at the await.
    pub async fn accept(&self) -> Option<Accepted> {
        self.accepted.lock().await.recv().await
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Uses another TLS configuration for connections from now on: after the own certificate was renewed.
    ///
    /// # Errors
    /// When QUIC cannot use it; the old one stays.
    pub fn replace_tls(&self, tls: rustls::ServerConfig) -> Result<(), EndpointError> {
        self.endpoint.set_server_config(Some(quic_server_config(tls.clone(), &self.settings)?));
        self.tunnels.replace_tls(tls);
        Ok(())
    }

    /// Accepts nothing more, closes every connection, and waits until the peers know.
    pub async fn close(&self) {
        self.endpoint.close(VarInt::from_u32(CloseCode::ShuttingDown.code()), b"shutting down");
        self.endpoint.wait_idle().await;
    }

    /// Connections that exist, finished handshake or not.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.endpoint.open_connections()
    }
}

fn quic_server_config(
    tls: rustls::ServerConfig,
    settings: &TransportSettings,
) -> Result<quinn::ServerConfig, EndpointError> {
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config
        .transport_config(Arc::new(settings.unverified_transport()?))
        // What waits for a decision of ours is little: the gate decides at once.
        .max_incoming(settings.unfinished_handshakes_max)
        .incoming_buffer_size(16 << 10)
        .incoming_buffer_size_total(4 << 20)
        .migration(true);
    Ok(config)
}

/// Whether [`bind_server`] could have an address.
///
/// # Errors
/// Why not, with the protocol.
pub fn both_free(address: SocketAddr) -> io::Result<()> {
    let named =
        |protocol| move |error: io::Error| io::Error::new(error.kind(), format!("{protocol}: {error}"));
    let udp = std::net::UdpSocket::bind(address).map_err(named("UDP"))?;
    std::net::TcpListener::bind(udp.local_addr()?).map_err(named("TCP"))?;
    Ok(())
}

/// Attempts to find a port that is free for both protocols, where any may be had.
const PORT_TRIES: usize = 32;

/// A UDP socket, and a TCP listener on the same port.
fn both_sockets(
    address: SocketAddr,
    settings: &TransportSettings,
) -> Result<(Arc<dyn AsyncUdpSocket>, std::net::TcpListener), EndpointError> {
    let error = |action, source| EndpointError::Socket { action, address, source };
    let mut tries = 0;
    loop {
        let udp = bind(address, settings).map_err(|source| error("listen on UDP", source))?;
        let local = udp.local_addr().map_err(|source| error("use UDP", source))?;
        tries += 1;
        match std::net::TcpListener::bind(local) {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(_) if address.port() == 0 && tries < PORT_TRIES => {}
            Err(source) => return Err(error("listen on TCP", source)),
        }
    }
}

pub(super) fn bind(address: SocketAddr, settings: &TransportSettings) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    socket::bind(address, settings.socket_buffer_bytes, settings.udp_payload_bytes_max)
}

/// What both kinds of socket have in common.
pub(super) fn endpoint_config(settings: &TransportSettings) -> Result<EndpointConfig, EndpointError> {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(settings.udp_payload_bytes_max)
        .map_err(|_| EndpointError::Setting { name: "udp_payload_bytes_max", remedy: "use 1200 to 65527" })?;
    Ok(config)
}

pub(super) fn endpoint(
    socket: Arc<dyn AsyncUdpSocket>,
    server: Option<quinn::ServerConfig>,
    settings: &TransportSettings,
) -> Result<io::Result<quinn::Endpoint>, EndpointError> {
    let (config, runtime) = (endpoint_config(settings)?, Arc::new(quinn::TokioRuntime));
    Ok(quinn::Endpoint::new_with_abstract_socket(config, server, socket, runtime))
}

/// Live connections of verified peers, by peer.
#[derive(Debug, Default)]
pub(super) struct Believed(std::sync::Mutex<HashMap<PeerId, usize>>);

impl Believed {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PeerId, usize>> {
        // A panic elsewhere leaves whole counts.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn count(&self) -> usize {
        self.lock().values().sum()
    }

    /// Counts one more of `peer`, unless that is too many.
    pub(super) fn enter(&self, peer: &PeerIdentity, settings: &TransportSettings) -> bool {
        let most = match peer.role {
            Role::Agent => settings.connections_per_agent_max,
            Role::ProcessServer => settings.connections_per_relay_max,
            Role::MasterTarget => settings.connections_max,
        };
        let mut peers = self.lock();
        let own = peers.get(&peer.peer).copied().unwrap_or(0);
        if own >= most || peers.values().sum::<usize>() >= settings.connections_max {
            return false;
        }
        peers.insert(peer.peer, own + 1);
        true
    }

    pub(super) fn leave(&self, peer: PeerId) {
        let mut peers = self.lock();
        match peers.get_mut(&peer) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(peers.remove(&peer)),
        }
    }
}

/// Decides about incoming connections.
#[derive(Clone)]
struct Gate {
    endpoint: quinn::Endpoint,
    believed: Arc<Believed>,
    slots: Arc<Semaphore>,
    settings: TransportSettings,
    revocations: Arc<Revocations>,
    deliver: mpsc::Sender<Accepted>,
}

async fn accept_all(gate: Gate) {
    loop {
        let incoming = tokio::select! {
            incoming = gate.endpoint.accept() => incoming,
            () = gate.deliver.closed() => None,
        };
        let Some(incoming) = incoming else { return };
        if let Some((incoming, slot)) = gate.admit(incoming) {
            tokio::spawn(gate.clone().handshake(incoming, slot));
        }
    }
}

impl Gate {
    /// Half of the slots are for anyone; beyond, a sender must first prove that it receives what we send it (retry);
    /// when all are taken it is refused. Neither answer leaves any state here. A handshake that its client cancels
    /// frees its slot at once, but quinn keeps the connection for a few round trips: those count too.
    fn admit(&self, incoming: Incoming) -> Option<(Incoming, OwnedSemaphorePermit)> {
        let max = self.settings.unfinished_handshakes_max;
        let kept = self.endpoint.open_connections().saturating_sub(self.believed.count());
        let doubtful = kept.max(max - self.slots.available_permits().min(max));
        let under_load = doubtful >= max / 2;
        // Who comes through a tunnel has shown that it is where it says; a retry's token knows no tunnels.
        let is_over_udp = tunnel::way(incoming.remote_address()) == Way::Udp;
        if under_load && is_over_udp && !incoming.remote_address_validated() && incoming.may_retry() {
            if let Err(error) = incoming.retry() {
                error.into_incoming().refuse();
            }
            return None;
        }
        match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(slot) if doubtful < max => Some((incoming, slot)),
            _ => {
                incoming.refuse();
                None
            }
        }
    }

    /// The slot is held until the daemon has taken the connection, so a slow daemon slows dialling down.
    async fn handshake(self, incoming: Incoming, slot: OwnedSemaphorePermit) {
        let address = tunnel::unmarked(incoming.remote_address());
        let Ok(connecting) = incoming.accept() else { return };
        let connection = match tokio::time::timeout(self.settings.handshake_timeout, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                tracing::debug!(%address, %error, "handshake failed");
                return;
            }
            Err(_) => {
                tracing::debug!(%address, "handshake not finished in time");
                return;
            }
        };
        if let Some(accepted) = self.classify(connection)
            && let Err(unwanted) = self.deliver.send(accepted).await
        {
            let (Accepted::Peer(PeerConnection { connection, .. }) | Accepted::Enrolment { connection, .. }) =
                unwanted.0;
            CloseCode::ShuttingDown.close(&connection);
        }
        drop(slot);
    }

    fn classify(&self, connection: Connection) -> Option<Accepted> {
        let peer = peer_identity(&connection);
        match protocol(&connection).as_deref() {
            Some(ALPN_DATA) => {
                let Some(peer) = peer else {
                    CloseCode::NoCertificate.close(&connection);
                    return None;
                };
                if !self.believed.enter(&peer, &self.settings) {
                    tracing::warn!(peer = %peer.peer, role = %peer.role, "too many connections: refused");
                    CloseCode::Busy.close(&connection);
                    return None;
                }
                self.settings.open_up(&connection);
                let (ended, believed, id) = (connection.clone(), Arc::clone(&self.believed), peer.peer);
                tokio::spawn(async move {
                    ended.closed().await;
                    believed.leave(id);
                });
                Some(Accepted::Peer(believe(connection, peer, &self.revocations)))
            }
            Some(ALPN_ENROLL) => {
                connection.set_max_concurrent_bi_streams(VarInt::from_u32(1));
                Some(Accepted::Enrolment { connection, peer })
            }
            _ => {
                CloseCode::Violation.close(&connection);
                None
            }
        }
    }
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// The chain the other side showed; the handshake verified it.
pub(crate) fn peer_chain(connection: &Connection) -> Option<Vec<CertificateDer<'static>>> {
    connection.peer_identity()?.downcast().ok().map(|chain| *chain)
}

pub(super) fn peer_identity(connection: &Connection) -> Option<PeerIdentity> {
    PeerIdentity::from_certificate(peer_chain(connection)?.first()?).ok()
}

/// Binds a verified connection to its peer's standing.
pub(super) fn believe(
    connection: Connection,
    peer: PeerIdentity,
    revocations: &Arc<Revocations>,
) -> PeerConnection {
    let peer = Arc::new(peer);
    tokio::spawn(watch(connection.clone(), Arc::clone(&peer), Arc::clone(revocations)));
    PeerConnection { connection, peer }
}

/// Ends with the connection, or ends it.
async fn watch(connection: Connection, peer: Arc<PeerIdentity>, revocations: Arc<Revocations>) {
    tokio::select! {
        _ = connection.closed() => {}
        () = revocations.revoked(&peer) => {
            tracing::warn!(peer = %peer.peer, role = %peer.role, "peer was revoked: connection closed");
            CloseCode::Revoked.close(&connection);
        }
        () = expired(&peer) => {
            tracing::warn!(peer = %peer.peer, role = %peer.role, "peer's certificate expired: connection closed");
            CloseCode::Expired.close(&connection);
        }
    }
}

async fn expired(peer: &PeerIdentity) {
    loop {
        let left = peer.not_after.0.saturating_sub(wall_clock().0);
        if left == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_nanos(left).min(EXPIRY_CHECK_MAX)).await;
    }
}
