//! Durable MB/s and the latency of a commit, with 1, 8 and 64 disks that share the log.
//!
//! Each disk has a thread, as in the master target: it adds a turn of batches under the journal's lock and waits until its
//! committer has made them durable, with whatever the others added meanwhile. The latency is that of the whole turn, the wait
//! for the lock included. Segments are made ahead, as there.
//!
//! Invariant: what is counted as durable was answered for. Units: bytes, seconds. Called by `main`.

use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_master_target::retention::{Retention, RetentionSettings};
use reprotect_master_target::scrub::ScrubSettings;

use super::Report;
use super::counting::Counting;
use super::world::{BATCH_RECORDS, BLOCK, Batches, add, disk_id, mb_per_s, percentile_ms};

const SEGMENT_BYTES: u64 = 64 << 20;
const SEGMENTS: usize = 16;
/// Segments that stay free: nothing is applied here, so none comes back.
const SEGMENTS_LEFT: usize = 2;
const MEASURED: Duration = Duration::from_secs(4);
/// Batches that a disk adds before it waits: one that came alone, and 1 MiB that came together.
const TURNS: [usize; 2] = [1, 4];

pub(crate) fn run(folder: &Path, report: &mut Report) {
    for batches in TURNS {
        for disks in [1, 8, 64] {
            let own = folder.join(format!("{disks}-{batches}"));
            measure(&own, disks, batches, report);
            std::fs::remove_dir_all(&own).expect("what was measured in is removed");
        }
    }
}

fn measure(folder: &Path, disks: usize, batches: usize, report: &mut Report) {
    let files: Arc<dyn Files> = Arc::new(Counting::new());
    let (retention, _) = Retention::open(files, folder, settings()).expect("a new journal");
    {
        let mut locked = retention.lock();
        let journal = locked.get().expect("the journal");
        (0..disks).for_each(|disk| add(journal, disk, 1 << 20));
        journal.prepare(SEGMENTS).expect("room for the log");
    }
    let committer = retention.start().expect("a thread");
    let mut make = Batches::new(false);
    let bodies: Vec<Bytes> = (0..disks).map(|disk| make.batch(disk, 0..BATCH_RECORDS as u64)).collect();
    let (start, shared) = (Barrier::new(disks + 1), &*retention);
    let (mut took, begun) = std::thread::scope(|scope| {
        let turns_of = |(disk, body): (usize, &Bytes)| {
            let (start, body) = (&start, body.clone());
            scope.spawn(move || {
                start.wait();
                turns(shared, disk, &body, batches)
            })
        };
        let threads: Vec<_> = bodies.iter().enumerate().map(turns_of).collect();
        start.wait();
        let begun = Instant::now();
        let took: Vec<Duration> =
            threads.into_iter().flat_map(|thread| thread.join().expect("a disk's thread")).collect();
        (took, begun)
    });
    let bytes = (took.len() * batches * bodies[0].len()) as u64;
    let shown = format!("{disks} disks, turns of {} KiB", batches * BATCH_RECORDS * BLOCK / 1024);
    report.note(format!("durable MB/s, {shown}"), mb_per_s(bytes, begun));
    report.note(format!("commit p50 ms, {shown}"), percentile_ms(&mut took, 50));
    report.note(format!("commit p99 ms, {shown}"), percentile_ms(&mut took, 99));
    retention.close(vec![committer]);
}

/// What a disk's thread does until the time is over or the log full; how long each turn took.
fn turns(retention: &Retention, disk: usize, body: &Bytes, batches: usize) -> Vec<Duration> {
    let (mut took, begun) = (Vec::new(), Instant::now());
    while begun.elapsed() < MEASURED {
        let turn = Instant::now();
        {
            let mut locked = retention.lock();
            let journal = locked.get().expect("the journal");
            if journal.log().free_segments() <= SEGMENTS_LEFT {
                break;
            }
            for _ in 0..batches {
                let added = journal.append(disk_id(disk), EntryKind::Ordered, &[body], wall_clock());
                added.expect("room in the log");
            }
        }
        retention.commit().expect("a commit");
        took.push(turn.elapsed());
    }
    took
}

/// Nothing is thinned, scrubbed or given back while this is measured: nobody starts what does that.
fn settings() -> RetentionSettings {
    let hour = Duration::from_secs(3600);
    let ladder =
        Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
    let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
    RetentionSettings { undo_epoch: hour, ladder, segment_bytes: SEGMENT_BYTES, reserve_bytes: 0, scrub }
}
