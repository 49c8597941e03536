//! A disk that grows with its source while it is protected: the target, its points, and what is refused.
//!
//! Over real files and the real disk worker; the agent is scripted.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/mod.rs"]
mod support;

use std::path::Path;

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::ErrorCode;
use reprotect_engine::io::{BlockFile as _, ReadAt};
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::points::{self, Point};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, JournalSettings};
use reprotect_engine::store::target::{Expectation, TargetKind, grow_target, open_target};
use reprotect_engine::units::{SectorRange, Timestamp};
use reprotect_master_target::registry::fs_opener;
use support::*;

const OLD: u64 = (6 << 20) + 512 * 3;
const NEW: u64 = (75 << 20) + 512 * 5;

/// A protected disk whose initial sync is done.
fn synced(dir: &Path, kind: TargetKind, journal: bool) -> (Bench, Agent) {
    let retention = journal.then(|| dir.join("retention"));
    let spec = spec(&dir.join("disk.vmdk"), kind);
    let mut bench = Bench::start_with(fs_opener(), spec, dir.join("state"), OLD, retention);
    let mut agent = bench.opened();
    let whole = SectorRange::new(0, OLD / 512);
    agent.bulk(&bench, whole, &[Record::zeros(whole)]);
    agent.until_settled(&bench, whole);
    agent.end_pass(&bench);
    (bench, agent)
}

/// A write at this byte, as the source has it then.
fn write(bench: &Bench, agent: &mut Agent, disk: &mut [u8], at: u64, seed: u64) {
    let bytes = pattern(seed, 16 << 10);
    disk[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    let sequence = agent.delta(bench, &[Record::data(at / 512, bytes)]);
    agent.until_durable(bench, sequence);
}

fn mark(bench: &Bench, agent: &mut Agent, number: u64, name: &str) {
    agent.mark_named(bench, number, name.len() as u8, name); // names of one length are one point
    agent.until_marked(bench, number);
}

fn grow(bench: &Bench, size: u64) -> Result<(), String> {
    let inputs = bench.worker.as_ref().unwrap().inputs();
    inputs.grow(bench.opener.clone(), size).map_err(|error| error.to_string())
}

fn point(bench: &Bench, name: &str) -> At {
    let points: Vec<Point> = bench.journal(|journal| points::all_points(journal, DISK).unwrap());
    points.iter().rfind(|point| point.name.as_str().starts_with(name)).expect(name).at
}

/// What stands on the closed target.
fn target_bytes(bench: &Bench) -> Vec<u8> {
    let mut target = open_target(&bench.opener, &bench.spec, &Expectation::default()).unwrap();
    let mut bytes = vec![0; target.size_bytes() as usize];
    target.read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
    bytes
}

#[test]
fn a_disk_grows_while_it_is_protected_and_its_points_keep_the_size_they_had() {
    for kind in [TargetKind::Vmfs, TargetKind::MonolithicSparse, TargetKind::TwoGbMaxExtentSparse] {
        let dir = tempfile::tempdir().unwrap();
        let (mut bench, mut agent) = synced(dir.path(), kind, true);
        let mut disk = vec![0; OLD as usize];
        write(&bench, &mut agent, &mut disk, 0, 1);
        write(&bench, &mut agent, &mut disk, OLD - (16 << 10), 2);
        mark(&bench, &mut agent, 1, "small");
        until_a_point(&bench);
        until_a_point(&bench);
        let small = disk.clone();
        // What is behind the mark belongs to the old size, too.
        write(&bench, &mut agent, &mut disk, 1 << 20, 3);
        let generation = agent.generation;
        grow(&bench, NEW).unwrap();
        assert_eq!(bench.worker.as_ref().unwrap().status().snapshot().generation, generation);
        disk.resize(NEW as usize, 0);
        // The old session has nothing to say any more.
        agent.delta(&bench, &[Record::data(0, vec![0xEE; 4096].into())]);
        bench.size_bytes = NEW;
        let mut agent = bench.opened();
        assert!(agent.generation > generation);
        write(&bench, &mut agent, &mut disk, OLD - 512, 4);
        write(&bench, &mut agent, &mut disk, NEW - (16 << 10), 5);
        mark(&bench, &mut agent, 1, "larger");
        let (at_small, at_large) = (point(&bench, "small"), point(&bench, "larger"));
        for step in ["running", "after a restart"] {
            assert!(bench.point_bytes(at_small) == small, "{kind} {step}");
            assert!(bench.point_bytes(at_large) == disk, "{kind} {step}");
            bench.restart();
        }
        // Back over the growth: the target keeps its size, and zeros are behind the old disk.
        bench.ask(move |store| store.rollback(at_small)).unwrap();
        assert!(bench.point_bytes(at_small) == small && bench.point_bytes(at_large) == disk, "{kind} back");
        bench.stop();
        let mut back = small.clone();
        back.resize(NEW as usize, 0);
        assert!(target_bytes(&bench) == back, "{kind}: the target at the point before");
        bench.resume();
        let forward = point(&bench, "before-rollback");
        bench.ask(move |store| store.rollback(forward)).unwrap();
        let mut agent = bench.opened();
        write(&bench, &mut agent, &mut disk, 40 << 20, 6);
        mark(&bench, &mut agent, 1, "on");
        assert!(bench.point_bytes(at_small) == small && bench.point_bytes(at_large) != disk);
        bench.stop();
        assert!(target_bytes(&bench) == disk, "{kind} forward");
    }
}

#[test]
fn a_disk_grows_in_the_middle_of_its_initial_sync() {
    for journal in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(&dir.path().join("disk.vmdk"), TargetKind::TwoGbMaxExtentFlat);
        let retention = journal.then(|| dir.path().join("retention"));
        let mut bench = Bench::start_with(fs_opener(), spec, dir.path().join("state"), OLD, retention);
        let mut agent = bench.opened();
        let half = SectorRange::new(0, 8192);
        let first = [Record::data(0, pattern(1, 4096)), Record::zeros(SectorRange::new(8, 8192))];
        agent.bulk(&bench, half, &first);
        agent.until_settled(&bench, half);
        // Behind the redo log, where there is one; the pass goes over it once more.
        let sequence = agent.delta(&bench, &[Record::data(9000, pattern(3, 4096))]);
        agent.until_durable(&bench, sequence);
        grow(&bench, NEW).unwrap();
        bench.size_bytes = NEW;
        let mut agent = bench.opened();
        assert_eq!(agent.settled, [half], "what was settled stays so, and nothing else is");
        let rest = SectorRange::new(8192, NEW / 512);
        let mut disk = vec![0; NEW as usize];
        let last = NEW as usize - 4096;
        for (at, seed) in [(0, 1), (9000 * 512, 3), (last, 2)] {
            disk[at..at + 4096].copy_from_slice(&pattern(seed, 4096));
        }
        let records = [
            Record::zeros(SectorRange::new(8192, last as u64 / 512)),
            Record::data(last as u64 / 512, pattern(2, 4096)),
        ];
        agent.bulk(&bench, rest, &records);
        agent.until_settled(&bench, rest);
        agent.end_pass(&bench);
        bench.restart();
        if !journal {
            assert_eq!(bench.saved().size_sectors, NEW / 512);
        }
        bench.opened();
        bench.stop();
        assert!(target_bytes(&bench) == disk, "journal: {journal}");
    }
}

/// Ends the undo epoch of a stopped disk, as a growth does before it touches the target.
fn end_epoch(bench: &Bench, folder: &Path) {
    let settings = JournalSettings { segment_bytes: 32 << 20 };
    let (mut journal, found) = Journal::open(fs_opener(), folder, settings, Timestamp(1)).unwrap();
    let expect = Expectation { writable: true, ..Expectation::default() };
    let target = open_target(&bench.opener, &bench.spec, &expect).unwrap();
    let applied = found.disks[&DISK].applied.map(|(applied, _)| applied);
    let (mut applier, _) = Applier::open(&journal, DISK, target, applied).unwrap();
    applier.close_epoch(&mut journal, Timestamp(1)).unwrap();
    applier.into_target().close().unwrap();
    journal.close(Timestamp(1)).unwrap();
}

#[test]
fn a_target_that_grew_before_a_kill_is_taken_at_its_size_and_its_points_at_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, mut agent) = synced(dir.path(), TargetKind::MonolithicSparse, true);
    let mut disk = vec![0; OLD as usize];
    write(&bench, &mut agent, &mut disk, 0, 1);
    mark(&bench, &mut agent, 1, "small");
    until_a_point(&bench);
    let small = disk.clone();
    // As the daemon leaves it that is killed between the growth of the target and the note of it in the manifest.
    bench.stop();
    end_epoch(&bench, &dir.path().join("retention"));
    grow_target(&bench.opener, &bench.spec, NEW).unwrap();
    bench.size_bytes = NEW;
    bench.resume();
    disk.resize(NEW as usize, 0);
    let mut agent = bench.opened();
    write(&bench, &mut agent, &mut disk, NEW - (16 << 10), 2);
    mark(&bench, &mut agent, 1, "larger");
    for _ in 0..2 {
        assert!(bench.point_bytes(point(&bench, "small")) == small);
        assert!(bench.point_bytes(point(&bench, "larger")) == disk);
        bench.restart();
    }
    bench.stop();
}

#[test]
fn what_cannot_grow_is_refused_and_goes_on_at_its_size() {
    for journal in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut bench, mut agent) = synced(dir.path(), TargetKind::MonolithicSparse, journal);
        let mut disk = vec![0; OLD as usize];
        write(&bench, &mut agent, &mut disk, 0, 1);
        for (size, word) in [(OLD - 512, "never made smaller"), (1 << 46, "are free")] {
            let why = grow(&bench, size).unwrap_err();
            assert!(why.contains(word), "{why}");
            assert_eq!(bench.problem(), None);
        }
        let mut agent = bench.opened();
        write(&bench, &mut agent, &mut disk, 1 << 20, 2);
        mark(&bench, &mut agent, 1, "on"); // or it waits for its mark
        // Whoever opens it at another size is told what to do.
        bench.size_bytes = NEW;
        let late = bench.session();
        late.ask_open(&bench, agent.generation);
        let mut late = late;
        assert!(late.until_error(&bench, ErrorCode::Size).contains("the source has"));
        bench.size_bytes = OLD;
        bench.restart();
        bench.opened();
        bench.stop();
        assert!(target_bytes(&bench) == disk);
    }
}

#[test]
fn a_device_grows_when_the_operator_enlarged_it_and_is_refused_before() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("attached.img");
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let device = Loop::over(&image);
    let spec = spec(&device.path, TargetKind::Device);
    let mut bench = Bench::start_with(fs_opener(), spec, dir.path().join("state"), 8 << 20, None);
    let mut agent = bench.opened();
    let whole = SectorRange::new(0, (8 << 20) / 512);
    agent.bulk(&bench, whole, &[Record::zeros(whole)]);
    agent.until_settled(&bench, whole);
    agent.end_pass(&bench);
    let why = grow(&bench, 16 << 20).unwrap_err();
    assert!(why.contains("exactly the size of the source") && why.contains("8388608"), "{why}");
    agent = bench.opened();
    let mut disk = vec![0; 16 << 20];
    write(&bench, &mut agent, &mut disk, 0, 1);
    std::fs::File::options().write(true).open(&image).unwrap().set_len(16 << 20).unwrap();
    let resized = std::process::Command::new("losetup").arg("-c").arg(&device.path).status().unwrap();
    assert!(resized.success());
    grow(&bench, 16 << 20).unwrap();
    bench.size_bytes = 16 << 20;
    let mut agent = bench.opened();
    write(&bench, &mut agent, &mut disk, (16 << 20) - (16 << 10), 2);
    bench.stop();
    assert!(target_bytes(&bench) == disk);
}
