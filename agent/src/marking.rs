//! A recovery point of the whole machine: by the policy's timers, by `mark` with or without frozen file systems, and
//! because the master target wants one.
//!
//! ```text
//!                  Reading (a round of every disk) ─▶ [Quiescing] ─▶ Closing (a window: all disks are followed)    ┐
//! First (a round) ─▶ Quiescing ─▶ Freezing ─▶ Reading ─▶ Thawing     (to be frozen, and one is scanned)             ├▶ Waiting
//!                                             Reading                (fuzzy: one is scanned)                         ┘
//! ```
//! Waiting is for the marks, one point, to become durable.
//! Invariants: one run at a time, what somebody wants waits for the timer's; all disks of the machine are in it, and all
//! their marks name one random point; a mark is called frozen only if the guard of the freeze says that it held until
//! everything was read; a round that was begun for a run that failed ends with a fuzzy mark of its own; whatever fails,
//! everything is thawed and applications go on (`quiescing`). Units: milliseconds. Driven by `machine`, asked by `daemon`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::{MarkCause, MarkClass, MarkLabel};
use reprotect_engine::format::message::MarkRequest as MarkWanted;
use reprotect_engine::format::wire::Text;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, Timestamp};
use tokio::sync::{mpsc, oneshot};

use crate::api::{MarkAnswer, MarkRequest, MarkedDisk};
use crate::capturing::ToFreeze;
use crate::freeze::FreezeEnd;
use crate::machine::Machine;
use crate::protected::Activity;
use crate::quiescing::{LATE_TEXT, Quiet, Rest};

/// Points that wait for the one that is being made.
const WAITING_MAX: usize = 8;
/// How long marks may wait to become durable before a run gives up on them; they are sent all the same.
const WAITING_LIMIT: Duration = Duration::from_secs(600);
/// Looks for a moment in which everything is frozen, before a run gives up.
const TRIES_MAX: u32 = 3;
/// How long the freeze of a scheduled point may take, writing out included.
const APP_FREEZE_LIMIT_MS: u64 = 30_000;
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

#[derive(Debug)]
pub(crate) enum Phase {
    /// Rounds that are to end before the freeze; begun ones are in the set.
    First { begun: BTreeSet<DiskId>, done: BTreeSet<DiskId> },
    /// Applications are brought to rest and file systems write out, for a window or for reading.
    Quiescing { to_window: bool },
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
    pub(crate) order: MarkOrder,
    pub(crate) point: [u8; 16],
    disks: BTreeSet<DiskId>,
    pub(crate) phase: Phase,
    pub(crate) quiet: Quiet,
    /// When the freeze is over at the latest, or the wait for the marks.
    pub(crate) deadline: Option<Instant>,
    /// What its marks promise, once they are placed.
    class: MarkClass,
    /// What its disks are not whole in.
    lacking: Vec<String>,
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
            app: false,
        };
        self.handle_mark_order(MarkOrder { request, asker: Asker::Target(wanted.point, wanted.cause) });
    }

    /// Whether all disks can be read together, for one point: none is being copied, away or unreadable.
    pub(crate) fn reads_together(&self) -> bool {
        self.disks.values().all(|state| {
            matches!(state.activity, Activity::Synced | Activity::Scanning) && !state.faults.is_paused()
        })
    }

    /// The timers' points: one that brings the machine to rest when the application schedule says so, another when every
    /// disk's pause is over.
    pub(crate) fn begin_timer_run(&mut self, now: Instant) {
        let free = self.marking.is_none() && self.core.is_ready() && !self.disks.is_empty();
        if !free || !self.reads_together() {
            return;
        }
        if self.app_is_due(now) {
            let app = self.plan().settings.hooks.is_configured();
            let request =
                MarkRequest { name: String::new(), freeze: true, freeze_limit_ms: APP_FREEZE_LIMIT_MS, app };
            return self.handle_mark_order(MarkOrder { request, asker: Asker::Timer });
        }
        let is_due = |state: &crate::protected::Protected| {
            state.activity == Activity::Synced && state.next_scan.is_some_and(|at| now >= at)
        };
        if self.disks.values().all(is_due) {
            let request = MarkRequest::plain();
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
                // Whatever moment is taken, everything up to it is in the stream.
                let streaming = self.is_streaming(disks.iter().copied());
                if !streaming {
                    // Not all of them are streamed: rounds of them all, then.
                    self.pause_stream();
                }
                let windowed = streaming || self.has_windows(disks.iter().copied());
                let phase = if order.request.freeze && !windowed {
                    Phase::First { begun, done }
                } else {
                    Phase::Reading { begun, read: if streaming { disks.clone() } else { done } }
                };
                let (quiet, deadline, class) = (Quiet::default(), None, MarkClass::Fuzzy);
                let lacking = Vec::new();
                self.marking = Some(MarkRun { order, point, disks, phase, quiet, deadline, class, lacking });
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

    /// Whether the schedule wants a point that brings the machine to rest, and one can be had: what is scanned would be frozen
    /// for as long as it is read.
    fn app_is_due(&mut self, now: Instant) -> bool {
        if self.app_pause().is_none() || !self.app_schedule.is_due(now) {
            return false;
        }
        let disks = || self.disks.keys().copied();
        let windowed = self.is_streaming(disks()) || self.has_windows(disks());
        if !windowed {
            tracing::warn!(
                "no scheduled point brings the machine to rest: that needs every disk to be followed in windows"
            );
            self.end_app_run(true);
        }
        windowed
    }

    /// A point of the application schedule was made, or could not be.
    fn end_app_run(&mut self, made: bool) {
        if let Some(pause) = self.app_pause() {
            self.app_schedule.ended(made, pause);
        }
    }

    /// The pause between two points that bring the machine to rest, if there are to be any.
    pub(crate) fn app_pause(&self) -> Option<Duration> {
        self.policy.app_points_every().unwrap_or(self.plan().settings.app_interval)
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
        if request.app && !self.plan().settings.hooks.is_configured() {
            return Err("no hooks bring applications to rest; set hooks.pre_freeze and hooks.post_thaw in the agent's configuration, or make a point with --freeze".to_owned());
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
            let reading = matches!(run.phase, Phase::Reading { .. } | Phase::Thawing);
            return self.fail_run(if reading { LATE_TEXT } else { REST_TEXT });
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
            Phase::First { .. } => self.begin_quiescing(false),
            Phase::Reading { begun, read } if read.len() < run.disks.len() => {
                let to_begin: Vec<DiskId> = run.disks.difference(begun).copied().collect();
                self.begin_rounds(to_begin, true);
            }
            Phase::Reading { .. } => match run.quiet.freeze.take() {
                Some(freeze) => self.begin_thawing(freeze),
                None => self.close_or_mark(),
            },
            Phase::Quiescing { .. } | Phase::Freezing | Phase::Thawing | Phase::Closing => {}
            Phase::Waiting { durable }
                if durable.len() == run.disks.len() && run.quiet.rest != Rest::Releasing =>
            {
                self.finish_run();
            }
            Phase::Waiting { .. } => {}
        }
    }

    /// Whether file systems are frozen for the run that goes on.
    pub(crate) fn holds_a_freeze(&self) -> bool {
        self.marking.as_ref().is_some_and(|run| run.quiet.freeze.is_some())
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

    /// Everything is read, and nothing is frozen: where all disks are followed, a closing window makes the point what
    /// they were at one moment.
    fn close_or_mark(&mut self) {
        let Some(run) = self.marking.as_ref() else { return };
        let disks = || run.disks.iter().copied();
        let closes = self.can_close(disks()) || self.is_streaming(disks());
        match (closes, run.order.request.freeze && !run.quiet.looked) {
            (true, true) => self.begin_quiescing(true),
            (true, false) => self.close_window(None),
            (false, true) if matches!(run.order.asker, Asker::Command(_)) => {
                self.fail_run("no window can be opened at the moment, and only in one can be frozen; see `reprotect-agent status`, and try again");
            }
            (false, _) => self.place_marks(MarkClass::Fuzzy, wall_clock()),
        }
    }

    /// Whether what a window harvested is still open, so that another one goes on from there.
    fn can_look_again(&self) -> bool {
        let disks = || self.marking.iter().flat_map(|run| run.disks.iter().copied());
        self.can_close(disks()) || self.is_streaming(disks())
    }

    /// Looks for the point's moment, in which everything is frozen that is to be.
    pub(crate) fn close_window(&mut self, freeze: Option<ToFreeze>) {
        let Some(run) = self.marking.as_mut() else { return };
        run.phase = Phase::Closing;
        let (point, disks) = (run.point, run.disks.iter().copied().collect());
        self.order_window(point, disks, freeze);
    }

    /// The window is over; `class` is what it promises by itself.
    pub(crate) fn end_window(
        &mut self,
        class: MarkClass,
        source_time: Timestamp,
        frozen: Option<Result<FreezeEnd, String>>,
    ) {
        let Some(run) = self.marking.as_mut() else { return };
        let commanded = matches!(run.order.asker, Asker::Command(_));
        let problem = match &frozen {
            Some(Ok(end)) if !end.held => Some(HELD_TEXT),
            Some(Err(why)) => Some(why.as_str()),
            _ if class == MarkClass::Fuzzy => Some(NO_MOMENT_TEXT),
            _ => None,
        };
        if let Some(problem) = problem.filter(|_| run.order.request.freeze) {
            if run.quiet.tries < TRIES_MAX && run.quiet.has_time() && self.can_look_again() {
                tracing::info!(problem, "another moment is looked for");
                return self.begin_quiescing(true);
            }
            if commanded {
                return self.fail_run(problem);
            }
        }
        let Some(run) = self.marking.as_mut() else { return };
        run.quiet.end = frozen.and_then(Result::ok);
        let class = match class {
            MarkClass::Crash => run.quiet.class(run.order.request.app),
            class => class,
        };
        self.place_marks(class, source_time);
    }

    /// Whether the run waits for the window that was ordered for it.
    pub(crate) fn is_closing(&self, point: [u8; 16]) -> bool {
        self.marking.as_ref().is_some_and(|run| run.point == point && matches!(run.phase, Phase::Closing))
    }

    /// Everything is read: the point's marks stand behind it, and whatever rests goes on.
    pub(crate) fn place_marks(&mut self, class: MarkClass, source_time: Timestamp) {
        drop(self.release_run());
        let Some(run) = self.marking.as_mut() else { return };
        run.class = class;
        let lacking = |disk: &DiskId| {
            let state = self.disks.get(disk)?;
            Some(format!("{} is {}, so this is no state of it", state.path, state.unread.describe()?))
        };
        run.lacking = run.disks.iter().filter_map(lacking).collect();
        let label = MarkLabel {
            point: run.point,
            class,
            cause: run.order.asker.cause(),
            name: Text::new(&run.order.request.name),
            source_time,
        };
        run.phase = Phase::Waiting { durable: BTreeMap::new() };
        run.deadline = Some(Instant::now() + WAITING_LIMIT);
        let placed: Vec<bool> = run.disks.iter().map(|disk| self.core.submit_mark(*disk, label)).collect();
        if placed.contains(&false) {
            self.fail_run("too many marks wait to become durable; see why in `reprotect-agent status`");
        } else {
            self.following.restart_labels(&run.disks);
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
        let point = hex(&run.point);
        if matches!(run.order.asker, Asker::Timer) {
            tracing::debug!(point, "the timer's point of the machine is durable");
        } else {
            let lacking = run.lacking.join(", ");
            tracing::info!(
                point,
                class,
                name = run.order.request.name,
                lacking,
                "a point of the machine is durable"
            );
        }
        let answer = MarkAnswer {
            point,
            class: if run.lacking.is_empty() { class } else { "incomplete" }.to_owned(),
            name: run.order.request.name.clone(),
            source_time_ms: time.0 / 1_000_000,
            disks: durable.keys().map(disk).collect(),
            frozen: run.quiet.frozen(),
            freeze_call_us: run.quiet.end.as_ref().map_or(0, |end| micros(end.call)),
            frozen_us: run.quiet.end.as_ref().map_or(0, |end| micros(end.frozen)),
            problems: run.quiet.all_problems().into_iter().chain(run.lacking.iter().cloned()).collect(),
        };
        if run.order.request.freeze && matches!(run.order.asker, Asker::Timer) {
            // Where nothing is mounted there is no more to be had.
            self.end_app_run(run.quiet.bare || matches!(run.class, MarkClass::Frozen | MarkClass::App));
        }
        for disk in &run.disks {
            // What was streamed behind the mark may not be durable.
            let is_durable = self.core.position(*disk).is_some_and(|(durable, last)| durable == last);
            self.store_unread(*disk, is_durable);
        }
        if run.class != MarkClass::Fuzzy {
            for (disk, state) in self.disks.iter_mut().filter(|(disk, _)| run.disks.contains(disk)) {
                state.freshness.covers(self.core.position(*disk).unwrap_or_default().0, time);
            }
        }
        let ages: Vec<_> = run.disks.iter().map(|disk| (*disk, self.holding(*disk))).collect();
        self.following.handle_point_durable(&self.core, ages.into_iter());
        let pauses = self.round_pauses();
        for (disk, state) in self.disks.iter_mut().filter(|(disk, _)| run.disks.contains(disk)) {
            // Rounds set their own pause when they end; a point of a stream has none.
            if let Some(pause) = pauses.get(disk)
                && state.activity == Activity::Synced
                && state.next_scan.is_some_and(|at| at <= Instant::now())
            {
                state.next_scan = Some(Instant::now() + *pause);
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
        drop(self.release_run());
        let Some(run) = self.marking.take() else { return };
        if matches!(run.order.asker, Asker::Timer) {
            tracing::debug!(reason, "the timer made no point of the machine");
            if run.order.request.freeze {
                self.end_app_run(false);
            }
        } else {
            tracing::warn!(reason, "no point of the machine was made");
        }
        let streaming = self.is_streaming(run.disks.iter().copied());
        if let Phase::Reading { read, .. } = &run.phase
            && !streaming
        {
            read.iter().for_each(|disk| self.end_round(*disk));
        }
        if matches!(run.phase, Phase::Closing) {
            self.drop_window(run.disks.iter().copied());
            // What was taken for this point is not submitted, so what follows it would have a gap.
            self.pause_stream();
        }
        if matches!(run.phase, Phase::Quiescing { to_window: true } | Phase::Thawing | Phase::Closing)
            && !streaming
        {
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

const HELD_TEXT: &str = "the moment took longer than everything may stay frozen (500 ms): the machine is very busy; everything is thawed, try again";
const NO_MOMENT_TEXT: &str =
    "no moment was found that is one state of all disks (see the agent's log); try again";
const REST_TEXT: &str = "bringing the machine to rest took longer than it may; everything goes on, no point was made; see which file system is slow to write out, or allow more time with --freeze-limit";

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

/// An identity, for people.
pub(crate) fn hex(identity: &[u8]) -> String {
    identity.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where orders come from.
pub(crate) type MarkOrders = mpsc::Receiver<MarkOrder>;
