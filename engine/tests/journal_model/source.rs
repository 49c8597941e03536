//! The machine that is protected: its disks, the stream of each, and what it still remembers of it.
//!
//! Invariants: a value is written once in the life of a seed; `states[n]` is the disk after `n` records where the stream
//! says that this is a state (not during the initial sync or a resync). Called by the driver and the oracle.

use std::collections::BTreeSet;

use super::growth::SMALL;
use super::records::{BLOCKS, Block, Body, Record, SECTORS, Sequence};
use super::rng::Rng;

#[derive(Clone, Debug)]
pub(crate) struct SourceDisk {
    pub(crate) now: Vec<u32>,
    pub(crate) stream: Vec<Record>,
    pub(crate) states: Vec<Option<Vec<u32>>>,
    pub(crate) marks: Vec<(usize, Sequence)>,
    pub(crate) sent: Sequence,
    pub(crate) acknowledged: Sequence,
    /// The initial sync is not over.
    pub(crate) bulk: bool,
    /// Writes nothing: a compare or a rollback waits for the target to be drained.
    pub(crate) suspended: bool,
    /// What the stream says at its end is a state.
    clean: bool,
    given_up: BTreeSet<Sequence>,
}

pub(crate) struct Source {
    pub(crate) disks: Vec<SourceDisk>,
    /// Records that are kept for sending again after they were acknowledged.
    pub(crate) grace: usize,
    pub(crate) marks: usize,
    value: u32,
    /// The time now, in ticks.
    pub(crate) now: usize,
}

impl SourceDisk {
    /// It is smaller at first.
    pub(crate) fn begin_small(&mut self) {
        self.now.truncate(SMALL * SECTORS);
        self.states.iter_mut().flatten().for_each(|state| state.truncate(SMALL * SECTORS));
    }
}

impl Source {
    /// `targets`: what the target of each disk holds; `created`: whether we made it.
    pub(crate) fn new(rng: &mut Rng, targets: &[Vec<u32>], created: &[bool]) -> Self {
        let disk = |(target, created): (&Vec<u32>, &bool)| SourceDisk {
            now: (0..BLOCKS * SECTORS).map(|sector| 500 + sector as u32).collect(),
            stream: Vec::new(),
            states: vec![(!created).then(|| target.clone())],
            marks: Vec::new(),
            sent: 0,
            acknowledged: 0,
            bulk: *created,
            suspended: !created,
            clean: false,
            given_up: BTreeSet::new(),
        };
        let grace = if rng.chance(300) { rng.between(0, 4) } else { 1000 };
        Self { disks: targets.iter().zip(created).map(disk).collect(), grace, marks: 0, value: 1000, now: 0 }
    }

    fn emit(&mut self, disk: usize, body: Body) {
        let (time, own) = (self.now, &mut self.disks[disk]);
        let record = Record { disk, sequence: own.stream.len() + 1, time, body };
        for (sector, value) in record.writes() {
            own.now[sector] = value;
        }
        own.stream.push(record);
        own.states.push(own.clean.then(|| own.now.clone()));
    }

    /// A write of one to six sectors somewhere.
    pub(crate) fn write(&mut self, rng: &mut Rng, disk: usize) {
        if self.disks[disk].suspended {
            return;
        }
        let (sector, len) = (rng.below(self.disks[disk].now.len()), rng.between(1, 6));
        let len = len.min(self.disks[disk].now.len() - sector);
        let values = (0..len as u32).map(|at| self.value + at).collect();
        self.value += len as u32;
        self.emit(disk, Body::Write { sector, values });
    }

    /// A mark on all disks at once.
    pub(crate) fn mark(&mut self) {
        if self.disks.iter().any(|disk| disk.suspended) {
            return;
        }
        self.marks += 1;
        for disk in 0..self.disks.len() {
            let state = !self.disks[disk].bulk;
            self.disks[disk].clean = state;
            self.emit(disk, Body::Mark { mark: self.marks, state });
            let sequence = self.disks[disk].stream.len();
            self.disks[disk].marks.push((self.marks, sequence));
        }
    }

    /// Sends what differs from the target; the next mark is a state again.
    pub(crate) fn resync(&mut self, disk: usize, target: &[u32]) {
        self.disks[disk].clean = false;
        let sectors = self.disks[disk].now.len();
        for (sector, held) in target.iter().take(sectors).enumerate() {
            let value = self.disks[disk].now[sector];
            if value != *held {
                self.emit(disk, Body::Write { sector, values: vec![value] });
            }
        }
        self.disks[disk].suspended = false;
    }

    /// The target has lost this record and cannot have it again: a compare is due, and until its end nothing is a state.
    pub(crate) fn give_up(&mut self, disk: usize, sequence: Sequence) -> bool {
        let own = &mut self.disks[disk];
        if !own.given_up.insert(sequence) {
            return false;
        }
        own.states.iter_mut().skip(sequence).for_each(|state| *state = None);
        (own.clean, own.suspended) = (false, true);
        true
    }

    pub(crate) fn block(&self, disk: usize, block: usize) -> Block {
        std::array::from_fn(|at| self.disks[disk].now[block * SECTORS + at])
    }

    /// Oldest record that can be sent again.
    pub(crate) fn grace_start(&self, disk: usize) -> Sequence {
        (self.disks[disk].acknowledged + 1).saturating_sub(self.grace).max(1)
    }
}
