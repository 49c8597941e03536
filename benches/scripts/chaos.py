#!/usr/bin/env python3
"""Three daemons and a second process server, with everything going wrong around them while a file system is written to.

Environment: SECONDS (1800), SIZE (512M), MODE (window|data), SEED (random, printed), KEEP. A live ext4 with a database, an
ordered writer (A, fsync, B, fsync) and random writes to a file is protected through two process servers; each of the four
ways between agent, process servers and target leads through a proxy. Every few seconds something happens, drawn from the
seed: a way loses, delays, reorders, duplicates or slows down datagrams, or is cut off; agent, process server or target is
ended with `kill -9` and started again, or stopped with SIGSTOP and woken; the retention drive is filled to its last byte
by somebody else. In the end everything is mended. Asserted: then a point of what was written to the last is had within two minutes
and is the disk, byte for byte; points made meanwhile, chosen at random, are sound (ext4, SQLite, the ordered writes);
each compare (by its receipt) has a cause that something which happened explains; no daemon took more memory than it may; none
ended by itself. Called by `make chaos` as root, and small by the suite. What it does not do: step clocks, and devices that fail.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import AGENT, TARGET, LabError, die_with_parent, free_port, is_root, run, wait_for
from live import DatabaseWriter, OrderedWriter, crash_points, judge, newer_point, start_writers, stop_writers
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

RETENTION_BYTES = 2 << 30
POINTS_JUDGED = 6
#: What a daemon may take, beside what it is told to use for payload.
MEMORY = {AGENT: 640 << 20, "process-server": 512 << 20, TARGET: 1536 << 20}
#: Compares are expected for these causes only, and only after this happened.
EXPLAINED = {"OTHER_SESSION": "agent killed"}


class Way:
    """A bad network in front of a port."""

    def __init__(self, lab, name, port, seed):
        self.name, self.port = name, free_port()
        script = Path(__file__).with_name("udp_proxy.py")
        self.process = subprocess.Popen([sys.executable, script, str(self.port), str(port), str(seed)],
                                        stdin=subprocess.PIPE, preexec_fn=die_with_parent)
        lab.undo(f"end the proxy of {name}", lambda: (self.process.kill(), self.process.wait()))

    def be(self, **conditions):
        self.process.stdin.write((json.dumps(conditions) + "\n").encode())
        self.process.stdin.flush()


class Chaos:
    """What happens, and what undoes it."""

    def __init__(self, lab, pipeline, ways, drive, seed):
        self.lab, self.pipeline, self.ways, self.drive = lab, pipeline, ways, drive
        self.rng, self.counts, self.mending = random.Random(seed), {}, []

    def note(self, what, on):
        self.counts[what] = self.counts.get(what, 0) + 1
        say(f"  {time.monotonic() - self.begun:7.1f} s: {on}: {what}")

    def run(self, seconds):
        self.begun = time.monotonic()
        events = [self.weather, self.weather, self.cut, self.kill, self.kill, self.stop, self.fill]
        while time.monotonic() - self.begun < seconds:
            self.rng.choice(events)()
            time.sleep(self.rng.uniform(0.5, 5))
            self.mend(due=True)
            for daemon in self.lab.daemons.values():
                if daemon.process.poll() is not None:
                    raise LabError(f"{daemon.instance} ended by itself with {daemon.process.returncode}:\n{daemon.tail()}")
        self.mend(due=False)

    def later(self, seconds, mend):
        self.mending.append((time.monotonic() + seconds, mend))

    def mend(self, due):
        now = time.monotonic()
        for item in [item for item in self.mending if not due or item[0] <= now]:
            self.mending.remove(item)
            item[1]()

    def weather(self):
        way, rng = self.rng.choice(self.ways), self.rng
        conditions = rng.choice([
            {"loss": rng.uniform(0.01, 0.2)},
            {"delay": rng.uniform(0.005, 0.15), "jitter": rng.uniform(0, 0.03)},
            {"jitter": rng.uniform(0.001, 0.05), "duplicate": 0.05},
            {"rate": rng.uniform(0.5e6, 6e6), "delay": 0.02},
            {"loss": 0.03, "delay": 0.05, "jitter": 0.02, "duplicate": 0.02, "rate": 4e6},
        ])
        way.be(**conditions)
        self.note("made worse", way.name)
        self.later(rng.uniform(2, 15), way.be)

    def cut(self):
        way = self.rng.choice(self.ways)
        way.be(blocked=True)
        self.note("cut off", way.name)
        self.later(self.rng.uniform(0.3, 8), way.be)

    def daemon(self):
        return self.rng.choice(list(self.lab.daemons.values()))

    def kill(self):
        daemon = self.daemon()
        daemon.kill()
        self.note("agent killed" if daemon.name == AGENT else "killed", daemon.instance)
        time.sleep(self.rng.uniform(0, 2))
        daemon.start_and_wait()

    def stop(self):
        daemon = self.daemon()
        process = daemon.process
        os.kill(process.pid, signal.SIGSTOP)
        self.note("stopped for a while", daemon.instance)
        time.sleep(self.rng.uniform(0.3, 7))
        os.kill(process.pid, signal.SIGCONT)

    def fill(self):
        """Somebody else writes the retention drive full."""
        other = self.drive / "somebody-else"
        if other.exists():
            return
        free = shutil.disk_usage(self.drive).free
        with open(other, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, free))
            except OSError:
                pass  # what is written meanwhile was quicker
        self.note("drive filled", "retention")
        self.later(self.rng.uniform(1, 8), lambda: other.unlink(missing_ok=True))


def writers_of(folder, seed):
    return [OrderedWriter(folder), DatabaseWriter(folder / "database", seed)]


def check_receipts(lab, chaos, disk):
    """Each compare has a receipt, and a reason."""
    receipts = lab.target.command("receipts", disk)["receipts"]
    compares = [receipt for receipt in receipts if not receipt["cause"].startswith("INITIAL")]
    if len(receipts) - len(compares) != 1 or any(receipt["result"] == "running" for receipt in receipts):
        raise LabError(f"there should be one first pass, and none should run: {receipts}")
    for receipt in compares:
        needed = EXPLAINED.get(receipt["cause"])
        if needed is None or not chaos.counts.get(needed):
            raise LabError(f"nothing that happened explains this compare: {receipt}")
    return compares


def body(lab):
    if not is_root():
        skipped("live capture needs root")
        return
    seconds, size, seed = setting("SECONDS", 1800, float), size_setting("512M"), seed_setting()
    mode = setting("MODE", "window")
    image, drive_image = lab.dir / "source.raw", lab.dir / "drive.raw"
    for path, length in ((image, size), (drive_image, RETENTION_BYTES)):
        with open(path, "wb") as file:
            file.truncate(length)
    source, drive_device = lab.loop(image), lab.loop(drive_image)
    run("mkfs.ext4", "-q", drive_device)
    drive = lab.mount(drive_device, "drive")
    run("mkfs.ext4", "-q", source)
    folder = lab.mount(source, "live")
    ways = []

    def way(address):
        name, port = f"way {len(ways) + 1}", int(address.rsplit(":", 1)[-1])
        ways.append(Way(lab, name, port, seed + len(ways)))
        return f"127.0.0.1:{ways[-1].port}"

    pipeline = Pipeline(lab, source, relay=2, way=way, agent={"capture": {"mode": mode, "interval": "2s"}},
                        process_server={"memory": "128 MiB"}, target={"retention": {"path": str(drive / "journal"), "segment_bytes": "32 MiB"}})
    pipeline.start()
    pipeline.protect("flat")
    disk = pipeline.wait_synced(max(180, size / 2e6), quiet=True)["disk"]
    writers = writers_of(folder, seed)
    start_writers(lab, writers)
    churn = subprocess.Popen(
        ["fio", "--name=churn", f"--directory={folder}", "--size=64m", "--ioengine=libaio", "--iodepth=4", "--rw=randwrite", "--bs=4k",
         "--direct=1", "--rate=4m", "--time_based=1", f"--runtime={int(seconds) + 3600}", f"--randseed={seed}", "--norandommap=1",
         "--refill_buffers=1", "--buffer_compress_percentage=50", "--output=/dev/null"])
    lab.undo("end the load", lambda: (churn.poll() is None and churn.terminate(), churn.wait()))
    chaos = Chaos(lab, pipeline, ways, drive, seed)
    chaos.run(seconds)
    lab.take_back("end the load")
    stop_writers(lab)
    count = writers[0].count
    lab.unmount(folder)
    point = newer_point(lab, disk, 120)
    copy = lab.dir / "newest.raw"
    lab.target.command("export", disk, point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("cmp", source, copy)
    copy.unlink()
    compares = check_receipts(lab, chaos, disk)
    points = crash_points(lab.target, disk)
    if len(points) < 3:
        raise LabError(f"only {len(points)} points were made in {seconds:.0f} s")
    chosen = sorted(random.Random(seed).sample(points, min(POINTS_JUDGED, len(points))), key=points.index)
    for point in chosen:
        lab.target.command("export", disk, point["point"], "--format", "raw", "-o", copy, timeout=600)
        judge(lab, copy, lab.dir / "judged")
        copy.unlink()
    peaks = {}
    for daemon in lab.daemons.values():
        _, peak = daemon.usage()
        peaks[daemon.instance] = peak
        if peak > MEMORY[daemon.name]:
            raise LabError(f"{daemon.instance} took {mib(peak)}, it may take {mib(MEMORY[daemon.name])}")
    happened = ", ".join(f"{number} x {what}" for what, number in sorted(chaos.counts.items()))
    say(f"  {seconds:.0f} s: {happened}")
    say(f"  {count} ordered writes; the newest point is the disk, byte for byte; {len(chosen)} of {len(points)} points judged sound; "
        f"compares: {[receipt['cause'] for receipt in compares] or 'none'}")
    say(f"  peaks since their last start: {', '.join(f'{name} {mib(peak)}' for name, peak in peaks.items())}")
    pipeline.stop()


if __name__ == "__main__":
    sys.exit(main("chaos", body))
