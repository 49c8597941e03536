//! Disks whose waiting entries were given up are taken again as soon as the retention drive has room, without a restart; and
//! so are those that a start could not open because a drive was full. Disks that went back to a point are offered again.
//!
//! Invariants: the former not while the drive is as full as when they were given up; one that cannot be opened is tried again
//! after a pause; it stops nothing else. Units: none. Runs on a thread of its own, started by `daemon`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::units::DiskId;

use crate::registry::Registry;
use crate::retention::Retention;

/// How often it is looked whether there are any.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Pause after one could not be opened.
const RETRY: Duration = Duration::from_secs(30);
/// How often the end of the daemon is noticed.
const STOP_CHECK: Duration = Duration::from_millis(100);

/// Starts the thread; it ends with the daemon.
///
/// # Errors
/// When the system gives no thread.
pub(crate) fn start(
    registry: &Arc<Registry>,
    retention: &Arc<Retention>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let (registry, retention) = (Arc::clone(registry), Arc::clone(retention));
    std::thread::Builder::new().name("again".to_owned()).spawn(move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&registry, &retention))) {
            tracing::error!(
                ?panic,
                "a defect of the master target: disks that were given up wait for a restart"
            );
        }
    })
}

fn run(registry: &Registry, retention: &Retention) {
    while !retention.is_stopping() {
        let tried = [take_again(registry, retention), start_again(registry)].concat();
        let all_open = tried.iter().all(|(_, is_open)| *is_open);
        let until = Instant::now() + if all_open { LOOK_EVERY } else { RETRY };
        while Instant::now() < until && !retention.is_stopping() {
            registry.offer_what_went_back();
            std::thread::sleep(STOP_CHECK);
        }
    }
}

/// One look; answers the disks that were tried, and whether they are open.
pub(crate) fn take_again(registry: &Registry, retention: &Retention) -> Vec<(DiskId, bool)> {
    if retention.pressure() >= Pressure::Least {
        return Vec::new();
    }
    let given_up: Vec<DiskId> = match retention.lock().get() {
        Ok(journal) => journal.given_up().iter().copied().collect(),
        Err(_) => Vec::new(), // the daemon stops
    };
    let take = |disk: DiskId| {
        let taken = registry.take_again(disk).unwrap_or_else(|error| {
            tracing::warn!(%disk, "a disk that was given up cannot be taken again: {error:#}");
            false
        });
        (disk, taken)
    };
    given_up.into_iter().map(take).collect()
}

/// One look at those that wait for space since the start; answers as [`take_again`] does.
pub(crate) fn start_again(registry: &Registry) -> Vec<(DiskId, bool)> {
    let start = |disk: DiskId| {
        let started = registry.start_again(disk).unwrap_or_else(|error| {
            tracing::warn!(%disk, "a disk that waits for space cannot be opened: {error:#}");
            false
        });
        (disk, started)
    };
    registry.waiting_for_space().into_iter().map(start).collect()
}
