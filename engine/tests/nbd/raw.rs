//! A hand-made NBD client that says exactly what a test wants and hears exactly what the server says.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use reprotect_engine::format::nbd::option::{
    ClientFlags, ContextQuery, ExportQuery, OptionHeader, OptionRequest,
};
use reprotect_engine::format::nbd::reply::{CHUNK_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_MAGIC, greeting};
use reprotect_engine::format::nbd::request::Request;
use reprotect_engine::net::nbd::listen::Address;

/// One answer to an option.
#[derive(Debug)]
pub(crate) struct OptionAnswer {
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// A reply without chunks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
}

/// One chunk, without its cookie.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    Done,
    Data(u64, Vec<u8>),
    /// Place and length.
    Hole((u64, u32)),
    /// Lengths and flags.
    Status(Vec<(u32, u32)>),
    Error(u32),
    Other(u16),
}

impl std::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("Done"),
            Self::Data(at, data) => write!(f, "Data({at}, {} bytes)", data.len()),
            Self::Hole(hole) => write!(f, "Hole({hole:?})"),
            Self::Status(map) => write!(f, "Status({map:?})"),
            Self::Error(code) => write!(f, "Error({code})"),
            Self::Other(kind) => write!(f, "Other({kind})"),
        }
    }
}

impl Chunk {
    pub(crate) fn error(&self) -> Option<u32> {
        match self {
            Self::Error(code) => Some(*code),
            _ => None,
        }
    }

    /// The bytes of `len` from `start` that the chunks of one read make; each byte must be told once.
    pub(crate) fn assemble(chunks: &[Self], start: u64, len: usize) -> Vec<u8> {
        let (mut data, mut told) = (vec![0xEE; len], vec![false; len]);
        for chunk in chunks {
            let (at, bytes) = match chunk {
                Self::Data(at, bytes) => (*at, bytes.clone()),
                Self::Hole((at, len)) => (*at, vec![0; *len as usize]),
                other => panic!("{other:?} in a read"),
            };
            let from = (at - start) as usize;
            assert!(told[from..from + bytes.len()].iter().all(|told| !told), "told twice");
            told[from..from + bytes.len()].fill(true);
            data[from..from + bytes.len()].copy_from_slice(&bytes);
        }
        assert!(told.into_iter().all(|told| told), "bytes are missing");
        data
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    /// Flags of the export, once it was chosen by `go`.
    pub(crate) option_flags: u16,
    /// Bytes heard so far.
    pub(crate) heard: usize,
}

impl Client {
    /// Connects and says nothing.
    pub(crate) fn silent(address: &Address) -> Self {
        let Address::Unix(path) = address else { panic!("a Unix socket") };
        let stream = UnixStream::connect(path).unwrap();
        // A server that never answers fails the test instead of hanging it.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream, option_flags: 0, heard: 0 }
    }

    /// Connects and is ready for options.
    pub(crate) fn connect(address: &Address) -> Self {
        Self::connect_with(address, true)
    }

    pub(crate) fn connect_with(address: &Address, no_zeroes: bool) -> Self {
        let mut client = Self::silent(address);
        assert_eq!(client.read(greeting().len()), greeting());
        client.write(&ClientFlags { no_zeroes }.to_bytes());
        client
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn finish_writing(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    pub(crate) fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        self.heard += len;
        bytes
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        self.read(N).try_into().unwrap()
    }

    /// Everything until the server hangs up, which it must.
    pub(crate) fn read_to_end(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => break,
                Ok(len) => rest.extend_from_slice(&piece[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the server did not hang up: {error}"),
            }
        }
        self.heard += rest.len();
        rest
    }

    /// Reads away what comes until the server hangs up; fails when it does not.
    pub(crate) fn expect_hang_up(&mut self) {
        self.read_to_end();
    }

    /// Sends an option; its answers, the final one last.
    pub(crate) fn option(&mut self, option: &OptionRequest) -> Vec<OptionAnswer> {
        let bytes = option.encode();
        self.option_bytes(option.number(), &bytes[OptionHeader::BYTES..])
    }

    pub(crate) fn option_bytes(&mut self, option: u32, data: &[u8]) -> Vec<OptionAnswer> {
        let header = OptionHeader { option, data_bytes: data.len() as u32 };
        self.write(&[header.to_bytes().as_slice(), data].concat());
        let mut answers = Vec::new();
        loop {
            let answer = self.option_reply(option);
            let last = answer.kind == 1 || answer.kind & 0x8000_0000 != 0;
            answers.push(answer);
            if last {
                return answers;
            }
        }
    }

    pub(crate) fn option_reply(&mut self, option: u32) -> OptionAnswer {
        assert_eq!(u64::from_be_bytes(self.number()), OPTION_REPLY_MAGIC);
        assert_eq!(u32::from_be_bytes(self.number()), option);
        let kind = u32::from_be_bytes(self.number());
        let len = u32::from_be_bytes(self.number());
        OptionAnswer { kind, data: self.read(len as usize) }
    }

    /// Chooses an export; the final answer.
    pub(crate) fn go(&mut self, name: &str) -> u32 {
        let query = ExportQuery { name: name.to_owned(), wanted: Vec::new() };
        let answers = self.option(&OptionRequest::Go(query));
        for answer in answers.iter().filter(|answer| answer.kind == 3 && answer.data.starts_with(&[0, 0])) {
            self.option_flags = u16::from_be_bytes(answer.data[10..12].try_into().unwrap());
        }
        answers.last().unwrap().kind
    }

    /// Chooses an export with structured replies and its allocation map.
    pub(crate) fn enter(&mut self, name: &str) {
        assert_eq!(self.option(&OptionRequest::StructuredReply).last().unwrap().kind, 1);
        let queries = vec!["base:allocation".to_owned()];
        let query = ContextQuery { name: name.to_owned(), queries };
        assert_eq!(self.option(&OptionRequest::SetContexts(query)).len(), 2);
        assert_eq!(self.go(name), 1);
    }

    pub(crate) fn send(&mut self, request: &Request, payload: &[u8]) {
        self.write(&[request.to_bytes().as_slice(), payload].concat());
    }

    pub(crate) fn simple(&mut self) -> Reply {
        assert_eq!(u32::from_be_bytes(self.number()), SIMPLE_MAGIC);
        let error = u32::from_be_bytes(self.number());
        Reply { cookie: u64::from_be_bytes(self.number()), error }
    }

    /// The next chunk, whether it is the last, and whose.
    fn any_chunk(&mut self) -> (Chunk, bool, u64) {
        assert_eq!(u32::from_be_bytes(self.number()), CHUNK_MAGIC);
        let last = u16::from_be_bytes(self.number()) & 1 != 0;
        let kind = u16::from_be_bytes(self.number());
        let cookie = u64::from_be_bytes(self.number());
        let len = u32::from_be_bytes(self.number()) as usize;
        let payload = self.read(len);
        let place = || u64::from_be_bytes(payload[..8].try_into().unwrap());
        let chunk = match kind {
            0 => Chunk::Done,
            1 => Chunk::Data(place(), payload[8..].to_vec()),
            2 => Chunk::Hole((place(), u32::from_be_bytes(payload[8..].try_into().unwrap()))),
            5 => Chunk::Status(
                payload[4..]
                    .chunks_exact(8)
                    .map(|pair| {
                        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
                        (number(&pair[..4]), number(&pair[4..]))
                    })
                    .collect(),
            ),
            0x8001 => Chunk::Error(u32::from_be_bytes(payload[..4].try_into().unwrap())),
            other => Chunk::Other(other),
        };
        (chunk, last, cookie)
    }

    /// A reply of one chunk.
    pub(crate) fn chunk(&mut self) -> Chunk {
        let (chunk, last, _) = self.any_chunk();
        assert!(last, "{chunk:?}");
        chunk
    }

    /// The chunks of one reply.
    pub(crate) fn chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let (chunk, last, _) = self.any_chunk();
            chunks.push(chunk);
            if last {
                return chunks;
            }
        }
    }

    /// Takes the answer to some read of 512 bytes, checks it against the disk, and says whose it was.
    pub(crate) fn next_cookie_of_512(&mut self, plain: &[u8]) -> u64 {
        let (chunk, last, cookie) = self.any_chunk();
        let Chunk::Data(at, data) = &chunk else { panic!("{chunk:?}") };
        assert!(last && data.len() == 512);
        assert_eq!(*data, plain[*at as usize..*at as usize + 512]);
        cookie
    }
}
