//! Points of a running master target copied into new files, and read through to tell whether they are whole.
//!
//! Each piece is read on the disk's own thread between two windows, so replication goes on and the target never changes
//! under a read.
//!
//! Invariants: nothing that exists is overwritten; a copy is whole or removed; a verified point was read to its last
//! block, and every range that cannot be had is named with its reason. Units: bytes. Called by `admin` on threads
//! of their own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use reprotect_engine::host::output::bytes;
use reprotect_engine::io::ByteRange;
use reprotect_engine::store::export::{ExportFormat, export};
use reprotect_engine::store::journal::JournalError;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::units::{BLOCK_BYTES, DiskId};

use crate::api::{
    DamagedRange, ExportAnswer, ExportRequest, ExportedInfo, VerifiedPoint, VerifyAnswer, VerifyRequest,
};
use crate::catalogue::ProtectedDisk;
use crate::cli::copies::CopyFormat;
use crate::disk_worker::DiskInputs;
use crate::mounts::ViewFile;
use crate::points::{self, NO_JOURNAL, on_disk};
use crate::registry::{Registry, fs_opener, short_name};
use crate::retention::Hold;

/// How often the log says how far an export is.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Bytes that a verification reads in one go.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes whose holes are asked for in one go.
const MAP_BYTES: u64 = 1 << 30;
/// Damaged ranges that an answer names; more are counted.
const RANGES_MAX: usize = 1000;

/// The engine's word for a format.
#[must_use]
pub const fn engine_format(format: CopyFormat) -> ExportFormat {
    match format {
        CopyFormat::Flat => ExportFormat::Flat,
        CopyFormat::Sparse => ExportFormat::Sparse,
        CopyFormat::Stream => ExportFormat::Stream,
        CopyFormat::Raw => ExportFormat::Raw,
    }
}

fn format_of(name: &str) -> anyhow::Result<CopyFormat> {
    clap::ValueEnum::from_str(name, false)
        .map_err(|_| anyhow::anyhow!("{name} is no format; use flat, sparse, stream or raw"))
}

/// Copies a point of a disk, or of all disks of a machine. Blocks.
///
/// # Errors
/// When there is no such point, something of that name exists, or a copy cannot be read or written.
pub fn copy_point(registry: &Registry, request: &ExportRequest) -> anyhow::Result<ExportAnswer> {
    let format = format_of(&request.format)?;
    if !request.path.is_absolute() {
        bail!("{} is not absolute; name a path on the master target from its root", request.path.display());
    }
    let records = registry.protected_disks(&request.what)?;
    let disks = ids(&records)?;
    // Every disk's point is looked up before the first byte is copied.
    let points::Chosen { places, note } =
        points::choose(registry, &disks, &request.point, request.accept_damage)?;
    // Copying one disk may take longer than the points of the others would stay.
    let retention = registry.retention().context(NO_JOURNAL)?;
    let _holds: Vec<Hold> = places.iter().map(|(disk, at)| retention.hold(*disk, *at)).collect();
    let place =
        |record: &ProtectedDisk| places.iter().find(|(disk, _)| disk.to_string() == record.disk).copied();
    if let ([record], Some(place)) = (records.as_slice(), records.first().and_then(place)) {
        let copies = vec![copy_disk(registry, record, place, format, &request.path)?];
        return Ok(ExportAnswer { copies, note });
    }
    std::fs::create_dir_all(&request.path)
        .with_context(|| format!("cannot make the folder {}", request.path.display()))?;
    let ending = if format == CopyFormat::Raw { "raw" } else { "vmdk" };
    let mut copies: Vec<ExportedInfo> = Vec::new();
    for (record, name) in records.iter().zip(file_names(&records)) {
        let path = request.path.join(format!("{name}.{ending}"));
        let place =
            place(record).with_context(|| format!("disk {} has no such point", record.source_name))?;
        let copied = copy_disk(registry, record, place, format, &path).with_context(|| {
            let made: Vec<&str> = copies.iter().flat_map(|copy| &copy.files).map(String::as_str).collect();
            match made.as_slice() {
                [] => format!("{} was not copied", record.source_name),
                made => format!(
                    "{} was not copied; others are whole, remove them before you try again: {}",
                    record.source_name,
                    made.join(", ")
                ),
            }
        })?;
        copies.push(copied);
    }
    Ok(ExportAnswer { copies, note })
}

/// What the copies of a machine's disks are called: by the disk's name on the machine, and its UUID where two have the same.
fn file_names(records: &[ProtectedDisk]) -> Vec<String> {
    let name = |record: &ProtectedDisk| short_name(&record.source_name).to_owned();
    let is_alone = |own: &str| records.iter().filter(|record| name(record) == own).count() == 1;
    let of = |record: &ProtectedDisk| {
        let own = name(record);
        if is_alone(&own) { own } else { format!("{own}-{}", record.disk.get(..8).unwrap_or_default()) }
    };
    records.iter().map(of).collect()
}

fn ids(records: &[ProtectedDisk]) -> anyhow::Result<Vec<DiskId>> {
    records.iter().map(|record| Ok(DiskId::parse(&record.disk)?)).collect()
}

fn copy_disk(
    registry: &Registry,
    record: &ProtectedDisk,
    (disk, at): (DiskId, At),
    format: CopyFormat,
    path: &Path,
) -> anyhow::Result<ExportedInfo> {
    let point = open_point(registry, disk, at)?;
    let shown = at.to_string();
    tracing::info!(%disk, point = shown, path = %path.display(), ?format, "an export begins");
    let size = point.size_bytes;
    let mut told = Instant::now();
    let mut tell = |done: u64| {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let percent = done * 100 / size.max(1);
            tracing::info!(%disk, path = %path.display(), done = bytes(done), percent, "exporting");
        }
    };
    let mut file = point.file(disk);
    let made = export(&fs_opener(), &mut file, path, engine_format(format), &mut tell).inspect_err(|error| {
        tracing::warn!(%disk, path = %path.display(), %error, "an export failed; what it had made was removed");
    })?;
    tracing::info!(%disk, point = shown, path = %path.display(), data = bytes(made.data_bytes), "exported");
    Ok(ExportedInfo {
        disk: record.disk.clone(),
        point: shown,
        files: made.files.iter().map(|path| path.display().to_string()).collect(),
        size_bytes: made.size_bytes,
        data_bytes: made.data_bytes,
        file_bytes: made.file_bytes,
    })
}

/// A point that is read on its disk's thread.
struct OpenPoint {
    at: At,
    inputs: DiskInputs,
    view: Arc<View>,
    size_bytes: u64,
    _hold: Hold,
}

impl OpenPoint {
    fn file(&self, disk: DiskId) -> ViewFile {
        let name = format!("{disk} at {}", self.at);
        let (inputs, view) = (self.inputs.clone(), Arc::clone(&self.view));
        ViewFile { inputs, view, name, size_bytes: self.size_bytes }
    }
}

fn open_point(registry: &Registry, disk: DiskId, at: At) -> anyhow::Result<OpenPoint> {
    let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
    let retention = registry.retention().context(NO_JOURNAL)?;
    let hold = retention.hold(disk, at);
    let view = Arc::new(retention.view(disk, at)?);
    let size_bytes = view.size_bytes();
    Ok(OpenPoint { at, inputs, view, size_bytes, _hold: hold })
}

/// Reads points of a disk to the last block. Blocks.
///
/// # Errors
/// When there is no such point, or the disk stands; damage is part of the answer.
pub fn verify_points(registry: &Registry, request: &VerifyRequest) -> anyhow::Result<VerifyAnswer> {
    let record = registry.protected(&request.disk)?;
    let disk = DiskId::parse(&record.disk)?;
    let names: Vec<String> = if request.point == "all" {
        points::list(registry, &[disk], true)?.into_iter().map(|point| point.point).collect()
    } else {
        vec![request.point.clone()]
    };
    let mut verified = Vec::new();
    for name in names {
        // With `all`, a point may be gone by the time it is its turn.
        let at = match points::find(registry, &[disk], &name) {
            Err(_) if request.point == "all" => continue,
            found => found?.places.first().context("the disk has no such point")?.1,
        };
        let begun = Instant::now();
        let done = match open_point(registry, disk, at) {
            Ok(point) => read_point(&point)?,
            Err(error) => refused(at, &error),
        };
        tracing::info!(
            %disk, point = done.point, read = bytes(done.read_bytes), damaged = bytes(done.damaged_bytes),
            seconds = begun.elapsed().as_secs(), "verified"
        );
        verified.push(done);
    }
    let sound = verified.iter().all(|point| point.damaged_bytes == 0 && point.refused.is_none());
    Ok(VerifyAnswer { disk: record.disk, sound, points: verified })
}

fn refused(at: At, error: &anyhow::Error) -> VerifiedPoint {
    let refused = Some(crate::explain::explain(error));
    let (point, damaged) = (at.to_string(), Vec::new());
    VerifiedPoint { point, read_bytes: 0, blocks: 0, damaged_bytes: 0, damaged, left_out: 0, refused }
}

fn read_point(point: &OpenPoint) -> anyhow::Result<VerifiedPoint> {
    let mut done = VerifiedPoint {
        point: point.at.to_string(),
        read_bytes: 0,
        blocks: 0,
        damaged_bytes: 0,
        damaged: Vec::new(),
        left_out: 0,
        refused: None,
    };
    let mut start = 0;
    while start < point.size_bytes {
        let window = ByteRange { start, end: point.size_bytes.min(start + MAP_BYTES) };
        let view = Arc::clone(&point.view);
        // Where even the holes cannot be told, everything is read.
        let mapped = on_disk(&point.inputs, move |store| Ok(store.view_allocated(&view, window)))?;
        for part in mapped.unwrap_or_else(|_| vec![window]) {
            let mut at = part.start;
            while at < part.end {
                let end = part.end.min(at + PIECE_BYTES);
                read_piece(point, ByteRange { start: at, end }, &mut done)?;
                at = end;
            }
        }
        start = window.end;
    }
    done.blocks = done.read_bytes.div_ceil(BLOCK_BYTES);
    Ok(done)
}

/// Reads a piece; one that cannot be read whole is read block by block.
fn read_piece(point: &OpenPoint, range: ByteRange, done: &mut VerifiedPoint) -> anyhow::Result<()> {
    let Err(error) = read_range(point, range)? else {
        done.read_bytes += range.len();
        return Ok(());
    };
    if range.len() <= BLOCK_BYTES {
        note(range, &error, done);
        return Ok(());
    }
    let step = if range.len() > 64 * BLOCK_BYTES { 64 * BLOCK_BYTES } else { BLOCK_BYTES };
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at / step + 1) * step);
        read_piece(point, ByteRange { start: at, end }, done)?;
        at = end;
    }
    Ok(())
}

/// The inner error is damage, the outer one a disk that stands.
fn read_range(point: &OpenPoint, range: ByteRange) -> anyhow::Result<Result<(), JournalError>> {
    let view = Arc::clone(&point.view);
    on_disk(&point.inputs, move |store| {
        let mut data = vec![0; range.len() as usize];
        Ok(store.read_view(&view, range.start, &mut data))
    })
}

fn note(range: ByteRange, error: &JournalError, done: &mut VerifiedPoint) {
    done.damaged_bytes += range.len();
    if let Some(last) = done.damaged.last_mut().filter(|last| last.end == range.start) {
        last.end = range.end;
    } else if done.damaged.len() < RANGES_MAX {
        let (start, end) = (range.start, range.end);
        done.damaged.push(DamagedRange { start, end, reason: error.to_string() });
    } else {
        done.left_out += 1;
    }
}
