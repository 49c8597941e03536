//! The NBD protocol (fixed newstyle, structured replies, `base:allocation`) as bytes: what a point is served with to
//! programs of others.
//!
//! Invariants: unlike everything else in `format`, numbers are big-endian and the layouts are not ours: they follow
//! the public protocol document and never change. A decoder never panics; every length that a client states is bounded
//! before anything is read or reserved for it. Strings are UTF-8 without NUL, at most [`NAME_BYTES_MAX`] bytes.
//! Units: bytes. Called by `net::nbd` and by its tests, which speak the client's side.
//!
//! | module | what |
//! |---|---|
//! | [`option`] | what a client says before it has an export: flags and options |
//! | [`request`] | what it says afterwards, checked against the export |
//! | [`reply`] | everything the server says |

pub mod option;
pub mod reply;
pub mod request;

/// Longest name or message, as the protocol bounds its strings.
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest data of one option: several names and queries of full length.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Most bytes one request may carry or ask for; clients are told so, and 32 MiB is what they assume untold.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Smallest unit of a request.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// The unit in which requests cost least: the block.
pub const BLOCK_BYTES_PREFERRED: u32 = crate::units::BLOCK_BYTES as u32;
/// The one metadata context there is.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its number in this server's replies.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// Transmission flags: what an export can do.
pub mod export_flags {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same content.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// The flags of an export.
#[must_use]
pub const fn flags_of_export(writable: bool, structured: bool) -> u16 {
    use export_flags::{
        CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_DF, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
    };
    let access = if writable { SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES } else { READ_ONLY };
    let unfragmented = if structured { SEND_DF } else { 0 };
    HAS_FLAGS | CAN_MULTI_CONN | access | unfragmented
}

/// Error numbers of the protocol; they are the same on every system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// The export is read-only.
    Permission = 1,
    /// The medium failed.
    Io = 5,
    /// The request makes no sense, or is not understood.
    Invalid = 22,
    /// The medium is full, or a write would pass the end of the export.
    NoSpace = 28,
    /// The server is ending.
    Shutdown = 108,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: &[Self] = &[Self::Permission, Self::Io, Self::Invalid, Self::NoSpace, Self::Shutdown];

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}
