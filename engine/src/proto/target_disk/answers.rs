//! What a disk answers its session: grants, acknowledgements, credit, refusals.
//!
//! Invariants: an acknowledgement names what a finished checkpoint recorded, never more (I5); credit is announced only
//! to the session that has the disk open; whoever may not write is told the generation in force (I9).
//! Units: sequences, sectors, credit cost in bytes. Called by the rest of `target_disk`.

use super::{Checkpoint, DiskAction, DiskNotice, SessionId, TargetDisk, TargetDiskPhase};
use crate::format::message::{
    Ack, BulkAckHead, Credit, ErrorCode, Fenced, GrantHead, Message, Nack, NackReason, PassState,
};
use crate::limits::RANGES_PER_MESSAGE_MAX;
use crate::mutants::{Mutant, mutant};
use crate::proto::credit::Window;
use crate::units::SectorRange;

impl TargetDisk {
    pub(super) fn acknowledge(&mut self, session: SessionId, done: &Checkpoint) {
        if !done.settled.is_empty() {
            let settled = if mutant(Mutant::BulkEarly) { &self.state.settled } else { &done.settled };
            let ranges: Vec<SectorRange> = settled.iter().collect();
            for part in ranges.chunks(RANGES_PER_MESSAGE_MAX) {
                let head = BulkAckHead {
                    disk: self.state.disk,
                    generation: self.state.generation,
                    pass: done.pass,
                    range_count: part.len() as u32,
                };
                self.reply(session, Message::BulkAck(head, part.to_vec()));
            }
        }
        self.ack(session);
        let current = done.pass == self.state.pass; // one that began since is announced when it is durable
        if current && (done.ends_pass || done.announces_pass) {
            self.reply(session, Message::PassState(self.pass_state()));
        }
        self.announce_credit();
    }

    pub(super) fn grant(&mut self, session: SessionId) {
        self.opening = None;
        self.session = Some(session);
        self.phase.become_state(TargetDiskPhase::Open);
        self.window = Window::new(self.limits);
        let mut settled = self.state.settled.clone();
        settled.truncate_to_longest(RANGES_PER_MESSAGE_MAX);
        let ranges: Vec<SectorRange> = settled.iter().collect();
        let head = GrantHead {
            disk: self.state.disk,
            generation: self.state.generation,
            lineage: self.state.lineage,
            durable: self.durable,
            chain: self.state.chain,
            pass: self.state.pass,
            mode: self.state.mode,
            range_count: ranges.len() as u32,
            grant_bytes: 0,
        };
        self.reply(session, Message::Grant(head, ranges, bytes::Bytes::new()));
        self.notices.push_back(DiskNotice::Opened(self.state.generation));
        self.announce_credit();
    }

    /// A batch that came with credit and will not be written.
    pub(super) fn window_dropped(&mut self, cost: u64) {
        self.window.dropped(cost);
        self.announce_credit();
    }

    pub(super) fn window_written(&mut self, cost: u64) {
        self.window.wrote(cost);
        self.announce_credit();
    }

    pub(super) fn announce_credit(&mut self) {
        let Some(session) = self.session else { return };
        if let Some(limit) = self.window.announce() {
            let credit = Credit { disk: self.state.disk, generation: self.state.generation, limit };
            self.reply(session, Message::Credit(credit));
        }
    }

    pub(super) fn ack(&mut self, session: SessionId) {
        let ack = Ack {
            disk: self.state.disk,
            generation: self.state.generation,
            received: self.received,
            durable: self.durable,
            applied: self.applied.unwrap_or(self.durable),
            marked: self.durable_marked,
            mark: self.durable_mark,
        };
        self.reply(session, Message::Ack(ack));
    }

    pub(super) fn nack(&mut self, session: SessionId, reason: NackReason) {
        let nack = Nack {
            disk: self.state.disk,
            generation: self.state.generation,
            resume_from: self.received.next(),
            reason,
        };
        self.reply(session, Message::Nack(nack));
    }

    /// Refuses a frame of a session that may not write. One that is just opening the disk sent it under its last grant:
    /// it gets its new one instead of words that it could take for the end.
    pub(super) fn fence(&mut self, session: SessionId) {
        if self.opening != Some(session) {
            self.reply(session, Message::Fenced(self.fenced()));
        }
    }

    pub(super) const fn fenced(&self) -> Fenced {
        Fenced { disk: self.state.disk, generation: self.state.generation }
    }

    pub(super) const fn pass_state(&self) -> PassState {
        PassState {
            disk: self.state.disk,
            generation: self.state.generation,
            pass: self.state.pass,
            mode: self.state.mode,
        }
    }

    pub(super) fn refuse(&mut self, session: SessionId, code: ErrorCode, text: &str) {
        self.reply(session, Message::error(self.state.disk, code, text));
    }

    /// Refuses and takes the disk away from a session that broke a rule; it must open the disk again.
    pub(super) fn expel(&mut self, session: SessionId, code: ErrorCode, text: &str) {
        self.refuse(session, code, text);
        self.session = None;
        self.phase.become_state(TargetDiskPhase::Closed);
    }

    pub(super) fn reply(&mut self, session: SessionId, message: Message) {
        self.replies.push_back(DiskAction::Reply { session, message });
    }
}
