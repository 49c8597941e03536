//! What a compare is told of a target that is written meanwhile: chunks that are kept between two questions, and those that
//! are read again, are what the target holds.

use bytes::Bytes;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::proto::compare::{Computed, Question, unit_hashes};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::store::target::{
    CreateOptions, Expectation, TargetKind, TargetSpec, create_target, open_target,
};
use reprotect_engine::units::{LineageId, PeerId, SectorRange};

use super::*;
use crate::guard::Guard;
use crate::receipts::Receipts;
use crate::registry::fs_opener;

const DISK: DiskId = DiskId([1; 16]);
/// Two units and a short one.
const SECTORS: u64 = 300;

fn writer(dir: &std::path::Path) -> Writer {
    let spec = TargetSpec { path: dir.join("web.vmdk"), kind: TargetKind::MonolithicFlat };
    let (none, options) = (std::collections::BTreeSet::new(), CreateOptions::default());
    create_target(&fs_opener(), &spec, SECTORS * SECTOR_BYTES, &none, &options).unwrap().close().unwrap();
    let expect = Expectation { writable: true, ..Expectation::default() };
    let target = open_target(&fs_opener(), &spec, &expect).unwrap();
    let guard = Guard::new(&*fs_opener(), &spec.path, spec.kind);
    let state =
        TargetDisk::new_state(DISK, PeerId([2; 16]), [3; 16], SECTORS, LineageId([4; 16]), PassMode::Compare);
    let status = Arc::new(DiskStatus::new(&state));
    let store = DiskStore::direct(target, guard, dir.join("state"));
    let core = TargetDisk::new(state, FlowLimits::default());
    Writer::new(core, store, status, Arc::default(), None, Receipts::open(dir).keeper(DISK))
}

#[test]
fn an_answer_is_what_the_target_holds_whatever_was_kept_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    let (_sender, inputs) = sync_mpsc::sync_channel(1);
    let mut content: Vec<u8> =
        (0..SECTORS * SECTOR_BYTES).map(|at| (at / 512 % 251 + at % 7) as u8 | 1).collect();
    let put = |writer: &mut Writer, record: Record| {
        let keep = vec![record.range()];
        assert!(writer.write(&[Piece { record, keep }], &sync_mpsc::sync_channel(1).1));
    };
    put(&mut writer, Record::data(0, Bytes::from(content.clone())));
    let range = SectorRange::new(0, SECTORS);
    let request =
        CompareRequestHead { disk: DISK, generation: Generation(1), request: 1, range, unit_count: 0 };
    let refine = |content: &[u8], units: &[u16]| match Question::Crcs(units.to_vec()).answer(content) {
        Computed::Crcs(units) => units,
        Computed::Confirmed(_) => panic!("another answer"),
    };
    let first = writer.hash(&request, &[], &inputs).unwrap();
    assert_eq!(first.hashes, unit_hashes(&content));
    // Kept as it is: the whole unit is equal.
    let asked = refine(&content, &[0, 2]);
    let kept = writer.hash(&request, &asked, &inputs).unwrap();
    assert_eq!((kept.masks.as_slice(), &kept), (&[0xffff, 0b11_1111_u16][..], &answer(&asked, &content)));
    // Kept, and written since.
    writer.hash(&request, &[], &inputs).unwrap();
    content[136 * 512..138 * 512].fill(0xdd);
    put(&mut writer, Record::data(136, Bytes::copy_from_slice(&content[136 * 512..138 * 512])));
    let asked = refine(&content, &[1]);
    assert_eq!(writer.hash(&request, &asked, &inputs), Some(answer(&asked, &content)));
    assert_eq!(answer(&asked, &content).masks, [0xffff]);
    // A hole in the middle of what is read again, where the buffer holds what was there before.
    content[65_536..131_072].fill(0);
    put(&mut writer, Record::zeros(SectorRange::new(128, 256)));
    for units in [&[1_u16][..], &[0, 1, 2], &[0, 2]] {
        let asked = refine(&content, units);
        let answered = writer.hash(&request, &asked, &inputs).unwrap();
        assert_eq!(answered, answer(&asked, &content), "{units:?}");
        assert!(answered.masks.iter().all(|mask| *mask == 0xffff || *mask == 0b11_1111));
    }
}
