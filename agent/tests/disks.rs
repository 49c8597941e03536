//! Enumeration and classification on trees of files that look like machines: Azure of both generations, NVMe, LVM,
//! software RAID, multipath.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use reprotect_agent::disks::{Class, Disk, SelectError, SystemRoot, enumerate, select};

/// A machine made of files.
struct Machine {
    dir: tempfile::TempDir,
    minor: u32,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { dir: tempfile::tempdir().expect("temporary directory"), minor: 0 };
        machine.write("proc/self/mountinfo", "");
        machine.write("proc/swaps", "Filename Type Size Used Priority\n");
        fs::create_dir_all(machine.path("sys/block")).expect("sys/block");
        machine
    }

    fn in_azure() -> Self {
        let machine = Self::new();
        machine.write("sys/class/dmi/id/chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n");
        machine
    }

    fn root(&self) -> SystemRoot {
        SystemRoot::at(self.dir.path())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, text).expect("write");
    }

    fn append(&self, path: &str, text: &str) {
        let before = fs::read_to_string(self.path(path)).expect("read");
        self.write(path, &format!("{before}{text}"));
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        symlink(target, path).expect("symlink");
    }

    /// A disk whose device directory is `device` below `sys/devices`; 64 GiB with the given partitions.
    fn disk(&mut self, name: &str, device: &str, partitions: u32) {
        let dir = format!("sys/devices/{device}/block/{name}");
        self.node(&dir, name);
        self.write(&format!("{dir}/removable"), "0\n");
        self.write(&format!("{dir}/ro"), "0\n");
        self.write(&format!("{dir}/queue/logical_block_size"), "512\n");
        self.write(&format!("{dir}/queue/physical_block_size"), "4096\n");
        self.link(&format!("{dir}/device"), "../..");
        self.link(&format!("sys/block/{name}"), &format!("../devices/{device}/block/{name}"));
        let infix = if name.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        for number in 1..=partitions {
            let part = format!("{name}{infix}{number}");
            self.node(&format!("{dir}/{part}"), &part);
            self.write(&format!("{dir}/{part}/partition"), &format!("{number}\n"));
            self.write(&format!("{dir}/{part}/start"), &format!("{}\n", 2048 * number));
        }
    }

    fn node(&mut self, dir: &str, name: &str) {
        self.minor += 1;
        self.write(&format!("{dir}/dev"), &format!("8:{}\n", self.minor));
        self.write(&format!("{dir}/size"), "134217728\n");
        self.write(&format!("dev/{name}"), "");
    }

    fn attribute(&self, disk: &str, path: &str, text: &str) {
        self.write(&format!("sys/block/{disk}/{path}"), text);
    }

    /// `upper` is built upon `lower` (a disk, or `disk/partition`).
    fn holds(&self, upper: &str, lower: &str) {
        self.attribute(lower, &format!("holders/{upper}"), "");
        let name = lower.rsplit('/').next().expect("a name");
        self.attribute(upper, &format!("slaves/{name}"), "");
    }

    fn mapper(&mut self, name: &str, mapper: &str, uuid: &str) {
        self.disk(name, &format!("virtual/{name}"), 0);
        self.attribute(name, "dm/name", mapper);
        self.attribute(name, "dm/uuid", uuid);
        self.link(&format!("dev/mapper/{mapper}"), &format!("../{name}"));
    }

    fn number(&self, node: &str) -> String {
        fs::read_to_string(self.path(&format!("sys/block/{node}/dev"))).expect("dev").trim().to_owned()
    }

    fn mount(&self, number: &str, point: &str, source: &str) {
        self.append(
            "proc/self/mountinfo",
            &format!("30 1 {number} / {point} rw shared:1 - ext4 {source} rw\n"),
        );
    }

    fn disks(&self) -> Vec<Disk> {
        enumerate(&self.root()).expect("enumerate")
    }
}

fn by_name<'a>(disks: &'a [Disk], name: &str) -> &'a Disk {
    disks.iter().find(|disk| disk.name == name).expect("the disk is listed")
}

fn class(disks: &[Disk], name: &str) -> (Class, bool) {
    let verdict = &by_name(disks, name).verdict;
    assert!(!verdict.reason.is_empty(), "{name} has no reason");
    (verdict.class, verdict.selected)
}

const IDE_ROOT: &str = "ACPI0004:00/VMBUS:00/00000000-0000-8899-0000-000000000000";
const IDE_RESOURCE: &str = "ACPI0004:00/VMBUS:00/00000000-0001-8899-0000-000000000000";
const SCSI_0: &str = "ACPI0004:00/VMBUS:00/f8b3781a-1e82-4818-a1c3-63d806ec15bb";
const SCSI_1: &str = "ACPI0004:00/VMBUS:00/f8b3781b-1e82-4818-a1c3-63d806ec15bb";

fn with_bus_identity(machine: &Machine, bus: &str) {
    let id = Path::new(bus).file_name().expect("name").to_str().expect("text");
    machine.write(&format!("sys/devices/{bus}/device_id"), &format!("{{{id}}}\n"));
}

#[test]
fn azure_generation_1_keeps_os_and_data_and_leaves_the_resource_disk() {
    let mut machine = Machine::in_azure();
    for bus in [IDE_ROOT, IDE_RESOURCE, SCSI_1] {
        with_bus_identity(&machine, bus);
    }
    machine.disk("sda", &format!("{IDE_ROOT}/host0/target0:0:0/0:0:0:0"), 2);
    machine.disk("sdb", &format!("{IDE_RESOURCE}/host1/target1:0:1/1:0:1:0"), 1);
    machine.disk("sdc", &format!("{SCSI_1}/host2/target2:0:0/2:0:0:1"), 0);
    machine.disk("sr0", &format!("{IDE_RESOURCE}/host1/target1:0:0/1:0:0:0"), 0);
    machine.attribute("sr0", "device/type", "5\n");
    machine.mount(&machine.number("sda/sda1"), "/", "/dev/root");
    machine.mount(&machine.number("sdb/sdb1"), "/mnt", "/dev/sdb1");
    let disks = machine.disks();
    assert_eq!(class(&disks, "sda"), (Class::Disk, true));
    assert_eq!(class(&disks, "sdb"), (Class::AzureTemporary, false));
    assert_eq!(class(&disks, "sdc"), (Class::Disk, true), "unit 1 of a data controller is a data disk");
    assert_eq!(class(&disks, "sr0"), (Class::Optical, false));
    assert_eq!(by_name(&disks, "sda").mounts[0].device, "sda1");
    assert!(by_name(&disks, "sdb").verdict.reason.contains("second IDE channel"));
}

#[test]
fn azure_generation_2_keeps_unit_0_and_leaves_unit_1_of_the_first_controller() {
    let mut machine = Machine::in_azure();
    with_bus_identity(&machine, SCSI_0);
    machine.disk("sda", &format!("{SCSI_0}/host0/target0:0:0/0:0:0:0"), 1);
    machine.disk("sdb", &format!("{SCSI_0}/host0/target0:0:0/0:0:0:1"), 1);
    let disks = machine.disks();
    assert_eq!(class(&disks, "sda"), (Class::Disk, true));
    assert_eq!(class(&disks, "sdb"), (Class::AzureTemporary, false));
}

#[test]
fn the_same_bus_positions_outside_azure_are_ordinary_disks() {
    let mut machine = Machine::new();
    with_bus_identity(&machine, IDE_RESOURCE);
    with_bus_identity(&machine, SCSI_0);
    machine.disk("sda", &format!("{SCSI_0}/host0/target0:0:0/0:0:0:1"), 1);
    machine.disk("sdb", &format!("{IDE_RESOURCE}/host1/target1:0:1/1:0:1:0"), 1);
    let disks = machine.disks();
    assert_eq!(class(&disks, "sda"), (Class::Disk, true));
    assert_eq!(class(&disks, "sdb"), (Class::Disk, true));
}

#[test]
fn each_other_fact_alone_reveals_the_temporary_disk() {
    let mut symlinked = Machine::new();
    symlinked.disk("sda", "pci/a", 1);
    symlinked.disk("sdb", "pci/b", 1);
    symlinked.link("dev/disk/azure/resource", "../../sdb");
    let mut labelled = Machine::new();
    labelled.disk("sda", "pci/a", 1);
    labelled.disk("sdb", "pci/b", 1);
    labelled.link("dev/disk/by-label/Temporary\\x20Storage", "../../sdb1");
    let mut warned = Machine::new();
    warned.disk("sda", "pci/a", 1);
    warned.disk("sdb", "pci/b", 1);
    warned.mount(&warned.number("sdb/sdb1"), "/mnt/resource", "/dev/sdb1");
    warned.write("mnt/resource/DATALOSS_WARNING_README.txt", "gone after redeploy");
    let mut named = Machine::new();
    named.disk("sda", "pci/a", 1);
    named.disk("sdb", "pci/b", 1);
    named.attribute("sdb", "sdb1/uevent", "DEVTYPE=partition\nPARTNAME=Temporary Storage\n");
    for machine in [symlinked, labelled, warned, named] {
        let disks = machine.disks();
        assert_eq!(class(&disks, "sda"), (Class::Disk, true));
        assert_eq!(class(&disks, "sdb"), (Class::AzureTemporary, false));
    }
}

#[test]
fn nvme_disks_are_told_apart_by_model_and_their_hidden_paths_are_not_listed() {
    let mut machine = Machine::new();
    machine.disk("nvme0n1", "pci/nvme/nvme0", 2);
    machine.disk("nvme1n1", "pci/nvme/nvme1", 0);
    machine.disk("nvme0c0n1", "pci/nvme/nvme0c0", 0);
    machine.attribute("nvme0c0n1", "hidden", "1\n");
    machine.attribute("nvme0n1", "device/model", "MSFT NVMe Accelerator v1.0      \n");
    machine.attribute("nvme0n1", "wwid", "uuid.0a1b\n");
    machine.attribute("nvme1n1", "device/model", "Microsoft NVMe Direct Disk v2\n");
    let disks = machine.disks();
    assert_eq!(disks.len(), 2);
    assert_eq!(class(&disks, "nvme0n1"), (Class::Disk, true));
    assert_eq!(class(&disks, "nvme1n1"), (Class::AzureTemporary, false));
    let first = by_name(&disks, "nvme0n1");
    assert_eq!(first.model.as_deref(), Some("MSFT NVMe Accelerator v1.0"));
    assert_eq!(first.stable_id().as_deref(), Some("uuid.0a1b"));
    assert_eq!(first.partitions[1].name, "nvme0n1p2");
    assert_eq!((first.bytes, first.physical_sector_bytes), (64 << 30, 4096));
}

#[test]
fn lvm_uses_reach_the_disk_below_and_the_volumes_are_left_out() {
    let mut machine = Machine::new();
    machine.disk("sda", "pci/a", 2);
    machine.mapper("dm-0", "vg-root", "LVM-abc");
    machine.mapper("dm-1", "vg-swap", "LVM-def");
    machine.mapper("dm-2", "crypt", "CRYPT-LUKS2-x");
    machine.holds("dm-0", "sda/sda2");
    machine.holds("dm-1", "sda/sda2");
    machine.holds("dm-2", "dm-0");
    machine.mount(&machine.number("dm-2"), "/", "/dev/mapper/crypt");
    machine.mount("0:44", "/btrfs", "/dev/mapper/vg-root");
    machine.append("proc/swaps", "/dev/mapper/vg-swap partition 8 0 -2\n");
    let disks = machine.disks();
    let sda = by_name(&disks, "sda");
    let points: Vec<&str> = sda.mounts.iter().map(|mount| mount.mount_point.as_str()).collect();
    assert_eq!(points, ["/", "/btrfs"], "through two layers, and by source where the number is anonymous");
    assert_eq!(sda.swap, ["dm-1"]);
    assert_eq!(sda.holders, ["dm-0", "dm-1", "dm-2"]);
    assert_eq!(class(&disks, "sda"), (Class::Disk, true));
    for volume in ["dm-0", "dm-1", "dm-2"] {
        assert_eq!(class(&disks, volume), (Class::DeviceMapper, false));
    }
    assert!(by_name(&disks, "dm-0").verdict.reason.contains("protect sda2"));
}

#[test]
fn software_raid_protects_its_members() {
    let mut machine = Machine::new();
    machine.disk("sda", "pci/a", 1);
    machine.disk("sdb", "pci/b", 1);
    machine.disk("md127", "virtual/md127", 1);
    machine.holds("md127", "sda/sda1");
    machine.holds("md127", "sdb/sdb1");
    machine.mount(&machine.number("md127/md127p1"), "/srv", "/dev/md127p1");
    let disks = machine.disks();
    assert_eq!(class(&disks, "md127"), (Class::SoftwareRaid, false));
    for member in ["sda", "sdb"] {
        assert_eq!(class(&disks, member), (Class::Disk, true));
        assert_eq!(by_name(&disks, member).mounts[0].mount_point, "/srv");
    }
}

#[test]
fn a_multipath_device_is_protected_once_and_its_paths_never() {
    let mut machine = Machine::new();
    machine.disk("sda", "pci/a", 0);
    machine.disk("sdb", "pci/b", 0);
    machine.mapper("dm-0", "mpatha", "mpath-3600508b");
    machine.mapper("dm-1", "mpatha-part1", "part1-mpath-3600508b");
    machine.holds("dm-0", "sda");
    machine.holds("dm-0", "sdb");
    machine.holds("dm-1", "dm-0");
    machine.mount(&machine.number("dm-1"), "/", "/dev/mapper/mpatha-part1");
    let disks = machine.disks();
    assert_eq!(class(&disks, "dm-0"), (Class::Multipath, true));
    assert_eq!(class(&disks, "dm-1"), (Class::DeviceMapper, false));
    assert_eq!(class(&disks, "sda"), (Class::MultipathPath, false));
    assert_eq!(class(&disks, "sdb"), (Class::MultipathPath, false));
    assert_eq!(by_name(&disks, "dm-0").stable_id().as_deref(), Some("mpath-3600508b"));
    assert_eq!(by_name(&disks, "dm-0").path, Path::new("/dev/mapper/mpatha"));
    let refused = select(&machine.root(), &disks, &["sda".to_owned()], &[]).unwrap_err();
    assert!(refused.to_string().contains("/dev/mapper/mpatha"), "{refused}");
}

#[test]
fn what_is_not_worth_protecting_says_why_and_may_be_included() {
    let mut machine = Machine::new();
    for (index, name) in ["sda", "sdb", "sdc", "sdd", "loop0", "loop1", "loop2", "zram0"].iter().enumerate() {
        machine.disk(name, &format!("pci/{index}"), u32::from(*name == "loop1" || *name == "sdc"));
    }
    machine.attribute("sda", "removable", "1\n");
    machine.attribute("sdb", "ro", "1\n");
    machine.append("proc/swaps", "/dev/sdc1 partition 8 0 -2\n");
    machine.attribute("sdd", "size", "0\n");
    machine.attribute("loop0", "loop/backing_file", "/srv/a.img\n");
    machine.attribute("loop2", "size", "0\n");
    let disks = machine.disks();
    for (name, expected) in [
        ("sda", (Class::Removable, false)),
        ("sdb", (Class::ReadOnly, false)),
        ("sdc", (Class::Swap, false)),
        ("sdd", (Class::Empty, false)),
        ("loop0", (Class::Loop, false)),
        ("loop1", (Class::Loop, true)),
        ("loop2", (Class::Empty, false)),
        ("zram0", (Class::Ram, false)),
    ] {
        assert_eq!(class(&disks, name), expected, "{name}");
    }
    let names = |include: &[&str], exclude: &[&str]| {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        select(&machine.root(), &disks, &owned(include), &owned(exclude))
            .map(|sources| sources.into_iter().map(|source| source.name).collect::<Vec<_>>())
    };
    assert_eq!(names(&[], &[]).unwrap(), ["loop1"]);
    assert_eq!(names(&["loop0", "/dev/sda", "/dev/sda"], &["loop1"]).unwrap(), ["loop0", "sda"]);
    assert_eq!(names(&["*"], &["sd*"]).unwrap(), ["loop0", "loop1"], "a pattern passes over what cannot be");
    assert!(matches!(names(&["zram0"], &[]), Err(SelectError::Impossible { .. })));
    assert!(matches!(names(&["sdx"], &[]), Err(SelectError::NoMatch { .. })));
    assert!(matches!(names(&["/srv/none.img"], &[]), Err(SelectError::NoMatch { .. })));
    machine.write("srv/disk.img", &"x".repeat(1024));
    assert_eq!(names(&["/srv/disk.img", "/srv/disk.img"], &["loop1"]).unwrap(), ["disk.img"]);
    machine.link("dev/disk/by-id/usb-stick", "../../sda");
    assert_eq!(names(&["/dev/disk/by-id/usb-stick"], &["loop*"]).unwrap(), ["sda"]);
}

#[test]
fn a_machine_without_sysfs_is_an_error_and_not_an_empty_list() {
    let dir = tempfile::tempdir().unwrap();
    let error = enumerate(&SystemRoot::at(dir.path())).unwrap_err();
    assert!(error.to_string().contains("sys/block"), "{error}");
}
