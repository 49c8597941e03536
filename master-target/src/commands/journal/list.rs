//! `journal list`: the disks and points of a retention folder.
//!
//! Invariant: a point that cannot be had is listed with the reason. Called by `commands::journal`.

use std::time::{Duration, UNIX_EPOCH};

use reprotect_engine::host::output::{Align, Output, Table, bytes, printable};
use reprotect_engine::store::journal::offline::{Listed, Offline};
use reprotect_engine::store::journal::view::At;
use reprotect_engine::units::{DiskId, PeerId, SECTOR_BYTES};
use serde::Serialize;

use super::{class_name, open};
use crate::catalogue::hex;
use crate::cli::copies::JournalListArgs;

#[derive(Debug, Serialize)]
struct Listing {
    folder: String,
    journal: String,
    /// Closed in order.
    clean: bool,
    /// What is wrong with the log; `journal verify` looks for all of it.
    damage: Vec<String>,
    disks: Vec<DiskLine>,
}

#[derive(Debug, Serialize)]
struct DiskLine {
    disk: String,
    /// The agent of its machine.
    machine: String,
    size_bytes: u64,
    /// Number of the newest entry, and of the newest on the target.
    newest: u64,
    applied: u64,
    /// The state the target is in, as a point to extract; none while no undo epoch has begun.
    target_at: Option<String>,
    undo_runs: usize,
    undo_bytes: u64,
    points: Vec<PointLine>,
}

#[derive(Debug, Serialize)]
struct PointLine {
    point: String,
    name: String,
    class: &'static str,
    source_time_ms: u64,
    pinned: bool,
    degraded: bool,
    /// What cannot be read of it, as far as the master target knows.
    damaged: Option<String>,
    /// Why it cannot be had; none where it can.
    refused: Option<String>,
}

pub(super) fn list(args: &JournalListArgs, output: Output) -> anyhow::Result<()> {
    let mut offline = open(&args.folder, args.beside)?;
    let disks: Vec<DiskId> = offline.shape().disks.keys().copied().collect();
    let mut listing = Listing {
        folder: args.folder.display().to_string(),
        journal: hex(&offline.superblock().journal),
        clean: offline.found().clean,
        damage: offline
            .damage()
            .iter()
            .map(|found| format!("{} at byte {}: {}", found.path.display(), found.offset, found.reason))
            .collect(),
        disks: Vec::new(),
    };
    for disk in disks {
        listing.disks.push(disk_line(&mut offline, disk)?);
    }
    output.result(&listing, || render(&listing))?;
    Ok(())
}

fn disk_line(offline: &mut Offline, disk: DiskId) -> anyhow::Result<DiskLine> {
    let points = offline.points(disk)?.iter().rev().map(point_line).collect();
    let (newest, applied) = offline.numbers(disk);
    let shape = offline.shape().disks.get(&disk);
    let epoch = shape.and_then(|shape| shape.epoch_of(applied));
    let target_at = epoch.map(|epoch| At::entry(epoch.opened.epoch, applied).to_string());
    let (machine, size_sectors, runs) = match shape {
        Some(shape) => (shape.added.machine, shape.size_sectors(), shape.runs.as_slice()),
        None => ([0; 16], 0, &[][..]),
    };
    Ok(DiskLine {
        disk: disk.to_string(),
        machine: PeerId(machine).to_string(),
        size_bytes: size_sectors * SECTOR_BYTES,
        newest,
        applied,
        target_at,
        undo_runs: runs.len(),
        undo_bytes: runs.iter().map(|run| run.bytes).sum(),
        points,
    })
}

fn point_line(listed: &Listed) -> PointLine {
    let point = &listed.point;
    PointLine {
        point: point.at.to_string(),
        name: point.name.as_str().to_owned(),
        class: class_name(point.class),
        source_time_ms: point.source_time.0 / 1_000_000,
        pinned: point.pinned,
        degraded: point.degraded,
        damaged: point.damaged.map(|rot| rot.to_string()),
        refused: listed.refused.clone(),
    }
}

fn render(listing: &Listing) -> String {
    let state = if listing.clean { "closed in order" } else { "not closed in order" };
    let mut text = format!("journal {} in {}, {state}\n", listing.journal, listing.folder);
    for damage in &listing.damage {
        text.push_str(&format!("damaged: {}\n", printable(damage)));
    }
    for disk in &listing.disks {
        let waiting = disk.newest.saturating_sub(disk.applied);
        text.push_str(&format!(
            "\ndisk {} of machine {}: {}, {} entries not on the target, {} undo runs of {}\n",
            disk.disk,
            disk.machine,
            bytes(disk.size_bytes),
            waiting,
            disk.undo_runs,
            bytes(disk.undo_bytes)
        ));
        let mut table = Table::new(&[
            ("POINT", Align::Left),
            ("TIME", Align::Left),
            ("CLASS", Align::Left),
            ("NAME", Align::Left),
            ("", Align::Left),
        ]);
        for point in &disk.points {
            let at = UNIX_EPOCH + Duration::from_millis(point.source_time_ms);
            let mut marks: Vec<&str> = Vec::new();
            marks.extend(point.pinned.then_some("pinned"));
            marks.extend(point.degraded.then_some("degraded"));
            marks.extend(point.damaged.is_some().then_some("damaged"));
            marks.extend(point.refused.is_some().then_some("cannot be had"));
            table.row([
                point.point.clone(),
                humantime::format_rfc3339_seconds(at).to_string(),
                point.class.to_owned(),
                printable(&point.name),
                marks.join(", "),
            ]);
        }
        text.push_str(&if table.is_empty() { "no point yet\n".to_owned() } else { table.render() });
    }
    text.trim_end().to_owned()
}
