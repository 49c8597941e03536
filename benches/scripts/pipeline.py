"""Three daemons that replicate one disk: configured, enrolled, started, watched.

Why: every script goes the same way an operator goes, through the same commands. Invariants: only public commands and
the status JSON are used; the agent is given the one source and no other disk of the machine; a problem that a daemon
reports ends the wait at once. Bytes and seconds. Used by the scripts beside it.
"""

import shutil
import subprocess
import sys
import time

from lab import AGENT, RELAY, TARGET, LabError, free_port, mib, say, wait_for

VMDK_KINDS = ("flat", "vmfs", "2gb-flat", "sparse", "2gb-sparse")
KINDS = (*VMDK_KINDS, "device")
LET_GO = "let go of the disks"


class Progress:
    """One line that is redrawn on a terminal, a line every few seconds elsewhere."""

    WIDTH = 32

    def __init__(self, label, total):
        self.label, self.total, self.begun, self.shown = label, total, time.monotonic(), 0.0
        self.terminal = sys.stdout.isatty()

    def update(self, done, note="", final=False):
        now = time.monotonic()
        if not final and now - self.shown < (0.1 if self.terminal else 1.0):
            return
        self.shown, span = now, max(now - self.begun, 0.001)
        rate, share = done / span, done / self.total if self.total else 1.0
        filled = int(self.WIDTH * share)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        left = (self.total - done) / rate if rate > 0 else None
        eta = f"done in {span:.1f} s" if final else "ETA --" if left is None else f"ETA {left:.0f} s"
        text = f"  {self.label} [{bar}] {share:6.1%}  {mib(done)} of {mib(self.total)}  {rate / 1e6:,.0f} MB/s  {eta}{note}"
        if self.terminal:
            width = shutil.get_terminal_size().columns
            print("\r" + text[: width - 1].ljust(width - 1), end="\n" if final else "", flush=True)
        else:
            say(text)


class Pipeline:
    """Agent, perhaps process servers, and master target around one source.

    `relay` is how many process servers there are; the agent may use all of them, or the target itself where there are none."""

    def __init__(self, lab, source, relay=True, agent=None, process_server=None, target=None, way=lambda address: address):
        self.lab, self.source, self.with_relay, self.relays = lab, str(source), bool(relay), int(relay)
        self.target_port, self.relay_port = free_port(), free_port()
        #: Where a daemon dials another one that listens at an address.
        self.way = way
        self.relay_of = {}
        self.configs = {AGENT: agent or {}, RELAY: process_server or {}, TARGET: target or {}}
        self.disk = None
        self.datastore = lab.dir / "datastore"
        self.datastore.mkdir(exist_ok=True)

    def start(self):
        """Starts everything; certificates are fresh."""
        target = self.lab.add(TARGET, {"listen": f"127.0.0.1:{self.target_port}", **self.configs[TARGET]})
        target.start_and_wait()
        for number in range(self.relays):
            port = free_port() if number else self.relay_port
            instance = f"{RELAY}-{number + 1}" if number else RELAY
            relay = self.lab.add(RELAY, {"listen": f"127.0.0.1:{port}", "targets": [self.way(f"127.0.0.1:{self.target_port}")],
                                         **self.configs[RELAY]}, instance)
            self.enroll(relay)
            relay.start_and_wait()
            self.relay_of[self.way(f"127.0.0.1:{port}")] = relay
        upstream = list(self.relay_of) or [self.way(f"127.0.0.1:{self.target_port}")]
        config = {"upstream": upstream, **self.configs[AGENT]}
        if "scan_interval" in config:
            # The script is about rounds that read everything, whether the disk could be followed or not.
            config.setdefault("capture", {"mode": "scan"})
        agent = self.lab.add(AGENT, {**config, "disks": {"include": [self.source]}})
        offered = agent.command("disks")["disks"]
        others = [disk["path"] for disk in offered if disk["verdict"]["selected"] and disk["path"] != self.source]
        agent.configure({**config, "disks": {"include": [self.source], "exclude": others}})
        self.enroll(agent)
        # A killed agent leaves its programs in the kernel for the one that comes next; here none does.
        self.lab.undo(LET_GO, lambda: agent.command("unfollow"))
        agent.start_and_wait()

    def enroll(self, daemon):
        invitation = self.lab.target.command("invite", "--role", daemon.name)
        daemon.command("enroll", invitation["token"])

    def machine(self):
        """The one enrolled machine, when the target knows its disk."""
        def found():
            listed = self.lab.target.command("machines")
            machines = listed if isinstance(listed, list) else listed["machines"]
            return next((machine for machine in machines if machine["disks"]), None)

        return wait_for("the agent tells the target about its disk", found, log=self.lab.agent.log)

    def protect(self, kind="flat", original=None, overwrite=False):
        """Begins replicating to a new VMDK, or to the existing target `original`."""
        machine = self.machine()
        wanted = [disk for disk in machine["disks"] if self.source.endswith(disk["name"].rsplit("/", 1)[-1])]
        if len(wanted) != 1:
            names = ", ".join(disk["name"] for disk in machine["disks"])
            raise LabError(f"{self.source} should be the only such disk the agent tells about; there are: {names}")
        if original is None:
            place = ["--datastore", self.datastore, "--format", kind]
        else:
            place = ["--original", f"{wanted[0]['source']}={original}"]
        self.lab.target.command("protect", machine["agent"], *place, *(["--yes"] if overwrite else []), timeout=300)
        self.disk = self.target_disk()

    def target_disk(self):
        """The disk in the target's status; None while the target does not answer."""
        status = self.lab.target.status()
        if status is None:
            return None
        if len(status["disks"]) != 1:
            raise LabError(f"the target should have one disk, it has {len(status['disks'])}")
        disk = status["disks"][0]
        if disk["state"] == "failed":
            raise LabError(f"the target gave the disk up: {disk['problem']}")
        return disk

    def check_alive(self):
        for daemon in self.lab.daemons.values():
            if daemon.process.poll() is not None:
                raise LabError(f"{daemon.name} ended with {daemon.process.returncode}:\n{daemon.tail()}")

    def wait_synced(self, seconds, label="initial sync", pause=0.1, quiet=False, between=None):
        """Waits until the whole disk is durable at the target; answers the last status of the disk.

        `between` is called with each status and may kill and restart daemons."""
        end, progress = time.monotonic() + seconds, None
        while True:
            disk = self.target_disk()
            if disk is not None:
                progress = progress or Progress(label, disk["size_bytes"])
                synced = disk["state"] == "synced"
                if not quiet:
                    progress.update(disk["settled_bytes"], final=synced)
                if synced:
                    return disk
                if between:
                    between(disk)
            self.check_alive()
            if time.monotonic() > end:
                logs = ", ".join(str(daemon.log) for daemon in self.lab.daemons.values())
                raise LabError(f"{label}: not done within {seconds:.0f} s; last state {disk and disk['state']!r}, "
                               f"problem {disk and disk['problem']!r}; see {logs}\n{self.lab.agent.tail()}")
            time.sleep(pause)

    def wait_followed(self, seconds, label="following"):
        """Waits until a scan round that began reading after now is durable at the target."""
        since = time.time() * 1000

        def durable():
            self.check_alive()
            status = self.lab.agent.status()
            return status and status["disks"] and status["disks"][0]["durable_as_of_ms"] > since and status["disks"][0]

        return wait_for(f"{label}: a scan round begun after the change is durable", durable, seconds, self.lab.agent.log)

    def counters(self):
        """What each daemon counted, in bytes: read and sent at the agent, in and out of the relay, at the target."""
        agent, disk = self.lab.agent.status() or {}, self.target_disk() or {}
        result = {"agent_read": find(agent, "read_bytes"), "agent_plain": find(agent, "plain_bytes_sent"),
                  "agent_sent": find(agent, "wire_bytes_sent"), "target_received": disk.get("wire_bytes"),
                  "target_written": disk.get("written_bytes"), "target_zeroed": disk.get("zeroed_bytes")}
        if self.lab.relay:
            totals = (self.lab.relay.status() or {}).get("totals", {})
            result["relay_received"] = totals.get("from_agent_bytes")
            result["relay_sent"] = totals.get("to_target_bytes")
        return result

    def stop(self):
        """Ends agent, relays and target in this order, as an administrator would."""
        relays = [daemon for daemon in self.lab.daemons.values() if daemon.name == RELAY]
        for daemon in (self.lab.agent, *relays, self.lab.target):
            daemon.stop()

    def forget(self):
        """Removes state and logs of the ended daemons, so that others can take their place, and what the agent follows."""
        # Before its state: nobody can name its place in the kernel without that.
        self.lab.take_back(LET_GO)
        for daemon in self.lab.daemons.values():
            shutil.rmtree(daemon.state)
            daemon.log.unlink(missing_ok=True)
        self.lab.daemons.clear()


def find(status, key):
    """A counter of the agent: its own sum where it prints one, else the sum over its disks; None if it has none."""
    if key in status:
        return status[key]
    values = [disk[key] for disk in status.get("disks", []) if key in disk]
    return sum(values) if values else None


def quiet_caches():
    """So that a measurement begins cold where that is allowed."""
    subprocess.run(["sync"], check=False)
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3\n")
    except OSError:
        pass
