"""Writes captures that Wireshark reads: pcapng, for one Ethernet interface.

Times are nanoseconds, and each frame says whether it came in or went out, seen from the guest. The blocks are those of
draft-ietf-opsawg-pcapng; the libraries there are for it either know no directions or no nanoseconds.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import IO

_SECTION = 0x0A0D0D0A
_INTERFACE = 1
_PACKET = 6

_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_LINKTYPE_ETHERNET = 1

# Options: those of any block, of a section, of an interface and of a packet.
_END = 0
_APPLICATION = 4
_NAME = 2
_RESOLUTION = 9
_FLAGS = 2

_NANOSECONDS = b"\x09"

_block_head = Struct("<II")
_block_end = Struct("<I")
_option_head = Struct("<HH")
_section = Struct("<IHHq")
_interface = Struct("<HHI")
_packet = Struct("<IIIII")


class Direction(IntEnum):
    """As the flags of a packet have it."""

    IN = 1
    OUT = 2


class PcapngWriter:
    """Writes a capture of the frames of one interface."""

    def __init__(self, file: IO[bytes], interface: str, application: str) -> None:
        """Begin a capture of `interface`; `application` says who made it."""
        self._file = file
        section = _section.pack(_BYTE_ORDER_MAGIC, 1, 0, -1)
        self._write(_SECTION, section, (_APPLICATION, application.encode()))
        options = (_NAME, interface.encode()), (_RESOLUTION, _NANOSECONDS)
        self._write(_INTERFACE, _interface.pack(_LINKTYPE_ETHERNET, 0, 0), *options)

    def frame(self, time: int, frame: bytes, size: int, direction: Direction) -> None:
        """Add a frame of `size` bytes, of which `frame` is what there is; `time` is nanoseconds since 1970."""
        head = _packet.pack(0, time >> 32, time & 0xFFFFFFFF, len(frame), size)
        flags = _block_end.pack(direction)
        self._write(_PACKET, head + _padded(frame), (_FLAGS, flags))

    def _write(self, kind: int, body: bytes, *options: tuple[int, bytes]) -> None:
        for code, value in options:
            body += _option_head.pack(code, len(value)) + _padded(value)
        body += _option_head.pack(_END, 0)
        size = len(body) + 12
        self._file.write(_block_head.pack(kind, size) + body + _block_end.pack(size))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
