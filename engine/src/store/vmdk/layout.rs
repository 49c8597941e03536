//! Splitting of operations at the borders of extents.
//!
//! Invariants: extents follow one another without gaps; an operation that passes the end of the disk is an error and
//! never clipped. Units: bytes of the disk, and within an extent bytes of that extent. Called by `flat` and `sparse`.

use std::collections::BTreeMap;

use crate::io::{BlockError, BlockOp, ByteRange, ReadAt, WriteAt};

/// Where the extents of a disk begin.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    name: String,
    /// First byte of each extent, ascending, the first zero.
    starts: Vec<u64>,
    end: u64,
}

impl Layout {
    /// A disk of extents of these sizes in bytes, none zero.
    pub(super) fn new(name: String, sizes: impl IntoIterator<Item = u64>) -> Self {
        let (mut starts, mut end) = (Vec::new(), 0_u64);
        for size in sizes {
            starts.push(end);
            end += size; // at most 2^53 sectors together, checked by the descriptor parser
        }
        Self { name, starts, end }
    }

    /// Size of the disk.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// An error of this disk.
    pub(super) fn error(&self, op: BlockOp, range: ByteRange, source: std::io::Error) -> BlockError {
        BlockError { name: self.name.clone(), op, offset: range.start, len: range.len(), source }
    }

    fn check(&self, op: BlockOp, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.end => Ok(ByteRange { start: offset, end }),
            _ => {
                let why = format!("the disk ends at byte {}", self.end);
                let range = ByteRange { start: offset, end: offset.saturating_add(len) };
                Err(self.error(op, range, std::io::Error::new(std::io::ErrorKind::InvalidInput, why)))
            }
        }
    }

    /// The extent of a byte of the disk and that extent's bounds.
    fn extent_of(&self, at: u64) -> (usize, ByteRange) {
        let index = self.starts.partition_point(|start| *start <= at) - 1; // the first start is 0
        let end = self.starts.get(index + 1).copied().unwrap_or(self.end);
        (index, ByteRange { start: self.starts[index], end })
    }

    /// The parts of `range` by extent: extent, place in the extent, place in the disk.
    pub(super) fn split(
        &self,
        op: BlockOp,
        range: ByteRange,
    ) -> Result<Vec<(usize, ByteRange, ByteRange)>, BlockError> {
        let range = self.check(op, range.start, range.len())?;
        let (mut parts, mut at) = (Vec::new(), range.start);
        while at < range.end {
            let (index, extent) = self.extent_of(at);
            let end = range.end.min(extent.end);
            let inside = ByteRange { start: at - extent.start, end: end - extent.start };
            parts.push((index, inside, ByteRange { start: at, end }));
            at = end;
        }
        Ok(parts)
    }

    /// The writes of each extent.
    pub(super) fn split_writes<'a>(
        &self,
        writes: &[WriteAt<'a>],
    ) -> Result<BTreeMap<usize, Vec<WriteAt<'a>>>, BlockError> {
        let mut by_extent: BTreeMap<usize, Vec<WriteAt<'a>>> = BTreeMap::new();
        for write in writes {
            self.check(BlockOp::Write, write.offset, write.data.len() as u64)?;
            let (mut at, mut rest) = (write.offset, write.data);
            while !rest.is_empty() {
                let (index, extent) = self.extent_of(at);
                let (data, tail) = rest.split_at(clip(rest.len(), extent.end - at));
                by_extent.entry(index).or_default().push(WriteAt { offset: at - extent.start, data });
                at += data.len() as u64;
                rest = tail;
            }
        }
        Ok(by_extent)
    }

    /// The reads of each extent.
    pub(super) fn split_reads<'b>(
        &self,
        reads: &'b mut [ReadAt<'_>],
    ) -> Result<BTreeMap<usize, Vec<ReadAt<'b>>>, BlockError> {
        let mut by_extent: BTreeMap<usize, Vec<ReadAt<'b>>> = BTreeMap::new();
        for read in reads {
            self.check(BlockOp::Read, read.offset, read.data.len() as u64)?;
            let (mut at, mut rest) = (read.offset, &mut *read.data);
            while !rest.is_empty() {
                let (index, extent) = self.extent_of(at);
                let (data, tail) = rest.split_at_mut(clip(rest.len(), extent.end - at));
                at += data.len() as u64;
                rest = tail;
                let offset = at - data.len() as u64 - extent.start;
                by_extent.entry(index).or_default().push(ReadAt { offset, data });
            }
        }
        Ok(by_extent)
    }
}

/// The smaller of a length in memory and a length on disk.
pub(super) fn clip(len: usize, limit: u64) -> usize {
    usize::try_from(limit).map_or(len, |limit| len.min(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_split_at_extent_borders_and_refused_past_the_end() {
        let layout = Layout::new("d".into(), [1000, 500, 2000]);
        let range = |start, end| ByteRange { start, end };
        let parts = layout.split(BlockOp::Zero, range(900, 1600)).unwrap();
        assert_eq!(
            parts,
            [
                (0, range(900, 1000), range(900, 1000)),
                (1, range(0, 500), range(1000, 1500)),
                (2, range(0, 100), range(1500, 1600)),
            ]
        );
        let data: Vec<u8> = (0..=255).cycle().take(700).collect();
        let writes = layout.split_writes(&[WriteAt { offset: 900, data: &data }]).unwrap();
        let got: Vec<_> = writes.iter().map(|(e, w)| (*e, w[0].offset, w[0].data.len())).collect();
        assert_eq!(got, [(0, 900, 100), (1, 0, 500), (2, 0, 100)]);
        assert_eq!(writes[&2][0].data, &data[600..]);
        assert!(layout.split_writes(&[WriteAt { offset: 3000, data: &data }]).is_err());
        let mut buffer = vec![0; 700];
        let mut reads = [ReadAt { offset: 900, data: &mut buffer }];
        let reads = layout.split_reads(&mut reads).unwrap();
        assert_eq!(reads.iter().map(|(e, r)| (*e, r[0].offset, r[0].data.len())).collect::<Vec<_>>(), got);
        assert!(layout.split(BlockOp::Zero, range(u64::MAX, u64::MAX)).is_err());
    }
}
