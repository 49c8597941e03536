//! Power loss at every step of giving up what waits for a target, of the start behind it, and of what is written then.
//!
//! What must hold whatever reached the medium: either nothing is lost and everything waits as before, or the journal says
//! what is lost, the disk is to be compared whole, and nothing that was given up comes back. Never neither. A start that
//! is stopped itself is tried again. Units: sectors, entry numbers, events of the trace.

#[path = "../../../engine/tests/journal_lab/mod.rs"]
mod journal_lab;
#[path = "../../../engine/tests/journal_lab/place.rs"]
mod place;

use journal_lab::{NOW, POSITION, id};
use place::{Lab, Place, noise};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::manifest::EpochCause;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::DiskShape;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{PeerId, SECTOR_BYTES};

const TARGET: &str = "/datastore/disk";
const SECTORS: u64 = 16 * 8 + 3;
/// The newest entry that is on the target, and the newest of those that are given up.
const ON_TARGET: u64 = 3;
const WAITS_TO: u64 = 9;
/// Ways in which what was not flushed reaches the medium, per prefix; the first are all of it and none.
const SUBSETS: u64 = 6;

fn place(files: &MemoryFiles) -> Place {
    Place {
        files: files.opener(),
        folder: "/retention".into(),
        targets: vec![TARGET.into()],
        size_sectors: SECTORS,
        segment_bytes: 48 << 10,
    }
}

/// Where an entry writes.
const fn extent(number: u64) -> (u64, u64) {
    (number * 8, 24)
}

fn write(lab: &mut Lab, number: u64) {
    let (start, sectors) = extent(number);
    assert_eq!(lab.write(0, start, sectors, number).unwrap(), number);
}

/// The disk with these entries on it.
fn content(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut disk = noise(77, (SECTORS * SECTOR_BYTES) as usize);
    for number in entries {
        let (start, sectors) = extent(number);
        let (from, bytes) = ((start * SECTOR_BYTES) as usize, (sectors * SECTOR_BYTES) as usize);
        disk[from..from + bytes].copy_from_slice(&noise(number, bytes));
    }
    disk
}

fn shape(lab: &Lab) -> &DiskShape {
    &lab.journal.shape().disks[&id(0)]
}

/// A disk in step with its source whose target takes nothing any more: entries wait in several segments.
fn waiting(files: &MemoryFiles) -> Lab {
    files.put(TARGET, &content([]));
    let mut lab = place(files).create().unwrap();
    let agent = PeerId([2; 16]);
    let done = TargetDisk::new_state(id(0), agent, [3; 16], SECTORS, POSITION.lineage, PassMode::Done);
    lab.journal.append_state(&done, NOW).unwrap();
    (1..=ON_TARGET).for_each(|number| write(&mut lab, number));
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    lab.epoch(0).unwrap();
    for number in ON_TARGET + 1..=WAITS_TO {
        write(&mut lab, number);
        lab.commit().unwrap();
    }
    lab
}

/// What the start of a daemon does with the disk, up to where its session and its writer would go on.
fn start(files: &MemoryFiles) -> (Lab, DiskState) {
    let mut lab = place(files).open().unwrap();
    assert_eq!(lab.found.damage, []);
    assert_eq!(lab.holes, [vec![]]);
    let log = lab.found.disks.get(&id(0)).cloned();
    let mut state = log.as_ref().and_then(|log| log.state.clone()).map(|(state, _)| state).unwrap();
    super::take_up(&mut lab.journal, &mut state, log.as_ref(), &RangeSet::default()).unwrap();
    if lab.disks[0].open_epoch().is_none() {
        lab.disks[0].begin_epoch(&mut lab.journal, EpochCause::Time, POSITION, None, NOW).unwrap();
    }
    (lab, state)
}

/// Everything behind the first power loss: the loss, a kill, a start, and a stretch of new entries on the target.
fn play(files: &MemoryFiles, mut lab: Lab) -> Vec<(usize, u64)> {
    let mut durable = vec![(files.happened(), WAITS_TO)];
    let lost = lab.journal.give_up(id(0), "the retention drive was full", NOW).unwrap();
    assert_eq!(lost, Some((ON_TARGET + 1, WAITS_TO)));
    let segments = lab.journal.releasable();
    assert!(segments.len() > 1, "what waits fills {} segments", segments.len());
    for segment in segments {
        lab.journal.release(segment, NOW).unwrap();
    }
    drop(lab);
    let (mut lab, _) = start(files);
    for number in WAITS_TO + 1..=WAITS_TO + 3 {
        write(&mut lab, number);
        lab.commit().unwrap();
        durable.push((files.happened(), number));
        lab.apply(0).unwrap();
        lab.commit().unwrap();
        if number == WAITS_TO + 2 {
            lab.epoch(0).unwrap();
        }
    }
    durable
}

/// What was seen, so that a test that tries nothing is noticed.
#[derive(Debug, Default)]
struct Sum {
    nothing_lost: usize,
    lost: usize,
    past_the_loss: usize,
}

fn judge(files: &MemoryFiles, durable: u64, what: &str, sum: &mut Sum) {
    let (mut lab, state) = start(files);
    let newest = lab.journal.newest(id(0)).max(lab.disks[0].applied().number);
    assert!(newest >= durable, "{what}: entry {durable} was durable, {newest} is the newest");
    let is_lost = !shape(&lab).lost.is_empty();
    let waits = lab.journal.entries(id(0)).iter().map(|entry| entry.number);
    let given_up: Vec<u64> = waits.filter(|number| (ON_TARGET + 1..=WAITS_TO).contains(number)).collect();
    lab.apply(0).unwrap();
    let expected = if is_lost {
        assert_eq!(state.mode, PassMode::Compare, "{what}: the loss is hidden");
        assert!(state.settled.is_empty(), "{what}: only a part is compared, without {:?}", state.settled);
        assert!(given_up.is_empty(), "{what}: what was given up is there again");
        assert!(shape(&lab).is_doubtful(newest), "{what}: points promise more than they hold");
        sum.lost += 1;
        sum.past_the_loss += usize::from(newest > WAITS_TO);
        content((1..=ON_TARGET).chain(WAITS_TO + 1..=newest))
    } else {
        assert_eq!(state.mode, PassMode::Done, "{what}: compared for nothing");
        assert_eq!(given_up, (ON_TARGET + 1..=WAITS_TO).collect::<Vec<_>>(), "{what}: lost silently");
        assert_eq!(newest, WAITS_TO, "{what}");
        sum.nothing_lost += 1;
        content(1..=WAITS_TO)
    };
    assert!(files.bytes(TARGET) == expected, "{what}: the target at entry {newest}");
    let end = At::entry(1, ON_TARGET);
    assert!(lab.view(0, end).unwrap() == content(1..=ON_TARGET), "{what}: the point before the loss");
    // It goes on, under numbers that nothing ever had.
    lab.write(0, 1, 1, newest + 1).unwrap();
    assert_eq!(lab.journal.newest(id(0)), newest + 1, "{what}");
}

/// Whether an unflushed write lands: all, none, or as the seed says.
fn lands(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        seed == 0 || (seed > 1 && state >> 33 & 1 == 1)
    }
}

#[test]
fn at_every_step_of_giving_up_and_of_the_start_behind_it_the_loss_is_known_or_did_not_happen() {
    let files = MemoryFiles::default();
    let lab = waiting(&files);
    let (before, skipped) = (files.snapshot(), files.happened());
    let durable = play(&files, lab);
    let trace: Vec<Event> = files.trace().split_off(skipped);
    let mut sum = Sum::default();
    for events in 0..=trace.len() {
        let promised = durable.iter().rfind(|(at, _)| at - skipped <= events).unwrap().1;
        for seed in 0..SUBSETS {
            let what = format!("{events} of {} I/Os, subset {seed}", trace.len());
            let stopped = before.crashed(&trace, events, lands(seed));
            // The start is stopped, too, somewhere, and so is the one behind it.
            let (mut again, mut what_again) = (stopped.snapshot(), what.clone());
            for round in 0..2 {
                let base = again.snapshot();
                let from = again.happened();
                let (mut lab, _) = start(&again);
                lab.apply(0).unwrap();
                drop(lab);
                let inner = again.trace().split_off(from);
                let cut = (events * 7 + seed as usize * 3 + round) % (inner.len() + 1);
                again = base.crashed(&inner, cut, lands(seed + 2));
                what_again = format!("{what_again}; its start stopped after {cut} of {}", inner.len());
            }
            judge(&again, promised, &what_again, &mut sum);
            judge(&stopped, promised, &what, &mut sum);
        }
    }
    eprintln!("{sum:?}");
    assert!(sum.nothing_lost > 0 && sum.lost > 0 && sum.past_the_loss > 0, "{sum:?}");
}
