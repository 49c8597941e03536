//! A scripted agent for one disk worker: opens the disk, sends batches, waits for acknowledgements.
//!
//! Invariant: it speaks through the same channels and the same bytes as a session does; a reply that does not come
//! within a minute fails the test.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test program uses its part")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, CHAIN_START, Chain, Mark, MarkCause, MarkClass, Stretch, encode_batch,
    encode_bulk,
};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{ErrorCode, GrantHead, Message, OpenDiskHead, PassEnd, PassMode};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{self, BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::proto::target_disk::{SessionId, TargetDisk};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::Journal;
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::target::{
    CreateOptions, Expectation, Target, TargetError, TargetKind, TargetSpec, create_target, open_target,
};
use reprotect_engine::units::{
    DiskId, Generation, LineageId, PeerId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};
use reprotect_master_target::disk_store::DiskStore;
use reprotect_master_target::disk_worker::{DiskSetup, DiskWorker};
use reprotect_master_target::guard::Guard;
use reprotect_master_target::journaled::Journaled;
use reprotect_master_target::receipts::Receipts;
use reprotect_master_target::redo::newest_state;
use reprotect_master_target::registry::fs_opener;
use reprotect_master_target::retention::{Retention, RetentionSettings};
use reprotect_master_target::scrub::ScrubSettings;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

pub(crate) const DISK: DiskId = DiskId([1; 16]);
pub(crate) const LINEAGE: LineageId = LineageId([4; 16]);

pub(crate) fn spec(path: &Path, kind: TargetKind) -> TargetSpec {
    TargetSpec { path: path.to_owned(), kind }
}

pub(crate) fn new_state(size_bytes: u64, mode: PassMode) -> DiskState {
    TargetDisk::new_state(DISK, PeerId([2; 16]), [3; 16], size_bytes / SECTOR_BYTES, LINEAGE, mode)
}

/// A journal that keeps everything for the time of a test.
pub(crate) fn retention_settings() -> RetentionSettings {
    let hour = Duration::from_secs(3600);
    let ladder =
        Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
    let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
    RetentionSettings { undo_epoch: hour, ladder, segment_bytes: 32 << 20, reserve_bytes: 0, scrub }
}

/// A worker under test with its places.
pub(crate) struct Bench {
    pub(crate) runtime: Runtime,
    pub(crate) opener: Arc<dyn Files>,
    pub(crate) spec: TargetSpec,
    pub(crate) state_path: PathBuf,
    pub(crate) size_bytes: u64,
    pub(crate) worker: Option<DiskWorker>,
    sessions: u64,
    /// The retention folder, where there is one, and the journal while the worker runs.
    folder: Option<PathBuf>,
    journal: Option<(Arc<Retention>, std::thread::JoinHandle<()>)>,
    settings: RetentionSettings,
    /// The drive of the retention folder.
    pub(crate) retention_files: Arc<dyn Files>,
}

impl Bench {
    /// Starts a worker on a target that is created, or opened where it is a device.
    pub(crate) fn start(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
    ) -> Self {
        Self::start_with(opener, spec, state_path, size_bytes, None)
    }

    /// As [`Self::start`], behind a retention journal in `folder`, if given.
    pub(crate) fn start_with(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
        folder: Option<PathBuf>,
    ) -> Self {
        Self::start_keeping(opener, spec, state_path, size_bytes, folder, retention_settings())
    }

    /// As [`Self::start_with`], with these settings of the journal.
    pub(crate) fn start_keeping(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
        folder: Option<PathBuf>,
        settings: RetentionSettings,
    ) -> Self {
        let none = BTreeSet::new();
        let mode = if spec.kind == TargetKind::Device {
            PassMode::Compare
        } else {
            create_target(&opener, &spec, size_bytes, &none, &CreateOptions::default())
                .unwrap()
                .close()
                .unwrap();
            PassMode::Copy
        };
        let mut bench = Self::stopped(opener, spec, state_path, size_bytes, folder);
        bench.settings = settings;
        let state = new_state(size_bytes, mode);
        std::fs::write(&bench.state_path, state.to_bytes()).unwrap();
        bench.run(state);
        bench
    }

    /// A worker on what another left; [`Self::resume`] starts it.
    pub(crate) fn of(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
        folder: PathBuf,
        settings: RetentionSettings,
    ) -> Self {
        Self { settings, ..Self::stopped(opener, spec, state_path, size_bytes, Some(folder)) }
    }

    /// As [`Self::start`] on a medium that is too small for the disk, which the check of the space refuses: what it
    /// would make is made by hand.
    pub(crate) fn start_unchecked(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
    ) -> Self {
        let elsewhere = tempfile::tempdir().unwrap();
        let made =
            TargetSpec { path: elsewhere.path().join(spec.path.file_name().unwrap()), kind: spec.kind };
        let none = BTreeSet::new();
        create_target(&opener, &made, size_bytes, &none, &CreateOptions::default()).unwrap().close().unwrap();
        std::fs::copy(&made.path, &spec.path).unwrap();
        let name = |path: &Path| path.with_file_name("web-flat.vmdk");
        std::fs::File::create(name(&spec.path)).unwrap().set_len(size_bytes).unwrap();
        let mut bench = Self::stopped(opener, spec, state_path, size_bytes, None);
        bench.run(new_state(size_bytes, PassMode::Copy));
        bench
    }

    fn stopped(
        opener: Arc<dyn Files>,
        spec: TargetSpec,
        state_path: PathBuf,
        size_bytes: u64,
        folder: Option<PathBuf>,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (worker, sessions, journal, settings) = (None, 0, None, retention_settings());
        let retention_files = fs_opener();
        Self {
            runtime,
            opener,
            spec,
            state_path,
            size_bytes,
            worker,
            sessions,
            folder,
            journal,
            settings,
            retention_files,
        }
    }

    /// Starts again after [`Self::stop`].
    pub(crate) fn resume(&mut self) {
        self.run(self.saved());
    }

    fn run(&mut self, state: DiskState) {
        let expect =
            Expectation { size_bytes: Some(self.size_bytes), writable: true, ..Expectation::default() };
        // A child that another test of this process is just starting holds our locks until it runs its program.
        let mut tries = 0;
        let target = loop {
            match open_target(&self.opener, &self.spec, &expect) {
                Err(TargetError::InUse { .. }) if tries < 100 => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                opened => break opened.unwrap(),
            }
            tries += 1;
        };
        let guard = Guard::new(&*self.opener, &self.spec.path, self.spec.kind);
        let limits = FlowLimits { flush_nanos: 20_000_000, ..FlowLimits::default() };
        let (store, state) = match self.folder.clone() {
            None => (DiskStore::direct(target, guard, self.state_path.clone()), state),
            Some(folder) => self.behind_journal(&folder, target, guard, state),
        };
        let receipts = Receipts::open(self.state_path.parent().unwrap()).keeper(DISK);
        let setup = DiskSetup { store, state, limits, fenced: None, receipts };
        self.worker = Some(DiskWorker::start(setup).unwrap());
    }

    fn behind_journal(
        &mut self,
        folder: &Path,
        target: Target,
        guard: Guard,
        state: DiskState,
    ) -> (DiskStore, DiskState) {
        let (retention, found) =
            Retention::open(Arc::clone(&self.retention_files), folder, self.settings.clone()).unwrap();
        let committer = retention.start().unwrap();
        let log = found.disks.get(&DISK);
        let newest = log.and_then(|log| newest_state(retention.lock().get().unwrap(), log).unwrap());
        let state = newest.unwrap_or(state);
        let store = Journaled::open(&retention, target, guard, state, [2; 16], log).unwrap();
        let state = store.state().clone();
        self.journal = Some((retention, committer));
        (DiskStore::Journaled(Box::new(store)), state)
    }

    pub(crate) fn stop(&mut self) {
        self.worker.take().unwrap().stop();
        if let Some((retention, committer)) = self.journal.take() {
            retention.close(vec![committer]);
        }
    }

    pub(crate) fn saved(&self) -> DiskState {
        DiskState::decode(&std::fs::read(&self.state_path).unwrap()).unwrap()
    }

    pub(crate) fn restart(&mut self) {
        self.stop();
        self.run(self.saved());
    }

    pub(crate) fn problem(&self) -> Option<String> {
        self.worker.as_ref().unwrap().status().snapshot().problem
    }

    /// Waits until what the status shows fits.
    pub(crate) fn until_problem(&self, fits: impl Fn(Option<&str>) -> bool) -> Option<String> {
        for _ in 0..6000 {
            let problem = self.problem();
            if fits(problem.as_deref()) {
                return problem;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the status shows {:?}", self.problem());
    }

    /// Something done with the disk behind the journal, on its thread.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Journaled) -> T + Send + 'static,
    ) -> T {
        let inputs = self.worker.as_ref().unwrap().inputs();
        inputs.ask(move |store| store.map(work)).unwrap().expect("the disk does not stand")
    }

    /// The disk as it was at a point.
    pub(crate) fn point_bytes(&self, at: At) -> Vec<u8> {
        let retention = Arc::clone(self.retention());
        self.ask(move |store| {
            let view = retention.view(DISK, at).unwrap();
            let mut bytes = vec![0; view.size_bytes() as usize];
            store.read_view(&view, 0, &mut bytes).unwrap();
            bytes
        })
    }

    /// The journal while the worker runs.
    pub(crate) fn retention(&self) -> &Arc<Retention> {
        &self.journal.as_ref().unwrap().0
    }

    /// Looks at the journal.
    pub(crate) fn journal<T>(&self, look: impl FnOnce(&mut Journal) -> T) -> T {
        look(self.retention().lock().get().unwrap())
    }

    /// A session of an agent that was granted `generation`.
    pub(crate) fn session(&mut self) -> Agent {
        self.sessions += 1;
        let (replies, received) = mpsc::unbounded_channel();
        Agent {
            id: SessionId(self.sessions),
            replies,
            received,
            generation: Generation::ZERO,
            pass: 0,
            sequence: Sequence::ZERO,
            chain: CHAIN_START,
            settled: Vec::new(),
            mode: PassMode::Copy,
        }
    }

    /// A session that opened the disk.
    pub(crate) fn opened(&mut self) -> Agent {
        let generation = self.worker.as_ref().unwrap().status().snapshot().generation;
        let mut agent = self.session();
        agent.open(self, generation);
        agent
    }
}

/// The agent's end.
pub(crate) struct Agent {
    pub(crate) id: SessionId,
    replies: mpsc::UnboundedSender<Message>,
    received: mpsc::UnboundedReceiver<Message>,
    pub(crate) generation: Generation,
    pub(crate) pass: u64,
    pub(crate) sequence: Sequence,
    pub(crate) chain: Chain,
    pub(crate) settled: Vec<SectorRange>,
    pub(crate) mode: PassMode,
}

impl Agent {
    pub(crate) fn send(&self, bench: &Bench, input: DiskInput) {
        let inputs = bench.worker.as_ref().unwrap().inputs();
        bench.runtime.block_on(inputs.send(self.id, input, self.replies.clone())).unwrap();
    }

    /// The next reply that `pick` takes; others are passed over.
    pub(crate) fn wait<T>(&mut self, bench: &Bench, mut pick: impl FnMut(Message) -> Option<T>) -> T {
        bench.runtime.block_on(async {
            loop {
                let reply = tokio::time::timeout(Duration::from_secs(60), self.received.recv()).await;
                if let Some(found) = pick(reply.expect("a reply within a minute").expect("the worker lives"))
                {
                    return found;
                }
            }
        })
    }

    pub(crate) fn ask_open(&self, bench: &Bench, generation: Generation) {
        let head = OpenDiskHead {
            disk: DISK,
            size_sectors: bench.size_bytes / SECTOR_BYTES,
            generation,
            lineage: LINEAGE,
            durable: self.sequence,
            grant_bytes: 0,
        };
        self.send(bench, DiskInput::Open(head));
    }

    pub(crate) fn open(&mut self, bench: &Bench, generation: Generation) -> GrantHead {
        self.ask_open(bench, generation);
        let (head, settled) = self.wait(bench, |message| match message {
            Message::Grant(head, settled, _) => Some((head, settled)),
            _ => None,
        });
        self.generation = head.generation;
        self.pass = head.pass;
        self.sequence = head.durable;
        self.chain = head.chain;
        self.mode = head.mode;
        self.settled = settled;
        head
    }

    /// Sends a delta batch and takes its sequences.
    pub(crate) fn delta(&mut self, bench: &Bench, records: &[Record]) -> Sequence {
        let header = self.delta_header(records);
        self.send(bench, DiskInput::Batch(encode_batch(&header, records).body()));
        self.sequence = header.last_sequence();
        self.chain = header.chain_after(records);
        self.sequence
    }

    pub(crate) fn delta_header(&self, records: &[Record]) -> BatchHeader {
        BatchHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation: self.generation,
            first_sequence: self.sequence.next(),
            chain: self.chain,
            source_time: Timestamp(1),
            record_count: records.len() as u32,
            stretch: Stretch::Diff,
        }
    }

    pub(crate) fn bulk(&mut self, bench: &Bench, cover: SectorRange, records: &[Record]) {
        let header = BulkHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation: self.generation,
            pass: self.pass,
            as_of: self.sequence,
            cover,
            record_count: records.len() as u32,
        };
        self.send(bench, DiskInput::Bulk(encode_bulk(&header, records).body()));
    }

    /// Places a mark behind everything sent.
    pub(crate) fn mark(&self, bench: &Bench, number: u64, point: u8) {
        self.mark_named(bench, number, point, "");
    }

    /// As [`Self::mark`]; with a name the undo epoch ends there.
    pub(crate) fn mark_named(&self, bench: &Bench, number: u64, point: u8, name: &str) {
        self.send(bench, DiskInput::Mark(self.mark_of(number, point, name)));
    }

    /// The mark behind everything sent.
    pub(crate) fn mark_of(&self, number: u64, point: u8, name: &str) -> Mark {
        Mark {
            disk: DISK,
            lineage: LINEAGE,
            generation: self.generation,
            sequence: self.sequence,
            chain: self.chain,
            source_time: Timestamp(u64::from(point)),
            point: [point; 16],
            number,
            class: MarkClass::Crash,
            cause: MarkCause::Timer,
            name: Text::new(name),
            unread_blocks: 0,
        }
    }

    /// Waits until marks up to a number are durable.
    pub(crate) fn until_marked(&mut self, bench: &Bench, number: u64) {
        self.wait(bench, |message| match message {
            Message::Ack(ack) => (ack.mark >= number).then_some(()),
            Message::Error(_, text) => panic!("{text}"),
            _ => None,
        });
    }

    pub(crate) fn until_durable(&mut self, bench: &Bench, sequence: Sequence) {
        self.wait(bench, |message| match message {
            Message::Ack(ack) => (ack.durable >= sequence).then_some(()),
            Message::Error(head, text) if head.code != ErrorCode::Full => panic!("{:?}: {text}", head.code),
            _ => None,
        });
    }

    /// Waits until bulk acknowledgements cover `cover`.
    pub(crate) fn until_settled(&mut self, bench: &Bench, cover: SectorRange) {
        let mut settled = reprotect_engine::range_set::RangeSet::new();
        self.wait(bench, |message| match message {
            Message::BulkAck(_, ranges) => {
                ranges.into_iter().for_each(|range| settled.insert(range));
                settled.contains(cover).then_some(())
            }
            Message::Error(head, text) if head.code != ErrorCode::Full => panic!("{:?}: {text}", head.code),
            _ => None,
        });
    }

    pub(crate) fn end_pass(&mut self, bench: &Bench) {
        let end = PassEnd { disk: DISK, generation: self.generation, pass: self.pass };
        self.send(bench, DiskInput::PassEnd(end));
        let mode = self.wait(bench, |message| match message {
            Message::PassState(state) => Some(state.mode),
            Message::Error(_, text) => panic!("{text}"),
            _ => None,
        });
        assert_eq!(mode, PassMode::Done);
    }

    pub(crate) fn until_error(&mut self, bench: &Bench, code: ErrorCode) -> String {
        self.wait(bench, |message| match message {
            Message::Error(head, text) if head.code == code => Some(text),
            Message::Error(head, text) => panic!("{:?}: {text}", head.code),
            _ => None,
        })
    }
}

/// Waits until the disk has a point.
pub(crate) fn until_a_point(bench: &Bench) {
    for _ in 0..6000 {
        if !bench.journal(|journal| journal.shape().disks[&DISK].points.is_empty()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("a minute, and no point");
}

/// What the source writes: a block of this byte at this place.
pub(crate) fn block(byte: u8) -> Record {
    Record::data(u64::from(byte) * 8, vec![byte; 4096].into())
}

/// The disk with the blocks of these bytes.
pub(crate) fn with_blocks(size_bytes: u64, bytes: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; size_bytes as usize];
    for byte in bytes {
        let at = usize::from(*byte) * 4096;
        disk[at..at + 4096].fill(*byte);
    }
    disk
}

/// A file of a medium that is gone after so many changes.
pub(crate) struct Fused(Box<dyn BlockFile>, Arc<AtomicI64>);

impl Fused {
    fn change(&self, op: BlockOp) -> Result<(), BlockError> {
        if self.1.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        let source = std::io::Error::from_raw_os_error(5); // EIO
        Err(BlockError { name: "fused".to_owned(), op, offset: 0, len: 0, source })
    }
}

impl BlockFile for Fused {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.0.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.change(BlockOp::Write)?;
        self.0.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.change(BlockOp::Zero)?;
        self.0.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.change(BlockOp::Flush)?;
        self.0.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.0.allocated(range)
    }
}

/// Files of a medium that fails changes once so many were made.
pub(crate) fn fused_opener(left: &Arc<AtomicI64>) -> Arc<dyn Files> {
    let left = Arc::clone(left);
    Arc::new(FsFiles::new(move |path, writable| {
        let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
        Ok(Box::new(Fused(io::open(path, &options)?, Arc::clone(&left))) as Box<dyn BlockFile>)
    }))
}

/// Bytes that no other place has: a pattern of seed and position.
pub(crate) fn pattern(seed: u64, len: usize) -> Bytes {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

/// A loop device over a file, detached on drop.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
}

impl Loop {
    pub(crate) fn over(file: &Path) -> Self {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .expect("losetup runs");
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Self { path: String::from_utf8(output.stdout).unwrap().trim().into() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// Whether this test may make loop devices and mounts; says so where it may not.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !root {
        eprintln!("SKIPPED: needs root and loop devices");
    }
    root
}
