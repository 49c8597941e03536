//! Media that fail under a journal: errors of read, write and flush on each of its files, flushes that lie, newer
//! versions. What is hit is named and stops; the other disks go on; what was promised is there after the repair.
//!
//! A device that says it flushed and did not cannot be seen through while it has power. What a power loss then shows, and
//! what it does not, is written down by the tests at the end. Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "journal_faults/faulty.rs"]
mod faulty;
mod journal_lab;
#[path = "journal_lab/place.rs"]
mod place;

use std::path::Path;
use std::sync::Arc;

use faulty::Faulty;
use journal_lab::id;
use place::{Lab, Place, noise};
use reprotect_engine::error::{Answer as _, Severity};
use reprotect_engine::format::manifest::{ManifestHeader, Superblock};
use reprotect_engine::format::segment::SegmentHeader;
use reprotect_engine::io::{BlockOp, ByteRange};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings};

const SECTORS: u64 = 32 * 8;

fn place(files: Arc<dyn Files>) -> Place {
    Place {
        files,
        folder: "/retention".into(),
        targets: vec!["/datastore/disk-a".into(), "/datastore/disk-b".into()],
        size_sectors: SECTORS,
        segment_bytes: 64 << 10,
    }
}

/// A journal of two disks with two undo epochs each; epoch 2 goes on, and some of it is not applied.
fn filled(files: &MemoryFiles) -> Lab {
    for disk in ["/datastore/disk-a", "/datastore/disk-b"] {
        files.put(disk, &noise(9, SECTORS as usize * 512));
    }
    let mut lab = place(files.opener()).create().unwrap();
    for disk in 0..2 {
        for seed in 1..=4 {
            lab.write(disk, seed * 30, 20, seed).unwrap();
        }
        lab.commit().unwrap();
        lab.apply(disk).unwrap();
        lab.epoch(disk).unwrap();
        lab.write(disk, 10, 30, 5).unwrap();
        lab.commit().unwrap();
        lab.apply(disk).unwrap();
        lab.write(disk, 70, 9, 6).unwrap();
        lab.commit().unwrap();
    }
    lab
}

/// All that a disk does: writes, windows, points, views, and at last the journal is closed and opened.
fn exercise(files: &Arc<dyn Files>, lab: &mut Lab, disk: usize) -> Result<(), JournalError> {
    lab.write(disk, 150, 16, 7)?;
    lab.commit()?;
    lab.apply(disk)?;
    lab.view(disk, At::entry(1, 2))?;
    lab.epoch(disk)?;
    lab.view(disk, At::entry(1, 4))?;
    files.facts(Path::new("/retention/superblock"))?;
    Ok(())
}

/// What each file is called, and whether all disks share it.
const FILES: [(&str, bool); 5] =
    [("superblock", true), ("manifest-", true), ("redo-", true), ("undo-0101", false), ("disk-a", false)];

#[test]
fn an_error_of_the_medium_is_named_and_stops_what_it_hits_and_nothing_else() {
    for (name, shared) in FILES {
        for op in [BlockOp::Read, BlockOp::Write, BlockOp::Flush] {
            let what = format!("{op} of {name}");
            let memory = MemoryFiles::default();
            drop(filled(&memory));
            let faulty = Faulty::new(&memory);
            let files: Arc<dyn Files> = Arc::new(faulty.clone());
            let mut lab = place(Arc::clone(&files)).open().unwrap();
            // So that there is a segment, for one that cannot be made is only tried again.
            lab.write(0, 200, 1, 8).and_then(|_| lab.commit()).unwrap();
            faulty.fail(Some((name.to_owned(), op)));
            let mut failed = exercise(&files, &mut lab, 0).err();
            if failed.is_some() && !shared {
                // The other disk is applied, makes points and is read as if nothing had happened.
                exercise(&files, &mut lab, 1).unwrap_or_else(|error| panic!("{what}: disk 2: {error}"));
            } else if failed.is_some() {
                // Nothing is acknowledged on a log or manifest that failed, and no write is tried again (I6).
                faulty.fail(None);
                if op != BlockOp::Read {
                    let again = exercise(&files, &mut lab, 0).err().map(|error| error.to_string());
                    assert!(again.is_some_and(|again| again.contains("failed")), "{what}: it goes on");
                }
                faulty.fail(Some((name.to_owned(), op)));
            }
            drop(lab);
            // Some files are touched when the journal is opened only.
            failed = failed.or_else(|| place(Arc::clone(&files)).open().err());
            let error = failed.unwrap_or_else(|| panic!("{what}: nothing fails"));
            let text = error.to_string();
            assert!(text.contains(name), "{what}: {text}");
            assert_eq!(error.severity(), Severity::Stop, "{what}: {text}");
            // After the repair everything that was promised is there.
            faulty.fail(None);
            let mut lab = place(files).open().unwrap();
            assert_eq!(lab.found.damage, [], "{what}");
            for disk in 0..2 {
                let newest = lab.journal.entries(id(disk)).last().map(|entry| entry.number);
                assert!(newest >= Some(6), "{what}: disk {disk} has {newest:?}");
                lab.apply(disk).unwrap();
                check_points(&mut lab, disk, &what);
            }
        }
    }
}

/// The disk after the first `writes` of [`filled`].
fn expected(writes: usize) -> Vec<u8> {
    let mut disk = noise(9, SECTORS as usize * 512);
    let all = [(30, 20), (60, 20), (90, 20), (120, 20), (10, 30), (70, 9)];
    for (seed, (start, sectors)) in (1..).zip(&all[..writes]) {
        disk[start * 512..(start + sectors) * 512].copy_from_slice(&noise(seed, sectors * 512));
    }
    disk
}

fn check_points(lab: &mut Lab, disk: usize, what: &str) {
    for number in 0..=6 {
        let at = At::entry(if number <= 4 { 1 } else { 2 }, number);
        assert!(lab.view(disk, at).unwrap() == expected(number as usize), "{what}: disk {disk} {at:?}");
    }
}

#[test]
fn a_full_medium_is_tried_again_and_harms_nothing() {
    let memory = MemoryFiles::default();
    let mut lab = filled(&memory);
    memory.set_room(Some(40 << 10));
    let mut written = 6;
    let error = loop {
        match lab.write(0, 200, 50, written + 1).and_then(|_| lab.commit()) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 1000, "a full medium takes everything");
    };
    assert!(error.is_full() && error.severity() == Severity::Retry, "{error}");
    memory.set_room(None);
    drop(lab);
    let mut lab = place(memory.opener()).open().unwrap();
    let newest = lab.journal.entries(id(0)).last().map_or(0, |entry| entry.number);
    assert!(newest >= written, "{newest} of {written}");
    lab.apply(0).unwrap();
    lab.apply(1).unwrap();
    check_points(&mut lab, 0, "full");
    check_points(&mut lab, 1, "full");
}

/// A log of several segments, one of them free; the second disk has entries in the newest that wait.
fn long_log(files: &MemoryFiles) -> [u64; 2] {
    let mut lab = filled(files);
    for seed in 7..40 {
        for disk in 0..2 {
            lab.write(disk, seed * 5, 16, seed).unwrap();
            lab.commit().unwrap();
            if disk == 0 || seed < 37 {
                lab.apply(disk).unwrap();
            }
        }
        if seed % 8 == 0 {
            (0..2).for_each(|disk| lab.epoch(disk).unwrap());
        }
    }
    let oldest = lab.journal.releasable()[0];
    lab.journal.release(oldest, journal_lab::NOW).unwrap();
    lab.journal.seal(journal_lab::NOW).unwrap();
    [0, 1].map(|disk| lab.journal.newest(id(disk)))
}

/// One bad sector keeps nobody from starting, and its place is named, unless changes that are on no target may stand there:
/// then nothing is given up for it, and once it can be read again, nothing is missing.
#[test]
fn one_sector_of_the_log_that_cannot_be_read_costs_nothing_that_could_be_had_later() {
    let memory = MemoryFiles::default();
    let newest = long_log(&memory);
    let names = memory.neighbours(Path::new("/retention/superblock")).unwrap();
    let segments: Vec<&String> = names.iter().filter(|name| name.starts_with("redo-")).collect();
    assert!(segments.len() > 4, "{segments:?}");
    let (mut named, mut refused) = (0, 0);
    for path in segments.iter().map(|name| Path::new("/retention").join(name)) {
        for start in (0..64 << 10).step_by(4096) {
            let what = format!("{} at byte {start}", path.display());
            let files = memory.snapshot();
            let faulty = Faulty::new(&files);
            faulty.spoil(&path, ByteRange { start, end: start + 512 });
            let place = place(Arc::new(faulty.clone()));
            let offline = Offline::open(Arc::new(faulty.clone()), Path::new("/retention"));
            drop(offline.unwrap_or_else(|error| panic!("{what}, offline: {error}")));
            let lab = match place.open() {
                Ok(lab) => lab,
                Err(JournalError::Unreadable { path: said, .. }) => {
                    assert_eq!(said, path, "{what}");
                    refused += 1;
                    faulty.heal();
                    place.open().unwrap_or_else(|error| panic!("{what}, healed: {error}"))
                }
                Err(error) => panic!("{what}: {error}"),
            };
            let damage = &lab.found.damage;
            let is_named = damage.iter().any(|damage| damage.path == path)
                || lab.found.set_aside.iter().any(|aside| aside.starts_with("/retention"));
            for (disk, newest) in newest.iter().enumerate() {
                let log = &lab.found.disks[&id(disk)];
                assert!(
                    log.newest() >= *newest,
                    "{what}: disk {disk} ends at {}, not {newest}",
                    log.newest()
                );
                let is_whole = log.lost().next().is_none() && log.doubtful.is_none();
                assert!(is_whole, "{what}: {log:?}");
                assert!(log.missing.is_empty() || is_named, "{what}: nothing is said, and {log:?}");
            }
            named += usize::from(is_named);
        }
    }
    assert!(named > 20 && refused > 1, "{named} places are named, {refused} openings refused");
}

#[test]
fn one_copy_of_the_superblock_that_cannot_be_read_is_passed_over() {
    let memory = MemoryFiles::default();
    let newest = long_log(&memory);
    for copy in 0..4 {
        let files = memory.snapshot();
        let faulty = Faulty::new(&files);
        let start = copy * 4096;
        faulty.spoil(Path::new("/retention/superblock"), ByteRange { start, end: start + 512 });
        drop(Offline::open(Arc::new(faulty.clone()), Path::new("/retention")).unwrap());
        let lab =
            place(Arc::new(faulty.clone())).open().unwrap_or_else(|error| panic!("copy {copy}: {error}"));
        let ends = [0, 1].map(|disk| lab.found.disks[&id(disk)].newest());
        assert_eq!(ends, newest, "copy {copy}");
    }
}

/// A file with a feature that this program does not know, its checksum right.
fn newer(memory: &MemoryFiles, name: &str) {
    let path = Path::new("/retention").join(name);
    let runs = memory.bytes_sparse(&path);
    let block = |offset: u64| &runs.iter().find(|run| run.0 == offset).unwrap().1[..4096];
    let patched = match name.split('-').next() {
        Some("superblock") => {
            let copies =
                runs.iter().flat_map(|(offset, bytes)| (*offset..).step_by(4096).zip(bytes.chunks(4096)));
            let valid = copies.filter_map(|(at, bytes)| Some((at, Superblock::open(bytes).ok()?)));
            let (at, newest) = valid.max_by_key(|copy| copy.1.generation).unwrap();
            // A newer program writes its copy in the place of the oldest.
            let next = Superblock { incompatible: 1, generation: newest.generation + 1, ..newest };
            memory.poke(&path, (at + 4096) % 16384, &next.to_block());
            return;
        }
        Some("manifest") => {
            ManifestHeader { incompatible: 1, ..ManifestHeader::open(block(0)).unwrap() }.to_block()
        }
        _ => SegmentHeader { incompatible: 1, ..SegmentHeader::open(block(0)).unwrap() }.to_block(),
    };
    memory.poke(&path, 0, &patched);
}

#[test]
fn a_file_of_a_newer_version_is_refused_by_name_and_not_touched() {
    for name in ["superblock", "manifest-00000001", "redo-000002"] {
        let memory = MemoryFiles::default();
        drop(filled(&memory));
        newer(&memory, name);
        let before = memory.bytes_sparse(Path::new("/retention").join(name));
        let error = place(memory.opener()).open().err().unwrap().to_string();
        assert!(
            error.contains(name) && error.contains("incompatible") && error.contains("program"),
            "{name}: {error}"
        );
        assert_eq!(memory.bytes_sparse(Path::new("/retention").join(name)), before, "{name} was changed");
    }
}

/// The files after a power loss on a medium whose flushes of files called `liar` did nothing: all of it is gone.
fn after_lies(before: &MemoryFiles, trace: &[Event], liar: &str) -> MemoryFiles {
    let lied = |event: &&Event| {
        let name = |path: &std::path::PathBuf| path.to_string_lossy().contains(liar);
        !matches!(event, Event::Flush(path) if name(path))
    };
    let told: Vec<Event> = trace.iter().filter(lied).cloned().collect();
    before.crashed(&told, told.len(), || false)
}

/// What was done since `before` on honest memory: an undo epoch ends or goes on, entries are logged and applied.
fn worked(next_epoch: bool) -> (MemoryFiles, Vec<Event>) {
    let memory = MemoryFiles::default();
    drop(filled(&memory));
    let before = memory.snapshot();
    let files = before.snapshot();
    let mut lab = place(files.opener()).open().unwrap();
    lab.apply(0).unwrap();
    if next_epoch {
        lab.epoch(0).unwrap();
    }
    for seed in 7..10 {
        lab.write(0, 20 * seed, 30, seed).unwrap();
        lab.commit().unwrap();
        lab.apply(0).unwrap();
        lab.commit().unwrap();
    }
    drop(lab);
    (before, files.trace())
}

#[test]
fn a_log_that_was_not_flushed_is_missed_by_the_manifest_or_ends_before_what_the_peer_knows() {
    let (before, trace) = worked(true);
    let lab = place(after_lies(&before, &trace, "redo-").opener()).open().unwrap();
    // Entries 7 to 9 were told to be durable. The peer knows it, and that is how a resuming session finds it.
    let newest = lab.journal.entries(id(0)).last().map(|entry| entry.number);
    assert_eq!(newest, Some(6));
    drop(lab);
    // With an edit of the manifest behind them the journal knows it by itself.
    let files = before.snapshot();
    let mut lab = place(files.opener()).open().unwrap();
    lab.write(0, 100, 30, 7).unwrap();
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    lab.epoch(0).unwrap();
    drop(lab);
    let lied = after_lies(&before, &files.trace(), "redo-");
    let opened = Journal::open(
        lied.opener(),
        Path::new("/retention"),
        JournalSettings { segment_bytes: 64 << 10 },
        journal_lab::NOW,
    );
    let (_, found) = opened.unwrap();
    assert!(!found.damage.is_empty(), "durable groups are gone and nobody says so");
}

#[test]
fn an_undo_run_that_was_not_flushed_has_holes_and_guesses_nothing() {
    let (before, trace) = worked(false);
    let mut lab = place(after_lies(&before, &trace, "undo-0101").opener()).open().unwrap();
    assert!(!lab.holes[0].is_empty(), "images that APPLIED counts on are gone and nobody says so");
    // Points that need them are refused; the newest state needs none.
    assert!(lab.view(0, At::entry(2, 5)).is_err());
    assert_eq!(lab.disks[0].applied().number, 9);
    assert!(lab.view(1, At::entry(1, 4)).unwrap() == expected(4), "the other disk");
    drop(lab);
    // A run that was never written at all stops its disk, by name.
    let (before, trace) = worked(true);
    let error = place(after_lies(&before, &trace, "undo-0101").opener()).open().err().unwrap().to_string();
    assert!(error.contains("undo-0101"), "{error}");
}

#[test]
fn a_manifest_that_was_not_flushed_is_missed_by_the_superblock() {
    let (before, trace) = worked(true);
    let lied = after_lies(&before, &trace, "manifest-");
    // More of this is in `journal_manifest.rs`, also with a superblock that was not flushed either.
    let error = place(lied.opener()).open().err().expect("edits are gone and nobody says so").to_string();
    assert!(error.contains("/retention/manifest-00000001") && error.contains("compared"), "{error}");
}

/// The one lie that a journal cannot see: the target's own. APPLIED says what the target was told to keep, and it is
/// believed; only a comparison with the source, or with checksums of the target, finds it.
#[test]
fn a_target_that_was_not_flushed_is_not_noticed_by_the_journal() {
    let (before, trace) = worked(true);
    let mut lab = place(after_lies(&before, &trace, "disk-a").opener()).open().unwrap();
    assert_eq!((lab.found.damage.len(), lab.holes[0].len()), (0, 0));
    let mut disk = expected(6);
    for seed in 7..10 {
        disk[20 * seed * 512..(20 * seed + 30) * 512].copy_from_slice(&noise(seed as u64, 30 * 512));
    }
    assert!(lab.view(0, At::entry(3, 9)).unwrap() != disk, "it is noticed now: say so above");
    // What was saved before it is right all the same, but for blocks that were to be overwritten once.
    assert!(lab.view(1, At::entry(1, 4)).unwrap() == expected(4));
}
