//! Rot in what a journal keeps: exactly the points that need it are known as damaged, through restarts, merges, expiry and
//! repair, and none of them is chosen by time or sequence.
//!
//! The oracle is reading each point whole. Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "points_lab/mod.rs"]
mod points_lab;

use std::path::Path;

use points_lab::*;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{MarkClass, Stretch};
use reprotect_engine::format::manifest::{Edit, EpochsExpired, PointDropped};
use reprotect_engine::format::undo::FRAMES_START;
use reprotect_engine::io::ReadAt;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::points::{self, Offer};
use reprotect_engine::store::journal::rot::{Found, reach};
use reprotect_engine::store::journal::scrub::{EntryPlace, check_entry, check_run, unreadable};
use reprotect_engine::store::journal::verify::Finding;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{JournalError, thin};
use reprotect_engine::units::{Sequence, Timestamp};

/// Every sealed run is read and judged.
fn scrub(store: &mut Store) {
    let files = store.files.opener();
    for place in store.journal.run_places().unwrap() {
        let found = check_run(&*files, &place).unwrap().found();
        let reached = reach(&*files, &store.journal.older_runs(&place).unwrap(), found);
        store.journal.note_run(&place, &reached, true, Timestamp(7)).unwrap();
    }
}

/// Every point that is listed is damaged where it cannot be read, and nowhere else; look-ups answer none of these.
/// Answers how many are damaged.
fn check_all(store: &mut Store) -> usize {
    let listed = points::points(&mut store.journal, DISK).unwrap();
    let mut damaged = 0;
    for point in &listed {
        let read = store.view(point.at);
        assert_eq!(read.is_err(), point.damaged.is_some(), "{}: {read:?} and {:?}", point.at, point.damaged);
        if let Ok(read) = read {
            assert!(read == store.after[&point.sequence.0], "{} is not what it was", point.at);
        }
        damaged += usize::from(point.damaged.is_some());
    }
    for clock in 0..=store.clock {
        if let Ok(found) = points::at_time(&mut store.journal, DISK, Timestamp(clock * SECOND)) {
            store.check(found.at, found.sequence.0);
        }
    }
    for sequence in 0..=store.sequence {
        if let Ok(found) = points::at_sequence(&mut store.journal, DISK, Sequence(sequence)) {
            store.check(found.at, sequence);
        }
    }
    damaged
}

/// Flips a byte among the images of a run; answers what undoes that.
fn rot(store: &mut Store) -> Option<(std::path::PathBuf, u64, u8)> {
    let places = store.journal.run_places().unwrap();
    let at = store.random(places.len().max(1) as u64) as usize;
    let path = places.get(at)?.path.clone();
    let bytes = store.files.bytes(&path);
    // The index is 8 KiB at least; it is made again from the frames, which is for other tests.
    let frames = bytes.len() as u64 - FRAMES_START - 3 * 4096;
    let offset = FRAMES_START + store.random(frames);
    let old = bytes[offset as usize];
    store.files.poke(&path, offset, &[old ^ 0x40]);
    Some((path, offset, old))
}

fn drop_point(store: &mut Store, at: At) {
    let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, at) };
    store.journal.edit(&[Edit::PointDropped(dropped)], Timestamp(9)).unwrap();
}

fn merge_all(store: &mut Store) -> usize {
    let mut merges = 0;
    while let Some(mut merge) = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap() {
        let bytes = merge.write().unwrap();
        merge.settle(&mut store.journal, bytes, Timestamp(9)).unwrap().unwrap();
        merges += 1;
    }
    merges
}

/// Epochs with a point at the end of each, some with marks and ordered stretches inside.
fn filled(seed: u64) -> (Store, Vec<At>) {
    let mut store = Store::new();
    store.random = seed * 77 + 1;
    let mut ends = Vec::new();
    for _ in 0..9 {
        for _ in 0..1 + store.random(3) {
            let count = 1 + store.random(5);
            let stretch = if store.random(2) == 0 { Stretch::Diff } else { Stretch::Ordered };
            store.batch(stretch, count);
            if store.random(3) == 0 {
                store.mark(MarkClass::Crash, "");
            }
        }
        ends.push(store.end(MarkClass::Crash, ""));
    }
    (store, ends)
}

/// `journal list` and the reading of a point agree, whichever run is not there.
#[test]
fn a_list_without_the_daemon_names_the_points_that_a_missing_run_takes() {
    let (mut named, mut sound) = (0, 0);
    for seed in 0..20 {
        // Opened anew: who sealed a run still has it in hand.
        let mut store = filled(seed).0.reopen();
        let places = store.journal.run_places().unwrap();
        let gone = &places[store.random(places.len() as u64) as usize];
        store.files.opener().remove(&gone.path).unwrap();
        let mut offline = Offline::open(store.files.opener(), Path::new(FOLDER)).unwrap();
        for listed in offline.points(DISK).unwrap() {
            let read = store.view(listed.point.at);
            assert_eq!(read.is_err(), listed.refused.is_some(), "{}: {:?}", listed.point.at, listed.refused);
            let Some(why) = listed.refused else {
                sound += 1;
                continue;
            };
            assert!(why.contains(gone.path.file_name().unwrap().to_str().unwrap()), "{why}");
            named += 1;
        }
    }
    assert!(named > 20 && sound > 20, "{named} named, {sound} sound");
}

#[test]
fn exactly_the_points_that_cannot_be_read_are_damaged_whatever_happens_next() {
    let (mut damaged, mut sound, mut merges, mut healed) = (0, 0, 0, 0);
    for seed in 0..60 {
        let (mut store, mut ends) = filled(seed);
        assert_eq!(check_all(&mut store), 0);
        let flips: Vec<_> = (0..1 + store.random(3)).filter_map(|_| rot(&mut store)).collect();
        scrub(&mut store);
        store = store.reopen();
        for _ in 0..8 {
            let listed = points::points(&mut store.journal, DISK).unwrap().len();
            let bad = check_all(&mut store);
            (damaged, sound) = (damaged + bad, sound + listed - bad);
            match store.random(4) {
                0 if ends.len() > 2 => {
                    let at = store.random(ends.len() as u64 - 1) as usize;
                    let gone = ends.remove(at);
                    drop_point(&mut store, gone);
                    merges += merge_all(&mut store);
                }
                1 if ends.len() > 2 => {
                    let gone = ends.remove(0);
                    drop_point(&mut store, gone);
                    merge_all(&mut store);
                    let through = ends[0].epoch - 1;
                    let runs = store.journal.shape().disks[&DISK].runs.clone();
                    if runs.iter().all(|run| run.first > through || run.last <= through) {
                        let expired = Edit::EpochsExpired(EpochsExpired { disk: DISK, through });
                        store.journal.edit(&[expired], Timestamp(9)).unwrap();
                        let known = &store.journal.shape().disks[&DISK].damaged;
                        assert!(known.iter().all(|damage| damage.last > through), "{known:?}");
                    }
                }
                2 => scrub(&mut store),
                _ => store = store.reopen(),
            }
        }
        // Whoever restores a file that is still there gets its points back.
        let names: Vec<_> = store.journal.run_places().unwrap().iter().map(|run| run.path.clone()).collect();
        for (path, offset, old) in flips.iter().rev().filter(|(path, ..)| names.contains(path)) {
            store.files.poke(path, *offset, &[*old]);
            healed += 1;
        }
        scrub(&mut store);
        store = store.reopen();
        check_all(&mut store);
        if flips.iter().all(|(path, ..)| names.contains(path)) {
            assert_eq!(store.journal.shape().disks[&DISK].damaged, [], "seed {seed}");
        }
    }
    println!("{damaged} damaged, {sound} sound, {merges} merges, {healed} healed");
    assert!(damaged > 100 && sound > 1000 && merges > 20 && healed > 20);
}

#[test]
fn what_a_merge_meets_is_known_before_the_two_runs_are_gone_and_told_twice_is_told_once() {
    let (mut store, ends) = filled(3);
    // The oldest of those that are merged: its images win.
    let path = store.journal.run_places().unwrap()[1].path.clone();
    let stored = store.files.bytes(&path);
    store.files.poke(&path, FRAMES_START + 100, &[stored[FRAMES_START as usize + 100] ^ 1]);
    for gone in &ends[..ends.len() - 1] {
        if *gone != ends[0] {
            drop_point(&mut store, *gone);
        }
    }
    assert!(merge_all(&mut store) > 3);
    let known = store.journal.shape().disks[&DISK].damaged.clone();
    assert!(!known.is_empty());
    check_all(&mut store);
    scrub(&mut store);
    scrub(&mut store);
    let again = &store.journal.shape().disks[&DISK].damaged;
    assert_eq!(again.iter().map(|damage| damage.end - damage.start).sum::<u64>(), blocks(&known));
    check_all(&mut store);
}

fn blocks(known: &[reprotect_engine::format::manifest::ImagesDamaged]) -> u64 {
    known.iter().map(|damage| damage.end - damage.start).sum()
}

#[test]
fn a_run_that_is_gone_damages_what_is_older_and_an_error_of_reading_says_the_same_as_the_scrub() {
    let (mut store, ends) = filled(11);
    let place = store.journal.run_places().unwrap()[4].clone();
    let files = store.files.opener();
    files.remove(&place.path).unwrap();
    assert!(check_run(&*files, &place).is_err() && unreadable(&*files, &place).is_err());
    store = store.reopen();
    let whole = reprotect_engine::format::undo::BlockRange::new(0, SECTORS.div_ceil(8));
    let older = ends.iter().find(|end| end.epoch < place.run.first).copied().unwrap();
    let error = store.view(older).unwrap_err();
    let (of, found) = store.journal.run_of_error(DISK, &error, whole).unwrap();
    assert_eq!((of.run, found.blocks), (place.run, whole), "{error}");
    // Not even an older image helps where the run cannot be opened.
    assert!(store.journal.note_run(&of, &[(0, found.clone())], false, Timestamp(1)).unwrap());
    assert!(!store.journal.note_run(&of, &[(0, found)], false, Timestamp(2)).unwrap(), "told twice");
    store = store.reopen();
    let damaged = check_all(&mut store);
    assert!(damaged >= 4, "{damaged}");
    let newest = points::points(&mut store.journal, DISK).unwrap().last().copied().unwrap();
    assert!(newest.is_sound());
}

/// The files of merged runs have numbers that come once, also when the highest one is gone and after a restart; and what the
/// scrub read of a run that is not there any more is not put down to another, nor does it stop the journal.
#[test]
fn a_place_that_the_scrub_remembers_is_never_another_run() {
    let (mut store, ends) = filled(5);
    let mut names = std::collections::BTreeSet::new();
    let mut places = store.journal.run_places().unwrap();
    for half in [&ends[..4], &ends[4..ends.len() - 1]] {
        half.iter().for_each(|gone| drop_point(&mut store, *gone));
        let mut merged = None;
        while let Some(mut merge) = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap() {
            let bytes = merge.write().unwrap();
            let (first, last) =
                merge.settle(&mut store.journal, bytes, Timestamp(9)).unwrap().unwrap().epochs;
            let made = store.journal.run_places().unwrap();
            let made =
                made.into_iter().find(|made| (made.run.first, made.run.last) == (first, last)).unwrap();
            assert!(names.insert(made.path.clone()), "{:?} comes twice", made.path);
            places.push(made.clone());
            merged = Some(made);
        }
        let gone = merged.unwrap();
        let expired = EpochsExpired { disk: DISK, through: gone.run.last };
        store.journal.edit(&[Edit::EpochsExpired(expired)], Timestamp(9)).unwrap();
        store.files.opener().remove(&gone.path).unwrap();
        store = store.reopen();
    }
    let blocks = reprotect_engine::format::undo::BlockRange::new(0, 1);
    for place in &places {
        let found = Found { blocks, cause: "read before".to_owned() };
        let known = store.journal.has_run(place);
        let noted = store.journal.note_run(place, &[(0, found)], false, Timestamp(9)).unwrap();
        assert_eq!(noted, known, "{:?}", place.run);
    }
    store = store.reopen();
    store.batch(Stretch::Diff, 1);
    store.end(MarkClass::Crash, "");
}

/// Fills the log, so that the first segments are not the newest.
fn long_epoch() -> Store {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.end(MarkClass::Crash, "");
    while store.journal.shape().segments.len() < 3 {
        for _ in 0..3 {
            store.batch(Stretch::Ordered, 6);
        }
        store.mark(MarkClass::Crash, "");
        store.apply();
    }
    store
}

fn entry_at(store: &Store, number: u64) -> EntryPlace {
    store.journal.entry_places().into_iter().find(|entry| entry.number == number).unwrap()
}

#[test]
fn a_rotten_mark_is_listed_without_the_daemon_as_one_that_cannot_be_read_and_hides_no_other() {
    let mut store = long_epoch();
    let marks = points::points(&mut store.journal, DISK).unwrap();
    let rotten = marks.iter().find(|point| !point.kept).unwrap().at;
    let place = entry_at(&store, rotten.number);
    let offset = place.place.offset + place.place.bytes - 40;
    let old = store.files.bytes(&place.path)[offset as usize];
    store.files.poke(&place.path, offset, &[old ^ 1]);
    let mut offline = Offline::open(store.files.opener(), Path::new(FOLDER)).unwrap();
    assert_eq!(offline.damage(), [], "what is in the segment is taken from its index");
    let listed = offline.points(DISK).unwrap();
    let ats = |points: &mut dyn Iterator<Item = At>| points.collect::<Vec<_>>();
    assert_eq!(
        ats(&mut listed.iter().map(|listed| listed.point.at)),
        ats(&mut marks.iter().map(|mark| mark.at))
    );
    for (listed, mark) in listed.iter().zip(&marks).filter(|(listed, _)| listed.point.at != rotten) {
        assert_eq!((listed.point, &listed.refused), (*mark, &None));
    }
    let ruin = listed.iter().find(|listed| listed.point.at == rotten).unwrap();
    assert!(!ruin.point.is_sound() && ruin.point.damaged.is_some());
    let why = ruin.refused.clone().unwrap();
    assert!(why.contains("its mark cannot be read"), "{why}");
    // Everything else is judged, and the mark is a finding.
    let verdict = offline.verify().unwrap();
    let names = |finding: &&Finding| finding.disk == Some(DISK) && finding.points.contains(&rotten);
    assert!(verdict.findings.iter().any(|finding| names(&finding)), "{:?}", verdict.findings);
    assert_eq!(verdict.runs, 2, "the run of each undo epoch");
}

fn judge(store: &mut Store, entry: &EntryPlace) -> Option<String> {
    let mut file = store.files.opener().open(&entry.path, false).unwrap();
    let mut decompressor = Decompressor::new().unwrap();
    let damage = check_entry(&mut *file, entry, &mut decompressor).unwrap().err();
    let damage = damage.map(|error| error.to_string());
    store.journal.note_entry(entry, damage.as_deref(), Timestamp(3)).unwrap();
    damage
}

#[test]
fn an_applied_entry_that_is_rotten_takes_the_points_behind_it_in_its_epoch_and_goes_with_its_segment() {
    let mut store = long_epoch();
    let (first, middle, last) = (2, store.journal.newest(DISK) / 4, store.journal.newest(DISK));
    let entry = entry_at(&store, middle);
    let offset = entry.place.offset + entry.place.bytes / 2;
    let mut old = [0];
    let mut file = store.files.opener().open(&entry.path, false).unwrap();
    file.read(&mut [ReadAt { offset, data: &mut old }]).unwrap();
    store.files.poke(&entry.path, offset, &[old[0] ^ 1]);
    let inside = points::points(&mut store.journal, DISK).unwrap();
    let behind = inside.iter().find(|point| point.at.number > middle).unwrap().at;
    let error = store.view(behind).unwrap_err();
    assert_eq!(store.journal.entry_of_error(DISK, &error).unwrap().number, middle, "{error}");
    assert!(judge(&mut store, &entry).is_some());
    // One behind it says nothing new.
    let later = entry_at(&store, middle + 1);
    assert!(!store.journal.note_entry(&later, Some("the same"), Timestamp(4)).unwrap());
    for _ in 0..2 {
        for point in points::points(&mut store.journal, DISK).unwrap() {
            let lacks = point.at.number >= middle;
            assert_eq!(point.damaged.is_some(), lacks, "{}", point.at);
            assert_eq!(store.view(point.at).is_err(), lacks, "{}", point.at);
        }
        let runs = points::ordered_runs(&mut store.journal, DISK).unwrap();
        assert!(
            runs.iter().all(|run| run.numbers().1 < middle),
            "{:?}",
            runs.last().map(|run| run.numbers())
        );
        let offers: Vec<_> = points::timeline(&mut store.journal, DISK).unwrap();
        assert_eq!(offers.last().map(|part| part.offer), Some(Offer::Damaged), "{offers:?}");
        let refused = points::at_sequence(&mut store.journal, DISK, Sequence(store.sequence));
        assert!(matches!(refused, Err(JournalError::NoState { .. })), "{refused:?}");
        store = store.reopen();
    }
    // The end of the epoch does not need it; and with the bytes back nothing is damaged.
    let end = store.end(MarkClass::Crash, "");
    let sequence = store.sequence;
    store.check(end, sequence);
    assert!(points::points(&mut store.journal, DISK).unwrap().last().unwrap().is_sound());
    let mut restored = Store { files: store.files.snapshot(), ..long_epoch() };
    restored.files.poke(&entry.path, offset, &old);
    restored = restored.reopen();
    let entry_again = entry_at(&restored, middle);
    assert_eq!(judge(&mut restored, &entry_again), None);
    assert_eq!(restored.journal.shape().disks[&DISK].damaged_entries, []);
    // Released, it is forgotten.
    assert_eq!(store.journal.shape().disks[&DISK].damaged_entries.len(), 1);
    while store.journal.shape().segments.contains_key(&entry.place.segment) {
        let oldest = store.journal.releasable()[0];
        store.journal.release(oldest, Timestamp(5)).unwrap();
    }
    assert_eq!(store.journal.shape().disks[&DISK].damaged_entries, []);
    store = store.reopen();
    assert_eq!(store.journal.shape().disks[&DISK].damaged_entries, []);
    assert!(points::points(&mut store.journal, DISK).unwrap().iter().all(|point| point.damaged.is_none()));
    assert!(first < middle && middle < last && Path::new(FOLDER).is_absolute());
}
