//! The second thread of a disk: the core, the target file and the state file.
//!
//! Invariants: the core's actions are executed strictly in order, one after another; while the medium is full the
//! action in hand waits and nothing behind it is executed, but inputs are still taken (their actions queue up behind,
//! bounded by credit), so that nobody else is held up; the state file is replaced only after the target was flushed; a
//! failed write or flush stops this disk and no other (I6), and a target somebody else wrote to is not written again.
//! Units: bytes and sectors. Started by `disk_worker`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as sync_mpsc;
use std::time::Duration;

use reprotect_engine::checksum::{UnitHash, unit_hash};
use reprotect_engine::error::{Answer as _, Severity};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::RecordKind;
use reprotect_engine::format::message::{CompareRequestHead, ErrorCode, Message};
use reprotect_engine::io::durable::{Access, replace_file};
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::net::mono_clock;
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::proto::pass::hash_spans;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::{DiskAction, DiskNotice, Piece, SessionId, TargetDisk};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};

use crate::disk_status::DiskStatus;
use crate::disk_worker::{Opened, Replies};
use crate::guard::Guard;

/// How often a full medium is tried again, and a stop noticed meanwhile.
const FULL_RETRY: Duration = Duration::from_millis(500);
/// Longest sleep when nothing is due.
const IDLE: Duration = Duration::from_millis(500);

/// Second thread: the core and the storage behind it.
pub(crate) struct Writer {
    pub(crate) disk: TargetDisk,
    pub(crate) id: DiskId,
    pub(crate) target: Target,
    pub(crate) guard: Guard,
    /// Something of ours was written since the guard last looked.
    pub(crate) unguarded: bool,
    pub(crate) state_path: PathBuf,
    pub(crate) status: Arc<DiskStatus>,
    /// The daemon stops, or this disk does.
    pub(crate) stopping: Arc<AtomicBool>,
    /// The medium is full.
    pub(crate) waiting: bool,
    pub(crate) sessions: Vec<(SessionId, Replies)>,
    pub(crate) chunk: Vec<u8>,
}

impl Writer {
    pub(crate) fn run(&mut self, inputs: &sync_mpsc::Receiver<Opened>) {
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
            Opened::DamagedDelta(session, generation, cost) => {
                self.disk.handle_damaged(session, generation, cost);
            }
            Opened::Other(session, input, replies) => self.handle_other(session, input, replies),
            Opened::Lost(session) => {
                self.disk.handle_session_lost(now, session);
                self.sessions.retain(|(known, _)| *known != session);
            }
            Opened::Broken(panic) => self.fail(&broken(&panic)),
            Opened::Retire => self.tell_sessions(ErrorCode::UnknownDisk, "the disk is no longer protected"),
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
                DiskAction::Checkpoint { state } => self.checkpoint(&state, Some(inputs)),
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
        if !self.unguarded
            && let Err(reason) = self.guard.check()
        {
            self.fail(&reason);
            return false;
        }
        self.unguarded = true;
        loop {
            match self.try_write(pieces) {
                Ok(()) => {
                    self.there_is_space();
                    return true;
                }
                Err(error) if is_full(&error) => {
                    if !self.wait_for_space(&error.to_string(), Some(inputs)) {
                        return false;
                    }
                }
                Err(error) => {
                    self.fail(&error.to_string());
                    return false;
                }
            }
        }
    }

    /// Tells once that the medium is full, then waits a little and takes what comes meanwhile: that only queues up
    /// behind the action in hand. Answers whether to try again.
    fn wait_for_space(&mut self, error: &str, inputs: Option<&sync_mpsc::Receiver<Opened>>) -> bool {
        let text = format!("{error}; free space there, replication goes on by itself");
        if !self.waiting {
            tracing::error!(disk = %self.id, "{text}");
            self.status.set_problem(Some(text.clone()));
            self.disk.handle_full(&text);
            self.waiting = true;
        }
        self.flush_replies();
        self.status.update(&self.disk);
        let stopped = "stopped while the medium was full";
        let Some(inputs) = inputs.filter(|_| !self.stopping.load(Ordering::Acquire)) else {
            self.fail(stopped);
            return false;
        };
        match inputs.recv_timeout(FULL_RETRY) {
            Ok(Opened::Stop) | Err(sync_mpsc::RecvTimeoutError::Disconnected) => {
                self.fail(stopped);
                false
            }
            Ok(other) => {
                self.handle(other);
                self.disk.phase() != TargetDiskPhase::Failed
            }
            Err(sync_mpsc::RecvTimeoutError::Timeout) => true,
        }
    }

    fn there_is_space(&mut self) {
        if std::mem::take(&mut self.waiting) {
            tracing::info!(disk = %self.id, "there is space again; going on");
            self.status.set_problem(None);
        }
    }

    /// Sends the replies that stand first in the queue, without executing anything else.
    fn flush_replies(&mut self) {
        while let Some(DiskAction::Reply { session, message }) = self.disk.poll_reply() {
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

    fn checkpoint(&mut self, state: &DiskState, inputs: Option<&sync_mpsc::Receiver<Opened>>) {
        loop {
            match self.try_checkpoint(state) {
                Ok(()) => {
                    self.there_is_space();
                    return self.disk.handle_checkpointed(mono_clock());
                }
                Err(NoCheckpoint::Full(text)) => {
                    if !self.wait_for_space(&text, inputs) {
                        return;
                    }
                }
                Err(NoCheckpoint::Failed(text)) => return self.fail(&text),
            }
        }
    }

    fn try_checkpoint(&mut self, state: &DiskState) -> Result<(), NoCheckpoint> {
        // A sparse target may want space for its tables before it flushes; that may be tried again, a flush may not.
        self.target.flush().map_err(|error| match is_full(&error) {
            true => NoCheckpoint::Full(error.to_string()),
            false => NoCheckpoint::Failed(error.to_string()),
        })?;
        if self.unguarded {
            self.guard.flushed();
            self.unguarded = false;
        }
        replace_file(&self.state_path, &state.to_bytes(), Access::Private).map_err(|error| {
            match error.severity() {
                Severity::Retry => NoCheckpoint::Full(error.to_string()),
                _ => NoCheckpoint::Failed(error.to_string()),
            }
        })
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

    /// A panic ended the thread: says so and leaves the target as after a crash.
    pub(crate) fn panicked(&mut self, panic: &str) {
        let text = broken(panic);
        tracing::error!(disk = %self.id, "{text}");
        self.status.set_failed(&text);
        self.tell_sessions(ErrorCode::Target, &text);
    }

    fn tell_sessions(&self, code: ErrorCode, text: &str) {
        for (_, replies) in &self.sessions {
            // A closed channel means that the session ended already.
            let _ = replies.send(Message::error(self.id, code, text));
        }
    }

    /// Makes what was written durable and leaves the target as any reader expects it.
    pub(crate) fn close(mut self) {
        self.disk.handle_stop(mono_clock());
        while let Some(action) = self.disk.poll_action() {
            if let DiskAction::Checkpoint { state } = action {
                self.checkpoint(&state, None);
            }
        }
        if let Err(error) = self.target.close() {
            tracing::error!(disk = %self.id, %error, "the target could not be closed cleanly");
        }
        self.status.set_closed();
    }
}

/// Why a checkpoint was not made.
enum NoCheckpoint {
    /// Something is full: it may be tried again.
    Full(String),
    /// Something broke.
    Failed(String),
}

/// Whether an operation may be tried again once there is space; a failed flush never may.
fn is_full(error: &BlockError) -> bool {
    error.is_full() && error.op != BlockOp::Flush
}

fn broken(panic: &str) -> String {
    format!(
        "a defect of the master target stopped this disk: {panic}; restart it and report this with its log"
    )
}

const fn byte_range(range: SectorRange) -> ByteRange {
    ByteRange { start: range.byte_start(), end: range.byte_start() + range.bytes() }
}
