//! What happens to a chunk that cannot be read: tried again a few times, then in parts, so that only what fails is left
//! out; where not even that can be done, the disk is paused and looked at slowly.
//!
//! Invariants: a chunk is read again at most `QUICK_PAUSES` times quickly, and once in parts; after that the whole walk
//! over the disk waits (its jobs are kept here, at most a pass's window of them) and one chunk is probed every
//! [`PROBE_PAUSE`], after the disk was opened anew; the first probe that succeeds lets everything go on. No spinning, no
//! standing still.
//! Pure: time is an argument. Owned by `protected`, one per disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::reader::ReadJob;

/// Pauses before a failed chunk is read again: a path that fails over, a device that is reset.
const QUICK_PAUSES: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
/// Pause between two looks at a disk that cannot be read or is not there.
pub const PROBE_PAUSE: Duration = Duration::from_secs(15);

/// Failed reads of one disk.
#[derive(Debug, Default)]
pub struct Faults {
    tries: BTreeMap<(u64, u64), usize>,
    later: Vec<(Instant, ReadJob)>,
    broken: Option<Broken>,
}

#[derive(Debug)]
struct Broken {
    probe: ReadJob,
    /// When to probe; `None` while a probe is under way.
    at: Option<Instant>,
    waiting: Vec<ReadJob>,
}

/// What becomes of a read that failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// It is tried again soon.
    Again,
    /// It is to be read in parts now.
    InParts(ReadJob),
    /// The disk is paused because of it.
    Paused,
}

const fn key(job: &ReadJob) -> (u64, u64) {
    (job.epoch, job.chunk.start)
}

impl Faults {
    /// A new job: read it now, or keep it because the disk is paused (`None`).
    #[must_use]
    pub fn admit(&mut self, job: ReadJob) -> Option<ReadJob> {
        match &mut self.broken {
            Some(broken) => {
                broken.waiting.push(job);
                None
            }
            None => Some(job),
        }
    }

    /// A read failed at `now`.
    pub fn failed(&mut self, mut job: ReadJob, now: Instant) -> Failure {
        if let Some(broken) = &mut self.broken {
            if key(&broken.probe) == key(&job) {
                broken.at = Some(now + PROBE_PAUSE);
            } else {
                broken.waiting.push(job);
            }
            return Failure::Paused;
        }
        let tries = self.tries.entry(key(&job)).or_default();
        if let Some(pause) = QUICK_PAUSES.get(*tries) {
            *tries += 1;
            self.later.push((now + *pause, job));
            return Failure::Again;
        }
        if !job.in_parts {
            job.in_parts = true;
            return Failure::InParts(job);
        }
        let waiting = self.later.drain(..).map(|(_, job)| job).collect();
        self.broken = Some(Broken { probe: job, at: Some(now + PROBE_PAUSE), waiting });
        Failure::Paused
    }

    /// A read succeeded: the jobs that may now be read, and whether the disk had been paused.
    pub fn succeeded(&mut self, job: &ReadJob) -> Option<Vec<ReadJob>> {
        self.tries.remove(&key(job));
        self.broken.take_if(|broken| key(&broken.probe) == key(job)).map(|broken| broken.waiting)
    }

    /// The jobs to be read again at `now`.
    pub fn due(&mut self, now: Instant) -> Vec<ReadJob> {
        self.later.extract_if(.., |(at, _)| *at <= now).map(|(_, job)| job).collect()
    }

    /// Whether the disk is to be opened anew and probed at `now`; then [`Self::probe`] or [`Self::probe_failed`].
    #[must_use]
    pub fn wants_probe(&mut self, now: Instant) -> bool {
        let Some(broken) = &mut self.broken else { return false };
        broken.at.take_if(|at| *at <= now).is_some()
    }

    /// Probes at the next opportunity: an operator asked.
    pub fn hurry(&mut self, now: Instant) {
        if let Some(at) = self.broken.as_mut().and_then(|broken| broken.at.as_mut()) {
            *at = now;
        }
    }

    /// The disk is open again: what to read first.
    #[must_use]
    pub fn probe(&self) -> Option<ReadJob> {
        self.broken.as_ref().map(|broken| broken.probe.clone())
    }

    /// The disk could not be opened at `now`.
    pub fn probe_failed(&mut self, now: Instant) {
        if let Some(broken) = &mut self.broken {
            broken.at = Some(now + PROBE_PAUSE);
        }
    }

    /// Whether it will be read by and by: no reader has it.
    #[must_use]
    pub fn holds(&self, job: &ReadJob) -> bool {
        let later = self.later.iter().map(|(_, job)| job);
        let waiting = self.broken.iter().flat_map(|broken| broken.waiting.iter().chain([&broken.probe]));
        later.chain(waiting).any(|held| key(held) == key(job))
    }

    /// Whether the walk waits.
    #[must_use]
    pub const fn is_paused(&self) -> bool {
        self.broken.is_some()
    }

    /// The walk is over: its jobs are nobody's any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::units::SectorRange;

    use super::*;

    fn job(start: u64) -> ReadJob {
        ReadJob {
            chunk: SectorRange::new(start, start + 8),
            epoch: 1,
            hash: false,
            pieces: Vec::new(),
            in_parts: false,
        }
    }

    /// Fails `job` until the disk is paused; answers when that was.
    fn pause(faults: &mut Faults, job: ReadJob, begin: Instant) -> Instant {
        let mut now = begin;
        for pause in QUICK_PAUSES {
            assert_eq!(faults.failed(job.clone(), now), Failure::Again);
            assert!(faults.holds(&job));
            assert!(faults.due(now + pause / 2).is_empty(), "not before its pause is over");
            now += pause;
            assert_eq!(faults.due(now).iter().map(key).collect::<Vec<_>>(), [key(&job)]);
        }
        let Failure::InParts(parts) = faults.failed(job.clone(), now) else { panic!("not in parts") };
        assert_eq!(parts, ReadJob { in_parts: true, ..job });
        assert!(!faults.is_paused());
        assert_eq!(faults.failed(parts, now), Failure::Paused);
        now
    }

    #[test]
    fn a_failing_chunk_is_read_a_bounded_number_of_times_then_the_disk_is_paused_and_probed() {
        let (mut faults, begin) = (Faults::default(), Instant::now());
        let paused = pause(&mut faults, job(0), begin);
        assert!(faults.is_paused());
        assert!(faults.admit(job(8)).is_none(), "the walk waits");
        assert!(faults.holds(&job(0)) && faults.holds(&job(8)) && !faults.holds(&job(16)));
        assert_eq!(faults.failed(job(16), paused), Failure::Paused, "one that was under way waits too");
        let mut now = paused;
        for _ in 0..100 {
            assert!(!faults.wants_probe(now + PROBE_PAUSE / 2));
            now += PROBE_PAUSE;
            assert!(faults.wants_probe(now));
            assert!(!faults.wants_probe(now + PROBE_PAUSE), "one probe at a time");
            assert_eq!(faults.probe().as_ref().map(key), Some(key(&job(0))));
            assert_eq!(faults.failed(job(0), now), Failure::Paused);
        }
        assert!(faults.succeeded(&job(24)).is_none(), "another chunk proves nothing");
        let mut released = faults.succeeded(&job(0)).unwrap();
        released.sort_by_key(key);
        assert_eq!(released.iter().map(key).collect::<Vec<_>>(), [key(&job(8)), key(&job(16))]);
        assert!(!faults.is_paused());
        assert!(faults.admit(job(32)).is_some());
    }

    #[test]
    fn chunks_that_recover_leave_nothing_behind() {
        let (mut faults, now) = (Faults::default(), Instant::now());
        for start in 0..10 {
            assert_eq!(faults.failed(job(start), now), Failure::Again);
        }
        for job in faults.due(now + PROBE_PAUSE) {
            assert!(faults.succeeded(&job).is_none());
        }
        assert!(faults.tries.is_empty() && faults.later.is_empty() && !faults.is_paused());
    }

    #[test]
    fn a_disk_that_cannot_be_opened_is_probed_again_and_an_operator_can_hurry_it() {
        let (mut faults, begin) = (Faults::default(), Instant::now());
        let now = pause(&mut faults, job(0), begin) + PROBE_PAUSE;
        assert!(faults.wants_probe(now));
        faults.probe_failed(now);
        assert!(!faults.wants_probe(now));
        faults.hurry(now);
        assert!(faults.wants_probe(now));
        faults.clear();
        assert!(!faults.is_paused());
    }
}
