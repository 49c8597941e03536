//! The checks behind `check` and before `run`: is this machine ready to be a master target?
//!
//! Invariants: each check has a stable name, says why, and what to do about it; FAIL is only what would lose data or
//! keep the daemon from working, everything doubtful is WARN. A trial file is written and removed; nothing else is
//! changed. Units: bytes. Called by `commands::check` (all of it) and `commands::run` (what must hold before a start).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reprotect_engine::host::output::bytes;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::{Finding, Verdict};
use reprotect_engine::host::run_lock::{RunLock, RunLockError};
use reprotect_engine::io::uring;
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::endpoint::both_free;
use reprotect_engine::net::identity::{IDENTITY_FILE, Identity};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::wall_clock;
use reprotect_engine::store::target::{Expectation, TargetKind, TargetSpec, open_target};

use crate::catalogue::{Catalogue, kind_from_text};
use crate::config::Settings;
use crate::device;
use crate::explain::{explain, reason_and_remedy};
use crate::registry::fs_opener;
use crate::retention_checks;

/// Open files a busy target wants: descriptor, extents, rings and sockets of dozens of disks.
const OPEN_FILES_WANTED: u64 = 4096;
/// Open files below which few disks can be opened at all.
const OPEN_FILES_MIN: u64 = 256;
/// Free space on a datastore below which a warning is due.
const FREE_BYTES_WANTED: u64 = 1 << 30;
/// No clock that is right shows a time before this one (2025-01-01), in seconds.
const EARLIEST_SECONDS: u64 = 1_735_689_600;

/// Every check, of a configuration that was read.
#[must_use]
pub fn everything(settings: &Settings) -> Vec<Finding> {
    let path = settings.config_path.display();
    let found = if settings.config_path.exists() { "valid" } else { "does not exist, the defaults hold" };
    let mut checks = vec![Finding::pass("configuration", format!("{path}: {found}"))];
    checks.extend(preflight(settings));
    checks.extend(settings.datastores.iter().map(|dir| datastore(dir)));
    if settings.datastores.is_empty() {
        let reason = "no datastores are configured: disks may be created in any directory";
        checks.push(Finding::pass("datastores", reason));
    }
    checks.extend(retention_checks::everything(settings));
    let running = is_running(settings);
    checks.push(port(settings, running));
    checks.extend(targets(settings, running));
    checks
}

/// What must hold before the daemon starts; the port it tries itself, and a datastore or target hinders no other.
#[must_use]
pub fn preflight(settings: &Settings) -> Vec<Finding> {
    let mut checks = vec![state_dir(&settings.places.state_dir)];
    checks.extend(match settings.credentials.renewed_in() {
        Some(dir) => identity(dir),
        None => own_pki(&settings.credentials),
    });
    checks.extend(retention_checks::preflight(settings));
    checks.push(open_files());
    checks.push(io_uring());
    checks.push(clock());
    checks
}

/// Whether the daemon of this state directory runs.
pub(crate) fn is_running(settings: &Settings) -> bool {
    let dir = &settings.places.state_dir;
    dir.join("run.lock").exists()
        && matches!(RunLock::acquire(Program::MasterTarget, dir), Err(RunLockError::Held { .. }))
}

/// What a directory's file system is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium {
    Good,
    Fat,
    Network,
    Memory,
}

pub(crate) fn medium(dir: &Path) -> Medium {
    let Ok(facts) = rustix::fs::statfs(dir) else { return Medium::Good };
    // The field is signed on some architectures and 32 bits wide on others.
    medium_of(facts.f_type as u64 & 0xffff_ffff)
}

/// By the number the kernel gives a kind of file system.
const fn medium_of(kind: u64) -> Medium {
    const MSDOS: u64 = 0x4d44;
    const EXFAT: u64 = 0x2011_bab0;
    const NFS: u64 = 0x6969;
    const SMB: u64 = 0xfe53_4d42;
    const CIFS: u64 = 0xff53_4d42;
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    match kind {
        MSDOS | EXFAT => Medium::Fat,
        NFS | SMB | CIFS => Medium::Network,
        TMPFS | RAMFS => Medium::Memory,
        _ => Medium::Good,
    }
}

/// Writes and removes a trial file.
pub(crate) fn try_writing(dir: &Path) -> std::io::Result<()> {
    let trial = dir.join(format!(".reprotect-check-{}", std::process::id()));
    let written = fs::File::options()
        .write(true)
        .create_new(true)
        .open(&trial)
        .and_then(|file| rustix::io::write(&file, b"trial").map_err(Into::into).and(file.sync_all()));
    let removed = fs::remove_file(&trial);
    written.and(removed)
}

/// The directory itself, or the nearest one above it that exists.
pub(crate) fn nearest(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn state_dir(dir: &Path) -> Finding {
    let name = "state-directory";
    let (shown, nearest) = (dir.display(), nearest(dir));
    if dir.exists() && !dir.is_dir() {
        return Finding::fail(
            name,
            format!("{shown} is no directory"),
            "move it away, or name another with --state-dir",
        );
    }
    match medium(&nearest) {
        Medium::Fat => {
            let reason = format!("{shown} is on a FAT file system, which keeps neither modes nor promises");
            return Finding::fail(name, reason, "put it on ext4 or XFS");
        }
        Medium::Network => {
            let reason = format!("{shown} is on a network file system");
            return Finding::warn(name, reason, "put it on a local one: locks and flushes are safer there");
        }
        Medium::Memory if dir.exists() => {
            let reason = format!("{shown} is in memory and lost with a restart");
            return Finding::warn(name, reason, "fine for a trial; otherwise put it on a disk");
        }
        Medium::Good | Medium::Memory => {}
    }
    match try_writing(&nearest) {
        Ok(()) if dir.exists() => Finding::pass(name, format!("{shown} is writable")),
        Ok(()) => Finding::pass(name, format!("{shown} does not exist yet and can be created")),
        Err(error) => Finding::fail(
            name,
            format!("{} cannot be written: {error}", nearest.display()),
            "correct its owner and mode, run as root, or name another with --state-dir",
        ),
    }
}

/// A certificate of the site's own PKI.
fn own_pki(credentials: &Credentials) -> Vec<Finding> {
    let trusted = credentials.trust(Arc::new(Revocations::in_memory())).map(drop);
    match credentials.identity().and_then(|identity| trusted.map(|()| identity)) {
        Ok(identity) if identity.is_due_for_renewal(wall_clock()) => vec![Finding::warn(
            "identity",
            "a third or less of the certificate's life is left",
            "have the site's PKI issue a new one, replace the file and restart the daemon",
        )],
        Ok(identity) => {
            vec![Finding::pass("identity", format!("{} of the site's own PKI", identity.own().uri()))]
        }
        Err(error) => {
            vec![Finding::fail(
                "identity",
                error.to_string(),
                "correct the files named under [pki] in the configuration",
            )]
        }
    }
}

fn identity(dir: &Path) -> Vec<Finding> {
    let (ca, own) = (dir.join("ca"), dir.join(IDENTITY_FILE));
    let name = "identity";
    if !ca.exists() && !own.exists() {
        return vec![Finding::pass(name, "there is none yet; the first start makes a certificate authority")];
    }
    let mut checks = vec![match Identity::load(dir) {
        Ok(_) if !ca.exists() => Finding::fail(
            name,
            format!("{} is missing while this target has a certificate of it", ca.display()),
            "restore the state directory from its backup: every enrolled daemon trusts that authority",
        ),
        Ok(identity) if identity.is_due_for_renewal(wall_clock()) => {
            Finding::warn(name, "the certificate is due for renewal", "a running daemon renews it by itself")
        }
        Ok(identity) => {
            Finding::pass(name, format!("{} of site {}", identity.own().peer, identity.own().site))
        }
        Err(error) if own.exists() => {
            Finding::fail(name, error.to_string(), "restore the state directory from its backup")
        }
        Err(_) => Finding::pass(
            name,
            "the certificate authority exists; the next start issues this target's certificate",
        ),
    }];
    let wide: Vec<String> = private_files(dir)
        .into_iter()
        .filter(|path| fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0))
        .map(|path| path.display().to_string())
        .collect();
    checks.push(if wide.is_empty() {
        Finding::pass("key-modes", "keys are readable by their owner only")
    } else {
        let reason = format!("readable by others: {}", wide.join(", "));
        Finding::fail("key-modes", reason, format!("run `chmod go= {}`", wide.join(" ")))
    });
    checks
}

/// What nobody else may read: keys and open invitations.
fn private_files(dir: &Path) -> Vec<PathBuf> {
    let listed =
        [dir.to_owned(), dir.join("ca")].into_iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
    listed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.is_file() && (name.contains("key") || name == "invitations")
        })
        .collect()
}

fn datastore(dir: &Path) -> Finding {
    let name = format!("datastore:{}", dir.display());
    let check = |verdict, reason: String, remedy: &str| Finding::new(verdict, &name, reason, remedy);
    if !dir.is_dir() {
        let remedy = "mount it or create the directory, or take it out of `datastores`";
        return check(Verdict::Fail, "there is no such directory".to_owned(), remedy);
    }
    if let Err(error) = try_writing(dir) {
        let remedy = "mount it read/write and let this user write there";
        return check(Verdict::Fail, format!("it cannot be written: {error}"), remedy);
    }
    let free = rustix::fs::statvfs(dir).map(|facts| facts.f_bavail.saturating_mul(facts.f_frsize));
    let free = free.unwrap_or(u64::MAX);
    match medium(dir) {
        Medium::Fat => {
            let reason = "it is a FAT file system: no files above 4 GiB, no crash safety".to_owned();
            check(Verdict::Fail, reason, "use ext4, XFS, NFS or VMFS storage")
        }
        Medium::Memory => check(
            Verdict::Warn,
            "it is in memory and lost with a restart".to_owned(),
            "fine for a trial only",
        ),
        _ if free < FREE_BYTES_WANTED => check(
            Verdict::Warn,
            format!("only {} are free", bytes(free)),
            "free some space or add a datastore",
        ),
        Medium::Network => {
            let reason = format!("a network file system, {} free", bytes(free));
            let remedy = "export it with `sync` and hard mounts: a write is as durable as its server says";
            check(Verdict::Warn, reason, remedy)
        }
        Medium::Good => check(Verdict::Pass, format!("writable, {} free", bytes(free)), ""),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let remedy = "raise it: LimitNOFILE=65536 in the service, or `ulimit -n`";
    let reason = format!("{limit} files may be open");
    match limit {
        0..OPEN_FILES_MIN => Finding::fail("open-files", reason, remedy),
        OPEN_FILES_MIN..OPEN_FILES_WANTED => Finding::warn("open-files", reason, remedy),
        _ => Finding::pass("open-files", reason),
    }
}

fn io_uring() -> Finding {
    match uring::probe() {
        Ok(()) => Finding::pass("io-uring", "permitted"),
        Err(error) => Finding::warn(
            "io-uring",
            format!("not to be had ({error}); slower threads are used"),
            "allow it (kernel.io_uring_disabled=0, the container's seccomp profile) if throughput matters",
        ),
    }
}

fn clock() -> Finding {
    let seconds = wall_clock().0 / 1_000_000_000;
    if seconds < EARLIEST_SECONDS {
        let reason = "the clock stands before 2025: certificates would not be believed";
        return Finding::fail("clock", reason, "set it, and keep it right with chrony or systemd-timesyncd");
    }
    Finding::pass("clock", "plausible")
}

fn port(settings: &Settings, running: bool) -> Finding {
    let listen = settings.listen;
    match both_free(listen) {
        Ok(()) => Finding::pass("port", format!("{listen} is free, UDP and TCP")),
        Err(error) if running && error.kind() == std::io::ErrorKind::AddrInUse => {
            Finding::pass("port", format!("{listen} is used by the running daemon"))
        }
        Err(error) => Finding::fail(
            "port",
            format!("{listen} cannot be had: {error}"),
            "stop what uses it (`ss -tulpn`), or choose another address with `listen`",
        ),
    }
}

/// Whether each known target could be opened, and whether two are one disk.
fn targets(settings: &Settings, running: bool) -> Vec<Finding> {
    if !settings.places.state_dir.join("disks").is_dir() {
        return vec![Finding::pass("targets", "nothing is protected yet")];
    }
    let found = Catalogue::open(&settings.places.state_dir).and_then(|catalogue| catalogue.disks());
    let disks = match found {
        Ok(disks) => disks,
        Err(error) => {
            let remedy = "correct its owner and mode, or restore it from a backup";
            return vec![Finding::fail("targets", explain(&error), remedy)];
        }
    };
    if running {
        let reason = format!("{} are open in the running daemon; `status` shows them", disks.len());
        return vec![Finding::pass("targets", reason)];
    }
    let mut checks = Vec::new();
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    for (record, state) in disks {
        let name = format!("target:{}", record.path.display());
        let kind = kind_from_text(&record.kind).unwrap_or(TargetKind::Device);
        let spec = TargetSpec { path: record.path.clone(), kind };
        // Locks are tried by `run`; opening for writing here would change a sparse target.
        let expect = Expectation { size_bytes: Some(record.size_bytes), ..Expectation::default() };
        let known = device::check(&record.path, record.device.as_deref());
        let opened = known.and_then(|()| Ok(open_target(&fs_opener(), &spec, &expect)?));
        checks.push(match (state, opened) {
            (Err(error), _) => {
                let remedy =
                    "`unprotect` the disk and protect it again: it is compared, only differences travel";
                Finding::fail(&name, format!("its state is damaged: {}", explain(&error)), remedy)
            }
            (_, Err(error)) => {
                let (reason, remedy) = reason_and_remedy(&error);
                Finding::fail(&name, reason, remedy)
            }
            (Ok(_), Ok(target)) => {
                let uuid = target.facts().uuid.map(|uuid| uuid.to_string());
                let clash = uuid.and_then(|uuid| owners.insert(uuid, name.clone()));
                match clash {
                    Some(other) => Finding::fail(
                        &name,
                        format!("it has the same ddb.uuid as {other}"),
                        "give one of them a new UUID, for instance with vmkfstools -J setuuid",
                    ),
                    None if !target.repair().is_nothing() => {
                        let remedy = "the next start puts it right; what was lost is compared again";
                        Finding::warn(
                            &name,
                            format!("it was not closed cleanly: {:?}", target.repair()),
                            remedy,
                        )
                    }
                    None => Finding::pass(&name, "can be opened"),
                }
            }
        });
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_by_their_numbers() {
        // vfat and exfat; NFS and CIFS; tmpfs; ext4, XFS and btrfs.
        let kinds = [0x4d44, 0x2011_bab0, 0x6969, 0xff53_4d42, 0x0102_1994, 0xef53, 0x5846_5342, 0x9123_683e];
        let Medium::Memory = medium(Path::new("/dev/shm")) else {
            panic!("/dev/shm is in memory");
        };
        use Medium::{Fat, Good, Memory, Network};
        assert_eq!(kinds.map(medium_of), [Fat, Fat, Network, Network, Memory, Good, Good, Good]);
    }
}
