"""The events of a trace, checked: what workers tell over a socket, and what recordings hold, is trusted by nobody.

An event is a msgpack array, [kind, time, ...]; its kind is one of lgmp.tracing.wire's. `parse` makes a tuple with
names of it, and `raw` makes the array again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple, TypeAlias

from lgmp.tracing import wire
from lgmp.tracing.wire import SNAP_BYTES
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import DESCRIPTOR_BYTES, MAX_INDIRECT, MAX_RING

_descriptor = Struct("<QIHH")

U16 = (1 << 16) - 1
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
_MAX_QUEUES = 32
_MAX_TEXT = 4096
# A chain of a ring and of an indirect table, each the longest there can be, of the longest descriptors.
_MAX_CHAIN_BYTES = (MAX_RING + MAX_INDIRECT) * U32


class QueueStart(NamedTuple):
    """A ring when a trace began: the used ring's index, and the heads of the chains in flight, oldest first."""

    used_index: int
    heads: tuple[int, ...]


class Start(NamedTuple):
    """A worker begins to tell. `wall` is the time of day at `time`, in nanoseconds since 1970."""

    time: int
    wall: int
    level: int
    features: int
    queues: tuple[QueueStart, ...]


class Descriptor(NamedTuple):
    """An entry of a ring's descriptor table, and which one it is."""

    number: int
    address: int
    size: int
    flags: int
    next: int


class Table(NamedTuple):
    """An indirect table, and its guest address."""

    address: int
    content: bytes


class Take(NamedTuple):
    """A chain was taken. `held`: before the trace began, so that `time` is not when.

    `readable` and `writable` are the bytes of its segments, `data` is the beginning of the readable ones. `descriptors`
    are those of the ring, in the chain's order, and `table` the indirect table they lead to (told at FULL).
    """

    time: int
    queue: int
    head: int
    held: bool
    readable: int
    writable: int
    data: bytes
    descriptors: tuple[Descriptor, ...] | None = None
    table: Table | None = None


class Done(NamedTuple):
    """A chain was given back, with `written` bytes; `data` is the beginning of those.

    `last` is the last byte of the writable segments, None where there is none, or nobody knows.
    """

    time: int
    queue: int
    head: int
    written: int
    data: bytes
    last: int | None


class Bad(NamedTuple):
    """The driver broke a rule, as `text` says.

    Where it shows in ring `queue` (None: in a request that was taken already) its descriptor table and its available
    ring are here, with the indirect tables they lead to.
    """

    time: int
    queue: int | None
    text: str
    table: bytes = b""
    avail: bytes = b""
    indirect: tuple[Table, ...] = ()


class Reset(NamedTuple):
    """The driver reset the device."""

    time: int


class Features(NamedTuple):
    """The driver accepted `features`, a mask."""

    time: int
    features: int


class Lost(NamedTuple):
    """So many events were lost here."""

    time: int
    events: int


class Finish(NamedTuple):
    """The worker tells no more."""

    time: int


Event: TypeAlias = Start | Take | Done | Bad | Reset | Features | Lost | Finish


class _Fields:
    """The elements of an array, taken one by one and checked."""

    def __init__(self, elements: object) -> None:
        if type(elements) is not list:
            raise ValueError("not an array")
        self._elements: list[object] = elements
        self._at = 0

    def _next(self) -> object:
        if self._at == len(self._elements):
            raise ValueError(f"{len(self._elements)} elements are too few")
        self._at += 1
        return self._elements[self._at - 1]

    def number(self, what: str, most: int) -> int:
        value = self._next()
        # type() and not isinstance(): a bool is no number here.
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{what} is {_shown(value)}, not a number up to {most:#x}")
        return value

    def boolean(self, what: str) -> bool:
        value = self._next()
        if type(value) is not bool:
            raise ValueError(f"{what} is {_shown(value)}, not true or false")
        return value

    def data(self, what: str, most: int) -> bytes:
        value = self._next()
        if type(value) is not bytes or len(value) > most:
            raise ValueError(f"{what} is {_shown(value)}, not up to {most} bytes")
        return value

    def text(self, what: str) -> str:
        value = self._next()
        if type(value) is not str or len(value) > _MAX_TEXT:
            raise ValueError(f"{what} is {_shown(value)}, not a text up to {_MAX_TEXT} characters")
        return value

    def nothing(self) -> bool:
        """Whether the next element is nil, which is taken then."""
        if self._at < len(self._elements) and self._elements[self._at] is None:
            self._at += 1
            return True
        return False

    def array(self, what: str, most: int) -> list[object]:
        value = self._next()
        if type(value) is not list or len(value) > most:
            raise ValueError(f"{what} is {_shown(value)}, not an array of up to {most}")
        return value

    def end(self) -> None:
        if self._at != len(self._elements):
            raise ValueError(f"{len(self._elements)} elements are too many")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse(event: object) -> Event:
    """An event from its array. Raises ValueError, saying what is wrong, where it is none."""
    fields = _Fields(event)
    kind = fields.number("the kind of an event", U16)
    parser = _PARSERS.get(kind)
    if parser is None:
        raise ValueError(f"there is no event of kind {kind}")
    time = fields.number("the time of an event", U64)
    try:
        parsed: Event = parser(fields, time)
        fields.end()
    except ValueError as error:
        raise ValueError(f"{_NAMES[kind]}: {error}") from None
    return parsed


def raw(event: Event) -> list[object]:
    """The reverse of `parse`."""
    return [_KINDS[type(event)], *(_plain(field) for field in event)]


def _plain(field: object) -> object:
    return [_plain(element) for element in field] if isinstance(field, tuple) else field


def _start(fields: _Fields, time: int) -> Start:
    wall = fields.number("the time of day", U64)
    level = fields.number("the level", wire.PAYLOADS)
    features = fields.number("the features", U64)
    queues = []
    for element in fields.array("the rings", _MAX_QUEUES):
        ring = _Fields(element)
        used = ring.number("an index of used", U16)
        heads = [
            _Fields([head]).number("a head", MAX_RING - 1) for head in ring.array("the chains in flight", MAX_RING)
        ]
        ring.end()
        queues.append(QueueStart(used, tuple(heads)))
    return Start(time, wall, level, features, tuple(queues))


def _take(fields: _Fields, time: int) -> Take:
    queue = fields.number("the ring", _MAX_QUEUES - 1)
    head = fields.number("the head", MAX_RING - 1)
    held = fields.boolean("whether it was held")
    readable = fields.number("the readable bytes", _MAX_CHAIN_BYTES)
    writable = fields.number("the writable bytes", _MAX_CHAIN_BYTES)
    data = fields.data("the data", SNAP_BYTES)
    if len(data) > readable:
        raise ValueError(f"{len(data)} bytes of data in {readable} readable bytes")
    descriptors = None if fields.nothing() else tuple(_descriptors(fields.array("the chain", MAX_RING)))
    table = None if fields.nothing() else _table(_Fields(fields.array("the indirect table", 2)))
    return Take(time, queue, head, held, readable, writable, data, descriptors, table)


def _descriptors(elements: list[object]) -> Iterator[Descriptor]:
    for element in elements:
        entry = _Fields(element)
        yield Descriptor(
            entry.number("the number of a descriptor", MAX_RING - 1),
            entry.number("the address of a descriptor", U64),
            entry.number("the length of a descriptor", U32),
            entry.number("the flags of a descriptor", U16),
            entry.number("the next of a descriptor", U16),
        )
        entry.end()


def _table(fields: _Fields) -> Table:
    table = Table(
        fields.number("the address of an indirect table", U64),
        fields.data("an indirect table", MAX_INDIRECT * DESCRIPTOR_BYTES),
    )
    fields.end()
    return table


def _done(fields: _Fields, time: int) -> Done:
    queue = fields.number("the ring", _MAX_QUEUES - 1)
    head = fields.number("the head", MAX_RING - 1)
    written = fields.number("the bytes written", U32)
    data = fields.data("the data", SNAP_BYTES)
    if len(data) > written:
        raise ValueError(f"{len(data)} bytes of data in {written} bytes written")
    last = None if fields.nothing() else fields.number("the last byte", 0xFF)
    return Done(time, queue, head, written, data, last)


def _bad(fields: _Fields, time: int) -> Bad:
    queue = None if fields.nothing() else fields.number("the ring", _MAX_QUEUES - 1)
    text = fields.text("what is wrong")
    table = fields.data("the descriptor table", MAX_RING * DESCRIPTOR_BYTES)
    avail = fields.data("the available ring", 4 + 2 * MAX_RING)
    indirect = [_table(_Fields(element)) for element in fields.array("the indirect tables", MAX_INDIRECT)]
    return Bad(time, queue, text, table, avail, tuple(indirect))


_PARSERS: dict[int, Callable[[_Fields, int], Event]] = {
    wire.START: _start,
    wire.TAKE: _take,
    wire.DONE: _done,
    wire.BAD: _bad,
    wire.RESET: lambda fields, time: Reset(time),  # noqa: ARG005
    wire.FEATURES: lambda fields, time: Features(time, fields.number("the features", U64)),
    wire.LOST: lambda fields, time: Lost(time, fields.number("how many", U64)),
    wire.END: lambda fields, time: Finish(time),  # noqa: ARG005
}
_KINDS: dict[type, int] = {
    Start: wire.START,
    Take: wire.TAKE,
    Done: wire.DONE,
    Bad: wire.BAD,
    Reset: wire.RESET,
    Features: wire.FEATURES,
    Lost: wire.LOST,
    Finish: wire.END,
}
_NAMES = {
    wire.START: "START",
    wire.TAKE: "TAKE",
    wire.DONE: "DONE",
    wire.BAD: "BAD",
    wire.RESET: "RESET",
    wire.FEATURES: "FEATURES",
    wire.LOST: "LOST",
    wire.END: "END",
}


class Segment(NamedTuple):
    """A piece of guest memory that a chain leads to."""

    address: int
    size: int
    writable: bool


def segments(take: Take) -> list[Segment]:
    """The pieces that the chain of `take` leads to, in its order, as far as they are told. Nothing is checked."""
    found = []
    for descriptor in take.descriptors or ():
        if descriptor.flags & VRING_DESC_F_INDIRECT:
            break
        found.append(Segment(descriptor.address, descriptor.size, bool(descriptor.flags & VRING_DESC_F_WRITE)))
    if take.table is not None:
        count = at = 0
        entries = len(take.table.content) // DESCRIPTOR_BYTES
        while at < entries and count < entries:
            address, size, flags, follows = _descriptor.unpack_from(take.table.content, at * DESCRIPTOR_BYTES)
            found.append(Segment(address, size, bool(flags & VRING_DESC_F_WRITE)))
            if not flags & VRING_DESC_F_NEXT:
                break
            at = follows
            count += 1
    return found
