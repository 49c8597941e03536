//! The bytes on wire and disk.
