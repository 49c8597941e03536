//! The states a workload can be left in: prefixes of its I/Os, subsets of what was not flushed, crashes of the recovery.
//!
//! Invariant: which states are tried follows from the seed and the cap. Units: events of the trace, sectors. Called by
//! the test.

use std::collections::BTreeSet;
use std::fmt;

use reprotect_engine::store::files::memory::{Event, MemoryFiles, Unflushed};

use crate::oracle::{Promise, Views};
use crate::workload::{Step, Workload};

/// A small generator; everything follows from its seed.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d);
        rng.next();
        rng
    }

    pub(crate) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// What was tried.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sum {
    workloads: usize,
    ios: usize,
    prefixes: usize,
    states: usize,
    /// Subsets that were left out by the cap.
    capped: usize,
    /// States that differ from all and nothing: a write missing or alone, torn, or single sectors.
    partial: usize,
    torn: usize,
    names: usize,
    recoveries: usize,
    recoveries_crashed: [usize; 3],
    kills: usize,
    offline: usize,
    went_on: usize,
    views: Views,
    steps: BTreeSet<Step>,
}

impl Sum {
    pub(crate) fn add(&mut self, other: &Self) {
        self.workloads += other.workloads;
        self.ios += other.ios;
        self.prefixes += other.prefixes;
        self.states += other.states;
        self.capped += other.capped;
        self.partial += other.partial;
        self.torn += other.torn;
        self.names += other.names;
        self.recoveries += other.recoveries;
        for (own, other) in self.recoveries_crashed.iter_mut().zip(other.recoveries_crashed) {
            *own += other;
        }
        self.kills += other.kills;
        self.offline += other.offline;
        self.went_on += other.went_on;
        self.views.add(other.views);
        self.steps.extend(&other.steps);
    }

    /// What no workload came to, so that a test can see that it tried something.
    pub(crate) fn never_seen(&self) -> Vec<String> {
        let [once, twice, thrice] = self.recoveries_crashed;
        let counts = [
            ("partial states", self.partial),
            ("torn writes", self.torn),
            ("names that were not flushed", self.names),
            ("a recovery that was crashed", once),
            ("one that was crashed twice", twice),
            ("one that was crashed three times", thrice),
            ("kills", self.kills),
            ("offline", self.offline),
            ("going on", self.went_on),
            ("points between two records of an entry", self.views.inside_entries),
            ("points from before a growth", self.views.of_other_sizes),
            ("losses that are known", self.views.losses),
            ("entries that were carried", self.views.carried),
            ("entries that were carried for a pin inside an undo epoch", self.views.carried_for_pins),
        ];
        let mut unseen: Vec<String> =
            counts.iter().filter(|count| count.1 == 0).map(|count| count.0.to_owned()).collect();
        let steps = [
            Step::Write,
            Step::Mark,
            Step::State,
            Step::Commit,
            Step::Seal,
            Step::Apply,
            Step::Epoch,
            Step::Merge,
            Step::Drop,
            Step::Expire,
            Step::Release,
            Step::Prepare,
            Step::Shrink,
            Step::Rollback,
            Step::Forward,
            Step::Carry,
            Step::GiveUp,
            Step::Mend,
            Step::Grow,
            Step::Damage,
            Step::Sound,
            Step::Pin,
            Step::PinInside,
            Step::Anew,
            Step::Reopen,
            Step::Close,
            Step::Make,
        ];
        // Some steps make one I/O, or none of their own.
        let quiet = [Step::Write, Step::Mark, Step::State, Step::Shrink];
        let missed = steps.iter().filter(|step| !quiet.contains(step) && !self.steps.contains(step));
        unseen.extend(missed.map(|step| format!("a crash inside {step:?}")));
        unseen
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workloads, ios, prefixes, states, capped, partial, torn, names, .. } = self;
        writeln!(
            f,
            "{workloads} workloads of {ios} I/Os, {prefixes} prefixes, {states} states ({capped} more left out by the cap)"
        )?;
        writeln!(
            f,
            "  {partial} of them with a part of what was not flushed, {torn} with a torn write, {names} where a name was not flushed"
        )?;
        let [once, twice, thrice] = self.recoveries_crashed;
        writeln!(
            f,
            "  {} recoveries judged; {once} crashed before that, {twice} twice, {thrice} three times; {} after a kill",
            self.recoveries, self.kills
        )?;
        let Views { all, inside_entries, of_other_sizes, losses, carried, carried_for_pins } = self.views;
        writeln!(
            f,
            "  {all} views compared, {inside_entries} of them between two records of an entry, {of_other_sizes} from before a growth"
        )?;
        write!(
            f,
            "  {losses} losses and {carried} carried entries met, {carried_for_pins} of them for pins, {} folders read offline, {} used further",
            self.offline, self.went_on
        )
    }
}

/// One workload, and all that is tried of it.
pub(crate) struct Enumeration {
    seed: u64,
    subsets: usize,
    rng: Rng,
    pub(crate) sum: Sum,
    /// Where it is, for who wants to see why it failed.
    pub(crate) at: String,
}

/// Which of the unflushed reach the medium.
type Subset = Vec<bool>;

impl Enumeration {
    pub(crate) fn new(seed: u64, subsets: usize) -> Self {
        let at = "while it is played".to_owned();
        Self { seed, subsets, rng: Rng::new(!seed), sum: Sum::default(), at }
    }

    pub(crate) fn run(&mut self) {
        let workload = Workload::play(self.seed);
        self.sum.workloads += 1;
        self.sum.ios += workload.trace.len();
        for events in 0..=workload.trace.len() {
            self.sum.prefixes += 1;
            self.prefix(&workload, events);
        }
    }

    fn prefix(&mut self, workload: &Workload, events: usize) {
        let played = workload.step_of(events);
        let inside = played.events.0 < events && events < played.events.1;
        let before = if inside || events == 0 { &played.before } else { &played.after };
        let after = if events == 0 { &played.before } else { &played.after };
        if inside {
            self.sum.steps.insert(played.step);
        }
        let promise = Promise { before, after, told: Vec::new() };
        let units = unflushed(&workload.base, &workload.trace, events);
        let named = |unit: &Unflushed| !matches!(workload.trace[unit.event], Event::Write { .. });
        self.sum.names += usize::from(units.iter().any(named));
        let mut subsets = self.choose(&units);
        let all = subsets.len();
        subsets.truncate(self.subsets);
        self.sum.capped += all - subsets.len();
        for subset in subsets {
            let landed =
                units.iter().zip(&subset).filter(|unit| *unit.1).map(|unit| unit.0).collect::<Vec<_>>();
            self.at = format!(
                "{events} I/Os of {}, inside {:?}: {inside}, {} of {} unflushed landed: {landed:?}",
                workload.trace.len(),
                played.step,
                landed.len(),
                units.len()
            );
            let mut lands = subset.iter();
            let files = workload.base.crashed(&workload.trace, events, || *lands.next().unwrap_or(&true));
            self.state(&promise, files, workload.disks);
        }
        if self.rng.below(6) == 0 {
            self.at = format!("killed after {events} I/Os of {}", workload.trace.len());
            self.kill(&promise, workload, events);
        }
    }

    /// One state of the medium: judged at once, or after recoveries that are crashed themselves.
    fn state(&mut self, promise: &Promise<'_>, mut files: MemoryFiles, disks: usize) {
        self.sum.states += 1;
        if self.rng.below(8) == 0 {
            promise.judge_offline(&files);
            self.sum.offline += 1;
        }
        let rounds = [0, 0, 0, 0, 1, 2, 3][self.rng.below(7) as usize];
        for round in 0..rounds {
            let base = files.snapshot();
            let opened = promise.opened(&files, disks);
            if let Some(mut store) = opened {
                for disk in 0..store.disks.len() {
                    let newest = store.newest(disk);
                    store.apply(disk, newest).unwrap();
                }
            }
            let trace = files.trace();
            let events = self.rng.below(trace.len() as u64 + 1) as usize;
            let often = self.rng.below(5);
            let mut rng = self.rng.clone();
            self.rng.next();
            files = base.crashed(&trace, events, || rng.below(4) < often);
            self.at = format!("{}; recovery crashed after {events} of {} I/Os", self.at, trace.len());
            self.sum.recoveries_crashed[round] += 1;
        }
        let goes_on = self.rng.below(8) == 0;
        self.sum.went_on += usize::from(goes_on);
        self.sum.recoveries += 1;
        self.sum.views.add(promise.judge(&files, disks, goes_on));
    }

    /// The program is killed and started again: what it wrote stands in a cache. What the second one tells of, a power
    /// loss must leave.
    fn kill(&mut self, promise: &Promise<'_>, workload: &Workload, events: usize) {
        let files = workload.base.replayed(&workload.trace[..events]);
        let Some(store) = promise.opened(&files, workload.disks) else { return };
        let told = (0..store.disks.len()).map(|disk| store.newest(disk)).collect();
        drop(store);
        let (trace, often) = (files.trace(), self.rng.below(3));
        let mut rng = self.rng.clone();
        let files = workload.base.crashed(&trace, trace.len(), || rng.below(2) < often);
        let promise = Promise { before: promise.before, after: promise.after, told };
        self.sum.kills += 1;
        self.sum.recoveries += 1;
        self.sum.views.add(promise.judge(&files, workload.disks, false));
    }

    /// Subsets of what was not flushed: nothing and all of it first, the others in any order.
    fn choose(&mut self, units: &[Unflushed]) -> Vec<Subset> {
        let count = units.len();
        let mut chosen: Vec<Subset> = vec![vec![false; count]];
        let mut more: Vec<Subset> = Vec::new();
        let mut writes: Vec<usize> = units.iter().map(|unit| unit.event).collect();
        writes.dedup();
        for write in &writes {
            let of = |unit: &Unflushed| unit.event == *write;
            more.push(units.iter().map(|unit| !of(unit)).collect());
            more.push(units.iter().map(of).collect());
            let sectors = units.iter().filter(|unit| of(unit)).count() as u64;
            if sectors > 1 {
                // Torn: only its first sectors, or only its last ones, with and without what was written besides.
                let (cut, others) = (1 + self.rng.below(sectors - 1) as usize, self.rng.below(2) == 0);
                more.push(
                    units.iter().map(|unit| if of(unit) { unit.sector < cut } else { others }).collect(),
                );
                more.push(
                    units.iter().map(|unit| if of(unit) { unit.sector >= cut } else { others }).collect(),
                );
                let holes: Subset =
                    units.iter().map(|unit| if of(unit) { self.rng.below(2) == 0 } else { others }).collect();
                more.push(holes);
            }
        }
        for _ in 0..usize::from(count > 2) * 2 {
            more.push((0..count).map(|_| self.rng.below(2) == 0).collect());
        }
        for at in (1..more.len()).rev() {
            more.swap(at, self.rng.below(at as u64 + 1) as usize);
        }
        if count > 0 {
            chosen.push(vec![true; count]);
        }
        let mut seen: BTreeSet<Subset> = chosen.iter().cloned().collect();
        chosen.extend(more.into_iter().filter(|subset| seen.insert(subset.clone())));
        self.count(units, &chosen);
        chosen
    }

    fn count(&mut self, units: &[Unflushed], chosen: &[Subset]) {
        for subset in chosen.iter().take(self.subsets) {
            let landed = subset.iter().filter(|landed| **landed).count();
            self.sum.partial += usize::from(landed > 0 && landed < units.len());
            let torn = units
                .windows(2)
                .zip(subset.windows(2))
                .any(|(units, landed)| units[0].event == units[1].event && landed[0] != landed[1]);
            self.sum.torn += usize::from(torn);
        }
    }
}

/// What a power loss can undo behind a prefix of a trace.
fn unflushed(base: &MemoryFiles, trace: &[Event], events: usize) -> Vec<Unflushed> {
    let mut units = Vec::new();
    _ = base.crashed_where(trace, events, |unit| {
        units.push(unit);
        true
    });
    units
}
