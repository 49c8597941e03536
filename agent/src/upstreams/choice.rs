//! Which peer serves best: the order in which they are tried, and when it is worth to move.
//!
//! Invariants: pure; who can be reached, has room and reaches the target comes before who does not; of those, process servers
//! (which compress) before the master target itself; of those, who is near before who is far, by powers of two, so that
//! noise moves nobody; of those, who is less busy; of those, each agent has an order of its own, so that many agents spread.
//! A move needs a clear advantage that lasts. Called by [`super`].

use std::cmp::Reverse;
use std::time::Duration;

use reprotect_engine::format::standby::{Load, ROUND_TRIP_NONE, ROUND_TRIP_UNKNOWN};

/// What is known of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nothing yet.
    #[default]
    Unknown,
    /// It answered.
    Reached {
        /// The round trip to it.
        round_trip: Duration,
        /// What it said.
        load: Load,
    },
    /// It cannot be had, and why.
    Lost(String),
}

impl Way {
    /// The round trip to the target: through this peer, as far as it knows.
    pub(crate) fn to_target(&self) -> Option<Duration> {
        let Self::Reached { round_trip, load } = self else { return None };
        match load.target_micros {
            ROUND_TRIP_NONE => None,
            ROUND_TRIP_UNKNOWN => Some(*round_trip),
            micros => Some(*round_trip + Duration::from_micros(micros.into())),
        }
    }

    const fn accepts(&self) -> bool {
        matches!(self, Self::Reached { load, .. } if load.accepts)
    }

    /// Whether a session could go on over it.
    pub(crate) fn is_usable(&self) -> bool {
        self.accepts() && self.to_target().is_some()
    }

    /// Whether it is the master target itself.
    const fn is_target(&self) -> bool {
        matches!(self, Self::Reached { load, .. } if load.target_micros == 0)
    }

    fn class(&self) -> u8 {
        match self {
            _ if self.is_usable() => u8::from(self.is_target()),
            Self::Unknown => 2,
            Self::Reached { .. } if self.to_target().is_some() => 3, // full
            Self::Reached { .. } => 4,
            Self::Lost(_) => 5,
        }
    }
}

/// What orders peers; the least is tried first. `own` is this agent's number for the peer.
pub(crate) fn rank(way: &Way, own: u64) -> impl Ord + use<> {
    // Below 2 ms all are near.
    let distance = way.to_target().map_or(u32::MAX, |time| (time.as_millis() / 2 + 1).ilog2());
    let (room, sessions) = match way {
        Way::Reached { load, .. } => (load.room_permille / 250, load.sessions.saturating_add(1).ilog2()),
        _ => (0, 0),
    };
    (way.class(), distance, Reverse(room), sessions, own)
}

/// For how long `other` must have been better than `active` until it is worth to move there; none for never.
///
/// `waited` is how long the active one owes an answer: one that is stuck is as far as that.
pub(crate) fn worth_after(active: &Way, waited: Duration, other: &Way) -> Option<Duration> {
    if !other.is_usable() {
        return None;
    }
    let there = other.to_target()?;
    let Some(here) = active.to_target() else {
        // The active one cannot reach the target, or nothing is known of it: a session is there, so the latter is new.
        return (*active != Way::Unknown).then_some(AFTER_SLOW);
    };
    let here = here.max(waited);
    if here > 4 * there + Duration::from_millis(50) {
        Some(AFTER_SLOW)
    } else if active.is_target() && !other.is_target() {
        (there <= 2 * here + Duration::from_millis(20)).then_some(AFTER_BETTER)
    } else if here > 2 * there + Duration::from_millis(20) && active.is_target() == other.is_target() {
        Some(AFTER_BETTER)
    } else {
        None
    }
}

/// How long a peer may be slow.
const AFTER_SLOW: Duration = Duration::from_secs(5);
/// How long another must have been clearly nearer.
const AFTER_BETTER: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a round trip behind it, it is the target itself.
    fn way(millis: u64, target_micros: u32, accepts: bool, sessions: u32, room_permille: u16) -> Way {
        let load = Load { token: 0, target_micros, sessions, room_permille, accepts };
        Way::Reached { round_trip: Duration::from_millis(millis), load }
    }

    #[test]
    fn every_row_of_the_order() {
        let rows = [
            ("a relay near by", way(1, 500, true, 0, 1000)),
            ("one with less room", way(1, 500, true, 0, 300)),
            ("a busy one", way(1, 500, true, 40, 300)),
            ("a far one with room", way(9, 500, true, 0, 1000)),
            ("one far from its target", way(1, 90_000, true, 0, 1000)),
            ("the master target itself", way(1, 0, true, 0, 1000)),
            ("nobody knows yet", Way::Unknown),
            ("a full one", way(1, 500, false, 9, 0)),
            ("one that does not reach its target", way(1, ROUND_TRIP_NONE, true, 0, 1000)),
            ("a dead one", Way::Lost("no answer".to_owned())),
        ];
        for pair in rows.windows(2) {
            let [better, worse] = pair else { unreachable!() };
            assert!(rank(&better.1, 9) < rank(&worse.1, 0), "{} comes before {}", better.0, worse.0);
        }
    }

    #[test]
    fn alike_peers_are_ordered_by_the_agent_itself() {
        let (one, two) = (way(1, 500, true, 2, 1000), way(1, 700, true, 2, 1000));
        assert!(rank(&one, 1) < rank(&two, 2) && rank(&two, 1) < rank(&one, 2));
    }

    #[test]
    fn every_row_of_the_reasons_to_move() {
        let relay = |millis| way(millis, 1, true, 0, 1000);
        let (now, near, far, target) = (Duration::ZERO, relay(2), relay(200), way(2, 0, true, 0, 1000));
        let rows = [
            ("as near", &near, now, &near, None),
            ("the other is farther", &near, now, &far, None),
            ("far and slow", &far, now, &near, Some(AFTER_SLOW)),
            ("clearly nearer", &relay(40), now, &near, Some(AFTER_BETTER)),
            ("a little nearer", &relay(8), now, &near, None),
            ("stuck", &near, Duration::from_secs(1), &near, Some(AFTER_SLOW)),
            ("its target is gone", &way(2, ROUND_TRIP_NONE, true, 0, 1000), now, &near, Some(AFTER_SLOW)),
            ("just begun", &Way::Unknown, now, &near, None),
            ("the other is full", &far, now, &way(2, 1, false, 0, 0), None),
            ("the other is lost", &far, now, &Way::Lost(String::new()), None),
            ("a process server is back", &target, now, &near, Some(AFTER_BETTER)),
            ("a process server is back, far away", &target, now, &far, None),
            ("the target itself is a little nearer", &relay(40), now, &target, None),
            ("far and slow, the target itself is near", &far, now, &target, Some(AFTER_SLOW)),
        ];
        for (name, active, waited, other, expected) in rows {
            assert_eq!(worth_after(active, waited, other), expected, "{name}");
        }
    }
}
