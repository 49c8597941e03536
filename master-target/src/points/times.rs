//! The state of a machine at a time: of all its disks, or of none.
//!
//! The disks of a machine reach the target one after the other: at any moment one of them has what another lacks. So a time
//! between two marks is a state of the machine only where the log shows for each disk that nothing up to that time is missing;
//! elsewhere the newest point that all disks have, and that is not younger, is one.
//!
//! Invariants: what is answered for several disks is a point of the machine, or stands on every disk inside an ordered run that
//! goes on beyond the time; which of the two it is is said. Units: times by the source's clock. Called by `points`.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::anyhow;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::points::{self, Coverage, Found};
use reprotect_engine::units::{DiskId, Timestamp};

use super::{Chosen, Common, common, info, reading};
use crate::retention::Retention;
use crate::rot::note_entry;

/// A part of the log that is not what it was when it was planned is looked at again so often.
const READS_MAX: u32 = 3;

/// The newest state of disks of one machine that is not younger than `time`; of one disk any state of its own.
///
/// # Errors
/// When there is none, saying what there is; or when the log cannot be read.
pub(super) fn by_time(retention: &Retention, disks: &[DiskId], time: Timestamp) -> anyhow::Result<Chosen> {
    if let [disk] = disks {
        let (found, _) = of_disk(retention, *disk, time)?;
        tracing::info!(%disk, at = %found.at, shown = shown(found.source_time), "the state of a time was looked up");
        return Ok(vec![(*disk, found.at)].into());
    }
    let mut places = Vec::new();
    for disk in disks {
        // An error is that it has no state so old; nor has the machine, which is said there.
        match of_disk(retention, *disk, time) {
            Ok((found, true)) => places.push((*disk, found.at)),
            Ok((found, false)) => return in_common(retention, disks, time, (*disk, Some(found))),
            Err(error) if error.downcast_ref().is_some_and(is_none_so_old) => {
                return in_common(retention, disks, time, (*disk, None));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(places.into())
}

fn is_none_so_old(error: &JournalError) -> bool {
    matches!(error, JournalError::NoState { .. })
}

/// What a disk has for a time, and whether nothing up to then is missing. The log between two marks is read without the lock:
/// what was given to others meanwhile is not in it any more when it is looked at again.
fn of_disk(retention: &Retention, disk: DiskId, time: Timestamp) -> anyhow::Result<(Found, bool)> {
    let mut tries = 0;
    loop {
        let (found, plan) = {
            let mut locked = retention.lock();
            reading(locked.get()?, disk, |journal| {
                let found = points::at_time(journal, disk, time)?;
                Ok((found, Coverage::plan(journal, disk, &found, time)?))
            })?
        };
        let Some(plan) = plan else { return Ok((found, false)) };
        match plan.read() {
            Ok(covers) => return Ok((found, covers)),
            Err(error) => {
                tries += 1;
                let is_news = note_entry(retention.lock().get()?, disk, &error)?;
                if !is_news && tries >= READS_MAX {
                    return Err(error.into());
                }
            }
        }
    }
}

/// The newest sound point that all disks have and that is not younger than `time`; `lacking` is why it is not that time.
fn in_common(
    retention: &Retention,
    disks: &[DiskId],
    time: Timestamp,
    (lacking, found): (DiskId, Option<Found>),
) -> anyhow::Result<Chosen> {
    let all = common(retention, disks)?;
    let sound = |point: &&Common| point.parts.len() == disks.len() && point.point.is_sound();
    let why = match found {
        Some(found) => format!(
            "of disk {lacking} it is not known write by write what it held at {}, its state before is of {}",
            shown(time),
            shown(found.source_time)
        ),
        None => format!("disk {lacking} has no state as old as {}", shown(time)),
    };
    let newest = all.iter().rev().find(|point| sound(point) && point.point.source_time <= time);
    let Some(newest) = newest else {
        let remedy = match all.iter().find(sound) {
            Some(oldest) => {
                format!(
                    "the oldest point of all disks is of {}, ask for that or a later time",
                    shown(oldest.point.source_time)
                )
            }
            None => "make a point of all disks with the agent's `mark --freeze`, or wait for the next one"
                .to_owned(),
        };
        return Err(anyhow!(
            "{why}, and no sound point that all {} disks have is as old; {remedy}, or name one disk as MACHINE:DISK",
            disks.len()
        ));
    };
    // Who asked for just this point has got it.
    let note = (newest.point.source_time != time).then(|| {
        format!(
            "{why}; so it is point {} of {}, the newest that all {} disks have and that is not younger",
            info(newest, disks.len()).point,
            shown(newest.point.source_time),
            disks.len()
        )
    });
    if let Some(note) = &note {
        tracing::info!(note, "a machine has no state of a time");
    }
    Ok(Chosen { places: newest.parts.clone(), note })
}

fn shown(time: Timestamp) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_nanos(time.0)).to_string()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use reprotect_engine::format::batch::{
        BatchHeader, CHAIN_START, Mark, MarkCause, MarkClass, Stretch, encode_batch,
    };
    use reprotect_engine::format::extent::Record;
    use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
    use reprotect_engine::format::segment::EntryKind;
    use reprotect_engine::format::wire::Text;
    use reprotect_engine::store::journal::Shape;
    use reprotect_engine::store::journal::applier::{Applier, Position};
    use reprotect_engine::store::journal::ladder::Ladder;
    use reprotect_engine::units::{Generation, LineageId, SECTOR_BYTES, Sequence};
    use std::sync::Arc;

    use super::*;
    use crate::registry::fs_opener;
    use crate::retention::RetentionSettings;
    use crate::scrub::ScrubSettings;

    const A: usize = 0;
    const B: usize = 1;
    const DISKS: [DiskId; 2] = [DiskId([1; 16]), DiskId([2; 16])];
    const LINEAGE: LineageId = LineageId([4; 16]);
    const SECTORS: u64 = 64;

    /// A machine of two disks whose logs are written by hand; times are seconds.
    struct Machine {
        _dir: tempfile::TempDir,
        retention: Arc<Retention>,
        /// The last sequence of each disk.
        sequences: [u64; 2],
    }

    impl Machine {
        /// Both have point 1 at ten seconds.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let hour = Duration::from_secs(3600);
            let ladder = Ladder {
                any_write: hour,
                every_epoch: hour,
                rungs: Vec::new(),
                keep: hour,
                guaranteed: hour,
            };
            let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
            let settings = RetentionSettings {
                undo_epoch: hour,
                ladder,
                segment_bytes: 1 << 20,
                reserve_bytes: 0,
                scrub,
            };
            let folder = dir.path().join("journal");
            let (retention, _) = Retention::open(fs_opener(), &folder, settings).unwrap();
            for disk in DISKS {
                let path = dir.path().join(format!("{disk}"));
                fs_opener().create(&path, SECTORS * SECTOR_BYTES).unwrap();
                let file = fs_opener().open(&path, true).unwrap();
                let mut locked = retention.lock();
                let journal = locked.get().unwrap();
                let added = DiskAdded { disk, machine: [7; 16], size_sectors: SECTORS, time: Timestamp(0) };
                journal.add_disk(added, Timestamp(0)).unwrap();
                let (mut applier, _) = Applier::open(journal, disk, file, None).unwrap();
                let position =
                    Position { lineage: LINEAGE, generation: Generation(1), sequence: Sequence(0) };
                applier.begin_epoch(journal, EpochCause::Time, position, None, Timestamp(0)).unwrap();
            }
            let mut machine = Self { _dir: dir, retention, sequences: [0; 2] };
            machine.batch(A, Stretch::Diff, 9);
            machine.batch(B, Stretch::Diff, 9);
            machine.mark(&[A, B], 1, 10);
            machine
        }

        fn append(&self, disk: usize, kind: EntryKind, body: &[u8], time: Timestamp) {
            let mut locked = self.retention.lock();
            let journal = locked.get().unwrap();
            journal.append(DISKS[disk], kind, &[body], time).unwrap();
            journal.commit(time).unwrap();
        }

        fn batch(&mut self, disk: usize, stretch: Stretch, time: u64) {
            self.sequences[disk] += 1;
            let header = BatchHeader {
                disk: DISKS[disk],
                lineage: LINEAGE,
                generation: Generation(1),
                first_sequence: Sequence(self.sequences[disk]),
                chain: CHAIN_START,
                source_time: at(time),
                record_count: 1,
                stretch,
            };
            let record = Record::data(time % SECTORS, Bytes::from(vec![7; SECTOR_BYTES as usize]));
            let kind = if stretch == Stretch::Ordered { EntryKind::Ordered } else { EntryKind::Batch };
            self.append(disk, kind, &encode_batch(&header, &[record]).body(), at(time));
        }

        /// One cut of a stream, as far as it got.
        fn cut(&mut self, disks: &[usize], time: u64) {
            disks.iter().for_each(|disk| self.batch(*disk, Stretch::Ordered, time));
        }

        fn mark(&mut self, disks: &[usize], point: u8, time: u64) {
            for disk in disks {
                let mark = Mark {
                    disk: DISKS[*disk],
                    lineage: LINEAGE,
                    generation: Generation(1),
                    sequence: Sequence(self.sequences[*disk]),
                    chain: CHAIN_START,
                    source_time: at(time),
                    point: [point; 16],
                    class: MarkClass::Crash,
                    cause: MarkCause::Timer,
                    name: Text::new(""),
                    number: u64::from(point),
                    unread_blocks: 0,
                };
                self.append(*disk, EntryKind::Mark, &mark.to_bytes(), at(time));
            }
        }

        fn ask(&self, time: u64) -> anyhow::Result<Chosen> {
            by_time(&self.retention, &DISKS, at(time))
        }

        /// The entries that stand for a time, and what is said of it.
        #[track_caller]
        fn found(&self, time: u64) -> ([u64; 2], Option<String>) {
            let chosen = self.ask(time).unwrap();
            let [(first, a), (second, b)] = chosen.places.as_slice() else { panic!("{chosen:?}") };
            assert_eq!([*first, *second], DISKS);
            ([a.number, b.number], chosen.note)
        }

        /// Point 1 stands for this time, because of what is not known of a disk.
        #[track_caller]
        fn falls_back(&self, time: u64, lacking: usize) {
            let (numbers, note) = self.found(time);
            assert_eq!(numbers, [2, 2], "point 1 of both disks");
            let note = note.unwrap();
            let parts = [DISKS[lacking].to_string(), "01010101".to_owned(), "1970-01-01T00:00:10".to_owned()];
            assert!(parts.iter().all(|part| note.contains(part)), "{note}");
        }
    }

    const fn at(seconds: u64) -> Timestamp {
        Timestamp(seconds * 1_000_000_000)
    }

    #[test]
    fn where_both_disks_are_known_write_by_write_every_time_is_a_state_of_the_machine() {
        let mut machine = Machine::new();
        machine.cut(&[A, B], 20);
        machine.cut(&[A], 30);
        machine.cut(&[B], 40);
        machine.mark(&[A, B], 2, 60);
        machine.mark(&[A, B], 3, 70);
        for (time, numbers) in
            [(10, [2, 2]), (15, [2, 2]), (20, [3, 3]), (30, [4, 3]), (50, [4, 4]), (60, [5, 5]), (65, [5, 5])]
        {
            assert_eq!(machine.found(time), (numbers, None), "at {time}");
        }
        // Behind the last mark nobody knows, and it is what there is.
        let (numbers, note) = machine.found(80);
        assert_eq!(numbers, [6, 6]);
        assert!(note.is_some());
    }

    #[test]
    fn a_disk_that_lags_behind_the_others_takes_the_machine_back_to_their_last_point() {
        let mut machine = Machine::new();
        machine.cut(&[A, B], 20);
        machine.cut(&[A], 30); // that of B is on its way
        machine.falls_back(30, A);
        machine.cut(&[A], 40);
        machine.falls_back(30, B);
        machine.cut(&[B], 30);
        machine.cut(&[B], 40);
        assert_eq!(machine.found(30), ([4, 4], None), "once it is there");
    }

    #[test]
    fn of_a_cut_that_reached_one_disk_only_before_the_stream_ended_nothing_is_taken() {
        let mut machine = Machine::new();
        machine.cut(&[A, B], 20);
        machine.cut(&[A], 30); // the stream ended before that of B
        machine.batch(B, Stretch::Diff, 50);
        machine.mark(&[A, B], 2, 60);
        for time in [30, 40, 59] {
            machine.falls_back(time, B);
        }
        assert_eq!(machine.found(15), ([2, 2], None));
        assert_eq!(machine.found(60), ([5, 5], None), "just the point");
    }

    #[test]
    fn a_disk_of_which_only_marks_are_known_takes_the_machine_back_to_one() {
        for changes in [false, true] {
            let mut machine = Machine::new();
            machine.cut(&[A], 20);
            machine.cut(&[A], 30);
            if changes {
                machine.batch(B, Stretch::Diff, 50);
            }
            machine.mark(&[A, B], 2, 60);
            machine.falls_back(25, B);
            machine.falls_back(59, B);
        }
    }

    #[test]
    fn where_the_source_set_its_clock_back_since_the_mark_before_its_times_order_nothing() {
        let mut machine = Machine::new();
        machine.cut(&[A], 20);
        machine.cut(&[A], 21);
        machine.cut(&[B], 5); // later than both of A
        machine.mark(&[A, B], 2, 12);
        machine.falls_back(11, B);
        machine.cut(&[A, B], 20);
        machine.cut(&[A, B], 22);
        machine.cut(&[A], 14);
        machine.cut(&[A, B], 25);
        let (numbers, note) = machine.found(20);
        assert_eq!(numbers, [5, 4], "point 2");
        assert!(note.unwrap().contains(&DISKS[A].to_string()));
    }

    #[test]
    fn a_part_of_the_log_that_is_given_to_others_while_it_is_read_without_the_lock_is_damage_to_nobody() {
        let mut machine = Machine::new();
        machine.cut(&[A, B], 20);
        machine.cut(&[A, B], 30);
        let (disk, time) = (DISKS[A], at(20));
        let plan = {
            let mut locked = machine.retention.lock();
            let journal = locked.get().unwrap();
            let found = points::at_time(journal, disk, time).unwrap();
            let plan = || Coverage::plan(journal, disk, &found, time).unwrap().unwrap();
            let mut plan = plan;
            assert!(plan().read().unwrap(), "what stands there covers it");
            plan()
        };
        {
            let mut locked = machine.retention.lock();
            let journal = locked.get().unwrap();
            let (first, slot) = {
                let (number, opened) = journal.shape().segments.first_key_value().unwrap();
                (*number, opened.slot)
            };
            let large = vec![9; 200 << 10];
            let is_used_again = |shape: &Shape| {
                shape.segments.iter().any(|(number, opened)| *number > first && opened.slot == slot)
            };
            for step in 0..100 {
                journal.append(DISKS[B], EntryKind::Batch, &[&large], at(40)).unwrap();
                journal.commit(at(40)).unwrap();
                let older: Vec<u64> = journal.shape().segments.keys().copied().rev().skip(1).collect();
                older.into_iter().for_each(|number| journal.release(number, at(40)).unwrap());
                if is_used_again(journal.shape()) {
                    break;
                }
                assert!(step < 99, "its file is not used again");
            }
        }
        let error = plan.read().unwrap_err();
        let mut locked = machine.retention.lock();
        assert!(!note_entry(locked.get().unwrap(), disk, &error).unwrap());
    }

    #[test]
    fn a_time_for_which_the_machine_has_nothing_is_refused_with_what_there_is_and_a_disk_alone_has_its_own() {
        let mut machine = Machine::new();
        machine.cut(&[A, B], 20);
        let refused = machine.ask(5).unwrap_err().to_string();
        for part in ["1970-01-01T00:00:05", "1970-01-01T00:00:10", "MACHINE:DISK"] {
            assert!(refused.contains(part), "{refused}");
        }
        let alone = by_time(&machine.retention, &DISKS[..1], at(30)).unwrap();
        assert_eq!((alone.places[0].1.number, alone.note), (3, None));
    }

    /// Of a scan round, or of what a window read, only the end is a state; of an ordered stretch each record.
    #[test]
    fn a_place_inside_a_stretch_that_is_no_state_is_refused_with_what_there_is() {
        use super::super::check_state;
        use reprotect_engine::store::journal::offline::Offline;
        use reprotect_engine::store::journal::view::At;

        let mut machine = Machine::new();
        machine.batch(A, Stretch::Ordered, 11); // entry 3
        machine.batch(A, Stretch::Diff, 12);
        machine.batch(A, Stretch::Diff, 13);
        machine.mark(&[A], 2, 14); // entry 6
        // As a window sends it: what was read, and over it what was written meanwhile.
        machine.batch(A, Stretch::Diff, 15);
        machine.batch(A, Stretch::Ordered, 16);
        machine.mark(&[A], 3, 17);
        let check =
            |number, records| check_state(&machine.retention, DISKS[A], At { epoch: 1, number, records });
        let states = [(0, 0), (2, 0), (2, 1), (3, 0), (6, 0), (9, 0), (70, 0), (70, 1)];
        let others = [(1, 0), (3, 1), (4, 0), (5, 0), (7, 0), (7, 1), (8, 0)];
        for (number, records) in states {
            check(number, records).unwrap();
        }
        for (number, records) in others {
            let error = check(number, records).unwrap_err().to_string();
            assert!(error.contains("points --all") && error.contains("@TIME"), "{number}+{records}: {error}");
        }
        // From the folder alone it is the same.
        let folder = machine.retention.folder().to_owned();
        let mut offline = Offline::open(fs_opener(), &folder).unwrap();
        for (is_state, (number, records)) in
            states.map(|place| (true, place)).into_iter().chain(others.map(|place| (false, place)))
        {
            let at = At { epoch: 1, number, records };
            assert_eq!(offline.is_state(DISKS[A], at).unwrap(), is_state, "{at}");
            let extracted = crate::commands::journal::find_point(&mut offline, DISKS[A], &at.to_string());
            assert_eq!(extracted.is_ok(), is_state, "{at}");
        }
    }
}
