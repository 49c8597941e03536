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
        let (image, point) = (dir.join(format!("{name}.img")), dir.join(name));
        std::fs::create_dir(&point).unwrap();
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
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
async fn a_check_beside_a_running_daemon_says_how_far_the_drive_reaches() {
    let dir = daemon::dir();
    let retention = dir.path().join("retention");
    std::fs::create_dir(&retention).unwrap();
    daemon::configure(
        dir.path(),
        &format!("[retention]\npath = {retention:?}\nsegment_bytes = \"32 MiB\"\n"),
    );
    let running = daemon::start(dir.path()).await;
    let (state, folder) = (dir.path().to_owned(), retention.clone());
    let checked = tokio::task::spawn_blocking(move || program(&state, &folder, &["check", "--json"]));
    let check = check_of(&checked.await.unwrap(), "retention-reach");
    assert_eq!(check["verdict"], "PASS", "{check}");
    assert!(check["reason"].as_str().unwrap().contains("cannot be told yet"), "nothing was written: {check}");
    running.stop().await;
}
