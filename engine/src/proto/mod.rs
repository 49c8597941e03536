//! The protocol without I/O or clocks: `handle_*` in, `poll_*` out, time is an argument.
//!
//! The same cores run under QUIC, in the simulator and in fuzzing.
//!
//! | file | role |
//! |---|---|
//! | [`agent`], `agent_disk` | opens disks, sends delta and bulk, forgets only what is durable |
//! | [`pass`] | plans one walk over a disk: copy, compare, refine, send |
//! | [`process_server`] | relays one session, recompresses, never reorders |
//! | [`master_target`] | one session's handshake and routing at the target |
//! | [`target_disk`] | accepts, fences, credits and acknowledges one disk |
//! | [`resume`] | the decision table of a reconnect |
//! | [`batch`], [`credit`], [`state`] | cutting data into records, windows, transition tables |
//!
//! Invariants: no core blocks, reads a clock or touches a file; every queue is bounded by credit or by `limits`.

pub mod agent;
mod agent_disk;
mod agent_event;
pub mod batch;
pub mod compare;
pub mod credit;
mod grace;
pub mod master_target;
pub mod pass;
pub mod process_server;
pub mod resume;
pub mod state;
pub mod target_disk;

use bytes::Bytes;

use crate::error::{Answer, Severity};
use crate::format::FormatError;
use crate::format::frame::{Frame, FrameKind};
use crate::format::message::{Auth, ErrorCode};
use crate::units::{DiskId, Generation, PeerId};

/// Where a frame travels. Order holds inside a lane only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// The session's control stream, both ways.
    Control,
    /// A disk's delta stream, towards the target.
    Delta(DiskId),
    /// A disk's bulk stream, towards the target.
    Bulk(DiskId),
}

/// A frame to be sent.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Its lane.
    pub lane: Lane,
    /// The frame.
    pub frame: Frame,
}

impl Outgoing {
    /// A frame on the control lane.
    #[must_use]
    pub const fn control(frame: Frame) -> Self {
        Self { lane: Lane::Control, frame }
    }
}

/// What an agent signs to prove itself: fresh from the target, and bound to both ends.
#[must_use]
pub fn session_proof_message(nonce: &[u8; 32], agent: PeerId, target: PeerId) -> [u8; 64] {
    let mut message = [0_u8; 64];
    message[..32].copy_from_slice(nonce);
    message[32..48].copy_from_slice(&agent.0);
    message[48..].copy_from_slice(&target.0);
    message
}

/// Proves the agent's identity end to end, through any relay.
pub trait Prover: Send {
    /// Signs what the target asked for.
    fn prove(&self, nonce: &[u8; 32], target: PeerId) -> Auth;
}

/// Checks proofs and grants at the target.
pub trait Authority: Send + Sync {
    /// Checks an agent's proof.
    ///
    /// # Errors
    /// The reason it is refused.
    fn check_proof(&self, auth: &Auth, nonce: &[u8; 32]) -> Result<(), String>;

    /// Signs a grant.
    fn issue(&self, disk: DiskId, size_sectors: u64, generation: Generation, agent: PeerId) -> Bytes;

    /// Checks a presented grant.
    ///
    /// # Errors
    /// The reason it is refused.
    fn check_grant(
        &self,
        grant: &[u8],
        disk: DiskId,
        size_sectors: u64,
        generation: Generation,
        agent: PeerId,
    ) -> Result<(), String>;
}

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    /// Bytes that are not the protocol.
    #[error("the peer sent bytes that are not the protocol: {0}")]
    Format(#[from] FormatError),
    /// A message that makes no sense in this state.
    #[error("unexpected {got} while {state}")]
    Unexpected {
        /// What came.
        got: &'static str,
        /// The state it came in.
        state: &'static str,
    },
    /// No common version or feature set.
    #[error("no common protocol version: {0}; update the older of the two programs")]
    Version(String),
    /// The peer is not who it must be.
    #[error("the peer was refused: {0}")]
    Identity(String),
    /// A limit was exceeded.
    #[error("the peer exceeded a limit: {0}")]
    Limit(String),
    /// The peer did not finish in time.
    #[error("the peer did not finish its handshake within 10 s")]
    Timeout,
    /// The peer ended the session and said why.
    #[error("the peer ended the session ({code:?}): {text}")]
    Peer {
        /// Its code.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
}

impl ProtoError {
    /// The code that tells the peer.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Format(_) | Self::Unexpected { .. } | Self::Timeout => ErrorCode::Protocol,
            Self::Version(_) => ErrorCode::Version,
            Self::Identity(_) => ErrorCode::Identity,
            Self::Limit(_) => ErrorCode::Limit,
            Self::Peer { code, .. } => *code,
        }
    }
}

impl Answer for ProtoError {
    fn severity(&self) -> Severity {
        match self {
            Self::Format(_) | Self::Unexpected { .. } | Self::Timeout | Self::Limit(_) => Severity::Retry,
            Self::Version(_) | Self::Identity(_) => Severity::Stop,
            Self::Peer { code, .. } => match code {
                ErrorCode::Version
                | ErrorCode::Identity
                | ErrorCode::Size
                | ErrorCode::Target
                | ErrorCode::Fork => Severity::Stop,
                _ => Severity::Retry,
            },
        }
    }
}

/// The frame's name, for messages.
#[must_use]
const fn frame_name(kind: FrameKind) -> &'static str {
    match kind {
        FrameKind::Hello => "HELLO",
        FrameKind::HelloAck => "HELLO_ACK",
        FrameKind::Auth => "AUTH",
        FrameKind::Welcome => "WELCOME",
        FrameKind::Inventory => "INVENTORY",
        FrameKind::Offer => "OFFER",
        FrameKind::OpenDisk => "OPEN_DISK",
        FrameKind::Grant => "GRANT",
        FrameKind::Batch => "BATCH",
        FrameKind::Mark => "MARK",
        FrameKind::Bulk => "BULK",
        FrameKind::Ack => "ACK",
        FrameKind::BulkAck => "BULK_ACK",
        FrameKind::Credit => "CREDIT",
        FrameKind::Nack => "NACK",
        FrameKind::Fenced => "FENCED",
        FrameKind::CompareRequest => "COMPARE_REQUEST",
        FrameKind::CompareHashes => "COMPARE_HASHES",
        FrameKind::PassBegin => "PASS_BEGIN",
        FrameKind::PassState => "PASS_STATE",
        FrameKind::PassEnd => "PASS_END",
        FrameKind::Error => "ERROR",
        FrameKind::Policy => "POLICY",
        FrameKind::PointDegrade => "POINT_DEGRADE",
        FrameKind::MarkRequest => "MARK_REQUEST",
        FrameKind::MarkRefused => "MARK_REFUSED",
        FrameKind::GrowDisk => "GROW_DISK",
        FrameKind::Probe => "PROBE",
        FrameKind::Load => "LOAD",
    }
}
