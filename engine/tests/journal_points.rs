//! What can be had of a disk, by mark, time and sequence; and that thinning takes away what it says and nothing else.
//!
//! The oracle is the disk after every record. Streams are ordered, harvested, marked and fuzzy in turn.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{
    BatchHeader, CHAIN_START, Mark, MarkCause, MarkClass, Stretch, encode_batch,
};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{
    DiskAdded, Edit, EpochCause, EpochsExpired, PointDropped, PointKept,
};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::BlockFile;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::points::{self, Offer};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings, thin};
use reprotect_engine::units::{
    DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

const FOLDER: &str = "/retention";
const TARGET: &str = "/datastore/disk";
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 256 << 10 };
const DISK: DiskId = DiskId([5; 16]);
const SECTORS: u64 = 8 * 8 + 3;
const LINEAGE: LineageId = LineageId([2; 16]);
const SECOND: u64 = 1_000_000_000;

struct Store {
    files: MemoryFiles,
    journal: Journal,
    applier: Applier<Box<dyn BlockFile>>,
    disk: Vec<u8>,
    /// The disk after each sequence.
    after: BTreeMap<u64, Vec<u8>>,
    sequence: u64,
    clock: u64,
    random: u64,
    /// What marks say that the source could not read.
    unread: u32,
}

impl Store {
    fn new() -> Self {
        let files = MemoryFiles::default();
        files.opener().create(Path::new(TARGET), SECTORS * SECTOR_BYTES).unwrap();
        let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, Timestamp(0)).unwrap();
        let added = DiskAdded { disk: DISK, machine: [9; 16], size_sectors: SECTORS, time: Timestamp(0) };
        journal.add_disk(added, Timestamp(0)).unwrap();
        let target = files.opener().open(Path::new(TARGET), true).unwrap();
        let (applier, _) = Applier::open(&journal, DISK, target, None).unwrap();
        let disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        let after = BTreeMap::from([(0, disk.clone())]);
        let mut store =
            Self { files, journal, applier, disk, after, sequence: 0, clock: 0, random: 7, unread: 0 };
        store.begin();
        store
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.clock * SECOND)
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn position(&self) -> Position {
        Position { lineage: LINEAGE, generation: Generation(1), sequence: Sequence(self.sequence) }
    }

    fn begin(&mut self) {
        let (position, now) = (self.position(), self.now());
        self.applier.begin_epoch(&mut self.journal, EpochCause::Time, position, None, now).unwrap();
    }

    /// A batch of `records` writes, a second later.
    fn batch(&mut self, stretch: Stretch, records: u64) -> u64 {
        self.clock += 1;
        let first = Sequence(self.sequence + 1);
        let mut written = Vec::new();
        for _ in 0..records {
            self.sequence += 1;
            let start = self.random(SECTORS);
            let len = (1 + self.random(12)).min(SECTORS - start);
            let byte = 1 + self.random(255) as u8;
            let range = SectorRange::new(start, start + len);
            let bytes = (start * SECTOR_BYTES) as usize..(range.end * SECTOR_BYTES) as usize;
            self.disk[bytes.clone()].fill(byte);
            written.push(Record::data(start, Bytes::copy_from_slice(&self.disk[bytes])));
            self.after.insert(self.sequence, self.disk.clone());
        }
        let header = BatchHeader {
            disk: DISK,
            lineage: LINEAGE,
            generation: Generation(1),
            first_sequence: first,
            chain: CHAIN_START,
            source_time: self.now(),
            record_count: records as u32,
            stretch,
        };
        let body = encode_batch(&header, &written).body();
        let kind = if stretch == Stretch::Ordered { EntryKind::Ordered } else { EntryKind::Batch };
        self.journal.append(DISK, kind, &[&body], self.now()).unwrap().0
    }

    fn mark(&mut self, class: MarkClass, name: &str) -> u64 {
        self.clock += 1;
        let mark = Mark {
            disk: DISK,
            lineage: LINEAGE,
            generation: Generation(1),
            sequence: Sequence(self.sequence),
            chain: CHAIN_START,
            source_time: self.now(),
            point: [0; 16],
            class,
            cause: MarkCause::Timer,
            name: Text::new(name),
            number: self.clock,
            unread_blocks: self.unread,
        };
        self.journal.append(DISK, EntryKind::Mark, &[&mark.to_bytes()], self.now()).unwrap().0
    }

    /// Applies everything.
    fn apply(&mut self) {
        let now = self.now();
        self.journal.commit(now).unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        let from = self.applier.applied().number;
        let entries: Vec<_> =
            self.journal.entries(DISK).iter().filter(|entry| entry.number > from).copied().collect();
        let mut window = Window::default();
        for entry in &entries {
            let (head, body) = self.journal.read(entry.place).unwrap();
            for write in entry_writes(head.kind, body.into(), &mut decompressor).unwrap() {
                window.put(write);
            }
        }
        if let Some(last) = entries.last() {
            self.applier.apply(&mut self.journal, last.number, &window, now).unwrap();
            self.journal.commit(now).unwrap();
        }
    }

    /// Ends the undo epoch here and keeps its point; answers its place.
    fn end(&mut self, class: MarkClass, name: &str) -> At {
        let number = self.mark(class, name);
        self.apply();
        let epoch = self.applier.open_epoch().unwrap();
        let now = self.now();
        self.applier.close_epoch(&mut self.journal, now).unwrap();
        let at = At::entry(epoch, number);
        let point = PointKept {
            disk: DISK,
            point: points::own_id(DISK, at),
            number,
            sequence: Sequence(self.sequence),
            epoch,
            source_time: now,
            class,
            pinned: false,
            degraded: false,
            name: Text::new(name),
            cause: MarkCause::Timer,
        };
        self.journal.edit(&[Edit::PointKept(point)], now).unwrap();
        self.begin();
        at
    }

    fn view(&mut self, at: At) -> Result<Vec<u8>, JournalError> {
        let view = View::open(&mut self.journal, DISK, at)?;
        let runs = view.open_runs(&self.journal, &mut self.applier)?;
        let mut disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        view.read(&runs, &mut self.applier, 0, &mut disk)?;
        Ok(disk)
    }

    fn check(&mut self, at: At, sequence: u64) {
        assert!(self.view(at).unwrap() == self.after[&sequence], "{at} is not the disk after {sequence}");
    }

    fn reopen(self) -> Self {
        let Self { files, disk, after, sequence, clock, random, unread, journal, applier } = self;
        drop((journal, applier));
        let (journal, found) =
            Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, Timestamp(clock * SECOND)).unwrap();
        assert_eq!(found.damage, []);
        assert_eq!(found.set_aside, Vec::<std::path::PathBuf>::new());
        let target = files.opener().open(Path::new(TARGET), true).unwrap();
        let applied = found.disks[&DISK].applied.map(|(applied, _)| applied);
        let (applier, holes) = Applier::open(&journal, DISK, target, applied).unwrap();
        assert_eq!(holes, []);
        Self { files, journal, applier, disk, after, sequence, clock, random, unread }
    }

    fn run_files(&self) -> Vec<String> {
        let names = self.files.opener().neighbours(&Path::new(FOLDER).join("any")).unwrap();
        names.into_iter().filter(|name| name.starts_with("undo-")).collect()
    }
}

#[test]
fn every_record_of_an_ordered_stretch_can_be_had_and_of_no_other() {
    let mut store = Store::new();
    store.batch(Stretch::Ordered, 3); // nobody said yet that the disk was in a state of its own
    store.end(MarkClass::Crash, "");
    let first = store.sequence + 1;
    for _ in 0..4 {
        store.batch(Stretch::Ordered, 5);
        store.apply();
    }
    store.mark(MarkClass::Crash, "");
    store.batch(Stretch::Ordered, 2);
    let last = store.sequence;
    store.batch(Stretch::Diff, 6);
    let fuzzy = store.mark(MarkClass::Fuzzy, "");
    store.batch(Stretch::Ordered, 6);
    store.apply();
    for _ in 0..2 {
        for sequence in first..=last {
            let found = points::at_sequence(&mut store.journal, DISK, Sequence(sequence)).unwrap();
            assert_eq!(found.sequence, Sequence(sequence));
            store.check(found.at, sequence);
            let again: At = found.at.to_string().parse().unwrap();
            assert_eq!(again, found.at);
        }
        for outside in [1, last + 1, last + 3, store.sequence, store.sequence + 9] {
            let refused = points::at_sequence(&mut store.journal, DISK, Sequence(outside));
            assert!(matches!(refused, Err(JournalError::NoState { .. })), "{outside}: {refused:?}");
        }
        let marks = points::points(&mut store.journal, DISK).unwrap();
        assert_eq!(marks.iter().filter(|point| point.is_consistent()).count(), 2);
        assert_eq!(marks.last().unwrap().at.number, fuzzy);
        store = store.reopen();
    }
}

#[test]
fn a_time_answers_the_newest_state_that_is_not_younger() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 4);
    let start = store.end(MarkClass::Crash, "");
    let mut expected = BTreeMap::from([(store.clock, store.sequence)]);
    for round in 0..3 {
        for _ in 0..3 {
            store.batch(Stretch::Ordered, 4);
            expected.insert(store.clock, store.sequence);
        }
        store.clock += 10;
        store.batch(Stretch::Diff, 4);
        if round % 2 == 0 {
            store.end(MarkClass::Crash, "");
        } else {
            store.mark(MarkClass::Frozen, "");
        }
        expected.insert(store.clock, store.sequence);
    }
    store.apply();
    for clock in 0..store.clock + 5 {
        let found = points::at_time(&mut store.journal, DISK, Timestamp(clock * SECOND));
        let Some((time, sequence)) = expected.range(..=clock).next_back() else {
            let oldest = Some(Timestamp(store.clock.min(2) * SECOND));
            assert!(matches!(found, Err(JournalError::NoState { oldest: got, .. }) if got == oldest));
            continue;
        };
        let found = found.unwrap();
        assert_eq!((found.source_time, found.sequence), (Timestamp(time * SECOND), Sequence(*sequence)));
        store.check(found.at, *sequence);
    }
    assert_eq!(start.number, 2);
}

#[test]
fn the_timeline_says_where_every_write_can_be_had_and_where_marks_only() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.end(MarkClass::Crash, "");
    let from = store.clock + 1;
    for _ in 0..5 {
        store.batch(Stretch::Ordered, 1);
    }
    let to = store.clock;
    store.batch(Stretch::Diff, 1);
    let last = store.end(MarkClass::Crash, "");
    let times: Vec<_> = points::timeline(&mut store.journal, DISK)
        .unwrap()
        .iter()
        .map(|part| (part.offer, part.from.0 / SECOND, part.to.0 / SECOND))
        .collect();
    let expected = [
        (Offer::PointsOnly, from - 1, from),
        (Offer::AnyWrite, from, to),
        (Offer::PointsOnly, to, store.clock),
    ];
    assert_eq!(times, expected);
    let point = *store.journal.shape().disks[&DISK].points.values().find(|p| p.epoch == last.epoch).unwrap();
    let degraded = Edit::PointChanged(PointKept { degraded: true, ..point });
    store.journal.edit(&[degraded], Timestamp(0)).unwrap();
    let offers: Vec<_> =
        points::timeline(&mut store.journal, DISK).unwrap().iter().map(|part| part.offer).collect();
    assert_eq!(offers, [Offer::Degraded, Offer::AnyWrite, Offer::Degraded]);
}

#[test]
fn behind_a_mark_of_a_disk_that_is_not_whole_nothing_is_a_state_until_one_that_is() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.unread = 3;
    store.mark(MarkClass::Crash, "");
    let lacking = store.sequence;
    store.batch(Stretch::Ordered, 2);
    let inside = store.sequence - 1;
    store.unread = 0;
    store.mark(MarkClass::Crash, "");
    let whole = store.sequence;
    store.batch(Stretch::Ordered, 2);
    store.apply();
    let known = points::points(&mut store.journal, DISK).unwrap();
    let told: Vec<_> =
        known.iter().map(|point| (point.sequence.0, point.degraded, point.is_consistent())).collect();
    assert_eq!(told, [(lacking, true, false), (whole, false, true)]);
    for (sequence, is_state) in [(lacking, false), (inside, false), (whole, true), (whole + 1, true)] {
        let found = points::at_sequence(&mut store.journal, DISK, Sequence(sequence));
        assert_eq!(found.is_ok(), is_state, "{sequence}: {found:?}");
    }
    let offers: Vec<_> =
        points::timeline(&mut store.journal, DISK).unwrap().iter().map(|part| part.offer).collect();
    assert_eq!(offers.last(), Some(&Offer::AnyWrite), "{offers:?}");
    assert!(points::at_time(&mut store.journal, DISK, Timestamp(3 * SECOND)).is_err());
}

#[test]
fn thinning_keeps_every_kept_point_whatever_order_it_is_done_in() {
    for seed in 0..40 {
        let mut store = Store::new();
        store.random = seed * 77 + 1;
        let mut ends = Vec::new();
        for _ in 0..12 {
            for _ in 0..store.random(3) {
                let count = 1 + store.random(6);
                store.batch(Stretch::Diff, count);
            }
            ends.push((store.end(MarkClass::Crash, ""), store.sequence));
        }
        while ends.len() > 2 {
            let at = store.random(ends.len() as u64 - 1) as usize;
            let (gone, _) = ends.remove(at);
            let now = store.now();
            let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, gone) };
            store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
            let mut merges = 0;
            while let Some(mut merge) = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[]).unwrap() {
                let bytes = merge.write().unwrap();
                merge.settle(&mut store.journal, bytes, now).unwrap().unwrap();
                merges += 1;
                assert!(merges < 12, "thinning comes to an end");
            }
            if store.random(3) == 0 {
                store = store.reopen();
            }
            for (at, sequence) in ends.clone() {
                store.check(at, sequence);
            }
        }
        let shape = &store.journal.shape().disks[&DISK];
        assert!(shape.epochs.len() <= 7, "what nothing needs is folded away: {}", shape.epochs.len());
        assert_eq!(store.run_files().len(), shape.runs.len() + 1);
    }
}

#[test]
fn runs_are_not_merged_while_somebody_reads_a_point_between_them_nor_before_their_time() {
    let mut store = Store::new();
    let mut ends = Vec::new();
    for _ in 0..3 {
        store.batch(Stretch::Diff, 9);
        ends.push(store.end(MarkClass::Crash, ""));
    }
    let now = store.now();
    for end in &ends[..2] {
        let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, *end) };
        store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
    }
    let read = [ends[0].epoch + 1, ends[1].epoch + 1];
    let never = Timestamp(u64::MAX);
    assert!(thin::next(&store.journal, DISK, never, &read).unwrap().is_none());
    assert!(thin::next(&store.journal, DISK, Timestamp(1), &[]).unwrap().is_none());
    assert!(thin::next(&store.journal, DISK, never, &read[..1]).unwrap().is_some());
}

#[test]
fn what_a_crash_leaves_of_thinning_is_removed_and_what_is_foreign_is_moved_aside() {
    let mut store = Store::new();
    let mut ends = Vec::new();
    for _ in 0..4 {
        store.batch(Stretch::Diff, 9);
        ends.push((store.end(MarkClass::Crash, ""), store.sequence));
    }
    let now = store.now();
    let (gone, _) = ends.remove(1);
    let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, gone) };
    store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
    let mut merge = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[]).unwrap().unwrap();
    merge.write().unwrap(); // and the program ends before the manifest knows of it
    let before = store.run_files().len();
    drop(merge);
    store = store.reopen();
    assert_eq!(store.run_files().len(), before - 1);
    for (at, sequence) in ends.clone() {
        store.check(at, sequence);
    }
    let expired = EpochsExpired { disk: DISK, through: 1 };
    let gone = PointDropped { disk: DISK, point: points::own_id(DISK, ends[0].0) };
    store.journal.edit(&[Edit::PointDropped(gone), Edit::EpochsExpired(expired)], now).unwrap();
    let left = store.run_files().len(); // the file of the expired epoch is still there
    store = store.reopen();
    assert_eq!(store.run_files().len(), left - 1);
    let foreign = Path::new(FOLDER).join(format!("undo-{DISK}-00000099"));
    store.files.opener().create(&foreign, 8192).unwrap();
    drop(store.applier);
    drop(store.journal);
    let (_, found) = Journal::open(store.files.opener(), Path::new(FOLDER), SETTINGS, now).unwrap();
    assert_eq!(found.set_aside.len(), 1);
}
