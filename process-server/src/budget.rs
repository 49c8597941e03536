//! The memory of all relayed sessions together: who may hold how much, so that the sum never passes the budget.
//!
//! A relay holds two things for an agent. First, batches between the agent and the upstream transport, counted in
//! credit cost (plain bytes plus a block per record, more than they take once compressed): an agent sends only what
//! was announced, so what it has under way, what waits in the transport's receive buffers, and what is queued for
//! compression or sending are all covered by *one* window per open disk. Second, bytes handed to the upstream
//! transport and not yet acknowledged by the target: its send window, one per session. Both are shares of the budget.
//!
//! Invariants: the shares sum to at most the budget; an open disk has at least [`WINDOW_BYTES_MIN`], two whole batches,
//! so that one is received while the other leaves and no batch is larger than its window; who cannot get the least is
//! refused and told so, nobody else is slowed for it. Shares grow to an equal part, all growth together at most a
//! quarter of the budget, because announced credit cannot be taken back and a disk that falls idle keeps it: three
//! quarters always serve least shares. They shrink as newcomers come, never below what was already
//! announced. Units: bytes. Called by `relay` and shown by `status`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reprotect_engine::limits::{BATCH_PLAIN_BYTES_MAX, UNWRITTEN_BYTES_MAX};

/// What the credit cost of a full batch may add to its plain bytes: a block for each of 63 records and for itself.
const BATCH_OVERHEAD_BYTES: u64 = 256 << 10;
/// The least window of an open disk: two batches.
pub const WINDOW_BYTES_MIN: u64 = 2 * (BATCH_PLAIN_BYTES_MAX + BATCH_OVERHEAD_BYTES);
/// The largest window of a disk: the target never gives more credit than this ahead of its writes.
pub const WINDOW_BYTES_MAX: u64 = UNWRITTEN_BYTES_MAX;
/// The least send window of a session towards its target: 1 MiB fills 80 Mbit/s at 100 ms.
pub const SEND_BYTES_MIN: u64 = 1 << 20;
/// The largest send window of a session: 16 MiB fill 1.3 Gbit/s at 100 ms.
pub const SEND_BYTES_MAX: u64 = 16 << 20;
/// The smallest budget that serves anybody.
pub const BUDGET_BYTES_MIN: u64 = WINDOW_BYTES_MIN + SEND_BYTES_MIN;

const _: () = assert!(WINDOW_BYTES_MIN >= 2 * BATCH_PLAIN_BYTES_MAX && WINDOW_BYTES_MIN <= WINDOW_BYTES_MAX);

/// What a share is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// An open disk's window.
    Window,
    /// A session's send window.
    Send,
}

impl Purpose {
    const fn least(self) -> u64 {
        match self {
            Self::Window => WINDOW_BYTES_MIN,
            Self::Send => SEND_BYTES_MIN,
        }
    }
}

#[derive(Debug, Default)]
struct Shares {
    reserved: u64,
    /// Of the reserved, what goes beyond the least of each share.
    grown: u64,
    windows: u64,
    sends: u64,
}

impl Shares {
    /// The equal part of one share: a quarter of the budget over the disks, an eighth over the sessions.
    fn fair(&self, purpose: Purpose, total: u64) -> u64 {
        match purpose {
            Purpose::Window => (total / 4 / self.windows.max(1)).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX),
            Purpose::Send => (total / 8 / self.sends.max(1)).clamp(SEND_BYTES_MIN, SEND_BYTES_MAX),
        }
    }

    const fn count(&mut self, purpose: Purpose) -> &mut u64 {
        match purpose {
            Purpose::Window => &mut self.windows,
            Purpose::Send => &mut self.sends,
        }
    }
}

/// The budget; cheap to share.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    shares: Mutex<Shares>,
}

impl Budget {
    /// A budget of `total` bytes.
    #[must_use]
    pub fn new(total: u64) -> Arc<Self> {
        Arc::new(Self { total, shares: Mutex::default() })
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.total
    }

    /// What is promised to sessions now, in bytes.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.shares().reserved
    }

    /// Thousandths of it that are not promised.
    #[must_use]
    pub fn room_permille(&self) -> u16 {
        let free = self.total - self.reserved_bytes().min(self.total);
        u16::try_from(free * 1000 / self.total.max(1)).unwrap_or(1000)
    }

    /// Whether [`Self::session`] would give one now.
    #[must_use]
    pub fn has_room_for_a_session(&self) -> bool {
        self.reserved_bytes() + BUDGET_BYTES_MIN <= self.total
    }

    /// A new session's send window and the window of its first disk; `None` when there is no room for both.
    #[must_use]
    pub fn session(self: &Arc<Self>) -> Option<(Share, Share)> {
        Some((self.take(Purpose::Send)?, self.take(Purpose::Window)?))
    }

    /// A window for a disk that is to be opened; `None` when there is no room for its least.
    #[must_use]
    pub fn disk(self: &Arc<Self>) -> Option<Share> {
        self.take(Purpose::Window)
    }

    fn take(self: &Arc<Self>, purpose: Purpose) -> Option<Share> {
        let mut shares = self.shares();
        if shares.reserved + purpose.least() > self.total {
            return None;
        }
        shares.reserved += purpose.least();
        *shares.count(purpose) += 1;
        drop(shares);
        Some(Share { budget: Arc::clone(self), purpose, bytes: purpose.least() })
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of the budget; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    purpose: Purpose,
    bytes: u64,
}

impl Share {
    /// Its size.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    const fn grown(&self) -> u64 {
        self.bytes - self.purpose.least()
    }

    /// Moves towards the equal part, not below `outstanding` bytes that are already promised; the new size.
    pub fn adjust(&mut self, outstanding: u64) -> u64 {
        let mut shares = self.budget.shares();
        let fair = shares.fair(self.purpose, self.budget.total);
        let total = self.budget.total;
        let wanted = if self.bytes < fair {
            let room = (total / 4).saturating_sub(shares.grown).min(total - shares.reserved);
            self.bytes + room.min(fair - self.bytes)
        } else {
            fair.max(outstanding).min(self.bytes)
        };
        shares.reserved = shares.reserved - self.bytes + wanted;
        shares.grown = shares.grown - self.grown() + (wanted - self.purpose.least());
        debug_assert!(shares.reserved <= total);
        self.bytes = wanted;
        wanted
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut shares = self.budget.shares();
        shares.reserved -= self.bytes;
        shares.grown -= self.grown();
        *shares.count(self.purpose) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_disk_gets_much_and_gives_it_back_when_others_come() {
        let budget = Budget::new(256 << 20);
        let mut first = budget.disk().unwrap();
        assert_eq!(first.adjust(0), WINDOW_BYTES_MAX);
        let others: Vec<Share> = std::iter::from_fn(|| budget.disk()).collect();
        assert!(others.len() as u64 >= (192 << 20) / WINDOW_BYTES_MIN, "{}", others.len());
        assert_eq!(first.adjust(20 << 20), 20 << 20, "what was announced stays");
        assert_eq!(first.adjust(0), WINDOW_BYTES_MIN);
        assert!(budget.disk().is_some(), "what was given back serves a newcomer");
    }

    #[test]
    fn idle_disks_that_grew_leave_three_quarters_for_least_shares() {
        let budget = Budget::new(256 << 20);
        let mut shares: Vec<Share> = Vec::new();
        while let Some(mut share) = budget.disk() {
            share.adjust(0);
            shares.push(share); // never shrinks: all of it is announced
        }
        assert!(shares.len() as u64 >= (192 << 20) / WINDOW_BYTES_MIN, "{}", shares.len());
    }

    #[test]
    fn a_session_is_taken_with_its_first_disk_or_not_at_all() {
        let budget = Budget::new(BUDGET_BYTES_MIN + SEND_BYTES_MIN);
        let mut first = budget.session().expect("room for exactly one");
        assert!(budget.session().is_none());
        first.0.adjust(0);
        first.1.adjust(0);
        assert!(budget.reserved_bytes() <= budget.total_bytes());
        drop(first);
        assert_eq!(budget.reserved_bytes(), 0);
    }

    #[test]
    fn whatever_comes_and_goes_the_sum_stays_within_the_budget() {
        let budget = Budget::new(100 << 20);
        let mut shares: Vec<Share> = Vec::new();
        let mut state = 7_u64;
        for _ in 0..5000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let pick = (state >> 33) as usize;
            match pick % 4 {
                0 => shares.extend(budget.session().into_iter().flat_map(<[Share; 2]>::from)),
                1 => shares.extend(budget.disk()),
                2 if !shares.is_empty() => drop(shares.swap_remove(pick / 4 % shares.len())),
                _ => {
                    if let Some(share) = shares.get_mut(pick / 4 % 64) {
                        let outstanding = share.bytes() / 2;
                        assert!(share.adjust(outstanding) >= outstanding);
                    }
                }
            }
            let sum: u64 = shares.iter().map(Share::bytes).sum();
            assert_eq!(sum, budget.reserved_bytes());
            assert!(sum <= budget.total_bytes());
            assert!(shares.iter().all(|share| share.bytes() >= share.purpose.least()));
        }
    }
}
