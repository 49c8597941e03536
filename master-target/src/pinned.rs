//! The redo log is shared: what is done about a disk that keeps the others from getting segments back.
//!
//! | look | what |
//! |---:|---|
//! | 1 | the disk is asked to let go: it applies what waits for its mark, and ends its undo epoch |
//! | 3 | it did not, so it stands, or is not there: its entries are carried to the head of the log |
//! | 30 | of a disk that has something there which cannot be read, they are given up as below, whatever the pressure |
//! | 30 | they are so many that the drive is short for them: they are given up, and its next start compares it |
//!
//! Invariants: only a segment that is past its time is freed; no more is copied than is gained by it, so that the log
//! takes at most twice what waits, two segments, and what is within its time; only what cannot be read, or on a drive that
//! is nearly full, is given up, and never silently; what a pinned point inside an undo epoch needs is never given up while it
//! can be read. Units: looks (one every two seconds), bytes. Called by `housekeeping`.

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
    let held = retention.oldest_held().filter(|_| retention.pressure() < Pressure::Least);
    let mut asked = false;
    loop {
        let mut locked = retention.lock();
        let journal = locked.get()?;
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
    let carried = if is_worth_it { journal.carry(segment, now) } else { Ok(Vec::new()) };
    match carried {
        Ok(unreadable) if is_worth_it => {
            if let Some((disk, reason)) = unreadable.first().filter(|_| looks < GIVE_UP_AT) {
                tracing::warn!(%disk, reason, "what waits in the redo log cannot be read; it is tried again for a minute");
                return Ok(false);
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
            return release(journal, segment, now);
        }
        Err(error) if !error.is_full() => return Err(error),
        Ok(_) | Err(_) => {}
    }
    let waiting: u64 = disks.iter().map(|disk| journal.waiting_bytes(*disk)).sum();
    if pressure < Pressure::Least || waiting < bytes || looks < GIVE_UP_AT {
        return Ok(false);
    }
    for disk in disks {
        lose(journal, *disk, "given up: the retention drive was full", now)?;
    }
    release(journal, segment, now)
}

/// Releases a segment that nothing waits in. What pinned points inside undo epochs need of it is carried to the head of the
/// log before, where more is gained than copied; answers whether it was released.
///
/// # Errors
/// When log or manifest cannot be written.
pub(crate) fn release(journal: &mut Journal, segment: u64, now: Timestamp) -> Result<bool, JournalError> {
    let (here, everywhere) = journal.pinned_in(segment);
    if here > 0 {
        let bytes = journal.shape().segments.get(&segment).map_or(0, |segment| segment.bytes);
        if journal.log_bytes() < 2 * everywhere + 2 * bytes {
            return Ok(false);
        }
        match journal.carry_pinned(segment, now) {
            Ok(unreadable) => {
                for (disk, reason) in unreadable {
                    tracing::error!(%disk, reason, "a pinned point inside an undo epoch is lost: its part of the redo log cannot be read");
                }
            }
            Err(error) if error.is_full() => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    journal.release(segment, now)?;
    Ok(true)
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
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use reprotect_engine::format::manifest::{DiskAdded, Edit, EpochCause, EpochClosed, EpochOpened};
    use reprotect_engine::format::message::PassMode;
    use reprotect_engine::format::segment::{Applied, EntryKind};
    use reprotect_engine::io::{self, BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
    use reprotect_engine::net::wall_clock;
    use reprotect_engine::proto::target_disk::TargetDisk;
    use reprotect_engine::store::files::Files;
    use reprotect_engine::store::files::fs::FsFiles;
    use reprotect_engine::store::journal::ladder::Ladder;
    use reprotect_engine::store::journal::view::At;
    use reprotect_engine::units::{Generation, LineageId, PeerId, Sequence};

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
    fn lab(dir: &Path) -> Arc<Retention> {
        lab_with(fs_opener(), dir)
    }

    fn lab_with(files: Arc<dyn Files>, dir: &Path) -> Arc<Retention> {
        let (retention, _) = Retention::open(files, dir, lab_settings()).unwrap();
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
        // Nor does a start forget it; who takes the disk again before that is told the same.
        let live = retention.lock().get().unwrap().take_again(STANDS, wall_clock()).unwrap();
        drop(retention);
        let (_, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
        let log = &found.disks[&STANDS];
        assert_eq!(*log, live);
        let through = lost.unwrap_or_default();
        assert_eq!((log.lost().collect::<Vec<_>>(), log.newest()), (vec![(1, through)], through));
    }

    #[test]
    fn what_a_mount_reads_of_the_log_stays_until_the_drive_is_nearly_full() {
        let dir = tempfile::tempdir().unwrap();
        let (retention, _) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
        let (ends, now) = (4 * SEGMENT / 65536, Timestamp(1));
        let id = WORKS;
        {
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            journal
                .add_disk(DiskAdded { disk: id, machine: [7; 16], size_sectors: 64, time: now }, now)
                .unwrap();
        }
        go_on(&retention);
        let after = retention.lock().get().unwrap().newest(id);
        let opened = EpochOpened {
            disk: id,
            lineage: LineageId([2; 16]),
            generation: Generation(1),
            epoch: 1,
            after,
            sequence: Sequence(0),
            salt: 1,
            time: now,
            to_epoch: 0,
            to_number: 0,
            cause: EpochCause::Time,
            to_records: 0,
        };
        let closed = EpochClosed { disk: id, epoch: 1, last: after + ends, run_bytes: 0, time: now };
        retention.lock().get().unwrap().edit(&[Edit::EpochOpened(opened)], now).unwrap();
        // A mount inside the epoch, which then ends.
        let hold = retention.hold(id, At::entry(1, after + ends - 1));
        for number in after + 1..=after + ends {
            put(retention.lock().get().unwrap(), id, number);
        }
        retention.lock().get().unwrap().edit(&[Edit::EpochClosed(closed)], now).unwrap();
        let oldest = || retention.shape().segments.keys().next().copied().unwrap();
        let needed = retention.oldest_held().unwrap();
        for _ in 0..4 {
            go_on(&retention);
        }
        assert_eq!(oldest(), needed, "those before it were given back");
        retention.set_pressure(Pressure::Least);
        go_on(&retention);
        assert!(oldest() > needed, "replication comes first");
        assert_eq!(retention.oldest_held(), None);
        drop(hold);
    }
    /// A file that cannot be read where it is bad.
    struct Bad(Box<dyn BlockFile>, Arc<Mutex<Option<(PathBuf, ByteRange)>>>, PathBuf);

    impl BlockFile for Bad {
        fn size_bytes(&self) -> u64 {
            self.0.size_bytes()
        }
        fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
            let bad = self.1.lock().unwrap().clone().filter(|(path, _)| *path == self.2);
            for read in reads.iter() {
                let (offset, len) = (read.offset, read.data.len() as u64);
                if bad.as_ref().is_some_and(|(_, bad)| offset < bad.end && offset + len > bad.start) {
                    let source = std::io::Error::from_raw_os_error(5); // EIO
                    let name = self.2.display().to_string();
                    return Err(BlockError { name, op: BlockOp::Read, offset, len, source });
                }
            }
            self.0.read(reads)
        }
        fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
            self.0.write(writes)
        }
        fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
            self.0.zero(range)
        }
        fn flush(&mut self) -> Result<(), BlockError> {
            self.0.flush()
        }
        fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
            self.0.allocated(range)
        }
    }

    #[test]
    fn what_cannot_be_read_any_more_is_lost_for_its_disk_alone_and_the_log_is_given_back() {
        const ALSO: DiskId = DiskId([3; 16]);
        let bad = Arc::new(Mutex::new(None));
        let known = Arc::clone(&bad);
        let opener: Arc<dyn Files> = Arc::new(FsFiles::new(move |path, writable| {
            let options = if writable { io::OpenOptions::writing() } else { io::OpenOptions::reading() };
            let file = Bad(io::open(path, &options)?, Arc::clone(&known), path.to_owned());
            Ok(Box::new(file) as Box<dyn BlockFile>)
        }));
        let dir = tempfile::tempdir().unwrap();
        let retention = lab_with(opener, dir.path());
        let state =
            TargetDisk::new_state(ALSO, PeerId([2; 16]), [3; 16], 64, LineageId([4; 16]), PassMode::Done);
        {
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            let added = DiskAdded { disk: ALSO, machine: [7; 16], size_sectors: 64, time: Timestamp(1) };
            journal.add_disk(added, Timestamp(1)).unwrap();
            journal.append_state(&state, Timestamp(1)).unwrap();
            put(journal, ALSO, 1);
            put(journal, STANDS, 2 * SEGMENT / 65536 + 1);
            put(journal, ALSO, 2);
            // The segment with the state of the other disk; one entry of the first is gone.
            let entry = *journal.entries(STANDS).last().unwrap();
            let slot = journal.shape().segments[&entry.place.segment].slot;
            let path = dir.path().join(format!("redo-{slot:06}"));
            assert!(path.exists(), "{}", path.display());
            let middle = entry.place.offset + entry.place.bytes / 2;
            *bad.lock().unwrap() = Some((path, ByteRange { start: middle, end: middle + 512 }));
        }
        let lost = |retention: &Retention| retention.shape().disks[&STANDS].lost_through();
        for _ in 0..GIVE_UP_AT - 1 {
            go_on(&retention);
            assert_eq!(lost(&retention), None, "a medium may come back");
        }
        // Some looks more: the other disk is asked since the segment that it needs is the oldest.
        for _ in 0..8 {
            go_on(&retention);
        }
        assert_eq!(lost(&retention), Some(2 * SEGMENT / 65536 + 1));
        let text = retention.losses().remove(&STANDS).unwrap();
        assert!(text.contains("cannot be read"), "{text}");
        let bytes = retention.lock().get().unwrap().log_bytes();
        assert!(bytes <= 6 * SEGMENT, "{bytes} bytes are kept of what nobody can read");
        let also = retention.lock().get().unwrap().entries(ALSO).to_vec();
        assert_eq!(also.iter().map(|entry| entry.number).collect::<Vec<_>>(), [1, 2]);
        for entry in also {
            let (_, body) = retention.lock().get().unwrap().read(entry.place).unwrap();
            assert_eq!(body, vec![entry.number as u8; 65536]);
        }
        // Nor does a start forget any of it; what could not be read is not looked at any more.
        drop(retention);
        let (_, found) = Retention::open(fs_opener(), dir.path(), lab_settings()).unwrap();
        assert_eq!(found.disks[&STANDS].lost().count(), 1);
        assert_eq!(found.disks[&ALSO].entries.len(), 2);
        assert_eq!(found.disks[&ALSO].state.as_ref().map(|(state, _)| state.clone()), Some(state));
        assert!(found.damage.is_empty(), "{:?}", found.damage);
    }
}
