//! A disk goes back to a point, in place, and can go forward again.
//!
//! A rollback is an undo epoch of its own whose writes are the disk as it was: what stands on the target now is saved
//! first, like anything that is overwritten. So the end of the epoch before it stays a point, and going forward is a
//! rollback to that. The epoch names where it goes, so that one that was interrupted is finished before anything else
//! is applied; writing the same again is harmless.
//!
//! Invariants: I1, I2; the view it writes does not change while it is written, for blocks it overwrites were in an older
//! run already: so its own run is never asked, and images that were lost from it cost points, not the rollback. What it
//! saved is named in the log before it writes; it has no entries that could tell damage from a torn end. Units: blocks, entry numbers. Called by the thread that owns the target.

use std::thread::{self, ScopedJoinHandle};

use bytes::Bytes;

use super::applier::{Applier, Position, SealedRuns, shape};
use super::capture::{Known, save_known};
use super::entry::{Content, Write};
use super::error::JournalError;
use super::undo::{ActiveRun, BlockRange};
use super::view::{At, View};
use super::window::Window;
use super::{Journal, Run};
use crate::format::manifest::EpochCause;
use crate::io::{BlockFile, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES, SectorRange, Timestamp};

/// Blocks compared, saved and written in one go, with one pair of flushes: bounds the memory, to that of two steps, each
/// with what stands there, what stood there, and the images that is made of.
const STEP_BLOCKS: u64 = 4096;

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
/// When the point is not kept or damaged (nothing has changed then), or something cannot be written: opened anew, the
/// disk goes on with [`resume`].
pub fn rollback<T: BlockFile>(
    journal: &mut Journal,
    applier: &mut Applier<T>,
    at: At,
    position: Position,
    now: Timestamp,
) -> Result<RolledBack, JournalError> {
    View::open(journal, applier.disk(), at)?; // refused before anything is changed
    journal.commit(now)?;
    applier.close_epoch(journal, now)?;
    applier.begin_epoch(journal, EpochCause::Rollback, position, Some(at), now)?;
    resume(journal, applier, now)
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
    let open = shape(journal, applier.disk())?.open_epoch().map(|epoch| epoch.opened);
    let Some(epoch) = open.filter(|epoch| epoch.cause == EpochCause::Rollback) else {
        return Ok(RolledBack::default());
    };
    let at = At { epoch: epoch.to_epoch, number: epoch.to_number, records: epoch.to_records };
    let view = View::open(journal, applier.disk(), at)?;
    let mut done = RolledBack::default();
    let whole = BlockRange::new(0, applier.size_sectors().div_ceil(BLOCK_SECTORS));
    let runs = view.open_runs(journal, applier)?;
    let mut waiting: Option<Step> = None;
    let own = applier.take_active();
    let differing = view.differing(&runs, applier, whole);
    applier.put_active(own);
    for ranges in steps(differing?) {
        let next = match waiting.take() {
            Some(last) => {
                let mut beside = Beside { journal, applier, now, done: &mut done };
                beside.write_and_prepare(&runs, &view, &last, ranges)?
            }
            None => {
                preload(&runs, applier.sealed_runs(), &ranges)?;
                Step::prepare(&runs, applier, &view, ranges)?
            }
        };
        waiting = Some(next);
    }
    if let Some(last) = waiting {
        Beside { journal, applier, now, done: &mut done }.write(&last)?;
    }
    let number = applier.applied().number;
    applier.apply(journal, number, &Window::default(), now)?;
    journal.commit(now)?;
    applier.close_epoch(journal, now)?;
    Ok(done)
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
    /// What stands there now, for each range.
    live: Vec<Vec<u8>>,
    /// What stood there then, where that is something else.
    window: Window,
}

impl Step {
    /// Reads what stands there and what stood there; [`preload`] came before.
    fn prepare<T: BlockFile>(
        runs: &[Run],
        applier: &mut Applier<T>,
        view: &View,
        ranges: Vec<BlockRange>,
    ) -> Result<Self, JournalError> {
        let live = read_live(applier, &ranges)?;
        let mut then = Vec::with_capacity(ranges.len());
        for (blocks, now) in ranges.iter().zip(&live) {
            let mut bytes = vec![0; now.len()];
            view.read(runs, applier, blocks.start * BLOCK_BYTES, &mut bytes)?;
            then.push(bytes);
        }
        forget(runs, applier.sealed_runs())?;
        Ok(Self::of(ranges, live, then))
    }

    /// A step of blocks that hold `live` and held `then`.
    fn of(ranges: Vec<BlockRange>, live: Vec<Vec<u8>>, then: Vec<Vec<u8>>) -> Self {
        let mut window = Window::default();
        for ((blocks, now), then) in ranges.iter().zip(&live).zip(then) {
            put_differing(&mut window, *blocks, &then.into(), now);
        }
        Self { ranges, live, window }
    }

    /// What stands there was read to be compared: it is saved without being read again.
    fn known(&self) -> Vec<Known<'_>> {
        self.ranges.iter().zip(&self.live).map(|(blocks, bytes)| Known { blocks: *blocks, bytes }).collect()
    }
}

/// Reads what stands on the target now, all together.
fn read_live<T: BlockFile>(
    applier: &mut Applier<T>,
    ranges: &[BlockRange],
) -> Result<Vec<Vec<u8>>, JournalError> {
    let size_bytes = applier.size_sectors() * SECTOR_BYTES;
    let mut live: Vec<Vec<u8>> = ranges.iter().map(|blocks| vec![0; bytes_of(*blocks, size_bytes)]).collect();
    let mut reads: Vec<ReadAt<'_>> = ranges
        .iter()
        .zip(&mut live)
        .map(|(blocks, data)| ReadAt { offset: blocks.start * BLOCK_BYTES, data })
        .collect();
    applier.target().read(&mut reads)?;
    Ok(live)
}

/// Bytes of blocks of a disk; the last one may be a part of one.
const fn bytes_of(blocks: BlockRange, size_bytes: u64) -> usize {
    let end = blocks.end * BLOCK_BYTES;
    ((if end < size_bytes { end } else { size_bytes }) - blocks.start * BLOCK_BYTES) as usize
}

/// Writes steps, each while the next is made ready.
struct Beside<'a, T> {
    journal: &'a mut Journal,
    applier: &'a mut Applier<T>,
    now: Timestamp,
    done: &'a mut RolledBack,
}

impl<T: BlockFile> Beside<'_, T> {
    /// Saves what stands there, where that is not done yet, and writes what stood there.
    fn write(&mut self, step: &Step) -> Result<(), JournalError> {
        self.done.compared_bytes += step.live.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        self.done.written_bytes += step.window.bytes();
        if step.window.bytes() > 0 {
            self.applier.apply_over(self.journal, &step.window, &step.known(), self.now)?;
        }
        Ok(())
    }

    /// Writes a step and prepares the next. The target is busy all the time: while the next blocks are read from it and the
    /// last are written to it, one thread saves before-images of the last and another makes what stood there out of the
    /// images of the next. Where sealed runs do not have all of these, the next step is prepared when the last is written.
    fn write_and_prepare(
        &mut self,
        runs: &[Run],
        view: &View,
        last: &Step,
        ranges: Vec<BlockRange>,
    ) -> Result<Step, JournalError> {
        let size_bytes = self.applier.size_sectors() * SECTOR_BYTES;
        let mut sealed = self.applier.take_sealed();
        let (written, then) = thread::scope(|scope| {
            let (sealed, asked) = (&mut sealed, &ranges);
            let make = move || images(view, runs, sealed, asked, size_bytes);
            // Where there is no thread to be had, the next is prepared afterwards.
            let making = thread::Builder::new().name("images".to_owned()).spawn_scoped(scope, make).ok();
            let written = save_and_read(self.applier, last, &ranges).and_then(|live| {
                self.write(last)?;
                Ok(live)
            });
            let then = making.map_or(Ok(Ok(None)), ScopedJoinHandle::join);
            (written, then.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        self.applier.put_sealed(sealed);
        let live = written?;
        if let Some(then) = then? {
            return Ok(Step::of(ranges, live, then));
        }
        preload(runs, self.applier.sealed_runs(), &ranges)?;
        Step::prepare(runs, self.applier, view, ranges)
    }
}

/// Reads what the next blocks hold, while another thread saves before-images of the last step.
fn save_and_read<T: BlockFile>(
    applier: &mut Applier<T>,
    last: &Step,
    ranges: &[BlockRange],
) -> Result<Vec<Vec<u8>>, JournalError> {
    let mut active = applier.take_active();
    let (saved, live) = thread::scope(|scope| {
        let save = |active: &mut ActiveRun| save_known(active, &last.window, &last.known());
        let beside = thread::Builder::new().name("before-images".to_owned());
        // Where there is no thread to be had, writing the step saves them.
        let saving = active.as_mut().and_then(|active| beside.spawn_scoped(scope, move || save(active)).ok());
        let live = read_live(applier, ranges);
        (saving.map_or(Ok(Ok(())), ScopedJoinHandle::join), live)
    });
    applier.put_active(active);
    saved.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    live
}

/// What stood in these blocks, where sealed runs have all of it.
fn images(
    view: &View,
    runs: &[Run],
    sealed: &mut SealedRuns,
    ranges: &[BlockRange],
    size_bytes: u64,
) -> Result<Option<Vec<Vec<u8>>>, JournalError> {
    if !preload(runs, sealed, ranges)? {
        return Ok(None);
    }
    let mut then = Vec::with_capacity(ranges.len());
    for blocks in ranges {
        let mut plain = vec![0; ((blocks.end - blocks.start) * BLOCK_BYTES) as usize];
        if !view.read_images(runs, sealed, *blocks, &mut plain)? {
            return Ok(None);
        }
        plain.truncate(bytes_of(*blocks, size_bytes));
        then.push(plain);
    }
    forget(runs, sealed)?;
    Ok(Some(then))
}

/// Gives the memory of what was read ahead back.
fn forget(runs: &[Run], sealed: &mut SealedRuns) -> Result<(), JournalError> {
    runs.iter().try_for_each(|run| Ok(sealed.get(*run)?.preload(&[])?))
}

/// Has the images of the blocks read together, from each run what no older one has: one by one they take as long as
/// the medium takes for each. Answers whether the runs have all of them.
fn preload(runs: &[Run], sealed: &mut SealedRuns, ranges: &[BlockRange]) -> Result<bool, JournalError> {
    let mut missing = ranges.to_vec();
    for run in runs {
        let sealed = sealed.get(*run)?;
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

/// Puts the blocks that are not as they were into a window.
fn put_differing(window: &mut Window, blocks: BlockRange, then: &Bytes, now: &[u8]) {
    let mut from = 0;
    for (block, (old, new)) in
        (blocks.start..).zip(then.chunks(BLOCK_BYTES as usize).zip(now.chunks(BLOCK_BYTES as usize)))
    {
        if old != new {
            let sector = block * BLOCK_SECTORS;
            let range = SectorRange::new(sector, sector + old.len() as u64 / SECTOR_BYTES);
            let zeros = old.iter().all(|byte| *byte == 0);
            let content =
                if zeros { Content::Zeros } else { Content::Data(then.slice(from..from + old.len())) };
            window.put(Write { range, content });
        }
        from += old.len();
    }
}
