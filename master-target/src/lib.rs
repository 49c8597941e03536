//! The master-target program as a library; `main.rs` is a thin shell around it.
//!
//! A write's way: `session` (frames of a connection) → `disk_worker` (check) → `disk_writer` (core) → `disk_store` →
//! the target, or `journaled` → the journal, then the target; what is
//! known is in `registry` and, on disk, in `catalogue`; operators come in through `admin` and `commands`.

pub mod admin;
mod admin_points;
mod again;
pub mod api;
pub mod authority;
mod backlog;
pub mod catalogue;
pub mod checks;
pub mod cli;
pub mod commands;
mod compare_cache;
pub mod config;
pub mod daemon;
pub mod device;
pub mod disk_status;
pub mod disk_store;
pub mod disk_worker;
mod disk_writer;
pub mod explain;
pub mod export;
pub mod failback;
pub mod guard;
pub mod housekeeping;
pub mod journaled;
mod lost;
pub mod mounts;
mod pinned;
mod plan;
pub mod points;
pub mod policy;
pub mod protect;
pub mod receipts;
pub mod redo;
pub mod registry;
pub mod retention;
mod retention_checks;
pub mod retention_policy;
mod rot;
pub mod scrub;
pub mod session;
mod staying;
mod target_map;
