//! Bugs of the protocol cores that fuzzing found, each as the shortest sequence of calls that showed it.

use reprotect_engine::format::batch::{BulkHeader, credit_cost};
use reprotect_engine::format::message::{Message, OpenDiskHead, PassMode};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::target_disk::{DiskAction, SessionId, TargetDisk};
use reprotect_engine::units::{DiskId, Generation, LineageId, MonoTime, PeerId, SectorRange, Sequence};

const SESSION: SessionId = SessionId(1);
const NOW: MonoTime = MonoTime(1);

fn open(generation: u64) -> OpenDiskHead {
    OpenDiskHead {
        disk: DiskId([1; 16]),
        size_sectors: 8,
        generation: Generation(generation),
        lineage: LineageId::NONE,
        durable: Sequence::ZERO,
        grant_bytes: 0,
    }
}

/// Executes everything ordered so far: generations made durable, and generations granted.
fn execute(disk: &mut TargetDisk) -> (Vec<u64>, Vec<u64>) {
    let (mut durable, mut granted) = (Vec::new(), Vec::new());
    while let Some(action) = disk.poll_action() {
        match action {
            DiskAction::Checkpoint { state } => {
                durable.push(state.generation.0);
                disk.handle_checkpointed(NOW);
            }
            DiskAction::Reply { message: Message::Grant(head, ..), .. } => {
                assert!(
                    durable.contains(&head.generation.0),
                    "{} granted, {durable:?} durable",
                    head.generation
                );
                granted.push(head.generation.0);
            }
            _ => {}
        }
    }
    (durable, granted)
}

#[test]
fn a_second_open_while_opening_is_granted_only_when_its_own_generation_is_durable() {
    let (id, agent, lineage) = (DiskId([1; 16]), PeerId([2; 16]), LineageId([3; 16]));
    let state = TargetDisk::new_state(id, agent, [0; 16], 8, lineage, PassMode::Copy);
    let mut disk = TargetDisk::new(state, FlowLimits::default());
    disk.handle_open(NOW, SESSION, &open(0)); // orders the checkpoint of generation 1
    disk.handle_open(NOW, SESSION, &open(1)); // again, before that is durable
    assert_eq!(execute(&mut disk), (vec![1, 2], vec![2]));
}

#[test]
fn batches_that_need_no_write_give_their_credit_back() {
    let (id, agent, lineage) = (DiskId([1; 16]), PeerId([2; 16]), LineageId([3; 16]));
    let state = TargetDisk::new_state(id, agent, [0; 16], 8, lineage, PassMode::Copy);
    let cost = credit_cost(&[]);
    let limits = FlowLimits {
        unwritten_bytes: 8 * cost,
        undurable_bytes: 16 * cost,
        flush_bytes: 4 * cost,
        ..FlowLimits::default()
    };
    let mut disk = TargetDisk::new(state, limits);
    disk.handle_open(NOW, SESSION, &open(0));
    let (mut limit, mut spent) = (0, 0);
    for step in 0..200 {
        let now = MonoTime(1 + step * limits.flush_nanos);
        disk.handle_timeout(now);
        while let Some(action) = disk.poll_action() {
            match action {
                DiskAction::Checkpoint { .. } => disk.handle_checkpointed(now),
                DiskAction::Write { cost, .. } => disk.handle_written(cost),
                DiskAction::Reply { message: Message::Credit(credit), .. } => limit = credit.limit,
                _ => {}
            }
        }
        if spent + cost <= limit {
            spent += cost;
            let header = BulkHeader {
                disk: id,
                lineage,
                generation: Generation(1),
                pass: 0, // of a pass that is over: the batch is dropped
                as_of: Sequence::ZERO,
                cover: SectorRange::new(0, 8),
                record_count: 0,
            };
            disk.handle_bulk(now, SESSION, &header, Vec::new());
        }
    }
    assert!(spent > 4 * limits.undurable_bytes, "stalled after {spent} of credit");
}
