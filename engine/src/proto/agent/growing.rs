//! The agent's part of a disk that grows: it asks, and opens the disk anew when it is offered at its new size.
//!
//! Invariants: from the asking to the next GRANT nothing is sent for the disk; what was submitted and is not durable
//! goes on then, as after a lost connection. Units: sectors. Called by `agent/src/machine.rs`.

use super::Agent;
use crate::format::message::{GrowDisk, Message};
use crate::proto::credit::Balance;
use crate::proto::state::AgentDiskPhase;
use crate::units::DiskId;

impl Agent {
    /// The source has `size_sectors` now, more than the target. Answers whether the target was asked to grow, which it is
    /// where the disk is open or offered; [`AgentEvent::Offered`](super::AgentEvent::Offered) or
    /// [`AgentEvent::Stopped`](super::AgentEvent::Stopped) follows.
    pub fn ask_to_grow(&mut self, disk: DiskId, size_sectors: u64) -> bool {
        let Some(state) = self.disks.get_mut(&disk) else { return false };
        if !matches!(state.phase, AgentDiskPhase::Open | AgentDiskPhase::Offered) {
            return false;
        }
        state.phase.become_state(AgentDiskPhase::Growing);
        state.end_walk();
        state.balance = Balance::default();
        let generation = state.generation;
        self.control(&Message::GrowDisk(GrowDisk { disk, generation, size_sectors }));
        true
    }
}
