//! Judges a retention folder that nobody has open: every copy of the superblock, every edit, every group, every
//! fragment of every entry, every frame and index page of every undo run.
//!
//! Invariants: a flipped bit anywhere in these files is a finding, or stands where nothing was ever written; each
//! finding says which points it costs, and whether the newest state suffers. Nothing is changed.
//! Units: bytes, blocks, entry numbers. Called by the offline commands.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;

use super::applier::{identity, run_path};
use super::entry::entry_writes;
use super::error::JournalError;
use super::indexed::FoundIndex;
use super::log::segment_path;
use super::manifest::{manifest_path, rest_is_zero};
use super::offline::{Listed, Offline};
use super::recovery::{Scan, Seen};
use super::shape::{DiskShape, Epoch, Run, RunFile};
use super::undo::{ActiveRun, BlockRange, Hole, Place, SealedRun, UndoError};
use super::view::At;
use crate::checksum::is_zero;
use crate::compress::Decompressor;
use crate::format::manifest::{ManifestHeader, SUPERBLOCK_COPIES, Superblock};
use crate::format::segment::SegmentHeader;
use crate::format::segment_index::encode_index;
use crate::io::{ByteRange, ReadAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockIndex, DiskId};

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// Where in it.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
    /// The disk that suffers, where that is known.
    pub disk: Option<DiskId>,
    /// Blocks of the disk that cannot be had.
    pub lost: Vec<BlockRange>,
    /// Points that lack these blocks, or cannot be had at all.
    pub points: Vec<At>,
    /// The newest state suffers, too.
    pub newest: bool,
    /// What to do.
    pub remedy: &'static str,
}

/// What was read and what was found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What is wrong; empty for a sound folder.
    pub findings: Vec<Finding>,
    /// What an operator may want to know, and is no damage.
    pub notes: Vec<String>,
    /// Edits of the manifest.
    pub edits: u64,
    /// Groups of the redo log.
    pub groups: u64,
    /// Entries of the redo log.
    pub entries: u64,
    /// Indexes of segments.
    pub indexes: u64,
    /// Undo runs.
    pub runs: u64,
    /// Bytes of groups and undo runs that were read.
    pub bytes: u64,
}

const HARMLESS: &str = "nothing is lost: the next start of the master target writes it again";
const INDEX_REMEDY: &str = "nothing is lost: the segment itself is read when the master target starts";
const LOG_REMEDY: &str = "keep the folder and start the master target: disks that lost entries are compared with their source; choose points that do not need the entry";
const RUN_REMEDY: &str =
    "restore the file from a copy of the folder, or choose a point that does not need it";

impl Offline {
    /// Reads everything in the folder and judges it.
    ///
    /// # Errors
    /// When a file cannot be read at all.
    pub fn verify(&mut self) -> Result<Verdict, JournalError> {
        let mut verdict = Verdict::default();
        self.verify_superblock(&mut verdict)?;
        self.verify_padding(&mut verdict)?;
        let torn = self.edits(|_, _, _| verdict.edits += 1)?;
        if torn {
            verdict.notes.push("the manifest ends in a torn edit, as after a power cut".to_owned());
        }
        for path in &self.found().set_aside {
            verdict.notes.push(format!("{} belongs to nothing", path.display()));
        }
        let disks: Vec<(DiskId, DiskShape)> =
            self.shape().disks.iter().map(|(disk, shape)| (*disk, shape.clone())).collect();
        let mut points = BTreeMap::new();
        for (disk, _) in &disks {
            points.insert(*disk, self.points(*disk)?);
        }
        self.verify_log(&points, &mut verdict)?;
        for (disk, shape) in disks {
            let points = points.get(&disk).map_or(&[][..], Vec::as_slice);
            for run in &shape.runs {
                self.verify_run(disk, *run, points, &mut verdict)?;
            }
            if let Some(epoch) = shape.open_epoch() {
                self.verify_open_run(disk, epoch, points, &mut verdict)?;
            }
        }
        Ok(verdict)
    }

    fn verify_superblock(&self, verdict: &mut Verdict) -> Result<(), JournalError> {
        let path = self.folder().join(super::manifest::SUPERBLOCK_NAME);
        let copies = self.superblock_copies()?;
        let mut damaged = |offset, what| verdict.findings.push(harmless(path.clone(), offset, what));
        for (copy, offset) in copies.iter().zip((0..).step_by(BLOCK_BYTES as usize)) {
            if let Some(Err(error)) = copy {
                damaged(offset, error.to_string());
            }
        }
        let generation = self.superblock().generation;
        let written = copies.iter().flatten().count() as u64;
        if (copies.len() as u64) < SUPERBLOCK_COPIES || written < SUPERBLOCK_COPIES.min(generation) {
            damaged(0, format!("{written} copies are there after {generation} writes"));
        }
        Ok(())
    }

    /// Blocks that hold a head and nothing else: no checksum covers what is behind it, and it must be zeros.
    fn verify_padding(&self, verdict: &mut Verdict) -> Result<(), JournalError> {
        let files = &**self.journal.files();
        let superblock = self.folder().join(super::manifest::SUPERBLOCK_NAME);
        let manifest = manifest_path(self.folder(), self.superblock().manifest);
        let segments =
            self.shape().segments.values().map(|segment| segment_path(self.folder(), segment.slot));
        let blocks =
            [(superblock, SUPERBLOCK_COPIES, Superblock::BYTES), (manifest, 1, ManifestHeader::BYTES)];
        for (path, count, head) in
            blocks.into_iter().chain(segments.map(|path| (path, 1, SegmentHeader::BYTES)))
        {
            if files.facts(&path)?.is_none() {
                continue; // named by who reads it
            }
            let bytes = files.read_head(&path, (count * BLOCK_BYTES) as usize)?;
            for (block, offset) in bytes.chunks(BLOCK_BYTES as usize).zip((0..).step_by(BLOCK_BYTES as usize))
            {
                if !is_zero(block.get(head..).unwrap_or_default()) {
                    let what = "the padding behind its head is not zero".to_owned();
                    verdict.findings.push(harmless(path.clone(), offset, what));
                }
            }
        }
        Ok(())
    }

    /// Every group and entry; fragments are decompressed and checked one by one.
    fn verify_log(
        &self,
        points: &BTreeMap<DiskId, Vec<Listed>>,
        verdict: &mut Verdict,
    ) -> Result<(), JournalError> {
        let mut decompressor =
            Decompressor::new().map_err(|error| JournalError::Zstd { reason: error.to_string() })?;
        let mut path = PathBuf::new();
        let mut wrong = Vec::new();
        let scan = self.log(|seen| match seen {
            Seen::Segment(_, at) => path = at.to_owned(),
            Seen::Group { header, .. } => {
                verdict.groups += 1;
                verdict.bytes += header.stored_bytes();
            }
            Seen::Entry { place, head, body } => {
                verdict.entries += 1;
                let body = Bytes::copy_from_slice(body);
                if let Err(error) = entry_writes(head.kind, body, &mut decompressor) {
                    wrong.push((path.clone(), place.offset, head.disk, head.number, error.to_string()));
                }
            }
        })?;
        if let Some((path, offset)) = &scan.torn {
            let path = path.display();
            verdict.notes.push(format!(
                "the log ends at byte {offset} of {path} in a torn write, as after a power cut or kill"
            ));
        }
        self.verify_indexes(&scan, verdict)?;
        for damage in scan.damage {
            let (lost, points) = (Vec::new(), Vec::new());
            verdict.findings.push(Finding {
                path: damage.path,
                offset: damage.offset,
                what: damage.reason,
                disk: None,
                lost,
                points,
                newest: false,
                remedy: LOG_REMEDY,
            });
        }
        for (path, offset, disk, number, what) in wrong {
            verdict.findings.push(self.entry_finding(points, path, offset, disk, number, what));
        }
        for (disk, log) in &scan.disks {
            for (from, to) in &log.missing {
                let what = format!("entries {from} to {} are missing", to - 1);
                let folder = self.folder().to_owned();
                verdict.findings.push(self.entry_finding(points, folder, 0, *disk, *from, what));
            }
        }
        Ok(())
    }

    /// The indexes of segments: whole, and of the same opinion as the segments. The newest has none.
    fn verify_indexes(&self, scan: &Scan, verdict: &mut Verdict) -> Result<(), JournalError> {
        for segment in self.shape().segments.values() {
            let path = segment_path(self.folder(), segment.slot);
            let what = match self.index(segment)? {
                FoundIndex::None => continue,
                FoundIndex::Damaged(error) => format!("its index: {error}"),
                FoundIndex::Whole(head, items) => {
                    verdict.indexes += 1;
                    let mut file = self.journal.files().open(&path, false)?;
                    let written = encode_index(&head, &items);
                    let mut stands = vec![0; written.len()];
                    let offset = segment.bytes - written.len() as u64;
                    file.read(&mut [ReadAt { offset, data: &mut stands }])?;
                    let of_segment = scan.indexes.wanting.iter().find(|(of, _)| of.number == segment.number);
                    let says = of_segment.and_then(|(_, index)| {
                        index.knowing(head.previous).encode(self.journal.id(), segment)
                    });
                    if stands != written {
                        "the padding behind the head of its index is not zero".to_owned()
                    } else if says.is_some_and(|says| says != written) {
                        "its index says something else than its groups".to_owned()
                    } else {
                        continue;
                    }
                }
            };
            let offset = segment.bytes.saturating_sub(BLOCK_BYTES);
            verdict.findings.push(Finding { remedy: INDEX_REMEDY, ..harmless(path, offset, what) });
        }
        Ok(())
    }

    /// What an entry that cannot be had costs: later points of its epoch, and the newest state where it is not on the
    /// target.
    fn entry_finding(
        &self,
        points: &BTreeMap<DiskId, Vec<Listed>>,
        path: PathBuf,
        offset: u64,
        disk: DiskId,
        number: u64,
        what: String,
    ) -> Finding {
        let epoch = self.shape().disks.get(&disk).and_then(|shape| shape.epoch_of(number));
        let needs = |listed: &&Listed| {
            let point = &listed.point;
            epoch.is_some_and(|epoch| {
                let at_end = epoch.closed.is_some_and(|closed| closed.last == point.at.number);
                point.at.epoch == epoch.opened.epoch && point.at.number >= number && !at_end
            })
        };
        let points = points.get(&disk).map_or(&[][..], Vec::as_slice);
        let points = points.iter().filter(needs).map(|listed| listed.point.at).collect();
        let newest = number > self.numbers(disk).1;
        let lost = Vec::new();
        Finding { path, offset, what, disk: Some(disk), lost, points, newest, remedy: LOG_REMEDY }
    }

    fn verify_run(
        &self,
        disk: DiskId,
        run: Run,
        points: &[Listed],
        verdict: &mut Verdict,
    ) -> Result<(), JournalError> {
        let path = run_path(&self.journal, disk, run.file);
        verdict.runs += 1;
        let identity = identity(&self.journal, disk, &run)?;
        let opened = SealedRun::open(&**self.journal.files(), &path, &identity);
        let checked = opened.and_then(|mut sealed| {
            verdict.bytes += sealed.len_bytes();
            sealed.verify()
        });
        self.note_run(disk, path, (run.first, run.last), points, checked, verdict);
        Ok(())
    }

    /// The run of the epoch that goes on: its frames are walked, then each image is read.
    fn verify_open_run(
        &mut self,
        disk: DiskId,
        epoch: &Epoch,
        points: &[Listed],
        verdict: &mut Verdict,
    ) -> Result<(), JournalError> {
        let number = epoch.opened.epoch;
        let path = run_path(&self.journal, disk, RunFile::Epoch(number));
        verdict.runs += 1;
        let checked = match self.open_run(disk) {
            Ok((Some(mut run), mut holes)) => {
                verdict.bytes += run.len_bytes();
                let mut file = self.journal.files().open(&path, false)?;
                let end = file.size_bytes();
                if !rest_is_zero(&mut *file, run.len_bytes().min(end), end)? {
                    let note = "ends in torn frames, as after a power cut";
                    verdict.notes.push(format!("{} {note}", path.display()));
                }
                read_images(&mut run, &mut holes)?;
                Ok(holes)
            }
            Ok((None, holes)) => Ok(holes),
            Err(JournalError::Undo(error)) => Err(error),
            Err(JournalError::Files(error)) => Err(error.into()),
            Err(error) => return Err(error),
        };
        self.note_run(disk, path, (number, number), points, checked, verdict);
        Ok(())
    }

    fn note_run(
        &self,
        disk: DiskId,
        path: PathBuf,
        (first, last): (u64, u64),
        points: &[Listed],
        checked: Result<Vec<Hole>, UndoError>,
        verdict: &mut Verdict,
    ) {
        let shape = self.shape().disks.get(&disk);
        let end_of = |epoch: u64| {
            let epochs = shape.map_or(&[][..], |shape| shape.epochs.as_slice());
            let epoch = epochs.iter().find(|known| known.opened.epoch == epoch)?;
            epoch.closed.map(|closed| closed.last)
        };
        // The end of an epoch is made from later runs, what lies inside it from its own, too.
        let needs =
            |at: At| if end_of(at.epoch) == Some(at.number) { at.epoch < first } else { at.epoch <= last };
        let older: Vec<At> = points.iter().map(|listed| listed.point.at).filter(|at| needs(*at)).collect();
        let finding = |offset, what, lost: Vec<BlockRange>, points, remedy| Finding {
            path: path.clone(),
            offset,
            what,
            disk: Some(disk),
            lost,
            points,
            newest: false,
            remedy,
        };
        match checked {
            Ok(holes) => verdict.findings.extend(holes.into_iter().map(|hole| {
                let (points, remedy) = if hole.lost.is_empty() {
                    (Vec::new(), "nothing is lost: the rest of the run says the same")
                } else {
                    (older.clone(), RUN_REMEDY)
                };
                finding(hole.file.start, hole.reason.to_string(), hole.lost, points, remedy)
            })),
            Err(error) => {
                let blocks = shape.map_or(0, |shape| shape.size_sectors().div_ceil(BLOCK_SECTORS));
                let lost = vec![BlockRange::new(0, blocks)];
                verdict.findings.push(finding(0, error.to_string(), lost, older, RUN_REMEDY));
            }
        }
    }
}

/// Something wrong that costs nothing.
fn harmless(path: PathBuf, offset: u64, what: String) -> Finding {
    let (lost, points) = (Vec::new(), Vec::new());
    Finding { path, offset, what, disk: None, lost, points, newest: false, remedy: HARMLESS }
}

/// Reads every image of the open run; what cannot be read is added to `holes`.
fn read_images(run: &mut ActiveRun, holes: &mut Vec<Hole>) -> Result<(), JournalError> {
    const STEP_BLOCKS: u64 = 16;
    let whole = run.header().disk_blocks();
    let mut plain = vec![0; (STEP_BLOCKS * BLOCK_BYTES) as usize];
    for found in run.lookup(whole).into_iter().filter(|found| matches!(found.place, Place::Stored(_))) {
        let mut at = found.blocks.start;
        while at < found.blocks.end {
            let count = (found.blocks.end - at).min(STEP_BLOCKS);
            let out = plain.get_mut(..(count * BLOCK_BYTES) as usize).unwrap_or_default();
            match run.read_blocks(BlockIndex(at), out) {
                Ok(()) => at += count,
                Err(UndoError::Damaged { blocks, source, offset, .. }) => {
                    let file = ByteRange { start: offset, end: offset };
                    at = blocks.end.max(at + 1);
                    if !holes.iter().any(|hole| hole.file.start == offset) {
                        holes.push(Hole { file, lost: vec![blocks], reason: source });
                    }
                }
                // Named when the run was opened.
                Err(UndoError::Lost { blocks, .. }) => at = blocks.end.max(at + 1),
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
