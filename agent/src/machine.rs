//! The agent's long-lived part: the protocol core, the disks, and the threads that serve them.
//!
//! ```text
//! core ──Work──▶ reader ──data──▶ workers ──records──▶ core ──frames──▶ lanes
//! ```
//! Invariants: one task owns the core and everything about its disks; the core outlives the session, so that what was
//! not durable goes on in the next one; what is wrong with one disk stops or pauses that disk only; queues hold at
//! most the passes' windows, payload is on each disk's budget. Made by `daemon`, driven by `session`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reprotect_engine::checksum::UnitHash;
use reprotect_engine::compress::{LevelController, Load};
use reprotect_engine::format::message::{ErrorCode, PassCause, PassMode, Policy, SourceId};
use reprotect_engine::host::output;
use reprotect_engine::host::values::LevelText;
use reprotect_engine::limits::{CHUNKS_OPEN_MAX, UNWRITTEN_BYTES_MAX};
use reprotect_engine::net::mono_clock;
use reprotect_engine::net::shaper::Shaper;
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::pass::{PassAction, Sink};
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};
use tokio::sync::{mpsc, watch};

use crate::api::StatusInfo;
use crate::budget::Budget;
use crate::capture::CaptureSettings;
use crate::capturing::CaptureNews;
use crate::disks::SourceKind;
use crate::following::Following;
use crate::health::Health;
use crate::marking::{MarkOrder, MarkOrders, MarkRun};
use crate::opening::{Missing, Opened, Opening, Purpose, share_bytes};
use crate::plan::{Plan, Plans};
use crate::policy::PolicyKeeper;
use crate::protected::{Activity, Protected};
use crate::quiescing::{AppSchedule, FreezeNews, Freezer};
use crate::reader::{FromDisk, ReadJob};
use crate::recent::Recent;
use crate::sources::{Found, Sources, inventory};
use crate::throttle::Throttle;
use crate::unread::Unread;
use crate::workers::{Done, Job, JobKey, Workers};

/// How often the compression level is looked at.
const LEVEL_TICK: Duration = Duration::from_millis(250);
/// Level an adaptive agent begins with: the fastest that pays on most links.
const LEVEL_START: i32 = -1;
/// Pause after a disk was opened before its first scan round.
const FIRST_SCAN: Duration = Duration::from_millis(200);
/// What an operator is told of a stream that was given up.
const DAMAGED_TEXT: &str = "the target found the same changes damaged again and again; they are dropped and the whole disk is compared; if it happens again, test the memory of this machine, the process server and the master target";
/// Computing threads at most: more than the link can take is waste.
const WORKERS_MAX: usize = 4;

/// The agent's long-lived part.
pub struct Machine {
    pub(crate) core: Agent,
    host_name: String,
    pub(crate) plans: Plans,
    plan: Arc<Plan>,
    pub(crate) sources: Sources,
    throttle: Arc<Throttle>,
    pub(crate) shaper: Arc<Shaper>,
    pub(crate) workers: Workers,
    pub(crate) inputs: Inputs,
    deliver: mpsc::UnboundedSender<(DiskId, FromDisk)>,
    openings: mpsc::UnboundedSender<Opened>,
    pub(crate) disks: BTreeMap<DiskId, Protected>,
    /// The point of the machine that is being made.
    pub(crate) marking: Option<MarkRun>,
    /// Points that are made when that one is done.
    pub(crate) marks_waiting: VecDeque<MarkOrder>,
    /// Where the threads that freeze and thaw tell.
    pub(crate) freezer: Freezer,
    /// When applications are brought to rest for a point.
    pub(crate) app_schedule: AppSchedule,
    /// What the last hook that failed said, until one succeeds.
    pub(crate) hook_problem: Option<String>,
    pub(crate) health: Health,
    /// A post_thaw hook runs.
    pub(crate) releasing: bool,
    pub(crate) following: Following,
    pub(crate) policy: PolicyKeeper,
    pub(crate) missing: BTreeMap<DiskId, Missing>,
    /// Disks that are being opened.
    opening: BTreeMap<DiskId, Purpose>,
    controller: Option<LevelController>,
    busy_before: (Instant, u64),
    status: watch::Sender<StatusInfo>,
}

/// What comes from the machine's own threads.
pub(crate) struct Inputs {
    pub(crate) done: mpsc::UnboundedReceiver<Done>,
    pub(crate) reads: mpsc::UnboundedReceiver<(DiskId, FromDisk)>,
    pub(crate) opened: mpsc::UnboundedReceiver<Opened>,
    pub(crate) orders: MarkOrders,
    pub(crate) freezes: mpsc::UnboundedReceiver<([u8; 16], FreezeNews)>,
    pub(crate) capture: mpsc::UnboundedReceiver<CaptureNews>,
}

impl Machine {
    /// A machine that works by `plans`; `instance` tells its capture from other agents'.
    ///
    /// # Errors
    /// When threads or compression contexts cannot be had.
    pub(crate) fn new(
        core: Agent,
        instance: &str,
        host_name: &str,
        mut plans: Plans,
        orders: MarkOrders,
        status: watch::Sender<StatusInfo>,
    ) -> anyhow::Result<Self> {
        let plan = Arc::clone(&plans.borrow_and_update());
        let (controller, level) = match plan.settings.compress_level {
            LevelText::Fixed(level) => (None, level),
            LevelText::Adaptive => {
                let controller = LevelController::new(LEVEL_START);
                let level = controller.level();
                (Some(controller), level)
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(WORKERS_MAX);
        let (done_in, done) = mpsc::unbounded_channel();
        let (deliver, reads) = mpsc::unbounded_channel();
        let (openings, opened) = mpsc::unbounded_channel();
        let (freezer, freezes) = mpsc::unbounded_channel();
        let (captured, capture) = mpsc::unbounded_channel();
        let state_dir = plan.settings.places.state_dir.clone();
        let capture_settings = CaptureSettings::new(instance, state_dir);
        let following = Following::new(plan.settings.capture_mode, capture_settings, captured);
        let policy = PolicyKeeper::load(&plan.settings.places.state_dir);
        let mut machine = Self {
            core,
            host_name: host_name.to_owned(),
            plans,
            throttle: Arc::new(Throttle::new(plan.settings.read_rate.bytes_per_second())),
            shaper: Arc::new(Shaper::new(plan.settings.send_rate.now())),
            plan: Arc::clone(&plan),
            sources: Sources::new(),
            workers: Workers::start(threads, level, &done_in)?,
            inputs: Inputs { done, reads, opened, orders, freezes, capture },
            deliver,
            openings,
            disks: BTreeMap::new(),
            marking: None,
            marks_waiting: VecDeque::new(),
            freezer,
            app_schedule: AppSchedule::new(Duration::ZERO),
            hook_problem: None,
            health: Health::default(),
            releasing: false,
            following,
            policy,
            missing: BTreeMap::new(),
            opening: BTreeMap::new(),
            controller,
            busy_before: (Instant::now(), 0),
            status,
        };
        if let Some(pause) = machine.app_pause() {
            machine.app_schedule = AppSchedule::new(pause);
        }
        machine.set_sources(plan.sources.clone());
        machine.status.send_modify(|status| status.warnings.clone_from(&plan.warnings));
        machine.publish(false);
        Ok(machine)
    }

    /// The plan in force.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where the status is kept.
    pub(crate) const fn status(&self) -> &watch::Sender<StatusInfo> {
        &self.status
    }

    pub(crate) fn set_sources(&mut self, sources: Sources) {
        self.sources = sources;
        self.core.set_inventory(&self.host_name, inventory(&self.sources));
    }

    /// Works by the newest plan from now on. Progress stays; what was stopped is to be offered again, for which the
    /// session must begin anew: answers whether.
    pub(crate) fn replan(&mut self) -> bool {
        let plan = Arc::clone(&self.plans.borrow_and_update());
        self.throttle.set_rate(plan.settings.read_rate.bytes_per_second());
        self.shaper.set_rate(plan.settings.send_rate.now());
        self.set_sources(plan.sources.clone());
        self.status.send_modify(|status| status.warnings.clone_from(&plan.warnings));
        self.plan = plan;
        let pauses = self.round_pauses();
        if let Some(pause) = self.app_pause() {
            self.app_schedule.hurry(pause);
        }
        let now = Instant::now();
        let mut stopped = false;
        for (disk, state) in &mut self.disks {
            state.faults.hurry(now);
            state.unread.hurry(now);
            if state.activity == Activity::Stopped {
                stopped = true;
            } else if !self.sources.contains_key(&state.source) && !state.faults.is_paused() {
                tracing::warn!(%disk, path = state.path, "not among the sources any more: stopped");
                state.stop("`disks.exclude` names this disk, `disks.include` does not name it any more, or it is not attached; correct that, then reload the agent".to_owned());
            }
            state.hurry(now, pauses.get(disk).copied());
        }
        for missing in self.missing.values_mut().filter(|missing| missing.again_at.is_some()) {
            missing.again_at = Some(now);
        }
        stopped
    }

    /// No session can be had at the moment, and why.
    pub fn unreachable(&self, reason: &str) {
        self.status.send_modify(|status| status.problem = Some(reason.to_owned()));
    }

    /// The session is over: everything that belonged to it only is forgotten.
    pub(crate) fn end_session(&mut self) {
        self.core.handle_disconnected();
        self.following.end_session();
        for state in self.disks.values_mut() {
            state.end_walk();
            if state.activity != Activity::Stopped {
                state.activity = Activity::Disconnected;
            }
        }
        self.advance_run();
    }

    /// Hands over what the core wants done.
    pub(crate) fn handle_event(&mut self, event: AgentEvent, compress: bool) {
        match event {
            AgentEvent::Ready => tracing::info!("session ready"),
            AgentEvent::Offered { disk, source, size_sectors } => {
                self.handle_offer(disk, source, size_sectors)
            }
            AgentEvent::Opened { disk, mode } => {
                tracing::info!(%disk, ?mode, "disk opened at the target");
                self.tell_unread(disk);
                self.recall_age(disk, mode);
                self.handle_opened_followed(disk, mode);
                let resumed = self.core.pass_progress(disk).is_some_and(|(settled, _)| settled > 0);
                self.with(disk, |state| {
                    if state.activity == Activity::Stopped {
                        return; // stopped while it was being opened
                    }
                    state.problem = None;
                    let began = state.walk_began;
                    match mode {
                        PassMode::Copy => state.begin_walk(Activity::Copying),
                        PassMode::Compare => state.begin_walk(Activity::Comparing),
                        PassMode::Done => {
                            state.begin_walk(Activity::Synced);
                            state.next_scan = Some(Instant::now() + FIRST_SCAN);
                        }
                    }
                    if resumed && mode != PassMode::Done {
                        state.resume_walk(began);
                    }
                });
                self.grow(disk); // where it grew while it was being opened
            }
            AgentEvent::Work { disk, epoch, sink, as_of, action } => {
                self.handle_work(disk, epoch, sink, as_of, action, compress);
            }
            AgentEvent::Synced { disk } => self.handle_synced(disk),
            AgentEvent::ScanDone { disk } => {
                self.store_unread(disk, true);
                let pause = self.round_pause(disk);
                let durable = self.core.position(disk).unwrap_or_default().0;
                self.with(disk, |state| {
                    state.scan_rounds += 1;
                    state.finish_walk(durable, Instant::now() + pause);
                });
                self.following.handle_round_durable(&self.core, disk, self.holding(disk));
                self.handle_round_done(disk);
            }
            AgentEvent::ScanRead { disk } => self.handle_scan_read(disk),
            AgentEvent::Marked { disk, label } => self.handle_marked(disk, &label),
            AgentEvent::MarkLost { disk, label } => self.handle_mark_lost(disk, &label),
            AgentEvent::Policy(policy) => self.take_policy(&policy),
            AgentEvent::MarkRequested(request) => self.handle_mark_request(&request),
            AgentEvent::Resync { disk, cause } => self.handle_resync(disk, cause),
            AgentEvent::TargetLost { disk, from, to } => {
                tracing::error!(%disk, %from, %to, "the target lost what it had called durable and gets it again: look at its retention drive");
                self.with(disk, |state| {
                    state.lost_at_target += to.0 + 1 - from.0;
                    state.freshness.lost(from);
                });
            }
            AgentEvent::Stopped { disk, code, text } => {
                let text = explain_stop(code, text);
                if code == ErrorCode::UnknownDisk {
                    tracing::warn!(%disk, "not protected any more: {text}");
                    return self.forget(disk);
                }
                tracing::error!(%disk, ?code, "stopped: {text}");
                self.with(disk, |state| state.stop(text));
            }
            AgentEvent::Warned { disk, code, text } => {
                tracing::warn!(%disk, ?code, "{text}");
                self.with(disk, |state| state.problem = Some(text));
            }
        }
    }

    fn handle_synced(&mut self, disk: DiskId) {
        let missing = self.disks.get(&disk).and_then(|state| state.unread.describe());
        match missing {
            None => tracing::info!(%disk, "the whole disk is on the target"),
            Some(missing) => tracing::error!(%disk, "the disk is on the target, {missing}"),
        }
        self.store_unread(disk, true);
        let durable = self.core.position(disk).unwrap_or_default().0;
        self.with(disk, |state| {
            if state.activity != Activity::Stopped {
                state.problem = None;
            }
            state.finish_walk(durable, Instant::now() + FIRST_SCAN);
        });
        self.following.handle_synced(&self.core, disk, self.holding(disk));
    }

    fn handle_resync(&mut self, disk: DiskId, cause: PassCause) {
        if let Some(state) = self.disks.get(&disk) {
            self.core.set_first(disk, state.recent.newest_first().collect());
        }
        self.following.abandon_round(disk);
        if self.is_streaming(std::iter::once(disk)) {
            self.end_streaming("the whole disk is compared");
        }
        let problem = (cause == PassCause::DamagedStream).then(|| DAMAGED_TEXT.to_owned());
        match &problem {
            Some(text) => tracing::error!(%disk, ?cause, "{text}"),
            None => tracing::warn!(%disk, ?cause, "a compare of the whole disk was asked for"),
        }
        self.with(disk, |state| {
            if is_other_state(cause) {
                state.freshness.set_back(Timestamp::ZERO);
            }
            state.begin_walk(Activity::Comparing);
            if let Some(problem) = problem.filter(|_| state.activity != Activity::Stopped) {
                state.problem = Some(problem);
            }
        });
        // A point that waits for this disk's round is not made, also where the compare is over in no time.
        self.advance_run();
    }

    /// Pause between two scan rounds: the policy's, else the configuration's.
    pub(crate) fn scan_pause(&self) -> Duration {
        self.policy.points_every().unwrap_or(self.plan.settings.scan_interval)
    }

    /// Pause between two rounds of a disk, which cost less where it is followed.
    pub(crate) fn round_pause(&self, disk: DiskId) -> Duration {
        if !self.following.is_followed(disk) {
            return self.scan_pause();
        }
        self.policy.points_every().unwrap_or(self.plan.settings.capture_interval)
    }

    /// The pauses of all disks.
    pub(crate) fn round_pauses(&self) -> BTreeMap<DiskId, Duration> {
        self.disks.keys().map(|disk| (*disk, self.round_pause(*disk))).collect()
    }

    /// What a source is, if it is known.
    pub(crate) fn source_kind(&self, source: SourceId) -> Option<SourceKind> {
        self.sources.get(&source).map(|known| known.source.kind)
    }

    fn take_policy(&mut self, policy: &Policy) {
        if !self.policy.take(policy) {
            return;
        }
        let pause = self.scan_pause();
        tracing::info!(revision = policy.revision, ?pause, "the master target's policy holds now");
        if let Some(pause) = self.app_pause() {
            self.app_schedule.hurry(pause);
        }
        let (now, pauses) = (Instant::now(), self.round_pauses());
        for (disk, state) in &mut self.disks {
            state.hurry(now, pauses.get(disk).copied());
        }
    }

    fn with(&mut self, disk: DiskId, change: impl FnOnce(&mut Protected)) {
        if let Some(state) = self.disks.get_mut(&disk) {
            change(state);
        }
    }

    /// Gives back all that a disk holds: its reader, its memory, its place.
    fn forget(&mut self, disk: DiskId) {
        self.core.forget(disk);
        self.following.forget(disk);
        if let Some(state) = self.disks.remove(&disk) {
            state.unread.remove();
            state.recent.remove();
        }
        self.missing.remove(&disk);
    }

    fn handle_offer(&mut self, disk: DiskId, source: SourceId, size_sectors: u64) {
        // As in the core: what was protected of this source before is not any more.
        let gone =
            |(id, known): (&DiskId, &Protected)| (*id != disk && known.source == source).then_some(*id);
        for id in self.disks.iter().filter_map(gone).collect::<Vec<_>>() {
            self.following.forget(id);
            if let Some(state) = self.disks.remove(&id) {
                state.unread.remove();
                state.recent.remove();
            }
        }
        self.missing.retain(|id, known| *id == disk || known.source != source);
        if let Some(state) = self.disks.get(&disk)
            && state.is_readable()
            && state.source == source
        {
            return self.follow_and_open(disk, size_sectors);
        }
        let known = self.sources.contains_key(&source);
        self.open(disk, source, Purpose::Offer { size_sectors }, !known);
    }

    /// Asks the target for a disk that is being read here, unless the two do not fit.
    pub(crate) fn open_at_target(&mut self, disk: DiskId, target_sectors: u64) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if state.size_sectors > target_sectors {
            state.grows_to = Some(state.size_sectors);
            return self.grow(disk);
        }
        if state.size_sectors == target_sectors {
            state.activity = Activity::Offered;
            self.core.set_first(disk, state.recent.newest_first().collect());
            return self.core.open(disk, target_sectors);
        }
        let text = format!(
            "the disk has {} ({} sectors) and its target {} ({target_sectors} sectors); a target is never made smaller: give the disk its size again, then reload the agent; or protect it anew, with a new target",
            output::bytes(state.size_bytes()),
            state.size_sectors,
            output::bytes(target_sectors * SECTOR_BYTES),
        );
        tracing::error!(%disk, path = state.path, "stopped: {text}");
        state.stop(text);
    }

    /// Opens a disk off this task; `search` looks for its source again.
    fn open(&mut self, disk: DiskId, source: SourceId, purpose: Purpose, search: bool) {
        if self.opening.insert(disk, purpose).is_some() {
            return; // that attempt's answer serves
        }
        let budget = match self.disks.get(&disk) {
            Some(state) => Ok(Arc::clone(&state.budget)),
            None => self.new_budget(),
        };
        let budget = match budget {
            Ok(budget) => budget,
            Err(error) => {
                self.opening.remove(&disk);
                if let Purpose::Offer { size_sectors } = purpose {
                    self.missing.insert(disk, Missing::new(source, size_sectors, error.to_string()));
                }
                return;
            }
        };
        let opening = Opening {
            disk,
            source,
            known: self.sources.get(&source).filter(|_| !search).cloned(),
            disks: self.plan.settings.disks.clone(),
            budget,
            throttle: Arc::clone(&self.throttle),
            reads: self.deliver.clone(),
        };
        opening.spawn(self.openings.clone());
    }

    fn new_budget(&self) -> Result<Arc<Budget>, reprotect_engine::io::buffer::ArenaError> {
        let selected = self.sources.values().filter(|source| source.selected).count();
        let disks = selected.max(self.disks.len() + 1);
        Budget::new(share_bytes(self.plan.settings.memory_bytes, disks), self.workers.threads())
    }

    /// A disk was opened, or not.
    pub(crate) fn handle_opened(&mut self, opened: Opened) {
        let Opened { disk, source, result, budget, found } = opened;
        let Some(purpose) = self.opening.remove(&disk) else { return };
        if let Some(Found { sources, .. }) = found
            && inventory(&sources) != inventory(&self.sources)
        {
            self.set_sources(sources);
        }
        match (result, purpose) {
            (Ok((reader, path)), Purpose::Offer { size_sectors }) => {
                self.missing.remove(&disk);
                self.note_size(source, reader.size_sectors());
                match self.disks.get_mut(&disk).filter(|state| state.source == source) {
                    Some(state) => state.replace_reader(path, reader),
                    None => {
                        let folder = &self.plan.settings.places.state_dir;
                        let unread = Unread::load(folder, disk, Instant::now());
                        let mut state = Protected::new(source, path, budget, reader, unread);
                        state.recent = Recent::load(folder, disk);
                        self.disks.insert(disk, state);
                    }
                }
                self.follow_and_open(disk, size_sectors);
            }
            (Ok((reader, path)), Purpose::Probe) => {
                let Some(state) = self.disks.get_mut(&disk) else { return };
                if reader.size_sectors() != state.size_sectors {
                    let bytes = reader.size_sectors() * SECTOR_BYTES;
                    return self.handle_resized(disk, bytes);
                }
                state.replace_reader(path, reader);
                if let Some(job) = state.faults.probe() {
                    state.read(job);
                }
                self.follow_again(disk);
            }
            (Err(problem), Purpose::Offer { size_sectors }) => {
                tracing::error!(%disk, "{problem}");
                self.missing.insert(disk, Missing::new(source, size_sectors, problem));
            }
            (Err(problem), Purpose::Probe) => {
                tracing::warn!(%disk, "still not readable: {problem}");
                self.with(disk, |state| {
                    state.faults.probe_failed(Instant::now());
                    state.problem = Some(paused_text(&problem));
                });
            }
        }
    }

    fn handle_work(
        &mut self,
        disk: DiskId,
        epoch: u64,
        sink: Sink,
        as_of: Sequence,
        action: PassAction,
        compress: bool,
    ) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if state.activity == Activity::Stopped {
            return; // until it is offered again
        }
        match action {
            PassAction::Read { chunk, hash, pieces } => {
                let job = ReadJob { chunk, epoch, hash, pieces, in_parts: false };
                self.want_chunk(disk, job, sink, as_of);
            }
            PassAction::Compute { chunk, question } => {
                if let Some(kept) = state.kept.get(&chunk.start) {
                    let key = JobKey { disk, epoch, chunk };
                    self.workers.submit(Job::Compute { key, data: kept.data.clone(), question });
                }
            }
            PassAction::Send { chunk, pieces } => {
                let Some(kept) = state.kept.remove(&chunk.start).filter(|kept| kept.epoch == epoch) else {
                    return;
                };
                let key = JobKey { disk, epoch, chunk };
                let (data, as_of, time) = (kept.data, kept.as_of, kept.time);
                let budget = Arc::clone(&state.budget);
                self.workers.submit(Job::Cut { key, data, pieces, sink, as_of, time, compress, budget });
            }
            PassAction::Ask { .. } => {} // the core asks by itself
        }
    }

    pub(crate) fn answer_read(
        &mut self,
        disk: DiskId,
        epoch: u64,
        chunk: SectorRange,
        hashes: Option<Vec<UnitHash>>,
    ) {
        if let Err(error) = self.core.handle_read(disk, epoch, chunk, hashes) {
            tracing::error!(%disk, %error, "a defect in hashing; the chunk is tried again in the next session");
        }
    }

    /// A worker finished something.
    pub(crate) fn handle_done(&mut self, done: Done) {
        match done {
            Done::Hashed(key, hashes) => self.answer_read(key.disk, key.epoch, key.chunk, Some(hashes)),
            Done::Computed(key, computed) => {
                if let Err(error) = self.core.handle_computed(key.disk, key.epoch, key.chunk, computed) {
                    tracing::error!(disk = %key.disk, %error, "a defect in hashing");
                }
            }
            Done::Cut { key, records, as_of, time } => {
                if self.core.submit_chunk(key.disk, key.epoch, key.chunk, as_of, time, records) {
                    self.handle_chunk_sent(key.disk, key.epoch, key.chunk);
                }
            }
        }
    }

    /// What is due by the clock: scan rounds, reads to be tried again, disks to be looked for.
    pub(crate) fn handle_tick(&mut self) {
        let now = Instant::now();
        let mut wanted = Vec::new();
        self.advance_run();
        self.begin_timer_run(now);
        for (disk, state) in &mut self.disks {
            state.freshness.durable(self.core.position(*disk).unwrap_or_default().0);
        }
        let held: Vec<DiskId> = self.disks.keys().copied().filter(|disk| self.is_marking(*disk)).collect();
        // While all can be read together they are; one that cannot does not hold up the others.
        let together = self.reads_together();
        let is_due = |(disk, state): (&DiskId, &Protected)| {
            let due = !together && state.next_scan.is_some_and(|at| now >= at) && !held.contains(disk);
            due.then_some(*disk)
        };
        for disk in self.disks.iter().filter_map(is_due).collect::<Vec<_>>() {
            self.begin_round(disk, false);
        }
        let mut retried = false;
        for (disk, state) in &mut self.disks {
            for job in state.faults.due(now) {
                state.read(job);
            }
            retried |= state.activity == Activity::Synced && state.unread.is_due(now);
            if state.faults.wants_probe(now) {
                wanted.push((*disk, state.source, Purpose::Probe));
            }
        }
        if retried && self.following.streams_any() {
            // A stream reads nothing: a round does.
            self.end_streaming("what could not be read is tried again");
        }
        for (disk, missing) in &mut self.missing {
            if missing.again_at.take_if(|at| *at <= now).is_some() {
                let size_sectors = missing.size_sectors;
                wanted.push((*disk, missing.source, Purpose::Offer { size_sectors }));
            }
        }
        for (disk, source, purpose) in wanted {
            self.open(disk, source, purpose, true);
        }
    }

    /// Lets the compression level follow the load; `unwritten_bytes` is what waits for the transport.
    pub(crate) fn adapt_level(&mut self, compress: bool, unwritten_bytes: u64) {
        let (before, busy_before) = self.busy_before;
        if before.elapsed() < LEVEL_TICK {
            return;
        }
        let load = self.workers.load();
        let busy = load.busy_nanos.load(Ordering::Relaxed);
        let span = before.elapsed().as_nanos().max(1) as u64 * self.workers.threads() as u64;
        self.busy_before = (Instant::now(), busy);
        let Some(controller) = self.controller.as_mut().filter(|_| compress) else { return };
        let waiting = load.waiting.load(Ordering::Relaxed) as u64;
        let level = controller.observe(
            mono_clock(),
            Load {
                busy_permille: permille((busy - busy_before) * 1000 / span),
                input_permille: permille(waiting * 1000 / CHUNKS_OPEN_MAX as u64),
                output_permille: permille(unwritten_bytes * 1000 / UNWRITTEN_BYTES_MAX),
            },
        );
        load.level.store(level, Ordering::Relaxed);
    }
}

/// Whether the target may hold another state than it said to hold.
const fn is_other_state(cause: PassCause) -> bool {
    matches!(
        cause,
        PassCause::TargetLostDurable
            | PassCause::ChainMismatch
            | PassCause::OtherLineage
            | PassCause::OtherSession
    )
}

fn permille(value: u64) -> u16 {
    u16::try_from(value.min(1000)).unwrap_or(1000)
}

pub(crate) fn paused_text(reason: &str) -> String {
    format!(
        "{reason}; this disk is paused and tried again every 15 s; look at the kernel's log (dmesg) and at the device"
    )
}

/// What the target's refusal of a disk means here.
fn explain_stop(code: ErrorCode, text: String) -> String {
    if code == ErrorCode::Grant && text.contains("another session") {
        return format!(
            "fenced: {text}: another agent with this machine's identity took this disk over (a clone of this machine, or a second state directory with the same identity.pem); stop that one, or delete identity.pem there and enrol it as itself, then reload this agent"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn being_fenced_names_the_cause_and_the_remedy() {
        let text = explain_stop(ErrorCode::Grant, "generation 7 was granted to another session".into());
        assert!(text.contains("generation 7") && text.contains("stop that one"), "{text}");
        assert_eq!(explain_stop(ErrorCode::Size, "too small".into()), "too small");
    }
}
