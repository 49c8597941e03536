//! The io_uring backend: one ring per file, its queue kept full.
//!
//! Invariants: those of [`BlockFile`] and `handle.rs`, and one of its own: the kernel works in buffers this module
//! has only borrowed, so no call returns, not with an error and not by a panic, before every operation it
//! submitted has completed (`Flight` waits in its `Drop`). A flush is submitted only when nothing is in flight,
//! so no order between operations is ever assumed. Units: bytes. Called through `io::open`.
#![expect(
    unsafe_code,
    reason = "gives the kernel addresses of borrowed buffers; the flight guard waits for them"
)]

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use io_uring::{IoUring, opcode, squeue, types};

use super::buffer::{BufferArena, PAGE_BYTES, PoolBuf};
use super::file::progress;
use super::handle::Handle;
use super::open::OpenOptions;
use super::plan::{BOUNCE_BYTES_MAX, Buffer, Piece, Route};
use super::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};

/// Deepest queue: keeps the ring's own memory and its locked bounce buffers small.
const QUEUE_DEPTH_MAX: u32 = 1024;
/// Largest region the kernel registers as one buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;
/// Most regions registered per ring.
const REGIONS_MAX: usize = 1024;

/// Whether this process may use io_uring with every operation needed here; asked once.
///
/// # Errors
/// The kernel's reason, for the log.
pub fn probe() -> io::Result<()> {
    static ANSWER: OnceLock<Result<(), (ErrorKind, String)>> = OnceLock::new();
    let ask = || -> io::Result<()> {
        let ring = IoUring::new(2)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::ReadFixed::CODE,
            opcode::WriteFixed::CODE,
            opcode::Fsync::CODE,
        ];
        match needed.iter().find(|code| !probe.is_supported(**code)) {
            None => Ok(()),
            Some(code) => Err(io::Error::new(
                ErrorKind::Unsupported,
                format!("the kernel lacks io_uring operation {code}"),
            )),
        }
    };
    ANSWER
        .get_or_init(|| ask().map_err(|error| (error.kind(), error.to_string())))
        .clone()
        .map_err(|(kind, text)| io::Error::new(kind, text))
}

/// A region the kernel has pinned, in the order of registration.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: usize,
    end: usize,
}

/// A file or block device by io_uring.
pub struct UringFile {
    ring: Ring,
    handle: Handle,
}

/// A ring, what is registered with it, and its bounce buffers.
pub(super) struct Ring {
    // Dropped before the arenas: the kernel lets go of registered memory first.
    ring: IoUring,
    depth: usize,
    regions: Vec<Region>,
    arena: Option<Arc<BufferArena>>,
    bounce: Option<Arc<BufferArena>>,
}

impl UringFile {
    /// Opens a regular file or block device.
    ///
    /// # Errors
    /// As for [`super::open::open`], or when io_uring is not permitted here (see [`probe`]).
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        let refused = |source| BlockError {
            name: path.display().to_string(),
            op: BlockOp::Open,
            offset: 0,
            len: 0,
            source,
        };
        let ring = Ring::new(options.queue_depth).map_err(refused)?;
        Self::with_ring(ring, path, options)
    }

    /// As [`Self::open`], with a ring made before, so that its failure can be told from the file's.
    pub(super) fn with_ring(mut ring: Ring, path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        let handle = Handle::open(path, options)?;
        if let Some(arena) = &options.arena {
            ring.register(arena);
        }
        Ok(Self { ring, handle })
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.handle.is_direct()
    }

    /// Whether the arena of the options could be registered with the kernel.
    #[must_use]
    pub fn has_registered_buffers(&self) -> bool {
        !self.ring.regions.is_empty()
    }
}

impl std::fmt::Debug for UringFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringFile")
            .field("handle", &self.handle)
            .field("depth", &self.ring.depth)
            .finish_non_exhaustive()
    }
}

impl BlockFile for UringFile {
    fn size_bytes(&self) -> u64 {
        self.handle.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let mut plan = self.handle.plan_reads(reads)?;
        self.ring.run(&self.handle, &mut plan.direct)?;
        self.ring.run(&self.handle, &mut plan.buffered)
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.ring.write(&mut self.handle, writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        let Self { ring, handle } = self;
        handle.zero(range, |handle, writes| ring.write(handle, writes))
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.handle.check_changeable(BlockOp::Flush)?;
        let result = self
            .ring
            .flush(self.handle.buffered().as_raw_fd())
            .map_err(|error| self.handle.error(BlockOp::Flush, ByteRange { start: 0, end: 0 }, error));
        self.handle.note(result)
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.handle.allocated(range)
    }
}

impl Ring {
    /// A ring of this depth, if this process may have one.
    pub(super) fn new(queue_depth: u32) -> io::Result<Self> {
        probe()?;
        let depth = queue_depth.clamp(1, QUEUE_DEPTH_MAX);
        let ring = IoUring::new(depth)?;
        Ok(Self { ring, depth: depth as usize, regions: Vec::new(), arena: None, bounce: None })
    }

    /// Pins the arena for this ring; without effect where the kernel refuses (locked-memory limit).
    fn register(&mut self, arena: &Arc<BufferArena>) {
        let bytes = arena.slots() * arena.slot_bytes();
        // Regions of whole slots, so that no slot lies in two of them.
        let step = REGISTERED_BYTES_MAX / arena.slot_bytes() * arena.slot_bytes();
        if step == 0 || bytes.div_ceil(step) > REGIONS_MAX {
            return;
        }
        let base = arena.base_address();
        let regions: Vec<Region> = (0..bytes)
            .step_by(step)
            .map(|at| Region { start: base + at, end: base + (at + step).min(bytes) })
            .collect();
        let vectors: Vec<libc::iovec> = regions
            .iter()
            .map(|region| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(region.start),
                iov_len: region.end - region.start,
            })
            .collect();
        // SAFETY: the regions are the arena's allocation, which `self.arena` keeps until after the ring is gone.
        if unsafe { self.ring.submitter().register_buffers(&vectors) }.is_ok() {
            self.regions = regions;
            self.arena = Some(Arc::clone(arena));
        }
    }

    fn write(&mut self, handle: &mut Handle, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        handle.check_changeable(BlockOp::Write)?;
        let mut plan = handle.plan_writes(writes)?;
        let result = self.run(handle, &mut plan.direct).and_then(|()| self.run(handle, &mut plan.buffered));
        handle.note(result)
    }

    /// Runs all pieces, at most `depth` at a time; after a failure nothing new is started.
    fn run(&mut self, handle: &Handle, pieces: &mut [Piece<'_>]) -> Result<(), BlockError> {
        if pieces.is_empty() {
            return Ok(());
        }
        if self.bounce.is_none() && pieces.iter().any(|piece| piece.route == Route::Bounce) {
            let arena = BufferArena::new(self.depth, BOUNCE_BYTES_MAX.next_multiple_of(PAGE_BYTES));
            let whole = pieces[0].range();
            self.bounce =
                Some(arena.map_err(|error| handle.error(pieces[0].op(), whole, io::Error::other(error)))?);
        }
        let mut flight = Flight::new(&mut self.ring, self.depth.min(pieces.len()));
        // Completions are taken by handfuls: each wake-up and each submission costs as much as a small transfer. Once
        // nothing is left to start, all that is in flight is waited for at once.
        let handful = (flight.slots.len() / 4).max(1);
        let mut next = 0;
        let mut first_error = None;
        loop {
            while first_error.is_none() && next < pieces.len() && flight.in_flight < flight.slots.len() {
                let started =
                    flight.start(handle, &mut pieces[next], next, &self.regions, self.bounce.as_ref());
                if let Err(error) = started {
                    first_error = Some(handle.error(pieces[next].op(), pieces[next].range(), error));
                }
                next += 1;
            }
            if flight.in_flight == 0 {
                return first_error.map_or(Ok(()), Err);
            }
            let rest = first_error.is_some() || next == pieces.len();
            let wanted = if rest { flight.in_flight } else { handful.min(flight.in_flight) };
            for (slot, result) in flight.wait(wanted) {
                let Some(landed) = flight.land(slot, result) else { continue };
                let outcome = landed.map(|operation| operation.finish(&mut pieces[operation.piece]));
                if let Err((piece, error)) = outcome {
                    let piece = &pieces[piece];
                    first_error.get_or_insert_with(|| handle.error(piece.op(), piece.range(), error));
                }
            }
        }
    }

    fn flush(&mut self, descriptor: i32) -> io::Result<()> {
        let mut flight = Flight::new(&mut self.ring, 0);
        let sync = opcode::Fsync::new(types::Fd(descriptor)).flags(types::FsyncFlags::DATASYNC).build();
        flight.push(&sync.user_data(0))?;
        // Whatever it answers is final, interruption too: a failed flush is never retried (I6).
        match flight.wait(1).first() {
            Some((_, result)) if *result < 0 => Err(io::Error::from_raw_os_error(-result)),
            _ => Ok(()),
        }
    }
}

/// One operation the kernel works on.
struct Operation {
    piece: usize,
    entry: EntryParts,
    done: usize,
    bounce: Option<PoolBuf>,
}

/// What is needed to submit the rest of an operation after a short count.
#[derive(Clone, Copy)]
struct EntryParts {
    descriptor: types::Fd,
    address: *mut u8,
    len: usize,
    offset: u64,
    alignment: u64,
    reading: bool,
    region: Option<u16>,
}

impl EntryParts {
    fn build(&self, done: usize, slot: usize) -> squeue::Entry {
        let address = self.address.wrapping_add(done);
        let len = (self.len - done) as u32;
        let offset = self.offset + done as u64;
        let entry = match (self.reading, self.region) {
            (true, None) => opcode::Read::new(self.descriptor, address, len).offset(offset).build(),
            (false, None) => opcode::Write::new(self.descriptor, address, len).offset(offset).build(),
            (true, Some(region)) => {
                opcode::ReadFixed::new(self.descriptor, address, len, region).offset(offset).build()
            }
            (false, Some(region)) => {
                opcode::WriteFixed::new(self.descriptor, address, len, region).offset(offset).build()
            }
        };
        entry.user_data(slot as u64)
    }
}

impl Operation {
    /// Brings bounced bytes of a completed read to where they were wanted.
    fn finish(&self, piece: &mut Piece<'_>) {
        if let (Some(bounce), Buffer::Read(data)) = (&self.bounce, &mut piece.buffer) {
            data.copy_from_slice(bounce);
        }
    }
}

/// The operations in flight. Dropping it waits for all of them, whatever happened.
struct Flight<'r> {
    ring: &'r mut IoUring,
    slots: Vec<Option<Operation>>,
    /// Slots that are not taken.
    free: Vec<usize>,
    in_flight: usize,
}

impl<'r> Flight<'r> {
    fn new(ring: &'r mut IoUring, depth: usize) -> Self {
        let mut slots = Vec::new();
        slots.resize_with(depth, || None);
        Self { ring, slots, free: (0..depth).rev().collect(), in_flight: 0 }
    }

    fn release(&mut self, slot: usize) {
        self.slots[slot] = None;
        self.free.push(slot);
    }

    fn start(
        &mut self,
        handle: &Handle,
        piece: &mut Piece<'_>,
        index: usize,
        regions: &[Region],
        bounce: Option<&Arc<BufferArena>>,
    ) -> io::Result<()> {
        let (file, alignment) = handle.descriptor(piece.route);
        let mut bounce = match (piece.route, bounce) {
            // One slot per operation in flight, so this never waits.
            (Route::Bounce, Some(arena)) => Some(arena.lease()),
            _ => None,
        };
        let reading = matches!(piece.buffer, Buffer::Read(_));
        let len = piece.buffer.len();
        let address = match (&mut bounce, &mut piece.buffer) {
            (Some(slot), buffer) => {
                slot.set_len(len);
                if let Buffer::Write(data) = buffer {
                    slot.copy_from_slice(data);
                }
                slot.as_mut_ptr()
            }
            (None, Buffer::Read(data)) => data.as_mut_ptr(),
            // The kernel only reads from it.
            (None, Buffer::Write(data)) => data.as_ptr().cast_mut(),
        };
        let region = regions
            .iter()
            .position(|region| region.start <= address.addr() && address.addr() + len <= region.end)
            .and_then(|region| u16::try_from(region).ok());
        let descriptor = types::Fd(file.as_raw_fd());
        let entry = EntryParts { descriptor, address, len, offset: piece.offset, alignment, reading, region };
        let slot = self.free.pop().ok_or_else(|| io::Error::other("queue full"))?;
        self.slots[slot] = Some(Operation { piece: index, entry, done: 0, bounce });
        let pushed = self.push(&entry.build(0, slot));
        if pushed.is_err() {
            self.release(slot);
        }
        pushed
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the memory the entry names is borrowed for longer than this guard lives, and the guard's `Drop`
        // waits for the operation; the slot in its user data stays taken until then.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Submits what was pushed and waits for so many completions, all of them in flight; answers at least one.
    fn wait(&mut self, wanted: usize) -> Vec<(usize, i32)> {
        loop {
            // An error here must not lead out of this loop while the kernel may hold borrowed memory. Interruptions
            // and shortages pass; completions arrive in the shared ring even where the call itself fails.
            if let Err(error) = self.ring.submit_and_wait(wanted)
                && !matches!(error.raw_os_error(), Some(libc::EINTR))
            {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let completed: Vec<(usize, i32)> =
                self.ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect();
            if !completed.is_empty() {
                self.in_flight -= completed.len();
                return completed;
            }
        }
    }

    /// Takes one completion: `None` when the rest of the operation was submitted again.
    fn land(&mut self, slot: usize, result: i32) -> Option<Result<Operation, (usize, io::Error)>> {
        let mut operation = self.slots.get_mut(slot)?.take()?;
        let entry = operation.entry;
        let advanced = match result {
            count if count >= 0 => {
                progress(operation.done, count as usize, entry.len, entry.alignment, entry.reading)
            }
            // Not carried out: as if nothing had been transferred.
            error if error == -libc::EINTR || error == -libc::EAGAIN => Ok(operation.done),
            error => Err(io::Error::from_raw_os_error(-error)),
        };
        let piece = operation.piece;
        match advanced {
            Err(error) => {
                self.free.push(slot);
                Some(Err((piece, error)))
            }
            Ok(done) if done == entry.len => {
                self.free.push(slot);
                Some(Ok(operation))
            }
            Ok(done) => {
                operation.done = done;
                self.slots[slot] = Some(operation);
                match self.push(&entry.build(done, slot)) {
                    Ok(()) => None,
                    Err(error) => {
                        self.release(slot);
                        Some(Err((piece, error)))
                    }
                }
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.wait(1);
        }
    }
}
