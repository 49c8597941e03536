//! The one place where a certificate chain is believed or refused: TLS handshakes and signatures alike.
//!
//! Invariants: [`Trust::verify_chain`] is the only maker of a believed [`PeerIdentity`]; a chain is believed when it is
//! short, leads to a root, is valid now, is meant for this use (the usage must be *present*: certificates without
//! usages are refused), names an allowed role, the expected site and peer, and nothing of it is revoked.
//! Called by `tls`, `grant`, and the master target for session proofs that came through a relay.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::net::files;
use crate::net::identity::{
    CHAIN_CERTIFICATES_MAX, IdentityError, PeerIdentity, Purpose, Role, certificates_from_pem,
};
use crate::net::revocations::Revocations;
use crate::units::{PeerId, Timestamp};

/// File of the trusted root certificates in a state directory.
pub const ROOTS_FILE: &str = "ca.pem";
/// Most roots a site may configure.
pub const ROOTS_MAX: usize = 16;

/// DER content of id-kp-serverAuth (1.3.6.1.5.5.7.3.1).
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
/// DER content of id-kp-clientAuth (1.3.6.1.5.5.7.3.2).
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];

/// Signature algorithms accepted in chains: ours use ECDSA P-256; the rest serves a site's own PKI.
pub(crate) static CHAIN_ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::ring::ECDSA_P256_SHA256,
    webpki::ring::ECDSA_P256_SHA384,
    webpki::ring::ECDSA_P384_SHA256,
    webpki::ring::ECDSA_P384_SHA384,
    webpki::ring::ED25519,
    webpki::ring::RSA_PKCS1_2048_8192_SHA256,
    webpki::ring::RSA_PKCS1_2048_8192_SHA384,
    webpki::ring::RSA_PKCS1_2048_8192_SHA512,
];

/// A set of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// The set of the roles in `roles`.
    #[must_use]
    pub const fn of(roles: &[Role]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < roles.len() {
            bits |= 1 << roles[at].code();
            at += 1;
        }
        Self(bits)
    }

    /// Whether `role` is in the set.
    #[must_use]
    pub const fn contains(self, role: Role) -> bool {
        self.0 & (1 << role.code()) != 0
    }
}

/// Which end of a connection the certificate is shown by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// It dialled.
    Client,
    /// It was dialled.
    Server,
}

/// Whom we are ready to speak with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRule {
    /// Any of these roles.
    pub roles: Roles,
    /// Exactly this peer, when given.
    pub peer: Option<PeerId>,
    /// Of exactly this site, when given.
    pub site: Option<String>,
}

impl PeerRule {
    /// Any peer of `site` with one of `roles`.
    #[must_use]
    pub fn of_site(site: &str, roles: &[Role]) -> Self {
        Self { roles: Roles::of(roles), peer: None, site: Some(site.to_owned()) }
    }

    /// The same rule for exactly one peer.
    #[must_use]
    pub fn only(self, peer: PeerId) -> Self {
        Self { peer: Some(peer), ..self }
    }

    fn check(&self, identity: &PeerIdentity) -> Result<(), IdentityError> {
        if !self.roles.contains(identity.role) {
            return Err(IdentityError::RoleRefused { peer: identity.peer, got: identity.role });
        }
        if let Some(site) = self.site.as_ref().filter(|site| **site != identity.site) {
            return Err(IdentityError::OtherSite { expected: site.clone(), got: identity.site.clone() });
        }
        match self.peer {
            Some(expected) if expected != identity.peer => {
                Err(IdentityError::OtherPeer { expected, got: identity.peer })
            }
            _ => Ok(()),
        }
    }
}

/// Roots and revocations.
#[derive(Debug)]
pub struct Trust {
    anchors: Vec<TrustAnchor<'static>>,
    revocations: Arc<Revocations>,
}

impl Trust {
    /// Trusts what leads to one of `roots`.
    ///
    /// # Errors
    /// When there is no root, too many, or one is malformed.
    pub fn new(roots: &[CertificateDer<'_>], revocations: Arc<Revocations>) -> Result<Self, IdentityError> {
        if roots.is_empty() || roots.len() > ROOTS_MAX {
            return Err(IdentityError::Malformed { reason: "there must be 1 to 16 root certificates" });
        }
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(IdentityError::Chain)?;
        Ok(Self { anchors, revocations })
    }

    /// Loads the roots from a PEM file: the CA of the master target, or the site's own.
    ///
    /// # Errors
    /// As for [`Self::new`], or when the file cannot be read.
    pub fn load(roots: &Path, revocations: Arc<Revocations>) -> Result<Self, IdentityError> {
        let pem = files::read_public(roots)?;
        Self::new(&certificates_from_pem(&pem, &roots.display().to_string())?, revocations)
    }

    /// The revocations this trust obeys.
    #[must_use]
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.revocations
    }

    /// Believes or refuses a chain.
    ///
    /// # Errors
    /// The first reason to refuse it.
    pub fn verify_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        rule: &PeerRule,
        now: Timestamp,
    ) -> Result<PeerIdentity, IdentityError> {
        if intermediates.len() >= CHAIN_CERTIFICATES_MAX {
            return Err(IdentityError::ChainTooLong { count: intermediates.len() + 1 });
        }
        // Reads the leaf with its size bound before any signature is computed.
        let identity = PeerIdentity::from_certificate(leaf)?;
        let usage = KeyUsage::required(match usage {
            Usage::Client => CLIENT_AUTH,
            Usage::Server => SERVER_AUTH,
        });
        let now = UnixTime::since_unix_epoch(Duration::from_nanos(now.0));
        EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(CHAIN_ALGORITHMS, &self.anchors, intermediates, now, usage, None, None)
                    .map(drop)
            })
            .map_err(IdentityError::Chain)?;
        rule.check(&identity)?;
        if self.revocations.is_revoked(&identity) {
            return Err(IdentityError::Revoked(identity.peer));
        }
        Ok(identity)
    }

    /// Believes or refuses a signature made by [`crate::net::identity::Identity::sign`] with the key of `chain`'s
    /// leaf: how an agent proves itself through a relay. The message must hold something fresh from the verifier.
    ///
    /// # Errors
    /// When the chain is refused, or the signature does not fit.
    pub fn verify_signed(
        &self,
        chain: &[CertificateDer<'_>],
        rule: &PeerRule,
        purpose: Purpose,
        message: &[u8],
        signature: &[u8],
        now: Timestamp,
    ) -> Result<PeerIdentity, IdentityError> {
        let (leaf, intermediates) =
            chain.split_first().ok_or(IdentityError::Malformed { reason: "the chain is empty" })?;
        let identity = self.verify_chain(leaf, intermediates, Usage::Client, rule, now)?;
        EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                leaf.verify_signature(webpki::ring::ECDSA_P256_SHA256, &purpose.bound(message), signature)
            })
            .map_err(|_| IdentityError::Signature(identity.peer))?;
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::ca::Ca;
    use crate::net::revocations::Revocation;
    use crate::net::wall_clock;

    fn site() -> (tempfile::TempDir, Ca, Trust) {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let trust = Trust::new(&[ca.certificate().clone()], Arc::new(Revocations::in_memory())).unwrap();
        (dir, ca, trust)
    }

    #[test]
    fn a_session_proof_is_believed_only_for_its_message_purpose_role_and_key() {
        let (_dir, ca, trust) = site();
        let now = wall_clock();
        let agent = ca.issue_identity(Role::Agent, PeerId([1; 16]), now).unwrap();
        let other = ca.issue_identity(Role::Agent, PeerId([2; 16]), now).unwrap();
        let rule = PeerRule::of_site("berlin", &[Role::Agent]);
        let signature = agent.sign(Purpose::SessionProof, b"challenge").unwrap();
        let verify = |chain, rule: &PeerRule, purpose, message: &[u8], now| {
            trust.verify_signed(chain, rule, purpose, message, &signature, now)
        };
        let ok = verify(agent.chain(), &rule, Purpose::SessionProof, b"challenge", now).unwrap();
        assert_eq!(ok.peer, PeerId([1; 16]));

        let signature_error = |result| matches!(result, Err(IdentityError::Signature(_)));
        assert!(signature_error(verify(agent.chain(), &rule, Purpose::SessionProof, b"challengf", now)));
        assert!(signature_error(verify(agent.chain(), &rule, Purpose::Grant, b"challenge", now)));
        assert!(signature_error(verify(other.chain(), &rule, Purpose::SessionProof, b"challenge", now)));
        let targets = PeerRule::of_site("berlin", &[Role::MasterTarget]);
        assert!(matches!(
            verify(agent.chain(), &targets, Purpose::SessionProof, b"challenge", now),
            Err(IdentityError::RoleRefused { .. })
        ));
        let later = Timestamp(now.0 + 31 * 86_400_000_000_000);
        assert!(matches!(
            verify(agent.chain(), &rule, Purpose::SessionProof, b"challenge", later),
            Err(IdentityError::Chain(webpki::Error::CertExpired { .. }))
        ));
        trust.revocations().revoke(Revocation::Peer(PeerId([1; 16]))).unwrap();
        assert!(matches!(
            verify(agent.chain(), &rule, Purpose::SessionProof, b"challenge", now),
            Err(IdentityError::Revoked(_))
        ));
    }

    #[test]
    fn revocation_by_serial_or_key_hits_exactly_that_certificate() {
        let (_dir, ca, trust) = site();
        let now = wall_clock();
        let rule = PeerRule::of_site("berlin", &[Role::Agent]);
        let ids: Vec<_> =
            (0..3).map(|_| ca.issue_identity(Role::Agent, PeerId([1; 16]), now).unwrap()).collect();
        trust.revocations().revoke(Revocation::Serial(ids[0].own().serial.clone())).unwrap();
        trust.revocations().revoke(Revocation::Key(ids[1].own().key_sha256)).unwrap();
        let believed: Vec<bool> = ids
            .iter()
            .map(|id| trust.verify_chain(&id.chain()[0], &[], Usage::Client, &rule, now).is_ok())
            .collect();
        assert_eq!(believed, [false, false, true]);
    }

    #[test]
    fn site_and_peer_pins_hold() {
        let (_dir, ca, trust) = site();
        let now = wall_clock();
        let id = ca.issue_identity(Role::MasterTarget, PeerId([1; 16]), now).unwrap();
        let rule = PeerRule::of_site("berlin", &[Role::MasterTarget]);
        let check = |rule: &PeerRule| trust.verify_chain(&id.chain()[0], &[], Usage::Server, rule, now);
        assert!(check(&rule.clone().only(PeerId([1; 16]))).is_ok());
        assert!(matches!(check(&rule.only(PeerId([2; 16]))), Err(IdentityError::OtherPeer { .. })));
        let elsewhere = PeerRule::of_site("hamburg", &[Role::MasterTarget]);
        assert!(matches!(check(&elsewhere), Err(IdentityError::OtherSite { .. })));
    }
}
