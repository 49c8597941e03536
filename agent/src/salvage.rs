//! Reading around what cannot be read: in pieces, and where one fails in halves of halves, down to a block.
//!
//! Invariants: what is not read holds nothing of the disk and is named; it is named in whole blocks of the disk, as far as
//! the range asked for goes; nothing is tried any more once the caller says that it is over, and counts as not read then.
//! Units: sectors, bytes. Called by `reader` and by closing windows.

use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{BLOCK_SECTORS, SECTOR_BYTES, SectorRange};

/// Sectors of a piece that is read at once: each is progress, also where a medium takes seconds for one that fails.
const PIECE_SECTORS: u64 = (64 << 10) / SECTOR_BYTES;

/// What came of reading a range piece by piece.
#[derive(Debug, Default)]
pub(crate) struct Salvaged {
    /// What could not be read.
    pub(crate) unread: RangeSet,
    /// Why, the first time.
    pub(crate) reason: Option<String>,
}

impl Salvaged {
    /// Reads as much of `range` into `data` as can be read until it `is_over`, which is asked before each read.
    pub(crate) fn read(
        &mut self,
        file: &mut dyn BlockFile,
        range: SectorRange,
        mut data: &mut [u8],
        is_over: &dyn Fn() -> bool,
    ) {
        for piece in range.aligned_pieces(PIECE_SECTORS) {
            let (first, rest) = data.split_at_mut(piece.bytes() as usize);
            self.read_piece(file, piece, first, is_over);
            data = rest;
        }
    }

    fn read_piece(
        &mut self,
        file: &mut dyn BlockFile,
        range: SectorRange,
        data: &mut [u8],
        is_over: &dyn Fn() -> bool,
    ) {
        let late = is_over();
        if late {
            self.reason.get_or_insert_with(|| "reading takes too long".to_owned());
        } else {
            match file.read(&mut [ReadAt { offset: range.byte_start(), data }]) {
                Ok(()) => return,
                Err(error) => drop(self.reason.get_or_insert_with(|| error.to_string())),
            }
        }
        let Some(middle) = border_inside(range).filter(|_| !late) else {
            return self.unread.insert(range);
        };
        let (first, second) = data.split_at_mut(((middle - range.start) * SECTOR_BYTES) as usize);
        self.read_piece(file, SectorRange::new(range.start, middle), first, is_over);
        self.read_piece(file, SectorRange::new(middle, range.end), second, is_over);
    }
}

/// The border between blocks inside `range` that is nearest behind its middle; `None` where all of it lies in one block.
fn border_inside(range: SectorRange) -> Option<u64> {
    let first = (range.start / BLOCK_SECTORS + 1) * BLOCK_SECTORS;
    let last = range.end.saturating_sub(1) / BLOCK_SECTORS * BLOCK_SECTORS;
    let middle = (range.start + range.len() / 2).next_multiple_of(BLOCK_SECTORS);
    (first <= last).then(|| middle.clamp(first, last))
}

/// Whether anything of the disk can be read: the block at `known_good`, its first one, or its last one.
pub(crate) fn is_alive(file: &mut dyn BlockFile, size_sectors: u64, known_good: u64) -> bool {
    let whole = SectorRange::new(0, size_sectors);
    let last = size_sectors.saturating_sub(1) / BLOCK_SECTORS * BLOCK_SECTORS;
    [known_good, 0, last].into_iter().any(|start| {
        let block = SectorRange::new(start, start.saturating_add(BLOCK_SECTORS)).intersect(whole);
        let mut data = vec![0; block.bytes() as usize];
        !block.is_empty() && file.read(&mut [ReadAt { offset: block.byte_start(), data: &mut data }]).is_ok()
    })
}

/// A disk of which parts fail, for tests.
#[cfg(test)]
pub(crate) mod tests {
    use reprotect_engine::io::memory::MemoryFile;
    use reprotect_engine::io::{BlockError, BlockOp, ByteRange, WriteAt};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A disk of which the sectors in `bad` cannot be read.
    #[derive(Debug)]
    pub(crate) struct Failing {
        pub(crate) disk: MemoryFile,
        pub(crate) bad: Arc<Mutex<RangeSet>>,
        /// Reads so far.
        pub(crate) reads: Arc<Mutex<Vec<SectorRange>>>,
    }

    impl Failing {
        pub(crate) fn new(disk: MemoryFile, bad: &[SectorRange]) -> Self {
            let bad = bad.iter().copied().collect();
            Self { disk, bad: Arc::new(Mutex::new(bad)), reads: Arc::default() }
        }
    }

    impl BlockFile for Failing {
        fn size_bytes(&self) -> u64 {
            self.disk.size_bytes()
        }

        fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
            for read in reads.iter() {
                let start = read.offset / SECTOR_BYTES;
                let range = SectorRange::new(start, start + read.data.len() as u64 / SECTOR_BYTES);
                self.reads.lock().unwrap().push(range);
                if self.bad.lock().unwrap().overlap(range).next().is_some() {
                    let source = std::io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error());
                    let (name, offset, len) = ("/dev/failing".to_owned(), read.offset, range.bytes());
                    return Err(BlockError { name, op: BlockOp::Read, offset, len, source });
                }
            }
            self.disk.read(reads)
        }

        fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
            self.disk.write(writes)
        }

        fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
            self.disk.zero(range)
        }

        fn flush(&mut self) -> Result<(), BlockError> {
            self.disk.flush()
        }

        fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
            self.disk.allocated(range)
        }
    }

    const SECTORS: u64 = 8192 + 3;

    /// A disk whose every sector is filled with its number.
    fn disk() -> MemoryFile {
        let mut disk = MemoryFile::new(SECTORS * SECTOR_BYTES);
        for sector in 0..SECTORS {
            let data = [sector as u8 | 1; SECTOR_BYTES as usize];
            disk.write(&[WriteAt { offset: sector * SECTOR_BYTES, data: &data }]).unwrap();
        }
        disk
    }

    fn salvage(file: &mut Failing, range: SectorRange, is_over: &dyn Fn() -> bool) -> (Salvaged, Vec<u8>) {
        let mut data = vec![0; range.bytes() as usize];
        let mut salvaged = Salvaged::default();
        salvaged.read(file, range, &mut data, is_over);
        (salvaged, data)
    }

    #[test]
    fn everything_but_the_bad_blocks_is_read_and_those_are_named() {
        let bad = [SectorRange::new(5, 6), SectorRange::new(4096, 4112), SectorRange::new(8194, 8195)];
        let mut file = Failing::new(disk(), &bad);
        let range = SectorRange::new(0, SECTORS);
        let (salvaged, data) = salvage(&mut file, range, &|| false);
        let unread: Vec<SectorRange> = salvaged.unread.iter().collect();
        let blocks = [SectorRange::new(0, 8), SectorRange::new(4096, 4112), SectorRange::new(8192, SECTORS)];
        assert_eq!(unread, blocks, "whole blocks, and no more of them");
        for (sector, bytes) in data.chunks(SECTOR_BYTES as usize).enumerate() {
            let is_read = salvaged.unread.overlap(SectorRange::new(sector as u64, sector as u64 + 1)).next();
            let expected = if is_read.is_none() { sector as u8 | 1 } else { 0 };
            assert!(bytes.iter().all(|byte| *byte == expected), "sector {sector}");
        }
        assert!(salvaged.reason.unwrap().contains("/dev/failing"));
        let reads = file.reads.lock().unwrap().len();
        assert!(reads < 100, "{reads} reads for four blocks");
    }

    #[test]
    fn pieces_begin_and_end_where_blocks_of_the_disk_do_although_the_range_does_not() {
        let mut file = Failing::new(disk(), &[SectorRange::new(17, 18)]);
        let (salvaged, _) = salvage(&mut file, SectorRange::new(3, 100), &|| false);
        assert_eq!(salvaged.unread.iter().collect::<Vec<_>>(), [SectorRange::new(16, 24)]);
    }

    #[test]
    fn ranges_of_any_start_and_length_end_at_the_block_that_fails() {
        let mut file = Failing::new(disk(), &[]);
        for (start, len) in (0..=9).flat_map(|start| (1..=17).map(move |len| (start, len))) {
            let range = SectorRange::new(start, start + len);
            for bad in range.start..range.end {
                *file.bad.lock().unwrap() = [SectorRange::new(bad, bad + 1)].into_iter().collect();
                let (salvaged, data) = salvage(&mut file, range, &|| false);
                let block = bad / BLOCK_SECTORS * BLOCK_SECTORS;
                let lost = SectorRange::new(block, block + BLOCK_SECTORS).intersect(range);
                assert_eq!(salvaged.unread.iter().collect::<Vec<_>>(), [lost], "{bad} in {range:?}");
                for (sector, bytes) in (range.start..).zip(data.chunks(SECTOR_BYTES as usize)) {
                    let expected =
                        if lost.start <= sector && sector < lost.end { 0 } else { sector as u8 | 1 };
                    assert!(
                        bytes.iter().all(|byte| *byte == expected),
                        "{sector} of {range:?}, {bad} is bad"
                    );
                }
            }
        }
    }

    #[test]
    fn what_the_time_does_not_suffice_for_counts_as_not_read() {
        let mut file = Failing::new(disk(), &[]);
        let range = SectorRange::new(8, 4000);
        let (salvaged, _) = salvage(&mut file, range, &|| true);
        assert_eq!(salvaged.unread.iter().collect::<Vec<_>>(), [range]);
        assert!(file.reads.lock().unwrap().is_empty());
        // Time for six reads: two pieces, and a third that fails and is split.
        file.bad.lock().unwrap().insert(SectorRange::new(256, 257));
        let reads = std::sync::Arc::clone(&file.reads);
        let (salvaged, data) = salvage(&mut file, range, &|| reads.lock().unwrap().len() >= 6);
        assert_eq!(salvaged.unread.iter().collect::<Vec<_>>(), [SectorRange::new(256, 4000)]);
        let there = (256 - range.start) * SECTOR_BYTES;
        assert!(data[..there as usize].iter().all(|byte| *byte != 0), "what was read is kept");
        let reads = reads.lock().unwrap();
        assert_eq!(reads[..3], [(8, 128), (128, 256), (256, 384)].map(|(a, b)| SectorRange::new(a, b)));
        assert_eq!(reads.len(), 6);
    }

    #[test]
    fn a_disk_is_alive_while_one_of_three_places_can_be_read() {
        let whole = SectorRange::new(0, SECTORS);
        let mut file = Failing::new(disk(), &[SectorRange::new(0, 8000)]);
        assert!(is_alive(&mut file, SECTORS, 0), "its end");
        file.bad.lock().unwrap().insert(SectorRange::new(8100, SECTORS));
        assert!(!is_alive(&mut file, SECTORS, 0));
        assert!(is_alive(&mut file, SECTORS, 8040), "where it could be read before");
        file.bad.lock().unwrap().insert(whole);
        assert!(!is_alive(&mut file, SECTORS, 8040));
    }
}
