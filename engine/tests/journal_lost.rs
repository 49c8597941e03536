//! A medium that loses durable bytes of an undo run, in the moment in which the machine stops: what was lost is named,
//! and nothing is shown in its place.
//!
//! A window, or a rollback, is played on memory files. Power is lost behind each of its I/Os, and besides one sector of
//! the run that goes on is destroyed, each in turn. Then every point of the disk is read: it shows what it was, or it is
//! refused. What a run lost and what was only torn look the same in the file; that the log names what was durable before
//! the target is written tells them apart. The same with devices that say they flushed the runs, or the log, and did not:
//! what lies on another device tells. (One that lies about everything is seen by the agent only: `journal_faults.rs`.)
//! Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod journal_lab;
#[path = "journal_lab/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use journal_lab::{NOW, POSITION, id};
use place::{Lab, Place, noise};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{Edit, EpochCause, EpochsExpired, PointKept};
use reprotect_engine::format::undo::FRAMES_START;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile as _, ReadAt};

use reprotect_engine::store::files::memory::{Event, MemoryFiles, Unflushed};
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::RunFile;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::rollback::{resume, rollback};
use reprotect_engine::store::journal::view::At;

const SECTORS: u64 = 16 * 8;
const BYTES: usize = SECTORS as usize * 512;

fn place(files: &MemoryFiles) -> Place {
    Place {
        files: files.opener(),
        folder: "/retention".into(),
        targets: vec!["/datastore/disk".into()],
        size_sectors: SECTORS,
        segment_bytes: 256 << 10,
    }
}

/// A disk, what it was at each place, and what is about to happen to it.
struct Scene {
    /// The medium before; all of it is durable.
    before: MemoryFiles,
    trace: Vec<Event>,
    /// The run that is written.
    run: PathBuf,
    points: BTreeMap<At, Vec<u8>>,
    /// The disk when all of it has happened.
    newest: Vec<u8>,
}

fn put(disk: &mut [u8], start: u64, sectors: u64, seed: u64) {
    let (from, bytes) = (start as usize * 512, sectors as usize * 512);
    disk[from..from + bytes].copy_from_slice(&noise(seed, bytes));
}

/// An epoch that is over, and one that goes on with one window in it: places 1.0 to 2.3.
fn begun(files: &MemoryFiles) -> (Lab, Vec<u8>, BTreeMap<At, Vec<u8>>) {
    let mut disk = noise(77, BYTES);
    files.put("/datastore/disk", &disk);
    let mut lab = place(files).create().unwrap();
    let mut points = BTreeMap::from([(At::entry(1, 0), disk.clone())]);
    for (number, start, sectors) in [(1, 3, 9), (2, 60, 20), (3, 20, 11)] {
        lab.write(0, start, sectors, number).unwrap();
        put(&mut disk, start, sectors, number);
        lab.commit().unwrap();
        lab.apply(0).unwrap();
        lab.commit().unwrap();
        let epoch = if number < 3 { 1 } else { 2 };
        points.insert(At::entry(epoch, number), disk.clone());
        if number == 2 {
            lab.epoch(0).unwrap();
            points.insert(At::entry(2, 2), disk.clone());
        }
    }
    (lab, disk, points)
}

/// A window of two entries. Much of what they write stands there already, as real writes have it.
fn a_window() -> Scene {
    let files = MemoryFiles::default();
    let (mut lab, mut disk, mut points) = begun(&files);
    for (number, start, sectors) in [(4, 30, 14), (5, 90, 12)] {
        lab.write(0, start, sectors, number).unwrap();
        put(&mut disk, start, sectors, number);
        points.insert(At::entry(2, number), disk.clone());
    }
    lab.commit().unwrap();
    let (before, skipped) = (files.snapshot(), files.happened());
    lab.apply(0).unwrap();
    lab.commit().unwrap();
    let run = run_path(&lab.journal, id(0), RunFile::Epoch(2));
    Scene { before, trace: files.trace().split_off(skipped), run, points, newest: disk }
}

/// Back to the disk as it was found.
fn a_rollback() -> Scene {
    let files = MemoryFiles::default();
    let (mut lab, _, mut points) = begun(&files);
    let (before, skipped) = (files.snapshot(), files.happened());
    rollback(&mut lab.journal, &mut lab.disks[0], At::entry(1, 0), POSITION, NOW).unwrap();
    let newest = points[&At::entry(1, 0)].clone();
    points.insert(At::entry(3, 3), newest.clone());
    let run = run_path(&lab.journal, id(0), RunFile::Epoch(3));
    Scene { before, trace: files.trace().split_off(skipped), run, points, newest }
}

/// What a scene came to.
#[derive(Debug, Default)]
struct Sum {
    states: usize,
    shown: usize,
    refused: usize,
    holes: usize,
}

impl Scene {
    /// Every prefix, each sector of the run destroyed in turn: `damage` says how.
    fn enumerate(&self, damage: &[u8]) -> Sum {
        let mut sum = Sum::default();
        for events in 0..=self.trace.len() {
            for all in [false, true] {
                let stopped = self.before.crashed(&self.trace, events, || all);
                let written =
                    stopped.bytes_sparse(&self.run).last().map_or(0, |(at, run)| at + run.len() as u64);
                for sector in (FRAMES_START..written).step_by(512) {
                    let files = stopped.snapshot();
                    files.poke(&self.run, sector, damage);
                    let what =
                        format!("{events} of {} I/Os, {all}, byte {sector} of the run", self.trace.len());
                    self.judge(&files, &what, None, &mut sum);
                }
            }
        }
        sum
    }

    /// Every prefix, on a device whose flushes of files called `liar` did nothing. Where that is the log, entries are gone
    /// that the target has: then its newest state is the agent's to notice.
    fn enumerate_lies(&self, liar: &str) -> Sum {
        let mut sum = Sum::default();
        let lied = |event: &&Event| match event {
            Event::Flush(path) => !path.to_string_lossy().contains(liar),
            _ => true,
        };
        for events in 0..=self.trace.len() {
            let told: Vec<Event> = self.trace[..events].iter().filter(lied).cloned().collect();
            // Of what was not flushed nothing is there; what honest files hold is.
            let gone = |unit: Unflushed| match &told[unit.event] {
                Event::Write { path, .. } | Event::Resize(path, _) => !path.to_string_lossy().contains(liar),
                _ => true,
            };
            let files = self.before.crashed_where(&told, told.len(), gone);
            let what = format!("{events} of {} I/Os, lies about {liar}", self.trace.len());
            self.judge(&files, &what, Some(liar), &mut sum);
        }
        sum
    }

    fn judge(&self, files: &MemoryFiles, what: &str, liar: Option<&str>, sum: &mut Sum) {
        sum.states += 1;
        let mut lab = match place(files).open() {
            Ok(lab) => lab,
            // A sealed run is opened when a point is read; the one that goes on may be refused by name.
            Err(error) => {
                assert!(error.to_string().contains("undo-"), "{what}: {error}");
                sum.refused += self.points.len();
                return;
            }
        };
        sum.holes += usize::from(!lab.holes[0].is_empty());
        if let Err(error) = Self::settle(&mut lab) {
            // A run that was sealed is not there, and a rollback needs it.
            assert!(liar == Some("undo-") && error.to_string().contains("undo-"), "{what}: {error}");
            sum.refused += self.points.len();
            return;
        }
        let epochs = &lab.journal.shape().disks[&id(0)].epochs;
        let rolled = epochs.iter().any(|epoch| epoch.opened.cause == EpochCause::Rollback);
        let number = lab.disks[0].applied().number;
        let reached = |at: &At| at.epoch == 2 && at.number == number;
        let before = self.points.iter().rfind(|(at, _)| reached(at)).unwrap();
        let newest = if rolled { &self.newest } else { before.1 };
        assert!(liar == Some("redo-") || target(&mut lab) == *newest, "{what}: the target");
        // Where the rollback had not begun, its undo epoch is another.
        for (at, wanted) in self.points.iter().filter(|(at, _)| at.epoch < 3 || rolled) {
            match lab.view(0, *at) {
                Ok(got) => {
                    let wrong =
                        got.chunks(512).zip(wanted.chunks(512)).position(|(got, wanted)| got != wanted);
                    assert_eq!(wrong, None, "{what}: {at} shows a wrong sector");
                    sum.shown += 1;
                }
                Err(_) => sum.refused += 1,
            }
        }
    }

    /// What the master target does at a start.
    fn settle(lab: &mut Lab) -> Result<(), JournalError> {
        resume(&mut lab.journal, &mut lab.disks[0], NOW)?;
        if lab.disks[0].open_epoch().is_none() {
            lab.disks[0].begin_epoch(&mut lab.journal, EpochCause::Time, POSITION, None, NOW)?;
        }
        lab.apply(0)
    }
}

/// What stands on the target.
fn target(lab: &mut Lab) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    lab.disks[0].target().read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
    bytes
}

/// Zeros, as where a write was never done, and noise, as where it went wrong.
const DAMAGE: [[u8; 512]; 2] = [[0; 512], [0xa5; 512]];

#[test]
fn images_of_a_window_that_the_medium_lost_are_never_guessed() {
    let scene = a_window();
    for damage in &DAMAGE {
        let sum = scene.enumerate(damage);
        eprintln!("a window: {sum:?}");
        assert!(sum.holes > 0 && sum.refused > 0 && sum.shown > 0, "{sum:?}");
    }
}

#[test]
fn images_of_a_rollback_that_the_medium_lost_are_never_guessed_and_the_rollback_is_finished() {
    let scene = a_rollback();
    for damage in &DAMAGE {
        let sum = scene.enumerate(damage);
        eprintln!("a rollback: {sum:?}");
        assert!(sum.holes > 0 && sum.refused > 0 && sum.shown > 0, "{sum:?}");
    }
}

#[test]
fn a_device_that_lied_about_a_flush_of_runs_or_log_shows_nothing_wrong() {
    for (what, scene) in [("a window", a_window()), ("a rollback", a_rollback())] {
        for (liar, refuses) in [("undo-", true), ("redo-", false)] {
            let sum = scene.enumerate_lies(liar);
            eprintln!("{what}, lies about {liar}: {sum:?}");
            assert!(sum.shown > 0 && (sum.refused > 0 || !refuses), "{what}, {liar}: {sum:?}");
        }
    }
}

/// After a start, what is applied was said to be applied in the epoch of before, and images of this one were not named.
#[test]
fn what_is_applied_after_a_start_names_the_epoch_that_goes_on() {
    let files = MemoryFiles::default();
    let (mut lab, _, _) = begun(&files);
    lab.epoch(0).unwrap();
    drop(lab);
    let mut lab = place(&files).open().unwrap(); // the newest APPLIED is of epoch 2
    lab.write(0, 40, 9, 4).unwrap();
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    lab.commit().unwrap();
    let run = run_path(&lab.journal, id(0), RunFile::Epoch(3));
    drop(lab);
    files.poke(&run, FRAMES_START, &[0xa5; 512]);
    let lab = place(&files).open().unwrap();
    let said = lab.found.disks[&id(0)].applied.unwrap().0;
    assert_eq!((said.number, said.epoch), (4, 3));
    assert!(said.undo_bytes > FRAMES_START && !lab.holes[0].is_empty(), "{said:?}");
}

/// What the manifest says of a disk whose newest segment is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    /// The undo epoch with its last entries is over.
    Ended,
    /// All that were over expired; one goes on behind them.
    Begun,
    /// A point inside the one that goes on is pinned.
    Pinned,
}

/// A disk with entries 1 to 5, of which the file with 3 to 5 is gone; and what it was at each place.
fn without_newest_segment(says: Says) -> (Place, Vec<u8>, BTreeMap<At, Vec<u8>>) {
    let files = MemoryFiles::default();
    let place = Place { segment_bytes: 96 << 10, ..place(&files) };
    let mut disk = noise(77, BYTES);
    files.put("/datastore/disk", &disk);
    let mut lab = place.create().unwrap();
    let mut points = BTreeMap::from([(At::entry(1, 0), disk.clone())]);
    for (number, start) in [(1, 3), (2, 60), (3, 20), (4, 22), (5, 90)] {
        if number == 3 {
            lab.epoch(0).unwrap();
            points.insert(At::entry(2, 2), disk.clone());
            drop(lab);
            lab = place.open().unwrap();
        }
        lab.write(0, start, 12, number).unwrap();
        put(&mut disk, start, 12, number);
        lab.commit().unwrap();
        lab.apply(0).unwrap();
        lab.commit().unwrap();
        if says == Says::Pinned && number == 4 {
            let kept = kept_inside(2, 4);
            lab.journal.edit(&[Edit::PointKept(kept)], NOW).unwrap();
        }
    }
    if says != Says::Pinned {
        lab.epoch(0).unwrap();
        points.insert(At::entry(2, 5), disk.clone());
    }
    if says == Says::Begun {
        lab.journal.edit(&[Edit::EpochsExpired(EpochsExpired { disk: id(0), through: 2 })], NOW).unwrap();
        points.clear();
        points.insert(At::entry(3, 5), disk.clone());
    }
    let newest = lab.journal.log().current_segment().unwrap();
    let slot = lab.journal.shape().segments[&newest].slot;
    drop(lab);
    let path = place.folder.join(format!("redo-{slot:06}"));
    assert!(files.opener().facts(&path).unwrap().is_some());
    files.opener().remove(&path).unwrap();
    (place, disk, points)
}

fn kept_inside(epoch: u64, number: u64) -> PointKept {
    PointKept {
        disk: id(0),
        point: [9; 16],
        number,
        sequence: POSITION.sequence,
        epoch,
        source_time: NOW,
        class: MarkClass::Crash,
        pinned: true,
        degraded: false,
        name: Text::new("pinned"),
        cause: MarkCause::Command,
    }
}

/// Found by reading: the numbers of entries that only the manifest still knew of were given again, and what got them was
/// never applied.
#[test]
fn a_number_is_not_given_again_though_the_segment_with_its_entry_is_gone() {
    for says in [Says::Ended, Says::Begun] {
        for restarts in [false, true] {
            let what = format!("{says:?}, with a restart: {restarts}");
            let (place, mut disk, mut points) = without_newest_segment(says);
            let mut lab = place.open().unwrap();
            assert!(!lab.found.damage.is_empty(), "{what}: it is not seen");
            let numbers = Offline::open(Arc::clone(&place.files), &place.folder);
            assert_eq!(numbers.unwrap().numbers(id(0)), (5, 5), "{what}");
            for (number, start) in [(6, 24), (7, 58)] {
                assert_eq!(lab.write(0, start, 9, number).unwrap(), number, "{what}");
                put(&mut disk, start, 9, number);
                lab.commit().unwrap();
            }
            if restarts {
                drop(lab);
                lab = place.open().unwrap();
                assert_eq!(lab.found.disks[&id(0)].lost().count(), 0, "{what}: they are on the target");
            }
            lab.apply(0).unwrap();
            lab.commit().unwrap();
            points.insert(At::entry(3, 7), disk.clone());
            for round in 0..2 {
                let mut target = vec![0; BYTES];
                lab.disks[0].target().read(&mut [ReadAt { offset: 0, data: &mut target }]).unwrap();
                assert!(target == disk, "{what}, round {round}: the target");
                for (at, content) in &points {
                    assert!(lab.view(0, *at).unwrap() == *content, "{what}, round {round}: {at}");
                }
                lab.epoch(0).unwrap();
                drop(lab);
                lab = place.open().unwrap();
            }
        }
    }
}

#[test]
fn the_number_of_a_pinned_point_is_not_another_entrys_though_its_segment_is_gone() {
    let (place, ..) = without_newest_segment(Says::Pinned);
    let mut lab = place.open().unwrap();
    assert_eq!(lab.found.disks[&id(0)].lost().collect::<Vec<_>>(), [(3, 4)]);
    assert_eq!(lab.write(0, 24, 9, 5).unwrap(), 5);
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    assert!(lab.view(0, At::entry(2, 4)).is_err(), "what it was is lost");
}
