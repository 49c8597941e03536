//! The command-line contract of `reprotect-master-target`, on the built binary.

use std::process::{Command, Output};

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reprotect-master-target"))
        .args(arguments)
        .output()
        .expect("the binary runs")
}

#[test]
fn every_command_has_help_and_unknown_options_exit_with_2() {
    for command in [
        "run",
        "check",
        "check-config",
        "invite",
        "revoke",
        "machines",
        "protect",
        "unprotect",
        "status",
        "inspect",
        "export",
        "verify",
        "journal",
    ] {
        let help = program(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(
            String::from_utf8_lossy(&help.stdout).contains("Usage: reprotect-master-target"),
            "{command}"
        );
        assert_eq!(program(&[command, "--no-such-option"]).status.code(), Some(2), "{command}");
    }
    assert_eq!(program(&[]).status.code(), Some(2));
}

#[test]
fn the_printed_default_passes_its_own_check_and_a_wrong_key_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master-target.toml");
    let printed = program(&["check-config", "--print-default"]);
    assert_eq!(printed.status.code(), Some(0));
    std::fs::write(&path, &printed.stdout).unwrap();
    let state_dir = dir.path().to_str().unwrap();
    let checked = program(&["check-config", "--json", "--state-dir", state_dir]);
    let json: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!((&json["valid"], &json["found"]), (&true.into(), &true.into()));
    std::fs::write(&path, "\nlisten_on = 1\n").unwrap();
    let refused = program(&["check-config", "--state-dir", state_dir]);
    assert_eq!(refused.status.code(), Some(2));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains(":2: `listen_on`: unknown key; did you mean `listen`?"), "{text}");
}

#[test]
fn check_says_how_far_the_retention_drive_reaches_or_that_there_is_no_hour_of_history_yet() {
    let dir = tempfile::tempdir().unwrap();
    let configured = format!("[retention]\npath = {:?}\n", dir.path().join("retention"));
    std::fs::write(dir.path().join("master-target.toml"), configured).unwrap();
    let checked = program(&["check", "--state-dir", dir.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    let line = text.lines().find(|line| line.contains("retention-reach")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("PASS") && line.contains("there is no hour of history yet"), "{line}");
    assert!(!dir.path().join("retention").exists(), "nothing is made");
}

#[test]
fn commands_without_a_daemon_say_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().to_str().unwrap();
    for command in [
        &["status"][..],
        &["machines"],
        &["invite", "--role", "agent"],
        &["protect", "web1", "--datastore", "/ds"],
        &["unprotect", "web1:sda", "--yes"],
        &["revoke", "web1", "--yes"],
    ] {
        let refused = program(&[command, &["--state-dir", state_dir, "--json"]].concat());
        assert_eq!((refused.status.code(), refused.stdout.len()), (Some(1), 0), "{command:?}");
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(text.contains("is not running") && text.contains("master-target run"), "{text}");
    }
}

#[test]
fn what_cannot_be_asked_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let refused = program(&["revoke", "web1", "--state-dir", dir.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("repeat with --yes"), "{text}");
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

#[test]
fn check_names_what_fails_with_a_remedy_and_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("master-target.toml"), "listen = \"127.0.0.1:0\"\n").unwrap();
    let good = program(&["check", "--json", "--state-dir", state_dir]);
    assert_eq!((good.status.code(), &json(&good)["ready"]), (Some(0), &true.into()));
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let text = format!("listen = \"{}\"\ndatastores = [\"/nonexistent/ds\"]\n", taken.local_addr().unwrap());
    std::fs::write(dir.path().join("master-target.toml"), text).unwrap();
    let bad = program(&["check", "--json", "--state-dir", state_dir]);
    assert_eq!(bad.status.code(), Some(1));
    let found = json(&bad);
    for name in ["port", "datastore:/nonexistent/ds"] {
        let checks = found["findings"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == name).expect(name);
        assert_eq!(check["verdict"], "FAIL");
        assert!(!check["remedy"].as_str().unwrap().is_empty());
    }
    std::fs::write(dir.path().join("master-target.toml"), "listn = 1\n").unwrap();
    let wrong = program(&["check", "--json", "--state-dir", state_dir]);
    assert_eq!(wrong.status.code(), Some(1));
    assert_eq!(json(&wrong)["findings"][0]["name"], "configuration");
}

#[test]
fn inspect_describes_disks_and_says_why_a_snapshot_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.vmdk");
    let descriptor = |parent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID={parent}\ncreateType=\"vmfs\"\n\
             RW 2048 VMFS \"web-flat.vmdk\"\nddb.uuid = \"60 00 C2 91 0b 64 4a 5c-9f 1e 2d 3c 4b 5a 69 78\"\n"
        )
    };
    std::fs::write(&path, descriptor("ffffffff")).unwrap();
    std::fs::write(dir.path().join("web-flat.vmdk"), vec![1; 1 << 20]).unwrap();
    let shown = program(&["inspect", "--json", path.to_str().unwrap()]);
    let found = json(&shown);
    assert_eq!((shown.status.code(), &found["usable"]), (Some(0), &true.into()), "{found}");
    assert_eq!((&found["kind"], &found["cid"]), (&"vmfs".into(), &"0badcafe".into()));
    assert_eq!((&found["size_bytes"], &found["allocated_bytes"]), (&(1 << 20).into(), &(1 << 20).into()));
    std::fs::write(&path, descriptor("12345678")).unwrap();
    let found = json(&program(&["inspect", "--json", path.to_str().unwrap()]));
    assert_eq!(found["usable"], false);
    assert!(found["refused"].as_str().unwrap().contains("consolidate snapshots first"));
    assert_eq!(program(&["inspect", "/nonexistent"]).status.code(), Some(1));
}
