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
use reprotect_engine::limits::DELTA_RECORD_BYTES_MAX;
use reprotect_engine::store::journal::points::{self, Point};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::target::TargetKind;
use reprotect_engine::units::{Generation, SectorRange};
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

    assert!(disk.go(one).is_err(), "an image is damaged");
    assert!(!disk.stands(1) && !disk.stands(2), "the first steps were written");
    assert!(disk.refusal().contains("did not get to its end"));
    assert!(disk.go(one).is_err(), "it does not become a success by asking again");
    let told = disk.bench.retention().losses();
    assert!(told[&DISK].contains("roll back to another point"), "{told:?}");

    disk.bench.restart();
    assert!(disk.refusal().contains("did not get to its end"), "a restart cannot finish it either");
    assert_eq!(disk.point("before-rollback").number, two.number, "the way forward is a point");
    disk.go(two).unwrap();
    assert!(disk.stands(2));
    disk.bench.restart();
    assert!(disk.stands(2));
    disk.bench.opened();
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
