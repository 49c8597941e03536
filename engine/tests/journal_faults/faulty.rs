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
}

impl Faulty {
    pub(crate) fn new(files: &MemoryFiles) -> Self {
        Self { files: files.clone(), fault: Arc::default() }
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
