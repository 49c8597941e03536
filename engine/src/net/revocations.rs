//! Who is no longer believed: peers, certificate serials and keys, in one file, effective on live connections.
//!
//! Invariants: an entry is durable before [`Revocations::revoke`] returns; entries are never removed; whoever holds a
//! connection watches [`Revocations::revoked`] and closes it. The file is text, one entry a line (`peer <uuid>`,
//! `serial <hex>`, `key <hex of SHA-256 of the public key>`), so that an operator can read and copy it.
//! Called by `trust` in every handshake and by `endpoint` for every live connection.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::watch;

use crate::error::{Answer, Severity};
use crate::net::files::{self, Access, FileError};
use crate::net::identity::PeerIdentity;
use crate::units::PeerId;

/// Most entries held; a site that reaches this makes a new CA.
pub const REVOCATIONS_MAX: usize = 8192;
/// Longest certificate serial in bytes (RFC 5280 allows 20).
pub const SERIAL_BYTES_MAX: usize = 20;

/// One revocation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Revocation {
    /// Every certificate of this peer, past and future.
    Peer(PeerId),
    /// The certificate with this serial.
    Serial(Vec<u8>),
    /// Every certificate of the key whose SubjectPublicKeyInfo has this SHA-256.
    Key([u8; 32]),
}

/// Why a revocation could not be read or recorded.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A line that means nothing. Refused as a whole: a skipped line could be the one that matters.
    #[error("{}, line {line}: not a revocation; write `peer UUID`, `serial HEX` or `key HEX`", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
    },
    /// Too many.
    #[error("more than {REVOCATIONS_MAX} revocations; make a new certificate authority and enrol again")]
    Full,
}

impl Answer for RevocationError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// The shared list.
#[derive(Debug)]
pub struct Revocations {
    path: Option<PathBuf>,
    entries: RwLock<BTreeSet<Revocation>>,
    /// Serialises writers, so that the file never loses an entry to a race.
    writer: Mutex<()>,
    changed: watch::Sender<u64>,
}

impl Revocations {
    /// A list that lives only in memory.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::with(None, BTreeSet::new())
    }

    /// The list in `path`; empty when the file does not exist.
    ///
    /// # Errors
    /// When the file cannot be read or holds a line that is no revocation.
    pub fn load(path: PathBuf) -> Result<Self, RevocationError> {
        let entries = read(&path)?;
        Ok(Self::with(Some(path), entries))
    }

    fn with(path: Option<PathBuf>, entries: BTreeSet<Revocation>) -> Self {
        let (changed, _) = watch::channel(0);
        Self { path, entries: RwLock::new(entries), writer: Mutex::new(()), changed }
    }

    /// Reads the file again and adds what is new, for lists that an operator or another daemon writes.
    ///
    /// # Errors
    /// As for [`Self::load`]; the entries known so far stay in force.
    pub fn reload(&self) -> Result<(), RevocationError> {
        let Some(path) = &self.path else { return Ok(()) };
        let _writer = self.lock_writer();
        self.publish(read(path)?);
        Ok(())
    }

    /// Revokes, durably, and wakes everyone who watches.
    ///
    /// # Errors
    /// When it cannot be made durable; it is then not in force.
    pub fn revoke(&self, revocation: Revocation) -> Result<(), RevocationError> {
        let _writer = self.lock_writer();
        let mut entries = self.read_entries().clone();
        if !entries.insert(revocation) {
            return Ok(());
        }
        if entries.len() > REVOCATIONS_MAX {
            return Err(RevocationError::Full);
        }
        if let Some(path) = &self.path {
            files::replace(path, render(&entries).as_bytes(), Access::Public)?;
        }
        self.publish(entries);
        Ok(())
    }

    /// Whether this identity is revoked by peer, serial or key.
    #[must_use]
    pub fn is_revoked(&self, identity: &PeerIdentity) -> bool {
        let entries = self.read_entries();
        entries.contains(&Revocation::Peer(identity.peer))
            || entries.contains(&Revocation::Key(identity.key_sha256))
            || entries.contains(&Revocation::Serial(identity.serial.clone()))
    }

    /// Waits until `identity` is revoked; at once when it already is. Safe to drop at any await.
    pub async fn revoked(&self, identity: &PeerIdentity) {
        let mut changed = self.changed.subscribe();
        while !self.is_revoked(identity) {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until `peer` is revoked as such; at once when it already is. For sessions whose certificate was shown and
    /// verified elsewhere, through a relay. Safe to drop at any await.
    pub async fn peer_revoked(&self, peer: PeerId) {
        let mut changed = self.changed.subscribe();
        while !self.read_entries().contains(&Revocation::Peer(peer)) {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// All entries, ordered.
    #[must_use]
    pub fn list(&self) -> Vec<Revocation> {
        self.read_entries().iter().cloned().collect()
    }

    fn publish(&self, entries: BTreeSet<Revocation>) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).extend(entries);
        self.changed.send_modify(|version| *version += 1);
    }

    fn read_entries(&self) -> std::sync::RwLockReadGuard<'_, BTreeSet<Revocation>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> Result<BTreeSet<Revocation>, RevocationError> {
    let bytes = match files::read_public(path) {
        Err(error) if error.is_missing() => return Ok(BTreeSet::new()),
        other => other?,
    };
    let mut entries = BTreeSet::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let text = std::str::from_utf8(line).map(str::trim);
        match text {
            Ok(text) if text.is_empty() || text.starts_with('#') => {}
            Ok(text) if let Some(entry) = parse(text) => {
                entries.insert(entry);
            }
            _ => return Err(RevocationError::Line { path: path.to_owned(), line: index + 1 }),
        }
    }
    if entries.len() > REVOCATIONS_MAX { Err(RevocationError::Full) } else { Ok(entries) }
}

fn parse(line: &str) -> Option<Revocation> {
    let (kind, value) = line.split_once(' ')?;
    match kind {
        "peer" => PeerId::parse(value).ok().map(Revocation::Peer),
        "serial" => from_hex(value)
            .filter(|bytes| (1..=SERIAL_BYTES_MAX).contains(&bytes.len()))
            .map(Revocation::Serial),
        "key" => from_hex(value)?.try_into().ok().map(Revocation::Key),
        _ => None,
    }
}

fn render(entries: &BTreeSet<Revocation>) -> String {
    let mut text =
        String::from("# Revoked by the master target; copies on process servers are read on reload.\n");
    for entry in entries {
        match entry {
            Revocation::Peer(peer) => text.push_str(&format!("peer {peer}\n")),
            Revocation::Serial(serial) => text.push_str(&format!("serial {}\n", to_hex(serial))),
            Revocation::Key(key) => text.push_str(&format!("key {}\n", to_hex(key))),
        }
    }
    text
}

/// Lower-case hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hexadecimal of whole bytes; `None` for anything else.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_a_restart_and_a_bad_line_is_refused_by_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("revoked");
        let list = Revocations::load(path.clone()).unwrap();
        let all = [
            Revocation::Peer(PeerId([7; 16])),
            Revocation::Serial(vec![1, 2, 0xff]),
            Revocation::Key([9; 32]),
        ];
        for entry in &all {
            list.revoke(entry.clone()).unwrap();
        }
        assert_eq!(Revocations::load(path.clone()).unwrap().list(), all);

        for bad in ["peer nonsense", "serial", "serial abc", "key 00", "\u{e9}"] {
            std::fs::write(&path, format!("# fine\n\n{bad}\n")).unwrap();
            let error = Revocations::load(path.clone()).unwrap_err();
            assert!(matches!(error, RevocationError::Line { line: 3, .. }), "{bad}: {error}");
        }
        assert_eq!(list.list().len(), 3);
        assert!(list.reload().is_err());
        assert_eq!(list.list().len(), 3, "a bad file revokes nothing and forgets nothing");
    }
}
