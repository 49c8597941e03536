//! A disk that remembers every write with its data, in the order of completion: the source of an ORDERED stream as long
//! as there is no live capture, and the oracle of what the source was at any moment.
//!
//! Invariants: a write is in the memory and in the log under one lock, so the log's order is the disk's; every prefix of
//! the log is a state that a power cut could have left. Units: bytes. Served over NBD by the test `ordered`.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]
#![allow(dead_code, unreachable_pub, clippy::allow_attributes, reason = "each test program uses its part")]

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use reprotect_engine::io::{BlockError, BlockFile, ByteRange, ReadAt, WriteAt};

/// A change of the disk.
#[derive(Clone, Debug)]
pub enum Change {
    Data(u64, Bytes),
    Zeros(ByteRange),
}

impl Change {
    pub fn apply(&self, disk: &mut [u8]) {
        match self {
            Self::Data(offset, data) => disk[*offset as usize..][..data.len()].copy_from_slice(data),
            Self::Zeros(range) => disk[range.start as usize..range.end as usize].fill(0),
        }
    }
}

#[derive(Debug)]
struct Content {
    bytes: Vec<u8>,
    log: Vec<Change>,
    flushes: u64,
}

/// The disk.
#[derive(Clone, Debug)]
pub struct LoggedDisk(Arc<Mutex<Content>>);

impl LoggedDisk {
    pub fn new(size_bytes: u64) -> Self {
        let bytes = vec![0; size_bytes as usize];
        Self(Arc::new(Mutex::new(Content { bytes, log: Vec::new(), flushes: 0 })))
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap()
    }

    pub fn size_bytes(&self) -> u64 {
        self.lock().bytes.len() as u64
    }

    /// Forgets the log; answers what the disk holds.
    pub fn base(&self) -> Bytes {
        let mut content = self.lock();
        content.log.clear();
        Bytes::copy_from_slice(&content.bytes)
    }

    /// At most `count` changes from a place in the log on.
    pub fn changes(&self, from: usize, count: usize) -> Vec<Change> {
        self.lock().log.iter().skip(from).take(count).cloned().collect()
    }

    pub fn log_len(&self) -> usize {
        self.lock().log.len()
    }

    pub fn flushes(&self) -> u64 {
        self.lock().flushes
    }

    /// What the disk was after so many changes of `base`.
    pub fn replay(&self, base: &[u8], changes: usize) -> Vec<u8> {
        let mut disk = base.to_vec();
        self.lock().log.iter().take(changes).for_each(|change| change.apply(&mut disk));
        disk
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn change(&self, change: Change) {
        let mut content = self.lock();
        change.apply(&mut content.bytes);
        content.log.push(change);
    }
}

impl BlockFile for LoggedDisk {
    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let content = self.lock();
        for read in reads {
            let len = read.data.len();
            read.data.copy_from_slice(&content.bytes[read.offset as usize..][..len]);
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for write in writes {
            self.change(Change::Data(write.offset, Bytes::copy_from_slice(write.data)));
        }
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.change(Change::Zeros(range));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.lock().flushes += 1;
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        Ok(vec![range])
    }
}
