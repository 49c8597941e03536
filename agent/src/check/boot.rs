//! Whether the machine will boot as a VMware virtual machine: drivers, file-system table, boot loader, network.
//!
//! Invariants: only WARNs, because a replica of data is worth having even where the machine needs a hand to boot; all
//! files are read below a [`SystemRoot`], so that tests need no machine. Called by [`super::all`].

use std::path::{Path, PathBuf};
use std::process::Command;

use reprotect_engine::host::preflight::Finding;

use crate::disks::SystemRoot;

/// The running kernel, and how its initial RAM disk is listed.
pub(super) struct Kernel {
    pub(super) release: String,
    /// The files in the RAM disk, one a line; `None` when it cannot be listed.
    pub(super) list: fn(&Path) -> Option<String>,
}

impl Kernel {
    pub(super) fn running() -> Self {
        Self {
            release: rustix::system::uname().release().to_string_lossy().into_owned(),
            list: list_initramfs,
        }
    }
}

/// Debian's and Red Hat's own listers know every compression there is.
fn list_initramfs(image: &Path) -> Option<String> {
    ["lsinitramfs", "lsinitrd"].into_iter().find_map(|program| {
        let output =
            Command::new(program).arg(image).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

/// Disk controllers a VMware machine may have, one of which must work before the root file system is there.
const CONTROLLERS: [&str; 2] = ["mptspi", "vmw_pvscsi"];
/// VMware's network card.
const NETWORK: &str = "vmxnet3";

pub(super) fn findings(root: &SystemRoot, kernel: &Kernel) -> Vec<Finding> {
    vec![drivers(root, kernel), fstab(root), boot_loader(root), network(root)]
}

fn drivers(root: &SystemRoot, kernel: &Kernel) -> Finding {
    let name = "boot-drivers";
    let modules = Path::new("/lib/modules").join(&kernel.release);
    let read = |file: &str| std::fs::read_to_string(root.join(modules.join(file))).unwrap_or_default();
    let (builtin, available) = (read("modules.builtin"), read("modules.dep"));
    if builtin.is_empty() && available.is_empty() {
        let text =
            format!("the modules of kernel {} are not there to be looked at (a container?)", kernel.release);
        return Finding::warn(name, text, "run this check on the machine itself");
    }
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .chain([NETWORK])
        .filter(|driver| !has_module(&builtin, driver) && !has_module(&available, driver))
        .collect();
    if !missing.is_empty() {
        return Finding::warn(
            name,
            format!("kernel {} has no {}", kernel.release, missing.join(", ")),
            "install the distribution's generic kernel beside the cloud kernel (Debian: linux-image-amd64, Ubuntu: linux-image-generic) and make it the default before failback",
        );
    }
    let images = ["initrd.img-", "initramfs-", "initrd-"].map(|prefix| {
        let suffix = if prefix == "initramfs-" { ".img" } else { "" };
        PathBuf::from(format!("/boot/{prefix}{}{suffix}", kernel.release))
    });
    let listed = images
        .iter()
        .map(|image| root.join(image))
        .find(|image| image.exists())
        .and_then(|image| (kernel.list)(&image));
    let Some(listed) = listed else {
        let text = format!("the initial RAM disk of kernel {} cannot be listed", kernel.release);
        return Finding::warn(
            name,
            text,
            "check by hand that it holds mptspi and vmw_pvscsi (`lsinitramfs` or `lsinitrd`)",
        );
    };
    let absent: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|driver| !has_module(&builtin, driver) && !has_module(&listed, driver))
        .collect();
    if absent.is_empty() {
        return Finding::pass(
            name,
            format!("kernel {} has the drivers, its initial RAM disk too", kernel.release),
        );
    }
    Finding::warn(
        name,
        format!(
            "the initial RAM disk has no {}: the machine would not find its root disk",
            absent.join(", ")
        ),
        "Debian, Ubuntu: add the names to /etc/initramfs-tools/modules and run `update-initramfs -u`; Red Hat, SUSE: `dracut -f --add-drivers \"mptspi vmw_pvscsi vmxnet3\"`",
    )
}

/// Whether a list of module paths names `module`, whatever its compression; `-` and `_` are one to the kernel.
fn has_module(list: &str, module: &str) -> bool {
    list.split(|c: char| c.is_whitespace() || c == ':').any(|path| {
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == module)
    })
}

/// Whether a device is named by where it happens to be attached.
fn is_volatile(device: &str) -> bool {
    let name = device.strip_prefix("/dev/").unwrap_or_default();
    ["sd", "hd", "vd", "xvd", "nvme", "disk/cloud/", "disk/azure/", "disk/by-path/"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

fn fstab(root: &SystemRoot) -> Finding {
    let name = "boot-fstab";
    let Ok(text) = std::fs::read_to_string(root.join("/etc/fstab")) else {
        return Finding::warn(
            name,
            "/etc/fstab cannot be read",
            "look at it by hand: devices must be named by UUID",
        );
    };
    let entries = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let volatile: Vec<&str> = entries
        .filter(|line| {
            !line.split_whitespace().nth(3).is_some_and(|options| options.split(',').any(|o| o == "nofail"))
        })
        .filter_map(|line| line.split_whitespace().next())
        .filter(|device| is_volatile(device))
        .collect();
    if volatile.is_empty() {
        return Finding::pass(name, "/etc/fstab names no device by its place");
    }
    Finding::warn(
        name,
        format!("/etc/fstab names {}, which is another disk or none on VMware", volatile.join(", ")),
        "write UUID=… as `blkid` prints it, or add the option nofail where the disk does not come along",
    )
}

fn boot_loader(root: &SystemRoot) -> Finding {
    let name = "boot-loader";
    let text = std::fs::read_to_string(root.join("/proc/cmdline")).unwrap_or_default();
    match text.split_whitespace().find_map(|word| word.strip_prefix("root=")) {
        Some(device) if is_volatile(device) => Finding::warn(
            name,
            format!("the kernel is started with root={device}, which is another disk or none on VMware"),
            "remove GRUB_DISABLE_LINUX_UUID from /etc/default/grub and run `update-grub` (or grub2-mkconfig)",
        ),
        Some(device) => Finding::pass(name, format!("the kernel is started with root={device}")),
        None => Finding::warn(
            name,
            "the kernel's command line names no root device",
            "check the boot loader by hand",
        ),
    }
}

fn network(root: &SystemRoot) -> Finding {
    let name = "boot-network";
    let rules = "/etc/udev/rules.d/70-persistent-net.rules";
    if root.join(rules).exists() {
        let text = format!("{rules} ties interface names to this machine's cards");
        return Finding::warn(name, text, "remove it before failback; the new card has another address");
    }
    let files = ["/etc/netplan", "/etc/NetworkManager/system-connections", "/etc/sysconfig/network-scripts"];
    for dir in files {
        for entry in std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default().to_lowercase();
            if ["macaddress:", "mac-address=", "hwaddr="].iter().any(|key| text.contains(key)) {
                return Finding::warn(
                    name,
                    format!(
                        "{dir}/{} ties the configuration to a card's address",
                        entry.file_name().to_string_lossy()
                    ),
                    "match by interface name instead, or keep a console at hand at failback: the new card has another address",
                );
            }
        }
    }
    Finding::pass(name, "no configuration is tied to a card's address")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, SystemRoot) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let root = SystemRoot::at(dir.path());
        (dir, root)
    }

    fn kernel(list: fn(&Path) -> Option<String>) -> Kernel {
        Kernel { release: "6.1".into(), list }
    }

    const MODULES: (&str, &str) = (
        "lib/modules/6.1/modules.dep",
        "kernel/drivers/message/fusion/mptspi.ko.xz: kernel/x.ko\nkernel/drivers/scsi/vmw_pvscsi.ko:\nkernel/drivers/net/vmxnet3/vmxnet3.ko.zst:\n",
    );

    #[test]
    fn a_cloud_kernel_without_the_drivers_is_named_with_the_remedy() {
        let (_dir, root) = machine(&[("lib/modules/6.1/modules.dep", "kernel/drivers/scsi/sd_mod.ko:\n")]);
        let finding = drivers(&root, &kernel(|_| None));
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.reason.contains("mptspi, vmw_pvscsi, vmxnet3"), "{}", finding.reason);
        assert!(finding.remedy.contains("generic kernel"), "{}", finding.remedy);
    }

    #[test]
    fn the_initial_ram_disk_must_hold_the_controllers_or_the_kernel_have_them_built_in() {
        let (_dir, root) = machine(&[MODULES, ("boot/initrd.img-6.1", "")]);
        let without =
            drivers(&root, &kernel(|_| Some("usr/lib/modules/6.1/kernel/drivers/scsi/vmw_pvscsi.ko".into())));
        assert!(
            without.verdict == Verdict::Warn && without.reason.contains("no mptspi"),
            "{}",
            without.reason
        );
        let with = drivers(&root, &kernel(|_| Some("a/mptspi.ko.xz\nb/vmw-pvscsi.ko".into())));
        assert_eq!(with.verdict, Verdict::Pass, "{}", with.reason);
        let unlisted = drivers(&root, &kernel(|_| None));
        assert!(unlisted.verdict == Verdict::Warn && unlisted.reason.contains("cannot be listed"));
        let builtin = (
            "lib/modules/6.1/modules.builtin",
            "kernel/mptspi.ko\nkernel/vmw_pvscsi.ko\nkernel/vmxnet3.ko\n",
        );
        let (_dir, root) = machine(&[builtin, ("boot/initramfs-6.1.img", "")]);
        assert_eq!(drivers(&root, &kernel(|_| Some(String::new()))).verdict, Verdict::Pass);
    }

    #[test]
    fn devices_named_by_their_place_are_found_in_fstab_and_on_the_command_line() {
        let good = "# /dev/sda1 was\nUUID=1 / ext4 defaults 0 1\n/dev/mapper/vg-a /a xfs defaults 0 0\n/dev/disk/cloud/azure_resource-part1 /mnt auto defaults,nofail 0 2\n";
        let (_dir, root) = machine(&[("etc/fstab", good), ("proc/cmdline", "ro root=UUID=1 quiet\n")]);
        assert_eq!((fstab(&root).verdict, boot_loader(&root).verdict), (Verdict::Pass, Verdict::Pass));
        let bad = "UUID=1 / ext4 defaults 0 1\n/dev/sdc1 /data xfs defaults 0 0\n";
        let (_dir, root) = machine(&[("etc/fstab", bad), ("proc/cmdline", "root=/dev/sda1\n")]);
        let finding = fstab(&root);
        assert!(
            finding.verdict == Verdict::Warn && finding.reason.contains("/dev/sdc1"),
            "{}",
            finding.reason
        );
        assert_eq!(boot_loader(&root).verdict, Verdict::Warn);
    }

    #[test]
    fn network_settings_tied_to_a_card_are_found() {
        let (_dir, root) = machine(&[("etc/netplan/50-cloud-init.yaml", "match:\n  macaddress: 00:0d:3a\n")]);
        let finding = network(&root);
        assert!(finding.verdict == Verdict::Warn && finding.reason.contains("50-cloud-init.yaml"));
        let (_dir, root) = machine(&[("etc/netplan/a.yaml", "dhcp4: true\n")]);
        assert_eq!(network(&root).verdict, Verdict::Pass);
    }
}
