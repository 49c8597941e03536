//! Files in memory that remember every write and flush: the far side of [`Files`] in tests and the simulator.
//!
//! Invariants: the trace of all files is one sequence in the order in which things happened; [`MemoryFiles::crashed`]
//! builds what a medium may hold after power loss at any point of it. Certain is what a flush of the same file covered
//! (bytes and length), and of names what a flush of their folder covered. Of the rest any choice survives: 512 B sectors
//! of writes, lengths, and each making, renaming and removal of a file, so that one that was removed is there again, with
//! what was flushed to it. What [`Files`] promises to be durable is flushed here, step by step, as on a real file system.
//! Files are sparse and shared between copies, so a terabyte costs nothing. Units: bytes. Called by tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{FileFacts, Files, FilesError};
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};

const PAGE: u64 = 512;

/// Something that happened to a file or its folder.
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
    /// Everything written to this file is durable, and its length.
    Flush(PathBuf),
    /// An empty file was made.
    Create(PathBuf),
    /// The file has this length now.
    Resize(PathBuf, u64),
    /// The file holds this now, all of it, or what it held before.
    Replace(PathBuf, Vec<u8>),
    /// The file is gone.
    Remove(PathBuf),
    /// The file has another name.
    Rename(PathBuf, PathBuf),
    /// The names in this folder are durable.
    FlushFolder(PathBuf),
}

/// Something that power loss may undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unflushed {
    /// Which event of the trace it is.
    pub event: usize,
    /// Which of the sectors that a write touched; zero for anything else.
    pub sector: usize,
}

#[derive(Clone, Debug, Default)]
struct Content {
    len: u64,
    pages: BTreeMap<u64, Arc<[u8]>>,
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
            match self.pages.get_mut(&(at / PAGE)) {
                Some(page) => {
                    Arc::make_mut(page)[inside..inside + part.len()].copy_from_slice(part);
                }
                None if part.len() == PAGE as usize => _ = self.pages.insert(at / PAGE, part.into()),
                None => {
                    let mut page = vec![0; PAGE as usize];
                    page[inside..inside + part.len()].copy_from_slice(part);
                    self.pages.insert(at / PAGE, page.into());
                }
            }
            at += part.len() as u64;
            rest = tail;
        }
    }

    fn resize(&mut self, len: u64) {
        self.pages.retain(|page, _| page * PAGE < len);
        if let Some(page) = self.pages.get_mut(&(len / PAGE)) {
            Arc::make_mut(page)[(len % PAGE) as usize..].fill(0);
        }
        self.len = len;
    }

    fn holding(bytes: &[u8]) -> Self {
        let mut content = Self { len: bytes.len() as u64, ..Self::default() };
        content.write(0, bytes);
        content
    }
}

/// Which file a name leads to.
type Names = BTreeMap<PathBuf, Arc<Content>>;

#[derive(Debug, Default)]
struct State {
    files: Names,
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
        self.state().files.insert(path.into(), Arc::new(Content::holding(content)));
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
            Arc::make_mut(file).write(offset, content);
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Event> {
        self.state().trace.clone()
    }

    /// How many things happened so far.
    #[must_use]
    pub fn happened(&self) -> usize {
        self.state().trace.len()
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

    /// The files after these events, none of them forgotten: a later power loss may still undo what was not flushed.
    #[must_use]
    pub fn replayed(&self, trace: &[Event]) -> Self {
        let after = self.snapshot();
        let mut state = after.state();
        trace.iter().for_each(|event| state.happens(event.clone()));
        drop(state);
        after
    }

    /// What the medium may hold after power loss: `self` plus the first `events` of `trace`; `lands` decides for all that
    /// no flush covered, one after the other, whether it reached the medium: each sector of each write, each new length,
    /// each change of a name.
    #[must_use]
    pub fn crashed(&self, trace: &[Event], events: usize, mut lands: impl FnMut() -> bool) -> Self {
        self.crashed_where(trace, events, |_| lands())
    }

    /// As [`Self::crashed`], for who wants to know what is decided on.
    #[must_use]
    pub fn crashed_where(
        &self,
        trace: &[Event],
        events: usize,
        lands: impl FnMut(Unflushed) -> bool,
    ) -> Self {
        let happened = &trace[..events.min(trace.len())];
        let files = PowerLoss::new(&self.state().files, happened).surviving(happened, lands);
        Self(Arc::new(Mutex::new(State { files, ..State::default() })))
    }
}

impl State {
    /// Does what an event says, and remembers it.
    fn happens(&mut self, event: Event) {
        match &event {
            Event::Write { path, offset, data } => self.file(path).write(*offset, data),
            Event::Create(path) => _ = self.files.insert(path.clone(), Arc::default()),
            Event::Resize(path, len) => self.file(path).resize(*len),
            Event::Replace(path, content) => {
                self.files.insert(path.clone(), Arc::new(Content::holding(content)));
            }
            Event::Remove(path) => _ = self.files.remove(path),
            Event::Rename(from, to) => {
                if let Some(file) = self.files.remove(from) {
                    self.files.insert(to.clone(), file);
                }
            }
            Event::Flush(_) | Event::FlushFolder(_) => {}
        }
        self.trace.push(event);
    }

    fn file(&mut self, path: &Path) -> &mut Content {
        Arc::make_mut(self.files.entry(path.into()).or_default())
    }
}

/// Which events a power loss can undo. A file is a number here, whatever it is called at the moment.
struct PowerLoss {
    /// The files there are, with what is certain to be in them.
    contents: Vec<Arc<Content>>,
    /// Their names, as far as they are certain.
    names: BTreeMap<PathBuf, usize>,
    /// For each event, the file it is about, and whether a flush covers it.
    events: Vec<(usize, bool)>,
}

fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

impl PowerLoss {
    fn new(before: &Names, happened: &[Event]) -> Self {
        let (mut names, mut contents) = (BTreeMap::new(), Vec::new());
        for (path, content) in before {
            names.insert(path.clone(), contents.len());
            contents.push(Arc::clone(content));
        }
        let mut loss = Self { contents, names, events: Vec::with_capacity(happened.len()) };
        let mut now = loss.names.clone();
        // Events that no flush covers yet, by file and by folder.
        let mut of_file: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut of_folder: BTreeMap<&Path, Vec<usize>> = BTreeMap::new();
        for (at, event) in happened.iter().enumerate() {
            let file = loss.file_of(event, &mut now);
            loss.events.push((file, false));
            let flushed = match event {
                Event::Write { .. } | Event::Resize(..) => {
                    of_file.entry(file).or_default().push(at);
                    None
                }
                Event::Create(path)
                | Event::Replace(path, _)
                | Event::Remove(path)
                | Event::Rename(path, _) => {
                    of_folder.entry(folder(path)).or_default().push(at);
                    None
                }
                Event::Flush(_) => of_file.remove(&file),
                Event::FlushFolder(flushed) => of_folder.remove(flushed.as_path()),
            };
            for at in flushed.into_iter().flatten() {
                loss.events[at].1 = true;
            }
        }
        loss
    }

    /// The file an event is about, found or made under the names as they are when it happens.
    fn file_of(&mut self, event: &Event, now: &mut BTreeMap<PathBuf, usize>) -> usize {
        let mut made = |content: Content| {
            self.contents.push(Arc::new(content));
            self.contents.len() - 1
        };
        match event {
            Event::Write { path, .. } | Event::Flush(path) | Event::Resize(path, _) => {
                *now.entry(path.clone()).or_insert_with(|| made(Content::default()))
            }
            Event::Create(path) => {
                let file = made(Content::default());
                now.insert(path.clone(), file);
                file
            }
            Event::Replace(path, content) => {
                let file = made(Content::holding(content));
                now.insert(path.clone(), file);
                file
            }
            Event::Remove(path) => now.remove(path).unwrap_or(usize::MAX),
            Event::Rename(from, to) => {
                let file = now.remove(from).unwrap_or(usize::MAX);
                now.insert(to.clone(), file);
                file
            }
            Event::FlushFolder(_) => usize::MAX,
        }
    }

    /// The files after the power loss.
    fn surviving(mut self, happened: &[Event], mut lands: impl FnMut(Unflushed) -> bool) -> Names {
        for (event, (at, (file, durable))) in happened.iter().zip((0..).zip(std::mem::take(&mut self.events)))
        {
            let mut survives = |sector| durable || lands(Unflushed { event: at, sector });
            match event {
                Event::Write { offset, data, .. } => {
                    let Some(content) = self.contents.get_mut(file) else { continue };
                    let (mut start, mut sector) = (0, 0);
                    while start < data.len() {
                        let place = offset + start as u64;
                        let end = data.len().min(start + (PAGE - place % PAGE) as usize);
                        if survives(sector) {
                            Arc::make_mut(content).write(place, &data[start..end]);
                        }
                        (start, sector) = (end, sector + 1);
                    }
                }
                Event::Resize(_, len) => {
                    if let Some(content) = self.contents.get_mut(file).filter(|_| survives(0)) {
                        Arc::make_mut(content).resize(*len);
                    }
                }
                Event::Create(path) | Event::Replace(path, _) => {
                    if survives(0) {
                        self.names.insert(path.clone(), file);
                    }
                }
                Event::Remove(path) => {
                    if survives(0) {
                        self.names.remove(path);
                    }
                }
                Event::Rename(from, to) => {
                    if survives(0) && self.names.remove(from).is_some() {
                        self.names.insert(to.clone(), file);
                    }
                }
                Event::Flush(_) | Event::FlushFolder(_) => {}
            }
        }
        let content = |file: usize| self.contents.get(file).map(Arc::clone);
        self.names.iter().filter_map(|(path, file)| Some((path.clone(), content(*file)?))).collect()
    }
}

impl Files for MemoryFiles {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        let facts = |file: &Arc<Content>| FileFacts { size_bytes: file.len, is_device: false, inode: 0 };
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
        state.happens(Event::Create(path.into()));
        state.happens(Event::Resize(path.into(), size_bytes));
        state.happens(Event::Flush(path.into()));
        state.happens(Event::FlushFolder(folder(path).into()));
        Ok(())
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let mut state = self.state();
        assert!(!state.open_for_writing.contains(path), "{} is resized while it is open", path.display());
        state.happens(Event::Resize(path.into(), size_bytes));
        state.happens(Event::Flush(path.into()));
        Ok(())
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        let mut state = self.state();
        state.happens(Event::Replace(path.into(), content.into()));
        state.happens(Event::FlushFolder(folder(path).into()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        let mut state = self.state();
        if state.files.contains_key(path) {
            state.happens(Event::Remove(path.into()));
        }
        Ok(())
    }

    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        self.remove(path)?;
        self.state().happens(Event::FlushFolder(folder(path).into()));
        Ok(())
    }

    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        let aside = super::free_name(self, path, suffix)?;
        let mut state = self.state();
        if !state.files.contains_key(path) {
            return Err(FilesError::Missing { path: path.into() });
        }
        state.happens(Event::Rename(path.into(), aside.clone()));
        state.happens(Event::FlushFolder(folder(path).into()));
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
            state.happens(Event::Write { path: self.path.clone(), offset, data: write.data.to_vec() });
        }
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.check(BlockOp::Zero, range.start, range.len())?;
        let data = vec![0; usize::try_from(range.len()).unwrap_or(usize::MAX)];
        self.files.state().happens(Event::Write { path: self.path.clone(), offset: range.start, data });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.files.state().happens(Event::Flush(self.path.clone()));
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
