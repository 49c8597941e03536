//! How long until the first byte of an old point, with 288 undo epochs, 8,640 marks and ten million extents, and memory.
//!
//! The runs hold images of zeros, which take no payload: what is measured is the index. The journal is opened anew before.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use reprotect_benches::Seeded;
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{Edit, EpochCause, EpochClosed, EpochOpened, PointKept};
use reprotect_engine::format::undo::{RunHeader, RunIdentity};
use reprotect_engine::format::wire::Text;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::applier::{Applier, run_path};
use reprotect_engine::store::journal::undo::{ActiveRun, Image, ImageData};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{Journal, JournalSettings, RunFile};
use reprotect_engine::units::{BlockIndex, Sequence, Timestamp};

use super::counting::Counting;
use super::world::{BLOCK, NOW, POSITION, add, disk_id, open_or_create, resident_mib, retention};
use super::{Report, setting};

/// A disk of 1 TiB.
const BLOCKS: u64 = 1 << 28;
const EPOCHS: u64 = 288;
const MARKS_OF_EPOCH: u64 = 30;
const SEGMENT_BYTES: u64 = 32 << 20;

pub(crate) fn run(folder: &Path, report: &mut Report) {
    let (files, target, retention) = (Counting::new(), folder.join("disk"), retention(folder));
    let made = std::fs::File::create(&target).and_then(|file| file.set_len(BLOCKS * BLOCK as u64));
    made.expect("a sparse target");
    let mut journal = open_or_create(&files, &retention, SEGMENT_BYTES);
    add(&mut journal, 0, BLOCKS);
    let extents = setting("EXTENTS", 10_000_000) / EPOCHS;
    for epoch in 1..=EPOCHS {
        fill(&files, &mut journal, epoch, extents);
    }
    journal.close(NOW).expect("it is closed");
    let before = resident_mib();
    let begun = Instant::now();
    let settings = JournalSettings { segment_bytes: SEGMENT_BYTES };
    let opener: Arc<dyn Files> = Arc::new(files.clone());
    let (journal, _) = Journal::open(opener, &retention, settings, NOW).expect("it opens");
    report.note("opening the journal (the program's start), s", begun.elapsed().as_secs_f64());
    let file = files.open(&target, true).expect("the target");
    let (mut applier, _) = Applier::open(&journal, disk_id(0), file, None).expect("an applier");
    let begun = Instant::now();
    let view = View::open(&journal, disk_id(0), At::entry(1, MARKS_OF_EPOCH)).expect("a view");
    let runs = view.open_runs(&journal, &mut applier).expect("its runs");
    let mut block = vec![0; BLOCK];
    view.read(&runs, &mut applier, 12345 * BLOCK as u64, &mut block).expect("a block");
    report.held("mount: view and first read, s", begun.elapsed().as_secs_f64(), '<', 1.0);
    let (reads, begun) = (2000, Instant::now());
    let mut seeded = Seeded::new(77);
    for _ in 0..reads {
        let place = (seeded.next_u64() >> 20) % BLOCKS;
        view.read(&runs, &mut applier, place * BLOCK as u64, &mut block).expect("a block");
    }
    report.note(
        "one random 4 KiB through 287 runs, ms",
        begun.elapsed().as_secs_f64() * 1e3 / f64::from(reads),
    );
    report.note("memory of journal, runs and view, MiB", resident_mib() - before);
}

/// An undo epoch that has ended: its run, its edits, the points of its marks.
fn fill(files: &Counting, journal: &mut Journal, epoch: u64, extents: u64) {
    let (disk, time) = (disk_id(0), Timestamp(epoch));
    let last = epoch * MARKS_OF_EPOCH;
    let opened = EpochOpened {
        disk,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        epoch,
        after: last - MARKS_OF_EPOCH,
        sequence: Sequence(0),
        salt: epoch,
        time,
        to_epoch: 0,
        to_number: 0,
        cause: EpochCause::Time,
        to_records: 0,
    };
    journal.edit(&[Edit::EpochOpened(opened)], time).expect("an epoch");
    let identity = RunIdentity {
        journal: journal.id(),
        disk,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        undo_epoch: epoch,
        undo_epoch_last: epoch,
    };
    let path = run_path(journal, disk, RunFile::Epoch(epoch));
    let header = RunHeader::new(identity, epoch, BLOCKS * 8, time);
    let mut run = ActiveRun::create(files, &path, header, 1 << 30).expect("a run");
    let mut seeded = Seeded::new(epoch);
    // Ascending, never adjacent: each image is an extent of its own.
    let step = BLOCKS / extents.max(1);
    let places = (0..extents).map(|at| at * step + (seeded.next_u64() >> 33) % (step - 1));
    let images: Vec<_> =
        places.map(|place| Image { first: BlockIndex(place), data: ImageData::Zeros(1) }).collect();
    images.chunks(4096).for_each(|images| run.append(images).expect("images"));
    let run_bytes = run.seal(files, time).expect("a sealed run").len_bytes();
    let point = |mark: u64| {
        Edit::PointKept(PointKept {
            disk,
            point: (u128::from(epoch) << 64 | u128::from(mark)).to_le_bytes(),
            number: last - MARKS_OF_EPOCH + mark,
            sequence: Sequence(0),
            epoch,
            source_time: time,
            class: MarkClass::ALL[0],
            pinned: false,
            degraded: false,
            name: Text::new(""),
            cause: MarkCause::Timer,
        })
    };
    let mut edits = vec![Edit::EpochClosed(EpochClosed { disk, epoch, last, run_bytes, time })];
    edits.extend((1..=MARKS_OF_EPOCH).map(point));
    journal.edit(&edits, time).expect("its points");
}
