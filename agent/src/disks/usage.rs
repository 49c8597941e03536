//! Who uses a disk: mounts and swap, also through partitions, LVM, md, multipath and crypt devices.
//!
//! Invariants: a mount is attributed by the kernel's device number first and by its source path second (btrfs and
//! others have device numbers of their own); a device that several disks carry is attributed to each of them.
//! Lines that do not parse are skipped. Called by [`super::enumerate`].

use std::collections::BTreeMap;
use std::fs;

use super::{Disk, DisksError, Mount, SystemRoot};

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountLine {
    device_number: String,
    mount_point: String,
    file_system: String,
    source: String,
}

/// Adds mounts and swap to the disks that carry them.
pub(super) fn attribute(root: &SystemRoot, disks: &mut [Disk]) -> Result<(), DisksError> {
    let path = root.join("proc/self/mountinfo");
    let text = fs::read(&path).map_err(|source| DisksError { path, source })?;
    let mounts = parse_mountinfo(&String::from_utf8_lossy(&text));
    // A kernel without swap support has no such file.
    let swaps = fs::read(root.join("proc/swaps")).unwrap_or_default();
    let swaps = parse_swaps(&String::from_utf8_lossy(&swaps));

    let numbers = device_numbers(disks);
    let name_of_mount = |mount: &MountLine| {
        let by_number = numbers.get(&mount.device_number).cloned();
        by_number.or_else(|| mount.source.starts_with("/dev/").then(|| root.device_name(&mount.source))?)
    };
    let mounts: Vec<(String, MountLine)> =
        mounts.into_iter().filter_map(|mount| Some((name_of_mount(&mount)?, mount))).collect();
    let swaps: Vec<String> = swaps.iter().filter_map(|path| root.device_name(path)).collect();

    let carried: Vec<Vec<String>> = disks.iter().map(|disk| names_on(disk, disks)).collect();
    for (disk, names) in disks.iter_mut().zip(carried) {
        for (device, mount) in mounts.iter().filter(|(device, _)| names.contains(device)) {
            let mount = Mount {
                mount_point: mount.mount_point.clone(),
                file_system: mount.file_system.clone(),
                device: device.clone(),
            };
            if !disk.mounts.contains(&mount) {
                disk.mounts.push(mount);
            }
        }
        disk.swap = swaps.iter().filter(|device| names.contains(device)).cloned().collect();
    }
    Ok(())
}

/// `major:minor` of every device and partition, with its name.
fn device_numbers(disks: &[Disk]) -> BTreeMap<String, String> {
    let mut numbers = BTreeMap::new();
    for disk in disks {
        numbers.insert(disk.device_number.clone(), disk.name.clone());
        for partition in &disk.partitions {
            numbers.insert(partition.device_number.clone(), partition.name.clone());
        }
    }
    numbers
}

/// The disk, its partitions, and everything built upon them with its partitions.
fn names_on(disk: &Disk, disks: &[Disk]) -> Vec<String> {
    let mut names = Vec::new();
    let upon = disks.iter().filter(|other| other.name == disk.name || disk.holders.contains(&other.name));
    for device in upon {
        names.push(device.name.clone());
        names.extend(device.partitions.iter().map(|partition| partition.name.clone()));
    }
    names
}

fn parse_mountinfo(text: &str) -> Vec<MountLine> {
    text.lines()
        .filter_map(|line| {
            // id parent major:minor root mount-point options [optional …] - type source super-options
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ');
            let device_number = left.nth(2)?.to_owned();
            let mount_point = unescape(left.nth(1)?);
            let mut right = right.split(' ');
            let file_system = right.next()?.to_owned();
            let source = unescape(right.next()?);
            Some(MountLine { device_number, mount_point, file_system, source })
        })
        .collect()
}

/// Paths of swap devices and files; the first line is the head.
fn parse_swaps(text: &str) -> Vec<String> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let path = words.next()?;
            (words.next()? == "partition").then(|| unescape(path))
        })
        .collect()
}

/// Undoes the kernel's octal escapes (`\040` is a space).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mount_lines_with_optional_fields_and_escapes_are_read() {
        let text = "36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                    garbage\n22 27 0:21 / /proc rw - proc proc rw\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].device_number, "98:0");
        assert_eq!(mounts[0].mount_point, "/a b");
        assert_eq!(mounts[0].source, "/dev/root");
    }

    #[test]
    fn swap_files_are_not_swap_devices() {
        let text =
            "Filename Type Size Used Priority\n/dev/sda2 partition 8 0 -2\n/swap\\040file file 8 0 -3\n";
        assert_eq!(parse_swaps(text), ["/dev/sda2"]);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in "[ -~\\\\\n\u{e9}]{0,80}") {
            let _ = parse_mountinfo(&text);
            let _ = parse_swaps(&text);
            let _ = unescape(&text);
        }
    }
}
