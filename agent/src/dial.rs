//! Dialling: whom next, after which pause, with which certificate.
//!
//! Invariants: the configured peers are tried in turn; a lost connection is dialled again at once, then with growing
//! pauses; a peer that refuses this agent for what it is (revoked, expired, another site) is asked again only every
//! [`PAUSE_REFUSED`], so that nothing hammers at a closed door; the certificate is renewed before it expires.
//! Called by `daemon`.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use reprotect_engine::format::message::Auth;
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::endpoint::{Dialer, EndpointError, PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::renew;
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::tls::client_config;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::{Prover, session_proof_message};
use reprotect_engine::units::PeerId;

/// First pause before dialling again; doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// Longest pause before dialling again.
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// Pause after a refusal, which only a person can mend.
pub const PAUSE_REFUSED: Duration = Duration::from_secs(60);
/// A session that lasted this long counts as a success: the pause starts small again.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// Longest wait for the peers to hear of the end.
const FAREWELL: Duration = Duration::from_millis(500);

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It may well go better the next time.
    Lost(String),
    /// The peer does not want this agent; the text says what to do.
    Refused(String),
    /// The plan changed: dial again at once.
    Replanned(String),
}

impl Ended {
    /// The reason.
    #[must_use]
    pub fn reason(&self) -> &str {
        let (Self::Lost(reason) | Self::Refused(reason) | Self::Replanned(reason)) = self;
        reason
    }
}

/// Whom to dial next, and when.
#[derive(Debug)]
pub struct Rota {
    next: usize,
    pause: Duration,
    not_before: Option<Instant>,
    refused_until: HashMap<String, Instant>,
}

impl Default for Rota {
    fn default() -> Self {
        Self { next: 0, pause: PAUSE_FIRST, not_before: None, refused_until: HashMap::new() }
    }
}

impl Rota {
    /// The address to dial next and when, seen at `now`; `None` without any address.
    pub fn next(&mut self, upstream: &[String], now: Instant) -> Option<(String, Instant)> {
        self.refused_until.retain(|_, until| *until > now);
        let from = self.not_before.unwrap_or(now).max(now);
        let order = (0..upstream.len()).map(|step| (self.next + step) % upstream.len());
        let best = order.min_by_key(|index| {
            // Those that refused come last, the one that may be asked first among them first.
            upstream.get(*index).and_then(|address| self.refused_until.get(address))
        })?;
        let address = upstream.get(best)?.clone();
        let at = self.refused_until.get(&address).map_or(from, |until| from.max(*until));
        self.next = best + 1;
        Some((address, at))
    }

    /// An attempt at `address` that began at `began` ended at `now`.
    pub fn ended(&mut self, address: &str, ended: &Ended, began: Instant, now: Instant) {
        if now.saturating_duration_since(began) >= GOOD_SESSION {
            self.pause = PAUSE_FIRST;
        }
        self.not_before = Some(now + self.pause);
        match ended {
            Ended::Lost(_) => self.pause = (self.pause * 2).min(PAUSE_LONGEST),
            Ended::Refused(_) => {
                self.refused_until.insert(address.to_owned(), now + PAUSE_REFUSED);
            }
            Ended::Replanned(_) => *self = Self::default(),
        }
    }

    /// An operator changed something: nobody is waited for any more.
    pub fn hurry(&mut self) {
        *self = Self { next: self.next, ..Self::default() };
    }
}

/// The identity in use; renewal replaces it.
pub type SharedIdentity = Arc<RwLock<Arc<Identity>>>;

fn current(identity: &SharedIdentity) -> Arc<Identity> {
    // A panic while holding it leaves a whole value: the only change is one assignment.
    Arc::clone(&identity.read().unwrap_or_else(PoisonError::into_inner))
}

/// Proves this agent with its certificate's key.
pub struct KeyProver(pub SharedIdentity);

impl Prover for KeyProver {
    fn prove(&self, nonce: &[u8; 32], target: PeerId) -> Auth {
        let identity = current(&self.0);
        let agent = identity.own().peer;
        let message = session_proof_message(nonce, agent, target);
        let signature = identity.sign(Purpose::SessionProof, &message).unwrap_or_else(|error| {
            // An empty signature is refused by the target, which says so.
            tracing::error!(%error, "the session proof could not be signed");
            Vec::new()
        });
        let certificates = identity.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect();
        Auth { agent, signature: signature.into(), certificates }
    }
}

/// What dialling needs.
pub struct Dial {
    identity: SharedIdentity,
    trust: Arc<Trust>,
    revocations: Arc<Revocations>,
    v4: Option<Dialer>,
    v6: Option<Dialer>,
    credentials: Credentials,
    host_name: String,
    renews: bool,
}

impl Dial {
    /// Dials with `identity`, believing the roots of `credentials`.
    ///
    /// # Errors
    /// When the roots cannot be read.
    pub fn new(
        identity: SharedIdentity,
        credentials: Credentials,
        host_name: String,
    ) -> anyhow::Result<Self> {
        let revocations = Arc::new(Revocations::in_memory());
        let trust = Arc::new(credentials.trust(Arc::clone(&revocations))?);
        let renews = credentials.renewed_in().is_some();
        Ok(Self { identity, trust, revocations, v4: None, v6: None, credentials, host_name, renews })
    }

    /// The same without ever renewing the certificate: for a look that changes nothing.
    #[must_use]
    pub fn without_renewal(self) -> Self {
        Self { renews: false, ..self }
    }

    /// Connects with `address`.
    ///
    /// # Errors
    /// Why not, as [`Ended`].
    pub async fn connect(&mut self, address: &str) -> Result<PeerConnection, Ended> {
        self.try_connect(address).await.map_err(|error| {
            let refusal = error.downcast_ref::<EndpointError>().and_then(EndpointError::refusal);
            match refusal {
                Some(text) => Ended::Refused(format!("{address}: {text}")),
                None => Ended::Lost(format!("{error:#}")),
            }
        })
    }

    async fn try_connect(&mut self, address: &str) -> anyhow::Result<PeerConnection> {
        let resolved = tokio::net::lookup_host(address).await;
        let mut resolved = resolved
            .with_context(|| format!("cannot resolve {address}; correct `upstream` or the name service"))?;
        let first = resolved.next().with_context(|| format!("{address} resolves to nothing"))?;
        self.renew_if_due(first).await;
        let identity = current(&self.identity);
        let rule = PeerRule::of_site(&identity.own().site, &[Role::ProcessServer, Role::MasterTarget]);
        let tls = client_config(&identity, Arc::clone(&self.trust), rule)?;
        let dialer = match first {
            SocketAddr::V4(_) => socket(&mut self.v4, Ipv4Addr::UNSPECIFIED.into())?,
            SocketAddr::V6(_) => socket(&mut self.v6, Ipv6Addr::UNSPECIFIED.into())?,
        };
        Ok(dialer.connect(first, tls, None, &self.revocations).await?)
    }

    /// Renews the certificate where this address is a master target; through a relay it cannot be.
    async fn renew_if_due(&self, address: SocketAddr) {
        let identity = current(&self.identity);
        if !self.renews || !identity.is_due_for_renewal(wall_clock()) {
            return;
        }
        let rule = PeerRule::of_site(&identity.own().site, &[Role::MasterTarget]);
        let renewed = renew(&identity, &self.trust, address, &rule, &self.host_name).await;
        match renewed.map_err(anyhow::Error::from).and_then(|identity| {
            if let Some(dir) = self.credentials.renewed_in() {
                identity.save(dir)?;
            }
            Ok(identity)
        }) {
            Ok(identity) => {
                tracing::info!(until = identity.own().not_after.0, "the certificate was renewed");
                *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
            }
            Err(error) => {
                tracing::warn!("the certificate is due and was not renewed at {address}: {error:#}")
            }
        }
    }

    /// Closes everything, so that the peers need not wait for silence to tell them.
    pub async fn close(&self) {
        for dialer in [&self.v4, &self.v6].into_iter().flatten() {
            // A peer that does not answer is left to its own idle timeout.
            let _ = tokio::time::timeout(FAREWELL, dialer.close()).await;
        }
    }
}

/// The socket of an address family, bound when first needed.
fn socket(slot: &mut Option<Dialer>, local: IpAddr) -> anyhow::Result<&Dialer> {
    match slot {
        Some(dialer) => Ok(dialer),
        None => Ok(slot.insert(Dialer::bind(SocketAddr::new(local, 0), TransportSettings::default())?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn peers_are_tried_in_turn_with_growing_pauses() {
        let (mut rota, upstream) = (Rota::default(), addresses(&["a", "b"]));
        let mut now = Instant::now();
        let mut tried = Vec::new();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let (address, at) = rota.next(&upstream, now).unwrap();
            pauses.push((at - now).as_millis());
            now = at;
            rota.ended(&address, &Ended::Lost(String::new()), now, now);
            tried.push(address);
        }
        assert_eq!(tried.concat(), "abababab");
        assert_eq!(pauses, [0, 200, 400, 800, 1600, 3200, 5000, 5000]);
        let (address, at) = rota.next(&upstream, now).unwrap();
        let ended = at + GOOD_SESSION;
        rota.ended(&address, &Ended::Lost(String::new()), at, ended);
        assert_eq!(
            rota.next(&upstream, ended).unwrap().1,
            ended + PAUSE_FIRST,
            "a good session starts it again"
        );
    }

    #[test]
    fn a_peer_that_refused_is_left_alone_while_others_are_tried() {
        let (mut rota, upstream) = (Rota::default(), addresses(&["a", "b"]));
        let begin = Instant::now();
        let mut now = begin;
        let mut asked = Vec::new();
        while now < begin + 3 * PAUSE_REFUSED {
            let (address, at) = rota.next(&upstream, now).unwrap();
            now = at;
            let ended = if address == "a" {
                asked.push(now);
                Ended::Refused(String::new())
            } else {
                Ended::Lost(String::new())
            };
            rota.ended(&address, &ended, now, now);
        }
        assert!(asked.len() <= 4, "{asked:?}");
        assert!(asked.windows(2).all(|pair| pair[1] - pair[0] >= PAUSE_REFUSED));
    }

    #[test]
    fn a_single_peer_that_refused_is_asked_again_slowly_or_when_an_operator_hurries() {
        let (mut rota, upstream) = (Rota::default(), addresses(&["a"]));
        let now = Instant::now();
        rota.ended("a", &Ended::Refused(String::new()), now, now);
        assert_eq!(rota.next(&upstream, now).unwrap().1, now + PAUSE_REFUSED);
        rota.hurry();
        assert_eq!(rota.next(&upstream, now).unwrap().1, now);
        assert!(rota.next(&[], now).is_none());
    }
}
