//! Compiles the capture programs for the BPF target; the objects are embedded by `src/capture/object.rs`.
//!
//! Invariants: nothing of the machine that builds goes into the objects but its C headers; what runs is fitted to the
//! kernel at load. Two objects: one for typed tracepoints, one for kernels without them. Called by cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What brings everything that is needed here.
const REMEDY: &str = "apt-get install -y clang libbpf-dev linux-libc-dev   (or: make setup)";

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let built = compile(&out.join("capture_typed.o"), &[])
        .and_then(|()| compile(&out.join("capture_raw.o"), &["-DRAW_TRACEPOINTS"]));
    if let Err(reason) = built {
        println!("cargo::error=the capture programs cannot be compiled: {reason}; try: {REMEDY}");
    }
}

/// One object from the one source.
fn compile(object: &Path, more: &[&str]) -> Result<(), String> {
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let mut command = Command::new(&clang);
    // The third instruction set has the atomics. `-g` makes the BTF that fits the program to the kernel.
    command.args([
        "-target",
        "bpf",
        "-mcpu=v3",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
    ]);
    // Debian keeps `asm/types.h` per architecture, which the BPF target does not know.
    let headers = PathBuf::from(format!("/usr/include/{arch}-linux-gnu"));
    if headers.is_dir() {
        command.arg("-I").arg(headers);
    }
    // No path of this machine in the debug information.
    command.arg("-fdebug-compilation-dir=.");
    command.args(more).args(["-c", "bpf/capture.bpf.c", "-o"]).arg(object);
    let output = command.output().map_err(|error| format!("{clang} does not start: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).lines().take(12).collect::<Vec<_>>().join(" | "))
}
