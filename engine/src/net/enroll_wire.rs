//! The two messages of enrolment: one request, one answer, each ended by the end of its stream.
//!
//! Invariants: every length is bounded before anything is copied; nothing follows the last field; garbage is an error,
//! never a panic. Layouts are frozen: a machine of any later version must be able to enrol.
//!
//! Request: `RPEN`, version u16, kind u8, role u8, secret 16 bytes (zero for a renewal), host name (u8 length),
//! certificate request (u16 length). Answer: `RPEA`, version u16, status u8, and with status 0: peer 16 bytes, site
//! (u8 length), certificates (u8 count, each u16 length). Integers little-endian. Called by `enroll` only.

use rustls_pki_types::CertificateDer;

use crate::net::ca::REQUEST_BYTES_MAX as CSR_BYTES_MAX;
use crate::net::identity::{
    CERTIFICATE_BYTES_MAX, CHAIN_CERTIFICATES_MAX, Role, SITE_BYTES_MAX, is_site_name,
};
use crate::net::token::SECRET_BYTES;
use crate::units::PeerId;

/// Version of both messages.
pub const VERSION: u16 = 1;
/// Longest host name in bytes.
pub const HOST_BYTES_MAX: usize = 253;
/// Longest request in bytes.
pub const REQUEST_BYTES_MAX: usize = 4 + 2 + 1 + 1 + SECRET_BYTES + 1 + HOST_BYTES_MAX + 2 + CSR_BYTES_MAX;
/// Longest answer in bytes.
pub const ANSWER_BYTES_MAX: usize =
    4 + 2 + 1 + 16 + 1 + SITE_BYTES_MAX + 1 + CHAIN_CERTIFICATES_MAX * (2 + CERTIFICATE_BYTES_MAX);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A first certificate, for a token's secret.
    Enrol,
    /// A new certificate, by the certificate shown in the handshake.
    Renew,
}

/// A request.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub kind: Kind,
    /// What the asking daemon is.
    pub role: Role,
    /// The token's secret; zeros for a renewal.
    pub secret: [u8; SECRET_BYTES],
    /// The machine's name, for people.
    pub host_name: String,
    /// The certificate request, DER.
    pub csr: Vec<u8>,
}

/// Why a request is refused, as told to the asking side. Frozen numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Unknown or used token; deliberately one answer.
    Unknown,
    /// Expired token.
    Expired,
    /// Token for another role.
    WrongRole,
    /// Too many attempts.
    TooMany,
    /// The certificate request is not acceptable.
    BadRequest,
    /// A renewal without a certificate.
    NoCertificate,
    /// A message version we do not know.
    Version,
    /// The target has a problem of its own; its log says which.
    Internal,
}

impl Refusal {
    /// Every refusal, in the order of their numbers, which start at one.
    pub const ALL: [Self; 8] = [
        Self::Unknown,
        Self::Expired,
        Self::WrongRole,
        Self::TooMany,
        Self::BadRequest,
        Self::NoCertificate,
        Self::Version,
        Self::Internal,
    ];

    fn code(self) -> u8 {
        Self::ALL.iter().zip(1..).find(|(refusal, _)| **refusal == self).map_or(u8::MAX, |(_, code)| code)
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The certificate.
    Issued {
        /// The identity given.
        peer: PeerId,
        /// The site.
        site: String,
        /// Leaf first, CA last.
        chain: Vec<CertificateDer<'static>>,
    },
    /// None.
    Refused(Refusal),
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// Not of this form.
    Malformed,
    /// Of a version we do not know.
    Version(u16),
}

/// A bounded reader; every step answers `None` at the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| *byte)
    }

    fn short(&mut self) -> Option<u16> {
        self.array().map(|bytes| u16::from_le_bytes(*bytes))
    }

    fn bytes(&mut self, len: usize, max: usize) -> Option<&'a [u8]> {
        if len > max {
            return None;
        }
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn text(&mut self, max: usize) -> Option<&'a str> {
        let len = usize::from(self.byte()?);
        std::str::from_utf8(self.bytes(len, max)?).ok()
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }

    fn envelope(&mut self, magic: [u8; 4]) -> Result<(), WireError> {
        if self.array() != Some(&magic) {
            return Err(WireError::Malformed);
        }
        match self.short() {
            Some(VERSION) => Ok(()),
            Some(other) => Err(WireError::Version(other)),
            None => Err(WireError::Malformed),
        }
    }
}

/// Whether `name` is a host name as people write it: letters, digits, `.`, `-`, `_`.
#[must_use]
pub fn is_host_name(name: &str) -> bool {
    (1..=HOST_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

fn push_sized(out: &mut Vec<u8>, bytes: &[u8], wide: bool) -> Option<()> {
    if wide {
        out.extend_from_slice(&u16::try_from(bytes.len()).ok()?.to_le_bytes());
    } else {
        out.push(u8::try_from(bytes.len()).ok()?);
    }
    out.extend_from_slice(bytes);
    Some(())
}

impl Request {
    /// The bytes; `None` when a field is beyond its bound.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        if !is_host_name(&self.host_name) || self.csr.len() > CSR_BYTES_MAX {
            return None;
        }
        let kind = match self.kind {
            Kind::Enrol => 1,
            Kind::Renew => 2,
        };
        let mut out = b"RPEN".to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[kind, self.role.code()]);
        out.extend_from_slice(&self.secret);
        push_sized(&mut out, self.host_name.as_bytes(), false)?;
        push_sized(&mut out, &self.csr, true)?;
        Some(out)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        reader.envelope(*b"RPEN")?;
        Self::decode_body(&mut reader).ok_or(WireError::Malformed)
    }

    fn decode_body(reader: &mut Reader<'_>) -> Option<Self> {
        let kind = match reader.byte()? {
            1 => Kind::Enrol,
            2 => Kind::Renew,
            _ => return None,
        };
        let role = Role::from_code(reader.byte()?)?;
        let secret = *reader.array()?;
        let host_name = reader.text(HOST_BYTES_MAX).filter(|name| is_host_name(name))?.to_owned();
        let len = usize::from(reader.short()?);
        let csr = reader.bytes(len, CSR_BYTES_MAX)?.to_vec();
        reader.end()?;
        Some(Self { kind, role, secret, host_name, csr })
    }
}

impl Answer {
    /// The bytes; `None` when a field is beyond its bound.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut out = b"RPEA".to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        match self {
            Self::Refused(refusal) => out.push(refusal.code()),
            Self::Issued { peer, site, chain } => {
                out.push(0);
                out.extend_from_slice(&peer.0);
                push_sized(&mut out, site.as_bytes(), false)?;
                out.push(u8::try_from(chain.len()).ok()?);
                for certificate in chain {
                    push_sized(&mut out, certificate, true)?;
                }
            }
        }
        (out.len() <= ANSWER_BYTES_MAX).then_some(out)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        reader.envelope(*b"RPEA")?;
        Self::decode_body(&mut reader).ok_or(WireError::Malformed)
    }

    fn decode_body(reader: &mut Reader<'_>) -> Option<Self> {
        let status = reader.byte()?;
        if status != 0 {
            reader.end()?;
            let refusal = Refusal::ALL.get(usize::from(status) - 1).copied();
            // A refusal of a later version is still a refusal.
            return Some(Self::Refused(refusal.unwrap_or(Refusal::Internal)));
        }
        let peer = PeerId(*reader.array()?);
        let site = reader.text(SITE_BYTES_MAX).filter(|site| is_site_name(site))?.to_owned();
        let count = usize::from(reader.byte()?);
        if !(1..=CHAIN_CERTIFICATES_MAX).contains(&count) {
            return None;
        }
        let mut chain = Vec::with_capacity(count);
        for _ in 0..count {
            let len = usize::from(reader.short()?);
            chain.push(CertificateDer::from(reader.bytes(len, CERTIFICATE_BYTES_MAX)?.to_vec()));
        }
        reader.end()?;
        Some(Self::Issued { peer, site, chain })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> Request {
        Request {
            kind: Kind::Enrol,
            role: Role::Agent,
            secret: [7; SECRET_BYTES],
            host_name: "web-01.example".into(),
            csr: vec![9; 300],
        }
    }

    fn issued() -> Answer {
        Answer::Issued {
            peer: PeerId([3; 16]),
            site: "berlin".into(),
            chain: vec![vec![1; 600].into(), vec![2; 450].into()],
        }
    }

    #[test]
    fn messages_are_read_back_and_every_cut_or_longer_one_is_refused() {
        let bytes = request().encode().unwrap();
        assert!(Request::decode(&bytes).unwrap() == request());
        let answer = issued().encode().unwrap();
        assert_eq!(Answer::decode(&answer).unwrap(), issued());
        for at in 0..bytes.len() {
            assert!(Request::decode(&bytes[..at]).is_err());
        }
        for at in 0..answer.len() {
            assert!(Answer::decode(&answer[..at]).is_err());
        }
        assert!(Request::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
        assert!(Answer::decode(&[answer.as_slice(), &[0]].concat()).is_err());
        for refusal in Refusal::ALL {
            let bytes = Answer::Refused(refusal).encode().unwrap();
            assert_eq!(Answer::decode(&bytes).unwrap(), Answer::Refused(refusal));
        }
    }

    #[test]
    fn the_first_bytes_are_frozen() {
        let bytes = request().encode().unwrap();
        assert_eq!(bytes.get(..8).unwrap(), b"RPEN\x01\x00\x01\x01");
        let answer = Answer::Refused(Refusal::TooMany).encode().unwrap();
        assert_eq!(answer, b"RPEA\x01\x00\x04");
        let mut later = bytes;
        later[4] = 2;
        assert!(matches!(Request::decode(&later), Err(WireError::Version(2))));
    }

    #[test]
    fn fields_beyond_their_bounds_are_neither_written_nor_read() {
        for host_name in [String::new(), "x".repeat(HOST_BYTES_MAX + 1), "a b".into(), "\n".into()] {
            assert!(Request { host_name, ..request() }.encode().is_none());
        }
        assert!(Request { csr: vec![0; CSR_BYTES_MAX + 1], ..request() }.encode().is_none());
        let largest =
            Request { host_name: "x".repeat(HOST_BYTES_MAX), csr: vec![0; CSR_BYTES_MAX], ..request() };
        assert_eq!(largest.encode().unwrap().len(), REQUEST_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), frame in 0..3) {
            if frame > 0 {
                let magic: &[u8] = if frame == 1 { b"RPEN\x01\x00" } else { b"RPEA\x01\x00" };
                bytes.splice(0..0, magic.iter().copied());
            }
            if let Ok(read) = Request::decode(&bytes) { prop_assert_eq!(read.encode().unwrap(), bytes.clone()); }
            if let Ok(read @ Answer::Issued { .. }) = Answer::decode(&bytes) {
                prop_assert_eq!(read.encode().unwrap(), bytes);
            }
        }
    }
}
