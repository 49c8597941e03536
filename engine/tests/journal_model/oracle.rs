//! Judges the journal from outside: it knows what the source wrote, what was promised, and which faults were injected.
//!
//! Invariants tried: every state that is still promised reads back sector by sector; a hole is served only where an
//! injected fault explains it; a point is listed exactly when all its disks have it; positions are monotone; nothing
//! that was durable is lost without a name, and nothing is called lost that is not. Called by the driver.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::Journal;
use super::manifest::{Epoch, Kind};
use super::records::{At, BLOCKS, Entry, Group, IN_FLIGHT, SECTORS, Seen, Sequence, WINDOW};
use super::source::{Source, SourceDisk};

#[derive(Default)]
struct Faults {
    /// `(epoch, block)`: an image was lost on the medium.
    images: BTreeSet<(usize, usize)>,
    /// Epochs whose run was cut by an opening.
    cut: BTreeSet<usize>,
    /// Records that were lost on the medium and did not come again.
    records: BTreeSet<Sequence>,
    any_group: bool,
    /// Records of groups in flight with a lost one: a log that ends in it is cut before them, whole as they are.
    in_flight: BTreeSet<Sequence>,
    /// Records that were given up, for whatever reason.
    given_up: BTreeSet<Sequence>,
}

#[derive(Default)]
struct Known {
    /// What the end of each closed epoch is; `None` where it is no state.
    ends: BTreeMap<usize, Option<Vec<u32>>>,
    faults: Faults,
    durable: Sequence,
    applied: Sequence,
    /// Up to here the log was freed whoever needed it: there is nothing inside epochs that began by then.
    hollow: Sequence,
    /// Blocks it was found with, and the last record before it grew.
    found_blocks: usize,
    grown: Option<Sequence>,
    /// How many images had rotted, and how many holes were put into runs, when its runs were read last.
    scrubbed: Option<(usize, usize)>,
}

/// How much was judged, so that a test can see that it was not nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Judged {
    pub(crate) views: usize,
    pub(crate) hole_sectors: usize,
    pub(crate) points: usize,
    pub(crate) degraded: usize,
    pub(crate) damaged: usize,
}

pub(crate) struct Oracle {
    known: Vec<Known>,
    /// Numbers of groups that may be cut off with a lost one.
    doubtful: BTreeSet<usize>,
    /// Ends of epochs that were pinned, for good: `(disk, epoch)`.
    pub(crate) pinned: BTreeSet<(usize, usize)>,
    pub(crate) judged: Judged,
}

type Verdict = Result<(), String>;

impl Oracle {
    pub(crate) fn new(found_blocks: &[usize]) -> Self {
        let known = |found_blocks: &usize| Known { found_blocks: *found_blocks, ..Known::default() };
        Self {
            known: found_blocks.iter().map(known).collect(),
            pinned: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            judged: Judged::default(),
        }
    }

    /// A durable commit group rotted.
    pub(crate) fn group_rotted(&mut self, group: &Group) {
        for entry in &group.entries {
            if let Entry::Record(record) = entry {
                self.known[record.disk].faults.records.insert(record.sequence);
            }
        }
        self.doubtful.extend(group.number..group.number + IN_FLIGHT);
        // The group may have held an APPLIED of any disk.
        self.known.iter_mut().for_each(|known| known.faults.any_group = true);
    }

    /// The journal stopped: which records does a lost group put in doubt?
    pub(crate) fn stopped(&mut self, journal: &Journal) {
        for segment in &journal.catalogue.segments {
            let media = &journal.segments[segment.file];
            let mine = |group: &&Group| group.salt == segment.salt && self.doubtful.contains(&group.number);
            for group in (0..media.len()).filter_map(|slot| media.good(slot)).filter(mine) {
                for entry in &group.entries {
                    if let Entry::Record(record) = entry {
                        self.known[record.disk].faults.in_flight.insert(record.sequence);
                    }
                }
            }
        }
    }

    /// An image in a run that reaches up to `epoch` rotted.
    pub(crate) fn image_rotted(&mut self, disk: usize, epoch: usize, block: usize) {
        self.known[disk].faults.images.insert((epoch, block));
    }

    /// Opening dropped these blocks' frames from the active run: after rot, their images may be gone with it.
    pub(crate) fn frames_dropped(&mut self, disk: usize, epoch: usize, blocks: &[usize]) {
        let faults = &mut self.known[disk].faults;
        if faults.images.iter().any(|image| image.0 == epoch) {
            faults.images.extend(blocks.iter().map(|block| (epoch, *block)));
        }
        faults.cut.insert(epoch);
    }

    /// Notes epochs that ended; `rolled_to` is what a rollback was to make of its disk.
    pub(crate) fn epochs_ended(&mut self, journal: &Journal, source: &Source, rolled_to: Option<&Vec<u32>>) {
        for (disk, catalogue) in journal.catalogue.disks.iter().enumerate() {
            for (number, epoch) in catalogue.epochs.iter().enumerate() {
                let Some(last) = epoch.last else { continue };
                let known = &mut self.known[disk].ends;
                // An epoch without records ends as the one before it did, which may have rolled back.
                let before = known.get(&number.wrapping_sub(1)).cloned();
                known.entry(number).or_insert_with(|| match (epoch.kind, before) {
                    (Kind::Rollback(_), _) => rolled_to.cloned(),
                    (_, Some(before)) if epoch.first > last => before,
                    _ => source.disks[disk].states[last].clone(),
                });
            }
        }
    }

    /// The end of this epoch is no state: its rollback met a hole.
    pub(crate) fn forget_end(&mut self, disk: usize, epoch: usize) {
        self.known[disk].ends.insert(epoch, None);
    }

    /// The disk is larger behind this record.
    pub(crate) fn grows(&mut self, disk: usize, after: Sequence) {
        self.known[disk].grown = Some(after);
    }

    /// All runs of a disk were read; `holes` were put into runs so far.
    pub(crate) fn scrubbed(&mut self, disk: usize, holes: usize) {
        let known = &mut self.known[disk];
        known.scrubbed = Some((known.faults.images.len(), holes));
    }

    /// The log is freed up to these sequences, and what waits is carried.
    pub(crate) fn carries(&mut self, high: &[Sequence]) {
        for (known, high) in self.known.iter_mut().zip(high) {
            known.hollow = known.hollow.max(*high);
        }
    }

    /// States from the given sequence on are none any more.
    pub(crate) fn given_up(&mut self, journal: &Journal, disk: usize, from: Sequence) {
        self.known[disk].faults.given_up.insert(from);
        for (number, state) in &mut self.known[disk].ends {
            let last = journal.catalogue.disks[disk].epochs[*number].last;
            if last.is_some_and(|last| last >= from) {
                *state = None;
            }
        }
    }

    /// Every place of a disk that must be readable, with what it must read.
    pub(crate) fn promised(&self, journal: &Journal, source: &Source, disk: usize) -> Vec<(At, Vec<u32>)> {
        let (known, catalogue) = (&self.known[disk], &journal.catalogue.disks[disk]);
        let mut promised = Vec::new();
        let pinned = |epoch: usize| self.pinned.contains(&(disk, epoch));
        let kept = |epoch: usize| catalogue.keeps_end_of(epoch) || pinned(epoch);
        for (epoch, state) in known.ends.iter().filter(|end| kept(*end.0)) {
            let upto = catalogue.epochs.get(*epoch).and_then(|epoch| epoch.last).unwrap_or(0);
            promised.extend(state.clone().map(|state| (At { base: epoch + 1, upto }, state)));
        }
        let own = &source.disks[disk];
        let start = Self::window_start(journal, own);
        for sequence in start..=own.acknowledged {
            let at = catalogue.locate(sequence);
            let whole = |epoch: &Epoch| epoch.kind == Kind::Normal && epoch.first > known.hollow;
            let protected = catalogue.epochs.get(at.base).is_some_and(whole);
            if let Some(state) = own.states[sequence].as_ref().filter(|_| protected) {
                promised.push((at, state.clone()));
            }
        }
        promised
    }

    /// Last state from before the any-write window.
    fn window_start(journal: &Journal, own: &SourceDisk) -> Sequence {
        let old = own.stream.iter().filter(|record| record.time + WINDOW <= journal.now);
        old.map(|record| record.sequence).max().unwrap_or(0)
    }

    /// Reads everything that is promised.
    pub(crate) fn check(&mut self, journal: &Journal, source: &Source) -> Verdict {
        let mut promised = Vec::new();
        for disk in 0..self.known.len() {
            let ended = journal.catalogue.disks[disk].epochs.len() - 1;
            if self.known[disk].ends.keys().next_back().is_some_and(|last| *last >= ended) {
                return Err(format!("disk {disk}: an ended epoch is forgotten"));
            }
            let states = self.promised(journal, source, disk);
            for (at, state) in &states {
                let view = journal.view(disk, *at);
                self.judge_view(journal, disk, *at, &view, state)?;
            }
            promised.push(states.into_iter().map(|state| state.0).collect());
            self.positions(journal, source, disk)?;
        }
        self.points(journal, source, &promised)
    }

    fn judge_view(
        &mut self,
        journal: &Journal,
        disk: usize,
        at: At,
        view: &[Seen],
        state: &[u32],
    ) -> Verdict {
        self.judged.views += 1;
        let known = &self.known[disk];
        let grown = known.grown.is_some_and(|after| after < at.upto);
        let blocks = if grown { BLOCKS } else { known.found_blocks };
        if view.len() != blocks {
            return Err(format!("disk {disk} {at:?}: has {} blocks, had {blocks}", view.len()));
        }
        self.judge_damage(journal, disk, at)?;
        for (block, seen) in view.iter().enumerate() {
            // Behind the end of a state that is older than the growth stand zeros.
            let wanted: [u32; SECTORS] =
                std::array::from_fn(|at| state.get(block * SECTORS + at).copied().unwrap_or(0));
            if seen.iter().zip(&wanted).any(|(seen, wanted)| seen.is_some_and(|seen| seen != *wanted)) {
                return Err(format!("disk {disk} {at:?}: block {block} reads {seen:?}, was {wanted:?}"));
            }
            let holes = seen.iter().filter(|seen| seen.is_none()).count();
            self.judged.hole_sectors += holes;
            if holes > 0 && !self.explains(journal, disk, at, block) {
                return Err(format!("disk {disk} {at:?}: block {block} is a hole that no fault explains"));
            }
        }
        Ok(())
    }

    /// Where images alone can be damaged, and all runs were read since: the end of an epoch has a hole, also behind the end
    /// it had, for a rollback needs that, if and only if that is known of it.
    fn judge_damage(&mut self, journal: &Journal, disk: usize, at: At) -> Verdict {
        let (known, catalogue) = (&self.known[disk], &journal.catalogue.disks[disk]);
        let faults = &known.faults;
        let images_only = !faults.any_group
            && faults.cut.is_empty()
            && faults.given_up.is_empty()
            && known.hollow == 0
            && known.scrubbed == Some((faults.images.len(), journal.found.holes));
        let is_end = catalogue.epochs.get(at.base).is_none_or(|epoch| epoch.first > at.upto);
        if !images_only || !is_end {
            return Ok(());
        }
        let (has_hole, is_known) =
            (journal.view_of_all(disk, at).iter().flatten().any(Option::is_none), catalogue.is_damaged(at));
        self.judged.damaged += usize::from(is_known);
        match (has_hole, is_known) {
            (true, false) => Err(format!("disk {disk} {at:?}: it is damaged, and nobody knows")),
            (false, true) => Err(format!("disk {disk} {at:?}: it is called damaged, and is whole")),
            _ => Ok(()),
        }
    }

    /// Whether an injected fault explains a hole.
    fn explains(&self, journal: &Journal, disk: usize, at: At, block: usize) -> bool {
        let known = &self.known[disk];
        let faults = &known.faults;
        let first =
            journal.catalogue.disks[disk].epochs.get(at.base).map_or(at.upto + 1, |epoch| epoch.first);
        let catalogue = &journal.catalogue.disks[disk];
        let gone = |lost| {
            let gone = journal.disks[disk].missing.contains(&lost) || catalogue.is_given_up(lost);
            gone && faults.in_flight.contains(&lost)
        };
        faults.images.iter().any(|image| image.0 >= at.base && image.1 == block)
            || faults.any_group && faults.images.iter().any(|image| image.0 >= at.base)
            || faults.any_group && faults.cut.iter().any(|epoch| *epoch >= at.base)
            || faults.records.range(first..=at.upto.max(first)).any(|lost| *lost <= at.upto)
            // The log does not say any more what the records before APPLIED wrote.
            || (known.hollow > 0 || !faults.given_up.is_empty()) && faults.images.iter().any(|image| image.0 >= at.base)
            // What was given up may have been written before a run was cut, and cannot be compared any more.
            || !faults.given_up.is_empty() && faults.cut.iter().any(|epoch| *epoch >= at.base)
            || faults.given_up.range(first..=at.upto.max(first)).any(|lost| *lost <= at.upto)
            // After such a loss the log may have to be cut before groups that were whole.
            || (first..=at.upto).any(gone)
    }

    /// I5: each position is monotone, and all of `received ≥ durable ≥ applied`.
    fn positions(&mut self, journal: &Journal, source: &Source, disk: usize) -> Verdict {
        let (known, now, own) = (&mut self.known[disk], &journal.disks[disk], &source.disks[disk]);
        if now.received < now.durable || now.durable < now.applied {
            let (received, durable, applied) = (now.received, now.durable, now.applied);
            return Err(format!("disk {disk}: received {received}, durable {durable}, applied {applied}"));
        }
        if now.durable < own.acknowledged.max(known.durable) {
            return Err(format!("disk {disk}: durable records are gone: {} left", now.durable));
        }
        known.durable = now.durable;
        Ok(())
    }

    /// After an opening: applied never falls behind what its APPLIED record made durable, nor is anything lost unnamed.
    pub(crate) fn check_open(&mut self, journal: &Journal, source: &Source, alarms: usize) -> Verdict {
        for (disk, known) in self.known.iter_mut().enumerate() {
            if alarms > 0 && !known.faults.any_group {
                return Err("durable records are called lost, and none are".into());
            }
            let (now, catalogue) = (&journal.disks[disk], &journal.catalogue.disks[disk]);
            if !now.missing.is_empty() && !known.faults.any_group {
                return Err(format!(
                    "disk {disk}: records {:?} are missing, and nothing was damaged",
                    now.missing
                ));
            }
            if now.applied < known.applied && !known.faults.any_group {
                return Err(format!("disk {disk}: applied fell from {} to {}", known.applied, now.applied));
            }
            known.applied = now.applied;
            let acknowledged = source.disks[disk].acknowledged;
            // What was sent again is whole again.
            known.faults.records.retain(|lost| journal.record(disk, *lost).is_none());
            let kept = known
                .faults
                .records
                .range(catalogue.freed.min(now.applied) + 1..)
                .filter(|lost| **lost <= acknowledged);
            for lost in kept {
                if !now.missing.contains(lost) && !catalogue.is_given_up(*lost) {
                    return Err(format!("disk {disk}: record {lost} is lost and nobody says so"));
                }
            }
        }
        Ok(())
    }

    /// A point is listed if and only if its mark is durable and its state kept on every disk.
    fn points(&mut self, journal: &Journal, source: &Source, promised: &[BTreeSet<At>]) -> Verdict {
        let listed: BTreeSet<usize> = journal.points().into_iter().collect();
        self.judged.points += listed.len();
        for mark in 1..=source.marks {
            let on = |disk: usize| {
                source.disks[disk].marks.iter().find(|entry| entry.0 == mark).map(|entry| entry.1)
            };
            let durable =
                |disk: usize| on(disk).is_some_and(|sequence| sequence <= journal.disks[disk].durable);
            let all = (0..self.known.len()).all(durable);
            if listed.contains(&mark) && !all {
                return Err(format!("point {mark} is listed and not durable on every disk"));
            }
            if listed.contains(&mark) {
                let places = (0..self.known.len()).filter_map(|disk| Some((disk, on(disk)?))).collect();
                self.listed(journal, source, mark, places, promised)?;
            }
            let is_promised = |disk: usize| {
                let Some(sequence) = on(disk).filter(|sequence| *sequence <= source.disks[disk].acknowledged)
                else {
                    return false;
                };
                let rotted = self.known[disk].faults.records.contains(&sequence);
                // A mark that left the log with the rest of its epoch is a point only where an epoch ended at it.
                let freed = sequence <= self.known[disk].hollow
                    && journal.catalogue.disks[disk].kept_end(mark).is_none();
                let lost = rotted || freed || journal.disks[disk].missing.contains(&sequence);
                !lost && promised[disk].contains(&journal.catalogue.disks[disk].locate(sequence))
            };
            if !listed.contains(&mark) && all && (0..self.known.len()).all(is_promised) {
                return Err(format!("point {mark} is on every disk and not listed"));
            }
        }
        Ok(())
    }

    /// A point that is listed can be read, as far as no fault explains that it cannot, and is a state of the source or
    /// said to promise less.
    fn listed(
        &mut self,
        journal: &Journal,
        source: &Source,
        mark: usize,
        places: Vec<(usize, Sequence)>,
        promised: &[BTreeSet<At>],
    ) -> Verdict {
        let degraded = places.iter().any(|(disk, sequence)| journal.is_degraded(*disk, *sequence));
        self.judged.degraded += usize::from(degraded);
        for (disk, sequence) in places {
            let catalogue = &journal.catalogue.disks[disk];
            let is_end = catalogue.kept_end(mark).is_some();
            let at = catalogue.locate(sequence);
            let is_state = source.disks[disk].states[sequence].is_some();
            if !degraded && !is_state && !promised[disk].contains(&at) {
                return Err(format!("point {mark} is listed as a state and is none on disk {disk}"));
            }
            if is_end || promised[disk].contains(&at) {
                continue;
            }
            for (block, seen) in journal.view(disk, at).iter().enumerate() {
                if seen.contains(&None) && !self.explains(journal, disk, at, block) {
                    return Err(format!("point {mark} is listed and cannot be read: disk {disk} {at:?}"));
                }
            }
        }
        Ok(())
    }
}
