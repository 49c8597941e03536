//! One protected disk: its reader, the chunks whose data are kept, what could not be read, and what the operator is
//! told of it.
//!
//! Invariants: data are kept only for work of the running walk, and dropped when their records are made or the walk
//! is over; a disk that is stopped reads nothing and answers nothing until it is offered again; a paused one keeps its
//! jobs and goes on by itself. Owned by `machine`, one per disk. Units: sectors, bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reprotect_engine::format::message::SourceId;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{SECTOR_BYTES, Sequence, Timestamp};

use crate::budget::Budget;
use crate::faults::Faults;
use crate::freshness::Freshness;
use crate::reader::{DiskReader, ReadJob};
use crate::recent::Recent;
use crate::unread::Unread;

/// A chunk whose data are kept.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) epoch: u64,
    pub(crate) data: Bytes,
    pub(crate) time: Timestamp,
    pub(crate) as_of: Sequence,
}

/// What a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    Offered,
    Copying,
    Comparing,
    Scanning,
    Synced,
    Growing,
    Stopped,
    Disconnected,
}

impl Activity {
    const fn name(self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::Copying => "copying",
            Self::Comparing => "comparing",
            Self::Scanning => "scanning",
            Self::Synced => "synced",
            Self::Growing => "growing",
            Self::Stopped => "stopped",
            Self::Disconnected => "disconnected",
        }
    }
}

/// A disk this agent protects.
#[derive(Debug)]
pub(crate) struct Protected {
    pub(crate) source: SourceId,
    pub(crate) path: String,
    pub(crate) size_sectors: u64,
    /// The source has this size now, and the target is to have it.
    pub(crate) grows_to: Option<u64>,
    pub(crate) budget: Arc<Budget>,
    reader: Option<DiskReader>,
    /// Read by readers before this one.
    read_before: u64,
    pub(crate) kept: HashMap<u64, Kept>,
    /// Chunks that are not read yet, and as of which sequence.
    wanted: BTreeMap<(u64, u64), (ReadJob, Sequence)>,
    pub(crate) faults: Faults,
    pub(crate) unread: Unread,
    /// What was written to lately.
    pub(crate) recent: Recent,
    pub(crate) activity: Activity,
    pub(crate) next_scan: Option<Instant>,
    pub(crate) walk_began: Timestamp,
    pub(crate) freshness: Freshness,
    /// What the process before this one knew of it; it holds if the target stands where that knew it to stand.
    pub(crate) recalled_as_of: Timestamp,
    pub(crate) lost_at_target: u64,
    /// How often capture missed something.
    pub(crate) unaccounted: u64,
    pub(crate) scan_rounds: u64,
    pub(crate) problem: Option<String>,
}

impl Protected {
    pub(crate) fn new(
        source: SourceId,
        path: String,
        budget: Arc<Budget>,
        reader: DiskReader,
        mut unread: Unread,
    ) -> Self {
        unread.cut_off(reader.size_sectors());
        Self {
            source,
            path,
            size_sectors: reader.size_sectors(),
            grows_to: None,
            budget,
            reader: Some(reader),
            read_before: 0,
            kept: HashMap::new(),
            wanted: BTreeMap::new(),
            faults: Faults::default(),
            unread,
            recent: Recent::default(),
            activity: Activity::Offered,
            next_scan: None,
            walk_began: Timestamp::ZERO,
            freshness: Freshness::default(),
            recalled_as_of: Timestamp::ZERO,
            lost_at_target: 0,
            unaccounted: 0,
            scan_rounds: 0,
            problem: None,
        }
    }

    /// Whether it may be opened at the target as it is.
    pub(crate) fn is_readable(&self) -> bool {
        self.reader.is_some() && !self.faults.is_paused()
    }

    /// Reads by another reader from now on: the device was opened anew, perhaps under another name. What the one before had
    /// still to read is read by this one.
    pub(crate) fn replace_reader(&mut self, path: String, reader: DiskReader) {
        self.read_before += self.reader.as_ref().map_or(0, DiskReader::read_bytes);
        self.size_sectors = reader.size_sectors();
        self.grows_to = None;
        self.unread.cut_off(self.size_sectors);
        self.path = path;
        self.reader = Some(reader);
        let queued = self.wanted.values().map(|(job, _)| job).filter(|job| !self.faults.holds(job));
        for job in queued.cloned().collect::<Vec<_>>() {
            self.read_or_keep(job);
        }
    }

    /// Nothing is read until the disk is offered again, at its new size.
    pub(crate) fn begin_growing(&mut self) {
        self.give_up_reader();
        self.activity = Activity::Growing;
    }

    fn give_up_reader(&mut self) {
        self.end_walk();
        self.read_before += self.reader.take().map_or(0, |reader| reader.read_bytes());
        self.grows_to = None;
    }

    /// Nothing is read any more until the disk is offered again.
    pub(crate) fn stop(&mut self, problem: String) {
        self.give_up_reader();
        self.activity = Activity::Stopped;
        self.problem = Some(problem);
    }

    /// The session is over: nothing that was asked for in it is wanted any more.
    pub(crate) fn end_walk(&mut self) {
        self.kept.clear();
        self.wanted.clear();
        self.faults.clear();
        self.unread.end_walk();
        self.next_scan = None;
    }

    /// A walk began: what it reads is not older than now.
    pub(crate) fn begin_walk(&mut self, activity: Activity) {
        if matches!(self.activity, Activity::Stopped | Activity::Growing) {
            return;
        }
        if activity != Activity::Scanning {
            // Sequences that were not durable may be given to other changes.
            self.freshness.begin_pass();
        }
        self.activity = activity;
        let now = Instant::now();
        self.unread.end_walk();
        if activity != Activity::Synced && (activity != Activity::Scanning || self.unread.is_due(now)) {
            self.unread.begin_trying(now);
        }
        self.walk_began = wall_clock();
        self.next_scan = None;
    }

    /// The walk goes on where it was in a session before: part of it was read then.
    pub(crate) const fn resume_walk(&mut self, began: Timestamp) {
        self.walk_began = began;
    }

    /// Everything the walk read is durable, with everything up to `durable`. Word of it may come when the disk was stopped meanwhile: it stays so.
    pub(crate) fn finish_walk(&mut self, durable: Sequence, next_scan: Instant) {
        if matches!(self.activity, Activity::Stopped | Activity::Growing) {
            return;
        }
        self.activity = Activity::Synced;
        self.unread.end_walk();
        self.freshness.covers(durable, self.walk_began);
        self.next_scan = Some(next_scan);
    }

    /// The next round comes within `pause` at the latest.
    pub(crate) fn hurry(&mut self, now: Instant, pause: Option<Duration>) {
        if let Some(pause) = pause {
            self.next_scan = self.next_scan.map(|at| at.min(now + pause));
        }
    }

    /// A chunk is wanted.
    pub(crate) fn want(&mut self, job: ReadJob, as_of: Sequence) {
        self.wanted.insert((job.epoch, job.chunk.start), (job.clone(), as_of));
        self.read_or_keep(job);
    }

    fn read_or_keep(&mut self, job: ReadJob) {
        if let Some(job) = self.faults.admit(job) {
            self.read(job);
        }
    }

    /// Reads now.
    pub(crate) fn read(&self, job: ReadJob) {
        if let Some(reader) = &self.reader {
            reader.read(job);
        }
    }

    /// Whether the chunk is still wanted, and as of which sequence; asked once its data are there.
    pub(crate) fn take_wanted(&mut self, job: &ReadJob) -> Option<Sequence> {
        self.wanted.remove(&(job.epoch, job.chunk.start)).map(|(_, as_of)| as_of)
    }

    /// Whether the chunk is still wanted.
    pub(crate) fn is_wanted(&self, job: &ReadJob) -> bool {
        self.wanted.contains_key(&(job.epoch, job.chunk.start))
    }

    /// What it is doing, for people.
    pub(crate) fn state(&self) -> &'static str {
        match self.activity {
            _ if self.faults.is_paused() => "paused",
            Activity::Synced if !self.unread.is_empty() => "incomplete",
            activity => activity.name(),
        }
    }

    pub(crate) const fn size_bytes(&self) -> u64 {
        self.size_sectors * SECTOR_BYTES
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_before + self.reader.as_ref().map_or(0, DiskReader::read_bytes)
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::limits::CHUNK_BYTES;
    use std::sync::mpsc;

    use reprotect_engine::units::{DiskId, SectorRange};

    use super::*;
    use crate::reader::{FromDisk, ReaderSetup};
    use crate::throttle::Throttle;

    #[test]
    fn what_a_reader_had_still_to_read_is_read_by_the_one_that_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 * CHUNK_BYTES).unwrap();
        let budget = Budget::new(0, 1).unwrap();
        let reader = |deliver: Box<dyn Fn(FromDisk) + Send>| {
            DiskReader::start(ReaderSetup {
                path: file.path().to_owned(),
                is_device: false,
                budget: Arc::clone(&budget),
                throttle: Arc::new(Throttle::new(None)),
                deliver,
            })
            .unwrap()
        };
        let job = |number: u64| ReadJob {
            chunk: SectorRange::new(
                number * CHUNK_BYTES / SECTOR_BYTES,
                (number + 1) * CHUNK_BYTES / SECTOR_BYTES,
            ),
            epoch: 1,
            hash: false,
            pieces: Vec::new(),
            in_parts: false,
        };
        let unread = Unread::load(dir.path(), DiskId([1; 16]), Instant::now());
        // What this one reads arrives nowhere.
        let lost = reader(Box::new(drop));
        let mut disk = Protected::new([1; 16], "disk".to_owned(), Arc::clone(&budget), lost, unread);
        (0..4).for_each(|number| disk.want(job(number), Sequence(number)));
        assert_eq!(disk.take_wanted(&job(3)), Some(Sequence(3)), "it was read in time");
        disk.faults.failed(job(1), Instant::now());
        let (deliver, news) = mpsc::channel();
        disk.replace_reader("disk".to_owned(), reader(Box::new(move |item| drop(deliver.send(item)))));
        disk.read(job(1)); // as when its pause is over
        for number in [0, 2, 1] {
            let FromDisk::Read { job: read, .. } = news.recv().unwrap() else { panic!("a size") };
            assert_eq!(read, job(number));
            assert_eq!(disk.take_wanted(&read), Some(Sequence(number)));
        }
        disk.replace_reader("disk".to_owned(), reader(Box::new(drop)));
        assert!(news.recv().is_err(), "nothing was read twice");
    }

    #[test]
    fn late_news_of_its_walk_do_not_set_a_stopped_disk_going_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(CHUNK_BYTES).unwrap();
        let budget = Budget::new(0, 1).unwrap();
        let setup = ReaderSetup {
            path: file.path().to_owned(),
            is_device: false,
            budget: Arc::clone(&budget),
            throttle: Arc::new(Throttle::new(None)),
            deliver: Box::new(drop),
        };
        let reader = DiskReader::start(setup).unwrap();
        let mut disk = Protected::new(
            [1; 16],
            "disk".to_owned(),
            budget,
            reader,
            Unread::load(dir.path(), DiskId([1; 16]), Instant::now()),
        );
        disk.begin_walk(Activity::Scanning);
        disk.stop("it was resized".to_owned());
        disk.finish_walk(Sequence::ZERO, Instant::now());
        assert_eq!(
            (disk.activity, disk.next_scan),
            (Activity::Stopped, None),
            "the mark was acknowledged late"
        );
        disk.begin_walk(Activity::Comparing);
        assert_eq!(disk.activity, Activity::Stopped);
        assert!(!disk.is_readable() && disk.problem.is_some());
        disk.activity = Activity::Offered;
        disk.begin_walk(Activity::Comparing);
        assert_eq!(disk.activity, Activity::Comparing, "until it is offered again");
    }
}
