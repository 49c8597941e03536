//! A disk behind the journal that grows, in place.
//!
//! Invariants: the target grows between two undo epochs, with everything applied: an undo run lies within one size, and the
//! size of a point follows from its entry; the manifest says the new size before anything is written behind the old end;
//! whatever comes of it, an undo epoch goes on afterwards, or the disk stops (I1). Units: bytes, sectors. Used by
//! `disk_writer`, on the disk's own thread.

use std::sync::Arc;

use reprotect_engine::net::wall_clock;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::units::SECTOR_BYTES;

use super::Journaled;
use crate::disk_store::{NotGrown, grow_target};
use crate::target_map::TargetMap;

impl Journaled {
    /// Makes the target larger. Nothing waits to be written, and nobody has the disk open.
    pub(crate) fn grow(&mut self, opener: &Arc<dyn Files>, size_bytes: u64) -> Result<(), NotGrown> {
        let grown = self.grow_target(opener, size_bytes);
        if matches!(grown, Err(NotGrown::Failed(_))) {
            return grown;
        }
        self.is_left = false;
        match self.begin_next_epoch() {
            // Where the medium is full, it begins before anything more is written.
            Err(error) if !error.is_full() => Err(NotGrown::Failed(error.to_string())),
            _ => grown,
        }
    }

    fn grow_target(&mut self, opener: &Arc<dyn Files>, size_bytes: u64) -> Result<(), NotGrown> {
        if !self.unguarded {
            self.guard.check().map_err(NotGrown::Failed)?;
        }
        self.leave(false).map_err(|error| NotGrown::Refused(error.to_string()))?;
        grow_target(self.applier.target(), &mut self.guard, opener, size_bytes)?;
        self.take_size(size_bytes / SECTOR_BYTES).map_err(|error| NotGrown::Failed(error.to_string()))
    }

    /// The manifest, the map and the state say the target's size.
    fn take_size(&mut self, size_sectors: u64) -> Result<(), JournalError> {
        self.map.forget_all()?;
        let mut locked = self.retention.lock();
        let journal = locked.get()?;
        if size_sectors > self.applier.size_sectors() {
            self.applier.grow(journal, size_sectors, wall_clock())?;
        }
        let scrubbed = self.retention.scrub().bytes_per_second > 0;
        self.map = TargetMap::open(journal, self.id, size_sectors, scrubbed)?;
        self.state.size_sectors = size_sectors;
        journal.append_state(&self.state, wall_clock())?;
        journal.commit(wall_clock())
    }
}
