//! A hosted sparse VMDK: grains in one or many extents, in an order that survives power loss.
//!
//! # The order
//! Other writers put no flush between a grain and the table entry that points to it, so power loss can expose a
//! pointer to unwritten data. Here each arrow is a flush:
//! 1. once per open, before the first write: repaired tables, unclean flag, new content identity → 2.
//! 2. `write`: whole grains at the append position, new zeroed tables; table entries only in memory.
//! 3. `flush`: → directory entries, both copies (only when there are new tables) → table entries, both copies →
//! 4. `close`: the flag is cleared → the file is cut to its used part.
//!
//! Thousands of grains cost the same two flushes as one. A grain that is stored already is overwritten in place; what
//! that means for before-images is the caller's business.
//!
//! Invariants: nothing on the medium points to a grain that was not flushed; a grain is written whole when it is
//! allocated; zeros written to a hole leave a hole; no write reads. Memory is changed only after the medium took the
//! write, so a full medium leaves the disk as it was. Units: bytes of the disk or extent, sectors of the file.
//! Made by `open`; called through [`BlockFile`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::TargetFile;
use super::error::TargetError;
use super::flat::failed;
use super::keeper::{Keeper, sector_writes};
use super::layout::{Layout, clip};
use super::tables::{Grain, Repair, Tables, stored_ranges};
use crate::checksum::is_zero;
use crate::format::vmdk::sparse::{FILE_SECTORS_MAX, SparseHeader, TABLE_SECTORS};
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::units::SECTOR_BYTES;

/// A primary and a redundant table of zeros; both fit the smallest grain.
static NEW_TABLES: [u8; 2 * (TABLE_SECTORS * SECTOR_BYTES) as usize] = [0; _];

/// One sparse extent file.
pub(super) struct SparseExtent {
    pub(super) path: PathBuf,
    pub(super) file: Box<dyn BlockFile>,
    pub(super) header: SparseHeader,
    pub(super) tables: Tables,
    /// Step 1 is done.
    pub(super) begun: bool,
    /// Something was written since the last flush, by us or, right after opening, by who came before.
    pub(super) unflushed: bool,
}

/// Where the bytes of a planned write come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Of the caller's write with this number, from this byte.
    Input { write: usize, start: usize },
    /// Of the arena, from this byte.
    Arena { start: usize },
    /// Two tables of zeros.
    Tables,
}

/// A write of an extent file: place, length, source.
#[derive(Clone, Copy, Debug)]
struct Put {
    offset: u64,
    len: usize,
    source: Source,
}

/// What one `write` will do to an extent, before any of it is done.
#[derive(Default)]
struct Plan {
    puts: Vec<Put>,
    /// Zero-filled grains of which only parts are written.
    arena: Vec<u8>,
    /// Start in the arena of each such grain.
    staged: BTreeMap<u64, usize>,
    /// Grains and their new sectors.
    grains: Vec<(u64, u64)>,
    /// Tables and their new sectors.
    tables: Vec<(usize, u64)>,
    append: u64,
}

impl Plan {
    /// Adds a write, joined to the last one where both file and memory continue.
    fn put(&mut self, offset: u64, len: usize, source: Source) {
        if let Some(last) = self.puts.last_mut()
            && last.offset + last.len as u64 == offset
        {
            let continues = match (last.source, source) {
                (Source::Input { write: a, start }, Source::Input { write: b, start: next }) => {
                    a == b && start + last.len == next
                }
                (Source::Arena { start }, Source::Arena { start: next }) => start + last.len == next,
                _ => false,
            };
            if continues {
                last.len += len;
                return;
            }
        }
        self.puts.push(Put { offset, len, source });
    }
}

impl SparseExtent {
    const fn grain_bytes(&self) -> u64 {
        self.header.grain_sectors * SECTOR_BYTES
    }

    fn full(&self) -> BlockError {
        BlockError {
            name: self.path.display().to_string(),
            op: BlockOp::Write,
            offset: self.tables.append() * SECTOR_BYTES,
            len: self.grain_bytes(),
            source: std::io::Error::new(
                std::io::ErrorKind::FileTooLarge,
                "the sparse extent cannot grow further; use a flat or split target",
            ),
        }
    }

    /// Takes the next slot of one grain at the append position.
    fn allocate(&self, plan: &mut Plan) -> Result<u64, BlockError> {
        let (sector, end) = (plan.append, plan.append + self.header.grain_sectors);
        if end > FILE_SECTORS_MAX || end * SECTOR_BYTES > self.file.size_bytes() {
            return Err(self.full());
        }
        plan.append = end;
        Ok(sector)
    }

    /// Takes a slot for a grain, and first one for its tables when they are not there yet.
    fn allocate_grain(&self, plan: &mut Plan, grain: u64) -> Result<u64, BlockError> {
        if let Some(table) = self.tables.lacks_table(grain)
            && plan.tables.iter().rev().all(|(new, _)| *new != table)
        {
            let sector = self.allocate(plan)?;
            plan.tables.push((table, sector));
            plan.put(sector * SECTOR_BYTES, NEW_TABLES.len(), Source::Tables);
        }
        let sector = self.allocate(plan)?;
        plan.grains.push((grain, sector));
        Ok(sector)
    }

    fn plan(&self, writes: &[WriteAt<'_>]) -> Result<Plan, BlockError> {
        let grain_bytes = self.grain_bytes();
        let mut plan = Plan { append: self.tables.append(), ..Plan::default() };
        for (write, WriteAt { offset, data }) in writes.iter().enumerate() {
            let mut start = 0;
            while start < data.len() {
                let at = offset + start as u64;
                let (grain, inside) = (at / grain_bytes, at % grain_bytes);
                let len = clip(data.len() - start, grain_bytes - inside);
                let part = &data[start..start + len];
                let source = Source::Input { write, start };
                match self.tables.grain(grain) {
                    Grain::At(sector) => plan.put(sector * SECTOR_BYTES + inside, len, source),
                    Grain::Hole => self.plan_new(&mut plan, grain, inside, part, source)?,
                }
                start += len;
            }
        }
        Ok(plan)
    }

    /// Plans a part of a grain that is not stored yet.
    fn plan_new(
        &self,
        plan: &mut Plan,
        grain: u64,
        inside: u64,
        part: &[u8],
        source: Source,
    ) -> Result<(), BlockError> {
        let grain_bytes = self.grain_bytes();
        if is_zero(part) {
            return Ok(()); // writes of one call do not overlap, and what is not written of a new grain is zeros
        }
        if part.len() as u64 == grain_bytes {
            let sector = self.allocate_grain(plan, grain)?;
            plan.put(sector * SECTOR_BYTES, part.len(), source);
            return Ok(());
        }
        let start = match plan.staged.get(&grain) {
            Some(start) => *start,
            None => {
                let sector = self.allocate_grain(plan, grain)?;
                let start = plan.arena.len();
                plan.arena.resize(start + grain_bytes as usize, 0);
                plan.staged.insert(grain, start);
                plan.put(sector * SECTOR_BYTES, grain_bytes as usize, Source::Arena { start });
                start
            }
        };
        let start = start + inside as usize;
        plan.arena[start..start + part.len()].copy_from_slice(part);
        Ok(())
    }

    /// Step 1: nothing of this open was written to this extent before.
    fn begin(&mut self, descriptor: &[(u64, [u8; SECTOR_BYTES as usize])]) -> Result<(), BlockError> {
        if self.begun {
            return Ok(());
        }
        self.unflushed = true;
        let mut header = self.header.clone();
        header.unclean = true;
        let bytes = header.encode();
        self.file.write(&[WriteAt { offset: 0, data: &bytes }])?;
        self.header = header;
        self.file.write(&sector_writes(descriptor))?;
        let copies = self.tables.restore_copies();
        self.put_sectors(&copies)?;
        self.begun = true;
        self.flush()
    }

    fn put_sectors(&mut self, pieces: &[(u64, Vec<u8>)]) -> Result<(), BlockError> {
        if pieces.is_empty() {
            return Ok(());
        }
        let writes: Vec<_> =
            pieces.iter().map(|(at, data)| WriteAt { offset: at * SECTOR_BYTES, data }).collect();
        self.file.write(&writes)
    }

    /// Step 2.
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        let plan = self.plan(writes)?;
        let puts: Vec<WriteAt<'_>> = plan
            .puts
            .iter()
            .map(|put| {
                let data = match put.source {
                    Source::Input { write, start } => &writes[write].data[start..start + put.len],
                    Source::Arena { start } => &plan.arena[start..start + put.len],
                    Source::Tables => &NEW_TABLES[..],
                };
                WriteAt { offset: put.offset, data }
            })
            .collect();
        if puts.is_empty() {
            return Ok(());
        }
        self.unflushed = true;
        self.file.write(&puts)?;
        self.tables.commit(&plan.tables, &plan.grains, plan.append);
        Ok(())
    }

    /// Step 3.
    fn flush(&mut self) -> Result<(), BlockError> {
        if !self.unflushed {
            return Ok(());
        }
        self.file.flush()?;
        if !self.begun {
            self.unflushed = false; // what a repair changed is written by step 1 and not before
            return Ok(());
        }
        if self.tables.has_dirty_directory() {
            self.put_sectors(&self.tables.directory_writes())?;
            self.file.flush()?;
            self.tables.directory_written();
        }
        if self.tables.has_dirty_tables() {
            self.put_sectors(&self.tables.table_writes())?;
            self.file.flush()?;
            self.tables.tables_written();
        }
        self.unflushed = false;
        Ok(())
    }

    /// Makes stored grains of `range` read as zeros; holes stay what they are.
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        let mut runs: Vec<ByteRange> = Vec::new();
        self.for_stored(range, |start, end| match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(ByteRange { start, end }),
        });
        for run in runs {
            self.unflushed = true;
            self.file.zero(run)?;
        }
        Ok(())
    }

    /// Calls `each` with the places in the file of the stored parts of `range`.
    fn for_stored(&self, range: ByteRange, mut each: impl FnMut(u64, u64)) {
        let mut stored = Vec::new();
        stored_ranges(&self.tables, range, 0, &mut stored);
        let grain_bytes = self.grain_bytes();
        for run in stored {
            let mut at = run.start;
            while at < run.end {
                let end = run.end.min((at / grain_bytes + 1) * grain_bytes);
                if let Grain::At(sector) = self.tables.grain(at / grain_bytes) {
                    let start = sector * SECTOR_BYTES + at % grain_bytes;
                    each(start, start + (end - at));
                }
                at = end;
            }
        }
    }

    fn read(&mut self, reads: Vec<ReadAt<'_>>) -> Result<(), BlockError> {
        let grain_bytes = self.grain_bytes();
        let mut stored: Vec<ReadAt<'_>> = Vec::new();
        for ReadAt { offset: mut at, data: mut rest } in reads {
            while !rest.is_empty() {
                let grain = self.tables.grain(at / grain_bytes);
                let len = self.run_len(at, rest.len(), grain);
                let (data, tail) = rest.split_at_mut(len);
                match grain {
                    Grain::Hole => data.fill(0),
                    Grain::At(sector) => {
                        stored.push(ReadAt { offset: sector * SECTOR_BYTES + at % grain_bytes, data });
                    }
                }
                at += len as u64;
                rest = tail;
            }
        }
        if stored.is_empty() { Ok(()) } else { self.file.read(&mut stored) }
    }

    /// How many of `len` bytes from `at` follow one another in the file, or are holes together.
    fn run_len(&self, at: u64, len: usize, first: Grain) -> usize {
        let grain_bytes = self.grain_bytes();
        let mut run = grain_bytes - at % grain_bytes;
        let mut expected = first;
        while run < len as u64 {
            if let Grain::At(sector) = &mut expected {
                *sector += self.header.grain_sectors;
            }
            if self.tables.grain((at + run) / grain_bytes) != expected {
                break;
            }
            run += grain_bytes;
        }
        clip(len, run)
    }

    /// Step 4; answers the length the file is to be cut to.
    fn finish(&mut self, writable: bool) -> Result<Option<u64>, BlockError> {
        if writable && self.header.unclean {
            self.begin(&[])?; // a repaired extent becomes clean even if nothing was written to it
        }
        self.flush()?;
        if !self.begun {
            return Ok(None);
        }
        let mut header = self.header.clone();
        header.unclean = false;
        let bytes = header.encode();
        self.file.write(&[WriteAt { offset: 0, data: &bytes }])?;
        self.file.flush()?;
        self.header = header;
        Ok(Some(self.tables.append() * SECTOR_BYTES))
    }
}

/// An open hosted sparse VMDK.
pub struct SparseVmdk {
    layout: Layout,
    extents: Vec<SparseExtent>,
    keeper: Keeper,
    /// What opening put right.
    repair: Repair,
    /// Files that were lengthened for writing and are cut again when closed.
    lengthened: bool,
    failed: bool,
}

impl std::fmt::Debug for SparseVmdk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SparseVmdk")
            .field("layout", &self.layout)
            .field("repair", &self.repair)
            .finish_non_exhaustive()
    }
}

impl SparseVmdk {
    pub(super) fn new(
        layout: Layout,
        extents: Vec<SparseExtent>,
        keeper: Keeper,
        repair: Repair,
        lengthened: bool,
    ) -> Self {
        Self { layout, extents, keeper, repair, lengthened, failed: false }
    }

    /// What opening found and put right.
    #[must_use]
    pub const fn repair(&self) -> &Repair {
        &self.repair
    }

    fn begin(&mut self, op: BlockOp, extent: usize) -> Result<(), BlockError> {
        if self.failed {
            return Err(failed(&self.layout, op));
        }
        // An embedded descriptor's only extent is the one that begins, so its sectors go along with the flag.
        let descriptor = self.keeper.touch()?;
        let result = self.extents[extent].begin(&descriptor);
        self.failed |= result.is_err(); // even a full medium: the flag or the descriptor may be half written
        result
    }

    /// Passes a result on and remembers a failure that must not be followed by anything.
    fn note<T>(&mut self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        let fatal = |error: &BlockError| !error.is_full() || error.op == BlockOp::Flush;
        self.failed |= self.keeper.is_writable() && result.as_ref().is_err_and(fatal);
        result
    }

    fn write_extents(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        for (extent, writes) in self.layout.split_writes(writes)? {
            self.begin(BlockOp::Write, extent)?;
            self.extents[extent].write(&writes)?;
        }
        Ok(())
    }

    fn zero_extents(&mut self, range: ByteRange) -> Result<(), BlockError> {
        for (extent, inside, _) in self.layout.split(BlockOp::Zero, range)? {
            self.begin(BlockOp::Zero, extent)?;
            self.extents[extent].zero(inside)?;
        }
        Ok(())
    }
}

impl BlockFile for SparseVmdk {
    fn size_bytes(&self) -> u64 {
        self.layout.end()
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for (extent, reads) in self.layout.split_reads(reads)? {
            self.extents[extent].read(reads)?;
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.layout.split_writes(writes)?; // bounds of all, before the first byte is written
        let result = self.write_extents(writes);
        self.note(result)
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.layout.split(BlockOp::Zero, range)?;
        let result = self.zero_extents(range);
        self.note(result)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        if self.failed {
            return Err(failed(&self.layout, BlockOp::Flush));
        }
        for at in 0..self.extents.len() {
            let result = self.extents[at].flush();
            self.note(result)?;
        }
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let mut found = Vec::new();
        for (extent, inside, outside) in self.layout.split(BlockOp::Map, range)? {
            stored_ranges(&self.extents[extent].tables, inside, outside.start - inside.start, &mut found);
        }
        Ok(found)
    }
}

impl TargetFile for SparseVmdk {
    fn close(mut self: Box<Self>) -> Result<(), TargetError> {
        if self.failed {
            return Err(failed(&self.layout, BlockOp::Flush).into());
        }
        for SparseExtent { path, file, header, tables, begun, unflushed } in std::mem::take(&mut self.extents)
        {
            let mut extent = SparseExtent { path, file, header, tables, begun, unflushed };
            let cut = extent.finish(self.keeper.is_writable())?;
            let used = extent.tables.append() * SECTOR_BYTES;
            drop(extent.file); // nobody may have it open while its length changes
            if let Some(len) = cut.or(self.lengthened.then_some(used)) {
                self.keeper.opener().resize(&extent.path, len)?;
            }
        }
        Ok(())
    }
}
