//! The command line of `reprotect-agent`.
//!
//! Invariants: few options, everything else is in the configuration; each command's arguments are one struct, so that
//! a command is a function of it. Exit status: 0 done, 1 failed, 2 wrong command line or configuration.
//! Called by `main`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::values::DurationText;

/// Protects this machine's disks: reads them and replicates them to a master target.
#[derive(Debug, Parser)]
#[command(
    name = "reprotect-agent",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong command line or configuration.\n\n\
        Examples:\n  \
        reprotect-agent disks\n  \
        reprotect-agent enroll TOKEN\n  \
        reprotect-agent run --state-dir /srv/reprotect"
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
    /// Configuration file [default: /etc/reprotect/agent.toml, or agent.toml in --state-dir].
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
    /// List this machine's disks, and which are protected by default and why.
    Disks(DisksArgs),
    /// Check that this machine is ready: disks, permissions, clock, reachability of the upstreams.
    Check(CheckArgs),
    /// Check the configuration file, or print a commented default.
    CheckConfig(CheckConfigArgs),
    /// Enrol this machine with a one-time token from `reprotect-master-target invite`.
    Enroll(EnrollArgs),
    /// Run the daemon in the foreground.
    Run(RunArgs),
    /// Show what the running daemon is doing.
    Status(StatusArgs),
    /// Make a recovery point of all protected disks of this machine.
    Mark(MarkArgs),
    /// Remove what live capture left in the kernel, when this machine is not to be protected any more.
    Unfollow(UnfollowArgs),
}

/// Arguments of `unfollow`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "A killed agent leaves its programs in the kernel on purpose: the next one goes on from what they saw.\n\
    After this command it compares the disks instead. The agent must not run."
)]
pub struct UnfollowArgs {}

/// Arguments of `disks`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:\n  reprotect-agent disks\n  reprotect-agent disks --all --json")]
pub struct DisksArgs {
    /// Show unbound loop devices and RAM disks too.
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Prints PASS, WARN or FAIL with reason and remedy; exit status 1 on any FAIL.")]
pub struct CheckArgs {}

/// Arguments of `check-config`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:\n  reprotect-agent check-config --config ./agent.toml\n  \
    reprotect-agent check-config --print-default > /etc/reprotect/agent.toml")]
pub struct CheckConfigArgs {
    /// Print a configuration with every key, its default and its cost, and check nothing.
    #[arg(long)]
    pub print_default: bool,
}

/// Arguments of `enroll`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Example:\n  reprotect-agent enroll \"$(ssh target reprotect-master-target invite --role agent)\""
)]
pub struct EnrollArgs {
    /// The one-time token, or `-` to read it from standard input.
    #[arg(value_name = "TOKEN")]
    pub token: String,
}

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Start although the preflight check of this name fails; may be repeated.
    #[arg(long, value_name = "CHECK")]
    pub force: Vec<String>,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Examples:\n  reprotect-agent status\n  reprotect-agent status --watch\n  reprotect-agent status --json"
)]
pub struct StatusArgs {
    /// Keep showing it until interrupted.
    #[arg(long)]
    pub watch: bool,
}

/// Arguments of `mark`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Reads what changed on every protected disk (all of it where a disk is scanned) and waits until the point is durable\n\
    at the master target. Where all disks are followed it is crash-consistent; where one is scanned it is fuzzy, no consistent state.\n\
    With --freeze the file systems are clean at the point; programs that write to them wait for milliseconds where all disks\n\
    are followed, else while the rest is read. With --app the hooks bring applications to rest before and let them go on after.\n\n\
    Examples:\n  reprotect-agent mark --freeze --name before-upgrade\n  reprotect-agent mark --app"
)]
pub struct MarkArgs {
    /// Name of the point, shown by `reprotect-master-target points`.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub name: String,
    /// Freeze the file systems mounted from the protected disks at the point.
    #[arg(long)]
    pub freeze: bool,
    /// Thaw after this long in any case; the point is not made then.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub freeze_limit: DurationText,
    /// An application-consistent point, by the hooks of the configuration and a freeze.
    #[arg(long)]
    pub app: bool,
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
