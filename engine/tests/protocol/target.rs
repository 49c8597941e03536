//! What a disk at the target accepts, writes, acknowledges and refuses.

use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, CHAIN_START, Chain, Mark, MarkCause, MarkClass, Stretch,
};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{
    Ack, BulkAckHead, CompareRequestHead, ErrorCode, Fenced, Message, NackReason, OpenDiskHead, PassBegin,
    PassCause, PassEnd, PassMode, PassState,
};
use reprotect_engine::format::wire::Text;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::target_disk::{DiskAction, SessionId, TargetDisk};
use reprotect_engine::units::{Generation, MonoTime, SectorRange, Sequence, Timestamp};

use super::*;

/// A target disk, and what it ordered and said since the last look.
pub(super) struct Target {
    td: TargetDisk,
    chain: Chain,
}

#[derive(Debug, Default)]
struct Out {
    replies: Vec<(SessionId, Message)>,
    writes: Vec<(Vec<SectorRange>, u64)>,
    checkpoints: Vec<DiskState>,
    hashes: usize,
}

impl Out {
    fn said(&self, what: impl Fn(&Message) -> bool) -> usize {
        self.replies.iter().filter(|(_, message)| what(message)).count()
    }

    fn acks(&self) -> Vec<Ack> {
        self.replies
            .iter()
            .filter_map(|(_, message)| if let Message::Ack(ack) = message { Some(*ack) } else { None })
            .collect()
    }
}

impl Target {
    pub(super) fn new(mode: PassMode) -> Self {
        Self::with_limits(mode, FlowLimits::default())
    }

    fn with_limits(mode: PassMode, limits: FlowLimits) -> Self {
        let mut state = TargetDisk::new_state(DISK, AGENT, [9; 16], SECTORS, LINEAGE, PassMode::Compare);
        state.mode = mode;
        Self { td: TargetDisk::new(state, limits), chain: CHAIN_START }
    }

    fn look(&mut self) -> Out {
        let mut out = Out::default();
        while let Some(action) = self.td.poll_action() {
            match action {
                DiskAction::Write { pieces, cost } => {
                    let kept = pieces.iter().flat_map(|piece| piece.keep.clone()).collect();
                    out.writes.push((kept, cost));
                }
                DiskAction::Hash { .. } => out.hashes += 1,
                DiskAction::Checkpoint { state } => out.checkpoints.push(*state),
                DiskAction::Reply { session, message } => out.replies.push((session, message)),
            }
        }
        out
    }

    /// Executes everything that is ordered until nothing is left.
    fn settle(&mut self) -> Out {
        let mut all = Out::default();
        loop {
            let mut out = self.look();
            let idle = out.writes.is_empty() && out.checkpoints.is_empty();
            for (_, cost) in &out.writes {
                self.td.handle_written(*cost);
            }
            for _ in &out.checkpoints {
                self.td.handle_checkpointed(T0);
            }
            all.replies.append(&mut out.replies);
            all.writes.append(&mut out.writes);
            all.checkpoints.append(&mut out.checkpoints);
            if idle {
                return all;
            }
        }
    }

    fn ask_open(&mut self, session: SessionId, generation: Generation) {
        let head = OpenDiskHead {
            disk: DISK,
            size_sectors: SECTORS,
            generation,
            lineage: LINEAGE,
            durable: Sequence::ZERO,
            grant_bytes: 0,
        };
        self.td.handle_open(T0, session, &head);
    }

    /// Opens for a session and answers its generation.
    fn open(&mut self, session: SessionId) -> Generation {
        self.ask_open(session, self.td.state().generation);
        let out = self.settle();
        assert_eq!(out.said(|message| matches!(message, Message::Grant(..))), 1, "{out:?}");
        self.td.state().generation
    }

    pub(super) fn header(&self, generation: Generation, first: u64, records: &[Record]) -> BatchHeader {
        BatchHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation,
            first_sequence: Sequence(first),
            chain: self.chain,
            source_time: Timestamp(1),
            record_count: records.len() as u32,
            stretch: Stretch::Ordered,
        }
    }

    /// Hands in the next batch.
    fn delta(&mut self, session: SessionId, generation: Generation, records: Vec<Record>) {
        let header = self.header(generation, self.td.state().sequence.0 + 1, &records);
        self.chain = header.chain_after(&records);
        self.td.handle_batch(T0, session, &header, records);
    }

    fn bulk(&mut self, session: SessionId, generation: Generation, cover: SectorRange, records: Vec<Record>) {
        let header = BulkHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation,
            pass: self.td.state().pass,
            as_of: Sequence::ZERO,
            cover,
            record_count: records.len() as u32,
        };
        self.td.handle_bulk(T0, session, &header, records);
    }

    fn mark(&mut self, session: SessionId, generation: Generation) {
        let mark = Mark {
            disk: DISK,
            lineage: LINEAGE,
            generation,
            sequence: self.td.state().sequence,
            chain: self.td.chain(),
            source_time: Timestamp(1),
            point: [0; 16],
            number: self.td.marks_accepted() + 1,
            class: MarkClass::Crash,
            cause: MarkCause::Timer,
            name: Text::new(""),
            unread_blocks: 0,
        };
        self.td.handle_mark(T0, session, &mark);
    }
}

#[test]
fn a_lower_generation_is_fenced_and_writes_nothing() {
    let mut target = Target::new(PassMode::Done);
    let old = target.open(S1);
    let new = target.open(S2);
    assert!(new > old);
    target.delta(S1, old, vec![data(0, 8, 1)]);
    let out = target.settle();
    assert!(out.writes.is_empty());
    assert_eq!(out.replies, [(S1, Message::Fenced(Fenced { disk: DISK, generation: new }))]);
}

#[test]
fn a_stale_generation_in_the_right_session_is_fenced_too() {
    let mut target = Target::new(PassMode::Done);
    let old = target.open(S1);
    target.open(S1);
    target.delta(S1, old, vec![data(0, 8, 1)]);
    assert!(target.settle().writes.is_empty());
}

#[test]
fn a_grant_leaves_only_when_its_own_generation_is_durable() {
    let mut target = Target::new(PassMode::Done);
    target.ask_open(S1, Generation(0));
    let out = target.look();
    assert_eq!(out.checkpoints[0].generation, Generation(1));
    assert!(out.replies.is_empty(), "not yet durable");
    target.ask_open(S1, Generation(1)); // once more before the first is done
    target.td.handle_checkpointed(T0);
    let out = target.look();
    assert_eq!(out.said(|message| matches!(message, Message::Grant(..))), 0, "only 1 is durable");
    assert_eq!(out.checkpoints[0].generation, Generation(2));
    target.td.handle_checkpointed(T0);
    let out = target.look();
    assert!(
        matches!(&out.replies[0].1, Message::Grant(head, ..) if head.generation == Generation(2)),
        "{out:?}"
    );
}

#[test]
fn an_opener_that_another_session_replaces_is_told() {
    let mut target = Target::new(PassMode::Done);
    target.ask_open(S1, Generation(0));
    target.ask_open(S2, Generation(1));
    let out = target.settle();
    let told = out.replies.iter().any(|(session, m)| *session == S1 && matches!(m, Message::Fenced(_)));
    let granted = out.replies.iter().filter(|(_, m)| matches!(m, Message::Grant(..)));
    assert!(told);
    assert_eq!(granted.map(|(session, _)| *session).collect::<Vec<_>>(), [S2]);
}

#[test]
fn a_session_lost_while_opening_leaves_the_disk_to_the_next() {
    let mut target = Target::new(PassMode::Done);
    target.ask_open(S1, Generation(0));
    let _ = target.look();
    target.td.handle_session_lost(T0, S1);
    target.td.handle_session_lost(T0, S1);
    target.td.handle_checkpointed(T0);
    assert_eq!(target.settle().said(|message| matches!(message, Message::Grant(..))), 0);
    assert_eq!(target.open(S2), Generation(2));
}

#[test]
fn a_late_notice_of_an_old_session_does_not_close_the_new_one() {
    let mut target = Target::new(PassMode::Done);
    target.open(S1);
    let generation = target.open(S2);
    target.td.handle_session_lost(T0, S1);
    target.delta(S2, generation, vec![data(0, 8, 1)]);
    assert_eq!(target.settle().writes.len(), 1);
}

#[test]
fn bulk_never_overwrites_a_later_delta() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(10, 20, 2)]);
    target.bulk(S1, generation, range(0, 128), vec![data(0, 128, 1)]);
    let out = target.settle();
    assert_eq!(out.writes[1].0, [range(0, 10), range(20, 128)]);
}

#[test]
fn bulk_never_writes_the_same_sectors_twice_in_a_pass() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.bulk(S1, generation, range(0, 128), vec![data(0, 128, 1)]);
    target.delta(S1, generation, vec![data(10, 20, 2)]);
    target.bulk(S1, generation, range(0, 128), vec![data(0, 128, 1)]);
    target.bulk(S1, generation, range(64, 192), vec![data(64, 192, 1)]);
    let out = target.settle();
    assert_eq!(out.writes[2].0, []);
    assert_eq!(out.writes[3].0, [range(128, 192)]);
}

#[test]
fn what_delta_touched_is_still_known_after_a_crash() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(10, 20, 2)]);
    target.mark(S1, generation);
    let state = target.settle().checkpoints.pop().unwrap();
    let state = DiskState::decode(&state.to_bytes()).unwrap();
    let mut target = Target { td: TargetDisk::new(state, FlowLimits::default()), chain: target.chain };
    let generation = target.open(S2);
    target.bulk(S2, generation, range(0, 32), vec![data(0, 32, 1)]);
    assert_eq!(target.settle().writes[0].0, [range(0, 10), range(20, 32)]);
}

#[test]
fn a_copy_that_was_interrupted_compares() {
    let mut state = TargetDisk::new_state(DISK, AGENT, [9; 16], SECTORS, LINEAGE, PassMode::Copy);
    state.generation = Generation::ZERO;
    let mut target = Target { td: TargetDisk::new(state, FlowLimits::default()), chain: CHAIN_START };
    target.open(S1);
    assert_eq!(target.td.state().mode, PassMode::Copy, "nobody wrote before");
    target.open(S2);
    assert_eq!(target.td.state().mode, PassMode::Compare);
}

#[test]
fn durable_is_said_only_of_what_a_finished_checkpoint_recorded() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    target.mark(S1, generation);
    let out = target.look();
    assert_eq!(out.checkpoints[0].sequence, Sequence(1));
    target.delta(S1, generation, vec![data(0, 8, 2)]); // while the checkpoint runs
    target.td.handle_written(out.writes[0].1);
    target.td.handle_checkpointed(T0);
    let acks = target.look().acks();
    assert_eq!((acks[0].received, acks[0].durable, acks[0].applied), (Sequence(2), Sequence(1), Sequence(1)));
}

#[test]
fn a_mark_is_acknowledged_only_when_a_checkpoint_recorded_it() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    target.td.handle_timeout(MonoTime(u64::MAX));
    let out = target.look();
    target.td.handle_written(out.writes[0].1);
    target.mark(S1, generation); // the running checkpoint holds its sequence, not the mark
    target.td.handle_checkpointed(T0);
    let out = target.look();
    assert_eq!(out.acks()[0].durable, Sequence(1));
    assert_eq!(out.acks()[0].marked, Sequence::ZERO);
    target.td.handle_timeout(MonoTime(u64::MAX));
    assert_eq!(target.look().checkpoints[0].marked, Sequence(1));
    target.td.handle_checkpointed(T0);
    assert_eq!(target.look().acks()[0].marked, Sequence(1));
}

#[test]
fn a_duplicate_is_acknowledged_and_not_written() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    let records = vec![data(0, 8, 1)];
    let header = target.header(generation, 1, &records);
    target.td.handle_batch(T0, S1, &header, records.clone());
    target.mark(S1, generation);
    target.settle();
    target.td.handle_batch(T0, S1, &header, records);
    let out = target.settle();
    assert!(out.writes.is_empty());
    assert_eq!(out.acks()[0].durable, Sequence(1));
}

#[test]
fn a_gap_is_refused_and_said_once() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    for first in [2, 3] {
        let records = vec![data(0, 8, 1)];
        let header = target.header(generation, first, &records);
        target.td.handle_batch(T0, S1, &header, records);
    }
    let out = target.settle();
    assert!(out.writes.is_empty());
    let gap = |message: &Message| {
        matches!(message, Message::Nack(n) if n.reason == NackReason::Gap
        && n.resume_from == Sequence(1))
    };
    assert_eq!(out.said(gap), 1);
}

#[test]
fn a_damaged_batch_is_asked_for_again_and_the_gap_behind_it_is_not() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.td.handle_damaged(S1, generation, 8192);
    let records = vec![data(0, 8, 1)];
    let header = target.header(generation, 2, &records);
    target.td.handle_batch(T0, S1, &header, records);
    let out = target.settle();
    assert_eq!(out.said(|message| matches!(message, Message::Nack(_))), 1);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    assert_eq!(target.settle().writes.len(), 1);
}

#[test]
fn another_history_takes_the_disk_away() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.chain = [7; 16];
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    let out = target.settle();
    assert!(out.writes.is_empty());
    assert_eq!(out.said(|m| matches!(m, Message::Error(head, _) if head.code == ErrorCode::Fork)), 1);
}

#[test]
fn nobody_writes_outside_the_granted_disk() {
    let outside = data(SECTORS - 1, SECTORS + 1, 1);
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![outside.clone()]);
    assert!(target.settle().writes.is_empty());
    let generation = target.open(S1);
    target.bulk(S1, generation, range(SECTORS - 1, SECTORS + 1), vec![outside]);
    assert!(target.settle().writes.is_empty());
}

#[test]
fn a_batch_without_credit_takes_the_disk_away() {
    let limits = FlowLimits { unwritten_bytes: 16 << 10, ..FlowLimits::default() };
    let mut target = Target::with_limits(PassMode::Done, limits);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(0, 16, 1)]);
    target.delta(S1, generation, vec![data(0, 16, 1)]);
    let out = target.look();
    assert_eq!(out.writes.len(), 1);
    assert_eq!(out.said(|m| matches!(m, Message::Error(head, _) if head.code == ErrorCode::Limit)), 1);
}

#[test]
fn refused_batches_never_use_up_the_credit() {
    let limits = FlowLimits { unwritten_bytes: 64 << 10, undurable_bytes: 64 << 10, ..FlowLimits::default() };
    let mut target = Target::with_limits(PassMode::Done, limits);
    let generation = target.open(S1);
    let records = vec![data(0, 16, 1)];
    let first = target.header(generation, 1, &records);
    target.td.handle_batch(T0, S1, &first, records.clone());
    target.mark(S1, generation);
    target.settle();
    for _ in 0..1000 {
        target.td.handle_batch(T0, S1, &first, records.clone());
        let out = target.settle();
        assert_eq!(out.said(|message| matches!(message, Message::Error(..))), 0);
    }
}

#[test]
fn settled_sectors_of_an_ended_pass_are_not_acknowledged_into_the_next() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.bulk(S1, generation, range(0, 128), vec![data(0, 128, 1)]);
    target.td.handle_timeout(MonoTime(u64::MAX));
    let out = target.look();
    target.td.handle_written(out.writes[0].1);
    let begin = PassBegin { disk: DISK, generation, cause: PassCause::Operator };
    target.td.handle_pass_begin(T0, S1, &begin);
    target.td.handle_checkpointed(T0);
    let out = target.look();
    let passes: Vec<u64> =
        out.replies
            .iter()
            .filter_map(|(_, message)| match message {
                Message::BulkAck(BulkAckHead { pass, .. }, _)
                | Message::PassState(PassState { pass, .. }) => Some(*pass),
                _ => None,
            })
            .collect();
    assert_eq!(passes, [1], "the acknowledgement is of pass 1, and pass 2 is not durable yet");
    target.td.handle_checkpointed(T0);
    let out = target.look();
    assert_eq!(out.said(|m| matches!(m, Message::PassState(s) if s.pass == 2)), 1);
    assert!(target.td.state().settled.is_empty());
}

#[test]
fn a_pass_ends_only_when_the_whole_disk_is_settled_durably() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.bulk(S1, generation, range(0, SECTORS - 1), vec![]);
    let end = PassEnd { disk: DISK, generation, pass: 1 };
    target.td.handle_pass_end(T0, S1, &end);
    target.settle();
    assert_eq!(target.td.state().mode, PassMode::Compare);
    target.bulk(S1, generation, range(SECTORS - 1, SECTORS), vec![]);
    target.td.handle_pass_end(T0, S1, &end);
    let out = target.settle();
    assert_eq!(out.said(|m| matches!(m, Message::PassState(s) if s.mode == PassMode::Done)), 1);
}

#[test]
fn the_last_batch_of_a_pass_is_flushed_without_waiting_for_more() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    let acknowledged = |out: &Out| out.said(|m| matches!(m, Message::BulkAck(..)));
    target.bulk(S1, generation, range(0, 128), vec![]);
    assert!(target.settle().checkpoints.is_empty(), "more comes");
    target.bulk(S1, generation, range(128, SECTORS), vec![data(128, 136, 1)]);
    let out = target.settle();
    assert_eq!((out.checkpoints.len(), acknowledged(&out)), (1, 1));
    // Not while nothing of the pass is new, however often something else comes.
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    assert!(target.settle().checkpoints.is_empty());
    // One that comes while a checkpoint runs is flushed by the next one, at once.
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    target.bulk(S1, generation, range(0, 128), vec![]);
    target.td.handle_timeout(MonoTime(u64::MAX));
    let out = target.look();
    assert_eq!(out.checkpoints.len(), 1);
    target.bulk(S1, generation, range(128, SECTORS), vec![]);
    let late = target.look();
    assert!(late.checkpoints.is_empty(), "one runs");
    [out, late].iter().for_each(|out| target.td.handle_written(out.writes[0].1));
    target.td.handle_checkpointed(T0);
    let out = target.settle();
    assert_eq!((out.checkpoints.len(), acknowledged(&out)), (1, 2));
}

#[test]
fn a_failed_disk_writes_nothing_grants_nothing_and_wants_no_timer() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    target.td.handle_failed("broken");
    assert_eq!(target.td.poll_timeout(), None);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    target.ask_open(S2, generation);
    let out = target.settle();
    assert!(out.writes.is_empty() && out.checkpoints.is_empty());
    assert_eq!(out.said(|m| matches!(m, Message::Error(head, _) if head.code == ErrorCode::Target)), 2);
}

#[test]
fn a_full_disk_is_told_while_its_write_waits() {
    let mut target = Target::new(PassMode::Done);
    let generation = target.open(S1);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    target.delta(S1, generation, vec![data(0, 8, 1)]);
    assert!(matches!(target.td.poll_action(), Some(DiskAction::Write { .. })));
    target.td.handle_full("no space");
    assert!(matches!(target.td.poll_reply(), Some(DiskAction::Reply { .. })));
    assert!(target.td.poll_reply().is_none(), "the second write is not a reply");
}

#[test]
fn requests_for_hashes_are_bounded() {
    let mut target = Target::new(PassMode::Compare);
    let generation = target.open(S1);
    let request =
        CompareRequestHead { disk: DISK, generation, request: 1, range: range(0, 128), unit_count: 0 };
    for _ in 0..10_000 {
        target.td.handle_compare(S1, request, Vec::new());
    }
    let out = target.look();
    assert!(out.hashes < 1000, "{}", out.hashes);
    assert_eq!(out.said(|m| matches!(m, Message::Error(head, _) if head.code == ErrorCode::Limit)), 1);
}

#[test]
fn a_disk_that_grows_takes_nothing_until_it_is_opened_at_its_new_size() {
    let mut target = Target::new(PassMode::Done);
    let before = target.open(S1);
    target.delta(S1, before, vec![data(0, 8, 1)]);
    target.td.handle_growing(T0);
    assert!(!target.td.is_settled());
    let out = target.settle();
    assert!(target.td.is_settled() && out.writes.len() == 1, "what was accepted is executed: {out:?}");
    assert_eq!(target.td.durable(), Sequence(1));
    target.td.handle_grown(T0, 2 * SECTORS);
    let out = target.settle();
    let recorded = out.checkpoints.last().map(|state| (state.size_sectors, state.sequence));
    assert_eq!(recorded, Some((2 * SECTORS, Sequence(1))));
    // Under way from before: refused, and nothing of it is written.
    let records = vec![data(8, 16, 2)];
    let header = target.header(before, 2, &records);
    target.td.handle_batch(T0, S1, &header, records);
    let out = target.settle();
    assert!(out.writes.is_empty() && out.acks().is_empty(), "{out:?}");
    target.ask_open(S1, before);
    let refused =
        |message: &Message| matches!(message, Message::Error(head, _) if head.code == ErrorCode::Size);
    assert_eq!(target.settle().said(refused), 1, "at its old size");
    let head = OpenDiskHead {
        disk: DISK,
        size_sectors: 2 * SECTORS,
        generation: before,
        lineage: LINEAGE,
        durable: Sequence(1),
        grant_bytes: 0,
    };
    target.td.handle_open(T0, S1, &head);
    assert_eq!(target.settle().said(|message| matches!(message, Message::Grant(..))), 1);
    let after = target.td.state().generation;
    assert!(after > before);
    target.delta(S1, after, vec![data(2 * SECTORS - 8, 2 * SECTORS, 3)]);
    assert_eq!(target.settle().writes.len(), 1, "behind the old end");
}
