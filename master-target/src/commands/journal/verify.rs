//! `journal verify`: is everything in a retention folder as it was written, and if not, what does that cost?
//!
//! Invariant: the exit status says it, too: 0 sound, 1 damaged. Called by `commands::journal`.

use std::time::Instant;

use reprotect_engine::host::output::{Output, bytes, printable};
use reprotect_engine::io::{BlockFile, ByteRange, ReadAt};
use reprotect_engine::store::journal::offline::{Offline, Which};
use reprotect_engine::store::journal::verify::Finding;
use serde::Serialize;

use super::{find_disk, open, open_target_to_read};
use crate::cli::DiskPath;
use crate::cli::copies::JournalVerifyArgs;

/// Bytes of a target that are read in one go.
const PIECE_BYTES: u64 = 1 << 20;

#[derive(Debug, Serialize)]
struct Report {
    sound: bool,
    findings: Vec<FindingLine>,
    notes: Vec<String>,
    edits: u64,
    groups: u64,
    entries: u64,
    segment_indexes: u64,
    undo_runs: u64,
    bytes: u64,
    /// Disks whose newest state was read with its target.
    targets: Vec<TargetLine>,
}

#[derive(Debug, Serialize)]
struct FindingLine {
    path: String,
    offset: u64,
    what: String,
    disk: Option<String>,
    /// Byte ranges of the disk that cannot be had, from and to.
    lost: Vec<(u64, u64)>,
    /// Points that lack them.
    points: Vec<String>,
    newest_suffers: bool,
    remedy: String,
}

#[derive(Debug, Serialize)]
struct TargetLine {
    disk: String,
    target: String,
    read_bytes: u64,
    /// Why its newest state cannot be read.
    problem: Option<String>,
}

pub(super) fn verify(args: &JournalVerifyArgs, output: Output) -> anyhow::Result<bool> {
    let mut offline = open(&args.folder, false)?;
    let verdict = offline.verify()?;
    let mut targets = Vec::new();
    for target in &args.target {
        targets.push(read_target(&mut offline, target, output)?);
    }
    let sound = verdict.findings.is_empty() && targets.iter().all(|target| target.problem.is_none());
    let report = Report {
        sound,
        findings: verdict.findings.iter().map(line).collect(),
        notes: verdict.notes,
        edits: verdict.edits,
        groups: verdict.groups,
        entries: verdict.entries,
        segment_indexes: verdict.indexes,
        undo_runs: verdict.runs,
        bytes: verdict.bytes,
        targets,
    };
    output.result(&report, || render(&report))?;
    Ok(sound)
}

fn line(finding: &Finding) -> FindingLine {
    const BLOCK: u64 = reprotect_engine::units::BLOCK_BYTES;
    FindingLine {
        path: finding.path.display().to_string(),
        offset: finding.offset,
        what: finding.what.clone(),
        disk: finding.disk.map(|disk| disk.to_string()),
        lost: finding.lost.iter().map(|blocks| (blocks.start * BLOCK, blocks.end * BLOCK)).collect(),
        points: finding.points.iter().map(|at| at.to_string()).collect(),
        newest_suffers: finding.newest,
        remedy: finding.remedy.to_owned(),
    }
}

/// Reads the newest state of a disk with its target.
fn read_target(offline: &mut Offline, target: &DiskPath, output: Output) -> anyhow::Result<TargetLine> {
    let disk = find_disk(offline, &target.disk)?;
    let mut line = TargetLine {
        disk: disk.to_string(),
        target: target.path.display().to_string(),
        read_bytes: 0,
        problem: None,
    };
    let opened = offline.watched(disk, open_target_to_read(&target.path)?, false)?;
    let mut opened = offline.disk(disk, opened)?;
    let (got, expected) = (opened.target_bytes(), opened.size_bytes());
    anyhow::ensure!(
        got == expected,
        "{} has {got} bytes, the disk {expected}; name the target of this disk",
        line.target
    );
    let read = opened.into_file(Which::Newest).map_err(anyhow::Error::from);
    if let Err(error) = read.and_then(|mut file| read_all(&mut file, &mut line.read_bytes, output)) {
        line.problem = Some(error.to_string());
    }
    Ok(line)
}

fn read_all(file: &mut dyn BlockFile, done: &mut u64, output: Output) -> anyhow::Result<()> {
    let size = file.size_bytes();
    let mut progress = output.progress("read", size);
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let mut start = 0;
    while start < size {
        let window = ByteRange { start, end: size.min(start + 1024 * PIECE_BYTES) };
        for part in file.allocated(window)? {
            let mut at = part.start;
            while at < part.end {
                let len = (part.end - at).min(PIECE_BYTES);
                let data = buffer.get_mut(..len as usize).unwrap_or_default();
                file.read(&mut [ReadAt { offset: at, data }])?;
                at += len;
                *done += len;
                progress.update(at, size, Instant::now());
            }
        }
        start = window.end;
    }
    progress.finish("read");
    Ok(())
}

fn render(report: &Report) -> String {
    let mut text = String::new();
    for found in &report.findings {
        text.push_str(&format!(
            "DAMAGED {} at byte {}: {}\n",
            found.path,
            found.offset,
            printable(&found.what)
        ));
        if let Some(disk) = &found.disk {
            let lost: u64 = found.lost.iter().map(|(from, to)| to - from).sum();
            text.push_str(&format!("  disk {disk}: {} cannot be had", bytes(lost)));
            for (from, to) in found.lost.iter().take(8) {
                text.push_str(&format!(", bytes {from} to {to}"));
            }
            text.push('\n');
        }
        if !found.points.is_empty() {
            text.push_str(&format!("  points that suffer: {}\n", found.points.join(", ")));
        }
        if found.newest_suffers {
            text.push_str("  the newest state suffers\n");
        }
        text.push_str(&format!("  {}\n", found.remedy));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {}\n", printable(note)));
    }
    for target in &report.targets {
        let problem = target.problem.as_deref().map_or("OK".to_owned(), printable);
        text.push_str(&format!(
            "newest state of {} ({} read): {problem}\n",
            target.disk,
            bytes(target.read_bytes)
        ));
    }
    let verdict = if report.sound { "OK" } else { "DAMAGED" };
    text.push_str(&format!(
        "{verdict}: {} edits, {} groups, {} entries, {} segment indexes, {} undo runs, {} read\n",
        report.edits,
        report.groups,
        report.entries,
        report.segment_indexes,
        report.undo_runs,
        bytes(report.bytes)
    ));
    text
}
