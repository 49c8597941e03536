//! What operators, policy and the initial sync do in a play: bulk, compare, retention, pins, rollbacks and their judgement.
//!
//! Invariants: a rollback's disk writes nothing until it stands at its newest state again or was compared; a rollback
//! whose first edit did not survive begins anew, from a point that is still there. Called by `play.rs`.

use super::device::Stop;
use super::manifest::{Change, Kind};
use super::mutations::Rule;
use super::play::Player;
use super::records::{At, BLOCKS, SECTORS};

/// A rollback of one disk on its way.
pub(crate) struct Rollback {
    pub(crate) disk: usize,
    /// Where to, what that must give, and the epoch of the rollback; `None` while the disk drains.
    pub(crate) step: Option<(At, Vec<u32>, usize)>,
    /// The newest state before the first rollback, once there was one.
    pub(crate) newest: Option<At>,
    /// Something was rolled back already: the disk is not what the source is.
    pub(crate) rolled: bool,
}

impl Player {
    /// Initial sync without points, or the compare of a disk that differs.
    pub(crate) fn sync(&mut self, disk: usize) -> Result<(), Stop> {
        if self.source.disks[disk].bulk {
            return self.bulk(disk);
        }
        let rolling = self.rollback.as_ref().is_some_and(|rollback| rollback.disk == disk);
        if !self.source.disks[disk].suspended || rolling || !self.is_drained(disk) {
            return Ok(());
        }
        let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.journal.live(disk, block)).collect();
        if !self.journal.keeps(Rule::NoBypassWithPoints) {
            for block in 0..self.source.disks[disk].now.len() / SECTORS {
                self.journal.bulk(disk, block, self.source.block(disk, block))?;
            }
        }
        self.journal.note(|| format!("disk {disk}: resync"));
        if !self.journal.catalogue.disks[disk].lost.is_empty() {
            let own = &self.source.disks[disk];
            let until = own.stream.len() + live.iter().zip(&own.now).filter(|both| both.0 != both.1).count();
            self.journal.commit(Change::Mended { disk, until })?;
        }
        self.source.resync(disk, &live);
        self.report.resyncs += 1;
        Ok(())
    }

    pub(crate) fn bulk(&mut self, disk: usize) -> Result<(), Stop> {
        let done = &self.journal.catalogue.disks[disk].bulk_done;
        let written = &self.bulk_written[disk];
        let open = (0..BLOCKS).find(|block| !done.contains(block) && !written.contains(block));
        if done.len() == BLOCKS {
            self.source.disks[disk].bulk = false;
            return Ok(());
        }
        if let Some(block) = open.filter(|_| self.journal.chaos.rng.chance(700)) {
            let content = self.source.block(disk, block);
            // A resumed initial sync compares hashes and sends what differs.
            if self.journal.live(disk, block) != content {
                self.journal.bulk(disk, block, content)?;
            }
            self.bulk_written[disk].push(block);
            return Ok(());
        }
        let blocks = std::mem::take(&mut self.bulk_written[disk]);
        if blocks.is_empty() { Ok(()) } else { self.journal.bulk_progress(disk, blocks) }
    }

    pub(crate) fn is_drained(&self, disk: usize) -> bool {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let all = own.stream.len();
        own.sent == all
            && known.durable == all
            && known.applied == all
            && !matches!(self.journal.catalogue.disks[disk].kind(), Kind::Rollback(_))
    }

    pub(crate) fn free(&mut self) -> Result<(), Stop> {
        let before = self.journal.catalogue.segments.len();
        self.journal.free_segment()?;
        self.report.freed += before - self.journal.catalogue.segments.len();
        Ok(())
    }

    /// The log is shortened although disks need its oldest segment.
    pub(crate) fn carry(&mut self) -> Result<(), Stop> {
        if let Some(high) = self.journal.may_carry() {
            self.oracle.carries(&high); // whatever becomes of it
        }
        self.report.carried += usize::from(self.journal.carry_segment()?);
        Ok(())
    }

    /// A full drive: what waits for a target is given up. Nothing is taken for the disk until it is opened again.
    pub(crate) fn give_up(&mut self, disk: usize) -> Result<(), Stop> {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let rolling = self.rollback.as_ref().is_some_and(|rollback| rollback.disk == disk);
        let busy = rolling || own.suspended || own.bulk || !known.missing.is_empty();
        if busy || known.applied >= known.durable || self.journal.catalogue.disks[disk].kind() != Kind::Normal
        {
            return Ok(());
        }
        self.journal.give_up_waiting(disk)?;
        self.report.given_up += 1;
        Err(Stop::Kill)
    }

    pub(crate) fn expire(&mut self, disk: usize) -> Result<(), Stop> {
        let before = self.journal.catalogue.disks[disk].runs.len();
        self.journal.expire(disk)?;
        self.report.expired += before - self.journal.catalogue.disks[disk].runs.len();
        Ok(())
    }

    pub(crate) fn thin(&mut self, disk: usize) -> Result<(), Stop> {
        let runs = &self.journal.catalogue.disks[disk].runs;
        let Some(low) = runs.get(self.journal.chaos.rng.below(runs.len())).map(|run| run.low) else {
            return Ok(());
        };
        let before = runs.len();
        self.journal.merge_runs(disk, low)?;
        self.report.merges += before - self.journal.catalogue.disks[disk].runs.len();
        Ok(())
    }

    /// Pins a point that has the end of an epoch on every disk.
    pub(crate) fn pin(&mut self) -> Result<(), Stop> {
        let ends = |mark: usize| -> Option<Vec<(usize, usize)>> {
            let disks = self.journal.catalogue.disks.iter().enumerate();
            disks.map(|(disk, known)| Some((disk, known.kept_end(mark)?))).collect()
        };
        let points: Vec<_> =
            self.journal.points().into_iter().filter_map(|mark| Some((mark, ends(mark)?))).collect();
        if points.is_empty() || self.oracle.pinned.len() > 1 {
            return Ok(());
        }
        let (mark, ends) = points[self.journal.chaos.rng.below(points.len())].clone();
        self.journal.commit(Change::Pin { mark })?;
        self.oracle.pinned.extend(ends);
        Ok(())
    }

    /// Takes a rollback one step on, or decides on one.
    pub(crate) fn roll(&mut self, disk: usize) -> Result<(), Stop> {
        let Some(rollback) = self.rollback.take() else {
            let own = &self.source.disks[disk];
            if !own.suspended && !own.bulk && self.journal.chaos.rng.chance(40) {
                self.source.disks[disk].suspended = true;
                self.rollback = Some(Rollback { disk, step: None, newest: None, rolled: false });
            }
            return Ok(());
        };
        let disk = rollback.disk;
        let step = rollback.step.as_ref().map(|step| step.2);
        let (newest, rolled) = (rollback.newest, rollback.rolled);
        self.rollback = Some(rollback);
        let Some(epoch) = step else {
            return if self.may_roll_back(disk) { self.begin_rollback(disk, newest, rolled) } else { Ok(()) };
        };
        if self.is_rollback(disk, epoch) {
            self.journal.roll_back(disk)?;
        } else {
            // A stop took the edit that began it. The disk may have to be drained anew, and the point may have gone.
            let newest = newest.filter(|_| rolled);
            self.rollback = Some(Rollback { disk, step: None, newest, rolled });
        }
        Ok(())
    }

    pub(crate) fn is_rollback(&self, disk: usize, epoch: usize) -> bool {
        let epoch = self.journal.catalogue.disks[disk].epochs.get(epoch);
        epoch.is_some_and(|epoch| matches!(epoch.kind, Kind::Rollback(_)))
    }

    /// Whether all that was sent is durable and applied, and nothing of it is on its way again.
    pub(crate) fn may_roll_back(&self, disk: usize) -> bool {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let durable = own.sent == own.stream.len() && known.durable == own.stream.len();
        let rolls = matches!(self.journal.catalogue.disks[disk].kind(), Kind::Rollback(_));
        durable
            && known.awaited.is_empty()
            && !rolls
            && (known.applied == known.durable || !self.journal.keeps(Rule::RollbackAfterDrain))
    }

    pub(crate) fn begin_rollback(
        &mut self,
        disk: usize,
        newest: Option<At>,
        rolled: bool,
    ) -> Result<(), Stop> {
        let promised = self.oracle.promised(&self.journal, &self.source, disk);
        let whole = |at: &At| self.journal.view(disk, *at).iter().flatten().all(Option::is_some);
        let places: Vec<_> = promised.into_iter().filter(|place| whole(&place.0)).collect();
        let own = &mut self.source.disks[disk];
        if places.is_empty() {
            own.suspended = rolled;
            self.rollback = None;
            return Ok(());
        }
        let (to, mut state) = places[self.journal.chaos.rng.below(places.len())].clone();
        state.resize(BLOCKS * SECTORS, 0);
        let epoch = self.journal.catalogue.disks[disk].active() + 1;
        let newest = newest
            .or(own.states[own.stream.len()].is_some().then_some(At { base: epoch, upto: own.stream.len() }));
        self.rollback = Some(Rollback { disk, step: Some((to, state, epoch)), newest, rolled });
        self.journal.begin_rollback(disk, to)
    }

    /// A finished rollback is judged; then another follows, or the way forward, or a compare.
    pub(crate) fn judge_rollback(&mut self) -> Result<(), String> {
        let Some(Rollback { disk, step: Some((to, state, epoch)), newest, .. }) = &self.rollback else {
            return Ok(());
        };
        let (disk, to, newest) = (*disk, *to, *newest);
        if !self.is_rollback(disk, *epoch) || self.journal.catalogue.disks[disk].active() == *epoch {
            return Ok(());
        }
        let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.journal.live(disk, block)).collect();
        // A block that became a hole on the way was left as it stood; then the rollback is not whole.
        let wanted: Vec<Option<u32>> = self.journal.view_of_all(disk, to).into_iter().flatten().collect();
        if wanted.contains(&None) {
            self.oracle.forget_end(disk, *epoch);
        } else if live != *state {
            return Err(format!("disk {disk}: rolled back to {to:?}, reads {live:?}, was {state:?}"));
        }
        let whole = live == *state;
        self.report.rollbacks += 1;
        let forward = whole && newest == Some(to);
        self.rollback = None;
        if forward {
            self.report.roll_forwards += 1;
            self.source.disks[disk].suspended = false;
        } else if self.journal.chaos.rng.chance(600) {
            self.rollback = Some(Rollback { disk, step: None, newest, rolled: true });
        }
        Ok(())
    }
}
