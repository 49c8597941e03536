//! VMDK as bytes: the descriptor text and the header of hosted sparse extents, and telling the kinds apart.
//!
//! Invariants: every decoder is total: any bytes give a value or a typed error, never a panic, and every number that
//! leaves this module is bounded. Nothing here opens a file. Units: 512 B sectors unless a name says bytes.
//! Called by `store::vmdk` and by the fuzz targets.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used))]

pub mod descriptor;
pub mod sparse;

/// First bytes of a hosted sparse extent (`KDMV`), of every subformat that has grain tables.
pub const HOSTED_SPARSE_MAGIC: [u8; 4] = *b"KDMV";
/// First bytes of an ESXi redo log (`vmfsSparse`): a snapshot, never a target.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// First eight bytes, little-endian, of a space-efficient ESXi snapshot: undocumented, never a target.
pub const SESPARSE_MAGIC: u64 = 0x0000_0000_cafe_babe;

/// What the first bytes of a file say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recognised {
    /// A descriptor as text.
    Descriptor,
    /// A hosted sparse extent, which may embed its descriptor.
    HostedSparse,
    /// A `vmfsSparse` snapshot extent.
    Cowd,
    /// A `seSparse` snapshot extent.
    SeSparse,
    /// None of these: plain data, or something else altogether.
    Other,
}

/// Tells what a file is by its first bytes (512 suffice).
#[must_use]
pub fn recognise(head: &[u8]) -> Recognised {
    if head.starts_with(&HOSTED_SPARSE_MAGIC) {
        return Recognised::HostedSparse;
    }
    if head.starts_with(&COWD_MAGIC) {
        return Recognised::Cowd;
    }
    if head.starts_with(&SESPARSE_MAGIC.to_le_bytes()) {
        return Recognised::SeSparse;
    }
    // Comments and blank lines may precede the marker, but it is a comment line of the first few.
    let is_descriptor = head.split(|byte| *byte == b'\n').take(4).any(|line| {
        let line = line.trim_ascii();
        line.get(..21).is_some_and(|start| start.eq_ignore_ascii_case(b"# Disk DescriptorFile"))
    });
    if is_descriptor { Recognised::Descriptor } else { Recognised::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_by_their_first_bytes() {
        assert_eq!(recognise(b"KDMV\x01\0\0\0"), Recognised::HostedSparse);
        assert_eq!(recognise(b"COWD\x01\0\0\0"), Recognised::Cowd);
        assert_eq!(recognise(&[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]), Recognised::SeSparse);
        assert_eq!(recognise(b"# disk descriptorfile\r\nversion=1"), Recognised::Descriptor);
        assert_eq!(recognise(b"\n# Disk DescriptorFile\n"), Recognised::Descriptor);
        assert_eq!(recognise(b""), Recognised::Other);
        assert_eq!(recognise(&[0; 512]), Recognised::Other);
    }
}
