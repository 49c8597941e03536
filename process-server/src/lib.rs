//! The process-server program as a library; `main.rs` is a thin shell around it.

pub mod cli;
pub mod commands;
pub mod config;
