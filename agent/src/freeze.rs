//! Freezing the file systems of protected disks: for the moment at which a closing window closes, or for the time of a
//! scan round, so that what is read is one state.
//!
//! A frozen file system stops every program that writes to it, so the thaw must not depend on this program: before
//! anything is frozen a child process is forked that does nothing but wait. It thaws when it is told to, when the time
//! limit is over, and when its pipe closes, which happens whatever ends the agent (`guard`). For the case that both are killed at once
//! the mount points are written to a file first, and thawed at the agent's next start.
//!
//! Invariants: the guard knows of a file system before it is frozen; what somebody else froze is never thawed; a freeze
//! counts as held only if the guard says that the limit was not reached; when [`Freeze`] is dropped everything is
//! thawed. Units: milliseconds. Blocking: called on threads of their own by `marking`, and by `capturing`.

mod guard;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use guard::Limits;
use guard::{FIFREEZE, FITHAW, Guard, ioctl};
use reprotect_engine::io::durable::{Access, read_bounded, replace_file};

/// Names what is frozen, in the state directory, while it is.
const FROZEN_FILE: &str = "frozen";
/// File systems at a time: bits of the guard's set.
const MOUNTS_MAX: usize = 64;

/// Why nothing is frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No file system of the protected disks is mounted.
    #[error(
        "no file system of the protected disks is mounted here, so there is nothing to freeze; make the point without --freeze"
    )]
    Nothing,
    /// Not one of them can.
    #[error(
        "none of the {0} file systems of the protected disks is of a kind that can be frozen; make the point without --freeze"
    )]
    NoneCan(usize),
    /// More than the guard can keep.
    #[error(
        "{0} file systems are mounted from the protected disks, {MOUNTS_MAX} can be frozen at once; unmount some"
    )]
    TooMany(usize),
    /// The mount point cannot be opened.
    #[error("{} cannot be opened: {source}; nothing is frozen", path.display())]
    Open {
        /// The mount point.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("{} cannot be frozen: {source}{}; everything is thawed again", path.display(), hint(source))]
    Freeze {
        /// The mount point.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The guard cannot be had.
    #[error("no guard process for the freeze can be had: {0}; nothing is frozen")]
    Guard(io::Error),
    /// The list for the next start cannot be written.
    #[error("{0}; without it a crash could leave file systems frozen, so nothing is frozen")]
    Record(#[from] reprotect_engine::io::durable::DurableError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; run the agent as root",
        Some(libc::EBUSY) => "; somebody else froze it",
        Some(libc::ENOTTY | libc::EINVAL) => "; its kind of file system cannot be frozen",
        _ => "",
    }
}

/// Frozen file systems; thawed on drop at the latest.
#[derive(Debug)]
pub struct Freeze {
    mounts: Vec<(PathBuf, File)>,
    /// Which of them are ours.
    ours: u64,
    guard: Option<Guard>,
    record: PathBuf,
    /// How long the calls that freeze took.
    call: Duration,
    /// Since when everything is frozen.
    since: Option<Instant>,
    unfrozen: Vec<PathBuf>,
}

/// How a freeze went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezeEnd {
    /// Everything was frozen until it was told to thaw.
    pub held: bool,
    /// How long the calls that freeze took: file systems write out what they hold, programs wait already.
    pub call: Duration,
    /// How long everything was frozen beyond that.
    pub frozen: Duration,
    /// Of kinds that cannot be frozen, as the FAT of a boot partition: they were written out instead.
    pub unfrozen: Vec<PathBuf>,
}

impl Freeze {
    /// Freezes the file systems at `mount_points` within `limits`; those that are mounted several times once.
    ///
    /// # Errors
    /// When one of them cannot be frozen; then none is.
    pub fn begin(mount_points: &[PathBuf], limits: Limits, state_dir: &Path) -> Result<Self, FreezeError> {
        let mut freeze = Self::prepare(mount_points, limits, state_dir)?;
        freeze.freeze()?; // on an error the drop thaws what was frozen
        Ok(freeze)
    }

    /// Makes everything ready. Freezing takes less time after [`write_out_all`].
    ///
    /// # Errors
    /// When one of them cannot be opened or the guard cannot be had. Nothing is frozen yet.
    pub fn prepare(mount_points: &[PathBuf], limits: Limits, state_dir: &Path) -> Result<Self, FreezeError> {
        let mounts = open_mounts(mount_points)?;
        let record = state_dir.join(FROZEN_FILE);
        let names: Vec<String> = mounts.iter().map(|(path, _)| path.display().to_string()).collect();
        replace_file(&record, names.join("\n").as_bytes(), Access::Private)?;
        let guard = Guard::start(&mounts, limits);
        let mut freeze = Self {
            mounts,
            ours: 0,
            guard: None,
            record,
            call: Duration::ZERO,
            since: None,
            unfrozen: Vec::new(),
        };
        freeze.guard = Some(guard.map_err(FreezeError::Guard)?);
        Ok(freeze)
    }

    /// Freezes all of them.
    ///
    /// # Errors
    /// When one of them cannot be frozen; the others are frozen until this is dropped.
    pub fn freeze(&mut self) -> Result<(), FreezeError> {
        let begun = Instant::now();
        for index in 0..self.mounts.len() {
            self.freeze_one(index)?;
        }
        if self.ours == 0 {
            return Err(FreezeError::NoneCan(self.mounts.len()));
        }
        if let Some(guard) = &mut self.guard {
            guard.all_frozen().map_err(FreezeError::Guard)?;
        }
        (self.call, self.since) = (begun.elapsed(), Some(Instant::now()));
        Ok(())
    }

    fn freeze_one(&mut self, index: usize) -> Result<(), FreezeError> {
        let (Some((path, file)), Some(guard)) = (self.mounts.get(index), self.guard.as_mut()) else {
            return Ok(());
        };
        guard.about(index).map_err(FreezeError::Guard)?;
        match ioctl(file.as_raw_fd(), FIFREEZE) {
            Ok(()) => {
                self.ours |= 1 << index;
                Ok(())
            }
            Err(source) => {
                // A guard that is gone cannot thaw it either.
                let _ = guard.not_ours(index);
                if source.raw_os_error() != Some(libc::EOPNOTSUPP) {
                    return Err(FreezeError::Freeze { path: path.clone(), source });
                }
                // What it says is not needed: the freeze of the others is not the worse for it.
                let _ = rustix::fs::syncfs(file);
                self.unfrozen.push(path.clone());
                Ok(())
            }
        }
    }

    /// What is frozen.
    #[must_use]
    pub fn mount_points(&self) -> Vec<PathBuf> {
        self.mounts.iter().map(|(path, _)| path.clone()).collect()
    }

    /// Thaws everything.
    #[must_use]
    pub fn end(mut self) -> FreezeEnd {
        let Some(since) = self.since.take() else {
            let (call, unfrozen) = (self.call, std::mem::take(&mut self.unfrozen));
            return FreezeEnd { held: false, call, frozen: Duration::ZERO, unfrozen };
        };
        let thawed = self.thaw_ours();
        let frozen = since.elapsed();
        let held = self.end_guard() && thawed;
        FreezeEnd { held, call: self.call, frozen, unfrozen: std::mem::take(&mut self.unfrozen) }
    }

    /// Thaws what is ours, at once, without a word to the guard; answers whether all of it was frozen.
    fn thaw_ours(&mut self) -> bool {
        let (mut held, mut problems) = (true, Vec::new());
        for (index, (path, file)) in self.mounts.iter().enumerate() {
            if self.ours & (1 << index) == 0 {
                continue;
            }
            if let Err(error) = ioctl(file.as_raw_fd(), FITHAW) {
                held = false;
                // What the kernel calls invalid is not frozen any more.
                if error.raw_os_error() != Some(libc::EINVAL) {
                    problems.push((path, error));
                }
            }
            if let Some(guard) = &mut self.guard {
                // A guard that is gone is noticed when it is ended.
                let _ = guard.not_ours(index);
            }
        }
        // Only now may anything be written.
        for (path, error) in problems {
            tracing::error!(path = %path.display(), %error, "cannot be thawed; run `fsfreeze --unfreeze` on it");
        }
        self.ours = 0;
        held
    }

    /// Ends the guard; answers whether it lived and reached no limit.
    fn end_guard(&mut self) -> bool {
        let held = self.guard.take().is_some_and(Guard::end);
        remove(&self.record);
        held
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        if self.guard.is_some() || self.ours != 0 {
            let _ = (self.thaw_ours(), self.end_guard());
        }
    }
}

/// Has the file systems write out what they hold. Blocks.
pub fn write_out_all(mount_points: &[PathBuf]) {
    for path in mount_points {
        let written = File::open(path).and_then(|file| Ok(rustix::fs::syncfs(file)?));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot be written out before it is frozen");
        }
    }
}

fn open_mounts(mount_points: &[PathBuf]) -> Result<Vec<(PathBuf, File)>, FreezeError> {
    let mut mounts: Vec<(PathBuf, File)> = Vec::new();
    let mut superblocks = Vec::new();
    for path in mount_points {
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            let file = options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(path)?;
            let superblock = superblock_of(&file)?;
            Ok((file, superblock))
        };
        let (file, superblock) = open().map_err(|source| FreezeError::Open { path: path.clone(), source })?;
        if !superblocks.contains(&superblock) {
            superblocks.push(superblock);
            mounts.push((path.clone(), file));
        }
    }
    match mounts.len() {
        0 => Err(FreezeError::Nothing),
        count if count > MOUNTS_MAX => Err(FreezeError::TooMany(count)),
        _ => Ok(mounts),
    }
}

/// The number of what is frozen, `major:minor`, which the mounts of one file system share. Files of btrfs have one for each
/// subvolume, so theirs will not do where the kernel says that of the mount.
fn superblock_of(file: &File) -> io::Result<String> {
    let fd = file.as_raw_fd();
    let of_mount = || {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount.as_str()))?;
        line.split(' ').nth(2).map(str::to_owned)
    };
    let of_file = || {
        let number = file.metadata()?.dev();
        Ok(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
    };
    of_mount().map_or_else(of_file, Ok)
}

/// Thaws what an agent that was killed together with its guard left frozen. Blocks.
pub fn thaw_left_behind(state_dir: &Path) {
    let record = state_dir.join(FROZEN_FILE);
    let Ok(bytes) = read_bounded(&record, 1 << 20) else { return };
    for path in String::from_utf8_lossy(&bytes).lines().map(Path::new) {
        let thawed = File::open(path).and_then(|file| ioctl(file.as_raw_fd(), FITHAW));
        if thawed.is_ok() {
            tracing::warn!(path = %path.display(), "was left frozen by an agent that was killed; thawed");
        }
    }
    remove(&record);
}

fn remove(record: &Path) {
    if let Err(error) = std::fs::remove_file(record)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %record.display(), %error, "cannot be removed; the next start looks at it again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_that_is_not_there_is_named_and_nothing_is_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error =
            Freeze::begin(std::slice::from_ref(&missing), Limits::of(Duration::from_secs(1)), dir.path())
                .unwrap_err();
        assert!(error.to_string().contains(&missing.display().to_string()), "{error}");
        assert!(matches!(
            Freeze::begin(&[], Limits::of(Duration::from_secs(1)), dir.path()),
            Err(FreezeError::Nothing)
        ));
        assert!(!dir.path().join(FROZEN_FILE).exists());
    }

    #[test]
    fn what_cannot_be_frozen_leaves_no_guard_and_no_record() {
        let dir = tempfile::tempdir().unwrap();
        // procfs knows no freeze.
        let error =
            Freeze::begin(&["/proc".into()], Limits::of(Duration::from_secs(60)), dir.path()).unwrap_err();
        assert!(matches!(error, FreezeError::NoneCan(1)), "{error}");
        assert!(!dir.path().join(FROZEN_FILE).exists());
    }
}
