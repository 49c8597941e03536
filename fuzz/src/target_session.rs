//! The target's session and disk cores against hostile agents, with a driver that obeys, is slow, fails or crashes.
//!
//! Checked after every step: no panic; `received ≥ durable ≥ applied` in every ACK (I5); a GRANT's generation and an
//! ACK's durable sequence are in the state last made durable; acknowledged bulk ranges are settled there; writes stay
//! on the disk; what one step causes is bounded.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::format::batch::{
    BatchHeader, BulkHeader, Stretch, credit_cost, decode_batch, decode_bulk, encode_batch, encode_bulk,
};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake::{Hello, Role};
use reprotect_engine::format::message::{
    Auth, CompareRequestHead, InventoryHead, Message, OpenDiskHead, PassBegin, PassCause, PassEnd, PassMode,
    PointDegrade, RefineUnit,
};
use reprotect_engine::format::wire::Text;
use reprotect_engine::proto::compare::answer;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::master_target::{DiskInput, SessionEvent, TargetSession, Transport};
use reprotect_engine::proto::target_disk::{DiskAction, SessionId, TargetDisk};
use reprotect_engine::units::{DiskId, Generation, LineageId, MonoTime, SectorRange, Sequence, Timestamp};

use crate::input::Input;
use crate::script::{
    AGENT, DISKS, FixedAuthority, RELAY, SIZES, STEPS_MAX, TARGET, chain, damaged, disk, lineage, mark,
    range, raw, records, sent, slot,
};

const LINEAGE: LineageId = LineageId([0x11; 16]);
/// Actions, events and frames one step may cause.
const BURST_MAX: usize = 4096;

/// A disk and its driver.
struct Disk {
    core: TargetDisk,
    /// Ordered and not yet executed.
    queue: VecDeque<DiskAction>,
    /// What is in the state file.
    stored: DiskState,
    /// Newest durable sequence seen of this core.
    durable: Sequence,
}

struct World {
    now: MonoTime,
    sessions: [Option<TargetSession>; 2],
    next_session: u64,
    disks: Vec<Disk>,
    limits: FlowLimits,
}

/// Runs one script.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let limits = FlowLimits {
        unwritten_bytes: 1 << 20,
        undurable_bytes: 4 << 20,
        flush_bytes: 256 << 10,
        flush_nanos: 1_000,
    };
    let disks = DISKS.iter().map(|id| {
        let (size, mode) = (input.pick(&SIZES), input.pick(PassMode::ALL));
        let stored = TargetDisk::new_state(*id, AGENT, [5; 16], size, LINEAGE, mode);
        let core = TargetDisk::new(stored.clone(), limits);
        Disk { core, queue: VecDeque::new(), stored, durable: Sequence::ZERO }
    });
    let disks = disks.collect();
    let mut world = World { now: MonoTime(1), sessions: [None, None], next_session: 1, disks, limits };
    world.connect(&mut input);
    for _ in 0..STEPS_MAX {
        let Some(step) = input.step() else { break };
        world.step(step, &mut input);
        world.drain();
    }
}

impl World {
    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step % 17 {
            0 => self.connect(input),
            1 => self.hello(input),
            2 => {
                let slot = slot(input);
                let head = InventoryHead { host_name: Text::new("m"), disk_count: 0 };
                self.tell(slot, input, &Message::Inventory(head, Vec::new()));
            }
            3 => {
                let (kind, body) = raw(input);
                self.deliver(slot(input), kind, body);
            }
            4 => self.open(input),
            5 => self.batch(input),
            6 => self.bulk(input),
            7 => self.mark(input),
            8 => self.compare(input),
            9 | 10 => self.pass(step % 17 == 9, input),
            11 => self.lose(usize::from(input.byte() % 2)),
            12 => (0..=input.byte() % 32).for_each(|_| self.execute(input)),
            13 => {
                self.now = self.now.plus_nanos(input.short() * 64);
                for disk in &mut self.disks {
                    disk.core.handle_timeout(self.now);
                }
                for slot in 0..2 {
                    let late =
                        self.sessions[slot].as_mut().is_some_and(|s| s.handle_timeout(self.now).is_err());
                    if late {
                        self.lose(slot);
                    }
                }
            }
            14 => self.disks[usize::from(input.byte() % 2)].core.handle_full("full"),
            15 if input.byte() > 200 => {
                let disk = &mut self.disks[slot(input)];
                disk.core.handle_failed("broken");
                disk.queue.clear();
            }
            _ if input.byte() > 128 => self.crash(),
            _ => self.degrade(input),
        }
    }

    /// A session with its handshake and offers.
    fn connect(&mut self, input: &mut Input<'_>) {
        let slot = slot(input);
        self.lose(slot);
        let direct = input.byte() < 128;
        let transport = if direct {
            Transport { role: Role::Agent, peer: AGENT }
        } else {
            Transport { role: Role::ProcessServer, peer: RELAY }
        };
        let id = SessionId(self.next_session);
        self.next_session += 1;
        let authority = Arc::new(FixedAuthority);
        self.sessions[slot] = Some(TargetSession::new(id, TARGET, transport, authority, [7; 32], self.now));
        let hello = Hello { relays: u8::from(!direct), ..Hello::new(AGENT, TARGET, [1; 16]) };
        self.tell(slot, input, &Message::Hello(hello));
        let auth = Auth { agent: AGENT, signature: Bytes::from_static(b"me"), certificates: Vec::new() };
        self.tell(slot, input, &Message::Auth(auth));
        if input.byte() < 200 {
            self.open(input);
            self.drain();
            (0..4).for_each(|_| self.execute(input));
        }
    }

    fn hello(&mut self, input: &mut Input<'_>) {
        let slot = slot(input);
        let hello =
            Hello { relays: input.byte() % 3, required: input.near(0), ..Hello::new(AGENT, TARGET, [1; 16]) };
        self.tell(slot, input, &Message::Hello(hello));
    }

    fn open(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let generation = Generation(input.near(state.generation.0));
        let head = OpenDiskHead {
            disk: id,
            size_sectors: input.near(state.size_sectors),
            generation,
            lineage: lineage(input, LINEAGE),
            durable: state.sequence,
            grant_bytes: 8,
        };
        let grant = Bytes::copy_from_slice(&generation.0.to_le_bytes());
        self.tell(slot, input, &Message::OpenDisk(head, grant));
    }

    fn batch(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let records = records(input, state.size_sectors, None);
        let header = BatchHeader {
            disk: id,
            lineage: lineage(input, state.lineage),
            generation: Generation(input.near(state.generation.0)),
            first_sequence: Sequence(input.near(state.sequence.0 + 1)),
            chain: chain(input, state.chain),
            source_time: Timestamp(1),
            record_count: records.len() as u32,
            stretch: input.pick(Stretch::ALL),
        };
        let body = damaged(input, &encode_batch(&header, &records).body());
        self.deliver(slot, FrameKind::Batch, body);
    }

    fn bulk(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let whole = state.size_sectors <= 8192 && input.byte() < 64;
        let cover = if whole { state.whole() } else { range(input, state.size_sectors, 8192) };
        let records =
            if cover.is_empty() { Vec::new() } else { records(input, state.size_sectors, Some(cover)) };
        let header = BulkHeader {
            disk: id,
            lineage: state.lineage,
            generation: Generation(input.near(state.generation.0)),
            pass: input.near(state.pass),
            as_of: state.sequence,
            cover,
            record_count: records.len() as u32,
        };
        let body = damaged(input, &encode_bulk(&header, &records).body());
        self.deliver(slot, FrameKind::Bulk, body);
    }

    fn degrade(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let (generation, last) = (state.generation.0, state.sequence.0);
        let degrade = PointDegrade {
            disk: id,
            lineage: lineage(input, LINEAGE),
            generation: Generation(input.near(generation)),
            from: Sequence(input.near(last)),
            to: Sequence(input.near(last)),
            cause: Text::new("fuzz"),
        };
        self.tell(slot, input, &Message::PointDegrade(degrade));
    }

    fn mark(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let at = (state.lineage, state.generation, state.sequence, state.chain);
        let mark = mark(input, id, at);
        self.tell(slot, input, &Message::Mark(mark));
    }

    fn compare(&mut self, input: &mut Input<'_>) {
        let (slot, id) = (slot(input), disk(input));
        let Some(state) = self.state(id) else { return };
        let crcs = [u32::from(input.byte()); 16];
        let units = (0..input.byte() % 4).map(|at| RefineUnit { unit: u16::from(at) * 21, crcs });
        let units: Vec<RefineUnit> = units.collect();
        let head = CompareRequestHead {
            disk: id,
            generation: Generation(input.near(state.generation.0)),
            request: 1,
            range: range(input, state.size_sectors, 8192),
            unit_count: units.len() as u16,
        };
        self.tell(slot, input, &Message::CompareRequest(head, units));
    }

    fn pass(&mut self, begin: bool, input: &mut Input<'_>) {
        let (slot, disk) = (slot(input), disk(input));
        let Some(state) = self.state(disk) else { return };
        let generation = Generation(input.near(state.generation.0));
        let message = if begin {
            Message::PassBegin(PassBegin { disk, generation, cause: input.pick(PassCause::ALL) })
        } else {
            Message::PassEnd(PassEnd { disk, generation, pass: input.near(state.pass) })
        };
        self.tell(slot, input, &message);
    }

    /// The daemon dies: sessions, queues and cores are gone, the state files are not.
    fn crash(&mut self) {
        self.sessions = [None, None];
        for disk in &mut self.disks {
            disk.core = TargetDisk::new(disk.stored.clone(), self.limits);
            disk.queue.clear();
            disk.durable = disk.core.durable();
        }
    }

    fn lose(&mut self, slot: usize) {
        if let Some(session) = self.sessions[slot].take() {
            for disk in &mut self.disks {
                disk.core.handle_session_lost(self.now, session.id());
            }
        }
    }

    fn state(&self, id: DiskId) -> Option<DiskState> {
        self.disks.iter().find(|disk| disk.stored.disk == id).map(|disk| disk.core.state().clone())
    }

    fn tell(&mut self, slot: usize, input: &mut Input<'_>, message: &Message) {
        let (kind, body) = sent(input, message);
        self.deliver(slot, kind, body);
    }

    fn deliver(&mut self, slot: usize, kind: FrameKind, body: Bytes) {
        let Some(session) = &mut self.sessions[slot] else { return };
        if body.len() > kind.body_bytes_max() as usize {
            return; // its frame header would have been refused
        }
        if session.handle_frame(kind, body).is_err() {
            return self.lose(slot);
        }
        self.events(slot);
    }

    fn events(&mut self, slot: usize) {
        while let Some((event, id)) =
            self.sessions[slot].as_mut().and_then(|session| Some((session.poll_event()?, session.id())))
        {
            match event {
                SessionEvent::Ready { .. } => {
                    for disk in &self.disks {
                        let state = disk.core.state();
                        if let Some(session) = &mut self.sessions[slot] {
                            session.offer(state.disk, state.source, state.size_sectors, state.generation);
                        }
                    }
                }
                SessionEvent::ToDisk(disk, input) => self.hand_over(id, disk, input),
                SessionEvent::Inventory { .. } | SessionEvent::MarkRefused(_) | SessionEvent::Grow(_) => {}
            }
        }
    }

    fn hand_over(&mut self, session: SessionId, id: DiskId, input: DiskInput) {
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.stored.disk == id) else { return };
        let sound = |records: &[Record]| records.iter().all(|record| record.check_stored().is_ok());
        let (core, now) = (&mut disk.core, self.now);
        match input {
            DiskInput::Open(open) => core.handle_open(now, session, &open),
            DiskInput::Batch(body) => match decode_batch(body) {
                Ok((header, records)) if sound(&records) => core.handle_batch(now, session, &header, records),
                Ok((header, records)) => {
                    core.handle_damaged(session, header.generation, credit_cost(&records));
                }
                Err(_) => {} // the driver ends the session
            },
            DiskInput::Bulk(body) => {
                if let Ok((header, records)) = decode_bulk(body)
                    && sound(&records)
                {
                    core.handle_bulk(now, session, &header, records);
                }
            }
            DiskInput::Mark(mark) => core.handle_mark(now, session, &mark),
            DiskInput::PointDegrade(degrade) => {
                let told = core.handle_degrade(session, &degrade);
                assert!(
                    !told || degrade.generation == core.state().generation,
                    "an older generation is believed"
                );
            }
            DiskInput::Compare(request, units) => core.handle_compare(session, request, units),
            DiskInput::PassBegin(begin) => core.handle_pass_begin(now, session, &begin),
            DiskInput::PassEnd(end) => core.handle_pass_end(now, session, &end),
        }
    }

    /// Moves what the cores want into the drivers' queues, and frames out.
    fn drain(&mut self) {
        let mut burst = 0;
        for disk in &mut self.disks {
            while let Some(action) = disk.core.poll_action() {
                burst += 1;
                disk.queue.push_back(action);
            }
            while disk.core.poll_notice().is_some() {
                burst += 1;
            }
            let (durable, state) = (disk.core.durable(), disk.core.state());
            assert!(
                disk.durable <= durable && durable <= state.sequence,
                "durable went {} to {durable}",
                disk.durable
            );
            disk.durable = durable;
            assert_eq!(DiskState::decode(&state.to_bytes()).as_ref(), Ok(state));
        }
        for session in self.sessions.iter_mut().flatten() {
            while let Some(outgoing) = session.poll_transmit() {
                burst += 1;
                let frame = outgoing.frame;
                assert!(
                    Message::decode(frame.kind(), &frame.body()).is_ok(),
                    "a frame the agent would refuse"
                );
            }
        }
        assert!(burst < BURST_MAX, "one step caused {burst} things");
    }

    /// Executes the oldest action of one disk.
    fn execute(&mut self, input: &mut Input<'_>) {
        let disk = &mut self.disks[slot(input)];
        let Some(action) = disk.queue.pop_front() else { return };
        match action {
            DiskAction::Write { pieces, cost } => {
                for piece in pieces {
                    assert!(disk.stored.whole().contains(piece.record.range()));
                    assert!(piece.keep.iter().all(|keep| piece.record.range().contains(*keep)));
                }
                disk.core.handle_written(cost);
            }
            DiskAction::Hash { session, request, units } => {
                let data = vec![0; request.range.bytes() as usize];
                disk.core.handle_hashed(session, &request, answer(&units, &data));
            }
            DiskAction::Checkpoint { state } => {
                disk.stored =
                    DiskState::decode(&state.to_bytes()).expect("a state that is refused when read back");
                disk.core.handle_checkpointed(self.now);
            }
            DiskAction::Reply { session, message } => {
                check_reply(&disk.stored, &message);
                let size = disk.stored.size_sectors;
                let owner = self.sessions.iter_mut().flatten().find(|owner| owner.id() == session);
                if let Some(owner) = owner {
                    owner.send_reply(message, size);
                }
            }
        }
        self.drain();
    }
}

/// What is promised must be in the state file.
fn check_reply(stored: &DiskState, message: &Message) {
    match message {
        Message::Ack(ack) => {
            assert!(ack.received >= ack.durable && ack.durable >= ack.applied, "{ack:?}");
            assert!(ack.marked <= ack.durable && ack.durable <= stored.sequence, "{ack:?}");
        }
        Message::Grant(head, ranges, _) => {
            assert!(head.generation <= stored.generation, "a grant before its generation is durable");
            assert!(head.durable <= stored.sequence);
            if head.pass == stored.pass && head.mode == stored.mode {
                check_settled(stored, ranges);
            }
        }
        Message::BulkAck(head, ranges) if head.pass == stored.pass && stored.mode != PassMode::Done => {
            check_settled(stored, ranges);
        }
        _ => {}
    }
}

fn check_settled(stored: &DiskState, ranges: &[SectorRange]) {
    for range in ranges {
        assert!(stored.settled.contains(*range), "{range} were acknowledged and are not settled durably");
    }
}
