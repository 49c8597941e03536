//! The transport's negative matrix, row by row: who must not get in, does not, and whoever may, still does.
//!
//! Everything runs in this process on 127.0.0.1 with free ports. Attackers are hand-made rustls and quinn clients
//! that believe anything and show what they like; the defenders are the real configurations and endpoints.
//! Invariant of each negative row: the server never hands the connection to its daemon.

#![expect(clippy::unwrap_used, reason = "a failed step of a helper is a failed test")]

#[path = "tls_matrix/support.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use quinn::{ConnectionError, TransportErrorCode};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, SanType};
use reprotect_engine::net::ca::{Ca, Validity};
use reprotect_engine::net::endpoint::{CloseCode, EndpointError};
use reprotect_engine::net::identity::{self, Identity, PendingIdentity, Role};
use reprotect_engine::net::revocations::Revocation;
use reprotect_engine::net::trust::PeerRule;
use reprotect_engine::net::{ALPN_DATA, tls, wall_clock};
use reprotect_engine::units::{PeerId, Timestamp};
use support::*;

/// TLS alerts, as QUIC carries them.
const BAD_CERTIFICATE: u8 = 42;
const UNSUPPORTED_CERTIFICATE: u8 = 43;
const CERTIFICATE_REVOKED: u8 = 44;
const CERTIFICATE_EXPIRED: u8 = 45;
const CERTIFICATE_UNKNOWN: u8 = 46;
const UNKNOWN_CA: u8 = 48;
const ACCESS_DENIED: u8 = 49;
const NO_APPLICATION_PROTOCOL: u8 = 120;

// ---- positive rows -------------------------------------------------------------------------------------------------

#[tokio::test]
async fn every_allowed_pair_of_roles_talks() {
    let site = Site::new();
    for (client, server) in [
        (Role::Agent, Role::ProcessServer),
        (Role::Agent, Role::MasterTarget),
        (Role::ProcessServer, Role::MasterTarget),
        (Role::ProcessServer, Role::ProcessServer),
    ] {
        let daemon = site.daemon(server, &[client]);
        let identity = site.identity(client);
        let connection = site.dial(&identity, &daemon).await.unwrap();
        assert_eq!((connection.peer.role, connection.peer.peer), (server, daemon.peer));
        assert!(echoes(&connection.connection).await, "{client} to {server}");
        let seen = daemon.seen();
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].role, seen[0].peer), (client, identity.own().peer));
    }
}

#[tokio::test]
async fn a_sites_own_pki_works_with_names_in_uris_only() {
    let site = Site::new();
    let foreign = ForeignPki::new();
    let target = foreign.identity(Role::MasterTarget, PeerId([0x31; 16]));
    let agent = foreign.identity(Role::Agent, PeerId([0x32; 16]));
    let trust = foreign.trust();
    let daemon = site.daemon_with(&target, Arc::clone(&trust), &[Role::Agent]);
    let rule = PeerRule::of_site("berlin", &[Role::MasterTarget]).only(PeerId([0x31; 16]));
    let tls = tls::client_config(&agent, trust, rule).unwrap();
    let connection = dialer().connect(daemon.address, tls, None, &site.revocations).await.unwrap();
    assert!(echoes(&connection.connection).await);
}

// ---- what the server refuses ---------------------------------------------------------------------------------------

#[tokio::test]
async fn a_client_without_certificate_is_dropped_before_it_can_open_a_stream() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let attacker = Attacker::anonymous(&[ALPN_DATA]);
    let connection = attacker.connect(daemon.address).await.unwrap();
    let (streams, closed) = tokio::join!(connection.open_bi(), connection.closed());
    assert!(streams.is_err(), "no stream is ever allowed");
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::NoCertificate));
    daemon.still_serves_and_saw_none(&site).await;
}

#[tokio::test]
async fn a_self_signed_certificate_is_refused() {
    let site = Site::new();
    let key = KeyPair::generate().unwrap();
    let certificate = leaf_params("berlin", Role::Agent, PeerId([7; 16])).self_signed(&key).unwrap();
    site.refuses_client(vec![certificate.into()], &key, UNKNOWN_CA).await;
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_even_with_the_same_names() {
    let site = Site::new();
    let dir = tempfile::tempdir().unwrap();
    let other = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
    let identity = other.issue_identity(Role::Agent, PeerId([7; 16]), wall_clock()).unwrap();
    site.refuses(&identity, UNKNOWN_CA).await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let site = Site::new();
    let now = wall_clock().0;
    let validity =
        Validity { not_before: Timestamp(now - 20 * SECOND), not_after: Timestamp(now - 10 * SECOND) };
    site.refuses(&site.identity_valid(Role::Agent, validity), CERTIFICATE_EXPIRED).await;
}

#[tokio::test]
async fn a_certificate_of_the_future_is_refused() {
    let site = Site::new();
    let now = wall_clock().0;
    let validity =
        Validity { not_before: Timestamp(now + 3600 * SECOND), not_after: Timestamp(now + 7200 * SECOND) };
    site.refuses(&site.identity_valid(Role::Agent, validity), CERTIFICATE_EXPIRED).await;
}

#[tokio::test]
async fn a_certificate_for_another_usage_or_for_none_is_refused() {
    let site = Site::new();
    for usages in [
        vec![ExtendedKeyUsagePurpose::ServerAuth],
        vec![ExtendedKeyUsagePurpose::CodeSigning],
        vec![ExtendedKeyUsagePurpose::Any],
        vec![],
    ] {
        let (chain, key) = site.mint(|params| params.extended_key_usages = usages.clone());
        site.refuses_client(chain, &key, UNSUPPORTED_CERTIFICATE).await;
    }
}

#[tokio::test]
async fn a_ca_certificate_or_one_without_or_with_two_names_is_no_client() {
    let site = Site::new();
    let (chain, key) = site.mint(|params| params.subject_alt_names.clear());
    site.refuses_client(chain, &key, CERTIFICATE_UNKNOWN).await;
    let second = identity::uri("berlin", Role::MasterTarget, PeerId([8; 16]));
    let (chain, key) =
        site.mint(|params| params.subject_alt_names.push(SanType::URI(second.clone().try_into().unwrap())));
    site.refuses_client(chain, &key, CERTIFICATE_UNKNOWN).await;
    let (chain, key) =
        site.mint(|params| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    site.refuses_client(chain, &key, CERTIFICATE_UNKNOWN).await;
}

#[tokio::test]
async fn a_leaf_cannot_issue_certificates() {
    let site = Site::new();
    let (agent_chain, agent_key) = site.mint(|_| {});
    let issuer = rcgen::Issuer::from_ca_cert_der(&agent_chain[0], &agent_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let forged = leaf_params("berlin", Role::MasterTarget, PeerId([9; 16])).signed_by(&key, &issuer).unwrap();
    let chain = vec![forged.into(), agent_chain[0].clone(), site.ca.certificate().clone()];
    let daemon = site.daemon(Role::MasterTarget, Role::ALL);
    let closed = Attacker::showing(chain, &key, &[ALPN_DATA]).closed_by(daemon.address).await;
    assert!(alert(&closed).is_some(), "{closed}");
    daemon.still_serves_and_saw_none(&site).await;
}

#[tokio::test]
async fn a_role_that_may_not_dial_here_is_refused() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::ProcessServer]);
    let agent = site.identity(Role::Agent);
    assert_eq!(refusal_of(&site, &agent, &daemon).await, Some(ACCESS_DENIED));
    assert!(daemon.seen().is_empty());
}

#[tokio::test]
async fn a_peer_of_another_site_under_the_same_ca_is_refused() {
    let site = Site::new();
    let elsewhere = identity::uri("hamburg", Role::Agent, PeerId([7; 16]));
    let (chain, key) = site
        .mint(|params| params.subject_alt_names = vec![SanType::URI(elsewhere.clone().try_into().unwrap())]);
    site.refuses_client(chain, &key, CERTIFICATE_UNKNOWN).await;
}

#[tokio::test]
async fn a_stolen_certificate_without_its_key_is_useless() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let victim = site.identity(Role::Agent);
    let thief = KeyPair::generate().unwrap();
    let closed =
        Attacker::showing(victim.chain().to_vec(), &thief, &[ALPN_DATA]).closed_by(daemon.address).await;
    assert_eq!(alert(&closed), Some(51), "the handshake signature does not fit: {closed}");
    daemon.still_serves_and_saw_none(&site).await;
}

#[tokio::test]
async fn an_oversized_chain_is_refused() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (chain, key) = site.mint(|_| {});
    let many: Vec<_> =
        chain.iter().take(1).cloned().chain((0..8).map(|_| site.ca.certificate().clone())).collect();
    let closed = Attacker::showing(many, &key, &[ALPN_DATA]).closed_by(daemon.address).await;
    assert_eq!(alert(&closed), Some(BAD_CERTIFICATE), "{closed}");

    let blow_up = |bytes: usize| {
        move |params: &mut CertificateParams| {
            params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(
                &[1, 3, 6, 1, 4, 1, 99999, 1],
                vec![5; bytes],
            ));
        }
    };
    let (chain, key) = site.mint(blow_up(10 << 10));
    let closed = Attacker::showing(chain, &key, &[ALPN_DATA]).closed_by(daemon.address).await;
    assert_eq!(alert(&closed), Some(BAD_CERTIFICATE), "{closed}");

    // Beyond 64 KiB the handshake message itself is refused, before it was read whole.
    let (chain, key) = site.mint(blow_up(70 << 10));
    let closed = Attacker::showing(chain, &key, &[ALPN_DATA]).closed_by(daemon.address).await;
    let ConnectionError::ConnectionClosed(close) = &closed else { panic!("{closed}") };
    assert_eq!(close.error_code, TransportErrorCode::PROTOCOL_VIOLATION, "{closed}");
    daemon.still_serves_and_saw_none(&site).await;
}

// ---- what the client refuses ---------------------------------------------------------------------------------------

#[tokio::test]
async fn an_agent_posing_as_target_is_refused() {
    let site = Site::new();
    let agent = site.identity(Role::Agent);
    let impostor = site.daemon_with(&agent, Arc::clone(&site.trust), &[Role::Agent]);
    assert_eq!(dial_alert(&site, &impostor).await, Some(UNSUPPORTED_CERTIFICATE), "its usage is client only");

    let (chain, key) =
        site.mint(|params| params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth));
    let agent =
        Identity::new(chain, rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der())).unwrap();
    let impostor = site.daemon_with(&agent, Arc::clone(&site.trust), &[Role::Agent]);
    assert_eq!(dial_alert(&site, &impostor).await, Some(ACCESS_DENIED), "and its name is an agent's");
}

#[tokio::test]
async fn a_process_server_posing_as_target_is_refused() {
    let site = Site::new();
    let relay = site.identity(Role::ProcessServer);
    let impostor = site.daemon_with(&relay, Arc::clone(&site.trust), &[Role::Agent]);
    assert_eq!(dial_alert(&site, &impostor).await, Some(ACCESS_DENIED));
}

#[tokio::test]
async fn another_target_than_the_pinned_one_is_refused() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let rule = PeerRule::of_site("berlin", &[Role::MasterTarget]).only(PeerId([0x77; 16]));
    let tls = tls::client_config(&site.identity(Role::Agent), Arc::clone(&site.trust), rule).unwrap();
    let error = dialer().connect(daemon.address, tls, None, &site.revocations).await.unwrap_err();
    assert!(error.to_string().contains("answered where"), "{error}");
}

#[tokio::test]
async fn a_target_of_another_ca_expired_or_revoked_is_refused() {
    let site = Site::new();
    let dir = tempfile::tempdir().unwrap();
    let other = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
    let foreign = other.issue_identity(Role::MasterTarget, PeerId([7; 16]), wall_clock()).unwrap();
    let impostor = site.daemon_with(&foreign, Arc::clone(&site.trust), &[Role::Agent]);
    assert_eq!(dial_alert(&site, &impostor).await, Some(UNKNOWN_CA));

    let now = wall_clock().0;
    let validity = Validity { not_before: Timestamp(now - 20 * SECOND), not_after: Timestamp(now - SECOND) };
    let stale = site.identity_valid(Role::MasterTarget, validity);
    let daemon = site.daemon_with(&stale, Arc::clone(&site.trust), &[Role::Agent]);
    assert_eq!(dial_alert(&site, &daemon).await, Some(CERTIFICATE_EXPIRED));

    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    site.revocations.revoke(Revocation::Peer(daemon.peer)).unwrap();
    assert_eq!(dial_alert(&site, &daemon).await, Some(CERTIFICATE_REVOKED));
}

// ---- revocation and expiry -----------------------------------------------------------------------------------------

#[tokio::test]
async fn a_revoked_peer_is_refused_and_others_are_not() {
    let site = Site::new();
    let identity = site.identity(Role::Agent);
    site.revocations.revoke(Revocation::Peer(identity.own().peer)).unwrap();
    site.refuses(&identity, CERTIFICATE_REVOKED).await;
}

#[tokio::test]
async fn revocation_cuts_a_live_connection_and_leaves_the_others() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (bad, good) = (site.identity(Role::Agent), site.identity(Role::Agent));
    let doomed = site.dial(&bad, &daemon).await.unwrap();
    let kept = site.dial(&good, &daemon).await.unwrap();
    assert!(echoes(&doomed.connection).await && echoes(&kept.connection).await);
    site.revocations.revoke(Revocation::Serial(bad.own().serial.clone())).unwrap();
    let closed = doomed.connection.closed().await;
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::Revoked));
    assert!(echoes(&kept.connection).await);
}

#[tokio::test]
async fn a_connection_does_not_outlive_its_certificate() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let now = wall_clock().0;
    let validity =
        Validity { not_before: Timestamp(now - 60 * SECOND), not_after: Timestamp(now + 3 * SECOND) };
    let brief = site.dial(&site.identity_valid(Role::Agent, validity), &daemon).await.unwrap();
    assert!(echoes(&brief.connection).await);
    let closed = brief.connection.closed().await;
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::Expired));
}

// ---- protocol negotiation ------------------------------------------------------------------------------------------

#[tokio::test]
async fn missing_and_unknown_alpn_are_refused_in_the_handshake() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (chain, key) = site.mint(|_| {});
    let wrong: [&[&[u8]]; 4] = [&[], &[b"h3"], &[b"reprotect/2"], &[b"reprotect/1\0"]];
    for protocols in wrong {
        let attacker = Attacker::showing(chain.clone(), &key, protocols);
        let closed = attacker.closed_by(daemon.address).await;
        assert_eq!(alert(&closed), Some(NO_APPLICATION_PROTOCOL), "{protocols:?}: {closed}");
    }
    daemon.still_serves_and_saw_none(&site).await;
}

#[test]
fn tls_1_2_is_refused_over_quic_and_over_tcp_alike() {
    let site = Site::new();
    let config = Arc::new(site.server_tls(&site.identity(Role::MasterTarget), &[Role::Agent]));
    let offer = |versions: &[u16]| {
        let hello = client_hello(versions);
        let mut quic =
            rustls::quic::ServerConnection::new(Arc::clone(&config), rustls::quic::Version::V1, vec![])
                .unwrap();
        let over_quic = quic.read_hs(&hello).unwrap_err();
        let mut record = vec![22, 3, 1];
        record.extend_from_slice(&u16::try_from(hello.len()).unwrap().to_be_bytes());
        record.extend_from_slice(&hello);
        let mut tcp = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        tcp.read_tls(&mut record.as_slice()).unwrap();
        [over_quic, tcp.process_new_packets().unwrap_err()]
    };
    for versions in [&[][..], &[0x0303], &[0x0302, 0x0303]] {
        for error in offer(versions) {
            let text = error.to_string();
            assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{versions:x?}: {text}");
            assert!(text.contains("Version") || text.contains("Tls1"), "{versions:x?}: {text}");
        }
    }
    // The same offer with TLS 1.3 gets past the version and fails on something else, so the rows above test versions.
    for error in offer(&[0x0304]) {
        assert!(!error.to_string().contains("Version") && !error.to_string().contains("Tls1"), "{error}");
    }
}

#[tokio::test]
async fn early_data_is_never_possible() {
    let site = Site::new();
    let tls = site.server_tls(&site.identity(Role::MasterTarget), &[Role::Agent]);
    assert_eq!((tls.max_early_data_size, tls.send_tls13_tickets), (0, 0));
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (chain, key) = site.mint(|_| {});
    let attacker = Attacker::showing(chain, &key, &[ALPN_DATA]); // remembers sessions, asks for early data
    for _ in 0..3 {
        let connecting = attacker.dial(daemon.address);
        let connecting = connecting.into_0rtt().err().expect("there is no ticket to send early data with");
        let connection = connecting.await.unwrap();
        assert!(echoes(&connection).await);
        connection.close(0_u32.into(), b"");
    }
}

#[tokio::test]
async fn early_data_that_is_sent_all_the_same_is_never_heard() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (chain, key) = site.mint(|_| {});
    for (attacker, is_known) in
        [(Attacker::showing(chain, &key, &[ALPN_DATA]), true), (Attacker::anonymous(&[ALPN_DATA]), false)]
    {
        attacker.collects_tickets().await;
        let Ok((connection, accepted)) = attacker.dial(daemon.address).into_0rtt() else {
            panic!("it holds a ticket and sends at once");
        };
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(b"early").await.unwrap();
        send.finish().unwrap();
        assert!(!accepted.await, "early data was accepted");
        assert!(receive.read_to_end(16).await.is_err(), "early data was answered");
        // With its certificate it may speak like anyone else, but only after the whole handshake.
        assert_eq!(echoes(&connection).await, is_known);
        if !is_known {
            assert_eq!(CloseCode::of(&connection.closed().await), Some(CloseCode::NoCertificate));
        }
    }
    assert_eq!(daemon.heard(), [b"ping".to_vec()]);
    assert_eq!(daemon.seen().len(), 1);
}

// ---- floods --------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_datagrams_leave_the_endpoint_serving_and_stateless() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let kept = site.dial(&site.identity(Role::Agent), &daemon).await.unwrap();
    let initials = capture_initials(8).await;
    let mut seed = Seed(0x5eed);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for round in 0_usize..6000 {
        let mut bytes = initials[round % initials.len()].clone();
        match round % 4 {
            0 => {
                bytes = (0..seed.below(1500)).map(|_| seed.next() as u8).collect();
            }
            1 => bytes.truncate(seed.below(bytes.len())),
            2 => {
                for _ in 0..1 + seed.below(4) {
                    let at = seed.below(bytes.len());
                    bytes[at] ^= 1 << seed.below(8);
                }
            }
            _ => {
                let keep = 7 + seed.below(40);
                bytes[keep..].fill_with(|| seed.next() as u8);
            }
        }
        socket.send_to(&bytes, daemon.address).await.unwrap();
        if round % 500 == 0 {
            assert!(echoes(&kept.connection).await, "round {round}");
        }
    }
    assert!(echoes(&kept.connection).await);
    // Changed bits outside the protected part may leave a valid first packet: as many half-open handshakes, no more.
    assert!(daemon.open_connections() <= 1 + initials.len(), "{}", daemon.open_connections());
    site.dial(&site.identity(Role::Agent), &daemon).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_half_open_handshakes_are_bounded_and_leave_others_unharmed() {
    let site = Site::new();
    let slots = 64;
    let daemon = site.daemon_limited(Role::MasterTarget, &[Role::Agent], slots);
    let kept = site.dial(&site.identity(Role::Agent), &daemon).await.unwrap();
    let initials = capture_initials(3000).await;
    let sockets: Vec<_> = (0..20).map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (at, initial) in initials.iter().enumerate() {
        sockets[at % sockets.len()].send_to(initial, daemon.address).unwrap(); // and never reads the reply
        if at % 100 == 0 {
            assert!(echoes(&kept.connection).await);
            assert!(daemon.open_connections() <= 1 + slots, "{}", daemon.open_connections());
        }
    }
    for _ in 0..5 {
        let fresh = site.dial(&site.identity(Role::Agent), &daemon).await.unwrap();
        assert!(echoes(&fresh.connection).await, "a client that answers a retry gets in during the flood");
    }
    assert!(echoes(&kept.connection).await);
    assert!(daemon.open_connections() <= 6 + slots, "{}", daemon.open_connections());
}

#[tokio::test]
async fn one_peer_cannot_take_the_connections_of_the_others() {
    let site = Site::new();
    let daemon = site.daemon(Role::MasterTarget, &[Role::Agent]);
    let (greedy, modest) = (site.identity(Role::Agent), site.identity(Role::Agent));
    let most = reprotect_engine::net::endpoint::TransportSettings::default().connections_per_agent_max;
    let mut kept = Vec::new();
    for _ in 0..most {
        let connection = site.dial(&greedy, &daemon).await.unwrap();
        assert!(echoes(&connection.connection).await);
        kept.push(connection);
    }
    for _ in 0..3 {
        // TLS lets the client finish first: the refusal follows.
        let closed = match site.dial(&greedy, &daemon).await {
            Ok(connection) => connection.connection.closed().await,
            Err(EndpointError::Connection { source, .. }) => source,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(CloseCode::of(&closed), Some(CloseCode::Busy), "{closed}");
    }
    let other = site.dial(&modest, &daemon).await.unwrap();
    assert!(echoes(&other.connection).await);
    CloseCode::Finished.close(&kept.swap_remove(0).connection);
    // The place is free when the server has noticed, which the client cannot see: it tries until it is let in.
    for attempt in 0.. {
        let again = site.dial(&greedy, &daemon).await;
        if let Ok(again) = again
            && echoes(&again.connection).await
        {
            break;
        }
        assert!(attempt < 1000, "a place that was given back is not given away");
    }
    assert!(echoes(&kept[0].connection).await, "those who were in stay in");
}

// ---- helpers with assertions ---------------------------------------------------------------------------------------

/// The alert with which `daemon` is refused by an honest agent.
async fn dial_alert(site: &Site, daemon: &Daemon) -> Option<u8> {
    match site.dial(&site.identity(Role::Agent), daemon).await {
        Err(EndpointError::Connection { source, .. }) => alert(&source),
        other => panic!("{other:?}"),
    }
}

/// The alert with which `daemon` refuses `identity`; the client may see it only after its own side is done.
async fn refusal_of(site: &Site, identity: &Identity, daemon: &Daemon) -> Option<u8> {
    match site.dial(identity, daemon).await {
        Ok(connection) => {
            let closed = tokio::time::timeout(Duration::from_secs(30), connection.connection.closed()).await;
            alert(&closed.expect("the server must close"))
        }
        Err(EndpointError::Connection { source, .. }) => alert(&source),
        Err(other) => panic!("{other}"),
    }
}

impl Site {
    async fn refuses(&self, identity: &Identity, expected: u8) {
        let daemon = self.daemon(Role::MasterTarget, &[Role::Agent]);
        assert_eq!(refusal_of(self, identity, &daemon).await, Some(expected));
        daemon.still_serves_and_saw_none(self).await;
    }

    async fn refuses_client(
        &self,
        chain: Vec<rustls_pki_types::CertificateDer<'static>>,
        key: &KeyPair,
        expected: u8,
    ) {
        let daemon = self.daemon(Role::MasterTarget, &[Role::Agent]);
        let closed = Attacker::showing(chain, key, &[ALPN_DATA]).closed_by(daemon.address).await;
        assert_eq!(alert(&closed), Some(expected), "{closed}");
        daemon.still_serves_and_saw_none(self).await;
    }

    fn identity_valid(&self, role: Role, validity: Validity) -> Identity {
        let pending = PendingIdentity::generate().unwrap();
        let request = pending.request().unwrap();
        let chain = self.ca.issue(&request, role, PeerId::random().unwrap(), validity).unwrap();
        pending.complete(chain).unwrap()
    }
}
