//! Tests of what is done about disks and pins that keep the shared log. Two disks by default: one takes nothing, one works.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{DiskAdded, EpochCause, EpochClosed, EpochOpened, PointKept};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::{Applied, EntryKind};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{self, BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::Recovered;
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_engine::store::journal::view::View;
use reprotect_engine::units::{Generation, LineageId, PeerId, Sequence};

use super::*;
use crate::catalogue::{Catalogue, Failback, FailbackDisk, FailbackStep};
use crate::registry::{Registry, fs_opener};
use crate::retention::RetentionSettings;
use crate::scrub::ScrubSettings;

const SEGMENT: u64 = 1 << 20;
const STANDS: DiskId = DiskId([1; 16]);
const WORKS: DiskId = DiskId([2; 16]);

fn lab_settings() -> RetentionSettings {
    let zero = Duration::ZERO;
    let ladder =
        Ladder { any_write: zero, every_epoch: zero, rungs: Vec::new(), keep: zero, guaranteed: zero };
    let scrub = ScrubSettings { bytes_per_second: 0, pause: Duration::from_secs(3600) };
    let undo_epoch = Duration::from_secs(3600);
    RetentionSettings { undo_epoch, ladder, segment_bytes: SEGMENT, reserve_bytes: 0, scrub }
}

/// A disk that has two segments' worth of entries in the log and takes none of them, and one that works.
fn lab(dir: &Path) -> Arc<Retention> {
    lab_with(fs_opener(), dir)
}

fn lab_with(files: Arc<dyn Files>, dir: &Path) -> Arc<Retention> {
    let (retention, _) = Retention::open(files, dir, lab_settings()).unwrap();
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    for disk in [STANDS, WORKS] {
        let added = DiskAdded { disk, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
        journal.add_disk(added, Timestamp(1)).unwrap();
    }
    for number in 1..=2 * SEGMENT / 65536 {
        put(journal, STANDS, number);
    }
    drop(locked);
    retention
}

fn put(journal: &mut Journal, disk: DiskId, number: u64) {
    let body = vec![number as u8; 65536];
    let added = journal.append(disk, EntryKind::Batch, &[&body], Timestamp(1)).unwrap();
    assert_eq!(added.0, number);
    journal.commit(Timestamp(1)).unwrap();
}

/// The working disk writes a segment's worth, then somebody looks.
fn go_on(retention: &Retention) {
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    for _ in 0..SEGMENT / 65536 {
        let number = journal.newest(WORKS) + 1;
        put(journal, WORKS, number);
        journal.append_applied(WORKS, Applied { number, epoch: 0, undo_bytes: 0 }, Timestamp(1)).unwrap();
    }
    drop(locked);
    crate::housekeeping::tidy_log(retention).unwrap();
}

fn numbers(retention: &Retention) -> Vec<u64> {
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    let entries = journal.entries(STANDS).to_vec();
    for entry in &entries {
        let (_, body) = journal.read(entry.place).unwrap();
        assert_eq!(body, vec![entry.number as u8; 65536], "entry {}", entry.number);
    }
    entries.iter().map(|entry| entry.number).collect()
}

#[test]
fn what_a_standing_disk_needs_is_carried_while_there_is_room_and_given_up_where_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let retention = lab(dir.path());
    let all: Vec<u64> = (1..=2 * SEGMENT / 65536).collect();
    let log_bytes = || retention.lock().get().unwrap().log_bytes();
    for _ in 0..2 * GIVE_UP_AT {
        go_on(&retention);
        assert!(log_bytes() <= 9 * SEGMENT, "twice what waits, two segments, what was just written");
    }
    assert_eq!(numbers(&retention), all, "with room nothing is given up");
    // The drive is nearly full.
    retention.set_pressure(Pressure::Least);
    let mut looks = 0;
    while retention.shape().disks[&STANDS].lost.is_empty() {
        go_on(&retention);
        looks += 1;
        assert!(looks <= 2 * GIVE_UP_AT && log_bytes() <= 9 * SEGMENT);
    }
    go_on(&retention);
    assert!(log_bytes() <= 3 * SEGMENT, "{} bytes", log_bytes());
    assert!(numbers(&retention).is_empty());
    let lost = retention.shape().disks[&STANDS].lost_through();
    assert_eq!(lost, all.last().copied(), "all of them, durably");
    let text = retention.losses().remove(&STANDS).unwrap();
    assert!(text.contains("given up") && text.contains("compared with its source"), "{text}");
    // A thread that still has the disk in hand cannot say otherwise.
    let refused = retention.lock().get().unwrap().append(STANDS, EntryKind::Batch, &[b"x"], wall_clock());
    assert!(matches!(refused, Err(JournalError::GivenUp { disk: STANDS })), "{refused:?}");
    // Nor does a start forget it; who takes the disk again before that is told the same.
    let live = retention.lock().get().unwrap().take_again(STANDS, wall_clock()).unwrap();
    drop(retention);
    let (_, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
    let log = &found.disks[&STANDS];
    assert_eq!(*log, live);
    let through = lost.unwrap_or_default();
    assert_eq!((log.lost().collect::<Vec<_>>(), log.newest()), (vec![(1, through)], through));
}

#[test]
fn what_a_mount_reads_of_the_log_stays_until_the_drive_is_nearly_full() {
    let dir = tempfile::tempdir().unwrap();
    let (retention, _) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
    let (ends, now) = (4 * SEGMENT / 65536, Timestamp(1));
    let id = WORKS;
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        journal.add_disk(DiskAdded { disk: id, machine: [7; 16], size_sectors: 64, time: now }, now).unwrap();
    }
    go_on(&retention);
    let after = retention.lock().get().unwrap().newest(id);
    let opened = EpochOpened {
        disk: id,
        lineage: LineageId([2; 16]),
        generation: Generation(1),
        epoch: 1,
        after,
        sequence: Sequence(0),
        salt: 1,
        time: now,
        to_epoch: 0,
        to_number: 0,
        cause: EpochCause::Time,
        to_records: 0,
    };
    let closed = EpochClosed { disk: id, epoch: 1, last: after + ends, run_bytes: 0, time: now };
    retention.lock().get().unwrap().edit(&[Edit::EpochOpened(opened)], now).unwrap();
    // A mount inside the epoch, which then ends.
    let hold = retention.hold(id, At::entry(1, after + ends - 1));
    for number in after + 1..=after + ends {
        put(retention.lock().get().unwrap(), id, number);
    }
    retention.lock().get().unwrap().edit(&[Edit::EpochClosed(closed)], now).unwrap();
    let oldest = || retention.shape().segments.keys().next().copied().unwrap();
    let needed = retention.oldest_held(retention.lock().get().unwrap()).unwrap();
    for _ in 0..4 {
        go_on(&retention);
    }
    assert_eq!(oldest(), needed, "those before it were given back");
    retention.set_pressure(Pressure::Least);
    go_on(&retention);
    assert!(oldest() > needed, "replication comes first");
    assert_eq!(retention.oldest_held(retention.lock().get().unwrap()), None);
    drop(hold);
}

/// Which file cannot be read, and where.
pub(crate) type BadPlace = Arc<Mutex<Option<(PathBuf, ByteRange)>>>;

/// Opens files that cannot be read where they are bad.
pub(crate) fn bad_opener(bad: &BadPlace) -> Arc<dyn Files> {
    let known = Arc::clone(bad);
    Arc::new(FsFiles::new(move |path, writable| {
        let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
        let file = Bad(io::open(path, &options)?, Arc::clone(&known), path.to_owned());
        Ok(Box::new(file) as Box<dyn BlockFile>)
    }))
}

/// A file that cannot be read where it is bad.
struct Bad(Box<dyn BlockFile>, BadPlace, PathBuf);

impl BlockFile for Bad {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let bad = self.1.lock().unwrap().clone().filter(|(path, _)| *path == self.2);
        for read in reads.iter() {
            let (offset, len) = (read.offset, read.data.len() as u64);
            if bad.as_ref().is_some_and(|(_, bad)| offset < bad.end && offset + len > bad.start) {
                let source = std::io::Error::from_raw_os_error(5); // EIO
                let name = self.2.display().to_string();
                return Err(BlockError { name, op: BlockOp::Read, offset, len, source });
            }
        }
        self.0.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.0.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.0.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.0.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.0.allocated(range)
    }
}

#[test]
fn what_cannot_be_read_any_more_is_lost_for_its_disk_alone_and_the_log_is_given_back() {
    const ALSO: DiskId = DiskId([3; 16]);
    let bad = Arc::new(Mutex::new(None));
    let dir = tempfile::tempdir().unwrap();
    let retention = lab_with(bad_opener(&bad), dir.path());
    let state = TargetDisk::new_state(ALSO, PeerId([2; 16]), [3; 16], 64, LineageId([4; 16]), PassMode::Done);
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let added = DiskAdded { disk: ALSO, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
        journal.add_disk(added, Timestamp(1)).unwrap();
        journal.append_state(&state, Timestamp(1)).unwrap();
        put(journal, ALSO, 1);
        put(journal, STANDS, 2 * SEGMENT / 65536 + 1);
        put(journal, ALSO, 2);
        // The segment with the state of the other disk; one entry of the first is gone.
        let entry = *journal.entries(STANDS).last().unwrap();
        let slot = journal.shape().segments[&entry.place.segment].slot;
        let path = dir.path().join(format!("redo-{slot:06}"));
        assert!(path.exists(), "{}", path.display());
        let middle = entry.place.offset + entry.place.bytes / 2;
        *bad.lock().unwrap() = Some((path, ByteRange { start: middle, end: middle + 512 }));
    }
    let lost = |retention: &Retention| retention.shape().disks[&STANDS].lost_through();
    for _ in 0..GIVE_UP_AT - 1 {
        go_on(&retention);
        assert_eq!(lost(&retention), None, "a medium may come back");
    }
    // Some looks more: the other disk is asked since the segment that it needs is the oldest.
    for _ in 0..8 {
        go_on(&retention);
    }
    assert_eq!(lost(&retention), Some(2 * SEGMENT / 65536 + 1));
    let text = retention.losses().remove(&STANDS).unwrap();
    assert!(text.contains("cannot be read"), "{text}");
    let bytes = retention.lock().get().unwrap().log_bytes();
    assert!(bytes <= 6 * SEGMENT, "{bytes} bytes are kept of what nobody can read");
    let also = retention.lock().get().unwrap().entries(ALSO).to_vec();
    assert_eq!(also.iter().map(|entry| entry.number).collect::<Vec<_>>(), [1, 2]);
    for entry in also {
        let (_, body) = retention.lock().get().unwrap().read(entry.place).unwrap();
        assert_eq!(body, vec![entry.number as u8; 65536]);
    }
    // Nor does a start forget any of it; what could not be read is not looked at any more.
    drop(retention);
    let (_, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
    assert_eq!(found.disks[&STANDS].lost().count(), 1);
    assert_eq!(found.disks[&ALSO].entries.len(), 2);
    assert_eq!(found.disks[&ALSO].state.as_ref().map(|(state, _)| state.clone()), Some(state));
    assert!(found.damage.is_empty(), "{:?}", found.damage);
}

/// What was carried of a segment is young again, and makes nothing young that stayed behind.
#[test]
fn what_cannot_be_read_is_given_up_after_a_minute_also_where_others_were_carried_from_beside_it() {
    const ALSO: DiskId = DiskId([3; 16]);
    let (bad, dir) = (BadPlace::default(), tempfile::tempdir().unwrap());
    let settings = lab_settings();
    let ladder = Ladder { any_write: Duration::from_secs(3600), ..settings.ladder };
    let settings = RetentionSettings { ladder, ..settings };
    let (retention, _) = Retention::open(bad_opener(&bad), dir.path(), settings).unwrap();
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        for disk in [STANDS, WORKS, ALSO] {
            let added = DiskAdded { disk, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
            journal.add_disk(added, Timestamp(1)).unwrap();
        }
        put(journal, ALSO, 1);
        put(journal, STANDS, 1);
        for number in 1..=8 * ENTRIES {
            put(journal, WORKS, number);
        }
        let applied = Applied { number: 8 * ENTRIES, epoch: 0, undo_bytes: 0 };
        journal.append_applied(WORKS, applied, Timestamp(1)).unwrap();
        journal.commit(Timestamp(1)).unwrap();
        let entry = journal.entries(STANDS)[0];
        let slot = journal.shape().segments[&entry.place.segment].slot;
        let path = dir.path().join(format!("redo-{slot:06}"));
        let middle = entry.place.offset + entry.place.bytes / 2;
        *bad.lock().unwrap() = Some((path, ByteRange { start: middle, end: middle + 512 }));
    }
    let lost = |retention: &Retention| retention.shape().disks[&STANDS].lost_through();
    for look in 1.. {
        crate::housekeeping::tidy_log(&retention).unwrap();
        if lost(&retention).is_some() {
            break;
        }
        assert!(look <= GIVE_UP_AT + CARRY_AT, "kept, with all that is behind it");
    }
    let also = retention.lock().get().unwrap().entries(ALSO)[0];
    assert!(also.carried && retention.lock().get().unwrap().read(also.place).is_ok());
}

const PINS: DiskId = DiskId([3; 16]);
/// The log's entries in a segment.
const ENTRIES: u64 = SEGMENT / 65536;

fn point(number: u64) -> PointKept {
    PointKept {
        disk: PINS,
        point: [number as u8; 16],
        number,
        sequence: Sequence(number),
        epoch: 1,
        source_time: Timestamp(1),
        class: MarkClass::Crash,
        pinned: true,
        degraded: false,
        name: Text::new("pinned"),
        cause: MarkCause::Timer,
    }
}

fn epoch(epoch: u64, after: u64, cause: EpochCause, to_number: u64) -> EpochOpened {
    EpochOpened {
        disk: PINS,
        lineage: LineageId([2; 16]),
        generation: Generation(1),
        epoch,
        after,
        sequence: Sequence(after),
        salt: 1,
        time: Timestamp(1),
        to_epoch: u64::from(to_number > 0),
        to_number,
        cause,
        to_records: 0,
    }
}

/// A disk whose only undo epoch ended after `entries`, with points pinned inside it, beside one that works; and one that
/// takes nothing, with an entry after each `stands` of the first, or none.
fn pins_lab(
    files: Arc<dyn Files>,
    dir: &Path,
    entries: u64,
    pinned: &[u64],
    stands: Option<u64>,
) -> Arc<Retention> {
    let (retention, _) = Retention::open(files, dir, lab_settings()).unwrap();
    let now = Timestamp(1);
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    for disk in [STANDS, WORKS, PINS] {
        journal.add_disk(DiskAdded { disk, machine: [7; 16], size_sectors: 64, time: now }, now).unwrap();
    }
    journal.edit(&[Edit::EpochOpened(epoch(1, 0, EpochCause::Time, 0))], now).unwrap();
    for number in 1..=entries {
        put(journal, PINS, number);
        if let Some(stands) = stands.filter(|stands| number.is_multiple_of(*stands)) {
            put(journal, STANDS, number / stands);
        }
    }
    journal.append_applied(PINS, Applied { number: entries, epoch: 1, undo_bytes: 0 }, now).unwrap();
    journal.commit(now).unwrap();
    let closed = EpochClosed { disk: PINS, epoch: 1, last: entries, run_bytes: 0, time: now };
    journal.edit(&[Edit::EpochClosed(closed)], now).unwrap();
    let kept: Vec<Edit> = pinned.iter().map(|number| Edit::PointKept(point(*number))).collect();
    journal.edit(&kept, now).unwrap();
    drop(locked);
    retention
}

/// The point is there, and all it needs of the log is what it was.
fn check_pin(retention: &Retention, number: u64) {
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    View::check(journal, PINS, At::entry(1, number)).unwrap();
    let needed: Vec<_> =
        journal.entries(PINS).iter().copied().filter(|entry| entry.number <= number).collect();
    assert_eq!(needed.len() as u64, number);
    for entry in needed {
        assert_eq!(journal.read(entry.place).unwrap().1, vec![entry.number as u8; 65536]);
    }
}

fn log_bytes(retention: &Retention) -> u64 {
    retention.lock().get().unwrap().log_bytes()
}

fn oldest(retention: &Retention) -> u64 {
    retention.shape().segments.keys().next().copied().unwrap()
}

#[test]
fn a_pin_of_a_disk_that_was_failed_back_keeps_nobodys_log() {
    let dir = tempfile::tempdir().unwrap();
    let inside = ENTRIES / 2;
    let retention = pins_lab(fs_opener(), &dir.path().join("journal"), ENTRIES, &[inside], None);
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
    let disk = FailbackDisk {
        at: "1.16".to_owned(),
        step: FailbackStep::Released,
        generation: 2,
        written_bytes: 0,
        read_bytes: 0,
        compared_bytes: 0,
        different: Vec::new(),
        stamp: String::new(),
    };
    let failback = Failback {
        asked: None,
        point: "newest".to_owned(),
        class: "crash-consistent".to_owned(),
        source_time_ms: 0,
        source_away: false,
        undoing: false,
        accept_damage: false,
        disks: [(PINS.to_string(), disk)].into(),
    };
    catalogue.save_failback(PeerId([2; 16]), &failback).unwrap();
    let journal = Some((Arc::clone(&retention), Recovered::default()));
    let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
    assert_eq!(
        retention.held(retention.lock().get().unwrap(), PINS),
        [At::entry(1, inside)],
        "its runs are held"
    );
    for _ in 0..12 {
        go_on(&retention);
        assert!(log_bytes(&retention) <= 5 * SEGMENT, "{} bytes", log_bytes(&retention));
    }
    check_pin(&retention, inside);
    drop(registry);
}

/// A third of the segment waits, and a pin needs a little more than another third of it.
#[test]
fn what_waits_and_what_pins_need_of_a_segment_count_together_against_what_its_release_gains() {
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), 10, &[6], Some(2));
    let first = oldest(&retention);
    go_on(&retention);
    for _ in 0..2 * CARRY_AT {
        crate::housekeeping::tidy_log(&retention).unwrap();
    }
    assert_eq!(oldest(&retention), first, "most of it would be copied for a small gain");
    // A log twice as long as all that stays is worth it.
    for _ in 0..4 {
        go_on(&retention);
    }
    assert!(oldest(&retention) > first);
    check_pin(&retention, 6);
    assert_eq!(numbers(&retention), [1, 2, 3, 4, 5]);
}

#[test]
fn what_waits_is_not_given_up_for_a_segment_that_a_pin_keeps_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let inside = 2 * ENTRIES - 1;
    let retention = pins_lab(fs_opener(), dir.path(), 2 * ENTRIES, &[inside], Some(2));
    retention.set_pressure(Pressure::Least);
    let first = oldest(&retention);
    for _ in 0..2 * GIVE_UP_AT {
        crate::housekeeping::tidy_log(&retention).unwrap();
    }
    assert_eq!(oldest(&retention), first, "there is no room to carry what the pin needs");
    assert!(retention.shape().disks[&STANDS].lost.is_empty(), "lost, and no segment came back");
    check_pin(&retention, inside);
    // Unpinned, what waits is the only hindrance.
    let dropped = PointDropped { disk: PINS, point: point(inside).point };
    retention.lock().get().unwrap().edit(&[Edit::PointDropped(dropped)], Timestamp(1)).unwrap();
    crate::housekeeping::tidy_log(&retention).unwrap();
    assert!(!retention.shape().disks[&STANDS].lost.is_empty() && oldest(&retention) > first);
}

#[test]
fn a_rollback_gets_to_its_point_inside_an_undo_epoch_however_full_the_drive_is() {
    let dir = tempfile::tempdir().unwrap();
    let (inside, now) = (ENTRIES / 2, Timestamp(1));
    let retention = pins_lab(fs_opener(), dir.path(), ENTRIES, &[], None);
    let back = epoch(2, ENTRIES, EpochCause::Rollback, inside);
    retention.lock().get().unwrap().edit(&[Edit::EpochOpened(back)], now).unwrap();
    retention.set_pressure(Pressure::Least);
    // It goes on: what it reads stays in its place.
    let hold = retention.hold_to_go_back(PINS, At::entry(1, inside));
    let first = oldest(&retention);
    for _ in 0..3 * CARRY_AT {
        go_on(&retention);
    }
    assert_eq!(oldest(&retention), first);
    // It stopped on its way: others get the log back, and it can be finished.
    drop(hold);
    for _ in 0..3 * CARRY_AT {
        go_on(&retention);
    }
    assert!(oldest(&retention) > first && log_bytes(&retention) <= 5 * SEGMENT);
    check_pin(&retention, inside);
    assert_eq!(retention.held(retention.lock().get().unwrap(), PINS), [At::entry(1, inside)]);
}

#[test]
fn a_pin_whose_log_cannot_be_read_is_dropped_after_a_minute_and_takes_no_other_with_it() {
    let bad = Arc::new(Mutex::new(None));
    let dir = tempfile::tempdir().unwrap();
    let (sound, lacks) = (3, 8);
    let retention = pins_lab(bad_opener(&bad), dir.path(), ENTRIES, &[sound, lacks], None);
    let place = {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let place = journal.entries(PINS)[5].place;
        let path = dir.path().join(format!("redo-{:06}", journal.shape().segments[&place.segment].slot));
        let middle = place.offset + place.bytes / 2;
        (path, ByteRange { start: middle, end: middle + 512 })
    };
    let points = || retention.shape().disks[&PINS].points.len();
    // The medium comes back.
    *bad.lock().unwrap() = Some(place.clone());
    for _ in 0..GIVE_UP_AT - 1 {
        go_on(&retention);
        assert_eq!(points(), 2, "a medium may come back");
    }
    check_pin(&retention, sound);
    *bad.lock().unwrap() = None;
    go_on(&retention);
    assert_eq!(points(), 2);
    check_pin(&retention, lacks);
    drop(retention);
    // It does not.
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(bad_opener(&bad), dir.path(), ENTRIES, &[sound, lacks], None);
    *bad.lock().unwrap() = Some((dir.path().join(place.0.file_name().unwrap()), place.1));
    let first = oldest(&retention);
    for _ in 0..2 * GIVE_UP_AT {
        if oldest(&retention) > first {
            *bad.lock().unwrap() = None; // its file is used again
        }
        go_on(&retention);
    }
    let left: Vec<u64> = retention.shape().disks[&PINS].points.values().map(|point| point.number).collect();
    assert_eq!(left, [sound], "what is lost is listed no more, and holds no undo runs");
    check_pin(&retention, sound);
    assert!(log_bytes(&retention) <= 5 * SEGMENT, "{} bytes", log_bytes(&retention));
}

#[test]
fn a_full_drive_names_what_is_pinned_and_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), 2 * ENTRIES, &[ENTRIES, ENTRIES + 2], None);
    let text = retention.no_room();
    assert!(text.contains("2 points") && text.contains("2 MiB") && text.contains("`unpin`"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), ENTRIES, &[], None);
    assert!(!retention.no_room().contains("pin") && retention.stays().is_none());
}

/// What is lost of disks, as first and last entry.
fn lost(retention: &Retention, disk: DiskId) -> Vec<(u64, u64)> {
    let shape = retention.shape();
    shape.disks[&disk].lost.iter().map(|loss| (loss.entries.first, loss.entries.last)).collect()
}

#[test]
fn a_disk_that_needs_the_oldest_segment_for_its_epoch_only_loses_nothing_to_one_that_stands() {
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), 2, &[], None);
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let open = EpochOpened { after: 0, ..epoch(1, 0, EpochCause::Time, 0) };
        journal.edit(&[Edit::EpochOpened(EpochOpened { disk: WORKS, ..open })], Timestamp(1)).unwrap();
        put(journal, WORKS, 1);
        journal.append_applied(WORKS, Applied { number: 1, epoch: 1, undo_bytes: 0 }, Timestamp(1)).unwrap();
        for number in 1..=3 * ENTRIES {
            put(journal, STANDS, number);
        }
        put(journal, WORKS, 2); // waits, far behind
    }
    retention.set_pressure(Pressure::Least);
    for _ in 0..3 * GIVE_UP_AT {
        crate::housekeeping::tidy_log(&retention).unwrap();
    }
    assert_eq!(lost(&retention, STANDS), [(1, 3 * ENTRIES)]);
    assert_eq!(lost(&retention, WORKS), [], "what it was told to be durable is given up for nothing");
    assert!(log_bytes(&retention) <= 3 * SEGMENT, "{} bytes", log_bytes(&retention));
    let entry = *retention.lock().get().unwrap().entries(WORKS).last().unwrap();
    assert_eq!(retention.lock().get().unwrap().read(entry.place).unwrap().1, vec![2; 65536]);
}

#[test]
fn of_two_disks_that_stand_the_one_with_less_than_a_segment_is_carried() {
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), 1, &[], None);
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        put(journal, WORKS, 1);
        for number in 1..=3 * ENTRIES {
            put(journal, STANDS, number);
        }
    }
    retention.set_pressure(Pressure::Least);
    for _ in 0..3 * GIVE_UP_AT {
        crate::housekeeping::tidy_log(&retention).unwrap();
    }
    assert_eq!((lost(&retention, STANDS), lost(&retention, WORKS)), (vec![(1, 3 * ENTRIES)], vec![]));
}

#[test]
fn a_disk_that_has_no_room_to_let_go_loses_nothing_where_another_stands_behind_it() {
    const BEHIND: DiskId = DiskId([3; 16]);
    let dir = tempfile::tempdir().unwrap();
    let retention = lab(dir.path());
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let added = DiskAdded { disk: BEHIND, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
        journal.add_disk(added, Timestamp(1)).unwrap();
        for number in 1..=6 * ENTRIES {
            put(journal, BEHIND, number);
        }
    }
    retention.set_pressure(Pressure::Least);
    let look = || {
        crate::housekeeping::tidy_log(&retention).unwrap();
        retention.hinder(STANDS); // as its own thread says
        assert_eq!(lost(&retention, STANDS), []);
    };
    let before = log_bytes(&retention);
    for looks in 0.. {
        if !lost(&retention, BEHIND).is_empty() {
            break;
        }
        assert!(looks < 4 * GIVE_UP_AT, "both keep the log for ever");
        look();
    }
    assert_eq!(lost(&retention, BEHIND), [(1, 6 * ENTRIES)]);
    // What the other had is free as soon as what has no room is carried.
    (0..2 * CARRY_AT).for_each(|_| look());
    assert!(log_bytes(&retention) <= before / 2, "{} bytes of {before}", log_bytes(&retention));
    assert_eq!(numbers(&retention), (1..=2 * ENTRIES).collect::<Vec<_>>());
}

/// The one that stands is given up, and what is left in its segments is carried, however little the log is longer than that.
#[test]
fn a_disk_that_has_no_room_to_let_go_loses_nothing_after_the_one_that_stood_was_given_up() {
    const FULL: DiskId = DiskId([3; 16]);
    let dir = tempfile::tempdir().unwrap();
    let (retention, _) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
    let waits = 3 * ENTRIES / 2;
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        for disk in [STANDS, FULL] {
            let added = DiskAdded { disk, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
            journal.add_disk(added, Timestamp(1)).unwrap();
        }
        for number in 1..=waits {
            put(journal, FULL, number);
            put(journal, STANDS, 2 * number - 1);
            put(journal, STANDS, 2 * number);
        }
    }
    retention.set_pressure(Pressure::Least);
    let before = log_bytes(&retention);
    for _ in 0..5 * GIVE_UP_AT {
        crate::housekeeping::tidy_log(&retention).unwrap();
        retention.hinder(FULL); // as its own thread says
        assert_eq!(lost(&retention, FULL), []);
        if log_bytes(&retention) <= before / 2 + SEGMENT {
            retention.set_pressure(Pressure::Guaranteed); // that was the room which was missing
        }
    }
    assert_eq!(lost(&retention, STANDS), [(1, 2 * waits)]);
    assert_eq!(retention.pressure(), Pressure::Guaranteed, "{} bytes of {before}", log_bytes(&retention));
    let mut locked = retention.lock();
    let journal = locked.get().unwrap();
    let numbers: Vec<u64> = journal.entries(FULL).iter().map(|entry| entry.number).collect();
    assert_eq!(numbers, (1..=waits).collect::<Vec<_>>());
}

#[test]
fn a_pin_whose_copy_in_the_log_rotted_is_dropped_at_the_next_start_and_another_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (sound, lacks) = (3, 8);
    let retention = pins_lab(fs_opener(), dir.path(), ENTRIES, &[sound, lacks], None);
    while !retention.lock().get().unwrap().entries(PINS)[5].carried {
        go_on(&retention);
    }
    let (place, slot) = {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let place = journal.entries(PINS)[5].place;
        (place, journal.shape().segments[&place.segment].slot)
    };
    {
        // What stands behind it shows that it was durable.
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let number = journal.newest(WORKS) + 1;
        put(journal, WORKS, number);
    }
    drop(retention);
    let file = std::fs::File::options().write(true).open(dir.path().join(format!("redo-{slot:06}"))).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xee; 16], place.offset + 1000).unwrap();
    let (retention, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
    assert!(!found.damage.is_empty());
    go_on(&retention);
    let left: Vec<u64> = retention.shape().disks[&PINS].points.values().map(|point| point.number).collect();
    assert_eq!(left, [sound], "nobody could find it to unpin it");
    check_pin(&retention, sound);
}

#[test]
fn a_pinned_mark_that_waited_and_was_given_up_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let retention = pins_lab(fs_opener(), dir.path(), 1, &[], None);
    let kept = {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let now = Timestamp(1);
        let open = epoch(2, 1, EpochCause::Time, 0);
        journal.edit(&[Edit::EpochOpened(EpochOpened { to_epoch: 0, ..open })], now).unwrap();
        (2..=8).for_each(|number| put(journal, PINS, number));
        journal.append_applied(PINS, Applied { number: 4, epoch: 2, undo_bytes: 0 }, now).unwrap();
        journal.commit(now).unwrap();
        let pins = [3, 6].map(|number| Edit::PointKept(PointKept { epoch: 2, ..point(number) }));
        journal.edit(&pins, now).unwrap();
        assert_eq!(journal.give_up(PINS, "full", now).unwrap(), Some((5, 8)));
        journal.pinned_bytes()
    };
    crate::housekeeping::tidy_log(&retention).unwrap();
    let left: Vec<u64> = retention.shape().disks[&PINS].points.values().map(|point| point.number).collect();
    assert_eq!(left, [3]);
    assert!(retention.lock().get().unwrap().pinned_bytes() < kept);
}
