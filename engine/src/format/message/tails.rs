//! What follows the fixed heads of messages: lists, proofs, texts, each as long as its head says.
//!
//! Invariants: a count is checked against its bound before anything of that size is made; nothing may follow a tail.
//! Called by [`super::Message`].

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    Auth, AuthHead, CERTIFICATE_BYTES_MAX, CERTIFICATES_MAX, CompareAnswer, CompareHashesHead,
    CompareRequestHead, GRANT_BYTES_MAX, InventoryDisk, InventoryHead, Message, PointDegrade, RefineUnit,
    SIGNATURE_BYTES_MAX, UNITS_MAX,
};
use crate::format::FormatError;
use crate::format::frame::FrameKind;
use crate::format::wire::take_items;
use crate::limits::{CHUNK_BYTES, DISK_BYTES_MAX, DISKS_PER_AGENT_MAX};
use crate::units::SECTOR_BYTES;

pub(super) fn put_auth(out: &mut BytesMut, auth: &Auth) -> FrameKind {
    let head = AuthHead {
        agent: auth.agent,
        signature_bytes: auth.signature.len() as u16,
        certificate_count: auth.certificates.len() as u16,
    };
    out.put_slice(&head.to_bytes());
    out.put_slice(&auth.signature);
    for certificate in &auth.certificates {
        out.put_u16_le(certificate.len() as u16);
        out.put_slice(certificate);
    }
    FrameKind::Auth
}

pub(super) fn take_auth(body: &Bytes) -> Result<Auth, FormatError> {
    const WHAT: &str = "Auth";
    let (head, rest) = AuthHead::read_prefix(body)?;
    bounded(head.signature_bytes.into(), SIGNATURE_BYTES_MAX, WHAT)?;
    let count = bounded(head.certificate_count.into(), CERTIFICATES_MAX, WHAT)?;
    let (signature, mut rest) = split(rest, head.signature_bytes.into(), WHAT)?;
    let mut certificates = Vec::with_capacity(count);
    for _ in 0..count {
        let (len, after) = take_items::<u16>(rest, 1, WHAT)?;
        let len = usize::from(len.first().copied().unwrap_or(0));
        bounded(len as u32, CERTIFICATE_BYTES_MAX, WHAT)?;
        let (certificate, after) = split(after, len, WHAT)?;
        certificates.push(Bytes::copy_from_slice(certificate));
        rest = after;
    }
    if !rest.is_empty() {
        return Err(FormatError::Trailing { what: WHAT, got: rest.len() });
    }
    Ok(Auth { agent: head.agent, signature: Bytes::copy_from_slice(signature), certificates })
}

pub(super) fn take_inventory(body: &Bytes) -> Result<Message, FormatError> {
    let (head, mut rest) = InventoryHead::read_prefix(body)?;
    let count = bounded(head.disk_count, DISKS_PER_AGENT_MAX, "Inventory")?;
    let mut disks = Vec::with_capacity(count);
    for _ in 0..count {
        let (disk, after) = InventoryDisk::read_prefix(rest)?;
        if disk.fs_count > 8 {
            return Err(FormatError::Field {
                what: "InventoryDisk",
                field: "fs_count",
                got: disk.fs_count.into(),
                expected: "at most 8",
            });
        }
        disks.push(disk);
        rest = after;
    }
    if rest.is_empty() {
        Ok(Message::Inventory(head, disks))
    } else {
        Err(FormatError::Trailing { what: "Inventory", got: rest.len() })
    }
}

pub(super) fn take_compare_request(body: &Bytes) -> Result<Message, FormatError> {
    const WHAT: &str = "CompareRequest";
    let (head, mut rest) = CompareRequestHead::read_prefix(body)?;
    let field = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
    if head.range.is_empty() || head.range.bytes() > CHUNK_BYTES {
        return field("range", head.range.len(), "one sector to one chunk");
    }
    let count = bounded(head.unit_count.into(), UNITS_MAX, WHAT)?;
    let mut units: Vec<RefineUnit> = Vec::with_capacity(count);
    for _ in 0..count {
        let (unit, after) = RefineUnit::read_prefix(rest)?;
        if units.last().is_some_and(|last| last.unit >= unit.unit) {
            return field("units", unit.unit.into(), "ascending units");
        }
        units.push(unit);
        rest = after;
    }
    if rest.is_empty() {
        Ok(Message::CompareRequest(head, units))
    } else {
        Err(FormatError::Trailing { what: WHAT, got: rest.len() })
    }
}

pub(super) fn take_compare_hashes(body: &Bytes) -> Result<Message, FormatError> {
    const WHAT: &str = "CompareHashes";
    let (head, rest) = CompareHashesHead::read_prefix(body)?;
    let (hashes, rest) = take_items(rest, bounded(head.hash_count, UNITS_MAX, WHAT)?, WHAT)?;
    let masks = all_items(rest, bounded(head.mask_count.into(), UNITS_MAX, WHAT)?, WHAT)?;
    Ok(Message::CompareHashes(head, CompareAnswer { hashes, masks }))
}

pub(super) fn take_point_degrade(body: &Bytes) -> Result<PointDegrade, FormatError> {
    let degrade = PointDegrade::read_exact(body)?;
    if degrade.from > degrade.to {
        return Err(FormatError::Field {
            what: "PointDegrade",
            field: "from",
            got: degrade.from.0,
            expected: "no sequence behind the last one",
        });
    }
    Ok(degrade)
}

/// Refuses a disk larger than any that may be protected: sizes and addresses below may then be computed with.
pub(in crate::format) fn check_size(what: &'static str, size_sectors: u64) -> Result<(), FormatError> {
    if size_sectors <= DISK_BYTES_MAX / SECTOR_BYTES {
        return Ok(());
    }
    Err(FormatError::Field { what, field: "size_sectors", got: size_sectors, expected: "at most 64 TiB" })
}

pub(super) fn bounded(count: u32, max: usize, what: &'static str) -> Result<usize, FormatError> {
    let count = count as usize;
    if count <= max {
        Ok(count)
    } else {
        Err(FormatError::Field {
            what,
            field: "count",
            got: count as u64,
            expected: "no more than the limit",
        })
    }
}

pub(super) fn split<'a>(
    bytes: &'a [u8],
    len: usize,
    what: &'static str,
) -> Result<(&'a [u8], &'a [u8]), FormatError> {
    bytes.split_at_checked(len).ok_or(FormatError::Short { what, got: bytes.len(), expected: len })
}

pub(super) fn all_items<T: crate::format::wire::WireField>(
    bytes: &[u8],
    count: usize,
    what: &'static str,
) -> Result<Vec<T>, FormatError> {
    let (items, rest) = take_items(bytes, count, what)?;
    if rest.is_empty() { Ok(items) } else { Err(FormatError::Trailing { what, got: rest.len() }) }
}

pub(super) fn take_blob(bytes: &[u8], len: u16, what: &'static str) -> Result<Bytes, FormatError> {
    take_blob_of(bytes, len.into(), GRANT_BYTES_MAX, what)
}

pub(super) fn take_blob_of(
    bytes: &[u8],
    len: usize,
    max: usize,
    what: &'static str,
) -> Result<Bytes, FormatError> {
    bounded(len as u32, max, what)?;
    let (blob, rest) = split(bytes, len, what)?;
    if rest.is_empty() {
        Ok(Bytes::copy_from_slice(blob))
    } else {
        Err(FormatError::Trailing { what, got: rest.len() })
    }
}
