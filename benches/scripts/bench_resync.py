#!/usr/bin/env python3
"""An existing target differs in a few blocks: what does it cost to find and repair them, beside rsync and beside reading.

Environment: SIZE (8G), FILL (50), PERCENTS ("5 1") of the 4 KiB blocks with data, ROUNDS (1), LEVEL (1), SEED (1),
REPROTECT_BIN_DIR (release). Each round, one after another and each with cold caches (root): both images read past the
page cache at the same time and nothing else (`dd`), a compare by our three daemons less the relay, and
`rsync --inplace --no-whole-file -B 16384 -z` (zstd 1) with its daemon; the same blocks are changed before each. Wall time:
ours from `protect` until the target calls the disk synced, after its last flush; rsync's until its file is flushed. CPU
seconds are the kernel's, of all processes of both ends; `other` is CPU the machine spent on anything else: wall times with
much of it mean little. Wire bytes are loopback in a network of our own, both directions, all headers. Frames are what we
hand to the transport for data; the rest of the wire is questions, answers, and headers. The yardstick for differences is
zlib at level 1, block by block, and LEVEL is pinned so that it can be held to that: `adaptive` is the quickest on loopback, and sends a tenth
more. `pass` is the time by the target's own receipt: without its opening, and the commands. Asserted: every target ends identical. Ratios to the goals are printed, not asserted.
Called by `make bench-resync`.
"""

import os
import random
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

from bench_sync import busy_seconds
from delta_test import BLOCK, data_blocks
from lab import die_with_parent, isolate_network, loopback_bytes, run, wait_for
from pipeline import Pipeline, quiet_caches
from proof import extents, whole_disk
from runner import LabError, main, make_source, mib, say, setting, size_setting

#: The goals: wire over the differences compressed, as a share of the disk; time over reading both images.
WIRE_SHARE, TIME_RATIO = 0.001, 1.2


def compressed_bytes(image, blocks):
    """What the blocks compress to, one by one; one that does not shrink counts as it is."""
    total = 0
    with open(image, "rb", buffering=0) as file:
        for block in blocks:
            total += min(BLOCK, len(zlib.compress(os.pread(file.fileno(), BLOCK, block * BLOCK), 1)))
    return total


def overwrite(extent, blocks, seed):
    """Puts other content into these blocks, half of it noise."""
    rng = random.Random(seed)
    with open(extent, "r+b", buffering=0) as file:
        for block in blocks:
            os.pwrite(file.fileno(), rng.randbytes(BLOCK // 2) + b"\x5a" * (BLOCK // 2), block * BLOCK)
        os.fsync(file.fileno())


def read_both(image, extent):
    """Both images at the same time, past the page cache; answers seconds."""
    quiet_caches()
    begun = time.monotonic()
    readers = [subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"],
                                preexec_fn=die_with_parent) for path in (image, extent)]
    if any([reader.wait() for reader in readers]):
        raise LabError("an image cannot be read past the page cache")
    return {"wall": time.monotonic() - begun}


def measured(row, lo, busy):
    """Adds what the network and the rest of the machine did."""
    row["wire"] = loopback_bytes() - lo
    row["other"] = max(0.0, busy_seconds() - busy - row["cpu"])
    return row


def ours(lab, source, vmdk, level):
    pipeline = Pipeline(lab, source, relay=False, agent={"compress": "source", "compress_level": level})
    pipeline.start()
    pipeline.machine()
    quiet_caches()
    before = {name: daemon.usage()[0] for name, daemon in lab.daemons.items()}
    lo, busy, begun = loopback_bytes(), busy_seconds(), time.monotonic()
    pipeline.protect(original=vmdk, overwrite=True)
    pipeline.wait_synced(3600, quiet=True, pause=0.05)
    wall = time.monotonic() - begun
    cpu = sum(daemon.usage()[0] - before[name] for name, daemon in lab.daemons.items())
    row = measured({"wall": wall, "cpu": cpu}, lo, busy)
    row["frames"] = pipeline.counters()["agent_sent"]
    receipt = lab.target.command("receipts")["receipts"][0]
    row["pass"] = (receipt["ended_ms"] - receipt["begun_ms"]) / 1000
    pipeline.stop()
    pipeline.forget()
    return row


def rsync(lab, image, extent):
    """The same by rsync, compressing as we do, with its daemon at the target."""
    folder = lab.dir / "rsync"
    folder.mkdir(exist_ok=True)
    config, port, log = folder / "rsyncd.conf", 8873, folder / "rsyncd.log"
    config.write_text(f"use chroot = no\nlog file = {log}\nlock file = {folder}/lock\n[target]\npath = {extent.parent}\n"
                      f"read only = no\nuid = {os.geteuid()}\ngid = {os.getegid()}\n")
    server = subprocess.Popen(["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={config}"],
                              stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    lab.undo("end rsync's daemon", lambda: server.poll() is None and server.kill())
    address = f"rsync://127.0.0.1:{port}/target/"
    wait_for("rsync's daemon answers", lambda: run("rsync", address, check=False).returncode == 0, log=log)
    quiet_caches()
    lo, busy, begun = loopback_bytes(), busy_seconds(), time.monotonic()
    client = subprocess.Popen(["rsync", "--inplace", "--no-whole-file", "--ignore-times", "-B", "16384", "-z", "--zc=zstd", "--zl=1",
                               image, address + extent.name], stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    _, status, used = os.wait4(client.pid, 0)
    client.returncode = os.waitstatus_to_exitcode(status)
    if client.returncode:
        raise LabError(f"rsync ended with {client.returncode}; see {log}")
    descriptor = os.open(extent, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    wall, wire, busy_then = time.monotonic() - begun, loopback_bytes() - lo, busy_seconds()
    time.sleep(0.5)  # its child's time counts when that has ended
    server.terminate()
    _, status, served = os.wait4(server.pid, 0)
    server.returncode = os.waitstatus_to_exitcode(status)
    cpu = sum(part.ru_utime + part.ru_stime for part in (used, served))
    return {"wall": wall, "cpu": cpu, "wire": wire, "other": max(0.0, busy_then - busy - cpu)}


def report(percent, rows, count, compressed, size):
    middle = {who: {key: statistics.median(row[key] for row in all_rows) for key in all_rows[0]} for who, all_rows in rows.items()}
    say(f"\n{percent} % changed: {count} blocks, {mib(count * BLOCK)}, {mib(compressed)} compressed one by one\n")
    say("| what | wall s (min–max) | × reading both | CPU s | wire MiB | over the differences, % of the disk | other CPU s |\n" + "|---|" + "---|" * 6)
    for who, row in middle.items():
        walls = [one["wall"] for one in rows[who]]
        cells = [who, f"{row['wall']:.1f} ({min(walls):.1f}–{max(walls):.1f})", f"{row['wall'] / middle['reading both']['wall']:.2f}"]
        cells += [f"{row['cpu']:.1f}", f"{row['wire'] / (1 << 20):.1f}", f"{100 * (row['wire'] - compressed) / size:.3f}",
                  f"{row['other']:.1f}"] if "cpu" in row else ["–"] * 4
        say("| " + " | ".join(cells) + " |")
    own = middle["reprotect"]
    share, ratio = (own["wire"] - compressed) / size, own["wall"] / middle["reading both"]["wall"]
    rest = own["wire"] - own["frames"]
    say(f"\nframes of data {mib(own['frames'])} ({mib(own['frames'] - compressed)} over the differences); questions, answers and all "
        f"headers of the transport {mib(rest)}, {100 * rest / size:.3f} % of the disk; {own['pass']:.1f} s by the target's receipt")
    for what, got, goal in (("wire over the differences, % of the disk", 100 * share, 100 * WIRE_SHARE), ("time, × reading both", ratio, TIME_RATIO)):
        say(f"goal: {what} ≤ {goal:g}: {got:.3f}, {'met' if got <= goal else 'MISSED'}")


def body(lab):
    size, fill, rounds, seed = size_setting("8G"), setting("FILL", 50, int), setting("ROUNDS", 1, int), setting("SEED", 1, int)
    percents = [int(word) for word in setting("PERCENTS", "5 1").split()]
    level = setting("LEVEL", 1)
    level = level if level == "adaptive" else int(level)
    lab.need_space(size * 2, f"a benchmark of {mib(size)}")
    image, source = make_source(lab, size, fill, seed)
    vmdk = lab.dir / "existing" / "found.vmdk"
    vmdk.parent.mkdir()
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", image, vmdk, timeout=1800)
    extent = extents(vmdk)[0][0]
    blocks = data_blocks(image)
    if not isolate_network():
        raise LabError("this needs root: without a network of its own nobody can count its bytes")
    say(f"disk {mib(size)}, data {mib(len(blocks) * BLOCK)}, seed {seed}, {os.cpu_count()} CPUs, {rounds} rounds")
    for percent in percents:
        chosen = sorted(random.Random(seed + percent).sample(blocks, max(1, len(blocks) * percent // 100)))
        rows = {"reading both": [], "reprotect": [], "rsync": []}
        for number in range(rounds):
            for who, one in (("reading both", lambda: read_both(image, extent)), ("reprotect", lambda: ours(lab, source, vmdk, level)),
                             ("rsync", lambda: rsync(lab, image, extent))):
                overwrite(extent, chosen, seed + number)
                row = one()
                rows[who].append(row)
                say(f"  {percent} %, round {number + 1}, {who}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()))
                if who != "reading both":
                    whole_disk(image, vmdk)
        report(percent, rows, len(chosen), compressed_bytes(image, chosen), size)


if __name__ == "__main__":
    sys.exit(main("bench-resync", body))
