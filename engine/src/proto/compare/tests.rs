//! Whole compares between two pieces of memory: whatever the target holds, it ends as the source, blocks with equal CRCs
//! included. Units: sectors, bytes.

use proptest::prelude::*;

use super::*;
use crate::format::message::PassMode;
use crate::proto::pass::{Pass, PassAction, Sink};
use crate::range_set::RangeSet;

/// Changes data to others with the same CRC-32: a multiple of its polynomial is added.
fn collide(data: &mut [u8]) {
    let polynomial = (u64::from(0xedb8_8320_u32) << 1 | 1).to_le_bytes();
    data.iter_mut().zip(polynomial).for_each(|(byte, change)| *byte ^= change);
}

fn noise(sectors: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    (0..sectors * 512).map(|_| next()).collect()
}

/// Walks over a disk at memory's speed; answers what was sent. `confirm` computes what the agent confirms.
fn walk(source: &[u8], target: &mut [u8], confirm: impl Fn(&Question, &[u8]) -> Computed) -> RangeSet {
    let disk = SectorRange::new(0, source.len() as u64 / 512);
    let bytes =
        |range: SectorRange| range.byte_start() as usize..(range.byte_start() + range.bytes()) as usize;
    let mut pass =
        Pass::new(1, PassMode::Compare, Sink::Delta, disk, RangeSet::new()).with_chunk_bytes(128 << 10);
    let mut sent = RangeSet::new();
    while let Some(action) = pass.poll_action() {
        match action {
            PassAction::Read { chunk, .. } => {
                pass.handle_read(chunk, Some(unit_hashes(&source[bytes(chunk)]))).unwrap();
            }
            PassAction::Ask { chunk, units } => {
                // As a target does that reads only what is wanted: the rest of its buffer is of something else.
                let mut buffer = vec![0x99; chunk.bytes() as usize];
                for run in wanted(chunk, &units) {
                    let from = (run.byte_start() - chunk.byte_start()) as usize;
                    buffer[from..from + run.bytes() as usize].copy_from_slice(&target[bytes(run)]);
                }
                pass.handle_remote(chunk.start, answer(&units, &buffer)).unwrap();
            }
            PassAction::Compute { chunk, question } => {
                pass.handle_computed(chunk, confirm(&question, &source[bytes(chunk)])).unwrap();
            }
            PassAction::Send { chunk, pieces } => {
                for piece in pieces {
                    target[bytes(piece)].copy_from_slice(&source[bytes(piece)]);
                    sent.insert(piece);
                }
                pass.handle_sent(chunk.start);
            }
        }
    }
    assert!(pass.take_end());
    sent
}

#[test]
fn a_compare_finds_a_block_whose_crc_is_the_same() {
    const SECTORS: usize = 3 * 128 + 40; // the last unit and its last block are short
    let source = noise(SECTORS);
    let mut target = source.clone();
    // An honest difference, and a colliding block beside it in the same unit; then one all alone in the short unit.
    target[10 * 512] ^= 1;
    for block in [3, 51] {
        let before = crc32(&target[block * 4096..(block + 1) * 4096]);
        collide(&mut target[block * 4096 + 700..]);
        assert_eq!(crc32(&target[block * 4096..(block + 1) * 4096]), before);
    }
    let spoilt = target.clone();
    let sent = walk(&source, &mut target, Question::answer);
    assert!(target == source);
    let units = [SectorRange::new(0, 128), SectorRange::new(384, 424)];
    assert_eq!(sent, units.into_iter().collect(), "what is not confirmed is sent whole, and nothing else");
    // And if CRCs were believed? Then they would stay: this test can fail.
    let mut believed = spoilt;
    let believe = |question: &Question, data: &[u8]| {
        let Question::Confirm(masks) = question else { return question.answer(data) };
        let mut theirs = data.to_vec();
        masks.iter().for_each(|unit| {
            (0..16).filter(|index| unit.mask & (1 << index) != 0).for_each(|index| {
                if [3, 51 - 32].contains(&(usize::from(unit.unit) * 16 + index)) {
                    collide(&mut theirs[(usize::from(unit.unit) * 16 + index) * 4096 + 700..]);
                }
            });
        });
        question.answer(&theirs)
    };
    walk(&source, &mut believed, believe);
    assert!(believed != source);
}

#[test]
fn what_an_answer_needs_is_the_units_and_nothing_between() {
    let range = SectorRange::new(1000, 1000 + 500);
    let unit = |unit| RefineUnit { unit, crcs: [0; 16] };
    assert_eq!(wanted(range, &[]), [range]);
    let runs = [SectorRange::new(1000, 1256), SectorRange::new(1384, 1500)];
    assert_eq!(wanted(range, &[unit(0), unit(1), unit(3), unit(4), unit(u16::MAX)]), runs);
    assert_eq!(wanted(range, &[unit(7)]), []);
    let answered = answer(&[unit(7), unit(u16::MAX)], &noise(500));
    assert_eq!((answered.masks, answered.hashes.len()), (vec![0, 0], 1));
}

#[test]
fn a_confirmation_binds_bytes_and_places() {
    let data = noise(300);
    let mask = |unit, mask| vec![UnitMask { unit, mask }];
    let hash = confirm_hash(&data, &mask(1, 0b110));
    assert_eq!(hash, confirm_hash(&data, &mask(1, 0b110)));
    let mut other = data.clone();
    other[65536 + 4096] ^= 1;
    assert!(hash != confirm_hash(&other, &mask(1, 0b110)));
    let same = vec![5; 300 * 512];
    assert!(confirm_hash(&same, &mask(1, 0b110)) != confirm_hash(&same, &mask(1, 0b011)));
    assert!(confirm_hash(&same, &mask(1, 0b110)) != confirm_hash(&same, &mask(0, 0b110)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Zeros, flips and collisions anywhere on either side: the target ends as the source, and where nothing collides only
    /// blocks travel that differ, or units that are zeros on one side.
    #[test]
    fn every_compare_ends_equal(
        sectors in 1..1200_usize,
        changes in proptest::collection::vec((0..1200_usize, 1..40_usize, 0..4_u8), 0..8),
    ) {
        let (mut source, mut target) = (noise(sectors), noise(sectors));
        let mut collided = false;
        for (at, length, kind) in changes {
            let (at, end) = ((at % sectors) * 512, ((at % sectors + length).min(sectors)) * 512);
            match kind {
                0 => source[at..end].fill(0),
                1 => target[at..end].fill(0),
                2 => target[at] ^= 0x40,
                _ => {
                    collide(&mut target[at..end]);
                    collided = true;
                }
            }
        }
        let blocks = || (0..sectors.div_ceil(8)).map(|block| block * 4096..((block + 1) * 4096).min(sectors * 512));
        let unit = |at: usize| at / 65536 * 65536..((at / 65536 + 1) * 65536).min(sectors * 512);
        let is_zero = |data: &[u8]| data.iter().all(|byte| *byte == 0);
        let due: Vec<_> = blocks()
            .filter(|block| source[block.clone()] != target[block.clone()]
                || source[unit(block.start)] != target[unit(block.start)]
                    && (is_zero(&source[unit(block.start)]) || is_zero(&target[unit(block.start)])))
            .map(|block| SectorRange::new(block.start as u64 / 512, block.end as u64 / 512))
            .collect();
        let sent = walk(&source, &mut target, Question::answer);
        prop_assert!(target == source);
        if !collided {
            prop_assert_eq!(sent, due.into_iter().collect());
        }
    }
}
