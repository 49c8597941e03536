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
use reprotect_engine::units::{PeerId, SectorRange, Sequence, Timestamp};

use crate::IOS_MAX;
use crate::enumerate::Rng;
use crate::journal_lab::{NOW, POSITION, batch, id};
use crate::oracle::{Disk, Kept, Oracle, is_bare};
use crate::rare::{bulk, lay};
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
    Carry,
    GiveUp,
    Mend,
    Grow,
    Damage,
    Sound,
    Pin,
    PinInside,
    Anew,
    Reopen,
    Close,
    Make,
}

/// Every step but the making of a journal, and how often it is taken.
const STEPS: [(Step, u64); 26] = [
    (Step::Write, 30),
    (Step::Mark, 6),
    (Step::State, 4),
    (Step::Commit, 16),
    (Step::Seal, 3),
    (Step::Apply, 18),
    (Step::Epoch, 10),
    (Step::Merge, 12),
    (Step::Drop, 3),
    (Step::Expire, 3),
    (Step::Release, 5),
    (Step::Prepare, 2),
    (Step::Shrink, 1),
    (Step::Rollback, 3),
    (Step::Forward, 2),
    (Step::Carry, 5),
    (Step::GiveUp, 4),
    (Step::Mend, 4),
    (Step::Grow, 3),
    (Step::Damage, 5),
    (Step::Sound, 2),
    (Step::Pin, 3),
    (Step::PinInside, 4),
    (Step::Anew, 2),
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

pub(crate) struct Player {
    pub(crate) rng: Rng,
    pub(crate) files: MemoryFiles,
    pub(crate) store: Option<Store>,
    pub(crate) oracle: Oracle,
    weights: Vec<u64>,
    /// Its target seldom takes anything, so that its entries wait.
    stands: Option<usize>,
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
        let stands = (rng.below(2) == 0).then(|| rng.below(disks as u64) as usize);
        let mut player = Player { rng, files, store: None, oracle, weights, stands };
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
        let applies = matches!(step, Step::Apply | Step::Epoch | Step::Rollback | Step::Forward | Step::Grow);
        let stands = applies && self.stands == Some(disk) && self.rng.below(5) > 0;
        let step = if stands { Step::Write } else { step };
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
            Step::Carry => self.carry(),
            Step::GiveUp => self.give_up(disk),
            Step::Mend => self.mend(disk),
            Step::Grow => self.grow(disk),
            Step::Damage => self.damage(disk),
            Step::Sound => self.sound(disk),
            Step::Pin => self.pin(disk),
            Step::PinInside => self.pin_inside(disk),
            Step::Anew => self.write_anew(),
            Step::Reopen | Step::Close => self.reopen(step == Step::Close),
        }
        self.note_due(step);
        let after = Rc::new(self.oracle.clone());
        Played { step, events: (start, self.files.happened()), before, after }
    }

    pub(crate) fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    /// What the journal says can be had. Nothing goes but by the steps that take it away.
    fn note_due(&mut self, step: Step) {
        let log = matches!(step, Step::Release | Step::Carry | Step::GiveUp);
        let takes = log || matches!(step, Step::Merge | Step::Drop | Step::Expire);
        let store = self.store.as_mut().unwrap();
        for (disk, known) in self.oracle.disks.iter_mut().enumerate() {
            let due = known.due_in(&store.journal, id(disk));
            let shape = &store.journal.shape().disks[&id(disk)];
            let mut gone = known.due.difference(&due).filter(|at| !is_bare(shape, at.epoch));
            assert!(takes || gone.next().is_none(), "{step:?} takes places of disk {disk} away");
            let pinned = known.kept.values().filter(|kept| kept.pinned && known.due.contains(&kept.at));
            for Kept { at, .. } in pinned {
                assert!(due.contains(at), "{step:?} takes the pinned point {at} of disk {disk} away");
            }
            known.due = due;
            let segments = &store.journal.shape().segments;
            known.damaged_entries.retain(|_, segment| segments.contains_key(segment));
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

    /// A batch of one to three writes: of a stretch of either kind, or of a pass, which may write parts of it only.
    fn write(&mut self, disk: usize) {
        let kind =
            [EntryKind::Batch, EntryKind::Batch, EntryKind::Ordered, EntryKind::Ordered, EntryKind::Bulk]
                [self.rng.below(5) as usize];
        let known = &mut self.oracle.disks[disk];
        let (number, sectors) = (known.appended + 1, known.size());
        let mut contents = vec![known.content().to_vec()];
        let mut records = Vec::new();
        // What may be written of a pass: the others were written to since.
        let cut = self.rng.below(sectors);
        let keep = match kind {
            EntryKind::Bulk => vec![SectorRange::new(0, cut / 2), SectorRange::new(cut, sectors)],
            _ => vec![SectorRange::new(0, sectors)],
        };
        for _ in 0..1 + self.rng.below(3) {
            // Records of a pass ascend.
            let from = records.last().filter(|_| kind == EntryKind::Bulk);
            let from = from.map_or(0, |record: &Record| record.range().end);
            if from == sectors {
                break;
            }
            let start = from + self.rng.below(sectors - from);
            let len = (1 + self.rng.below(20)).min(sectors - start);
            let range = SectorRange::new(start, start + len);
            let record = self.record(range, number, contents.last().unwrap());
            let mut content = contents.last().unwrap().clone();
            lay(&mut content, range, &record.1, &keep);
            records.push(record.0);
            contents.push(content);
        }
        let content = Arc::new(contents.pop().unwrap());
        let ordered = kind == EntryKind::Ordered && records.len() > 1;
        let part = ordered.then(|| {
            let count = 1 + self.rng.below(records.len() as u64 - 1) as usize;
            (count as u32, Arc::new(contents.swap_remove(count)))
        });
        let body = match kind {
            EntryKind::Bulk => bulk(id(disk), number, SectorRange::new(0, sectors), &keep, &records),
            _ => batch(id(disk), number, &records).to_vec(),
        };
        self.append(disk, kind, &body, content, part);
    }

    /// What is written somewhere: zeros, one byte, what is there already, or noise.
    fn record(&mut self, range: SectorRange, number: u64, before: &[u8]) -> (Record, Vec<u8>) {
        let (from, to) = (range.byte_start() as usize, (range.byte_start() + range.bytes()) as usize);
        let mut plain = before[from..to].to_vec();
        match self.rng.below(5) {
            0 => {
                plain.fill(0);
                return (Record::zeros(range), plain);
            }
            1 => plain.fill(number as u8 | 1),
            2 => {}
            _ => plain.iter_mut().for_each(|byte| *byte = self.rng.next() as u8),
        }
        (Record::data(range.start, Bytes::copy_from_slice(&plain)), plain)
    }

    /// An entry goes into the log.
    pub(crate) fn append(
        &mut self,
        disk: usize,
        kind: EntryKind,
        body: &[u8],
        content: Arc<Vec<u8>>,
        part: Option<(u32, Arc<Vec<u8>>)>,
    ) {
        let (head, tail) = body.split_at(body.len() / 3);
        let got = self.store().journal.append(id(disk), kind, &[head, tail], NOW);
        let number = got.unwrap().0;
        assert_eq!(number, self.oracle.disks[disk].appended + 1, "an entry's number");
        self.oracle.disks[disk].appends(number, content, part);
    }

    /// One point of the machine: a mark on each of its disks.
    pub(crate) fn mark(&mut self) {
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
            known.appends(number, content, None);
            known.marks.insert(number, point);
        }
    }

    pub(crate) fn state(&mut self, disk: usize) {
        let known = &mut self.oracle.disks[disk];
        known.state.1 += 1;
        let size_sectors = known.size();
        let state = DiskState {
            disk: id(disk),
            agent: PeerId([3; 16]),
            source: [4; 16],
            size_sectors,
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

    pub(crate) fn commit(&mut self) {
        self.store().journal.commit(NOW).unwrap();
        self.oracle.committed();
    }

    /// One window: at most four entries of what is committed.
    fn apply(&mut self, disk: usize) {
        let known = &self.oracle.disks[disk];
        let through = known.committed.min(known.applied + 1 + self.rng.below(4));
        self.apply_through(disk, through);
    }

    pub(crate) fn apply_through(&mut self, disk: usize, through: u64) {
        let store = self.store.as_mut().unwrap();
        let (before, epoch) = (store.disks[disk].applied().number, store.disks[disk].open_epoch().unwrap());
        store.apply(disk, through).unwrap();
        let applied = store.disks[disk].applied().number; // less, where the newest entries are lost
        if applied > before {
            self.oracle.committed(); // an entry is durable before it is applied
            self.oracle.disks[disk].applies(applied, epoch);
        }
    }

    /// Ends the undo epoch, at the newest entry, which is applied, and begins the next.
    fn epoch(&mut self, disk: usize) {
        self.commit();
        self.apply_through(disk, self.oracle.disks[disk].appended);
        self.commit();
        self.end_epoch(disk);
        let epoch = self.store().begin(disk).unwrap();
        self.oracle.disks[disk].begins(epoch);
    }

    /// Ends the undo epoch; every other time its end is kept as a point.
    pub(crate) fn end_epoch(&mut self, disk: usize) {
        let keeps = self.rng.below(2) == 0;
        let store = self.store.as_mut().unwrap();
        let known = &mut self.oracle.disks[disk];
        let epoch = store.disks[disk].open_epoch().unwrap();
        let at = At::entry(epoch, known.applied);
        let degraded = store.journal.shape().disks[&id(disk)].is_doubtful(at.number);
        assert_eq!(degraded, known.is_doubtful(at.number), "what stands behind entry {}", at.number);
        let point = PointKept {
            disk: id(disk),
            point: own_id(id(disk), at),
            number: at.number,
            sequence: Sequence(at.number),
            epoch,
            source_time: Timestamp(at.number),
            class: MarkClass::Crash,
            pinned: false,
            degraded,
            name: Text::new(""),
            cause: MarkCause::Timer,
        };
        store.disks[disk].close_epoch_at(&mut store.journal, keeps.then_some(point), NOW).unwrap();
        if keeps {
            // One that was pinned while the epoch went on stays pinned.
            let pinned = known.kept.get(&point.point).is_some_and(|kept| kept.pinned);
            known.kept.insert(point.point, Kept { at, pinned, degraded, damaged: false });
        }
    }

    /// Two neighbouring runs become one.
    fn merge(&mut self, disk: usize) {
        let journal = &mut self.store().journal;
        let next = thin::next(journal, id(disk), Timestamp(u64::MAX), &[], &[]).unwrap();
        let Some(mut merge) = next else { return };
        let bytes = merge.write().unwrap();
        merge.settle(journal, bytes, NOW).unwrap();
    }

    fn drop_point(&mut self, disk: usize) {
        let at = self.rng.next() as usize;
        let known = &mut self.oracle.disks[disk];
        let loose: Vec<[u8; 16]> =
            known.kept.iter().filter(|(_, kept)| !kept.pinned).map(|(point, _)| *point).collect();
        let Some(point) = loose.get(at % loose.len().max(1)).copied() else { return };
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
        let known = &mut self.oracle.disks[disk];
        let pinned = |through: u64| known.kept.values().any(|kept| kept.pinned && kept.at.epoch <= through);
        let may_go = |through: &u64| !cut(*through) && !pinned(*through);
        let Some(through) = closed.filter(may_go).nth(share) else { return };
        let gone: Vec<[u8; 16]> =
            known.kept.iter().filter(|(_, kept)| kept.at.epoch <= through).map(|(point, _)| *point).collect();
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

    /// Segments are given back, from the oldest on; what pins inside undo epochs need of them is carried before.
    pub(crate) fn release(&mut self) {
        let count = 1 + self.rng.below(3) as usize;
        self.commit();
        let journal = &mut self.store().journal;
        for segment in journal.releasable().into_iter().take(count) {
            assert_eq!(
                journal.carry_pinned_piece(segment, u64::MAX, NOW).unwrap().lost,
                [],
                "what a pin needs cannot be read"
            );
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
    pub(crate) fn reopen(&mut self, in_order: bool) {
        self.reopen_after(in_order, |_| {});
    }

    /// As [`Self::reopen`], and something happens to the folder between the two.
    pub(crate) fn reopen_after(&mut self, in_order: bool, between: impl FnOnce(&MemoryFiles)) {
        let store = self.store.take().unwrap();
        drop(store.disks);
        if in_order {
            store.journal.close(NOW).unwrap();
            self.oracle.committed();
        } else {
            drop(store.journal);
        }
        between(&self.files);
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
