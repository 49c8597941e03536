//! A [`BlockFile`] in memory that can crash, fill up and fail: what the simulator and the tests run on.
//!
//! Invariants: reads see every write that returned; after [`MemoryFile::crash`] only flushed bytes are certain, of
//! the unflushed ones any subset of sectors may survive, an older one in place of a newer one too; a failed flush
//! gives its writes up, as Linux does: they stay readable, and no later flush makes them durable; a handle that saw
//! a failed write or flush refuses to write on (I6), a new handle from [`MemoryFile::clone_handle`] is a reopened
//! file. Only touched 4 KiB pages take memory. Units: bytes. Called by `sim` and by tests of every layer above.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::units::{BLOCK_BYTES, SECTOR_BYTES};

const PAGE: usize = BLOCK_BYTES as usize;
const SECTOR: usize = SECTOR_BYTES as usize;

type Pages = BTreeMap<u64, Arc<[u8; PAGE]>>;

/// What was done since the last flush, in order; replayed sector by sector at a crash.
#[derive(Debug)]
enum Unflushed {
    Write { offset: u64, data: Vec<u8> },
    Zero(ByteRange),
}

impl Unflushed {
    fn range(&self) -> ByteRange {
        match self {
            Self::Write { offset, data } => ByteRange { start: *offset, end: *offset + data.len() as u64 },
            Self::Zero(range) => *range,
        }
    }
}

#[derive(Debug)]
struct Fault {
    op: BlockOp,
    after: u64,
    kind: ErrorKind,
}

#[derive(Debug, Default)]
struct State {
    volatile: Pages,
    durable: Pages,
    unflushed: Vec<Unflushed>,
    faults: Vec<Fault>,
    capacity_bytes: Option<u64>,
    flushes: u64,
}

/// A file in memory. Handles from [`Self::clone_handle`] share their bytes.
#[derive(Debug)]
pub struct MemoryFile {
    name: String,
    size_bytes: u64,
    state: Arc<Mutex<State>>,
    failed: bool,
}

impl MemoryFile {
    /// A file of `size_bytes` zeros.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::named("memory", size_bytes)
    }

    /// A file of `size_bytes` zeros that errors call `name`.
    #[must_use]
    pub fn named(name: &str, size_bytes: u64) -> Self {
        Self { name: name.to_owned(), size_bytes, state: Arc::default(), failed: false }
    }

    /// The same file opened again.
    #[must_use]
    pub fn clone_handle(&self) -> Self {
        Self {
            name: self.name.clone(),
            size_bytes: self.size_bytes,
            state: Arc::clone(&self.state),
            failed: false,
        }
    }

    /// Power is lost. Unflushed changes are offered to `keep` in the order they were made, in pieces of at most one
    /// sector (a write) or one 4 KiB page (a zeroing); what it refuses never reached the medium. Pending faults are
    /// forgotten, and this handle may be used again.
    pub fn crash(&mut self, mut keep: impl FnMut(ByteRange) -> bool) {
        let mut state = self.state();
        let unflushed = std::mem::take(&mut state.unflushed);
        for change in &unflushed {
            let unit = if matches!(change, Unflushed::Zero(_)) { PAGE } else { SECTOR };
            for (piece, at) in pieces(change.range(), unit) {
                if !keep(piece) {
                    continue;
                }
                match change {
                    Unflushed::Write { data, .. } => {
                        put(&mut state.durable, piece.start, &data[at..at + piece.len() as usize]);
                    }
                    Unflushed::Zero(_) => clear(&mut state.durable, piece),
                }
            }
        }
        state.volatile = state.durable.clone();
        state.faults.clear();
        drop(state);
        self.failed = false;
    }

    /// Makes the `nth` next operation of this kind fail with `kind` (0 is the very next). Read and write count the
    /// operations of a batch one by one; a failing write tears: what came before it and its first half are there.
    pub fn inject(&self, op: BlockOp, nth: u64, kind: ErrorKind) {
        self.state().faults.push(Fault { op, after: nth, kind });
    }

    /// The medium holds at most `bytes` of touched pages from now on (`None`: no limit); what needs more fails
    /// with [`ErrorKind::StorageFull`], and zeroing makes room.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity_bytes = bytes;
    }

    /// Bytes of pages that hold something.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.state().volatile.len() as u64 * BLOCK_BYTES
    }

    /// Flushes that succeeded so far.
    #[must_use]
    pub fn flush_count(&self) -> u64 {
        self.state().flushes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, op: BlockOp, range: ByteRange, kind: ErrorKind) -> BlockError {
        BlockError { name: self.name.clone(), op, offset: range.start, len: range.len(), source: kind.into() }
    }

    fn check(&self, op: BlockOp, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes => Ok(ByteRange { start: offset, end }),
            _ => Err(self.error(
                op,
                ByteRange { start: offset, end: offset.saturating_add(len) },
                ErrorKind::InvalidInput,
            )),
        }
    }

    fn check_alive(&self, op: BlockOp) -> Result<(), BlockError> {
        if self.failed {
            return Err(BlockError {
                name: self.name.clone(),
                op,
                offset: 0,
                len: 0,
                source: std::io::Error::other("an earlier write or flush failed; reopen and verify it first"),
            });
        }
        Ok(())
    }

    fn write_one(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let range = self.check(BlockOp::Write, offset, data.len() as u64)?;
        let mut state = self.state();
        let full = state.capacity_bytes.is_some_and(|capacity| {
            let new = page_indexes(range).filter(|page| !state.volatile.contains_key(page)).count() as u64;
            new > 0 && (state.volatile.len() as u64 + new) * BLOCK_BYTES > capacity
        });
        let fault = if full { Some(ErrorKind::StorageFull) } else { state.due(BlockOp::Write) };
        let landed = if full {
            &data[..0]
        } else if fault.is_some() {
            &data[..data.len() / 2 / SECTOR * SECTOR]
        } else {
            data
        };
        if !landed.is_empty() {
            put(&mut state.volatile, offset, landed);
            state.unflushed.push(Unflushed::Write { offset, data: landed.to_vec() });
        }
        drop(state);
        fault.map_or(Ok(()), |kind| Err(self.error(BlockOp::Write, range, kind)))
    }

    /// Notes a failure that ends this handle; a full medium does not, the write can be tried again.
    fn note<T>(&mut self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(error) = &result {
            self.failed |= error.op == BlockOp::Flush || !error.is_full();
        }
        result
    }
}

impl State {
    /// Counts one operation; the kind of the fault that hits it, if one does.
    fn due(&mut self, op: BlockOp) -> Option<ErrorKind> {
        let mut hit = None;
        self.faults.retain_mut(|fault| {
            if fault.op != op {
                return true;
            }
            if fault.after == 0 {
                hit = Some(fault.kind);
                return false;
            }
            fault.after -= 1;
            true
        });
        hit
    }
}

impl BlockFile for MemoryFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for read in reads {
            let range = self.check(BlockOp::Read, read.offset, read.data.len() as u64)?;
            let mut state = self.state();
            if let Some(kind) = state.due(BlockOp::Read) {
                drop(state);
                return Err(self.error(BlockOp::Read, range, kind));
            }
            for (piece, at) in pieces(range, PAGE) {
                let out = &mut read.data[at..at + piece.len() as usize];
                let inside = (piece.start % BLOCK_BYTES) as usize;
                match state.volatile.get(&(piece.start / BLOCK_BYTES)) {
                    Some(page) => out.copy_from_slice(&page[inside..inside + out.len()]),
                    None => out.fill(0),
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.check_alive(BlockOp::Write)?;
        for write in writes {
            self.check(BlockOp::Write, write.offset, write.data.len() as u64)?;
        }
        let result = writes.iter().try_for_each(|write| self.write_one(write.offset, write.data));
        self.note(result)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.check_alive(BlockOp::Zero)?;
        let range = self.check(BlockOp::Zero, range.start, range.len())?;
        let mut state = self.state();
        let fault = state.due(BlockOp::Zero);
        if fault.is_none() {
            clear(&mut state.volatile, range);
            state.unflushed.push(Unflushed::Zero(range));
        }
        drop(state);
        let result = fault.map_or(Ok(()), |kind| Err(self.error(BlockOp::Zero, range, kind)));
        self.note(result)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.check_alive(BlockOp::Flush)?;
        let mut state = self.state();
        let unflushed = std::mem::take(&mut state.unflushed);
        let fault = state.due(BlockOp::Flush);
        if fault.is_none() {
            let State { volatile, durable, .. } = &mut *state;
            for change in &unflushed {
                settle(volatile, durable, change.range());
            }
            state.flushes += 1;
        }
        drop(state);
        let whole = ByteRange { start: 0, end: 0 };
        let result = fault.map_or(Ok(()), |kind| Err(self.error(BlockOp::Flush, whole, kind)));
        self.note(result)
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let range = self.check(BlockOp::Map, range.start, range.len())?;
        let mut state = self.state();
        if let Some(kind) = state.due(BlockOp::Map) {
            drop(state);
            return Err(self.error(BlockOp::Map, range, kind));
        }
        let mut found: Vec<ByteRange> = Vec::new();
        for (page, _) in state.volatile.range(page_span(range)) {
            let start = (page * BLOCK_BYTES).max(range.start);
            let end = (page * BLOCK_BYTES + BLOCK_BYTES).min(range.end);
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(ByteRange { start, end }),
            }
        }
        Ok(found)
    }
}

fn page_span(range: ByteRange) -> std::ops::Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES) }
}

fn page_indexes(range: ByteRange) -> impl Iterator<Item = u64> {
    page_span(range)
}

/// `range` cut at multiples of `unit`, each piece with its distance from the start of the range.
fn pieces(range: ByteRange, unit: usize) -> impl Iterator<Item = (ByteRange, usize)> {
    let unit = unit as u64;
    let mut at = range.start;
    std::iter::from_fn(move || {
        (at < range.end).then(|| {
            let piece = ByteRange { start: at, end: (at / unit * unit + unit).min(range.end) };
            at = piece.end;
            (piece, (piece.start - range.start) as usize)
        })
    })
}

fn put(pages: &mut Pages, offset: u64, data: &[u8]) {
    for (piece, at) in pieces(ByteRange { start: offset, end: offset + data.len() as u64 }, PAGE) {
        let page = pages.entry(piece.start / BLOCK_BYTES).or_insert_with(|| Arc::new([0; PAGE]));
        let inside = (piece.start % BLOCK_BYTES) as usize;
        let part = &data[at..at + piece.len() as usize];
        Arc::make_mut(page)[inside..inside + part.len()].copy_from_slice(part);
    }
}

fn clear(pages: &mut Pages, range: ByteRange) {
    let touched: Vec<u64> = pages.range(page_span(range)).map(|(page, _)| *page).collect();
    for page in touched {
        let start = page * BLOCK_BYTES;
        let from = range.start.saturating_sub(start).min(BLOCK_BYTES) as usize;
        let to = (range.end - start).min(BLOCK_BYTES) as usize;
        if from == 0 && to == PAGE {
            pages.remove(&page);
        } else if let Some(bytes) = pages.get_mut(&page) {
            Arc::make_mut(bytes)[from..to].fill(0);
        }
    }
}

/// Makes the bytes of `range` durable, and no neighbour in the same page.
fn settle(volatile: &Pages, durable: &mut Pages, range: ByteRange) {
    clear(durable, range);
    for (page, bytes) in volatile.range(page_span(range)) {
        let start = page * BLOCK_BYTES;
        let from = range.start.saturating_sub(start).min(BLOCK_BYTES) as usize;
        let to = (range.end - start).min(BLOCK_BYTES) as usize;
        if from == 0 && to == PAGE {
            durable.insert(*page, Arc::clone(bytes));
        } else {
            put(durable, start + from as u64, &bytes[from..to]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 64 << 10;

    fn write(file: &mut MemoryFile, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        file.write(&[WriteAt { offset, data }])
    }

    fn read(file: &mut MemoryFile, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xEE; len];
        file.read(&mut [ReadAt { offset, data: &mut data }]).expect("read");
        data
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, usize, u8),
        Zero(u64, u64),
        Flush,
        Crash,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0..SIZE, 0..9000_usize, 1..=255_u8)
                .prop_map(|(at, len, fill)| Op::Write(at, len.min((SIZE - at) as usize), fill)),
            2 => (0..SIZE, 0..20_000_u64).prop_map(|(at, len)| Op::Zero(at, (at + len).min(SIZE))),
            1 => Just(Op::Flush),
            1 => Just(Op::Crash),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_an_array_with_a_durable_twin(ops in proptest::collection::vec(op(), 1..60)) {
            let mut file = MemoryFile::new(SIZE);
            let mut volatile = vec![0_u8; SIZE as usize];
            let mut durable = volatile.clone();
            for op in ops {
                match op {
                    Op::Write(at, len, fill) => {
                        write(&mut file, at, &vec![fill; len]).expect("write");
                        volatile[at as usize..at as usize + len].fill(fill);
                    }
                    Op::Zero(start, end) => {
                        file.zero(ByteRange { start, end }).expect("zero");
                        volatile[start as usize..end as usize].fill(0);
                    }
                    Op::Flush => { file.flush().expect("flush"); durable.clone_from(&volatile); }
                    Op::Crash => { file.crash(|_| false); volatile.clone_from(&durable); }
                }
                prop_assert!(read(&mut file, 0, SIZE as usize) == volatile);
            }
            let map = file.allocated(ByteRange { start: 0, end: SIZE }).expect("map");
            prop_assert!(map.windows(2).all(|pair| pair[0].end < pair[1].start));
            let mut seen = vec![false; SIZE as usize];
            for r in map { seen[r.start as usize..r.end as usize].fill(true); }
            prop_assert!(volatile.iter().zip(&seen).all(|(byte, seen)| *byte == 0 || *seen));
        }

        #[test]
        fn a_crash_keeps_exactly_the_sectors_it_is_told_to(kept in proptest::collection::vec(any::<bool>(), 16)) {
            let mut file = MemoryFile::new(SIZE);
            write(&mut file, 0, &[1; 8192]).expect("write");
            file.flush().expect("flush");
            write(&mut file, 0, &[2; 8192]).expect("write");
            file.crash(|piece| kept[(piece.start / SECTOR_BYTES) as usize]);
            for (sector, kept) in kept.iter().enumerate() {
                let expected = if *kept { 2 } else { 1 };
                prop_assert_eq!(read(&mut file, sector as u64 * SECTOR_BYTES, SECTOR), vec![expected; SECTOR]);
            }
        }
    }

    #[test]
    fn a_failed_flush_never_becomes_durable_and_ends_the_handle() {
        let mut file = MemoryFile::new(SIZE);
        write(&mut file, 0, &[7; 512]).expect("write");
        file.inject(BlockOp::Flush, 0, ErrorKind::Other);
        assert_eq!(file.flush().expect_err("injected").op, BlockOp::Flush);
        assert!(file.flush().is_err(), "no retry of a failed flush");
        let mut reopened = file.clone_handle();
        write(&mut reopened, 512, &[8; 512]).expect("write");
        reopened.flush().expect("flush");
        assert_eq!(read(&mut reopened, 0, 512), [7; 512], "still readable");
        reopened.crash(|_| true);
        assert_eq!(read(&mut reopened, 0, 512), [0; 512]);
        assert_eq!(read(&mut reopened, 512, 512), [8; 512]);
    }

    #[test]
    fn the_nth_write_fails_torn_and_names_its_place() {
        let mut file = MemoryFile::named("vm-disk", SIZE);
        file.inject(BlockOp::Write, 1, ErrorKind::PermissionDenied);
        let writes = [WriteAt { offset: 0, data: &[1; 1024] }, WriteAt { offset: 4096, data: &[2; 1024] }];
        let error = file.write(&writes).expect_err("injected");
        assert_eq!((error.offset, error.len, error.name.as_str()), (4096, 1024, "vm-disk"));
        assert_eq!(read(&mut file, 0, 1024), [1; 1024]);
        assert_eq!(read(&mut file, 4096, 1024), [[2; 512], [0; 512]].concat());
    }

    #[test]
    fn a_full_medium_says_so_and_takes_writes_again_after_zeroing() {
        let mut file = MemoryFile::new(SIZE);
        file.set_capacity(Some(8192));
        write(&mut file, 0, &[1; 8192]).expect("fits");
        assert!(write(&mut file, 8192, &[1; 512]).expect_err("full").is_full());
        write(&mut file, 100, &[2; 100]).expect("overwriting needs no space");
        file.zero(ByteRange { start: 0, end: 4096 }).expect("zero");
        write(&mut file, 8192, &[1; 512]).expect("room again");
        assert_eq!(file.allocated_bytes(), 8192);
    }

    #[test]
    fn out_of_range_is_refused_without_touching_anything() {
        let mut file = MemoryFile::new(SIZE);
        assert!(file.clone_handle().write(&[WriteAt { offset: SIZE - 1, data: &[1; 2] }]).is_err());
        assert!(file.clone_handle().write(&[WriteAt { offset: u64::MAX, data: &[1; 2] }]).is_err());
        assert!(file.zero(ByteRange { start: SIZE, end: SIZE + 1 }).is_err());
        assert_eq!(file.allocated_bytes(), 0);
    }
}
