//! Reading what lies on a medium that fails in places: what it does not give is damage like any other, of these bytes alone.
//!
//! Invariants: what a medium refuses once is asked for again; what it refuses twice is filled with bytes that are no valid
//! structure and no zeros, so whoever reads checks it in vain, and the place is known; any other error, and a medium that
//! fails all over, stays an error. Nothing that may be readable tomorrow is given up for it: who opens the journal to go on
//! refuses where changes that are on no target may stand in such a place ([`super::recovery`]). Units: bytes. Used where
//! the redo log is read at an opening.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::JournalError;
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::store::files::{Files, FilesError};
use crate::units::BLOCK_BYTES;

/// Stands where nothing could be read.
const UNREADABLE: u8 = 0xa5;
/// Blocks of a file that may be unreadable: beyond, the medium is not damaged in places, but gone.
const BAD_BLOCKS_MAX: usize = 256;
/// What an operating system says of bytes that a medium does not give: EIO, ENODATA, EBADMSG, EILSEQ, EREMOTEIO.
const MEDIUM_ERRORS: [i32; 5] = [5, 61, 74, 84, 121];

/// Whether the medium did not give these bytes; a failed open or a lack of memory is something else.
#[must_use]
pub(crate) fn is_of_medium(error: &BlockError) -> bool {
    error.op == BlockOp::Read && error.source.raw_os_error().is_some_and(|code| MEDIUM_ERRORS.contains(&code))
}

/// A file of which some parts may be unreadable.
pub(super) struct Tolerant {
    file: Box<dyn BlockFile>,
    /// The parts that could not be read, by where they begin: where they end, and why.
    bad: BTreeMap<u64, (u64, String)>,
}

impl Tolerant {
    pub(super) fn open(files: &dyn Files, path: &Path) -> Result<Self, FilesError> {
        Ok(Self { file: files.open(path, false)?, bad: BTreeMap::new() })
    }

    /// Whether something in these bytes could not be read.
    pub(super) fn is_bad(&self, bytes: ByteRange) -> bool {
        self.bad.range(..bytes.end).any(|(_, (end, _))| *end > bytes.start)
    }

    /// What could not be read: neighbours as one, with the reason of the first.
    pub(super) fn into_bad(self) -> Vec<(ByteRange, String)> {
        let mut found: Vec<(ByteRange, String)> = Vec::new();
        for (start, (end, reason)) in self.bad {
            match found.last_mut().filter(|(last, _)| last.end >= start) {
                Some((last, _)) => last.end = last.end.max(end),
                None => found.push((ByteRange { start, end }, reason)),
            }
        }
        found
    }

    /// Block by block, for one of them is not to be had.
    fn read_in_pieces(&mut self, offset: u64, mut data: &mut [u8]) -> Result<(), BlockError> {
        let mut at = offset;
        while !data.is_empty() {
            let len = (BLOCK_BYTES - at % BLOCK_BYTES).min(data.len() as u64);
            let (piece, rest) = data.split_at_mut(len as usize);
            let mut read = || self.file.read(&mut [ReadAt { offset: at, data: &mut *piece }]);
            if let Err(error) = read().or_else(|_| read()) {
                if !is_of_medium(&error) || self.bad.len() >= BAD_BLOCKS_MAX {
                    return Err(error);
                }
                piece.fill(UNREADABLE);
                self.bad.insert(at, (at + len, error.to_string()));
            }
            (at, data) = (at + len, rest);
        }
        Ok(())
    }
}

impl BlockFile for Tolerant {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for ReadAt { offset, data } in reads {
            if self.file.read(&mut [ReadAt { offset: *offset, data }]).is_err() {
                self.read_in_pieces(*offset, data)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.file.write(writes)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.file.zero(range)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.file.flush()
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}

/// The first bytes of a file that is there, fewer where it is shorter; filled as above where they cannot be read.
///
/// # Errors
/// When it cannot be opened.
pub(super) fn head_of(files: &dyn Files, path: &Path, bytes_max: u64) -> Result<Vec<u8>, JournalError> {
    let mut file = Tolerant::open(files, path)?;
    let mut head = vec![0; bytes_max.min(file.size_bytes()) as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut head }])?;
    Ok(head)
}
