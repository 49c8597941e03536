#!/usr/bin/env python3
"""Recovery points: every one of them is the disk as it was, mounted while replication goes on, and gone back to.

Environment: SIZE (1G), POINTS (6), TARGET (flat), SEED (random, printed), KEEP. A copy of the source is taken at each
point. Asserted: each point, mounted over NBD, equals its copy for `qemu-img compare`, also after the master target was
killed and started again; a writable mount shows what was written and the point does not; a rollback is refused while
the agent may write, leaves the target as it was at the point, also where the master target is killed meanwhile, and
forward again it is the newest state. Called by `make points-test`, and small by the suite.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from lab import AGENT, LabError, run, wait_for
from pipeline import Pipeline
from proof import extents
from runner import main, make_source, mib, say, seed_setting, setting, size_setting

BLOCK = 4096
QUIET_SECONDS = 2.0


def change(source, size, rng):
    """Overwrites some blocks, zeroes a run, moves nothing."""
    with open(source, "r+b", buffering=0) as file:
        for _ in range(200):
            file.seek(rng.randrange(size // BLOCK) * BLOCK)
            file.write(rng.randbytes(BLOCK))
        file.seek(rng.randrange(size // BLOCK - 64) * BLOCK)
        file.write(bytes(64 * BLOCK))
        os.fsync(file.fileno())


def wait_point(pipeline, after):
    """Waits until everything the agent saw is durable and marked; answers the newest point."""
    state = {"since": time.monotonic(), "seen": None}

    def settled():
        disk = pipeline.target_disk()
        if disk is None or disk["durable"] <= after or disk["durable"] != disk["marked"]:
            return None
        if disk["durable"] != state["seen"]:
            state.update(seen=disk["durable"], since=time.monotonic())
        return disk if time.monotonic() - state["since"] >= QUIET_SECONDS else None

    disk = wait_for("the changes are durable and marked", settled, seconds=60, log=pipeline.lab.agent.log)
    points = pipeline.lab.target.command("points", disk["disk"], "--all")["points"]
    if not points:
        raise LabError("the target lists no point")
    return disk, points[0]["point"]


def make_points(lab, pipeline, source, size, rng, count):
    """Points of a source that stands still at each; answers the disk and, for each point, a copy taken at it."""
    copies, durable = [], 0
    for number in range(count):
        change(source, size, rng)
        disk, point = wait_point(pipeline, durable)
        durable = disk["durable"]
        copy = lab.dir / f"copy-{number}.raw"
        shutil.copyfile(source, copy)
        copies.append((point, copy))
        say(f"  point {point} after {durable} records")
    return disk, copies


def compare(target, disk, point, copy):
    """Mounts a point and compares it with the copy taken at it."""
    begun = time.monotonic()
    mount = target.command("mount", disk, point)["mounts"][0]
    ready = time.monotonic() - begun
    try:
        run("nbdinfo", mount["uri"])
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, mount["uri"], timeout=600)
    finally:
        target.command("unmount", mount["id"])
    return ready


def check_writable(target, disk, point, copy):
    mount = target.command("mount", disk, point, "--writable")["mounts"][0]
    run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", "-c", "flush", mount["uri"])
    target.command("unmount", mount["id"])
    compare(target, disk, point, copy)


def same(copy, flat, what):
    if subprocess.run(["cmp", copy, flat], check=False).returncode != 0:
        raise LabError(f"{what}: {flat} is not {copy}")
    say(f"  {what}: identical")


def body(lab):
    size, count, kind = size_setting("1G"), setting("POINTS", 6, int), setting("TARGET", "flat")
    seed = seed_setting()
    rng = random.Random(seed)
    lab.need_space(size * (count + 3), f"a points test of {mib(size)}")
    image, source = make_source(lab, size, 50, seed)
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "3s", "segment_bytes": "32 MiB"}
    pipeline = Pipeline(lab, source, relay=False, agent={"scan_interval": "500ms"}, target={"retention": retention})
    pipeline.start()
    pipeline.protect(kind)
    disk = pipeline.wait_synced(max(120, size / 5e6))
    target = lab.target
    disk, copies = make_points(lab, pipeline, source, size, rng, count)
    name = disk["disk"]
    ready = max(compare(target, name, point, copy) for point, copy in copies)
    say(f"  {count} points mounted and compared while replication goes on; ready after at most {ready * 1000:.0f} ms")
    check_writable(target, name, *rng.choice(copies))
    target.kill()
    target.start_and_wait()
    for point, copy in copies:
        compare(target, name, point, copy)
    say("  the master target was killed; all points are as they were")
    go_back(lab, pipeline, name, Path(disk["path"]), copies, rng)


def go_back(lab, pipeline, name, path, copies, rng):
    """Rolls back and forward, the master target killed in between."""
    target = lab.target
    wait_for("the agent is back", lambda: (pipeline.target_disk() or {}).get("connected"), log=lab.agent.log)
    try:
        target.command("rollback", name, copies[0][0], "--yes")
    except LabError as error:
        if "agent is connected" not in str(error):
            raise
    else:
        raise LabError("a rollback under a connected agent was not refused")
    lab.daemons[AGENT].stop()
    wait_for("the agent is gone", lambda: not (pipeline.target_disk() or {"connected": True})["connected"])
    for number in range(setting("ROLLBACKS", 10, int)):
        known = {label for label, _ in ways_forward(target, name)}
        point, copy = rng.choice(copies)
        if number % 2:
            # The target is killed while it goes back; the next start finishes that, or nothing had begun.
            going = threading.Thread(target=attempt, args=(target, "rollback", name, point, "--yes"))
            going.start()
            time.sleep(rng.uniform(0, 0.3))
            target.kill()
            going.join()
            target.start_and_wait()
        target.command("rollback", name, point, "--yes", timeout=600)
        judge(target, path, copy, f"rolled back to {point}")
        # One that was killed and finished by the next start left one, too: the first of them is what was there before.
        label, place = next(way for way in ways_forward(target, name) if way[0] not in known)
        target.command("rollback", name, label, "--yes", timeout=600)
        judge(target, path, copies[-1][1], f"forward to {place}")
    pipeline.lab.target.stop()


def ways_forward(target, name):
    """Names and places of the points that rollbacks left, oldest first."""
    points = target.command("points", name, "--all")["points"]
    return [(p["name"], p["point"]) for p in reversed(points) if p["name"].startswith("before-rollback")]


def attempt(target, *command):
    """A command whose daemon is killed meanwhile."""
    with contextlib.suppress(LabError):
        target.command(*command, timeout=600)


def judge(target, path, copy, what):
    """Compares the target's file, the master target killed and started first."""
    target.kill()
    target.start_and_wait()
    flat = extents(path)
    if len(flat) == 1:
        same(copy, flat[0][0], what)
    else:
        run("qemu-img", "compare", "-U", "-f", "raw", "-F", "vmdk", copy, path, timeout=600)
        say(f"  {what}: identical")


if __name__ == "__main__":
    sys.exit(main("points-test", body))
