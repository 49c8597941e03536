#!/usr/bin/env python3
"""Live capture from end to end: a mounted ext4 with a database and an ordered writer, protected while it is written to.

Environment: SIZE (1G), POINTS (20), MODE (window), RELAY (1), SEED (random, printed), KEEP. Asserted: the disk is followed, not
scanned; points come every second and are crash-consistent; of each point that is judged, ext4 replays its journal and
`e2fsck -fn` then finds nothing, SQLite's `integrity_check` is ok and holds no less than the point before, and the
ordered writer (A, fsync, B, fsync) never shows B without A; an agent that was killed goes on from what the kernel
remembered, without a compare; FROZEN points (5) made meanwhile by `mark --freeze` are clean file systems whose journal
need not be replayed, and the time for which everything stood still is printed; when the writers have stopped the newest point is the disk, byte for byte. With
MODE=data as many single writes between the points are judged like points. Called by
`make capture-test`, and small by the suite.
"""

import random
import sys
import time

from lab import AGENT, LabError, is_root, run, wait_for
from live import DatabaseWriter, OrderedWriter, crash_points, judge, newer_point
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

def kill_agent(lab, pipeline):
    """The kernel goes on remembering; the agent that comes next reads what changed and nothing else."""
    lab.daemons[AGENT].kill()
    time.sleep(1)
    lab.daemons[AGENT].start_and_wait()
    pipeline.wait_followed(60, "after kill -9 of the agent")
    info = lab.agent.status()["disks"][0]
    if info["capture"] == "scan" or info["unaccounted"]:
        raise LabError(f"after the kill: {info}")
    return info


def judge_writes(lab, target, name, sequences, count, seed):
    """Single writes, each a point: what is not in an ordered stretch is refused, and few are."""
    copy, judged = lab.dir / "write.raw", 0
    for sequence in random.Random(seed).sample(sequences, min(count, len(sequences))):
        try:
            target.command("export", name, f"seq:{sequence}", "--format", "raw", "-o", copy, timeout=600)
        except LabError as error:
            if "seq:" not in str(error) and "sequence" not in str(error):
                raise
            continue
        try:
            judge(lab, copy, lab.dir / "judged")
        except LabError as error:
            raise LabError(f"sequence {sequence}: {error}") from error
        copy.unlink()
        judged += 1
    if judged * 2 < count:
        raise LabError(f"only {judged} of {count} single writes can be had")
    say(f"  {judged} of {count} single writes between them judged")


def freeze_points(lab, count):
    """Points of frozen file systems, under load; answers them with how long everything was frozen beyond the call."""
    answers = [lab.agent.command("mark", "--freeze", "--name", f"frozen-{number}") for number in range(count)]
    for answer in answers:
        if answer["class"] != "frozen":
            raise LabError(f"a frozen point is called {answer['class']}: {answer}")
    held = sorted(answer["frozen_us"] / 1000 for answer in answers)
    calls = sorted(answer["freeze_call_us"] / 1000 for answer in answers)
    if held:
        say(f"  {count} frozen points: frozen for {held[count // 2]:.1f} ms beyond the call (at most {held[-1]:.1f}), "
            f"calls of {calls[count // 2]:.1f} ms (at most {calls[-1]:.1f})")
    return answers


def judge_frozen(lab, target, name, answers):
    """Each is a clean file system as it is, without its journal."""
    copy = lab.dir / "frozen.raw"
    listed = {point["name"]: point["point"] for point in target.command("points", name)["points"] if point["name"]}
    for number in range(len(answers)):
        target.command("export", name, listed[f"frozen-{number}"], "--format", "raw", "-o", copy, timeout=600)
        said = run("e2fsck", "-fn", copy)
        if "recovering journal" in said:
            raise LabError(f"frozen point {number} needs its journal")
        copy.unlink()
    say(f"  {len(answers)} of {len(answers)} frozen points are clean without their journal")


def body(lab):
    if not is_root():
        skipped("live capture needs root")
        return
    size, count, seed = size_setting("1G"), setting("POINTS", 20, int), seed_setting()
    lab.need_space(size * 4, f"a capture test of {mib(size)}")
    image = lab.dir / "disk.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    source = lab.loop(image)
    run("mkfs.ext4", "-q", source)
    folder = lab.mount(source, "live")
    (folder / "first").write_bytes(random.Random(seed).randbytes(size // 8))
    run("sync")
    mode = setting("MODE", "window")
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "5s", "segment_bytes": "64 MiB"}
    pipeline = Pipeline(lab, source, relay=setting("RELAY", "1") == "1", agent={"capture": {"mode": mode, "interval": "1s"}},
                        target={"retention": retention})
    writers = [OrderedWriter(folder), DatabaseWriter(folder / "database", seed)]
    for writer in writers:
        writer.start()
    pipeline.start()
    pipeline.protect("flat")
    disk = pipeline.wait_synced(max(120, size / 5e6))
    name, target = disk["disk"], lab.target
    info = lab.agent.status()["disks"][0]
    if info["capture"] != mode:
        raise LabError(f"the disk is not followed: {info['capture']}")
    before = info["read_bytes"]
    wait_for("half of the points", lambda: len(crash_points(target, name)) >= count // 2, 30 + 10 * count, lab.agent.log)
    read = lab.agent.status()["disks"][0]["read_bytes"] - before
    say(f"  {count // 2} points while {writers[0].count} ordered writes were made; {mib(read)} of the disk were read for them")
    frozen = freeze_points(lab, setting("FROZEN", 5, int))
    info = kill_agent(lab, pipeline)
    if info["read_bytes"] > size // 2:
        raise LabError(f"the agent read {mib(info['read_bytes'])} again after a kill")
    say(f"  the agent was killed and goes on; it read {mib(info['read_bytes'])}")
    first = pipeline.target_disk()["durable"]
    wait_for("all points", lambda: len(crash_points(target, name)) >= count, 30 + 10 * count, lab.agent.log)
    for writer in writers:
        writer.going = False
        writer.join()
    lab.unmount(folder)
    last_point = newer_point(lab, name)
    points = crash_points(target, name)
    chosen = sorted(random.Random(seed).sample(range(len(points)), min(count, len(points))))
    at, copy, last = lab.dir / "judged", lab.dir / "point.raw", (0, 0)
    for index in chosen:
        point = points[index]["point"]
        target.command("export", name, point, "--format", "raw", "-o", copy, timeout=600)
        try:
            shown = judge(lab, copy, at)
        except LabError as error:
            raise LabError(f"point {point}: {error}") from error
        if shown[0] < last[0] or shown[1] < last[1]:
            raise LabError(f"point {point} shows {shown}, the one before it {last}")
        last = shown
        copy.unlink()
    judge_frozen(lab, target, name, frozen)
    if mode == "data":
        judge_writes(lab, target, name, range(first, pipeline.target_disk()["durable"]), len(chosen), seed)
    say(f"  {len(chosen)} of {len(points)} points judged: file system, database and ordered writes are sound")
    target.command("export", name, last_point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("blockdev", "--flushbufs", source)
    run("cmp", source, copy)
    info = lab.agent.status()["disks"][0]
    say(f"  the newest point is the disk, byte for byte; {info['unaccounted']} misses")


if __name__ == "__main__":
    sys.exit(main("capture-test", body))
