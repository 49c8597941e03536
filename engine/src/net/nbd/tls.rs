//! TLS of an NBD server, from a folder as qemu and libvirt lay it out.
//!
//! `ca-cert.pem` names who may connect, `server-cert.pem` and `server-key.pem` are shown to them; the key must be
//! readable by its owner only. These certificates are for people with NBD clients, and not those of our own daemons.
//!
//! Invariants: TLS 1.3, and no client without a certificate of that CA. Called by the master target.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
pub use rustls::ServerConfig as TlsConfig;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;

use crate::net::files::{self, FileError};
use crate::net::identity::{IdentityError, certificates_from_pem};

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NbdTlsError {
    /// A file cannot be read, or is readable by too many.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file holds no certificate.
    #[error(transparent)]
    Certificate(#[from] IdentityError),
    /// The key file holds no key.
    #[error("{} holds no private key in PEM form; put the server's key there", path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// They do not fit together.
    #[error("the certificates in {} cannot be used: {reason}; issue them again", dir.display())]
    Unusable {
        /// The folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The configuration of a server whose certificates lie in `dir`.
///
/// # Errors
/// When a file is missing, readable by others, or does not fit.
pub fn server_config(dir: &Path) -> Result<Arc<TlsConfig>, NbdTlsError> {
    let unusable = |reason: String| NbdTlsError::Unusable { dir: dir.into(), reason };
    let certificates = |name: &str| -> Result<_, NbdTlsError> {
        let path = dir.join(name);
        Ok(certificates_from_pem(&files::read_public(&path)?, &path.display().to_string())?)
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca-cert.pem")? {
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    let key_path = dir.join("server-key.pem");
    let key = PrivateKeyDer::from_pem_slice(&files::read_private(&key_path)?)
        .map_err(|_| NbdTlsError::Key { path: key_path })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| unusable(error.to_string()))?;
    let config = TlsConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates("server-cert.pem")?, key)
        .map_err(|error| unusable(error.to_string()))?;
    Ok(Arc::new(config))
}
