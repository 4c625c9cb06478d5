"""Tells of what goes through a device's rings, while somebody wants to know.

A device that is traced is given rings that tell (`TracedVirtqueue`) in the place of its own; when the trace ends it
gets its own back. So one that is not traced pays nothing, not even a question whether it is.

Whoever reads may be slow, be stopped or be gone, and none of that may become the guest's trouble: a worker that finds
the socket full waits for PATIENCE once, and from then on loses events until there is room again.
"""

from __future__ import annotations

import os
import select
from struct import Struct
from time import monotonic_ns, time_ns

from lgmp.tracing.wire import (
    BAD,
    DONE,
    END,
    FEATURES,
    FULL,
    HEAD_BYTES,
    HEADS,
    LOST,
    OFF,
    RESET,
    SNAP_BYTES,
    START,
    TAKE,
    level_and_session,
    packets,
)
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import DESCRIPTOR_BYTES, MAX_INDIRECT, RingError

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence

    from lgmp.virtio.ring import Request, Virtqueue
    from workers.device import Device

# How long a worker waits for room in the socket before it loses events, in milliseconds.
PATIENCE = 100

_unpack_descriptor = Struct("<QIHH").unpack_from


class Tracer:
    """What a worker has for being traced; by itself it does nothing."""

    def __init__(self, fd: int, device: Device, queues: Sequence[Virtqueue]) -> None:
        """`fd`: the socket, made non-blocking; `queues`: the rings of `device`, which has them now."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._device = device
        self._queues = queues
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._level = OFF
        self._session = 0
        self._features = 0
        self._patient = True  # whether a full socket is worth waiting for
        self._lost = 0
        self._said_bad = False  # whether the rule that was broken is told of already

    def set(self, setting: int) -> None:
        """Begin to tell, or end it; `setting` is lgmp.tracing.wire's."""
        if level_and_session(setting) == (self._level, self._session):
            return  # a successor may be told what it was started with
        if self._level != OFF:
            self._device.queues = self._queues
            self.emit(END, monotonic_ns())
        self._level, self._session = level_and_session(setting)
        self._lost = 0
        self._patient = True
        if self._level == OFF:
            return
        # As far as the driver has said so; a ring knows only that one feature which is its own.
        starts = [[queue.used_index, queue.heads_in_flight()] for queue in self._queues]
        self.emit(START, monotonic_ns(), time_ns(), self._level, self._features, starts)
        traced = [TracedVirtqueue(queue, number, self, self._level) for number, queue in enumerate(self._queues)]
        self._device.queues = traced  # type: ignore[assignment]  # they have all of its methods
        for queue in traced:
            queue.tell_held()

    def features(self, features: int) -> None:
        """The driver accepted `features`."""
        self._features = features
        if self._level != OFF:
            self.emit(FEATURES, monotonic_ns(), features)

    def reset(self) -> None:
        """The driver reset the device."""
        self._features = 0
        self._said_bad = False
        if self._level != OFF:
            self.emit(RESET, monotonic_ns())

    def broken(self, text: str) -> None:
        """The driver broke a rule, as `text` says; where a ring found that out, it has told of it already."""
        if self._level != OFF and not self._said_bad:
            self.emit(BAD, monotonic_ns(), None, text, b"", b"", ())
        self._said_bad = False

    def bad_ring(self, number: int, queue: Virtqueue, text: str) -> None:
        """Ring `number` found a rule broken: tell what it looks like."""
        self._said_bad = True
        table = bytes(queue.descriptor_table)
        tables = _indirect_tables(queue, table)
        self.emit(BAD, monotonic_ns(), number, text, table, bytes(queue.available_ring), tables)

    def emit(self, *event: object) -> None:
        """Tell of an event, or lose it."""
        if self._lost:
            if not self._send((LOST, monotonic_ns(), self._lost)):
                self._lost += 1
                return
            self._lost = 0
        if not self._send(event):
            self._lost = 1

    def _send(self, event: tuple[object, ...]) -> bool:
        for packet in packets(self._session, event):
            while True:
                try:
                    os.write(self._fd, packet)
                    self._patient = True
                    break
                except BlockingIOError:
                    # A reader that stops is waited for once, one that is slow each time.
                    if not self._patient:
                        return False
                    self._patient = bool(self._poll.poll(PATIENCE))
                except OSError:
                    return False  # there is no reader any more, or the kernel has no memory
        return True


class TracedVirtqueue:
    """A Virtqueue that tells of what goes through it."""

    def __init__(self, queue: Virtqueue, number: int, tracer: Tracer, level: int) -> None:
        """`queue` does the work; it is number `number` of its device."""
        self._queue = queue
        self._number = number
        self._tracer = tracer
        self._level = level
        self._snap = HEAD_BYTES if level == HEADS else SNAP_BYTES
        # Of each chain that was taken: the segments to write.
        self._writable: dict[int, tuple[memoryview, ...]] = {}

    @property
    def name(self) -> str:
        """As Virtqueue has it."""
        return self._queue.name

    @property
    def num(self) -> int:
        """As Virtqueue has it."""
        return self._queue.num

    @property
    def indirect(self) -> bool:
        """As Virtqueue has it."""
        return self._queue.indirect

    @indirect.setter
    def indirect(self, indirect: bool) -> None:
        self._queue.indirect = indirect

    @property
    def interrupts_suppressed(self) -> bool:
        """As Virtqueue has it."""
        return self._queue.interrupts_suppressed

    def reset(self) -> None:
        """As Virtqueue has it."""
        self._writable.clear()
        self._queue.reset()

    def resume(self) -> None:
        """As Virtqueue has it."""
        self._queue.resume()

    def pop(self) -> tuple[int, list[memoryview], list[memoryview]] | None:
        """As Virtqueue has it; tells of the chain, or of what is wrong with it."""
        try:
            chain = self._queue.pop()
        except RingError as error:
            self._tracer.bad_ring(self._number, self._queue, str(error))
            raise
        if chain is not None:
            self._took(*chain, held=False)
        return chain

    def peek(self, _most: int, _header: int, _trailer: int) -> list[Request]:
        """Nothing: what is to be told of goes by `pop` and `push`."""
        return []

    @property
    def view(self) -> memoryview:
        """As Virtqueue has it."""
        return self._queue.view

    @property
    def waiting(self) -> int:
        """As Virtqueue has it."""
        return self._queue.waiting

    def push(self, head: int, written: int) -> None:
        """As Virtqueue has it; tells of the answer."""
        writable = self._writable.pop(head, ())
        # Before the driver has it back, and may write there again.
        data = _beginning(writable, min(written, self._snap))
        last = next((segment[-1] for segment in reversed(writable) if segment), None)
        self._queue.push(head, written)
        self._tracer.emit(DONE, monotonic_ns(), self._number, head, written, data, last)

    def push_all(self, answers: Sequence[tuple[int, int]]) -> None:
        """As Virtqueue has it; tells of each answer."""
        taken = [(head, written, self._writable.pop(head, ())) for head, written in answers]
        told = [
            (
                *(head, written, _beginning(writable, min(written, self._snap))),
                next((segment[-1] for segment in reversed(writable) if segment), None),
            )
            for head, written, writable in taken
        ]
        self._queue.push_all(answers)
        for head, written, data, last in told:
            self._tracer.emit(DONE, monotonic_ns(), self._number, head, written, data, last)

    def tell_held(self) -> None:
        """Tell of the chains that were taken before the trace began, and are not given back yet."""
        queue = self._queue
        for head in queue.heads_in_flight():
            try:
                chain = queue.look_at(head)
            except RingError:
                continue  # the driver has spoilt it since: what was found in it at its time is the device's
            self._took(*chain, held=True)

    def _took(self, head: int, readable: list[memoryview], writable: list[memoryview], *, held: bool) -> None:
        now = monotonic_ns()
        # A copy: the list is the device's to change.
        self._writable[head] = tuple(writable)
        room = sum(map(len, readable))
        data = _beginning(readable, min(room, self._snap))
        descriptors = table = None
        if self._level == FULL:
            descriptors, table = _chain(self._queue, head)
        self._tracer.emit(TAKE, now, self._number, head, held, room, sum(map(len, writable)), data, descriptors, table)


def _beginning(segments: Sequence[memoryview], size: int) -> bytes:
    """The first `size` bytes of `segments`, or all that they hold."""
    if not size or not segments:
        return b""
    if len(segments[0]) >= size:
        return bytes(segments[0][:size])
    parts = []
    for segment in segments:
        parts.append(segment[:size])
        size -= len(parts[-1])
        if not size:
            break
    return b"".join(parts)


def _chain(queue: Virtqueue, head: int) -> tuple[list[tuple[int, ...]], tuple[int, bytes] | None]:
    """The descriptors of the chain `head`, and the indirect table they lead to, if any.

    The driver may have changed them since they were checked: what cannot be followed ends the chain here.
    """
    ring = queue.descriptor_table
    descriptors: list[tuple[int, ...]] = []
    at = head
    for _ in range(queue.num):
        address, size, flags, follows = _unpack_descriptor(ring, at * DESCRIPTOR_BYTES)
        descriptors.append((at, address, size, flags, follows))
        if flags & VRING_DESC_F_INDIRECT:
            return descriptors, _table(queue, address, size)
        if not flags & VRING_DESC_F_NEXT or follows >= queue.num:
            break
        at = follows
    return descriptors, None


def _table(queue: Virtqueue, address: int, size: int) -> tuple[int, bytes] | None:
    """The indirect table there, if it is in guest memory, as far as anybody looks at one."""
    size = min(size, MAX_INDIRECT * DESCRIPTOR_BYTES)
    content = queue.memory_at(address, size)
    return None if content is None else (address, bytes(content))


def _indirect_tables(queue: Virtqueue, ring: bytes) -> list[tuple[int, bytes]]:
    """All indirect tables that the descriptors of a ring name and that can be told; each once."""
    tables: dict[int, bytes] = {}
    room = SNAP_BYTES
    for address, size, flags, _ in Struct("<QIHH").iter_unpack(ring):
        if flags & VRING_DESC_F_INDIRECT and not flags & VRING_DESC_F_WRITE and len(tables) < MAX_INDIRECT:
            table = _table(queue, address, size)
            if table is not None and len(table[1]) <= room and len(table[1]) > len(tables.get(address, b"")):
                tables[address] = table[1]
                room -= len(table[1])
    return list(tables.items())
