//! The stream of every write, between the window that began it and whatever ends it.
//!
//! Invariants: a batch is handed out only after everything that could make its order doubtful was looked at; a stream that
//! is doubtful ends, with its reason, and nothing is lost: every write it held is marked in the maps. Records wait
//! here for at most [`BATCH_AGE`], or until they fill a batch. Units: bytes of the ring. Called by `capturing` only.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::Stretch as StretchKind;
use reprotect_engine::format::extent::Record as Change;
use reprotect_engine::limits::{BATCH_AGE_NANOS_MAX, BATCH_PLAIN_BYTES_MAX};
use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, SectorRange, Timestamp};

use super::Batch;
use super::gather::{OUTGROWN, changes_of, is_discard, is_outgrown, split};
use crate::capture::{Capture, CaptureError, DiskCounts, DiskSlot};

/// How long a record may wait for others.
const BATCH_AGE: Duration = Duration::from_nanos(BATCH_AGE_NANOS_MAX);

/// How often it is told that nothing is written.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// A disk of the stream.
#[derive(Debug)]
struct Streamed {
    slot: DiskSlot,
    whole: SectorRange,
    before: DiskCounts,
    changes: Vec<Change>,
    /// It was written behind the end that is known.
    outgrown: bool,
    /// What the device makes of these is its own affair: they are to be read when the stream is over.
    discarded: RangeSet,
}

/// A stream under way.
#[derive(Debug)]
pub(super) struct Stream {
    disks: BTreeMap<DiskId, Streamed>,
    drops: u64,
    bytes: u64,
    oldest: Option<Instant>,
    told: Instant,
}

/// Why a stream is over.
#[derive(Debug)]
pub(super) enum Broken {
    Doubtful(String),
    Failed(CaptureError),
}

impl From<CaptureError> for Broken {
    fn from(error: CaptureError) -> Self {
        Self::Failed(error)
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Doubtful(why) => f.write_str(why),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl Stream {
    /// Goes on where a window that stays open closed; `before` are the counts it was judged by.
    pub(super) fn begin(
        disks: impl Iterator<Item = (DiskId, DiskSlot, SectorRange, DiskCounts)>,
        drops: u64,
        discarded: Vec<(DiskSlot, SectorRange)>,
    ) -> Self {
        let disks = disks
            .map(|(disk, slot, whole, before)| {
                (
                    disk,
                    Streamed {
                        slot,
                        whole,
                        before,
                        changes: Vec::new(),
                        outgrown: false,
                        discarded: RangeSet::new(),
                    },
                )
            })
            .collect();
        let mut stream = Self { disks, drops, bytes: 0, oldest: None, told: Instant::now() };
        discarded.into_iter().for_each(|(slot, range)| stream.discard(slot, range));
        stream
    }

    /// Takes what stands in the ring; answers batches when it is time for them, or that there is nothing, and when that was
    /// so.
    ///
    /// # Errors
    /// When the stream is over.
    pub(super) fn advance(&mut self, capture: &Capture) -> Result<Option<(Vec<Batch>, Timestamp)>, Broken> {
        let now = wall_clock();
        let complete = self.take(capture, capture.stream_end())?;
        let idle = self.oldest.is_none() && self.told.elapsed() >= TELL_EVERY;
        let due = idle
            || self.bytes >= BATCH_PLAIN_BYTES_MAX
            || self.oldest.is_some_and(|at| at.elapsed() >= BATCH_AGE);
        if !due {
            return Ok(None);
        }
        self.told = Instant::now();
        // A record that is being written just now may be older than this moment.
        let as_of = if complete { now } else { Timestamp::ZERO };
        Ok(Some((self.batches(capture)?, as_of)))
    }

    /// Everything that stands before `end` in the ring, in batches.
    ///
    /// # Errors
    /// When the stream is over.
    pub(super) fn close(&mut self, capture: &Capture, end: u64) -> Result<Vec<Batch>, Broken> {
        while !self.take(capture, end)? {
            std::thread::yield_now();
        }
        // What programs that ran then had to count must be counted before it is believed.
        capture.settle()?;
        self.batches(capture)
    }

    /// Ranges that were discarded since the stream began.
    pub(super) fn discarded(&self) -> Vec<(DiskSlot, SectorRange)> {
        let of = |disk: &Streamed| disk.discarded.iter().map(|range| (disk.slot, range)).collect::<Vec<_>>();
        self.disks.values().flat_map(of).collect()
    }

    fn discard(&mut self, slot: DiskSlot, range: SectorRange) {
        if let Some(disk) = self.disks.values_mut().find(|disk| disk.slot == slot) {
            disk.discarded.insert(range);
        }
    }

    /// The disks.
    pub(super) fn disks(&self) -> Vec<DiskId> {
        self.disks.keys().copied().collect()
    }

    fn take(&mut self, capture: &Capture, until: u64) -> Result<bool, CaptureError> {
        let mut bytes = 0;
        let disks = &mut self.disks;
        let drained = capture.drain::<CaptureError>(until, |record| {
            if let Some(disk) = disks.values_mut().find(|disk| disk.slot == record.slot) {
                bytes += record.data.len() as u64;
                disk.outgrown |= is_outgrown(&record, disk.whole);
                disk.changes.extend(changes_of(&record, disk.whole));
                if is_discard(&record) {
                    disk.discarded.insert(record.range.intersect(disk.whole));
                }
            }
            Ok(())
        })?;
        self.bytes += bytes;
        if self.oldest.is_none() && disks.values().any(|disk| !disk.changes.is_empty()) {
            self.oldest = Some(Instant::now());
        }
        Ok(drained.complete)
    }

    fn batches(&mut self, capture: &Capture) -> Result<Vec<Batch>, Broken> {
        let drops = capture.drops().wrapping_sub(self.drops);
        if drops != 0 {
            return Err(Broken::Doubtful(capture.unrecorded(drops).to_string()));
        }
        for disk in self.disks.values() {
            if disk.outgrown {
                return Err(Broken::Doubtful(OUTGROWN.to_owned()));
            }
            if let Some(doubt) = capture.doubt(disk.slot, &disk.before) {
                return Err(Broken::Doubtful(doubt.to_string()));
            }
        }
        (self.bytes, self.oldest) = (0, None);
        let mut batches = Vec::new();
        for (disk, streamed) in &mut self.disks {
            batches.extend(split(*disk, StretchKind::Ordered, std::mem::take(&mut streamed.changes)));
        }
        Ok(batches)
    }
}
