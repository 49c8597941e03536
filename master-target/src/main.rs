//! Entry point of `reprotect-master-target`: the command line, and everything else in the library.

use std::process::ExitCode;

use clap::Parser as _;
use reprotect_master_target::cli::Cli;
use reprotect_master_target::commands;

fn main() -> ExitCode {
    ExitCode::from(commands::dispatch(Cli::parse()))
}
