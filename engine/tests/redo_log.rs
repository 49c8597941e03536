//! The redo log against power loss and damage, on memory files: what was committed is there after any crash, what is
//! damaged is named, and nothing is made up.
//!
//! A run is a list of steps with a seed. Every prefix of the writes it made is a crash point; of the sectors no flush
//! covered, a seeded choice lands.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use reprotect_engine::format::manifest::{DiskAdded, Superblock};
use reprotect_engine::format::segment::{Applied, EntryHead, EntryKind, GroupHeader};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::recovery::Seen;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings, Recovered, examine};
use reprotect_engine::units::{DiskId, Timestamp};

const FOLDER: &str = "/retention";
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 48 << 10 };
const NOW: Timestamp = Timestamp(1);

fn disk(number: u8) -> DiskId {
    DiskId([number; 16])
}

fn added(number: u8) -> DiskAdded {
    DiskAdded { disk: disk(number), machine: [7; 16], size_sectors: 800, time: NOW }
}

/// A body that says whose it is, and is long enough to cross sectors.
fn body(disk: u8, number: u64) -> Vec<u8> {
    let len = 40 + (number * 977 % 6000) as usize;
    (0..len).map(|at| (at as u64 * 31 + number * 7 + u64::from(disk)) as u8).collect()
}

fn open(files: &MemoryFiles) -> Result<(Journal, Recovered), JournalError> {
    Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW)
}

#[derive(Clone, Debug)]
enum Step {
    Append(u8),
    Applied(u8),
    Commit,
    Seal,
    Release,
    /// What pins the oldest segment is carried forward, and the segment released.
    Carry,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1..=2_u8).prop_map(Step::Append),
        2 => (1..=2_u8).prop_map(Step::Applied),
        4 => Just(Step::Commit),
        1 => Just(Step::Seal),
        1 => Just(Step::Release),
        2 => Just(Step::Carry),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

/// What must be there after a crash at some point: numbers committed, and released, by disk.
#[derive(Clone, Debug, Default)]
struct Promise {
    committed: BTreeMap<u8, u64>,
    applied: BTreeMap<u8, u64>,
    released: BTreeMap<u8, u64>,
}

struct Played {
    files: MemoryFiles,
    empty: MemoryFiles,
    /// After how many events of the trace which promise holds.
    promises: Vec<(usize, Promise)>,
}

/// Plays the steps; the trace of the files remembers every write and flush.
fn play(steps: &[Step]) -> Played {
    let files = MemoryFiles::default();
    let empty = files.snapshot();
    let mut journal = Some(Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap());
    let mut promise = Promise::default();
    let (mut appended, mut applied) = (BTreeMap::new(), BTreeMap::new());
    for number in 1..=2 {
        journal.as_mut().unwrap().add_disk(added(number), NOW).unwrap();
    }
    let mut promises = vec![(files.trace().len(), promise.clone())];
    for step in steps {
        let open_journal = journal.as_mut().unwrap();
        match step {
            Step::Append(number) => {
                let next = appended.get(number).copied().unwrap_or(0) + 1;
                let bytes = body(*number, next);
                let (head, tail) = bytes.split_at(bytes.len() / 3);
                let got = open_journal.append(disk(*number), EntryKind::Batch, &[head, tail], NOW).unwrap();
                assert_eq!(got.0, next);
                appended.insert(*number, next);
            }
            Step::Applied(number) => {
                let through = promise.committed.get(number).copied().unwrap_or(0);
                let said = Applied { number: through, epoch: 0, undo_bytes: 0 };
                open_journal.append_applied(disk(*number), said, NOW).unwrap();
                applied.insert(*number, through);
            }
            Step::Commit | Step::Seal => {
                match step {
                    Step::Commit => open_journal.commit(NOW).unwrap(),
                    _ => open_journal.seal(NOW).unwrap(),
                }
                promise.committed.clone_from(&appended);
                promise.applied.clone_from(&applied);
            }
            Step::Release => {
                promise.released.clone_from(&applied); // a release commits what waits
                promises.push((files.trace().len(), promise.clone())); // from here on they may be gone
                for segment in open_journal.releasable() {
                    open_journal.release(segment, NOW).unwrap();
                }
            }
            Step::Carry => {
                if let Some((segment, _)) = open_journal.pinned() {
                    open_journal.commit(NOW).unwrap();
                    promise.committed.clone_from(&appended);
                    promise.applied.clone_from(&applied);
                    promise.released.clone_from(&applied);
                    promises.push((files.trace().len(), promise.clone()));
                    // Entry by entry, with a commit after each.
                    while !open_journal.carry_piece(segment, 1, NOW).unwrap().is_all {}
                    open_journal.release(segment, NOW).unwrap();
                    assert!(open_journal.pinned().is_none_or(|(oldest, _)| oldest > segment));
                }
            }
            Step::Reopen => {
                drop(journal.take());
                let (reopened, found) = open(&files).unwrap();
                check(&found, &promise, "reopened");
                for number in 1..=2 {
                    appended.insert(number, found.disks[&disk(number)].newest());
                    let said = found.disks[&disk(number)].applied.map_or(0, |(applied, _)| applied.number);
                    applied.insert(number, said);
                }
                journal = Some(reopened);
            }
        }
        promises.push((files.trace().len(), promise.clone()));
    }
    Played { files, empty, promises }
}

/// Everything promised is there, in order and without gap; nothing else is wrong.
fn check(found: &Recovered, promise: &Promise, when: &str) {
    assert_eq!(found.damage, [], "{when}");
    for number in 1..=2_u8 {
        let log = &found.disks[&disk(number)];
        assert_eq!(log.missing, [], "{when}: disk {number}");
        let committed = promise.committed.get(&number).copied().unwrap_or(0);
        assert!(log.newest() >= committed, "{when}: disk {number} has {} of {committed}", log.newest());
        let released = promise.released.get(&number).copied().unwrap_or(0);
        let first = log.entries.first().map_or(committed + 1, |entry| entry.number);
        assert!(first <= released + 1, "{when}: disk {number} begins at {first}, {released} was released");
        let applied = promise.applied.get(&number).copied().unwrap_or(0);
        let said = log.applied.map_or(0, |(applied, _)| applied.number);
        assert!(said >= applied, "{when}: applied {said} of {applied}");
    }
}

/// Every entry reads back as it was given.
fn check_bodies(journal: &mut Journal, found: &Recovered) {
    for number in 1..=2_u8 {
        for entry in &found.disks[&disk(number)].entries {
            let (head, bytes) = journal.read(entry.place).unwrap();
            assert_eq!((head.disk, head.number), (disk(number), entry.number));
            assert_eq!(bytes, body(number, entry.number));
        }
    }
}

/// What opening takes from indexes of segments is what stands in the segments.
fn check_indexes(files: &MemoryFiles, when: &str) {
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    assert_eq!(offline.found().doubted, [], "{when}");
    let read = offline.log(|_| {}).unwrap();
    for (disk, found) in &offline.found().disks {
        let read = read.disks.get(disk).cloned().unwrap_or_default();
        assert_eq!(found, &read, "{when}: disk {disk} by its indexes and by its groups");
    }
}

/// How many workloads: `CRASH_CASES` plays more (`make crash`).
fn cases() -> u32 {
    std::env::var("CRASH_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn what_was_committed_survives_a_crash_at_any_write_and_a_crash_of_the_recovery(
        steps in steps(), seed in any::<u64>(),
    ) {
        let played = play(&steps);
        let trace = played.files.trace();
        let mut random = seed;
        let mut lands = move || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random >> 63 == 1
        };
        for events in played.promises[0].0..=trace.len() {
            let promise = &played.promises.iter().rev().find(|(at, _)| *at <= events).unwrap().1;
            let crashed = played.empty.crashed(&trace, events, &mut lands);
            check_indexes(&crashed, &format!("after {events} events"));
            let after = crashed.snapshot();
            let (mut journal, found) = open(&crashed).unwrap();
            check(&found, promise, &format!("after {events} events"));
            check_bodies(&mut journal, &found);
            // The recovery itself is interrupted, and what it left is recovered.
            drop(journal);
            let again = crashed.trace();
            let at = again.len() / 2;
            let twice = after.crashed(&again, at, &mut lands);
            check_indexes(&twice, &format!("after {events} events and {at} of its recovery"));
            let (mut journal, found) = open(&twice).unwrap();
            check(&found, promise, &format!("after {events} events and {at} of its recovery"));
            check_bodies(&mut journal, &found);
        }
    }
}

/// A journal with entries of two disks over several segments, closed in order.
fn sample() -> MemoryFiles {
    let files = MemoryFiles::default();
    let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
    for number in 1..=2 {
        journal.add_disk(added(number), NOW).unwrap();
    }
    for number in 1..=14 {
        for disk_number in 1..=2 {
            let bytes = body(disk_number, number);
            journal.append(disk(disk_number), EntryKind::Batch, &[&bytes], NOW).unwrap();
        }
        journal.commit(NOW).unwrap();
    }
    journal.close(NOW).unwrap();
    files
}

/// Opening damaged files either refuses, or names the damage, or finds everything as it was.
fn judge(files: &MemoryFiles, what: &str) {
    let Ok((mut journal, found)) = open(files) else { return };
    let whole = (1..=2).all(|number| found.disks[&disk(number)].newest() == 14);
    let missing = found.disks.values().any(|log| !log.missing.is_empty() || log.newest() < 14);
    assert!(whole && !missing || !found.damage.is_empty(), "{what}: lost silently: {found:?}");
    check_bodies(&mut journal, &found);
}

#[test]
fn every_flipped_bit_of_a_closed_journal_is_named_or_lies_in_padding() {
    let files = sample();
    let names = files.opener().neighbours(&Path::new(FOLDER).join("x")).unwrap();
    // Every 61st bit visits every byte position of a sector; `journal_flips.rs` comes to all.
    let step = 61;
    for name in names {
        let path = Path::new(FOLDER).join(&name);
        let bytes = files.bytes_sparse(&path);
        for (offset, content) in bytes {
            for bit in (0..content.len() * 8).step_by(step) {
                let damaged = files.snapshot();
                let mut flipped = content.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                damaged.poke(&path, offset, &flipped);
                judge(&damaged, &format!("{name}, byte {}, bit {}", offset + bit as u64 / 8, bit % 8));
            }
        }
    }
}

#[test]
fn every_truncation_of_a_segment_is_named() {
    let files = sample();
    for name in files.opener().neighbours(&Path::new(FOLDER).join("x")).unwrap() {
        let path = Path::new(FOLDER).join(&name);
        if !name.starts_with("redo-") {
            continue;
        }
        for len in (0..SETTINGS.segment_bytes).step_by(512) {
            let damaged = files.snapshot();
            let opener: Arc<dyn reprotect_engine::store::files::Files> = damaged.opener();
            opener.resize(&path, len).unwrap();
            judge(&damaged, &format!("{name} cut to {len} bytes"));
        }
    }
}

#[test]
fn a_second_program_a_foreign_folder_and_a_missing_journal_are_refused_by_name() {
    let files = sample();
    let (journal, _) = open(&files).unwrap();
    let error = open(&files).err().unwrap().to_string();
    assert!(error.contains("superblock") && error.contains("in use"), "{error}");
    drop(journal);
    let empty = MemoryFiles::default();
    assert!(matches!(open(&empty), Err(JournalError::NoJournal { .. })));
    empty.put("/retention/photos.zip", b"mine");
    let create = |files: &MemoryFiles| Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW);
    assert!(matches!(create(&empty), Err(JournalError::NotEmpty { found, .. }) if found == "photos.zip"));
    assert!(create(&files).is_err(), "a journal is not made over another");
    // A segment of another journal in the place of one of ours.
    let other = sample();
    let mixed = sample();
    mixed.put("/retention/redo-000002", &other.bytes("/retention/redo-000002"));
    assert!(matches!(open(&mixed), Err(JournalError::Foreign { .. })));
}

#[test]
fn files_of_nobody_are_moved_aside_and_kept() {
    let files = sample();
    files.put("/retention/manifest-00000099", b"left by a crash");
    let (_, found) = open(&files).unwrap();
    assert_eq!(found.set_aside, [Path::new("/retention/manifest-00000099.aside")]);
    assert_eq!(files.bytes("/retention/manifest-00000099.aside"), b"left by a crash");
}

/// A file that only has the name of a segment is neither written over nor removed.
#[test]
fn a_file_of_somebody_else_under_a_segments_name_is_moved_aside_and_kept() {
    let files = sample();
    let thesis = b"not a segment at all".repeat(400);
    files.put("/retention/redo-000099", &thesis);
    let (mut journal, found) = open(&files).unwrap();
    assert_eq!(found.set_aside, [Path::new("/retention/redo-000099.aside")]);
    for number in 15..60 {
        journal.append(disk(1), EntryKind::Batch, &[&body(1, number)], NOW).unwrap();
        journal.commit(NOW).unwrap();
    }
    assert_eq!(files.bytes("/retention/redo-000099.aside"), thesis);
}

/// Copies of the superblock that were cut off are made again: it opens, and opens again.
#[test]
fn a_superblock_that_was_cut_off_behind_a_whole_copy_is_made_whole() {
    let files = sample();
    let path = Path::new("/retention/superblock");
    let whole = files.bytes(path).len() as u64;
    let mut opened = 0;
    for bytes in (0..whole).step_by(1024) {
        let cut = files.snapshot();
        cut.opener().resize(path, bytes).unwrap();
        let Ok((journal, _)) = open(&cut) else { continue };
        drop(journal);
        for _ in 0..5 {
            open(&cut).unwrap();
        }
        assert_eq!(cut.bytes(path).len() as u64, whole, "after {bytes}");
        opened += 1;
    }
    assert!(opened > 0);
}

/// Without its superblock a journal is not nothing: nobody makes a new one in its place, and put back it opens.
#[test]
fn a_journal_that_lost_its_superblock_is_refused_and_left_alone() {
    let files = sample();
    let path = Path::new("/retention/superblock");
    let whole = files.bytes(path);
    let names = |files: &MemoryFiles| files.opener().neighbours(path).unwrap().len();
    for (what, left) in [("gone", None), ("empty", Some(Vec::new())), ("zeros", Some(vec![0; whole.len()]))] {
        let damaged = files.snapshot();
        damaged.opener().remove(path).unwrap();
        if let Some(left) = &left {
            damaged.put(path, left);
        }
        let before = names(&damaged);
        let said = open(&damaged).err().unwrap();
        assert!(matches!(said, JournalError::NoSuperblock { .. }), "{what}: {said}");
        assert!(said.to_string().contains("put `superblock` back"), "{said}");
        let made = Journal::create(damaged.opener(), Path::new(FOLDER), SETTINGS, NOW).err().unwrap();
        assert!(matches!(made, JournalError::NoSuperblock { .. }), "{what}: {made}");
        let read = Offline::open(damaged.opener(), Path::new(FOLDER)).err().unwrap();
        assert!(matches!(read, JournalError::NoSuperblock { .. }), "{what}: {read}");
        let examined = examine(&(damaged.opener() as Arc<dyn Files>), Path::new(FOLDER)).err().unwrap();
        assert!(matches!(examined, JournalError::NoSuperblock { .. }), "{what}: {examined}");
        assert_eq!(names(&damaged), before, "{what}: something was moved");
        damaged.put(path, &whole);
        let (_, found) = open(&damaged).unwrap();
        assert!(found.set_aside.is_empty(), "{what}");
    }
}

/// The making of the first journal, cut off anywhere, leaves one that opens or a folder that takes a new one.
#[test]
fn a_first_start_that_is_cut_off_anywhere_can_be_repeated() {
    let empty = MemoryFiles::default();
    let files = empty.snapshot();
    drop(Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap());
    let trace = files.trace();
    let (mut opened, mut made) = (0, 0);
    for events in 0..=trace.len() {
        for seed in 0..16_u64 {
            let mut state = seed * 977 + events as u64 + 1;
            let lands = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                seed == 0 || state >> 62 != 0
            };
            let left = empty.crashed(&trace, events, lands);
            match open(&left) {
                Ok(_) => opened += 1,
                Err(JournalError::NoJournal { .. }) => {
                    drop(Journal::create(left.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap());
                    open(&left).unwrap();
                    made += 1;
                }
                Err(error) => panic!("after {events} of {} events, seed {seed}: {error}", trace.len()),
            }
        }
    }
    assert!(opened > 0 && made > 0, "{opened} opened, {made} made anew");
}

#[test]
fn opening_a_whole_journal_writes_no_new_manifest() {
    let files = sample();
    for _ in 0..3 {
        let (journal, _) = open(&files).unwrap();
        journal.close(NOW).unwrap();
    }
    assert!(!files.bytes_sparse("/retention/manifest-00000001").is_empty());
    assert!(files.bytes_sparse("/retention/manifest-00000002").is_empty());
}

/// Where the edits of the first manifest end.
fn manifest_end(files: &MemoryFiles) -> u64 {
    let bytes = files.bytes_sparse("/retention/manifest-00000001").remove(0).1;
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    (used as u64).next_multiple_of(4096)
}

/// A torn end is edits that were never durable; the superblock of a closed journal knows that these were.
#[test]
fn the_last_edit_of_a_closed_journal_is_damage_where_it_cannot_be_read() {
    let files = sample();
    let path = "/retention/manifest-00000001";
    let last = manifest_end(&files) - 4096;
    for damage in [&[0xff_u8; 16][..], &[0; 4096]] {
        let damaged = files.snapshot();
        damaged.poke(path, last, damage);
        let error = open(&damaged).err().unwrap().to_string();
        assert!(error.contains("manifest-00000001"), "{error}");
    }
    let cut = files.snapshot();
    cut.opener().resize(Path::new(path), last).unwrap();
    assert!(matches!(open(&cut), Err(JournalError::Damaged { .. })));
}

#[test]
fn a_copy_of_the_superblock_with_a_broken_magic_is_passed_over_and_one_of_a_newer_version_is_not() {
    let files = sample();
    let bytes = files.bytes("/retention/superblock");
    let oldest = 4096; // copies are written round-robin from the second place on
    assert_ne!(bytes[oldest], 0);
    // One flipped bit makes no newer version.
    for (copy, bit) in (0..4).flat_map(|copy| (0..64).map(move |bit| (copy * 4096, bit))) {
        let damaged = files.snapshot();
        let at = copy + bit / 8;
        damaged.poke("/retention/superblock", at as u64, &[bytes[at] ^ (1 << (bit % 8))]);
        open(&damaged).unwrap_or_else(|error| panic!("copy {copy}, bit {bit}: {error}"));
    }
    // What a newer program wrote counts wherever it stands, and whatever else is damaged.
    let copies = (0..4).map(|copy| Superblock::open(&bytes[copy * 4096..][..4096]).unwrap());
    let newest = copies.max_by_key(|copy| copy.generation).unwrap();
    let incompatible = Superblock { incompatible: 1, generation: newest.generation + 1, ..newest };
    let mut later = newest.sealed_as(2).to_bytes().to_vec();
    later.resize(4096, 0);
    for (newer, place) in [(incompatible.to_block(), 0), (later, 0), (incompatible.to_block(), 12_288)] {
        for rotten in [None, Some(4096), Some(8192)] {
            let files = files.snapshot();
            files.poke("/retention/superblock", place, &newer);
            if let Some(rotten) = rotten {
                files.poke("/retention/superblock", rotten + 50, &[0xa5; 9]);
            }
            let error = open(&files).err().expect("an older state is taken").to_string();
            assert!(error.contains("superblock") && error.contains("the program that wrote it"), "{error}");
        }
    }
}

/// Found by `journal_crash.rs`: such a file was taken for a free segment, and the log failed when it came to it.
#[test]
fn a_segment_whose_making_was_interrupted_is_made_anew() {
    let whole = vec![0; SETTINGS.segment_bytes as usize];
    for (what, interrupted) in [("without its length", Vec::new()), ("without its bytes", whole)] {
        let files = sample();
        let path = Path::new("/retention/redo-000009");
        files.opener().create(path, interrupted.len() as u64).unwrap();
        if let Some(half) = interrupted.get(..interrupted.len() / 2).filter(|half| !half.is_empty()) {
            files.poke(path, 0, half);
        }
        let (mut journal, found) = open(&files).unwrap();
        assert!(files.opener().facts(path).unwrap().is_none(), "{what}");
        assert!(found.set_aside.is_empty(), "{what}");
        for number in 15..40 {
            let bytes = body(1, number);
            assert_eq!(
                journal.append(disk(1), EntryKind::Batch, &[&bytes], NOW).unwrap().0,
                number,
                "{what}"
            );
            journal.commit(NOW).unwrap();
        }
    }
}

/// Found by `journal_crash.rs`: a removal is undone by a power cut, and the old manifest was kept for ever under a new name.
#[test]
fn a_manifest_that_was_replaced_and_is_there_again_is_removed() {
    let files = sample();
    let older = files.bytes("/retention/manifest-00000001");
    // A torn edit behind the end makes the next opening write a new manifest.
    let (mut journal, _) = open(&files).unwrap();
    journal.append(disk(1), EntryKind::Batch, &[&body(1, 15)], NOW).unwrap();
    drop(journal);
    files.poke("/retention/manifest-00000001", manifest_end(&files), b"torn");
    drop(open(&files).unwrap());
    assert!(files.bytes("/retention/manifest-00000001").is_empty(), "it was replaced");
    files.put("/retention/manifest-00000001", &older);
    let (_, found) = open(&files).unwrap();
    assert_eq!(found.set_aside, Vec::<std::path::PathBuf>::new());
    assert!(files.opener().facts(Path::new("/retention/manifest-00000001")).unwrap().is_none());
}

/// Two disks, the newest entry of the second alone in the last group; `known`: something durable says that this was.
fn ended(known: bool) -> (MemoryFiles, PathBuf, u64) {
    let files = MemoryFiles::default();
    let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
    for number in 1..=2 {
        journal.add_disk(added(number), NOW).unwrap();
    }
    for (number, entry) in [(1, 1), (2, 1), (2, 2)] {
        journal.append(disk(number), EntryKind::Batch, &[&body(number, entry)], NOW).unwrap();
        journal.commit(NOW).unwrap();
    }
    if known {
        journal.add_disk(added(3), NOW).unwrap();
    }
    let (mut path, mut last) = (PathBuf::new(), 0);
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let see = |seen: Seen<'_>| match seen {
        Seen::Segment(_, at) => path = at.to_owned(),
        Seen::Group { offset, .. } => last = offset,
        Seen::Entry { .. } => {}
    };
    offline.log(see).unwrap();
    (files, path, last)
}

fn flip(files: &MemoryFiles, path: &Path, at: u64) {
    let old = files.bytes(path)[at as usize];
    files.poke(path, at, &[old ^ 4]);
}

fn doubtful(found: &Recovered) -> Vec<u8> {
    (1..=3).filter(|at| found.disks.get(&disk(*at)).is_some_and(|log| log.doubtful.is_some())).collect()
}

#[test]
fn damage_at_the_end_of_the_log_is_of_the_disk_that_a_head_names_or_of_any() {
    let (files, path, group) = ended(true);
    flip(&files, &path, group + (GroupHeader::BYTES + EntryHead::BYTES) as u64 + 9);
    let (mut journal, found) = open(&files).unwrap();
    assert_eq!(found.damage.len(), 1, "{:?}", found.damage);
    assert_eq!(found.disks[&disk(2)].lost().collect::<Vec<_>>(), [(2, 2)]);
    assert!(found.disks[&disk(1)].missing.is_empty() && doubtful(&found).is_empty());
    let (next, _) = journal.append(disk(2), EntryKind::Batch, &[b"x"], NOW).unwrap();
    assert_eq!(next, 3, "the number of what is lost is not given again");
    // Nobody knows whose it was: all disks, until they have something behind it.
    for at in [8, GroupHeader::BYTES as u64 + 8] {
        let (files, path, group) = ended(true);
        flip(&files, &path, group + at);
        let (mut journal, found) = open(&files).unwrap();
        assert!(found.disks.values().all(|log| log.missing.is_empty()));
        assert_eq!(doubtful(&found), [1, 2, 3], "byte {at}");
        journal.append(disk(2), EntryKind::Batch, &[b"x"], NOW).unwrap();
        journal.commit(NOW).unwrap();
        drop(journal);
        for _ in 0..2 {
            let (_, found) = open(&files).unwrap();
            assert_eq!(doubtful(&found), [1, 3], "byte {at}: the second one's agent was asked");
        }
    }
    // Not known to be durable: a torn end, of which nobody was told anything.
    let (files, path, group) = ended(false);
    flip(&files, &path, group + 8);
    let (_, found) = open(&files).unwrap();
    assert!(found.torn.is_some() && found.damage.is_empty() && doubtful(&found).is_empty());
}
