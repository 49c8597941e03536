//! What the redo log holds of a disk and the target does not: up to where it may be applied, and what it writes.
//!
//! An entry of an ORDERED stretch, a bulk batch and a mark may be applied as soon as they are durable. Entries of a
//! DIFF stretch wait for their mark, so that the target stands at a state the disk was in. Their writes are kept in
//! memory while they are few; beyond that they are read back from the log once the mark is there.
//!
//! Invariants: `ready` holds the writes of every entry up to `border` that is not on the target, `ahead` those behind
//! it, unless `in_log`: then both are empty and the log is read. Memory is bounded by [`BATCHES_MAX`] batches.
//! Units: entry numbers, sequences, bytes of the log. Used by `journaled` only.

use std::collections::VecDeque;

use reprotect_engine::range_set::RangeSet;
use reprotect_engine::store::journal::entry::Write;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::units::{SectorRange, Sequence};

/// Batches whose plain bytes may wait in memory: they are held in the disk's ten buffers.
const BATCHES_MAX: usize = 4;

/// An entry that is not on the target.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    sequence: Sequence,
    log_bytes: u64,
}

/// Entries that are not on the target.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    entries: VecDeque<Waiting>,
    border: u64,
    ready: Window,
    ahead: Window,
    /// Batches in the windows.
    ready_batches: usize,
    ahead_batches: usize,
    in_log: bool,
    /// Where entries write whose writes are not in the windows.
    in_log_ranges: RangeSet,
    log_bytes: u64,
}

impl Backlog {
    /// An entry was added to the log. `sequence` is the newest with it; `holds`: it waits for a mark.
    pub(crate) fn push(
        &mut self,
        number: u64,
        sequence: Sequence,
        log_bytes: u64,
        holds: bool,
        writes: Option<Vec<Write>>,
    ) {
        self.entries.push_back(Waiting { number, sequence, log_bytes });
        self.log_bytes += log_bytes;
        if let Some(writes) = writes {
            self.ahead_batches += usize::from(!self.in_log);
            for write in writes {
                if self.in_log {
                    self.in_log_ranges.insert(write.range);
                } else {
                    self.ahead.put(write);
                }
            }
        }
        if !holds {
            self.release();
        }
    }

    /// Everything there is may be applied.
    pub(crate) fn release(&mut self) {
        if let Some(last) = self.entries.back() {
            self.border = last.number;
            self.ready.append(std::mem::take(&mut self.ahead));
            self.ready_batches += std::mem::take(&mut self.ahead_batches);
        }
    }

    /// Takes over entries of the log whose writes nobody knows yet, as after a start.
    pub(crate) fn found_in_log(&mut self, entries: &[(u64, Sequence, u64)], whole: SectorRange) {
        for (number, sequence, log_bytes) in entries {
            self.entries.push_back(Waiting { number: *number, sequence: *sequence, log_bytes: *log_bytes });
            self.log_bytes += log_bytes;
        }
        self.in_log = !self.entries.is_empty();
        if self.in_log {
            self.in_log_ranges.insert(whole);
        }
    }

    /// Whether there is no room for the writes of another batch.
    pub(crate) const fn is_full(&self) -> bool {
        self.ready_batches + self.ahead_batches >= BATCHES_MAX
    }

    /// Gives the memory up: what waits is read from the log when its mark is there.
    pub(crate) fn leave_to_log(&mut self) {
        for window in [std::mem::take(&mut self.ready), std::mem::take(&mut self.ahead)] {
            for write in window.runs() {
                self.in_log_ranges.insert(write.range);
            }
        }
        (self.ready_batches, self.ahead_batches, self.in_log) = (0, 0, true);
    }

    /// The entry up to which may be applied, if that is more than is.
    pub(crate) fn applicable(&self) -> Option<u64> {
        self.entries.front().filter(|first| first.number <= self.border).map(|_| self.border)
    }

    /// What is to be written for [`Self::applicable`]; `None` where it is to be read from the log.
    pub(crate) const fn writes(&self) -> Option<&Window> {
        if self.in_log { None } else { Some(&self.ready) }
    }

    /// Entries up to `number` are on the target; answers the newest sequence among them.
    pub(crate) fn applied(&mut self, number: u64) -> Option<Sequence> {
        let mut sequence = None;
        while let Some(first) = self.entries.front().filter(|first| first.number <= number) {
            sequence = Some(first.sequence);
            self.log_bytes -= first.log_bytes;
            self.entries.pop_front();
        }
        if number >= self.border {
            (self.ready, self.ready_batches) = (Window::default(), 0);
        }
        if self.entries.is_empty() {
            self.in_log = false;
            self.in_log_ranges.clear();
        }
        sequence
    }

    /// Bytes of the log that wait.
    pub(crate) const fn log_bytes(&self) -> u64 {
        self.log_bytes
    }

    /// Whether something that waits may write into a range.
    pub(crate) fn touches(&self, range: SectorRange) -> bool {
        [&self.ready, &self.ahead].iter().any(|window| window.overlap(range).next().is_some())
            || (self.in_log && self.in_log_ranges.overlap(range).next().is_some())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use reprotect_engine::store::journal::entry::Content;
    use reprotect_engine::units::SECTOR_BYTES;

    use super::*;

    fn write(start: u64, byte: u8) -> Vec<Write> {
        let data = Bytes::from(vec![byte; SECTOR_BYTES as usize]);
        vec![Write { range: SectorRange::new(start, start + 1), content: Content::Data(data) }]
    }

    fn starts(window: Option<&Window>) -> Vec<u64> {
        window.map(|window| window.runs().map(|run| run.range.start).collect()).unwrap_or_default()
    }

    #[test]
    fn a_diff_stretch_waits_for_its_mark_and_an_ordered_one_does_not() {
        let mut backlog = Backlog::default();
        backlog.push(1, Sequence(10), 100, false, Some(write(1, 1)));
        backlog.push(2, Sequence(20), 100, true, Some(write(2, 2)));
        assert_eq!((backlog.applicable(), starts(backlog.writes())), (Some(1), vec![1]));
        assert_eq!(backlog.applied(1), Some(Sequence(10)));
        assert_eq!(backlog.applicable(), None);
        assert!(backlog.touches(SectorRange::new(2, 3)) && !backlog.touches(SectorRange::new(1, 2)));
        backlog.push(3, Sequence(20), 10, false, None);
        assert_eq!((backlog.applicable(), starts(backlog.writes())), (Some(3), vec![2]));
        assert_eq!(backlog.applied(3), Some(Sequence(20)));
        assert_eq!((backlog.log_bytes(), backlog.applicable()), (0, None));
    }

    #[test]
    fn what_does_not_fit_into_memory_is_left_to_the_log_and_still_known_to_be_there() {
        let mut backlog = Backlog::default();
        for number in 1..=BATCHES_MAX as u64 {
            assert!(!backlog.is_full());
            backlog.push(number, Sequence(number), 100, true, Some(write(number, 1)));
        }
        assert!(backlog.is_full());
        backlog.leave_to_log();
        backlog.push(9, Sequence(9), 100, true, Some(write(9, 1)));
        backlog.push(10, Sequence(9), 10, false, None);
        backlog.push(11, Sequence(11), 100, true, Some(write(11, 1)));
        assert_eq!(backlog.applicable(), Some(10));
        assert!(backlog.writes().is_none());
        assert!([1, 9, 11].iter().all(|at| backlog.touches(SectorRange::new(*at, at + 1))));
        assert_eq!(backlog.applied(10), Some(Sequence(9)));
        assert!(backlog.writes().is_none(), "entry 11 is in the log only");
        assert_eq!(backlog.log_bytes(), 100);
        backlog.release();
        assert_eq!(backlog.applied(11), Some(Sequence(11)));
        assert!(backlog.writes().is_some() && !backlog.touches(SectorRange::new(11, 12)));
    }

    #[test]
    fn entries_found_after_a_start_may_be_anywhere() {
        let mut backlog = Backlog::default();
        backlog.found_in_log(&[(4, Sequence(7), 50)], SectorRange::new(0, 100));
        assert!(backlog.touches(SectorRange::new(99, 100)));
        assert_eq!(backlog.applicable(), None);
        backlog.release();
        assert_eq!(backlog.applicable(), Some(4));
    }
}
