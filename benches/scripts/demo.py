#!/usr/bin/env python3
"""A disk comes home, told so that a person can follow.

Environment: SIZE (1G), TARGET (flat), RELAY (1), KEEP (0), SEED (1). Ends with `demo: OK` and status 0; anything else
is a failure. Leaves nothing behind unless KEEP=1. As root, on a loop device that is written to all the time: live capture,
an attack, the moment before it found, judged and brought home. Without root, on an image file that debugfs changes:
sync, scan rounds, stop, proof; it says what it cannot show. Called by `make demo`.
"""

import os
import random
import shutil
import sys
import time
from pathlib import Path

from lab import Lab, LabError, is_root, mib, run, say, wait_for
from live import DatabaseWriter, OrderedWriter, crash_points, judge, stamp, start_writers, stop_writers
from make_image import make_image, parse_size
from pipeline import KINDS, Pipeline
from proof import is_device, same_files, tree_digest, whole_disk

# Where the programs of the live machine write.
WORK = "work"


class Story:
    """Numbers the chapters, with the seconds since the beginning."""

    def __init__(self, steps):
        self.at, self.steps, self.begun = 0, steps, time.monotonic()

    def __call__(self, text):
        self.at += 1
        say(f"\n[{self.at}/{self.steps}] {time.monotonic() - self.begun:4.0f} s  {text}")


class ImageSource:
    """Without root: an image file whose files debugfs changes."""

    def __init__(self, lab, image):
        self.lab, self.path = lab, image

    def change(self, wave, rng):
        folder = self.lab.dir / f"changes-{wave}"
        folder.mkdir()
        commands = [f"mkdir changes-{wave}"]
        for number in range(20):
            (folder / f"new-{number}.bin").write_bytes(rng.randbytes(rng.randrange(1, 300_000)))
            commands.append(f"write {folder}/new-{number}.bin changes-{wave}/new-{number}.bin")
        script = folder / "commands"
        script.write_text("\n".join(commands) + "\n")
        run("debugfs", "-w", "-f", script, self.path)
        return "20 files written by debugfs"

    def rest(self):
        run("sync", self.path)


def make_target(lab, kind, size):
    """An attached disk to write to, where that is wanted; None for a new VMDK."""
    if kind != "device":
        return None
    if not is_root():
        raise LabError("TARGET=device needs root for a loop device")
    image = lab.dir / "attached.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    return lab.loop(image)


def show_counters(pipeline, span):
    """One line per hop."""
    count = pipeline.counters()
    rows = [("agent read from the disk", "agent_read"), ("agent sent, plain", "agent_plain"),
            ("agent sent, on the wire", "agent_sent"), ("process server received", "relay_received"),
            ("process server sent on", "relay_sent"), ("master target received", "target_received"),
            ("master target wrote", "target_written"), ("master target zeroed", "target_zeroed")]
    for text, key in rows:
        if count.get(key) is not None:
            say(f"      {text:<28}{mib(count[key]):>16}   {count[key] / 1e6 / span:>8,.0f} MB/s")


def begin(story, lab, source, size, kind, relay, agent):
    """Daemons, protection, initial sync; answers the pipeline, the disk, and when the sync began."""
    story("Three daemons start on loopback, each enrolled with a one-time token and a fresh certificate.")
    pipeline = Pipeline(lab, source, relay=relay, agent=agent,
                        target={"retention": {"path": str(lab.dir / "retention"), "undo_epoch": "2s",
                                              "segment_bytes": "64 MiB"}})
    pipeline.start()
    path = "agent -> process server -> master target" if relay else "agent -> master target"
    say(f"      {path}; logs in {lab.dir}")
    story(f"The master target is told to protect it ({kind}), the initial sync runs.")
    begun = time.monotonic()
    pipeline.protect(kind, original=make_target(lab, kind, size), overwrite=kind == "device")
    disk = pipeline.wait_synced(max(300, size / 5e6))
    span = time.monotonic() - begun
    show_counters(pipeline, span)
    say(f"      {mib(size)} in {span:.1f} s: {size / 1e6 / span:,.0f} MB/s of disk")
    return pipeline, disk, begun


def documents(root):
    """Digest of what stands still on the machine: everything but the folder of the programs that write."""
    return {name: entry for name, entry in tree_digest(root).items() if name.split("/")[0] != WORK}


def attack(root, rng):
    """Overwrites every document with noise and renames it; answers how many."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and WORK not in path.parts]
    for path in files:
        path.write_bytes(rng.randbytes(min(path.stat().st_size, 65536)))
        path.rename(path.with_name(path.name + ".locked"))
    run("sync", "--file-system", root)
    return len(files)


def why_not_live():
    """What is missing here for following a live disk; None where nothing is."""
    if not is_root():
        return "NOT ROOT"
    if run("losetup", "--find", check=False).returncode != 0:
        return "NO LOOP DEVICES (losetup --find says why)"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "NO TYPE INFORMATION of the kernel (/sys/kernel/btf/vmlinux)"
    lockdown = Path("/sys/kernel/security/lockdown")
    if lockdown.exists() and "[confidentiality]" in lockdown.read_text():
        return "A KERNEL IN LOCKDOWN (confidentiality)"
    return None


def live_demo(lab, size, kind, relay, seed):
    story, rng, begun = Story(9), random.Random(seed), time.monotonic()
    lab.need_space(size * 7 // 2, f"a demo of {mib(size)}")
    story(f"A machine in the cloud has a disk of {mib(size)}, half full (seed {seed}); a database and another program write to it.")
    image = lab.dir / "disk.raw"
    make_image(image, size, 50, seed)
    device = lab.loop(image)
    root = lab.mount(device, "machine")
    work = root / WORK
    work.mkdir()
    writers = [OrderedWriter(work), DatabaseWriter(work / "database", seed)]
    start_writers(lab, writers)
    say(f"      {device}, ext4, mounted; SQLite commits, the other program makes A durable before it writes B")
    pipeline, disk, _ = begin(story, lab, device, size, kind, relay, {"capture": {"interval": "1s"}})
    target, name = lab.target, disk["disk"]
    story("The agent follows every write in the kernel, and makes a crash-consistent point every second.")
    info = lab.agent.status()["disks"][0]
    if info["capture"] != "window":
        raise LabError(f"the disk is not followed: {info['capture']}")
    wait_for("five points", lambda: len(crash_points(target, name)) >= 5, 60, lab.agent.log)
    info = lab.agent.status()["disks"][0]
    age = time.time() - info["durable_as_of_ms"] / 1000
    say(f"      {len(crash_points(target, name))} points, {info['scan_rounds']} rounds; the newest durable state is "
        f"{age:.1f} s old; the disk was read {info['read_bytes'] / size:.1f} times since the start, the first sync included")
    story("Ransomware: every document is overwritten and renamed. The programs work on, the points go on.")
    before, moment = documents(root), time.time()
    say(f"      {attack(root, rng)} files lost; replication brings the damage home, as it must")
    stop_writers(lab)
    lab.unmount(root)
    pipeline.wait_followed(60, "after the attack")
    story("The moment just before is found by its time, mounted over NBD, read and judged.")
    when = stamp(moment)
    mount = target.command("mount", name, when)["mounts"][0]
    point, copy = mount["point"], lab.dir / "before.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", mount["uri"], copy, timeout=1800)
    target.command("unmount", mount["id"])
    judged = lab.dir / "judged.raw"
    run("cp", "--sparse=always", copy, judged)
    rows, count, found = judge(lab, judged, lab.dir / "before", WORK, documents)
    if found != before:
        raise LabError(f"the documents of point {point} are not those of before the attack")
    say(f"      {point} by {when}: journal replayed, e2fsck finds nothing; SQLite integrity_check ok, {rows} rows; "
        f"A and B in order at {count}; {len(found)} documents as they were")
    story("The machine goes home to that moment: the target is rolled back, read again, and released.")
    answer = target.command("failback", disk["agent"], "--point", point, "--verify", "whole", "--yes", timeout=1800)
    say(f"      {answer['state']} at {answer['point']} ({answer['class']})")
    pipeline.stop()
    story("Every byte is compared with what was mounted.")
    path = Path(disk["path"])
    for verdict in whole_disk(copy, path):
        say(f"      {verdict}")
    story("The result is started like a machine after a power cut, and compared file by file.")
    home = lab.dir / "home.raw"
    run("qemu-img", "convert", "-f", "raw" if is_device(path) else "vmdk", "-O", "raw", path, home, timeout=1800)
    *_, found = judge(lab, home, lab.dir / "home", WORK, documents)
    if found != before:
        raise LabError("the documents at home are not those of before the attack")
    say(f"      {len(found)} files, folders and links are the same by SHA-256, size, mode, owner and time")
    where = path if is_device(path) else f"{path.name} ({kind})"
    say(f"\nThe disk came home into {where}, as it was before the attack, in {time.monotonic() - begun:.0f} s.")


def demo(lab, size, kind, relay, seed, why):
    story, rng, begun = Story(8), random.Random(seed), time.monotonic()
    lab.need_space(size * 5 // 2, f"a demo of {mib(size)}")
    story(f"A machine in the cloud has a disk of {mib(size)}, half full (seed {seed}).")
    image = lab.dir / "disk.raw"
    make_image(image, size, 50, seed)
    source = ImageSource(lab, image)
    say(f"      {why}, so NOT SHOWN: live capture, crash-consistent points, the way back to before an attack.")
    say("      The disk is an image file, debugfs changes it, and it is scanned. Run `make demo` as root, on a kernel with eBPF and "
        "loop devices, for the rest.")
    pipeline, disk, sync_begun = begin(story, lab, source.path, size, kind, relay, {"scan_interval": "500ms"})
    story("The machine goes on working; the agent follows with scan rounds.")
    for wave in (1, 2):
        say(f"      wave {wave}: {source.change(wave, rng)}")
        followed = pipeline.wait_followed(max(120, size / 20e6))
        say(f"      followed: {followed['scan_rounds']} scan rounds durable, sequence {followed['durable']}")
    source.change(3, rng)
    story("The machine stops; the last round that began afterwards is durable; the daemons end.")
    source.rest()
    pipeline.wait_followed(max(120, size / 20e6), "last round")
    show_counters(pipeline, time.monotonic() - sync_begun)
    story("What the disk was can be had back: the newest recovery point is mounted over NBD and compared.")
    points = lab.target.command("points", disk["disk"], "--all")["points"]
    mount = lab.target.command("mount", disk["disk"], points[0]["point"])["mounts"][0]
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source.path, mount["uri"], timeout=1800)
    lab.target.command("unmount", mount["id"])
    say(f"      {len(points)} points; {points[0]['point']} is identical to the source")
    pipeline.stop()
    say("      all daemons ended cleanly on SIGTERM")
    story("Every byte is compared.")
    target = Path(disk["path"])
    for verdict in whole_disk(source.path, target):
        say(f"      {verdict}")
    story("The result is opened read-only and compared file by file.")
    count = same_files(lab, source.path, target)
    say(f"      {count} files, folders and links are the same by SHA-256, size, mode, owner and time")
    where = target if is_device(target) else f"{target.name} ({kind})"
    say(f"\nThe disk came home into {where} in {time.monotonic() - begun:.0f} s.")


def main():
    try:
        size = parse_size(os.environ.get("SIZE") or "1G")
        kind = os.environ.get("TARGET") or "flat"
        if kind not in KINDS:
            raise LabError(f"TARGET={kind} is unknown; there are {', '.join(KINDS)}")
        relay, keep = (os.environ.get("RELAY") or "1") != "0", os.environ.get("KEEP") == "1"
        if shutil.which("qemu-img") is None:
            raise LabError("qemu-img is not installed; run `make setup`")
        with Lab("demo", keep) as lab:
            seed, why = int(os.environ.get("SEED") or 1), why_not_live()
            if why is None:
                live_demo(lab, size, kind, relay, seed)
            else:
                demo(lab, size, kind, relay, seed, why)
    except Exception as error:
        # A failure of any kind ends with one readable line; LAB_TRACE=1 shows where it came from.
        if os.environ.get("LAB_TRACE"):
            raise
        say(f"\ndemo: FAILED: {error}")
        return 1
    say("demo: OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())
