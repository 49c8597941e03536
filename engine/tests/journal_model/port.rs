//! The apply protocol of the journal in its plainest form: redo log, one undo run per epoch, target written in place.
//!
//! Invariants tried: whatever a power loss leaves of unflushed writes, every kept epoch boundary reads back exactly, and
//! nothing that was called durable is lost. A [`Broken`] rule must make some seed fail. Called by `journal_model.rs`.

use std::collections::BTreeMap;

use super::rng::Rng;

const BLOCKS: usize = 12;

/// A rule of the protocol that a test takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The target is written before the undo frames are flushed.
    NoUndoBarrier,
    /// A block is captured again in an epoch that already has its before-image.
    Recapture,
    /// Thinning keeps the newer of two images.
    NewestWins,
    /// A window is called applied before the target is flushed.
    NoTargetFlush,
}

/// A device with a volatile cache: a power loss keeps any subset of what was not flushed.
struct Disk {
    durable: Vec<u32>,
    pending: Vec<(usize, u32)>,
}

impl Disk {
    fn read(&self, block: usize) -> u32 {
        self.pending.iter().rev().find(|write| write.0 == block).map_or(self.durable[block], |write| write.1)
    }

    fn flush(&mut self) {
        for (block, value) in self.pending.drain(..) {
            self.durable[block] = value;
        }
    }

    fn power_loss(&mut self, rng: &mut Rng) {
        self.pending.retain(|_| rng.chance(500));
        self.flush();
    }
}

/// An append-only file: a power loss keeps any prefix of what was not flushed.
struct File<T> {
    durable: Vec<T>,
    pending: Vec<T>,
}

impl<T> File<T> {
    const fn new() -> Self {
        Self { durable: Vec::new(), pending: Vec::new() }
    }

    fn flush(&mut self) {
        self.durable.append(&mut self.pending);
    }

    fn power_loss(&mut self, rng: &mut Rng) {
        self.pending.truncate(rng.between(0, self.pending.len()));
        self.flush();
    }

    fn all(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.durable.iter().chain(&self.pending)
    }
}

#[derive(Clone, Copy)]
struct Record {
    sequence: usize,
    epoch: usize,
    block: usize,
    value: u32,
}

type Images = BTreeMap<usize, u32>;

struct Model {
    rng: Rng,
    broken: Option<Broken>,
    target: Disk,
    log: File<Record>,
    runs: BTreeMap<usize, File<(usize, u32)>>,
    merged: Vec<(usize, usize, Images)>,
    script: Vec<Record>,
    oracle: Vec<Vec<u32>>,
    sent: usize,
    durable: usize,
    applied: usize,
    floor: usize,
}

struct PowerLoss;

impl Model {
    fn new(seed: u64, broken: Option<Broken>) -> Self {
        let mut rng = Rng::new(seed);
        let mut now = vec![0; BLOCKS];
        let (mut oracle, mut script) = (vec![now.clone()], Vec::new());
        for epoch in 1..=rng.between(3, 7) {
            for _ in 0..rng.between(1, 8) {
                let (sequence, block) = (script.len() + 1, rng.below(BLOCKS));
                let value = sequence as u32;
                now[block] = value;
                script.push(Record { sequence, epoch, block, value });
            }
            oracle.push(now.clone());
        }
        let target = Disk { durable: vec![0; BLOCKS], pending: Vec::new() };
        Self {
            rng,
            broken,
            target,
            log: File::new(),
            runs: BTreeMap::new(),
            merged: Vec::new(),
            script,
            oracle,
            sent: 0,
            durable: 0,
            applied: 0,
            floor: 0,
        }
    }

    fn last(&self, epoch: usize) -> usize {
        self.script
            .iter()
            .filter(|record| record.epoch <= epoch)
            .map(|record| record.sequence)
            .max()
            .unwrap_or(0)
    }

    fn power_loss(&mut self) {
        self.log.power_loss(&mut self.rng);
        self.target.power_loss(&mut self.rng);
        self.runs.values_mut().for_each(|run| run.power_loss(&mut self.rng));
        self.sent = self.log.durable.len();
    }

    fn may_lose_power(&mut self) -> Result<(), PowerLoss> {
        if self.rng.chance(40) { Err(PowerLoss) } else { Ok(()) }
    }

    fn apply(&mut self) -> Result<(), PowerLoss> {
        let Some(first) = self.log.durable.get(self.applied).copied() else { return Ok(()) };
        let room = self.rng.between(1, 5);
        let todo = self.log.durable[self.applied..].iter().take_while(|record| record.epoch == first.epoch);
        let window: Vec<Record> = todo.take(room).copied().collect();
        let new: Images = window.iter().map(|record| (record.block, record.value)).collect();
        for &block in new.keys() {
            let run = self.runs.entry(first.epoch).or_insert_with(File::new);
            if self.broken == Some(Broken::Recapture) || run.all().all(|frame| frame.0 != block) {
                run.pending.push((block, self.target.read(block)));
            }
            self.may_lose_power()?;
        }
        if self.broken != Some(Broken::NoUndoBarrier) {
            self.runs.entry(first.epoch).or_insert_with(File::new).flush();
        }
        for (block, value) in new {
            self.target.pending.push((block, value));
            self.may_lose_power()?;
        }
        if self.broken != Some(Broken::NoTargetFlush) {
            self.target.flush();
        }
        self.runs.entry(first.epoch).or_insert_with(File::new).flush();
        self.applied += window.len();
        self.may_lose_power()
    }

    fn view(&self, boundary: usize) -> Vec<u32> {
        let image = |block: usize| {
            let merged = self.merged.iter().filter(|run| run.0 > boundary);
            let merged = merged.filter_map(|(low, _, images)| Some((*low, *images.get(&block)?)));
            let single = self.runs.range(boundary + 1..).filter_map(|(epoch, run)| {
                let mut frames: Vec<_> = run.all().collect();
                if self.broken == Some(Broken::Recapture) {
                    frames.reverse();
                }
                Some((*epoch, frames.iter().find(|frame| frame.0 == block)?.1))
            });
            merged.chain(single).min().map_or(self.target.read(block), |image| image.1)
        };
        (0..BLOCKS).map(image).collect()
    }

    /// Boundaries that thinning and expiry have left and that the target was written past.
    fn boundaries(&self) -> Vec<usize> {
        let merged_away = |boundary| self.merged.iter().any(|run| (run.0..run.1).contains(&boundary));
        let kept = |boundary: &usize| self.last(*boundary) <= self.applied && !merged_away(*boundary);
        (self.floor..self.oracle.len()).filter(kept).collect()
    }

    fn check(&self) -> Result<(), String> {
        for boundary in self.boundaries() {
            let (got, expected) = (self.view(boundary), &self.oracle[boundary]);
            if got != *expected {
                return Err(format!("boundary {boundary} reads {got:?}, was {expected:?}"));
            }
        }
        Ok(())
    }

    fn thin(&mut self) {
        let sealed: Vec<usize> =
            self.runs.keys().copied().filter(|epoch| self.last(*epoch) <= self.applied).take(2).collect();
        let [older, newer] = sealed[..] else { return };
        if newer != older + 1 {
            return;
        }
        let mut images = Images::new();
        let order = if self.broken == Some(Broken::NewestWins) { [newer, older] } else { [older, newer] };
        for run in order.iter().filter_map(|epoch| self.runs.remove(epoch)) {
            run.all().for_each(|frame| _ = images.entry(frame.0).or_insert(frame.1));
        }
        self.merged.push((older, newer, images));
    }

    fn expire(&mut self) {
        let Some(at) = (0..self.merged.len()).min_by_key(|at| self.merged[*at].0) else { return };
        if self.runs.keys().all(|epoch| *epoch > self.merged[at].0) {
            self.floor = self.merged.remove(at).1;
        }
    }

    fn step(&mut self) -> Result<(), String> {
        match self.rng.below(100) {
            0..40 if self.sent < self.script.len() => {
                self.log.pending.push(self.script[self.sent]);
                self.sent += 1;
            }
            40..55 => {
                self.log.flush();
                self.durable = self.log.durable.len();
            }
            55..90 if self.apply().is_err() => self.power_loss(),
            90..93 => self.power_loss(),
            93..97 => self.thin(),
            97..99 => self.expire(),
            _ => {}
        }
        if self.log.durable.len() < self.durable {
            return Err("durable records are gone".into());
        }
        if self.rng.chance(300) { self.check() } else { Ok(()) }
    }

    /// Writes a boundary back over the target, losing power on the way: must be repeatable until it is done.
    fn roll_back(&mut self) -> Result<(), String> {
        let kept = self.boundaries();
        let Some(boundary) = kept.get(self.rng.below(kept.len())).copied() else { return Ok(()) };
        for attempt in 0..3 {
            let wanted = self.view(boundary);
            for (block, value) in wanted.into_iter().enumerate() {
                if self.target.read(block) != value {
                    self.target.pending.push((block, value));
                }
                if attempt < 2 && self.rng.chance(100) {
                    self.target.power_loss(&mut self.rng);
                    break;
                }
            }
        }
        self.target.flush();
        let same = self.target.durable == self.oracle[boundary];
        if same { Ok(()) } else { Err(format!("rolled back to {boundary}, got {:?}", self.target.durable)) }
    }
}

/// Plays one seed.
pub(crate) fn play(seed: u64, broken: Option<Broken>) -> Result<(), String> {
    let mut model = Model::new(seed, broken);
    let run = |model: &mut Model| {
        for _ in 0..400 {
            model.step()?;
        }
        model.check()?;
        model.roll_back()
    };
    run(&mut model).map_err(|failure| format!("seed {seed}: {failure}"))
}
