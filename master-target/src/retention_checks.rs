//! Is the retention drive fit for a journal? Part of `check`, and of what must hold before a start.
//!
//! Invariants: as for `checks`; the folder is not changed but for a trial file. Units: bytes. Called by `checks`.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use reprotect_engine::host::output::bytes;
use reprotect_engine::host::preflight::{Finding, Verdict};
use reprotect_engine::store::journal::ladder::Pressure;
use reprotect_engine::store::journal::{JournalError, Occupant, examine, occupant};

use crate::catalogue::Catalogue;
use crate::checks::{Medium, medium, nearest, try_writing};
use crate::config::Settings;
use crate::housekeeping::Room;
use crate::registry::fs_opener;
use crate::retention::RetentionSettings;

/// What must hold before the daemon starts.
#[must_use]
pub(crate) fn preflight(settings: &Settings) -> Vec<Finding> {
    let Some((folder, chosen)) = &settings.retention else {
        return vec![Finding::warn(
            "retention",
            "no retention folder is configured: disks can be had at their newest state only",
            "set `retention.path` to a folder on a drive of its own",
        )];
    };
    let mut checks = vec![file_system(folder)];
    checks.extend(inside(settings, folder));
    // What follows would only say the same again.
    if checks.iter().all(Finding::is_fine) {
        checks.push(content(folder));
        checks.push(capacity(folder, chosen));
    }
    checks
}

/// Also whether it shares its drive with something that it should not share it with.
#[must_use]
pub(crate) fn everything(settings: &Settings) -> Vec<Finding> {
    let mut checks = Vec::new();
    if let Some((folder, _)) = &settings.retention {
        checks.push(neighbours(settings, folder));
    }
    checks
}

fn file_system(folder: &Path) -> Finding {
    let name = "retention-folder";
    let (shown, nearest) = (folder.display(), nearest(folder));
    if folder.exists() && !folder.is_dir() {
        return Finding::fail(
            name,
            format!("{shown} is no directory"),
            "move it away, or name another folder",
        );
    }
    let writable = try_writing(&nearest);
    if let Err(error) = writable {
        if error.kind() == std::io::ErrorKind::StorageFull && has_journal(folder) {
            let reason = format!("{shown} is on a drive that has not a byte left");
            return Finding::warn(name, reason, "free some space on the drive, or add some");
        }
        let remedy = match error.kind() {
            std::io::ErrorKind::ReadOnlyFilesystem => {
                "mount the drive read/write, and look in the kernel log why it is not"
            }
            std::io::ErrorKind::StorageFull => "free some space on the drive, or add some",
            _ => "correct its owner and mode, or name another folder with `retention.path`",
        };
        return Finding::fail(name, format!("{} cannot be written: {error}", nearest.display()), remedy);
    }
    match medium(&nearest) {
        Medium::Fat => {
            let reason = format!("{shown} is on a FAT file system: no files above 4 GiB, no crash safety");
            Finding::fail(name, reason, "format the drive with ext4 or XFS")
        }
        Medium::Network => {
            let reason = format!("{shown} is on a network file system: every change waits for it");
            Finding::warn(name, reason, "put it on a local drive")
        }
        Medium::Memory => {
            let reason = format!("{shown} is in memory and lost with a restart");
            Finding::warn(name, reason, "fine for a trial; otherwise put it on a drive of its own")
        }
        Medium::Good if folder.is_dir() => Finding::pass(name, format!("{shown} is writable")),
        Medium::Good => Finding::pass(name, format!("{shown} does not exist yet and can be created")),
    }
}

/// A journal, or nothing.
fn content(folder: &Path) -> Finding {
    let name = "retention-content";
    if !folder.exists() {
        return Finding::pass(name, "there is nothing yet; the first start makes a journal");
    }
    match examined(folder) {
        Ok(Occupant::Journal) => Finding::pass(name, "it holds a journal"),
        Ok(Occupant::Nothing) => Finding::pass(name, "it is empty; the first start makes a journal"),
        Ok(Occupant::Foreign(found)) => Finding::fail(
            name,
            format!("{} holds no journal and is not empty ({found})", folder.display()),
            "name an empty folder, or the one with the journal",
        ),
        Err(error @ JournalError::Files(_)) => {
            Finding::fail(name, error.to_string(), "correct its owner and mode, and put back what is missing")
        }
        Err(error) => Finding::fail(name, error.to_string(), "no start is possible before"),
    }
}

/// A daemon that has it open may be changing it between two reads.
fn examined(folder: &Path) -> Result<Occupant, JournalError> {
    let files = fs_opener();
    let found = examine(&files, folder);
    (0..2).fold(found, |found, _| found.or_else(|_| examine(&files, folder)))
}

fn capacity(folder: &Path, chosen: &RetentionSettings) -> Finding {
    let name = "retention-space";
    let Some(room) = Room::of(folder) else {
        return Finding::warn(name, "the system does not say how large the drive is", "look at it with `df`");
    };
    let held = room.total_bytes - room.free_bytes;
    let shown = format!("{} are free beside {} of the journal", bytes(room.free_bytes), bytes(held));
    let pressure = room.pressure(chosen.reserve_bytes);
    // One segment is written, one is kept back, one is made ahead.
    let least = 3 * chosen.segment_bytes;
    let is_made = has_journal(folder);
    if pressure == Pressure::Stop || (room.free_bytes < least && !is_made) {
        // What a journal holds can be mounted and failed back only by a daemon that runs, and expires only under one.
        let verdict = if is_made { Verdict::Warn } else { Verdict::Fail };
        let reason = format!("{shown}: not enough to take anything in");
        return Finding::new(verdict, name, reason, "free some space, add some, or shorten the retention");
    }
    if pressure > Pressure::None {
        return Finding::warn(
            name,
            format!("{shown}: {}", pressure.text()),
            "add space, or shorten the retention",
        );
    }
    Finding::pass(name, shown)
}

fn has_journal(folder: &Path) -> bool {
    matches!(occupant(&*fs_opener(), folder), Ok(Occupant::Journal))
}

const DRIVE: &str = "retention-drive";

fn targets(settings: &Settings) -> Vec<PathBuf> {
    let dir = &settings.places.state_dir;
    // Whoever has no state directory yet has no targets, and is not given one by a check.
    let disks = dir.is_dir().then(|| Catalogue::open(dir).and_then(|catalogue| catalogue.disks()));
    let disks = disks.and_then(Result::ok).unwrap_or_default();
    disks.into_iter().map(|(record, _)| record.path).collect()
}

/// What must not lie in the folder itself.
fn inside(settings: &Settings, folder: &Path) -> Option<Finding> {
    let targets = targets(settings);
    let path = targets.iter().chain(&settings.datastores).find(|path| path.starts_with(folder))?;
    Some(Finding::fail(
        DRIVE,
        format!("{} lies in the retention folder", path.display()),
        "keep targets and retention apart: name another folder with `retention.path`",
    ))
}

/// What else lies on the drive.
fn neighbours(settings: &Settings, folder: &Path) -> Finding {
    let (name, targets) = (DRIVE, targets(settings));
    let own = device(folder);
    let places = targets.iter().map(|path| ("the target", path));
    let places = places.chain(settings.datastores.iter().map(|path| ("the datastore", path)));
    for (what, path) in places.chain([("the state directory", &settings.places.state_dir)]) {
        if own.is_some() && device(path) == own {
            return Finding::warn(
                name,
                format!("{what} {} is on the same drive", path.display()),
                "give the retention a drive of its own: a full or broken one then stops one thing, not both",
            );
        }
    }
    if own.is_some() && device(Path::new("/")) == own {
        let reason = "it is the drive the system is installed on";
        return Finding::warn(name, reason, "give the retention a drive of its own");
    }
    Finding::pass(name, "nothing else of ours lies on the drive")
}

/// The whole disk that a path lies on, or is, or is a part of; file systems without one by their number.
fn device(path: &Path) -> Option<PathBuf> {
    let about = std::fs::metadata(nearest_any(path)).ok()?;
    let number = if about.file_type().is_block_device() { about.rdev() } else { about.dev() };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let link = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let Ok(known) = std::fs::canonicalize(&link) else { return Some(link) };
    let is_part = known.join("partition").exists();
    Some(if is_part { known.parent().map_or(known.clone(), Path::to_owned) } else { known })
}

/// The path itself, or the nearest one above it that exists.
fn nearest_any(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use reprotect_engine::format::manifest::DiskAdded;
    use reprotect_engine::store::journal::ladder::Ladder;
    use reprotect_engine::store::journal::{Journal, JournalSettings};
    use reprotect_engine::units::{DiskId, Timestamp};

    use super::*;

    fn chosen(segment_bytes: u64) -> RetentionSettings {
        let hour = Duration::from_secs(3600);
        let ladder =
            Ladder { any_write: hour, every_epoch: hour, rungs: Vec::new(), keep: hour, guaranteed: hour };
        let scrub = crate::scrub::ScrubSettings { bytes_per_second: 0, pause: hour };
        RetentionSettings { undo_epoch: hour, ladder, segment_bytes, reserve_bytes: 0, scrub }
    }

    #[test]
    fn a_folder_with_something_else_in_it_is_refused_and_an_empty_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(content(&dir.path().join("none")).verdict, Verdict::Pass);
        std::fs::create_dir(dir.path().join("lost+found")).unwrap();
        assert_eq!(content(dir.path()).verdict, Verdict::Pass);
        std::fs::write(dir.path().join("holiday.jpg"), b"x").unwrap();
        let check = content(dir.path());
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.reason.contains("holiday.jpg"), "{}", check.reason);
    }

    #[test]
    fn a_journal_that_would_not_open_is_refused_with_what_the_start_would_say() {
        let dir = tempfile::tempdir().unwrap();
        let layout = JournalSettings { segment_bytes: 64 << 10 };
        let mut journal = Journal::create(fs_opener(), dir.path(), layout, Timestamp(1)).unwrap();
        let disk = DiskId([7; 16]);
        let added = DiskAdded { disk, machine: [1; 16], size_sectors: 2048, time: Timestamp(1) };
        journal.add_disk(added, Timestamp(1)).unwrap();
        drop(journal);
        assert_eq!(content(dir.path()).verdict, Verdict::Pass);
        let said = |what: &str, file: &str, bytes: Option<&[u8]>| {
            let path = dir.path().join(file);
            let whole = std::fs::read(&path).unwrap();
            match bytes {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let check = content(dir.path());
            assert_eq!(check.verdict, Verdict::Fail, "{what}");
            assert!(check.reason.contains(file), "{what}: {}", check.reason);
            std::fs::write(&path, whole).unwrap();
            assert_eq!(content(dir.path()).verdict, Verdict::Pass, "{what}: put back");
        };
        for bytes in [None, Some(&b""[..]), Some(&[0; 8192]), Some(&b"x"[..])] {
            said("the superblock", "superblock", bytes);
        }
        for bytes in [None, Some(&b""[..]), Some(&[0xff; 8192])] {
            said("the manifest", "manifest-00000001", bytes);
        }
    }

    #[test]
    fn a_device_is_on_the_drive_that_its_file_systems_are_on() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        // Wherever a block device is mounted here: what lies there is on that device.
        let mounted = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ');
            let (device, folder) = (Path::new(words.next()?), Path::new(words.next()?));
            let is_block = std::fs::metadata(device).is_ok_and(|about| about.file_type().is_block_device());
            (is_block && folder.is_dir()).then_some((device, folder))
        });
        for (of, folder) in mounted {
            assert_eq!(device(of), device(folder), "{}", of.display());
        }
        assert_eq!(device(&dir.path().join("not/there/yet")), device(dir.path()));
        assert_ne!(device(Path::new("/proc")), device(dir.path()));
    }

    #[test]
    fn a_drive_that_holds_not_even_the_first_segments_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(capacity(dir.path(), &chosen(1 << 50)).verdict, Verdict::Fail);
        let file = dir.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        assert_eq!(file_system(&file).verdict, Verdict::Fail);
    }
}
