//! A disk behind the journal of whose points its agent, or a failback, takes something back.
//!
//! Invariants: what is said of points is recorded at once, for those that are kept and for marks in the log, and not behind what
//! waits for room at the target; where it cannot be recorded it waits, and is tried again. Units: sequences. Part of
//! `journaled`, on the disk's own thread.

use reprotect_engine::format::manifest::{Edit, PointKept, StretchDegraded};
use reprotect_engine::format::message::PointDegrade;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::JournalError;

use super::Journaled;

/// Parts of a stream whose points are to be degraded and wait for a full medium.
const DEGRADING_MAX: usize = 64;

impl Journaled {
    /// Points in a part of the stream promise less than was said: recorded when nothing else waits, and tried again
    /// where the medium is full.
    /// Answers whether it is news: agents say it again and again, because nobody answers it.
    pub(crate) fn degrade(&mut self, degrade: &PointDegrade) -> bool {
        let is_it = |part: &StretchDegraded| {
            (part.lineage, part.from, part.to) == (degrade.lineage, degrade.from, degrade.to)
        };
        let known = self.shape_says(|shape| shape.degraded.iter().any(is_it));
        if known.is_ok_and(|known| known.unwrap_or(false)) {
            return false; // points that come later are compared with it
        }
        let full = self.degrading.len() >= DEGRADING_MAX;
        match self.degrading.back_mut().filter(|last| full && last.lineage == degrade.lineage) {
            // One that says too much is better than one that is forgotten.
            Some(last) => (last.from, last.to) = (last.from.min(degrade.from), last.to.max(degrade.to)),
            None => self.degrading.push_back(*degrade),
        }
        // Not behind what waits for room at the target. Where it cannot be recorded now, `apply` tries again, and fails with it.
        if let Err(error) = self.record_degraded() {
            tracing::warn!(disk = %self.id, %error, "that points are degraded is not recorded yet");
        }
        true
    }

    /// What was said of points becomes durable: for those that are kept, and for marks in the log.
    pub(super) fn record_degraded(&mut self) -> Result<(), JournalError> {
        while let Some(degrade) = self.degrading.front() {
            let now = wall_clock();
            let mut locked = self.retention.lock();
            let journal = locked.get()?;
            let Some(shape) = journal.shape().disks.get(&self.id) else { break };
            let lineage_of = |number: u64| {
                // The last entry of an epoch belongs to it; so does the point a first epoch begins at.
                let epoch = shape.epoch_of(number).or(shape.epochs.first());
                epoch.map(|epoch| epoch.opened.lineage)
            };
            let concerned = shape.points.values().filter(|point| {
                !point.degraded
                    && (degrade.from..=degrade.to).contains(&point.sequence)
                    && lineage_of(point.number) == Some(degrade.lineage)
            });
            let changed = concerned.map(|point| Edit::PointChanged(PointKept { degraded: true, ..*point }));
            let part = StretchDegraded {
                disk: self.id,
                lineage: degrade.lineage,
                from: degrade.from,
                to: degrade.to,
                time: now,
                cause: degrade.cause,
            };
            let edits: Vec<Edit> = std::iter::once(Edit::StretchDegraded(part)).chain(changed).collect();
            journal.edit(&edits, now)?;
            drop(locked);
            self.degrading.pop_front();
        }
        Ok(())
    }
}
