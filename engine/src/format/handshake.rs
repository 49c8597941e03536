//! HELLO and its answer: the only bytes that are frozen for ever, so that any two versions can at least disagree
//! politely.
//!
//! Invariants: sizes, offsets and magic never change (golden files pin them); everything else is negotiated: the
//! client lists versions newest first, the server picks the newest that both speak; an unknown required feature bit
//! ends the session. Units: none.

use super::FormatError;
use super::wire::{wire, wire_enum};
use crate::units::PeerId;

/// First eight bytes of both structures.
pub const HELLO_MAGIC: [u8; 8] = *b"REPROTEC";

/// Protocol versions, newest first, one sentence each.
pub const VERSIONS: &[Version] = &[Version::V1];

/// The ledger of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Version {
    /// First version: ordered delta batches, bulk passes with compare, three acknowledgement levels.
    V1 = 1,
}

/// Feature bits this build understands.
pub const FEATURES_KNOWN: u64 = 0;

wire_enum! {
    /// What a peer is.
    pub enum Role: u8 {
        /// Protects a machine.
        Agent = 1,
        /// Relays.
        ProcessServer = 2,
        /// Writes targets.
        MasterTarget = 3,
    }
}

impl Role {
    /// As it stands in a certificate's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::ProcessServer => "process-server",
            Self::MasterTarget => "master-target",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|role| role.as_str() == text)
    }

    /// As it stands in binary messages; zero is never a role.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Reads what [`Self::code`] wrote.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|role| role.code() == code)
    }

    /// Whether daemons of this role accept connections, and so need a server certificate.
    #[must_use]
    pub const fn is_server(self) -> bool {
        matches!(self, Self::ProcessServer | Self::MasterTarget)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

wire! {
    /// First message of a session.
    pub struct Hello / HelloWire = 128 {
        /// Always [`HELLO_MAGIC`].
        magic: [u8; 8],
        /// Versions the client speaks, newest first, zero-filled.
        versions: [u8; 16],
        /// Feature bits without which the client cannot work.
        required: u64,
        /// Feature bits the client would like.
        optional: u64,
        /// The agent whose session this is.
        agent: PeerId,
        /// The master target wanted; all zero for whichever this is.
        target: PeerId,
        /// Random name of this attempt, for logs.
        session: [u8; 16],
        /// What the sender of these bytes is.
        role: Role,
        /// How many relays the session has passed.
        relays: u8,
        ; reserved: [u8; 38],
    }
}

wire! {
    /// The answer to [`Hello`].
    pub struct HelloAck / HelloAckWire = 96 {
        /// Always [`HELLO_MAGIC`].
        magic: [u8; 8],
        /// The version chosen; zero where none is common.
        version: u16,
        /// What the end of the session is.
        role: Role,
        /// Feature bits in use.
        features: u64,
        /// The master target.
        target: PeerId,
        /// What the agent must sign to prove itself.
        nonce: [u8; 32],
        ; reserved: [u8; 29],
    }
}

impl Hello {
    /// The hello of an agent.
    #[must_use]
    pub fn new(agent: PeerId, target: PeerId, session: [u8; 16]) -> Self {
        let mut versions = [0_u8; 16];
        for (slot, version) in versions.chunks_exact_mut(2).zip(VERSIONS) {
            slot.copy_from_slice(&(*version as u16).to_le_bytes());
        }
        Self {
            magic: HELLO_MAGIC,
            versions,
            required: 0,
            optional: 0,
            agent,
            target,
            session,
            role: Role::Agent,
            relays: 0,
        }
    }

    /// Reads a hello.
    ///
    /// # Errors
    /// When it is not one.
    pub fn decode(body: &[u8]) -> Result<Self, FormatError> {
        check_magic(body)?;
        Self::read_exact(body)
    }

    /// The newest version both sides speak.
    #[must_use]
    pub fn common_version(&self) -> Option<Version> {
        let theirs: Vec<u16> = self
            .versions
            .chunks_exact(2)
            .filter_map(|pair| Some(u16::from_le_bytes(*pair.first_chunk()?)))
            .collect();
        VERSIONS.iter().copied().find(|ours| theirs.contains(&(*ours as u16)))
    }

    /// Required feature bits this build does not know.
    #[must_use]
    pub const fn unknown_required(&self) -> u64 {
        self.required & !FEATURES_KNOWN
    }
}

impl HelloAck {
    /// Reads an answer.
    ///
    /// # Errors
    /// When it is not one.
    pub fn decode(body: &[u8]) -> Result<Self, FormatError> {
        check_magic(body)?;
        Self::read_exact(body)
    }
}

fn check_magic(body: &[u8]) -> Result<(), FormatError> {
    if body.first_chunk() == Some(&HELLO_MAGIC) {
        Ok(())
    } else {
        Err(FormatError::Field { what: "Hello", field: "magic", got: 0, expected: "REPROTEC" })
    }
}
