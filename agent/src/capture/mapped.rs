//! Kernel maps mapped into memory, as words that the kernel's programs change at the same time.
//!
//! Invariants: a mapping lives as long as the value; every access is atomic, because the programs write too; the mapping is
//! shared, so what is written here outlives this process as long as the map is pinned.
//! Units: bytes, 64-bit words. Called by `kernel`, `bitmap` and `ring`.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping of a map.
#[derive(Debug)]
pub(crate) struct Mapped {
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the memory is shared with the kernel anyway and only accessed by atomic operations.
#[expect(unsafe_code, reason = "a mapping is an address, which is not sent by itself")]
unsafe impl Send for Mapped {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "as above")]
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `bytes` of a map from `offset`.
    ///
    /// # Errors
    /// What the kernel says.
    #[expect(unsafe_code, reason = "mapping memory")]
    pub(crate) fn new(map: impl AsFd, offset: u64, bytes: usize, writable: bool) -> io::Result<Self> {
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at a place the kernel chooses overlaps nothing.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, map, offset) }?;
        let start = NonNull::new(start.cast::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// Its words.
    #[expect(unsafe_code, reason = "a view of mapped memory")]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `bytes` long, initialised by the kernel, and lives as long as `self`. A
        // read-only mapping is never written through: its users only load.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / size_of::<u64>()) }
    }

    /// `len` bytes from `at`; `None` where that is beyond the mapping.
    ///
    /// The caller knows that the kernel does not write there while the view lives: a committed record of the ring, which is
    /// not given back before.
    #[expect(unsafe_code, reason = "a view of mapped memory")]
    pub(crate) fn settled(&self, at: usize, len: usize) -> Option<&[u8]> {
        if at.checked_add(len).is_none_or(|end| end > self.bytes) {
            return None;
        }
        // SAFETY: the bounds were checked, the memory is initialised, and nobody writes to it (see above).
        Some(unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<u8>().add(at), len) })
    }
}

impl Drop for Mapped {
    #[expect(unsafe_code, reason = "unmapping memory")]
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no view of it outlives `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
