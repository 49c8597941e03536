//! Steps of a workload that a journal seldom comes to: entries carried forward or given up, the compare behind that, a
//! disk that grows, damage that is found and found sound again, points that are pinned, also inside undo epochs, a manifest that is written anew.
//!
//! Invariants: each does what the master target does, in its order; which points an image concerns is reckoned here anew.
//! Units: sectors, blocks, entry numbers. Called by the workload.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use reprotect_engine::format::batch::{BulkHeader, MarkCause, MarkClass, encode_bulk};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{Edit, LossMended, PointDropped, PointKept};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::undo::FRAMES_START;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile as _, WriteAt};
use reprotect_engine::store::files::Files as _;
use reprotect_engine::store::journal::entry::bulk_prefix;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::points::own_id;
use reprotect_engine::store::journal::rot::{Found, reach};
use reprotect_engine::store::journal::scrub::{EntryPlace, RunPlace};
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{DiskShape, Journal, JournalError, Run};
use reprotect_engine::units::{BLOCK_BYTES, DiskId, SECTOR_BYTES, SectorRange, Sequence, Timestamp};

use crate::journal_lab::{NOW, POSITION, id};
use crate::oracle::Kept;
use crate::store::{FOLDER, SECTORS, target_path};
use crate::workload::Player;

/// How large a disk becomes at most: its whole content fits into one entry.
const SECTORS_MAX: u64 = SECTORS + 24;

/// The body of an entry of a pass as it is logged.
pub(crate) fn bulk(
    disk: DiskId,
    number: u64,
    cover: SectorRange,
    keep: &[SectorRange],
    records: &[Record],
) -> Vec<u8> {
    let header = BulkHeader {
        disk,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        pass: 1,
        as_of: Sequence(number),
        cover,
        record_count: records.len() as u32,
    };
    let mut body = bulk_prefix(keep);
    body.extend_from_slice(&encode_bulk(&header, records).body());
    body
}

/// What a write makes of a disk of which it may change these parts.
pub(crate) fn lay(disk: &mut [u8], range: SectorRange, plain: &[u8], keep: &[SectorRange]) {
    for part in keep.iter().map(|keep| keep.intersect(range)).filter(|part| !part.is_empty()) {
        let bytes = |range: SectorRange| range.byte_start() as usize..(range.end * SECTOR_BYTES) as usize;
        let (to, from) = (bytes(part), (part.start - range.start) as usize * SECTOR_BYTES as usize);
        disk[to.clone()].copy_from_slice(&plain[from..from + to.len()]);
    }
}

/// Whether a run has an image of a block.
fn has_image(journal: &Journal, place: &RunPlace, block: u64) -> bool {
    let found = Found { blocks: BlockRange::new(block, block + 1), cause: String::new() };
    let reached = reach(&**journal.files(), std::slice::from_ref(place), vec![found]);
    reached.iter().any(|(since, _)| *since == place.run.first + 1)
}

/// Whether a kept point is made from the image of a block in a run: it is as old as the run, or older, and none of the
/// runs that it is made from has the block before.
fn needs(journal: &Journal, disk: DiskId, shape: &DiskShape, kept: &Kept, run: Run, block: u64) -> bool {
    let from = shape.runs_from(kept.at.epoch, kept.at.number).unwrap();
    let older = shape.runs.iter().filter(|other| other.first >= from && other.last < run.first);
    let hidden = |other: &Run| has_image(journal, &journal.run_place(disk, *other).unwrap(), block);
    from <= run.last && !older.copied().any(|other| hidden(&other))
}

impl Player {
    /// The oldest segment is given back although disks need it: what waits in it is carried to the head of the log.
    pub(crate) fn carry(&mut self) {
        let Some((segment, _)) = self.store().journal.pinned() else { return };
        let journal = &mut self.store().journal;
        // Entry by entry, with a commit after each.
        while !journal.carry_piece(segment, 1, NOW).unwrap().is_all {}
        assert_eq!(
            journal.carry_pinned_piece(segment, u64::MAX, NOW).unwrap().lost,
            [],
            "what a pin needs cannot be read"
        );
        journal.release(segment, NOW).unwrap();
        self.oracle.committed();
    }

    /// What waits for a disk's target is given up, and the segments that this frees; then the disk is taken again, without
    /// a start or by one.
    pub(crate) fn give_up(&mut self, disk: usize) {
        self.commit();
        let known = &self.oracle.disks[disk];
        let waiting: Vec<u64> = known.waiting().collect();
        let on_target = known.content_at(known.applied, None);
        // A window whose APPLIED was lost may stand there already: nobody gives up what is applied.
        if !self.store().target(disk).starts_with(&on_target) {
            return;
        }
        let journal = &mut self.store().journal;
        let lost = journal.give_up(id(disk), "the retention drive was full", NOW).unwrap();
        let expected = waiting.first().copied().zip(waiting.last().copied());
        assert_eq!(lost, expected, "what waits for disk {disk}");
        let Some((first, last)) = lost else { return };
        let refused = journal.append(id(disk), EntryKind::Batch, &[&[]], NOW);
        assert!(matches!(refused, Err(JournalError::GivenUp { .. })), "{refused:?}");
        self.oracle.disks[disk].loses(first, last);
        for _ in 0..self.rng.below(2) {
            self.release();
        }
        if self.rng.below(2) == 0 {
            let in_order = self.rng.below(2) == 0;
            return self.reopen(in_order);
        }
        let log = self.store().journal.take_again(id(disk), NOW).unwrap();
        assert_eq!(log.newest(), last, "the newest entry of disk {disk}");
        assert!(log.lost().all(|(from, to)| first >= from && last <= to), "{:?}", log.missing);
        self.oracle.committed();
        let (files, applied) = (self.files.clone(), log.applied.map(|(applied, _)| applied));
        self.store().open_again(&files, disk, applied, |_| {}).unwrap();
        self.store().go_on(disk).unwrap();
    }

    /// A disk that lost entries is compared with its source; then comes a mark, and points are sound again.
    pub(crate) fn mend(&mut self, disk: usize) {
        let Some(source) = self.oracle.disks[disk].source.take() else { return };
        let known = &self.oracle.disks[disk];
        let (number, whole) = (known.appended + 1, SectorRange::new(0, known.size()));
        let mut content = known.content().to_vec();
        let mut records = Vec::new();
        for (at, wanted) in source.chunks(BLOCK_BYTES as usize).enumerate() {
            let from = at * BLOCK_BYTES as usize;
            let here = &mut content[from..from + wanted.len()];
            if here != wanted {
                here.copy_from_slice(wanted);
                let start = from as u64 / SECTOR_BYTES;
                records.push(Record::data(start, Bytes::copy_from_slice(wanted)));
            }
        }
        if !records.is_empty() {
            let body = bulk(id(disk), number, whole, &[whole], &records);
            self.append(disk, EntryKind::Bulk, &body, Arc::new(content), None);
        }
        self.state(disk);
        self.commit();
        let number = self.oracle.disks[disk].appended + 1;
        self.store().journal.edit(&[Edit::LossMended(LossMended { disk: id(disk), number })], NOW).unwrap();
        let open = self.oracle.disks[disk].lost.iter_mut().filter(|lost| lost.mended.is_none());
        open.for_each(|lost| lost.mended = Some(number));
        self.mark();
        if self.rng.below(2) == 0 {
            self.commit();
        }
    }

    /// A disk grows: everything is applied and the undo epoch ended, then the target, then the manifest.
    pub(crate) fn grow(&mut self, disk: usize) {
        let size_sectors = self.oracle.disks[disk].size() + 1 + self.rng.below(12);
        if size_sectors > SECTORS_MAX {
            return;
        }
        self.commit();
        self.apply_through(disk, self.oracle.disks[disk].appended);
        self.commit();
        self.end_epoch(disk);
        let files = self.files.clone();
        let resize = |_: &mut Journal| {
            files.resize(Path::new(&target_path(disk)), size_sectors * SECTOR_BYTES).unwrap();
        };
        self.store().open_again(&files, disk, None, resize).unwrap();
        self.oracle.disks[disk].grows(size_sectors);
        let epoch = self.store().go_on(disk).unwrap();
        self.oracle.disks[disk].begins(epoch);
        self.state(disk);
        self.commit();
    }

    /// Somebody finds that images of a run cannot be read, or an entry that is applied. (They can: what is tried is what
    /// the journal knows of it.)
    pub(crate) fn damage(&mut self, disk: usize) {
        if self.rng.below(3) == 0 {
            return self.damage_entry(disk);
        }
        let (share, block, len) =
            (self.rng.next() as usize, self.rng.below(SECTORS / 8), 1 + self.rng.below(2));
        let store = self.store();
        let shape = store.journal.shape().disks[&id(disk)].clone();
        let applied = *store.disks[disk].applied();
        let open = Some(applied.epoch) == store.disks[disk].open_epoch() && applied.undo_bytes > FRAMES_START;
        let mut places: Vec<RunPlace> =
            shape.runs.iter().map(|run| store.journal.run_place(id(disk), *run).unwrap()).collect();
        places.extend(store.journal.open_run_place(id(disk)).unwrap().filter(|_| open));
        let Some(place) = places.get(share % places.len().max(1)) else { return };
        let blocks = BlockRange::new(block, block + len);
        let found = vec![Found { blocks, cause: "a medium that forgets".to_owned() }];
        let reached = reach(&**store.journal.files(), &store.journal.older_runs(place).unwrap(), found);
        store.journal.note_run(place, &reached, false, NOW).unwrap();
        let store = self.store.as_ref().unwrap();
        for kept in self.oracle.disks[disk].kept.values_mut() {
            let lacks = |block| needs(&store.journal, id(disk), &shape, kept, place.run, block);
            kept.damaged |= (blocks.start..blocks.end).any(lacks);
        }
    }

    /// Of the entries of an undo epoch the first that is damaged says it all.
    fn damage_entry(&mut self, disk: usize) {
        let share = self.rng.next() as usize;
        let applied = self.oracle.disks[disk].applied;
        let journal = &mut self.store().journal;
        let entries = journal.entries(id(disk));
        let entries = &entries[..entries.partition_point(|entry| entry.number <= applied)];
        let Some(entry) = entries.get(share % entries.len().max(1)).copied() else { return };
        let place = EntryPlace { disk: id(disk), number: entry.number, path: "".into(), place: entry.place };
        let Some(epoch) = journal.shape().disks[&id(disk)].epoch_of(entry.number).copied() else { return };
        let is_new = journal.note_entry(&place, Some("a medium that forgets"), NOW).unwrap();
        let known = &mut self.oracle.disks[disk].damaged_entries;
        let is_said = known.range(epoch.opened.after + 1..=entry.number).next().is_some();
        assert_eq!(is_new, !is_said, "entry {} of disk {disk}", entry.number);
        if is_new {
            known.insert(entry.number, entry.place.segment);
        }
    }

    /// All runs and damaged entries of a disk are read and found sound.
    pub(crate) fn sound(&mut self, disk: usize) {
        let entries: Vec<u64> = self.oracle.disks[disk].damaged_entries.keys().copied().collect();
        let journal = &mut self.store().journal;
        let runs = journal.shape().disks[&id(disk)].runs.clone();
        let mut places: Vec<RunPlace> =
            runs.into_iter().map(|run| journal.run_place(id(disk), run).unwrap()).collect();
        places.extend(journal.open_run_place(id(disk)).unwrap());
        for place in places {
            journal.note_run(&place, &[], true, NOW).unwrap();
        }
        for number in entries {
            let found = journal.entries(id(disk)).iter().find(|entry| entry.number == number).copied();
            let place = EntryPlace { disk: id(disk), number, path: "".into(), place: found.unwrap().place };
            journal.note_entry(&place, None, NOW).unwrap();
        }
        assert!(journal.shape().disks[&id(disk)].damaged.is_empty(), "what is sound is called damaged");
        self.oracle.disks[disk].damaged_entries.clear();
        self.oracle.disks[disk].kept.values_mut().for_each(|kept| kept.damaged = false);
    }

    /// The program is killed while it writes to the manifest; the next one writes it anew, and takes the other away.
    pub(crate) fn write_anew(&mut self) {
        self.reopen_after(false, |files| {
            let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
            let mut end = 0;
            offline.edits(|at, head, _| end = at + head.stored_bytes()).unwrap();
            let name = format!("manifest-{:08}", offline.superblock().manifest);
            let mut file = files.opener().open(&Path::new(FOLDER).join(name), true).unwrap();
            file.write(&[WriteAt { offset: end, data: &[0xa5; SECTOR_BYTES as usize] }]).unwrap();
        });
    }

    /// A place inside an undo epoch is kept as a pinned point: it is made from the epoch's images and the log.
    pub(crate) fn pin_inside(&mut self, disk: usize) {
        let share = self.rng.next() as usize;
        self.commit(); // what is said to be applied is durably so
        let known = &self.oracle.disks[disk];
        let shape = self.store.as_ref().unwrap().journal.shape().disks[&id(disk)].clone();
        let kept = |at: &At| PointKept {
            disk: id(disk),
            point: own_id(id(disk), *at),
            number: at.number,
            sequence: Sequence(at.number),
            epoch: at.epoch,
            source_time: Timestamp(at.number),
            class: MarkClass::Crash,
            pinned: true,
            degraded: known.is_doubtful(at.number),
            name: Text::new("inside"),
            cause: MarkCause::Command,
        };
        // What is damaged already is left to the points that become so.
        let whole = |at: &&At| at.records == 0 && at.number <= known.applied && shape.rot(**at).is_none();
        let points: Vec<PointKept> = known
            .due
            .iter()
            .filter(whole)
            .map(kept)
            .filter(|point| shape.is_inside(point) && !known.kept.contains_key(&point.point))
            .collect();
        let Some(point) = points.get(share % points.len().max(1)).copied() else { return };
        let (at, degraded) = (At::entry(point.epoch, point.number), point.degraded);
        self.store().journal.edit(&[Edit::PointKept(point)], NOW).unwrap();
        let kept = Kept { at, pinned: true, degraded, damaged: false };
        self.oracle.disks[disk].kept.insert(point.point, kept);
    }

    /// A kept point is pinned, or is not any more; one inside its undo epoch is none then.
    pub(crate) fn pin(&mut self, disk: usize) {
        let share = self.rng.next() as usize;
        let known = &mut self.oracle.disks[disk];
        let count = known.kept.len().max(1);
        let Some((point, kept)) = known.kept.iter_mut().nth(share % count) else { return };
        kept.pinned = !kept.pinned;
        let (point, pinned) = (*point, kept.pinned);
        let journal = &mut self.store().journal;
        let shape = &journal.shape().disks[&id(disk)];
        let changed = shape.points[&point];
        if shape.is_inside(&changed) {
            journal.edit(&[Edit::PointDropped(PointDropped { disk: id(disk), point })], NOW).unwrap();
            self.oracle.disks[disk].kept.remove(&point);
            return;
        }
        let changed = PointKept { pinned, ..changed };
        journal.edit(&[Edit::PointChanged(changed)], NOW).unwrap();
    }
}
