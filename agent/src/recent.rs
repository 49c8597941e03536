//! Which parts of a disk were written to lately, coarsely: where a compare of the whole disk begins.
//!
//! After an unclean boot nothing is known of a disk's changes, and everything is compared. What was busy before is what most
//! likely differs, so it comes first.
//! Invariants: a hint only, never believed: a file that is missing, damaged or old costs nothing but order; so it is
//! written now and then, and not flushed. Units: regions of 64 MiB, sectors. Time is an argument. One per disk, owned by
//! `protected`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reprotect_engine::io::durable::read_bounded;
use reprotect_engine::units::{DiskId, SECTOR_BYTES, SectorRange};

/// Sectors of a region.
const REGION_SECTORS: u64 = (64 << 20) / SECTOR_BYTES;
/// Regions remembered, the newest: 256 GiB, in a file of some 30 KiB.
const REGIONS_MAX: usize = 4096;
/// A line holds a number of twenty digits at most.
const FILE_BYTES_MAX: u64 = 21 * REGIONS_MAX as u64;
/// How often the file is written while the disk is written to.
const STORE_EVERY: Duration = Duration::from_secs(30);

/// The regions of one disk that were written to lately.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    path: PathBuf,
    /// When a region was last written to, in turns.
    turns: BTreeMap<u64, u64>,
    /// The regions by turn; a turn may have many.
    regions: BTreeSet<(u64, u64)>,
    turn: u64,
    /// Whether the file says something else.
    changed: bool,
    stored_at: Option<Instant>,
}

impl Recent {
    /// What a process before this one knew.
    pub(crate) fn load(folder: &Path, disk: DiskId) -> Self {
        let mut recent = Self { path: folder.join(format!("recent-{disk}")), ..Self::default() };
        let bytes = read_bounded(&recent.path, FILE_BYTES_MAX).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let known = text.lines().map_while(|line| line.parse().ok()).take(REGIONS_MAX);
        let known: Vec<u64> = known.filter(|region| *region < u64::MAX / REGION_SECTORS).collect();
        for region in known.into_iter().rev() {
            recent.turn += 1;
            recent.touch(region);
        }
        recent.changed = false;
        recent
    }

    /// These were written to since the last turn.
    pub(crate) fn note(&mut self, ranges: impl Iterator<Item = SectorRange>) {
        self.turn += 1;
        for range in ranges.filter(|range| !range.is_empty()) {
            let last = (range.end - 1) / REGION_SECTORS;
            // More than are remembered push each other out.
            let first = (range.start / REGION_SECTORS).max((last + 1).saturating_sub(REGIONS_MAX as u64));
            (first..=last).for_each(|region| self.touch(region));
        }
    }

    fn touch(&mut self, region: u64) {
        match self.turns.insert(region, self.turn) {
            Some(turn) if turn == self.turn => return,
            Some(turn) => drop(self.regions.remove(&(turn, region))),
            None => {}
        }
        self.regions.insert((self.turn, region));
        if self.regions.len() > REGIONS_MAX
            && let Some((_, oldest)) = self.regions.pop_first()
        {
            self.turns.remove(&oldest);
        }
        self.changed = true;
    }

    /// The regions, the one that was written to last first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = SectorRange> + '_ {
        let range = |region: u64| SectorRange::new(region * REGION_SECTORS, (region + 1) * REGION_SECTORS);
        self.regions.iter().rev().map(move |(_, region)| range(*region))
    }

    /// Writes the file, where it is time for that.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn store(&mut self, now: Instant) -> io::Result<()> {
        let lately = self.stored_at.is_some_and(|at| now < at + STORE_EVERY);
        if !self.changed || lately {
            return Ok(());
        }
        (self.stored_at, self.changed) = (Some(now), false);
        let text: String = self.regions.iter().rev().map(|(_, region)| format!("{region}\n")).collect();
        let new = self.path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, &self.path)
    }

    /// The disk is not protected any more.
    pub(crate) fn remove(&self) {
        // What is not there need not be removed, and what stays is a hint too many.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([7; 16]);

    fn at(region: u64) -> SectorRange {
        SectorRange::new(region * REGION_SECTORS + 8, region * REGION_SECTORS + 16)
    }

    fn order(recent: &Recent) -> Vec<u64> {
        recent.newest_first().map(|range| range.start / REGION_SECTORS).collect()
    }

    #[test]
    fn what_was_written_to_last_comes_first_also_in_the_next_process() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut recent = Recent::load(dir.path(), DISK);
        for region in [5, 3, 9, 3] {
            recent.note([at(region)].into_iter());
        }
        assert_eq!(order(&recent), [3, 9, 5]);
        let whole = SectorRange::new(3 * REGION_SECTORS, 4 * REGION_SECTORS);
        assert_eq!(recent.newest_first().next(), Some(whole));
        recent.store(now).unwrap();
        assert_eq!(order(&Recent::load(dir.path(), DISK)), [3, 9, 5]);
        // Over two regions at once, and then not written before its time.
        recent.note([SectorRange::new(6 * REGION_SECTORS - 8, 6 * REGION_SECTORS + 8)].into_iter());
        recent.store(now + STORE_EVERY / 2).unwrap();
        assert_eq!(order(&Recent::load(dir.path(), DISK)), [3, 9, 5]);
        recent.store(now + STORE_EVERY).unwrap();
        let next = Recent::load(dir.path(), DISK);
        assert_eq!(order(&next), order(&recent));
        assert_eq!(order(&next)[2..], [3, 9]);
        next.remove();
        assert!(order(&Recent::load(dir.path(), DISK)).is_empty());
    }

    #[test]
    fn no_more_is_remembered_than_fits_and_damage_only_shortens_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut recent = Recent::load(dir.path(), DISK);
        recent.note([at(1)].into_iter());
        recent.note([SectorRange::new(0, u64::MAX / 2)].into_iter());
        assert_eq!((recent.regions.len(), recent.turns.len()), (REGIONS_MAX, REGIONS_MAX));
        assert!(!order(&recent).contains(&1));
        let path = dir.path().join(format!("recent-{DISK}"));
        std::fs::write(&path, format!("7\n2\n{}\nx\n9\n", u64::MAX)).unwrap();
        assert_eq!(order(&Recent::load(dir.path(), DISK)), [7, 2]);
        std::fs::write(&path, "7\n".repeat(FILE_BYTES_MAX as usize)).unwrap();
        assert!(order(&Recent::load(dir.path(), DISK)).is_empty(), "it is not a file of ours");
    }
}
