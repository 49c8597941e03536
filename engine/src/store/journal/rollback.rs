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
use super::undo::BlockRange;
use super::view::{At, View};
use super::window::Window;
use super::{Journal, Run};
use crate::format::manifest::EpochCause;
use crate::io::{BlockFile, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES, SectorRange, Timestamp};

/// Blocks compared, saved and written in one go, with one pair of flushes: bounds the memory, to that of two steps.
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
    for ranges in steps(view.differing(&runs, applier, whole)?) {
        let next = match waiting.take() {
            Some(last) => write_and_prepare(&runs, applier, &view, last, ranges, &mut done)?,
            None => {
                preload(&runs, applier, &ranges)?;
                Step::prepare(&runs, applier, &view, ranges)?
            }
        };
        waiting = Some(next);
    }
    if let Some(last) = waiting {
        last.write(applier, &mut done)?;
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
        let size_bytes = applier.size_sectors() * SECTOR_BYTES;
        let bytes_of = |blocks: &BlockRange| {
            ((blocks.end * BLOCK_BYTES).min(size_bytes) - blocks.start * BLOCK_BYTES) as usize
        };
        let mut live: Vec<Vec<u8>> = ranges.iter().map(|blocks| vec![0; bytes_of(blocks)]).collect();
        let mut reads: Vec<ReadAt<'_>> = ranges
            .iter()
            .zip(&mut live)
            .map(|(blocks, data)| ReadAt { offset: blocks.start * BLOCK_BYTES, data })
            .collect();
        applier.target().read(&mut reads)?;
        let mut window = Window::default();
        for (blocks, now) in ranges.iter().zip(&live) {
            let mut then = vec![0; now.len()];
            view.read(runs, applier, blocks.start * BLOCK_BYTES, &mut then)?;
            put_differing(&mut window, *blocks, &then.into(), now);
        }
        for run in runs {
            applier.sealed_run(*run)?.preload(&[])?; // gives the memory back
        }
        Ok(Self { ranges, live, window })
    }

    /// What stands there was read to be compared: it is saved without being read again.
    fn known(&self) -> Vec<Known<'_>> {
        self.ranges.iter().zip(&self.live).map(|(blocks, bytes)| Known { blocks: *blocks, bytes }).collect()
    }

    /// Saves what stands there, where that is not done yet, and writes what stood there.
    fn write<T: BlockFile>(
        &self,
        applier: &mut Applier<T>,
        done: &mut RolledBack,
    ) -> Result<(), JournalError> {
        done.compared_bytes += self.live.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        done.written_bytes += self.window.bytes();
        if self.window.bytes() > 0 {
            applier.write_over(&self.window, &self.known())?;
        }
        Ok(())
    }
}

/// Writes a step and prepares the next. While the next is read, another thread saves before-images of the last: that is
/// half of its time. Not where the next one needs the run that they are saved in.
fn write_and_prepare<T: BlockFile>(
    runs: &[Run],
    applier: &mut Applier<T>,
    view: &View,
    last: Step,
    ranges: Vec<BlockRange>,
    done: &mut RolledBack,
) -> Result<Step, JournalError> {
    let in_sealed_runs = preload(runs, applier, &ranges)?;
    let Some(mut active) = applier.take_active().filter(|_| in_sealed_runs) else {
        last.write(applier, done)?;
        return Step::prepare(runs, applier, view, ranges);
    };
    let (saved, next) = thread::scope(|scope| {
        let save = || save_known(&mut active, &last.window, &last.known());
        // Where there is no thread to be had, writing the step saves them.
        let saving = thread::Builder::new().name("before-images".to_owned()).spawn_scoped(scope, save).ok();
        let next = Step::prepare(runs, applier, view, ranges);
        (saving.map_or(Ok(Ok(())), ScopedJoinHandle::join), next)
    });
    applier.put_active(active);
    saved.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    last.write(applier, done)?;
    next
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
