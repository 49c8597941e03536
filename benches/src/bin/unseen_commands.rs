//! Writes past the block layer's usual way, in a guest that has the devices for it, and asks capture whether it noticed.
//!
//! `unseen_commands KIND:DEVICE...` with the kinds `scsi` (SG_IO), `nvme` (an I/O command by ioctl) and `zoned` (a zone is
//! reset, and appended to through zonefs at MOUNTPOINT, the last argument). Of each: a usual write is seen and the account
//! is clean; the command leaves a range nobody knows, so the account says that the disk must be compared, once. Kind `refused`
//! says why a device cannot be followed. Kind `skipped` has two devices, the first of which completes its writes at once, in
//! the thread that writes, and the second by a timer, in an interrupt, until a completion met another one on its processor and
//! the kernel left its program out: that is counted, and what was in flight explains it. One line for each, the first surprise ends it with status 1. The devices are
//! overwritten. Used by `unseen_test.py`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reprotect_agent::capture::{self, BlockDisk, Capture, CaptureSettings, DiskSlot, Verdict};

const PATIENCE: Duration = Duration::from_secs(20);
/// How long completions may take to meet.
const SKIPPED_WITHIN: Duration = Duration::from_secs(60);
const WRITERS: usize = 8;
const BLOCK_BYTES: usize = 4096;
const SG_IO: libc::c_ulong = 0x2285;
const NVME_IO_CMD: libc::c_ulong = 0xc048_4e43;
const RESET_ZONE: libc::c_ulong = 0x4010_1283;
/// zonefs's superblock: "SFOZ", a checksum, label, identity, features, owner, mode.
const ZONEFS_MAGIC: u32 = 0x5a4f_4653;

/// `struct sg_io_hdr`.
#[repr(C)]
struct ScsiCommand {
    interface: i32,
    direction: i32,
    command_bytes: u8,
    sense_bytes: u8,
    vectors: u16,
    data_bytes: u32,
    data: *mut u8,
    command: *mut u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack: i32,
    user: *mut u8,
    status: u8,
    masked: u8,
    message: u8,
    sense_written: u8,
    host: u16,
    driver: u16,
    rest: i32,
    took_ms: u32,
    info: u32,
}

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    data_bytes: u32,
    words_10: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// A block that direct I/O takes.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

#[expect(unsafe_code, reason = "requests that no library makes")]
fn request<T>(file: &File, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: the argument is of the request's type, and what it points to outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        status => Err(io::Error::other(format!("the device answers {status:#x}"))),
    }
}

/// WRITE (10) of one block at the start.
fn write_scsi(path: &Path) -> io::Result<()> {
    let mut data = Box::new(Block([0x5c; BLOCK_BYTES]));
    let mut command = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    let mut sense = [0; 32];
    let mut wanted = ScsiCommand {
        interface: i32::from(b'S'),
        direction: -2,
        command_bytes: command.len() as u8,
        sense_bytes: sense.len() as u8,
        vectors: 0,
        data_bytes: BLOCK_BYTES as u32,
        data: data.0.as_mut_ptr(),
        command: command.as_mut_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: 20_000,
        flags: 0,
        pack: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked: 0,
        message: 0,
        sense_written: 0,
        host: 0,
        driver: 0,
        rest: 0,
        took_ms: 0,
        info: 0,
    };
    request(&open(path)?, SG_IO, &mut wanted)?;
    match (wanted.status, wanted.host, wanted.driver) {
        (0, 0, 0) => Ok(()),
        other => Err(io::Error::other(format!("the disk answers {other:?}"))),
    }
}

/// A write of one block of 512 bytes at the start.
fn write_nvme(path: &Path) -> io::Result<()> {
    let mut data = Box::new(Block([0x6e; BLOCK_BYTES]));
    let mut wanted = NvmeCommand {
        opcode: 1,
        namespace: 1,
        address: data.0.as_mut_ptr() as u64,
        data_bytes: 512,
        timeout_ms: 20_000,
        ..NvmeCommand::default()
    };
    request(&open(path)?, NVME_IO_CMD, &mut wanted)
}

/// A usual write.
fn write(path: &Path) -> io::Result<()> {
    open(path)?.write_all_at(&Box::new(Block([0x77; BLOCK_BYTES])).0, 0)
}

fn reset_first_zone(path: &Path) -> io::Result<()> {
    let zone_sectors: u64 = fs::read_to_string(format!("/sys/block/{}/queue/chunk_sectors", name(path)))?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    request(&open(path)?, RESET_ZONE, &mut [0, zone_sectors])
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// CRC-32 as zonefs keeps it: without the last inversion.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

/// The disk as zonefs, whose files are its zones; direct writes to them append.
fn make_zonefs(path: &Path) -> io::Result<()> {
    let mut block = Box::new(Block([0; BLOCK_BYTES]));
    block.0[..4].copy_from_slice(&ZONEFS_MAGIC.to_le_bytes());
    block.0[8..19].copy_from_slice(b"reprotect-z");
    block.0[72..88].fill(7);
    block.0[104..108].copy_from_slice(&0o640_u32.to_le_bytes());
    let sum = checksum(&block.0).to_le_bytes();
    block.0[4..8].copy_from_slice(&sum);
    open(path)?.write_all_at(&block.0, 0)
}

fn append(mount: &Path) -> io::Result<()> {
    let file = mount.join("seq/0");
    match open(&file)?.write_all(&Box::new(Block([0x7a; BLOCK_BYTES])).0) {
        // Some kernels 6.1 say so of an append that was done: zonefs looks for it where the next one would go.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
        done => done,
    }
}

struct Watched {
    capture: Capture,
    slot: DiskSlot,
}

impl Watched {
    fn verdict(&mut self) -> io::Result<Verdict> {
        let check = self.capture.check(self.slot, PATIENCE).map_err(io::Error::other)?;
        Ok(check.verdict)
    }

    fn expect_clean(&mut self, after: &str) -> io::Result<()> {
        match self.verdict()? {
            Verdict::Clean { .. } => Ok(()),
            other => Err(io::Error::other(format!("after {after}: {other:?}"))),
        }
    }

    /// Does what has no range, and sees it noticed once.
    fn expect_noticed(&mut self, what: &str, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.expect_clean("nothing")?;
        let written = self.capture.counts(self.slot).written_sectors;
        act().map_err(|error| io::Error::other(format!("{what}: {error}")))?;
        match self.verdict()? {
            Verdict::Unranged { commands } => println!("{what}: noticed, {commands} commands"),
            // It is no command at all then, but what every write is.
            Verdict::Clean { .. } if self.capture.counts(self.slot).written_sectors > written => {
                println!("{what}: this kernel makes a usual write of it, which was seen");
            }
            other => {
                let counts = self.capture.counts(self.slot);
                return Err(io::Error::other(format!("{what} was not noticed: {other:?}, {counts:?}")));
            }
        }
        self.expect_clean("it was told")
    }
}

fn watch(kind: &str, path: &Path, mount: &Path, dir: &Path) -> io::Result<()> {
    if kind == "skipped" {
        return watch_skipped(&path.to_string_lossy(), dir);
    }
    if kind == "refused" {
        let Err(refusal) = BlockDisk::at(path) else { return Err(io::Error::other("it can be followed")) };
        println!("{refusal}");
        return Ok(());
    }
    let mut capture =
        Capture::start(&CaptureSettings::new("unseen", dir.to_owned())).map_err(io::Error::other)?;
    let disk = BlockDisk::at(path).map_err(io::Error::other)?;
    let (slot, _) = capture.follow(disk, "unseen").map_err(io::Error::other)?;
    let mut watched = Watched { capture, slot };
    write(path)?;
    watched.expect_clean("a usual write")?;
    let written = watched.capture.counts(slot).written_sectors;
    if written < 8 {
        return Err(io::Error::other(format!("of 8 sectors written {written} were seen")));
    }
    match kind {
        "scsi" => watched.expect_noticed("SG_IO", || write_scsi(path))?,
        "nvme" => watched.expect_noticed("NVMe I/O command", || write_nvme(path))?,
        _ => {
            watched.expect_noticed("zone reset", || reset_first_zone(path))?;
            make_zonefs(path)?;
            rustix::mount::mount(path, mount, "zonefs", rustix::mount::MountFlags::empty(), None)?;
            // Mounting may open and close zones.
            let _settled = watched.verdict()?;
            let appended = watched.expect_noticed("zone append", || append(mount));
            rustix::mount::unmount(mount, rustix::mount::UnmountFlags::empty())?;
            appended?;
        }
    }
    drop(watched);
    capture::let_go("unseen").map_err(io::Error::other)?;
    Ok(())
}

/// Writes to both until the kernel has left out a run.
fn watch_skipped(paths: &str, dir: &Path) -> io::Result<()> {
    let paths: Vec<&Path> = paths.split(',').map(Path::new).collect();
    let mut capture =
        Capture::start(&CaptureSettings::new("unseen", dir.to_owned())).map_err(io::Error::other)?;
    let mut slots = Vec::new();
    for path in &paths {
        let disk = BlockDisk::at(path).map_err(io::Error::other)?;
        slots.push(capture.follow(disk, &name(path)).map_err(io::Error::other)?.0);
    }
    let (mut skipped, until, stop) = (0, Instant::now() + SKIPPED_WITHIN, AtomicBool::new(false));
    std::thread::scope(|scope| -> io::Result<()> {
        let keep_writing = |path: &Path| -> io::Result<()> {
            let (file, block) = (open(path)?, Box::new(Block([1; BLOCK_BYTES])));
            while !stop.load(Ordering::Relaxed) {
                file.write_all_at(&block.0, 0)?;
            }
            Ok(())
        };
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let path = paths[number % paths.len()];
                scope.spawn(move || keep_writing(path))
            })
            .collect();
        while skipped == 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
            skipped = capture.newly_skipped().map_err(io::Error::other)?;
        }
        stop.store(true, Ordering::Relaxed);
        writers
            .into_iter()
            .try_for_each(|writer| writer.join().map_err(|_| io::Error::other("a writer panicked"))?)
    })?;
    if skipped == 0 {
        return Err(io::Error::other("the kernel left out no run"));
    }
    let mut verdicts = Vec::new();
    for slot in slots {
        let check = capture.check(slot, PATIENCE).map_err(io::Error::other)?;
        // A write that found no place among those in flight leaves nothing there to explain it: that is a miss, and told.
        let counts = capture.counts(slot);
        let unexplained = counts.full * (BLOCK_BYTES as u64 >> 9);
        let right = match check.verdict {
            Verdict::Clean { .. } => true,
            Verdict::Short { sectors } => sectors <= unexplained,
            Verdict::Undecided | Verdict::Behind { .. } | Verdict::Unranged { .. } => false,
        };
        if !right {
            let told =
                format!("what was left out is not explained: {check:?}; {counts:?}; {:?}", capture.costs());
            return Err(io::Error::other(told));
        }
        verdicts.push(check.verdict);
    }
    println!("left out: {skipped} runs counted; {verdicts:?}");
    drop(capture);
    capture::let_go("unseen").map_err(io::Error::other)?;
    Ok(())
}

fn main() -> ExitCode {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let (Some(mount), dir) = (words.pop().map(PathBuf::from), std::env::temp_dir()) else {
        eprintln!("usage: unseen_commands KIND:DEVICE... MOUNTPOINT");
        return ExitCode::from(2);
    };
    for word in &words {
        let Some((kind, path)) = word.split_once(':') else {
            eprintln!("unseen_commands: {word} is no KIND:DEVICE");
            return ExitCode::from(2);
        };
        if let Err(error) = watch(kind, Path::new(path), &mount, &dir) {
            eprintln!("unseen_commands: {word}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
