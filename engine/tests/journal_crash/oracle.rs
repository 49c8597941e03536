//! What was promised in a workload, and the judgement of what a crash left of it.
//!
//! Invariants: `truth` is what a disk held at every place that ever had a name, whether it can still be had or not, in the
//! size it had there; `due` is what the journal itself said can be had; entries that are lost are lost for good, and from
//! the first of them to the mend marks promise less. Units: entry numbers. Called by the workload and the enumeration.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::{BlockFile as _, ReadAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::offline::{Offline, Which};
use reprotect_engine::store::journal::points::all_points;
use reprotect_engine::store::journal::verify::Finding;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{DiskShape, Epoch, Journal, JournalError, Loss};
use reprotect_engine::units::{DiskId, SECTOR_BYTES};

use crate::journal_lab::{NOW, batch, id};
use crate::store::{FOLDER, SECTORS, SETTINGS, Store, target_path};

type Content = Arc<Vec<u8>>;

/// A point that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) at: At,
    pub(crate) pinned: bool,
    pub(crate) degraded: bool,
    /// Something that it is made from is known to be damaged.
    pub(crate) damaged: bool,
}

/// Entries that were given up, and the first mark behind the compare, once there was one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) mended: Option<u64>,
}

/// What is known of one disk.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// The disk after each entry, and as it was found.
    after: BTreeMap<u64, Content>,
    pub(crate) appended: u64,
    pub(crate) committed: u64,
    pub(crate) applied: u64,
    /// What an APPLIED that is durable says.
    applied_durably: u64,
    pub(crate) truth: BTreeMap<At, Content>,
    pub(crate) due: BTreeSet<At>,
    /// Rollbacks: by their undo epoch, the entry they stand behind, and what they made of the disk.
    pub(crate) rolled: BTreeMap<u64, (u64, Content)>,
    /// Points that are kept, and marks by their entries.
    pub(crate) kept: BTreeMap<[u8; 16], Kept>,
    pub(crate) marks: BTreeMap<u64, [u8; 16]>,
    /// The disk behind some of the records of an entry, and how many.
    parts: BTreeMap<u64, (u32, Content)>,
    pub(crate) lost: Vec<Lost>,
    /// What the source had when the first entry was lost that no compare has made up for.
    pub(crate) source: Option<Content>,
    /// How it grew: the newest entry before, and its sectors since.
    pub(crate) grown: Vec<(u64, u64)>,
    /// Entries that are known to be damaged, and their segments.
    pub(crate) damaged_entries: BTreeMap<u64, u64>,
    /// The newest state that is durable, and the newest.
    pub(crate) state: (u64, u64),
}

/// What is known of all disks; `made` of them are certain to be in the journal.
#[derive(Clone, Debug)]
pub(crate) struct Oracle {
    pub(crate) disks: Vec<Disk>,
    pub(crate) made: usize,
}

impl Oracle {
    /// Everything that was added is durable.
    pub(crate) fn committed(&mut self) {
        for disk in &mut self.disks {
            disk.committed = disk.appended;
            disk.applied_durably = disk.applied;
            disk.state.0 = disk.state.1;
        }
    }
}

impl Disk {
    pub(crate) fn new(found: Vec<u8>) -> Self {
        Self {
            after: BTreeMap::from([(0, Arc::new(found))]),
            appended: 0,
            committed: 0,
            applied: 0,
            applied_durably: 0,
            truth: BTreeMap::new(),
            due: BTreeSet::new(),
            rolled: BTreeMap::new(),
            kept: BTreeMap::new(),
            marks: BTreeMap::new(),
            parts: BTreeMap::new(),
            lost: Vec::new(),
            source: None,
            grown: Vec::new(),
            damaged_entries: BTreeMap::new(),
            state: (0, 0),
        }
    }

    /// Its sectors, now and behind an entry.
    pub(crate) fn size(&self) -> u64 {
        self.grown.last().map_or(SECTORS, |grown| grown.1)
    }

    fn size_at(&self, number: u64) -> u64 {
        self.grown.iter().rev().find(|grown| grown.0 < number).map_or(SECTORS, |grown| grown.1)
    }

    /// The disk with everything that was added, in the size it has.
    pub(crate) fn content(&self) -> Content {
        fitted(&self.content_at(self.appended, None), self.size())
    }

    /// The disk when `number` is its newest entry, of which those that are lost wrote nothing. A rollback of the epoch
    /// `not` has not begun.
    pub(crate) fn content_at(&self, number: u64, not: Option<u64>) -> Content {
        let mut number = number;
        while let Some(lost) = self.lost_with(number) {
            number = lost.first - 1;
        }
        let rolled = self.rolled.iter().rev().filter(|(epoch, _)| Some(**epoch) != not);
        match rolled.map(|(_, rolled)| rolled).find(|rolled| rolled.0 == number) {
            Some((_, content)) => Arc::clone(content),
            None => Arc::clone(&self.after[&number]),
        }
    }

    fn lost_with(&self, number: u64) -> Option<&Lost> {
        self.lost.iter().find(|lost| (lost.first..=lost.last).contains(&number))
    }

    /// Entries that are in the log and not on the target.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = u64> {
        (self.applied + 1..=self.appended).filter(|number| self.lost_with(*number).is_none())
    }

    /// Whether a mark promises less than it says, for entries before it are lost.
    pub(crate) fn is_doubtful(&self, number: u64) -> bool {
        let concerns = |lost: &Lost| number >= lost.first && lost.mended.is_none_or(|mended| number < mended);
        self.lost.iter().any(concerns)
    }

    /// Whether a place inside an undo epoch is made from an entry that is known to be damaged.
    fn lacks_entry(&self, shape: &DiskShape, at: At) -> bool {
        let Some(epoch) = shape.epochs.iter().find(|epoch| epoch.opened.epoch == at.epoch) else {
            return false;
        };
        let is_end = epoch.closed.is_some_and(|closed| closed.last == at.number);
        let (after, through) = (epoch.opened.after, at.number);
        !is_end && after < through && self.damaged_entries.range(after + 1..=through).next().is_some()
    }

    /// `part`: the disk behind some of the entry's records, where a point may lie.
    pub(crate) fn appends(&mut self, number: u64, content: Content, part: Option<(u32, Content)>) {
        self.after.insert(number, content);
        self.parts.extend(part.map(|part| (number, part)));
        self.appended = number;
    }

    pub(crate) fn applies(&mut self, through: u64, epoch: u64) {
        for number in self.applied + 1..=through {
            if self.lost_with(number).is_some() {
                continue;
            }
            self.truth.insert(At::entry(epoch, number), Arc::clone(&self.after[&number]));
            if let Some((records, content)) = self.parts.get(&number) {
                let at = At { epoch, number: number - 1, records: *records };
                self.truth.insert(at, Arc::clone(content));
            }
        }
        self.applied = through;
    }

    pub(crate) fn begins(&mut self, epoch: u64) {
        let content = self.content_at(self.applied, None);
        self.truth.insert(At::entry(epoch, self.applied), fitted(&content, self.size_at(self.applied)));
    }

    pub(crate) fn loses(&mut self, first: u64, last: u64) {
        let before = self.content();
        self.source.get_or_insert(before);
        self.marks.retain(|number, _| !(first..=last).contains(number));
        self.lost.push(Lost { first, last, mended: None });
    }

    pub(crate) fn grows(&mut self, size_sectors: u64) {
        self.grown.push((self.applied, size_sectors));
    }

    pub(crate) fn rolls(&mut self, epoch: u64, number: u64, content: Content) {
        self.truth.insert(At::entry(epoch, number), fitted(&content, self.size_at(number)));
        self.rolled.insert(epoch, (number, fitted(&content, self.size())));
    }

    /// The program was started again: what was not written is gone, and what is there is told to be durable.
    pub(crate) fn reopened(&mut self, newest: u64, applied: u64) {
        assert!(newest >= self.committed && applied >= self.applied_durably);
        self.after.split_off(&(newest + 1));
        self.marks.split_off(&(newest + 1));
        self.parts.split_off(&(newest + 1));
        (self.appended, self.committed) = (newest, newest);
        let is_there = |at: &At| at.number + u64::from(at.records > 0) <= newest;
        self.truth.retain(|at, _| is_there(at));
        self.due.retain(is_there);
        (self.applied, self.applied_durably) = (applied, applied);
    }

    /// What the journal says can be had of the places that are known, but for undo epochs that it may forget at any time.
    pub(crate) fn due_in(&self, journal: &Journal, disk: DiskId) -> BTreeSet<At> {
        let shape = &journal.shape().disks[&disk];
        let stays = |at: &&At| !is_bare(shape, at.epoch) && View::check(journal, disk, **at).is_ok();
        self.truth.keys().filter(stays).copied().collect()
    }
}

/// A disk of so many sectors: behind what it had there are zeros.
fn fitted(content: &Content, sectors: u64) -> Content {
    let bytes = (sectors * SECTOR_BYTES) as usize;
    if content.len() == bytes {
        return Arc::clone(content);
    }
    let mut fitted = content.to_vec();
    let rest = fitted.get(bytes..).unwrap_or_default();
    assert!(rest.iter().all(|byte| *byte == 0), "something stands behind the end of a disk");
    fitted.resize(bytes, 0);
    Arc::new(fitted)
}

/// Whether an undo epoch is over, without a run, a point or a rollback that names it: it is folded away with the next
/// merge or dropped point, or when the manifest is written anew.
pub(crate) fn is_bare(shape: &DiskShape, epoch: u64) -> bool {
    let newest = shape.epochs.iter().rev().find(|known| known.closed.is_some());
    let needed = shape.open_epoch().is_some_and(|open| open.opened.epoch == epoch)
        || newest.is_some_and(|newest| newest.opened.epoch == epoch)
        || shape.points.values().any(|point| point.epoch == epoch)
        || shape.runs.iter().any(|run| run.first == epoch || run.last == epoch)
        || shape.epochs.iter().any(|known| known.opened.to_epoch == epoch);
    !needed
}

/// What a judgement looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Views {
    pub(crate) all: usize,
    /// Of these, between two records of an entry, and of a disk that has grown since.
    pub(crate) inside_entries: usize,
    pub(crate) of_other_sizes: usize,
    /// Losses that are known, and entries that stand where they were carried to.
    pub(crate) losses: usize,
    pub(crate) carried: usize,
    /// Of these, those that a point pinned inside its undo epoch is made from.
    pub(crate) carried_for_pins: usize,
}

impl Views {
    pub(crate) const fn add(&mut self, other: Self) {
        self.all += other.all;
        self.inside_entries += other.inside_entries;
        self.of_other_sizes += other.of_other_sizes;
        self.losses += other.losses;
        self.carried += other.carried;
        self.carried_for_pins += other.carried_for_pins;
    }
}

/// What holds after a crash inside a step.
pub(crate) struct Promise<'a> {
    pub(crate) before: &'a Oracle,
    pub(crate) after: &'a Oracle,
    /// Entries that a program told of since, by disk.
    pub(crate) told: Vec<u64>,
}

impl Promise<'_> {
    fn due(&self, disk: usize) -> impl Iterator<Item = &At> {
        let (before, after) = (&self.before.disks[disk], &self.after.disks[disk]);
        before.due.iter().filter(|at| after.due.contains(at))
    }

    /// The undo epoch of a rollback that was to begin in this step and did not.
    fn not_begun(&self, disk: usize, shape: &DiskShape) -> Option<u64> {
        let before = &self.before.disks[disk].rolled;
        let rolling =
            self.after.disks[disk].rolled.keys().copied().find(|epoch| !before.contains_key(epoch))?;
        let begun =
            |epoch: &Epoch| epoch.opened.epoch == rolling && epoch.opened.cause == EpochCause::Rollback;
        (!shape.epochs.iter().any(begun)).then_some(rolling)
    }

    /// What is known of a disk: that of before the step, where entries were to be given up in it and were not.
    fn known(&self, disk: usize, shape: &DiskShape) -> &Disk {
        let (before, after) = (&self.before.disks[disk], &self.after.disks[disk]);
        let is_said = |lost: &Lost| {
            shape.lost.iter().any(|loss| (loss.entries.first, loss.entries.last) == (lost.first, lost.last))
        };
        let mut new = after.lost.iter().skip(before.lost.len());
        if new.all(is_said) { after } else { before }
    }

    /// The disk at its newest entry, in the size that it has now: that of before the step, or of behind it.
    fn newest(&self, disk: usize, number: u64, shape: &DiskShape) -> Content {
        let (before, after, size) = (&self.before.disks[disk], &self.after.disks[disk], shape.size_sectors());
        assert!(size == before.size() || size == after.size(), "disk {disk} has {size} sectors");
        fitted(&self.known(disk, shape).content_at(number, self.not_begun(disk, shape)), size)
    }

    /// Opens what a crash left, and holds it against what was promised.
    pub(crate) fn judge(&self, files: &MemoryFiles, disks: usize, goes_on: bool) -> Views {
        let mut views = Views::default();
        let Some(mut store) = self.opened(files, disks) else { return views };
        for disk in 0..store.disks.len() {
            self.judge_log(&store, disk);
            let newest = store.newest(disk);
            store.apply(disk, newest).unwrap();
            let shape = store.journal.shape().disks[&id(disk)].clone();
            let wanted = self.newest(disk, newest, &shape);
            let told = &self.known(disk, &shape).lost;
            let said = |lost: &Loss| told.iter().any(|told| told.first == lost.entries.first);
            assert!(shape.lost.iter().all(said), "disk {disk}: {:?} are called lost", shape.lost);
            assert_eq!(
                first_wrong(&store.target(disk), &wanted),
                None,
                "the target of disk {disk} at entry {newest}"
            );
            views.add(self.judge_places(&mut store, disk, newest));
            self.judge_points(&mut store, disk);
            self.judge_damage(&shape, disk);
            views.losses += shape.lost.len();
            let carried = store.journal.entries(id(disk)).iter().filter(|entry| entry.carried);
            views.carried += carried.clone().count();
            let pins = shape.needed_inside();
            let of_pins = carried.filter(|entry| pins.iter().any(|needed| needed.has(entry.number)));
            views.carried_for_pins += of_pins.count();
        }
        if goes_on {
            go_on(files, store, disks);
        }
        views
    }

    /// `None` where there is no journal yet, and none was promised; then it can be made.
    pub(crate) fn opened(&self, files: &MemoryFiles, disks: usize) -> Option<Store> {
        match Store::open(files, disks) {
            Ok(store) => {
                assert!(store.disks.len() >= self.before.made, "a disk is not in the journal any more");
                Some(store)
            }
            Err(JournalError::NoJournal { .. }) if self.before.made == 0 => {
                Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap_or_else(|error| {
                    panic!("what a crash left is in the way of a new journal: {error}")
                });
                None
            }
            Err(error) => panic!("it does not open: {error}"),
        }
    }

    fn judge_log(&self, store: &Store, disk: usize) {
        let (before, log, newest) = (&self.before.disks[disk], &store.logs[disk], store.newest(disk));
        let told = self.told.get(disk).copied().unwrap_or(0).max(before.committed);
        assert!(newest >= told, "entry {told} of disk {disk} was durable, {newest} is there");
        let applied = store.disks[disk].applied().number;
        let said = before.applied_durably;
        assert!(applied >= said, "disk {disk}: entry {said} was said to be applied, {applied} is");
        let state = log.state.as_ref().map_or(0, |(state, _)| state.sequence.0);
        assert!(
            state >= before.state.0,
            "disk {disk}: state {} was durable, {state} is there",
            before.state.0
        );
    }

    /// Every place that is shown shows what was there, and every one that is due is shown.
    fn judge_places(&self, store: &mut Store, disk: usize, newest: u64) -> Views {
        let shape = store.journal.shape().disks[&id(disk)].clone();
        let known = self.known(disk, &shape);
        let mut places = known.truth.clone();
        if self.not_begun(disk, &shape).is_some() {
            places.clone_from(&self.before.disks[disk].truth); // its epochs have other numbers now
        }
        for (number, content) in known.after.range(..=newest) {
            // What was ahead is applied in the epoch that goes on, or was in the one before.
            if let Some(epoch) = shape.epoch_of(*number)
                && known.lost_with(*number).is_none()
            {
                places.entry(At::entry(epoch.opened.epoch, *number)).or_insert_with(|| Arc::clone(content));
            }
        }
        let due: BTreeSet<At> = self.due(disk).copied().collect();
        let mut views = Views::default();
        for (at, wanted) in &places {
            match store.view(disk, *at) {
                Ok(got) => {
                    assert_eq!(first_wrong(&got, wanted), None, "disk {disk} at {at}");
                    views.inside_entries += usize::from(at.records > 0);
                    views.of_other_sizes +=
                        usize::from(got.len() as u64 != shape.size_sectors() * SECTOR_BYTES);
                }
                Err(error) => assert!(!due.contains(at), "disk {disk} at {at} cannot be had: {error}"),
            }
            views.all += 1;
        }
        views
    }

    /// What is listed can be had where it is said to be, what was kept is listed, and each promises what it did.
    fn judge_points(&self, store: &mut Store, disk: usize) {
        let (before, after) = (&self.before.disks[disk], &self.after.disks[disk]);
        let listed = all_points(&mut store.journal, id(disk)).unwrap();
        for (point, kept) in before.kept.iter().filter(|(point, _)| after.kept.contains_key(*point)) {
            let found = listed.iter().find(|listed| listed.id == *point && listed.kept);
            let found = found.map(|listed| Kept {
                at: listed.at,
                pinned: listed.pinned,
                degraded: listed.degraded,
                damaged: listed.damaged.is_some(),
            });
            let shape = &store.journal.shape().disks[&id(disk)];
            let allowed = [(before, Some(kept)), (after, after.kept.get(point))].map(|(known, kept)| {
                kept.map(|kept| Kept { damaged: kept.damaged || known.lacks_entry(shape, kept.at), ..*kept })
            });
            assert!(allowed.contains(&found), "a kept point of disk {disk}: {found:?}, not {allowed:?}");
        }
        for mark in listed.iter().filter(|listed| !listed.kept) {
            let allowed = [before, after].map(|known| known.is_doubtful(mark.at.number));
            let degraded = mark.degraded;
            assert!(
                allowed.contains(&degraded),
                "disk {disk}: the mark at {} is degraded: {degraded}",
                mark.at
            );
        }
        let due: BTreeSet<At> = self.due(disk).copied().collect();
        for (number, point) in before.marks.range(..=before.committed) {
            let shape = &store.journal.shape().disks[&id(disk)];
            let Some(epoch) = shape.epoch_of(*number).map(|epoch| epoch.opened.epoch) else { continue };
            let at = At::entry(epoch, *number);
            let inside = store.journal.entries(id(disk)).iter().any(|entry| entry.number == *number);
            if due.contains(&at) && inside {
                let found = listed.iter().find(|listed| listed.at == at);
                let named = found.is_some_and(|listed| listed.kept || listed.id == *point);
                assert!(named, "the mark of entry {number} of disk {disk} is not listed");
            }
        }
    }

    /// What was known to be damaged in the log still is, and nothing else.
    fn judge_damage(&self, shape: &DiskShape, disk: usize) {
        let [before, after] = [self.before, self.after].map(|known| &known.disks[disk].damaged_entries);
        for number in before.keys().filter(|number| after.contains_key(*number)) {
            assert!(
                shape.is_entry_damaged(*number),
                "disk {disk}: that entry {number} is damaged is forgotten"
            );
        }
        for entry in &shape.damaged_entries {
            let known = before.contains_key(&entry.number) || after.contains_key(&entry.number);
            assert!(known, "disk {disk}: entry {} is called damaged", entry.number);
        }
    }

    /// The folder as the crash left it, read without opening it: the same, and not a byte is written.
    pub(crate) fn judge_offline(&self, files: &MemoryFiles) {
        let before = files.happened();
        let mut offline = match Offline::open(files.opener(), Path::new(FOLDER)) {
            Ok(offline) => offline,
            Err(error) => {
                assert!(self.before.made == 0, "it cannot be read: {error}");
                return;
            }
        };
        assert_eq!(offline.damage(), [], "reading calls something damaged");
        for disk in 0..self.before.made {
            let shape = offline.shape().disks[&id(disk)].clone();
            let (newest, applied) = offline.numbers(id(disk));
            // What waits behind entries that are lost is no state of the disk before it was compared.
            let passed = |loss: &Loss| {
                (applied + 1..newest).contains(&loss.entries.last)
                    && loss.mended.is_none_or(|mended| mended > newest)
            };
            if !shape.lost.iter().any(passed) {
                let wanted = self.newest(disk, newest, &shape);
                let got = read_offline(&mut offline, files, disk, Which::Newest);
                assert_eq!(first_wrong(&got, &wanted), None, "the newest state of disk {disk}, offline");
            }
            for at in self.due(disk) {
                let got = read_offline(&mut offline, files, disk, Which::At(*at));
                let wanted = &self.after.disks[disk].truth[at];
                assert_eq!(first_wrong(&got, wanted), None, "disk {disk} at {at}, offline");
            }
        }
        let verdict = offline.verify().unwrap();
        // A copy of the superblock that the crash tore is the only thing that is not as it should be.
        let torn = |finding: &Finding| finding.path.ends_with("superblock") && finding.points.is_empty();
        // What was given up is missing, and is said to be.
        let missing = |finding: &Finding| {
            let lost = finding.disk.map(|disk| &offline.shape().disks[&disk].lost).into_iter().flatten();
            let mut said = lost.map(|loss| (loss.entries.first, loss.entries.last));
            finding.lost.is_empty()
                && said.any(|(first, last)| {
                    (first..=last).any(|number| finding.what.starts_with(&format!("entries {number} to ")))
                })
        };
        let allowed = |finding: &Finding| torn(finding) || missing(finding);
        assert!(verdict.findings.iter().all(allowed), "{:?}", verdict.findings);
        assert_eq!(files.happened(), before, "something was written");
    }
}

fn read_offline(offline: &mut Offline, files: &MemoryFiles, disk: usize, which: Which) -> Vec<u8> {
    let target = files.opener().open(Path::new(&target_path(disk)), false).unwrap();
    let mut file = offline.disk(id(disk), target).unwrap().into_file(which).unwrap();
    let mut bytes = vec![0; file.size_bytes() as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
    bytes
}

/// What was recovered is used: each disk takes a batch, applies it, ends its undo epoch, and shows the end later.
fn go_on(files: &MemoryFiles, mut store: Store, disks: usize) {
    let mut ends = Vec::new();
    for disk in 0..store.disks.len() {
        let number = store.newest(disk) + 1;
        let plain = vec![number as u8 | 1; 3 * SECTOR_BYTES as usize];
        let start = store.disks[disk].size_sectors() - 3;
        let body = batch(id(disk), number, &[Record::data(start, plain.into())]);
        let appended = store.journal.append(id(disk), EntryKind::Batch, &[&body], NOW).unwrap();
        assert_eq!(appended.0, number, "entries of disk {disk} number on");
        store.journal.commit(NOW).unwrap();
        store.apply(disk, number).unwrap();
        store.journal.commit(NOW).unwrap();
        let epoch = store.disks[disk].open_epoch().unwrap();
        let content = store.target(disk);
        store.disks[disk].close_epoch(&mut store.journal, NOW).unwrap();
        store.begin(disk).unwrap();
        ends.push((At::entry(epoch, number), content));
    }
    drop(store.disks);
    drop(store.journal);
    let mut store = Store::open(files, disks).unwrap();
    for (disk, (at, content)) in ends.iter().enumerate() {
        let got = store.view(disk, *at).unwrap();
        assert_eq!(first_wrong(&got, content), None, "disk {disk} at {at}, after going on");
    }
}

fn first_wrong(got: &[u8], wanted: &[u8]) -> Option<usize> {
    assert_eq!(got.len(), wanted.len(), "another size");
    got.chunks(512).zip(wanted.chunks(512)).position(|(got, wanted)| got != wanted)
}
