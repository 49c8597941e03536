//! `protect`: the start of replication, as planned.
//!
//! Invariants: nothing is created or opened for writing before the whole plan held, and nothing is replicated before
//! every target of it was opened; an existing disk that does not carry the source's partition table or file systems is
//! overwritten only when the operator said so; a new disk begins with a copy, an existing one with a compare. Blocks:
//! called on a blocking thread by `admin`. Units: bytes.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::store::target::{
    CreateOptions, DiskUuid, Expectation, Target, TargetError, TargetKind, TargetSpec, create_target,
    open_target,
};
use reprotect_engine::units::{DiskId, LineageId, SECTOR_BYTES};
use serde::{Deserialize, Serialize};

use crate::catalogue::{Machine, ProtectedDisk, SourceDisk, kind_from_text, peer, unhex};
use crate::device;
use crate::guard::target_files;
use crate::plan::{Planned, plan, reserved_bytes};
use crate::registry::Registry;

/// What the operator asks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProtectRequest {
    /// Name or UUID of the machine.
    pub machine: String,
    /// Disk and existing target.
    pub original: Vec<(String, PathBuf)>,
    /// Directory whose VMDKs are proposed.
    pub original_from: Option<PathBuf>,
    /// Directory for new disks.
    pub datastore: Option<PathBuf>,
    /// createType of new disks.
    pub kind: Option<String>,
    /// Carry out, and overwrite what does not match.
    pub yes: bool,
    /// Only tell the plan.
    pub dry_run: bool,
}

/// One line of the plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// The source disk's name.
    pub source: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The target.
    pub path: PathBuf,
    /// Its kind.
    pub kind: String,
    /// Whether it exists and will be compared.
    pub existing: bool,
    /// How well it matches: 100 for the partition table, 10 for each file system; zero is no match.
    pub score: u32,
    /// The disk's UUID, once it is protected.
    pub disk: Option<String>,
}

impl PlannedDisk {
    /// Whether it would overwrite a disk that carries nothing of its source.
    #[must_use]
    pub const fn overwrites_unmatched(&self) -> bool {
        self.existing && self.score == 0
    }
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProtectAnswer {
    /// The machine's name.
    pub machine: String,
    /// What was or would be done.
    pub disks: Vec<PlannedDisk>,
    /// Whether it was done.
    pub done: bool,
    /// Disks of the machine that are left out, and why.
    pub left_out: Vec<String>,
}

/// Plans, and unless it is a dry run or needs confirmation, carries out.
///
/// # Errors
/// With what is wrong and what to do.
pub fn protect(
    registry: &Registry,
    datastores: &[PathBuf],
    request: &ProtectRequest,
) -> anyhow::Result<ProtectAnswer> {
    let machine = registry.machine(&request.machine)?;
    let _alone = registry.changing_of(&machine.agent)?;
    let mut left_out = Vec::new();
    let plan = plan(registry, datastores, &machine, request, &mut left_out)?;
    if plan.is_empty() {
        bail!("there is nothing to protect: {}", reasons(&left_out));
    }
    let unmatched = plan.iter().find(|planned| planned.1.overwrites_unmatched());
    if let Some((source, planned)) = unmatched
        && !request.yes
        && !request.dry_run
    {
        bail!(
            "{} carries neither the partition table nor the file systems of {}; if it is to be overwritten, repeat with --yes",
            planned.path.display(),
            source.name
        );
    }
    let mut answer = ProtectAnswer {
        machine: machine.host_name.clone(),
        disks: Vec::new(),
        done: !request.dry_run,
        left_out,
    };
    if request.dry_run {
        answer.disks = plan.into_iter().map(|(_, planned)| planned).collect();
        return Ok(answer);
    }
    let targets = prepare(registry, &plan)?;
    for ((source, mut planned), target) in plan.into_iter().zip(targets) {
        planned.disk = Some(begin(registry, &machine, &source, &planned, target)?.to_string());
        answer.disks.push(planned);
    }
    Ok(answer)
}

/// Opens or creates every target of the plan, or none: what was begun before something failed is undone.
fn prepare(registry: &Registry, plan: &Planned) -> anyhow::Result<Vec<Target>> {
    let mut targets: Vec<Target> = Vec::new();
    let mut known = registry.known_uuids();
    for (source, planned) in plan {
        let prepared = target_of(registry, source, planned, &known);
        match prepared {
            Ok(target) => {
                known.extend(target.facts().uuid);
                targets.push(target);
            }
            Err(error) => {
                targets.into_iter().for_each(|target| undo(registry, target));
                return Err(error);
            }
        }
    }
    Ok(targets)
}

/// Closes a target that is not to be used after all, and removes it when it was just made. Best effort: the error
/// that led here is the one to report, and what stays is named in the log.
fn undo(registry: &Registry, target: Target) {
    let facts = target.facts().clone();
    let files = target_files(&**registry.opener(), &facts.path);
    let closed = target.close();
    let removed = if facts.fresh {
        files.iter().rev().try_for_each(|file| registry.opener().remove(file))
    } else {
        Ok(())
    };
    if let Err(error) = closed.and(removed.map_err(TargetError::from)) {
        tracing::warn!(path = %facts.path.display(), %error, "a target that was not used could not be put back");
    }
}

fn target_of(
    registry: &Registry,
    source: &SourceDisk,
    planned: &PlannedDisk,
    known_uuids: &BTreeSet<DiskUuid>,
) -> anyhow::Result<Target> {
    let kind =
        kind_from_text(&planned.kind).with_context(|| format!("unknown target kind {}", planned.kind))?;
    let spec = TargetSpec { path: planned.path.clone(), kind };
    if planned.existing {
        let expect = Expectation {
            size_bytes: Some(source.size_bytes),
            known_uuids: known_uuids.clone(),
            writable: true,
        };
        return Ok(open_target(registry.opener(), &spec, &expect)?);
    }
    if let Some(dir) = spec.path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let reserved_bytes = reserved_bytes(registry, &spec.path);
    let options = CreateOptions { reserved_bytes, ..CreateOptions::default() };
    Ok(create_target(registry.opener(), &spec, source.size_bytes, known_uuids, &options)?)
}

fn reasons(left_out: &[String]) -> String {
    if left_out.is_empty() { "the machine has reported no disks".to_owned() } else { left_out.join("; ") }
}

fn begin(
    registry: &Registry,
    machine: &Machine,
    source: &SourceDisk,
    planned: &PlannedDisk,
    target: Target,
) -> anyhow::Result<DiskId> {
    let agent = peer(&machine.agent).with_context(|| format!("{} is no UUID", machine.agent))?;
    let source_id =
        unhex(&source.source).with_context(|| format!("{} is no source identity", source.source))?;
    let disk = DiskId::random().map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let lineage = LineageId::random().map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let mode = if planned.existing { PassMode::Compare } else { PassMode::Copy };
    let state =
        TargetDisk::new_state(disk, agent, source_id, source.size_bytes / SECTOR_BYTES, lineage, mode);
    let is_device = target.facts().kind == TargetKind::Device;
    let record = ProtectedDisk {
        disk: disk.to_string(),
        agent: machine.agent.clone(),
        source: source.source.clone(),
        source_name: source.name.clone(),
        path: planned.path.clone(),
        kind: planned.kind.clone(),
        size_bytes: source.size_bytes,
        existing: planned.existing,
        device: if is_device { device::identity(&planned.path) } else { None },
        journal: None,
        grows_to_bytes: None,
    };
    registry.add_disk(record, target, state)?;
    tracing::info!(%disk, machine = machine.host_name, source = source.name, path = %planned.path.display(), "protected");
    Ok(disk)
}
