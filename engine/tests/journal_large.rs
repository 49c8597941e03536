//! Windows and rollbacks that are larger than what is read, saved or written in one go: threads work side by side there.
//!
//! Scattered blocks of a disk in memory, several steps of them, a short last block and blocks of zeros among them; what
//! stands on the target and what every point shows is compared with a copy.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
use reprotect_engine::io::{BlockFile, ReadAt, WriteAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::{Content, Write};
use reprotect_engine::store::journal::rollback::rollback;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalSettings};
use reprotect_engine::units::{DiskId, Generation, LineageId, SectorRange, Sequence, Timestamp};

const NOW: Timestamp = Timestamp(1);
const DISK: DiskId = DiskId([5; 16]);
const BLOCK: usize = 4096;
const BLOCKS: u64 = 14_000;
/// The last block is short.
const SECTORS: u64 = BLOCKS * 8 - 3;
const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

type Disk = Vec<u8>;

fn content(block: u64, version: u8) -> Vec<u8> {
    let fill = |at: usize| (block as u8).wrapping_mul(31) ^ version ^ (at / 64) as u8;
    (0..BLOCK).map(fill).collect()
}

/// Writes every block but each third, every eleventh as zeros, to window and copy.
fn scattered(version: u8, copy: &mut Disk) -> Window {
    let mut window = Window::default();
    for block in (0..BLOCKS).filter(|block| block % 3 != u64::from(version) % 3) {
        let range = SectorRange::new(block * 8, ((block + 1) * 8).min(SECTORS));
        let zeros = block % 11 == 0;
        let mut data = if zeros { vec![0; BLOCK] } else { content(block, version) };
        data.truncate(range.bytes() as usize);
        copy[range.byte_start() as usize..][..data.len()].copy_from_slice(&data);
        let content = if zeros { Content::Zeros } else { Content::Data(data.into()) };
        window.put(Write { range, content });
    }
    window
}

fn target(applier: &mut Applier<Box<dyn BlockFile>>) -> Disk {
    let mut data = vec![0; SECTORS as usize * 512];
    applier.target().read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
    data
}

#[test]
fn a_rollback_of_many_steps_shows_the_point_and_goes_forward_again() {
    let files = MemoryFiles::default();
    let (folder, path) = (Path::new("/retention"), Path::new("/datastore/disk"));
    files.opener().create(path, SECTORS * 512).unwrap();
    let mut file = files.opener().open(path, true).unwrap();
    let mut copy: Disk = (0..BLOCKS).flat_map(|block| content(block, 77)).collect();
    copy.truncate(SECTORS as usize * 512);
    file.write(&[WriteAt { offset: 0, data: &copy }]).unwrap();
    file.flush().unwrap();
    let settings = JournalSettings { segment_bytes: 64 << 10 };
    let mut journal = Journal::create(files.opener(), folder, settings, NOW).unwrap();
    let added = DiskAdded { disk: DISK, machine: [7; 16], size_sectors: SECTORS, time: NOW };
    journal.add_disk(added, NOW).unwrap();
    let (mut applier, _) = Applier::open(&journal, DISK, file, None).unwrap();
    let mut points = vec![copy.clone()];
    for version in 1..=3 {
        applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, NOW).unwrap();
        let window = scattered(version, &mut copy);
        applier.apply(&mut journal, u64::from(version), &window, NOW).unwrap();
        journal.commit(NOW).unwrap();
        applier.close_epoch(&mut journal, NOW).unwrap();
        assert!(target(&mut applier) == copy, "window {version}");
        points.push(copy.clone());
    }
    // Each rollback is an undo epoch: back to the beginning, to the first point, and forward to what was newest.
    for (epoch, number, point) in [(1, 0, 0), (1, 1, 1), (3, 3, 3)] {
        let before = target(&mut applier);
        let done = rollback(&mut journal, &mut applier, At::entry(epoch, number), POSITION, NOW).unwrap();
        let differing = before.chunks(BLOCK).zip(points[point].chunks(BLOCK)).filter(|(a, b)| a != b);
        assert_eq!(done.written_bytes, differing.map(|(a, _)| a.len() as u64).sum::<u64>());
        assert!(done.written_bytes > 2 * (16 << 20), "more than two steps");
        assert!(target(&mut applier) == points[point], "point {point}");
    }
}
