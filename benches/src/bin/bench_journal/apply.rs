//! Applied MB/s of a random stream against fio's floor on the same file, the I/O it takes, and a rollback of it.
//!
//! The floor is what fio reaches with as many random reads as writes of 4 KiB at depth 32: each block is read before it
//! is overwritten, and nothing more. Our windows are of 32 MiB of the stream, in one undo epoch; of these the target is
//! written what is left when later writes have won. Log and target are on one device. What that can do changes from one
//! second to the next, so fio runs right before each window, on a file
//! that takes turns with the target on the device, and the run of fio in the middle is the floor.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::store::journal::entry::{Content, Write};
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::units::{SECTOR_BYTES, SectorRange};

use super::counting::{Class, Counting, Counts};
use super::world::{
    BATCH_RECORDS, BLOCK, Batches, NOW, POSITION, Places, add, applier, disk_id, make_targets, mb_per_s,
    open_or_create, retention, twofold, window,
};
use super::{Report, setting};

const WINDOW_BYTES: u64 = 32 << 20;
/// What new files write before a rollback.
const NEW_FILES_BYTES: u64 = 128 << 20;
/// Seconds of fio before each window.
const FLOOR_S: u64 = 2;

/// MB/s that fio writes in one mode, for a while; `None` where there is no fio.
fn fio(target: &Path, mode: &str) -> Option<f64> {
    let output = Command::new("fio")
        .args(["--name=floor", "--bs=4k", "--iodepth=32", "--direct=1", "--ioengine=io_uring"])
        .args(["--time_based", "--output-format=json", "--norandommap"])
        .arg(format!("--runtime={FLOOR_S}"))
        .arg(format!("--rw={mode}"))
        .arg(format!("--filename={}", target.display()))
        .output()
        .ok()?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    Some(json["jobs"][0]["write"]["bw_bytes"].as_f64()? / 1e6)
}

/// MB/s of random writes, each with a read: the floor.
fn floor(beside: &Path) -> Option<f64> {
    fio(beside, "randrw")
}

/// The least, the one in the middle, and the most.
fn spread(figures: &mut [f64]) -> Option<(f64, f64, f64)> {
    figures.sort_by(f64::total_cmp);
    Some((*figures.first()?, *figures.get(figures.len() / 2)?, *figures.last()?))
}

pub(crate) fn run(folder: &Path, report: &mut Report) {
    let (blocks, total) = (setting("SIZE_MIB", 2048) << 8, setting("APPLY_MIB", 192) << 20);
    let (files, target) = (Counting::new(), folder.join("disk"));
    // On a file of its own: fio leaves noise behind, and before-images of noise do not compress.
    let beside = folder.join("floor");
    make_targets(&[&target, &beside], blocks);
    match fio(&beside, "randwrite") {
        Some(only) => report.note("fio, random writes of 4 KiB alone: MB/s", only),
        None => println!("fio is not there: no floor (make setup installs it)"),
    }
    let mut journal = open_or_create(&files, &retention(folder), 64 << 20);
    add(&mut journal, 0, blocks);
    journal.prepare((total >> 26) as usize + 3).expect("room for the log");
    let mut applier = applier(&files, &mut journal, 0, &target);
    // 0.7 of a window is unique, 0.5 of an undo epoch.
    let (mut places, mut batches) = (Places::new(blocks, (300, 286)), Batches::new(true));
    let mut decompressor = Decompressor::new().expect("zstd");
    let (mut source, mut unique, mut opened_s, mut applied_s) = (0_u64, 0_u64, 0.0, 0.0);
    let (mut floors, mut pairs) = (Vec::new(), Vec::new());
    let before = files.counts();
    while source < total {
        let floor = floor(&beside);
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
        let begun = Instant::now();
        let window = window(&mut decompressor, bodies);
        opened_s += begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        applier.apply(&mut journal, number, &window, NOW).expect("a window is applied");
        journal.commit(NOW).expect("a commit");
        let applying_s = begun.elapsed().as_secs_f64();
        if let Some(floor) = floor {
            floors.push(floor);
            pairs.push(bytes as f64 / 1e6 / applying_s / floor);
        }
        applied_s += applying_s;
        source += bytes;
        unique += window.bytes();
        places.next_window();
    }
    let counts = files.counts().since(&before);
    let (applied, per_source) = (unique as f64 / 1e6 / applied_s, |bytes: u64| bytes as f64 / source as f64);
    let stream = source as f64 / 1e6 / applied_s;
    report.note("applied MB/s of the stream, random 4 KiB", stream);
    report.note("applied MB/s of the target, random 4 KiB", applied);
    if let Some((least, floor, most)) = spread(&mut floors) {
        report.note("fio, random reads and writes of 4 KiB: written MB/s (the floor)", floor);
        println!("   {} windows, each after fio: {least:.0} to {most:.0} MB/s", floors.len());
        // All windows, the first too, which has no block of the epoch saved yet.
        report.held("applied of the stream over the floor", stream / floor, '>', 1.5);
        report.note("applied of the target over the floor", applied / floor);
        // A daemon decompresses on another thread, so this is what it does at the worst.
        let one_thread = source as f64 / 1e6 / (opened_s + applied_s);
        report.note(
            "the stream over the floor, decompressing and coalescing on the same thread",
            one_thread / floor,
        );
    }
    if let Some((least, middle, most)) = spread(&mut pairs) {
        println!("   window by window {least:.2}, {middle:.2}, {most:.2}");
    }
    report.note("stored bytes of the records per plain byte", batches.ratio());
    report.held("bytes written per source byte", per_source(counts.written_bytes()), '<', 1.45);
    report.held("bytes read per source byte", per_source(counts.read_bytes()), '<', 0.5);
    println!("   {applied_s:.2} s of applying");
    show(&counts, source);
    let floor = floor(&beside);
    back(&files, &mut journal, &mut applier, floor, report);
    back_over_new_files(&mut journal, &mut applier, report);
    std::fs::remove_file(&beside).expect("fio's file is removed");
}

/// Back to the beginning of it all, and forward again.
fn back(
    files: &Counting,
    journal: &mut reprotect_engine::store::journal::Journal,
    applier: &mut reprotect_engine::store::journal::applier::Applier<Box<dyn BlockFile>>,
    floor: Option<f64>,
    report: &mut Report,
) {
    let before = files.counts();
    let begun = Instant::now();
    let done = rollback(journal, applier, At::entry(1, 0), POSITION, NOW).expect("a rollback");
    let fast = mb_per_s(done.written_bytes, begun);
    report.note("rollback MB, scattered 4 KiB", done.written_bytes as f64 / 1e6);
    report.note("rollback MB/s, scattered 4 KiB", fast);
    // What is overwritten is read, as in the floor: 200 MB/s, or 80 % of what the device can do.
    if let Some(floor) = floor {
        report.held("rollback, of 200 MB/s or of the floor", fast / floor.min(250.0), '>', 0.8);
    }
    let counts = files.counts().since(&before);
    show(&counts, done.written_bytes);
    // Content, so that nobody measures how fast nothing is done.
    let mut block = vec![0; BLOCK];
    applier.target().read(&mut [ReadAt { offset: 0, data: &mut block }]).expect("the target");
}

/// Back over what new files wrote: neighbours that held zeros before.
fn back_over_new_files(
    journal: &mut reprotect_engine::store::journal::Journal,
    applier: &mut reprotect_engine::store::journal::applier::Applier<Box<dyn BlockFile>>,
    report: &mut Report,
) {
    const PIECE: u64 = 1 << 20;
    let mut zeros = None;
    for is_written in [false, true] {
        applier.begin_epoch(journal, EpochCause::Time, POSITION, None, NOW).expect("an undo epoch");
        let number = journal.append(disk_id(0), EntryKind::Batch, &[b"new files"], NOW).expect("room").0;
        journal.commit(NOW).expect("a commit");
        let mut window = Window::default();
        for start in (0..NEW_FILES_BYTES).step_by(PIECE as usize) {
            let range = SectorRange::new(start / SECTOR_BYTES, (start + PIECE) / SECTOR_BYTES);
            let content = match is_written {
                true => Content::Data(twofold(PIECE as usize)),
                false => Content::Zeros,
            };
            window.put(Write { range, content });
        }
        applier.apply(journal, number, &window, NOW).expect("a window is applied");
        journal.commit(NOW).expect("a commit");
        zeros = zeros.or_else(|| Some(At::entry(applier.open_epoch()?, number)));
        applier.close_epoch(journal, NOW).expect("an undo epoch");
    }
    let begun = Instant::now();
    let done = rollback(journal, applier, zeros.expect("an undo epoch"), POSITION, NOW).expect("a rollback");
    assert_eq!(done.written_bytes, NEW_FILES_BYTES);
    report.held("rollback MB/s over new files", mb_per_s(done.written_bytes, begun), '>', 200.0);
}

/// What was done to the files, and how long it took.
fn show(counts: &Counts, source: u64) {
    for class in [Class::Log, Class::Undo, Class::Target] {
        let count = counts.of(class);
        println!(
            "   {class:?}: {:.3} written and {:.3} read per source byte; {} writes {:.2} s, {} reads {:.2} s, \
             {} flushes {:.2} s, {} maps",
            count.written_bytes as f64 / source as f64,
            count.read_bytes as f64 / source as f64,
            count.write_calls,
            count.write_s,
            count.read_calls,
            count.read_s,
            count.flushes,
            count.flush_s,
            count.maps
        );
    }
}
