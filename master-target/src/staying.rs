//! What stays on a retention drive however full it is, and only a person can let go of: for people whose drive is short.
//!
//! Invariants: only read; nothing is named that would go by itself. Units: bytes, times by the target's clock.
//! Called by `retention`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reprotect_engine::host::output::bytes;
use reprotect_engine::store::journal::ladder::{Ladder, Pressure};
use reprotect_engine::store::journal::{DiskShape, Journal, Shape};
use reprotect_engine::units::{DiskId, PeerId, Timestamp};

use crate::catalogue::hex;
use crate::housekeeping::{common_points, times_of};

/// Machines for whose failbacks points are held, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct FailingBack {
    /// Begun, and not at their end.
    pub(crate) to_finish: BTreeSet<String>,
    /// Released: the way back is kept.
    pub(crate) away: BTreeSet<String>,
}

impl FailingBack {
    /// What they hold, and the remedy; `None` where there are none.
    pub(crate) fn text(&self) -> Option<String> {
        let names = |machines: &BTreeSet<String>| machines.iter().cloned().collect::<Vec<_>>().join(", ");
        let to_finish = (!self.to_finish.is_empty()).then(|| {
            format!(
                "a failback of {} was begun, and its point stays: repeat `failback`, or take it back with `failback --undo`",
                names(&self.to_finish)
            )
        });
        let away = (!self.away.is_empty()).then(|| {
            format!(
                "{} was failed back, and all its points stay: `unprotect` its disks when nobody wants to go back there",
                names(&self.away)
            )
        });
        let all: Vec<String> = to_finish.into_iter().chain(away).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// What stays of a journal, and the remedy; `None` where nothing does.
pub(crate) fn text(journal: &Journal, ladder: &Ladder, pressure: Pressure, now: Timestamp) -> Option<String> {
    // As old as this nothing else stays.
    let kept = match pressure {
        Pressure::Least | Pressure::Stop => Duration::ZERO,
        _ => ladder.kept_at(pressure),
    };
    let shape = journal.shape();
    let machines: BTreeSet<_> = shape.disks.values().map(|known| known.added.machine).collect();
    let behind = machines.iter().filter_map(|machine| of_machine(shape, machine, kept, now));
    let stays: Vec<String> = pins(journal).into_iter().chain(behind).collect();
    (!stays.is_empty()).then(|| stays.join("; "))
}

fn pins(journal: &Journal) -> Option<String> {
    let points = journal.shape().disks.values().flat_map(|disk| disk.points.values());
    let count = points.filter(|point| point.pinned).count();
    let mib = journal.pinned_bytes().div_ceil(1 << 20);
    (count > 0).then(|| {
        format!(
            "{count} points of disks are pinned and stay, with {mib} MiB of the redo log and all undo runs behind them: `unpin` those that are not needed"
        )
    })
}

/// Where a disk of a machine stands and others go on, the last point that all have stays, and with it all undo runs since.
fn of_machine(shape: &Shape, machine: &[u8; 16], kept: Duration, now: Timestamp) -> Option<String> {
    let disks: BTreeMap<DiskId, &DiskShape> = shape
        .disks
        .iter()
        .filter(|(_, known)| known.added.machine == *machine)
        .map(|(disk, known)| (*disk, known))
        .collect();
    let any = disks.values().next()?;
    let (common, times) = (common_points(shape, any), times_of(shape, any));
    let last = any.points.values().filter(|point| common.contains(&point.point));
    let last = last.max_by_key(|point| (point.epoch, point.number))?;
    let age = Duration::from_nanos(now.0.saturating_sub(times.get(&last.point)?.0));
    let place = |known: &DiskShape| known.points.get(&last.point).map(|own| (own.epoch, own.number));
    let is_newer = |known: &DiskShape| {
        known.points.values().any(|point| Some((point.epoch, point.number)) > place(known))
    };
    let (going, standing): (Vec<_>, Vec<_>) = disks.iter().partition(|(_, known)| is_newer(known));
    if age <= kept || going.is_empty() || standing.is_empty() {
        return None;
    }
    let since = |known: &DiskShape| {
        let from = place(known).map_or(0, |(epoch, _)| epoch);
        known.runs.iter().filter(|run| run.last >= from).map(|run| run.bytes).sum::<u64>()
    };
    let held: u64 = going.iter().map(|(_, known)| since(known)).sum();
    let standing: Vec<String> = standing.iter().map(|(disk, _)| disk.to_string()).collect();
    let hours = age.as_secs() / 3600;
    Some(format!(
        "the last point that all {} disks of machine {} have, {}, is {hours} h old and stays, with {} of undo runs since then, for disk {} makes no points: have that disk protected again, or `unprotect` it",
        disks.len(),
        PeerId(*machine),
        hex(&last.point).get(..8).unwrap_or_default(),
        bytes(held),
        standing.join(", ")
    ))
}
