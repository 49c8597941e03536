//! Memory files on a drive that is full, or makes no new files, or meets its end in the middle of a write.
//!
//! Invariant: on a full drive what was written once can be written again. Called by `journal_manifest_full.rs`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};

#[derive(Debug, Default)]
struct Mood {
    full: AtomicBool,
    no_files: AtomicBool,
    halfway: AtomicBool,
}

#[derive(Clone)]
pub(crate) struct Drive {
    files: MemoryFiles,
    mood: Arc<Mood>,
}

impl Drive {
    pub(crate) fn of(files: &MemoryFiles) -> Self {
        Self { files: files.clone(), mood: Arc::default() }
    }

    /// Nothing new can be written.
    pub(crate) fn fill(&self, full: bool) {
        self.mood.full.store(full, Ordering::Relaxed);
        self.refuse_files(full);
    }

    /// No file can be made.
    pub(crate) fn refuse_files(&self, refused: bool) {
        self.mood.no_files.store(refused, Ordering::Relaxed);
    }

    /// Writes of more than a block write half, and fail.
    pub(crate) fn fail_halfway(&self, fails: bool) {
        self.mood.halfway.store(fails, Ordering::Relaxed);
    }
}

impl Files for Drive {
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
        self.files.read_head(path, bytes_max)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        let (file, name) = (self.files.open(path, writable)?, path.display().to_string());
        Ok(Box::new(DriveFile { file, name, mood: Arc::clone(&self.mood) }))
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        if self.mood.no_files.load(Ordering::Relaxed) {
            return Err(FilesError::system("create", path, ErrorKind::StorageFull.into()));
        }
        self.files.create(path, size_bytes)
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        self.files.resize(path, size_bytes)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
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

struct DriveFile {
    file: Box<dyn BlockFile>,
    name: String,
    mood: Arc<Mood>,
}

impl DriveFile {
    fn full(&self, offset: u64, len: u64) -> BlockError {
        let source = ErrorKind::StorageFull.into();
        BlockError { name: self.name.clone(), op: BlockOp::Write, offset, len, source }
    }
}

impl BlockFile for DriveFile {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.file.read(reads)
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for WriteAt { offset, data } in writes {
            let range = ByteRange { start: *offset, end: offset + data.len() as u64 };
            if self.mood.full.load(Ordering::Relaxed) && self.file.allocated(range)? != [range] {
                return Err(self.full(*offset, range.len()));
            }
            if self.mood.halfway.load(Ordering::Relaxed) && data.len() > 4096 {
                self.file.write(&[WriteAt { offset: *offset, data: &data[..data.len() / 2] }])?;
                return Err(self.full(*offset, range.len()));
            }
            self.file.write(&[WriteAt { offset: *offset, data }])?;
        }
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.file.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.file.flush()
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}
