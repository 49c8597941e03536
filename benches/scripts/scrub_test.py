#!/usr/bin/env python3
"""The scrub: silent while all is well, and exact when it is not.

Environment: SIZE (1G), SEED (random, printed), KEEP. Asserted: under load, over many rounds, after a kill in the middle of
writes and after an orderly restart nothing is found; a write to the target by somebody else is named with its range, and a
flipped bit in an undo run with its file, in `status`; the points that need it are damaged, through a kill, until the file is
restored, and are handed out only to who accepts that. Called by `make scrub-test`, and small by the suite.
"""

import random
import sys
import time

from export_test import Writer, flip
from lab import AGENT, LabError, mib, run, wait_for
from pipeline import Pipeline
from points_test import change, wait_point
from proof import extents
from runner import main, make_source, say, seed_setting, size_setting

BLOCK = 4096


def scrub_of(pipeline):
    return (pipeline.target_disk() or {}).get("scrub") or {"rounds": 0, "findings": [], "read_bytes": 0}


def wait_rounds(pipeline, count):
    """Waits for so many more rounds; answers the last state."""
    begun = scrub_of(pipeline)["rounds"]

    def enough():
        scrub = scrub_of(pipeline)
        return scrub["rounds"] >= begun + count and scrub

    return wait_for(f"{count} rounds of the scrub", enough, seconds=180, log=pipeline.lab.target.log)


def expect_none(scrub, when):
    if scrub["findings"]:
        raise LabError(f"{when}: {scrub['findings']}")
    say(f"  {when}: {scrub['rounds']} rounds, {mib(scrub['read_bytes'])} read, nothing found")


def body(lab):
    size, seed = size_setting("1G"), seed_setting()
    rng = random.Random(seed)
    lab.need_space(size * 4, f"a scrub test of {mib(size)}")
    _, source = make_source(lab, size, 50, seed)
    folder = lab.dir / "retention"
    retention = {"path": str(folder), "undo_epoch": "2s", "segment_bytes": "32 MiB",
                 "scrub_mib_per_s": 2000, "scrub_pause": "1s"}
    pipeline = Pipeline(lab, source, relay=False, agent={"scan_interval": "300ms"}, target={"retention": retention})
    pipeline.start()
    pipeline.protect("flat")
    pipeline.wait_synced(max(120, size / 5e6))
    change(source, size, rng)
    disk, _ = wait_point(pipeline, 0)
    with Writer(source, size, rng.randrange(1 << 32)):
        expect_none(wait_rounds(pipeline, 3), "under load")
        lab.target.kill()
    lab.target.start_and_wait()
    expect_none(wait_rounds(pipeline, 2), "after a kill in the middle of writes")
    lab.daemons[AGENT].stop()
    lab.target.stop()
    lab.target.start_and_wait()
    scrub = wait_rounds(pipeline, 2)
    expect_none(scrub, "after an orderly restart")
    if not list(folder.glob("crc-*")):
        raise LabError("there is no CRC map")
    outside_write(pipeline, extents(disk["path"])[0][0], size, rng)
    rot(pipeline, folder)


def outside_write(pipeline, flat, size, rng):
    at = rng.randrange(size // BLOCK - 16) * BLOCK
    with open(flat, "r+b") as file:
        file.seek(at)
        held = file.read(3 * BLOCK)
        file.seek(at)
        file.write(bytes(byte ^ 0xff for byte in held))
    wanted = f"bytes {at} to {at + 3 * BLOCK}"
    found = wait_for("the outside write is named",
                     lambda: [what for what in scrub_of(pipeline)["findings"] if wanted in what],
                     seconds=120, log=pipeline.lab.target.log)
    if wanted not in (pipeline.target_disk()["problem"] or ""):
        raise LabError(f"status does not show it: {pipeline.target_disk()['problem']}")
    say(f"  {found[0]}")
    with open(flat, "r+b") as file:
        file.seek(at)
        file.write(held)
    wait_rounds(pipeline, 2)
    expect_none(scrub_of(pipeline), "after the old content was put back")


def rot(pipeline, folder):
    victim = max(sorted(folder.glob("undo-*"))[:-1], key=lambda file: file.stat().st_size)
    at = 8192 + (victim.stat().st_size - 8192) // 4
    flip(victim, at)
    found = wait_for("rot in an undo run is named",
                     lambda: [what for what in scrub_of(pipeline)["findings"] if victim.name in what],
                     seconds=120, log=pipeline.lab.target.log)
    say(f"  {found[0]}")
    damaged_points(pipeline)
    flip(victim, at)
    time.sleep(0.1)
    wait_rounds(pipeline, 2)
    expect_none(scrub_of(pipeline), "after the run was restored")
    if [point for point in points_of(pipeline) if point.get("damaged")]:
        raise LabError(f"points are damaged after the run was restored: {points_of(pipeline)}")


def points_of(pipeline):
    return pipeline.lab.target.command("points", pipeline.target_disk()["disk"], "--all")["points"]


def damaged_points(pipeline):
    """What needs the rotten image is listed so, also by the next start, and nobody gets it without saying so."""
    target, disk = pipeline.lab.target, pipeline.target_disk()["disk"]
    damaged = wait_for("points are known to be damaged",
                       lambda: [point for point in points_of(pipeline) if point.get("damaged")],
                       seconds=60, log=target.log)
    target.kill()
    target.start_and_wait()
    wait_for("the disk is there again", pipeline.target_disk, seconds=60, log=target.log)
    points = points_of(pipeline)
    again = {point["point"] for point in points if point.get("damaged")}
    sound = [point for point in points if not point.get("damaged")]
    if not again.issuperset(point["point"] for point in damaged) or not sound:
        raise LabError(f"after a kill {again} of {len(points)} points are damaged, before {damaged}")
    for words in ["mount", "rollback"]:
        more = ["--yes"] if words == "rollback" else []
        done = run(target.binary, words, disk, damaged[0]["point"], *more, "--state-dir", target.state, check=False)
        if done.returncode == 0 or "--accept-damage" not in done.stderr:
            raise LabError(f"{words} of a damaged point: {done.returncode} {done.stderr}")
    mount = target.command("mount", disk, damaged[0]["point"], "--accept-damage")["mounts"][0]
    target.command("unmount", mount["id"])
    # Points of scan rounds are fuzzy, so one is named.
    mount = target.command("mount", disk, sound[0]["point"])["mounts"][0]
    target.command("unmount", mount["id"])
    say(f"  {len(again)} of {len(points)} points are damaged; {sound[0]['point']} is not")


if __name__ == "__main__":
    sys.exit(main("scrub-test", body))
