//! Entries that were given up or carried forward, and what a stop in the middle of it leaves: numbers that were used
//! are not used again, what is there is not called missing, and the newest state is read from the folder.
//!
//! Found by `journal_crash.rs`; each of these is one of its states, made by hand. Units: sectors, entry numbers. Called
//! by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod journal_lab;
#[path = "journal_lab/place.rs"]
mod place;

use std::path::Path;

use journal_lab::{NOW, POSITION, id};
use place::{Lab, Place, noise};
use reprotect_engine::format::manifest::{Edit, EpochCause, LossMended};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile as _, ReadAt};
use reprotect_engine::store::files::Files as _;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::offline::{Offline, Which};
use reprotect_engine::store::journal::recovery::Seen;
use reprotect_engine::store::journal::rollback::begin;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::SECTOR_BYTES;

const TARGET: &str = "/datastore/disk";
const SECTORS: u64 = 16 * 8;
const GROWN: u64 = 20 * 8;

fn place(files: &MemoryFiles) -> Place {
    Place {
        files: files.opener(),
        folder: "/retention".into(),
        targets: vec![TARGET.into()],
        size_sectors: SECTORS,
        segment_bytes: 64 << 10,
    }
}

/// Where an entry writes.
const fn extent(number: u64) -> (u64, u64) {
    (number * 8, 24)
}

fn write(lab: &mut Lab, number: u64) {
    let (start, sectors) = extent(number);
    assert_eq!(lab.write(0, start, sectors, number).unwrap(), number);
    lab.commit().unwrap();
}

/// The disk with these entries on it.
fn content(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut disk = noise(77, (SECTORS * SECTOR_BYTES) as usize);
    for number in entries {
        let (start, sectors) = extent(number);
        let (from, bytes) = ((start * SECTOR_BYTES) as usize, (sectors * SECTOR_BYTES) as usize);
        disk[from..from + bytes].copy_from_slice(&noise(number, bytes));
    }
    disk
}

/// A disk with so many entries, the first two of them on its target.
fn waiting(files: &MemoryFiles, entries: u64) -> Lab {
    files.put(TARGET, &content([]));
    let mut lab = place(files).create().unwrap();
    for number in 1..=entries {
        write(&mut lab, number);
        if number == 2 {
            lab.apply(0).unwrap();
            lab.epoch(0).unwrap();
        }
    }
    lab
}

fn newest(files: &MemoryFiles) -> Vec<u8> {
    let mut offline = Offline::open(files.opener(), Path::new("/retention")).unwrap();
    let target = files.opener().open(Path::new(TARGET), false).unwrap();
    let mut file = offline.disk(id(0), target).unwrap().into_file(Which::Newest).unwrap();
    let mut found = vec![0; file.size_bytes() as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut found }]).unwrap();
    found
}

fn mend(lab: &mut Lab) {
    let number = lab.journal.newest(id(0)) + 1;
    lab.journal.edit(&[Edit::LossMended(LossMended { disk: id(0), number })], NOW).unwrap();
}

#[test]
fn numbers_of_entries_that_were_given_up_are_not_used_again_when_a_stop_follows_the_mend() {
    let files = MemoryFiles::default();
    let mut lab = waiting(&files, 5);
    assert_eq!(lab.journal.give_up(id(0), "the drive was full", NOW).unwrap(), Some((3, 5)));
    drop(lab);
    // The compare found no difference, and the mark behind it did not become durable.
    let mut lab = place(&files).open().unwrap();
    mend(&mut lab);
    drop(lab);
    let mut lab = place(&files).open().unwrap();
    assert_eq!(lab.journal.newest(id(0)), 5);
    write(&mut lab, 6);
    drop(lab);
    let mut lab = place(&files).open().unwrap();
    lab.apply(0).unwrap();
    assert!(files.bytes(TARGET) == content([1, 2, 6]), "what was acknowledged is on the target");
    assert!(lab.holes.iter().all(Vec::is_empty));
    assert!(lab.view(0, At::entry(1, 2)).unwrap() == content([1, 2]), "the point before the loss");
}

#[test]
fn the_newest_state_is_read_over_entries_that_were_lost_and_mended() {
    let files = MemoryFiles::default();
    let mut lab = waiting(&files, 5);
    lab.journal.give_up(id(0), "the drive was full", NOW).unwrap();
    drop(lab);
    let mut lab = place(&files).open().unwrap();
    write(&mut lab, 6);
    mend(&mut lab);
    write(&mut lab, 7);
    drop(lab);
    assert!(newest(&files) == content([1, 2, 6, 7]));
}

#[test]
fn the_newest_state_of_a_disk_that_goes_back_over_its_growth_has_the_size_of_the_disk() {
    let files = MemoryFiles::default();
    let mut lab = waiting(&files, 2);
    lab.disks[0].close_epoch(&mut lab.journal, NOW).unwrap();
    drop(lab.disks.pop().map(Applier::into_target));
    files.resize(Path::new(TARGET), GROWN * SECTOR_BYTES).unwrap();
    let target = files.opener().open(Path::new(TARGET), true).unwrap();
    let mut applier = Applier::open(&lab.journal, id(0), target, None).unwrap().0;
    applier.grow(&mut lab.journal, GROWN, NOW).unwrap();
    applier.begin_epoch(&mut lab.journal, EpochCause::Time, POSITION, None, NOW).unwrap();
    lab.disks.push(applier);
    lab.write(0, SECTORS - 8, 24, 3).unwrap(); // over the old end
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    begin(&mut lab.journal, &mut lab.disks[0], At::entry(1, 2), POSITION, NOW).unwrap();
    drop(lab);
    let mut wanted = content([1, 2]);
    wanted.resize((GROWN * SECTOR_BYTES) as usize, 0);
    assert!(newest(&files) == wanted);
}

#[test]
fn the_size_of_a_target_is_certain_before_the_manifest_says_it() {
    let files = MemoryFiles::default();
    let mut lab = waiting(&files, 2);
    lab.disks[0].close_epoch(&mut lab.journal, NOW).unwrap();
    drop(lab);
    // A program that was killed behind the resize: its flush did not happen.
    let (base, resized) = (files.snapshot(), [Event::Resize(TARGET.into(), GROWN * SECTOR_BYTES)]);
    let killed = base.replayed(&resized);
    let mut lab = place(&killed).open().unwrap();
    lab.disks[0].grow(&mut lab.journal, GROWN, NOW).unwrap();
    drop(lab);
    let trace = killed.trace();
    let after = base.crashed(&trace, trace.len(), || false);
    let lab = place(&after).open().unwrap();
    assert_eq!(lab.disks[0].size_sectors(), GROWN);
    assert_eq!(after.bytes(TARGET).len() as u64, GROWN * SECTOR_BYTES);
}

/// The manifest knows that an undo epoch ended; the APPLIED behind it rotted, and an older one is written again.
#[test]
fn what_is_on_the_target_does_not_wait_again_because_the_note_of_it_rotted() {
    let files = MemoryFiles::default();
    files.put(TARGET, &content([]));
    let mut lab = place(&files).create().unwrap();
    write(&mut lab, 1);
    lab.apply(0).unwrap();
    lab.commit().unwrap();
    let mut number = 1;
    while lab.journal.shape().segments.len() < 3 {
        number += 1;
        assert_eq!(lab.write(0, number % 8 * 8, 24, number).unwrap(), number);
        lab.commit().unwrap();
    }
    lab.apply(0).unwrap();
    lab.epoch(0).unwrap();
    let first = *lab.journal.shape().segments.keys().next().unwrap();
    drop(lab);
    let offline = Offline::open(files.opener(), Path::new("/retention")).unwrap();
    let mut notes = Vec::new();
    let see = |seen: Seen<'_>| match seen {
        Seen::Entry { place, head, .. } if head.kind == EntryKind::Applied => notes.push(place),
        _ => {}
    };
    offline.log(see).unwrap();
    notes.retain(|note| note.segment > first);
    assert!(!notes.is_empty());
    for note in notes {
        let slot = offline.shape().segments[&note.segment].slot;
        files.poke(format!("/retention/redo-{slot:06}"), note.offset + note.bytes - 8, &[0xa5; 8]);
    }
    drop(offline);
    let mut lab = place(&files).open().unwrap();
    assert_eq!(lab.found.disks[&id(0)].on_target, number);
    assert_eq!(lab.journal.waiting_bytes(id(0)), 0);
    let oldest = lab.journal.releasable()[0];
    assert_eq!(oldest, first);
    lab.journal.release(oldest, NOW).unwrap();
    lab.commit().unwrap();
    assert_eq!(lab.journal.waiting_bytes(id(0)), 0, "it waits again, and keeps the log");
}

#[test]
fn what_was_carried_and_is_in_the_old_segment_still_is_not_missing() {
    let files = MemoryFiles::default();
    files.put(TARGET, &content([]));
    let mut lab = place(&files).create().unwrap();
    lab.write(0, 0, 4, 1).unwrap();
    lab.commit().unwrap();
    lab.apply(0).unwrap(); // and is in the segment of others that wait
    while lab.journal.shape().segments.len() < 3 {
        lab.write(0, 8, 4, 2).unwrap();
        lab.commit().unwrap();
    }
    let (segment, _) = lab.journal.pinned().unwrap();
    assert_eq!(lab.journal.carry_piece(segment, u64::MAX, NOW).unwrap().unreadable, []);
    drop(lab); // before the segment is released
    let mut lab = place(&files).open().unwrap();
    assert!(lab.journal.entries(id(0)).iter().any(|entry| entry.carried));
    lab.apply(0).unwrap();
    lab.commit().unwrap();
    drop(lab);
    let lab = place(&files).open().unwrap();
    assert_eq!(lab.found.disks[&id(0)].missing, []);
}
