//! Tests of the manifest's edits: they read back, and what does not is known.

use super::*;

#[test]
fn an_edit_that_no_start_could_read_is_known_before_it_is_written() {
    let cause = Text::new("x");
    let part = StretchDegraded {
        disk: DiskId([9; 16]),
        lineage: LineageId([1; 16]),
        from: Sequence::ZERO,
        to: Sequence::LAST,
        time: Timestamp(1),
        cause,
    };
    assert_eq!(Edit::StretchDegraded(part).check_readable(), Ok(()));
    let beyond = StretchDegraded { to: Sequence(u64::MAX), ..part };
    assert!(Edit::StretchDegraded(beyond).check_readable().is_err());
}

#[test]
fn an_edit_reads_back_and_every_flipped_bit_of_it_is_noticed() {
    let edit = Edit::EpochsExpired(EpochsExpired { disk: DiskId([9; 16]), through: 12 });
    let bytes = edit.encode(3, 4, 3, 5);
    assert_eq!(bytes.len() as u64, BLOCK_BYTES);
    let read = |bytes: &[u8]| {
        let head = EditHead::open(bytes)?;
        let body = bytes.get(EditHead::BYTES..EditHead::BYTES + head.body_bytes as usize).unwrap_or_default();
        Edit::decode(&head, body).map(|edit| (head.index, edit))
    };
    assert_eq!(read(&bytes).unwrap(), (4, edit));
    for bit in 0..(EditHead::BYTES + EpochsExpired::BYTES) * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn every_flipped_bit_of_a_superblock_is_noticed() {
    let superblock = Superblock {
        magic: SUPERBLOCK_MAGIC,
        crc: 0,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        journal: [1; 16],
        generation: 2,
        previous: 3,
        clean: true,
        manifest: 4,
        durable_group: 5,
        time: Timestamp(6),
        manifest_edits: 7,
    };
    let block = superblock.to_block();
    assert_eq!(Superblock::open(&block).unwrap(), superblock.sealed());
    for bit in 0..Superblock::BYTES * 8 {
        let mut block = block.clone();
        block[bit / 8] ^= 1 << (bit % 8);
        assert!(Superblock::open(&block).is_err(), "bit {bit}");
    }
}
