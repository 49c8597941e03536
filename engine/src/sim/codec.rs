//! Compression for the simulated process server and the check of payload at the simulated target.
//!
//! Invariant: what [`open`] answers has passed every fragment's CRC. Units: bytes. Called by `sim::relay` and
//! `sim::target`.

use bytes::Bytes;

use crate::checksum::{crc32, fragments};
use crate::format::FormatError;
use crate::format::extent::{Codec, Record};

/// Compresses a raw record where it gets smaller.
pub(super) fn recode(record: &Record) -> Record {
    match zstd::bulk::compress(record.payload(), 1) {
        Ok(stored) if (stored.len() as u64) < record.plain_bytes() => record.recoded(Bytes::from(stored)),
        _ => record.clone(),
    }
}

/// The plain data of a record, checked unless `trust`.
pub(super) fn open(record: &Record, trust: bool) -> Result<Vec<u8>, FormatError> {
    if !trust {
        record.check_stored()?;
    }
    let plain_bytes = record.plain_bytes() as usize;
    let plain = match record.codec() {
        Codec::None => return Ok(Vec::new()),
        Codec::Raw => record.payload().to_vec(),
        Codec::Zstd => zstd::bulk::decompress(record.payload(), plain_bytes)
            .map_err(|error| FormatError::Payload { what: "Record", reason: error.to_string() })?,
    };
    if trust {
        let mut padded = plain;
        padded.resize(plain_bytes, 0);
        return Ok(padded);
    }
    if plain.len() != plain_bytes {
        return Err(FormatError::Short { what: "Record", got: plain.len(), expected: plain_bytes });
    }
    for (fragment, got) in fragments(record.range().start, &plain).zip(record.fragment_crcs()) {
        let expected = crc32(fragment);
        if *got != expected {
            return Err(FormatError::Checksum { what: "fragment", got: *got, expected });
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recoded_opens_to_the_same_bytes_and_a_flipped_bit_is_seen() {
        let record = Record::data(3, Bytes::from(vec![7; 8192]));
        let small = recode(&record);
        assert_eq!(small.codec(), Codec::Zstd);
        assert_eq!(open(&small, false).unwrap(), vec![7; 8192]);
        let mut payload = small.payload().to_vec();
        payload[5] ^= 1;
        let forged = record.recoded(Bytes::from(payload));
        assert!(open(&forged, false).is_err());
    }
}
