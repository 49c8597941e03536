//! Where the stream of each followed disk stood when the target last called something durable, and how old that state is,
//! for the next process.
//!
//! Why: the kernel's maps go on while the agent is away, and hold only what was not durable. A target that lost durable
//! data meanwhile would be missing blocks that no map knows: its position tells.
//!
//! Invariants: written before what it speaks of is forgotten, and removed where it cannot be; believed only beside the set of
//! what could not be read that it was written beside; it need not outlive the machine's going down, for then
//! everything is compared anyway, so nothing is flushed; a file that cannot be read is none. Called by `following`.

use std::io;
use std::path::{Path, PathBuf};

use reprotect_engine::format::message::PassMode;
use reprotect_engine::io::durable::read_bounded;
use reprotect_engine::proto::agent::StreamPosition;
use reprotect_engine::units::{DiskId, Generation, LineageId, Sequence, Timestamp};

use crate::machine::Machine;

/// A line of 147 bytes at most.
const FILE_BYTES_MAX: u64 = 192;

/// What is kept with the position of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holding {
    /// Everything written before is durable; zero where that is not known.
    pub(crate) as_of: Timestamp,
    /// Which set of what could not be read is stored; `None` where there is none to be believed.
    pub(crate) unread: Option<u32>,
    /// Sequence and time of the last moment at which every write was known to be seen; zero where there was none.
    pub(crate) accounted: (Sequence, Timestamp),
}

/// The folder of the files.
#[derive(Debug)]
pub(crate) struct Positions {
    folder: PathBuf,
}

impl Positions {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self, disk: DiskId) -> PathBuf {
        self.folder.join(format!("stream-{disk}"))
    }

    /// What was stored last beside the set `unread`, and as of when everything was durable; zero where that is not known, or lies
    /// behind `now`: the clock was set back.
    pub(crate) fn load(
        &self,
        disk: DiskId,
        unread: u32,
        now: Timestamp,
    ) -> Option<(StreamPosition, Timestamp)> {
        let bytes = read_bounded(&self.path(disk), FILE_BYTES_MAX).ok()?;
        let mut words = std::str::from_utf8(&bytes).ok()?.split_whitespace();
        let lineage = LineageId(u128::from_str_radix(words.next()?, 16).ok()?.to_be_bytes());
        let generation = Generation(words.next()?.parse().ok()?);
        let durable = Sequence(words.next()?.parse().ok()?);
        let as_of =
            Some(Timestamp(words.next()?.parse().ok()?)).filter(|as_of| *as_of <= now).unwrap_or_default();
        // Files of older agents do not say beside which set they were written: they cannot be believed.
        let is_beside = u32::from_str_radix(words.next()?, 16).ok()? == unread;
        let position = StreamPosition { lineage, generation, durable };
        // Older agents end here.
        (is_beside && matches!(words.count(), 0 | 2)).then_some((position, as_of))
    }

    /// The history that the stream had.
    pub(crate) fn lineage(&self, disk: DiskId) -> Option<LineageId> {
        let bytes = read_bounded(&self.path(disk), FILE_BYTES_MAX).ok()?;
        let word = std::str::from_utf8(&bytes).ok()?.split_whitespace().next()?;
        Some(LineageId(u128::from_str_radix(word, 16).ok()?.to_be_bytes()))
    }

    /// Up to where every write was known to be seen, and when that was; its time is zero where it lies behind `now`.
    pub(crate) fn account(&self, disk: DiskId, now: Timestamp) -> Option<(Sequence, Timestamp)> {
        let bytes = read_bounded(&self.path(disk), FILE_BYTES_MAX).ok()?;
        let mut words = std::str::from_utf8(&bytes).ok()?.split_whitespace().skip(5);
        let sequence = Sequence(words.next()?.parse().ok()?);
        let at = Some(Timestamp(words.next()?.parse().ok()?)).filter(|at| *at <= now).unwrap_or_default();
        words.next().is_none().then_some((sequence, at))
    }

    /// Replaces it; where no set is to be believed, neither is a position.
    ///
    /// # Errors
    /// When the file cannot be written; it is removed then, where that can be.
    pub(crate) fn store(&self, disk: DiskId, position: &StreamPosition, holding: Holding) -> io::Result<()> {
        let Some(unread) = holding.unread else {
            self.remove(disk);
            return Ok(());
        };
        self.replace(disk, position, holding, unread).inspect_err(|_| self.remove(disk))
    }

    fn replace(
        &self,
        disk: DiskId,
        position: &StreamPosition,
        holding: Holding,
        unread: u32,
    ) -> io::Result<()> {
        let lineage = u128::from_be_bytes(position.lineage.0);
        let (generation, durable) = (position.generation.0, position.durable.0);
        let (as_of, (sequence, at)) = (holding.as_of.0, holding.accounted);
        let text =
            format!("{lineage:032x} {generation} {durable} {as_of} {unread:08x} {sequence} {}\n", at.0);
        let (path, new) = (self.path(disk), self.folder.join(format!("stream-{disk}.new")));
        std::fs::write(&new, text)?;
        std::fs::rename(new, path)
    }

    /// The disk is not protected any more, or what is stored must not be believed.
    pub(crate) fn remove(&self, disk: DiskId) {
        let path = self.path(disk);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%disk, path = %path.display(), %error, "a position that is not to be believed cannot be removed; make the state directory writable, and remove it before the agent starts again");
            }
            _ => {}
        }
    }
}

impl Machine {
    /// The target is open where the process before this one knew it to be: its state is as old as that one said. Where it
    /// is not, a compare is asked for next, and sets it back.
    pub(crate) fn recall_age(&mut self, disk: DiskId, mode: PassMode) {
        let durable = self.core.position(disk).unwrap_or_default().0;
        if let Some(state) = self.disks.get_mut(&disk) {
            let as_of = std::mem::take(&mut state.recalled_as_of);
            if mode == PassMode::Done {
                state.freshness.covers(durable, as_of);
            }
        }
    }

    /// What is kept for the next process beside the position of the disk's stream.
    pub(crate) fn holding(&self, disk: DiskId) -> Holding {
        let Some(state) = self.disks.get(&disk) else {
            return Holding::default();
        };
        let (as_of, unread) = (state.freshness.durable_as_of(), state.unread.tag());
        Holding { as_of, unread, accounted: self.following.account(disk) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_comes_back_as_it_was_and_damage_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (positions, disk) = (Positions::in_folder(dir.path()), DiskId([7; 16]));
        let now = Timestamp(5);
        assert_eq!(positions.load(disk, 1, now), None);
        let position =
            StreamPosition { lineage: LineageId([9; 16]), generation: Generation(3), durable: Sequence(77) };
        let accounted = (Sequence(70), Timestamp(4));
        let holding = Holding { as_of: Timestamp(5), unread: Some(1), accounted };
        positions.store(disk, &position, holding).unwrap();
        assert_eq!(positions.load(disk, 1, now), Some((position, Timestamp(5))));
        assert_eq!(positions.load(disk, 2, now), None, "beside another set");
        let known = positions.load(disk, 1, Timestamp(4));
        assert_eq!(known, Some((position, Timestamp::ZERO)), "the clock was set back");
        assert_eq!(positions.account(disk, now), Some(accounted));
        assert_eq!(positions.account(disk, Timestamp(3)), Some((Sequence(70), Timestamp::ZERO)));
        let text = std::fs::read_to_string(positions.path(disk)).unwrap();
        let of_older_agents = text.strip_suffix(" 70 4\n").unwrap();
        std::fs::write(positions.path(disk), of_older_agents).unwrap();
        assert_eq!(positions.load(disk, 1, now), Some((position, Timestamp(5))));
        assert_eq!(positions.account(disk, now), None);
        for damaged in
            [text.trim_end().strip_suffix(" 00000001 70 4").unwrap(), "garbage", "", &text.repeat(9)]
        {
            std::fs::write(positions.path(disk), damaged).unwrap();
            assert_eq!(positions.load(disk, 1, now), None, "{damaged}");
        }
        positions.store(disk, &position, holding).unwrap();
        positions.store(disk, &position, Holding { unread: None, ..holding }).unwrap();
        assert_eq!(positions.load(disk, 1, now), None, "no set is to be believed");
        positions.store(disk, &position, holding).unwrap();
        std::fs::create_dir(dir.path().join(format!("stream-{disk}.new"))).unwrap();
        positions.store(disk, &position, holding).unwrap_err();
        assert_eq!(positions.load(disk, 1, now), None, "what cannot be replaced is removed");
    }
}
