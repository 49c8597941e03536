#!/usr/bin/env python3
"""A disk comes home, told so that a person can follow: sync, follow changes, stop, prove.

Environment: SIZE (1G), TARGET (flat), RELAY (1), KEEP (0), SEED (1). Ends with `demo: OK` and status 0; anything else
is a failure. Leaves nothing behind unless KEEP=1. As root on a loop device with a mounted file system; otherwise on an
image file that debugfs changes. Called by `make demo`.
"""

import os
import random
import shutil
import sys
import time
from pathlib import Path

from lab import Lab, LabError, is_root, mib, run, say
from make_image import make_image, parse_size
from pipeline import KINDS, Pipeline
from proof import is_device, same_files, whole_disk

STEPS = 8


class Story:
    """Numbers the chapters, with the seconds since the beginning."""

    def __init__(self):
        self.at, self.begun = 0, time.monotonic()

    def __call__(self, text):
        self.at += 1
        say(f"\n[{self.at}/{STEPS}] {time.monotonic() - self.begun:4.0f} s  {text}")


class MountedSource:
    """The machine's disk: a loop device with a mounted file system."""

    def __init__(self, lab, image):
        self.lab = lab
        self.path = lab.loop(image)
        self.root = lab.mount(self.path, "machine")

    def change(self, wave, rng):
        """Writes, overwrites, appends, renames, removes; answers what was done."""
        files = sorted(path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        folder = self.root / f"changes-{wave}"
        folder.mkdir()
        for number in range(20):
            (folder / f"new-{number}.bin").write_bytes(rng.randbytes(rng.randrange(1, 300_000)))
        chosen = rng.sample(files, min(30, len(files)))
        for path in chosen[:10]:
            with open(path, "r+b") as file:
                file.seek(rng.randrange(path.stat().st_size + 1))
                file.write(b"overwritten in wave %d " % wave * rng.randrange(1, 500))
        for path in chosen[10:20]:
            path.rename(folder / f"renamed-{path.name}")
        for path in chosen[20:]:
            path.unlink()
        # Of this file system only: the machine's other writers are none of our business.
        run("sync", "--file-system", self.root)
        return f"20 files written, {len(chosen[:10])} overwritten in place, {len(chosen[10:20])} renamed, " \
               f"{len(chosen[20:])} removed"

    def rest(self):
        """Makes the state final."""
        self.lab.unmount(self.root)
        run("blockdev", "--flushbufs", self.path)


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


def demo(lab, size, kind, relay, seed):
    story, rng, begun = Story(), random.Random(seed), time.monotonic()
    lab.need_space(size * 5 // 2, f"a demo of {mib(size)}")
    story(f"A machine in the cloud has a disk of {mib(size)}, half full (seed {seed}).")
    image = lab.dir / "disk.raw"
    make_image(image, size, 50, seed)
    if is_root():
        source = MountedSource(lab, image)
        say(f"      {source.path}, ext4, mounted like a running machine's")
    else:
        source = ImageSource(lab, image)
        say("      NOT ROOT: no loop device and no mount; the disk is the image file itself, debugfs changes it")
    story("Three daemons start on loopback, each enrolled with a one-time token and a fresh certificate.")
    pipeline = Pipeline(lab, source.path, relay=relay, agent={"scan_interval": "500ms"},
                        target={"retention": {"path": str(lab.dir / "retention"), "undo_epoch": "2s",
                                              "segment_bytes": "64 MiB"}})
    pipeline.start()
    path = "agent -> process server -> master target" if relay else "agent -> master target"
    say(f"      {path}; logs in {lab.dir}")
    story(f"The master target is told to protect it ({kind}), the initial sync runs.")
    sync_begun = time.monotonic()
    pipeline.protect(kind, original=make_target(lab, kind, size), overwrite=kind == "device")
    disk = pipeline.wait_synced(max(300, size / 5e6))
    span = time.monotonic() - sync_begun
    show_counters(pipeline, span)
    say(f"      {mib(size)} in {span:.1f} s: {size / 1e6 / span:,.0f} MB/s of disk")
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
            demo(lab, size, kind, relay, int(os.environ.get("SEED") or 1))
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
