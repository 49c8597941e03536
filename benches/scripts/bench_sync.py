#!/usr/bin/env python3
"""How fast is an initial sync, and what does it cost: direct and relayed, compression pinned at -1 and adaptive.

Environment: SIZE (8G), FILL (50), ROUNDS (3), TARGET (flat), CASES (all), SEED (1), REPROTECT_BIN_DIR (release).
Rounds are interleaved, so that a noisy minute hits all cases alike; caches are dropped before each (root). Wall time:
from `protect` until the target calls the disk synced, which is after its last flush. CPU seconds and peak RSS are the
kernel's; `other` is CPU the machine spent on anything else: wall times with much of it mean little. Wire bytes by hop
are the daemons' counters; loopback counts every header in both directions, over both hops together. The first round
of each case is compared byte by byte. Prints a Markdown table of medians. Called by `make bench-sync`.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from lab import isolate_network, loopback_bytes
from make_image import make_image
from pipeline import Pipeline, quiet_caches
from proof import data_bytes, remove_vmdk, whole_disk
from runner import LabError, main, mib, say, setting, size_setting

CASES = {
    "direct, -1": (False, -1),
    "direct, adaptive": (False, "adaptive"),
    "relayed, -1": (True, -1),
    "relayed, adaptive": (True, "adaptive"),
}
GB = 1e9


def busy_seconds():
    """CPU seconds of the whole machine, waiting left out."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(lab, image, kind, relay, level, compare):
    """One sync with fresh daemons; answers its numbers."""
    own = {"compress": "relay"} if relay else {"compress": "source", "compress_level": level}
    pipeline = Pipeline(lab, image, relay=relay, agent=own, process_server={"level": level} if relay else None)
    pipeline.start()
    pipeline.machine()
    quiet_caches()
    before = {name: daemon.usage()[0] for name, daemon in lab.daemons.items()}
    lo, busy, begun = loopback_bytes(), busy_seconds(), time.monotonic()
    pipeline.protect(kind)
    disk = pipeline.wait_synced(3600, quiet=True, pause=0.05)
    wall = time.monotonic() - begun
    row = {"wall": wall, "loopback": loopback_bytes() - lo, "busy": busy_seconds() - busy}
    for name, daemon in lab.daemons.items():
        cpu, peak = daemon.usage()
        row[f"cpu {name}"], row[f"rss {name}"] = cpu - before[name], peak
    row["cpu"] = sum(value for key, value in row.items() if key.startswith("cpu "))
    row["other"] = max(0.0, row.pop("busy") - row["cpu"])
    row.update({key: value for key, value in pipeline.counters().items() if value is not None})
    pipeline.stop()
    target = Path(disk["path"])
    if compare:
        whole_disk(image, target)
    pipeline.forget()
    remove_vmdk(target)
    return row


def median(rows, key):
    values = [row[key] for row in rows if key in row]
    return statistics.median(values) if values else None


def table(results, size, data):
    """The Markdown table."""
    heads = ["case", "wall s (min–max)", "MB/s disk", "MB/s data", "CPU s", "CPU s/GB agent", "CPU s/GB server",
             "CPU s/GB target", "RSS agent", "RSS server", "RSS target", "agent → MB", "→ target MB", "loopback MB",
             "other CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]

    def show(value, scale, digits):
        return "–" if value is None else f"{value / scale:.{digits}f}"

    for case, rows in results.items():
        wall, walls = median(rows, "wall"), [row["wall"] for row in rows]
        cells = [case, f"{wall:.1f} ({min(walls):.1f}–{max(walls):.1f})", f"{size / 1e6 / wall:.0f}",
                 f"{data / 1e6 / wall:.0f}", show(median(rows, "cpu"), 1, 1)]
        cells += [show(median(rows, f"cpu {name}"), size / GB, 2) for name in ("agent", "process-server", "master-target")]
        cells += [show(median(rows, f"rss {name}"), 1 << 20, 0) for name in ("agent", "process-server", "master-target")]
        last = "relay_sent" if any("relay_sent" in row for row in rows) else "agent_sent"
        cells += [show(median(rows, key), 1e6, 0) for key in ("agent_sent", last, "loopback")]
        lines.append("| " + " | ".join([*cells, show(median(rows, "other"), 1, 1)]) + " |")
    return "\n".join(lines)


def body(lab):
    size, fill, rounds = size_setting("8G"), setting("FILL", 50, int), setting("ROUNDS", 3, int)
    kind, seed = setting("TARGET", "flat"), setting("SEED", 1, int)
    wanted = setting("CASES", ";".join(CASES)).split(";")
    unknown = [case for case in wanted if case not in CASES]
    if unknown:
        raise LabError(f"unknown cases {unknown}; there are {'; '.join(CASES)}")
    lab.need_space(size * 3 // 2, f"a benchmark of {mib(size)}")
    image = lab.dir / "disk.raw"
    make_image(image, size, fill, seed)
    data = data_bytes(image)
    isolated = isolate_network()
    say(f"disk {mib(size)}, data {mib(data)}, seed {seed}, target {kind}, {os.cpu_count()} CPUs, "
        f"{'own network' if isolated else 'SHARED LOOPBACK: wire bytes include others'}")
    results = {case: [] for case in wanted}
    for number in range(rounds):
        for case in wanted:
            row = measure(lab, image, kind, *CASES[case], compare=number == 0)
            results[case].append(row)
            say(f"  round {number + 1}, {case}: {row['wall']:.1f} s, {row['cpu']:.1f} CPU-s, other {row['other']:.1f}")
    say("\n" + table(results, size, data))
    say(f"\nMedians of {rounds}; CPU seconds per GB of disk; RSS in MiB, peak; the first round of each case was compared.")


if __name__ == "__main__":
    sys.exit(main("bench-sync", body))
