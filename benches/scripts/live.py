"""Programs that write to a live file system, and how to tell whether a point is a state it was in.

Why: a file system check alone does not see a write that is missing; a program that makes A durable before it writes B
does. Invariants: a writer runs until its `going` is false; every judgement is of a copy. Used by the demonstration and the
capture test.
"""

import bisect
import contextlib
import os
import random
import sqlite3
import struct
import threading
import time

from lab import LabError, run, wait_for

RECORD = struct.Struct("<QQ")


class FileSystem:
    """A kind of file system: how it is made, what a copy of one that is mounted needs, and who finds what is wrong with it."""

    def __init__(self, kind, make, options, check):
        self.kind, self.make, self.options, self.check = kind, make, options, check


EXT4 = FileSystem("ext4", ["mkfs.ext4", "-q"], [], ["e2fsck", "-fn"])
XFS = FileSystem("xfs", ["mkfs.xfs", "-q"], ["-o", "nouuid"], ["xfs_repair", "-n"])


def file_system(kind):
    """The one of that name."""
    return {"ext4": EXT4, "xfs": XFS}[kind]


class OrderedWriter(threading.Thread):
    """Writes each number to A, makes it durable, and only then to B."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.going, self.count = folder, True, 0
        #: When each number was begun, in seconds.
        self.begun = []

    def run(self):
        with open(self.folder / "a", "wb", buffering=0) as a, open(self.folder / "b", "wb", buffering=0) as b:
            while self.going:
                self.count += 1
                self.begun.append(time.time())
                for file in (a, b):
                    # Somewhere else each time, so that the two files' blocks are far apart on the disk.
                    file.seek(self.count % 4096 * 4096)
                    file.write(RECORD.pack(self.count, ~self.count & (1 << 64) - 1))
                    os.fsync(file.fileno())

    def newest_at(self, moment):
        """The newest number that can have been written by then."""
        return bisect.bisect_right(self.begun, moment)


class DatabaseWriter(threading.Thread):
    """Commits rows of random size."""

    def __init__(self, path, seed):
        super().__init__(daemon=True)
        self.path, self.going, self.rng = path, True, random.Random(seed)

    def run(self):
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            database.execute("pragma journal_mode = wal")
            database.execute("create table rows (number integer primary key, value blob)")
            while self.going:
                for _ in range(self.rng.randrange(1, 20)):
                    database.execute("insert into rows (value) values (?)", (self.rng.randbytes(self.rng.randrange(9000)),))
                database.commit()
                database.execute("delete from rows where number < (select max(number) from rows) - 3000")
                database.commit()
                time.sleep(0.01)


def start_writers(lab, writers):
    """Sets them going; they are stopped by [`stop_writers`], at the latest before what they write to is unmounted."""
    def stop():
        for writer in writers:
            writer.going = False
            writer.join()

    for writer in writers:
        writer.start()
    lab.undo("stop the writers", stop)


def stop_writers(lab):
    lab.take_back("stop the writers")


def newest(path):
    """The newest number in a file of the ordered writer; a torn or foreign record is an error."""
    best = 0
    with open(path, "rb") as file:
        while block := file.read(4096):
            number, check = RECORD.unpack_from(block.ljust(RECORD.size, b"\0"))
            if (number, check) != (0, 0):
                if check != ~number & (1 << 64) - 1:
                    raise LabError(f"{path}: a record of {number} is torn")
                best = max(best, number)
    return best


def judge(lab, image, at, folder=".", look=None, system=EXT4):
    """What a point shows; answers what its writers had done in `folder`, and what `look` says of the mounted file system.

    A file system replays its journal when it is mounted."""
    device = lab.loop(image)
    root = lab.mount(device, at.name, *system.options, kind=system.kind)
    at = root / folder
    try:
        done = (newest(at / "a"), newest(at / "b"))
        if not done[0] - 1 <= done[1] <= done[0]:
            raise LabError(f"A holds {done[0]} and B {done[1]}: B was never written before A was durable")
        with contextlib.closing(sqlite3.connect(at / "database")) as database:
            verdict = database.execute("pragma integrity_check").fetchone()[0]
            rows = database.execute("select max(number) from rows").fetchone()[0] or 0
        if verdict != "ok":
            raise LabError(f"SQLite: {verdict}")
        seen = look(root) if look else None
    finally:
        lab.unmount(root)
    run(*system.check, device)
    lab.unloop(device)
    return (rows, done[1]) if look is None else (rows, done[1], seen)


def stamp(moment):
    """A time as commands take it for a point."""
    return "@" + time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03d}Z"


def crash_points(target, name):
    """Points that promise to be a state of the disk, oldest first."""
    points = target.command("points", name)["points"]
    return [point for point in reversed(points) if point["class"] == "crash-consistent" and not point["degraded"]]


def newer_point(lab, name, seconds=60):
    """Waits for a point of what is written until now, and answers it."""
    since = time.time() * 1000

    def newer():
        points = crash_points(lab.target, name)
        return points[-1] if points and points[-1]["source_time_ms"] > since else None

    return wait_for("a point of what was written until now", newer, seconds, lab.agent.log)
