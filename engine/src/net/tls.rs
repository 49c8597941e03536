//! rustls configurations: TLS 1.3, both sides certified, our trust instead of names in DNS.
//!
//! Invariants: exactly one protocol version; no early data, no tickets, no session cache, so that every connection is
//! a full handshake that sees the revocation list; the server's list of protocols is its whole offer, and a client
//! without a common one is refused in the handshake. One UDP port serves both protocols, so the server *asks for* a
//! client certificate but completes without one (enrolment has none); `endpoint` drops a data connection without one
//! before a stream can exist. A certificate that is shown is always verified. Called by `endpoint` and `enroll`.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::error::{Answer, Severity};
use crate::net::identity::{CHAIN_CERTIFICATES_MAX, Identity, IdentityError, key_sha256};
use crate::net::revocations::Revocations;
use crate::net::trust::{PeerRule, Trust, Usage};
use crate::net::{ALPN_DATA, ALPN_ENROLL};
use crate::units::Timestamp;

/// A TLS configuration that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the TLS configuration: {0}; enrol again if the identity is damaged")]
pub struct TlsError(#[from] rustls::Error);

impl Answer for TlsError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// The cryptography: ring, with AES-128 first: it has no known weakness that AES-256 would mend for one session, and
/// costs less per gigabyte (measured numbers stand at `endpoint::TransportSettings`).
fn crypto() -> Arc<CryptoProvider> {
    let mut crypto = provider::default_provider();
    crypto.cipher_suites = vec![
        provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
        provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(crypto)
}

/// The configuration of a daemon that accepts: clients by `clients`, and enrolment when `enrolment`.
///
/// # Errors
/// When rustls refuses the identity.
pub fn server_config(
    identity: &Identity,
    trust: Arc<Trust>,
    clients: PeerRule,
    enrolment: bool,
) -> Result<ServerConfig, TlsError> {
    let verifier = Arc::new(PeerVerifier::new(Some(trust), clients));
    let mut config = ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain().to_vec(), identity.private_key())?;
    config.alpn_protocols = vec![ALPN_DATA.to_vec()];
    if enrolment {
        config.alpn_protocols.push(ALPN_ENROLL.to_vec());
    }
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// The configuration of a daemon that dials a server by `server`, for the data protocol.
///
/// # Errors
/// When rustls refuses the identity.
pub fn client_config(
    identity: &Identity,
    trust: Arc<Trust>,
    server: PeerRule,
) -> Result<ClientConfig, TlsError> {
    client(PeerVerifier::new(Some(trust), server), Some(identity), ALPN_DATA)
}

/// The configuration of a daemon that renews its certificate at a server by `server`.
///
/// # Errors
/// When rustls refuses the identity.
pub fn renewal_config(
    identity: &Identity,
    trust: Arc<Trust>,
    server: PeerRule,
) -> Result<ClientConfig, TlsError> {
    client(PeerVerifier::new(Some(trust), server), Some(identity), ALPN_ENROLL)
}

/// The configuration of a machine that enrols: it has no identity and trusts the CA whose key hash its token names,
/// which the server sends in its chain.
///
/// # Errors
/// Not in practice.
pub fn enrolment_config(ca_key_sha256: [u8; 32], server: PeerRule) -> Result<ClientConfig, TlsError> {
    let verifier = PeerVerifier { pin: Some(ca_key_sha256), ..PeerVerifier::new(None, server) };
    client(verifier, None, ALPN_ENROLL)
}

fn client(
    verifier: PeerVerifier,
    identity: Option<&Identity>,
    protocol: &[u8],
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous() // rustls' word for an own verifier; ours is stricter than the default
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => builder.with_client_auth_cert(identity.chain().to_vec(), identity.private_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// Finds the CA a token pins in the chain a server sent.
///
/// # Errors
/// When it is not there: another server answered, or its CA was replaced.
pub fn pinned_root<'a>(
    chain: &'a [CertificateDer<'a>],
    ca_key_sha256: &[u8; 32],
) -> Result<&'a CertificateDer<'a>, IdentityError> {
    chain
        .iter()
        .take(CHAIN_CERTIFICATES_MAX)
        .find(|certificate| key_sha256(certificate).is_ok_and(|hash| hash == *ca_key_sha256))
        .ok_or(IdentityError::Chain(webpki::Error::UnknownIssuer))
}

/// Both directions of certificate verification.
#[derive(Debug)]
struct PeerVerifier {
    trust: Option<Arc<Trust>>,
    /// Instead of `trust`: the SHA-256 of the CA's key, for enrolment.
    pin: Option<[u8; 32]>,
    rule: PeerRule,
    crypto: Arc<CryptoProvider>,
}

impl PeerVerifier {
    fn new(trust: Option<Arc<Trust>>, rule: PeerRule) -> Self {
        Self { trust, pin: None, rule, crypto: crypto() }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let nanos = Duration::from_secs(now.as_secs()).as_nanos();
        let now = Timestamp(u64::try_from(nanos).unwrap_or(u64::MAX));
        let result = match (&self.trust, &self.pin) {
            (Some(trust), _) => trust.verify_chain(leaf, intermediates, usage, &self.rule, now),
            (None, Some(pin)) => pinned_root(intermediates, pin).and_then(|root| {
                let trust = Trust::new(std::slice::from_ref(root), Arc::new(Revocations::in_memory()))?;
                trust.verify_chain(leaf, intermediates, usage, &self.rule, now)
            }),
            (None, None) => Err(IdentityError::Chain(webpki::Error::UnknownIssuer)),
        };
        result.map(drop).map_err(|error| {
            tracing::debug!(%error, "peer certificate refused");
            refusal(error)
        })
    }

    fn verify_handshake(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.crypto.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }
}

/// A refusal that reads as a sentence where rustls prints causes by `Debug`.
#[derive(thiserror::Error)]
#[error(transparent)]
struct Reason(IdentityError);

impl std::fmt::Debug for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&self.0, f)
    }
}

/// The TLS alert a refusal becomes; what has no alert of its own keeps its whole reason.
fn refusal(error: IdentityError) -> rustls::Error {
    let reason = match error {
        IdentityError::Chain(webpki::Error::CertExpired { .. }) => CertificateError::Expired,
        IdentityError::Chain(webpki::Error::CertNotValidYet { .. }) => CertificateError::NotValidYet,
        // A CA of the same name with another key is as unknown as one of another name.
        IdentityError::Chain(webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey) => {
            CertificateError::UnknownIssuer
        }
        IdentityError::Chain(webpki::Error::RequiredEkuNotFoundContext(_)) => {
            CertificateError::InvalidPurpose
        }
        IdentityError::Revoked(_) => CertificateError::Revoked,
        IdentityError::Malformed { .. } | IdentityError::ChainTooLong { .. } => CertificateError::BadEncoding,
        IdentityError::RoleRefused { .. } => CertificateError::ApplicationVerificationFailure,
        other => CertificateError::Other(OtherError(Arc::new(Reason(other)))),
    };
    rustls::Error::InvalidCertificate(reason)
}

fn tls12_is_not_spoken() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic)
}

impl ServerCertVerifier for PeerVerifier {
    /// The name asked for is not looked at: the rule pins the peer by the name in its certificate instead, which also
    /// serves a site whose own PKI puts no DNS names into certificates.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, Usage::Server, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_is_not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_handshake(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.crypto.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false // enrolment has no certificate yet; see the head of this file
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, Usage::Client, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_is_not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_handshake(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.crypto.signature_verification_algorithms.supported_schemes()
    }
}
