//! The Reprotect engine: everything the three programs share.
//!
//! # Floors
//! A module uses its own floor and those below, never one above; `proto` and `store` never see each other.
//!
//! | floor | modules | what |
//! |---|---|---|
//! | 6 | [`sim`], [`net`], [`host`] | the same cores under a simulated or a real world |
//! | 5 | [`proto`], [`store`] | the protocol without I/O or clocks; what a disk is written to |
//! | 4 | [`format`](mod@format) | bytes on wire and disk |
//! | 3 | [`io`], [`dirty_map`], [`compress`] | files, dirty bits, bounded zstd |
//! | 2 | [`range_set`], [`checksum`], [`limits`] | arithmetic |
//! | 1 | [`error`], [`units`], [`mutants`] | words; bugs that tests put in force |
//!
//! # The path of one write
//! `agent/src/reader.rs` reads it from the disk, [`checksum`] computes its CRCs, [`format::extent`] makes it a
//! record, [`proto::agent`] sends it in a batch, [`proto::process_server`] relays it, [`proto::master_target`]
//! accepts it, [`store`] writes it to the target, and its acknowledgement travels back the same way.
//!
//! # Features
//! None: pure code. `io`: real files. `uring`: io_uring. `net`: QUIC and TLS. `host`: what daemons need. `sim`: the
//! deterministic simulator. Each builds alone, which proves the floors.

pub mod checksum;
pub mod compress;
pub mod dirty_map;
pub mod error;
pub mod format;
#[cfg(feature = "host")]
pub mod host;
pub mod io;
pub mod limits;
pub mod mutants;
#[cfg(feature = "net")]
pub mod net;
pub mod proto;
pub mod range_set;
#[cfg(feature = "sim")]
pub mod sim;
pub mod store;
pub mod units;
