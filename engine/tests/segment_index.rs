//! Indexes of redo segments, on memory files: what opening takes from them is what reading the segments gives, after
//! any crash and with any damage; and what they spare is not read.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{BatchHeader, CHAIN_START, Stretch, encode_batch};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, SegmentOpened};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::{Applied, EntryKind};
use reprotect_engine::format::segment_index::{SegmentIndexHead, encode_index, index_bytes};
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::indexed::FoundIndex;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::scrub::check_entry;
use reprotect_engine::store::journal::{DiskLog, Journal, JournalSettings, Recovered};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, Sequence, Timestamp};

const FOLDER: &str = "/retention";
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 64 << 10 };
const NOW: Timestamp = Timestamp(1);
const DISKS: [DiskId; 2] = [DiskId([1; 16]), DiskId([2; 16])];

fn open(files: &MemoryFiles) -> (Journal, Recovered) {
    Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap()
}

fn body(disk: usize, number: u64) -> Vec<u8> {
    let len = 512 * (1 + number * 977 % 12);
    let plain: Vec<u8> = (0..len).map(|at| (at * 31 + number * 7 + disk as u64) as u8).collect();
    let header = BatchHeader {
        disk: DISKS[disk],
        lineage: LineageId([3; 16]),
        generation: Generation(1),
        first_sequence: Sequence(number),
        chain: CHAIN_START,
        source_time: NOW,
        record_count: 1,
        stretch: Stretch::Ordered,
    };
    encode_batch(&header, &[Record::data(number, plain.into())]).body().to_vec()
}

fn state(disk: DiskId, settled: u64) -> DiskState {
    let mut state =
        TargetDisk::new_state(disk, PeerId([2; 16]), [0; 16], 800, LineageId([3; 16]), PassMode::Copy);
    state.sequence.0 = settled;
    state
}

/// So many entries of each disk from `first` on, with states; `applied` of them are said to be applied.
fn fill(journal: &mut Journal, first: u64, count: u64, applied: u64) {
    for number in first..first + count {
        for (at, disk) in DISKS.into_iter().enumerate() {
            let body = body(at, number);
            let appended = journal.append(disk, EntryKind::Batch, &[&body], Timestamp(number)).unwrap();
            assert_eq!(appended.0, number);
            if number % 3 == at as u64 {
                journal.append_state(&state(disk, number), NOW).unwrap();
            }
        }
        journal.commit(Timestamp(number)).unwrap();
    }
    for disk in DISKS {
        journal.append_applied(disk, Applied { number: applied, epoch: 0, undo_bytes: 0 }, NOW).unwrap();
    }
    journal.commit(NOW).unwrap();
}

fn create() -> (MemoryFiles, Journal) {
    let files = MemoryFiles::default();
    let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
    for disk in DISKS {
        let added = DiskAdded { disk, machine: [7; 16], size_sectors: 800, time: NOW };
        journal.add_disk(added, NOW).unwrap();
    }
    (files, journal)
}

/// A journal of several segments, of which so many entries are applied; not closed.
fn sample(applied: u64) -> MemoryFiles {
    let (files, mut journal) = create();
    fill(&mut journal, 1, 60, applied);
    files
}

fn segments(files: &MemoryFiles) -> Vec<(SegmentOpened, PathBuf)> {
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let path = |slot| Path::new(FOLDER).join(format!("redo-{slot:06}"));
    offline.shape().segments.values().map(|segment| (*segment, path(segment.slot))).collect()
}

/// Opening takes from indexes what it would read in the segments; answers how many it did not read.
fn is_the_same(files: &MemoryFiles, when: &str) -> usize {
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let read = offline.log(|_| {}).unwrap();
    assert_eq!(read.damage, [], "{when}");
    for disk in DISKS {
        let wanted = read.disks.get(&disk).cloned().unwrap_or_default();
        assert!(offline.found().disks[&disk] == wanted, "{when}: disk {disk}");
    }
    offline.found().indexed
}

#[test]
fn opening_reads_the_indexes_of_what_is_applied_and_nothing_else_of_it() {
    let files = sample(60);
    let count = segments(&files).len();
    assert!(count > 6, "{count} segments");
    assert_eq!(is_the_same(&files, "all applied"), count - 1, "the newest is read");
    // Reads: a few per segment, not one per group.
    let before = files.reads();
    let (mut journal, found) = open(&files);
    assert!(files.reads() - before < 6 * count as u64 + 20, "{} reads", files.reads() - before);
    assert_eq!((found.indexed, found.doubted.len(), found.damage.len()), (count - 1, 0, 0));
    for (at, disk) in DISKS.into_iter().enumerate() {
        let entries = journal.entries(disk).to_vec();
        assert_eq!(entries.len(), 60);
        for entry in entries {
            assert_eq!(journal.read(entry.place).unwrap().1, body(at, entry.number));
            assert_eq!(entry.time, Timestamp(entry.number));
        }
    }
    let verdict = Offline::open(files.opener(), Path::new(FOLDER)).unwrap().verify().unwrap();
    assert_eq!((verdict.findings.len(), verdict.indexes), (0, count as u64 - 1));
}

#[test]
fn segments_with_entries_to_be_applied_are_read() {
    for (applied, at_most) in [(0, 0), (30, 6), (59, 11)] {
        let files = sample(applied);
        let indexed = is_the_same(&files, "some applied");
        assert!(indexed <= at_most && (applied == 0 || indexed > 0), "{applied} applied: {indexed} not read");
        let (journal, found) = open(&files);
        for segment in segments(&files).iter().take(found.indexed) {
            let inside =
                |disk| journal.entries(disk).iter().filter(|entry| entry.place.segment == segment.0.number);
            assert!(DISKS.into_iter().all(|disk| inside(disk).all(|entry| entry.number <= applied)));
        }
    }
}

#[test]
fn a_damaged_index_is_named_and_costs_reading_only_and_is_written_again() {
    let files = sample(60);
    let all = segments(&files);
    let (segment, path) = &all[2];
    let bytes = files.bytes(path);
    let Ok(head) = SegmentIndexHead::open(&bytes[bytes.len() - 4096..]) else { panic!("no index") };
    let from = head.items_offset().unwrap() as usize;
    let bits = (from * 8..(bytes.len() - 4096 + SegmentIndexHead::BYTES) * 8).step_by(31);
    for bit in bits {
        let damaged = files.snapshot();
        damaged.poke(path, bit as u64 / 8, &[bytes[bit / 8] ^ 1 << (bit % 8)]);
        assert_eq!(is_the_same(&damaged, "a damaged index"), all.len() - 2, "bit {bit}");
        let mut offline = Offline::open(damaged.opener(), Path::new(FOLDER)).unwrap();
        assert!(matches!(offline.index(segment), Ok(FoundIndex::Damaged(_))), "bit {bit}");
        let verdict = offline.verify().unwrap();
        assert_eq!(verdict.findings.iter().map(|finding| &finding.path).collect::<Vec<_>>(), [path]);
        assert!(verdict.findings[0].points.is_empty() && !verdict.findings[0].newest);
        let (_, found) = open(&damaged);
        assert_eq!(found.doubted.iter().map(|doubt| &doubt.path).collect::<Vec<_>>(), [path], "bit {bit}");
        assert_eq!(found.damage, []);
        let (_, found) = open(&damaged);
        assert_eq!(found.doubted, [], "it was written again");
    }
}

/// An index with right checksums that lies is not believed where it shows, and `verify` sees it in any case.
#[test]
fn an_index_that_contradicts_its_neighbours_or_its_groups_is_found() {
    let files = sample(60);
    let all = segments(&files);
    let (segment, path) = &all[2];
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let Ok(FoundIndex::Whole(head, items)) = offline.index(segment) else { panic!("no index") };
    let mut later = items.clone();
    later[0].time = Timestamp(77);
    let mut twice = items.clone();
    let first = twice.iter_mut().find(|item| item.kind.is_numbered()).unwrap();
    first.number = 1;
    let cases = [
        (SegmentIndexHead { last_group: head.last_group - 1, ..head }, items.clone(), true),
        (SegmentIndexHead { previous: head.previous ^ 1, ..head }, items.clone(), true),
        (SegmentIndexHead { journal: [9; 16], ..head }, items.clone(), true),
        (SegmentIndexHead { number: head.number + 1, ..head }, items.clone(), true),
        (SegmentIndexHead { first_group: head.first_group + 1, ..head }, items.clone(), true),
        (SegmentIndexHead { incompatible: 1, ..head }, items, true),
        (head, twice, true),
        (head, later, false),
    ];
    for (case, (head, items, shows)) in cases.into_iter().enumerate() {
        let lying = files.snapshot();
        let index = encode_index(&head, &items);
        assert_eq!(index.len() as u64, index_bytes(items.len() as u64));
        lying.poke(path, segment.bytes - index.len() as u64, &index);
        let mut offline = Offline::open(lying.opener(), Path::new(FOLDER)).unwrap();
        assert_eq!(offline.found().doubted.len(), usize::from(shows), "case {case}");
        assert_eq!(offline.verify().unwrap().findings.len(), 1, "case {case}");
        if shows {
            is_the_same(&lying, &format!("case {case}"));
        }
    }
}

#[test]
fn what_rots_in_a_segment_that_is_not_read_is_found_by_reader_scrub_and_verify() {
    let files = sample(60);
    let (mut journal, _) = open(&files);
    let entry = journal.entries(DISKS[0])[3];
    let path = segments(&files)[0].1.clone();
    files.poke(&path, entry.place.offset + 60, &[0xEE, 0xEE]);
    drop(journal);
    (journal, _) = open(&files);
    assert!(journal.read(entry.place).unwrap_err().to_string().contains("redo-"));
    let place = journal.entry_places().into_iter().find(|place| place.place == entry.place).unwrap();
    let mut file = files.opener().open(&place.path, false).unwrap();
    let mut decompressor = Decompressor::new().unwrap();
    assert!(check_entry(&mut *file, &place, &mut decompressor).unwrap().is_err(), "the scrub sees it");
    drop(journal);
    let verdict = Offline::open(files.opener(), Path::new(FOLDER)).unwrap().verify().unwrap();
    assert!(verdict.findings.iter().any(|finding| finding.path == path), "{:?}", verdict.findings);
}

/// The newest STATE and APPLIED are read even where an index says where they are: what replaces them must be known.
#[test]
fn a_damaged_newest_state_has_its_segment_read() {
    let (files, mut journal) = create();
    fill(&mut journal, 1, 30, 30);
    journal.append_state(&state(DISKS[0], 999), NOW).unwrap();
    for number in 31..61 {
        journal.append(DISKS[1], EntryKind::Batch, &[&body(1, number)], NOW).unwrap();
    }
    journal.append_applied(DISKS[1], Applied { number: 60, epoch: 0, undo_bytes: 0 }, NOW).unwrap();
    journal.commit(NOW).unwrap();
    drop(journal);
    let indexed = is_the_same(&files, "a state far back");
    let log = &Offline::open(files.opener(), Path::new(FOLDER)).unwrap().found().disks[&DISKS[0]].clone();
    let DiskLog { state: Some((_, state)), applied: Some((_, applied)), .. } = log else { panic!("{log:?}") };
    for place in [state, applied] {
        let damaged = files.snapshot();
        let (_, path) = segments(&files).into_iter().find(|(of, _)| of.number == place.segment).unwrap();
        damaged.poke(&path, place.offset + 60, &[0xEE]);
        let (_, found) = open(&damaged);
        assert!(found.indexed < indexed, "{} of {indexed} not read", found.indexed);
        assert!(!found.damage.is_empty(), "the damage is named");
        // Damage must be named each time.
        let (_, found) = open(&damaged);
        assert!(!found.damage.is_empty(), "an index hides it");
    }
}

#[test]
fn a_segment_that_is_used_again_has_lost_its_index() {
    let (files, mut journal) = create();
    fill(&mut journal, 1, 30, 30);
    for segment in journal.releasable() {
        journal.release(segment, NOW).unwrap();
    }
    let used = journal.log().free_segments();
    assert!(used > 2);
    fill(&mut journal, 31, 5, 35);
    assert!(journal.log().free_segments() < used, "old files are used");
    is_the_same(&files, "used again");
    let newest = segments(&files).pop().unwrap().0;
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    assert_eq!(offline.index(&newest).unwrap(), FoundIndex::None);
}

#[test]
fn a_journal_of_an_older_program_gets_its_indexes_when_it_is_opened() {
    let files = sample(60);
    let all = segments(&files);
    for (segment, path) in &all {
        files.poke(path, segment.bytes - 4096, &[0; 4096]);
    }
    let (journal, found) = open(&files);
    assert_eq!((found.indexed, found.doubted), (0, Vec::new()));
    drop(journal);
    assert_eq!(is_the_same(&files, "indexed at the opening"), all.len() - 1);
    // The newest gets its own when the next one is in use, though the program was killed.
    let (mut journal, _) = open(&files);
    fill(&mut journal, 61, 1, 61);
    drop(journal);
    assert_eq!(is_the_same(&files, "the one that was left"), all.len());
}

/// Found by `journal_crash.rs`: the index knows the checksum of the group before, which the groups cannot tell.
#[test]
fn the_index_of_an_empty_segment_that_is_the_oldest_is_sound() {
    let files = sample(60);
    let (mut journal, _) = open(&files);
    // A segment is in use and nothing comes into it.
    journal.append(DISKS[0], EntryKind::Batch, &[&body(0, 61)], NOW).unwrap();
    drop(journal);
    let (mut journal, _) = open(&files);
    let empty = *journal.shape().segments.keys().next_back().unwrap();
    fill(&mut journal, 61, 1, 61);
    for segment in journal.releasable().into_iter().filter(|segment| *segment < empty) {
        journal.release(segment, NOW).unwrap();
    }
    assert_eq!(journal.shape().segments.keys().next(), Some(&empty));
    drop(journal);
    let mut offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let index = offline.index(&offline.shape().segments[&empty]).unwrap();
    assert!(matches!(index, FoundIndex::Whole(_, items) if items.is_empty()));
    assert_eq!(offline.verify().unwrap().findings, []);
}
