//! What the master target believes and allows: agents' proofs and signed grants.
//!
//! Invariants: a proof is believed only with a certificate of this site's CA for an agent that is not revoked; a
//! grant is good for exactly one agent, disk and generation, and only if this target signed it. Called by the
//! protocol core through [`Authority`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::format::message::Auth;
use reprotect_engine::net::grant::{Grant, GrantSigner, GrantUse, GrantVerifier, Operations};
use reprotect_engine::net::identity::{Identity, Purpose, Role};
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::{Authority, session_proof_message};
use reprotect_engine::units::{DiskId, Generation, PeerId, SectorCount, Timestamp};
use rustls_pki_types::CertificateDer;

/// How long a grant may be presented; every session gets fresh ones.
const GRANT_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// The authority of one site.
#[derive(Debug)]
pub struct SiteAuthority {
    identity: Arc<Identity>,
    trust: Arc<Trust>,
    verifier: GrantVerifier,
}

impl SiteAuthority {
    /// The authority of the target that `identity` is.
    ///
    /// # Errors
    /// When the target's own certificate is not believed by its own roots.
    pub fn new(identity: Arc<Identity>, trust: Arc<Trust>) -> anyhow::Result<Self> {
        let rule = PeerRule::of_site(&identity.own().site, &[Role::MasterTarget]);
        let verifier = GrantVerifier::new(&trust, identity.chain(), &rule, wall_clock())?;
        Ok(Self { identity, trust, verifier })
    }
}

impl Authority for SiteAuthority {
    fn check_proof(&self, auth: &Auth, nonce: &[u8; 32]) -> Result<(), String> {
        let own = self.identity.own();
        let rule = PeerRule::of_site(&own.site, &[Role::Agent]).only(auth.agent);
        let chain: Vec<CertificateDer<'_>> =
            auth.certificates.iter().map(|der| CertificateDer::from(der.as_ref())).collect();
        let message = session_proof_message(nonce, auth.agent, own.peer);
        self.trust
            .verify_signed(&chain, &rule, Purpose::SessionProof, &message, &auth.signature, wall_clock())
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn issue(&self, disk: DiskId, size_sectors: u64, generation: Generation, agent: PeerId) -> Bytes {
        let grant = Grant {
            disk,
            size: SectorCount(size_sectors),
            generation,
            agent,
            target: self.identity.own().peer,
            operations: Operations::REPLICATE,
            expires: Timestamp(wall_clock().0.saturating_add(GRANT_LIFETIME.as_nanos() as u64)),
        };
        match GrantSigner::new(&self.identity).sign(&grant) {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                // An empty grant is refused when it is presented; the agent says so and nothing is written.
                tracing::error!(%disk, %error, "a grant could not be signed");
                Bytes::new()
            }
        }
    }

    fn check_grant(
        &self,
        grant: &[u8],
        disk: DiskId,
        size_sectors: u64,
        generation: Generation,
        agent: PeerId,
    ) -> Result<(), String> {
        let usage =
            GrantUse { agent, disk, generation, operations: Operations::REPLICATE, now: wall_clock() };
        let grant = self.verifier.verify(grant, &usage).map_err(|error| error.to_string())?;
        if grant.size.0 == size_sectors {
            Ok(())
        } else {
            Err(format!(
                "the source has {size_sectors} sectors, the grant is for {}; the disk was resized: reload the agent",
                grant.size
            ))
        }
    }
}
