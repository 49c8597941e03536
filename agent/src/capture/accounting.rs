//! The account of followed disks, as an operator is told it: checks, what explains a difference, and what is given up.
//!
//! Invariants: entries of writes in flight are given up only when the kernel shows none, and their blocks are marked first; a
//! difference is called a miss only when nothing in the map of writes in flight can explain it, once. An extension of
//! [`Capture`]; the arithmetic is `oracle`'s. Units: sectors, generations. Called by `window` and by the agent's daemon.

use std::time::{Duration, Instant};

use reprotect_engine::net::wall_clock;
use reprotect_engine::units::Timestamp;

use super::layout::{Control, Flight, Tally};
use super::oracle::{self, Check};
use super::sysfs::Account;
use super::tracked::{Tracked, Undecided, Untold};
use super::tracker::gone;
use super::{Capture, CaptureError, DiskSlot, Verdict};

/// How often the kernel is asked whether writes are still in flight.
const POLL: Duration = Duration::from_millis(2);

impl Capture {
    /// Whether everything the kernel wrote was seen. What lost completions left behind is marked first; a disk that is
    /// still short must be compared, and says so once.
    ///
    /// # Errors
    /// When the disk is gone, or its pins.
    pub fn check(&mut self, slot: DiskSlot, patience: Duration) -> Result<Check, CaptureError> {
        self.kernel.check_links(&self.place)?;
        self.tracked(slot)?.disk.check_counting()?;
        self.see_quiet()?;
        let now = wall_clock();
        let (first, _) = self.check_once(slot, now)?;
        if let Verdict::Unranged { .. } = first.verdict {
            return self.accept(slot, first);
        }
        let was_behind = std::mem::take(&mut self.tracked_mut(slot)?.behind);
        if let Verdict::Behind { .. } = first.verdict {
            if was_behind {
                return self.accept(slot, first);
            }
            self.tracked_mut(slot)?.behind = true;
            return Ok(Check { verdict: Verdict::Undecided, ..first });
        }
        if !matches!(first.verdict, Verdict::Short { .. }) {
            if matches!(first.verdict, Verdict::Clean { .. }) {
                self.tracked_mut(slot)?.undecided = None;
            }
            return Ok(first);
        }
        let reaped = self.reap(patience)?;
        let quiet = reaped.is_some();
        for (of, sectors) in reaped.into_iter().flatten() {
            if let Some(tracked) = self.disks.iter_mut().find(|tracked| tracked.slot == of) {
                tracked.reaped.written += sectors.written;
                tracked.reaped.discarded += sectors.discarded;
            }
        }
        let (second, short) = self.check_once(slot, wall_clock())?;
        if let Verdict::Behind { .. } = second.verdict {
            self.tracked_mut(slot)?.behind = true;
            return Ok(Check { verdict: Verdict::Undecided, ..second });
        }
        if let Verdict::Short { sectors } = second.verdict {
            if !quiet && self.may_be_lost_completions(slot, short)? {
                return Ok(Check { verdict: Verdict::Undecided, ..second });
            }
            let disk = &self.tracked(slot)?.disk;
            tracing::error!(disk = %disk.name, sectors, "the kernel wrote what capture did not see; the disk must be compared");
            return self.accept(slot, second);
        }
        self.keep_session();
        Ok(second)
    }

    /// What a check found is told once: the account goes on from here. For the next process it does so only when
    /// [`Self::told`] was called.
    fn accept(&mut self, slot: DiskSlot, check: Check) -> Result<Check, CaptureError> {
        let anchor = oracle::accept(&self.kernel, &self.tracked(slot)?.disk, slot.0, wall_clock())?;
        let tracked = self.tracked_mut(slot)?;
        let first = tracked.anchor.map(|anchor| Untold { anchor, reaped: tracked.reaped, misses: 0 });
        let more = |known: Untold| Untold { misses: known.misses + 1, ..known };
        tracked.untold = tracked.untold.or(first).map(more);
        (tracked.anchor, tracked.reaped, tracked.undecided) = (Some(anchor), Account::default(), None);
        self.keep_session();
        Ok(check)
    }

    /// That a check found something missed outlives the agent now, so the account may be forgotten. Once for each time that it
    /// was found.
    pub fn told(&mut self, slot: DiskSlot) {
        let Ok(tracked) = self.tracked_mut(slot) else { return };
        let less = |known: Untold| Untold { misses: known.misses - 1, ..known };
        tracked.untold = tracked.untold.map(less).filter(|left| left.misses > 0);
        self.keep_session();
    }

    /// That capture of a disk was interrupted outlives the agent now.
    pub fn told_interrupted(&mut self, identity: &str) {
        if self.session.owed.remove(identity) {
            self.keep_session();
        }
    }

    /// Capture of a disk is interrupted: every process that follows it says so until [`Self::told_interrupted`].
    pub(crate) fn owe(&mut self, slot: DiskSlot) {
        if let Ok(identity) = self.tracked(slot).map(|tracked| tracked.identity.clone()) {
            self.session.owed.insert(identity);
            self.keep_session();
        }
    }

    /// Keeps what a check found for the next process. Where the state directory is full or read-only, that one begins with
    /// an older account: it may compare a disk once more than it had to.
    pub(super) fn keep_session(&mut self) {
        if let Err(error) = self.store_session() {
            tracing::warn!(%error, "what was seen of the disks' writes is not kept for the next start");
        }
    }

    fn check_once(&mut self, slot: DiskSlot, now: Timestamp) -> Result<(Check, Account), CaptureError> {
        let tracked =
            self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))?;
        let Some(anchor) = &mut tracked.anchor else { return Err(gone(slot)) };
        let (check, short) = oracle::check(&self.kernel, &tracked.disk, slot.0, anchor, tracked.reaped, now)?;
        if check.last_clean == Some(now) {
            // The new anchor has it in.
            tracked.reaped = Account::default();
        }
        Ok((check, short))
    }

    /// Gives up entries of writes that the kernel does not know any more, and marks their blocks. Answers the sectors of
    /// each place; `None` when writes were in flight on some disk all the time.
    pub(crate) fn reap(&mut self, patience: Duration) -> Result<Option<Vec<(usize, Account)>>, CaptureError> {
        let generation = self.kernel.switch(self.kernel.mode().mode)?;
        if !self.await_quiet(patience) {
            return Ok(None);
        }
        self.reap_older(generation).map(Some)
    }

    /// Whether `short` missing sectors may be completions that were lost, on a disk that is never without a write in flight:
    /// what was missing at the check before is in flight ever since, or was overwritten as old as it was. At the first such
    /// check: perhaps.
    fn may_be_lost_completions(&mut self, slot: DiskSlot, short: Account) -> Result<bool, CaptureError> {
        let old_stale = Account {
            written: self.kernel.tally(slot.0, Tally::OldStaleWritten, 0),
            discarded: self.kernel.tally(slot.0, Tally::OldStaleDiscarded, 0),
        };
        let flights = self.kernel.flights();
        // Whatever is missing now was submitted before this.
        let generation = self.kernel.switch(self.kernel.mode().mode)?;
        self.kernel.set(Control::DoubtBelow, generation);
        let now = Undecided { generation, short, old_stale };
        let Some(before) = self.tracked_mut(slot)?.undecided.replace(now) else { return Ok(true) };
        let old = |discard: bool| -> u64 {
            let of = |flight: &&Flight| {
                flight.slot == slot.0 && flight.generation < before.generation && flight.discard == discard
            };
            flights.iter().map(|(_, flight)| flight).filter(of).map(|flight| flight.remaining).sum()
        };
        let written = old(false) + old_stale.written.saturating_sub(before.old_stale.written);
        let discarded = old(true) + old_stale.discarded.saturating_sub(before.old_stale.discarded);
        Ok(written >= before.short.written && discarded >= before.short.discarded)
    }

    /// As [`Self::reap`], of generations before `generation`, if the kernel shows no write in flight in time.
    pub(crate) fn give_up_older(
        &mut self,
        generation: u64,
        patience: Duration,
    ) -> Result<bool, CaptureError> {
        if !self.await_quiet(patience) {
            return Ok(false);
        }
        for (slot, sectors) in self.reap_older(generation)? {
            tracing::warn!(slot, ?sectors, "writes were never seen completing; their blocks are read again");
            if let Some(tracked) = self.disks.iter_mut().find(|tracked| tracked.slot == slot) {
                tracked.reaped.written += sectors.written;
                tracked.reaped.discarded += sectors.discarded;
            }
            self.keep_session();
        }
        Ok(true)
    }

    fn reap_older(&mut self, generation: u64) -> Result<Vec<(usize, Account)>, CaptureError> {
        let before = self.kernel.give_up_before(generation)?;
        let mut found: Vec<(usize, Account)> = Vec::new();
        for (entry, flight) in self.kernel.flights() {
            if flight.generation >= generation {
                continue;
            }
            if flight.generation < before {
                // A tombstone of an earlier time; whatever its completion was, it does not come any more.
                self.kernel.forget_flight(entry);
                continue;
            }
            if let Some(tracked) = self.disks.iter().find(|tracked| tracked.slot == flight.slot) {
                tracked.mark(flight.range);
            }
            let sectors = Account {
                written: if flight.discard { 0 } else { flight.remaining },
                discarded: if flight.discard { flight.remaining } else { 0 },
            };
            match found.iter_mut().find(|(slot, _)| *slot == flight.slot) {
                Some((_, sum)) => {
                    sum.written += sectors.written;
                    sum.discarded += sectors.discarded;
                }
                None => found.push((flight.slot, sectors)),
            }
        }
        Ok(found)
    }

    /// Disks on which writes may be in flight that were submitted before they were followed.
    pub(crate) fn newly_followed(&self) -> Vec<usize> {
        self.disks.iter().filter(|tracked| !tracked.seen_quiet).map(|tracked| tracked.slot).collect()
    }

    /// Looks at these disks once; whether all have been seen without writes in flight.
    pub(crate) fn see_quiet(&mut self) -> Result<bool, CaptureError> {
        for tracked in self.disks.iter_mut().filter(|tracked| !tracked.seen_quiet) {
            tracked.seen_quiet = !tracked.is_busy();
        }
        Ok(self.newly_followed().is_empty())
    }

    /// Waits until every disk was once seen without writes in flight.
    pub(crate) fn await_quiet(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut busy: Vec<&Tracked> = self.disks.iter().collect();
        loop {
            let mut still = Vec::new();
            for tracked in busy {
                if tracked.is_busy() {
                    still.push(tracked);
                }
            }
            if still.is_empty() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            busy = still;
            std::thread::sleep(POLL);
        }
    }
}
