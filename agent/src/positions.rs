//! Where the stream of each followed disk stood when the target last called something durable, and how old that state is,
//! for the next process.
//!
//! Why: the kernel's maps go on while the agent is away, and hold only what was not durable. A target that lost durable
//! data meanwhile would be missing blocks that no map knows: its position tells.
//!
//! Invariants: written before what it speaks of is forgotten; it need not outlive the machine's going down, for then
//! everything is compared anyway, so nothing is flushed; a file that cannot be read is none. Called by `following`.

use std::io;
use std::path::{Path, PathBuf};

use reprotect_engine::proto::agent::StreamPosition;
use reprotect_engine::units::{DiskId, Generation, LineageId, Sequence, Timestamp};

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

    /// What was stored last, and as of when everything was durable; zero where that was not known.
    pub(crate) fn load(&self, disk: DiskId) -> Option<(StreamPosition, Timestamp)> {
        let text = std::fs::read_to_string(self.path(disk)).ok()?;
        let mut words = text.split_whitespace();
        let lineage = LineageId(u128::from_str_radix(words.next()?, 16).ok()?.to_be_bytes());
        let generation = Generation(words.next()?.parse().ok()?);
        let durable = Sequence(words.next()?.parse().ok()?);
        // Files of older agents have no time.
        let as_of = words.next().map_or(Some(0), |word| word.parse().ok())?;
        let position = StreamPosition { lineage, generation, durable };
        words.next().is_none().then_some((position, Timestamp(as_of)))
    }

    /// Replaces it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn store(&self, disk: DiskId, position: &StreamPosition, as_of: Timestamp) -> io::Result<()> {
        let lineage = u128::from_be_bytes(position.lineage.0);
        let text = format!("{lineage:032x} {} {} {}\n", position.generation.0, position.durable.0, as_of.0);
        let (path, new) = (self.path(disk), self.folder.join(format!("stream-{disk}.new")));
        std::fs::write(&new, text)?;
        std::fs::rename(new, path)
    }

    /// The disk is not protected any more.
    pub(crate) fn remove(&self, disk: DiskId) {
        // What is not there need not be removed, and what stays is overwritten.
        let _ = std::fs::remove_file(self.path(disk));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_comes_back_as_it_was_and_damage_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (positions, disk) = (Positions::in_folder(dir.path()), DiskId([7; 16]));
        assert_eq!(positions.load(disk), None);
        let position =
            StreamPosition { lineage: LineageId([9; 16]), generation: Generation(3), durable: Sequence(77) };
        positions.store(disk, &position, Timestamp(5)).unwrap();
        assert_eq!(positions.load(disk), Some((position, Timestamp(5))));
        let text = std::fs::read_to_string(positions.path(disk)).unwrap();
        std::fs::write(positions.path(disk), text.trim_end().strip_suffix(" 5").unwrap()).unwrap();
        assert_eq!(positions.load(disk), Some((position, Timestamp::ZERO)), "of an older agent");
        std::fs::write(positions.path(disk), "garbage").unwrap();
        assert_eq!(positions.load(disk), None);
        positions.remove(disk);
        assert_eq!(positions.load(disk), None);
    }
}
