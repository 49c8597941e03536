#!/usr/bin/env python3
"""`kill -9` of a random daemon, again and again, during the initial sync; it must end identical and not begin anew.

Environment: SIZE (8G), FILL (50), KILLS (20), TARGET (flat), RELAY (1), SEED (random, printed), KEEP. Asserted: all
kills happen before the sync ends; every byte is equal afterwards; plain bytes the agent sent are at most the disk's
data and 64 MiB for each kill. The agent's counter starts at zero in each process, so the last value seen before each of its
deaths is added up; it is asked every 100 ms and just before a kill. Called by `make kill-test` and by the suite.
"""

import random
import sys
import time
from pathlib import Path

from lab import LabError
from pipeline import KINDS, Pipeline, find
from proof import data_bytes, whole_disk
from runner import main, make_source, mib, say, seed_setting, setting, size_setting

RESENT_BYTES_MAX = 64 << 20
POLL = 0.1


class Killer:
    """Kills at points of progress drawn from the seed, and keeps the books."""

    def __init__(self, pipeline, seed, kills, size):
        self.pipeline, self.rng, self.left, self.size = pipeline, random.Random(seed), kills, size
        self.sent_before, self.sent_now, self.done = 0, 0, []
        self.next_at = self.draw(0)

    def draw(self, settled):
        """The next kill: so that those left fit before the end of the disk."""
        step = (self.size - settled) / (self.left + 1)
        return settled + step * self.rng.uniform(0.3, 0.9)

    def look(self):
        status = self.pipeline.lab.agent.status()
        if status:
            self.sent_now = find(status, "plain_bytes_sent") or 0

    def __call__(self, disk):
        self.look()
        if not self.left or disk["settled_bytes"] < self.next_at:
            return
        victim = self.rng.choice(list(self.pipeline.lab.daemons.values()))
        self.look()
        victim.kill()
        if victim is self.pipeline.lab.agent:
            self.sent_before, self.sent_now = self.sent_before + self.sent_now, 0
        self.left -= 1
        self.done.append(victim.name)
        say(f"  kill {len(self.done):>2} at {disk['settled_bytes'] / self.size:6.1%}: {victim.name}")
        time.sleep(self.rng.uniform(0, 0.5))
        victim.start_and_wait()
        self.next_at = self.draw(disk["settled_bytes"])


def body(lab):
    size, kills = size_setting("8G"), setting("KILLS", 20, int)
    kind, seed = setting("TARGET", "flat"), seed_setting()
    if kind not in KINDS or kind == "device":
        raise LabError(f"TARGET={kind}: this test takes a kind of VMDK")
    lab.need_space(size * 3 // 2, f"a kill test of {mib(size)}")
    _, source = make_source(lab, size, setting("FILL", 50, int), seed)
    data = data_bytes(source)
    # Progress is durable once a second; slower reading makes room for every kill on small disks.
    rate = max(8, int(size / (kills + 1) / 1.2 / 1e6))
    pipeline = Pipeline(lab, source, relay=setting("RELAY", "1") != "0", agent={"read_rate": f"{rate} MB/s"})
    pipeline.start()
    pipeline.protect(kind)
    killer = Killer(pipeline, seed, kills, size)
    disk = pipeline.wait_synced(600 + size / 5e6 + kills * 20, pause=POLL, between=killer, label="sync under kills")
    killer.look()
    sent, allowed = killer.sent_before + killer.sent_now, data + kills * RESENT_BYTES_MAX
    if killer.left:
        raise LabError(f"the sync ended after {len(killer.done)} of {kills} kills; take a larger SIZE")
    pipeline.stop()
    for verdict in whole_disk(source, Path(disk["path"])):
        say(f"  {verdict}")
    say(f"  data {mib(data)}, sent {mib(sent)} plain: {mib(max(0, sent - data) / max(1, kills))} more per kill")
    if sent < data // 2:
        raise LabError(f"the agent's counters say {mib(sent)} for {mib(data)} of data: they cannot be right")
    if sent > allowed:
        raise LabError(f"{mib(sent)} sent, {mib(allowed)} allowed: progress was lost")


if __name__ == "__main__":
    sys.exit(main("kill-test", body))
