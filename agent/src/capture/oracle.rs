//! The accounting oracle: whether the kernel wrote what capture saw completing.
//!
//! Why: programs are, rarely, not run for an event, and nothing else tells. The kernel's own account of a disk (`stat`)
//! counts every sector when it completes; the programs count what they see there. The difference of the two is constant
//! unless an event is missed. A sample reads seen, account, seen, account: the true difference lies between
//! `first account − second seen` and `second account − first seen`, on a busy disk too, and samples narrow it down.
//!
//! Invariants: a miss is reported only where the difference is certainly larger than before (no false alarm from a busy
//! disk); what lost completions left in the in-flight map explains as many sectors as it says and no more; each
//! check that is exact becomes the anchor of the next, so that nothing found once is counted again.
//! Units: sectors. Called by `tracker`.

use std::time::Duration;

use reprotect_engine::units::Timestamp;
use serde::{Deserialize, Serialize};

use super::CaptureError;
use super::kernel::Kernel;
use super::layout::{Kind, Tally};
use super::sysfs::{Account, BlockDisk};

/// Samples of a check on a disk that is never quiet.
pub(crate) const SAMPLES: usize = 100;
/// A program that counted before the kernel did may have been put to sleep in between: after so long both have.
const SETTLE: Duration = Duration::from_millis(20);

/// The difference of the kernel's account and ours, as far as it is known. Wrapping: ours may begin later or earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bounds {
    pub(crate) low: i64,
    pub(crate) high: i64,
}

impl Bounds {
    const fn exact(value: i64) -> Self {
        Self { low: value, high: value }
    }

    fn narrowed(self, other: Self) -> Self {
        Self { low: self.low.max(other.low), high: self.high.min(other.high) }
    }

    fn spanning(self, other: Self) -> Self {
        Self { low: self.low.min(other.low), high: self.high.max(other.high) }
    }

    const fn is_exact(self) -> bool {
        self.low == self.high
    }
}

/// What later checks compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Anchor {
    written: Bounds,
    discarded: Bounds,
    /// Sectors of entries that were overwritten, as counted then.
    stale: Account,
    /// Commands without a range, as counted then.
    unranged: u64,
    /// When it was taken, nanoseconds of the wall clock.
    at: u64,
}

impl Anchor {
    #[cfg(test)]
    pub(crate) const fn exact(account: Account) -> Self {
        Self {
            written: Bounds::exact(account.written as i64),
            discarded: Bounds::exact(account.discarded as i64),
            stale: Account { written: 0, discarded: 0 },
            unranged: 0,
            at: 0,
        }
    }

    /// When it was taken.
    pub(crate) const fn at(&self) -> Timestamp {
        Timestamp(self.at)
    }
}

/// What a check says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything the kernel wrote was seen, or is explained.
    Clean {
        /// Sectors of lost completions that the in-flight map explained; their blocks are marked.
        explained: u64,
    },
    /// Nothing speaks against it, but the disk was never quiet enough to say exactly.
    Undecided,
    /// The kernel wrote more than was seen: lost completions, if the in-flight map explains them; otherwise the
    /// disk must be compared, and points since the last clean check are doubtful.
    Short {
        /// Sectors nobody saw, at least.
        sectors: u64,
    },
    /// The kernel's account is behind what was seen, by so much at least: it was off for a while, and hides as much.
    Behind {
        /// Sectors.
        sectors: u64,
    },
    /// A driver's own command or a command for zones may have changed anything.
    Unranged {
        /// How many.
        commands: u64,
    },
}

/// A check of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it says.
    pub verdict: Verdict,
    /// The last moment at which everything was known to be seen.
    pub last_clean: Option<Timestamp>,
}

/// The difference now, and what explains a part of it.
#[derive(Clone, Copy, Debug)]
struct Reading {
    written: Bounds,
    discarded: Bounds,
    stale: Account,
    unranged: u64,
}

impl Reading {
    /// What this one and an older one say together, and whether both say exactly the same.
    fn beside(self, older: &Self) -> (Self, bool) {
        let agree = |now: Bounds, then: Bounds| now.is_exact() && now == then;
        let agree = agree(self.written, older.written) && agree(self.discarded, older.discarded);
        let (written, discarded) =
            (self.written.spanning(older.written), self.discarded.spanning(older.discarded));
        (Self { written, discarded, ..self }, agree)
    }
}

fn seen(kernel: &Kernel, disk: &BlockDisk, slot: usize) -> Account {
    // Devices that take bios are counted where bios end; elsewhere those that end without a request did nothing.
    let field = if disk.takes_requests { Tally::DoneSectors } else { Tally::EndedSectors };
    let written = Kind::WRITTEN.iter().map(|kind| kernel.kind_tally(slot, field, *kind)).sum();
    Account { written, discarded: kernel.kind_tally(slot, field, Kind::Discard) }
}

fn bounds(first: Account, second: Account, seen: [Account; 2], of: impl Fn(Account) -> u64) -> Bounds {
    let minus = |account: Account, seen: Account| of(account).wrapping_sub(of(seen)) as i64;
    Bounds { low: minus(first, seen[1]), high: minus(second, seen[0]) }
}

fn read(kernel: &Kernel, disk: &BlockDisk, slot: usize) -> Result<Reading, CaptureError> {
    let mut found: Option<(Bounds, Bounds)> = None;
    for _ in 0..SAMPLES {
        let first_seen = seen(kernel, disk, slot);
        let first = disk.account()?;
        let second_seen = seen(kernel, disk, slot);
        let second = disk.account()?;
        let seen = [first_seen, second_seen];
        let written = bounds(first, second, seen, |account| account.written);
        let discarded = bounds(first, second, seen, |account| account.discarded);
        let (written, discarded) = match found {
            Some((w, d)) => (w.narrowed(written), d.narrowed(discarded)),
            None => (written, discarded),
        };
        found = Some((written, discarded));
        if written.is_exact() && discarded.is_exact() {
            break;
        }
    }
    let (written, discarded) = found.unwrap_or((Bounds::exact(0), Bounds::exact(0)));
    let stale = Account {
        written: kernel.tally(slot, Tally::StaleWritten, 0),
        discarded: kernel.tally(slot, Tally::StaleDiscarded, 0),
    };
    let commands =
        |kind| kernel.kind_tally(slot, Tally::Done, kind) + kernel.kind_tally(slot, Tally::Ended, kind);
    // Submissions too: a kernel without loops counts operations here that are too long for it to mark.
    let zone = commands(Kind::Zone) + kernel.kind_tally(slot, Tally::Queued, Kind::Zone);
    let unranged = commands(Kind::Passthrough) + zone;
    Ok(Reading { written, discarded, stale, unranged })
}

/// Takes the first anchor, when following begins.
pub(crate) fn anchor(
    kernel: &Kernel,
    disk: &BlockDisk,
    slot: usize,
    now: Timestamp,
) -> Result<Anchor, CaptureError> {
    let reading = settled(kernel, disk, slot)?.0;
    Ok(anchor_of(&reading, now))
}

/// Two readings with a pause between, as one that allows both; and whether they are exact and agree.
fn settled(kernel: &Kernel, disk: &BlockDisk, slot: usize) -> Result<(Reading, bool), CaptureError> {
    let first = read(kernel, disk, slot)?;
    std::thread::sleep(SETTLE);
    let second = read(kernel, disk, slot)?;
    Ok(second.beside(&first))
}

const fn anchor_of(reading: &Reading, now: Timestamp) -> Anchor {
    let Reading { written, discarded, stale, unranged } = *reading;
    Anchor { written, discarded, stale, unranged, at: now.0 }
}

/// Compares with `anchor`, which moves on where the result is exact; answers what is missing, too. `reaped` are the sectors of entries that were given
/// up since.
pub(crate) fn check(
    kernel: &Kernel,
    disk: &BlockDisk,
    slot: usize,
    anchor: &mut Anchor,
    reaped: Account,
    now: Timestamp,
) -> Result<(Check, Account), CaptureError> {
    // Exact is what two readings agree on: the account of one moment may lack what is being counted.
    let (reading, agree) = settled(kernel, disk, slot)?;
    let last_clean = Some(anchor.at());
    let (verdict, short) = judge(anchor, &reading, reaped);
    if let Verdict::Clean { .. } = verdict
        && agree
    {
        *anchor = anchor_of(&reading, now);
        return Ok((Check { verdict, last_clean: Some(now) }, short));
    }
    Ok((Check { verdict, last_clean }, short))
}

/// After a disk was found short: what is missing stays missing, so the anchor moves to what is read now.
pub(crate) fn accept(
    kernel: &Kernel,
    disk: &BlockDisk,
    slot: usize,
    now: Timestamp,
) -> Result<Anchor, CaptureError> {
    anchor(kernel, disk, slot, now)
}

/// The verdict, and the sectors that are missing without an explanation.
fn judge(anchor: &Anchor, reading: &Reading, reaped: Account) -> (Verdict, Account) {
    let commands = reading.unranged.saturating_sub(anchor.unranged);
    if commands > 0 {
        return (Verdict::Unranged { commands }, Account::default());
    }
    let explained = Account {
        written: reading.stale.written.saturating_sub(anchor.stale.written) + reaped.written,
        discarded: reading.stale.discarded.saturating_sub(anchor.stale.discarded) + reaped.discarded,
    };
    // Nothing makes the kernel's account smaller but its being off.
    let behind = |now: Bounds, then: Bounds| u64::try_from(then.low.saturating_sub(now.high)).unwrap_or(0);
    let sectors = behind(reading.written, anchor.written) + behind(reading.discarded, anchor.discarded);
    if sectors > 0 {
        return (Verdict::Behind { sectors }, Account::default());
    }
    // What is missing for certain: the least it can be now, less the most it could be then.
    let missing = |now: Bounds, then: Bounds| u64::try_from(now.low.saturating_sub(then.high)).unwrap_or(0);
    let written = missing(reading.written, anchor.written);
    let discarded = missing(reading.discarded, anchor.discarded);
    let short = Account {
        written: written.saturating_sub(explained.written),
        discarded: discarded.saturating_sub(explained.discarded),
    };
    if short != Account::default() {
        return (Verdict::Short { sectors: short.written + short.discarded }, short);
    }
    if reading.written.is_exact() && reading.discarded.is_exact() {
        (Verdict::Clean { explained: written + discarded }, short)
    } else {
        (Verdict::Undecided, short)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(low: i64, high: i64, stale: u64) -> Reading {
        Reading {
            written: Bounds { low, high },
            discarded: Bounds::exact(0),
            stale: Account { written: stale, discarded: 0 },
            unranged: 0,
        }
    }

    #[test]
    fn verdicts() {
        let anchor = Anchor::exact(Account { written: 100, discarded: 0 });
        let none = Account::default();
        let cases = [
            (reading(100, 100, 0), none, Verdict::Clean { explained: 0 }),
            (reading(50, 180, 0), none, Verdict::Undecided),
            (reading(108, 180, 0), none, Verdict::Short { sectors: 8 }),
            (reading(108, 108, 8), none, Verdict::Clean { explained: 8 }),
            (reading(116, 116, 8), none, Verdict::Short { sectors: 8 }),
            (reading(116, 116, 8), Account { written: 8, discarded: 0 }, Verdict::Clean { explained: 16 }),
            (reading(108, 108, 80), none, Verdict::Clean { explained: 8 }),
            (Reading { unranged: 2, ..reading(100, 100, 0) }, none, Verdict::Unranged { commands: 2 }),
        ];
        for (reading, reaped, expected) in cases {
            assert_eq!(judge(&anchor, &reading, reaped).0, expected, "{reading:?}");
        }
    }

    #[test]
    fn a_discard_does_not_explain_a_write() {
        let anchor = Anchor::exact(Account { written: 100, discarded: 50 });
        let reading = Reading { discarded: Bounds::exact(50), ..reading(108, 108, 0) };
        let reaped = Account { written: 0, discarded: 8 };
        let short = Account { written: 8, discarded: 0 };
        assert_eq!(judge(&anchor, &reading, reaped), (Verdict::Short { sectors: 8 }, short));
    }

    #[test]
    fn an_account_that_goes_back_is_not_clean_and_one_that_two_readings_differ_on_is_vague() {
        let anchor = Anchor::exact(Account { written: 100, discarded: 0 });
        let (verdict, _) = judge(&anchor, &reading(92, 92, 0), Account::default());
        assert_eq!(verdict, Verdict::Behind { sectors: 8 });
        // The first was read between a program and the kernel.
        let (both, agree) = reading(100, 100, 0).beside(&reading(92, 92, 0));
        assert_eq!((both.written, agree), (Bounds { low: 92, high: 100 }, false));
        assert_eq!(judge(&anchor, &both, Account::default()).0, Verdict::Undecided);
        let vague = anchor_of(&both, Timestamp(1));
        assert_eq!(
            judge(&vague, &reading(100, 100, 0), Account::default()).0,
            Verdict::Clean { explained: 0 }
        );
        assert!(reading(7, 7, 0).beside(&reading(7, 7, 0)).1);
    }

    #[test]
    fn a_vague_anchor_never_accuses() {
        let anchor = Anchor { written: Bounds { low: 90, high: 130 }, ..Anchor::exact(Account::default()) };
        let (verdict, _) = judge(&anchor, &reading(120, 120, 0), Account::default());
        assert_eq!(verdict, Verdict::Clean { explained: 0 });
    }
}
