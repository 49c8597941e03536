//! A retention drive that is full, or fails, at any one of the writes of an undo epoch's end and beginning, under the disk
//! as the daemon drives it: not opened anew, but tried again. Whatever comes of it, every point that was kept shows what it
//! showed before: while the drive is full, when there is space again, and after a restart.
//!
//! And the files of undo runs: those of a point that is read, or that a rollback goes to, are there; others are not open.

pub(crate) mod lab;

use std::path::Path;

use reprotect_engine::store::journal::applier::RUN_IDLE_MAX;
use reprotect_engine::units::MonoTime;

use self::lab::{DISK, EIO, ENOSPC, Lab, SECTORS};
use super::*;
use crate::disk_store::NotGrown;
use crate::housekeeping::thin_all;
use crate::registry::fs_opener;

/// What became of the disks.
#[derive(Debug, Default)]
struct Sum {
    went_on: usize,
    stopped: usize,
}

/// Has the drive fail at every operation on the files of a name, while `work` is done.
fn everywhere(
    on: (&'static str, i32),
    work: fn(&mut Lab, &str) -> Result<(), String>,
    points_behind: usize,
) -> Sum {
    let mut sum = Sum::default();
    for left in 0.. {
        let what = format!("error {} of {}* at operation {left}", on.1, on.0);
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::new(dir.path());
        for seed in 1..=3 {
            lab.step(seed, &what).unwrap();
        }
        assert_eq!(lab.check(&what), 4);
        lab.faulty.set(on, left);
        let done = work(&mut lab, &what);
        lab.faulty.mend();
        if lab.faulty.failed() == 0 {
            done.unwrap();
            assert!(left > 0, "{what}: it never comes to that");
            return sum;
        }
        match done.and_then(|()| (5..=6).try_for_each(|seed| lab.step(seed, &what))) {
            Ok(()) => {
                sum.went_on += 1;
                assert_eq!(lab.check(&what), points_behind, "{what}: a point is missing");
            }
            Err(text) => {
                // Nothing is written any more: what is kept is shown as it was, or is not shown.
                sum.stopped += 1;
                assert!(lab.step(7, &what).is_err(), "{what}: it goes on after {text}");
                lab.check_shown(&format!("{what}, stopped"), true);
            }
        }
        lab.stop();
        lab.start();
        assert!(lab.check(&format!("{what}, after a restart")) >= 4);
        let applied = lab.disk().applier.applied().number;
        assert!(lab.target() == lab.at[&applied], "{what}: the target at entry {applied}");
        lab.stop();
    }
    sum
}

/// A disk is handed over, and opened anew afterwards.
fn hand_over(lab: &mut Lab, what: &str) -> Result<(), String> {
    lab.write_and_mark(4, MarkCause::Timer, what)?;
    for time in 0..2 {
        lab.persist(what, |disk| match disk.leave(false) {
            Ok(_) => Ok(()),
            Err(error) => Err(NotDone::Full(error.to_string())),
        })?;
        let shape = lab.retention().shape().disks[&DISK].clone();
        assert!(shape.open_epoch().is_none(), "{what}: it was left {time} times and its undo epoch goes on");
    }
    lab.faulty.mend();
    lab.stop();
    lab.start();
    Ok(())
}

/// A disk grows, in the second half of its epoch.
fn growth(lab: &mut Lab, what: &str) -> Result<(), String> {
    lab.write_and_mark(4, MarkCause::Timer, what)?;
    let sectors = SECTORS + 2048;
    lab.persist(what, |disk| match disk.grow(&fs_opener(), sectors * SECTOR_BYTES) {
        Ok(()) => Ok(()),
        Err(NotGrown::Refused(text)) => Err(NotDone::Full(text)),
        Err(NotGrown::Failed(text)) => Err(NotDone::Failed(text)),
    })?;
    lab.grown(sectors);
    Ok(())
}

fn one_step(lab: &mut Lab, what: &str) -> Result<(), String> {
    lab.step(4, what)
}

#[test]
fn a_full_drive_at_any_write_of_an_undo_run_is_waited_out() {
    let sum = everywhere(("undo-", ENOSPC), one_step, 7);
    assert!(sum.stopped == 0 && sum.went_on > 4, "{sum:?}");
}

#[test]
fn a_drive_that_fails_at_any_write_of_an_undo_run_stops_the_disk_and_spoils_no_point() {
    let sum = everywhere(("undo-", EIO), one_step, 7);
    assert!(sum.stopped > 4, "{sum:?}");
}

#[test]
fn a_manifest_that_cannot_be_written_at_the_turn_of_an_undo_epoch_spoils_no_point() {
    for errno in [ENOSPC, EIO] {
        let sum = everywhere(("manifest-", errno), one_step, 7);
        assert!(sum.stopped + sum.went_on > 1, "{sum:?}");
    }
}

/// The records of the journal, its log, and every file at once. The log is written where it was written before: a medium
/// that is full there stops the disk.
/// The first undo epoch begins with an edit, and its point is another: a full drive, or a stop, may come between them.
#[test]
fn a_manifest_that_cannot_be_written_where_the_first_undo_epoch_begins_costs_no_point() {
    for errno in [ENOSPC, EIO] {
        for left in 0.. {
            let what = format!("error {errno} of the manifest at operation {left}");
            let dir = tempfile::tempdir().unwrap();
            let mut lab = Lab::created(dir.path());
            lab.write(1, &what).unwrap(); // for which the log gets its first segment
            lab.faulty.set(("manifest-", errno), left);
            let done = lab.step(2, &what);
            lab.faulty.mend();
            if lab.faulty.failed() == 0 {
                done.unwrap();
                assert!(left > 1, "{what}: it never comes to that");
                break;
            }
            if done.is_err() {
                lab.stop();
                lab.start();
                lab.persist(&what, |disk| disk.apply().map(drop)).unwrap();
            }
            assert_eq!(lab.check(&what), 1, "{what}: the first mark is no point");
            lab.step(3, &what).unwrap();
            assert_eq!(lab.check(&what), 2, "{what}");
            lab.stop();
        }
    }
}

#[test]
fn a_full_drive_at_any_write_of_any_file_spoils_no_point() {
    for prefix in ["superblock", "redo-", ""] {
        let sum = everywhere((prefix, ENOSPC), one_step, 7);
        assert!(sum.stopped + sum.went_on > 1, "{prefix}: {sum:?}");
    }
}

#[test]
fn a_disk_is_handed_over_only_when_its_undo_epoch_ended_however_full_the_drive_is() {
    let sum = everywhere(("undo-", ENOSPC), hand_over, 7);
    assert!(sum.stopped == 0 && sum.went_on > 2, "{sum:?}");
}

#[test]
fn a_disk_that_cannot_grow_for_want_of_space_goes_on_and_grows_later() {
    let sum = everywhere(("undo-", ENOSPC), growth, 7);
    assert!(sum.stopped == 0 && sum.went_on > 2, "{sum:?}");
}

#[test]
fn a_rollback_that_stopped_anywhere_is_finished_after_a_restart_though_its_point_is_past_its_time() {
    let mut stopped = 0;
    for left in 0.. {
        let what = format!("a rollback that failed at operation {left}");
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::new(dir.path());
        (1..=6).for_each(|seed| lab.step(seed, &what).unwrap());
        let shape = lab.retention().shape().disks[&DISK].clone();
        let point = shape.points[&[2; 16]];
        lab.faulty.set(("undo-", EIO), left);
        let went = lab.disk().rollback(At::entry(point.epoch, point.number));
        lab.faulty.mend();
        if lab.faulty.failed() == 0 {
            went.unwrap();
            break;
        }
        let is_begun = lab.retention().losses().get(&DISK).is_some_and(|text| text.contains("rollback"));
        if is_begun {
            stopped += 1;
            // All points but the newest are past their time.
            let later = Timestamp(wall_clock().0 + 100 * 3_600_000_000_000);
            thin_all(&lab.retention(), later).unwrap();
            lab.stop();
            lab.start();
            lab.disk().go_on_back().unwrap();
            assert_eq!(lab.retention().losses().get(&DISK), None, "{what}: it is not finished");
            assert!(lab.target() == lab.at[&point.number], "{what}: the target holds something else");
        }
        lab.stop();
    }
    assert!(stopped > 2, "{stopped}");
}

#[test]
fn a_disk_that_stopped_on_its_way_back_does_not_stand_there_after_it_was_left_and_is_held_no_more_once_taken_again()
 {
    for left in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::new(dir.path());
        (1..=6).for_each(|seed| lab.step(seed, "a way back").unwrap());
        let point = lab.retention().shape().disks[&DISK].points[&[2; 16]];
        let at = At::entry(point.epoch, point.number);
        lab.faulty.set(("undo-", EIO), left);
        let went = lab.disk().rollback(at);
        lab.faulty.mend();
        let is_begun = lab.retention().losses().get(&DISK).is_some_and(|text| text.contains("rollback"));
        if !is_begun {
            assert!(went.is_err(), "it never stops on its way: the test tries nothing");
            lab.stop();
            continue;
        }
        // As another rollback would end it, and the program ends right then.
        let retention = lab.retention();
        lab.disk().applier.close_epoch(retention.lock().get().unwrap(), wall_clock()).unwrap();
        lab.stop();
        lab.start();
        assert!(!lab.disk().stands_at(at).unwrap(), "nobody knows that it got there");
        lab.disk().leave(false).unwrap();
        assert!(!lab.disk().stands_at(at).unwrap(), "parts of two states");
        lab.stop();
        lab.start();
        assert!(!lab.disk().stands_at(at).unwrap() && lab.disk().held().is_some());
        lab.disk().take_back(lab::LINEAGE, false).unwrap();
        assert_eq!(lab.disk().held(), None, "its agent compares it");
        lab.stop();
        return;
    }
}

#[test]
fn a_way_back_that_another_ended_without_beginning_is_gone_on_with_and_not_taken_for_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = Lab::new(dir.path());
    (1..=6).for_each(|seed| lab.step(seed, "a way back").unwrap());
    let point = lab.retention().shape().disks[&DISK].points[&[2; 16]];
    let at = At::entry(point.epoch, point.number);
    lab.faulty.set(("undo-", ENOSPC), 1);
    assert!(lab.disk().rollback(at).unwrap_err().is_full());
    lab.faulty.mend();
    assert!(lab.target() != lab.at[&at.number], "it got there: the test tries nothing");
    // Another one ended its epoch, and found no room in the manifest to begin its own.
    let retention = lab.retention();
    lab.disk().applier.close_epoch(retention.lock().get().unwrap(), wall_clock()).unwrap();
    assert!(lab.disk().apply().is_ok());
    assert!(!lab.disk().stands_at(at).unwrap() && lab.disk().held().is_some());
    assert!(lab.disk().take_stopped_on_its_way(), "somebody goes on with it");
    lab.disk().go_on_back().unwrap();
    assert!(lab.disk().stands_at(at).unwrap() && lab.target() == lab.at[&at.number]);
    assert!(lab.disk().apply().is_ok() && !lab.disk().take_stopped_on_its_way());
    lab.stop();
}

#[test]
fn what_somebody_else_wrote_is_not_taken_for_ours_because_of_a_mark_or_a_drive_that_was_full() {
    for full_before in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::new(dir.path());
        (1..=2).for_each(|seed| lab.step(seed, "before").unwrap());
        if full_before {
            lab.write(3, "before").unwrap();
            lab.faulty.set(("undo-", ENOSPC), 0);
            assert!(matches!(lab.disk().apply(), Err(NotDone::Full(_))), "nothing could be written");
        }
        let flat = std::fs::File::options().write(true).open(dir.path().join("web-flat.vmdk")).unwrap();
        flat.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
        lab.faulty.mend();
        if !full_before {
            lab.mark(3, MarkCause::Timer, "a mark without writes").unwrap();
        }
        let refused = lab.step(4, "after it").unwrap_err();
        assert!(refused.contains("written by somebody else"), "{refused}");
        assert!(lab.disk().leave(false).is_err(), "nor is it handed over");
        lab.stop();
    }
}

/// Files of a folder that this program has open: undo runs, and those that are deleted.
fn open_files(folder: &Path) -> (usize, usize) {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let links: Vec<String> = links
        .filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.display().to_string()))
        .filter(|link| link.starts_with(&folder.display().to_string()))
        .collect();
    let count = |what: &str| links.iter().filter(|link| link.contains(what)).count();
    (count("/undo-"), count("(deleted)"))
}

fn look_for_idle(lab: &mut Lab, now: MonoTime) {
    let retention = lab.retention();
    let mut locked = retention.lock();
    lab.disk().applier.close_runs(locked.get().unwrap(), now);
}

#[test]
fn sealed_runs_are_open_only_while_a_point_is_read_and_never_when_they_are_merged_or_expired() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = Lab::new(dir.path());
    let what = "many undo epochs";
    lab.step(1, what).unwrap();
    let (alone, _) = open_files(&lab.folder);
    for round in 0..3 {
        for seed in 1..=12 {
            lab.step(2 + round * 12 + seed, what).unwrap();
            assert_eq!(open_files(&lab.folder), (alone, 0), "in round {round}, after {seed} epochs more");
        }
        lab.check(what);
        assert!(open_files(&lab.folder).0 > alone, "nothing is open while points are read");
        // As often as a disk under load looks; no time to speak of passes.
        let (read, begun, idle) = (open_files(&lab.folder).0, mono_clock(), RUN_IDLE_MAX.as_nanos() as u64);
        for _ in 0..1000 {
            look_for_idle(&mut lab, begun);
        }
        look_for_idle(&mut lab, begun.plus_nanos(idle - 1));
        assert_eq!(open_files(&lab.folder).0, read, "what is read is closed, to be opened again");
        look_for_idle(&mut lab, begun.plus_nanos(idle));
        assert_eq!(open_files(&lab.folder), (alone, 0), "nobody reads any more");
        lab.check(what);
        // The runs are merged, or expire.
        let runs = lab.retention().shape().disks[&DISK].runs.len();
        let later = Timestamp(wall_clock().0 + 100 * 3_600_000_000_000);
        thin_all(&lab.retention(), later).unwrap();
        assert!(
            lab.retention().shape().disks[&DISK].runs.len() < runs,
            "nothing was merged, nothing expired"
        );
        assert!(open_files(&lab.folder).1 > 0, "none of them was open: the test tries nothing");
        assert!(lab.disk().apply().is_ok());
        assert_eq!(open_files(&lab.folder).1, 0, "a run that is gone takes space");
        look_for_idle(&mut lab, begun.plus_nanos(2 * idle));
        look_for_idle(&mut lab, begun.plus_nanos(3 * idle));
        assert_eq!(open_files(&lab.folder), (alone, 0), "nobody reads any more");
    }
    lab.stop();
}
