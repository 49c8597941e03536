//! Points served over NBD while replication goes on.
//!
//! A mount reads on the disk's own thread, between two windows, so the target never changes under a read. A writable one
//! writes into a scratch file that is deleted with it.
//!
//! Invariants: a mount changes nothing; its point is held, so that it is neither merged away nor forgotten; at most
//! `MOUNTS_MAX` at a time; no mount outlives its daemon, so what a killed one left in the folder goes with the next start,
//! and nothing else there does. Units: bytes. Called by `admin`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, anyhow, bail};
use reprotect_engine::io;
use reprotect_engine::io::durable::create_dir_durable;
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::net::nbd::listen::Address;
use reprotect_engine::net::nbd::tls::{TlsConfig, server_config};
use reprotect_engine::net::nbd::{Export, ExportBy, Server, Settings};
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::overlay::{Overlay, OverlayState};
use reprotect_engine::units::DiskId;

use crate::api::MountInfo;
use crate::config::MountsConfig;
use crate::disk_worker::DiskInputs;
use crate::points::{NO_JOURNAL, look_at_disk};
use crate::registry::{Registry, fs_opener};
use crate::retention::Hold;

/// Mounts at a time.
const MOUNTS_MAX: usize = 32;

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
            let bytes = look_at_disk(&self.inputs, move |store| {
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
        look_at_disk(&self.inputs, move |store| store.view_allocated(&view, range))
            .map_err(|error| self.error(BlockOp::Map, range.start, range.len(), error.to_string()))
    }
}

const READ_ONLY: &str = "a point is not written to; mount it with --writable for a throw-away copy";

struct Mount {
    info: MountInfo,
    server: Server,
    _hold: Hold,
    scratch: Option<Scratch>,
}

/// The file that takes what is written to a mount; it goes with it.
struct Scratch(PathBuf);

impl Scratch {
    /// Removes it, and says what hinders that.
    fn remove(self) -> anyhow::Result<()> {
        let path = std::mem::take(&mut std::mem::ManuallyDrop::new(self).0);
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

impl Drop for Scratch {
    /// Whatever kept the mount from being made, its file would be of no use to anybody.
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            let path = self.0.display();
            tracing::warn!(%path, %error, "what was written to a mount could not be removed; the next start tries again");
        }
    }
}

/// What is mounted, and where it is served.
#[derive(Default)]
pub struct Mounts {
    mounted: Mutex<Vec<Mount>>,
    listen: Option<IpAddr>,
    tls: Option<Arc<TlsConfig>>,
}

impl std::fmt::Debug for Mounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounts").finish_non_exhaustive()
    }
}

impl Mounts {
    /// Nothing is mounted yet; what mounts of a daemon that was killed left in `folder` is removed. The caller is the only
    /// daemon of the state directory.
    ///
    /// # Errors
    /// When the certificates for clients cannot be used.
    pub fn new(config: &MountsConfig, folder: &Path) -> anyhow::Result<Self> {
        remove_left(folder);
        let tls = config.tls_dir.as_deref().map(server_config).transpose()?;
        Ok(Self { mounted: Mutex::default(), listen: config.listen, tls })
    }

    /// Where a mount is served, and how clients write that once its port is known.
    fn address(&self, folder: &Path, id: &str) -> Address {
        match self.listen {
            Some(ip) => Address::Tcp(SocketAddr::from((ip, 0))),
            None => Address::Unix(folder.join(format!("{id}.{SOCKET}"))),
        }
    }

    fn uri(&self, address: &Address) -> String {
        let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
        match address {
            Address::Unix(socket) => format!("{scheme}+unix:///?socket={}", socket.display()),
            Address::Tcp(address) => format!("{scheme}://{address}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mount>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
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
        (disk, at): (DiskId, At),
        writable: bool,
    ) -> anyhow::Result<MountInfo> {
        if self.lock().len() >= MOUNTS_MAX {
            bail!("{MOUNTS_MAX} points are mounted; `unmount` one first");
        }
        let (prepared, folder) = {
            let (registry, folder) = (Arc::clone(registry), folder.to_owned());
            let work = move || {
                create_dir_durable(&folder)?;
                let prepared = prepare(&registry, &folder, (disk, at), writable)?;
                anyhow::Ok((prepared, folder))
            };
            tokio::task::spawn_blocking(work).await??
        };
        let Prepared { export, id, scratch, hold } = prepared;
        let settings = Settings { tls: self.tls.clone(), ..Settings::default() };
        let server = Server::start(&self.address(&folder, &id), vec![export], settings).await?;
        let info = MountInfo {
            id,
            disk: disk.to_string(),
            point: at.to_string(),
            writable,
            uri: self.uri(server.address()),
        };
        tracing::info!(disk = info.disk, point = info.point, uri = info.uri, writable, "mounted");
        self.lock().push(Mount { info: info.clone(), server, _hold: hold, scratch });
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

    /// Ends all mounts, beside one another: the daemon stops, and a client that does not read its answers is waited for.
    pub async fn stop(&self) {
        let mounts = std::mem::take(&mut *self.lock());
        let mut ending: tokio::task::JoinSet<_> = mounts.into_iter().map(Mount::end).collect();
        while let Some(ended) = ending.join_next().await {
            match ended {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "a mount could not be ended in order"),
                Err(error) => tracing::warn!(%error, "a mount could not be ended in order"),
            }
        }
    }
}

impl Mount {
    async fn end(self) -> anyhow::Result<MountInfo> {
        self.server.stop().await;
        if let Some(scratch) = self.scratch {
            scratch.remove()?;
        }
        tracing::info!(disk = self.info.disk, point = self.info.point, "unmounted");
        Ok(self.info)
    }
}

/// Endings of what a mount puts into the folder, behind its name of eight hexadecimal digits.
const SCRATCH: &str = "scratch";
const SOCKET: &str = "sock";

/// Removes what mounts of a daemon that was killed left behind: a scratch file may be as large as what was written to it. What
/// hinders that hinders no start.
fn remove_left(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(is_of_mount) {
            continue;
        }
        let path = entry.path();
        match std::fs::remove_file(&path) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "removed what a mount left when the daemon was killed")
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "what a mount left could not be removed; remove it");
            }
        }
    }
}

/// Whether a mount gives such a name.
fn is_of_mount(name: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.split_once('.').is_some_and(|(id, ending)| {
        id.len() == 8 && id.bytes().all(is_digit) && [SCRATCH, SOCKET].contains(&ending)
    })
}

/// The scratch file once more: several handles of one mount share it, so it is not locked.
fn open_scratch(path: &Path) -> Result<Box<dyn BlockFile>, BlockError> {
    io::open(path, &io::OpenOptions { exclusive: false, ..io::OpenOptions::writing() })
}

struct Prepared {
    export: Arc<dyn Export>,
    id: String,
    scratch: Option<Scratch>,
    hold: Hold,
}

fn prepare(
    registry: &Registry,
    folder: &Path,
    (disk, at): (DiskId, At),
    writable: bool,
) -> anyhow::Result<Prepared> {
    let retention = registry.retention().context(NO_JOURNAL)?;
    let hold = retention.hold(disk, at);
    let (inputs, _) = registry.disk_inputs(disk).context("the disk could not be opened; see `status`")?;
    let view = Arc::new(retention.view(disk, at)?);
    let size_bytes = view.size_bytes();
    let mut random = [0_u8; 4];
    getrandom::fill(&mut random).map_err(|error| anyhow!("the system has no randomness: {error}"))?;
    let id = format!("{:08x}", u32::from_le_bytes(random));
    let name = format!("{disk} at {at}");
    let base =
        move || ViewFile { inputs: inputs.clone(), view: Arc::clone(&view), name: name.clone(), size_bytes };
    if !writable {
        let open = move || Ok(Box::new(base()) as Box<dyn BlockFile>);
        return Ok(Prepared {
            export: Arc::new(ExportBy::new("", size_bytes, false, open)),
            id,
            scratch: None,
            hold,
        });
    }
    let path = folder.join(format!("{id}.{SCRATCH}"));
    fs_opener().create(&path, size_bytes)?;
    let made = Scratch(path.clone());
    let overlay = OverlayState::new(&path.display().to_string(), size_bytes, open_scratch(&path)?)?;
    let open = move || {
        let file = Overlay::new(&overlay, Box::new(base()), open_scratch(&path)?)?;
        Ok(Box::new(file) as Box<dyn BlockFile>)
    };
    let export = Arc::new(ExportBy::new("", size_bytes, true, open));
    Ok(Prepared { export, id, scratch: Some(made), hold })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_removes_what_mounts_of_a_killed_daemon_left_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("mounts");
        let new = || Mounts::new(&MountsConfig::default(), &folder).unwrap();
        new(); // nothing was ever mounted
        std::fs::create_dir(&folder).unwrap();
        let put = |name: &str| std::fs::write(folder.join(name), b"x").unwrap();
        let left = ["0a1b2c3d.scratch", "0a1b2c3d.sock", "ffffffff.scratch"];
        let others =
            ["0a1b2c3d.vmdk", "0a1b2c3.sock", "0A1B2C3D.scratch", "web1.scratch", "0a1b2c3d.scratch.old"];
        left.into_iter().chain(others).for_each(put);
        std::fs::create_dir(folder.join("11111111.scratch")).unwrap();
        new();
        let mut stays: Vec<String> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        stays.sort_unstable();
        let mut expected = [&others[..], &["11111111.scratch"]].concat();
        expected.sort_unstable();
        assert_eq!(stays, expected, "a folder of such a name is not ours either");
    }

    #[test]
    fn a_mount_that_could_not_be_made_keeps_no_scratch_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0a1b2c3d.scratch");
        for by_hand in [false, true] {
            std::fs::write(&path, b"x").unwrap();
            let scratch = Scratch(path.clone());
            if by_hand {
                scratch.remove().unwrap();
            } else {
                drop(scratch);
            }
            assert!(!path.exists());
        }
    }
}
