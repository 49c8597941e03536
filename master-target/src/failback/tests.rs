//! Tests of a failback that was begun: what it is finished by, and when it must not be.

use std::sync::Arc;

use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::units::Generation;

use super::*;
use crate::catalogue::{Catalogue, FailbackDisk, FailbackStep};
use crate::registry::fs_opener;
use crate::registry::taken_again::tests::{DISK, lab_on, settings};
use crate::retention::Retention;

const AGENT: PeerId = PeerId([2; 16]);

fn begun(at: &str, step: FailbackStep) -> Failback {
    let disk = FailbackDisk {
        at: at.to_owned(),
        step,
        generation: 2,
        written_bytes: 0,
        read_bytes: 0,
        compared_bytes: 0,
        different: Vec::new(),
        stamp: String::new(),
    };
    Failback {
        asked: None,
        point: "newest".to_owned(),
        class: String::new(),
        source_time_ms: 0,
        source_away: true,
        undoing: false,
        accept_damage: false,
        disks: BTreeMap::from([(DISK.to_string(), disk)]),
    }
}

fn request(machine: &str, insist: bool) -> FailbackRequest {
    FailbackRequest {
        machine: machine.to_owned(),
        point: None,
        accept_damage: false,
        verify: VerifyPolicy::None,
        source_already_off: true,
        insist,
        dry_run: false,
        undo: false,
    }
}

#[test]
fn what_is_being_taken_again_is_not_finished_as_a_failback() {
    let known = Failback { undoing: true, ..begun("1.0", FailbackStep::Decided) };
    let machine = Machine { agent: "a".to_owned(), host_name: "web1".to_owned(), disks: Vec::new() };
    let request = request("web1", false);
    let refused = go_on(known.clone(), &machine, &request).unwrap_err().to_string();
    assert!(refused.contains("repeat `failback --undo web1`"), "{refused}");
    let begun = Failback { undoing: false, ..known };
    assert_eq!(go_on(begun.clone(), &machine, &request).unwrap(), begun);
}

#[test]
fn a_disk_that_lost_changes_since_the_failback_was_decided_is_not_released() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, retention, committer) = lab_on(fs_opener(), dir.path(), true);
    registry.take_inventory(AGENT, "web1", &[]).unwrap();
    registry.record_failback(AGENT, &begun("1.0", FailbackStep::Decided)).unwrap();
    {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        journal.append(DISK, EntryKind::Batch, &[b"what waits"], wall_clock()).unwrap();
        journal.give_up(DISK, "a full drive", wall_clock()).unwrap();
    }
    assert!(registry.take_again(DISK).unwrap(), "one that is being failed back is opened again, too");
    assert!(registry.fence_text(DISK).is_some(), "and stays refused to its agent");
    let refused = failback(&registry, &request("web1", false)).unwrap_err().to_string();
    assert!(refused.contains("lost changes") && refused.contains("--undo"), "{refused}");
    let step = |registry: &Registry| registry.failback_step(DISK).unwrap().0;
    assert!(step(&registry) < FailbackStep::Drained, "{:?}", step(&registry));
    // Its operator knows better: the source is gone.
    assert_eq!(failback(&registry, &request("web1", true)).unwrap().state, "released");
    // Taken back it is compared.
    let undone = failback(&registry, &FailbackRequest { undo: true, ..request("web1", false) }).unwrap();
    assert_eq!(undone.state, "taken-back");
    assert_eq!(registry.disk_status(DISK).unwrap().snapshot().mode, PassMode::Compare);
    registry.stop();
    retention.close(vec![committer]);
}

#[test]
fn a_disk_that_could_not_be_opened_is_not_called_released_and_can_be_taken_back_as_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, retention, committer) = lab_on(fs_opener(), dir.path(), true);
    registry.take_inventory(AGENT, "web1", &[]).unwrap();
    registry.record_failback(AGENT, &begun("1.0", FailbackStep::Verified)).unwrap();
    registry.stop();
    retention.close(vec![committer]);
    drop((registry, retention));
    let (there, away) = (dir.path().join("disk.vmdk"), dir.path().join("away.vmdk"));
    std::fs::rename(&there, &away).unwrap();
    let (retention, found) = Retention::open(fs_opener(), &dir.path().join("journal"), settings()).unwrap();
    let committer = retention.start().unwrap();
    let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
    let journal = Some((Arc::clone(&retention), found));
    let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
    for _ in 0..2 {
        let refused = format!("{:#}", failback(&registry, &request("web1", false)).unwrap_err());
        assert!(refused.contains("restart the master target"), "{refused}");
        assert_eq!(registry.failback_step(DISK).unwrap().0, FailbackStep::Verified);
    }
    std::fs::rename(&away, &there).unwrap();
    let undone = failback(&registry, &FailbackRequest { undo: true, ..request("web1", false) }).unwrap();
    assert_eq!(undone.state, "taken-back");
    let shape = retention.shape();
    let known = &shape.disks[&DISK];
    let found = known.points.values().find(|point| point.name.as_str() == "as-found").unwrap();
    assert!(found.degraded, "nobody can say that it was not written meanwhile");
    registry.stop();
    retention.close(vec![committer]);
    drop((registry, retention));
    let (again, _) = Retention::open(fs_opener(), &dir.path().join("journal"), settings()).unwrap();
    assert!(again.shape().disks[&DISK].points.values().any(|point| point.degraded), "a start reads it");
}

#[test]
fn a_disk_that_stopped_is_taken_back_with_what_the_log_knows_of_it_not_with_what_it_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, retention, committer) = lab_on(fs_opener(), dir.path(), true);
    registry.take_inventory(AGENT, "web1", &[]).unwrap();
    let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
    // It stands where it was protected; the log knows of sessions since then.
    let state = DiskState { generation: Generation(37), ..catalogue.disk_state(DISK).unwrap() };
    retention.lock().get().unwrap().append_state(&state, wall_clock()).unwrap();
    registry.record_failback(AGENT, &begun("1.0", FailbackStep::Fenced)).unwrap();
    let (inputs, _) = registry.disk_inputs(DISK).unwrap();
    let _ = inputs.ask(|_| panic!("a defect that stops the disk"));
    let stopped = || registry.disk_status(DISK).unwrap().snapshot().phase == TargetDiskPhase::Failed;
    let waited = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        stopped()
    });
    assert!(waited, "it goes on");
    let undone = failback(&registry, &FailbackRequest { undo: true, ..request("web1", false) }).unwrap();
    assert_eq!(undone.state, "taken-back");
    let snapshot = registry.disk_status(DISK).unwrap().snapshot();
    assert!(snapshot.generation > Generation(37), "late writers carry {:?}", snapshot.generation);
    assert_eq!(snapshot.mode, PassMode::Compare);
    registry.stop();
    retention.close(vec![committer]);
}
