//! What does a 4 MiB batch cost on its way, besides compression and the network: cutting with CRCs, encoding,
//! decoding, opening?

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reprotect_benches::{Shape, data};
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{BulkHeader, decode_bulk, encode_bulk};
use reprotect_engine::limits::{BULK_RECORD_BYTES_MAX, CHUNK_BYTES};
use reprotect_engine::proto::batch::cut_records;
use reprotect_engine::units::{DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence};

fn batches(criterion: &mut Criterion) {
    let chunk = SectorRange::new(0, CHUNK_BYTES / SECTOR_BYTES);
    let plain = data(Shape::Mixed, CHUNK_BYTES as usize);
    let records = cut_records(0, &plain, &[chunk], BULK_RECORD_BYTES_MAX);
    let header = BulkHeader {
        disk: DiskId([1; 16]),
        lineage: LineageId([2; 16]),
        generation: Generation(1),
        pass: 1,
        as_of: Sequence::ZERO,
        cover: chunk,
        record_count: records.len() as u32,
    };
    let body = encode_bulk(&header, &records).body();
    let mut group = criterion.benchmark_group("bulk batch of 4 MiB");
    group.throughput(Throughput::Bytes(CHUNK_BYTES));
    group.bench_function("cut, with zero detection and CRCs", |b| {
        b.iter(|| cut_records(0, black_box(&plain), &[chunk], BULK_RECORD_BYTES_MAX));
    });
    group.bench_function("encode, payload shared", |b| b.iter(|| encode_bulk(&header, black_box(&records))));
    group.bench_function("decode, payload shared", |b| b.iter(|| decode_bulk(black_box(body.clone()))));
    if let Ok(mut decompressor) = Decompressor::new() {
        let mut out = BytesMut::zeroed(BULK_RECORD_BYTES_MAX as usize);
        group.bench_function("open, raw, every CRC checked", |b| {
            b.iter(|| {
                records.iter().all(|record| record.open_into(&mut decompressor, black_box(&mut out)).is_ok())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, batches);
criterion_main!(benches);
