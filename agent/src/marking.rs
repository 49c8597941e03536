//! A recovery point of the whole machine by scan rounds: by the policy's timer, by `mark` with or without frozen file
//! systems, and because the master target wants one.
//!
//! ```text
//! First (with --freeze: a round of every disk, so that the frozen one finds little) → Freezing →
//! Reading (a round of every disk) → Thawing, or Closing (a window, where all are followed)
//! → Waiting (the marks, one point, are to become durable)
//! ```
//! Invariants: one run at a time, what somebody wants waits for the timer's; all disks of the machine are in it, and all their marks name one random point; a mark
//! is called frozen only if the guard of the freeze says that it held until everything was read; without a freeze it is
//! fuzzy; a round that was begun for a run that failed ends with a fuzzy mark of its own; whatever fails, everything is
//! thawed. Units: milliseconds. Driven by `machine`, asked by `daemon`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::{MarkCause, MarkClass, MarkLabel};
use reprotect_engine::format::message::MarkRequest as MarkWanted;
use reprotect_engine::format::wire::Text;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, Timestamp};
use tokio::sync::{mpsc, oneshot};

use crate::api::{MarkAnswer, MarkRequest, MarkedDisk};
use crate::disks::{SystemRoot, enumerate};
use crate::freeze::Freeze;
use crate::machine::Machine;
use crate::protected::Activity;

/// Points that wait for the one that is being made.
const WAITING_MAX: usize = 8;
/// How long marks may wait to become durable before a run gives up on them; they are sent all the same.
const WAITING_LIMIT: Duration = Duration::from_secs(600);
/// After the source was stopped nothing is read for a while: the target takes the disks away.
const STOPPED_PAUSE: Duration = Duration::from_secs(60);

/// What is wanted, and by whom.
#[derive(Debug)]
pub(crate) struct MarkOrder {
    pub(crate) request: MarkRequest,
    pub(crate) asker: Asker,
}

/// Who wants a point.
#[derive(Debug)]
pub(crate) enum Asker {
    /// Somebody at the admin socket, and where the answer goes.
    Command(oneshot::Sender<Result<MarkAnswer, String>>),
    /// The master target: the point's identity, and why.
    Target([u8; 16], MarkCause),
    /// The policy's timer.
    Timer,
}

impl Asker {
    const fn cause(&self) -> MarkCause {
        match self {
            Self::Command(_) => MarkCause::Command,
            Self::Target(_, cause) => *cause,
            Self::Timer => MarkCause::Timer,
        }
    }
}

/// News from the threads that freeze and thaw.
#[derive(Debug)]
pub(crate) enum FreezeNews {
    /// Everything is frozen, or nothing is, and why.
    Begun(Result<Freeze, String>),
    /// Everything is thawed; whether the freeze held until then.
    Ended(bool),
}

#[derive(Debug)]
enum Phase {
    /// Rounds that are to end before the freeze; begun ones are in the set.
    First { begun: BTreeSet<DiskId>, done: BTreeSet<DiskId> },
    /// A thread freezes.
    Freezing,
    /// Rounds whose end is the point.
    Reading { begun: BTreeSet<DiskId>, read: BTreeSet<DiskId> },
    /// A thread thaws.
    Thawing,
    /// The closing window is open.
    Closing,
    /// Marks are placed.
    Waiting { durable: BTreeMap<DiskId, Timestamp> },
}

/// A run.
#[derive(Debug)]
pub(crate) struct MarkRun {
    order: MarkOrder,
    point: [u8; 16],
    disks: BTreeSet<DiskId>,
    phase: Phase,
    freeze: Option<Freeze>,
    /// When the freeze is over at the latest.
    deadline: Option<Instant>,
    frozen: Vec<PathBuf>,
    /// What its marks promise, once they are placed.
    class: MarkClass,
}

impl Machine {
    /// The master target wants a point; asked twice, it gets one.
    pub(crate) fn handle_mark_request(&mut self, wanted: &MarkWanted) {
        let is_same =
            |order: &MarkOrder| matches!(order.asker, Asker::Target(point, _) if point == wanted.point);
        let running = self.marking.as_ref().is_some_and(|run| is_same(&run.order));
        if running || self.marks_waiting.iter().any(is_same) {
            return;
        }
        tracing::info!(cause = ?wanted.cause, "the master target wants a point of this machine");
        let request = MarkRequest {
            name: String::new(),
            freeze: wanted.freeze,
            freeze_limit_ms: wanted.freeze_limit_ms.clamp(1000, 600_000),
        };
        self.handle_mark_order(MarkOrder { request, asker: Asker::Target(wanted.point, wanted.cause) });
    }

    /// Whether all disks can be read together, for one point: none is being copied, away or unreadable.
    pub(crate) fn reads_together(&self) -> bool {
        self.disks.values().all(|state| {
            matches!(state.activity, Activity::Synced | Activity::Scanning) && !state.faults.is_paused()
        })
    }

    /// The timer's point, when every disk's pause is over.
    pub(crate) fn begin_timer_run(&mut self, now: Instant) {
        let is_due = |state: &crate::protected::Protected| {
            state.activity == Activity::Synced && state.next_scan.is_some_and(|at| now >= at)
        };
        let due = !self.disks.is_empty() && self.disks.values().all(is_due);
        if due && self.marking.is_none() && self.core.is_ready() && self.reads_together() {
            let request = MarkRequest { name: String::new(), freeze: false, freeze_limit_ms: 0 };
            self.handle_mark_order(MarkOrder { request, asker: Asker::Timer });
        }
    }

    /// Begins a run, lets it wait for the timer's, or says why not.
    pub(crate) fn handle_mark_order(&mut self, order: MarkOrder) {
        let timers = self.marking.as_ref().is_some_and(|run| matches!(run.order.asker, Asker::Timer));
        let waits = timers || (self.marking.is_some() && matches!(order.asker, Asker::Target(..)));
        let waits = waits && self.core.is_ready();
        if waits && self.marks_waiting.len() < WAITING_MAX {
            return self.marks_waiting.push_back(order);
        }
        match self.new_run(&order) {
            Ok((point, disks)) => {
                let (begun, done) = (BTreeSet::new(), BTreeSet::new());
                let streaming = self.is_streaming(disks.iter().copied());
                let phase = if order.request.freeze {
                    self.pause_stream();
                    Phase::First { begun, done }
                } else if streaming {
                    // Whatever moment is taken, everything up to it is in the stream.
                    self.order_window(point, disks.iter().copied().collect());
                    Phase::Closing
                } else {
                    // Not all of them are streamed: rounds of them all, then.
                    self.pause_stream();
                    Phase::Reading { begun, read: done }
                };
                let (freeze, deadline, frozen) = (None, None, Vec::new());
                let class = MarkClass::Fuzzy;
                self.marking = Some(MarkRun { order, point, disks, phase, freeze, deadline, frozen, class });
                self.advance_run();
            }
            Err(refusal) => self.refuse(order.asker, refusal),
        }
    }

    fn refuse(&mut self, asker: Asker, reason: String) {
        match asker {
            // Whoever asked may have given up.
            Asker::Command(answer) => drop(answer.send(Err(reason))),
            Asker::Target(point, _) => self.core.refuse_mark(point, &reason),
            Asker::Timer => {}
        }
    }

    /// The run is over: what waited for it begins.
    fn next_run(&mut self) {
        while self.marking.is_none()
            && let Some(order) = self.marks_waiting.pop_front()
        {
            self.handle_mark_order(order);
        }
    }

    fn new_run(&self, order: &MarkOrder) -> Result<([u8; 16], BTreeSet<DiskId>), String> {
        let request = &order.request;
        if !self.core.is_ready() {
            return Err("there is no session with the master target; see `reprotect-agent status`".to_owned());
        }
        if self.marking.is_some() {
            return Err("another point is being made; wait until it is durable".to_owned());
        }
        if request.name.len() > MarkRequest::NAME_BYTES_MAX {
            return Err(format!("the name is longer than {} bytes; shorten it", MarkRequest::NAME_BYTES_MAX));
        }
        for (disk, state) in &self.disks {
            if !matches!(state.activity, Activity::Synced | Activity::Scanning) || state.faults.is_paused() {
                return Err(format!(
                    "{} (disk {disk}) is {}; a point needs every disk of the machine synced, see `reprotect-agent status`",
                    state.path,
                    state.state()
                ));
            }
        }
        if self.disks.is_empty() {
            return Err(
                "no disk is protected; run `reprotect-master-target protect` for this machine".to_owned()
            );
        }
        let disks = self.disks.keys().copied().collect();
        if let Asker::Target(point, _) = order.asker {
            return Ok((point, disks));
        }
        let mut point = [0; 16];
        rustix::rand::getrandom(&mut point, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| format!("the system has no randomness: {error}"))?;
        Ok((point, disks))
    }

    /// Whether a disk's rounds are the run's business, so that none begins by the clock.
    pub(crate) fn is_marking(&self, disk: DiskId) -> bool {
        self.marking.as_ref().is_some_and(|run| run.disks.contains(&disk))
    }

    /// Does what can be done now; called whenever something happened, and by the clock.
    pub(crate) fn advance_run(&mut self) {
        let Some(run) = self.marking.as_mut() else { return };
        let waiting = matches!(run.phase, Phase::Waiting { .. });
        let gone = |disk: &DiskId| {
            let state = self.disks.get(disk);
            // A session may go and come while marks wait: they are sent again.
            state.is_none_or(|state| {
                state.activity == Activity::Stopped
                    || (!waiting && state.faults.is_paused())
                    || (!waiting && !matches!(state.activity, Activity::Synced | Activity::Scanning))
            })
        };
        if let Some(disk) = run.disks.iter().copied().find(gone) {
            let state = self.disks.get(&disk).map_or("not protected any more", |state| state.state());
            return self.fail_run(&format!("disk {disk} is {state} meanwhile; no point was made; try again"));
        }
        if !waiting && run.deadline.is_some_and(|at| Instant::now() >= at) {
            return self.fail_run(LATE_TEXT);
        }
        // A disk that went away for good must not keep the others from their points.
        if waiting && self.core.is_ready() && run.deadline.is_some_and(|at| Instant::now() >= at) {
            return self
                .fail_run("a mark of it is not durable for a long time; see `status` on the master target");
        }
        match &mut run.phase {
            Phase::First { begun, done } if done.len() < run.disks.len() => {
                let to_begin: Vec<DiskId> = run.disks.difference(begun).copied().collect();
                self.begin_rounds(to_begin, false);
            }
            Phase::First { .. } => {
                run.phase = Phase::Freezing;
                self.begin_freeze();
            }
            Phase::Reading { begun, read } if read.len() < run.disks.len() => {
                let to_begin: Vec<DiskId> = run.disks.difference(begun).copied().collect();
                self.begin_rounds(to_begin, true);
            }
            Phase::Reading { .. } => match run.freeze.take() {
                Some(freeze) => {
                    run.phase = Phase::Thawing;
                    let news = self.freezer.clone();
                    thread("thaw", move || drop(news.send(FreezeNews::Ended(freeze.end()))));
                }
                None => self.close_or_mark(),
            },
            Phase::Freezing | Phase::Thawing | Phase::Closing => {}
            Phase::Waiting { durable } if durable.len() == run.disks.len() => self.finish_run(),
            Phase::Waiting { .. } => {}
        }
    }

    /// Begins rounds of disks of the run, those that can begin now.
    fn begin_rounds(&mut self, disks: Vec<DiskId>, to_mark: bool) {
        for disk in disks {
            if self.begin_round(disk, to_mark)
                && let Some(MarkRun {
                    phase: Phase::First { begun, .. } | Phase::Reading { begun, .. }, ..
                }) = self.marking.as_mut()
            {
                begun.insert(disk);
            }
        }
    }

    /// Everything is read, and nothing was frozen: where all disks are followed, a closing window makes the point what
    /// they were at one moment.
    fn close_or_mark(&mut self) {
        let Some(run) = self.marking.as_ref() else { return };
        if !self.can_close(run.disks.iter().copied()) {
            return self.place_marks(MarkClass::Fuzzy);
        }
        let (point, disks) = (run.point, run.disks.iter().copied().collect());
        self.order_window(point, disks);
        if let Some(run) = self.marking.as_mut() {
            run.phase = Phase::Closing;
        }
    }

    /// Whether the run waits for the window that was ordered for it.
    pub(crate) fn is_closing(&self, point: [u8; 16]) -> bool {
        self.marking.as_ref().is_some_and(|run| run.point == point && matches!(run.phase, Phase::Closing))
    }

    fn begin_freeze(&mut self) {
        let Some(run) = self.marking.as_mut() else { return };
        let limit = Duration::from_millis(run.order.request.freeze_limit_ms);
        run.deadline = Some(Instant::now() + limit);
        let devices: Vec<String> = self.disks.values().map(|state| state.path.clone()).collect();
        let (news, state_dir) = (self.freezer.clone(), self.plan().settings.places.state_dir.clone());
        thread("freeze", move || {
            let frozen = mount_points(&devices).and_then(|mounts| {
                Freeze::begin(&mounts, limit, &state_dir).map_err(|error| error.to_string())
            });
            // A machine that is gone meanwhile drops the freeze, which thaws.
            drop(news.send(FreezeNews::Begun(frozen)));
        });
    }

    /// The freezing thread is done.
    pub(crate) fn handle_freeze_news(&mut self, news: FreezeNews) {
        let Some(run) = self.marking.as_mut() else {
            // The run failed meanwhile: what was frozen for it is thawed, off this task.
            if let FreezeNews::Begun(Ok(freeze)) = news {
                thread("thaw", move || drop(freeze));
            }
            return;
        };
        match (news, &run.phase) {
            (FreezeNews::Begun(Ok(freeze)), Phase::Freezing) => {
                run.frozen = freeze.mount_points();
                tracing::info!(mounts = ?run.frozen, "file systems frozen");
                run.freeze = Some(freeze);
                run.phase = Phase::Reading { begun: BTreeSet::new(), read: BTreeSet::new() };
                self.advance_run();
            }
            (FreezeNews::Begun(Ok(freeze)), _) => thread("thaw", move || drop(freeze)),
            (FreezeNews::Begun(Err(reason)), Phase::Freezing)
                if matches!(run.order.asker, Asker::Target(..)) =>
            {
                tracing::info!(reason, "the point is made without a freeze");
                run.deadline = None;
                run.phase = Phase::Reading { begun: BTreeSet::new(), read: BTreeSet::new() };
                self.advance_run();
            }
            (FreezeNews::Begun(Err(reason)), Phase::Freezing) => self.fail_run(&reason),
            (FreezeNews::Ended(true), Phase::Thawing) => {
                tracing::info!("file systems thawed");
                self.place_marks(MarkClass::Frozen);
            }
            (FreezeNews::Ended(false), Phase::Thawing) => self.fail_run(LATE_TEXT),
            _ => {} // of a run that failed
        }
    }

    /// Everything is read: the point's marks stand behind it.
    pub(crate) fn place_marks(&mut self, class: MarkClass) {
        let Some(run) = self.marking.as_mut() else { return };
        run.class = class;
        let label = MarkLabel {
            point: run.point,
            class,
            cause: run.order.asker.cause(),
            name: Text::new(&run.order.request.name),
            source_time: wall_clock(),
        };
        run.phase = Phase::Waiting { durable: BTreeMap::new() };
        run.deadline = Some(Instant::now() + WAITING_LIMIT);
        let placed: Vec<bool> = run.disks.iter().map(|disk| self.core.submit_mark(*disk, label)).collect();
        if placed.contains(&false) {
            self.fail_run("too many marks wait to become durable; see why in `reprotect-agent status`");
        }
    }

    /// A round that ends with a mark has read all.
    pub(crate) fn handle_scan_read(&mut self, disk: DiskId) {
        if let Some(MarkRun { phase: Phase::Reading { begun, read }, .. }) = self.marking.as_mut()
            && begun.contains(&disk)
        {
            read.insert(disk);
            return self.advance_run();
        }
        self.end_round(disk);
    }

    /// Ends a round that no run waits for.
    fn end_round(&mut self, disk: DiskId) {
        let label = MarkLabel::of_disk(MarkClass::Fuzzy, MarkCause::Pass, wall_clock());
        if !self.core.submit_mark(disk, label) {
            tracing::warn!(%disk, "a scan round could not be ended; the next session begins another one");
        }
    }

    /// A round's mark is durable.
    pub(crate) fn handle_round_done(&mut self, disk: DiskId) {
        if let Some(MarkRun { phase: Phase::First { begun, done }, .. }) = self.marking.as_mut()
            && begun.contains(&disk)
        {
            done.insert(disk);
            self.advance_run();
        }
    }

    /// A mark is durable.
    pub(crate) fn handle_marked(&mut self, disk: DiskId, label: &MarkLabel) {
        if let Some(MarkRun { point, phase: Phase::Waiting { durable }, .. }) = self.marking.as_mut()
            && *point == label.point
        {
            durable.insert(disk, label.source_time);
            self.advance_run();
        }
    }

    /// A mark will never be durable.
    pub(crate) fn handle_mark_lost(&mut self, disk: DiskId, label: &MarkLabel) {
        if self.marking.as_ref().is_some_and(|run| run.point == label.point) {
            self.fail_run(&format!(
                "the stream of disk {disk} was given up before its mark was durable; try again"
            ));
        }
    }

    fn finish_run(&mut self) {
        let Some(run) = self.marking.take() else { return };
        let Phase::Waiting { durable } = &run.phase else { return };
        let time = durable.values().next().copied().unwrap_or_default();
        let disk = |disk: &DiskId| MarkedDisk {
            disk: disk.to_string(),
            source: self.disks.get(disk).map(|state| state.path.clone()).unwrap_or_default(),
        };
        let class = match run.class {
            MarkClass::Fuzzy => "fuzzy",
            MarkClass::Crash => "crash-consistent",
            MarkClass::Frozen => "frozen",
            MarkClass::App => "application-consistent",
        };
        let point: String = run.point.iter().map(|byte| format!("{byte:02x}")).collect();
        if matches!(run.order.asker, Asker::Timer) {
            tracing::debug!(point, "the timer's point of the machine is durable");
        } else {
            tracing::info!(point, class, name = run.order.request.name, "a point of the machine is durable");
        }
        let answer = MarkAnswer {
            point,
            class: class.to_owned(),
            name: run.order.request.name.clone(),
            source_time_ms: time.0 / 1_000_000,
            disks: durable.keys().map(disk).collect(),
            frozen: run.frozen.iter().map(|path| path.display().to_string()).collect(),
        };
        self.following.handle_point_durable(&self.core, run.disks.iter().copied());
        let pauses: Vec<(DiskId, Duration)> =
            run.disks.iter().map(|disk| (*disk, self.round_pause(*disk))).collect();
        for (disk, pause) in pauses {
            // Rounds set their own pause when they end; a point of a stream has none.
            if let Some(state) = self.disks.get_mut(&disk)
                && state.activity == Activity::Synced
                && state.next_scan.is_some_and(|at| at <= Instant::now())
            {
                state.durable_as_of = state.durable_as_of.max(time);
                state.next_scan = Some(Instant::now() + pause);
            }
        }
        if run.order.asker.cause() == MarkCause::Stop {
            let later = Some(Instant::now() + STOPPED_PAUSE);
            self.disks.values_mut().for_each(|state| state.next_scan = later);
        }
        if let Asker::Command(asker) = run.order.asker {
            // Whoever asked may have given up; the point is there all the same.
            let _ = asker.send(Ok(answer));
        }
        self.next_run();
    }

    pub(crate) fn fail_run(&mut self, reason: &str) {
        let Some(mut run) = self.marking.take() else { return };
        if matches!(run.order.asker, Asker::Timer) {
            tracing::debug!(reason, "the timer made no point of the machine");
        } else {
            tracing::warn!(reason, "no point of the machine was made");
        }
        if let Some(freeze) = run.freeze.take() {
            thread("thaw", move || drop(freeze));
        }
        if let Phase::Reading { read, .. } = &run.phase {
            read.iter().for_each(|disk| self.end_round(*disk));
        }
        let streaming = self.is_streaming(run.disks.iter().copied());
        if matches!(run.phase, Phase::Closing) {
            self.drop_window(run.disks.iter().copied());
            // What was taken for this point is not submitted, so what follows it would have a gap.
            self.pause_stream();
        }
        if matches!(run.phase, Phase::Thawing | Phase::Closing) && !streaming {
            run.disks.iter().for_each(|disk| self.end_round(*disk));
        }
        for disk in &run.disks {
            if let Some(state) = self.disks.get_mut(disk) {
                state.next_scan = state.next_scan.or(Some(Instant::now()));
            }
        }
        self.refuse(run.order.asker, reason.to_owned());
        self.next_run();
    }
}

const LATE_TEXT: &str = "the file systems were frozen for as long as they may be and not everything was read; they are thawed, no point was made; allow more time with --freeze-limit, or raise `read_rate`";

/// What is mounted from these devices, through partitions, LVM and md. Blocks.
fn mount_points(devices: &[String]) -> Result<Vec<PathBuf>, String> {
    let disks = enumerate(&SystemRoot::default()).map_err(|error| error.to_string())?;
    let ours = disks.iter().filter(|disk| devices.iter().any(|path| disk.path.as_os_str() == path.as_str()));
    Ok(ours.flat_map(|disk| &disk.mounts).map(|mount| PathBuf::from(&mount.mount_point)).collect())
}

/// Runs what may wait for a file system off the session's task.
fn thread(name: &str, work: impl FnOnce() + Send + 'static) {
    // Without a thread the closure is dropped, and with it the freeze, which thaws here.
    if let Err(error) = std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        tracing::error!(%error, "no thread to {name} file systems; raise the limit on processes");
    }
}

/// Where orders come from.
pub(crate) type MarkOrders = mpsc::Receiver<MarkOrder>;
