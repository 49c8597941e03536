//! The whole daemon in this process: start, stop, restart with what it knew, enrolment, revocation, reload.

#[path = "support/daemon.rs"]
mod support;

use std::time::Duration;

use reprotect_engine::host::admin_client::AdminError;
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::enroll::{EnrollError, enroll};
use reprotect_engine::net::identity::{IDENTITY_FILE, Role};
use reprotect_engine::net::token::Token;
use reprotect_engine::net::trust::ROOTS_FILE;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::PeerId;
use reprotect_master_target::api::{
    InviteAnswer, InviteRequest, MachineInfo, RevokeAnswer, RevokeRequest, StatusInfo,
};
use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_is_the_same_target_and_a_second_one_is_refused() {
    let dir = dir();
    let daemon = start(dir.path()).await;
    let first = daemon.status().await;
    assert_eq!((first.site.as_str(), first.disks.len()), ("lyon", 0));
    // As of a mount, which the first one has and a kill would leave.
    let scratch = dir.path().join("mounts").join("0a1b2c3d.scratch");
    std::fs::create_dir(scratch.parent().unwrap()).unwrap();
    std::fs::write(&scratch, b"x").unwrap();
    let second = spawn(dir.path()).task.await.unwrap().unwrap_err().to_string();
    assert!(second.contains("already runs") && second.contains(&std::process::id().to_string()), "{second}");
    assert_eq!(daemon.status().await.target, first.target, "the first one is not disturbed");
    assert!(scratch.exists(), "nor are its mounts");
    let (socket, client) = (dir.path().join("master-target.sock"), daemon.client.clone());
    daemon.stop().await;
    assert!(!socket.exists());
    let error = client.get_json::<StatusInfo>("/v1/status").await.unwrap_err();
    assert!(matches!(error, AdminError::NotRunning { .. }), "{error}");
    let again = start(dir.path()).await;
    assert_eq!(again.status().await.target, first.target);
    assert!(!scratch.exists(), "no mount outlives its daemon");
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invitation_becomes_an_identity_once_and_a_revoked_peer_may_not_come_back() {
    let dir = dir();
    let daemon = start(dir.path()).await;
    for (name, role) in [("agent", Role::Agent), ("process-server", Role::ProcessServer)] {
        let answer = daemon.invite(name).await;
        let token: Token = answer.token.parse().unwrap();
        let place = dir.path().join(format!("{name}-1"));
        let identity = enroll(&token, role, "web1", &place).await.unwrap();
        assert_eq!(identity.own().peer.to_string(), answer.peer);
        let again = enroll(&token, role, "web2", &dir.path().join(format!("{name}-2"))).await;
        assert!(matches!(again, Err(EnrollError::Refused(_))), "{again:?}");
        let request = RevokeRequest { peer: answer.peer.clone() };
        let revoked: RevokeAnswer = daemon.client.post_json("/v1/revoke", &request).await.unwrap();
        assert_eq!(revoked.peer, answer.peer);
        assert!(std::fs::read_to_string(dir.path().join("revoked")).unwrap().contains(&answer.peer));
    }
    let request = InviteRequest { role: "master-target".to_owned(), valid_seconds: 900 };
    let refused = daemon.client.post_json::<_, InviteAnswer>("/v1/invite", &request).await.unwrap_err();
    assert!(refused.to_string().contains("use --role agent"), "{refused}");
    for valid_seconds in [0, 59, 24 * 3600 + 1, u64::MAX] {
        let request = InviteRequest { role: "agent".to_owned(), valid_seconds };
        let refused = daemon.client.post_json::<_, InviteAnswer>("/v1/invite", &request).await.unwrap_err();
        assert!(refused.to_string().contains("use --valid"), "{refused}");
    }
    let own = RevokeRequest { peer: daemon.status().await.target };
    let refused = daemon.client.post_json::<_, RevokeAnswer>("/v1/revoke", &own).await.unwrap_err();
    assert!(refused.to_string().contains("cannot be revoked"), "{refused}");
    let machines: Vec<MachineInfo> = daemon.client.get_json("/v1/machines").await.unwrap();
    assert!(machines.is_empty(), "an enrolled agent that never connected told no disks");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_over_what_may_change_and_keeps_the_old_where_the_file_is_wrong() {
    let dir = dir();
    let daemon = start(dir.path()).await;
    let listen = daemon.status().await.listen;
    assert_eq!(daemon.invite("agent").await.addresses, [listen]);
    let reloaded = async |expected: &str| {
        daemon.reload.send_modify(|count| *count += 1);
        for _ in 0..6000 {
            if daemon.invite("agent").await.addresses == [expected] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{expected} is not advertised");
    };
    configure(dir.path(), "site = \"lyon\"\nadvertise = [\"home.example:9\"]\n");
    reloaded("home.example:9").await;
    configure(dir.path(), "advertise = 7\n");
    reloaded("home.example:9").await;
    configure(dir.path(), "site = \"lyon\"\nadvertise = [\"new.example:9\"]\n");
    reloaded("new.example:9").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_sites_own_pki_the_target_is_who_its_certificate_says_and_nobody_enrols() {
    let (dir, site) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ca = Ca::open_or_create(&site.path().join("ca"), "lyon", wall_clock()).unwrap();
    let identity = ca.issue_identity(Role::MasterTarget, PeerId::random().unwrap(), wall_clock()).unwrap();
    identity.save(site.path()).unwrap();
    let file = site.path().join(IDENTITY_FILE).display().to_string();
    let roots = site.path().join("ca").join(ROOTS_FILE).display().to_string();
    let pki =
        |file: &str| format!("[pki]\ncertificate = \"{file}\"\nkey = \"{file}\"\nroots = \"{roots}\"\n");
    configure(dir.path(), &pki(&file));
    let daemon = start(dir.path()).await;
    let status = daemon.status().await;
    assert_eq!((status.target, status.site.as_str()), (identity.own().peer.to_string(), "lyon"));
    let invite = InviteRequest { role: "agent".into(), valid_seconds: 60 };
    let refused = daemon.client.post_json::<_, InviteAnswer>("/v1/invite", &invite).await.unwrap_err();
    assert!(refused.to_string().contains("own PKI"), "{refused}");
    daemon.stop().await;
    assert!(!dir.path().join("ca").exists(), "no authority of its own is made");

    let agent = ca.issue_identity(Role::Agent, PeerId::random().unwrap(), wall_clock()).unwrap();
    let other = tempfile::tempdir().unwrap();
    agent.save(other.path()).unwrap();
    configure(dir.path(), &pki(&other.path().join(IDENTITY_FILE).display().to_string()));
    let error = spawn(dir.path()).task.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("not a master-target"), "{error}");
}
