//! The redo log is shared: what is done about a disk that keeps the others from getting segments back.
//!
//! | look | what |
//! |---:|---|
//! | 1 | the disk is asked to let go: it applies what waits for its mark, and ends its undo epoch |
//! | 3 | it did not, so it stands, or is not there: its entries are carried to the head of the log |
//! | 30 | they are so many that the drive is short for them: they are given up, and its next start compares it |
//!
//! Invariants: only a segment that is past its time is freed; no more is copied than is gained by it, so that the log
//! takes at most twice what waits, two segments, and what is within its time; only on a drive that is nearly full
//! anything is given up, and never silently. Units: looks (one every two seconds), bytes. Called by `housekeeping`.

use std::collections::BTreeSet;

use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::store::journal::{Journal, JournalError};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::retention::Retention;

/// At this look a disk that could has let go; what it has in the log is carried forward.
const CARRY_AT: u32 = 3;
/// At this look what waits may be given up.
const GIVE_UP_AT: u32 = 30;

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
        let is_old = |segment: &u64| journal.newest_in(*segment).is_none_or(|newest| newest.0 <= old);
        let Some((segment, disks)) = journal.pinned().filter(|(segment, _)| is_old(segment)) else {
            if !asked {
                retention.ask_back(&BTreeSet::new());
            }
            return Ok(());
        };
        // One look counts once, however many segments it frees.
        let looks = if asked { retention.looks(&disks) } else { retention.ask_back(&disks) };
        asked = true;
        if looks < CARRY_AT || !free_one(journal, retention.pressure(), (segment, &disks), looks, now)? {
            return Ok(());
        }
    }
}

/// Frees a segment without its disks; answers whether it could.
fn free_one(
    journal: &mut Journal,
    pressure: Pressure,
    (segment, disks): (u64, &BTreeSet<DiskId>),
    looks: u32,
    now: Timestamp,
) -> Result<bool, JournalError> {
    let bytes = journal.shape().segments.get(&segment).map_or(0, |segment| segment.bytes);
    let (here, everywhere) = journal.waiting_in(segment);
    let is_worth_it = here == 0 || journal.log_bytes() >= 2 * everywhere + 2 * bytes;
    let carried = if is_worth_it { journal.carry(segment, now) } else { Ok(()) };
    match carried {
        Ok(()) if is_worth_it => {
            tracing::info!(
                segment,
                ?disks,
                "carried forward in the redo log, for these disks do not take what waits"
            );
            journal.release(segment, now)?;
            return Ok(true);
        }
        Err(error) if !error.is_full() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let waiting: u64 = disks.iter().map(|disk| journal.waiting_bytes(*disk)).sum();
    if pressure < Pressure::Least || waiting < bytes || looks < GIVE_UP_AT {
        return Ok(false);
    }
    for disk in disks {
        if let Some((first, last)) = journal.give_up(*disk, "given up: the retention drive was full", now)? {
            tracing::error!(
                %disk, first, last,
                "what waited for the target of this disk was given up, for the retention drive is full; repair its target, then restart: it is compared with its source"
            );
        }
    }
    journal.release(segment, now)?;
    Ok(true)
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
mod tests {
    use std::time::Duration;

    use reprotect_engine::format::manifest::DiskAdded;
    use reprotect_engine::format::segment::{Applied, EntryKind};
    use reprotect_engine::net::wall_clock;
    use reprotect_engine::store::journal::ladder::Ladder;

    use super::*;
    use crate::registry::fs_opener;
    use crate::retention::RetentionSettings;
    use crate::scrub::ScrubSettings;

    const SEGMENT: u64 = 1 << 20;
    const STANDS: DiskId = DiskId([1; 16]);
    const WORKS: DiskId = DiskId([2; 16]);

    fn lab_settings() -> RetentionSettings {
        let zero = Duration::ZERO;
        let ladder =
            Ladder { any_write: zero, every_epoch: zero, rungs: Vec::new(), keep: zero, guaranteed: zero };
        let scrub = ScrubSettings { bytes_per_second: 0, pause: Duration::from_secs(3600) };
        let undo_epoch = Duration::from_secs(3600);
        RetentionSettings { undo_epoch, ladder, segment_bytes: SEGMENT, reserve_bytes: 0, scrub }
    }

    /// A disk that has two segments' worth of entries in the log and takes none of them, and one that works.
    fn lab(dir: &std::path::Path) -> std::sync::Arc<Retention> {
        let (retention, _) = Retention::open(fs_opener(), dir, lab_settings()).unwrap();
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        for disk in [STANDS, WORKS] {
            let added = DiskAdded { disk, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
            journal.add_disk(added, Timestamp(1)).unwrap();
        }
        for number in 1..=2 * SEGMENT / 65536 {
            put(journal, STANDS, number);
        }
        drop(locked);
        retention
    }

    fn put(journal: &mut Journal, disk: DiskId, number: u64) {
        let body = vec![number as u8; 65536];
        let added = journal.append(disk, EntryKind::Batch, &[&body], Timestamp(1)).unwrap();
        assert_eq!(added.0, number);
        journal.commit(Timestamp(1)).unwrap();
    }

    /// The working disk writes a segment's worth, then somebody looks.
    fn go_on(retention: &Retention) {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        for _ in 0..SEGMENT / 65536 {
            let number = journal.newest(WORKS) + 1;
            put(journal, WORKS, number);
            journal.append_applied(WORKS, Applied { number, epoch: 0, undo_bytes: 0 }, Timestamp(1)).unwrap();
        }
        drop(locked);
        crate::housekeeping::tidy_log(retention).unwrap();
    }

    fn numbers(retention: &Retention) -> Vec<u64> {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let entries = journal.entries(STANDS).to_vec();
        for entry in &entries {
            let (_, body) = journal.read(entry.place).unwrap();
            assert_eq!(body, vec![entry.number as u8; 65536], "entry {}", entry.number);
        }
        entries.iter().map(|entry| entry.number).collect()
    }

    #[test]
    fn what_a_standing_disk_needs_is_carried_while_there_is_room_and_given_up_where_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let retention = lab(dir.path());
        let all: Vec<u64> = (1..=2 * SEGMENT / 65536).collect();
        let log_bytes = || retention.lock().get().unwrap().log_bytes();
        for _ in 0..2 * GIVE_UP_AT {
            go_on(&retention);
            assert!(log_bytes() <= 9 * SEGMENT, "twice what waits, two segments, what was just written");
        }
        assert_eq!(numbers(&retention), all, "with room nothing is given up");
        // The drive is nearly full.
        retention.set_pressure(Pressure::Least);
        let mut looks = 0;
        while retention.shape().disks[&STANDS].lost.is_empty() {
            go_on(&retention);
            looks += 1;
            assert!(looks <= 2 * GIVE_UP_AT && log_bytes() <= 9 * SEGMENT);
        }
        go_on(&retention);
        assert!(log_bytes() <= 3 * SEGMENT, "{} bytes", log_bytes());
        assert!(numbers(&retention).is_empty());
        let lost = retention.shape().disks[&STANDS].lost_through();
        assert_eq!(lost, all.last().copied(), "all of them, durably");
        let text = retention.losses().remove(&STANDS).unwrap();
        assert!(text.contains("given up") && text.contains("compared with its source"), "{text}");
        // A thread that still has the disk in hand cannot say otherwise.
        let refused = retention.lock().get().unwrap().append(STANDS, EntryKind::Batch, &[b"x"], wall_clock());
        assert!(matches!(refused, Err(JournalError::GivenUp { disk: STANDS })), "{refused:?}");
        // Nor does a start forget it.
        drop(retention);
        let (_, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
        let log = &found.disks[&STANDS];
        let through = lost.unwrap_or_default();
        assert_eq!((log.lost().collect::<Vec<_>>(), log.newest()), (vec![(1, through)], through));
    }
}
