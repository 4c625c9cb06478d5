"""What a request costs in the ring and in the disk, beside a bare os.preadv of the same file in the same run.

A request is what a guest's block driver sends for a 4 KiB read: three descriptors, header, data and status. "ring" is
taking it from the available ring and adding it to the used ring; "request" is the whole of it, as workers/block.py
serves it, read and status included; "bare" is os.preadv alone, of the same pieces of the same file into the same pages.
The pieces and the pages lie at random over 64 MiB each, as a guest's do, all of them in the page cache.

`python scripts/benchmarks/ring.py` prints it as JSON, in nanoseconds; nothing in it decides anything.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from statistics import median
from time import perf_counter_ns

from lgmp.control import ControlPage
from lgmp.memory import GuestMemory
from lgmp.virtio.block import VIRTIO_BLK_T_IN
from lgmp.virtio.ids import VIRTQUEUE_NUM, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import Virtqueue, VringLayout
from workers.block import Block
from workers.device import BATCH

DISK_BYTES = 64 << 20
RAM_BYTES = 65 << 20
READ_BYTES = 4096
# Headers and status bytes lie above the pages that are read into.
HEADERS = 64 << 20
DATA_PAGES = (64 << 20) // READ_BYTES


class _Nobody:
    """Whom the device tells that it used something: nobody waits in this process."""

    def used(self, queue: int) -> None:
        """Nothing to do."""

    def quit(self) -> None:
        """Nothing to do."""


class _Bench:
    """A disk of random bytes, a guest that reads it at random, and the clock."""

    def __init__(self, file: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.file = file
        self.memory = GuestMemory.create(RAM_BYTES)
        for page in range(0, self.memory.limit, READ_BYTES):
            self.memory.view[page] = 1  # or the first round pays for the page faults of all
        self.layout = VringLayout.legacy(VIRTQUEUE_NUM, RAM_BYTES)
        self.memory.view[self.layout.desc :] = bytes(self.memory.limit - self.layout.desc)
        self.position = ControlPage.create().position(0)
        self.queue = Virtqueue(self.memory, self.layout, name="bench", position=self.position)
        self.block = Block(file, size=DISK_BYTES, serial="bench")
        self.block.attach([self.queue], _Nobody())
        self.avail = 0

    def offer_batch(self) -> list[tuple[list[memoryview], int]]:
        """Put BATCH reads into the ring, side by side as a driver's free list has them; gives them as for os.preadv."""
        view = self.memory.view
        pieces = []
        for number in range(BATCH):
            header = HEADERS + number * 64
            offset = self.random.randrange(DISK_BYTES // READ_BYTES) * READ_BYTES
            page = self.random.randrange(DATA_PAGES) * READ_BYTES
            struct.pack_into("<IIQ", view, header, VIRTIO_BLK_T_IN, 0, offset // 512)
            head = number * 3
            chain = (
                (header, 16, VRING_DESC_F_NEXT, head + 1),
                (page, READ_BYTES, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, head + 2),
                (header + 16, 1, VRING_DESC_F_WRITE, 0),
            )
            for index, descriptor in enumerate(chain):
                struct.pack_into("<QIHH", view, self.layout.desc + 16 * (head + index), *descriptor)
            slot = self.layout.avail + 4 + 2 * (self.avail % VIRTQUEUE_NUM)
            struct.pack_into("<H", view, slot, head)
            self.avail = (self.avail + 1) & 0xFFFF
            pieces.append(([view[page : page + READ_BYTES]], offset))
        struct.pack_into("<H", view, self.layout.avail + 2, self.avail)
        return pieces

    def ring(self) -> int:
        """Nanoseconds for BATCH requests that are taken and given back."""
        self.offer_batch()
        pop = self.queue.pop
        push = self.queue.push
        start = perf_counter_ns()
        for _ in range(BATCH):
            chain = pop()
            assert chain is not None
            push(chain[0], READ_BYTES + 1)
        return perf_counter_ns() - start

    def request(self) -> int:
        """Nanoseconds for BATCH requests that are served."""
        pieces = self.offer_batch()
        start = perf_counter_ns()
        self.block.serve()
        elapsed = perf_counter_ns() - start
        assert bytes(pieces[-1][0][0][:64]) == os.pread(self.file, 64, pieces[-1][1])
        return elapsed

    def bare(self) -> int:
        """Nanoseconds for the reads of BATCH requests by themselves."""
        pieces = self.offer_batch()
        self.position[0] = self.avail  # they are not for the device
        preadv = os.preadv
        file = self.file
        start = perf_counter_ns()
        for buffers, offset in pieces:
            preadv(file, buffers, offset)
        return perf_counter_ns() - start


def measure(rounds: int = 15, batches: int = 100) -> dict[str, float]:
    """Cost per request in nanoseconds: `bare`, `ring`, `request`, and `ratio` = request / bare.

    Each is the median of `rounds` rounds of `batches` batches of 32 requests, the three kinds in turn.
    """
    with tempfile.TemporaryFile() as file:
        for _ in range(DISK_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        bench = _Bench(file.fileno(), seed=1)
        kinds = {"bare": bench.bare, "ring": bench.ring, "request": bench.request}
        costs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            totals = dict.fromkeys(kinds, 0)
            for _ in range(batches):
                for kind, run in kinds.items():
                    totals[kind] += run()
            if number:  # the first round warms up
                for kind, total in totals.items():
                    costs[kind].append(total / batches / BATCH)
    result = {kind: round(median(cost), 1) for kind, cost in costs.items()}
    result["ratio"] = round(median(a / b for a, b in zip(costs["request"], costs["bare"], strict=True)), 2)
    return result


if __name__ == "__main__":
    print(json.dumps(measure()))
