//! Freezing the file systems of protected disks for the time of a scan round, so that what is read is one state.
//!
//! A frozen file system stops every program that writes to it, so the thaw must not depend on this program: before
//! anything is frozen a child process is forked that does nothing but wait. It thaws when it is told to, when the time
//! limit is over, and when its pipe closes, which happens whatever ends the agent. It allocates nothing, calls only
//! what is allowed after a fork, and blocks every signal that can be blocked. For the case that both are killed at once
//! the mount points are written to a file first, and thawed at the agent's next start.
//!
//! Invariants: the guard knows of a file system before it is frozen; what somebody else froze is never thawed; a freeze
//! counts as held only if the guard says that the limit was not reached; when [`Freeze`] is dropped everything is
//! thawed. Units: milliseconds. Blocking: called on threads of their own by `marking`.
#![expect(unsafe_code, reason = "fork, and an ioctl that no safe wrapper offers")]

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reprotect_engine::io::durable::{Access, read_bounded, replace_file};

/// Names what is frozen, in the state directory, while it is.
const FROZEN_FILE: &str = "frozen";
/// File systems at a time: bits of the guard's set.
const MOUNTS_MAX: usize = 64;
/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;
/// To the guard: file system N (in the low bits) is about to be frozen, is not ours after all, thaw everything.
const ABOUT: u8 = 0x40;
const NOT_OURS: u8 = 0x80;
const THAW: u8 = 0xC0;
/// After the limit the guard looks again: a freeze that was under way then may have come about.
const LATE_LOOK_MS: i64 = 1000;
/// From the guard: the limit was reached; everything is thawed.
const LATE: u8 = b'L';
const DONE: u8 = b'D';

/// Why nothing is frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No file system of the protected disks is mounted.
    #[error(
        "no file system of the protected disks is mounted here, so there is nothing to freeze; make the point without --freeze"
    )]
    Nothing,
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
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => "; its kind of file system cannot be frozen",
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
}

/// The process that thaws.
#[derive(Debug)]
struct Guard {
    pid: libc::pid_t,
    orders: PipeWriter,
    answers: PipeReader,
}

impl Freeze {
    /// Freezes the file systems at `mount_points` for `limit` at most; those that are mounted several times once.
    ///
    /// # Errors
    /// When one of them cannot be frozen; then none is.
    pub fn begin(mount_points: &[PathBuf], limit: Duration, state_dir: &Path) -> Result<Self, FreezeError> {
        let mounts = open_mounts(mount_points)?;
        let record = state_dir.join(FROZEN_FILE);
        let names: Vec<String> = mounts.iter().map(|(path, _)| path.display().to_string()).collect();
        replace_file(&record, names.join("\n").as_bytes(), Access::Private)?;
        let guard = Guard::start(&mounts, limit);
        let mut freeze = Self { mounts, ours: 0, guard: None, record };
        freeze.guard = Some(guard.map_err(FreezeError::Guard)?);
        for index in 0..freeze.mounts.len() {
            freeze.freeze_one(index)?; // on an error the drop thaws what was frozen
        }
        Ok(freeze)
    }

    fn freeze_one(&mut self, index: usize) -> Result<(), FreezeError> {
        let (Some((path, file)), Some(guard)) = (self.mounts.get(index), self.guard.as_mut()) else {
            return Ok(());
        };
        // At most MOUNTS_MAX of them: the number fits into six bits.
        guard.orders.write_all(&[ABOUT | index as u8]).map_err(FreezeError::Guard)?;
        match ioctl(file.as_raw_fd(), FIFREEZE) {
            Ok(()) => {
                self.ours |= 1 << index;
                Ok(())
            }
            Err(source) => {
                // A guard that is gone cannot thaw it either.
                let _ = guard.orders.write_all(&[NOT_OURS | index as u8]);
                Err(FreezeError::Freeze { path: path.clone(), source })
            }
        }
    }

    /// What is frozen.
    #[must_use]
    pub fn mount_points(&self) -> Vec<PathBuf> {
        self.mounts.iter().map(|(path, _)| path.clone()).collect()
    }

    /// Thaws everything; answers whether everything was frozen until now.
    #[must_use]
    pub fn end(mut self) -> bool {
        self.thaw()
    }

    fn thaw(&mut self) -> bool {
        let held = self.guard.take().is_some_and(Guard::end);
        // Where the guard did its work the kernel says that nothing is frozen; where it was killed this is the thaw.
        for (index, (path, file)) in self.mounts.iter().enumerate() {
            if self.ours & (1 << index) == 0 {
                continue;
            }
            match ioctl(file.as_raw_fd(), FITHAW) {
                Ok(()) => {
                    tracing::warn!(path = %path.display(), "the guard of the freeze was gone; thawed without it")
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "cannot be thawed; run `fsfreeze --unfreeze` on it");
                }
            }
        }
        self.ours = 0;
        remove(&self.record);
        held
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        let _ = self.thaw();
    }
}

fn open_mounts(mount_points: &[PathBuf]) -> Result<Vec<(PathBuf, File)>, FreezeError> {
    let mut mounts: Vec<(PathBuf, File)> = Vec::new();
    let mut devices = Vec::new();
    for path in mount_points {
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            let file = options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(path)?;
            let device = file.metadata()?.dev();
            Ok((file, device))
        };
        let (file, device) = open().map_err(|source| FreezeError::Open { path: path.clone(), source })?;
        if !devices.contains(&device) {
            devices.push(device);
            mounts.push((path.clone(), file));
        }
    }
    match mounts.len() {
        0 => Err(FreezeError::Nothing),
        count if count > MOUNTS_MAX => Err(FreezeError::TooMany(count)),
        _ => Ok(mounts),
    }
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

fn ioctl(fd: RawFd, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both requests ignore their argument; `fd` is open for the time of the call.
    let result = unsafe { libc::ioctl(fd, request, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Guard {
    fn start(mounts: &[(PathBuf, File)], limit: Duration) -> io::Result<Self> {
        let (orders_in, orders) = io::pipe()?;
        let (answers, answers_out) = io::pipe()?;
        let fds: Vec<RawFd> = mounts.iter().map(|(_, file)| file.as_raw_fd()).collect();
        let limit_ms = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let ours = [orders.as_raw_fd(), answers.as_raw_fd()];
        let (input, output) = (orders_in.as_raw_fd(), answers_out.as_raw_fd());
        // Signals are blocked before the fork, so that none reaches the guard ever.
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both sets are written before they are read. After the fork the child runs `keep_guard` only, which
        // allocates nothing, takes no lock and never returns.
        let pid = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            let pid = libc::fork();
            if pid == 0 {
                keep_guard(&fds, limit_ms, ours, input, output);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
            pid
        };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pid, orders, answers })
    }

    /// Has everything thawed; answers whether the limit was not reached before.
    fn end(mut self) -> bool {
        let told = self.orders.write_all(&[THAW]).is_ok();
        drop(self.orders);
        let mut answers = Vec::new();
        // What was read before an error counts; nothing read means that the guard was killed.
        let _ = self.answers.read_to_end(&mut answers);
        // SAFETY: the child is ours and is waited for once; no status is asked for.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
        told && answers == [DONE]
    }
}

/// The guard's life. Runs in the forked child: nothing here may allocate, lock, unwind or return.
fn keep_guard(fds: &[RawFd], limit_ms: i64, parents: [RawFd; 2], input: RawFd, output: RawFd) -> ! {
    // SAFETY: system calls that are allowed after a fork, on descriptors the child owns copies of and on memory of
    // its own stack; the slice lives in the child's copy of the parent's memory.
    unsafe {
        for fd in parents {
            libc::close(fd); // or the pipe would never close when the parent ends
        }
        libc::setsid();
        let start = now_ms();
        let mut set = 0_u64;
        let mut late = false;
        loop {
            let left = if late { LATE_LOOK_MS } else { (limit_ms - (now_ms() - start)).max(0) };
            let mut poll = libc::pollfd { fd: input, events: libc::POLLIN, revents: 0 };
            let wait = if left > i64::from(i32::MAX) { i32::MAX } else { left as i32 };
            let ready = libc::poll(&raw mut poll, 1, wait);
            if ready == 0 && now_ms() - start >= limit_ms {
                thaw_all(fds, set);
                if !late {
                    libc::write(output, [LATE].as_ptr().cast(), 1);
                }
                late = true;
                continue;
            }
            if ready <= 0 {
                continue;
            }
            let mut order = THAW;
            // The end of the pipe is the end of the agent: as if it had said so.
            if libc::read(input, (&raw mut order).cast(), 1) != 1 {
                order = THAW;
            }
            let bit = 1_u64 << (order & 0x3F);
            match order & 0xC0 {
                ABOUT => set |= bit,
                NOT_OURS => set &= !bit,
                _ => break,
            }
        }
        thaw_all(fds, set);
        libc::write(output, [DONE].as_ptr().cast(), 1);
        libc::_exit(0)
    }
}

/// As [`keep_guard`]: no allocation. The oldest first: a later one may still be about to freeze, and be waited for.
fn thaw_all(fds: &[RawFd], set: u64) {
    let mut index = 0;
    while index < fds.len() {
        if set & (1 << index) != 0 {
            // SAFETY: the request ignores its argument; the descriptor is the child's copy.
            unsafe { libc::ioctl(fds[index], FITHAW, 0) };
        }
        index += 1;
    }
}

fn now_ms() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a whole structure of our own; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_that_is_not_there_is_named_and_nothing_is_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error =
            Freeze::begin(std::slice::from_ref(&missing), Duration::from_secs(1), dir.path()).unwrap_err();
        assert!(error.to_string().contains(&missing.display().to_string()), "{error}");
        assert!(matches!(Freeze::begin(&[], Duration::from_secs(1), dir.path()), Err(FreezeError::Nothing)));
        assert!(!dir.path().join(FROZEN_FILE).exists());
    }

    #[test]
    fn what_cannot_be_frozen_leaves_no_guard_and_no_record() {
        let dir = tempfile::tempdir().unwrap();
        // procfs knows no freeze.
        let error = Freeze::begin(&["/proc".into()], Duration::from_secs(60), dir.path()).unwrap_err();
        assert!(matches!(error, FreezeError::Freeze { .. }), "{error}");
        assert!(error.to_string().contains("/proc"), "{error}");
        assert!(!dir.path().join(FROZEN_FILE).exists());
    }
}
