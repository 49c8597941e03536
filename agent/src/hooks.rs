//! The operator's programs around a freeze: `pre_freeze` brings an application to rest, `post_thaw` lets it go on.
//!
//! An application that was brought to rest and is forgotten stands still for ever, so a file in the state directory says
//! what `post_thaw` is due, from before `pre_freeze` is begun until `post_thaw` has succeeded; an agent that finds it at its
//! start ends a `pre_freeze` that still runs, and runs that `post_thaw`, whatever the configuration says by then.
//! Invariants: `post_thaw` never runs beside the `pre_freeze` it belongs to; a program that reaches its limit is ended with everything it started; what it
//! says is kept up to `OUTPUT_BYTES_MAX`, the rest is read and dropped; nothing here blocks a thread. Units: bytes.
//! Called by `quiescing` and `daemon`.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reprotect_engine::io::durable::{Access, read_bounded, replace_file};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Says that `post_thaw` is due, in the state directory.
const DUE_FILE: &str = "post-thaw-due";
/// Largest such file.
const DUE_BYTES_MAX: u64 = 64 << 10;
/// In the environment of hooks: the point.
const POINT_VARIABLE: &str = "REPROTECT_POINT";
/// Of what a hook says, this much is kept.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Of that, this much is repeated in an error: its end.
const TAIL_BYTES_MAX: usize = 400;
/// A hook that was told to end has this long to do so.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// Output may be written until this long after a hook's end, by what it left running.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

/// When a hook is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookKind {
    /// Before the file systems are frozen.
    PreFreeze,
    /// After they were thawed.
    PostThaw,
}

impl HookKind {
    /// As in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreFreeze => "pre_freeze",
            Self::PostThaw => "post_thaw",
        }
    }
}

/// The configured hooks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Program and arguments; empty for none.
    pub pre_freeze: Vec<String>,
    /// Program and arguments; empty for none.
    pub post_thaw: Vec<String>,
    /// How long each may take.
    pub limit: Duration,
}

/// Why a hook did not do its work. Each text ends with the end of what the hook said.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("the {} hook `{program}` cannot be started: {source}; correct `hooks.{}`", kind.name(), kind.name())]
    Start {
        /// Which.
        kind: HookKind,
        /// Its program.
        program: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// It failed.
    #[error("the {} hook `{program}` ended with {status}{}; run it by hand to see why", kind.name(), said(tail))]
    Failed {
        /// Which.
        kind: HookKind,
        /// Its program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        tail: String,
    },
    /// It hung.
    #[error("the {} hook `{program}` was ended after {limit:?}{}; make it faster, or raise `hooks.limit`", kind.name(), said(tail))]
    TooSlow {
        /// Which.
        kind: HookKind,
        /// Its program.
        program: String,
        /// Its limit.
        limit: Duration,
        /// The end of what it said.
        tail: String,
    },
    /// Nobody waits for it any more.
    #[error("the {} hook `{program}` was ended, because its point was given up{}", kind.name(), said(tail))]
    GivenUp {
        /// Which.
        kind: HookKind,
        /// Its program.
        program: String,
        /// The end of what it said.
        tail: String,
    },
    /// It cannot be remembered that the other hook is due.
    #[error("{0}; without it an application could be left at rest, so no hook is run")]
    Record(#[from] reprotect_engine::io::durable::DurableError),
}

/// What is due since `pre_freeze` was begun.
#[derive(Debug, Serialize, Deserialize)]
struct Due {
    point: String,
    hooks: Hooks,
    /// The group of the processes of `pre_freeze`.
    group: Option<i32>,
}

impl Due {
    fn store(&self, state_dir: &Path) -> Result<(), HookError> {
        let bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        Ok(replace_file(&state_dir.join(DUE_FILE), &bytes, Access::Private)?)
    }
}

fn said(tail: &str) -> String {
    if tail.is_empty() { String::new() } else { format!(" and said: {tail}") }
}

impl Hooks {
    /// Whether applications can be brought to rest.
    #[must_use]
    pub const fn is_configured(&self) -> bool {
        !self.pre_freeze.is_empty()
    }

    fn command(&self, kind: HookKind) -> &[String] {
        match kind {
            HookKind::PreFreeze => &self.pre_freeze,
            HookKind::PostThaw => &self.post_thaw,
        }
    }

    /// Brings the application to rest for `point`; ends the hook when `given_up` comes. Whatever comes of it,
    /// [`Self::release`] is due.
    ///
    /// # Errors
    /// Any [`HookError`].
    pub async fn rest(
        &self,
        point: &str,
        state_dir: &Path,
        given_up: impl Future<Output = ()>,
    ) -> Result<(), HookError> {
        let due = |group| Due { point: point.to_owned(), hooks: self.clone(), group };
        due(None).store(state_dir)?;
        let begun = |group: Option<Pid>| {
            // Without it, a hook that outlives a killed agent is not ended by the next one.
            if let Err(error) = due(group.map(|group| group.as_raw_nonzero().get())).store(state_dir) {
                tracing::warn!("{error}");
            }
        };
        self.run(HookKind::PreFreeze, point, begun, given_up).await
    }

    /// Lets the application go on.
    ///
    /// # Errors
    /// Any [`HookError`] of the hook.
    pub async fn release(&self, point: &str, state_dir: &Path) -> Result<(), HookError> {
        self.run(HookKind::PostThaw, point, drop, std::future::pending()).await?;
        // Where it failed the next start tries it again.
        let due = state_dir.join(DUE_FILE);
        if let Err(error) = std::fs::remove_file(&due) {
            tracing::warn!(path = %due.display(), %error, "cannot be removed; the next start runs the post_thaw hook again");
        }
        Ok(())
    }

    async fn run(
        &self,
        kind: HookKind,
        point: &str,
        begun: impl FnOnce(Option<Pid>),
        given_up: impl Future<Output = ()>,
    ) -> Result<(), HookError> {
        let Some((program, arguments)) = self.command(kind).split_first() else { return Ok(()) };
        let start = |source| HookError::Start { kind, program: program.clone(), source };
        let mut child = tokio::process::Command::new(program)
            .args(arguments)
            .env("REPROTECT_HOOK", kind.name())
            .env(POINT_VARIABLE, point)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(start)?;
        let output = Output::default();
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let readers = [
            child.stdout.take().map(|pipe| output.follow(pipe)),
            child.stderr.take().map(|pipe| output.follow(pipe)),
        ];
        begun(group);
        let (mut late, mut unwanted) = (false, false);
        let ended = tokio::select! {
            status = child.wait() => Some(status),
            () = tokio::time::sleep(self.limit) => { late = true; None }
            () = given_up => { unwanted = true; None }
        };
        let status = match ended {
            Some(status) => status.map_err(start)?,
            None => end_group(&mut child, group).await.map_err(start)?,
        };
        for reader in readers.into_iter().flatten() {
            let abort = reader.abort_handle();
            if tokio::time::timeout(OUTPUT_GRACE, reader).await.is_err() {
                abort.abort();
            }
        }
        let (program, tail) = (program.clone(), output.tail());
        tracing::info!(hook = kind.name(), program, %status, output = tail, "a hook ended");
        if unwanted {
            return Err(HookError::GivenUp { kind, program, tail });
        }
        if late {
            return Err(HookError::TooSlow { kind, program, limit: self.limit, tail });
        }
        if status.success() { Ok(()) } else { Err(HookError::Failed { kind, program, status, tail }) }
    }
}

/// Ends a hook and what it started, gently first.
async fn end_group(child: &mut tokio::process::Child, group: Option<Pid>) -> std::io::Result<ExitStatus> {
    let signal = |signal| {
        // A group that is gone needs no signal.
        if let Some(group) = group {
            let _ = kill_process_group(group, signal);
        }
    };
    signal(Signal::TERM);
    let ended = tokio::time::timeout(TERM_GRACE, child.wait()).await;
    // What it started may live on, whether it ended itself or not.
    signal(Signal::KILL);
    match ended {
        Ok(status) => status,
        Err(_) => child.wait().await,
    }
}

/// What a hook said.
#[derive(Clone, Debug, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    /// Reads to the end, so that the hook never waits for us.
    fn follow(&self, mut pipe: impl AsyncRead + Unpin + Send + 'static) -> tokio::task::JoinHandle<()> {
        let kept = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(count) = pipe.read(&mut buffer).await
                && count > 0
            {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
                kept.extend(buffer.iter().take(count.min(room)));
            }
        })
    }

    fn tail(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept);
        let text = text.trim();
        let skip = text.len().saturating_sub(TAIL_BYTES_MAX);
        let start = (skip..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(skip);
        text.get(start..).unwrap_or_default().to_owned()
    }
}

/// Whether a `post_thaw` is due since an agent before this one.
#[must_use]
pub fn is_release_due(state_dir: &Path) -> bool {
    state_dir.join(DUE_FILE).exists()
}

/// Runs the `post_thaw` that an agent before this one left, once its `pre_freeze` is over; by `hooks` where it cannot be
/// read which one that was.
///
/// # Errors
/// Any [`HookError`] of the hook.
pub async fn release_left_behind(hooks: &Hooks, state_dir: &Path) -> Result<(), HookError> {
    let bytes = read_bounded(&state_dir.join(DUE_FILE), DUE_BYTES_MAX).unwrap_or_default();
    let due: Option<Due> = serde_json::from_slice(&bytes).ok();
    let due = due.unwrap_or_else(|| Due { point: String::new(), hooks: hooks.clone(), group: None });
    if let Some(group) = due.group.filter(|group| is_hook(*group, &due.point)).and_then(Pid::from_raw) {
        tracing::warn!("the pre_freeze hook of an agent that was killed still runs; it is ended");
        for signal in [Signal::TERM, Signal::KILL] {
            // A group that is gone needs no signal.
            let _ = kill_process_group(group, signal);
            tokio::time::sleep(TERM_GRACE).await;
        }
    }
    due.hooks.release(&due.point, state_dir).await
}

/// Whether the process is the hook that was begun for `point`, and not another one with its number.
fn is_hook(process: i32, point: &str) -> bool {
    let wanted = format!("{POINT_VARIABLE}={point}");
    let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    fn shell(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
    }

    fn hooks(pre_freeze: &str, post_thaw: &str, limit: Duration) -> Hooks {
        Hooks { pre_freeze: shell(pre_freeze), post_thaw: shell(post_thaw), limit }
    }

    /// The process that a hook wrote down.
    fn left(file: &Path) -> Pid {
        let text = std::fs::read_to_string(file).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    /// Whether it runs; one that ended and that nobody asked for yet does not.
    fn lives(process: Pid) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    async fn until_gone(process: Pid) {
        for _ in 0..500 {
            if !lives(process) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{process:?} lives on");
    }

    #[tokio::test]
    async fn a_hook_is_told_what_it_is_for_and_the_other_one_is_due_until_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("echo $REPROTECT_HOOK $REPROTECT_POINT >> {}", out.display());
        let hooks = hooks(&script, &script, Duration::from_secs(60));
        hooks.rest("a1", dir.path(), pending()).await.unwrap();
        assert!(is_release_due(dir.path()));
        hooks.release("a1", dir.path()).await.unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "pre_freeze a1\npost_thaw a1\n");
        assert!(!is_release_due(dir.path()));
    }

    #[tokio::test]
    async fn a_hook_that_fails_is_named_with_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks("echo one; echo two >&2; exit 3", "true", Duration::from_secs(60));
        let error = hooks.rest("a1", dir.path(), pending()).await.unwrap_err().to_string();
        for part in ["pre_freeze", "/bin/sh", "exit status: 3", "one", "two"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(is_release_due(dir.path()), "it may have done half of its work");
        let missing = Hooks { pre_freeze: vec!["/nowhere/hook".to_owned()], ..hooks };
        let error = missing.rest("a1", dir.path(), pending()).await.unwrap_err().to_string();
        assert!(error.contains("/nowhere/hook") && error.contains("hooks.pre_freeze"), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let started = dir.path().join("started");
        // It ignores the gentle signal, and what it started holds the pipe open.
        let script = format!("trap '' TERM; sleep 1000 & echo $! > {}; echo begun; wait", started.display());
        let hooks = hooks(&script, "true", Duration::from_secs(1));
        let error = hooks.rest("a1", dir.path(), pending()).await.unwrap_err();
        assert!(matches!(error, HookError::TooSlow { .. }), "{error}");
        assert!(error.to_string().contains("begun"), "{error}");
        until_gone(left(&started)).await;
    }

    #[tokio::test]
    async fn a_hook_that_outlives_its_agent_is_ended_before_the_other_one_runs_as_it_was_configured() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let rest = format!("echo begun >> {0}; sleep 100; echo rests >> {0}", log.display());
        let release = format!("echo goes on >> {}", log.display());
        let hooks = hooks(&rest, &release, Duration::from_secs(60));
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        {
            // The agent is killed: nobody waits for the hook, and nobody ends it.
            let begun = std::pin::pin!(hooks.rest("a1", dir.path(), pending()));
            let until_begun = async {
                while said().is_empty() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! { _ = begun => panic!("it ended"), () = until_begun => {} }
        }
        release_left_behind(&Hooks::default(), dir.path()).await.unwrap();
        assert_eq!(said(), "begun\ngoes on\n");
        assert!(!is_release_due(dir.path()));
    }

    #[tokio::test]
    async fn a_hook_whose_point_is_given_up_is_ended_and_a_release_that_fails_stays_due() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks("sleep 100", "exit 1", Duration::from_secs(60));
        let given_up = tokio::time::sleep(Duration::from_millis(50));
        let error = hooks.rest("a1", dir.path(), given_up).await.unwrap_err();
        assert!(matches!(error, HookError::GivenUp { .. }), "{error}");
        assert!(hooks.release("a1", dir.path()).await.is_err());
        assert!(is_release_due(dir.path()), "the next start tries again");
    }

    #[tokio::test]
    async fn a_hook_may_say_much_and_leave_something_running() {
        let dir = tempfile::tempdir().unwrap();
        let started = dir.path().join("started");
        let script = format!(
            "head -c 1000000 /dev/zero | tr '\\0' x; sleep 1000 & echo $! > {}; echo end",
            started.display()
        );
        let hooks = hooks(&script, "true", Duration::from_secs(60));
        hooks.rest("a1", dir.path(), pending()).await.unwrap();
        let left = left(&started);
        assert!(lives(left), "what it left running is its own affair, and was not waited for");
        let _ = rustix::process::kill_process(left, Signal::KILL);
    }
}
