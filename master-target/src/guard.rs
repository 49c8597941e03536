//! Notices that somebody else wrote to a target, moved it or put another file in its place.
//!
//! Locks keep honest writers out; this catches the others (a virtual machine powered on from another host, a storage
//! migration, a copy over the file) before our next write would mix with theirs. Between a flush and our next write
//! nothing of ours changes the files, so any change then is somebody else's.
//!
//! Invariants: two system calls per file and flush, none per write; times are trusted only on local file systems,
//! where they do not change behind our writes. Devices are held exclusively and not watched. Used by `disk_writer`.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use reprotect_engine::store::files::Files;
use reprotect_engine::store::target::TargetKind;
use reprotect_engine::store::vmdk::open::check_vmdk;

/// Files watched per disk; a disk split into more is recognised by its first ones.
const FILES_MAX: usize = 16;

/// What a file looked like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds of the last change of content; zero where times are not trusted.
    modified: (i64, i64),
}

#[derive(Clone, Debug)]
struct Watched {
    path: PathBuf,
    times: bool,
    seen: Option<Stamp>,
}

/// The watch over one target.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    files: Vec<Watched>,
}

impl Guard {
    /// Watches the files of an open target from now on.
    #[must_use]
    pub fn new(opener: &dyn Files, path: &Path, kind: TargetKind) -> Self {
        let paths = if kind == TargetKind::Device { Vec::new() } else { target_files(opener, path) };
        let watched = |path: PathBuf| Watched { times: has_true_times(&path), path, seen: None };
        let mut guard = Self { files: paths.into_iter().take(FILES_MAX).map(watched).collect() };
        guard.flushed();
        guard
    }

    /// Everything of ours is on the medium: remembers how the files look.
    pub fn flushed(&mut self) {
        for file in &mut self.files {
            file.seen = stamp(file);
        }
    }

    /// How the files look, to be compared later; empty where nothing can be said of them.
    #[must_use]
    pub fn text(&self) -> String {
        let one = |file: &Watched| {
            let seen = file.seen.filter(|_| file.times)?;
            let Stamp { device, inode, bytes, modified: (seconds, nanos) } = seen;
            Some(format!("{}:{device}:{inode}:{bytes}:{seconds}.{nanos:09}", file.path.display()))
        };
        let all: Option<Vec<String>> = self.files.iter().map(one).collect();
        all.unwrap_or_default().join("\n")
    }

    /// Before the first write after [`Self::flushed`].
    ///
    /// # Errors
    /// Which file was changed how, and what to do.
    pub fn check(&self) -> Result<(), String> {
        self.files.iter().try_for_each(check_file)
    }
}

/// The descriptor and the extents of a VMDK, the descriptor first; what cannot be read is left out.
#[must_use]
pub fn target_files(opener: &dyn Files, path: &Path) -> Vec<PathBuf> {
    let mut paths = vec![path.to_owned()];
    if let Ok(checked) = check_vmdk(opener, path) {
        let extents = checked.descriptor.extents().iter().filter_map(|extent| extent.file.as_ref());
        paths.extend(extents.map(|name| path.with_file_name(name)));
        paths.dedup();
    }
    paths
}

fn check_file(file: &Watched) -> Result<(), String> {
    let Some(seen) = file.seen else { return Ok(()) };
    let path = file.path.display();
    let remedy = "make sure that its virtual machine is off and nothing else uses it, restart the master target, then ask for a resync of the disk";
    match stamp(file) {
        Some(now) if now == seen => Ok(()),
        None => Err(format!("{path} is gone (moved or deleted by somebody else); {remedy}")),
        Some(now) if (now.device, now.inode) != (seen.device, seen.inode) => {
            Err(format!("{path} is another file than before (moved or replaced by somebody else); {remedy}"))
        }
        Some(_) => Err(format!("{path} was written by somebody else; {remedy}")),
    }
}

fn stamp(file: &Watched) -> Option<Stamp> {
    let meta = fs::metadata(&file.path).ok()?;
    let modified = if file.times { (meta.mtime(), meta.mtime_nsec()) } else { (0, 0) };
    Some(Stamp { device: meta.dev(), inode: meta.ino(), bytes: meta.len(), modified })
}

/// Whether a file system changes times only while a write runs: network and user-space ones may do so later.
fn has_true_times(path: &Path) -> bool {
    const EXT: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::statfs(path).is_ok_and(|facts| [EXT, XFS, BTRFS, TMPFS].contains(&(facts.f_type as u64)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn guard(path: &Path) -> Guard {
        let watched = Watched { path: path.to_owned(), times: has_true_times(path), seen: None };
        let mut guard = Guard { files: vec![watched] };
        guard.flushed();
        guard
    }

    #[test]
    fn writes_moves_and_replacements_by_others_are_told_apart_and_our_own_are_fine() {
        let dir = tempfile::tempdir().expect("directory");
        let (path, other) = (dir.path().join("a.vmdk"), dir.path().join("b.vmdk"));
        fs::write(&path, [0; 4096]).expect("write");
        let mut watch = guard(&path);
        assert_eq!(watch.check(), Ok(()));

        let file = fs::File::options().write(true).open(&path).expect("open");
        file.write_at(&[1], 0).expect("write");
        watch.flushed();
        assert_eq!(watch.check(), Ok(()), "our own write, then a flush");

        file.set_len(8192).expect("lengthen");
        assert!(watch.check().is_err_and(|why| why.contains("was written by somebody else")));
        watch.flushed();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        file.set_modified(later).expect("time");
        let noticed = watch.check();
        assert_eq!(noticed.is_err(), has_true_times(&path), "{noticed:?}");

        fs::write(&other, [0; 8192]).expect("write");
        fs::rename(&other, &path).expect("replace");
        assert!(watch.check().is_err_and(|why| why.contains("another file")));
        fs::remove_file(&path).expect("remove");
        assert!(watch.check().is_err_and(|why| why.contains("gone")));
    }
}
