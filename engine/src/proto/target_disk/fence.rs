//! The fence of one disk at the target: whoever has it open may not write it any more.
//!
//! Invariants: a generation above every granted one is durable before anybody is told that the fence holds (I9). Units:
//! none. Called by `master-target/src/disk_writer.rs` when a machine is failed back.

use super::{DiskNotice, TargetDisk};
use crate::format::message::ErrorCode;
use crate::proto::state::TargetDiskPhase;
use crate::units::MonoTime;

impl TargetDisk {
    /// Nobody who has the disk open may write it any more (I9): a new generation is made durable, which
    /// [`Self::is_settled`] tells. That nobody opens it anew is the driver's business.
    pub fn handle_fence(&mut self, now: MonoTime, reason: &str) {
        if self.phase == TargetDiskPhase::Failed {
            return;
        }
        self.state.generation = self.state.generation.next();
        for session in [self.session.take(), self.opening.take()].into_iter().flatten() {
            self.refuse(session, ErrorCode::Target, reason);
            self.notices.push_back(DiskNotice::FencedSession(session));
        }
        if self.phase != TargetDiskPhase::Closed {
            self.phase.become_state(TargetDiskPhase::Closed);
        }
        if let Some(running) = &mut self.running {
            running.grants = None;
        }
        self.touch(now);
        self.checkpoint_if_due(now, true);
    }

    /// Whether everything that the state says is durable.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        !self.dirty && self.running.is_none()
    }
}
