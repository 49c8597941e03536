//! Files whose reads, writes or flushes fail where a test says so.
//!
//! Invariant: a failing operation changes nothing. Called by `journal_faults.rs`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};

/// Which files fail, by part of their path, and how.
type Fault = Option<(String, BlockOp)>;

/// Memory files with a fault.
#[derive(Clone)]
pub(crate) struct Faulty {
    files: MemoryFiles,
    fault: Arc<Mutex<Fault>>,
    bad: Arc<Mutex<Option<(PathBuf, ByteRange)>>>,
}

impl Faulty {
    pub(crate) fn new(files: &MemoryFiles) -> Self {
        Self { files: files.clone(), fault: Arc::default(), bad: Arc::default() }
    }

    /// These bytes of a file, and no others, cannot be read.
    pub(crate) fn spoil(&self, path: &Path, bytes: ByteRange) {
        *self.bad.lock().unwrap() = Some((path.into(), bytes));
    }

    /// Everything can be read again.
    pub(crate) fn heal(&self) {
        *self.bad.lock().unwrap() = None;
    }

    fn reads(&self, path: &Path, offset: u64, len: u64) -> Result<(), BlockError> {
        let bad = self.bad.lock().unwrap();
        let hits = |(bad, bytes): &(PathBuf, ByteRange)| {
            bad == path && offset < bytes.end && offset + len > bytes.start
        };
        if bad.as_ref().is_some_and(hits) {
            let source = std::io::Error::from_raw_os_error(5); // EIO
            let name = path.display().to_string();
            return Err(BlockError { name, op: BlockOp::Read, offset, len, source });
        }
        Ok(())
    }

    pub(crate) fn fail(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    fn check(&self, path: &Path, op: BlockOp) -> Result<(), BlockError> {
        match &*self.fault.lock().unwrap() {
            Some((name, failing)) if *failing == op && path.to_string_lossy().contains(name.as_str()) => {
                let source = std::io::Error::from_raw_os_error(5); // EIO
                Err(BlockError { name: path.display().to_string(), op, offset: 0, len: 0, source })
            }
            _ => Ok(()),
        }
    }
}

impl Files for Faulty {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        self.files.facts(path)
    }

    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        self.files.neighbours(path)
    }

    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, FilesError> {
        self.files.free_bytes(path)
    }

    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        self.check(path, BlockOp::Read)?;
        self.reads(path, 0, bytes_max as u64)?;
        self.files.read_head(path, bytes_max)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        let file = self.files.open(path, writable)?;
        Ok(Box::new(FaultyFile { faulty: self.clone(), path: path.into(), file }))
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        self.files.create(path, size_bytes)
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        self.files.resize(path, size_bytes)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        self.check(path, BlockOp::Write)?;
        self.files.replace(path, content)
    }

    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        self.files.remove(path)
    }

    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        self.files.remove_durably(path)
    }

    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        self.files.set_aside(path, suffix)
    }
}

struct FaultyFile {
    faulty: Faulty,
    path: PathBuf,
    file: Box<dyn BlockFile>,
}

impl BlockFile for FaultyFile {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.faulty.check(&self.path, BlockOp::Read)?;
        for read in reads.iter() {
            self.faulty.reads(&self.path, read.offset, read.data.len() as u64)?;
        }
        self.file.read(reads)
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.faulty.check(&self.path, BlockOp::Write)?;
        self.file.write(writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.faulty.check(&self.path, BlockOp::Write)?;
        self.file.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.faulty.check(&self.path, BlockOp::Flush)?;
        self.file.flush()
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}
