//! QUIC and TLS around the protocol cores: who a peer is, who may speak, and the endpoint they speak through.
//!
//! Invariants: TLS 1.3 only, no 0-RTT, no resumption (a resumed session would outlive a revocation); a data
//! connection reaches a daemon only with a verified identity of an allowed role; private keys never leave the
//! machine that made them and are never world- or group-readable. Called by the three programs.
//!
//! | module | what |
//! |---|---|
//! | [`files`] | private files: refused when others may read them, replaced atomically |
//! | [`identity`] | certificate, key and the name inside; signatures |
//! | [`revocations`] | who is no longer believed, also on live connections |
//! | [`trust`] | the one place where a certificate chain is believed or refused |
//! | [`credentials`] | a daemon's own identity and roots: enrolled, or of the site's own PKI |
//! | [`ca`] | the master target's certificate authority |
//! | [`tls`] | rustls configurations |
//! | [`lanes`] | the frames of a session over a connection |
//! | [`shaper`] | how fast data may leave, and the part of it that bulk keeps |
//! | [`standby`], [`silence`] | connections kept ready, and when a peer counts as dead |
//! | [`nbd`] | disks served to NBD clients |
//! | [`endpoint`], [`dialer`] | transport limits, accepting and dialling |
//! | `socket`, [`tunnel`] | what packets travel in: UDP, or TCP where that is dropped |
//! | [`token`], [`invitations`], [`enroll`], [`enroll_wire`] | how a new machine gets its certificate |
//! | [`grant`] | what a master target allows an agent, signed |

pub mod ca;
pub mod credentials;
pub mod dialer;
pub mod endpoint;
pub mod enroll;
pub mod enroll_wire;
pub mod files;
pub mod grant;
pub mod identity;
pub mod invitations;
pub mod lanes;
pub mod nbd;
pub mod revocations;
pub mod shaper;
pub mod silence;
mod socket;
pub mod standby;
pub mod tls;
pub mod token;
pub mod trust;
pub mod tunnel;

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::units::{MonoTime, Timestamp};

/// ALPN of the data protocol.
pub const ALPN_DATA: &[u8] = b"reprotect/1";
/// ALPN of enrolment and certificate renewal.
pub const ALPN_ENROLL: &[u8] = b"reprotect-enroll/1";

/// The wall clock. A clock before 1970 reads as zero, in which no certificate is valid.
#[must_use]
pub fn wall_clock() -> Timestamp {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    Timestamp(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The monotonic clock, from its first use in this process.
#[must_use]
pub fn mono_clock() -> MonoTime {
    static START: OnceLock<Instant> = OnceLock::new();
    let nanos = START.get_or_init(Instant::now).elapsed().as_nanos();
    MonoTime(u64::try_from(nanos).unwrap_or(u64::MAX))
}
