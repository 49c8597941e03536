//! What keeps the oldest segment from being freed: carried to the head of the log, or given up.
//!
//! Invariants: a copy is durable before the segment it came from is freed; what is given up is written down before APPLIED
//! goes past it, and nothing of it is used any more; points behind it promise less until the compare. Called by the driver.

use super::device::Stop;
use super::machine::Journal;
use super::manifest::{Change, Kind};
use super::mutations::Rule;
use super::records::{Applied, Entry, Record, Sequence, WINDOW};

/// Records that are carried in one commit group.
const CARRIED: usize = 3;

impl Journal {
    /// The highest sequences of the oldest segment, if it is past its time and all that waits in it can be carried.
    pub(crate) fn may_carry(&self) -> Option<Vec<Sequence>> {
        let [oldest, next, ..] = self.catalogue.segments[..] else { return None };
        let rolls = self.catalogue.disks.iter().any(|disk| matches!(disk.kind(), Kind::Rollback(_)));
        if rolls || self.disks.iter().any(|disk| !disk.missing.is_empty()) {
            return None;
        }
        let mut here =
            self.disks.iter().flat_map(|disk| disk.places.values()).filter(|place| place.file == oldest.file);
        here.all(|place| place.time + WINDOW <= self.now).then(|| self.high_of(oldest, next.first_group))
    }

    /// Gives the oldest segment back although disks need it. Answers whether it did.
    pub(crate) fn carry_segment(&mut self) -> Result<bool, Stop> {
        let Some(high) = self.may_carry() else { return Ok(false) };
        let Some(waiting) = self.waiting_in_oldest() else { return Ok(false) };
        self.note(|| format!("carry: {waiting:?}"));
        let carries = self.keeps(Rule::CarryWhatWaits);
        let entries: Vec<Entry> = waiting.into_iter().map(Entry::Record).filter(|_| carries).collect();
        for entries in entries.chunks(CARRIED) {
            self.append(entries.to_vec())?;
        }
        if self.keeps(Rule::CarryBeforeFree) {
            self.flush_log()?;
        }
        self.free_oldest(high)?;
        Ok(true)
    }

    /// Records of the oldest segment that are on no target; `None` if one cannot be read.
    fn waiting_in_oldest(&self) -> Option<Vec<Record>> {
        let oldest = self.catalogue.segments.first()?.file;
        let mut waiting = Vec::new();
        for (disk, known) in self.disks.iter().enumerate() {
            for (sequence, _) in
                known.places.range(known.applied + 1..).filter(|place| place.1.file == oldest)
            {
                waiting.push(self.record(disk, *sequence)?.clone());
            }
        }
        Some(waiting)
    }

    /// What waits for the target of a disk is given up: lost, up to the compare.
    pub(crate) fn give_up_waiting(&mut self, disk: usize) -> Result<(), Stop> {
        self.flush_log()?;
        let (from, to) = (self.disks[disk].applied + 1, self.disks[disk].durable);
        if from > to {
            return Ok(());
        }
        if !self.keeps(Rule::LostBeforePassed) {
            self.disks[disk].applied = to;
            let (epoch, frames) = (self.catalogue.disks[disk].active(), self.disks[disk].frames.len());
            self.append(vec![Entry::Applied(Applied { disk, sequence: to, epoch, frames })])?;
            self.flush_log()?;
        }
        self.commit(Change::Lost { disk, from, to })?;
        self.forget_given_up(disk);
        Ok(())
    }

    /// What is said to be lost stays lost, also where it can be read: nobody counts on it.
    pub(crate) fn forget_given_up(&mut self, disk: usize) {
        let catalogue = &self.catalogue.disks[disk];
        self.disks[disk].places.retain(|sequence, _| !catalogue.is_given_up(*sequence));
        self.disks[disk].marks.retain(|_, sequence| !catalogue.is_given_up(*sequence));
    }

    /// Whether a point of the machine promises less than its mark says: records before it are lost.
    pub(crate) fn is_degraded(&self, disk: usize, sequence: Sequence) -> bool {
        self.keeps(Rule::LossDegradesPoints) && self.catalogue.disks[disk].is_doubtful(sequence)
    }
}
