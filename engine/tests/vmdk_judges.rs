//! Independent judges of our VMDKs: `qemu-img`, and two readers from PyPI (`engine/tests/readers`).
//!
//! What must hold: every kind we create is accepted and read the same by all of them, after a clean close and after a
//! crash; every kind `qemu-img` creates is written by us so that it reads the same. A judge that is not installed is
//! skipped with a line that says so.
#![cfg(feature = "io")]
#![expect(clippy::unwrap_used, reason = "a test crate: helpers outside test functions unwrap too")]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::store::export::{ExportFormat, export};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::target::{
    CreateOptions, Expectation, Target, TargetError, TargetKind, TargetSpec, VmdkKind, create_target,
    detect_target, grow_target, open_target,
};

/// Two full 2047 MiB extents would take long; the split kinds are tested at their border by one write there.
const SIZE: u64 = (37 << 20) + 512 * 5;

/// The smallest honest backend: pread and pwrite.
struct PlainFile {
    name: String,
    file: File,
    size: u64,
}

impl PlainFile {
    fn fail(&self, op: BlockOp, offset: u64, len: usize, source: std::io::Error) -> BlockError {
        BlockError { name: self.name.clone(), op, offset, len: len as u64, source }
    }
}

impl BlockFile for PlainFile {
    fn size_bytes(&self) -> u64 {
        self.size
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for ReadAt { offset, data } in reads {
            let (offset, len) = (*offset, data.len());
            self.file.read_exact_at(data, offset).map_err(|e| self.fail(BlockOp::Read, offset, len, e))?;
        }
        Ok(())
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for WriteAt { offset, data } in writes {
            assert!(offset + data.len() as u64 <= self.size, "write past the end of {}", self.name);
            self.file
                .write_all_at(data, *offset)
                .map_err(|e| self.fail(BlockOp::Write, *offset, data.len(), e))?;
        }
        Ok(())
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        let zeros = vec![0; 1 << 20];
        let mut at = range.start;
        while at < range.end {
            let data = &zeros[..zeros.len().min((range.end - at) as usize)];
            self.write(&[WriteAt { offset: at, data }])?;
            at += data.len() as u64;
        }
        Ok(())
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(|e| self.fail(BlockOp::Flush, 0, 0, e))
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        Ok(if range.is_empty() { Vec::new() } else { vec![range] })
    }
}

fn opener() -> Arc<dyn Files> {
    Arc::new(FsFiles::new(|path, writable| {
        let name = path.display().to_string();
        let opened = OpenOptions::new().read(true).write(writable).open(path);
        let sized = opened.and_then(|file| Ok((file.metadata()?.len(), file)));
        match sized {
            Ok((size, file)) => Ok(Box::new(PlainFile { name, file, size }) as Box<dyn BlockFile>),
            Err(source) => Err(BlockError { name, op: BlockOp::Open, offset: 0, len: 0, source }),
        }
    }))
}

/// xorshift64: contents are reproducible from the seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A disk and a raw file that are given the same writes.
struct Twin {
    target: Target,
    raw: File,
    raw_path: PathBuf,
    random: Random,
}

impl Twin {
    fn new(target: Target, dir: &Path, seed: u64) -> Self {
        let raw_path = dir.join("expected.raw");
        let raw =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&raw_path).unwrap();
        raw.set_len(target.size_bytes()).unwrap();
        Self { target, raw, raw_path, random: Random(seed | 1) }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.target.write(&[WriteAt { offset, data }]).unwrap();
        self.raw.write_all_at(data, offset).unwrap();
    }

    /// Random runs of sectors: some zero, some long, some at the ends; holes stay between them.
    fn scribble(&mut self, writes: u64) {
        let sectors = self.target.size_bytes() / 512;
        for number in 0..writes {
            let len = if number % 5 == 0 { 1 + self.random.below(3000) } else { 1 + self.random.below(40) };
            let start = match number % 7 {
                0 => 0,
                1 => sectors - len,
                _ => self.random.below(sectors - len),
            };
            let zero = number % 6 == 3;
            let data: Vec<u8> = (0..len * 64)
                .flat_map(|_| if zero { [0; 8] } else { self.random.next().to_le_bytes() })
                .collect();
            self.write(start * 512, &data);
            if number % 9 == 4 {
                self.target.flush().unwrap();
            }
        }
    }
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {program} is not installed, so nobody judged");
    }
    found
}

fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let mut command = Command::new(program);
    args.iter().for_each(|arg| {
        command.arg(arg.as_ref());
    });
    let out = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{command:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

fn spec(dir: &Path, kind: VmdkKind) -> TargetSpec {
    TargetSpec { path: dir.join("disk.vmdk"), kind: kind.into() }
}

fn writable() -> Expectation {
    Expectation { writable: true, ..Expectation::default() }
}

/// Everything every judge has to say about a disk.
fn judge(disk: &Path, raw: &Path, sparse: bool) {
    let info = run("qemu-img", &[&"info", &"--output=json", &disk]);
    assert!(info.contains("\"format\": \"vmdk\""), "{info}");
    if sparse {
        let check = run("qemu-img", &[&"check", &"-f", &"vmdk", &disk]);
        assert!(check.contains("No errors were found"), "{check}");
    }
    let compare = run("qemu-img", &[&"compare", &"-f", &"vmdk", &"-F", &"raw", &disk, &raw]);
    assert!(compare.contains("identical"), "{compare}");
    ask_readers(disk, raw);
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The two readers of `readers/read_vmdk.py`, when `readers/setup.sh target/readers-venv` was run.
fn ask_readers(disk: &Path, raw: &Path) {
    let python = workspace().join("target/readers-venv/bin/python");
    if !python.exists() {
        eprintln!("SKIPPED: no readers; run engine/tests/readers/setup.sh target/readers-venv");
        return;
    }
    let script = workspace().join("engine/tests/readers/read_vmdk.py");
    let verdicts = run(&python, &[&script, &disk]);
    let sum = run("sha256sum", &[&raw]);
    let (expected, _) = sum.split_once(' ').unwrap();
    let size = std::fs::metadata(raw).unwrap().len();
    for reader in ["libvmdk", "dissect"] {
        assert!(
            verdicts.contains(&format!("{reader} {size} {expected}")),
            "{reader}: {verdicts} expected {expected}"
        );
    }
}

#[test]
fn every_kind_we_create_is_read_the_same_by_all_judges() {
    if !installed("qemu-img") {
        return;
    }
    for (seed, kind) in (1_u64..).zip(VmdkKind::ALL) {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), kind);
        let target =
            create_target(&opener(), &spec, SIZE, &BTreeSet::new(), &CreateOptions::default()).unwrap();
        let mut twin = Twin::new(target, dir.path(), seed * 77);
        twin.scribble(60);
        twin.target.close().unwrap();
        judge(&spec.path, &twin.raw_path, kind.is_sparse());
        // And once more over what exists already.
        let mut twin = Twin::new(open_target(&opener(), &spec, &writable()).unwrap(), dir.path(), seed * 99);
        twin.scribble(40);
        twin.target.close().unwrap();
        judge(&spec.path, &twin.raw_path, kind.is_sparse());
        if kind.is_sparse() {
            let used: u64 = std::fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap())
                .filter(|entry| entry.path() != twin.raw_path)
                .map(|entry| entry.metadata().unwrap().len())
                .sum();
            assert!(used < SIZE + (1 << 20), "{used} bytes of files after a clean close");
        }
    }
}

#[test]
fn split_disks_are_read_the_same_across_the_border_of_two_files() {
    if !installed("qemu-img") {
        return;
    }
    for kind in [VmdkKind::TwoGbMaxExtentFlat, VmdkKind::TwoGbMaxExtentSparse] {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), kind);
        let size = (2047 << 20) + (5 << 20);
        let target =
            create_target(&opener(), &spec, size, &BTreeSet::new(), &CreateOptions::default()).unwrap();
        let mut twin = Twin::new(target, dir.path(), 5);
        let data: Vec<u8> =
            (0..400_000).flat_map(|_| twin.random.next().to_le_bytes()).take(3 << 20).collect();
        twin.write((2047 << 20) - (1 << 20) - 512, &data);
        twin.target.close().unwrap();
        let compare =
            run("qemu-img", &[&"compare", &"-f", &"vmdk", &"-F", &"raw", &spec.path, &twin.raw_path]);
        assert!(compare.contains("identical"), "{compare}");
    }
}

#[test]
fn a_crashed_sparse_disk_is_accepted_before_and_after_its_repair() {
    if !installed("qemu-img") {
        return;
    }
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::TwoGbMaxExtentSparse] {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), kind);
        let target =
            create_target(&opener(), &spec, SIZE, &BTreeSet::new(), &CreateOptions::default()).unwrap();
        let mut twin = Twin::new(target, dir.path(), 31);
        twin.scribble(50);
        twin.target.flush().unwrap();
        drop(twin.target); // as a kill: nothing is closed, the file is as long as it can become
        judge(&spec.path, &twin.raw_path, true);
        let target = open_target(&opener(), &spec, &writable()).unwrap();
        assert!(target.repair().unclean && target.repair().dropped.is_empty(), "{:?}", target.repair());
        let mut twin = Twin::new(target, dir.path(), 32);
        twin.scribble(10);
        twin.target.close().unwrap();
        judge(&spec.path, &twin.raw_path, true);
    }
}

#[test]
fn disks_that_grew_are_read_the_same_by_all_judges_whoever_made_them() {
    if !installed("qemu-img") {
        return;
    }
    for (seed, kind) in (1_u64..).zip(VmdkKind::ALL) {
        for by_qemu in [false, true] {
            if by_qemu && kind == VmdkKind::Vmfs {
                continue; // it makes none
            }
            let dir = tempfile::tempdir().unwrap();
            let spec = spec(dir.path(), kind);
            if by_qemu {
                let options = format!("subformat={}", kind.create_type());
                let size = SIZE.to_string();
                run("qemu-img", &[&"create", &"-f", &"vmdk", &"-o", &options, &spec.path, &size]);
            } else {
                let made = create_target(&opener(), &spec, SIZE, &BTreeSet::new(), &CreateOptions::default());
                made.unwrap().close().unwrap();
            }
            // Within a table, over several tables, and of split disks into a file more.
            let far = if kind.is_split() { (2047 << 20) + (9 << 20) } else { SIZE + (100 << 20) };
            for (step, size) in (1_u64..).zip([SIZE + 512 * 3, SIZE + (90 << 20), far]) {
                let opened = open_target(&opener(), &spec, &writable()).unwrap();
                let mut twin = Twin::new(opened, dir.path(), seed * 77 + step);
                twin.scribble(30);
                twin.target.close().unwrap();
                grow_target(&opener(), &spec, size).unwrap();
                twin.raw.set_len(size).unwrap();
                judge(&spec.path, &twin.raw_path, kind.is_sparse());
                let opened = open_target(&opener(), &spec, &writable()).unwrap();
                let mut twin = Twin::new(opened, dir.path(), seed * 99 + step);
                assert_eq!(twin.target.size_bytes(), size);
                twin.scribble(20);
                twin.target.close().unwrap();
                judge(&spec.path, &twin.raw_path, kind.is_sparse());
            }
        }
    }
}

#[test]
fn disks_made_by_qemu_are_written_by_us() {
    if !installed("qemu-img") {
        return;
    }
    for (seed, kind) in (1_u64..).zip(VmdkKind::ALL.into_iter().filter(|kind| *kind != VmdkKind::Vmfs)) {
        for adapter in ["lsilogic", "ide"] {
            let dir = tempfile::tempdir().unwrap();
            let (disk, source) = (dir.path().join("disk.vmdk"), dir.path().join("expected.raw"));
            // Some content first, so that tables are partly filled by another writer.
            let mut random = Random(seed);
            let old: Vec<u8> = (0..3 << 17).flat_map(|_| random.next().to_le_bytes()).collect();
            let raw = File::create(&source).unwrap();
            raw.set_len(SIZE).unwrap();
            raw.write_all_at(&old, 9 << 20).unwrap();
            let options = format!("subformat={},adapter_type={adapter}", kind.create_type());
            run("qemu-img", &[&"convert", &"-f", &"raw", &"-O", &"vmdk", &"-o", &options, &source, &disk]);
            let spec = detect_target(&opener(), &disk).unwrap();
            assert_eq!(spec.kind, TargetKind::from(kind));
            let target = open_target(&opener(), &spec, &writable()).unwrap();
            let mut twin = Twin::new(target, dir.path(), seed * 13);
            twin.scribble(50);
            let mut all = vec![0; SIZE as usize];
            twin.target.read(&mut [ReadAt { offset: 0, data: &mut all }]).unwrap();
            assert!(all == std::fs::read(&source).unwrap(), "{kind:?}: we read something else than we wrote");
            twin.target.close().unwrap();
            judge(&disk, &source, kind.is_sparse());
        }
    }
}

#[test]
fn a_stream_optimised_disk_is_refused_with_the_remedy() {
    if !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.vmdk");
    run("qemu-img", &[&"create", &"-f", &"vmdk", &"-o", &"subformat=streamOptimized", &disk, &"8M"]);
    let error = detect_target(&opener(), &disk).unwrap_err();
    assert!(matches!(error, TargetError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("convert"), "{error}");
}

#[test]
fn a_copy_in_each_format_is_read_the_same_by_all_judges_and_leaves_nothing_when_it_fails() {
    if !installed("qemu-img") {
        return;
    }
    for (seed, size) in [(5, SIZE), (6, (200 << 20) - 512)] {
        let dir = tempfile::tempdir().unwrap();
        let source_spec = spec(dir.path(), VmdkKind::MonolithicFlat);
        let target =
            create_target(&opener(), &source_spec, size, &BTreeSet::new(), &CreateOptions::default());
        let mut twin = Twin::new(target.unwrap(), dir.path(), seed);
        twin.scribble(40);
        for (format, name) in [
            (ExportFormat::Stream, "stream.vmdk"),
            (ExportFormat::Flat, "flat.vmdk"),
            (ExportFormat::Sparse, "sparse.vmdk"),
            (ExportFormat::Raw, "raw.img"),
        ] {
            let out = dir.path().join(name);
            let mut done = 0;
            let made =
                export(&opener(), &mut twin.target, &out, format, &mut |at| done = done.max(at)).unwrap();
            assert_eq!((made.size_bytes, done), (size, size));
            assert!(made.data_bytes < size && made.files.contains(&out), "{made:?}");
            if format == ExportFormat::Raw {
                run("cmp", &[&out, &twin.raw_path]);
            } else {
                judge(&out, &twin.raw_path, format != ExportFormat::Flat);
            }
            let again = export(&opener(), &mut twin.target, &out, format, &mut |_| {});
            assert!(again.unwrap_err().to_string().contains("exists already"), "{name}");
            assert!(made.files.iter().all(|file| file.exists()), "a refused copy took {name} away");
        }
        // A source that cannot be read to its end leaves nothing behind.
        let before = std::fs::read_dir(dir.path()).unwrap().count();
        for (format, name) in [
            (ExportFormat::Stream, "x.vmdk"),
            (ExportFormat::Flat, "y.vmdk"),
            (ExportFormat::Sparse, "z.vmdk"),
        ] {
            let mut short = opener().open(&twin.raw_path, false).unwrap();
            let cut = OpenOptions::new().write(true).open(&twin.raw_path).unwrap();
            cut.set_len(size / 2).unwrap();
            let failed = export(&opener(), &mut short, &dir.path().join(name), format, &mut |_| {});
            cut.set_len(size).unwrap();
            assert!(failed.unwrap_err().to_string().contains("nothing was left behind"));
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before, "{name}");
        }
    }
}

#[test]
fn an_overlay_made_by_qemu_is_refused_as_a_snapshot() {
    if !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base.vmdk"), dir.path().join("overlay.vmdk"));
    run("qemu-img", &[&"create", &"-f", &"vmdk", &base, &"8M"]);
    run("qemu-img", &[&"create", &"-f", &"vmdk", &"-b", &base, &"-F", &"vmdk", &overlay]);
    let error = detect_target(&opener(), &overlay).unwrap_err();
    assert!(matches!(error, TargetError::Snapshot { .. }), "{error}");
}
