//! The machine's block devices: what each is, what uses it, and whether it is protected by default.
//!
//! Invariants: everything is read from sysfs, procfs and symlinks below one [`SystemRoot`], so that a tree of files
//! stands in for a machine in tests; nothing is opened, nothing is written. A device that is not selected carries the
//! reason in words. Text from devices is made printable when shown. Sizes in bytes.
//! Called by the `disks` command, by enrolment and by `run` when it decides what to announce.

mod azure;
mod classify;
mod select;
mod source;
mod sysfs;
mod table;
mod usage;

use std::io;
use std::path::{Path, PathBuf};

use reprotect_engine::error::{Answer, Severity};
use serde::Serialize;

pub use classify::{Class, Verdict};
pub use select::{SelectError, is_excluded, select};
pub use source::{Source, SourceError, SourceKind};
pub use table::render;

/// The root below which `sys`, `proc` and `dev` lie: `/` on a machine, a fixture in tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemRoot(PathBuf);

impl Default for SystemRoot {
    fn default() -> Self {
        Self(PathBuf::from("/"))
    }
}

impl SystemRoot {
    /// The tree below `path`.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// `path` (absolute or not) below this root.
    #[must_use]
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The kernel's name of the device that the path `device` (below this root) leads to, through symlinks.
    fn device_name(&self, device: impl AsRef<Path>) -> Option<String> {
        let path = self.join(device);
        let target = std::fs::canonicalize(&path).unwrap_or(path);
        // sysfs writes the `/` of names such as `cciss/c0d0` as `!`.
        let below = target.strip_prefix(self.join("dev")).ok()?.to_str()?.replace('/', "!");
        Some(below)
    }
}

/// Why the devices cannot be listed.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be read: {source}; the agent needs sysfs and procfs, mounted and readable", path.display())]
pub struct DisksError {
    /// What was to be read.
    pub path: PathBuf,
    /// What the operating system said.
    pub source: io::Error,
}

impl Answer for DisksError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// A partition of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Kernel name, `sda1`.
    pub name: String,
    /// `major:minor`.
    pub device_number: String,
    /// Number in the partition table.
    pub number: u32,
    /// First byte on the disk.
    pub start_bytes: u64,
    /// Length.
    pub bytes: u64,
    /// Name in the GPT, where there is one.
    pub label: Option<String>,
}

/// A file system on the disk, or on a device built upon it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where it is mounted.
    pub mount_point: String,
    /// Its type.
    pub file_system: String,
    /// The device it is on: the disk, a partition, or an LVM, md or multipath device above them.
    pub device: String,
}

/// One whole block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Kernel name, `sda`.
    pub name: String,
    /// Device node.
    pub path: PathBuf,
    /// `major:minor`.
    pub device_number: String,
    /// Size; 0 without medium.
    pub bytes: u64,
    /// Smallest addressable unit.
    pub logical_sector_bytes: u32,
    /// Smallest unit written without a read.
    pub physical_sector_bytes: u32,
    /// Vendor and model as the device reports them.
    pub model: Option<String>,
    /// Serial number as the device reports it.
    pub serial: Option<String>,
    /// World-wide identity, where the device has one.
    pub wwid: Option<String>,
    /// Whether the medium or the device can be taken out.
    pub removable: bool,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// Whether it turns.
    pub rotational: bool,
    /// What stands behind a loop device.
    pub backing_file: Option<PathBuf>,
    /// Name and UUID of a device-mapper device.
    pub mapper: Option<Mapper>,
    /// Its partitions by position on the disk.
    pub partitions: Vec<Partition>,
    /// LVM, md, multipath or crypt devices built upon it or its partitions, nearest first.
    pub holders: Vec<String>,
    /// The devices it is built of (md and device-mapper).
    pub members: Vec<String>,
    /// File systems mounted from it.
    pub mounts: Vec<Mount>,
    /// Devices on it that are used as swap.
    pub swap: Vec<String>,
    /// Identity derived from the content (partition-table GUID); filled by whoever may open the disk.
    pub fingerprint: Option<String>,
    /// What it is, and whether it is protected by default.
    pub verdict: Verdict,
}

/// What device-mapper says of one of its devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapper {
    /// Name below `/dev/mapper`.
    pub name: String,
    /// UUID, whose prefix tells who made it (`LVM-`, `mpath-`, `CRYPT-`).
    pub uuid: String,
}

impl Disk {
    /// An identity that stays when device names change: WWID, else model and serial, else `None`.
    #[must_use]
    pub fn stable_id(&self) -> Option<String> {
        if let Some(mapper) = self.mapper.as_ref().filter(|mapper| mapper.uuid.starts_with("mpath-")) {
            return Some(mapper.uuid.clone());
        }
        match (&self.wwid, &self.serial) {
            (Some(wwid), _) => Some(wwid.clone()),
            (None, Some(serial)) => Some(format!("{}:{serial}", self.model.as_deref().unwrap_or("disk"))),
            (None, None) => None,
        }
    }

    /// Whether a listing shows it unless all are asked for: unbound loop and RAM devices are noise.
    #[must_use]
    pub fn is_worth_showing(&self) -> bool {
        !(self.verdict.class == Class::Ram || (self.bytes == 0 && self.verdict.class != Class::Optical))
    }
}

/// Every whole block device of the machine, by name, classified.
///
/// # Errors
/// When sysfs cannot be listed. A device that vanishes meanwhile is left out.
pub fn enumerate(root: &SystemRoot) -> Result<Vec<Disk>, DisksError> {
    let mut disks = sysfs::read_all(root)?;
    usage::attribute(root, &mut disks)?;
    let azure = azure::Facts::read(root);
    let verdicts: Vec<Verdict> = disks.iter().map(|disk| classify::verdict(disk, &disks, &azure)).collect();
    for (disk, verdict) in disks.iter_mut().zip(verdicts) {
        disk.verdict = verdict;
    }
    Ok(disks)
}
