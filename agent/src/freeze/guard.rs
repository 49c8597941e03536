//! The process that thaws, whatever becomes of the agent.
//!
//! Orders are single bytes on a pipe whose end is the agent's: that it closes is the order to thaw. Invariants: nothing here
//! allocates, locks or unwinds after the fork; every signal is blocked that can be; what the guard runs on is locked in
//! memory where the limits allow it. Units: milliseconds. Called by `freeze` only.
#![expect(unsafe_code, reason = "fork, and an ioctl that no safe wrapper offers")]

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
pub(super) const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
pub(super) const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;
/// To the guard: everything is frozen; file system N (in the low bits) is about to be frozen, is not ours after all; thaw
/// everything.
const ALL_FROZEN: u8 = 0x00;
const ABOUT: u8 = 0x40;
const NOT_OURS: u8 = 0x80;
const THAW: u8 = 0xC0;
/// After the limit the guard looks again: a freeze that was under way then may have come about.
const LATE_LOOK_MS: i64 = 1000;
/// `MCL_ONFAULT` of `mlockall(2)`, Linux 4.4.
const MCL_ONFAULT: libc::c_int = 4;
/// From the guard: the limit was reached; everything is thawed.
const LATE: u8 = b'L';
const DONE: u8 = b'D';

/// The process that thaws.
#[derive(Debug)]
pub(super) struct Guard {
    pid: libc::pid_t,
    orders: PipeWriter,
    answers: PipeReader,
}

/// How long file systems may be frozen.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the first call to freeze on.
    pub in_all: Duration,
    /// From the moment on at which everything is frozen.
    pub held: Duration,
}

impl Limits {
    /// The same for both.
    #[must_use]
    pub const fn of(limit: Duration) -> Self {
        Self { in_all: limit, held: limit }
    }
}

fn millis(limit: Duration) -> i64 {
    i64::try_from(limit.as_millis()).unwrap_or(i64::MAX / 2)
}

impl Guard {
    /// Forks it; it thaws what it is told of when the limits are reached, which count from the first order on.
    pub(super) fn start(mounts: &[(PathBuf, File)], limits: Limits) -> io::Result<Self> {
        let (orders_in, orders) = io::pipe()?;
        let (answers, answers_out) = io::pipe()?;
        let fds: Vec<RawFd> = mounts.iter().map(|(_, file)| file.as_raw_fd()).collect();
        let limits_ms = (millis(limits.in_all), millis(limits.held));
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
                keep_guard(&fds, limits_ms, ours, input, output);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
            pid
        };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pid, orders, answers })
    }

    /// File system `index` is about to be frozen.
    pub(super) fn about(&mut self, index: usize) -> io::Result<()> {
        // At most `MOUNTS_MAX` of them: the number fits into six bits.
        self.orders.write_all(&[ABOUT | index as u8])
    }

    /// It was not frozen by us.
    pub(super) fn not_ours(&mut self, index: usize) -> io::Result<()> {
        self.orders.write_all(&[NOT_OURS | index as u8])
    }

    /// Everything is frozen.
    pub(super) fn all_frozen(&mut self) -> io::Result<()> {
        self.orders.write_all(&[ALL_FROZEN])
    }

    /// Has everything thawed; answers whether no limit was reached before.
    pub(super) fn end(mut self) -> bool {
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
fn keep_guard(
    fds: &[RawFd],
    (in_all_ms, held_ms): (i64, i64),
    parents: [RawFd; 2],
    input: RawFd,
    output: RawFd,
) -> ! {
    // SAFETY: system calls that are allowed after a fork, on descriptors the child owns copies of and on memory of
    // its own stack; the slice lives in the child's copy of the parent's memory.
    unsafe {
        for fd in parents {
            libc::close(fd); // or the pipe would never close when the parent ends
        }
        libc::setsid();
        // Pages as they are touched, not the agent's whole memory; without the right to, it does without.
        libc::mlockall(libc::MCL_CURRENT | MCL_ONFAULT);
        let mut set = 0_u64;
        let mut late = false;
        // Before anything is frozen there is nothing to limit.
        let mut deadline = i64::MAX;
        loop {
            let left = if late { LATE_LOOK_MS } else { deadline.saturating_sub(now_ms()).max(0) };
            let mut poll = libc::pollfd { fd: input, events: libc::POLLIN, revents: 0 };
            let wait = if left > i64::from(i32::MAX) { i32::MAX } else { left as i32 };
            let ready = libc::poll(&raw mut poll, 1, wait);
            if ready == 0 && now_ms() >= deadline {
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
                ABOUT => {
                    set |= bit;
                    deadline = deadline.min(now_ms().saturating_add(in_all_ms));
                }
                NOT_OURS => set &= !bit,
                ALL_FROZEN => deadline = deadline.min(now_ms().saturating_add(held_ms)),
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

pub(super) fn ioctl(fd: RawFd, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both requests ignore their argument; `fd` is open for the time of the call.
    let result = unsafe { libc::ioctl(fd, request, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
