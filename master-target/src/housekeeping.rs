//! What the retention journal gives back: old segments, points the ladder drops, undo runs that become one.
//!
//! Every two seconds segments past their time are released and new ones made ahead of need; the drive is looked at;
//! every half minute, or when the pressure rises, points are dropped and their runs merged or removed.
//!
//! Invariants: the newest point of a disk stays; a point that is read now stays; a run is merged without the lock,
//! while replication goes on; an error is told and tried again, it stops nothing. Units: bytes, times by the target's
//! clock; points are cut into slots by the source's. Runs on a thread of its own, started by `daemon`.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_engine::format::manifest::{Edit, EpochsExpired, PointDropped, PointKept};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::ladder::{Candidate, Ladder, Pressure, dropped, log_kept};
use reprotect_engine::store::journal::{DiskShape, JournalError, RunFile, Shape, thin};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::retention::Retention;

/// How often segments and the drive are looked at.
const TICK: Duration = Duration::from_secs(2);
/// How often points are thinned.
const THIN_EVERY: Duration = Duration::from_secs(30);
/// How often the end of the daemon is noticed.
const STOP_CHECK: Duration = Duration::from_millis(100);
/// Segments kept free ahead of need, the one for control entries included.
const FREE_SEGMENTS: usize = 2;

/// Starts the thread; it ends with the daemon.
///
/// # Errors
/// When the system gives no thread.
pub fn start(retention: &Arc<Retention>) -> std::io::Result<std::thread::JoinHandle<()>> {
    let retention = Arc::clone(retention);
    std::thread::Builder::new().name("housekeeping".to_owned()).spawn(move || {
        // Without it the drive fills up, and that stops replication in order; a panic must not do more than that.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&retention))) {
            tracing::error!(?panic, "a defect of the master target stopped its housekeeping; restart it");
        }
    })
}

fn run(retention: &Retention) {
    let mut thinned: Option<Instant> = None;
    while !retention.is_stopping() {
        let rose = look_at_drive(retention);
        if let Err(error) = keep_segments(retention) {
            tracing::warn!(%error, "segments of the retention journal could not be tidied up");
        }
        if rose || thinned.is_none_or(|at| at.elapsed() >= THIN_EVERY) {
            thinned = Some(Instant::now());
            if let Err(error) = thin_all(retention, wall_clock()) {
                tracing::warn!(%error, "points of the retention journal could not be thinned");
            }
        }
        let until = Instant::now() + TICK;
        while Instant::now() < until && !retention.is_stopping() {
            std::thread::sleep(STOP_CHECK);
        }
    }
}

/// Sets the pressure; answers whether it rose.
fn look_at_drive(retention: &Retention) -> bool {
    let Some(room) = Room::of(retention.folder()) else { return false };
    let pressure = room.pressure(retention.reserve_bytes());
    let before = retention.set_pressure(pressure);
    let folder = retention.folder().display();
    let (free, total) = (room.free_bytes, room.total_bytes);
    match pressure.cmp(&before) {
        std::cmp::Ordering::Greater => tracing::warn!(%folder, free, total, "{}", pressure.text()),
        std::cmp::Ordering::Less => tracing::info!(%folder, free, total, "{}", pressure.text()),
        std::cmp::Ordering::Equal => {}
    }
    pressure > before
}

/// The room of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may be written.
    pub free_bytes: u64,
    /// Bytes of the whole drive.
    pub total_bytes: u64,
}

impl Room {
    /// The room of the drive a folder is on; `None` when the system does not say.
    #[must_use]
    pub fn of(folder: &Path) -> Option<Self> {
        let facts = rustix::fs::statvfs(folder).ok()?;
        Some(Self {
            free_bytes: facts.f_bavail * facts.f_frsize,
            total_bytes: facts.f_blocks * facts.f_frsize,
        })
    }

    /// How full it is, when `reserve_bytes` are to stay free; of a small drive a twentieth at most.
    #[must_use]
    pub fn pressure(&self, reserve_bytes: u64) -> Pressure {
        let reserve = reserve_bytes.min(self.total_bytes / 20);
        Pressure::of(self.total_bytes.saturating_sub(self.free_bytes), self.total_bytes, reserve)
    }
}

/// Releases segments past their time, and makes room ahead of need.
fn keep_segments(retention: &Retention) -> Result<(), JournalError> {
    let (ladder, pressure) = (retention.ladder(), retention.pressure());
    let now = wall_clock();
    let old = now.0.saturating_sub(nanos(log_kept(&ladder, pressure)));
    loop {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        let Some(number) = journal.releasable().first().copied() else { break };
        if journal.newest_in(number).is_some_and(|newest| newest.0 > old) {
            break;
        }
        journal.release(number, now)?;
    }
    let mut locked = retention.lock();
    let journal = locked.get()?;
    // Segments are used again; when space is short, those beyond need go back to the drive.
    if pressure >= Pressure::Guaranteed {
        journal.shrink(FREE_SEGMENTS)?;
    }
    match journal.prepare(FREE_SEGMENTS) {
        // Without free segments replication goes on in those there are, then waits; that is said where it waits.
        Err(error) if error.is_full() => Ok(()),
        prepared => prepared,
    }
}

/// Drops points, forgets what only they needed, and merges runs.
fn thin_all(retention: &Retention, now: Timestamp) -> Result<(), JournalError> {
    let (ladder, pressure) = (retention.ladder(), retention.pressure());
    let disks: Vec<DiskId> = retention.shape().disks.keys().copied().collect();
    for disk in &disks {
        drop_points(retention, *disk, &ladder, pressure, now)?;
    }
    let before = Timestamp(now.0.saturating_sub(nanos(log_kept(&ladder, pressure))));
    for disk in disks {
        while !retention.is_stopping() && merge_one(retention, disk, before, now)? {}
    }
    Ok(())
}

fn drop_points(
    retention: &Retention,
    disk: DiskId,
    ladder: &Ladder,
    pressure: Pressure,
    now: Timestamp,
) -> Result<(), JournalError> {
    let held = retention.held(disk);
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let Some(known) = journal.shape().disks.get(&disk).cloned() else { return Ok(()) };
    let common = common_points(journal.shape(), &known);
    let is_held = |point: &PointKept| {
        held.iter().any(|at| at.epoch == point.epoch && at.number == point.number && at.records == 0)
    };
    let candidate = |point: &PointKept| Candidate {
        id: point.point,
        time: point.source_time,
        class: point.class,
        named: !point.name.as_str().is_empty(),
        pinned: point.pinned || is_held(point),
        complete: common.contains(&point.point),
    };
    let candidates: Vec<Candidate> = known.points.values().map(candidate).collect();
    let gone = dropped(&candidates, ladder, pressure, now);
    let mut edits: Vec<Edit> =
        gone.iter().map(|point| Edit::PointDropped(PointDropped { disk, point: *point })).collect();
    let oldest = known.points.values().filter(|point| !gone.contains(&point.point));
    let oldest = oldest.map(|point| point.epoch).chain(held.iter().map(|at| at.epoch)).min();
    let through = oldest.map_or(0, |oldest| expirable(&known, oldest));
    let expires = through > known.expired && known.epochs.iter().any(|epoch| epoch.opened.epoch <= through);
    if expires {
        edits.push(Edit::EpochsExpired(EpochsExpired { disk, through }));
    }
    if edits.is_empty() {
        return Ok(());
    }
    journal.edit(&edits, now)?;
    tracing::info!(%disk, points = gone.len(), through, "points past their time were dropped");
    let files: Vec<RunFile> =
        known.runs.iter().filter(|run| expires && run.last <= through).map(|run| run.file).collect();
    for file in files {
        journal.files().remove(&run_path(journal, disk, file))?;
    }
    Ok(())
}

/// The newest epoch that nothing from `oldest` on needs; no merged run is cut.
fn expirable(known: &DiskShape, oldest: u64) -> u64 {
    let epochs = known.epochs.iter().filter(|epoch| epoch.closed.is_some()).map(|epoch| epoch.opened.epoch);
    let free = epochs.filter(|epoch| *epoch < oldest);
    free.filter(|epoch| !known.runs.iter().any(|run| run.first <= *epoch && run.last > *epoch))
        .max()
        .unwrap_or(0)
}

/// Points that every disk of a machine has.
fn common_points(shape: &Shape, of: &DiskShape) -> BTreeSet<[u8; 16]> {
    let mut counts: BTreeMap<[u8; 16], usize> = BTreeMap::new();
    let mut disks = 0;
    for disk in shape.disks.values().filter(|disk| disk.added.machine == of.added.machine) {
        disks += 1;
        for point in disk.points.keys() {
            *counts.entry(*point).or_default() += 1;
        }
    }
    counts.into_iter().filter(|(_, count)| *count == disks).map(|(point, _)| point).collect()
}

/// Makes two runs of a disk one; answers whether there were two.
fn merge_one(
    retention: &Retention,
    disk: DiskId,
    before: Timestamp,
    now: Timestamp,
) -> Result<bool, JournalError> {
    let held = retention.held(disk);
    let merge = {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        let known = journal.shape().disks.get(&disk);
        let from = |at: &reprotect_engine::store::journal::view::At| {
            known.and_then(|known| known.runs_from(at.epoch, at.number)).unwrap_or(at.epoch)
        };
        let read: Vec<u64> = held.iter().map(from).collect();
        thin::next(journal, disk, before, &read)?
    };
    let Some(mut merge) = merge else { return Ok(false) };
    let bytes = merge.write()?;
    // Somebody may have begun to read a point between the two meanwhile.
    if retention.held(disk) != held {
        merge.discard()?;
        return Ok(false);
    }
    let merged = merge.settle(retention.lock().get()?, bytes, now)?;
    if let Some(merged) = merged {
        tracing::info!(
            %disk, first = merged.epochs.0, last = merged.epochs.1, before_bytes = merged.before_bytes,
            after_bytes = merged.after_bytes, lost = merged.lost, "undo runs were made one"
        );
    }
    Ok(merged.is_some())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
