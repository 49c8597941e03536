//! Devices with a volatile cache, and everything that can go wrong with them.
//!
//! Invariants: a read sees the newest write, flushed or not. A *kill* of the process loses nothing that was written; a
//! *power loss* keeps any subset of the unflushed writes, each whole, torn or not at all; a *failed flush* drops a subset
//! for good and leaves the rest looking clean. Rot changes flushed slots only. Units: slots (a sector of a target, a
//! commit group, an undo frame, a manifest edit). Called by the model's journal.

use super::rng::Rng;

/// Why the journal has to be opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The machine lost power: unflushed writes survive in part.
    PowerLoss,
    /// The process was killed: the page cache survives, memory does not.
    Kill,
    /// A flush failed; nothing is known of what it should have written.
    FlushFailed,
    /// A record that was durable cannot be read any more.
    Unreadable,
}

/// Decides when things go wrong.
pub(crate) struct Chaos {
    pub(crate) rng: Rng,
    /// Chance of a kill or power loss at each step; zero while the outcome is judged.
    pub(crate) stop_per_mille: usize,
    pub(crate) flush_failure_per_mille: usize,
    /// Broken rule: a failed flush is tried again, and the second try says all is well.
    pub(crate) retries_failed_flush: bool,
}

impl Chaos {
    /// A moment at which the machine may stop.
    pub(crate) const fn step(&mut self) -> Result<(), Stop> {
        if !self.rng.chance(self.stop_per_mille) {
            return Ok(());
        }
        Err(if self.rng.chance(650) { Stop::PowerLoss } else { Stop::Kill })
    }
}

/// What a slot reads as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Slot<T> {
    /// Never written since the file was made.
    Empty,
    /// Its head is not readable: nothing is known of it.
    Bad,
    /// Its head is readable, its body fails its checksum.
    BadBody(T),
    Good(T),
}

/// A file or disk as a row of slots.
pub(crate) struct Media<T> {
    durable: Vec<Slot<T>>,
    pending: Vec<(usize, Slot<T>)>,
    /// A slot is a sector: the device writes it whole or not at all.
    atomic: bool,
    empty: Slot<T>,
}

impl<T: Clone> Media<T> {
    /// An empty file whose slots can tear.
    pub(crate) const fn file() -> Self {
        Self { durable: Vec::new(), pending: Vec::new(), atomic: false, empty: Slot::Empty }
    }

    /// A disk of atomic sectors.
    pub(crate) fn disk(sectors: Vec<T>) -> Self {
        let durable = sectors.into_iter().map(Slot::Good).collect();
        Self { durable, pending: Vec::new(), atomic: true, empty: Slot::Empty }
    }

    pub(crate) fn read(&self, at: usize) -> &Slot<T> {
        let newest = self.pending.iter().rev().find(|write| write.0 == at).map(|write| &write.1);
        newest.or_else(|| self.durable.get(at)).unwrap_or(&self.empty)
    }

    pub(crate) fn good(&self, at: usize) -> Option<&T> {
        if let Slot::Good(value) = self.read(at) { Some(value) } else { None }
    }

    /// Slots up to the last one ever written.
    pub(crate) fn len(&self) -> usize {
        self.pending.iter().map(|write| write.0 + 1).max().unwrap_or(0).max(self.durable.len())
    }

    pub(crate) fn write(&mut self, at: usize, value: T) {
        self.pending.push((at, Slot::Good(value)));
    }

    /// Cuts the file; the model lets this be durable at once, which is the harder case.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.pending.retain(|write| write.0 < len);
        self.durable.truncate(len);
    }

    pub(crate) fn flush(&mut self, chaos: &mut Chaos) -> Result<(), Stop> {
        chaos.step()?;
        if chaos.rng.chance(chaos.flush_failure_per_mille) && !self.pending.is_empty() {
            self.pending.retain(|_| chaos.rng.chance(500));
            self.settle();
            return if chaos.retries_failed_flush { Ok(()) } else { Err(Stop::FlushFailed) };
        }
        self.settle();
        Ok(())
    }

    pub(crate) fn power_loss(&mut self, rng: &mut Rng) {
        let atomic = self.atomic;
        self.pending.retain_mut(|(_, slot)| {
            if !atomic && rng.chance(200) {
                *slot = match slot {
                    Slot::Good(value) if rng.chance(300) => Slot::BadBody(value.clone()),
                    _ => Slot::Bad,
                };
                return true;
            }
            rng.chance(550)
        });
        self.settle();
    }

    /// Whether a flushed slot is intact, so that it can rot.
    pub(crate) fn can_rot(&self, at: usize) -> bool {
        let rewritten = self.pending.iter().any(|write| write.0 == at);
        !rewritten && matches!(self.durable.get(at), Some(Slot::Good(_)))
    }

    /// Media corruption of a flushed slot.
    pub(crate) fn rot(&mut self, at: usize, head_stays: bool) {
        let slot = &mut self.durable[at];
        *slot = match slot {
            Slot::Good(value) if head_stays => Slot::BadBody(value.clone()),
            _ => Slot::Bad,
        };
    }

    fn settle(&mut self) {
        for (at, slot) in self.pending.drain(..) {
            while self.durable.len() <= at {
                self.durable.push(Slot::Empty);
            }
            self.durable[at] = slot;
        }
    }
}
