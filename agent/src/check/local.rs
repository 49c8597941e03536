//! Checks of what this machine has: identity, disks, memory, limits, clock.
//!
//! Invariant: nothing is written, disks are opened for reading only. Called by [`super`].

use std::path::Path;

use reprotect_engine::host::output;
use reprotect_engine::host::preflight::{Finding, reason_and_remedy};
use reprotect_engine::io;
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::net::identity::Identity;
use reprotect_engine::net::wall_clock;

use crate::capture::{self, BlockDisk};
use crate::config::{CaptureMode, Settings};
use crate::daemon::load_identity;
use crate::disks::{Class, Disk, SourceKind, SystemRoot, enumerate};
use crate::plan;
use crate::sources::{self, KnownSource};

/// Open files the agent wants: its disks, io_uring rings, sockets, logs, name look-ups.
const OPEN_FILES_WANTED: u64 = 1024;
/// Below this the daemon cannot work at all.
const OPEN_FILES_MIN: u64 = 64;
/// Memory per disk below which one round trip's worth of data does not fit.
const MEMORY_PER_DISK_WANTED: u64 = 8 * CHUNK_BYTES;
const DAY_NANOS: u64 = 86_400_000_000_000;
/// The programs are younger than this: 2025-01-01, in nanoseconds since 1970.
const CLOCK_MIN: u64 = 1_735_689_600_000_000_000;

pub(super) fn configuration(settings: &Settings) -> Finding {
    let path = settings.config_path.display();
    if settings.config_path.exists() {
        Finding::pass("configuration", format!("{path} is valid"))
    } else {
        Finding::pass("configuration", format!("{path} does not exist, the defaults hold"))
    }
}

/// State directory, identity, certificate.
pub(super) fn identity(settings: &Settings) -> Vec<Finding> {
    let dir = &settings.places.state_dir;
    let mut findings = vec![state_dir(dir)];
    match load_identity(&settings.credentials) {
        Ok(identity) => {
            findings.push(Finding::pass("enrolled", identity.own().uri()));
            let enrolled = settings.credentials.renewed_in().is_some();
            findings.push(certificate(&identity, enrolled));
        }
        Err(error) => {
            findings.push(Finding::failed("enrolled", &format_args!("{error:#}")));
        }
    }
    findings
}

fn state_dir(dir: &Path) -> Finding {
    use rustix::fs::{Access, access};
    let shown = dir.display();
    let remedy = "correct owner, mode or mount, or name another with --state-dir; run as root";
    if !dir.exists() {
        return Finding::pass("state-dir", format!("{shown} does not exist yet and will be made"));
    }
    match access(dir, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Finding::pass("state-dir", format!("{shown} can be written")),
        Err(error) => Finding::fail("state-dir", format!("{shown} cannot be written: {error}"), remedy),
    }
}

fn certificate(identity: &Identity, enrolled: bool) -> Finding {
    const SITE: &str =
        "have the site's own PKI issue a new one, replace the file named under [pki] and restart the daemon";
    let (own, now) = (identity.own(), wall_clock());
    let days = own.not_after.0.saturating_sub(now.0) / DAY_NANOS;
    if own.not_before > now {
        return Finding::fail("certificate", "it is not valid yet", "correct this machine's clock");
    }
    if own.not_after <= now {
        let remedy =
            if enrolled { "enrol again with a new token, `reprotect-agent enroll TOKEN`" } else { SITE };
        return Finding::fail("certificate", "it has expired", remedy);
    }
    if identity.is_due_for_renewal(now) {
        let remedy = "start the daemon, which renews it at the master target, and see its log; behind a process server enrol again";
        let remedy = if enrolled { remedy } else { SITE };
        return Finding::warn("certificate", format!("it expires in {days} days"), remedy);
    }
    Finding::pass("certificate", format!("valid for {days} days"))
}

pub(super) fn clock(settings: &Settings) -> Finding {
    let now = wall_clock();
    let remedy = "set the clock and keep it by NTP (`timedatectl set-ntp true`); certificates and times of points need it";
    if now.0 < CLOCK_MIN {
        return Finding::fail("clock", "it stands before 2025", remedy);
    }
    let issued = load_identity(&settings.credentials).ok().map(|identity| identity.own().not_before);
    match issued {
        Some(issued) if issued > now => {
            Finding::fail("clock", "it stands before this machine's enrolment", remedy)
        }
        _ => Finding::pass("clock", format!("{} s since 1970, plausible", now.0 / 1_000_000_000)),
    }
}

/// Only a failure is a finding here; that peers answer is checked apart.
pub(super) fn upstream_named(settings: &Settings) -> Option<Finding> {
    let error = plan::upstream(settings).err()?;
    Some(Finding::failed("upstream", &format_args!("{error:#}")))
}

/// Selection and readability.
pub(super) fn disks(settings: &Settings) -> Vec<Finding> {
    let listed = match enumerate(&SystemRoot::default()) {
        Ok(listed) => listed,
        Err(error) => {
            return vec![Finding::failed("disks", &error)];
        }
    };
    let found = match sources::find(&settings.disks) {
        Ok(found) => found,
        Err(error) => {
            return vec![Finding::failed("disks", &error)];
        }
    };
    let mut findings: Vec<Finding> =
        found.problems.iter().map(|problem| Finding::failed("disks", problem)).collect();
    let selected: Vec<&KnownSource> = found.sources.values().filter(|known| known.selected).collect();
    if selected.is_empty() && findings.is_empty() {
        let remedy = "name disks or images as disks.include; `reprotect-agent disks --all` shows what there is and why it is left out";
        findings.push(Finding::fail("disks", "no disk is selected", remedy));
    }
    for known in selected {
        let disk = listed.iter().find(|disk| disk.path == known.source.path);
        findings.push(readable(known, disk));
        findings.extend(disk.and_then(sectors));
    }
    findings.extend(listed.iter().filter_map(unsupported));
    findings
}

fn readable(known: &KnownSource, disk: Option<&Disk>) -> Finding {
    let path = &known.source.path;
    let shown = path.display();
    let is_device = known.source.kind == SourceKind::BlockDevice;
    match io::open_reporting(path, &io::OpenOptions::reading()) {
        Err(error) => Finding::fail("disks", error.to_string(), "run as root, or exclude it in [disks]"),
        Ok((_, backend)) if is_device && !backend.is_direct() => Finding::fail(
            "disks",
            format!("{shown} can only be read through the page cache, which may hide changes"),
            "use a kernel and driver with O_DIRECT, or exclude it in [disks]",
        ),
        Ok((_, backend)) => {
            let mut text = format!("{shown}: {}, {backend}", output::bytes(known.source.bytes));
            let mounts = disk.map(|disk| disk.mounts.as_slice()).unwrap_or_default();
            let points: Vec<String> =
                mounts.iter().map(|mount| format!("{} ({})", mount.mount_point, mount.file_system)).collect();
            if !points.is_empty() {
                text = format!("{text}; mounted: {}", points.join(", "));
            }
            Finding::pass("disks", text)
        }
    }
}

/// A VMware disk has sectors of 512 bytes, and partition tables count in sectors.
fn sectors(disk: &Disk) -> Option<Finding> {
    (disk.logical_sector_bytes != 512).then(|| {
        Finding::warn(
            "unsupported",
            format!(
                "{} has sectors of {} bytes, a VMware disk has 512: its partition table will not be understood there",
                disk.path.display(),
                disk.logical_sector_bytes
            ),
            "move its data to a disk with 512-byte sectors, or use the replica as data only",
        )
    })
}

/// Disks with data that nothing protects, and why.
fn unsupported(disk: &Disk) -> Option<Finding> {
    let remedy = match disk.verdict.class {
        Class::TooLarge => "split the volume; it is left out",
        Class::SoftwareRaid | Class::DeviceMapper | Class::MultipathPath => return None,
        Class::ReadOnly if !disk.mounts.is_empty() => {
            "make it writable, or name it as disks.include to protect it all the same"
        }
        Class::Removable if !disk.mounts.is_empty() => "name it as disks.include if it is to be protected",
        _ => return None,
    };
    let text = format!("{} is not protected: {}", disk.path.display(), disk.verdict.reason);
    Some(Finding::warn("unsupported", text, remedy))
}

/// Whether the disks can be followed; otherwise they are scanned.
pub(super) fn capture(settings: &Settings) -> Finding {
    if settings.capture_mode == CaptureMode::Scan {
        return Finding::pass("capture", "`capture.mode` is scan: the disks are read whole in each round");
    }
    let sources = sources::find(&settings.disks).map(|found| found.sources).unwrap_or_default();
    let followed = |source: &&KnownSource| source.selected && source.source.kind == SourceKind::BlockDevice;
    let devices = sources.values().filter(followed);
    let refused = capture::check_machine()
        .err()
        .or_else(|| devices.filter_map(|known| BlockDisk::at(&known.source.path).err()).next());
    match refused {
        None => {
            Finding::pass("capture", format!("writes can be followed, in mode {}", settings.capture_mode))
        }
        Some(error) => {
            let (reason, remedy) = reason_and_remedy(&error.to_string());
            Finding::warn("capture", format!("disks are read whole in each round: {reason}"), remedy)
        }
    }
}

pub(super) fn io_uring() -> Finding {
    if io::uring_permitted() {
        return Finding::pass("io-uring", "permitted");
    }
    Finding::warn(
        "io-uring",
        "the kernel or a container forbids io_uring; threads read instead, which costs CPU",
        "set /proc/sys/kernel/io_uring_disabled to 0, or allow it in the container's seccomp profile",
    )
}

pub(super) fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let remedy = "set LimitNOFILE=65536 in the service, or `ulimit -n 65536`";
    match limit {
        Some(limit) if limit < OPEN_FILES_MIN => {
            Finding::fail("open-files", format!("only {limit} open files are allowed"), remedy)
        }
        Some(limit) if limit < OPEN_FILES_WANTED => {
            Finding::warn("open-files", format!("{limit} open files are allowed"), remedy)
        }
        Some(limit) => Finding::pass("open-files", format!("{limit} open files are allowed")),
        None => Finding::pass("open-files", "unlimited"),
    }
}

pub(super) fn memory(settings: &Settings) -> Finding {
    let disks = sources::find(&settings.disks).map_or(0, |found| found.selected());
    judge_memory(settings.memory_bytes, disks, total_memory_bytes())
}

fn judge_memory(budget: u64, disks: usize, total: Option<u64>) -> Finding {
    let shown = output::bytes(budget);
    match total {
        Some(total) if budget > total / 4 * 3 => Finding::fail(
            "memory",
            format!("`memory` is {shown} and the machine has {}", output::bytes(total)),
            "lower `memory` to at most three quarters of the machine's",
        ),
        Some(total) if budget > total / 2 => Finding::warn(
            "memory",
            format!("`memory` is {shown}, more than half of the machine's {}", output::bytes(total)),
            "lower `memory`, or give the machine more",
        ),
        _ if budget < disks as u64 * MEMORY_PER_DISK_WANTED => Finding::warn(
            "memory",
            format!("`memory` is {shown} for {disks} disks, which slows all of them down"),
            format!("raise `memory` to {}", output::bytes(disks as u64 * MEMORY_PER_DISK_WANTED)),
        ),
        _ => Finding::pass("memory", format!("{shown} for the payload of {disks} disks")),
    }
}

fn total_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn memory_is_judged_against_the_machine_and_the_disks() {
        let verdict =
            |budget: u64, disks, total: u64| judge_memory(budget << 20, disks, Some(total << 20)).verdict;
        assert_eq!(verdict(256, 1, 8192), Verdict::Pass);
        assert_eq!(verdict(256, 8, 8192), Verdict::Pass);
        assert_eq!(verdict(256, 9, 8192), Verdict::Warn);
        assert_eq!(verdict(600, 1, 1024), Verdict::Warn);
        assert_eq!(verdict(900, 1, 1024), Verdict::Fail);
        assert_eq!(judge_memory(64 << 20, 1, None).verdict, Verdict::Pass);
    }
}
