//! What of a disk could not be read and is therefore not at the target; kept for the next process, too.
//!
//! Invariants: a range is here from before its chunk is handed on without it until its content was handed on; the
//! stored set is never smaller than what the target lacks, so it grows before a chunk is handed on, and shrinks only when
//! everything handed on is durable; a set that cannot be stored, or is damaged, is said to be unknown, and the disk is
//! compared at the next start. Ranges are tried again after a pause that doubles with each time that did not help. It need
//! not outlive a power cut: the disk is compared then. Units: sectors. Time is an argument. One per disk, owned by
//! `protected`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reprotect_engine::checksum::crc32;
use reprotect_engine::host::output;
use reprotect_engine::io::durable::read_bounded;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};

use crate::api::ByteRange;

/// Pause before what could not be read is tried again, the first time.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest it gets.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Ranges that `status` shows one by one.
const RANGES_SHOWN: usize = 64;
/// Ranges that are stored one by one; beyond, neighbours are joined.
const RANGES_MAX: usize = 4096;
/// A line holds two numbers of twenty digits at most.
const FILE_BYTES_MAX: u64 = 42 * RANGES_MAX as u64 + 4;

/// Parts of one disk that could not be read.
#[derive(Debug)]
pub(crate) struct Unread {
    path: PathBuf,
    ranges: RangeSet,
    /// What the target may lack if this process is killed: the ranges, and those handed on that are not durable.
    lacking: RangeSet,
    /// As the file says; `None` where it is damaged or could not be written.
    stored: Option<RangeSet>,
    /// It is known what processes before this one could not read. If not, the file stays as it is until all was compared.
    is_complete: bool,
    /// When they are tried again, and the pause after that.
    again: Option<(Instant, Duration)>,
    /// They are tried in the walk that runs.
    trying: bool,
    /// What was read of them and waits to be handed on, by epoch and start of its chunk.
    coming: BTreeMap<(u64, u64), Vec<SectorRange>>,
}

impl Unread {
    /// What a process before this one knew; due at once.
    pub(crate) fn load(folder: &Path, disk: DiskId, now: Instant) -> Self {
        let path = folder.join(format!("unread-{disk}"));
        let stored = match read_bounded(&path, FILE_BYTES_MAX) {
            Ok(bytes) => std::str::from_utf8(&bytes).ok().and_then(parse),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Some(RangeSet::new()),
            Err(_) => None,
        };
        let ranges = stored.clone().unwrap_or_default();
        let again = (!ranges.is_empty()).then_some((now, FIRST_PAUSE));
        let (lacking, is_complete) = (ranges.clone(), stored.is_some());
        Self { path, ranges, lacking, stored, is_complete, again, trying: false, coming: BTreeMap::new() }
    }

    /// Tells the stored set from others; `None` where the next process must not believe what is stored.
    pub(crate) fn tag(&self) -> Option<u32> {
        self.stored.as_ref().filter(|_| self.is_complete).map(|stored| crc32(render(stored).as_bytes()))
    }

    /// The file is not the one it ought to be: until the disk is compared, nothing that is stored is believed.
    pub(crate) const fn distrust(&mut self) {
        self.is_complete = false;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(crate) fn ranges(&self) -> &RangeSet {
        &self.ranges
    }

    /// Whether any of `range` could not be read.
    pub(crate) fn touches(&self, range: SectorRange) -> bool {
        self.ranges.overlap(range).next().is_some()
    }

    /// The disk ends there.
    pub(crate) fn cut_off(&mut self, size_sectors: u64) {
        self.arrived(SectorRange::new(size_sectors, u64::MAX));
    }

    /// These could not be read; answers whether that was new.
    pub(crate) fn found(&mut self, ranges: &[SectorRange], now: Instant) -> bool {
        let before = self.ranges.sector_count();
        ranges.iter().for_each(|range| self.ranges.insert(*range));
        let grew = self.ranges.sector_count() > before;
        if grew {
            // The others, whose pause may be a long one, are tried along with them.
            let (at, pause) = self.again.unwrap_or((now + FIRST_PAUSE, FIRST_PAUSE * 2));
            self.again = Some((at.min(now + FIRST_PAUSE), pause));
        }
        grew
    }

    /// A chunk of a walk was read, but for `unread`: what it heals waits until it is handed on.
    pub(crate) fn was_read(
        &mut self,
        epoch: u64,
        chunk: SectorRange,
        pieces: &[SectorRange],
        unread: &[SectorRange],
    ) {
        let whole = [chunk];
        let pieces = if pieces.is_empty() { &whole } else { pieces };
        let mut healed: RangeSet = pieces.iter().flat_map(|piece| self.ranges.overlap(*piece)).collect();
        unread.iter().for_each(|range| healed.remove(*range));
        if !healed.is_empty() {
            self.coming.insert((epoch, chunk.start), healed.iter().collect());
        }
    }

    /// The chunk was handed on.
    pub(crate) fn was_sent(&mut self, epoch: u64, chunk_start: u64) {
        for range in self.coming.remove(&(epoch, chunk_start)).unwrap_or_default() {
            self.arrived(range);
        }
    }

    /// The content of a range was handed on.
    pub(crate) fn arrived(&mut self, range: SectorRange) {
        self.ranges.remove(range);
        if self.ranges.is_empty() {
            self.again = None;
        }
    }

    /// The walk is over: nothing of it comes any more.
    pub(crate) fn end_walk(&mut self) {
        self.coming.clear();
        self.trying = false;
    }

    /// Whether it is time to try them again.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.again.is_some_and(|(at, _)| at <= now)
    }

    /// Whether the walk that runs tries them all.
    pub(crate) const fn is_tried(&self) -> bool {
        self.trying
    }

    /// A walk begins that tries them all.
    pub(crate) fn begin_trying(&mut self, now: Instant) {
        self.trying = true;
        self.again = self.again.map(|(_, pause)| (now + pause, (pause * 2).min(LONGEST_PAUSE)));
    }

    /// Tries them at the next opportunity: an operator asked.
    pub(crate) fn hurry(&mut self, now: Instant) {
        self.again = self.again.map(|_| (now, FIRST_PAUSE));
    }

    /// What of `range` is left alone in the walk that runs.
    pub(crate) fn resting(&self, range: SectorRange) -> Vec<SectorRange> {
        if self.trying { Vec::new() } else { self.ranges.overlap(range).collect() }
    }

    /// Stores what was found, beside what is stored: what was handed on since is perhaps not durable. Answers whether the
    /// file changed.
    ///
    /// # Errors
    /// When that cannot be done: the next process must not believe the file.
    pub(crate) fn store_grown(&mut self) -> io::Result<bool> {
        self.lacking.extend(&self.ranges);
        if self.is_complete { self.store() } else { Ok(false) }
    }

    /// Everything handed on is durable: stores what is missing still. Answers whether the file changed.
    ///
    /// # Errors
    /// As [`Self::store_grown`].
    pub(crate) fn store_durable(&mut self) -> io::Result<bool> {
        self.lacking.clone_from(&self.ranges);
        // Where it was not known, the whole disk was compared since.
        self.is_complete = true;
        self.store()
    }

    fn store(&mut self) -> io::Result<bool> {
        if self.stored.as_ref() == Some(&self.lacking) {
            return Ok(false);
        }
        self.stored = None;
        if self.lacking.is_empty() {
            match std::fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else {
            let new = self.path.with_extension("new");
            std::fs::write(&new, render(&self.lacking))?;
            std::fs::rename(new, &self.path)?;
        }
        self.stored = Some(self.lacking.clone());
        Ok(true)
    }

    /// The disk is not protected any more.
    pub(crate) fn remove(&self) {
        // What is not there need not be removed, and what stays is tried again for nothing.
        let _ = std::fs::remove_file(&self.path);
    }

    /// The first ones, for `status`.
    pub(crate) fn first_ranges(&self) -> Vec<ByteRange> {
        let shown = |range: SectorRange| ByteRange { start: range.byte_start(), bytes: range.bytes() };
        self.ranges.iter().take(RANGES_SHOWN).map(shown).collect()
    }

    /// What is wrong, for people; `None` where everything was read.
    pub(crate) fn describe(&self) -> Option<String> {
        let first = self.ranges.iter().next()?;
        let (count, sectors) = (self.ranges.run_count(), self.ranges.sector_count());
        let ranges = if count == 1 { "1 range".to_owned() } else { format!("{count} ranges") };
        Some(format!(
            "complete except {ranges} ({}) that cannot be read, the first at byte {}, {} bytes",
            output::bytes(sectors * SECTOR_BYTES),
            first.byte_start(),
            first.bytes(),
        ))
    }
}

/// One line each: start and end in sectors; a last line says that nothing is missing. Too many are joined, nearest first,
/// for a range too long is only tried for nothing.
fn render(ranges: &RangeSet) -> String {
    let joined = at_most(ranges, RANGES_MAX);
    let mut text: String = joined.iter().map(|range| format!("{} {}\n", range.start, range.end)).collect();
    text.push_str("end\n");
    text
}

/// The ranges, those with the smallest gaps between them joined until no more than `count` are left.
fn at_most(ranges: &RangeSet, count: usize) -> RangeSet {
    let all: Vec<SectorRange> = ranges.iter().collect();
    let gap = |pair: &[SectorRange]| SectorRange::new(pair[0].end, pair[1].start);
    let mut gaps: Vec<SectorRange> = all.windows(2).map(gap).collect();
    gaps.sort_unstable_by_key(|gap| gap.len());
    gaps.truncate(all.len().saturating_sub(count));
    all.into_iter().chain(gaps).collect()
}

fn parse(text: &str) -> Option<RangeSet> {
    let mut ranges = RangeSet::new();
    for line in text.strip_suffix("end\n")?.lines() {
        let (start, end) = line.split_once(' ')?;
        let (start, end) = (start.parse::<u64>().ok()?, end.parse::<u64>().ok()?);
        if start >= end {
            return None;
        }
        ranges.insert(SectorRange::new(start, end));
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([7; 16]);

    fn range(start: u64, end: u64) -> SectorRange {
        SectorRange::new(start, end)
    }

    fn all(unread: &Unread) -> Vec<SectorRange> {
        unread.ranges().iter().collect()
    }

    #[test]
    fn a_range_stays_until_its_content_is_handed_on_and_the_file_until_that_is_durable() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut unread = Unread::load(dir.path(), DISK, now);
        assert!(unread.tag().is_some() && unread.is_empty());
        assert!(unread.found(&[range(8, 24), range(80, 88)], now));
        assert!(!unread.found(&[range(8, 16)], now), "known already");
        assert!(unread.store_grown().unwrap());
        unread.was_read(4, range(0, 100), &[], &[range(80, 88)]);
        assert_eq!(all(&unread), [range(8, 24), range(80, 88)], "read, and nowhere yet");
        unread.was_sent(3, 0);
        assert_eq!(all(&unread).len(), 2, "of another walk");
        unread.was_sent(4, 0);
        assert_eq!(all(&unread), [range(80, 88)]);
        assert_eq!(all(&Unread::load(dir.path(), DISK, now)), [range(8, 24), range(80, 88)]);
        unread.store_durable().unwrap();
        assert_eq!(all(&Unread::load(dir.path(), DISK, now)), [range(80, 88)]);
        unread.was_read(5, range(80, 100), &[range(80, 84)], &[]);
        unread.end_walk();
        unread.was_sent(5, 80);
        assert_eq!(all(&unread), [range(80, 88)], "its walk was over before it was handed on");
        unread.arrived(range(0, 200));
        unread.store_durable().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_handed_on_and_not_durable_stays_in_the_file_although_more_is_found() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let next = || all(&Unread::load(dir.path(), DISK, now));
        let mut unread = Unread::load(dir.path(), DISK, now);
        unread.found(&[range(8, 24), range(80, 88)], now);
        unread.store_grown().unwrap();
        unread.arrived(range(8, 24));
        unread.found(&[range(80, 88)], now);
        assert!(!unread.store_grown().unwrap(), "nothing new");
        assert_eq!(next(), [range(8, 24), range(80, 88)]);
        unread.found(&[range(400, 408)], now);
        assert!(unread.store_grown().unwrap());
        assert_eq!(next(), [range(8, 24), range(80, 88), range(400, 408)]);
        assert!(unread.store_durable().unwrap());
        assert_eq!(next(), [range(80, 88), range(400, 408)]);
    }

    #[test]
    fn a_set_that_is_not_what_it_ought_to_be_is_not_believed_until_all_was_compared() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let path = dir.path().join(format!("unread-{DISK}"));
        std::fs::write(&path, "damaged").unwrap();
        let mut unread = Unread::load(dir.path(), DISK, now);
        unread.found(&[range(8, 16)], now);
        assert!(!unread.store_grown().unwrap());
        assert_eq!(unread.tag(), None);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "damaged", "nor by the next process");
        unread.store_durable().unwrap();
        let tag = unread.tag().unwrap();
        let mut next = Unread::load(dir.path(), DISK, now);
        assert_eq!((next.tag(), all(&next)), (Some(tag), vec![range(8, 16)]));
        next.found(&[range(80, 88)], now);
        next.store_grown().unwrap();
        assert!(next.tag().is_some_and(|other| other != tag));
        next.distrust();
        assert_eq!(next.tag(), None);
        // Where nothing can be written, nothing is believed either.
        let mut nowhere = Unread::load(&dir.path().join("missing"), DISK, now);
        assert!(nowhere.tag().is_some());
        nowhere.found(&[range(8, 16)], now);
        nowhere.store_grown().unwrap_err();
        assert_eq!(nowhere.tag(), None);
    }

    #[test]
    fn what_is_found_later_is_tried_soon_and_nothing_is_where_the_disk_ends_before_it() {
        let (dir, begin) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut unread = Unread::load(dir.path(), DISK, begin);
        unread.found(&[range(80, 88)], begin);
        (0..10).for_each(|_| unread.begin_trying(begin));
        assert!(!unread.is_due(begin + LONGEST_PAUSE / 2));
        unread.found(&[range(80, 84)], begin);
        assert!(!unread.is_due(begin + LONGEST_PAUSE / 2), "known already");
        unread.found(&[range(8, 16)], begin);
        assert!(!unread.is_due(begin) && unread.is_due(begin + FIRST_PAUSE));
        unread.cut_off(80);
        assert!(unread.is_due(begin + FIRST_PAUSE), "one is left");
        unread.cut_off(8);
        assert!(unread.is_empty() && !unread.is_due(begin + LONGEST_PAUSE), "nothing is left to try");
    }

    #[test]
    fn they_are_tried_again_after_pauses_that_double_and_at_once_by_the_next_process() {
        let (dir, begin) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut unread = Unread::load(dir.path(), DISK, begin);
        unread.found(&[range(0, 8)], begin);
        let (mut now, mut pause) = (begin, FIRST_PAUSE);
        for _ in 0..12 {
            assert!(!unread.is_due(now + pause - Duration::from_millis(1)));
            assert_eq!(unread.resting(range(4, 100)), [range(4, 8)]);
            now += pause;
            assert!(unread.is_due(now));
            unread.begin_trying(now);
            assert!(unread.resting(range(0, 100)).is_empty());
            unread.end_walk();
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        assert_eq!(pause, LONGEST_PAUSE);
        unread.hurry(now);
        assert!(unread.is_due(now));
        unread.store_grown().unwrap();
        let mut next = Unread::load(dir.path(), DISK, now);
        assert!(next.is_due(now));
        next.arrived(range(0, 8));
        assert!(!next.is_due(now + LONGEST_PAUSE), "nothing is left to try");
    }

    #[test]
    fn a_damaged_file_is_not_believed_and_too_many_ranges_are_joined_not_forgotten() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut unread = Unread::load(dir.path(), DISK, now);
        let many: Vec<SectorRange> =
            (0..3 * RANGES_MAX as u64).map(|at| range(at * 16, at * 16 + 8)).collect();
        unread.found(&many, now);
        unread.store_grown().unwrap();
        let next = Unread::load(dir.path(), DISK, now);
        assert!(next.tag().is_some() && next.ranges().run_count() <= RANGES_MAX);
        assert!(many.iter().all(|range| next.ranges().contains(*range)));
        let apart: RangeSet =
            [range(0, 8), range(16, 24), range(1 << 30, (1 << 30) + 8)].into_iter().collect();
        let nearest: Vec<SectorRange> = at_most(&apart, 2).iter().collect();
        assert_eq!(nearest, [range(0, 24), range(1 << 30, (1 << 30) + 8)], "the nearest first");
        let path = dir.path().join(format!("unread-{DISK}"));
        let text = std::fs::read_to_string(&path).unwrap();
        let large = format!("{}end\n", "8 16\n".repeat(FILE_BYTES_MAX as usize / 5));
        for damaged in [&text[..text.len() / 2], "8 4\nend\n", "x\nend\n", "", &large] {
            std::fs::write(&path, damaged).unwrap();
            assert!(Unread::load(dir.path(), DISK, now).tag().is_none(), "{damaged:.20}");
        }
    }

    #[test]
    fn people_are_told_how_much_is_missing_and_where() {
        let dir = tempfile::tempdir().unwrap();
        let mut unread = Unread::load(dir.path(), DISK, Instant::now());
        assert_eq!(unread.describe(), None);
        unread.found(&[range(8, 16), range(80, 88)], Instant::now());
        let text = unread.describe().unwrap();
        assert!(text.contains("2 ranges (8.00 KiB)") && text.contains("byte 4096, 4096 bytes"), "{text}");
        unread.cut_off(80);
        assert!(unread.describe().unwrap().contains("1 range (4.00 KiB)"));
    }
}
