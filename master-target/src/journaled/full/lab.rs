//! A disk behind a journal as the daemon drives it, on a real file system, for tests: its retention drive can be full or fail
//! at any operation that changes a file, and what every point must show is known.
//!
//! Units: sectors, entry numbers, operations on files that change something.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Error;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use reprotect_engine::format::batch::{BatchHeader, Stretch, encode_batch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_engine::store::target::{
    CreateOptions, Expectation, TargetKind, TargetSpec, create_target, open_target,
};
use reprotect_engine::units::{LineageId, PeerId};

use super::super::*;
use crate::redo::newest_state;
use crate::registry::fs_opener;
use crate::retention::RetentionSettings;
use crate::scrub::ScrubSettings;

pub(crate) const DISK: DiskId = DiskId([1; 16]);
pub(crate) const LINEAGE: LineageId = LineageId([4; 16]);
pub(crate) const SECTORS: u64 = 512;
pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EIO: i32 = 5;

/// Files of which those with a name fail from one operation on.
#[derive(Default)]
struct Fault {
    /// The beginning of the names, and which error; none: nothing fails.
    on: Option<(&'static str, i32)>,
    /// Operations that still succeed.
    left: usize,
    /// How many failed.
    failed: usize,
    /// Bytes that the drive has left, whatever the file; none: as many as anybody wants.
    room: Option<u64>,
}

pub(crate) struct Faulty {
    files: Arc<dyn Files>,
    fault: Mutex<Fault>,
    /// What it says is free; none: what is.
    free_bytes: Mutex<Option<u64>>,
}

impl Faulty {
    fn fault(&self) -> MutexGuard<'_, Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files of such a name fail from one operation on.
    pub(crate) fn set(&self, on: (&'static str, i32), left: usize) {
        *self.fault() = Fault { on: Some(on), left, ..Fault::default() };
    }

    /// Nothing fails any more.
    pub(crate) fn mend(&self) {
        let mut fault = self.fault();
        (fault.on, fault.room) = (None, None);
    }

    /// No file is made and none gets longer before another is removed; what was written once can be written again.
    pub(crate) fn fill(&self) {
        *self.fault() = Fault { room: Some(0), ..Fault::default() };
    }

    /// What bytes meet that need room of the drive.
    fn takes_room(&self, bytes: u64) -> std::io::Result<()> {
        let mut fault = self.fault();
        match fault.room {
            None => {}
            Some(room) if room >= bytes.max(1) => fault.room = Some(room - bytes),
            Some(_) => {
                fault.failed += 1;
                return Err(Error::from_raw_os_error(ENOSPC));
            }
        }
        Ok(())
    }

    fn gives_room(&self, path: &Path) {
        let bytes = std::fs::metadata(path).map_or(0, |facts| facts.blocks() * 512);
        let mut fault = self.fault();
        fault.room = fault.room.map(|room| room + bytes);
    }

    /// What the drive says is free from now on.
    pub(crate) fn says_free(&self, bytes: u64) {
        *self.free_bytes.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }

    /// How many operations failed.
    pub(crate) fn failed(&self) -> usize {
        self.fault().failed
    }

    /// What an operation that changes a file meets. A full medium refuses what needs space.
    fn meets(&self, path: &Path, needs_space: bool) -> std::io::Result<()> {
        let mut fault = self.fault();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some((_, errno)) = fault.on.filter(|(prefix, _)| name.starts_with(prefix)) else { return Ok(()) };
        if errno == ENOSPC && !needs_space {
            return Ok(());
        }
        if fault.left > 0 {
            fault.left -= 1;
            return Ok(());
        }
        fault.failed += 1;
        Err(Error::from_raw_os_error(errno))
    }
}

/// The retention drive.
struct Drive(Arc<Faulty>);

/// A drive that can fail, and its files.
pub(crate) fn drive() -> (Arc<Faulty>, Arc<dyn Files>) {
    let faulty =
        Arc::new(Faulty { files: fs_opener(), fault: Mutex::default(), free_bytes: Mutex::default() });
    (Arc::clone(&faulty), Arc::new(Drive(faulty)))
}

impl Files for Drive {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        self.0.files.facts(path)
    }

    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        self.0.files.neighbours(path)
    }

    fn free_bytes(&self, path: &Path) -> Result<Option<u64>, FilesError> {
        let said = *self.0.free_bytes.lock().unwrap();
        said.map_or_else(|| self.0.files.free_bytes(path), |bytes| Ok(Some(bytes)))
    }

    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        self.0.files.read_head(path, bytes_max)
    }

    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        let file = self.0.files.open(path, writable)?;
        Ok(Box::new(FaultyFile { faulty: Arc::clone(&self.0), path: path.into(), file }))
    }

    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let met = self.0.meets(path, true).and_then(|()| self.0.takes_room(0));
        met.map_err(|source| FilesError::system("create", path, source))?;
        self.0.files.create(path, size_bytes)
    }

    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        let met = self.0.meets(path, true).and_then(|()| self.0.takes_room(0));
        met.map_err(|source| FilesError::system("set the length of", path, source))?;
        self.0.files.resize(path, size_bytes)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        let met = self.0.meets(path, true).and_then(|()| self.0.takes_room(0));
        met.map_err(|source| FilesError::system("replace", path, source))?;
        self.0.files.replace(path, content)
    }

    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        self.0.meets(path, false).map_err(|source| FilesError::system("remove", path, source))?;
        self.0.gives_room(path);
        self.0.files.remove(path)
    }

    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        self.0.meets(path, false).map_err(|source| FilesError::system("remove", path, source))?;
        self.0.gives_room(path);
        self.0.files.remove_durably(path)
    }

    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        self.0.files.set_aside(path, suffix)
    }
}

struct FaultyFile {
    faulty: Arc<Faulty>,
    path: PathBuf,
    file: Box<dyn BlockFile>,
}

impl FaultyFile {
    fn named(&self, op: BlockOp) -> impl Fn(std::io::Error) -> BlockError {
        let name = self.path.display().to_string();
        move |source| BlockError { name: name.clone(), op, offset: 0, len: 0, source }
    }

    fn meets(&self, op: BlockOp) -> Result<(), BlockError> {
        self.faulty.meets(&self.path, op != BlockOp::Flush).map_err(self.named(op))
    }

    /// Whether these bytes need room of the drive.
    fn is_new(&mut self, write: &WriteAt<'_>) -> Result<bool, BlockError> {
        let range = ByteRange { start: write.offset, end: write.offset + write.data.len() as u64 };
        Ok(self.file.allocated(range)? != [range])
    }
}

impl BlockFile for FaultyFile {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.file.read(reads)
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        if let Err(error) = self.meets(BlockOp::Write) {
            // The medium took the first part.
            let parts: Vec<WriteAt<'_>> = writes
                .iter()
                .map(|write| WriteAt { data: &write.data[..write.data.len() / 8192 * 4096], ..*write })
                .filter(|write| !write.data.is_empty())
                .collect();
            if !parts.is_empty() {
                self.file.write(&parts)?;
            }
            return Err(error);
        }
        for write in writes {
            if self.faulty.fault().room.is_some() && self.is_new(write)? {
                let bytes = write.data.len() as u64;
                self.faulty.takes_room(bytes).map_err(self.named(BlockOp::Write))?;
            }
        }
        self.file.write(writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.meets(BlockOp::Zero)?;
        self.file.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.meets(BlockOp::Flush)?;
        self.file.flush()
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}

fn noise(seed: u64, sectors: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..sectors * SECTOR_BYTES / 8).flat_map(|_| next()).collect()
}

/// A disk behind a journal on a drive that can fail, and what it must show.
pub(crate) struct Lab {
    pub(crate) faulty: Arc<Faulty>,
    pub(crate) folder: PathBuf,
    spec: TargetSpec,
    open: Option<(Arc<Retention>, JoinHandle<()>, Journaled)>,
    sequence: Sequence,
    content: Vec<u8>,
    /// What the disk held at entries that are marks, and at the beginning.
    pub(crate) at: BTreeMap<u64, Vec<u8>>,
}

fn settings() -> RetentionSettings {
    let hour = Duration::from_secs(3600);
    let ladder =
        Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
    let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
    RetentionSettings { undo_epoch: hour, ladder, segment_bytes: 4 << 20, reserve_bytes: 0, scrub }
}

impl Lab {
    /// A disk that was found, with a point of that.
    pub(crate) fn new(dir: &Path) -> Self {
        let mut lab = Self::created(dir);
        lab.disk().keep_as_found().unwrap();
        lab
    }

    /// A disk that was created: its before-images are kept from its first mark on.
    pub(crate) fn created(dir: &Path) -> Self {
        let spec = TargetSpec { path: dir.join("web.vmdk"), kind: TargetKind::MonolithicFlat };
        let (none, options) = (BTreeSet::new(), CreateOptions::default());
        create_target(&fs_opener(), &spec, SECTORS * SECTOR_BYTES, &none, &options).unwrap().close().unwrap();
        let content = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        let mut lab = Self {
            faulty: Arc::new(Faulty {
                files: fs_opener(),
                fault: Mutex::default(),
                free_bytes: Mutex::default(),
            }),
            folder: dir.join("retention"),
            spec,
            open: None,
            sequence: Sequence::ZERO,
            at: BTreeMap::from([(0, content.clone())]),
            content,
        };
        lab.start();
        lab
    }

    pub(crate) fn start(&mut self) {
        let files: Arc<dyn Files> = Arc::new(Drive(Arc::clone(&self.faulty)));
        let (retention, found) = Retention::open(files, &self.folder, settings()).unwrap();
        let committer = retention.start().unwrap();
        let expect = Expectation { writable: true, ..Expectation::default() };
        let target = open_target(&fs_opener(), &self.spec, &expect).unwrap();
        let guard = Guard::new(&*fs_opener(), &self.spec.path, self.spec.kind);
        let log = found.disks.get(&DISK);
        let newest = log.and_then(|log| newest_state(retention.lock().get().unwrap(), log).unwrap());
        let agent = PeerId([2; 16]);
        let fresh = || TargetDisk::new_state(DISK, agent, [3; 16], SECTORS, LINEAGE, PassMode::Done);
        let state = newest.unwrap_or_else(fresh);
        let disk = Journaled::open(&retention, target, guard, state, [2; 16], log).unwrap();
        self.open = Some((retention, committer, disk));
    }

    pub(crate) fn stop(&mut self) {
        let (retention, committer, disk) = self.open.take().unwrap();
        disk.into_target().close().unwrap();
        retention.close(vec![committer]);
    }

    pub(crate) fn retention(&self) -> Arc<Retention> {
        Arc::clone(&self.open.as_ref().unwrap().0)
    }

    /// What the target holds.
    pub(crate) fn target(&mut self) -> Vec<u8> {
        let target = self.disk().target();
        let mut bytes = vec![0; target.size_bytes() as usize];
        target.read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
        bytes
    }

    /// The disk is larger; what is new is zeros.
    pub(crate) fn grown(&mut self, sectors: u64) {
        self.content.resize((sectors * SECTOR_BYTES) as usize, 0);
    }

    pub(crate) fn disk(&mut self) -> &mut Journaled {
        &mut self.open.as_mut().unwrap().2
    }

    /// Every kept point, by its entry, shows what the disk held there; answers how many there are.
    pub(crate) fn check(&mut self, what: &str) -> usize {
        self.check_shown(what, false)
    }

    /// As [`Self::check`]; of a disk that stopped, a point may also be refused.
    pub(crate) fn check_shown(&mut self, what: &str, is_stopped: bool) -> usize {
        let (retention, _, disk) = self.open.as_mut().unwrap();
        let points: Vec<PointKept> = retention.shape().disks[&DISK].points.values().copied().collect();
        for point in &points {
            let at = At::entry(point.epoch, point.number);
            let view = retention.view(DISK, at).unwrap();
            let mut bytes = vec![0; view.size_bytes() as usize];
            match disk.read_view(&view, 0, &mut bytes) {
                Err(_) if is_stopped => continue,
                read => read.unwrap_or_else(|error| panic!("{what}: {at}: {error}")),
            }
            assert!(bytes == self.at[&point.number], "{what}: point {at} shows something else");
        }
        points.len()
    }

    /// Does something until it is done, as the writer does: while the drive is full it waits and tries again. There is space
    /// again at the third time. Answers whether it got there, or why the disk stopped.
    pub(crate) fn persist(
        &mut self,
        what: &str,
        mut work: impl FnMut(&mut Journaled) -> Result<(), NotDone>,
    ) -> Result<(), String> {
        for time in 0.. {
            match work(self.disk()) {
                Ok(()) => break,
                Err(NotDone::Full(text)) => {
                    assert!(time < 4, "{what}: there is space, and still {text}");
                    self.check(&format!("{what}, full for the {time}. time"));
                    if time == 2 {
                        self.faulty.mend();
                    }
                }
                Err(NotDone::Failed(text) | NotDone::GivenUp(text)) => return Err(text),
            }
        }
        Ok(())
    }

    /// The source writes, and a mark follows on command: the undo epoch ends there.
    pub(crate) fn step(&mut self, seed: u64, what: &str) -> Result<(), String> {
        self.write_and_mark(seed, MarkCause::Command, what)
    }

    /// What the source holds.
    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// The open journal and its disk, for who drives them otherwise.
    pub(crate) fn take(&mut self) -> (Arc<Retention>, JoinHandle<()>, Journaled) {
        self.open.take().unwrap()
    }

    /// The source writes: it is in the log, and waits.
    pub(crate) fn write(&mut self, seed: u64, what: &str) -> Result<(), String> {
        let (start, sectors) = (seed * 40 % (SECTORS - 128), 128);
        let data = noise(seed, sectors);
        let records = [Record::data(start, data.clone().into())];
        let state = self.disk().state.clone();
        let header = BatchHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation: state.generation,
            first_sequence: self.sequence.next(),
            chain: state.chain,
            source_time: Timestamp(seed),
            record_count: 1,
            stretch: Stretch::Ordered,
        };
        self.sequence = header.last_sequence();
        let body = encode_batch(&header, &records).body();
        let keep = vec![SectorRange::new(start, start + sectors)];
        let pieces = [Piece { record: records[0].clone(), keep }];
        let sequence = self.sequence;
        self.disk().accepted(EntryKind::Ordered, body, sequence);
        self.persist(what, |disk| disk.write(&pieces))?;
        let from = (start * SECTOR_BYTES) as usize;
        self.content[from..from + data.len()].copy_from_slice(&data);
        let number = self.disk().newest.0;
        self.at.extend([(number, self.content.clone()), (number + 1, self.content.clone())]);
        Ok(())
    }

    /// The source writes, and a mark follows.
    pub(crate) fn write_and_mark(&mut self, seed: u64, cause: MarkCause, what: &str) -> Result<(), String> {
        self.write(seed, what)?;
        self.persist(what, |disk| disk.apply().map(drop))?;
        self.mark(seed, cause, what)
    }

    /// A mark behind what was written.
    pub(crate) fn mark(&mut self, seed: u64, cause: MarkCause, what: &str) -> Result<(), String> {
        let (state, sequence) = (self.disk().state.clone(), self.sequence);
        let mark = Mark {
            disk: DISK,
            lineage: LINEAGE,
            generation: state.generation,
            sequence,
            chain: state.chain,
            source_time: Timestamp(seed),
            point: [seed as u8; 16],
            number: seed,
            class: MarkClass::Crash,
            cause,
            name: Text::new(""),
            unread_blocks: 0,
        };
        self.disk().marked(&mark);
        let state = DiskState { sequence, ..state };
        self.persist(what, |disk| disk.checkpoint(&state))?;
        self.persist(what, |disk| disk.apply().map(drop))
    }
}
