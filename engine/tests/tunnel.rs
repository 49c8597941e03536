//! Connections through a TCP tunnel, where UDP does not get through: chosen by themselves, believed by the same rules, over
//! when the tunnel is, and nothing that comes through the TCP port hurts others.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "tls_matrix/support.rs"]
mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{EndpointError, PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::enroll;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::invitations::{INVITATION_LIFETIME_DEFAULT, Invite};
use reprotect_engine::net::revocations::Revocation;
use reprotect_engine::net::trust::PeerRule;
use reprotect_engine::net::tunnel::Way;
use reprotect_engine::net::{tls, wall_clock};
use support::{Daemon, Site, dialer, echoes, loopback};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A way to a daemon on which UDP is dropped, and TCP until it is cut.
struct Firewall {
    address: SocketAddr,
    /// Bound, never read.
    _udp: UdpSocket,
    cut: tokio::sync::watch::Sender<bool>,
    /// Nothing is passed on any more, and nothing said about it.
    holds: Arc<AtomicBool>,
}

impl Firewall {
    async fn before(daemon: SocketAddr) -> Self {
        let (udp, listener) = loop {
            let udp = UdpSocket::bind(loopback()).await.unwrap();
            if let Ok(listener) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, listener);
            }
        };
        let (cut, is_cut) = tokio::sync::watch::channel(false);
        let holds = Arc::new(AtomicBool::new(false));
        let address = listener.local_addr().unwrap();
        let held = Arc::clone(&holds);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(daemon).await.unwrap();
                let (near, far) = (near.into_split(), far.into_split());
                let mut is_cut = is_cut.clone();
                let (held, held_too) = (Arc::clone(&held), Arc::clone(&held));
                tokio::spawn(async move {
                    tokio::select! {
                        () = pass(near.0, far.1, held) => {}
                        () = pass(far.0, near.1, held_too) => {}
                        _ = is_cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Self { address, _udp: udp, cut, holds }
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    holds: Arc<AtomicBool>,
) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        while holds.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

fn relay(site: &Site) -> Daemon {
    site.daemon(Role::ProcessServer, &[Role::Agent])
}

async fn dial(
    site: &Site,
    dialer: &Dialer,
    identity: &Identity,
    daemon: &Daemon,
    address: SocketAddr,
) -> Result<PeerConnection, EndpointError> {
    let rule = PeerRule::of_site("berlin", &[Role::ProcessServer, Role::MasterTarget]).only(daemon.peer);
    let tls = tls::client_config(identity, Arc::clone(&site.trust), rule).unwrap();
    dialer.connect(address, tls, Some(daemon.peer), &site.revocations).await
}

#[tokio::test]
async fn where_udp_gets_through_it_is_used() {
    let site = Site::new();
    let daemon = relay(&site);
    let agent = site.identity(Role::Agent);
    let peer = dial(&site, &dialer(), &agent, &daemon, daemon.address).await.unwrap();
    assert_eq!((peer.way(), peer.address()), (Way::Udp, daemon.address));
    assert_eq!(peer.place(), daemon.address.to_string());
    assert!(echoes(&peer.connection).await);
}

#[tokio::test]
async fn where_udp_is_dropped_everything_goes_over_tcp() {
    let site = Site::new();
    let daemon = relay(&site);
    let firewall = Firewall::before(daemon.address).await;
    let (agent, dialer) = (site.identity(Role::Agent), dialer());
    for _ in 0..2 {
        let peer = dial(&site, &dialer, &agent, &daemon, firewall.address).await.unwrap();
        assert_eq!((peer.way(), peer.address()), (Way::Tcp, firewall.address));
        assert_eq!(peer.place(), format!("{} over TCP", firewall.address));
        assert_eq!(peer.peer.peer, daemon.peer);
        assert!(echoes(&peer.connection).await);
        // More than what waits in any queue, on several streams at once.
        let talks: Vec<_> = (0..4_u8).map(|fill| tokio::spawn(talk(peer.connection.clone(), fill))).collect();
        for talk in talks {
            tokio::time::timeout(PATIENCE, talk).await.unwrap().unwrap();
        }
    }
    let seen: Vec<_> = daemon.seen().iter().map(|peer| peer.peer).collect();
    assert_eq!(seen, [agent.own().peer; 2], "as whom the certificate names");
    // What was cut leaves nothing behind, here and there.
    dialer.close().await;
    let until = tokio::time::Instant::now() + PATIENCE;
    while daemon.open_connections() > 0 {
        assert!(tokio::time::Instant::now() < until, "connections outlive their dialler");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A mebibyte there and back, eight times.
async fn talk(connection: quinn::Connection, fill: u8) {
    let sent = vec![fill; 1 << 20];
    for _ in 0..8 {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&sent).await.unwrap();
        send.finish().unwrap();
        assert!(receive.read_to_end(1 << 20).await.unwrap() == sent, "stream {fill}");
    }
}

#[tokio::test]
async fn a_connection_is_over_as_soon_as_its_tunnel_is_cut_and_the_next_one_comes_about() {
    let site = Site::new();
    let daemon = relay(&site);
    let firewall = Firewall::before(daemon.address).await;
    let (agent, dialer) = (site.identity(Role::Agent), dialer());
    let peer = dial(&site, &dialer, &agent, &daemon, firewall.address).await.unwrap();
    assert!(echoes(&peer.connection).await);
    firewall.cut.send(true).unwrap();
    // By the tunnel's end, not by silence: that would be an idle timeout.
    let why = tokio::time::timeout(PATIENCE, peer.connection.closed()).await.unwrap();
    assert!(!matches!(why, quinn::ConnectionError::TimedOut), "{why}");
    firewall.cut.send(false).unwrap();
    let peer = dial(&site, &dialer, &agent, &daemon, firewall.address).await.unwrap();
    assert!(echoes(&peer.connection).await);
    // UDP is always tried, too: where it gets through again it is used.
    let direct = dial(&site, &dialer, &agent, &daemon, daemon.address).await.unwrap();
    assert_eq!(direct.way(), Way::Udp);
}

#[tokio::test]
async fn a_tunnel_in_which_nothing_moves_ends_its_connection_at_both_ends() {
    let site = Site::new();
    let daemon = relay(&site);
    let firewall = Firewall::before(daemon.address).await;
    let agent = site.identity(Role::Agent);
    let settings = TransportSettings { idle_timeout: Duration::from_secs(1), ..TransportSettings::default() };
    let dialer = Dialer::bind(loopback(), settings).unwrap();
    let peer = dial(&site, &dialer, &agent, &daemon, firewall.address).await.unwrap();
    assert!(echoes(&peer.connection).await);
    firewall.holds.store(true, Ordering::Relaxed);
    tokio::time::timeout(PATIENCE, peer.connection.closed()).await.unwrap();
    let until = tokio::time::Instant::now() + PATIENCE;
    while daemon.open_connections() > 0 {
        assert!(tokio::time::Instant::now() < until, "the daemon keeps a dead connection");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn whoever_is_refused_over_tcp_learns_why_as_over_udp() {
    let site = Site::new();
    let daemon = relay(&site);
    let firewall = Firewall::before(daemon.address).await;
    let dialer = dialer();
    // Revoked while it was connected, and before.
    let agent = site.identity(Role::Agent);
    let peer = dial(&site, &dialer, &agent, &daemon, firewall.address).await.unwrap();
    assert!(echoes(&peer.connection).await);
    site.revocations.revoke(Revocation::Peer(agent.own().peer)).unwrap();
    tokio::time::timeout(PATIENCE, peer.connection.closed()).await.unwrap();
    assert!(peer.refusal().is_some_and(|text| text.contains("revoked")), "{:?}", peer.refusal());
    let refused = dial(&site, &dialer, &agent, &daemon, firewall.address).await;
    let text = match refused {
        Err(error) => error.refusal(),
        // TLS 1.3 lets the client finish first.
        Ok(peer) => {
            tokio::time::timeout(PATIENCE, peer.connection.closed()).await.unwrap();
            peer.refusal()
        }
    };
    assert!(text.as_ref().is_some_and(|text| text.contains("enrol")), "{text:?}");
    // Another site, and another machine than the one that was meant.
    let other = Site::new();
    let error =
        dial(&other, &dialer, &other.identity(Role::Agent), &daemon, firewall.address).await.unwrap_err();
    assert!(error.refusal().is_some(), "{error}");
    let other = relay(&site);
    let error =
        dial(&site, &dialer, &site.identity(Role::Agent), &other, firewall.address).await.unwrap_err();
    assert!(error.refusal().is_some(), "{error}");
    assert_eq!(daemon.seen().len(), 1, "nobody else was let in");
}

#[tokio::test]
async fn where_nobody_listens_the_error_names_both_ways() {
    let site = Site::new();
    let daemon = relay(&site);
    let udp = UdpSocket::bind(loopback()).await.unwrap();
    let address = udp.local_addr().unwrap();
    let settings =
        TransportSettings { handshake_timeout: Duration::from_secs(2), ..TransportSettings::default() };
    let dialer = Dialer::bind(loopback(), settings).unwrap();
    let agent = site.identity(Role::Agent);
    let error = dial(&site, &dialer, &agent, &daemon, address).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("over UDP") && text.contains("over TCP: Connection refused"), "{text}");
    assert!(error.refusal().is_none());
}

#[tokio::test]
async fn a_machine_enrols_over_tcp() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let firewall = Firewall::before(daemon.address).await;
    let invite = Invite {
        role: Role::Agent,
        lifetime: INVITATION_LIFETIME_DEFAULT,
        target: daemon.peer,
        ca_key_sha256: site.ca.key_sha256().unwrap(),
        addresses: vec![firewall.address.to_string()],
    };
    let (_, token) = site.invitations.create(invite, wall_clock()).unwrap();
    let identity = enroll(&token, Role::Agent, "web-01", &site.state_dir("agent")).await.unwrap();
    let peer = dial(&site, &dialer(), &identity, &daemon, firewall.address).await.unwrap();
    assert!(peer.way() == Way::Tcp && echoes(&peer.connection).await);
}

/// Whatever is sent to the TCP port, those with a certificate are served, on either way.
#[tokio::test]
async fn strangers_at_the_tcp_port_keep_nobody_out() {
    let site = Site::new();
    let daemon = site.daemon_limited(Role::ProcessServer, &[Role::Agent], 8);
    let firewall = Firewall::before(daemon.address).await;
    let mut silent = Vec::new();
    for number in 0..16 {
        let mut stream = TcpStream::connect(daemon.address).await.unwrap();
        match number % 3 {
            0 => {}
            1 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap(),
            // The beginning of a TLS record that never ends.
            _ => stream.write_all(&[22, 3, 1, 64, 0]).await.unwrap(),
        }
        silent.push(stream);
    }
    let agent = site.identity(Role::Agent);
    let peer = dial(&site, &dialer(), &agent, &daemon, daemon.address).await.unwrap();
    assert!(peer.way() == Way::Udp && echoes(&peer.connection).await);
    let peer = dial(&site, &dialer(), &agent, &daemon, firewall.address).await.unwrap();
    assert!(peer.way() == Way::Tcp && echoes(&peer.connection).await);
    drop(silent);
}

/// Longer than any test: what ends sooner was ended.
fn patient() -> TransportSettings {
    TransportSettings { idle_timeout: Duration::from_secs(600), ..TransportSettings::default() }
}

/// The outer TLS connection of a tunnel, and nothing in it; `None` shows no certificate.
async fn bare_tunnel(
    site: &Site,
    identity: Option<&Identity>,
    daemon: &Daemon,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let rule = PeerRule::of_site("berlin", &[Role::ProcessServer]);
    let mut config = match identity {
        Some(identity) => tls::client_config(identity, Arc::clone(&site.trust), rule).unwrap(),
        None => tls::enrolment_config(site.ca.key_sha256().unwrap(), rule).unwrap(),
    };
    config.alpn_protocols = vec![b"reprotect-tunnel/1".to_vec()];
    let name = rustls_pki_types::ServerName::try_from("any.reprotect.internal").unwrap();
    let stream = TcpStream::connect(daemon.address).await?;
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Waits for the end of a tunnel into which nothing is written any more.
async fn is_ended(mut stream: tokio_rustls::client::TlsStream<TcpStream>) {
    let mut answer = Vec::new();
    // With an error or without.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it goes on");
    assert!(answer.is_empty(), "{answer:?}");
}

/// With a good certificate somebody sends what is no packet: that tunnel ends, no other.
#[tokio::test]
async fn garbage_in_a_tunnel_ends_that_tunnel_alone() {
    let site = Site::new();
    let daemon = site.daemon_set(&[Role::Agent], patient());
    let firewall = Firewall::before(daemon.address).await;
    let agent = site.identity(Role::Agent);
    let kept = dial(&site, &dialer(), &agent, &daemon, firewall.address).await.unwrap();
    for garbage in [&[0, 0][..], &[255, 255, 1, 2, 3], &[0, 3, 1, 2, 3, 35, 40]] {
        let mut stream = bare_tunnel(&site, Some(&agent), &daemon).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        is_ended(stream).await;
    }
    assert!(echoes(&kept.connection).await);
}

#[tokio::test]
async fn a_peer_has_as_many_tunnels_as_connections_and_none_once_it_is_revoked() {
    let site = Site::new();
    let daemon =
        site.daemon_set(&[Role::Agent], TransportSettings { connections_per_agent_max: 2, ..patient() });
    let (greedy, other) = (site.identity(Role::Agent), site.identity(Role::Agent));
    let first = bare_tunnel(&site, Some(&greedy), &daemon).await.unwrap();
    let second = bare_tunnel(&site, Some(&greedy), &daemon).await.unwrap();
    is_ended(bare_tunnel(&site, Some(&greedy), &daemon).await.unwrap()).await;
    let firewall = Firewall::before(daemon.address).await;
    let peer = dial(&site, &dialer(), &other, &daemon, firewall.address).await.unwrap();
    site.revocations.revoke(Revocation::Peer(greedy.own().peer)).unwrap();
    is_ended(first).await;
    is_ended(second).await;
    assert!(echoes(&peer.connection).await);
}

#[tokio::test]
async fn where_nobody_enrols_nobody_gets_a_tunnel_without_a_certificate() {
    let site = Site::new();
    let daemon = site.daemon_set(&[Role::Agent], patient());
    is_ended(bare_tunnel(&site, None, &daemon).await.unwrap()).await;
}

/// Where many handshakes are not finished, whoever dials over UDP is first asked to show that it is where it says. Over TCP it
/// has shown that.
#[tokio::test]
async fn tunnels_come_about_also_under_load() {
    let site = Site::new();
    let settings = TransportSettings { unfinished_handshakes_max: 2, ..TransportSettings::default() };
    let daemon = site.daemon_set(&[Role::Agent], settings);
    // What the daemon answers to this one never arrives.
    let (front, back) =
        (UdpSocket::bind(loopback()).await.unwrap(), UdpSocket::bind(loopback()).await.unwrap());
    let (one_way, server) = (front.local_addr().unwrap(), daemon.address);
    tokio::spawn(async move {
        let mut packet = vec![0; 1 << 16];
        while let Ok((len, _)) = front.recv_from(&mut packet).await {
            let _ = back.send_to(&packet[..len], server).await;
        }
    });
    let agent = site.identity(Role::Agent);
    let stuck_dialer = dialer();
    let stuck = dial(&site, &stuck_dialer, &agent, &daemon, one_way);
    let firewall = Firewall::before(daemon.address).await;
    let tunnelled = async {
        while daemon.open_connections() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let peer = dial(&site, &dialer(), &agent, &daemon, firewall.address).await.unwrap();
        assert!(peer.way() == Way::Tcp && echoes(&peer.connection).await);
    };
    tokio::select! {
        _ = stuck => panic!("it was answered"),
        () = tunnelled => {}
    }
}
