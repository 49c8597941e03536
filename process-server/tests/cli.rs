//! The command-line contract of `reprotect-process-server`, on the built binary.

use std::process::{Command, Output};

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reprotect-process-server"))
        .args(arguments)
        .output()
        .expect("the binary runs")
}

#[test]
fn every_command_has_help_and_unknown_options_exit_with_2() {
    for command in ["run", "check", "check-config", "enroll", "status"] {
        let help = program(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(
            String::from_utf8_lossy(&help.stdout).contains("Usage: reprotect-process-server"),
            "{command}"
        );
        assert_eq!(program(&[command, "--no-such-option"]).status.code(), Some(2), "{command}");
    }
    assert_eq!(program(&[]).status.code(), Some(2));
}

#[test]
fn the_printed_default_passes_its_own_check_and_a_wrong_key_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("process-server.toml");
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
