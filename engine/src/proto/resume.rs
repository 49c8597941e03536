//! The decision table of a reconnect: what the agent does with the position the target reports.
//!
//! Invariants: first match wins; nothing is merged that does not share its history; every decision that costs a
//! compare names its cause (I10). Called by [`super::agent`] when GRANT arrives.

use crate::format::batch::Chain;
use crate::format::message::PassCause;
use crate::units::{LineageId, Sequence};

/// What the agent remembers of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ours {
    /// Its history, if it remembers one.
    pub lineage: Option<LineageId>,
    /// What it last knew to be durable.
    pub durable: Sequence,
    /// The last sequence it gave out.
    pub last: Sequence,
    /// The chain digest it computed at the target's durable sequence, if it still knows it.
    pub chain_there: Option<Chain>,
}

/// What the target reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Theirs {
    /// Its history.
    pub lineage: LineageId,
    /// Its durable sequence.
    pub durable: Sequence,
    /// The chain digest there.
    pub chain: Chain,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take over the target's position: the agent remembers nothing of this stream.
    Adopt,
    /// Send again from here.
    Continue {
        /// The first sequence to send.
        from: Sequence,
    },
    /// The target lost what it had called durable, and all of that is still here: send it again from here.
    Resend {
        /// The first sequence to send.
        from: Sequence,
    },
    /// Take over the target's position and compare the whole disk.
    Compare(PassCause),
}

/// Decides; first match wins.
#[must_use]
pub fn decide(ours: &Ours, theirs: &Theirs) -> Decision {
    let Some(lineage) = ours.lineage else {
        return Decision::Adopt; // the agent merely died, or meets this disk for the first time
    };
    if lineage != theirs.lineage {
        return Decision::Compare(PassCause::OtherLineage);
    }
    if theirs.durable < ours.durable {
        return match ours.chain_there {
            Some(chain) if chain == theirs.chain => Decision::Resend { from: theirs.durable.next() },
            _ => Decision::Compare(PassCause::TargetLostDurable),
        };
    }
    if theirs.durable > ours.last {
        return Decision::Compare(PassCause::TrackingLost); // the source went back in time
    }
    match ours.chain_there {
        Some(chain) if chain == theirs.chain => Decision::Continue { from: theirs.durable.next() },
        _ => Decision::Compare(PassCause::ChainMismatch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::batch::CHAIN_START;

    const A: LineageId = LineageId([1; 16]);
    const B: LineageId = LineageId([2; 16]);

    fn ours(lineage: Option<LineageId>, durable: u64, last: u64, chain: Option<Chain>) -> Ours {
        Ours { lineage, durable: Sequence(durable), last: Sequence(last), chain_there: chain }
    }

    #[test]
    fn every_row_of_the_table() {
        let theirs = Theirs { lineage: A, durable: Sequence(5), chain: CHAIN_START };
        let chain = Some(CHAIN_START);
        let rows = [
            ("forgot everything", ours(None, 0, 0, None), Decision::Adopt),
            ("same point", ours(Some(A), 5, 5, chain), Decision::Continue { from: Sequence(6) }),
            ("unacknowledged tail", ours(Some(A), 3, 9, chain), Decision::Continue { from: Sequence(6) }),
            ("target lost", ours(Some(A), 6, 9, chain), Decision::Resend { from: Sequence(6) }),
            (
                "target lost more than is kept",
                ours(Some(A), 6, 9, None),
                Decision::Compare(PassCause::TargetLostDurable),
            ),
            (
                "target lost and forked",
                ours(Some(A), 6, 9, Some([9; 16])),
                Decision::Compare(PassCause::TargetLostDurable),
            ),
            ("source went back", ours(Some(A), 3, 4, chain), Decision::Compare(PassCause::TrackingLost)),
            ("forked", ours(Some(A), 3, 9, Some([9; 16])), Decision::Compare(PassCause::ChainMismatch)),
            ("chain forgotten", ours(Some(A), 3, 9, None), Decision::Compare(PassCause::ChainMismatch)),
            ("other history", ours(Some(B), 5, 5, chain), Decision::Compare(PassCause::OtherLineage)),
        ];
        for (name, ours, expected) in rows {
            assert_eq!(decide(&ours, &theirs), expected, "{name}");
        }
    }
}
