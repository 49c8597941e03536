//! The record: a run of sectors of one disk with data, zeros or a discard, the same bytes on wire and in journal.
//!
//! Invariants: plain length = sectors × 512; one CRC-32 per 4 KiB-aligned fragment of plain data, computed once at
//! the source (I8); re-encoding changes codec, stored length and stored CRC only, never what [`Record::digest`]
//! covers. A decoded [`Record`] has a checked header and checked lengths; its payload is checked by
//! [`Record::check_stored`] (a relay) or [`Record::open_into`] (the target). Units: sectors and bytes.
//!
//! Layout: [`RecordHeader`], then the fragment CRCs (4 bytes each, DATA only), then the stored payload.

use bytes::{Buf, Bytes, BytesMut};

use super::FormatError;
use super::wire::{put_items, take_items, wire, wire_enum};
use crate::checksum::{crc32, fragment_count, fragments};
use crate::compress::Decompressor;
use crate::limits::{BULK_RECORD_BYTES_MAX, ZERO_RECORD_BYTES_MAX};
use crate::units::{SECTOR_BYTES, SectorRange};

wire_enum! {
    /// What a record does to its sectors.
    pub enum RecordKind: u8 {
        /// Puts data there.
        Data = 1,
        /// Makes them read as zeros.
        Zero = 2,
        /// Tells that nobody cares what they hold; applied as zeros.
        Discard = 3,
    }
}

wire_enum! {
    /// How a payload is stored.
    pub enum Codec: u8 {
        /// There is no payload.
        None = 0,
        /// As it is.
        Raw = 1,
        /// One independent zstd frame with its content size.
        Zstd = 2,
    }
}

wire! {
    /// The fixed head of a record.
    pub struct RecordHeader / RecordHeaderWire = 32 {
        /// First sector.
        sector: u64,
        /// Length in sectors.
        sector_count: u32,
        /// Length of the stored payload in bytes.
        stored_bytes: u32,
        /// What the record does.
        kind: RecordKind,
        /// How the payload is stored.
        codec: Codec,
        /// CRC-32 of the stored payload where it is compressed; zero where it is raw (the fragment CRCs cover it).
        stored_crc: u32,
        /// CRC-32 of this header with this field zero, followed by the fragment CRCs.
        head_crc: u32,
        ; reserved: [u8; 6],
    }
}

/// A record with a checked header. Cheap to clone: the payload is shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    range: SectorRange,
    kind: RecordKind,
    codec: Codec,
    stored_crc: u32,
    crcs: Vec<u32>,
    payload: Bytes,
}

impl Record {
    /// A DATA record of plain bytes starting at sector `start`; computes the fragment CRCs.
    ///
    /// # Panics
    /// When `plain` is empty, not whole sectors, or longer than a bulk record: the caller cuts.
    #[must_use]
    pub fn data(start: u64, plain: Bytes) -> Self {
        assert!(!plain.is_empty() && plain.len() as u64 <= BULK_RECORD_BYTES_MAX);
        assert!((plain.len() as u64).is_multiple_of(SECTOR_BYTES));
        let range = SectorRange::new(start, start + plain.len() as u64 / SECTOR_BYTES);
        let crcs = fragments(start, &plain).map(crc32).collect();
        Self { range, kind: RecordKind::Data, codec: Codec::Raw, stored_crc: 0, crcs, payload: plain }
    }

    /// A ZERO record.
    ///
    /// # Panics
    /// When `range` is empty or longer than a zero record may be.
    #[must_use]
    pub fn zeros(range: SectorRange) -> Self {
        assert!(!range.is_empty() && range.bytes() <= ZERO_RECORD_BYTES_MAX);
        Self {
            range,
            kind: RecordKind::Zero,
            codec: Codec::None,
            stored_crc: 0,
            crcs: Vec::new(),
            payload: Bytes::new(),
        }
    }

    /// A DISCARD record.
    ///
    /// # Panics
    /// As [`Self::zeros`].
    #[must_use]
    pub fn discard(range: SectorRange) -> Self {
        Self { kind: RecordKind::Discard, ..Self::zeros(range) }
    }

    /// The same record with its plain payload replaced by `stored`, one zstd frame of it.
    ///
    /// # Panics
    /// When this record is not raw data, or `stored` is empty or not shorter than the plain payload, which
    /// [`Self::take`] would refuse.
    #[must_use]
    pub fn recoded(&self, stored: Bytes) -> Self {
        assert!(self.codec == Codec::Raw);
        assert!(!stored.is_empty() && stored.len() < self.payload.len());
        Self { codec: Codec::Zstd, stored_crc: crc32(&stored), payload: stored, ..self.clone() }
    }

    /// The same record in memory of its own: the payload may be a piece of a buffer that is wanted back.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self { payload: Bytes::copy_from_slice(&self.payload), ..self.clone() }
    }

    /// The sectors it covers.
    #[must_use]
    pub const fn range(&self) -> SectorRange {
        self.range
    }

    /// What it does.
    #[must_use]
    pub const fn kind(&self) -> RecordKind {
        self.kind
    }

    /// How its payload is stored.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// The stored payload.
    #[must_use]
    pub const fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The fragment CRCs of plain data, in address order.
    #[must_use]
    pub fn fragment_crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// Length of the plain payload in bytes; zero without payload.
    #[must_use]
    pub fn plain_bytes(&self) -> u64 {
        if self.kind == RecordKind::Data { self.range.bytes() } else { 0 }
    }

    /// Size on the wire in bytes.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        RecordHeader::BYTES + self.crcs.len() * 4 + self.payload.len()
    }

    /// Feeds the canonical plaintext fields into a digest: what a relay must not change.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&[self.kind as u8]);
        hasher.update(&self.range.start.to_le_bytes());
        hasher.update(&self.range.end.to_le_bytes());
        for crc in &self.crcs {
            hasher.update(&crc.to_le_bytes());
        }
    }

    /// Appends the header and the fragment CRCs; the payload follows them on wire and disk.
    pub fn put_head(&self, out: &mut BytesMut) {
        let start = out.len();
        let mut header = RecordHeader {
            sector: self.range.start,
            sector_count: self.range.len() as u32, // at most ZERO_RECORD_BYTES_MAX / 512
            stored_bytes: self.payload.len() as u32, // at most BULK_RECORD_BYTES_MAX
            kind: self.kind,
            codec: self.codec,
            stored_crc: self.stored_crc,
            head_crc: 0,
        };
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header.to_bytes());
        put_items(out, [header.to_bytes()]);
        put_items(out, self.crcs.iter().copied());
        if let Some(crcs) = out.get(start + RecordHeader::BYTES..) {
            hasher.update(crcs);
        }
        header.head_crc = hasher.finalize();
        for (slot, byte) in out.iter_mut().skip(start).zip(header.to_bytes()) {
            *slot = byte;
        }
    }

    /// Takes one record from the front of `bytes`, sharing its payload.
    ///
    /// # Errors
    /// When the header, its checksum or any length is not what the format says.
    pub fn take(bytes: &mut Bytes) -> Result<Self, FormatError> {
        const WHAT: &str = "Record";
        let (header, rest) = RecordHeader::read_prefix(bytes)?;
        let range = checked_range(&header)?;
        let count = if header.kind == RecordKind::Data { fragment_count(range) as usize } else { 0 };
        let (crcs, _) = take_items::<u32>(rest, count, WHAT)?;
        let head_bytes = RecordHeader::BYTES + count * 4;
        let crc_bytes = bytes.get(RecordHeader::BYTES..head_bytes).unwrap_or_default();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&RecordHeader { head_crc: 0, ..header }.to_bytes());
        hasher.update(crc_bytes);
        let expected = hasher.finalize();
        if header.head_crc != expected {
            return Err(FormatError::Checksum { what: "Record head", got: header.head_crc, expected });
        }
        let stored = header.stored_bytes as usize;
        if bytes.len() < head_bytes + stored {
            return Err(FormatError::Short { what: WHAT, got: bytes.len(), expected: head_bytes + stored });
        }
        bytes.advance(head_bytes);
        let payload = bytes.split_to(stored);
        Ok(Self {
            range,
            kind: header.kind,
            codec: header.codec,
            stored_crc: header.stored_crc,
            crcs,
            payload,
        })
    }

    /// Checks the stored payload without decompressing: what a relay does.
    ///
    /// # Errors
    /// When a checksum does not match.
    pub fn check_stored(&self) -> Result<(), FormatError> {
        match self.codec {
            Codec::None => Ok(()),
            Codec::Raw => self.check_fragments(&self.payload),
            Codec::Zstd => {
                let expected = crc32(&self.payload);
                if expected == self.stored_crc {
                    Ok(())
                } else {
                    Err(FormatError::Checksum { what: "stored payload", got: self.stored_crc, expected })
                }
            }
        }
    }

    /// Puts the plain data into `plain`, checking every fragment.
    ///
    /// # Errors
    /// When the payload does not decompress to exactly the record's length, or a fragment's CRC does not match;
    /// `plain` then holds nothing of worth.
    ///
    /// # Panics
    /// When `plain` is not [`Self::plain_bytes`] long.
    pub fn open_into(&self, decompressor: &mut Decompressor, plain: &mut [u8]) -> Result<(), FormatError> {
        assert_eq!(plain.len() as u64, self.plain_bytes());
        match self.codec {
            Codec::None => return Ok(()),
            Codec::Raw => plain.copy_from_slice(&self.payload),
            Codec::Zstd => {
                self.check_stored()?;
                decompressor
                    .decompress_into(&self.payload, plain)
                    .map_err(|error| FormatError::Payload { what: "Record", reason: error.to_string() })?;
            }
        }
        self.check_fragments(plain)
    }

    /// The same record with its payload plain, after [`Self::open_into`] filled `plain`.
    ///
    /// # Panics
    /// When `plain` is not [`Self::plain_bytes`] long.
    #[must_use]
    pub fn opened(&self, plain: Bytes) -> Self {
        assert_eq!(plain.len() as u64, self.plain_bytes());
        let codec = if self.kind == RecordKind::Data { Codec::Raw } else { Codec::None };
        Self { codec, stored_crc: 0, payload: plain, ..self.clone() }
    }

    fn check_fragments(&self, plain: &[u8]) -> Result<(), FormatError> {
        for (fragment, got) in fragments(self.range.start, plain).zip(&self.crcs) {
            let expected = crc32(fragment);
            if *got != expected {
                return Err(FormatError::Checksum { what: "fragment", got: *got, expected });
            }
        }
        Ok(())
    }
}

/// The sectors of a header whose kind, codec and lengths fit together.
fn checked_range(header: &RecordHeader) -> Result<SectorRange, FormatError> {
    let field = |field, got, expected| Err(FormatError::Field { what: "Record", field, got, expected });
    let plain = u64::from(header.sector_count) * SECTOR_BYTES;
    let stored = u64::from(header.stored_bytes);
    if header.sector_count == 0 {
        return field("sector_count", 0, "at least one sector");
    }
    match (header.kind, header.codec) {
        (RecordKind::Data, Codec::Raw) if plain > BULK_RECORD_BYTES_MAX => {
            return field("sector_count", header.sector_count.into(), "at most 1 MiB of data");
        }
        (RecordKind::Data, Codec::Raw) if stored != plain => {
            return field("stored_bytes", stored, "the plain length of raw data");
        }
        (RecordKind::Data, Codec::Raw) if header.stored_crc != 0 => {
            return field("stored_crc", header.stored_crc.into(), "zero for raw data");
        }
        (RecordKind::Data, Codec::Zstd) if plain > BULK_RECORD_BYTES_MAX => {
            return field("sector_count", header.sector_count.into(), "at most 1 MiB of data");
        }
        (RecordKind::Data, Codec::Zstd) if stored == 0 || stored >= plain => {
            return field("stored_bytes", stored, "less than the plain length");
        }
        (RecordKind::Data, Codec::Raw | Codec::Zstd) => {}
        (RecordKind::Data, Codec::None) => return field("codec", 0, "raw or zstd for data"),
        (RecordKind::Zero | RecordKind::Discard, Codec::None) => {
            if stored != 0 || header.stored_crc != 0 {
                return field("stored_bytes", stored, "no payload");
            }
            if plain > ZERO_RECORD_BYTES_MAX {
                return field("sector_count", header.sector_count.into(), "at most 1 GiB");
            }
        }
        (RecordKind::Zero | RecordKind::Discard, codec) => {
            return field("codec", codec as u64, "none without payload");
        }
    }
    match SectorRange::from_len(header.sector, header.sector_count.into()) {
        Some(range) if range.end <= u64::MAX / SECTOR_BYTES => Ok(range),
        _ => field("sector", header.sector, "an address below 2^64 bytes"),
    }
}
