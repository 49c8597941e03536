#!/usr/bin/env python3
"""Load on a mounted file system until SIGTERM: SQLite in WAL mode by two threads, files that come and go by one.

Called by the test `ordered`, with the directory. What it writes can be judged at any moment a power cut may choose:
the accounts always sum up to the same, a file that has its final name has its whole content.
"""
import hashlib
import os
import random
import signal
import sqlite3
import sys
import threading
import time

ACCOUNTS, TOTAL = 64, 64_000
stopping = threading.Event()


def connect(folder):
    database = sqlite3.connect(os.path.join(folder, "load.db"), timeout=60, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    return database


def prepare(folder):
    os.makedirs(os.path.join(folder, "files"), exist_ok=True)
    database = connect(folder)
    database.execute("CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, amount INTEGER)")
    database.execute("CREATE TABLE IF NOT EXISTS history (id INTEGER PRIMARY KEY, note BLOB)")
    if database.execute("SELECT count(*) FROM accounts").fetchone()[0] == 0:
        rows = [(number, TOTAL // ACCOUNTS) for number in range(ACCOUNTS)]
        database.execute("BEGIN")
        database.executemany("INSERT INTO accounts VALUES (?, ?)", rows)
        database.execute("COMMIT")
    database.close()


def transfer(folder, seed):
    database, rng = connect(folder), random.Random(seed)
    while not stopping.is_set():
        database.execute("BEGIN IMMEDIATE")
        amount = rng.randrange(1, 50)
        for account, change in ((rng.randrange(ACCOUNTS), -amount), (rng.randrange(ACCOUNTS), amount)):
            database.execute("UPDATE accounts SET amount = amount + ? WHERE id = ?", (change, account))
        database.execute("INSERT INTO history (note) VALUES (?)", (rng.randbytes(rng.randrange(20, 2000)),))
        database.execute("DELETE FROM history WHERE id < (SELECT max(id) FROM history) - 500")
        database.execute("COMMIT")
        time.sleep(0.02)
    database.close()


def churn(folder, seed):
    rng, place = random.Random(seed), os.path.join(folder, "files")
    while not stopping.is_set():
        name = os.path.join(place, f"{rng.randrange(60):02}")
        if rng.random() < 0.3:
            if os.path.exists(name):
                os.unlink(name)
            continue
        data = rng.randbytes(rng.randrange(1, 200_000))
        with open(name + ".new", "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(name + ".new", name)
        time.sleep(0.05)


def judge(folder):
    """Whether what a power cut left is whole; SQLite replays its log."""
    database = connect(folder)
    integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
    total = database.execute("SELECT sum(amount) FROM accounts").fetchone()[0]
    database.close()
    if integrity != "ok" or total != TOTAL:
        sys.exit(f"SQLite: {integrity}; the accounts sum up to {total}, not {TOTAL}")
    for name in os.listdir(os.path.join(folder, "files")):
        if name.endswith(".new"):
            continue
        with open(os.path.join(folder, "files", name), "rb") as file:
            content = file.read()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            sys.exit(f"file {name} is not what was synced before it got its name")


def main():
    folder, task = sys.argv[1], sys.argv[2]
    if task == "judge":
        return judge(folder)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    prepare(folder)
    if task == "prepare":
        return None
    threads = [threading.Thread(target=transfer, args=(folder, seed)) for seed in (1, 2)]
    threads.append(threading.Thread(target=churn, args=(folder, 3)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return None


main()
