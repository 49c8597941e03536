//! How fast are the checks that every byte passes: zero detection, fragment CRCs, unit hashes?

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reprotect_benches::{Shape, data};
use reprotect_engine::checksum::{crc32, fragments, is_zero, unit_hash};

const MIB: usize = 1 << 20;

fn checks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(MIB as u64));
    let (zeros, mixed) = (data(Shape::Zeros, MIB), data(Shape::Mixed, MIB));
    group.bench_function("zero detection, all zeros", |b| b.iter(|| is_zero(black_box(&zeros))));
    group.bench_function("zero detection, data", |b| b.iter(|| is_zero(black_box(&mixed))));
    group.bench_function("CRC-32 per 4 KiB", |b| {
        b.iter(|| fragments(0, black_box(&mixed)).map(crc32).fold(0, |all, crc| all ^ crc));
    });
    group.bench_function("hash per 64 KiB", |b| {
        b.iter(|| black_box(&mixed).chunks(64 << 10).map(unit_hash).fold(0, |all, hash| all ^ hash.0[0]));
    });
    group.bench_function("hash per 4 KiB", |b| {
        b.iter(|| black_box(&mixed).chunks(4 << 10).map(unit_hash).fold(0, |all, hash| all ^ hash.0[0]));
    });
    group.finish();
}

criterion_group!(benches, checks);
criterion_main!(benches);
