//! The agent program as a library; `main.rs` is a thin shell around it.
pub mod config;
pub mod disks;
