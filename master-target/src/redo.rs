//! What the redo log says of a disk at a start, and the writes in it that are not on the target yet.
//!
//! Invariants: nothing is written here but the note of a point that a stop kept from being written; what is handed out
//! was checked by a CRC. Units: entry numbers, sequences, bytes. Used by `journaled` and, for the newest state, by
//! `registry`.

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{Mark, decode_batch};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::manifest::{Edit, EpochCause, PointKept};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::limits::MARKS_PENDING_MAX;
use reprotect_engine::store::journal::applier::Applier;
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::points::own_id;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{DiskLog, DiskShape, Journal, JournalError, LogEntry};
use reprotect_engine::store::target::Target;
use reprotect_engine::units::{DiskId, SectorRange, Sequence, Timestamp};

use crate::backlog::Backlog;
use crate::retention::Retention;

/// Plain bytes of entries that are read back from the log and applied at once.
const REDO_BYTES: u64 = 16 << 20;

/// The newest state of a disk: what the log says, and every batch that stands behind it.
///
/// # Errors
/// When a batch cannot be read back.
pub fn newest_state(journal: &mut Journal, log: &DiskLog) -> Result<Option<DiskState>, JournalError> {
    let Some((mut state, place)) = log.state.clone() else { return Ok(None) };
    for entry in log.entries.iter().filter(|entry| entry.place > place && entry.kind.is_batch()) {
        let (_, body) = journal.read(entry.place)?;
        let (header, records) = decode_batch(body.into()).map_err(|source| JournalError::Format {
            path: journal.folder().into(),
            offset: entry.place.offset,
            source,
            remedy: "the disk is compared with its source",
        })?;
        if header.lineage == state.lineage && header.first_sequence == state.sequence.next() {
            state.sequence = header.last_sequence();
            state.chain = header.chain_after(&records);
            for record in records.iter().filter(|_| state.mode != PassMode::Done) {
                for unsettled in state.settled.missing(record.range()) {
                    state.touched.insert(unsettled);
                }
            }
        }
    }
    Ok(Some(state))
}

/// The marks behind a disk's newest batch, with their entries' numbers, oldest first.
pub(crate) fn newest_marks(journal: &mut Journal, disk: DiskId) -> Result<Vec<(u64, Mark)>, JournalError> {
    let newest = journal.entries(disk).iter().rev().take_while(|entry| entry.kind == EntryKind::Mark);
    let mut entries: Vec<_> = newest.take(MARKS_PENDING_MAX).copied().collect();
    entries.reverse();
    entries.iter().map(|entry| Ok((entry.number, journal.mark(disk, entry)?))).collect()
}

pub(crate) fn kept_point(disk: DiskId, at: At, sequence: Sequence, mark: &Mark) -> PointKept {
    PointKept {
        disk,
        point: if mark.point == [0; 16] { own_id(disk, at) } else { mark.point },
        number: at.number,
        sequence,
        epoch: at.epoch,
        source_time: mark.source_time,
        class: mark.class,
        pinned: false,
        degraded: mark.unread_blocks > 0,
        name: mark.name,
        cause: mark.cause,
    }
}

/// The daemon may have ended between the note of an undo epoch and that of the point at its border.
pub(crate) fn keep_last_point(
    journal: &mut Journal,
    disk: DiskId,
    now: Timestamp,
) -> Result<(), JournalError> {
    let unnoted = journal.shape().disks.get(&disk).and_then(unnoted_border);
    let Some((epoch, number)) = unnoted else { return Ok(()) };
    let last = journal.entries(disk).iter().find(|entry| entry.number == number).copied();
    let Some(entry) = last.filter(|entry| entry.kind == EntryKind::Mark) else { return Ok(()) };
    let mark = journal.mark(disk, &entry)?;
    let shape = journal.shape().disks.get(&disk);
    let degraded = shape.is_some_and(|shape| shape.is_degraded(mark.lineage, mark.sequence, entry.number));
    let kept = kept_point(disk, At::entry(epoch, entry.number), mark.sequence, &mark);
    journal.edit(&[Edit::PointKept(PointKept { degraded, ..kept })], now)
}

/// The border of an undo epoch that should be a point and is none: where the newest that ended did, or where the first
/// began. The epoch, and the entry that stands there.
fn unnoted_border(shape: &DiskShape) -> Option<(u64, u64)> {
    match shape.epochs.iter().rev().find_map(|epoch| Some((epoch, epoch.closed?))) {
        // Without an entry of its own (a rollback), it does not end at the mark that stands before it.
        Some((epoch, closed)) if closed.last > epoch.opened.after => {
            let mut points = shape.points.values();
            let is_noted = points.any(|point| point.epoch == closed.epoch && !shape.is_inside(point));
            (!is_noted).then_some((closed.epoch, closed.last))
        }
        Some(_) => None,
        None => {
            let opened = shape.open_epoch()?.opened;
            let is_bare = opened.cause == EpochCause::First && shape.points.is_empty() && shape.expired == 0;
            is_bare.then_some((opened.epoch, opened.after))
        }
    }
}

/// What a start finds in the log and not on the target, and the newest number: what stands behind the last mark of a
/// DIFF stretch goes on waiting.
pub(crate) fn found(
    retention: &Retention,
    applier: &Applier<Target>,
    state: &DiskState,
) -> Result<(Backlog, u64), JournalError> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let from = applier.applied().number;
    let entries: Vec<LogEntry> =
        journal.entries(applier.disk()).iter().filter(|entry| entry.number > from).copied().collect();
    let may_go = |entry: &LogEntry| entry.kind != EntryKind::Batch || state.mode != PassMode::Done;
    let ready = entries.iter().rposition(may_go).map_or(0, |at| at + 1);
    let border = match entries.get(..ready).and_then(<[LogEntry]>::last) {
        Some(entry) if ready < entries.len() => sequence_of(journal, applier.disk(), entry, state)?,
        _ => state.sequence,
    };
    let mut backlog = Backlog::default();
    let known: Vec<_> = entries
        .iter()
        .enumerate()
        .map(|(at, entry)| {
            let sequence = if at < ready { border } else { state.sequence };
            (entry.number, sequence.min(state.sequence), entry.place.bytes)
        })
        .collect();
    let whole = SectorRange::new(0, state.size_sectors);
    backlog.found_in_log(known.get(..ready).unwrap_or_default(), whole);
    backlog.release();
    backlog.found_in_log(known.get(ready..).unwrap_or_default(), whole);
    Ok((backlog, entries.last().map_or(0, |entry| entry.number)))
}

/// The newest sequence with an entry.
pub(crate) fn sequence_of(
    journal: &mut Journal,
    disk: DiskId,
    entry: &LogEntry,
    state: &DiskState,
) -> Result<Sequence, JournalError> {
    if entry.kind == EntryKind::Mark {
        return Ok(journal.mark(disk, entry)?.sequence);
    }
    let (_, body) = journal.read(entry.place)?;
    // Bulk has no sequence: what it belongs to is as new as the state.
    Ok(decode_batch(body.into()).map_or(state.sequence, |(header, _)| header.last_sequence()))
}

/// The newest sequence on a target that stands behind the log.
pub(crate) fn applied_sequence(
    journal: &mut Journal,
    disk: DiskId,
    number: u64,
    state: &DiskState,
) -> Result<Sequence, JournalError> {
    let entry = journal.entries(disk).iter().rfind(|entry| entry.number <= number).copied();
    if let Some(entry) = entry {
        return sequence_of(journal, disk, &entry, state);
    }
    let points = journal.shape().disks.get(&disk).map(|shape| shape.points.values().copied());
    let newest = points.into_iter().flatten().filter(|point| point.number <= number);
    Ok(newest.max_by_key(|point| point.number).map_or(Sequence(0), |point| point.sequence))
}

/// The writes of the next entries that are not on the target, read from the log, and the last of them.
pub(crate) fn window_from_log(
    retention: &Retention,
    applier: &Applier<Target>,
    through: u64,
) -> Result<(Window, u64), JournalError> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let (disk, mut number) = (applier.disk(), applier.applied().number);
    let entries = between(journal.entries(disk), number, through).to_vec();
    let mut decompressor =
        Decompressor::new().map_err(|error| JournalError::Zstd { reason: error.to_string() })?;
    let mut window = Window::default();
    for entry in &entries {
        let (head, body) = journal.read(entry.place)?;
        let writes = entry_writes(head.kind, body.into(), &mut decompressor).map_err(|source| {
            JournalError::Format {
                path: journal.folder().into(),
                offset: entry.place.offset,
                source,
                remedy: "the disk is compared with its source",
            }
        })?;
        for write in writes {
            window.put(write);
        }
        number = entry.number;
        if window.bytes() >= REDO_BYTES {
            return Ok((window, number));
        }
    }
    // Numbers that are missing were lost to damage; the disk is compared for them.
    Ok((window, through))
}

/// The entries behind one up to another. Entries ascend, and there may be millions of a disk.
fn between(entries: &[LogEntry], after: u64, through: u64) -> &[LogEntry] {
    let from = entries.partition_point(|entry| entry.number <= after);
    let to = entries.partition_point(|entry| entry.number <= through);
    entries.get(from..to).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use reprotect_engine::format::batch::{CHAIN_START, MarkCause, MarkClass};
    use reprotect_engine::format::manifest::{DiskAdded, EntriesLost};
    use reprotect_engine::format::wire::Text;
    use reprotect_engine::store::journal::JournalSettings;
    use reprotect_engine::store::journal::applier::Position;
    use reprotect_engine::units::{Generation, LineageId};

    use super::*;
    use crate::registry::fs_opener;

    const DISK: DiskId = DiskId([1; 16]);
    const NOW: Timestamp = Timestamp(1);
    const LINEAGE: LineageId = LineageId([4; 16]);
    const POSITION: Position =
        Position { lineage: LINEAGE, generation: Generation(1), sequence: Sequence(0) };

    /// A journal with a disk of which no undo epoch began yet.
    struct Lab {
        journal: Journal,
        applier: Applier<Box<dyn reprotect_engine::io::BlockFile>>,
        _dir: tempfile::TempDir,
    }

    impl Lab {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (files, layout) = (fs_opener(), JournalSettings { segment_bytes: 1 << 20 });
            let folder = dir.path().join("journal");
            std::fs::create_dir(&folder).unwrap();
            let mut journal = Journal::create(files.clone(), &folder, layout, NOW).unwrap();
            let added = DiskAdded { disk: DISK, machine: [7; 16], size_sectors: 64, time: NOW };
            journal.add_disk(added, NOW).unwrap();
            let path = dir.path().join("disk");
            files.create(&path, 64 * 512).unwrap();
            let target = files.open(&path, true).unwrap();
            let (applier, _) = Applier::open(&journal, DISK, target, None).unwrap();
            Self { journal, applier, _dir: dir }
        }

        /// A mark, which is applied; its number.
        fn mark(&mut self, point: u8) -> u64 {
            let mark = Mark {
                disk: DISK,
                lineage: LINEAGE,
                generation: POSITION.generation,
                sequence: Sequence(3),
                chain: CHAIN_START,
                source_time: NOW,
                point: [point; 16],
                number: 1,
                class: MarkClass::Crash,
                cause: MarkCause::Timer,
                name: Text::new(""),
                unread_blocks: 0,
            };
            let (number, _) = self.journal.append(DISK, EntryKind::Mark, &[&mark.to_bytes()], NOW).unwrap();
            self.journal.commit(NOW).unwrap();
            self.applier.applied_through(number);
            number
        }

        fn begin(&mut self) {
            self.applier.begin_epoch(&mut self.journal, EpochCause::First, POSITION, None, NOW).unwrap();
        }

        /// As a start finds it.
        fn points(&mut self) -> Vec<PointKept> {
            keep_last_point(&mut self.journal, DISK, NOW).unwrap();
            self.journal.shape().disks[&DISK].points.values().copied().collect()
        }
    }

    #[test]
    fn a_point_whose_note_a_stop_kept_from_being_written_promises_no_more_than_its_mark() {
        for lost in [false, true] {
            let mut lab = Lab::new();
            lab.begin();
            if lost {
                let entries = EntriesLost { disk: DISK, first: 1, last: 1, time: NOW, cause: Text::new("") };
                lab.journal.append(DISK, EntryKind::Batch, &[b"x"], NOW).unwrap();
                lab.journal.edit(&[Edit::EntriesLost(entries)], NOW).unwrap();
            }
            let number = lab.mark(5);
            lab.applier.close_epoch(&mut lab.journal, NOW).unwrap();
            let points = lab.points();
            assert_eq!(points.len(), 1);
            let found = (points[0].point, points[0].epoch, points[0].number, points[0].degraded);
            assert_eq!(found, ([5; 16], 1, number, lost));
        }
    }

    /// Marks that came behind it are not in its place: the first point is where the first undo epoch began.
    #[test]
    fn the_first_point_is_noted_at_a_start_where_a_stop_kept_it_from_being_noted() {
        let mut lab = Lab::new();
        lab.mark(4);
        let number = lab.mark(5);
        lab.begin();
        lab.mark(6);
        let found = |points: &[PointKept]| {
            points.iter().map(|point| (point.point, point.epoch, point.number)).collect::<Vec<_>>()
        };
        assert_eq!(found(&lab.points()), [([5; 16], 1, number)]);
        assert_eq!(found(&lab.points()), [([5; 16], 1, number)], "once");
        // Of a disk that was found, nothing stands before its first epoch; its point is noted by who takes it in.
        let mut lab = Lab::new();
        lab.begin();
        lab.mark(5);
        assert_eq!(found(&lab.points()), []);
    }
}
