//! Reading block devices from `/sys/block`.
//!
//! Invariants: attributes are small texts, read with a bound; an absent or unreadable attribute is "not known", never
//! an error, because drivers differ in what they offer. sysfs sizes are in 512-byte sectors whatever the device's
//! own sector is. Called by [`super::enumerate`].

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use reprotect_engine::units::SECTOR_BYTES;

use super::{Class, Disk, DisksError, Mapper, Partition, SystemRoot, Verdict};

/// Longest attribute read; a page is what sysfs itself gives at most.
const ATTRIBUTE_BYTES_MAX: u64 = 4096;

/// The trimmed text of an attribute; `None` when absent, unreadable or empty.
pub(super) fn attribute(path: &Path) -> Option<String> {
    let bytes = attribute_bytes(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

fn attribute_bytes(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(ATTRIBUTE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn number(path: &Path) -> Option<u64> {
    attribute(path)?.parse().ok()
}

fn flag(path: &Path) -> bool {
    number(path).is_some_and(|value| value != 0)
}

/// Names in a directory, sorted; empty when there is none.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Every whole block device, by name, not yet classified and without its use.
pub(super) fn read_all(root: &SystemRoot) -> Result<Vec<Disk>, DisksError> {
    let dir = root.join("sys/block");
    if let Err(source) = fs::read_dir(&dir) {
        return Err(DisksError { path: dir, source });
    }
    let mut disks: Vec<Disk> = names(&dir)
        .iter()
        // A hidden device is one path of a native NVMe multipath disk; its visible head is listed.
        .filter(|name| !flag(&dir.join(name).join("hidden")))
        .filter_map(|name| read_one(&dir.join(name), name))
        .collect();
    for disk in &mut disks {
        disk.holders = holders_of(root, disk);
    }
    Ok(disks)
}

fn read_one(dir: &Path, name: &str) -> Option<Disk> {
    let device_number = attribute(&dir.join("dev"))?;
    let sector =
        |file: &str| number(&dir.join("queue").join(file)).and_then(|bytes| u32::try_from(bytes).ok());
    let mapper = attribute(&dir.join("dm/name"))
        .map(|name| Mapper { name, uuid: attribute(&dir.join("dm/uuid")).unwrap_or_default() });
    let path = match &mapper {
        Some(mapper) => Path::new("/dev/mapper").join(&mapper.name),
        None => Path::new("/dev").join(name.replace('!', "/")),
    };
    Some(Disk {
        name: name.to_owned(),
        path,
        device_number,
        bytes: number(&dir.join("size"))?.saturating_mul(SECTOR_BYTES),
        logical_sector_bytes: sector("logical_block_size").unwrap_or(512),
        physical_sector_bytes: sector("physical_block_size").unwrap_or(512),
        model: model(dir),
        serial: serial(dir),
        wwid: attribute(&dir.join("wwid")).or_else(|| attribute(&dir.join("device/wwid"))),
        removable: flag(&dir.join("removable")),
        read_only: flag(&dir.join("ro")),
        rotational: flag(&dir.join("queue/rotational")),
        backing_file: attribute(&dir.join("loop/backing_file")).map(PathBuf::from),
        mapper,
        partitions: partitions(dir),
        holders: Vec::new(),
        members: names(&dir.join("slaves")),
        mounts: Vec::new(),
        swap: Vec::new(),
        fingerprint: None,
        verdict: initial_verdict(dir),
    })
}

/// Optical drives say so in their SCSI type (5); everything else is judged later, with its use.
fn initial_verdict(dir: &Path) -> Verdict {
    let optical = attribute(&dir.join("device/type")).as_deref() == Some("5");
    let class = if optical { Class::Optical } else { Class::Disk };
    Verdict { class, selected: false, reason: String::new() }
}

fn model(dir: &Path) -> Option<String> {
    let vendor = attribute(&dir.join("device/vendor"));
    let model = attribute(&dir.join("device/model"));
    match (vendor, model) {
        // PCI and virtio devices give a number here, which tells nobody anything.
        (Some(vendor), Some(model)) if !vendor.starts_with("0x") => Some(format!("{vendor} {model}")),
        (_, model) => model,
    }
}

fn serial(dir: &Path) -> Option<String> {
    let plain = attribute(&dir.join("device/serial")).or_else(|| attribute(&dir.join("serial")));
    plain.or_else(|| {
        // The SCSI unit-serial-number page: four bytes of header, then text.
        let page = attribute_bytes(&dir.join("device/vpd_pg80"))?;
        let text = String::from_utf8_lossy(page.get(4..)?).trim_matches(['\0', ' ']).to_owned();
        (!text.is_empty()).then_some(text)
    })
}

fn partitions(dir: &Path) -> Vec<Partition> {
    let mut partitions: Vec<Partition> = names(dir)
        .into_iter()
        .filter_map(|name| {
            let dir = dir.join(&name);
            Some(Partition {
                number: u32::try_from(number(&dir.join("partition"))?).ok()?,
                device_number: attribute(&dir.join("dev"))?,
                start_bytes: number(&dir.join("start"))?.saturating_mul(SECTOR_BYTES),
                bytes: number(&dir.join("size"))?.saturating_mul(SECTOR_BYTES),
                label: uevent(&dir, "PARTNAME"),
                name,
            })
        })
        .collect();
    partitions.sort_by_key(|partition| (partition.start_bytes, partition.number));
    partitions
}

fn uevent(dir: &Path, key: &str) -> Option<String> {
    let text = attribute(&dir.join("uevent"))?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
}

/// Everything built upon the disk and its partitions, nearest first; a cycle (impossible to the kernel) ends.
fn holders_of(root: &SystemRoot, disk: &Disk) -> Vec<String> {
    let block = root.join("sys/block");
    let own = block.join(&disk.name);
    let mut waiting = vec![own.clone()];
    waiting.extend(disk.partitions.iter().map(|partition| own.join(&partition.name)));
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    while !waiting.is_empty() {
        let mut next = Vec::new();
        for holder in waiting.iter().flat_map(|dir| names(&dir.join("holders"))) {
            if !seen.insert(holder.clone()) {
                continue;
            }
            // A holder is a whole device and may itself carry partitions that are held.
            let dir = block.join(&holder);
            next.extend(partitions(&dir).iter().map(|partition| dir.join(&partition.name)));
            next.push(dir);
            order.push(holder);
        }
        waiting = next;
    }
    order
}
