"""Recordings: what went through the rings of a device, in a file, to be looked at and to be replayed.

A recording is a stream of msgpack objects: a map, the header, and then events as lgmp.tracing.events has them. Whatever
reads one trusts nothing in it. One that was cut off is as good as it is long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple, cast

import msgpack

import lgmp
from lgmp.errors import LgmpError
from lgmp.memory import PAGE_SIZE
from lgmp.tracing import wire
from lgmp.tracing.events import U64, Bad, Done, Event, Start, Take, parse
from lgmp.virtio import ids
from lgmp.virtio.ring import DESCRIPTOR_BYTES, MAX_RING, USED_ELEMENT_BYTES, VringLayout

FORMAT = "lgmp recording"
VERSION = 1

_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_MAX_QUEUES = 32
_MAX_TEXT = 4096
_MAX_OPTIONS = 256
# What a header may take, in bytes: its texts are paths and names.
HEADER_BYTES = 1 << 17
# lguest guests have up to 4 GiB, and their device pages above that.
_MAX_MEMORY = (4 << 30) + (1 << 24)
_READ_BYTES = 1 << 16
# Text of the command line may be any bytes.
_TEXT_ERRORS = "surrogateescape"

_KINDS = {
    ids.VIRTIO_ID_NET: "net",
    ids.VIRTIO_ID_BLOCK: "block",
    ids.VIRTIO_ID_CONSOLE: "console",
    ids.VIRTIO_ID_RNG: "rng",
}


class Header(NamedTuple):
    """What a recording is of.

    `worker` is the module that served it, with `options` of its own; `offered` are the features that the device
    offered, `config` is its configuration space. `ram` and `limit`: bytes of guest memory before the device pages, and
    in all. `started`: nanoseconds since 1970.
    """

    guest: str
    device: str
    type: int
    worker: str
    options: tuple[str, ...]
    offered: int
    config: bytes
    queues: tuple[VringLayout, ...]
    ram: int
    limit: int
    started: int
    lgmp: str = lgmp.__version__

    @property
    def kind(self) -> str:
        """The word for such a device: "block", "net", "console", "rng", or "virtio N" for another."""
        return _KINDS.get(self.type, f"virtio {self.type}")

    def pack(self) -> bytes:
        """As bytes, the beginning of a recording."""
        fields: dict[str, object] = {"format": FORMAT, "version": VERSION, **self._asdict()}
        fields["queues"] = [[layout.num, layout.desc, layout.avail, layout.used] for layout in self.queues]
        packed: bytes = msgpack.packb(fields, unicode_errors=_TEXT_ERRORS)
        return packed

    @classmethod
    def unpack(cls, raw: bytes) -> Header:
        """The reverse of `pack`. Raises ValueError."""
        try:
            fields = msgpack.unpackb(raw, unicode_errors=_TEXT_ERRORS)
        except Exception as error:  # msgpack raises a dozen kinds, and what it is does not matter
            raise ValueError("the header is not msgpack") from error
        return cls.of(fields)

    @classmethod
    def of(cls, fields: object) -> Header:
        """The header that a msgpack map is. Raises ValueError where it is none."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"it does not begin with a map whose format is {FORMAT!r}")
        if fields.get("version") != VERSION:
            raise ValueError(f"it is of version {fields.get('version')!r:.20}, and this lgmp knows version {VERSION}")
        header = cls(
            _text(fields, "guest"),
            _text(fields, "device"),
            _number(fields, "type", 0xFF),
            _text(fields, "worker"),
            _texts(fields, "options"),
            _number(fields, "offered", U64),
            _bytes(fields, "config", 0xFF),
            _layouts(fields, "queues"),
            _number(fields, "ram", _MAX_MEMORY),
            _number(fields, "limit", _MAX_MEMORY),
            _number(fields, "started", U64),
            _text(fields, "lgmp"),
        )
        header.check()
        return header

    def check(self) -> None:
        """Raises ValueError where there can be no such device, or no such guest.

        The rings have to be within guest memory, that has to be whole pages, and the name becomes part of others.
        """
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"{self.device!r:.40} is no name of a device")
        if not 0 < self.ram <= self.limit or self.ram % PAGE_SIZE or self.limit % PAGE_SIZE:
            raise ValueError(f"there is no guest with {self.ram:#x} bytes of RAM in {self.limit:#x} of memory")
        for layout in self.queues:
            num = layout.num
            if not 1 <= num <= MAX_RING or num & (num - 1):
                raise ValueError(f"there is no ring of {num} descriptors")
            parts = (
                (layout.desc, num * DESCRIPTOR_BYTES, 16),
                (layout.avail, 4 + num * 2, 2),
                (layout.used, 4 + num * USED_ELEMENT_BYTES, 4),
            )
            if any(start + size > self.limit or start % align for start, size, align in parts):
                raise ValueError(f"the ring {layout} is not within guest memory ({self.limit:#x})")

    def check_event(self, event: Event) -> None:
        """Raises ValueError where an event is of a ring or of a descriptor that this device does not have."""
        if isinstance(event, Start) and len(event.queues) != len(self.queues):
            raise ValueError(f"a START of {len(event.queues)} rings, the device has {len(self.queues)}")
        if isinstance(event, Start):
            for layout, queue in zip(self.queues, event.queues, strict=True):
                if any(head >= layout.num for head in queue.heads):
                    raise ValueError(f"a chain in flight that the ring of {layout.num} does not have")
        if isinstance(event, Take | Done | Bad) and event.queue is not None:
            if event.queue >= len(self.queues):
                raise ValueError(f"an event of ring {event.queue}, the device has {len(self.queues)}")
            num = self.queues[event.queue].num
            if isinstance(event, Take | Done) and event.head >= num:
                raise ValueError(f"a chain that begins with descriptor {event.head}, the ring has {num}")
            if isinstance(event, Take) and any(entry.number >= num for entry in event.descriptors or ()):
                raise ValueError(f"a chain with descriptors that the ring of {num} does not have")
            if isinstance(event, Bad) and not (
                len(event.table) in (0, num * DESCRIPTOR_BYTES) and len(event.avail) in (0, 4 + 2 * num)
            ):
                raise ValueError(f"a picture of ring {event.queue} that is not of its size")


def _number(fields: Mapping[str, object], name: str, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {value!r:.40}, not a number up to {most:#x}")
    return value


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if type(value) is not str or len(value) > _MAX_TEXT:
        raise ValueError(f"{name} is {value!r:.40}, not a text")
    return value


def _texts(fields: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if type(value) is not list or len(value) > _MAX_OPTIONS:
        raise ValueError(f"{name} is {value!r:.40}, not an array of texts")
    return tuple(_text({name: element}, name) for element in value)


def _bytes(fields: Mapping[str, object], name: str, most: int) -> bytes:
    value = fields.get(name)
    if type(value) is not bytes or len(value) > most:
        raise ValueError(f"{name} is {value!r:.40}, not up to {most} bytes")
    return value


def _layouts(fields: Mapping[str, object], name: str) -> tuple[VringLayout, ...]:
    value = fields.get(name)
    if type(value) is not list or not 1 <= len(value) <= _MAX_QUEUES:
        raise ValueError(f"{name} is {value!r:.40}, not an array of rings")
    layouts = []
    for ring in value:
        if type(ring) is not list or len(ring) != 4:
            raise ValueError(f"{name} has {ring!r:.40}, not a ring")
        layouts.append(VringLayout(*(_number({name: element}, name, _MAX_MEMORY) for element in ring)))
    return tuple(layouts)


class Writer:
    """Writes a recording."""

    def __init__(self, file: IO[bytes], header: Header) -> None:
        """Write the header to `file`."""
        self._file = file
        file.write(header.pack())

    def write(self, event: object) -> None:
        """Add an event, as the array that it is."""
        self._file.write(cast(bytes, msgpack.packb(event)))


class _Counted:
    """A file of which it is counted what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data

    def close(self) -> None:
        self._file.close()


class Recording:
    """A recording that is read. `header` is there at once, the events come as they are read."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Read the header from `file`; `name` is for messages. Raises LgmpError where it is no recording."""
        self._name = name
        self._file = _Counted(file)
        self._unpacker = msgpack.Unpacker(
            self._file,
            read_size=_READ_BYTES,
            max_buffer_size=2 * wire.EVENT_BYTES,
            max_str_len=4 * _MAX_TEXT,
            max_bin_len=wire.SNAP_BYTES,
            max_array_len=MAX_RING,
            max_map_len=64,
            max_ext_len=0,
            unicode_errors=_TEXT_ERRORS,
        )
        # Whether it ends in the middle of an event.
        self.truncated = False
        try:
            fields = self._next()
        except StopIteration:
            raise LgmpError(f"{name} is empty, or cut off before its first event: it is no recording") from None
        try:
            self.header = Header.of(fields)
        except ValueError as error:
            raise LgmpError(f"{name} is no recording that can be read: {error}") from None

    @classmethod
    def open(cls, path: str) -> Recording:
        """Open a file. Raises LgmpError."""
        try:
            file = open(path, "rb")  # noqa: SIM115  it is the caller's, by `close`
        except OSError as error:
            raise LgmpError(f"Failed to open {path}: {error.strerror}") from error
        try:
            return cls(file, path)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> object:
        """The next object. Raises StopIteration at the end, and LgmpError for what is no msgpack, or too much of it."""
        at = self._unpacker.tell()
        try:
            found: object = next(self._unpacker)
        except StopIteration:
            self.truncated = self._file.count > at
            raise
        except OSError as error:
            raise LgmpError(f"{self._name}: {error.strerror}") from error
        except Exception as error:  # msgpack raises a dozen kinds
            raise LgmpError(f"{self._name}, byte {at}: no msgpack, or more than an event may be: {error}") from None
        return found

    def events(self) -> Iterator[Event]:
        """The events in their order, each checked. Raises LgmpError where there is one that is none."""
        while True:
            at = self._unpacker.tell()
            try:
                raw: Any = self._next()
            except StopIteration:
                return
            try:
                event = parse(raw)
                self.header.check_event(event)
            except ValueError as error:
                raise LgmpError(f"{self._name}, byte {at}: {error}") from None
            yield event
