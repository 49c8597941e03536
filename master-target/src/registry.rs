//! Everything that lives in a running master target: machines, disks with their workers, sessions.
//!
//! Invariants: one lock, held for look-ups and small changes only, never across I/O; a disk that cannot be opened is
//! listed with its problem and hinders no other; a session is offered exactly the disks of its agent.
//! Called by `session` (per connection), `protect` and `admin`.

mod busy;
mod doubts;
pub(crate) mod failing_back;
mod growing;
#[cfg(test)]
mod machines;
pub(crate) mod taken_again;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::message::{InventoryDisk, MarkRequest, Policy};
use reprotect_engine::format::vmdk::descriptor::DiskUuid;
use reprotect_engine::io;
use reprotect_engine::io::durable::{Access, replace_file};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::{DiskLog, Recovered};
use reprotect_engine::store::target::{Expectation, Target, TargetKind, TargetSpec, open_target};
use reprotect_engine::units::{DiskId, Generation, PeerId, SECTOR_BYTES};
use tokio::sync::mpsc;

use crate::catalogue::{
    Catalogue, Doubt, Failback, FailbackStep, Machine, ProtectedDisk, SourceDisk, hex, kind_from_text, peer,
    unhex,
};
use crate::device;
use crate::disk_status::DiskStatus;
use crate::disk_store::DiskStore;
use crate::disk_worker::{DiskInputs, DiskSetup, DiskWorker};
use crate::explain::explain;
use crate::guard::Guard;
use crate::journaled::Journaled;
use crate::lost::begin_repair;
use crate::receipts::Receipts;
use crate::redo::newest_state;
use crate::retention::{Hold, Retention};

/// What a session needs to know to offer a disk.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The disk.
    pub disk: DiskId,
    /// The source disk on the agent.
    pub source: [u8; 16],
    /// Its size.
    pub size_sectors: u64,
    /// The newest generation.
    pub generation: Generation,
}

/// What a session is told while it lasts.
#[derive(Clone, Debug)]
pub enum News {
    /// A disk is to be offered.
    Offer(Offer),
    /// The machine's policy changed.
    Policy(Policy),
    /// A point of the machine is wanted.
    MarkRequest(MarkRequest),
    /// A disk cannot grow, and why.
    NotGrown(DiskId, String),
}

/// A live session.
#[derive(Clone, Debug)]
pub struct LiveSession {
    /// The agent, once it proved itself.
    pub agent: Option<PeerId>,
    /// Where it comes from, and how: the agent or its process server.
    pub address: String,
    /// The process server it comes through.
    pub relay: Option<PeerId>,
    /// Where news go.
    news: mpsc::UnboundedSender<News>,
}

/// A disk the registry knows.
#[derive(Debug)]
struct KnownDisk {
    record: ProtectedDisk,
    worker: Option<DiskWorker>,
    uuid: Option<DiskUuid>,
    problem: Option<String>,
}

/// A disk as shown to operators.
#[derive(Debug)]
pub struct DiskView {
    /// Its record.
    pub record: ProtectedDisk,
    /// What it is doing; `None` when it could not be opened.
    pub status: Option<Arc<DiskStatus>>,
    /// Why it could not be opened.
    pub problem: Option<String>,
    /// How far its failback is, and the generation it was fenced with.
    pub failback: Option<(FailbackStep, Generation)>,
    /// What the journal knows to be wrong with it, or does not know of it: see [`Retention::losses`], [`Registry::doubt`].
    pub loss: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    machines: BTreeMap<PeerId, Machine>,
    policies: BTreeMap<PeerId, Policy>,
    failbacks: BTreeMap<PeerId, Failback>,
    /// Points that somebody waits for, and why the agent cannot make them.
    refusals: BTreeMap<[u8; 16], Option<String>>,
    disks: BTreeMap<DiskId, KnownDisk>,
    sessions: BTreeMap<SessionId, LiveSession>,
    next_session: u64,
}

/// The registry.
pub struct Registry {
    catalogue: Catalogue,
    receipts: Arc<Receipts>,
    opener: Arc<dyn Files>,
    limits: FlowLimits,
    retention: Option<Arc<Retention>>,
    /// What the redo log said of disks that are not started yet.
    recovered: Mutex<BTreeMap<DiskId, DiskLog>>,
    /// Disks that could not be started because a drive was full: they are tried again.
    waiting: Mutex<BTreeSet<DiskId>>,
    /// Disks of which nobody knows whether their newest changes are all there.
    doubts: Mutex<BTreeMap<DiskId, Doubt>>,
    /// Held while the set of disks is planned and changed, so that no two do it at once.
    changes: Mutex<()>,
    /// Machines on whose disks long work goes on, by their agents; and who waits for its end.
    busy: Mutex<BTreeSet<String>>,
    calm: Condvar,
    /// Points of disks that are released, and those that failbacks go to.
    held: Mutex<Vec<Hold>>,
    /// No disk is opened any more.
    stopping: AtomicBool,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Loads the catalogue and opens every target. Blocks.
    ///
    /// # Errors
    /// When the catalogue's folder cannot be used; a single disk's trouble is shown, not returned.
    pub fn open(catalogue: Catalogue, limits: FlowLimits) -> anyhow::Result<Self> {
        Self::open_with(catalogue, limits, fs_opener(), None)
    }

    /// As [`Self::open`], with another way to open targets, and a retention journal.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        catalogue: Catalogue,
        limits: FlowLimits,
        opener: Arc<dyn Files>,
        retention: Option<(Arc<Retention>, Recovered)>,
    ) -> anyhow::Result<Self> {
        let (retention, recovered) = retention.unzip();
        let _opening = retention.as_ref().map(Retention::opening);
        let recovered = Mutex::new(recovered.map(|found| found.disks).unwrap_or_default());
        let (changes, held, inner) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (stopping, doubts, waiting) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        let receipts = Receipts::open(catalogue.root());
        let registry = Self {
            catalogue,
            receipts,
            opener,
            limits,
            retention,
            recovered,
            waiting,
            doubts,
            changes,
            busy: Mutex::default(),
            calm: Condvar::new(),
            held,
            stopping,
            inner,
        };
        for machine in registry.catalogue.machines()? {
            if let Some(agent) = peer(&machine.agent) {
                registry.lock().machines.insert(agent, machine);
            }
        }
        registry.lock().policies = registry.catalogue.policies()?;
        registry.lock().failbacks = registry.catalogue.failbacks()?;
        registry.hold_for_failbacks();
        for (record, state) in registry.catalogue.disks()? {
            registry.start_known(record, state);
        }
        registry.refuse_duplicates();
        Ok(registry)
    }

    fn start_known(&self, mut record: ProtectedDisk, state: anyhow::Result<DiskState>) {
        let Ok(disk) = DiskId::parse(&record.disk) else {
            tracing::error!(disk = record.disk, "a disk record without a valid UUID is left out");
            return;
        };
        self.take_up_doubt(disk);
        if self.failback_step(disk).is_some_and(|(step, _)| step == FailbackStep::Released) {
            // Its virtual machine may run from the target, which is not even opened.
            self.lock().disks.insert(disk, KnownDisk { record, worker: None, uuid: None, problem: None });
            return;
        }
        let started = state.and_then(|state| {
            self.settle_growth(&mut record)?;
            self.adopt(&mut record, &state)?;
            let target = self.open_existing(&record)?;
            let uuid = target.facts().uuid;
            Ok((self.start_worker(target, state, &record)?, uuid))
        });
        let is_full = started.as_ref().err().is_some_and(taken_again::is_full);
        let waits = is_full && self.retention.is_some(); // nobody looks otherwise
        self.wait_for_space(disk, waits);
        if started.is_ok() {
            self.forget_recovered(disk);
        }
        let known = match started {
            Ok((worker, uuid)) => KnownDisk { record, worker: Some(worker), uuid, problem: None },
            Err(error) => {
                let mut problem = explain(&error);
                if waits {
                    problem.push_str("; free space there, the disk is opened then by itself");
                }
                tracing::error!(%disk, path = %record.path.display(), "{problem}; this disk waits, the others go on");
                KnownDisk { record, worker: None, uuid: None, problem: Some(problem) }
            }
        };
        self.lock().disks.insert(disk, known);
    }

    fn open_existing(&self, record: &ProtectedDisk) -> anyhow::Result<Target> {
        let kind =
            kind_from_text(&record.kind).with_context(|| format!("unknown target kind {}", record.kind))?;
        let spec = TargetSpec { path: record.path.clone(), kind };
        let expect = Expectation {
            size_bytes: Some(record.size_bytes),
            known_uuids: BTreeSet::new(), // it is this disk's own UUID that stands there
            writable: true,
        };
        if kind == TargetKind::Device {
            device::check(&record.path, record.device.as_deref())?;
        }
        let target = open_target(&self.opener, &spec, &expect)?;
        if !target.repair().is_nothing() {
            tracing::warn!(path = %record.path.display(), repair = ?target.repair(), "the target was repaired on opening");
        }
        Ok(target)
    }

    /// The journal of a disk's record must be ours: what it holds is not on the target yet. A disk without one gets ours.
    fn adopt(&self, record: &mut ProtectedDisk, state: &DiskState) -> anyhow::Result<()> {
        let ours = self.retention.as_ref().map(|retention| hex(&retention.id()));
        match (&record.journal, &ours) {
            (Some(theirs), ours) if ours.as_ref() != Some(theirs) => Err(anyhow!(
                "its newest writes are in the retention journal {theirs}; set `retention.path` to its folder, then restart"
            )),
            (None, Some(_)) => {
                record.journal = ours;
                self.catalogue.save_disk(record, state)
            }
            _ => Ok(()),
        }
    }

    fn start_worker(
        &self,
        target: Target,
        mut state: DiskState,
        record: &ProtectedDisk,
    ) -> anyhow::Result<DiskWorker> {
        let guard = Guard::new(&*self.opener, &target.facts().path, target.facts().kind);
        let store = match &self.retention {
            None => {
                let state_path = self.catalogue.state_path(state.disk);
                // It may have grown since: the next checkpoint records that.
                state.size_sectors = state.size_sectors.max(record.size_bytes / SECTOR_BYTES);
                if begin_repair(&mut state, &target.repair().dropped) {
                    // Before the target is written or closed: both put the tables in order, and the loss shows no more.
                    replace_file(&state_path, &state.to_bytes(), Access::Private)?;
                }
                DiskStore::direct(target, guard, state_path)
            }
            Some(retention) => {
                let recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
                let log = recovered.get(&state.disk).cloned();
                drop(recovered);
                if let Some(log) = &log {
                    state = newest_state(retention.lock().get()?, log)?.unwrap_or(state);
                }
                let machine = state.agent.0;
                let mut store = Journaled::open(retention, target, guard, state, machine, log.as_ref())?;
                state = store.state().clone();
                if record.existing {
                    store.keep_as_found()?;
                }
                DiskStore::Journaled(Box::new(store))
            }
        };
        let fenced = self.fence_text(state.disk);
        let receipts = self.receipts.keeper(state.disk);
        DiskWorker::start(DiskSetup { store, state, limits: self.limits, fenced, receipts })
    }

    /// Records a new disk, starts it and offers it to its agent's live sessions. Blocks.
    ///
    /// # Errors
    /// When a file cannot be written or a thread not started.
    pub fn add_disk(
        &self,
        mut record: ProtectedDisk,
        target: Target,
        state: DiskState,
    ) -> anyhow::Result<()> {
        let (disk, agent, uuid) = (state.disk, state.agent, target.facts().uuid);
        record.journal = self.retention.as_ref().map(|retention| hex(&retention.id()));
        self.catalogue.save_disk(&record, &state)?;
        let worker = self.start_worker(target, state, &record)?;
        let known = KnownDisk { record, worker: Some(worker), uuid, problem: None };
        let mut inner = self.lock();
        inner.disks.insert(disk, known);
        let offer = inner.disks.get(&disk).and_then(|known| offer_of(disk, known));
        for session in inner.sessions.values().filter(|session| session.agent == Some(agent)) {
            if let Some(offer) = &offer {
                // A closed channel means that the session just ended; its next one is offered the disk.
                let _ = session.news.send(News::Offer(offer.clone()));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves whole values: every change below is one insertion or removal.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one caller at a time plan and change the set of disks; held across I/O, unlike the other lock.
    pub fn changing(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How targets are opened.
    #[must_use]
    pub const fn opener(&self) -> &Arc<dyn Files> {
        &self.opener
    }

    /// UUIDs of all targets that are open.
    #[must_use]
    pub fn known_uuids(&self) -> BTreeSet<DiskUuid> {
        self.lock().disks.values().filter_map(|disk| disk.uuid).collect()
    }

    /// What is written down of passes over whole disks.
    #[must_use]
    pub const fn receipts(&self) -> &Arc<Receipts> {
        &self.receipts
    }

    /// Registers a session that began; answers its name and where its news arrive.
    pub fn begin_session(
        &self,
        address: String,
        relay: Option<PeerId>,
    ) -> (SessionId, mpsc::UnboundedReceiver<News>) {
        let (news, receiver) = mpsc::unbounded_channel();
        let mut inner = self.lock();
        inner.next_session += 1;
        let id = SessionId(inner.next_session);
        inner.sessions.insert(id, LiveSession { agent: None, address, relay, news });
        (id, receiver)
    }

    /// The session's agent proved itself: its disks.
    pub fn session_ready(&self, session: SessionId, agent: PeerId) -> Vec<Offer> {
        let mut inner = self.lock();
        if let Some(live) = inner.sessions.get_mut(&session) {
            live.agent = Some(agent);
        }
        let name = agent.to_string();
        let own = inner.disks.iter().filter(|(_, known)| known.record.agent == name);
        let offer = |(disk, known): (&DiskId, &KnownDisk)| {
            offer_of(*disk, known).or_else(|| failing_back::released_offer(&inner, *disk, known))
        };
        own.filter_map(offer).collect()
    }

    /// A machine's policy; none as long as nobody set one.
    #[must_use]
    pub fn policy(&self, agent: PeerId) -> Option<Policy> {
        self.lock().policies.get(&agent).copied()
    }

    /// Changes a machine's policy: durable, then told to its live sessions. Blocks; the caller holds
    /// [`Self::changing`].
    ///
    /// # Errors
    /// When it cannot be recorded; the old one then stays in force.
    pub fn set_policy(
        &self,
        agent: PeerId,
        points_every_ms: u64,
        app_points_every_ms: u64,
    ) -> anyhow::Result<Policy> {
        let revision = self.policy(agent).map_or(0, |policy| policy.revision) + 1;
        let policy = Policy { revision, points_every_ms, target: PeerId::NONE, app_points_every_ms };
        self.catalogue.save_policy(agent, &policy)?;
        let mut inner = self.lock();
        inner.policies.insert(agent, policy);
        for session in inner.sessions.values().filter(|session| session.agent == Some(agent)) {
            // A closed channel means that the session just ended; its next one is told.
            let _ = session.news.send(News::Policy(policy));
        }
        Ok(policy)
    }

    /// The session is over.
    pub fn end_session(&self, session: SessionId) {
        self.lock().sessions.remove(&session);
    }

    /// An agent told its disks.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn take_inventory(
        &self,
        agent: PeerId,
        host_name: &str,
        disks: &[InventoryDisk],
    ) -> anyhow::Result<()> {
        let machine = Machine {
            agent: agent.to_string(),
            host_name: host_name.to_owned(),
            disks: disks.iter().map(SourceDisk::from_inventory).collect(),
        };
        let changed = self.lock().machines.insert(agent, machine.clone()).as_ref() != Some(&machine);
        if changed { self.catalogue.save_machine(&machine) } else { Ok(()) }
    }

    /// Where a disk's frames go, and its size.
    #[must_use]
    pub fn disk_inputs(&self, disk: DiskId) -> Option<(DiskInputs, u64)> {
        let inner = self.lock();
        let known = inner.disks.get(&disk)?;
        Some((known.worker.as_ref()?.inputs(), known.record.size_bytes / SECTOR_BYTES))
    }

    /// All machines.
    #[must_use]
    pub fn machines(&self) -> Vec<Machine> {
        self.lock().machines.values().cloned().collect()
    }

    /// The machine of a name or UUID.
    ///
    /// # Errors
    /// When there is none, or the name is not unique.
    pub fn machine(&self, name: &str) -> anyhow::Result<Machine> {
        let inner = self.lock();
        let found: Vec<&Machine> = inner
            .machines
            .values()
            .filter(|machine| machine.host_name == name || machine.agent == name)
            .collect();
        match found.as_slice() {
            [machine] => Ok((*machine).clone()),
            [] => Err(anyhow!(
                "no machine {name} has connected; `machines` lists those that have, `invite --role agent` makes a token for a new one"
            )),
            _ => {
                Err(anyhow!("{} machines are called {name}; use the UUID that `machines` shows", found.len()))
            }
        }
    }

    /// All disks.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskView> {
        let mut losses = self.retention.as_ref().map(|retention| retention.losses()).unwrap_or_default();
        let doubtful: Vec<DiskId> =
            self.doubts.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        for disk in doubtful {
            if let Some(doubt) = self.doubt(disk) {
                losses.entry(disk).or_insert(doubt);
            }
        }
        let inner = self.lock();
        let view = |(disk, known): (&DiskId, &KnownDisk)| DiskView {
            loss: losses.get(disk).cloned(),
            failback: inner.step_of(&known.record.disk),
            record: known.record.clone(),
            status: known.worker.as_ref().map(|worker| Arc::clone(worker.status())),
            problem: known.problem.clone(),
        };
        inner.disks.iter().map(view).collect()
    }

    /// All live sessions.
    #[must_use]
    pub fn sessions(&self) -> Vec<(SessionId, LiveSession)> {
        self.lock().sessions.iter().map(|(id, session)| (*id, session.clone())).collect()
    }

    /// Two of our own targets with one UUID: a template clone that came later keeps its place but is not written.
    fn refuse_duplicates(&self) {
        let mut seen = BTreeSet::new();
        let mut stopped = Vec::new();
        for (disk, known) in &mut self.lock().disks {
            let Some(uuid) = known.uuid.filter(|uuid| !seen.insert(*uuid)) else { continue };
            let problem = format!(
                "{} has ddb.uuid {uuid}, which another protected disk has too; give one of them a new UUID, then restart",
                known.record.path.display()
            );
            tracing::error!(%disk, "{problem}");
            known.problem = Some(problem);
            stopped.extend(known.worker.take());
        }
        stopped.into_iter().for_each(DiskWorker::stop);
    }

    /// The protected disk of a UUID, a target path, or `MACHINE:DISK`.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn protected(&self, name: &str) -> anyhow::Result<ProtectedDisk> {
        let inner = self.lock();
        let is_named = |record: &ProtectedDisk| {
            let machine = peer(&record.agent).and_then(|agent| inner.machines.get(&agent));
            let source = [record.source_name.as_str(), short_name(&record.source_name)];
            let pair = name.rsplit_once(':').is_some_and(|(owner, disk)| {
                source.contains(&disk)
                    && (owner == record.agent || machine.is_some_and(|machine| machine.host_name == owner))
            });
            record.disk == name || record.path == Path::new(name) || pair
        };
        let mut found = inner.disks.values().map(|known| &known.record).filter(|record| is_named(record));
        match (found.next(), found.next()) {
            (Some(record), None) => Ok(record.clone()),
            (None, _) => Err(anyhow!(
                "no protected disk is called {name}; write its UUID, its target's path or MACHINE:DISK as `status` shows them"
            )),
            _ => Err(anyhow!("several protected disks are called {name}; use the UUID (`status --json`)")),
        }
    }

    /// The protected disks of a machine, or the one disk that [`Self::protected`] answers.
    ///
    /// # Errors
    /// When there is none.
    pub fn protected_disks(&self, name: &str) -> anyhow::Result<Vec<ProtectedDisk>> {
        if let Ok(machine) = self.machine(name) {
            let inner = self.lock();
            let records = inner.disks.values().map(|known| &known.record);
            let own: Vec<ProtectedDisk> =
                records.filter(|record| record.agent == machine.agent).cloned().collect();
            if own.is_empty() {
                return Err(anyhow!("no disk of machine {name} is protected; `protect` begins it"));
            }
            return Ok(own);
        }
        Ok(vec![self.protected(name)?])
    }

    /// Stops replicating a disk: flushes and closes its target, which stays, and forgets the record. Blocks.
    ///
    /// # Errors
    /// When the record cannot be removed; the disk is stopped all the same.
    pub fn remove_disk(&self, disk: DiskId) -> anyhow::Result<()> {
        let known = self.lock().disks.remove(&disk);
        if let Some(worker) = known.and_then(|known| known.worker) {
            worker.retire();
        }
        if let Some(retention) = &self.retention {
            retention.forget(disk)?;
        }
        self.catalogue.remove_disk(disk)?;
        self.leave_failback(disk)
    }

    /// Whether an agent has the disk open.
    #[must_use]
    pub fn is_connected(&self, disk: DiskId) -> bool {
        let inner = self.lock();
        let worker = inner.disks.get(&disk).and_then(|known| known.worker.as_ref());
        worker.is_some_and(|worker| worker.status().snapshot().phase == TargetDiskPhase::Open)
    }

    /// What a disk is doing; `None` where it could not be opened.
    pub(crate) fn disk_status(&self, disk: DiskId) -> Option<Arc<DiskStatus>> {
        let inner = self.lock();
        Some(Arc::clone(inner.disks.get(&disk)?.worker.as_ref()?.status()))
    }

    /// The retention journal, if there is one.
    #[must_use]
    pub const fn retention(&self) -> Option<&Arc<Retention>> {
        self.retention.as_ref()
    }

    /// Flushes and closes every target. Blocks.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(retention) = &self.retention {
            retention.interrupt();
        }
        self.wait_for_long_work();
        // Whoever opens a disk now is done first.
        drop(self.changing());
        let disks = std::mem::take(&mut self.lock().disks);
        for worker in disks.into_values().filter_map(|known| known.worker) {
            worker.stop();
        }
        self.receipts.flush(); // what the disks reached so far is not forgotten
    }
}

/// Targets on this machine's file systems, with the best backend the host allows.
#[must_use]
pub fn fs_opener() -> Arc<dyn Files> {
    Arc::new(FsFiles::new(|path, writable| {
        let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
        io::open(path, &options)
    }))
}

/// The last part of a device's name: `sda` of `/dev/sda`.
#[must_use]
pub fn short_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn offer_of(disk: DiskId, known: &KnownDisk) -> Option<Offer> {
    let worker = known.worker.as_ref()?;
    Some(Offer {
        disk,
        source: unhex(&known.record.source)?,
        size_sectors: known.record.size_bytes / SECTOR_BYTES,
        generation: worker.status().snapshot().generation,
    })
}
