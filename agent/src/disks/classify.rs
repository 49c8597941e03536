//! What a block device is, and whether it is protected by default.
//!
//! Invariants: the first rule that holds decides, and they stand in the order "cannot be protected at all", "another
//! device is the right one", "its content is not worth it"; what no rule excludes is selected. The reason is a
//! sentence an operator can act upon. Called by [`super::enumerate`]; [`super::select`] applies the operator's wishes.

use reprotect_engine::limits::DISK_BYTES_MAX;
use serde::Serialize;

use super::Disk;
use super::azure::Facts;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// An ordinary disk.
    Disk,
    /// A multipath device: protected in place of its paths.
    Multipath,
    /// One path of a multipath device.
    MultipathPath,
    /// Azure's temporary disk.
    AzureTemporary,
    /// Used as swap and for nothing else.
    Swap,
    /// A removable medium.
    Removable,
    /// CD or DVD.
    Optical,
    /// zram, ram or pmem-like memory that ends with the machine.
    Ram,
    /// A loop device.
    Loop,
    /// LVM, crypt or another device-mapper device: the disks below it are protected.
    DeviceMapper,
    /// Software RAID: its members are protected.
    SoftwareRaid,
    /// Writes are refused by the kernel.
    ReadOnly,
    /// No medium, size 0.
    Empty,
    /// Larger than any target can hold.
    TooLarge,
}

impl Class {
    /// Whether an operator may include such a device although it is not selected by default.
    #[must_use]
    pub const fn may_be_included(self) -> bool {
        !matches!(self, Self::Optical | Self::Ram | Self::Empty | Self::TooLarge | Self::MultipathPath)
    }
}

/// What was decided about a device, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What it is.
    pub class: Class,
    /// Whether it is protected unless the operator says otherwise.
    pub selected: bool,
    /// Why.
    pub reason: String,
}

fn selected(class: Class, reason: impl Into<String>) -> Verdict {
    Verdict { class, selected: true, reason: reason.into() }
}

fn excluded(class: Class, reason: impl Into<String>) -> Verdict {
    Verdict { class, selected: false, reason: reason.into() }
}

/// The verdict on `disk`, one of `all`.
pub(super) fn verdict(disk: &Disk, all: &[Disk], azure: &Facts) -> Verdict {
    impossible(disk)
        .or_else(|| layered(disk, all))
        .or_else(|| not_worth_it(disk, azure))
        .unwrap_or_else(|| selected(Class::Disk, describe_use(disk)))
}

/// Devices that cannot be protected at all.
fn impossible(disk: &Disk) -> Option<Verdict> {
    let name = disk.name.as_str();
    if disk.verdict.class == Class::Optical || numbered(name, "sr") {
        Some(excluded(Class::Optical, "a CD or DVD drive"))
    } else if numbered(name, "zram") || numbered(name, "ram") {
        Some(excluded(Class::Ram, "memory: its content ends with the machine"))
    } else if disk.bytes == 0 {
        Some(excluded(Class::Empty, "no medium, size 0"))
    } else if disk.bytes > DISK_BYTES_MAX {
        Some(excluded(Class::TooLarge, "larger than a target can hold"))
    } else {
        None
    }
}

/// Devices made of others, where one of the two is the right one to protect.
fn layered(disk: &Disk, all: &[Disk]) -> Option<Verdict> {
    let is_multipath = |disk: &Disk| disk.mapper.as_ref().is_some_and(|m| m.uuid.starts_with("mpath-"));
    let members =
        if disk.members.is_empty() { "the disks below it".to_owned() } else { disk.members.join(", ") };
    if is_multipath(disk) {
        return Some(selected(Class::Multipath, format!("multipath over {members}")));
    }
    if let Some(mapper) = &disk.mapper {
        let maker = mapper.uuid.split_once('-').map_or("device-mapper", |(maker, _)| maker);
        return Some(excluded(Class::DeviceMapper, format!("{maker} device: protect {members}")));
    }
    if numbered(&disk.name, "md") || disk.name.starts_with("md_") {
        return Some(excluded(Class::SoftwareRaid, format!("software RAID: protect {members}")));
    }
    let head = all.iter().find(|other| is_multipath(other) && other.members.contains(&disk.name))?;
    Some(excluded(Class::MultipathPath, format!("one path of {}: protect that", head.path.display())))
}

/// Devices that could be protected and by default are not.
fn not_worth_it(disk: &Disk, azure: &Facts) -> Option<Verdict> {
    if let Some(fact) = azure.temporary(disk) {
        return Some(excluded(Class::AzureTemporary, format!("Azure temporary disk ({fact})")));
    }
    if numbered(&disk.name, "loop") {
        let file =
            disk.backing_file.as_ref().map_or_else(|| "a file".to_owned(), |f| f.display().to_string());
        return Some(if disk.read_only {
            excluded(Class::ReadOnly, format!("read-only loop device over {file}"))
        } else if disk.partitions.is_empty() {
            excluded(Class::Loop, format!("loop device without partitions over {file}; include it by name"))
        } else {
            selected(Class::Loop, format!("loop device with partitions over {file}"))
        });
    }
    if disk.removable {
        return Some(excluded(Class::Removable, "removable"));
    }
    if disk.read_only {
        return Some(excluded(Class::ReadOnly, "read-only"));
    }
    is_swap_only(disk).then(|| excluded(Class::Swap, "used as swap and for nothing else"))
}

/// Whether the whole disk is swap, or every partition of it is.
fn is_swap_only(disk: &Disk) -> bool {
    let is_swap = |name: &String| disk.swap.contains(name);
    let all_partitions =
        !disk.partitions.is_empty() && disk.partitions.iter().all(|part| is_swap(&part.name));
    disk.mounts.is_empty() && (is_swap(&disk.name) || all_partitions)
}

fn describe_use(disk: &Disk) -> String {
    if disk.mounts.iter().any(|mount| mount.mount_point == "/") {
        "holds the root file system".to_owned()
    } else if !disk.mounts.is_empty() {
        "holds mounted file systems".to_owned()
    } else if !disk.holders.is_empty() {
        format!("carries {}", disk.holders.join(", "))
    } else {
        "a disk without mounted file systems".to_owned()
    }
}

/// Whether `name` is `prefix` and a number.
fn numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}
