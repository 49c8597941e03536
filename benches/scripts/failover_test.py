#!/usr/bin/env python3
"""The process server in use dies, again and again, under load: the agent goes on with the other, and nothing is lost.

Environment: SIZE (512M), KILLS (20), RATE (50, MB/s), MODE (data|window), SEED (random, printed), KEEP. Two process servers
before one target; fio writes 4 KiB blocks at random to a live disk all the time. The one that has the session is ended with
`kill -9`, or (every third time) stopped with SIGSTOP and woken again seconds later, when it still has what it was sending.
Asserted: no compare; what was sent again is at most 64 MiB for each time, in all; the newest point is the disk, byte for byte, in
the end. Printed: how long nothing became durable, detection included (goal: 2 s); in `window` mode that is the pause of rounds as
well, so only `data` says something. Called by `make failover-test` as root, and small by the suite.
"""

import os
import random
import signal
import subprocess
import sys
import time

from lab import LabError, is_root, run, wait_for
from live import newer_point
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

RESENT_BYTES_MAX = 64 << 20
GAP_SECONDS = 2.0
LOOK = 0.02
# After this the session with the other one has long begun.
WATCHED_SECONDS = 4.0


def upstreams(lab):
    """Who has the session and whether another is ready."""
    known = (lab.agent.status() or {}).get("upstreams", [])
    used = next((peer["address"] for peer in known if peer["used"]), None)
    return used, any(peer["ready"] for peer in known if not peer["used"])


def wait_ready(lab):
    def both():
        used, ready = upstreams(lab)
        return used if used and ready else None

    return wait_for("a session, and another process server that stands by", both, 60, lab.agent.log)


def longest_gap(lab, act):
    """The longest time without durable progress around `act`, and whether it went on afterwards."""
    begun, last, moved, gap, acted = time.monotonic(), None, time.monotonic(), 0.0, False
    while (now := time.monotonic()) - begun < WATCHED_SECONDS + 0.5:
        if not acted and now - begun > 0.5:
            act()
            acted = True
        status = lab.agent.status()
        durable = status["disks"][0]["durable"] if status and status["disks"] else last
        if durable != last:
            if last is not None and acted:
                gap = max(gap, now - moved)
            last, moved = durable, now
        time.sleep(LOOK)
    return max(gap, time.monotonic() - moved)


def body(lab):
    if not is_root():
        skipped("live capture needs root")
        return
    size, kills, rate = size_setting("512M"), setting("KILLS", 20, int), setting("RATE", 50, int)
    mode, seed = setting("MODE", "data"), seed_setting()
    rng = random.Random(seed)
    image = lab.dir / "source.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    source = lab.loop(image)
    pipeline = Pipeline(lab, source, relay=2, agent={"capture": {"mode": mode, "interval": "2s"}},
                        target={"retention": {"path": str(lab.dir / "retention")}})
    pipeline.start()
    pipeline.protect("flat")
    disk = pipeline.wait_synced(max(120, size / 5e6), quiet=True)
    if mode == "data":
        wait_for("every write is streamed", lambda: lab.agent.status()["disks"][0]["streaming"], 60, lab.agent.log)
    wait_ready(lab)
    before = lab.agent.status()["disks"][0]
    churn = subprocess.Popen(
        ["fio", "--name=churn", f"--filename={source}", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite",
         "--bs=4k", f"--rate={rate}m", "--time_based=1", f"--runtime={kills * 30 + 60}", f"--randseed={seed}", "--norandommap=1",
         "--refill_buffers=1", "--buffer_compress_percentage=50", "--output=/dev/null"])
    lab.undo("end the load", lambda: (churn.poll() is None and churn.terminate(), churn.wait()))
    time.sleep(2)
    gaps = []
    for number in range(kills):
        victim = pipeline.relay_of[wait_ready(lab)]
        stops = number % 3 == 2
        process = victim.process
        gap = longest_gap(lab, lambda: os.kill(process.pid, signal.SIGSTOP) if stops else victim.kill())
        gaps.append(gap)
        say(f"  {number + 1:>2}: {victim.instance} {'stopped' if stops else 'killed'}: nothing durable for {gap:.2f} s")
        time.sleep(rng.uniform(0, 2))
        if stops:
            os.kill(process.pid, signal.SIGCONT)
            wait_for("the other goes on", lambda: upstreams(lab)[0] not in (None, address_of(pipeline, victim)), 10, lab.agent.log)
        else:
            victim.start_and_wait()
        if churn.poll() is not None:
            raise LabError(f"the load ended too soon, with {churn.returncode}")
    lab.take_back("end the load")
    status = lab.agent.status()
    point = newer_point(lab, disk["disk"], 120)
    copy = lab.dir / "newest.raw"
    lab.target.command("export", disk["disk"], point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("cmp", source, copy)
    compared = [step for step in status["ladder"] if step["to"] in ("compare", "scan")]
    if compared:
        raise LabError(f"there were compares: {compared}")
    after = status["disks"][0]
    sent = after["plain_bytes_sent"] - before["plain_bytes_sent"]
    # A write of the stream is a sequence and a block; what is read for rounds and windows goes in larger pieces.
    again = sent - (after["durable"] - before["durable"]) * 4096 - (after["read_bytes"] - before["read_bytes"])
    if again > kills * RESENT_BYTES_MAX:
        raise LabError(f"{mib(again)} were sent again, at most {mib(kills * RESENT_BYTES_MAX)} may be")
    gaps.sort()
    say(f"  {kills} times at {rate} MB/s ({mode}): nothing durable for {gaps[len(gaps) // 2]:.2f} s median, {gaps[-1]:.2f} s at most "
        f"(goal {GAP_SECONDS:.0f} s: {'met' if gaps[-1] <= GAP_SECONDS else 'MISSED'}); no compare; the newest point is the disk, byte for byte")
    say(f"  {mib(sent)} sent, about {mib(max(again, 0))} of it again; {status['sessions']} sessions")
    pipeline.stop()


def address_of(pipeline, relay):
    return next(address for address, known in pipeline.relay_of.items() if known is relay)


if __name__ == "__main__":
    sys.exit(main("failover-test", body))
