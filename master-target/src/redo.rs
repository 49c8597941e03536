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
use crate::rot::note_entry;

/// Entries that are tried to learn the newest sequence on a target.
const SEQUENCE_TRIES: usize = 64;
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
    let mut marks = Vec::new();
    for entry in entries {
        // One that cannot be read is taken for a new one when it is sent again, which is one entry more.
        let mark = journal.mark(disk, &entry);
        if let Some(mark) = if_readable(journal, disk, mark)? {
            marks.push((entry.number, mark));
        }
    }
    Ok(marks)
}

/// What is read of entries that are on the target keeps no disk from being opened: where it cannot be read, that is recorded.
///
/// # Errors
/// When the journal cannot be used, or the manifest not be written for another reason than a full drive.
pub(crate) fn if_readable<T>(
    journal: &mut Journal,
    disk: DiskId,
    read: Result<T, JournalError>,
) -> Result<Option<T>, JournalError> {
    let error = match read {
        Ok(read) => return Ok(Some(read)),
        Err(error) if journal.entry_of_error(disk, &error).is_none() => return Err(error),
        Err(error) => error,
    };
    tracing::error!(%disk, %error, "an entry of the redo log cannot be read; it is on the target, and the disk goes on");
    match note_entry(journal, disk, &error) {
        Err(error) if !error.is_full() => Err(error),
        _ => Ok(None),
    }
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
    let mark = journal.mark(disk, &entry);
    let Some(mark) = if_readable(journal, disk, mark)? else { return Ok(()) };
    let shape = journal.shape().disks.get(&disk);
    let degraded = shape.is_some_and(|shape| shape.is_degraded_mark(&mark, entry.number));
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
            let is_noted = points.any(|point| (point.epoch, point.number) == (closed.epoch, closed.last));
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
    let applied = journal.entries(disk).iter().rev().filter(|entry| entry.number <= number);
    // Where the newest cannot be read an older one says less, which is true as well.
    let newest: Vec<LogEntry> = applied.take(SEQUENCE_TRIES).copied().collect();
    for entry in newest {
        let sequence = sequence_of(journal, disk, &entry, state);
        if let Some(sequence) = if_readable(journal, disk, sequence)? {
            return Ok(sequence);
        }
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
    use reprotect_engine::format::segment::Applied;
    use reprotect_engine::format::wire::Text;
    use reprotect_engine::io::ByteRange;
    use reprotect_engine::proto::target_disk::TargetDisk;
    use reprotect_engine::store::journal::JournalSettings;
    use reprotect_engine::store::journal::applier::Position;
    use reprotect_engine::store::journal::points;
    use reprotect_engine::units::{Generation, LineageId, PeerId};

    use super::*;
    use crate::pinned::tests::{BadPlace, bad_opener};
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
        dir: tempfile::TempDir,
        unread: u32,
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
            Self { journal, applier, dir, unread: 0 }
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
                unread_blocks: self.unread,
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
        for (lost, unread) in [(false, 0), (true, 0), (false, 1)] {
            let mut lab = Lab { unread, ..Lab::new() };
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
            assert_eq!(found, ([5; 16], 1, number, lost || unread > 0));
        }
    }

    /// As `as-found`, or the first point of a disk.
    #[test]
    fn a_point_at_the_beginning_of_an_undo_epoch_is_not_taken_for_the_one_at_its_end() {
        let mut lab = Lab::new();
        let first = lab.mark(4);
        lab.begin();
        assert_eq!(lab.points().len(), 1);
        let last = lab.mark(5);
        lab.applier.close_epoch(&mut lab.journal, NOW).unwrap();
        let numbers = |points: &[PointKept]| points.iter().map(|point| point.number).collect::<Vec<_>>();
        assert_eq!(numbers(&lab.points()), [first, last]);
        assert_eq!(numbers(&lab.points()), [first, last], "once");
    }

    /// A start believes the index of a full segment; what is in it, and on the target, need not be readable.
    #[test]
    fn an_applied_entry_that_cannot_be_read_keeps_no_disk_from_being_opened() {
        const OTHER: DiskId = DiskId([2; 16]);
        for flips in [true, false] {
            let mut lab = Lab::new();
            let added = DiskAdded { disk: OTHER, machine: [7; 16], size_sectors: 64, time: NOW };
            lab.journal.add_disk(added, NOW).unwrap();
            lab.mark(4);
            lab.begin();
            let number = lab.mark(5);
            let applied = *lab.applier.applied();
            lab.journal.append_applied(DISK, applied, NOW).unwrap();
            // Three segments of others.
            for number in 1..=48 {
                lab.journal.append(OTHER, EntryKind::Batch, &[&[7; 65536]], NOW).unwrap();
                lab.journal.commit(NOW).unwrap();
                let applied = Applied { number, epoch: 0, undo_bytes: 0 };
                lab.journal.append_applied(OTHER, applied, NOW).unwrap();
            }
            lab.applier.close_epoch(&mut lab.journal, NOW).unwrap();
            let entry = *lab.journal.entries(DISK).last().unwrap();
            assert_eq!(entry.number, number);
            let folder = lab.dir.path().join("journal");
            let slot = lab.journal.shape().segments[&entry.place.segment].slot;
            lab.journal.close(NOW).unwrap();
            let path = folder.join(format!("redo-{slot:06}"));
            let bad = BadPlace::default();
            if flips {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[entry.place.offset as usize + 100] ^= 1;
                std::fs::write(&path, bytes).unwrap();
            } else {
                let end = entry.place.offset + entry.place.bytes;
                *bad.lock().unwrap() = Some((path, ByteRange { start: entry.place.offset, end }));
            }
            let layout = JournalSettings { segment_bytes: 1 << 20 };
            let (mut journal, found) = Journal::open(bad_opener(&bad), &folder, layout, NOW).unwrap();
            assert!(found.indexed > 0 && found.damage.is_empty(), "{found:?}");
            let marks = newest_marks(&mut journal, DISK).unwrap();
            assert_eq!(marks.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [number - 1]);
            keep_last_point(&mut journal, DISK, NOW).unwrap();
            let state = TargetDisk::new_state(DISK, PeerId([2; 16]), [3; 16], 64, LINEAGE, PassMode::Done);
            assert_eq!(applied_sequence(&mut journal, DISK, number, &state).unwrap(), Sequence(3));
            assert!(journal.shape().disks[&DISK].is_entry_damaged(number), "and it is known");
            // Nor does it keep anybody from what else there is.
            let listed = points::points(&mut journal, DISK).unwrap();
            assert!(listed.iter().all(|point| point.at.number != number), "{listed:?}");
            points::timeline(&mut journal, DISK).unwrap();
            points::ordered_runs(&mut journal, DISK).unwrap();
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
