//! `inspect`: what stands at a path, read without changing anything: kind, size, extents, identity, locks.
//!
//! Invariants: everything is opened for reading only; what would be refused as a target is described with the reason,
//! not refused. Called by the dispatcher.

use std::path::Path;

use reprotect_engine::host::output::{Align, Output, Table, bytes, printable};
use reprotect_engine::io::{self, BlockFile, ByteRange};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::identity::DiskIdentity;
use reprotect_engine::store::target::{Expectation, TargetKind, TargetSpec, detect_target, open_target};
use reprotect_engine::store::vmdk::open::{check_locks, check_vmdk};
use serde::Serialize;

use crate::cli::InspectArgs;
use crate::device;
use crate::explain::explain;
use crate::guard::target_files;
use crate::registry::fs_opener;

/// What is asked of a target at once when its holes are counted.
const MAP_BYTES: u64 = 1 << 30;

/// The result.
#[derive(Clone, Debug, Default, Serialize)]
struct Inspection {
    path: String,
    /// createType, `device`, or `raw`; none when it cannot be told.
    kind: Option<String>,
    size_bytes: Option<u64>,
    /// Bytes that may hold something else than zeros.
    allocated_bytes: Option<u64>,
    uuid: Option<String>,
    cid: Option<String>,
    parent_cid: Option<String>,
    /// Who a device is.
    device: Option<String>,
    extents: Vec<ExtentLine>,
    gpt_disk_guid: Option<String>,
    mbr_signature: Option<String>,
    partitions: Vec<PartitionLine>,
    /// Who has it open, as far as that shows.
    in_use: Option<String>,
    /// What an unclean end left, put right by the next open.
    repair: Option<String>,
    /// Whether it can be a target as it stands.
    usable: bool,
    /// Why not.
    refused: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct ExtentLine {
    file: String,
    kind: String,
    bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
struct PartitionLine {
    start_bytes: u64,
    bytes: u64,
    content: Option<String>,
    uuid: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// When there is nothing at the path, or the result cannot be printed.
pub fn inspect(args: &InspectArgs, output: Output) -> anyhow::Result<()> {
    let path = std::path::absolute(&args.path)?;
    let opener = fs_opener();
    if opener.facts(&path)?.is_none() {
        anyhow::bail!("there is nothing at {}; name a VMDK descriptor, an image or a device", path.display());
    }
    let mut found = Inspection { path: path.display().to_string(), ..Inspection::default() };
    match detect_target(&opener, &path) {
        Ok(spec) => {
            describe_descriptor(&*opener, &spec, &mut found);
            let opened = open_target(&opener, &spec, &Expectation::default());
            match opened.map_err(anyhow::Error::from).and_then(|mut target| {
                let facts = target.facts().clone();
                found.size_bytes = Some(facts.size_bytes);
                found.repair = (!target.repair().is_nothing()).then(|| format!("{:?}", target.repair()));
                describe_content(&mut target, &mut found)
            }) {
                Ok(()) => found.usable = found.in_use.is_none(),
                Err(error) => found.refused = Some(explain(&error)),
            }
        }
        Err(error) => {
            found.refused = Some(error.to_string());
            describe_raw(&path, &mut found);
        }
    }
    if found.refused.is_none() {
        found.refused.clone_from(&found.in_use);
    }
    output.result(&found, || render(&found))?;
    Ok(())
}

fn describe_descriptor(opener: &dyn Files, spec: &TargetSpec, found: &mut Inspection) {
    found.kind = Some(spec.kind.to_string());
    if spec.kind == TargetKind::Device {
        found.device = device::identity(&spec.path);
        found.in_use = held(&spec.path);
        return;
    }
    let Ok(checked) = check_vmdk(opener, &spec.path) else { return };
    let descriptor = &checked.descriptor;
    found.uuid = descriptor.uuid().map(|uuid| uuid.to_string());
    found.cid = Some(format!("{:08x}", descriptor.cid()));
    found.parent_cid = Some(format!("{:08x}", descriptor.parent_cid()));
    let line = |extent: &reprotect_engine::format::vmdk::descriptor::Extent| ExtentLine {
        file: extent.file.clone().unwrap_or_default(),
        kind: format!("{:?}", extent.kind),
        bytes: extent.sectors * reprotect_engine::units::SECTOR_BYTES,
    };
    found.extents = descriptor.extents().iter().map(line).collect();
    found.in_use = match check_locks(opener, &spec.path, descriptor) {
        Err(error) => Some(error.to_string()),
        Ok(()) => target_files(opener, &spec.path).iter().find_map(|file| held(file)),
    };
}

/// Whether somebody has a file or device open for writing, as its locks tell.
fn held(path: &Path) -> Option<String> {
    let options = io::OpenOptions { exclusive: true, ..io::OpenOptions::reading() };
    match io::open(path, &options) {
        Err(error) if error.source.kind() == std::io::ErrorKind::ResourceBusy => Some(error.to_string()),
        _ => None,
    }
}

fn describe_content(disk: &mut dyn BlockFile, found: &mut Inspection) -> anyhow::Result<()> {
    let size = disk.size_bytes();
    let mut allocated = 0;
    let mut at = 0;
    while at < size {
        let end = size.min(at + MAP_BYTES);
        allocated += disk.allocated(ByteRange { start: at, end })?.iter().map(|part| part.len()).sum::<u64>();
        at = end;
    }
    found.size_bytes = Some(size);
    found.allocated_bytes = Some(allocated);
    let identity = DiskIdentity::probe(disk)?;
    found.gpt_disk_guid = identity.gpt_disk_guid;
    found.mbr_signature = identity.mbr_signature.map(|signature| format!("{signature:08x}"));
    found.partitions = identity
        .partitions
        .iter()
        .map(|partition| PartitionLine {
            start_bytes: partition.range.start,
            bytes: partition.range.len(),
            content: partition.content.as_ref().map(|content| format!("{:?}", content.kind)),
            uuid: partition.content.as_ref().map(|content| content.uuid.clone()),
        })
        .collect();
    Ok(())
}

/// Something that is no VMDK: as a disk image when it has whole sectors; what cannot be read so is left out.
fn describe_raw(path: &Path, found: &mut Inspection) {
    let Ok(mut file) = io::open(path, &io::OpenOptions::reading()) else { return };
    let whole =
        file.size_bytes() > 0 && file.size_bytes().is_multiple_of(reprotect_engine::units::SECTOR_BYTES);
    let is_image = whole && describe_content(&mut file, found).is_ok() && !found.partitions.is_empty();
    if is_image {
        found.kind = Some("raw".to_owned());
        found.in_use = held(path);
    } else {
        *found =
            Inspection { path: found.path.clone(), refused: found.refused.take(), ..Inspection::default() };
    }
}

fn render(found: &Inspection) -> String {
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            table.row([name.to_owned(), value]);
        }
    };
    line("path", Some(found.path.clone()));
    line("kind", Some(found.kind.clone().unwrap_or_else(|| "unknown".to_owned())));
    line("size", found.size_bytes.map(|size| format!("{} ({size} bytes)", bytes(size))));
    line("allocated", found.allocated_bytes.map(bytes));
    line("ddb.uuid", found.uuid.clone());
    line("CID", found.cid.clone());
    line("parentCID", found.parent_cid.clone());
    line("device", found.device.clone());
    for extent in &found.extents {
        line("extent", Some(format!("{} {} {}", extent.file, extent.kind, bytes(extent.bytes))));
    }
    line("GPT disk GUID", found.gpt_disk_guid.clone());
    line("MBR signature", found.mbr_signature.clone());
    for partition in &found.partitions {
        let content = partition.content.as_deref().unwrap_or("unknown content");
        let uuid = partition.uuid.as_deref().unwrap_or_default();
        let text =
            format!("at {}, {}, {content} {uuid}", bytes(partition.start_bytes), bytes(partition.bytes));
        line("partition", Some(text));
    }
    line("repair", found.repair.clone());
    line("in use", found.in_use.clone());
    line(
        "as a target",
        Some(match &found.refused {
            None => "possible".to_owned(),
            Some(why) => format!("refused: {}", printable(why)),
        }),
    );
    // No column heads: the first line is empty.
    table.render().trim_start().to_owned()
}
