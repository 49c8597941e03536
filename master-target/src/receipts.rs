//! A receipt for every pass over a whole disk: why it was made, what it compared, what it moved, how long it took, and what
//! became of the points from before.
//!
//! Invariants: a pass has one receipt, whatever restarts in between; it is written when the pass begins and when it ends,
//! in between at least every `SAVED_EVERY`, by a thread of its own, so that no disk waits for it; receipts are kept 30 days
//! and survive the disk's protection; one that cannot be written is told and stops nothing.
//! Units: bytes, milliseconds since the UNIX epoch. Kept by each disk's writer thread, read by `admin`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use reprotect_engine::format::message::{PassCause, PassMode};
use reprotect_engine::io::durable::{Access, read_bounded, replace_file};
use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};
use serde::{Deserialize, Serialize};

use crate::api::{ByteRange, Receipt};
use crate::points;
use crate::registry::Registry;

/// How long receipts are kept.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Receipts kept at most: a disk that is compared again and again fills no drive.
const RECEIPTS_MAX: usize = 4096;
/// The file is never longer than this.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// How often progress is written down.
const SAVED_EVERY: Duration = Duration::from_secs(10);
/// Ranges that are named; all are counted.
const RANGES_NAMED: usize = 64;
/// Ranges remembered while a pass runs; beyond, near ones are taken together.
const RANGES_MAX: usize = 16_384;
/// How often passes that ended are looked for, to count the points that they left.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// The cause of a pass as receipts and operators know it.
#[must_use]
pub const fn cause_code(cause: PassCause) -> &'static str {
    match cause {
        PassCause::Operator => "OPERATOR",
        PassCause::TargetLostDurable => "TARGET_LOST_DURABLE",
        PassCause::ChainMismatch => "CHAIN_MISMATCH",
        PassCause::TrackingLost => "TRACKING_LOST",
        PassCause::OtherLineage => "OTHER_LINEAGE",
        PassCause::OtherSession => "OTHER_SESSION",
        PassCause::DamagedStream => "DAMAGED_STREAM",
    }
}

/// The cause of a pass that nobody asked for: a disk's first one, or one that its target needs.
const fn first_code(mode: PassMode, pass: u64) -> &'static str {
    match (mode, pass) {
        (PassMode::Copy, _) => "INITIAL_COPY",
        (PassMode::Compare | PassMode::Done, 0 | 1) => "INITIAL_COMPARE",
        // The target itself has to know: it lost entries, or was handed over and taken back.
        (PassMode::Compare | PassMode::Done, _) => "TARGET_IN_DOUBT",
    }
}

fn now_ms() -> u64 {
    wall_clock().0 / 1_000_000
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    receipts: Vec<Receipt>,
}

/// What the receipts and the thread that writes them share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    list: Mutex<Vec<Receipt>>,
}

/// All receipts of a master target.
#[derive(Debug)]
pub struct Receipts {
    shared: Arc<Shared>,
    /// Wakes the thread that writes, which ends with this.
    changed: mpsc::Sender<Option<mpsc::SyncSender<()>>>,
}

/// Writes whatever there is, once for all changes that came meanwhile; then tells who waits for it.
fn write_all(shared: &Shared, changed: &mpsc::Receiver<Option<mpsc::SyncSender<()>>>) {
    while let Ok(first) = changed.recv() {
        let waiting: Vec<_> = std::iter::once(first).chain(changed.try_iter()).flatten().collect();
        shared.save();
        drop(waiting);
    }
}

impl Receipts {
    /// Reads those in the state folder. A file that cannot be read is told, moved aside and begun anew: receipts are
    /// for people, nothing depends on them.
    #[must_use]
    pub fn open(state_dir: &Path) -> Arc<Self> {
        let path = state_dir.join("receipts.json");
        let mut list = match read(&path) {
            Ok(list) => list,
            Err(error) => {
                let aside = path.with_extension("json.unreadable");
                tracing::error!(path = %path.display(), error, aside = %aside.display(), "resync receipts cannot be read; they are begun anew");
                // Where that fails too, the next write says so.
                let _ = std::fs::rename(&path, aside);
                Vec::new()
            }
        };
        prune(&mut list, now_ms());
        let shared = Arc::new(Shared { path, list: Mutex::new(list) });
        let (changed, changes) = mpsc::channel();
        let writes = Arc::clone(&shared);
        let spawned = std::thread::Builder::new()
            .name("receipts".to_owned())
            .spawn(move || write_all(&writes, &changes))
            .map(drop);
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread for resync receipts; they are lost with this process");
        }
        Arc::new(Self { shared, changed })
    }

    fn list(&self) -> MutexGuard<'_, Vec<Receipt>> {
        self.shared.list()
    }

    fn save(&self) {
        // Without a thread that was told at the start.
        let _ = self.changed.send(None);
    }

    /// Waits until everything that is known now is written. Blocks.
    pub fn flush(&self) {
        let (done, wait) = mpsc::sync_channel(0);
        if self.changed.send(Some(done)).is_ok() {
            // Nothing is ever sent: the end of the sender is the answer.
            let _ = wait.recv();
        }
    }

    /// A copy of them, the newest first; of `disks` only, unless there are none named.
    #[must_use]
    pub fn all(&self, disks: &[DiskId]) -> Vec<Receipt> {
        let names: Vec<String> = disks.iter().map(ToString::to_string).collect();
        let wanted = |receipt: &&Receipt| names.is_empty() || names.contains(&receipt.disk);
        let mut all: Vec<Receipt> = self.list().iter().filter(wanted).cloned().collect();
        all.sort_by_key(|receipt| std::cmp::Reverse(receipt.begun_ms));
        all
    }

    /// The receipts of one disk's passes, for its writer thread.
    #[must_use]
    pub fn keeper(self: &Arc<Self>, disk: DiskId) -> Keeper {
        let name = disk.to_string();
        let runs = |known: &&Receipt| known.disk == name && known.ended_ms == 0;
        let known = self.list().iter().rev().find(runs).cloned();
        let running = known.map(|receipt| Running {
            number: receipt.number,
            before: receipt,
            ranges: RangeSet::new(),
            compared: 0,
            moved: 0,
            saved: Instant::now(),
        });
        Keeper { receipts: Arc::clone(self), disk: name, running }
    }

    /// Changes one.
    fn change(&self, number: u64, change: impl FnOnce(&mut Receipt)) {
        if let Some(receipt) = self.list().iter_mut().find(|receipt| receipt.number == number) {
            change(receipt);
        }
        self.save();
    }

    fn add(&self, mut receipt: Receipt) -> u64 {
        let number = {
            let mut list = self.list();
            receipt.number = list.iter().map(|known| known.number).max().unwrap_or(0) + 1;
            let number = receipt.number;
            list.push(receipt);
            prune(&mut list, now_ms());
            number
        };
        self.save();
        number
    }

    /// Counts what points from before each pass that ended can still be had. Runs until it is dropped.
    pub async fn count_points(self: Arc<Self>, registry: Arc<Registry>) {
        let mut tick = tokio::time::interval(COUNT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let ended: Vec<Receipt> = {
                let uncounted = |known: &&Receipt| known.ended_ms > 0 && known.points_kept.is_none();
                self.list().iter().filter(uncounted).cloned().collect()
            };
            for receipt in ended {
                let registry = Arc::clone(&registry);
                let (disk, begun_ms) = (receipt.disk.clone(), receipt.begun_ms);
                let counted = tokio::task::spawn_blocking(move || count(&registry, &disk, begun_ms)).await;
                let Ok(Some((kept, degraded))) = counted else { continue };
                self.change(receipt.number, |receipt| {
                    receipt.points_kept = Some(kept);
                    receipt.points_degraded = Some(degraded);
                });
            }
        }
    }
}

/// How many points of a disk are from before a moment (by the clocks of source and target), and how many of them promise less
/// than their marks did; `None` where that cannot be told now. A disk without a journal has none, nor has one
/// that is not protected any more.
fn count(registry: &Registry, disk: &str, before_ms: u64) -> Option<(u64, u64)> {
    let disk = DiskId::parse(disk).ok()?;
    let has_points = registry.retention().is_some() && registry.disk_inputs(disk).is_some();
    let points = if has_points { points::of_disk(registry, disk).ok()? } else { Vec::new() };
    let old = points.iter().filter(|point| point.source_time.0 / 1_000_000 < before_ms);
    let (mut kept, mut degraded) = (0, 0);
    for point in old {
        kept += 1;
        degraded += u64::from(point.degraded);
    }
    Some((kept, degraded))
}

impl Shared {
    fn list(&self) -> MutexGuard<'_, Vec<Receipt>> {
        // A panic while holding it leaves whole receipts.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self) {
        let receipts = self.list().clone();
        let written =
            serde_json::to_vec(&File { receipts }).map_err(|error| error.to_string()).and_then(|bytes| {
                replace_file(&self.path, &bytes, Access::Private).map_err(|error| error.to_string())
            });
        if let Err(error) = written {
            tracing::error!(path = %self.path.display(), error, "resync receipts could not be written; free space there");
        }
    }
}

fn read(path: &Path) -> Result<Vec<Receipt>, String> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = read_bounded(path, FILE_BYTES_MAX).map_err(|error| error.to_string())?;
    let file: File = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    Ok(file.receipts)
}

/// Leaves out what is too old, and the oldest of too many; what runs stays.
fn prune(list: &mut Vec<Receipt>, now_ms: u64) {
    let kept_ms = u64::try_from(KEPT.as_millis()).unwrap_or(u64::MAX);
    list.retain(|receipt| receipt.ended_ms == 0 || receipt.ended_ms.saturating_add(kept_ms) >= now_ms);
    let mut surplus = list.len().saturating_sub(RECEIPTS_MAX);
    list.retain(|receipt| {
        let goes = surplus > 0 && receipt.ended_ms > 0;
        surplus -= usize::from(goes);
        !goes
    });
}

/// A pass under way.
#[derive(Debug)]
struct Running {
    number: u64,
    /// As it stood when this process began to keep it.
    before: Receipt,
    /// What was moved since.
    ranges: RangeSet,
    compared: u64,
    moved: u64,
    saved: Instant,
}

impl Running {
    fn write_into(&self, receipt: &mut Receipt) {
        receipt.updated_ms = now_ms();
        receipt.compared_bytes = self.before.compared_bytes + self.compared;
        receipt.moved_bytes = self.before.moved_bytes + self.moved;
        receipt.range_count = self.before.range_count + self.ranges.run_count() as u64;
        let named =
            |range: SectorRange| ByteRange { start: range.start * SECTOR_BYTES, bytes: range.bytes() };
        let mut ranges = self.before.ranges.clone();
        ranges.extend(self.ranges.iter().take(RANGES_NAMED.saturating_sub(ranges.len())).map(named));
        receipt.ranges = ranges;
    }
}

/// Keeps the receipts of one disk's passes.
#[derive(Debug)]
pub struct Keeper {
    receipts: Arc<Receipts>,
    disk: String,
    running: Option<Running>,
}

impl Keeper {
    /// The disk was opened: where a pass is needed that nobody asked for, it has a receipt from now on; where none is, one
    /// whose end was not written down is over.
    pub(crate) fn opened(&mut self, mode: PassMode, pass: u64, size_bytes: u64) {
        match mode {
            PassMode::Done => self.end("done"),
            PassMode::Copy | PassMode::Compare if self.running.is_none() => {
                self.begin_as(first_code(mode, pass), size_bytes);
            }
            PassMode::Copy | PassMode::Compare => {}
        }
    }

    /// The disk is not protected any more.
    pub(crate) fn retired(&mut self) {
        self.end("unprotected");
    }

    /// A compare of the whole disk begins, and takes the place of one under way.
    pub(crate) fn begin(&mut self, cause: PassCause, size_bytes: u64) {
        self.end("superseded");
        self.begin_as(cause_code(cause), size_bytes);
    }

    fn begin_as(&mut self, cause: &str, size_bytes: u64) {
        let now = now_ms();
        let receipt = Receipt {
            disk: self.disk.clone(),
            cause: cause.to_owned(),
            result: "running".to_owned(),
            size_bytes,
            begun_ms: now,
            updated_ms: now,
            ..Receipt::default()
        };
        let number = self.receipts.add(receipt.clone());
        self.running = Some(Running {
            number,
            before: receipt,
            ranges: RangeSet::new(),
            compared: 0,
            moved: 0,
            saved: Instant::now(),
        });
    }

    /// Hashes of this many bytes went to the source.
    pub(crate) const fn compared(&mut self, bytes: u64) {
        if let Some(running) = &mut self.running {
            running.compared += bytes;
        }
    }

    /// Bulk of these ranges was accepted.
    pub(crate) fn moved(&mut self, ranges: Vec<SectorRange>) {
        let Some(running) = &mut self.running else { return };
        for range in ranges {
            running.moved += range.bytes();
            running.ranges.insert(range);
        }
        if running.ranges.run_count() > RANGES_MAX {
            running.ranges = coarser(&running.ranges);
        }
    }

    /// Writes progress down, now and then.
    pub(crate) fn tick(&mut self) {
        if let Some(running) = &mut self.running
            && running.saved.elapsed() >= SAVED_EVERY
        {
            running.saved = Instant::now();
            self.receipts.change(running.number, |receipt| running.write_into(receipt));
        }
    }

    /// The whole disk is on the target.
    pub(crate) fn done(&mut self) {
        self.end("done");
    }

    fn end(&mut self, result: &str) {
        let Some(running) = self.running.take() else { return };
        self.receipts.change(running.number, |receipt| {
            running.write_into(receipt);
            receipt.result = result.to_owned();
            receipt.ended_ms = receipt.updated_ms.max(1);
        });
    }
}

impl Drop for Keeper {
    /// The daemon stops: what was reached so far is not forgotten.
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            self.receipts.change(running.number, |receipt| running.write_into(receipt));
        }
    }
}

/// Ranges with the smaller half of the gaps between them closed.
fn coarser(ranges: &RangeSet) -> RangeSet {
    let mut gaps: BTreeMap<u64, usize> = BTreeMap::new();
    let runs: Vec<SectorRange> = ranges.iter().collect();
    for pair in runs.windows(2) {
        if let [one, two] = pair {
            *gaps.entry(two.start - one.end).or_default() += 1;
        }
    }
    let (mut left, mut limit) = (runs.len() / 2, 0);
    for (gap, count) in gaps {
        limit = gap;
        if count >= left {
            break;
        }
        left -= count;
    }
    let mut joined = RangeSet::new();
    let mut last: Option<SectorRange> = None;
    for run in runs {
        last = match last {
            Some(before) if run.start - before.end <= limit => {
                Some(SectorRange { start: before.start, end: run.end })
            }
            before => {
                before.into_iter().for_each(|range| joined.insert(range));
                Some(run)
            }
        };
    }
    last.into_iter().for_each(|range| joined.insert(range));
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([7; 16]);

    fn ranges(starts: &[u64]) -> Vec<SectorRange> {
        starts.iter().map(|start| SectorRange { start: *start, end: start + 8 }).collect()
    }

    #[test]
    fn a_pass_has_one_receipt_whatever_restarts_in_between() {
        let dir = tempfile::tempdir().unwrap();
        let receipts = Receipts::open(dir.path());
        let mut keeper = receipts.keeper(DISK);
        keeper.opened(PassMode::Compare, 1, 1 << 20);
        keeper.compared(1 << 19);
        keeper.moved(ranges(&[0, 8, 800]));
        drop(keeper);
        receipts.flush();

        let receipts = Receipts::open(dir.path());
        let mut keeper = receipts.keeper(DISK);
        keeper.opened(PassMode::Compare, 1, 1 << 20);
        keeper.compared(1 << 19);
        keeper.moved(ranges(&[1600]));
        keeper.done();
        let all = receipts.all(&[DISK]);
        let [receipt] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!((receipt.cause.as_str(), receipt.result.as_str()), ("INITIAL_COMPARE", "done"));
        assert_eq!((receipt.compared_bytes, receipt.moved_bytes), (1 << 20, 4 * 4096));
        assert_eq!(receipt.range_count, 3, "two neighbours are one");
        let starts: Vec<u64> = receipt.ranges.iter().map(|range| range.start).collect();
        assert_eq!(starts, [0, 800 * 512, 1600 * 512]);
        assert!(receipt.ended_ms >= receipt.begun_ms);
        receipts.flush();
        assert_eq!(Receipts::open(dir.path()).all(&[]), all, "as it is on disk");
    }

    #[test]
    fn a_synced_disk_that_is_opened_again_gets_none_and_a_new_compare_ends_the_one_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let receipts = Receipts::open(dir.path());
        let mut keeper = receipts.keeper(DISK);
        keeper.opened(PassMode::Done, 1, 1 << 20);
        keeper.moved(ranges(&[0]));
        assert!(receipts.all(&[]).is_empty());
        keeper.begin(PassCause::TrackingLost, 1 << 20);
        keeper.begin(PassCause::Operator, 1 << 20);
        keeper.done();
        let mut told: Vec<_> = receipts
            .all(&[])
            .into_iter()
            .map(|receipt| (receipt.number, receipt.cause, receipt.result))
            .collect();
        told.sort();
        let told: Vec<_> = told.iter().map(|(_, cause, result)| (cause.as_str(), result.as_str())).collect();
        assert_eq!(told, [("TRACKING_LOST", "superseded"), ("OPERATOR", "done")]);
    }

    #[test]
    fn receipts_go_after_thirty_days_unless_their_pass_runs() {
        let day = 24 * 3600 * 1000;
        let receipt = |number, ended_ms| Receipt { number, ended_ms, ..Receipt::default() };
        let mut list = vec![receipt(1, 5 * day), receipt(2, 31 * day), receipt(3, 0)];
        prune(&mut list, 40 * day);
        assert_eq!(list.iter().map(|receipt| receipt.number).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_moved_aside_and_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("receipts.json"), b"{\"receipts\": [").unwrap();
        let receipts = Receipts::open(dir.path());
        assert!(receipts.all(&[]).is_empty() && dir.path().join("receipts.json.unreadable").exists());
        receipts.keeper(DISK).begin(PassCause::Operator, 512);
        receipts.flush();
        assert_eq!(Receipts::open(dir.path()).all(&[]).len(), 1);
    }

    #[test]
    fn a_pass_whose_end_was_not_written_down_or_whose_disk_went_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let told = |receipts: &Arc<Receipts>| {
            let all = receipts.all(&[]);
            all.into_iter().map(|receipt| (receipt.cause, receipt.result)).collect::<Vec<_>>()
        };
        let receipts = Receipts::open(dir.path());
        receipts.keeper(DISK).begin(PassCause::TrackingLost, 512);
        let mut keeper = receipts.keeper(DISK);
        keeper.opened(PassMode::Done, 2, 512);
        assert_eq!(told(&receipts), [("TRACKING_LOST".to_owned(), "done".to_owned())]);
        keeper.opened(PassMode::Compare, 3, 512);
        keeper.retired();
        assert!(told(&receipts).contains(&("TARGET_IN_DOUBT".to_owned(), "unprotected".to_owned())));
    }

    #[test]
    fn many_scattered_ranges_are_taken_together_and_none_is_lost() {
        let ranges: RangeSet = (0..1000_u64)
            .map(|n| SectorRange { start: n * 100 + n % 7 * 9, end: n * 100 + n % 7 * 9 + 8 })
            .collect();
        let coarse = coarser(&ranges);
        assert!(coarse.run_count() <= 600, "{}", coarse.run_count());
        assert!(ranges.iter().all(|range| coarse.contains(range)));
    }
}
