//! Page-aligned buffers, leased and returned: payload is read, sent and written without being copied or allocated.
//!
//! Invariants: an arena is one mapping cut into equal slots of whole 4 KiB pages, so its memory is bounded from the
//! start; a slot has at most one owner; a lease keeps its arena alive and comes back when it is dropped, on
//! whichever thread that happens. A new lease holds whatever its last owner left there (bytes of this process,
//! zeros at first): who sends a buffer fills it first. The only allocator with `unsafe` in the tree.
//! Units: bytes. Called by every reader and writer thread, and by the io backends for bounce buffers.
#![expect(
    unsafe_code,
    reason = "hands out disjoint slices of one allocation, aligned as direct I/O needs them"
)]

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Alignment of every slot in memory: enough for direct I/O on any device.
pub const PAGE_BYTES: usize = 4096;

/// An arena that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make {slots} buffers of {slot_bytes} bytes: {reason}")]
pub struct ArenaError {
    /// Slots asked for.
    pub slots: usize,
    /// Bytes per slot asked for.
    pub slot_bytes: usize,
    /// What is wrong, and what to do.
    pub reason: &'static str,
}

impl crate::error::Answer for ArenaError {
    fn severity(&self) -> crate::error::Severity {
        crate::error::Severity::Stop
    }
}

/// A bounded set of equal buffers in one allocation. Memory is taken from the system as slots are first touched.
#[derive(Debug)]
pub struct BufferArena {
    raw: NonNull<u8>,
    layout: Layout,
    base: NonNull<u8>,
    slot_bytes: usize,
    slots: usize,
    free: Mutex<Vec<usize>>,
    returned: Condvar,
}

// SAFETY: the arena owns its allocation; slots are handed out through the mutex, each to one `PoolBuf` at a time,
// and only that `PoolBuf` touches the bytes.
unsafe impl Send for BufferArena {}
// SAFETY: as above; through `&BufferArena` only addresses can be had, never bytes.
unsafe impl Sync for BufferArena {}

impl BufferArena {
    /// An arena of `slots` buffers of `slot_bytes` each.
    ///
    /// # Errors
    /// When either is zero, `slot_bytes` is no multiple of [`PAGE_BYTES`], or there is not that much memory.
    pub fn new(slots: usize, slot_bytes: usize) -> Result<Arc<Self>, ArenaError> {
        let refuse = |reason| ArenaError { slots, slot_bytes, reason };
        if slots == 0 || slot_bytes == 0 || !slot_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(refuse("choose at least one buffer, of a positive multiple of 4096 bytes"));
        }
        let layout = slots
            .checked_mul(slot_bytes)
            .and_then(|bytes| bytes.checked_add(PAGE_BYTES))
            // Aligned by hand below: for an alignment of one, large zeroed memory is mapped lazily; for 4096 it
            // would be written to, and an idle arena would cost its full size.
            .and_then(|bytes| Layout::from_size_align(bytes, 1).ok())
            .ok_or_else(|| refuse("more than the address space; choose fewer or smaller buffers"))?;
        // SAFETY: the layout's size is at least a page, so not zero.
        let raw = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
            .ok_or_else(|| refuse("out of memory; choose fewer or smaller buffers"))?;
        // SAFETY: the allocation is a page longer than the slots, so rounding its start up to a page stays inside.
        let base = unsafe { raw.add(raw.align_offset(PAGE_BYTES)) };
        let free = Mutex::new((0..slots).rev().collect());
        Ok(Arc::new(Self { raw, layout, base, slot_bytes, slots, free, returned: Condvar::new() }))
    }

    /// A buffer; waits until one is free. Never wait while holding buffers that only this thread returns.
    #[must_use]
    pub fn lease(self: &Arc<Self>) -> PoolBuf {
        let mut free = self.free();
        loop {
            if let Some(slot) = free.pop() {
                return self.owned(slot);
            }
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A buffer if one is free now.
    #[must_use]
    pub fn try_lease(self: &Arc<Self>) -> Option<PoolBuf> {
        let slot = self.free().pop()?;
        Some(self.owned(slot))
    }

    /// Bytes per buffer.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Buffers in all.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Buffers free at this moment.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free().len()
    }

    /// Address of the first slot; slots follow one another without gaps. For registering with the kernel.
    #[must_use]
    pub fn base_address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    fn owned(self: &Arc<Self>, slot: usize) -> PoolBuf {
        PoolBuf { arena: Arc::clone(self), slot, len: self.slot_bytes }
    }

    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        // A panic elsewhere cannot leave the list half changed: push and pop are its only uses.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BufferArena {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; every lease holds an `Arc` of the arena, so none is left.
        unsafe { std::alloc::dealloc(self.raw.as_ptr(), self.layout) }
    }
}

/// A leased buffer: dereferences to its bytes, as many as its length says; goes back to its arena on drop.
pub struct PoolBuf {
    arena: Arc<BufferArena>,
    slot: usize,
    len: usize,
}

impl PoolBuf {
    /// A buffer of its own outside any shared arena, of at least `bytes` bytes, its length `bytes`.
    ///
    /// # Errors
    /// When `bytes` is zero or there is not that much memory.
    pub fn alone(bytes: usize) -> Result<Self, ArenaError> {
        let slot_bytes = bytes.checked_next_multiple_of(PAGE_BYTES).unwrap_or(0);
        let mut buffer = BufferArena::new(1, slot_bytes)?.lease();
        buffer.set_len(bytes);
        Ok(buffer)
    }

    /// Bytes the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.arena.slot_bytes
    }

    /// Sets how many bytes it dereferences to. Bytes beyond the old length are what they were before.
    ///
    /// # Panics
    /// When `len` is beyond the capacity: check lengths from outside first.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "length {len} beyond a buffer of {}", self.capacity());
        self.len = len;
    }

    /// The same bytes for the network, not copied; the slot comes back when the last clone is dropped.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: `slot < slots`, so the slot lies inside the allocation.
        unsafe { self.arena.base.add(self.slot * self.arena.slot_bytes) }
    }
}

impl Deref for PoolBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` is at most the slot's size, its bytes were initialised by `alloc_zeroed`, and this lease is
        // the slot's only owner.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for PoolBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolBuf").field("slot", &self.slot).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        self.arena.free().push(self.slot);
        self.arena.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_disjoint_and_bounded() {
        let arena = BufferArena::new(3, 8192).expect("arena");
        let mut all: Vec<PoolBuf> = (0..3).map(|_| arena.lease()).collect();
        assert!(arena.try_lease().is_none());
        for (fill, buffer) in (1_u8..).zip(&mut all) {
            assert!(buffer.as_ptr().addr().is_multiple_of(PAGE_BYTES));
            assert_eq!(buffer.len(), 8192);
            buffer.fill(fill);
        }
        for (fill, buffer) in (1_u8..).zip(&all) {
            assert!(buffer.iter().all(|byte| *byte == fill));
        }
        drop(all);
        assert_eq!(arena.free_slots(), 3);
    }

    #[test]
    fn bytes_keep_the_slot_until_the_last_clone_is_gone_and_outlive_the_arena_handle() {
        let arena = BufferArena::new(1, 4096).expect("arena");
        let mut buffer = arena.lease();
        buffer[..3].copy_from_slice(b"abc");
        buffer.set_len(3);
        let address = buffer.as_ptr();
        let bytes = buffer.into_bytes();
        assert_eq!(bytes.as_ptr(), address, "not copied");
        let clone = bytes.slice(1..);
        drop(bytes);
        assert!(arena.try_lease().is_none());
        let weak = Arc::downgrade(&arena);
        drop(arena);
        assert_eq!(std::thread::spawn(move || clone.to_vec()).join().expect("thread"), b"bc");
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_waiting_lease_is_woken_by_a_return_from_another_thread() {
        let arena = BufferArena::new(2, 4096).expect("arena");
        let total: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..1000 {
                            let mut buffer = arena.lease();
                            buffer[0] = buffer[0].wrapping_add(1);
                        }
                        1000
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("worker")).sum()
        });
        assert_eq!(total, 4000);
        assert_eq!(arena.free_slots(), 2);
        let (a, b) = (arena.lease(), arena.lease());
        assert_eq!(a[0].wrapping_add(b[0]), (4000 % 256) as u8, "no update was lost");
    }

    #[test]
    fn impossible_arenas_are_refused() {
        assert!(BufferArena::new(0, 4096).is_err());
        assert!(BufferArena::new(1, 1000).is_err());
        assert!(BufferArena::new(usize::MAX, 4096).is_err());
        assert_eq!(PoolBuf::alone(100).expect("buffer").len(), 100);
        assert!(PoolBuf::alone(0).is_err());
    }
}
