//! The registry's part of a disk whose waiting entries were given up: it is opened again as a start would open it, and
//! compared with its source. And of one that a start could not open because a drive was full: it is opened as soon as it can be.
//!
//! Invariants: its old threads have ended before its target is opened; one that cannot be opened stays given up, or goes on
//! waiting, and says why; what a start found lost of it is known until it is open; nothing is opened any more once the
//! registry stops; a disk that is released is left alone, one that is being failed back stays refused to agents. Called by `again`.

use std::io::ErrorKind;
use std::sync::PoisonError;

use anyhow::Context as _;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::{DiskLog, JournalError};
use reprotect_engine::units::DiskId;

use super::Registry;
use crate::catalogue::{FailbackStep, peer};
use crate::points::NO_JOURNAL;
use crate::retention::Retention;

impl Registry {
    /// Opens a disk again that was given up; answers whether it is open. Blocks.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn take_again(&self, disk: DiskId) -> anyhow::Result<bool> {
        let _alone = self.changing();
        let is_released = self.failback_step(disk).is_some_and(|(step, _)| step == FailbackStep::Released);
        if self.is_stopping() || is_released {
            return Ok(false);
        }
        let retention = self.retention.as_ref().context(NO_JOURNAL)?;
        let _opening = retention.opening();
        if self.is_disk_busy(disk) {
            return Ok(false);
        }
        let known = self.lock().disks.get_mut(&disk).map(|known| (known.record.clone(), known.worker.take()));
        let Some((record, worker)) = known else { return Ok(false) };
        if let Some(worker) = worker {
            worker.stop();
        }
        let agent = peer(&record.agent);
        let log = retention.lock().get()?.take_again(disk, wall_clock())?;
        self.recovered.lock().unwrap_or_else(PoisonError::into_inner).insert(disk, log);
        self.start_known(record, self.catalogue.disk_state(disk));
        let is_open = self.lock().disks.get(&disk).is_some_and(|known| known.worker.is_some());
        if !is_open {
            retention.lock().get()?.refuse_again(disk);
            return Ok(false);
        }
        tracing::warn!(%disk, "taken again after what waited for its target was lost; it is compared with its source");
        if let Some(agent) = agent {
            self.offer_again(agent);
        }
        Ok(true)
    }

    /// Disks that could not be started because a drive was full.
    pub(crate) fn waiting_for_space(&self) -> Vec<DiskId> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// A disk was started, or could not be: `waits`, for want of space.
    pub(super) fn wait_for_space(&self, disk: DiskId, waits: bool) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waits {
            waiting.insert(disk);
            return;
        }
        waiting.remove(&disk);
    }

    /// A disk is open: what the start found of it is older than what happens from here on.
    pub(super) fn forget_recovered(&self, disk: DiskId) {
        self.recovered.lock().unwrap_or_else(PoisonError::into_inner).remove(&disk);
    }

    /// What the log says of a disk now. Of one that was not opened since the start, what that found missing is not to be seen
    /// any more, and is taken from there.
    pub(super) fn recovered_now(&self, retention: &Retention, disk: DiskId) -> Result<DiskLog, JournalError> {
        let now = retention.lock().get()?.take_again(disk, wall_clock())?;
        let recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match recovered.get(&disk).cloned() {
            Some(found) => DiskLog { missing: found.missing, seen: found.seen, ..now },
            None => now,
        })
    }

    /// Opens a disk that [`Self::waiting_for_space`] named; answers whether it is open. Blocks.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub(crate) fn start_again(&self, disk: DiskId) -> anyhow::Result<bool> {
        let _alone = self.changing();
        if self.is_stopping() || !self.waiting_for_space().contains(&disk) || self.is_disk_busy(disk) {
            return Ok(false);
        }
        let known = self
            .lock()
            .disks
            .get(&disk)
            .filter(|known| known.worker.is_none())
            .map(|known| known.record.clone());
        let Some(record) = known else {
            self.wait_for_space(disk, false); // removed, or opened by somebody else
            return Ok(false);
        };
        let retention = self.retention.as_ref().context(NO_JOURNAL)?;
        let _opening = retention.opening();
        let log = self.recovered_now(retention, disk)?;
        self.recovered.lock().unwrap_or_else(PoisonError::into_inner).insert(disk, log);
        let agent = peer(&record.agent);
        self.start_known(record, self.catalogue.disk_state(disk));
        let is_open = self.lock().disks.get(&disk).is_some_and(|known| known.worker.is_some());
        if let Some(agent) = agent.filter(|_| is_open) {
            tracing::info!(%disk, "opened: there is space again");
            self.offer_again(agent);
        }
        Ok(is_open)
    }
}

/// Whether a full drive is the cause.
pub(super) fn is_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_system = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        matches!(of_system, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
            || cause.downcast_ref::<JournalError>().is_some_and(JournalError::is_full)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use reprotect_engine::format::batch::{BatchHeader, MarkCause, MarkClass, Stretch, encode_batch};
    use reprotect_engine::format::disk_state::DiskState;
    use reprotect_engine::format::extent::Record;
    use reprotect_engine::format::manifest::{
        DiskAdded, Edit, EpochCause, EpochClosed, EpochOpened, PointKept,
    };
    use reprotect_engine::format::message::PassMode;
    use reprotect_engine::format::segment::{Applied, EntryKind};
    use reprotect_engine::format::wire::Text;
    use reprotect_engine::io::{BlockFile as _, ReadAt};
    use reprotect_engine::proto::credit::FlowLimits;
    use reprotect_engine::proto::target_disk::TargetDisk;
    use reprotect_engine::store::files::Files;
    use reprotect_engine::store::journal::ladder::{Ladder, Pressure};
    use reprotect_engine::store::journal::points::own_id;
    use reprotect_engine::store::journal::view::At;
    use reprotect_engine::store::target::{
        CreateOptions, Expectation, TargetKind, TargetSpec, create_target, open_target,
    };
    use reprotect_engine::units::{Generation, LineageId, PeerId, Sequence, Timestamp};

    use super::*;
    use crate::again::{start_again, take_again};
    use crate::catalogue::{Catalogue, Failback, FailbackDisk, ProtectedDisk};
    use crate::journaled::full::lab::drive;
    use crate::registry::fs_opener;
    use crate::retention::RetentionSettings;
    use crate::scrub::ScrubSettings;

    pub(crate) const DISK: DiskId = DiskId([1; 16]);
    pub(crate) const SIZE: u64 = 8 << 20;

    pub(crate) fn settings() -> RetentionSettings {
        let hour = Duration::from_secs(3600);
        let ladder =
            Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
        let scrub = ScrubSettings { bytes_per_second: 0, pause: hour };
        RetentionSettings { undo_epoch: hour, ladder, segment_bytes: 1 << 20, reserve_bytes: 0, scrub }
    }

    /// A registry with a synced disk behind a journal.
    fn lab(dir: &Path) -> (Arc<Registry>, Arc<Retention>, std::thread::JoinHandle<()>) {
        lab_on(fs_opener(), dir, false)
    }

    /// As [`lab`]; an `existing` one keeps what its target was found with.
    pub(crate) fn lab_on(
        drive: Arc<dyn Files>,
        dir: &Path,
        existing: bool,
    ) -> (Arc<Registry>, Arc<Retention>, std::thread::JoinHandle<()>) {
        let (retention, found) = Retention::open(drive, &dir.join("journal"), settings()).unwrap();
        let committer = retention.start().unwrap();
        std::fs::create_dir(dir.join("state")).unwrap();
        let catalogue = Catalogue::open(&dir.join("state")).unwrap();
        let journal = Some((Arc::clone(&retention), found));
        let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
        add(&registry, dir, DISK, existing);
        (Arc::new(registry), retention, committer)
    }

    pub(crate) fn add(registry: &Registry, dir: &Path, disk: DiskId, existing: bool) {
        let name = if disk == DISK { "disk.vmdk".to_owned() } else { format!("{disk}.vmdk") };
        let spec = TargetSpec { path: dir.join(name), kind: TargetKind::MonolithicFlat };
        let target =
            create_target(&fs_opener(), &spec, SIZE, &BTreeSet::new(), &CreateOptions::default()).unwrap();
        let (agent, lineage) = (PeerId([2; 16]), LineageId([4; 16]));
        let state = TargetDisk::new_state(disk, agent, [3; 16], SIZE / 512, lineage, PassMode::Done);
        let record = ProtectedDisk {
            disk: disk.to_string(),
            agent: agent.to_string(),
            source: "03".repeat(16),
            source_name: "sda".to_owned(),
            path: spec.path,
            kind: spec.kind.to_string(),
            size_bytes: SIZE,
            grows_to_bytes: None,
            existing,
            device: None,
            journal: None,
        };
        registry.add_disk(record, target, state).unwrap();
    }

    fn mode(registry: &Registry) -> Option<PassMode> {
        registry.disks().remove(0).status.map(|status| status.snapshot().mode)
    }

    fn state(retention: &Retention) -> DiskState {
        let mut locked = retention.lock();
        let journal = locked.get().unwrap();
        let log = journal.take_again(DISK, wall_clock()).unwrap();
        log.state.unwrap().0
    }

    /// A mark of a released disk is pinned inside its undo epoch: what it needs is carried on in the log.
    #[test]
    fn a_released_disk_is_taken_back_at_the_first_try_though_the_log_was_carried_on_since_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, retention, committer) = lab(dir.path());
        registry.stop();
        let now = wall_clock();
        {
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            let (lineage, generation, cause) = (LineageId([4; 16]), Generation(1), EpochCause::First);
            let (epoch, after, sequence, salt, time) = (1, 0, Sequence(0), 1, now);
            let (to_epoch, to_number, to_records) = (0, 0, 0);
            let opened = EpochOpened {
                disk: DISK,
                lineage,
                generation,
                epoch,
                after,
                sequence,
                salt,
                time,
                to_epoch,
                to_number,
                cause,
                to_records,
            };
            journal.edit(&[Edit::EpochOpened(opened)], now).unwrap();
            let state =
                TargetDisk::new_state(DISK, PeerId([2; 16]), [3; 16], SIZE / 512, lineage, PassMode::Done);
            journal.append_state(&state, now).unwrap();
            let (kind, body) = entry(&state);
            for number in 1..=3 {
                assert_eq!(journal.append(DISK, kind, &[&body], now).unwrap().0, number);
            }
            journal.append_applied(DISK, Applied { number: 3, epoch: 1, undo_bytes: 0 }, now).unwrap();
            journal.commit(now).unwrap();
            let at = At::entry(1, 2);
            let pin = PointKept {
                disk: DISK,
                point: own_id(DISK, at),
                number: at.number,
                sequence,
                epoch,
                source_time: now,
                class: MarkClass::Crash,
                pinned: true,
                degraded: false,
                name: Text::new("pinned"),
                cause: MarkCause::Command,
            };
            let closed = EpochClosed { disk: DISK, epoch, last: 3, run_bytes: 0, time: now };
            journal.edit(&[Edit::EpochClosed(closed), Edit::PointKept(pin)], now).unwrap();
        }
        retention.close(vec![committer]);
        drop((registry, retention));
        let released = r#"{"at":"1.3","step":"released","generation":2,"written_bytes":0,"read_bytes":0,"compared_bytes":0,"different":[],"stamp":""}"#;
        let disk: FailbackDisk = serde_json::from_str(released).unwrap();
        let failback = Failback {
            asked: None,
            point: "newest".to_owned(),
            class: "crash-consistent".to_owned(),
            source_time_ms: 0,
            source_away: false,
            undoing: false,
            accept_damage: false,
            disks: [(DISK.to_string(), disk)].into(),
        };
        let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
        catalogue.save_failback(PeerId([2; 16]), &failback).unwrap();
        let (retention, found) =
            Retention::open(fs_opener(), &dir.path().join("journal"), settings()).unwrap();
        let committer = retention.start().unwrap();
        let journal = Some((Arc::clone(&retention), found));
        let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
        {
            // Others go on, and the oldest segments are given back.
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            let other = DiskId([9; 16]);
            let added = DiskAdded { disk: other, machine: [9; 16], size_sectors: 64, time: now };
            journal.add_disk(added, now).unwrap();
            for number in 1..=80 {
                journal.append(other, EntryKind::Batch, &[&[7; 65536]], now).unwrap();
                journal.append_applied(other, Applied { number, epoch: 0, undo_bytes: 0 }, now).unwrap();
                journal.commit(now).unwrap();
            }
            for _ in 0..2 {
                let oldest = journal.releasable()[0];
                assert_eq!(journal.carry_pinned_piece(oldest, u64::MAX, now).unwrap().lost, []);
                journal.release(oldest, now).unwrap();
            }
        }
        assert!(registry.take_back(DISK, "").unwrap(), "nobody can say that the target is as it was");
        assert_eq!(mode(&registry), Some(PassMode::Compare));
        registry.stop();
        retention.close(vec![committer]);
    }

    #[test]
    fn a_disk_that_was_given_up_is_taken_again_when_the_pressure_is_gone_and_compared() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, retention, committer) = lab(dir.path());
        assert_eq!(mode(&registry), Some(PassMode::Done));
        {
            let mut locked = retention.lock();
            let journal = locked.get().unwrap();
            for number in 1..=3 {
                let added = journal.append(DISK, EntryKind::Batch, &[b"what waits"], wall_clock()).unwrap();
                assert_eq!(added.0, number);
            }
            assert_eq!(journal.give_up(DISK, "a full drive", wall_clock()).unwrap(), Some((1, 3)));
        }
        retention.set_pressure(Pressure::Least);
        assert!(take_again(&registry, &retention).is_empty(), "the drive is still short");
        assert!(retention.lock().get().unwrap().given_up().contains(&DISK));
        assert_eq!(mode(&registry), Some(PassMode::Done));

        // A target that is not there yet: the disk stays given up, and its problem says why.
        retention.set_pressure(Pressure::ShortLog);
        let (there, away) = (dir.path().join("disk.vmdk"), dir.path().join("away.vmdk"));
        std::fs::rename(&there, &away).unwrap();
        assert_eq!(take_again(&registry, &retention), [(DISK, false)]);
        assert!(registry.disks()[0].problem.as_deref().unwrap().contains("disk.vmdk"));
        let refused = retention.lock().get().unwrap().append(DISK, EntryKind::Batch, &[b"x"], wall_clock());
        assert!(refused.is_err());

        std::fs::rename(&away, &there).unwrap();
        assert_eq!(take_again(&registry, &retention), [(DISK, true)]);
        assert_eq!(mode(&registry), Some(PassMode::Compare), "nobody knows what the lost entries wrote");
        assert_eq!(registry.disks()[0].problem, None);
        assert!(take_again(&registry, &retention).is_empty());
        let (number, _) =
            retention.lock().get().unwrap().append(DISK, EntryKind::Batch, &[b"x"], wall_clock()).unwrap();
        assert_eq!(number, 4, "numbers go on behind what was lost");
        let known = state(&retention);
        assert!(known.settled.is_empty() && known.mode == PassMode::Compare, "durably");
        registry.stop();
        assert!(!registry.take_again(DISK).unwrap(), "nothing is opened any more");
        retention.close(vec![committer]);
    }

    /// One write of the source, as an entry of the log.
    pub(crate) fn entry(state: &DiskState) -> (EntryKind, bytes::Bytes) {
        let records = [Record::data(16, vec![7; 4096].into())];
        let header = BatchHeader {
            disk: state.disk,
            lineage: state.lineage,
            generation: state.generation,
            first_sequence: state.sequence.next(),
            chain: state.chain,
            source_time: Timestamp(1),
            record_count: 1,
            stretch: Stretch::Ordered,
        };
        (EntryKind::Ordered, encode_batch(&header, &records).body())
    }

    #[test]
    fn a_disk_that_a_start_on_a_full_drive_could_not_open_is_opened_when_there_is_space() {
        let dir = tempfile::tempdir().unwrap();
        let (faulty, files) = drive();
        let (registry, retention, committer) = lab_on(Arc::clone(&files), dir.path(), true);
        let catalogue = registry.catalogue.disk_state(DISK).unwrap();
        registry.stop();
        // A crash: what was acknowledged is in the log only.
        let (kind, body) = entry(&catalogue);
        retention.lock().get().unwrap().append(DISK, kind, &[&body], wall_clock()).unwrap();
        retention.close(vec![committer]);
        drop((registry, retention));

        faulty.fill();
        let (retention, found) = Retention::open(files, &dir.path().join("journal"), settings()).unwrap();
        let committer = retention.start().unwrap();
        let catalogue = Catalogue::open(&dir.path().join("state")).unwrap();
        let journal = Some((Arc::clone(&retention), found));
        let registry = Registry::open_with(catalogue, FlowLimits::default(), fs_opener(), journal).unwrap();
        let problem = registry.disks().remove(0).problem.expect("it was opened on a full drive");
        assert!(problem.contains("opened then by itself"), "{problem}");
        assert!(take_again(&registry, &retention).is_empty(), "it was not given up");
        assert_eq!(start_again(&registry), [(DISK, false)], "the drive is still full");

        faulty.mend();
        assert_eq!(start_again(&registry), [(DISK, true)]);
        assert!(start_again(&registry).is_empty());
        let view = registry.disks().remove(0);
        assert_eq!((view.problem, view.loss), (None, None));
        assert_eq!(view.status.unwrap().snapshot().mode, PassMode::Done, "nothing is to be compared");
        registry.stop();
        let spec = TargetSpec { path: dir.path().join("disk.vmdk"), kind: TargetKind::MonolithicFlat };
        let mut target = open_target(&fs_opener(), &spec, &Expectation::default()).unwrap();
        let mut bytes = vec![0; 4096];
        target.read(&mut [ReadAt { offset: 16 * 512, data: &mut bytes }]).unwrap();
        assert!(bytes == [7; 4096], "what waited is not on the target");
        retention.close(vec![committer]);
    }
}
