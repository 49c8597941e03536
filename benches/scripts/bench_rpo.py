#!/usr/bin/env python3
"""How much would be lost with the machine: the age of the newest durable state while random writes go on.

Environment: SIZE (2G), SECONDS (60), RATES ("20 50", MB/s), MODES ("data window"), RELAY (1), SEED. Each case is a loop device
that fio writes 4 KiB blocks to at a fixed rate, through all three daemons (release build); `window` has points every 2 s.
The agent's own `rpo_ms` is sampled ten times a second; the 50th and 99th percentile and the maximum are printed with the
goals (data: 1 s and 5 s; window: 99th 8 s), the agent's peak memory beside its ring and budget, and in the end the newest
point must be the disk. Called by `make bench-rpo` as root.
"""

import json
import subprocess
import sys
import time

from lab import AGENT, LabError, is_root, run, wait_for
from live import newer_point
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

GOALS = {"data": (1.0, 5.0), "window": (None, 8.0)}
# 64 MiB, the ring, and what waits in the queue.
MEMORY_BYTES = (64 + 64 + 128) << 20


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure(lab, source, mode, rate, seconds, seed):
    """Samples of the age in seconds, the share of time with a stream, the agent's peak memory, and what everybody was busy with."""
    said = lab.dir / "churn.json"
    command = ["fio", "--name=churn", f"--filename={source}", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite",
               "--bs=4k", f"--rate={rate}m", "--time_based=1", f"--runtime={seconds}", f"--randseed={seed}", "--norandommap=1",
               "--refill_buffers=1", "--buffer_compress_percentage=50", "--output-format=json", f"--output={said}"]
    before = {name: daemon.usage()[0] for name, daemon in lab.daemons.items()}
    churn, ages, streamed, waiting = subprocess.Popen(command), [], 0, []
    try:
        begun = time.monotonic()
        while churn.poll() is None and time.monotonic() - begun < seconds + 60:
            time.sleep(0.1)
            disk = (lab.agent.status() or {"disks": [{}]})["disks"][0]
            # The beginning of the load is not the load.
            if disk.get("rpo_ms") is not None and time.monotonic() - begun > 5:
                ages.append(disk["rpo_ms"] / 1000)
                streamed += disk["streaming"]
                waiting.append(disk["held_bytes"])
    finally:
        if churn.poll() is None:
            churn.kill()
        churn.wait()
    if not ages:
        raise LabError("the agent never said how old the durable state is")
    spent = {name: (daemon.usage()[0] - before[name]) / (time.monotonic() - begun) for name, daemon in lab.daemons.items()}
    busy = ", ".join(f"{name} {share:.0%}" for name, share in spent.items())
    written = json.loads(said.read_text())["jobs"][0]["write"]["bw_bytes"] / 1e6
    busy += f" of a processor; {written:.0f} MB/s written; {mib(percentile(waiting, 0.5))} waiting at the agent"
    return ages, streamed / len(ages), lab.daemons[AGENT].usage()[1], busy


def case(lab, mode, rate, seed):
    size, seconds = size_setting("2G"), setting("SECONDS", 60, int)
    name = f"{mode}-{rate}"
    image = lab.dir / f"{name}.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    source = lab.loop(image)
    retention = {"path": str(lab.dir / f"retention-{name}")}
    interval = "2s" if mode == "window" else "10s"
    pipeline = Pipeline(lab, source, relay=setting("RELAY", "1") == "1", agent={"capture": {"mode": mode, "interval": interval}},
                        target={"retention": retention})
    pipeline.start()
    pipeline.protect("flat")
    disk = pipeline.wait_synced(max(120, size / 5e6), quiet=True)
    first = "every write is streamed" if mode == "data" else "a round is durable"
    wait_for(first, lambda: lab.agent.status()["disks"][0]["streaming" if mode == "data" else "scan_rounds"], 60, lab.agent.log)
    ages, streamed, peak, busy = measure(lab, source, mode, rate, seconds, seed)
    middle, high = percentile(ages, 0.5), percentile(ages, 0.99)
    goals = [f"p{number} {value:.2f} s" + ("" if goal is None else f" (goal {goal:.0f}: {'met' if value <= goal else 'MISSED'})")
             for number, value, goal in zip((50, 99), (middle, high), GOALS[mode])]
    say(f"  {mode} at {rate} MB/s of random 4 KiB writes: RPO {', '.join(goals)}, at most {max(ages):.2f} s; "
        f"streamed {streamed:.0%} of the time; agent's peak {mib(peak)} (goal {mib(MEMORY_BYTES)}: "
        f"{'met' if peak <= MEMORY_BYTES else 'MISSED'}); {busy}")
    point = newer_point(lab, disk["disk"], 120)
    copy = lab.dir / "newest.raw"
    lab.target.command("export", disk["disk"], point["point"], "--format", "raw", "-o", copy, timeout=600)
    run("cmp", source, copy)
    copy.unlink()
    pipeline.stop()
    lab.agent.command("unfollow")
    pipeline.forget()


def body(lab):
    if not is_root():
        skipped("live capture needs root")
        return
    seed = seed_setting()
    for mode in setting("MODES", "data window").split():
        for rate in setting("RATES", "20 50").split():
            case(lab, mode, int(rate), seed)


if __name__ == "__main__":
    sys.exit(main("bench-rpo", body))
