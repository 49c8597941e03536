//! Everything an NBD server says: greeting, answers to options, replies to requests.
//!
//! Invariants: lengths are computed from what is written; a message is cut at a character to fit its bound; the last
//! chunk of a reply, and no other, is marked as the last.
//! Units: bytes, big-endian. Called by `net::nbd`.

use bytes::BufMut;

use super::{
    ALLOCATION_CONTEXT_ID, BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, ErrorCode, NAME_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
};
use crate::io::ByteRange;

/// First bytes of every NBD server.
pub const GREETING_MAGIC: [u8; 8] = *b"NBDMAGIC";
/// Begins every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every reply without chunks.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Begins every chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of the greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of a reply without chunks, before its data.
pub const SIMPLE_BYTES: usize = 16;
/// Bytes of a chunk before its payload.
pub const CHUNK_BYTES: usize = 20;
/// Bytes of a data chunk before its data.
pub const DATA_HEAD_BYTES: usize = CHUNK_BYTES + 8;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
/// Zeros behind the old answer to EXPORT_NAME, when the client did not decline them.
const EXPORT_NAME_ZEROES: usize = 124;
const DONE: u16 = 1;

/// What an answer to an option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionReply {
    /// Done.
    Ack = 1,
    /// One export of a list.
    Server = 2,
    /// Something about an export.
    Info = 3,
    /// A metadata context.
    Context = 4,
    /// An option this server does not know.
    ErrUnsupported = 0x8000_0001,
    /// Not allowed here.
    ErrPolicy = 0x8000_0002,
    /// The data of the option make no sense, or it comes at the wrong time.
    ErrInvalid = 0x8000_0003,
    /// TLS first.
    ErrTlsRequired = 0x8000_0005,
    /// There is no such export.
    ErrUnknown = 0x8000_0006,
    /// The server is ending.
    ErrShutdown = 0x8000_0007,
}

/// Kinds of information about an export.
mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const NAME: u16 = 1;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// The number by which a client asks for an export's name.
pub const INFO_NAME: u16 = info::NAME;

/// Kinds of chunks.
mod chunk {
    pub(super) const NONE: u16 = 0;
    pub(super) const DATA: u16 = 1;
    pub(super) const HOLE: u16 = 2;
    pub(super) const STATUS: u16 = 5;
    pub(super) const ERROR: u16 = 0x8001;
}

/// What the server says first.
#[must_use]
pub fn greeting() -> Vec<u8> {
    let mut out = Vec::with_capacity(GREETING_BYTES);
    out.put_slice(&GREETING_MAGIC);
    out.put_u64(super::option::OPTION_MAGIC);
    out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
    out
}

/// Appends one answer to option `option`.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: OptionReply, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply as u32);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

/// Data of [`OptionReply::Server`].
#[must_use]
pub fn listed(name: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(4 + name.len());
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data
}

/// Data of [`OptionReply::Info`]: size and flags.
#[must_use]
pub fn about_export(size_bytes: u64, flags: u16) -> Vec<u8> {
    let mut data = Vec::with_capacity(12);
    data.put_u16(info::EXPORT);
    data.put_u64(size_bytes);
    data.put_u16(flags);
    data
}

/// Data of [`OptionReply::Info`]: the export's own name.
#[must_use]
pub fn about_name(name: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(2 + name.len());
    data.put_u16(info::NAME);
    data.put_slice(name.as_bytes());
    data
}

/// Data of [`OptionReply::Info`]: smallest, best and largest request.
#[must_use]
pub fn about_block_size() -> Vec<u8> {
    let mut data = Vec::with_capacity(14);
    data.put_u16(info::BLOCK_SIZE);
    data.put_u32(BLOCK_BYTES_MIN);
    data.put_u32(BLOCK_BYTES_PREFERRED);
    data.put_u32(PAYLOAD_BYTES_MAX);
    data
}

/// Data of [`OptionReply::Context`].
#[must_use]
pub fn context(id: u32, name: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(4 + name.len());
    data.put_u32(id);
    data.put_slice(name.as_bytes());
    data
}

/// The answer to EXPORT_NAME, which is not an answer like the others.
#[must_use]
pub fn export_chosen(size_bytes: u64, flags: u16, no_zeroes: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(10 + EXPORT_NAME_ZEROES);
    out.put_u64(size_bytes);
    out.put_u16(flags);
    if !no_zeroes {
        out.put_bytes(0, EXPORT_NAME_ZEROES);
    }
    out
}

/// A reply without chunks; the data of a read follow it.
#[must_use]
pub fn simple(cookie: u64, error: Option<ErrorCode>) -> Vec<u8> {
    let mut out = Vec::with_capacity(SIMPLE_BYTES);
    out.put_u32(SIMPLE_MAGIC);
    out.put_u32(error.map_or(0, ErrorCode::number));
    out.put_u64(cookie);
    out
}

fn put_chunk(out: &mut Vec<u8>, cookie: u64, kind: u16, last: bool, payload_bytes: usize) {
    out.put_u32(CHUNK_MAGIC);
    out.put_u16(if last { DONE } else { 0 });
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(payload_bytes as u32);
}

/// The one chunk of a reply that says nothing but "done".
#[must_use]
pub fn done(cookie: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_BYTES);
    put_chunk(&mut out, cookie, chunk::NONE, true, 0);
    out
}

/// The head of a chunk with the bytes of `range`, which follow it.
#[must_use]
pub fn data_head(cookie: u64, range: ByteRange, last: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(DATA_HEAD_BYTES);
    put_chunk(&mut out, cookie, chunk::DATA, last, 8 + range.len() as usize);
    out.put_u64(range.start);
    out
}

/// A chunk that says that `range` reads as zeros.
#[must_use]
pub fn hole(cookie: u64, range: ByteRange, last: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_BYTES + 12);
    put_chunk(&mut out, cookie, chunk::HOLE, last, 12);
    out.put_u64(range.start);
    out.put_u32(range.len() as u32);
    out
}

/// One piece of an allocation map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long.
    pub length: u32,
    /// Reads as zeros and takes no space; otherwise there may be data.
    pub is_hole: bool,
}

/// An allocation map, from the start of the request on.
#[must_use]
pub fn status(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    const HOLE_AND_ZERO: u32 = 3;
    let payload_bytes = 4 + 8 * extents.len();
    let mut out = Vec::with_capacity(CHUNK_BYTES + payload_bytes);
    put_chunk(&mut out, cookie, chunk::STATUS, true, payload_bytes);
    out.put_u32(ALLOCATION_CONTEXT_ID);
    for extent in extents {
        out.put_u32(extent.length);
        out.put_u32(if extent.is_hole { HOLE_AND_ZERO } else { 0 });
    }
    out
}

/// A reply that says why not, to the program and to the person in front of it.
#[must_use]
pub fn error(cookie: u64, code: ErrorCode, message: &str) -> Vec<u8> {
    let message = bounded(message);
    let payload_bytes = 6 + message.len();
    let mut out = Vec::with_capacity(CHUNK_BYTES + payload_bytes);
    put_chunk(&mut out, cookie, chunk::ERROR, true, payload_bytes);
    out.put_u32(code.number());
    out.put_u16(message.len() as u16);
    out.put_slice(message.as_bytes());
    out
}

/// The longest prefix of `message` that the protocol allows, cut at a character.
#[must_use]
pub fn bounded(message: &str) -> &str {
    message.get(..message.floor_char_boundary(NAME_BYTES_MAX)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hex` without its spaces.
    fn bytes(hex: &str) -> Vec<u8> {
        let digits: String = hex.split_whitespace().collect();
        digits
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    const RANGE: ByteRange = ByteRange { start: 0x1000, end: 0x1200 };

    #[test]
    fn the_bytes_are_those_of_the_protocol_document() {
        assert_eq!(greeting(), bytes("4e42444d41474943 49484156454f5054 0003"));
        let mut out = Vec::new();
        put_option_reply(&mut out, 7, OptionReply::Info, &about_export(1 << 20, 0x8d));
        assert_eq!(out, bytes("0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 008d"));
        assert_eq!(about_block_size(), bytes("0003 00000001 00001000 02000000"));
        assert_eq!(listed("ab"), bytes("00000002 6162"));
        assert_eq!(about_name("ab"), bytes("0001 6162"));
        assert_eq!(context(1, "b:a"), bytes("00000001 623a61"));
        assert_eq!(simple(5, Some(ErrorCode::Invalid)), bytes("67446698 00000016 0000000000000005"));
        assert_eq!(done(5), bytes("668e33ef 0001 0000 0000000000000005 00000000"));
        assert_eq!(
            data_head(5, RANGE, false),
            bytes("668e33ef 0000 0001 0000000000000005 00000208 0000000000001000")
        );
        assert_eq!(
            hole(5, RANGE, true),
            bytes("668e33ef 0001 0002 0000000000000005 0000000c 0000000000001000 00000200")
        );
        let extents = [Extent { length: 512, is_hole: false }, Extent { length: 1, is_hole: true }];
        assert_eq!(
            status(5, &extents),
            bytes(
                "668e33ef 0001 0005 0000000000000005 00000014 00000001 00000200 00000000 00000001 00000003"
            )
        );
        assert_eq!(
            error(5, ErrorCode::NoSpace, "full"),
            bytes("668e33ef 0001 8001 0000000000000005 0000000a 0000001c 0004 66756c6c")
        );
    }

    #[test]
    fn the_old_answer_has_its_zeros_unless_they_were_declined() {
        assert_eq!(export_chosen(3, 1, true).len(), 10);
        let long = export_chosen(3, 1, false);
        assert_eq!((long.len(), long[10..].iter().all(|byte| *byte == 0)), (134, true));
    }

    #[test]
    fn messages_are_cut_at_a_character() {
        let message = "é".repeat(NAME_BYTES_MAX);
        assert_eq!(bounded(&message).len(), NAME_BYTES_MAX);
        assert_eq!(bounded(&format!("a{message}")).len(), NAME_BYTES_MAX - 1);
    }
}
