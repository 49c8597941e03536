//! The client's side of the negotiation: its flags, and the options it asks for.
//!
//! Invariants: an option is decoded whole or refused; what is accepted is written back by [`OptionRequest::encode`]
//! as the same bytes; an option that is not known keeps its number, so that it can be declined by name.
//! Units: bytes, big-endian. Called by `net::nbd`.

use bytes::BufMut;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{NAME_BYTES_MAX, OPTION_BYTES_MAX};
use crate::format::FormatError;

/// Begins every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");

/// What a client says first: how it wants to negotiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// The old answer to EXPORT_NAME ends without its 124 zeros.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Size on the wire.
    pub const BYTES: usize = 4;
    const FIXED_NEWSTYLE: u32 = 1;
    const NO_ZEROES: u32 = 2;

    /// Reads the flags.
    ///
    /// # Errors
    /// When a flag is set that was not offered, or the client cannot negotiate in the fixed way, which is older than
    /// any client of today.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, FormatError> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(Self::FIXED_NEWSTYLE | Self::NO_ZEROES) != 0 || flags & Self::FIXED_NEWSTYLE == 0 {
            return Err(FormatError::Field {
                what: "NBD client flags",
                field: "flags",
                got: flags.into(),
                expected: "1 or 3: fixed newstyle, and perhaps no zeroes",
            });
        }
        Ok(Self { no_zeroes: flags & Self::NO_ZEROES != 0 })
    }

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        (Self::FIXED_NEWSTYLE | if self.no_zeroes { Self::NO_ZEROES } else { 0 }).to_be_bytes()
    }
}

/// Announces an option and the length of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// Bytes of data that follow, at most [`OPTION_BYTES_MAX`].
    pub data_bytes: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OptionHeaderWire {
    magic: U64,
    option: U32,
    data_bytes: U32,
}

impl OptionHeader {
    /// Size on the wire.
    pub const BYTES: usize = 16;

    /// Reads a header.
    ///
    /// # Errors
    /// When it is none, or announces more data than any option has: the stream cannot be followed any further.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, FormatError> {
        let wire: OptionHeaderWire = zerocopy::transmute!(bytes);
        let field = |field, got, expected| FormatError::Field { what: "NBD option", field, got, expected };
        if wire.magic.get() != OPTION_MAGIC {
            return Err(field("magic", wire.magic.get(), "IHAVEOPT"));
        }
        if wire.data_bytes.get() > OPTION_BYTES_MAX {
            return Err(field("data_bytes", wire.data_bytes.get().into(), "at most 65536"));
        }
        Ok(Self { option: wire.option.get(), data_bytes: wire.data_bytes.get() })
    }

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let wire = OptionHeaderWire {
            magic: U64::new(OPTION_MAGIC),
            option: U32::new(self.option),
            data_bytes: U32::new(self.data_bytes),
        };
        zerocopy::transmute!(wire)
    }
}

/// An export, and what the client would like to know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery {
    /// The export's name; empty for the default one.
    pub name: String,
    /// Numbers of the information wanted; the server may say more or less.
    pub wanted: Vec<u16>,
}

/// An export, and the metadata contexts asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery {
    /// The export's name; empty for the default one.
    pub name: String,
    /// `namespace:leaf` each.
    pub queries: Vec<String>,
}

/// One option with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionRequest {
    /// The old way to choose an export; it has no way to say no but to hang up.
    ExportName(String),
    /// The client gives up, politely.
    Abort,
    /// Names of all exports.
    List,
    /// TLS from here on.
    StartTls,
    /// About an export.
    Info(ExportQuery),
    /// About an export, and then begin.
    Go(ExportQuery),
    /// Replies in chunks.
    StructuredReply,
    /// Which metadata contexts there are.
    ListContexts(ContextQuery),
    /// Which metadata contexts the client wants.
    SetContexts(ContextQuery),
    /// Something newer than this server.
    Other(u32),
}

/// What the protocol calls the options.
mod number {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const STARTTLS: u32 = 5;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const LIST_META_CONTEXT: u32 = 9;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

impl OptionRequest {
    /// Reads the data of option `option`.
    ///
    /// # Errors
    /// When they are not what that option carries; the stream goes on behind them.
    pub fn decode(option: u32, data: &[u8]) -> Result<Self, FormatError> {
        match option {
            number::EXPORT_NAME => Ok(Self::ExportName(text(data, "NBD export name")?)),
            number::ABORT => bare(data, "NBD abort", Self::Abort),
            number::LIST => bare(data, "NBD list", Self::List),
            number::STARTTLS => bare(data, "NBD start TLS", Self::StartTls),
            number::INFO => export_query(data).map(Self::Info),
            number::GO => export_query(data).map(Self::Go),
            number::STRUCTURED_REPLY => bare(data, "NBD structured reply", Self::StructuredReply),
            number::LIST_META_CONTEXT => context_query(data).map(Self::ListContexts),
            number::SET_META_CONTEXT => context_query(data).map(Self::SetContexts),
            other => Ok(Self::Other(other)),
        }
    }

    /// The option's number.
    #[must_use]
    pub const fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => number::EXPORT_NAME,
            Self::Abort => number::ABORT,
            Self::List => number::LIST,
            Self::StartTls => number::STARTTLS,
            Self::Info(_) => number::INFO,
            Self::Go(_) => number::GO,
            Self::StructuredReply => number::STRUCTURED_REPLY,
            Self::ListContexts(_) => number::LIST_META_CONTEXT,
            Self::SetContexts(_) => number::SET_META_CONTEXT,
            Self::Other(option) => *option,
        }
    }

    /// Header and data, as a client sends them. What an unknown option carried was not kept.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.put_slice(name.as_bytes()),
            Self::Info(query) | Self::Go(query) => {
                put_text(&mut data, &query.name);
                data.put_u16(query.wanted.len() as u16);
                query.wanted.iter().for_each(|wanted| data.put_u16(*wanted));
            }
            Self::ListContexts(query) | Self::SetContexts(query) => {
                put_text(&mut data, &query.name);
                data.put_u32(query.queries.len() as u32);
                query.queries.iter().for_each(|query| put_text(&mut data, query));
            }
            Self::Abort | Self::List | Self::StartTls | Self::StructuredReply | Self::Other(_) => {}
        }
        let header = OptionHeader { option: self.number(), data_bytes: data.len() as u32 };
        [header.to_bytes().as_slice(), &data].concat()
    }
}

fn bare(data: &[u8], what: &'static str, option: OptionRequest) -> Result<OptionRequest, FormatError> {
    if data.is_empty() { Ok(option) } else { Err(FormatError::Trailing { what, got: data.len() }) }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

/// All of `bytes` as a string of the protocol.
fn text(bytes: &[u8], what: &'static str) -> Result<String, FormatError> {
    let field = |got, expected| FormatError::Field { what, field: "text", got, expected };
    if bytes.len() > NAME_BYTES_MAX {
        return Err(field(bytes.len() as u64, "at most 4096 bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(field(0, "UTF-8 without NUL")),
    }
}

fn short(what: &'static str, bytes: &[u8], expected: usize) -> FormatError {
    FormatError::Short { what, got: bytes.len(), expected }
}

fn take_u16<'a>(bytes: &'a [u8], what: &'static str) -> Result<(u16, &'a [u8]), FormatError> {
    let (number, rest) = bytes.split_first_chunk().ok_or_else(|| short(what, bytes, 2))?;
    Ok((u16::from_be_bytes(*number), rest))
}

fn take_u32<'a>(bytes: &'a [u8], what: &'static str) -> Result<(u32, &'a [u8]), FormatError> {
    let (number, rest) = bytes.split_first_chunk().ok_or_else(|| short(what, bytes, 4))?;
    Ok((u32::from_be_bytes(*number), rest))
}

fn take_text<'a>(bytes: &'a [u8], what: &'static str) -> Result<(String, &'a [u8]), FormatError> {
    let (len, rest) = take_u32(bytes, what)?;
    let (mine, rest) = rest.split_at_checked(len as usize).ok_or_else(|| short(what, rest, len as usize))?;
    Ok((text(mine, what)?, rest))
}

fn finished(rest: &[u8], what: &'static str) -> Result<(), FormatError> {
    if rest.is_empty() { Ok(()) } else { Err(FormatError::Trailing { what, got: rest.len() }) }
}

fn export_query(data: &[u8]) -> Result<ExportQuery, FormatError> {
    let what = "NBD export query";
    let (name, rest) = take_text(data, what)?;
    let (count, mut rest) = take_u16(rest, what)?;
    let mut wanted = Vec::new();
    for _ in 0..count {
        let (number, after) = take_u16(rest, what)?;
        wanted.push(number);
        rest = after;
    }
    finished(rest, what)?;
    Ok(ExportQuery { name, wanted })
}

fn context_query(data: &[u8]) -> Result<ContextQuery, FormatError> {
    let what = "NBD context query";
    let (name, rest) = take_text(data, what)?;
    let (count, mut rest) = take_u32(rest, what)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        // A count that the data cannot bear ends here at the first query that is missing.
        let (query, after) = take_text(rest, what)?;
        queries.push(query);
        rest = after;
    }
    finished(rest, what)?;
    Ok(ContextQuery { name, queries })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> impl Strategy<Value = String> {
        proptest::collection::vec(any::<char>().prop_filter("NUL", |c| *c != '\0'), 0..40)
            .prop_map(|chars| chars.into_iter().collect())
    }

    fn any_option() -> impl Strategy<Value = OptionRequest> {
        let export = || {
            (name(), proptest::collection::vec(any::<u16>(), 0..6))
                .prop_map(|(name, wanted)| ExportQuery { name, wanted })
        };
        let context = || {
            (name(), proptest::collection::vec(name(), 0..6))
                .prop_map(|(name, queries)| ContextQuery { name, queries })
        };
        prop_oneof![
            name().prop_map(OptionRequest::ExportName),
            Just(OptionRequest::Abort),
            Just(OptionRequest::List),
            Just(OptionRequest::StartTls),
            Just(OptionRequest::StructuredReply),
            export().prop_map(OptionRequest::Info),
            export().prop_map(OptionRequest::Go),
            context().prop_map(OptionRequest::ListContexts),
            context().prop_map(OptionRequest::SetContexts),
            (11_u32..).prop_map(OptionRequest::Other),
        ]
    }

    fn decode_all(bytes: &[u8]) -> Result<OptionRequest, FormatError> {
        let (head, data) = bytes.split_first_chunk().expect("a header");
        let header = OptionHeader::decode(*head)?;
        assert_eq!(header.data_bytes as usize, data.len());
        OptionRequest::decode(header.option, data)
    }

    proptest! {
        #[test]
        fn an_option_reads_back_what_it_wrote(option in any_option()) {
            prop_assert_eq!(decode_all(&option.encode()).expect("written by us"), option);
        }

        #[test]
        fn an_option_cut_short_or_lengthened_is_refused(option in any_option(), cut in any::<prop::sample::Index>()) {
            let bytes = option.encode();
            let data = &bytes[OptionHeader::BYTES..];
            let free = matches!(option, OptionRequest::ExportName(_) | OptionRequest::Other(_));
            if !free {
                prop_assert!(OptionRequest::decode(option.number(), &[data, &[0]].concat()).is_err());
                if !data.is_empty() {
                    let cut = cut.index(data.len());
                    prop_assert!(OptionRequest::decode(option.number(), &data[..cut]).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_or_written_back_the_same(
            option in 0_u32..14, data in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            if let Ok(decoded) = OptionRequest::decode(option, &data)
                && !matches!(decoded, OptionRequest::Other(_))
            {
                prop_assert_eq!(&decoded.encode()[OptionHeader::BYTES..], data.as_slice());
            }
        }
    }

    #[test]
    fn counts_that_the_data_cannot_bear_cost_nothing() {
        let claims = [&0_u32.to_be_bytes(), &u32::MAX.to_be_bytes(), [0; 8].as_slice()].concat();
        assert!(matches!(OptionRequest::decode(10, &claims), Err(FormatError::Short { .. })));
        let claims = [u32::MAX.to_be_bytes(), [0; 4]].concat();
        assert!(matches!(OptionRequest::decode(7, &claims), Err(FormatError::Short { .. })));
    }

    #[test]
    fn headers_of_another_protocol_or_beyond_the_bound_are_refused() {
        let good = OptionHeader { option: 7, data_bytes: OPTION_BYTES_MAX };
        assert_eq!(OptionHeader::decode(good.to_bytes()), Ok(good));
        let long = OptionHeader { option: 7, data_bytes: OPTION_BYTES_MAX + 1 };
        assert!(OptionHeader::decode(long.to_bytes()).is_err());
        assert!(OptionHeader::decode(*b"GET / HTTP/1.1\r\n").is_err());
    }

    #[test]
    fn names_are_utf_8_without_nul_and_bounded() {
        assert!(OptionRequest::decode(1, b"disk\0").is_err());
        assert!(OptionRequest::decode(1, &[0xff]).is_err());
        assert!(OptionRequest::decode(1, &[b'a'; NAME_BYTES_MAX]).is_ok());
        assert!(OptionRequest::decode(1, &[b'a'; NAME_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn flags_that_were_not_offered_are_refused() {
        for flags in 0..8_u32 {
            let decoded = ClientFlags::decode(flags.to_be_bytes());
            assert_eq!(decoded.is_ok(), flags == 1 || flags == 3, "{flags}");
            if let Ok(decoded) = decoded {
                assert_eq!(decoded.to_bytes(), flags.to_be_bytes());
            }
        }
    }
}
