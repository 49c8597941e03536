//! Bringing the machine to rest for a point: applications by the operator's hooks, file systems by freezing them.
//!
//! ```text
//! Quiescing (pre_freeze hook; file systems write out) ─▶ Closing    (a window in which everything is frozen: milliseconds)
//!                                                    └─▶ Freezing ─▶ Reading ─▶ Thawing    (a scanned disk: while it is read)
//! ```
//! Invariants: whatever becomes of the run, what was frozen is thawed first and the post_thaw hook runs then; news that
//! are not of the present run thaw and do nothing else; nothing here blocks the session's task. Units: milliseconds.
//! Part of `machine`, steps of a run of `marking`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::capturing::ToFreeze;
use crate::disks::{SystemRoot, enumerate};
use crate::freeze::{Freeze, FreezeEnd, FreezeError, Limits, write_out_all};
use crate::hooks::{self, HookError, Hooks};
use crate::machine::Machine;
use crate::marking::{Asker, MarkRun, Phase, hex};

/// How long everything may stay frozen in a window: the moment itself takes microseconds.
const HELD_LIMIT: Duration = Duration::from_millis(500);
/// A window that is looked for while something rests must have come to its end after this.
const WINDOW_LIMIT: Duration = Duration::from_secs(15);
/// A point of the application schedule that could not be made is tried again after a tenth of the schedule's pause, but not
/// sooner than this.
const RETRY_MIN: Duration = Duration::from_secs(60);

/// News from the threads that bring to rest, freeze and thaw.
#[derive(Debug)]
pub(crate) enum FreezeNews {
    /// Applications rest or not, file systems are ready to be frozen or not.
    Quiesced {
        /// The pre_freeze hook was run.
        rests: bool,
        /// Why applications do not rest, if one of them was asked to and failed.
        hook: Option<String>,
        /// `None` where nothing is mounted.
        prepared: Result<Option<Freeze>, String>,
    },
    /// Everything is frozen, or nothing is, and why.
    Begun(Result<Freeze, String>),
    /// Everything is thawed.
    Ended(FreezeEnd),
    /// The post_thaw hook is over, and what went wrong.
    Released(Option<String>),
}

/// Where the threads tell, each of the run with this point.
pub(crate) type Freezer = mpsc::UnboundedSender<([u8; 16], FreezeNews)>;

/// How far the applications are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rest {
    /// No hook was run.
    #[default]
    NotAsked,
    /// The pre_freeze hook runs: the post_thaw hook is due.
    Asked,
    /// It failed, and may have done half of its work.
    Troubled,
    /// It rests.
    Resting,
    /// The post_thaw hook runs.
    Releasing,
    /// It ended.
    Released,
}

/// What a run has to do with rest.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    pub(crate) rest: Rest,
    /// Frozen now, where disks are scanned.
    pub(crate) freeze: Option<Freeze>,
    /// What is or was frozen.
    pub(crate) mounts: Vec<PathBuf>,
    /// How the freeze went.
    pub(crate) end: Option<FreezeEnd>,
    /// What hooks that failed said.
    pub(crate) problems: Vec<String>,
    /// The file systems were looked for.
    pub(crate) looked: bool,
    /// None is mounted: applications work on bare disks.
    pub(crate) bare: bool,
    /// Looks for a moment so far.
    pub(crate) tries: u32,
    /// Nothing rests for longer, however many moments are looked for.
    until: Option<Instant>,
    /// When the state that was read while frozen was over.
    pub(crate) taken: Option<Timestamp>,
    /// The hooks of this run, whatever the configuration says by now.
    hooks: Hooks,
    /// Ends the pre_freeze hook by being dropped, and who runs it.
    resting: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Quiet {
    /// When a step that may take so long is given up.
    fn deadline(&self, step: Duration) -> Option<Instant> {
        let at = Instant::now() + step;
        Some(self.until.map_or(at, |until| until.min(at)))
    }

    /// Whether there is time for another look for a moment.
    pub(crate) fn has_time(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }

    /// The mount points that were frozen.
    pub(crate) fn frozen(&self) -> Vec<String> {
        let unfrozen = |path: &PathBuf| self.end.as_ref().is_some_and(|end| end.unfrozen.contains(path));
        let held = self.end.as_ref().is_some_and(|end| end.held);
        let frozen = self.mounts.iter().filter(|path| held && !unfrozen(path));
        frozen.map(|path| path.display().to_string()).collect()
    }

    /// What an operator should know of it.
    pub(crate) fn all_problems(&self) -> Vec<String> {
        let unfrozen = self.end.iter().flat_map(|end| &end.unfrozen);
        let text = |path: &PathBuf| {
            format!("{} is of a kind that cannot be frozen; it was written out just before", path.display())
        };
        self.problems.iter().cloned().chain(unfrozen.map(text)).collect()
    }

    /// What a point promises that is made now: everything that was frozen held.
    pub(crate) fn class(&self, app: bool) -> MarkClass {
        let frozen = self.end.as_ref().is_some_and(|end| end.held);
        match self.rest {
            Rest::Resting if app && (frozen || self.bare) => MarkClass::App,
            _ if frozen => MarkClass::Frozen,
            _ => MarkClass::Crash,
        }
    }
}

/// When the next point of the application schedule is due.
#[derive(Debug)]
pub(crate) struct AppSchedule {
    next: Instant,
}

impl AppSchedule {
    /// The first one comes a whole pause after the start.
    pub(crate) fn new(pause: Duration) -> Self {
        Self { next: Instant::now() + pause }
    }

    /// Another pause holds.
    pub(crate) fn hurry(&mut self, pause: Duration) {
        self.next = self.next.min(Instant::now() + pause);
    }

    pub(crate) fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// A point was made, or could not be.
    pub(crate) fn ended(&mut self, made: bool, pause: Duration) {
        let pause = if made { pause } else { (pause / 10).max(RETRY_MIN).min(pause) };
        self.next = Instant::now() + pause;
    }
}

impl Machine {
    /// Brings everything to rest that is to be, and tells when the file systems can be frozen.
    pub(crate) fn begin_quiescing(&mut self, to_window: bool) {
        let hooks = self.plan().settings.hooks.clone();
        let state_dir = self.plan().settings.places.state_dir.clone();
        let devices: Vec<String> = self.disks.values().map(|state| state.path.clone()).collect();
        let Some(run) = self.marking.as_mut() else { return };
        let limit = Duration::from_millis(run.order.request.freeze_limit_ms);
        let limits = Limits { in_all: limit, held: if to_window { HELD_LIMIT } else { limit } };
        // In a second look for a moment applications rest already.
        let asks = run.order.request.app && hooks.is_configured() && run.quiet.rest == Rest::NotAsked;
        if asks && self.releasing {
            return; // one post_thaw hook after another; the clock asks again
        }
        run.phase = Phase::Quiescing { to_window };
        run.quiet.looked = true;
        run.quiet.tries += 1;
        // Writing out, the hook, and the freeze: nothing rests without end.
        let in_all = limit + hooks.limit + limit;
        run.quiet.until.get_or_insert_with(|| Instant::now() + in_all + WINDOW_LIMIT);
        run.deadline = run.quiet.deadline(in_all);
        if asks {
            run.quiet.rest = Rest::Asked;
            run.quiet.hooks = hooks.clone();
        }
        let (give_up, given_up) = oneshot::channel::<()>();
        let (point, news) = (run.point, self.freezer.clone());
        let task = tokio::spawn(async move {
            let mut given_up = given_up;
            let prepared = |devices: Vec<String>, state_dir: PathBuf| {
                blocking(move || prepare(&mount_points(&devices)?, limits, &state_dir))
            };
            // What is written out before applications rest need not be written out while they do.
            let before = devices.clone();
            let written = blocking(move || mount_points(&before).map(|mounts| write_out_all(&mounts))).await;
            if !asks {
                let prepared = prepared(devices, state_dir).await;
                drop(news.send((point, FreezeNews::Quiesced { rests: false, hook: None, prepared })));
                return;
            }
            if let Err(error) = written {
                // Nothing is lost but time: the freeze finds it out, too.
                tracing::warn!(error, "what is mounted could not be written out before applications rest");
            }
            let hook = hooks.rest(&hex(&point), &state_dir, gone(&mut given_up)).await.err();
            let prepared = if matches!(hook, Some(HookError::GivenUp { .. })) {
                Ok(None)
            } else {
                prepared(devices, state_dir.clone()).await
            };
            // Given up: the run is over, and said so by dropping its end.
            let over = !matches!(given_up.try_recv(), Err(oneshot::error::TryRecvError::Empty));
            if over {
                drop(prepared);
                return release(hooks, point, state_dir, news).await;
            }
            let hook = hook.map(|error| error.to_string());
            // A machine that is gone meanwhile drops it: nothing is frozen.
            drop(news.send((point, FreezeNews::Quiesced { rests: true, hook, prepared })));
        });
        run.quiet.resting = Some((give_up, task));
    }

    /// A thread is done.
    pub(crate) fn handle_freeze_news(&mut self, point: [u8; 16], news: FreezeNews) {
        if let FreezeNews::Released(problem) = &news {
            self.releasing = false;
            if problem.is_some() {
                self.hook_problem.clone_from(problem);
            }
        }
        let Some(run) = self.marking.as_mut().filter(|run| run.point == point) else {
            return self.handle_late_news(point, news);
        };
        match (news, &run.phase) {
            (FreezeNews::Quiesced { hook, prepared, .. }, Phase::Quiescing { to_window }) => {
                let to_window = *to_window;
                self.handle_quiesced(hook, prepared, to_window);
            }
            (FreezeNews::Begun(Ok(freeze)), Phase::Freezing) => {
                tracing::info!(mounts = ?run.quiet.mounts, "file systems frozen");
                run.quiet.freeze = Some(freeze);
                run.phase = Phase::Reading { begun: BTreeSet::new(), read: BTreeSet::new() };
                self.advance_run();
            }
            (FreezeNews::Begun(Err(reason)), Phase::Freezing) => self.go_on_unfrozen(&reason),
            (FreezeNews::Ended(end), Phase::Thawing) => {
                if !end.held {
                    return self.fail_run(LATE_TEXT);
                }
                tracing::info!(call = ?end.call, frozen = ?end.frozen, "file systems thawed");
                run.quiet.end = Some(end);
                let class = run.quiet.class(run.order.request.app);
                let taken = run.quiet.taken.unwrap_or_default();
                self.place_marks(class, taken);
            }
            (FreezeNews::Released(problem), _) => {
                run.quiet.rest = Rest::Released;
                run.quiet.problems.extend(problem);
                self.advance_run();
            }
            (news, _) => self.handle_late_news(point, news),
        }
    }

    fn handle_quiesced(
        &mut self,
        hook: Option<String>,
        prepared: Result<Option<Freeze>, String>,
        to_window: bool,
    ) {
        let Some(run) = self.marking.as_mut() else { return };
        let commanded = matches!(run.order.asker, Asker::Command(_));
        if run.quiet.rest == Rest::Asked {
            self.hook_problem.clone_from(&hook);
            run.quiet.rest = if hook.is_some() { Rest::Troubled } else { Rest::Resting };
        }
        if let Some(problem) = hook {
            tracing::warn!("{problem}");
            if commanded {
                return self.fail_run(&problem);
            }
            // Its file systems are clean all the same.
            run.quiet.problems.push(problem);
        }
        let freeze = match prepared {
            Ok(freeze) => freeze,
            Err(reason) => return self.go_on_unfrozen(&reason),
        };
        let Some(freeze) = freeze else {
            run.quiet.bare = true;
            if run.quiet.rest == Rest::Resting && to_window {
                run.deadline = run.quiet.deadline(WINDOW_LIMIT);
                return self.close_window(None);
            }
            return self.go_on_unfrozen(&FreezeError::Nothing.to_string());
        };
        run.quiet.mounts = freeze.mount_points();
        let limit = Duration::from_millis(run.order.request.freeze_limit_ms);
        if to_window {
            // The window itself waits for old writes before it freezes.
            run.deadline = run.quiet.deadline(limit + WINDOW_LIMIT);
            return self.close_window(Some(ToFreeze { freeze, limit }));
        }
        run.deadline = run.quiet.deadline(limit);
        run.phase = Phase::Freezing;
        let (point, news) = (run.point, self.freezer.clone());
        thread("freeze", move || {
            let mut freeze = freeze;
            let frozen = freeze.freeze().map(|()| freeze).map_err(|error| error.to_string());
            // A machine that is gone meanwhile drops the freeze, which thaws.
            drop(news.send((point, FreezeNews::Begun(frozen))));
        });
    }

    /// Nothing can be frozen: what somebody asked for is refused, other points promise less.
    fn go_on_unfrozen(&mut self, reason: &str) {
        let Some(run) = self.marking.as_mut() else { return };
        if matches!(run.order.asker, Asker::Command(_)) {
            return self.fail_run(reason);
        }
        tracing::info!(reason, "the point is made without a freeze");
        if let Phase::Quiescing { to_window: true } = run.phase {
            run.deadline = run.quiet.deadline(WINDOW_LIMIT);
            return self.close_window(None);
        }
        run.deadline = None;
        run.phase = Phase::Reading { begun: BTreeSet::new(), read: BTreeSet::new() };
        // Reading takes as long as it takes, and promises nothing that rest would help.
        drop(self.release_run());
        self.advance_run();
    }

    /// Thaws off this task.
    pub(crate) fn begin_thawing(&mut self, freeze: Freeze) {
        let Some(run) = self.marking.as_mut() else { return };
        run.phase = Phase::Thawing;
        run.quiet.taken = Some(wall_clock());
        let (point, news) = (run.point, self.freezer.clone());
        thread("thaw", move || drop(news.send((point, FreezeNews::Ended(freeze.end())))));
    }

    /// Applications of the run go on, once what is left frozen is thawed and their pre_freeze hook is over; answers what
    /// runs, so that a daemon that ends can wait for it.
    pub(crate) fn release_run(&mut self) -> Option<JoinHandle<()>> {
        let MarkRun { point, quiet, .. } = self.marking.as_mut()?;
        let (point, freeze, resting) = (*point, quiet.freeze.take(), quiet.resting.take());
        if !matches!(quiet.rest, Rest::Asked | Rest::Troubled | Rest::Resting) {
            if let Some(freeze) = freeze {
                thread("thaw", move || drop(freeze));
            }
            return None;
        }
        self.releasing = true;
        if std::mem::replace(&mut quiet.rest, Rest::Releasing) == Rest::Asked {
            // The task that runs the hook learns that it is given up, and releases when the hook is over.
            return resting.map(|(_, task)| task);
        }
        let (hooks, news) = (quiet.hooks.clone(), self.freezer.clone());
        let state_dir = self.plan().settings.places.state_dir.clone();
        Some(tokio::spawn(async move {
            // An error is a panic of the thaw, whose drop has thawed.
            let _ = tokio::task::spawn_blocking(move || drop(freeze)).await;
            release(hooks, point, state_dir, news).await;
        }))
    }

    /// What an agent before this one left at rest goes on.
    pub(crate) fn release_left_behind(&mut self) {
        let settings = &self.plan().settings;
        let (hooks, state_dir) = (settings.hooks.clone(), settings.places.state_dir.clone());
        if !hooks::is_release_due(&state_dir) {
            return;
        }
        tracing::warn!("an agent that was killed left applications at rest; its post_thaw hook is run");
        self.releasing = true;
        let news = self.freezer.clone();
        drop(tokio::spawn(async move {
            let problem = hooks::release_left_behind(&hooks, &state_dir).await.err();
            tell_released([0; 16], problem, &news);
        }));
    }

    /// A run is over whose applications may rest: news that come late must not leave them so.
    fn handle_late_news(&mut self, point: [u8; 16], news: FreezeNews) {
        let rests = matches!(&news, FreezeNews::Quiesced { rests: true, .. });
        thaw_late(news);
        if rests {
            let settings = &self.plan().settings;
            let (hooks, state_dir) = (settings.hooks.clone(), settings.places.state_dir.clone());
            let news = self.freezer.clone();
            drop(tokio::spawn(async move {
                // As they were configured when they were asked to rest.
                let problem = hooks::release_left_behind(&hooks, &state_dir).await.err();
                tell_released(point, problem, &news);
            }));
        }
    }
}

/// Comes when the other end is dropped.
async fn gone(other: &mut oneshot::Receiver<()>) {
    // Nothing is ever sent.
    let _ = other.await;
}

/// Applications go on, and the machine is told.
async fn release(hooks: Hooks, point: [u8; 16], state_dir: PathBuf, news: Freezer) {
    let problem = hooks.release(&hex(&point), &state_dir).await.err();
    tell_released(point, problem, &news);
}

fn tell_released(point: [u8; 16], problem: Option<HookError>, news: &Freezer) {
    let problem = problem.map(|error| error.to_string());
    if let Some(problem) = &problem {
        tracing::error!("{problem}");
    }
    drop(news.send((point, FreezeNews::Released(problem))));
}

/// News that nobody waits for.
fn thaw_late(news: FreezeNews) {
    if let FreezeNews::Begun(Ok(freeze)) | FreezeNews::Quiesced { prepared: Ok(Some(freeze)), .. } = news {
        thread("thaw", move || drop(freeze));
    }
}

pub(crate) const LATE_TEXT: &str = "the file systems were frozen for as long as they may be and not everything was read; they are thawed, no point was made; allow more time with --freeze-limit, or raise `read_rate`";

/// Does what blocks off the session's task.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}

/// What is mounted there, ready to be frozen; `None` where nothing is. Blocks.
fn prepare(mounts: &[PathBuf], limits: Limits, state_dir: &Path) -> Result<Option<Freeze>, String> {
    match Freeze::prepare(mounts, limits, state_dir) {
        Ok(freeze) => Ok(Some(freeze)),
        Err(FreezeError::Nothing) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_step_lasts_longer_than_everything_may() {
        let until = Instant::now() + Duration::from_secs(10);
        let quiet = Quiet { until: Some(until), ..Quiet::default() };
        assert_eq!(quiet.deadline(Duration::from_secs(60)), Some(until));
        assert!(quiet.deadline(Duration::from_secs(1)).is_some_and(|at| at < until));
        assert!(quiet.has_time());
        let over = Quiet { until: Some(Instant::now()), ..Quiet::default() };
        assert!(!over.has_time());
    }

    #[test]
    fn a_point_promises_what_was_held_and_no_more() {
        let (call, frozen) = (Duration::ZERO, Duration::ZERO);
        let end = |held| Some(FreezeEnd { held, call, frozen, unfrozen: Vec::new() });
        let rows = [
            (Rest::Resting, end(true), false, true, MarkClass::App),
            (Rest::Resting, None, true, true, MarkClass::App),
            (Rest::Resting, end(false), false, true, MarkClass::Crash),
            (Rest::Resting, None, false, true, MarkClass::Crash),
            (Rest::Troubled, end(true), false, true, MarkClass::Frozen),
            (Rest::NotAsked, end(true), false, true, MarkClass::Frozen),
            (Rest::Resting, end(true), false, false, MarkClass::Frozen),
            (Rest::NotAsked, None, true, true, MarkClass::Crash),
        ];
        for (rest, end, bare, app, class) in rows {
            let quiet = Quiet { rest, end, bare, ..Quiet::default() };
            assert_eq!(quiet.class(app), class, "{quiet:?}");
        }
    }
}
