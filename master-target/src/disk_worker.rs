//! One disk at work: two threads that check, decompress, write, hash and make durable what sessions send for it.
//!
//! ```text
//! sessions ─▶ opener thread: decode, decompress, check every fragment CRC ─▶ writer thread: TargetDisk core, target file, state file
//! ```
//! Invariants: the writer executes the core's actions strictly in order, one after another; a record reaches the core
//! only after every fragment's CRC held (I8); the state file is replaced only after the target was flushed; a failed
//! write or flush stops this disk and no other (I6); a full medium pauses it until there is space.
//! Memory: at most [`BATCH_SLOTS`] batches of 4 MiB per disk wait between the threads. Started by `registry`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc as sync_mpsc;
use std::time::Duration;

use bytes::Bytes;
use reprotect_engine::checksum::{UnitHash, unit_hash};
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::batch::{BatchHeader, BulkHeader, decode_batch, decode_bulk};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::{Record, RecordKind};
use reprotect_engine::format::message::{CompareRequestHead, ErrorCode, Message};
use reprotect_engine::io::buffer::BufferArena;
use reprotect_engine::io::durable::{Access, replace_file};
use reprotect_engine::io::{BlockError, BlockFile, ByteRange, ReadAt, WriteAt};
use reprotect_engine::limits::{BATCH_PLAIN_BYTES_MAX, CHUNK_BYTES};
use reprotect_engine::net::mono_clock;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::proto::pass::hash_spans;
use reprotect_engine::proto::target_disk::{DiskAction, DiskNotice, Piece, SessionId, TargetDisk};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};
use tokio::sync::mpsc;

use crate::disk_status::DiskStatus;

/// Messages a session may have waiting for one disk.
const INPUTS_MAX: usize = 256;
/// Batches between the two threads: bounds the disk's memory to this many times 4 MiB.
pub const BATCH_SLOTS: usize = 10;
/// How often a full medium is tried again.
const FULL_RETRY: Duration = Duration::from_secs(1);
/// Longest sleep of the writer when nothing is due.
const IDLE: Duration = Duration::from_millis(500);

/// Where a session's replies go.
pub type Replies = mpsc::UnboundedSender<Message>;

/// What a session tells a disk.
#[derive(Debug)]
pub enum WorkerMessage {
    /// A frame.
    Input {
        /// From.
        session: SessionId,
        /// The frame.
        input: DiskInput,
        /// Where replies go; kept from OPEN_DISK on.
        replies: Replies,
    },
    /// A session ended.
    Lost(SessionId),
    /// Flush, record, close the target and end.
    Stop,
}

/// A checked frame on its way to the writer.
enum Opened {
    Batch(SessionId, BatchHeader, Vec<Record>),
    Bulk(SessionId, BulkHeader, Vec<Record>),
    Damaged(SessionId, String),
    Other(SessionId, DiskInput, Replies),
    Lost(SessionId),
    Stop,
}

/// A running disk.
#[derive(Debug)]
pub struct DiskWorker {
    inputs: mpsc::Sender<WorkerMessage>,
    status: Arc<DiskStatus>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// What a disk is started with.
pub struct DiskSetup {
    /// What to write to.
    pub target: Target,
    /// Its state as read back, or new.
    pub state: DiskState,
    /// Where the state is kept.
    pub state_path: PathBuf,
    /// Windows and flush intervals.
    pub limits: FlowLimits,
}

impl DiskWorker {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system gives no threads or memory.
    pub fn start(setup: DiskSetup) -> anyhow::Result<Self> {
        let disk = setup.state.disk;
        let status = Arc::new(DiskStatus::new(&setup.state));
        let (inputs, from_sessions) = mpsc::channel(INPUTS_MAX);
        let (to_writer, opened) = sync_mpsc::sync_channel(BATCH_SLOTS);
        let arena = BufferArena::new(BATCH_SLOTS, BATCH_PLAIN_BYTES_MAX as usize)?;
        let mut opener = Opener { decompressor: Decompressor::new()?, arena, status: Arc::clone(&status) };
        let mut writer = Writer {
            disk: TargetDisk::new(setup.state, setup.limits),
            id: disk,
            target: setup.target,
            state_path: setup.state_path,
            status: Arc::clone(&status),
            sessions: Vec::new(),
            chunk: Vec::new(),
        };
        let name = disk.to_string();
        let short = name.get(..8).unwrap_or(&name);
        let threads = vec![
            std::thread::Builder::new()
                .name(format!("open-{short}"))
                .spawn(move || opener.run(from_sessions, &to_writer))?,
            std::thread::Builder::new().name(format!("disk-{short}")).spawn(move || {
                writer.run(&opened);
                writer.close();
            })?,
        ];
        Ok(Self { inputs, status, threads })
    }

    /// Where sessions send.
    #[must_use]
    pub fn inputs(&self) -> mpsc::Sender<WorkerMessage> {
        self.inputs.clone()
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> &Arc<DiskStatus> {
        &self.status
    }

    /// Flushes, records, closes the target, and waits for that. Blocks: call it from a thread of its own.
    pub fn stop(self) {
        // An error means that the threads have ended already.
        let _ = self.inputs.blocking_send(WorkerMessage::Stop);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a disk thread panicked");
            }
        }
    }
}

/// First thread: turns bytes into checked records.
struct Opener {
    decompressor: Decompressor,
    arena: Arc<BufferArena>,
    status: Arc<DiskStatus>,
}

impl Opener {
    fn run(&mut self, mut inputs: mpsc::Receiver<WorkerMessage>, out: &sync_mpsc::SyncSender<Opened>) {
        while let Some(message) = inputs.blocking_recv() {
            let stop = matches!(message, WorkerMessage::Stop);
            if out.send(self.open(message)).is_err() || stop {
                return;
            }
        }
        // The registry dropped the worker without stopping it: end as if stopped.
        let _ = out.send(Opened::Stop);
    }

    fn open(&mut self, message: WorkerMessage) -> Opened {
        match message {
            WorkerMessage::Input { session, input: DiskInput::Batch(body), .. } => {
                let bytes = body.len() as u64;
                let (header, records) = match decode_batch(body) {
                    Ok(batch) => batch,
                    Err(error) => return Opened::Damaged(session, error.to_string()),
                };
                match self.open_records(&records, bytes) {
                    Ok(records) => Opened::Batch(session, header, records),
                    Err(error) => Opened::Damaged(session, error.to_string()),
                }
            }
            WorkerMessage::Input { session, input: DiskInput::Bulk(body), .. } => {
                let bytes = body.len() as u64;
                let (header, records) = match decode_bulk(body) {
                    Ok(batch) => batch,
                    Err(error) => return Opened::Damaged(session, error.to_string()),
                };
                match self.open_records(&records, bytes) {
                    Ok(records) => Opened::Bulk(session, header, records),
                    Err(error) => Opened::Damaged(session, error.to_string()),
                }
            }
            WorkerMessage::Input { session, input, replies } => Opened::Other(session, input, replies),
            WorkerMessage::Lost(session) => Opened::Lost(session),
            WorkerMessage::Stop => Opened::Stop,
        }
    }

    /// Decompresses all records of a batch one after another into one aligned buffer, so that neighbours on the disk
    /// are neighbours in memory and are written at once.
    fn open_records(&mut self, records: &[Record], wire_bytes: u64) -> Result<Vec<Record>, FormatError> {
        self.status.received(wire_bytes, records);
        let total: u64 = records.iter().map(Record::plain_bytes).sum();
        if total == 0 {
            return Ok(records.iter().map(|record| record.opened(Bytes::new())).collect());
        }
        let mut buffer = self.arena.lease();
        buffer.set_len(total as usize); // at most BATCH_PLAIN_BYTES_MAX, the slot's size: the decoder saw to it
        let mut rest: &mut [u8] = &mut buffer;
        for record in records {
            let (mine, after) = rest.split_at_mut(record.plain_bytes() as usize);
            record.open_into(&mut self.decompressor, mine)?;
            rest = after;
        }
        let plain = buffer.into_bytes();
        let mut at = 0;
        Ok(records
            .iter()
            .map(|record| {
                let end = at + record.plain_bytes() as usize;
                let opened = record.opened(plain.slice(at..end));
                at = end;
                opened
            })
            .collect())
    }
}

/// Second thread: the core and the storage behind it.
struct Writer {
    disk: TargetDisk,
    id: DiskId,
    target: Target,
    state_path: PathBuf,
    status: Arc<DiskStatus>,
    sessions: Vec<(SessionId, Replies)>,
    chunk: Vec<u8>,
}

impl Writer {
    fn run(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        loop {
            let now = mono_clock();
            let wait = self
                .disk
                .poll_timeout()
                .map_or(IDLE, |at| Duration::from_nanos(at.nanos_since(now)).min(IDLE));
            match inputs.recv_timeout(wait) {
                Ok(Opened::Stop) | Err(sync_mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(input) => self.handle(input),
                Err(sync_mpsc::RecvTimeoutError::Timeout) => {}
            }
            self.disk.handle_timeout(mono_clock());
            self.execute(inputs);
        }
    }

    fn handle(&mut self, input: Opened) {
        let now = mono_clock();
        match input {
            Opened::Batch(session, header, records) => self.disk.handle_batch(now, session, &header, records),
            Opened::Bulk(session, header, records) => self.disk.handle_bulk(now, session, &header, records),
            Opened::Damaged(session, reason) => self.end_session(session, &reason),
            Opened::Other(session, input, replies) => self.handle_other(session, input, replies),
            Opened::Lost(session) => {
                self.disk.handle_session_lost(now, session);
                self.sessions.retain(|(known, _)| *known != session);
            }
            Opened::Stop => {}
        }
    }

    fn handle_other(&mut self, session: SessionId, input: DiskInput, replies: Replies) {
        let now = mono_clock();
        match input {
            DiskInput::Open(head) => {
                self.sessions.retain(|(known, _)| *known != session);
                self.sessions.push((session, replies));
                self.disk.handle_open(now, session, &head);
            }
            DiskInput::Mark(mark) => self.disk.handle_mark(now, session, &mark),
            DiskInput::Compare(request, units) => self.disk.handle_compare(session, request, units),
            DiskInput::PassBegin(begin) => self.disk.handle_pass_begin(now, session, &begin),
            DiskInput::PassEnd(end) => self.disk.handle_pass_end(now, session, &end),
            DiskInput::Batch(_) | DiskInput::Bulk(_) => {} // taken by the opener
        }
    }

    /// A batch failed its checks: the transport guards its bytes, so a memory or a program at the other end is broken.
    /// The session ends; the agent comes back and sends what is not durable again.
    fn end_session(&self, session: SessionId, reason: &str) {
        tracing::warn!(disk = %self.id, session = session.0, reason, "a batch failed its checks; the session ends");
        if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
            let text = format!("a batch of disk {} failed its checks: {reason}", self.id);
            // A closed channel means that the session ended already.
            let _ = replies.send(Message::error(DiskId::NONE, ErrorCode::Protocol, &text));
        }
    }

    /// Executes what the core ordered, in order.
    fn execute(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
        while let Some(action) = self.disk.poll_action() {
            match action {
                DiskAction::Write { pieces, cost } => {
                    if !self.write(&pieces, inputs) {
                        continue;
                    }
                    self.status.wrote(&pieces);
                    self.disk.handle_written(cost);
                }
                DiskAction::Hash { session, request, units } => match self.hash(&request, &units) {
                    Ok(hashes) => self.disk.handle_hashed(session, &request, hashes),
                    Err(error) => self.fail(&error.to_string()),
                },
                DiskAction::Checkpoint { state } => self.checkpoint(&state),
                DiskAction::Reply { session, message } => {
                    if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
                        // A closed channel means that the session ended; Lost is on its way.
                        let _ = replies.send(message);
                    }
                }
            }
        }
        while let Some(notice) = self.disk.poll_notice() {
            self.log(&notice);
            self.status.notice(&notice);
        }
        self.status.update(&self.disk);
    }

    fn log(&self, notice: &DiskNotice) {
        match notice {
            DiskNotice::Opened(generation) => {
                tracing::info!(disk = %self.id, %generation, "opened by its agent")
            }
            DiskNotice::Synced => tracing::info!(disk = %self.id, "the whole disk is on the target"),
            DiskNotice::Resync(cause) => tracing::warn!(disk = %self.id, ?cause, "a compare pass begins"),
            DiskNotice::FencedSession(session) => {
                tracing::warn!(disk = %self.id, session = session.0, "an older session was fenced");
            }
            DiskNotice::Marked(sequence) => tracing::debug!(disk = %self.id, %sequence, "mark durable"),
        }
    }

    /// Writes the pieces; waits while the medium is full. Answers whether it succeeded; if not, the disk is stopped.
    fn write(&mut self, pieces: &[Piece], inputs: &sync_mpsc::Receiver<Opened>) -> bool {
        let mut waiting = false;
        loop {
            match self.try_write(pieces) {
                Ok(()) => {
                    if waiting {
                        tracing::info!(disk = %self.id, "there is space again; going on");
                        self.status.set_problem(None);
                    }
                    return true;
                }
                Err(error) if error.is_full() => {
                    let text = format!("{error}; free space on the datastore, replication goes on by itself");
                    if !waiting {
                        tracing::error!(disk = %self.id, "{text}");
                        self.status.set_problem(Some(text.clone()));
                        self.disk.handle_full(&text);
                        self.flush_replies();
                    }
                    waiting = true;
                    match inputs.recv_timeout(FULL_RETRY) {
                        Ok(Opened::Stop) | Err(sync_mpsc::RecvTimeoutError::Disconnected) => {
                            self.fail("stopped while the medium was full");
                            return false;
                        }
                        Ok(other) => self.handle(other),
                        Err(sync_mpsc::RecvTimeoutError::Timeout) => {}
                    }
                }
                Err(error) => {
                    self.fail(&error.to_string());
                    return false;
                }
            }
        }
    }

    /// Sends the replies that stand first in the queue, without executing anything else.
    fn flush_replies(&mut self) {
        for (session, message) in self.disk.take_replies() {
            if let Some((_, replies)) = self.sessions.iter().find(|(known, _)| *known == session) {
                let _ = replies.send(message);
            }
        }
    }

    fn try_write(&mut self, pieces: &[Piece]) -> Result<(), BlockError> {
        let mut writes: Vec<WriteAt<'_>> = Vec::with_capacity(pieces.len());
        let mut gathered = RangeSet::new();
        for piece in pieces {
            for keep in &piece.keep {
                let zero = piece.record.kind() != RecordKind::Data;
                // Operations of one call have no order among themselves, so what overlaps goes into the next call.
                if !writes.is_empty() && (zero || gathered.overlap(*keep).next().is_some()) {
                    self.target.write(&writes)?;
                    writes.clear();
                    gathered.clear();
                }
                if zero {
                    self.target.zero(byte_range(*keep))?;
                    continue;
                }
                let from = ((keep.start - piece.record.range().start) * SECTOR_BYTES) as usize;
                let data = piece.record.payload().get(from..from + keep.bytes() as usize).unwrap_or_default();
                writes.push(WriteAt { offset: keep.byte_start(), data });
                gathered.insert(*keep);
            }
        }
        if writes.is_empty() { Ok(()) } else { self.target.write(&writes) }
    }

    fn checkpoint(&mut self, state: &DiskState) {
        if let Err(error) = self.target.flush() {
            return self.fail(&error.to_string());
        }
        match replace_file(&self.state_path, &state.to_bytes(), Access::Private) {
            Ok(()) => self.disk.handle_checkpointed(mono_clock()),
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn hash(&mut self, request: &CompareRequestHead, units: &[u16]) -> Result<Vec<UnitHash>, BlockError> {
        let spans = hash_spans(request.range, request.unit_bytes.into(), units);
        let range = byte_range(request.range);
        if self.target.allocated(range)?.is_empty() {
            return Ok(vec![UnitHash::ZEROS; spans.len()]);
        }
        self.chunk.resize(CHUNK_BYTES as usize, 0);
        let data = self.chunk.get_mut(..range.len() as usize).unwrap_or_default();
        self.target.read(&mut [ReadAt { offset: range.start, data }])?;
        let data = self.chunk.get(..range.len() as usize).unwrap_or_default();
        Ok(spans.into_iter().map(|span| unit_hash(data.get(span).unwrap_or_default())).collect())
    }

    fn fail(&mut self, reason: &str) {
        let text = format!("{reason}; nothing more is written to this disk; repair the medium, then restart");
        tracing::error!(disk = %self.id, "{text}");
        self.status.set_problem(Some(text.clone()));
        self.disk.handle_failed(&text);
        self.flush_replies();
    }

    /// Makes what was written durable and leaves the target as any reader expects it.
    fn close(mut self) {
        self.disk.handle_stop(mono_clock());
        while let Some(action) = self.disk.poll_action() {
            if let DiskAction::Checkpoint { state } = action {
                self.checkpoint(&state);
            }
        }
        if let Err(error) = self.target.close() {
            tracing::error!(disk = %self.id, %error, "the target could not be closed cleanly");
        }
        self.status.set_closed();
    }
}

const fn byte_range(range: SectorRange) -> ByteRange {
    ByteRange { start: range.byte_start(), end: range.byte_start() + range.bytes() }
}
