//! The model and the tools of these tests: images whose content follows from a seed, and the one check that all share.

use std::collections::BTreeMap;
use std::path::Path;

use reprotect_engine::format::undo::{BlockRange, RunHeader, RunIdentity};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::undo::{
    ActiveRun, Found, Image, ImageData, Place, SealedRun, UndoError,
};
use reprotect_engine::units::{BlockIndex, DiskId, Generation, LineageId, Timestamp};

pub(crate) const PATH: &str = "runs/epoch-5.undo";
pub(crate) const MAX: u64 = 64 << 20;
pub(crate) const DISK_BLOCKS: u64 = 1 << 16;
pub(crate) const CLOSED: Timestamp = Timestamp(900);

/// A small seeded generator.
#[derive(Clone, Debug)]
pub(crate) struct Seeded(pub(crate) u64);

impl Seeded {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

pub(crate) fn identity(epoch: u64) -> RunIdentity {
    RunIdentity {
        journal: [9; 16],
        disk: DiskId([1; 16]),
        lineage: LineageId([2; 16]),
        generation: Generation(3),
        undo_epoch: epoch,
        undo_epoch_last: epoch,
    }
}

pub(crate) fn header(epoch: u64) -> RunHeader {
    RunHeader::new(identity(epoch), 0x5A17_0000 + epoch, DISK_BLOCKS * 8, Timestamp(800 + epoch))
}

/// A block whose content follows from its number and `flavour`: zeros, text or noise.
pub(crate) fn image(block: u64, flavour: u64) -> Vec<u8> {
    let mut seeded = Seeded(block << 20 ^ flavour);
    match seeded.below(4) {
        0 => vec![0; 4096],
        1 => format!("block {block} of flavour {flavour}; ")
            .into_bytes()
            .into_iter()
            .cycle()
            .take(4096)
            .collect(),
        _ => (0..512).flat_map(|_| seeded.next().to_le_bytes()).collect(),
    }
}

/// First images of a run.
pub(crate) type Model = BTreeMap<u64, Vec<u8>>;

/// Appends runs of blocks of a flavour, leaving out what the run holds already; zeros partly as known zeros.
pub(crate) fn capture(
    run: &mut ActiveRun,
    model: &mut Model,
    wanted: &[BlockRange],
    flavour: u64,
) -> Result<(), UndoError> {
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    let mut parts: Vec<(u64, Option<Vec<u8>>, u64)> = Vec::new(); // first, bytes, blocks
    let mut at = 0;
    for range in wanted {
        let range = BlockRange::new(range.start.max(at).min(range.end), range.end);
        at = at.max(range.end);
        for missing in run.missing(range) {
            let bytes: Vec<u8> =
                (missing.start..missing.end).flat_map(|block| image(block, flavour)).collect();
            let known_zeros = bytes.iter().all(|byte| *byte == 0);
            parts.push((missing.start, (!known_zeros).then_some(bytes), missing.len()));
        }
    }
    let images: Vec<Image<'_>> = parts
        .iter()
        .map(|(first, bytes, count)| Image {
            first: BlockIndex(*first),
            data: bytes.as_ref().map_or(ImageData::Zeros(*count), |bytes| ImageData::Bytes(bytes)),
        })
        .collect();
    run.append(&images)?;
    for (first, _, count) in &parts {
        for block in *first..first + count {
            assert!(model.insert(block, image(block, flavour)).is_none());
        }
    }
    Ok(())
}

/// Either kind of run, as a reader sees it.
pub(crate) trait Readable {
    fn find(&mut self, range: BlockRange) -> Vec<Found>;
    fn get(&mut self, first: u64, out: &mut [u8]) -> Result<(), UndoError>;
}

impl Readable for ActiveRun {
    fn find(&mut self, range: BlockRange) -> Vec<Found> {
        self.lookup(range)
    }
    fn get(&mut self, first: u64, out: &mut [u8]) -> Result<(), UndoError> {
        self.read_blocks(BlockIndex(first), out)
    }
}

impl Readable for SealedRun {
    fn find(&mut self, range: BlockRange) -> Vec<Found> {
        self.lookup(range).unwrap()
    }
    fn get(&mut self, first: u64, out: &mut [u8]) -> Result<(), UndoError> {
        self.read(BlockIndex(first), out)
    }
}

/// Every block of the model is found and read back as it was; nothing else is found.
pub(crate) fn assert_holds(run: &mut impl Readable, model: &Model) {
    let (unreadable, extra) = check(run, model);
    assert_eq!(unreadable, Vec::<u64>::new(), "every image is readable");
    assert_eq!(extra, 0, "blocks that were never captured");
}

/// Every block of the model is found, and reads as it was or with an error that names it. Answers the blocks with an
/// error, and how many blocks were found that are not in the model.
pub(crate) fn check(run: &mut impl Readable, model: &Model) -> (Vec<u64>, u64) {
    let found = run.find(BlockRange::new(0, DISK_BLOCKS));
    let blocks: u64 = found.iter().map(|found| found.blocks.len()).sum();
    assert!(found.windows(2).all(|pair| pair[0].blocks.end <= pair[1].blocks.start), "ascending: {found:?}");
    let mut unreadable = Vec::new();
    let mut out = vec![0xEE; 4096];
    let mut known = 0;
    for (block, expected) in model {
        let at = found.partition_point(|found| found.blocks.end <= *block);
        let place = found.get(at).filter(|found| found.blocks.start <= *block).map(|found| found.place);
        let place = place.unwrap_or_else(|| panic!("block {block} is said not to have been captured"));
        known += 1;
        match run.get(*block, &mut out) {
            Ok(()) => {
                assert!(place != Place::Lost);
                assert!(out == *expected, "block {block} reads as something else");
            }
            Err(UndoError::Damaged { blocks, .. } | UndoError::Lost { blocks, .. }) => {
                assert!(blocks.start <= *block && *block < blocks.end, "the error names its block");
                unreadable.push(*block);
            }
            Err(error) => panic!("{error}"),
        }
    }
    (unreadable, blocks - known)
}

/// A small run with every kind of frame, in three groups, and its model.
pub(crate) fn small(files: &MemoryFiles, epoch: u64) -> (ActiveRun, Model) {
    let mut run = ActiveRun::create(files, Path::new(PATH), header(epoch), MAX).unwrap();
    let mut model = Model::new();
    capture(&mut run, &mut model, &[BlockRange::new(40, 42), BlockRange::new(100, 101)], 1).unwrap();
    let text = BlockRange::new(60, 64);
    capture(&mut run, &mut model, &[BlockRange::new(7, 9), text], 2).unwrap();
    let zeros = Image { first: BlockIndex(1000), data: ImageData::Zeros(20) };
    run.append(&[zeros]).unwrap();
    model.extend((1000..1020).map(|block| (block, vec![0; 4096])));
    run.flush().unwrap();
    (run, model)
}
