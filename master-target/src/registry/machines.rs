//! Tests of several disks behind one journal: a start with an old log, a way back for which there is no room, and long work on
//! one machine beside others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use reprotect_engine::format::message::PassMode;
use reprotect_engine::io::{self, BlockFile as _, ReadAt};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::ladder::Ladder;
use reprotect_engine::store::journal::undo::images_bytes_max;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::target::{Expectation, TargetKind, TargetSpec, open_target};
use reprotect_engine::units::DiskId;

use super::taken_again::tests::{DISK, add, entry, lab_on, settings};
use super::{Registry, fs_opener};
use crate::catalogue::Catalogue;
use crate::housekeeping::tidy_log;
use crate::journaled::full::lab::drive;
use crate::points;
use crate::retention::{Retention, RetentionSettings};

const SECOND: DiskId = DiskId([5; 16]);

/// A disk that is not open yet takes nothing, and is not one that stands.
#[test]
fn a_start_leaves_the_log_in_its_place_until_every_disk_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, retention, committer) = lab_on(fs_opener(), dir.path(), true);
    let state = registry.catalogue.disk_state(DISK).unwrap();
    registry.stop();
    // A crash: what was acknowledged is in the log only.
    let (kind, body) = entry(&state);
    retention.lock().get().unwrap().append_state(&state, wall_clock()).unwrap();
    retention.lock().get().unwrap().append(DISK, kind, &[&body], wall_clock()).unwrap();
    retention.close(vec![committer]);
    drop((registry, retention));

    // What is in the log is past its time.
    let short =
        RetentionSettings { ladder: Ladder { any_write: Duration::ZERO, ..settings().ladder }, ..settings() };
    let (retention, found) = Retention::open(fs_opener(), &dir.path().join("journal"), short).unwrap();
    let committer = retention.start().unwrap();
    let oldest = |retention: &Retention| retention.shape().segments.keys().next().copied().unwrap();
    let (before, opened) = (oldest(&retention), Arc::new(AtomicU32::new(0)));
    let (of_house, count) = (Arc::clone(&retention), Arc::clone(&opened));
    let opener = FsFiles::new(move |path, writable| {
        // Opening takes long, and housekeeping looks meanwhile.
        (0..10).for_each(|_| tidy_log(&of_house).unwrap());
        count.fetch_add(1, Ordering::SeqCst);
        let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
        io::open(path, &options)
    });
    let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
    let journal = Some((Arc::clone(&retention), found));
    let registry = Registry::open_with(catalogue, FlowLimits::default(), Arc::new(opener), journal).unwrap();
    assert!(opened.load(Ordering::SeqCst) > 0);
    assert_eq!(oldest(&retention), before, "what a start found is where it was");
    let view = registry.disks().remove(0);
    assert_eq!((view.problem, view.loss), (None, None));
    assert_eq!(view.status.unwrap().snapshot().mode, PassMode::Done);
    for _ in 0..10 {
        tidy_log(&retention).unwrap();
    }
    assert!(oldest(&retention) > before, "once all are open it is given back");
    registry.stop();
    let spec = TargetSpec { path: dir.path().join("disk.vmdk"), kind: TargetKind::MonolithicFlat };
    let mut target = open_target(&fs_opener(), &spec, &Expectation::default()).unwrap();
    let mut bytes = vec![0; 4096];
    target.read(&mut [ReadAt { offset: 16 * 512, data: &mut bytes }]).unwrap();
    assert!(bytes == [7; 4096], "what waited is on the target");
    retention.close(vec![committer]);
}

#[test]
fn disks_that_would_not_all_get_back_to_their_points_for_want_of_room_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (faulty, files) = drive();
    let (registry, retention, committer) = lab_on(Arc::clone(&files), dir.path(), true);
    add(&registry, dir.path(), SECOND, true);
    let states = [DISK, SECOND].map(|disk| registry.catalogue.disk_state(disk).unwrap());
    registry.stop();
    for state in &states {
        let (kind, body) = entry(state);
        retention.lock().get().unwrap().append(state.disk, kind, &[&body], wall_clock()).unwrap();
    }
    retention.close(vec![committer]);
    drop((registry, retention));

    let (retention, found) = Retention::open(files, &dir.path().join("journal"), settings()).unwrap();
    let committer = retention.start().unwrap();
    let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
    let journal = Some((Arc::clone(&retention), found));
    let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
    let places = [DISK, SECOND].map(|disk| (disk, points::of_disk(&registry, disk).unwrap()[0].at));
    let shape = retention.shape();
    let one = images_bytes_max(1);
    faulty.says_free(2 * one - 1);
    for place in &places {
        points::all_can_go_back(&registry, &[*place]).unwrap();
    }
    let refused = points::all_can_go_back(&registry, &places).unwrap_err().to_string();
    let parts = [&format!("{} bytes", 2 * one), "2 disks", "free some space", "nothing was changed"];
    assert!(parts.iter().all(|part| refused.contains(*part)), "{refused}");
    assert_eq!(retention.shape(), shape, "no epoch was ended or begun");
    faulty.says_free(2 * one);
    points::all_can_go_back(&registry, &places).unwrap();
    // Nor where one has no such point.
    let gone = [places[0], (SECOND, At::entry(7, 7))];
    let refused = format!("{:#}", points::all_can_go_back(&registry, &gone).unwrap_err());
    assert!(refused.contains(&SECOND.to_string()) && refused.contains("nothing was changed"), "{refused}");
    registry.stop();
    retention.close(vec![committer]);
}

#[test]
fn long_work_on_a_machine_keeps_others_from_nothing_and_who_waits_for_it_gives_up_when_the_registry_stops() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, retention, committer) = lab_on(fs_opener(), dir.path(), false);
    let record = registry.protected(&DISK.to_string()).unwrap();
    let busy = registry.begin_long(std::slice::from_ref(&record)).unwrap();
    drop(registry.changing());
    drop(registry.changing_of("another machine").unwrap());
    assert!(!registry.take_again(DISK).unwrap() && registry.disks()[0].problem.is_none(), "left alone");
    let waits = |registry: &Arc<Registry>, agent: &str| {
        let (registry, agent) = (Arc::clone(registry), agent.to_owned());
        std::thread::spawn(move || registry.changing_of(&agent).map(drop).map_err(|error| error.to_string()))
    };
    let waiting = waits(&registry, &record.agent);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    drop(busy);
    assert_eq!(waiting.join().unwrap(), Ok(()), "its turn");
    let busy = registry.begin_long(std::slice::from_ref(&record)).unwrap();
    let waiting = waits(&registry, &record.agent);
    let stopping = {
        let registry = Arc::clone(&registry);
        std::thread::spawn(move || registry.stop())
    };
    let refused = waiting.join().unwrap().unwrap_err();
    assert!(refused.contains("stops") && refused.contains("repeat the command"), "{refused}");
    assert!(!stopping.is_finished(), "it waits for what goes on");
    drop(busy);
    stopping.join().unwrap();
    retention.close(vec![committer]);
}
