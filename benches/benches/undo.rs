//! What does an undo run cost: appending scattered before-images, asking whether a block is captured, and memory?
//!
//! The bytes an index entry takes are printed, not timed.

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use reprotect_benches::{Seeded, Shape, data};
use reprotect_engine::format::undo::frame::UndoCodec;
use reprotect_engine::format::undo::index::IndexEntry;
use reprotect_engine::format::undo::{BlockRange, RunHeader, RunIdentity};
use reprotect_engine::io::{OpenOptions, open};
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::undo::{ActiveRun, Image, ImageData, RunIndex};
use reprotect_engine::units::{BLOCK_BYTES, BlockIndex, DiskId, Generation, LineageId, Timestamp};

const DISK_BLOCKS: u64 = 1 << 34;
/// Images of one append: an apply window of 16 MiB.
const WINDOW_BLOCKS: u64 = 4096;

fn header(undo_epoch: u64) -> RunHeader {
    let identity = RunIdentity {
        journal: [1; 16],
        disk: DiskId([2; 16]),
        lineage: LineageId([3; 16]),
        generation: Generation(1),
        undo_epoch,
        undo_epoch_last: undo_epoch,
    };
    RunHeader::new(identity, undo_epoch, DISK_BLOCKS * 8, Timestamp(0))
}

/// Windows of scattered single blocks into a file in the temporary folder; no flush, so it is packing and writing that
/// is measured, not the medium's cache.
fn append(criterion: &mut Criterion) {
    let files = FsFiles::new(|path, writable| {
        open(path, &if writable { OpenOptions::writing() } else { OpenOptions::reading() })
    });
    let path = std::env::temp_dir().join(format!("reprotect-bench-undo-{}", std::process::id()));
    let mut group = criterion.benchmark_group("append 4096 scattered blocks of 4 KiB");
    group.throughput(Throughput::Bytes(WINDOW_BLOCKS * BLOCK_BYTES));
    group.sample_size(20);
    for (name, shape) in [("noise", Shape::Noise), ("mixed", Shape::Mixed), ("text", Shape::Text)] {
        let bytes = data(shape, (WINDOW_BLOCKS * BLOCK_BYTES) as usize);
        let images: Vec<Image<'_>> = (1..)
            .zip(bytes.chunks_exact(BLOCK_BYTES as usize))
            .map(|(block, bytes)| Image { first: BlockIndex(block * 37), data: ImageData::Bytes(bytes) })
            .collect();
        group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    let _ = std::fs::remove_file(&path);
                    ActiveRun::create(&files, &path, header(1), 1 << 30)
                },
                |run| run.and_then(|mut run| run.append(black_box(&images)).map(|()| run.len_bytes())),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
    let _ = std::fs::remove_file(Path::new(&path));
}

/// An index of scattered single-block frames, filled in ascending windows as the applier does.
fn filled(entries: u64) -> RunIndex {
    let (mut index, mut seeded) = (RunIndex::new(), Seeded::new(7));
    while index.len() < entries {
        let mut window: Vec<u64> = (0..WINDOW_BLOCKS).map(|_| seeded.next_u64() % DISK_BLOCKS).collect();
        window.sort_unstable();
        window.dedup();
        for first_block in window {
            let offset = 8192 + index.len() * 4168;
            let entry =
                IndexEntry { first_block, offset, block_count: 1, frame_units: 521, codec: UndoCodec::Raw };
            if index.is_free(entry.blocks()) {
                index.insert(&entry);
            }
        }
    }
    index
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("is a block captured");
    group.sample_size(20);
    for millions in [1, 10] {
        let index = filled(millions * 1_000_000);
        let bytes = index.memory_bytes() as f64 / index.len() as f64;
        println!("{millions} million entries: {bytes:.1} bytes of memory each");
        let mut seeded = Seeded::new(99);
        group.bench_function(format!("{millions} million entries"), |b| {
            b.iter(|| {
                let block = seeded.next_u64() % DISK_BLOCKS;
                index.contains(black_box(BlockRange { start: block, end: block + 1 }))
            });
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("insert a window into the index");
    group.sample_size(10);
    group.throughput(Throughput::Elements(1_000_000));
    group.bench_function("until it has a million entries", |b| b.iter(|| filled(black_box(1_000_000))));
    group.finish();
}

criterion_group!(benches, append, lookup);
criterion_main!(benches);
