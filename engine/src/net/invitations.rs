//! Open invitations: which one-time secrets may still be turned into a certificate.
//!
//! Invariants: the file knows only SHA-256 of a secret (a 128-bit random secret needs no slow hash); an invitation is
//! spent durably *before* a certificate is issued for it, so that a crash loses a token rather than doubling it; every
//! attempt, right or wrong, costs a token of the rate limiter; secrets are compared without early exit. The identity a
//! machine will get is decided when it is invited. Units: nanoseconds since 1970. Called by the master target.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Answer, Severity};
use crate::net::files::{self, Access, FileError};
use crate::net::identity::{Role, sha256};
use crate::net::revocations::{from_hex, to_hex};
use crate::net::token::{SECRET_BYTES, Token};
use crate::units::{MonoTime, PeerId, Timestamp};

/// How long an invitation is good by default.
pub const INVITATION_LIFETIME_DEFAULT: Duration = Duration::from_secs(15 * 60);
/// Most invitations open at once.
pub const INVITATIONS_MAX: usize = 1024;
/// Attempts that may come at once.
pub const ATTEMPTS_BURST: u64 = 10;
/// One further attempt is allowed per this long: guessing 128 bits stays hopeless by a wide margin.
pub const ATTEMPT_NANOS: u64 = 1_000_000_000;

const HEADER: &str = "reprotect invitations 1";

/// Why an invitation cannot be made or redeemed.
#[derive(Debug, thiserror::Error)]
pub enum InvitationError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file holds a line that is no invitation.
    #[error("{}, line {line}: not an invitation; delete the file and invite again", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
    },
    /// No such secret: never existed, already used, or purged.
    #[error("the token is unknown or was already used; make a new one with `reprotect-master-target invite`")]
    Unknown,
    /// Too late.
    #[error("the token has expired; make a new one with `reprotect-master-target invite`")]
    Expired,
    /// For another kind of daemon.
    #[error("the token is for a daemon of role {invited}; invite again with the right role")]
    WrongRole {
        /// What it is for.
        invited: Role,
    },
    /// Too many attempts.
    #[error("too many enrolment attempts; wait a few seconds and try again")]
    TooMany,
    /// Too many open invitations.
    #[error("{INVITATIONS_MAX} invitations are open; wait until some expire")]
    Full,
    /// No randomness.
    #[error("the operating system gave no randomness")]
    Randomness,
}

impl Answer for InvitationError {
    fn severity(&self) -> Severity {
        match self {
            Self::TooMany | Self::Full => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

/// One open invitation.
#[derive(Clone, PartialEq, Eq)]
pub struct Invitation {
    secret_sha256: [u8; 32],
    /// What the machine will be.
    pub role: Role,
    /// The identity it will get.
    pub peer: PeerId,
    /// Good until.
    pub expires: Timestamp,
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Invitation({} {}, until {})", self.role, self.peer, self.expires)
    }
}

/// What a new token is to say beside its secret.
#[derive(Clone, Debug)]
pub struct Invite {
    /// What the machine will be.
    pub role: Role,
    /// How long it is good.
    pub lifetime: Duration,
    /// The inviting target.
    pub target: PeerId,
    /// SHA-256 of its CA's public key.
    pub ca_key_sha256: [u8; 32],
    /// Where it listens, `host:port`.
    pub addresses: Vec<String>,
}

/// The store.
#[derive(Debug)]
pub struct Invitations {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: Vec<Invitation>,
    attempts: Bucket,
}

/// A token bucket that starts full.
#[derive(Debug, Default)]
struct Bucket {
    spent_nanos: u64,
    at: MonoTime,
}

impl Bucket {
    fn take(&mut self, now: MonoTime) -> bool {
        self.spent_nanos = self.spent_nanos.saturating_sub(now.nanos_since(self.at));
        self.at = now;
        let allowed = self.spent_nanos + ATTEMPT_NANOS <= ATTEMPTS_BURST * ATTEMPT_NANOS;
        if allowed {
            self.spent_nanos += ATTEMPT_NANOS;
        }
        allowed
    }
}

impl Invitations {
    /// Opens the file; a missing one is empty.
    ///
    /// # Errors
    /// When it is unreadable, readable by others, or damaged.
    pub fn load(path: PathBuf) -> Result<Self, InvitationError> {
        let open = match files::read_private(&path) {
            Err(error) if error.is_missing() => Vec::new(),
            other => parse(&other?, &path)?,
        };
        Ok(Self { path, state: Mutex::new(State { open, attempts: Bucket::default() }) })
    }

    /// Invites one machine, durably.
    ///
    /// # Errors
    /// When the file cannot be written or too many invitations are open.
    pub fn create(&self, invite: Invite, now: Timestamp) -> Result<(Invitation, Token), InvitationError> {
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret).map_err(|_| InvitationError::Randomness)?;
        let peer = PeerId::random().map_err(|_| InvitationError::Randomness)?;
        let lifetime = u64::try_from(invite.lifetime.as_nanos()).unwrap_or(u64::MAX);
        let expires = Timestamp(now.0.saturating_add(lifetime));
        let invitation = Invitation { secret_sha256: sha256(&secret), role: invite.role, peer, expires };
        self.change(|open| {
            open.retain(|old| old.expires > now);
            if open.len() >= INVITATIONS_MAX {
                return Err(InvitationError::Full);
            }
            open.push(invitation.clone());
            Ok(())
        })?;
        let token = Token {
            role: invite.role,
            expires,
            target: invite.target,
            ca_key_sha256: invite.ca_key_sha256,
            secret,
            addresses: invite.addresses,
        };
        Ok((invitation, token))
    }

    /// Spends the invitation of `secret`, durably, and says whom it was for. A request for another role leaves the
    /// invitation open: the machine ran the wrong program.
    ///
    /// # Errors
    /// When the attempt is refused, or cannot be made durable; only in the latter case may it have been spent.
    pub fn redeem(
        &self,
        secret: &[u8; SECRET_BYTES],
        role: Role,
        now: Timestamp,
        mono: MonoTime,
    ) -> Result<Invitation, InvitationError> {
        if !self.lock().attempts.take(mono) {
            return Err(InvitationError::TooMany);
        }
        let hash = sha256(secret);
        self.change(|open| {
            // Looks at all, so that the time tells nothing about the place of a match.
            let found = open.iter().enumerate().fold(None, |found, (at, invitation)| {
                if equal(&invitation.secret_sha256, &hash) { Some(at) } else { found }
            });
            let at = found.ok_or(InvitationError::Unknown)?;
            let invitation = open.get(at).cloned().ok_or(InvitationError::Unknown)?;
            if invitation.expires <= now {
                return Err(InvitationError::Expired);
            }
            if invitation.role != role {
                return Err(InvitationError::WrongRole { invited: invitation.role });
            }
            open.remove(at);
            Ok(invitation)
        })
    }

    /// Open invitations, expired ones included until they are purged.
    #[must_use]
    pub fn list(&self) -> Vec<Invitation> {
        self.lock().open.clone()
    }

    /// Withdraws the invitation that was to become `peer`; whether there was one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn withdraw(&self, peer: PeerId) -> Result<bool, InvitationError> {
        self.change(|open| {
            let before = open.len();
            open.retain(|invitation| invitation.peer != peer);
            Ok(open.len() < before)
        })
    }

    /// Forgets expired invitations and says how many.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn purge(&self, now: Timestamp) -> Result<usize, InvitationError> {
        self.change(|open| {
            let before = open.len();
            open.retain(|invitation| invitation.expires > now);
            Ok(before - open.len())
        })
    }

    /// Changes a copy, makes it durable, then shows it.
    fn change<T>(
        &self,
        edit: impl FnOnce(&mut Vec<Invitation>) -> Result<T, InvitationError>,
    ) -> Result<T, InvitationError> {
        let mut state = self.lock();
        let mut open = state.open.clone();
        let result = edit(&mut open)?;
        if open != state.open {
            files::replace(&self.path, render(&open).as_bytes(), Access::Private)?;
            state.open = open;
        }
        Ok(result)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Equality whose time does not depend on where the bytes differ.
fn equal(left: &[u8; 32], right: &[u8; 32]) -> bool {
    let differing = left.iter().zip(right).fold(0_u8, |bits, (l, r)| std::hint::black_box(bits | (l ^ r)));
    std::hint::black_box(differing) == 0
}

fn render(open: &[Invitation]) -> String {
    let mut text = format!("{HEADER}\n");
    for invitation in open {
        let Invitation { secret_sha256, role, peer, expires } = invitation;
        text.push_str(&format!("{} {role} {peer} {expires}\n", to_hex(secret_sha256)));
    }
    text
}

fn parse(bytes: &[u8], path: &std::path::Path) -> Result<Vec<Invitation>, InvitationError> {
    let bad = |line| InvitationError::Line { path: path.to_owned(), line };
    let text = std::str::from_utf8(bytes).map_err(|_| bad(1))?;
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err(bad(1));
    }
    let open: Vec<_> = lines
        .enumerate()
        .map(|(index, line)| parse_line(line).ok_or_else(|| bad(index + 2)))
        .collect::<Result<_, _>>()?;
    if open.len() > INVITATIONS_MAX { Err(InvitationError::Full) } else { Ok(open) }
}

fn parse_line(line: &str) -> Option<Invitation> {
    let mut words = line.split(' ');
    let invitation = Invitation {
        secret_sha256: from_hex(words.next()?)?.try_into().ok()?,
        role: Role::parse(words.next()?)?,
        peer: PeerId::parse(words.next()?).ok()?,
        expires: Timestamp(words.next()?.parse().ok()?),
    };
    words.next().is_none().then_some(invitation)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000);

    fn invite(role: Role) -> Invite {
        Invite {
            role,
            lifetime: INVITATION_LIFETIME_DEFAULT,
            target: PeerId([1; 16]),
            ca_key_sha256: [2; 32],
            addresses: vec!["127.0.0.1:7443".into()],
        }
    }

    fn store() -> (tempfile::TempDir, Invitations) {
        let dir = tempfile::tempdir().unwrap();
        let store = Invitations::load(dir.path().join("invitations")).unwrap();
        (dir, store)
    }

    #[test]
    fn a_secret_is_good_once_also_across_restarts_and_is_nowhere_in_the_file() {
        let (dir, store) = store();
        let (invitation, token) = store.create(invite(Role::Agent), NOW).unwrap();
        let file = std::fs::read(dir.path().join("invitations")).unwrap();
        assert!(!file.windows(SECRET_BYTES).any(|window| window == token.secret));
        assert!(!String::from_utf8(file).unwrap().contains(&to_hex(&token.secret)));

        let store = Invitations::load(dir.path().join("invitations")).unwrap();
        let got = store.redeem(&token.secret, Role::Agent, NOW, MonoTime(0)).unwrap();
        assert_eq!(got.peer, invitation.peer);
        for store in [store, Invitations::load(dir.path().join("invitations")).unwrap()] {
            let again = store.redeem(&token.secret, Role::Agent, NOW, MonoTime(0));
            assert!(matches!(again, Err(InvitationError::Unknown)));
        }
    }

    #[test]
    fn expired_or_misused_tokens_are_refused_and_a_wrong_role_spends_nothing() {
        let (_dir, store) = store();
        let (invitation, token) = store.create(invite(Role::Agent), NOW).unwrap();
        let mut wrong = token.secret;
        wrong[15] ^= 1;
        let redeem = |secret, role, now| store.redeem(secret, role, now, MonoTime(0));
        assert!(matches!(redeem(&wrong, Role::Agent, NOW), Err(InvitationError::Unknown)));
        assert!(matches!(
            redeem(&token.secret, Role::MasterTarget, NOW),
            Err(InvitationError::WrongRole { invited: Role::Agent })
        ));
        assert!(matches!(redeem(&token.secret, Role::Agent, token.expires), Err(InvitationError::Expired)));
        assert_eq!(redeem(&token.secret, Role::Agent, NOW).unwrap(), invitation);
    }

    #[test]
    fn attempts_are_limited_and_come_back_with_time() {
        let (_dir, store) = store();
        let (_, token) = store.create(invite(Role::Agent), NOW).unwrap();
        for _ in 0..ATTEMPTS_BURST {
            let wrong = store.redeem(&[0; SECRET_BYTES], Role::Agent, NOW, MonoTime(5));
            assert!(matches!(wrong, Err(InvitationError::Unknown)));
        }
        let mono = MonoTime(5 + ATTEMPT_NANOS - 1);
        let early = store.redeem(&token.secret, Role::Agent, NOW, mono);
        assert!(matches!(early, Err(InvitationError::TooMany)), "the right one has to wait too");
        assert!(store.redeem(&token.secret, Role::Agent, NOW, mono.plus_nanos(1)).is_ok());
    }

    #[test]
    fn open_invitations_are_bounded_purged_and_withdrawn() {
        let (_dir, store) = store();
        let open: Vec<Invitation> = (0..INVITATIONS_MAX)
            .map(|at| Invitation {
                secret_sha256: sha256(&at.to_le_bytes()),
                role: Role::Agent,
                peer: PeerId([at as u8; 16]),
                expires: Timestamp(2_000),
            })
            .collect();
        store.lock().open = open;
        assert!(matches!(store.create(invite(Role::Agent), NOW), Err(InvitationError::Full)));
        assert!(store.withdraw(PeerId([7; 16])).unwrap());
        assert!(!store.withdraw(PeerId([7; 16])).unwrap());
        assert!(store.purge(Timestamp(2_000)).unwrap() > 1_000);
        assert!(store.list().is_empty());
        assert!(store.create(invite(Role::Agent), NOW).is_ok());
    }

    #[test]
    fn a_damaged_file_is_refused_with_its_line() {
        let (dir, store) = store();
        store.create(invite(Role::Agent), NOW).unwrap();
        let path = dir.path().join("invitations");
        let text = std::fs::read_to_string(&path).unwrap();
        files::replace(&path, format!("{text}x\n").as_bytes(), Access::Private).unwrap();
        assert!(matches!(Invitations::load(path.clone()), Err(InvitationError::Line { line: 3, .. })));
        files::replace(&path, b"", Access::Private).unwrap();
        assert!(matches!(Invitations::load(path), Err(InvitationError::Line { line: 1, .. })));
    }
}
