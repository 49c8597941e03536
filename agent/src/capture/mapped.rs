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

    /// Copies `out.len()` bytes from `at`; false where that is beyond the mapping.
    ///
    /// The caller knows that the kernel does not write there: records of the ring between consumer and producer.
    #[expect(unsafe_code, reason = "a copy from mapped memory")]
    pub(crate) fn copy_settled(&self, at: usize, out: &mut [u8]) -> bool {
        if at.checked_add(out.len()).is_none_or(|end| end > self.bytes) {
            return false;
        }
        // SAFETY: the bounds were checked; the destination is ours and does not overlap the mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(self.start.as_ptr().cast::<u8>().add(at), out.as_mut_ptr(), out.len());
        }
        true
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
