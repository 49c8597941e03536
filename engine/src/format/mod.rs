//! The bytes on wire and disk: fixed little-endian structs, decoded totally, with the byte table standing on the
//! struct itself.
//!
//! Invariants: a decoder never panics and never trusts a length it has not checked; reserved bytes are named and
//! checked zero; header checksums are apart from body checksums. A record is the same bytes on wire and in journal.
//! Units: stated per field. Called by `proto` (frames and messages) and `store` (state and VMDK).
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used))]

pub mod batch;
pub mod crc_map;
pub mod disk_state;
pub mod extent;
pub mod frame;
pub mod handshake;
pub mod manifest;
pub mod message;
pub mod nbd;
pub mod segment;
pub mod segment_index;
pub mod standby;
pub mod undo;
pub mod vmdk;
pub mod wire;

use crate::error::{Answer, Severity};

/// Bytes that are not what the format says. Names the structure, the field, what was got and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the structure needs.
    #[error("{what}: {got} bytes where {expected} are needed")]
    Short {
        /// The structure.
        what: &'static str,
        /// Bytes there were.
        got: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// Bytes left over behind the structure.
    #[error("{what}: {got} bytes left over at the end")]
    Trailing {
        /// The structure.
        what: &'static str,
        /// Bytes left over.
        got: usize,
    },
    /// A field has a value that the format does not allow.
    #[error("{what}.{field} is {got}, expected {expected}")]
    Field {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// What is allowed.
        expected: &'static str,
    },
    /// A checksum does not match its bytes.
    #[error("{what}: checksum {got:08x}, computed {expected:08x}")]
    Checksum {
        /// What the checksum covers.
        what: &'static str,
        /// The stored checksum.
        got: u32,
        /// The checksum of the bytes.
        expected: u32,
    },
    /// A compressed payload that does not decompress to what its header says.
    #[error("{what}: {reason}")]
    Payload {
        /// The structure.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

impl Answer for FormatError {
    fn severity(&self) -> Severity {
        Severity::Resync
    }
}
