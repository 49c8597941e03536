//! A loop device over memory, the hardest case for capture: nothing else takes time. All gone when it is dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the device.
const SIZE_MIB: u64 = 512;

/// The device.
pub(crate) struct MemoryDisk {
    /// Its path.
    pub(crate) path: PathBuf,
    mount: PathBuf,
}

/// Runs a program to its end, which must be a success.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}; install it"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of our own")
}

impl MemoryDisk {
    /// Makes one, mounted below `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let mount = dir.join("memory");
        std::fs::create_dir_all(&mount).expect("a folder to measure in");
        run("mount", &["-t", "tmpfs", "-o", "size=1g", "tmpfs", text(&mount)]);
        let image = mount.join("disk");
        let made = std::fs::File::create(&image).and_then(|file| file.set_len(SIZE_MIB << 20));
        made.expect("an image in memory");
        let path = run("losetup", &["-f", "--show", "--direct-io=on", text(&image)]);
        let disk = Self { path: path.into(), mount };
        // Every block is there from the first run on.
        run(
            "dd",
            &["if=/dev/urandom", &format!("of={}", text(&disk.path)), "bs=1M", "count=512", "oflag=direct"],
        );
        disk
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        let _detached = Command::new("losetup").arg("-d").arg(&self.path).status();
        let _unmounted = Command::new("umount").arg(&self.mount).status();
    }
}
