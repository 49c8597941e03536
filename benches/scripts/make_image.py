#!/usr/bin/env python3
"""Makes a realistic disk: an ext4 image with files from this machine, logs, a database, incompressible data and holes.

Why: ratios, zero detection and sparse handling mean nothing on synthetic blocks. Invariants: the choice of files and
all made-up content follow from the seed; source files are only read; a mount made here is undone here. Sizes in bytes.
Called by the lab scripts, and by hand: make_image.py OUT [--size 1G] [--fill 50] [--seed 1]
"""

import argparse
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Shares of the filled part, in percent; the machine's own files take the rest.
SHARES = {"incompressible": 12, "logs": 12, "database": 8, "holes": 3}
FILE_BYTES_MAX = 128 << 20
ROOTS = ("/usr", "/opt", "/etc", str(Path.home() / ".cargo"), str(Path.home() / ".rustup"))
WORDS = (
    "accepted backup batch cache checkpoint client closed commit connect cron daemon denied device disk error "
    "evicted exit export failed fetch flush handler index job kernel lease login mount node opened packet peer "
    "probe queue read refresh reload replica request resolved retry route scan scheduler session signal snapshot "
    "started stopped sync table thread timeout token update user verify volume warning worker write"
).split()


def parse_size(text):
    """Bytes of `512`, `256M`, `8G`; a multiple of 1 MiB is not required here."""
    text = text.strip().upper().removesuffix("IB").removesuffix("B")
    factor = UNITS.get(text[-1:], 1)
    number = text[:-1] if factor > 1 else text
    try:
        size = int(float(number) * factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 1G or 256M") from None
    if size <= 0:
        raise argparse.ArgumentTypeError("a size is larger than nothing")
    return size


def log_text(rng, size):
    """About `size` bytes of log lines."""
    stamp, out, length = 1_700_000_000, [], 0
    while length < size:
        stamp += rng.randrange(4)
        words = " ".join(rng.choices(WORDS, k=rng.randrange(3, 10)))
        line = f"{stamp} node{rng.randrange(12):02} {rng.choice(WORDS)}[{rng.randrange(40000)}]: {words} " \
               f"peer=10.{rng.randrange(4)}.{rng.randrange(256)}.{rng.randrange(256)} took={rng.randrange(90000)}us\n"
        out.append(line)
        length += len(line)
    return "".join(out).encode()


def make_logs(folder, rng, size):
    """Logs in files of at most 8 MiB; one text is made and varied by shifting, because making text is slow."""
    folder.mkdir(parents=True)
    text = log_text(rng, min(size, 8 << 20))
    left, number = size, 0
    while left > 0:
        shift = rng.randrange(max(1, len(text)))
        part = (b"rotated %d\n" % number + text[shift:] + text[:shift])[: min(left, 8 << 20)]
        (folder / f"service-{number:03}.log").write_bytes(part)
        left -= len(part)
        number += 1


def make_incompressible(folder, rng, size):
    """Files of random bytes, as media and archives are."""
    folder.mkdir(parents=True)
    left, number = size, 0
    while left > 0:
        count = min(left, 4 << 20)
        (folder / f"clip-{number:04}.bin").write_bytes(rng.randbytes(count))
        left -= count
        number += 1


def make_database(path, rng, size):
    """A SQLite database with an index; rows of about 220 bytes."""
    path.parent.mkdir(parents=True)
    base = sqlite3.connect(path)
    base.executescript("pragma journal_mode=off; pragma synchronous=off; "
                       "create table orders(id integer primary key, name text, note text, amount real, tag blob);")
    rows = ((n, f"customer-{rng.randrange(90000)}", " ".join(rng.choices(WORDS, k=14)), rng.random() * 1e4,
             rng.randbytes(40)) for n in range(max(1, size // 240)))
    base.executemany("insert into orders values(?,?,?,?,?)", rows)
    base.execute("create index by_name on orders(name)")
    base.commit()
    base.close()


def make_holes(folder, rng, size):
    """Files much longer than their data."""
    folder.mkdir(parents=True)
    for number in range(3):
        with open(folder / f"sparse-{number}.img", "wb") as file:
            for _ in range(max(1, size // 3 // 65536)):
                file.seek(rng.randrange(16) * 65536, os.SEEK_CUR)
                file.write(rng.randbytes(4096) * 16)
            file.truncate(file.tell() + (8 << 20))


def machine_files(rng, wanted):
    """Regular files of this machine with their sizes, until they are three times `wanted`: a large machine has
    millions, and looking at all of them takes longer than the rest."""
    folders = sorted(entry.path for root in ROOTS if os.path.isdir(root)
                     for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    rng.shuffle(folders)
    # A small disk is not to be filled by a few large files.
    found, total, seen, largest = [], 0, set(), min(FILE_BYTES_MAX, max(1 << 20, wanted // 64))
    for top in folders:
        for folder, inner, names in os.walk(top):
            inner.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    info = os.lstat(path)
                except OSError:
                    continue
                # A file with several names takes its space once.
                if stat.S_ISREG(info.st_mode) and 0 < info.st_size <= largest and info.st_ino not in seen:
                    seen.add(info.st_ino)
                    found.append((path, info.st_size))
                    total += info.st_size
            if total > 3 * wanted:
                return found
    return found


def take(source, target):
    """A hard link where the file system allows one, else a copy; False where neither may be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError:
            target.unlink(missing_ok=True)
            return False
    return True


def copy_machine_files(folder, rng, size):
    """Files of the machine up to `size`; answers what could not be filled."""
    files = machine_files(rng, size)
    rng.shuffle(files)
    left = size
    for path, length in files:
        cost = (length + 4095) // 4096 * 4096 + 512
        if cost <= left and take(path, folder / path.lstrip("/")):
            left -= cost
        if left < 65536:
            break
    return left


def make_tree(folder, size, seed):
    """Fills `folder` with about `size` bytes."""
    rng = random.Random(seed)
    parts = {name: size * share // 100 for name, share in SHARES.items()}
    make_incompressible(folder / "srv/media", rng, parts["incompressible"])
    make_logs(folder / "var/log", rng, parts["logs"])
    make_database(folder / "var/lib/orders/orders.sqlite", rng, parts["database"])
    make_holes(folder / "var/lib/images", rng, parts["holes"])
    missing = copy_machine_files(folder / "system", rng, size - sum(parts.values()))
    # A small machine has too few files of its own: what is missing is made of logs and media, two to one.
    if missing > 1 << 20:
        make_logs(folder / "var/log/archive", rng, missing * 2 // 3)
        make_incompressible(folder / "srv/archive", rng, missing // 3)


def tool(name):
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        raise RuntimeError(f"{name} is missing; run `make setup`")
    return found


def command(*words):
    done = subprocess.run([tool(words[0]), *map(str, words[1:])], capture_output=True, text=True, check=False,
                          stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()}")


def make_file_system(out, seed, *options):
    """An ext4 whose layout follows from the seed."""
    uuid = f"5eed0000-0000-4000-8000-{seed:012x}"
    extended = f"hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    command("mke2fs", "-q", "-F", "-t", "ext4", "-b", 4096, "-m", 0, "-U", uuid, "-E", extended, *options, out)


def make_image(out, size, fill_percent=50, seed=1):
    """Makes the ext4 image `out`: as root through a mount, which is several times faster, else by `mke2fs -d`."""
    out = Path(out)
    with open(out, "wb") as file:
        file.truncate(size)
    tree, mounted = out.with_name(out.name + ".tree"), False
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    try:
        if os.geteuid() == 0:
            make_file_system(out, seed)
            try:
                command("mount", "-o", "loop", out, tree)
                mounted = True
            except RuntimeError:
                pass  # a container without loop devices
        make_tree(tree, size * fill_percent // 100, seed)
        if not mounted:
            make_file_system(out, seed, "-d", tree)
    finally:
        if mounted:
            command("umount", tree)
        shutil.rmtree(tree)
    with open(out, "rb") as file:
        os.fsync(file.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--size", type=parse_size, default="1G")
    parser.add_argument("--fill", type=int, default=50, help="percent of the size")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    make_image(args.out, args.size, args.fill, args.seed)
    print(f"{args.out}: {args.size} bytes, {os.stat(args.out).st_blocks * 512} allocated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
