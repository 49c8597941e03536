//! The agent program as a library; `main.rs` is a thin shell around it.
//!
//! A write's way: `reader` (the disk) → `workers` (hash, cut, checksum, compress) → `session` (the protocol core and
//! the lanes), all kept by `machine`. What changed is told by `capture`, whose thread is
//! `capturing`; `following` makes rounds of it. Which disks there are is told by `disks` and `sources`; what to do by
//! `plan`; what operators see is made by `telling`; whom to talk to by `upstreams`, `rota` and `dial`; points of the machine are made by `marking`, and brought about by `quiescing`,
//! `hooks` and `freeze`; operators come in through `commands` and `service`.

/// For what the tests of the capture thread share with those of capture.
#[cfg(test)]
extern crate self as reprotect_agent;

pub mod api;
pub mod budget;
pub mod capture;
mod capturing;
pub mod check;
pub mod cli;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod dial;
pub mod disks;
mod doubts;
pub mod faults;
mod following;
pub mod freeze;
mod freshness;
mod growing;
pub mod health;
pub mod hooks;
mod labels;
pub mod machine;
mod marking;
mod metrics;
mod opening;
pub mod plan;
mod policy;
mod positions;
mod protected;
mod quiescing;
pub mod reader;
mod reading;
mod recent;
pub mod rota;
mod salvage;
pub mod service;
mod session;
pub mod sources;
mod telling;
pub mod throttle;
mod unread;
mod upstreams;
pub mod workers;
