//! A disk at the target that grows: nobody has it open meanwhile, and its state says the new size afterwards.
//!
//! Invariants: from [`TargetDisk::handle_growing`] on nothing is accepted until the disk is opened anew, under a higher
//! generation (I9); what was accepted before is executed and made durable first. Units: sectors. Called by
//! `master-target/src/disk_writer.rs`.

use super::TargetDisk;
use crate::proto::state::TargetDiskPhase;
use crate::units::MonoTime;

impl TargetDisk {
    /// The disk is to grow: whoever has it open has asked for that, and opens it anew. What was accepted becomes
    /// durable, which [`Self::is_settled`] tells.
    pub fn handle_growing(&mut self, now: MonoTime) {
        if self.phase == TargetDiskPhase::Failed {
            return;
        }
        (self.session, self.opening) = (None, None);
        if self.phase != TargetDiskPhase::Closed {
            self.phase.become_state(TargetDiskPhase::Closed);
        }
        if let Some(running) = &mut self.running {
            running.grants = None;
        }
        self.touch(now);
        self.checkpoint_if_due(now, true);
    }

    /// The target has `size_sectors` now; the next checkpoint, which is ordered, records it. A pass that was not done goes
    /// over the new part, too.
    pub fn handle_grown(&mut self, now: MonoTime, size_sectors: u64) {
        debug_assert!(size_sectors >= self.state.size_sectors && self.session.is_none());
        self.state.size_sectors = size_sectors;
        self.touch(now);
        self.checkpoint_if_due(now, true);
    }
}
