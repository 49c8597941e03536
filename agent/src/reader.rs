//! Reading one disk: a thread that reads chunks with a deep queue and hands them to the session.
//!
//! Invariants: a device is read past the page cache, or not at all: another file system's cache may hold what the
//! device does not yet; payload memory is the disk's [`Budget`], so the reader waits when its chunks are still under
//! way; the machine's own work comes first, as far as `read_rate` says; a failed read costs only its own chunk, and where
//! that is to be read in parts, only the blocks that fail; holes of an image are known to be zeros and are not read.
//! Units: bytes, sectors.
//! Started by `opening` when a disk is offered or probed; dropping the [`DiskReader`] ends the thread soon.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::io::{self, BlockFile, ByteRange, ReadAt};
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{SECTOR_BYTES, SectorRange, Timestamp};

use crate::budget::{Budget, ChunkBuffer};
use crate::salvage::{Salvaged, is_alive};
use crate::throttle::Throttle;

/// Chunks read by one call: 16 MiB in flight keep any disk busy.
const CHUNKS_PER_READ: usize = 4;
/// How long it may take to read a chunk around what fails in it; what is left then is tried another time.
const PARTS_LIMIT: Duration = Duration::from_secs(10);
/// How often the disk's size is looked at.
const SIZE_CHECK: Duration = Duration::from_secs(2);
/// What every hole of an image reads as; not resident until touched, and then only once for all disks.
static ZEROS: [u8; CHUNK_BYTES as usize] = [0; CHUNK_BYTES as usize];

/// A wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadJob {
    /// The chunk.
    pub chunk: SectorRange,
    /// The epoch it is asked in.
    pub epoch: u64,
    /// Whether hashes are wanted; handed back.
    pub hash: bool,
    /// The parts of it that are read, ascending; all of it when empty. What is not read may hold anything.
    pub pieces: Vec<SectorRange>,
    /// What cannot be read is left out, instead of failing it all.
    pub in_parts: bool,
}

impl ReadJob {
    /// What is read of the chunk, in bytes.
    fn bytes(&self) -> u64 {
        if self.pieces.is_empty() {
            return self.chunk.bytes();
        }
        self.pieces.iter().map(|piece| piece.bytes()).sum()
    }
}

/// What a reader tells.
#[derive(Debug)]
pub enum FromDisk {
    /// A wish was tried.
    Read {
        /// The wish.
        job: ReadJob,
        /// What was read, or why nothing could be.
        data: Result<ChunkRead, String>,
    },
    /// The disk has this size now, in bytes; told once.
    Resized(u64),
}

/// A chunk that was read.
#[derive(Debug)]
pub struct ChunkRead {
    /// Its data.
    pub data: Bytes,
    /// When they were read.
    pub time: Timestamp,
    /// What could not be read of the job's pieces, ascending: the data hold nothing of it. Empty unless the job is read in
    /// parts.
    pub unread: Vec<SectorRange>,
}

/// What a reader needs.
pub struct ReaderSetup {
    /// The disk or image.
    pub path: PathBuf,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Its memory.
    pub budget: Arc<Budget>,
    /// The limit on reading.
    pub throttle: Arc<Throttle>,
    /// Where results go; called on the reader's thread.
    pub deliver: Box<dyn Fn(FromDisk) + Send>,
}

/// A running reader.
#[derive(Debug)]
pub struct DiskReader {
    jobs: mpsc::Sender<ReadJob>,
    size_sectors: u64,
    read_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
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
    /// No thread.
    #[error("cannot start a reader thread: {0}; raise the limit on processes")]
    Thread(#[from] std::io::Error),
}

impl DiskReader {
    /// Opens the disk and starts its thread. Blocks while opening.
    ///
    /// # Errors
    /// When the disk cannot be opened or must not be read this way.
    pub fn start(setup: ReaderSetup) -> Result<Self, ReaderError> {
        let arena = Some(Arc::clone(setup.budget.arena()));
        let options = io::OpenOptions { arena, ..io::OpenOptions::reading() };
        let (file, backend) = io::open_reporting(&setup.path, &options)?;
        if setup.is_device && !backend.is_direct() {
            return Err(ReaderError::NotDirect { path: setup.path });
        }
        tracing::info!(path = %setup.path.display(), %backend, bytes = file.size_bytes(), "disk opened for reading");
        Self::spawn(file, setup)
    }

    /// Starts the thread over an open file.
    fn spawn(file: Box<dyn BlockFile>, setup: ReaderSetup) -> Result<Self, ReaderError> {
        let ReaderSetup { path, is_device, budget, throttle, deliver } = setup;
        let size_sectors = file.size_bytes() / SECTOR_BYTES;
        let (jobs, wishes) = mpsc::channel();
        let (read_bytes, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let device_number = device_number(&path);
        let mut thread = ReaderThread {
            file,
            path,
            device_number,
            size_sectors,
            size_checked: Instant::now(),
            known_good: 0,
            resized: false,
            has_holes: !is_device,
            budget,
            throttle,
            read_bytes: Arc::clone(&read_bytes),
            stop: Arc::clone(&stop),
            deliver,
        };
        std::thread::Builder::new().name("disk-reader".into()).spawn(move || thread.run(&wishes))?;
        Ok(Self { jobs, size_sectors, read_bytes, stop })
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

    /// Bytes read so far; holes are not read.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for DiskReader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct ReaderThread {
    file: Box<dyn BlockFile>,
    path: PathBuf,
    device_number: Option<u64>,
    size_sectors: u64,
    size_checked: Instant,
    /// A sector at which something was read.
    known_good: u64,
    resized: bool,
    has_holes: bool,
    budget: Arc<Budget>,
    throttle: Arc<Throttle>,
    read_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    deliver: Box<dyn Fn(FromDisk) + Send>,
}

impl ReaderThread {
    fn run(&mut self, wishes: &mpsc::Receiver<ReadJob>) {
        loop {
            match wishes.recv_timeout(SIZE_CHECK) {
                Ok(first) => self.serve(first, wishes),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            self.check_size();
        }
    }

    /// Reads `first` and what else is wished for, in one call as far as memory allows.
    fn serve(&mut self, first: ReadJob, wishes: &mpsc::Receiver<ReadJob>) {
        let mut batch: Vec<(ReadJob, ChunkBuffer)> = Vec::with_capacity(CHUNKS_PER_READ);
        let mut next = Some(first);
        while let Some(job) = next.take() {
            if self.is_hole(job.chunk) {
                let zeros = Bytes::from_static(&ZEROS).slice(..job.chunk.bytes() as usize);
                self.deliver(job, Ok(ChunkRead { data: zeros, time: wall_clock(), unread: Vec::new() }));
            } else {
                // The first one waits for memory; more are taken along while there is some.
                let buffer =
                    if batch.is_empty() { self.budget.buffer(&self.stop) } else { self.budget.try_buffer() };
                match buffer {
                    Some(buffer) => batch.push((job, buffer)),
                    None if batch.is_empty() => return,
                    None => {
                        self.read(std::mem::take(&mut batch));
                        next = Some(job);
                        continue;
                    }
                }
            }
            if batch.len() < CHUNKS_PER_READ {
                next = wishes.try_recv().ok();
            }
        }
        self.read(batch);
    }

    fn is_hole(&mut self, chunk: SectorRange) -> bool {
        let range = ByteRange { start: chunk.byte_start(), end: chunk.byte_start() + chunk.bytes() };
        // A medium that cannot be asked is read.
        self.has_holes && self.file.allocated(range).is_ok_and(|data| data.is_empty())
    }

    fn read(&mut self, mut batch: Vec<(ReadJob, ChunkBuffer)>) {
        let total: u64 = batch.iter().map(|(job, _)| job.bytes()).sum();
        self.throttle.wait(total, &self.stop);
        if self.stop.load(Ordering::Relaxed) {
            return;
        }
        let time = wall_clock();
        if batch.len() > 1 && self.read_together(&mut batch).is_ok() {
            for (job, buffer) in batch {
                self.deliver(job, Ok(ChunkRead { data: buffer.into_bytes(), time, unread: Vec::new() }));
            }
            return;
        }
        // One chunk, or a batch that failed: each by itself, so that only the bad one fails.
        for entry in batch {
            let mut one = [entry];
            let time = wall_clock();
            let mut result = self.read_together(&mut one).map(|()| Vec::new());
            let [(job, mut buffer)] = one;
            if result.is_err() && job.in_parts {
                result = self.read_in_parts(&job, buffer.bytes_mut(job.chunk.bytes() as usize));
            }
            if self.stop.load(Ordering::Relaxed) {
                return; // what is not read for this reason is not unreadable
            }
            let read = result.map(|unread| ChunkRead { data: buffer.into_bytes(), time, unread });
            self.deliver(job, read);
        }
    }

    /// Reads what can be read; answers what cannot. Where nothing can, nor anything else of the disk, it has failed.
    fn read_in_parts(&mut self, job: &ReadJob, data: &mut [u8]) -> Result<Vec<SectorRange>, String> {
        let limit = Instant::now() + PARTS_LIMIT;
        let whole = [job.chunk];
        let pieces = if job.pieces.is_empty() { &whole[..] } else { &job.pieces };
        let mut salvaged = Salvaged::default();
        for piece in pieces {
            let from = (piece.byte_start() - job.chunk.byte_start()) as usize;
            if let Some(data) = data.get_mut(from..from + piece.bytes() as usize) {
                let is_over = || self.stop.load(Ordering::Relaxed) || Instant::now() >= limit;
                salvaged.read(&mut *self.file, *piece, data, &is_over);
            }
        }
        if self.stop.load(Ordering::Relaxed) {
            return Ok(Vec::new()); // nobody is told
        }
        let missing = salvaged.unread.sector_count() * SECTOR_BYTES;
        self.read_bytes.fetch_add(job.bytes() - missing, Ordering::Relaxed);
        if let Some(reason) = salvaged.reason
            && missing == job.bytes()
            && !is_alive(&mut *self.file, self.size_sectors, self.known_good)
        {
            return Err(reason);
        }
        Ok(salvaged.unread.iter().collect())
    }

    fn read_together(&mut self, batch: &mut [(ReadJob, ChunkBuffer)]) -> Result<(), String> {
        let mut reads: Vec<ReadAt<'_>> = Vec::with_capacity(batch.len());
        for (job, buffer) in batch {
            // At most a chunk, the slot's size.
            let mut rest = buffer.bytes_mut(job.chunk.bytes() as usize);
            if job.pieces.is_empty() {
                reads.push(ReadAt { offset: job.chunk.byte_start(), data: rest });
                continue;
            }
            let mut at = job.chunk.byte_start();
            for piece in &job.pieces {
                let (_, behind) = rest.split_at_mut((piece.byte_start() - at) as usize);
                let (data, behind) = behind.split_at_mut(piece.bytes() as usize);
                reads.push(ReadAt { offset: piece.byte_start(), data });
                (rest, at) = (behind, piece.byte_start() + piece.bytes());
            }
        }
        let bytes: u64 = reads.iter().map(|read| read.data.len() as u64).sum();
        let first = reads.first().map_or(0, |read| read.offset / SECTOR_BYTES);
        self.file.read(&mut reads).map_err(|error| error.to_string())?;
        self.known_good = first;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn deliver(&self, job: ReadJob, data: Result<ChunkRead, String>) {
        (self.deliver)(FromDisk::Read { job, data });
    }

    /// Tells once that the disk is not what it was.
    fn check_size(&mut self) {
        if self.resized || self.size_checked.elapsed() < SIZE_CHECK {
            return;
        }
        self.size_checked = Instant::now();
        // Another device may stand at the path now; reads tell when ours is gone.
        if device_number(&self.path) != self.device_number {
            return;
        }
        if let Some(bytes) = current_bytes(&self.path)
            && bytes > 0
            && bytes / SECTOR_BYTES != self.size_sectors
        {
            self.resized = true;
            (self.deliver)(FromDisk::Resized(bytes));
        }
    }
}

/// The device at `path`, `None` for a file or nothing.
fn device_number(path: &Path) -> Option<u64> {
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| meta.rdev())
}

/// The size of what stands at `path` now; `None` when it cannot be told.
fn current_bytes(path: &Path) -> Option<u64> {
    let meta = std::fs::metadata(path).ok()?;
    if !meta.file_type().is_block_device() {
        return Some(meta.len());
    }
    let number = meta.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?;
    text.trim().parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::mpsc::Receiver;

    use reprotect_engine::io::memory::MemoryFile;
    use reprotect_engine::io::{BlockOp, WriteAt};

    use super::*;
    use crate::salvage::tests::Failing;

    const CHUNKS: u64 = 12;

    fn job(number: u64) -> ReadJob {
        let sectors = CHUNK_BYTES / SECTOR_BYTES;
        ReadJob {
            chunk: SectorRange::new(number * sectors, (number + 1) * sectors),
            epoch: 1,
            hash: false,
            pieces: Vec::new(),
            in_parts: false,
        }
    }

    /// A reader over a disk whose every chunk is filled with its number, holes first where it is an image.
    fn reader(
        is_device: bool,
        holes: u64,
        budget: &Arc<Budget>,
    ) -> (MemoryFile, DiskReader, Receiver<FromDisk>) {
        let mut file = MemoryFile::new(CHUNKS * CHUNK_BYTES);
        for number in holes..CHUNKS {
            let data = vec![number as u8 + 1; CHUNK_BYTES as usize];
            file.write(&[WriteAt { offset: number * CHUNK_BYTES, data: &data }]).unwrap();
        }
        let (deliver, news) = mpsc::channel();
        let setup = ReaderSetup {
            path: PathBuf::from("/nonexistent"),
            is_device,
            budget: Arc::clone(budget),
            throttle: Arc::new(Throttle::new(None)),
            deliver: Box::new(move |item| drop(deliver.send(item))),
        };
        let handle = file.clone_handle();
        (handle, DiskReader::spawn(Box::new(file), setup).unwrap(), news)
    }

    fn read(news: &Receiver<FromDisk>) -> (ReadJob, Result<Bytes, String>) {
        let FromDisk::Read { job, data } = news.recv().unwrap() else { panic!("a size") };
        (job, data.map(|read| read.data))
    }

    #[test]
    fn chunks_arrive_whole_although_memory_holds_only_a_few() {
        let budget = Budget::new(0, 1).unwrap();
        let (_file, reader, news) = reader(true, 0, &budget);
        (0..CHUNKS).for_each(|number| reader.read(job(number)));
        for number in 0..CHUNKS {
            let (got, data) = read(&news);
            assert_eq!(got, job(number));
            assert!(data.unwrap().iter().all(|byte| u64::from(*byte) == number + 1));
        }
        assert_eq!(reader.read_bytes(), CHUNKS * CHUNK_BYTES);
        assert!(budget.held_bytes().1 <= budget.limit_bytes());
    }

    #[test]
    fn a_failed_read_costs_only_its_own_chunk() {
        let budget = Budget::new(256 << 20, 1).unwrap();
        let (file, reader, news) = reader(true, 0, &budget);
        // The batch fails, and then one of its chunks read by itself.
        file.inject(BlockOp::Read, 0, ErrorKind::Other);
        file.inject(BlockOp::Read, 2, ErrorKind::Other);
        (0..CHUNKS).for_each(|number| reader.read(job(number)));
        let results: Vec<bool> = (0..CHUNKS).map(|_| read(&news).1.is_ok()).collect();
        assert!(results.iter().filter(|ok| !**ok).count() <= 2, "{results:?}");
        assert!(results.iter().any(|ok| !ok), "{results:?}");
        (0..CHUNKS).for_each(|number| reader.read(job(number)));
        assert!((0..CHUNKS).all(|_| read(&news).1.is_ok()), "it goes on");
    }

    #[test]
    fn a_chunk_in_parts_is_read_around_what_fails_in_it_and_a_dead_disk_fails_whole() {
        let sectors = CHUNK_BYTES / SECTOR_BYTES;
        let mut disk = MemoryFile::new(2 * CHUNK_BYTES);
        disk.write(&[WriteAt { offset: 0, data: &vec![7; 2 * CHUNK_BYTES as usize] }]).unwrap();
        let failing =
            Failing::new(disk, &[SectorRange::new(801, 802), SectorRange::new(sectors, 2 * sectors)]);
        let bad = Arc::clone(&failing.bad);
        let (deliver, news) = mpsc::channel();
        let setup = ReaderSetup {
            path: PathBuf::from("/nonexistent"),
            is_device: true,
            budget: Budget::new(256 << 20, 1).unwrap(),
            throttle: Arc::new(Throttle::new(None)),
            deliver: Box::new(move |item| drop(deliver.send(item))),
        };
        let reader = DiskReader::spawn(Box::new(failing), setup).unwrap();
        let next = |job: ReadJob| {
            reader.read(job);
            let FromDisk::Read { data, .. } = news.recv().unwrap() else { panic!("a size") };
            data
        };
        let in_parts = |number| ReadJob { in_parts: true, ..job(number) };
        assert!(next(job(0)).is_err(), "nobody said in parts");
        let read = next(in_parts(0)).unwrap();
        assert_eq!(read.unread, [SectorRange::new(800, 808)]);
        let block = 800 * 512..808 * 512;
        assert!(read.data[..block.start].iter().chain(&read.data[block.end..]).all(|byte| *byte == 7));
        let pieces = vec![SectorRange::new(16, 24), SectorRange::new(792, 816)];
        let chunk = SectorRange::new(16, 816);
        let read = next(ReadJob { chunk, pieces, ..in_parts(0) }).unwrap();
        assert_eq!(read.unread, [SectorRange::new(800, 808)]);
        let read = next(in_parts(1)).unwrap();
        assert_eq!(read.unread, [SectorRange::new(sectors, 2 * sectors)], "the disk is alive elsewhere");
        bad.lock().unwrap().insert(SectorRange::new(0, 2 * sectors));
        assert!(next(in_parts(1)).unwrap_err().contains("cannot read"));
        bad.lock().unwrap().clear();
        assert!(next(in_parts(1)).unwrap().unread.is_empty());
        assert_eq!(reader.read_bytes(), CHUNK_BYTES - 4096 + 3 * 4096 + CHUNK_BYTES);
    }

    #[test]
    fn holes_of_an_image_are_zeros_without_being_read() {
        let budget = Budget::new(256 << 20, 1).unwrap();
        let (_file, reader, news) = reader(false, 5, &budget);
        (0..CHUNKS).for_each(|number| reader.read(job(number)));
        let mut zeros = 0;
        for _ in 0..CHUNKS {
            let (job, data) = read(&news);
            let data = data.unwrap();
            assert_eq!(data.len() as u64, job.chunk.bytes());
            zeros += u64::from(data.iter().all(|byte| *byte == 0));
        }
        assert_eq!((zeros, reader.read_bytes()), (5, (CHUNKS - 5) * CHUNK_BYTES));
    }

    #[test]
    fn of_a_chunk_in_pieces_only_these_are_read_to_where_they_belong() {
        let budget = Budget::new(256 << 20, 1).unwrap();
        let (_file, reader, news) = reader(true, 0, &budget);
        let start = CHUNK_BYTES / SECTOR_BYTES;
        let piece = |from, to| SectorRange::new(start + from, start + to);
        let pieces = vec![piece(8, 16), piece(64, 65), piece(1000, 1016)];
        reader.read(ReadJob {
            chunk: piece(8, 1016),
            epoch: 1,
            hash: false,
            pieces: pieces.clone(),
            in_parts: false,
        });
        let (job, data) = read(&news);
        let data = data.unwrap();
        assert_eq!((job.pieces, data.len()), (pieces.clone(), 1008 * 512));
        for piece in pieces {
            let from = ((piece.start - start - 8) * 512) as usize;
            assert!(data[from..from + piece.bytes() as usize].iter().all(|byte| *byte == 2));
        }
        assert_eq!(reader.read_bytes(), 25 * 512);
    }

    #[test]
    fn a_dropped_reader_ends_although_nobody_gives_memory_back() {
        let budget = Budget::new(0, 1).unwrap();
        let (_file, reader, news) = reader(true, 0, &budget);
        (0..CHUNKS).for_each(|number| reader.read(job(number)));
        let kept = read(&news).1.unwrap();
        drop(reader);
        while news.recv().is_ok() {}
        drop(kept);
    }
}
