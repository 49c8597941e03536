"""A guest without a distribution: a kernel package, an initramfs of busybox and this host's programs, QEMU in software.

Why: device mapper, other kernels and the loss of power cannot be had on every host, and a whole distribution's image takes
minutes. Invariants: nothing is installed and no source of packages of the host is changed; kernels are kept under
target/guest; what cannot be had is [`Missing`], in words that say what it takes; QEMU dies with this process. A power
cut here is `kill -9` of QEMU: the guest loses its memory at once, the host's page cache does not, so this is a crash of
the guest and not a loss of a disk's own cache. Seconds and bytes. Used by `guest_test.py`
and `unseen_test.py`.

The guest has two serial lines: the kernel's console goes to a file; over the other one a shell takes commands, one at a
time, both ways in base64.
"""

import base64
import lzma
import os
import re
import select
import shutil
import stat
import subprocess
import time
from pathlib import Path

from lab import REPO, LabError, die_with_parent, run

CACHE = Path(os.environ.get("REPROTECT_GUEST_CACHE", REPO / "target/guest"))
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Where a kernel of this version is packaged.
SUITES = {"6.1": "bookworm", "6.12": "bookworm-backports"}
# What the initramfs loads; a driver that is built in has no module.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio-rng", "dm-mod", "crc32c-intel", "ext4")
HOST = "10.0.2.2"
BOOT_SECONDS = 120
MEMORY_MIB = 768
# No wider vectors than these: in software they cost more than they save.
CPU = "Nehalem,+aes,+pclmulqdq"
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs trace /sys/kernel/tracing
while read -r module; do insmod /modules/$module; done </modules/order
hostname guest
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
exec </dev/ttyS1 >/dev/ttyS1
stty raw -echo
echo READY
while read -r line; do
    echo "$line" | base64 -d >/run/command
    sh /run/command </dev/null >/run/answer 2>&1
    code=$?
    echo "$code $(base64 /run/answer | tr -d '\\n')"
done
"""


class Missing(LabError):
    """What a guest needs and this host does not have."""


class Kernel:
    """An unpacked kernel package."""

    def __init__(self, root):
        self.root = root
        self.image = next((root / "boot").glob("vmlinuz-*"))
        self.release = self.image.name.removeprefix("vmlinuz-")

    def modules(self, names):
        """Files to load for these, in order: a module after those it depends on."""
        files = {}
        for file in self.root.glob("**/lib/modules/**/*.ko*"):
            files[file.name.partition(".ko")[0].replace("-", "_")] = file
        order = []

        def add(name):
            file = files.get(name.replace("-", "_"))
            if file is None or file in order:
                return
            for needed in re.findall(rb"\0depends=([^\0]*)\0", b"\0" + module_bytes(file)):
                for other in filter(None, needed.decode().split(",")):
                    add(other)
            order.append(file)

        for name in names:
            add(name)
        return order


def module_bytes(file):
    data = file.read_bytes()
    return lzma.decompress(data) if file.suffix == ".xz" else data


def need(*programs):
    for program in programs:
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed; run `make setup`")


class Packages:
    """Debian's packages by the host's own mirror, with lists of our own."""

    def __init__(self):
        need("apt-get", "apt-cache", "dpkg-deb")
        listed = run("apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages",
                     check=False).stdout.splitlines()
        mirrors = [line.split()[2] for line in listed if line.startswith("Debian Debian ")]
        if not mirrors or not KEYRING.exists():
            raise Missing("the host has no source of Debian packages (apt-get update first?)")
        lists = CACHE / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        sources = CACHE / "sources.list"
        sources.write_text("".join(f"deb [signed-by={KEYRING}] {mirrors[0]} {suite} main\n" for suite in SUITES.values()))
        # All of our own but the keys and the transport; what is installed on the host does not matter.
        self.options = ["-q", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null",
                        "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={CACHE}",
                        "-o", "Dir::State::status=/dev/null", "-o", "Acquire::Languages=none",
                        "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3"]
        self.asked("update")

    def asked(self, *words):
        done = run("apt-get", *self.options, *words, check=False)
        if done.returncode:
            raise Missing(f"`apt-get {words[0]}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
        return done

    def kernel(self, version):
        """The name of the package that has the newest kernel of this version."""
        text = run("apt-cache", *self.options, "show", "linux-image-cloud-amd64", check=False).stdout
        names = re.findall(rf"^Depends: (linux-image-{re.escape(version)}\.\S+)", text, re.MULTILINE)
        if not names:
            raise Missing(f"no kernel {version} among the packages of {SUITES[version]}; is the source of packages reached?")
        return names[0]

    def unpack(self, name, place):
        """Downloads a package and unpacks it into `place`, which then is there as a whole or not at all."""
        part = Path(f"{place}.{os.getpid()}.part")
        part.mkdir(parents=True)
        try:
            done = subprocess.run(["apt-get", *self.options, "download", name], cwd=part, capture_output=True, text=True,
                                  stdin=subprocess.DEVNULL, timeout=600, check=False)
            files = list(part.glob("*.deb"))
            if done.returncode or not files:
                raise Missing(f"{name} cannot be downloaded: {done.stderr.strip()[-400:]}")
            run("dpkg-deb", "-x", files[0], part)
            files[0].unlink()
            if not place.exists():
                part.rename(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def kernel(version):
    """A Debian kernel of this version, downloaded the first time."""
    if version not in SUITES:
        raise LabError(f"kernel {version} is not known; there are {', '.join(SUITES)}")
    if os.uname().machine != "x86_64":
        raise Missing("guests are x86_64 machines that run this host's programs")
    place = CACHE / f"linux-{version}"
    if not place.exists():
        packages = Packages()
        packages.unpack(packages.kernel(version), place)
    return Kernel(place)


class Archive:
    """The file format of an initramfs (cpio, `newc`)."""

    def __init__(self):
        self.parts, self.known, self.number = [], set(), 0

    def entry(self, path, mode, data=b""):
        name = str(path).strip("/").encode() + b"\0"
        self.number += 1
        fields = (self.number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (head + name, data):
            self.parts.append(part + b"\0" * (-len(part) % 4))

    def folder(self, path):
        path = Path(path)
        if path in self.known or path == Path("/"):
            return
        self.folder(path.parent)
        self.known.add(path)
        self.entry(path, stat.S_IFDIR | 0o755)

    def file(self, path, data, mode=0o755):
        path = Path(path)
        if path in self.known:
            return
        self.folder(path.parent)
        self.known.add(path)
        self.entry(path, stat.S_IFREG | mode, data)

    def program(self, path, at=None):
        """A program of the host with the libraries it needs, where it is here or at `at`."""
        path = Path(path)
        self.file(at or path, path.read_bytes())
        for library in libraries(path):
            self.file(library, library.read_bytes())

    def bytes(self):
        self.entry("TRAILER!!!", 0)
        return b"".join(self.parts)


def libraries(program):
    """Paths that the loader would open for a program."""
    done = run("ldd", program, check=False)
    if "not a dynamic" in done.stdout + done.stderr or "statically" in done.stdout:
        return []
    if "not found" in done.stdout:
        raise LabError(f"{program} lacks a library: {done.stdout}")
    return [Path(word) for word in re.findall(r"(/\S+)(?= \()", done.stdout)]


def initramfs(path, kernel_files, programs, modules=MODULES):
    """Writes an initramfs with busybox, the modules, and programs (path here → path in the guest)."""
    need("busybox", "ldd")
    archive = Archive()
    for folder in ("/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/mnt", "/etc", "/modules", "/bin"):
        archive.folder(folder)
    archive.file("/init", INIT.encode())
    archive.program(shutil.which("busybox"), "/bin/busybox")
    archive.entry("/bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    order = kernel_files.modules(modules)
    for file in order:
        archive.file(f"/modules/{file.name.partition('.ko')[0]}.ko", module_bytes(file), 0o644)
    names = "".join(f"{file.name.partition('.ko')[0]}.ko\n" for file in order)
    archive.file("/modules/order", names.encode(), 0o644)
    for program, at in programs.items():
        archive.program(program, at)
    path.write_bytes(archive.bytes())


class Guest:
    """A machine that can be switched on and loses its power."""

    def __init__(self, lab, kernel_files, initrd, drives, environment=None, devices=(), append=""):
        """`drives` are QEMU's `-drive` options without interface and format, and serial numbers; `devices` more of its words;
        `append` goes to the kernel's command line."""
        need("qemu-system-x86_64")
        self.lab, self.kernel, self.initrd, self.drives = lab, kernel_files, initrd, drives
        self.environment, self.devices, self.append = environment or {}, devices, append
        self.console, self.process, self.boots = lab.dir / "console.log", None, 0
        lab.undo("switch off the guest", self.cut)

    def start(self):
        words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2", "-m", str(MEMORY_MIB),
                 "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", self.kernel.image,
                 "-initrd", self.initrd, "-append", f"console=ttyS0 panic=-1 quiet loglevel=5 {self.append}",
                 "-chardev", f"file,id=console,append=on,path={self.console}", "-serial", "chardev:console",
                 "-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands",
                 "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]
        for number, (options, serial) in enumerate(self.drives):
            words += ["-drive", f"if=none,id=drive{number},format=raw,{options}",
                      "-device", f"virtio-blk-pci,drive=drive{number},serial={serial}"]
        words += self.devices
        begun = time.monotonic()
        self.process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        self.heard = b""
        line = self.line(BOOT_SECONDS)
        if line != "READY":
            raise LabError(f"the guest began with {line!r}; see {self.console}\n{self.tail()}")
        self.boots += 1
        return time.monotonic() - begun

    def line(self, seconds):
        """The next line from the guest."""
        end = time.monotonic() + seconds
        while b"\n" not in self.heard:
            left = end - time.monotonic()
            if left <= 0:
                raise LabError(f"the guest says nothing for {seconds:.0f} s; see {self.console}\n{self.tail()}")
            if not select.select([self.process.stdout], [], [], left)[0]:
                continue
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise LabError(f"QEMU ended: {self.heard.decode(errors='replace')}\n{self.tail()}")
            self.heard += data
        line, _, self.heard = self.heard.partition(b"\n")
        return line.decode(errors="replace").strip()

    def try_run(self, command, seconds=60):
        """Runs a shell command in the guest; answers its exit status and what it printed."""
        text = "".join(f"export {name}={value}\n" for name, value in self.environment.items()) + command
        self.process.stdin.write(base64.b64encode(text.encode()) + b"\n")
        self.process.stdin.flush()
        code, _, answer = self.line(seconds).partition(" ")
        return int(code), base64.b64decode(answer).decode(errors="replace")

    def run(self, command, seconds=60):
        code, answer = self.try_run(command, seconds)
        if code:
            raise LabError(f"in the guest, `{command}` failed ({code}): {answer.strip()[-2000:]}")
        return answer

    def tail(self, lines=15):
        text = self.console.read_text(errors="replace").splitlines() if self.console.exists() else []
        return "\n".join(f"  | {line}" for line in text[-lines:])

    def cut(self):
        """The power is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def off(self, seconds=60):
        """Switches off as an administrator would, after everything was unmounted."""
        self.process.stdin.write(base64.b64encode(b"sync; poweroff -f") + b"\n")
        self.process.stdin.flush()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"the guest does not switch off within {seconds} s\n{self.tail()}") from None
