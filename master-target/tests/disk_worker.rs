//! A disk worker against real targets: what a scripted agent sends is what stands on the target, also across
//! restarts, fencing, damage, full media and failing ones.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use reprotect_engine::compress::Compressor;
use reprotect_engine::format::batch::encode_batch;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::message::{ErrorCode, Message, NackReason, PassMode};
use reprotect_engine::io::{self, BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::limits::DELTA_RECORD_BYTES_MAX;
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::proto::master_target::DiskInput;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::store::target::{Expectation, TargetKind, open_target};
use reprotect_engine::units::{Generation, SectorRange, Sequence};
use reprotect_master_target::housekeeping;
use reprotect_master_target::registry::fs_opener;
use reprotect_master_target::retention::RetentionSettings;
use support::*;

const SIZE: u64 = 16 << 20;
const CHUNK_SECTORS: u64 = (4 << 20) / 512;

/// What the disk must read as.
struct Model(Vec<u8>);

impl Model {
    fn put(&mut self, start_sector: u64, data: &[u8]) {
        let at = start_sector as usize * 512;
        self.0[at..at + data.len()].copy_from_slice(data);
    }
}

fn content(bench: &Bench) -> Vec<u8> {
    let mut target = open_target(&bench.opener, &bench.spec, &Expectation::default()).unwrap();
    let mut data = vec![0; bench.size_bytes as usize];
    target.read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
    data
}

/// Records of a run of data, as large as delta records may be.
fn cut(start_sector: u64, data: &Bytes) -> Vec<Record> {
    let whole = SectorRange::new(start_sector, start_sector + data.len() as u64 / 512);
    cut_records(start_sector, data, &[whole], DELTA_RECORD_BYTES_MAX)
}

fn squeezed(record: &Record) -> Record {
    let mut compressor = Compressor::new(1).unwrap();
    match compressor.compress(record.payload()).unwrap() {
        Some(stored) => record.recoded(stored.into()),
        None => record.clone(),
    }
}

/// Interleaved bulk and delta over a whole disk, with a restart in the middle; then the disk must equal the model.
fn replicate(bench: &mut Bench, model: &mut Model) {
    let mut agent = bench.opened();
    let chunks = SIZE / 512 / CHUNK_SECTORS;
    for chunk in 0..chunks {
        if chunk == chunks / 2 {
            bench.restart();
            agent = bench.opened();
            assert_eq!(agent.sequence, Sequence(3 * chunk), "durable deltas are remembered");
            let settled = SectorRange::new(0, chunk * CHUNK_SECTORS);
            assert_eq!(agent.settled, [settled], "and so is what the pass settled");
        }
        let cover = SectorRange::new(chunk * CHUNK_SECTORS, (chunk + 1) * CHUNK_SECTORS);
        // Delta first, somewhere in the chunk: bulk, which is older, must not overwrite it.
        let fresh = pattern(1000 + chunk, 3 * 4096 + 512);
        agent.delta(bench, &[squeezed(&Record::data(cover.start + 17, fresh.clone()))]);
        let old = Record::data(cover.start, pattern(chunk, 1 << 20));
        let hole = Record::zeros(SectorRange::new(cover.start + 4096, cover.start + 4096 + 64));
        agent.bulk(bench, cover, &[old.clone(), hole]);
        model.put(cover.start, old.payload());
        model.put(cover.start + 17, &fresh);
        // Overlapping records of one batch: the later wins.
        let first = Record::data(cover.start + 100, pattern(2000 + chunk, 4096));
        let later = Record::data(cover.start + 102, pattern(3000 + chunk, 4096));
        model.put(cover.start + 100, first.payload());
        model.put(cover.start + 102, later.payload());
        agent.delta(bench, &[first, squeezed(&later)]);
        agent.until_settled(bench, cover);
    }
    agent.end_pass(bench);
    let zero = SectorRange::new(200, 300);
    let sequence = agent.delta(bench, &[Record::zeros(zero), Record::discard(SectorRange::new(400, 401))]);
    model.put(200, &[0; 100 * 512]);
    model.put(400, &[0; 512]);
    agent.until_durable(bench, sequence);
    // Behind a journal the target stands at marks.
    agent.mark(bench, 1, 1);
    agent.until_marked(bench, 1);
    bench.stop();
}

#[test]
fn bulk_and_delta_land_on_every_kind_of_vmdk_as_the_model_says() {
    let kinds = [TargetKind::MonolithicFlat, TargetKind::Vmfs, TargetKind::MonolithicSparse];
    for (kind, journal) in kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(&dir.path().join("web.vmdk"), kind);
        let folder = journal.then(|| dir.path().join("retention"));
        let mut bench = Bench::start_with(fs_opener(), spec, dir.path().join("state"), SIZE, folder);
        let mut model = Model(vec![0; SIZE as usize]);
        replicate(&mut bench, &mut model);
        assert!(content(&bench) == model.0, "{kind}, journal {journal}");
        assert!(journal || bench.saved().mode == PassMode::Done); // behind a journal the state is in the log
    }
}

#[test]
fn a_loop_device_is_written_alike_and_known_again() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, pattern(77, SIZE as usize)).unwrap();
    let device = Loop::over(&image);
    let mut bench =
        Bench::start(fs_opener(), spec(&device.path, TargetKind::Device), dir.path().join("state"), SIZE);
    let mut model = Model(pattern(77, SIZE as usize).to_vec());
    for chunk in 0..4 {
        // What bulk does not touch keeps what stood there; the hole that is sent is zeros.
        model.put(chunk * CHUNK_SECTORS + 4096, &[0; 64 * 512]);
    }
    let identity = reprotect_master_target::device::identity(&device.path).unwrap();
    assert!(identity.starts_with("file:") && identity.ends_with("disk.img"), "{identity}");
    let writable = Expectation { writable: true, ..Expectation::default() };
    let held = open_target(&bench.opener, &bench.spec, &writable).unwrap_err().to_string();
    assert!(held.contains("is in use"), "{held}");
    replicate(&mut bench, &mut model);
    assert!(content(&bench) == model.0);
    assert!(reprotect_master_target::device::check(&device.path, Some(&identity)).is_ok());
    let other = reprotect_master_target::device::check(&device.path, Some("file:/gone.img")).unwrap_err();
    assert!(other.to_string().contains("is not the disk it was"), "{other}");
}

fn small(name: &str) -> (tempfile::TempDir, Bench) {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(&dir.path().join(name), TargetKind::MonolithicFlat);
    let bench = Bench::start(fs_opener(), spec, dir.path().join("state"), SIZE);
    (dir, bench)
}

#[test]
fn an_older_session_is_fenced_and_writes_nothing_more() {
    let (_dir, mut bench) = small("web.vmdk");
    let mut old = bench.opened();
    let first = old.delta(&bench, &[Record::data(0, pattern(1, 4096))]);
    old.until_durable(&bench, first);
    let mut new = bench.opened();
    assert!(new.generation > old.generation);
    old.delta(&bench, &[Record::data(8, pattern(2, 4096))]);
    let fenced = old.wait(&bench, |message| match message {
        Message::Fenced(fenced) => Some(fenced.generation),
        _ => None,
    });
    assert_eq!(fenced, new.generation);
    let mut late = bench.session();
    late.ask_open(&bench, Generation(0));
    late.wait(&bench, |message| matches!(message, Message::Fenced(_)).then_some(()));
    let second = new.delta(&bench, &[Record::data(16, pattern(3, 4096))]);
    new.until_durable(&bench, second);
    bench.stop();
    let content = content(&bench);
    assert!(content[..4096] == pattern(1, 4096)[..] && content[8192..12288] == pattern(3, 4096)[..]);
    assert!(content[4096..8192].iter().all(|byte| *byte == 0), "the fenced write must not be there");
}

#[test]
fn a_damaged_delta_batch_is_asked_for_again_and_applies_nothing() {
    let (_dir, mut bench) = small("web.vmdk");
    let mut agent = bench.opened();
    let records = [Record::data(0, pattern(1, 4096)), Record::data(64, pattern(2, 64 << 10))];
    let mut body = encode_batch(&agent.delta_header(&records), &records).body().to_vec();
    let last = body.len() - 1;
    body[last] ^= 1;
    agent.send(&bench, DiskInput::Batch(body.into()));
    let from = agent.wait(&bench, |message| match message {
        Message::Nack(nack) if nack.reason == NackReason::Damaged => Some(nack.resume_from),
        _ => None,
    });
    assert_eq!(from, Sequence(1));
    // What is sent in its place is believed.
    let sequence = agent.delta(&bench, &records[1..]);
    agent.until_durable(&bench, sequence);
    bench.stop();
    let content = content(&bench);
    assert!(content[..4096].iter().all(|byte| *byte == 0), "half a damaged batch was applied");
    assert!(content[64 * 512..64 * 512 + (64 << 10)] == pattern(2, 64 << 10)[..]);
}

#[test]
fn a_batch_that_nobody_can_read_ends_its_session_and_applies_nothing() {
    let (_dir, mut bench) = small("web.vmdk");
    let mut agent = bench.opened();
    let records = [Record::data(0, pattern(1, 4096))];
    let mut body = encode_batch(&agent.delta_header(&records), &records).body().to_vec();
    body.truncate(100);
    agent.send(&bench, DiskInput::Batch(body.into()));
    let text = agent.wait(&bench, |message| match message {
        // Of no disk: it is the session that ends.
        Message::Error(head, text) if head.code == ErrorCode::Protocol => Some((head.disk, text)),
        _ => None,
    });
    assert_eq!(text.0, reprotect_engine::units::DiskId::NONE);
    assert!(text.1.contains("failed its checks"), "{}", text.1);
    // The next session starts where the target stands.
    let agent = bench.opened();
    assert_eq!(agent.sequence, Sequence::ZERO);
    bench.stop();
    assert!(content(&bench)[..4096].iter().all(|byte| *byte == 0), "half a damaged batch was applied");
}

/// A mounted tmpfs, unmounted on drop.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn of(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "reprotect-test"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success());
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

#[test]
fn a_full_medium_pauses_only_its_disk_and_goes_on_in_order_when_there_is_space() {
    if !is_root() {
        return;
    }
    let kinds = [TargetKind::MonolithicFlat, TargetKind::MonolithicSparse];
    for (kind, journal) in kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let (medium, dir) = (Tmpfs::of(24 << 20), tempfile::tempdir().unwrap());
        let spec = spec(&medium.path().join("web.vmdk"), kind);
        let folder = journal.then(|| dir.path().join("retention"));
        let mut bench = Bench::start_with(fs_opener(), spec, dir.path().join("state"), SIZE, folder);
        let mut model = Model(vec![0; SIZE as usize]);
        let mut agent = bench.opened();
        let ballast = medium.path().join("ballast");
        std::fs::write(&ballast, vec![1; 21 << 20]).unwrap();
        // More batches than there are buffers, the last ones over the first.
        let mut last = Sequence::ZERO;
        for number in 0..40_u64 {
            let at = number % 30 * 512;
            let data = pattern(number, 192 << 10);
            model.put(at, &data);
            last = agent.delta(&bench, &cut(at, &data));
        }
        let text = agent.until_error(&bench, ErrorCode::Full);
        assert!(text.contains("replication goes on by itself"), "{text}");
        let shown = bench.until_problem(|problem| problem.is_some()).unwrap();
        assert!(shown.contains("web"), "{shown}");

        // Another disk goes on meanwhile.
        let (_other_dir, mut other) = small("other.vmdk");
        let mut neighbour = other.opened();
        let sequence = neighbour.delta(&other, &[Record::data(0, pattern(9, 4096))]);
        neighbour.until_durable(&other, sequence);
        other.stop();
        assert!(bench.problem().is_some(), "{kind}, journal {journal}: still full");

        std::fs::remove_file(&ballast).unwrap();
        agent.until_durable(&bench, last);
        bench.until_problem(|problem| problem.is_none());
        bench.stop();
        assert!(content(&bench) == model.0, "{kind}, journal {journal}: written in another order, or lost");
    }
}

#[test]
fn a_full_retention_drive_takes_nothing_in_and_goes_on_by_itself_when_there_is_room() {
    if !is_root() {
        return;
    }
    let (medium, dir) = (Tmpfs::of(32 << 20), tempfile::tempdir().unwrap());
    let spec = spec(&dir.path().join("web.vmdk"), TargetKind::MonolithicFlat);
    let folder = Some(medium.path().join("retention"));
    let settings =
        RetentionSettings { segment_bytes: 1 << 20, reserve_bytes: 1 << 20, ..retention_settings() };
    let state = dir.path().join("state");
    let mut bench = Bench::start_keeping(fs_opener(), spec, state, SIZE, folder, settings);
    let looks = housekeeping::start(bench.retention()).unwrap();
    let mut agent = bench.opened();
    let first = agent.delta(&bench, &[Record::data(0, pattern(1, 4096))]);
    agent.until_durable(&bench, first);
    // Others fill the drive.
    let ballast = medium.path().join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 65536]).is_ok() {}
    let until = |pressure| {
        for _ in 0..6000 {
            if (bench.retention().pressure() == Pressure::Stop) == pressure {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the pressure is {:?}", bench.retention().pressure());
    };
    until(true);
    let second = agent.delta(&bench, &[Record::data(8, pattern(2, 4096))]);
    let text = agent.until_error(&bench, ErrorCode::Full);
    assert!(text.contains("the retention drive at") && text.contains("goes on by itself"), "{text}");
    bench.until_problem(|problem| problem.is_some_and(|text| text.contains("retention drive")));
    std::fs::remove_file(&ballast).unwrap();
    drop(file);
    until(false);
    agent.until_durable(&bench, second);
    bench.until_problem(|problem| problem.is_none());
    agent.mark(&bench, 1, 1);
    agent.until_marked(&bench, 1);
    bench.stop();
    looks.join().unwrap();
    let content = content(&bench);
    assert!(content[..4096] == pattern(1, 4096)[..] && content[4096..8192] == pattern(2, 4096)[..]);
}

#[test]
fn a_disk_waiting_for_space_stops_when_asked_and_claims_nothing_it_did_not_write() {
    if !is_root() {
        return;
    }
    let (medium, dir) = (Tmpfs::of(8 << 20), tempfile::tempdir().unwrap());
    let spec = spec(&medium.path().join("web.vmdk"), TargetKind::MonolithicFlat);
    let mut bench = Bench::start_unchecked(fs_opener(), spec, dir.path().join("state"), SIZE);
    let mut agent = bench.opened();
    let first = agent.delta(&bench, &[Record::data(0, pattern(1, 4096))]);
    agent.until_durable(&bench, first);
    for number in 1..60_u64 {
        agent.delta(&bench, &cut(number * 512, &pattern(number, 256 << 10)));
    }
    bench.until_problem(|problem| problem.is_some());
    bench.stop();
    let durable = bench.saved().sequence;
    let batches = (durable.0 - first.0) / 4;
    assert!((durable.0 - first.0).is_multiple_of(4) && batches < 59, "{durable:?}");
    let content = content(&bench);
    for number in 1..=batches {
        let at = number as usize * 512 * 512;
        assert!(content[at..at + (256 << 10)] == pattern(number, 256 << 10)[..], "batch {number} is claimed");
    }
}

const WORKS: u8 = 0;
const FAILS_WRITES: u8 = 1;
const FAILS_FLUSHES: u8 = 2;
const PANICS: u8 = 3;

/// A file that fails when told to.
struct Faulty(Box<dyn BlockFile>, Arc<AtomicU8>);

impl Faulty {
    fn fault(&self, op: BlockOp, kind: u8) -> Result<(), BlockError> {
        let told = self.1.load(Ordering::SeqCst);
        assert!(told != PANICS || op != BlockOp::Write, "told to panic");
        if told != kind {
            return Ok(());
        }
        let source = std::io::Error::from_raw_os_error(5); // EIO
        Err(BlockError { name: "faulty".to_owned(), op, offset: 0, len: 0, source })
    }
}

impl BlockFile for Faulty {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.0.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.fault(BlockOp::Write, FAILS_WRITES)?;
        self.0.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.0.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.fault(BlockOp::Flush, FAILS_FLUSHES)?;
        self.0.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.0.allocated(range)
    }
}

fn faulty_opener(told: &Arc<AtomicU8>) -> Arc<dyn Files> {
    let told = Arc::clone(told);
    Arc::new(FsFiles::new(move |path, writable| {
        let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
        Ok(Box::new(Faulty(io::open(path, &options)?, Arc::clone(&told))) as Box<dyn BlockFile>)
    }))
}

#[test]
fn a_failing_medium_stops_its_disk_with_a_clear_text_and_a_restart_goes_on_where_it_was_durable() {
    for kind in [TargetKind::MonolithicFlat, TargetKind::MonolithicSparse] {
        for fault in [FAILS_WRITES, FAILS_FLUSHES, PANICS] {
            let (told, dir) = (Arc::new(AtomicU8::new(WORKS)), tempfile::tempdir().unwrap());
            let spec = spec(&dir.path().join("web.vmdk"), kind);
            let mut bench = Bench::start(faulty_opener(&told), spec, dir.path().join("state"), SIZE);
            let mut agent = bench.opened();
            let first = Record::data(0, pattern(1, 64 << 10));
            let durable = agent.delta(&bench, std::slice::from_ref(&first));
            agent.until_durable(&bench, durable);

            told.store(fault, Ordering::SeqCst);
            let second = Record::data(4096, pattern(2, 64 << 10));
            agent.delta(&bench, std::slice::from_ref(&second));
            let text = agent.until_error(&bench, ErrorCode::Target);
            let expected = if fault == PANICS { "told to panic" } else { "Input/output error" };
            assert!(text.contains(expected) && text.contains("restart"), "{text}");
            let shown = bench.until_problem(|problem| problem.is_some()).unwrap();
            assert!(shown.contains(expected), "{shown}");
            if fault != PANICS {
                let refused = bench.session();
                refused.ask_open(&bench, agent.generation);
                let mut refused = refused;
                refused.until_error(&bench, ErrorCode::Target);
            }

            // The medium is repaired, the daemon restarted.
            bench.stop();
            told.store(WORKS, Ordering::SeqCst);
            assert_eq!(bench.saved().sequence, durable, "nothing is claimed that failed");
            bench.resume();
            let mut agent = bench.opened();
            assert_eq!(agent.sequence, durable);
            let again = agent.delta(&bench, std::slice::from_ref(&second));
            agent.until_durable(&bench, again);
            bench.stop();
            let content = content(&bench);
            assert!(content[..64 << 10] == first.payload()[..], "{kind} {fault}");
            assert!(content[4096 * 512..4096 * 512 + (64 << 10)] == second.payload()[..], "{kind} {fault}");
        }
    }
}

#[test]
fn a_target_that_somebody_else_wrote_to_is_not_written_again() {
    let (dir, mut bench) = small("web.vmdk");
    let mut agent = bench.opened();
    let sequence = agent.delta(&bench, &[Record::data(0, pattern(1, 4096))]);
    agent.until_durable(&bench, sequence);
    // Somebody who respects no locks puts another file in its place.
    let flat = dir.path().join("web-flat.vmdk");
    std::fs::copy(&flat, dir.path().join("copy")).unwrap();
    std::fs::rename(dir.path().join("copy"), &flat).unwrap();
    agent.delta(&bench, &[Record::data(8, pattern(2, 4096))]);
    let text = agent.until_error(&bench, ErrorCode::Target);
    assert!(text.contains("moved or replaced by somebody else"), "{text}");
    bench.stop();
    assert_eq!(bench.saved().sequence, sequence);
    assert!(content(&bench)[4096..8192].iter().all(|byte| *byte == 0));
}

#[test]
fn an_open_flat_target_is_locked_against_image_tools_and_other_daemons() {
    let (dir, mut bench) = small("web.vmdk");
    let second =
        open_target(&bench.opener, &bench.spec, &Expectation { writable: true, ..Expectation::default() });
    assert!(second.unwrap_err().to_string().contains("is in use"));
    let Ok(tool) = std::process::Command::new("qemu-io")
        .args(["-f", "vmdk", "-c", "write 0 4k"])
        .arg(dir.path().join("web.vmdk"))
        .output()
    else {
        return eprintln!("qemu-io is not installed: only our own lock was tried");
    };
    let said = String::from_utf8_lossy(&tool.stderr).into_owned();
    assert!(!tool.status.success() && said.contains("lock"), "{said}");
    bench.stop();
}

#[test]
fn every_open_that_writes_changes_the_content_identity_once_and_never_the_uuid() {
    let (dir, mut bench) = small("web.vmdk");
    let facts = |bench: &Bench| {
        let target = open_target(&bench.opener, &bench.spec, &Expectation::default()).unwrap();
        (target.facts().cid, target.facts().uuid)
    };
    let before = facts(&bench);
    bench.restart();
    assert_eq!(facts(&bench), before, "nothing was written");
    let mut agent = bench.opened();
    let mut seen = vec![before.0];
    for number in 0..3 {
        let sequence = agent.delta(&bench, &[Record::data(number * 8, pattern(number, 4096))]);
        agent.until_durable(&bench, sequence);
        seen.push(facts(&bench).0);
    }
    assert!(seen[0] != seen[1] && seen[1] == seen[2] && seen[2] == seen[3], "{seen:?}");
    bench.restart();
    let mut agent = bench.opened();
    let sequence = agent.delta(&bench, &[Record::data(0, pattern(9, 4096))]);
    agent.until_durable(&bench, sequence);
    assert!(!seen.contains(&facts(&bench).0));
    assert_eq!(facts(&bench).1, before.1);
    bench.stop();
    drop(dir);
}
