//! The relay's core between a hostile agent and a hostile target, with a driver that compresses in any order.
//!
//! Checked after every step: no panic; the batches of a lane leave in the order they came and with the canonical fields
//! they came with; what the relay says it holds is exactly what it accepted and has not forwarded; it passes on no more
//! credit than it was given; what one step causes is bounded.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, CHAIN_START, Stretch, credit_cost, decode_batch, decode_bulk, encode_batch,
    encode_bulk,
};
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake::{HELLO_MAGIC, Hello, HelloAck, Role};
use reprotect_engine::format::message::{
    Ack, Credit, GrantHead, Message, OfferHead, OpenDiskHead, PassEnd, PassMode, Welcome,
};
use reprotect_engine::proto::process_server::{RelayAction, RelaySession, Side};
use reprotect_engine::proto::{Lane, Outgoing};
use reprotect_engine::units::{DiskId, Generation, LineageId, MonoTime, SectorRange, Sequence, Timestamp};

use crate::input::Input;
use crate::script::{AGENT, SIZES, STEPS_MAX, TARGET, damaged, disk, mark, range, raw, records, sent};

const LINEAGE: LineageId = LineageId([0x11; 16]);
const GENERATION: Generation = Generation(3);
const WINDOW: u64 = 256 << 10;
/// Actions one step may cause: everything held in a lane may leave at once.
const BURST_MAX: usize = 4 * STEPS_MAX;

/// What a batch must still say when it leaves: its head and its records' canonical fields.
type Canon = (Vec<u8>, [u8; 16]);

struct World {
    relay: RelaySession,
    jobs: Vec<(u64, Vec<Record>)>,
    sent: VecDeque<(DiskId, u64)>,
    lanes: BTreeMap<Lane, VecDeque<Canon>>,
    held: u64,
    /// Highest credit the target gave, and size at OPEN_DISK, per disk.
    credit: BTreeMap<DiskId, u64>,
    granted: BTreeMap<DiskId, Generation>,
    sizes: BTreeMap<DiskId, u64>,
    sequence: u64,
}

/// Runs one script; a session that ended is followed by a new one.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut world = World::new(&mut input);
    for _ in 0..STEPS_MAX {
        let Some(step) = input.step() else { break };
        let alive = world.step(step, &mut input);
        world.drain();
        if !alive {
            world = World::new(&mut input);
        }
    }
}

impl World {
    /// A session with its handshake, and mostly an open disk with credit.
    fn new(input: &mut Input<'_>) -> Self {
        let mut world = Self {
            relay: RelaySession::new(AGENT, WINDOW, MonoTime(0)),
            jobs: Vec::new(),
            sent: VecDeque::new(),
            lanes: BTreeMap::new(),
            held: 0,
            credit: BTreeMap::new(),
            granted: BTreeMap::new(),
            sizes: BTreeMap::new(),
            sequence: 1,
        };
        if world.connect(input) && input.byte() < 200 && world.open(input) {
            let limit = input.near(WINDOW / 2);
            let disk = disk(input);
            world.tell(Side::Target, input, &Message::Credit(Credit { disk, generation: GENERATION, limit }));
        }
        world
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) -> bool {
        match step % 12 {
            0 => self.connect(input),
            1 => self.open(input),
            2 => self.credit(input),
            3 => self.batch(input),
            4 => self.bulk(input),
            5 => {
                let id = disk(input);
                let mark = mark(input, id, (LINEAGE, GENERATION, Sequence(self.sequence), CHAIN_START));
                self.tell(Side::Agent, input, &Message::Mark(mark))
            }
            6 => self.chatter(input),
            7 | 8 => {
                (0..=input.byte() % 8).for_each(|_| self.recode(input));
                true
            }
            9 => {
                (0..=input.byte() % 8).for_each(|_| self.forwarded());
                true
            }
            10 => {
                let (kind, body) = raw(input);
                let side = input.pick(&[Side::Agent, Side::Target]);
                self.deliver(side, kind, body)
            }
            _ => {
                let now = MonoTime(input.short() << 20);
                self.relay.handle_timeout(now).is_ok()
            }
        }
    }

    fn connect(&mut self, input: &mut Input<'_>) -> bool {
        let hello = Message::Hello(Hello::new(AGENT, TARGET, [1; 16]));
        let alive = self.tell(Side::Agent, input, &hello);
        self.relay.handle_dialled();
        let ack = HelloAck {
            magic: HELLO_MAGIC,
            version: 1,
            role: Role::MasterTarget,
            features: 0,
            target: TARGET,
            nonce: [7; 32],
        };
        alive
            && self.tell(Side::Target, input, &Message::HelloAck(ack))
            && self.tell(Side::Target, input, &Message::Welcome(Welcome { offers: 0 }))
    }

    /// OPEN_DISK up, GRANT down.
    fn open(&mut self, input: &mut Input<'_>) -> bool {
        let (id, size) = (disk(input), input.pick(&SIZES));
        let head = OpenDiskHead {
            disk: id,
            size_sectors: input.near(size),
            generation: GENERATION,
            lineage: LINEAGE,
            durable: Sequence::ZERO,
            grant_bytes: 0,
        };
        let grant = GrantHead {
            disk: id,
            generation: GENERATION,
            lineage: LINEAGE,
            durable: Sequence::ZERO,
            chain: CHAIN_START,
            pass: 1,
            mode: PassMode::Copy,
            range_count: 0,
            grant_bytes: 0,
        };
        self.tell(Side::Agent, input, &Message::OpenDisk(head, Bytes::new()))
            && self.tell(Side::Target, input, &Message::Grant(grant, Vec::new(), Bytes::new()))
    }

    fn credit(&mut self, input: &mut Input<'_>) -> bool {
        let id = disk(input);
        let base = self.credit.get(&id).copied().unwrap_or(0);
        let more = input.short() << 8;
        let limit = input.near(base.saturating_add(more));
        self.tell(Side::Target, input, &Message::Credit(Credit { disk: id, generation: GENERATION, limit }))
    }

    fn batch(&mut self, input: &mut Input<'_>) -> bool {
        let id = disk(input);
        let size = self.sizes.get(&id).copied().unwrap_or(0);
        let list = records(input, size, None);
        let records = mixed(input, list);
        let header = BatchHeader {
            disk: id,
            lineage: LINEAGE,
            generation: GENERATION,
            first_sequence: Sequence(self.sequence),
            chain: CHAIN_START,
            source_time: Timestamp(1),
            record_count: records.len() as u32,
            stretch: Stretch::Diff,
        };
        self.sequence += records.len() as u64;
        let body = damaged(input, &encode_batch(&header, &records).body());
        self.deliver(Side::Agent, FrameKind::Batch, body)
    }

    fn bulk(&mut self, input: &mut Input<'_>) -> bool {
        let id = disk(input);
        let size = self.sizes.get(&id).copied().unwrap_or(0);
        let cover = range(input, size, 8192);
        let list = if cover.is_empty() { Vec::new() } else { records(input, size, Some(cover)) };
        let records = mixed(input, list);
        let header = BulkHeader {
            disk: id,
            lineage: LINEAGE,
            generation: GENERATION,
            pass: 1,
            as_of: Sequence(self.sequence),
            cover,
            record_count: records.len() as u32,
        };
        let body = damaged(input, &encode_bulk(&header, &records).body());
        self.deliver(Side::Agent, FrameKind::Bulk, body)
    }

    /// Messages that only pass through.
    fn chatter(&mut self, input: &mut Input<'_>) -> bool {
        let disk = disk(input);
        let at = Sequence(self.sequence);
        let generation = GENERATION;
        match input.byte() % 3 {
            0 => {
                let ack =
                    Ack { disk, generation, received: at, durable: at, applied: at, marked: at, mark: 0 };
                self.tell(Side::Target, input, &Message::Ack(ack))
            }
            1 => {
                let size_sectors = input.pick(&SIZES);
                let head = OfferHead { disk, source: [5; 16], size_sectors, generation, grant_bytes: 0 };
                self.tell(Side::Target, input, &Message::Offer(head, Bytes::new()))
            }
            _ => self.tell(Side::Agent, input, &Message::PassEnd(PassEnd { disk, generation, pass: 1 })),
        }
    }

    /// Ends one compression job, any of them.
    fn recode(&mut self, input: &mut Input<'_>) {
        if !self.jobs.is_empty() {
            let (job, records) = self.jobs.swap_remove(usize::from(input.byte()) % self.jobs.len());
            self.relay.handle_recoded(job, &mixed(input, records));
        }
        self.drain();
    }

    fn forwarded(&mut self) {
        if let Some((disk, cost)) = self.sent.pop_front() {
            self.held -= cost;
            self.relay.handle_forwarded(disk, cost);
        }
        self.drain();
    }

    fn tell(&mut self, from: Side, input: &mut Input<'_>, message: &Message) -> bool {
        let (kind, body) = sent(input, message);
        self.deliver(from, kind, body)
    }

    fn deliver(&mut self, from: Side, kind: FrameKind, body: Bytes) -> bool {
        if body.len() > kind.body_bytes_max() as usize {
            return true; // its frame header would have been refused
        }
        let held = self.relay.held_bytes();
        if self.relay.handle_frame(from, kind, body.clone()).is_err() {
            assert_eq!(self.relay.held_bytes(), held, "a refused frame is held");
            return false;
        }
        match (from, kind) {
            (Side::Agent, FrameKind::Batch) => {
                let (header, records) = decode_batch(body).expect("accepted");
                self.accepted(
                    header.disk,
                    header.generation,
                    Lane::Delta(header.disk),
                    canon(&header.to_bytes(), &records),
                    &records,
                );
            }
            (Side::Agent, FrameKind::Bulk) => {
                let (header, records) = decode_bulk(body).expect("accepted");
                self.accepted(
                    header.disk,
                    header.generation,
                    Lane::Bulk(header.disk),
                    canon(&header.to_bytes(), &records),
                    &records,
                );
            }
            (Side::Agent, FrameKind::OpenDisk) => {
                if let Ok(Message::OpenDisk(head, _)) = Message::decode(kind, &body) {
                    self.sizes.insert(head.disk, head.size_sectors);
                }
            }
            (Side::Target, FrameKind::Grant) => {
                if let Ok(Message::Grant(head, ..)) = Message::decode(kind, &body) {
                    self.granted.insert(head.disk, head.generation);
                }
            }
            (Side::Target, FrameKind::Credit) => {
                if let Ok(Message::Credit(credit)) = Message::decode(kind, &body) {
                    let most = self.credit.entry(credit.disk).or_default();
                    *most = credit.limit.max(*most);
                }
            }
            _ => {}
        }
        self.drain();
        true
    }

    /// Of another generation than the granted one it is dropped, otherwise held until it left.
    fn accepted(
        &mut self,
        disk: DiskId,
        generation: Generation,
        lane: Lane,
        canon: Canon,
        records: &[Record],
    ) {
        if self.granted.get(&disk) != Some(&generation) {
            return;
        }
        self.held += credit_cost(records);
        self.lanes.entry(lane).or_default().push_back(canon);
    }

    fn drain(&mut self) {
        for burst in 0.. {
            assert!(burst < BURST_MAX, "one step caused too much");
            match self.relay.poll_action() {
                None => break,
                Some(RelayAction::Dial(_)) => {}
                Some(RelayAction::Recode { job, records }) => self.jobs.push((job, records)),
                Some(RelayAction::Forward { to: Side::Target, outgoing, disk, cost }) => {
                    self.leaves(&outgoing);
                    self.sent.push_back((disk, cost));
                }
                Some(RelayAction::Forward { to: Side::Agent, outgoing, .. }) => self.returns(&outgoing),
            }
        }
        assert_eq!(self.relay.held_bytes(), self.held);
    }

    fn leaves(&mut self, outgoing: &Outgoing) {
        let (kind, body) = (outgoing.frame.kind(), outgoing.frame.body());
        let left = match kind {
            FrameKind::Batch => {
                let (header, records) = decode_batch(body).expect("a batch the target would refuse");
                canon(&header.to_bytes(), &records)
            }
            FrameKind::Bulk => {
                let (header, records) = decode_bulk(body).expect("a batch the target would refuse");
                canon(&header.to_bytes(), &records)
            }
            _ => return,
        };
        let came = self.lanes.get_mut(&outgoing.lane).and_then(VecDeque::pop_front);
        assert_eq!(came, Some(left), "a batch was reordered, altered or made up");
    }

    fn returns(&self, outgoing: &Outgoing) {
        assert_eq!(outgoing.lane, Lane::Control);
        if outgoing.frame.kind() == FrameKind::Credit
            && let Ok(Message::Credit(credit)) = Message::decode(FrameKind::Credit, &outgoing.frame.body())
        {
            let given = self.credit.get(&credit.disk).copied().unwrap_or(0);
            assert!(credit.limit <= given, "{} of {given} bytes of credit passed on", credit.limit);
        }
    }
}

/// The records with some raw payloads as zstd frames: one run-length block, which is what `script::records` makes.
fn mixed(input: &mut Input<'_>, records: Vec<Record>) -> Vec<Record> {
    let recode = |record: Record| match record.codec() {
        Codec::Raw if input.byte() < 160 => {
            let stored = run_length_frame(record.payload());
            if stored.len() < record.payload().len() { record.recoded(stored.into()) } else { record }
        }
        _ => record,
    };
    records.into_iter().map(recode).collect()
}

/// A zstd frame of one run-length block of `plain`'s first byte; `plain` is no longer than a block of zstd.
fn run_length_frame(plain: &[u8]) -> Vec<u8> {
    let len = plain.len() as u32;
    let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0]; // single segment, content size in four bytes
    out.extend(len.to_le_bytes());
    out.extend(&(len << 3 | 0b11).to_le_bytes()[..3]); // last block, run length
    out.push(plain.first().copied().unwrap_or(0));
    out
}

fn canon(head: &[u8], records: &[Record]) -> Canon {
    let header = BatchHeader {
        disk: DiskId::NONE,
        lineage: LINEAGE,
        generation: GENERATION,
        first_sequence: Sequence(1),
        chain: CHAIN_START,
        source_time: Timestamp(0),
        record_count: records.len() as u32,
        stretch: Stretch::Diff,
    };
    (head.to_vec(), header.chain_after(records))
}

/// The largest range a record of these scripts covers stays inside a zstd block.
const _: () = assert!(SectorRange { start: 0, end: 256 }.bytes() <= 128 << 10);
