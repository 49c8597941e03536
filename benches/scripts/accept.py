#!/usr/bin/env python3
"""Acceptance: one disk to every kind of target, one after another, judged by tools that share no code with us.

Environment: SIZE (8G), FILL (50), RELAY (1), TARGETS (all kinds), SEED (1), KEEP. Invariants: free space is checked
before each target, and a target is removed before the next; each is compared by qemu-img, the five VMDK kinds are
checked by it and read back by two independent readers; an attached disk is compared by cmp. Called by `make accept`,
and with a small SIZE by the suite.
"""

import sys
import time
from pathlib import Path

from lab import LabError, is_root
from pipeline import KINDS, Pipeline
from proof import independent_readers, is_device, remove_vmdk, whole_disk
from runner import main, make_source, mib, say, setting, size_setting, skipped


def attached(lab, size):
    """A fresh loop device to write to."""
    image = lab.dir / "attached.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    return image, lab.loop(image)


def accept_one(lab, source, size, fill, relay, kind):
    """Syncs to a target of `kind` with fresh daemons and judges it."""
    # The target, the copy a reader may need, and room for tables and logs.
    lab.need_space(size * min(100, fill + 10) // 100 + (256 << 20), f"a target of kind {kind}")
    image, device = attached(lab, size) if kind == "device" else (None, None)
    pipeline = Pipeline(lab, source, relay=relay)
    pipeline.start()
    begun = time.monotonic()
    pipeline.protect(kind, original=device, overwrite=device is not None)
    disk = pipeline.wait_synced(max(300, size / 5e6), label=f"{kind:<10}")
    span = time.monotonic() - begun
    pipeline.stop()
    target = Path(disk["path"])
    for verdict in whole_disk(source, target):
        say(f"  {verdict}")
    if not is_device(target):
        independent_readers(source, target)
    say(f"  {kind}: {mib(size)} in {span:.1f} s, {size / 1e6 / span:,.0f} MB/s")
    pipeline.forget()
    if device is None:
        remove_vmdk(target)
        pipeline.datastore.rmdir()
    else:
        lab.unloop(device)
        image.unlink()


def body(lab):
    size, fill = size_setting("8G"), setting("FILL", 50, int)
    relay, seed = setting("RELAY", "1") != "0", setting("SEED", 1, int)
    kinds = setting("TARGETS", " ".join(KINDS)).split()
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise LabError(f"unknown kinds {unknown}; there are {', '.join(KINDS)}")
    lab.need_space(size * (fill + 10) // 100, "the source")
    say(f"a disk of {mib(size)}, {fill} % full, seed {seed}, to {', '.join(kinds)}")
    _, source = make_source(lab, size, fill, seed)
    for kind in kinds:
        if kind == "device" and not is_root():
            skipped("target kind device: loop devices need root")
            continue
        accept_one(lab, source, size, fill, relay, kind)


if __name__ == "__main__":
    sys.exit(main("accept", body))
