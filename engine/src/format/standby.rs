//! PROBE and LOAD: what an agent asks of a peer that it has no session with, or beside one, and what the peer answers.
//!
//! Invariants: both travel on the control lane between two neighbours and are never passed on; a probe before HELLO
//! begins no session and reserves nothing; an answer bears the probe's token.
//! Units: microseconds, thousandths. Asked by `agent/src/upstreams.rs`, answered by way of `net::standby`.

use super::wire::wire;

wire! {
    /// Whether a session could be had here, and how good it would be.
    pub struct Probe / ProbeWire = 16 {
        /// Comes back with the answer.
        token: u64,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// How a peer stands.
    pub struct Load / LoadWire = 48 {
        /// Of the probe.
        token: u64,
        /// Round trip between this peer and the master target in microseconds: 0 where it is the target,
        /// `ROUND_TRIP_UNKNOWN` as long as it is not known, `ROUND_TRIP_NONE` where the target cannot be reached.
        target_micros: u32,
        /// Sessions it serves.
        sessions: u32,
        /// Thousandths of its memory that are not promised to sessions.
        room_permille: u16,
        /// Whether it would take another session.
        accepts: bool,
        ; reserved: [u8; 29],
    }
}

/// The round trip to the target was not measured yet.
pub const ROUND_TRIP_UNKNOWN: u32 = u32::MAX - 1;
/// The target cannot be reached.
pub const ROUND_TRIP_NONE: u32 = u32::MAX;
