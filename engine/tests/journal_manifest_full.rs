//! A full drive and the manifest: edits that free space go on for a while, what does not fit is tried again and stops nothing,
//! and a checkpoint that fails takes back nothing that is durable.
//!
//! On memory files that say they are full, and on a tmpfs and an ext4 filled to the last byte; these need root, and where they
//! cannot be had the test says `SKIPPED` on standard error. Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "journal_manifest_full/drive.rs"]
mod drive;
mod journal_lab;
#[path = "journal_lab/place.rs"]
mod place;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use drive::Drive;
use journal_lab::{NOW, id};
use place::{Lab, Place, noise};
use reprotect_engine::error::{Answer as _, Severity};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{Edit, EpochsExpired, PointKept};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{OpenOptions, open};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::scrub::check_own;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings, RunFile};
use reprotect_engine::units::Sequence;

const SECTORS: u64 = 32 * 8;
const SEGMENT: u64 = 64 << 10;

fn place(files: Arc<dyn Files>) -> Place {
    Place {
        files,
        folder: "/retention".into(),
        targets: vec!["/datastore/disk".into()],
        size_sectors: SECTORS,
        segment_bytes: SEGMENT,
    }
}

/// A journal of some undo epochs.
fn filled(place: &Place) -> Lab {
    let mut lab = place.create().unwrap();
    for seed in 1..=4 {
        lab.write(0, seed * 30, 20, seed).unwrap();
        lab.commit().unwrap();
        lab.apply(0).unwrap();
        lab.epoch(0).unwrap();
    }
    lab
}

fn in_memory() -> (MemoryFiles, Drive, Place) {
    let memory = MemoryFiles::default();
    memory.put("/datastore/disk", &noise(9, SECTORS as usize * 512));
    let drive = Drive::of(&memory);
    let place = place(Arc::new(drive.clone()));
    (memory, drive, place)
}

fn point(number: u64) -> Edit {
    let mut point = [0; 16];
    point[..8].copy_from_slice(&number.to_le_bytes());
    Edit::PointKept(PointKept {
        disk: id(0),
        point,
        number: 1,
        sequence: Sequence(1),
        epoch: 1,
        source_time: NOW,
        class: MarkClass::Crash,
        pinned: false,
        degraded: false,
        name: Text::new(""),
        cause: MarkCause::Timer,
    })
}

fn keep(journal: &mut Journal, number: u64) -> Result<(), JournalError> {
    journal.edit(&[point(number)], NOW)
}

/// The journal without its disks, which may need room for a new run.
fn reopen(place: &Place) -> Journal {
    let settings = JournalSettings { segment_bytes: place.segment_bytes };
    Journal::open(Arc::clone(&place.files), &place.folder, settings, NOW).unwrap().0
}

/// The oldest epochs expire, and what that frees is removed.
fn expire(journal: &mut Journal, through: u64) {
    journal.edit(&[Edit::EpochsExpired(EpochsExpired { disk: id(0), through })], NOW).unwrap();
    for epoch in 1..=through {
        journal.files().remove(&run_path(journal, id(0), RunFile::Epoch(epoch))).unwrap();
    }
}

#[test]
fn on_a_full_drive_edits_go_on_for_a_while_also_after_a_restart() {
    let (_, drive, place) = in_memory();
    let mut journal = filled(&place).journal;
    drive.fill(true);
    (1..=4).for_each(|number| keep(&mut journal, number).unwrap());
    drop(journal);
    let mut journal = reopen(&place);
    keep(&mut journal, 5).unwrap();
    expire(&mut journal, 2);
    let shape = journal.shape().clone();
    drop(journal);
    assert_eq!(*reopen(&place).shape(), shape);
    drive.fill(false);
    let mut lab = place.open().unwrap();
    assert!(lab.holes[0].is_empty());
    lab.view(0, At::entry(4, 4)).unwrap();
}

#[test]
fn an_edit_without_room_changes_nothing_and_is_tried_again() {
    let (_, drive, place) = in_memory();
    let mut journal = filled(&place).journal;
    drive.fill(true);
    let mut kept = 0;
    let error = loop {
        match keep(&mut journal, kept + 1) {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
        assert!(kept < 100, "a full drive takes everything");
    };
    assert!(kept >= SEGMENT / 2 / 4096, "only {kept} edits had room ahead");
    for error in [error, keep(&mut journal, 1000).unwrap_err()] {
        assert!(error.is_full() && error.severity() == Severity::Retry, "{error}");
    }
    assert_eq!(journal.shape().disks[&id(0)].points.len() as u64, kept);
    // Opened while it is full, and when there is room again.
    drop(journal);
    let mut journal = reopen(&place);
    assert!(keep(&mut journal, 1000).unwrap_err().is_full());
    drive.fill(false);
    keep(&mut journal, 1000).unwrap();
    let shape = journal.shape().clone();
    assert_eq!(shape.disks[&id(0)].points.len() as u64, kept + 1);
    drop(journal);
    assert_eq!(*reopen(&place).shape(), shape);
}

/// An edit that does not fit is tried again, again and again; the segment that it was to name is used once there is room.
#[test]
fn a_segment_that_the_manifest_has_no_room_to_name_stays_free() {
    let (_, drive, place) = in_memory();
    let mut lab = filled(&place);
    lab.journal.prepare(4).unwrap();
    drive.fill(true);
    let mut kept = 0;
    while keep(&mut lab.journal, kept + 1).is_ok() {
        kept += 1;
    }
    let mut seed = 5;
    let error = loop {
        match lab.write(0, 30, 20, seed).and_then(|_| lab.commit()) {
            Ok(()) => seed += 1,
            Err(error) => break error,
        }
        assert!(seed < 100, "the segment never ends");
    };
    let free = lab.journal.log().free_segments();
    for attempt in 0..10 {
        assert!(error.is_full() && lab.write(0, 30, 20, seed).unwrap_err().is_full(), "{error}");
        assert_eq!(lab.journal.log().free_segments(), free, "attempt {attempt}");
    }
    assert!(free >= 4, "{free}");
    drive.fill(false);
    lab.write(0, 30, 20, seed).and_then(|_| lab.commit()).unwrap();
    drop(lab);
    assert!(place.open().unwrap().found.damage.is_empty());
}

/// A file system that takes new room also for what was written before: the first of two edits was written, the other was not.
#[test]
fn a_part_of_what_did_not_fit_is_not_found_later() {
    let (_, drive, place) = in_memory();
    let mut journal = filled(&place).journal;
    let batch = [point(1), point(2), point(3)];
    drive.fail_halfway(true);
    let error = journal.edit(&batch, NOW).unwrap_err();
    assert!(error.is_full(), "{error}");
    let shape = journal.shape().clone();
    drive.fail_halfway(false);
    drop(journal);
    let mut journal = reopen(&place);
    assert_eq!(*journal.shape(), shape, "an edit that failed is there after a restart");
    drive.fail_halfway(true);
    assert!(journal.edit(&batch, NOW).unwrap_err().is_full());
    drive.fail_halfway(false);
    keep(&mut journal, 4).unwrap();
    let shape = journal.shape().clone();
    drop(journal);
    let lab = place.open().unwrap();
    assert_eq!(*lab.journal.shape(), shape, "parts of one that failed stand behind one that did not");
    assert_eq!(lab.found.torn_manifest, None);
}

/// The file of a manifest was a hole once that grew with its edits.
#[test]
fn the_manifest_of_an_older_journal_gets_its_room_at_the_first_start() {
    let (memory, drive, place) = in_memory();
    drop(filled(&place));
    let path = Path::new("/retention/manifest-00000001");
    let mut written = memory.bytes_sparse(path).remove(0).1;
    let used = written.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    written.truncate(used.next_multiple_of(4096));
    let opener = memory.opener();
    opener.remove(path).unwrap();
    opener.create(path, 1 << 30).unwrap();
    memory.poke(path, 0, &written);
    let mut journal = reopen(&place);
    drive.fill(true);
    (1..=8).for_each(|number| keep(&mut journal, number).unwrap());
    let shape = journal.shape().clone();
    drop(journal);
    assert_eq!(*reopen(&place).shape(), shape);
}

#[test]
fn a_checkpoint_that_fails_takes_back_nothing_that_is_durable() {
    let (memory, drive, place) = in_memory();
    let mut journal = filled(&place).journal;
    let names = || {
        let names = memory.neighbours(Path::new("/retention/any")).unwrap();
        names.into_iter().filter(|name| name.starts_with("manifest-")).collect::<Vec<_>>()
    };
    // Over and over the same points, until a new manifest is due; it cannot be made.
    drive.refuse_files(true);
    let batch: Vec<Edit> = (1..=50).map(point).collect();
    for _ in 0..30 {
        journal.edit(&batch, NOW).unwrap();
        assert_eq!(names(), ["manifest-00000001"], "a half-made manifest is left");
    }
    expire(&mut journal, 1);
    let shape = journal.shape().clone();
    drop(journal);
    let mut journal = reopen(&place);
    assert_eq!(*journal.shape(), shape);
    drive.refuse_files(false);
    for _ in 0..60 {
        journal.edit(&batch, NOW).unwrap();
    }
    assert_eq!(names().len(), 1);
    assert_ne!(names(), ["manifest-00000001"], "it is tried again");
    let shape = journal.shape().clone();
    drop(journal);
    assert_eq!(*reopen(&place).shape(), shape);
}

fn on_disk() -> Arc<dyn Files> {
    Arc::new(FsFiles::new(|path, writable| {
        open(path, &if writable { OpenOptions::writing() } else { OpenOptions::reading() })
    }))
}

/// The file itself is gone, or another one stands in its place: what is written to the one that is open reaches nobody.
#[test]
fn a_superblock_that_is_gone_or_replaced_is_made_anew_while_the_journal_is_open() {
    let is_aside = |name: &String| name.starts_with("superblock") && name.contains(".aside");
    for what in ["gone", "empty", "foreign", "older"] {
        let dir = tempfile::tempdir().unwrap();
        let (folder, target) = (dir.path().join("retention"), dir.path().join("disk"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(&target, noise(9, SECTORS as usize * 512)).unwrap();
        let place = Place { folder: folder.clone(), targets: vec![target], ..place(on_disk()) };
        let mut lab = filled(&place);
        let superblock = folder.join("superblock");
        let older = std::fs::read(&superblock).unwrap();
        lab.write(0, 7, 9, 9).and_then(|_| lab.commit()).unwrap();
        lab.apply(0).unwrap();
        lab.epoch(0).unwrap();
        let shape = lab.journal.shape().clone();
        std::fs::remove_file(&superblock).unwrap();
        match what {
            "empty" => std::fs::write(&superblock, vec![0; older.len()]).unwrap(),
            "foreign" => std::fs::write(&superblock, noise(3, older.len())).unwrap(),
            "older" => std::fs::write(&superblock, &older).unwrap(),
            _ => {}
        }
        assert!(!lab.journal.heal_own(NOW).unwrap().is_empty(), "{what}");
        assert_eq!(check_own(&*place.files, &folder), [], "{what}: it is said to be whole");
        assert_eq!(lab.journal.heal_own(NOW).unwrap(), [], "{what}: once is enough");
        let names = place.files.neighbours(&superblock).unwrap();
        assert_eq!(names.iter().any(is_aside), what != "gone", "{what}: {names:?}");
        lab.write(0, 0, 8, 99).and_then(|_| lab.commit()).unwrap();
        assert!(place.open().err().unwrap().to_string().contains("superblock"), "{what}: it is not locked");
        drop(lab);
        assert_eq!(place.open().unwrap().journal.shape().disks, shape.disks, "{what}");
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

/// A small file system, mounted; unmounted when dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(kind: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (image, point) = (dir.path().join("image"), dir.path().join("mounted"));
        std::fs::create_dir(&point).unwrap();
        let (image, point) = (image.to_str()?, point.to_str()?);
        let made = match kind {
            "tmpfs" => run("mount", &["-t", "tmpfs", "-o", "size=24M", "tmpfs", point]),
            _ => run("truncate", &["-s", "32M", image])
                .and_then(|()| run("mkfs.ext4", &["-q", "-F", "-m", "0", image]))
                .and_then(|()| run("mount", &["-o", "loop", image, point])),
        };
        match made {
            Ok(()) => Some(Self(dir)),
            Err(reason) => {
                eprintln!("SKIPPED: cannot mount {kind} here: {reason}");
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }

    /// Takes every byte that is free.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("ballast")).unwrap();
        for piece in [1 << 20, 64 << 10, 4096, 1] {
            while file.write_all(&vec![7; piece]).and_then(|()| file.sync_all()).is_ok() {}
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run("umount", &[self.path().to_str().unwrap()]);
    }
}

#[test]
fn on_a_file_system_without_a_free_byte_points_expire_and_a_restart_works() {
    for kind in ["tmpfs", "ext4"] {
        let Some(drive) = Mounted::new(kind) else { continue };
        let beside = tempfile::tempdir().unwrap();
        let target = beside.path().join("disk");
        std::fs::write(&target, noise(9, SECTORS as usize * 512)).unwrap();
        let folder = drive.path().join("retention");
        std::fs::create_dir(&folder).unwrap();
        let place = Place { folder, targets: vec![target], segment_bytes: 1 << 20, ..place(on_disk()) };
        let mut journal = filled(&place).journal;
        let oldest = run_path(&journal, id(0), RunFile::Epoch(1));
        drive.fill();
        for number in 1..=40 {
            keep(&mut journal, number).unwrap_or_else(|error| panic!("{kind}: {error}"));
        }
        drop(journal);
        let mut journal = reopen(&place);
        for number in 41..=80 {
            keep(&mut journal, number).unwrap_or_else(|error| panic!("{kind}: {error}"));
        }
        expire(&mut journal, 2);
        assert!(!oldest.exists());
        let shape = journal.shape().clone();
        drop(journal);
        assert_eq!(*reopen(&place).shape(), shape, "{kind}");
        let mut lab = place.open().unwrap();
        lab.view(0, At::entry(4, 4)).unwrap();
        eprintln!("{kind}: 80 edits and an expiry without a free byte");
    }
}
