#!/usr/bin/env python3
"""Reads a VMDK whole with two readers that share no code with us and prints "READER SIZE SHA256" for each.

Called by vmdk_judges.rs. Exits with 1 when a reader fails, and says which and why.
"""

import hashlib
import sys
from pathlib import Path

CHUNK = 1 << 20


def digest(read, size):
    """SHA-256 of `size` bytes from `read(count)`; a short read is an error."""
    sha, left = hashlib.sha256(), size
    while left:
        data = read(min(CHUNK, left))
        if not data:
            raise EOFError(f"{left} of {size} bytes are missing")
        sha.update(data)
        left -= len(data)
    return sha.hexdigest()


def libvmdk(path):
    import pyvmdk

    handle = pyvmdk.handle()
    handle.open(str(path))
    handle.open_extent_data_files()
    try:
        size = handle.get_media_size()
        return size, digest(handle.read_buffer, size)
    finally:
        handle.close()


def dissect(path):
    from dissect.hypervisor.disk.vmdk import VMDK

    disk, sector = VMDK(path), 0

    # Its stream reads in units of 8 KiB and fails in the last one of a disk of another size, whoever made the disk;
    # reading sectors is what the stream itself does.
    def read(count):
        nonlocal sector
        data = disk.read_sectors(sector, count // 512)
        sector += len(data) // 512
        return data

    return disk.size, digest(read, disk.size)


def main():
    path, failed = Path(sys.argv[1]), False
    for reader in (libvmdk, dissect):
        try:
            size, sha = reader(path)
            print(reader.__name__, size, sha, flush=True)
        except Exception as error:  # any failure of a reader is the verdict, not a fault of this script
            print(f"{reader.__name__} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


sys.exit(main())
