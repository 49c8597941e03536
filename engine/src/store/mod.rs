//! What a disk is written to.
pub mod crc_map;
#[cfg(feature = "io")]
pub mod export;
pub mod files;
pub mod fingerprint;
pub mod identity;
pub mod journal;
pub mod overlay;
pub mod target;
pub mod vmdk;
