//! The agent's core against a hostile master target and a sound reader.
//!
//! Checked after every step: no panic; every frame it sends is one that the other end would accept; what it sends for a
//! disk since GRANT never costs more than the credit it was given; the frames and events of one step are bounded;
//! `durable` never passes what was submitted or adopted.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::batch::{
    MarkCause, MarkClass, MarkLabel, Stretch, credit_cost, decode_batch, decode_bulk,
};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake::{HELLO_MAGIC, HelloAck, Role};
use reprotect_engine::format::message::{
    Ack, BulkAckHead, CompareAnswer, CompareHashesHead, Credit, ErrorCode, Fenced, GrantHead, Message, Nack,
    NackReason, OfferHead, PassCause, PassMode, PassState, RefineUnit, Welcome,
};
use reprotect_engine::proto::agent::{Agent, AgentEvent};
use reprotect_engine::proto::compare::{Computed, Question};
use reprotect_engine::proto::pass::{PassAction, Sink, unit_count};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence, Timestamp};

use crate::input::Input;
use crate::script::{
    AGENT, FixedProver, SIZES, STEPS_MAX, TARGET, disk, hashes, lineage, raw, records, sent,
};

const LINEAGE: LineageId = LineageId([0x11; 16]);
/// Frames and events one step may cause: all that was submitted in a script may be sent again at once.
const BURST_MAX: usize = 4 * STEPS_MAX + 256;

/// What the target of this fuzzer remembers of a disk.
#[derive(Debug, Default)]
struct Peer {
    size: u64,
    generation: u64,
    pass: u64,
    last: u64,
    chain: [u8; 16],
    limit: u64,
    spent: u64,
    requests: Vec<(u64, usize, usize)>,
}

struct World {
    agent: Agent,
    peers: BTreeMap<DiskId, Peer>,
    work: VecDeque<(DiskId, u64, Sink, Sequence, PassAction)>,
}

/// Runs one script.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut world = World {
        agent: Agent::new(AGENT, PeerId::NONE, Box::new(FixedProver)),
        peers: BTreeMap::new(),
        work: VecDeque::new(),
    };
    world.agent.set_chunk_bytes(input.pick(&[64 << 10, 256 << 10, 4 << 20]));
    world.agent.handle_connected([1; 16]);
    for _ in 0..STEPS_MAX {
        let Some(step) = input.step() else { break };
        world.step(step, &mut input);
        world.drain();
    }
}

impl World {
    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step % 24 {
            0 => self.shake_hands(input),
            1 | 2 => self.offer(input),
            3 | 4 => self.grant(input),
            5 | 6 => self.credit(input),
            7 | 8 => self.ack(input),
            9 | 10 => self.bulk_ack(input),
            11 => self.nack(input),
            12 | 13 => self.answer(input),
            14 => self.pass_state(input),
            15 => self.trouble(input),
            16 => {
                let (kind, body) = raw(input);
                self.deliver(kind, body);
            }
            17 => self.reconnect(),
            18..=20 => (0..=input.byte() % 32).for_each(|_| self.work(input)),
            21 => {
                let id = disk(input);
                let size = self.peers.get(&id).map_or(0, |peer| peer.size);
                let stretch = input.pick(Stretch::ALL);
                let records = records(input, size, None);
                self.agent.submit_delta(id, stretch, Timestamp(input.short()), records);
            }
            22 => {
                let id = disk(input);
                let label = MarkLabel::of_disk(input.pick(MarkClass::ALL), MarkCause::Command, Timestamp(1));
                for _ in 0..=input.byte() % 4 {
                    let _ = self.agent.submit_mark(id, label); // refused when too many wait
                }
            }
            _ => {
                let id = disk(input);
                if input.byte() < 128 {
                    let _ = self.agent.begin_scan(id);
                } else {
                    self.agent.begin_pass(id, input.pick(PassCause::ALL));
                }
            }
        }
    }

    fn shake_hands(&mut self, input: &mut Input<'_>) {
        let ack = HelloAck {
            magic: HELLO_MAGIC,
            version: input.near(1) as u16,
            role: Role::MasterTarget,
            features: 0,
            target: TARGET,
            nonce: [7; 32],
        };
        self.tell(input, &Message::HelloAck(ack));
        self.tell(input, &Message::Welcome(Welcome { offers: 1 }));
    }

    fn offer(&mut self, input: &mut Input<'_>) {
        let id = disk(input);
        let peer = self.peers.entry(id).or_default();
        peer.size = input.pick(&SIZES);
        let head = OfferHead {
            disk: id,
            source: [5; 16],
            size_sectors: input.near(peer.size),
            generation: Generation(input.near(peer.generation)),
            grant_bytes: 3,
        };
        self.tell(input, &Message::Offer(head, Bytes::from_static(b"key")));
    }

    fn grant(&mut self, input: &mut Input<'_>) {
        let id = disk(input);
        let peer = self.peers.entry(id).or_default();
        peer.generation = peer.generation.saturating_add(1);
        peer.pass = u64::from(input.byte() % 4);
        let ranges: Vec<SectorRange> =
            (0..input.byte() % 4).map(|_| crate::script::range(input, peer.size, u64::MAX)).collect();
        let head = GrantHead {
            disk: id,
            generation: Generation(input.near(peer.generation)),
            lineage: lineage(input, LINEAGE),
            durable: Sequence(input.near(peer.last)),
            chain: crate::script::chain(input, peer.chain),
            pass: peer.pass,
            mode: input.pick(PassMode::ALL),
            range_count: ranges.len() as u32,
            grant_bytes: 3,
        };
        self.tell(input, &Message::Grant(head, ranges, Bytes::from_static(b"key")));
    }

    fn credit(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let base = self.peers.get(&disk).map_or(0, |peer| peer.limit);
        let more = input.short() << 8;
        let limit = input.near(base.saturating_add(more));
        self.tell(input, &Message::Credit(Credit { disk, generation, limit }));
    }

    fn ack(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let last = self.peers.get(&disk).map_or(0, |peer| peer.last);
        let mut sequence = || Sequence(input.near(last));
        let (received, durable, applied, marked) = (sequence(), sequence(), sequence(), sequence());
        let mark = input.near(1);
        self.tell(input, &Message::Ack(Ack { disk, generation, received, durable, applied, marked, mark }));
    }

    fn bulk_ack(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let (size, pass) = self.peers.get(&disk).map_or((0, 0), |peer| (peer.size, peer.pass));
        let ranges: Vec<SectorRange> = match input.byte() {
            0..=63 => vec![SectorRange::new(0, size)],
            more => (0..more % 4).map(|_| crate::script::range(input, size, u64::MAX)).collect(),
        };
        let head = BulkAckHead { disk, generation, pass: input.near(pass), range_count: ranges.len() as u32 };
        self.tell(input, &Message::BulkAck(head, ranges));
    }

    fn nack(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let last = self.peers.get(&disk).map_or(0, |peer| peer.last);
        let back = u64::from(input.byte() % 8);
        let resume_from = Sequence(input.near(last.saturating_sub(back)));
        let reason = input.pick(NackReason::ALL);
        self.tell(input, &Message::Nack(Nack { disk, generation, resume_from, reason }));
    }

    /// Answers one of the agent's compare requests, mostly with the number of hashes it asked for.
    fn answer(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let peer = self.peers.entry(disk).or_default();
        let (request, count, refined) = match peer.requests.len() {
            0 => (input.short(), 1, 0),
            len => peer.requests.swap_remove(usize::from(input.byte()) % len),
        };
        let count = input.near(count as u64).min(70) as usize;
        let hashes = hashes(input, count);
        let masks = vec![u16::from(input.byte()); input.near(refined as u64).min(70) as usize];
        let (hash_count, mask_count) = (hashes.len() as u32, masks.len() as u16);
        let head = CompareHashesHead { disk, generation, request, hash_count, mask_count };
        self.tell(input, &Message::CompareHashes(head, CompareAnswer { hashes, masks }));
    }

    fn pass_state(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let peer = self.peers.entry(disk).or_default();
        let step = u64::from(input.byte() % 2);
        peer.pass = input.near(peer.pass + step);
        let state = PassState { disk, generation, pass: peer.pass, mode: input.pick(PassMode::ALL) };
        peer.pass %= 1 << 20;
        self.tell(input, &Message::PassState(state));
    }

    fn trouble(&mut self, input: &mut Input<'_>) {
        let (disk, generation) = self.key(input);
        let message = match input.byte() % 3 {
            0 => Message::Fenced(Fenced { disk, generation }),
            1 => Message::error(disk, ErrorCode::Full, "full"),
            _ => Message::error(disk, input.pick(ErrorCode::ALL), "no"),
        };
        self.tell(input, &message);
    }

    fn key(&self, input: &mut Input<'_>) -> (DiskId, Generation) {
        let id = disk(input);
        let generation = self.peers.get(&id).map_or(0, |peer| peer.generation);
        (id, Generation(input.near(generation)))
    }

    /// Does one item of work as a sound reader would.
    fn work(&mut self, input: &mut Input<'_>) {
        let Some((id, epoch, sink, as_of, action)) = self.work.pop_front() else { return };
        let done = match action {
            PassAction::Read { chunk, hash, .. } => {
                let hashes = hash.then(|| hashes(input, unit_count(chunk)));
                self.agent.handle_read(id, epoch, chunk, hashes)
            }
            PassAction::Compute { chunk, question: Question::Crcs(units) } => {
                let crcs = [u32::from(input.byte()); 16];
                let units = units.into_iter().map(|unit| RefineUnit { unit, crcs }).collect();
                self.agent.handle_computed(id, epoch, chunk, Computed::Crcs(units))
            }
            PassAction::Compute { chunk, question: Question::Confirm(units) } => {
                assert!(units.iter().any(|unit| unit.mask != 0), "nothing to confirm");
                let hash = hashes(input, 1).pop().expect("one was made");
                self.agent.handle_computed(id, epoch, chunk, Computed::Confirmed(hash))
            }
            PassAction::Send { chunk, pieces } => {
                assert!(pieces.iter().all(|piece| chunk.contains(*piece)), "pieces outside their chunk");
                assert!(matches!(sink, Sink::Bulk | Sink::Delta));
                let records: Vec<Record> = pieces.into_iter().map(Record::zeros).collect();
                self.agent.submit_chunk(id, epoch, chunk, as_of, Timestamp(9), records);
                Ok(())
            }
            PassAction::Ask { .. } => unreachable!("the agent asks by itself"),
        };
        assert!(done.is_ok(), "work as it was asked for was refused: {done:?}");
    }

    fn tell(&mut self, input: &mut Input<'_>, message: &Message) {
        let (kind, body) = sent(input, message);
        self.deliver(kind, body);
    }

    fn deliver(&mut self, kind: FrameKind, body: Bytes) {
        if body.len() > kind.body_bytes_max() as usize {
            return; // its frame header would have been refused
        }
        if let Ok(Message::Credit(credit)) = Message::decode(kind, &body)
            && let Some(peer) = self.peers.get_mut(&credit.disk)
        {
            peer.limit = peer.limit.max(credit.limit);
        }
        if self.agent.handle_frame(kind, &body).is_err() {
            self.reconnect();
            if kind != FrameKind::HelloAck {
                self.shake_hands(&mut Input::new(&[]));
            }
        }
    }

    fn reconnect(&mut self) {
        self.agent.handle_disconnected();
        assert!(self.agent.poll_transmit().is_none(), "frames for a connection that is gone");
        self.agent.handle_connected([2; 16]);
    }

    fn drain(&mut self) {
        for burst in 0.. {
            assert!(burst < BURST_MAX, "one step caused too much");
            if let Some(event) = self.agent.poll_event() {
                self.event(event);
            } else if let Some(outgoing) = self.agent.poll_transmit() {
                self.sent(outgoing.frame.kind(), outgoing.frame.body());
            } else {
                break;
            }
        }
        for id in self.peers.keys() {
            if let Some((durable, last)) = self.agent.position(*id) {
                assert!(durable <= last, "durable {durable} of {last}");
            }
            let _ = (self.agent.undurable_bytes(*id), self.agent.pass_progress(*id));
        }
    }

    fn event(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Offered { disk, size_sectors, .. } => self.agent.open(disk, size_sectors),
            AgentEvent::Opened { disk, .. } => {
                let peer = self.peers.entry(disk).or_default();
                (peer.limit, peer.spent) = (0, 0);
                peer.requests.clear();
            }
            AgentEvent::Work { disk, epoch, sink, as_of, action } if self.work.len() < 4096 => {
                self.work.push_back((disk, epoch, sink, as_of, action));
            }
            _ => {}
        }
    }

    /// Checks a frame as the other end would, and takes note of it.
    fn sent(&mut self, kind: FrameKind, body: Bytes) {
        let (id, cost) = match kind {
            FrameKind::Batch => {
                let (header, records) = match decode_batch(body) {
                    // The target granted the last sequence there is; what follows is its own doing.
                    Err(FormatError::Field { field: "first_sequence", .. }) => return,
                    decoded => decoded.expect("a delta batch the target would refuse"),
                };
                let peer = self.peers.entry(header.disk).or_default();
                peer.last = header.last_sequence().0;
                peer.chain = header.chain_after(&records);
                (header.disk, credit_cost(&records))
            }
            FrameKind::Bulk => {
                let (header, records) = decode_bulk(body).expect("a bulk batch the target would refuse");
                (header.disk, credit_cost(&records))
            }
            _ => {
                let message = Message::decode(kind, &body).expect("a message the target would refuse");
                if let Message::CompareRequest(head, units) = message {
                    let count = if units.is_empty() { unit_count(head.range) } else { 1 };
                    let peer = self.peers.entry(head.disk).or_default();
                    peer.requests.push((head.request, count, units.len()));
                }
                return;
            }
        };
        let peer = self.peers.entry(id).or_default();
        peer.spent += cost;
        assert!(peer.spent <= peer.limit, "{} bytes sent on a credit of {}", peer.spent, peer.limit);
    }
}
