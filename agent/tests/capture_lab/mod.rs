//! A laboratory for capture: loop devices in the machine, file systems on them, load from fio, copies to compare.
//!
//! Called by the `capture_*` tests. What is missing on the machine is told as `SKIPPED: …`. Everything that is made here is
//! taken away again when the value is dropped, newest first.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses its part")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail in the files that use everything")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use reprotect_agent::capture::{
    BlockDisk, Capture, CaptureError, CaptureSettings, DiskSlot, Record, WindowSink, let_go,
};
use reprotect_engine::range_set::RangeSet;

/// Longer than anything here takes; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Alignment of direct reads.
const ALIGN: usize = 4096;

static MACHINE: Mutex<()> = Mutex::new(());

/// One test at a time measures the machine; poisoned by a failed one, which is no reason for the next to fail.
pub fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether capture can be tested here; says why not.
pub fn capable() -> bool {
    for program in ["losetup", "mkfs.ext4", "mkfs.xfs", "fio"] {
        if !Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .output()
            .unwrap()
            .status
            .success()
        {
            println!("SKIPPED: {program} is missing");
            return false;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    match Captured::start(&CaptureSettings::new("probe", dir.path().to_owned())) {
        Ok(_) => true,
        Err(CaptureError::InUse { .. }) => true,
        Err(error) => {
            println!("SKIPPED: {error}");
            false
        }
    }
}

/// Runs a program to its end, which must be a success.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device over a sparse file.
pub struct Loop {
    pub path: PathBuf,
    image: PathBuf,
}

impl Loop {
    pub fn new(dir: &Path, name: &str, mib: u64) -> Self {
        let image = dir.join(name);
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let image_text = image.display().to_string();
        let path = run("losetup", &["-f", "--show", "--direct-io=on", &image_text]);
        Self::over(image, path)
    }

    /// Over a file that exists.
    pub fn existing(image: &Path) -> Self {
        let path = run("losetup", &["-f", "--show", "--direct-io=on", image.to_str().unwrap()]);
        Self::over(image.to_owned(), path)
    }

    fn over(image: PathBuf, path: String) -> Self {
        // The mark stays with the number of a loop device, whoever set it.
        run("blockdev", &["--setrw", &path]);
        let device = Self { path: path.into(), image };
        device.reset_queue();
        device
    }

    /// So does the state of its queue. A change of the scheduler makes the kernel say that there is room for as many requests
    /// as usual, where there is still what somebody left; only another number makes it so.
    fn reset_queue(&self) {
        let usual = [("scheduler", "none"), ("nr_requests", "64"), ("nr_requests", "128"), ("iostats", "1")];
        for (attribute, value) in usual {
            let _as_it_is = std::fs::write(format!("/sys/block/{}/queue/{attribute}", self.name()), value);
        }
    }

    pub fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }

    pub fn queue(&self, attribute: &str, value: &str) {
        std::fs::write(format!("/sys/block/{}/queue/{attribute}", self.name()), value).unwrap();
    }

    pub fn disk(&self) -> BlockDisk {
        BlockDisk::at(&self.path).unwrap()
    }

    /// Grows the image and tells the device.
    pub fn grow(&self, mib: u64) {
        OpenOptions::new().write(true).open(&self.image).unwrap().set_len(mib << 20).unwrap();
        run("losetup", &["-c", self.path.to_str().unwrap()]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.reset_queue();
        let _ended = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// A mounted file system.
pub struct Mounted {
    pub at: PathBuf,
}

impl Mounted {
    pub fn new(dir: &Path, device: &Loop, file_system: &str) -> Self {
        let path = device.path.to_str().unwrap();
        match file_system {
            "ext4" => run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,nodiscard", path]),
            _ => run("mkfs.xfs", &["-q", "-f", "-K", path]),
        };
        Self::existing(dir, device)
    }

    pub fn existing(dir: &Path, device: &Loop) -> Self {
        let at = dir.join(format!("mnt-{}", device.name()));
        std::fs::create_dir_all(&at).unwrap();
        run("mount", &[device.path.to_str().unwrap(), at.to_str().unwrap()]);
        Self { at }
    }

    pub fn unmount(self) {}
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ended = Command::new("umount").arg(&self.at).status();
    }
}

/// A program that is ended with the value.
pub struct Running(pub Child);

impl Running {
    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    pub fn wait(mut self) {
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _killed = self.0.kill();
        let _ended = self.0.wait();
    }
}

/// fio with several jobs over a mounted file system: direct, buffered with fsync, mapped, 512 B to 1 MiB; each as fast as it
/// may (`0`: as it can).
pub fn fio_mix(mount: &Path, seed: u64, seconds: u64, rate: &str) -> Running {
    let (dir, seed, seconds) = (mount.display().to_string(), seed.to_string(), seconds.to_string());
    let global = format!(
        "[global]\ndirectory={dir}\ntime_based=1\nruntime={seconds}\nrandseed={seed}\nsize=24m\nrate={rate}\ngroup_reporting=1\n\
         [direct]\nioengine=libaio\ndirect=1\nrw=randwrite\nbsrange=4k-256k\niodepth=32\nnumjobs=1\n\
         [buffered]\nioengine=psync\nrw=randwrite\nbsrange=512-64k\nbs_unaligned=1\nfsync=16\n\
         [mapped]\nioengine=mmap\nrw=randwrite\nbs=4k\nfsync=64\n\
         [large]\nioengine=psync\nrw=write\nbs=1m\nfdatasync=2\n"
    );
    fio(&global)
}

/// fio on the bare device: overlapping direct writes of all sizes, and discards.
pub fn fio_raw(device: &Path, seed: u64, seconds: u64, discards: bool) -> Running {
    let (path, trim) = (device.display().to_string(), if discards { "randtrimwrite" } else { "randwrite" });
    fio(&format!(
        "[global]\nfilename={path}\ntime_based=1\nruntime={seconds}\nrandseed={seed}\ndirect=1\nioengine=libaio\n\
         [small]\nrw=randwrite\nbsrange=512-16k\nblockalign=512\niodepth=64\nnorandommap=1\n\
         [large]\nrw={trim}\nbs=256k\niodepth=4\nnorandommap=1\n\
         [hot]\nrw=randwrite\nbs=4k\niodepth=32\nsize=1m\nnorandommap=1\n"
    ))
}

/// fio with a job file.
pub fn fio(jobs: &str) -> Running {
    let mut child = Command::new("fio")
        .args(["--output=/dev/null", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(jobs.as_bytes()).unwrap();
    Running(child)
}

/// A device read past the page cache.
pub struct Direct {
    file: File,
    buffer: Vec<u8>,
    start: usize,
}

/// Largest direct read.
const READ_BYTES: usize = 1 << 20;

impl Direct {
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let buffer = vec![0; READ_BYTES + ALIGN];
        let start = buffer.as_ptr().align_offset(ALIGN);
        Self { file, buffer, start }
    }

    pub fn read(&mut self, offset: u64, len: usize) -> &[u8] {
        let slice = &mut self.buffer[self.start..self.start + len];
        self.file.read_exact_at(slice, offset).unwrap();
        slice
    }

    pub fn write(&mut self, offset: u64, fill: u8, len: usize) -> std::io::Result<()> {
        let slice = &mut self.buffer[self.start..self.start + len];
        slice.fill(fill);
        self.file.write_all_at(slice, offset)
    }

    /// Copies ranges to the same place of `copy`.
    pub fn copy_ranges(&mut self, ranges: &RangeSet, copy: &File) {
        for range in ranges.iter() {
            let (mut at, end) = (range.byte_start(), range.byte_start() + range.bytes());
            while at < end {
                let len = READ_BYTES.min((end - at) as usize);
                copy.write_all_at(self.read(at, len), at).unwrap();
                at += len as u64;
            }
        }
    }

    pub fn size(&mut self) -> u64 {
        self.file.seek(SeekFrom::End(0)).unwrap()
    }
}

/// A device written past the page cache by somebody who does not wait for room in its queue.
pub struct Nowait(Direct);

impl Nowait {
    pub fn open(path: &Path) -> Self {
        Self(Direct::open(path))
    }

    /// Writes 4 KiB; an error where there is no room now.
    pub fn write(&mut self, offset: u64, fill: u8) -> std::io::Result<()> {
        let Direct { file, buffer, start } = &mut self.0;
        let slice = &mut buffer[*start..*start + 4096];
        slice.fill(fill);
        let bytes = [std::io::IoSlice::new(slice)];
        let written = rustix::io::pwritev2(file, &bytes, offset, rustix::io::ReadWriteFlags::NOWAIT)?;
        assert_eq!(written, 4096);
        Ok(())
    }
}

/// Memory in large pages, of which the kernel makes long requests.
pub struct Huge {
    start: *mut u8,
    length: usize,
}

/// Length and alignment of a large page.
const HUGE_BYTES: usize = 2 << 20;

impl Huge {
    #[expect(unsafe_code, reason = "mapping memory")]
    /// As many as so many bytes need, filled block by block.
    pub fn new(length: usize, fill: impl Fn(usize) -> u8) -> Self {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let (none, length) = (std::ptr::null_mut(), length.next_multiple_of(HUGE_BYTES));
        // SAFETY: a new mapping, never given back, of which the part from the first large page on is used.
        unsafe {
            let start = mmap_anonymous(none, length + HUGE_BYTES, access, MapFlags::PRIVATE).unwrap();
            let start = start.cast::<u8>();
            let start = start.add(start.align_offset(HUGE_BYTES));
            let _no_matter = madvise(start.cast(), length, Advice::LinuxHugepage);
            for block in 0..length / ALIGN {
                start.add(block * ALIGN).write_bytes(fill(block), ALIGN);
            }
            Self { start, length }
        }
    }

    #[expect(unsafe_code, reason = "a view of mapped memory")]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped and written above.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

/// The whole device as it is now.
pub fn image(device: &Path, to: &Path) -> File {
    let mut copy = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(to).unwrap();
    let mut direct = Direct::open(device);
    let size = direct.size();
    let mut at = 0;
    while at < size {
        let len = READ_BYTES.min((size - at) as usize);
        copy.write_all(direct.read(at, len)).unwrap();
        at += len as u64;
    }
    copy.seek(SeekFrom::Start(0)).unwrap();
    copy
}

/// Blocks of 4 KiB in which the device and the copy differ.
pub fn differences(device: &Path, copy: &File) -> Vec<u64> {
    let mut direct = Direct::open(device);
    let size = direct.size();
    let mut other = vec![0; READ_BYTES];
    let (mut at, mut found) = (0, Vec::new());
    while at < size {
        let len = READ_BYTES.min((size - at) as usize);
        let here = direct.read(at, len);
        copy.read_exact_at(&mut other[..len], at).unwrap();
        for (index, (a, b)) in here.chunks(4096).zip(other[..len].chunks(4096)).enumerate() {
            if a != b {
                found.push(at / 4096 + index as u64);
            }
        }
        at += len as u64;
    }
    found
}

/// A seed, printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let mut bytes = [0; 8];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(u64::from_le_bytes(bytes) >> 32);
    println!("SEED={seed}");
    seed
}

/// Asks until it is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A capture of its own.
pub fn capture(instance: &str, dir: &Path) -> Captured {
    let settings = CaptureSettings::new(instance, dir.to_owned());
    Captured::start(&CaptureSettings { test_hooks: true, ..settings }).unwrap()
}

/// Takes the place of that name out of the kernel when the test ends, however it does.
pub struct Place(String);

impl Place {
    pub fn new(instance: &str) -> Self {
        Self(instance.to_owned())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            let _removed = let_go(&self.0);
        }
    }
}

/// Capture that is taken out of the kernel with the value.
pub struct Captured {
    // Dropped in this order.
    capture: Capture,
    place: Place,
}

impl Captured {
    pub fn start(settings: &CaptureSettings) -> Result<Self, CaptureError> {
        let capture = Capture::start(settings)?;
        Ok(Self { capture, place: Place::new(&settings.instance) })
    }

    /// As an agent that stops: the next one goes on from here.
    pub fn leave(mut self) {
        self.place.0.clear();
        self.capture.leave().unwrap();
    }

    /// As an agent that is killed.
    pub fn kill(mut self) {
        self.place.0.clear();
    }
}

impl Deref for Captured {
    type Target = Capture;

    fn deref(&self) -> &Capture {
        &self.capture
    }
}

impl DerefMut for Captured {
    fn deref_mut(&mut self) -> &mut Capture {
        &mut self.capture
    }
}

/// A device in memory whose writes take their time. Its reads do not overtake them on the way through the loop device, so who
/// wants that reads `file`, which is the same memory.
pub struct Slow {
    device: Option<Loop>,
    pub file: PathBuf,
    mount: PathBuf,
    server: Child,
}

impl Slow {
    pub fn new(dir: &Path, mib: u64, write_ms: u64) -> Self {
        let mount = dir.join("slow");
        std::fs::create_dir_all(&mount).unwrap();
        let (size, delay) = (format!("{mib}M"), format!("wdelay={write_ms}ms"));
        let server = Command::new("nbdfuse")
            .arg(&mount)
            .args(["--command", "nbdkit", "-s", "--filter=delay", "memory", &size, &delay])
            .spawn()
            .unwrap();
        let file = mount.join("nbd");
        until("the slow device is there", || file.exists());
        Self { device: Some(Loop::existing(&file)), file, mount, server }
    }

    pub fn device(&self) -> &Loop {
        self.device.as_ref().unwrap()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // The loop device holds the file, so it goes first.
        self.device = None;
        let _unmounted = Command::new("umount").arg("-l").arg(&self.mount).status();
        let _killed = self.server.kill();
        let _ended = self.server.wait();
    }
}

/// Whether slow devices can be made here; says why not.
pub fn has_slow_devices() -> bool {
    let found = Command::new("sh").args(["-c", "command -v nbdkit && command -v nbdfuse"]).output().unwrap();
    if !found.status.success() {
        println!("SKIPPED: nbdkit or nbdfuse is missing");
    }
    found.status.success()
}

/// Takes everything of a window and keeps nothing.
pub struct Nothing;

impl WindowSink for Nothing {
    fn read(&mut self, _: DiskSlot, _: &RangeSet) -> Result<(), CaptureError> {
        Ok(())
    }
    fn record(&mut self, _: &Record<'_>) -> Result<(), CaptureError> {
        Ok(())
    }
}
