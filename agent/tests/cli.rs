//! The command-line contract of `reprotect-agent`, on the built binary; as root also on a real disk with partitions.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use reprotect_engine::checksum::crc32;
use serde_json::Value;

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reprotect-agent")).args(arguments).output().expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn every_command_has_help_and_unknown_options_exit_with_2() {
    for command in ["disks", "check", "check-config", "enroll", "run", "status"] {
        let help = agent(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(stdout(&help).contains("Usage: reprotect-agent"), "{command}");
        assert_eq!(agent(&[command, "--no-such-option"]).status.code(), Some(2), "{command}");
    }
    assert!(stdout(&agent(&["--version"])).starts_with("reprotect-agent "));
    assert_eq!(agent(&[]).status.code(), Some(2));
    assert_eq!(agent(&["frobnicate"]).status.code(), Some(2));
}

#[test]
fn the_printed_default_passes_its_own_check() {
    let dir = tempfile::tempdir().unwrap();
    let printed = agent(&["check-config", "--print-default"]);
    assert_eq!(printed.status.code(), Some(0));
    let path = dir.path().join("agent.toml");
    std::fs::write(&path, &printed.stdout).unwrap();
    let checked = agent(&["check-config", "--config", text(&path)]);
    assert_eq!((checked.status.code(), stdout(&checked)), (Some(0), format!("{}: valid\n", path.display())));
    // The same file found through --state-dir.
    let checked = agent(&["check-config", "--json", "--state-dir", text(dir.path())]);
    let json: Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!((&json["valid"], &json["found"]), (&Value::Bool(true), &Value::Bool(true)));
}

#[test]
fn a_wrong_configuration_exits_with_2_and_names_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.toml");
    std::fs::write(&path, "compress = \"auto\"\nmemroy = \"1 GiB\"\n").unwrap();
    for command in ["check-config", "disks"] {
        let refused = agent(&[command, "--config", text(&path)]);
        assert_eq!(refused.status.code(), Some(2), "{command}");
        assert!(stdout(&refused).is_empty());
        let expected = format!("{}:2: `memroy`: unknown key; did you mean `memory`?", path.display());
        assert!(stderr(&refused).contains(&expected), "{}", stderr(&refused));
    }
    let missing = agent(&["check-config", "--config", "/nonexistent/agent.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("no such configuration file"), "{}", stderr(&missing));
    let level = agent(&["disks", "--log-level", "loud", "--state-dir", text(dir.path().join("x").as_path())]);
    assert_eq!(level.status.code(), Some(2));
    assert!(stderr(&level).contains("log.level"), "{}", stderr(&level));
}

#[test]
fn disks_as_json_is_one_json_value() {
    let dir = tempfile::tempdir().unwrap();
    let listed = agent(&["disks", "--all", "--json", "--state-dir", text(dir.path())]);
    assert_eq!(listed.status.code(), Some(0), "{}", stderr(&listed));
    let json: Value = serde_json::from_slice(&listed.stdout).unwrap();
    for disk in json["disks"].as_array().unwrap() {
        assert!(disk["verdict"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{disk}");
        assert!(disk["bytes"].is_u64(), "{disk}");
    }
    let table = agent(&["disks", "--state-dir", text(dir.path())]);
    assert!(stdout(&table).starts_with("DISK "), "{}", stdout(&table));
}

/// A GPT with one Linux partition of 8 MiB from 1 MiB, on a disk of `bytes`.
fn gpt(bytes: u64) -> Vec<u8> {
    let sectors = bytes / 512;
    let mut image = vec![0_u8; usize::try_from(bytes).expect("small")];
    // Protective MBR: one entry of type 0xEE over the whole disk.
    image[446 + 4] = 0xee;
    image[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
    image[446 + 12..446 + 16].copy_from_slice(&u32::try_from(sectors - 1).expect("small").to_le_bytes());
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut entries = vec![0_u8; 128 * 128];
    entries[..16].copy_from_slice(&[
        0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
    ]);
    entries[16..32].copy_from_slice(&[7; 16]);
    entries[32..40].copy_from_slice(&2048_u64.to_le_bytes());
    entries[40..48].copy_from_slice(&(2048_u64 + 16384 - 1).to_le_bytes());
    for (at, unit) in "data".encode_utf16().enumerate() {
        entries[56 + 2 * at..58 + 2 * at].copy_from_slice(&unit.to_le_bytes());
    }
    let header = |own: u64, other: u64, table: u64| {
        let mut header = vec![0_u8; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        header[24..32].copy_from_slice(&own.to_le_bytes());
        header[32..40].copy_from_slice(&other.to_le_bytes());
        header[40..48].copy_from_slice(&34_u64.to_le_bytes());
        header[48..56].copy_from_slice(&(sectors - 34).to_le_bytes());
        header[56..72].copy_from_slice(&[9; 16]);
        header[72..80].copy_from_slice(&table.to_le_bytes());
        header[80..84].copy_from_slice(&128_u32.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        header
    };
    let mut put = |sector: u64, data: &[u8]| {
        let at = usize::try_from(sector * 512).expect("small");
        image[at..at + data.len()].copy_from_slice(data);
    };
    put(1, &header(1, sectors - 1, 2));
    put(2, &entries);
    put(sectors - 33, &entries);
    put(sectors - 1, &header(sectors - 1, 1, sectors - 33));
    image
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("the program runs");
    assert!(output.status.success(), "{program} {arguments:?}: {}", stderr(&output));
    stdout(&output).trim().to_owned()
}

/// A loop device over an image; detached, and its mount undone, on drop.
struct Loop {
    device: String,
    mount_point: PathBuf,
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mount_point).output();
        let _ = Command::new("losetup").args(["-d", &self.device]).output();
    }
}

#[test]
fn a_real_loop_device_with_a_gpt_is_listed_with_its_mounted_partition() {
    let is_root = run("id", &["-u"]) == "0";
    if !is_root {
        eprintln!("left out: loop devices need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, gpt(32 << 20)).unwrap();
    let device = run("losetup", &["--find", "--show", "--partscan", text(&image)]);
    let mounted = Loop { device: device.clone(), mount_point: dir.path().join("mnt") };
    std::fs::create_dir(&mounted.mount_point).unwrap();
    let partition = format!("{device}p1");
    // A kernel built without the GPT parser finds none; then the same table is read in user space.
    let by_kernel = Path::new(&partition).exists();
    if !by_kernel {
        run("partx", &["--add", &device]);
    }
    run("mkfs.ext4", &["-q", &partition]);
    run("mount", &[&partition, text(&mounted.mount_point)]);

    let state = dir.path().join("state");
    let listed = agent(&["disks", "--json", "--state-dir", text(&state)]);
    let json: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let disks = json["disks"].as_array().unwrap();
    let disk = disks.iter().find(|disk| disk["path"] == device.as_str()).expect("the loop device is listed");
    assert_eq!(disk["bytes"], 32 << 20);
    assert_eq!(disk["backing_file"], text(&image));
    assert_eq!(disk["verdict"]["class"], "loop");
    assert_eq!(disk["verdict"]["selected"], true);
    assert_eq!(disk["partitions"][0]["start_bytes"], 1 << 20);
    assert_eq!(disk["partitions"][0]["bytes"], 8 << 20);
    if by_kernel {
        assert_eq!(disk["partitions"][0]["label"], "data");
    }
    assert_eq!(disk["mounts"][0]["mount_point"], text(&mounted.mount_point));
    assert_eq!(disk["mounts"][0]["device"], partition.trim_start_matches("/dev/"));

    // A partition alone is refused as a source, with the disk to name instead.
    std::fs::create_dir(&state).unwrap();
    std::fs::write(state.join("agent.toml"), format!("[disks]\ninclude = [\"{partition}\"]\n")).unwrap();
    let refused = agent(&["disks", "--state-dir", text(&state)]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains(&format!("protect the whole disk {device}")), "{}", stderr(&refused));
    // Excluded by name, it is listed with the reason.
    let name = device.trim_start_matches("/dev/");
    std::fs::write(state.join("agent.toml"), format!("[disks]\nexclude = [\"{name}\"]\n")).unwrap();
    let table = stdout(&agent(&["disks", "--state-dir", text(&state)]));
    assert!(table.contains("excluded by the configuration"), "{table}");
}

/// A state directory whose agent may protect `image` and nothing else.
fn state_for(dir: &Path, image: &Path) -> PathBuf {
    let state = dir.join("state");
    std::fs::create_dir_all(&state).expect("a directory");
    let real =
        r#""sd*", "vd*", "nvme*", "xvd*", "loop*", "dm-*", "md*", "zram*", "nbd*", "sr*", "hd*", "mmcblk*""#;
    let text = format!(
        "upstream = [\"127.0.0.1:9\"]\n[disks]\ninclude = [\"{}\"]\nexclude = [{real}]\n",
        image.display()
    );
    std::fs::write(state.join("agent.toml"), text).expect("a file");
    state
}

#[test]
fn without_enrolment_run_and_check_fail_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let state = state_for(dir.path(), &image);
    let run = agent(&["run", "--state-dir", text(&state)]);
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("enrolled: this agent has not enrolled; make a token"), "{}", stderr(&run));
    // Forced, it fails where the identity is needed.
    let forced = agent(&["run", "--force", "enrolled", "--state-dir", text(&state)]);
    assert_eq!(forced.status.code(), Some(1));
    assert!(stderr(&forced).contains("has not enrolled"), "{}", stderr(&forced));
    let unknown = agent(&["run", "--force", "enroled", "--state-dir", text(&state)]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("there is no such check"), "{}", stderr(&unknown));

    let check = agent(&["check", "--json", "--state-dir", text(&state)]);
    assert_eq!(check.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!(json["ready"], false);
    let findings = json["findings"].as_array().unwrap();
    let of = |name: &str| findings.iter().find(|finding| finding["name"] == name).expect("a finding");
    assert_eq!((&of("enrolled")["verdict"], &of("disks")["verdict"]), (&"FAIL".into(), &"PASS".into()));
    assert!(of("enrolled")["remedy"].as_str().unwrap().contains("reprotect-agent enroll"));
    assert!(of("disks")["reason"].as_str().unwrap().contains("1.00 MiB"));
    for finding in findings {
        let passed = finding["verdict"] == "PASS";
        assert_eq!(finding["remedy"].as_str().unwrap().is_empty(), passed, "{finding}");
        assert!(!finding["reason"].as_str().unwrap().is_empty(), "{finding}");
    }
    let table = agent(&["check", "--state-dir", text(&state)]);
    assert_eq!(table.status.code(), Some(1));
    assert!(stdout(&table).starts_with("CHECK ") && stdout(&table).contains("FAIL"), "{}", stdout(&table));
}

#[test]
fn check_names_a_missing_disk_and_an_empty_selection() {
    let dir = tempfile::tempdir().unwrap();
    let state = state_for(dir.path(), &dir.path().join("gone.img"));
    let disks = |state: &Path| {
        let check = agent(&["check", "--json", "--state-dir", text(state)]);
        assert_eq!(check.status.code(), Some(1));
        let json: Value = serde_json::from_slice(&check.stdout).unwrap();
        let findings = json["findings"].as_array().unwrap().clone();
        findings.into_iter().find(|finding| finding["name"] == "disks").unwrap()
    };
    let missing = disks(&state);
    assert_eq!(missing["verdict"], "FAIL");
    assert!(missing["reason"].as_str().unwrap().contains("gone.img"), "{missing}");
    let config = state.join("agent.toml");
    let empty = std::fs::read_to_string(&config).unwrap().replace("include", "# include");
    std::fs::write(&config, empty).unwrap();
    let none = disks(&state);
    assert_eq!((&none["verdict"], &none["reason"]), (&"FAIL".into(), &"no disk is selected".into()));
}

#[test]
fn status_without_a_daemon_and_enroll_with_a_wrong_token_exit_with_1_and_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let status = agent(&["status", "--state-dir", text(dir.path())]);
    assert_eq!(status.status.code(), Some(1));
    assert!(stdout(&status).is_empty());
    assert!(
        stderr(&status).contains("reprotect-agent run") || stderr(&status).contains("start"),
        "{}",
        stderr(&status)
    );
    let enroll = agent(&["enroll", "not-a-token", "--state-dir", text(dir.path())]);
    assert_eq!(enroll.status.code(), Some(1));
    assert!(stderr(&enroll).contains("token"), "{}", stderr(&enroll));
    assert!(!dir.path().join("identity.pem").exists());
}
