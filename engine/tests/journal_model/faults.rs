//! Media corruption in a play: commit groups and before-images that rot after they were flushed.
//!
//! Invariants: only flushed slots rot, and the oracle is told of each; what was cut off the log is no part of it. The
//! manifest and the target do not rot here. Called by `play.rs`.

use super::device::{Slot, Stop};
use super::manifest::Kind;
use super::play::Player;
use super::records::{BLOCKS, Group, SEGMENT_GROUPS};

impl Player {
    /// Injects media corruption into something that is durable, now and then at the moment of a stop.
    pub(crate) fn rot(&mut self) -> Result<(), Stop> {
        let left = self.faults_left;
        if left == 0 {
            return Ok(());
        }
        // A play that has many faults has them for that one place.
        match if left > 2 { 1 } else { self.journal.chaos.rng.below(4) } {
            0 => self.rot_group(false),
            1 => self.rot_group(true),
            2 => self.rot_image(false),
            _ => self.rot_image(true),
        }
        if self.faults_left < left && self.journal.chaos.rng.chance(500) {
            Err(Stop::PowerLoss)
        } else {
            Ok(())
        }
    }

    /// `boundary`: the group with the mark that a disk's apply worker stands at and is to end its epoch at.
    pub(crate) fn rot_group(&mut self, boundary: bool) {
        let journal = &mut self.journal;
        let segments = &journal.catalogue.segments;
        let mut at = journal.chaos.rng.below(segments.len());
        let mut slot = journal.chaos.rng.below(SEGMENT_GROUPS);
        if boundary {
            let disk = &journal.disks[journal.chaos.rng.below(journal.disks.len())];
            let mut marks = disk.marks.iter().filter(|mark| journal.catalogue.decided.contains(mark.0));
            let Some(mark) = marks.find(|mark| *mark.1 == disk.applied) else { return };
            let Some(place) = disk.places.get(mark.1) else { return };
            let Some(found) = segments.iter().position(|segment| segment.file == place.file) else { return };
            (at, slot) = (found, place.slot);
        }
        let segment = segments[at];
        // What was cut off once is no part of the log.
        let end = segments.get(at + 1).map_or(journal.writer.next_group, |next| next.first_group);
        let media = &mut journal.segments[segment.file];
        let mine = |group: &&Group| group.salt == segment.salt && group.number < end;
        let Some(group) = media.good(slot).filter(mine).cloned() else { return };
        if media.can_rot(slot) && group.number <= journal.writer.durable_group {
            media.rot(slot, false);
            journal.note(|| format!("rot: group {} in segment {}", group.number, segment.file));
            self.oracle.group_rotted(&group);
            self.report.rotten_groups += 1;
            self.faults_left -= 1;
        }
    }

    /// `newest`: the last image of the active run, of which the log may not tell yet.
    pub(crate) fn rot_image(&mut self, newest: bool) {
        let journal = &mut self.journal;
        let disk = journal.chaos.rng.below(journal.disks.len());
        let runs = &journal.catalogue.disks[disk].runs;
        let Some(last) = runs.len().checked_sub(1) else { return };
        let run = runs[if newest { last } else { journal.chaos.rng.below(last + 1) }];
        let Some(file) = journal.runs.get_mut(&run.file) else { return };
        let frames = file.frames.len();
        let at = if newest { frames.saturating_sub(1) } else { journal.chaos.rng.below(frames) };
        let Slot::Good(frame) = file.frames.read(at).clone() else { return };
        if file.frames.can_rot(at) && frame.image.is_some() {
            file.frames.rot(at, journal.chaos.rng.chance(500));
            journal
                .note(|| format!("rot: disk {disk} epochs {}..={} frame {at}: {frame:?}", run.low, run.high));
            self.oracle.image_rotted(disk, run.high, frame.block);
            if matches!(journal.catalogue.disks[disk].epochs[run.high].kind, Kind::Rollback(_)) {
                // What cannot be told from an unreadable frame is where between its neighbours it belongs.
                let block = |at: usize| journal.runs[&run.file].frames.good(at).map(|frame| frame.block);
                let from = at.checked_sub(1).and_then(block).map_or(0, |block| block + 1);
                let to = block(at + 1).filter(|next| *next >= from).unwrap_or(BLOCKS);
                (from..to).for_each(|block| self.oracle.image_rotted(disk, run.high, block));
            }
            self.report.rotten_images += 1;
            self.faults_left -= 1;
        }
    }
}
