"""What the measuring scripts share: their settings from the environment, their one-line end, a source to sync.

Invariants: a script prints `NAME: OK` and ends with 0, or `NAME: FAILED: why` and ends with 1; every seed is printed
before it is used. Used by the scripts beside it.
"""

import os
import random

from lab import Lab, LabError, is_root, mib, say
from make_image import make_image, parse_size
from proof import skipped


def setting(name, default, parse=str):
    """An environment variable, or its default when it is absent or empty."""
    text = os.environ.get(name) or str(default)
    try:
        return parse(text)
    except Exception as error:  # any parser's complaint is the person's to read
        raise LabError(f"{name}={text}: {error}") from None


def size_setting(default):
    return setting("SIZE", default, parse_size)


def seed_setting():
    """SEED, or a random one; printed, so that a failure can be repeated."""
    seed = setting("SEED", random.SystemRandom().randrange(1, 1 << 32), int)
    say(f"seed {seed} (repeat with SEED={seed})")
    return seed


def make_source(lab, size, fill, seed):
    """An image and what the agent reads: a loop device as root, else the image itself; answers (image, source)."""
    image = lab.dir / "disk.raw"
    make_image(image, size, fill, seed)
    if is_root():
        return image, lab.loop(image)
    say("NOT ROOT: the source is an image file instead of a loop device")
    return image, image


def main(name, body):
    """Runs `body(lab)` in a laboratory."""
    try:
        with Lab(name, setting("KEEP", "0") == "1") as lab:
            body(lab)
    except Exception as error:
        if os.environ.get("LAB_TRACE"):
            raise
        say(f"{name}: FAILED: {error}")
        return 1
    say(f"{name}: OK")
    return 0


__all__ = ["LabError", "main", "make_source", "mib", "say", "seed_setting", "setting", "size_setting", "skipped"]
