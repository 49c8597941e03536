//! A journal on real file systems: a small one that fills up, a read-only one, and two programs at once.
//!
//! Loop devices and mounts need root; where they cannot be had, the test says `SKIPPED` on standard error. Called by
//! `cargo test`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod journal_lab;
#[path = "journal_lab/place.rs"]
mod place;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use journal_lab::id;
use place::{Place, noise};
use reprotect_engine::error::{Answer as _, Severity};
use reprotect_engine::format::manifest::{Edit, EpochsExpired};
use reprotect_engine::io::{OpenOptions, open};
use reprotect_engine::store::files::fs::FsFiles;
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::view::At;

const SECTORS: u64 = 512 * 8;

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// A small ext4 in a file, mounted; unmounted when dropped.
struct Ext4(tempfile::TempDir);

impl Ext4 {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (image, point) = (dir.path().join("image"), dir.path().join("mounted"));
        std::fs::create_dir(&point).unwrap();
        let (image, point) = (image.to_str()?, point.to_str()?);
        let made = run("truncate", &["-s", size, image])
            .and_then(|_| run("mkfs.ext4", &["-q", "-F", "-m", "0", image]))
            .and_then(|_| run("mount", &["-o", "loop", image, point]));
        match made {
            Ok(_) => Some(Self(dir)),
            Err(reason) => {
                eprintln!("SKIPPED: cannot mount an ext4 here: {reason}");
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = run("umount", &[self.path().to_str().unwrap()]);
    }
}

/// A journal in `folder` whose disk lies in `beside`.
fn place(folder: &Path, beside: &Path) -> Place {
    let target = beside.join("disk");
    if !target.exists() {
        std::fs::write(&target, noise(9, SECTORS as usize * 512)).unwrap();
    }
    Place {
        files: Arc::new(FsFiles::new(|path, writable| {
            open(path, &if writable { OpenOptions::writing() } else { OpenOptions::reading() })
        })),
        folder: folder.into(),
        targets: vec![target],
        size_sectors: SECTORS,
        segment_bytes: 1 << 20,
    }
}

#[test]
fn a_full_file_system_says_so_and_goes_on_when_the_oldest_epochs_expire() {
    let Some(drive) = Ext4::mount("24M") else { return };
    let beside = tempfile::tempdir().unwrap();
    let folder = drive.path().join("retention");
    std::fs::create_dir(&folder).unwrap();
    let place = place(&folder, beside.path());
    let mut lab = place.create().unwrap();
    let mut written = 0;
    let mut round = || -> Result<(), reprotect_engine::store::journal::JournalError> {
        for _ in 0..12 {
            lab.write(0, written * 211 % (SECTORS - 128), 128, written + 1)?;
            lab.commit()?;
            written += 1;
        }
        lab.apply(0)?;
        lab.epoch(0)
    };
    let error = (0..200).find_map(|_| round().err()).expect("a full drive says so");
    assert!(error.is_full(), "{error}");
    assert_eq!(error.severity(), Severity::Retry, "{error}");
    drop(lab);
    // Opened anew, everything is there. The oldest points go first, for what waits needs room for its before-images.
    let mut lab = place.open().unwrap();
    assert_eq!((lab.found.damage.len(), lab.holes[0].len()), (0, 0));
    let shape = lab.journal.shape().disks[&id(0)].clone();
    let closed: Vec<_> = shape.epochs.iter().filter_map(|epoch| epoch.closed).collect();
    let through = closed[closed.len() / 2].epoch;
    let expired = EpochsExpired { disk: id(0), through };
    lab.journal.edit(&[Edit::EpochsExpired(expired)], journal_lab::NOW).unwrap();
    for gone in shape.runs.iter().filter(|run| run.last <= through) {
        place.files.remove(&run_path(&lab.journal, id(0), gone.file)).unwrap();
    }
    let last = closed.last().unwrap();
    let kept = lab.view(0, At::entry(last.epoch, last.last)).unwrap();
    lab.apply(0).unwrap();
    lab.commit().unwrap();
    for segment in lab.journal.releasable() {
        lab.journal.release(segment, journal_lab::NOW).unwrap();
    }
    for seed in 0..6 {
        lab.write(0, seed * 300, 100, seed + 1000).unwrap();
        lab.commit().unwrap();
        lab.apply(0).unwrap();
    }
    lab.epoch(0).unwrap();
    assert!(lab.view(0, At::entry(last.epoch, last.last)).unwrap() == kept, "a point that is kept");
}

#[test]
fn a_read_only_drive_is_refused_by_name() {
    let Some(drive) = Ext4::mount("24M") else { return };
    let beside = tempfile::tempdir().unwrap();
    let folder = drive.path().join("retention");
    std::fs::create_dir(&folder).unwrap();
    let place = place(&folder, beside.path());
    let mut lab = place.create().unwrap();
    lab.write(0, 1, 8, 1).unwrap();
    lab.commit().unwrap();
    drop(lab.disks);
    lab.journal.close(journal_lab::NOW).unwrap();
    let remount = |how: &str| run("mount", &["-o", how, drive.path().to_str().unwrap()]).unwrap();
    remount("remount,ro");
    let error = place.open().err().unwrap();
    assert!(error.to_string().contains("superblock"), "{error}");
    assert!(error.to_string().to_lowercase().contains("read-only"), "{error}");
    assert_eq!(error.severity(), Severity::Stop);
    let other = Place { folder: drive.path().join("other"), ..place.clone() };
    assert!(other.create().is_err());
    remount("remount,rw");
    let mut lab = place.open().unwrap();
    assert!(lab.found.clean);
    lab.apply(0).unwrap();
}

/// Set for the second program: where the journal lies.
const SECOND: &str = "JOURNAL_MEDIA_SECOND";

#[test]
fn a_second_program_is_refused_and_harms_nothing() {
    if let Some(folder) = std::env::var_os(SECOND) {
        let folder = PathBuf::from(folder);
        let error = place(&folder, folder.parent().unwrap()).open().err().unwrap();
        println!("refused: {error}");
        return;
    }
    let beside = tempfile::tempdir().unwrap();
    let folder = beside.path().join("retention");
    std::fs::create_dir(&folder).unwrap();
    let place = place(&folder, beside.path());
    let mut lab = place.create().unwrap();
    lab.write(0, 1, 8, 1).unwrap();
    lab.commit().unwrap();
    let second = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_second_program_is_refused_and_harms_nothing", "--nocapture"])
        .env(SECOND, &folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stdout);
    assert!(second.status.success(), "{said}{}", String::from_utf8_lossy(&second.stderr));
    assert!(said.contains("superblock") && said.contains("in use"), "{said}");
    lab.write(0, 9, 8, 2).unwrap();
    lab.commit().unwrap();
    lab.apply(0).unwrap();
    drop(lab);
    let lab = place.open().unwrap();
    assert_eq!((lab.found.damage.len(), lab.journal.entries(id(0)).len()), (0, 2));
}
