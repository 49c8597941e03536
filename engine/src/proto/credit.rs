//! Credit: how many bytes a sender may have sent in all, so that memory and undurable data stay bounded end to end.
//!
//! Invariants: limits only grow within a session, so a lost or reordered CREDIT is harmless; the sender's `spent`
//! never passes its limit; the receiver treats passing it as a violation. Units: credit cost in bytes
//! ([`crate::format::batch::credit_cost`]).

use crate::format::batch::BATCH_COST_MAX;
use crate::limits::{PROGRESS_BYTES, PROGRESS_NANOS, UNDURABLE_BYTES_MAX, UNWRITTEN_BYTES_MAX};
use crate::mutants::{Mutant, mutant};

/// A new limit is announced when it grew by this part of the window.
const ANNOUNCE_PART: u64 = 8;

// A sender that has used all of its last limit must be able to send the dearest batch once everything is written, or
// it waits for ever.
const _: () = assert!(UNWRITTEN_BYTES_MAX - UNWRITTEN_BYTES_MAX / ANNOUNCE_PART >= BATCH_COST_MAX);

/// The sender's side.
#[derive(Clone, Copy, Debug, Default)]
pub struct Balance {
    limit: u64,
    spent: u64,
}

impl Balance {
    /// Takes a new limit; an older one is ignored.
    pub fn raise(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// Spends `cost` if the limit allows it.
    #[must_use = "an unpaid batch must not be sent"]
    pub fn spend(&mut self, cost: u64) -> bool {
        let allowed = self.spent + cost <= self.limit || mutant(Mutant::SpendBeyondCredit);
        if allowed {
            self.spent += cost;
        }
        allowed
    }
}

/// How much may be under way per disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowLimits {
    /// Accepted and not yet written: bounds memory, and what is sent twice after a kill.
    pub unwritten_bytes: u64,
    /// Accepted and not yet durable.
    pub undurable_bytes: u64,
    /// Progress is made durable after this much …
    pub flush_bytes: u64,
    /// … or this long after the first write.
    pub flush_nanos: u64,
}

impl Default for FlowLimits {
    fn default() -> Self {
        Self {
            unwritten_bytes: UNWRITTEN_BYTES_MAX,
            undurable_bytes: UNDURABLE_BYTES_MAX,
            flush_bytes: PROGRESS_BYTES,
            flush_nanos: PROGRESS_NANOS,
        }
    }
}

/// The target's side: what it accepted, wrote and made durable, and the limit that follows.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    limits: FlowLimits,
    accepted: u64,
    written: u64,
    durable: u64,
    announced: u64,
}

impl Window {
    /// A window of a new session.
    #[must_use]
    pub const fn new(limits: FlowLimits) -> Self {
        Self { limits, accepted: 0, written: 0, durable: 0, announced: 0 }
    }

    /// The limit in force: bounded by what is not yet written and by what is not yet durable.
    #[must_use]
    pub fn limit(&self) -> u64 {
        let twice = if mutant(Mutant::CreditTwice) { self.limits.unwritten_bytes } else { 0 };
        (self.written + self.limits.unwritten_bytes + twice).min(self.durable + self.limits.undurable_bytes)
    }

    /// Takes a batch; `false` when the peer had no credit for it.
    #[must_use = "a batch without credit is a violation"]
    pub fn accept(&mut self, cost: u64) -> bool {
        self.accepted += cost;
        self.accepted <= self.announced
    }

    /// Of what was accepted, `cost` is written.
    pub fn wrote(&mut self, cost: u64) {
        self.written += cost;
        debug_assert!(self.written <= self.accepted);
    }

    /// Of what was written, `cost` is durable.
    pub fn made_durable(&mut self, cost: u64) {
        self.durable += cost;
        debug_assert!(self.durable <= self.written);
    }

    /// Of what was accepted, `cost` will never be written: it was known already, or refused.
    pub fn dropped(&mut self, cost: u64) {
        self.wrote(cost);
        self.made_durable(cost);
    }

    /// The limit to announce, when it grew enough to be worth a message.
    #[must_use = "a limit taken here must be announced"]
    pub fn announce(&mut self) -> Option<u64> {
        let limit = self.limit();
        let step = self.limits.unwritten_bytes / ANNOUNCE_PART;
        if limit >= self.announced + step || self.announced == 0 {
            self.announced = limit;
            return Some(limit);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_opens_with_writes_and_closes_on_undurable_data() {
        let mut window = Window::new(FlowLimits::default());
        let first = window.announce().unwrap();
        assert_eq!(first, UNWRITTEN_BYTES_MAX);
        assert!(window.accept(first));
        assert!(window.announce().is_none());
        window.wrote(first);
        assert_eq!(window.announce(), Some(2 * UNWRITTEN_BYTES_MAX));
        let mut sent = first;
        while let Some(more) = Some(window.limit() - sent).filter(|more| *more > 0) {
            let _ = window.announce();
            assert!(window.accept(more));
            window.wrote(more);
            sent += more;
        }
        assert_eq!(sent, UNDURABLE_BYTES_MAX, "closed until something is durable");
        window.made_durable(sent);
        assert!(window.announce().is_some());
    }

    #[test]
    fn what_is_refused_costs_no_credit_for_ever() {
        let limits = FlowLimits { unwritten_bytes: 80, undurable_bytes: 100, ..FlowLimits::default() };
        let mut window = Window::new(limits);
        let mut sent = 0;
        for _ in 0..100 {
            let _ = window.announce();
            assert!(window.accept(40));
            window.dropped(40);
            sent += 40;
            assert_eq!(window.limit(), sent + 80);
        }
    }

    #[test]
    fn spending_beyond_the_limit_is_refused() {
        let mut balance = Balance::default();
        assert!(!balance.spend(1));
        balance.raise(10);
        balance.raise(5);
        assert!(balance.spend(10));
        assert!(!balance.spend(1));
    }
}
