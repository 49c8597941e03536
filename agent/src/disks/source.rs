//! What an agent reads: a whole block device or an image file, checked before anything is opened for data.
//!
//! Invariants: a [`Source`] exists only for something of a known, non-zero size that is a multiple of 512 bytes and
//! fits a target; a partition is refused, because a disk without its partition table does not boot. Called by
//! [`super::select`], by the configuration and by tests that protect an image.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::limits::DISK_BYTES_MAX;
use reprotect_engine::units::SECTOR_BYTES;
use serde::Serialize;

use super::sysfs::attribute;
use super::{Disk, SystemRoot};

/// What stands behind a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// A whole block device (a disk, a multipath device, a loop device).
    BlockDevice,
    /// A regular file holding a disk, sector by sector.
    ImageFile,
}

/// Something an agent can read and protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// What to open.
    pub path: PathBuf,
    /// Short name for people: `sda`, or the image's file name.
    pub name: String,
    /// What it is.
    pub kind: SourceKind,
    /// Size in bytes, a multiple of 512.
    pub bytes: u64,
    /// Identity of the device that stays when names change; `None` for images and anonymous devices.
    pub stable_id: Option<String>,
    /// Identity derived from the content (partition-table GUID); filled by whoever opens the source.
    pub fingerprint: Option<String>,
}

/// Why something cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is not there or may not be looked at.
    #[error("{} cannot be used as a source: {source}; check the path, and run as root for devices", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It is neither a block device nor a regular file.
    #[error("{} is {what}; name a whole disk (`reprotect-agent disks` lists them) or an image file", path.display())]
    WrongKind {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It is a partition.
    #[error("{} is a partition; protect the whole disk {disk}, a partition alone would not boot", path.display())]
    Partition {
        /// The path.
        path: PathBuf,
        /// The disk it is on.
        disk: String,
    },
    /// It has no content.
    #[error("{} is empty; give the image its full size first (for example with truncate), or insert the medium", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// Its size is not whole sectors.
    #[error("{} has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}; it is no disk image, or extend it to {} bytes", path.display(), bytes.next_multiple_of(SECTOR_BYTES))]
    NotSectors {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// No target could hold it.
    #[error("{} has {bytes} bytes, more than the {DISK_BYTES_MAX} a target can hold; split the volume", path.display())]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

impl Answer for SourceError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

impl Source {
    /// The source at `path` (below `root`), by what stands there.
    ///
    /// # Errors
    /// [`SourceError`], with what to do.
    pub fn at(root: &SystemRoot, path: &Path) -> Result<Self, SourceError> {
        let real = root.join(path);
        let meta =
            std::fs::metadata(&real).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
        let kind = meta.file_type();
        let wrong = |what| Err(SourceError::WrongKind { path: path.to_owned(), what });
        if kind.is_block_device() {
            return Self::device(root, path, meta.rdev());
        }
        if kind.is_dir() {
            return wrong("a directory");
        }
        if kind.is_char_device() {
            return wrong("a character device");
        }
        if !kind.is_file() {
            return wrong("neither a file nor a block device");
        }
        let name =
            path.file_name().map_or_else(|| "image".to_owned(), |name| name.to_string_lossy().into_owned());
        Self::checked(path, name, SourceKind::ImageFile, meta.len(), None)
    }

    /// The source that a listed disk is.
    ///
    /// # Errors
    /// When the disk has no medium or a size that cannot be protected.
    pub fn disk(disk: &Disk) -> Result<Self, SourceError> {
        let mut source = Self::checked(
            &disk.path,
            disk.name.clone(),
            SourceKind::BlockDevice,
            disk.bytes,
            disk.stable_id(),
        )?;
        source.fingerprint.clone_from(&disk.fingerprint);
        Ok(source)
    }

    fn device(root: &SystemRoot, path: &Path, number: u64) -> Result<Self, SourceError> {
        // The kernel's encoding of a device number in user space: 12 bits of major, 20 of minor, interleaved.
        let major = ((number >> 32) & 0xffff_f000) | ((number >> 8) & 0xfff);
        let minor = ((number >> 12) & 0xffff_ff00) | (number & 0xff);
        let link = root.join(format!("sys/dev/block/{major}:{minor}"));
        let dir = std::fs::canonicalize(link)
            .map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
        let name_of = |dir: Option<&Path>| {
            dir.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        if dir.join("partition").exists() {
            let disk = format!("/dev/{}", name_of(dir.parent()));
            return Err(SourceError::Partition { path: path.to_owned(), disk });
        }
        let sectors = attribute(&dir.join("size")).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let bytes = sectors.saturating_mul(SECTOR_BYTES);
        let name = name_of(Some(&dir));
        let listed = super::enumerate(root).ok().into_iter().flatten().find(|disk| disk.name == name);
        let stable_id = listed.and_then(|disk| disk.stable_id());
        Self::checked(path, name, SourceKind::BlockDevice, bytes, stable_id)
    }

    fn checked(
        path: &Path,
        name: String,
        kind: SourceKind,
        bytes: u64,
        stable_id: Option<String>,
    ) -> Result<Self, SourceError> {
        let path = path.to_owned();
        if bytes == 0 {
            Err(SourceError::Empty { path })
        } else if !bytes.is_multiple_of(SECTOR_BYTES) {
            Err(SourceError::NotSectors { path, bytes })
        } else if bytes > DISK_BYTES_MAX {
            Err(SourceError::TooLarge { path, bytes })
        } else {
            Ok(Self { path, name, kind, bytes, stable_id, fingerprint: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_sectors_of_a_regular_file_are_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        let file = std::fs::File::create(&image).unwrap();
        let at = |path: &Path| Source::at(&SystemRoot::default(), path);
        assert!(matches!(at(&image), Err(SourceError::Empty { .. })));
        file.set_len(1000).unwrap();
        let error = at(&image).unwrap_err();
        assert!(error.to_string().contains("extend it to 1024 bytes"), "{error}");
        file.set_len(1 << 20).unwrap();
        let source = at(&image).unwrap();
        assert_eq!(
            (source.kind, source.bytes, source.name.as_str()),
            (SourceKind::ImageFile, 1 << 20, "disk.img")
        );
        assert!(at(dir.path()).unwrap_err().to_string().contains("is a directory"));
        assert!(matches!(at(Path::new("/dev/null")), Err(SourceError::WrongKind { .. })));
        assert!(matches!(at(&dir.path().join("none")), Err(SourceError::Io { .. })));
    }
}
