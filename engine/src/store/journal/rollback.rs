//! A disk goes back to a point, in place, and can go forward again.
//!
//! A rollback is an undo epoch of its own whose writes are the disk as it was: what stands on the target now is saved
//! first, like anything that is overwritten. So the end of the epoch before it stays a point, and going forward is a
//! rollback to that. The epoch names where it goes, so that one that was interrupted is finished before anything else
//! is applied; writing the same again is harmless.
//!
//! Invariants: I1, I2; the view it writes does not change while it is written, for blocks it overwrites were in an older
//! run already. Units: blocks, entry numbers. Called by the thread that owns the target.

use std::thread::{self, ScopedJoinHandle};

use bytes::Bytes;

use super::applier::{Applier, Position, shape};
use super::capture::{Known, save_known};
use super::entry::{Content, Write};
use super::error::JournalError;
use super::undo::{ActiveRun, BlockRange, UndoError};
use super::view::{At, View};
use super::window::Window;
use super::{Journal, Run};
use crate::format::manifest::EpochCause;
use crate::format::segment::Applied;
use crate::io::buffer::PoolBuf;
use crate::io::{BlockFile, ReadAt};
use crate::mutants::{Mutant, mutant};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, DiskId, SECTOR_BYTES, SectorRange, Timestamp};

/// Blocks compared, saved and written in one go, with one pair of flushes and one commit of the log: bounds the memory, to
/// that of three steps, each with what stands there and what stood there.
const STEP_BLOCKS: u64 = 2048;
/// Zeros that become a hole; fewer are written.
const HOLE_BLOCKS_MIN: usize = 16;
/// Blocks of one write.
const RUN_BLOCKS_MAX: usize = 256;

/// What a rollback did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RolledBack {
    /// Bytes that could differ and were compared.
    pub compared_bytes: u64,
    /// Bytes that did differ and were written.
    pub written_bytes: u64,
}

/// Takes the disk back to a point. Every entry of the log was applied; the undo epoch that goes on is ended first.
///
/// # Errors
/// When the point is not kept (nothing has changed then); when an image is damaged or something cannot be written: the
/// target may then hold parts of both states, and the undo epoch stays open. It ends by [`resume`], or by a rollback to
/// another point.
pub fn rollback<T: BlockFile>(
    journal: &mut Journal,
    applier: &mut Applier<T>,
    at: At,
    position: Position,
    now: Timestamp,
) -> Result<RolledBack, JournalError> {
    let view = View::open(journal, applier.disk(), at)?; // refused before anything is changed
    begin(journal, applier, at, position, now)?;
    finish(journal, applier, Some(view), now)
}

/// Where a disk is going back to, when a rollback was begun and has not ended.
///
/// # Errors
/// When the disk is not in the journal.
pub fn goes_to(journal: &Journal, disk: DiskId) -> Result<Option<At>, JournalError> {
    let open = shape(journal, disk)?.open_epoch().map(|epoch| epoch.opened);
    let epoch = open.filter(|epoch| epoch.cause == EpochCause::Rollback);
    Ok(epoch.map(|epoch| At { epoch: epoch.to_epoch, number: epoch.to_number, records: epoch.to_records }))
}

/// Begins one: from here on the disk is going back, whatever happens to its program. The caller opened the point before, so
/// that what cannot be had is refused before anything is changed.
///
/// # Errors
/// When the point is not kept, or the journal cannot be written.
pub fn begin<T: BlockFile>(
    journal: &mut Journal,
    applier: &mut Applier<T>,
    at: At,
    position: Position,
    now: Timestamp,
) -> Result<(), JournalError> {
    View::check(journal, applier.disk(), at)?;
    journal.commit(now)?;
    applier.close_epoch(journal, now)?;
    applier.begin_epoch(journal, EpochCause::Rollback, position, Some(at), now)?;
    Ok(())
}

/// Finishes a rollback that was interrupted; does nothing where there is none.
///
/// # Errors
/// As for [`rollback`].
pub fn resume<T: BlockFile>(
    journal: &mut Journal,
    applier: &mut Applier<T>,
    now: Timestamp,
) -> Result<RolledBack, JournalError> {
    if mutant(Mutant::ForgetRollback) {
        return Ok(RolledBack::default());
    }
    finish(journal, applier, None, now)
}

fn finish<T: BlockFile>(
    journal: &mut Journal,
    applier: &mut Applier<T>,
    view: Option<View>,
    now: Timestamp,
) -> Result<RolledBack, JournalError> {
    let Some(begun) = Begun::of(journal, applier, view)? else { return Ok(RolledBack::default()) };
    let disk = applier.disk();
    let mut name = |named| {
        journal.append_applied(disk, named, now)?;
        journal.commit(now)
    };
    let done = begun.find(applier)?.take_back(applier, &mut name, &|| false)?;
    end(applier, &mut name, now)?;
    applier.close_epoch(journal, now)?;
    Ok(done)
}

/// Ends one that took everything back, but for its undo epoch, which the caller closes: that writes no more than a line of the
/// manifest then. `name` as for [`Going::take_back`].
///
/// # Errors
/// When something cannot be written.
pub fn end<T: BlockFile>(
    applier: &mut Applier<T>,
    name: &mut Name<'_>,
    now: Timestamp,
) -> Result<(), JournalError> {
    applier.write_window(&Window::default())?;
    let number = applier.applied().number;
    name(applier.applied_through(number))?;
    applier.seal_run(now)
}

/// Cuts ranges into steps of [`STEP_BLOCKS`].
fn steps(ranges: Vec<BlockRange>) -> Vec<Vec<BlockRange>> {
    let (mut steps, mut step, mut room) = (Vec::new(), Vec::new(), STEP_BLOCKS);
    for range in ranges {
        let mut first = range.start;
        while first < range.end {
            let end = range.end.min(first + room);
            step.push(BlockRange::new(first, end));
            room -= end - first;
            first = end;
            if room == 0 {
                steps.push(std::mem::take(&mut step));
                room = STEP_BLOCKS;
            }
        }
    }
    if !step.is_empty() {
        steps.push(step);
    }
    steps
}

/// Scattered blocks that are taken back together, up to [`STEP_BLOCKS`].
struct Step {
    ranges: Vec<BlockRange>,
    /// What stands there now, one range behind the other.
    live: PoolBuf,
    /// What stood there then, where that is something else.
    window: Window,
}

impl Step {
    /// Reads what stands there and what stood there; [`preload`] came before.
    fn read<T: BlockFile>(
        runs: &[Run],
        applier: &mut Applier<T>,
        view: &View,
        ranges: Vec<BlockRange>,
    ) -> Result<Self, JournalError> {
        let size_bytes = applier.size_sectors() * SECTOR_BYTES;
        let lens: Vec<usize> = ranges.iter().map(|blocks| bytes_of(*blocks, size_bytes)).collect();
        let buffer = || PoolBuf::alone(lens.iter().sum()).map_err(UndoError::from);
        let (mut live, mut then) = (buffer()?, buffer()?);
        let mut reads: Vec<ReadAt<'_>> = ranges
            .iter()
            .zip(cut(&mut live, &lens))
            .map(|(blocks, data)| ReadAt { offset: blocks.start * BLOCK_BYTES, data })
            .collect();
        applier.target().read(&mut reads)?;
        let parts = ranges.iter().copied().zip(cut(&mut then, &lens));
        // The disk may end inside its last block.
        let (mut whole, rest): (Vec<_>, Vec<_>) =
            parts.partition(|(blocks, out)| out.len() as u64 == blocks.len() * BLOCK_BYTES);
        view.read_parts(runs, applier, &mut whole)?;
        for (blocks, out) in rest {
            view.read(runs, applier, blocks.start * BLOCK_BYTES, out)?;
        }
        for run in runs {
            applier.sealed_run(*run)?.preload(&[])?; // gives the memory back
        }
        let (mut window, then, mut at) = (Window::default(), then.into_bytes(), 0);
        for (blocks, len) in ranges.iter().zip(lens) {
            put_differing(&mut window, *blocks, &then.slice(at..at + len), &live[at..at + len]);
            at += len;
        }
        Ok(Self { ranges, live, window })
    }

    /// What stands there was read to be compared: it is saved without being read again.
    fn known(&self) -> Vec<Known<'_>> {
        let mut rest: &[u8] = &self.live;
        let known = |blocks: &BlockRange| {
            let (bytes, tail) = rest.split_at(rest.len().min((blocks.len() * BLOCK_BYTES) as usize));
            rest = tail;
            Known { blocks: *blocks, bytes }
        };
        self.ranges.iter().map(known).collect()
    }
}

/// Bytes of blocks of a disk; the last one may be a part of one.
const fn bytes_of(blocks: BlockRange, size_bytes: u64) -> usize {
    let end = blocks.end * BLOCK_BYTES;
    ((if end < size_bytes { end } else { size_bytes }) - blocks.start * BLOCK_BYTES) as usize
}

/// Parts of these lengths, one behind the other.
fn cut<'a>(mut buffer: &'a mut [u8], lens: &[usize]) -> Vec<&'a mut [u8]> {
    let part = |len: &usize| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(*len);
        buffer = rest;
        part
    };
    lens.iter().map(part).collect()
}

/// Makes durable in the log what it is given, before a step is written.
pub type Name<'a> = dyn FnMut(Applied) -> Result<(), JournalError> + 'a;

/// A rollback that was begun.
#[derive(Debug)]
pub struct Begun {
    view: View,
    runs: Vec<Run>,
}

/// A rollback that knows what differs. Others use the journal while it goes on.
#[derive(Debug)]
pub struct Going {
    view: View,
    runs: Vec<Run>,
    steps: Vec<Vec<BlockRange>>,
}

impl Begun {
    /// The one that was begun; `None` where there is none. `view`: of where it goes to, where somebody opened it before.
    ///
    /// # Errors
    /// When what the point needs of the log is damaged or not kept, or an undo run cannot be opened.
    pub fn of<T: BlockFile>(
        journal: &Journal,
        applier: &mut Applier<T>,
        view: Option<View>,
    ) -> Result<Option<Self>, JournalError> {
        let Some(at) = goes_to(journal, applier.disk())? else { return Ok(None) };
        let plan = View::plan(journal, applier.disk(), at)?;
        // Meanwhile the point may be the end of its epoch, which ended.
        let view = match view {
            Some(view) if !plan.is_at_border() => view,
            _ => plan.open()?,
        };
        let runs = view.open_runs(journal, applier)?;
        Ok(Some(Self { view, runs }))
    }

    /// Finds what differs: reads the indexes of all undo runs since the point.
    ///
    /// # Errors
    /// When one of them is damaged, or cannot be read.
    pub fn find<T: BlockFile>(self, applier: &mut Applier<T>) -> Result<Going, JournalError> {
        let Self { view, runs } = self;
        let whole = BlockRange::new(0, applier.size_sectors().div_ceil(BLOCK_SECTORS));
        let own = applier.take_active()?;
        let differing = view.differing(&runs, applier, whole);
        applier.put_active(own);
        Ok(Going { view, runs, steps: steps(differing?) })
    }
}

impl Going {
    /// Takes everything back. `name` puts into the log, durably, what a step's before-images are named by; it is called
    /// before the target is written. `is_interrupted` is asked between two steps.
    ///
    /// # Errors
    /// When an image is damaged, something cannot be read or written, or it was interrupted: it may be resumed.
    pub fn take_back<T: BlockFile>(
        self,
        applier: &mut Applier<T>,
        name: &mut Name<'_>,
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<RolledBack, JournalError> {
        let Self { view, runs, steps } = self;
        let mut line = Line { runs: &runs, view: &view, name, is_interrupted, done: RolledBack::default() };
        line.take_back(applier, steps)?;
        Ok(line.done)
    }
}

/// A step whose before-images are durable, and what the log must name before it is written.
type Saved = (Step, Option<Applied>);

/// Steps on their way. Three at a time: one is written, of the next another thread saves the before-images, and one is
/// read; so neither the medium nor the processors wait for one another.
struct Line<'a, 'n> {
    runs: &'a [Run],
    view: &'a View,
    name: &'a mut Name<'n>,
    is_interrupted: &'a dyn Fn() -> bool,
    done: RolledBack,
}

impl Line<'_, '_> {
    fn take_back<T: BlockFile>(
        &mut self,
        applier: &mut Applier<T>,
        steps: Vec<Vec<BlockRange>>,
    ) -> Result<(), JournalError> {
        let (mut read, mut saved): (Option<Step>, Option<Saved>) = (None, None);
        // Two turns more than steps: until the last one is written.
        for ranges in steps.into_iter().map(Some).chain([None, None]) {
            if (self.is_interrupted)() {
                return Err(JournalError::Interrupted { disk: applier.disk() });
            }
            let (next, named) = self.turn(applier, ranges, read.as_ref(), saved.take())?;
            saved = read.map(|step| (step, named));
            read = next;
        }
        Ok(())
    }

    /// Writes what is saved, saves what is read, and reads the next, beside one another; one after another where the next
    /// needs images of the run that they are saved in. Answers the next, and what names the images that were saved.
    fn turn<T: BlockFile>(
        &mut self,
        applier: &mut Applier<T>,
        ranges: Option<Vec<BlockRange>>,
        read: Option<&Step>,
        saved: Option<Saved>,
    ) -> Result<(Option<Step>, Option<Applied>), JournalError> {
        let beside = match &ranges {
            Some(ranges) => preload(self.runs, applier, ranges)?,
            None => true,
        };
        let mut active = if beside { applier.take_active()? } else { None };
        let (saving, next) = thread::scope(|scope| {
            let save = |(step, run): (&Step, &mut ActiveRun)| {
                save_known(run, &step.window, &step.known()).and_then(|()| Ok(run.flush()?))
            };
            let work = read.zip(active.as_mut()).filter(|(step, _)| step.window.bytes() > 0);
            let thread = || thread::Builder::new().name("before-images".to_owned());
            // Where there is no thread to be had, they are saved below.
            let saving = work.and_then(|work| thread().spawn_scoped(scope, move || save(work)).ok());
            let next = self.write(applier, saved).and_then(|()| {
                ranges.map(|ranges| Step::read(self.runs, applier, self.view, ranges)).transpose()
            });
            (saving.map_or(Ok(Ok(())), ScopedJoinHandle::join), next)
        });
        if beside {
            applier.put_active(active);
        }
        saving.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let next = next?;
        let named = match read.filter(|step| step.window.bytes() > 0) {
            Some(step) => applier.save_over(&step.window, &step.known())?,
            None => None,
        };
        Ok((next, named))
    }

    /// Writes what stood there.
    fn write<T: BlockFile>(
        &mut self,
        applier: &mut Applier<T>,
        saved: Option<Saved>,
    ) -> Result<(), JournalError> {
        let Some((step, named)) = saved else { return Ok(()) };
        self.done.compared_bytes += step.live.len() as u64;
        self.done.written_bytes += step.window.bytes();
        if let Some(named) = named {
            (self.name)(named)?;
        }
        if step.window.bytes() > 0 { applier.write_window(&step.window) } else { Ok(()) }
    }
}

/// Has the images of the blocks read together, from each run what no older one has: one by one they take as long as
/// the medium takes for each. Answers whether the runs have all of them.
fn preload<T: BlockFile>(
    runs: &[Run],
    applier: &mut Applier<T>,
    ranges: &[BlockRange],
) -> Result<bool, JournalError> {
    let mut missing = ranges.to_vec();
    for run in runs {
        let sealed = applier.sealed_run(*run)?;
        sealed.preload(&missing)?;
        let mut left = Vec::new();
        for range in missing {
            let mut at = range.start;
            for found in sealed.lookup(range)? {
                if at < found.blocks.start {
                    left.push(BlockRange::new(at, found.blocks.start));
                }
                at = found.blocks.end;
            }
            if at < range.end {
                left.push(BlockRange::new(at, range.end));
            }
        }
        missing = left;
    }
    Ok(missing.is_empty())
}

/// What becomes of a block that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// It is as it was.
    Same,
    /// It held zeros.
    Zeros,
    /// It held something.
    Data,
}

/// Puts the blocks that are not as they were into a window, neighbours together. Zeros become a hole where they are many: a
/// hole costs a file system more than a few written blocks.
fn put_differing(window: &mut Window, blocks: BlockRange, then: &Bytes, now: &[u8]) {
    const SIZE: usize = BLOCK_BYTES as usize;
    let turn = |(old, new): (&[u8], &[u8])| match old == new {
        true => Turn::Same,
        false if old.iter().all(|byte| *byte == 0) => Turn::Zeros,
        false => Turn::Data,
    };
    let mut turns: Vec<Turn> = then.chunks(SIZE).zip(now.chunks(SIZE)).map(turn).collect();
    for run in turns.chunk_by_mut(|left, right| left == right) {
        if run.len() < HOLE_BLOCKS_MIN && run.first() == Some(&Turn::Zeros) {
            run.fill(Turn::Data);
        }
    }
    let mut first = 0;
    for run in turns.chunk_by(|left, right| left == right) {
        for part in run.chunks(RUN_BLOCKS_MAX) {
            let (from, to) = (first * SIZE, ((first + part.len()) * SIZE).min(then.len()));
            let sector = (blocks.start + first as u64) * BLOCK_SECTORS;
            let range = SectorRange::new(sector, sector + (to - from) as u64 / SECTOR_BYTES);
            match part.first() {
                Some(Turn::Zeros) => window.put(Write { range, content: Content::Zeros }),
                Some(Turn::Data) => {
                    window.put(Write { range, content: Content::Data(then.slice(from..to)) });
                }
                Some(Turn::Same) | None => {}
            }
            first += part.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter for each block: what it held and holds, as `.` zeros or a letter; the last block is half of one.
    fn put(then: &str, now: &str) -> Vec<(u64, u64, bool)> {
        let bytes = |text: &str| -> Vec<u8> {
            let blocks = text.bytes().map(|letter| if letter == b'.' { 0 } else { letter });
            let mut bytes: Vec<u8> = blocks.flat_map(|byte| [byte; BLOCK_BYTES as usize]).collect();
            bytes.truncate(bytes.len() - BLOCK_BYTES as usize / 2);
            bytes
        };
        let (then, now) = (Bytes::from(bytes(then)), bytes(now));
        let mut window = Window::default();
        put_differing(&mut window, BlockRange::new(100, 100 + now.len().div_ceil(4096) as u64), &then, &now);
        let mut at_hand = now.clone();
        let runs: Vec<(u64, u64, bool)> = window
            .runs()
            .map(|Write { range, content }| {
                let place = |sector: u64| ((sector - 100 * BLOCK_SECTORS) * SECTOR_BYTES) as usize;
                let out = &mut at_hand[place(range.start)..place(range.end)];
                match content {
                    Content::Zeros => out.fill(0),
                    Content::Data(data) => out.copy_from_slice(data),
                }
                (range.start, range.end, matches!(content, Content::Zeros))
            })
            .collect();
        assert_eq!(at_hand, then, "written over what stands there it is what stood there");
        runs
    }

    #[test]
    fn neighbours_go_back_together_and_only_many_zeros_become_a_hole() {
        let few = "a".repeat(HOLE_BLOCKS_MIN - 1);
        let many = "a".repeat(HOLE_BLOCKS_MIN);
        let zeros = |text: &str| ".".repeat(text.len());
        let sectors = |from: usize, to: usize| (800 + 8 * from as u64, 800 + 8 * to as u64);
        let runs = put(&format!("xy.{}z", zeros(&few)), &format!("xx.{few}a"));
        let ((from, _), (to, half)) = (sectors(1, 2), sectors(3, 3 + few.len()));
        assert_eq!(runs, [(from, from + 8, false), (to, half + 4, false)], "what is the same is not written");
        let runs = put(&format!("b{}bb", zeros(&many)), &format!("a{many}aa"));
        let hole = sectors(1, 1 + many.len());
        assert_eq!(runs, [(800, 808, false), (hole.0, hole.1, true), (hole.1, hole.1 + 12, false)]);
        let large = "b".repeat(2 * RUN_BLOCKS_MAX);
        let runs = put(&large, &"a".repeat(large.len()));
        assert_eq!(runs.len(), 2, "each a megabyte");
    }
}
