//! Programs of others as clients of the NBD server: `nbdinfo`, `nbdcopy`, `qemu-img`, `qemu-io`, and `nbdsh` where it
//! is there.
//!
//! What must hold: they read the disk as it is, holes included, over a Unix socket, TCP and TLS; what they write to an
//! overlay is read back by all of them and reaches no base. A client that is not installed is skipped with a line
//! that says so.
#![expect(clippy::unwrap_used, reason = "a test crate: helpers outside test functions unwrap too")]

mod nbd;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

use nbd::{Running, SIZE, certificates, disk, export, file_overlay, overlay};
use reprotect_engine::io::memory::MemoryFile;
use reprotect_engine::io::{BlockFile, ReadAt};
use reprotect_engine::net::nbd::Settings;
use reprotect_engine::net::nbd::listen::Address;

fn installed(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = Command::new(program).arg("--version").output().is_ok_and(|out| out.status.success());
        if !found {
            eprintln!("SKIPPED: {program} is not installed, so it was no client");
        }
        found
    })
}

fn try_run(program: &str, args: &[&dyn AsRef<OsStr>]) -> Output {
    let mut command = Command::new(program);
    args.iter().for_each(|arg| {
        command.arg(arg.as_ref());
    });
    // The log of a client that hangs says nothing; one that is killed fails the test with its name.
    let mut timed = Command::new("timeout");
    timed.arg("120").arg(command.get_program()).args(command.get_args());
    timed.output().unwrap()
}

fn run(program: &str, args: &[&dyn AsRef<OsStr>]) -> String {
    let out = try_run(program, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{program} {}: {}{}", out.status, text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// The URI of an export behind a Unix socket.
fn uri(socket: &Path, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

struct Lab {
    dir: tempfile::TempDir,
    address: Address,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("nbd.sock"));
        Self { dir, address }
    }

    fn uri(&self, name: &str) -> String {
        let Address::Unix(socket) = &self.address else { panic!("the lab has a Unix socket") };
        uri(socket, name)
    }

    fn file(&self, name: &str, content: &[u8]) -> std::path::PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

fn content(file: &MemoryFile) -> Vec<u8> {
    let mut data = vec![0; file.size_bytes() as usize];
    file.clone_handle().read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
    data
}

/// The value of `"key":` in nbdinfo's JSON.
fn value<'a>(json: &'a str, key: &str) -> &'a str {
    let (_, after) = json.split_once(&format!("\"{key}\":")).unwrap_or_else(|| panic!("no {key} in {json}"));
    after.split([',', '\n']).next().unwrap().trim()
}

#[test]
fn nbdinfo_finds_everything_the_export_can_do() {
    if !installed(&["nbdinfo"]) {
        return;
    }
    let lab = Lab::new();
    let (file, _) = disk(SIZE, 1);
    let exports = vec![export("vm/disk-0", &file, false), export("spare", &file, true)];
    let running = Running::start(&lab.address, exports, Settings::default());
    let json = run("nbdinfo", &[&"--json", &lab.uri("vm/disk-0")]);
    for (key, expected) in [
        ("protocol", "\"newstyle-fixed\""),
        ("structured", "true"),
        ("export-size", &SIZE.to_string()),
        ("is_read_only", "true"),
        ("can_df", "true"),
        ("can_multi_conn", "true"),
        ("can_flush", "false"),
        ("can_trim", "false"),
        ("block_size_minimum", "1"),
        ("block_size_preferred", "4096"),
        ("block_size_maximum", "33554432"),
    ] {
        assert_eq!(value(&json, key), expected, "{key} in {json}");
    }
    assert!(json.contains("base:allocation"), "{json}");
    let json = run("nbdinfo", &[&"--json", &lab.uri("spare")]);
    for (key, expected) in [
        ("is_read_only", "false"),
        ("can_flush", "true"),
        ("can_fua", "true"),
        ("can_trim", "true"),
        ("can_zero", "true"),
        ("can_cache", "false"),
    ] {
        assert_eq!(value(&json, key), expected, "{key} in {json}");
    }
    let list = run("nbdinfo", &[&"--list", &"--json", &lab.uri("")]);
    assert!(list.contains("\"vm/disk-0\"") && list.contains("\"spare\""), "{list}");
    let missing = try_run("nbdinfo", &[&lab.uri("nothing")]);
    assert!(!missing.status.success());
    assert_eq!(running.stop(), 0);
}

#[test]
fn nbdinfo_maps_exactly_the_holes_there_are() {
    if !installed(&["nbdinfo"]) {
        return;
    }
    let lab = Lab::new();
    let (file, _) = disk(SIZE, 2);
    let running = Running::start(&lab.address, vec![export("", &file, false)], Settings::default());
    let map = run("nbdinfo", &[&"--map", &lab.uri("")]);
    let mut data = Vec::new();
    let mut at = 0;
    for line in map.lines() {
        let mut words = line.split_whitespace();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let (offset, length, kind) = (number(), number(), number());
        assert_eq!(offset, at, "{line}");
        at += length;
        if kind == 0 {
            data.push(reprotect_engine::io::ByteRange { start: offset, end: offset + length });
        } else {
            assert_eq!(kind, 3, "{line}");
        }
    }
    assert_eq!(at, SIZE);
    let all = reprotect_engine::io::ByteRange { start: 0, end: SIZE };
    assert_eq!(data, file.clone_handle().allocated(all).unwrap());
    assert!(data.len() > 10);
    assert_eq!(running.stop(), 0);
}

#[test]
fn qemu_and_nbdcopy_read_the_disk_as_it_is() {
    if !installed(&["qemu-img", "nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let (file, plain) = disk(SIZE, 3);
    let running = Running::start(&lab.address, vec![export("disk", &file, false)], Settings::default());
    let raw = lab.file("expected.raw", &plain);
    let uri = lab.uri("disk");
    let compare = run("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &uri, &raw]);
    assert!(compare.contains("identical"), "{compare}");
    let converted = lab.dir.path().join("converted.qcow2");
    run("qemu-img", &[&"convert", &"-f", &"raw", &"-O", &"qcow2", &uri, &converted]);
    let compare = run("qemu-img", &[&"compare", &"-f", &"qcow2", &"-F", &"raw", &converted, &raw]);
    assert!(compare.contains("identical"), "{compare}");
    for connections in ["1", "4"] {
        let copy = lab.dir.path().join("copy.raw");
        run("nbdcopy", &[&format!("--connections={connections}"), &uri, &copy]);
        assert!(std::fs::read(&copy).unwrap() == plain, "{connections} connections");
        std::fs::remove_file(copy).unwrap();
    }
    // Without block status and in small requests, each read in a chunk of its own.
    let copy = lab.dir.path().join("copy.raw");
    run("nbdcopy", &[&"--no-extents", &"--request-size=65536", &"--requests=32", &uri, &copy]);
    assert!(std::fs::read(&copy).unwrap() == plain);
    assert_eq!(running.stop(), 0);
}

#[test]
fn what_nbdcopy_writes_over_four_connections_is_on_the_disk() {
    if !installed(&["nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let ((_, plain), target) = (disk(SIZE, 4), MemoryFile::new(SIZE));
    let running = Running::start(&lab.address, vec![export("", &target, true)], Settings::default());
    let raw = lab.file("source.raw", &plain);
    run("nbdcopy", &[&"--connections=4", &"--flush", &raw, &lab.uri("")]);
    assert!(content(&target) == plain);
    assert!(target.flush_count() > 0, "nbdcopy asked for a flush");
    assert_eq!(running.stop(), 0);
}

#[test]
fn an_overlay_takes_what_qemu_writes_and_the_base_stays() {
    if !installed(&["qemu-io", "qemu-img", "nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let (base, mut plain) = disk(SIZE, 5);
    let (before, scratch) = (plain.clone(), MemoryFile::named("scratch", SIZE));
    let running = Running::start(&lab.address, vec![overlay("", &base, &scratch)], Settings::default());
    let uri = lab.uri("");
    let sizes = [(1_000_003_usize, 70_001_usize, 0xA1), (4096, 4096, 0xA2), (SIZE as usize - 700, 700, 0xA3)];
    for (at, len, fill) in sizes {
        run("qemu-io", &[&"-f", &"raw", &"-c", &format!("write -P {fill} {at} {len}"), &uri]);
        plain[at..at + len].fill(fill);
    }
    let holes = [(2_000_000_usize, 3_000_000_usize, "write -z"), (9 << 20, 1 << 20, "write -z -u")];
    for (at, len, command) in holes {
        run("qemu-io", &[&"-f", &"raw", &"-c", &format!("{command} {at} {len}"), &"-c", &"flush", &uri]);
        plain[at..at + len].fill(0);
    }
    run("qemu-io", &[&"-f", &"raw", &"-c", &"write -f -P 7 0 512", &uri]);
    plain[..512].fill(7);
    assert!(scratch.flush_count() > 0, "FUA and flush reach the scratch file");
    let raw = lab.file("expected.raw", &plain);
    let compare = run("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &uri, &raw]);
    assert!(compare.contains("identical"), "{compare}");
    // A whole image over it, and back.
    let (_, other) = disk(SIZE, 6);
    let other_raw = lab.file("other.raw", &other);
    run("qemu-img", &[&"convert", &"-n", &"-f", &"raw", &"-O", &"raw", &other_raw, &uri]);
    let copy = lab.dir.path().join("copy.raw");
    run("nbdcopy", &[&"--connections=4", &uri, &copy]);
    assert!(std::fs::read(copy).unwrap() == other);
    assert!(content(&base) == before, "the base was written");
    assert_eq!(running.stop(), 0);
}

#[test]
fn an_overlay_of_real_files_is_read_and_written_over_four_connections() {
    if !installed(&["qemu-io", "qemu-img", "nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let ((_, mut plain), (_, other)) = (disk(SIZE, 20), disk(SIZE, 21));
    let base = lab.file("base.raw", &plain);
    let scratch = lab.file("scratch.raw", &[]);
    std::fs::File::options().write(true).open(&scratch).unwrap().set_len(SIZE).unwrap();
    let running = Running::start(&lab.address, vec![file_overlay("", &base, &scratch)], Settings::default());
    let uri = lab.uri("");
    let commands: Vec<String> = (0..40_usize)
        .map(|step| {
            let (at, len) = (step * 1_200_007 % (SIZE as usize - 90_000), 1 + step * 7919 % 80_000);
            plain[at..at + len].fill(step as u8);
            format!("write -P {step} {at} {len}")
        })
        .collect();
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &"raw"];
    for command in &commands {
        args.push(&"-c");
        args.push(command);
    }
    args.push(&uri);
    run("qemu-io", &args);
    let expected = lab.file("expected.raw", &plain);
    let compare = run("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &uri, &expected]);
    assert!(compare.contains("identical"), "{compare}");
    let source = lab.file("other.raw", &other);
    run("nbdcopy", &[&"--connections=4", &"--flush", &source, &uri]);
    let copy = lab.dir.path().join("copy.raw");
    run("nbdcopy", &[&"--connections=4", &uri, &copy]);
    assert!(std::fs::read(copy).unwrap() == other);
    let (_, before) = disk(SIZE, 20);
    assert!(std::fs::read(base).unwrap() == before, "the base was written");
    assert_eq!(running.stop(), 0);
}

#[test]
fn a_full_scratch_file_reaches_the_client_as_no_space() {
    if !installed(&["qemu-io"]) {
        return;
    }
    let lab = Lab::new();
    let ((base, _), scratch) = (disk(SIZE, 7), MemoryFile::named("scratch", SIZE));
    scratch.set_capacity(Some(1 << 20));
    let running = Running::start(&lab.address, vec![overlay("", &base, &scratch)], Settings::default());
    let write = |at: u64, len: u64| {
        let out =
            try_run("qemu-io", &[&"-f", &"raw", &"-c", &format!("write -P 1 {at} {len}"), &lab.uri("")]);
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    };
    assert!(write(0, 1 << 20).contains("wrote 1048576/1048576"));
    let refused = write(8 << 20, 4096);
    assert!(refused.contains("No space left"), "{refused}");
    assert!(write(4096, 8192).contains("wrote 8192/8192"), "what is there can be overwritten");
    assert_eq!(running.stop(), 0);
}

#[test]
fn tls_lets_certified_clients_in_and_nobody_else() {
    if !installed(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let certificates = certificates(&lab.dir.path().join("pki"));
    let (file, plain) = disk(SIZE, 8);
    let settings = || Settings { tls: Some(certificates.server.clone()), ..Settings::default() };
    let running = Running::start(&lab.address, vec![export("disk", &file, false)], settings());
    let tls = lab.uri("disk").replace("nbd+unix", "nbds+unix");
    let with = |pki: &Path| format!("{tls}&tls-certificates={}", pki.display());
    let json = run("nbdinfo", &[&"--json", &with(&certificates.dir)]);
    assert_eq!(value(&json, "TLS"), "true", "{json}");
    assert_eq!(value(&json, "export-size"), SIZE.to_string());
    let copy = lab.dir.path().join("copy.raw");
    run("nbdcopy", &[&"--connections=4", &with(&certificates.dir), &copy]);
    assert!(std::fs::read(&copy).unwrap() == plain);
    for intruder in [with(&certificates.dir.join("stranger")), lab.uri("disk"), tls.clone()] {
        let out = try_run("nbdinfo", &[&"--json", &intruder]);
        assert!(!out.status.success(), "{intruder}: {}", String::from_utf8_lossy(&out.stdout));
    }
    let list = try_run("nbdinfo", &[&"--list", &lab.uri("")]);
    let told = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(!list.status.success() && !told.contains("disk"), "names without TLS: {told}");
    assert_eq!(running.stop(), 0);
    // A configuration that asks for no certificate lets nobody in.
    let careless = Settings { tls: Some(certificates.careless.clone()), ..Settings::default() };
    let running = Running::start(&lab.address, vec![export("disk", &file, false)], careless);
    assert!(!try_run("nbdinfo", &[&"--json", &with(&certificates.dir)]).status.success());
    assert_eq!(running.stop(), 0);
    // The same over TCP, where the name in the certificate counts.
    let running = Running::start(&Address::loopback(0), vec![export("disk", &file, false)], settings());
    let Address::Tcp(address) = running.address() else { panic!("a TCP address") };
    let uri = |host: &str| {
        let pki = certificates.dir.display();
        format!("nbds://{host}:{}/disk?tls-certificates={pki}", address.port())
    };
    let json = run("nbdinfo", &[&"--json", &uri("localhost")]);
    assert_eq!(value(&json, "TLS"), "true", "{json}");
    assert_eq!(running.stop(), 0);
}

#[test]
fn plain_tcp_on_loopback_serves_qemu() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let lab = Lab::new();
    let (file, plain) = disk(SIZE, 9);
    let running =
        Running::start(&Address::loopback(0), vec![export("disk", &file, false)], Settings::default());
    let raw = lab.file("expected.raw", &plain);
    let uri = format!("nbd://{}/disk", running.address());
    let compare = run("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &uri, &raw]);
    assert!(compare.contains("identical"), "{compare}");
    assert_eq!(running.stop(), 0);
}

const NBDSH_SCRIPT: &str = r"
import errno
h.set_strict_mode(0)
def code(call):
    try:
        call()
    except nbd.Error as error:
        return error.errnum
assert code(lambda: h.pwrite(bytearray(512), 0)) == errno.EPERM
assert code(lambda: h.zero(512, 0)) == errno.EPERM
assert code(lambda: h.pread(512, h.get_size())) == errno.EINVAL
assert code(lambda: h.cache(512, 0)) == errno.EINVAL
def chunks(flags):
    seen = []
    def chunk(data, offset, status, error):
        seen.append((offset, len(data), status))
    h.pread_structured(16 << 20, 0, chunk, flags)
    assert sum(length for _, length, _ in seen) == 16 << 20
    return seen
seen = chunks(0)
assert {status for _, _, status in seen} == {nbd.READ_DATA, nbd.READ_HOLE}
assert chunks(nbd.CMD_FLAG_DF) == [(0, 16 << 20, nbd.READ_DATA)]
extents = []
h.block_status(h.get_size(), 0, lambda *args: extents.append(args[2]), nbd.CMD_FLAG_REQ_ONE)
assert [len(entries) for entries in extents] == [2]
";

#[test]
fn nbdsh_sees_chunks_and_refusals_as_the_protocol_has_them() {
    // The module of the system's interpreter: `nbdsh` itself takes whatever `python3` stands first in PATH.
    const PYTHON: &str = "/usr/bin/python3";
    let known = Command::new(PYTHON).args(["-c", "import nbd"]).output();
    if !known.is_ok_and(|out| out.status.success()) {
        eprintln!("SKIPPED: the nbd module of {PYTHON} is not installed, so it was no client");
        return;
    }
    let lab = Lab::new();
    let (file, _) = disk(SIZE, 10);
    let running = Running::start(&lab.address, vec![export("", &file, false)], Settings::default());
    run(PYTHON, &[&"-m", &"nbd", &"--base-allocation", &"-u", &lab.uri(""), &"-c", &NBDSH_SCRIPT]);
    assert_eq!(running.stop(), 0);
}
