//! Writes to a live file system in a guest, which has no Python: what `live.py` does on this host, in one small program.
//!
//! `live_writer FOLDER SEED SECONDS` runs until it is ended, at most SECONDS. One thread writes each number to `a`, makes it durable,
//! and only then to `b`, as 16 bytes, number and complement, at a place that changes (`live.py` reads them again). Another
//! writes 512 bytes to 128 KiB at random places of `scattered`: buffered, synced, past the page cache, and holes.
//! The first error ends it with status 1: a disk that fails is not what the test is about. Used by `guest_test.py`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use reprotect_benches::Seeded;
use rustix::fs::{FallocateFlags, OFlags, fallocate};

const RECORD_STRIDE_BYTES: u64 = 4096;
const RECORDS: u64 = 4096;
const SCATTERED_BYTES: u64 = 16 << 20;
const PIECE_BYTES_MAX: u64 = 128 << 10;
/// Without a pause a guest in software does nothing but make its journal durable.
const BETWEEN: Duration = Duration::from_millis(10);
const PAGE_BYTES: usize = 4096;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [folder, seed, seconds] = words.as_slice() else {
        eprintln!("usage: live_writer FOLDER SEED SECONDS");
        return ExitCode::from(2);
    };
    let (Ok(seed), Ok(seconds)) = (seed.parse::<u64>(), seconds.parse()) else {
        eprintln!("live_writer: SEED and SECONDS are numbers");
        return ExitCode::from(2);
    };
    let (folder, end) = (Path::new(folder), Instant::now() + Duration::from_secs(seconds));
    let result = std::thread::scope(|scope| {
        let scattered = scope.spawn(|| scatter(folder, seed | 1, end));
        let ordered = in_order(folder, end);
        ordered.and(scattered.join().unwrap_or_else(|_| Err(io::Error::other("the other thread panicked"))))
    });
    if let Err(error) = result {
        eprintln!("live_writer: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Each number to A, durable, and then to B. Goes on after the newest number that A has.
fn in_order(folder: &Path, end: Instant) -> io::Result<()> {
    let open =
        |name| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(folder.join(name));
    let (a, b) = (open("a")?, open("b")?);
    let mut number = newest(&a)?;
    // After a crash B may be one behind.
    put(&b, number)?;
    while Instant::now() < end {
        number += 1;
        put(&a, number)?;
        put(&b, number)?;
        std::thread::sleep(BETWEEN);
    }
    Ok(())
}

fn put(file: &File, number: u64) -> io::Result<()> {
    let mut record = [0; 16];
    let (head, tail) = record.split_at_mut(8);
    head.copy_from_slice(&number.to_le_bytes());
    tail.copy_from_slice(&(!number).to_le_bytes());
    file.write_all_at(&record, number % RECORDS * RECORD_STRIDE_BYTES)?;
    file.sync_all()
}

fn newest(file: &File) -> io::Result<u64> {
    let (mut best, mut record) = (0, [0; 8]);
    for place in 0..RECORDS {
        if file.read_at(&mut record, place * RECORD_STRIDE_BYTES)? == record.len() {
            best = best.max(u64::from_le_bytes(record));
        }
    }
    Ok(best)
}

/// Pieces of every size at random places, by every way that a program has.
fn scatter(folder: &Path, seed: u64, end: Instant) -> io::Result<()> {
    let path = folder.join("scattered");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    file.set_len(SCATTERED_BYTES)?;
    let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(io::Error::other)?;
    let direct = OpenOptions::new().write(true).custom_flags(flags).open(&path)?;
    let mut seeded = Seeded::new(seed);
    let mut memory = vec![0u8; PIECE_BYTES_MAX as usize + PAGE_BYTES];
    // Past the page cache memory has to be aligned, too.
    let aligned = memory.as_ptr().align_offset(PAGE_BYTES);
    let Some(buffer) = memory.get_mut(aligned..) else { return Err(io::Error::other("no aligned memory")) };
    while Instant::now() < end {
        let length = 512 << (seeded.next_u64() % 9);
        let at = seeded.next_u64() % (SCATTERED_BYTES - length) / 512 * 512;
        let Some(piece) = buffer.get_mut(..length as usize) else { continue };
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&seeded.next_u64().to_le_bytes());
        }
        match seeded.next_u64() % 8 {
            0 => file.write_all_at(piece, at).and_then(|()| file.sync_data())?,
            1 | 2 if length >= PAGE_BYTES as u64 => {
                direct.write_all_at(piece, at / PAGE_BYTES as u64 * PAGE_BYTES as u64)?;
            }
            3 => fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length)?,
            _ => file.write_all_at(piece, at)?,
        }
        std::thread::sleep(Duration::from_millis(seeded.next_u64() % 100));
    }
    file.sync_all()
}
