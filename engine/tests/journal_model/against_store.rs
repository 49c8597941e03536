//! The store against the model: the same operations, power lost at any write of them, and every point of both compared.
//!
//! A play is a seed. The model takes a step of the source, of the apply worker, of retention or of an operator; the
//! store does the same on memory files. Power is then lost after some of the store's writes (each prefix is a crash
//! point; of the sectors no flush covered a seeded choice lands), the store is opened, perhaps interrupted again, and
//! every point that the model promised before the step and still promises after it must show the model's sectors. Now
//! and then both go on from such a crash, or from a kill, after which unflushed writes are in the cache still. In the
//! suite two crash points of each step are tried; with `CRASH_CASES` that many seeds are played, the first of them with
//! all crash points, the others with four of each step (`make crash`): a step has some forty, and every point is read at
//! each, so that all of 2,000 seeds would take hours. Called by `cargo test`.
//!
//! That it sees what it should is shown by `mutants.rs`, with bugs in the store itself. Others were tried by hand, and
//! each is seen within 26 seeds (when every crash point is tried): no first touch, runs after the point's epoch only, a merged
//! or sealed run that is not flushed before it is named, edits that are not flushed, the last group not flushed at opening, segments released while their epoch goes
//! on, STATE and APPLIED not carried at a release. Four others change nothing that can be seen, for
//! something else does the same: APPLIED counted durable early (a release commits first), a reopened run that is not
//! flushed (the next window flushes it), an ended epoch that does not say what is applied (APPLIED is durable before), the
//! superblock not flushed (`journal_store.rs` sees that while the journal is made).
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use reprotect_engine::store::files::memory::{Event, MemoryFiles};

use super::device::Chaos;
use super::machine::Journal;
use super::manifest::Kind;
use super::records::{At, BLOCKS, Body, Entry, Record, SECTORS};
use super::rng::Rng;
use super::seeds::play_all;
use super::source::Source;
use super::store::{Store, bytes_of_disk};

/// What must be readable, and what it reads: by disk and point.
type Promise = BTreeMap<(usize, At), Vec<u8>>;

struct Play {
    model: Journal,
    source: Source,
    store: Option<Store>,
    /// The medium at the last power loss, and what was written since.
    before: MemoryFiles,
    files: MemoryFiles,
    rng: Rng,
    /// The store keeps redo only where an undo epoch goes on.
    greedy: bool,
    /// Crash points tried per step; `None`: all.
    tried: Option<usize>,
    sum: Sum,
}

/// What the plays came to, so that a test can see that it was not nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    steps: usize,
    crashes: usize,
    went_on: usize,
    killed: usize,
    views: usize,
    epochs: usize,
    rollbacks: usize,
    merges: usize,
    expired: usize,
    released: usize,
}

impl Play {
    fn new(seed: u64, tried: Option<usize>) -> Self {
        let mut rng = Rng::new(seed);
        let disks = 1 + usize::from(rng.chance(400));
        let targets: Vec<Vec<u32>> =
            (0..disks).map(|_| (0..BLOCKS * SECTORS).map(|at| 1 + at as u32).collect()).collect();
        let mut source = Source::new(&mut rng, &targets, &vec![false; disks]);
        for (disk, target) in targets.iter().enumerate() {
            source.resync(disk, &target[..1]); // one write, and the disk is not suspended any more
        }
        let chaos = Chaos {
            rng: rng.clone(),
            stop_per_mille: 0,
            flush_failure_per_mille: 0,
            retries_failed_flush: false,
        };
        let mut model = Journal::new(chaos, None, false, targets.clone(), vec![false; disks]);
        model.add_segment().unwrap();
        let files = MemoryFiles::default();
        let store = Some(Store::create(&files, &targets));
        let before = files.snapshot(); // nothing is lost while the journal is made: `redo_log.rs` does that
        let files = before.snapshot();
        drop(store);
        let store = Some(Store::open(&files, disks).unwrap());
        let greedy = seed % 3 == 1;
        Self { model, source, store, before, files, rng, greedy, tried, sum: Sum::default() }
    }

    fn disks(&self) -> usize {
        self.model.disks.len()
    }

    fn run(&mut self) {
        for _ in 0..self.rng.between(40, 160) {
            let (promised, durable) = (self.promised(), self.durable());
            let events = self.files.trace().len();
            self.step();
            self.follow();
            self.compare();
            self.sum.steps += 1;
            self.crash(events, &promised, &durable);
        }
        // In order, and once more from the medium alone.
        let disks = self.disks();
        self.settle();
        self.follow();
        self.compare();
        self.store.take().unwrap().close().unwrap();
        self.store = Some(Store::open(&self.files, disks).unwrap());
        self.follow();
        self.compare();
    }

    fn durable(&self) -> Vec<usize> {
        self.model.disks.iter().map(|disk| disk.durable).collect()
    }

    /// One step of anybody, on the model.
    fn step(&mut self) {
        self.model.now += 1;
        self.source.now = self.model.now;
        let disk = self.rng.below(self.disks());
        match self.rng.below(100) {
            0..18 => self.source.write(&mut self.rng, disk),
            18..31 => self.source.mark(),
            31..46 => self.receive(),
            46..55 => self.model.flush_log().unwrap(),
            55..77 => self.model.apply(disk).unwrap(),
            77..82 => self.model.free_segment().unwrap(),
            82..90 => {
                let runs = &self.model.catalogue.disks[disk].runs;
                let low = runs[self.rng.below(runs.len())].low;
                self.model.merge_runs(disk, low).unwrap();
            }
            90..92 => self.model.expire(disk).unwrap(),
            92..94 => self.roll_back(disk),
            _ => self.model.now += 10,
        }
    }

    fn receive(&mut self) {
        let mut entries = Vec::new();
        for (own, known) in self.source.disks.iter().zip(&self.model.disks) {
            let room = self.rng.below(5);
            entries.extend(own.stream.iter().skip(known.received).take(room).cloned().map(Entry::Record));
        }
        if !entries.is_empty() {
            self.model.append(entries).unwrap();
        }
    }

    /// Everything is received, durable and applied.
    fn settle(&mut self) {
        for disk in 0..self.disks() {
            let rest = self.source.disks[disk].stream.iter().skip(self.model.disks[disk].received);
            let rest: Vec<Entry> = rest.cloned().map(Entry::Record).collect();
            if !rest.is_empty() {
                self.model.append(rest).unwrap();
            }
            self.model.flush_log().unwrap();
            while self.model.disks[disk].applied < self.model.disks[disk].durable {
                self.model.apply(disk).unwrap();
            }
        }
        self.model.flush_log().unwrap();
    }

    fn roll_back(&mut self, disk: usize) {
        self.settle();
        let places: Vec<At> = self.places(disk);
        let to = places[self.rng.below(places.len())];
        self.model.begin_rollback(disk, to).unwrap();
        while matches!(self.model.catalogue.disks[disk].kind(), Kind::Rollback(_)) {
            self.model.roll_back(disk).unwrap();
        }
        self.sum.rollbacks += 1;
    }

    /// Every point of a disk: kept ends of epochs, and what lies in the any-write window.
    fn places(&self, disk: usize) -> Vec<At> {
        let catalogue = &self.model.catalogue.disks[disk];
        let kept = |epoch: &usize| catalogue.epochs[*epoch].last.is_some() && catalogue.keeps_end_of(*epoch);
        let ends = (0..catalogue.epochs.len()).filter(kept);
        let ends = ends.map(|epoch| At { base: epoch + 1, upto: catalogue.epochs[epoch].last.unwrap_or(0) });
        let window = self.model.window_start(disk)..=self.model.disks[disk].durable;
        let inside = window.map(|sequence| catalogue.locate(sequence));
        let whole = |at: &At| catalogue.epochs[at.base].kind == Kind::Normal && at.base >= catalogue.floor;
        let kept = |at: &At| !self.greedy || at.base == catalogue.active();
        ends.chain(inside.filter(whole).filter(kept)).collect()
    }

    fn promised(&self) -> Promise {
        let mut promised = Promise::new();
        for disk in 0..self.disks() {
            for at in self.places(disk) {
                let seen = self.model.view(disk, at);
                let values: Vec<u32> = seen.iter().flatten().map(|value| value.unwrap()).collect();
                promised.insert((disk, at), bytes_of_disk(&values));
            }
        }
        promised
    }

    fn follow(&mut self) {
        let streams: Vec<&[Record]> = self.source.disks.iter().map(|disk| &disk.stream[..]).collect();
        let store = self.store.as_mut().unwrap();
        let shape = |store: &Store| (0..streams.len()).map(|disk| store.ends(disk).len()).sum::<usize>();
        let before = (shape(store), store.figures());
        store.follow(&self.model, &streams, self.greedy).unwrap();
        let after = store.figures();
        self.sum.epochs += shape(store).saturating_sub(before.0);
        self.sum.released += before.1.0.saturating_sub(after.0);
        self.sum.merges += after.1.saturating_sub(before.1.1);
        self.sum.expired += after.2.saturating_sub(before.1.2);
    }

    /// Both show the same: targets, ends of epochs, every point.
    fn compare(&mut self) {
        let promised = self.promised();
        let store = self.store.as_mut().unwrap();
        for (disk, known) in self.model.disks.iter().enumerate() {
            // After a stop a target may be ahead of what was said to be applied, until all is applied again.
            if store.applied(disk) == known.received && known.applied == known.received {
                let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.model.live(disk, block)).collect();
                let wrong = first_wrong(&store.target(disk), &bytes_of_disk(&live));
                assert_eq!(wrong, None, "the target of disk {disk}: first sector that differs");
            }
            let floor = self.model.catalogue.disks[disk].floor;
            let ends = self.model.catalogue.disks[disk].epochs.iter().enumerate();
            let ends: Vec<_> = ends.filter_map(|(at, epoch)| Some((at, epoch.last?))).collect();
            let own: Vec<_> = store.ends(disk).into_iter().filter(|end| end.0 >= floor).collect();
            let wanted = &ends[floor.min(ends.len())..];
            // An epoch that wrote nothing, which no point names, may have been folded away; one inside a merged run was.
            let catalogue = &self.model.catalogue.disks[disk];
            let stream = &self.source.disks[disk].stream;
            let empty = |(epoch, last): &(usize, usize)| {
                let before = ends.get(epoch - 1).map_or(0, |end| end.1);
                let inside = stream.get(before..*last).unwrap_or_default();
                let wrote = inside.iter().any(|record| matches!(record.body, Body::Write { .. }));
                !catalogue.keeps_end_of(*epoch) || !wrote
            };
            let missing: Vec<_> = wanted.iter().filter(|end| !own.contains(end)).collect();
            assert!(missing.iter().all(|end| empty(end)), "disk {disk} lacks the ends {missing:?}");
            assert!(own.iter().all(|end| wanted.contains(end)), "ends of the epochs of disk {disk}: {own:?}");
        }
        self.sum.views += promised.len();
        shows(store, &promised);
    }

    /// Loses power after some of the writes since `events`; goes on from there, now and then.
    fn crash(&mut self, events: usize, promised: &Promise, durable: &[usize]) {
        let still = self.promised();
        let promised: Promise = promised
            .iter()
            .filter(|(at, _)| still.contains_key(at))
            .map(|(at, disk)| (*at, disk.clone()))
            .collect();
        let trace = self.files.trace();
        let points: Vec<usize> = match self.tried {
            None => (events..=trace.len()).collect(),
            Some(count) => (0..count).map(|_| self.rng.between(events, trace.len())).collect(),
        };
        for at in points {
            let (mut seed, interrupted) = (self.rng.clone(), self.rng.chance(300));
            let often = self.rng.below(1001);
            let mut files = self.before.crashed(&trace, at, || seed.chance(often));
            if interrupted {
                let after = files.snapshot();
                drop(Store::open(&files, durable.len()).unwrap());
                let again = files.trace();
                let at = self.rng.below(again.len() + 1);
                files = after.crashed(&again, at, || seed.chance(often));
            }
            let base = files.snapshot();
            let mut store = Store::open(&files, durable.len()).unwrap();
            for (disk, durable) in durable.iter().enumerate() {
                let newest = store.newest(disk);
                assert!(newest >= *durable, "entry {durable} of disk {disk} was durable, {newest} is there");
            }
            shows(&mut store, &promised);
            self.sum.crashes += 1;
            self.sum.views += promised.len();
            if self.rng.chance(40) {
                return self.go_on(store, base, files);
            }
            if self.rng.chance(40) {
                return self.kill(&trace[..at], &promised);
            }
        }
    }

    /// The program is killed: what it wrote stands in the cache, flushed or not, until power is lost later.
    fn kill(&mut self, trace: &[Event], promised: &Promise) {
        self.store = None;
        let files = self.before.replayed(trace);
        let mut store = Store::open(&files, self.disks()).unwrap();
        shows(&mut store, promised);
        self.sum.killed += 1;
        self.go_on(store, self.before.clone(), files);
    }

    /// Power is lost for the model, too; then each gets what only the other has.
    fn go_on(&mut self, store: Store, before: MemoryFiles, files: MemoryFiles) {
        let durable = self.durable();
        (self.store, self.before, self.files) = (Some(store), before, files);
        self.model.power_loss();
        self.model.open().unwrap();
        self.model.opened_at_mark = self.source.marks;
        for (disk, durable) in durable.into_iter().enumerate() {
            assert_eq!(self.model.resume(disk, durable, 1).unwrap(), Vec::<usize>::new());
            let newest = self.store.as_ref().unwrap().newest(disk);
            let stream = &self.source.disks[disk].stream;
            let more = stream.iter().take(newest).skip(self.model.disks[disk].received);
            let more: Vec<Entry> = more.cloned().map(Entry::Record).collect();
            if !more.is_empty() {
                self.model.append(more).unwrap();
            }
        }
        self.model.flush_log().unwrap();
        self.follow();
        self.compare();
        self.sum.went_on += 1;
    }
}

fn first_wrong(got: &[u8], wanted: &[u8]) -> Option<usize> {
    got.chunks(512).zip(wanted.chunks(512)).position(|(got, wanted)| got != wanted)
}

fn shows(store: &mut Store, promised: &Promise) {
    for ((disk, at), wanted) in promised {
        if store.is_nameless(*disk, *at) {
            continue;
        }
        let got = store.view(*disk, *at).unwrap_or_else(|error| panic!("disk {disk} {at:?}: {error}"));
        assert_eq!(
            first_wrong(&got, wanted),
            None,
            "disk {disk} {at:?}: first sector that differs from the model"
        );
    }
}

/// Seeds of the long form of which every crash point is tried, and crash points of each step of the others.
const WHOLE_SEEDS: u64 = 60;
const TRIED_LONG: usize = 4;

/// Plays one seed; `long`: as `make crash` does.
pub(crate) fn play(seed: u64, long: bool) -> Result<Sum, String> {
    let tried = match long {
        false => Some(2),
        true => (seed >= WHOLE_SEEDS).then_some(TRIED_LONG),
    };
    let mut play = Play::new(seed, tried);
    match catch_unwind(AssertUnwindSafe(|| play.run())) {
        Ok(()) => Ok(play.sum),
        Err(_) => {
            let step = play.sum.steps;
            Err(format!("the store differs from the model with STORE_SEED={seed}, step {step}"))
        }
    }
}

/// Plays the seeds.
fn play_seeds(seeds: Range<u64>, long: bool) -> (Sum, Vec<String>) {
    play_all(seeds, 1, |seed| play(seed, long), Sum::add)
}

#[test]
fn after_any_crash_the_store_shows_every_point_as_the_model_does() {
    let long = super::number("CRASH_CASES");
    let seeds = super::number("STORE_SEED").map_or(0..long.unwrap_or(12), |seed| seed..seed + 1);
    let (sum, failures) = play_seeds(seeds.clone(), long.is_some());
    eprintln!("{} seeds: {sum:?}", seeds.count());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    if super::number("STORE_SEED").is_none() {
        let Sum { crashes, went_on, killed, epochs, rollbacks, merges, expired, released, .. } = sum;
        // A test that tries nothing proves nothing.
        for (what, count) in [
            ("crashes", crashes),
            ("crashes from which both went on", went_on),
            ("kills", killed),
            ("epochs", epochs),
            ("rollbacks", rollbacks),
            ("merges", merges),
            ("expired epochs", expired),
            ("released segments", released),
        ] {
            assert!(count > 0, "no seed came to {what}");
        }
    }
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.crashes += other.crashes;
        self.went_on += other.went_on;
        self.killed += other.killed;
        self.views += other.views;
        self.epochs += other.epochs;
        self.rollbacks += other.rollbacks;
        self.merges += other.merges;
        self.expired += other.expired;
        self.released += other.released;
    }
}
