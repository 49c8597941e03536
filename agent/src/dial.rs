//! Dialling one address, with this agent's certificate.
//!
//! Invariants: a refusal of what this agent is (revoked, expired, another site) is told apart from a loss; the certificate is
//! renewed before it expires, by one attempt at a time. Called by `upstreams`, `daemon` and `check`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use reprotect_engine::format::message::Auth;
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{EndpointError, PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::renew;
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::tls::client_config;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::{Prover, session_proof_message};
use reprotect_engine::units::PeerId;

use crate::rota::Ended;

/// Longest wait for the peers to hear of the end.
const FAREWELL: Duration = Duration::from_millis(500);

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
    v4: Mutex<Option<Arc<Dialer>>>,
    v6: Mutex<Option<Arc<Dialer>>>,
    renewing: tokio::sync::Mutex<()>,
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
        Ok(Self {
            identity,
            trust,
            revocations,
            v4: Mutex::default(),
            v6: Mutex::default(),
            renewing: tokio::sync::Mutex::default(),
            credentials,
            host_name,
            renews,
        })
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
    pub async fn connect(&self, address: &str) -> Result<PeerConnection, Ended> {
        self.try_connect(address).await.map_err(|error| {
            let refusal = error.downcast_ref::<EndpointError>().and_then(EndpointError::refusal);
            match refusal {
                Some(text) => Ended::Refused(format!("{address}: {text}")),
                None => Ended::Lost(format!("{error:#}")),
            }
        })
    }

    async fn try_connect(&self, address: &str) -> anyhow::Result<PeerConnection> {
        let resolved = tokio::net::lookup_host(address).await;
        let mut resolved = resolved
            .with_context(|| format!("cannot resolve {address}; correct `upstream` or the name service"))?;
        let first = resolved.next().with_context(|| format!("{address} resolves to nothing"))?;
        self.renew_if_due(first).await;
        let identity = current(&self.identity);
        let rule = PeerRule::of_site(&identity.own().site, &[Role::ProcessServer, Role::MasterTarget]);
        let tls = client_config(&identity, Arc::clone(&self.trust), rule)?;
        let dialer = match first {
            SocketAddr::V4(_) => socket(&self.v4, Ipv4Addr::UNSPECIFIED.into())?,
            SocketAddr::V6(_) => socket(&self.v6, Ipv6Addr::UNSPECIFIED.into())?,
        };
        Ok(dialer.connect(first, tls, None, &self.revocations).await?)
    }

    /// Renews the certificate where this address is a master target; through a relay it cannot be.
    async fn renew_if_due(&self, address: SocketAddr) {
        let identity = current(&self.identity);
        if !self.renews || !identity.is_due_for_renewal(wall_clock()) {
            return;
        }
        // Whoever dials beside it goes on with the certificate that is still good.
        let Ok(_one) = self.renewing.try_lock() else { return };
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
        let dialers = [&self.v4, &self.v6].map(|slot| lock(slot).clone());
        for dialer in dialers.into_iter().flatten() {
            // A peer that does not answer is left to its own idle timeout.
            let _ = tokio::time::timeout(FAREWELL, dialer.close()).await;
        }
    }
}

fn lock(slot: &Mutex<Option<Arc<Dialer>>>) -> std::sync::MutexGuard<'_, Option<Arc<Dialer>>> {
    // A panic while holding it leaves a whole value: the only change is one assignment.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket of an address family, bound when first needed.
fn socket(slot: &Mutex<Option<Arc<Dialer>>>, local: IpAddr) -> anyhow::Result<Arc<Dialer>> {
    let mut slot = lock(slot);
    if let Some(dialer) = slot.as_ref() {
        return Ok(Arc::clone(dialer));
    }
    let dialer = Arc::new(Dialer::bind(SocketAddr::new(local, 0), TransportSettings::default())?);
    Ok(Arc::clone(slot.insert(dialer)))
}
