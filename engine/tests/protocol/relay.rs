//! What a process server holds, passes on and refuses.

use bytes::Bytes;
use reprotect_engine::format::batch::{
    BulkHeader, CHAIN_START, Mark, MarkCause, MarkClass, credit_cost, decode_batch, encode_batch, encode_bulk,
};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::frame::{Frame, FrameKind};
use reprotect_engine::format::handshake::Hello;
use reprotect_engine::format::message::{Credit, GrowDisk, Message, OpenDiskHead, PassMode};
use reprotect_engine::format::wire::Text;
use reprotect_engine::proto::process_server::{RelayAction, RelaySession, Side};
use reprotect_engine::units::{DiskId, Generation, PeerId, Sequence, Timestamp};

use super::target::Target;
use super::*;

/// A relayed session with the disk granted at generation 1 and `window` bytes.
fn relay(window: u64) -> RelaySession {
    let mut relay = RelaySession::new(AGENT, window, T0);
    let hello = Message::Hello(Hello::new(AGENT, TARGET, [0; 16])).encode();
    relay.handle_frame(Side::Agent, FrameKind::Hello, hello.body()).unwrap();
    relay.handle_dialled();
    let ack = hello_ack();
    from_target(&mut relay, &Message::HelloAck(ack));
    let open = OpenDiskHead {
        disk: DISK,
        size_sectors: SECTORS,
        generation: Generation(0),
        lineage: LINEAGE,
        durable: Sequence::ZERO,
        grant_bytes: 0,
    };
    let open = Message::OpenDisk(open, Bytes::new()).encode();
    relay.handle_frame(Side::Agent, FrameKind::OpenDisk, open.body()).unwrap();
    relay_grant(&mut relay, 1);
    drain(&mut relay);
    relay
}

fn from_target(relay: &mut RelaySession, message: &Message) {
    let frame = message.encode();
    relay.handle_frame(Side::Target, frame.kind(), frame.body()).unwrap();
}

fn relay_grant(relay: &mut RelaySession, generation: u64) {
    let head = grant_head(generation, 1, PassMode::Compare);
    from_target(relay, &Message::Grant(head, Vec::new(), Bytes::new()));
    let credit = Credit { disk: DISK, generation: Generation(generation), limit: 1 << 30 };
    from_target(relay, &Message::Credit(credit));
}

fn drain(relay: &mut RelaySession) -> Vec<RelayAction> {
    std::iter::from_fn(|| relay.poll_action()).collect()
}

/// Credit limits passed on to the agent.
fn limits(actions: &[RelayAction]) -> Vec<u64> {
    let message = |action: &RelayAction| match action {
        RelayAction::Forward { to: Side::Agent, outgoing, .. } => {
            match Message::decode(outgoing.frame.kind(), &outgoing.frame.body()) {
                Ok(Message::Credit(credit)) => Some(credit.limit),
                _ => None,
            }
        }
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

pub(super) fn batch_frame(generation: u64, first: u64, byte: u8) -> Frame {
    let target = Target::new(PassMode::Done);
    let records = vec![data(0, 16, byte)];
    encode_batch(&target.header(Generation(generation), first, &records), &records)
}

#[test]
fn a_relay_keeps_lane_order_whatever_order_compression_ends_in() {
    let mut relay = relay(1 << 20);
    for first in 1..=4 {
        relay.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, first, 1).body()).unwrap();
    }
    let jobs: Vec<(u64, Vec<Record>)> = drain(&mut relay)
        .into_iter()
        .filter_map(
            |a| if let RelayAction::Recode { job, records } = a { Some((job, records)) } else { None },
        )
        .collect();
    let mut firsts = Vec::new();
    for index in [2, 0, 3, 1] {
        relay.handle_recoded(jobs[index].0, &jobs[index].1);
        for action in drain(&mut relay) {
            if let RelayAction::Forward { to: Side::Target, outgoing, .. } = action {
                firsts.push(decode_batch(outgoing.frame.body()).unwrap().0.first_sequence.0);
            }
        }
    }
    assert_eq!(firsts, [1, 2, 3, 4]);
}

#[test]
fn a_relay_never_holds_more_than_its_window_also_over_a_new_grant() {
    let cost = credit_cost(&[data(0, 16, 1)]);
    let mut relay = relay(10 * cost);
    for first in 1..=6 {
        relay.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, first, 1).body()).unwrap();
    }
    drain(&mut relay);
    relay_grant(&mut relay, 2);
    assert_eq!(limits(&drain(&mut relay)), [4 * cost], "six are still held");
    relay.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, 7, 1).body()).unwrap();
    assert_eq!(relay.held_bytes(), 6 * cost, "of the old grant: neither held nor paid for");
    for _ in 0..6 {
        relay.handle_forwarded(DISK, cost);
    }
    assert_eq!(limits(&drain(&mut relay)).last(), Some(&(10 * cost)));
}

#[test]
fn a_relay_refuses_what_has_no_credit_no_grant_or_another_name() {
    let cost = credit_cost(&[data(0, 16, 1)]);
    let mut one = relay(cost);
    one.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, 1, 1).body()).unwrap();
    assert!(one.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, 2, 1).body()).is_err());

    let mark = Mark {
        disk: DiskId([77; 16]),
        lineage: LINEAGE,
        generation: Generation(1),
        sequence: Sequence(0),
        chain: CHAIN_START,
        source_time: Timestamp(1),
        point: [0; 16],
        number: 1,
        class: MarkClass::Crash,
        cause: MarkCause::Timer,
        name: Text::new(""),
        unread_blocks: 0,
    };
    let frame = Message::Mark(mark).encode();
    assert!(relay(cost).handle_frame(Side::Agent, FrameKind::Mark, frame.body()).is_err());

    let mut other = RelaySession::new(PeerId([8; 16]), cost, T0);
    let hello = Message::Hello(Hello::new(AGENT, TARGET, [0; 16])).encode();
    assert!(other.handle_frame(Side::Agent, FrameKind::Hello, hello.body()).is_err());
}

#[test]
fn a_flipped_bit_anywhere_in_a_batch_is_seen() {
    let records = vec![data(8, 16, 3)];
    let bulk = BulkHeader {
        disk: DISK,
        lineage: LINEAGE,
        generation: Generation(1),
        pass: 1,
        as_of: Sequence(0),
        cover: range(0, 128),
        record_count: 1,
    };
    let bodies = [
        (FrameKind::Batch, batch_frame(1, 1, 3).body()),
        (FrameKind::Bulk, encode_bulk(&bulk, &records).body()),
    ];
    for (kind, body) in bodies {
        for bit in 0..body.len() * 8 {
            let mut bytes = body.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(relay(1 << 20).handle_frame(Side::Agent, kind, bytes.into()).is_err(), "{kind:?} {bit}");
        }
    }
}

#[test]
fn a_retired_disk_gives_back_its_place_and_what_is_under_way_for_it_is_dropped() {
    let cost = credit_cost(&[data(0, 16, 1)]);
    let mut relay = relay(4 * cost);
    relay.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, 1, 1).body()).unwrap();
    drain(&mut relay);
    relay.retire(DISK);
    assert_eq!(relay.disks().count(), 0);
    for first in 2..20 {
        relay.handle_frame(Side::Agent, FrameKind::Batch, batch_frame(1, first, 1).body()).unwrap();
    }
    assert!(drain(&mut relay).is_empty(), "neither passed on nor paid for");
    assert_eq!(relay.held_bytes(), cost, "what was taken before leaves as it is");
    relay.handle_forwarded(DISK, cost);
    assert_eq!(relay.held_bytes(), 0);

    // Far more disks than one agent may have, one after another.
    for number in 0..200 {
        let disk = DiskId([number; 16]);
        let open = OpenDiskHead {
            disk,
            size_sectors: SECTORS,
            generation: Generation(0),
            lineage: LINEAGE,
            durable: Sequence::ZERO,
            grant_bytes: 0,
        };
        let open = Message::OpenDisk(open, Bytes::new()).encode();
        relay.handle_frame(Side::Agent, FrameKind::OpenDisk, open.body()).unwrap();
        relay.retire(disk);
    }
}

#[test]
fn that_a_disk_grows_is_passed_on_and_its_new_part_is_let_through_when_it_is_open() {
    let mut relay = relay(8 << 20);
    let grow = GrowDisk { disk: DISK, generation: Generation(1), size_sectors: 2 * SECTORS };
    let frame = Message::GrowDisk(grow).encode();
    relay.handle_frame(Side::Agent, FrameKind::GrowDisk, frame.body()).unwrap();
    let actions = drain(&mut relay);
    let [RelayAction::Forward { to: Side::Target, outgoing, .. }] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!((outgoing.frame.kind(), outgoing.frame.body()), (frame.kind(), frame.body()));
    let open = OpenDiskHead {
        disk: DISK,
        size_sectors: 2 * SECTORS,
        generation: Generation(1),
        lineage: LINEAGE,
        durable: Sequence::ZERO,
        grant_bytes: 0,
    };
    let open = Message::OpenDisk(open, Bytes::new()).encode();
    relay.handle_frame(Side::Agent, FrameKind::OpenDisk, open.body()).unwrap();
    relay_grant(&mut relay, 2);
    let records = vec![data(2 * SECTORS - 8, 2 * SECTORS, 7)];
    let header = Target::new(PassMode::Done).header(Generation(2), 1, &records);
    let batch = encode_batch(&header, &records);
    relay.handle_frame(Side::Agent, FrameKind::Batch, batch.body()).unwrap();
}
