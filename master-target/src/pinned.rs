//! The redo log is shared: what is done about a disk that keeps the others from getting segments back.
//!
//! | look | what |
//! |---:|---|
//! | 1 | the disk is asked to let go: it applies what waits for its mark, and ends its undo epoch |
//! | 3 | it did not, so it stands, or is not there: its entries are carried to the head of the log |
//! | 30 | of a disk that has something there which cannot be read, they are given up as below, whatever the pressure |
//! | 30 | they are so many that the drive is short for them: they are given up, and its next start compares it; of several |
//! |    | disks first of the one that has most, as long as they are worth a segment; of one that would let go and has no room |
//! |    | for it only where no other stands |
//! | 1 | a pinned point of which a part of the log is not there any more, damaged at a start or given up, is dropped |
//! | 30 | of what a pinned point needs, which is carried whenever its segment is to go, that cannot be read: the point is dropped |
//!
//! Invariants: only a segment that is past its time is freed; no more is copied than is gained by it, so that the log
//! takes at most twice what waits, two segments, and what is within its time; only what cannot be read, or on a drive that
//! is nearly full, is given up, never silently, and only where the segment goes then, or what is left of it is carried; what a
//! pinned point inside an undo epoch needs, or a rollback that is not at its end, is never given up while it can be read. Units: looks (one every two seconds), bytes. Called by `housekeeping`.

use std::collections::BTreeSet;
use std::time::Duration;

use reprotect_engine::format::manifest::{Edit, PointDropped};
use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Carried, CarriedPins, Journal, JournalError, LostPin};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::retention::Retention;

/// At this look a disk that could has let go; what it has in the log is carried forward.
const CARRY_AT: u32 = 3;
/// Bytes that are carried while the journal is locked, and the pause in which others have it.
const PIECE_BYTES: u64 = if cfg!(test) { 100 << 10 } else { 8 << 20 }; // of segments of 1 MiB, in tests
pub(crate) const BETWEEN_PIECES: Duration = Duration::from_millis(1);
/// At this look what waits may be given up.
const GIVE_UP_AT: u32 = 30;

/// Whether a segment that nothing waits in may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nobody needs it.
    Free,
    /// A piece of what pins need was carried, and more is left: others have the journal first.
    Going,
    /// It stays: nothing would be gained, there is no room, or something cannot be read and is tried again.
    Kept,
}

/// Frees the oldest segments of the log where they are past their time (`old`) and disks keep them from being released.
///
/// # Errors
/// When log or manifest cannot be written.
pub(crate) fn free(retention: &Retention, old: u64, now: Timestamp) -> Result<(), JournalError> {
    // An undo epoch that goes on as it should needs its part of the log that long, whatever the pressure.
    let needed = retention.ladder().any_write.min(2 * retention.undo_epoch());
    let needed = u64::try_from(needed.as_nanos()).unwrap_or(u64::MAX);
    let old = old.min(now.0.saturating_sub(needed));
    let mut asked = false;
    loop {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        if retention.is_opening() {
            return Ok(());
        }
        let held = retention.oldest_held(journal);
        let is_old = |segment: &u64| {
            held.is_none_or(|held| *segment < held)
                && journal.newest_in(*segment).is_none_or(|newest| newest.0 <= old)
        };
        let Some((segment, disks)) = journal.pinned().filter(|(segment, _)| is_old(segment)) else {
            if !asked {
                retention.ask_back(&BTreeSet::new());
            }
            return Ok(());
        };
        // One look counts once, however many segments it frees.
        if !asked {
            retention.ask_back(&asked_with(retention, journal, (segment, &disks)));
        }
        asked = true;
        let looks = retention.looks(&disks);
        if looks < CARRY_AT || !free_one(retention, journal, (segment, &disks), looks, now)? {
            return Ok(());
        }
        drop(locked);
        std::thread::sleep(BETWEEN_PIECES);
    }
}

/// Bytes of a segment.
fn bytes_of(journal: &Journal, segment: u64) -> u64 {
    journal.shape().segments.get(&segment).map_or(0, |segment| segment.bytes)
}

/// The disks that are to let go: those that need the oldest segment; and where one of them has no room for that, others with
/// much behind it, for whether these stand is to be known.
fn asked_with(
    retention: &Retention,
    journal: &Journal,
    (segment, disks): (u64, &BTreeSet<DiskId>),
) -> BTreeSet<DiskId> {
    let bytes = bytes_of(journal, segment);
    let is_hindered = disks.iter().any(|disk| retention.is_hindered(*disk));
    let others =
        journal.shape().disks.keys().filter(|disk| is_hindered && journal.waiting_bytes(**disk) >= bytes);
    disks.iter().chain(others).copied().collect()
}

/// The disk of which is given up what waits, if any: one that takes nothing and has the most of what keeps the segment.
fn standing(
    retention: &Retention,
    journal: &Journal,
    (segment, disks): (u64, &BTreeSet<DiskId>),
) -> Option<DiskId> {
    let bytes = bytes_of(journal, segment);
    let most = |disks: &[DiskId]| disks.iter().copied().max_by_key(|disk| journal.waiting_bytes(*disk));
    // What of them is worth a segment; less is carried in the end.
    let worth =
        |disks: &[DiskId]| disks.iter().map(|disk| journal.waiting_bytes(*disk)).sum::<u64>() >= bytes;
    let here: Vec<DiskId> = disks.iter().copied().filter(|disk| journal.waits_in(*disk, segment)).collect();
    let mut able = here.clone();
    able.retain(|disk| !retention.is_hindered(*disk));
    if worth(&able) {
        return most(&able);
    }
    // Those that have no room are not the cause where another stands behind them, which takes a minute to be seen.
    let mut behind: Vec<DiskId> = asked_with(retention, journal, (segment, disks)).into_iter().collect();
    behind.retain(|disk| !here.contains(disk) && !retention.is_hindered(*disk) && worth(&[*disk]));
    if behind.iter().any(|disk| retention.looks(&BTreeSet::from([*disk])) < GIVE_UP_AT) {
        return None;
    }
    most(&behind).or_else(|| most(&here).filter(|_| worth(&here)))
}

/// Whether more is gained than copied, where so much of a segment and of the whole log is to be carried: half of the segment
/// is free then, or as much of the log.
fn is_worth_it(journal: &Journal, (here, everywhere): (u64, u64), bytes: u64) -> bool {
    2 * here <= bytes || journal.log_bytes() >= 2 * everywhere + 2 * bytes
}

/// Frees a segment without its disks, or a part of it, or makes it worth the while; answers whether it could.
fn free_one(
    retention: &Retention,
    journal: &mut Journal,
    (segment, disks): (u64, &BTreeSet<DiskId>),
    looks: u32,
    now: Timestamp,
) -> Result<bool, JournalError> {
    let bytes = bytes_of(journal, segment);
    let ((here, everywhere), pinned) = (journal.waiting_in(segment), journal.pinned_in(segment));
    // What pins need there is to be carried, too.
    let is_worth_it = is_worth_it(journal, (here + pinned.0, everywhere + pinned.1), bytes);
    let nothing = || Carried { is_all: true, unreadable: Vec::new() };
    let carried = if is_worth_it { journal.carry_piece(segment, PIECE_BYTES, now) } else { Ok(nothing()) };
    match carried {
        Ok(Carried { is_all: false, .. }) => return Ok(true), // others have the journal before the next piece
        Ok(Carried { unreadable, .. }) if is_worth_it => {
            if let Some((disk, reason)) = unreadable.first().filter(|_| looks < GIVE_UP_AT) {
                tracing::warn!(%disk, reason, "what waits in the redo log cannot be read; it is tried again for a minute");
                return Ok(false);
            }
            // Nothing is lost for a segment that stays.
            match make_way(retention, journal, segment, now)? {
                Way::Free => {}
                Way::Going => return Ok(true),
                Way::Kept => return Ok(false),
            }
            for (disk, reason) in unreadable {
                // To keep what nobody can read would keep everything behind it, of all disks.
                lose(journal, disk, &format!("cannot be read: {reason}"), now)?;
            }
            tracing::info!(
                segment,
                ?disks,
                "carried forward in the redo log, for these disks do not take what waits"
            );
            journal.release(segment, now)?;
            return Ok(true);
        }
        Err(error) if !error.is_full() => return Err(error),
        Ok(_) | Err(_) => {}
    }
    if retention.pressure() < Pressure::Least || looks < GIVE_UP_AT {
        return Ok(false);
    }
    let Some(disk) = standing(retention, journal, (segment, disks)) else { return Ok(false) };
    match make_way(retention, journal, segment, now)? {
        Way::Free => {}
        Way::Going => return Ok(true),
        Way::Kept => {
            if looks.is_multiple_of(GIVE_UP_AT) {
                let pinned_bytes = journal.pinned_bytes();
                tracing::warn!(
                    segment,
                    pinned_bytes,
                    "the redo log cannot be given back, for pinned points need it and there is no room to carry what they need: `unpin` those that are not needed"
                );
            }
            return Ok(false);
        }
    }
    lose(journal, disk, "given up: the retention drive was full", now)?;
    if journal.pinned().is_none() {
        journal.release(segment, now)?;
    }
    // What others have there may be little enough to be carried now.
    retention.ask_hindered_again();
    Ok(true)
}

/// Releases a segment that nothing waits in, as [`make_way`] allows.
///
/// # Errors
/// When log or manifest cannot be written.
pub(crate) fn release(
    retention: &Retention,
    journal: &mut Journal,
    segment: u64,
    now: Timestamp,
) -> Result<Way, JournalError> {
    let way = make_way(retention, journal, segment, now)?;
    if way == Way::Free {
        journal.release(segment, now)?;
    }
    Ok(way)
}

/// What pinned points inside undo epochs need of a segment, and rollbacks that stopped on their way, is carried to the head
/// of the log a piece at a time, where more is gained than copied. A pin that cannot be read is dropped.
fn make_way(
    retention: &Retention,
    journal: &mut Journal,
    segment: u64,
    now: Timestamp,
) -> Result<Way, JournalError> {
    let (here, everywhere) = journal.pinned_in(segment);
    if here == 0 {
        return Ok(Way::Free);
    }
    let bytes = bytes_of(journal, segment);
    if !is_worth_it(journal, (here, everywhere), bytes) {
        return Ok(Way::Kept);
    }
    let lost = match journal.carry_pinned_piece(segment, PIECE_BYTES, now) {
        Ok(CarriedPins { is_all: false, .. }) => return Ok(Way::Going),
        Ok(CarriedPins { lost, .. }) => lost,
        Err(error) if error.is_full() => return Ok(Way::Kept),
        Err(error) => return Err(error),
    };
    let Some(LostPin { disk, reason, .. }) = lost.first() else { return Ok(Way::Free) };
    if retention.could_not_read(segment) < GIVE_UP_AT {
        tracing::warn!(%disk, reason, "what a pinned point needs of the redo log cannot be read; it is tried again for a minute");
        return Ok(Way::Kept);
    }
    drop_pins(journal, &lost, now)?;
    Ok(Way::Free)
}

/// Drops the pins that can never be had again, for a part of the log that they are made from is gone: nobody could find them
/// to unpin them.
///
/// # Errors
/// When the manifest cannot be written.
pub(crate) fn drop_lost(retention: &Retention, now: Timestamp) -> Result<(), JournalError> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let lost = journal.lost_pins();
    match drop_pins(journal, &lost, now) {
        Err(error) if error.is_full() => Ok(()), // at the next look
        dropped => dropped,
    }
}

/// Pins of which nobody can read the log any more are no points any more, and their undo runs may go.
fn drop_pins(journal: &mut Journal, lost: &[LostPin], now: Timestamp) -> Result<(), JournalError> {
    let mut edits = Vec::new();
    for LostPin { disk, point, reason } in lost {
        let Some(point) = *point else {
            tracing::error!(%disk, reason, "the point that a rollback goes to is lost: its part of the redo log cannot be read; roll back to another point");
            continue;
        };
        if let Some(kept) = journal.shape().disks.get(disk).and_then(|known| known.points.get(&point)) {
            let (at, name) = (At::entry(kept.epoch, kept.number), kept.name.as_str());
            tracing::error!(%disk, %at, name, reason, "a pinned point is lost: its part of the redo log cannot be read");
        }
        edits.push(Edit::PointDropped(PointDropped { disk: *disk, point }));
    }
    if edits.is_empty() { Ok(()) } else { journal.edit(&edits, now) }
}

/// What waits for the target of a disk is given up, for this reason.
fn lose(journal: &mut Journal, disk: DiskId, cause: &str, now: Timestamp) -> Result<(), JournalError> {
    if let Some((first, last)) = journal.give_up(disk, cause, now)? {
        tracing::error!(
            %disk, first, last, cause,
            "what waited for the target of this disk is lost; repair what is in its way: it is compared with its source"
        );
    }
    Ok(())
}

/// What an operator reads of a disk that lost entries and was not compared since.
pub(crate) fn loss_text(journal: &Journal, disk: DiskId) -> Option<String> {
    let known = journal.shape().disks.get(&disk)?;
    let lost = &known.lost.iter().rfind(|loss| loss.mended.is_none())?.entries;
    Some(format!(
        "entries {} to {} of the redo log are lost ({}); points since then are degraded until the disk was compared with its source, which needs its target and its agent",
        lost.first,
        lost.last,
        lost.cause.as_str()
    ))
}

#[cfg(test)]
pub(crate) mod tests;
