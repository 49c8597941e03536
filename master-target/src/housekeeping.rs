//! What the retention journal gives back: old segments, points the ladder drops, undo runs that become one.
//!
//! Every two seconds segments past their time are released and new ones made ahead of need; the drive is looked at;
//! every half minute, or when the pressure rises, points are dropped and their runs merged or removed.
//!
//! Invariants: the newest point of a disk stays, and the newest that all disks of its machine have; a point that is read now
//! stays; a run is merged without the lock, while replication goes on; an error is told and tried again, it stops nothing;
//! how old a point is says the target's clock, not the source's. Units: bytes, times by the target's clock; points are cut
//! into slots by the source's. Runs on a
//! thread of its own, started by `daemon`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_engine::format::manifest::{Edit, EpochsExpired, PointDropped, PointKept};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::ladder::{Candidate, Ladder, Pressure, dropped, log_kept};
use reprotect_engine::store::journal::points::Point;
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{DiskShape, Journal, JournalError, RunFile, Shape, thin};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::pinned::{self, BETWEEN_PIECES, Way};
use crate::retention::Retention;

/// How often segments and the drive are looked at.
const TICK: Duration = Duration::from_secs(2);
/// How often points are thinned.
const THIN_EVERY: Duration = Duration::from_secs(30);
/// Points that are dropped with one edit of the manifest, which has room taken ahead for a few times as many.
const DROPPED_AT_ONCE: usize = 64;
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
        if let Err(error) = tidy_log(retention) {
            tracing::warn!(%error, "segments of the retention journal could not be tidied up");
        }
        if rose || thinned.is_none_or(|at| at.elapsed() >= THIN_EVERY) {
            thinned = Some(Instant::now());
            if let Err(error) = thin_all(retention, wall_clock()) {
                tracing::warn!(%error, "points of the retention journal could not be thinned");
            }
        }
        for notice in retention.lock().get().map(Journal::take_notices).unwrap_or_default() {
            tracing::warn!("{notice}");
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
        std::cmp::Ordering::Greater => {
            tracing::warn!(%folder, free, total, stays = retention.stays(), "{}", pressure.text());
        }
        std::cmp::Ordering::Less => tracing::info!(%folder, free, total, "{}", pressure.text()),
        std::cmp::Ordering::Equal => {}
    }
    pressure > before
}

/// What a journal has of its drive, and may still have. What others keep there is neither: a journal that gave up points
/// because of it would only make room for more of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may be written.
    pub free_bytes: u64,
    /// These, and what the folder's files occupy.
    pub total_bytes: u64,
}

impl Room {
    /// The room of a folder, there or not yet; `None` when the system does not say.
    #[must_use]
    pub fn of(folder: &Path) -> Option<Self> {
        let drive = folder.ancestors().find(|path| path.exists())?;
        let facts = rustix::fs::statvfs(drive).ok()?;
        // Not what is kept for root or withheld by a quota.
        let free_bytes = facts.f_bavail * facts.f_frsize;
        let occupied =
            |entry: std::io::Result<std::fs::DirEntry>| Some(entry.ok()?.metadata().ok()?.blocks() * 512);
        let files = std::fs::read_dir(folder).into_iter().flatten();
        Some(Self { free_bytes, total_bytes: free_bytes + files.filter_map(occupied).sum::<u64>() })
    }

    /// How full it is, when `reserve_bytes` are to stay free; of a small room a twentieth at most.
    #[must_use]
    pub fn pressure(&self, reserve_bytes: u64) -> Pressure {
        let used = self.total_bytes.saturating_sub(self.free_bytes);
        Pressure::of(used, self.total_bytes, self.reserve(reserve_bytes))
    }

    /// Bytes that may be used when `reserve_bytes` are to stay free.
    #[must_use]
    pub fn usable_bytes(&self, reserve_bytes: u64) -> u64 {
        self.free_bytes.saturating_sub(self.reserve(reserve_bytes))
    }

    fn reserve(&self, reserve_bytes: u64) -> u64 {
        reserve_bytes.min(self.total_bytes / 20)
    }
}

/// One look at the log: releases segments past their time, and makes room ahead of need.
///
/// # Errors
/// When log or manifest cannot be written.
pub fn tidy_log(retention: &Retention) -> Result<(), JournalError> {
    let (ladder, pressure) = (retention.ladder(), retention.pressure());
    let now = wall_clock();
    let old = now.0.saturating_sub(nanos(log_kept(&ladder, pressure)));
    give_back(retention, old, now)?;
    // Segments are used again; when space is short, those beyond need go back to the drive.
    if pressure >= Pressure::Guaranteed {
        retention.lock().get()?.shrink(FREE_SEGMENTS)?;
    }
    loop {
        let planned = retention.lock().get()?.plan_segment(FREE_SEGMENTS);
        let Some(planned) = planned else { return Ok(()) };
        // Writing a segment takes seconds; commits must not wait for it.
        match planned.make() {
            Ok(made) => retention.lock().get()?.adopt(made),
            // Without free segments replication goes on in those there are, then waits; that is said where it waits.
            Err(error) if error.is_full() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Gives segments back that are past their time (`old`), and what keeps them is carried or given up; not while disks are opened.
fn give_back(retention: &Retention, old: u64, now: Timestamp) -> Result<(), JournalError> {
    if !retention.is_opening() {
        pinned::drop_lost(retention, now)?;
    }
    loop {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        if retention.is_opening() {
            return Ok(());
        }
        // What is read of the log for a mount stays: on a drive that is nearly full the mount fails before replication does.
        let held = retention.oldest_held(journal);
        let Some(number) = journal.releasable().first().copied() else { break };
        let is_read = held.is_some_and(|held| held <= number);
        if is_read || journal.newest_in(number).is_some_and(|newest| newest.0 > old) {
            break;
        }
        match pinned::release(retention, journal, number, now)? {
            Way::Free => {}
            Way::Going => {
                drop(locked);
                std::thread::sleep(BETWEEN_PIECES);
            }
            Way::Kept => break,
        }
    }
    pinned::free(retention, old, now)
}

/// Drops points, forgets what only they needed, and merges runs.
pub(crate) fn thin_all(retention: &Retention, now: Timestamp) -> Result<(), JournalError> {
    let (ladder, pressure) = (retention.ladder(), retention.pressure());
    let disks: Vec<DiskId> = retention.shape().disks.keys().copied().collect();
    // One disk's trouble is not the others'.
    let mut first = Ok(());
    for disk in &disks {
        let dropped = drop_points(retention, *disk, &ladder, pressure, now);
        keep_first(&mut first, *disk, dropped);
    }
    let before = Timestamp(now.0.saturating_sub(nanos(log_kept(&ladder, pressure))));
    for disk in disks {
        let merged = merge_all(retention, disk, before, now);
        keep_first(&mut first, disk, merged);
    }
    first
}

fn merge_all(
    retention: &Retention,
    disk: DiskId,
    before: Timestamp,
    now: Timestamp,
) -> Result<(), JournalError> {
    while !retention.is_stopping() && merge_one(retention, disk, before, now)? {}
    Ok(())
}

/// The first of several errors is answered, the others are told here.
fn keep_first(first: &mut Result<(), JournalError>, disk: DiskId, next: Result<(), JournalError>) {
    match (&first, next) {
        (Ok(()), next) => *first = next,
        (Err(_), Err(error)) => tracing::warn!(%disk, %error, "points of a disk could not be thinned"),
        (Err(_), Ok(())) => {}
    }
}

fn drop_points(
    retention: &Retention,
    disk: DiskId,
    ladder: &Ladder,
    pressure: Pressure,
    now: Timestamp,
) -> Result<(), JournalError> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let held = retention.held(journal, disk);
    let Some(known) = journal.shape().disks.get(&disk).cloned() else { return Ok(()) };
    let (common, times) = (common_points(journal.shape(), &known), times_of(journal.shape(), &known));
    let unsound = unsound_points(journal.shape(), &known);
    let is_held = |point: &PointKept| {
        held.iter().any(|at| at.epoch == point.epoch && at.number == point.number && at.records == 0)
    };
    let candidate = |point: &PointKept| Candidate {
        id: point.point,
        place: (point.epoch, point.number),
        label: point.source_time,
        time: times.get(&point.point).copied().unwrap_or(now),
        class: point.class,
        named: !point.name.as_str().is_empty(),
        pinned: point.pinned || is_held(point),
        complete: common.contains(&point.point),
        sound: !unsound.contains(&point.point),
    };
    let candidates: Vec<Candidate> = known.points.values().map(candidate).collect();
    let mut gone: Vec<[u8; 16]> = dropped(&candidates, ladder, pressure, now).into_iter().collect();
    let place = |id: &[u8; 16]| known.points.get(id).map(|point| (point.epoch, point.number));
    gone.sort_by_key(place);
    let held: Vec<u64> = held.iter().map(|at| at.epoch).collect();
    let dropping = Dropping { disk, held: &held, now };
    // The oldest first, and what only they needed with them: that makes the room for the next ones on a full drive.
    let (mut rest, mut count) = (gone.as_slice(), DROPPED_AT_ONCE);
    loop {
        let (these, others) = rest.split_at(count.min(rest.len()));
        match dropping.edit(journal, these) {
            Ok(()) => rest = others,
            Err(error) if error.is_full() && these.len() > 1 => {
                count = these.len() / 2;
                continue;
            }
            Err(error) => return Err(error),
        }
        if rest.is_empty() {
            break;
        }
    }
    if !gone.is_empty() {
        tracing::info!(%disk, points = gone.len(), "points past their time were dropped");
    }
    Ok(())
}

/// Points of a disk that go, and what only they needed.
struct Dropping<'a> {
    disk: DiskId,
    /// Undo epochs in which points are read.
    held: &'a [u64],
    now: Timestamp,
}

impl Dropping<'_> {
    /// Drops these points and lets expire what no other needs; with one edit, and the files after it.
    fn edit(&self, journal: &mut Journal, points: &[[u8; 16]]) -> Result<(), JournalError> {
        let disk = self.disk;
        let Some(known) = journal.shape().disks.get(&disk) else { return Ok(()) };
        let mut edits: Vec<Edit> =
            points.iter().map(|point| Edit::PointDropped(PointDropped { disk, point: *point })).collect();
        let stay = known.points.values().filter(|point| !points.contains(&point.point));
        let oldest = stay.map(|point| point.epoch).chain(self.held.iter().copied()).min();
        let through = oldest.map_or(0, |oldest| expirable(known, oldest));
        let expires =
            through > known.expired && known.epochs.iter().any(|epoch| epoch.opened.epoch <= through);
        if expires {
            edits.push(Edit::EpochsExpired(EpochsExpired { disk, through }));
        }
        if edits.is_empty() {
            return Ok(());
        }
        let files: Vec<RunFile> =
            known.runs.iter().filter(|run| expires && run.last <= through).map(|run| run.file).collect();
        journal.edit(&edits, self.now)?;
        for file in files {
            journal.files().remove(&run_path(journal, disk, file))?;
        }
        Ok(())
    }
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
pub(crate) fn common_points(shape: &Shape, of: &DiskShape) -> BTreeSet<[u8; 16]> {
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

/// Points of a machine that are not sound on one of its disks at least: a part that is no state spoils the whole.
pub(crate) fn unsound_points(shape: &Shape, of: &DiskShape) -> BTreeSet<[u8; 16]> {
    let mut unsound = BTreeSet::new();
    for disk in shape.disks.values().filter(|disk| disk.added.machine == of.added.machine) {
        let spoilt = disk.points.values().filter(|point| !Point::of_kept(disk, point).is_sound());
        unsound.extend(spoilt.map(|point| point.point));
    }
    unsound
}

/// When the target had the points of a disk, by its own clock: when the last disk of the machine had them, so that all of
/// these let go of them together.
pub(crate) fn times_of(shape: &Shape, of: &DiskShape) -> BTreeMap<[u8; 16], Timestamp> {
    let mut times: BTreeMap<[u8; 16], Timestamp> = BTreeMap::new();
    for disk in shape.disks.values().filter(|disk| disk.added.machine == of.added.machine) {
        for point in disk.points.values() {
            let time = disk.time_of(point).unwrap_or(Timestamp(u64::MAX));
            times.entry(point.point).and_modify(|known| *known = time.max(*known)).or_insert(time);
        }
    }
    times
}

/// Makes two runs of a disk one; answers whether there may be others. A run that cannot be read is passed over, and the error
/// names it: it must not keep all others of its disk from being merged.
fn merge_one(
    retention: &Retention,
    disk: DiskId,
    before: Timestamp,
    now: Timestamp,
) -> Result<bool, JournalError> {
    let passed = retention.passed_over(disk);
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let held = retention.held(journal, disk);
    let known = journal.shape().disks.get(&disk);
    let from = |at: &At| known.and_then(|known| known.runs_from(at.epoch, at.number)).unwrap_or(at.epoch);
    let read: Vec<u64> = held.iter().map(from).collect();
    let mut merge = match thin::next(journal, disk, before, &read, &passed) {
        Ok(Some(merge)) => merge,
        Ok(None) => return Ok(false),
        Err(error) => return pass_over(retention, journal, disk, error),
    };
    let free = journal.files().free_bytes(&retention.folder().join("any"))?;
    drop(locked);
    if free.is_some_and(|free| merge.bytes_max() > free) {
        // Written beside both it might not fit, and what targets overwrite would have no room meanwhile. No other pair is smaller.
        tracing::debug!(%disk, bytes = merge.bytes_max(), "undo runs are not made one: there is no room for both");
        return Ok(false);
    }
    let written = merge.write();
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let bytes = match written {
        Ok(bytes) => bytes,
        Err(error) => return pass_over(retention, journal, disk, error),
    };
    // Somebody may have begun to read a point between the two meanwhile.
    if retention.held(journal, disk) != held {
        merge.discard()?;
        return Ok(false);
    }
    let merged = merge.settle(journal, bytes, now)?;
    if let Some(merged) = merged {
        tracing::info!(
            %disk, first = merged.epochs.0, last = merged.epochs.1, before_bytes = merged.before_bytes,
            after_bytes = merged.after_bytes, lost = merged.lost, "undo runs were made one"
        );
    }
    Ok(merged.is_some())
}

/// After an error of reading a run: the others are merged without it.
fn pass_over(
    retention: &Retention,
    journal: &Journal,
    disk: DiskId,
    error: JournalError,
) -> Result<bool, JournalError> {
    let nothing = BlockRange::new(0, 0);
    let Some((place, _)) = journal.run_of_error(disk, &error, nothing) else { return Err(error) };
    tracing::warn!(%disk, run = %place.path.display(), %error, "an undo run cannot be merged with its neighbours; it is tried again in an hour");
    retention.pass_over(disk, place.run.file);
    Ok(true)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use bytes::Bytes;
    use reprotect_engine::format::batch::{MarkCause, MarkClass};
    use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
    use reprotect_engine::format::wire::Text;
    use reprotect_engine::io::{BlockFile, ByteRange};
    use reprotect_engine::store::files::Files;
    use reprotect_engine::store::journal::applier::{Applier, Position};
    use reprotect_engine::store::journal::entry::{Content, Write};
    use reprotect_engine::store::journal::ladder::Rung;
    use reprotect_engine::store::journal::undo::FRAMES_START;
    use reprotect_engine::store::journal::view::View;
    use reprotect_engine::store::journal::window::Window;
    use reprotect_engine::units::{Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence};

    use super::*;
    use crate::journaled::full::lab::drive;
    use crate::pinned::tests::{BadPlace, bad_opener};
    use crate::registry::fs_opener;
    use crate::retention::RetentionSettings;
    use crate::scrub::ScrubSettings;
    use crate::staying;

    const SECTORS: u64 = 64;
    const MINUTE: u64 = 60_000_000_000;
    const HOUR: Duration = Duration::from_secs(3600);

    /// Two disks of a machine with a point every five minutes for six hours; each epoch writes one block.
    pub(crate) struct Lab {
        dir: tempfile::TempDir,
        pub(crate) retention: Arc<Retention>,
        appliers: Vec<Applier<Box<dyn BlockFile>>>,
        begun: u64,
        /// How far the source's clock is behind the target's.
        behind: u64,
    }

    fn disk(number: usize) -> DiskId {
        DiskId([number as u8 + 1; 16])
    }

    pub(crate) fn lab(points: u64) -> Lab {
        lab_behind(points, 0)
    }

    fn lab_behind(points: u64, behind: u64) -> Lab {
        lab_on(fs_opener(), points, behind)
    }

    fn lab_on(drive: Arc<dyn Files>, points: u64, behind: u64) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let ladder = Ladder {
            any_write: HOUR,
            every_epoch: 2 * HOUR,
            rungs: vec![Rung { every: HOUR, until: 24 * HOUR }],
            keep: 24 * HOUR,
            guaranteed: HOUR,
        };
        let scrub = ScrubSettings { bytes_per_second: 0, pause: HOUR };
        let settings =
            RetentionSettings { undo_epoch: HOUR, ladder, segment_bytes: 1 << 20, reserve_bytes: 0, scrub };
        let (retention, _) = Retention::open(drive, &dir.path().join("journal"), settings).unwrap();
        // A whole hour, so that slots are known.
        let begun = wall_clock().0 / (60 * MINUTE) * 60 * MINUTE;
        let mut lab = Lab { dir, retention, appliers: Vec::new(), begun, behind };
        for number in 0..2 {
            let path = lab.dir.path().join(format!("disk-{number}"));
            fs_opener().create(&path, SECTORS * SECTOR_BYTES).unwrap();
            let file = fs_opener().open(&path, true).unwrap();
            let mut locked = lab.retention.lock();
            let journal = locked.get().unwrap();
            let time = Timestamp(begun);
            let added = DiskAdded { disk: disk(number), machine: [7; 16], size_sectors: SECTORS, time };
            journal.add_disk(added, time).unwrap();
            let (applier, _) = Applier::open(journal, disk(number), file, None).unwrap();
            drop(locked);
            lab.appliers.push(applier);
            lab.begin(number, time);
        }
        for number in 1..=points {
            lab.end(number);
        }
        lab
    }

    impl Lab {
        fn begin(&mut self, number: usize, now: Timestamp) {
            let position =
                Position { lineage: LineageId([1; 16]), generation: Generation(1), sequence: Sequence(0) };
            let mut locked = self.retention.lock();
            self.appliers[number]
                .begin_epoch(locked.get().unwrap(), EpochCause::Time, position, None, now)
                .unwrap();
        }

        fn end(&mut self, epoch: u64) {
            self.end_of(0..2, epoch);
        }

        fn end_of(&mut self, disks: std::ops::Range<usize>, epoch: u64) {
            let now = Timestamp(self.begun + epoch * 5 * MINUTE);
            for number in disks {
                let range = SectorRange::new(epoch % 8 * 8, epoch % 8 * 8 + 8);
                let content = Content::Data(Bytes::from(vec![epoch as u8; range.bytes() as usize]));
                let mut window = Window::default();
                window.put(Write { range, content });
                self.appliers[number].write_window(&window).unwrap();
                self.appliers[number].applied_through(epoch);
                let point = PointKept {
                    disk: disk(number),
                    point: [epoch as u8; 16],
                    number: epoch,
                    sequence: Sequence(epoch),
                    epoch,
                    source_time: Timestamp(now.0 - self.behind),
                    class: MarkClass::Crash,
                    pinned: false,
                    degraded: false,
                    name: Text::new(if epoch == 14 { "before" } else { "" }),
                    cause: MarkCause::Timer,
                };
                let mut locked = self.retention.lock();
                self.appliers[number].close_epoch_at(locked.get().unwrap(), Some(point), now).unwrap();
                drop(locked);
                self.begin(number, now);
            }
        }

        fn stays(&self, minutes: u64) -> Option<String> {
            let (ladder, pressure) = (self.retention.ladder(), self.retention.pressure());
            let now = Timestamp(self.begun + minutes * MINUTE);
            staying::text(self.retention.lock().get().unwrap(), &ladder, pressure, now)
        }

        fn thin(&self, minutes: u64) {
            thin_all(&self.retention, Timestamp(self.begun + minutes * MINUTE)).unwrap();
        }

        /// The epochs of the points that are left; each is read and is what it was, and no file is left over.
        fn left(&mut self, number: usize) -> Vec<u64> {
            let shape = self.retention.shape().disks[&disk(number)].clone();
            let mut epochs: Vec<u64> = shape.points.values().map(|point| point.epoch).collect();
            epochs.sort_unstable();
            for epoch in &epochs {
                let mut locked = self.retention.lock();
                let journal = locked.get().unwrap();
                let view = View::open(journal, disk(number), At::entry(*epoch, *epoch)).unwrap();
                let runs = view.open_runs(journal, &mut self.appliers[number]).unwrap();
                let mut bytes = vec![0; (SECTORS * SECTOR_BYTES) as usize];
                view.read(&runs, &mut self.appliers[number], 0, &mut bytes).unwrap();
                for block in 0..8 {
                    let newest = (1..=*epoch).rev().find(|epoch| epoch % 8 == block).unwrap_or(0);
                    assert_eq!(bytes[block as usize * 4096], newest as u8, "block {block} of point {epoch}");
                }
            }
            let prefix = format!("undo-{}", disk(number));
            let names = std::fs::read_dir(self.retention.folder()).unwrap();
            let files = names
                .filter(|name| name.as_ref().unwrap().file_name().to_string_lossy().starts_with(&prefix));
            assert_eq!(files.count(), shape.runs.len() + 1, "a file for each run and the open one");
            epochs
        }
    }

    /// More points go at once than the manifest has room for on a full drive: what the oldest needed makes the room.
    #[test]
    fn on_a_full_drive_any_number_of_points_goes() {
        let (faulty, files) = drive();
        let mut lab = lab_on(files, 72, 0);
        let shape = lab.retention.shape().disks[&disk(0)].clone();
        for point in shape.points.values() {
            let more = (1..=3).map(|more| {
                let mut id = point.point;
                id[0] = 100 + more;
                Edit::PointKept(PointKept { point: id, ..*point })
            });
            let edits: Vec<Edit> = more.collect();
            lab.retention.lock().get().unwrap().edit(&edits, Timestamp(lab.begun)).unwrap();
        }
        assert_eq!(lab.retention.shape().disks[&disk(0)].points.len(), 4 * 72);
        faulty.fill();
        lab.thin(100 * 60);
        assert!(faulty.failed() > 0, "the drive was never full");
        for number in 0..2 {
            assert_eq!(lab.left(number).last(), Some(&72));
            assert!(lab.retention.shape().disks[&disk(number)].points.len() < 8);
            assert!(lab.retention.shape().disks[&disk(number)].expired > 60);
        }
    }

    /// One bad sector in one run keeps no other from being merged.
    #[test]
    fn a_run_that_cannot_be_read_is_passed_over_and_the_others_are_merged() {
        for from in [0, FRAMES_START] {
            let bad = BadPlace::default();
            let mut lab = lab_on(bad_opener(&bad), 40, 0);
            let file = RunFile::Epoch(18);
            let path = run_path(lab.retention.lock().get().unwrap(), disk(0), file);
            *bad.lock().unwrap() = Some((path, ByteRange { start: from, end: from + 512 }));
            lab.thin(6 * 60);
            let runs = |lab: &Lab, number| lab.retention.shape().disks[&disk(number)].runs.clone();
            assert!(runs(&lab, 0).iter().any(|run| run.file == file), "from {from}");
            let lone = runs(&lab, 0).len() - runs(&lab, 1).len();
            assert!((1..=2).contains(&lone), "{lone} runs more than where all can be read");
            assert_eq!(lab.retention.passed_over(disk(0)), [file]);
            *bad.lock().unwrap() = None;
            assert_eq!(lab.left(0), lab.left(1));
        }
    }

    #[test]
    fn points_become_hourly_then_expire_and_named_pinned_and_read_ones_stay() {
        let mut lab = lab(72);
        let pinned = {
            let mut locked = lab.retention.lock();
            let journal = locked.get().unwrap();
            for number in 0..2 {
                let point = journal.shape().disks[&disk(number)].points[&[20; 16]];
                journal
                    .edit(&[Edit::PointChanged(PointKept { pinned: true, ..point })], Timestamp(0))
                    .unwrap();
            }
            20
        };
        let hold = lab.retention.hold(disk(0), At::entry(31, 31));
        lab.thin(6 * 60);
        assert_eq!(lab.retention.held(lab.retention.lock().get().unwrap(), disk(0)).len(), 1);
        let recent: Vec<u64> = (48..=72).collect();
        let hourly = [11, 14, pinned, 23, 35, 47];
        assert_eq!(
            lab.left(1),
            [&hourly[..], &recent].concat(),
            "the newest of each hour up to two hours ago"
        );
        assert_eq!(lab.left(0), [&[11, 14, pinned, 23, 31, 35, 47][..], &recent].concat(), "31 is read");
        drop(hold);
        lab.thin(6 * 60 + 1);
        assert_eq!(lab.left(0), lab.left(1));
        let runs = |lab: &Lab| lab.retention.shape().disks[&disk(0)].runs.len();
        assert_eq!(runs(&lab), 7 - 1 + recent.len(), "one run between two points");
        // A day later only what is pinned is left, and the newest.
        lab.thin(31 * 60);
        assert_eq!(lab.left(0), [pinned, 72]);
        assert_eq!(runs(&lab), 2, "up to the pinned point one run, behind it one");
    }

    /// One disk stands (its target cannot be written, say) while the other goes on, and the last point of both is fuzzy.
    #[test]
    fn disks_of_a_machine_keep_the_last_points_they_have_in_common_however_long_one_of_them_stands() {
        for (pressure, hours) in [(Pressure::None, 48), (Pressure::Least, 3)] {
            let mut lab = lab(12);
            {
                let mut locked = lab.retention.lock();
                let journal = locked.get().unwrap();
                for number in 0..2 {
                    let point = journal.shape().disks[&disk(number)].points[&[12; 16]];
                    let fuzzy = PointKept { class: MarkClass::Fuzzy, ..point };
                    journal.edit(&[Edit::PointChanged(fuzzy)], Timestamp(0)).unwrap();
                }
            }
            (13..=20).for_each(|epoch| lab.end_of(0..1, epoch));
            lab.retention.set_pressure(pressure);
            for _ in 0..2 {
                lab.thin(hours * 60);
                assert_eq!(lab.left(0), [11, 12, 20], "{pressure:?}");
                assert_eq!(lab.left(1), [11, 12], "{pressure:?}");
            }
            let stays = lab.stays(hours * 60).unwrap();
            for part in ["0c0c0c0c", &disk(1).to_string(), "`unprotect`"] {
                assert!(stays.contains(part), "{part}: {stays}");
            }
            assert!(!stays.contains(&disk(0).to_string()), "it goes on: {stays}");
            // It catches up: what is in common now is newer.
            (13..=20).for_each(|epoch| lab.end_of(1..2, epoch));
            lab.thin(hours * 60);
            assert_eq!(lab.left(0), [20], "{pressure:?}");
            lab.thin(hours * 60);
            assert_eq!(lab.left(1), [20], "{pressure:?}");
            assert_eq!(lab.stays(hours * 60), None);
        }
    }

    #[test]
    fn a_source_whose_clock_is_behind_by_more_than_all_that_is_kept_loses_no_point_by_that() {
        let (mut right, mut behind) = (lab(40), lab_behind(40, 400 * 24 * 60 * MINUTE));
        for minutes in [200, 300, 6 * 60] {
            right.thin(minutes);
            behind.thin(minutes);
            assert_eq!(behind.left(0), right.left(0), "after {minutes} minutes");
            assert_eq!(behind.left(1), right.left(1));
        }
        assert!(behind.left(0).len() >= 4);
        // Of points that are all too old the newest stays, and that is the one in the last place.
        behind.thin(48 * 60);
        assert_eq!(behind.left(0), [40]);
    }

    #[test]
    fn a_drive_that_fills_up_gives_way_in_steps() {
        let mut lab = lab(72);
        lab.retention.set_pressure(Pressure::ThinEarly);
        lab.thin(6 * 60);
        assert_eq!(lab.left(0).len(), 6 + 13, "hourly up to an hour ago, with the named one");
        lab.retention.set_pressure(Pressure::Guaranteed);
        lab.thin(6 * 60);
        assert_eq!(lab.left(0), (60..=72).collect::<Vec<_>>());
        lab.retention.set_pressure(Pressure::Least);
        lab.thin(6 * 60);
        assert_eq!(lab.left(0), [60, 72], "the oldest guaranteed one and the newest");
    }

    #[test]
    fn a_journal_has_what_it_holds_and_what_is_free_whatever_else_the_drive_holds() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("others"), vec![1; 1 << 20]).unwrap();
        let folder = dir.path().join("journal");
        std::fs::create_dir(&folder).unwrap();
        let empty = Room::of(&folder).unwrap();
        assert_eq!(empty.total_bytes, empty.free_bytes);
        assert_eq!(empty.pressure(0), Pressure::None);
        std::fs::write(folder.join("redo-1"), vec![1; 1 << 20]).unwrap();
        let room = Room::of(&folder).unwrap();
        assert!((1 << 20..2 << 20).contains(&(room.total_bytes - room.free_bytes)), "{room:?}");
        assert_eq!(Room { free_bytes: 3 << 30, total_bytes: 100 << 30 }.pressure(4 << 30), Pressure::Stop);
    }
}
