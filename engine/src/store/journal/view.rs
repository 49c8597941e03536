//! A disk as it was at a point.
//!
//! A disk that grew since has the size it had then. What lies behind that on the target belongs to no such point; a
//! rollback, which never makes a target smaller, takes it back to what stood there before the first write.
//!
//! A block's content at a point is its image in the earliest undo run from the point's first epoch on; where no run has
//! it, the block was not overwritten since and stands on the target. Over that come the redo entries of the point's
//! own epoch up to the point, where the point lies inside an epoch and not at its end.
//!
//! Invariants: nothing is copied ahead and nothing is changed; each byte was checked by a CRC, or stands on the live
//! target; what is damaged is an error, never guessed, and so is a point that was given up meanwhile. A view reads while new windows are applied, on the thread that
//! applies them, so the target never changes under its feet. Units: bytes, sectors, entry numbers.
//! Called by the thread that owns the target, for mounts, exports, rollbacks and verification.

use std::fmt;
use std::str::FromStr;

use super::applier::{Applier, shape};
use super::error::JournalError;
use super::recovery::LogEntry;
use super::redo_index::{Part, RedoIndex, Wanted, entries_between};
use super::undo::BlockRange;
use super::{Journal, Run, rollback};
use crate::io::{BlockFile, ByteRange, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockIndex, DiskId, SECTOR_BYTES, SectorRange};

/// A point of a disk: an entry of an undo epoch, or a record inside one. As text `EPOCH.NUMBER` or
/// `EPOCH.NUMBER+RECORDS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// The undo epoch.
    pub epoch: u64,
    /// The last entry that counts as a whole; the epoch's last one or any before.
    pub number: u64,
    /// Records of the entry behind it that count, too.
    pub records: u32,
}

impl At {
    /// The point behind a whole entry.
    #[must_use]
    pub const fn entry(epoch: u64, number: u64) -> Self {
        Self { epoch, number, records: 0 }
    }

    /// The last entry of which something counts.
    #[must_use]
    pub const fn through(self) -> u64 {
        self.number.saturating_add((self.records > 0) as u64)
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.number)?;
        if self.records > 0 { write!(f, "+{}", self.records) } else { Ok(()) }
    }
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("{text} is no place of a disk; write EPOCH.NUMBER as `points` shows it");
        let (epoch, rest) = text.split_once('.').ok_or_else(refused)?;
        let (number, records) = rest.split_once('+').unwrap_or((rest, "0"));
        let at = Self {
            epoch: epoch.parse().map_err(|_| refused())?,
            number: number.parse().map_err(|_| refused())?,
            records: records.parse().map_err(|_| refused())?,
        };
        // No entry has the last number there is, so the one behind any has a number, too.
        if at.number == u64::MAX { Err(refused()) } else { Ok(at) }
    }
}

/// What a view is made of, before the log is read.
#[derive(Debug)]
pub struct Plan {
    disk: DiskId,
    from_epoch: u64,
    over: Option<Wanted>,
    size_sectors: u64,
}

impl Plan {
    /// Reads what there is to be read of the log before the first block can be answered: for a point inside an undo epoch,
    /// what the epoch's entries up to it wrote. Nothing of the journal is needed any more, so others commit meanwhile.
    ///
    /// # Errors
    /// When an entry is damaged, or was given up meanwhile.
    pub fn open(self) -> Result<View, JournalError> {
        let Self { disk, from_epoch, over, size_sectors } = self;
        Ok(View { disk, from_epoch, over: over.map(Wanted::index).transpose()?, size_sectors })
    }

    /// Whether images of a sealed run count for it.
    pub(super) const fn needs(&self, run: &Run) -> bool {
        run.first >= self.from_epoch
    }

    /// Whether nothing of the log is read for it.
    pub(super) const fn is_at_border(&self) -> bool {
        self.over.is_none()
    }
}

/// A disk as it was.
#[derive(Debug)]
pub struct View {
    disk: DiskId,
    /// Undo runs from this epoch on count.
    from_epoch: u64,
    /// What redo entries wrote, of the epoch up to the point.
    over: Option<RedoIndex>,
    /// The size the disk had.
    size_sectors: u64,
}

impl View {
    /// The disk as it was at a point, to be opened.
    ///
    /// # Errors
    /// When the point is not in the journal any more (it says what is).
    pub fn plan(journal: &Journal, disk: DiskId, at: At) -> Result<Plan, JournalError> {
        let (from_epoch, over) = match base(journal, disk, at)? {
            Base::Border(from) => (from, None),
            Base::Inside(after) => {
                let wanted = Wanted::of(journal, disk, after, (at.number, at.records));
                (at.epoch, Some(wanted.map_err(|number| not_kept(disk, number))?))
            }
        };
        let size_sectors = shape(journal, disk)?.size_at(at.through());
        Ok(Plan { disk, from_epoch, over, size_sectors })
    }

    /// The disk as it was at a point, by who has the journal to itself.
    ///
    /// # Errors
    /// As for [`Self::plan`] and [`Plan::open`].
    pub fn open(journal: &Journal, disk: DiskId, at: At) -> Result<Self, JournalError> {
        Self::plan(journal, disk, at)?.open()
    }

    /// The size the disk had; the target may have grown since.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_sectors * SECTOR_BYTES
    }

    /// Whether a point can be had, as far as that is known without reading any data.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(journal: &Journal, disk: DiskId, at: At) -> Result<(), JournalError> {
        Self::needed(journal, disk, at).map(drop)
    }

    /// The oldest segment of the redo log that a point needs; `None` where it needs none.
    #[must_use]
    pub fn oldest_segment(journal: &Journal, disk: DiskId, at: At) -> Option<u64> {
        let needed = Self::needed(journal, disk, at).ok()?;
        needed.iter().map(|entry| entry.place.segment).min()
    }

    fn needed(journal: &Journal, disk: DiskId, at: At) -> Result<&[LogEntry], JournalError> {
        let Base::Inside(after) = base(journal, disk, at)? else { return Ok(&[]) };
        let number = at.through();
        entries_between(journal, disk, after, number).map_err(|number| not_kept(disk, number))
    }

    /// The disk as it would be if everything in the log were applied: what stands on the target, which has all entries
    /// up to `applied` and perhaps parts of later ones, and those entries over it. An interrupted rollback is seen as
    /// finished: in the size that the disk has, for a rollback does not change that.
    ///
    /// # Errors
    /// When an entry behind `applied` is not there or damaged, and no compare made up for it since.
    pub fn newest(journal: &Journal, disk: DiskId, applied: u64) -> Result<Self, JournalError> {
        let size_sectors = shape(journal, disk)?.size_sectors();
        let plan = match rollback::goes_to(journal, disk)? {
            Some(at) => Plan { size_sectors, ..Self::plan(journal, disk, at)? },
            None => Plan { disk, from_epoch: u64::MAX, over: None, size_sectors },
        };
        let number = journal.entries(disk).last().map_or(applied, |entry| entry.number.max(applied));
        let waiting = waiting(journal, disk, applied, number)?;
        let over = match plan.over {
            Some(over) => over.and(waiting),
            None => waiting,
        };
        Plan { over: Some(over), ..plan }.open()
    }

    /// The sealed runs that count now, opened. More are added as undo epochs end, so a reader asks each time.
    ///
    /// # Errors
    /// When one cannot be opened; [`JournalError::Gone`] when the point was given up since it was planned, and others would
    /// be shown in the place of its images.
    pub fn open_runs<T: BlockFile>(
        &self,
        journal: &Journal,
        applier: &mut Applier<T>,
    ) -> Result<Vec<Run>, JournalError> {
        let known = shape(journal, self.disk)?;
        if self.from_epoch <= known.expired || known.is_merged_across(self.from_epoch) {
            let what = format!("the undo run of epoch {} is not kept any more", self.from_epoch);
            return Err(JournalError::Gone { disk: self.disk, what });
        }
        let counts = |run: &&Run| run.first >= self.from_epoch;
        let runs: Vec<Run> = known.runs.iter().filter(counts).copied().collect();
        for run in &runs {
            applier.open_run(journal, *run)?;
        }
        Ok(runs)
    }

    /// Fills `out` with what stood at byte `offset`; `runs` are those of [`Self::open_runs`]. The journal is not needed
    /// any more, so that others commit meanwhile.
    ///
    /// # Errors
    /// When an image is damaged, or the target cannot be read.
    pub fn read<T: BlockFile>(
        &self,
        runs: &[Run],
        applier: &mut Applier<T>,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), JournalError> {
        debug_assert_eq!(self.disk, applier.disk());
        let end = offset + out.len() as u64;
        let first = offset / BLOCK_BYTES;
        let blocks = BlockRange::new(first, end.div_ceil(BLOCK_BYTES));
        if offset.is_multiple_of(BLOCK_BYTES) && end.is_multiple_of(BLOCK_BYTES) {
            return self.read_parts(runs, applier, &mut [(blocks, out)]);
        }
        let mut plain = vec![0; ((blocks.end - blocks.start) * BLOCK_BYTES) as usize];
        self.read_parts(runs, applier, &mut [(blocks, &mut plain)])?;
        let from = (offset - first * BLOCK_BYTES) as usize;
        out.copy_from_slice(plain.get(from..from + out.len()).unwrap_or_default());
        Ok(())
    }

    /// As [`Self::read`] of whole blocks, in many places: what the log has of them is read in its order.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub(super) fn read_parts<T: BlockFile>(
        &self,
        runs: &[Run],
        applier: &mut Applier<T>,
        parts: &mut [Part<'_>],
    ) -> Result<(), JournalError> {
        for (blocks, plain) in parts.iter_mut() {
            self.read_images(runs, applier, *blocks, plain)?;
        }
        self.over.as_ref().map_or(Ok(()), |over| over.lay_over(parts))
    }

    /// Blocks as they were when the point's undo epoch began.
    fn read_images<T: BlockFile>(
        &self,
        runs: &[Run],
        applier: &mut Applier<T>,
        blocks: BlockRange,
        plain: &mut [u8],
    ) -> Result<(), JournalError> {
        let mut missing = vec![blocks];
        for run in runs {
            let sealed = applier.sealed_run(*run)?;
            let mut left = Vec::new();
            for part in missing {
                let mut at = part.start;
                for found in sealed.lookup(part)? {
                    let range = found.blocks;
                    sealed.read(BlockIndex(range.start), slice(plain, blocks, range))?;
                    if at < range.start {
                        left.push(BlockRange::new(at, range.start));
                    }
                    at = range.end;
                }
                if at < part.end {
                    left.push(BlockRange::new(at, part.end));
                }
            }
            missing = left;
        }
        for part in missing {
            self.read_newest(applier, blocks, part, plain)?;
        }
        Ok(())
    }

    /// Blocks that no sealed run has: from the run that is being written, or from the target.
    fn read_newest<T: BlockFile>(
        &self,
        applier: &mut Applier<T>,
        blocks: BlockRange,
        part: BlockRange,
        plain: &mut [u8],
    ) -> Result<(), JournalError> {
        let mut at = part.start;
        let captured: Vec<BlockRange> = match applier.active_run()? {
            Some(run) if run.header().undo_epoch >= self.from_epoch => {
                let found: Vec<BlockRange> = run.lookup(part).iter().map(|found| found.blocks).collect();
                for range in &found {
                    run.read_blocks(BlockIndex(range.start), slice(plain, blocks, *range))?;
                }
                found
            }
            _ => Vec::new(),
        };
        let size = applier.size_sectors() * SECTOR_BYTES;
        let last = BlockRange::new(part.end, part.end);
        for range in captured.into_iter().chain([last]) {
            if at < range.start {
                let live = BlockRange::new(at, range.start);
                let bytes = slice(plain, blocks, live);
                let start = live.start * BLOCK_BYTES;
                let len = ((live.end * BLOCK_BYTES).min(size) - start) as usize;
                let data = bytes.get_mut(..len).unwrap_or_default();
                applier.target().read(&mut [ReadAt { offset: start, data }])?;
            }
            at = at.max(range.end);
        }
        Ok(())
    }

    /// Blocks of `within` that may differ from the live target: what any run from the point on holds, and the redo
    /// entries.
    ///
    /// # Errors
    /// When a run cannot be read.
    pub fn differing<T: BlockFile>(
        &self,
        runs: &[Run],
        applier: &mut Applier<T>,
        within: BlockRange,
    ) -> Result<Vec<BlockRange>, JournalError> {
        let mut ranges: Vec<BlockRange> = Vec::new();
        for run in runs {
            ranges.extend(applier.sealed_run(*run)?.lookup(within)?.iter().map(|found| found.blocks));
        }
        if let Some(run) = applier.active_run()?.filter(|run| run.header().undo_epoch >= self.from_epoch) {
            ranges.extend(run.lookup(within).iter().map(|found| found.blocks));
        }
        let sectors = SectorRange::new(within.start * BLOCK_SECTORS, within.end * BLOCK_SECTORS);
        let over = self.over.iter().flat_map(|over| over.ranges(sectors));
        ranges.extend(
            over.map(|range| BlockRange::new(range.start / BLOCK_SECTORS, range.end.div_ceil(BLOCK_SECTORS))),
        );
        ranges.sort_unstable_by_key(|range| range.start);
        Ok(joined(ranges))
    }

    /// The parts of a byte range that may hold something else than zeros.
    ///
    /// # Errors
    /// When the target cannot be asked, or a run cannot be read.
    pub fn allocated<T: BlockFile>(
        &self,
        runs: &[Run],
        applier: &mut Applier<T>,
        range: ByteRange,
    ) -> Result<Vec<ByteRange>, JournalError> {
        let live = applier.target().allocated(range)?;
        let within = BlockRange::new(range.start / BLOCK_BYTES, range.end.div_ceil(BLOCK_BYTES));
        let changed = self.differing(runs, applier, within)?;
        let changed = changed.into_iter().map(|blocks| ByteRange {
            start: (blocks.start * BLOCK_BYTES).clamp(range.start, range.end),
            end: (blocks.end * BLOCK_BYTES).clamp(range.start, range.end),
        });
        let mut all: Vec<ByteRange> =
            live.into_iter().chain(changed.filter(|part| !part.is_empty())).collect();
        all.sort_unstable();
        let mut found: Vec<ByteRange> = Vec::new();
        for part in all {
            match found.last_mut() {
                Some(last) if last.end >= part.start => last.end = last.end.max(part.end),
                _ => found.push(part),
            }
        }
        Ok(found)
    }
}

/// What waits behind `applied`, up to an entry, without what was lost and a compare made up for by then.
fn waiting(journal: &Journal, disk: DiskId, applied: u64, number: u64) -> Result<Wanted, JournalError> {
    let wanted = |after, number| {
        Wanted::of(journal, disk, after, (number, 0)).map_err(|number| not_kept(disk, number))
    };
    let lost = &shape(journal, disk)?.lost;
    let mut mended: Vec<(u64, u64)> = lost
        .iter()
        .filter(|loss| loss.mended.is_some_and(|mended| mended <= number))
        .map(|loss| (loss.entries.first, loss.entries.last))
        .collect();
    mended.sort_unstable();
    let (mut all, mut after) = (wanted(applied, applied)?, applied);
    for (first, last) in mended.into_iter().filter(|(_, last)| *last > applied) {
        all = all.and(wanted(after, after.max(first - 1))?);
        after = after.max(last);
    }
    Ok(all.and(wanted(after, after.max(number))?))
}

fn slice(plain: &mut [u8], blocks: BlockRange, part: BlockRange) -> &mut [u8] {
    let from = ((part.start - blocks.start) * BLOCK_BYTES) as usize;
    let to = ((part.end - blocks.start) * BLOCK_BYTES) as usize;
    plain.get_mut(from..to).unwrap_or_default()
}

fn joined(ranges: Vec<BlockRange>) -> Vec<BlockRange> {
    let mut joined: Vec<BlockRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What a point is made from.
enum Base {
    /// It is the beginning or the end of an undo epoch: runs from this one on and the target say it all.
    Border(u64),
    /// It lies inside its epoch: the images of the epoch, and the entries behind this one over them.
    Inside(u64),
}

fn base(journal: &Journal, disk: DiskId, at: At) -> Result<Base, JournalError> {
    let known = shape(journal, disk)?;
    let gone = |what: String| JournalError::Gone { disk, what };
    let Some(epoch) = known.epochs.iter().find(|epoch| epoch.opened.epoch == at.epoch) else {
        let oldest = known.expired + 1;
        return Err(gone(format!("undo epoch {} is not kept; the oldest kept is {oldest}", at.epoch)));
    };
    let (after, last) = (epoch.opened.after, epoch.closed.map_or(u64::MAX, |closed| closed.last));
    if at.number < after || at.through() > last {
        return Err(gone(format!("entry {} is not in undo epoch {}", at.number, at.epoch)));
    }
    let from = known.runs_from(at.epoch, at.number).filter(|_| at.records == 0).unwrap_or(at.epoch);
    if known.is_merged_across(from) {
        return Err(gone(format!("the undo run of epoch {} was made one with others", at.epoch)));
    }
    let at_border = from > at.epoch || (at.number == after && at.records == 0);
    Ok(if at_border { Base::Border(from) } else { Base::Inside(after) })
}

fn not_kept(disk: DiskId, number: u64) -> JournalError {
    let what = format!("entry {number} of the redo log is not kept; choose the end of an undo epoch");
    JournalError::Gone { disk, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_of_a_disk_is_read_as_it_is_written_and_no_number_of_it_overflows() {
        for at in [At::entry(1, 0), At::entry(3, 70), At { epoch: 9, number: 5, records: u32::MAX }] {
            assert_eq!(at.to_string().parse(), Ok(at));
        }
        let newest = At { epoch: u64::MAX, number: u64::MAX - 1, records: 1 };
        assert_eq!((newest.to_string().parse(), newest.through()), (Ok(newest), u64::MAX));
        for text in
            ["", "1", "1.", ".1", "1.2+", "1.2+x", "1.18446744073709551615", "1.18446744073709551615+1"]
        {
            let error = text.parse::<At>().unwrap_err();
            assert!(error.contains("EPOCH.NUMBER"), "{text}: {error}");
        }
    }
}
