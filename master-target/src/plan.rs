//! The plan of `protect`: which source disk would go to which target, found without changing anything.
//!
//! Invariants: nothing is created or opened for writing here; ambiguity is refused with all candidates named; a disk or
//! a target that is protected already is never planned again; a plan for new disks fits the medium as a whole.
//! Units: bytes. Called by `protect`.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use reprotect_engine::host::output::bytes;
use reprotect_engine::store::fingerprint::Fingerprint;
use reprotect_engine::store::identity::{DiskIdentity, match_score, propose_pairs};
use reprotect_engine::store::target::{
    Expectation, TargetError, TargetKind, TargetSpec, detect_target, open_target,
};

use crate::catalogue::{Machine, ProtectedDisk, SourceDisk};
use crate::explain::explain;
use crate::guard::target_files;
use crate::protect::{PlannedDisk, ProtectRequest};
use crate::registry::{Registry, short_name};

/// Source disks with their targets.
pub(crate) type Planned = Vec<(SourceDisk, PlannedDisk)>;

/// Plans; what is left out, and why, goes to `left_out`.
///
/// # Errors
/// With what is wrong and what to do.
pub(crate) fn plan(
    registry: &Registry,
    datastores: &[PathBuf],
    machine: &Machine,
    request: &ProtectRequest,
    left_out: &mut Vec<String>,
) -> anyhow::Result<Planned> {
    let taken: Vec<ProtectedDisk> = registry.disks().into_iter().map(|view| view.record).collect();
    if let Some(dir) = &request.datastore {
        check_datastore(dir, datastores)?;
        let plan = plan_new(machine, dir, request.kind.as_deref(), &taken, left_out)?;
        check_new(registry, dir, &plan)?;
        Ok(plan)
    } else if let Some(dir) = &request.original_from {
        plan_from(registry, machine, dir, &taken, left_out)
    } else {
        plan_named(registry, machine, &request.original, &taken)
    }
}

fn check_datastore(dir: &Path, allowed: &[PathBuf]) -> anyhow::Result<()> {
    if !dir.is_absolute() {
        bail!("{} is a relative path; name the datastore's directory from the root", dir.display());
    }
    if dir.components().any(|part| part == Component::ParentDir) {
        bail!("{} contains `..`; name the datastore's directory without it", dir.display());
    }
    // Where it really leads, so that a link does not lead out of the datastores.
    let real = |path: &Path| path.canonicalize().ok();
    let existing = dir.ancestors().find_map(real).unwrap_or_default();
    let inside =
        |root: &PathBuf| dir.starts_with(root) && real(root).is_some_and(|root| existing.starts_with(&root));
    if !allowed.is_empty() && !allowed.iter().any(inside) {
        bail!(
            "{} is not below any directory of `datastores` in the configuration; add it there",
            dir.display()
        );
    }
    Ok(())
}

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
    let mut names = BTreeSet::new();
    let mut name = |disk: &SourceDisk| {
        let plain = format!("{}-{}", file_name(&machine.host_name), file_name(short_name(&disk.name)));
        // Two names may differ only in what no file name may hold.
        let fresh = if names.insert(plain.clone()) { plain } else { format!("{plain}-{}", disk.source) };
        dir.join(format!("{fresh}.vmdk"))
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
        let short = |disk: &SourceDisk| short_name(&disk.name) == wanted;
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
        if let Some(known) = taken.iter().find(|known| same_place(&known.path, path)) {
            bail!("{} is the target of {} already; `status` shows it", path.display(), known.source_name);
        }
        let (spec, identity) = examine(registry, path)?;
        if identity.size_bytes != disk.size_bytes {
            let (got, expected) = (identity.size_bytes, disk.size_bytes);
            return Err(TargetError::SizeDiffers { path: path.clone(), got, expected }.into());
        }
        plan.push((disk.clone(), planned_existing(disk, &spec, &identity)));
    }
    for (index, (_, one)) in plan.iter().enumerate() {
        if let Some((other, _)) =
            plan.iter().skip(index + 1).find(|(_, other)| same_place(&other.path, &one.path))
        {
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

/// Whether two paths lead to one file.
fn same_place(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    one == other || place(one).is_some_and(|one| place(other) == Some(one))
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
        if taken.iter().any(|known| same_place(&known.path, &path)) {
            continue;
        }
        match examine(registry, &path) {
            Ok((spec, identity)) => {
                targets.push((path.display().to_string(), identity));
                specs.push(spec);
            }
            Err(error) => left_out.push(format!("{}: {}", path.display(), explain(&error))),
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

/// Bytes of the same file system that other targets may still fill: what their files could hold and do not yet.
pub(crate) fn reserved_bytes(registry: &Registry, path: &Path) -> u64 {
    let Some(own) = file_system(path) else { return 0 };
    registry
        .disks()
        .iter()
        .filter(|view| view.record.kind != TargetKind::Device.to_string())
        .filter(|view| file_system(&view.record.path) == Some(own))
        .map(|view| {
            let files = target_files(&**registry.opener(), &view.record.path);
            let held: u64 = files
                .iter()
                .filter_map(|file| std::fs::metadata(file).ok())
                .map(|meta| meta.blocks() * 512)
                .sum();
            view.record.size_bytes.saturating_sub(held)
        })
        .sum()
}

/// The file system of the nearest directory above `path` that exists.
fn file_system(path: &Path) -> Option<u64> {
    path.ancestors().skip(1).find_map(|dir| std::fs::metadata(dir).ok()).map(|meta| meta.dev())
}

/// Before anything is created: no file is in the way, and all new disks together fit.
fn check_new(registry: &Registry, dir: &Path, plan: &Planned) -> anyhow::Result<()> {
    for (_, planned) in plan {
        if planned.path.symlink_metadata().is_ok() {
            bail!(
                "{} exists already; name another directory, or use it with --original {}={}",
                planned.path.display(),
                short_name(&planned.source),
                planned.path.display()
            );
        }
    }
    let Some(at) = dir.ancestors().find(|dir| dir.is_dir()) else { return Ok(()) };
    let facts = rustix::fs::statvfs(at).with_context(|| format!("cannot measure {}", at.display()))?;
    let free = facts.f_bavail.saturating_mul(facts.f_frsize);
    let reserved = reserved_bytes(registry, &dir.join("new"));
    let needed: u64 = plan.iter().map(|(source, _)| source.size_bytes).sum();
    if needed.saturating_add(reserved) > free {
        bail!(
            "{} has {} free, of which other targets may still need {}, and the new disks need {}; free some space or choose another datastore",
            at.display(),
            bytes(free),
            bytes(reserved),
            bytes(needed)
        );
    }
    Ok(())
}
