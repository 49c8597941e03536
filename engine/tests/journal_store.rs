//! The whole journal of a disk against power loss: log, undo runs, target, manifest, and every point in it.
//!
//! A workload is a list of steps played on memory files with everything remembered; the oracle holds the disk after
//! every entry. Each prefix of the writes is a crash point; of the sectors no flush covered a seeded choice lands, and
//! the recovery is crashed, too. Afterwards what was committed is applied, the target stands at the newest entry, and
//! each point of every undo epoch shows the disk as it was. `CRASH_CASES` plays more workloads (`make crash`).
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{
    BatchHeader, CHAIN_START, MarkCause, MarkClass, Stretch, encode_batch,
};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, PointKept};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::offline::{Offline, Which};
use reprotect_engine::store::journal::recovery::Seen;
use reprotect_engine::store::journal::rollback::{resume, rollback};
use reprotect_engine::store::journal::verify::Finding;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalError, JournalSettings};
use reprotect_engine::units::{
    DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};

const FOLDER: &str = "/retention";
const TARGET: &str = "/datastore/disk";
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 64 << 10 };
const NOW: Timestamp = Timestamp(1);
const DISK: DiskId = DiskId([5; 16]);
/// Nine blocks, the last of them short.
const SECTORS: u64 = 8 * 8 + 3;
const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

type Disk = Vec<u8>;

#[derive(Clone, Debug)]
enum Step {
    /// Sector, sectors, zeros.
    Write(u64, u64, bool),
    Commit,
    /// Applies at most so many committed entries.
    Apply(usize),
    /// Ends the undo epoch and begins the next.
    Epoch,
    /// Goes back to the point at this share of those there are.
    Rollback(u8),
    Release,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..SECTORS, 1..20_u64, proptest::bool::weighted(0.2)).prop_map(|(start, len, zeros)| {
            Step::Write(start, len.min(SECTORS - start), zeros)
        }),
        4 => Just(Step::Commit),
        6 => (1..5_usize).prop_map(Step::Apply),
        2 => Just(Step::Epoch),
        1 => any::<u8>().prop_map(Step::Rollback),
        1 => Just(Step::Release),
    ];
    proptest::collection::vec(step, 1..30)
}

fn body(number: u64, start: u64, len: u64, zeros: bool) -> Bytes {
    let range = SectorRange::new(start, start + len);
    let plain: Vec<u8> = (0..len * SECTOR_BYTES).map(|at| (number * 29 + at / 512 + 1) as u8 | 1).collect();
    let record = if zeros { Record::zeros(range) } else { Record::data(start, plain.into()) };
    let header = BatchHeader {
        disk: DISK,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        first_sequence: Sequence(number),
        chain: CHAIN_START,
        source_time: NOW,
        record_count: 1,
        stretch: Stretch::Ordered,
    };
    encode_batch(&header, &[record]).body()
}

/// What a run of steps promised at some moment.
#[derive(Clone, Debug, Default)]
struct Oracle {
    /// The disk after each entry, by (history of rollbacks so far, number).
    newest: Disk,
    /// Points that must be there: the disk at each.
    points: BTreeMap<At, Disk>,
    committed: u64,
    /// The disk after each entry that is not applied yet.
    ahead: BTreeMap<u64, Disk>,
    applied: u64,
    /// A rollback is under way, or was just done.
    rolling: Option<Disk>,
}

struct Store {
    journal: Journal,
    applier: Applier<Box<dyn BlockFile>>,
}

fn open(files: &MemoryFiles) -> Result<Store, JournalError> {
    let (mut journal, found) = Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW)?;
    assert_eq!(found.damage, []);
    let log = &found.disks[&DISK];
    assert_eq!(log.missing, []);
    let target = files.opener().open(Path::new(TARGET), true)?;
    let applied = log.applied.map(|(applied, _)| applied);
    let (mut applier, holes) = Applier::open(&journal, DISK, target, applied)?;
    assert_eq!(holes, []);
    resume(&mut journal, &mut applier, NOW)?;
    if applier.open_epoch().is_none() {
        applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, NOW)?;
    }
    Ok(Store { journal, applier })
}

impl Store {
    /// Applies entries up to `through`.
    fn apply(&mut self, through: u64) -> Result<(), JournalError> {
        let mut decompressor = Decompressor::new().unwrap();
        let from = self.applier.applied().number;
        let wanted: Vec<_> = self
            .journal
            .entries(DISK)
            .iter()
            .filter(|entry| entry.number > from && entry.number <= through)
            .copied()
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut window = Window::default();
        for entry in &wanted {
            let (head, body) = self.journal.read(entry.place)?;
            for write in entry_writes(head.kind, body.into(), &mut decompressor).unwrap() {
                window.put(write);
            }
        }
        self.applier.apply(&mut self.journal, through, &window, NOW)
    }

    fn view(&mut self, at: At) -> Result<Disk, JournalError> {
        let view = View::open(&self.journal, DISK, at)?;
        let mut disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        let runs = view.open_runs(&self.journal, &mut self.applier)?;
        view.read(&runs, &mut self.applier, 0, &mut disk)?;
        // In pieces that are not aligned to anything it is the same.
        let mut piece = vec![0; 1234];
        view.read(&runs, &mut self.applier, 5000, &mut piece)?;
        assert_eq!(piece, disk[5000..6234]);
        Ok(disk)
    }

    fn target(&mut self) -> Disk {
        let mut disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        self.applier.target().read(&mut [ReadAt { offset: 0, data: &mut disk }]).unwrap();
        disk
    }
}

struct Played {
    before: MemoryFiles,
    files: MemoryFiles,
    promises: Vec<(usize, Oracle)>,
}

fn play(steps: &[Step]) -> Played {
    let files = MemoryFiles::default();
    files.put(TARGET, &found_disk());
    let before = files.snapshot();
    let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW).unwrap();
    journal
        .add_disk(DiskAdded { disk: DISK, machine: [1; 16], size_sectors: SECTORS, time: NOW }, NOW)
        .unwrap();
    let target = files.opener().open(Path::new(TARGET), true).unwrap();
    let (applier, _) = Applier::open(&journal, DISK, target, None).unwrap();
    let mut store = Store { journal, applier };
    store.applier.begin_epoch(&mut store.journal, EpochCause::First, POSITION, None, NOW).unwrap();
    let mut oracle = Oracle { newest: found_disk(), ..Oracle::default() };
    oracle.points.insert(At::entry(1, 0), found_disk());
    let mut appended = 0;
    let mut promises = vec![(files.trace().len(), oracle.clone())];
    for step in steps {
        match step {
            Step::Write(start, len, zeros) => {
                let body = body(appended + 1, *start, *len, *zeros);
                let (number, _) = store.journal.append(DISK, EntryKind::Batch, &[&body], NOW).unwrap();
                appended = number;
                let mut decompressor = Decompressor::new().unwrap();
                let mut newest = oracle.ahead.values().next_back().unwrap_or(&oracle.newest).clone();
                for write in entry_writes(EntryKind::Batch, body, &mut decompressor).unwrap() {
                    let from = write.range.byte_start() as usize;
                    let place = &mut newest[from..from + write.range.bytes() as usize];
                    match write.content {
                        reprotect_engine::store::journal::entry::Content::Data(data) => {
                            place.copy_from_slice(&data)
                        }
                        reprotect_engine::store::journal::entry::Content::Zeros => place.fill(0),
                    }
                }
                oracle.ahead.insert(number, newest);
            }
            Step::Commit => {
                store.journal.commit(NOW).unwrap();
                oracle.committed = appended;
            }
            Step::Apply(count) => {
                let through = oracle.committed.min(oracle.applied + *count as u64);
                store.apply(through).unwrap();
                oracle.applied_through(through, store.applier.open_epoch().unwrap());
            }
            Step::Epoch => {
                store.journal.commit(NOW).unwrap();
                oracle.committed = appended;
                promises.push((files.trace().len(), oracle.clone()));
                store.applier.close_epoch(&mut store.journal, NOW).unwrap();
                store.applier.begin_epoch(&mut store.journal, EpochCause::Time, POSITION, None, NOW).unwrap();
            }
            Step::Rollback(share) => {
                // What waits is applied first.
                store.journal.commit(NOW).unwrap();
                oracle.committed = appended;
                store.apply(appended).unwrap();
                oracle.applied_through(appended, store.applier.open_epoch().unwrap());
                let at = *oracle.points.keys().nth(usize::from(*share) % oracle.points.len()).unwrap();
                if store.view(at).is_err() {
                    continue; // its redo entries were released
                }
                oracle.rolling = Some(oracle.points[&at].clone());
                promises.push((files.trace().len(), oracle.clone()));
                rollback(&mut store.journal, &mut store.applier, at, POSITION, NOW).unwrap();
                oracle.newest = oracle.rolling.take().unwrap();
                let rolled = store.journal.shape().disks[&DISK].epochs.last().unwrap().opened;
                oracle.points.insert(At::entry(rolled.epoch, rolled.after), oracle.newest.clone());
                let opened = store
                    .applier
                    .begin_epoch(&mut store.journal, EpochCause::Time, POSITION, None, NOW)
                    .unwrap();
                oracle.points.insert(At::entry(opened, appended), oracle.newest.clone());
            }
            Step::Release => {
                store.journal.commit(NOW).unwrap();
                oracle.committed = appended;
                // Points inside an epoch may lose their redo entries from here on.
                let shape = store.journal.shape().disks[&DISK].clone();
                oracle.points.retain(|at, _| {
                    let epoch = shape.epochs.iter().find(|epoch| epoch.opened.epoch == at.epoch);
                    epoch.is_some_and(|epoch| {
                        epoch.closed.is_some_and(|closed| closed.last == at.number)
                            || epoch.opened.after == at.number
                    })
                });
                promises.push((files.trace().len(), oracle.clone()));
                for segment in store.journal.releasable() {
                    store.journal.release(segment, NOW).unwrap();
                }
            }
        }
        promises.push((files.trace().len(), oracle.clone()));
    }
    Played { before, files, promises }
}

/// What stood on the target before anything was protected.
fn found_disk() -> Disk {
    (0..SECTORS * SECTOR_BYTES).map(|at| if at / 4096 == 3 { 0 } else { (at / 512) as u8 }).collect()
}

impl Oracle {
    fn applied_through(&mut self, through: u64, epoch: u64) {
        while let Some(entry) = self.ahead.first_entry().filter(|entry| *entry.key() <= through) {
            let (number, disk) = entry.remove_entry();
            self.points.insert(At::entry(epoch, number), disk.clone());
            self.newest = disk;
            self.applied = number;
        }
    }
}

/// After a crash: everything committed is applied, the target is the newest state, every point is as it was.
fn check(files: &MemoryFiles, promise: &Oracle, full: bool) -> Result<(), JournalError> {
    let mut store = open(files)?;
    let newest = store.journal.entries(DISK).last().map_or(0, |entry| entry.number);
    let newest = newest.max(store.applier.applied().number);
    assert!(newest >= promise.committed, "entry {} was committed, {newest} is there", promise.committed);
    if !full {
        return Ok(()); // a recovery that is interrupted itself
    }
    store.apply(newest)?;
    let target = store.target();
    let expected = match &promise.rolling {
        // Either it was not begun, or it is finished now: never something between.
        Some(rolled) if target == *rolled => rolled,
        _ => promise.ahead.get(&newest).unwrap_or(&promise.newest),
    };
    assert_eq!(&target, expected, "the target after recovery, entry {newest}");
    for (at, disk) in &promise.points {
        assert_eq!(&store.view(*at)?, disk, "{at:?}");
    }
    // What was ahead was applied in the epoch that is open now, or in the one it was applied in before.
    for (number, disk) in promise.ahead.range(..=newest) {
        let epoch = store.journal.shape().disks[&DISK].epoch_of(*number).unwrap().opened.epoch;
        assert_eq!(&store.view(At::entry(epoch, *number))?, disk, "entry {number} in epoch {epoch}");
    }
    Ok(())
}

/// The folder as a crash left it, read without recovering anything: the same states, and not a byte written.
fn check_offline(files: &MemoryFiles, promise: &Oracle) {
    let before = files.trace().len();
    let mut offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    assert_eq!(offline.damage(), []);
    let (newest, _) = offline.numbers(DISK);
    let shape = offline.shape().disks[&DISK].clone();
    let mut read = |which| {
        let target = files.opener().open(Path::new(TARGET), false).unwrap();
        let mut disk = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        let mut file = offline.disk(DISK, target).unwrap().into_file(which).unwrap();
        file.read(&mut [ReadAt { offset: 0, data: &mut disk }]).unwrap();
        disk
    };
    let target = read(Which::Newest);
    let expected = match &promise.rolling {
        Some(rolled) if target == *rolled => rolled,
        _ => promise.ahead.get(&newest).unwrap_or(&promise.newest),
    };
    assert_eq!(&target, expected, "the newest state, entry {newest}");
    for (at, disk) in &promise.points {
        assert_eq!(&read(Which::At(*at)), disk, "{at:?}");
    }
    for (number, disk) in promise.ahead.range(..=newest) {
        // Behind the last epoch, between two.
        let Some(epoch) = shape.epoch_of(*number) else { continue };
        assert_eq!(&read(Which::At(At::entry(epoch.opened.epoch, *number))), disk);
    }
    let verdict = offline.verify().unwrap();
    // A copy of the superblock that the crash tore is the only thing that is not as it should be.
    let torn = |finding: &Finding| finding.path.ends_with("superblock") && finding.points.is_empty();
    assert!(verdict.findings.iter().all(torn), "{:?}", verdict.findings);
    assert_eq!(files.trace().len(), before, "something was written");
}

fn lands(seed: u64) -> impl FnMut() -> bool {
    // xorshift; its low bits choose how many sectors land.
    let (mut state, often) = (seed | 1, seed % 4);
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 32 & 3 < often + 1
    }
}

fn cases() -> u32 {
    std::env::var("CRASH_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn after_a_crash_anywhere_every_point_is_as_it_was(steps in steps(), seed in any::<u64>()) {
        let played = play(&steps);
        let trace = played.files.trace();
        for events in played.promises[0].0..=trace.len() {
            let promise = &played.promises.iter().rev().find(|(at, _)| *at <= events).unwrap().1;
            let mut files = played.before.crashed(&trace, events, lands(seed ^ events as u64));
            // The recovery is crashed up to three times.
            for round in 0..(seed >> 60) % 4 {
                let after = files.snapshot();
                check(&files, promise, false).unwrap();
                let again = files.trace();
                let at = (seed >> (round * 7)) as usize % (again.len() + 1);
                files = after.crashed(&again, at, lands(seed ^ round));
            }
            check_offline(&files, promise);
            check(&files, promise, true).unwrap();
        }
    }
}

/// What stands in the folder, as far as it was ever written: file and bytes.
fn written(files: &MemoryFiles) -> Vec<(PathBuf, u64)> {
    let offline = Offline::open(files.opener(), Path::new(FOLDER)).unwrap();
    let mut ends: BTreeMap<PathBuf, u64> = BTreeMap::new();
    let folder = Path::new(FOLDER);
    let manifest = folder.join(format!("manifest-{:08}", offline.superblock().manifest));
    offline
        .edits(|at, head, _| *ends.entry(manifest.clone()).or_default() = at + head.stored_bytes())
        .unwrap();
    let mut segment = PathBuf::new();
    let seen = offline.log(|seen| match seen {
        Seen::Segment(_, path) => segment = path.to_owned(),
        Seen::Group { offset, header, .. } => {
            ends.insert(segment.clone(), offset + header.stored_bytes());
        }
        Seen::Entry { .. } => {}
    });
    seen.unwrap();
    for name in files.opener().neighbours(&folder.join("any")).unwrap() {
        let path = folder.join(&name);
        if name == "superblock" || name.starts_with("undo-") {
            ends.insert(
                path.clone(),
                files.bytes_sparse(&path).last().map_or(0, |(at, run)| at + run.len() as u64),
            );
        }
    }
    ends.into_iter().collect()
}

fn point(epoch: u64, number: u64) -> PointKept {
    PointKept {
        disk: DISK,
        point: [epoch as u8; 16],
        number,
        sequence: Sequence(number),
        epoch,
        source_time: NOW,
        class: MarkClass::Crash,
        pinned: false,
        degraded: false,
        name: Text::new(""),
        cause: MarkCause::Timer,
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_folder_is_found_and_what_it_costs_is_named() {
    let write = |start| Step::Write(start, 9, false);
    let steps =
        [write(3), write(20), Step::Commit, Step::Apply(2), Step::Epoch, write(8), write(40), Step::Commit];
    let played =
        play(&[&steps[..], &[Step::Apply(9), Step::Epoch, write(1), Step::Commit, Step::Apply(9)]].concat());
    let mut store = open(&played.files).unwrap();
    for (epoch, number) in [(1, 0), (1, 2), (2, 4)] {
        store.journal.edit(&[Edit::PointKept(point(epoch, number))], NOW).unwrap();
    }
    drop(store);
    let ends = written(&played.files);
    let bits: u64 = ends.iter().map(|(_, end)| end * 8).sum();
    let mut costly = 0;
    // A step without a common factor with anything of the layout.
    for bit in (0..bits).step_by(1511) {
        let mut at = bit;
        let (path, _) = ends
            .iter()
            .find(|(_, end)| {
                let here = at < end * 8;
                at -= if here { 0 } else { end * 8 };
                here
            })
            .unwrap();
        let files = played.files.snapshot();
        let mut byte = [0];
        let mut file = files.opener().open(path, false).unwrap();
        file.read(&mut [ReadAt { offset: at / 8, data: &mut byte }]).unwrap();
        drop(file);
        files.poke(path, at / 8, &[byte[0] ^ 1 << (at % 8)]);
        let Ok(mut offline) = Offline::open(files.opener(), Path::new(FOLDER)) else { continue };
        let verdict = offline.verify().unwrap_or_else(|error| {
            panic!("{} byte {} bit {}: nothing is judged: {error}", path.display(), at / 8, at % 8)
        });
        // Damage to the last edit or group cannot be told from a torn end; that there is one is said.
        let named = !verdict.findings.is_empty() || verdict.notes.iter().any(|note| note.contains("torn"));
        assert!(named, "{} byte {} bit {}", path.display(), at / 8, at % 8);
        costly += u64::from(verdict.findings.iter().any(|finding| !finding.points.is_empty()));
    }
    assert!(costly > 0, "no point was named");
}
