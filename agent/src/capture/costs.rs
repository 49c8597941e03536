//! What the programs cost and whether they were skipped: the kernel's own figures per program.
//!
//! Invariants: run times count only while somebody holds [`Costs::measure`]'s file; skipped runs count always. The library has
//! no accessor for skipped runs, hence the one call to the kernel here. Units: nanoseconds, runs. Called by `tracker`.

use std::os::fd::{AsRawFd, OwnedFd};

use aya::programs::ProgramInfo;

use super::CaptureError;
use super::loader::PROGRAMS;
use super::pins::Claim;

/// `BPF_OBJ_GET_INFO_BY_FD`.
const GET_INFO: libc::c_int = 15;
/// `struct bpf_prog_info` in 64-bit words, as far as it is wanted here.
const INFO_WORDS: usize = 28;
/// Words of it.
const RUN_TIME: usize = 24;
const RUN_COUNT: usize = 25;
const SKIPPED: usize = 26;

/// What one program did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramCost {
    /// Its name.
    pub name: &'static str,
    /// Time in it, while run times were measured.
    pub run_ns: u64,
    /// Runs, while run times were measured.
    pub runs: u64,
    /// Events for which it was not run because it was running on that CPU already.
    pub skipped: u64,
}

/// Keeps run times counted as long as it lives. Costs some nanoseconds per event itself.
#[derive(Debug)]
pub struct Measuring {
    _file: OwnedFd,
}

impl Measuring {
    /// Begins.
    ///
    /// # Errors
    /// Before Linux 5.8.
    pub fn begin() -> Result<Self, CaptureError> {
        let file = aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(super::loader::refused)?;
        Ok(Self { _file: file })
    }
}

/// The figures of every program.
pub(crate) fn read(place: &Claim) -> Result<Vec<ProgramCost>, CaptureError> {
    PROGRAMS.iter().map(|(name, _)| read_one(place, name)).collect()
}

/// Events for which a program was not run, of all programs.
pub(crate) fn skipped(place: &Claim) -> Result<u64, CaptureError> {
    Ok(read(place)?.iter().map(|cost| cost.skipped).sum())
}

fn read_one(place: &Claim, name: &'static str) -> Result<ProgramCost, CaptureError> {
    let pin = place.pin(name);
    let info = ProgramInfo::from_pin(&pin).map_err(|_| CaptureError::PinChanged { path: pin.clone() })?;
    let program = info.fd().map_err(super::loader::refused)?;
    let words = info_of(std::os::fd::AsFd::as_fd(&program).as_raw_fd()).map_err(CaptureError::file(pin))?;
    let word = |at: usize| words.get(at).copied().unwrap_or(0);
    Ok(ProgramCost { name, run_ns: word(RUN_TIME), runs: word(RUN_COUNT), skipped: word(SKIPPED) })
}

#[expect(unsafe_code, reason = "a system call the library has no accessor for")]
fn info_of(program: i32) -> std::io::Result<[u64; INFO_WORDS]> {
    let mut info = [0_u64; INFO_WORDS];
    // struct { u32 fd; u32 length; u64 address }, the rest of the union zero.
    let mut attributes = [0_u64; 16];
    let length = size_of_val(&info) as u64;
    attributes[0] = if cfg!(target_endian = "little") {
        u64::from(program as u32) | length << 32
    } else {
        u64::from(program as u32) << 32 | length
    };
    attributes[1] = info.as_mut_ptr() as u64;
    // SAFETY: the attributes are as the kernel wants them; it writes at most `length` bytes to `info`, which lives on.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, GET_INFO, attributes.as_ptr(), size_of_val(&attributes)) };
    if answer < 0 { Err(std::io::Error::last_os_error()) } else { Ok(info) }
}
