//! The agent's computing threads: hashing, cutting, checksums, compression.
//!
//! Invariants: the queue holds at most what the passes' windows allow (16 chunks a disk); a job's result says which
//! disk, chunk and epoch it belongs to, so that a late one is recognised; nothing here waits for disk or network; what
//! a job's records hold is on the disk's budget, and never more than the chunk they came from.
//! Started by `machine`, one pool for all disks.

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::compress::Compressor;
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::limits::{BULK_RECORD_BYTES_MAX, DELTA_RECORD_BYTES_MAX};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::proto::compare::{Computed, Question, unit_hashes};
use reprotect_engine::proto::pass::Sink;
use reprotect_engine::units::{DiskId, SectorRange, Sequence, Timestamp};
use tokio::sync::mpsc as async_mpsc;

use crate::budget::Budget;

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
    /// Hash the units of a chunk.
    Hash {
        /// Whose.
        key: JobKey,
        /// Its data.
        data: Bytes,
    },
    /// Compute something of a chunk that is compared.
    Compute {
        /// Whose.
        key: JobKey,
        /// Its data.
        data: Bytes,
        /// What.
        question: Question,
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
        /// The disk's memory.
        budget: Arc<Budget>,
    },
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    /// Unit hashes.
    Hashed(JobKey, Vec<UnitHash>),
    /// What was asked.
    Computed(JobKey, Computed),
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
    pub fn start(
        threads: usize,
        level: i32,
        done: &async_mpsc::UnboundedSender<Done>,
    ) -> anyhow::Result<Self> {
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
                stored: Vec::new(),
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
    /// Where every record is compressed to before its bytes are copied: one warm buffer instead of fresh pages.
    stored: Vec<u8>,
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
            Job::Hash { key, data } => Done::Hashed(key, unit_hashes(&data)),
            Job::Compute { key, data, question } => Done::Computed(key, question.answer(&data)),
            Job::Cut { key, data, pieces, sink, as_of, time, compress, budget } => {
                let record_bytes_max = match sink {
                    Sink::Bulk => BULK_RECORD_BYTES_MAX,
                    Sink::Delta => DELTA_RECORD_BYTES_MAX,
                };
                let mut records = cut_records(key.chunk.start, &data, &pieces, record_bytes_max);
                let recoded = compress && self.compress(&mut records, &budget);
                release_chunk(&mut records, data.len(), recoded, &budget);
                Done::Cut { key, records, as_of, time }
            }
        }
    }

    /// Compresses what gets smaller; the rest stays raw. Whether anything got smaller.
    fn compress(&mut self, records: &mut [Record], budget: &Arc<Budget>) -> bool {
        let level = self.load.level.load(Ordering::Relaxed);
        if level != self.level && self.compressor.set_level(level).is_ok() {
            self.level = level;
        }
        let mut recoded = false;
        for record in records.iter_mut().filter(|record| record.codec() == Codec::Raw) {
            match self.compressor.compress_into(record.payload(), &mut self.stored) {
                Ok(true) => {
                    *record = record.recoded(budget.own(&self.stored));
                    recoded = true;
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "a record could not be compressed and is sent as it is"),
            }
        }
        recoded
    }
}

/// Copies what is still raw out of the chunk's buffer where that frees more than it costs: a few raw records must not
/// hold a whole chunk until they are durable, nor a chunk count twice beside its compressed part. A chunk that is
/// sent (nearly) whole and raw stays where it was read.
fn release_chunk(records: &mut [Record], chunk_bytes: usize, recoded: bool, budget: &Arc<Budget>) {
    let raw = |record: &&mut Record| record.codec() == Codec::Raw;
    let raw_bytes: usize = records.iter_mut().filter(raw).map(|record| record.payload().len()).sum();
    if raw_bytes == 0 || (!recoded && raw_bytes >= chunk_bytes / 4 * 3) {
        return;
    }
    for record in records.iter_mut().filter(raw) {
        *record = record.opened(budget.own(record.payload()));
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::limits::CHUNK_BYTES;

    use super::*;

    const CHUNK: usize = CHUNK_BYTES as usize;

    fn noise(bytes: &mut [u8]) {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in bytes.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }

    /// Cuts a chunk whose content `fill` makes, in the pool; answers the records and what the budget then holds.
    fn cut(compress: bool, pieces: &[SectorRange], fill: impl Fn(&mut [u8])) -> (Vec<Record>, u64) {
        let budget = Budget::new(64 << 20, 1).unwrap();
        let (done, mut results) = async_mpsc::unbounded_channel();
        let workers = Workers::start(1, -1, &done).unwrap();
        let mut buffer = budget.try_buffer().unwrap();
        fill(buffer.bytes_mut(CHUNK));
        let chunk = SectorRange::new(0, CHUNK_BYTES / 512);
        workers.submit(Job::Cut {
            key: JobKey { disk: DiskId([1; 16]), epoch: 1, chunk },
            data: buffer.into_bytes(),
            pieces: pieces.to_vec(),
            sink: Sink::Bulk,
            as_of: Sequence::ZERO,
            time: Timestamp::ZERO,
            compress,
            budget: Arc::clone(&budget),
        });
        let Some(Done::Cut { records, .. }) = results.blocking_recv() else { panic!("no records") };
        (records, budget.held_bytes().0)
    }

    const WHOLE: [SectorRange; 1] = [SectorRange { start: 0, end: CHUNK_BYTES / 512 }];

    #[test]
    fn a_raw_chunk_is_not_copied() {
        let (records, held) = cut(false, &WHOLE, noise);
        assert_eq!(held, CHUNK_BYTES);
        let starts: Vec<usize> = records.iter().map(|record| record.payload().as_ptr().addr()).collect();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 1 << 20), "one buffer: {starts:?}");
    }

    #[test]
    fn compressed_records_hold_only_their_own_bytes() {
        let (records, held) = cut(true, &WHOLE, |chunk| chunk.fill(b'x'));
        assert!(records.iter().all(|record| record.codec() == Codec::Zstd));
        assert_eq!(held, records.iter().map(|record| record.payload().len() as u64).sum::<u64>());
        assert!(held < CHUNK_BYTES / 10, "{held}");
    }

    #[test]
    fn a_mixed_chunk_never_holds_more_than_its_size() {
        let (records, held) = cut(true, &WHOLE, |chunk| {
            chunk.fill(b'x');
            noise(&mut chunk[CHUNK / 2..]);
        });
        let codecs: Vec<Codec> = records.iter().map(Record::codec).collect();
        assert_eq!(codecs, [Codec::Zstd, Codec::Zstd, Codec::Raw, Codec::Raw]);
        assert_eq!(held, records.iter().map(|record| record.payload().len() as u64).sum::<u64>());
        assert!(held < CHUNK_BYTES, "{held}");
    }

    #[test]
    fn a_few_changed_blocks_do_not_hold_the_chunk() {
        let (records, held) = cut(false, &[SectorRange::new(80, 88), SectorRange::new(800, 816)], noise);
        assert_eq!((records.len(), held), (2, 3 * 4096));
        let mut expected = vec![0; CHUNK];
        noise(&mut expected);
        assert_eq!(records[1].payload(), &expected[800 * 512..816 * 512]);
    }

    #[test]
    fn zeros_hold_nothing() {
        let (records, held) = cut(true, &WHOLE, |_| {});
        assert!(records.iter().all(|record| record.plain_bytes() == 0));
        assert_eq!(held, 0);
    }
}
