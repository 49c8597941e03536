//! The steps of a failback after its decision: fence, drain, verify, release.
//!
//! Invariants: each takes only the disks that have not done it, and records each disk when it is done; what was done
//! before an interruption may be done again. Units: bytes. Called by `failback`.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::io::ByteRange;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{BLOCK_BYTES, DiskId, PeerId};

use super::{FailbackInfo, FailbackRequest, VerifyPolicy};
use crate::catalogue::{Failback, FailbackDisk, FailbackStep, Machine};
use crate::points::{NO_JOURNAL, on_disk};
use crate::registry::Registry;
use crate::registry::failing_back::Letting;

/// Read in one go, on the disk's own thread.
const PIECE_BYTES: u64 = 1 << 20;
/// One in so many pieces is read by `sample` …
const SAMPLE_SHARE: u64 = 64;
/// … and this many bytes at least.
const SAMPLE_BYTES_MIN: u64 = 64 << 20;
/// Bytes of a piece that is drawn by `sample`.
const SAMPLE_PIECE_BYTES: u64 = 64 << 10;
/// Differing ranges that are named per disk.
const DIFFERENT_MAX: usize = 20;

/// Has every disk that has not done `step` do it, and records it disk by disk.
fn each(
    registry: &Registry,
    agent: PeerId,
    failback: &mut Failback,
    step: FailbackStep,
    mut work: impl FnMut(DiskId, &mut FailbackDisk) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let names: Vec<String> = failback.disks.keys().cloned().collect();
    for name in names {
        let Some(of) = failback.disks.get_mut(&name).filter(|of| of.step < step) else { continue };
        let disk = DiskId::parse(&name)?;
        work(disk, of).with_context(|| {
            format!("the failback stopped at disk {name}, which is not {step:?}").to_lowercase()
        })?;
        of.step = step;
        registry.record_failback(agent, failback)?;
    }
    Ok(())
}

/// Nobody may write any more (I9): to none of the disks, also where one of them cannot be fenced.
pub(super) fn fence(registry: &Registry, agent: PeerId, failback: &mut Failback) -> anyhow::Result<()> {
    let unfenced = failback.disks.iter().filter(|(_, of)| of.step < FailbackStep::Fenced);
    let disks: Vec<DiskId> = unfenced.map(|(name, _)| DiskId::parse(name)).collect::<Result<_, _>>()?;
    let mut fenced: BTreeMap<DiskId, _> =
        disks.into_iter().map(|disk| (disk, registry.fence(disk))).collect();
    each(registry, agent, failback, FailbackStep::Fenced, |disk, of| {
        of.generation = fenced.remove(&disk).context("it came meanwhile; repeat the command")??.0;
        tracing::info!(%disk, generation = of.generation, "fenced for a failback");
        Ok(())
    })
}

/// Refuses to go on with disks that lost something since the failback was decided: they are not at the point, whatever
/// their files look like, and verifying does not see it. Where the operator insists, answers what was overridden.
pub(super) fn still_whole(
    registry: &Registry,
    failback: &Failback,
    request: &FailbackRequest,
) -> anyhow::Result<Option<String>> {
    let retention = registry.retention().context(NO_JOURNAL)?;
    let (shape, views) = (retention.shape(), registry.disks());
    let mut overridden = Vec::new();
    for (name, of) in failback.disks.iter().filter(|(_, of)| of.step < FailbackStep::Released) {
        let (disk, at) = (DiskId::parse(name)?, place(of)?);
        let view = views.iter().find(|view| view.record.disk == *name);
        let view = view.with_context(|| format!("disk {name} is not protected any more; see `status`"))?;
        let Some(status) = &view.status else {
            // Closed, and that could not be recorded.
            if of.step == FailbackStep::Verified && view.problem.is_none() {
                continue;
            }
            bail!(
                "disk {name} could not be opened; see `status`, restart the master target, then repeat the command"
            );
        };
        let is_lost = shape.disks.get(&disk).is_some_and(|known| known.is_doubtful(at.number));
        if !(is_lost && !failback.accept_damage && !request.accept_damage)
            && status.snapshot().mode == PassMode::Done
        {
            continue;
        }
        let what = format!(
            "disk {name} lost changes since the failback was decided, or parts of its target, and may not be the disk at {at}"
        );
        if !request.insist {
            bail!(
                "{what}: take it back with `failback --undo`, so that its agent compares it; where the source is gone, release it all the same with --yes"
            );
        }
        overridden.push(what);
    }
    if overridden.is_empty() {
        return Ok(None);
    }
    let text = overridden.join("; ");
    tracing::error!("{text}; the operator insists");
    Ok(Some(text))
}

fn place(of: &FailbackDisk) -> anyhow::Result<At> {
    of.at.parse().map_err(|_| anyhow::anyhow!("{} is no point; see the daemon's log", of.at))
}

/// Everything is on the target; where the point is not the newest state, the target goes back to it.
pub(super) fn drain(registry: &Registry, agent: PeerId, failback: &mut Failback) -> anyhow::Result<()> {
    // The registry holds their runs only; from here on their part of the log stays, too.
    let retention = registry.retention().context(NO_JOURNAL)?;
    let known = |(name, of): (&String, &FailbackDisk)| Some((DiskId::parse(name).ok()?, place(of).ok()?));
    let going = failback.disks.iter().filter(|(_, of)| of.step < FailbackStep::Drained).filter_map(known);
    let _holds: Vec<_> = going.map(|(disk, at)| retention.hold_to_go_back(disk, at)).collect();
    each(registry, agent, failback, FailbackStep::Drained, |disk, of| {
        let at = place(of)?;
        let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        on_disk(&inputs, |store| store.drain())?;
        if !on_disk(&inputs, move |store| store.stands_at(at))? {
            let done = on_disk(&inputs, move |store| store.rollback(at))?;
            of.written_bytes = done.written_bytes;
            tracing::warn!(%disk, %at, written = done.written_bytes, "taken back for a failback");
        }
        Ok(())
    })
}

/// Reads the target again, as much as the operator wants.
pub(super) fn verify(
    registry: &Registry,
    agent: PeerId,
    failback: &mut Failback,
    request: &FailbackRequest,
) -> anyhow::Result<()> {
    each(registry, agent, failback, FailbackStep::Verified, |disk, of| {
        (of.read_bytes, of.compared_bytes) = (0, 0);
        of.different.clear();
        let (inputs, sectors) =
            registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
        let size_bytes = sectors * reprotect_engine::units::SECTOR_BYTES;
        let mut differing = 0;
        for range in pieces(request.verify, size_bytes, random()?) {
            if registry.is_stopping() {
                bail!("the master target stops; repeat the command when it runs again");
            }
            let looked = on_disk(&inputs, move |store| store.look_at(range))?;
            of.read_bytes += range.len();
            let differ: u64 = looked.different.iter().map(|blocks| blocks.len()).sum();
            of.compared_bytes += (looked.same + differ) * BLOCK_BYTES;
            for blocks in &looked.different {
                differing += 1;
                if of.different.len() < DIFFERENT_MAX {
                    of.different.push(format!(
                        "{}-{}",
                        blocks.start * BLOCK_BYTES,
                        blocks.end * BLOCK_BYTES - 1
                    ));
                }
            }
        }
        tracing::info!(%disk, read = of.read_bytes, compared = of.compared_bytes, differing, "the target was read again");
        if differing > 0 {
            let named = of.different.join(", ");
            tracing::error!(%disk, named, "the target is not as it was written");
            if !request.insist {
                bail!(
                    "{differing} parts of the target are not as they were written (bytes {named}): somebody else wrote there, or the medium is failing; compare with `failback --undo`, or release it all the same with --yes"
                );
            }
        }
        Ok(())
    })
}

/// What is read, ascending; blocks are whole but for the last one of the disk.
fn pieces(policy: VerifyPolicy, size_bytes: u64, seed: u64) -> Vec<ByteRange> {
    let cut = |start: u64, bytes: u64| ByteRange { start, end: (start + bytes).min(size_bytes) };
    match policy {
        VerifyPolicy::None => Vec::new(),
        VerifyPolicy::Whole => {
            (0..size_bytes.div_ceil(PIECE_BYTES)).map(|piece| cut(piece * PIECE_BYTES, PIECE_BYTES)).collect()
        }
        VerifyPolicy::Sample => {
            let wanted = (size_bytes / SAMPLE_SHARE).max(SAMPLE_BYTES_MIN);
            let all = size_bytes.div_ceil(SAMPLE_PIECE_BYTES);
            let count = wanted.div_ceil(SAMPLE_PIECE_BYTES);
            if count >= all {
                return pieces(VerifyPolicy::Whole, size_bytes, seed);
            }
            // One piece of each of `count` equal parts, at a place that nobody knows before.
            let mut state = seed;
            let mut draw = |from: u64, to: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                from + (state >> 33) % (to - from)
            };
            let part = |number: u64| {
                (u128::from(number) * u128::from(all) / u128::from(count)) as u64 // below `all`
            };
            (0..count)
                .map(|number| {
                    cut(draw(part(number), part(number + 1)) * SAMPLE_PIECE_BYTES, SAMPLE_PIECE_BYTES)
                })
                .collect()
        }
    }
}

fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).context("the system has no randomness; try again")?;
    Ok(u64::from_le_bytes(bytes))
}

/// The targets are closed, their locks given up.
pub(super) fn release(
    registry: &Registry,
    agent: PeerId,
    failback: &mut Failback,
    how: Letting,
) -> anyhow::Result<()> {
    each(registry, agent, failback, FailbackStep::Released, |disk, of| {
        of.stamp = registry.release(disk, how)?;
        tracing::warn!(%disk, "released: its virtual machine may use the target now");
        Ok(())
    })?;
    registry.hold_for_failbacks();
    Ok(())
}

/// What the operator does now, ready to be pasted where that can be.
pub(super) fn next_steps(machine: &Machine, disks: &[FailbackInfo]) -> Vec<String> {
    let name = quoted(&machine.host_name);
    let mut steps = vec![format!(
        "make sure that the source of {} is and stays off; its agent is refused",
        machine.host_name
    )];
    steps.push(
        "the virtual machine's .vmx: LSI Logic controller, disk.EnableUUID = \"TRUE\", no other machine with these disks"
            .to_owned(),
    );
    for disk in disks {
        steps.push(match (disk.kind.as_str(), disk.path.strip_prefix("/vmfs/volumes/")) {
            ("device", _) => {
                format!("detach {} from this appliance, attach the disk behind it to {name}", disk.path)
            }
            (_, Some(path)) => {
                let (datastore, path) = path.split_once('/').unwrap_or((path, ""));
                format!(
                    "govc vm.disk.attach -vm {name} -ds {} -disk {} -link=false",
                    quoted(datastore),
                    quoted(path)
                )
            }
            (_, None) => format!(
                "govc vm.disk.attach -vm {name} -disk {} -link=false    # as a path of its datastore",
                quoted(&disk.path)
            ),
        });
    }
    steps.push(format!("govc vm.power -on {name}"));
    steps.push(format!(
        "if that was wrong: power it off, detach the disks, then `reprotect-master-target failback --undo {name}`"
    ));
    steps
}

/// For a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_one_in_64_spread_over_the_disk_and_small_disks_are_read_whole() {
        for (size, expected) in [
            (0, 0),
            (512, 512),
            ((64 << 20) + 512, (64 << 20) + 512 - (64 << 10)),
            (1 << 30, 64 << 20),
            (1 << 40, 1 << 34),
        ] {
            for seed in 0..20 {
                let drawn = pieces(VerifyPolicy::Sample, size, seed);
                assert!(drawn.iter().all(|range| range.start < range.end && range.end <= size));
                assert!(drawn.windows(2).all(|pair| pair[0].end <= pair[1].start), "ascending, none twice");
                assert!(drawn.iter().map(|piece| piece.len()).sum::<u64>() >= expected, "{size}");
            }
        }
        let drawn = pieces(VerifyPolicy::Sample, 1 << 40, 7);
        let half = drawn.iter().filter(|range| range.start < 1 << 39).count();
        assert!(half.abs_diff(drawn.len() / 2) <= 1, "spread evenly");
        assert_ne!(drawn, pieces(VerifyPolicy::Sample, 1 << 40, 8), "at places that nobody knows before");
        assert!(pieces(VerifyPolicy::None, 1 << 40, 7).is_empty());
        let whole: u64 =
            pieces(VerifyPolicy::Whole, (5 << 20) + 512, 7).iter().map(|piece| piece.len()).sum();
        assert_eq!(whole, (5 << 20) + 512);
    }

    #[test]
    fn next_steps_can_be_pasted_whatever_machine_and_datastore_are_called() {
        let machine = Machine { agent: String::new(), host_name: "web 1's".into(), disks: Vec::new() };
        let disk = |path: &str, kind: &str| FailbackInfo {
            disk: String::new(),
            source: "sda".into(),
            path: path.into(),
            kind: kind.into(),
            size_bytes: 0,
            point: String::new(),
            generation: 0,
            written_bytes: 0,
            read_bytes: 0,
            compared_bytes: 0,
            different: Vec::new(),
        };
        let disks = [disk("/vmfs/volumes/ds 1/web/web.vmdk", "vmfs"), disk("/dev/sdb", "device")];
        let steps = next_steps(&machine, &disks);
        let attach = r"govc vm.disk.attach -vm 'web 1'\''s' -ds 'ds 1' -disk web/web.vmdk -link=false";
        assert!(steps.iter().any(|step| step == attach), "{steps:?}");
        assert!(steps.iter().any(|step| step.contains("detach /dev/sdb")), "{steps:?}");
        assert!(steps.iter().any(|step| step == r"govc vm.power -on 'web 1'\''s'"), "{steps:?}");
    }
}
