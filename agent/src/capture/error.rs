//! Why capture cannot be begun or continued: the thing, the reason, the remedy.
//!
//! Invariants: whoever gets one of these falls back to `scan` and says so; nothing here loses data. Called by all of capture.

use std::io;
use std::path::PathBuf;

use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::io::buffer::ArenaError;

/// What capture met.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel wants privileges.
    #[error(
        "capture needs root or the capabilities CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN; run the agent as a system service"
    )]
    NotPermitted,
    /// No memory to read into.
    #[error("no memory to read changes into: {0}; free some, or give the machine more")]
    Memory(#[source] ArenaError),
    /// The kernel is locked down.
    #[error(
        "the kernel is in lockdown mode `confidentiality`, which forbids eBPF programs to read kernel memory; boot with lockdown=integrity, or use mode `scan`"
    )]
    Lockdown,
    /// The kernel does not allow it to somebody who has the rights.
    #[error(
        "the kernel forbids the capture program although the agent has the rights ({reason}): it is in lockdown mode `confidentiality`, or a security module says no; boot with lockdown=integrity, allow bpf() to the agent, or use mode `scan`"
    )]
    Forbidden {
        /// What the kernel said.
        reason: String,
    },
    /// No type information.
    #[error(
        "the kernel has no type information (/sys/kernel/btf/vmlinux): {reason}; use a kernel built with CONFIG_DEBUG_INFO_BTF, or mode `scan`"
    )]
    NoTypes {
        /// What was found instead.
        reason: String,
    },
    /// The file system for pins is not there.
    #[error("{} is no bpf file system and none can be mounted there: {source}; mount one with `mount -t bpf bpf {}`", path.display(), path.display())]
    NoPins {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses a program.
    #[error(
        "the kernel does not take the capture program: {reason}; use mode `scan`, and report this with the kernel's version"
    )]
    Refused {
        /// What the kernel said.
        reason: String,
    },
    /// The queue does not count.
    #[error(
        "{disk} does not count its I/O (queue/iostats is 0), so that misses could not be noticed; write 1 to /sys/block/{disk}/queue/iostats"
    )]
    NotCounting {
        /// The disk.
        disk: String,
    },
    /// Not a device that can be followed.
    #[error("{disk} cannot be followed: {reason}")]
    Unsupported {
        /// The disk.
        disk: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// An order came for a disk that is not followed.
    #[error("{disk} is not followed; report this as a defect if it was said to be")]
    NotFollowed {
        /// The disk.
        disk: String,
    },
    /// An order came for a stream that is over.
    #[error("not every write of the disks is streamed: {reason}")]
    NotStreamed {
        /// Why.
        reason: String,
    },
    /// A block could not be read.
    #[error("{disk} cannot be read: {source}")]
    Read {
        /// The disk.
        disk: String,
        /// What the device said.
        source: reprotect_engine::io::BlockError,
    },
    /// Another agent has it.
    #[error("{what} is in use by another agent on this machine ({}); stop that agent, or exclude the disk in one of them", path.display())]
    InUse {
        /// The disk, or the place of the pins.
        what: String,
        /// Its claim.
        path: PathBuf,
    },
    /// Every place is taken.
    #[error("{disk} is one disk too many: capture follows at most {max}; exclude some in [disks]")]
    TooMany {
        /// The disk.
        disk: String,
        /// Limit.
        max: usize,
    },
    /// The pins are not the ones that were made.
    #[error("{} was replaced or removed by somebody else; everything is compared with the target again", path.display())]
    PinChanged {
        /// What is missing or different.
        path: PathBuf,
    },
    /// A map answers with an error.
    #[error("the kernel's map {map} cannot be used: {source}; the agent must be started again")]
    Map {
        /// Its name.
        map: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file or an attribute.
    #[error("{} cannot be used: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The data that the programs copy are not the data that were written.
    #[error(
        "the self-test of data capture failed: {reason}; points at every write are not available, `bitmap` is"
    )]
    SelfTest {
        /// What was seen.
        reason: String,
    },
    /// More changed while a window was open than is kept in memory.
    #[error(
        "a closing window gathered {bytes} bytes, more than the {max} it may; the next one finds less, or the disks change faster than points can be made"
    )]
    WindowTooLarge {
        /// Gathered.
        bytes: u64,
        /// Limit.
        max: u64,
    },
    /// Records that cannot be.
    #[error(
        "the ring holds a record that cannot be: {reason}; what was written is marked and read again, report this as a defect"
    )]
    Ring {
        /// What is wrong with it.
        reason: String,
    },
}

impl Answer for CaptureError {
    fn severity(&self) -> Severity {
        match self {
            Self::PinChanged { .. } | Self::Map { .. } => Severity::Resync,
            Self::Ring { .. } | Self::WindowTooLarge { .. } => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

impl CaptureError {
    /// A file that cannot be used.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// A map that cannot be used.
    pub(crate) fn map<E: std::error::Error + Send + Sync + 'static>(name: &str) -> impl FnOnce(E) -> Self {
        let map = name.to_owned();
        move |error| Self::Map { map, source: io::Error::other(error) }
    }
}
