//! Workloads: a journal that is made and used for a while, and the few I/Os behind that, with what was promised at each.
//!
//! Invariants: everything follows from the seed; every I/O lies in one step, and each step knows what was promised
//! before and after it. Units: entry numbers, events of the trace. Called by the enumeration.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::format::batch::{CHAIN_START, Mark, MarkCause, MarkClass};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochsExpired, PointDropped, PointKept};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::applier::{Applier, run_path};
use reprotect_engine::store::journal::points::own_id;
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, Run, thin};
use reprotect_engine::units::{PeerId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};

use crate::IOS_MAX;
use crate::enumerate::Rng;
use crate::journal_lab::{NOW, POSITION, batch, id};
use crate::oracle::{Disk, Oracle, is_bare};
use crate::store::{DISK_BYTES, FOLDER, SECTORS, SETTINGS, Store, target_path};

/// What is done; the order is that of [`Workload::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    Write,
    Mark,
    State,
    Commit,
    Seal,
    Apply,
    Epoch,
    Merge,
    Drop,
    Expire,
    Release,
    Prepare,
    Shrink,
    Rollback,
    Forward,
    Reopen,
    Close,
    Make,
}

/// Every step but the making of a journal, and how often it is taken.
const STEPS: [(Step, u64); 17] = [
    (Step::Write, 30),
    (Step::Mark, 6),
    (Step::State, 4),
    (Step::Commit, 16),
    (Step::Seal, 3),
    (Step::Apply, 18),
    (Step::Epoch, 10),
    (Step::Merge, 6),
    (Step::Drop, 3),
    (Step::Expire, 3),
    (Step::Release, 5),
    (Step::Prepare, 2),
    (Step::Shrink, 1),
    (Step::Rollback, 3),
    (Step::Forward, 2),
    (Step::Reopen, 2),
    (Step::Close, 2),
];

/// A step, its I/Os, and what was promised.
pub(crate) struct Played {
    pub(crate) step: Step,
    /// The first event of it and the first behind it.
    pub(crate) events: (usize, usize),
    pub(crate) before: Rc<Oracle>,
    pub(crate) after: Rc<Oracle>,
}

/// A workload that was played.
pub(crate) struct Workload {
    pub(crate) disks: usize,
    /// The medium before it, all of it durable.
    pub(crate) base: MemoryFiles,
    pub(crate) trace: Vec<Event>,
    pub(crate) played: Vec<Played>,
}

struct Player {
    rng: Rng,
    files: MemoryFiles,
    store: Option<Store>,
    oracle: Oracle,
    weights: Vec<u64>,
}

impl Workload {
    pub(crate) fn play(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let disks = [1, 2, 2, 3][rng.below(4) as usize];
        let files = MemoryFiles::default();
        for disk in 0..disks {
            files.put(target_path(disk), &found(disk));
        }
        let weights = STEPS.iter().map(|(_, weight)| weight * [1, 1, 2, 4][rng.below(4) as usize]).collect();
        let oracle = Oracle { disks: (0..disks).map(|disk| Disk::new(found(disk))).collect(), made: 0 };
        let mut player = Player { rng, files, store: None, oracle, weights };
        let (mut base, mut skipped) = (player.files.snapshot(), 0);
        let mut played = Vec::new();
        // Every tenth workload is the making of the journal; the others begin somewhere in its life.
        played.push(player.play(Step::Make));
        if !seed.is_multiple_of(10) {
            for _ in 0..player.rng.below(70) {
                let step = player.choose();
                player.play(step);
            }
            (base, skipped) = (player.files.snapshot(), player.files.happened());
            played.clear();
        }
        while player.files.happened() - skipped < IOS_MAX {
            let step = player.choose();
            played.push(player.play(step));
        }
        let mut trace = player.files.trace().split_off(skipped);
        trace.truncate(IOS_MAX);
        for step in &mut played {
            step.events = (step.events.0 - skipped, step.events.1 - skipped);
        }
        Self { disks, base, trace, played }
    }

    /// The step in which a prefix of the trace ends; the last one that is over, where it ends between two.
    pub(crate) fn step_of(&self, events: usize) -> &Played {
        let inside = |played: &&Played| played.events.0 < events && events < played.events.1;
        let over = |played: &&Played| played.events.1 <= events;
        self.played
            .iter()
            .find(inside)
            .or_else(|| self.played.iter().rev().find(over))
            .unwrap_or(&self.played[0])
    }
}

/// What stands on a target before anything is protected.
fn found(disk: usize) -> Vec<u8> {
    (0..DISK_BYTES).map(|at| if at / 4096 == 3 { 0 } else { (at / 512 + disk * 100) as u8 }).collect()
}

impl Player {
    fn choose(&mut self) -> Step {
        let mut at = self.rng.below(self.weights.iter().sum());
        let mut chosen = STEPS.iter().zip(&self.weights).filter(|(_, weight)| {
            let here = at < **weight;
            at = at.wrapping_sub(**weight);
            here
        });
        chosen.next().map_or(Step::Write, |(step, _)| step.0)
    }

    fn play(&mut self, step: Step) -> Played {
        let (before, start) = (Rc::new(self.oracle.clone()), self.files.happened());
        let disk = self.rng.below(self.oracle.disks.len() as u64) as usize;
        match step {
            Step::Make => self.make(),
            Step::Write => self.write(disk),
            Step::Mark => self.mark(),
            Step::State => self.state(disk),
            Step::Commit => self.commit(),
            Step::Seal => {
                self.store().journal.seal(NOW).unwrap();
                self.oracle.committed();
            }
            Step::Apply => self.apply(disk),
            Step::Epoch => self.epoch(disk),
            Step::Merge => self.merge(disk),
            Step::Drop => self.drop_point(disk),
            Step::Expire => self.expire(disk),
            Step::Release => self.release(),
            Step::Prepare => self.store().journal.prepare(2).unwrap(),
            Step::Shrink => self.store().journal.shrink(1).unwrap(),
            Step::Rollback | Step::Forward => self.roll_back(disk, step == Step::Forward),
            Step::Reopen | Step::Close => self.reopen(step == Step::Close),
        }
        self.note_due(step);
        let after = Rc::new(self.oracle.clone());
        Played { step, events: (start, self.files.happened()), before, after }
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    /// What the journal says can be had. Nothing goes but by the steps that take it away.
    fn note_due(&mut self, step: Step) {
        let takes = matches!(step, Step::Merge | Step::Drop | Step::Expire | Step::Release);
        let store = self.store.as_mut().unwrap();
        for (disk, known) in self.oracle.disks.iter_mut().enumerate() {
            let due = known.due_in(&store.journal, id(disk));
            let shape = &store.journal.shape().disks[&id(disk)];
            let mut gone = known.due.difference(&due).filter(|at| !is_bare(shape, at.epoch));
            assert!(takes || gone.next().is_none(), "{step:?} takes places of disk {disk} away");
            known.due = due;
        }
    }

    fn make(&mut self) {
        let journal = Journal::create(self.files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
        let mut store = Store { journal, disks: Vec::new(), logs: Vec::new() };
        for disk in 0..self.oracle.disks.len() {
            let added = DiskAdded { disk: id(disk), machine: [7; 16], size_sectors: SECTORS, time: NOW };
            store.journal.add_disk(added, NOW).unwrap();
            let target = self.files.opener().open(Path::new(&target_path(disk)), true).unwrap();
            let (applier, _) = Applier::open(&store.journal, id(disk), target, None).unwrap();
            store.disks.push(applier);
            let epoch = store.begin(disk).unwrap();
            self.oracle.disks[disk].begins(epoch);
        }
        self.oracle.made = self.oracle.disks.len();
        self.store = Some(store);
    }

    /// A batch of one to three writes.
    fn write(&mut self, disk: usize) {
        let known = &mut self.oracle.disks[disk];
        let (number, mut content) = (known.appended + 1, known.content().to_vec());
        let mut records = Vec::new();
        for _ in 0..1 + self.rng.below(3) {
            let start = self.rng.below(SECTORS);
            let len = (1 + self.rng.below(20)).min(SECTORS - start);
            let (range, kind) = (SectorRange::new(start, start + len), self.rng.below(5));
            let place = &mut content[(start * SECTOR_BYTES) as usize..(range.end * SECTOR_BYTES) as usize];
            match kind {
                0 => place.fill(0),
                1 => place.fill(number as u8 | 1),
                2 => {} // what is there is written again
                _ => place.iter_mut().for_each(|byte| *byte = self.rng.next() as u8),
            }
            records.push(match kind {
                0 => Record::zeros(range),
                _ => Record::data(start, Bytes::copy_from_slice(place)),
            });
        }
        let body = batch(id(disk), number, &records);
        let (head, tail) = body.split_at(body.len() / 3);
        let got = self.store.as_mut().unwrap().journal.append(id(disk), EntryKind::Batch, &[head, tail], NOW);
        assert_eq!(got.unwrap().0, number);
        self.oracle.disks[disk].appends(number, Arc::new(content));
    }

    /// One point of the machine: a mark on each of its disks.
    fn mark(&mut self) {
        let class = [MarkClass::Crash, MarkClass::App, MarkClass::Fuzzy][self.rng.below(3) as usize];
        let mut point = [0; 16];
        point[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        for disk in 0..self.oracle.disks.len() {
            let known = &mut self.oracle.disks[disk];
            let number = known.appended + 1;
            let mark = Mark {
                disk: id(disk),
                lineage: POSITION.lineage,
                generation: POSITION.generation,
                sequence: Sequence(number),
                chain: CHAIN_START,
                source_time: Timestamp(number),
                point,
                number,
                class,
                cause: MarkCause::Timer,
                name: Text::new(""),
                unread_blocks: 0,
            };
            let content = known.content();
            let journal = &mut self.store.as_mut().unwrap().journal;
            journal.append(id(disk), EntryKind::Mark, &[&mark.to_bytes()], NOW).unwrap();
            known.appends(number, content);
            known.marks.insert(number, point);
        }
    }

    fn state(&mut self, disk: usize) {
        let known = &mut self.oracle.disks[disk];
        known.state.1 += 1;
        let state = DiskState {
            disk: id(disk),
            agent: PeerId([3; 16]),
            source: [4; 16],
            size_sectors: SECTORS,
            generation: POSITION.generation,
            lineage: POSITION.lineage,
            sequence: Sequence(known.state.1),
            chain: CHAIN_START,
            marked: Sequence(0),
            pass: 1,
            mode: PassMode::Done,
            settled: RangeSet::default(),
            touched: RangeSet::default(),
        };
        self.store().journal.append_state(&state, NOW).unwrap();
    }

    fn commit(&mut self) {
        self.store().journal.commit(NOW).unwrap();
        self.oracle.committed();
    }

    /// One window: at most four entries of what is committed.
    fn apply(&mut self, disk: usize) {
        let known = &self.oracle.disks[disk];
        let through = known.committed.min(known.applied + 1 + self.rng.below(4));
        self.apply_through(disk, through);
    }

    fn apply_through(&mut self, disk: usize, through: u64) {
        let store = self.store.as_mut().unwrap();
        let (before, epoch) = (store.disks[disk].applied().number, store.disks[disk].open_epoch().unwrap());
        store.apply(disk, through).unwrap();
        if through > before {
            self.oracle.committed(); // an entry is durable before it is applied
            self.oracle.disks[disk].applies(through, epoch);
        }
    }

    /// Ends the undo epoch, at the newest entry, which is applied; every other time its end is kept as a point.
    fn epoch(&mut self, disk: usize) {
        self.commit();
        self.apply_through(disk, self.oracle.disks[disk].appended);
        self.commit();
        let keeps = self.rng.below(2) == 0;
        let store = self.store.as_mut().unwrap();
        let known = &mut self.oracle.disks[disk];
        let epoch = store.disks[disk].open_epoch().unwrap();
        let at = At::entry(epoch, known.applied);
        let point = PointKept {
            disk: id(disk),
            point: own_id(id(disk), at),
            number: at.number,
            sequence: Sequence(at.number),
            epoch,
            source_time: Timestamp(at.number),
            class: MarkClass::Crash,
            pinned: false,
            degraded: false,
            name: Text::new(""),
            cause: MarkCause::Timer,
        };
        store.disks[disk].close_epoch_at(&mut store.journal, keeps.then_some(point), NOW).unwrap();
        if keeps {
            known.kept.insert(point.point, at);
        }
        let epoch = store.begin(disk).unwrap();
        known.begins(epoch);
    }

    /// Two neighbouring runs become one.
    fn merge(&mut self, disk: usize) {
        let journal = &mut self.store().journal;
        let next = thin::next(journal, id(disk), Timestamp(u64::MAX), &[]).unwrap();
        let Some(mut merge) = next else { return };
        let bytes = merge.write().unwrap();
        merge.settle(journal, bytes, NOW).unwrap();
    }

    fn drop_point(&mut self, disk: usize) {
        let at = self.rng.next() as usize;
        let known = &mut self.oracle.disks[disk];
        let Some(point) = known.kept.keys().nth(at % known.kept.len().max(1)).copied() else { return };
        known.kept.remove(&point);
        let dropped = PointDropped { disk: id(disk), point };
        self.store().journal.edit(&[Edit::PointDropped(dropped)], NOW).unwrap();
    }

    /// The oldest epochs go, and the points in them: first the edit, then the files.
    fn expire(&mut self, disk: usize) {
        let share = self.rng.below(3) as usize;
        let store = self.store.as_mut().unwrap();
        let shape = store.journal.shape().disks[&id(disk)].clone();
        let cut = |through: u64| shape.runs.iter().any(|run| run.first <= through && run.last > through);
        let closed = shape.epochs.iter().filter_map(|epoch| epoch.closed).map(|closed| closed.epoch);
        let Some(through) = closed.filter(|through| !cut(*through)).nth(share) else { return };
        let known = &mut self.oracle.disks[disk];
        let gone: Vec<[u8; 16]> =
            known.kept.iter().filter(|(_, at)| at.epoch <= through).map(|(point, _)| *point).collect();
        let mut edits: Vec<Edit> = Vec::new();
        for point in gone {
            known.kept.remove(&point);
            edits.push(Edit::PointDropped(PointDropped { disk: id(disk), point }));
        }
        edits.push(Edit::EpochsExpired(EpochsExpired { disk: id(disk), through }));
        store.journal.edit(&edits, NOW).unwrap();
        let runs: Vec<Run> = shape.runs.into_iter().filter(|run| run.last <= through).collect();
        for run in runs {
            store.journal.files().remove(&run_path(&store.journal, id(disk), run.file)).unwrap();
        }
    }

    /// Segments are given back, from the oldest on.
    fn release(&mut self) {
        let count = 1 + self.rng.below(3) as usize;
        self.commit();
        let journal = &mut self.store().journal;
        for segment in journal.releasable().into_iter().take(count) {
            journal.release(segment, NOW).unwrap();
        }
        self.oracle.committed();
    }

    /// Back to a point, or to where the disk stood before the last rollback; what waits is applied first.
    fn roll_back(&mut self, disk: usize, forward: bool) {
        let share = self.rng.next() as usize;
        self.commit();
        self.apply_through(disk, self.oracle.disks[disk].appended);
        let known = &self.oracle.disks[disk];
        let places: Vec<At> = match known.rolled.keys().next_back() {
            _ if !forward => known.due.iter().copied().collect(),
            Some(last) => known.due.iter().rfind(|at| at.epoch < *last).copied().into_iter().collect(),
            None => Vec::new(),
        };
        let Some(at) = places.get(share % places.len().max(1)).copied() else { return };
        let content = Arc::clone(&known.truth[&at]);
        let (number, store) = (known.applied, self.store.as_mut().unwrap());
        let known = &mut self.oracle.disks[disk];
        if store.view(disk, at).is_err() {
            return; // committing wrote a segment's worth, and another place was not due any more
        }
        rollback(&mut store.journal, &mut store.disks[disk], at, POSITION, NOW).unwrap();
        let rolled = store.journal.shape().disks[&id(disk)].epochs.last().unwrap().opened.epoch;
        known.rolls(rolled, number, content);
        let epoch = store.begin(disk).unwrap();
        known.begins(epoch);
        self.oracle.committed();
    }

    /// The program ends, in order or not, and is started again.
    fn reopen(&mut self, in_order: bool) {
        let store = self.store.take().unwrap();
        drop(store.disks);
        if in_order {
            store.journal.close(NOW).unwrap();
            self.oracle.committed();
        } else {
            drop(store.journal);
        }
        let store = Store::open(&self.files, self.oracle.disks.len()).unwrap();
        for (disk, known) in self.oracle.disks.iter_mut().enumerate() {
            known.reopened(store.newest(disk), store.disks[disk].applied().number);
            assert!(known.state.0 <= known.state.1);
            let state = store.logs[disk].state.as_ref().map_or(0, |(state, _)| state.sequence.0);
            known.state = (state, state);
        }
        self.store = Some(store);
    }
}
