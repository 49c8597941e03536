//! The redo log: appending commit groups, flushing them, rolling segments, and reading it all back (the tail rule).
//!
//! Invariants: at most [`IN_FLIGHT`] groups are unflushed, and all of them lie in the last segment; group numbers of
//! good groups never repeat; `durable_group` never names a group that a power loss could still take. A segment's slots
//! keep the groups of its earlier use, so a scan trusts only the right salt with the right number.

use super::device::{Media, Slot, Stop};
use super::machine::{Journal, Place, Writer};
use super::manifest::{Change, Segment};
use super::mutations::Rule;
use super::records::{Applied, Body, Entry, Group, IN_FLIGHT, Record, SEGMENT_GROUPS};

impl Journal {
    /// Writes one commit group; it is durable only after [`Journal::flush_log`].
    pub(crate) fn append(&mut self, entries: Vec<Entry>) -> Result<(), Stop> {
        if self.writer.in_flight >= IN_FLIGHT && self.keeps(Rule::BoundedInFlight) {
            self.flush_log()?;
        }
        if self.writer.slot == SEGMENT_GROUPS {
            self.flush_log()?; // A segment follows only when the one before it is durable.
            self.add_segment()?;
        }
        self.chaos.step()?;
        let (writer, segment) = (self.writer, self.last_segment());
        let group = Group {
            number: writer.next_group,
            salt: segment.salt,
            durable_group: writer.durable_group,
            entries,
        };
        self.note(|| format!("log: segment {} slot {}: {group:?}", segment.file, writer.slot));
        self.index(&group, segment.file, writer.slot);
        self.segments[segment.file].write(writer.slot, group);
        self.writer.slot += 1;
        self.writer.next_group += 1;
        self.writer.in_flight += 1;
        if !self.keeps(Rule::FlushBeforeDurable) {
            self.disks.iter_mut().for_each(|disk| disk.durable = disk.received);
        }
        Ok(())
    }

    /// Everything written so far becomes durable.
    pub(crate) fn flush_log(&mut self) -> Result<(), Stop> {
        let file = self.last_segment().file;
        self.segments[file].flush(&mut self.chaos)?;
        self.writer.in_flight = 0;
        self.writer.durable_group = self.writer.next_group - 1;
        for disk in &mut self.disks {
            disk.durable = disk.received;
            disk.missing.retain(|sequence| !disk.places.contains_key(sequence));
            disk.awaited.retain(|sequence| !disk.places.contains_key(sequence));
        }
        self.note(|| format!("log: durable to group {}", self.writer.durable_group));
        Ok(())
    }

    pub(crate) fn last_segment(&self) -> Segment {
        self.catalogue.segments.last().copied().unwrap_or(Segment { file: 0, salt: 0, first_group: 1 })
    }

    /// Goes on in a segment that is new or recycled, under a fresh salt.
    pub(crate) fn add_segment(&mut self) -> Result<(), Stop> {
        let used = |file: &usize| self.catalogue.segments.iter().any(|segment| segment.file == *file);
        let file = (0..self.segments.len()).find(|file| !used(file)).unwrap_or(self.segments.len());
        if file == self.segments.len() {
            self.segments.push(Media::file());
        }
        let (salt, first_group) = (self.chaos.rng.bits(), self.writer.next_group);
        self.commit(Change::AddSegment { file, salt, first_group })?;
        self.writer.slot = 0;
        Ok(())
    }

    /// Enters a group's records into memory. A record that is there already stays: both are the same.
    fn index(&mut self, group: &Group, file: usize, slot: usize) {
        for (at, entry) in group.entries.iter().enumerate() {
            let Entry::Record(Record { disk, sequence, time, body }) = entry else { continue };
            let disk = &mut self.disks[*disk];
            disk.places.insert(*sequence, Place { file, slot, at, time: *time });
            disk.received = disk.received.max(*sequence);
            if let Body::Mark { mark, .. } = body {
                disk.marks.insert(*mark, *sequence);
            }
        }
    }

    /// Reads the whole log back. Answers what it says was applied, and whether it must go on in a new segment.
    pub(crate) fn scan_log(&mut self) -> (Vec<Applied>, bool) {
        let segments = self.catalogue.segments.clone();
        let mut applied = Vec::new();
        let mut number = segments.first().map_or(1, |segment| segment.first_group);
        self.writer = Writer { slot: SEGMENT_GROUPS, ..Writer::default() };
        let mut must_cut = false;
        for (at, segment) in segments.iter().enumerate() {
            let next = segments.get(at + 1).map(|next| next.first_group);
            for slot in 0..SEGMENT_GROUPS {
                if next == Some(number) {
                    break; // The log was cut here once, and went on in the next segment.
                }
                match self.valid(segment, slot, number) {
                    Some(group) => {
                        self.index(&group, segment.file, slot);
                        applied.extend(group.entries.iter().filter_map(|entry| match entry {
                            Entry::Applied(applied) => Some(*applied),
                            Entry::Record(_) => None,
                        }));
                    }
                    None if self.is_corrupt(&segments[at..], slot, number) => {
                        self.note(|| format!("log: group {number} is corrupt"));
                    }
                    None => {
                        must_cut = next.is_some() || self.has_remains(segment, slot);
                        self.writer.slot = slot;
                        self.writer.next_group = number;
                        self.writer.durable_group = number - 1;
                        return (applied, must_cut);
                    }
                }
                number += 1;
            }
        }
        self.writer.next_group = number;
        self.writer.durable_group = number - 1;
        (applied, must_cut)
    }

    fn valid(&self, segment: &Segment, slot: usize, number: usize) -> Option<Group> {
        let group = self.segments[segment.file].good(slot)?;
        (group.salt == segment.salt && group.number == number).then(|| group.clone())
    }

    /// The tail rule: group `number`, invalid in this slot, was durable if anything later says so.
    fn is_corrupt(&mut self, segments: &[Segment], slot: usize, number: usize) -> bool {
        if !self.keeps(Rule::LookOn) {
            return false;
        }
        let says_so = |segment: &Segment, slot| {
            let group = self.segments[segment.file].good(slot);
            group.is_some_and(|group| {
                let (later, known) = (group.number >= number + IN_FLIGHT, group.durable_group >= number);
                group.salt == segment.salt && (later || known)
            })
        };
        let here = (slot + 1..SEGMENT_GROUPS).any(|slot| says_so(&segments[0], slot));
        // A segment is added only when the one before it is durable.
        if here || segments.len() > 1 {
            self.found.by_later_groups += 1;
            return true;
        }
        let known = self.catalogue.durable_group >= number;
        self.found.by_manifest += usize::from(known);
        known
    }

    /// Whether this slot or a later one holds something of the segment's present use: then the log was torn here.
    fn has_remains(&self, segment: &Segment, slot: usize) -> bool {
        let media = &self.segments[segment.file];
        (slot..SEGMENT_GROUPS).any(|slot| match media.read(slot) {
            Slot::Good(group) => group.salt == segment.salt,
            Slot::Bad | Slot::BadBody(_) => true,
            Slot::Empty => false,
        })
    }
}
