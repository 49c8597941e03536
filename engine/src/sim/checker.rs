//! The rules a run must keep, each a function of its own, fed by the drivers.
//!
//! Invariants: the checker never influences a run; the first broken rule ends it. It knows the truth (sources, what
//! was persisted) that no core may know. Units: sectors, sequences. Called by `sim::world` and the drivers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::disk::SimDisk;
use super::scenario::Mode;
use super::workload::{COLLIDES, OLD_TARGET, Source, span};
use crate::format::batch::{BatchHeader, CHAIN_START, Chain};
use crate::format::disk_state::DiskState;
use crate::format::extent::Record;
use crate::format::message::{Ack, BulkAckHead, PassMode};
use crate::range_set::RangeSet;
use crate::units::{Generation, SectorRange, Sequence};

/// The rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// A target's sectors are the state at its durable sequence or a later write; never anything else.
    Prefix,
    /// Every sequence is accepted once and in order, with the chain of what was sent.
    ExactlyOnce,
    /// `received ≥ durable ≥ applied`, never beyond what was persisted, never back.
    Acknowledgement,
    /// Generations increase, are persisted before they are granted, and lower ones never write.
    Generation,
    /// What is under way stays below the limits.
    Bounded,
    /// Every disk ends equal to its source.
    Equality,
    /// After the faults stop everything is synced in bounded time.
    Liveness,
    /// A peer that kept the rules is never told that it broke one.
    Blame,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Simulated time in nanoseconds.
    pub at_nanos: u64,
    /// Which rule.
    pub rule: Rule,
    /// What was seen.
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {} broke {:?} at {:.6} s: {}\nreplay it: make sim SEED={}",
            self.seed,
            self.rule,
            self.at_nanos as f64 / 1e9,
            self.text,
            self.seed
        )
    }
}

/// Changes that nobody captured, and the pass that must find them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taint {
    None,
    /// The next pass that a session above this generation begins.
    Wants(Generation),
    /// That pass, which must end.
    Waits(u64),
}

/// What the checker knows of one disk.
#[derive(Debug)]
struct Watch {
    /// Which write each sequence that the target accepted stands for, as the agent numbered it.
    assigned: BTreeMap<u64, u64>,
    accepted: Sequence,
    chain: Chain,
    chains: BTreeMap<u64, Chain>,
    granted: Generation,
    persisted: Sequence,
    persisted_marked: Sequence,
    persisted_settled: BTreeMap<u64, RangeSet>,
    done_passes: u64,
    /// By core, and by how many losses of the tail before.
    acknowledged: BTreeMap<(u64, usize), Sequence>,
    /// Losses of what was durable: the last generation before, and what was persisted, with the last mark.
    losses: Vec<(Generation, Sequence, Sequence)>,
    /// Marks that survive any crash.
    marks: BTreeSet<[u8; 16]>,
    taint: Taint,
    /// By pass, the newest write and the newest sequence given out when it began: a finished pass holds at least that.
    floors: BTreeMap<u64, (u64, u64)>,
}

/// All rules' memory.
#[derive(Debug)]
pub(super) struct Checker {
    mode: Mode,
    watches: Vec<Watch>,
    broken: Option<(Rule, String)>,
}

impl Checker {
    pub(super) fn new(mode: Mode, disks: usize) -> Self {
        let watch = || Watch {
            assigned: BTreeMap::new(),
            accepted: Sequence::ZERO,
            chain: CHAIN_START,
            chains: BTreeMap::from([(0, CHAIN_START)]),
            granted: Generation::ZERO,
            persisted: Sequence::ZERO,
            persisted_marked: Sequence::ZERO,
            persisted_settled: BTreeMap::new(),
            done_passes: 0,
            acknowledged: BTreeMap::new(),
            losses: Vec::new(),
            marks: BTreeSet::new(),
            taint: Taint::None,
            floors: BTreeMap::new(),
        };
        Self { mode, watches: (0..disks).map(|_| watch()).collect(), broken: None }
    }

    /// The first broken rule, once.
    pub(super) const fn take_broken(&mut self) -> Option<(Rule, String)> {
        self.broken.take()
    }

    pub(super) fn broke(&mut self, rule: Rule, text: String) {
        self.broken.get_or_insert((rule, text));
    }

    fn require(&mut self, holds: bool, rule: Rule, text: impl FnOnce() -> String) {
        if !holds {
            self.broke(rule, text());
        }
    }

    /// The agent gave sequences up to `last` to records of a write.
    pub(super) fn assigned(&mut self, disk: usize, last: Sequence, records: usize, write: u64) {
        let watch = &mut self.watches[disk];
        watch.assigned.split_off(&(last.0 + 1));
        for sequence in last.0 + 1 - records as u64..=last.0 {
            watch.assigned.insert(sequence, write);
        }
    }

    /// The agent crashed, so that nobody captures writes, or another session writes: until a new pass ended, the disk
    /// need not be a state of the source.
    pub(super) fn untracked(&mut self, disk: usize) {
        let watch = &mut self.watches[disk];
        watch.taint = Taint::Wants(watch.granted);
    }

    /// The target took a batch.
    pub(super) fn batch_accepted(
        &mut self,
        disk: usize,
        header: &BatchHeader,
        records: &[Record],
        state: &DiskState,
    ) {
        let watch = &mut self.watches[disk];
        let expected = watch.accepted.next();
        let chain = own_chain(&watch.chain, header, records);
        let (granted, last) = (watch.granted, header.last_sequence());
        watch.accepted = last;
        watch.chain = chain;
        watch.chains.insert(last.0, chain);
        self.require(header.first_sequence == expected, Rule::ExactlyOnce, || {
            format!("disk {disk}: took sequence {} where {expected} was next", header.first_sequence)
        });
        self.require(state.chain == chain && state.sequence == last, Rule::ExactlyOnce, || {
            format!("disk {disk}: position or chain after sequence {last} is not that of what was sent")
        });
        self.generation_wrote(disk, header.generation, granted);
    }

    /// A write of this generation is accepted or executed.
    pub(super) fn write_executed(&mut self, disk: usize, generation: Generation) {
        let granted = self.watches[disk].granted;
        self.generation_wrote(disk, generation, granted);
    }

    fn generation_wrote(&mut self, disk: usize, generation: Generation, granted: Generation) {
        self.require(generation >= granted, Rule::Generation, || {
            format!("disk {disk}: generation {generation} writes after {granted} was granted")
        });
    }

    /// GRANT leaves the target.
    pub(super) fn granted(&mut self, disk: usize, generation: Generation, persisted: Generation) {
        let before = std::mem::replace(&mut self.watches[disk].granted, generation);
        self.require(generation > before, Rule::Generation, || {
            format!("disk {disk}: generation {generation} granted after {before}")
        });
        self.require(persisted >= generation, Rule::Generation, || {
            format!("disk {disk}: generation {generation} granted while {persisted} is persisted")
        });
    }

    /// A pass was begun by a session of `generation`.
    pub(super) fn pass_begun(&mut self, disk: usize, pass: u64, generation: Generation, newest: u64) {
        let watch = &mut self.watches[disk];
        if matches!(watch.taint, Taint::Wants(after) if generation > after) {
            watch.taint = Taint::Waits(pass);
        }
        let given = watch.assigned.last_key_value().map_or(0, |(sequence, _)| *sequence);
        watch.floors.insert(pass, (newest, given));
    }

    /// The target's state file was replaced.
    pub(super) fn persisted(&mut self, disk: usize, state: &DiskState) {
        let watch = &mut self.watches[disk];
        let before = (watch.persisted, watch.persisted_marked);
        watch.persisted = state.sequence;
        watch.persisted_marked = state.marked;
        watch.persisted_settled.entry(state.pass).or_default().extend(&state.settled);
        if state.mode == PassMode::Done {
            watch.done_passes = watch.done_passes.max(state.pass);
        }
        self.require(state.sequence >= before.0 && state.marked >= before.1, Rule::Acknowledgement, || {
            format!("disk {disk}: the persisted position went from {} back to {}", before.0, state.sequence)
        });
    }

    /// An acknowledgement reached an agent's core (`core` names it).
    pub(super) fn acknowledged(&mut self, disk: usize, core: u64, ack: &Ack) {
        let watch = &mut self.watches[disk];
        // What was sent before a loss, and true then, may arrive after it.
        let era = watch.losses.partition_point(|loss| loss.0 < ack.generation);
        let (persisted, marked) = match watch.losses.get(era) {
            Some((_, persisted, marked)) => (*persisted, *marked),
            None => (watch.persisted, watch.persisted_marked),
        };
        let before = watch.acknowledged.insert((core, era), ack.durable).unwrap_or(Sequence::ZERO);
        self.require(
            ack.received >= ack.durable && ack.durable >= ack.applied,
            Rule::Acknowledgement,
            || format!("disk {disk}: {ack:?} breaks received >= durable >= applied"),
        );
        self.require(ack.durable <= persisted && ack.marked <= marked, Rule::Acknowledgement, || {
            format!("disk {disk}: {ack:?} where only {persisted} (marked {marked}) is persisted")
        });
        self.require(ack.durable >= before, Rule::Acknowledgement, || {
            format!("disk {disk}: durable went from {before} back to {}", ack.durable)
        });
    }

    /// The target lost the newest of what was durable, under this generation.
    pub(super) fn tail_lost(&mut self, disk: usize, generation: Generation) {
        let watch = &mut self.watches[disk];
        watch.losses.push((generation, watch.persisted, watch.persisted_marked));
    }

    /// A mark was made durable.
    pub(super) fn mark_persisted(&mut self, disk: usize, point: [u8; 16]) {
        self.watches[disk].marks.insert(point);
    }

    /// An agent was told that its mark is durable.
    pub(super) fn mark_acknowledged(&mut self, disk: usize, point: [u8; 16]) {
        // Marks that end scan rounds have no point of their own.
        let known = point == [0; 16] || self.watches[disk].marks.contains(&point);
        self.require(known, Rule::Acknowledgement, || {
            format!("disk {disk}: mark {point:02x?} is acknowledged and not durable")
        });
    }

    /// A bulk acknowledgement reached an agent.
    pub(super) fn bulk_acknowledged(&mut self, disk: usize, head: &BulkAckHead, ranges: &[SectorRange]) {
        let watch = &self.watches[disk];
        let settled = watch.persisted_settled.get(&head.pass);
        let known = watch.done_passes >= head.pass
            || ranges.iter().all(|range| settled.is_some_and(|set| set.contains(*range)));
        self.require(known, Rule::Acknowledgement, || {
            format!("disk {disk}: bulk of pass {} acknowledged and not persisted", head.pass)
        });
    }

    /// What is under way for a disk, against its limits.
    pub(super) fn bounded(&mut self, what: &str, disk: usize, held: u64, limit: u64) {
        self.require(held <= limit, Rule::Bounded, || {
            format!("disk {disk}: {what} holds {held} bytes, the limit is {limit}")
        });
    }

    /// The target came back with `state` and these contents.
    pub(super) fn recovered(&mut self, disk: usize, state: &DiskState, content: &SimDisk, source: &Source) {
        let watch = &mut self.watches[disk];
        let chain = watch.chains.get(&state.sequence.0).copied();
        watch.accepted = state.sequence;
        watch.chain = state.chain;
        watch.persisted = state.sequence;
        watch.persisted_marked = state.marked;
        watch.chains.split_off(&(state.sequence.0 + 1));
        self.require(chain == Some(state.chain), Rule::ExactlyOnce, || {
            format!("disk {disk}: came back at sequence {} with a chain nobody sent", state.sequence)
        });
        self.prefix(disk, state, content.content(), source);
    }

    /// Every sector is a version of itself, and outside a pass one no older than the durable sequence.
    pub(super) fn prefix(&mut self, disk: usize, state: &DiskState, content: &[u8], source: &Source) {
        let watch = &mut self.watches[disk];
        if matches!(watch.taint, Taint::Waits(pass)
            if state.pass > pass || state.pass == pass && state.mode == PassMode::Done)
        {
            watch.taint = Taint::None;
        }
        let strict = self.mode == Mode::Ordered && state.mode == PassMode::Done && watch.taint == Taint::None;
        let mut oldest = 0;
        if strict {
            oldest = watch.assigned.get(&state.sequence.0).map_or(0, |write| {
                let whole = watch.assigned.get(&(state.sequence.0 + 1)) != Some(write);
                if whole { *write } else { write - 1 }
            });
            // A crash may have undone the beginning of a later pass.
            let begun = watch.floors.range(..=state.pass).next_back();
            if let Some((_, (write, given))) = begun
                && state.sequence.0 >= *given
            {
                oldest = oldest.max(*write);
            }
        }
        for sector in 0..source.sectors {
            let held = &content[span(sector)];
            if held == &source.bytes()[span(sector)] {
                continue; // the newest write is as good as any
            }
            let mut history = source.history(sector).iter().rev();
            let first = history.clone().find(|id| **id <= oldest).copied().unwrap_or(0);
            let fits = history.any(|id| (!strict || *id >= first) && source.left(*id, sector, held));
            let found = || [OLD_TARGET, COLLIDES].iter().any(|id| source.left(*id, sector, held));
            let before = || !strict && (found() || held.iter().all(|byte| *byte == 0));
            if !fits && !before() {
                let which = source.history(sector).iter().find(|id| source.left(**id, sector, held));
                self.broke(
                    Rule::Prefix,
                    format!(
                        "disk {disk}: sector {sector} holds {} at sequence {}, at least write {first} is due",
                        which.map_or("nothing that was ever written".into(), |id| format!("write {id}")),
                        state.sequence
                    ),
                );
                return;
            }
        }
    }

    /// The end: target and source are the same.
    pub(super) fn equal(&mut self, disk: usize, content: &[u8], source: &Source) {
        let differs =
            (0..source.sectors).find(|sector| content[span(*sector)] != source.bytes()[span(*sector)]);
        self.require(differs.is_none(), Rule::Equality, || {
            format!("disk {disk}: sector {} differs although the disk is synced", differs.unwrap_or(0))
        });
    }
}

/// The chain as the documents define it, written a second time.
fn own_chain(before: &Chain, header: &BatchHeader, records: &[Record]) -> Chain {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(before);
    bytes.extend_from_slice(&header.disk.0);
    bytes.extend_from_slice(&header.lineage.0);
    bytes.extend_from_slice(&header.first_sequence.0.to_le_bytes());
    bytes.push(header.stretch as u8);
    for record in records {
        bytes.push(record.kind() as u8);
        bytes.extend_from_slice(&record.range().start.to_le_bytes());
        bytes.extend_from_slice(&record.range().end.to_le_bytes());
        for crc in record.fragment_crcs() {
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
    }
    let mut chain = CHAIN_START;
    chain.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
    chain
}
