//! Disks that grow: contents, crashes at every step, what is refused.

use std::collections::BTreeMap;

use super::*;
use crate::io::ReadAt;
use crate::store::files::memory::MemoryFiles;
use crate::store::vmdk::{CreateSpec, TargetFile, create_vmdk};

const PATH: &str = "/d/disk.vmdk";
/// Not whole grains, and a part of a table.
const OLD: u64 = (3 << 20) + 512 * 5;
/// Several tables more.
const NEW: u64 = (170 << 20) + 512 * 9;
/// Behind the border of two files of a split disk.
const FAR: u64 = (2047 << 20) + (40 << 20);

fn made(kind: VmdkKind, size: u64) -> MemoryFiles {
    let files = MemoryFiles::default();
    create_vmdk(&files.opener(), Path::new(PATH), &CreateSpec::new(kind, size)).unwrap();
    files
}

fn open(files: &MemoryFiles) -> Box<dyn TargetFile> {
    let opened = open_vmdk(&files.opener(), Path::new(PATH), true).unwrap();
    assert!(opened.repair.is_nothing(), "{:?}", opened.repair);
    opened.file
}

fn grow(files: &MemoryFiles, size: u64) -> Result<(), TargetError> {
    grow_vmdk(&files.opener(), Path::new(PATH), size)
}

fn pattern(offset: u64) -> Vec<u8> {
    (offset / 512 + 1).to_le_bytes().repeat(64)
}

fn write(file: &mut dyn TargetFile, offsets: &[u64]) {
    for offset in offsets {
        file.write(&[WriteAt { offset: *offset, data: &pattern(*offset) }]).unwrap();
    }
}

/// Each of these sectors holds its pattern, and what is not among them zeros.
fn expect(file: &mut dyn TargetFile, written: &[u64], zeros: &[u64]) {
    let empty = vec![0; 512];
    let expected: BTreeMap<u64, Vec<u8>> = written
        .iter()
        .map(|offset| (*offset, pattern(*offset)))
        .chain(zeros.iter().map(|offset| (*offset, empty.clone())))
        .collect();
    for (offset, expected) in expected {
        let mut data = vec![0xee; 512];
        file.read(&mut [ReadAt { offset, data: &mut data }]).unwrap();
        assert!(data == expected, "sector at {offset}: {:?}", &data[..16]);
    }
}

#[test]
fn every_kind_grows_twice_keeps_its_content_and_reads_as_zeros_behind_its_old_end() {
    for kind in VmdkKind::ALL {
        let files = made(kind, OLD);
        let mut file = open(&files);
        let mut written = vec![0, 512 * 77, 1 << 20, OLD - 512];
        write(&mut *file, &written);
        file.close().unwrap();
        for (size, old) in [(NEW, OLD), (if kind.is_split() { FAR } else { NEW + (64 << 20) }, NEW)] {
            let before = check_vmdk(&files, Path::new(PATH)).unwrap().descriptor;
            grow(&files, size).unwrap();
            let after = check_vmdk(&files, Path::new(PATH)).unwrap().descriptor;
            assert_eq!(after.sectors() * SECTOR_BYTES, size, "{kind:?}");
            assert_eq!((after.uuid(), after.cid()), (before.uuid(), before.cid()));
            let heads = after.get("ddb.geometry.heads").unwrap().parse::<u64>().unwrap();
            let track = after.get("ddb.geometry.sectors").unwrap().parse::<u64>().unwrap();
            let cylinders = after.get("ddb.geometry.cylinders").unwrap().parse::<u64>().unwrap();
            assert_eq!(cylinders, size / 512 / (heads * track), "{kind:?}");
            let mut file = open(&files);
            assert_eq!(file.size_bytes(), size);
            expect(&mut *file, &written, &[old, old + 512, old + (32 << 20), size - 512]);
            let more = [old, old + (33 << 20), size - 512];
            write(&mut *file, &more);
            written.extend(more);
            file.close().unwrap();
            expect(&mut *open(&files), &written, &[512 * 3, old + 512]);
        }
        grow(&files, check_vmdk(&files, Path::new(PATH)).unwrap().descriptor.sectors() * 512).unwrap();
    }
}

/// A crash anywhere in it leaves a disk of the old or the new size with its content, which can be grown again.
#[test]
fn a_growth_that_ends_anywhere_leaves_the_old_or_the_new_disk() {
    for kind in VmdkKind::ALL {
        for new in [OLD + 512, NEW, FAR] {
            let files = made(kind, OLD);
            let mut file = open(&files);
            let written = [0, 1 << 20, OLD - 512];
            write(&mut *file, &written);
            file.close().unwrap();
            let before = files.snapshot();
            let growing = before.snapshot();
            grow(&growing, new).unwrap();
            let trace = growing.trace();
            let mut sizes = BTreeMap::new();
            for events in 0..=trace.len() {
                for seed in 1..8_u64 {
                    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    let after = before.crashed(&trace, events, || {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state >> 33 & 1 == 1
                    });
                    let mut file = open(&after);
                    let size = file.size_bytes();
                    assert!([OLD, new].contains(&size), "{kind:?} after {events} events: {size}");
                    *sizes.entry(size).or_insert(0) += 1;
                    expect(&mut *file, &written, &[512, OLD - 1024]);
                    file.close().unwrap();
                    grow(&after, new).unwrap();
                    let mut file = open(&after);
                    expect(&mut *file, &written, &[512, OLD, new - 512]);
                    write(&mut *file, &[new - 512]);
                    file.close().unwrap();
                    expect(&mut *open(&after), &[new - 512], &[]);
                }
            }
            assert_eq!(sizes.len(), 2, "{kind:?}: both were seen: {sizes:?}");
        }
    }
}

#[test]
fn what_cannot_grow_is_refused_and_left_as_it_was() {
    let files = made(VmdkKind::MonolithicSparse, OLD);
    let before = files.bytes(PATH);
    for (size, word) in
        [(OLD - 512, "never made smaller"), (OLD + 100, "whole sectors"), (3 << 40, "ends at 2 TiB")]
    {
        let error = grow(&files, size).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let mut file = open(&files);
    write(&mut *file, &[0]);
    drop(file); // as a crash
    let error = grow(&files, NEW).unwrap_err().to_string();
    assert!(error.contains("not closed in order"), "{error}");
    assert_eq!(check_vmdk(&files, Path::new(PATH)).unwrap().descriptor.sectors() * 512, OLD);
    assert_eq!(before[12..20], files.bytes(PATH)[12..20], "the capacity in the header");
    files.put("/d/disk.vmdk.lck", b"");
    assert!(matches!(grow(&files, NEW), Err(TargetError::InUse { .. })));
}

#[test]
fn what_an_interrupted_growth_or_somebody_else_left_is_never_taken_for_content() {
    for kind in [VmdkKind::Vmfs, VmdkKind::TwoGbMaxExtentFlat] {
        let files = made(kind, OLD);
        let flat = if kind == VmdkKind::Vmfs { "/d/disk-flat.vmdk" } else { "/d/disk-f001.vmdk" };
        let mut bytes = files.bytes(flat);
        bytes.extend([7; 8192]);
        files.put(flat, &bytes);
        files.put("/d/disk-f002.vmdk", b"not ours");
        grow(&files, FAR).unwrap();
        let mut file = open(&files);
        expect(&mut *file, &[], &[OLD, OLD + 512, FAR - 512]);
        assert_eq!(files.bytes("/d/disk-f002.vmdk"), b"not ours");
    }
}
