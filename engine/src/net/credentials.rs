//! Where a daemon's identity and the roots it trusts come from: its enrolment, or the site's own PKI.
//!
//! Invariants: both ways lead to the same checks (private key files, matching key, URI name); an identity of the
//! site's own PKI is never replaced by renewal here. Called by the three programs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::identity::{Identity, IdentityError};
use super::revocations::Revocations;
use super::trust::{ROOTS_FILE, Trust};

/// A daemon's credentials on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// In a state directory, as enrolment left them there.
    Enrolled(PathBuf),
    /// Files of the site's own PKI.
    Own {
        /// Certificate chain, leaf first.
        certificate: PathBuf,
        /// Its private key.
        key: PathBuf,
        /// The certificates to trust.
        roots: PathBuf,
    },
}

impl Credentials {
    /// Those of a state directory, unless certificate, key and roots of the site's own PKI are configured.
    #[must_use]
    pub fn new(state_dir: &Path, own: Option<[PathBuf; 3]>) -> Self {
        match own {
            Some([certificate, key, roots]) => Self::Own { certificate, key, roots },
            None => Self::Enrolled(state_dir.to_owned()),
        }
    }

    /// The identity.
    ///
    /// # Errors
    /// When a file is missing, readable by others where it must not be, or not what it should be.
    pub fn identity(&self) -> Result<Identity, IdentityError> {
        match self {
            Self::Enrolled(dir) => Identity::load(dir),
            Self::Own { certificate, key, .. } => Identity::load_files(certificate, key),
        }
    }

    /// Whom to believe.
    ///
    /// # Errors
    /// When the roots are missing or malformed.
    pub fn trust(&self, revocations: Arc<Revocations>) -> Result<Trust, IdentityError> {
        match self {
            Self::Enrolled(dir) => Trust::load(&dir.join(ROOTS_FILE), revocations),
            Self::Own { roots, .. } => Trust::load(roots, revocations),
        }
    }

    /// The state directory where a renewed identity is kept; `None` where renewal is the site's business.
    #[must_use]
    pub fn renewed_in(&self) -> Option<&Path> {
        match self {
            Self::Enrolled(dir) => Some(dir),
            Self::Own { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::ca::Ca;
    use crate::net::identity::{IDENTITY_FILE, Role};
    use crate::net::wall_clock;
    use crate::units::PeerId;

    #[test]
    fn the_same_files_serve_as_enrolment_and_as_own_pki() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(&dir.path().join("ca"), "lyon", wall_clock()).unwrap();
        let identity = ca.issue_identity(Role::Agent, PeerId::random().unwrap(), wall_clock()).unwrap();
        identity.save(dir.path()).unwrap();
        std::fs::copy(dir.path().join("ca").join(ROOTS_FILE), dir.path().join(ROOTS_FILE)).unwrap();
        let file = dir.path().join(IDENTITY_FILE);
        let files = [file.clone(), file, dir.path().join(ROOTS_FILE)];
        for own in [None, Some(files)] {
            let credentials = Credentials::new(dir.path(), own);
            assert_eq!(credentials.identity().unwrap().own().peer, identity.own().peer);
            credentials.trust(Arc::new(Revocations::in_memory())).unwrap();
        }
        assert!(Credentials::new(&dir.path().join("none"), None).identity().is_err());
    }
}
