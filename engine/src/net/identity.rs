//! Who a daemon is: its certificate, its key, and the name `reprotect://<site>/<role>/<uuid>` inside.
//!
//! Invariants: a [`PeerIdentity`] is only a *reading* of a certificate, believed after `trust` verified the chain;
//! exactly one name of our scheme per certificate, spelled canonically, so that one identity has one spelling; the
//! key is ECDSA P-256, stays on the machine that made it, and shares one 0600 file with its certificate, so that the
//! two are replaced together. What the key signs outside TLS carries a purpose, so that no signature can be
//! taken for another's. Units: times are nanoseconds since 1970. Called by `tls`, `ca`, `enroll`, `grant`.

use std::fmt;
use std::path::Path;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::error::{Answer, Severity};
pub use crate::format::handshake::Role;
use crate::net::files::{self, Access, FileError};
use crate::units::{PeerId, Timestamp};

/// Largest certificate accepted, in bytes; ours have about 600.
pub const CERTIFICATE_BYTES_MAX: usize = 8 << 10;
/// Most certificates in a chain: leaf, two intermediates, root.
pub const CHAIN_CERTIFICATES_MAX: usize = 4;
/// Longest site name in bytes.
pub const SITE_BYTES_MAX: usize = 63;
/// File that holds a daemon's key and certificate chain.
pub const IDENTITY_FILE: &str = "identity.pem";

/// What a signature outside TLS is for; part of the signed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An agent proves itself to the master target through a relay.
    SessionProof,
    /// A master target allows an agent to write a disk.
    Grant,
}

impl Purpose {
    /// The bytes that are signed for `message`. The zero byte ends the label, so no label is a prefix of another.
    #[must_use]
    pub fn bound(self, message: &[u8]) -> Vec<u8> {
        let label: &[u8] = match self {
            Self::SessionProof => b"reprotect session proof 1\0",
            Self::Grant => b"reprotect grant 1\0",
        };
        [label, message].concat()
    }
}

/// Why an identity cannot be used or a peer is not believed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of the identity.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not what a PEM file of this kind holds.
    #[error("{name} holds no usable {what}; enrol again, or give a PEM file with one")]
    Pem {
        /// The file or input.
        name: String,
        /// What is missing.
        what: &'static str,
    },
    /// Not ECDSA P-256 in PKCS#8.
    #[error(
        "the private key is not ECDSA P-256 in PKCS#8 form; convert it with `openssl pkcs8 -topk8 -nocrypt`, or make one with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256`"
    )]
    Key,
    /// Key and certificate do not belong together.
    #[error("the private key does not belong to the certificate of {peer}; enrol again")]
    KeyMismatch {
        /// The certificate's peer.
        peer: PeerId,
    },
    /// Not a certificate, or one beyond the bounds.
    #[error("malformed certificate: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No name of ours, or not exactly one.
    #[error(
        "the certificate has {count} names of the form reprotect://SITE/ROLE/UUID and must have exactly one; issue it with that URI as subject alternative name"
    )]
    Name {
        /// How many it has.
        count: usize,
    },
    /// More certificates than any valid chain has.
    #[error("the certificate chain has {count} certificates; at most {CHAIN_CERTIFICATES_MAX} are accepted")]
    ChainTooLong {
        /// How many came.
        count: usize,
    },
    /// The chain does not lead to a trusted root, or is not valid now or for this use.
    #[error("certificate refused: {0}; check the clocks, the CA and the certificate's usage")]
    Chain(#[source] webpki::Error),
    /// The peer is something else than is allowed here.
    #[error("{peer} is of role {got}, which may not speak here")]
    RoleRefused {
        /// Who.
        peer: PeerId,
        /// What it is.
        got: Role,
    },
    /// Another peer answered than the expected one.
    #[error("{got} answered where {expected} was expected; check the address, or enrol with the new server")]
    OtherPeer {
        /// Who was expected.
        expected: PeerId,
        /// Who answered.
        got: PeerId,
    },
    /// A peer of another site.
    #[error("the peer belongs to site {got:?}, not to {expected:?}")]
    OtherSite {
        /// Our site.
        expected: String,
        /// Its site.
        got: String,
    },
    /// Revoked.
    #[error("{0} is revoked; if that was a mistake, enrol it again")]
    Revoked(PeerId),
    /// A signature that does not fit.
    #[error("the signature of {0} does not fit what it claims to sign")]
    Signature(PeerId),
    /// The key could not sign or be made: no randomness.
    #[error("cannot use the private key: the operating system gave no randomness")]
    Randomness,
}

impl Answer for IdentityError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// What a certificate says about its holder. A reading, not a verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// What it is.
    pub role: Role,
    /// Who it is.
    pub peer: PeerId,
    /// Where it belongs.
    pub site: String,
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
    /// Serial number, big-endian.
    pub serial: Vec<u8>,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub key_sha256: [u8; 32],
}

impl PeerIdentity {
    /// Reads a certificate of at most [`CERTIFICATE_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// [`IdentityError::Malformed`], [`IdentityError::Name`].
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let parsed = parse_certificate(certificate)?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|_| IdentityError::Malformed { reason: "its alternative names cannot be read" })?;
        let ours: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with("reprotect:") => Some(*uri),
                _ => None,
            })
            .collect();
        let &[uri] = ours.as_slice() else { return Err(IdentityError::Name { count: ours.len() }) };
        let (site, role, peer) = parse_uri(uri).ok_or(IdentityError::Name { count: 0 })?;
        Ok(Self {
            role,
            peer,
            site: site.to_owned(),
            not_before: timestamp(parsed.validity().not_before.timestamp()),
            not_after: timestamp(parsed.validity().not_after.timestamp()),
            serial: parsed.raw_serial().to_vec(),
            key_sha256: sha256(parsed.public_key().raw),
        })
    }

    /// The name in the certificate.
    #[must_use]
    pub fn uri(&self) -> String {
        uri(&self.site, self.role, self.peer)
    }
}

/// `reprotect://<site>/<role>/<uuid>`.
#[must_use]
pub fn uri(site: &str, role: Role, peer: PeerId) -> String {
    format!("reprotect://{site}/{role}/{peer}")
}

/// The DNS name a client asks for when it wants exactly `peer`. It resolves nowhere; it only names the certificate.
#[must_use]
pub fn server_name(peer: PeerId) -> String {
    format!("{peer}.reprotect.internal")
}

/// Whether `site` can stand in a name: 1 to 63 of `a-z`, `0-9`, `.` and `-`.
#[must_use]
pub fn is_site_name(site: &str) -> bool {
    (1..=SITE_BYTES_MAX).contains(&site.len())
        && site.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'))
}

fn parse_uri(text: &str) -> Option<(&str, Role, PeerId)> {
    let mut parts = text.strip_prefix("reprotect://")?.split('/');
    let (site, role, peer) = (parts.next()?, Role::parse(parts.next()?)?, PeerId::parse(parts.next()?).ok()?);
    // Comparing with the rebuilt text refuses every other spelling of the UUID and anything after it.
    (is_site_name(site) && peer != PeerId::NONE && uri(site, role, peer) == text)
        .then_some((site, role, peer))
}

fn parse_certificate<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    if certificate.len() > CERTIFICATE_BYTES_MAX {
        return Err(IdentityError::Malformed { reason: "it is larger than 8 KiB" });
    }
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(IdentityError::Malformed { reason: "bytes follow its end" }),
        Err(_) => Err(IdentityError::Malformed { reason: "it is not X.509" }),
    }
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo, as tokens pin it.
///
/// # Errors
/// [`IdentityError::Malformed`].
pub fn key_sha256(certificate: &CertificateDer<'_>) -> Result<[u8; 32], IdentityError> {
    Ok(sha256(parse_certificate(certificate)?.public_key().raw))
}

/// The organisation in a certificate's subject; CAs of ours keep the site there.
pub(crate) fn organization(certificate: &CertificateDer<'_>) -> Result<Option<String>, IdentityError> {
    let parsed = parse_certificate(certificate)?;
    Ok(parsed.subject().iter_organization().next().and_then(|name| name.as_str().ok()).map(str::to_owned))
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

fn timestamp(seconds: i64) -> Timestamp {
    Timestamp(u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000_000))
}

/// A key without a certificate yet.
pub struct PendingIdentity {
    key: rcgen::KeyPair,
}

impl PendingIdentity {
    /// Makes a new key.
    ///
    /// # Errors
    /// [`IdentityError::Randomness`].
    pub fn generate() -> Result<Self, IdentityError> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(|_| IdentityError::Randomness)?;
        Ok(Self { key })
    }

    /// A certificate signing request (DER): the public key and the proof that we hold the private one. It asks for no
    /// names: those are the CA's to give.
    ///
    /// # Errors
    /// [`IdentityError::Randomness`].
    pub fn request(&self) -> Result<Vec<u8>, IdentityError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(&self.key).map_err(|_| IdentityError::Randomness)?;
        Ok(request.der().to_vec())
    }

    /// Joins the key with the chain issued for it.
    ///
    /// # Errors
    /// As for [`Identity::new`].
    pub fn complete(self, chain: Vec<CertificateDer<'static>>) -> Result<Identity, IdentityError> {
        Identity::new(chain, PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

/// A daemon's own certificate chain and key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
    signer: EcdsaKeyPair,
    own: PeerIdentity,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Identity {
    /// Joins a chain (leaf first) and the leaf's key.
    ///
    /// # Errors
    /// When the leaf has no name of ours, the chain is too long, or the key is not its key.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, IdentityError> {
        if chain.len() > CHAIN_CERTIFICATES_MAX {
            return Err(IdentityError::ChainTooLong { count: chain.len() });
        }
        let leaf = chain.first().ok_or(IdentityError::Malformed { reason: "the chain is empty" })?;
        let own = PeerIdentity::from_certificate(leaf)?;
        let signer = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_ASN1_SIGNING,
            key.secret_pkcs8_der(),
            &SystemRandom::new(),
        )
        .map_err(|_| IdentityError::Key)?;
        if parse_certificate(leaf)?.public_key().subject_public_key.data.as_ref()
            != signer.public_key().as_ref()
        {
            return Err(IdentityError::KeyMismatch { peer: own.peer });
        }
        Ok(Self { chain, key, signer, own })
    }

    /// Loads [`IDENTITY_FILE`] from a state directory.
    ///
    /// # Errors
    /// When it is missing, readable by others, or not a key with its certificate.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(IDENTITY_FILE);
        let pem = files::read_private(&path)?;
        Self::from_pem(&pem, &pem, &path.display().to_string())
    }

    /// Loads a chain and a key that a site's own PKI issued.
    ///
    /// # Errors
    /// As for [`Self::load`]; only the key file must be private.
    pub fn load_files(chain: &Path, key: &Path) -> Result<Self, IdentityError> {
        Self::from_pem(&files::read_public(chain)?, &files::read_private(key)?, &chain.display().to_string())
    }

    fn from_pem(chain: &[u8], key: &[u8], name: &str) -> Result<Self, IdentityError> {
        let chain = certificates_from_pem(chain, name)?;
        match PrivateKeyDer::from_pem_slice(key) {
            Ok(PrivateKeyDer::Pkcs8(key)) => Self::new(chain, key),
            Ok(_) => Err(IdentityError::Key),
            Err(_) => Err(IdentityError::Pem { name: name.to_owned(), what: "private key" }),
        }
    }

    /// Saves key and chain together, atomically, 0600.
    ///
    /// # Errors
    /// When the directory cannot be made or the file not written.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        files::create_private_dir(dir)?;
        let mut text = to_pem("PRIVATE KEY", self.key.secret_pkcs8_der());
        for certificate in &self.chain {
            text.push_str(&to_pem("CERTIFICATE", certificate));
        }
        Ok(files::replace(&dir.join(IDENTITY_FILE), text.as_bytes(), Access::Private)?)
    }

    /// What the certificate says.
    #[must_use]
    pub fn own(&self) -> &PeerIdentity {
        &self.own
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The key, for rustls.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }

    /// Whether a third or less of the certificate's life is left: time to renew.
    #[must_use]
    pub fn is_due_for_renewal(&self, now: Timestamp) -> bool {
        let life = self.own.not_after.0.saturating_sub(self.own.not_before.0);
        self.own.not_after.0.saturating_sub(now.0) <= life / 3
    }

    /// Signs `message` for one purpose (ECDSA P-256, SHA-256, ASN.1: at most 72 bytes).
    ///
    /// # Errors
    /// [`IdentityError::Randomness`].
    pub fn sign(&self, purpose: Purpose, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let signature = self
            .signer
            .sign(&SystemRandom::new(), &purpose.bound(message))
            .map_err(|_| IdentityError::Randomness)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// All certificates of a PEM text, at least one.
pub(crate) fn certificates_from_pem(
    pem: &[u8],
    name: &str,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let missing = || IdentityError::Pem { name: name.to_owned(), what: "certificate" };
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| missing())?;
    if all.is_empty() { Err(missing()) } else { Ok(all) }
}

/// PEM text of one DER object.
pub(crate) fn to_pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for (at, letter) in body.chars().enumerate() {
        if at > 0 && at % 64 == 0 {
            text.push('\n');
        }
        text.push(letter);
    }
    text.push_str(&format!("\n-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::ca::Ca;
    use crate::net::wall_clock;

    #[test]
    fn names_have_one_spelling() {
        let peer = PeerId([0xAB; 16]);
        let good = uri("berlin-1", Role::Agent, peer);
        assert_eq!(parse_uri(&good), Some(("berlin-1", Role::Agent, peer)));
        let bad = [
            good.to_uppercase(),
            good.replace("abab", "ABAB"),
            good.replace('-', ""),
            format!("{good}/"),
            format!("{good}/x"),
            format!("{good}#"),
            good.replace("agent", "root"),
            good.replace("berlin-1", ""),
            good.replace("berlin-1", "Berlin"),
            good.replace("reprotect:", "http:"),
            uri("berlin-1", Role::Agent, PeerId::NONE),
            String::new(),
        ];
        for text in bad {
            assert_eq!(parse_uri(&text), None, "{text}");
        }
    }

    #[test]
    fn an_identity_survives_its_file_and_is_refused_when_others_can_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(&dir.path().join("ca"), "berlin", wall_clock()).unwrap();
        let peer = PeerId::random().unwrap();
        let identity = ca.issue_identity(Role::ProcessServer, peer, wall_clock()).unwrap();
        identity.save(dir.path()).unwrap();
        let loaded = Identity::load(dir.path()).unwrap();
        assert_eq!(loaded.own(), identity.own());
        assert_eq!(loaded.own().uri(), uri("berlin", Role::ProcessServer, peer));

        let path = dir.path().join(IDENTITY_FILE);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Identity::load(dir.path()).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let one = ca.issue_identity(Role::Agent, PeerId([1; 16]), wall_clock()).unwrap();
        let two = ca.issue_identity(Role::Agent, PeerId([2; 16]), wall_clock()).unwrap();
        let mixed = Identity::new(one.chain().to_vec(), two.key.clone_key());
        assert!(matches!(mixed, Err(IdentityError::KeyMismatch { .. })));
    }

    #[test]
    fn garbage_is_never_a_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let good = ca.issue_identity(Role::Agent, PeerId([1; 16]), wall_clock()).unwrap().chain()[0].to_vec();
        for cut in 0..good.len() {
            assert!(PeerIdentity::from_certificate(&CertificateDer::from(&good[..cut])).is_err());
        }
        let mut longer = good.clone();
        longer.push(0);
        assert!(PeerIdentity::from_certificate(&CertificateDer::from(longer)).is_err());
        assert!(
            PeerIdentity::from_certificate(&CertificateDer::from(vec![0; CERTIFICATE_BYTES_MAX + 1]))
                .is_err()
        );
    }
}
