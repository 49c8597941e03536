//! `journal extract`: a point copied out of a retention folder and the target's files.
//!
//! Invariants: neither is changed; the copy is new, and whole or not there. Called by `commands::journal`.

use std::time::Instant;

use reprotect_engine::host::output::{Output, bytes};
use reprotect_engine::io::BlockFile as _;
use reprotect_engine::store::export::export;
use reprotect_engine::store::journal::offline::Which;
use serde::Serialize;

use super::{find_disk, find_point, open, open_target_to_read};
use crate::cli::copies::JournalExtractArgs;
use crate::export::engine_format;
use crate::registry::fs_opener;

#[derive(Debug, Serialize)]
struct Extracted {
    disk: String,
    point: String,
    files: Vec<String>,
    size_bytes: u64,
    data_bytes: u64,
    file_bytes: u64,
}

pub(super) fn extract(args: &JournalExtractArgs, output: Output) -> anyhow::Result<()> {
    let mut offline = open(&args.folder, false)?;
    let disk = find_disk(&offline, &args.disk)?;
    let (which, point) = if args.point == "newest" {
        (Which::Newest, "newest".to_owned())
    } else {
        let at = find_point(&mut offline, disk, &args.point)?;
        (Which::At(at), at.to_string())
    };
    let target = offline.watched(disk, open_target_to_read(&args.target)?, args.accept_damage)?;
    if !target.is_known() {
        eprintln!(
            "what the master target wrote to {} is not known (the scrub is off, or has not seen it yet): what no undo run has is taken as it stands there",
            args.target.display()
        );
    }
    let mut opened = offline.disk(disk, target)?;
    let (got, expected) = (opened.target_bytes(), opened.size_bytes());
    anyhow::ensure!(
        got == expected,
        "{} has {got} bytes, the disk {expected}; name the target of this disk",
        args.target.display()
    );
    for hole in opened.holes() {
        let lost: u64 = hole.lost.iter().map(|blocks| blocks.len()).sum();
        eprintln!(
            "the open undo run is damaged at byte {}: {lost} blocks are lost to older points",
            hole.file.start
        );
    }
    let mut file = opened.into_file(which)?;
    let size = file.size_bytes();
    let mut progress = output.progress("extract", size);
    let mut tell = |done| progress.update(done, size, Instant::now());
    let made = export(
        &fs_opener(),
        &mut file,
        &std::path::absolute(&args.output)?,
        engine_format(args.format),
        &mut tell,
    )?;
    progress.finish("done");
    let extracted = Extracted {
        disk: disk.to_string(),
        point,
        files: made.files.iter().map(|path| path.display().to_string()).collect(),
        size_bytes: made.size_bytes,
        data_bytes: made.data_bytes,
        file_bytes: made.file_bytes,
    };
    output.result(&extracted, || {
        format!(
            "{} of {} is in {}: {} of data in {} of files",
            extracted.point,
            extracted.disk,
            extracted.files.join(", "),
            bytes(extracted.data_bytes),
            bytes(extracted.file_bytes)
        )
    })?;
    Ok(())
}
