//! A disk of a journal grows: points from before have the size of then, those after it the new one, across rollbacks
//! over the growth and back, merges, reopening, and power loss at every step.
//!
//! The order is the master target's: everything is applied and the undo epoch ended, the target is made larger, then the
//! manifest says so, then the next epoch begins. A target that is larger than the manifest says is taken at its size.
//! Units: sectors, entry numbers.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod journal_lab;
#[path = "journal_lab/merge.rs"]
mod journal_merge;
#[path = "journal_lab/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use journal_lab::{NOW, POSITION, id};
use place::{Lab, Place, noise};
use reprotect_engine::format::manifest::{DiskGrown, Edit, EpochCause};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::files::{Files, FilesError};
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::offline::{Offline, Which};
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::undo::{BlockRange, UndoError};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::SECTOR_BYTES;

const TARGET: &str = "/datastore/disk";
/// Both end in a part of a block.
const OLD: u64 = 16 * 8 + 3;
const NEW: u64 = 40 * 8 + 5;

fn place(files: Arc<dyn Files>) -> Place {
    Place {
        files,
        folder: "/retention".into(),
        targets: vec![TARGET.into()],
        size_sectors: OLD,
        segment_bytes: 64 << 10,
    }
}

/// The disk as it is to be at each point.
type Oracle = BTreeMap<At, Vec<u8>>;

fn write(lab: &mut Lab, disk: &mut [u8], start: u64, sectors: u64, seed: u64) -> u64 {
    let number = lab.write(0, start, sectors, seed).unwrap();
    let from = (start * SECTOR_BYTES) as usize;
    let plain = noise(seed, (sectors * SECTOR_BYTES) as usize);
    disk[from..from + plain.len()].copy_from_slice(&plain);
    number
}

/// A disk with two ended undo epochs and one that goes on, all of it applied.
fn filled(files: &MemoryFiles) -> (Lab, Vec<u8>, Oracle) {
    let mut disk = noise(9, (OLD * SECTOR_BYTES) as usize);
    files.put(TARGET, &disk);
    let mut lab = place(files.opener()).create().unwrap();
    let mut oracle = Oracle::from([(At::entry(1, 0), disk.clone())]);
    for (epoch, start) in [(1, 3), (2, OLD - 30), (3, 20)] {
        let number = write(&mut lab, &mut disk, start, 30, epoch * 10);
        lab.commit().unwrap();
        lab.apply(0).unwrap();
        oracle.insert(At::entry(epoch, number), disk.clone());
        if epoch < 3 {
            lab.epoch(0).unwrap();
        }
    }
    (lab, disk, oracle)
}

/// What a start does with a target that may be larger than the manifest says.
fn take_up(files: &MemoryFiles, lab: &mut Lab) -> Result<(), JournalError> {
    let size = files.facts(Path::new(TARGET))?.map_or(0, |facts| facts.size_bytes) / SECTOR_BYTES;
    if size > lab.disks[0].size_sectors() {
        lab.disks[0].grow(&mut lab.journal, size, NOW)?;
    }
    if lab.disks[0].open_epoch().is_none() {
        lab.disks[0].begin_epoch(&mut lab.journal, EpochCause::Time, POSITION, None, NOW)?;
    }
    Ok(())
}

fn grow(files: &MemoryFiles, mut lab: Lab) -> Result<Lab, JournalError> {
    lab.commit()?;
    lab.disks[0].close_epoch(&mut lab.journal, NOW)?;
    drop(lab.disks.pop().map(Applier::into_target));
    files.resize(Path::new(TARGET), NEW * SECTOR_BYTES)?;
    let target = files.opener().open(Path::new(TARGET), true)?;
    lab.disks.push(Applier::open(&lab.journal, id(0), target, None)?.0);
    take_up(files, &mut lab)?;
    Ok(lab)
}

fn check(lab: &mut Lab, oracle: &Oracle) {
    for (at, expected) in oracle {
        let found = lab.view(0, *at).unwrap();
        assert_eq!(found.len(), expected.len(), "the size at {at}");
        assert!(found == *expected, "the content at {at}");
    }
}

/// Writes to both parts, over the border between them, and ends the epoch.
fn write_on(lab: &mut Lab, disk: &mut Vec<u8>, oracle: &mut Oracle) {
    disk.resize((NEW * SECTOR_BYTES) as usize, 0);
    for (seed, start) in [(70, OLD - 4), (71, NEW - 20), (72, 2)] {
        let epoch = lab.disks[0].open_epoch().unwrap();
        let number = write(lab, disk, start, 20, seed);
        oracle.insert(At::entry(epoch, number), disk.clone());
    }
    lab.commit().unwrap();
    check(lab, oracle);
    lab.apply(0).unwrap();
    check(lab, oracle);
    lab.epoch(0).unwrap();
}

#[test]
fn points_keep_the_size_they_had_while_the_disk_goes_on_with_its_new_one() {
    let files = MemoryFiles::default();
    let (lab, mut disk, mut oracle) = filled(&files);
    let mut lab = grow(&files, lab).unwrap();
    write_on(&mut lab, &mut disk, &mut oracle);
    assert_eq!(lab.disks[0].size_sectors(), NEW);
    assert!(files.bytes(TARGET) == disk);
    lab.journal.close(NOW).unwrap();
    drop(lab.disks);
    let mut lab = place(files.opener()).open().unwrap();
    assert_eq!(lab.found.damage, []);
    check(&mut lab, &oracle);
    // A run from before the growth and the one behind it become one: what needs them both stays.
    let runs = lab.journal.shape().disks[&id(0)].runs.clone();
    let [.., older, newer] = runs.as_slice() else { panic!("{runs:?}") };
    journal_merge::merge_runs(&mut lab.journal, id(0), *older, *newer).unwrap();
    oracle.retain(|at, _| at.epoch < older.first || at.epoch > newer.last);
    assert!(!oracle.is_empty());
    check(&mut lab, &oracle);
    lab.journal.close(NOW).unwrap();
    drop(lab.disks);
    let mut offline = Offline::open(files.opener(), Path::new("/retention")).unwrap();
    for (at, expected) in oracle {
        use reprotect_engine::io::{BlockFile as _, ReadAt};
        let target = files.opener().open(Path::new(TARGET), false).unwrap();
        let mut point = offline.disk(id(0), target).unwrap().into_file(Which::At(at)).unwrap();
        let mut found = vec![0; point.size_bytes() as usize];
        point.read(&mut [ReadAt { offset: 0, data: &mut found }]).unwrap();
        assert!(found == expected, "{at} in the folder");
    }
}

/// A run that is gone takes all its images, also those behind the end that the disk had at first.
#[test]
fn what_is_damaged_behind_the_old_end_of_a_grown_disk_is_recorded() {
    let files = MemoryFiles::default();
    let (lab, mut disk, mut oracle) = filled(&files);
    let mut lab = grow(&files, lab).unwrap();
    write_on(&mut lab, &mut disk, &mut oracle);
    let newest = *oracle.keys().next_back().unwrap();
    let places = lab.journal.run_places().unwrap();
    let gone = places.iter().find(|place| place.run.first == newest.epoch).unwrap().clone();
    let behind = BlockRange::new(OLD.div_ceil(8), NEW.div_ceil(8));
    // Named by its file, and by the blocks that its index names.
    let missing = JournalError::Files(FilesError::Missing { path: gone.path.clone() });
    let lost =
        JournalError::Undo(UndoError::Lost { path: gone.path.clone(), epoch: newest.epoch, blocks: behind });
    for (error, blocks) in [(missing, BlockRange::new(0, behind.end)), (lost, behind)] {
        let (place, found) = lab.journal.run_of_error(id(0), &error, behind).unwrap();
        assert_eq!((place.run, found.blocks), (gone.run, blocks), "{error}");
        lab.journal.note_run(&place, &[(0, found)], false, NOW).unwrap();
        let known = &lab.journal.shape().disks[&id(0)];
        assert!(known.rot(At::entry(newest.epoch, newest.number - 1)).is_some(), "{error}");
        assert!(known.rot(newest).is_none(), "behind the run nothing needs it");
    }
}

#[test]
fn a_rollback_over_the_growth_shows_the_old_disk_and_goes_forward_again() {
    let files = MemoryFiles::default();
    let (lab, mut disk, mut oracle) = filled(&files);
    let mut lab = grow(&files, lab).unwrap();
    write_on(&mut lab, &mut disk, &mut oracle);
    let newest = *oracle.keys().next_back().unwrap();
    for at in oracle.keys().copied().collect::<Vec<_>>() {
        for to in [at, newest] {
            let (journal, applier) = (&mut lab.journal, &mut lab.disks[0]);
            rollback(journal, applier, to, POSITION, NOW).unwrap();
            applier.begin_epoch(journal, EpochCause::Time, POSITION, None, NOW).unwrap();
            // The target keeps its size: behind the old disk stands what stood there before.
            let mut expected = oracle[&to].clone();
            expected.resize((NEW * SECTOR_BYTES) as usize, 0);
            assert!(files.bytes(TARGET) == expected, "the target at {to}");
            check(&mut lab, &oracle);
        }
    }
}

#[test]
fn power_loss_at_every_step_of_the_growth_leaves_every_point_and_a_disk_that_goes_on() {
    let files = MemoryFiles::default();
    let (lab, disk, oracle) = filled(&files);
    let (before, from) = (MemoryFiles::default(), files.trace().len());
    drop(grow(&files, lab).unwrap());
    let trace = files.trace();
    let mut sizes = BTreeMap::new();
    for events in from..=trace.len() {
        for seed in 1..6_u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let after = started(&before).crashed(&trace, events, || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state >> 33 & 1 == 1
            });
            let mut lab = place(after.opener()).open().unwrap();
            assert!(lab.found.damage.is_empty() && lab.holes.iter().all(Vec::is_empty));
            take_up(&after, &mut lab).unwrap();
            lab.apply(0).unwrap(); // what APPLIED did not durably say
            let size = lab.disks[0].size_sectors();
            *sizes.entry(size).or_insert(0) += 1;
            check(&mut lab, &oracle);
            let (mut disk, mut oracle) = (disk.clone(), oracle.clone());
            if size == NEW {
                write_on(&mut lab, &mut disk, &mut oracle);
            } else {
                let mut lab = grow(&after, lab).unwrap();
                write_on(&mut lab, &mut disk, &mut oracle);
            }
        }
    }
    assert_eq!(sizes.into_keys().collect::<Vec<_>>(), [OLD, NEW], "both were seen");
}

/// The disk as it was put there before anything was traced.
fn started(files: &MemoryFiles) -> &MemoryFiles {
    files.put(TARGET, &noise(9, (OLD * SECTOR_BYTES) as usize));
    files
}

#[test]
fn an_edit_that_contradicts_what_the_disk_is_is_refused() {
    let files = MemoryFiles::default();
    let (mut lab, ..) = filled(&files);
    let edit =
        |size_sectors, after| Edit::DiskGrown(DiskGrown { disk: id(0), size_sectors, after, time: NOW });
    let mut shape = lab.journal.shape().clone();
    let goes_on = shape.apply(&edit(NEW, 3)).unwrap_err();
    assert!(goes_on.contains("goes on"), "{goes_on}");
    lab.disks[0].close_epoch(&mut lab.journal, NOW).unwrap();
    assert!(lab.disks[0].grow(&mut lab.journal, NEW, NOW).is_err(), "the target is not as large");
    let mut shape = lab.journal.shape().clone();
    for size in [OLD, OLD - 1] {
        assert!(shape.apply(&edit(size, 3)).is_err(), "{size}");
    }
    shape.apply(&edit(NEW, 3)).unwrap();
    assert!(shape.apply(&edit(NEW + 8, 2)).is_err(), "before the growth that is known");
    let known = &shape.disks[&id(0)];
    assert_eq!([0, 3, 4].map(|number| known.size_at(number)), [OLD, OLD, NEW]);
    // A manifest that is written anew says the same.
    let mut again = reprotect_engine::store::journal::Shape::default();
    shape.edits().iter().for_each(|edit| again.apply(edit).unwrap());
    assert_eq!(again.disks, shape.disks);
}
