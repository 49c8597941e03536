//! A compare that meets a full retention drive: what waits is to be applied before the target is read, and has no room.

use reprotect_engine::proto::compare::unit_hashes;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::units::SectorRange;

use super::*;
use crate::journaled::full::lab::{DISK, ENOSPC, Lab, SECTORS};
use crate::receipts::Receipts;

#[test]
fn a_compare_waits_for_space_and_does_not_stop_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = Lab::new(dir.path());
    lab.step(1, "before").unwrap();
    lab.write(2, "it waits in the log").unwrap();
    let (faulty, content) = (Arc::clone(&lab.faulty), lab.content().to_vec());
    let (retention, committer, store) = lab.take();
    let state = store.state().clone();
    let generation = state.generation;
    let status = Arc::new(DiskStatus::new(&state));
    let core = TargetDisk::new(state, FlowLimits::default());
    let store = DiskStore::Journaled(Box::new(store));
    let receipts = Receipts::open(dir.path()).keeper(DISK);
    let mut writer = Writer::new(core, store, status, Arc::default(), None, receipts);
    faulty.set(("undo-", ENOSPC), 0);
    // What comes while it waits: the first is of no use, with the second there is space again.
    let (sender, inputs) = sync_mpsc::sync_channel(2);
    let (nothing, mends) = (Arc::clone(&faulty), Arc::clone(&faulty));
    sender.send(Opened::Ask(Box::new(move |_| assert!(nothing.failed() > 0)))).unwrap();
    sender.send(Opened::Ask(Box::new(move |_| mends.mend()))).unwrap();
    let range = SectorRange::new(0, SECTORS);
    let request = CompareRequestHead { disk: DISK, generation, request: 1, range, unit_count: 0 };
    let answer = writer.hash(&request, &[], &inputs).expect("the compare stopped the disk");
    assert!(faulty.failed() > 1, "the drive was never full");
    assert_eq!(answer.hashes, unit_hashes(&content), "what waited is not in it");
    assert!(writer.disk.phase() != TargetDiskPhase::Failed && !writer.waiting);
    assert_eq!(writer.status.snapshot().problem, None);
    let DiskStore::Journaled(store) = writer.store else { panic!("another store") };
    store.into_target().close().unwrap();
    retention.close(vec![committer]);
}
