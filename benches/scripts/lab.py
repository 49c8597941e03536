"""A laboratory of one run: folder, loop devices, mounts, three daemons on loopback; everything is undone at the end.

Why: demo, acceptance, kill, delta and benchmark scripts differ in their story, not in how they start daemons.
Invariants: what is begun is registered for undoing before it can fail; daemons are ended by their own process id;
every wait is bounded and names the log to read; nothing outside the laboratory's folder is written. Bytes and seconds.
Used by the scripts beside it, which print through [`say`].
"""

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
AGENT, RELAY, TARGET = "agent", "process-server", "master-target"
# `sun_path` has 108 bytes; the daemons bind a temporary name beside it first.
SOCKET_PATH_BYTES_MAX = 100
WAIT_SECONDS = 30
os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


class LabError(Exception):
    """What went wrong, in words for the person at the terminal."""


def say(text=""):
    print(text, flush=True)


def mib(count):
    return f"{count / (1 << 20):,.1f} MiB"


def is_root():
    return os.geteuid() == 0


def run(*command, check=True, stdin=None, timeout=600):
    """Runs a helper program and answers its standard output."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout, check=False,
                              stdin=None if stdin is not None else subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed; run `make setup`") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(words)}` did not end within {timeout} s") from error
    if check and done.returncode:
        raise LabError(f"`{' '.join(words)}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()}")
    return done.stdout if check else done


def wait_for(what, probe, seconds=WAIT_SECONDS, log=None, pause=0.1):
    """Calls `probe` until it answers something true."""
    end = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            hint = f"; see {log}" if log else ""
            raise LabError(f"{what}: not within {seconds:.0f} s{hint}")
        time.sleep(pause)


def isolate_network():
    """Moves this process into a network of its own, so that loopback counts only our bytes; whether it worked."""
    if not is_root():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS
    return True


def loopback_bytes():
    """Bytes that went over loopback in this network, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise LabError("there is no loopback interface")


def free_port():
    """A port that is free for UDP and TCP on loopback."""
    for _ in range(100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind(("127.0.0.1", 0))
            try:
                tcp.bind(udp.getsockname())
            except OSError:
                continue
            return udp.getsockname()[1]
    raise LabError("no free port on 127.0.0.1")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over the admin socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=5)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def die_with_parent():
    """In the child: a killed script must not leave daemons behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_fuse(folder, fuse):
    if fuse.poll() is None:
        # Right after a loop device let go of it, it may be busy still.
        wait_for(f"{folder} is unmounted", lambda: run("umount", folder, check=False).returncode == 0)
    fuse.wait(60)


class Daemon:
    """One of the three programs, with its state folder, configuration and log."""

    def __init__(self, lab, name, config, instance=None):
        self.name, self.lab, self.instance = name, lab, instance or name
        self.binary = lab.binaries / f"reprotect-{name}"
        if not self.binary.exists():
            raise LabError(f"{self.binary} is missing; run `cargo build --workspace --bins`")
        self.state = lab.states / self.instance
        self.log = lab.dir / f"{self.instance}.log"
        self.process = None
        self.state.mkdir(mode=0o700)
        self.configure(config)

    def configure(self, config):
        """Writes the configuration: a dictionary, with dictionaries as its tables."""
        tables = {key: value for key, value in config.items() if isinstance(value, dict)}
        # JSON's strings, numbers and lists of them are TOML too.
        lines = [f"{key} = {json.dumps(value)}" for key, value in config.items() if key not in tables]
        for table, entries in tables.items():
            lines += [f"[{table}]"] + [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
        (self.state / f"{self.name}.toml").write_text("\n".join(lines) + "\n")

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([self.binary, "run", "--state-dir", self.state], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, preexec_fn=die_with_parent)
        self.lab.undo(f"end {self.instance}", self.kill)

    def start_and_wait(self):
        self.start()
        wait_for(f"{self.instance} answers on its admin socket", self.is_answering, log=self.log)
        return self

    def is_answering(self):
        if self.process.poll() is not None:
            raise LabError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
        return self.status() is not None

    def tail(self, lines=15):
        text = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  | {line}" for line in text[-lines:])

    def status(self):
        """What `status --json` prints, asked on the admin socket; None while the daemon does not answer."""
        connection = UnixConnection(self.state / f"{self.name}.sock")
        try:
            connection.request("GET", "/v1/status")
            answer = connection.getresponse()
            return json.loads(answer.read()) if answer.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def command(self, *words, stdin=None, timeout=120):
        """A command of the program with `--json`; answers what it printed."""
        try:
            text = run(self.binary, *words, "--json", "--state-dir", self.state, stdin=stdin, timeout=timeout)
        except LabError as error:
            raise LabError(f"{error}\nlast lines of {self.log}:\n{self.tail()}") from error
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise LabError(f"{self.name} {words[0]} --json printed no JSON: {text[:200]!r}") from error

    def stop(self):
        """Ends it as an administrator would."""
        if self.process is None or self.process.poll() is not None:
            raise LabError(f"{self.name} is not running:\n{self.tail()}")
        self.process.terminate()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name} did not end within 60 s of SIGTERM; see {self.log}") from None
        if code != 0:
            raise LabError(f"{self.name} ended with {code} on SIGTERM:\n{self.tail()}")

    def kill(self):
        """`kill -9`, by process id."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def usage(self):
        """CPU seconds and peak resident bytes so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
        return cpu, peak


class Lab:
    """The folder of a run and what must be undone."""

    def __init__(self, name, keep=False):
        self.keep, self.name, self.steps, self.daemons = keep, name, [], {}
        self.binaries = Path(os.environ.get("REPROTECT_BIN_DIR", REPO / "target/debug"))
        root = Path(os.environ.get("REPROTECT_LAB_DIR", REPO / "target/lab"))
        self.dir = root / f"{name}-{os.getpid()}"

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.interrupted)
        self.dir.mkdir(parents=True)
        self.undo("remove the folder", self.remove)
        self.states = self.dir / "state"
        if len(str(self.states / RELAY / f"{RELAY}.sock")) > SOCKET_PATH_BYTES_MAX:
            # The kernel bounds socket paths; a deep clone keeps its states where paths are short.
            self.states = Path(tempfile.mkdtemp(prefix="reprotect-"))
            self.undo("remove the states", lambda: self.keep or shutil.rmtree(self.states))
        self.states.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind, error, trace):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # undoing is not interrupted
        failures = []
        while self.steps:
            what, action = self.steps.pop()
            try:
                action()
            except Exception as failure:  # undoing goes on whatever happens
                failures.append(f"{what}: {failure}")
        for failure in failures:
            print(f"{self.name}: cleaning up failed: {failure}", file=sys.stderr)
        if failures and error is None:
            raise LabError("something was left behind")

    def interrupted(self, number, _frame):
        raise LabError(f"interrupted by {signal.Signals(number).name}")

    def undo(self, what, action):
        self.steps.append((what, action))

    def remove(self):
        if self.keep:
            say(f"kept: {self.dir}" + ("" if self.states.is_relative_to(self.dir) else f" and {self.states}"))
        else:
            shutil.rmtree(self.dir)

    def need_space(self, count, what):
        """Refuses to begin what cannot end."""
        free = shutil.disk_usage(self.dir).free
        if free < count:
            raise LabError(f"{what} needs {mib(count)} free in {self.dir.parent}, there are {mib(free)}; free some, "
                           "choose a smaller SIZE, or set REPROTECT_LAB_DIR to a larger disk")

    def loop(self, path, read_only=False):
        """A loop device over `path`."""
        options = ["--read-only"] if read_only else []
        device = run("losetup", *options, "--find", "--show", path).strip()
        self.undo(f"detach {device}", lambda: run("losetup", "--detach", device))
        if not read_only:
            # Not every file system below can do it; then the page cache is between, which is slower and as right.
            run("losetup", "--direct-io=on", device, check=False)
        return Path(device)

    def unloop(self, device):
        self.take_back(f"detach {device}")

    def mount(self, device, name, *options, kind="ext4"):
        point = self.dir / name
        point.mkdir(exist_ok=True)
        run("mount", "-t", kind, *options, device, point)
        self.undo(f"unmount {point}", lambda: run("umount", point))
        return point

    @contextlib.contextmanager
    def nbd_file(self, uri):
        """What an NBD server exports, as a file."""
        folder = self.dir / "nbd"
        folder.mkdir(exist_ok=True)
        fuse = subprocess.Popen(["nbdfuse", folder, uri], preexec_fn=die_with_parent)
        self.undo(f"end nbdfuse of {folder}", lambda: end_fuse(folder, fuse))
        wait_for("nbdfuse is ready", lambda: (folder / "nbd").exists() or fuse.poll() is not None)
        yield folder / "nbd"
        self.take_back(f"end nbdfuse of {folder}")

    def unmount(self, point):
        self.take_back(f"unmount {point}")

    def take_back(self, what):
        """Undoes one step now."""
        step = next(step for step in reversed(self.steps) if step[0] == what)
        step[1]()
        self.steps.remove(step)

    def add(self, name, config, instance=None):
        """A daemon; `instance` tells it from others of the same program."""
        daemon = Daemon(self, name, config, instance)
        self.daemons[daemon.instance] = daemon
        return daemon

    def __getattr__(self, name):
        names = {"agent": AGENT, "relay": RELAY, "target": TARGET}
        if name in names:
            return self.daemons.get(names[name])
        raise AttributeError(name)
