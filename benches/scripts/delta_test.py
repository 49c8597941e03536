#!/usr/bin/env python3
"""An existing target differs in a share of its blocks: only the differences may travel.

Environment: SIZE (8G), FILL (50), PERCENT (5) of the 4 KiB blocks with data, RELAY (0), SEED (random, printed), KEEP.
Asserted: the target ends identical; bytes on the wire, both directions and all headers, are at most the changed blocks
compressed plus 0.3 % of the disk. The yardstick is zlib at level 1, block by block; LEVEL (adaptive) is ours. The wire is loopback in a network of our own (root), else the daemons' own counters.
Called by `make delta-test` and by the suite.
"""

import random
import sys
import zlib
from pathlib import Path

from lab import isolate_network, loopback_bytes, run
from pipeline import Pipeline
from proof import CHUNK, extents, whole_disk
from runner import LabError, main, make_source, mib, say, seed_setting, setting, size_setting

BLOCK = 4096
OVERHEAD_SHARE = 0.003


def data_blocks(path):
    """Numbers of the blocks that are not all zero."""
    found, at = [], 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            count = len(data) // BLOCK
            if data.count(0) != len(data):
                found += [at + n for n in range(count) if any(data[n * BLOCK : (n + 1) * BLOCK])]
            at += count
    return found


def spoil(source, extent, percent, seed):
    """Overwrites a share of the data blocks; answers how many, and their true content compressed block by block."""
    rng, blocks = random.Random(seed), data_blocks(source)
    chosen = sorted(rng.sample(blocks, max(1, len(blocks) * percent // 100)))
    compressed = 0
    with open(source, "rb", buffering=0) as true, open(extent, "r+b", buffering=0) as file:
        for block in chosen:
            true.seek(block * BLOCK)
            # As fast compressors do: a block that does not shrink travels as it is.
            compressed += min(BLOCK, len(zlib.compress(true.read(BLOCK), 1)))
            file.seek(block * BLOCK)
            file.write(rng.randbytes(BLOCK // 2) + b"\x5a" * (BLOCK // 2))
    return len(chosen), compressed


def body(lab):
    size, percent = size_setting("8G"), setting("PERCENT", 5, int)
    relay, seed = setting("RELAY", "0") != "0", seed_setting()
    lab.need_space(size * 3 // 2, f"a delta test of {mib(size)}")
    image, source = make_source(lab, size, setting("FILL", 50, int), seed)
    existing = lab.dir / "existing"
    existing.mkdir()
    vmdk = existing / "found.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", image, vmdk, timeout=1800)
    count, compressed = spoil(image, extents(vmdk)[0][0], percent, seed)
    say(f"  {count} blocks changed in the target, {mib(compressed)} compressed one by one")
    isolated = isolate_network()
    level = setting("LEVEL", "adaptive")
    level = level if level == "adaptive" else int(level)
    own = {"compress": "relay"} if relay else {"compress": "source", "compress_level": level}
    pipeline = Pipeline(lab, source, relay=relay, agent=own, process_server={"level": level})
    pipeline.start()
    before = loopback_bytes()
    pipeline.protect(original=vmdk, overwrite=True)
    disk = pipeline.wait_synced(max(300, size / 5e6), label="compare and repair")
    counted = pipeline.counters()
    receipts = lab.target.command("receipts")["receipts"]
    if [(receipt["cause"], receipt["result"]) for receipt in receipts] != [("INITIAL_COMPARE", "done")]:
        raise LabError(f"there should be one receipt, of the first compare: {receipts}")
    receipt = receipts[0]
    if receipt["compared_bytes"] < size or not count * BLOCK <= receipt["moved_bytes"] <= counted["agent_plain"]:
        raise LabError(f"the receipt does not say what was done: {receipt}")
    say(f"  receipt: {mib(receipt['compared_bytes'])} compared, {mib(receipt['moved_bytes'])} moved in {receipt['range_count']} ranges, "
        f"{(receipt['ended_ms'] - receipt['begun_ms']) / 1000:.1f} s")
    if isolated and not relay:
        wire, how = loopback_bytes() - before, "loopback, both directions, all headers"
    else:
        wire, how = counted["target_received"], "batches received by the target"
    pipeline.stop()
    for verdict in whole_disk(source, Path(disk["path"])):
        say(f"  {verdict}")
    allowed = compressed + int(size * OVERHEAD_SHARE)
    say(f"  plain {mib(counted['agent_plain'])} in batches of {mib(counted['agent_sent'])}")
    say(f"  wire {mib(wire)} ({how}); {mib(allowed)} allowed")
    if wire < compressed // 4:
        raise LabError("fewer bytes than the changes can have: something else was measured")
    if wire > allowed:
        raise LabError(f"{mib(wire)} on the wire, {mib(allowed)} allowed")


if __name__ == "__main__":
    sys.exit(main("delta-test", body))
