#!/usr/bin/env python3
"""A source disk that is enlarged while it is protected and written to, with the three real programs.

Environment: SIZE (256M), GROWTHS (3), TARGET (flat), MODE (window), RELAY (1), SEED (random, printed), KEEP. Asserted: the
target grows without the disk being compared, also where the master target is killed in the middle of it; what was
written before, meanwhile and behind the old end is there, byte for byte, for `qemu-img` too; a point from before each
growth has the size and the content of then, running and read from the folder alone; a rollback to the first of them and
forward again changes nothing of that. Called by `make grow-test`.
"""

import json
import os
import random
import shutil
import sys
import threading
import time

from lab import LabError, is_root, mib, run, wait_for
from pipeline import Pipeline
from points_test import change
from proof import whole_disk
from runner import main, make_source, say, seed_setting, setting, size_setting, skipped

#: What a disk grows by: no whole tables, grains or blocks.
GROWTH = (37 << 20) + 512 * 9


class Writer(threading.Thread):
    """Writes to the first part of the disk for as long as it goes."""

    def __init__(self, source, size, seed):
        super().__init__(daemon=True)
        self.source, self.size, self.rng, self.going = source, size, random.Random(seed), True

    def run(self):
        while self.going:
            change(self.source, self.size, self.rng)
            time.sleep(0.05)


def enlarge(image, source, size, rng):
    """The disk has `size` bytes from now on, and something at both ends of its new part."""
    before = image.stat().st_size
    os.truncate(image, size)
    run("losetup", "--set-capacity", source)
    with open(source, "r+b", buffering=0) as file:
        for at in (before // 4096 * 4096, (size - 4096) // 4096 * 4096):
            file.seek(at)
            file.write(rng.randbytes(4096))
        os.fsync(file.fileno())


def mark(lab, source, name):
    """A point of a disk that stands still, and a copy taken at it."""
    lab.agent.command("mark", "--name", name)
    copy = lab.dir / f"{name}.raw"
    run("dd", f"if={source}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")
    return copy


def has_grown(pipeline, size):
    pipeline.check_alive()
    disk = pipeline.target_disk()
    status = pipeline.lab.agent.status()
    info = status["disks"][0] if status and status["disks"] else None
    if info and info["state"] == "stopped":
        raise LabError(f"the agent gave the disk up: {info['problem']}")
    return disk and disk["size_bytes"] == size and info and info["size_bytes"] == size


def grow(lab, pipeline, image, source, size, rng, kill):
    """Enlarges the disk under load; with `kill`, the master target dies somewhere in it."""
    before = lab.agent.status()["disks"][0]
    writer = Writer(source, image.stat().st_size, rng.random())
    writer.start()
    try:
        begun = time.monotonic()
        enlarge(image, source, size, rng)
        if kill:
            record = next(lab.target.state.glob("disks/*/disk.json"))
            wait_for("the growth begins", lambda: "grows_to_bytes" in record.read_text() or
                     json.loads(record.read_text())["size_bytes"] == size, 60, lab.target.log, pause=0.001)
            time.sleep(rng.uniform(0, 0.05))
            lab.target.kill()
            lab.target.start_and_wait()
        wait_for("the target has grown", lambda: has_grown(pipeline, size), 120, lab.target.log)
        span = time.monotonic() - begun
        pipeline.wait_followed(120, "under load")
    finally:
        writer.going = False
        writer.join()
    pipeline.wait_followed(120, "at rest")
    after = lab.agent.status()["disks"][0]
    steps = [step["to"] for step in lab.agent.status()["ladder"]]
    if "compare" in steps or after["unaccounted"]:
        raise LabError(f"the disk was compared: {steps}")
    say(f"  grown to {mib(size)} within {span:.1f} s{', the master target was killed meanwhile' if kill else ''}; "
        f"{mib(after['read_bytes'] - before['read_bytes'])} read")


def check_points(lab, disk, copies):
    """Each point is its copy, and as long."""
    for name, copy in copies:
        path = lab.dir / "point.raw"
        lab.target.command("export", disk, name, "--format", "raw", "-o", path, timeout=600)
        if path.stat().st_size != copy.stat().st_size:
            raise LabError(f"point {name} has {path.stat().st_size} bytes, the disk had {copy.stat().st_size} then")
        run("cmp", copy, path)
        path.unlink()
        mount = lab.target.command("mount", disk, name)["mounts"][0]
        if int(run("nbdinfo", "--size", mount["uri"])) != copy.stat().st_size:
            raise LabError(f"point {name} is mounted with another size than it had")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, mount["uri"], timeout=600)
        lab.target.command("unmount", mount["id"])


def check_folder(lab, target, folder, path, disk, copies):
    """With nothing running."""
    listing = json.loads(run(target.binary, "journal", "list", folder, "--json"))
    known = {point["name"]: point["point"] for point in listing["disks"][0]["points"] if point["name"]}
    for name, copy in copies:
        out = lab.dir / "extracted.raw"
        run(target.binary, "journal", "extract", folder, "--disk", disk, "--point", known[name], "--target", path,
            "--format", "raw", "-o", out, "--json")
        run("cmp", copy, out)
        out.unlink()


def body(lab):
    if not is_root():
        skipped("a disk that grows needs root")
        return
    size, count, kind = size_setting("256M"), setting("GROWTHS", 3, int), setting("TARGET", "flat")
    seed = seed_setting()
    rng = random.Random(seed)
    lab.need_space((size + count * GROWTH) * (count + 4), f"a growth test of {mib(size)}")
    image, source = make_source(lab, size, 30, seed)
    folder = lab.dir / "retention"
    retention = {"path": str(folder), "undo_epoch": "3s", "segment_bytes": "32 MiB"}
    capture = {"mode": setting("MODE", "window"), "interval": "1s"}
    pipeline = Pipeline(lab, source, relay=setting("RELAY", "1") == "1", agent={"capture": capture},
                        target={"retention": retention})
    pipeline.start()
    pipeline.protect(kind)
    disk = pipeline.wait_synced(max(120, size / 5e6))["disk"]
    pipeline.wait_followed(60)
    copies = [("size-0", mark(lab, source, "size-0"))]
    for number in range(1, count + 1):
        grow(lab, pipeline, image, source, size + number * GROWTH, rng, kill=number != 1)
        copies.append((f"size-{number}", mark(lab, source, f"size-{number}")))
        check_points(lab, disk, copies)
    say(f"  {len(copies)} points, each with the size and content of its time")
    target, path = lab.target, pipeline.target_disk()["path"]
    lab.agent.stop()
    for name in ("size-0", f"size-{count}"):
        target.command("rollback", disk, name, "--yes", timeout=600)
        check_points(lab, disk, copies)
    say("  back to the first size and forward again: the points are the same")
    for daemon in (lab.relay, target):
        if daemon:
            daemon.stop()
    check_folder(lab, target, folder, path, disk, copies)
    whole_disk(source, path)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main("grow-test", body))
