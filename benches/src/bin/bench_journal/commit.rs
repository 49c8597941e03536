//! Durable MB/s and the latency of a commit, with 1, 8 and 64 disks that share the log.
//!
//! A group is committed at 1 MiB, as the master target does; the disks take turns. Segments are made ahead, as there.

use std::path::Path;
use std::time::{Duration, Instant};

use reprotect_engine::format::segment::EntryKind;

use super::Report;
use super::counting::Counting;
use super::world::{
    BATCH_RECORDS, Batches, NOW, add, disk_id, mb_per_s, open_or_create, percentile_ms, retention,
};

const GROUP_BYTES: u64 = 1 << 20;
const SEGMENT_BYTES: u64 = 64 << 20;
const SEGMENTS: usize = 16;

pub(crate) fn run(folder: &Path, report: &mut Report) {
    for disks in [1, 8, 64] {
        let folder = retention(&folder.join(format!("{disks}")));
        let mut journal = open_or_create(&Counting::new(), &folder, SEGMENT_BYTES);
        (0..disks).for_each(|disk| add(&mut journal, disk, 1 << 20));
        journal.prepare(SEGMENTS).expect("room for the log");
        let mut batches = Batches::new(false);
        let bodies: Vec<_> = (0..disks).map(|disk| batches.batch(disk, 0..BATCH_RECORDS as u64)).collect();
        let (mut samples, mut bytes, begun) = (Vec::new(), 0, Instant::now());
        let mut turn = 0;
        while begun.elapsed() < Duration::from_secs(4) && journal.log().free_segments() > 2 {
            let opened = Instant::now();
            let mut group = 0;
            while group < GROUP_BYTES {
                let disk = turn % disks;
                let body = &bodies[disk];
                journal.append(disk_id(disk), EntryKind::Batch, &[body], NOW).expect("room in the log");
                group += body.len() as u64;
                turn += 1;
            }
            journal.commit(NOW).expect("a commit");
            samples.push(opened.elapsed());
            bytes += group;
        }
        report.note(format!("durable MB/s, {disks} disks"), mb_per_s(bytes, begun));
        report.note(format!("commit of 1 MiB, p50 ms, {disks} disks"), percentile_ms(&mut samples, 50));
        report.note(format!("commit of 1 MiB, p99 ms, {disks} disks"), percentile_ms(&mut samples, 99));
    }
}
