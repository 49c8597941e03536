//! The agent's computing threads: hashing, cutting, checksums, compression.
//!
//! Invariants: the queue holds at most what the passes' windows allow (16 chunks a disk); a job's result says which
//! disk, chunk and epoch it belongs to, so that a late one is recognised; nothing here waits for disk or network.
//! Started by `daemon`, one pool for all disks.

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use bytes::Bytes;
use reprotect_engine::checksum::{UnitHash, unit_hash};
use reprotect_engine::compress::Compressor;
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::limits::{
    BULK_RECORD_BYTES_MAX, COMPARE_FINE_BYTES, COMPARE_UNIT_BYTES, DELTA_RECORD_BYTES_MAX,
};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::proto::pass::{Sink, hash_spans};
use reprotect_engine::units::{DiskId, SectorRange, Sequence, Timestamp};
use tokio::sync::mpsc as async_mpsc;

/// What a job belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobKey {
    /// The disk.
    pub disk: DiskId,
    /// The epoch it was wanted in.
    pub epoch: u64,
    /// The chunk.
    pub chunk: SectorRange,
}

/// Something to compute.
#[derive(Debug)]
pub enum Job {
    /// Hash the units of a chunk, or with `units` those units finely.
    Hash {
        /// Whose.
        key: JobKey,
        /// Its data.
        data: Bytes,
        /// Units to refine.
        units: Option<Vec<u16>>,
    },
    /// Make records of pieces of a chunk.
    Cut {
        /// Whose.
        key: JobKey,
        /// Its data.
        data: Bytes,
        /// The pieces.
        pieces: Vec<SectorRange>,
        /// Where they go.
        sink: Sink,
        /// Newest delta sequence when the data were read.
        as_of: Sequence,
        /// When they were read.
        time: Timestamp,
        /// Whether to compress.
        compress: bool,
    },
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    /// Unit hashes.
    Hashed(JobKey, Vec<UnitHash>),
    /// Fine hashes.
    HashedFine(JobKey, Vec<UnitHash>),
    /// Records.
    Cut {
        /// Whose.
        key: JobKey,
        /// The records.
        records: Vec<Record>,
        /// As given.
        as_of: Sequence,
        /// As given.
        time: Timestamp,
    },
}

/// What the pool is doing, for the level controller and `status`.
#[derive(Debug, Default)]
pub struct PoolLoad {
    /// Nanoseconds of work done, all threads.
    pub busy_nanos: AtomicU64,
    /// Jobs waiting.
    pub waiting: AtomicUsize,
    /// zstd level in use.
    pub level: AtomicI32,
}

/// A pool of threads.
#[derive(Debug)]
pub struct Workers {
    jobs: mpsc::Sender<Job>,
    load: Arc<PoolLoad>,
    threads: usize,
}

impl Workers {
    /// Starts `threads` threads that compress at `level`; results go to `done`.
    ///
    /// # Errors
    /// When the system gives no threads or zstd no context.
    pub fn start(threads: usize, level: i32, done: &async_mpsc::UnboundedSender<Done>) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let load = Arc::new(PoolLoad::default());
        load.level.store(level, Ordering::Relaxed);
        for index in 0..threads.max(1) {
            let mut worker = Worker {
                queue: Arc::clone(&queue),
                load: Arc::clone(&load),
                done: done.clone(),
                compressor: Compressor::new(level)?,
                level,
            };
            std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || worker.run())?;
        }
        Ok(Self { jobs, load, threads: threads.max(1) })
    }

    /// Queues a job.
    pub fn submit(&self, job: Job) {
        self.load.waiting.fetch_add(1, Ordering::Relaxed);
        // A failed send means that every thread panicked, which was logged.
        let _ = self.jobs.send(job);
    }

    /// What the pool is doing.
    #[must_use]
    pub const fn load(&self) -> &Arc<PoolLoad> {
        &self.load
    }

    /// Number of threads.
    #[must_use]
    pub const fn threads(&self) -> usize {
        self.threads
    }
}

struct Worker {
    queue: Arc<Mutex<mpsc::Receiver<Job>>>,
    load: Arc<PoolLoad>,
    done: async_mpsc::UnboundedSender<Done>,
    compressor: Compressor,
    level: i32,
}

impl Worker {
    fn run(&mut self) {
        loop {
            // The lock is held while waiting: one thread waits for a job, the others for the lock.
            let job = self.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(job) = job else { return };
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            let start = Instant::now();
            let done = self.compute(job);
            let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.load.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
            if self.done.send(done).is_err() {
                return;
            }
        }
    }

    fn compute(&mut self, job: Job) -> Done {
        match job {
            Job::Hash { key, data, units: None } => {
                Done::Hashed(key, hashes(&data, key.chunk, COMPARE_UNIT_BYTES, &[]))
            }
            Job::Hash { key, data, units: Some(units) } => {
                Done::HashedFine(key, hashes(&data, key.chunk, COMPARE_FINE_BYTES, &units))
            }
            Job::Cut { key, data, pieces, sink, as_of, time, compress } => {
                let record_bytes_max = match sink {
                    Sink::Bulk => BULK_RECORD_BYTES_MAX,
                    Sink::Delta => DELTA_RECORD_BYTES_MAX,
                };
                let mut records = cut_records(key.chunk.start, &data, &pieces, record_bytes_max);
                if compress {
                    self.compress(&mut records);
                }
                Done::Cut { key, records, as_of, time }
            }
        }
    }

    /// Compresses what gets smaller; the rest stays raw.
    fn compress(&mut self, records: &mut [Record]) {
        let level = self.load.level.load(Ordering::Relaxed);
        if level != self.level && self.compressor.set_level(level).is_ok() {
            self.level = level;
        }
        for record in records.iter_mut().filter(|record| record.codec() == Codec::Raw) {
            match self.compressor.compress(record.payload()) {
                Ok(Some(stored)) => *record = record.recoded(stored.into()),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a record could not be compressed and is sent as it is"),
            }
        }
    }
}

fn hashes(data: &Bytes, chunk: SectorRange, unit_bytes: u64, units: &[u16]) -> Vec<UnitHash> {
    hash_spans(chunk, unit_bytes, units)
        .into_iter()
        .map(|span| unit_hash(data.get(span).unwrap_or_default()))
        .collect()
}
