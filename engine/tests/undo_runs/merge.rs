//! Thinning: the older image wins, frames are copied as they are, damage becomes loss and never a later image.

use std::path::Path;

use proptest::prelude::*;
use reprotect_engine::format::undo::{BlockRange, RunHeader};
use reprotect_engine::io::WriteAt;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::undo::{ActiveRun, Place, SealedRun, UndoError, merge, merged_header};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::model::{
    CLOSED, DISK_BLOCKS, MAX, Model, Readable, Seeded, assert_holds, capture, check, header, identity, image,
};

const OLDER: &str = "older";
const NEWER: &str = "newer";
const MERGED: &str = "merged";

fn sealed(files: &MemoryFiles, path: &str, epoch: u64, wanted: &[Vec<BlockRange>]) -> (SealedRun, Model) {
    let mut run = ActiveRun::create(files, Path::new(path), header(epoch), MAX).unwrap();
    let mut model = Model::new();
    for (flavour, wanted) in (0..).zip(wanted) {
        capture(&mut run, &mut model, wanted, epoch * 100 + flavour).unwrap();
    }
    (run.seal(files, Timestamp(CLOSED.0 + epoch)).unwrap(), model)
}

fn merged(files: &MemoryFiles, older: &mut SealedRun, newer: &mut SealedRun) -> Result<SealedRun, UndoError> {
    let header = merged_header(older.header(), newer.header(), 0xABCD);
    merge(older, newer, files, Path::new(MERGED), header)
}

/// What the merge of two models is.
fn union(older: &Model, newer: &Model) -> Model {
    let mut union = newer.clone();
    union.extend(older.iter().map(|(block, image)| (*block, image.clone())));
    union
}

fn ranges() -> impl Strategy<Value = Vec<Vec<BlockRange>>> {
    let range = (0..300_u64, 1..40_u64).prop_map(|(at, len)| BlockRange::new(at, at + len));
    proptest::collection::vec(proptest::collection::vec(range, 1..6), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn the_older_image_wins(older in ranges(), newer in ranges(), third in ranges()) {
        let files = MemoryFiles::default();
        let (mut older, first) = sealed(&files, OLDER, 5, &older);
        let (mut newer, second) = sealed(&files, NEWER, 6, &newer);
        let before = (files.bytes(OLDER), files.bytes(NEWER));
        let mut both = merged(&files, &mut older, &mut newer).unwrap();
        let model = union(&first, &second);
        assert_holds(&mut both, &model);
        prop_assert_eq!(both.verify().unwrap(), vec![]);
        prop_assert_eq!(before, (files.bytes(OLDER), files.bytes(NEWER)));
        let (trailer, identity) = (*both.trailer().unwrap(), both.header().identity());
        prop_assert_eq!((identity.undo_epoch, identity.undo_epoch_last), (5, 6));
        prop_assert_eq!(trailer.blocks, model.len() as u64);
        prop_assert_eq!((trailer.opened, trailer.closed), (header(5).created, Timestamp(CLOSED.0 + 6)));
        prop_assert_eq!(both.len_bytes(), files.bytes(MERGED).len() as u64);
        // And once more, as thinning does.
        let (mut next, third) = sealed(&files, "next", 7, &third);
        let header = merged_header(both.header(), next.header(), 0xEF01);
        let mut all = merge(&mut both, &mut next, &files, Path::new("all"), header).unwrap();
        assert_holds(&mut all, &union(&model, &third));
    }

    /// Garbage in either input: what is readable is right, and what an older run lost never shows a newer image.
    #[test]
    fn damage_is_carried_over_as_loss(
        older in ranges(), newer in ranges(), hits in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..4),
    ) {
        let files = MemoryFiles::default();
        let (older, first) = sealed(&files, OLDER, 5, &older);
        let (newer, second) = sealed(&files, NEWER, 6, &newer);
        drop((older, newer));
        for (in_older, at) in hits {
            let path = if in_older { OLDER } else { NEWER };
            let len = files.bytes(path).len() - 8192;
            let offset = 8192 + at.index(len) as u64;
            let mut file = files.open(Path::new(path), true).unwrap();
            let data = &[0x5A; 40][..40.min((8192 + len as u64 - offset) as usize)];
            file.write(&[WriteAt { offset, data }]).unwrap();
        }
        let mut older = SealedRun::open(&files, Path::new(OLDER), &identity(5)).unwrap();
        let mut newer = SealedRun::open(&files, Path::new(NEWER), &identity(6)).unwrap();
        let (older_bad, older_extra) = check(&mut older, &first);
        let (newer_bad, newer_extra) = check(&mut newer, &second);
        let mut both = merged(&files, &mut older, &mut newer).unwrap();
        let (bad, extra) = check(&mut both, &union(&first, &second));
        prop_assert!(older_bad.iter().all(|block| bad.contains(block)), "lost in the older run is lost");
        let hidden = older_extra > 0 || newer_extra > 0;
        prop_assert!(hidden || bad.iter().all(|block| older_bad.contains(block) || newer_bad.contains(block)));
        prop_assert!(hidden || extra == 0);
        prop_assert!(bad.iter().all(|block| both.find(BlockRange::new(*block, block + 1))[0].place == Place::Lost));
        prop_assert_eq!(both.verify().unwrap(), vec![], "the result itself is sound");
    }
}

#[test]
fn frames_that_are_taken_whole_are_copied_as_they_are_stored() {
    let files = MemoryFiles::default();
    let wanted = |at| vec![vec![BlockRange::new(at, at + 16)]];
    let (mut older, first) = sealed(&files, OLDER, 5, &wanted(160));
    let (mut newer, second) = sealed(&files, NEWER, 6, &wanted(320));
    let payload = |run: &mut SealedRun, path: &str, block| {
        let places = run.find(BlockRange::new(block, block + 16)).into_iter();
        let stored = places.filter_map(|found| match found.place {
            Place::Stored(offset) => Some((offset.0 as usize, found.blocks.len() as usize)),
            _ => None,
        });
        let bytes = files.bytes(path);
        let payload = |(at, blocks): (usize, usize)| {
            let len = u32::from_le_bytes(bytes[at + 44..at + 48].try_into().unwrap()) as usize;
            bytes[at + 64 + 4 * blocks..at + 64 + 4 * blocks + len].to_vec()
        };
        stored.map(payload).collect::<Vec<_>>()
    };
    let expected = [payload(&mut older, OLDER, 160), payload(&mut newer, NEWER, 320)];
    let mut both = merged(&files, &mut older, &mut newer).unwrap();
    assert_eq!([payload(&mut both, MERGED, 160), payload(&mut both, MERGED, 320)], expected);
    assert!(expected.iter().all(|payloads| !payloads.is_empty()));
    assert_holds(&mut both, &union(&first, &second));
}

/// What was recorded as lost while the older run was written stays lost where the newer run has an image.
#[test]
fn a_lost_older_image_wins_like_any_other() {
    let files = MemoryFiles::default();
    let mut run = ActiveRun::create(&files, Path::new(OLDER), header(5), MAX).unwrap();
    let mut first = Model::new();
    let wanted = [BlockRange::new(10, 11), BlockRange::new(20, 21), BlockRange::new(30, 31)];
    let has_data =
        |flavour: &u64| wanted.iter().all(|at| image(at.start, *flavour).iter().any(|byte| *byte != 0));
    let flavour = (0..).find(has_data).unwrap();
    capture(&mut run, &mut first, &wanted, flavour).unwrap();
    run.flush().unwrap();
    let (certain, place) = (run.len_bytes(), run.find(wanted[1])[0].place);
    drop(run);
    // The frame of block 20 is damaged in its head: all that is known is that it lay between its neighbours.
    let Place::Stored(offset) = place else { panic!("{place:?}") };
    let mut file = files.open(Path::new(OLDER), true).unwrap();
    file.write(&[WriteAt { offset: offset.0, data: b"damage" }]).unwrap();
    drop(file);
    let (run, holes) = ActiveRun::reopen(&files, Path::new(OLDER), &identity(5), certain, MAX).unwrap();
    assert_eq!((holes.len(), &holes[0].lost[..]), (1, &[BlockRange::new(11, 30)][..]));
    let mut older = run.seal(&files, CLOSED).unwrap();
    assert_eq!(older.damage(), [], "it is recorded, and no damage any more");
    let (mut newer, second) = sealed(&files, NEWER, 6, &[vec![BlockRange::new(15, 40)]]);
    let mut both = merged(&files, &mut older, &mut newer).unwrap();
    let places: Vec<Place> =
        (11..30).map(|block| both.find(BlockRange::new(block, block + 1))[0].place).collect();
    assert!(places.iter().all(|place| *place == Place::Lost), "{places:?}");
    let (bad, extra) = check(&mut both, &union(&first, &second));
    assert_eq!(bad, (15..30).collect::<Vec<u64>>());
    assert_eq!(extra, 4, "blocks 11 to 14 may have been in the lost frame");
    assert_eq!(both.trailer().unwrap().lost_blocks, 19);
}

#[test]
fn an_index_of_many_pages_is_merged_page_by_page() {
    let files = MemoryFiles::default();
    let mut seeded = Seeded(8);
    let mut wanted = |rounds: usize| -> Vec<Vec<BlockRange>> {
        (0..rounds)
            .map(|_| {
                (0..220)
                    .map(|_| seeded.below(DISK_BLOCKS / 2) * 2)
                    .map(|at| BlockRange::new(at, at + 1))
                    .collect()
            })
            .collect()
    };
    let (older_wanted, newer_wanted) = (wanted(20), wanted(20));
    let (mut older, first) = sealed(&files, OLDER, 5, &older_wanted);
    let (mut newer, second) = sealed(&files, NEWER, 6, &newer_wanted);
    let mut both = merged(&files, &mut older, &mut newer).unwrap();
    assert!(both.trailer().unwrap().index_pages >= 3);
    assert_holds(&mut both, &union(&first, &second));
    assert_eq!(both.verify().unwrap(), []);
    // The frames of a merged run are in address order, so it needs no index to be read.
    let bytes = files.bytes(MERGED);
    let mut file = files.open(Path::new(MERGED), true).unwrap();
    file.write(&[WriteAt { offset: bytes.len() as u64 - 4096, data: &[0; 4096] }]).unwrap();
    drop(file);
    let mut walked = SealedRun::open(&files, Path::new(MERGED), &both.header().identity()).unwrap();
    assert!(walked.trailer().is_none());
    assert_holds(&mut walked, &union(&first, &second));
}

#[test]
fn runs_that_do_not_belong_together_are_refused_and_leave_no_file() {
    let files = MemoryFiles::default();
    let wanted = [vec![BlockRange::new(1, 9)]];
    let (mut older, _) = sealed(&files, OLDER, 5, &wanted);
    let (mut newer, _) = sealed(&files, NEWER, 6, &wanted);
    let right = merged_header(older.header(), newer.header(), 1);
    let refused = |older: &mut SealedRun, newer: &mut SealedRun, header: RunHeader| {
        let error = merge(older, newer, &files, Path::new(MERGED), header).unwrap_err();
        assert!(files.facts(Path::new(MERGED)).unwrap().is_none());
        match error {
            UndoError::NotAdjacent { field, .. } => field,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(&mut newer, &mut older, right), "order of undo epochs");
    assert_eq!(refused(&mut older, &mut newer, RunHeader { disk: DiskId([9; 16]), ..right }), "new header");
    assert_eq!(refused(&mut older, &mut newer, RunHeader { undo_epoch_last: 9, ..right }), "new header");
    assert_eq!(refused(&mut older, &mut newer, RunHeader { salt: header(5).salt, ..right }), "new salt");
    files.set_room(Some(20_000));
    assert!(merge(&mut older, &mut newer, &files, Path::new(MERGED), right).unwrap_err().is_full());
    assert!(files.facts(Path::new(MERGED)).unwrap().is_none(), "a merge that fails leaves nothing");
    files.set_room(None);
    assert!(merge(&mut older, &mut newer, &files, Path::new(MERGED), right).is_ok());
}
