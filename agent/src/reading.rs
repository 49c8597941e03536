//! What a disk's reader tells, and what of a disk cannot be read: the rest goes on, and everybody is told what is missing.
//!
//! Invariants: what cannot be read is noted, and stored, before its chunk is handed on without it; it is forgotten when its
//! content is handed on; from one to the other, marks of the disk say that it is not whole. A disk of which nothing can be
//! read is paused instead. Part of `machine`.

use std::collections::BTreeMap;
use std::time::Instant;

use reprotect_engine::checksum::UnitHash;
use reprotect_engine::format::extent::RecordKind;
use reprotect_engine::proto::pass::{Sink, unit_count};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, SectorRange, Sequence};

use crate::capturing::Batch;
use crate::faults::Failure;
use crate::machine::{Machine, paused_text};
use crate::protected::Kept;
use crate::reader::{ChunkRead, FromDisk, ReadJob};
use crate::workers::{Job, JobKey};

impl Machine {
    /// A walk wants a chunk. In a scan round, what could not be read lately is left alone for a while.
    pub(crate) fn want_chunk(&mut self, disk: DiskId, mut job: ReadJob, sink: Sink, as_of: Sequence) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        let is_scan = job.hash && sink == Sink::Delta;
        let resting = if is_scan { state.unread.resting(job.chunk) } else { Vec::new() };
        job.in_parts = state.unread.touches(job.chunk);
        if resting.is_empty() {
            return state.want(job, as_of);
        }
        self.core.handle_unread(disk, job.epoch, job.chunk, &resting);
        job.pieces = resting.into_iter().collect::<RangeSet>().missing(job.chunk);
        if !job.pieces.is_empty() {
            return state.want(job, as_of);
        }
        let time = reprotect_engine::net::wall_clock();
        let kept = Kept { epoch: job.epoch, data: bytes::Bytes::new(), time, as_of };
        state.kept.insert(job.chunk.start, kept);
        let nothing = vec![UnitHash::ZEROS; unit_count(job.chunk)];
        self.answer_read(disk, job.epoch, job.chunk, Some(nothing));
    }

    /// News from a disk's reader.
    pub(crate) fn handle_from_disk(&mut self, disk: DiskId, news: FromDisk) {
        match news {
            FromDisk::Read { job, data: Ok(read) } => self.handle_chunk(disk, &job, read),
            FromDisk::Read { job, data: Err(reason) } => self.handle_read_failed(disk, job, &reason),
            FromDisk::Resized(bytes) => self.handle_resized(disk, bytes),
        }
    }

    fn handle_chunk(&mut self, disk: DiskId, job: &ReadJob, read: ChunkRead) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        let Some(as_of) = state.take_wanted(job) else { return }; // of a walk that is over
        if let Some(waiting) = state.faults.succeeded(job) {
            tracing::info!(%disk, "readable again");
            state.problem = None;
            waiting.into_iter().for_each(|job| state.read(job));
        }
        let ChunkRead { data, time, unread } = read;
        state.unread.was_read(job.epoch, job.chunk, &job.pieces, &unread);
        let kept = Kept { epoch: job.epoch, data: data.clone(), time, as_of };
        state.kept.insert(job.chunk.start, kept);
        if !unread.is_empty() {
            self.core.handle_unread(disk, job.epoch, job.chunk, &unread);
            self.note_unread(disk, &unread);
        }
        if job.hash {
            let key = JobKey { disk, epoch: job.epoch, chunk: job.chunk };
            self.workers.submit(Job::Hash { key, data });
        } else {
            self.answer_read(disk, job.epoch, job.chunk, None);
        }
    }

    fn handle_read_failed(&mut self, disk: DiskId, job: ReadJob, reason: &str) {
        let Some(state) = self.disks.get_mut(&disk).filter(|state| state.is_wanted(&job)) else {
            return;
        };
        let was_paused = state.faults.is_paused();
        match state.faults.failed(job, Instant::now()) {
            Failure::Again => return tracing::warn!(%disk, "{reason}; trying again"),
            Failure::InParts(job) => return state.read(job),
            Failure::Paused => {}
        }
        if !was_paused {
            tracing::error!(%disk, "{reason}; the walk over this disk is paused");
        }
        state.problem = Some(paused_text(reason));
    }

    /// These could not be read.
    pub(crate) fn note_unread(&mut self, disk: DiskId, ranges: &[SectorRange]) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if state.unread.found(ranges, Instant::now()) {
            let text = state.unread.describe().unwrap_or_default();
            tracing::error!(%disk, path = state.path, "{text}; the rest goes on, and they are tried again");
        }
        self.store_unread(disk, false);
        self.tell_unread(disk);
    }

    /// These could not be read in a window.
    pub(crate) fn note_window_unread(&mut self, unread: &[(DiskId, SectorRange)]) {
        for (disk, ranges) in by_disk(unread) {
            self.note_unread(disk, &ranges);
        }
    }

    /// A chunk was handed on.
    pub(crate) fn handle_chunk_sent(&mut self, disk: DiskId, epoch: u64, chunk: SectorRange) {
        self.heal(disk, |state| state.unread.was_sent(epoch, chunk.start));
    }

    /// What captured or read changes hold is not missing any more. What a device makes of a discarded range is its own
    /// affair.
    pub(crate) fn handle_batch_sent(&mut self, batch: &Batch) {
        self.heal(batch.disk, |state| {
            let written = batch.records.iter().filter(|record| record.kind() != RecordKind::Discard);
            written.for_each(|record| state.unread.arrived(record.range()));
        });
    }

    fn heal(&mut self, disk: DiskId, arrive: impl FnOnce(&mut crate::protected::Protected)) {
        let Some(state) = self.disks.get_mut(&disk).filter(|state| !state.unread.is_empty()) else { return };
        arrive(state);
        if state.unread.is_empty() {
            tracing::info!(%disk, path = state.path, "everything of it could be read, or was written anew");
        }
        self.tell_unread(disk);
    }

    /// From now on marks say so.
    pub(crate) fn tell_unread(&mut self, disk: DiskId) {
        if let Some(state) = self.disks.get(&disk) {
            self.core.set_unread(disk, state.unread.ranges().sector_count());
        }
    }

    /// Something is missing that was not before, or everything handed on so far `is_durable`: the next process is to know. The
    /// position goes with the stored set.
    pub(crate) fn store_unread(&mut self, disk: DiskId, is_durable: bool) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        let unread = &mut state.unread;
        match if is_durable { unread.store_durable() } else { unread.store_grown() } {
            Ok(false) => {}
            Ok(true) => self.following.remember(&self.core, disk, self.holding(disk)),
            Err(error) => {
                tracing::warn!(%disk, %error, "what could not be read is not kept, so after a restart the disk is compared; make the state directory writable");
                self.following.forget_position(disk);
            }
        }
    }
}

/// Each disk once, with all its ranges: noting them is a file written and a line in the log.
fn by_disk(unread: &[(DiskId, SectorRange)]) -> BTreeMap<DiskId, Vec<SectorRange>> {
    let mut disks: BTreeMap<DiskId, Vec<SectorRange>> = BTreeMap::new();
    unread.iter().for_each(|(disk, range)| disks.entry(*disk).or_default().push(*range));
    disks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_window_could_not_read_is_noted_once_for_each_disk() {
        let (one, other) = (DiskId([1; 16]), DiskId([2; 16]));
        let range = |start: u64| SectorRange::new(start, start + 8);
        let unread = [(one, range(8)), (other, range(8)), (one, range(80))];
        let expected = BTreeMap::from([(one, vec![range(8), range(80)]), (other, vec![range(8)])]);
        assert_eq!(by_disk(&unread), expected);
    }
}
