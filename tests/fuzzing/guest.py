"""A guest that puts into its rings whatever is worst: requests that are nearly right, and sheer noise.

Its memory has a guard zone behind it that a device's view of it reaches, so that one byte too many is seen.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from ctypes import addressof, c_char
from random import Random
from typing import TYPE_CHECKING

from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import MAX_INDIRECT, RingError, Virtqueue, VringLayout

if TYPE_CHECKING:
    from lgmp.virtio.ring import Request

_NEXT, _WRITE, _INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
_DESCRIPTOR = struct.Struct("<QIHH")
_GUARD_BYTES = mmap.PAGESIZE
_GUARD = b"\xa5" * _GUARD_BYTES

# A part of a request: bytes for the device to read, or how many it may write.
Part = bytes | int


class BrokenPromise(AssertionError):
    """A device, or what is around it, did what it may not do whatever its guest does."""


class GuardedMemory:
    """Guest memory with a guard zone behind it, as lgmp.virtio.ring.Memory."""

    def __init__(self, limit: int) -> None:
        """`limit`: its bytes, without the guard zone."""
        self.low = 0
        self.limit = limit
        self.view = memoryview(mmap.mmap(-1, limit + _GUARD_BYTES))
        self.view[limit:] = _GUARD
        self._base = addressof(c_char.from_buffer(self.view))

    def pieces(self, address: int, size: int) -> list[memoryview] | None:
        """As lgmp.memory.GuestMemory."""
        return [self.view[address : address + size]] if 0 <= address <= self.limit - size else None

    def address_of(self, segment: memoryview) -> int:
        """Where a slice of it lies. Raises BrokenPromise where that is not guest memory."""
        at = addressof(c_char.from_buffer(segment)) - self._base
        if not 0 <= at <= self.limit - len(segment):
            raise BrokenPromise(f"a segment at {at:#x}+{len(segment)}, guest memory ends at {self.limit:#x}")
        return at


class WatchedVirtqueue(Virtqueue):
    """A ring that looks at what it hands out. `written`: where a device may write to; `seen`: how many chains."""

    __slots__ = ("guarded", "seen", "written")

    def __init__(self, memory: GuardedMemory, layout: VringLayout, name: str, region: InflightRegion) -> None:
        """As any, in a memory with a guard zone."""
        super().__init__(memory, layout, name=name, inflight=region)
        self.guarded = memory
        self.written: list[tuple[int, int]] = []
        self.seen = 0

    def peek(self, most: int, header: int, trailer: int) -> list[Request] | None:
        """As any. Raises BrokenPromise for a place that is not in guest memory."""
        found = super().peek(most, header, trailer)
        for start, data, end, to_write, last in found or ():
            if end < data:
                raise BrokenPromise(f"a request with data from {data:#x} to {end:#x}")
            for at, size in ((start, header), (data, end - data), (last, trailer)):
                if not 0 <= at <= self.guarded.limit - size:
                    raise BrokenPromise(f"{at:#x}+{size}, guest memory ends at {self.guarded.limit:#x}")
            self.written += [(data, end - data)] * to_write + [(last, trailer)]
        return found

    def answer(self, written: list[int]) -> None:
        """As any."""
        super().answer(written)
        self.seen += len(written)

    def pop(self) -> tuple[int, list[memoryview], list[memoryview]] | None:
        """As any. Raises BrokenPromise for a segment that is not in guest memory, and where there are too many."""
        try:
            chain = super().pop()
        except RingError:
            self.seen += 1
            raise
        if chain is None:
            return None
        self.seen += 1
        head, readable, writable = chain
        if not 0 <= head < self.num or len(readable) + len(writable) > self.num + MAX_INDIRECT:
            raise BrokenPromise(f"a chain with head {head} of {len(readable)}+{len(writable)} segments")
        for segment in readable:
            if segment:
                self.guarded.address_of(segment)
        for segment in writable:
            if segment:
                self.written.append((self.guarded.address_of(segment), len(segment)))
        return chain


def fresh_region(num: int) -> InflightRegion:
    """An in-flight region of a ring at its start."""
    return InflightRegion(memoryview(bytearray(inflight_bytes(num))), num)


class HostileGuest:
    """Writes rings into memory, nearly as a driver does."""

    def __init__(self, view: memoryview, layouts: Sequence[VringLayout], ram: int, limit: int) -> None:
        """Buffers go to the first `ram` bytes of `view`; `limit` is where guest memory ends."""
        self._view = view
        self._layouts = layouts
        self._ram = ram
        self._limit = limit
        self.begin()
        places = [place for layout in layouts for place in (layout.desc, layout.avail, layout.used)]
        self._addresses = [
            *(0, 1, ram - 1, ram, limit - 1, limit, limit + 1, limit - 16, limit - 4096, *places),
            *(0xFFFFFFFF, 0xFFFFF000, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 4096),
        ]
        self._sizes = [
            *(0, 1, 9, 10, 11, 15, 16, 17, 24, 32, 511, 512, 513, 4096, 16 * MAX_INDIRECT, 16 * MAX_INDIRECT + 16),
            *(limit, limit + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF),
        ]

    def begin(self) -> None:
        """The rings at their start, as after a reset."""
        self._avail = [0] * len(self._layouts)
        self._taken = [0] * len(self._layouts)
        for layout in self._layouts:
            self._view[layout.used : layout.used + 4] = bytes(4)
            self._view[layout.avail : layout.avail + 4] = bytes(4)

    def offer(self, random: Random, queue: int, parts: Sequence[Part]) -> None:
        """Offer a request of those parts: right but for where its buffers lie, which is anywhere."""
        entries: list[tuple[int, int, int]] = []
        for part in parts:
            size = part if isinstance(part, int) else len(part)
            address = random.randrange(max(1, self._ram - size))
            if isinstance(part, int):
                entries.append((address, size, _WRITE))
            else:
                entries.append((address, size, 0))
                self._view[address : address + size] = part
        layout = self._layouts[queue]
        num = layout.num
        indirect = random.random() < 0.3 or len(entries) > num
        table = random.randrange(self._ram - 16 * len(entries)) if indirect else layout.desc
        first = 0 if indirect else self._taken[queue]
        for number, (address, size, flags) in enumerate(entries):
            more = number + 1 < len(entries)
            at = first + number if indirect else (first + number) % num
            follows = (at + 1 if indirect else (at + 1) % num) if more else 0
            self._describe(table + 16 * at, address, size, flags | _NEXT * more, follows)
        head = self._taken[queue] % num
        if indirect:
            self._describe(layout.desc + 16 * head, table, 16 * len(entries), _INDIRECT, 0)
        self._taken[queue] = (head + (1 if indirect else len(entries))) % num
        self._set_head(queue, self._avail[queue], head)
        self._avail[queue] += 1
        self._set_index(queue, self._avail[queue])

    def spoil(self, random: Random, queue: int) -> None:
        """Make one thing about a ring wrong, or perhaps only different."""
        layout = self._layouts[queue]
        num = layout.num
        at = layout.desc + 16 * random.randrange(num)
        what = random.randrange(11)
        if what == 0:
            self._put("<Q", at, random.choice(self._addresses))
        elif what == 1:
            self._put("<I", at + 8, random.choice(self._sizes))
        elif what == 2:
            self._put("<H", at + 12, random.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 0xFFFF)))
        elif what == 3:
            self._put("<H", at + 14, random.choice((0, 1, 2, num - 1, num, num + 1, 0xFFFF)))
        elif what == 4:
            self._set_head(queue, random.randrange(num), random.choice((0, 1, num - 1, num, 0x7FFF, 0xFFFF)))
        elif what == 5:
            self._set_index(queue, self._avail[queue] + random.choice((-1, 1, 2, num, num + 1, 0x8000)))
        elif what == 6:
            for _ in range(random.randrange(1, 4)):
                place = random.randrange(layout.desc, layout.used)
                self._view[place] ^= 1 << random.randrange(8)
        elif what == 7:  # a chain into an indirect table: of anything, or of descriptors that are nearly right
            self._indirect_table(random, at)
        elif what == 8:
            self._describe(at, *self._noise(random))
        elif what == 9:  # the end of memory, to the byte
            size = random.choice((0, 1, 2, 16, 512))
            self._put("<QI", at, self._limit - size + random.choice((-1, 0, 0, 1)), size)
        else:  # the device's own part of the ring
            self._put("<HH", layout.used, random.getrandbits(16), random.choice((0, 1, 0xFFFF)))

    def noise(self, random: Random, queue: int) -> None:
        """Noise for descriptors, and a few of them offered."""
        layout = self._layouts[queue]
        for index in range(min(8, layout.num)):
            self._describe(layout.desc + 16 * index, *self._noise(random))
        offered = random.randrange(1, layout.num + 2)
        for number in range(min(3, offered)):
            self._set_head(queue, self._avail[queue] + number, random.randrange(min(8, layout.num)))
        self._avail[queue] += offered
        self._set_index(queue, self._avail[queue])

    def _indirect_table(self, random: Random, at: int) -> None:
        count = random.choice((1, 2, 3, 8, MAX_INDIRECT, MAX_INDIRECT + 1))
        table = random.randrange(max(1, self._ram - 16 * count))
        for number in range(min(count, 4)):
            if random.random() < 0.7:
                more = number + 1 < count
                address, size = random.randrange(self._ram), random.choice((0, 1, 16, 512))
                self._describe(table + 16 * number, address, size, _NEXT * more | _WRITE * (number > 1), number + 1)
            else:
                self._describe(table + 16 * number, *self._noise(random))
        size = 16 * count + random.choice((0, 0, 0, 0, 1, 8, -16))
        self._describe(at, table, max(0, size), _INDIRECT | random.choice((0, 0, 0, _NEXT, _WRITE)), 0)

    def _noise(self, random: Random) -> tuple[int, int, int, int]:
        kind = random.random()
        if kind < 0.5:
            address, size = random.randrange(self._ram), random.choice(self._sizes[:14])
        elif kind < 0.9:
            address, size = random.choice(self._addresses), random.choice(self._sizes)
        else:
            address, size = random.getrandbits(64), random.getrandbits(32)
        flags = random.getrandbits(16) if kind > 0.95 else random.getrandbits(3)
        return address, size, flags, random.randrange(9)

    def _describe(self, at: int, address: int, size: int, flags: int, follows: int) -> None:
        _DESCRIPTOR.pack_into(self._view, at, address, size, flags, follows)

    def _put(self, what: str, at: int, *values: int) -> None:
        struct.pack_into(what, self._view, at, *values)

    def _set_head(self, queue: int, index: int, head: int) -> None:
        layout = self._layouts[queue]
        self._put("<H", layout.avail + 4 + 2 * (index % layout.num), head)

    def _set_index(self, queue: int, index: int) -> None:
        self._put("<H", self._layouts[queue].avail + 2, index & 0xFFFF)
