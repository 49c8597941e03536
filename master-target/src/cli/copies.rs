//! Arguments of the commands that read a retention folder without a master target, and of those that copy and verify
//! points with one.
//!
//! Invariants: as in `cli`. Used by `commands::journal` and `commands::copies`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::DiskPath;

/// How a copy is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CopyFormat {
    /// VMDK: one descriptor and one flat file.
    Flat,
    /// VMDK: one file that grows.
    Sparse,
    /// VMDK: one compressed file for upload (streamOptimized).
    Stream,
    /// The plain sectors.
    Raw,
}

/// Arguments of `export`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Replication goes on meanwhile. Nothing that exists is overwritten; a copy that is not finished is removed.\n\n\
    Examples:\n  reprotect-master-target export web1:sda newest --format stream -o /export/web1.vmdk\n  \
    reprotect-master-target export web1 before-update --format flat -o /export/web1"
)]
pub struct ExportArgs {
    /// MACHINE:DISK, the disk's UUID, the path of its target; or a machine, for all its disks.
    #[arg(value_name = "MACHINE|DISK")]
    pub what: String,
    /// A point as `points` shows it, its name, or `newest`.
    #[arg(value_name = "POINT")]
    pub point: String,
    /// How the copy is stored.
    #[arg(long, value_enum)]
    pub format: CopyFormat,
    /// The new file on the master target; of a machine, a folder for one file per disk.
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
    /// Also a point that is known to be damaged: the copy ends where it cannot be read.
    #[arg(long)]
    pub accept_damage: bool,
}

/// Arguments of `verify`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Reads every block of the point and checks what has a checksum. Exit status 1 when something is damaged.\n\n\
    Examples:\n  reprotect-master-target verify web1:sda 3.152\n  reprotect-master-target verify web1:sda all"
)]
pub struct VerifyArgs {
    /// MACHINE:DISK, the disk's UUID, or the path of its target.
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// A point as `points` shows it, its name, `newest` or `all`.
    #[arg(value_name = "POINT")]
    pub point: String,
}

/// Arguments of `journal`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Reads a retention folder without a master target; nothing is written, read-only media will do."
)]
pub struct JournalArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: JournalCommand,
}

/// What can be done with a retention folder alone.
#[derive(Clone, Debug, Subcommand)]
pub enum JournalCommand {
    /// List disks and points, and which of them can be had.
    List(JournalListArgs),
    /// Check every byte that has a checksum; exit status 1 when something is damaged.
    Verify(JournalVerifyArgs),
    /// Show what is in the files: superblock, edits, groups, entries, undo runs.
    Dump(JournalDumpArgs),
    /// Copy a point out of the folder and the target's files.
    Extract(JournalExtractArgs),
}

/// Arguments of `journal list`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  reprotect-master-target journal list /retention")]
pub struct JournalListArgs {
    /// The retention folder.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Read while a master target has the folder open; what it writes meanwhile may look torn.
    #[arg(long)]
    pub beside: bool,
}

/// Arguments of `journal verify`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Example:\n  reprotect-master-target journal verify /retention --target 8c0a…=/vmfs/volumes/ds1/web1/web1.vmdk"
)]
pub struct JournalVerifyArgs {
    /// The retention folder.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Read the newest state of this disk, too, with its target; may be repeated.
    #[arg(long, value_name = "DISK=PATH")]
    pub target: Vec<DiskPath>,
}

/// Arguments of `journal dump`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Example:\n  reprotect-master-target journal dump /retention --segment 12 --limit 100"
)]
pub struct JournalDumpArgs {
    /// The retention folder.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Only what concerns this disk.
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// Only this segment of the redo log.
    #[arg(long, value_name = "NUMBER")]
    pub segment: Option<u64>,
    /// Lines of each kind that are shown; the rest is counted.
    #[arg(long, value_name = "LINES", default_value_t = 200)]
    pub limit: usize,
    /// Read while a master target has the folder open; what it writes meanwhile may look torn.
    #[arg(long)]
    pub beside: bool,
}

/// Arguments of `journal extract`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Example:\n  reprotect-master-target journal extract /retention --disk 8c0a… --point newest \\\n    \
    --target /vmfs/volumes/ds1/web1/web1.vmdk --format stream -o /export/web1.vmdk"
)]
pub struct JournalExtractArgs {
    /// The retention folder.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// UUID of the disk as `journal list` shows it; its beginning will do.
    #[arg(long, value_name = "DISK")]
    pub disk: String,
    /// A point as `journal list` shows it, its name, or `newest` for everything the journal holds.
    #[arg(long, value_name = "POINT")]
    pub point: String,
    /// The disk's target: its VMDK or device.
    #[arg(long, value_name = "PATH")]
    pub target: PathBuf,
    /// Copy also what is not on the target as the master target wrote it.
    #[arg(long)]
    pub accept_damage: bool,
    /// How the copy is stored.
    #[arg(long, value_enum)]
    pub format: CopyFormat,
    /// The new file.
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
}
