//! `protect`: which source disk goes to which target, and the start of its replication.
//!
//! Invariants: nothing is created or opened for writing before the whole plan held; an existing disk that does not
//! carry the source's partition table or file systems is overwritten only when the operator said so; ambiguity is
//! refused with all candidates named; a new disk begins with a copy, an existing one with a compare. Blocks: called on
//! a blocking thread by `admin`. Units: bytes.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::proto::target_disk::TargetDisk;
use reprotect_engine::store::fingerprint::Fingerprint;
use reprotect_engine::store::identity::{DiskIdentity, match_score, propose_pairs};
use reprotect_engine::store::target::{
    CreateOptions, Expectation, Target, TargetKind, TargetSpec, create_target, detect_target, open_target,
};
use reprotect_engine::units::{DiskId, LineageId, SECTOR_BYTES};
use serde::{Deserialize, Serialize};

use crate::catalogue::{Machine, ProtectedDisk, SourceDisk, peer, unhex};
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
    let taken: Vec<ProtectedDisk> = registry.disks().into_iter().map(|view| view.record).collect();
    let mut left_out = Vec::new();
    let plan = if let Some(dir) = &request.datastore {
        check_datastore(dir, datastores)?;
        plan_new(&machine, dir, request.kind.as_deref(), &taken, &mut left_out)?
    } else if let Some(dir) = &request.original_from {
        plan_from(registry, &machine, dir, &taken, &mut left_out)?
    } else {
        plan_named(registry, &machine, &request.original, &taken)?
    };
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
    for (source, mut planned) in plan {
        if !request.dry_run {
            planned.disk = Some(carry_out(registry, &machine, &source, &planned)?.to_string());
        }
        answer.disks.push(planned);
    }
    Ok(answer)
}

fn reasons(left_out: &[String]) -> String {
    if left_out.is_empty() { "the machine has reported no disks".to_owned() } else { left_out.join("; ") }
}

fn check_datastore(dir: &Path, allowed: &[PathBuf]) -> anyhow::Result<()> {
    if !dir.is_absolute() {
        bail!("{} is a relative path; name the datastore's directory from the root", dir.display());
    }
    if !allowed.is_empty() && !allowed.iter().any(|root| dir.starts_with(root)) {
        bail!(
            "{} is not below any directory of `datastores` in the configuration; add it there",
            dir.display()
        );
    }
    Ok(())
}

type Planned = Vec<(SourceDisk, PlannedDisk)>;

fn selected<'a>(
    machine: &'a Machine,
    taken: &'a [ProtectedDisk],
    left_out: &mut Vec<String>,
) -> Vec<&'a SourceDisk> {
    let mut disks = Vec::new();
    for disk in &machine.disks {
        if is_taken(machine, disk, taken) {
            left_out.push(format!("{} is protected already", disk.name));
        } else if disk.selected {
            disks.push(disk);
        } else {
            left_out.push(format!("{} is excluded at the agent", disk.name));
        }
    }
    disks
}

fn is_taken(machine: &Machine, disk: &SourceDisk, taken: &[ProtectedDisk]) -> bool {
    taken.iter().any(|known| known.agent == machine.agent && known.source == disk.source)
}

fn plan_new(
    machine: &Machine,
    dir: &Path,
    kind: Option<&str>,
    taken: &[ProtectedDisk],
    left_out: &mut Vec<String>,
) -> anyhow::Result<Planned> {
    let kind = kind.unwrap_or("monolithicFlat");
    if crate::catalogue::kind_from_text(kind).and_then(TargetKind::vmdk).is_none() {
        bail!("{kind} is no kind of VMDK that can be created");
    }
    let disks = selected(machine, taken, left_out);
    let name = |disk: &SourceDisk| {
        let short = disk.name.rsplit('/').next().unwrap_or(&disk.name);
        dir.join(format!("{}-{}.vmdk", file_name(&machine.host_name), file_name(short)))
    };
    Ok(disks
        .into_iter()
        .map(|disk| {
            let planned = PlannedDisk {
                source: disk.name.clone(),
                size_bytes: disk.size_bytes,
                path: name(disk),
                kind: kind.to_owned(),
                existing: false,
                score: 0,
                disk: None,
            };
            (disk.clone(), planned)
        })
        .collect())
}

/// What is safe in a file name on every datastore.
fn file_name(text: &str) -> String {
    let clean: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .collect();
    let trimmed = clean.trim_matches(['.', '-']);
    if trimmed.is_empty() { "disk".to_owned() } else { trimmed.to_owned() }
}

fn plan_named(
    registry: &Registry,
    machine: &Machine,
    pairs: &[(String, PathBuf)],
    taken: &[ProtectedDisk],
) -> anyhow::Result<Planned> {
    let mut plan = Planned::new();
    for (wanted, path) in pairs {
        let short = |disk: &SourceDisk| disk.name.rsplit('/').next() == Some(wanted.as_str());
        let disk = machine
            .disks
            .iter()
            .find(|disk| disk.name == *wanted || disk.source == *wanted || short(disk))
            .with_context(|| {
                let names: Vec<&str> = machine.disks.iter().map(|disk| disk.name.as_str()).collect();
                format!("{} has no disk {wanted}; it has {}", machine.host_name, names.join(", "))
            })?;
        if is_taken(machine, disk, taken) {
            bail!("{} of {} is protected already; `status` shows it", disk.name, machine.host_name);
        }
        let (spec, identity) = examine(registry, path)?;
        plan.push((disk.clone(), planned_existing(disk, &spec, &identity)));
    }
    for (index, (_, one)) in plan.iter().enumerate() {
        if let Some((other, _)) = plan.iter().skip(index + 1).find(|(_, other)| other.path == one.path) {
            bail!(
                "{} is named for {} and for {}; each disk needs its own",
                one.path.display(),
                one.source,
                other.name
            );
        }
    }
    Ok(plan)
}

fn planned_existing(disk: &SourceDisk, spec: &TargetSpec, identity: &DiskIdentity) -> PlannedDisk {
    PlannedDisk {
        source: disk.name.clone(),
        size_bytes: disk.size_bytes,
        path: spec.path.clone(),
        kind: spec.kind.to_string(),
        existing: true,
        score: match_score(&disk.fingerprint().identity(disk.size_bytes), identity),
        disk: None,
    }
}

/// What stands at a path, read without changing anything.
fn examine(registry: &Registry, path: &Path) -> anyhow::Result<(TargetSpec, DiskIdentity)> {
    let spec = detect_target(registry.opener(), path)?;
    let mut target = open_target(registry.opener(), &spec, &Expectation::default())?;
    let identity = DiskIdentity::probe(&mut target)?;
    let size = identity.size_bytes;
    Ok((spec, Fingerprint::of(&identity).identity(size)))
}

fn plan_from(
    registry: &Registry,
    machine: &Machine,
    dir: &Path,
    taken: &[ProtectedDisk],
    left_out: &mut Vec<String>,
) -> anyhow::Result<Planned> {
    let mut targets = Vec::new();
    let mut specs = Vec::new();
    let list = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = list.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    for path in
        paths.into_iter().filter(|path| path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("vmdk")))
    {
        if taken.iter().any(|known| known.path == path) {
            continue;
        }
        match examine(registry, &path) {
            Ok((spec, identity)) => {
                targets.push((path.display().to_string(), identity));
                specs.push(spec);
            }
            Err(error) => left_out.push(format!("{}: {error:#}", path.display())),
        }
    }
    let disks = selected(machine, taken, left_out);
    let sources: Vec<(String, DiskIdentity)> =
        disks.iter().map(|disk| (disk.name.clone(), disk.fingerprint().identity(disk.size_bytes))).collect();
    let pairs = propose_pairs(&sources, &targets)?;
    for (index, disk) in disks.iter().enumerate() {
        if !pairs.iter().any(|pair| pair.source == index) {
            left_out.push(format!("no VMDK in {} matches {}", dir.display(), disk.name));
        }
    }
    Ok(pairs
        .iter()
        .map(|pair| {
            (
                (*disks[pair.source]).clone(),
                planned_existing(disks[pair.source], &specs[pair.target], &targets[pair.target].1),
            )
        })
        .collect())
}

fn carry_out(
    registry: &Registry,
    machine: &Machine,
    source: &SourceDisk,
    planned: &PlannedDisk,
) -> anyhow::Result<DiskId> {
    let agent = peer(&machine.agent).with_context(|| format!("{} is no UUID", machine.agent))?;
    let source_id =
        unhex(&source.source).with_context(|| format!("{} is no source identity", source.source))?;
    let kind = crate::catalogue::kind_from_text(&planned.kind)
        .with_context(|| format!("unknown target kind {}", planned.kind))?;
    let spec = TargetSpec { path: planned.path.clone(), kind };
    let target = if planned.existing {
        open_checked(registry, &spec, source)?
    } else {
        create(registry, &spec, source)?
    };
    let disk = DiskId::random().map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let lineage = LineageId::random().map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let mode = if planned.existing { PassMode::Compare } else { PassMode::Copy };
    let state =
        TargetDisk::new_state(disk, agent, source_id, source.size_bytes / SECTOR_BYTES, lineage, mode);
    let record = ProtectedDisk {
        disk: disk.to_string(),
        agent: machine.agent.clone(),
        source: source.source.clone(),
        source_name: source.name.clone(),
        path: planned.path.clone(),
        kind: planned.kind.clone(),
        size_bytes: source.size_bytes,
        existing: planned.existing,
    };
    registry.add_disk(record, target, state)?;
    tracing::info!(%disk, machine = machine.host_name, source = source.name, path = %planned.path.display(), "protected");
    Ok(disk)
}

fn open_checked(registry: &Registry, spec: &TargetSpec, source: &SourceDisk) -> anyhow::Result<Target> {
    let expect = Expectation {
        size_bytes: Some(source.size_bytes),
        known_uuids: registry.known_uuids(),
        writable: true,
    };
    Ok(open_target(registry.opener(), spec, &expect)?)
}

fn create(registry: &Registry, spec: &TargetSpec, source: &SourceDisk) -> anyhow::Result<Target> {
    if let Some(dir) = spec.path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let options =
        CreateOptions { reserved_bytes: reserved_bytes(registry, &spec.path), ..CreateOptions::default() };
    Ok(create_target(registry.opener(), spec, source.size_bytes, &registry.known_uuids(), &options)?)
}

/// Bytes of the same file system that other targets may still fill.
fn reserved_bytes(registry: &Registry, path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let device =
        |path: &Path| path.parent().and_then(|dir| std::fs::metadata(dir).ok()).map(|meta| meta.dev());
    let own = device(path);
    registry
        .disks()
        .iter()
        .filter(|view| own.is_some() && device(&view.record.path) == own)
        .map(|view| {
            let written = view.status.as_ref().map_or(0, |status| {
                let snapshot = status.snapshot();
                crate::disk_status::sector_bytes(snapshot.settled_sectors)
            });
            if view.record.existing { 0 } else { view.record.size_bytes.saturating_sub(written) }
        })
        .sum()
}
