//! Damaged runs: every bit, every truncation, lost sectors. What cannot be read is named; nothing is guessed.

use std::path::Path;

use proptest::prelude::*;
use reprotect_engine::format::undo::{BlockRange, FRAMES_START};
use reprotect_engine::io::WriteAt;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::undo::{ActiveRun, Place, SealedRun, UndoError};

use crate::model::{
    CLOSED, DISK_BLOCKS, MAX, Model, PATH, Readable, Seeded, assert_holds, capture, check, header, identity,
    small,
};

fn poke(files: &MemoryFiles, offset: usize, data: &[u8]) {
    let mut file = files.open(Path::new(PATH), true).unwrap();
    file.write(&[WriteAt { offset: offset as u64, data }]).unwrap();
}

fn open(files: &MemoryFiles) -> Result<SealedRun, UndoError> {
    SealedRun::open(files, Path::new(PATH), &identity(5))
}

fn sealed_small() -> (MemoryFiles, Vec<u8>, Model) {
    let files = MemoryFiles::default();
    let (run, model) = small(&files, 5);
    drop(run.seal(&files, CLOSED).unwrap());
    let bytes = files.bytes(PATH);
    (files.snapshot(), bytes, model)
}

/// One flipped bit: everything but the frame it hits stays readable, and verification sees it.
fn assert_flip_is_harmless(
    files: &MemoryFiles,
    bytes: &[u8],
    model: &Model,
    bit: usize,
    deep: bool,
) -> usize {
    let byte = bit / 8;
    poke(files, byte, &[bytes[byte] ^ (1 << (bit % 8))]);
    let mut run = open(files).unwrap_or_else(|error| panic!("bit {bit}: {error}"));
    let (unreadable, extra) = check(&mut run, model);
    assert_eq!(extra, 0, "bit {bit}");
    assert!(unreadable.len() <= 4, "bit {bit}: more than one frame is unreadable: {unreadable:?}");
    if deep {
        let holes = run.verify().unwrap();
        assert!(!holes.is_empty(), "bit {bit} is not seen by verification");
        let lost: Vec<u64> =
            holes.iter().flat_map(|hole| &hole.lost).flat_map(|lost| lost.start..lost.end).collect();
        assert_eq!(lost, unreadable, "bit {bit}: verification names what cannot be read: {holes:?}");
    }
    poke(files, byte, &[bytes[byte]]);
    unreadable.len()
}

#[test]
fn every_flipped_bit_of_a_sealed_run_is_found_and_hurts_one_frame_at_most() {
    let (files, bytes, model) = sealed_small();
    let mut hurt = 0;
    for byte in 0..bytes.len() {
        // Each bit where something stands, one bit where there are zeros.
        let bits = if bytes[byte] == 0 { byte % 8..byte % 8 + 1 } else { 0..8 };
        for bit in bits {
            hurt += assert_flip_is_harmless(&files, &bytes, &model, byte * 8 + bit, byte % 5 == bit % 5);
        }
    }
    assert!(hurt > 1000, "payloads were hit");
    let mut run = open(&files).unwrap();
    assert_eq!(run.verify().unwrap(), []);
    assert_holds(&mut run, &model);
}

#[test]
fn every_truncation_of_a_sealed_run_names_what_is_gone() {
    let (files, bytes, model) = sealed_small();
    for len in (0..bytes.len()).rev() {
        files.resize(Path::new(PATH), len as u64).unwrap();
        let Ok(mut run) = open(&files) else {
            assert!(len < 4096, "{len}: one whole copy of the header is enough");
            continue;
        };
        if len % 7 == 0 || len % 4096 < 3 || len % 4096 > 4093 {
            check(&mut run, &model); // panics when a captured block is said not to be there, or reads wrong
            assert!(!run.verify().unwrap().is_empty(), "{len}");
        }
    }
}

#[test]
fn a_lost_trailer_costs_a_walk_and_nothing_else() {
    let (files, bytes, model) = sealed_small();
    poke(&files, bytes.len() - 4096, &[0; 4096]);
    let mut run = open(&files).unwrap();
    assert!(run.trailer().is_none());
    assert_holds(&mut run, &model);
    assert_eq!(run.damage().len(), 1);
    assert!(run.damage()[0].lost.is_empty());
}

#[test]
fn a_run_without_its_end_is_lost_where_it_cannot_be_known() {
    let (files, bytes, model) = sealed_small();
    // The trailer and the index are cut off, exactly behind the last frame.
    let frames_end = bytes.len() - 3 * 4096;
    files.resize(Path::new(PATH), frames_end as u64).unwrap();
    let mut run = open(&files).unwrap();
    let (unreadable, extra) = check(&mut run, &model);
    assert_eq!(unreadable, Vec::<u64>::new());
    assert_eq!(extra, DISK_BLOCKS - model.len() as u64, "any other block may have been behind the end");
    assert_eq!(run.find(BlockRange::new(5000, 5001))[0].place, Place::Lost);
}

/// A run of a few thousand frames, for an index of several pages.
fn sealed_large() -> (MemoryFiles, Vec<u8>, Model) {
    let files = MemoryFiles::default();
    let mut run = ActiveRun::create(&files, Path::new(PATH), header(5), 256 << 20).unwrap();
    let mut model = Model::new();
    let mut seeded = Seeded(77);
    for flavour in 0..30 {
        let wanted: Vec<BlockRange> = (0..220)
            .map(|_| seeded.below(DISK_BLOCKS / 3) * 3)
            .map(|at| BlockRange::new(at, at + 1))
            .collect();
        capture(&mut run, &mut model, &wanted, flavour).unwrap();
    }
    drop(run.seal(&files, CLOSED).unwrap());
    let bytes = files.bytes(PATH);
    (files.snapshot(), bytes, model)
}

#[test]
fn damaged_index_pages_are_made_again_from_the_frames() {
    let (files, bytes, model) = sealed_large();
    let trailer = *open(&files).unwrap().trailer().unwrap();
    assert!(trailer.index_pages >= 3);
    let places = trailer.places();
    let (index, end) = (trailer.frames_end as usize, bytes.len());
    let mut seeded = Seeded(5);
    for _ in 0..24 {
        let bit = (index * 8) as u64 + seeded.below(((end - index) * 8) as u64);
        assert_eq!(assert_flip_is_harmless(&files, &bytes, &model, bit as usize, true), 0);
    }
    // Two pages at once, and a frame of one of them: the frame is lost, all else is there.
    for page in 0..2 {
        poke(&files, places.index_page(page).offset as usize + 100, b"damage");
    }
    let mut run = open(&files).unwrap();
    assert_holds(&mut run, &model);
    let (first, _) = model.iter().find(|(_, image)| image.iter().any(|byte| *byte != 0)).unwrap();
    let place = run.find(BlockRange::new(*first, first + 1))[0].place;
    let Place::Stored(offset) = place else { panic!("{place:?}") };
    poke(&files, offset.0 as usize, b"damage");
    let mut run = open(&files).unwrap();
    let (unreadable, extra) = check(&mut run, &model);
    assert_eq!(unreadable, [*first]);
    assert!(extra > 0, "what else the frame may have held is lost too");
    assert!(run.damage().iter().any(|hole| !hole.lost.is_empty()));
}

/// A small run that is being written, durable up to `certain`, with its model.
fn active_small() -> (MemoryFiles, u64, Vec<u8>, Model) {
    let files = MemoryFiles::default();
    let (run, model) = small(&files, 5);
    let certain = run.len_bytes();
    drop(run);
    let bytes = files.bytes(PATH)[..certain as usize].to_vec();
    (files, certain, bytes, model)
}

fn reopen(
    files: &MemoryFiles,
    certain: u64,
) -> (ActiveRun, Vec<reprotect_engine::store::journal::undo::Hole>) {
    ActiveRun::reopen(files, Path::new(PATH), &identity(5), certain, MAX).unwrap()
}

#[test]
fn damage_before_the_certain_length_is_a_hole_and_stays_one() {
    let (files, certain, bytes, model) = active_small();
    for (byte, was) in bytes.iter().enumerate().skip(FRAMES_START as usize) {
        if *was == 0 && byte % 64 != 0 || *was != 0 && byte % 3 != 0 && byte % 4096 > 200 {
            continue;
        }
        let files = files.snapshot();
        poke(&files, byte, &[was ^ (1 << (byte % 8))]);
        let (mut run, holes) = reopen(&files, certain);
        assert!(!holes.is_empty(), "byte {byte} is not seen");
        assert!(run.len_bytes() >= certain, "nothing certain is cut");
        let (unreadable, extra) = check(&mut run, &model);
        let lost = |holes: &[reprotect_engine::store::journal::undo::Hole]| {
            let blocks = holes.iter().flat_map(|hole| &hole.lost).flat_map(|lost| lost.start..lost.end);
            blocks.collect::<Vec<u64>>()
        };
        let named = lost(&holes);
        assert!(unreadable.iter().all(|block| named.contains(block)), "byte {byte}: {holes:?}");
        assert_eq!(named.len() as u64, unreadable.len() as u64 + extra, "byte {byte}: {holes:?}");
        // It goes on, is reopened and sealed, and still knows.
        let mut model = model.clone();
        let more: Vec<BlockRange> = run.missing(BlockRange::new(0, 3));
        capture(&mut run, &mut model, &more, 9).unwrap();
        run.flush().unwrap();
        let len = run.len_bytes();
        drop(run);
        let (mut run, again) = reopen(&files, len);
        assert_eq!(lost(&again), named, "byte {byte}");
        assert_eq!(check(&mut run, &model), (unreadable.clone(), extra));
        let mut sealed = run.seal(&files, CLOSED).unwrap();
        assert_eq!(check(&mut sealed, &model), (unreadable, extra));
    }
}

#[test]
fn damage_behind_the_certain_length_is_cut() {
    let (files, len, bytes, model) = active_small();
    let groups: Vec<u64> = files
        .trace()
        .iter()
        .filter_map(|event| match event {
            Event::Write { offset, .. } if *offset >= FRAMES_START => Some(*offset),
            _ => None,
        })
        .collect();
    assert_eq!(groups.len(), 3);
    for byte in (FRAMES_START as usize..len as usize).step_by(11) {
        let files = files.snapshot();
        poke(&files, byte, &[bytes[byte] ^ (1 << (byte % 8))]);
        let (mut run, holes) = reopen(&files, 0);
        assert_eq!(holes, []);
        let group = groups.iter().rfind(|start| **start <= byte as u64).unwrap();
        assert_eq!(run.len_bytes(), *group, "cut where the group of byte {byte} began");
        let kept: Model = model
            .iter()
            .filter(|(block, _)| run.contains(BlockRange::new(**block, **block + 1)))
            .map(|(b, i)| (*b, i.clone()))
            .collect();
        assert_holds(&mut run, &kept);
        assert!(kept.len() < model.len());
        let mut whole = kept;
        let all: Vec<BlockRange> = model.keys().map(|block| BlockRange::new(*block, block + 1)).collect();
        capture(&mut run, &mut whole, &all, 33).unwrap();
        assert_holds(&mut run, &whole);
    }
}

#[test]
fn both_copies_of_the_header_must_be_gone_before_a_run_is() {
    let (files, certain, _, model) = active_small();
    for copy in 0..2 {
        let files = files.snapshot();
        poke(&files, copy * 4096 + 60, b"damage");
        let (mut run, holes) = reopen(&files, certain);
        assert_eq!((holes.len(), holes[0].lost.len()), (1, 0));
        assert_holds(&mut run, &model);
        drop(run);
        assert_eq!(reopen(&files, certain).1, [], "it was written again");
    }
    poke(&files, 60, b"damage");
    poke(&files, 4096 + 60, b"damage");
    assert!(matches!(
        ActiveRun::reopen(&files, Path::new(PATH), &identity(5), certain, MAX),
        Err(UndoError::Header { .. })
    ));
}

#[test]
fn a_file_that_is_shorter_than_what_was_applied_has_lost_what_it_may_have_held() {
    let (files, certain, _, model) = active_small();
    files.resize(Path::new(PATH), certain - 4096).unwrap();
    let (mut run, holes) = reopen(&files, certain);
    assert_eq!(run.len_bytes().max(certain), run.len_bytes());
    assert_eq!(holes.len(), 1);
    let (unreadable, extra) = check(&mut run, &model);
    assert!(!unreadable.is_empty() && extra > 0);
    assert!(run.missing(BlockRange::new(0, DISK_BLOCKS)).is_empty(), "nothing is captured again");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Any patch of garbage or zeros anywhere in a sealed run: no panic, nothing wrong, nothing missing.
    #[test]
    fn any_patch_over_a_sealed_run_is_an_error_or_harmless(
        at in any::<prop::sample::Index>(), len in 1..9000_usize, fill in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        truncate in any::<bool>(),
    ) {
        let (files, bytes, model) = sealed_small();
        let at = at.index(bytes.len());
        let len = len.min(bytes.len() - at);
        let mut seeded = Seeded(fill.unwrap_or(0));
        let patch: Vec<u8> = (0..len).map(|_| fill.map_or(0, |_| seeded.next() as u8)).collect();
        poke(&files, at, &patch);
        if truncate {
            files.resize(Path::new(PATH), (at + len) as u64).unwrap();
        }
        if let Ok(mut run) = open(&files) {
            check(&mut run, &model);
            let holes = run.verify().unwrap();
            prop_assert!(!holes.is_empty() || files.bytes(PATH) == bytes);
        } else {
            prop_assert!(at < 4096 && at + len > 4096 || truncate);
        }
    }

    /// The same over a run that is being written, before and behind what is certain.
    #[test]
    fn any_patch_over_an_active_run_is_a_hole_or_cut(
        at in any::<prop::sample::Index>(), len in 1..9000_usize, zeros in any::<bool>(), uncertain in 0..4_u64,
    ) {
        let (files, len_bytes, bytes, model) = active_small();
        let at = FRAMES_START as usize + at.index(bytes.len() - FRAMES_START as usize);
        let patch: Vec<u8> = (0..len.min(bytes.len() - at)).map(|at| if zeros { 0 } else { (at % 251) as u8 }).collect();
        poke(&files, at, &patch);
        let certain = [len_bytes, len_bytes, FRAMES_START + 12288, 0][uncertain as usize];
        let (mut run, holes) = reopen(&files, certain);
        prop_assert!(!holes.is_empty() || at as u64 >= certain || files.bytes(PATH)[..bytes.len()] == bytes);
        prop_assert!(run.len_bytes() >= certain);
        let certain_model: Model = if certain == len_bytes {
            model
        } else {
            model.into_iter().filter(|(block, _)| run.contains(BlockRange::new(*block, block + 1))).collect()
        };
        check(&mut run, &certain_model);
        let mut sealed = run.seal(&files, CLOSED).unwrap();
        check(&mut sealed, &certain_model);
    }
}
