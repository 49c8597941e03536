//! The agent program as a library; `main.rs` is a thin shell around it.
//!
//! A write's way: `reader` (the disk) → `workers` (hash, cut, checksum, compress) → `session` (the protocol core and
//! the lanes). Which disks there are is told by `disks` and `sources`; operators come in through `commands`.

pub mod api;
pub mod cli;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod disks;
pub mod reader;
pub mod service;
pub mod session;
pub mod sources;
pub mod workers;
