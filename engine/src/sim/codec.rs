//! Compression for the simulated process server and the check of payload at the simulated target.
//!
//! Invariant: what [`open`] answers has passed every fragment's CRC. Units: bytes. Called by `sim::relay` and
//! `sim::target`.

use std::cell::RefCell;

use bytes::Bytes;

use crate::compress::{Compressor, Decompressor};
use crate::format::FormatError;
use crate::format::extent::{Codec, Record};

thread_local! {
    // A context costs more than most records do.
    static COMPRESSOR: RefCell<Compressor> = RefCell::new(Compressor::new(1).expect("a context"));
    static DECOMPRESSOR: RefCell<Decompressor> = RefCell::new(Decompressor::new().expect("a context"));
}

/// Compresses a raw record where that is worth it.
pub(super) fn recode(record: &Record) -> Record {
    match COMPRESSOR.with_borrow_mut(|compressor| compressor.compress(record.payload())) {
        Ok(Some(stored)) => record.recoded(Bytes::from(stored)),
        _ => record.clone(),
    }
}

/// The record with its plain data, checked unless `trust`.
pub(super) fn open(record: &Record, trust: bool) -> Result<Record, FormatError> {
    let mut plain = vec![0; record.plain_bytes() as usize];
    let checked = DECOMPRESSOR.with_borrow_mut(|decompressor| record.open_into(decompressor, &mut plain));
    match checked {
        // What could not be read stands there as it came, as far as it fits.
        Err(_) if trust && record.codec() == Codec::Raw => plain.copy_from_slice(record.payload()),
        Err(_) if trust => {
            let got = zstd::bulk::decompress(record.payload(), plain.len()).unwrap_or_default();
            plain[..got.len()].copy_from_slice(&got);
        }
        checked => checked?,
    }
    Ok(record.opened(Bytes::from(plain)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recoded_opens_to_the_same_bytes_and_a_flipped_bit_is_seen() {
        let record = Record::data(3, Bytes::from(vec![7; 8192]));
        let small = recode(&record);
        assert_eq!(small.codec(), Codec::Zstd);
        assert_eq!(open(&small, false).unwrap().payload(), &vec![7; 8192]);
        let mut payload = small.payload().to_vec();
        payload[5] ^= 1;
        let forged = record.recoded(Bytes::from(payload));
        assert!(open(&forged, false).is_err());
    }
}
