//! Connecting to a master target: the addresses in their order, with this process server's own certificate.
//!
//! Invariants: only a master target of the own site is believed, and exactly the one the agent asked for where it
//! named one; an address that does not answer costs at most [`DIAL_TIMEOUT`]; the error names every address tried and
//! what to do. One UDP socket per address family serves all sessions that go over UDP. Called by `relay`, `check` and the renewal.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::format::standby::{ROUND_TRIP_NONE, ROUND_TRIP_UNKNOWN};
use reprotect_engine::host::values::HostPort;
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{CloseCode, EndpointError, PeerConnection, TransportSettings};
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::standby::Standing;
use reprotect_engine::net::tls;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::units::PeerId;

use crate::budget::{SEND_BYTES_MIN, WINDOW_BYTES_MAX};
use crate::enrolment::Own;

/// Longest wait for one address; two dead ones still leave time in the agent's handshake of 10 s.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(4);
/// Pause between two probes of the target, and before it is dialled again.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// A target that takes longer to answer a probe is lost.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// Most addresses one name may stand for.
const RESOLVED_MAX: usize = 4;

/// No target could be connected with.
#[derive(Debug, thiserror::Error)]
#[error(
    "the process server cannot reach the master target: {tried}; check that it runs and that its port is open from the process server to it (UDP, or at least TCP), or correct `targets`"
)]
pub struct UpstreamError {
    /// Each address with its reason.
    pub tried: String,
}

impl Answer for UpstreamError {
    fn severity(&self) -> Severity {
        Severity::Retry
    }
}

/// The way to the targets.
#[derive(Debug)]
pub struct Upstream {
    targets: Vec<HostPort>,
    own: Arc<Own>,
    trust: Arc<Trust>,
    v4: Dialer,
    /// Missing where the system has no IPv6.
    v6: Option<Dialer>,
    reach: Mutex<Reach>,
}

/// How the target was found when it was last probed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// Not probed yet.
    #[default]
    Unknown,
    /// It answered after so long.
    Reached(Duration),
    /// It cannot be reached, and why.
    Lost(String),
}

/// Transport towards a target: it sends much and receives acknowledgements and hashes only.
#[must_use]
pub fn transport() -> TransportSettings {
    TransportSettings {
        stream_window_bytes: 4 << 20,
        receive_window_bytes: 8 << 20,
        // The least; each session sets its share of the memory budget.
        send_window_bytes: SEND_BYTES_MIN,
        handshake_timeout: DIAL_TIMEOUT,
        ..TransportSettings::default()
    }
}

/// Transport towards agents: it receives at most one window per stream. What arrives unread is inside the windows
/// that the memory budget counts, because an agent sends nothing that was not announced; the connection's window is
/// the bound for one that cheats.
#[must_use]
pub fn agent_transport() -> TransportSettings {
    TransportSettings {
        stream_window_bytes: WINDOW_BYTES_MAX as u32,
        receive_window_bytes: 2 * WINDOW_BYTES_MAX as u32,
        send_window_bytes: 8 << 20,
        ..TransportSettings::default()
    }
}

impl Upstream {
    /// Sockets for dialling `targets`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When no socket can be had.
    pub fn new(targets: Vec<HostPort>, own: Arc<Own>, trust: Arc<Trust>) -> Result<Self, EndpointError> {
        let v4 = Dialer::bind((Ipv4Addr::UNSPECIFIED, 0).into(), transport())?;
        let v6 = Dialer::bind((Ipv6Addr::UNSPECIFIED, 0).into(), transport()).ok();
        Ok(Self { targets, own, trust, v4, v6, reach: Mutex::default() })
    }

    /// The addresses in use.
    #[must_use]
    pub fn targets(&self) -> &[HostPort] {
        &self.targets
    }

    /// Who is believed at the other end.
    #[must_use]
    pub fn rule(&self) -> PeerRule {
        PeerRule::of_site(&self.own.identity().own().site, &[Role::MasterTarget])
    }

    /// Connects with the first target that answers; with exactly `wanted` unless that is [`PeerId::NONE`].
    ///
    /// # Errors
    /// [`UpstreamError`] when none does.
    pub async fn dial(&self, wanted: PeerId) -> Result<PeerConnection, UpstreamError> {
        let mut tried = Vec::new();
        for target in &self.targets {
            match self.dial_one(target, wanted).await {
                Ok(connection) => return Ok(connection),
                Err(reason) => tried.push(format!("{target}: {reason}")),
            }
        }
        Err(UpstreamError { tried: tried.join("; ") })
    }

    /// Connects with the target at one address.
    ///
    /// # Errors
    /// The reason, for people.
    pub async fn dial_one(&self, target: &HostPort, wanted: PeerId) -> Result<PeerConnection, String> {
        let mut last = "its name has no address".to_owned();
        for address in resolve(target).await? {
            let expected = (wanted != PeerId::NONE).then_some(wanted);
            match self.dial_address(address, expected).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial_address(
        &self,
        address: SocketAddr,
        expected: Option<PeerId>,
    ) -> Result<PeerConnection, String> {
        let rule = PeerRule { peer: expected, ..self.rule() };
        let config = tls::client_config(&self.own.identity(), Arc::clone(&self.trust), rule)
            .map_err(|error| error.to_string())?;
        let dialer = if address.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let dialer = dialer.ok_or_else(|| "this system has no IPv6".to_owned())?;
        dialer
            .connect(address, config, expected, self.trust.revocations())
            .await
            .map_err(|error| error.to_string())
    }

    /// How the target was found when it was last probed.
    #[must_use]
    pub fn reach(&self) -> Reach {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn found(&self, reach: Reach) {
        *self.reach.lock().unwrap_or_else(PoisonError::into_inner) = reach;
    }

    /// The round trip to the target as LOAD says it.
    #[must_use]
    pub fn target_micros(&self) -> u32 {
        match self.reach() {
            Reach::Unknown => ROUND_TRIP_UNKNOWN,
            // None is said of what is the target itself.
            Reach::Reached(time) => {
                u32::try_from(time.as_micros()).map_or(u32::MAX / 2, |micros| micros.max(1))
            }
            Reach::Lost(_) => ROUND_TRIP_NONE,
        }
    }

    /// Keeps a connection to the target and measures it, so that agents learn how long the way is, and whether there is
    /// one. Runs until it is dropped.
    pub async fn follow_target(&self) {
        loop {
            let reason = match self.dial(PeerId::NONE).await {
                Ok(peer) => self.probe_while_reached(peer).await,
                Err(error) => error.tried,
            };
            self.found(Reach::Lost(reason));
            tokio::time::sleep(PROBE_PAUSE).await;
        }
    }

    /// Probes until the connection fails; answers why.
    async fn probe_while_reached(&self, peer: PeerConnection) -> String {
        let mut standing = match Standing::<()>::open(peer).await {
            Ok(standing) => standing,
            Err(error) => return error.to_string(),
        };
        loop {
            if let Err(error) = standing.probe(PROBE_LIMIT).await {
                CloseCode::Finished.close(&standing.peer.connection);
                return error.to_string();
            }
            self.found(standing.probing.round_trip().map_or(Reach::Unknown, Reach::Reached));
            tokio::time::sleep(PROBE_PAUSE).await;
        }
    }

    /// Closes every connection and waits until the targets know.
    pub async fn close(&self) {
        self.v4.close().await;
        if let Some(v6) = &self.v6 {
            v6.close().await;
        }
    }
}

/// The addresses of a target's name.
///
/// # Errors
/// The reason, for people.
pub async fn resolve(target: &HostPort) -> Result<Vec<SocketAddr>, String> {
    let lookup =
        tokio::time::timeout(DIAL_TIMEOUT, tokio::net::lookup_host((target.host.as_str(), target.port)));
    match lookup.await {
        Ok(Ok(addresses)) => Ok(addresses.take(RESOLVED_MAX).collect()),
        Ok(Err(error)) => Err(format!("its name cannot be resolved ({error})")),
        Err(_) => Err("its name was not resolved in time".to_owned()),
    }
}
