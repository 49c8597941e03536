//! One disk at work: two threads that check, decompress, write, hash and make durable what sessions send for it.
//!
//! ```text
//! sessions ─▶ opener thread: decode, decompress, check every fragment CRC ─▶ writer thread: TargetDisk core, store
//! ```
//! Invariants: the writer executes the core's actions strictly in order, one after another; a record reaches the core
//! only after every fragment's CRC held (I8); a failed
//! write or flush stops this disk and no other (I6); a full medium pauses it until there is space; a panic of either thread stops this disk and is shown.
//! Memory per disk: at most [`BATCH_SLOTS`] batches of 4 MiB plain, and 64 MiB of frames not yet opened; while it is compared
//! what `compare_cache` says. Started by `registry`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as sync_mpsc;

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::batch::{BatchHeader, BulkHeader, credit_cost, decode_batch, decode_bulk};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::Message;
use reprotect_engine::io::buffer::BufferArena;
use reprotect_engine::limits::{BATCH_PLAIN_BYTES_MAX, UNWRITTEN_BYTES_MAX};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::proto::target_disk::{SessionId, TargetDisk};
use reprotect_engine::store::files::Files;
use reprotect_engine::units::{BLOCK_BYTES, Generation};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::disk_status::DiskStatus;
use crate::disk_store::DiskStore;
use crate::disk_writer::Writer;
use crate::journaled::Journaled;
use crate::receipts::Keeper;

/// Messages waiting for one disk. As many as credit allows at the smallest cost of a batch, and then some: an honest
/// agent never fills it, so a disk that waits for space does not hold up the others of its session.
const INPUTS_MAX: usize = (UNWRITTEN_BYTES_MAX / (2 * BLOCK_BYTES)) as usize + 1024;
/// Bytes of frames waiting for one disk: what credit allows, with room for heads and checksums.
const INPUT_BYTES_MAX: usize = 2 * UNWRITTEN_BYTES_MAX as usize;
/// Batches between the two threads: bounds the disk's plain memory to this many times 4 MiB.
pub const BATCH_SLOTS: usize = 10;

/// Where a session's replies go.
pub type Replies = mpsc::UnboundedSender<Message>;

/// Something to be done with a disk's journal on the thread that owns it; `None` where the disk has none, or stands.
pub type Ask = Box<dyn FnOnce(Option<&mut Journaled>) + Send>;

/// What a session tells a disk.
pub enum WorkerMessage {
    /// A frame.
    Input {
        /// From.
        session: SessionId,
        /// The frame.
        input: DiskInput,
        /// Where replies go; kept from OPEN_DISK on.
        replies: Replies,
        /// Its share of the disk's bytes.
        permit: OwnedSemaphorePermit,
    },
    /// A session ended.
    Lost(SessionId),
    /// A command wants something, and may change the target.
    Ask(Ask),
    /// A command, an NBD client or the scrub reads.
    Look(Ask),
    /// Nobody may write any more, and why; answered when a new generation is durable.
    Fence(String, sync_mpsc::SyncSender<Result<Generation, String>>),
    /// The target is to become larger.
    Grow(GrowOrder),
    /// The disk is no longer protected: its sessions are told, then as [`Self::Stop`].
    Retire,
    /// Flush, record, close the target and end.
    Stop,
}

/// A target that is to become larger.
pub struct GrowOrder {
    pub(crate) opener: Arc<dyn Files>,
    pub(crate) size_bytes: u64,
    /// Answered when it is, or when it goes on as it was, or stopped.
    pub(crate) answer: sync_mpsc::SyncSender<Result<(), String>>,
}

/// A checked frame on its way to the writer.
pub(crate) enum Opened {
    /// With the body as it was received.
    Batch(SessionId, BatchHeader, Vec<Record>, Bytes),
    Bulk(SessionId, BulkHeader, Vec<Record>, Bytes),
    Ask(Ask),
    Look(Ask),
    Fence(String, sync_mpsc::SyncSender<Result<Generation, String>>),
    Grow(GrowOrder),
    /// Nobody can tell what it was, or it was bulk, which has no sequence to ask for: the session ends.
    Damaged(SessionId, String),
    /// A delta batch whose head is sound and whose payload is not, with its credit cost.
    DamagedDelta(SessionId, Generation, u64),
    Other(SessionId, DiskInput, Replies),
    Lost(SessionId),
    Retire,
    /// The opener cannot go on.
    Broken(String),
    Stop,
}

/// Where a disk's messages go in.
#[derive(Clone, Debug)]
pub struct DiskInputs {
    sender: mpsc::Sender<WorkerMessage>,
    bytes: Arc<Semaphore>,
    status: Arc<DiskStatus>,
}

/// The disk does not take messages any more: it was stopped, or its threads broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk is stopped at the master target; see its log")]
pub struct DiskGone;

impl DiskInputs {
    /// Hands a frame to the disk; waits while more than credit allows is waiting already.
    ///
    /// # Errors
    /// [`DiskGone`].
    pub async fn send(&self, session: SessionId, input: DiskInput, replies: Replies) -> Result<(), DiskGone> {
        let bytes = match &input {
            DiskInput::Batch(body) | DiskInput::Bulk(body) => body.len(),
            _ => 0,
        };
        let bytes = u32::try_from(bytes.min(INPUT_BYTES_MAX)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.map_err(|_| DiskGone)?;
        let message = WorkerMessage::Input { session, input, replies, permit };
        self.sender.send(message).await.map_err(|_| DiskGone)
    }

    /// Has something done with the disk's journal, and waits for the answer. Blocks.
    ///
    /// # Errors
    /// [`DiskGone`].
    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(Option<&mut Journaled>) -> T + Send + 'static,
    ) -> Result<T, DiskGone> {
        self.have_done(WorkerMessage::Ask, work)
    }

    /// As [`Self::ask`], for what changes nothing on the target.
    ///
    /// # Errors
    /// [`DiskGone`].
    pub fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(Option<&mut Journaled>) -> T + Send + 'static,
    ) -> Result<T, DiskGone> {
        self.have_done(WorkerMessage::Look, work)
    }

    fn have_done<T: Send + 'static>(
        &self,
        message: impl FnOnce(Ask) -> WorkerMessage,
        work: impl FnOnce(Option<&mut Journaled>) -> T + Send + 'static,
    ) -> Result<T, DiskGone> {
        let (answer, answered) = sync_mpsc::sync_channel(1);
        let ask: Ask = Box::new(move |store| {
            let _ = answer.send(work(store)); // who asked may have given up
        });
        self.sender.blocking_send(message(ask)).map_err(|_| DiskGone)?;
        answered.recv().map_err(|_| DiskGone)
    }

    /// Why its thread answers nobody now: the disk goes back to a point, perhaps for hours.
    #[must_use]
    pub fn going_back(&self) -> Option<String> {
        self.status.going_back()
    }

    /// Takes the disk away from whoever has it open, and refuses it from now on. Blocks until that is durable.
    ///
    /// # Errors
    /// [`DiskGone`], or why it cannot be made durable.
    pub fn fence(&self, reason: String) -> anyhow::Result<Generation> {
        let (answer, answered) = sync_mpsc::sync_channel(1);
        self.sender.blocking_send(WorkerMessage::Fence(reason, answer)).map_err(|_| DiskGone)?;
        answered.recv().map_err(|_| DiskGone)?.map_err(|why| anyhow::anyhow!("{why}"))
    }

    /// Takes the disk away from whoever has it open and makes its target larger. Blocks until that is done, or refused.
    ///
    /// # Errors
    /// [`DiskGone`], or why it has its old size, or stopped.
    pub fn grow(&self, opener: Arc<dyn Files>, size_bytes: u64) -> anyhow::Result<()> {
        let (answer, answered) = sync_mpsc::sync_channel(1);
        let order = GrowOrder { opener, size_bytes, answer };
        self.sender.blocking_send(WorkerMessage::Grow(order)).map_err(|_| DiskGone)?;
        answered.recv().map_err(|_| DiskGone)?.map_err(|why| anyhow::anyhow!("{why}"))
    }

    /// Tells the disk that a session ended.
    pub async fn lost(&self, session: SessionId) {
        // A disk that is gone needs not know.
        let _ = self.sender.send(WorkerMessage::Lost(session)).await;
    }
}

/// A running disk.
#[derive(Debug)]
pub struct DiskWorker {
    inputs: DiskInputs,
    stopping: Arc<AtomicBool>,
    status: Arc<DiskStatus>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// What a disk is started with.
pub struct DiskSetup {
    /// Where its writes go.
    pub store: DiskStore,
    /// Its state as read back, or new.
    pub state: DiskState,
    /// Windows and flush intervals.
    pub limits: FlowLimits,
    /// Why nobody may open it.
    pub fenced: Option<String>,
    /// Where its passes are written down.
    pub receipts: Keeper,
}

impl DiskWorker {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system gives no threads or memory.
    pub fn start(mut setup: DiskSetup) -> anyhow::Result<Self> {
        let disk = setup.state.disk;
        let status = Arc::new(DiskStatus::new(&setup.state));
        let stopping = Arc::new(AtomicBool::new(false));
        if let DiskStore::Journaled(store) = &mut setup.store {
            store.shown_by(&status, &stopping);
        }
        let (sender, from_sessions) = mpsc::channel(INPUTS_MAX);
        let (to_writer, opened) = sync_mpsc::sync_channel(BATCH_SLOTS);
        let arena = BufferArena::new(BATCH_SLOTS, BATCH_PLAIN_BYTES_MAX as usize)?;
        let mut opener = Opener { decompressor: Decompressor::new()?, arena, status: Arc::clone(&status) };
        let mut core = TargetDisk::new(setup.state, setup.limits);
        if let DiskStore::Journaled(store) = &setup.store {
            core.set_applied(store.applied_sequence());
        }
        let (flag, fenced) = (Arc::clone(&stopping), setup.fenced);
        let mut writer = Writer::new(core, setup.store, Arc::clone(&status), flag, fenced, setup.receipts);
        let name = disk.to_string();
        let short = name.get(..8).unwrap_or(&name);
        let threads = vec![
            std::thread::Builder::new()
                .name(format!("open-{short}"))
                .spawn(move || opener.run_guarded(from_sessions, &to_writer))?,
            std::thread::Builder::new().name(format!("disk-{short}")).spawn(move || {
                // What a panic leaves of the core is not used again: the writer only tells of it and ends.
                let run = || {
                    writer.go_on_back();
                    writer.run(&opened);
                };
                match catch_unwind(AssertUnwindSafe(run)) {
                    Ok(()) => writer.close(),
                    Err(panic) => writer.panicked(&panic_text(&*panic)),
                }
            })?,
        ];
        let bytes = Arc::new(Semaphore::new(INPUT_BYTES_MAX));
        let inputs = DiskInputs { sender, bytes, status: Arc::clone(&status) };
        Ok(Self { inputs, stopping, status, threads })
    }

    /// Where sessions send.
    #[must_use]
    pub fn inputs(&self) -> DiskInputs {
        self.inputs.clone()
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> &Arc<DiskStatus> {
        &self.status
    }

    /// As [`Self::stop`], and tells the disk's sessions that it is no longer protected.
    pub fn retire(self) {
        self.stopping.store(true, Ordering::Release); // a rollback that is gone on with ends on its way
        // An error means that the threads have ended already.
        let _ = self.inputs.sender.blocking_send(WorkerMessage::Retire);
        self.stop();
    }

    /// Flushes, records, closes the target, and waits for that. Blocks: call it from a thread of its own.
    pub fn stop(self) {
        // The flag reaches a writer that waits for space while its opener waits for it.
        self.stopping.store(true, Ordering::Release);
        // An error means that the threads have ended already.
        let _ = self.inputs.sender.blocking_send(WorkerMessage::Stop);
        for thread in self.threads {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if let Err(panic) = thread.join() {
                tracing::error!(thread = name, "a disk thread panicked: {}", panic_text(&*panic));
            }
        }
    }
}

/// What a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// First thread: turns bytes into checked records.
struct Opener {
    decompressor: Decompressor,
    arena: Arc<BufferArena>,
    status: Arc<DiskStatus>,
}

impl Opener {
    /// Runs, and reports a panic to the writer, which stops the disk.
    fn run_guarded(&mut self, inputs: mpsc::Receiver<WorkerMessage>, out: &sync_mpsc::SyncSender<Opened>) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.run(inputs, out))) {
            // An error means that the writer ended first and said why.
            let _ = out.send(Opened::Broken(panic_text(&*panic)));
        }
    }

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
                let (header, records) = match decode_batch(body.clone()) {
                    Ok(batch) => batch,
                    Err(error) => return Opened::Damaged(session, error.to_string()),
                };
                match self.open_records(&records, bytes) {
                    Ok(records) => Opened::Batch(session, header, records, body),
                    Err(error) => {
                        tracing::warn!(disk = %header.disk, %error, "a delta batch is damaged and is asked for again");
                        Opened::DamagedDelta(session, header.generation, credit_cost(&records))
                    }
                }
            }
            WorkerMessage::Input { session, input: DiskInput::Bulk(body), .. } => {
                let bytes = body.len() as u64;
                let (header, records) = match decode_bulk(body.clone()) {
                    Ok(batch) => batch,
                    Err(error) => return Opened::Damaged(session, error.to_string()),
                };
                match self.open_records(&records, bytes) {
                    Ok(records) => Opened::Bulk(session, header, records, body),
                    Err(error) => Opened::Damaged(session, error.to_string()),
                }
            }
            WorkerMessage::Input { session, input, replies, .. } => Opened::Other(session, input, replies),
            WorkerMessage::Lost(session) => Opened::Lost(session),
            WorkerMessage::Ask(ask) => Opened::Ask(ask),
            WorkerMessage::Look(ask) => Opened::Look(ask),
            WorkerMessage::Fence(reason, answer) => Opened::Fence(reason, answer),
            WorkerMessage::Grow(order) => Opened::Grow(order),
            WorkerMessage::Retire => Opened::Retire,
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
