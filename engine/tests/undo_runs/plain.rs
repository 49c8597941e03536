//! Undo runs in good order: what is captured is found, sealed, found again; limits and refusals.

use std::path::Path;

use proptest::prelude::*;
use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::format::undo::{BlockRange, RunHeader, RunIdentity};
use reprotect_engine::store::files::memory::{Event, MemoryFiles};
use reprotect_engine::store::journal::undo::{
    ActiveRun, Image, ImageData, Place, SealedRun, UndoError, run_bytes_max,
};
use reprotect_engine::units::{BlockIndex, DiskId};

use crate::model::{
    CLOSED, DISK_BLOCKS, MAX, Model, PATH, Seeded, assert_holds, capture, header, identity, image, small,
};

#[derive(Clone, Debug)]
enum Op {
    Capture(Vec<(u64, u64)>),
    Flush,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => proptest::collection::vec((0..2000_u64, 1..40_u64), 1..6).prop_map(Op::Capture),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_run_behaves_like_a_map_of_first_images(ops in proptest::collection::vec(op(), 1..24)) {
        let (files, path, mut model) = (MemoryFiles::default(), Path::new(PATH), Model::new());
        let mut run = ActiveRun::create(&files, path, header(5), MAX).unwrap();
        for (flavour, op) in (0..).zip(ops) {
            match op {
                Op::Capture(ranges) => {
                    let ranges: Vec<_> = ranges.iter().map(|(at, len)| BlockRange::new(*at, at + len)).collect();
                    capture(&mut run, &mut model, &ranges, flavour).unwrap();
                    for range in ranges {
                        prop_assert!(run.contains(range) && run.missing(range).is_empty());
                    }
                }
                Op::Flush => run.flush().unwrap(),
                Op::Reopen => {
                    let len = run.len_bytes();
                    drop(run);
                    let (again, holes) = ActiveRun::reopen(&files, path, &identity(5), len, MAX).unwrap();
                    prop_assert_eq!(holes, vec![]);
                    prop_assert_eq!(again.len_bytes(), len);
                    run = again;
                }
            }
        }
        assert_holds(&mut run, &model);
        let (frames, blocks, ..) = run.counts();
        let mut sealed = run.seal(&files, CLOSED).unwrap();
        assert_holds(&mut sealed, &model);
        let trailer = *sealed.trailer().unwrap();
        prop_assert_eq!((trailer.frames, trailer.blocks), (frames, blocks));
        prop_assert_eq!((trailer.opened, trailer.closed), (header(5).created, CLOSED));
        prop_assert_eq!(blocks, model.len() as u64);
        prop_assert_eq!(sealed.verify().unwrap(), vec![]);
        prop_assert_eq!(sealed.len_bytes(), files.bytes(PATH).len() as u64);
        prop_assert_eq!(sealed.damage(), &[]);
    }
}

#[test]
fn reads_cross_frames_and_refuse_gaps() {
    let files = MemoryFiles::default();
    let (run, model) = small(&files, 5);
    let mut sealed = run.seal(&files, CLOSED).unwrap();
    let mut out = vec![0; 4 * 4096];
    sealed.read(BlockIndex(60), &mut out).unwrap();
    let expected: Vec<u8> = (60..64).flat_map(|block| model[&block].clone()).collect();
    assert!(out == expected);
    let error = sealed.read(BlockIndex(62), &mut out).unwrap_err();
    assert!(matches!(error, UndoError::NotHere { blocks: BlockRange { start: 64, end: 66 }, .. }), "{error}");
    assert!(matches!(sealed.read(BlockIndex(5), &mut out[..4096]), Err(UndoError::NotHere { .. })));
    assert_eq!(sealed.lookup(BlockRange::new(42, 60)).unwrap(), []);
    let zeros = sealed.lookup(BlockRange::new(1010, 5000)).unwrap();
    assert_eq!(
        (zeros.len(), zeros[0].blocks, zeros[0].place),
        (1, BlockRange::new(1010, 1020), Place::Zeros)
    );
}

#[test]
fn neighbouring_images_share_frames_that_end_at_sixteen_blocks() {
    let (files, path) = (MemoryFiles::default(), Path::new(PATH));
    let mut run = ActiveRun::create(&files, path, header(5), MAX).unwrap();
    let noise = |block: u64| {
        let mut seeded = Seeded(block);
        (0..512).flat_map(|_| seeded.next().to_le_bytes()).collect::<Vec<u8>>()
    };
    let blocks: Vec<Vec<u8>> = (10..40).map(noise).collect();
    let images: Vec<Image<'_>> = (10..)
        .zip(&blocks)
        .map(|(block, bytes)| Image { first: BlockIndex(block), data: ImageData::Bytes(bytes) })
        .collect();
    run.append(&images).unwrap();
    let found = run.lookup(BlockRange::new(0, 100));
    let cut: Vec<BlockRange> = found.iter().map(|found| found.blocks).collect();
    assert_eq!(cut, [BlockRange::new(10, 16), BlockRange::new(16, 32), BlockRange::new(32, 40)]);
    assert!(run.len_bytes() <= 8192 + 31 * 4096, "raw where compression saves nothing");
}

#[test]
fn an_append_is_one_write_a_mebibyte() {
    let (files, path) = (MemoryFiles::default(), Path::new(PATH));
    let mut run = ActiveRun::create(&files, path, header(5), MAX).unwrap();
    let before = files.trace().len();
    let bytes: Vec<u8> = (0..800).flat_map(|block| image(block * 7, 3)).collect();
    run.append(&[Image { first: BlockIndex(3), data: ImageData::Bytes(&bytes) }]).unwrap();
    let writes: Vec<(u64, usize)> = files.trace()[before..]
        .iter()
        .map(|event| match event {
            Event::Write { offset, data, .. } => (*offset, data.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(writes.len() <= 3, "{writes:?}");
    assert!(writes.iter().all(|(at, len)| at.is_multiple_of(4096) && len.is_multiple_of(4096)));
    assert!(writes.windows(2).all(|pair| pair[0].0 + pair[0].1 as u64 == pair[1].0));
    assert_eq!(writes.last().map(|(at, len)| at + *len as u64), Some(run.len_bytes()));
}

#[test]
#[should_panic(expected = "captured twice")]
fn capturing_a_block_twice_is_a_programming_error() {
    let files = MemoryFiles::default();
    let (mut run, _) = small(&files, 5);
    let _ = run.append(&[Image { first: BlockIndex(1019), data: ImageData::Zeros(2) }]);
}

#[test]
fn a_full_run_says_so_before_anything_is_written_and_can_still_be_sealed() {
    let (files, path) = (MemoryFiles::default(), Path::new(PATH));
    let mut run = ActiveRun::create(&files, path, header(5), 256 << 10).unwrap();
    let mut model = Model::new();
    let mut flavour = 0;
    let error = loop {
        let (len, events) = (run.len_bytes(), files.trace().len());
        let at = flavour * 3;
        flavour += 1;
        if let Err(error) = capture(&mut run, &mut model, &[BlockRange::new(at, at + 2)], flavour) {
            assert_eq!((run.len_bytes(), files.trace().len()), (len, events), "nothing was written");
            break error;
        }
    };
    assert!(matches!(error, UndoError::Full { .. }), "{error}");
    assert_eq!(error.severity(), Severity::Retry);
    assert!(model.len() > 20);
    let mut sealed = run.seal(&files, CLOSED).unwrap();
    assert_holds(&mut sealed, &model);
    assert!(matches!(
        ActiveRun::create(&files, Path::new("b"), header(5), 8192),
        Err(UndoError::Full { .. })
    ));
}

#[test]
fn the_longest_run_of_a_disk_fits_what_run_bytes_max_says() {
    let (files, path) = (MemoryFiles::default(), Path::new(PATH));
    let small_disk = RunHeader { size_sectors: 200 * 8, ..header(5) };
    let mut run = ActiveRun::create(&files, path, small_disk, run_bytes_max(200 * 8)).unwrap();
    let mut model = Model::new();
    for block in (0..200).rev() {
        capture(&mut run, &mut model, &[BlockRange::new(block, block + 1)], 3).unwrap();
    }
    assert_holds(&mut run.seal(&files, CLOSED).unwrap(), &model);
}

#[test]
fn a_full_medium_stops_the_run_until_it_is_reopened() {
    let files = MemoryFiles::default();
    let (mut run, mut model) = small(&files, 5);
    let certain = run.len_bytes();
    files.set_room(Some(0));
    let error = capture(&mut run, &mut Model::new(), &[BlockRange::new(5000, 5001)], 1).unwrap_err();
    assert!(error.is_full() && error.severity() == Severity::Retry, "{error}");
    files.set_room(None);
    assert!(matches!(run.flush(), Err(UndoError::Failed { .. })), "what reached the medium is unknown");
    drop(run);
    let (mut run, holes) = ActiveRun::reopen(&files, Path::new(PATH), &identity(5), certain, MAX).unwrap();
    assert_eq!(holes, []);
    capture(&mut run, &mut model, &[BlockRange::new(5000, 5001)], 1).unwrap();
    assert_holds(&mut run, &model);
}

#[test]
fn the_run_of_something_else_is_refused_by_name() {
    let files = MemoryFiles::default();
    let (run, _) = small(&files, 5);
    drop(run.seal(&files, CLOSED).unwrap());
    let open =
        |expected: RunIdentity| SealedRun::open(&files, Path::new(PATH), &expected).unwrap_err().to_string();
    assert!(open(RunIdentity { disk: DiskId([7; 16]), ..identity(5) }).contains("another disk"));
    assert!(open(RunIdentity { journal: [7; 16], ..identity(5) }).contains("another journal"));
    assert!(open(identity(6)).contains("another undo epoch"));
    files.put("other", b"short");
    let error = SealedRun::open(&files, Path::new("other"), &identity(5)).unwrap_err();
    assert!(matches!(error, UndoError::Header { .. }), "{error}");
    assert!(matches!(
        ActiveRun::reopen(&files, Path::new("other"), &identity(5), 0, MAX),
        Err(UndoError::Header { .. })
    ));
    assert!(ActiveRun::create(&files, Path::new(PATH), header(5), MAX).is_err(), "never replaces a file");
}

#[test]
fn a_run_of_a_newer_program_is_refused_and_not_touched() {
    let files = MemoryFiles::default();
    for (newer, name) in [
        (RunHeader { features_incompatible: 4, ..header(5) }, "features_incompatible"),
        (RunHeader { version: 2, ..header(5) }, "version"),
    ] {
        let block = newer.to_block();
        files.put(PATH, &[block, block].concat());
        let before = files.bytes(PATH);
        let errors = [
            SealedRun::open(&files, Path::new(PATH), &identity(5)).err().unwrap(),
            ActiveRun::reopen(&files, Path::new(PATH), &identity(5), 0, MAX).err().unwrap(),
        ];
        assert!(errors.iter().all(|error| error.to_string().contains(name)), "{errors:?}");
        assert_eq!(files.bytes(PATH), before);
    }
}

#[test]
fn an_index_of_many_pages_finds_every_block() {
    let (files, path) = (MemoryFiles::default(), Path::new(PATH));
    let mut run = ActiveRun::create(&files, path, header(5), 1 << 30).unwrap();
    let mut seeded = Seeded(11);
    let mut model = Model::new();
    for _ in 0..40 {
        let wanted: Vec<BlockRange> = (0..250)
            .map(|_| seeded.below(DISK_BLOCKS / 2) * 2)
            .map(|at| BlockRange::new(at, at + 1))
            .collect();
        capture(&mut run, &mut model, &wanted, 4).unwrap();
    }
    let mut sealed = run.seal(&files, CLOSED).unwrap();
    assert!(sealed.trailer().unwrap().index_pages >= 3, "{:?}", sealed.trailer());
    assert_holds(&mut sealed, &model);
    let reads = files.reads();
    let (first, _) = model.iter().nth(model.len() / 2).unwrap();
    assert_eq!(sealed.lookup(BlockRange::new(*first, first + 1)).unwrap().len(), 1);
    assert_eq!(files.reads(), reads, "pages that were read are kept");
}

/// The same through the kernel, with direct I/O where the file system has it.
#[cfg(feature = "io")]
#[test]
fn runs_live_on_a_real_file_system() {
    use reprotect_engine::io::{OpenOptions, open};
    use reprotect_engine::store::files::Files;
    use reprotect_engine::store::files::fs::FsFiles;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let files = FsFiles::new(|path, writable| {
        open(path, &if writable { OpenOptions::writing() } else { OpenOptions::reading() })
    });
    let mut run = ActiveRun::create(&files, &path, header(5), MAX).unwrap();
    let mut model = Model::new();
    let mut seeded = Seeded(3);
    for flavour in 0..20 {
        let at = seeded.below(DISK_BLOCKS - 200);
        capture(&mut run, &mut model, &[BlockRange::new(at, at + seeded.below(200))], flavour).unwrap();
        run.flush().unwrap();
    }
    let certain = run.len_bytes();
    drop(run);
    let (mut run, holes) = ActiveRun::reopen(&files, &path, &identity(5), certain, MAX).unwrap();
    assert_eq!((holes, run.len_bytes()), (Vec::new(), certain));
    assert_holds(&mut run, &model);
    let mut sealed = run.seal(&files, CLOSED).unwrap();
    assert_holds(&mut sealed, &model);
    assert_eq!(sealed.verify().unwrap(), []);
    assert_eq!(files.facts(&path).unwrap().unwrap().size_bytes, sealed.len_bytes());
    assert!(sealed.len_bytes() < MAX / 2);
}
