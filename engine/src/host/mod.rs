//! What every daemon needs besides the data path: configuration, admin socket, logs, output, shutdown, its places.
//!
//! Invariants: nothing here knows a disk or a protocol; it uses `error` and the operating system only. Each program
//! resolves its file once ([`config`]) into settings, takes its state directory ([`run_lock`]), and speaks to its
//! own commands over a Unix socket ([`admin`]). Called by the three programs.

pub mod admin;
pub mod admin_client;
pub mod config;
pub mod config_doc;
pub mod hours;
pub mod logging;
pub mod open_files;
pub mod output;
pub mod pki;
pub mod places;
pub mod preflight;
pub mod run_lock;
pub mod shutdown;
pub mod values;
