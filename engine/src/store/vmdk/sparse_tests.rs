//! Tests of sparse and flat disks on memory files: contents, the number of flushes, crashes, repair.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::io::{ByteRange, ReadAt, WriteAt};
use crate::store::files::Files;
use crate::store::files::memory::{Event, MemoryFiles};

const PATH: &str = "/d/disk.vmdk";
const GRAIN: u64 = 64 << 10;

fn make(kind: VmdkKind, size: u64) -> MemoryFiles {
    let files = MemoryFiles::default();
    create_vmdk(&files.opener(), Path::new(PATH), &CreateSpec::new(kind, size)).unwrap();
    files
}

fn open(files: &MemoryFiles) -> Box<dyn TargetFile> {
    open_vmdk(&files.opener(), Path::new(PATH), true).unwrap().file
}

fn cid(files: &MemoryFiles) -> u32 {
    open::check_vmdk(files, Path::new(PATH)).unwrap().descriptor.cid()
}

fn read(file: &mut dyn BlockFile, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    file.read(&mut [ReadAt { offset, data: &mut data }]).unwrap();
    data
}

fn flushes(trace: &[Event]) -> usize {
    trace.iter().filter(|event| matches!(event, Event::Flush(_))).count()
}

fn writes(trace: &[Event]) -> Vec<(u64, usize)> {
    let place = |event: &Event| match event {
        Event::Write { offset, data, .. } => Some((*offset, data.len())),
        _ => None,
    };
    trace.iter().filter_map(place).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Flush,
    Reopen,
}

fn op(sectors: u64) -> impl Strategy<Value = Op> {
    let run = (0..sectors, 1_u64..600).prop_map(move |(start, len)| (start, len.min(sectors - start)));
    prop_oneof![
        6 => (run.clone(), 0_u8..5).prop_map(|((start, len), fill)| Op::Write(start, len, fill)),
        1 => run.prop_map(|(start, len)| Op::Zero(start, len)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

fn any_kind() -> impl Strategy<Value = VmdkKind> {
    proptest::sample::select(&VmdkKind::ALL[..])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_kind_reads_what_was_written(kind in any_kind(), ops in proptest::collection::vec(op(3001), 1..25)) {
        let size = 3001 * 512;
        let files = make(kind, size);
        let mut file = open(&files);
        let mut model = vec![0_u8; size as usize];
        for op in ops {
            match op {
                Op::Write(start, len, fill) => {
                    let (from, to) = ((start * 512) as usize, ((start + len) * 512) as usize);
                    // Uneven content, so that misplaced sectors show; 0 stays all zeros.
                    for (at, byte) in model[from..to].iter_mut().enumerate() {
                        *byte = fill.wrapping_mul((at / 512) as u8 | 1);
                    }
                    file.write(&[WriteAt { offset: start * 512, data: &model[from..to] }]).unwrap();
                }
                Op::Zero(start, len) => {
                    model[(start * 512) as usize..((start + len) * 512) as usize].fill(0);
                    file.zero(ByteRange { start: start * 512, end: (start + len) * 512 }).unwrap();
                }
                Op::Flush => file.flush().unwrap(),
                Op::Reopen => {
                    file.close().unwrap();
                    file = open(&files);
                }
            }
            prop_assert!(read(&mut *file, 0, model.len()) == model, "contents differ");
        }
        let whole = ByteRange { start: 0, end: size };
        let allocated = file.allocated(whole).unwrap();
        prop_assert!(allocated.windows(2).all(|pair| pair[0].end < pair[1].start));
        for (at, byte) in (0_u64..).zip(&model) {
            prop_assert!(*byte == 0 || allocated.iter().any(|r| r.start <= at && at < r.end), "byte {} is lost", at);
        }
        file.close().unwrap();
        let opened = open_vmdk(&files.opener(), Path::new(PATH), false).unwrap();
        prop_assert!(opened.repair.is_nothing());
    }

    /// Power loss at any point: flushed data is there, unflushed data is old or new, and no sector ever shows
    /// what belongs to another place.
    #[test]
    fn power_loss_at_any_point_shows_only_old_or_new(
        split in any::<bool>(), steps in proptest::collection::vec((0_u64..2000, 1_u64..300, 0_u8..4), 1..14),
        cut in 0.0_f64..=1.0, seed in any::<u64>(), without_tables in any::<bool>())
    {
        let kind = if split { VmdkKind::TwoGbMaxExtentSparse } else { VmdkKind::MonolithicSparse };
        let workload = Workload::run(kind, &steps, without_tables);
        workload.crash((workload.trace.len() as f64 * cut) as usize, seed)?;
    }
}

/// The 512 bytes a sector holds after its `version`-th write.
fn sector(at: u64, version: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (chunk, value) in bytes.chunks_exact_mut(16).zip(std::iter::repeat((at + 1, version))) {
        chunk[..8].copy_from_slice(&value.0.to_le_bytes());
        chunk[8..].copy_from_slice(&value.1.to_le_bytes());
    }
    bytes
}

/// Sectors of the disk that crashes.
const CRASH_SECTORS: u64 = 2500;

/// A disk that was written with everything remembered, to be crashed at any point.
struct Workload {
    before: MemoryFiles,
    trace: Vec<Event>,
    /// Of each write: length of the trace when it was done, first sector, sectors, version.
    done: Vec<(usize, u64, u64, u64)>,
    /// Lengths of the trace when flushes were done.
    flushed: Vec<usize>,
}

impl Workload {
    /// Steps: first sector, sectors, and 0 for a flush behind it.
    fn run(kind: VmdkKind, steps: &[(u64, u64, u8)], without_tables: bool) -> Self {
        let files = make(kind, CRASH_SECTORS * 512);
        if without_tables {
            drop_tables(&files, kind);
        }
        // Behind the used part stands what an earlier crash left there: it must never be seen.
        let name = if kind.is_split() { "/d/disk-s001.vmdk" } else { PATH };
        let mut bytes = files.bytes(name);
        bytes.extend((0..2 * CRASH_SECTORS).flat_map(|at| sector(1 << 20 | at, 777)));
        files.put(name, &bytes);
        let before = files.snapshot();
        let files = before.snapshot(); // with a trace that begins here
        let mut file = open(&files);
        let (mut done, mut flushed) = (Vec::new(), Vec::new());
        for (version, (start, len, kind)) in (1_u64..).zip(steps) {
            let data: Vec<u8> = (*start..start + len).flat_map(|at| sector(at, version)).collect();
            file.write(&[WriteAt { offset: start * 512, data: &data }]).unwrap();
            done.push((files.trace().len(), *start, *len, version));
            if *kind == 0 {
                file.flush().unwrap();
                flushed.push(files.trace().len());
            }
        }
        file.close().unwrap();
        Self { before, trace: files.trace(), done, flushed }
    }

    /// Power loss after so many events; opens, repairs, checks, writes on, closes, and checks again.
    fn crash(&self, events: usize, seed: u64) -> Result<(), TestCaseError> {
        // xorshift: which sectors land must be reproducible from the seed alone. Its low bits choose how many land.
        let (mut state, often) = (seed | 1, seed % 4);
        let after = self.before.crashed(&self.trace, events, || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 32 & 3 < often + 1
        });
        let durable_before = self.flushed.iter().copied().filter(|at| *at <= events).max().unwrap_or(0);
        let mut rewritten = None;
        for round in 0..3 {
            let OpenedVmdk { mut file, repair, .. } =
                open_vmdk(&after.opener(), Path::new(PATH), true).unwrap();
            prop_assert!(repair.dropped.is_empty(), "our own order never leaves a grain to drop: {repair:?}");
            let found = read(&mut *file, 0, (CRASH_SECTORS * 512) as usize);
            for (at, found) in (0..CRASH_SECTORS).zip(found.chunks_exact(512)) {
                let mut allowed = vec![[0; 512]];
                for (end, start, len, version) in &self.done {
                    if !(*start..start + len).contains(&at) {
                        continue;
                    }
                    if *end <= durable_before {
                        allowed.clear();
                    }
                    allowed.push(sector(at, *version));
                }
                if rewritten.is_some_and(|(start, len): (u64, u64)| (start..start + len).contains(&at)) {
                    allowed = vec![sector(at, 999)];
                }
                prop_assert!(
                    allowed.iter().any(|a| a == found),
                    "sector {at} in round {round} after {events} events, seed {seed}: {:?}",
                    &found[..16]
                );
            }
            // Later rounds: what is written after the repair reads back, the rest stays, and the disk is clean.
            let again = (700, 400);
            let data: Vec<u8> = (again.0..again.0 + again.1).flat_map(|at| sector(at, 999)).collect();
            file.write(&[WriteAt { offset: again.0 * 512, data: &data }]).unwrap();
            rewritten = Some(again);
            file.close().unwrap();
            prop_assert!(open_vmdk(&after.opener(), Path::new(PATH), false).unwrap().repair.is_nothing());
        }
        Ok(())
    }
}

#[test]
fn power_loss_at_every_point_of_a_long_run_shows_only_old_or_new() {
    // New grains, overwrites, partial grains, runs across grains; 0 flushes.
    let steps =
        [(0, 200, 1), (130, 10, 0), (1000, 300, 1), (5, 3, 1), (1010, 2, 0), (2000, 500, 0), (600, 700, 2)];
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::TwoGbMaxExtentSparse] {
        for without_tables in [false, true] {
            let workload = Workload::run(kind, &steps, without_tables);
            for events in 0..=workload.trace.len() {
                for seed in 0..12_u64 {
                    workload.crash(events, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed).unwrap();
                }
            }
        }
    }
}

/// Makes the directories of a fresh disk empty, as some writers leave them until a table is needed.
fn drop_tables(files: &MemoryFiles, kind: VmdkKind) {
    let name = if kind.is_split() { "/d/disk-s001.vmdk" } else { PATH };
    let mut bytes = files.bytes(name);
    let header = crate::format::vmdk::sparse::SparseHeader::decode(&bytes).unwrap();
    let crate::format::vmdk::sparse::Directory::At(directory) = header.directory else {
        panic!("no directory")
    };
    for at in [directory, header.redundant_directory.unwrap()] {
        bytes[(at * 512) as usize..][..512].fill(0);
    }
    files.put(name, &bytes);
}

#[test]
fn thousands_of_grains_cost_two_flushes_and_one_big_write() {
    let files = make(VmdkKind::MonolithicSparse, 4096 * GRAIN);
    let mut file = open(&files);
    file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
    file.flush().unwrap();
    let (before, reads) = (files.trace().len(), files.reads());
    let data: Vec<u8> = (0..1500 * GRAIN).map(|at| (at / 511) as u8 | 1).collect();
    file.write(&[WriteAt { offset: GRAIN, data: &data }]).unwrap();
    let trace = files.trace();
    assert_eq!(writes(&trace[before..]).iter().map(|w| w.1).collect::<Vec<_>>(), [data.len()]);
    file.flush().unwrap();
    assert_eq!(flushes(&files.trace()[before..]), 2);
    assert!(writes(&files.trace()[before..]).len() <= 3, "both copies are one write each");
    assert_eq!(files.reads(), reads, "no write reads");
    assert!(read(&mut *file, GRAIN, data.len()) == data);
    assert_eq!(files.reads(), reads + 1, "adjacent grains are one read");
}

#[test]
fn small_writes_into_new_grains_are_gathered() {
    let files = make(VmdkKind::MonolithicSparse, 64 * GRAIN);
    let mut file = open(&files);
    file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
    let before = files.trace().len();
    let data: Vec<[u8; 4096]> = (0..32).map(|n| [n + 1; 4096]).collect();
    let pieces: Vec<_> =
        (0_u64..).zip(&data).map(|(n, data)| WriteAt { offset: GRAIN + n * 4096, data }).collect();
    file.write(&pieces).unwrap();
    assert_eq!(writes(&files.trace()[before..]).iter().map(|w| w.1 as u64).collect::<Vec<_>>(), [2 * GRAIN]);
    for (n, data) in (0_u64..).zip(&data) {
        assert_eq!(read(&mut *file, GRAIN + n * 4096, 4096), data);
    }
}

#[test]
fn zeros_leave_holes_and_clean_files_are_short() {
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::TwoGbMaxExtentSparse] {
        let files = make(kind, 1 << 30);
        let name = if kind.is_split() { "/d/disk-s001.vmdk" } else { PATH };
        let fresh = files.bytes(name).len() as u64;
        let mut file = open(&files);
        file.write(&[WriteAt { offset: 5 * GRAIN, data: &[0; 3 * GRAIN as usize] }]).unwrap();
        file.zero(ByteRange { start: 0, end: 1 << 30 }).unwrap();
        assert_eq!(file.allocated(ByteRange { start: 0, end: 1 << 30 }).unwrap(), []);
        file.write(&[WriteAt { offset: 7 * GRAIN + 512, data: &[9; 512] }]).unwrap();
        assert_eq!(
            file.allocated(ByteRange { start: 0, end: 1 << 30 }).unwrap(),
            [ByteRange { start: 7 * GRAIN, end: 8 * GRAIN }]
        );
        file.close().unwrap();
        assert_eq!(files.bytes(name).len() as u64, fresh + GRAIN);
    }
}

#[test]
fn the_content_identity_changes_at_the_first_write_and_not_before() {
    for kind in VmdkKind::ALL {
        let files = make(kind, 1 << 20);
        let first = cid(&files);
        let mut file = open(&files);
        read(&mut *file, 0, 512);
        file.flush().unwrap();
        file.close().unwrap();
        assert_eq!(cid(&files), first, "{kind:?}");
        let mut file = open(&files);
        file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
        let second = cid(&files);
        assert_ne!(second, first, "{kind:?}");
        file.write(&[WriteAt { offset: 512, data: &[1; 512] }]).unwrap();
        file.close().unwrap();
        assert_eq!(cid(&files), second, "{kind:?}");
    }
}

#[test]
fn a_disk_opened_for_reading_is_not_changed_by_anything() {
    for kind in VmdkKind::ALL {
        let files = make(kind, 1 << 20);
        let mut file = open_vmdk(&files.opener(), Path::new(PATH), false).unwrap().file;
        let before = files.trace().len();
        assert!(file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).is_err());
        file.close().unwrap();
        assert!(files.trace()[before..].iter().all(|event| matches!(event, Event::Flush(_))), "{kind:?}");
    }
}

#[test]
fn a_full_medium_leaves_the_disk_as_it_was_and_usable() {
    let files = make(VmdkKind::MonolithicSparse, 64 * GRAIN);
    let mut file = open(&files);
    file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
    file.flush().unwrap();
    files.set_room(Some(GRAIN));
    let error = file.write(&[WriteAt { offset: GRAIN, data: &[2; 2 * GRAIN as usize] }]).unwrap_err();
    assert!(error.is_full());
    assert!(read(&mut *file, GRAIN, 2 * GRAIN as usize).iter().all(|byte| *byte == 0));
    files.set_room(None);
    file.write(&[WriteAt { offset: GRAIN, data: &[3; 2 * GRAIN as usize] }]).unwrap();
    file.close().unwrap();
    assert_eq!(read(&mut *open(&files), GRAIN, 512), [3; 512]);
}

/// Changes the entry of a grain in one or both copies of the first table.
fn set_entry(files: &MemoryFiles, grain: usize, primary: Option<u32>, redundant: Option<u32>, unclean: bool) {
    let mut bytes = files.bytes(PATH);
    let mut header = crate::format::vmdk::sparse::SparseHeader::decode(&bytes).unwrap();
    let crate::format::vmdk::sparse::Directory::At(directory) = header.directory else {
        panic!("no directory")
    };
    for (at, value) in [(directory, primary), (header.redundant_directory.unwrap(), redundant)] {
        let at = (at * 512) as usize;
        let table = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize * 512;
        if let Some(value) = value {
            bytes[table + grain * 4..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
    header.unclean = unclean;
    bytes[..512].copy_from_slice(&header.encode());
    files.put(PATH, &bytes);
}

fn with_grains(count: u64) -> (MemoryFiles, u32) {
    let files = make(VmdkKind::MonolithicSparse, 64 * GRAIN);
    let mut file = open(&files);
    for grain in 0..count {
        file.write(&[WriteAt { offset: grain * GRAIN, data: &[grain as u8 + 1; GRAIN as usize] }]).unwrap();
    }
    file.close().unwrap();
    let bytes = files.bytes(PATH);
    (files, crate::format::vmdk::sparse::SparseHeader::decode(&bytes).unwrap().overhead as u32)
}

#[test]
fn of_two_differing_copies_the_usable_one_is_kept() {
    for (primary, redundant) in [(Some(0), None), (None, Some(0)), (Some(u32::MAX), None), (None, Some(3))] {
        let (files, _) = with_grains(3);
        set_entry(&files, 1, primary, redundant, false);
        let mut opened = open_vmdk(&files.opener(), Path::new(PATH), true).unwrap();
        assert_eq!((opened.repair.differing, opened.repair.dropped.is_empty()), (1, true));
        assert_eq!(read(&mut *opened.file, GRAIN, 512), [2; 512]);
        opened.file.write(&[WriteAt { offset: 9 * GRAIN, data: &[9; 512] }]).unwrap();
        opened.file.close().unwrap();
        assert!(open_vmdk(&files.opener(), Path::new(PATH), false).unwrap().repair.is_nothing());
    }
}

#[test]
fn a_doubly_referenced_copy_yields_to_the_other() {
    let (files, overhead) = with_grains(3);
    set_entry(&files, 5, Some(overhead), None, false); // claims grain 0's place; the redundant copy says hole
    let mut opened = open_vmdk(&files.opener(), Path::new(PATH), true).unwrap();
    assert_eq!(opened.repair.differing, 1);
    assert_eq!(opened.repair.dropped.iter().map(|r| r.start).collect::<Vec<_>>(), [5 * 128]);
    assert_eq!(read(&mut *opened.file, 5 * GRAIN, 512), [0; 512]);
    assert_eq!(read(&mut *opened.file, 0, 512), [1; 512]);
}

#[test]
fn damage_in_both_copies_is_named_after_a_crash_and_refused_without_one() {
    for (entry, crashed) in [(u32::MAX - 5, true), (u32::MAX - 5, false), (0, true), (0, false)] {
        let (files, overhead) = with_grains(3);
        let entry = if entry == 0 { overhead } else { entry };
        set_entry(&files, 2, Some(entry), Some(entry), crashed);
        let opened = open_vmdk(&files.opener(), Path::new(PATH), true);
        if crashed {
            let repair = opened.unwrap().repair;
            assert!(repair.dropped.overlap(crate::units::SectorRange::new(256, 257)).next().is_some());
        } else {
            assert!(matches!(opened, Err(TargetError::Damaged { .. })), "{opened:?}");
        }
    }
}

#[test]
fn the_unclean_flag_stands_while_a_disk_is_written_and_goes_when_it_is_closed() {
    let files = make(VmdkKind::MonolithicSparse, 64 * GRAIN);
    let flag = |files: &MemoryFiles| files.bytes(PATH)[72];
    let mut file = open(&files);
    assert_eq!(flag(&files), 0);
    file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
    assert_eq!(flag(&files), 1);
    drop(file);
    assert_eq!(flag(&files), 1, "dropping is crashing");
    let opened = open_vmdk(&files.opener(), Path::new(PATH), true).unwrap();
    assert!(opened.repair.unclean);
    opened.file.close().unwrap();
    assert_eq!(flag(&files), 0, "repaired and closed is clean even without a write");
}

#[test]
fn files_of_many_flat_extents_are_one_disk() {
    let size = 5 << 30;
    let files = make(VmdkKind::TwoGbMaxExtentFlat, size);
    let mut file = open(&files);
    let border = crate::format::vmdk::descriptor::SPLIT_EXTENT_SECTORS * 512;
    let data: Vec<u8> = (0..8192).map(|at| (at / 30) as u8).collect();
    file.write(&[WriteAt { offset: border - 4096, data: &data }]).unwrap();
    assert_eq!(read(&mut *file, border - 4096, 8192), data);
    assert_eq!(file.size_bytes(), size);
    assert!(file.write(&[WriteAt { offset: size - 512, data: &[1; 1024] }]).is_err());
    assert_eq!(read(&mut *file, size - 512, 512), [0; 512]);
    let opener: Arc<dyn Files> = files.opener();
    assert!(matches!(open_vmdk(&opener, Path::new(PATH), true), Err(TargetError::InUse { .. })));
}
