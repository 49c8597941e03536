//! The one-time enrolment token: what `invite` prints and `enroll` reads.
//!
//! Invariants: the text carries its own checksum, so a copy that lost a letter is told from a refused one; every field
//! is bounded before it is believed; the secret never appears in logs (`Debug` hides it). The text is
//! `rpt1-` and base64url of: version, role, expiry, target, SHA-256 of the CA's key, secret, addresses, CRC-32.
//! Called by `invitations` (makes) and `enroll` (reads).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::checksum::crc32;
use crate::error::{Answer, Severity};
use crate::net::identity::Role;
use crate::units::{PeerId, Timestamp};

/// Bytes of the secret: 128 bits.
pub const SECRET_BYTES: usize = 16;
/// Most addresses of the target a token may name.
pub const ADDRESSES_MAX: usize = 4;
/// Longest address (`host:port`) in bytes.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// Longest token text.
const TEXT_BYTES_MAX: usize = 2048;
const PREFIX: &str = "rpt1-";

/// Why a text is no token.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not of this form, or damaged in copying.
    #[error(
        "this is no enrolment token, or it was damaged in copying; copy it again, whole, from the output of `reprotect-master-target invite`"
    )]
    Damaged,
    /// Out of bounds when making one.
    #[error(
        "a token names 1 to {ADDRESSES_MAX} addresses of the form HOST:PORT of at most {ADDRESS_BYTES_MAX} bytes"
    )]
    Addresses,
}

impl Answer for TokenError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// What a token says.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What the new daemon will be.
    pub role: Role,
    /// Useless from then on.
    pub expires: Timestamp,
    /// The master target to enrol at.
    pub target: PeerId,
    /// SHA-256 of the public key of the CA to trust.
    pub ca_key_sha256: [u8; 32],
    /// What only the invited one knows.
    pub secret: [u8; SECRET_BYTES],
    /// Where to find the target, `host:port`, tried in this order.
    pub addresses: Vec<String>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("role", &self.role)
            .field("expires", &self.expires)
            .field("target", &self.target)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Token {
    /// The token of a command line's argument; `-` reads it from standard input, so that it stays out of the shell's
    /// history and the process list.
    ///
    /// # Errors
    /// When it is no token.
    pub fn from_argument(argument: &str) -> Result<Self, TokenError> {
        if argument != "-" {
            return argument.parse();
        }
        let mut text = String::new();
        // What cannot be read is no token, which is what the parser then says.
        let _ = std::io::Read::read_to_string(
            &mut std::io::Read::take(std::io::stdin(), TEXT_BYTES_MAX as u64 + 2),
            &mut text,
        );
        text.parse()
    }

    /// The text to give to the invited machine's operator.
    ///
    /// # Errors
    /// [`TokenError::Addresses`].
    pub fn to_text(&self) -> Result<String, TokenError> {
        if !are_addresses(&self.addresses) {
            return Err(TokenError::Addresses);
        }
        let mut bytes = vec![1, self.role.code()];
        bytes.extend_from_slice(&self.expires.0.to_le_bytes());
        bytes.extend_from_slice(&self.target.0);
        bytes.extend_from_slice(&self.ca_key_sha256);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(self.addresses.join("\n").as_bytes());
        let checksum = crc32(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > TEXT_BYTES_MAX {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?;
        let (body, checksum) = bytes.split_last_chunk::<4>()?;
        if crc32(body) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let (&[1, role], rest) = body.split_first_chunk::<2>()? else { return None };
        let (expires, rest) = rest.split_first_chunk()?;
        let (target, rest) = rest.split_first_chunk()?;
        let (ca_key_sha256, rest) = rest.split_first_chunk()?;
        let (secret, rest) = rest.split_first_chunk()?;
        let addresses: Vec<String> = std::str::from_utf8(rest).ok()?.split('\n').map(str::to_owned).collect();
        if !are_addresses(&addresses) {
            return None;
        }
        Some(Self {
            role: Role::from_code(role)?,
            expires: Timestamp(u64::from_le_bytes(*expires)),
            target: PeerId(*target),
            ca_key_sha256: *ca_key_sha256,
            secret: *secret,
            addresses,
        })
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        Self::parse(text).ok_or(TokenError::Damaged)
    }
}

fn are_addresses(addresses: &[String]) -> bool {
    (1..=ADDRESSES_MAX).contains(&addresses.len())
        && addresses.iter().all(|address| {
            address.len() <= ADDRESS_BYTES_MAX
                && address.bytes().all(|byte| byte.is_ascii_graphic())
                && address.rsplit_once(':').is_some_and(|(host, port)| {
                    !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
                })
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            role: Role::Agent,
            expires: Timestamp(77),
            target: PeerId([3; 16]),
            ca_key_sha256: [4; 32],
            secret: [0x5a; SECRET_BYTES],
            addresses: vec!["target.example:7443".into(), "[::1]:7443".into()],
        }
    }

    #[test]
    fn a_token_is_read_back_and_any_changed_or_lost_letter_is_noticed() {
        let text = token().to_text().unwrap();
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token());
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(
                String::from_utf8(changed).unwrap().parse::<Token>(),
                Err(TokenError::Damaged),
                "{at}"
            );
            assert!(text[..at].parse::<Token>().is_err());
        }
    }

    #[test]
    fn the_secret_is_not_in_the_debug_text() {
        let text = format!("{:?}", token());
        assert!(!text.contains("90") && !text.contains("5a"), "{text}");
    }

    #[test]
    fn addresses_are_bounded() {
        for bad in
            [vec![], vec!["x:1".to_owned(); ADDRESSES_MAX + 1], vec!["no-port".into()], vec!["a b:1".into()]]
        {
            assert_eq!(Token { addresses: bad, ..token() }.to_text(), Err(TokenError::Addresses));
        }
    }

    proptest! {
        #[test]
        fn no_text_is_read_with_a_panic(text in "(rpt1-)?[A-Za-z0-9_-]{0,200}") {
            prop_assert!(text.parse::<Token>().is_err());
        }
    }
}
