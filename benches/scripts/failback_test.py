#!/usr/bin/env python3
"""Failback: the disk goes home and is taken back, with the master target killed between the steps.

Environment: SIZE (1G), TARGET (flat), KILLS (8), RELAY (1), SEED (random, printed), KEEP. Asserted: a released target is
the source at its end for `qemu-img compare`, which may lock it; a dry run changes nothing; a late agent is refused, before
and after restarts of both ends, and nothing of what it has arrives; `--point` releases the disk as it was and the newest
state stays a point; without its agent a machine goes home only when that is said, and what is lost is named; `--undo` takes
the disk again and it ends equal to its source, with the points before degraded where the virtual machine wrote; whatever
step the master target is killed at, the repeated command ends the same. Called by `make failback-test`, and small by the
suite.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

from lab import AGENT, LabError, run, wait_for
from pipeline import Pipeline
from points_test import change
from proof import extents
from runner import main, make_source, mib, say, seed_setting, setting, size_setting

STEPS = ("decided", "fenced", "drained", "verified", "released")


def refused(target, expected, *words):
    """The command is refused, and says why."""
    try:
        target.command("failback", *words)
    except LabError as error:
        if expected not in str(error):
            raise
    else:
        raise LabError(f"`failback {' '.join(words)}` was not refused")


def judge(copy, path, what):
    """Compares without asking to share the locks: a released target has none."""
    run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", copy, path, timeout=600)
    say(f"  {what}: identical")


def state(pipeline):
    return (pipeline.target_disk() or {}).get("state")


def record(target):
    """The failback as the master target keeps it; None without one, or while it is being replaced."""
    for path in (target.state / "machines").glob("*.failback"):
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None
    return None


def step(target):
    known = record(target)
    return min((disk["step"] for disk in known["disks"].values()), key=STEPS.index) if known else None


def mark(lab, name):
    """A lasting point of the source as it is now; everything it holds is durable then."""
    return lab.agent.command("mark", "--name", name, timeout=300)["name"]


def take_back(pipeline, machine, size):
    """`--undo`, then until the disk is equal to its source again."""
    answer = pipeline.lab.target.command("failback", "--undo", machine, "--yes")
    if answer["state"] != "taken-back" or record(pipeline.lab.target) is not None:
        raise LabError(f"--undo answered {answer['state']}")
    pipeline.wait_synced(max(120, size / 5e6), label="compare after --undo")


def agent_is_refused(lab):
    """What the agent shows of a disk that went home."""
    def told():
        disks = (lab.agent.status() or {}).get("disks") or [{}]
        return disks[0].get("state") == "stopped" and "failed back" in (disks[0].get("problem") or "")

    wait_for("the agent says that its machine was failed back", told, log=lab.agent.log)


def newest(pipeline, machine, source, path, rng, size):
    """The newest state goes home; late writers stay out."""
    lab, target = pipeline.lab, pipeline.lab.target
    change(source, size, rng)
    plan = target.command("failback", machine, "--dry-run")
    if plan["state"] != "planned" or record(target) is not None or state(pipeline) != "synced":
        raise LabError(f"a dry run did something: {plan}")
    refused(target, "agent is connected", machine, "--source-already-off", "--yes")
    answer = target.command("failback", machine, "--yes", "--verify", "whole", timeout=600)
    disk = answer["disks"][0]
    if answer["state"] != "released" or disk["read_bytes"] != size or disk["different"] or not answer["next"]:
        raise LabError(f"failback answered {answer}")
    say(f"  released: {mib(disk['read_bytes'])} read again, {mib(disk['compared_bytes'])} compared, class {answer['class']}")
    judge(source, path, "the newest state")
    if state(pipeline) != "released":
        raise LabError(f"the status says {state(pipeline)!r}")
    agent_is_refused(lab)
    home = lab.dir / "home.raw"
    shutil.copyfile(source, home)
    change(source, size, rng)
    target.kill()
    target.start_and_wait()
    lab.daemons[AGENT].stop()
    lab.daemons[AGENT].start_and_wait()
    agent_is_refused(lab)
    time.sleep(2)  # some scan rounds, if there were any
    judge(home, path, "what a late agent has stays out")
    again = target.command("failback", machine, "--yes")
    if again["state"] != "released" or again["point"] != answer["point"]:
        raise LabError(f"the repeated command answered {again}")
    return answer


def as_virtual_machine(path, rng):
    """Writes to the target as its virtual machine would."""
    flat = extents(path)
    with open(flat[0][0], "r+b", buffering=0) as file:
        file.seek(rng.randrange(1000) * 4096 + (1 << 20))
        file.write(rng.randbytes(8192))
        os.fsync(file.fileno())


def killed(pipeline, machine, source, path, wanted, point):
    """A failback whose master target is killed when it is at a step; answers the step it was at."""
    target = pipeline.lab.target
    words = [target.binary, "failback", machine, "--yes", "--verify", "whole", "--state-dir", target.state]
    words += ["--point", point[0]] if point else []
    command = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while command.poll() is None:
        reached = step(target)
        if wanted is None or (reached is not None and STEPS.index(reached) >= STEPS.index(wanted)):
            break
    target.kill()
    command.wait(60)
    reached = step(target)
    target.start_and_wait()
    if reached is None:
        wait_for("the agent is back", lambda: (pipeline.target_disk() or {}).get("connected"), log=pipeline.lab.agent.log)
        pipeline.wait_synced(120, quiet=True)
    else:
        agent_is_refused(pipeline.lab)
    answer = target.command("failback", machine, "--yes", *(["--point", point[0]] if point else []), timeout=600)
    if answer["state"] != "released":
        raise LabError(f"after a kill at {reached} the repeated command answered {answer}")
    judge(point[1] if point else source, path, f"killed when {reached or 'nothing was decided'}, then repeated")
    return reached


def body(lab):
    size, kills, kind = size_setting("1G"), setting("KILLS", 8, int), setting("TARGET", "flat")
    seed = seed_setting()
    rng = random.Random(seed)
    lab.need_space(size * 6, f"a failback test of {mib(size)}")
    _, source = make_source(lab, size, 50, seed)
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "3s", "segment_bytes": "32 MiB"}
    pipeline = Pipeline(lab, source, relay=setting("RELAY", 1, int) == 1, agent={"scan_interval": "500ms"},
                        target={"retention": retention})
    pipeline.start()
    pipeline.protect(kind)
    disk = pipeline.wait_synced(max(120, size / 5e6))
    machine, target, path = disk["agent"], lab.target, disk["path"]
    change(source, size, rng)
    older = mark(lab, "older")
    copy = lab.dir / "older.raw"
    shutil.copyfile(source, copy)
    target.command("pin", disk["disk"], older)
    newest(pipeline, machine, source, path, rng, size)
    after = target.command("points", disk["disk"], "--all")["points"]
    if not any(point["cause"] == "stop" for point in after) or not any(point["name"] == older for point in after):
        raise LabError("the last mark, or a point from before, is not there after the failback")
    take_back(pipeline, machine, size)
    say("  taken back unchanged: points are sound" if not degraded(target, disk) else "  points are degraded")
    back_to(pipeline, machine, disk, path, (older, copy), source, size)
    without_agent(pipeline, machine, source, path, size)
    as_virtual_machine(path, rng)
    take_back(pipeline, machine, size)
    if not degraded(target, disk):
        raise LabError("points from before the virtual machine wrote to the target are not degraded")
    met = {}
    for number in range(kills):
        change(source, size, rng)
        point = None
        if number % 3 == 2:
            point = (mark(lab, f"kept-{number}"), lab.dir / "kept.raw")
            shutil.copyfile(source, point[1])
            change(source, size, rng)
        wanted = (None, *STEPS[:4])[number % 5]
        reached = killed(pipeline, machine, source, path, wanted, point)
        met[reached or "before"] = met.get(reached or "before", 0) + 1
        take_back(pipeline, machine, size)
    say(f"  killed at: {', '.join(f'{name} {count}' for name, count in sorted(met.items()))}")
    pipeline.stop()


def degraded(target, disk):
    return any(point["degraded"] for point in target.command("points", disk["disk"], "--all")["points"])


def back_to(pipeline, machine, disk, path, older, source, size):
    """An older point goes home; the newest state stays a point, and comes back."""
    target = pipeline.lab.target
    answer = target.command("failback", machine, "--yes", "--point", older[0], timeout=600)
    if answer["disks"][0]["written_bytes"] == 0 or answer["point"] != older[0]:
        raise LabError(f"--point {older[0]} answered {answer}")
    judge(older[1], path, "an older point")
    refused(target, "was begun", machine, "--yes", "--point", "newest")
    points = target.command("points", disk["disk"], "--all")["points"]
    if not any(point["name"].startswith("before-rollback") for point in points):
        raise LabError("the newest state is no point")
    take_back(pipeline, machine, size)


def without_agent(pipeline, machine, source, path, size):
    """The source is gone."""
    lab, target = pipeline.lab, pipeline.lab.target
    mark(lab, "last")
    lab.daemons[AGENT].stop()
    wait_for("the agent is gone", lambda: not (pipeline.target_disk() or {"connected": True})["connected"])
    refused(target, "agent is not connected", machine, "--yes")
    refused(target, "repeat with --yes", machine, "--source-already-off")
    answer = target.command("failback", machine, "--source-already-off", "--yes", "--verify", "none", timeout=600)
    if "is lost" not in (answer["loss"] or ""):
        raise LabError(f"what may be lost is not named: {answer}")
    say(f"  without the agent: {answer['class']}, {answer['loss']}")
    judge(source, path, "the newest state that was durable")
    lab.daemons[AGENT].start_and_wait()
    agent_is_refused(lab)


if __name__ == "__main__":
    sys.exit(main("failback-test", body))
