//! Bytes on wire and disk.
pub mod vmdk;
