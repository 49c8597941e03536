//! Requests of the transmission phase, and the check that turns one into work.
//!
//! Invariants: [`Request`] is what the client said, [`Work`] is what may be done: inside the export, within the
//! bounds, allowed on it, with flags that mean something. Nothing but [`Request::check`] makes a `Work`. A request
//! that is refused leaves the stream in step as soon as [`Request::payload_bytes`] were read.
//! Units: bytes, big-endian. Called by `net::nbd`.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ErrorCode, PAYLOAD_BYTES_MAX};
use crate::format::FormatError;
use crate::io::ByteRange;

/// Begins every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;

/// Command flags.
pub mod command_flags {
    /// Durable before the answer.
    pub const FUA: u16 = 1;
    /// Zeros must take their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of data, please.
    pub const DF: u16 = 1 << 2;
    /// One extent, please.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes of the export.
    Read,
    /// Bytes for the export.
    Write,
    /// Good-bye.
    Disconnect,
    /// Everything answered so far becomes durable.
    Flush,
    /// This range is no longer needed.
    Trim,
    /// This range will be needed.
    Cache,
    /// Zeros for the export.
    WriteZeroes,
    /// Where the export has data.
    BlockStatus,
    /// Something newer than this server.
    Other(u16),
}

impl Command {
    const fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(number) => number,
        }
    }

    /// Flags that mean something with this command. FUA may stand on any: clients are known to set it everywhere.
    const fn flags(self) -> u16 {
        command_flags::FUA
            | match self {
                Self::Read => command_flags::DF,
                Self::WriteZeroes => command_flags::NO_HOLE,
                Self::BlockStatus => command_flags::REQ_ONE,
                _ => 0,
            }
    }
}

/// One request as it stands on the wire; the payload of a write follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`command_flags`].
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's name for this request; its answer carries it back.
    pub cookie: u64,
    /// Where in the export.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RequestWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

/// What an export and the negotiation allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Size of the export.
    pub size_bytes: u64,
    /// Whether it may be written.
    pub writable: bool,
    /// Whether replies in chunks were negotiated.
    pub structured: bool,
    /// Whether `base:allocation` was negotiated.
    pub allocation: bool,
}

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Send these bytes.
    Read {
        /// Which.
        range: ByteRange,
        /// In one chunk, with the zeros of holes in it.
        whole: bool,
    },
    /// Store the payload here.
    Write {
        /// Where.
        range: ByteRange,
        /// Durable before the answer.
        durable: bool,
    },
    /// Make this range read as zeros.
    Zero {
        /// Which.
        range: ByteRange,
        /// Durable before the answer.
        durable: bool,
        /// The zeros must take their space.
        allocate: bool,
    },
    /// Make everything answered so far durable.
    Flush,
    /// Say where data is.
    Status {
        /// In which range.
        range: ByteRange,
        /// Only the first extent.
        one: bool,
    },
    /// Finish what is under way, and close.
    Disconnect,
}

impl Request {
    /// Size on the wire.
    pub const BYTES: usize = 28;

    /// Reads a request.
    ///
    /// # Errors
    /// When it is none: the stream cannot be followed any further.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, FormatError> {
        let wire: RequestWire = zerocopy::transmute!(bytes);
        if wire.magic.get() != REQUEST_MAGIC {
            return Err(FormatError::Field {
                what: "NBD request",
                field: "magic",
                got: wire.magic.get().into(),
                expected: "0x25609513",
            });
        }
        Ok(Self {
            flags: wire.flags.get(),
            command: Command::from_number(wire.command.get()),
            cookie: wire.cookie.get(),
            offset: wire.offset.get(),
            length: wire.length.get(),
        })
    }

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let wire = RequestWire {
            magic: U32::new(REQUEST_MAGIC),
            flags: U16::new(self.flags),
            command: U16::new(self.command.number()),
            cookie: U64::new(self.cookie),
            offset: U64::new(self.offset),
            length: U32::new(self.length),
        };
        zerocopy::transmute!(wire)
    }

    /// Bytes that follow the request.
    #[must_use]
    pub const fn payload_bytes(&self) -> u32 {
        if matches!(self.command, Command::Write) { self.length } else { 0 }
    }

    const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The range asked for, or `beyond` where it leaves the export.
    fn range(&self, allowed: &Allowed, beyond: ErrorCode) -> Result<ByteRange, ErrorCode> {
        match self.offset.checked_add(self.length.into()) {
            Some(end) if end <= allowed.size_bytes => Ok(ByteRange { start: self.offset, end }),
            _ => Err(beyond),
        }
    }

    /// What is to be done, or why not.
    ///
    /// # Errors
    /// The number the client is answered with.
    pub fn check(&self, allowed: &Allowed) -> Result<Work, ErrorCode> {
        if self.command == Command::Disconnect {
            return Ok(Work::Disconnect); // whatever else it says
        }
        if self.flags & !self.command.flags() != 0 || self.has(command_flags::DF) && !allowed.structured {
            return Err(ErrorCode::Invalid);
        }
        let changes = matches!(self.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if changes && !allowed.writable {
            return Err(ErrorCode::Permission);
        }
        let durable = self.has(command_flags::FUA);
        let whole = self.has(command_flags::DF);
        match self.command {
            Command::Read if self.length > PAYLOAD_BYTES_MAX => Err(ErrorCode::Invalid),
            Command::Read => Ok(Work::Read { range: self.range(allowed, ErrorCode::Invalid)?, whole }),
            Command::Write if self.length > PAYLOAD_BYTES_MAX => Err(ErrorCode::Invalid),
            Command::Write => Ok(Work::Write { range: self.range(allowed, ErrorCode::NoSpace)?, durable }),
            Command::WriteZeroes => Ok(Work::Zero {
                range: self.range(allowed, ErrorCode::NoSpace)?,
                durable,
                allocate: self.has(command_flags::NO_HOLE),
            }),
            Command::Trim => {
                let range = self.range(allowed, ErrorCode::Invalid)?;
                Ok(Work::Zero { range, durable, allocate: false })
            }
            Command::Flush if self.offset == 0 && self.length == 0 => Ok(Work::Flush),
            Command::BlockStatus if allowed.allocation && self.length > 0 => Ok(Work::Status {
                range: self.range(allowed, ErrorCode::Invalid)?,
                one: self.has(command_flags::REQ_ONE),
            }),
            Command::Flush
            | Command::BlockStatus
            | Command::Cache
            | Command::Disconnect
            | Command::Other(_) => Err(ErrorCode::Invalid),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Allowed = Allowed { size_bytes: 1 << 30, writable: true, structured: true, allocation: true };

    fn request(command: Command, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, command, cookie: 7, offset, length }
    }

    fn range_of(work: Work) -> Option<ByteRange> {
        match work {
            Work::Read { range, .. }
            | Work::Write { range, .. }
            | Work::Zero { range, .. }
            | Work::Status { range, .. } => Some(range),
            Work::Flush | Work::Disconnect => None,
        }
    }

    proptest! {
        #[test]
        fn a_request_is_written_back_as_it_was_read(mut bytes in any::<[u8; Request::BYTES]>(), number in 0..9_u16) {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[6..8].copy_from_slice(&number.to_be_bytes());
            prop_assert_eq!(Request::decode(bytes).expect("the magic is right").to_bytes(), bytes);
        }

        #[test]
        fn what_is_allowed_lies_inside_the_export_and_its_bounds(
            number in 0..9_u16, flags in 0..32_u16, offset in prop_oneof![0..1_u64 << 31, any::<u64>()],
            length in any::<u32>(), size_bytes in 0..1_u64 << 33, bits in any::<[bool; 3]>(),
        ) {
            let [writable, structured, allocation] = bits;
            let allowed = Allowed { size_bytes, writable, structured, allocation };
            let request = request(Command::from_number(number), flags, offset, length);
            let Ok(work) = request.check(&allowed) else { return Ok(()) };
            if let Some(range) = range_of(work) {
                prop_assert!(range.start <= range.end && range.end <= size_bytes);
                prop_assert_eq!(range.len(), u64::from(length));
            }
            match work {
                Work::Read { range, whole } => {
                    prop_assert!(range.len() <= u64::from(PAYLOAD_BYTES_MAX) && (structured || !whole));
                }
                Work::Write { range, .. } => {
                    prop_assert!(writable && range.len() <= u64::from(PAYLOAD_BYTES_MAX));
                }
                Work::Zero { .. } => prop_assert!(writable),
                Work::Status { range, .. } => prop_assert!(allocation && !range.is_empty()),
                Work::Flush | Work::Disconnect => {}
            }
        }
    }

    #[test]
    fn another_magic_is_refused() {
        let mut bytes = request(Command::Read, 0, 0, 512).to_bytes();
        bytes[3] ^= 1;
        assert!(Request::decode(bytes).is_err());
    }

    #[test]
    fn refusals_carry_the_number_that_tells_why() {
        let read_only = Allowed { writable: false, ..ALL };
        let plain = Allowed { structured: false, allocation: false, ..ALL };
        let (end, over) = (ALL.size_bytes, PAYLOAD_BYTES_MAX + 1);
        for (allowed, request, expected) in [
            (ALL, request(Command::Read, 0, end - 1, 2), ErrorCode::Invalid),
            (ALL, request(Command::Read, 0, u64::MAX, 2), ErrorCode::Invalid),
            (ALL, request(Command::Read, 0, 0, over), ErrorCode::Invalid),
            (ALL, request(Command::Write, 0, end - 1, 2), ErrorCode::NoSpace),
            (ALL, request(Command::WriteZeroes, 0, end, 1), ErrorCode::NoSpace),
            (ALL, request(Command::Trim, 0, end, 1), ErrorCode::Invalid),
            (ALL, request(Command::WriteZeroes, 1 << 4, 0, 512), ErrorCode::Invalid),
            (ALL, request(Command::Write, command_flags::DF, 0, 512), ErrorCode::Invalid),
            (ALL, request(Command::Flush, 0, 0, 1), ErrorCode::Invalid),
            (ALL, request(Command::BlockStatus, 0, 0, 0), ErrorCode::Invalid),
            (ALL, request(Command::Cache, 0, 0, 512), ErrorCode::Invalid),
            (ALL, request(Command::Other(99), 0, 0, 512), ErrorCode::Invalid),
            (plain, request(Command::BlockStatus, 0, 0, 512), ErrorCode::Invalid),
            (plain, request(Command::Read, command_flags::DF, 0, 512), ErrorCode::Invalid),
            (read_only, request(Command::Write, 0, 0, 512), ErrorCode::Permission),
            (read_only, request(Command::Trim, 0, 0, 512), ErrorCode::Permission),
            (read_only, request(Command::WriteZeroes, 0, 0, 512), ErrorCode::Permission),
        ] {
            assert_eq!(request.check(&allowed), Err(expected), "{request:?}");
        }
    }

    #[test]
    fn every_flag_reaches_the_work() {
        let range = ByteRange { start: 512, end: 1024 };
        let work = |command, flags| request(command, flags, 512, 512).check(&ALL).expect("allowed");
        assert_eq!(work(Command::Read, command_flags::DF), Work::Read { range, whole: true });
        assert_eq!(work(Command::Read, command_flags::FUA), Work::Read { range, whole: false });
        assert_eq!(work(Command::Write, command_flags::FUA), Work::Write { range, durable: true });
        assert_eq!(
            work(Command::WriteZeroes, command_flags::NO_HOLE),
            Work::Zero { range, durable: false, allocate: true }
        );
        assert_eq!(
            work(Command::Trim, command_flags::FUA),
            Work::Zero { range, durable: true, allocate: false }
        );
        assert_eq!(work(Command::BlockStatus, command_flags::REQ_ONE), Work::Status { range, one: true });
        assert_eq!(work(Command::Disconnect, u16::MAX), Work::Disconnect);
    }
}
