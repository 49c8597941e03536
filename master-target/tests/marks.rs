//! Marks and what is said of them later, at a disk behind the journal: every one is kept once, and a part of the stream
//! that turned out to promise less stays so.

#[path = "support/mod.rs"]
mod support;

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{PassMode, PointDegrade};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile as _, ReadAt};
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::store::target::{Expectation, TargetKind, open_target};
use reprotect_engine::units::{SectorRange, Sequence};
use reprotect_master_target::registry::fs_opener;
use support::*;

const SIZE: u64 = 4 << 20;

/// A synced disk behind a journal.
fn synced() -> (tempfile::TempDir, Bench, Agent) {
    let dir = tempfile::tempdir().expect("a directory");
    let spec = spec(&dir.path().join("disk.vmdk"), TargetKind::MonolithicFlat);
    let folder = Some(dir.path().join("retention"));
    let mut bench = Bench::start_with(fs_opener(), spec, dir.path().join("state"), SIZE, folder);
    let mut agent = bench.opened();
    assert_eq!(agent.mode, PassMode::Copy);
    let whole = SectorRange::new(0, SIZE / 512);
    agent.bulk(&bench, whole, &[Record::zeros(whole)]);
    agent.until_settled(&bench, whole);
    agent.end_pass(&bench);
    (dir, bench, agent)
}

fn marks(bench: &Bench) -> usize {
    bench
        .journal(|journal| journal.entries(DISK).iter().filter(|entry| entry.kind == EntryKind::Mark).count())
}

/// The target as it stands, while nobody has it open.
fn target_bytes(bench: &Bench) -> Vec<u8> {
    let mut target = open_target(&bench.opener, &bench.spec, &Expectation::default()).expect("the target");
    let mut data = vec![0; bench.size_bytes as usize];
    target.read(&mut [ReadAt { offset: 0, data: &mut data }]).expect("its content");
    data
}

fn change(agent: &mut Agent, bench: &Bench, byte: u8) -> Sequence {
    agent.delta(bench, &[Record::data(u64::from(byte) * 8, vec![byte; 4096].into())])
}

#[test]
fn marks_at_one_sequence_are_all_kept_and_those_sent_again_are_no_second_ones() {
    let (_dir, mut bench, mut agent) = synced();
    change(&mut agent, &bench, 1);
    for point in 1..=3 {
        agent.mark(&bench, point, point as u8);
    }
    agent.until_marked(&bench, 3);
    assert_eq!(marks(&bench), 3);

    // The acknowledgement was lost: a new session sends them again, and one more.
    let mut again = bench.opened();
    for point in 1..=4 {
        again.mark(&bench, point, point as u8);
    }
    again.until_marked(&bench, 4);
    assert_eq!(marks(&bench), 4);

    bench.restart();
    let mut later = bench.opened();
    assert_eq!(later.sequence, again.sequence);
    for point in 1..=5 {
        later.mark(&bench, point, point as u8);
    }
    later.until_marked(&bench, 5);
    assert_eq!(marks(&bench), 5, "known after a restart, too");
    // Behind another batch the same words are another mark.
    change(&mut later, &bench, 2);
    later.mark(&bench, 6, 5);
    later.until_marked(&bench, 6);
    assert_eq!(marks(&bench), 6);
    bench.stop();
}

#[test]
fn what_is_said_of_points_later_stays_after_a_restart_and_concerns_no_others() {
    let (_dir, mut bench, mut agent) = synced();
    let first = change(&mut agent, &bench, 1);
    agent.mark(&bench, 1, 1);
    agent.until_marked(&bench, 1);
    // Both marks applied at once would make the second the first point.
    until_a_point(&bench);
    let second = change(&mut agent, &bench, 2);
    agent.mark(&bench, 2, 2);
    agent.until_marked(&bench, 2);
    let degrade = |from, to, lineage| PointDegrade {
        disk: DISK,
        lineage,
        generation: agent.generation,
        from,
        to,
        cause: Text::new("512 bytes of the oracle differ"),
    };
    // Of an older session, and of another history: neither may change anything.
    let stale = PointDegrade { generation: Default::default(), ..degrade(first, second, LINEAGE) };
    agent.send(&bench, DiskInput::PointDegrade(stale));
    agent.send(&bench, DiskInput::PointDegrade(degrade(first, first, LINEAGE)));
    let told = |bench: &Bench| bench.journal(|journal| journal.shape().disks[&DISK].clone());
    for _ in 0..1000 {
        if !told(&bench).degraded.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    for restarted in [false, true] {
        if restarted {
            bench.restart();
        }
        let shape = told(&bench);
        assert_eq!(shape.degraded.len(), 1, "the stale one is refused");
        assert!(shape.is_degraded(LINEAGE, first, 1) && !shape.is_degraded(LINEAGE, second, 1));
        assert!(!shape.is_degraded(Default::default(), first, 1), "of another history");
        // The first mark after the initial sync is kept as a point.
        let kept: Vec<_> = shape.points.values().map(|point| (point.sequence, point.degraded)).collect();
        assert_eq!(kept, [(first, true)]);
    }
    bench.stop();
}

#[test]
fn a_diff_stretch_without_its_mark_is_durable_but_reaches_the_target_only_with_the_mark() {
    let (_dir, mut bench, mut agent) = synced();
    change(&mut agent, &bench, 1);
    agent.mark(&bench, 1, 1);
    agent.until_marked(&bench, 1);
    let tail = change(&mut agent, &bench, 2);
    agent.until_durable(&bench, tail);
    let block = |bytes: &[u8], at: usize| bytes[at * 4096..(at + 1) * 4096].to_vec();
    let empty = vec![0; 4096];

    // Twice: what was in memory at the first stop is in the log only at the second.
    for _ in 0..2 {
        bench.stop();
        let bytes = target_bytes(&bench);
        assert_eq!(block(&bytes, 1), vec![1; 4096], "up to the mark");
        assert_eq!(block(&bytes, 2), empty, "and no further");
        bench.resume();
    }
    let mut later = bench.opened();
    assert_eq!(later.sequence, tail, "nothing has to be sent again");
    later.mark(&bench, 2, 2);
    later.until_marked(&bench, 2);
    bench.stop();
    let bytes = target_bytes(&bench);
    assert_eq!((block(&bytes, 1), block(&bytes, 2)), (vec![1; 4096], vec![2; 4096]));
}
