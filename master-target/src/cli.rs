//! The command line of `reprotect-master-target`.
//!
//! Invariants: few options, everything else is in the configuration; each command's arguments are one struct, so that
//! a command is a function of it. Exit status: 0 done, 1 failed, 2 wrong command line or configuration.
//! Called by `main`.

pub mod copies;
pub mod failback;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::values::DurationText;

/// Receives replicated disks and writes them into VMDKs or attached disks.
#[derive(Debug, Parser)]
#[command(
    name = "reprotect-master-target",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong command line or configuration.\n\n\
        Examples:\n  \
        reprotect-master-target invite --role agent\n  \
        reprotect-master-target protect web1 --datastore /vmfs/volumes/ds1/web1 --format flat\n  \
        reprotect-master-target status --watch"
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
    /// Configuration file [default: /etc/reprotect/master-target.toml, or master-target.toml in --state-dir].
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
    /// Check that this machine is ready: datastores, permissions, ports, clock.
    Check(CheckArgs),
    /// Check the configuration file, or print a commented default.
    CheckConfig(CheckConfigArgs),
    /// Print a one-time token with which an agent or a process server enrols.
    Invite(InviteArgs),
    /// Refuse a peer from now on.
    Revoke(RevokeArgs),
    /// List the enrolled machines and their disks.
    Machines(MachinesArgs),
    /// Begin replicating a machine's disks to existing disks or into new ones.
    Protect(ProtectArgs),
    /// Stop replicating a disk; its target stays as it is.
    Unprotect(UnprotectArgs),
    /// Show or change by what policy a machine's agent works.
    Policy(PolicyArgs),
    /// List the recovery points of a machine or disk, and what is mounted.
    Points(PointsArgs),
    /// Draw what can be had of a machine or disk: every write, points only, degraded, damaged, lost.
    Timeline(TimelineArgs),
    /// List the receipts of passes over whole disks: why, what was compared and moved, and what points are left.
    Receipts(ReceiptsArgs),
    /// Keep a point until `unpin`, and give it a name.
    Pin(PinArgs),
    /// Let a pinned point go its way again.
    Unpin(UnpinArgs),
    /// Show or change how long points are kept, and how far the drive reaches.
    Retention(RetentionArgs),
    /// Serve a disk as it was at a point over NBD, while replication goes on.
    Mount(MountArgs),
    /// End a mount.
    Unmount(UnmountArgs),
    /// Take a target back to a point, in place; what it held stays a point.
    Rollback(RollbackArgs),
    /// Hand a machine's disks over to its virtual machine, or take them again.
    Failback(failback::FailbackArgs),
    /// Copy a point into a VMDK of its own, while replication goes on.
    Export(copies::ExportArgs),
    /// Read a point to its last block and say what is damaged.
    Verify(copies::VerifyArgs),
    /// List, verify, dump and extract from a retention folder, without a master target.
    Journal(copies::JournalArgs),
    /// Show machines, progress and health.
    Status(StatusArgs),
    /// Describe a VMDK or attached disk: format, size, extents, locks, what is on it.
    Inspect(InspectArgs),
}

/// Arguments of `check-config`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:\n  reprotect-master-target check-config --config ./master-target.toml\n  \
    reprotect-master-target check-config --print-default > /etc/reprotect/master-target.toml")]
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

/// Who may enrol with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InviteRole {
    /// A machine to protect.
    Agent,
    /// A relay.
    ProcessServer,
}

/// Arguments of `invite`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The token is secret and works once.\n\nExamples:\n  reprotect-master-target invite --role agent\n  \
    reprotect-master-target invite --role process-server --valid 1h"
)]
pub struct InviteArgs {
    /// Who may enrol with it.
    #[arg(long, value_enum)]
    pub role: InviteRole,
    /// How long it is valid.
    #[arg(long, value_name = "DURATION", default_value = "15m")]
    pub valid: DurationText,
}

/// Arguments of `revoke`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target revoke web1")]
pub struct RevokeArgs {
    /// Name or UUID of the machine or process server (`machines` lists them).
    #[arg(value_name = "PEER")]
    pub peer: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Arguments of `machines`.
#[derive(Clone, Debug, Args)]
pub struct MachinesArgs {}

/// How a new disk is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    /// One descriptor and one flat file, as desktop products write it.
    #[default]
    Flat,
    /// One descriptor and one flat file, as ESXi keeps it on a datastore.
    Vmfs,
    /// Flat extents of at most 2 GB.
    #[value(name = "2gb-flat")]
    TwoGbFlat,
    /// One file that grows.
    Sparse,
    /// Growing extents of at most 2 GB.
    #[value(name = "2gb-sparse")]
    TwoGbSparse,
}

/// One `DISK=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPath {
    /// The machine's disk: its name or UUID as `machines` shows it.
    pub disk: String,
    /// The VMDK or attached disk to write.
    pub path: PathBuf,
}

impl FromStr for DiskPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((disk, path)) if !disk.is_empty() && !path.is_empty() => {
                Ok(Self { disk: disk.to_owned(), path: PathBuf::from(path) })
            }
            _ => Err("write DISK=PATH, for example sda=/vmfs/volumes/ds1/web1/web1.vmdk".to_owned()),
        }
    }
}

/// Arguments of `protect`.
#[derive(Clone, Debug, Args)]
#[command(
    group(ArgGroup::new("where").required(true).args(["original", "original_from", "datastore"])),
    after_help = "Existing disks are compared and only differences travel; nothing unmatched is overwritten without --yes.\n\n\
    Examples:\n  \
    reprotect-master-target protect web1 --original sda=/vmfs/volumes/ds1/web1/web1.vmdk\n  \
    reprotect-master-target protect web1 --original-from /vmfs/volumes/ds1/web1\n  \
    reprotect-master-target protect web1 --datastore /vmfs/volumes/ds1/web1 --format vmfs"
)]
pub struct ProtectArgs {
    /// Name or UUID of the machine (`machines` lists them).
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// Write this disk of the machine to this existing VMDK or attached disk; may be repeated.
    #[arg(long, value_name = "DISK=PATH")]
    pub original: Vec<DiskPath>,
    /// Propose the VMDKs in this directory by size and content; ambiguity is refused.
    #[arg(long, value_name = "DIR")]
    pub original_from: Option<PathBuf>,
    /// Create new disks in this directory.
    #[arg(long, value_name = "PATH")]
    pub datastore: Option<PathBuf>,
    /// How new disks are stored.
    #[arg(long, value_enum, default_value_t, requires = "datastore")]
    pub format: DiskFormat,
    /// Overwrite what does not match, without asking.
    #[arg(long)]
    pub yes: bool,
}

/// Arguments of `unprotect`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target unprotect web1:sda")]
pub struct UnprotectArgs {
    /// MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Arguments of `policy`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Without an option it shows the policy in force. A connected agent takes a change over at once, another one when\n\
    it connects; it keeps the policy while it is away.\n\nExample:\n  reprotect-master-target policy web1 --points-every 5m"
)]
pub struct PolicyArgs {
    /// The machine's name or its agent's UUID.
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// Pause between two rounds of each disk.
    #[arg(long, value_name = "DURATION", conflicts_with = "agents_own")]
    pub points_every: Option<DurationText>,
    /// Pause between two points for which applications are brought to rest; 0s for never.
    #[arg(long, value_name = "DURATION", conflicts_with = "agents_own")]
    pub app_every: Option<DurationText>,
    /// Let the agent work by its own configuration again.
    #[arg(long)]
    pub agents_own: bool,
}

/// Arguments of `points`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "A fuzzy point holds blocks of different times: it is no consistent state.\n\n\
    Examples:\n  reprotect-master-target points web1\n  reprotect-master-target points web1:sda --all")]
pub struct PointsArgs {
    /// MACHINE, MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// Fuzzy points, too.
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `timeline`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target timeline web1")]
pub struct TimelineArgs {
    /// MACHINE, MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
}

/// Arguments of `receipts`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target receipts web1")]
pub struct ReceiptsArgs {
    /// MACHINE, MACHINE:DISK, the disk's UUID, or the path of its target; all without it.
    #[arg(value_name = "DISK")]
    pub disk: Option<String>,
}

/// Arguments of `pin`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target pin web1 5f3a90c1 --name before-upgrade")]
pub struct PinArgs {
    /// MACHINE, MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// A point as `points` shows it, its name, `newest`, or a time.
    #[arg(value_name = "POINT")]
    pub point: String,
    /// Its name from now on.
    #[arg(long, value_name = "NAME", value_parser = point_name)]
    pub name: Option<String>,
}

/// Arguments of `unpin`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target unpin web1 before-upgrade")]
pub struct UnpinArgs {
    /// MACHINE, MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// A point as `points` shows it, or its name.
    #[arg(value_name = "POINT")]
    pub point: String,
}

/// Arguments of `retention`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Without options it shows what is kept. Changes take effect at once and outlive a restart.\n\n\
    Examples:\n  reprotect-master-target retention\n  \
    reprotect-master-target retention --keep 7d --rung \"1h until 24h\" --rung \"4h until 7d\""
)]
pub struct RetentionArgs {
    /// Keep every write, where they were ordered, this long.
    #[arg(long, value_name = "DURATION")]
    pub any_write: Option<String>,
    /// Keep the end of every undo epoch this long.
    #[arg(long, value_name = "DURATION")]
    pub every_epoch: Option<String>,
    /// Beyond that, one point in each such stretch until that age: "EVERY until AGE"; may be repeated.
    #[arg(long = "rung", value_name = "RUNG")]
    pub rungs: Vec<String>,
    /// Keep no point longer than this.
    #[arg(long, value_name = "DURATION")]
    pub keep: Option<String>,
    /// When the drive fills up, take younger points last.
    #[arg(long, value_name = "DURATION")]
    pub guaranteed: Option<String>,
    /// Back to what the configuration says.
    #[arg(long)]
    pub reset: bool,
}

/// A name that is not mistaken for anything else one may write for a point.
fn point_name(text: &str) -> Result<String, String> {
    let reserved =
        ["newest", "newest-app"].contains(&text) || text.starts_with("seq:") || text.starts_with('@');
    if text.is_empty() || text.len() > 60 || reserved || text.chars().any(char::is_control) {
        return Err(
            "write 1 to 60 characters, no \"newest\", and nothing that begins with @ or seq:".to_owned()
        );
    }
    Ok(text.to_owned())
}

/// Arguments of `mount`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Prints the address; `nbdinfo`, `nbdcopy`, `qemu-img` and `nbdfuse` take it.\n\n\
    Examples:\n  reprotect-master-target mount web1:sda newest\n  \
    reprotect-master-target mount web1 @2026-11-23T14:05:00Z --writable\n  \
    qemu-img convert \"$(reprotect-master-target mount web1:sda 3.152)\" point.raw")]
pub struct MountArgs {
    /// MACHINE (all its disks), MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// A point as `points` shows it, its name, `newest`, `newest-app`, `@TIME`, `@-5m`, or `seq:N`.
    #[arg(value_name = "POINT")]
    pub point: String,
    /// Let clients write; what they write is thrown away with the mount.
    #[arg(long)]
    pub writable: bool,
    /// Also a point that is known to be damaged: what is damaged cannot be read.
    #[arg(long)]
    pub accept_damage: bool,
}

/// Arguments of `unmount`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target unmount 1f04a9c2")]
pub struct UnmountArgs {
    /// The mount's name as `points` shows it.
    #[arg(value_name = "MOUNT")]
    pub id: String,
}

/// Arguments of `rollback`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The agent must not be connected. Afterwards the disk is held: roll it forward (its newest point is called\n\
    before-rollback-N), or power the machine on from it.\n\nExample:\n  reprotect-master-target rollback web1:sda 3.152"
)]
pub struct RollbackArgs {
    /// MACHINE (all its disks), MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// As for `mount`.
    #[arg(value_name = "POINT")]
    pub point: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    /// Also to a point that is known to be damaged: go back as far as it can be read; the disk stays held where it cannot.
    #[arg(long)]
    pub accept_damage: bool,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Examples:\n  reprotect-master-target status\n  reprotect-master-target status --watch"
)]
pub struct StatusArgs {
    /// Keep showing it until interrupted.
    #[arg(long)]
    pub watch: bool,
}

/// Arguments of `inspect`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target inspect /vmfs/volumes/ds1/web1/web1.vmdk")]
pub struct InspectArgs {
    /// A VMDK descriptor, a sparse VMDK, a raw image or a block device.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn parses(line: &str) -> Result<Cli, clap::error::ErrorKind> {
        Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())
    }

    #[test]
    fn protect_takes_exactly_one_place() {
        use clap::error::ErrorKind;
        let protect = "reprotect-master-target protect web1";
        assert_eq!(parses(protect).unwrap_err(), ErrorKind::MissingRequiredArgument);
        let both = format!("{protect} --original-from /a --datastore /b");
        assert_eq!(parses(&both).unwrap_err(), ErrorKind::ArgumentConflict);
        assert_eq!(parses(&format!("{protect} --original sda")).unwrap_err(), ErrorKind::ValueValidation);
        let Command::Protect(args) =
            parses(&format!("{protect} --original sda=/a.vmdk --original sdb=/b.vmdk")).unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!(args.original[1], DiskPath { disk: "sdb".to_owned(), path: "/b.vmdk".into() });
        let Command::Protect(args) =
            parses(&format!("{protect} --datastore /ds --format 2gb-sparse")).unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!(args.format, DiskFormat::TwoGbSparse);
    }

    #[test]
    fn tokens_are_valid_for_a_quarter_of_an_hour_unless_said_otherwise() {
        let valid = |line: &str| match parses(line).unwrap().command {
            Command::Invite(args) => args.valid.0.as_secs(),
            _ => panic!("another command"),
        };
        assert_eq!(valid("reprotect-master-target invite --role agent"), 900);
        assert_eq!(valid("reprotect-master-target invite --role process-server --valid 1h"), 3600);
        assert!(parses("reprotect-master-target invite --role agent --valid 5").is_err());
    }
}
