#!/usr/bin/env python3
"""Points copied, judged, and read from the retention folder alone.

Environment: SIZE (1G), POINTS (3), KILLS (3), TARGET (flat), SEED (random, printed), KEEP. Asserted: a point exported in
each format while replication goes on is its copy for `qemu-img compare` and sound for `qemu-img check`; what exists is
not overwritten, and a refused export leaves nothing; `verify` reads all points; with a master target running the folder
is refused. After each `kill -9` in the middle of writes, with nothing running, every point extracted from folder and
VMDK is its copy; the state that the target is in once the master target has recovered is what folder and target as the
kill left them give for that state; the commands change no byte. A damaged undo run is found and the points that suffer are named. Called by `make export-test`,
and small by the suite.
"""

import json
import random
import shutil
import sys
import threading
import time

from lab import AGENT, LabError, mib, run, wait_for
from pipeline import Pipeline
from points_test import change, make_points
from proof import extents, sha256
from runner import main, make_source, say, seed_setting, setting, size_setting

FORMATS = {"flat": "vmdk", "sparse": "vmdk", "stream": "vmdk", "raw": "raw"}


def offline(target, *words, sound=True):
    """A `journal` command; answers its JSON."""
    done = run(target.binary, "journal", *words, "--json", check=False)
    if sound and done.returncode:
        raise LabError(f"journal {' '.join(map(str, words))}: {done.stderr or done.stdout}")
    return json.loads(done.stdout) if done.stdout.strip() else None, done


def judge(copy, path, kind, form):
    run("qemu-img", "compare", "-f", "raw", "-F", form, copy, path, timeout=600)
    if kind in ("sparse", "stream"):
        run("qemu-img", "check", "-f", "vmdk", path)


def check_exports(lab, target, disk, point, copy):
    """Each format, once; then what must be refused."""
    for kind, form in FORMATS.items():
        path = lab.dir / f"export-{kind}.{form}"
        begun = time.monotonic()
        made = target.command("export", disk, point, "--format", kind, "-o", path, timeout=600)["copies"][0]
        span = time.monotonic() - begun
        judge(copy, path, kind, form)
        say(f"  {kind}: {mib(made['data_bytes'])} of data in {mib(made['file_bytes'])}, {span:.1f} s, identical")
        before = sha256(path)
        try:
            target.command("export", disk, point, "--format", kind, "-o", path)
        except LabError as error:
            if "exists already" not in str(error):
                raise
        else:
            raise LabError(f"{path} was overwritten")
        if sha256(path) != before:
            raise LabError(f"{path} was changed by an export that was refused")
        for name in made["files"]:
            lab.dir.joinpath(name).unlink()
    try:
        target.command("export", disk, point, "--format", "flat", "-o", lab.dir / "none" / "x.vmdk")
    except LabError as error:
        if "does not exist: make it" not in str(error):
            raise
    else:
        raise LabError("an export into a folder that is not there was not refused")


def state_of(folder, path):
    """Digest of everything the offline commands read."""
    files = sorted(folder.iterdir()) + [path] + [file for file, _ in extents(path)]
    return [(file.name, file.stat().st_mtime_ns, sha256(file)) for file in dict.fromkeys(files)]


def check_folder(lab, target, folder, path, disk, copies, number):
    """With nothing running: list, verify, every point, and the newest state, which is answered."""
    before = state_of(folder, path)
    listing, _ = offline(target, "list", folder)
    line = listing["disks"][0]
    known = {point["point"]: point for point in line["points"]}
    for point, copy in copies:
        if known[point]["refused"]:
            raise LabError(f"point {point} cannot be had: {known[point]['refused']}")
        out = lab.dir / "extracted.raw"
        offline(target, "extract", folder, "--disk", disk, "--point", point, "--target", path,
                "--format", "raw", "-o", out)
        run("cmp", copy, out)
        out.unlink()
    newest = extract(lab, target, folder, path, disk, "newest", f"newest-{number}")
    verdict, _ = offline(target, "verify", folder, "--target", f"{disk}={path}")
    dump, _ = offline(target, "dump", folder, "--limit", "20")
    if not any(section["lines"] for section in dump["sections"]):
        raise LabError("the dump is empty")
    if state_of(folder, path) != before:
        raise LabError("an offline command changed the folder or the target")
    say(f"  kill {number + 1}: {line['newest'] - line['applied']} of {line['newest']} entries not on the target; "
        f"{len(copies)} points and the newest state extracted, {verdict['groups']} groups, {verdict['entries']} entries "
        f"and {verdict['undo_runs']} undo runs sound")
    return newest


def extract(lab, target, folder, path, disk, point, name):
    """Extracts a point as a stream-optimised VMDK."""
    out = lab.dir / f"{name}.vmdk"
    offline(target, "extract", folder, "--disk", disk[:8], "--point", point, "--target", path,
            "--format", "stream", "-o", out)
    return out


def copy_site(folder, path, to):
    """A copy of the retention folder and of the target; answers both."""
    shutil.copytree(folder, to / "retention")
    for file in dict.fromkeys([path] + [file for file, _ in extents(path)]):
        run("cp", "--sparse=always", file, to)
    return to / "retention", to / path.name


def check_damage(target, folder):
    """One byte of the largest sealed undo run, here and there, and back: found each time, and what it costs is named."""
    victim = max(sorted(folder.glob("undo-*"))[:-1], key=lambda file: file.stat().st_size)
    costs = []
    for part in range(1, 8):
        at = 8192 + (victim.stat().st_size - 8192) * part // 8
        flip(victim, at)
        verdict, done = offline(target, "verify", folder, sound=False)
        flip(victim, at)
        found = [finding for finding in verdict["findings"] if finding["path"] == str(victim)]
        if done.returncode != 1 or not found:
            raise LabError(f"a flipped bit at byte {at} of {victim.name} was not found: {verdict}")
        costs += [finding for finding in found if finding["points"] and finding["lost"]]
    if not costs:
        raise LabError(f"seven flipped bits in {victim.name} cost no point")
    say(f"  flipped bits in {victim.name} were found; at byte {costs[0]['offset']}: {costs[0]['what']}, "
        f"bytes {costs[0]['lost']} are lost to {len(costs[0]['points'])} points")


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def body(lab):
    size, count, kills = size_setting("1G"), setting("POINTS", 3, int), setting("KILLS", 3, int)
    kind, seed = setting("TARGET", "flat"), seed_setting()
    rng = random.Random(seed)
    lab.need_space(size * (count + 6), f"an export test of {mib(size)}")
    image, source = make_source(lab, size, 50, seed)
    folder = lab.dir / "retention"
    retention = {"path": str(folder), "undo_epoch": "2s", "segment_bytes": "32 MiB"}
    pipeline = Pipeline(lab, source, relay=False, agent={"scan_interval": "300ms"}, target={"retention": retention})
    pipeline.start()
    pipeline.protect(kind)
    disk = pipeline.wait_synced(max(120, size / 5e6))
    target = lab.target
    disk, copies = make_points(lab, pipeline, source, size, rng, count)
    name, path = disk["disk"], type(folder)(disk["path"])
    with Writer(source, size, rng.randrange(1 << 32)):
        check_exports(lab, target, name, *copies[0])
    verified = target.command("verify", name, "all", timeout=600)
    if not verified["sound"] or len(verified["points"]) < count:
        raise LabError(f"verify: {verified}")
    say(f"  {len(verified['points'])} points verified")
    _, done = offline(target, "list", folder, sound=False)
    if done.returncode != 1 or "open" not in done.stderr:
        raise LabError(f"a folder in use was not refused: {done.stderr}")
    offline(target, "list", folder, "--beside")
    for number in range(kills):
        with Writer(source, size, rng.randrange(1 << 32)):
            time.sleep(rng.uniform(0.5, 2.5))
            target.kill()
            lab.daemons[AGENT].kill()
        newest = check_folder(lab, target, folder, path, name, copies, number)
        left = lab.dir / "left-by-kill"
        copied = copy_site(folder, path, left)
        target.start_and_wait()
        target.stop()
        line = offline(target, "list", folder)[0]["disks"][0]
        again = extract(lab, target, folder, path, name, "newest", f"again-{number}")
        run("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", newest, again, timeout=600)
        # What was harvested behind the newest mark waits in the log for the next one, unless the agent asked for it.
        stands = extract(lab, target, *copied, name, line["target_at"], f"stands-{number}")
        run("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", stands, path, timeout=600)
        say(f"  recovered: the target is what its state {line['target_at']} was before, and the newest state the same")
        shutil.rmtree(left)
        for file in (newest, again, stands):
            file.unlink()
        if number + 1 < kills:
            target.start_and_wait()
            lab.daemons[AGENT].start_and_wait()
            wait_for("the agent is back", lambda: (pipeline.target_disk() or {}).get("connected"), log=lab.agent.log)
    check_damage(target, folder)


class Writer:
    """Changes the source all the time."""

    def __init__(self, source, size, seed):
        self.going, self.rng = True, random.Random(seed)
        self.thread = threading.Thread(target=self.work, args=(source, size), daemon=True)

    def work(self, source, size):
        while self.going:
            change(source, size, self.rng)
            time.sleep(0.1)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


if __name__ == "__main__":
    sys.exit(main("export-test", body))
