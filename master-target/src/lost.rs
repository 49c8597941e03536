//! What a start finds lost of a disk: sectors that a crash took from its target, entries that damage took from the log.
//!
//! Invariants: that something is lost is durable before anything is done that would hide it: before APPLIED goes past
//! lost entries, before the tables of a damaged target are put in order. So the disk is compared, and the points in
//! between are degraded, whenever the daemon is killed. Saying it twice changes nothing. Units: sectors, entry numbers.
//! Called by `journaled` and, for disks without a journal, by `registry`.

use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::manifest::{Edit, EntriesLost};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::wire::Text;
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::journal::{DiskLog, Journal, JournalError};
use reprotect_engine::units::{SECTOR_BYTES, SectorRange};

use crate::disk_status::sector_bytes;

/// Records what a disk of the journal lost, and makes it compare that: all of it where entries are lost, for nobody
/// knows what these wrote. Durable when it returns.
///
/// # Errors
/// When manifest or log cannot be written.
pub(crate) fn take_up(
    journal: &mut Journal,
    state: &mut DiskState,
    log: Option<&DiskLog>,
    dropped: &RangeSet,
) -> Result<(), JournalError> {
    let disk = state.disk;
    let (now, mut begins) = (wall_clock(), false);
    let missing = log.map_or(&[][..], |log| log.missing.as_slice());
    let on_target = log.map_or(0, |log| log.on_target);
    let known: Vec<_> = missing.iter().filter(|(_, end)| *end <= on_target + 1).collect();
    if !known.is_empty() {
        tracing::error!(%disk, entries = ?known, "the redo log lost entries that are on the target: points between them cannot be had");
    }
    let lost: Vec<(u64, u64)> = log.into_iter().flat_map(DiskLog::lost).collect();
    if !lost.is_empty() {
        tracing::error!(%disk, entries = ?lost, "the redo log lost entries of this disk that are on no target");
        // What was given up on purpose is recorded already, and within it there is no second loss.
        let given_up = |first, last| {
            let known = journal.shape().disks.get(&disk).map_or(&[][..], |known| known.lost.as_slice());
            known.iter().any(|loss| loss.entries.first <= first && loss.entries.last >= last)
        };
        let cause = Text::new("damage of the redo log");
        let edits: Vec<Edit> = lost
            .iter()
            .filter(|(first, last)| !given_up(*first, *last))
            .map(|(first, last)| {
                Edit::EntriesLost(EntriesLost { disk, first: *first, last: *last, time: now, cause })
            })
            .collect();
        if !edits.is_empty() {
            journal.edit(&edits, now)?;
        }
        begins = begin_repair(state, &[state.whole()].into_iter().collect());
    }
    if begin_repair(state, dropped) || begins {
        journal.append_state(state, now)?;
        journal.commit(now)?;
    }
    Ok(())
}

/// Makes a disk compare what was lost, and says so; answers whether there was anything.
pub(crate) fn begin_repair(state: &mut DiskState, lost: &RangeSet) -> bool {
    let begins = compare_again(state, lost);
    if begins {
        tracing::warn!(
            disk = %state.disk, bytes = sector_bytes(lost.sector_count()), pass = state.pass,
            "a compare pass begins: data were lost in a crash of their medium; only the chunks concerned are compared"
        );
    }
    begins
}

/// Makes a disk whose target lost `dropped` sectors compare and repair them; answers whether there was anything to do.
///
/// A finished disk gets a new pass in which everything else counts as settled. Sectors are taken in whole chunks, in
/// which a pass works anyway. What delta wrote there is lost with the rest, so bulk may write there again.
fn compare_again(state: &mut DiskState, dropped: &RangeSet) -> bool {
    if dropped.is_empty() {
        return false;
    }
    let chunk = CHUNK_BYTES / SECTOR_BYTES;
    if state.mode == PassMode::Done {
        state.pass += 1;
        state.touched.clear();
        state.settled.clear();
        state.settled.insert(state.whole());
    }
    state.mode = PassMode::Compare;
    for lost in dropped.iter() {
        let start = lost.start / chunk * chunk;
        let end = lost.end.next_multiple_of(chunk).min(state.size_sectors);
        state.settled.remove(SectorRange::new(start, end));
        state.touched.remove(lost);
    }
    true
}

#[cfg(test)]
mod power_loss;

#[cfg(test)]
mod tests {
    use reprotect_engine::format::message::PassMode;
    use reprotect_engine::proto::target_disk::TargetDisk;
    use reprotect_engine::units::{DiskId, LineageId, PeerId};

    use super::*;

    const CHUNK: u64 = CHUNK_BYTES / SECTOR_BYTES;

    fn state(mode: PassMode) -> DiskState {
        let size = 10 * CHUNK + 8;
        TargetDisk::new_state(DiskId([1; 16]), PeerId([2; 16]), [3; 16], size, LineageId([4; 16]), mode)
    }

    #[test]
    fn a_finished_disk_that_lost_sectors_compares_their_chunks_and_no_others() {
        let mut done = state(PassMode::Done);
        let lost = RangeSet::from_iter([
            SectorRange::new(CHUNK + 5, CHUNK + 6),
            SectorRange::new(10 * CHUNK + 1, 10 * CHUNK + 8),
        ]);
        assert!(compare_again(&mut done, &lost));
        assert_eq!((done.pass, done.mode), (2, PassMode::Compare));
        let open = done.settled.missing(done.whole());
        assert_eq!(open, [SectorRange::new(CHUNK, 2 * CHUNK), SectorRange::new(10 * CHUNK, 10 * CHUNK + 8)]);
        assert_eq!(DiskState::decode(&done.to_bytes()), Ok(done), "it survives a restart");
    }

    #[test]
    fn a_running_pass_forgets_what_was_settled_and_touched_there_and_keeps_the_rest() {
        let mut running = state(PassMode::Copy);
        running.settled.insert(SectorRange::new(0, 4 * CHUNK));
        running.touched.insert(SectorRange::new(5 * CHUNK, 5 * CHUNK + 16));
        let lost = RangeSet::from_iter([
            SectorRange::new(2 * CHUNK, 2 * CHUNK + 1),
            SectorRange::new(5 * CHUNK + 8, 5 * CHUNK + 12),
        ]);
        assert!(compare_again(&mut running, &lost));
        assert_eq!((running.pass, running.mode), (1, PassMode::Compare));
        assert_eq!(running.settled.sector_count(), 3 * CHUNK);
        assert!(!running.settled.contains(SectorRange::new(2 * CHUNK, 2 * CHUNK + 1)));
        let touched: Vec<_> = running.touched.iter().collect();
        assert_eq!(
            touched,
            [SectorRange::new(5 * CHUNK, 5 * CHUNK + 8), SectorRange::new(5 * CHUNK + 12, 5 * CHUNK + 16)]
        );
        let before = running.clone();
        assert!(!compare_again(&mut running, &RangeSet::new()));
        assert_eq!(running, before);
    }
}
