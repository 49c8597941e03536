//! What the kernel says of a disk: its identity, whether it can be followed, and its own account of I/O.
//!
//! Invariants: only attributes of `/sys/block` are read; a device that is not the lowest whole disk is refused with the
//! reason. Units: sectors of 512 bytes. Called by `tracker`, `oracle` and `window`.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use reprotect_engine::units::SectorCount;
use serde::{Deserialize, Serialize};

use super::CaptureError;

/// A whole disk that can be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDisk {
    /// The kernel's name, `sda`.
    pub name: String,
    /// The device node it was found by.
    pub path: PathBuf,
    /// Major and minor number.
    pub number: (u32, u32),
    /// Size.
    pub size: SectorCount,
    /// Number that the kernel gives to each disk that appears, never again in this boot; 0 before Linux 5.15.
    pub sequence: u64,
    /// Whether it takes requests (nearly all do), or bios directly.
    pub takes_requests: bool,
    dir: PathBuf,
}

/// The kernel's account of a disk since it appeared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Sectors written, zeros included.
    pub written: u64,
    /// Sectors discarded.
    pub discarded: u64,
}

impl BlockDisk {
    /// Looks at the device and refuses what cannot be followed.
    ///
    /// # Errors
    /// [`CaptureError::Unsupported`], [`CaptureError::NotCounting`], [`CaptureError::File`].
    pub fn at(path: &Path) -> Result<Self, CaptureError> {
        let meta = fs::metadata(path).map_err(CaptureError::file(path))?;
        let refused = |reason: &str| CaptureError::Unsupported {
            disk: path.display().to_string(),
            reason: reason.to_owned(),
        };
        if !meta.file_type().is_block_device() {
            return Err(refused("it is no block device; protect it in mode `scan`"));
        }
        let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let link = PathBuf::from(format!("/sys/dev/block/{}:{}", number.0, number.1));
        let dir = fs::canonicalize(&link).map_err(CaptureError::file(link))?;
        if dir.join("partition").exists() {
            return Err(refused("it is a partition; name its whole disk"));
        }
        if dir.join("dm").exists() {
            return Err(refused(
                "it is a mapped device; name the disks below it, whose capture sees its writes too",
            ));
        }
        // Its requests are those of its paths, which are hidden disks of other numbers: no completion would be seen.
        if dir.starts_with("/sys/devices/virtual/nvme-subsystem") {
            return Err(refused(
                "it is the head of an NVMe multipath, whose paths write for it; boot with nvme_core.multipath=N where it has one path, or protect it in mode `scan`",
            ));
        }
        let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let disk = Self {
            size: SectorCount(number_in(&dir.join("size"))?),
            sequence: number_in(&dir.join("diskseq")).unwrap_or(0),
            takes_requests: dir.join("mq").exists(),
            name,
            path: path.to_owned(),
            number,
            dir,
        };
        if disk.size.0 == 0 {
            return Err(refused("it has no medium"));
        }
        if number_in(&disk.dir.join("ro"))? != 0 {
            return Err(refused("it is read-only, so nothing changes; protect it in mode `scan`"));
        }
        disk.check_counting()?;
        Ok(disk)
    }

    /// The programs' number of the device.
    pub(crate) const fn key(&self) -> u32 {
        self.number.0 << 20 | self.number.1
    }

    /// Whether the kernel keeps its account.
    ///
    /// # Errors
    /// [`CaptureError::NotCounting`].
    pub fn check_counting(&self) -> Result<(), CaptureError> {
        if number_in(&self.dir.join("queue/iostats")).unwrap_or(1) == 0 {
            return Err(CaptureError::NotCounting { disk: self.name.clone() });
        }
        Ok(())
    }

    /// Its size now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn current_size(&self) -> Result<SectorCount, CaptureError> {
        Ok(SectorCount(number_in(&self.dir.join("size"))?))
    }

    /// The kernel's account.
    ///
    /// # Errors
    /// When the disk is gone.
    pub fn account(&self) -> Result<Account, CaptureError> {
        let path = self.dir.join("stat");
        let fields = numbers_in(&path)?;
        // Documented order: reads, merges, sectors, ms; writes, merges, sectors, ms; in flight, 2 × ms; discards, merges, sectors.
        let field = |at: usize| fields.get(at).copied().unwrap_or(0);
        Ok(Account { written: field(6), discarded: field(13) })
    }

    /// Writes that the kernel has given to the device and not got back.
    ///
    /// # Errors
    /// When the disk is gone.
    pub fn writes_in_flight(&self) -> Result<u64, CaptureError> {
        Ok(numbers_in(&self.dir.join("inflight"))?.get(1).copied().unwrap_or(0))
    }
}

fn text_of(path: &Path) -> Result<String, CaptureError> {
    fs::read_to_string(path).map_err(CaptureError::file(path))
}

fn numbers_in(path: &Path) -> Result<Vec<u64>, CaptureError> {
    Ok(text_of(path)?.split_ascii_whitespace().map(|word| word.parse().unwrap_or(0)).collect())
}

fn number_in(path: &Path) -> Result<u64, CaptureError> {
    let text = text_of(path)?;
    text.trim().parse().map_err(|error| CaptureError::File {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, format!("`{}`: {error}", text.trim())),
    })
}

/// Identity of this boot.
///
/// # Errors
/// When procfs is not there.
pub(crate) fn boot_id() -> Result<String, CaptureError> {
    Ok(text_of(Path::new("/proc/sys/kernel/random/boot_id"))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_is_refused_with_what_to_do() {
        let error = BlockDisk::at(Path::new("/dev/null")).unwrap_err().to_string();
        assert!(error.contains("/dev/null") && error.contains("scan"), "{error}");
        let error = BlockDisk::at(Path::new("/dev/not-there")).unwrap_err().to_string();
        assert!(error.contains("/dev/not-there"), "{error}");
    }
}
