//! What can be had of a disk, by mark, time and sequence; and that thinning takes away what it says and nothing else.
//!
//! The oracle is the disk after every record. Streams are ordered, harvested, marked and fuzzy in turn.
#![cfg(feature = "sim")]

#[path = "points_lab/mod.rs"]
mod points_lab;

use std::collections::BTreeMap;
use std::path::Path;

use points_lab::*;
use reprotect_engine::format::batch::{MarkCause, MarkClass, Stretch};
use reprotect_engine::format::manifest::{Edit, EpochsExpired, PointDropped, PointKept};
use reprotect_engine::format::wire::Text;
use reprotect_engine::store::journal::points::{self, Coverage, Offer};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{Journal, JournalError, thin};
use reprotect_engine::units::{Sequence, Timestamp};

#[test]
fn every_record_of_an_ordered_stretch_can_be_had_and_of_no_other() {
    let mut store = Store::new();
    store.batch(Stretch::Ordered, 3); // nobody said yet that the disk was in a state of its own
    store.end(MarkClass::Crash, "");
    let first = store.sequence + 1;
    for _ in 0..4 {
        store.batch(Stretch::Ordered, 5);
        store.apply();
    }
    store.mark(MarkClass::Crash, "");
    store.batch(Stretch::Ordered, 2);
    let last = store.sequence;
    store.batch(Stretch::Diff, 6);
    let fuzzy = store.mark(MarkClass::Fuzzy, "");
    store.batch(Stretch::Ordered, 6);
    store.apply();
    for _ in 0..2 {
        for sequence in first..=last {
            let found = points::at_sequence(&mut store.journal, DISK, Sequence(sequence)).unwrap();
            assert_eq!(found.sequence, Sequence(sequence));
            store.check(found.at, sequence);
            let again: At = found.at.to_string().parse().unwrap();
            assert_eq!(again, found.at);
        }
        // More records than the entry has are no other state.
        let ends = points::at_sequence(&mut store.journal, DISK, Sequence(first)).unwrap().at;
        let beyond = View::open(&store.journal, DISK, At { records: 6, ..ends }).unwrap_err();
        assert!(beyond.to_string().contains("has 5 records, not 6"), "{beyond}");
        for outside in [1, last + 1, last + 3, store.sequence, store.sequence + 9] {
            let refused = points::at_sequence(&mut store.journal, DISK, Sequence(outside));
            assert!(matches!(refused, Err(JournalError::NoState { .. })), "{outside}: {refused:?}");
        }
        let marks = points::points(&mut store.journal, DISK).unwrap();
        assert_eq!(marks.iter().filter(|point| point.is_consistent()).count(), 2);
        assert_eq!(marks.last().unwrap().at.number, fuzzy);
        store = store.reopen();
    }
}

#[test]
fn a_time_answers_the_newest_state_that_is_not_younger() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 4);
    let start = store.end(MarkClass::Crash, "");
    let mut expected = BTreeMap::from([(store.clock, store.sequence)]);
    for round in 0..3 {
        for _ in 0..3 {
            store.batch(Stretch::Ordered, 4);
            expected.insert(store.clock, store.sequence);
        }
        store.clock += 10;
        store.batch(Stretch::Diff, 4);
        if round % 2 == 0 {
            store.end(MarkClass::Crash, "");
        } else {
            store.mark(MarkClass::Frozen, "");
        }
        expected.insert(store.clock, store.sequence);
    }
    store.apply();
    for clock in 0..store.clock + 5 {
        let found = points::at_time(&mut store.journal, DISK, Timestamp(clock * SECOND));
        let Some((time, sequence)) = expected.range(..=clock).next_back() else {
            let oldest = Some(Timestamp(store.clock.min(2) * SECOND));
            assert!(matches!(found, Err(JournalError::NoState { oldest: got, .. }) if got == oldest));
            continue;
        };
        let found = found.unwrap();
        assert_eq!((found.source_time, found.sequence), (Timestamp(time * SECOND), Sequence(*sequence)));
        store.check(found.at, *sequence);
    }
    assert_eq!(start.number, 2);
}

/// The times for which nothing up to then is missing, asked second by second.
fn covered(store: &mut Store) -> Vec<u64> {
    store.journal.commit(store.now()).expect("a commit");
    let is_covered = |clock: &u64| {
        let time = Timestamp(clock * SECOND);
        let found = points::at_time(&mut store.journal, DISK, time);
        let covers = |found| Coverage::plan(&mut store.journal, DISK, &found, time).expect("the log");
        found.ok().and_then(covers).is_some_and(|stretch| stretch.read().expect("the log"))
    };
    (0..40).filter(is_covered).collect()
}

#[test]
fn up_to_a_time_nothing_is_missing_where_its_ordered_run_goes_on_behind_it() {
    let mut store = Store::new();
    let step = |store: &mut Store, clock: u64| store.clock = clock - 1;
    step(&mut store, 2);
    store.batch(Stretch::Diff, 4);
    step(&mut store, 4);
    store.end(MarkClass::Crash, "");
    step(&mut store, 6);
    store.mark(MarkClass::Crash, ""); // nothing says that writes between two marks were all known
    assert_eq!(covered(&mut store), [0; 0]);
    step(&mut store, 8);
    store.batch(Stretch::Ordered, 2);
    assert_eq!(covered(&mut store), [6, 7], "of that second there may be more");
    step(&mut store, 10);
    store.batch(Stretch::Ordered, 2);
    step(&mut store, 12);
    store.mark(MarkClass::Crash, "");
    step(&mut store, 15);
    store.end(MarkClass::Crash, "");
    assert_eq!(covered(&mut store), (6..15).collect::<Vec<u64>>());
    step(&mut store, 18);
    store.batch(Stretch::Diff, 2);
    step(&mut store, 20);
    store.mark(MarkClass::Fuzzy, "");
    step(&mut store, 22);
    store.batch(Stretch::Ordered, 2); // behind no state
    step(&mut store, 24);
    store.mark(MarkClass::Crash, "");
    step(&mut store, 26);
    store.batch(Stretch::Ordered, 2);
    step(&mut store, 30);
    store.mark(MarkClass::Fuzzy, "");
    store.apply();
    let expected = [(6..15).collect::<Vec<u64>>(), vec![24, 25]].concat();
    assert_eq!(covered(&mut store), expected);
    let mut store = store.reopen();
    assert_eq!(covered(&mut store), expected, "after a restart");
}

#[test]
fn where_the_source_set_its_clock_back_or_ahead_order_stays_and_shown_times_ascend() {
    let mut store = Store::new();
    let mut told = Vec::new();
    // In seconds: an hour back before the third point, a year ahead for the fifth and sixth.
    for (clock, shown) in
        [(5000, 5001), (5010, 5011), (1400, 5011), (1420, 5011), (31_000_000, 31_000_001), (2000, 31_000_001)]
    {
        store.clock = clock - 1;
        store.batch(Stretch::Ordered, 2);
        let at = if told.len() % 2 == 0 {
            store.end(MarkClass::Crash, "")
        } else {
            At::entry(store.applier.open_epoch().unwrap(), store.mark(MarkClass::Crash, ""))
        };
        told.push((at, store.sequence, shown));
    }
    store.apply();
    for _ in 0..2 {
        let points = points::points(&mut store.journal, DISK).unwrap();
        let ats: Vec<At> = points.iter().map(|point| point.at).collect();
        assert_eq!(ats, told.iter().map(|(at, ..)| *at).collect::<Vec<_>>());
        assert!(points.is_sorted_by_key(|point| point.source_time), "{points:?}");
        // What a time answers is the last state that is shown as old enough, and it says which time that has.
        for asked in [5001, 5500, 31_000_001, 99_000_000] {
            let found = points::at_time(&mut store.journal, DISK, Timestamp(asked * SECOND)).unwrap();
            let (at, sequence, shown) = told.iter().rfind(|(.., shown)| *shown <= asked).unwrap();
            assert_eq!((found.at, found.source_time), (*at, Timestamp(*shown * SECOND)), "{asked}");
            store.check(found.at, *sequence);
        }
        let early = points::at_time(&mut store.journal, DISK, Timestamp(1500 * SECOND));
        assert!(matches!(
            early,
            Err(JournalError::NoState { oldest: Some(Timestamp(5_001_000_000_000)), .. })
        ));
        let parts = points::timeline(&mut store.journal, DISK).unwrap();
        assert!(parts.iter().all(|part| part.from <= part.to), "{parts:?}");
        assert!(parts.is_sorted_by_key(|part| part.from), "{parts:?}");
        store = store.reopen();
    }
}

#[test]
fn the_timeline_says_where_every_write_can_be_had_and_where_marks_only() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.end(MarkClass::Crash, "");
    let from = store.clock + 1;
    for _ in 0..5 {
        store.batch(Stretch::Ordered, 1);
    }
    let to = store.clock;
    store.batch(Stretch::Diff, 1);
    let last = store.end(MarkClass::Crash, "");
    let times: Vec<_> = points::timeline(&mut store.journal, DISK)
        .unwrap()
        .iter()
        .map(|part| (part.offer, part.from.0 / SECOND, part.to.0 / SECOND))
        .collect();
    let expected = [
        (Offer::PointsOnly, from - 1, from),
        (Offer::AnyWrite, from, to),
        (Offer::PointsOnly, to, store.clock),
    ];
    assert_eq!(times, expected);
    let point = *store.journal.shape().disks[&DISK].points.values().find(|p| p.epoch == last.epoch).unwrap();
    let degraded = Edit::PointChanged(PointKept { degraded: true, ..point });
    store.journal.edit(&[degraded], Timestamp(0)).unwrap();
    let offers: Vec<_> =
        points::timeline(&mut store.journal, DISK).unwrap().iter().map(|part| part.offer).collect();
    assert_eq!(offers, [Offer::Degraded, Offer::AnyWrite, Offer::Degraded]);
}

/// Carried entries stand before others by their number and behind them in the log: those are released first.
#[test]
fn what_was_carried_and_applied_since_is_no_gap_and_nothing_is_offered_that_is_gone() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.end(MarkClass::Crash, "");
    let segments = |store: &Store| store.journal.shape().segments.len();
    while segments(&store) < 3 {
        store.batch(Stretch::Ordered, 6);
    }
    let now = store.now();
    store.journal.commit(now).unwrap();
    let (oldest, _) = store.journal.pinned().unwrap();
    assert_eq!(store.journal.carry_piece(oldest, u64::MAX, now).unwrap().unreadable, []);
    store.journal.release(oldest, now).unwrap();
    for _ in 0..4 {
        store.end(MarkClass::Crash, "");
        store.batch(Stretch::Ordered, 6);
    }
    store.apply();
    let carried = store.journal.entries(DISK)[0];
    assert!(carried.carried);
    while store.journal.releasable().first().is_some_and(|number| *number < carried.place.segment) {
        let number = store.journal.releasable()[0];
        store.journal.release(number, now).unwrap();
    }
    for _ in 0..2 {
        let numbers: Vec<u64> = store.journal.entries(DISK).iter().map(|entry| entry.number).collect();
        assert_eq!(numbers[0], carried.number);
        assert!(numbers.windows(2).any(|pair| pair[0] + 1 < pair[1]), "{numbers:?}");
        let parts = points::timeline(&mut store.journal, DISK).unwrap();
        assert!(parts.iter().all(|part| part.offer != Offer::Lost), "{parts:?}");
        let mut offered = 0;
        for sequence in 0..=store.sequence {
            if let Ok(found) = points::at_sequence(&mut store.journal, DISK, Sequence(sequence)) {
                store.check(found.at, sequence);
                offered += 1;
            }
        }
        assert!(offered > 18, "{offered}");
        for clock in 0..=store.clock {
            if let Ok(found) = points::at_time(&mut store.journal, DISK, Timestamp(clock * SECOND)) {
                store.check(found.at, found.sequence.0);
            }
        }
        store = store.reopen();
    }
}

/// Every segment that may be released is, what pinned points need of it carried before.
fn release_all(store: &mut Store) -> Result<(), JournalError> {
    let now = store.now();
    while let Some(number) = store.journal.releasable().first().copied() {
        assert_eq!(store.journal.carry_pinned_piece(number, u64::MAX, now)?.lost, []);
        store.journal.release(number, now)?;
    }
    Ok(())
}

#[test]
fn a_pinned_mark_inside_an_undo_epoch_outlives_the_log_merges_and_restarts_and_ends_with_its_pin() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 3);
    let mut ends = vec![store.end(MarkClass::Crash, "")];
    // Two marks inside one epoch; the first is pinned while the epoch goes on.
    let mut inside = Vec::new();
    for _ in 0..2 {
        store.batch(Stretch::Diff, 5);
        let number = store.mark(MarkClass::Crash, "");
        inside.push((At::entry(store.applier.open_epoch().unwrap(), number), store.sequence));
        store.batch(Stretch::Ordered, 2);
    }
    store.apply();
    let [(pinned, sequence), (other, _)] = inside[..] else { panic!("two") };
    let id = points::own_id(DISK, pinned);
    let kept = PointKept {
        disk: DISK,
        point: id,
        number: pinned.number,
        sequence: Sequence(sequence),
        epoch: pinned.epoch,
        source_time: store.now(),
        class: MarkClass::Crash,
        pinned: true,
        degraded: false,
        name: Text::new("inside"),
        cause: MarkCause::Timer,
    };
    let now = store.now();
    store.journal.edit(&[Edit::PointKept(kept)], now).unwrap();
    ends.push(store.end(MarkClass::Crash, ""));
    for round in 0..4 {
        let (segments, newest) = (store.journal.shape().segments.len(), store.journal.shape().segment_newest);
        while store.journal.shape().segments.len() < segments + 2 {
            store.batch(Stretch::Diff, 6);
            ends.push(store.end(MarkClass::Crash, ""));
        }
        release_all(&mut store).unwrap();
        assert!(store.journal.entries(DISK)[0].place.segment > newest, "it was carried on");
        // The points between go, and runs are made one around it.
        for gone in ends.drain(round.min(1)..) {
            let gone = PointDropped { disk: DISK, point: points::own_id(DISK, gone) };
            store.journal.edit(&[Edit::PointDropped(gone)], now).unwrap();
        }
        while let Some(mut merge) = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap() {
            let bytes = merge.write().unwrap();
            merge.settle(&mut store.journal, bytes, now).unwrap().unwrap();
        }
        store.check(pinned, sequence);
        assert!(store.view(other).is_err(), "nobody wanted that one");
        let listed = points::points(&mut store.journal, DISK).unwrap();
        let found = listed.iter().find(|point| point.at == pinned).unwrap();
        assert!(found.pinned && found.kept && found.is_sound() && found.name.as_str() == "inside");
        let times = points::timeline(&mut store.journal, DISK).unwrap();
        assert!(times.iter().all(|part| part.offer != Offer::Lost), "{times:?}");
        store = store.reopen();
        ends = vec![store.end(MarkClass::Crash, "")];
    }
    store.journal.edit(&[Edit::PointDropped(PointDropped { disk: DISK, point: id })], now).unwrap();
    while store.journal.shape().segments.len() < 3 {
        store.batch(Stretch::Diff, 6);
        store.end(MarkClass::Crash, "");
    }
    release_all(&mut store).unwrap();
    assert!(store.view(pinned).is_err());
    let needed = store.journal.shape().segments.keys().map(|segment| store.journal.pinned_in(*segment));
    assert!(needed.into_iter().all(|needed| needed == (0, 0)));
}

/// The mark may have been applied only after somebody pinned it, and end the epoch.
#[test]
fn a_pin_that_comes_before_the_end_of_the_epoch_stays_with_what_becomes_the_end() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 3);
    let at = store.end(MarkClass::Crash, "");
    let end = store.journal.shape().disks[&DISK].points[&points::own_id(DISK, at)];
    let edits = [PointKept { pinned: true, name: Text::new("mine"), ..end }, end].map(Edit::PointKept);
    store.journal.edit(&edits, Timestamp(1)).unwrap();
    for _ in 0..2 {
        let known = store.journal.shape().disks[&DISK].points[&end.point];
        assert!(known.pinned && known.name.as_str() == "mine");
        store = store.reopen();
    }
}

#[test]
fn behind_a_mark_of_a_disk_that_is_not_whole_nothing_is_a_state_until_one_that_is() {
    let mut store = Store::new();
    store.batch(Stretch::Diff, 1);
    store.unread = 3;
    store.mark(MarkClass::Crash, "");
    let lacking = store.sequence;
    store.batch(Stretch::Ordered, 2);
    let inside = store.sequence - 1;
    store.unread = 0;
    store.mark(MarkClass::Crash, "");
    let whole = store.sequence;
    store.batch(Stretch::Ordered, 2);
    store.apply();
    let known = points::points(&mut store.journal, DISK).unwrap();
    let told: Vec<_> =
        known.iter().map(|point| (point.sequence.0, point.degraded, point.is_consistent())).collect();
    assert_eq!(told, [(lacking, true, false), (whole, false, true)]);
    for (sequence, is_state) in [(lacking, false), (inside, false), (whole, true), (whole + 1, true)] {
        let found = points::at_sequence(&mut store.journal, DISK, Sequence(sequence));
        assert_eq!(found.is_ok(), is_state, "{sequence}: {found:?}");
    }
    let offers: Vec<_> =
        points::timeline(&mut store.journal, DISK).unwrap().iter().map(|part| part.offer).collect();
    assert_eq!(offers.last(), Some(&Offer::AnyWrite), "{offers:?}");
    assert!(points::at_time(&mut store.journal, DISK, Timestamp(3 * SECOND)).is_err());
}

#[test]
fn thinning_keeps_every_kept_point_whatever_order_it_is_done_in() {
    for seed in 0..40 {
        let mut store = Store::new();
        store.random = seed * 77 + 1;
        let mut ends = Vec::new();
        for _ in 0..12 {
            for _ in 0..store.random(3) {
                let count = 1 + store.random(6);
                store.batch(Stretch::Diff, count);
            }
            ends.push((store.end(MarkClass::Crash, ""), store.sequence));
        }
        while ends.len() > 2 {
            let at = store.random(ends.len() as u64 - 1) as usize;
            let (gone, _) = ends.remove(at);
            let now = store.now();
            let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, gone) };
            store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
            let mut merges = 0;
            while let Some(mut merge) =
                thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap()
            {
                let bytes = merge.write().unwrap();
                merge.settle(&mut store.journal, bytes, now).unwrap().unwrap();
                merges += 1;
                assert!(merges < 12, "thinning comes to an end");
            }
            if store.random(3) == 0 {
                store = store.reopen();
            }
            for (at, sequence) in ends.clone() {
                store.check(at, sequence);
            }
        }
        let shape = &store.journal.shape().disks[&DISK];
        assert!(shape.epochs.len() <= 7, "what nothing needs is folded away: {}", shape.epochs.len());
        assert_eq!(store.run_files().len(), shape.runs.len() + 1);
    }
}

#[test]
fn runs_are_not_merged_while_somebody_reads_a_point_between_them_nor_before_their_time() {
    let mut store = Store::new();
    let mut ends = Vec::new();
    for _ in 0..3 {
        store.batch(Stretch::Diff, 9);
        ends.push(store.end(MarkClass::Crash, ""));
    }
    let now = store.now();
    for end in &ends[..2] {
        let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, *end) };
        store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
    }
    let read = [ends[0].epoch + 1, ends[1].epoch + 1];
    let never = Timestamp(u64::MAX);
    assert!(thin::next(&store.journal, DISK, never, &read, &[]).unwrap().is_none());
    assert!(thin::next(&store.journal, DISK, Timestamp(1), &[], &[]).unwrap().is_none());
    assert!(thin::next(&store.journal, DISK, never, &read[..1], &[]).unwrap().is_some());
}

/// Somebody planned a view of a point, and it was given up before its runs were opened.
#[test]
fn a_view_whose_runs_were_merged_or_went_since_says_so_and_shows_nothing_else() {
    for expires in [false, true] {
        let mut store = Store::new();
        let mut ends = Vec::new();
        for _ in 0..4 {
            store.batch(Stretch::Diff, 9);
            ends.push(store.end(MarkClass::Crash, ""));
        }
        let now = store.now();
        let view = View::open(&store.journal, DISK, ends[0]).unwrap();
        view.open_runs(&store.journal, &mut store.applier).unwrap();
        let dropped =
            |end: &At| Edit::PointDropped(PointDropped { disk: DISK, point: points::own_id(DISK, *end) });
        let mut edits: Vec<Edit> = ends[..3].iter().map(dropped).collect();
        if expires {
            edits.push(Edit::EpochsExpired(EpochsExpired { disk: DISK, through: 3 }));
        }
        store.journal.edit(&edits, now).unwrap();
        while let Some(mut merge) = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap() {
            let bytes = merge.write().unwrap();
            merge.settle(&mut store.journal, bytes, now).unwrap().unwrap();
        }
        let opened = view.open_runs(&store.journal, &mut store.applier);
        assert!(matches!(opened, Err(JournalError::Gone { .. })), "expired: {expires}, {opened:?}");
        let last = View::open(&store.journal, DISK, ends[3]).unwrap();
        last.open_runs(&store.journal, &mut store.applier).unwrap();
    }
}

#[test]
fn what_a_crash_leaves_of_thinning_is_removed_and_what_is_foreign_is_moved_aside() {
    let mut store = Store::new();
    let mut ends = Vec::new();
    for _ in 0..4 {
        store.batch(Stretch::Diff, 9);
        ends.push((store.end(MarkClass::Crash, ""), store.sequence));
    }
    let now = store.now();
    let (gone, _) = ends.remove(1);
    let dropped = PointDropped { disk: DISK, point: points::own_id(DISK, gone) };
    store.journal.edit(&[Edit::PointDropped(dropped)], now).unwrap();
    let mut merge = thin::next(&store.journal, DISK, Timestamp(u64::MAX), &[], &[]).unwrap().unwrap();
    merge.write().unwrap(); // and the program ends before the manifest knows of it
    let before = store.run_files().len();
    drop(merge);
    store = store.reopen();
    assert_eq!(store.run_files().len(), before - 1);
    for (at, sequence) in ends.clone() {
        store.check(at, sequence);
    }
    let expired = EpochsExpired { disk: DISK, through: 1 };
    let gone = PointDropped { disk: DISK, point: points::own_id(DISK, ends[0].0) };
    store.journal.edit(&[Edit::PointDropped(gone), Edit::EpochsExpired(expired)], now).unwrap();
    let left = store.run_files().len(); // the file of the expired epoch is still there
    store = store.reopen();
    assert_eq!(store.run_files().len(), left - 1);
    let foreign = Path::new(FOLDER).join(format!("undo-{DISK}-00000099"));
    store.files.opener().create(&foreign, 8192).unwrap();
    drop(store.applier);
    drop(store.journal);
    let (_, found) = Journal::open(store.files.opener(), Path::new(FOLDER), SETTINGS, now).unwrap();
    assert_eq!(found.set_aside.len(), 1);
}
