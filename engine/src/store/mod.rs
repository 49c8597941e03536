//! What a disk is written to.
