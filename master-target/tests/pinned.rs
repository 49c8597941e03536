//! One disk that does not take what waits for it in the shared redo log, while another goes on: the log stays bounded,
//! nothing is lost, and the disk is complete when it is back.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/mod.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::DiskAdded;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::{Applied, EntryKind};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_engine::store::journal::points::{self, Offer, Point};
use reprotect_engine::store::target::TargetKind;
use reprotect_engine::units::{DiskId, SectorRange};
use reprotect_master_target::housekeeping::tidy_log;
use reprotect_master_target::registry::fs_opener;
use reprotect_master_target::retention::RetentionSettings;
use support::*;

const SIZE: u64 = 4 << 20;
const SEGMENT: u64 = 1 << 20;
const OTHER: DiskId = DiskId([9; 16]);

/// Nothing is kept in the log for its age.
fn settings() -> RetentionSettings {
    let kept = retention_settings();
    let ladder = Ladder { any_write: Duration::ZERO, ..kept.ladder };
    RetentionSettings { segment_bytes: SEGMENT, ladder, ..kept }
}

/// A synced disk whose last mark has block 1, and whose stretch goes on with blocks 2 and 3, durable.
fn in_a_stretch(opener: Arc<dyn Files>, dir: &Path) -> (Bench, Agent) {
    let spec = spec(&dir.join("disk.vmdk"), TargetKind::MonolithicFlat);
    let folder = Some(dir.join("retention"));
    let mut bench = Bench::start_keeping(opener, spec, dir.join("state"), SIZE, folder, settings());
    let mut agent = bench.opened();
    let whole = SectorRange::new(0, SIZE / 512);
    agent.bulk(&bench, whole, &[Record::zeros(whole)]);
    agent.until_settled(&bench, whole);
    agent.end_pass(&bench);
    agent.mark(&bench, 1, 1);
    agent.until_marked(&bench, 1);
    agent.delta(&bench, &[block(1)]);
    agent.mark(&bench, 2, 2);
    agent.until_marked(&bench, 2);
    agent.delta(&bench, &[block(2)]);
    let tail = agent.delta(&bench, &[block(3)]);
    agent.until_durable(&bench, tail);
    (bench, agent)
}

/// The other disk writes so much, and has it applied.
fn other_writes(bench: &Bench, bytes: u64) {
    bench.journal(|journal| {
        let now = wall_clock();
        if !journal.shape().disks.contains_key(&OTHER) {
            let added = DiskAdded { disk: OTHER, machine: [8; 16], size_sectors: 64, time: now };
            journal.add_disk(added, now).unwrap();
        }
        for _ in 0..bytes >> 16 {
            let body = vec![7; 65536];
            let (number, _) = journal.append(OTHER, EntryKind::Batch, &[&body], now).unwrap();
            journal.append_applied(OTHER, Applied { number, epoch: 0, undo_bytes: 0 }, now).unwrap();
            journal.commit(now).unwrap();
        }
    });
}

fn log_bytes(bench: &Bench) -> u64 {
    bench.journal(|journal| journal.log_bytes())
}

fn until(what: &str, mut ask: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if ask() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("not within a minute: {what}");
}

fn listed(bench: &Bench) -> Vec<Point> {
    bench.journal(|journal| points::points(journal, DISK).unwrap())
}

/// The agent comes back: nothing is sent again or compared, and its next mark is the source.
fn complete(bench: &mut Bench, mut agent: Agent) {
    let expected = agent.sequence;
    let again = bench.opened();
    assert_eq!((again.sequence, again.mode), (expected, PassMode::Done));
    agent = again;
    agent.delta(bench, &[block(4)]);
    agent.mark_named(bench, 9, 9, "complete");
    agent.until_marked(bench, 9);
    let listed = listed(bench);
    let point = listed.iter().find(|point| point.name.as_str() == "complete").unwrap();
    assert!(point.is_consistent());
    assert_eq!(bench.point_bytes(point.at), with_blocks(SIZE, &[1, 2, 3, 4]));
    let intervals = bench.journal(|journal| points::timeline(journal, DISK).unwrap());
    assert!(intervals.iter().all(|interval| interval.offer != Offer::Lost), "{intervals:?}");
}

#[test]
fn a_disk_whose_machine_went_away_in_a_stretch_lets_go_and_its_last_mark_stays_a_point() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, agent) = in_a_stretch(fs_opener(), dir.path());
    let last = |bench: &Bench| *listed(bench).iter().rfind(|point| point.is_consistent()).unwrap();
    assert_eq!(bench.point_bytes(last(&bench).at), with_blocks(SIZE, &[1]));
    other_writes(&bench, 4 * SEGMENT);
    assert!(bench.journal(|journal| journal.pinned()).is_some(), "it needs the oldest segment");
    // It is asked once, and does it by itself.
    tidy_log(bench.retention()).unwrap();
    until("the disk let go", || bench.journal(|journal| journal.pinned()).is_none());
    for _ in 0..6 {
        tidy_log(bench.retention()).unwrap();
        assert!(log_bytes(&bench) <= 2 * SEGMENT, "{}", log_bytes(&bench));
        other_writes(&bench, SEGMENT);
    }
    for restarted in [false, true] {
        if restarted {
            bench.restart();
        }
        let mark = last(&bench);
        assert!(mark.kept, "it outlives its part of the log");
        assert_eq!(bench.point_bytes(mark.at), with_blocks(SIZE, &[1]));
    }
    complete(&mut bench, agent);
    bench.stop();
}

#[test]
fn what_a_stopped_disk_needs_is_carried_forward_and_it_is_complete_when_it_is_back() {
    let (left, dir) = (Arc::new(AtomicI64::new(i64::MAX)), tempfile::tempdir().unwrap());
    let (mut bench, agent) = in_a_stretch(fused_opener(&left), dir.path());
    left.store(0, Ordering::SeqCst);
    agent.mark(&bench, 3, 3);
    bench.until_problem(|problem| problem.is_some());
    let needed = bench.journal(|journal| journal.waiting_bytes(DISK));
    assert!(needed > 8192, "two blocks and perhaps the mark wait: {needed}");
    let mut before = 0;
    for round in 0..16 {
        other_writes(&bench, SEGMENT);
        tidy_log(bench.retention()).unwrap();
        // The first looks only ask.
        assert!(log_bytes(&bench) <= 6 * SEGMENT, "round {round}: {}", log_bytes(&bench));
        let oldest = bench.journal(|journal| journal.entries(DISK).first().copied()).unwrap().place.segment;
        assert!(oldest >= before);
        before = oldest;
    }
    assert!(before > 8, "its entries stand in segment {before} now");
    assert_eq!(bench.journal(|journal| journal.waiting_bytes(DISK)), needed);
    bench.stop();
    // Twice: with the target still gone nothing is forgotten, and then it is all there.
    left.store(i64::MAX, Ordering::SeqCst);
    bench.resume();
    bench.restart();
    complete(&mut bench, agent);
    bench.stop();
}
