//! Connections of the simulated network: lanes that keep their own order and nothing else.
//!
//! Invariants: inside a lane and direction frames arrive in order, across lanes not; a severed connection delivers
//! nothing any more, but each end learns of it at its own time, and until then still believes and still sends.
//! Units: nanoseconds. Called by `sim::world` and the drivers.

use std::collections::BTreeMap;

use super::rng::Rng;
use crate::proto::Lane;
use crate::proto::target_disk::SessionId;

/// A machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Agent(usize),
    Relay(usize),
    Target,
}

/// Who is at an end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Agent(usize),
    RelayDown(usize, u64),
    RelayUp(usize, u64),
    Target(SessionId),
}

impl Endpoint {
    const fn node(self) -> Node {
        match self {
            Self::Agent(index) => Node::Agent(index),
            Self::RelayDown(relay, _) | Self::RelayUp(relay, _) => Node::Relay(relay),
            Self::Target(_) => Node::Target,
        }
    }
}

/// A connection; end 0 dialled.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ends: [Endpoint; 2],
    /// Whether each end still uses it.
    pub(super) open: [bool; 2],
    /// Nothing arrives any more.
    pub(super) severed: bool,
    /// When the last frame of a lane and direction arrives.
    last_arrival: BTreeMap<(usize, Lane), u64>,
    /// How slow each lane is: multiples of the usual delay.
    slowness: BTreeMap<(usize, Lane), u64>,
}

/// All connections and what is unreachable.
#[derive(Debug, Default)]
pub(super) struct Network {
    connections: BTreeMap<u64, Connection>,
    next: u64,
    /// Pairs that cannot reach each other, and until when.
    blocked: BTreeMap<(Node, Node), u64>,
    /// Usual delay.
    pub(super) delay_nanos: u64,
    /// How often (per mille) a frame takes far longer.
    pub(super) spike_per_mille: u64,
}

impl Network {
    pub(super) fn new(delay_nanos: u64, spike_per_mille: u64) -> Self {
        Self { delay_nanos, spike_per_mille, ..Self::default() }
    }

    /// Connects two ends, unless they cannot reach each other.
    pub(super) fn connect(&mut self, now: u64, from: Endpoint, to: Endpoint) -> Option<u64> {
        if self.is_blocked(now, from.node(), to.node()) {
            return None;
        }
        let id = self.next;
        self.next += 1;
        let connection = Connection {
            ends: [from, to],
            open: [true; 2],
            severed: false,
            last_arrival: BTreeMap::new(),
            slowness: BTreeMap::new(),
        };
        self.connections.insert(id, connection);
        Some(id)
    }

    fn is_blocked(&self, now: u64, a: Node, b: Node) -> bool {
        [(a, b), (b, a)].iter().any(|pair| self.blocked.get(pair).is_some_and(|until| now < *until))
    }

    /// Cuts two machines off from each other; answers the connections that break.
    pub(super) fn block(&mut self, a: Node, b: Node, until: u64) -> Vec<u64> {
        self.blocked.insert((a, b), until);
        let between = |connection: &Connection| {
            let (x, y) = (connection.ends[0].node(), connection.ends[1].node());
            (x, y) == (a, b) || (y, x) == (a, b)
        };
        self.live().into_iter().filter(|id| between(&self.connections[id])).collect()
    }

    /// Everybody reaches everybody.
    pub(super) fn heal(&mut self) {
        self.blocked.clear();
    }

    /// Connections that still carry frames.
    pub(super) fn live(&self) -> Vec<u64> {
        self.connections.iter().filter(|(_, c)| !c.severed).map(|(id, _)| *id).collect()
    }

    pub(super) fn get(&self, id: u64) -> Option<&Connection> {
        self.connections.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    /// Forgets a connection neither end uses.
    pub(super) fn forget_if_over(&mut self, id: u64) {
        if self.connections.get(&id).is_some_and(|connection| connection.open == [false; 2]) {
            self.connections.remove(&id);
        }
    }

    /// When a frame sent now arrives at the other end; `None` when it never does.
    pub(super) fn arrival(
        &mut self,
        rng: &mut Rng,
        now: u64,
        id: u64,
        from: usize,
        lane: Lane,
    ) -> Option<u64> {
        let (usual, spike) = (self.delay_nanos, self.spike_per_mille);
        let connection = self.connections.get_mut(&id)?;
        if connection.severed {
            return None;
        }
        let slow = *connection.slowness.entry((from, lane)).or_insert_with(|| rng.pick(&[1, 1, 1, 2, 8, 30]));
        let mut delay = rng.between(usual / 4, usual) * slow;
        if rng.chance(spike) {
            delay += rng.below(300_000_000);
        }
        let last = connection.last_arrival.entry((from, lane)).or_insert(0);
        *last = (now + delay).max(*last + 1);
        Some(*last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::DiskId;

    #[test]
    fn a_lane_keeps_its_order_and_lanes_overtake_each_other() {
        let mut net = Network::new(1000, 100);
        let mut overtaken = false;
        for seed in 0..20 {
            let mut rng = Rng::new(seed);
            let id = net.connect(0, Endpoint::Agent(0), Endpoint::Target(SessionId(seed))).unwrap();
            let mut last = [0, 0];
            for now in 0..200 {
                let lane = rng.below(2) as usize;
                let kind = [Lane::Control, Lane::Bulk(DiskId::NONE)][lane];
                let at = net.arrival(&mut rng, now, id, 0, kind).unwrap();
                assert!(at > last[lane]);
                last[lane] = at;
                overtaken |= at < last[1 - lane];
            }
        }
        assert!(overtaken);
    }

    #[test]
    fn a_partition_stops_dialling_until_it_heals() {
        let mut net = Network::default();
        let (agent, target) = (Endpoint::Agent(1), Endpoint::Target(SessionId(1)));
        let id = net.connect(0, agent, target).unwrap();
        assert_eq!(net.block(Node::Target, Node::Agent(1), 50), [id]);
        assert!(net.connect(49, agent, target).is_none());
        assert!(net.connect(50, agent, target).is_some());
    }
}
