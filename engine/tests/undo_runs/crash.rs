//! Power loss at every point of a run's life, with any choice of unflushed sectors on the medium.

use std::path::Path;

use reprotect_engine::format::undo::BlockRange;
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::undo::{ActiveRun, Image, ImageData, SealedRun};
use reprotect_engine::units::BlockIndex;

use crate::model::{
    CLOSED, DISK_BLOCKS, MAX, Model, PATH, Readable, Seeded, assert_holds, capture, header, identity, small,
};

/// What a flush promised: by the event number, this many bytes are certain, with these images.
struct Promise {
    events: usize,
    certain: u64,
    model: Model,
}

/// A run that was captured into and flushed now and then.
struct Life {
    trace: Vec<Event>,
    promises: Vec<Promise>,
    /// All images, also those no flush covered.
    model: Model,
}

/// Captures a few times, with flushes in between, into a run that holds `model`.
fn live(files: &MemoryFiles, run: &mut ActiveRun, model: Model, seeded: &mut Seeded, flavour: u64) -> Life {
    let mut life = Life { trace: Vec::new(), promises: Vec::new(), model };
    for round in 0..5 {
        let wanted: Vec<BlockRange> = (0..1 + seeded.below(6))
            .map(|_| (seeded.below(400), 1 + seeded.below(12)))
            .map(|(at, len)| BlockRange::new(at, at + len))
            .collect();
        capture(run, &mut life.model, &wanted, flavour + round).unwrap();
        if seeded.below(2) == 0 {
            run.flush().unwrap();
            let events = files.trace().len();
            life.promises.push(Promise { events, certain: run.len_bytes(), model: life.model.clone() });
        }
    }
    life.trace = files.trace();
    life
}

/// What is in a run that was reopened: everything promised, as it was, and of the rest only what was captured.
fn surviving(run: &mut ActiveRun, promised: &Model, all: &Model) -> Model {
    let found = run.find(BlockRange::new(0, DISK_BLOCKS));
    let mut survivors = promised.clone();
    for block in found.iter().flat_map(|found| found.blocks.start..found.blocks.end) {
        survivors.insert(block, all[&block].clone());
    }
    assert_holds(run, &survivors);
    survivors
}

fn landing(mode: u64, seeded: &mut Seeded) -> impl FnMut() -> bool + '_ {
    move || match mode {
        0 => false,
        1 => true,
        2 => seeded.below(8) != 0,
        _ => seeded.below(2) == 0,
    }
}

#[test]
fn what_was_flushed_is_readable_after_power_loss_at_any_point() {
    let path = Path::new(PATH);
    for seed in 0..12 {
        let mut seeded = Seeded(seed);
        let (empty, files) = (MemoryFiles::default(), MemoryFiles::default());
        let mut run = ActiveRun::create(&files, path, header(5), MAX).unwrap();
        let created = files.trace().len();
        let life = live(&files, &mut run, Model::new(), &mut seeded, 10);
        drop(run);
        for events in created..=life.trace.len() {
            for mode in 0..5 {
                let medium = empty.crashed(&life.trace, events, landing(mode, &mut seeded));
                let promise = life.promises.iter().rfind(|promise| promise.events <= events);
                let (certain, promised) =
                    promise.map_or((0, Model::new()), |promise| (promise.certain, promise.model.clone()));
                let (mut run, holes) = ActiveRun::reopen(&medium, path, &identity(5), certain, MAX).unwrap();
                assert_eq!(
                    holes,
                    [],
                    "seed {seed}, {events} events, mode {mode}: nothing certain is damaged"
                );
                assert!(run.len_bytes() >= certain);
                let survivors = surviving(&mut run, &promised, &life.model);
                if mode == 4 || seeded.below(6) == 0 {
                    second_life(&medium, run, survivors, certain, &mut seeded);
                }
            }
        }
    }
}

/// Goes on after a crash with other images, and crashes again: nothing of the first life may come back.
fn second_life(
    medium: &MemoryFiles,
    mut run: ActiveRun,
    survivors: Model,
    certain: u64,
    seeded: &mut Seeded,
) {
    let (before, path) = (medium.snapshot(), Path::new(PATH));
    let skipped = medium.trace().len(); // the cut of reopening, which is part of `before`
    let life = live(medium, &mut run, survivors.clone(), seeded, 70);
    drop(run);
    let trace = &life.trace[skipped..];
    for _ in 0..4 {
        let events = seeded.below(trace.len() as u64 + 1) as usize;
        let mode = seeded.below(5);
        let again = before.crashed(trace, events, landing(mode, seeded));
        let promise = life.promises.iter().rfind(|promise| promise.events - skipped <= events);
        let (certain, promised) = promise.map_or((certain, None), |p| (p.certain, Some(&p.model)));
        let (mut run, holes) = ActiveRun::reopen(&again, path, &identity(5), certain, MAX).unwrap();
        assert_eq!(holes, []);
        surviving(&mut run, promised.unwrap_or(&Model::new()), &life.model);
    }
}

/// A group that reached the medium behind one that did not must not come back when the gap is filled by a new group.
#[test]
fn a_group_behind_a_torn_one_never_comes_back() {
    let path = Path::new(PATH);
    let noise = |block: u64| {
        let mut seeded = Seeded(block);
        (0..512).flat_map(|_| seeded.next().to_le_bytes()).collect::<Vec<u8>>()
    };
    let append = |run: &mut ActiveRun, block: u64| {
        run.append(&[Image { first: BlockIndex(block), data: ImageData::Bytes(&noise(block)) }]).unwrap();
    };
    let files = MemoryFiles::default();
    let mut run = ActiveRun::create(&files, path, header(5), MAX).unwrap();
    append(&mut run, 1);
    run.flush().unwrap();
    let (certain, before, skipped) = (run.len_bytes(), files.snapshot(), files.trace().len());
    append(&mut run, 2);
    let torn = run.len_bytes() - certain;
    append(&mut run, 3);
    drop(run);
    let mut sector = 0;
    let medium = before.crashed(&files.trace()[skipped..], 2, || {
        sector += 1;
        sector > torn / 512 // of the two groups, only the second is on the medium
    });
    let (mut run, _) = ActiveRun::reopen(&medium, path, &identity(5), certain, MAX).unwrap();
    assert_eq!(run.missing(BlockRange::new(0, 9)), [BlockRange::new(0, 1), BlockRange::new(2, 9)]);
    append(&mut run, 4);
    assert_eq!(run.len_bytes(), certain + torn, "it ends where the old group begins");
    run.flush().unwrap();
    drop(run);
    let (run, holes) = ActiveRun::reopen(&medium, path, &identity(5), certain, MAX).unwrap();
    assert_eq!((holes, run.len_bytes()), (Vec::new(), certain + torn));
    assert!(run.contains(BlockRange::new(4, 5)) && run.missing(BlockRange::new(3, 4)).len() == 1);
}

#[test]
fn a_crash_while_the_file_is_made_leaves_a_run_or_an_error() {
    let (empty, files) = (MemoryFiles::default(), MemoryFiles::default());
    drop(ActiveRun::create(&files, Path::new(PATH), header(5), MAX).unwrap());
    let trace = files.trace();
    let mut seeded = Seeded(1);
    for events in 0..=trace.len() {
        for mode in 0..20 {
            let medium = empty.crashed(&trace, events, landing(mode, &mut seeded));
            let reopened = ActiveRun::reopen(&medium, Path::new(PATH), &identity(5), 0, MAX);
            assert!(reopened.is_ok() || events < trace.len(), "complete once `create` has returned");
        }
    }
}

#[test]
fn a_crash_while_sealing_leaves_a_run_that_can_be_reopened_or_is_sealed() {
    let path = Path::new(PATH);
    let files = MemoryFiles::default();
    let (run, model) = small(&files, 5);
    let certain = run.len_bytes();
    let (before, skipped) = (files.snapshot(), files.trace().len());
    drop(run.seal(&files, CLOSED).unwrap());
    let trace = files.trace().split_off(skipped);
    let mut seeded = Seeded(4);
    for events in 0..=trace.len() {
        for mode in 0..30 {
            let medium = before.crashed(&trace, events, landing(mode, &mut seeded));
            // Flushed, but perhaps not yet cut to its length: all of it can be read, without the trailer too.
            let flushed = trace[..events].iter().any(|event| matches!(event, Event::Flush(_)));
            if flushed || events == trace.len() {
                let mut sealed = SealedRun::open(&medium, path, &identity(5)).unwrap();
                // Not cut to its length it has no trailer where one is looked for; when everything was done it has.
                let cut = trace[..events].iter().any(|event| matches!(event, Event::Resize(..)));
                assert!(cut || !sealed.damage().is_empty());
                assert!(events < trace.len() || sealed.damage().is_empty());
                assert_holds(&mut sealed, &model);
            }
            let (mut run, holes) = ActiveRun::reopen(&medium, path, &identity(5), certain, MAX).unwrap();
            assert_eq!((holes, run.len_bytes()), (Vec::new(), certain));
            assert_holds(&mut run, &model);
            let mut sealed = run.seal(&medium, CLOSED).unwrap();
            assert_eq!(sealed.damage(), []);
            assert_holds(&mut sealed, &model);
        }
    }
}
