//! A flat VMDK: plain sectors in one or many files.
//!
//! Invariants: the first write of an open changes the content identity first; a failed flush, or a failed write for
//! another reason than a full medium, makes the disk refuse everything but reads (I6). Units: bytes.
//! Made by `open`; called through [`BlockFile`].

use super::TargetFile;
use super::error::TargetError;
use super::keeper::Keeper;
use super::layout::Layout;
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt, push_range};

/// A file that holds one or more extents.
pub(super) struct Backing {
    pub(super) file: Box<dyn BlockFile>,
    /// Something was written since the last flush, by us or, right after opening, by who came before.
    pub(super) unflushed: bool,
}

/// An extent of a flat disk: in this backing file, from this byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) backing: usize,
    pub(super) offset: u64,
}

/// An open flat VMDK.
pub struct FlatVmdk {
    layout: Layout,
    parts: Vec<Part>,
    backings: Vec<Backing>,
    keeper: Keeper,
    failed: bool,
}

impl std::fmt::Debug for FlatVmdk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlatVmdk")
            .field("layout", &self.layout)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl FlatVmdk {
    pub(super) fn new(
        layout: Layout,
        parts: Vec<Part>,
        files: Vec<Box<dyn BlockFile>>,
        keeper: Keeper,
    ) -> Self {
        let backings = files.into_iter().map(|file| Backing { file, unflushed: true }).collect();
        Self { layout, parts, backings, keeper, failed: false }
    }

    fn begin(&mut self, op: BlockOp) -> Result<(), BlockError> {
        if self.failed {
            return Err(failed(&self.layout, op));
        }
        self.keeper.touch().map(|_| ())
    }

    /// Passes a result on and remembers a failure that must not be followed by anything.
    fn note<T>(&mut self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        let fatal = |error: &BlockError| !error.is_full() || error.op == BlockOp::Flush;
        self.failed |= self.keeper.is_writable() && result.as_ref().is_err_and(fatal);
        result
    }

    fn write_parts(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for (extent, mut writes) in self.layout.split_writes(writes)? {
            let Part { backing, offset } = self.parts[extent];
            writes.iter_mut().for_each(|write| write.offset += offset);
            let backing = &mut self.backings[backing];
            backing.unflushed = true;
            backing.file.write(&writes)?;
        }
        Ok(())
    }

    fn zero_parts(&mut self, range: ByteRange) -> Result<(), BlockError> {
        for (extent, inside, _) in self.layout.split(BlockOp::Zero, range)? {
            let Part { backing, offset } = self.parts[extent];
            let backing = &mut self.backings[backing];
            backing.unflushed = true;
            backing.file.zero(shift(inside, offset))?;
        }
        Ok(())
    }
}

/// The error of a disk that failed before.
pub(super) fn failed(layout: &Layout, op: BlockOp) -> BlockError {
    let why = "an earlier write or flush failed; the disk must be reopened and verified";
    layout.error(op, ByteRange { start: 0, end: 0 }, std::io::Error::other(why))
}

const fn shift(range: ByteRange, by: u64) -> ByteRange {
    ByteRange { start: range.start + by, end: range.end + by }
}

impl BlockFile for FlatVmdk {
    fn size_bytes(&self) -> u64 {
        self.layout.end()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for (extent, mut reads) in self.layout.split_reads(reads)? {
            let Part { backing, offset } = self.parts[extent];
            reads.iter_mut().for_each(|read| read.offset += offset);
            self.backings[backing].file.read(&mut reads)?;
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.layout.split_writes(writes)?; // bounds of all, before the first byte is written
        let result = self.begin(BlockOp::Write).and_then(|()| self.write_parts(writes));
        self.note(result)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.layout.split(BlockOp::Zero, range)?;
        let result = self.begin(BlockOp::Zero).and_then(|()| self.zero_parts(range));
        self.note(result)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        if self.failed {
            return Err(failed(&self.layout, BlockOp::Flush));
        }
        for at in 0..self.backings.len() {
            if self.backings[at].unflushed {
                let result = self.backings[at].file.flush();
                self.note(result)?;
                self.backings[at].unflushed = false;
            }
        }
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let mut found = Vec::new();
        for (extent, inside, outside) in self.layout.split(BlockOp::Map, range)? {
            let Part { backing, offset } = self.parts[extent];
            for part in self.backings[backing].file.allocated(shift(inside, offset))? {
                let start = outside.start + (part.start - offset - inside.start);
                push_range(&mut found, ByteRange { start, end: start + part.len() });
            }
        }
        Ok(found)
    }
}

impl TargetFile for FlatVmdk {
    fn close(mut self: Box<Self>) -> Result<(), TargetError> {
        Ok(self.flush()?)
    }
}
