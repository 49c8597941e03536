//! The newest edit of the manifest has a witness: rot, a lost sector or a device that lies there is named, or changes nothing.
//!
//! A journal goes through every kind of edit and is never closed in order. At each of its edits the newest one is damaged in
//! every way, and, apart from that, everything that was written to the manifest since an edit before is lost, with and
//! without the superblock. Then either the opening refuses and says so, or every point that can be read shows what it was.
//! Called by `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod journal_lab;
#[path = "journal_lab/merge.rs"]
mod merge;
#[path = "journal_lab/place.rs"]
mod place;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use journal_lab::{NOW, id};
use merge::merge_runs;
use place::{Lab, Place, noise};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::*;
use reprotect_engine::format::wire::Text;
use reprotect_engine::store::files::Files as _;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::scrub::{check_index, check_own};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Journal, JournalSettings, Run, RunFile};
use reprotect_engine::units::{LineageId, Sequence};

const SECTORS: u64 = 24 * 8;
const MANIFEST: &str = "/retention/manifest-00000001";
const SUPERBLOCK: &str = "/retention/superblock";

fn place(files: &MemoryFiles) -> Place {
    Place {
        files: files.opener(),
        folder: "/retention".into(),
        targets: vec!["/datastore/disk".into()],
        size_sectors: SECTORS,
        segment_bytes: 64 << 10,
    }
}

/// What happened to a journal, and what each of its points shows.
struct Story {
    before: MemoryFiles,
    trace: Vec<Event>,
    /// Where in the trace an edit (or several at once) had become durable, and the superblock knew it.
    told: Vec<usize>,
    points: BTreeMap<At, Vec<u8>>,
}

/// A journal that is written to.
struct Writer {
    lab: Lab,
    disk: Vec<u8>,
    seed: u64,
    points: BTreeMap<At, Vec<u8>>,
}

impl Writer {
    fn newest(&self) -> At {
        let epoch = self.lab.journal.shape().disks[&id(0)].open_epoch().unwrap().opened.epoch;
        At::entry(epoch, self.seed)
    }

    /// Entries, applied one by one.
    fn write(&mut self, count: u64) {
        for _ in 0..count {
            self.seed += 1;
            let start = self.seed * 37 % (SECTORS - 40);
            self.lab.write(0, start, 40, self.seed).unwrap();
            self.disk[start as usize * 512..][..40 * 512].copy_from_slice(&noise(self.seed, 40 * 512));
            self.lab.commit().unwrap();
            self.lab.apply(0).unwrap();
            self.lab.commit().unwrap();
            self.points.insert(self.newest(), self.disk.clone());
        }
    }

    fn epoch(&mut self) {
        self.lab.epoch(0).unwrap();
        self.points.insert(self.newest(), self.disk.clone());
    }

    fn edit(&mut self, edit: Edit) {
        self.lab.journal.edit(&[edit], NOW).unwrap();
    }
}

/// Every kind of edit, one after the other, with changes of the disk in between.
fn story() -> Story {
    let before = MemoryFiles::default();
    let disk = noise(99, SECTORS as usize * 512);
    before.put("/datastore/disk", &disk);
    let files = before.snapshot();
    let lab = place(&files).create().unwrap();
    let mut writer = Writer { lab, disk, seed: 0, points: BTreeMap::new() };
    let (own, other) = (id(0), id(1));
    for _ in 0..4 {
        writer.write(2);
        writer.epoch(); // EpochClosed, EpochOpened, sometimes SegmentOpened
    }
    let runs: Vec<Run> = writer.lab.journal.shape().disks[&own].runs.clone();
    merge_runs(&mut writer.lab.journal, own, runs[1], runs[2]).unwrap();
    writer.write(1);
    let point = PointKept {
        disk: own,
        point: [5; 16],
        number: 8,
        sequence: Sequence(8),
        epoch: 4,
        source_time: NOW,
        class: MarkClass::Crash,
        pinned: false,
        degraded: false,
        name: Text::new(""),
        cause: MarkCause::Timer,
    };
    writer.edit(Edit::PointKept(point));
    writer.edit(Edit::PointChanged(PointKept { pinned: true, ..point }));
    writer.write(1);
    writer.edit(Edit::EpochsExpired(EpochsExpired { disk: own, through: 1 }));
    writer.lab.journal.files().remove(&run_path(&writer.lab.journal, own, RunFile::Epoch(1))).unwrap();
    let (lineage, cause) = (LineageId([2; 16]), Text::new("a test"));
    let stretch =
        StretchDegraded { disk: own, lineage, from: Sequence(1), to: Sequence(2), time: NOW, cause };
    writer.edit(Edit::StretchDegraded(stretch));
    writer.edit(Edit::EntriesLost(EntriesLost { disk: own, first: 1, last: 2, time: NOW, cause }));
    writer.edit(Edit::LossMended(LossMended { disk: own, number: 3 }));
    let (first, last, start, end) = (4, 4, 0, 1);
    writer.edit(Edit::ImagesDamaged(ImagesDamaged {
        disk: own,
        first,
        last,
        start,
        end,
        since: 0,
        time: NOW,
        cause,
    }));
    writer.edit(Edit::ImagesSound(ImagesSound { disk: own, first, last, start, end }));
    let segment = *writer.lab.journal.shape().segments.keys().next().unwrap();
    writer.edit(Edit::EntryDamaged(EntryDamaged { disk: own, number: 1, segment, time: NOW, cause }));
    writer.edit(Edit::EntrySound(EntrySound { disk: own, number: 1 }));
    let added = DiskAdded { disk: other, machine: [7; 16], size_sectors: 64, time: NOW };
    writer.edit(Edit::DiskAdded(added));
    writer.edit(Edit::DiskGrown(DiskGrown { disk: other, size_sectors: 128, after: 0, time: NOW }));
    writer.lab.journal.remove_disk(other, NOW).unwrap();
    writer.write(1);
    writer.epoch();
    for segment in writer.lab.journal.releasable() {
        writer.lab.journal.release(segment, NOW).unwrap();
    }
    writer.write(6);
    writer.edit(Edit::PointDropped(PointDropped { disk: own, point: [5; 16] }));
    writer.write(1);
    let (points, trace) = (writer.points, files.trace());
    let superblock = |event: &Event| matches!(event, Event::Flush(path) if path == Path::new(SUPERBLOCK));
    let told = (1..=trace.len()).filter(|at| superblock(&trace[at - 1])).collect();
    Story { before, trace, told, points }
}

/// Where the edits of a manifest stand, and what kind they are.
fn edits(files: &MemoryFiles) -> Vec<(u64, EditKind)> {
    let bytes = files.bytes_sparse(MANIFEST).remove(0).1;
    let mut found = Vec::new();
    let mut at = 4096;
    while let Some(Ok(head)) = bytes.get(at..).map(EditHead::open) {
        found.push((at as u64, head.kind));
        at += head.stored_bytes() as usize;
    }
    found
}

impl Story {
    /// The files at a place of the trace; nobody has them open.
    fn at(&self, events: usize) -> MemoryFiles {
        self.before.replayed(&self.trace[..events]).snapshot()
    }

    /// Opens damaged files, and reads every point. Answers whether it was refused.
    fn judge(&self, files: &MemoryFiles, what: &str) -> bool {
        let mut lab = match place(files).open() {
            Ok(lab) => lab,
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("/retention") || text.contains("disk 0101"), "{what}: {text}");
                let read = Offline::open(files.opener(), Path::new("/retention"));
                assert!(
                    read.is_err() || !text.contains("manifest-"),
                    "{what}: refused ({text}), and read by the tools"
                );
                return true;
            }
        };
        for (at, wanted) in &self.points {
            if let Ok(got) = lab.view(0, *at) {
                let wrong = got.chunks(512).zip(wanted.chunks(512)).position(|(got, wanted)| got != wanted);
                assert_eq!(wrong, None, "{what}: {at} shows a wrong sector");
            }
        }
        false
    }
}

#[test]
fn the_newest_edit_of_an_unclean_journal_is_missed_whatever_kind_it_is() {
    let story = story();
    let mut kinds = BTreeSet::new();
    let (mut damaged, mut whole) = (0, 0);
    for (told, at) in story.told.iter().enumerate() {
        // Just told, and before the next one begins.
        for events in [*at, story.told.get(told + 1).map_or(story.trace.len(), |next| next - 4)] {
            let files = story.at(events);
            let Some((offset, kind)) = edits(&files).pop() else { continue };
            if events >= *at {
                kinds.insert(format!("{kind:?}"));
            }
            assert!(!story.judge(&files.snapshot(), &format!("{kind:?}, whole")));
            whole += 1;
            let block = files.bytes_sparse(MANIFEST)[0].1[offset as usize..][..4096].to_vec();
            let mut hurt = |what: String, place: u64, bytes: &[u8]| {
                let lost = files.snapshot();
                lost.poke(MANIFEST, place, bytes);
                assert!(story.judge(&lost, &what), "{kind:?}, {what}: nobody says that an edit is gone");
                damaged += 1;
            };
            hurt("all of it lost".to_owned(), offset, &[0; 4096]);
            hurt("its first sector lost".to_owned(), offset, &[0; 512]);
            hurt("noise".to_owned(), offset, &noise(1, 4096));
            for bit in (0..4096 * 8).step_by(1009) {
                let byte = block[bit / 8] ^ (1 << (bit % 8));
                hurt(format!("bit {bit}"), offset + bit as u64 / 8, &[byte]);
            }
        }
    }
    eprintln!("{whole} journals, {damaged} damages refused; kinds: {kinds:?}");
    assert_eq!(kinds.len(), 19, "{kinds:?}");
}

/// A device that says it flushed, and did not: of `liars` nothing is there that was written since an edit before.
#[test]
fn a_device_that_lied_about_manifest_and_superblock_shows_nothing_wrong() {
    let story = story();
    for liars in [&[MANIFEST][..], &[MANIFEST, SUPERBLOCK]] {
        let (mut refused, mut shown) = (0, 0);
        for (since, from) in story.told.iter().enumerate() {
            let mut ends: Vec<usize> = story.told[since + 1..].iter().take(4).copied().collect();
            ends.extend(ends.clone().iter().map(|end| end - 2));
            ends.push(story.trace.len());
            for end in ends {
                let is_lie = |event: &&Event| matches!(event, Event::Write { path, .. } if liars.iter().any(|liar| path == Path::new(liar)));
                let told: Vec<Event> =
                    story.trace[*from..end].iter().filter(|event| !is_lie(event)).cloned().collect();
                let files = story.at(*from).replayed(&told).snapshot();
                let what = format!("events {from} to {end} of {liars:?} lost");
                let gone = story.judge(&files, &what);
                let lost = edits(&files).len() < edits(&story.at(end)).len() && story.told.contains(&end);
                assert!(gone || !lost || liars.len() > 1, "{what}: nobody says so");
                refused += u32::from(gone);
                shown += u32::from(!gone);
            }
        }
        eprintln!("{liars:?}: {refused} refused, {shown} opened with every view right");
        assert!(refused > 0 && shown > 0);
    }
}

/// Every bit of the newest edit, of the edits before it, and of the copies of the superblock.
#[test]
fn every_bit_of_what_an_unclean_journal_consists_of_is_found_or_proven_harmless() {
    let story = story();
    let files = story.at(story.trace.len());
    let newest = edits(&files).pop().unwrap().0;
    let step = if std::env::var_os("FLIPS").is_some() { 1 } else { 149 };
    let (mut refused, mut harmless) = (0, 0);
    for (path, range) in [(MANIFEST, 0..newest + 8192), (SUPERBLOCK, 0..16384)] {
        let bytes = files.bytes_sparse(path).remove(0).1;
        for bit in (range.start * 8..range.end * 8).step_by(step) {
            let damaged = files.snapshot();
            damaged.poke(path, bit / 8, &[bytes[bit as usize / 8] ^ (1 << (bit % 8))]);
            let gone = story.judge(&damaged, &format!("{path}, bit {bit}"));
            let is_edit = path == MANIFEST && (4096..newest + 4096).contains(&(bit / 8));
            assert!(gone || !is_edit, "bit {bit} of an edit is not missed");
            (refused, harmless) = (refused + u32::from(gone), harmless + u32::from(!gone));
        }
    }
    eprintln!("{refused} bits refused, {harmless} harmless: every view right");
    assert!(refused > 0 && harmless > 0);
}

/// What was torn by a power cut was nobody's promise: it is dropped, the file is kept, and it is said.
#[test]
fn a_torn_edit_is_dropped_and_said_and_nothing_is_removed() {
    let story = story();
    let files = story.at(story.trace.len());
    let end = edits(&files).pop().unwrap().0 + 4096;
    files.poke(MANIFEST, end, &noise(3, 4096));
    let torn = files.bytes_sparse(MANIFEST);
    let stray = PathBuf::from(format!("/retention/undo-{}-m00000077", id(0)));
    files.put(&stray, &files.bytes(run_path_of(&files.snapshot())));
    let lab = place(&files).open().unwrap();
    let aside = Path::new("/retention/manifest-00000001.aside");
    assert_eq!(lab.found.torn_manifest.as_deref(), Some(aside));
    assert_eq!(files.bytes_sparse(aside), torn);
    assert_eq!(
        lab.found.set_aside.len(),
        1,
        "a run that a lost edit may have named is kept: {:?}",
        lab.found
    );
    drop(lab);
    let lab = place(&files).open().unwrap();
    assert!(lab.found.torn_manifest.is_none() && lab.holes[0].is_empty());
    drop(lab);
    assert!(!story.judge(&files, "after a torn end"));
}

/// Some sealed run.
fn run_path_of(files: &MemoryFiles) -> PathBuf {
    let lab = place(files).open().unwrap();
    let run = lab.journal.shape().disks[&id(0)].runs[0];
    run_path(&lab.journal, id(0), run.file)
}

/// Nothing is kept for a disk that nobody protects, also where a crash came between the edit and the removal of its files.
#[test]
fn files_of_a_disk_that_was_removed_go_at_the_next_start() {
    let story = story();
    let files = story.at(story.trace.len());
    let own = |files: &MemoryFiles| {
        let names = files.neighbours(Path::new(MANIFEST)).unwrap();
        names.into_iter().filter(|name| name.contains(&id(0).to_string())).collect::<Vec<_>>()
    };
    let settings = JournalSettings { segment_bytes: 64 << 10 };
    let open = || Journal::open(files.opener(), Path::new("/retention"), settings, NOW).unwrap();
    let (mut journal, _) = open();
    assert!(own(&files).len() > 2);
    files.put(format!("/retention/crc-{}", id(0)), b"a map");
    journal.remove_disk(id(0), NOW).unwrap();
    drop(journal);
    let (_, found) = open();
    assert_eq!((own(&files), found.set_aside), (Vec::new(), Vec::new()));
}

/// Two copies of the superblock name a new manifest before the old one is gone.
#[test]
fn a_copy_of_the_superblock_may_rot_right_behind_a_checkpoint() {
    let story = story();
    let files = story.at(story.trace.len());
    files.poke(MANIFEST, edits(&files).pop().unwrap().0 + 4096, &noise(3, 4096));
    let before = files.snapshot();
    let working = before.snapshot();
    drop(place(&working).open().unwrap());
    let trace = working.trace();
    let gone = |event: &Event| matches!(event, Event::Rename(from, _) if from == Path::new(MANIFEST));
    let replaced = trace.iter().position(gone).unwrap() + 2;
    let files = before.replayed(&trace[..replaced]).snapshot();
    for copy in 0..4 {
        let rotten = files.snapshot();
        rotten.poke(SUPERBLOCK, copy * 4096 + 60, &[0xa5; 16]);
        assert!(!story.judge(&rotten, &format!("copy {copy}")), "copy {copy} alone knew the manifest");
    }
}

/// An edit that contradicts what is there is refused, and that is all.
#[test]
fn an_edit_that_is_refused_changes_nothing_and_stops_nothing() {
    let files = MemoryFiles::default();
    files.put("/datastore/disk", &noise(9, SECTORS as usize * 512));
    let mut lab = place(&files).create().unwrap();
    let before = lab.journal.shape().clone();
    let (disk, cause) = (id(0), Text::new("stale"));
    let added = DiskAdded { disk: id(1), machine: [7; 16], size_sectors: 64, time: NOW };
    let (first, last, start, end) = (7, 9, 0, 1);
    let stale = ImagesDamaged { disk, first, last, start, end, since: 0, time: NOW, cause };
    let refused = lab.journal.edit(&[Edit::DiskAdded(added), Edit::ImagesDamaged(stale)], NOW).err().unwrap();
    assert!(refused.to_string().contains("no such run"), "{refused}");
    assert_eq!(*lab.journal.shape(), before);
    lab.journal.edit(&[Edit::DiskAdded(added)], NOW).unwrap();
    let after = lab.journal.shape().clone();
    drop(lab);
    assert_eq!(*place(&files).open().unwrap().journal.shape(), after);
}

/// What is refused is as it was, though the superblock was cut behind its second copy.
#[test]
fn a_manifest_that_lost_edits_is_refused_before_a_cut_superblock_gets_its_length_back() {
    let story = story();
    let (before, files) = (story.at(story.told[story.told.len() / 2]), story.at(story.trace.len()));
    for path in [SUPERBLOCK, MANIFEST] {
        files.poke(path, 0, &before.bytes(path));
    }
    files.opener().resize(Path::new(SUPERBLOCK), 2 * 4096).unwrap();
    let happened = files.happened();
    let error = place(&files).open().err().expect("edits are gone").to_string();
    assert!(error.contains("it lost edits"), "{error}");
    assert_eq!(files.happened(), happened, "something was changed");
    // One that lost nothing goes on.
    let files = story.at(story.trace.len());
    files.opener().resize(Path::new(SUPERBLOCK), 2 * 4096).unwrap();
    drop(place(&files).open().unwrap());
    assert_eq!(files.bytes(SUPERBLOCK).len(), 4 * 4096);
}

/// Rot in superblock or manifest is found while the journal is in use, and what is known in memory is written anew.
#[test]
fn rot_of_superblock_or_manifest_is_healed_while_the_journal_is_open() {
    let story = story();
    let image = story.at(story.trace.len());
    let newest = edits(&image).pop().unwrap().0;
    for (path, offset) in [
        (SUPERBLOCK, 40),
        (SUPERBLOCK, 3 * 4096 + 40),
        (MANIFEST, 20),
        (MANIFEST, 4096 + 70),
        (MANIFEST, newest + 9),
        (MANIFEST, newest + 4096),
    ] {
        let files = image.snapshot();
        let mut lab = place(&files).open().unwrap();
        let happened = files.happened();
        assert!(check_own(&files, Path::new("/retention")).is_empty());
        assert_eq!(lab.journal.heal_own(NOW).unwrap(), []);
        assert_eq!(files.happened(), happened, "nothing is written without need");
        let shape = lab.journal.shape().clone();
        files.poke(path, offset, &noise(5, 16));
        assert!(!check_own(&files, Path::new("/retention")).is_empty(), "{path}, {offset}");
        assert!(!lab.journal.heal_own(NOW).unwrap().is_empty(), "{path}, {offset}");
        assert!(check_own(&files, Path::new("/retention")).is_empty(), "{path}, {offset}");
        lab.write(0, 0, 8, 99).and_then(|_| lab.commit()).unwrap();
        drop(lab);
        let lab = place(&files).open().unwrap();
        assert_eq!(lab.journal.shape().disks, shape.disks);
        drop(lab);
        assert!(!story.judge(&files, "healed"));
    }
}

/// The index of a segment is read, too.
#[test]
fn a_damaged_index_of_a_segment_is_found() {
    let story = story();
    let files = story.at(story.trace.len());
    let lab = place(&files).open().unwrap();
    let mut found = 0;
    for index in lab.journal.index_places() {
        assert_eq!(check_index(&files, &index).unwrap(), None);
        let end = files.facts(&index.path).unwrap().unwrap().size_bytes;
        files.poke(&index.path, end - 4096 + 8, &[0xa5; 8]);
        found += u32::from(check_index(&files, &index).unwrap().is_some());
    }
    assert!(found > 0);
}

/// Found by `journal_crash.rs`: a start that ended while it wrote the manifest anew left one that the next start writes over,
/// and moved aside then, although it counted.
#[test]
fn a_start_behind_a_torn_end_may_be_cut_off_anywhere() {
    let story = story();
    let before = story.at(story.trace.len());
    before.poke(MANIFEST, edits(&before).pop().unwrap().0 + 4096, &noise(3, 4096));
    let shape = place(&before.snapshot()).open().unwrap().journal.shape().clone();
    let working = before.snapshot();
    drop(place(&working).open().unwrap());
    let trace = working.trace();
    for events in 0..=trace.len() {
        for all in [false, true] {
            let files = before.crashed(&trace, events, || all);
            for start in 0..2 {
                let lab = place(&files).open().unwrap();
                assert_eq!(lab.journal.shape().disks, shape.disks, "{events}, {all}, start {start}");
                assert_eq!(lab.found.set_aside, Vec::<PathBuf>::new(), "{events}, {all}, start {start}");
            }
        }
    }
}
