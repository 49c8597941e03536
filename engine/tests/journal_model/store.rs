//! The real store beside the model: it does what the model did, on memory files, and shows the same disks.
//!
//! A sector of the model is two of the store (the last one is a single sector, so that the disk ends inside a block),
//! filled with the model's number; some numbers stand for zeros, and a record of those alone is a record of zeros. The
//! model's epochs, sequences and points have the same numbers here. Retention edits (merge, expiry) are made here in
//! the order the manifest prescribes. Units: entry numbers, sectors. Called by `against_store.rs`.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use bytes::Bytes;
use reprotect_engine::format::extent;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, EpochClosed, EpochsExpired};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, run_path};
use reprotect_engine::store::journal::rollback::{resume, rollback};
use reprotect_engine::store::journal::{
    DiskShape, Epoch, Journal, JournalError, JournalSettings, LogEntry, Run, RunFile, view,
};
use reprotect_engine::units::{SECTOR_BYTES, SectorRange};

use super::journal_lab::{self as lab, NOW, POSITION};
use super::machine;
use super::manifest::{DiskCatalogue, Kind};
use super::merge::merge_runs;
use super::records::{At, BLOCKS, Body, Record, SECTORS};

const FOLDER: &str = "/retention";
/// A segment takes some ten small batches, so that plays open, release and recycle many.
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 48 << 10 };
/// The last of the model's sectors is one sector, the others two.
const DISK_SECTORS: u64 = (BLOCKS * SECTORS * 2 - 1) as u64;
const DISK_BYTES: usize = DISK_SECTORS as usize * SECTOR_BYTES as usize;

fn target_path(disk: usize) -> String {
    format!("/datastore/disk-{disk}")
}

/// The bytes of a model's sector.
fn bytes_of(sector: usize, value: u32) -> Vec<u8> {
    let sectors = if sector + 1 == BLOCKS * SECTORS { 1 } else { 2 };
    let shown = if value.is_multiple_of(7) { 0 } else { value };
    shown.to_le_bytes().repeat(sectors * SECTOR_BYTES as usize / 4)
}

/// The bytes of a model's disk.
pub(crate) fn bytes_of_disk(values: &[u32]) -> Vec<u8> {
    values.iter().enumerate().flat_map(|(sector, value)| bytes_of(sector, *value)).collect()
}

/// A record as it is logged.
fn entry(record: &Record) -> (EntryKind, Bytes) {
    let Body::Write { sector, values } = &record.body else { return (EntryKind::Mark, Bytes::new()) };
    let plain: Vec<u8> =
        (*sector..).zip(values).flat_map(|(sector, value)| bytes_of(sector, *value)).collect();
    let start = *sector as u64 * 2;
    let range = SectorRange::new(start, start + plain.len() as u64 / SECTOR_BYTES);
    let zeros = plain.iter().all(|byte| *byte == 0);
    let record_on_wire =
        if zeros { extent::Record::zeros(range) } else { extent::Record::data(start, plain.into()) };
    (EntryKind::Batch, lab::batch(lab::id(record.disk), record.sequence as u64, &[record_on_wire]))
}

/// The open store.
pub(crate) struct Store {
    journal: Journal,
    appliers: Vec<Applier<Box<dyn BlockFile>>>,
}

impl Store {
    /// Makes the journal of existing disks; each gets its first epoch, as the model's have.
    pub(crate) fn create(files: &MemoryFiles, targets: &[Vec<u32>]) -> Self {
        let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
        let mut appliers = Vec::new();
        for (disk, target) in targets.iter().enumerate() {
            files.put(target_path(disk), &bytes_of_disk(target));
            let added =
                DiskAdded { disk: lab::id(disk), machine: [1; 16], size_sectors: DISK_SECTORS, time: NOW };
            journal.add_disk(added, NOW).unwrap();
            let target = files.opener().open(Path::new(&target_path(disk)), true).unwrap();
            let (mut applier, _) = Applier::open(&journal, lab::id(disk), target, None).unwrap();
            applier.begin_epoch(&mut journal, EpochCause::First, POSITION, None, NOW).unwrap();
            appliers.push(applier);
        }
        Self { journal, appliers }
    }

    /// Opens what a stop left; nothing may be missing or damaged, for no fault was injected.
    pub(crate) fn open(files: &MemoryFiles, disks: usize) -> Result<Self, JournalError> {
        let (mut journal, found) = Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW)?;
        assert_eq!(found.damage, []);
        let mut appliers = Vec::new();
        for disk in 0..disks {
            let log = &found.disks[&lab::id(disk)];
            assert_eq!(log.missing, []);
            let target = files.opener().open(Path::new(&target_path(disk)), true)?;
            let applied = log.applied.map(|(applied, _)| applied);
            let (mut applier, holes) = Applier::open(&journal, lab::id(disk), target, applied)?;
            assert_eq!(holes, []);
            resume(&mut journal, &mut applier, NOW)?;
            appliers.push(applier);
        }
        Ok(Self { journal, appliers })
    }

    pub(crate) fn close(self) -> Result<(), JournalError> {
        drop(self.appliers);
        self.journal.close(NOW)
    }

    fn shape(&self, disk: usize) -> &DiskShape {
        &self.journal.shape().disks[&lab::id(disk)]
    }

    /// The newest entry that is there, logged or applied.
    pub(crate) fn newest(&self, disk: usize) -> usize {
        self.journal.newest(lab::id(disk)).max(self.appliers[disk].applied().number) as usize
    }

    pub(crate) fn applied(&self, disk: usize) -> usize {
        self.appliers[disk].applied().number as usize
    }

    pub(crate) fn target(&mut self, disk: usize) -> Vec<u8> {
        let mut bytes = vec![0; DISK_BYTES];
        self.appliers[disk].target().read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
        bytes
    }

    /// What the store calls a point of the model.
    fn name_of(&self, disk: usize, at: At) -> view::At {
        let number = at.upto as u64;
        // The end of an epoch and the start of the next are one point. Its first name is the end: in an epoch without
        // entries, such as a rollback, the start has no name of its own. Epochs between that changed nothing may have
        // been folded away.
        let before = self.shape(disk).epochs.iter().rev().find(|epoch| epoch.opened.epoch < at.base as u64);
        let base = self.shape(disk).epochs.iter().find(|epoch| epoch.opened.epoch == at.base as u64);
        let is_bare = |epoch: &Epoch| {
            epoch.opened.after == number && epoch.closed.is_some_and(|closed| closed.last == number)
        };
        let has_name = base.is_some_and(|epoch| !is_bare(epoch));
        match before.and_then(|epoch| Some((epoch.opened.epoch, epoch.closed?.last))) {
            Some((before, last)) if last == number || !has_name => view::At::entry(before, last),
            // What came before has expired: the start of the next one that is known is the same state.
            _ => {
                let next = self.shape(disk).epochs.iter().find(|epoch| epoch.opened.epoch > at.base as u64);
                match next.filter(|_| base.is_none()) {
                    Some(next) => view::At::entry(next.opened.epoch, next.opened.after),
                    None => view::At::entry(at.base as u64, number),
                }
            }
        }
    }

    /// Whether a point of the model has no name here: it is the start of an epoch without entries, and the epoch that
    /// ended with it, which no point names, was folded away or has expired.
    pub(crate) fn is_nameless(&self, disk: usize, at: At) -> bool {
        let epochs = &self.shape(disk).epochs;
        let is_bare = |epoch: &Epoch| {
            let bare = epoch.closed.is_some_and(|closed| closed.last == epoch.opened.after);
            bare && epoch.opened.epoch == at.base as u64
        };
        epochs.first().is_some_and(is_bare)
    }

    /// The disk at a point of the model.
    pub(crate) fn view(&mut self, disk: usize, at: At) -> Result<Vec<u8>, JournalError> {
        let at = self.name_of(disk, at);
        lab::view(&mut self.journal, &mut self.appliers[disk], at)
    }

    /// Does what the model did since the last call, or what a stop undid of it. `greedy`: every segment is released as
    /// soon as the journal lets it go, without regard to the any-write window.
    pub(crate) fn follow(
        &mut self,
        model: &machine::Journal,
        streams: &[&[Record]],
        greedy: bool,
    ) -> Result<(), JournalError> {
        self.append(streams, &|disk| model.disks[disk].durable)?;
        self.journal.commit(NOW)?;
        self.append(streams, &|disk| model.disks[disk].received)?;
        for disk in 0..streams.len() {
            self.follow_epochs(disk, &model.catalogue.disks[disk], model.disks[disk].applied)?;
            self.follow_merges(disk, &model.catalogue.disks[disk])?;
            self.follow_expiry(disk, model.catalogue.disks[disk].floor as u64)?;
        }
        self.follow_release(model, greedy)
    }

    /// Appends what of the streams is not there yet.
    fn append(&mut self, streams: &[&[Record]], upto: &dyn Fn(usize) -> usize) -> Result<(), JournalError> {
        for (disk, stream) in streams.iter().enumerate() {
            for record in stream.iter().take(upto(disk)).skip(self.newest(disk)) {
                let (kind, body) = entry(record);
                // In two parts, as a body with a prefix comes.
                let (head, tail) = body.split_at(body.len() / 3);
                self.journal.append(lab::id(disk), kind, &[head, tail], NOW)?;
            }
        }
        Ok(())
    }

    fn follow_epochs(
        &mut self,
        disk: usize,
        model: &DiskCatalogue,
        applied: usize,
    ) -> Result<(), JournalError> {
        loop {
            let next = self.shape(disk).epochs.last().map_or(0, |epoch| epoch.opened.epoch) as usize + 1;
            if self.appliers[disk].open_epoch().is_some() {
                let Some(last) = model.epochs[next - 1].last else {
                    return self.apply(disk, applied);
                };
                self.apply(disk, last)?;
                self.journal.commit(NOW)?;
            }
            let rolls = if let Kind::Rollback(to) = model.epochs[next].kind { Some(to) } else { None };
            let at = rolls.map(|to| self.name_of(disk, to));
            let (applier, journal) = (&mut self.appliers[disk], &mut self.journal);
            if let Some(at) = at {
                rollback(journal, applier, at, POSITION, NOW)?;
            } else {
                applier.close_epoch(journal, NOW)?;
                applier.begin_epoch(journal, EpochCause::Time, POSITION, None, NOW)?;
            }
        }
    }

    /// One window: what the model applied since.
    fn apply(&mut self, disk: usize, through: usize) -> Result<(), JournalError> {
        lab::apply_through(&mut self.journal, &mut self.appliers[disk], through as u64)
    }

    /// Where the model merged epochs, their runs become one: new file, edit, then the inputs go.
    fn follow_merges(&mut self, disk: usize, model: &DiskCatalogue) -> Result<(), JournalError> {
        for wanted in model.runs.iter().filter(|run| run.low < run.high) {
            let (low, high) = (wanted.low as u64, wanted.high as u64);
            loop {
                let inside = |run: &&Run| run.first >= low && run.last <= high;
                let runs: Vec<Run> = self.shape(disk).runs.iter().filter(inside).take(2).copied().collect();
                let [older, newer] = runs[..] else { break };
                merge_runs(&mut self.journal, lab::id(disk), older, newer)?;
            }
        }
        Ok(())
    }

    fn follow_expiry(&mut self, disk: usize, floor: u64) -> Result<(), JournalError> {
        // The model drops images and keeps the point behind them; here the epoch that ends there stays, whole.
        let (mut through, shape) = (floor.saturating_sub(2), self.shape(disk));
        while let Some(run) = shape.runs.iter().find(|run| run.first <= through && run.last > through) {
            through = run.first - 1;
        }
        if through <= shape.expired {
            return Ok(());
        }
        let gone: Vec<Run> = shape.runs.iter().filter(|run| run.last <= through).copied().collect();
        let expired = EpochsExpired { disk: lab::id(disk), through };
        self.journal.edit(&[Edit::EpochsExpired(expired)], NOW)?;
        for run in gone {
            self.journal.files().remove(&run_path(&self.journal, lab::id(disk), run.file))?;
        }
        Ok(())
    }

    /// Releases what the journal says it can, as far as the model freed it, too; or all of it.
    fn follow_release(&mut self, model: &machine::Journal, greedy: bool) -> Result<(), JournalError> {
        let freed = |journal: &Journal, segment: u64| {
            model.catalogue.disks.iter().enumerate().all(|(disk, known)| {
                let inside =
                    |entry: &&LogEntry| entry.place.segment == segment && entry.number > known.freed as u64;
                journal.entries(lab::id(disk)).iter().find(inside).is_none()
            })
        };
        while let Some(segment) = self.journal.releasable().first().copied() {
            if !greedy && !freed(&self.journal, segment) {
                break;
            }
            self.journal.release(segment, NOW)?;
        }
        Ok(())
    }

    /// Segments in use, merged runs, and epochs that expired.
    pub(crate) fn figures(&self) -> (usize, usize, usize) {
        let disks = self.journal.shape().disks.values();
        let (mut merged, mut expired) = (0, 0);
        for disk in disks {
            merged += disk.runs.iter().filter(|run| matches!(run.file, RunFile::Merged(_))).count();
            expired += disk.expired as usize;
        }
        (self.journal.shape().segments.len(), merged, expired)
    }

    /// Closed epochs, so that a test can see that they are the model's.
    pub(crate) fn ends(&self, disk: usize) -> Vec<(usize, usize)> {
        let closed = |epoch: &Epoch| {
            epoch.closed.map(|EpochClosed { epoch, last, .. }| (epoch as usize, last as usize))
        };
        self.shape(disk).epochs.iter().filter_map(closed).collect()
    }
}
