//! Disks of which nobody knows whether the redo log lost their newest changes: something durable at its end cannot be read,
//! and with it whose it was.
//!
//! Invariants: a doubt outlives restarts and the segment that it came from; it ends with the first entry behind it, for
//! before a disk takes one its agent was asked what it knows to be durable, and was compared where that was more. Units:
//! entry numbers. Called by `registry` at a start, by `status` and `failback`.

use std::sync::PoisonError;

use reprotect_engine::units::DiskId;

use super::Registry;
use crate::catalogue::Doubt;

impl Registry {
    /// Takes over what a start found, and what earlier ones did; `disk` has a record.
    pub(super) fn take_up_doubt(&self, disk: DiskId) {
        let mut recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(log) = recovered.get_mut(&disk) else { return };
        let newest = log.newest();
        let found = log.doubtful.take().map(|reason| Doubt { reason, newest });
        drop(recovered);
        let doubt = self.settle_doubt(disk, found, newest).unwrap_or_else(|error| {
            tracing::error!(%disk, "{error:#}; the disk is taken for doubtful");
            Some(Doubt { reason: format!("{error:#}"), newest })
        });
        if let Some(doubt) = doubt {
            tracing::error!(%disk, reason = doubt.reason, "{}", text(&doubt));
            self.doubts.lock().unwrap_or_else(PoisonError::into_inner).insert(disk, doubt);
        }
    }

    /// What is in doubt now, durably.
    fn settle_doubt(&self, disk: DiskId, found: Option<Doubt>, newest: u64) -> anyhow::Result<Option<Doubt>> {
        let known = self.catalogue.doubt(disk)?;
        match (found, known) {
            (Some(found), known) => {
                if known.as_ref() != Some(&found) {
                    self.catalogue.save_doubt(disk, &found)?;
                }
                Ok(Some(found))
            }
            (None, Some(known)) if known.newest < newest => {
                self.catalogue.remove_doubt(disk)?;
                Ok(None)
            }
            (None, known) => Ok(known),
        }
    }

    /// Why it is not known whether the newest changes of a disk are all there; none where they are.
    #[must_use]
    pub fn doubt(&self, disk: DiskId) -> Option<String> {
        let doubt = self.doubts.lock().unwrap_or_else(PoisonError::into_inner).get(&disk).cloned()?;
        let newest = self.retention.as_ref()?.lock().get().ok()?.newest(disk);
        (newest <= doubt.newest).then(|| text(&doubt))
    }
}

fn text(doubt: &Doubt) -> String {
    format!(
        "the end of the redo log is damaged ({}), and whether newest changes of this disk were in it is known when its agent connects",
        doubt.reason
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Duration;

    use reprotect_engine::format::manifest::DiskAdded;
    use reprotect_engine::format::message::PassMode;
    use reprotect_engine::format::segment::EntryKind;
    use reprotect_engine::net::wall_clock;
    use reprotect_engine::proto::credit::FlowLimits;
    use reprotect_engine::proto::target_disk::TargetDisk;
    use reprotect_engine::store::journal::ladder::Ladder;
    use reprotect_engine::store::journal::offline::Offline;
    use reprotect_engine::store::journal::recovery::Seen;
    use reprotect_engine::units::{LineageId, PeerId};

    use super::*;
    use crate::catalogue::{Catalogue, ProtectedDisk};
    use crate::failback::{FailbackAnswer, FailbackInfo, tell_doubts};
    use crate::registry::fs_opener;
    use crate::retention::{Retention, RetentionSettings};
    use crate::scrub::ScrubSettings;

    const DISK: DiskId = DiskId([1; 16]);

    fn settings() -> RetentionSettings {
        let hour = Duration::from_secs(3600);
        let ladder =
            Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
        let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
        RetentionSettings { undo_epoch: hour, ladder, segment_bytes: 1 << 20, reserve_bytes: 0, scrub }
    }

    /// The log's last group, which is known to be durable, and where its header stands.
    fn last_group(folder: &Path) -> (PathBuf, u64) {
        let (mut path, mut last) = (PathBuf::new(), 0);
        let offline = Offline::open(fs_opener(), folder).unwrap();
        let see = |seen: Seen<'_>| match seen {
            Seen::Segment(_, at) => path = at.to_owned(),
            Seen::Group { offset, .. } => last = offset,
            Seen::Entry { .. } => {}
        };
        offline.log(see).unwrap();
        (path, last)
    }

    /// A start; `forgotten`: the segment is gone, and with it what the log could say.
    fn start(dir: &Path, forgotten: bool) -> (Registry, Arc<Retention>) {
        let (retention, mut found) = Retention::open(fs_opener(), &dir.join("journal"), settings()).unwrap();
        if forgotten {
            found.disks.values_mut().for_each(|log| log.doubtful = None);
        }
        let catalogue = Catalogue::open(&dir.join("state")).unwrap();
        let journal = Some((Arc::clone(&retention), found));
        let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
        (registry, retention)
    }

    fn answer(loss: Option<&str>) -> FailbackAnswer {
        let text = String::new;
        let disk = FailbackInfo {
            disk: DISK.to_string(),
            source: "sda".to_owned(),
            path: text(),
            kind: text(),
            size_bytes: 0,
            point: text(),
            generation: 0,
            written_bytes: 0,
            read_bytes: 0,
            compared_bytes: 0,
            different: Vec::new(),
        };
        FailbackAnswer {
            machine: text(),
            state: text(),
            point: text(),
            class: text(),
            source_time_ms: 0,
            loss: loss.map(str::to_owned),
            note: None,
            disks: vec![disk],
            next: Vec::new(),
        }
    }

    fn save_record(dir: &Path) {
        std::fs::create_dir(dir.join("state")).unwrap();
        let catalogue = Catalogue::open(&dir.join("state")).unwrap();
        let (agent, lineage) = (PeerId([2; 16]), LineageId([4; 16]));
        let state = TargetDisk::new_state(DISK, agent, [3; 16], 64, lineage, PassMode::Done);
        let record = ProtectedDisk {
            disk: DISK.to_string(),
            agent: agent.to_string(),
            source: "03".repeat(16),
            source_name: "sda".to_owned(),
            path: dir.join("disk.vmdk"),
            kind: "monolithicFlat".to_owned(),
            size_bytes: 64 * 512,
            grows_to_bytes: None,
            existing: false,
            device: None,
            journal: None,
        };
        catalogue.save_disk(&record, &state).unwrap();
    }

    #[test]
    fn a_damaged_end_of_the_log_leaves_a_doubt_until_the_disk_takes_an_entry_whatever_is_released_or_restarted()
     {
        let dir = tempfile::tempdir().unwrap();
        let (dir, now) = (dir.path(), wall_clock());
        save_record(dir);
        {
            let (retention, _) = Retention::open(fs_opener(), &dir.join("journal"), settings()).unwrap();
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            let added = |disk| DiskAdded { disk, machine: [2; 16], size_sectors: 64, time: now };
            journal.add_disk(added(DISK), now).unwrap();
            for _ in 0..2 {
                journal.append(DISK, EntryKind::Batch, &[b"an entry"], now).unwrap();
                journal.commit(now).unwrap();
            }
            journal.add_disk(added(DiskId([9; 16])), now).unwrap(); // it says that the last group is durable
        }
        let (path, at) = last_group(&dir.join("journal"));
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[0xEE; 16], at + 8).unwrap();
        for forgotten in [false, true, true] {
            let (registry, _retention) = start(dir, forgotten);
            let doubt = registry.doubt(DISK).unwrap();
            assert!(
                doubt.starts_with("the end of the redo log is damaged (the log ends at group 1"),
                "{doubt}"
            );
            assert_eq!(registry.disks().remove(0).loss.as_ref(), Some(&doubt));
            // Whoever decides without the source is told; who asks it needs not be.
            for (loss, is_told) in [(Some("all since noon is lost"), true), (None, false)] {
                let mut answer = answer(loss);
                tell_doubts(&registry, &mut answer);
                let told = answer.loss.is_some_and(|loss| loss.contains(&format!("lost; sda: {doubt}")));
                assert_eq!(told, is_told);
            }
        }
        let (registry, retention) = start(dir, true);
        {
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            journal.append(DISK, EntryKind::Batch, &[b"its agent was asked"], now).unwrap();
            journal.commit(now).unwrap();
        }
        assert_eq!(registry.doubt(DISK), None);
        drop((registry, retention));
        let (registry, _retention) = start(dir, false);
        assert_eq!(registry.doubt(DISK), None);
        assert_eq!(registry.catalogue.doubt(DISK).unwrap(), None, "nor is it recorded any more");
    }
}
