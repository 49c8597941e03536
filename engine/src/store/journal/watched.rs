//! A target that is read without a master target, compared with what the CRC map beside the journal says was written to it.
//!
//! Why: what no undo run has of an older point stands on the target. A virtual machine that ran from it since, or the
//! target of another disk of the same size, would be taken for that. Invariants: nothing is written, the map neither; a
//! block that is not as it was written is an error that names it, unless that is accepted; of a block that the map does
//! not know nothing is said. Units: bytes. Called by the offline commands.

use std::io;

use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::store::crc_map::CrcMap;
use crate::units::BLOCK_BYTES;

/// A target with its CRC map, if there is one.
pub struct Watched<T> {
    target: T,
    map: Option<CrcMap>,
    accepted: bool,
}

impl<T: BlockFile> Watched<T> {
    /// Blocks that are not as they were written are handed out where that is `accepted`.
    #[must_use]
    pub const fn new(target: T, map: Option<CrcMap>, accepted: bool) -> Self {
        Self { target, map, accepted }
    }

    /// Whether anything is known of what was written to it.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.map.is_some()
    }

    fn check(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(map) = self.map.as_mut().filter(|_| !self.accepted) else { return Ok(()) };
        let end = offset + data.len() as u64;
        let first = offset.div_ceil(BLOCK_BYTES);
        // The disk may end inside its last block.
        let whole_end = if end >= self.target.size_bytes() { end } else { end / BLOCK_BYTES * BLOCK_BYTES };
        let start = first * BLOCK_BYTES;
        let Some(whole) =
            (start < whole_end).then(|| (start - offset) as usize..(whole_end - offset) as usize)
        else {
            return Ok(());
        };
        let checked = map.check(first, data.get(whole).unwrap_or_default()).map_err(io::Error::other)?;
        match checked.different.first() {
            None => Ok(()),
            Some(blocks) => Err(io::Error::other(format!(
                "bytes {}-{} are not as the master target wrote them: it is the target of another disk, or somebody has written to it since (a virtual machine that ran from it), or its medium rots; `journal extract --accept-damage` copies what stands there",
                blocks.start * BLOCK_BYTES,
                (blocks.end * BLOCK_BYTES).min(self.target.size_bytes()) - 1
            ))),
        }
    }
}

impl<T: BlockFile> BlockFile for Watched<T> {
    fn size_bytes(&self) -> u64 {
        self.target.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.target.read(reads)?;
        for read in reads {
            self.check(read.offset, read.data).map_err(|source| BlockError {
                name: "the target".to_owned(),
                op: BlockOp::Read,
                offset: read.offset,
                len: read.data.len() as u64,
                source,
            })?;
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.target.write(writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.target.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.target.flush()
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.target.allocated(range)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::crc_map::MapOwner;
    use crate::store::files::memory::MemoryFiles;
    use crate::store::journal::undo::BlockRange;
    use crate::units::DiskId;

    const BLOCK: usize = BLOCK_BYTES as usize;
    /// The disk ends inside its third block.
    const SIZE: u64 = 2 * BLOCK_BYTES + 1536;

    fn owner() -> MapOwner {
        MapOwner { journal: [1; 16], disk: DiskId([2; 16]), size_sectors: SIZE / 512 }
    }

    fn read(watched: &mut dyn BlockFile, offset: u64, bytes: usize) -> Result<Vec<u8>, BlockError> {
        let mut data = vec![0; bytes];
        watched.read(&mut [ReadAt { offset, data: &mut data }]).map(|()| data)
    }

    #[test]
    fn what_others_wrote_to_a_target_is_named_and_not_handed_out_unless_that_is_accepted() {
        let memory = MemoryFiles::default();
        let files = memory.opener();
        let (folder, path) = (Path::new("/journal"), Path::new("/target"));
        files.create(path, SIZE).unwrap();
        let mut target = files.open(path, true).unwrap();
        let mut map = CrcMap::open(&*files, folder, owner()).unwrap();
        // The first block is not known to the map.
        map.before(&[BlockRange::new(1, 3)]).unwrap();
        target.write(&[WriteAt { offset: BLOCK_BYTES, data: &vec![7; BLOCK + 1536] }]).unwrap();
        map.after(1, &[7; BLOCK]);
        map.after(2, &[7; 1536]);
        map.settle().unwrap();
        drop((map, target));
        let known = CrcMap::open_to_read(&*files, folder, owner()).unwrap();
        let mut watched = Watched::new(files.open(path, true).unwrap(), known, false);
        assert!(watched.is_known());
        assert!(read(&mut watched, 0, SIZE as usize).is_ok());
        for (at, whole) in [(0, true), (BLOCK_BYTES + 9, false), (SIZE - 1, false)] {
            watched.accepted = true;
            let before = read(&mut watched, at, 1).unwrap();
            watched.write(&[WriteAt { offset: at, data: &[0xee] }]).unwrap();
            assert_eq!(read(&mut watched, 0, SIZE as usize).unwrap()[at as usize], 0xee, "it is accepted");
            watched.accepted = false;
            let said = read(&mut watched, 0, SIZE as usize);
            assert_eq!(said.is_ok(), whole, "byte {at}");
            if let Err(error) = said {
                assert!(error.to_string().contains("not as the master target wrote them"), "{error}");
            }
            assert!(read(&mut watched, 0, BLOCK).is_ok(), "others are as good as before");
            watched.write(&[WriteAt { offset: at, data: &before }]).unwrap();
        }
        assert!(read(&mut watched, 0, SIZE as usize).is_ok());
        let other = MapOwner { disk: DiskId([3; 16]), ..owner() };
        assert!(CrcMap::open_to_read(&*files, folder, other).unwrap().is_none());
        assert!(files.facts(&crate::store::crc_map::map_path(folder, other.disk)).unwrap().is_none());
    }
}
