//! Applied MB/s of a random stream against fio's floor on the same file, the I/O it takes, and a rollback of it.
//!
//! The floor is what fio reaches with as many random reads as writes of 4 KiB at depth 32: each block is read before it
//! is overwritten, and nothing more. Our windows are of 32 MiB, in one undo epoch. Log and target are on one device.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::view::At;

use super::counting::{Class, Counting};
use super::world::{
    BATCH_RECORDS, BLOCK, Batches, NOW, POSITION, Places, add, applier, disk_id, make_target, mb_per_s,
    open_or_create, retention, window,
};
use super::{Report, setting};

const WINDOW_BYTES: u64 = 32 << 20;

/// MB/s of writes, each with a read, as fio does them; `None` where there is no fio.
fn floor(target: &Path) -> Option<(f64, f64)> {
    let mb = |mode: &str, key: &str| {
        let output = Command::new("fio")
            .args(["--name=floor", "--bs=4k", "--iodepth=32", "--direct=1", "--ioengine=io_uring"])
            .args(["--time_based", "--runtime=8", "--output-format=json", "--norandommap"])
            .arg(format!("--rw={mode}"))
            .arg(format!("--filename={}", target.display()))
            .output()
            .ok()?;
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(json["jobs"][0][key]["bw_bytes"].as_f64()? / 1e6)
    };
    Some((mb("randrw", "write")?, mb("randwrite", "write")?))
}

pub(crate) fn run(folder: &Path, report: &mut Report) {
    let (blocks, total) = (setting("SIZE_MIB", 2048) << 8, setting("APPLY_MIB", 192) << 20);
    let (files, target) = (Counting::new(), folder.join("disk"));
    make_target(&target, blocks);
    let floor = floor(&target);
    match floor {
        Some((both, only)) => {
            report.note("fio, random reads and writes of 4 KiB: written MB/s (the floor)", both);
            report.note("fio, random writes of 4 KiB alone: MB/s", only);
        }
        None => println!("fio is not there: no floor (make setup installs it)"),
    }
    let mut journal = open_or_create(&files, &retention(folder), 64 << 20);
    add(&mut journal, 0, blocks);
    journal.prepare((total >> 26) as usize + 3).expect("room for the log");
    let mut applier = applier(&files, &mut journal, 0, &target);
    // 0.7 of a window is unique, 0.5 of an undo epoch.
    let (mut places, mut batches) = (Places::new(blocks, (300, 286)), Batches::new(true));
    let mut decompressor = Decompressor::new().expect("zstd");
    let (mut source, mut unique, mut applied_s) = (0_u64, 0_u64, 0.0);
    let before = files.counts();
    while source < total {
        let mut bodies = Vec::new();
        let mut bytes = 0;
        let mut number = 0;
        while bytes < WINDOW_BYTES {
            let body = batches.batch(0, (0..BATCH_RECORDS).map(|_| places.next()));
            number = journal.append(disk_id(0), EntryKind::Batch, &[&body], NOW).expect("room in the log").0;
            bytes += (BATCH_RECORDS * BLOCK) as u64;
            bodies.push(body);
            if journal.log().pending_bytes() >= 1 << 20 {
                journal.commit(NOW).expect("a commit");
            }
        }
        journal.commit(NOW).expect("a commit");
        let window = window(&mut decompressor, bodies);
        let begun = Instant::now();
        applier.apply(&mut journal, number, &window, NOW).expect("a window is applied");
        journal.commit(NOW).expect("a commit");
        applied_s += begun.elapsed().as_secs_f64();
        source += bytes;
        unique += window.bytes();
        places.next_window();
    }
    let counts = files.counts().since(&before);
    let (applied, per_source) = (unique as f64 / 1e6 / applied_s, |bytes: u64| bytes as f64 / source as f64);
    report.note("applied MB/s of the target, random 4 KiB", applied);
    if let Some((floor, _)) = floor {
        report.held("applied over the floor", applied / floor, '>', 1.5);
    }
    report.held("bytes written per source byte", per_source(counts.written_bytes()), '<', 1.45);
    report.held("bytes read per source byte", per_source(counts.read_bytes()), '<', 0.5);
    for class in [Class::Log, Class::Undo, Class::Target] {
        let count = counts.of(class);
        println!(
            "   {class:?}: {:.3} written and {:.3} read per source byte; {} writes, {} reads, {} flushes, {} maps",
            per_source(count.written_bytes),
            per_source(count.read_bytes),
            count.write_calls,
            count.read_calls,
            count.flushes,
            count.maps
        );
    }
    back(&files, &mut journal, &mut applier, report);
}

/// Back to the beginning of it all, and forward again.
fn back(
    files: &Counting,
    journal: &mut reprotect_engine::store::journal::Journal,
    applier: &mut reprotect_engine::store::journal::applier::Applier<Box<dyn BlockFile>>,
    report: &mut Report,
) {
    let before = files.counts();
    let begun = Instant::now();
    let done = rollback(journal, applier, At::entry(1, 0), POSITION, NOW).expect("a rollback");
    let fast = mb_per_s(done.written_bytes, begun);
    report.note("rollback MB, scattered 4 KiB", done.written_bytes as f64 / 1e6);
    report.held("rollback MB/s, scattered 4 KiB", fast, '>', 200.0);
    let counts = files.counts().since(&before);
    for class in [Class::Undo, Class::Target] {
        let count = counts.of(class);
        println!(
            "   {class:?}: {} writes, {} reads, {} flushes, {} maps",
            count.write_calls, count.read_calls, count.flushes, count.maps
        );
    }
    // Content, so that nobody measures how fast nothing is done.
    let mut block = vec![0; BLOCK];
    applier.target().read(&mut [ReadAt { offset: 0, data: &mut block }]).expect("the target");
}
