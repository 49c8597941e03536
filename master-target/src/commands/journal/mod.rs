//! `journal list | verify | dump | extract`: a retention folder without a master target.
//!
//! Invariants: nothing in the folder and of the targets is changed; a folder that a master target has open is refused,
//! or read beside it where a torn end is all that can come of it. Called by the dispatcher; needs no configuration.

mod dump;
mod extract;
mod list;
mod verify;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::host::output::Output;
use reprotect_engine::io::{self, BlockError, BlockOp, OpenOptions};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::{JournalError, view::At};
use reprotect_engine::store::target::{Expectation, Target, detect_target, open_target};
use reprotect_engine::store::vmdk::open::{check_locks, check_vmdk};
use reprotect_engine::units::DiskId;

use crate::cli::copies::{JournalArgs, JournalCommand};

/// Runs one of them; answers whether all is well.
///
/// # Errors
/// When the folder cannot be read, or what was asked for is not there.
pub fn journal(args: &JournalArgs, output: Output) -> anyhow::Result<bool> {
    match &args.command {
        JournalCommand::List(args) => list::list(args, output).map(|()| true),
        JournalCommand::Verify(args) => verify::verify(args, output),
        JournalCommand::Dump(args) => dump::dump(args, output).map(|()| true),
        JournalCommand::Extract(args) => extract::extract(args, output).map(|()| true),
    }
}

/// Files that are only read. Unless `beside`, each is locked against writers: that is how a running master target, or a
/// machine that was powered on, is noticed and kept out.
pub(super) fn reader(beside: bool) -> Arc<dyn Files> {
    Arc::new(FsFiles::new(move |path, writable| {
        if writable {
            let source = std::io::Error::new(std::io::ErrorKind::ReadOnlyFilesystem, "it is only read here");
            let name = path.display().to_string();
            return Err(BlockError { name, op: BlockOp::Open, offset: 0, len: 0, source });
        }
        io::open(path, &OpenOptions { exclusive: !beside, ..OpenOptions::reading() })
    }))
}

/// Opens a folder.
fn open(folder: &Path, beside: bool) -> anyhow::Result<Offline> {
    Offline::open(reader(beside), folder).map_err(|error| match error {
        JournalError::Files(reprotect_engine::store::files::FilesError::InUse { .. }) => anyhow!(
            "a master target has {} open; use its own commands (`points`, `verify`, `export`), or stop it first",
            folder.display()
        ),
        error => error.into(),
    })
}

/// Opens a target for reading.
fn open_target_to_read(path: &Path) -> anyhow::Result<Target> {
    let files = reader(false);
    let spec = detect_target(&files, path)?;
    if spec.kind.vmdk().is_some() {
        let checked = check_vmdk(&*files, path)?;
        check_locks(&*files, path, &checked.descriptor)?;
    }
    Ok(open_target(&files, &spec, &Expectation::default())?)
}

/// The disk of a UUID or the beginning of one.
fn find_disk(offline: &Offline, name: &str) -> anyhow::Result<DiskId> {
    let name = name.to_ascii_lowercase();
    let disks: Vec<DiskId> = offline.shape().disks.keys().copied().collect();
    let found: Vec<DiskId> =
        disks.iter().copied().filter(|disk| disk.to_string().starts_with(&name)).collect();
    match found.as_slice() {
        [disk] => Ok(*disk),
        [] => {
            let known: Vec<String> = disks.iter().map(ToString::to_string).collect();
            bail!("the folder holds no disk {name}; it holds {}", known.join(", "))
        }
        _ => bail!("several disks begin with {name}; write more of the UUID"),
    }
}

/// The point of a name or `EPOCH.NUMBER`.
pub(crate) fn find_point(offline: &mut Offline, disk: DiskId, name: &str) -> anyhow::Result<At> {
    let points = offline.points(disk)?;
    let named = points.iter().rev().find(|listed| listed.point.name.as_str() == name && !name.is_empty());
    if let Some(listed) = named {
        return Ok(listed.point.at);
    }
    // Any entry inside the log will do, mark or not, where writes were ordered: there each is a state.
    let at = name
        .parse()
        .ok()
        .with_context(|| format!("there is no point {name}; `journal list` shows those there are"))?;
    anyhow::ensure!(
        offline.is_state(disk, at)?,
        "{at} is inside a scan round or a window: the disk never held just that; choose a point that `journal list` shows"
    );
    Ok(at)
}

const fn class_name(class: MarkClass) -> &'static str {
    match class {
        MarkClass::Crash => "crash-consistent",
        MarkClass::Frozen => "frozen",
        MarkClass::App => "application-consistent",
        MarkClass::Fuzzy => "fuzzy",
    }
}
