//! What every command promises: exit status, standard output, and errors that say what to do.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::{Command, Output};

fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reprotect-process-server"))
        .args(["--state-dir", dir.to_str().unwrap()])
        .args(args)
        .env_remove("NOTIFY_SOCKET")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn fails(output: &Output, code: i32, parts: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert_eq!(text(&output.stdout), "", "errors go to standard error");
    assert!(error.starts_with("reprotect-process-server: "), "{error}");
    for part in parts {
        assert!(error.contains(part), "{part:?} in {error:?}");
    }
}

#[test]
fn help_and_version_work_and_a_wrong_command_line_is_status_2() {
    let dir = tempfile::tempdir().unwrap();
    for (args, code) in [(["--help"], 0), (["--version"], 0), (["frobnicate"], 2), (["--no-such-option"], 2)]
    {
        assert_eq!(run(dir.path(), &args).status.code(), Some(code), "{args:?}");
    }
    let help = text(&run(dir.path(), &["--help"]).stdout);
    for command in ["run", "check", "check-config", "enroll", "status"] {
        assert!(help.contains(command), "{command} in {help}");
    }
}

#[test]
fn a_wrong_configuration_is_status_2_and_names_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("process-server.toml"), "\nlevell = 3\n").unwrap();
    for command in ["run", "check", "status", "check-config"] {
        fails(&run(dir.path(), &[command]), 2, &["process-server.toml:2", "level"]);
    }
}

#[test]
fn the_printed_default_configuration_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let default = run(dir.path(), &["check-config", "--print-default"]);
    assert!(default.status.success());
    std::fs::write(dir.path().join("process-server.toml"), &default.stdout).unwrap();
    let checked = run(dir.path(), &["check-config", "--json"]);
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!(answer["valid"], true);
}

#[test]
fn run_without_enrolment_says_how_to_enrol() {
    let dir = tempfile::tempdir().unwrap();
    fails(&run(dir.path(), &["run"]), 1, &["not enrolled", "reprotect-process-server enroll TOKEN"]);
}

#[test]
fn forcing_a_check_that_does_not_exist_is_status_2_and_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    fails(&run(dir.path(), &["run", "--force", "memroy"]), 2, &["memroy", "memory", "open-files"]);
}

#[test]
fn status_without_a_daemon_says_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    fails(&run(dir.path(), &["status"]), 1, &["not running", "reprotect-process-server run"]);
}

#[test]
fn a_damaged_token_is_status_2_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fails(&run(&state, &["enroll", "rpt1-damaged"]), 2, &["damaged in copying"]);
    assert!(!state.exists());
}

#[test]
fn check_prints_every_finding_with_a_remedy_and_fails_before_enrolment() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("process-server.toml"), "listen = \"127.0.0.1:0\"\n").unwrap();
    let checked = run(dir.path(), &["check", "--json"]);
    assert_eq!(checked.status.code(), Some(1), "{}", text(&checked.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!(answer["ready"], false);
    let checks = answer["findings"].as_array().unwrap();
    for name in ["enrolled", "listen", "memory", "open-files", "targets"] {
        assert!(checks.iter().any(|check| check["name"] == name), "{name} in {answer}");
    }
    for check in checks {
        assert_eq!(check["verdict"] == "PASS", check["remedy"] == "", "{check}");
        assert_ne!(check["reason"], "");
    }
    let table = text(&run(dir.path(), &["check"]).stdout);
    assert!(table.starts_with("CHECK") && table.contains("FAIL"), "{table}");
}
