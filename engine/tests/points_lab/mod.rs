//! A disk of a journal in memory whose every state is known: batches, marks, undo epochs with their points.
//!
//! The oracle is the disk after every record. Units: sectors, sequences, seconds. Used by the tests of points and of rot.
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{
    BatchHeader, CHAIN_START, Mark, MarkCause, MarkClass, Stretch, encode_batch,
};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, PointKept};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::BlockFile;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::points;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings};
use reprotect_engine::units::{
    DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

pub(crate) const FOLDER: &str = "/retention";
pub(crate) const TARGET: &str = "/datastore/disk";
pub(crate) const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 256 << 10 };
pub(crate) const DISK: DiskId = DiskId([5; 16]);
pub(crate) const SECTORS: u64 = 8 * 8 + 3;
pub(crate) const LINEAGE: LineageId = LineageId([2; 16]);
pub(crate) const SECOND: u64 = 1_000_000_000;

pub(crate) struct Store {
    pub(crate) files: MemoryFiles,
    pub(crate) journal: Journal,
    pub(crate) applier: Applier<Box<dyn BlockFile>>,
    pub(crate) disk: Vec<u8>,
    /// The disk after each sequence.
    pub(crate) after: BTreeMap<u64, Vec<u8>>,
    pub(crate) sequence: u64,
    pub(crate) clock: u64,
    pub(crate) random: u64,
    /// What marks say that the source could not read.
    pub(crate) unread: u32,
}

impl Store {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp(self.clock * SECOND)
    }

    pub(crate) fn random(&mut self, below: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    pub(crate) fn position(&self) -> Position {
        Position { lineage: LINEAGE, generation: Generation(1), sequence: Sequence(self.sequence) }
    }

    pub(crate) fn begin(&mut self) {
        let (position, now) = (self.position(), self.now());
        self.applier.begin_epoch(&mut self.journal, EpochCause::Time, position, None, now).unwrap();
    }

    /// A batch of `records` writes, a second later.
    pub(crate) fn batch(&mut self, stretch: Stretch, records: u64) -> u64 {
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

    pub(crate) fn mark(&mut self, class: MarkClass, name: &str) -> u64 {
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
    pub(crate) fn apply(&mut self) {
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
    pub(crate) fn end(&mut self, class: MarkClass, name: &str) -> At {
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

    pub(crate) fn view(&mut self, at: At) -> Result<Vec<u8>, JournalError> {
        let view = View::open(&self.journal, DISK, at)?;
        let runs = view.open_runs(&self.journal, &mut self.applier)?;
        let mut disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        view.read(&runs, &mut self.applier, 0, &mut disk)?;
        Ok(disk)
    }

    pub(crate) fn check(&mut self, at: At, sequence: u64) {
        assert!(self.view(at).unwrap() == self.after[&sequence], "{at} is not the disk after {sequence}");
    }

    pub(crate) fn reopen(self) -> Self {
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

    pub(crate) fn run_files(&self) -> Vec<String> {
        let names = self.files.opener().neighbours(&Path::new(FOLDER).join("any")).unwrap();
        names.into_iter().filter(|name| name.starts_with("undo-")).collect()
    }
}
