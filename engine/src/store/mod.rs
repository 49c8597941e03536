//! What a disk is written to.
pub mod identity;
pub mod target;
pub mod vmdk;
