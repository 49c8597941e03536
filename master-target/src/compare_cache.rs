//! Chunks of a target that were compared a moment ago, kept in memory: a question about the units that differ follows, and
//! would read them a second time.
//!
//! Why not what the answer needs instead: which blocks it is about is known only then, and a hash of each block costs
//! four times what the hash of a unit does.
//!
//! Invariants: a kept chunk is what the target holds with every write that returned: whoever writes calls
//! [`CompareCache::forget`] first; a chunk is handed out once. Memory: [`CHUNKS_OPEN_MAX`] chunks of 4 MiB for each of at
//! most [`CACHES_MAX`] disks; the others read twice. It is given back [`IDLE`] after the last chunk.
//! Units: sectors, bytes. Used by `disk_writer`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reprotect_engine::io::buffer::{BufferArena, PoolBuf};
use reprotect_engine::limits::{CHUNK_BYTES, CHUNKS_OPEN_MAX};
use reprotect_engine::units::SectorRange;

/// Disks that may keep chunks at the same time, in all of the process: 256 MiB.
const CACHES_MAX: usize = 4;
/// How long memory outlives the last chunk that went through it.
const IDLE: Duration = Duration::from_secs(5);

/// How many disks have memory now.
static CACHES: AtomicUsize = AtomicUsize::new(0);

/// A disk's place among those that may keep chunks.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let more = |taken| (taken < CACHES_MAX).then_some(taken + 1);
        CACHES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        CACHES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The kept chunks of a disk, and the buffers of those that will be.
#[derive(Default)]
pub(crate) struct CompareCache {
    kept: VecDeque<(SectorRange, PoolBuf)>,
    memory: Option<(Arc<BufferArena>, Place, Instant)>,
}

impl CompareCache {
    /// A buffer for the next chunk; the oldest kept one gives way. `None` where other disks have all the memory.
    pub(crate) fn buffer(&mut self) -> Option<PoolBuf> {
        if self.memory.is_none() {
            let place = Place::take()?;
            let arena = BufferArena::new(CHUNKS_OPEN_MAX, CHUNK_BYTES as usize).ok()?;
            self.memory = Some((arena, place, Instant::now()));
        }
        let (arena, _, used) = self.memory.as_mut()?;
        *used = Instant::now();
        if arena.free_slots() == 0 {
            self.kept.pop_front();
        }
        arena.try_lease()
    }

    /// Keeps what the target holds in a range, from the buffer's start on.
    pub(crate) fn keep(&mut self, range: SectorRange, buffer: PoolBuf) {
        self.forget(range);
        self.kept.push_back((range, buffer));
    }

    /// What was kept of exactly this range, if it is still what the target holds.
    pub(crate) fn take(&mut self, range: SectorRange) -> Option<PoolBuf> {
        let at = self.kept.iter().position(|(kept, _)| *kept == range)?;
        self.kept.remove(at).map(|(_, buffer)| buffer)
    }

    /// The range will be written.
    pub(crate) fn forget(&mut self, range: SectorRange) {
        self.kept.retain(|(kept, _)| kept.intersect(range).is_empty());
    }

    /// Anything may happen to the target.
    pub(crate) fn forget_all(&mut self) {
        self.kept.clear();
    }

    /// Gives the memory back when nobody compares any more.
    pub(crate) fn tick(&mut self) {
        if self.memory.as_ref().is_some_and(|(_, _, used)| used.elapsed() >= IDLE) {
            self.kept.clear();
            self.memory = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64) -> SectorRange {
        SectorRange::new(start * 8192, (start + 1) * 8192)
    }

    fn keep(cache: &mut CompareCache, at: u64) {
        let mut buffer = cache.buffer().expect("a place");
        buffer.fill(at as u8);
        cache.keep(range(at), buffer);
    }

    #[test]
    fn a_chunk_is_handed_out_once_and_not_after_a_write_to_it() {
        let mut cache = CompareCache::default();
        (0..3).for_each(|at| keep(&mut cache, at));
        cache.forget(SectorRange::new(2 * 8192 - 1, 2 * 8192));
        assert!(cache.take(range(1)).is_none(), "it was written");
        assert!(cache.take(SectorRange::new(0, 8)).is_none(), "another range");
        assert!(cache.take(range(2)).is_some_and(|data| data.iter().all(|byte| *byte == 2)));
        assert!(cache.take(range(2)).is_none() && cache.take(range(0)).is_some());
        keep(&mut cache, 7);
        cache.forget_all();
        assert!(cache.take(range(7)).is_none());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_gives_way() {
        let mut cache = CompareCache::default();
        let count = CHUNKS_OPEN_MAX as u64 + 2;
        (0..count).for_each(|at| keep(&mut cache, at));
        let kept = (0..count).filter(|at| cache.take(range(*at)).is_some()).collect::<Vec<_>>();
        assert_eq!(kept, (2..count).collect::<Vec<_>>());
        cache.tick();
        assert!(cache.memory.is_some(), "it was just used");
        if let Some((_, _, used)) = &mut cache.memory {
            *used = used.checked_sub(IDLE).expect("a clock that has run for some seconds");
        }
        cache.tick();
        assert!(cache.memory.is_none());
    }
}
