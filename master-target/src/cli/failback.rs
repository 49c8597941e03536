//! Arguments of `failback`.
//!
//! Invariants: as in `cli`. Used by `commands::failback`.

use clap::{Args, ValueEnum};

/// How much of a target is read again before it is released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum VerifyArg {
    /// Every block.
    Whole,
    /// One in 64, and 64 MiB at least.
    #[default]
    Sample,
    /// Nothing.
    None,
}

/// Arguments of `failback`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Stop what writes on the machine first. Its disks are read a last time, the agent is fenced, everything is written to\n\
    the targets, they are read again, closed and released. Interrupted, the same command goes on where it was. No point is lost.\n\n\
    Examples:\n  reprotect-master-target failback web1 --dry-run\n  reprotect-master-target failback web1 --verify whole\n  \
    reprotect-master-target failback web1 --point before-update\n  reprotect-master-target failback --undo web1"
)]
pub struct FailbackArgs {
    /// Name or UUID of the machine (`machines` lists them).
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// The point to go home with, as for `mount` [default: a last mark, made now].
    #[arg(long, value_name = "POINT")]
    pub point: Option<String>,
    /// Also with a point that is known to be damaged: it ends where the point cannot be read.
    #[arg(long, requires = "point")]
    pub accept_damage: bool,
    /// How much of the targets is read again before they are released.
    #[arg(long, value_enum, default_value_t)]
    pub verify: VerifyArg,
    /// The source is gone: go home with the newest consistent point, or the newest there is.
    #[arg(long)]
    pub source_already_off: bool,
    /// Do not ask, and release also what is not as it was written.
    #[arg(long)]
    pub yes: bool,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Take the disks again: they are opened, and compared with the machine as before a first sync.
    #[arg(long, conflicts_with_all = ["point", "source_already_off", "dry_run"])]
    pub undo: bool,
}
