"""Requests of a device in words: what went through its rings, by what kind of device it is."""

from __future__ import annotations

import time
from typing import NamedTuple

from lgmp.tracing.events import Bad, Done, Event, Features, Lost, Reset, Start, Take
from lgmp.virtio import block, console, net

_TYPES = {0x0800: "IPv4", 0x0806: "ARP", 0x86DD: "IPv6", 0x8100: "VLAN"}
_STATUS = {block.VIRTIO_BLK_S_OK: "ok", block.VIRTIO_BLK_S_IOERR: "ioerr", block.VIRTIO_BLK_S_UNSUPP: "unsupp"}
_ETHERNET_BYTES = 14
# How much of a request is shown whose meaning nobody knows, in bytes.
_SHOWN_BYTES = 16


class Request(NamedTuple):
    """A chain that was taken and, if `done`, given back. `number` counts those of the device from 1 on."""

    number: int
    take: Take
    done: Done | None = None

    def as_taken(self) -> Request:
        """It as it was when it was taken."""
        return self._replace(done=None)


class Pairing:
    """Makes requests of the events of a trace."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._count = 0
        self._open: dict[tuple[int, int], Request] = {}
        # Chains that a successor of a worker takes, or tells of, once more.
        self._again: set[tuple[int, int]] = set()

    @property
    def count(self) -> int:
        """How many requests there were."""
        return self._count

    @property
    def open(self) -> list[Request]:
        """Those that were not given back yet."""
        return list(self._open.values())

    def start(self, start: Start) -> list[Request]:
        """A worker begins to tell. Gives what its predecessor had given back, with nobody to tell of that."""
        held = {(queue, head) for queue, ring in enumerate(start.queues) for head in ring.heads}
        self._again = held
        return [self._open.pop(key) for key in [*self._open] if key not in held]

    def take(self, take: Take) -> Request | None:
        """A chain was taken; None where that was told before."""
        key = take.queue, take.head
        if key in self._open and (take.held or key in self._again):
            if not take.held:
                self._again.discard(key)
            return None
        if not take.held:
            self._again.discard(key)
        self._count += 1
        request = self._open[key] = Request(self._count, take)
        return request

    def done(self, done: Done) -> Request | None:
        """A chain was given back; None where nobody has told that it was taken."""
        key = done.queue, done.head
        self._again.discard(key)
        request = self._open.pop(key, None)
        return None if request is None else request._replace(done=done)

    def reset(self) -> list[Request]:
        """The driver reset the device. Gives what it will not be given back."""
        left = self.open
        self._open.clear()
        self._again.clear()
        return left


class Clock:
    """The time of day of events."""

    def __init__(self) -> None:
        """That is known from the first START on."""
        self._offset = 0

    def start(self, start: Start) -> None:
        """A START has both times."""
        self._offset = start.wall - start.time

    def wall(self, moment: int) -> int:
        """The nanoseconds since 1970 of a moment."""
        return max(0, moment + self._offset)

    def show(self, moment: int) -> str:
        """A moment as HH:MM:SS.microseconds, of here."""
        seconds, nanoseconds = divmod(self.wall(moment), 1_000_000_000)
        try:
            day = time.strftime("%H:%M:%S", time.localtime(seconds))
        except (OverflowError, ValueError, OSError):
            day = "??:??:??"
        return f"{day}.{nanoseconds // 1000:06}"


def words(kind: str, request: Request) -> str:
    """What a request is and what came of it, without times. `kind` is a Header's."""
    return _WORDS.get(kind, _any)(request)


def latency(request: Request) -> str:
    """How long a request took, for people; empty where that is not known."""
    if request.done is None or request.take.held:
        return ""
    return duration(max(0, request.done.time - request.take.time))


def duration(nanoseconds: int) -> str:
    """A time in three digits: 12.3 us, 456 ms, 7.89 s."""
    unit, size = "s", 1_000_000_000
    if nanoseconds < 999_500:
        unit, size = "us", 1_000
    elif nanoseconds < 999_500_000:
        unit, size = "ms", 1_000_000
    value = nanoseconds / size
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def note(event: Event) -> str | None:
    """A line for what is no request; None for what is, and for what nobody needs to see."""
    match event:
        case Bad():
            return f"BROKEN {printable(event.text)}"
        case Reset():
            return "reset"
        case Features():
            return f"features {event.features:#x}"
        case Lost():
            return f"LOST {event.events} events here"
    return None


def printable(text: str) -> str:
    """Text with nothing in it that a terminal would obey."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


# By kind


def _block(request: Request) -> str:
    take, done = request.take, request.done
    if len(take.data) < block.HEADER_BYTES:
        return _any(request)
    kind, _, sector = block.HEADER.unpack_from(take.data)
    base = kind & ~(block.VIRTIO_BLK_T_BARRIER | block.VIRTIO_BLK_T_OUT)
    where = f"sector {sector:<9}"
    if base == block.VIRTIO_BLK_T_FLUSH:
        what, size, where = "flush", 0, f"{'':16}"
    elif kind == block.VIRTIO_BLK_T_GET_ID:
        what, size, where = "id", max(0, take.writable - block.STATUS_BYTES), f"{'':16}"
    elif base == block.VIRTIO_BLK_T_IN and kind & block.VIRTIO_BLK_T_OUT:
        what, size = "write", take.readable - block.HEADER_BYTES
    elif base == block.VIRTIO_BLK_T_IN:
        what, size = "read", max(0, take.writable - block.STATUS_BYTES)
    else:
        what, size = f"type {kind:#x}", max(0, take.readable + take.writable - block.HEADER_BYTES - block.STATUS_BYTES)
    status = "" if done is None or done.last is None else _STATUS.get(done.last, f"status {done.last}")
    return f"{what:<6} {where} {size:>8} bytes  {status:<6}"


def frame(request: Request) -> tuple[bytes, int]:
    """The frame of a network device's request, as far as it is told, and its size in bytes."""
    if request.take.queue == net.TRANSMIT_QUEUE:
        return request.take.data[net.HEADER_BYTES :], max(0, request.take.readable - net.HEADER_BYTES)
    if request.done is None:
        return b"", 0
    return request.done.data[net.HEADER_BYTES :], max(0, request.done.written - net.HEADER_BYTES)


def _net(request: Request) -> str:
    data, size = frame(request)
    direction = "out" if request.take.queue == net.TRANSMIT_QUEUE else "in "
    if len(data) < _ETHERNET_BYTES:
        return f"{direction} {size:>6} bytes"
    number = int.from_bytes(data[12:14], "big")
    kind = _TYPES.get(number, f"{number:#06x}" if number >= 0x600 else "LLC")
    return f"{direction} {data[6:12].hex(':')} > {data[:6].hex(':')}  {kind:<6} {size:>6} bytes"


def console_text(request: Request) -> bytes:
    """What a console's request carried, in its direction."""
    if request.take.queue == console.OUTPUT_QUEUE:
        return request.take.data
    return request.done.data if request.done is not None else b""


def _console(request: Request) -> str:
    direction = "out" if request.take.queue == console.OUTPUT_QUEUE else "in "
    return f"{direction} {console_text(request).decode(errors='backslashreplace')!r}"


def _rng(request: Request) -> str:
    written = 0 if request.done is None else request.done.written
    return f"{written:>6} of {request.take.writable} bytes"


def _any(request: Request) -> str:
    take, done = request.take, request.done
    text = f"queue {take.queue}  {take.readable:>6} bytes read {_hex(take.data)}"
    if done is not None:
        text += f"  {done.written:>6} written {_hex(done.data)}"
    return text


def _hex(data: bytes) -> str:
    return data[:_SHOWN_BYTES].hex() + ("..." if len(data) > _SHOWN_BYTES else "")


_WORDS = {"block": _block, "net": _net, "console": _console, "rng": _rng}
