//! One session with a master target: the protocol core between the lanes, the readers and the workers.
//!
//! ```text
//! core ──Work──▶ reader ──data──▶ workers ──records──▶ core ──frames──▶ lanes
//! ```
//! Invariants: one task owns the core and everything about its disks; a chunk's data are dropped when its records are
//! made or its walk is over; the core outlives the session, so that what was not durable goes on in the next one.
//! Called by `daemon`, which dials again when it returns.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::compress::{LevelController, Load};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::host::values::LevelText;
use reprotect_engine::limits::{CHUNK_BYTES, CHUNKS_OPEN_MAX, UNWRITTEN_BYTES_MAX};
use reprotect_engine::net::endpoint::PeerConnection;
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::{mono_clock, wall_clock};
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::pass::{PassAction, Sink};
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};
use tokio::sync::mpsc;

use crate::api::{DiskInfo, StatusInfo};
use crate::config::{Compress, Settings};
use crate::disks::SourceKind;
use crate::reader::{ChunkRead, DiskReader, ReadJob, Throttle};
use crate::sources::Sources;
use crate::workers::{Done, Job, JobKey, Workers};

/// How often status and level are brought up to date.
const TICK: Duration = Duration::from_millis(100);
/// How often the compression level is looked at.
const LEVEL_TICK: Duration = Duration::from_millis(250);
/// Level an adaptive agent begins with: the fastest that pays on most links.
const LEVEL_START: i32 = -1;
/// Pause after a disk was opened before its first scan round.
const FIRST_SCAN: Duration = Duration::from_millis(200);

/// A chunk whose data are kept.
#[derive(Debug)]
struct Kept {
    epoch: u64,
    data: Bytes,
    time: Timestamp,
    as_of: Sequence,
}

/// A disk this agent protects.
#[derive(Debug)]
struct Protected {
    path: String,
    size_sectors: u64,
    reader: DiskReader,
    kept: HashMap<u64, Kept>,
    wanted: HashMap<(u64, u64), Sequence>,
    state: &'static str,
    next_scan: Option<Instant>,
    walk_began: Timestamp,
    durable_as_of: Timestamp,
    scan_rounds: u64,
    problem: Option<String>,
}

/// The agent's long-lived part: survives sessions.
pub struct Machine {
    core: Agent,
    settings: Settings,
    sources: Sources,
    throttle: Arc<Throttle>,
    workers: Workers,
    done: mpsc::UnboundedReceiver<Done>,
    reads: mpsc::UnboundedReceiver<(DiskId, ChunkRead)>,
    deliver: mpsc::UnboundedSender<(DiskId, ChunkRead)>,
    disks: BTreeMap<DiskId, Protected>,
    missing: BTreeMap<DiskId, String>,
    controller: Option<LevelController>,
    busy_before: (Instant, u64),
    status: tokio::sync::watch::Sender<StatusInfo>,
}

impl Machine {
    /// A machine with these sources; `level` is `None` for an adaptive one.
    ///
    /// # Errors
    /// When threads or compression contexts cannot be had.
    pub fn new(
        mut core: Agent,
        host_name: &str,
        settings: Settings,
        sources: Sources,
        status: tokio::sync::watch::Sender<StatusInfo>,
    ) -> anyhow::Result<Self> {
        core.set_inventory(host_name, crate::sources::inventory(&sources));
        let controller = match settings.compress_level {
            LevelText::Fixed(_) => None,
            LevelText::Adaptive => Some(LevelController::new(LEVEL_START)),
        };
        let level = match settings.compress_level {
            LevelText::Fixed(level) => level,
            LevelText::Adaptive => {
                controller.as_ref().map_or(-1, LevelController::level)
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4);
        let (done_in, done) = mpsc::unbounded_channel();
        let (deliver, reads) = mpsc::unbounded_channel();
        Ok(Self {
            core,
            throttle: Arc::new(Throttle::new(settings.read_rate.bytes_per_second())),
            settings,
            sources,
            workers: Workers::start(threads, level, &done_in)?,
            done,
            reads,
            deliver,
            disks: BTreeMap::new(),
            missing: BTreeMap::new(),
            controller,
            busy_before: (Instant::now(), 0),
            status,
        })
    }

    /// Uses other sources from now on and tells the target.
    pub fn set_sources(&mut self, host_name: &str, sources: Sources) {
        self.core.set_inventory(host_name, crate::sources::inventory(&sources));
        self.sources = sources;
    }

    /// No session can be had at the moment, and why.
    pub fn unreachable(&self, reason: &str) {
        self.status.send_modify(|status| status.problem = Some(reason.to_owned()));
    }

    /// Runs one session to its end; the text says why it ended.
    pub async fn run_session(&mut self, peer: &PeerConnection, session: [u8; 16]) -> String {
        let (reader, writer, written) = match lanes::dialled::<usize>(&peer.connection).await {
            Ok(lanes) => lanes,
            Err(error) => return error.to_string(),
        };
        let relayed = peer.peer.role == Role::ProcessServer;
        let compress = match self.settings.compress {
            Compress::Source => true,
            Compress::Auto => !relayed,
            Compress::Relay | Compress::Off => false,
        };
        self.status.send_modify(|status| {
            status.connected = true;
            status.sessions += 1;
            status.upstream = Some(peer.connection.remote_address().to_string());
            status.upstream_role = Some(peer.peer.role.to_string());
            status.problem = None;
            status.level = None;
        });
        self.core.handle_connected(session);
        let mut link = Link { reader, writer, written, unwritten_bytes: 0, compress };
        let reason = self.drive(&mut link).await;
        self.core.handle_disconnected();
        for disk in self.disks.values_mut() {
            disk.kept.clear();
            disk.wanted.clear();
            disk.next_scan = None;
            disk.state = "disconnected";
        }
        self.status.send_modify(|status| {
            status.connected = false;
            status.problem = Some(reason.clone());
        });
        self.publish(compress);
        reason
    }

    async fn drive(&mut self, link: &mut Link) -> String {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.advance(link);
            tokio::select! {
                arrival = link.reader.next() => match arrival {
                    Arrival::Frame(kind, body) => {
                        if let Err(error) = self.core.handle_frame(kind, &body) {
                            return error.to_string();
                        }
                    }
                    Arrival::Over(error) => return error.to_string(),
                },
                Some(bytes) = link.written.recv() => link.unwritten_bytes -= bytes,
                Some((disk, read)) = self.reads.recv() => self.handle_read(disk, read),
                Some(done) = self.done.recv() => self.handle_done(done),
                _ = tick.tick() => {
                    self.begin_scans();
                    self.adapt_level(link);
                    self.publish(link.compress);
                }
            }
        }
    }

    /// Does all that the core wants done now.
    fn advance(&mut self, link: &mut Link) {
        while let Some(event) = self.core.poll_event() {
            self.handle_event(event, link.compress);
        }
        while let Some(outgoing) = self.core.poll_transmit() {
            let bytes = outgoing.frame.encoded_bytes();
            link.unwritten_bytes += bytes;
            link.writer.send(outgoing, bytes);
        }
    }

    fn handle_event(&mut self, event: AgentEvent, compress: bool) {
        match event {
            AgentEvent::Ready => tracing::info!("session ready"),
            AgentEvent::Offered { disk, source, size_sectors } => self.handle_offer(disk, &source, size_sectors),
            AgentEvent::Opened { disk, mode } => {
                tracing::info!(%disk, ?mode, "disk opened at the target");
                self.with(disk, |state| {
                    state.problem = None;
                    state.walk_began = wall_clock();
                    state.state = match mode {
                        PassMode::Done => "synced",
                        PassMode::Copy => "copying",
                        PassMode::Compare => "comparing",
                    };
                    state.next_scan = (mode == PassMode::Done).then(|| Instant::now() + FIRST_SCAN);
                });
            }
            AgentEvent::Work { disk, epoch, sink, as_of, action } => {
                self.handle_work(disk, epoch, sink, as_of, action, compress);
            }
            AgentEvent::Synced { disk } => {
                tracing::info!(%disk, "the whole disk is on the target");
                self.with(disk, |state| {
                    state.state = "synced";
                    state.durable_as_of = state.walk_began;
                    state.next_scan = Some(Instant::now() + FIRST_SCAN);
                });
            }
            AgentEvent::ScanDone { disk } => {
                let pause = self.settings.scan_interval;
                self.with(disk, |state| {
                    state.state = "synced";
                    state.scan_rounds += 1;
                    state.durable_as_of = state.walk_began;
                    state.next_scan = Some(Instant::now() + pause);
                });
            }
            AgentEvent::Resync { disk, cause } => {
                tracing::warn!(%disk, ?cause, "a compare of the whole disk was asked for");
                self.with(disk, |state| {
                    state.state = "comparing";
                    state.next_scan = None;
                });
            }
            AgentEvent::Stopped { disk, code, text } => {
                tracing::error!(%disk, ?code, "stopped: {text}");
                self.with(disk, |state| {
                    state.state = "stopped";
                    state.next_scan = None;
                    state.problem = Some(text);
                });
            }
            AgentEvent::Warned { disk, code, text } => {
                tracing::warn!(%disk, ?code, "{text}");
                self.with(disk, |state| state.problem = Some(text));
            }
        }
    }

    fn with(&mut self, disk: DiskId, change: impl FnOnce(&mut Protected)) {
        if let Some(state) = self.disks.get_mut(&disk) {
            change(state);
        }
    }

    fn handle_offer(&mut self, disk: DiskId, source: &[u8; 16], size_sectors: u64) {
        if let Some(state) = self.disks.get_mut(&disk) {
            state.state = "offered";
            let size = state.size_sectors;
            return self.core.open(disk, size);
        }
        match self.start_reader(disk, source) {
            Ok(state) => {
                let size = state.size_sectors;
                if size != size_sectors {
                    tracing::warn!(%disk, got = size, expected = size_sectors, "the disk's size changed");
                }
                self.missing.remove(&disk);
                self.disks.insert(disk, state);
                self.core.open(disk, size);
            }
            Err(error) => {
                let problem = format!("{error:#}");
                tracing::error!(%disk, "{problem}");
                self.missing.insert(disk, problem);
            }
        }
    }

    fn start_reader(&self, disk: DiskId, source: &[u8; 16]) -> anyhow::Result<Protected> {
        let Some(known) = self.sources.get(source) else {
            anyhow::bail!("the disk that is to be protected is not in this machine any more; attach it again");
        };
        let expected = self.sources.values().filter(|source| source.selected).count().max(1) as u64;
        let slots = self.settings.memory_bytes / CHUNK_BYTES / expected;
        let slots = usize::try_from(slots).unwrap_or(usize::MAX).clamp(4, 2 * CHUNKS_OPEN_MAX);
        let deliver = self.deliver.clone();
        let is_device = known.source.kind == SourceKind::BlockDevice;
        let reader =
            DiskReader::start(known.source.path.clone(), is_device, slots, Arc::clone(&self.throttle), move |read| {
                // A failed send means that the agent is stopping.
                let _ = deliver.send((disk, read));
            })?;
        Ok(Protected {
            path: known.source.path.display().to_string(),
            size_sectors: reader.size_sectors(),
            reader,
            kept: HashMap::new(),
            wanted: HashMap::new(),
            state: "offered",
            next_scan: None,
            walk_began: Timestamp::ZERO,
            durable_as_of: Timestamp::ZERO,
            scan_rounds: 0,
            problem: None,
        })
    }

    fn handle_work(
        &mut self,
        disk: DiskId,
        epoch: u64,
        sink: Sink,
        as_of: Sequence,
        action: PassAction,
        compress: bool,
    ) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        match action {
            PassAction::Read { chunk, hash } => {
                state.wanted.insert((epoch, chunk.start), as_of);
                state.reader.read(ReadJob { chunk, epoch, hash });
            }
            PassAction::HashFine { chunk, units } => {
                if let Some(kept) = state.kept.get(&chunk.start) {
                    let key = JobKey { disk, epoch, chunk };
                    self.workers.submit(Job::Hash { key, data: kept.data.clone(), units: Some(units) });
                }
            }
            PassAction::Send { chunk, pieces } => {
                let Some(kept) = state.kept.remove(&chunk.start).filter(|kept| kept.epoch == epoch) else { return };
                let key = JobKey { disk, epoch, chunk };
                let (data, as_of, time) = (kept.data, kept.as_of, kept.time);
                self.workers.submit(Job::Cut { key, data, pieces, sink, as_of, time, compress });
            }
            PassAction::Ask { .. } => {} // the core asks by itself
        }
    }

    fn handle_read(&mut self, disk: DiskId, read: ChunkRead) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        let (data, time) = match read.data {
            Ok(data) => data,
            Err(reason) => {
                // Nothing is lost: the walk waits, the operator is told, and a new session tries again.
                tracing::error!(%disk, "{reason}; the walk over this disk waits for the next session");
                state.problem = Some(reason);
                return;
            }
        };
        let Some(as_of) = state.wanted.remove(&(read.epoch, read.chunk.start)) else { return }; // of a walk that is over
        state.kept.insert(read.chunk.start, Kept { epoch: read.epoch, data: data.clone(), time, as_of });
        if read.hash {
            let key = JobKey { disk, epoch: read.epoch, chunk: read.chunk };
            self.workers.submit(Job::Hash { key, data, units: None });
        } else {
            self.answer_read(disk, read.epoch, read.chunk, None);
        }
    }

    fn answer_read(
        &mut self,
        disk: DiskId,
        epoch: u64,
        chunk: SectorRange,
        hashes: Option<Vec<UnitHash>>,
    ) {
        if let Err(error) = self.core.handle_read(disk, epoch, chunk, hashes) {
            tracing::error!(%disk, %error, "a defect in hashing; the chunk is tried again in the next session");
        }
    }

    fn handle_done(&mut self, done: Done) {
        match done {
            Done::Hashed(key, hashes) => self.answer_read(key.disk, key.epoch, key.chunk, Some(hashes)),
            Done::HashedFine(key, hashes) => {
                if let Err(error) = self.core.handle_fine(key.disk, key.epoch, key.chunk, hashes) {
                    tracing::error!(disk = %key.disk, %error, "a defect in hashing");
                }
            }
            Done::Cut { key, records, as_of, time } => {
                self.core.submit_chunk(key.disk, key.epoch, key.chunk, as_of, time, records);
            }
        }
    }

    fn begin_scans(&mut self) {
        let now = Instant::now();
        for (disk, state) in &mut self.disks {
            if state.next_scan.is_some_and(|at| now >= at) && self.core.begin_scan(*disk) {
                state.next_scan = None;
                state.state = "scanning";
                state.walk_began = wall_clock();
            }
        }
    }

    fn adapt_level(&mut self, link: &Link) {
        let (before, busy_before) = self.busy_before;
        if before.elapsed() < LEVEL_TICK {
            return;
        }
        let load = self.workers.load();
        let busy = load.busy_nanos.load(Ordering::Relaxed);
        let span = before.elapsed().as_nanos().max(1) as u64 * self.workers.threads() as u64;
        self.busy_before = (Instant::now(), busy);
        let Some(controller) = self.controller.as_mut().filter(|_| link.compress) else { return };
        let waiting = load.waiting.load(Ordering::Relaxed) as u64;
        let output = link.unwritten_bytes as u64 * 1000 / UNWRITTEN_BYTES_MAX;
        let level = controller.observe(
            mono_clock(),
            Load {
                busy_permille: permille((busy - busy_before) * 1000 / span),
                input_permille: permille(waiting * 1000 / CHUNKS_OPEN_MAX as u64),
                output_permille: permille(output),
            },
        );
        load.level.store(level, Ordering::Relaxed);
    }

    fn publish(&mut self, compress: bool) {
        let mut disks: Vec<DiskInfo> = self.disks.iter().map(|(id, state)| self.disk_info(*id, state)).collect();
        disks.extend(self.missing.iter().map(|(id, problem)| DiskInfo {
            disk: id.to_string(),
            state: "stopped".to_owned(),
            problem: Some(problem.clone()),
            ..DiskInfo::default()
        }));
        let level = compress.then(|| self.workers.load().level.load(Ordering::Relaxed));
        self.status.send_modify(|status| {
            status.disks = disks;
            status.level = level;
        });
    }

    fn disk_info(&self, id: DiskId, state: &Protected) -> DiskInfo {
        let sent = self.core.sent_bytes(id);
        let (durable, last) = self.core.position(id).unwrap_or_default();
        let size_bytes = state.size_sectors * SECTOR_BYTES;
        let settled = self.core.pass_progress(id).map_or(size_bytes, |(settled, _)| settled * SECTOR_BYTES);
        DiskInfo {
            disk: id.to_string(),
            source: state.path.clone(),
            size_bytes,
            state: state.state.to_owned(),
            settled_bytes: settled,
            read_bytes: state.reader.read_bytes(),
            plain_bytes_sent: sent.plain,
            wire_bytes_sent: sent.wire,
            durable: durable.0,
            last: last.0,
            scan_rounds: state.scan_rounds,
            durable_as_of_ms: state.durable_as_of.0 / 1_000_000,
            problem: state.problem.clone(),
        }
    }
}

fn permille(value: u64) -> u16 {
    u16::try_from(value.min(1000)).unwrap_or(1000)
}

/// The session's connection.
struct Link {
    reader: LaneReader,
    writer: LaneWriter<usize>,
    written: mpsc::UnboundedReceiver<usize>,
    unwritten_bytes: usize,
    compress: bool,
}
