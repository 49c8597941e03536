//! Every file backend behaves as the memory backend does, on real files and real block devices.
//!
//! Loop devices and mounts need root; where they cannot be had, the test says `SKIPPED` on standard error.
#![cfg(feature = "uring")]

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use reprotect_engine::io::buffer::BufferArena;
use reprotect_engine::io::file::DirectFile;
use reprotect_engine::io::memory::MemoryFile;
use reprotect_engine::io::uring::{UringFile, probe};
use reprotect_engine::io::{self, BlockError, BlockFile, BlockOp, ByteRange, OpenOptions, ReadAt, WriteAt};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

type Open = fn(&Path, &OpenOptions) -> Result<Box<dyn BlockFile>, BlockError>;

fn by_threads(path: &Path, options: &OpenOptions) -> Result<Box<dyn BlockFile>, BlockError> {
    Ok(Box::new(DirectFile::open(path, options)?))
}

fn by_uring(path: &Path, options: &OpenOptions) -> Result<Box<dyn BlockFile>, BlockError> {
    Ok(Box::new(UringFile::open(path, options)?))
}

/// The backends this host can run.
fn backends() -> Vec<(&'static str, Open)> {
    let mut all: Vec<(&'static str, Open)> = vec![("threads", by_threads)];
    match probe() {
        Ok(()) => all.push(("uring", by_uring)),
        Err(error) => eprintln!("SKIPPED: io_uring is not permitted here: {error}"),
    }
    all
}

fn writing() -> OpenOptions {
    OpenOptions { write: true, ..OpenOptions::default() }
}

fn sparse_file(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).expect("create").set_len(bytes).expect("set length");
    path
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path, more: &[&str]) -> Option<Self> {
        let file = file.to_str().expect("UTF-8 path");
        match run("losetup", &[&["--find", "--show"], more, &[file]].concat()) {
            Ok(device) => Some(Self(PathBuf::from(device))),
            Err(reason) => {
                eprintln!("SKIPPED: no loop devices here: {reason}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", self.0.to_str().expect("UTF-8 path")]);
    }
}

/// A small tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().to_str().expect("UTF-8 path").to_owned();
        match run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "reprotect-test", &target]) {
            Ok(_) => Some(Self(dir)),
            Err(reason) => {
                eprintln!("SKIPPED: cannot mount here: {reason}");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = run("umount", &[self.0.path().to_str().expect("UTF-8 path")]);
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Offset, length, fill; ranges that overlap an earlier one of the batch are left out.
    Write(Vec<(u64, u64, u8)>),
    Read(Vec<(u64, u64)>),
    Zero(u64, u64),
    Flush,
}

/// Ranges of every kind: blocks, sectors, and odd bytes where the medium has them.
fn range(unit: u64) -> impl Strategy<Value = (u64, u64)> {
    let small = (0..SIZE / unit, 0..40_u64).prop_map(move |(at, len)| (at * unit, len * unit));
    let blocks = (0..SIZE / 4096, 0..500_u64).prop_map(|(at, len)| (at * 4096, len * 4096));
    let big = (0..SIZE / unit, 0..3 * MIB / unit).prop_map(move |(at, len)| (at * unit, len * unit));
    prop_oneof![4 => small, 3 => blocks, 1 => big].prop_map(|(at, len)| (at, len.min(SIZE - at)))
}

fn op(unit: u64) -> impl Strategy<Value = Op> {
    let writes = proptest::collection::vec((range(unit), 1..=255_u8), 1..6)
        .prop_map(|all| Op::Write(all.into_iter().map(|((at, len), fill)| (at, len, fill)).collect()));
    let reads = proptest::collection::vec(range(unit), 1..6).prop_map(Op::Read);
    let zero = range(unit).prop_map(|(at, len)| Op::Zero(at, at + len));
    prop_oneof![5 => writes, 3 => reads, 2 => zero, 1 => Just(Op::Flush)]
}

/// Bytes at an address that is `shift` off every alignment.
fn shifted(len: u64, shift: usize, fill: u8) -> Vec<u8> {
    let mut data: Vec<u8> = (0..shift + len as usize).map(|at| fill ^ (at / 97) as u8).collect();
    data[..shift].fill(0);
    data
}

fn apply(file: &mut dyn BlockFile, op: &Op, shift: usize) -> Vec<Vec<u8>> {
    match op {
        Op::Write(all) => {
            let mut taken: Vec<(u64, u64)> = Vec::new();
            let data: Vec<(u64, Vec<u8>)> = all
                .iter()
                .filter(|(at, len, _)| {
                    let free = taken.iter().all(|(start, end)| at + len <= *start || *end <= *at);
                    taken.push((*at, at + len));
                    free
                })
                .map(|(at, len, fill)| (*at, shifted(*len, shift, *fill)))
                .collect();
            let writes: Vec<WriteAt<'_>> =
                data.iter().map(|(offset, data)| WriteAt { offset: *offset, data: &data[shift..] }).collect();
            file.write(&writes).expect("write");
            Vec::new()
        }
        Op::Read(all) => {
            let mut data: Vec<Vec<u8>> = all.iter().map(|(_, len)| shifted(*len, shift, 0x5A)).collect();
            let mut reads: Vec<ReadAt<'_>> = all
                .iter()
                .zip(&mut data)
                .map(|((offset, _), data)| ReadAt { offset: *offset, data: &mut data[shift..] })
                .collect();
            file.read(&mut reads).expect("read");
            data.into_iter().map(|data| data[shift..].to_vec()).collect()
        }
        Op::Zero(start, end) => {
            file.zero(ByteRange { start: *start, end: *end }).expect("zero");
            Vec::new()
        }
        Op::Flush => {
            file.flush().expect("flush");
            Vec::new()
        }
    }
}

fn contents(file: &mut dyn BlockFile) -> Vec<u8> {
    let mut data = vec![0xEE; file.size_bytes() as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut data }]).expect("read all");
    data
}

/// Random operations on `path` and in memory have the same outcome, also for someone who reads the file afterwards.
fn check_against_memory(open: Open, options: &OpenOptions, path: &Path, unit: u64, cases: u32) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let strategy =
        (proptest::collection::vec(op(unit), 1..12), prop_oneof![Just(0_usize), Just(1), Just(512)]);
    TestRunner::new(config)
        .run(&strategy, |(ops, shift)| {
            let mut file = open(path, options).expect("open");
            prop_assert_eq!(file.size_bytes(), SIZE);
            file.zero(ByteRange { start: 0, end: SIZE }).expect("start from zeros");
            let mut model = MemoryFile::new(SIZE);
            for op in &ops {
                prop_assert!(apply(&mut *file, op, shift) == apply(&mut model, op, shift), "after {op:?}");
            }
            let expected = contents(&mut model);
            prop_assert!(contents(&mut *file) == expected, "through the same handle");
            let map = file.allocated(ByteRange { start: 0, end: SIZE }).expect("map");
            let mut covered = vec![false; SIZE as usize];
            for part in map {
                covered[part.start as usize..part.end as usize].fill(true);
            }
            prop_assert!(expected.iter().zip(&covered).all(|(byte, covered)| *byte == 0 || *covered), "map");
            drop(file);
            prop_assert!(std::fs::read(path).expect("read") == expected, "as others see it");
            Ok(())
        })
        .expect("equal to the model");
}

#[test]
fn files_behave_like_memory_direct_and_buffered() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        for direct in [true, false] {
            let path = sparse_file(dir.path(), name, SIZE);
            let options = OpenOptions { direct, queue_depth: 4, ..writing() };
            check_against_memory(open, &options, &path, 1, 24);
        }
    }
}

#[test]
fn a_memory_file_system_behaves_like_memory() {
    let Some(mount) = Tmpfs::mount("16m") else { return };
    for (name, open) in backends() {
        let path = sparse_file(mount.0.path(), name, SIZE);
        check_against_memory(open, &writing(), &path, 1, 12);
        std::fs::remove_file(path).expect("remove");
    }
}

#[test]
fn block_devices_behave_like_memory_for_both_sector_sizes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for sector in ["512", "4096"] {
        let backing = sparse_file(dir.path(), sector, SIZE);
        let Some(device) = Loop::attach(&backing, &["--sector-size", sector]) else { return };
        for (_, open) in backends() {
            check_against_memory(open, &writing(), &device.0, 512, 16);
        }
    }
}

#[test]
fn registered_buffers_carry_a_batch_of_reads_and_writes() {
    if let Err(error) = probe() {
        eprintln!("SKIPPED: io_uring is not permitted here: {error}");
        return;
    }
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = sparse_file(dir.path(), "registered", 16 * MIB);
    let arena = BufferArena::new(6, MIB as usize).expect("arena");
    let options = OpenOptions { arena: Some(arena.clone()), queue_depth: 3, ..writing() };
    let mut file = UringFile::open(&path, &options).expect("open");
    if !file.has_registered_buffers() {
        eprintln!("SKIPPED: the kernel does not pin 6 MiB here (locked-memory limit)");
    }
    for round in 0..3_u8 {
        let mut buffers: Vec<_> = (0..6).map(|_| arena.lease()).collect();
        for (fill, buffer) in (round * 6..).zip(&mut buffers) {
            buffer.fill(fill);
        }
        let writes: Vec<WriteAt<'_>> = buffers
            .iter()
            .enumerate()
            .map(|(at, buffer)| WriteAt { offset: at as u64 * 2 * MIB, data: buffer })
            .collect();
        file.write(&writes).expect("write");
        file.flush().expect("flush");
        for buffer in &mut buffers {
            buffer.fill(0xEE);
        }
        let mut reads: Vec<ReadAt<'_>> = buffers
            .iter_mut()
            .enumerate()
            .map(|(at, buffer)| ReadAt { offset: at as u64 * 2 * MIB, data: buffer })
            .collect();
        file.read(&mut reads).expect("read");
        for (fill, buffer) in (round * 6..).zip(&buffers) {
            assert!(buffer.iter().all(|byte| *byte == fill));
        }
    }
    drop(file);
    assert_eq!(arena.free_slots(), 6);
}

#[test]
fn holes_stay_holes_and_zeroing_makes_them() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        let path = sparse_file(dir.path(), name, 64 * MIB);
        let mut file = open(&path, &writing()).expect("open");
        let whole = ByteRange { start: 0, end: 64 * MIB };
        assert_eq!(file.allocated(whole).expect("map"), [], "{name}");
        file.write(&[WriteAt { offset: 8 * MIB, data: &vec![1; MIB as usize] }]).expect("write");
        file.flush().expect("flush");
        let used = std::fs::metadata(&path).expect("metadata").blocks() * 512;
        assert!((MIB..8 * MIB).contains(&used), "{name}: {used} bytes for one MiB of data");
        let map = file.allocated(whole).expect("map");
        assert_eq!(map, [ByteRange { start: 8 * MIB, end: 9 * MIB }], "{name}");
        let inside = ByteRange { start: 8 * MIB + 4096, end: 8 * MIB + 8192 };
        assert_eq!(file.allocated(inside).expect("map"), [inside], "clipped to the question");
        file.zero(whole).expect("zero");
        assert_eq!(file.allocated(whole).expect("map"), [], "{name}");
        assert_eq!(file.size_bytes(), 64 * MIB);
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), 64 * MIB, "zeroing keeps the size");
    }
}

#[test]
fn a_full_medium_is_named_and_writing_goes_on_when_there_is_room() {
    let Some(mount) = Tmpfs::mount("1m") else { return };
    for (name, open) in backends() {
        let path = sparse_file(mount.0.path(), name, 4 * MIB);
        let mut file = open(&path, &writing()).expect("open");
        let error = file.write(&[WriteAt { offset: 0, data: &vec![1; 2 * MIB as usize] }]).expect_err("full");
        assert!(error.is_full(), "{name}: {error}");
        assert_eq!(error.op, BlockOp::Write);
        assert!(error.to_string().contains(path.to_str().expect("UTF-8 path")));
        file.zero(ByteRange { start: 0, end: 4 * MIB }).expect("make room");
        file.write(&[WriteAt { offset: MIB, data: &[2; 4096] }]).expect("room again");
        file.flush().expect("flush");
        drop(file);
        std::fs::remove_file(path).expect("remove");
    }
}

fn assert_busy(result: Result<Box<dyn BlockFile>, BlockError>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{what}: a second exclusive open succeeded"));
    assert_eq!(error.source.kind(), ErrorKind::ResourceBusy, "{what}: {error}");
    assert!(error.to_string().contains("in use by another process or mounted"), "{error}");
}

#[test]
fn a_second_exclusive_open_is_refused_until_the_first_is_gone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        let path = sparse_file(dir.path(), name, SIZE);
        let first = open(&path, &OpenOptions::writing()).expect("first");
        assert_busy(open(&path, &OpenOptions::writing()), name);
        assert_busy(open(&path, &OpenOptions { exclusive: true, ..OpenOptions::reading() }), name);
        drop(first);
        open(&path, &OpenOptions::writing()).expect("after the first is gone");

        let Some(device) = Loop::attach(&path, &[]) else { continue };
        let first = open(&device.0, &OpenOptions::writing()).expect("first");
        assert_busy(open(&device.0, &OpenOptions::writing()), name);
        drop(first);
        open(&device.0, &OpenOptions::writing()).expect("after the first is gone");
    }
}

#[test]
fn a_mounted_device_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let backing = sparse_file(dir.path(), "mounted", 16 * MIB);
    let Some(device) = Loop::attach(&backing, &[]) else { return };
    let (name, target) = (device.0.to_str().expect("UTF-8 path"), dir.path().join("mnt"));
    std::fs::create_dir(&target).expect("mount point");
    let target = target.to_str().expect("UTF-8 path");
    if let Err(reason) = run("mkfs.ext4", &["-q", name]).and_then(|_| run("mount", &[name, target])) {
        eprintln!("SKIPPED: cannot make and mount ext4 here: {reason}");
        return;
    }
    let results: Vec<_> =
        backends().iter().map(|(_, open)| open(&device.0, &OpenOptions::writing())).collect();
    run("umount", &[target]).expect("unmount");
    for result in results {
        assert_busy(result, "mounted");
    }
}

#[test]
fn what_may_not_be_written_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        let path = sparse_file(dir.path(), name, SIZE);
        let mut file = open(&path, &OpenOptions::reading()).expect("open");
        let error = file.write(&[WriteAt { offset: 0, data: &[1; 512] }]).expect_err("opened for reading");
        assert_eq!(error.source.kind(), ErrorKind::PermissionDenied);
        assert!(file.zero(ByteRange { start: 0, end: 512 }).is_err());
        assert!(contents(&mut *file).iter().all(|byte| *byte == 0));
        assert!(open(dir.path(), &OpenOptions::reading()).is_err(), "a directory");
        assert!(open(Path::new("/dev/null"), &OpenOptions::reading()).is_err(), "a character device");
        assert!(open(&dir.path().join("missing"), &OpenOptions::reading()).is_err());

        let Some(device) = Loop::attach(&path, &["--read-only"]) else { continue };
        let error = open(&device.0, &OpenOptions::writing()).err().expect("a read-only device");
        assert_eq!(error.op, BlockOp::Open);
        assert!(error.to_string().contains("may not be written"), "{error}");
        open(&device.0, &OpenOptions::reading()).expect("reading is fine");
    }
}

#[test]
fn a_file_that_shrinks_fails_the_batch_and_leaves_the_handle_usable() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        let path = sparse_file(dir.path(), name, 32 * MIB);
        let mut file = open(&path, &OpenOptions { queue_depth: 8, ..writing() }).expect("open");
        file.write(&[WriteAt { offset: 0, data: &vec![7; 2 * MIB as usize] }]).expect("write");
        std::fs::File::options().write(true).open(&path).expect("open").set_len(MIB).expect("shrink");
        let mut buffers = vec![vec![0_u8; MIB as usize]; 32];
        let mut reads: Vec<ReadAt<'_>> =
            (0_u64..).zip(&mut buffers).map(|(at, data)| ReadAt { offset: at * MIB, data }).collect();
        let error = file.read(&mut reads).expect_err("shrunk");
        assert_eq!(error.source.kind(), ErrorKind::UnexpectedEof, "{name}: {error}");
        assert!(error.offset >= MIB);
        for buffer in &mut buffers {
            buffer.fill(9); // nothing in flight may write here any more
        }
        let mut first = vec![0; MIB as usize];
        file.read(&mut [ReadAt { offset: 0, data: &mut first }]).expect("what is left can be read");
        assert!(first.iter().all(|byte| *byte == 7));
        assert!(buffers.iter().flatten().all(|byte| *byte == 9));
    }
}

#[test]
fn a_batch_with_one_place_outside_is_refused_as_a_whole() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, open) in backends() {
        let path = sparse_file(dir.path(), name, SIZE);
        let mut file = open(&path, &writing()).expect("open");
        let writes = [WriteAt { offset: 0, data: &[1; 512] }, WriteAt { offset: SIZE - 1, data: &[1; 2] }];
        assert_eq!(file.write(&writes).expect_err("outside").source.kind(), ErrorKind::InvalidInput);
        assert!(file.zero(ByteRange { start: SIZE, end: u64::MAX }).is_err());
        assert!(contents(&mut *file).iter().all(|byte| *byte == 0), "{name}");
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), SIZE);
        file.write(&writes[..1]).expect("a refused batch does not fail the file");
    }
}

#[test]
fn the_factory_names_the_backend_it_chose() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = sparse_file(dir.path(), "chosen", SIZE);
    let (mut file, backend) = io::open_reporting(&path, &OpenOptions::writing()).expect("open");
    assert_eq!(backend.to_string().starts_with("io_uring"), probe().is_ok(), "{backend}");
    file.write(&[WriteAt { offset: 100, data: b"both ends odd" }]).expect("write");
    assert_eq!(&contents(&mut *file)[100..113], b"both ends odd");
    let buffered = OpenOptions { direct: false, ..OpenOptions::reading() };
    let (_, backend) = io::open_reporting(&path, &buffered).expect("open");
    assert!(backend.to_string().ends_with("buffered"));
}
