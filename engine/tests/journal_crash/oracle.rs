//! What was promised in a workload, and the judgement of what a crash left of it.
//!
//! Invariants: `truth` is what a disk held at every place that ever had a name, whether it can still be had or not; `due`
//! is what the journal itself said can be had. Units: entry numbers. Called by the workload and the enumeration.

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
use reprotect_engine::store::journal::{DiskShape, Epoch, Journal, JournalError};
use reprotect_engine::units::{DiskId, SECTOR_BYTES};

use crate::journal_lab::{NOW, batch, id};
use crate::store::{DISK_BYTES, FOLDER, SECTORS, SETTINGS, Store, target_path};

type Content = Arc<Vec<u8>>;

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
    pub(crate) kept: BTreeMap<[u8; 16], At>,
    pub(crate) marks: BTreeMap<u64, [u8; 16]>,
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
            state: (0, 0),
        }
    }

    /// The disk with everything that was added.
    pub(crate) fn content(&self) -> Content {
        self.content_at(self.appended, None)
    }

    /// The disk when `number` is its newest entry. A rollback of the epoch `not` has not begun.
    fn content_at(&self, number: u64, not: Option<u64>) -> Content {
        let rolled = self.rolled.iter().rev().filter(|(epoch, _)| Some(**epoch) != not);
        match rolled.map(|(_, rolled)| rolled).find(|rolled| rolled.0 == number) {
            Some((_, content)) => Arc::clone(content),
            None => Arc::clone(&self.after[&number]),
        }
    }

    pub(crate) fn appends(&mut self, number: u64, content: Content) {
        self.after.insert(number, content);
        self.appended = number;
    }

    pub(crate) fn applies(&mut self, through: u64, epoch: u64) {
        for number in self.applied + 1..=through {
            self.truth.insert(At::entry(epoch, number), Arc::clone(&self.after[&number]));
        }
        self.applied = through;
    }

    pub(crate) fn begins(&mut self, epoch: u64) {
        let content = self.content_at(self.applied, None);
        self.truth.insert(At::entry(epoch, self.applied), content);
    }

    pub(crate) fn rolls(&mut self, epoch: u64, number: u64, content: Content) {
        self.truth.insert(At::entry(epoch, number), Arc::clone(&content));
        self.rolled.insert(epoch, (number, content));
    }

    /// The program was started again: what was not written is gone, and what is there is told to be durable.
    pub(crate) fn reopened(&mut self, newest: u64, applied: u64) {
        assert!(newest >= self.committed && applied >= self.applied_durably);
        self.after.split_off(&(newest + 1));
        self.marks.split_off(&(newest + 1));
        (self.appended, self.committed) = (newest, newest);
        self.truth.retain(|at, _| at.number <= newest);
        self.due.retain(|at| at.number <= newest);
        (self.applied, self.applied_durably) = (applied, applied);
    }

    /// What the journal says can be had of the places that are known, but for undo epochs that it may forget at any time.
    pub(crate) fn due_in(&self, journal: &Journal, disk: DiskId) -> BTreeSet<At> {
        let shape = &journal.shape().disks[&disk];
        let stays = |at: &&At| !is_bare(shape, at.epoch) && View::check(journal, disk, **at).is_ok();
        self.truth.keys().filter(stays).copied().collect()
    }
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

    /// The disk at its newest entry.
    fn newest(&self, disk: usize, number: u64, shape: &DiskShape) -> Content {
        self.after.disks[disk].content_at(number, self.not_begun(disk, shape))
    }

    /// Opens what a crash left, and holds it against what was promised.
    pub(crate) fn judge(&self, files: &MemoryFiles, disks: usize, goes_on: bool) -> usize {
        let Some(mut store) = self.opened(files, disks) else { return 0 };
        let mut views = 0;
        for disk in 0..store.disks.len() {
            self.judge_log(&store, disk);
            let newest = store.newest(disk);
            store.apply(disk, newest).unwrap();
            let shape = store.journal.shape().disks[&id(disk)].clone();
            let wanted = self.newest(disk, newest, &shape);
            assert_eq!(
                first_wrong(&store.target(disk), &wanted),
                None,
                "the target of disk {disk} at entry {newest}"
            );
            views += self.judge_places(&mut store, disk, newest);
            self.judge_points(&mut store, disk);
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
    fn judge_places(&self, store: &mut Store, disk: usize, newest: u64) -> usize {
        let known = &self.after.disks[disk];
        let mut places = known.truth.clone();
        if self.not_begun(disk, &store.journal.shape().disks[&id(disk)]).is_some() {
            places.clone_from(&self.before.disks[disk].truth); // its epochs have other numbers now
        }
        for (number, content) in known.after.range(..=newest) {
            // What was ahead is applied in the epoch that goes on, or was in the one before.
            let shape = &store.journal.shape().disks[&id(disk)];
            if let Some(epoch) = shape.epoch_of(*number) {
                places.entry(At::entry(epoch.opened.epoch, *number)).or_insert_with(|| Arc::clone(content));
            }
        }
        let due: BTreeSet<At> = self.due(disk).copied().collect();
        let mut views = 0;
        for (at, wanted) in &places {
            match store.view(disk, *at) {
                Ok(got) => assert_eq!(first_wrong(&got, wanted), None, "disk {disk} at {at}"),
                Err(error) => assert!(!due.contains(at), "disk {disk} at {at} cannot be had: {error}"),
            }
            views += 1;
        }
        views
    }

    /// What is listed can be had where it is said to be, and what was kept is listed.
    fn judge_points(&self, store: &mut Store, disk: usize) {
        let (before, after) = (&self.before.disks[disk], &self.after.disks[disk]);
        let listed = all_points(&mut store.journal, id(disk)).unwrap();
        for (point, at) in before.kept.iter().filter(|(point, _)| after.kept.contains_key(*point)) {
            let found = listed.iter().find(|listed| listed.id == *point);
            assert_eq!(
                found.map(|listed| (listed.at, listed.kept)),
                Some((*at, true)),
                "a kept point of disk {disk}"
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
            let wanted = self.newest(disk, offline.numbers(id(disk)).0, &shape);
            let got = read_offline(&mut offline, files, disk, Which::Newest);
            assert_eq!(first_wrong(&got, &wanted), None, "the newest state of disk {disk}, offline");
            for at in self.due(disk) {
                let got = read_offline(&mut offline, files, disk, Which::At(*at));
                let wanted = &self.after.disks[disk].truth[at];
                assert_eq!(first_wrong(&got, wanted), None, "disk {disk} at {at}, offline");
            }
        }
        let verdict = offline.verify().unwrap();
        // A copy of the superblock that the crash tore is the only thing that is not as it should be.
        let torn = |finding: &Finding| finding.path.ends_with("superblock") && finding.points.is_empty();
        assert!(verdict.findings.iter().all(torn), "{:?}", verdict.findings);
        assert_eq!(files.happened(), before, "something was written");
    }
}

fn read_offline(offline: &mut Offline, files: &MemoryFiles, disk: usize, which: Which) -> Vec<u8> {
    let target = files.opener().open(Path::new(&target_path(disk)), false).unwrap();
    let mut file = offline.disk(id(disk), target).unwrap().into_file(which).unwrap();
    let mut bytes = vec![0; DISK_BYTES];
    file.read(&mut [ReadAt { offset: 0, data: &mut bytes }]).unwrap();
    bytes
}

/// What was recovered is used: each disk takes a batch, applies it, ends its undo epoch, and shows the end later.
fn go_on(files: &MemoryFiles, mut store: Store, disks: usize) {
    let mut ends = Vec::new();
    for disk in 0..store.disks.len() {
        let number = store.newest(disk) + 1;
        let plain = vec![number as u8 | 1; 3 * SECTOR_BYTES as usize];
        let body = batch(id(disk), number, &[Record::data(SECTORS - 3, plain.into())]);
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
    got.chunks(512).zip(wanted.chunks(512)).position(|(got, wanted)| got != wanted)
}
