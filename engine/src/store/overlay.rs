//! A throw-away overlay: a read-only disk that can be written all the same, its changes kept in a scratch file.
//!
//! Invariants: the base is never written; a block is *changed* only after all of it was written to (or zeroed in) the
//! scratch file, so a failed write, a full scratch file included, leaves every unchanged block as the base has it;
//! changed blocks are read from the scratch file, all others from the base, whichever handle changed them; a failed
//! write or flush of the scratch file ends writing on every handle (I6), a full one does not. What is changed is kept
//! in memory only: an overlay does not outlive its process, and a scratch file that exists is not read back.
//! Units: bytes; blocks of 4 KiB, the last one as short as the disk's end makes it.
//! Called by the master target, for `mount --writable`.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt, push_range};
use crate::range_set::RangeSet;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, SectorRange};

/// What the handles of one overlay share. Dropped with the last of them.
pub struct OverlayState {
    name: String,
    size_bytes: u64,
    /// Whole blocks, in sectors. Locked for looking and marking only, never during I/O.
    changed: RwLock<RangeSet>,
    /// The scratch file as it is written. Writers are one at a time: a merge of part of a block must not meet another
    /// write of the same block, and overlays are not where throughput matters.
    scratch: Mutex<Scratch>,
}

struct Scratch {
    file: Box<dyn BlockFile>,
    failed: bool,
}

impl OverlayState {
    /// An overlay without changes that keeps them in `scratch`, a file of at least `size_bytes` whose content does not
    /// matter and which nothing else uses. Errors call it `name`.
    ///
    /// # Errors
    /// When the scratch file is shorter than the disk.
    pub fn new(name: &str, size_bytes: u64, scratch: Box<dyn BlockFile>) -> Result<Arc<Self>, BlockError> {
        let state = Self {
            name: name.to_owned(),
            size_bytes,
            changed: RwLock::default(),
            scratch: Mutex::new(Scratch { file: scratch, failed: false }),
        };
        let scratch_bytes = state.scratch().file.size_bytes();
        state.check_size("the scratch file", scratch_bytes)?;
        Ok(Arc::new(state))
    }

    /// Bytes of blocks that differ from the base, or may.
    #[must_use]
    pub fn changed_bytes(&self) -> u64 {
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        changed.sector_count() * SECTOR_BYTES
    }

    fn check_size(&self, what: &str, bytes: u64) -> Result<(), BlockError> {
        if bytes >= self.size_bytes {
            return Ok(());
        }
        let reason = format!("{what} has {bytes} bytes where the disk has {}", self.size_bytes);
        Err(self.error(BlockOp::Open, ByteRange { start: 0, end: 0 }, io::Error::other(reason)))
    }

    fn error(&self, op: BlockOp, range: ByteRange, source: io::Error) -> BlockError {
        BlockError { name: self.name.clone(), op, offset: range.start, len: range.len(), source }
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // A writer that panicked marked nothing, so what is there is as good as after a failed write.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where `range` is to be read: ascending pieces, each from the scratch file (`true`) or from the base.
    fn pieces(&self, range: ByteRange) -> Vec<(ByteRange, bool)> {
        let within = sectors(range);
        let changed: Vec<SectorRange> = {
            let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
            changed.overlap(within).collect()
        };
        let (mut pieces, mut at) = (Vec::with_capacity(2 * changed.len() + 1), range.start);
        for run in changed {
            let start = run.byte_start().max(at);
            let end = run.end.saturating_mul(SECTOR_BYTES).min(range.end);
            pieces.push((ByteRange { start: at, end: start }, false));
            pieces.push((ByteRange { start, end }, true));
            at = end;
        }
        pieces.push((ByteRange { start: at, end: range.end }, false));
        pieces.retain(|(piece, _)| !piece.is_empty());
        pieces
    }

    fn is_changed(&self, range: ByteRange) -> bool {
        self.changed.read().unwrap_or_else(PoisonError::into_inner).contains(sectors(range))
    }

    fn mark(&self, range: ByteRange) {
        let blocks = blocks_around(range);
        self.changed.write().unwrap_or_else(PoisonError::into_inner).insert(sectors(blocks));
    }
}

/// The sectors `range` touches.
fn sectors(range: ByteRange) -> SectorRange {
    SectorRange {
        start: range.start / SECTOR_BYTES,
        end: range.end.div_ceil(SECTOR_BYTES).max(range.start / SECTOR_BYTES),
    }
}

/// The blocks `range` touches; the last one may reach past the disk's end.
fn blocks_around(range: ByteRange) -> ByteRange {
    ByteRange {
        start: range.start / BLOCK_BYTES * BLOCK_BYTES,
        end: range.end.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES),
    }
}

/// One handle of an overlay: the same disk as every other handle of it.
pub struct Overlay {
    state: Arc<OverlayState>,
    base: Box<dyn BlockFile>,
    /// The scratch file once more, for reading beside the one writer.
    scratch: Box<dyn BlockFile>,
}

impl Overlay {
    /// A handle over `base`, which reads its changes from `scratch`: the scratch file of `state`, opened again.
    ///
    /// # Errors
    /// When one of them is shorter than the disk.
    pub fn new(
        state: &Arc<OverlayState>,
        base: Box<dyn BlockFile>,
        scratch: Box<dyn BlockFile>,
    ) -> Result<Self, BlockError> {
        state.check_size("the base", base.size_bytes())?;
        state.check_size("the scratch file", scratch.size_bytes())?;
        Ok(Self { state: Arc::clone(state), base, scratch })
    }

    fn check(&self, op: BlockOp, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        let end = offset.saturating_add(len);
        let range = ByteRange { start: offset, end };
        if end <= self.state.size_bytes && offset.checked_add(len).is_some() {
            return Ok(range);
        }
        Err(self.state.error(op, range, io::ErrorKind::InvalidInput.into()))
    }

    /// Runs `change` as the only writer, on a scratch file that has not failed; remembers when it fails now.
    fn change<T>(
        &mut self,
        op: BlockOp,
        change: impl FnOnce(&mut Self, &mut dyn BlockFile) -> Result<T, BlockError>,
    ) -> Result<T, BlockError> {
        let state = Arc::clone(&self.state);
        let mut scratch = state.scratch();
        if scratch.failed {
            let reason = "an earlier write or flush of the scratch file failed; unmount, and mount again";
            return Err(state.error(op, ByteRange { start: 0, end: 0 }, io::Error::other(reason)));
        }
        let result = change(self, &mut *scratch.file);
        if let Err(error) = &result {
            scratch.failed |= match error.op {
                BlockOp::Flush => true,
                BlockOp::Write | BlockOp::Zero => !error.is_full(),
                BlockOp::Open | BlockOp::Read | BlockOp::Map => false,
            };
        }
        result
    }

    /// Reads `data.len()` bytes at `offset`, which were checked.
    fn read_one(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
        let range = ByteRange { start: offset, end: offset + data.len() as u64 };
        let (mut of_base, mut of_scratch) = (Vec::new(), Vec::new());
        let mut rest = data;
        for (piece, changed) in self.state.pieces(range) {
            let (mine, after) = rest.split_at_mut(piece.len() as usize);
            let list = if changed { &mut of_scratch } else { &mut of_base };
            list.push(ReadAt { offset: piece.start, data: mine });
            rest = after;
        }
        if !of_base.is_empty() {
            self.base.read(&mut of_base)?;
        }
        if !of_scratch.is_empty() {
            self.scratch.read(&mut of_scratch)?;
        }
        Ok(())
    }

    /// The block that holds `part`, with `part` replaced by `data`: written whole. Without data, by zeros.
    fn merge(
        &mut self,
        scratch: &mut dyn BlockFile,
        part: ByteRange,
        data: Option<&[u8]>,
    ) -> Result<(), BlockError> {
        let whole = blocks_around(part);
        let end = whole.end.min(self.state.size_bytes);
        let mut block = vec![0; (end - whole.start) as usize];
        self.read_one(whole.start, &mut block)?;
        let (from, to) = ((part.start - whole.start) as usize, (part.end - whole.start) as usize);
        match data {
            Some(data) => block[from..to].copy_from_slice(data),
            None => block[from..to].fill(0),
        }
        scratch.write(&[WriteAt { offset: whole.start, data: &block }])?;
        self.state.mark(part);
        Ok(())
    }

    /// Cuts `range` into the part of its first block, whole blocks, and the part of its last block.
    fn cut(&self, range: ByteRange) -> [ByteRange; 3] {
        let up = |at: u64| at.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
        let first = up(range.start).min(range.end);
        // The disk's end ends a block too.
        let last = if range.end == self.state.size_bytes {
            range.end
        } else {
            range.end / BLOCK_BYTES * BLOCK_BYTES
        };
        let last = last.max(first);
        [
            ByteRange { start: range.start, end: first },
            ByteRange { start: first, end: last },
            ByteRange { start: last, end: range.end },
        ]
    }

    fn write_one(
        &mut self,
        scratch: &mut dyn BlockFile,
        range: ByteRange,
        data: &[u8],
    ) -> Result<(), BlockError> {
        let [head, body, tail] = self.cut(range);
        let (of_head, rest) = data.split_at(head.len() as usize);
        let (of_body, of_tail) = rest.split_at(body.len() as usize);
        if !body.is_empty() {
            scratch.write(&[WriteAt { offset: body.start, data: of_body }])?;
            self.state.mark(body);
        }
        for (part, data) in [(head, of_head), (tail, of_tail)] {
            if !part.is_empty() {
                self.merge(scratch, part, Some(data))?;
            }
        }
        Ok(())
    }

    fn zero_one(&mut self, scratch: &mut dyn BlockFile, range: ByteRange) -> Result<(), BlockError> {
        let [head, body, tail] = self.cut(range);
        if !body.is_empty() {
            scratch.zero(body)?;
            self.state.mark(body);
        }
        for part in [head, tail] {
            if !part.is_empty() && (self.state.is_changed(part) || !self.base.allocated(part)?.is_empty()) {
                self.merge(scratch, part, None)?;
            }
        }
        Ok(())
    }
}

impl BlockFile for Overlay {
    fn size_bytes(&self) -> u64 {
        self.state.size_bytes
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for read in reads.iter() {
            self.check(BlockOp::Read, read.offset, read.data.len() as u64)?;
        }
        reads.iter_mut().try_for_each(|read| self.read_one(read.offset, read.data))
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for write in writes {
            self.check(BlockOp::Write, write.offset, write.data.len() as u64)?;
        }
        self.change(BlockOp::Write, |overlay, scratch| {
            for write in writes.iter().filter(|write| !write.data.is_empty()) {
                let range = overlay.check(BlockOp::Write, write.offset, write.data.len() as u64)?;
                overlay.write_one(scratch, range, write.data)?;
            }
            Ok(())
        })
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        let range = self.check(BlockOp::Zero, range.start, range.len())?;
        self.change(BlockOp::Zero, |overlay, scratch| overlay.zero_one(scratch, range))
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.change(BlockOp::Flush, |_, scratch| scratch.flush())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let range = self.check(BlockOp::Map, range.start, range.len())?;
        let mut found = Vec::new();
        for (piece, changed) in self.state.pieces(range) {
            let file = if changed { &mut self.scratch } else { &mut self.base };
            for run in file.allocated(piece)? {
                let run = ByteRange { start: run.start.max(piece.start), end: run.end.min(piece.end) };
                push_range(&mut found, run);
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use proptest::prelude::*;

    use super::*;
    use crate::io::memory::MemoryFile;

    /// Not a multiple of a block, so that the last one is short.
    const SIZE: u64 = (64 << 10) + 1536;

    struct Lab {
        base: MemoryFile,
        scratch: MemoryFile,
        state: Arc<OverlayState>,
    }

    impl Lab {
        /// A base with a pattern in its first half and a hole behind it; garbage in the scratch file.
        fn new() -> Self {
            let mut base = MemoryFile::new(SIZE);
            let pattern: Vec<u8> = (0..SIZE / 2).map(|at| (at % 251) as u8 | 1).collect();
            base.write(&[WriteAt { offset: 0, data: &pattern }]).unwrap();
            let mut scratch = MemoryFile::named("scratch", SIZE);
            scratch.write(&[WriteAt { offset: 0, data: &vec![0xEE; SIZE as usize] }]).unwrap();
            let state = OverlayState::new("overlay", SIZE, Box::new(scratch.clone_handle())).unwrap();
            Self { base, scratch, state }
        }

        fn handle(&self) -> Overlay {
            let (base, scratch) = (self.base.clone_handle(), self.scratch.clone_handle());
            Overlay::new(&self.state, Box::new(base), Box::new(scratch)).unwrap()
        }
    }

    fn all(file: &mut dyn BlockFile) -> Vec<u8> {
        let mut data = vec![0x77; SIZE as usize];
        file.read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
        data
    }

    fn put(file: &mut dyn BlockFile, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        file.write(&[WriteAt { offset, data }])
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, usize, u8),
        /// Two writes of one call that share a block.
        Pair(u64, usize, usize, u8),
        Zero(u64, u64),
        Flush,
    }

    fn op() -> impl Strategy<Value = (usize, Op)> {
        let op = prop_oneof![
            5 => (0..SIZE, 0..20_000_usize, any::<u8>())
                .prop_map(|(at, len, fill)| Op::Write(at, len.min((SIZE - at) as usize), fill)),
            1 => (0..SIZE - 3000, 1..1000_usize, 1..1000_usize, any::<u8>())
                .prop_map(|(at, gap, len, fill)| Op::Pair(at, gap, len, fill)),
            3 => (0..SIZE, 0..40_000_u64).prop_map(|(at, len)| Op::Zero(at, (at + len).min(SIZE))),
            1 => Just(Op::Flush),
        ];
        (0..3_usize, op)
    }

    proptest! {
        #[test]
        fn every_handle_is_the_same_disk_and_the_base_stays_as_it_was(
            ops in proptest::collection::vec(op(), 1..40), ask in (0..SIZE, 0..SIZE)
        ) {
            let mut lab = Lab::new();
            let before = all(&mut lab.base);
            let mut handles = [lab.handle(), lab.handle(), lab.handle()];
            let mut model = before.clone();
            for (who, op) in ops {
                let handle = &mut handles[who];
                match op {
                    Op::Write(at, len, fill) => {
                        put(handle, at, &vec![fill; len]).unwrap();
                        model[at as usize..at as usize + len].fill(fill);
                    }
                    Op::Pair(at, gap, len, fill) => {
                        let (first, second) = (vec![fill; gap], vec![!fill; len]);
                        let later = at + 2 * gap as u64;
                        let writes =
                            [WriteAt { offset: at, data: &first }, WriteAt { offset: later, data: &second }];
                        handle.write(&writes).unwrap();
                        model[at as usize..at as usize + gap].fill(fill);
                        model[later as usize..later as usize + len].fill(!fill);
                    }
                    Op::Zero(start, end) => {
                        handle.zero(ByteRange { start, end }).unwrap();
                        model[start as usize..end as usize].fill(0);
                    }
                    Op::Flush => handle.flush().unwrap(),
                }
                for handle in &mut handles {
                    prop_assert!(all(handle) == model);
                }
            }
            prop_assert!(all(&mut lab.base) == before, "the base was written");
            let range = ByteRange { start: ask.0.min(ask.1), end: ask.0.max(ask.1) };
            let map = handles[0].allocated(range).unwrap();
            prop_assert!(map.windows(2).all(|pair| pair[0].end < pair[1].start), "{map:?}");
            prop_assert!(map.iter().all(|run| run.start >= range.start && run.end <= range.end && !run.is_empty()));
            let mut seen = vec![false; SIZE as usize];
            map.iter().for_each(|run| seen[run.start as usize..run.end as usize].fill(true));
            let hidden = (range.start..range.end).find(|at| model[*at as usize] != 0 && !seen[*at as usize]);
            prop_assert_eq!(hidden, None, "data outside the map");
        }
    }

    #[test]
    fn a_full_scratch_file_is_no_space_and_nothing_else() {
        let lab = Lab::new();
        let (mut one, mut other) = (lab.handle(), lab.handle());
        let before = all(&mut one);
        lab.scratch.clone_handle().zero(ByteRange { start: 0, end: SIZE }).unwrap();
        // Room for two blocks beside the last, short one, which zeroing does not give back.
        lab.scratch.set_capacity(Some(3 * BLOCK_BYTES));
        put(&mut one, 4096, &[1; 8192]).unwrap();
        let error = put(&mut one, 0, &[2; 100]).unwrap_err();
        assert!(error.is_full(), "{error}");
        assert!(put(&mut other, 40_000, &[2; 5000]).unwrap_err().is_full());
        assert!(put(&mut other, 20_480, &[2; 8192]).unwrap_err().is_full(), "whole blocks");
        let mut expected = before;
        expected[4096..12288].fill(1);
        assert!(all(&mut one) == expected, "what failed left something behind");
        put(&mut other, 5000, &[3; 100]).unwrap();
        other.flush().unwrap();
        one.zero(ByteRange { start: 8192, end: 12288 }).unwrap();
        put(&mut one, 0, &[2; 100]).unwrap();
        expected[5000..5100].fill(3);
        expected[8192..12288].fill(0);
        expected[..100].fill(2);
        assert!(all(&mut other) == expected);
    }

    #[test]
    fn a_failed_flush_ends_writing_on_every_handle_and_reading_on_none() {
        let lab = Lab::new();
        let (mut one, mut other) = (lab.handle(), lab.handle());
        put(&mut one, 0, &[9; 512]).unwrap();
        lab.scratch.inject(BlockOp::Flush, 0, ErrorKind::Other);
        assert_eq!(one.flush().unwrap_err().op, BlockOp::Flush);
        let refused = put(&mut other, 0, &[8; 512]).unwrap_err();
        assert!(refused.to_string().contains("mount again"), "{refused}");
        assert!(other.flush().is_err() && other.zero(ByteRange { start: 0, end: 512 }).is_err());
        assert_eq!(all(&mut other)[..512], [9; 512]);
    }

    #[test]
    fn a_torn_write_leaves_unchanged_blocks_as_they_were() {
        let lab = Lab::new();
        let mut overlay = lab.handle();
        let before = all(&mut overlay);
        lab.scratch.inject(BlockOp::Write, 0, ErrorKind::Other);
        assert!(put(&mut overlay, 100, &[9; 3000]).is_err());
        assert!(all(&mut overlay) == before);
        let lab = Lab::new();
        lab.scratch.inject(BlockOp::Write, 0, ErrorKind::Other);
        assert!(put(&mut lab.handle(), 8192, &[9; 8192]).is_err());
        assert!(all(&mut lab.handle()) == before, "whole blocks");
    }

    #[test]
    fn zeroing_where_nothing_is_costs_no_scratch() {
        let lab = Lab::new();
        let mut overlay = lab.handle();
        overlay.zero(ByteRange { start: SIZE - 3000, end: SIZE - 1600 }).unwrap();
        assert_eq!(lab.state.changed_bytes(), 0);
        overlay.zero(ByteRange { start: 100, end: 200 }).unwrap();
        assert_eq!(lab.state.changed_bytes(), BLOCK_BYTES);
        assert_eq!(all(&mut overlay)[100..200], [0; 100]);
    }

    #[test]
    fn ranges_past_the_end_and_short_files_are_refused() {
        let lab = Lab::new();
        let mut overlay = lab.handle();
        assert!(put(&mut overlay, SIZE - 1, &[1; 2]).is_err());
        assert!(put(&mut overlay, u64::MAX, &[1; 2]).is_err());
        assert!(overlay.zero(ByteRange { start: SIZE, end: SIZE + 1 }).is_err());
        assert!(overlay.allocated(ByteRange { start: SIZE, end: SIZE + 1 }).is_err());
        let mut byte = [0; 2];
        assert!(overlay.read(&mut [ReadAt { offset: SIZE - 1, data: &mut byte }]).is_err());
        put(&mut overlay, SIZE - 1, &[5]).unwrap();
        assert_eq!(all(&mut overlay)[SIZE as usize - 1], 5);
        let short = || Box::new(MemoryFile::new(SIZE - 1));
        assert!(OverlayState::new("overlay", SIZE, short()).is_err());
        assert!(Overlay::new(&lab.state, short(), Box::new(lab.scratch.clone_handle())).is_err());
        assert!(Overlay::new(&lab.state, Box::new(lab.base.clone_handle()), short()).is_err());
    }

    #[test]
    fn writers_of_parts_of_one_block_do_not_lose_each_other() {
        let lab = Lab::new();
        let expected = all(&mut lab.handle());
        std::thread::scope(|scope| {
            for part in 0..8_usize {
                let mut handle = lab.handle();
                scope.spawn(move || {
                    for round in 1..=50_u8 {
                        put(&mut handle, part as u64 * 512, &[round; 512]).unwrap();
                    }
                });
            }
        });
        let mut seen = all(&mut lab.handle());
        assert_eq!(seen[..4096], [50; 4096]);
        seen[..4096].copy_from_slice(&expected[..4096]);
        assert!(seen == expected);
    }
}
