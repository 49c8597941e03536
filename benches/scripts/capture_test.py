#!/usr/bin/env python3
"""Live capture from end to end: a mounted file system with a database and an ordered writer, protected while it is written to.

Environment: SIZE (1G), POINTS (50), FROZEN (5), COPIES (3), MODE (window), FS (ext4, or xfs), RELAY (1), SEED (random,
printed), KEEP. Asserted:
the disk is followed, not scanned; points come every second and are crash-consistent; of each point that is judged, and of
what as many random times mean, the file system replays its journal and `e2fsck -fn` (`xfs_repair -n`) then finds nothing, SQLite's `integrity_check` is
ok, the ordered writer (A, fsync, B, fsync) never shows B without A, and nothing shows less than what is older or more than
was written by then; an agent that was killed goes on from what the kernel remembered, without a compare; FROZEN points made
meanwhile by `mark --freeze` are clean file systems whose journal need not be replayed (XFS leaves something in its log when
it is frozen, so there it is), and the time for which everything
stood still is printed; COPIES points, made while the test itself holds the file system frozen, are the disk as it was copied
then, byte for byte; and so is the newest one when the writers have stopped. With MODE=data as many single writes between the
points are judged like points. Points and times are mounted over NBD and read through `nbdfuse`, frozen points are exported.
Called by `make capture-test`, and small by the suite.
"""

import contextlib
import random
import sys
import time

from lab import AGENT, LabError, is_root, run, wait_for
from live import (EXT4, DatabaseWriter, OrderedWriter, crash_points, file_system, judge, newer_point, stamp, start_writers,
                  stop_writers)
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

#: A write is as old as the machine's clock said when the kernel saw it; ours says it a little before or after, in seconds.
CLOCKS = 0.25


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


@contextlib.contextmanager
def mounted(lab, name, point):
    """A point as a file that may be written to: served over NBD on a throw-away overlay."""
    mount = lab.target.command("mount", name, point, "--writable")["mounts"][0]
    with lab.nbd_file(mount["uri"]) as file:
        yield file
    lab.target.command("unmount", mount["id"])


def shown_by(lab, name, point, system):
    """What a point shows, mounted and judged."""
    try:
        with mounted(lab, name, point) as file:
            return judge(lab, file, lab.dir / "judged", system=system)
    except LabError as error:
        raise LabError(f"point {point}: {error}") from error


def judge_writes(lab, name, sequences, count, seed, system):
    """Single writes, each a point: what is not in an ordered stretch is refused, and few are."""
    judged = 0
    for sequence in random.Random(seed).sample(sequences, min(count, len(sequences))):
        point = f"seq:{sequence}"
        try:
            with mounted(lab, name, point):
                pass
        except LabError as error:
            if "no consistent state" not in str(error):
                raise
            continue
        shown_by(lab, name, point, system)
        judged += 1
    if judged * 2 < count:
        raise LabError(f"only {judged} of {count} single writes can be had")
    say(f"  {judged} of {count} single writes between them judged")


def judge_points(lab, name, writer, points, times, system):
    """Points and times, the oldest first: each is sound, shows no less than the one before, and nothing of the future."""
    wanted = [(point["source_time_ms"] / 1000, point["point"]) for point in points]
    wanted += [(moment, stamp(moment)) for moment in times]
    last = (0, 0)
    for moment, point in sorted(wanted):
        shown = shown_by(lab, name, point, system)
        if shown[0] < last[0] or shown[1] < last[1]:
            raise LabError(f"point {point} shows {shown}, the one before it {last}")
        if shown[1] > writer.newest_at(moment + CLOCKS):
            raise LabError(f"point {point} shows number {shown[1]}, which was not begun by then")
        last = shown
    say(f"  {len(points)} points and {len(times)} times mounted and judged: file system, database and ordered writes are sound")


def copied_points(lab, source, folder, count):
    """Points of a disk that stands still, because the test holds its file system frozen, each with a copy taken then."""
    copies = []
    for number in range(count):
        copy = lab.dir / f"copy-{number}.raw"
        run("fsfreeze", "--freeze", folder)
        try:
            answer = lab.agent.command("mark", "--name", f"copied-{number}")
            run("dd", f"if={source}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")
        finally:
            run("fsfreeze", "--unfreeze", folder)
        if answer["class"] != "crash-consistent":
            raise LabError(f"a point of a disk that stands still is called {answer['class']}: {answer}")
        copies.append((f"copied-{number}", copy))
        time.sleep(0.5)  # so that the next one differs
    return copies


def compare_copies(lab, name, copies):
    for point, copy in copies:
        mount = lab.target.command("mount", name, point)["mounts"][0]
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, mount["uri"], timeout=600)
        lab.target.command("unmount", mount["id"])
        copy.unlink()
    say(f"  {len(copies)} points under load are what was copied from the source at their moment, byte for byte")


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


def judge_frozen(lab, target, name, answers, system):
    """Each is a clean file system as it is, without its journal; XFS counts free space again by it."""
    copy = lab.dir / "frozen.raw"
    listed = {point["name"]: point["point"] for point in target.command("points", name)["points"] if point["name"]}
    for number in range(len(answers)):
        target.command("export", name, listed[f"frozen-{number}"], "--format", "raw", "-o", copy, timeout=600)
        if system is not EXT4:
            judge(lab, copy, lab.dir / "judged", system=system)
        # What it says of a journal that it would have to replay first, had it not been forbidden to.
        elif "journal recovery" in run(*system.check, copy):
            raise LabError(f"frozen point {number} needs its journal")
        copy.unlink()
    how = "without their journal" if system is EXT4 else "when their log is read"
    say(f"  {len(answers)} of {len(answers)} frozen points are clean {how}")


def body(lab):
    if not is_root():
        skipped("live capture needs root")
        return
    size, count, seed = size_setting("1G"), setting("POINTS", 50, int), seed_setting()
    lab.need_space(size * 4, f"a capture test of {mib(size)}")
    image = lab.dir / "disk.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    source = lab.loop(image)
    system = setting("FS", "ext4", file_system)
    run(*system.make, source)
    folder = lab.mount(source, "live", kind=system.kind)
    (folder / "first").write_bytes(random.Random(seed).randbytes(size // 8))
    run("sync")
    mode = setting("MODE", "window")
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "5s", "segment_bytes": "64 MiB"}
    pipeline = Pipeline(lab, source, relay=setting("RELAY", "1") == "1", agent={"capture": {"mode": mode, "interval": "1s"}},
                        target={"retention": retention})
    writers = [OrderedWriter(folder), DatabaseWriter(folder / "database", seed)]
    start_writers(lab, writers)
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
    copies = copied_points(lab, source, folder, setting("COPIES", 3, int))
    info = kill_agent(lab, pipeline)
    if info["read_bytes"] > size // 2:
        raise LabError(f"the agent read {mib(info['read_bytes'])} again after a kill")
    say(f"  the agent was killed and goes on; it read {mib(info['read_bytes'])}")
    first = pipeline.target_disk()["durable"]
    wait_for("all points", lambda: len(crash_points(target, name)) >= count, 30 + 10 * count, lab.agent.log)
    stop_writers(lab)
    lab.unmount(folder)
    last_point = newer_point(lab, name)
    points = crash_points(target, name)
    rng = random.Random(seed)
    chosen = rng.sample(points, min(count, len(points)))
    span = [points[0]["source_time_ms"] / 1000, last_point["source_time_ms"] / 1000]
    judge_points(lab, name, writers[0], chosen, [rng.uniform(*span) for _ in chosen], system)
    judge_frozen(lab, target, name, frozen, system)
    compare_copies(lab, name, copies)
    if mode == "data":
        judge_writes(lab, name, range(first, pipeline.target_disk()["durable"]), len(chosen), seed, system)
    copy = lab.dir / "point.raw"
    target.command("export", name, last_point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("blockdev", "--flushbufs", source)
    run("cmp", source, copy)
    info = lab.agent.status()["disks"][0]
    say(f"  the newest point is the disk, byte for byte; {info['unaccounted']} misses")


if __name__ == "__main__":
    sys.exit(main("capture-test", body))
