//! The registry's part of a failback: the record of it, the fence, the release, and the way back.
//!
//! Invariants: the record is durable before what it announces is done; a disk in it is opened for no agent, from the
//! moment the record is there and after every restart; a released disk's target is not opened at all, and the points it
//! has are kept. Units: none. Used by `failback`, `session` and `admin`.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use reprotect_engine::format::message::{MarkRefused, MarkRequest, PassMode};
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SECTOR_BYTES};

use super::{KnownDisk, News, Offer, Registry, newest_state, offer_of};
use crate::catalogue::{Failback, FailbackStep, peer, unhex};
use crate::disk_store::DiskStore;
use crate::disk_worker::{DiskSetup, DiskWorker};
use crate::guard::Guard;
use crate::journaled::Journaled;
use crate::points::NO_JOURNAL;

/// How the target of a disk is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Letting {
    /// Only where it is as it was written.
    Sound,
    /// The operator insists: also where somebody else wrote to it.
    Insisted,
    /// To be opened again at once, and compared: also where it stopped, or could not be opened.
    Undo,
}

impl Registry {
    /// The failback of a machine that goes on or is done.
    #[must_use]
    pub fn failback(&self, agent: PeerId) -> Option<Failback> {
        self.lock().failbacks.get(&agent).cloned()
    }

    /// How far the failback of a disk is, and the generation it was fenced with.
    #[must_use]
    pub fn failback_step(&self, disk: DiskId) -> Option<(FailbackStep, Generation)> {
        self.lock().step_of(&disk.to_string())
    }

    /// What an agent is told that opens a disk which is being failed back, or was.
    #[must_use]
    pub fn fence_text(&self, disk: DiskId) -> Option<String> {
        let inner = self.lock();
        let name = disk.to_string();
        let (agent, failback) =
            inner.failbacks.iter().find(|(_, failback)| failback.disks.contains_key(&name))?;
        let machine = inner.machines.get(agent).map_or_else(|| agent.to_string(), |m| m.host_name.clone());
        let done = failback.disks.get(&name).is_some_and(|disk| disk.step == FailbackStep::Released);
        let state = if done { "was failed back and is released" } else { "is being failed back" };
        Some(format!(
            "the machine {state}: nothing more is taken from this side; stop this agent, or take the disks again with `reprotect-master-target failback --undo {machine}`"
        ))
    }

    /// Records how far a failback is; it holds from now on. Blocks.
    ///
    /// # Errors
    /// When it cannot be written; nothing has changed then.
    pub fn record_failback(&self, agent: PeerId, failback: &Failback) -> anyhow::Result<()> {
        self.catalogue.save_failback(agent, failback)?;
        self.lock().failbacks.insert(agent, failback.clone());
        self.hold_for_failbacks();
        Ok(())
    }

    /// The failback never was. Blocks.
    pub(crate) fn forget_failback(&self, agent: PeerId) -> anyhow::Result<()> {
        self.catalogue.remove_failback(agent)?;
        self.lock().failbacks.remove(&agent);
        self.hold_for_failbacks();
        Ok(())
    }

    /// A disk is not protected any more: it belongs to no failback either.
    pub(super) fn leave_failback(&self, disk: DiskId) -> anyhow::Result<()> {
        let name = disk.to_string();
        let of = self.lock().failbacks.iter().find_map(|(agent, failback)| {
            failback.disks.contains_key(&name).then(|| (*agent, failback.clone()))
        });
        let Some((agent, mut failback)) = of else { return Ok(()) };
        failback.disks.remove(&name);
        if failback.disks.is_empty() {
            return self.forget_failback(agent);
        }
        self.record_failback(agent, &failback)
    }

    /// Keeps every kept point of the disks that are released, and the points that other disks of failbacks are still to go to;
    /// lets go of all others.
    pub(crate) fn hold_for_failbacks(&self) {
        let Some(retention) = &self.retention else { return };
        // Failbacks of several machines come here at once, and the newest list counts.
        let mut holding = self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (mut released, mut going) = (BTreeSet::new(), Vec::new());
        let (mut to_finish, mut away) = (BTreeSet::new(), BTreeSet::new());
        let inner = self.lock();
        for (agent, failback) in &inner.failbacks {
            let machine =
                inner.machines.get(agent).map_or_else(|| agent.to_string(), |m| m.host_name.clone());
            for (name, of) in &failback.disks {
                let Ok(disk) = DiskId::parse(name) else { continue };
                match of.step {
                    FailbackStep::Released => {
                        away.insert(machine.clone());
                        released.insert(disk);
                    }
                    FailbackStep::Decided | FailbackStep::Fenced => {
                        // Its source may be gone: its part of the log, too, unless the drive is nearly full.
                        to_finish.insert(machine.clone());
                        going.extend(of.at.parse().ok().map(|at: At| retention.hold(disk, at)));
                    }
                    FailbackStep::Drained | FailbackStep::Verified => {}
                }
            }
        }
        drop(inner);
        retention.set_failing_back(to_finish, away);
        let shape = retention.shape();
        let points = released.iter().filter_map(|disk| shape.disks.get(disk));
        let points = points.flat_map(|disk| disk.points.values());
        *holding = points
            .map(|point| retention.hold_runs(point.disk, At::entry(point.epoch, point.number)))
            .chain(going)
            .collect();
    }

    /// Asks every live session of an agent for a point; answers them.
    pub(crate) fn ask_for_mark(&self, agent: PeerId, request: MarkRequest) -> BTreeSet<SessionId> {
        let mut inner = self.lock();
        inner.refusals.insert(request.point, None);
        let own = inner.sessions.iter().filter(|(_, session)| session.agent == Some(agent));
        // A closed channel means that the session just ended.
        let told = own.filter(|(_, session)| session.news.send(News::MarkRequest(request)).is_ok());
        told.map(|(id, _)| *id).collect()
    }

    /// An agent cannot make a point that somebody here waits for.
    pub(crate) fn mark_refused(&self, refused: &MarkRefused) {
        if let Some(known) = self.lock().refusals.get_mut(&refused.point) {
            *known = Some(refused.reason.as_str().to_owned());
        }
    }

    /// Why a point cannot be made, if the agent said so.
    pub(crate) fn refusal(&self, point: [u8; 16]) -> Option<String> {
        self.lock().refusals.get(&point).cloned().flatten()
    }

    /// Nobody waits for a point any more.
    pub(crate) fn forget_mark(&self, point: [u8; 16]) {
        self.lock().refusals.remove(&point);
    }

    /// Nobody may write a disk any more: a new generation is durable when this returns. Blocks.
    ///
    /// # Errors
    /// When the disk stands, or the generation cannot be recorded.
    pub(crate) fn fence(&self, disk: DiskId) -> anyhow::Result<Generation> {
        let text = self.fence_text(disk).unwrap_or_default();
        let (inputs, _) = self.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        inputs.fence(text)
    }

    /// Closes the target of a disk and gives up its locks. Answers how its files look then; nothing where somebody else has written
    /// there, so that nobody takes it for unchanged. Blocks.
    ///
    /// # Errors
    /// When it is not known to be closed in order, or somebody else wrote to it, which may be [`Letting::accepted`]; it may be
    /// tried again.
    pub(crate) fn release(&self, disk: DiskId, how: Letting) -> anyhow::Result<String> {
        let known = self.lock().disks.get(&disk).map(|known| (known.record.clone(), known.problem.clone()));
        let (record, problem) = known.context("the disk is not protected any more; see `status`")?;
        if let Some(problem) = problem.as_ref().filter(|_| how != Letting::Undo) {
            bail!("{problem}; then restart the master target, and repeat the command");
        }
        // Nobody looked since it was open, or since it was closed and that could not be recorded.
        let mut is_foreign = problem.is_some() || self.disk_inputs(disk).is_none();
        if let Some((inputs, _)) = self.disk_inputs(disk) {
            let phase = self.disk_status(disk).map(|status| status.snapshot().phase);
            if phase == Some(TargetDiskPhase::Failed) && how == Letting::Undo {
                is_foreign = true; // nobody knows what it holds, and it is compared anyway
            } else {
                let accepted = how != Letting::Sound;
                let left = crate::points::on_disk(&inputs, move |store| store.leave(accepted))?;
                self.catalogue.save_disk(&record, &left.state)?;
                is_foreign = left.is_foreign;
            }
            let worker = self.lock().disks.get_mut(&disk).and_then(|known| known.worker.take());
            if let Some(worker) = worker {
                let status = std::sync::Arc::clone(worker.status());
                worker.stop();
                let snapshot = status.snapshot();
                if snapshot.phase == TargetDiskPhase::Failed && how != Letting::Undo {
                    let why = snapshot.problem.unwrap_or_default();
                    if let Some(known) = self.lock().disks.get_mut(&disk) {
                        known.problem = Some(why.clone());
                    }
                    bail!("{why}; then restart the master target, and repeat the command");
                }
            }
        }
        Ok(if is_foreign { String::new() } else { self.stamp(&record.path, &record.kind) })
    }

    fn stamp(&self, path: &std::path::Path, kind: &str) -> String {
        let kind = crate::catalogue::kind_from_text(kind);
        kind.map(|kind| Guard::new(&*self.opener, path, kind).text()).unwrap_or_default()
    }

    /// Opens the target of a released disk again: its agent has to compare it. `stamp` is how its files looked when it
    /// was released. Answers whether somebody wrote to it meanwhile, as far as that can be told. Blocks.
    ///
    /// # Errors
    /// When the target cannot be opened, which is the case while a virtual machine has it.
    pub(crate) fn take_back(&self, disk: DiskId, stamp: &str) -> anyhow::Result<bool> {
        let retention = self.retention.as_ref().context(NO_JOURNAL)?;
        let _opening = retention.opening();
        let closed = |known: &&KnownDisk| known.worker.is_none();
        let record = self.lock().disks.get(&disk).filter(closed).map(|known| known.record.clone());
        let Some(record) = record else { return Ok(false) }; // it is back already
        let changed = stamp.is_empty() || self.stamp(&record.path, &record.kind) != stamp;
        let mut state = self.catalogue.disk_state(disk)?;
        let target = self.open_existing(&record)?;
        let uuid = target.facts().uuid;
        // Also where it was open since the start and stopped: the catalogue is older than what was checkpointed since.
        let log = self.recovered_now(retention, disk)?;
        state = newest_state(retention.lock().get()?, &log)?.unwrap_or(state);
        let before = state.lineage;
        let mut lineage = [0; 16];
        getrandom::fill(&mut lineage).context("the system has no randomness; try again")?;
        state.lineage = LineageId(lineage);
        state.generation = state.generation.next();
        (state.mode, state.pass) = (PassMode::Compare, state.pass + 1);
        state.settled.clear();
        state.touched.clear();
        let guard = Guard::new(&*self.opener, &target.facts().path, target.facts().kind);
        let machine = state.agent.0;
        let mut store = Journaled::open(retention, target, guard, state, machine, Some(&log))?;
        self.forget_recovered(disk);
        let state = store.state().clone();
        store.take_back(before, changed)?;
        let store = DiskStore::Journaled(Box::new(store));
        let worker = {
            let receipts = self.receipts.keeper(state.disk);
            DiskWorker::start(DiskSetup { store, state, limits: self.limits, fenced: None, receipts })?
        };
        self.lock().disks.insert(disk, KnownDisk { record, worker: Some(worker), uuid, problem: None });
        Ok(changed)
    }

    /// Offers what went back to a point to its agent: it was refused meanwhile.
    pub(crate) fn offer_what_went_back(&self) {
        let went = |known: &KnownDisk| {
            let worker = known.worker.as_ref().filter(|worker| worker.status().take_went_back());
            worker.and_then(|_| peer(&known.record.agent))
        };
        let agents: BTreeSet<PeerId> = self.lock().disks.values().filter_map(went).collect();
        agents.into_iter().for_each(|agent| self.offer_again(agent));
    }

    /// Offers an agent's disks to its live sessions again.
    pub(crate) fn offer_again(&self, agent: PeerId) {
        let inner = self.lock();
        let name = agent.to_string();
        let own = inner.disks.iter().filter(|(_, known)| known.record.agent == name);
        for offer in own.filter_map(|(disk, known)| offer_of(*disk, known)) {
            for session in inner.sessions.values().filter(|session| session.agent == Some(agent)) {
                // A closed channel means that the session just ended; its next one is offered the disk.
                let _ = session.news.send(News::Offer(offer.clone()));
            }
        }
    }
}

impl super::Inner {
    /// How far the failback of a disk is.
    pub(super) fn step_of(&self, disk: &str) -> Option<(FailbackStep, Generation)> {
        let of = self.failbacks.values().find_map(|failback| failback.disks.get(disk))?;
        Some((of.step, Generation(of.generation)))
    }
}

/// What a released disk is offered as: whoever opens it is told why it cannot be had.
pub(super) fn released_offer(inner: &super::Inner, disk: DiskId, known: &KnownDisk) -> Option<Offer> {
    let failback = inner.failbacks.get(&peer(&known.record.agent)?)?;
    let generation = Generation(failback.disks.get(&known.record.disk)?.generation);
    let source = unhex(&known.record.source)?;
    Some(Offer { disk, source, size_sectors: known.record.size_bytes / SECTOR_BYTES, generation })
}
