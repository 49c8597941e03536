//! What an agent keeps, sends, sends again and believes.

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::format::batch::{
    CHAIN_START, Chain, MarkCause, MarkClass, MarkLabel, Stretch, credit_cost, decode_batch,
};
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::message::{
    Ack, CompareAnswer, CompareHashesHead, Credit, ErrorCode, Fenced, GrowDisk, Message, Nack, NackReason,
    OfferHead, PassCause, PassMode, PassState, Welcome,
};
use reprotect_engine::limits::{DAMAGED_BATCHES_MAX, DISKS_PER_AGENT_MAX, MARKS_PENDING_MAX};
use reprotect_engine::proto::Lane;
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::pass::{PassAction, unit_count};
use reprotect_engine::units::{Generation, Sequence, Timestamp};

use super::*;

/// An agent and what it sent and said.
struct Source {
    agent: Agent,
    sent: Vec<(Lane, FrameKind, Bytes)>,
    events: Vec<AgentEvent>,
    /// What the next grant says is settled.
    settled: Vec<SectorRange>,
}

impl Source {
    fn new() -> Self {
        let mut agent = Agent::new(AGENT, TARGET, Box::new(NoSecret));
        agent.set_chunk_bytes(64 << 10);
        Self { agent, sent: Vec::new(), events: Vec::new(), settled: Vec::new() }
    }

    fn pump(&mut self) {
        loop {
            if let Some(event) = self.agent.poll_event() {
                self.events.push(event);
            } else if let Some(out) = self.agent.poll_transmit() {
                self.sent.push((out.lane, out.frame.kind(), out.frame.body()));
            } else {
                return;
            }
        }
    }

    fn gets(&mut self, message: &Message) {
        let frame = message.encode();
        self.agent.handle_frame(frame.kind(), &frame.body()).unwrap();
        self.pump();
    }

    /// Connects and opens at the target's position; nothing of it is kept in `sent` and `events`.
    fn open(&mut self, generation: u64, durable: (u64, Chain), pass: u64, mode: PassMode) {
        self.agent.handle_connected([0; 16]);
        self.gets(&Message::HelloAck(hello_ack()));
        self.gets(&Message::Welcome(Welcome { offers: 1 }));
        self.offer(generation - 1);
        self.sent.clear();
        self.events.clear();
        self.grant(generation, durable, pass, mode);
        self.gets(&Message::Credit(Credit {
            disk: DISK,
            generation: Generation(generation),
            limit: 1 << 30,
        }));
    }

    fn offer(&mut self, generation: u64) {
        let head = OfferHead {
            disk: DISK,
            source: [9; 16],
            size_sectors: SECTORS,
            generation: Generation(generation),
            grant_bytes: 0,
        };
        self.gets(&Message::Offer(head, Bytes::new()));
        self.agent.open(DISK, SECTORS);
        self.pump();
    }

    fn grant(&mut self, generation: u64, durable: (u64, Chain), pass: u64, mode: PassMode) {
        let mut head = grant_head(generation, pass, mode);
        (head.durable, head.chain) = (Sequence(durable.0), durable.1);
        head.range_count = self.settled.len() as u32;
        self.gets(&Message::Grant(head, self.settled.clone(), Bytes::new()));
    }

    fn submit(&mut self, byte: u8) -> Sequence {
        let records = vec![data(0, 8, byte)];
        let last = self.agent.submit_delta(DISK, Stretch::Ordered, Timestamp(1), records);
        last.unwrap()
    }

    fn ack(&mut self, generation: u64, durable: u64, mark: u64) {
        self.gets(&Message::Ack(Ack {
            disk: DISK,
            generation: Generation(generation),
            received: Sequence(durable),
            durable: Sequence(durable),
            applied: Sequence(durable),
            marked: Sequence(0),
            mark,
        }));
    }

    fn kinds(&self) -> Vec<FrameKind> {
        self.sent.iter().map(|(_, kind, _)| *kind).collect()
    }

    /// First sequence and generation of every batch sent.
    fn batches(&self) -> Vec<(u64, u64)> {
        let batches = self.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::Batch);
        batches
            .map(|(_, _, body)| {
                let (header, _) = decode_batch(body.clone()).unwrap();
                (header.first_sequence.0, header.generation.0)
            })
            .collect()
    }

    /// Answers a scan round's work: every hash is equal at both ends.
    fn scan_finds_nothing(&mut self) {
        let mut answered = 0;
        while let Some((_, _, body)) =
            self.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::CompareRequest).nth(answered)
        {
            answered += 1;
            let Ok(Message::CompareRequest(head, _)) = Message::decode(FrameKind::CompareRequest, body)
            else {
                panic!("not a request");
            };
            let read = self.events.iter().find_map(|event| match event {
                AgentEvent::Work { epoch, action: PassAction::Read { chunk, .. }, .. }
                    if *chunk == head.range =>
                {
                    Some(*epoch)
                }
                _ => None,
            });
            let hashes = vec![UnitHash::ZEROS; unit_count(head.range)];
            self.agent.handle_read(DISK, read.unwrap(), head.range, Some(hashes.clone())).unwrap();
            let (generation, request, hash_count) = (head.generation, head.request, hashes.len() as u32);
            let answer = CompareHashesHead { disk: DISK, generation, request, hash_count, mask_count: 0 };
            self.gets(&Message::CompareHashes(answer, CompareAnswer { hashes, masks: Vec::new() }));
            self.submit_empty_chunks();
        }
    }

    /// Chunks whose every unit is equal are sent without a record.
    fn submit_empty_chunks(&mut self) {
        let chunks: Vec<_> = self
            .events
            .iter()
            .filter_map(|event| match event {
                AgentEvent::Work { epoch, as_of, action: PassAction::Send { chunk, pieces }, .. } => {
                    assert_eq!(pieces, &[]);
                    Some((*epoch, *chunk, *as_of))
                }
                _ => None,
            })
            .collect();
        for (epoch, chunk, as_of) in chunks {
            self.agent.submit_chunk(DISK, epoch, chunk, as_of, Timestamp(2), Vec::new());
        }
        self.pump();
    }

    fn chain_before(&self, batch: usize) -> Chain {
        let (_, _, body) = &self.sent.iter().filter(|(_, k, _)| *k == FrameKind::Batch).nth(batch).unwrap();
        decode_batch(body.clone()).unwrap().0.chain
    }
}

fn label(point: u8) -> MarkLabel {
    MarkLabel { point: [point; 16], ..MarkLabel::of_disk(MarkClass::Crash, MarkCause::Command, Timestamp(1)) }
}

#[test]
fn an_agent_forgets_only_what_is_durable_and_sends_the_rest_again() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    for byte in 1..=4 {
        source.submit(byte);
    }
    source.pump();
    assert_eq!(source.batches(), [(1, 1), (2, 1), (3, 1), (4, 1)]);
    let chain = source.chain_before(2);
    source.ack(1, 1, 0);
    source.agent.handle_disconnected();
    source.submit(5);
    source.open(2, (2, chain), 1, PassMode::Done);
    assert_eq!(source.batches(), [(3, 2), (4, 2), (5, 2)], "the target said 2, whatever was acknowledged");
    assert_eq!(source.agent.position(DISK), Some((Sequence(2), Sequence(5))));
}

#[test]
fn what_a_target_lost_is_sent_again_with_its_marks_while_it_is_kept_and_compared_for_otherwise() {
    let points = |source: &Source| -> Vec<u8> {
        let marks = source.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::Mark);
        let point = |(_, kind, body): &(Lane, FrameKind, Bytes)| match Message::decode(*kind, body).unwrap() {
            Message::Mark(mark) => mark.point[0],
            other => panic!("{other:?}"),
        };
        marks.map(point).collect()
    };
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    for byte in 1..=4 {
        source.submit(byte);
        source.agent.submit_mark(DISK, label(byte));
    }
    source.pump();
    let chain = source.chain_before(2);
    source.ack(1, 4, 4);
    source.agent.handle_disconnected();
    source.submit(5);
    source.open(2, (2, chain), 1, PassMode::Done);
    assert_eq!(source.batches(), [(3, 2), (4, 2), (5, 2)]);
    assert_eq!(points(&source), [2, 3, 4], "one at the border may be lost, too");
    let lost = AgentEvent::TargetLost { disk: DISK, from: Sequence(3), to: Sequence(4) };
    assert!(source.events.contains(&lost), "{:?}", source.events);
    assert_eq!(source.agent.position(DISK), Some((Sequence(2), Sequence(5))));
    source.events.clear();
    source.ack(2, 5, 3);
    let told = source.events.iter().filter(|event| matches!(event, AgentEvent::Marked { .. })).count();
    assert_eq!(told, 0, "they were durable once, and that was told");
    assert!(!source.agent.mark_pending(DISK));

    // Lost once more, and now at a place where the history is another one.
    source.agent.handle_disconnected();
    source.open(3, (2, [9; 16]), 1, PassMode::Done);
    assert!(source.batches().is_empty());
    let compared = AgentEvent::Resync { disk: DISK, cause: PassCause::TargetLostDurable };
    assert!(source.events.contains(&compared), "{:?}", source.events);
}

#[test]
fn marks_say_how_much_could_not_be_read_when_they_were_placed() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    for (point, sectors) in [(1, 0), (2, 9), (3, 8), (4, u64::MAX), (5, 0)] {
        source.agent.set_unread(DISK, sectors);
        source.submit(point);
        source.agent.submit_mark(DISK, label(point));
    }
    source.agent.set_unread(DISK, 80);
    source.pump();
    let marks = source.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::Mark);
    let unread = |(_, kind, body): &(Lane, FrameKind, Bytes)| match Message::decode(*kind, body).unwrap() {
        Message::Mark(mark) => (mark.point[0], mark.unread_blocks, mark.is_state()),
        other => panic!("{other:?}"),
    };
    let told: Vec<_> = marks.map(unread).collect();
    assert_eq!(told, [(1, 0, true), (2, 2, false), (3, 1, false), (4, u32::MAX, false), (5, 0, true)]);
}

#[test]
fn nothing_is_sent_without_credit() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.agent.handle_disconnected();
    source.submit(1);
    source.agent.handle_connected([0; 16]);
    assert!(source.batches().is_empty());
    let ack = hello_ack();
    source.gets(&Message::HelloAck(ack));
    source.gets(&Message::Welcome(Welcome { offers: 1 }));
    source.offer(1);
    source.grant(2, (0, CHAIN_START), 1, PassMode::Done);
    assert!(source.batches().is_empty());
    let cost = credit_cost(&[data(0, 8, 1)]);
    let credit = |limit| Message::Credit(Credit { disk: DISK, generation: Generation(2), limit });
    source.gets(&credit(cost - 1));
    assert!(source.batches().is_empty());
    source.gets(&credit(cost));
    assert_eq!(source.batches(), [(1, 2)]);
}

#[test]
fn a_mark_travels_exactly_behind_its_last_record() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.agent.handle_disconnected();
    source.submit(1);
    source.agent.submit_mark(DISK, label(1));
    source.submit(2);
    source.open(2, (0, CHAIN_START), 1, PassMode::Done);
    assert_eq!(source.kinds(), [FrameKind::Batch, FrameKind::Mark, FrameKind::Batch]);
    assert!(source.agent.mark_pending(DISK));
    source.ack(2, 2, 1);
    assert!(!source.agent.mark_pending(DISK));
}

#[test]
fn marks_at_one_sequence_are_durable_one_by_one_and_sent_again_until_they_are() {
    let marks = |source: &Source| -> Vec<(u64, u8)> {
        let frames = source.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::Mark);
        frames
            .map(|(_, kind, body)| match Message::decode(*kind, body).unwrap() {
                Message::Mark(mark) => (mark.number, mark.point[0]),
                other => panic!("{other:?}"),
            })
            .collect()
    };
    let told = |source: &Source| -> Vec<u8> {
        let durable = source.events.iter().filter_map(|event| match event {
            AgentEvent::Marked { label, .. } => Some(label.point[0]),
            _ => None,
        });
        durable.collect()
    };
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    for point in 1..=3 {
        assert!(source.agent.submit_mark(DISK, label(point)));
    }
    source.submit(2);
    assert!(source.agent.submit_mark(DISK, label(4)));
    source.pump();
    assert_eq!(marks(&source), [(1, 1), (2, 2), (3, 3), (4, 4)]);
    source.ack(1, 1, 1);
    assert_eq!(told(&source), [1]);
    let chain = source.chain_before(1);
    source.agent.handle_disconnected();
    source.open(2, (1, chain), 1, PassMode::Done);
    assert_eq!(marks(&source), [(1, 2), (2, 3), (3, 4)], "numbered anew in the new generation");
    source.ack(1, 2, 9);
    assert!(told(&source).is_empty(), "words about an older generation");
    source.ack(2, 2, 3);
    assert_eq!(told(&source), [2, 3, 4]);
    assert!(!source.agent.mark_pending(DISK));
}

#[test]
fn marks_without_room_are_refused_and_those_of_a_stream_given_up_are_lost() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    source.agent.handle_disconnected();
    for _ in 0..MARKS_PENDING_MAX {
        assert!(source.agent.submit_mark(DISK, label(1)));
    }
    assert!(!source.agent.submit_mark(DISK, label(2)));
    source.open(2, (7, [9; 16]), 1, PassMode::Done);
    let lost = source.events.iter().filter(|event| matches!(event, AgentEvent::MarkLost { .. })).count();
    assert_eq!(lost, MARKS_PENDING_MAX);
    assert!(!source.agent.mark_pending(DISK));
}

#[test]
fn a_scan_to_a_mark_waits_for_the_mark_it_is_told() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    assert!(source.agent.begin_scan_to_mark(DISK));
    source.pump();
    source.scan_finds_nothing();
    assert!(source.events.contains(&AgentEvent::ScanRead { disk: DISK }));
    assert!(!source.agent.mark_pending(DISK), "nobody placed one yet");
    source.ack(1, 0, 0);
    assert!(!source.events.contains(&AgentEvent::ScanDone { disk: DISK }));
    source.agent.submit_mark(DISK, label(5));
    source.pump();
    source.ack(1, 0, 1);
    assert!(source.events.contains(&AgentEvent::ScanDone { disk: DISK }));
    assert!(source.agent.begin_scan(DISK), "another may begin");
}

#[test]
fn a_mark_that_the_target_went_past_is_durable() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    source.agent.submit_mark(DISK, label(1));
    source.submit(2);
    source.submit(3);
    source.pump();
    let chain = source.chain_before(2);
    source.agent.handle_disconnected();
    source.open(2, (2, chain), 1, PassMode::Done);
    assert_eq!(source.kinds(), [FrameKind::Batch]);
    assert!(!source.agent.mark_pending(DISK));
    assert!(source.events.iter().any(|event| matches!(event, AgentEvent::Marked { .. })));
}

#[test]
fn a_compare_pass_is_asked_for_until_it_begins() {
    let asked = |source: &Source| source.kinds().iter().filter(|k| **k == FrameKind::PassBegin).count();
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 5, PassMode::Done);
    source.agent.begin_pass(DISK, PassCause::TrackingLost);
    source.pump();
    assert_eq!(asked(&source), 1);
    source.agent.handle_disconnected();
    source.open(2, (0, CHAIN_START), 5, PassMode::Done);
    assert_eq!(asked(&source), 1, "the target never heard of it");
    assert!(!source.agent.begin_scan(DISK), "not while it is wanted");
    source.agent.handle_disconnected();
    source.open(3, (0, CHAIN_START), 6, PassMode::Compare);
    assert_eq!(asked(&source), 0, "it runs");
}

#[test]
fn changes_and_marks_wait_until_a_wanted_compare_pass_began() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.agent.begin_pass(DISK, PassCause::TrackingLost);
    source.submit(1);
    assert!(source.agent.submit_mark(DISK, label(1)));
    source.pump();
    assert_eq!(source.kinds().last(), Some(&FrameKind::PassBegin), "what follows could overtake it");
    assert!(!source.kinds().contains(&FrameKind::Batch) && !source.kinds().contains(&FrameKind::Mark));
    source.sent.clear();
    let (generation, mode) = (Generation(1), PassMode::Compare);
    source.gets(&Message::PassState(PassState { disk: DISK, generation, pass: 2, mode }));
    let delta: Vec<FrameKind> = source
        .kinds()
        .into_iter()
        .filter(|kind| matches!(kind, FrameKind::Batch | FrameKind::Mark))
        .collect();
    assert_eq!(delta, [FrameKind::Batch, FrameKind::Mark]);
}

/// A target that lost parts of the disk repairs these in a pass of its own, with the next number.
#[test]
fn a_pass_that_a_target_began_for_itself_is_not_taken_for_the_whole_one_that_is_wanted() {
    for (settled, asks) in [(vec![SectorRange::new(0, 8)], true), (Vec::new(), false)] {
        let mut source = Source::new();
        source.open(1, (0, CHAIN_START), 1, PassMode::Done);
        source.agent.begin_pass(DISK, PassCause::TrackingLost);
        source.pump();
        source.agent.handle_disconnected();
        source.sent.clear();
        source.settled.clone_from(&settled);
        source.open(2, (0, CHAIN_START), 2, PassMode::Compare);
        source.pump();
        assert_eq!(source.kinds().contains(&FrameKind::PassBegin), asks, "{settled:?}");
    }
}

#[test]
fn a_disk_is_not_synced_while_a_compare_pass_is_wanted() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Compare);
    source.agent.begin_pass(DISK, PassCause::TrackingLost);
    let state =
        |pass, mode| Message::PassState(PassState { disk: DISK, generation: Generation(1), pass, mode });
    source.gets(&state(1, PassMode::Done));
    assert!(!source.events.contains(&AgentEvent::Synced { disk: DISK }));
    source.gets(&state(2, PassMode::Compare));
    source.gets(&state(2, PassMode::Done));
    assert!(source.events.contains(&AgentEvent::Synced { disk: DISK }));
}

#[test]
fn a_scan_round_begins_only_when_all_older_data_are_durable() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    source.pump();
    assert!(!source.agent.begin_scan(DISK));
    source.ack(1, 1, 0);
    assert!(source.agent.begin_scan(DISK));
    assert!(!source.agent.begin_scan(DISK), "one at a time");
}

#[test]
fn a_mark_of_somebody_else_does_not_end_a_scan_round() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    assert!(source.agent.begin_scan(DISK));
    source.agent.submit_mark(DISK, label(1));
    source.pump();
    source.ack(1, 0, 0);
    assert!(!source.events.contains(&AgentEvent::ScanDone { disk: DISK }));
    assert!(source.agent.pass_progress(DISK).is_some());
}

#[test]
fn words_about_its_own_past_do_not_stop_an_agent() {
    let fenced = |generation| Message::Fenced(Fenced { disk: DISK, generation: Generation(generation) });
    let stopped = |source: &Source| source.events.iter().any(|e| matches!(e, AgentEvent::Stopped { .. }));
    let mut source = Source::new();
    source.open(2, (0, CHAIN_START), 1, PassMode::Done);
    source.gets(&fenced(2));
    assert!(!stopped(&source));
    source.gets(&fenced(3));
    assert!(stopped(&source));
}

#[test]
fn a_disk_that_another_session_had_open_is_compared() {
    let asked = |source: &Source| source.kinds().contains(&FrameKind::PassBegin);
    let mut source = Source::new();
    source.open(3, (0, CHAIN_START), 1, PassMode::Done);
    assert!(!asked(&source), "the first this agent knows of");
    source.agent.handle_disconnected();
    source.open(4, (0, CHAIN_START), 1, PassMode::Done);
    assert!(!asked(&source), "nobody else was there");
    source.agent.handle_disconnected();
    source.open(6, (0, CHAIN_START), 1, PassMode::Done);
    assert!(asked(&source), "5 was somebody else's");
}

#[test]
fn a_batch_that_is_damaged_every_time_is_given_up_and_the_disk_is_opened_anew_and_compared() {
    let damaged = |resume_from| {
        Message::Nack(Nack {
            disk: DISK,
            generation: Generation(1),
            resume_from: Sequence(resume_from),
            reason: NackReason::Damaged,
        })
    };
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    source.submit(2);
    source.pump();
    let chain = source.chain_before(1);
    for _ in 1..DAMAGED_BATCHES_MAX {
        source.gets(&damaged(1));
    }
    let again = 2 * DAMAGED_BATCHES_MAX as usize;
    assert_eq!(source.batches().len(), again, "sent, and sent again for each complaint");
    source.gets(&damaged(2));
    assert_eq!(
        source.batches().len(),
        again + 1,
        "the first one got through, so the second has all its tries"
    );
    for _ in 1..DAMAGED_BATCHES_MAX {
        assert!(!source.kinds().contains(&FrameKind::OpenDisk));
        source.gets(&damaged(2));
    }
    assert_eq!(
        source.kinds().last(),
        Some(&FrameKind::OpenDisk),
        "a new generation fences what is under way"
    );
    source.gets(&damaged(2));
    source.sent.clear();

    source.grant(2, (1, chain), 1, PassMode::Done);
    assert!(source.events.contains(&AgentEvent::Resync { disk: DISK, cause: PassCause::DamagedStream }));
    assert_eq!(source.kinds(), [FrameKind::PassBegin], "the damaged batch is not sent any more");
    assert_eq!(source.agent.position(DISK), Some((Sequence(1), Sequence(1))));
    assert!(!source.events.iter().any(|event| matches!(event, AgentEvent::Stopped { .. })));
}

#[test]
fn a_source_that_is_protected_anew_leaves_nothing_of_its_old_disk_behind() {
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Done);
    source.submit(1);
    for again in 10..10 + 2 * DISKS_PER_AGENT_MAX as u8 {
        let disk = DiskId([again; 16]);
        let head = OfferHead {
            disk,
            source: [9; 16],
            size_sectors: SECTORS,
            generation: Generation(1),
            grant_bytes: 0,
        };
        source.gets(&Message::Offer(head, Bytes::new()));
        source.agent.open(disk, SECTORS);
        source.pump();
        assert!(source.agent.position(disk).is_some() && source.agent.position(DISK).is_none());
    }
    let last = DiskId([9 + 2 * DISKS_PER_AGENT_MAX as u8; 16]);
    source.agent.forget(last);
    source.pump();
    assert_eq!(source.agent.position(last), None);
}

#[test]
fn late_answers_to_a_disk_that_was_forgotten_are_not_taken_for_its_successors() {
    let epoch = |source: &Source| {
        let work = |event: &AgentEvent| match event {
            AgentEvent::Work { epoch, .. } => Some(*epoch),
            _ => None,
        };
        source.events.iter().rev().find_map(work).unwrap()
    };
    let mut source = Source::new();
    source.open(1, (0, CHAIN_START), 1, PassMode::Copy);
    let before = epoch(&source);
    source.agent.forget(DISK);
    source.offer(4);
    source.grant(5, (0, CHAIN_START), 1, PassMode::Copy);
    assert!(epoch(&source) > before);
    // A bug of the reader if it were the new walk's: no such number of hashes was asked for.
    source.agent.handle_read(DISK, before, range(0, 128), Some(Vec::new())).unwrap();
}

#[test]
fn a_disk_that_grows_sends_nothing_until_it_is_open_at_its_new_size_and_then_goes_on() {
    let mut source = Source::new();
    source.open(2, (0, CHAIN_START), 1, PassMode::Done);
    assert_eq!(source.submit(1), Sequence(1));
    source.pump();
    source.sent.clear();
    assert!(source.agent.ask_to_grow(DISK, 2 * SECTORS));
    assert!(!source.agent.ask_to_grow(DISK, 2 * SECTORS), "it was asked");
    assert_eq!(source.submit(2), Sequence(2));
    source.pump();
    let [(_, FrameKind::GrowDisk, body)] = source.sent.as_slice() else { panic!("{:?}", source.kinds()) };
    let asked = GrowDisk { disk: DISK, generation: Generation(2), size_sectors: 2 * SECTORS };
    assert_eq!(Message::decode(FrameKind::GrowDisk, body), Ok(Message::GrowDisk(asked)));
    // What the target said of the old generation meanwhile changes nothing.
    source.ack(2, 1, 0);
    source.gets(&Message::Fenced(Fenced { disk: DISK, generation: Generation(2) }));
    assert!(!source.agent.begin_scan(DISK) && source.agent.stream_position(DISK).is_some());
    source.sent.clear();
    let head = OfferHead {
        disk: DISK,
        source: [9; 16],
        size_sectors: 2 * SECTORS,
        generation: Generation(2),
        grant_bytes: 0,
    };
    source.gets(&Message::Offer(head, Bytes::new()));
    source.agent.open(DISK, 2 * SECTORS);
    source.pump();
    assert_eq!(source.kinds(), [FrameKind::OpenDisk]);
    source.grant(3, (0, CHAIN_START), 1, PassMode::Done);
    source.gets(&Message::Credit(Credit { disk: DISK, generation: Generation(3), limit: 1 << 30 }));
    assert_eq!(source.batches(), [(1, 3), (2, 3)], "what was not durable, and what came since");
    let compares = |event: &AgentEvent| matches!(event, AgentEvent::Resync { .. });
    assert!(!source.events.iter().any(compares), "{:?}", source.events);
    source.ack(3, 2, 0);
    assert!(source.agent.begin_scan(DISK));
    source.pump();
    let asked = source.sent.iter().filter(|(_, kind, _)| *kind == FrameKind::CompareRequest);
    assert_eq!(asked.count() as u64, 2 * SECTORS * 512 / (64 << 10), "the round goes over the new part");
}

#[test]
fn a_target_that_cannot_grow_stops_the_disk_with_its_reason() {
    let mut source = Source::new();
    source.open(2, (0, CHAIN_START), 1, PassMode::Done);
    assert!(source.agent.ask_to_grow(DISK, 2 * SECTORS));
    source.gets(&Message::error(DISK, ErrorCode::Size, "the device is too small"));
    let stopped = |event: &AgentEvent| matches!(event, AgentEvent::Stopped { text, .. } if text == "the device is too small");
    assert!(source.events.iter().any(stopped), "{:?}", source.events);
    assert!(!source.agent.ask_to_grow(DISK, 2 * SECTORS), "until it is offered again");
    source.agent.handle_disconnected();
    source.open(3, (0, CHAIN_START), 1, PassMode::Done);
    assert!(source.agent.ask_to_grow(DISK, 3 * SECTORS));
}
