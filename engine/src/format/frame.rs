//! The envelope of everything on a stream: a 16-byte header with its own checksum, then the body.
//!
//! Invariants: no body is longer than its kind allows, so a peer cannot make us reserve more; an unknown kind is an
//! error. A frame to be sent is a list of shared parts, so that payload is never copied into it. Units: bytes.

use bytes::{Bytes, BytesMut};

use super::FormatError;
use super::wire::{wire, wire_enum};
use crate::checksum::crc32;
use crate::limits::{CONTROL_BODY_BYTES_MAX, FRAME_BODY_BYTES_MAX};

/// First four bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"RPF1";

wire_enum! {
    /// What a frame carries. Numbers are never reused.
    pub enum FrameKind: u16 {
        /// First message of a session, client to server; its bytes are frozen.
        Hello = 1,
        /// The answer; its bytes are frozen.
        HelloAck = 2,
        /// The agent's end-to-end proof of identity.
        Auth = 3,
        /// The session may be used.
        Welcome = 4,
        /// The agent's disks.
        Inventory = 5,
        /// A disk the agent may open, with a signed grant.
        Offer = 6,
        /// The agent opens a disk.
        OpenDisk = 7,
        /// The disk is open: new generation and where to continue.
        Grant = 8,
        /// Delta records.
        Batch = 9,
        /// A mark in the delta stream.
        Mark = 10,
        /// Bulk records.
        Bulk = 11,
        /// Delta acknowledgement.
        Ack = 12,
        /// Bulk acknowledgement.
        BulkAck = 13,
        /// Bytes the sender may have sent in all.
        Credit = 14,
        /// Delta must be sent again.
        Nack = 15,
        /// A higher generation exists.
        Fenced = 16,
        /// Hashes are wanted.
        CompareRequest = 17,
        /// Hashes.
        CompareHashes = 18,
        /// The agent asks for a compare pass.
        PassBegin = 19,
        /// The state of the pass at the target.
        PassState = 20,
        /// The agent has covered the disk.
        PassEnd = 21,
        /// Something is wrong.
        Error = 22,
        /// The machine's policy, target to agent.
        Policy = 23,
        /// Points promise less than was said.
        PointDegrade = 24,
        /// A point of the machine is wanted, target to agent.
        MarkRequest = 25,
        /// It cannot be had, and why.
        MarkRefused = 26,
        /// The source disk is larger than the target: it is to grow.
        GrowDisk = 27,
        /// How a peer stands, asked by an agent of its neighbour.
        Probe = 28,
        /// The answer.
        Load = 29,
    }
}

impl FrameKind {
    /// Longest body a frame of this kind may have.
    #[must_use]
    pub const fn body_bytes_max(self) -> u32 {
        match self {
            Self::Hello | Self::HelloAck => 1 << 10,
            Self::Batch | Self::Bulk => FRAME_BODY_BYTES_MAX,
            _ => CONTROL_BODY_BYTES_MAX,
        }
    }
}

wire! {
    /// The fixed head of a frame.
    pub struct FrameHeader / FrameHeaderWire = 16 {
        /// Always [`FRAME_MAGIC`].
        magic: [u8; 4],
        /// What the body is.
        kind: FrameKind,
        /// Length of the body in bytes.
        body_bytes: u32,
        /// CRC-32 of the header with this field zero.
        head_crc: u32,
        ; reserved: [u8; 2],
    }
}

impl FrameHeader {
    /// A header for a body of `body_bytes`.
    #[must_use]
    pub fn new(kind: FrameKind, body_bytes: u32) -> Self {
        let mut header = Self { magic: FRAME_MAGIC, kind, body_bytes, head_crc: 0 };
        header.head_crc = crc32(&header.to_bytes());
        header
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// When magic, checksum, kind or length is wrong; the stream is then of no further use.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, FormatError> {
        if bytes.first_chunk::<4>() != Some(&FRAME_MAGIC) {
            return Err(FormatError::Field { what: "Frame", field: "magic", got: 0, expected: "RPF1" });
        }
        let header = Self::read_exact(bytes)?;
        let expected = crc32(&Self { head_crc: 0, ..header }.to_bytes());
        if header.head_crc != expected {
            return Err(FormatError::Checksum { what: "Frame head", got: header.head_crc, expected });
        }
        if header.body_bytes > header.kind.body_bytes_max() {
            return Err(FormatError::Field {
                what: "Frame",
                field: "body_bytes",
                got: header.body_bytes.into(),
                expected: "no more than the frame kind's limit",
            });
        }
        Ok(header)
    }
}

/// A frame to be sent: header and body as shared parts.
#[derive(Clone, Debug)]
pub struct Frame {
    kind: FrameKind,
    parts: Vec<Bytes>,
}

impl Frame {
    /// A frame of one body part.
    #[must_use]
    pub fn new(kind: FrameKind, body: Bytes) -> Self {
        Self::from_parts(kind, vec![body])
    }

    /// A frame whose body is the parts one after another.
    ///
    /// # Panics
    /// When the body is longer than its kind allows: the builder's fault.
    #[must_use]
    pub fn from_parts(kind: FrameKind, mut parts: Vec<Bytes>) -> Self {
        let body_bytes: usize = parts.iter().map(Bytes::len).sum();
        assert!(body_bytes <= kind.body_bytes_max() as usize, "{kind:?} body of {body_bytes} bytes");
        let mut head = BytesMut::with_capacity(FrameHeader::BYTES);
        head.extend_from_slice(&FrameHeader::new(kind, body_bytes as u32).to_bytes());
        parts.insert(0, head.freeze());
        Self { kind, parts }
    }

    /// What it carries.
    #[must_use]
    pub const fn kind(&self) -> FrameKind {
        self.kind
    }

    /// Header and body, to be written in this order.
    #[must_use]
    pub fn parts(&self) -> &[Bytes] {
        &self.parts
    }

    /// Header and body, to be written in this order, given away.
    #[must_use]
    pub fn into_parts(self) -> Vec<Bytes> {
        self.parts
    }

    /// Size on the wire in bytes.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// The body in one piece (copied where it has several parts).
    #[must_use]
    pub fn body(&self) -> Bytes {
        match self.parts.get(1..) {
            None | Some([]) => Bytes::new(),
            Some([only]) => only.clone(),
            Some(many) => {
                let mut body = BytesMut::with_capacity(many.iter().map(Bytes::len).sum());
                for part in many {
                    body.extend_from_slice(part);
                }
                body.freeze()
            }
        }
    }
}
