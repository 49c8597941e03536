//! Who this process server is and where it belongs: its identity, renewed while it runs, and the targets it was
//! enrolled at.
//!
//! Invariants: `upstream.json` is written before the identity, so an identity that is there has its addresses; it is
//! used only while the configuration names no targets; a renewed identity is durable before it is used; connections
//! that exist keep the old one, new ones use the new one. Called by `daemon`, `check` and the `enroll` command.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use reprotect_engine::host::places::MASTER_TARGET_PORT;
use reprotect_engine::host::values::{AddressText, HostPort};
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::files::{self, Access, FileError};
use reprotect_engine::net::identity::{IDENTITY_FILE, Identity, IdentityError, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::token::Token;
use reprotect_engine::net::trust::Trust;
use serde::{Deserialize, Serialize};

/// File of the enrolment's targets in the state directory.
pub const UPSTREAM_FILE: &str = "upstream.json";

/// Why identity, trust or targets cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// There is no identity.
    #[error("not enrolled ({} does not exist): run `reprotect-process-server enroll TOKEN` with a token from `reprotect-master-target invite --role process-server`", .0.display())]
    NotEnrolled(PathBuf),
    /// The identity is another program's.
    #[error(
        "this identity is of role {got}; name a process server's --state-dir or certificate, or enrol this one"
    )]
    WrongRole {
        /// What it is.
        got: Role,
    },
    /// Identity or roots are damaged.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The file of targets.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file of targets is not what we wrote.
    #[error(
        "{} is damaged ({reason}); write the master targets as `targets` into the configuration, or enrol again",
        path.display()
    )]
    Upstream {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Nowhere to go.
    #[error(
        "no master target is known: {} does not exist and `targets` is empty; write `targets = [\"HOST\"]` into the configuration",
        .0.display()
    )]
    NoTargets(PathBuf),
}

impl reprotect_engine::error::Answer for EnrolmentError {
    fn severity(&self) -> reprotect_engine::error::Severity {
        reprotect_engine::error::Severity::Stop
    }
}

/// The identity in force.
#[derive(Debug)]
pub struct Own {
    current: RwLock<Arc<Identity>>,
    credentials: Credentials,
}

impl Own {
    /// Loads the identity.
    ///
    /// # Errors
    /// When it is missing, damaged, readable by others or not a process server's.
    pub fn load(credentials: &Credentials) -> Result<Self, EnrolmentError> {
        let identity = credentials.identity().map_err(|error| match (error, credentials) {
            (IdentityError::File(file), Credentials::Enrolled(dir)) if file.is_missing() => {
                EnrolmentError::NotEnrolled(dir.join(IDENTITY_FILE))
            }
            (other, _) => other.into(),
        })?;
        if identity.own().role != Role::ProcessServer {
            return Err(EnrolmentError::WrongRole { got: identity.own().role });
        }
        Ok(Self { current: RwLock::new(Arc::new(identity)), credentials: credentials.clone() })
    }

    /// Whether renewal is this daemon's business and not the site's.
    #[must_use]
    pub fn is_renewed_here(&self) -> bool {
        self.credentials.renewed_in().is_some()
    }

    /// The identity to use now.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Saves a renewed identity, then uses it.
    ///
    /// # Errors
    /// When it cannot be saved; the old one stays in use.
    pub fn replace(&self, identity: Identity) -> Result<(), IdentityError> {
        if let Some(dir) = self.credentials.renewed_in() {
            identity.save(dir)?;
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
        Ok(())
    }
}

/// The roots to believe. Revocations are the master target's to tell: it closes its end, and
/// an agent that proves nothing to it gets nothing through this relay.
///
/// # Errors
/// When they are missing or damaged.
pub fn trust(credentials: &Credentials) -> Result<Arc<Trust>, EnrolmentError> {
    Ok(Arc::new(credentials.trust(Arc::new(Revocations::in_memory()))?))
}

#[derive(Debug, Serialize, Deserialize)]
struct UpstreamFile {
    /// The master target's identity, for people.
    target: String,
    addresses: Vec<String>,
}

/// Keeps the token's addresses for use while the configuration names none.
///
/// # Errors
/// When the file cannot be written.
pub fn save_targets(state_dir: &Path, token: &Token) -> Result<(), FileError> {
    let file = UpstreamFile { target: token.target.to_string(), addresses: token.addresses.clone() };
    files::create_private_dir(state_dir)?;
    // Strings always have a JSON form.
    let text = serde_json::to_string_pretty(&file).unwrap_or_default();
    files::replace(&state_dir.join(UPSTREAM_FILE), format!("{text}\n").as_bytes(), Access::Public)
}

/// The targets in force: the configured ones, else those of the enrolment.
///
/// # Errors
/// When there are none, or the file is damaged.
pub fn targets(configured: &[HostPort], state_dir: &Path) -> Result<Vec<HostPort>, EnrolmentError> {
    if !configured.is_empty() {
        return Ok(configured.to_vec());
    }
    let path = state_dir.join(UPSTREAM_FILE);
    let bytes = match files::read_public(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.is_missing() => return Err(EnrolmentError::NoTargets(path)),
        Err(error) => return Err(error.into()),
    };
    let damaged = |reason: String| EnrolmentError::Upstream { path: path.clone(), reason };
    let file: UpstreamFile = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let addresses = file.addresses.iter().map(|text| {
        let address: AddressText = text.parse().map_err(|error| damaged(format!("{error}")))?;
        Ok(address.with_default_port(MASTER_TARGET_PORT))
    });
    let addresses: Vec<HostPort> = addresses.collect::<Result<_, EnrolmentError>>()?;
    if addresses.is_empty() { Err(damaged("it names no address".into())) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::units::{PeerId, Timestamp};

    use super::*;

    fn token(addresses: &[&str]) -> Token {
        Token {
            role: Role::ProcessServer,
            expires: Timestamp(1),
            target: PeerId([1; 16]),
            ca_key_sha256: [0; 32],
            secret: [0; 16],
            addresses: addresses.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    #[test]
    fn the_tokens_addresses_serve_until_the_configuration_names_some() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(targets(&[], dir.path()), Err(EnrolmentError::NoTargets(_))));
        save_targets(dir.path(), &token(&["target.example:7443", "[::1]:9"])).unwrap();
        let found = targets(&[], dir.path()).unwrap();
        assert_eq!(
            found.iter().map(HostPort::to_string).collect::<Vec<_>>(),
            ["target.example:7443", "[::1]:9"]
        );
        let configured = [HostPort { host: "other".into(), port: 1 }];
        assert_eq!(targets(&configured, dir.path()).unwrap(), configured);
        for damage in
            ["", "{}", "{\"target\":\"\",\"addresses\":[]}", "{\"target\":\"\",\"addresses\":[\"a b\"]}"]
        {
            std::fs::write(dir.path().join(UPSTREAM_FILE), damage).unwrap();
            assert!(matches!(targets(&[], dir.path()), Err(EnrolmentError::Upstream { .. })), "{damage}");
        }
    }

    #[test]
    fn a_missing_identity_says_how_to_enrol() {
        let dir = tempfile::tempdir().unwrap();
        let error = Own::load(&Credentials::new(dir.path(), None)).unwrap_err().to_string();
        assert!(error.contains("not enrolled") && error.contains("enroll TOKEN"), "{error}");
    }
}
