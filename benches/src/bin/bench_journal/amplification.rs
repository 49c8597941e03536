//! What marks every 10 s and undo epochs of 5 min cost in bytes written, over half an hour of a slow stream.
//!
//! Time is simulated: the figure is of bytes, not of speed. Each mark is an entry with a commit of its own, each point a
//! manifest edit, each undo epoch a run with its index.

use std::path::Path;

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{Edit, EpochCause, PointKept};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::units::{Sequence, Timestamp};

use super::Report;
use super::counting::{Class, Counting};
use super::world::{
    BATCH_RECORDS, BLOCK, Batches, POSITION, Places, add, applier, disk_id, make_target, open_or_create,
    retention, window,
};

const BLOCKS: u64 = 128 << 8;
const MARKS: u64 = 180;
const MARKS_OF_EPOCH: u64 = 30;
/// 200 KB/s of the source.
const BATCHES_OF_MARK: u64 = 8;

pub(crate) fn run(folder: &Path, report: &mut Report) {
    let (files, target) = (Counting::new(), folder.join("disk"));
    make_target(&target, BLOCKS);
    let mut journal = open_or_create(&files, &retention(folder), 64 << 20);
    add(&mut journal, 0, BLOCKS);
    journal.prepare(8).expect("room for the log");
    let mut applier = applier(&files, &mut journal, 0, &target);
    let (mut places, mut batches) = (Places::new(BLOCKS, (300, 286)), Batches::new(true));
    let mut decompressor = Decompressor::new().expect("zstd");
    let before = files.counts();
    let mut source = 0;
    for mark in 1..=MARKS {
        let now = Timestamp(mark * 10_000_000_000);
        let mut bodies = Vec::new();
        for _ in 0..BATCHES_OF_MARK {
            let body = batches.batch(0, (0..BATCH_RECORDS).map(|_| places.next()));
            journal.append(disk_id(0), EntryKind::Batch, &[&body], now).expect("room in the log");
            journal.commit(now).expect("a commit");
            bodies.push(body);
            source += (BATCH_RECORDS * BLOCK) as u64;
        }
        let number = journal.append(disk_id(0), EntryKind::Mark, &[&[0; 64]], now).expect("room").0;
        journal.commit(now).expect("a commit");
        applier.apply(&mut journal, number, &window(&mut decompressor, bodies), now).expect("a window");
        journal.commit(now).expect("a commit");
        places.next_window();
        if mark.is_multiple_of(MARKS_OF_EPOCH) {
            let epoch = applier.open_epoch().expect("an undo epoch");
            applier.close_epoch(&mut journal, now).expect("it ends");
            let point = PointKept {
                disk: disk_id(0),
                point: [mark as u8; 16],
                number,
                sequence: Sequence(number),
                epoch,
                source_time: now,
                class: MarkClass::ALL[0],
                pinned: false,
                degraded: false,
                name: Text::new(""),
                cause: MarkCause::Timer,
            };
            journal.edit(&[Edit::PointKept(point)], now).expect("a point");
            applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, now).expect("the next");
            places.next_epoch();
        }
    }
    let counts = files.counts().since(&before);
    let per_source = |bytes: u64| bytes as f64 / source as f64;
    report.note("written per source byte, marks 10 s, epochs 5 min", per_source(counts.written_bytes()));
    report.note("read per source byte, marks 10 s, epochs 5 min", per_source(counts.read_bytes()));
    for class in [Class::Log, Class::Undo, Class::Target, Class::Manifest] {
        println!("   {class:?}: {:.3} written per source byte", per_source(counts.of(class).written_bytes));
    }
}
