//! Frozen file systems while a moment is taken.
//!
//! Invariants: the calls that freeze are made on a thread of their own, because they wait for the file systems to write out
//! what they hold, and those writes must be kept up with; a call that outlasts its limit is given up, and thaws as
//! soon as it returns; between the last freeze and the thaw nothing here logs, writes or waits. Called by `capturing`.

use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use crate::capture::Moment;
use crate::freeze::{Freeze, FreezeEnd};

/// A freeze on its way through a moment.
#[derive(Debug)]
pub(super) struct HeldFreeze {
    stage: Stage,
    limit: Duration,
}

#[derive(Debug)]
enum Stage {
    /// Nothing is to be frozen, or no moment was near enough.
    Nothing,
    Prepared(Freeze),
    Freezing(Receiver<Result<Freeze, String>>, Instant),
    Frozen(Freeze),
    Over(Result<FreezeEnd, String>),
}

impl HeldFreeze {
    /// `freeze` is prepared, and may take `limit` for its calls.
    pub(super) fn new(freeze: Option<Freeze>, limit: Duration) -> Self {
        Self { stage: freeze.map_or(Stage::Nothing, Stage::Prepared), limit }
    }

    /// Whether any moment will do.
    pub(super) const fn is_any(&self) -> bool {
        matches!(self.stage, Stage::Nothing)
    }

    /// How it went; `None` where there was nothing to freeze.
    pub(super) fn into_result(self) -> Option<Result<FreezeEnd, String>> {
        match self.stage {
            Stage::Nothing => None,
            Stage::Over(result) => Some(result),
            Stage::Prepared(_) | Stage::Freezing(..) | Stage::Frozen(_) => {
                Some(Err("no moment was found to freeze at".to_owned()))
            }
        }
    }
}

/// Freezes on a thread of its own; a receiver that is gone means that nobody waits any more, and everything is thawed.
fn begin(mut freeze: Freeze) -> Result<Receiver<Result<Freeze, String>>, String> {
    let (told, frozen) = channel();
    let work = move || {
        let result = freeze.freeze();
        drop(told.send(result.map(|()| freeze).map_err(|error| error.to_string())));
    };
    match std::thread::Builder::new().name("freeze".into()).spawn(work) {
        Ok(_) => Ok(frozen),
        Err(error) => Err(format!("no thread to freeze file systems: {error}; raise the limit on processes")),
    }
}

impl Moment for HeldFreeze {
    fn is_ready(&mut self) -> bool {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Prepared(freeze) => match begin(freeze) {
                Ok(frozen) => Stage::Freezing(frozen, Instant::now() + self.limit),
                Err(why) => Stage::Over(Err(why)),
            },
            Stage::Freezing(frozen, until) => match frozen.try_recv() {
                Ok(Ok(freeze)) => Stage::Frozen(freeze),
                Ok(Err(why)) => Stage::Over(Err(why)),
                Err(TryRecvError::Disconnected) => Stage::Over(Err("the freezing thread ended".to_owned())),
                Err(TryRecvError::Empty) if Instant::now() >= until => Stage::Over(Err(format!(
                    "freezing takes longer than {:?}; allow more with --freeze-limit, or look why the file systems are slow to write out",
                    self.limit
                ))),
                Err(TryRecvError::Empty) => Stage::Freezing(frozen, until),
            },
            stage => stage,
        };
        !matches!(self.stage, Stage::Prepared(_) | Stage::Freezing(..))
    }

    fn is_over(&mut self) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Frozen(freeze) => Stage::Over(Ok(freeze.end())),
            stage => stage,
        };
    }
}
