#!/usr/bin/env python3
"""A guest with LVM on the tracked disk loses its power while it writes, again and again.

The cut is `kill -9` of QEMU with its write-back cache on this host's page cache, which survives: a crash of the guest, whose
acknowledged writes are all there. What a disk's own volatile cache loses is not shown here.

Environment: KERNELS ("6.1 6.12"), CUTS (2, for each kernel; every second one is followed by another before the compare has
ended), SIZE (512M), LOAD (8, seconds of load before a cut), RELAY (1), SEED (random, printed), KEEP. The agent runs in the
guest, the other daemons here. Asserted: the best capture programs load on that kernel and the disk below the logical volume
is followed, not scanned; capture refuses a mapped device and a read-only disk by name; after a cut the agent compares by
hash while the load goes on, and follows again; points from before the cut stay, and two of them are judged: ext4's journal
is replayed, `e2fsck -fn` then finds nothing, and the ordered writer (A, fsync, B, fsync) never shows B without A; when the
load has stopped the newest point is the guest's disk, byte for byte.
Called by `make guest-test`, and small by the suite. Needs no root.
"""

import json
import os
import random
import re
import sys
import time
from types import SimpleNamespace

from guest import HOST, Guest, Missing, initramfs, kernel, need
from lab import AGENT, RELAY, TARGET, LabError, run, wait_for
from live import crash_points, newest
from pipeline import Pipeline
from runner import main, mib, say, seed_setting, setting, size_setting, skipped

STATE = "/mnt/state/agent"
DATA = "/mnt/data"
VOLUME = "/dev/mapper/vg-data"
# Both kernels take the best programs there are.
VARIANT = "variant=typed, loops, records of any length"
# The guest's clock is set to whole seconds.
CLOCK_SECONDS = 2


class GuestAgent:
    """The agent in the guest, with what the pipeline asks of a daemon."""

    name = AGENT

    def __init__(self, lab, guest):
        self.lab, self.guest = lab, guest
        self.log = f"agent.log on {lab.dir / 'state.raw'}"

    @property
    def process(self):
        return self.guest.process or SimpleNamespace(poll=lambda: 0, returncode=0)

    def configure(self, upstream, **more):
        include, exclude = more.get("include", ["/dev/vda"]), more.get("exclude", ["vdb", "vdc"])
        text = (f'upstream = ["{HOST}:{upstream}"]\n[capture]\ninterval = "1s"\n'
                f"[disks]\ninclude = {json.dumps(include)}\nexclude = {json.dumps(exclude)}\n")
        place = more.get("place", f"{STATE}/agent.toml")
        self.guest.run(f"mkdir -p {STATE}; chmod 700 {STATE}; cat >{place} <<'X'\n{text}X")

    def start(self):
        self.guest.run(f"echo --- >>{STATE}/agent.log; "
                       f"setsid reprotect-agent run --state-dir {STATE} >>{STATE}/agent.log 2>&1 &")
        wait_for("the agent in the guest answers", self.status, 60)

    def stop(self):
        """Ends it as an administrator would."""
        self.guest.run("kill $(pidof reprotect-agent); "
                       "for i in $(seq 100); do pidof reprotect-agent || exit 0; sleep 0.2; done; exit 1")

    def status(self):
        code, text = self.guest.try_run(f"reprotect-agent status --json --state-dir {STATE} 2>/dev/null")
        try:
            return json.loads(text) if code == 0 else None
        except ValueError:
            return None

    def command(self, *words):
        return json.loads(self.guest.run(f"reprotect-agent {' '.join(words)} --json --state-dir {STATE}", 120) or "null")

    def logged(self, pattern):
        """Lines of this start's log that match."""
        text = self.guest.run(f"cat {STATE}/agent.log").rpartition("---\n")[2]
        return [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if re.search(pattern, line)]

    def tail(self, lines=15):
        try:
            text = self.guest.try_run(f"tail -n {lines} {STATE}/agent.log")[1]
        except (LabError, OSError) as error:
            return f"  | {error}"
        return "\n".join(f"  | {line}" for line in text.splitlines())


class GuestPipeline(Pipeline):
    """The daemons here, the agent in the guest."""

    def __init__(self, lab, guest, **settings):
        super().__init__(lab, "/dev/vda", **settings)
        self.guest, self.agent = guest, GuestAgent(lab, guest)

    def start(self):
        """All but the agent, which is enrolled."""
        target = self.lab.add(TARGET, {"listen": f"127.0.0.1:{self.target_port}", "advertise": ["127.0.0.1", HOST],
                                       **self.configs[TARGET]})
        target.start_and_wait()
        upstream = self.target_port
        if self.with_relay:
            relay = self.lab.add(RELAY, {"listen": f"127.0.0.1:{self.relay_port}",
                                         "targets": [f"127.0.0.1:{self.target_port}"]})
            self.enroll(relay)
            relay.start_and_wait()
            upstream = self.relay_port
        self.lab.daemons[AGENT] = self.agent
        self.agent.configure(upstream)
        self.enroll(self.agent)
        return upstream


class Machine:
    """The guest with its disks: `vda` is tracked and has the volume group, `vdb` has the agent's state, `vdc` is read-only."""

    def __init__(self, lab, version, size, seed):
        self.lab, self.seed = lab, seed
        self.disk, state, fixed = (lab.dir / f"{name}.raw" for name in ("disk", "state", "fixed"))
        for file, length in ((self.disk, size), (state, 256 << 20), (fixed, 16 << 20)):
            with open(file, "wb") as made:
                made.truncate(length)
        run("mkfs.ext4", "-q", "-F", state)
        found = kernel(version)
        self.release = found.release
        initrd, programs = lab.dir / "initrd", {}
        for name in ("reprotect-agent", "live_writer"):
            if not (lab.binaries / name).exists():
                raise LabError(f"{lab.binaries / name} is missing; run `cargo build --workspace --bins`")
            # Debug information would be most of the guest's memory.
            run("strip", "-o", lab.dir / name, lab.binaries / name)
            programs[lab.dir / name] = f"/bin/{name}"
        for name in ("lvm", "mkfs.ext4"):
            programs[tool(name)] = f"/sbin/{name}"
        initramfs(initrd, found, programs)
        drives = [(f"file={self.disk},cache=writeback,discard=unmap", "reprotect-live"),
                  (f"file={state},cache=writeback", "reprotect-state"), (f"file={fixed},readonly=on", "reprotect-fixed")]
        self.guest = Guest(lab, found, initrd, drives, {"DM_DISABLE_UDEV": "1", "PATH": "/bin:/sbin"})

    def boot(self):
        seconds = self.guest.start()
        self.guest.run("mkdir -p /mnt/state /mnt/data; mount -t ext4 /dev/vdb /mnt/state")
        return seconds

    def uptime(self):
        """Seconds since the boot."""
        return float(self.guest.run("cat /proc/uptime").split()[0])

    def make_volume(self):
        """ext4 on LVM on the whole disk; answers where on the disk the file system begins."""
        self.guest.run("lvm pvcreate -q /dev/vda && lvm vgcreate -q vg /dev/vda && "
                       "lvm lvcreate -q -y -Wn -Zn -n data -l 100%FREE vg && "
                       f"mkfs.ext4 -q {VOLUME} && mount -t ext4 -o discard {VOLUME} {DATA} && "
                       f"dd if=/dev/urandom of={DATA}/first bs=1M count={self.disk.stat().st_size >> 24} 2>&1 && sync", 300)
        extents = self.guest.run("lvm pvs --noheadings --units b --nosuffix -o pe_start /dev/vda")
        return int(extents.split()[-1])

    def attach(self):
        """After a boot: ext4 replays its journal."""
        self.guest.run(f"lvm vgchange -q -ay vg && mount -t ext4 -o discard {VOLUME} {DATA}", 120)

    def detach(self):
        self.guest.run(f"umount {DATA} && lvm vgchange -q -an vg && sync", 120)

    def write(self):
        self.seed += 1
        self.guest.run(f"setsid live_writer {DATA} {self.seed} 600 >/run/writer.log 2>&1 &")

    def stop_writing(self):
        code, said = self.guest.try_run("kill $(pidof live_writer); code=$?; "
                                        "while pidof live_writer; do sleep 0.2; done; exit $code")
        if code:
            said += self.guest.try_run("cat /run/writer.log; dmesg | tail")[1]
            raise LabError(f"the writer in the guest ended by itself: {said}")


def tool(name):
    """A helper program of this host."""
    for folder in os.environ["PATH"].split(":"):
        if os.access(f"{folder}/{name}", os.X_OK):
            return os.path.realpath(f"{folder}/{name}") if name == "lvm" else f"{folder}/{name}"
    raise Missing(f"{name} is not installed; run `make setup`")


def judge(lab, image, offset):
    """What a point shows: the numbers of the ordered writer. No mount is needed, and so no device mapper on this host."""
    volume = lab.dir / "volume.raw"
    volume.unlink(missing_ok=True)
    run("dd", f"if={image}", f"of={volume}", "bs=1M", "iflag=skip_bytes", f"skip={offset}", "conv=sparse", "status=none")
    run("e2fsck", "-y", "-E", "journal_only", volume)
    run("e2fsck", "-fn", volume)
    shown = []
    for name in ("a", "b"):
        place = lab.dir / f"judged-{name}"
        place.unlink(missing_ok=True)
        run("debugfs", "-R", f"dump /{name} {place}", volume)
        # A point may be from before the writer began.
        shown.append(newest(place) if place.exists() else 0)
    if not shown[0] - 1 <= shown[1] <= shown[0]:
        raise LabError(f"A holds {shown[0]} and B {shown[1]}: B was never written before A was durable")
    return shown[1]


def export(lab, pipeline, point):
    copy = lab.dir / "point.raw"
    copy.unlink(missing_ok=True)
    lab.target.command("export", pipeline.disk["disk"], point["point"], "--format", "raw", "-o", copy, timeout=600)
    return copy


def check_refusals(pipeline, upstream):
    """What cannot be followed is said by name, with the reason."""
    for device, reason in ((VOLUME, "mapped device"), ("/dev/vdc", "read-only")):
        place = "/run/refused.toml"
        pipeline.agent.configure(upstream, include=[device], exclude=["vda", "vdb"], place=place)
        text = pipeline.guest.try_run(f"reprotect-agent check --json --config {place} --state-dir {STATE} 2>/dev/null", 120)[1]
        try:
            findings = json.loads(text[text.index("{"):])
        except ValueError:
            raise LabError(f"check of {device} printed no JSON: {text[:300]}") from None
        told = [finding for finding in findings["findings"] if finding["name"] == "capture"]
        if not told or told[0]["verdict"] == "PASS" or reason not in json.dumps(told) or device not in json.dumps(told):
            raise LabError(f"{device} is not refused for being {reason}: {told}")
        say(f"  refused: {told[0]['reason']}")


def wait_points(pipeline, count, seconds):
    """Waits for so many more crash-consistent points."""
    name, target = pipeline.disk["disk"], pipeline.lab.target
    before = {point["point"] for point in crash_points(target, name)}

    def more():
        pipeline.check_alive()
        return len({point["point"] for point in crash_points(target, name)} - before) >= count

    wait_for(f"{count} more crash-consistent points", more, seconds, pipeline.agent.log, 0.5)


def wait_compared(pipeline, since, seconds):
    """Waits until a pass or round that began after `since` is durable: after a boot the first one is the compare.

    The target itself calls the disk synced until the agent is back."""
    def durable():
        pipeline.check_alive()
        info = ((pipeline.agent.status() or {}).get("disks") or [{}])[0]
        return info.get("durable_as_of_ms", 0) > since * 1000 and info

    return wait_for("the disk is compared after the cut", durable, seconds, pipeline.agent.log, 0.5)


def wait_quiet_point(pipeline):
    """Waits for a point of the disk as it is now, after the last write; answers all points, that one last."""
    since, name, target = (time.time() + CLOCK_SECONDS) * 1000, pipeline.disk["disk"], pipeline.lab.target

    def there():
        pipeline.check_alive()
        points = crash_points(target, name)
        return points and points[-1]["source_time_ms"] > since and points

    return wait_for("a point after the last write", there, 180, pipeline.agent.log, 0.5)


def check_followed(pipeline):
    info = pipeline.agent.status()["disks"][0]
    if info["capture"] != "window":
        raise LabError(f"the disk is not followed: {info['capture']}\n{pipeline.agent.tail(40)}")
    return info


def cut(machine, pipeline, rng):
    """The power goes and comes; the agent is there before the volumes are, or after ext4 replayed its journal unseen.

    Answers what happened, and the points there were."""
    time.sleep(rng.uniform(0, 2))
    machine.guest.cut()
    points = crash_points(pipeline.lab.target, pipeline.disk["disk"])
    booted, first = machine.boot(), rng.random() < 0.5
    if first:
        pipeline.agent.start()
    machine.attach()
    if not first:
        pipeline.agent.start()
    machine.write()
    return f"booted in {booted:.0f} s, agent {'before' if first else 'after'} the volume", points


def cut_and_check(lab, machine, pipeline, offset, rng, again):
    """A cut while the guest writes, with `again` one more before the compare ended, and all that must hold afterwards."""
    agent, size = pipeline.agent, machine.disk.stat().st_size
    told, before = cut(machine, pipeline, rng)
    if again:
        time.sleep(rng.uniform(0, 4))
        more, before = cut(machine, pipeline, rng)
        told += f", and again: {more}"
    begun, since = time.monotonic(), time.time()
    info = wait_compared(pipeline, since - machine.uptime(), max(180, size / 1e6))
    compared = time.monotonic() - begun
    check_followed(pipeline)
    causes = agent.logged("what was before is not known")
    if not causes:
        raise LabError(f"the agent does not say that it compares\n{agent.tail(40)}")
    wait_points(pipeline, 1, 180)
    machine.stop_writing()
    machine.detach()
    points = wait_quiet_point(pipeline)
    lost = {point["point"] for point in before} - {point["point"] for point in points}
    if not before or lost:
        raise LabError(f"of {len(before)} points from before the cut {len(lost)} are gone")
    run("cmp", machine.disk, export(lab, pipeline, points[-1]))
    shown = [judge(lab, export(lab, pipeline, point), offset) for point in (rng.choice(before), before[-1])]
    say(f"  cut: {told}; compared within {compared:.0f} s, {mib(info['read_bytes'])} read, "
        f"{mib(info['plain_bytes_sent'])} sent; {len(before)} points stayed, ordered writes {shown[0]} and {shown[1]} in those "
        "judged; the disk is identical")
    return causes[-1]


def kernel_test(lab, version, cuts, size, load, seed):
    need("qemu-system-x86_64", "busybox", "strip", "debugfs", "e2fsck")
    rng = random.Random(seed)
    machine = Machine(lab, version, size, seed)
    say(f"kernel {version}: {machine.release}")
    say(f"  booted in {machine.boot():.0f} s")
    retention = {"path": str(lab.dir / "retention"), "undo_epoch": "5s", "segment_bytes": "64 MiB"}
    pipeline = GuestPipeline(lab, machine.guest, relay=setting("RELAY", "1") == "1", target={"retention": retention})
    offset = machine.make_volume()
    upstream = pipeline.start()
    check_refusals(pipeline, upstream)
    machine.write()
    pipeline.agent.start()
    pipeline.protect("flat")
    begun = time.monotonic()
    pipeline.wait_synced(max(240, size / 1e6), quiet=True, pause=0.5)
    say(f"  initial sync of {mib(size)} in {time.monotonic() - begun:.0f} s")
    check_followed(pipeline)
    attached = " ".join(pipeline.agent.logged("capture programs attached"))
    say(f"  capture: window, programs {attached.partition('variant=')[2].partition(' place=')[0] or 'not named'}")
    if VARIANT not in attached:
        raise LabError(f"this kernel is to take {VARIANT}; see {pipeline.agent.log}\n{pipeline.agent.tail(60)}")
    wait_points(pipeline, 2, 180)
    for number in range(cuts):
        if number:
            machine.attach()
            machine.write()
            wait_points(pipeline, 1, 180)
        time.sleep(load)
        cause = cut_and_check(lab, machine, pipeline, offset, rng, number % 2 == 1)
    say(f"  told by the agent: {re.sub(r'.*what was before', 'what was before', cause)}")
    pipeline.agent.stop()
    machine.guest.run("umount /mnt/state")
    machine.guest.off()
    for daemon in (lab.relay, lab.target):
        if daemon is not None:
            daemon.stop()
    say(f"  {machine.guest.boots - 1} cuts on {machine.release}: all identical")


def body(lab):
    versions, cuts = setting("KERNELS", "6.1 6.12").split(), setting("CUTS", 2, int)
    size, load, seed = size_setting("512M"), setting("LOAD", 8, float), seed_setting()
    lab.need_space(size * 4 * len(versions), f"a guest test of {mib(size)}")
    top, states = lab.dir, lab.states
    for version in versions:
        lab.dir, lab.states = top / version, states / version
        lab.dir.mkdir()
        lab.states.mkdir(exist_ok=True)
        lab.daemons.clear()
        try:
            kernel_test(lab, version, cuts, size, load, seed)
        except Missing as error:
            skipped(f"no guest with kernel {version}: {error}")
        finally:
            lab.dir, lab.states = top, states


if __name__ == "__main__":
    sys.exit(main("guest-test", body))
