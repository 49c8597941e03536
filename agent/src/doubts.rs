//! What is to be said of points that promise less than their marks did, because capture missed something: written down before
//! anybody forgets that, and said each time the disk is opened.
//!
//! Why: the target does not answer it, and a session can end unnoticed just when it is said; what it knows already it takes
//! no notice of. Invariants: a doubt is on the medium before the account that found it goes on ([`Order::Told`]); it outlives the
//! process and whatever becomes of the disk's stream, but not the disk's protection; a file that cannot be read is a doubt of
//! everything. Units: sequences. Part of `machine`; found by `capturing`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use reprotect_engine::io::durable::{Access, read_bounded, remove_file_durable, replace_file};
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, LineageId, Sequence, Timestamp};
use serde::{Deserialize, Serialize};

use crate::capturing::Order;
use crate::machine::Machine;

/// Of one disk; of more the oldest become one.
const DOUBTS_MAX: usize = 16;
/// A file of them.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How long they are said.
const SAID_FOR: Duration = Duration::from_secs(31 * 24 * 3600);
/// Of a cause.
const WHY_BYTES_MAX: usize = 512;

/// Points of a stretch that lack something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Doubt {
    /// The history; none: the one the disk has when it is opened next.
    lineage: Option<String>,
    from: u64,
    /// The last sequence concerned; none: the newest one at the next opening.
    to: Option<u64>,
    /// When it was found.
    since: u64,
    why: String,
}

/// What makes points doubtful.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The account lacks something.
    Miss,
    /// Capture was interrupted.
    Interruption,
}

/// The doubts of all disks.
#[derive(Debug)]
pub(crate) struct Doubts {
    folder: PathBuf,
    of: BTreeMap<DiskId, Vec<Doubt>>,
    /// Of what those of a disk are that are not written down.
    unstored: BTreeMap<DiskId, Vec<Found>>,
}

impl Doubts {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), of: BTreeMap::new(), unstored: BTreeMap::new() }
    }

    fn path(&self, disk: DiskId) -> PathBuf {
        self.folder.join(format!("doubts-{disk}"))
    }

    /// Those of a disk, read once.
    fn known(&mut self, disk: DiskId) -> &mut Vec<Doubt> {
        let path = self.path(disk);
        self.of.entry(disk).or_insert_with(|| read(&path))
    }

    /// One more; [`Self::write_down`] comes next.
    fn add(&mut self, disk: DiskId, found: Found, doubt: Doubt) {
        let known = self.known(disk);
        known.push(doubt);
        if known.len() > DOUBTS_MAX {
            // The oldest two of one history become one; of as many histories no disk has points.
            let same =
                known.windows(2).position(|pair| matches!(pair, [one, two] if one.lineage == two.lineage));
            let merged = known.remove(same.unwrap_or(0));
            if let Some(next) = same.and_then(|at| known.get_mut(at)) {
                next.from = next.from.min(merged.from);
                next.to = merged.to.zip(next.to).map(|(one, two)| one.max(two));
            }
        }
        self.unstored.entry(disk).or_default().push(found);
    }

    /// Whether all that is doubtful of a disk is on the medium.
    fn is_stored(&self, disk: DiskId) -> bool {
        !self.unstored.contains_key(&disk)
    }

    /// Answers what more is on the medium now.
    ///
    /// # Errors
    /// When they cannot be written; they are known to this process all the same.
    fn write_down(&mut self, disk: DiskId) -> anyhow::Result<Vec<Found>> {
        if self.is_stored(disk) {
            return Ok(Vec::new());
        }
        self.store(disk)?;
        Ok(self.unstored.remove(&disk).unwrap_or_default())
    }

    fn store(&self, disk: DiskId) -> anyhow::Result<()> {
        let known = self.of.get(&disk).map_or(&[][..], Vec::as_slice);
        let path = self.path(disk);
        if known.is_empty() {
            return Ok(remove_file_durable(&path)?);
        }
        Ok(replace_file(&path, &serde_json::to_vec_pretty(known)?, Access::Private)?)
    }

    /// The disk has this history, and its stream stands here: what is to be said of it, with what was open filled in.
    fn settled(
        &mut self,
        disk: DiskId,
        lineage: LineageId,
        last: Sequence,
    ) -> Vec<(Option<LineageId>, Doubt)> {
        let oldest = wall_clock().0.saturating_sub(u64::try_from(SAID_FOR.as_nanos()).unwrap_or(u64::MAX));
        let known = self.known(disk);
        let before = known.clone();
        known.retain(|doubt| doubt.since >= oldest);
        for doubt in known.iter_mut() {
            let of = doubt.lineage.get_or_insert_with(|| text_of(lineage));
            // Of a history that is over, everything from there on.
            let end = if *of == text_of(lineage) { last.0 } else { Sequence::LAST.0 };
            doubt.to.get_or_insert(end);
        }
        let (is_changed, said) = (*known != before, known.clone());
        // Where it is not written down yet, it is as it is when that is done.
        if is_changed
            && self.is_stored(disk)
            && let Err(error) = self.store(disk)
        {
            tracing::warn!(%disk, "what is doubtful of points is not kept as it is: {error:#}");
        }
        said.into_iter().map(|doubt| (doubt.lineage.as_deref().and_then(lineage_of), doubt)).collect()
    }

    /// The disk is not protected any more.
    pub(crate) fn forget(&mut self, disk: DiskId) {
        self.of.insert(disk, Vec::new());
        self.unstored.remove(&disk);
        if let Err(error) = self.store(disk) {
            tracing::warn!(%disk, "what was doubtful of points of a disk that is not protected any more stays: {error:#}");
        }
        self.of.remove(&disk);
    }
}

fn read(path: &Path) -> Vec<Doubt> {
    let read = match read_bounded(path, FILE_BYTES_MAX) {
        Err(error) if error.is_not_found() => return Vec::new(),
        Err(error) => Err(anyhow::Error::from(error)),
        Ok(bytes) => serde_json::from_slice(&bytes).context("it is damaged"),
    };
    read.unwrap_or_else(|error| {
        tracing::error!(path = %path.display(), "what is doubtful of points cannot be read, all of them are: {error:#}");
        let why = format!("{} could not be read", path.display());
        vec![Doubt { lineage: None, from: 0, to: None, since: wall_clock().0, why }]
    })
}

fn text_of(lineage: LineageId) -> String {
    format!("{:032x}", u128::from_be_bytes(lineage.0))
}

fn lineage_of(text: &str) -> Option<LineageId> {
    Some(LineageId(u128::from_str_radix(text, 16).ok()?.to_be_bytes()))
}

impl Machine {
    /// Says of points what there is to say, when the disk is opened, or now where it is open.
    pub(crate) fn tell_doubts(&mut self, disk: DiskId) {
        let Some((_, last)) = self.core.position(disk).filter(|_| self.core.is_open(disk)) else { return };
        let Some(known) = self.core.stream_position(disk) else { return };
        for (lineage, doubt) in self.following.doubts.settled(disk, known.lineage, last) {
            let to = Sequence(doubt.to.unwrap_or(last.0));
            self.core.degrade(disk, lineage, Sequence(doubt.from), to, &doubt.why);
        }
    }

    /// Points since the last clean account promise less. Answers when that was.
    pub(crate) fn doubt_since_account(&mut self, disk: DiskId, found: Found, why: &str) -> Timestamp {
        let (from, clean_at) = self.following.account(disk);
        let open = self.core.is_open(disk);
        let last = self.core.position(disk).map(|(_, last)| last.0).filter(|_| open);
        let known = self.core.stream_position(disk).map(|known| known.lineage);
        let lineage = known.or_else(|| self.following.lineage_before(disk)).map(text_of);
        let mut why = why.to_owned();
        why.truncate(why.floor_char_boundary(WHY_BYTES_MAX));
        self.following.doubts.add(
            disk,
            found,
            Doubt { lineage, from: from.0, to: last, since: wall_clock().0, why },
        );
        self.write_doubts_down(disk);
        self.tell_doubts(disk);
        clean_at
    }

    /// Answers whether all that is doubtful of a disk is on the medium: before that its account does not go on.
    pub(crate) fn write_doubts_down(&mut self, disk: DiskId) -> bool {
        if self.holds_a_freeze() && !self.following.doubts.is_stored(disk) {
            return false; // the folder may lie on a file system that stands still: at the next account
        }
        match self.following.doubts.write_down(disk) {
            Ok(found) => {
                for found in found {
                    self.following.order(match found {
                        Found::Miss => Order::Told(disk),
                        Found::Interruption => Order::ToldInterrupted(disk),
                    });
                }
                true
            }
            // The account is not told that it is known: the next process finds the same again.
            Err(error) => {
                tracing::error!(
                    %disk,
                    "that points are doubtful could not be written down, make room in the state directory: {error:#}"
                );
                false
            }
        }
    }

    /// Writes were missed: points since the last clean check promise less, and the disk is compared. Its map is marked
    /// from end to end, so the next round is that compare.
    pub(crate) fn handle_unaccounted(&mut self, disk: DiskId, found: Found, why: &str) {
        tracing::error!(%disk, "capture missed something, the whole disk is compared: {why}");
        self.end_streaming(why);
        self.step(disk, "compare", why);
        let clean_at = self.doubt_since_account(disk, found, why);
        self.following.note_missed(disk, why);
        if let Some(state) = self.disks.get_mut(&disk) {
            state.freshness.set_back(clean_at);
            state.unaccounted += 1;
            state.next_scan = state.next_scan.map(|at| at.min(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([7; 16]);
    const LINEAGE: LineageId = LineageId([9; 16]);

    fn doubt(from: u64, to: Option<u64>) -> Doubt {
        let lineage = to.map(|_| text_of(LINEAGE));
        Doubt { lineage, from, to, since: wall_clock().0, why: "lost".to_owned() }
    }

    fn said(doubts: &mut Doubts, last: u64) -> Vec<(u64, u64)> {
        let said = doubts.settled(DISK, LINEAGE, Sequence(last));
        assert!(said.iter().all(|(lineage, _)| *lineage == Some(LINEAGE)));
        said.iter().map(|(_, doubt)| (doubt.from, doubt.to.unwrap())).collect()
    }

    #[test]
    fn a_doubt_is_said_at_every_opening_also_by_the_next_process_until_the_disk_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut doubts = Doubts::in_folder(dir.path());
        doubts.add(DISK, Found::Miss, doubt(3, Some(8)));
        doubts.add(DISK, Found::Interruption, doubt(8, None));
        assert_eq!(doubts.write_down(DISK).unwrap(), [Found::Miss, Found::Interruption]);
        assert_eq!(doubts.write_down(DISK).unwrap(), []);
        drop(doubts);
        let mut doubts = Doubts::in_folder(dir.path());
        assert_eq!(
            said(&mut doubts, 20),
            [(3, 8), (8, 20)],
            "one ends where the stream stood at the next opening"
        );
        let mut doubts = Doubts::in_folder(dir.path());
        assert_eq!(said(&mut doubts, 30), [(3, 8), (8, 20)], "and not later");
        doubts.forget(DISK);
        assert_eq!(said(&mut doubts, 30), []);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn many_become_one_old_ones_are_not_said_and_a_damaged_file_doubts_everything() {
        let dir = tempfile::tempdir().unwrap();
        let mut doubts = Doubts::in_folder(dir.path());
        for at in 0..40 {
            doubts.add(DISK, Found::Miss, doubt(10 * at, Some(10 * at + 5)));
        }
        let all = said(&mut doubts, 500);
        assert_eq!((all.len(), all[0], all[15]), (DOUBTS_MAX, (0, 245), (390, 395)));
        // Those of another history stay apart, and what was open of it goes to its end.
        doubts.add(DISK, Found::Miss, Doubt { lineage: Some("0".repeat(32)), ..doubt(7, None) });
        let other = doubts.settled(DISK, LINEAGE, Sequence(500)).pop().unwrap();
        assert_eq!((other.0, other.1.to), (Some(LineageId([0; 16])), Some(Sequence::LAST.0)));
        doubts.known(DISK).truncate(1);
        doubts.known(DISK)[0].since = 1;
        assert_eq!(said(&mut doubts, 500), []);
        std::fs::write(doubts.path(DISK), "garbage").unwrap();
        assert_eq!(said(&mut Doubts::in_folder(dir.path()), 77), [(0, 77)]);
    }
}
