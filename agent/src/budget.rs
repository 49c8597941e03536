//! Payload memory of one disk: what was read, what was compressed of it, what is queued, and what the transport holds
//! until the other end acknowledged it.
//!
//! Invariants: every payload byte of a disk is charged from before it is read until its last `Bytes` is dropped,
//! wherever that happens; a read begins only while the charges leave room for it and for what every worker may be
//! compressing at that moment, so the sum never passes the limit. One read is always allowed, so nothing stands still.
//! Units: bytes. Made by `session` per disk; charged by `reader` and `workers`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::io::buffer::{ArenaError, BufferArena, PoolBuf};
use reprotect_engine::limits::{CHUNK_BYTES, CHUNKS_OPEN_MAX};

/// Buffers of a disk at most: two full windows, one being read and sent while the other is on its way.
const SLOTS_MAX: usize = 2 * CHUNKS_OPEN_MAX;
/// Buffers of a disk at least: one being read, one being sent.
const SLOTS_MIN: usize = 2;
/// A waiter looks at its stop flag this often.
const WAKE: Duration = Duration::from_millis(100);

/// What a disk's payload may take.
#[derive(Debug)]
pub struct Budget {
    arena: Arc<BufferArena>,
    limit: u64,
    /// Kept free for the workers when a read is admitted.
    reserve: u64,
    held: Mutex<Held>,
    returned: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    now: u64,
    peak: u64,
}

impl Budget {
    /// A budget of about `share_bytes`, with `workers` threads that may be compressing.
    ///
    /// # Errors
    /// When there is no memory for the buffers.
    pub fn new(share_bytes: u64, workers: usize) -> Result<Arc<Self>, ArenaError> {
        let slots =
            usize::try_from(share_bytes / CHUNK_BYTES).unwrap_or(SLOTS_MAX).clamp(SLOTS_MIN, SLOTS_MAX);
        let limit = slots as u64 * CHUNK_BYTES;
        Ok(Arc::new(Self {
            arena: BufferArena::new(slots, CHUNK_BYTES as usize)?,
            limit,
            reserve: (workers as u64 * CHUNK_BYTES).min(limit / 2),
            held: Mutex::default(),
            returned: Condvar::new(),
        }))
    }

    /// The buffers, for registering with the kernel.
    #[must_use]
    pub const fn arena(&self) -> &Arc<BufferArena> {
        &self.arena
    }

    /// Bytes that may be held.
    #[must_use]
    pub const fn limit_bytes(&self) -> u64 {
        self.limit
    }

    /// Bytes held now, and the most so far.
    #[must_use]
    pub fn held_bytes(&self) -> (u64, u64) {
        let held = self.held();
        (held.now, held.peak)
    }

    /// A buffer for one chunk; waits for room, `None` once `stop` is set.
    #[must_use]
    pub fn buffer(self: &Arc<Self>, stop: &AtomicBool) -> Option<ChunkBuffer> {
        let mut held = self.held();
        while !self.admits(*held) {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            held = self.returned.wait_timeout(held, WAKE).unwrap_or_else(PoisonError::into_inner).0;
        }
        (!stop.load(Ordering::Relaxed)).then(|| self.lease(held))
    }

    /// A buffer for one chunk if there is room now.
    #[must_use]
    pub fn try_buffer(self: &Arc<Self>) -> Option<ChunkBuffer> {
        let held = self.held();
        self.admits(*held).then(|| self.lease(held))
    }

    /// A copy of `bytes` on this budget's account. Never waits: what the workers add was kept free.
    #[must_use]
    pub fn own(self: &Arc<Self>, bytes: &[u8]) -> Bytes {
        let charge = self.charge(&mut self.held(), bytes.len() as u64);
        Bytes::from_owner(Owned { bytes: bytes.into(), _charge: charge })
    }

    const fn admits(&self, held: Held) -> bool {
        held.now == 0 || held.now + CHUNK_BYTES <= self.limit - self.reserve
    }

    fn lease(self: &Arc<Self>, mut held: MutexGuard<'_, Held>) -> ChunkBuffer {
        let charge = self.charge(&mut held, CHUNK_BYTES);
        drop(held);
        // Every leased slot is charged, so a slot is free whenever the charges leave room for one.
        ChunkBuffer { buffer: self.arena.lease(), _charge: charge }
    }

    fn charge(self: &Arc<Self>, held: &mut Held, bytes: u64) -> Charge {
        held.now += bytes;
        held.peak = held.peak.max(held.now);
        Charge { budget: Arc::clone(self), bytes }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic elsewhere leaves whole numbers.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of the budget in use.
#[derive(Debug)]
struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.held().now -= self.bytes;
        self.budget.returned.notify_one();
    }
}

/// A chunk's buffer. Fields drop in order: the slot is free before its charge is, so no lease ever waits.
#[derive(Debug)]
pub struct ChunkBuffer {
    buffer: PoolBuf,
    _charge: Charge,
}

impl ChunkBuffer {
    /// The bytes, `len` of them.
    ///
    /// # Panics
    /// When `len` is more than a chunk.
    pub fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        self.buffer.set_len(len);
        &mut self.buffer
    }

    /// The same bytes to be shared, not copied.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for ChunkBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

struct Owned {
    bytes: Box<[u8]>,
    _charge: Charge,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static NEVER: AtomicBool = AtomicBool::new(false);

    #[test]
    fn reads_are_admitted_until_only_the_workers_part_is_left() {
        let budget = Budget::new(64 << 20, 4).unwrap();
        assert_eq!(budget.limit_bytes(), 64 << 20);
        let mut held: Vec<_> = std::iter::from_fn(|| budget.try_buffer()).collect();
        assert_eq!(held.len(), 12, "16 chunks less one for each of four workers");
        // All four workers compress their chunk badly: the limit still holds.
        let compressed: Vec<_> = (0..4).map(|_| budget.own(&vec![1; CHUNK_BYTES as usize])).collect();
        assert_eq!(budget.held_bytes(), (64 << 20, 64 << 20));
        held.truncate(8);
        assert!(budget.try_buffer().is_none(), "compressed bytes count as well");
        drop(compressed);
        assert!(budget.try_buffer().is_some());
        drop(held);
        assert_eq!(budget.held_bytes(), (0, 64 << 20));
    }

    #[test]
    fn one_read_is_always_allowed() {
        let budget = Budget::new(0, 64).unwrap();
        let first = budget.try_buffer().unwrap();
        assert!(budget.try_buffer().is_none());
        drop(first);
        assert!(budget.try_buffer().is_some());
    }

    #[test]
    fn a_charge_lasts_as_long_as_the_last_slice_of_its_bytes() {
        let budget = Budget::new(64 << 20, 1).unwrap();
        let mut buffer = budget.try_buffer().unwrap();
        buffer.bytes_mut(4096).fill(7);
        let bytes = buffer.into_bytes();
        let slice = bytes.slice(100..200);
        drop(bytes);
        assert_eq!(budget.held_bytes().0, CHUNK_BYTES);
        assert_eq!(slice, [7; 100].as_slice());
        drop(slice);
        assert_eq!(budget.held_bytes().0, 0);
        let owned = budget.own(b"abc");
        assert_eq!((budget.held_bytes().0, owned.as_ref()), (3, b"abc".as_slice()));
    }

    #[test]
    fn a_waiting_reader_goes_on_when_memory_comes_back_and_gives_up_when_it_is_to_stop() {
        let budget = Budget::new(0, 1).unwrap();
        let stop = AtomicBool::new(false);
        let first = budget.try_buffer().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| budget.buffer(&NEVER).map(drop));
            drop(first);
            assert!(waiting.join().unwrap().is_some());
            let _second = budget.try_buffer().unwrap();
            let stopped = scope.spawn(|| budget.buffer(&stop).map(drop));
            stop.store(true, Ordering::Relaxed);
            assert!(stopped.join().unwrap().is_none());
        });
    }
}
