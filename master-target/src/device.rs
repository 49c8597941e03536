//! Who an attached disk is: `/dev/sdX` names whatever the kernel found first, so a device target is known by more.
//!
//! Invariants: the identity comes from the device (world-wide name, serial number) or from what stands behind it (the
//! file of a loop device, the UUID of a mapping), never from its content, which replication changes; a device that
//! tells nothing has no identity and is checked by size only. Read from sysfs, a bounded amount; called by `protect`
//! when a device becomes a target and by `registry` whenever it is opened again.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Longest attribute that is read.
const ATTRIBUTE_BYTES_MAX: u64 = 1024;

/// Attributes that say who a device is, best first, relative to its folder in sysfs.
const ATTRIBUTES: [(&str, &str); 6] = [
    ("wwid", "wwid"),
    ("wwid", "device/wwid"),
    ("serial", "device/serial"),
    ("serial", "serial"),
    ("mapping", "dm/uuid"),
    ("file", "loop/backing_file"),
];

/// The identity of the device at `path`, such as `wwid:naa.6000c29…`; `None` when it tells nothing of itself.
#[must_use]
pub fn identity(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok().filter(|meta| meta.file_type().is_block_device())?;
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let folder = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition is known by its disk and its number.
    match attribute(&folder.join("partition")) {
        Some(number) => Some(format!("{} partition {number}", of_folder(folder.parent()?)?)),
        None => of_folder(&folder),
    }
}

fn of_folder(folder: &Path) -> Option<String> {
    ATTRIBUTES.iter().find_map(|(name, file)| Some(format!("{name}:{}", attribute(&folder.join(file))?)))
}

fn attribute(path: &Path) -> Option<String> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(ATTRIBUTE_BYTES_MAX).read_to_string(&mut text).ok()?;
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!text.is_empty()).then_some(text)
}

/// Checks that the device at `path` is the one that was recorded.
///
/// # Errors
/// What stands there instead, where the right one is now, and what to do.
pub fn check(path: &Path, recorded: Option<&str>) -> anyhow::Result<()> {
    let Some(recorded) = recorded else { return Ok(()) };
    let found = identity(path);
    if found.as_deref() == Some(recorded) {
        return Ok(());
    }
    let shown = path.display();
    let found = found.unwrap_or_else(|| "nothing that tells who it is".to_owned());
    let remedy = match elsewhere(recorded).as_slice() {
        [] => format!("attach the disk {recorded} again, or `unprotect` it"),
        [place] => format!(
            "the disk is now {}; attach it as {shown} again, or `unprotect` it and protect it with --original DISK={}",
            place.display(),
            place.display()
        ),
        _ => "several devices claim to be it (clones?); detach the others".to_owned(),
    };
    anyhow::bail!("{shown} is not the disk it was: it was {recorded} and is {found}; {remedy}")
}

/// Where the device with an identity is now.
fn elsewhere(recorded: &str) -> Vec<PathBuf> {
    let Ok(list) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    list.filter_map(|entry| Some(Path::new("/dev").join(entry.ok()?.file_name())))
        .filter(|path| identity(path).as_deref() == Some(recorded))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_has_no_identity_and_a_missing_one_is_refused() {
        assert_eq!(identity(Path::new("/dev/null")), None);
        assert_eq!(identity(Path::new("/nonexistent")), None);
        assert!(check(Path::new("/nonexistent"), None).is_ok(), "nothing was recorded");
        let error = check(Path::new("/nonexistent"), Some("wwid:naa.1")).expect_err("refused").to_string();
        assert!(error.contains("was wwid:naa.1") && error.contains("; attach the disk"), "{error}");
    }
}
