//! Windows, rollbacks and points inside an undo epoch that are larger than what is read, saved or written in one go: threads work side by side there.
//!
//! Scattered blocks of a disk in memory, several steps of them, a short last block and blocks of zeros among them; what
//! stands on the target and what every point shows is compared with a copy.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use bytes::Bytes;
use reprotect_engine::format::batch::{BatchHeader, CHAIN_START, Stretch, encode_batch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile, ReadAt, WriteAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::{Content, Write};
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalSettings};
use reprotect_engine::units::{DiskId, Generation, LineageId, SectorRange, Sequence, Timestamp};

const NOW: Timestamp = Timestamp(1);
const DISK: DiskId = DiskId([5; 16]);
const BLOCK: usize = 4096;
const BLOCKS: u64 = 14_000;
/// The last block is short.
const SECTORS: u64 = BLOCKS * 8 - 3;
const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

type Disk = Vec<u8>;

fn content(block: u64, version: u8) -> Vec<u8> {
    let fill = |at: usize| (block as u8).wrapping_mul(31) ^ version ^ (at / 64) as u8;
    (0..BLOCK).map(fill).collect()
}

/// Writes every block but each third, every eleventh as zeros, to window and copy.
fn scattered(version: u8, copy: &mut Disk) -> Window {
    let mut window = Window::default();
    for block in (0..BLOCKS).filter(|block| block % 3 != u64::from(version) % 3) {
        let range = SectorRange::new(block * 8, ((block + 1) * 8).min(SECTORS));
        let zeros = block % 11 == 0;
        let mut data = if zeros { vec![0; BLOCK] } else { content(block, version) };
        data.truncate(range.bytes() as usize);
        copy[range.byte_start() as usize..][..data.len()].copy_from_slice(&data);
        let content = if zeros { Content::Zeros } else { Content::Data(data.into()) };
        window.put(Write { range, content });
    }
    window
}

fn target(applier: &mut Applier<Box<dyn BlockFile>>) -> Disk {
    let mut data = vec![0; applier.size_sectors() as usize * 512];
    applier.target().read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
    data
}

#[test]
fn a_rollback_of_many_steps_shows_the_point_and_goes_forward_again() {
    let files = MemoryFiles::default();
    let (folder, path) = (Path::new("/retention"), Path::new("/datastore/disk"));
    files.opener().create(path, SECTORS * 512).unwrap();
    let mut file = files.opener().open(path, true).unwrap();
    let mut copy: Disk = (0..BLOCKS).flat_map(|block| content(block, 77)).collect();
    copy.truncate(SECTORS as usize * 512);
    file.write(&[WriteAt { offset: 0, data: &copy }]).unwrap();
    file.flush().unwrap();
    let settings = JournalSettings { segment_bytes: 64 << 10 };
    let mut journal = Journal::create(files.opener(), folder, settings, NOW).unwrap();
    let added = DiskAdded { disk: DISK, machine: [7; 16], size_sectors: SECTORS, time: NOW };
    journal.add_disk(added, NOW).unwrap();
    let (mut applier, _) = Applier::open(&journal, DISK, file, None).unwrap();
    let mut points = vec![copy.clone()];
    for version in 1..=3 {
        applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, NOW).unwrap();
        let window = scattered(version, &mut copy);
        applier.apply(&mut journal, u64::from(version), &window, NOW).unwrap();
        journal.commit(NOW).unwrap();
        applier.close_epoch(&mut journal, NOW).unwrap();
        assert!(target(&mut applier) == copy, "window {version}");
        points.push(copy.clone());
    }
    // Each rollback is an undo epoch: back to the beginning, to the first point, and forward to what was newest.
    for (epoch, number, point) in [(1, 0, 0), (1, 1, 1), (3, 3, 3)] {
        let before = target(&mut applier);
        let done = rollback(&mut journal, &mut applier, At::entry(epoch, number), POSITION, NOW).unwrap();
        let differing = before.chunks(BLOCK).zip(points[point].chunks(BLOCK)).filter(|(a, b)| a != b);
        assert_eq!(done.written_bytes, differing.map(|(a, _)| a.len() as u64).sum::<u64>());
        assert!(done.written_bytes > 2 * (16 << 20), "more than two steps");
        assert!(target(&mut applier) == points[point], "point {point}");
    }
}

/// Sectors of the disk of the points inside an undo epoch, and records of an entry.
const INSIDE_SECTORS: u64 = (8 << 11) - 3;
const RECORDS: usize = 250;

/// Entry `number`: scattered blocks, of each some sectors only, others twice, and zeros; done to the copy, too, as many of
/// them as `counts` says.
fn entry(number: u64, counts: usize, copy: &mut Disk) -> Bytes {
    let mut records = Vec::new();
    for at in 0..RECORDS as u64 {
        let start = (number * 7919 + at * 4999) % (INSIDE_SECTORS - 16);
        let range = SectorRange::new(start, start + 1 + (at + number) % 16);
        let data = if at % 13 == 0 {
            records.push(Record::zeros(range));
            vec![0; range.bytes() as usize]
        } else {
            let data: Vec<u8> =
                (0..range.bytes()).map(|byte| (number * 31 + at + byte / 100) as u8).collect();
            records.push(Record::data(start, data.clone().into()));
            data
        };
        if (at as usize) < counts {
            copy[range.byte_start() as usize..][..data.len()].copy_from_slice(&data);
        }
    }
    let header = BatchHeader {
        disk: DISK,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        first_sequence: Sequence(1 + (number - 1) * RECORDS as u64),
        chain: CHAIN_START,
        source_time: NOW,
        record_count: RECORDS as u32,
        stretch: Stretch::Ordered,
    };
    encode_batch(&header, &records).body()
}

/// The disk, whole and in pieces that no block begins or ends with.
fn shown(view: &View, journal: &Journal, applier: &mut Applier<Box<dyn BlockFile>>) -> Disk {
    let runs = view.open_runs(journal, applier).unwrap();
    let mut whole = vec![0; INSIDE_SECTORS as usize * 512];
    view.read(&runs, applier, 0, &mut whole).unwrap();
    for at in (0..whole.len()).step_by(1_234_567) {
        let mut piece = vec![0; 70_001.min(whole.len() - at)];
        view.read(&runs, applier, at as u64, &mut piece).unwrap();
        assert!(piece == whole[at..at + piece.len()], "at {at}");
    }
    whole
}

#[test]
fn a_point_inside_an_undo_epoch_is_read_from_the_log_and_never_from_what_its_space_was_given_to() {
    const ENTRIES: u64 = 40;
    let files = MemoryFiles::default();
    let (folder, path) = (Path::new("/retention"), Path::new("/datastore/disk"));
    files.opener().create(path, INSIDE_SECTORS * 512).unwrap();
    let file = files.opener().open(path, true).unwrap();
    // Some 1.1 MiB an entry: two a segment, more than what is read in one go.
    let settings = JournalSettings { segment_bytes: 3 << 20 };
    let mut journal = Journal::create(files.opener(), folder, settings, NOW).unwrap();
    let added = DiskAdded { disk: DISK, machine: [7; 16], size_sectors: INSIDE_SECTORS, time: NOW };
    journal.add_disk(added, NOW).unwrap();
    let (mut applier, _) = Applier::open(&journal, DISK, file, None).unwrap();
    applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, NOW).unwrap();
    let mut copy: Disk = vec![0; INSIDE_SECTORS as usize * 512];
    let mut points = Vec::new();
    for number in 1..=ENTRIES {
        let mut half = copy.clone();
        entry(number, RECORDS / 2, &mut half);
        points.push((At { epoch: 1, number: number - 1, records: RECORDS as u32 / 2 }, half));
        let body = entry(number, RECORDS, &mut copy);
        journal.append(DISK, EntryKind::Ordered, &[&body], NOW).unwrap();
        points.push((At::entry(1, number), copy.clone()));
    }
    journal.commit(NOW).unwrap();
    let open = |journal: &Journal, at| View::open(journal, DISK, at).unwrap();
    for (at, point) in points.iter().step_by(27) {
        assert!(shown(&open(&journal, *at), &journal, &mut applier) == *point, "{at}");
    }
    // Back to the middle of the epoch, and forward to its end, from the log.
    let mut window = Window::default();
    window.put(Write {
        range: SectorRange::new(0, INSIDE_SECTORS),
        content: Content::Data(copy.clone().into()),
    });
    applier.apply(&mut journal, ENTRIES, &window, NOW).unwrap();
    for (at, point) in [&points[31], points.last().unwrap()] {
        rollback(&mut journal, &mut applier, *at, POSITION, NOW).unwrap();
        assert!(target(&mut applier) == *point, "{at}");
    }
    // Nothing needs the log any more but the view, and its space is written again.
    let (at, point) = &points[50];
    let view = open(&journal, *at);
    assert!(shown(&view, &journal, &mut applier) == *point);
    journal.commit(NOW).unwrap();
    for number in journal.releasable() {
        journal.release(number, NOW).unwrap();
    }
    for number in ENTRIES + 1..=3 * ENTRIES {
        let body = entry(number, 0, &mut copy);
        journal.append(DISK, EntryKind::Ordered, &[&body], NOW).unwrap();
    }
    journal.commit(NOW).unwrap();
    let runs = view.open_runs(&journal, &mut applier).unwrap();
    let mut disk = vec![0; INSIDE_SECTORS as usize * 512];
    let refused = view.read(&runs, &mut applier, 0, &mut disk).unwrap_err().to_string();
    assert!(refused.contains("choose another point"), "{refused}");
    assert!(View::open(&journal, DISK, *at).is_err());
}
