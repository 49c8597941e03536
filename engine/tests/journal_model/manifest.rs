//! The manifest: what the journal's files mean. An append-only list of edits and the catalogue they add up to.
//!
//! Invariants: an edit is flushed before anything relies on it; epochs of a disk are numbered without gaps and each
//! starts where the one before it ended; runs are sorted by their lowest epoch. Called by everything in the model.

use std::collections::BTreeSet;

use super::damage::Damaged;
use super::records::{Applied, At, Sequence};

/// What an undo epoch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No before-images: a target we created that has no point yet.
    Bypass,
    Normal,
    /// Its writes are the state at this place.
    Rollback(At),
}

#[derive(Clone, Debug)]
pub(crate) enum Change {
    AddSegment {
        file: usize,
        salt: u64,
        first_group: usize,
    },
    /// `carried`: what the freed segment said last about each disk; `high`: its highest sequences.
    FreeSegment {
        carried: Vec<Applied>,
        high: Vec<Sequence>,
    },
    /// This mark ends the undo epoch of every disk of the machine.
    Decide {
        mark: usize,
    },
    /// Ends the epoch of a disk after `last` and opens the next one with its own run.
    Close {
        disk: usize,
        last: Sequence,
        mark: Option<usize>,
        next: Kind,
        file: usize,
    },
    /// Two adjacent runs became one.
    Merge {
        disk: usize,
        inputs: [usize; 2],
        output: usize,
        hands_on: bool,
    },
    /// A run is dropped, and with it the points whose base lies below `floor`.
    Expire {
        disk: usize,
        file: usize,
        floor: usize,
    },
    /// Blocks that bypassed the journal and were flushed.
    Bulk {
        disk: usize,
        blocks: Vec<usize>,
    },
    /// The rollback under way has this many durable before-images; only their blocks may be written.
    RollbackNamed {
        disk: usize,
        frames: usize,
    },
    /// The active run was cut: until `until` is applied again, before-images may be missing.
    Suspect {
        disk: usize,
        epoch: usize,
        until: Sequence,
    },
    /// Records that are gone and will not come again.
    Lost {
        disk: usize,
        from: Sequence,
        to: Sequence,
    },
    Pin {
        mark: usize,
    },
    /// The disk has so many blocks from the record behind `after` on.
    Grow {
        disk: usize,
        after: Sequence,
        blocks: usize,
    },
    /// An image of a run cannot be read.
    Damaged {
        disk: usize,
        found: Damaged,
    },
    /// The disk was compared since its losses: marks behind `until` are whole again.
    Mended {
        disk: usize,
        until: Sequence,
    },
}

/// One record of the manifest; every edit also says how far the redo log is durable.
#[derive(Clone, Debug)]
pub(crate) struct Edit {
    pub(crate) durable_group: usize,
    pub(crate) change: Change,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) file: usize,
    pub(crate) salt: u64,
    pub(crate) first_group: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Epoch {
    pub(crate) kind: Kind,
    pub(crate) first: Sequence,
    pub(crate) last: Option<Sequence>,
    pub(crate) mark: Option<usize>,
}

/// An undo run covers the epochs `low..=high`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) file: usize,
    pub(crate) low: usize,
    pub(crate) high: usize,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct DiskCatalogue {
    /// By number; the last one is active.
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) runs: Vec<Run>,
    /// Lowest base that points may have.
    pub(crate) floor: usize,
    pub(crate) bulk_done: BTreeSet<usize>,
    pub(crate) rollback_named: usize,
    /// `(epoch, until)` of the active run's cuts.
    pub(crate) suspect: (usize, Sequence),
    pub(crate) lost: Vec<(Sequence, Sequence)>,
    /// Compares since: how many losses they made up for, and until where they went.
    mended: Vec<(usize, Sequence)>,
    /// How it grew: the last record before, and its blocks since.
    pub(crate) grown: Vec<(Sequence, usize)>,
    pub(crate) damaged: Vec<Damaged>,
    pub(crate) carried: Applied,
    /// Highest sequence in freed segments.
    pub(crate) freed: Sequence,
}

impl DiskCatalogue {
    pub(crate) fn active(&self) -> usize {
        self.epochs.len() - 1
    }

    pub(crate) fn active_run(&self) -> Option<Run> {
        self.runs.last().copied().filter(|run| run.low == self.active())
    }

    pub(crate) fn kind(&self) -> Kind {
        self.epochs[self.active()].kind
    }

    /// The epoch whose windows apply this sequence.
    pub(crate) fn epoch_of(&self, sequence: Sequence) -> usize {
        let holds = |epoch: &Epoch| epoch.first <= sequence && epoch.last.is_none_or(|last| sequence <= last);
        self.epochs.iter().position(holds).unwrap_or_else(|| self.active())
    }

    /// Where the state after `sequence` lies: at the end of an epoch if it is one, else inside its epoch. What a
    /// rollback made at the same sequence is another state; an empty epoch before it ends in the same one.
    pub(crate) fn locate(&self, sequence: Sequence) -> At {
        let ends = |epoch: &Epoch| epoch.last == Some(sequence) && !matches!(epoch.kind, Kind::Rollback(_));
        let mut base = self.epoch_of(sequence);
        while self.epochs.get(base).is_some_and(ends) {
            base += 1;
        }
        At { base, upto: sequence }
    }

    /// Whether the state at the end of `epoch` is still kept.
    pub(crate) fn keeps_end_of(&self, epoch: usize) -> bool {
        let merged_away = self.runs.iter().any(|run| run.low <= epoch && epoch < run.high);
        epoch + 1 >= self.floor && !merged_away
    }

    /// The epoch whose end this mark is, if that state is still kept.
    pub(crate) fn kept_end(&self, mark: usize) -> Option<usize> {
        let mut ends = self.epochs.iter().enumerate().filter(|epoch| epoch.1.mark == Some(mark));
        ends.find(|epoch| self.keeps_end_of(epoch.0)).map(|epoch| epoch.0)
    }

    pub(crate) fn is_given_up(&self, sequence: Sequence) -> bool {
        self.lost.iter().any(|range| range.0 <= sequence && sequence <= range.1)
    }

    /// Whether what stands behind a record lacks others that are lost.
    pub(crate) fn is_doubtful(&self, sequence: Sequence) -> bool {
        self.lost.iter().enumerate().any(|(at, lost)| {
            let mend = self.mended.iter().find(|mend| mend.0 > at);
            lost.0 <= sequence && mend.is_none_or(|mend| sequence <= mend.1)
        })
    }

    /// Whether the log still has every record of an epoch, so that there are points inside it.
    pub(crate) fn has_log_of(&self, epoch: usize) -> bool {
        self.epochs.get(epoch).is_none_or(|epoch| epoch.first > self.freed)
    }
}

/// What all edits add up to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalogue {
    pub(crate) segments: Vec<Segment>,
    pub(crate) disks: Vec<DiskCatalogue>,
    pub(crate) decided: BTreeSet<usize>,
    pub(crate) pinned: BTreeSet<usize>,
    pub(crate) durable_group: usize,
}

impl Catalogue {
    /// A fresh journal; `created` tells of each disk whether we made its target.
    pub(crate) fn new(created: &[bool]) -> Self {
        let disk = |(file, created): (usize, &bool)| {
            let bypass = Epoch { kind: Kind::Bypass, first: 0, last: None, mark: None };
            let mut disk = DiskCatalogue { epochs: vec![bypass], floor: 1, ..DiskCatalogue::default() };
            if !created {
                // The as-found point of an existing disk is the end of an empty epoch before the first.
                disk.epochs[0].last = Some(0);
                disk.epochs.push(Epoch { kind: Kind::Normal, first: 1, last: None, mark: None });
                disk.runs.push(Run { file, low: 1, high: 1 });
            }
            disk
        };
        Self { disks: created.iter().enumerate().map(disk).collect(), ..Self::default() }
    }

    pub(crate) fn add(&mut self, edit: &Edit) {
        self.durable_group = self.durable_group.max(edit.durable_group);
        match &edit.change {
            Change::AddSegment { file, salt, first_group } => {
                self.segments.push(Segment { file: *file, salt: *salt, first_group: *first_group });
            }
            Change::FreeSegment { carried, high } => {
                self.segments.remove(0);
                for (disk, high) in self.disks.iter_mut().zip(high) {
                    disk.freed = disk.freed.max(*high);
                }
                carried.iter().for_each(|applied| self.disks[applied.disk].carried = *applied);
            }
            Change::Decide { mark } => _ = self.decided.insert(*mark),
            Change::Pin { mark } => _ = self.pinned.insert(*mark),
            Change::Close { disk, last, mark, next, file } => {
                self.disks[*disk].close(*last, *mark, *next, *file);
            }
            Change::Merge { disk, inputs, output, hands_on } => {
                self.disks[*disk].merge(*inputs, *output, *hands_on);
            }
            Change::Expire { disk, file, floor } => {
                let disk = &mut self.disks[*disk];
                let gone = disk.runs.iter().find(|run| run.file == *file).map(|run| (run.low, run.high));
                disk.damaged.retain(|damaged| Some((damaged.low, damaged.high)) != gone);
                disk.runs.retain(|run| run.file != *file);
                disk.floor = *floor;
            }
            Change::Bulk { disk, blocks } => self.disks[*disk].bulk_done.extend(blocks),
            Change::RollbackNamed { disk, frames } => self.disks[*disk].rollback_named = *frames,
            Change::Suspect { disk, epoch, until } => self.disks[*disk].suspect = (*epoch, *until),
            Change::Lost { disk, from, to } => self.disks[*disk].lost.push((*from, *to)),
            Change::Grow { disk, after, blocks } => self.disks[*disk].grown.push((*after, *blocks)),
            Change::Damaged { disk, found } => self.disks[*disk].damaged.push(*found),
            Change::Mended { disk, until } => {
                let disk = &mut self.disks[*disk];
                disk.mended.push((disk.lost.len(), *until));
            }
        }
    }
}

impl DiskCatalogue {
    fn close(&mut self, last: Sequence, mark: Option<usize>, next: Kind, file: usize) {
        let active = self.active();
        self.epochs[active].last = Some(last);
        self.epochs[active].mark = mark;
        self.epochs.push(Epoch { kind: next, first: last + 1, last: None, mark: None });
        self.runs.push(Run { file, low: active + 1, high: active + 1 });
        self.rollback_named = 0;
    }

    fn merge(&mut self, inputs: [usize; 2], output: usize, hands_on: bool) {
        let ends = |file| self.runs.iter().find(|run| run.file == file).map(|run| (run.low, run.high));
        let (Some((low, _)), Some((_, high))) = (ends(inputs[0]), ends(inputs[1])) else { return };
        self.runs.retain(|run| !inputs.contains(&run.file));
        let at = self.runs.partition_point(|run| run.low < low);
        self.runs.insert(at, Run { file: output, low, high });
        self.merge_damaged(low, high, hands_on);
    }
}
