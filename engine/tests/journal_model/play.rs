//! Plays one seed: a source that writes, a journal that is stopped at any step, faults, operators, and the oracle.
//!
//! Invariants: everything follows from the seed; a play ends with a quiet finale in which the target must come to stand
//! exactly where the source does. Called by the tests in `journal_model.rs`.

use super::actions::{ACTIONS, Action, favoured};
use super::device::{Chaos, Stop};
use super::growth::SMALL;
use super::machine::{Found, Journal};
use super::manifest::Kind;
use super::mutations::Rule;
use super::operators::Rollback;
use super::oracle::Oracle;
use super::records::{BLOCKS, Entry, SECTORS, Sequence};
pub(crate) use super::report::Report;
use super::rng::Rng;
use super::source::Source;

/// Everybody in one play.
pub(crate) struct Player {
    pub(crate) journal: Journal,
    pub(crate) source: Source,
    pub(crate) oracle: Oracle,
    pub(crate) report: Report,
    pub(crate) rollback: Option<Rollback>,
    pub(crate) bulk_written: Vec<Vec<usize>>,
    /// What the target asked for again.
    pub(crate) again: Vec<Vec<Sequence>>,
    /// How often each action of [`Player::act`] is taken.
    pub(crate) weights: [usize; ACTIONS.len()],
    pub(crate) faults_left: usize,
}

/// Under which conditions a seed is played, and without which rule.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Profile {
    /// The play has the weights and faults in which the loss of this rule shows, whether the rule is kept or not.
    pub(crate) favours: Option<Rule>,
    /// This rule is not kept.
    pub(crate) broken: Option<Rule>,
}

impl Profile {
    /// A rule is broken, and all else is as it is in [`Self::control`].
    pub(crate) const fn without(rule: Rule) -> Self {
        Self { favours: Some(rule), broken: Some(rule) }
    }

    /// What [`Self::without`] this rule is held against: the same weights and faults, and every rule is kept.
    pub(crate) const fn control(rule: Rule) -> Self {
        Self { favours: Some(rule), broken: None }
    }
}

/// Plays a seed with all rules, or all but one.
pub(crate) fn play(seed: u64, profile: Profile, trace: bool) -> Result<Report, String> {
    let mut player = Player::new(seed, profile, trace);
    player.run().map_err(|failure| format!("seed {seed} at {}: {failure}", player.journal.now))?;
    player.report.take(player.journal.found, player.oracle.judged);
    Ok(player.report)
}

impl Player {
    fn new(seed: u64, profile: Profile, trace: bool) -> Self {
        let Profile { favours, broken } = profile;
        let mut rng = Rng::new(seed);
        let disks = 1 + usize::from(rng.chance(650));
        let created: Vec<bool> = (0..disks).map(|_| rng.chance(500)).collect();
        let mut targets: Vec<Vec<u32>> = created
            .iter()
            .map(|created| (0..BLOCKS * SECTORS).map(|at| if *created { 0 } else { 1 + at as u32 }).collect())
            .collect();
        let mut source = Source::new(&mut rng, &targets, &created);
        let small: Vec<bool> = created.iter().map(|created| !created && rng.chance(400)).collect();
        for (disk, target) in targets.iter_mut().enumerate().filter(|(disk, _)| small[*disk]) {
            target[SMALL * SECTORS..].fill(0);
            source.disks[disk].begin_small();
        }
        // A broken rule shows soonest where much goes wrong; all rules together must stand that too.
        let harsh = rng.chance(300) || favours.is_some();
        let many = favours == Some(Rule::WaitForLastApplied); // This one takes a rare fault at a rare place.
        let faults_left = if many {
            12
        } else if harsh {
            2
        } else {
            rng.below(4).saturating_sub(1)
        };
        let flush_failure_per_mille = if harsh || rng.chance(200) { 10 } else { 0 };
        let stop_per_mille = if harsh { [10, 25][rng.below(2)] } else { [0, 3, 10][rng.below(3)] };
        let favour = |action: Action| {
            favoured(favours).iter().find(|entry| entry.0 == action).map_or(1, |entry| entry.1)
        };
        let weights = ACTIONS.map(|(action, weight)| weight * [1, 2, 2, 2, 5][rng.below(5)] * favour(action));
        let retries_failed_flush = broken == Some(Rule::FailedFlushStops);
        // Nothing goes wrong while the journal is made.
        let chaos = Chaos { rng, stop_per_mille: 0, flush_failure_per_mille: 0, retries_failed_flush };
        let mut journal = Journal::new(chaos, broken, trace, targets, created);
        journal.note(|| format!("seed {seed}: {disks} disks, created {:?}", journal.created));
        let made = journal.add_segment();
        debug_assert!(made.is_ok());
        (journal.chaos.stop_per_mille, journal.chaos.flush_failure_per_mille) =
            (stop_per_mille, flush_failure_per_mille);
        let bulk_written = vec![Vec::new(); disks];
        for (blocks, _) in journal.found_blocks.iter_mut().zip(&small).filter(|disk| *disk.1) {
            *blocks = SMALL;
        }
        let (oracle, again) = (Oracle::new(&journal.found_blocks), vec![Vec::new(); disks]);
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
            Action::Carry => self.carry()?,
            Action::GiveUp => self.give_up(disk)?,
            Action::Grow => self.grow(disk)?,
            Action::Scrub => {
                self.journal.scrub(disk)?;
                self.oracle.scrubbed(disk, self.journal.found.holes);
            }
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
        for own in &mut self.source.disks {
            let room = self.journal.chaos.rng.below(6);
            for record in own.stream.iter().skip(own.sent).take(room) {
                entries.push(Entry::Record(record.clone()));
                own.sent = record.sequence;
            }
        }
        if entries.is_empty() { Ok(()) } else { self.journal.append(entries) }
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
        if let Err(stop) = opened {
            return Ok(Err(stop)); // what it would say of losses may be what memory knew before
        }
        self.tell_what_is_lost();
        self.grow_with_target();
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
            let (here, behind) = live.split_at(own.now.len());
            if here != own.now || behind.iter().any(|value| *value != 0) {
                return Err(format!("disk {disk}: the target reads {live:?}, the source is {:?}", own.now));
            }
        }
        Ok(())
    }
}

impl Journal {
    /// What a power loss leaves of every device.
    pub(crate) fn power_loss(&mut self) {
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
