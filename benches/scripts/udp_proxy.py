#!/usr/bin/env python3
"""A bad network between two UDP programs: loses, delays, reorders, duplicates, slows down and cuts off.

Why: the hosts that tests run on have no netem. `udp_proxy.py LISTEN_PORT TARGET_PORT SEED` passes datagrams between whoever
sends to the first port of 127.0.0.1 and the second; each line of JSON on standard input sets conditions from then on: `loss`,
`duplicate` (shares), `delay`, `jitter` (seconds; jitter above the gap between datagrams reorders them), `rate` (bytes a
second, each direction; 0 for none), `blocked`. It ends with its standard input. Invariants: what waits is bounded by
`QUEUE_BYTES`, beyond it is lost as in any router; one socket for each client, so that answers find their way.
Used by `chaos.py` as a process of its own, so that it does not share an interpreter with the test.
"""

import heapq
import json
import os
import random
import selectors
import socket
import sys
import time

QUEUE_BYTES = 4 << 20
CLIENTS_MAX = 256
CALM = {"loss": 0, "duplicate": 0, "delay": 0, "jitter": 0, "rate": 0, "blocked": False}


class Direction:
    """Datagrams of one direction on their way."""

    def __init__(self):
        self.free_at, self.bytes = 0.0, 0


class Proxy:
    def __init__(self, listen, target, seed):
        self.rng, self.now = random.Random(seed), dict(CALM)
        self.target, self.selector = ("127.0.0.1", target), selectors.DefaultSelector()
        self.front = bound(listen)
        self.selector.register(self.front, selectors.EVENT_READ, None)
        self.selector.register(sys.stdin, selectors.EVENT_READ, "orders")
        self.clients, self.heap, self.number = {}, [], 0
        self.ways = (Direction(), Direction())

    def run(self):
        while True:
            wait = max(0.0, self.heap[0][0] - time.monotonic()) if self.heap else 1.0
            for key, _ in self.selector.select(min(wait, 1.0)):
                if key.data == "orders":
                    if not self.obey():
                        return
                elif key.data is None:
                    self.drain(self.front, 0, None)
                else:
                    self.drain(key.fileobj, 1, key.data)
            self.deliver()

    def obey(self):
        data = os.read(0, 1 << 16)
        for line in data.splitlines():
            self.now = {**CALM, **json.loads(line)}
        return bool(data)

    def drain(self, source, way, client):
        for _ in range(256):
            try:
                data, sender = source.recvfrom(65535)
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # nobody listens there at the moment
            if way == 0:
                back = self.back(sender)
                if back is not None:
                    self.take(way, data, back, None)
            else:
                self.take(way, data, self.front, client)

    def back(self, sender):
        if sender not in self.clients:
            if len(self.clients) >= CLIENTS_MAX:
                old = next(iter(self.clients))
                self.selector.unregister(self.clients[old])
                self.clients.pop(old).close()
            back = bound(0)
            back.connect(self.target)
            self.clients[sender] = back
            self.selector.register(back, selectors.EVENT_READ, sender)
        return self.clients[sender]

    def take(self, way, data, out, to):
        now, rng, state = self.now, self.rng, self.ways[way]
        copies = 2 if rng.random() < now["duplicate"] else 1
        for _ in range(copies):
            if now["blocked"] or rng.random() < now["loss"] or state.bytes + len(data) > QUEUE_BYTES:
                continue
            at = time.monotonic()
            if now["rate"]:
                state.free_at = max(state.free_at, at) + len(data) / now["rate"]
                at = state.free_at
            at += now["delay"] + rng.random() * now["jitter"]
            state.bytes += len(data)
            self.number += 1
            heapq.heappush(self.heap, (at, self.number, way, data, out, to))

    def deliver(self):
        now = time.monotonic()
        while self.heap and self.heap[0][0] <= now:
            _, _, way, data, out, to = heapq.heappop(self.heap)
            self.ways[way].bytes -= len(data)
            try:
                if to is None:
                    out.send(data)
                else:
                    out.sendto(data, to)
            except (BlockingIOError, ConnectionError, OSError):
                pass  # as a network does


def bound(port):
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    made.bind(("127.0.0.1", port))
    made.setblocking(False)
    return made


if __name__ == "__main__":
    Proxy(*(int(word) for word in sys.argv[1:4])).run()
