//! The closing window: a crash-consistent moment of all disks of the machine, without stopping any.
//!
//! How: blocks are read while the disks change, rounds of it, until little is left. At t0 data capture is switched on;
//! when every write submitted before t0 is done, the last changed blocks are read; t1 is the end of the stream then. The
//! blocks read, overlaid with the records between t0 and t1 in their order, are the disks at t1: everything submitted after
//! t0 is in the stream, everything older is in the reads.
//!
//! Invariants: a window that is not certainly right has failed, with its reason, and has lost nothing: all its blocks are
//! in the stretches or live; entries of the in-flight map are given up only after the kernel itself has shown no
//! write in flight; after a window, whatever its end, data capture is as the plan says. Units: blocks of 4 KiB,
//! milliseconds. Called by the agent's daemon; blocks while it runs.

use std::time::{Duration, Instant};

use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::Timestamp;

use super::layout::{Control, Mode};
use super::{Capture, CaptureError, DiskCounts, DiskSlot, Record, Stretch};

/// How often it is looked whether old writes are done.
const POLL: Duration = Duration::from_micros(500);

/// Whoever reads blocks and keeps records.
pub trait WindowSink {
    /// Reads these sectors now, past the page cache, and keeps them, over what was read of them before.
    ///
    /// # Errors
    /// When they cannot be read; the window then fails.
    fn read(&mut self, slot: DiskSlot, sectors: &RangeSet) -> Result<(), CaptureError>;

    /// Keeps a record. Records overlay all blocks read in this window, whichever came first, in the order of their coming.
    ///
    /// # Errors
    /// When it cannot be kept; the window then fails.
    fn record(&mut self, record: &Record<'_>) -> Result<(), CaptureError>;
}

/// What is made true of the machine while the moment is taken: its file systems are frozen, for example.
pub trait Moment {
    /// Asked again and again, while records are kept up with, until it answers that the moment may be taken.
    fn is_ready(&mut self) -> bool;

    /// The moment was taken.
    fn is_over(&mut self);
}

/// Any moment will do.
impl Moment for () {
    fn is_ready(&mut self) -> bool {
        true
    }

    fn is_over(&mut self) {}
}

/// What a window is to do.
#[derive(Clone, Debug)]
pub struct WindowPlan {
    /// The disks, each with the open stretch that its harvests go to; all of the machine, or its point is none.
    pub disks: Vec<(DiskSlot, Stretch)>,
    /// Rounds of reading before data capture is switched on, at most.
    pub rounds_max: usize,
    /// A round that found no more blocks than this is the last one.
    pub blocks_enough: u64,
    /// How long writes may take that were in flight at t0.
    pub patience: Duration,
    /// Whether data capture stays on: the stream then continues after t1 without a gap.
    pub stay: bool,
}

impl WindowPlan {
    /// The usual plan.
    #[must_use]
    pub fn new(disks: Vec<(DiskSlot, Stretch)>) -> Self {
        Self { disks, rounds_max: 4, blocks_enough: 1024, patience: Duration::from_secs(5), stay: false }
    }
}

/// How a window ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowEnd {
    /// The sink has the disks as they were at t1.
    Closed(Closed),
    /// No moment was found; the blocks read are as good as any harvest.
    Failed(WindowFailure),
}

/// A window that closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// Where t1 stands in the stream.
    pub end: u64,
    /// t1 by the machine's clock: everything written before is in the sink.
    pub source_time: Timestamp,
    /// Blocks read, in all rounds.
    pub blocks: u64,
    /// Records between t0 and t1.
    pub records: u64,
    /// From t0 to t1.
    pub open_for: Duration,
}

/// Why a window failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowFailure {
    /// Records found no place.
    #[error("the ring overflowed: {0} writes were not recorded; their blocks are read again")]
    Dropped(u64),
    /// Writes had no record though there was room for the largest.
    #[error("{0} writes were longer than the 32 MiB that are recorded of one; their blocks are read again")]
    TooLong(u64),
    /// What was written could not be copied.
    #[error("the data of {0} writes could not be read; their blocks are read again")]
    Unreadable(u64),
    /// A write of before t0 does not end.
    #[error(
        "{writes} writes submitted before the window are still in flight after {waited:?}; the device is slow or hangs"
    )]
    NotDrained {
        /// How many.
        writes: u64,
        /// How long it was waited.
        waited: Duration,
    },
    /// Writes failed in the window: they are in the stream and not on the disk.
    #[error("{0} writes failed while the window was open; their blocks are read again")]
    FailedWrites(u64),
    /// Completions came that nobody had submitted, or of writes that had been given up.
    #[error("{0} completions did not fit the writes in flight")]
    Unmatched(u64),
    /// The in-flight map was full.
    #[error("{0} writes found no place in the map of writes in flight; enlarge it")]
    TooMany(u64),
}

impl WindowFailure {
    /// Whether the next window need not fail for the same reason, so that one may be opened at once.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Dropped(_)
            | Self::TooLong(_)
            | Self::Unreadable(_)
            | Self::FailedWrites(_)
            | Self::Unmatched(_) => true,
            Self::NotDrained { .. } | Self::TooMany(_) => false,
        }
    }
}

/// The rows that decide about a window: what must not have grown while it was open.
fn judge(before: &DiskCounts, after: &DiskCounts) -> Option<WindowFailure> {
    type Row = (fn(&DiskCounts) -> u64, fn(u64) -> WindowFailure);
    let rows: [Row; 6] = [
        (|counts| counts.unreadable, WindowFailure::Unreadable),
        (|counts| counts.unrecorded, WindowFailure::Dropped),
        (|counts| counts.full, WindowFailure::TooMany),
        (|counts| counts.failed, WindowFailure::FailedWrites),
        (|counts| counts.orphans, WindowFailure::Unmatched),
        (|counts| counts.late, WindowFailure::Unmatched),
    ];
    rows.iter().find_map(|(count, failure)| {
        let grown = count(after).saturating_sub(count(before));
        (grown > 0).then(|| failure(grown))
    })
}

impl Capture {
    /// Why records since `before` may not be the whole truth of a disk; `None` while they are.
    #[must_use]
    pub fn doubt(&self, slot: DiskSlot, before: &DiskCounts) -> Option<WindowFailure> {
        judge(before, &self.counts(slot)).map(|failure| self.named(failure))
    }

    /// Why this many writes, of any disk, were not recorded since the last window began.
    #[must_use]
    pub fn unrecorded(&self, writes: u64) -> WindowFailure {
        self.named(WindowFailure::Dropped(writes))
    }

    /// A record that is too long for any ring does not tell so; that there was room for it does.
    fn named(&self, failure: WindowFailure) -> WindowFailure {
        match failure {
            WindowFailure::Dropped(writes) if self.ring.had_room() => WindowFailure::TooLong(writes),
            failure => failure,
        }
    }

    /// Waits until programs that began before this call have counted what they were to count.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn settle(&self) -> Result<(), CaptureError> {
        self.kernel.settle()
    }

    /// Finds a crash-consistent moment of the plan's disks, in which `moment` holds. On success, the marks of the stretches
    /// may be placed.
    ///
    /// # Errors
    /// When the kernel or the sink fails. Data capture is off then, and what was harvested is in its stretches.
    pub fn window(
        &mut self,
        plan: &WindowPlan,
        sink: &mut dyn WindowSink,
        moment: &mut dyn Moment,
    ) -> Result<WindowEnd, CaptureError> {
        let Some((first, _)) = plan.disks.first() else {
            return Err(CaptureError::NotFollowed { disk: "no disk".to_owned() });
        };
        self.prove_data(*first)?;
        let mut blocks = 0;
        if self.mode() != Mode::Data {
            let mut before = u64::MAX;
            for _ in 0..plan.rounds_max {
                let found = self.round(plan, sink)?;
                blocks += found;
                // A round that finds about as much as the one before it shows that the next would, too.
                if found <= plan.blocks_enough || found > before / 4 * 3 {
                    break;
                }
                before = found;
            }
        }
        let end = self.inside(plan, sink, moment, blocks);
        let stay = plan.stay && matches!(end, Ok(WindowEnd::Closed(_)));
        if !stay {
            // What came after t1 is marked in the bitmap.
            self.end_recording()?;
        }
        end
    }

    /// Harvests every disk into its stretch and reads what was found. Answers the blocks.
    fn round(&mut self, plan: &WindowPlan, sink: &mut dyn WindowSink) -> Result<u64, CaptureError> {
        // A look costs little, and the first window is not held up by it if one of many has found the disks quiet.
        self.see_quiet()?;
        let mut blocks = 0;
        for (slot, stretch) in &plan.disks {
            let found = self.harvest(*slot, *stretch)?;
            if !found.is_empty() {
                blocks += found.sector_count().div_ceil(8);
                sink.read(*slot, &found)?;
            }
        }
        Ok(blocks)
    }

    fn take_records(
        &self,
        sink: &mut dyn WindowSink,
        until: u64,
        records: &mut u64,
    ) -> Result<bool, CaptureError> {
        let drained = self.drain::<CaptureError>(until, |record| {
            sink.record(&record)?;
            *records += 1;
            Ok(())
        })?;
        Ok(drained.complete)
    }

    /// From t0 to t1.
    fn inside(
        &mut self,
        plan: &WindowPlan,
        sink: &mut dyn WindowSink,
        moment: &mut dyn Moment,
        mut blocks: u64,
    ) -> Result<WindowEnd, CaptureError> {
        let mut records = 0;
        let before: Vec<DiskCounts> = plan.disks.iter().map(|(slot, _)| self.counts(*slot)).collect();
        let drops = self.drops();
        self.ring.begin_watching();
        let begun = Instant::now();
        let generation = self.kernel.switch(Mode::Data)?;
        // The longest round is read while old writes come to their end.
        blocks += self.round(plan, sink)?;
        self.take_records(sink, self.ring.end(), &mut records)?;
        if let Some(failure) = self.await_older(plan, generation, begun, sink, &mut records)? {
            return Ok(WindowEnd::Failed(failure));
        }
        blocks += self.round(plan, sink)?;
        // What is written out on the way to the moment is in the stream.
        while !moment.is_ready() {
            self.take_records(sink, self.ring.end(), &mut records)?;
            std::thread::sleep(POLL);
        }
        let (source_time, end) = (wall_clock(), self.ring.end());
        moment.is_over();
        let open_for = begun.elapsed();
        while !self.take_records(sink, end, &mut records)? {
            std::thread::yield_now();
        }
        // Programs that began before t1 have counted now what they were to count.
        self.kernel.settle()?;
        for ((slot, _), before) in plan.disks.iter().zip(&before) {
            if let Some(failure) = self.doubt(*slot, before) {
                return Ok(WindowEnd::Failed(failure));
            }
        }
        // Of disks that are not in the plan.
        if self.drops() != drops {
            return Ok(WindowEnd::Failed(self.unrecorded(self.drops().wrapping_sub(drops))));
        }
        Ok(WindowEnd::Closed(Closed { end, source_time, blocks, records, open_for }))
    }

    /// Waits until no write of an older generation is in flight, and on disks newly followed until the kernel has shown
    /// none at all: writes of before are in no generation.
    fn await_older(
        &mut self,
        plan: &WindowPlan,
        generation: u64,
        begun: Instant,
        sink: &mut dyn WindowSink,
        records: &mut u64,
    ) -> Result<Option<WindowFailure>, CaptureError> {
        let mut quiet = self.newly_followed().is_empty();
        loop {
            let reaped_below = self.kernel.get(Control::ReapedBelow);
            let writes = self.kernel.in_flight_before(generation, reaped_below);
            if !quiet {
                quiet = self.see_quiet()?;
            }
            if writes == 0 && quiet {
                // Nothing is left of them, so their counters can be used again.
                self.kernel.set(Control::ReapedBelow, generation);
                return Ok(None);
            }
            let waited = begun.elapsed();
            if waited >= plan.patience {
                // Lost completions leave entries behind; they are given up if the kernel knows of no write.
                let quiet_now = self.give_up_older(generation, plan.patience)?;
                return Ok((!quiet_now).then_some(WindowFailure::NotDrained { writes, waited }));
            }
            self.take_records(sink, self.ring.end(), records)?;
            std::thread::sleep(POLL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_makes_a_window_doubtful_fails_it() {
        let before = DiskCounts { failed: 3, orphans: 2, stale: 1, records: 5, ..DiskCounts::default() };
        let cases: [(DiskCounts, Option<WindowFailure>); 8] = [
            (DiskCounts { records: 90, submitted: 7, written_sectors: 4, ..before }, None),
            (DiskCounts { stale: 4, ..before }, None),
            (DiskCounts { failed: 4, ..before }, Some(WindowFailure::FailedWrites(1))),
            (DiskCounts { orphans: 4, ..before }, Some(WindowFailure::Unmatched(2))),
            (DiskCounts { late: 1, ..before }, Some(WindowFailure::Unmatched(1))),
            (DiskCounts { full: 1, ..before }, Some(WindowFailure::TooMany(1))),
            (DiskCounts { unrecorded: 1, ..before }, Some(WindowFailure::Dropped(1))),
            (DiskCounts { unrecorded: 2, unreadable: 2, ..before }, Some(WindowFailure::Unreadable(2))),
        ];
        for (after, expected) in cases {
            assert_eq!(judge(&before, &after), expected, "{after:?}");
        }
    }
}
