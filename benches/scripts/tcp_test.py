#!/usr/bin/env python3
"""Where no UDP gets through, everything goes over TCP by itself, and UDP is used again once it does.

Environment: SIZE (512M), RATE (20, MB/s), SEED (random, printed), KEEP. In a network namespace that has no UDP, machines enrol,
a live disk is protected through a process server and written to; then UDP is there again, the process server is killed, and both of
its connections are over UDP. Asserted: the status and the health event say TCP as long as it is TCP; no compare; the newest
point is the disk, byte for byte. Called by `make tcp-test` as root, and small by the suite.
"""

import os
import subprocess
import sys

from lab import LabError, is_root, run, wait_for
from live import newer_point
from pipeline import Pipeline
from runner import main, say, seed_setting, setting, size_setting, skipped

INSIDE = "REPROTECT_TCP_TEST_INSIDE"


def drop_udp():
    """From the rule of all local addresses down, so that ours is asked first."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "rule", "add", "pref", "1", "table", "local")
    run("ip", "rule", "del", "pref", "0")
    run("ip", "rule", "add", "pref", "0", "ipproto", "udp", "blackhole")


def health(lab):
    return {event["code"] for event in (lab.agent.status() or {}).get("health", [])}


def body(lab):
    if not is_root():
        skipped("a network namespace needs root")
        return
    size, rate, seed = size_setting("512M"), setting("RATE", 20, int), seed_setting()
    drop_udp()
    image = lab.dir / "source.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    source = lab.loop(image)
    pipeline = Pipeline(lab, source, agent={"capture": {"mode": "window", "interval": "2s"}},
                        target={"retention": {"path": str(lab.dir / "retention")}})
    pipeline.start()
    pipeline.protect("flat")
    disk = pipeline.wait_synced(max(120, size / 5e6), quiet=True)
    churn = subprocess.Popen(
        ["fio", "--name=churn", f"--filename={source}", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite",
         "--bs=4k", f"--rate={rate}m", "--time_based=1", "--runtime=300", f"--randseed={seed}", "--norandommap=1",
         "--refill_buffers=1", "--buffer_compress_percentage=50", "--output=/dev/null"])
    lab.undo("end the load", lambda: (churn.poll() is None and churn.terminate(), churn.wait()))
    status = lab.agent.status()
    if not status["over_tcp"] or "UDP_BLOCKED" not in health(lab):
        raise LabError(f"the agent does not say that it goes over TCP: {status['upstream']}, {health(lab)}")
    relayed = lab.relay.status()["sessions"]
    if not all("over TCP" in str(session) for session in relayed):
        raise LabError(f"the process server does not say that it goes over TCP: {relayed}")
    newer_point(lab, disk["disk"], 60)
    run("ip", "rule", "del", "pref", "0")
    lab.relay.kill()
    lab.relay.start_and_wait()

    def over_udp():
        known = lab.agent.status()
        return known["connected"] and not known["over_tcp"]

    wait_for("a session over UDP", over_udp, 60, lab.agent.log)
    if "UDP_BLOCKED" in health(lab):
        raise LabError("UDP gets through, and the agent says it does not")
    newer_point(lab, disk["disk"], 60)
    lab.take_back("end the load")
    point = newer_point(lab, disk["disk"], 120)
    copy = lab.dir / "newest.raw"
    lab.target.command("export", disk["disk"], point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("cmp", source, copy)
    compared = [step for step in lab.agent.status()["ladder"] if step["to"] in ("compare", "scan")]
    if compared:
        raise LabError(f"there were compares: {compared}")
    say("  enrolled, synced and followed over TCP, then over UDP; no compare; the newest point is the disk, byte for byte")
    pipeline.stop()


if __name__ == "__main__":
    if is_root() and INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, __file__])
    sys.exit(main("tcp-test", body))
