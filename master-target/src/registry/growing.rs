//! The registry's part of a disk that grows: whether it may, the record of it, and the new offer.
//!
//! Invariants: the record names the size that is wanted before anything of the target is changed, so that a start knows
//! a target of either size; where the record still names it at a start, the target's own size decides. One disk
//! grows at a time. Units: bytes, sectors. Used by `session`.

use std::path::Path;

use anyhow::{Context as _, bail};
use reprotect_engine::format::message::GrowDisk;
use reprotect_engine::host::output::bytes;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::store::target::{TargetKind, TargetSpec, target_bytes};
use reprotect_engine::units::{DiskId, PeerId, SECTOR_BYTES};

use super::{News, Registry};
use crate::catalogue::{ProtectedDisk, kind_from_text};
use crate::explain::explain;
use crate::journaled::back::unfinished;
use crate::plan::reserved_bytes;

impl Registry {
    /// An agent asks that a disk grow with its source: its sessions are offered the disk anew, or the one that asked is told
    /// why not. Blocks.
    pub(crate) fn handle_grow(&self, session: SessionId, agent: PeerId, asked: &GrowDisk) {
        let disk = asked.disk;
        let Err(error) = self.grow(agent, asked) else { return self.offer_again(agent) };
        let why = explain(&error);
        tracing::error!(%disk, "the disk does not grow with its source: {why}");
        if let Some(live) = self.lock().sessions.get(&session) {
            // A closed channel means that the session just ended; in its next one it asks again.
            let _ = live.news.send(News::NotGrown(disk, why));
        }
    }

    fn grow(&self, agent: PeerId, asked: &GrowDisk) -> anyhow::Result<()> {
        let _changing = self.changing_of(&agent.to_string())?;
        let (disk, size_bytes) = (asked.disk, asked.size_sectors * SECTOR_BYTES);
        let mut record = self.growing_record(agent, asked)?;
        if record.size_bytes == size_bytes {
            return Ok(()); // it has grown, and the offer was lost
        }
        let (inputs, _) = self.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        if let Some(retention) = &self.retention
            && let Some(why) = unfinished(retention.lock().get()?, disk)
        {
            bail!(why); // its thread may be busy with that for hours
        }
        let before = record.size_bytes;
        self.check_room(&record, size_bytes - before)?;
        record.grows_to_bytes = Some(size_bytes);
        self.put_record(disk, &record)?;
        tracing::info!(%disk, from = bytes(before), to = bytes(size_bytes), "the disk grows with its source");
        let grown = inputs.grow(self.opener().clone(), size_bytes);
        match &grown {
            Ok(()) => (record.size_bytes, record.grows_to_bytes) = (size_bytes, None),
            // What it has then is looked at by the next start.
            Err(_) if self.is_failed(disk) => return grown,
            Err(_) => record.grows_to_bytes = None,
        }
        self.put_record(disk, &record)?;
        grown
    }

    /// The record of a disk that may grow as it was asked.
    fn growing_record(&self, agent: PeerId, asked: &GrowDisk) -> anyhow::Result<ProtectedDisk> {
        if let Some(why) = self.fence_text(asked.disk) {
            bail!(why);
        }
        let inner = self.lock();
        let known = inner.disks.get(&asked.disk).filter(|known| known.record.agent == agent.to_string());
        let known = known.context("the disk is not protected any more")?;
        let worker = known.worker.as_ref().context("the disk could not be opened; see `status`")?;
        let generation = worker.status().snapshot().generation;
        if generation != asked.generation {
            bail!("generation {generation} was granted to another session: reload this agent");
        }
        let (before, wanted) = (known.record.size_bytes, asked.size_sectors * SECTOR_BYTES);
        if wanted < before {
            bail!(
                "the source has {}, the target {}, and a target is never made smaller: give the source its size again, or protect it anew with a new target",
                bytes(wanted),
                bytes(before)
            );
        }
        Ok(known.record.clone())
    }

    /// What other disks of the same file system were promised and have not filled yet is not free.
    fn check_room(&self, record: &ProtectedDisk, more_bytes: u64) -> anyhow::Result<()> {
        if record.kind == TargetKind::Device.to_string() {
            return Ok(());
        }
        let Some(free) = self.opener().free_bytes(&record.path)? else { return Ok(()) };
        check_fits(&record.path, more_bytes, reserved_bytes(self, &record.path), free)
    }

    fn is_failed(&self, disk: DiskId) -> bool {
        let inner = self.lock();
        let worker = inner.disks.get(&disk).and_then(|known| known.worker.as_ref());
        worker.is_none_or(|worker| worker.status().snapshot().phase == TargetDiskPhase::Failed)
    }

    fn put_record(&self, disk: DiskId, record: &ProtectedDisk) -> anyhow::Result<()> {
        self.catalogue.save_record(record)?;
        if let Some(known) = self.lock().disks.get_mut(&disk) {
            known.record = record.clone();
        }
        Ok(())
    }

    /// At a start: a growth that was interrupted has happened, or not.
    pub(super) fn settle_growth(&self, record: &mut ProtectedDisk) -> anyhow::Result<()> {
        let Some(wanted) = record.grows_to_bytes else { return Ok(()) };
        let kind =
            kind_from_text(&record.kind).with_context(|| format!("unknown target kind {}", record.kind))?;
        let found = target_bytes(self.opener(), &TargetSpec { path: record.path.clone(), kind })?;
        if found != wanted && found != record.size_bytes {
            bail!(
                "the target has {found} bytes; it had {} and was to grow to {wanted}: give it one of these sizes, then restart",
                record.size_bytes
            );
        }
        // It may stand in a cache only, and the record must not name a size that a power cut takes back.
        if kind != TargetKind::Device {
            sync_file_system(&record.path)?;
        }
        tracing::warn!(
            disk = record.disk,
            found = bytes(found),
            "a growth was interrupted; the disk has the size that its target has"
        );
        (record.size_bytes, record.grows_to_bytes) = (found, None);
        self.catalogue.save_record(record)
    }
}

/// Everything that was written to the file system of a file is on its medium.
fn sync_file_system(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let synced = std::fs::File::open(folder).and_then(|folder| Ok(rustix::fs::syncfs(&folder)?));
    synced.with_context(|| {
        format!("the file system of {} cannot be flushed; look at its medium", path.display())
    })
}

/// Whether a disk can have more where so much is promised to others.
fn check_fits(path: &Path, more_bytes: u64, promised: u64, free: u64) -> anyhow::Result<()> {
    if more_bytes.saturating_add(promised) <= free {
        return Ok(());
    }
    bail!(
        "{} needs {} more, {} are promised to the disks there that are not full yet, and {} are free: free some space on its file system; it is tried again when the agent is reloaded",
        path.display(),
        bytes(more_bytes),
        bytes(promised),
        bytes(free)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_to_others_is_not_free_for_growth() {
        let path = Path::new("/mnt/ds1/web1.vmdk");
        assert!(check_fits(path, 10, 90, 100).is_ok());
        let said = check_fits(path, 11, 90, 100).unwrap_err().to_string();
        assert!(said.contains("web1.vmdk") && said.contains("free some space"), "{said}");
        assert!(check_fits(path, u64::MAX, 1, u64::MAX).is_ok(), "a file system that does not count");
        assert!(check_fits(path, u64::MAX, u64::MAX, 5).is_err());
    }
}
