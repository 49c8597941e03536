//! The header of a hosted sparse extent: fixed bytes, checked before any number of it is used.
//!
//! Invariants: [`SparseHeader`] exists only checked: capacity, grain size, directory and descriptor places are
//! bounded, so arithmetic on them cannot overflow. Whether the places lie inside the actual file is asked with
//! [`SparseHeader::check_file`]. Units: 512 B sectors. Called by `store::vmdk::sparse`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::HOSTED_SPARSE_MAGIC;
use crate::units::{SECTOR_BYTES, SectorRange};

/// Bytes of the header, one sector.
pub const HEADER_BYTES: usize = 512;
/// Entries of a grain table; the only number any writer uses.
pub const TABLE_ENTRIES: u64 = 512;
/// Sectors of a grain table.
pub const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR_BYTES;
/// Grain size of what we create: 64 KiB, as every other writer does.
pub const GRAIN_SECTORS_DEFAULT: u64 = 128;
/// Smallest grain the format allows (a power of two above 8).
pub const GRAIN_SECTORS_MIN: u64 = 16;
/// Largest grain we accept, 1 MiB: bounds the buffer of a partial write.
pub const GRAIN_SECTORS_MAX: u64 = 2048;
/// Entries are 32-bit sector numbers, so one extent file ends at 2 TiB.
pub const FILE_SECTORS_MAX: u64 = 1 << 32;

/// The newline bytes of the header are to be checked: they show a transfer that converted line ends.
pub const FLAG_NEWLINES: u32 = 0x1;
/// The redundant grain directory and tables are kept.
pub const FLAG_REDUNDANT: u32 = 0x2;
/// A table entry of 1 is a grain that reads as zeros.
pub const FLAG_ZEROED_GRAINS: u32 = 0x4;
/// Grains are compressed.
pub const FLAG_COMPRESSED: u32 = 0x1_0000;
/// Markers precede grains and metadata.
pub const FLAG_MARKERS: u32 = 0x2_0000;

const NEWLINES: [u8; 4] = *b"\n \r\n";
/// Directory place of a stream-optimised extent: the real one stands in the footer.
const DIRECTORY_AT_END: u64 = u64::MAX;

/// The header as it stands at offset 0 of the file; little-endian, packed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity: U64,
    grain_size: U64,
    descriptor_offset: U64,
    descriptor_size: U64,
    table_entries: U32,
    redundant_directory: U64,
    directory: U64,
    overhead: U64,
    unclean_shutdown: u8,
    newlines: [u8; 4],
    compression: U16,
    reserved_zero: [u8; 433],
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(std::mem::offset_of!(RawHeader, capacity) == 12);
    assert!(std::mem::offset_of!(RawHeader, table_entries) == 44);
    assert!(std::mem::offset_of!(RawHeader, overhead) == 64);
    assert!(std::mem::offset_of!(RawHeader, unclean_shutdown) == UNCLEAN_OFFSET as usize);
    assert!(std::mem::offset_of!(RawHeader, compression) == 77);
};

/// Byte offset of the flag that says the extent was not closed.
pub const UNCLEAN_OFFSET: u64 = 72;

/// Where the grain directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directory {
    /// At this sector.
    At(u64),
    /// In the footer at the end of the file: a stream-optimised extent.
    InFooter,
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseHeader {
    /// Format version, 1 to 3.
    pub version: u32,
    /// `FLAG_*`, unknown ones included.
    pub flags: u32,
    /// Sectors of disk this extent holds; more than 0.
    pub capacity: u64,
    /// Sectors of a grain, a power of two.
    pub grain_sectors: u64,
    /// Where the embedded descriptor is, if there is one.
    pub descriptor: Option<SectorRange>,
    /// The redundant directory, where the flag says there is one.
    pub redundant_directory: Option<u64>,
    /// The directory.
    pub directory: Directory,
    /// First sector for grains.
    pub overhead: u64,
    /// The extent was being written and not closed.
    pub unclean: bool,
    /// Compression method: 0 none, 1 deflate.
    pub compression: u16,
}

/// Why a header is not usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer than 512 bytes.
    #[error("sparse header is cut: {got} of {HEADER_BYTES} bytes")]
    Short {
        /// Bytes there are.
        got: usize,
    },
    /// Not a hosted sparse extent.
    #[error("not a hosted sparse extent: magic {got:02x?}, expected {HOSTED_SPARSE_MAGIC:02x?}")]
    Magic {
        /// The first four bytes.
        got: [u8; 4],
    },
    /// Line ends were converted by a text-mode transfer; all data is damaged.
    #[error("line ends were converted (bytes 73..77 are {got:02x?}): copy the file again in binary mode")]
    Newlines {
        /// The four bytes.
        got: [u8; 4],
    },
    /// A field outside its bounds.
    #[error("sparse header field {field} is {got}, allowed: {allowed}")]
    Field {
        /// Its name.
        field: &'static str,
        /// Its value.
        got: u64,
        /// What would do.
        allowed: &'static str,
    },
    /// A structure beyond the end of the file.
    #[error("{what} ends at sector {end}, beyond the file of {file_sectors} sectors: the file is cut")]
    BeyondFile {
        /// Directory or descriptor.
        what: &'static str,
        /// One past its last sector.
        end: u64,
        /// Sectors of the file.
        file_sectors: u64,
    },
}

const fn field(field: &'static str, got: u64, allowed: &'static str) -> HeaderError {
    HeaderError::Field { field, got, allowed }
}

impl SparseHeader {
    /// Decodes and checks the first sector of an extent.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            return Err(HeaderError::Short { got: bytes.len() });
        };
        if raw.magic != HOSTED_SPARSE_MAGIC {
            return Err(HeaderError::Magic { got: raw.magic });
        }
        let flags = raw.flags.get();
        if flags & FLAG_NEWLINES != 0 && raw.newlines != NEWLINES {
            return Err(HeaderError::Newlines { got: raw.newlines });
        }
        let version = raw.version.get();
        if !(1..=3).contains(&version) {
            return Err(field("version", version.into(), "1 to 3"));
        }
        let grain_sectors = raw.grain_size.get();
        if !grain_sectors.is_power_of_two()
            || !(GRAIN_SECTORS_MIN..=GRAIN_SECTORS_MAX).contains(&grain_sectors)
        {
            return Err(field("grainSize", grain_sectors, "a power of two from 16 to 2048 sectors"));
        }
        if u64::from(raw.table_entries.get()) != TABLE_ENTRIES {
            return Err(field("numGTEsPerGT", raw.table_entries.get().into(), "512"));
        }
        let header = Self {
            version,
            flags,
            capacity: raw.capacity.get(),
            grain_sectors,
            descriptor: descriptor_place(raw.descriptor_offset.get(), raw.descriptor_size.get())?,
            redundant_directory: (flags & FLAG_REDUNDANT != 0).then(|| raw.redundant_directory.get()),
            directory: match raw.directory.get() {
                DIRECTORY_AT_END => Directory::InFooter,
                at => Directory::At(at),
            },
            overhead: raw.overhead.get(),
            unclean: raw.unclean_shutdown != 0,
            compression: raw.compression.get(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), HeaderError> {
        // A stream-optimised extent compresses, so its capacity may exceed what 32-bit entries address; no writer
        // makes one above 2^36 sectors (32 TiB), and the bound keeps all products far from overflow.
        if self.capacity == 0 || self.capacity > 1 << 36 {
            return Err(field("capacity", self.capacity, "1 to 2^36 sectors"));
        }
        if self.compression > 1 {
            return Err(field("compressAlgorithm", self.compression.into(), "0 or 1"));
        }
        if self.overhead > FILE_SECTORS_MAX {
            return Err(field("overHead", self.overhead, "up to 2^32 sectors"));
        }
        let Directory::At(at) = self.directory else { return Ok(()) };
        for (name, at) in [("gdOffset", Some(at)), ("rgdOffset", self.redundant_directory)] {
            let Some(at) = at else { continue };
            if at == 0 || at > FILE_SECTORS_MAX - self.directory_sectors() {
                return Err(field(name, at, "1 to 2^32 sectors less the directory"));
            }
        }
        Ok(())
    }

    /// Checks that directories and descriptor lie inside a file of `file_sectors`.
    ///
    /// # Errors
    /// Names the structure that does not.
    pub fn check_file(&self, file_sectors: u64) -> Result<(), HeaderError> {
        let directory_end = |at: u64| at.saturating_add(self.directory_sectors());
        let directory = match self.directory {
            Directory::At(at) => directory_end(at),
            Directory::InFooter => 0,
        };
        let redundant = match self.directory {
            Directory::At(_) => self.redundant_directory.map_or(0, directory_end),
            Directory::InFooter => 0,
        };
        let descriptor = self.descriptor.map_or(0, |range| range.end);
        for (what, end) in [
            ("the grain directory", directory),
            ("the redundant grain directory", redundant),
            ("the embedded descriptor", descriptor),
        ] {
            if end > file_sectors {
                return Err(HeaderError::BeyondFile { what, end, file_sectors });
            }
        }
        Ok(())
    }

    /// The bytes of this header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let raw = RawHeader {
            magic: HOSTED_SPARSE_MAGIC,
            version: self.version.into(),
            flags: self.flags.into(),
            capacity: self.capacity.into(),
            grain_size: self.grain_sectors.into(),
            descriptor_offset: self.descriptor.map_or(0, |range| range.start).into(),
            descriptor_size: self.descriptor.map_or(0, |range| range.end.saturating_sub(range.start)).into(),
            table_entries: U32::new(TABLE_ENTRIES as u32),
            redundant_directory: self.redundant_directory.unwrap_or(0).into(),
            directory: match self.directory {
                Directory::At(at) => at,
                Directory::InFooter => DIRECTORY_AT_END,
            }
            .into(),
            overhead: self.overhead.into(),
            unclean_shutdown: u8::from(self.unclean),
            newlines: NEWLINES,
            compression: self.compression.into(),
            reserved_zero: [0; 433],
        };
        zerocopy::transmute!(raw)
    }

    /// Number of grains of the extent.
    #[must_use]
    pub const fn grain_count(&self) -> u64 {
        self.capacity.div_ceil(self.grain_sectors)
    }

    /// Number of grain tables of the extent.
    #[must_use]
    pub const fn table_count(&self) -> u64 {
        self.grain_count().div_ceil(TABLE_ENTRIES)
    }

    /// Sectors of a grain directory.
    #[must_use]
    pub const fn directory_sectors(&self) -> u64 {
        self.table_count().div_ceil(SECTOR_BYTES / 4)
    }

    /// Whether grains stand in the file as they are on the disk, so that they can be overwritten in place.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.flags & (FLAG_COMPRESSED | FLAG_MARKERS) == 0
            && self.compression == 0
            && matches!(self.directory, Directory::At(_))
    }
}

fn descriptor_place(offset: u64, size: u64) -> Result<Option<SectorRange>, HeaderError> {
    if offset == 0 || size == 0 {
        return Ok(None);
    }
    if offset > FILE_SECTORS_MAX {
        return Err(field("descriptorOffset", offset, "up to 2^32 sectors"));
    }
    if size > super::descriptor::DESCRIPTOR_BYTES_MAX as u64 / SECTOR_BYTES {
        return Err(field("descriptorSize", size, "up to 2048 sectors"));
    }
    Ok(Some(SectorRange::new(offset, offset + size)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> SparseHeader {
        SparseHeader {
            version: 1,
            flags: FLAG_NEWLINES | FLAG_REDUNDANT,
            capacity: 1 << 21,
            grain_sectors: 128,
            descriptor: Some(SectorRange::new(1, 21)),
            redundant_directory: Some(21),
            directory: Directory::At(200),
            overhead: 384,
            unclean: true,
            compression: 0,
        }
    }

    fn header() -> impl Strategy<Value = SparseHeader> {
        (
            1_u32..=3,
            0_u32..8,
            1_u64..1 << 32,
            4_u32..=11,
            proptest::option::of(1_u64..1000),
            1_u64..1 << 20,
            any::<bool>(),
        )
            .prop_map(|(version, flags, capacity, grain, descriptor, directory, unclean)| {
                SparseHeader {
                    version,
                    flags,
                    capacity,
                    grain_sectors: 1 << grain,
                    descriptor: descriptor.map(|at| SectorRange::new(at, at + 20)),
                    redundant_directory: (flags & FLAG_REDUNDANT != 0).then_some(directory + 7),
                    directory: Directory::At(directory),
                    overhead: 384,
                    unclean,
                    compression: 0,
                }
            })
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(header in header()) {
            prop_assert_eq!(SparseHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn mutated_headers_give_bounded_values_or_errors(
            edits in proptest::collection::vec((0_usize..80, any::<u8>()), 0..12), cut in 0_usize..600)
        {
            let mut bytes = sample().encode().to_vec();
            for (at, byte) in edits { bytes[at] = byte; }
            bytes.truncate(cut);
            if let Ok(header) = SparseHeader::decode(&bytes) {
                prop_assert!(header.grain_sectors.is_power_of_two() && header.grain_sectors <= GRAIN_SECTORS_MAX);
                prop_assert!(header.table_count() * TABLE_ENTRIES * header.grain_sectors >= header.capacity);
                prop_assert!(header.grain_count() <= 1 << 32);
                let _ = header.check_file(1000);
            }
        }

        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assume!(!bytes.starts_with(&HOSTED_SPARSE_MAGIC));
            prop_assert!(SparseHeader::decode(&bytes).is_err());
        }
    }

    #[test]
    fn the_flag_of_an_unclean_extent_is_one_byte_at_its_offset() {
        let (mut clean, unclean) = (sample(), sample().encode());
        clean.unclean = false;
        let clean = clean.encode();
        let differing: Vec<usize> = (0..HEADER_BYTES).filter(|at| clean[*at] != unclean[*at]).collect();
        assert_eq!(differing, [UNCLEAN_OFFSET as usize]);
    }

    #[test]
    fn structures_beyond_the_file_are_named() {
        assert_eq!(sample().check_file(1 << 20), Ok(()));
        let error = sample().check_file(100).unwrap_err();
        assert!(error.to_string().contains("the grain directory"), "{error}");
    }

    #[test]
    fn grain_sizes_outside_the_format_are_refused() {
        for grain in [0, 1, 8, 24, 4096, u64::MAX] {
            let mut header = sample();
            header.grain_sectors = grain;
            assert!(
                matches!(
                    SparseHeader::decode(&header.encode()),
                    Err(HeaderError::Field { field: "grainSize", .. })
                ),
                "{grain}"
            );
        }
    }
}
