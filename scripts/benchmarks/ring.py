"""What a request costs in the ring and in the disk, beside a bare os.preadv of the same file in the same run.

A request is what a guest's block driver sends for a 4 KiB read: three descriptors, header, data and status. "ring" is
taking it from the available ring and adding it to the used ring; "request" is the whole of it, as workers/block.py
serves it, read and status included; "bare" is os.preadv alone, of the same pieces of the same file into the same pages.
The pieces and the pages lie at random over 64 MiB each, as a guest's do, all of them in the page cache.

"ring" and "request" are measured as they are, and without the record of requests in flight; "request" also without
counting what is done. The kinds take turns, batch by batch. What is "without" is lgmp's own code, compiled from its
source without the statements that store to the record or look at it (see without.py): such a ring could not go on where
another was killed, nor find a descriptor that is made available twice; for the rest it does the same.

`python scripts/benchmarks/ring.py` prints it as JSON, in nanoseconds; nothing in it decides anything.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns

from without import without

from lgmp.control import ControlPage
from lgmp.memory import PAGE_SIZE, GuestMemory
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


# What keeps the record: the statements that have these names in them, and the check for a chain that is in flight.
_RECORDING = {"pop": ("_inflight", "_counters", "_counter"), "push": ("_inflight", "header")}
_COUNTING = ("statistics", "given")


def _take_and_give_back(queue: Virtqueue) -> int:
    """Nanoseconds for BATCH requests that are taken and given back."""
    pop = queue.pop
    push = queue.push
    start = perf_counter_ns()
    for _ in range(BATCH):
        chain = pop()
        assert chain is not None
        push(chain[0], READ_BYTES + 1)
    return perf_counter_ns() - start


class _Side:
    """A ring, and a disk that serves it: one of those that are compared.

    All code that they run is compiled for each of them anew. Python fits code to what it has seen there, and none is to
    have seen the others.
    """

    def __init__(self, memory: GuestMemory, file: int, number: int, *, records: bool, counts: bool) -> None:
        """`number`: which ring of the guest it is."""
        ring_bytes = -(-VringLayout.legacy_bytes(VIRTQUEUE_NUM) // PAGE_SIZE) * PAGE_SIZE
        self.layout = VringLayout.legacy(VIRTQUEUE_NUM, RAM_BYTES + number * ring_bytes)
        control = ControlPage.create([VIRTQUEUE_NUM])
        methods = {
            name: without(getattr(Virtqueue, name), *(() if records else names)) for name, names in _RECORDING.items()
        }
        ring: type[Virtqueue] = type("Ring", (Virtqueue,), {"__slots__": (), **methods})
        disk: type[Block] = type(
            "Disk",
            (Block,),
            {
                "serve_ring": without(Block.serve_ring, *(() if counts else _COUNTING)),
            },
        )
        self.queue = ring(memory, self.layout, name="bench", inflight=control.inflight[0])
        self.block = disk(file, size=DISK_BYTES, serial="bench")
        self.block.attach([self.queue], _Nobody(), statistics=control.statistics, state=control.state)
        self.take_and_give_back = without(_take_and_give_back)
        self.avail = 0


class _Bench:
    """A disk of random bytes, a guest that reads it at random, and the clock."""

    def __init__(self, file: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.file = file
        self.memory = GuestMemory.create(RAM_BYTES)
        for page in range(0, self.memory.limit, READ_BYTES):
            self.memory.view[page] = 1  # or the first round pays for the page faults of all
        self.memory.view[RAM_BYTES:] = bytes(self.memory.limit - RAM_BYTES)
        self.whole = _Side(self.memory, file, 0, records=True, counts=True)
        self.unrecorded = _Side(self.memory, file, 1, records=False, counts=True)
        self.uncounted = _Side(self.memory, file, 2, records=True, counts=False)

    def offer_batch(self, side: _Side, publish: bool = True) -> list[tuple[list[memoryview], int]]:
        """Put BATCH reads into a ring, side by side as a driver's free list has them; gives them as for os.preadv.

        `publish`: whether they are for the device as well.
        """
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
                struct.pack_into("<QIHH", view, side.layout.desc + 16 * (head + index), *descriptor)
            slot = side.layout.avail + 4 + 2 * ((side.avail + number) % VIRTQUEUE_NUM)
            struct.pack_into("<H", view, slot, head)
            pieces.append(([view[page : page + READ_BYTES]], offset))
        if publish:
            side.avail = (side.avail + BATCH) & 0xFFFF
            struct.pack_into("<H", view, side.layout.avail + 2, side.avail)
        return pieces

    def ring(self, side: _Side) -> int:
        """Nanoseconds for BATCH requests that are taken and given back."""
        self.offer_batch(side)
        elapsed: int = side.take_and_give_back(side.queue)
        return elapsed

    def request(self, side: _Side) -> int:
        """Nanoseconds for BATCH requests that are served."""
        pieces = self.offer_batch(side)
        start = perf_counter_ns()
        side.block.serve()
        elapsed = perf_counter_ns() - start
        assert bytes(pieces[-1][0][0][:64]) == os.pread(self.file, 64, pieces[-1][1])
        return elapsed

    def bare(self) -> int:
        """Nanoseconds for the reads of BATCH requests by themselves."""
        pieces = self.offer_batch(self.whole, publish=False)
        preadv = os.preadv
        file = self.file
        start = perf_counter_ns()
        for buffers, offset in pieces:
            preadv(file, buffers, offset)
        return perf_counter_ns() - start


def measure(rounds: int = 15, batches: int = 100) -> dict[str, float]:
    """Cost per request in nanoseconds by kind, and `ratio` = request / bare.

    Kinds are `bare`, `ring`, `request`, "ring, unrecorded", "request, uncounted"; the disk answers at once and records
    nothing. Each is the median of `rounds` rounds; a round is the median of `batches` batches of 32 requests, the kinds
    in turn. `recording` and `counting` are what those cost a request: the median difference, round by round.
    """
    with tempfile.TemporaryFile() as file:
        for _ in range(DISK_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        bench = _Bench(file.fileno(), seed=1)
        kinds: dict[str, Callable[[], int]] = {
            "bare": bench.bare,
            "ring": lambda: bench.ring(bench.whole),
            "ring, unrecorded": lambda: bench.ring(bench.unrecorded),
            "request": lambda: bench.request(bench.whole),
            "request, uncounted": lambda: bench.request(bench.uncounted),
        }
        costs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            measured: dict[str, list[int]] = {kind: [] for kind in kinds}
            for _ in range(batches):
                for kind, run in kinds.items():
                    measured[kind].append(run())
            if number:  # the first round warms up
                for kind, values in measured.items():
                    costs[kind].append(median(values) / BATCH)
    result = {kind: round(median(cost), 1) for kind, cost in costs.items()}
    result["recording"] = _difference(costs, "ring", "ring, unrecorded")
    result["counting"] = _difference(costs, "request", "request, uncounted")
    result["ratio"] = round(median(a / b for a, b in zip(costs["request"], costs["bare"], strict=True)), 2)
    return result


def _difference(costs: dict[str, list[float]], more: str, less: str) -> float:
    return round(median(a - b for a, b in zip(costs[more], costs[less], strict=True)), 1)


if __name__ == "__main__":
    print(json.dumps(measure()))
