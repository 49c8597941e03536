//! Driver of the process server's core: two connections a session and compression jobs that end in any order.
//!
//! Invariant: holds nothing that a crash would cost. Called by `sim::world`.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::agent::agent_id;
use super::codec::recode;
use super::network::Endpoint;
use super::world::{Event, World};
use crate::format::batch::credit_cost;
use crate::format::extent::{Codec, Record};
use crate::format::frame::FrameKind;
use crate::format::message::Message;
use crate::limits::HANDSHAKE_NANOS_MAX;
use crate::proto::process_server::{RelayAction, RelaySession, Side};
use crate::units::{DiskId, MonoTime};

/// A process server.
pub(super) struct RelayNode {
    pub(super) alive: bool,
    sessions: BTreeMap<u64, RelayedSession>,
}

struct RelayedSession {
    core: RelaySession,
    down: u64,
    up: Option<u64>,
}

impl RelayNode {
    pub(super) const fn new() -> Self {
        Self { alive: true, sessions: BTreeMap::new() }
    }
}

impl World {
    /// An agent connects.
    pub(super) fn relay_accepts(&mut self, relay: usize, from: Endpoint, identity: usize) -> Option<u64> {
        if !self.relays[relay].alive {
            return None;
        }
        let session = self.fresh_name();
        let down = self.net.connect(self.now, from, Endpoint::RelayDown(relay, session))?;
        let now = MonoTime(self.now);
        let core = RelaySession::new(agent_id(identity), self.plan.relay_window_bytes, now);
        self.relays[relay].sessions.insert(session, RelayedSession { core, down, up: None });
        self.after(HANDSHAKE_NANOS_MAX, Event::RelayTimeout { relay, session });
        Some(down)
    }

    pub(super) fn relay_gets(
        &mut self,
        relay: usize,
        session: u64,
        from_agent: bool,
        kind: FrameKind,
        body: Bytes,
    ) {
        let Some(state) = self.relays[relay].sessions.get_mut(&session) else { return };
        let side = if from_agent { Side::Agent } else { Side::Target };
        if let Err(error) = state.core.handle_frame(side, kind, body) {
            let (down, message) =
                (state.down, Message::error(DiskId::NONE, error.code(), &error.to_string()));
            self.note(|| format!("relay{relay} ends session {session}: {error}"));
            self.send(down, 1, &crate::proto::Outgoing::control(message.encode()));
            return self.relay_ends(relay, session);
        }
        self.relay_pump(relay, session);
    }

    fn relay_pump(&mut self, relay: usize, session: u64) {
        loop {
            let Some(state) = self.relays[relay].sessions.get_mut(&session) else { return };
            let Some(action) = state.core.poll_action() else { break };
            let (down, up) = (state.down, state.up);
            match action {
                RelayAction::Dial(_) => {
                    let delay = self.rng.below(20_000_000);
                    self.after(delay, Event::RelayDial { relay, session });
                }
                RelayAction::Recode { job, records } => {
                    let delay = self.rng.below(5_000_000);
                    self.after(delay, Event::RelayJob { relay, session, job, records });
                }
                RelayAction::Forward { to, outgoing, disk, cost } => {
                    match (to, up) {
                        (Side::Agent, _) => self.send(down, 1, &outgoing),
                        (Side::Target, Some(up)) => self.send(up, 0, &outgoing),
                        (Side::Target, None) => {}
                    }
                    let delay = self.rng.below(3_000_000);
                    self.after(delay, Event::RelaySent { relay, session, disk, cost });
                }
            }
        }
        if let Some(state) = self.relays[relay].sessions.get(&session) {
            let limit = self.plan.relay_window_bytes * self.sources.len() as u64;
            self.checker.bounded("a relay", 0, state.core.held_bytes(), limit);
        }
    }

    pub(super) fn relay_dials(&mut self, relay: usize, session: u64) {
        if !self.relays[relay].sessions.contains_key(&session) {
            return;
        }
        let up = self.target_accepts_relay(Endpoint::RelayUp(relay, session));
        let Some(up) = up else { return self.relay_ends(relay, session) };
        if let Some(state) = self.relays[relay].sessions.get_mut(&session) {
            state.up = Some(up);
            state.core.handle_dialled();
        }
        self.relay_pump(relay, session);
    }

    pub(super) fn relay_job_done(&mut self, relay: usize, session: u64, job: u64, records: &[Record]) {
        if !self.relays[relay].sessions.contains_key(&session) {
            return;
        }
        let mut out = Vec::with_capacity(records.len());
        for record in records {
            let wanted = self.plan.compress && record.codec() == Codec::Raw && self.rng.chance(500);
            out.push(if wanted { recode(record) } else { record.clone() });
        }
        self.count("relayed bytes", credit_cost(&out));
        if let Some(state) = self.relays[relay].sessions.get_mut(&session) {
            state.core.handle_recoded(job, &out);
        }
        self.relay_pump(relay, session);
    }

    pub(super) fn relay_sent(&mut self, relay: usize, session: u64, disk: DiskId, cost: u64) {
        if let Some(state) = self.relays[relay].sessions.get_mut(&session) {
            state.core.handle_forwarded(disk, cost);
            self.relay_pump(relay, session);
        }
    }

    pub(super) fn relay_timeout(&mut self, relay: usize, session: u64) {
        let now = MonoTime(self.now);
        if let Some(state) = self.relays[relay].sessions.get_mut(&session)
            && state.core.handle_timeout(now).is_err()
        {
            self.relay_ends(relay, session);
        }
    }

    /// One side is gone: the other one goes too.
    pub(super) fn relay_ends(&mut self, relay: usize, session: u64) {
        let Some(state) = self.relays[relay].sessions.remove(&session) else { return };
        self.leave(state.down, 1);
        if let Some(up) = state.up {
            self.leave(up, 0);
        }
    }

    pub(super) fn relay_crashes(&mut self, relay: usize) {
        if !self.relays[relay].alive {
            return;
        }
        self.note(|| format!("relay{relay} crashes"));
        self.count("relay crashes", 1);
        self.relays[relay].alive = false;
        let sessions: Vec<u64> = self.relays[relay].sessions.keys().copied().collect();
        for session in sessions {
            self.relay_ends(relay, session);
        }
        let delay = self.rng.between(1_000_000, 2_000_000_000);
        self.after(delay, Event::RelayStart { relay });
    }
}
