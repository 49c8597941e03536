//! How long what is kept: what the configuration says, what a command changed of it, and how far the drive reaches.
//!
//! Invariants: a change is durable in the state directory before it takes effect, and outlives a restart; what does not
//! make sense is refused with the reason and changes nothing. Units: durations as an operator writes them, bytes.
//! Called by `daemon` at the start, by `admin_points`, and by `check` where no daemon runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::host::values::DurationText;
use reprotect_engine::io::durable::{Access, read_bounded, replace_file};
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::ladder::{Ladder, Rung};
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::recovery::LogEntry;
use reprotect_engine::store::journal::{DiskShape, JournalError, Shape};
use reprotect_engine::units::{DiskId, Timestamp};

use crate::api::{RetentionAnswer, RetentionRequest};
use crate::config::rungs;
use crate::housekeeping::Room;
use crate::points::NO_JOURNAL;
use crate::registry::Registry;
use crate::retention::Retention;

/// Largest file read.
const FILE_BYTES_MAX: u64 = 1 << 20;
const HOUR: Duration = Duration::from_secs(3600);
/// Share of the drive, in percent, that is filled before points are given up.
const FILLED_PERCENT: u64 = 80;

/// The policy file and what the configuration says.
#[derive(Clone, Debug, Default)]
pub struct RetentionPolicy {
    path: PathBuf,
    configured: Option<Ladder>,
}

impl RetentionPolicy {
    /// The policy of a state directory.
    #[must_use]
    pub fn new(state_dir: &Path, configured: Option<Ladder>) -> Self {
        Self { path: state_dir.join("retention.json"), configured }
    }

    /// What a command changed; nothing where there is no file.
    fn changes(&self) -> anyhow::Result<RetentionRequest> {
        if !self.path.exists() {
            return Ok(RetentionRequest::default());
        }
        let bytes = read_bounded(&self.path, FILE_BYTES_MAX)?;
        serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is damaged; remove it, then set the retention again", self.path.display())
        })
    }

    /// Lets a running journal keep what was chosen.
    ///
    /// # Errors
    /// When the policy file is damaged.
    pub fn take_effect(&self, retention: &Retention) -> anyhow::Result<()> {
        if let Some(ladder) = self.ladder()? {
            retention.set_ladder(ladder);
        }
        Ok(())
    }

    /// What is kept; nothing where no journal is configured.
    ///
    /// # Errors
    /// When the policy file is damaged.
    pub fn ladder(&self) -> anyhow::Result<Option<Ladder>> {
        let Some(configured) = &self.configured else { return Ok(None) };
        changed(configured, &self.changes()?).map(Some)
    }
}

/// A ladder with changes.
fn changed(ladder: &Ladder, request: &RetentionRequest) -> anyhow::Result<Ladder> {
    let duration = |what: &str, text: &Option<String>, old: Duration| match text {
        None => Ok(old),
        Some(text) => text
            .parse::<DurationText>()
            .map(|duration| duration.0)
            .map_err(|error| anyhow!("{what}: {error}; write for example 24h")),
    };
    let any_write = duration("any-write", &request.any_write, ladder.any_write)?;
    let every_epoch = duration("every-epoch", &request.every_epoch, ladder.every_epoch)?.max(any_write);
    let keep = duration("keep", &request.keep, ladder.keep)?;
    if keep < Duration::from_secs(60) {
        bail!("nothing would be kept; use a --keep of a minute at least");
    }
    let rungs = match &request.rungs {
        None => ladder.rungs.clone(),
        Some(texts) => rungs(texts).map_err(|what| anyhow!("{what}; write for example \"1h until 24h\""))?,
    };
    let guaranteed = duration("guaranteed", &request.guaranteed, ladder.guaranteed)?;
    Ok(Ladder { any_write, every_epoch, rungs, keep, guaranteed })
}

/// Changes what is kept, durably, while replication goes on.
///
/// # Errors
/// When there is no journal, a value makes no sense, or the policy file cannot be written.
pub fn change(
    registry: &Registry,
    policy: &RetentionPolicy,
    request: &RetentionRequest,
) -> anyhow::Result<()> {
    let retention = registry.retention().context(NO_JOURNAL)?;
    let old = if request.reset { RetentionRequest::default() } else { policy.changes()? };
    let merged = RetentionRequest {
        any_write: request.any_write.clone().or(old.any_write),
        every_epoch: request.every_epoch.clone().or(old.every_epoch),
        rungs: request.rungs.clone().or(old.rungs),
        keep: request.keep.clone().or(old.keep),
        guaranteed: request.guaranteed.clone().or(old.guaranteed),
        reset: false,
    };
    let configured = policy.configured.as_ref().context(NO_JOURNAL)?;
    let ladder = changed(configured, &merged)?;
    replace_file(&policy.path, &serde_json::to_vec_pretty(&merged)?, Access::Private)?;
    tracing::info!(?ladder, "the retention was changed");
    retention.set_ladder(ladder);
    Ok(())
}

/// What is kept, and how far the drive reaches.
///
/// # Errors
/// When there is no journal, or the policy file is damaged.
pub fn show(registry: &Registry, policy: &RetentionPolicy) -> anyhow::Result<RetentionAnswer> {
    let retention = registry.retention().context(NO_JOURNAL)?;
    let room = Room::of(retention.folder()).unwrap_or(Room { free_bytes: 0, total_bytes: 0 });
    let ladder = retention.ladder();
    let churn = {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        Churn::of(journal.shape(), |disk| journal.entries(disk), wall_clock())
    };
    let reach = churn.reach(room, ladder.any_write);
    Ok(RetentionAnswer {
        folder: retention.folder().display().to_string(),
        ladder: as_text(&ladder),
        without_effect: without_effect(&ladder),
        changed: policy.changes()? != RetentionRequest::default(),
        total_bytes: room.total_bytes,
        free_bytes: room.free_bytes,
        pressure: retention.pressure().text().to_owned(),
        stays: retention.stays(),
        log_bytes: churn.log_bytes,
        undo_bytes: churn.undo_bytes,
        log_bytes_last_hour: churn.log_last_hour,
        undo_bytes_last_hour: churn.undo_last_hour,
        hours_held: reach.hours_held,
        is_young: reach.is_young,
    })
}

/// How far a drive reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Hours of history at the last hour's churn; `None` without any, or without an hour of it.
    pub hours_held: Option<u64>,
    /// There is no hour of history yet, so nobody knows what an hour's churn is.
    pub is_young: bool,
}

/// How far the drive of a journal reaches that nobody has open, by the last hour in which it was written to: the wall clock
/// would only say how long nothing ran. Changes nothing.
///
/// # Errors
/// When the folder cannot be read.
pub fn reach_at_rest(files: Arc<dyn Files>, folder: &Path, ladder: &Ladder) -> anyhow::Result<Reach> {
    let nothing_yet = Reach { hours_held: None, is_young: true };
    if !folder.exists() {
        return Ok(nothing_yet);
    }
    let offline = match Offline::open(files, folder) {
        Ok(offline) => offline,
        Err(JournalError::NoJournal { .. }) => return Ok(nothing_yet),
        Err(error) => return Err(error.into()),
    };
    let entries = |disk| offline.entries(disk);
    let churn = Churn::of(offline.shape(), entries, newest(offline.shape(), entries));
    let room = Room::of(folder).context("the system does not say how large the drive is")?;
    Ok(churn.reach(room, ladder.any_write))
}

/// When something was last written to a journal.
fn newest<'a>(shape: &Shape, entries: impl Fn(DiskId) -> &'a [LogEntry]) -> Timestamp {
    let of = |(disk, known): (&DiskId, &DiskShape)| {
        let closed = known.epochs.iter().filter_map(|epoch| epoch.closed).map(|closed| closed.time);
        closed.chain(entries(*disk).iter().map(|entry| entry.time)).max()
    };
    shape.disks.iter().filter_map(of).max().unwrap_or(Timestamp(0))
}

fn text(duration: Duration) -> String {
    DurationText(duration).to_string()
}

fn rung(rung: &Rung) -> String {
    format!("{} until {}", text(rung.every), text(rung.until))
}

/// What of a ladder reaches beyond what is kept at all.
fn without_effect(ladder: &Ladder) -> Vec<String> {
    let shares = [
        ("every write", ladder.any_write),
        ("every undo epoch", ladder.every_epoch),
        ("guaranteed", ladder.guaranteed),
    ];
    let beyond = shares.into_iter().filter(|(_, length)| *length > ladder.keep);
    let rungs = ladder.beyond_keep().map(rung);
    beyond.map(|(what, length)| format!("{what} for {}", text(length))).chain(rungs).collect()
}

fn as_text(ladder: &Ladder) -> RetentionRequest {
    RetentionRequest {
        any_write: Some(text(ladder.any_write)),
        every_epoch: Some(text(ladder.every_epoch)),
        rungs: Some(ladder.rungs.iter().map(rung).collect()),
        keep: Some(text(ladder.keep)),
        guaranteed: Some(text(ladder.guaranteed)),
        reset: false,
    }
}

/// What a journal holds and how fast it grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Churn {
    log_bytes: u64,
    undo_bytes: u64,
    log_last_hour: u64,
    undo_last_hour: u64,
    /// No disk has been there for an hour.
    is_young: bool,
}

impl Churn {
    fn of<'a>(shape: &Shape, entries: impl Fn(DiskId) -> &'a [LogEntry], now: Timestamp) -> Self {
        let hour_ago = now.0.saturating_sub(nanos(HOUR));
        let mut churn = Self {
            log_bytes: shape.segments.values().map(|segment| segment.bytes).sum(),
            is_young: !shape.disks.values().any(|disk| disk.added.time.0 <= hour_ago),
            ..Self::default()
        };
        for (disk, known) in &shape.disks {
            churn.undo_bytes += known.runs.iter().map(|run| run.bytes).sum::<u64>();
            churn.undo_last_hour += undo_since(known, hour_ago);
            let recent = entries(*disk).iter().rev().take_while(|entry| entry.time.0 >= hour_ago);
            churn.log_last_hour += recent.map(|entry| entry.place.bytes).sum::<u64>();
        }
        churn
    }

    fn reach(&self, room: Room, any_write: Duration) -> Reach {
        let hours_held = if self.is_young { None } else { self.hours_held(room, any_write) };
        Reach { hours_held, is_young: self.is_young }
    }

    /// Hours of history at this churn: what the log takes for its window comes off, and nothing is thinned.
    fn hours_held(&self, room: Room, any_write: Duration) -> Option<u64> {
        let usable =
            (room.free_bytes + self.log_bytes + self.undo_bytes).min(room.total_bytes / 100 * FILLED_PERCENT);
        let log = u128::from(self.log_last_hour) * any_write.as_nanos() / HOUR.as_nanos();
        let left = u128::from(usable).saturating_sub(log);
        let hours = left.checked_div(u128::from(self.undo_last_hour))?;
        Some(u64::try_from(hours).unwrap_or(u64::MAX))
    }
}

/// Bytes of runs whose epochs ended since then.
fn undo_since(known: &DiskShape, since: u64) -> u64 {
    let recent = known.epochs.iter().filter_map(|epoch| epoch.closed).filter(|closed| closed.time.0 >= since);
    recent.map(|closed| closed.run_bytes).sum()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::housekeeping::tests::{Lab, lab};
    use crate::registry::fs_opener;

    fn ladder() -> Ladder {
        Ladder {
            any_write: 2 * HOUR,
            every_epoch: 4 * HOUR,
            rungs: rungs(&["1h until 24h".to_owned()]).unwrap(),
            keep: 24 * HOUR,
            guaranteed: 2 * HOUR,
        }
    }

    #[test]
    fn changes_are_laid_over_what_is_configured_and_nonsense_is_refused() {
        let request = RetentionRequest {
            keep: Some("7d".to_owned()),
            any_write: Some("6h".to_owned()),
            rungs: Some(vec!["2h until 2d".to_owned(), "1d until 7d".to_owned()]),
            ..RetentionRequest::default()
        };
        let new = changed(&ladder(), &request).unwrap();
        assert_eq!((new.keep, new.any_write, new.every_epoch), (168 * HOUR, 6 * HOUR, 6 * HOUR));
        assert_eq!(changed(&new, &as_text(&new)).unwrap(), new, "what is shown can be written");
        for wrong in [
            RetentionRequest { keep: Some("soon".to_owned()), ..RetentionRequest::default() },
            RetentionRequest { keep: Some("1s".to_owned()), ..RetentionRequest::default() },
            RetentionRequest { rungs: Some(vec!["1h".to_owned()]), ..RetentionRequest::default() },
            RetentionRequest {
                rungs: Some(vec!["1d until 7d".to_owned(), "1h until 8d".to_owned()]),
                ..RetentionRequest::default()
            },
        ] {
            assert!(changed(&ladder(), &wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_reaches_beyond_what_is_kept_is_said() {
        assert_eq!(without_effect(&ladder()), Vec::<String>::new());
        let texts = ["1h until 1d", "4h until 7d", "1d until 30d"].map(str::to_owned);
        let mut chosen = Ladder { rungs: rungs(&texts).unwrap(), ..ladder() };
        assert_eq!(without_effect(&chosen), ["4h until 7d", "1d until 30d"]);
        chosen.keep = 48 * HOUR;
        assert_eq!(without_effect(&chosen), ["1d until 30d"]);
        chosen.keep = HOUR;
        let shares =
            ["every write for 2h", "every undo epoch for 4h", "guaranteed for 2h"].map(str::to_owned);
        assert_eq!(without_effect(&chosen), [&shares[..], &texts[..]].concat());
    }

    #[test]
    fn a_drive_holds_what_is_left_after_the_log_at_the_last_hours_churn() {
        const GIB: u64 = 1 << 30;
        let churn = Churn { log_last_hour: 2 * GIB, undo_last_hour: GIB, ..Churn::default() };
        let room = Room { free_bytes: 100 * GIB, total_bytes: 100 * GIB };
        assert_eq!(churn.hours_held(room, 2 * HOUR), Some(76), "80 GiB less 4 for the log");
        assert_eq!(Churn::default().hours_held(room, HOUR), None);
    }

    #[test]
    fn a_journal_at_rest_says_how_far_its_drive_reaches_by_its_last_hour_and_that_it_has_none_yet() {
        let folder = |lab: &Lab| lab.retention.folder().to_owned();
        let of = |lab: &Lab| reach_at_rest(fs_opener(), &folder(lab), &ladder()).unwrap();
        let none = Reach { hours_held: None, is_young: true };
        let (young, old) = (lab(11), lab(24)); // points every five minutes
        assert_eq!(of(&young), none);
        let names = |folder: &Path| std::fs::read_dir(folder).unwrap().count();
        let before = names(&folder(&old));
        let reach = of(&old);
        assert!(!reach.is_young && reach.hours_held.is_some_and(|hours| hours > 0), "{reach:?}");
        assert_eq!(names(&folder(&old)), before);
        let shape = old.retention.shape();
        let hour: u64 =
            shape.disks.values().flat_map(|disk| &disk.runs).map(|run| run.bytes).sum::<u64>() / 2;
        let churn = Churn::of(&shape, |_| &[], newest(&shape, |_| &[]));
        assert!(
            (hour..=hour * 13 / 12).contains(&churn.undo_last_hour),
            "half of what two hours left: {churn:?}"
        );
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(reach_at_rest(fs_opener(), &empty.path().join("none"), &ladder()).unwrap(), none);
    }
}
