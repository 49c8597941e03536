#!/usr/bin/env python3
"""An existing disk behind the journal: what it held can be had back, and a rollback holds it until somebody decides.

Environment: SIZE (1G), SEED (random, printed), KEEP. Asserted: the point `as-found` is the disk as it was before the
first write; rolled back to it, also after a kill, the target is that disk and its agent is refused with the remedy;
rolled forward it is the newest state, and the agent goes on. Called by the suite.
"""

import random
import sys
from pathlib import Path

from lab import LabError, run, wait_for
from pipeline import Pipeline
from proof import extents, whole_disk
from runner import main, make_source, mib, say, seed_setting, size_setting

BLOCK = 4096


def spoil(extent, size, rng):
    """Gives the existing disk content of its own."""
    with open(extent, "r+b") as file:
        for _ in range(2000):
            file.seek(rng.randrange(size // BLOCK) * BLOCK)
            file.write(rng.randbytes(BLOCK))


def same(left, vmdk, what):
    run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", left, vmdk, timeout=600)
    say(f"  {what}: identical")


def body(lab):
    size, seed = size_setting("1G"), seed_setting()
    lab.need_space(size * 5, f"an as-found test of {mib(size)}")
    image, source = make_source(lab, size, 50, seed)
    vmdk, copy = lab.dir / "found.vmdk", lab.dir / "as-found.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", image, vmdk, timeout=1800)
    spoil(extents(vmdk)[0][0], size, random.Random(seed))
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", vmdk, copy, timeout=1800)
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "2s", "segment_bytes": "32 MiB"}
    pipeline = Pipeline(lab, source, relay=False, agent={"scan_interval": "500ms"}, target={"retention": retention})
    pipeline.start()
    pipeline.protect(original=vmdk, overwrite=True)
    disk = pipeline.wait_synced(max(300, size / 2e6))["disk"]
    target, agent = lab.target, lab.agent
    mount = target.command("mount", disk, "as-found")["mounts"][0]
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, mount["uri"], timeout=600)
    target.command("unmount", mount["id"])
    say("  as-found, mounted: identical")
    agent.stop()
    wait_for("the agent is gone", lambda: not (pipeline.target_disk() or {"connected": True})["connected"])
    target.command("rollback", disk, "as-found", "--yes", timeout=600)
    target.kill()
    target.start_and_wait()
    agent.start_and_wait()
    wait_for("the agent is refused", lambda: "is held; roll it forward" in Path(agent.log).read_text(), log=agent.log)
    agent.stop()
    target.stop()
    same(copy, vmdk, "rolled back to as-found")
    target.start_and_wait()
    points = target.command("points", disk, "--all")["points"]
    newest = next(point for point in points if point["name"].startswith("before-rollback"))
    target.command("rollback", disk, newest["name"], "--yes", timeout=600)
    agent.start_and_wait()
    wait_for("the agent goes on", lambda: (pipeline.target_disk() or {}).get("connected"), log=agent.log)
    if pipeline.target_disk()["state"] != "synced":
        raise LabError("a disk that went forward again is compared anew")
    pipeline.stop()
    for verdict in whole_disk(source, vmdk):
        say(f"  {verdict}")


if __name__ == "__main__":
    sys.exit(main("as-found-test", body))
