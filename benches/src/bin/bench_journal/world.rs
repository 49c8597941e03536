//! A journal in a folder with its disks, and the stream that is fed to it: records of 4 KiB that compress twofold.
//!
//! Invariant: the same seed gives the same stream; what stands on a target first compresses twofold, too. Units: blocks of 4 KiB, bytes. Called by the parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_benches::{Seeded, Shape, data};
use reprotect_engine::compress::{Compressor, Decompressor};
use reprotect_engine::format::batch::{BatchHeader, CHAIN_START, Stretch, encode_batch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, EpochCause};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io::BlockFile;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalSettings};
use reprotect_engine::units::{DiskId, Generation, LineageId, Sequence, Timestamp};

use super::counting::Counting;

pub(crate) const BLOCK: usize = 4096;
pub(crate) const NOW: Timestamp = Timestamp(1);
pub(crate) const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

/// Records of one batch.
pub(crate) const BATCH_RECORDS: usize = 64;

pub(crate) fn disk_id(disk: usize) -> DiskId {
    DiskId([disk as u8 + 1; 16])
}

pub(crate) fn open_or_create(files: &Counting, folder: &Path, segment_bytes: u64) -> Journal {
    let settings = JournalSettings { segment_bytes };
    let files: Arc<dyn Files> = Arc::new(files.clone());
    Journal::create(files, folder, settings, NOW).expect("a new journal")
}

pub(crate) fn retention(folder: &Path) -> PathBuf {
    let retention = folder.join("retention");
    std::fs::create_dir_all(&retention).expect("a folder for the journal");
    retention
}

pub(crate) fn add(journal: &mut Journal, disk: usize, blocks: u64) {
    let added = DiskAdded { disk: disk_id(disk), machine: [7; 16], size_sectors: blocks * 8, time: NOW };
    journal.add_disk(added, NOW).expect("a disk is added");
}

/// A disk with its target and its first undo epoch.
pub(crate) fn applier(
    files: &Counting,
    journal: &mut Journal,
    disk: usize,
    target: &Path,
) -> Applier<Box<dyn BlockFile>> {
    let target = files.open(target, true).expect("the target");
    let (mut applier, _) = Applier::open(journal, disk_id(disk), target, None).expect("an applier");
    applier.begin_epoch(journal, EpochCause::First, POSITION, None, NOW).expect("an undo epoch");
    applier
}

/// Bytes of which each 4 KiB compress twofold by themselves: noise, and lines of a log.
pub(crate) fn twofold(bytes: usize) -> Bytes {
    const NOISE: usize = 1280;
    let (noise, text) = (data(Shape::Noise, bytes), data(Shape::Text, bytes));
    let mut out = Vec::with_capacity(bytes);
    for (noise, text) in noise.chunks_exact(BLOCK).zip(text.chunks_exact(BLOCK)) {
        out.extend_from_slice(&noise[..NOISE]);
        out.extend_from_slice(&text[NOISE..]);
    }
    out.into()
}

/// A flat target, every byte of it written.
pub(crate) fn make_target(path: &Path, blocks: u64) {
    make_targets(&[path], blocks);
}

/// Flat targets, every byte of them written, which take turns on the medium: no place of it is better than another.
pub(crate) fn make_targets(paths: &[&Path], blocks: u64) {
    use std::io::Write as _;
    let content = twofold(16 << 20);
    let create = |path: &&Path| std::fs::File::create(path).expect("a target");
    let mut files: Vec<std::fs::File> = paths.iter().map(create).collect();
    let mut left = blocks * BLOCK as u64;
    while left > 0 {
        let len = left.min(content.len() as u64);
        for file in &mut files {
            file.write_all(&content[..len as usize]).expect("room for the target");
            file.sync_data().expect("the target is flushed");
        }
        left -= len;
    }
    for file in files {
        file.sync_all().expect("the target is flushed");
    }
}

/// Where the next write goes.
pub(crate) struct Places {
    seeded: Seeded,
    blocks: u64,
    /// Blocks of this window, and of this undo epoch.
    window: Vec<u64>,
    epoch: Vec<u64>,
    /// Share of writes, per mille, that repeat a block of the window, and of the rest one of the epoch.
    again: (u64, u64),
}

impl Places {
    pub(crate) fn new(blocks: u64, again: (u64, u64)) -> Self {
        Self { seeded: Seeded::new(0x0B5E_55ED), blocks, window: Vec::new(), epoch: Vec::new(), again }
    }

    pub(crate) fn next(&mut self) -> u64 {
        let chance = |seeded: &mut Seeded, per_mille: u64| (seeded.next_u64() >> 33) % 1000 < per_mille;
        let pick = |seeded: &mut Seeded, from: &[u64]| from[(seeded.next_u64() >> 33) as usize % from.len()];
        if !self.window.is_empty() && chance(&mut self.seeded, self.again.0) {
            return pick(&mut self.seeded, &self.window);
        }
        let block = if !self.epoch.is_empty() && chance(&mut self.seeded, self.again.1) {
            pick(&mut self.seeded, &self.epoch)
        } else {
            let block = (self.seeded.next_u64() >> 20) % self.blocks;
            self.epoch.push(block);
            block
        };
        self.window.push(block);
        block
    }

    pub(crate) fn next_window(&mut self) {
        self.window.clear();
    }

    pub(crate) fn next_epoch(&mut self) {
        self.window.clear();
        self.epoch.clear();
    }
}

/// Makes batches.
pub(crate) struct Batches {
    content: Bytes,
    at: usize,
    compressor: Option<Compressor>,
    sequence: u64,
    /// Bytes of the records, plain and stored.
    plain_bytes: u64,
    stored_bytes: u64,
}

impl Batches {
    pub(crate) fn new(compressed: bool) -> Self {
        let compressor = compressed.then(|| Compressor::new(1).expect("zstd"));
        let (plain_bytes, stored_bytes) = (0, 0);
        Self { content: twofold(64 << 20), at: 0, compressor, sequence: 1, plain_bytes, stored_bytes }
    }

    /// Stored bytes of the records so far per plain byte.
    pub(crate) fn ratio(&self) -> f64 {
        self.stored_bytes as f64 / self.plain_bytes as f64
    }

    /// The body of a batch of blocks at these places.
    pub(crate) fn batch(&mut self, disk: usize, places: impl Iterator<Item = u64>) -> Bytes {
        let mut records = Vec::with_capacity(BATCH_RECORDS);
        for place in places {
            self.at = (self.at + BLOCK) % (self.content.len() - BLOCK);
            self.plain_bytes += BLOCK as u64;
            let record = Record::data(place * 8, self.content.slice(self.at..self.at + BLOCK));
            let stored =
                self.compressor.as_mut().and_then(|zstd| zstd.compress(record.payload()).ok().flatten());
            let record = stored.map_or_else(|| record.clone(), |stored| record.recoded(stored.into()));
            self.stored_bytes += record.payload().len() as u64;
            records.push(record);
        }
        let header = BatchHeader {
            disk: disk_id(disk),
            lineage: POSITION.lineage,
            generation: POSITION.generation,
            first_sequence: Sequence(self.sequence),
            chain: CHAIN_START,
            source_time: NOW,
            record_count: records.len() as u32,
            stretch: Stretch::Ordered,
        };
        self.sequence += records.len() as u64;
        encode_batch(&header, &records).body()
    }
}

/// Makes windows of what is in the log, as the disk's thread does when the batches arrive.
pub(crate) fn window(decompressor: &mut Decompressor, bodies: Vec<Bytes>) -> Window {
    let mut window = Window::default();
    for body in bodies {
        let writes = entry_writes(EntryKind::Batch, body, decompressor).expect("a sound batch");
        writes.into_iter().for_each(|write| window.put(write));
    }
    window
}

/// The time below which `per_cent` of the samples lie, in milliseconds.
pub(crate) fn percentile_ms(samples: &mut [Duration], per_cent: usize) -> f64 {
    samples.sort_unstable();
    let at = (samples.len() * per_cent / 100).min(samples.len() - 1);
    samples[at].as_secs_f64() * 1e3
}

pub(crate) fn mb_per_s(bytes: u64, begun: Instant) -> f64 {
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
}

/// Resident memory of this process in MiB.
pub(crate) fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
