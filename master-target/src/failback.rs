//! `failback`: a machine's disks are brought to a point, checked, and handed over to its virtual machine.
//!
//! ```text
//! last mark → Decided → Fenced → Drained → Verified → Released      (each step of all disks before the next)
//! ```
//! Invariants: the decision is one durable record of the whole machine, made before anything else is done, and from then
//! on no agent may open its disks; a step is recorded when it is done, and doing it twice is harmless, so the command is
//! repeated after whatever interrupted it and goes on where it was; nothing of the journal is removed; a target that is
//! not as it was written is not released unless the operator insists. Units: bytes. Called by `admin`.

mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::format::batch::MarkCause;
use reprotect_engine::format::message::{MarkRequest, PassMode};
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{DiskId, PeerId};
use serde::{Deserialize, Serialize};

use crate::api::PointInfo;
use crate::catalogue::{Failback, FailbackDisk, FailbackStep, Machine, ProtectedDisk, hex, peer};
use crate::points::{self, Chosen, NO_JOURNAL};
use crate::registry::Registry;
use crate::registry::failing_back::Letting;
use crate::retention::Hold;

/// How often it is looked whether the last mark is there.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long the last round may hold file systems frozen; then it is made without.
const FREEZE_LIMIT_MS: u64 = 60_000;

/// How much of a target is read again before it is released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyPolicy {
    /// Every block.
    Whole,
    /// One in 64, and 64 MiB at least.
    #[default]
    Sample,
    /// Nothing.
    None,
}

/// `POST /v1/failback`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailbackRequest {
    /// Name or UUID of the machine.
    pub machine: String,
    /// The point; none for the newest.
    pub point: Option<String>,
    /// The point is known to be damaged, and that is accepted.
    #[serde(default)]
    pub accept_damage: bool,
    /// What is read again.
    pub verify: VerifyPolicy,
    /// The source cannot be asked for its last changes.
    pub source_already_off: bool,
    /// Release also what is not as it was written.
    pub insist: bool,
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
    /// Take the machine's disks again.
    pub undo: bool,
}

/// The answer to [`FailbackRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailbackAnswer {
    /// The machine.
    pub machine: String,
    /// `planned`, `released` or `taken-back`.
    pub state: String,
    /// The point.
    pub point: String,
    /// What it promises.
    pub class: String,
    /// Its time by the source's clock, in milliseconds; zero where it is not known yet, or none of the marks.
    pub source_time_ms: u64,
    /// What is lost, if anything.
    pub loss: Option<String>,
    /// In a plan: another point than the one meant is taken, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its disks.
    pub disks: Vec<FailbackInfo>,
    /// What the operator does next.
    pub next: Vec<String>,
}

/// A disk of a [`FailbackAnswer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailbackInfo {
    /// Its UUID.
    pub disk: String,
    /// Its name on the machine.
    pub source: String,
    /// The target.
    pub path: String,
    /// Its kind.
    pub kind: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// The point on this disk, as EPOCH.NUMBER; empty where it is not chosen yet.
    pub point: String,
    /// The generation that fences what comes late; zero before.
    pub generation: u64,
    /// Bytes written to go back to the point.
    pub written_bytes: u64,
    /// Bytes read again.
    pub read_bytes: u64,
    /// Bytes of them that could be compared with what was written.
    pub compared_bytes: u64,
    /// What was not as it was written, as FIRST-LAST in bytes.
    pub different: Vec<String>,
}

/// Carries it out. Blocks, perhaps for long; the caller holds [`Registry::begin_long`] of its disks.
///
/// # Errors
/// What hinders it, and what to do; the same request again goes on where it was.
pub fn failback(registry: &Registry, request: &FailbackRequest) -> anyhow::Result<FailbackAnswer> {
    let mut answer = carry_out(registry, request)?;
    tell_doubts(registry, &mut answer);
    Ok(answer)
}

/// Where the source is not asked, what is in doubt stays so: whoever decides is told.
pub(crate) fn tell_doubts(registry: &Registry, answer: &mut FailbackAnswer) {
    let Some(loss) = &mut answer.loss else { return };
    for disk in &answer.disks {
        let doubt = DiskId::parse(&disk.disk).ok().and_then(|disk| registry.doubt(disk));
        if let Some(doubt) = doubt {
            loss.push_str(&format!(
                "; {}: {doubt}, so its target may lack some of them, or hold a part",
                disk.source
            ));
        }
    }
}

fn carry_out(registry: &Registry, request: &FailbackRequest) -> anyhow::Result<FailbackAnswer> {
    let machine = registry.machine(&request.machine)?;
    let agent = peer(&machine.agent).context("the machine's record is damaged; see the daemon's log")?;
    let records = registry.protected_disks(&machine.agent)?;
    registry.retention().context(NO_JOURNAL)?;
    let known = registry.failback(agent);
    if request.undo {
        let failback = known.with_context(|| {
            format!("no failback of {} goes on or is done; there is nothing to undo", machine.host_name)
        })?;
        return undo(registry, agent, &machine, &records, failback);
    }
    let mut failback = match known {
        Some(known) => go_on(known, &machine, request)?,
        None if request.dry_run => return plan(registry, &machine, &records, request),
        None => {
            let (decided, holds) = decide(registry, agent, &records, request)?;
            registry.record_failback(agent, &decided)?;
            drop(holds); // the steps have their own
            tracing::warn!(
                machine = machine.host_name,
                point = decided.point,
                "a failback begins; its disks are refused to every agent from now on"
            );
            decided
        }
    };
    if request.dry_run {
        return Ok(answer(&machine, &records, &failback, "planned"));
    }
    steps::fence(registry, agent, &mut failback)?;
    steps::still_whole(registry, &failback, request)?;
    steps::drain(registry, agent, &mut failback)?;
    steps::still_whole(registry, &failback, request)?;
    steps::verify(registry, agent, &mut failback, request)?;
    let overridden = steps::still_whole(registry, &failback, request)?;
    let how = if request.insist { Letting::Insisted } else { Letting::Sound };
    steps::release(registry, agent, &mut failback, how)?;
    let mut answer = answer(&machine, &records, &failback, "released");
    answer.note = overridden;
    answer.next = steps::next_steps(&machine, &answer.disks);
    tracing::warn!(
        machine = machine.host_name,
        point = failback.point,
        "failed back; its targets are released"
    );
    Ok(answer)
}

/// A failback that was begun is finished as it was begun.
fn go_on(known: Failback, machine: &Machine, request: &FailbackRequest) -> anyhow::Result<Failback> {
    if request.point.is_some() && request.point != known.asked {
        let asked = known.asked.as_deref().unwrap_or("its newest state");
        bail!(
            "a failback of {} to {asked} was begun; finish it without --point, or take the disks again with `failback --undo {}` first",
            machine.host_name,
            machine.host_name
        );
    }
    if known.undoing {
        bail!(
            "the disks of {} are being taken again, and some of them may be already; repeat `failback --undo {}`",
            machine.host_name,
            machine.host_name
        );
    }
    Ok(known)
}

/// Refuses what cannot be failed back.
fn check(registry: &Registry, records: &[ProtectedDisk]) -> anyhow::Result<Vec<DiskId>> {
    let views = registry.disks();
    let mut disks = Vec::new();
    for record in records {
        let name = format!("{} (disk {})", record.source_name, record.disk);
        let view = views.iter().find(|view| view.record.disk == record.disk);
        let status = view.and_then(|view| view.status.as_ref()).with_context(|| {
            format!("{name} could not be opened; see `status`, or `unprotect` it to leave it behind")
        })?;
        let snapshot = status.snapshot();
        if snapshot.phase == TargetDiskPhase::Failed || snapshot.closed {
            bail!("{name} is stopped; see `status`");
        }
        if snapshot.mode != PassMode::Done {
            bail!(
                "{name} is not synced; wait until `status` shows it as synced, or `unprotect` it to leave it behind"
            );
        }
        disks.push(DiskId::parse(&record.disk)?);
    }
    let shape = registry.retention().map(|retention| retention.shape()).unwrap_or_default();
    match disks.iter().find(|disk| shape.disks.get(disk).is_none_or(|known| known.epochs.is_empty())) {
        Some(disk) => bail!("disk {disk} has no point in the retention journal yet; wait for its next mark"),
        None => Ok(disks),
    }
}

/// Makes the last mark where the source can be asked, and chooses the point; it is held until the record says so.
fn decide(
    registry: &Registry,
    agent: PeerId,
    records: &[ProtectedDisk],
    request: &FailbackRequest,
) -> anyhow::Result<(Failback, Vec<Hold>)> {
    let disks = check(registry, records)?;
    let text = if source_is_asked(registry, &disks, request)? {
        let point = last_mark(registry, agent, &disks)?;
        request.point.clone().unwrap_or_else(|| hex(&point))
    } else {
        known_point(registry, &disks, request)?
    };
    let Chosen { places, note } = places_of(registry, &disks, &text, request)?;
    if let Some(note) = note {
        bail!("{note}; name that point with --point if it is the one to go home with");
    }
    // Before the record, after which no other point can be asked for.
    let retention = registry.retention().context(NO_JOURNAL)?;
    let holds = places.iter().map(|(disk, at)| retention.hold_to_go_back(*disk, *at)).collect();
    points::all_can_go_back(registry, &places)?;
    let shape = retention.shape();
    let lacks =
        |(disk, at): &&(DiskId, At)| shape.disks.get(disk).is_some_and(|known| known.is_doubtful(at.number));
    if let Some((disk, at)) = places.iter().find(lacks).filter(|_| !request.accept_damage) {
        bail!(
            "at {at} disk {disk} lacks changes that the redo log lost, and is no state it was in: choose another point, or go home with it as it is with --accept-damage"
        );
    }
    let listed = points::list(registry, &disks, true)?;
    let info = listed.iter().find(|info| {
        places.iter().all(|(disk, at)| {
            info.parts.iter().any(|part| part.disk == disk.to_string() && part.point == at.to_string())
        })
    });
    let disk = |(disk, at): &(DiskId, _)| {
        let begun = FailbackDisk {
            at: format!("{at}"),
            step: FailbackStep::Decided,
            generation: 0,
            written_bytes: 0,
            read_bytes: 0,
            compared_bytes: 0,
            different: Vec::new(),
            stamp: String::new(),
        };
        (disk.to_string(), begun)
    };
    let decided = Failback {
        asked: request.point.clone(),
        point: info.map_or(text, name_of),
        class: info.map_or_else(|| BETWEEN.to_owned(), |info| info.class.clone()),
        source_time_ms: info.map_or(0, |info| info.source_time_ms),
        source_away: request.source_already_off,
        undoing: false,
        accept_damage: request.accept_damage,
        disks: places.iter().map(disk).collect(),
    };
    Ok((decided, holds))
}

/// Where a point is. One that the operator named may be damaged; the last mark is the newest state, and needs no images.
fn places_of(
    registry: &Registry,
    disks: &[DiskId],
    text: &str,
    request: &FailbackRequest,
) -> anyhow::Result<Chosen> {
    points::choose(registry, disks, text, request.accept_damage || request.point.is_none())
}

/// What is promised of a state that is no mark.
const BETWEEN: &str = "between marks";

fn name_of(info: &PointInfo) -> String {
    if info.name.is_empty() { info.point.clone() } else { info.name.clone() }
}

/// Whether the agent makes the last mark; refuses where operator and machine do not say the same.
fn source_is_asked(registry: &Registry, disks: &[DiskId], request: &FailbackRequest) -> anyhow::Result<bool> {
    let connected = disks.iter().filter(|disk| registry.is_connected(**disk)).count();
    match (request.source_already_off, connected) {
        (true, 0) => Ok(false),
        (true, _) => {
            bail!("its agent is connected; leave --source-already-off out, so that the last changes travel")
        }
        (false, connected) if connected == disks.len() => Ok(true),
        (false, 0) => bail!(
            "its agent is not connected; start it so that the last changes travel, or give them up with --source-already-off"
        ),
        (false, _) => {
            bail!("its agent has not opened all of its disks; see `status` and `reprotect-agent status`")
        }
    }
}

/// The point where the source cannot be asked: as the operator said, else the newest consistent one, else the newest.
fn known_point(registry: &Registry, disks: &[DiskId], request: &FailbackRequest) -> anyhow::Result<String> {
    if let Some(point) = &request.point {
        return Ok(point.clone());
    }
    let all = points::list(registry, disks, true)?;
    let of_all = |info: &&PointInfo| info.complete && !info.degraded && info.damaged.is_none();
    let of_source = |info: &&PointInfo| of_all(info) && !info.targets_own;
    let consistent = all.iter().filter(of_source).find(|info| info.class != "fuzzy");
    let newest = consistent.or_else(|| all.iter().find(of_source));
    newest.map(|info| info.id.clone()).context(
        "the machine's disks have no sound point in common; name one with --point, disk by disk with `rollback` and `unprotect` otherwise",
    )
}

/// Has the agent read every disk once more and place a mark of cause `Stop`; answers the point when it is durable.
fn last_mark(registry: &Registry, agent: PeerId, disks: &[DiskId]) -> anyhow::Result<[u8; 16]> {
    match ask_for_mark(registry, agent, disks, true) {
        // The round took too long for a freeze: the operator said that the source is quiet.
        Err(LastMark::Refused(reason)) => {
            tracing::warn!(reason, "the last round is made again without a freeze");
            ask_for_mark(registry, agent, disks, false)
        }
        asked => asked,
    }
    .map_err(|error| match error {
        LastMark::Refused(reason) => {
            let reason = reason.replace("; ", ", ");
            anyhow!("the agent cannot make the last mark: {reason}; correct that, then repeat the command")
        }
        LastMark::Other(error) => error,
    })
}

enum LastMark {
    Refused(String),
    Other(anyhow::Error),
}

fn ask_for_mark(
    registry: &Registry,
    agent: PeerId,
    disks: &[DiskId],
    freeze: bool,
) -> Result<[u8; 16], LastMark> {
    let other = |error: anyhow::Error| LastMark::Other(error);
    let mut point = [0; 16];
    getrandom::fill(&mut point).map_err(|error| other(error.into()))?;
    let request = MarkRequest { point, freeze_limit_ms: FREEZE_LIMIT_MS, cause: MarkCause::Stop, freeze };
    let told = registry.ask_for_mark(agent, request);
    let waited = wait_for_mark(registry, disks, point, &told);
    registry.forget_mark(point);
    waited.map(|()| point)
}

fn wait_for_mark(
    registry: &Registry,
    disks: &[DiskId],
    point: [u8; 16],
    told: &BTreeSet<reprotect_engine::proto::target_disk::SessionId>,
) -> Result<(), LastMark> {
    let id = hex(&point);
    loop {
        let alive = registry.sessions().iter().any(|(session, _)| told.contains(session));
        let all = points::list(registry, disks, true).map_err(LastMark::Other)?;
        if all.iter().any(|info| info.id == id && info.complete) {
            // What is listed may not be durable yet.
            let retention = registry.retention().context(NO_JOURNAL).map_err(LastMark::Other)?;
            return retention.commit().map_err(|error| LastMark::Other(error.into()));
        }
        if let Some(reason) = registry.refusal(point) {
            return Err(LastMark::Refused(reason));
        }
        if !alive {
            return Err(LastMark::Other(anyhow!(
                "the agent's connection ended before its last mark was durable; repeat the command"
            )));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What would be done.
fn plan(
    registry: &Registry,
    machine: &Machine,
    records: &[ProtectedDisk],
    request: &FailbackRequest,
) -> anyhow::Result<FailbackAnswer> {
    let disks = check(registry, records)?;
    let asked = source_is_asked(registry, &disks, request)?;
    let text = match &request.point {
        None if asked => None,
        _ => Some(known_point(registry, &disks, request)?),
    };
    let place = |text| places_of(registry, &disks, text, request);
    let Chosen { places, note } = text.as_deref().map_or_else(|| Ok(Vec::new().into()), place)?;
    let listed = points::list(registry, &disks, true)?;
    let info = text.as_ref().and_then(|_| {
        listed.iter().find(|info| {
            places.iter().all(|(disk, at)| {
                info.parts.iter().any(|part| part.disk == disk.to_string() && part.point == at.to_string())
            })
        })
    });
    let planned = Failback {
        asked: request.point.clone(),
        point: info.map_or_else(|| text.unwrap_or_else(|| "a last mark".to_owned()), name_of),
        class: info.map_or_else(String::new, |info| info.class.clone()),
        source_time_ms: info.map_or(0, |info| info.source_time_ms),
        source_away: request.source_already_off,
        undoing: false,
        accept_damage: request.accept_damage,
        disks: BTreeMap::new(),
    };
    let mut answer = answer(machine, records, &planned, "planned");
    for disk in &mut answer.disks {
        let place = places.iter().find(|(id, _)| id.to_string() == disk.disk);
        disk.point = place.map_or_else(String::new, |(_, at)| at.to_string());
    }
    answer.note = note;
    Ok(answer)
}

fn answer(machine: &Machine, records: &[ProtectedDisk], failback: &Failback, state: &str) -> FailbackAnswer {
    let time = || {
        let at = std::time::UNIX_EPOCH + Duration::from_millis(failback.source_time_ms);
        humantime::format_rfc3339_seconds(at).to_string()
    };
    let loss = failback.source_away.then(|| match failback.source_time_ms {
        0 => "everything the source wrote after the point is lost".to_owned(),
        _ => format!("everything the source wrote after {} (by its clock) is lost", time()),
    });
    let info = |record: &ProtectedDisk| {
        let of = failback.disks.get(&record.disk);
        FailbackInfo {
            disk: record.disk.clone(),
            source: record.source_name.clone(),
            path: record.path.display().to_string(),
            kind: record.kind.clone(),
            size_bytes: record.size_bytes,
            point: of.map_or_else(String::new, |of| of.at.clone()),
            generation: of.map_or(0, |of| of.generation),
            written_bytes: of.map_or(0, |of| of.written_bytes),
            read_bytes: of.map_or(0, |of| of.read_bytes),
            compared_bytes: of.map_or(0, |of| of.compared_bytes),
            different: of.map_or_else(Vec::new, |of| of.different.clone()),
        }
    };
    FailbackAnswer {
        machine: machine.host_name.clone(),
        state: state.to_owned(),
        point: failback.point.clone(),
        class: failback.class.clone(),
        source_time_ms: failback.source_time_ms,
        loss,
        note: None,
        disks: records.iter().map(info).collect(),
        next: Vec::new(),
    }
}

/// Takes the machine's disks again: closed in order, opened anew, to be compared with their source.
fn undo(
    registry: &Registry,
    agent: PeerId,
    machine: &Machine,
    records: &[ProtectedDisk],
    mut failback: Failback,
) -> anyhow::Result<FailbackAnswer> {
    failback.undoing = true;
    registry.record_failback(agent, &failback)?;
    for (name, _) in failback.disks.iter().filter(|(_, of)| of.step < FailbackStep::Fenced) {
        // Whoever has it open is told that it is taken away; one that stopped needs no fence.
        let _ = registry.fence(DiskId::parse(name)?);
    }
    steps::release(registry, agent, &mut failback, Letting::Undo)?;
    for (name, of) in &failback.disks {
        let changed = registry.take_back(DiskId::parse(name)?, &of.stamp).with_context(|| {
            format!("disk {name} cannot be taken again; power its virtual machine off and detach the disk, then repeat the command")
        })?;
        tracing::warn!(disk = name, changed, "taken again after a failback; its agent has to compare it");
    }
    registry.forget_failback(agent)?;
    registry.offer_again(agent);
    let mut answer = answer(machine, records, &failback, "taken-back");
    answer.loss = None;
    answer.next = vec![format!(
        "start the agent on {} if it does not run: the disks are compared with it, and only differences travel",
        machine.host_name
    )];
    Ok(answer)
}

#[cfg(test)]
mod tests;
