//! Rounds by live capture: which disks are followed, what their stretches are for, and the closing window of a point.
//!
//! ```text
//! Asked ─▶ Opening ─▶ Idle ─▶ Harvesting ─▶ Round ─▶ Idle        (a round of changes, its mark durable)
//!   │          └────▶ Pass ─▶ Idle    └───▶ Pass                 (the whole disk is read, by copy or compare)
//!   └▶ Refused ─▶ Asked (scanned meanwhile)             Round ─▶ Streaming ─▶ Idle   (every write is known meanwhile)
//! ```
//! `Step::may_become` is the table; a disk that is offered again is asked for again from any step.
//! Invariants: a disk is followed before anything of it is read; what is harvested before a pass is forgotten only when
//! the pass is durable, and what is harvested for a round only when the round's mark is; whatever goes wrong, the
//! stretch is given back before anybody can call it durable; a disk that cannot be followed is scanned, says why, and is
//! asked for again before a later round.
//! Units: sectors. Part of `machine`; works by `capturing`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::{MarkClass, Stretch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{PassCause, PassMode};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::agent::Agent;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, LineageId, SectorRange, Sequence, Timestamp};
use tokio::sync::mpsc;

use crate::capture::{CaptureSettings, CompareCause};
use crate::capturing::{Batch, CaptureNews, Capturing, Order, ToFreeze, WindowRead};
use crate::config::CaptureMode;
use crate::disks::SourceKind;
use crate::doubts::{Doubts, Found};
use crate::health::Code;
use crate::labels::Labels;
use crate::machine::Machine;
use crate::marking::hex;
use crate::positions::{Holding, Positions};
use crate::protected::{Activity, Protected};

/// How long a disk that could not be followed is scanned before it is asked for again.
const REFUSED_FOR: Duration = Duration::from_secs(15);

/// What is done with a disk's changes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// It is to be followed, then opened at the target, which has this size.
    Asked {
        size_sectors: u64,
        /// A pass is under way that has what was harvested before it.
        pass: bool,
    },
    /// It cannot be followed, why, and since when that is known.
    Refused { why: String, since: Instant },
    /// Its changes so far are harvested before it is opened at the target.
    Opening { size_sectors: u64 },
    /// Changes gather.
    Idle,
    /// A pass over the whole disk, which has what was harvested before it.
    Pass,
    /// Its changes are wanted for a round; with `to_mark` somebody else places the mark.
    Harvesting { to_mark: bool },
    /// A round, until its mark is durable.
    Round,
    /// Every write is streamed; what was harvested belongs to the newest point.
    Streaming,
}

impl Step {
    fn refused(why: String) -> Self {
        Self::Refused { why, since: Instant::now() }
    }

    /// Whether `next` may follow; anything may be asked for again, refused, or given back.
    const fn may_become(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Refused { .. }, Self::Asked { .. } | Self::Refused { .. }) => true,
            (Self::Refused { .. }, _) => false,
            (_, Self::Asked { .. } | Self::Refused { .. } | Self::Idle) => true,
            (Self::Asked { .. }, Self::Opening { .. }) => true,
            (Self::Asked { .. } | Self::Opening { .. } | Self::Harvesting { .. }, Self::Pass) => true,
            (Self::Idle, Self::Harvesting { .. }) => true,
            (Self::Harvesting { .. }, Self::Round) => true,
            (Self::Round, Self::Streaming) => true,
            _ => false,
        }
    }
}

/// The disks that are followed or were to be.
#[derive(Debug)]
pub(crate) struct Following {
    mode: CaptureMode,
    thread: Option<Capturing>,
    steps: BTreeMap<DiskId, Step>,
    /// Disks of which it is not known what changed: their next round is a compare.
    unknown: BTreeSet<DiskId>,
    /// Where the streams stood, kept for the next process.
    positions: Positions,
    /// Sequence and time of the last moment at which everything was known to be seen.
    accounted: BTreeMap<DiskId, (Sequence, Timestamp)>,
    /// Disks whose every write is streamed since the last window.
    streams: BTreeSet<DiskId>,
    /// Of what is streamed.
    labels: Labels,
    /// What is to be said of points.
    pub(crate) doubts: Doubts,
    /// What was missed on disks that are not compared since.
    missed: BTreeMap<DiskId, String>,
    /// Windows that found no moment, since the start.
    pub(crate) windows_failed: u64,
    /// Why the last one did not, if it did not.
    pub(crate) window_problem: Option<String>,
    /// Events for which a program was not run, since the start.
    pub(crate) events_skipped: u64,
    /// Why disks could not be followed when they were last asked for.
    refused: BTreeMap<DiskId, String>,
}

impl Following {
    /// Nothing is followed yet; a thread that cannot be had is a reason to scan.
    pub(crate) fn new(
        mode: CaptureMode,
        settings: CaptureSettings,
        news: mpsc::UnboundedSender<CaptureNews>,
    ) -> Self {
        let positions = Positions::in_folder(&settings.state_dir);
        let doubts = Doubts::in_folder(&settings.state_dir);
        let wanted = (mode != CaptureMode::Scan).then(|| Capturing::start(settings, news));
        let thread = match wanted {
            Some(Err(error)) => {
                tracing::error!(%error, "no thread for live capture: disks are scanned; raise the limit on processes");
                None
            }
            Some(Ok(thread)) => Some(thread),
            None => None,
        };
        let (steps, unknown, accounted) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Self {
            mode,
            thread,
            steps,
            unknown,
            positions,
            accounted,
            streams: BTreeSet::new(),
            labels: Labels::default(),
            doubts,
            missed: BTreeMap::new(),
            windows_failed: 0,
            window_problem: None,
            events_skipped: 0,
            refused: BTreeMap::new(),
        }
    }

    /// A point of these disks stands behind all that was labelled; where others stream, too, labels go on.
    pub(crate) fn restart_labels(&mut self, disks: &BTreeSet<DiskId>) {
        if self.streams.is_subset(disks) {
            self.labels.restart();
        }
    }

    pub(crate) fn order(&self, order: Order) {
        if let Some(thread) = &self.thread {
            thread.order(order);
        }
    }

    /// Hands the thread over, to be ended; nothing is followed any more.
    pub(crate) const fn take_thread(&mut self) -> Option<Capturing> {
        self.thread.take()
    }

    /// Whether changes of the disk are known without reading it.
    pub(crate) fn is_followed(&self, disk: DiskId) -> bool {
        self.steps.get(&disk).is_some_and(|step| !matches!(step, Step::Asked { .. } | Step::Refused { .. }))
    }

    /// How changes of a disk are found, for people.
    pub(crate) fn describe(&self, disk: DiskId) -> String {
        match self.steps.get(&disk) {
            Some(Step::Refused { why, .. }) => format!("scan ({why})"),
            Some(Step::Asked { .. }) | None => CaptureMode::Scan.to_string(),
            Some(_) => self.mode.to_string(),
        }
    }

    /// What an operator should know of how its changes are found.
    pub(crate) fn trouble(&self, disk: DiskId) -> Option<(Code, String)> {
        if let Some(Step::Refused { why, .. }) = self.steps.get(&disk) {
            return Some((Code::CaptureFellBack, why.clone()));
        }
        if let Some(why) = self.refused.get(&disk) {
            return Some((Code::CaptureFellBack, why.clone())); // asked for again, without an answer yet
        }
        self.missed.get(&disk).map(|why| (Code::CaptureMissed, why.clone()))
    }

    /// The next process is to compare the disk.
    pub(crate) fn forget_position(&self, disk: DiskId) {
        self.positions.remove(disk);
    }

    /// Whether every write of any disk is streamed.
    pub(crate) fn streams_any(&self) -> bool {
        !self.streams.is_empty()
    }

    /// A window found no moment.
    fn note_window(&mut self, problem: Option<&str>) {
        self.windows_failed += u64::from(problem.is_some());
        self.window_problem = problem.map(str::to_owned);
    }

    /// The disk is not protected any more, or not as it was.
    pub(crate) fn forget(&mut self, disk: DiskId) {
        self.forget_stream(disk);
        self.doubts.forget(disk);
        self.accounted.remove(&disk);
    }

    /// The disk is not what it was, and stays protected: what is doubtful of its points stays so.
    pub(crate) fn forget_stream(&mut self, disk: DiskId) {
        self.let_go(disk);
        self.positions.remove(disk);
    }

    /// The history that the process before this one knew.
    pub(crate) fn lineage_before(&self, disk: DiskId) -> Option<LineageId> {
        self.positions.lineage(disk)
    }

    /// Sequence and time of the last moment at which everything was known to be seen; zero where there was none.
    pub(crate) fn account(&self, disk: DiskId) -> (Sequence, Timestamp) {
        self.accounted.get(&disk).copied().unwrap_or_default()
    }

    /// Something was missed: the disk is to be compared.
    pub(crate) fn note_missed(&mut self, disk: DiskId, why: &str) {
        self.unknown.insert(disk);
        self.missed.insert(disk, why.to_owned());
    }

    /// The disk is followed no longer; where its stream stood stays known.
    fn let_go(&mut self, disk: DiskId) {
        if self.steps.remove(&disk).is_some() {
            self.order(Order::Unfollow(disk));
        }
        self.unknown.remove(&disk);
        self.missed.remove(&disk);
        self.refused.remove(&disk);
        self.streams.remove(&disk);
    }

    fn set(&mut self, disk: DiskId, step: Step) {
        if let Some(before) = self.steps.get(&disk) {
            debug_assert!(before.may_become(&step), "illegal step of {disk}: {before:?} to {step:?}");
        }
        self.steps.insert(disk, step);
    }

    /// The disk at `path` is to be followed.
    fn ask(&mut self, disk: DiskId, state: &Protected, asked: Step) {
        let (path, identity) = (PathBuf::from(&state.path), hex(&state.source));
        self.order(Order::Follow { disk, path, identity, size_sectors: state.size_sectors });
        self.set(disk, asked);
    }

    /// What was harvested is live again.
    fn give_back(&mut self, disk: DiskId) {
        self.order(Order::GiveBack(disk));
        self.set(disk, Step::Idle);
    }

    /// The disk is to be opened anew, at another size. A pass goes on then, a round does not.
    pub(crate) fn pause(&mut self, disk: DiskId) {
        let step = self.steps.get(&disk);
        if matches!(step, Some(Step::Round | Step::Harvesting { .. } | Step::Opening { .. })) {
            self.give_back(disk);
        }
    }

    /// The session is over. A pass goes on in the next one, rounds do not.
    pub(crate) fn end_session(&mut self) {
        let open = |(disk, step): (&DiskId, &Step)| {
            matches!(step, Step::Round | Step::Harvesting { .. } | Step::Opening { .. }).then_some(*disk)
        };
        let open: Vec<DiskId> = self.steps.iter().filter_map(open).collect();
        open.into_iter().for_each(|disk| self.give_back(disk));
        self.end_stream();
    }

    /// Writes are streamed no longer; the maps have what was not handed on.
    fn end_stream(&mut self) {
        if std::mem::take(&mut self.streams).is_empty() {
            return;
        }
        self.order(Order::EndStream);
        let streaming = |(disk, step): (&DiskId, &Step)| (*step == Step::Streaming).then_some(*disk);
        let streaming: Vec<DiskId> = self.steps.iter().filter_map(streaming).collect();
        streaming.into_iter().for_each(|disk| self.give_back(disk));
    }

    /// A point of disks whose writes are streamed is durable.
    pub(crate) fn handle_point_durable(&self, core: &Agent, disks: impl Iterator<Item = (DiskId, Holding)>) {
        for (disk, holding) in disks.filter(|(disk, _)| self.steps.get(disk) == Some(&Step::Streaming)) {
            self.remember(core, disk, holding);
            self.order(Order::Durable(disk));
        }
    }

    /// Where the stream stands now outlives this process, before anything is forgotten because of it.
    pub(crate) fn remember(&self, core: &Agent, disk: DiskId, holding: Holding) {
        if self.is_followed(disk)
            && let Some(known) = core.stream_position(disk)
            && let Err(error) = self.positions.store(disk, &known, holding)
        {
            tracing::warn!(%disk, %error, "the position of the stream is not kept: after a restart the disk is compared");
        }
    }

    /// A pass ended durably.
    pub(crate) fn handle_synced(&mut self, core: &Agent, disk: DiskId, holding: Holding) {
        self.remember(core, disk, holding);
        if self.steps.get(&disk) == Some(&Step::Pass) {
            self.order(Order::Durable(disk));
            self.unknown.remove(&disk);
            self.missed.remove(&disk);
            self.set(disk, Step::Idle);
        }
        self.abandon_round(disk);
    }

    /// A pass over the whole disk takes the place of a round, whose end will never be told.
    pub(crate) fn abandon_round(&mut self, disk: DiskId) {
        if matches!(self.steps.get(&disk), Some(Step::Round | Step::Harvesting { .. })) {
            self.give_back(disk);
        }
    }

    /// A round ended durably.
    pub(crate) fn handle_round_durable(&mut self, core: &Agent, disk: DiskId, holding: Holding) {
        self.remember(core, disk, holding);
        if self.steps.get(&disk) == Some(&Step::Round) {
            self.order(Order::Durable(disk));
            self.set(disk, if self.streams.contains(&disk) { Step::Streaming } else { Step::Idle });
        }
    }
}

impl Machine {
    /// Opens a disk at the target, followed if that can be.
    pub(crate) fn follow_and_open(&mut self, disk: DiskId, size_sectors: u64) {
        let Some(state) = self.disks.get(&disk) else { return };
        let source = state.source;
        let is_device = self.source_kind(source) == Some(SourceKind::BlockDevice);
        let following = &mut self.following;
        if following.thread.is_none() || !is_device {
            return self.open_at_target(disk, size_sectors);
        }
        let refused =
            |step: &Step| matches!(step, Step::Refused { since, .. } if since.elapsed() < REFUSED_FOR);
        if following.steps.get(&disk).is_some_and(refused) {
            return self.open_at_target(disk, size_sectors);
        }
        let pass = matches!(following.steps.get(&disk), Some(Step::Pass | Step::Asked { pass: true, .. }));
        let asked = Step::Asked { size_sectors, pass };
        if matches!(following.steps.get(&disk), Some(Step::Asked { .. })) {
            return following.set(disk, asked);
        }
        // Also where it is followed: another device may stand there now.
        following.ask(disk, state, asked);
    }

    /// The device of a disk that is open at the target was opened anew, perhaps as another one.
    pub(crate) fn follow_again(&mut self, disk: DiskId) {
        let Some(state) = self.disks.get(&disk) else { return };
        if !self.following.is_followed(disk) {
            return;
        }
        self.following.end_stream();
        self.following.let_go(disk);
        let asked = Step::Asked { size_sectors: state.size_sectors, pass: false };
        self.following.ask(disk, state, asked);
        self.fail_run(&format!("the device of disk {disk} was opened anew"));
    }

    /// Tells the core where the stream was when an agent before this one was last told of it: a target that is behind that
    /// lost something, and what the maps say is not enough.
    fn recall(&mut self, disk: DiskId) {
        if self.core.has_stream(disk) {
            return; // this process knows better
        }
        let unread = self.disks.get(&disk).and_then(|state| state.unread.tag());
        match unread.and_then(|unread| self.following.positions.load(disk, unread, wall_clock())) {
            Some((known, as_of)) => {
                self.core.recall(disk, known);
                self.recall_account(disk);
                if let Some(state) = self.disks.get_mut(&disk) {
                    state.recalled_as_of = as_of;
                }
            }
            None => {
                tracing::info!(%disk, "nothing is known of its stream; it is compared");
                self.following.unknown.insert(disk);
                if let Some(state) = self.disks.get_mut(&disk) {
                    state.unread.distrust();
                }
            }
        }
    }

    /// Up to where the process before this one had seen everything.
    fn recall_account(&mut self, disk: DiskId) {
        if let Some(accounted) = self.following.positions.account(disk, wall_clock()) {
            self.following.accounted.entry(disk).or_insert(accounted);
        }
    }

    /// The disk is open at the target. What was harvested before belongs to the pass only if that reads everything.
    pub(crate) fn handle_opened_followed(&mut self, disk: DiskId, mode: PassMode) {
        if let Some((_, last)) = self.core.position(disk)
            && let Some((sequence, _)) = self.following.accounted.get_mut(&disk)
        {
            *sequence = (*sequence).min(last); // what the target did not keep has its numbers given anew
        }
        self.tell_doubts(disk);
        self.following.remember(&self.core, disk, self.holding(disk));
        let from_the_start = self.core.pass_progress(disk).is_some_and(|(settled, _)| settled == 0);
        let following = &mut self.following;
        match following.steps.get(&disk) {
            Some(Step::Opening { .. }) if mode != PassMode::Done && from_the_start => {
                following.set(disk, Step::Pass);
            }
            Some(Step::Opening { .. }) => following.give_back(disk),
            Some(Step::Pass) if mode == PassMode::Done => following.give_back(disk),
            _ => {}
        }
    }

    /// Begins a round over a disk, by what is known to have changed or by reading all of it; answers whether it began.
    pub(crate) fn begin_round(&mut self, disk: DiskId, to_mark: bool) -> bool {
        // Following writes a file, and must not wait for a file system that is frozen.
        if !self.holds_a_freeze() {
            self.ask_again(disk);
        }
        let following = &mut self.following;
        let begun = match following.steps.get(&disk) {
            None | Some(Step::Asked { .. } | Step::Refused { .. }) if to_mark => {
                self.core.begin_scan_to_mark(disk)
            }
            None | Some(Step::Asked { .. } | Step::Refused { .. }) => self.core.begin_scan(disk),
            Some(Step::Idle) if self.core.is_idle(disk) => {
                following.order(Order::Harvest(disk));
                following.set(disk, Step::Harvesting { to_mark });
                true
            }
            Some(_) => false,
        };
        if begun && let Some(state) = self.disks.get_mut(&disk) {
            state.begin_walk(Activity::Scanning);
        }
        begun
    }

    /// A disk that could not be followed a while ago is asked for again: what was in the way may be mended.
    fn ask_again(&mut self, disk: DiskId) {
        let Some(state) = self.disks.get(&disk) else { return };
        let long_ago =
            |step: &Step| matches!(step, Step::Refused { since, .. } if since.elapsed() >= REFUSED_FOR);
        let is_device = self.source_kind(state.source) == Some(SourceKind::BlockDevice);
        let following = &mut self.following;
        if is_device && following.thread.is_some() && following.steps.get(&disk).is_some_and(long_ago) {
            let asked = Step::Asked { size_sectors: state.size_sectors, pass: false };
            following.ask(disk, state, asked);
        }
    }

    /// A step on the ladder.
    pub(crate) fn step(&mut self, disk: DiskId, to: &str, cause: &str) {
        if let Some(state) = self.disks.get(&disk) {
            self.health.step(&state.path, to, cause);
        }
    }

    /// News from the capturing thread.
    pub(crate) fn handle_capture(&mut self, news: CaptureNews) {
        match news {
            CaptureNews::Followed { disk, result } => self.handle_followed(disk, result),
            CaptureNews::Harvested { disk, result } => self.handle_harvested(disk, result),
            CaptureNews::Windowed { run, disks, result } => self.handle_window(run, &disks, result),
            CaptureNews::Streamed { batches, as_of } => self.handle_streamed(batches, as_of),
            CaptureNews::StreamEnded { disks, why } => {
                if !self.following.streams.is_empty() {
                    tracing::warn!(?disks, "not every write is known any more, points only: {why}");
                    self.end_streaming(&why);
                }
            }
            CaptureNews::Accounted { disk, as_of } => {
                // What was missed before is said of points since the account before that.
                if self.write_doubts_down(disk)
                    && let Some((_, last)) = self.core.position(disk)
                {
                    self.following.accounted.insert(disk, (last, as_of));
                }
            }
            CaptureNews::Skipped { events } => {
                tracing::warn!(
                    events,
                    "the kernel did not run a capture program for some events; each disk's account tells whether a write was among them"
                );
                self.following.events_skipped += events;
            }
            CaptureNews::Unaccounted { disk, why } => self.handle_unaccounted(disk, Found::Miss, &why),
            CaptureNews::Unfollowed { disk, why } => {
                self.handle_unaccounted(disk, Found::Interruption, &why);
                self.step(disk, "scan", &why);
                self.following.set(disk, Step::refused(why));
                self.fail_run(&format!("disk {disk} cannot be followed any more"));
            }
            CaptureNews::Gone => self.handle_thread_gone(),
        }
    }

    fn handle_followed(&mut self, disk: DiskId, result: Result<Option<CompareCause>, String>) {
        let Some(Step::Asked { size_sectors, pass }) = self.following.steps.get(&disk).cloned() else {
            return;
        };
        let cause = match result {
            Ok(cause) => cause,
            Err(why) => {
                // It is asked for again and again, and said once.
                if self.following.refused.insert(disk, why.clone()).is_none_or(|before| before != why) {
                    tracing::warn!(%disk, "the disk is scanned, because it cannot be followed: {why}");
                    self.step(disk, "scan", &why);
                }
                self.following.set(disk, Step::refused(why));
                if !self.core.is_open(disk) {
                    self.open_at_target(disk, size_sectors);
                }
                return;
            }
        };
        let was_refused = self.following.refused.remove(&disk).is_some();
        let same = cause.is_none();
        let mode = self.following.mode.base().to_string();
        let text = cause.as_ref().map_or("goes on where it was".to_owned(), CompareCause::to_string);
        self.step(disk, &mode, &text);
        if let Some(cause) = cause {
            tracing::info!(%disk, "followed from now on, what was before is not known: {cause}");
            self.following.unknown.insert(disk);
            if matches!(cause, CompareCause::PinsChanged { .. }) {
                // Points were made while nobody may have seen the writes.
                self.recall_account(disk);
                self.doubt_since_account(disk, Found::Interruption, &text);
            }
        } else if was_refused && self.core.is_open(disk) {
            // It was opened without anybody asking where its stream stood.
            self.following.unknown.insert(disk);
        } else {
            self.recall(disk);
        }
        if self.core.is_open(disk) {
            // Another device stands there since: what is not known is compared in the next round.
            self.following.set(disk, Step::Idle);
        } else if same && pass {
            self.following.set(disk, Step::Pass);
            self.open_at_target(disk, size_sectors);
        } else {
            self.following.order(Order::Harvest(disk));
            self.following.set(disk, Step::Opening { size_sectors });
        }
    }

    /// No order is taken any more: what is open is left to the next process, which finds the maps as they are; until
    /// then disks are scanned.
    fn handle_thread_gone(&mut self) {
        const WHY: &str = "the capturing thread ended by a defect; restart the agent and report this";
        tracing::error!("{WHY}");
        self.following.thread = None;
        self.following.streams.clear();
        for (disk, step) in self.following.steps.clone() {
            self.following.set(disk, Step::refused(WHY.to_owned()));
            if let Step::Asked { size_sectors, .. } | Step::Opening { size_sectors } = step {
                self.open_at_target(disk, size_sectors);
            }
            if matches!(step, Step::Harvesting { .. }) {
                self.pause_round(disk);
            }
        }
        self.fail_run(WHY);
    }

    fn handle_harvested(&mut self, disk: DiskId, result: Result<RangeSet, String>) {
        let step = self.following.steps.get(&disk).cloned();
        match (step, result) {
            (Some(Step::Opening { size_sectors }), result) => {
                if let Err(why) = result {
                    // Without its changes it would have to be read whole each time: that is what scanning is.
                    tracing::error!(%disk, "the disk is scanned, because its changes cannot be had: {why}");
                    self.following.set(disk, Step::refused(why));
                }
                self.open_at_target(disk, size_sectors);
            }
            (Some(Step::Harvesting { to_mark }), Ok(changed)) => self.begin_delta(disk, &changed, to_mark),
            (Some(Step::Harvesting { .. }), Err(why)) => {
                tracing::error!(%disk, "no round: {why}");
                self.following.give_back(disk);
                self.pause_round(disk);
                self.fail_run(&format!("the changes of disk {disk} cannot be had: {why}"));
            }
            // Of a session that is over: given back already.
            _ => {}
        }
    }

    fn begin_delta(&mut self, disk: DiskId, changed: &RangeSet, to_mark: bool) {
        if self.following.unknown.contains(&disk) {
            self.following.set(disk, Step::Pass);
            return self.core.begin_pass(disk, PassCause::TrackingLost);
        }
        self.note_written(disk, changed.iter());
        let mut wanted = changed.clone();
        if let Some(state) = self.disks.get(&disk).filter(|state| state.unread.is_tried()) {
            wanted.extend(state.unread.ranges());
        }
        if self.core.begin_delta(disk, &wanted, to_mark) {
            self.following.set(disk, Step::Round);
        } else {
            self.following.give_back(disk);
            self.pause_round(disk);
            self.fail_run(&format!("the round of disk {disk} could not begin"));
        }
    }

    /// These were written to; a compare that is to come begins with them.
    fn note_written(&mut self, disk: DiskId, ranges: impl Iterator<Item = SectorRange>) {
        if let Some(state) = self.disks.get_mut(&disk) {
            state.recent.note(ranges);
            if let Err(error) = state.recent.store(Instant::now()) {
                tracing::debug!(%disk, %error, "what is written to lately is not kept: a compare begins anywhere");
            }
        }
    }

    /// A round did not begin: the next one is tried after the usual pause.
    fn pause_round(&mut self, disk: DiskId) {
        let pause = self.round_pause(disk);
        if let Some(state) = self.disks.get_mut(&disk)
            && state.activity == Activity::Scanning
        {
            state.activity = Activity::Synced;
            state.next_scan = Some(Instant::now() + pause);
        }
    }

    /// Whether points of these disks are made by closing windows.
    pub(crate) fn has_windows(&self, mut disks: impl Iterator<Item = DiskId>) -> bool {
        matches!(self.following.mode, CaptureMode::Window | CaptureMode::Data)
            && disks.all(|disk| self.following.is_followed(disk) && !self.following.unknown.contains(&disk))
    }

    /// Whether a point of these disks can be made by a closing window now.
    pub(crate) fn can_close(&self, mut disks: impl Iterator<Item = DiskId>) -> bool {
        let following = &self.following;
        let round = |disk: DiskId| {
            following.steps.get(&disk) == Some(&Step::Round) && !following.unknown.contains(&disk)
        };
        matches!(self.following.mode, CaptureMode::Window | CaptureMode::Data) && disks.all(round)
    }

    /// Whether every write of these disks is streamed, so that any moment is a point.
    pub(crate) fn is_streaming(&self, mut disks: impl Iterator<Item = DiskId>) -> bool {
        let following = &self.following;
        let streams = |disk: DiskId| following.steps.get(&disk) == Some(&Step::Streaming);
        !following.streams.is_empty() && disks.all(|disk| following.streams.contains(&disk) && streams(disk))
    }

    /// Looks for a moment of these disks, or takes the present one where every write is known.
    pub(crate) fn order_window(&self, run: [u8; 16], disks: Vec<DiskId>, freeze: Option<ToFreeze>) {
        let following = &self.following;
        following.order(if self.is_streaming(disks.iter().copied()) {
            Order::Point { run, disks, freeze }
        } else {
            Order::Window { run, disks, stay: following.mode == CaptureMode::Data, freeze }
        });
    }

    /// Rounds are wanted: writes are streamed again from the next window on.
    pub(crate) fn pause_stream(&mut self) {
        self.following.end_stream();
    }

    fn handle_streamed(&mut self, batches: Vec<Batch>, as_of: Timestamp) {
        if self.following.streams.is_empty() {
            return; // it was ended meanwhile; the maps have it
        }
        let now = self.following.labels.at(wall_clock());
        for batch in batches {
            let disk = batch.disk;
            self.handle_batch_sent(&batch);
            self.note_written(disk, batch.records.iter().map(Record::range));
            self.core.submit_delta(disk, batch.kind, now, batch.records);
        }
        let waiting: u64 = self.following.streams.iter().map(|disk| self.core.undurable_bytes(*disk)).sum();
        if waiting > self.plan().settings.capture_queue_bytes {
            tracing::warn!(
                waiting,
                "the target does not keep up with every write: points only, until it does"
            );
            return self.end_streaming("the target does not keep up with every write");
        }
        for disk in &self.following.streams {
            if let (Some((durable, last)), Some(state)) =
                (self.core.position(*disk), self.disks.get_mut(disk))
            {
                state.freshness.streamed(last, as_of);
                state.freshness.durable(durable);
            }
        }
    }

    /// One step down the ladder: rounds and windows from now on, until a window stays open again.
    pub(crate) fn end_streaming(&mut self, why: &str) {
        for disk in self.following.streams.clone() {
            self.step(disk, "window", why);
        }
        self.following.end_stream();
        let pause = self.plan().settings.capture_interval;
        for state in self.disks.values_mut().filter(|state| state.activity == Activity::Synced) {
            state.next_scan = state.next_scan.or(Some(Instant::now() + pause));
        }
    }

    /// What a window harvested and nobody will submit must not be called durable.
    pub(crate) fn drop_window(&self, disks: impl Iterator<Item = DiskId>) {
        disks.for_each(|disk| self.following.order(Order::GiveBack(disk)));
    }

    fn handle_window(&mut self, run: [u8; 16], disks: &[DiskId], result: Result<WindowRead, String>) {
        if !self.is_closing(run) {
            // Given back already; a stream that began, or whose batches are dropped here, must not go on.
            if result.is_ok_and(|read| read.streams) {
                self.following.streams.extend(disks);
                self.end_streaming("its point was given up");
            }
            return;
        }
        let known = disks.iter().all(|disk| !self.following.unknown.contains(disk));
        let (mut held, mut source_time) = (None, wall_clock());
        let class = match result {
            // The stream it stands in was ended meanwhile: batches before it are missing.
            Ok(WindowRead { point: true, .. }) if self.following.streams.is_empty() => {
                self.drop_window(disks.iter().copied());
                MarkClass::Fuzzy
            }
            Ok(WindowRead { batches, open, streams, frozen, source_time: taken, unread, .. }) => {
                (held, source_time) = (frozen, taken);
                let now = self.following.labels.at(wall_clock());
                if streams && self.following.streams.is_empty() {
                    tracing::info!(?disks, "every write is known from here on");
                    disks.iter().for_each(|disk| self.step(*disk, "data", "a window stays open"));
                    self.following.streams.extend(disks);
                }
                // Blocks are read before the records that overlay them, and what could not be read may have been written since.
                let first_record = batches.iter().position(|batch| batch.kind == Stretch::Ordered);
                for (number, batch) in batches.into_iter().enumerate() {
                    if Some(number) == first_record {
                        self.note_window_unread(&unread);
                    }
                    self.handle_batch_sent(&batch);
                    self.core.submit_delta(batch.disk, batch.kind, now, batch.records);
                }
                if first_record.is_none() {
                    self.note_window_unread(&unread);
                }
                if let Some(why) = &open {
                    tracing::warn!("no consistent moment was found, the point is fuzzy: {why}");
                }
                self.following.note_window(open.as_deref());
                if open.is_none() && known { MarkClass::Crash } else { MarkClass::Fuzzy }
            }
            Err(why) => {
                tracing::warn!("no consistent moment was looked for, the point is fuzzy: {why}");
                self.following.note_window(Some(&why));
                self.drop_window(disks.iter().copied());
                MarkClass::Fuzzy
            }
        };
        self.end_window(class, source_time, held);
    }
}
