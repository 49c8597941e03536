//! The process-server program as a library; `main.rs` is a thin shell around it.
//!
//! | file | role |
//! |---|---|
//! | [`daemon`] | `run`: listens, relays, answers, renews, stops |
//! | [`relay`] | one session between an agent and its target |
//! | [`recode`] | compression threads and their level |
//! | [`budget`] | the memory of all sessions together |
//! | [`upstream`] | dialling master targets |
//! | [`enrolment`] | own identity and the targets it was enrolled at |
//! | [`status`] | what the daemon tells about itself |
//! | [`check`] | preflight |
//! | [`cli`], [`config`], [`commands`] | command line, configuration, commands |

pub mod budget;
pub mod check;
pub mod cli;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod enrolment;
pub mod recode;
pub mod relay;
pub mod status;
pub mod upstream;
