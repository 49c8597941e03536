//! Units as types, so that a sector is never added to a block nor a sequence compared with a generation.
//!
//! Invariants: every quantity of disk space is one of [`SectorIndex`]/[`SectorCount`] (512 B), [`BlockIndex`]
//! (4 KiB) or [`ByteOffset`]/[`ByteCount`]; indexes are absolute on a disk, counts are lengths. Conversions that
//! could lose information return `Option` or round in the direction their name says.

use std::fmt;

/// Bytes of a sector, the unit of addresses on the wire.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a block, the finest unit of dirty tracking, of before-images and of the target's CRC map.
pub const BLOCK_BYTES: u64 = 4096;
/// Sectors of a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The zero of this unit.
            pub const ZERO: Self = Self(0);
            /// The plain number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The all-zero identity, meaning "none" where a format allows it.
            pub const NONE: Self = Self([0; 16]);

            /// A new random identity.
            ///
            /// # Errors
            /// When the operating system has no randomness to give.
            pub fn random() -> Result<Self, getrandom::Error> {
                let mut bytes = [0_u8; 16];
                getrandom::fill(&mut bytes)?;
                Ok(Self(*uuid::Builder::from_random_bytes(bytes).as_uuid().as_bytes()))
            }

            /// Parses the usual UUID notation.
            ///
            /// # Errors
            /// When `text` is not a UUID.
            pub fn parse(text: &str) -> Result<Self, uuid::Error> {
                Ok(Self(*uuid::Uuid::parse_str(text)?.as_bytes()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0).hyphenated(), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

identity!(
    /// A protected disk; minted by the target when the disk is first protected, kept on both sides.
    DiskId
);
identity!(
    /// A daemon: agent (and thereby its machine), process server or master target; the UUID in its certificate.
    PeerId
);
identity!(
    /// One unbroken history of a disk. A new one begins wherever continuity with the old was lost.
    LineageId
);

number!(
    /// Fencing token of a disk: each OPEN_DISK gets a new one; lower never writes (I9).
    Generation
);
number!(
    /// Counts the records of a disk's delta stream, contiguous within a lineage. Zero is "before the first".
    Sequence
);
number!(
    /// Absolute sector of a disk.
    SectorIndex
);
number!(
    /// A length in sectors.
    SectorCount
);
number!(
    /// Absolute block of a disk.
    BlockIndex
);
number!(
    /// Absolute byte position in a disk or file.
    ByteOffset
);
number!(
    /// A length in bytes.
    ByteCount
);
number!(
    /// Nanoseconds since the UNIX epoch. A label for people, never used to order anything.
    Timestamp
);
number!(
    /// Nanoseconds on a monotonic clock of unspecified start; the `now` of every sans-IO core.
    MonoTime
);

impl SectorIndex {
    /// The byte position of this sector; `None` beyond 2^64 bytes.
    #[must_use]
    pub const fn byte_offset(self) -> Option<ByteOffset> {
        match self.0.checked_mul(SECTOR_BYTES) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }

    /// The block this sector lies in.
    #[must_use]
    pub const fn block(self) -> BlockIndex {
        BlockIndex(self.0 / BLOCK_SECTORS)
    }
}

impl SectorCount {
    /// The length in bytes; `None` beyond 2^64 bytes.
    #[must_use]
    pub const fn bytes(self) -> Option<ByteCount> {
        match self.0.checked_mul(SECTOR_BYTES) {
            Some(bytes) => Some(ByteCount(bytes)),
            None => None,
        }
    }
}

impl Sequence {
    /// The last one that formats hold.
    pub const LAST: Self = Self((1 << 63) - 1);

    /// The next sequence. Sequences count records one by one and do not reach 2^64.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Generation {
    /// The next generation. One is used per OPEN_DISK, so 2^64 is out of reach.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl MonoTime {
    /// This time plus `nanos`, saturating.
    #[must_use]
    pub const fn plus_nanos(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// Nanoseconds since `earlier`, zero when `earlier` is later.
    #[must_use]
    pub const fn nanos_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A half-open run of sectors `[start, end)`, absolute on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorRange {
    /// First sector.
    pub start: u64,
    /// One past the last sector; never below `start`.
    pub end: u64,
}

impl SectorRange {
    /// The run `[start, end)`.
    ///
    /// # Panics
    /// When `end < start`: a programming error, checked by the caller for outside data (see [`Self::from_len`]).
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        assert!(start <= end);
        Self { start, end }
    }

    /// The run of `len` sectors from `start`; `None` where it would pass 2^64.
    #[must_use]
    pub const fn from_len(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Length in sectors.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Length in bytes, saturating.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.len().saturating_mul(SECTOR_BYTES)
    }

    /// Byte position of the first sector, saturating.
    #[must_use]
    pub const fn byte_start(self) -> u64 {
        self.start.saturating_mul(SECTOR_BYTES)
    }

    /// Whether it holds no sector.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The common part of two runs; empty (at an unspecified place) when there is none.
    #[must_use]
    pub const fn intersect(self, other: Self) -> Self {
        let start = if self.start > other.start { self.start } else { other.start };
        let end = if self.end < other.end { self.end } else { other.end };
        if start < end { Self { start, end } } else { Self { start, end: start } }
    }

    /// Whether `other` lies wholly inside.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Cuts the run into pieces that end at multiples of `unit` sectors (aligned to the disk, not to the run).
    pub fn aligned_pieces(self, unit: u64) -> impl Iterator<Item = Self> + Clone {
        assert!(unit > 0);
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let end = (at / unit + 1).saturating_mul(unit).min(self.end);
            let piece = Self { start: at, end };
            at = end;
            Some(piece)
        })
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_pieces_cover_the_run_without_gap_or_overlap() {
        let pieces: Vec<_> = SectorRange::new(5, 21).aligned_pieces(8).collect();
        assert_eq!(pieces, [SectorRange::new(5, 8), SectorRange::new(8, 16), SectorRange::new(16, 21)]);
        assert_eq!(SectorRange::new(7, 7).aligned_pieces(8).count(), 0);
    }

    #[test]
    fn intersections_are_symmetric_and_empty_when_apart() {
        let (a, b) = (SectorRange::new(0, 10), SectorRange::new(8, 20));
        assert_eq!(a.intersect(b), SectorRange::new(8, 10));
        assert_eq!(b.intersect(a), SectorRange::new(8, 10));
        assert!(SectorRange::new(0, 3).intersect(SectorRange::new(5, 9)).is_empty());
    }

    #[test]
    fn identities_print_as_uuids_and_parse_back() {
        let id = DiskId::random().unwrap();
        assert_eq!(DiskId::parse(&id.to_string()).unwrap(), id);
        assert!(DiskId::parse("not a uuid").is_err());
    }
}
