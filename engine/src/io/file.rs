//! The portable backend: pread and pwrite, a few threads per batch.
//!
//! Invariants: those of [`BlockFile`] and `handle.rs`; threads live for one call only, so that nothing borrowed
//! outlives it. Units: bytes. Called through `io::open` where io_uring is not to be had, and by the tests as the
//! reference for the other backends.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::buffer::PoolBuf;
use super::handle::Handle;
use super::open::OpenOptions;
use super::plan::{BOUNCE_BYTES_MAX, Buffer, Piece, Plan, Route};
use super::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};

/// Threads one call may use: enough to keep a disk's queue from running dry at 1 MiB per transfer.
const THREADS_MAX: usize = 4;

/// A file or block device by pread and pwrite.
#[derive(Debug)]
pub struct DirectFile {
    handle: Handle,
}

impl DirectFile {
    /// Opens a regular file or block device.
    ///
    /// # Errors
    /// As for [`super::open::open`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        Handle::open(path, options).map(|handle| Self { handle })
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.handle.is_direct()
    }
}

impl BlockFile for DirectFile {
    fn size_bytes(&self) -> u64 {
        self.handle.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let plan = self.handle.plan_reads(reads)?;
        run(&self.handle, plan)
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        write(&mut self.handle, writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.handle.zero(range, write)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.handle.check_changeable(BlockOp::Flush)?;
        let result = self
            .handle
            .buffered()
            .sync_data()
            .map_err(|error| self.handle.error(BlockOp::Flush, ByteRange { start: 0, end: 0 }, error));
        self.handle.note(result)
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.handle.allocated(range)
    }
}

fn write(handle: &mut Handle, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
    handle.check_changeable(BlockOp::Write)?;
    let plan = handle.plan_writes(writes)?;
    let result = run(handle, plan);
    handle.note(result)
}

fn run(handle: &Handle, plan: Plan<'_>) -> Result<(), BlockError> {
    run_phase(handle, plan.direct)?;
    run_phase(handle, plan.buffered)
}

/// Runs all pieces, spread over threads where there is something to spread.
fn run_phase(handle: &Handle, mut pieces: Vec<Piece<'_>>) -> Result<(), BlockError> {
    let share = pieces.len().div_ceil(THREADS_MAX).max(1);
    if pieces.len() < 2 {
        return run_pieces(handle, &mut pieces);
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            pieces.chunks_mut(share).map(|share| scope.spawn(move || run_pieces(handle, share))).collect();
        let mut result = Ok(());
        for worker in workers {
            let outcome = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(outcome);
        }
        result
    })
}

fn run_pieces(handle: &Handle, pieces: &mut [Piece<'_>]) -> Result<(), BlockError> {
    let mut bounce = None;
    pieces.iter_mut().try_for_each(|piece| {
        let (op, range) = (piece.op(), piece.range());
        run_piece(handle, piece, &mut bounce).map_err(|error| handle.error(op, range, error))
    })
}

fn run_piece(handle: &Handle, piece: &mut Piece<'_>, bounce: &mut Option<PoolBuf>) -> io::Result<()> {
    let offset = piece.offset;
    if piece.route != Route::Bounce {
        return transfer(handle, piece.route, offset, &mut piece.buffer);
    }
    let aligned = match bounce {
        Some(aligned) => aligned,
        None => bounce.insert(PoolBuf::alone(BOUNCE_BYTES_MAX).map_err(io::Error::other)?),
    };
    aligned.set_len(piece.buffer.len());
    match &mut piece.buffer {
        Buffer::Read(data) => {
            transfer(handle, Route::Bounce, offset, &mut Buffer::Read(aligned))?;
            data.copy_from_slice(aligned);
            Ok(())
        }
        Buffer::Write(data) => {
            aligned.copy_from_slice(data);
            transfer(handle, Route::Bounce, offset, &mut Buffer::Write(aligned))
        }
    }
}

/// Transfers everything, continuing after short counts.
fn transfer(handle: &Handle, route: Route, offset: u64, buffer: &mut Buffer<'_>) -> io::Result<()> {
    let (file, alignment) = handle.descriptor(route);
    let mut done = 0;
    while done < buffer.len() {
        let result = match buffer {
            Buffer::Read(data) => file.read_at(&mut data[done..], offset + done as u64),
            Buffer::Write(data) => file.write_at(&data[done..], offset + done as u64),
        };
        match result {
            Ok(count) => {
                done = progress(done, count, buffer.len(), alignment, matches!(buffer, Buffer::Read(_)))?
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where a transfer that moved `count` more bytes goes on: at the last aligned place, so that direct I/O may continue.
pub(super) fn progress(
    done: usize,
    count: usize,
    len: usize,
    alignment: u64,
    reading: bool,
) -> io::Result<usize> {
    let reached = done.saturating_add(count);
    if reached >= len {
        return Ok(len);
    }
    // Pieces on an aligned route begin aligned, so the distance from their start decides.
    let next = reached - reached % alignment as usize;
    if next > done {
        return Ok(next);
    }
    Err(if reading {
        io::Error::new(ErrorKind::UnexpectedEof, "it ended early; was it truncated or detached?")
    } else {
        io::Error::new(ErrorKind::WriteZero, "nothing more was accepted")
    })
}
