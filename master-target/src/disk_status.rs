//! What a running disk shows of itself: counters and the last known state, read by `status` at any time.
//!
//! Invariants: written by the disk's two threads only; readers never hold them up for longer than a copy.
//! Units: bytes and sectors. Used by `disk_worker`, `registry` and `admin`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::{DiskNotice, Piece, TargetDisk};
use reprotect_engine::units::{Generation, SECTOR_BYTES, Sequence};

use crate::scrub::ScrubState;

/// The slow-moving part.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Who has it open.
    pub phase: TargetDiskPhase,
    /// Whether the target was closed.
    pub closed: bool,
    /// The newest generation.
    pub generation: Generation,
    /// Durable sequence.
    pub durable: Sequence,
    /// Sequence of the last mark.
    pub marked: Sequence,
    /// What the last mark since the start said of blocks that the source could not read.
    pub unread_blocks: u32,
    /// What the pass needs.
    pub mode: PassMode,
    /// Number of the pass.
    pub pass: u64,
    /// Sectors settled in the pass.
    pub settled_sectors: u64,
    /// Size of the disk.
    pub size_sectors: u64,
    /// What is wrong, if anything.
    pub problem: Option<String>,
}

/// Counters and state of one disk.
#[derive(Debug)]
pub struct DiskStatus {
    wire_bytes: AtomicU64,
    plain_bytes: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    records: AtomicU64,
    snapshot: Mutex<Snapshot>,
    scrub: Mutex<ScrubState>,
    /// What agents are told while the disk goes back to a point.
    going_back: Mutex<Option<String>>,
    /// It went back, and its agent was not offered it since.
    went_back: AtomicBool,
}

/// The counters since the daemon started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of batches as received.
    pub wire_bytes: u64,
    /// Plain bytes in them.
    pub plain_bytes: u64,
    /// Bytes written to the target.
    pub written_bytes: u64,
    /// Bytes zeroed on the target.
    pub zeroed_bytes: u64,
    /// Records received.
    pub records: u64,
}

/// A disk goes back to a point; dropped, it does not any more.
#[derive(Debug)]
#[must_use = "it is said for as long as this is kept"]
pub(crate) struct GoingBack(Arc<DiskStatus>);

impl GoingBack {
    pub(crate) fn of(status: &Arc<DiskStatus>, text: String) -> Self {
        *status.going_back.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        Self(Arc::clone(status))
    }
}

impl Drop for GoingBack {
    fn drop(&mut self) {
        *self.0.going_back.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl DiskStatus {
    /// The status of a disk that was just started.
    #[must_use]
    pub fn new(state: &DiskState) -> Self {
        Self {
            wire_bytes: AtomicU64::new(0),
            plain_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            records: AtomicU64::new(0),
            scrub: Mutex::default(),
            going_back: Mutex::default(),
            went_back: AtomicBool::new(false),
            snapshot: Mutex::new(Snapshot {
                phase: TargetDiskPhase::Closed,
                closed: false,
                generation: state.generation,
                durable: state.sequence,
                marked: state.marked,
                unread_blocks: 0,
                mode: state.mode,
                pass: state.pass,
                settled_sectors: state.settled.sector_count(),
                size_sectors: state.size_sectors,
                problem: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Snapshot> {
        // A panic while holding it leaves a whole value: every change is one assignment.
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the state.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.lock().clone()
    }

    /// What the scrub found.
    #[must_use]
    pub fn scrub(&self) -> ScrubState {
        self.scrub.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn update_scrub(&self, change: impl FnOnce(&mut ScrubState)) {
        change(&mut self.scrub.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Why nobody can have the disk now: it goes back to a point, on the thread that would answer.
    #[must_use]
    pub fn going_back(&self) -> Option<String> {
        self.going_back.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It stands at a point.
    pub(crate) fn note_went_back(&self) {
        self.went_back.store(true, Ordering::Release);
    }

    /// Whether it went back since this was asked last.
    pub(crate) fn take_went_back(&self) -> bool {
        self.went_back.swap(false, Ordering::AcqRel)
    }

    /// A copy of the counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
            plain_bytes: self.plain_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            zeroed_bytes: self.zeroed_bytes.load(Ordering::Relaxed),
            records: self.records.load(Ordering::Relaxed),
        }
    }

    /// A batch of `wire_bytes` came.
    pub(crate) fn received(&self, wire_bytes: u64, records: &[Record]) {
        self.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
        self.plain_bytes.fetch_add(records.iter().map(Record::plain_bytes).sum(), Ordering::Relaxed);
        self.records.fetch_add(records.len() as u64, Ordering::Relaxed);
    }

    /// Pieces were written.
    pub(crate) fn wrote(&self, pieces: &[Piece]) {
        for piece in pieces {
            let bytes = piece.keep.iter().map(|keep| keep.bytes()).sum();
            let counter =
                if piece.record.plain_bytes() > 0 { &self.written_bytes } else { &self.zeroed_bytes };
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Takes over what the core says.
    pub(crate) fn update(&self, disk: &TargetDisk) {
        let state = disk.state();
        let mut snapshot = self.lock();
        snapshot.phase = disk.phase();
        snapshot.generation = state.generation;
        snapshot.durable = disk.durable();
        snapshot.marked = state.marked;
        if snapshot.mode != state.mode || snapshot.pass != state.pass || state.mode != PassMode::Done {
            snapshot.settled_sectors = state.settled.sector_count();
        }
        snapshot.mode = state.mode;
        snapshot.pass = state.pass;
        if snapshot.size_sectors != state.size_sectors {
            snapshot.size_sectors = state.size_sectors;
            if state.mode == PassMode::Done {
                snapshot.settled_sectors = state.size_sectors; // its new part comes with the next round
            }
        }
    }

    pub(crate) fn notice(&self, notice: &DiskNotice) {
        if matches!(notice, DiskNotice::Synced) {
            let mut snapshot = self.lock();
            snapshot.settled_sectors = snapshot.size_sectors;
        }
    }

    pub(crate) fn set_unread(&self, blocks: u32) {
        self.lock().unread_blocks = blocks;
    }

    pub(crate) fn set_problem(&self, problem: Option<String>) {
        self.lock().problem = problem;
    }

    /// The disk's threads broke.
    pub(crate) fn set_failed(&self, problem: &str) {
        let mut snapshot = self.lock();
        snapshot.phase = TargetDiskPhase::Failed;
        snapshot.problem = Some(problem.to_owned());
    }

    pub(crate) fn set_closed(&self) {
        self.lock().closed = true;
    }
}

/// Bytes of a number of sectors.
#[must_use]
pub const fn sector_bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR_BYTES)
}
