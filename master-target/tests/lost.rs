//! Entries that were durable and that damage took from the redo log before they were applied: the disk is compared, and
//! until then nothing that lacks them is called a point, wherever the daemon is killed meanwhile.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use reprotect_engine::format::batch::{MarkClass, encode_batch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::{EntryHead, EntryKind};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::points::{self, Offer, Point};
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings};
use reprotect_engine::store::target::{Expectation, TargetKind, open_target};
use reprotect_engine::units::{SectorRange, Timestamp};
use reprotect_master_target::guard::Guard;
use reprotect_master_target::journaled::Journaled;
use reprotect_master_target::redo::newest_state;
use reprotect_master_target::registry::fs_opener;
use reprotect_master_target::retention::{Retention, RetentionSettings};
use support::*;

const SIZE: u64 = 8 << 20;

fn places(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    (dir.join("disk.vmdk"), dir.join("state"), dir.join("retention"))
}

fn settings() -> RetentionSettings {
    RetentionSettings { segment_bytes: 1 << 20, ..retention_settings() }
}

/// A synced disk with a lasting point at block 1, stopped.
fn stopped(dir: &Path) -> (Bench, Agent) {
    let (path, state, folder) = places(dir);
    let spec = spec(&path, TargetKind::MonolithicFlat);
    let mut bench = Bench::start_keeping(fs_opener(), spec, state, SIZE, Some(folder), settings());
    let mut agent = bench.opened();
    let whole = SectorRange::new(0, SIZE / 512);
    agent.bulk(&bench, whole, &[Record::zeros(whole)]);
    agent.until_settled(&bench, whole);
    agent.end_pass(&bench);
    agent.delta(&bench, &[block(1)]);
    agent.mark(&bench, 1, 1);
    agent.until_marked(&bench, 1);
    // Applied before the next one comes, the first mark after the initial sync is a point.
    until_a_point(&bench);
    agent.mark_named(&bench, 2, 2, "honest");
    agent.until_marked(&bench, 2);
    bench.stop();
    (bench, agent)
}

/// What a daemon leaves that was killed with entries durable and not applied: blocks 2 to 5, each with its mark; then
/// damage takes the entries of some.
fn left_waiting(dir: &Path, agent: &mut Agent, damaged: &[u8]) {
    let (_, _, folder) = places(dir);
    let layout = JournalSettings { segment_bytes: settings().segment_bytes };
    let now = wall_clock();
    let (mut journal, found) = Journal::open(fs_opener(), &folder, layout, now).unwrap();
    let (mut state, _) = found.disks[&DISK].state.clone().unwrap();
    let mut hits = Vec::new();
    for byte in 2..=5 {
        let records = [block(byte)];
        let header = agent.delta_header(&records);
        let body = encode_batch(&header, &records).body();
        let (_, place) = journal.append(DISK, EntryKind::Batch, &[&body], now).unwrap();
        if damaged.contains(&byte) {
            hits.push(place);
        }
        agent.sequence = header.last_sequence();
        agent.chain = header.chain_after(&records);
        let mark = agent.mark_of(u64::from(byte) + 1, byte + 1, "");
        journal.append(DISK, EntryKind::Mark, &[&mark.to_bytes()], now).unwrap();
        journal.commit(now).unwrap();
    }
    (state.sequence, state.chain, state.marked) = (agent.sequence, agent.chain, agent.sequence);
    journal.append_state(&state, now).unwrap();
    journal.commit(now).unwrap();
    journal.seal(now).unwrap();
    let segments = journal.shape().segments.clone();
    drop(journal);
    for place in hits {
        let path = folder.join(format!("redo-{:06}", segments[&place.segment].slot));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[place.offset as usize + EntryHead::BYTES + 200] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
}

fn listed(bench: &Bench) -> Vec<Point> {
    bench.journal(|journal| points::points(journal, DISK).unwrap())
}

fn newest_consistent(bench: &Bench) -> Point {
    *listed(bench).iter().rfind(|point| point.is_consistent()).expect("a consistent point")
}

fn offers(bench: &Bench) -> Vec<Offer> {
    let intervals = bench.journal(|journal| points::timeline(journal, DISK).unwrap());
    intervals.iter().map(|interval| interval.offer).collect()
}

/// The agent comes back, writes and marks before the compare, is compared, and marks again: what is called consistent
/// meanwhile is.
fn compared(bench: &mut Bench, before: &[u8], after: &[u8]) {
    let mut agent = bench.opened();
    assert_eq!(agent.mode, PassMode::Compare, "the agent is told to compare");
    agent.delta(bench, &[block(6)]);
    agent.mark_named(bench, 1, 20, "before the compare");
    agent.until_marked(bench, 1);
    let early = listed(bench).into_iter().find(|point| point.name.as_str() == "before the compare").unwrap();
    assert_eq!((early.class, early.degraded, early.kept), (MarkClass::Crash, true, true));
    let honest = newest_consistent(bench);
    assert!(honest.at.number < early.at.number);
    assert_eq!(
        bench.point_bytes(honest.at),
        with_blocks(SIZE, before),
        "what stands before the gap is what it was"
    );
    let by_time = bench.journal(|journal| points::at_time(journal, DISK, Timestamp(u64::MAX)).unwrap());
    assert_eq!(by_time.at, honest.at);
    assert!(offers(bench).contains(&Offer::Lost), "{:?}", offers(bench));

    let whole = SectorRange::new(0, SIZE / 512);
    let source = with_blocks(SIZE, after);
    for chunk in 0..2 {
        let data = source[chunk * (4 << 20)..(chunk + 1) * (4 << 20)].to_vec();
        let start = chunk as u64 * 8192;
        let records: Vec<Record> = data
            .chunks(64 << 10)
            .zip(0..)
            .map(|(part, at)| Record::data(start + at * 128, part.to_vec().into()))
            .collect();
        for part in records.chunks(8) {
            let cover = SectorRange::new(part[0].range().start, part[part.len() - 1].range().end);
            agent.bulk(bench, cover, part);
        }
    }
    agent.until_settled(bench, whole);
    // Before the pass is over it is no good yet.
    agent.mark_named(bench, 2, 21, "in the compare");
    agent.until_marked(bench, 2);
    agent.end_pass(bench);
    agent.mark_named(bench, 3, 22, "sound again");
    agent.until_marked(bench, 3);
    let degraded: Vec<bool> = ["in the compare", "sound again"]
        .iter()
        .map(|name| listed(bench).iter().find(|point| point.name.as_str() == *name).unwrap().degraded)
        .collect();
    assert_eq!(degraded, [true, false]);
    let sound = newest_consistent(bench);
    assert_eq!(sound.name.as_str(), "sound again");
    assert_eq!(bench.point_bytes(sound.at), source);
    assert_eq!(bench.point_bytes(honest.at), with_blocks(SIZE, before));
}

#[test]
fn marks_behind_a_lost_entry_are_degraded_until_the_first_one_after_the_compare() {
    // What is lost: in the middle, twice, and the oldest of those that wait.
    for (damaged, before) in [(&[3][..], &[1, 2][..]), (&[3, 5], &[1, 2]), (&[2], &[1])] {
        let dir = tempfile::tempdir().unwrap();
        let (mut bench, mut agent) = stopped(dir.path());
        left_waiting(dir.path(), &mut agent, damaged);
        bench.resume();
        // Restarted before anybody came: it is not forgotten.
        bench.restart();
        assert_eq!(bench.ask(|store| store.state().mode), PassMode::Compare);
        compared(&mut bench, before, &[1, 2, 3, 4, 5, 6]);
        bench.restart();
        let sound = newest_consistent(&bench);
        assert_eq!(sound.name.as_str(), "sound again");
        assert!(offers(&bench).contains(&Offer::Lost), "it stays in the timeline: {:?}", offers(&bench));
        assert_eq!(bench.ask(|store| store.state().mode), PassMode::Done);
        bench.stop();
    }
}

#[test]
fn nothing_is_degraded_where_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, mut agent) = stopped(dir.path());
    left_waiting(dir.path(), &mut agent, &[]);
    bench.resume();
    assert_eq!(bench.ask(|store| store.state().mode), PassMode::Done);
    let points = listed(&bench);
    assert_eq!((points.len(), points.iter().filter(|point| point.degraded).count()), (6, 0), "{points:?}");
    assert_eq!(bench.point_bytes(newest_consistent(&bench).at), with_blocks(SIZE, &[1, 2, 3, 4, 5]));
    assert!(!offers(&bench).contains(&Offer::Lost));
    bench.stop();
}

#[test]
fn what_was_given_up_is_compared_after_the_next_start_and_nothing_claims_otherwise_before() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, mut agent) = stopped(dir.path());
    left_waiting(dir.path(), &mut agent, &[]);
    let (_, _, folder) = places(dir.path());
    let layout = JournalSettings { segment_bytes: settings().segment_bytes };
    let now = wall_clock();
    {
        let (mut journal, _) = Journal::open(fs_opener(), &folder, layout, now).unwrap();
        let (first, last) = journal.give_up(DISK, "for a test", now).unwrap().unwrap();
        assert_eq!(last - first, 7, "four batches and their marks");
        assert_eq!(journal.give_up(DISK, "for a test", now).unwrap(), None);
        let refused = journal.append(DISK, EntryKind::Batch, &[b"more"], now);
        assert!(matches!(refused, Err(JournalError::GivenUp { disk: DISK })), "{refused:?}");
        let segments = journal.releasable();
        assert!(!segments.is_empty());
        for segment in segments {
            journal.release(segment, now).unwrap();
        }
    }
    bench.resume();
    bench.restart();
    assert_eq!(
        bench.ask(|store| store.state().sequence),
        agent.sequence,
        "the agent's cursor stays where it was"
    );
    compared(&mut bench, &[1], &[1, 2, 3, 4, 5, 6]);
    bench.stop();
}

/// Opens journal and disk as a start does, with media that are gone after so many changes; what was done by then stays.
/// Answers whether it came to its end.
fn opened_with(dir: &Path, changes: i64) -> bool {
    let (path, _, folder) = places(dir);
    let left = Arc::new(AtomicI64::new(changes));
    let files = fused_opener(&left);
    let open = || -> anyhow::Result<()> {
        let (retention, found) = Retention::open(Arc::clone(&files), &folder, settings())?;
        let expect = Expectation { writable: true, ..Expectation::default() };
        let spec = spec(&path, TargetKind::MonolithicFlat);
        let target = open_target(&files, &spec, &expect)?;
        let guard = Guard::new(&*files, &path, TargetKind::MonolithicFlat);
        let log = &found.disks[&DISK];
        let state = newest_state(retention.lock().get()?, log)?.expect("a state");
        Journaled::open(&retention, target, guard, state, [2; 16], Some(log))?;
        Ok(())
    };
    open().is_ok()
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

#[test]
fn a_start_that_is_killed_anywhere_forgets_no_loss() {
    let template = tempfile::tempdir().unwrap();
    let (bench, mut agent) = stopped(template.path());
    left_waiting(template.path(), &mut agent, &[3]);
    drop(bench);
    let mut ended = false;
    // In memory, where there is such a place: nothing here depends on the medium.
    let memory = PathBuf::from("/dev/shm");
    let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
    for changes in (0..500).step_by(3) {
        let dir = tempfile::tempdir_in(&place).unwrap();
        copy(template.path(), dir.path());
        ended = opened_with(dir.path(), changes);
        let (path, state, folder) = places(dir.path());
        let spec = spec(&path, TargetKind::MonolithicFlat);
        let mut bench = Bench::of(fs_opener(), spec, state, SIZE, folder, settings());
        bench.resume();
        assert_eq!(bench.ask(|store| store.state().mode), PassMode::Compare, "{changes} changes");
        if ended {
            compared(&mut bench, &[1, 2], &[1, 2, 3, 4, 5, 6]);
        }
        bench.stop();
        if ended {
            eprintln!("a start makes {changes} changes");
            assert!(changes > 10, "the media were never gone");
            break;
        }
    }
    assert!(ended, "the start never comes to its end");
}
