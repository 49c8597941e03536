//! What does a compression level cost and give, for delta records (64 KiB) and bulk records (1 MiB)?

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use reprotect_benches::{Shape, data};
use reprotect_engine::compress::{Compressor, Decompressor};

const LEVELS: [i32; 4] = [-5, -1, 1, 3];

fn levels(criterion: &mut Criterion) {
    for (name, bytes) in [("64 KiB", 64 << 10), ("1 MiB", 1 << 20)] {
        let mut group = criterion.benchmark_group(format!("compress {name}"));
        group.throughput(Throughput::Bytes(bytes as u64));
        for shape in [Shape::Text, Shape::Mixed, Shape::Noise] {
            let plain = data(shape, bytes);
            for level in LEVELS {
                let Ok(mut compressor) = Compressor::new(level) else { continue };
                let stored = compressor.compress(&plain).ok().flatten();
                let ratio = stored.as_ref().map_or(1.0, |stored| bytes as f64 / stored.len() as f64);
                let id = BenchmarkId::new(format!("{shape:?}, ratio {ratio:.2}"), level);
                group.bench_function(id, |b| b.iter(|| compressor.compress(black_box(&plain))));
            }
        }
        let plain = data(Shape::Text, bytes);
        if let (Ok(mut compressor), Ok(mut decompressor)) = (Compressor::new(-1), Decompressor::new())
            && let Ok(Some(stored)) = compressor.compress(&plain)
        {
            let mut out = vec![0; bytes];
            group.bench_function("decompress Text", |b| {
                b.iter(|| decompressor.decompress_into(black_box(&stored), &mut out));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, levels);
criterion_main!(benches);
