//! What a numbered entry of the redo log writes: its records, opened and checked.
//!
//! Invariants: an entry's body is the frame's body as it came over the wire; a bulk entry is preceded by the ranges
//! that it may write, for that was decided when it was accepted and cannot be found out later. Every fragment is
//! checked by its CRC each time it is read (I8). Units: sectors, bytes. Called by the applier and by views.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::batch::{decode_batch, decode_bulk};
use crate::format::extent::{Record, RecordKind};
use crate::format::segment::EntryKind;
use crate::format::wire::{put_items, take_items};
use crate::units::{SECTOR_BYTES, SectorRange};

/// What a write puts there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Data(Bytes),
    /// Zeros.
    Zeros,
}

/// What can be cut at sectors.
pub trait Cut {
    /// The part of it from byte `from` on, `bytes` long.
    #[must_use]
    fn cut(&self, from: usize, bytes: usize) -> Self;
}

impl Cut for Content {
    fn cut(&self, from: usize, bytes: usize) -> Self {
        match self {
            Self::Data(data) => Self::Data(data.slice(from..from + bytes)),
            Self::Zeros => Self::Zeros,
        }
    }
}

/// A run of sectors and what is written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write<C = Content> {
    /// Where.
    pub range: SectorRange,
    /// What.
    pub content: C,
}

impl<C: Cut> Write<C> {
    /// The part of it inside `range`, which must overlap it.
    #[must_use]
    pub fn part(&self, range: SectorRange) -> Self {
        let range = self.range.intersect(range);
        let from = ((range.start - self.range.start) * SECTOR_BYTES) as usize;
        Self { range, content: self.content.cut(from, range.bytes() as usize) }
    }
}

/// What stands before the frame's body in a bulk entry: the ranges that may be written, ascending.
#[must_use]
pub fn bulk_prefix(keep: &[SectorRange]) -> Vec<u8> {
    let mut prefix = BytesMut::new();
    prefix.put_u32_le(keep.len() as u32);
    put_items(&mut prefix, keep.iter().copied());
    prefix.to_vec()
}

/// The writes of an entry, in order: where they overlap, later ones win. A mark writes nothing.
///
/// # Errors
/// When the body is not what its kind says, or a fragment's CRC does not match.
pub fn entry_writes(
    kind: EntryKind,
    body: Bytes,
    decompressor: &mut Decompressor,
) -> Result<Vec<Write>, FormatError> {
    let (keep, records) = entry_records(kind, body)?;
    let writes = opened(records, decompressor)?;
    let Some(keep) = keep else { return Ok(writes) };
    Ok(writes.iter().flat_map(|write| kept(write.range, &keep).map(|range| write.part(range))).collect())
}

/// The records of an entry, in their order, they are the end of its body; and the ranges a bulk entry may write. A mark
/// has none.
///
/// # Errors
/// When the body is not what its kind says.
pub(super) fn entry_records(
    kind: EntryKind,
    body: Bytes,
) -> Result<(Option<Vec<SectorRange>>, Vec<Record>), FormatError> {
    match kind {
        EntryKind::Batch | EntryKind::Ordered => Ok((None, decode_batch(body)?.1)),
        EntryKind::Bulk => {
            let (keep, body) = take_prefix(body)?;
            Ok((Some(keep), decode_bulk(body)?.1))
        }
        EntryKind::Mark | EntryKind::State | EntryKind::Applied => Ok((None, Vec::new())),
    }
}

/// The parts of a record's range that may be written.
pub(super) fn kept(range: SectorRange, keep: &[SectorRange]) -> impl Iterator<Item = SectorRange> {
    keep.iter().map(move |kept| kept.intersect(range)).filter(|part| !part.is_empty())
}

fn take_prefix(mut body: Bytes) -> Result<(Vec<SectorRange>, Bytes), FormatError> {
    const WHAT: &str = "Bulk entry";
    let count = body.try_get_u32_le().map_err(|_| FormatError::Short { what: WHAT, got: 0, expected: 4 })?;
    let (keep, rest) = take_items::<SectorRange>(&body, count as usize, WHAT)?;
    let rest = body.slice_ref(rest);
    Ok((keep, rest))
}

fn opened(records: Vec<Record>, decompressor: &mut Decompressor) -> Result<Vec<Write>, FormatError> {
    let mut writes = Vec::with_capacity(records.len());
    for record in records {
        let content = if record.kind() == RecordKind::Data {
            let mut plain = vec![0; record.plain_bytes() as usize];
            record.open_into(decompressor, &mut plain)?;
            Content::Data(plain.into())
        } else {
            Content::Zeros
        };
        writes.push(Write { range: record.range(), content });
    }
    Ok(writes)
}
