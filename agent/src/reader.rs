//! Reading one disk: a thread that reads chunks with a deep queue and hands them to the session.
//!
//! Invariants: a device is read past the page cache, or not at all: another file system's cache may hold what the
//! device does not yet; memory is one arena per disk, so the reader waits when its chunks are still under way; the
//! machine's own work comes first, as far as `read_rate` says. Units: bytes, sectors. Started by `session` when a
//! disk is first offered.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::io::buffer::BufferArena;
use reprotect_engine::io::{self, BlockFile, ReadAt};
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{SECTOR_BYTES, SectorRange, Timestamp};

/// Chunks read by one call: 16 MiB in flight keep any disk busy.
const CHUNKS_PER_READ: usize = 4;

/// What came of a read.
#[derive(Debug)]
pub struct ChunkRead {
    /// The chunk.
    pub chunk: SectorRange,
    /// The epoch it was asked in.
    pub epoch: u64,
    /// Whether hashes are wanted.
    pub hash: bool,
    /// Its data and when they were read, or why they could not be.
    pub data: Result<(Bytes, Timestamp), String>,
}

/// A wish.
#[derive(Clone, Copy, Debug)]
pub struct ReadJob {
    /// The chunk.
    pub chunk: SectorRange,
    /// The epoch it is asked in.
    pub epoch: u64,
    /// Whether hashes are wanted; handed back.
    pub hash: bool,
}

/// Limits reading to a rate, all disks together: each read reserves its share of time.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Throttle {
    /// A limit, or none.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may be read.
    pub fn wait(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let span = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let start = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*free_at).max(Instant::now());
            *free_at = start + span;
            start
        };
        std::thread::sleep(start.saturating_duration_since(Instant::now()));
    }
}

/// A running reader.
#[derive(Debug)]
pub struct DiskReader {
    jobs: mpsc::Sender<ReadJob>,
    size_sectors: u64,
    read_bytes: Arc<AtomicU64>,
}

/// Why a disk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReaderError {
    /// It cannot be opened.
    #[error(transparent)]
    Block(#[from] io::BlockError),
    /// Reading it would go through the page cache.
    #[error(
        "{} can only be read through the page cache, which may hide changes; use a kernel and file system with O_DIRECT", path.display()
    )]
    NotDirect {
        /// The device.
        path: PathBuf,
    },
    /// No memory for the buffers.
    #[error(transparent)]
    Arena(#[from] io::buffer::ArenaError),
    /// No thread.
    #[error("cannot start a reader thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl DiskReader {
    /// Opens the disk and starts its thread; `slots` chunks of memory at most. Blocks while opening.
    ///
    /// # Errors
    /// When the disk cannot be opened or must not be read this way.
    pub fn start(
        path: PathBuf,
        is_device: bool,
        slots: usize,
        throttle: Arc<Throttle>,
        deliver: impl Fn(ChunkRead) + Send + 'static,
    ) -> Result<Self, ReaderError> {
        let arena = BufferArena::new(slots.max(2), CHUNK_BYTES as usize)?;
        let options = io::OpenOptions { arena: Some(Arc::clone(&arena)), ..io::OpenOptions::reading() };
        let (file, backend) = io::open_reporting(&path, &options)?;
        if is_device && !backend.is_direct() {
            return Err(ReaderError::NotDirect { path });
        }
        tracing::info!(path = %path.display(), %backend, bytes = file.size_bytes(), "disk opened for reading");
        let size_sectors = file.size_bytes() / SECTOR_BYTES;
        let (jobs, wishes) = mpsc::channel();
        let read_bytes = Arc::new(AtomicU64::new(0));
        let mut thread =
            ReaderThread { file, arena, throttle, read_bytes: Arc::clone(&read_bytes), deliver: Box::new(deliver) };
        std::thread::Builder::new().name("disk-reader".into()).spawn(move || thread.run(&wishes))?;
        Ok(Self { jobs, size_sectors, read_bytes })
    }

    /// Asks for a chunk; the pass's window bounds how many are asked for.
    pub fn read(&self, job: ReadJob) {
        // A failed send means that the thread ended by a panic, which was logged.
        let _ = self.jobs.send(job);
    }

    /// Size of the disk when it was opened.
    #[must_use]
    pub const fn size_sectors(&self) -> u64 {
        self.size_sectors
    }

    /// Bytes read so far.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

struct ReaderThread {
    file: Box<dyn BlockFile>,
    arena: Arc<BufferArena>,
    throttle: Arc<Throttle>,
    read_bytes: Arc<AtomicU64>,
    deliver: Box<dyn Fn(ChunkRead) + Send>,
}

impl ReaderThread {
    fn run(&mut self, wishes: &mpsc::Receiver<ReadJob>) {
        while let Ok(first) = wishes.recv() {
            let mut jobs = vec![first];
            let mut buffers = vec![self.arena.lease()];
            while jobs.len() < CHUNKS_PER_READ
                && let Some(buffer) = self.arena.try_lease()
            {
                match wishes.try_recv() {
                    Ok(job) => {
                        jobs.push(job);
                        buffers.push(buffer);
                    }
                    Err(_) => break,
                }
            }
            self.read(&jobs, buffers);
        }
    }

    fn read(&mut self, jobs: &[ReadJob], mut buffers: Vec<io::buffer::PoolBuf>) {
        let total: u64 = jobs.iter().map(|job| job.chunk.bytes()).sum();
        self.throttle.wait(total);
        let time = wall_clock();
        for (job, buffer) in jobs.iter().zip(&mut buffers) {
            buffer.set_len(job.chunk.bytes() as usize); // at most CHUNK_BYTES, the slot's size
        }
        let mut reads: Vec<ReadAt<'_>> = jobs
            .iter()
            .zip(&mut buffers)
            .map(|(job, buffer)| ReadAt { offset: job.chunk.byte_start(), data: buffer })
            .collect();
        let result = self.file.read(&mut reads).map_err(|error| error.to_string());
        drop(reads);
        self.read_bytes.fetch_add(total, Ordering::Relaxed);
        for (job, buffer) in jobs.iter().zip(buffers) {
            let data = result.clone().map(|()| (buffer.into_bytes(), time));
            (self.deliver)(ChunkRead { chunk: job.chunk, epoch: job.epoch, hash: job.hash, data });
        }
    }
}
