//! Recovery points of a running master target: listed, found by what an operator writes, named, pinned, gone back to.
//!
//! A point of a disk is called `EPOCH.NUMBER`; the parts of a machine's point share an identity, of which the first
//! digits are enough, and a name where somebody gave one. What lies between marks is found by time or sequence.
//!
//! Invariants: a fuzzy point is listed only when asked for and never chosen by `newest` or a time; one that is known to be
//! damaged is listed as that, never chosen so, and handed out only to who accepts it; a machine's point is one that all
//! its disks have, and a time between two of them only where nothing is missing on any (`times`); which is newer says the place of points, never their time. Units: entry numbers, sequences, times by the
//! source's clock. Called by `admin`.

mod times;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::format::batch::{MarkCause, MarkClass};
use reprotect_engine::format::manifest::{Edit, PointDropped, PointKept};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::format::wire::Text;
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::store::journal::points::{self, Offer, Point};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{Journal, JournalError};
use reprotect_engine::units::{DiskId, Sequence, Timestamp};

use crate::api::{DiskTimeline, IntervalInfo, PointInfo, PointPart, RollbackAnswer, RollbackAnswers};
use crate::catalogue::ProtectedDisk;
use crate::disk_worker::DiskInputs;
use crate::journaled::Journaled;
use crate::redo::kept_point;
use crate::registry::Registry;
use crate::retention::{Hold, Retention};
use crate::rot::note_entry;

pub(crate) const NO_JOURNAL: &str =
    "this master target keeps newest states only; set `retention.path` in its configuration, then restart";
const NOT_YET: &str = "the disk is not in the retention journal yet; wait for its initial sync";

/// Works on the journal of a running master target.
fn with_journal<T>(
    registry: &Registry,
    work: impl FnOnce(&mut Journal) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    work(retention(registry)?.lock().get()?)
}

fn retention(registry: &Registry) -> anyhow::Result<&Arc<Retention>> {
    registry.retention().context(NO_JOURNAL)
}

/// The points of a disk that can be had now, oldest first.
///
/// # Errors
/// When the disk is in no journal, or its marks cannot be read.
pub(crate) fn of_disk(registry: &Registry, disk: DiskId) -> anyhow::Result<Vec<Point>> {
    points_of(retention(registry)?, disk)
}

fn points_of(retention: &Retention, disk: DiskId) -> anyhow::Result<Vec<Point>> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    if !journal.shape().disks.contains_key(&disk) {
        bail!(NOT_YET);
    }
    reading(journal, disk, |journal| points::points(journal, disk))
}

/// Reads of the log what points need; an entry that turns out to be damaged is recorded, and the others are read.
fn reading<T>(
    journal: &mut Journal,
    disk: DiskId,
    read: impl Fn(&mut Journal) -> Result<T, JournalError>,
) -> anyhow::Result<T> {
    loop {
        match read(journal) {
            // Each turn knows one more, and there are not more than undo epochs.
            Err(error) if note_entry(journal, disk, &error)? => {}
            read => return Ok(read?),
        }
    }
}

/// A point of one or several disks.
#[derive(Clone, Debug)]
struct Common {
    point: Point,
    parts: Vec<(DiskId, At)>,
}

impl Common {
    fn add(&mut self, disk: DiskId, point: &Point) {
        self.point.degraded |= point.degraded;
        self.point.damaged = self.point.damaged.or(point.damaged);
        self.point.pinned |= point.pinned;
        self.point.source_time = self.point.source_time.max(point.source_time);
        self.parts.push((disk, point.at));
    }
}

/// The points of disks, each with the disks that have it, oldest first.
fn common(retention: &Retention, disks: &[DiskId]) -> anyhow::Result<Vec<Common>> {
    let mut all = Vec::new();
    for disk in disks {
        all = merged(all, *disk, &points_of(retention, *disk)?);
    }
    Ok(all)
}

/// Points in their order and those of one more disk, in an order that is right for all: what the disks of a machine have in
/// common stands in the same order on each of them. Only what lies between two such points is ordered by its time.
fn merged(mut known: Vec<Common>, disk: DiskId, points: &[Point]) -> Vec<Common> {
    let of_disk: BTreeMap<[u8; 16], &Point> = points.iter().map(|point| (point.id, point)).collect();
    let places: BTreeMap<[u8; 16], usize> = known.iter().map(|common| common.point.id).zip(0..).collect();
    for common in &mut known {
        if let Some(point) = of_disk.get(&common.point.id) {
            common.add(disk, point);
        }
    }
    let mut known = known.into_iter().enumerate().peekable();
    let mut all = Vec::new();
    for point in points {
        let place = places.get(&point.id);
        let goes_first = |(at, other): &(usize, Common)| match place {
            Some(place) => at <= place,
            None => !of_disk.contains_key(&other.point.id) && other.point.source_time <= point.source_time,
        };
        while let Some((_, common)) = known.next_if(goes_first) {
            all.push(common);
        }
        if place.is_none() {
            all.push(Common { point: *point, parts: vec![(disk, point.at)] });
        }
    }
    all.extend(known.map(|(_, common)| common));
    all
}

/// The points of disks, newest first; fuzzy ones without a name only when `all` are wanted.
///
/// # Errors
/// When a disk is in no journal, or its marks cannot be read.
pub fn list(registry: &Registry, disks: &[DiskId], all: bool) -> anyhow::Result<Vec<PointInfo>> {
    let found = common(retention(registry)?, disks)?.into_iter().rev();
    let is_named = |common: &Common| !common.point.name.as_str().is_empty();
    let wanted = found.filter(|common| all || common.point.class != MarkClass::Fuzzy || is_named(common));
    Ok(wanted.map(|common| info(&common, disks.len())).collect())
}

fn info(common: &Common, disks: usize) -> PointInfo {
    let point = &common.point;
    let class = match point.class {
        MarkClass::Crash => "crash-consistent",
        MarkClass::Frozen => "frozen",
        MarkClass::App => "application-consistent",
        MarkClass::Fuzzy => "fuzzy",
    };
    let cause = match point.cause {
        MarkCause::Pass => "pass",
        MarkCause::Timer => "timer",
        MarkCause::Command => "command",
        MarkCause::Stop => "stop",
    };
    PointInfo {
        point: if disks == 1 { point.at.to_string() } else { short(&point.id) },
        name: point.name.as_str().to_owned(),
        class: class.to_owned(),
        source_time_ms: point.source_time.0 / 1_000_000,
        pinned: point.pinned,
        degraded: point.degraded,
        damaged: point.damaged.map(|rot| rot.to_string()),
        id: hex(&point.id),
        cause: cause.to_owned(),
        kept: point.kept,
        targets_own: point.is_targets_own(),
        complete: common.parts.len() == disks,
        parts: common
            .parts
            .iter()
            .map(|(disk, at)| PointPart { disk: disk.to_string(), point: at.to_string() })
            .collect(),
    }
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Enough digits to find a point again.
fn short(id: &[u8; 16]) -> String {
    hex(id).chars().take(8).collect()
}

/// What an operator may write for a point.
enum Asked {
    Newest(Option<MarkClass>),
    Time(Timestamp),
    Sequence(Sequence),
    Place(At),
    Label(String),
}

impl Asked {
    fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "newest" => Self::Newest(None),
            "newest-app" => Self::Newest(Some(MarkClass::App)),
            _ => {
                if let Some(sequence) = text.strip_prefix("seq:") {
                    let sequence = sequence
                        .parse()
                        .map_err(|_| anyhow!("{text} is no sequence; write for example seq:4711"))?;
                    Self::Sequence(Sequence(sequence))
                } else if let Some(time) = parse_time(text)? {
                    Self::Time(time)
                } else if let Ok(at) = text.parse() {
                    Self::Place(at)
                } else {
                    Self::Label(text.to_owned())
                }
            }
        })
    }
}

/// A time as an operator writes it: `@2026-11-23 07:05:00`, with or without `T`, fractions and `Z`, or `@-5m`.
fn parse_time(text: &str) -> anyhow::Result<Option<Timestamp>> {
    let Some(time) = text.strip_prefix('@') else { return Ok(None) };
    let refused =
        || anyhow!("{text} is no time; write @2026-11-23T07:05:00Z (UTC), or @-5m for five minutes ago");
    let at = match time.strip_prefix('-') {
        Some(ago) => {
            let ago = humantime::parse_duration(ago).map_err(|_| refused())?;
            SystemTime::now().checked_sub(ago).ok_or_else(refused)?
        }
        None => humantime::parse_rfc3339_weak(time).map_err(|_| refused())?,
    };
    // To the end of the second, or of the part of one, that is written: `points` shows whole seconds.
    let digits =
        time.rsplit_once('.').map_or(0, |(_, part)| part.bytes().take_while(u8::is_ascii_digit).count());
    let rest = match 9_u32.saturating_sub(u32::try_from(digits).unwrap_or(9)) {
        _ if time.starts_with('-') => 0,
        missing => 10_u64.pow(missing) - 1,
    };
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO) + Duration::from_nanos(rest);
    Ok(Some(Timestamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))))
}

/// Where a point that was asked for is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// On each disk.
    pub places: Vec<(DiskId, At)>,
    /// What is to be told to whoever asked: another point than the one meant was taken, and why.
    pub note: Option<String>,
}

impl From<Vec<(DiskId, At)>> for Chosen {
    fn from(places: Vec<(DiskId, At)>) -> Self {
        Self { places, note: None }
    }
}

/// Where a point is on each of some disks of one machine.
///
/// # Errors
/// When there is none, or only some of the disks have it; the text says what there is.
pub fn find(registry: &Registry, disks: &[DiskId], text: &str) -> anyhow::Result<Chosen> {
    match Asked::parse(text)? {
        Asked::Time(time) => times::by_time(retention(registry)?, disks, time),
        Asked::Sequence(sequence) => {
            let [disk] = disks else { bail!("a sequence is of one disk; write MACHINE:DISK") };
            with_journal(registry, |journal| {
                let found = reading(journal, *disk, |journal| points::at_sequence(journal, *disk, sequence))?;
                Ok(vec![(*disk, found.at)].into())
            })
        }
        Asked::Place(at) => {
            let [disk] = disks else { bail!("{text} is a point of one disk; write MACHINE:DISK") };
            // It may be no mark but a record of an ordered stretch: whether it can be had is seen when it is opened.
            check_state(retention(registry)?, *disk, at)?;
            Ok(vec![(*disk, at)].into())
        }
        Asked::Newest(class) => {
            let all = common(retention(registry)?, disks)?;
            let fits = |common: &&Common| {
                common.parts.len() == disks.len()
                    && common.point.is_sound()
                    && class.is_none_or(|class| class == common.point.class)
            };
            let newest = all.iter().rev().find(fits);
            newest.map(|common| common.parts.clone().into()).ok_or_else(|| nothing_newest(&all))
        }
        Asked::Label(label) => by_label(registry, disks, &label).map(Chosen::from),
    }
}

/// Refuses a place at which the disk never was as it would be shown.
fn check_state(retention: &Retention, disk: DiskId, at: At) -> anyhow::Result<()> {
    let mut locked = retention.lock();
    let journal = locked.get()?;
    anyhow::ensure!(journal.shape().disks.contains_key(&disk), NOT_YET);
    let is_state = reading(journal, disk, |journal| points::is_state(journal, disk, at))?;
    anyhow::ensure!(
        is_state,
        "{at} is inside a scan round or a window: the disk never held just that; choose a point that `points --all` lists, or a time as @TIME"
    );
    Ok(())
}

/// As [`find`], for who wants to have the point: one that is known to be damaged is refused unless that is `accepted`.
///
/// # Errors
/// As for [`find`]; and what is damaged of the point.
pub fn choose(registry: &Registry, disks: &[DiskId], text: &str, accepted: bool) -> anyhow::Result<Chosen> {
    let chosen = find(registry, disks, text)?;
    if !accepted {
        with_journal(registry, |journal| {
            for (disk, at) in &chosen.places {
                if let Some(rot) = journal.shape().disks.get(disk).and_then(|known| known.rot(*at)) {
                    bail!(
                        "point {at} of disk {disk} is damaged ({rot}); choose another one that `points` lists, restore the file from a copy of the retention folder, or write --accept-damage for what can be read of it"
                    );
                }
            }
            Ok(())
        })?;
    }
    Ok(chosen)
}

fn by_label(registry: &Registry, disks: &[DiskId], label: &str) -> anyhow::Result<Vec<(DiskId, At)>> {
    let all = common(retention(registry)?, disks)?;
    let named: Vec<&Common> = all.iter().filter(|common| common.point.name.as_str() == label).collect();
    let by_id = |common: &&Common| label.len() >= 6 && hex(&common.point.id).starts_with(label);
    let found = if named.is_empty() { all.iter().filter(by_id).collect() } else { named };
    match found.as_slice() {
        [one] if one.parts.len() == disks.len() => Ok(one.parts.clone()),
        [one] => bail!(
            "{} of {} disks have the point {label}; name one disk as MACHINE:DISK, or choose a point that all have",
            one.parts.len(),
            disks.len()
        ),
        [] => {
            let known: Vec<String> =
                all.iter().rev().take(5).map(|common| info(common, disks.len()).point).collect();
            match known.as_slice() {
                [] => bail!("the disk has no point yet; wait for its next mark"),
                known => bail!(
                    "there is no point {label}; the newest are {}; `points --all` lists all",
                    known.join(", ")
                ),
            }
        }
        several => bail!("{} points are called {label}; write the POINT that `points` shows", several.len()),
    }
}

fn nothing_newest(all: &[Common]) -> anyhow::Error {
    match all.last() {
        None => anyhow!("there is no point yet; wait for the next mark"),
        Some(newest) if newest.point.damaged.is_some() => anyhow!(
            "there is no consistent point that is whole; of the newest, {}, something is damaged (`points --all` says what): restore the file, wait for the next mark, or name the point",
            info(newest, newest.parts.len()).point
        ),
        Some(newest) => anyhow!(
            "there is no consistent point; the newest of any kind is {} (`points --all` lists them): make one with the agent's `mark --freeze`, or name a fuzzy one",
            info(newest, newest.parts.len()).point
        ),
    }
}

/// Changes what is known of a point that outlives the redo log; one inside an undo epoch outlives it while it is pinned.
///
/// # Errors
/// When the point is not there, or lies inside an undo epoch and is only to be named, or the manifest cannot be written.
pub fn change(
    registry: &Registry,
    disks: &[DiskId],
    text: &str,
    pinned: Option<bool>,
    name: Option<&str>,
) -> anyhow::Result<Chosen> {
    let chosen = find(registry, disks, text)?;
    with_journal(registry, |journal| {
        let mut edits = Vec::new();
        for (disk, at) in &chosen.places {
            edits.extend(changed(journal, *disk, *at, pinned, name)?);
        }
        Ok(journal.edit(&edits, wall_clock())?)
    })?;
    Ok(chosen)
}

fn changed(
    journal: &mut Journal,
    disk: DiskId,
    at: At,
    pinned: Option<bool>,
    name: Option<&str>,
) -> anyhow::Result<Option<Edit>> {
    let known = journal.shape().disks.get(&disk).context(NOT_YET)?;
    let kept = known.points.values().find(|point| At::entry(point.epoch, point.number) == at).copied();
    Ok(match (kept, pinned) {
        // Without its pin it goes with its part of the redo log, like the marks around it.
        (Some(kept), Some(false)) if known.is_inside(&kept) => {
            Some(Edit::PointDropped(PointDropped { disk, point: kept.point }))
        }
        (Some(kept), pinned) => Some(Edit::PointChanged(PointKept {
            pinned: pinned.unwrap_or(kept.pinned),
            name: name.map_or(kept.name, Text::new),
            ..kept
        })),
        (None, Some(true)) => {
            let kept = mark_inside(journal, disk, at)?;
            let name = name.map_or(kept.name, Text::new);
            Some(Edit::PointKept(PointKept { pinned: true, name, ..kept }))
        }
        (None, Some(false)) => None,
        (None, None) => {
            bail!("point {at} lies inside an undo epoch and goes with the redo log; `pin` it first")
        }
    })
}

/// A mark that only the log knows, as it is kept.
fn mark_inside(journal: &mut Journal, disk: DiskId, at: At) -> anyhow::Result<PointKept> {
    View::check(journal, disk, at)?;
    let entry = journal.entries(disk).iter().find(|entry| entry.number == at.number).copied();
    let mark = entry.filter(|entry| entry.kind == EntryKind::Mark && at.records == 0);
    let entry = mark.with_context(|| {
        format!("{at} is no mark but lies between two; keep it with `export`, or pin one that `points --all` lists")
    })?;
    let mark = journal.mark(disk, &entry)?;
    let known = journal.shape().disks.get(&disk).context(NOT_YET)?;
    let degraded = known.is_degraded_mark(&mark, at.number);
    Ok(PointKept { degraded, ..kept_point(disk, at, mark.sequence, &mark) })
}

/// What is offered, disk by disk.
///
/// # Errors
/// As for [`list`].
pub fn timeline(registry: &Registry, disks: &[ProtectedDisk]) -> anyhow::Result<Vec<DiskTimeline>> {
    let of = |record: &ProtectedDisk| {
        let disk = DiskId::parse(&record.disk)?;
        let points = list(registry, &[disk], false)?;
        let intervals = with_journal(registry, |journal| {
            reading(journal, disk, |journal| points::timeline(journal, disk))
        })?;
        let intervals = intervals
            .iter()
            .map(|interval| IntervalInfo {
                offer: match interval.offer {
                    Offer::AnyWrite => "any-write",
                    Offer::PointsOnly => "point-only",
                    Offer::Degraded => "degraded",
                    Offer::Damaged => "damaged",
                    Offer::Lost => "lost",
                }
                .to_owned(),
                from_ms: interval.from.0 / 1_000_000,
                to_ms: interval.to.0 / 1_000_000,
            })
            .collect();
        Ok(DiskTimeline { disk: record.disk.clone(), source: record.source_name.clone(), intervals, points })
    };
    disks.iter().map(of).collect()
}

const STOPPED: &str = "the disk is stopped, or not in the retention journal; see `status`";

/// Runs on a disk's thread; a disk that stands says so.
pub(crate) fn on_disk<T: Send + 'static>(
    inputs: &DiskInputs,
    work: impl FnOnce(&mut Journaled) -> Result<T, JournalError> + Send + 'static,
) -> anyhow::Result<T> {
    let answer = inputs.ask(move |store| store.map(work))?;
    Ok(answer.context(STOPPED)??)
}

/// As [`on_disk`], for what only reads; refused at once while the disk goes back to a point.
pub(crate) fn look_at_disk<T: Send + 'static>(
    inputs: &DiskInputs,
    work: impl FnOnce(&mut Journaled) -> Result<T, JournalError> + Send + 'static,
) -> anyhow::Result<T> {
    if let Some(why) = inputs.going_back() {
        bail!("{why}; read it then");
    }
    let answer = inputs.look(move |store| store.map(work))?;
    Ok(answer.context(STOPPED)??)
}

/// Takes disks back to a point, in place, one after another.
///
/// # Errors
/// When the point is not kept, or a disk stands; disks before it have gone back by then, which the text says.
pub fn rollback(
    registry: &Registry,
    disks: &[DiskId],
    text: &str,
    accept_damage: bool,
) -> anyhow::Result<RollbackAnswers> {
    let Chosen { places, note } = choose(registry, disks, text, accept_damage)?;
    if let Some(note) = note {
        // Whoever said yes said it to what was asked for.
        bail!("{note}; name that point if it is the one to go back to");
    }
    if disks.iter().any(|disk| registry.is_connected(*disk)) {
        bail!(
            "its agent is connected and would write on over the point; stop the agent or `unprotect` the disk first, then roll back"
        );
    }
    // None of them may go, or be refused for want of room, when others have gone back.
    let retention = retention(registry)?;
    let _holds: Vec<Hold> = places.iter().map(|(disk, at)| retention.hold_to_go_back(*disk, *at)).collect();
    if places.len() > 1 {
        all_can_go_back(registry, &places)?;
    }
    let mut done = Vec::new();
    for (disk, at) in places {
        let went = rollback_disk(registry, disk, at);
        let answer = went.with_context(|| {
            let back: Vec<String> = done.iter().map(|answer: &RollbackAnswer| answer.disk.clone()).collect();
            match back.as_slice() {
                [] => format!("disk {disk} was not rolled back"),
                back => format!(
                    "disk {disk} was not rolled back, {} was; roll it forward, or try again",
                    back.join(", ")
                ),
            }
        })?;
        done.push(answer);
    }
    Ok(RollbackAnswers { disks: done })
}

/// Refuses to take disks back of which not all would get there: each point must be there, and what all of them overwrite must
/// fit on the retention drive together. Changes nothing but that what waits is applied.
///
/// # Errors
/// What hinders it, and what to do.
pub(crate) fn all_can_go_back(registry: &Registry, places: &[(DiskId, At)]) -> anyhow::Result<()> {
    let mut needed = 0;
    for (disk, at) in places.iter().copied() {
        let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        let of_disk = on_disk(&inputs, move |store| store.needed_to_go_back(at));
        needed += of_disk.with_context(|| format!("disk {disk} cannot go to {at}; nothing was changed"))?;
    }
    let retention = retention(registry)?;
    if let Some(free) = retention.usable_bytes()?.filter(|free| needed > *free) {
        bail!(
            "to keep what {} disks hold now, up to {needed} bytes are needed at {}, and {free} may be used there: free some space or shorten the retention, then try again, or choose a newer point; nothing was changed",
            places.len(),
            retention.folder().display()
        );
    }
    Ok(())
}

fn rollback_disk(registry: &Registry, disk: DiskId, at: At) -> anyhow::Result<RollbackAnswer> {
    let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
    // Asked on the disk's thread: its agent may have come since the command began.
    let status = registry.disk_status(disk).context("the disk could not be opened; see `status`")?;
    let is_open = move || matches!(status.snapshot().phase, TargetDiskPhase::Open | TargetDiskPhase::Opening);
    let done =
        on_disk(&inputs, move |store| if is_open() { Ok(None) } else { store.rollback(at).map(Some) })?;
    let done = done.context("its agent opened it meanwhile and would write on over the point; stop the agent or `unprotect` the disk, then roll back")?;
    tracing::warn!(%disk, %at, written = done.written_bytes, "rolled back");
    Ok(RollbackAnswer {
        disk: disk.to_string(),
        point: at.to_string(),
        compared_bytes: done.compared_bytes,
        written_bytes: done.written_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A point by its identity, shown with a time.
    fn point(id: u8, number: u64, time: u64) -> Point {
        Point {
            at: At::entry(1, number),
            id: [id; 16],
            class: MarkClass::Crash,
            cause: MarkCause::Timer,
            source_time: Timestamp(time),
            sequence: Sequence(number),
            name: Text::new(""),
            pinned: false,
            degraded: false,
            kept: true,
            damaged: None,
        }
    }

    #[test]
    fn points_of_several_disks_stand_in_their_order_whatever_the_source_calls_the_time() {
        // Its clock was set back by an hour before point 3, and a year ahead before point 5.
        let times = [0, 5000, 5010, 1420, 1430, 31_000_000, 1450];
        let disk = |number: u8, ids: &[u8]| {
            let of = |id: &u8| point(*id, u64::from(*id) + 10 * u64::from(number), times[usize::from(*id)]);
            (DiskId([number; 16]), ids.iter().map(of).collect::<Vec<Point>>())
        };
        let disks = [disk(1, &[1, 2, 3, 5, 6]), disk(2, &[1, 3, 4, 5, 6]), disk(3, &[2, 3, 5])];
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]] {
            let all = order.iter().fold(Vec::new(), |all, at| merged(all, disks[*at].0, &disks[*at].1));
            let ids: Vec<u8> = all.iter().map(|common| common.point.id[0]).collect();
            assert_eq!(ids, [1, 2, 3, 4, 5, 6], "{order:?}");
            let parts: Vec<usize> = all.iter().map(|common| common.parts.len()).collect();
            assert_eq!(parts, [2, 2, 3, 1, 3, 2], "{order:?}");
        }
    }

    #[test]
    fn times_are_read_with_and_without_date_signs_and_nonsense_is_refused() {
        let nanos = |text: &str| parse_time(text).unwrap().map(|time| time.0 / 1_000_000);
        // Up to their end: what is shown is shorter than what is meant.
        assert_eq!(nanos("@1970-01-02T00:00:01Z"), Some(86_401_999));
        assert_eq!(nanos("@1970-01-02 00:00:01.5"), Some(86_401_599));
        assert_eq!(nanos("@1970-01-02 00:00:01.769Z"), Some(86_401_769));
        assert_eq!(parse_time("@1970-01-01 00:00:01.000000001Z").unwrap(), Some(Timestamp(1_000_000_001)));
        assert_eq!(nanos("newest"), None);
        let ago = nanos("@-10m").unwrap();
        let now = wall_clock().0 / 1_000_000;
        assert!((now - 700_000..now - 500_000).contains(&ago));
        for wrong in ["@", "@yesterday", "@-", "@-x"] {
            assert!(parse_time(wrong).unwrap_err().to_string().contains("write @"), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_place_time_or_sequence_is_a_name() {
        assert!(matches!(Asked::parse("3.152").unwrap(), Asked::Place(at) if at == At::entry(3, 152)));
        assert!(matches!(Asked::parse("3.152+4").unwrap(), Asked::Place(at) if at.records == 4));
        assert!(matches!(Asked::parse("seq:9").unwrap(), Asked::Sequence(Sequence(9))));
        assert!(matches!(Asked::parse("before 3.1").unwrap(), Asked::Label(_)));
        assert!(Asked::parse("seq:x").is_err());
    }
}
