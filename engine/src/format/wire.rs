//! The machinery of fixed layouts: `wire!` declares a structure once, and its size, offsets, encoder, decoder and
//! byte table all derive from that one declaration.
//!
//! Invariants: little-endian; the size is asserted at compile time; fields whose name begins with `reserved` are
//! written as zero and refused when they are not. Units: bytes.

use bytes::BufMut;
use zerocopy::little_endian::{U16, U32, U64};

use super::FormatError;
use crate::checksum::UnitHash;
use crate::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence, Timestamp};

/// A field type and its bytes on the wire.
pub trait WireField: Sized {
    /// The fixed little-endian form.
    type Wire: zerocopy::FromBytes
        + zerocopy::IntoBytes
        + zerocopy::Immutable
        + zerocopy::KnownLayout
        + zerocopy::Unaligned
        + Copy;

    /// The wire form.
    fn to_wire(&self) -> Self::Wire;

    /// The value, or what is wrong with it.
    ///
    /// # Errors
    /// When the wire form is not a value of this type.
    fn from_wire(wire: Self::Wire, what: &'static str, field: &'static str) -> Result<Self, FormatError>;
}

macro_rules! number_field {
    ($($ty:ty => $wire:ty, |$v:ident| $get:expr, |$w:ident| $make:expr;)*) => {$(
        impl WireField for $ty {
            type Wire = $wire;
            fn to_wire(&self) -> $wire {
                let $v = *self;
                $get
            }
            fn from_wire($w: $wire, _: &'static str, _: &'static str) -> Result<Self, FormatError> {
                Ok($make)
            }
        }
    )*};
}

number_field! {
    u8 => u8, |v| v, |w| w;
    u16 => U16, |v| U16::new(v), |w| w.get();
    u32 => U32, |v| U32::new(v), |w| w.get();
    u64 => U64, |v| U64::new(v), |w| w.get();
    Timestamp => U64, |v| U64::new(v.0), |w| Timestamp(w.get());
    DiskId => [u8; 16], |v| v.0, |w| DiskId(w);
    PeerId => [u8; 16], |v| v.0, |w| PeerId(w);
    LineageId => [u8; 16], |v| v.0, |w| LineageId(w);
    UnitHash => UnitHash, |v| v, |w| w;
}

/// Largest sequence or generation a format may hold: counters that begin at zero never come near, so a larger one is
/// damage or an attack, and what is read may be counted on without overflow.
pub const COUNTER_MAX: u64 = u64::MAX >> 1;
const _: () = assert!(crate::units::Sequence::LAST.0 == COUNTER_MAX);

macro_rules! counter_field {
    ($($ty:ident)*) => {$(
        impl WireField for $ty {
            type Wire = U64;
            fn to_wire(&self) -> U64 {
                U64::new(self.0)
            }
            fn from_wire(wire: U64, what: &'static str, field: &'static str) -> Result<Self, FormatError> {
                match wire.get() {
                    got if got > COUNTER_MAX => {
                        Err(FormatError::Field { what, field, got, expected: "a number below 2^63" })
                    }
                    value => Ok(Self(value)),
                }
            }
        }
    )*};
}

counter_field!(Generation Sequence);

impl<const N: usize> WireField for [u8; N] {
    type Wire = [u8; N];
    fn to_wire(&self) -> [u8; N] {
        *self
    }
    fn from_wire(wire: [u8; N], _: &'static str, _: &'static str) -> Result<Self, FormatError> {
        Ok(wire)
    }
}

impl<const N: usize> WireField for [u32; N] {
    type Wire = [U32; N];
    fn to_wire(&self) -> [U32; N] {
        self.map(U32::new)
    }
    fn from_wire(wire: [U32; N], _: &'static str, _: &'static str) -> Result<Self, FormatError> {
        Ok(wire.map(U32::get))
    }
}

impl WireField for bool {
    type Wire = u8;
    fn to_wire(&self) -> u8 {
        u8::from(*self)
    }
    fn from_wire(wire: u8, what: &'static str, field: &'static str) -> Result<Self, FormatError> {
        match wire {
            0 => Ok(false),
            1 => Ok(true),
            got => Err(FormatError::Field { what, field, got: got.into(), expected: "0 or 1" }),
        }
    }
}

impl WireField for SectorRange {
    type Wire = [U64; 2];
    fn to_wire(&self) -> [U64; 2] {
        [U64::new(self.start), U64::new(self.end)]
    }
    fn from_wire(
        [start, end]: [U64; 2],
        what: &'static str,
        field: &'static str,
    ) -> Result<Self, FormatError> {
        let (start, end) = (start.get(), end.get());
        if start > end {
            return Err(FormatError::Field {
                what,
                field,
                got: start,
                expected: "a start not behind the end",
            });
        }
        Ok(Self { start, end })
    }
}

/// One row of a structure's byte table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// First byte.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// The field's name.
    pub field: &'static str,
    /// What it holds: the field's own documentation; empty for reserved bytes.
    pub meaning: &'static str,
}

/// One row of an enumeration's table of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueRow {
    /// The number on wire and disk.
    pub value: u64,
    /// Its name.
    pub name: &'static str,
    /// What it means: the variant's own documentation.
    pub meaning: &'static str,
}

/// Declares a byte-sized enumeration with its wire values.
macro_rules! wire_enum {
    ($(#[$doc:meta])* pub enum $name:ident: $repr:ty { $($(#[doc = $vdoc:literal])* $variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[doc = $vdoc])* $variant = $value,)* }

        impl $name {
            /// Every value, in wire order.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The table of values, in wire order.
            pub const TABLE: &[$crate::format::wire::ValueRow] = &[$($crate::format::wire::ValueRow {
                value: $value,
                name: stringify!($variant),
                meaning: concat!($($vdoc),*),
            },)*];
        }

        impl $crate::format::wire::WireField for $name {
            type Wire = <$repr as $crate::format::wire::WireField>::Wire;
            fn to_wire(&self) -> Self::Wire {
                $crate::format::wire::WireField::to_wire(&(*self as $repr))
            }
            fn from_wire(
                wire: Self::Wire, what: &'static str, field: &'static str,
            ) -> Result<Self, $crate::format::FormatError> {
                match <$repr as $crate::format::wire::WireField>::from_wire(wire, what, field)? {
                    $($value => Ok(Self::$variant),)*
                    got => Err($crate::format::FormatError::Field {
                        what, field, got: u64::from(got), expected: concat!("a ", stringify!($name)),
                    }),
                }
            }
        }
    };
}

/// Declares a fixed layout: the plain struct, its wire struct, size assertion, encoder, decoder and byte table.
macro_rules! wire {
    ($(#[$doc:meta])* pub struct $name:ident / $wire:ident = $size:literal {
        $($(#[doc = $fdoc:literal])* $field:ident: $ty:ty,)*
        $(; $($reserved:ident: $rty:ty,)*)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[doc = $fdoc])* pub $field: $ty,)* }

        #[derive(Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable,
                 zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(C)]
        struct $wire {
            $($field: <$ty as $crate::format::wire::WireField>::Wire,)*
            $($($reserved: $rty,)*)?
        }

        const _: () = assert!(size_of::<$wire>() == $size, concat!("size of ", stringify!($name)));

        impl $name {
            /// Size on wire and disk, in bytes.
            pub const BYTES: usize = $size;

            /// The byte table, one row a field.
            pub const TABLE: &[$crate::format::wire::Row] = &[
                $($crate::format::wire::Row {
                    offset: std::mem::offset_of!($wire, $field),
                    size: size_of::<<$ty as $crate::format::wire::WireField>::Wire>(),
                    field: stringify!($field),
                    meaning: concat!($($fdoc),*),
                },)*
                $($($crate::format::wire::Row {
                    offset: std::mem::offset_of!($wire, $reserved),
                    size: size_of::<$rty>(),
                    field: stringify!($reserved),
                    meaning: "",
                },)*)?
            ];

            /// The bytes.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; $size] {
                let wire = $wire {
                    $($field: $crate::format::wire::WireField::to_wire(&self.$field),)*
                    $($($reserved: zerocopy::FromZeros::new_zeroed(),)*)?
                };
                zerocopy::transmute!(wire)
            }

            /// Reads the structure from the front of `bytes`; what follows is returned with it.
            ///
            /// # Errors
            /// When there are too few bytes, or a field or reserved byte has a value the format does not allow.
            pub fn read_prefix(bytes: &[u8]) -> Result<(Self, &[u8]), $crate::format::FormatError> {
                let what = stringify!($name);
                let (wire, rest) = <$wire as zerocopy::FromBytes>::read_from_prefix(bytes).map_err(|_| {
                    $crate::format::FormatError::Short { what, got: bytes.len(), expected: $size }
                })?;
                $($(
                    if zerocopy::IntoBytes::as_bytes(&wire.$reserved).iter().any(|byte| *byte != 0) {
                        return Err($crate::format::FormatError::Field {
                            what, field: stringify!($reserved), got: 1, expected: "zeros",
                        });
                    }
                )*)?
                Ok((Self {
                    $($field: $crate::format::wire::WireField::from_wire(wire.$field, what, stringify!($field))?,)*
                }, rest))
            }

            /// Reads the structure from exactly `bytes`.
            ///
            /// # Errors
            /// As [`Self::read_prefix`], and when bytes are left over.
            pub fn read_exact(bytes: &[u8]) -> Result<Self, $crate::format::FormatError> {
                let (value, rest) = Self::read_prefix(bytes)?;
                if rest.is_empty() {
                    Ok(value)
                } else {
                    Err($crate::format::FormatError::Trailing { what: stringify!($name), got: rest.len() })
                }
            }
        }
    };
}

pub(crate) use {wire, wire_enum};

/// Appends fixed-size items one after another.
pub fn put_items<T: WireField>(out: &mut impl BufMut, items: impl IntoIterator<Item = T>) {
    for item in items {
        out.put_slice(zerocopy::IntoBytes::as_bytes(&item.to_wire()));
    }
}

/// Reads exactly `count` fixed-size items from the front of `bytes`.
///
/// # Errors
/// When there are too few bytes for `count` items, or an item is not a value of its type.
pub fn take_items<'a, T: WireField>(
    bytes: &'a [u8],
    count: usize,
    what: &'static str,
) -> Result<(Vec<T>, &'a [u8]), FormatError> {
    let size = size_of::<T::Wire>();
    let needed = count.saturating_mul(size);
    let (mine, rest) = bytes.split_at_checked(needed).ok_or(FormatError::Short {
        what,
        got: bytes.len(),
        expected: needed,
    })?;
    let items = mine
        .chunks_exact(size)
        .map(|item| {
            let wire = <T::Wire as zerocopy::FromBytes>::read_from_bytes(item)
                .map_err(|_| FormatError::Short { what, got: item.len(), expected: size })?;
            T::from_wire(wire, what, "item")
        })
        .collect::<Result<Vec<T>, _>>()?;
    Ok((items, rest))
}

/// A text of at most `N` bytes in a fixed field, padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<const N: usize>([u8; N]);

impl<const N: usize> Text<N> {
    /// The longest prefix of `text` that fits, cut at a character.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut bytes = [0_u8; N];
        let cut = (0..=N.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        for (slot, byte) in bytes.iter_mut().zip(text.bytes().take(cut)) {
            *slot = byte;
        }
        Self(bytes)
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(N);
        self.0.get(..end).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or("")
    }
}

impl<const N: usize> WireField for Text<N> {
    type Wire = [u8; N];
    fn to_wire(&self) -> [u8; N] {
        self.0
    }
    fn from_wire(wire: [u8; N], what: &'static str, field: &'static str) -> Result<Self, FormatError> {
        let end = wire.iter().position(|byte| *byte == 0).unwrap_or(N);
        let (text, padding) = wire.split_at(end);
        let clean = std::str::from_utf8(text).is_ok_and(|text| !text.chars().any(char::is_control));
        if !clean || padding.iter().any(|byte| *byte != 0) {
            return Err(FormatError::Field { what, field, got: 0, expected: "UTF-8 text padded with zeros" });
        }
        Ok(Self(wire))
    }
}

#[cfg(test)]
#[expect(
    unreachable_pub,
    clippy::wrong_self_convention,
    reason = "wire! declares public structures of any size"
)]
mod tests {
    use super::*;

    wire! {
        /// A structure for these tests.
        pub struct Sample / SampleWire = 24 {
            /// A number.
            number: u32,
            /// A range.
            range: SectorRange,
            ; reserved: [u8; 4],
        }
    }

    #[test]
    fn a_structure_reads_back_what_it_wrote() {
        let sample = Sample { number: 7, range: SectorRange::new(1, 9) };
        let bytes = sample.to_bytes();
        assert_eq!(Sample::read_exact(&bytes).unwrap(), sample);
        assert_eq!(Sample::TABLE[1], Row { offset: 4, size: 16, field: "range", meaning: " A range." });
    }

    #[test]
    fn reserved_bytes_short_input_and_trailing_input_are_refused() {
        let mut bytes = Sample { number: 7, range: SectorRange::new(1, 9) }.to_bytes();
        assert!(Sample::read_exact(&bytes[..Sample::BYTES - 1]).is_err());
        assert!(Sample::read_exact(&[bytes.as_slice(), &[0]].concat()).is_err());
        bytes[23] = 1;
        assert!(Sample::read_exact(&bytes).is_err());
    }

    #[test]
    fn text_is_cut_at_a_character_and_refuses_garbage() {
        assert_eq!(Text::<5>::new("abcdé").as_str(), "abcd");
        assert!(Text::<4>::from_wire([b'a', 0, b'b', 0], "t", "f").is_err());
        assert!(Text::<4>::from_wire([0xff, 0, 0, 0], "t", "f").is_err());
        assert!(Text::<4>::from_wire([b'\n', 0, 0, 0], "t", "f").is_err());
    }
}
