//! The command line of `reprotect-process-server`.
//!
//! Invariants: few options, everything else is in the configuration; each command's arguments are one struct, so that
//! a command is a function of it. Exit status: 0 done, 1 failed, 2 wrong command line or configuration.
//! Called by `main`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use reprotect_engine::host::config::Overrides;

/// Relays agents' disks to master targets: receives, compresses, forwards.
#[derive(Debug, Parser)]
#[command(
    name = "reprotect-process-server",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong command line or configuration.\n\n\
        Examples:\n  \
        reprotect-process-server enroll TOKEN\n  \
        reprotect-process-server run\n  \
        reprotect-process-server status --watch"
)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct GlobalArgs {
    /// Configuration file [default: /etc/reprotect/process-server.toml, or process-server.toml in --state-dir].
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Keep state and admin socket here instead of the packaged places.
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// What is logged to standard error: error, warn, info, debug or trace.
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Print the result as JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

impl GlobalArgs {
    /// The options that win over the configuration file.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides {
            config: self.config.clone(),
            state_dir: self.state_dir.clone(),
            log_level: self.log_level.clone(),
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground.
    Run(RunArgs),
    /// Check that this machine is ready: memory, ports, clock, reachability of every master target.
    Check(CheckArgs),
    /// Check the configuration file, or print a commented default.
    CheckConfig(CheckConfigArgs),
    /// Enrol this process server with a one-time token from `reprotect-master-target invite`.
    Enroll(EnrollArgs),
    /// Show what the running daemon is doing.
    Status(StatusArgs),
}

/// Arguments of `check-config`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Examples:\n  reprotect-process-server check-config --config ./process-server.toml\n  \
    reprotect-process-server check-config --print-default > /etc/reprotect/process-server.toml"
)]
pub struct CheckConfigArgs {
    /// Print a configuration with every key, its default and its cost, and check nothing.
    #[arg(long)]
    pub print_default: bool,
}

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Prints PASS, WARN or FAIL with reason and remedy; exit status 1 on any FAIL.")]
pub struct CheckArgs {}

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Start although the preflight check of this name fails; may be repeated.
    #[arg(long, value_name = "CHECK")]
    pub force: Vec<String>,
}

/// Arguments of `enroll`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-process-server enroll \\\n    \
    \"$(ssh target reprotect-master-target invite --role process-server)\"")]
pub struct EnrollArgs {
    /// The one-time token, or `-` to read it from standard input.
    #[arg(value_name = "TOKEN")]
    pub token: String,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Examples:\n  reprotect-process-server status\n  reprotect-process-server status --watch"
)]
pub struct StatusArgs {
    /// Keep showing it until interrupted.
    #[arg(long)]
    pub watch: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
