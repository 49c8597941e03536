//! Plays one seed: a source that writes, a journal that is stopped at any step, faults, operators, and the oracle.
//!
//! Invariants: everything follows from the seed; a play ends with a quiet finale in which the target must come to stand
//! exactly where the source does. Called by the tests in `journal_model.rs`.

use super::device::{Chaos, Media, Slot, Stop};
use super::machine::{Disk, Found, Journal, RunFile, Writer};
use super::manifest::{Catalogue, Change, Kind};
use super::mutations::Rule;
use super::oracle::{Judged, Oracle};
use super::records::{At, BLOCKS, Entry, Group, SECTORS, SEGMENT_GROUPS, Sequence};
use super::rng::Rng;
use super::source::Source;

/// What a play went through, summed over many.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) stops: usize,
    pub(crate) records: usize,
    pub(crate) epochs: usize,
    pub(crate) merges: usize,
    pub(crate) expired: usize,
    pub(crate) freed: usize,
    pub(crate) rollbacks: usize,
    pub(crate) roll_forwards: usize,
    pub(crate) resyncs: usize,
    pub(crate) rotten_groups: usize,
    pub(crate) rotten_images: usize,
    pub(crate) found: Found,
    pub(crate) judged: Judged,
}

/// A rollback of one disk on its way.
struct Rollback {
    disk: usize,
    /// Where to, what that must give, and the epoch of the rollback; `None` while the disk drains.
    step: Option<(At, Vec<u32>, usize)>,
    /// The newest state before the first rollback, once there was one.
    newest: Option<At>,
    /// Something was rolled back already: the disk is not what the source is.
    rolled: bool,
}

struct Player {
    journal: Journal,
    source: Source,
    oracle: Oracle,
    report: Report,
    rollback: Option<Rollback>,
    bulk_written: Vec<Vec<usize>>,
    /// What the target asked for again.
    again: Vec<Vec<Sequence>>,
    /// How often each action of [`Player::act`] is taken.
    weights: [usize; ACTIONS.len()],
    faults_left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Write,
    Mark,
    Receive,
    Flush,
    Idle,
    Apply,
    Sync,
    Free,
    Thin,
    Expire,
    Pin,
    Roll,
    Rot,
    Stop,
    Wait,
}

/// What can happen, and how often it does; each seed makes some of it rarer and some more frequent.
const ACTIONS: [(Action, usize); 15] = [
    (Action::Write, 200),
    (Action::Mark, 100),
    (Action::Receive, 180),
    (Action::Flush, 90),
    (Action::Idle, 20),
    (Action::Apply, 300),
    (Action::Sync, 160),
    (Action::Free, 60),
    (Action::Thin, 80),
    (Action::Expire, 15),
    (Action::Pin, 10),
    (Action::Roll, 140),
    (Action::Rot, 8),
    (Action::Stop, 6),
    (Action::Wait, 4),
];

/// Some broken rules show only where things meet that rarely do; their plays bring these together more often.
const fn favoured(broken: Option<Rule>) -> &'static [(Action, usize)] {
    match broken {
        Some(Rule::PassedMarkStays) => &[(Action::Stop, 6), (Action::Mark, 3), (Action::Sync, 3)],
        Some(Rule::EditBeforeUnlink) => &[(Action::Thin, 8), (Action::Stop, 4)],
        Some(Rule::FreshSegmentAfterCut) => &[(Action::Stop, 8), (Action::Apply, 3)],
        Some(Rule::RedoImageNotAcrossGap) => &[(Action::Rot, 20), (Action::Mark, 2)],
        Some(Rule::RollbackNamesFrames) => &[(Action::Rot, 5), (Action::Roll, 4)],
        Some(Rule::WaitAtGap) => &[(Action::Rot, 10)],
        Some(Rule::EndIsApplied | Rule::RollbackPins) => &[(Action::Roll, 4)],
        _ => &[],
    }
}

/// Plays a seed with all rules, or all but one.
pub(crate) fn play(seed: u64, broken: Option<Rule>, trace: bool) -> Result<Report, String> {
    let mut player = Player::new(seed, broken, trace);
    player.run().map_err(|failure| format!("seed {seed} at {}: {failure}", player.journal.now))?;
    player.report.found = player.journal.found;
    player.report.judged = player.oracle.judged;
    Ok(player.report)
}

impl Player {
    fn new(seed: u64, broken: Option<Rule>, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let disks = 1 + usize::from(rng.chance(650));
        let created: Vec<bool> = (0..disks).map(|_| rng.chance(500)).collect();
        let targets: Vec<Vec<u32>> = created
            .iter()
            .map(|created| (0..BLOCKS * SECTORS).map(|at| if *created { 0 } else { 1 + at as u32 }).collect())
            .collect();
        let source = Source::new(&mut rng, &targets, &created);
        // A broken rule shows soonest where much goes wrong; all rules together must stand that too.
        let harsh = rng.chance(300) || broken.is_some();
        let faults_left = if harsh { 2 } else { rng.below(4).saturating_sub(1) };
        let flush_failure_per_mille = if harsh || rng.chance(200) { 10 } else { 0 };
        let stop_per_mille = if harsh { [10, 25][rng.below(2)] } else { [0, 3, 10][rng.below(3)] };
        let favour = |action: Action| {
            favoured(broken).iter().find(|entry| entry.0 == action).map_or(1, |entry| entry.1)
        };
        let weights = ACTIONS.map(|(action, weight)| weight * [1, 2, 2, 2, 5][rng.below(5)] * favour(action));
        let retries_failed_flush = broken == Some(Rule::FailedFlushStops);
        // Nothing goes wrong while the journal is made.
        let chaos = Chaos { rng, stop_per_mille: 0, flush_failure_per_mille: 0, retries_failed_flush };
        let mut journal = Journal {
            chaos,
            broken,
            trace,
            now: 0,
            found: Found::default(),
            targets: targets.into_iter().map(Media::disk).collect(),
            segments: Vec::new(),
            manifest: Media::file(),
            runs: (0..disks).map(|file| (file, RunFile::new())).collect(),
            files_made: disks,
            catalogue: Catalogue::new(&created),
            edits: 0,
            disks: vec![Disk::default(); disks],
            writer: Writer { slot: SEGMENT_GROUPS, next_group: 1, ..Writer::default() },
            passed: Default::default(),
            opened_at_mark: 0,
            dropped: Vec::new(),
            created,
        };
        journal.note(|| format!("seed {seed}: {disks} disks, created {:?}", journal.created));
        let made = journal.add_segment();
        debug_assert!(made.is_ok());
        (journal.chaos.stop_per_mille, journal.chaos.flush_failure_per_mille) =
            (stop_per_mille, flush_failure_per_mille);
        let bulk_written = vec![Vec::new(); disks];
        let (oracle, again) = (Oracle::new(disks), vec![Vec::new(); disks]);
        let report = Report::default();
        Self { journal, source, oracle, report, rollback: None, bulk_written, again, weights, faults_left }
    }

    fn run(&mut self) -> Result<(), String> {
        let ticks = self.journal.chaos.rng.between(100, 900);
        for _ in 0..ticks {
            self.tick()?;
        }
        self.finale()
    }

    fn tick(&mut self) -> Result<(), String> {
        self.journal.now += 1;
        self.source.now = self.journal.now;
        if let Err(stop) = self.act() {
            self.reopen(stop)?;
        }
        self.acknowledge();
        self.judge_rollback()?;
        if self.journal.chaos.rng.chance(120) {
            self.oracle.check(&self.journal, &self.source)
        } else {
            Ok(())
        }
    }

    /// The source learns what is durable; the oracle learns which epochs ended.
    fn acknowledge(&mut self) {
        for (own, known) in self.source.disks.iter_mut().zip(&self.journal.disks) {
            own.acknowledged = own.acknowledged.max(known.durable);
        }
        let rolled_to =
            self.rollback.as_ref().and_then(|rollback| rollback.step.as_ref()).map(|step| &step.1);
        self.oracle.epochs_ended(&self.journal, &self.source, rolled_to);
    }

    /// One random step of anybody.
    fn act(&mut self) -> Result<(), Stop> {
        let disk = self.journal.chaos.rng.below(self.source.disks.len());
        let mut at = self.journal.chaos.rng.below(self.weights.iter().sum());
        let chosen = self.weights.iter().position(|weight| {
            let here = at < *weight;
            at = at.wrapping_sub(*weight);
            here
        });
        match chosen.map_or(Action::Wait, |chosen| ACTIONS[chosen].0) {
            Action::Write => self.source.write(&mut self.journal.chaos.rng, disk),
            Action::Mark => self.source.mark(),
            Action::Receive => self.receive()?,
            Action::Flush => self.journal.flush_log()?,
            Action::Idle => {
                self.journal.append(Vec::new())?; // The empty group after 50 ms.
                self.journal.flush_log()?;
            }
            Action::Apply => self.journal.apply(disk)?,
            Action::Sync => self.sync(disk)?,
            Action::Free => self.free()?,
            Action::Thin => self.thin(disk)?,
            Action::Expire => self.expire(disk)?,
            Action::Pin => self.pin()?,
            Action::Roll => self.roll(disk)?,
            Action::Rot => self.rot()?,
            Action::Stop if self.journal.chaos.rng.chance(600) => return Err(Stop::PowerLoss),
            Action::Stop => return Err(Stop::Kill),
            Action::Wait => self.journal.now += 10, // The source's clock follows with the next tick.
        }
        Ok(())
    }

    /// Some records of some disks arrive and become one group.
    fn receive(&mut self) -> Result<(), Stop> {
        let mut entries = Vec::new();
        for (disk, again) in self.again.iter_mut().enumerate() {
            for sequence in again.drain(..) {
                entries.push(Entry::Record(self.source.disks[disk].stream[sequence - 1].clone()));
            }
        }
        for (disk, own) in self.source.disks.iter_mut().enumerate() {
            let room = self.journal.chaos.rng.below(6);
            for record in own.stream.iter().skip(own.sent).take(room) {
                entries.push(Entry::Record(record.clone()));
                own.sent = record.sequence;
            }
        }
        if entries.is_empty() { Ok(()) } else { self.journal.append(entries) }
    }

    /// Initial sync without points, or the compare of a disk that differs.
    fn sync(&mut self, disk: usize) -> Result<(), Stop> {
        if self.source.disks[disk].bulk {
            return self.bulk(disk);
        }
        let rolling = self.rollback.as_ref().is_some_and(|rollback| rollback.disk == disk);
        if !self.source.disks[disk].suspended || rolling || !self.is_drained(disk) {
            return Ok(());
        }
        let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.journal.live(disk, block)).collect();
        if !self.journal.keeps(Rule::NoBypassWithPoints) {
            for block in 0..BLOCKS {
                self.journal.bulk(disk, block, self.source.block(disk, block))?;
            }
        }
        self.journal.note(|| format!("disk {disk}: resync"));
        self.source.resync(disk, &live);
        self.report.resyncs += 1;
        Ok(())
    }

    fn bulk(&mut self, disk: usize) -> Result<(), Stop> {
        let done = &self.journal.catalogue.disks[disk].bulk_done;
        let written = &self.bulk_written[disk];
        let open = (0..BLOCKS).find(|block| !done.contains(block) && !written.contains(block));
        if done.len() == BLOCKS {
            self.source.disks[disk].bulk = false;
            return Ok(());
        }
        if let Some(block) = open.filter(|_| self.journal.chaos.rng.chance(700)) {
            let content = self.source.block(disk, block);
            // A resumed initial sync compares hashes and sends what differs.
            if self.journal.live(disk, block) != content {
                self.journal.bulk(disk, block, content)?;
            }
            self.bulk_written[disk].push(block);
            return Ok(());
        }
        let blocks = std::mem::take(&mut self.bulk_written[disk]);
        if blocks.is_empty() { Ok(()) } else { self.journal.bulk_progress(disk, blocks) }
    }

    fn is_drained(&self, disk: usize) -> bool {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let all = own.stream.len();
        own.sent == all
            && known.durable == all
            && known.applied == all
            && !matches!(self.journal.catalogue.disks[disk].kind(), Kind::Rollback(_))
    }

    fn free(&mut self) -> Result<(), Stop> {
        let before = self.journal.catalogue.segments.len();
        self.journal.free_segment()?;
        self.report.freed += before - self.journal.catalogue.segments.len();
        Ok(())
    }

    fn expire(&mut self, disk: usize) -> Result<(), Stop> {
        let before = self.journal.catalogue.disks[disk].runs.len();
        self.journal.expire(disk)?;
        self.report.expired += before - self.journal.catalogue.disks[disk].runs.len();
        Ok(())
    }

    fn thin(&mut self, disk: usize) -> Result<(), Stop> {
        let runs = &self.journal.catalogue.disks[disk].runs;
        let Some(low) = runs.get(self.journal.chaos.rng.below(runs.len())).map(|run| run.low) else {
            return Ok(());
        };
        let before = runs.len();
        self.journal.merge_runs(disk, low)?;
        self.report.merges += before - self.journal.catalogue.disks[disk].runs.len();
        Ok(())
    }

    /// Pins a point that has the end of an epoch on every disk.
    fn pin(&mut self) -> Result<(), Stop> {
        let ends = |mark: usize| -> Option<Vec<(usize, usize)>> {
            let disks = self.journal.catalogue.disks.iter().enumerate();
            disks.map(|(disk, known)| Some((disk, known.kept_end(mark)?))).collect()
        };
        let points: Vec<_> =
            self.journal.points().into_iter().filter_map(|mark| Some((mark, ends(mark)?))).collect();
        if points.is_empty() || self.oracle.pinned.len() > 1 {
            return Ok(());
        }
        let (mark, ends) = points[self.journal.chaos.rng.below(points.len())].clone();
        self.journal.commit(Change::Pin { mark })?;
        self.oracle.pinned.extend(ends);
        Ok(())
    }

    /// Takes a rollback one step on, or decides on one.
    fn roll(&mut self, disk: usize) -> Result<(), Stop> {
        let Some(rollback) = self.rollback.take() else {
            let own = &self.source.disks[disk];
            if !own.suspended && !own.bulk && self.journal.chaos.rng.chance(40) {
                self.source.disks[disk].suspended = true;
                self.rollback = Some(Rollback { disk, step: None, newest: None, rolled: false });
            }
            return Ok(());
        };
        let disk = rollback.disk;
        let step = rollback.step.as_ref().map(|step| step.2);
        let (newest, rolled) = (rollback.newest, rollback.rolled);
        self.rollback = Some(rollback);
        let Some(epoch) = step else {
            return if self.may_roll_back(disk) { self.begin_rollback(disk, newest, rolled) } else { Ok(()) };
        };
        if self.is_rollback(disk, epoch) {
            self.journal.roll_back(disk)?;
        } else {
            // A stop took the edit that began it. The disk may have to be drained anew, and the point may have gone.
            let newest = newest.filter(|_| rolled);
            self.rollback = Some(Rollback { disk, step: None, newest, rolled });
        }
        Ok(())
    }

    fn is_rollback(&self, disk: usize, epoch: usize) -> bool {
        let epoch = self.journal.catalogue.disks[disk].epochs.get(epoch);
        epoch.is_some_and(|epoch| matches!(epoch.kind, Kind::Rollback(_)))
    }

    /// Whether all that was sent is durable and applied.
    fn may_roll_back(&self, disk: usize) -> bool {
        let (own, known) = (&self.source.disks[disk], &self.journal.disks[disk]);
        let durable = own.sent == own.stream.len() && known.durable == own.stream.len();
        let rolls = matches!(self.journal.catalogue.disks[disk].kind(), Kind::Rollback(_));
        durable && !rolls && (known.applied == known.durable || !self.journal.keeps(Rule::RollbackAfterDrain))
    }

    fn begin_rollback(&mut self, disk: usize, newest: Option<At>, rolled: bool) -> Result<(), Stop> {
        let promised = self.oracle.promised(&self.journal, &self.source, disk);
        let whole = |at: &At| self.journal.view(disk, *at).iter().flatten().all(Option::is_some);
        let places: Vec<_> = promised.into_iter().filter(|place| whole(&place.0)).collect();
        let own = &mut self.source.disks[disk];
        if places.is_empty() {
            own.suspended = rolled;
            self.rollback = None;
            return Ok(());
        }
        let (to, state) = places[self.journal.chaos.rng.below(places.len())].clone();
        let epoch = self.journal.catalogue.disks[disk].active() + 1;
        let newest = newest
            .or(own.states[own.stream.len()].is_some().then_some(At { base: epoch, upto: own.stream.len() }));
        self.rollback = Some(Rollback { disk, step: Some((to, state, epoch)), newest, rolled });
        self.journal.begin_rollback(disk, to)
    }

    /// A finished rollback is judged; then another follows, or the way forward, or a compare.
    fn judge_rollback(&mut self) -> Result<(), String> {
        let Some(Rollback { disk, step: Some((to, state, epoch)), newest, .. }) = &self.rollback else {
            return Ok(());
        };
        let (disk, to, newest) = (*disk, *to, *newest);
        if !self.is_rollback(disk, *epoch) || self.journal.catalogue.disks[disk].active() == *epoch {
            return Ok(());
        }
        let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.journal.live(disk, block)).collect();
        // A block that became a hole on the way was left as it stood; then the rollback is not whole.
        let wanted: Vec<Option<u32>> = self.journal.view(disk, to).into_iter().flatten().collect();
        if wanted.contains(&None) {
            self.oracle.forget_end(disk, *epoch);
        } else if live != *state {
            return Err(format!("disk {disk}: rolled back to {to:?}, reads {live:?}, was {state:?}"));
        }
        let whole = live == *state;
        self.report.rollbacks += 1;
        let forward = whole && newest == Some(to);
        self.rollback = None;
        if forward {
            self.report.roll_forwards += 1;
            self.source.disks[disk].suspended = false;
        } else if self.journal.chaos.rng.chance(600) {
            self.rollback = Some(Rollback { disk, step: None, newest, rolled: true });
        }
        Ok(())
    }

    /// Injects media corruption into something that is durable, now and then at the moment of a stop.
    fn rot(&mut self) -> Result<(), Stop> {
        let left = self.faults_left;
        match self.journal.chaos.rng.below(if left > 0 { 3 } else { 0 }) {
            0 if left == 0 => {}
            0 => self.rot_group(),
            1 => self.rot_image(false),
            _ => self.rot_image(true),
        }
        if self.faults_left < left && self.journal.chaos.rng.chance(500) {
            Err(Stop::PowerLoss)
        } else {
            Ok(())
        }
    }

    fn rot_group(&mut self) {
        let journal = &mut self.journal;
        let segments = &journal.catalogue.segments;
        let at = journal.chaos.rng.below(segments.len());
        let segment = segments[at];
        // What was cut off once is no part of the log.
        let end = segments.get(at + 1).map_or(journal.writer.next_group, |next| next.first_group);
        let slot = journal.chaos.rng.below(SEGMENT_GROUPS);
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
    fn rot_image(&mut self, newest: bool) {
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

    /// Opens after a stop, however often that stops again, and resumes.
    fn reopen(&mut self, mut stop: Stop) -> Result<(), String> {
        loop {
            self.report.stops += 1;
            self.journal.note(|| format!("STOP: {stop:?}"));
            self.oracle.stopped(&self.journal);
            if stop == Stop::PowerLoss {
                self.journal.power_loss();
            }
            self.bulk_written.iter_mut().for_each(Vec::clear);
            let alarms = self.journal.found;
            match self.try_open(alarms)? {
                Ok(()) => return Ok(()),
                Err(again) => stop = again,
            }
        }
    }

    fn try_open(&mut self, before: Found) -> Result<Result<(), Stop>, String> {
        let opened = self.journal.open().and_then(|()| self.resume());
        for (disk, epoch, blocks) in std::mem::take(&mut self.journal.dropped) {
            self.oracle.frames_dropped(disk, epoch, &blocks);
        }
        self.tell_what_is_lost();
        if let Err(stop) = opened {
            return Ok(Err(stop));
        }
        let alarms = |found: Found| found.by_later_groups + found.by_manifest + found.by_peer;
        let after = alarms(self.journal.found) - alarms(before);
        self.oracle.check_open(&self.journal, &self.source, after)?;
        self.forget_rollback();
        Ok(Ok(()))
    }

    /// A source that was told of a loss compares; points in the lost stretch are none.
    fn tell_what_is_lost(&mut self) {
        for disk in 0..self.source.disks.len() {
            for (from, to) in self.journal.catalogue.disks[disk].lost.clone() {
                for sequence in from..=to {
                    if self.source.give_up(disk, sequence) {
                        self.oracle.given_up(&self.journal, disk, sequence);
                        self.rollback = self.rollback.take().filter(|rollback| rollback.disk != disk);
                    }
                }
            }
        }
    }

    /// Broken rule: a rollback that was cut short counts as done.
    fn forget_rollback(&mut self) {
        if self.journal.keeps(Rule::RollbackRestarts) {
            return;
        }
        for disk in 0..self.journal.disks.len() {
            if matches!(self.journal.catalogue.disks[disk].kind(), Kind::Rollback(_)) {
                let quiet = std::mem::take(&mut self.journal.chaos.stop_per_mille);
                let failures = std::mem::take(&mut self.journal.chaos.flush_failure_per_mille);
                // Cannot stop: both chances are zero.
                _ = self.journal.end_epoch(disk, self.journal.disks[disk].applied, None, Kind::Normal);
                self.journal.chaos.stop_per_mille = quiet;
                self.journal.chaos.flush_failure_per_mille = failures;
            }
        }
    }

    fn resume(&mut self) -> Result<(), Stop> {
        self.journal.opened_at_mark = self.source.marks;
        for disk in 0..self.source.disks.len() {
            let acknowledged = self.source.disks[disk].acknowledged;
            self.again[disk] = self.journal.resume(disk, acknowledged, self.source.grace_start(disk))?;
            self.source.disks[disk].sent = self.journal.disks[disk].received;
        }
        Ok(())
    }

    /// Quiet: everything is sent, applied, compared; then what stands on the media alone is judged once more.
    fn finale(&mut self) -> Result<(), String> {
        self.journal.note(|| "finale".to_owned());
        self.journal.chaos.stop_per_mille = 0;
        self.journal.chaos.flush_failure_per_mille = 0;
        self.faults_left = 0;
        self.reopen(Stop::PowerLoss)?;
        for _ in 0..2000 {
            if (0..self.source.disks.len()).all(|disk| self.is_home(disk)) {
                self.oracle.check(&self.journal, &self.source)?;
                self.reopen(Stop::PowerLoss)?;
                self.acknowledge();
                self.oracle.check(&self.journal, &self.source)?;
                self.report.records += self.source.disks.iter().map(|disk| disk.stream.len()).sum::<usize>();
                self.report.epochs +=
                    self.journal.catalogue.disks.iter().map(|disk| disk.epochs.len()).sum::<usize>();
                return self.same_at_home();
            }
            if let Err(stop) = self.settle() {
                self.reopen(stop)?;
            }
            self.acknowledge();
            self.judge_rollback()?;
        }
        if let Some(rollback) = &self.rollback {
            return Err(format!("disk {}: a rollback never ends", rollback.disk));
        }
        let stuck = (0..self.source.disks.len()).find(|disk| !self.is_home(*disk)).unwrap_or(0);
        let (own, known) = (&self.source.disks[stuck], &self.journal.disks[stuck]);
        Err(format!(
            "disk {stuck}: the target never comes to stand where the source does: {} records, {} sent, {} durable, {} \
             applied, suspended {}, bulk {}",
            own.stream.len(),
            own.sent,
            known.durable,
            known.applied,
            own.suspended,
            own.bulk
        ))
    }

    fn is_home(&self, disk: usize) -> bool {
        let own = &self.source.disks[disk];
        self.is_drained(disk) && !own.suspended && !own.bulk && self.rollback.is_none()
    }

    fn settle(&mut self) -> Result<(), Stop> {
        self.receive()?;
        self.journal.flush_log()?;
        for disk in 0..self.source.disks.len() {
            self.journal.apply(disk)?;
            self.sync(disk)?;
            if self.rollback.as_ref().is_some_and(|rollback| rollback.step.is_none() && !rollback.rolled) {
                // Nothing was rolled back yet: the operator thinks better of it.
                let disk = self.rollback.take().map_or(disk, |rollback| rollback.disk);
                self.source.disks[disk].suspended = false;
            }
            self.roll(disk)?;
        }
        if self.journal.chaos.rng.chance(50) {
            self.source.mark();
        }
        Ok(())
    }

    fn same_at_home(&self) -> Result<(), String> {
        for (disk, own) in self.source.disks.iter().enumerate() {
            let live: Vec<u32> = (0..BLOCKS).flat_map(|block| self.journal.live(disk, block)).collect();
            if live != own.now {
                return Err(format!("disk {disk}: the target reads {live:?}, the source is {:?}", own.now));
            }
        }
        Ok(())
    }
}

impl Journal {
    /// What a power loss leaves of every device.
    fn power_loss(&mut self) {
        let rng = &mut self.chaos.rng;
        self.segments.iter_mut().for_each(|file| file.power_loss(rng));
        self.targets.iter_mut().for_each(|file| file.power_loss(rng));
        self.manifest.power_loss(rng);
        for run in self.runs.values_mut() {
            run.frames.power_loss(rng);
            run.index.power_loss(rng);
        }
    }
}
