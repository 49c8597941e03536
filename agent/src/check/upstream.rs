//! Whether the peers answer: name, port, certificates on both sides, role, and how far away they are.
//!
//! Invariant: a connection is made and closed, no session is begun, nothing is renewed. Called by [`super::all`].

use std::sync::{Arc, RwLock};
use std::time::Duration;

use reprotect_engine::host::preflight::{Finding, reason_and_remedy};
use reprotect_engine::net::endpoint::{CloseCode, PeerConnection};
use reprotect_engine::net::tunnel::{UDP_REMEDY, Way};

use crate::config::Settings;
use crate::daemon::{host_name, load_identity};
use crate::dial::Dial;
use crate::plan;
use crate::rota::Ended;

/// Round trips beyond this slow down every write's way to the relay: a process server near the VM helps.
const RTT_WANTED: Duration = Duration::from_millis(50);
/// TLS 1.3 lets us finish before the other side judged our certificate: its refusal comes within this, and a few
/// round trips.
const JUDGEMENT: Duration = Duration::from_millis(300);

/// One finding per configured peer; none when there is no identity to dial with, which is a finding of its own.
pub(super) async fn findings(settings: &Settings) -> Vec<Finding> {
    let Ok(identity) = load_identity(&settings.credentials) else { return Vec::new() };
    let Ok(addresses) = plan::upstream(settings) else { return Vec::new() };
    let shared = Arc::new(RwLock::new(Arc::new(identity)));
    let dial = Dial::new(shared, settings.credentials.clone(), host_name());
    let dial = match dial {
        Ok(dial) => dial.without_renewal(),
        Err(error) => {
            return vec![Finding::fail(
                "upstream",
                format!("{error:#}"),
                "enrol again: the authority's certificate is unusable",
            )];
        }
    };
    let mut findings = Vec::new();
    for address in &addresses {
        findings.push(one(&dial, address).await);
    }
    dial.close().await;
    findings
}

async fn one(dial: &Dial, address: &str) -> Finding {
    let remedy = "check that the peer runs, that its port is open from here to it (UDP, or at least TCP), and that `upstream` is right";
    match dial.connect(address).await {
        Ok(peer) => {
            let rtt = peer.connection.rtt();
            // When it stays open, our certificate was believed.
            let _ = tokio::time::timeout(JUDGEMENT + 2 * rtt, peer.connection.closed()).await;
            let finding = judge(address, &peer, rtt);
            CloseCode::Finished.close(&peer.connection);
            finding
        }
        Err(Ended::Refused(reason)) => Finding::failed("upstream", &reason),
        Err(ended) => Finding::fail("upstream", format!("{address}: {}", ended.reason()), remedy),
    }
}

fn judge(address: &str, peer: &PeerConnection, rtt: Duration) -> Finding {
    if let Some(refusal) = peer.refusal() {
        let (reason, remedy) = reason_and_remedy(&refusal);
        return Finding::fail("upstream", format!("{address}: {reason}"), remedy);
    }
    if let Some(reason) = peer.connection.close_reason() {
        return Finding::fail("upstream", format!("{address}: {reason}"), "look at the peer's log");
    }
    let text = format!("{address} is a {}, round trip {} ms", peer.peer.role, rtt.as_millis());
    if peer.way() == Way::Tcp {
        return Finding::warn("upstream", format!("{text}, over TCP: nothing came over UDP"), UDP_REMEDY);
    }
    if rtt > RTT_WANTED {
        let remedy = "put a process server near this machine and name it as `upstream`";
        return Finding::warn("upstream", text, remedy);
    }
    Finding::pass("upstream", text)
}
