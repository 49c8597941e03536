//! Enrolment end to end: a token turns into an identity once, for the right machine, at the right target only.

#![expect(clippy::unwrap_used, reason = "a failed step of a helper is a failed test")]

#[path = "tls_matrix/support.rs"]
mod support;

use std::sync::Arc;

use quinn::ConnectionError;
use reprotect_engine::net::endpoint::CloseCode;
use reprotect_engine::net::enroll::{EnrollError, enroll, renew};
use reprotect_engine::net::enroll_wire::{Kind, REQUEST_BYTES_MAX, Refusal, Request};
use reprotect_engine::net::identity::{Identity, PendingIdentity, Role};
use reprotect_engine::net::invitations::{INVITATION_LIFETIME_DEFAULT, Invitations, Invite};
use reprotect_engine::net::revocations::Revocation;
use reprotect_engine::net::token::{SECRET_BYTES, Token};
use reprotect_engine::net::trust::{PeerRule, ROOTS_FILE, Trust};
use reprotect_engine::net::{ALPN_DATA, ALPN_ENROLL, tls, wall_clock};
use reprotect_engine::units::{PeerId, Timestamp};
use support::*;

fn invite(site: &Site, daemon: &Daemon, role: Role) -> Token {
    let invite = Invite {
        role,
        lifetime: INVITATION_LIFETIME_DEFAULT,
        target: daemon.peer,
        ca_key_sha256: site.ca.key_sha256().unwrap(),
        addresses: vec![daemon.address.to_string()],
    };
    let (_, token) = site.invitations.create(invite, wall_clock()).unwrap();
    token.to_text().unwrap().parse().unwrap()
}

fn target(site: &Site) -> Daemon {
    site.daemon(Role::MasterTarget, &[Role::Agent, Role::ProcessServer])
}

#[tokio::test]
async fn a_token_becomes_an_identity_that_is_let_in() {
    let site = Site::new();
    let daemon = target(&site);
    for role in [Role::Agent, Role::ProcessServer] {
        let token = invite(&site, &daemon, role);
        let invited = site.invitations.list()[0].peer;
        let dir = site.state_dir(role.as_str());
        let identity = enroll(&token, role, "web-01", &dir).await.unwrap();
        assert_eq!(
            (identity.own().role, identity.own().peer, identity.own().site.as_str()),
            (role, invited, "berlin")
        );
        let saved = Identity::load(&dir).unwrap();
        assert_eq!(saved.own(), identity.own());
        let trust = Trust::load(&dir.join(ROOTS_FILE), Arc::clone(&site.revocations)).unwrap();
        let rule = PeerRule::of_site("berlin", &[Role::MasterTarget]).only(daemon.peer);
        let tls = tls::client_config(&saved, Arc::new(trust), rule).unwrap();
        let connection =
            dialer().connect(daemon.address, tls, Some(daemon.peer), &site.revocations).await.unwrap();
        assert!(echoes(&connection.connection).await);
        assert!(matches!(enroll(&token, role, "web-01", &dir).await, Err(EnrollError::AlreadyEnrolled(_))));
    }
    assert!(site.invitations.list().is_empty());
}

#[tokio::test]
async fn a_token_works_once_also_across_a_restart_of_the_target() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    // The target restarts: only the file remains.
    let restarted = Arc::new(Invitations::load(site.dir.path().join("invitations")).unwrap());
    let site = Site { invitations: restarted, ..site };
    let daemon = Daemon::restarted_as(&site, &daemon);
    let token = Token { addresses: vec![daemon.address.to_string()], target: daemon.peer, ..token };
    enroll(&token, Role::Agent, "a", &site.state_dir("a")).await.unwrap();
    let again = enroll(&token, Role::Agent, "b", &site.state_dir("b")).await;
    assert!(matches!(again, Err(EnrollError::Refused(Refusal::Unknown))), "{again:?}");
    assert!(!site.state_dir("b").exists());
}

#[tokio::test]
async fn of_two_machines_with_one_token_one_gets_in() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    let (dir_a, dir_b) = (site.state_dir("a"), site.state_dir("b"));
    let (a, b) =
        tokio::join!(enroll(&token, Role::Agent, "a", &dir_a), enroll(&token, Role::Agent, "b", &dir_b));
    assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|ok| **ok).count(), 1, "{a:?} {b:?}");
}

#[tokio::test]
async fn wrong_secret_role_expiry_and_program_are_refused_by_name() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    let dir = site.state_dir("x");
    let wrong = Token { secret: [0; SECRET_BYTES], ..token.clone() };
    let refused = enroll(&wrong, Role::Agent, "x", &dir).await;
    assert!(matches!(refused, Err(EnrollError::Refused(Refusal::Unknown))), "{refused:?}");
    let promoted = Token { role: Role::MasterTarget, ..token.clone() };
    let refused = enroll(&promoted, Role::MasterTarget, "x", &dir).await;
    assert!(matches!(refused, Err(EnrollError::Refused(Refusal::WrongRole))), "{refused:?}");
    let program = enroll(&token, Role::ProcessServer, "x", &dir).await;
    assert!(matches!(program, Err(EnrollError::WrongProgram { .. })), "{program:?}");
    let old = Token { expires: Timestamp(1), ..token.clone() };
    assert!(matches!(enroll(&old, Role::Agent, "x", &dir).await, Err(EnrollError::Expired)));
    assert!(matches!(enroll(&token, Role::Agent, "not a name", &dir).await, Err(EnrollError::HostName(_))));
    assert!(!dir.exists());
    enroll(&token, Role::Agent, "x", &dir).await.unwrap();
}

#[tokio::test]
async fn the_target_judges_expiry_by_itself() {
    let site = Site::new();
    let daemon = target(&site);
    let invite = Invite {
        role: Role::Agent,
        lifetime: std::time::Duration::from_secs(60),
        target: daemon.peer,
        ca_key_sha256: site.ca.key_sha256().unwrap(),
        addresses: vec![daemon.address.to_string()],
    };
    let long_ago = Timestamp(wall_clock().0 - 3600 * SECOND);
    let (_, token) = site.invitations.create(invite, long_ago).unwrap();
    let forged = Token { expires: Timestamp(u64::MAX), ..token };
    let refused = enroll(&forged, Role::Agent, "x", &site.state_dir("x")).await;
    assert!(matches!(refused, Err(EnrollError::Refused(Refusal::Expired))), "{refused:?}");
}

#[tokio::test]
async fn a_server_with_another_ca_or_another_identity_never_sees_the_secret() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    let other_ca = Token { ca_key_sha256: [9; 32], ..token.clone() };
    let refused = enroll(&other_ca, Role::Agent, "x", &site.state_dir("x")).await;
    assert!(matches!(refused, Err(EnrollError::Endpoint(_))), "{refused:?}");
    let other_target = Token { target: PeerId([9; 16]), ..token.clone() };
    let refused = enroll(&other_target, Role::Agent, "x", &site.state_dir("x")).await;
    assert!(matches!(refused, Err(EnrollError::Endpoint(_))), "{refused:?}");

    let relay = site.identity(Role::ProcessServer);
    let impostor = site.daemon_with(&relay, Arc::clone(&site.trust), &[Role::Agent]);
    let lured =
        Token { addresses: vec![impostor.address.to_string()], target: impostor.peer, ..token.clone() };
    let refused = enroll(&lured, Role::Agent, "x", &site.state_dir("x")).await;
    assert!(matches!(refused, Err(EnrollError::Endpoint(_))), "a relay is no target: {refused:?}");
    // Nothing was spent, and the next address is tried after one that fails.
    let both = Token { addresses: vec![impostor.address.to_string(), daemon.address.to_string()], ..token };
    enroll(&both, Role::Agent, "x", &site.state_dir("x")).await.unwrap();
}

#[tokio::test]
async fn attempts_are_rate_limited() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    let wrong = Token { secret: [0; SECRET_BYTES], ..token };
    let mut limited = false;
    for _ in 0..200 {
        match enroll(&wrong, Role::Agent, "x", &site.state_dir("x")).await {
            Err(EnrollError::Refused(Refusal::Unknown)) => {}
            Err(EnrollError::Refused(Refusal::TooMany)) => {
                limited = true;
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(limited);
}

#[tokio::test]
async fn an_enrolment_connection_is_never_a_data_connection() {
    let site = Site::new();
    let daemon = target(&site);
    // Even with a certificate that would be let in, the enrolment protocol leads to enrolment only.
    let (chain, key) = site.mint(|_| {});
    for attacker in [Attacker::anonymous(&[ALPN_ENROLL]), Attacker::showing(chain, &key, &[ALPN_ENROLL])] {
        let connection = attacker.connect(daemon.address).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        let more = async { tokio::join!(connection.open_bi(), connection.open_uni()) };
        let talk = async {
            send.write_all(b"ping").await.unwrap();
            send.finish().unwrap();
            connection.closed().await
        };
        let ((second, uni), closed) = tokio::join!(more, talk);
        assert!(second.is_err() && uni.is_err(), "one stream and no more");
        assert_eq!(CloseCode::of(&closed), Some(CloseCode::Violation), "{closed}");
    }
    assert!(daemon.seen().is_empty());
}

#[tokio::test]
async fn a_data_connection_is_never_an_enrolment() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    let attacker = Attacker::anonymous(&[ALPN_DATA]);
    let connection = attacker.connect(daemon.address).await.unwrap();
    let request = Request {
        kind: Kind::Enrol,
        role: Role::Agent,
        secret: token.secret,
        host_name: "x".into(),
        csr: PendingIdentity::generate().unwrap().request().unwrap(),
    };
    let talk = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(&request.encode().unwrap()).await.ok();
        Ok::<_, ConnectionError>(receive.read_to_end(4096).await)
    };
    assert!(talk.await.is_err());
    assert_eq!(site.invitations.list().len(), 1, "nothing was spent");
}

#[tokio::test]
async fn garbage_and_oversized_requests_close_the_connection_and_spend_nothing() {
    let site = Site::new();
    let daemon = target(&site);
    let token = invite(&site, &daemon, Role::Agent);
    for bytes in [vec![], vec![0; 100], b"RPEN\x01\x00\x09\x09".to_vec(), vec![b'R'; REQUEST_BYTES_MAX + 1]] {
        let attacker = Attacker::anonymous(&[ALPN_ENROLL]);
        let connection = attacker.connect(daemon.address).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        let _ = send.write_all(&bytes).await;
        let _ = send.finish();
        let closed = connection.closed().await;
        assert_eq!(CloseCode::of(&closed), Some(CloseCode::Violation), "{} bytes: {closed}", bytes.len());
    }
    enroll(&token, Role::Agent, "x", &site.state_dir("x")).await.unwrap();
}

#[tokio::test]
async fn renewal_keeps_the_name_changes_the_key_and_needs_a_certificate_in_force() {
    let site = Site::new();
    let daemon = target(&site);
    let identity = site.identity(Role::Agent);
    let rule = PeerRule::of_site("berlin", &[Role::MasterTarget]).only(daemon.peer);
    let renewed = renew(&identity, &site.trust, daemon.address, &rule, "x").await.unwrap();
    let (old, new) = (identity.own(), renewed.own());
    assert_eq!((old.role, old.peer, &old.site), (new.role, new.peer, &new.site));
    assert!(old.key_sha256 != new.key_sha256 && old.serial != new.serial);
    let connection = site.dial(&renewed, &daemon).await.unwrap();
    assert!(echoes(&connection.connection).await);

    site.revocations.revoke(Revocation::Peer(old.peer)).unwrap();
    assert!(renew(&identity, &site.trust, daemon.address, &rule, "x").await.is_err());

    // Without a certificate a renewal is refused, whatever it says.
    let request = Request {
        kind: Kind::Renew,
        role: Role::MasterTarget,
        secret: [0; SECRET_BYTES],
        host_name: "x".into(),
        csr: PendingIdentity::generate().unwrap().request().unwrap(),
    };
    let connection = Attacker::anonymous(&[ALPN_ENROLL]).connect(daemon.address).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&request.encode().unwrap()).await.unwrap();
    send.finish().unwrap();
    let answer = receive.read_to_end(4096).await.unwrap();
    let refused = reprotect_engine::net::enroll_wire::Answer::decode(&answer);
    assert_eq!(refused, Ok(reprotect_engine::net::enroll_wire::Answer::Refused(Refusal::NoCertificate)));
}
