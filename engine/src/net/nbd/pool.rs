//! The threads of one connection: each opens the export once, takes requests from one queue and sends replies.
//!
//! Invariants: the queue never holds more than the connection's permits, so submitting never blocks; every request
//! gets exactly one answer ([`Owed`] sees to it, also when a file panics); an answer's permits come back only when it
//! was sent; a pool that is dropped lets its threads end after what they are doing.
//! Called by `connection`.

use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::execute::HoleSearch;
use super::{Export, execute};
use crate::format::nbd::request::{Allowed, Work};
use crate::format::nbd::{ErrorCode, reply};
use crate::io::{BlockError, BlockFile, BlockOp};

/// What a request holds until its answer was sent: one of the requests, some of the bytes.
pub(super) type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// One answer on its way out.
pub(super) struct Reply {
    pub(super) frames: Vec<Bytes>,
    /// Released when the frames were sent; none for answers that were not waited for.
    pub(super) permits: Option<Permits>,
}

/// The frames of a refusal.
pub(super) fn refusal(cookie: u64, code: ErrorCode, message: &str, structured: bool) -> Vec<Bytes> {
    let frame =
        if structured { reply::error(cookie, code, message) } else { reply::simple(cookie, Some(code)) };
    vec![frame.into()]
}

/// An answer that a client is waiting for. Dropped without one, it says that the server failed.
#[must_use = "the client waits for an answer"]
pub(super) struct Owed {
    pub(super) cookie: u64,
    structured: bool,
    replies: mpsc::Sender<Reply>,
    permits: Option<Permits>,
}

impl Owed {
    pub(super) fn new(
        cookie: u64,
        structured: bool,
        replies: &mpsc::Sender<Reply>,
        permits: Permits,
    ) -> Self {
        Self { cookie, structured, replies: replies.clone(), permits: Some(permits) }
    }

    /// Answers from a thread.
    fn answer(mut self, frames: Vec<Bytes>) {
        if let Some(permits) = self.permits.take() {
            // Nobody takes it when the client has left.
            let _ = self.replies.blocking_send(Reply { frames, permits: Some(permits) });
        }
    }

    /// Refuses from a thread.
    fn refuse(self, code: ErrorCode, message: &str) {
        let frames = refusal(self.cookie, code, message, self.structured);
        self.answer(frames);
    }

    /// Refuses from the runtime.
    pub(super) async fn refuse_early(mut self, code: ErrorCode, message: &str) {
        if let Some(permits) = self.permits.take() {
            let frames = refusal(self.cookie, code, message, self.structured);
            let _ = self.replies.send(Reply { frames, permits: Some(permits) }).await;
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if let Some(permits) = self.permits.take() {
            let frames =
                refusal(self.cookie, ErrorCode::Io, "the server failed; see its log", self.structured);
            let _ = self.replies.try_send(Reply { frames, permits: Some(permits) });
        }
    }
}

/// One request to be carried out.
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) payload: Vec<u8>,
    pub(super) owed: Owed,
}

/// The threads of one connection.
pub(super) struct Pool {
    jobs: SyncSender<Job>,
    /// Closes when the last thread has dropped its file.
    ended: mpsc::Receiver<Infallible>,
}

impl Pool {
    /// Starts `workers` threads and waits until each has opened `export`.
    ///
    /// # Errors
    /// When one cannot: the others end.
    pub(super) async fn start(
        export: &Arc<dyn Export>,
        allowed: Allowed,
        workers: usize,
        requests_max: usize,
    ) -> Result<Self, BlockError> {
        let (jobs, queue) = sync_channel(requests_max);
        let queue = Arc::new(Mutex::new(queue));
        let (opened, mut openings) = mpsc::channel(workers);
        let (alive, ended) = mpsc::channel(1);
        for _ in 0..workers {
            let (disk, queue) = (Arc::clone(export), Arc::clone(&queue));
            let (opened, alive) = (opened.clone(), alive.clone());
            let body = move || {
                match open(&*disk) {
                    Ok(mut file) => {
                        let _ = opened.blocking_send(Ok(()));
                        drop(opened);
                        run(&mut *file, &queue, &allowed);
                    }
                    Err(error) => drop(opened.blocking_send(Err(error))),
                }
                drop(alive); // after the file
            };
            let spawned = std::thread::Builder::new().name("nbd-disk".to_owned()).spawn(body);
            spawned.map_err(|source| cannot_open(export.name(), source))?;
        }
        drop((opened, alive));
        for _ in 0..workers {
            match openings.recv().await {
                Some(result) => result?,
                None => return Err(cannot_open(export.name(), io::Error::other("opening it failed badly"))),
            }
        }
        Ok(Self { jobs, ended })
    }

    /// Hands a request to the threads. It comes back as an answer of its own when they are gone.
    pub(super) fn submit(&self, job: Job) {
        // Full is impossible: a job has a permit, and there are as many permits as places.
        let _ = self.jobs.try_send(job);
    }

    /// Ends the threads after what was submitted; whether they did so in time.
    pub(super) async fn finish(self, grace: Duration) -> bool {
        let Self { jobs, mut ended } = self;
        drop(jobs);
        tokio::time::timeout(grace, ended.recv()).await.is_ok()
    }
}

fn cannot_open(name: &str, source: io::Error) -> BlockError {
    BlockError { name: name.to_owned(), op: BlockOp::Open, offset: 0, len: 0, source }
}

fn open(export: &dyn Export) -> Result<Box<dyn BlockFile>, BlockError> {
    let file = export.open()?;
    if file.size_bytes() < export.size_bytes() {
        let reason = format!("it has {} bytes where {} are served", file.size_bytes(), export.size_bytes());
        return Err(cannot_open(export.name(), io::Error::other(reason)));
    }
    Ok(file)
}

/// Takes jobs until there will be no more.
fn run(file: &mut dyn BlockFile, queue: &Mutex<Receiver<Job>>, allowed: &Allowed) {
    let mut search = HoleSearch::default();
    loop {
        // Only the waiting is done under the lock.
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { work, payload, owed }) = next else { return };
        match execute::carry_out(file, owed.cookie, work, &payload, allowed, &mut search) {
            Ok(frames) => owed.answer(frames),
            Err(error) => {
                tracing::warn!(%error, "an NBD request failed");
                let (code, message) = execute::explain(&error);
                owed.refuse(code, &message);
            }
        }
    }
}
