//! Files of the folder that the manifest does not name: left over by a crash, of somebody else, or proof that the manifest
//! lost something.
//!
//! Invariants: the manifest is written before a segment is used or an undo run begun, and before anything is removed that it
//! named; so what is newer than all that it knows shows that an edit that was durable is gone, and then nothing is opened, for
//! what the lost edit named would be written over or taken for something else. Nothing is changed here. Units: numbers of
//! groups and epochs. Called by `store::journal` and the offline tools.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::error::JournalError;
use super::manifest::{Manifest, SUPERBLOCK_NAME, manifest_path, number_of_name};
use super::recovery::Scan;
use super::shape::{DiskShape, RunFile};
use super::tolerant::{Tolerant, head_of};
use super::undo::RunHeader;
use super::{applier, is_ours, log};
use crate::format::manifest::ManifestHeader;
use crate::format::segment::{GroupHeader, SEGMENT_MAGIC, SegmentHeader};
use crate::format::undo::RUN_MAGIC;
use crate::io::{BlockFile as _, ByteRange, ReadAt};
use crate::store::crc_map::{MAP_PREFIX, map_name};
use crate::store::files::Files;
use crate::units::{BLOCK_BYTES, DiskId};

/// Whether something is there that only a newer manifest than this one can have named.
///
/// # Errors
/// When there is: the manifest lost edits that were durable.
pub(super) fn check_known(
    files: &dyn Files,
    folder: &Path,
    manifest: &Manifest,
    slots: &[u64],
    strangers: &[PathBuf],
    scan: &Scan,
) -> Result<(), JournalError> {
    let lost = |what: String| {
        let path = manifest_path(folder, manifest.number());
        Err(JournalError::damaged(&path, format!("it lost edits that were durable, for {what}")))
    };
    for (disk, shape) in &manifest.shape().disks {
        let applied =
            scan.disks.get(disk).and_then(|log| log.applied).map_or(0, |(applied, _)| applied.epoch);
        if applied > newest_epoch(shape) {
            return lost(format!("the redo log tells of undo epoch {applied} of disk {disk}"));
        }
    }
    for path in strangers {
        let Some((disk, file, header)) = run_of(files, path, manifest)? else { continue };
        let Some(shape) = manifest.shape().disks.get(&disk) else { continue };
        let newest = newest_epoch(shape);
        if header.undo_epoch_last > newest || matches!(file, RunFile::Epoch(epoch) if epoch > newest) {
            return lost(format!("{} is of an undo epoch behind {newest}", path.display()));
        }
        // What a merged run replaces is removed when the manifest names it.
        let inside = shape.runs.iter().filter(|run| {
            matches!(file, RunFile::Merged(_))
                && run.first >= header.undo_epoch
                && run.last <= header.undo_epoch_last
        });
        for run in inside {
            let replaced = folder.join(applier::run_name(disk, run.file));
            if files.facts(&replaced)?.is_none() {
                return lost(format!("{} replaced {}", path.display(), replaced.display()));
            }
        }
    }
    let used = |slot: &u64| manifest.shape().segments.values().any(|segment| segment.slot == *slot);
    for slot in slots.iter().filter(|slot| !used(slot)) {
        let path = log::segment_path(folder, *slot);
        if let Some(group) = first_group(files, &path, manifest)?.filter(|group| *group > scan.last_group) {
            return lost(format!("{} holds group {group} of the redo log", path.display()));
        }
    }
    Ok(())
}

fn newest_epoch(shape: &DiskShape) -> u64 {
    shape.epochs.last().map_or(0, |newest| newest.opened.epoch).max(shape.expired)
}

/// The undo run of this journal that a file is, by its name and its head.
fn run_of(
    files: &dyn Files,
    path: &Path,
    manifest: &Manifest,
) -> Result<Option<(DiskId, RunFile, RunHeader)>, JournalError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((disk, file)) = applier::run_of_name(&name) else { return Ok(None) };
    let head = head_of(files, path, RunHeader::BYTES as u64)?;
    let header = RunHeader::read_prefix(&head).ok().map(|(header, _)| header);
    let ours = header.filter(|header| header.magic == RUN_MAGIC && header.journal == manifest.journal());
    Ok(ours.map(|header| (disk, file, header)))
}

/// The first group that was written in the last use of a segment of this journal.
fn first_group(files: &dyn Files, path: &Path, manifest: &Manifest) -> Result<Option<u64>, JournalError> {
    let blocks = head_of(files, path, 2 * BLOCK_BYTES)?;
    let Some((head, group)) = blocks.split_at_checked(BLOCK_BYTES as usize) else { return Ok(None) };
    let Ok(header) = SegmentHeader::open(head) else { return Ok(None) };
    let group = GroupHeader::open(group).ok().filter(|group| group.salt == header.salt);
    Ok(group.filter(|_| header.journal == manifest.journal()).map(|group| group.group))
}

/// Whether a file of this journal was removed, replaced or never finished when the program ended: an undo run, for the
/// manifest is changed first, so what it does not name and could have named before is of no use to anybody; a manifest
/// that a newer one replaced, for the superblock is changed first. Of the disks `removed` nothing is kept.
pub(super) fn is_leftover(
    files: &dyn Files,
    path: &Path,
    manifest: &Manifest,
    removed: &BTreeSet<DiskId>,
) -> Result<bool, JournalError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(number) = number_of_name(&name) {
        let header = ManifestHeader::open(&files.read_head(path, BLOCK_BYTES as usize)?);
        let ours = header.is_ok_and(|header| header.journal == manifest.journal() && header.number == number);
        return Ok(ours && number < manifest.number());
    }
    if let Some(disk) = name.strip_prefix(MAP_PREFIX).and_then(|disk| DiskId::parse(disk).ok()) {
        return Ok(removed.contains(&disk) && name == map_name(disk));
    }
    let Some((disk, file)) = applier::run_of_name(&name) else { return Ok(false) };
    let once_named = match (manifest.shape().disks.get(&disk), file) {
        (None, _) => removed.contains(&disk),
        (Some(shape), RunFile::Epoch(epoch)) => epoch <= newest_epoch(shape),
        (Some(_), RunFile::Merged(_)) => true,
    };
    // A run whose header was not written yet is empty.
    let is_empty = head_of(files, path, RunHeader::BYTES as u64)?.iter().all(|byte| *byte == 0);
    Ok(once_named && (is_empty || run_of(files, path, manifest)?.is_some()))
}

/// Whether a file is called as the run of an undo epoch that the manifest knows to be over, and does not name: a later edit
/// cannot name it again, for epochs ascend.
pub(super) fn was_let_go(path: &Path, manifest: &Manifest) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((disk, RunFile::Epoch(epoch))) = applier::run_of_name(&name) else { return false };
    manifest.shape().disks.get(&disk).is_some_and(|shape| epoch <= newest_epoch(shape))
}

/// Whether a file is a segment that this journal used, or made and did not use yet: its head is this journal's or zeros. One
/// that cannot be read where it is looked at belongs to nothing, and is not used again.
fn is_free_segment(files: &dyn Files, path: &Path, manifest: &Manifest) -> Result<bool, JournalError> {
    let mut file = Tolerant::open(files, path)?;
    let mut head = vec![0; (2 * BLOCK_BYTES).min(file.size_bytes()) as usize];
    file.read(&mut [ReadAt { offset: 0, data: &mut head }])?;
    if file.is_bad(ByteRange { start: 0, end: head.len() as u64 }) {
        return Ok(false);
    }
    head.truncate(SegmentHeader::BYTES);
    let ours = SegmentHeader::read_prefix(&head)
        .is_ok_and(|(header, _)| header.magic == SEGMENT_MAGIC && header.journal == manifest.journal());
    Ok(ours || head.iter().all(|byte| *byte == 0))
}

/// Sorts the files of the folder: segment files by number; and names of ours that belong to nothing.
pub(super) fn sort_files(
    files: &dyn Files,
    folder: &Path,
    manifest: &Manifest,
) -> Result<(Vec<u64>, Vec<PathBuf>), JournalError> {
    let (mut slots, mut strangers) = (Vec::new(), Vec::new());
    let mut known = manifest.names().to_vec();
    for (disk, shape) in &manifest.shape().disks {
        let open = shape.open_epoch().map(|epoch| RunFile::Epoch(epoch.opened.epoch));
        let files = shape.runs.iter().map(|run| run.file).chain(open);
        known.extend(files.map(|file| applier::run_name(*disk, file)));
        known.push(map_name(*disk));
    }
    for name in files.neighbours(&folder.join(SUPERBLOCK_NAME))? {
        if let Some(slot) = log::segment_slot(&name) {
            let used = manifest.shape().segments.values().any(|segment| segment.slot == slot);
            if used || is_free_segment(files, &folder.join(&name), manifest)? {
                slots.push(slot);
            } else {
                strangers.push(folder.join(&name));
            }
        } else if is_ours(&name) && !known.contains(&name) {
            strangers.push(folder.join(&name));
        }
    }
    slots.sort_unstable();
    Ok((slots, strangers))
}
