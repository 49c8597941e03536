//! Files in memory that remember every write and flush: the far side of [`Files`] in tests and the simulator.
//!
//! Invariants: the trace of all files is one sequence in the order in which calls returned; [`MemoryFiles::crashed`]
//! builds what a medium may hold after power loss at any point of it: all that a later flush of the same file covered,
//! and any choice of 512 B sectors of what was not flushed. Lengths and whole-file replacements are durable at once,
//! as the seam promises. Files are sparse, so a terabyte costs nothing. Units: bytes. Called by tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{FileFacts, Files, FilesError};
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};

const PAGE: u64 = 512;

/// Something that happened to a file.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes were written, not yet durable.
    Write {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Everything written to this file is durable.
    Flush(PathBuf),
    /// The file has this length now.
    Resize(PathBuf, u64),
    /// The file holds this now, all of it.
    Replace(PathBuf, Vec<u8>),
    /// The file is gone.
    Remove(PathBuf),
    /// The file has another name.
    Rename(PathBuf, PathBuf),
}

#[derive(Clone, Debug, Default)]
struct Content {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Content {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let inside = (at % PAGE) as usize;
            let len = rest.len().min(PAGE as usize - inside);
            let (part, tail) = rest.split_at_mut(len);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => part.copy_from_slice(&page[inside..inside + len]),
                None => part.fill(0),
            }
            at += len as u64;
            rest = tail;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let inside = (at % PAGE) as usize;
            let (part, tail) = rest.split_at(rest.len().min(PAGE as usize - inside));
            let page = self.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
            page[inside..inside + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            rest = tail;
        }
    }

    fn resize(&mut self, len: u64) {
        self.pages.retain(|page, _| page * PAGE < len);
        if let Some(page) = self.pages.get_mut(&(len / PAGE)) {
            page[(len % PAGE) as usize..].fill(0);
        }
        self.len = len;
    }
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, Content>,
    open_for_writing: BTreeSet<PathBuf>,
    trace: Vec<Event>,
    reads: u64,
    free_bytes: Option<u64>,
    /// Writes fail as on a full medium once this many more bytes were written.
    room: Option<u64>,
}

/// A directory of files in memory; clones are the same directory.
#[derive(Clone, Debug, Default)]
pub struct MemoryFiles(Arc<Mutex<State>>);

impl MemoryFiles {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// This directory as an opener.
    #[must_use]
    pub fn opener(&self) -> Arc<dyn Files> {
        Arc::new(self.clone())
    }

    /// Puts a file there.
    pub fn put(&self, path: impl Into<PathBuf>, content: &[u8]) {
        let mut file = Content { len: content.len() as u64, ..Content::default() };
        file.write(0, content);
        self.state().files.insert(path.into(), file);
    }

    /// The bytes of a file; empty when it is not there.
    #[must_use]
    pub fn bytes(&self, path: impl AsRef<Path>) -> Vec<u8> {
        let state = self.state();
        let Some(file) = state.files.get(path.as_ref()) else { return Vec::new() };
        let mut bytes = vec![0; usize::try_from(file.len).unwrap_or(0)];
        file.read(0, &mut bytes);
        bytes
    }

    /// The runs of a file that were ever written, ascending: byte position and content.
    #[must_use]
    pub fn bytes_sparse(&self, path: impl AsRef<Path>) -> Vec<(u64, Vec<u8>)> {
        let state = self.state();
        let Some(file) = state.files.get(path.as_ref()) else { return Vec::new() };
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (page, content) in &file.pages {
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == page * PAGE => {
                    bytes.extend(&**content)
                }
                _ => runs.push((page * PAGE, content.to_vec())),
            }
        }
        runs
    }

    /// Changes bytes of a file behind its owner's back.
    pub fn poke(&self, path: impl AsRef<Path>, offset: u64, content: &[u8]) {
        if let Some(file) = self.state().files.get_mut(path.as_ref()) {
            file.write(offset, content);
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Event> {
        self.state().trace.clone()
    }

    /// How many read operations there were.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.state().reads
    }

    /// What the medium says is free; unknown unless set.
    pub fn set_free_bytes(&self, free: Option<u64>) {
        self.state().free_bytes = free;
    }

    /// Lets writes fail as on a full medium after so many more bytes; `None`: never.
    pub fn set_room(&self, room: Option<u64>) {
        self.state().room = room;
    }

    /// An independent copy of the files as they are, with an empty trace.
    #[must_use]
    pub fn snapshot(&self) -> Self {
        let files = self.state().files.clone();
        Self(Arc::new(Mutex::new(State { files, ..State::default() })))
    }

    /// What the medium may hold after power loss: `self` plus the first `events` of `trace`; `lands` decides for each
    /// sector of each write that no flush covered whether it reached the medium.
    #[must_use]
    pub fn crashed(&self, trace: &[Event], events: usize, mut lands: impl FnMut() -> bool) -> Self {
        let after = self.snapshot();
        let mut state = after.state();
        let happened = &trace[..events.min(trace.len())];
        let mut last_flush: BTreeMap<&Path, usize> = BTreeMap::new();
        for (at, event) in happened.iter().enumerate() {
            if let Event::Flush(path) = event {
                last_flush.insert(path, at);
            }
        }
        for (at, event) in happened.iter().enumerate() {
            match event {
                Event::Write { path, offset, data } => {
                    let durable = last_flush.get(path.as_path()).is_some_and(|flush| *flush > at);
                    let file = state.files.entry(path.clone()).or_default();
                    let mut start = 0;
                    while start < data.len() {
                        let place = offset + start as u64;
                        let end = data.len().min(start + (PAGE - place % PAGE) as usize);
                        if durable || lands() {
                            file.write(place, &data[start..end]);
                        }
                        start = end;
                    }
                }
                Event::Flush(_) => {}
                Event::Resize(path, len) => state.files.entry(path.clone()).or_default().resize(*len),
                Event::Replace(path, content) => {
                    let mut file = Content { len: content.len() as u64, ..Content::default() };
                    file.write(0, content);
                    state.files.insert(path.clone(), file);
                }
                Event::Remove(path) => {
                    state.files.remove(path);
                }
                Event::Rename(from, to) => {
                    if let Some(file) = state.files.remove(from) {
                        state.files.insert(to.clone(), file);
                    }
                }
            }
        }
        drop(state);
        after
    }
}

impl Files for MemoryFiles {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        let facts = |file: &Content| FileFacts { size_bytes: file.len, is_device: false, inode: 0 };
        Ok(self.state().files.get(path).map(facts))
    }

    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        let state = self.state();
        let beside = state.files.keys().filter(|other| other.parent() == path.parent());
        Ok(beside.filter_map(|other| Some(other.file_name()?.to_str()?.to_owned())).collect())
    }

    fn free_bytes(&self, _path: &Path) -> Result<Option<u64>, FilesError> {
        Ok(self.state().free_bytes)
    }

    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        let state = self.state();
        let missing = || FilesError::Missing { path: path.into() };
        let file = state.files.get(path).ok_or_else(missing)?;
        let mut bytes = vec![0; usize::try_from(file.len).unwrap_or(usize::MAX).min(bytes_max)];
        file.read(0, &mut bytes);
        Ok(bytes)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        let mut state = self.state();
        let missing = || FilesError::Missing { path: path.into() };
        let len = state.files.get(path).ok_or_else(missing)?.len;
        if writable && !state.open_for_writing.insert(path.into()) {
            return Err(FilesError::InUse { path: path.into(), sign: "it is open already".into() });
        }
        Ok(Box::new(MemoryFile { files: self.clone(), path: path.into(), len, writable }))
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let mut state = self.state();
        if state.files.contains_key(path) {
            return Err(FilesError::Exists { path: path.into() });
        }
        state.files.insert(path.into(), Content { len: size_bytes, ..Content::default() });
        state.trace.push(Event::Resize(path.into(), size_bytes));
        Ok(())
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let mut state = self.state();
        assert!(!state.open_for_writing.contains(path), "{} is resized while it is open", path.display());
        state.files.entry(path.into()).or_default().resize(size_bytes);
        state.trace.push(Event::Resize(path.into(), size_bytes));
        Ok(())
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        self.put(path, content);
        self.state().trace.push(Event::Replace(path.into(), content.into()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        let mut state = self.state();
        state.files.remove(path);
        state.trace.push(Event::Remove(path.into()));
        Ok(())
    }

    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        let aside = super::free_name(self, path, suffix)?;
        let mut state = self.state();
        let file = state.files.remove(path).ok_or_else(|| FilesError::Missing { path: path.into() })?;
        state.files.insert(aside.clone(), file);
        state.trace.push(Event::Rename(path.into(), aside.clone()));
        Ok(aside)
    }
}

/// One open file.
struct MemoryFile {
    files: MemoryFiles,
    path: PathBuf,
    len: u64,
    writable: bool,
}

impl MemoryFile {
    fn check(&self, op: BlockOp, offset: u64, len: u64) -> Result<(), BlockError> {
        let kind = match op {
            BlockOp::Write | BlockOp::Zero if !self.writable => std::io::ErrorKind::PermissionDenied,
            _ if offset.checked_add(len).is_none_or(|end| end > self.len) => {
                std::io::ErrorKind::UnexpectedEof
            }
            _ => return Ok(()),
        };
        Err(self.error(op, offset, len, kind))
    }

    fn error(&self, op: BlockOp, offset: u64, len: u64, kind: std::io::ErrorKind) -> BlockError {
        BlockError { name: self.path.display().to_string(), op, offset, len, source: kind.into() }
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if self.writable {
            self.files.state().open_for_writing.remove(&self.path);
        }
    }
}

impl BlockFile for MemoryFile {
    fn size_bytes(&self) -> u64 {
        self.len
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let mut state = self.files.state();
        state.reads += reads.len() as u64;
        for read in reads {
            self.check(BlockOp::Read, read.offset, read.data.len() as u64)?;
            if let Some(file) = state.files.get(&self.path) {
                file.read(read.offset, read.data);
            }
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        let mut state = self.files.state();
        for write in writes {
            let (offset, len) = (write.offset, write.data.len() as u64);
            self.check(BlockOp::Write, offset, len)?;
            if let Some(room) = state.room {
                let left = room.checked_sub(len);
                state.room = Some(left.ok_or_else(|| {
                    self.error(BlockOp::Write, offset, len, std::io::ErrorKind::StorageFull)
                })?);
            }
            state.files.entry(self.path.clone()).or_default().write(offset, write.data);
            state.trace.push(Event::Write { path: self.path.clone(), offset, data: write.data.to_vec() });
        }
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.check(BlockOp::Zero, range.start, range.len())?;
        let data = vec![0; usize::try_from(range.len()).unwrap_or(usize::MAX)];
        let mut state = self.files.state();
        state.files.entry(self.path.clone()).or_default().write(range.start, &data);
        state.trace.push(Event::Write { path: self.path.clone(), offset: range.start, data });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.files.state().trace.push(Event::Flush(self.path.clone()));
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let mut found = Vec::new();
        if let Some(file) = self.files.state().files.get(&self.path) {
            for (page, _) in file.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)) {
                let (start, end) = ((page * PAGE).max(range.start), ((page + 1) * PAGE).min(range.end));
                crate::io::push_range(&mut found, ByteRange { start, end });
            }
        }
        Ok(found)
    }
}
