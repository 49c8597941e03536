//! How long until the first byte of a point in the middle of an undo epoch, and memory: what the epoch's entries wrote is
//! found in the log, and read from there.
//!
//! One undo epoch of random writes of 4 KiB, of two sizes: as many as ten million extents in 288 epochs make, and as 20 MB/s
//! make in five minutes. The point lies at the end of the epoch, which goes on; nothing of it is applied, so that all is
//! read from the log. The kernel's cache is passed by.

use std::path::Path;
use std::time::Instant;

use reprotect_benches::Seeded;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::store::journal::view::{At, View};

use super::counting::Counting;
use super::world::{
    BATCH_RECORDS, BLOCK, Batches, NOW, Places, add, applier, disk_id, mb_per_s, open_or_create,
    percentile_ms, resident_mib, retention,
};
use super::{Report, setting};

/// A disk of 64 GiB.
const BLOCKS: u64 = 1 << 24;
const SEGMENT_BYTES: u64 = 64 << 20;

pub(crate) fn run(folder: &Path, report: &mut Report) {
    for (size, total, goal) in
        [("usual", 136 << 20, Some(1.0)), ("busy", setting("EPOCH_MIB", 6000) << 20, None)]
    {
        let own = folder.join(size);
        std::fs::create_dir_all(&own).expect("a folder to measure in");
        point_inside(&own, size, (total, goal), report);
        std::fs::remove_dir_all(&own).expect("what was measured in is removed");
    }
}

fn point_inside(folder: &Path, size: &str, (total, goal): (u64, Option<f64>), report: &mut Report) {
    let (files, target) = (Counting::new(), folder.join("disk"));
    let made = std::fs::File::create(&target).and_then(|file| file.set_len(BLOCKS * BLOCK as u64));
    made.expect("a sparse target");
    let mut journal = open_or_create(&files, &retention(folder), SEGMENT_BYTES);
    add(&mut journal, 0, BLOCKS);
    let mut applier = applier(&files, &mut journal, 0, &target);
    let (mut places, mut batches) = (Places::new(BLOCKS, (0, 0)), Batches::new(true));
    let (mut source, mut number) = (0, 0);
    while source < total {
        let body = batches.batch(0, (0..BATCH_RECORDS).map(|_| places.next()));
        number = journal.append(disk_id(0), EntryKind::Ordered, &[&body], NOW).expect("room in the log").0;
        source += (BATCH_RECORDS * BLOCK) as u64;
        if journal.log().pending_bytes() >= 4 << 20 {
            journal.commit(NOW).expect("a commit");
        }
    }
    journal.commit(NOW).expect("a commit");
    report.note(format!("{size}: plain MB of the undo epoch"), source as f64 / 1e6);
    report.note(format!("{size}: stored MB of it in the log"), batches.ratio() * source as f64 / 1e6);
    drop((places, batches));
    let before = resident_mib();
    let begun = Instant::now();
    let plan = View::plan(&journal, disk_id(0), At::entry(1, number)).expect("a plan");
    report.note(format!("{size}: with the journal locked, ms"), begun.elapsed().as_secs_f64() * 1e3);
    let view = plan.open().expect("a view");
    let runs = view.open_runs(&journal, &mut applier).expect("its runs");
    let mut block = vec![0; BLOCK];
    view.read(&runs, &mut applier, 12345 * BLOCK as u64, &mut block).expect("a block");
    let (mounted, name) = (begun.elapsed().as_secs_f64(), format!("{size}: mount, view and first read, s"));
    match goal {
        Some(goal) => report.held(name, mounted, '<', goal),
        None => report.note(name, mounted),
    }
    report.note(format!("{size}: memory of the view, MiB"), resident_mib() - before);
    let mut seeded = Seeded::new(77);
    let mut took = Vec::new();
    for _ in 0..2000 {
        let place = (seeded.next_u64() >> 20) % BLOCKS;
        let begun = Instant::now();
        view.read(&runs, &mut applier, place * BLOCK as u64, &mut block).expect("a block");
        took.push(begun.elapsed());
    }
    report.note(format!("{size}: one random 4 KiB, median ms"), percentile_ms(&mut took, 50));
    let (begun, mut large) = (Instant::now(), vec![0; 1 << 20]);
    for at in 0..512 {
        view.read(&runs, &mut applier, at << 20, &mut large).expect("a piece");
    }
    report.note(format!("{size}: read from front to back in MiB pieces, MB/s"), mb_per_s(512 << 20, begun));
}
