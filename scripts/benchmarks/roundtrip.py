"""From a kick to the completion, through the message queues, with a real worker process on the other side.

Three kinds in turn, round by round: a request that is answered from the worker's memory (the disk's serial number), one
that is a 4 KiB read from a file in the page cache, and for comparison the queues alone: a process in Python that
sends every message straight back.

Where the two processes run makes more of a difference than anything they do: on one processor they take turns, on two
each message wakes a processor that sleeps. Hence both are measured, with the processes held in place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from time import perf_counter_ns

from samples import Samples
from worker import BlockWorker

from lgmp.mailbox import MAILBOX_MESSAGE_BYTES, MAILBOX_MESSAGES, Mailbox, ToWorker, pack, queue_name
from lgmp.virtio.block import VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN

DISK_BYTES = 16 << 20
READ_BYTES = 4096
_SECTORS_PER_READ = READ_BYTES // 512


class _Echo:
    """A child that receives from one queue and sends to another until it gets an empty message."""

    def __init__(self) -> None:
        names = [queue_name(os.getpid(), f"bench-{way}") for way in ("there", "back")]
        self._there, self._back = (Mailbox.create(name, MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES) for name in names)
        self._message = pack(ToWorker.KICK)
        self.pid = os.fork()
        if not self.pid:
            while raw := self._there.receive():
                self._back.send(raw)
            os._exit(0)
        self._there.unlink()
        self._back.unlink()

    def round_trip(self) -> None:
        self._there.post(self._message)
        self._back.receive()

    def close(self) -> None:
        self._there.send(b"")
        os.waitpid(self.pid, 0)
        self._there.close()
        self._back.close()


def measure(rounds: int = 20, trips: int = 250) -> dict[str, dict[str, Samples]]:
    """Microseconds by placement ("one processor", "two processors") and kind, `rounds` rounds of `trips` each.

    On a machine with one processor there is only that placement.
    """
    processors = sorted(os.sched_getaffinity(0))
    places = {"one processor": processors[0]}
    if len(processors) > 1:
        places["two processors"] = processors[1]
    echo = _Echo()
    with tempfile.TemporaryFile() as disk:
        disk.write(os.urandom(DISK_BYTES))
        disk.flush()
        with BlockWorker(disk.fileno()) as worker:
            offers: dict[str, Callable[[int], None]] = {
                "no read": lambda _number: worker.offer(VIRTIO_BLK_T_GET_ID, 0, VIRTIO_BLK_ID_BYTES),
                "4 KiB read": lambda number: worker.offer(VIRTIO_BLK_T_IN, _sector(number), READ_BYTES),
            }
            costs: dict[str, dict[str, list[float]]] = {
                place: {"queues alone": [], **{kind: [] for kind in offers}} for place in places
            }
            os.sched_setaffinity(0, processors[:1])
            for number in range(rounds + 1):
                for place, processor in places.items():
                    for pid in (echo.pid, worker.process.pid):
                        os.sched_setaffinity(pid, [processor])
                    measured = {"queues alone": _trips(echo.round_trip, trips)}
                    for kind, offer in offers.items():
                        measured[kind] = _trips(worker.round_trip, trips, offer)
                        worker.check()
                    if number:  # the first round warms up
                        for kind, values in measured.items():
                            costs[place][kind] += values
            os.sched_setaffinity(0, processors)
    echo.close()
    return {place: {kind: Samples.of(values, "us") for kind, values in kinds.items()} for place, kinds in costs.items()}


def _sector(number: int) -> int:
    """Somewhere else each time; a prime stride leaves no page out."""
    return number * 97 % (DISK_BYTES // READ_BYTES) * _SECTORS_PER_READ


def _trips(round_trip: Callable[[], None], trips: int, prepare: Callable[[int], None] | None = None) -> list[float]:
    values = []
    for number in range(trips):
        if prepare is not None:
            prepare(number)
        start = perf_counter_ns()
        round_trip()
        values.append((perf_counter_ns() - start) / 1000)
    return values
