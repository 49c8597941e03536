//! What can be had of a disk: its marks, and between them every write where the stream was ordered.
//!
//! A mark is a point while its undo epoch is kept: at the end of the epoch as long as that is, inside it as long as
//! the redo log holds every entry of the epoch. An entry of an ORDERED stretch is a state of the disk if what came
//! before it was one: a mark that is not fuzzy, or another such entry.
//!
//! Invariants: a fuzzy mark, and one that is known to be damaged, is listed and never chosen by time, sequence or as the
//! newest; a state that is offered can be had now. Order is place in the log and nothing else. Times are the source's and
//! labels: where its clock was set back, a point is shown with the time of the one before it, so that shown times ascend,
//! and a look-up by time answers the last state whose shown time is not younger. Units: entry numbers, sequences, times.
//! Called by commands and the offline tools.

use std::collections::BTreeSet;

use super::Journal;
use super::applier::shape;
use super::error::JournalError;
use super::recovery::LogEntry;
use super::redo_index::{Wanted, entries_between};
use super::rot::Rot;
use super::shape::{DiskShape, Epoch};
use super::view::{At, View};
use crate::format::batch::{BatchHeader, Mark, MarkCause, MarkClass};
use crate::format::manifest::PointKept;
use crate::format::segment::EntryKind;
use crate::format::wire::Text;
use crate::units::{DiskId, Sequence, Timestamp};

/// A mark of a disk that can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Where.
    pub at: At,
    /// The point; the parts of one machine's point have the same.
    pub id: [u8; 16],
    /// What it promises.
    pub class: MarkClass,
    /// Why its mark was placed.
    pub cause: MarkCause,
    /// Its time by the source's clock, but not before that of the point before it.
    pub source_time: Timestamp,
    /// The last sequence before it.
    pub sequence: Sequence,
    /// Its name; empty without one.
    pub name: Text<64>,
    /// Kept until somebody says otherwise.
    pub pinned: bool,
    /// It promised more once.
    pub degraded: bool,
    /// It outlives the redo log.
    pub kept: bool,
    /// What is damaged of that which it is made from.
    pub damaged: Option<Rot>,
}

impl Point {
    /// Whether it is a state the source was in.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.class != MarkClass::Fuzzy && !self.degraded && !self.is_targets_own()
    }

    /// Whether it is a state the source was in, and is whole as far as is known.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.is_consistent() && self.damaged.is_none()
    }

    /// Whether the target itself kept it (`as-found`, `before-rollback-N`): no mark of the source stands there.
    #[must_use]
    pub fn is_targets_own(&self) -> bool {
        self.cause == MarkCause::Pass && !self.name.as_str().is_empty()
    }

    /// A point that a disk keeps, with what is known to be damaged of it.
    #[must_use]
    pub fn of_kept(disk: &DiskShape, point: &PointKept) -> Self {
        let kept = Self::kept(point);
        Self { damaged: disk.rot(kept.at), ..kept }
    }

    fn kept(point: &PointKept) -> Self {
        Self {
            at: At::entry(point.epoch, point.number),
            id: point.point,
            class: point.class,
            cause: point.cause,
            source_time: point.source_time,
            sequence: point.sequence,
            name: point.name,
            pinned: point.pinned,
            degraded: point.degraded,
            kept: true,
            damaged: None,
        }
    }

    /// What is left of a mark that cannot be read.
    fn ruin(disk: DiskId, at: At, entry: &LogEntry, error: &JournalError) -> Self {
        let cause = Text::new(&error.to_string());
        Self {
            at,
            id: own_id(disk, at),
            class: MarkClass::Fuzzy,
            cause: MarkCause::Timer,
            source_time: entry.time,
            sequence: Sequence(0),
            name: Text::new(""),
            pinned: false,
            degraded: false,
            kept: false,
            damaged: Some(Rot { bytes: 0, entry: Some(entry.number), cause }),
        }
    }

    fn mark(disk: DiskId, at: At, mark: &Mark) -> Self {
        Self {
            at,
            id: if mark.point == [0; 16] { own_id(disk, at) } else { mark.point },
            class: mark.class,
            cause: mark.cause,
            source_time: mark.source_time,
            sequence: mark.sequence,
            name: mark.name,
            pinned: false,
            degraded: false,
            kept: false,
            damaged: None,
        }
    }
}

/// The identity of a disk's point that belongs to no machine's: the same each time it is made.
#[must_use]
pub fn own_id(disk: DiskId, at: At) -> [u8; 16] {
    let mut id = disk.0;
    let place = at.epoch.to_le_bytes().into_iter().chain(at.number.to_le_bytes());
    for (slot, byte) in id.iter_mut().zip(place) {
        *slot ^= byte;
    }
    id
}

/// The marks of a disk that can be had now, oldest first.
///
/// # Errors
/// When the disk is not in the journal, or a mark cannot be read.
pub fn points(journal: &mut Journal, disk: DiskId) -> Result<Vec<Point>, JournalError> {
    let mut points = all_points(journal, disk)?;
    points.retain(|point| View::check(journal, disk, point.at).is_ok());
    Ok(points)
}

/// The marks of a disk that are known, oldest first; some may not be had any more.
///
/// # Errors
/// As for [`points`].
pub fn all_points(journal: &mut Journal, disk: DiskId) -> Result<Vec<Point>, JournalError> {
    // Nobody knows any more what a mark said that is known to be damaged.
    known_points(journal, disk, |_, is_known, error| if is_known { Ok(()) } else { Err(error) })
}

/// As [`all_points`]; a mark that cannot be read is among them, of the least class and damaged: it was there, and nobody
/// knows what it said.
///
/// # Errors
/// When the disk is not in the journal.
pub(super) fn all_points_and_ruins(journal: &mut Journal, disk: DiskId) -> Result<Vec<Point>, JournalError> {
    let mut ruins = Vec::new();
    let mut points = known_points(journal, disk, |(at, entry), _, error| {
        ruins.push(Point::ruin(disk, at, entry, &error));
        Ok(())
    })?;
    for ruin in &mut ruins {
        let before = points.iter().rfind(|point| point.at < ruin.at);
        ruin.source_time = before.map_or(ruin.source_time, |point| point.source_time);
    }
    points.extend(ruins);
    points.sort_by_key(|point| point.at);
    Ok(points)
}

fn known_points(
    journal: &mut Journal,
    disk: DiskId,
    mut unreadable: impl FnMut((At, &LogEntry), bool, JournalError) -> Result<(), JournalError>,
) -> Result<Vec<Point>, JournalError> {
    let known = shape(journal, disk)?.clone();
    let mut points: Vec<Point> = known.points.values().map(Point::kept).collect();
    let kept: BTreeSet<At> = points.iter().map(|point| point.at).collect();
    for entry in of_kind(journal, disk, EntryKind::Mark) {
        let Some(epoch) = known.epoch_of(entry.number) else { continue };
        let at = At::entry(epoch.opened.epoch, entry.number);
        if kept.contains(&at) {
            continue;
        }
        let mark = match journal.mark(disk, &entry) {
            Ok(mark) => mark,
            Err(error) => {
                unreadable((at, &entry), known.is_log_damaged(entry.number), error)?;
                continue;
            }
        };
        let degraded = known.is_degraded_mark(&mark, entry.number);
        points.push(Point { degraded, ..Point::mark(disk, at, &mark) });
    }
    for point in &mut points {
        point.damaged = known.rot(point.at);
    }
    points.sort_by_key(|point| point.at);
    show_times(&mut points);
    Ok(points)
}

/// Makes the times of a disk's points, which are in their order, those that are shown: none is before the one in front of
/// it. What the target itself kept has its time by another clock: it is shown between its neighbours and moves none.
fn show_times(points: &mut [Point]) {
    let mut before = Timestamp(0);
    for point in points.iter_mut().filter(|point| !point.is_targets_own()) {
        before = before.max(point.source_time);
        point.source_time = before;
    }
    let mut behind = Timestamp(u64::MAX);
    for point in points.iter_mut().rev() {
        point.source_time = point.source_time.min(behind);
        if !point.is_targets_own() {
            behind = point.source_time;
        }
    }
    let mut before = Timestamp(0);
    for point in points {
        point.source_time = point.source_time.max(before);
        if !point.is_targets_own() {
            before = point.source_time;
        }
    }
}

/// The shown time of what lies at a place and says `label`: that of the mark before it where its own is older.
fn shown(marks: &[Point], at: At, label: Timestamp) -> Timestamp {
    let before = marks.iter().rfind(|point| point.at <= at && !point.is_targets_own());
    before.map_or(label, |point| point.source_time.max(label))
}

/// Entries that are states of the disk, each run in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderedRun {
    /// The undo epoch of each, and the entry; never empty.
    entries: Vec<(u64, LogEntry)>,
    /// Number of the last state of the run: its last entry, or a mark behind it with nothing between.
    end: u64,
}

impl OrderedRun {
    /// Number of the first and the last entry.
    #[must_use]
    pub fn numbers(&self) -> (u64, u64) {
        let number = |entry: Option<&(u64, LogEntry)>| entry.map_or(0, |(_, entry)| entry.number);
        (number(self.entries.first()), number(self.entries.last()))
    }
}

/// The runs of entries of which every write can be had, oldest first.
///
/// # Errors
/// As for [`points`].
pub fn ordered_runs(journal: &mut Journal, disk: DiskId) -> Result<Vec<OrderedRun>, JournalError> {
    let known = shape(journal, disk)?.clone();
    let first = first_entry(journal, disk);
    let entries = journal.entries(disk).to_vec();
    let mut runs: Vec<OrderedRun> = Vec::new();
    let mut run: Vec<(u64, LogEntry)> = Vec::new();
    let mut is_state = false;
    let (mut previous, mut end) = (0, 0);
    for entry in entries {
        if entry.number != previous + 1 {
            is_state = false;
        }
        previous = entry.number;
        let Some(epoch) = known.epoch_of(entry.number) else { continue };
        if epoch.opened.after + 1 == entry.number {
            // What an undo epoch begins with is what the one before it ended with.
            is_state |= begins_with_state(&known, entry.number - 1);
        }
        match entry.kind {
            _ if known.rot(At::entry(epoch.opened.epoch, entry.number)).is_some() => is_state = false,
            EntryKind::Mark => {
                is_state = match journal.mark(disk, &entry) {
                    Ok(mark) => mark.is_state() && !known.is_degraded_mark(&mark, entry.number),
                    // What it promised is kept, where it is a kept point.
                    Err(_) if known.is_log_damaged(entry.number) => begins_with_state(&known, entry.number),
                    Err(error) => return Err(error),
                };
            }
            EntryKind::Ordered => {
                is_state &= !known.is_doubtful(entry.number) && !known.is_entry_damaged(entry.number);
            }
            _ => is_state = false,
        }
        if is_state && can_be_had(&known, epoch, entry.number, first) {
            if entry.kind == EntryKind::Ordered {
                run.push((epoch.opened.epoch, entry));
            }
            end = entry.number;
        } else if !run.is_empty() {
            runs.push(OrderedRun { entries: std::mem::take(&mut run), end });
        }
    }
    if !run.is_empty() {
        runs.push(OrderedRun { entries: run, end });
    }
    Ok(runs)
}

/// A state that was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub at: At,
    /// Its shown time: not younger than what was asked for.
    pub source_time: Timestamp,
    /// The last sequence in it.
    pub sequence: Sequence,
}

/// The newest state that is not younger than `time`: a mark, or a batch of an ORDERED stretch. Where the source's clock was
/// set back, the times that are shown count; between two marks labels are taken to ascend, and what is answered never has
/// a younger one.
///
/// # Errors
/// When there is none, saying which is the oldest; or when the log cannot be read.
pub fn at_time(journal: &mut Journal, disk: DiskId, time: Timestamp) -> Result<Found, JournalError> {
    let marks = points(journal, disk)?;
    let states = marks.iter().filter(|point| point.is_sound());
    let mut best = states.clone().rfind(|point| point.source_time <= time).map(|point| Found {
        at: point.at,
        source_time: point.source_time,
        sequence: point.sequence,
    });
    // Shown times ascend: what stands before the first of these is old enough, what stands behind the second is not.
    let mut sources = marks.iter().filter(|point| !point.is_targets_own());
    let old = sources.clone().rfind(|point| point.source_time <= time).map_or(0, |point| point.at.number);
    let young = sources.find(|point| point.source_time > time).map_or(u64::MAX, |point| point.at.number);
    for run in ordered_runs(journal, disk)?.iter().rev() {
        let is_old = |entry: &LogEntry| match entry.number {
            number if number < old => Ok(true),
            number if number > young => Ok(false),
            _ => Ok(header(journal, entry)?.source_time <= time),
        };
        let count = search(run, is_old)?;
        let Some((epoch, entry)) = count.checked_sub(1).and_then(|last| run.entries.get(last)) else {
            continue;
        };
        let header = header(journal, entry)?;
        if shape(journal, disk)?.is_degraded(header.lineage, header.last_sequence(), entry.number) {
            continue;
        }
        let at = At::entry(*epoch, entry.number);
        if best.is_none_or(|best| best.at < at) {
            let source_time = shown(&marks, at, header.source_time);
            best = Some(Found { at, source_time, sequence: header.last_sequence() });
        }
        break; // older runs lie before it
    }
    best.ok_or_else(|| {
        let oldest = states.clone().next().map(|point| point.source_time);
        JournalError::NoState { disk, oldest }
    })
}

/// Whether nothing that was written to the disk up to a time is missing in what [`at_time`] found for it. That says what follows: a
/// younger state of the same ordered run, which has all between. Where the run ends before that time nobody knows what came
/// after, and a batch of just that time may be a part of what was written in that moment. Where the source's clock was set back
/// since the mark before, times say nothing of what came first, least of all to another disk of the machine.
///
/// Planned with the journal's lock; the stretch between two marks, which may be large, is read without it.
#[derive(Debug)]
pub struct Coverage {
    time: Timestamp,
    /// The entry behind what was found.
    next: u64,
    /// Of the mark before it.
    label: Timestamp,
    /// The mark right behind it is as young.
    is_younger: bool,
    /// The ordered entries between the two marks.
    stretch: Wanted,
}

impl Coverage {
    /// What is to be read for it; `None` where it is known without that not to be so.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn plan(
        journal: &mut Journal,
        disk: DiskId,
        found: &Found,
        time: Timestamp,
    ) -> Result<Option<Self>, JournalError> {
        let next = found.at.number + 1;
        let runs = ordered_runs(journal, disk)?;
        let Some(run) = runs.iter().find(|run| (run.numbers().0..=run.end).contains(&next)) else {
            return Ok(None);
        };
        let marks = points(journal, disk)?;
        let before = marks.iter().rfind(|mark| mark.at.number < next && !mark.is_targets_own());
        let after = marks.iter().find(|mark| mark.at.number >= next && !mark.is_targets_own());
        let (from, to) =
            (before.map_or(0, |mark| mark.at.number), after.map_or(u64::MAX, |mark| mark.at.number));
        let between = run.entries.iter().map(|(_, entry)| *entry);
        let between: Vec<LogEntry> = between.filter(|entry| (from + 1..to).contains(&entry.number)).collect();
        Ok(Some(Self {
            time,
            next,
            label: before.map_or(Timestamp(0), |mark| mark.source_time),
            is_younger: after.is_some_and(|mark| mark.at.number == next && mark.source_time >= time),
            stretch: Wanted::these(journal, disk, &between),
        }))
    }

    /// Reads it. Blocks; needs no lock.
    ///
    /// # Errors
    /// When an entry cannot be read, is damaged, or was given up meanwhile.
    pub fn read(self) -> Result<bool, JournalError> {
        let Self { time, next, mut label, mut is_younger, stretch } = self;
        let mut ascends = true;
        stretch.each(|entry, body| {
            let (header, _) = BatchHeader::read_prefix(body)?;
            ascends &= header.source_time >= label;
            label = header.source_time;
            if entry.number == next {
                is_younger = header.source_time > time;
            }
            Ok(())
        })?;
        Ok(ascends && is_younger)
    }
}

/// The state behind a sequence, inside an ORDERED stretch or at a mark.
///
/// # Errors
/// When there is none, or when the log cannot be read.
pub fn at_sequence(journal: &mut Journal, disk: DiskId, sequence: Sequence) -> Result<Found, JournalError> {
    let marks = points(journal, disk)?;
    for run in ordered_runs(journal, disk)? {
        let before = search(&run, |entry| Ok(header(journal, entry)?.last_sequence() < sequence))?;
        let Some((epoch, entry)) = run.entries.get(before) else { continue };
        let header = header(journal, entry)?;
        let degraded = shape(journal, disk)?.is_degraded(header.lineage, sequence, entry.number);
        if header.first_sequence > sequence || degraded {
            continue;
        }
        let records = (sequence.0 - header.first_sequence.0 + 1) as u32;
        let at = if sequence == header.last_sequence() {
            At::entry(*epoch, entry.number)
        } else {
            At { epoch: *epoch, number: entry.number - 1, records }
        };
        return Ok(Found { at, source_time: shown(&marks, at, header.source_time), sequence });
    }
    let mark = marks.iter().rfind(|point| point.sequence == sequence && point.is_sound());
    mark.map(|point| Found { at: point.at, source_time: point.source_time, sequence })
        .ok_or(JournalError::NoState { disk, oldest: None })
}

/// Whether the disk was ever as a place would show it: not so inside a stretch whose writes are only together a state. What is
/// damaged, or not in the log any more, is not judged: that is said by who opens it.
///
/// # Errors
/// As for [`points`].
pub fn is_state(journal: &mut Journal, disk: DiskId, at: At) -> Result<bool, JournalError> {
    let is_damaged = shape(journal, disk)?.rot(at).is_some();
    if is_damaged || points(journal, disk)?.iter().any(|point| point.at == at) {
        return Ok(true);
    }
    let entries = journal.entries(disk);
    let entry = entries.binary_search_by_key(&at.through(), |entry| entry.number).ok();
    let is_change = entry.and_then(|at| entries.get(at)).is_some_and(|entry| entry.kind != EntryKind::Mark);
    if !is_change {
        return Ok(true);
    }
    let is_inside = |run: &OrderedRun| (run.numbers().0..=run.numbers().1).contains(&at.through());
    Ok(ordered_runs(journal, disk)?.iter().any(is_inside))
}

/// What a stretch of time offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Every write.
    AnyWrite,
    /// The marks in it.
    PointsOnly,
    /// Marks that promise less than they did.
    Degraded,
    /// Marks of which something cannot be read any more.
    Damaged,
    /// Entries of the log are lost.
    Lost,
}

/// A stretch of time, by the source's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// What it offers.
    pub offer: Offer,
    /// From.
    pub from: Timestamp,
    /// To.
    pub to: Timestamp,
}

/// What is offered from the oldest point to the newest, oldest first, without gaps.
///
/// # Errors
/// As for [`points`].
pub fn timeline(journal: &mut Journal, disk: DiskId) -> Result<Vec<Interval>, JournalError> {
    let marks = points(journal, disk)?;
    let reaches_to = first_entry(journal, disk);
    let mut intervals: Vec<Interval> = Vec::new();
    for pair in marks.windows(2) {
        let [from, to] = pair else { continue };
        let offer = match is_whole(journal, disk, (from.at, to.at), reaches_to) {
            false => Offer::Lost,
            true if to.damaged.is_some() => Offer::Damaged,
            // A fuzzy mark is no state of the disk.
            true if to.degraded || to.class == MarkClass::Fuzzy => Offer::Degraded,
            true => Offer::PointsOnly,
        };
        put(&mut intervals, Interval { offer, from: from.source_time, to: to.source_time });
    }
    for run in ordered_runs(journal, disk)? {
        let (Some(first), Some(last)) = (run.entries.first(), run.entries.last()) else { continue };
        let mut time = |(epoch, entry): &(u64, LogEntry)| {
            let label = header(journal, entry)?.source_time;
            Ok::<_, JournalError>(shown(&marks, At::entry(*epoch, entry.number), label))
        };
        let (from, to) = (time(first)?, time(last)?);
        lay(&mut intervals, Interval { offer: Offer::AnyWrite, from, to: to.max(from) });
    }
    Ok(intervals)
}

fn put(intervals: &mut Vec<Interval>, interval: Interval) {
    match intervals.last_mut() {
        Some(last) if last.offer == interval.offer => last.to = interval.to.max(last.to),
        _ => intervals.push(interval),
    }
}

/// Lays an interval over the others.
fn lay(intervals: &mut Vec<Interval>, over: Interval) {
    let mut laid = Vec::new();
    for old in intervals.drain(..) {
        laid.push(Interval { to: old.to.min(over.from), ..old });
        laid.push(Interval { from: old.from.max(over.to), ..old });
    }
    laid.push(over);
    // One of no length says something only if it is all there is.
    laid.retain(|interval| interval.from < interval.to || *interval == over);
    laid.sort_by_key(|interval| (interval.from, interval.to));
    for interval in laid {
        put(intervals, interval);
    }
}

/// Whether every entry between two marks was there for the later one: none is known to be lost, and the log has them all
/// as far as it reaches back, which is to entry `first`.
fn is_whole(journal: &Journal, disk: DiskId, (from, to): (At, At), first: u64) -> bool {
    let lost = journal.shape().disks.get(&disk).map_or(&[][..], |known| known.lost.as_slice());
    if lost.iter().any(|loss| loss.entries.first <= to.number && loss.entries.last > from.number) {
        return false;
    }
    from.number + 1 < first || entries_between(journal, disk, from.number, to.number).is_ok()
}

/// The entry back to which the log reaches. What was carried forward, and was applied since, may stand alone before it: what
/// lay between was released in its time, and is not missing.
fn first_entry(journal: &Journal, disk: DiskId) -> u64 {
    let entries = journal.entries(disk);
    let is_newest = |entry: &LogEntry| !entry.carried || entry.number == journal.newest(disk);
    let Some(at) = entries.iter().position(is_newest) else { return u64::MAX };
    let (carried, newer) = entries.split_at(at);
    let mut first = newer.first().map_or(u64::MAX, |entry| entry.number);
    for entry in carried.iter().rev() {
        if entry.number + 1 != first {
            break;
        }
        first = entry.number;
    }
    first
}

fn of_kind(journal: &Journal, disk: DiskId, kind: EntryKind) -> Vec<LogEntry> {
    journal.entries(disk).iter().filter(|entry| entry.kind == kind).copied().collect()
}

/// Whether the disk as it was behind an entry can be had; the log reaches back to entry `first`.
fn can_be_had(known: &DiskShape, epoch: &Epoch, number: u64, first: u64) -> bool {
    let Some(from) = known.runs_from(epoch.opened.epoch, number) else { return false };
    if known.rot(At::entry(epoch.opened.epoch, number)).is_some() {
        return false;
    }
    // Inside an epoch every entry of it is needed.
    let at_border = from > epoch.opened.epoch || number == epoch.opened.after;
    !known.is_merged_across(from) && (at_border || epoch.opened.after + 1 >= first)
}

/// Whether the disk was in a state of its own behind entry `number`, where an undo epoch ended.
fn begins_with_state(known: &DiskShape, number: u64) -> bool {
    known.points.values().any(|point| point.number == number && Point::kept(point).is_consistent())
}

fn header(journal: &mut Journal, entry: &LogEntry) -> Result<BatchHeader, JournalError> {
    let (_, body) = journal.read(entry.place)?;
    BatchHeader::read_prefix(&body).map(|(header, _)| header).map_err(JournalError::format(
        journal.folder(),
        entry.place.offset,
        "choose another point",
    ))
}

/// How many entries of a run, from its first on, hold to a condition that the rest do not.
fn search(
    run: &OrderedRun,
    mut holds: impl FnMut(&LogEntry) -> Result<bool, JournalError>,
) -> Result<usize, JournalError> {
    let (mut low, mut high) = (0, run.entries.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        let Some((_, entry)) = run.entries.get(middle) else { break };
        if holds(entry)? { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}
