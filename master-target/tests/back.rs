//! Rollbacks that stop on their way: the medium fails, an image is damaged, the daemon ends. The disk is held until it
//! stands at a point again, and the way forward stays a point whatever happened.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/mod.rs"]
mod support;

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::ErrorCode;
use reprotect_engine::io::BlockFile;
use reprotect_engine::limits::DELTA_RECORD_BYTES_MAX;
use reprotect_engine::store::files::{FileFacts, Files, FilesError};
use reprotect_engine::store::journal::points::{self, Point};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::target::TargetKind;
use reprotect_engine::units::{Generation, SectorRange};
use reprotect_master_target::registry::fs_opener;
use support::*;

const SIZE: u64 = 48 << 20;
/// What changes between the points: five steps of a rollback.
const CHANGED: u64 = 40 << 20;
/// Changes of a target that is never gone.
const FOR_EVER: i64 = 1 << 40;

/// A disk at point `two`, of which much was something else at point `one`; its target's medium is gone after so many
/// changes.
struct Disk {
    bench: Bench,
    left: Arc<AtomicI64>,
    path: PathBuf,
    retention: PathBuf,
    _dir: tempfile::TempDir,
}

fn write(bench: &Bench, agent: &mut Agent, seed: u64) {
    let bytes = pattern(seed, CHANGED as usize);
    let records: Vec<Record> = (0..CHANGED / DELTA_RECORD_BYTES_MAX)
        .map(|number| {
            let at = number * DELTA_RECORD_BYTES_MAX;
            Record::data(at / 512, bytes.slice(at as usize..(at + DELTA_RECORD_BYTES_MAX) as usize))
        })
        .collect();
    for records in records.chunks(16) {
        let sequence = agent.delta(bench, records);
        agent.until_durable(bench, sequence);
    }
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let left = Arc::new(AtomicI64::new(FOR_EVER));
        let (path, retention) = (dir.path().join("disk.vmdk"), dir.path().join("retention"));
        let spec = spec(&path, TargetKind::MonolithicFlat);
        let state = dir.path().join("state");
        let opener = fused_opener(&left);
        let mut bench = Bench::start_with(opener, spec, state, SIZE, Some(retention.clone()));
        let mut agent = bench.opened();
        let whole = SectorRange::new(0, SIZE / 512);
        agent.bulk(&bench, whole, &[Record::zeros(whole)]);
        agent.until_settled(&bench, whole);
        agent.end_pass(&bench);
        for (number, name) in [(1, "one"), (2, "two")] {
            write(&bench, &mut agent, number);
            agent.mark_named(&bench, number, number as u8, name);
            agent.until_marked(&bench, number);
        }
        let mut disk = Self { bench, left, path, retention, _dir: dir };
        disk.bench.restart();
        disk
    }

    fn points(&self) -> Vec<Point> {
        self.bench.journal(|journal| points::all_points(journal, DISK).unwrap())
    }

    fn point(&self, name: &str) -> At {
        self.points().iter().rfind(|point| point.name.as_str().starts_with(name)).expect(name).at
    }

    fn go(&self, at: At) -> Result<u64, String> {
        let went = self.bench.ask(move |store| store.rollback(at));
        went.map(|done| done.written_bytes).map_err(|error| error.to_string())
    }

    /// What stands on the target.
    fn stands(&self, seed: u64) -> bool {
        let flat = self.path.with_file_name("disk-flat.vmdk");
        let file = std::fs::File::open(flat).unwrap();
        let mut bytes = vec![0; CHANGED as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes == pattern(seed, CHANGED as usize)
    }

    /// What an agent is told that wants to write.
    fn refusal(&mut self) -> String {
        let mut agent = self.bench.session();
        agent.ask_open(&self.bench, Generation(9));
        agent.until_error(&self.bench, ErrorCode::Target)
    }
}

/// A drive that says how much is free on it.
struct Crowded(Arc<dyn Files>, Arc<AtomicI64>);

impl Files for Crowded {
    fn facts(&self, path: &Path) -> Result<Option<FileFacts>, FilesError> {
        self.0.facts(path)
    }
    fn neighbours(&self, path: &Path) -> Result<Vec<String>, FilesError> {
        self.0.neighbours(path)
    }
    fn free_bytes(&self, _: &Path) -> Result<Option<u64>, FilesError> {
        Ok(Some(self.1.load(Ordering::SeqCst) as u64))
    }
    fn read_head(&self, path: &Path, bytes_max: usize) -> Result<Vec<u8>, FilesError> {
        self.0.read_head(path, bytes_max)
    }
    fn open(&self, path: &Path, writable: bool) -> Result<Box<dyn BlockFile>, FilesError> {
        self.0.open(path, writable)
    }
    fn create(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        self.0.create(path, size_bytes)
    }
    fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), FilesError> {
        self.0.resize(path, size_bytes)
    }
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), FilesError> {
        self.0.replace(path, content)
    }
    fn remove(&self, path: &Path) -> Result<(), FilesError> {
        self.0.remove(path)
    }

    fn remove_durably(&self, path: &Path) -> Result<(), FilesError> {
        self.0.remove_durably(path)
    }
    fn set_aside(&self, path: &Path, suffix: &str) -> Result<PathBuf, FilesError> {
        self.0.set_aside(path, suffix)
    }
}

/// The undo run below a folder that holds most.
fn fullest_run(folder: &Path) -> PathBuf {
    let mut folders = vec![folder.to_owned()];
    let mut best = (0, PathBuf::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // The one that goes on is longer, and a hole.
            let length = path.metadata().unwrap().blocks();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().unwrap().to_str().unwrap().starts_with("undo") && length > best.0 {
                best = (length, path);
            }
        }
    }
    best.1
}

#[test]
fn a_rollback_that_meets_damage_holds_the_disk_until_it_stands_at_another_point() {
    let mut disk = Disk::new();
    let (one, two) = (disk.point("one"), disk.point("two"));
    let run = fullest_run(&disk.retention);
    let file = std::fs::File::options().read(true).write(true).open(&run).unwrap();
    let at = CHANGED * 19 / 20;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
    disk.bench.restart();

    assert!(disk.points().iter().all(|point| point.damaged.is_none()), "nobody knows yet");
    assert!(disk.go(one).is_err(), "an image is damaged");
    assert!(!disk.stands(1) && !disk.stands(2), "the first steps were written");
    assert!(disk.refusal().contains("did not get to its end"));
    assert!(disk.go(one).is_err(), "it does not become a success by asking again");
    let told = disk.bench.retention().losses();
    assert!(told[&DISK].contains("roll back to another point"), "{told:?}");

    disk.bench.restart();
    assert!(disk.refusal().contains("did not get to its end"), "a restart cannot finish it either");
    let damaged = |at: At| disk.points().iter().find(|point| point.at == at).unwrap().damaged;
    let rot = damaged(one).expect("whoever meets damage records it");
    assert!(rot.bytes > 0 && rot.bytes <= 1 << 16, "{rot}");
    assert_eq!(damaged(two), None, "what does not need the image is whole");
    assert_eq!(disk.point("before-rollback").number, two.number, "the way forward is a point");
    disk.go(two).unwrap();
    assert!(disk.stands(2));
    disk.bench.restart();
    assert!(disk.stands(2));
    disk.bench.opened();
    disk.bench.stop();
}

#[test]
fn reading_a_point_records_what_is_damaged_of_it_exactly_and_once() {
    let mut disk = Disk::new();
    let (one, two) = (disk.point("one"), disk.point("two"));
    let run = fullest_run(&disk.retention);
    let file = std::fs::File::options().read(true).write(true).open(&run).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, CHANGED / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 1], CHANGED / 2).unwrap();
    let read = |disk: &Disk, at: At| {
        let retention = Arc::clone(disk.bench.retention());
        disk.bench.ask(move |store| {
            let view = retention.view(DISK, at)?;
            let mut piece = vec![0; 1 << 20];
            let offsets = (0..SIZE).step_by(piece.len());
            offsets.map(|offset| store.read_view(&view, offset, &mut piece)).fold(Ok(()), Result::and)
        })
    };
    for _ in 0..2 {
        assert!(read(&disk, one).is_err());
        read(&disk, two).unwrap();
        let known = disk.bench.journal(|journal| journal.shape().disks[&DISK].damaged.clone());
        let [known] = known.as_slice() else { panic!("{known:?}") };
        assert!((1..=16).contains(&(known.end - known.start)), "{known:?}");
        for point in disk.points() {
            assert_eq!(point.damaged.is_some(), point.at < two, "{}", point.at);
        }
        disk.bench.restart();
    }
    disk.bench.stop();
}

#[test]
fn a_rollback_is_finished_by_the_next_start_wherever_it_ended_and_the_way_forward_is_kept() {
    let mut disk = Disk::new();
    let (one, mut stopped) = (disk.point("one"), 0);
    // Two writes and a flush or so for each of five steps.
    for changes in (0..24).step_by(3) {
        disk.left.store(changes, Ordering::SeqCst);
        let went = disk.go(one);
        stopped += u32::from(went.is_err());
        disk.left.store(FOR_EVER, Ordering::SeqCst);
        disk.bench.restart();
        disk.bench.ask(|_| ()); // its turn comes when the rollback is finished
        assert!(disk.stands(1), "after {changes} changes: {went:?}");
        assert!(disk.refusal().contains("is held"));
        let forward = disk.point("before-rollback");
        disk.go(forward).unwrap();
        assert!(disk.stands(2), "after {changes} changes");
    }
    assert!(stopped >= 4, "it stopped on its way {stopped} times");
    disk.bench.restart();
    disk.bench.opened();
    disk.bench.stop();
}

#[test]
fn a_rollback_whose_daemon_stops_ends_between_two_steps_and_the_next_start_goes_on_with_it() {
    let mut disk = Disk::new();
    let one = disk.point("one");
    let points = disk.points();
    disk.bench.retention().interrupt();
    let told = disk.go(one).unwrap_err();
    assert!(told.contains("was not begun") && told.contains("repeat the command"), "{told}");
    assert!(disk.stands(2) && disk.points() == points, "nothing was changed");
    disk.bench.restart();
    // Interrupted when the first of its steps is written. A thread must see that in time, so it is tried again.
    let told = (0..20).find_map(|_| {
        let (left, retention) = (Arc::clone(&disk.left), Arc::clone(disk.bench.retention()));
        left.store(FOR_EVER, Ordering::SeqCst);
        let watch = std::thread::spawn(move || {
            let begun = std::time::Instant::now();
            while left.load(Ordering::SeqCst) == FOR_EVER && begun.elapsed().as_secs() < 60 {
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            retention.interrupt();
        });
        let went = disk.go(one);
        watch.join().unwrap();
        if went.is_ok() {
            disk.bench.restart();
            disk.go(disk.point("before-rollback")).unwrap();
        }
        went.err()
    });
    let told = told.expect("it goes on to its end whatever it is told");
    assert!(told.contains("interrupted") && told.contains("starts again"), "{told}");
    assert!(!disk.stands(1), "it was on its way");
    assert!(disk.refusal().contains("did not get to its end"));
    disk.bench.restart();
    disk.bench.ask(|_| ());
    assert!(disk.stands(1));
    disk.go(disk.point("before-rollback")).unwrap();
    assert!(disk.stands(2));
    disk.bench.stop();
}

#[test]
fn a_rollback_that_may_not_fit_is_refused_before_anything_is_changed() {
    let (mut disk, free) = (Disk::new(), Arc::new(AtomicI64::new(0)));
    disk.bench.retention_files = Arc::new(Crowded(fs_opener(), Arc::clone(&free)));
    disk.bench.restart();
    let (one, two) = (disk.point("one"), disk.point("two"));
    let known = disk.points();
    let shape = disk.bench.retention().shape();
    let needed = CHANGED + CHANGED / 16;
    for bytes in [0, 1 << 20, CHANGED as i64] {
        free.store(bytes, Ordering::SeqCst);
        let refused = disk.go(one).unwrap_err();
        let said = format!("{} blocks", CHANGED / 4096);
        assert!(
            refused.contains(&said) && refused.contains(&format!("and {bytes} may be used")),
            "{refused}"
        );
        assert!(refused.contains("free some space") && refused.contains("nothing was changed"), "{refused}");
        assert!(disk.stands(2));
        assert_eq!(disk.points(), known);
        assert_eq!(disk.bench.retention().shape(), shape, "no epoch was ended or begun");
    }
    disk.bench.opened(); // nobody is refused
    // What takes little needs little, and where there is room it goes.
    free.store(1 << 20, Ordering::SeqCst);
    disk.go(two).unwrap();
    assert!(disk.stands(2));
    free.store(needed as i64, Ordering::SeqCst);
    disk.go(one).unwrap();
    assert!(disk.stands(1));
    let largest = fullest_run(&disk.retention).metadata().unwrap().blocks() * 512;
    assert!(largest <= needed, "{largest} bytes were needed, {needed} are said to be enough");
    disk.bench.stop();
}
