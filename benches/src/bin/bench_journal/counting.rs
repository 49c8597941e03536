//! Files that count what is read, written and flushed, by what the file is for.
//!
//! Invariant: every byte that reaches a file through the store is counted once. Units: bytes, calls, seconds. Called by the parts.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use reprotect_engine::io::{BlockError, BlockFile, ByteRange, OpenOptions, ReadAt, WriteAt, open};
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Log,
    Undo,
    Manifest,
    Target,
}

/// What was done to files of a class.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) read_calls: u64,
    pub(crate) write_calls: u64,
    pub(crate) flushes: u64,
    pub(crate) maps: u64,
    pub(crate) read_s: f64,
    pub(crate) write_s: f64,
    pub(crate) flush_s: f64,
}

/// Counts of all classes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts([Count; 4]);

impl Counts {
    pub(crate) const fn of(&self, class: Class) -> &Count {
        &self.0[class as usize]
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        let mut counts = *self;
        for (count, before) in counts.0.iter_mut().zip(&before.0) {
            count.read_bytes -= before.read_bytes;
            count.written_bytes -= before.written_bytes;
            count.read_calls -= before.read_calls;
            count.write_calls -= before.write_calls;
            count.flushes -= before.flushes;
            count.maps -= before.maps;
            count.read_s -= before.read_s;
            count.write_s -= before.write_s;
            count.flush_s -= before.flush_s;
        }
        counts
    }

    pub(crate) fn written_bytes(&self) -> u64 {
        self.0.iter().map(|count| count.written_bytes).sum()
    }

    /// Seconds in reads, writes and flushes.
    pub(crate) fn busy_s(&self) -> f64 {
        self.0.iter().map(|count| count.read_s + count.write_s + count.flush_s).sum()
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        self.0.iter().map(|count| count.read_bytes).sum()
    }
}

/// The file system, counted.
#[derive(Clone)]
pub(crate) struct Counting {
    files: Arc<FsFiles>,
    counts: Arc<Mutex<Counts>>,
}

impl Counting {
    pub(crate) fn new() -> Self {
        let files = FsFiles::new(|path, writable| {
            open(path, &if writable { OpenOptions::writing() } else { OpenOptions::reading() })
        });
        Self { files: Arc::new(files), counts: Arc::default() }
    }

    pub(crate) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn class(path: &Path) -> Class {
    match path.file_name().and_then(|name| name.to_str()).unwrap_or_default() {
        name if name.starts_with("redo-") => Class::Log,
        name if name.starts_with("undo-") => Class::Undo,
        name if name.starts_with("manifest-") || name == "superblock" => Class::Manifest,
        _ => Class::Target,
    }
}

impl Files for Counting {
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
        let file = self.files.open(path, writable)?;
        Ok(Box::new(CountedFile { file, class: class(path), counts: Arc::clone(&self.counts) }))
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
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

struct CountedFile {
    file: Box<dyn BlockFile>,
    class: Class,
    counts: Arc<Mutex<Counts>>,
}

impl CountedFile {
    fn count(&self, change: impl FnOnce(&mut Count)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner).0[self.class as usize]);
    }
}

impl BlockFile for CountedFile {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let bytes: usize = reads.iter().map(|read| read.data.len()).sum();
        self.count(|count| {
            (count.read_bytes, count.read_calls) = (count.read_bytes + bytes as u64, count.read_calls + 1)
        });
        let begun = Instant::now();
        let result = self.file.read(reads);
        self.count(|count| count.read_s += begun.elapsed().as_secs_f64());
        result
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        let bytes: usize = writes.iter().map(|write| write.data.len()).sum();
        self.count(|count| {
            (count.written_bytes, count.write_calls) =
                (count.written_bytes + bytes as u64, count.write_calls + 1);
        });
        let begun = Instant::now();
        let result = self.file.write(writes);
        self.count(|count| count.write_s += begun.elapsed().as_secs_f64());
        result
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.count(|count| count.write_calls += 1);
        self.file.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        let begun = Instant::now();
        let result = self.file.flush();
        let flush_s = begun.elapsed().as_secs_f64();
        self.count(|count| (count.flushes, count.flush_s) = (count.flushes + 1, count.flush_s + flush_s));
        result
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.count(|count| count.maps += 1);
        self.file.allocated(range)
    }
}
