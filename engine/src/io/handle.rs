//! What the file backends share: opening, alignment, zeroing, mapping, and the memory of a failure.
//!
//! Invariants: a handle holds up to two descriptors of one inode, one direct and one through the page cache; only
//! transfers whose offset, length and memory fit the device go to the direct one. Of one call, everything direct
//! completes before anything buffered begins: a buffered write of part of a page would otherwise write back stale
//! neighbours over what went to the medium directly. The kernel keeps the two coherent between calls. A failed
//! write or flush is remembered and refuses every later change (I6); a full medium is not such a failure.
//! Units: bytes. Called by `file.rs` and `uring.rs` only.
#![expect(unsafe_code, reason = "a lock and an ioctl that no safe wrapper offers")]

use std::fs::{File, OpenOptions as StdOpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::open::OpenOptions;
use super::plan::{Alignment, Buffer, PIECE_BYTES_MAX, Plan, Route};
use super::{BlockError, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::units::BLOCK_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// An open file or block device.
#[derive(Debug)]
pub(super) struct Handle {
    name: String,
    kind: Kind,
    size_bytes: u64,
    writable: bool,
    buffered: File,
    direct: Option<(File, Alignment)>,
    failed: Option<String>,
}

impl Handle {
    pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        let name = path.display().to_string();
        Self::open_named(path, &name, options).map_err(|source| BlockError {
            name,
            op: BlockOp::Open,
            offset: 0,
            len: 0,
            source,
        })
    }

    fn open_named(path: &Path, name: &str, options: &OpenOptions) -> io::Result<Self> {
        // Looked at before it is opened: opening a FIFO or a terminal by mistake would hang.
        let before = std::fs::metadata(path)?;
        let is_device = before.file_type().is_block_device();
        if !is_device && !before.is_file() {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "neither a regular file nor a block device; name a disk, a partition or an image file",
            ));
        }
        let exclusive = if options.exclusive && is_device { libc::O_EXCL } else { 0 };
        let buffered = StdOpenOptions::new()
            .read(true)
            .write(options.write)
            .custom_flags(libc::O_CLOEXEC | exclusive)
            .open(path)
            .map_err(|error| explain_open(error, options))?;
        let meta = buffered.metadata()?;
        if (before.dev(), before.ino(), before.rdev()) != (meta.dev(), meta.ino(), meta.rdev()) {
            return Err(io::Error::other("replaced while it was being opened; try again"));
        }
        let kind = if is_device { Kind::Device } else { Kind::File };
        if kind == Kind::Device && options.write && is_read_only(&buffered)? {
            // The kernel opens such a device for writing all the same, and refuses each write.
            return Err(io::Error::new(
                ErrorKind::ReadOnlyFilesystem,
                "it may not be written: the device is set read-only; clear that (blockdev --setrw) or attach another",
            ));
        }
        if options.exclusive && kind == Kind::File {
            lock_file(&buffered, options.write)?;
        }
        let size_bytes = match kind {
            Kind::File => meta.len(),
            Kind::Device => rustix::fs::seek(&buffered, SeekFrom::End(0))?,
        };
        let direct =
            if options.direct { open_direct(path, options.write, &buffered, size_bytes)? } else { None };
        let name = name.to_owned();
        Ok(Self { name, kind, size_bytes, writable: options.write, buffered, direct, failed: None })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    pub(super) fn buffered(&self) -> &File {
        &self.buffered
    }

    /// The descriptor for a route, and the alignment a continued transfer must keep.
    pub(super) fn descriptor(&self, route: Route) -> (&File, u64) {
        match (&self.direct, route) {
            (Some((file, alignment)), Route::Direct | Route::Bounce) => (file, alignment.offset),
            _ => (&self.buffered, 1),
        }
    }

    pub(super) fn error(&self, op: BlockOp, range: ByteRange, source: io::Error) -> BlockError {
        BlockError { name: self.name.clone(), op, offset: range.start, len: range.len(), source }
    }

    /// Remembers the failure of a change; passes the result on.
    pub(super) fn note<T>(&mut self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(error) = &result {
            let fatal = match error.op {
                BlockOp::Flush => true,
                BlockOp::Write | BlockOp::Zero => !error.is_full(),
                BlockOp::Open | BlockOp::Read | BlockOp::Map => false,
            };
            if fatal && self.failed.is_none() {
                self.failed = Some(format!("{} failed before ({})", error.op, error.source));
            }
        }
        result
    }

    /// Refuses a change to a file that is read-only or has failed.
    pub(super) fn check_changeable(&self, op: BlockOp) -> Result<(), BlockError> {
        let whole = ByteRange { start: 0, end: 0 };
        if !self.writable {
            let why = io::Error::new(ErrorKind::PermissionDenied, "it was opened for reading only");
            return Err(self.error(op, whole, why));
        }
        match &self.failed {
            None => Ok(()),
            Some(why) => {
                let why = format!("{why}; nothing more is written until it is reopened and verified");
                Err(self.error(op, whole, io::Error::other(why)))
            }
        }
    }

    fn check_range(&self, op: BlockOp, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes => Ok(ByteRange { start: offset, end }),
            _ => {
                let why = format!("beyond its end at byte {}", self.size_bytes);
                let range = ByteRange { start: offset, end: offset.saturating_add(len) };
                Err(self.error(op, range, io::Error::new(ErrorKind::InvalidInput, why)))
            }
        }
    }

    /// Cuts reads into pieces; refuses the whole batch if one lies outside the file.
    pub(super) fn plan_reads<'a>(&self, reads: &'a mut [ReadAt<'_>]) -> Result<Plan<'a>, BlockError> {
        let direct = self.direct.as_ref().map(|(_, alignment)| *alignment);
        let mut plan = Plan::default();
        for read in reads {
            self.check_range(BlockOp::Read, read.offset, read.data.len() as u64)?;
            plan.cut(read.offset, Buffer::Read(read.data), direct);
        }
        Ok(plan)
    }

    /// Cuts writes into pieces; refuses the whole batch if one lies outside the file.
    pub(super) fn plan_writes<'a>(&self, writes: &'a [WriteAt<'_>]) -> Result<Plan<'a>, BlockError> {
        let direct = self.direct.as_ref().map(|(_, alignment)| *alignment);
        let mut plan = Plan::default();
        for write in writes {
            self.check_range(BlockOp::Write, write.offset, write.data.len() as u64)?;
            plan.cut(write.offset, Buffer::Write(write.data), direct);
        }
        Ok(plan)
    }

    /// Zeroes `range`: as a hole where the medium can, as an unwritten extent else; `Ok(false)` when it can
    /// neither and zeros must be written.
    fn zero_by_kernel(&self, range: ByteRange) -> Result<bool, BlockError> {
        // On a block device both take the path of BLKZEROOUT and BLKDISCARD-with-zeros in the kernel, and unlike
        // those ioctls they keep the page cache coherent.
        for flags in [
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        ] {
            loop {
                match rustix::fs::fallocate(&self.buffered, flags, range.start, range.len()) {
                    Ok(()) => return Ok(true),
                    Err(Errno::INTR) => {}
                    Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => break,
                    Err(errno) => return Err(self.error(BlockOp::Zero, range, errno.into())),
                }
            }
        }
        Ok(false)
    }

    /// Makes `range` read as zeros. `write` writes zeros where the kernel has no better way.
    pub(super) fn zero(
        &mut self,
        range: ByteRange,
        mut write: impl FnMut(&mut Self, &[WriteAt<'_>]) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        self.check_changeable(BlockOp::Zero)?;
        let range = self.check_range(BlockOp::Zero, range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        // Devices zero whole logical blocks only; 4 KiB suits all of them.
        let unit = if self.kind == Kind::Device { BLOCK_BYTES } else { 1 };
        let middle = ByteRange {
            start: range.start.next_multiple_of(unit).min(range.end),
            end: (range.end / unit * unit).max(range.start),
        };
        let by_kernel = if middle.is_empty() {
            false
        } else {
            let result = self.zero_by_kernel(middle);
            self.note(result)?
        };
        let rest = if by_kernel {
            [
                ByteRange { start: range.start, end: middle.start },
                ByteRange { start: middle.end, end: range.end },
            ]
        } else {
            [range, ByteRange { start: range.end, end: range.end }]
        };
        let zeros = ZEROS.get();
        for part in rest {
            let mut at = part.start;
            while at < part.end {
                let len = (part.end - at).min(PIECE_BYTES_MAX as u64);
                write(self, &[WriteAt { offset: at, data: &zeros[..len as usize] }])?;
                at += len;
            }
        }
        Ok(())
    }

    /// The parts of `range` that may hold something: data extents of a file, everything of a device.
    pub(super) fn allocated(&self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let range = self.check_range(BlockOp::Map, range.start, range.len())?;
        if self.kind == Kind::Device || range.is_empty() {
            return Ok(if range.is_empty() { Vec::new() } else { vec![range] });
        }
        let mut found: Vec<ByteRange> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let start = match rustix::fs::seek(&self.buffered, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break, // a hole up to the end
                Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                    push_joined(&mut found, ByteRange { start: at, end: range.end });
                    break; // a file system without holes
                }
                Err(errno) => return Err(self.error(BlockOp::Map, range, errno.into())),
            };
            if start >= range.end {
                break;
            }
            let end = rustix::fs::seek(&self.buffered, SeekFrom::Hole(start))
                .map_err(|errno| self.error(BlockOp::Map, range, errno.into()))?;
            // Never at or before `start`; the `max` keeps the loop finite should a file system disagree.
            let end = end.max(start + 1).min(range.end);
            push_joined(&mut found, ByteRange { start, end });
            at = end;
        }
        Ok(found)
    }
}

/// One MiB of zeros for media that cannot zero by themselves; aligned, so that no bounce buffer is needed.
#[repr(C, align(4096))]
struct Zeros([u8; PIECE_BYTES_MAX]);
static ZEROS: Zeros = Zeros([0; PIECE_BYTES_MAX]);

impl Zeros {
    fn get(&self) -> &[u8] {
        &self.0
    }
}

fn push_joined(found: &mut Vec<ByteRange>, next: ByteRange) {
    match found.last_mut() {
        Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
        _ => found.push(next),
    }
}

fn explain_open(error: io::Error, options: &OpenOptions) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EBUSY) if options.exclusive => io::Error::new(
            ErrorKind::ResourceBusy,
            "in use by another process or mounted; unmount it or stop what uses it",
        ),
        Some(libc::EROFS | libc::EACCES | libc::EPERM) if options.write => io::Error::new(
            error.kind(),
            format!("it may not be written ({error}); check its permissions and that it is not read-only"),
        ),
        _ => error,
    }
}

fn is_read_only(device: &File) -> io::Result<bool> {
    const BLKROGET: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 94);
    // SAFETY: BLKROGET writes one `int` and nothing else.
    let flag =
        unsafe { rustix::ioctl::ioctl(device, rustix::ioctl::Getter::<BLKROGET, libc::c_int>::new()) }?;
    Ok(flag != 0)
}

/// How often a lock is tried, and the pause between two tries.
const LOCK_TRIES: u32 = 25;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Locks the whole file for this open file description: for writing against everyone, for reading against writers.
/// The kind of lock hypervisors and image tools take, so they see ours and we see theirs. What was closed a moment ago may
/// live on a little: in the kernel, until a ring has let go of it, or in a child that was forked and did not run yet.
fn lock_file(file: &File, write: bool) -> io::Result<()> {
    for _ in 1..LOCK_TRIES {
        match try_lock_file(file, write) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => std::thread::sleep(LOCK_PAUSE),
            answer => return answer,
        }
    }
    try_lock_file(file, write)
}

fn try_lock_file(file: &File, write: bool) -> io::Result<()> {
    // SAFETY: `flock` is plain data for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if write { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open for the call and `lock` outlives it; F_OFD_SETLK reads one `flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(io::Error::new(
            ErrorKind::ResourceBusy,
            "in use by another process or mounted; stop what has it open",
        )),
        _ => Err(error),
    }
}

/// A second, direct descriptor of the same inode, or `None` where direct I/O does not work.
fn open_direct(
    path: &Path,
    write: bool,
    buffered: &File,
    size_bytes: u64,
) -> io::Result<Option<(File, Alignment)>> {
    let opened = StdOpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_CLOEXEC | libc::O_DIRECT)
        .open(path);
    let Ok(direct) = opened else { return Ok(None) };
    let (a, b) = (buffered.metadata()?, direct.metadata()?);
    if (a.dev(), a.ino(), a.rdev()) != (b.dev(), b.ino(), b.rdev()) {
        return Err(io::Error::other("replaced while it was being opened; try again"));
    }
    let Some(alignment) = reported_alignment(&direct) else { return Ok(None) };
    // Trust, but try: some file systems accept O_DIRECT and then refuse, or report less than they demand.
    let widest = Alignment { offset: BLOCK_BYTES, memory: super::buffer::PAGE_BYTES };
    Ok([alignment, widest]
        .into_iter()
        .find(|alignment| direct_read_works(&direct, *alignment, size_bytes))
        .map(|alignment| (direct, alignment)))
}

/// What the kernel says direct I/O demands here; `None` when it says that it does not work at all.
fn reported_alignment(direct: &File) -> Option<Alignment> {
    let statx = rustix::fs::statx(direct, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(statx) = statx
        && statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let (offset, memory) = (u64::from(statx.stx_dio_offset_align), statx.stx_dio_mem_align as usize);
        let sane = offset.is_power_of_two() && offset <= BLOCK_BYTES && memory.is_power_of_two();
        return (sane && memory <= super::buffer::PAGE_BYTES).then_some(Alignment { offset, memory });
    }
    // Kernels before 6.1 do not tell: a device's logical block is enough, of a file's file system we know nothing.
    let offset = rustix::fs::ioctl_blksszget(direct).map_or(BLOCK_BYTES, u64::from);
    let sane = offset.is_power_of_two() && offset <= BLOCK_BYTES;
    sane.then_some(Alignment { offset, memory: offset.max(512) as usize })
}

fn direct_read_works(direct: &File, alignment: Alignment, size_bytes: u64) -> bool {
    if size_bytes < alignment.offset {
        return true; // nothing will ever be routed there
    }
    let Ok(mut buffer) = super::buffer::PoolBuf::alone(alignment.offset as usize) else { return false };
    // A failing medium is the business of the first real read; only "this does not work here" matters now.
    !matches!(direct.read_at(&mut buffer, 0), Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_medium_leaves_a_file_writable_after_a_failure() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let fail = |op, errno| {
            let mut handle = Handle::open(file.path(), &options).expect("open");
            let error = handle.error(op, ByteRange { start: 0, end: 1 }, io::Error::from_raw_os_error(errno));
            assert!(handle.note::<()>(Err(error)).is_err());
            handle.check_changeable(BlockOp::Write).map_err(|error| error.to_string())
        };
        assert_eq!(fail(BlockOp::Write, libc::ENOSPC), Ok(()));
        assert_eq!(fail(BlockOp::Read, libc::EIO), Ok(()));
        for (op, errno) in
            [(BlockOp::Write, libc::EIO), (BlockOp::Zero, libc::EIO), (BlockOp::Flush, libc::ENOSPC)]
        {
            let refused = fail(op, errno).expect_err("failed");
            assert!(refused.contains("reopened and verified"), "{refused}");
        }
    }
}
