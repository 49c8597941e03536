//! Work on a machine's disks that may take hours: a rollback, a failback.
//!
//! Invariants: one such work at a time for a machine; its disks are neither removed nor opened anew nor grown meanwhile, and none
//! is added to it; other machines are not kept from anything. Who waits for it gives up when the registry stops. Called by
//! commands, `protect`, `growing` and `taken_again`.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::bail;
use reprotect_engine::units::DiskId;

use super::Registry;
use crate::catalogue::ProtectedDisk;

/// How often a waiting one looks whether the registry stops.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Long work on machines; others have them when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Busy<'a> {
    registry: &'a Registry,
    /// Their agents, as in the records.
    agents: BTreeSet<String>,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut busy = self.registry.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|agent| !self.agents.contains(agent));
        drop(busy);
        self.registry.calm.notify_all();
    }
}

impl Registry {
    /// Begins long work on the machines of these disks, when what others do with them is done. Blocks.
    ///
    /// # Errors
    /// When the registry stops.
    pub fn begin_long(&self, disks: &[ProtectedDisk]) -> anyhow::Result<Busy<'_>> {
        let agents: BTreeSet<String> = disks.iter().map(|record| record.agent.clone()).collect();
        loop {
            self.wait_until_calm(&agents)?;
            if self.is_stopping() {
                bail!("the master target stops; repeat the command when it runs again");
            }
            let _alone = self.changing();
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            if busy.is_disjoint(&agents) && !self.is_stopping() {
                busy.extend(agents.iter().cloned());
                return Ok(Busy { registry: self, agents });
            }
        }
    }

    /// As [`Self::changing`], for a change of this agent's disks: waits until no long work on them goes on. Blocks.
    ///
    /// # Errors
    /// When the registry stops.
    pub fn changing_of(&self, agent: &str) -> anyhow::Result<MutexGuard<'_, ()>> {
        let agents = BTreeSet::from([agent.to_owned()]);
        loop {
            self.wait_until_calm(&agents)?;
            let alone = self.changing();
            if self.is_stopping() {
                bail!("the master target stops; repeat the command when it runs again");
            }
            if !self.is_busy(agent) {
                return Ok(alone);
            }
        }
    }

    /// Whether long work on an agent's disks goes on.
    pub(crate) fn is_busy(&self, agent: &str) -> bool {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).contains(agent)
    }

    /// As [`Self::is_busy`], of the agent of a disk.
    pub(super) fn is_disk_busy(&self, disk: DiskId) -> bool {
        let agent = self.lock().disks.get(&disk).map(|known| known.record.agent.clone());
        agent.is_some_and(|agent| self.is_busy(&agent))
    }

    /// Whether no disk is opened any more, and long work is to end where it can be gone on with.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn wait_until_calm(&self, agents: &BTreeSet<String>) -> anyhow::Result<()> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        while !busy.is_disjoint(agents) {
            if self.is_stopping() {
                bail!("the master target stops; repeat the command when it runs again");
            }
            let woken = self.calm.wait_timeout(busy, LOOK_EVERY);
            busy = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Waits for all long work, which ends on its way since the registry is stopping.
    pub(super) fn wait_for_long_work(&self) {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        while !busy.is_empty() {
            busy = self.calm.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
