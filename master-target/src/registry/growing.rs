//! The registry's part of a disk that grows: whether it may, the record of it, and the new offer.
//!
//! Invariants: the record names the size that is wanted before anything of the target is changed, so that a start knows
//! a target of either size; where the record still names it at a start, the target's own size decides. One disk
//! grows at a time. Units: bytes, sectors. Used by `session`.

use anyhow::{Context as _, bail};
use reprotect_engine::format::message::GrowDisk;
use reprotect_engine::host::output::bytes;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::store::target::{TargetSpec, target_bytes};
use reprotect_engine::units::{DiskId, PeerId, SECTOR_BYTES};

use super::{News, Registry};
use crate::catalogue::{ProtectedDisk, kind_from_text};
use crate::explain::explain;

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
        let _changing = self.changing();
        let (disk, size_bytes) = (asked.disk, asked.size_sectors * SECTOR_BYTES);
        let mut record = self.growing_record(agent, asked)?;
        if record.size_bytes == size_bytes {
            return Ok(()); // it has grown, and the offer was lost
        }
        let (inputs, _) = self.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        let before = record.size_bytes;
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
        tracing::warn!(
            disk = record.disk,
            found = bytes(found),
            "a growth was interrupted; the disk has the size that its target has"
        );
        (record.size_bytes, record.grows_to_bytes) = (found, None);
        self.catalogue.save_record(record)
    }
}
