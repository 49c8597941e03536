//! A disk goes back to a point, in place, and can go forward again.
//!
//! A rollback is an undo epoch of its own whose writes are the disk as it was: what stands on the target now is saved
//! first, like anything that is overwritten. So the end of the epoch before it stays a point, and going forward is a
//! rollback to that. The epoch names where it goes, so that one that was interrupted is finished before anything else
//! is applied; writing the same again is harmless.
//!
//! Invariants: I1, I2; the view it writes does not change while it is written, for blocks it overwrites were in an older
//! run already. Units: blocks, entry numbers. Called by the thread that owns the target.

use bytes::Bytes;

use super::applier::{Applier, Position, shape};
use super::capture::Known;
use super::entry::{Content, Write};
use super::error::JournalError;
use super::undo::BlockRange;
use super::view::{At, View};
use super::window::Window;
use super::{Journal, Run};
use crate::format::manifest::EpochCause;
use crate::io::{BlockFile, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES, SectorRange, Timestamp};

/// Blocks compared, saved and written in one go, with one pair of flushes: bounds the memory.
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
    let (mut ranges, mut room) = (Vec::new(), STEP_BLOCKS);
    for range in view.differing(&runs, applier, whole)? {
        let mut first = range.start;
        while first < range.end {
            let end = range.end.min(first + room);
            ranges.push(BlockRange::new(first, end));
            room -= end - first;
            first = end;
            if room == 0 {
                step(&runs, applier, &view, &std::mem::take(&mut ranges), &mut done)?;
                room = STEP_BLOCKS;
            }
        }
    }
    step(&runs, applier, &view, &ranges, &mut done)?;
    let number = applier.applied().number;
    applier.apply(journal, number, &Window::default(), now)?;
    journal.commit(now)?;
    applier.close_epoch(journal, now)?;
    Ok(done)
}

/// Takes scattered blocks back, up to [`STEP_BLOCKS`].
fn step<T: BlockFile>(
    runs: &[Run],
    applier: &mut Applier<T>,
    view: &View,
    ranges: &[BlockRange],
    done: &mut RolledBack,
) -> Result<(), JournalError> {
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
    if !reads.is_empty() {
        applier.target().read(&mut reads)?;
    }
    preload(runs, applier, ranges)?;
    let mut window = Window::default();
    for (blocks, now) in ranges.iter().zip(&live) {
        let mut then = vec![0; now.len()];
        view.read(runs, applier, blocks.start * BLOCK_BYTES, &mut then)?;
        put_differing(&mut window, *blocks, &then.into(), now);
        done.compared_bytes += now.len() as u64;
    }
    for run in runs {
        applier.sealed_run(*run)?.preload(&[])?; // gives the memory back
    }
    done.written_bytes += window.bytes();
    if window.bytes() > 0 {
        // What stands there was read to be compared: it is saved without being read again.
        let known: Vec<Known<'_>> =
            ranges.iter().zip(&live).map(|(blocks, bytes)| Known { blocks: *blocks, bytes }).collect();
        applier.write_over(&window, &known)?;
    }
    Ok(())
}

/// Has the images of the blocks read together, from each run what no older one has: one by one they take as long as
/// the medium takes for each.
fn preload<T: BlockFile>(
    runs: &[Run],
    applier: &mut Applier<T>,
    ranges: &[BlockRange],
) -> Result<(), JournalError> {
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
    Ok(())
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
