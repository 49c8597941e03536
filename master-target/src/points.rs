//! Recovery points of a running master target: listed, mounted over NBD, and gone back to.
//!
//! A point of a disk is called `EPOCH.NUMBER`, or by its name. Points at the end of an undo epoch outlive the redo log;
//! points inside one can be had as long as its entries are there. A mount reads on the disk's own thread, between two
//! windows, so replication goes on and the target never changes under a read.
//!
//! Invariants: a mount changes nothing; a writable one writes into a scratch file that is deleted with it; a fuzzy
//! point is shown as what it is. Units: bytes, entry numbers. Called by `admin`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::format::batch::{Mark, MarkClass};
use reprotect_engine::format::segment::EntryKind;
use reprotect_engine::io;
use reprotect_engine::io::durable::create_dir_durable;
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::net::nbd::listen::Address;
use reprotect_engine::net::nbd::{Export, ExportBy, Server, Settings};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::{DiskShape, Journal, JournalError};
use reprotect_engine::store::overlay::{Overlay, OverlayState};
use reprotect_engine::units::DiskId;

use crate::api::{MountInfo, PointInfo, RollbackAnswer};
use crate::disk_worker::DiskInputs;
use crate::journaled::Journaled;
use crate::registry::{Registry, fs_opener};

/// Mounts at a time.
const MOUNTS_MAX: usize = 32;

/// The points of a disk that can be had now, newest first.
///
/// # Errors
/// When the disk is in no journal, or its marks cannot be read.
pub fn list(registry: &Registry, disk: DiskId) -> anyhow::Result<Vec<PointInfo>> {
    let retention = registry.retention().context(NO_JOURNAL)?;
    let mut locked = retention.lock();
    let journal = locked.get()?;
    let shape = journal.shape().disks.get(&disk).cloned().context(NOT_YET)?;
    let mut points: BTreeMap<At, PointInfo> = BTreeMap::new();
    for (at, mark) in marks(journal, disk, &shape)? {
        points.insert(at, info(at, mark.class, mark.source_time.0, "", false, false));
    }
    for kept in shape.points.values() {
        let at = At { epoch: kept.epoch, number: kept.number };
        let name = kept.name.as_str();
        points.insert(at, info(at, kept.class, kept.source_time.0, name, kept.pinned, kept.degraded));
    }
    Ok(points.into_values().rev().collect())
}

const NO_JOURNAL: &str =
    "this master target keeps newest states only; set `retention.path` in its configuration, then restart";
const NOT_YET: &str = "the disk is not in the retention journal yet; wait for its initial sync";

/// Marks whose entries are in the log and whose undo epoch is known.
fn marks(journal: &mut Journal, disk: DiskId, shape: &DiskShape) -> Result<Vec<(At, Mark)>, JournalError> {
    let entries: Vec<_> =
        journal.entries(disk).iter().filter(|entry| entry.kind == EntryKind::Mark).copied().collect();
    let first = journal.entries(disk).first().map_or(u64::MAX, |entry| entry.number);
    let mut found = Vec::new();
    for entry in entries {
        let Some(epoch) = shape.epoch_of(entry.number) else { continue };
        // A point inside an epoch needs every entry of it.
        let at_end = epoch.closed.is_some_and(|closed| closed.last == entry.number);
        if !at_end && epoch.opened.after + 1 < first {
            continue;
        }
        let (_, body) = journal.read(entry.place)?;
        if let Ok(mark) = Mark::read_exact(&body) {
            found.push((At { epoch: epoch.opened.epoch, number: entry.number }, mark));
        }
    }
    Ok(found)
}

fn info(at: At, class: MarkClass, nanos: u64, name: &str, pinned: bool, degraded: bool) -> PointInfo {
    let class = match class {
        MarkClass::Crash => "crash-consistent",
        MarkClass::Frozen => "frozen",
        MarkClass::App => "application-consistent",
        MarkClass::Fuzzy => "fuzzy",
    };
    PointInfo {
        point: format!("{}.{}", at.epoch, at.number),
        name: name.to_owned(),
        class: class.to_owned(),
        source_time_ms: nanos / 1_000_000,
        pinned,
        degraded,
    }
}

/// The point of a name.
///
/// # Errors
/// When there is none; the text says what there is.
pub fn find(registry: &Registry, disk: DiskId, name: &str) -> anyhow::Result<At> {
    let points = list(registry, disk)?;
    let by_name = points.iter().find(|point| point.name == name || point.point == name);
    let newest = points.first().filter(|_| name == "newest");
    let point = by_name.or(newest).ok_or_else(|| {
        let known: Vec<&str> = points.iter().take(5).map(|point| point.point.as_str()).collect();
        match known.as_slice() {
            [] => anyhow!("the disk has no point yet; wait for its next mark"),
            known => {
                anyhow!("there is no point {name}; the newest are {}; `points` lists all", known.join(", "))
            }
        }
    })?;
    let (epoch, number) = point.point.split_once('.').context("a point is EPOCH.NUMBER")?;
    Ok(At { epoch: epoch.parse()?, number: number.parse()? })
}

/// Runs on a disk's thread; a disk that stands says so.
pub(crate) fn on_disk<T: Send + 'static>(
    inputs: &DiskInputs,
    work: impl FnOnce(&mut Journaled) -> Result<T, JournalError> + Send + 'static,
) -> anyhow::Result<T> {
    let answer = inputs.ask(move |store| store.map(work))?;
    Ok(answer.context("the disk is stopped, or not in the retention journal; see `status`")??)
}

/// Takes a disk back to a point, in place.
///
/// # Errors
/// When the point is not kept, or the disk stands.
pub fn rollback(registry: &Registry, disk: DiskId, point: &str) -> anyhow::Result<RollbackAnswer> {
    let at = find(registry, disk, point)?;
    let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
    if registry.is_connected(disk) {
        bail!(
            "its agent is connected and would write on over the point; stop the agent or `unprotect` the disk first, then roll back"
        );
    }
    let done = on_disk(&inputs, move |store| store.rollback(at))?;
    tracing::warn!(%disk, point, written = done.written_bytes, "rolled back");
    Ok(RollbackAnswer {
        disk: disk.to_string(),
        point: format!("{}.{}", at.epoch, at.number),
        compared_bytes: done.compared_bytes,
        written_bytes: done.written_bytes,
    })
}

/// A disk as it was, as a file: every read is a question to the disk's thread.
pub(crate) struct ViewFile {
    pub(crate) inputs: DiskInputs,
    pub(crate) view: Arc<View>,
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
}

impl ViewFile {
    fn error(&self, op: BlockOp, offset: u64, len: u64, reason: String) -> BlockError {
        BlockError { name: self.name.clone(), op, offset, len, source: std::io::Error::other(reason) }
    }
}

impl BlockFile for ViewFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        for read in reads {
            let (offset, len, view) = (read.offset, read.data.len(), Arc::clone(&self.view));
            let bytes = on_disk(&self.inputs, move |store| {
                let mut bytes = vec![0; len];
                store.read_view(&view, offset, &mut bytes)?;
                Ok(bytes)
            });
            let bytes =
                bytes.map_err(|error| self.error(BlockOp::Read, offset, len as u64, error.to_string()))?;
            read.data.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        let offset = writes.first().map_or(0, |write| write.offset);
        Err(self.error(BlockOp::Write, offset, 0, READ_ONLY.to_owned()))
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        Err(self.error(BlockOp::Zero, range.start, range.len(), READ_ONLY.to_owned()))
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }

    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        let view = Arc::clone(&self.view);
        on_disk(&self.inputs, move |store| store.view_allocated(&view, range))
            .map_err(|error| self.error(BlockOp::Map, range.start, range.len(), error.to_string()))
    }
}

const READ_ONLY: &str = "a point is not written to; mount it with --writable for a throw-away copy";

struct Mount {
    info: MountInfo,
    server: Server,
    scratch: Option<PathBuf>,
}

/// What is mounted.
#[derive(Default)]
pub struct Mounts(Mutex<Vec<Mount>>);

impl std::fmt::Debug for Mounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounts").finish_non_exhaustive()
    }
}

impl Mounts {
    fn lock(&self) -> MutexGuard<'_, Vec<Mount>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is mounted now.
    #[must_use]
    pub fn list(&self) -> Vec<MountInfo> {
        self.lock().iter().map(|mount| mount.info.clone()).collect()
    }

    /// Serves a point of a disk over NBD on a socket below `folder`.
    ///
    /// # Errors
    /// When the point is not kept, or the server cannot start.
    pub async fn mount(
        &self,
        registry: &Arc<Registry>,
        folder: &Path,
        disk: DiskId,
        point: &str,
        writable: bool,
    ) -> anyhow::Result<MountInfo> {
        if self.lock().len() >= MOUNTS_MAX {
            bail!("{MOUNTS_MAX} points are mounted; `unmount` one first");
        }
        let (prepared, folder) = {
            let (registry, folder, point) = (Arc::clone(registry), folder.to_owned(), point.to_owned());
            let work = move || {
                create_dir_durable(&folder)?;
                let prepared = prepare(&registry, &folder, disk, &point, writable)?;
                anyhow::Ok((prepared, folder))
            };
            tokio::task::spawn_blocking(work).await??
        };
        let Prepared { export, at, id, scratch } = prepared;
        let socket = folder.join(format!("{id}.sock"));
        let address = Address::Unix(socket.clone());
        let server = Server::start(&address, vec![export], Settings::default()).await?;
        let info = MountInfo {
            id,
            disk: disk.to_string(),
            point: format!("{}.{}", at.epoch, at.number),
            writable,
            uri: format!("nbd+unix:///?socket={}", socket.display()),
        };
        tracing::info!(disk = info.disk, point = info.point, uri = info.uri, writable, "mounted");
        self.lock().push(Mount { info: info.clone(), server, scratch });
        Ok(info)
    }

    /// Ends a mount.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn unmount(&self, id: &str) -> anyhow::Result<MountInfo> {
        let mount = {
            let mut mounts = self.lock();
            let at = mounts.iter().position(|mount| mount.info.id == id);
            at.map(|at| mounts.remove(at))
        };
        let mount =
            mount.with_context(|| format!("nothing is mounted as {id}; `points` lists the mounts"))?;
        mount.end().await
    }

    /// Ends all mounts: the daemon stops.
    pub async fn stop(&self) {
        let mounts = std::mem::take(&mut *self.lock());
        for mount in mounts {
            if let Err(error) = mount.end().await {
                tracing::warn!(%error, "a mount could not be ended in order");
            }
        }
    }
}

impl Mount {
    async fn end(self) -> anyhow::Result<MountInfo> {
        self.server.stop().await;
        if let Some(scratch) = self.scratch {
            std::fs::remove_file(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
        }
        tracing::info!(disk = self.info.disk, point = self.info.point, "unmounted");
        Ok(self.info)
    }
}

/// The scratch file once more: several handles of one mount share it, so it is not locked.
fn open_scratch(path: &Path) -> Result<Box<dyn BlockFile>, BlockError> {
    io::open(path, &io::OpenOptions { exclusive: false, ..io::OpenOptions::writing() })
}

struct Prepared {
    export: Arc<dyn Export>,
    at: At,
    id: String,
    scratch: Option<PathBuf>,
}

fn prepare(
    registry: &Registry,
    folder: &Path,
    disk: DiskId,
    point: &str,
    writable: bool,
) -> anyhow::Result<Prepared> {
    let at = find(registry, disk, point)?;
    let (inputs, sectors) =
        registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
    let size_bytes = sectors * reprotect_engine::units::SECTOR_BYTES;
    let view = Arc::new(on_disk(&inputs, move |store| store.view(at))?);
    let mut random = [0_u8; 4];
    getrandom::fill(&mut random).map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let id = format!("{:08x}", u32::from_le_bytes(random));
    let name = format!("{disk} at {}.{}", at.epoch, at.number);
    let base =
        move || ViewFile { inputs: inputs.clone(), view: Arc::clone(&view), name: name.clone(), size_bytes };
    if !writable {
        let open = move || Ok(Box::new(base()) as Box<dyn BlockFile>);
        return Ok(Prepared {
            export: Arc::new(ExportBy::new("", size_bytes, false, open)),
            at,
            id,
            scratch: None,
        });
    }
    let path = folder.join(format!("{id}.scratch"));
    fs_opener().create(&path, size_bytes)?;
    let overlay = OverlayState::new(&path.display().to_string(), size_bytes, open_scratch(&path)?)?;
    let scratch = path.clone();
    let open = move || {
        let file = Overlay::new(&overlay, Box::new(base()), open_scratch(&scratch)?)?;
        Ok(Box::new(file) as Box<dyn BlockFile>)
    };
    let export = Arc::new(ExportBy::new("", size_bytes, true, open));
    Ok(Prepared { export, at, id, scratch: Some(path) })
}
