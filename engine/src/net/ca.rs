//! The master target's certificate authority.
//!
//! Invariants: ECDSA P-256; the CA key exists once, 0600, in the target's state; leaf keys are never seen here (a
//! request carries only the public half and the proof of possession); every name in a leaf is the CA's choice,
//! nothing is copied from the request; agents cannot be servers (usage); leaves are short-lived and start 5 minutes
//! in the past, so that a slightly slow clock still accepts them; serials are random.
//! Units: nanoseconds since 1970. Called by the master target and by tests.

use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::error::{Answer, Severity};
use crate::net::files::{self, Access, FileError};
use crate::net::identity::{
    self, Identity, IdentityError, PendingIdentity, Role, certificates_from_pem, is_site_name, to_pem,
};
use crate::net::trust::ROOTS_FILE;
use crate::units::{PeerId, Timestamp};

/// File of the CA's private key.
pub const CA_KEY_FILE: &str = "ca.key";
/// Leaf lifetime by default: 30 days; daemons renew when a third is left.
pub const LEAF_LIFETIME_DEFAULT: Duration = Duration::from_secs(30 * 86_400);
/// How far back validity starts, for clocks that are slow.
pub const BACKDATE: Duration = Duration::from_secs(300);
/// Largest signing request accepted, in bytes; ours have about 220.
pub const REQUEST_BYTES_MAX: usize = 4 << 10;
/// The CA's own lifetime: ten years.
const CA_LIFETIME: Duration = Duration::from_secs(3650 * 86_400);

/// Why the CA cannot work or does not issue.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of the CA.
    #[error(transparent)]
    File(#[from] FileError),
    /// The CA's certificate cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate is there but the key is not.
    #[error("{} is missing while the CA's certificate exists; restore it from the backup: every daemon trusts that key", path.display())]
    KeyMissing {
        /// The key file.
        path: std::path::PathBuf,
    },
    /// The key file holds something else.
    #[error("{} holds no ECDSA P-256 key, or not the key of the CA's certificate; restore both from one backup", path.display())]
    Key {
        /// The key file.
        path: std::path::PathBuf,
    },
    /// A site name that cannot stand in certificates.
    #[error("site name {0:?} is not usable; use 1 to 63 of a-z, 0-9, '.' and '-'")]
    Site(String),
    /// The CA belongs to another site.
    #[error(
        "the CA belongs to site {got:?}, the configuration says {expected:?}; correct `site` in the configuration"
    )]
    OtherSite {
        /// As configured.
        expected: String,
        /// As in the CA's certificate.
        got: String,
    },
    /// A request that is malformed, unsigned, too large, or of another key type.
    #[error("the certificate request is refused: {reason}")]
    Request {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[source] rcgen::Error),
}

impl Answer for CaError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub not_before: Timestamp,
    /// Until.
    pub not_after: Timestamp,
}

impl Validity {
    /// From [`BACKDATE`] before `now` for `lifetime` from `now`.
    #[must_use]
    pub fn starting(now: Timestamp, lifetime: Duration) -> Self {
        Self {
            not_before: Timestamp(now.0.saturating_sub(nanos(BACKDATE))),
            not_after: Timestamp(now.0.saturating_add(nanos(lifetime))),
        }
    }
}

/// The certificate authority.
pub struct Ca {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    site: String,
    leaf_lifetime: Duration,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("site", &self.site).finish_non_exhaustive()
    }
}

impl Ca {
    /// Opens the CA in `dir`, or creates it when there is none. A key without certificate is a creation that was
    /// interrupted; it is completed.
    ///
    /// # Errors
    /// When a file is unusable, or the CA there belongs to another site.
    pub fn open_or_create(dir: &Path, site: &str, now: Timestamp) -> Result<Self, CaError> {
        if !is_site_name(site) {
            return Err(CaError::Site(site.to_owned()));
        }
        files::create_private_dir(dir)?;
        let (key_path, certificate_path) = (dir.join(CA_KEY_FILE), dir.join(ROOTS_FILE));
        let has_certificate = certificate_path.exists();
        let key = match files::read_private(&key_path) {
            Ok(pem) => parse_key(&pem).ok_or_else(|| CaError::Key { path: key_path.clone() })?,
            Err(error) if error.is_missing() && has_certificate => {
                return Err(CaError::KeyMissing { path: key_path });
            }
            Err(error) if error.is_missing() => {
                let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(CaError::Make)?;
                files::replace(&key_path, key.serialize_pem().as_bytes(), Access::Private)?;
                key
            }
            Err(error) => return Err(error.into()),
        };
        let certificate = if has_certificate {
            let pem = files::read_public(&certificate_path)?;
            certificates_from_pem(&pem, &certificate_path.display().to_string())?.swap_remove(0)
        } else {
            let certificate = self_signed(&key, site, now)?;
            files::replace(
                &certificate_path,
                to_pem("CERTIFICATE", &certificate).as_bytes(),
                Access::Public,
            )?;
            certificate
        };
        if identity::key_sha256(&certificate)? != identity::sha256(&spki(&key)) {
            return Err(CaError::Key { path: key_path });
        }
        let got = identity::organization(&certificate)?.unwrap_or_default();
        if got != site {
            return Err(CaError::OtherSite { expected: site.to_owned(), got });
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(CaError::Make)?;
        Ok(Self { certificate, issuer, site: got, leaf_lifetime: LEAF_LIFETIME_DEFAULT })
    }

    /// Issues leaves of another lifetime.
    #[must_use]
    pub fn with_leaf_lifetime(self, leaf_lifetime: Duration) -> Self {
        Self { leaf_lifetime, ..self }
    }

    /// The CA's certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The site every name carries.
    #[must_use]
    pub fn site(&self) -> &str {
        &self.site
    }

    /// What invitation tokens pin.
    ///
    /// # Errors
    /// Not for a CA that was opened.
    pub fn key_sha256(&self) -> Result<[u8; 32], IdentityError> {
        identity::key_sha256(&self.certificate)
    }

    /// Issues for `request` (DER) with the default lifetime from `now`: leaf and CA certificate.
    ///
    /// # Errors
    /// As for [`Self::issue`].
    pub fn issue_now(
        &self,
        request: &[u8],
        role: Role,
        peer: PeerId,
        now: Timestamp,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.issue(request, role, peer, Validity::starting(now, self.leaf_lifetime))
    }

    /// Issues for `request` (DER). Only its public key is used.
    ///
    /// # Errors
    /// When the request is malformed, not signed by its key, or not for ECDSA P-256.
    pub fn issue(
        &self,
        request: &[u8],
        role: Role,
        peer: PeerId,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        if request.len() > REQUEST_BYTES_MAX {
            return Err(CaError::Request { reason: "it is larger than 4 KiB" });
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|_| CaError::Request { reason: "it is malformed or not signed by its own key" })?;
        if *request.public_key.algorithm() != rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(CaError::Request { reason: "its key is not ECDSA P-256" });
        }
        let params = self.leaf_params(role, peer, validity)?;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(CaError::Make)?;
        Ok(vec![leaf.into(), self.certificate.clone()])
    }

    /// Makes a key here and issues for it: the master target's own identity.
    ///
    /// # Errors
    /// As for [`Self::issue`].
    pub fn issue_identity(&self, role: Role, peer: PeerId, now: Timestamp) -> Result<Identity, CaError> {
        let pending = PendingIdentity::generate()?;
        let chain = self.issue_now(&pending.request()?, role, peer, now)?;
        Ok(pending.complete(chain)?)
    }

    fn leaf_params(
        &self,
        role: Role,
        peer: PeerId,
        validity: Validity,
    ) -> Result<CertificateParams, CaError> {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(1970, 1, 1) + seconds(validity.not_before);
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + seconds(validity.not_after);
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, self.site.as_str());
        params.distinguished_name.push(DnType::CommonName, format!("{role} {peer}"));
        let uri = identity::uri(&self.site, role, peer).try_into().map_err(CaError::Make)?;
        let dns = identity::server_name(peer).try_into().map_err(CaError::Make)?;
        params.subject_alt_names = vec![SanType::URI(uri), SanType::DnsName(dns)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if role.is_server() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }
}

fn self_signed(key: &KeyPair, site: &str, now: Timestamp) -> Result<CertificateDer<'static>, CaError> {
    let mut params = CertificateParams::default();
    let validity = Validity::starting(now, CA_LIFETIME);
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + seconds(validity.not_before);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + seconds(validity.not_after);
    params.serial_number = Some(random_serial()?);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, site);
    params.distinguished_name.push(DnType::CommonName, "Reprotect CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params.self_signed(key).map_err(CaError::Make)?.into())
}

fn parse_key(pem: &[u8]) -> Option<KeyPair> {
    let pem = std::str::from_utf8(pem).ok()?;
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ECDSA_P256_SHA256).ok()
}

fn spki(key: &KeyPair) -> Vec<u8> {
    rcgen::PublicKeyData::subject_public_key_info(key)
}

fn random_serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(|_| IdentityError::Randomness)?;
    // Positive and of full length, so that no encoding shortens or extends it.
    if let Some(first) = bytes.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    Ok(SerialNumber::from_slice(&bytes))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whole seconds, as certificates have them; a `Timestamp` ends in 2554, far inside what a certificate can hold.
fn seconds(at: Timestamp) -> Duration {
    Duration::from_secs(at.0 / 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::net::identity::PeerIdentity;
    use crate::net::wall_clock;

    #[test]
    fn the_ca_is_the_same_after_a_restart_and_refuses_another_site() {
        let dir = tempfile::tempdir().unwrap();
        let first = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let again = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        assert_eq!(first.certificate(), again.certificate());
        assert!(matches!(
            Ca::open_or_create(dir.path(), "hamburg", wall_clock()),
            Err(CaError::OtherSite { .. })
        ));
        assert!(matches!(Ca::open_or_create(dir.path(), "Not OK", wall_clock()), Err(CaError::Site(_))));
    }

    #[test]
    fn an_interrupted_creation_is_completed_and_a_lost_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let first = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap().key_sha256().unwrap();
        std::fs::remove_file(dir.path().join(ROOTS_FILE)).unwrap();
        let again = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap().key_sha256().unwrap();
        assert_eq!(first, again, "the key stays");
        std::fs::remove_file(dir.path().join(CA_KEY_FILE)).unwrap();
        assert!(matches!(
            Ca::open_or_create(dir.path(), "berlin", wall_clock()),
            Err(CaError::KeyMissing { .. })
        ));
    }

    #[test]
    fn a_key_others_can_read_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let key = dir.path().join(CA_KEY_FILE);
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap_err();
        assert!(error.to_string().contains(&format!("chmod 600 {}", key.display())), "{error}");
    }

    #[test]
    fn leaves_carry_our_names_only_and_random_serials() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut wish = CertificateParams::default();
        wish.subject_alt_names = vec![SanType::URI(
            identity::uri("berlin", Role::MasterTarget, PeerId([9; 16])).try_into().unwrap(),
        )];
        let request = wish.serialize_request(&key).unwrap();
        let now = wall_clock();
        let mut serials = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let chain = ca.issue_now(request.der(), Role::Agent, PeerId([1; 16]), now).unwrap();
            let got = PeerIdentity::from_certificate(&chain[0]).unwrap();
            assert_eq!((got.role, got.peer, got.site.as_str()), (Role::Agent, PeerId([1; 16]), "berlin"));
            assert_eq!(got.not_after.0 - got.not_before.0, (30 * 86_400 + 300) * 1_000_000_000);
            assert!(serials.insert(got.serial));
        }
    }

    #[test]
    fn requests_that_are_garbage_tampered_or_of_other_keys_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let issue = |request: &[u8]| ca.issue_now(request, Role::Agent, PeerId([1; 16]), wall_clock());
        let good = PendingIdentity::generate().unwrap().request().unwrap();
        let key =
            |chain: &[CertificateDer<'_>]| PeerIdentity::from_certificate(&chain[0]).unwrap().key_sha256;
        let own = key(&issue(&good).unwrap());
        for at in 0..good.len() {
            assert!(issue(&good[..at]).is_err());
            let mut bad = good.clone();
            bad[at] ^= 1;
            // The signature does not cover its own wrapping, which the parser reads leniently; the key it covers.
            match issue(&bad) {
                Ok(chain) => assert_eq!(key(&chain), own, "byte {at}"),
                Err(error) => assert!(matches!(error, CaError::Request { .. }), "byte {at}: {error}"),
            }
        }
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let request = CertificateParams::default().serialize_request(&other).unwrap();
        assert!(matches!(issue(request.der()), Err(CaError::Request { .. })));
        assert!(matches!(issue(&vec![0; REQUEST_BYTES_MAX + 1]), Err(CaError::Request { .. })));
    }
}
