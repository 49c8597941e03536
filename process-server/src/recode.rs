//! Compression on its own threads: records in, the same records out, raw payloads replaced where that saves bytes.
//!
//! Invariants: the async runtime never compresses and never waits for a worker; what does not compress stays raw; a
//! record's checksums, place and order are not touched. The queue needs no bound of its own in normal running, because
//! each job's records stand in a disk's window (see `budget`); it has one all the same, the whole budget, so that a
//! fault elsewhere cannot grow it. Jobs of a session that is gone are thrown away unread.
//! Units: bytes, nanoseconds. Called by `relay`; the level is steered from `daemon` a few times a second.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use reprotect_engine::compress::{Compressor, LEVEL_DEFAULT, LevelController, Load};
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::host::values::LevelText;
use reprotect_engine::limits::BATCH_PLAIN_BYTES_MAX;
use reprotect_engine::units::MonoTime;
use tokio::sync::mpsc;

/// The queue counts as full for the level at two batches per worker: more waiting gains nothing.
const QUEUE_FULL_BATCHES: u64 = 2;

/// A finished job.
#[derive(Debug)]
pub struct Recoded {
    /// As submitted.
    pub job: u64,
    /// The records, as many as submitted, in their order.
    pub records: Vec<Record>,
}

/// The queue holds as many bytes as the memory budget: its users do not keep to their windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the compression queue is full")]
pub struct QueueFull;

#[derive(Debug)]
struct Job {
    job: u64,
    records: Vec<Record>,
    bytes: u64,
    reply: mpsc::UnboundedSender<Recoded>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    bytes: u64,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    bytes_max: u64,
    level: AtomicI32,
    busy_nanos: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until there is a job; `None` when the pool closes.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                queue.bytes -= job.bytes;
                return Some(job);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The threads and their queue; dropping it ends them after the record each is at.
#[derive(Debug)]
pub struct RecodePool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl RecodePool {
    /// Starts `workers` threads.
    ///
    /// # Errors
    /// When a thread or zstd's memory cannot be had.
    pub fn start(workers: usize, level: LevelText, queue_bytes_max: u64) -> std::io::Result<Self> {
        let level = match level {
            LevelText::Fixed(level) => level,
            LevelText::Adaptive => LEVEL_DEFAULT,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            bytes_max: queue_bytes_max,
            level: AtomicI32::new(level),
            busy_nanos: AtomicU64::new(0),
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(workers) };
        for number in 0..workers.max(1) {
            let compressor = Compressor::new(level).map_err(std::io::Error::other)?;
            let shared = Arc::clone(&pool.shared);
            let name = format!("recode-{number}");
            pool.threads
                .push(std::thread::Builder::new().name(name).spawn(move || work(&shared, compressor))?);
        }
        Ok(pool)
    }

    /// Queues a job; its result goes to `reply`. Never blocks.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub fn submit(
        &self,
        job: u64,
        records: Vec<Record>,
        reply: mpsc::UnboundedSender<Recoded>,
    ) -> Result<(), QueueFull> {
        let bytes = records.iter().map(|record| record.payload().len() as u64).sum();
        let mut queue = self.shared.queue();
        if queue.bytes + bytes > self.shared.bytes_max {
            return Err(QueueFull);
        }
        queue.bytes += bytes;
        queue.jobs.push_back(Job { job, records, bytes, reply });
        drop(queue);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Number of threads.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.threads.len()
    }

    /// The level in use.
    #[must_use]
    pub fn level(&self) -> i32 {
        self.shared.level.load(Ordering::Relaxed)
    }
}

impl Drop for RecodePool {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so already; its jobs' sessions end with their deadline.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared, mut compressor: Compressor) {
    while let Some(Job { job, mut records, reply, .. }) = shared.next() {
        for record in &mut records {
            if reply.is_closed() || record.codec() != Codec::Raw {
                continue;
            }
            let started = Instant::now();
            if let Some(stored) = compress(&mut compressor, shared.level.load(Ordering::Relaxed), record) {
                *record = record.recoded(stored);
            }
            let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            shared.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
        }
        // An error means that the session is gone.
        let _ = reply.send(Recoded { job, records });
    }
}

/// The compressed payload, if it is smaller. A compressor that fails costs ratio, not data: the record stays raw.
fn compress(compressor: &mut Compressor, level: i32, record: &Record) -> Option<Bytes> {
    let result = compressor.set_level(level).and_then(|()| compressor.compress(record.payload()));
    match result {
        Ok(stored) => stored
            .filter(|stored| !stored.is_empty() && stored.len() < record.payload().len())
            .map(Bytes::from),
        Err(error) => {
            tracing::warn!(%error, "a record is forwarded uncompressed");
            None
        }
    }
}

/// Chooses the level from what is scarce, where the operator did not fix it.
#[derive(Debug)]
pub struct Governor {
    controller: LevelController,
    last: Option<(MonoTime, u64)>,
}

impl Default for Governor {
    fn default() -> Self {
        Self { controller: LevelController::new(LEVEL_DEFAULT), last: None }
    }
}

impl Governor {
    /// One observation: how busy the workers were since the last, how full their queue is, and how full
    /// (`output_permille`) what waits for the transport.
    pub fn observe(&mut self, pool: &RecodePool, now: MonoTime, output_permille: u16) {
        let busy = pool.shared.busy_nanos.load(Ordering::Relaxed);
        let Some((then, before)) = self.last.replace((now, busy)) else { return };
        let time = now.nanos_since(then).saturating_mul(pool.workers() as u64);
        let full = QUEUE_FULL_BATCHES * BATCH_PLAIN_BYTES_MAX * pool.workers() as u64;
        let queued = pool.shared.queue().bytes;
        let load = Load {
            busy_permille: permille(busy.saturating_sub(before), time),
            input_permille: permille(queued, full),
            output_permille: output_permille.min(1000),
        };
        let old = pool.level();
        let level = self.controller.observe(now, load);
        if level != old {
            tracing::info!(old, level, ?load, "compression level changed");
            pool.shared.level.store(level, Ordering::Relaxed);
        }
    }
}

/// `part` of `whole` in thousandths, at most 1000.
#[must_use]
pub fn permille(part: u64, whole: u64) -> u16 {
    if whole == 0 { 0 } else { (u128::from(part) * 1000 / u128::from(whole)).min(1000) as u16 }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::compress::EVIDENCE_NANOS;

    use super::*;

    fn noise(len: usize) -> Bytes {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_compresses_is_compressed_and_what_does_not_stays_raw_in_order() {
        let pool = RecodePool::start(2, LevelText::Fixed(1), 64 << 20).unwrap();
        let (reply, mut done) = mpsc::unbounded_channel();
        let records = vec![
            Record::data(0, Bytes::from(vec![7; 65536])),
            Record::data(128, noise(65536)),
            Record::zeros(reprotect_engine::units::SectorRange::new(256, 300)),
        ];
        for job in 0..20 {
            pool.submit(job, records.clone(), reply.clone()).unwrap();
        }
        let mut seen = Vec::new();
        for _ in 0..20 {
            let recoded = done.blocking_recv().unwrap();
            seen.push(recoded.job);
            let codecs: Vec<_> = recoded.records.iter().map(Record::codec).collect();
            assert_eq!(codecs, [Codec::Zstd, Codec::Raw, Codec::None]);
            for (new, old) in recoded.records.iter().zip(&records) {
                assert_eq!((new.range(), new.fragment_crcs()), (old.range(), old.fragment_crcs()));
                new.check_stored().unwrap();
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn the_queue_is_bounded_and_jobs_of_a_gone_session_are_dropped() {
        let pool = RecodePool::start(1, LevelText::Fixed(-5), 1 << 20).unwrap();
        let (reply, done) = mpsc::unbounded_channel();
        let record = Record::data(0, noise(1 << 20));
        assert_eq!(pool.submit(1, vec![record.clone(), record.clone()], reply.clone()), Err(QueueFull));
        drop(done);
        pool.submit(2, vec![record], reply).unwrap();
        drop(pool); // ends, whatever is queued
    }

    #[test]
    fn an_idle_processor_behind_a_slow_link_raises_the_level() {
        let pool = RecodePool::start(1, LevelText::Adaptive, 1 << 20).unwrap();
        let mut governor = Governor::default();
        let before = pool.level();
        for step in 0..20 {
            governor.observe(&pool, MonoTime(step * EVIDENCE_NANOS / 8), 1000);
        }
        assert!(pool.level() > before);
    }
}
