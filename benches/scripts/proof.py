"""Proof that a target holds exactly what the source holds, by tools that share no code with the engine.

Invariants: everything is opened for reading; a judge that is missing is named with `SKIPPED:`, where
REPROTECT_NO_SKIP is set it is a failure; a difference is a [`LabError`]. Used by the scripts beside it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from lab import REPO, LabError, is_root, run, say

CHUNK = 1 << 20
READERS = Path(os.environ.get("REPROTECT_READERS", REPO / "target/readers-venv/bin/python"))


def skipped(text):
    say(f"SKIPPED: {text}")
    if os.environ.get("REPROTECT_NO_SKIP"):
        raise LabError(f"a judge is missing and REPROTECT_NO_SKIP is set: {text}")


def sha256(path):
    """SHA-256 of a file or block device."""
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            sha.update(data)
    return sha.hexdigest()


def size_of(path):
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def is_device(path):
    return Path(path).is_block_device()


def extents(vmdk):
    """Files of a VMDK in order, with their kind, as its descriptor names them."""
    with open(vmdk, "rb") as file:
        head = file.read(1 << 20)
    if head[:4] == b"KDMV":
        return [(Path(vmdk), "SPARSE")]
    lines = re.findall(rb'^\s*RW\s+\d+\s+(\w+)\s+"([^"]+)"', head, re.MULTILINE)
    return [(Path(vmdk).parent / name.decode(), kind.decode()) for kind, name in lines]


def qemu_version():
    """Major version of qemu-img."""
    return int(re.search(r"version (\d+)", run("qemu-img", "--version"))[1])


def qemu_judges(source, target):
    """`qemu-img compare`, `check` and `info`; answers what was found, in words."""
    run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", source, target, timeout=3600)
    verdicts = ["qemu-img compare: identical"]
    check = run("qemu-img", "check", "-f", "vmdk", target, check=False)
    if check.returncode == 63:
        verdicts.append("qemu-img check: not offered for this format")
    elif check.returncode:
        raise LabError(f"qemu-img check {target}: {check.stdout}{check.stderr}")
    else:
        verdicts.append("qemu-img check: " + check.stdout.strip().splitlines()[0])
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "vmdk", target))
    if info["virtual-size"] != size_of(source):
        raise LabError(f"qemu-img info: {info['virtual-size']} bytes instead of {size_of(source)}")
    kind = info["format-specific"]["data"]["create-type"]
    verdicts.append(f"qemu-img info: {kind}, {info['virtual-size']} bytes, {info['actual-size']} on disk")
    return verdicts


def whole_disk(source, target):
    """Compares every byte; answers the verdicts."""
    if is_device(target):
        run("cmp", source, target, timeout=3600)
        return ["cmp: identical"]
    verdicts = []
    files = extents(target)
    if len(files) == 1 and files[0][1] in ("FLAT", "VMFS"):
        run("cmp", source, files[0][0], timeout=3600)
        verdicts.append(f"cmp with {files[0][0].name}: identical")
    return verdicts + qemu_judges(source, target)


def independent_readers(source, target):
    """Two readers from PyPI read the VMDK whole."""
    if not READERS.exists():
        return skipped("no independent VMDK readers; `make readers` installs them")
    done = subprocess.run([str(READERS), str(REPO / "engine/tests/readers/read_vmdk.py"), str(target)],
                          capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise LabError(f"a reader refused {target}: {done.stderr.strip()}")
    expected, seen = f"{size_of(source)} {sha256(source)}", []
    for line in done.stdout.splitlines():
        reader, _, verdict = line.partition(" ")
        if verdict != expected:
            raise LabError(f"{reader} read {verdict} from {target}, the source is {expected}")
        seen.append(reader)
    if len(seen) < 2:
        raise LabError(f"two readers should have judged, {seen} did")
    return say(f"  read back identically by {' and '.join(seen)}")


def tree_digest(root):
    """Every entry below `root` with type, mode, owner, size, time and content."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(folders + names):
            path = Path(folder, name)
            info = path.lstat()
            entry = [oct(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns]
            if path.is_symlink():
                entry.append(os.readlink(path))
            elif path.is_file():
                entry += [info.st_size, sha256(path)]
            found[str(path.relative_to(root))] = entry
    return found


def mounted_tree(lab, image, name):
    """Digest of the files in an ext4 image or device, mounted read-only; without root by debugfs."""
    if not is_root():
        folder = lab.dir / name
        folder.mkdir()
        run("debugfs", "-R", f"rdump / {folder}", image)
        return tree_digest(folder)
    device = image if is_device(image) else lab.loop(image, read_only=True)
    point = lab.mount(device, name, "-o", "ro,noload")
    digest = tree_digest(point)
    lab.unmount(point)
    if device != image:
        lab.unloop(device)
    return digest


def same_files(lab, source, target):
    """Mounts both read-only and compares file by file; answers the number of files."""
    image, converted = target, None
    if not is_device(target):
        files = extents(target)
        if len(files) == 1 and files[0][1] in ("FLAT", "VMFS"):
            image = files[0][0]
        else:
            image = converted = lab.dir / "converted.raw"
            run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", target, converted, timeout=3600)
    ours, theirs = mounted_tree(lab, source, "mnt-source"), mounted_tree(lab, image, "mnt-target")
    if converted:
        converted.unlink()
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        raise LabError(f"{len(different)} files differ, first {different[:5]}")
    if not ours:
        raise LabError("the source has no files, so nothing was compared")
    return len(ours)


def data_bytes(path, block=4096):
    """Bytes in blocks that are not all zero."""
    zero, total = bytes(CHUNK), 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            if data == zero:
                continue
            total += sum(block for at in range(0, len(data), block) if any_set(data, at, block))
    return total


def any_set(data, at, block):
    piece = data[at : at + block]
    return piece.count(0) != len(piece)


def remove_vmdk(target):
    """Removes a VMDK with its extents, to make room for the next."""
    for path, _ in extents(target):
        path.unlink(missing_ok=True)
    Path(target).unlink(missing_ok=True)
    lock = Path(str(target) + ".lck")
    if lock.is_dir():
        shutil.rmtree(lock)
