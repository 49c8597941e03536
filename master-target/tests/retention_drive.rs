//! Drives that are no place for a retention journal, on real file systems: `check` and `run` name what is wrong with them.
//!
//! Mounting needs root; without it the test says `SKIPPED` on standard error.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/daemon.rs"]
mod daemon;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// A small file system in a file, mounted until it is dropped.
struct Drive(PathBuf);

impl Drive {
    fn mount(dir: &Path, name: &str, make: &[&str], options: &str) -> Result<Self, String> {
        Self::mount_of(dir, name, make, options, 64 << 20)
    }

    fn mount_of(dir: &Path, name: &str, make: &[&str], options: &str, bytes: u64) -> Result<Self, String> {
        let (image, point) = (dir.join(format!("{name}.img")), dir.join(name));
        std::fs::create_dir(&point).unwrap();
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let image = image.to_str().unwrap();
        run(make[0], &[&make[1..], &[image]].concat())?;
        run("mount", &["-o", options, image, point.to_str().unwrap()])?;
        Ok(Self(point))
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        // What stays mounted would be seen by the next test; there is nothing else to do about it here.
        let _ = run("umount", &[self.0.to_str().unwrap_or_default()]);
    }
}

fn program(state_dir: &Path, retention: &Path, arguments: &[&str]) -> Output {
    program_with("", state_dir, retention, arguments)
}

fn program_with(more: &str, state_dir: &Path, retention: &Path, arguments: &[&str]) -> Output {
    let config = format!(
        "listen = \"127.0.0.1:0\"\n{more}[retention]\npath = \"{}\"\nsegment_bytes = \"32 MiB\"\n",
        retention.display()
    );
    std::fs::write(state_dir.join("master-target.toml"), config).unwrap();
    Command::new(env!("CARGO_BIN_EXE_reprotect-master-target"))
        .args(arguments)
        .args(["--state-dir", state_dir.to_str().unwrap()])
        .output()
        .unwrap()
}

/// The checks of a run, and what one of them says.
fn check_of(output: &Output, name: &str) -> serde_json::Value {
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    found["findings"].as_array().unwrap().iter().find(|check| check["name"] == name).expect(name).clone()
}

/// The check of a name that fails, in words.
fn failed(state_dir: &Path, retention: &Path, name: &str) -> String {
    let output = program(state_dir, retention, &["check", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    let check = check_of(&output, name);
    assert_eq!(check["verdict"], "FAIL", "{check}");
    assert!(!check["remedy"].as_str().unwrap().is_empty());
    let refused = program(state_dir, retention, &["run"]);
    assert_ne!(refused.status.code(), Some(0), "run goes on all the same");
    assert!(String::from_utf8_lossy(&refused.stderr).contains(name), "run does not name the check");
    check["reason"].as_str().unwrap().to_owned()
}

#[test]
fn fat_read_only_full_and_foreign_drives_are_named_and_the_daemon_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("holiday.jpg"), b"x").unwrap();
    assert!(failed(&state, &foreign, "retention-content").contains("holiday.jpg"));

    let drives = || {
        let small = Drive::mount(dir.path(), "small", &["mkfs.ext4", "-q", "-F", "-m", "0"], "loop")?;
        let frozen = Drive::mount(dir.path(), "frozen", &["mkfs.ext4", "-q", "-F"], "loop,ro")?;
        Ok::<_, String>((small, frozen))
    };
    let (small, frozen) = match drives() {
        Ok(drives) => drives,
        Err(reason) => {
            eprintln!(
                "SKIPPED: file systems cannot be mounted here, which needs root and loop devices: {reason}"
            );
            return;
        }
    };
    assert!(failed(&state, &small.0, "retention-space").contains("not enough"));
    assert!(failed(&state, &frozen.0, "retention-folder").to_lowercase().contains("read-only"));
    // Not every kernel knows FAT; that its number is known is tested beside the check.
    match Drive::mount(dir.path(), "fat", &["mkfs.vfat"], "loop") {
        Ok(fat) => assert!(failed(&state, &fat.0.join("retention"), "retention-folder").contains("FAT")),
        Err(reason) => eprintln!("not tried on a FAT file system: {reason}"),
    }
}

/// Starts `run` and waits until it answers; stops it again.
fn runs(state_dir: &Path) {
    let program = env!("CARGO_BIN_EXE_reprotect-master-target");
    let place = ["--state-dir", state_dir.to_str().unwrap()];
    let log = std::fs::File::create(state_dir.join("run.log")).unwrap();
    let mut running = Command::new(program)
        .arg("run")
        .args(place)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(state_dir.join("run.log")).unwrap();
    let answers = || Command::new(program).arg("status").args(place).output().unwrap().status.success();
    for _ in 0..600 {
        assert!(running.try_wait().unwrap().is_none(), "it does not start: {}", said());
        if answers() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(answers(), "it does not answer: {}", said());
    run("kill", &["-TERM", &running.id().to_string()]).unwrap();
    assert!(running.wait().unwrap().success(), "{}", said());
}

/// Only a daemon that runs can expire what is past its time, mount a point, or fail a disk back.
#[test]
fn a_daemon_starts_on_the_full_drive_of_its_journal_and_makes_none_on_such_a_drive() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let make = ["mkfs.ext4", "-q", "-F", "-m", "0"];
    let drive = match Drive::mount_of(dir.path(), "drive", &make, "loop", 192 << 20) {
        Ok(drive) => drive,
        Err(reason) => {
            eprintln!("SKIPPED: a file system cannot be mounted here, which needs root: {reason}");
            return;
        }
    };
    let journal = drive.0.join("journal");
    let _ = program(&state, &journal, &["check"]);
    runs(&state);
    assert!(journal.join("superblock").exists());
    // Others leave not one byte of the drive.
    let mut ballast = std::fs::File::create(drive.0.join("ballast")).unwrap();
    let piece = vec![1; 64 << 10];
    for bytes in [64 << 10, 1024, 1024, 1024] {
        while std::io::Write::write_all(&mut ballast, &piece[..bytes]).is_ok() {}
        ballast.sync_all().unwrap(); // what was kept back for metadata is free then
    }
    let output = program(&state, &journal, &["check", "--json"]);
    for name in ["retention-folder", "retention-space"] {
        assert_eq!(check_of(&output, name)["verdict"], "WARN", "{}", check_of(&output, name));
    }
    assert!(check_of(&output, "retention-space")["reason"].as_str().unwrap().contains("not enough"));
    runs(&state);
    // Some bytes are free, and no journal is there yet.
    drop(ballast);
    std::fs::File::options().write(true).open(drive.0.join("ballast")).unwrap().set_len(64 << 20).unwrap();
    let mut ballast = std::fs::File::options().append(true).open(drive.0.join("ballast")).unwrap();
    while reprotect_master_target::housekeeping::Room::of(&drive.0).unwrap().free_bytes > 2 << 20 {
        std::io::Write::write_all(&mut ballast, &piece).unwrap();
        ballast.sync_all().unwrap();
    }
    assert!(failed(&state, &drive.0.join("another"), "retention-space").contains("not enough"));
}

#[test]
fn a_drive_that_is_shared_with_something_of_ours_is_warned_of_and_targets_in_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (state, retention) = (dir.path().join("state"), dir.path().join("retention"));
    std::fs::create_dir(&state).unwrap();
    let check = check_of(&program(&state, &retention, &["check", "--json"]), "retention-drive");
    assert_eq!(check["verdict"], "WARN", "{check}");
    let reason = check["reason"].as_str().unwrap();
    assert!(reason.contains("the state directory") && reason.contains("same drive"), "{reason}");
    let datastores = format!("datastores = [{:?}]\n", retention.join("ds"));
    let check =
        check_of(&program_with(&datastores, &state, &retention, &["check", "--json"]), "retention-drive");
    assert_eq!(check["verdict"], "FAIL", "{check}");
    assert!(check["reason"].as_str().unwrap().contains("lies in the retention folder"), "{check}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_how_far_the_drive_reaches_beside_a_running_daemon_and_without_one() {
    let dir = daemon::dir();
    let retention = dir.path().join("retention");
    std::fs::create_dir(&retention).unwrap();
    daemon::configure(
        dir.path(),
        &format!("[retention]\npath = {retention:?}\nsegment_bytes = \"32 MiB\"\n"),
    );
    let running = daemon::start(dir.path()).await;
    let said = async || {
        let (state, folder) = (dir.path().to_owned(), retention.clone());
        let checked = tokio::task::spawn_blocking(move || program(&state, &folder, &["check", "--json"]));
        let check = check_of(&checked.await.unwrap(), "retention-reach");
        assert_eq!(check["verdict"], "PASS", "{check}");
        check["reason"].as_str().unwrap().to_owned()
    };
    let beside = said().await;
    assert!(beside.contains("there is no hour of history yet"), "{beside}");
    running.stop().await;
    assert_eq!(said().await, beside, "by what stands in the folder");
}
