//! The bpf file system: where programs, maps and links are pinned so that they outlive the agent, and who owns them.
//!
//! Invariants: a place has one owner at a time, by a lock on its directory that the kernel drops with the process, however it
//! ends; only files that this module names are removed. Called by `loader` and `tracker`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::{BlockDisk, CaptureError};

/// `statfs` type of the bpf file system.
const BPF_MAGIC: u64 = 0xcafe_4a11;
/// Where it is mounted by convention.
const BPF_MOUNT: &str = "/sys/fs/bpf";
/// Our directory in it.
pub(crate) const OUR_DIR: &str = "reprotect";

/// A locked directory in the bpf file system.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    _lock: File,
}

impl Claim {
    /// Makes the directory and locks it.
    ///
    /// # Errors
    /// [`CaptureError::InUse`] when another process holds it.
    pub(crate) fn take(path: PathBuf, what: &str) -> Result<Self, CaptureError> {
        fs::create_dir_all(&path).map_err(CaptureError::file(&path))?;
        let lock = File::open(&path).map_err(CaptureError::file(&path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(CaptureError::InUse { what: what.to_owned(), path }),
            Err(error) => Err(CaptureError::File { path, source: error.into() }),
        }
    }

    /// Claims a disk of this machine.
    pub(crate) fn disk(root: &Path, disk: &BlockDisk) -> Result<Self, CaptureError> {
        Self::take(root.join("disks").join(format!("{}-{}", disk.number.0, disk.number.1)), &disk.name)
    }

    /// Its place.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The pin of that name.
    pub(crate) fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes every pin here; programs without a pin stop.
    pub(crate) fn clear(&self) -> Result<(), CaptureError> {
        for entry in fs::read_dir(&self.path).map_err(CaptureError::file(&self.path))? {
            remove(&entry.map_err(CaptureError::file(&self.path))?.path())?;
        }
        Ok(())
    }
}

/// The place of an agent's pins.
pub(crate) fn place_of(root: &Path, instance: &str) -> PathBuf {
    root.join(format!("agent-{instance}"))
}

/// Removes what capture of an agent that does not run left in the kernel: its programs stop, its maps are gone, and its
/// next start compares. Answers whether there was anything.
///
/// # Errors
/// [`CaptureError::InUse`] when the agent runs, or what the file system says.
pub fn let_go(instance: &str) -> Result<bool, CaptureError> {
    let path = place_of(&Path::new(BPF_MOUNT).join(OUR_DIR), instance);
    if !path.exists() {
        return Ok(false);
    }
    let place = Claim::take(path, "capture")?;
    let found = fs::read_dir(&place.path).map_err(CaptureError::file(&place.path))?.next().is_some();
    place.clear()?;
    fs::remove_dir(&place.path).map_err(CaptureError::file(&place.path))?;
    Ok(found)
}

/// Removes a pin, which may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), CaptureError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CaptureError::File { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// Our directory in the bpf file system, which is mounted where it is not yet.
pub(crate) fn root() -> Result<PathBuf, CaptureError> {
    let mount = Path::new(BPF_MOUNT);
    let failed = |source: io::Error| CaptureError::NoPins { path: mount.to_owned(), source };
    if !is_bpf(mount).map_err(failed)? {
        rustix::mount::mount("bpf", mount, "bpf", rustix::mount::MountFlags::empty(), None)
            .map_err(|error| failed(error.into()))?;
        if !is_bpf(mount).map_err(failed)? {
            return Err(failed(io::Error::other("something else is mounted there")));
        }
    }
    let path = mount.join(OUR_DIR);
    fs::create_dir_all(&path).map_err(CaptureError::file(&path))?;
    Ok(path)
}

fn is_bpf(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type as u64 & 0xffff_ffff == BPF_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Claim::take(dir.path().join("a"), "sda").unwrap();
        let error = Claim::take(dir.path().join("a"), "sda").unwrap_err();
        assert!(matches!(error, CaptureError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("sda"));
        drop(first);
        Claim::take(dir.path().join("a"), "sda").unwrap();
    }
}
