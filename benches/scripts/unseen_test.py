#!/usr/bin/env python3
"""Commands that write past the block layer, and commands of zones, noticed by capture, in a guest that has such disks.

Environment: KERNELS ("6.1 6.12"), KEEP. The guest has a SCSI disk, an NVMe disk and a zoned NVMe disk of QEMU's. Asserted, by
`unseen_commands` in the guest: a usual write is seen; an SG_IO write, an NVMe I/O command by ioctl, a zone reset and a zone
append (6.1; later kernels make a usual write of it) are each told as commands without a known range, once; runs of a program that the kernel leaves out because one is
running on that processor are counted, and no false alarm; the head of an NVMe multipath, whose paths write for it unseen, is
refused. What the agent does then (a compare, points demoted) is shown
by the agent's own tests. Called by `make unseen-test`, and with one kernel by the suite. Needs no root.
"""

import sys

from guest import MODULES, Guest, Missing, initramfs, kernel, need
from lab import LabError, run
from runner import main, say, setting, skipped

MORE_MODULES = ("virtio_scsi", "sd_mod", "nvme", "zonefs", "null_blk")
SIZE = 32 << 20
NOTICED = ("SG_IO: noticed", "NVMe I/O command: noticed", "zone reset: noticed", "left out:")
# zonefs appends with the zone's own command in these, in others with usual writes.
APPENDS = {"6.1": "zone append: noticed"}
# Two disks of nothing: one is done with a write at once, the other by a timer's interrupt.
NULL_DISKS = """
mount -t configfs config /sys/kernel/config 2>/dev/null
for mode in 0 2; do
    disk=/sys/kernel/config/nullb/mode$mode
    mkdir $disk && echo $mode >$disk/irqmode && echo 2000 >$disk/completion_nsec && echo 64 >$disk/size || exit 1
    echo 1 >$disk/power || exit 1
    # Some kernels name it by the folder.
    [ -e /dev/mode$mode ] && echo mode$mode >>/run/nulls || echo nullb$(cat $disk/index) >>/run/nulls
done
"""


def devices(lab):
    """QEMU's words for the three disks."""
    words = []
    for name in ("scsi", "nvme", "zoned"):
        with open(lab.dir / f"{name}.raw", "wb") as made:
            made.truncate(SIZE)
        words += ["-drive", f"if=none,id={name},format=raw,file={lab.dir / name}.raw"]
    return [*words, "-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=scsi,bus=bus.0",
            "-device", "nvme,id=plain,serial=plain", "-device", "nvme-ns,drive=nvme,bus=plain",
            "-device", "nvme,id=zones,serial=zones",
            "-device", "nvme-ns,drive=zoned,bus=zones,zoned=true,zoned.zone_size=4M"]


def start(lab, found, initrd, append):
    guest = Guest(lab, found, initrd, [], devices=devices(lab), append=append)
    say(f"  booted in {guest.start():.0f} s")
    guest.run("for i in $(seq 50); do [ -e /dev/sda ] && [ -e /dev/nvme0n1 ] && [ -e /dev/nvme1n1 ] && exit 0; sleep 0.2; done; exit 1")
    return guest


def kernel_test(lab, version):
    need("qemu-system-x86_64", "busybox", "strip")
    found = kernel(version)
    say(f"kernel {version}: {found.release}")
    program = lab.dir / "unseen_commands"
    if not (lab.binaries / program.name).exists():
        raise LabError(f"{lab.binaries / program.name} is missing; run `cargo build --workspace --bins`")
    # Debug information would be most of the guest's memory.
    run("strip", "-o", program, lab.binaries / program.name)
    initrd = lab.dir / "initrd"
    initramfs(initrd, found, {program: "/bin/unseen_commands"}, MODULES + MORE_MODULES)
    guest = start(lab, found, initrd, "nvme_core.multipath=Y")
    told = guest.run("unseen_commands refused:/dev/nvme0n1 /mnt")
    say(f"  {told.strip()}")
    if "multipath" not in told:
        raise LabError("an NVMe multipath is not refused as one")
    guest.cut()
    guest = start(lab, found, initrd, "nvme_core.multipath=N")
    zoned = guest.run("grep -l host-managed /sys/block/nvme*/queue/zoned").split("/")[3]
    plain = "nvme0n1" if zoned == "nvme1n1" else "nvme1n1"
    guest.run(NULL_DISKS)
    nulls = " ".join(f"/dev/{line}" for line in guest.run("cat /run/nulls").split())
    code, told = guest.try_run(f"unseen_commands scsi:/dev/sda nvme:/dev/{plain} zoned:/dev/{zoned} "
                               f"skipped:{nulls.replace(' ', ',')} /mnt", 300)
    if code:
        raise LabError(f"unseen_commands: {told}\n{guest.run('dmesg | tail')}")
    for line in told.splitlines():
        say(f"  {line}")
    missing = [words for words in (*NOTICED, APPENDS.get(version, "zone append:")) if words not in told]
    if missing:
        raise LabError(f"not noticed: {', '.join(missing)}")
    guest.off()


def body(lab):
    top = lab.dir
    for version in setting("KERNELS", "6.1 6.12").split():
        lab.dir = top / version
        lab.dir.mkdir()
        try:
            kernel_test(lab, version)
        except Missing as error:
            skipped(f"no guest with kernel {version}: {error}")
        finally:
            lab.dir = top


if __name__ == "__main__":
    sys.exit(main("unseen-test", body))
