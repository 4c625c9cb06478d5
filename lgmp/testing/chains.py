"""Chains of descriptors: lawful ones in every shape a driver may give them, and the misdeeds of a driver gone wrong.

A *shape* offers a request, whose parts are bytes (for the device to read) and numbers (that many bytes for it to
write); those to read come first. Whatever the shape, a device has to give the same answer:

    chain = scattered(driver, b"hello", 5)

`SHAPES` and `ANY_LAYOUT_SHAPES` have them by name. A *misdeed* breaks one rule of the ring, on a ring with nothing in
flight, in a way that the device is sure to see:

    misdeed = MISDEEDS["head out of range"]
    misdeed(driver)
    worker.kick()
    assert misdeed.says in worker.broken()

Beneath, `descriptors`, `parts` and `misdeeds` are strategies for hypothesis, where that is installed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol

from lgmp.testing.driver import Buffer, Driver, DriverQueue
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import MAX_INDIRECT

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_INDIRECT = VRING_DESC_F_INDIRECT
_NEXT = VRING_DESC_F_NEXT
_WRITE = VRING_DESC_F_WRITE

# An entry of a descriptor table: address, size, flags, next.
Entry = tuple[int, int, int, int]


@dataclass(frozen=True)
class Chain:
    """A chain that was offered: its head, as in `Used`, and its buffers in their order."""

    driver: Driver
    head: int
    buffers: tuple[Buffer, ...]

    @property
    def answer(self) -> bytes:
        """What is in the buffers now that the device may write, joined."""
        return b"".join(self.driver.content(buffer) for buffer in self.buffers if buffer.writable)


class Shape(Protocol):
    """Offers a request, a chain of `parts`, on a ring of `driver`."""

    def __call__(self, driver: Driver, *parts: bytes | int | Buffer, queue: int = 0) -> Chain:
        """Raises MemoryError where the ring or the guest's memory has no room for it."""


def direct(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0) -> Chain:
    """A descriptor for each part, all in the ring's table; those of a fresh ring lie side by side."""
    buffers = _buffers(driver, parts)
    return Chain(driver, driver.queues[queue].add(buffers), buffers)


def indirect(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0) -> Chain:
    """One descriptor in the ring's table, which leads to a table of those of the parts."""
    buffers = _buffers(driver, parts)
    table = driver.buffer(16 * len(buffers))
    return Chain(driver, driver.queues[queue].add(buffers, table.address), buffers)


def scattered(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0, seed: int = 0) -> Chain:
    """As `direct`, but with the descriptors in no order, and the buffers in the reverse order in memory, and apart."""
    ring = driver.queues[queue]
    Random(seed).shuffle(ring.free)
    buffers: list[Buffer] = []
    for part in reversed(parts):
        buffers[:0] = _buffers(driver, [part])
        driver.buffer(1)
    return Chain(driver, ring.add(buffers), tuple(buffers))


def with_empty_segments(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0) -> Chain:
    """With a segment of no bytes before each part, and one at the end."""
    buffers: list[Buffer] = []
    for buffer in _buffers(driver, parts):
        buffers += [Buffer(buffer.address, 0, buffer.writable), buffer]
    buffers.append(Buffer(0, 0, buffers[-1].writable))
    return Chain(driver, driver.queues[queue].add(buffers), tuple(buffers))


def in_small_pieces(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0, size: int = 3) -> Chain:
    """Each part cut into segments of at most `size` bytes, in an indirect table."""
    buffers = tuple(
        Buffer(buffer.address + at, min(size, buffer.size - at), buffer.writable)
        for buffer in _buffers(driver, parts)
        for at in range(0, max(1, buffer.size), size)
    )
    table = driver.buffer(16 * len(buffers))
    return Chain(driver, driver.queues[queue].add(buffers, table.address), buffers)


def half_indirect(driver: Driver, *parts: bytes | int | Buffer, queue: int = 0) -> Chain:
    """The first part in the ring's table, the others in an indirect table behind it, at an odd address.

    The descriptor of that table says WRITE, and the last of its entries has a next: neither means anything there.
    """
    ring = driver.queues[queue]
    buffers = _buffers(driver, parts)
    first, *others = buffers
    if not others:
        return indirect(driver, *buffers, queue=queue)
    driver.buffer(1 + driver.buffer(0).address % 2)
    entries = [
        (buffer.address, buffer.size, _WRITE * buffer.writable | _NEXT * (number < len(others)), number)
        for number, buffer in enumerate(others, 1)
    ]
    table = _table(driver, entries)
    head, through = ring.take(2)
    ring.set_descriptor(head, first.address, first.size, _WRITE * first.writable | _NEXT, through)
    ring.set_descriptor(through, table, 16 * len(entries), _INDIRECT | _WRITE, 0)
    ring.offer(head)
    return Chain(driver, head, buffers)


# Each part is a segment of its own, as drivers have it that have not accepted VIRTIO_F_ANY_LAYOUT.
SHAPES: dict[str, Shape] = {
    "direct": direct,
    "indirect": indirect,
    "scattered": scattered,
    "half indirect": half_indirect,
}
# And where a part ends is not told by the segments: for devices that go by the bytes alone.
ANY_LAYOUT_SHAPES: dict[str, Shape] = SHAPES | {
    "with empty segments": with_empty_segments,
    "in small pieces": in_small_pieces,
}


def _buffers(driver: Driver, parts: Iterable[bytes | int | Buffer]) -> tuple[Buffer, ...]:
    buffers = []
    for part in parts:
        if isinstance(part, Buffer):
            buffers.append(part)
        elif isinstance(part, int):
            buffers.append(driver.buffer(part, writable=True))
        else:
            buffers.append(driver.buffer(part))
    return tuple(buffers)


def _table(driver: Driver, entries: Iterable[Entry]) -> int:
    """Write an indirect table into fresh memory; gives its address."""
    return driver.buffer(b"".join(struct.pack("<QIHH", *entry) for entry in entries)).address


# Misdeeds


@dataclass(frozen=True)
class Misdeed:
    """A way to break one rule of the ring: call it with a driver, then kick the device.

    `says` is part of what the device says of it. `indirect_accepted`: whether the driver is to accept indirect tables;
    without, it must not. `while_in_flight`: the device sees it only where it takes a chain while it keeps another.
    """

    name: str
    commit: Callable[[Driver, int], None]
    says: str
    indirect_accepted: bool = True
    while_in_flight: bool = False

    def __call__(self, driver: Driver, queue: int = 0) -> None:
        """Commit it on a ring of at least 4 descriptors, of which the device has taken all that was offered."""
        self.commit(driver, queue)


MISDEEDS: dict[str, Misdeed] = {}


def _misdeed(
    says: str, *, indirect_accepted: bool = True, while_in_flight: bool = False
) -> Callable[[Callable[[Driver, int], None]], Misdeed]:
    def register(commit: Callable[[Driver, int], None]) -> Misdeed:
        name = commit.__name__.replace("_", " ")
        MISDEEDS[name] = Misdeed(name, commit, says, indirect_accepted, while_in_flight)
        return MISDEEDS[name]

    return register


def _offer(ring: DriverQueue, *entries: tuple[int, int, int, int]) -> None:
    """Offer a chain of free descriptors with these contents, the next of each counted from the chain's beginning."""
    chain = ring.take(len(entries))
    for index, (address, size, flags, follows) in zip(chain, entries, strict=True):
        ring.set_descriptor(index, address, size, flags, chain[follows] if follows < len(chain) else follows)
    ring.offer(chain[0])


def _offer_table(driver: Driver, queue: int, entries: Iterable[Entry], size: int | None = None, flags: int = 0) -> None:
    """Offer an indirect table; `size`: what its descriptor says that its bytes are, `flags`: beside INDIRECT."""
    entries = list(entries)
    table = _table(driver, entries)
    _offer(driver.queues[queue], (table, 16 * len(entries) if size is None else size, _INDIRECT | flags, 0))


@_misdeed("Guest says index")
def head_out_of_range(driver: Driver, queue: int) -> None:
    """A head that is one more than the ring has."""
    ring = driver.queues[queue]
    ring.offer(ring.layout.num)


@_misdeed("Guest says index 65535")
def head_far_out_of_range(driver: Driver, queue: int) -> None:
    """The greatest head that can be said."""
    driver.queues[queue].offer(0xFFFF)


@_misdeed("Guest moved used index")
def avail_index_jumps(driver: Driver, queue: int) -> None:
    """More chains at once than the ring has descriptors."""
    ring = driver.queues[queue]
    ring.set_avail(0, ring.next_avail + ring.layout.num + 1)


@_misdeed("Guest moved used index")
def avail_index_goes_back(driver: Driver, queue: int) -> None:
    """An index of the available ring that is one less than it was."""
    ring = driver.queues[queue]
    ring.set_avail(0, ring.next_avail - 1)


@_misdeed("is made available again while it is in flight", while_in_flight=True)
def same_head_twice(driver: Driver, queue: int) -> None:
    """A chain, and the same chain again before it was given back. Who answers the first before the second sees two."""
    ring = driver.queues[queue]
    buffer = driver.buffer(64, writable=True)
    ring.offer(ring.add([buffer]))


@_misdeed("Looped descriptor")
def descriptor_follows_itself(driver: Driver, queue: int) -> None:
    """A chain of one, without end."""
    _offer(driver.queues[queue], (0, 1, _NEXT | _WRITE, 0))


@_misdeed("Looped descriptor")
def loop(driver: Driver, queue: int) -> None:
    """A chain whose third descriptor leads to the second."""
    _offer(driver.queues[queue], (0, 1, _NEXT, 1), (0, 1, _NEXT | _WRITE, 2), (0, 1, _NEXT | _WRITE, 1))


@_misdeed("Looped descriptor")
def loop_in_a_table(driver: Driver, queue: int) -> None:
    """A loop within an indirect table."""
    _offer_table(driver, queue, [(0, 1, _NEXT, 1), (0, 1, _NEXT, 0)])


@_misdeed("Desc next is")
def next_out_of_range(driver: Driver, queue: int) -> None:
    """A next that is one more than the ring has."""
    ring = driver.queues[queue]
    _offer(ring, (0, 1, _NEXT, ring.layout.num))


@_misdeed("Desc next is 2, the table has 2")
def next_out_of_the_table(driver: Driver, queue: int) -> None:
    """A next that is one more than the indirect table has, though the ring has it."""
    _offer_table(driver, queue, [(0, 1, _NEXT, 1), (0, 1, _NEXT, 2)])


@_misdeed("Descriptor has out after in")
def out_after_in(driver: Driver, queue: int) -> None:
    """What the device may read behind what it may write."""
    _offer(driver.queues[queue], (0, 1, _NEXT | _WRITE, 1), (0, 1, 0, 0))


@_misdeed("Descriptor has out after in")
def out_after_in_in_a_table(driver: Driver, queue: int) -> None:
    """What the device may read behind what it may write, in an indirect table."""
    _offer_table(driver, queue, [(0, 1, _NEXT | _WRITE, 1), (0, 1, 0, 0)])


@_misdeed("Invalid address")
def address_outside_memory(driver: Driver, queue: int) -> None:
    """The first byte behind guest memory."""
    _offer(driver.queues[queue], (driver.memory.limit, 1, _WRITE, 0))


@_misdeed("Invalid address")
def one_byte_too_many(driver: Driver, queue: int) -> None:
    """A buffer that begins within guest memory and ends one byte behind it."""
    _offer(driver.queues[queue], (driver.memory.limit - 4095, 4096, _WRITE, 0))


@_misdeed("Invalid address")
def no_bytes_outside_memory(driver: Driver, queue: int) -> None:
    """A segment of no bytes beyond the end of guest memory."""
    _offer(driver.queues[queue], (driver.memory.limit + 1, 0, _WRITE, 0))


@_misdeed("Invalid address")
def wraps_at_32_bits(driver: Driver, queue: int) -> None:
    """An address and a size whose sum is small in 32 bits."""
    _offer(driver.queues[queue], (0xFFFFF000, 0x2000, _WRITE, 0))


@_misdeed("Invalid address")
def wraps_at_64_bits(driver: Driver, queue: int) -> None:
    """An address and a size whose sum is small in 64 bits."""
    _offer(driver.queues[queue], (0xFFFFFFFFFFFFF000, 0x2000, _WRITE, 0))


@_misdeed("Invalid address 0x0+4294967295")
def size_of_everything(driver: Driver, queue: int) -> None:
    """The greatest size there is."""
    _offer(driver.queues[queue], (0, 0xFFFFFFFF, _WRITE, 0))


@_misdeed("Invalid address")
def second_of_three_outside_memory(driver: Driver, queue: int) -> None:
    """As a disk's request, but with its data outside guest memory."""
    _offer(
        driver.queues[queue], (0, 16, _NEXT, 1), (driver.memory.limit - 511, 512, _NEXT | _WRITE, 2), (64, 1, _WRITE, 0)
    )


@_misdeed("Invalid address")
def address_outside_memory_in_a_table(driver: Driver, queue: int) -> None:
    """An entry of an indirect table that leads outside guest memory."""
    _offer_table(driver, queue, [(0, 1, _NEXT, 1), (driver.memory.limit, 1, _WRITE, 0)])


@_misdeed("Invalid address")
def table_outside_memory(driver: Driver, queue: int) -> None:
    """An indirect table whose second entry is outside guest memory."""
    _offer(driver.queues[queue], (driver.memory.limit - 16, 32, _INDIRECT, 0))


@_misdeed("Invalid size for indirect buffer table, 0 is not")
def empty_table(driver: Driver, queue: int) -> None:
    """An indirect table of no bytes."""
    _offer_table(driver, queue, [], size=0)


@_misdeed("Invalid size for indirect buffer table, 24 is not")
def table_and_a_half(driver: Driver, queue: int) -> None:
    """An indirect table whose size is no number of descriptors."""
    _offer_table(driver, queue, [(0, 1, 0, 0), (0, 1, 0, 0)], size=24)


@_misdeed("an indirect table of 1025 descriptors")
def table_too_long(driver: Driver, queue: int) -> None:
    """An indirect table of one more than are looked at."""
    _offer_table(driver, queue, [(0, 1, 0, 0)] * (MAX_INDIRECT + 1))


@_misdeed("INDIRECT within an indirect table")
def table_in_a_table(driver: Driver, queue: int) -> None:
    """An entry of an indirect table that is an indirect table."""
    inner = _table(driver, [(0, 1, 0, 0)])
    _offer_table(driver, queue, [(0, 1, _NEXT, 1), (inner, 16, _INDIRECT, 0)])


@_misdeed("INDIRECT within an indirect table")
def table_of_itself(driver: Driver, queue: int) -> None:
    """An indirect table whose entry is that very table."""
    address = driver.buffer(0).address
    _offer_table(driver, queue, [(address, 16, _INDIRECT, 0)])


@_misdeed("both INDIRECT and NEXT")
def indirect_and_next(driver: Driver, queue: int) -> None:
    """A chain that goes into an indirect table and on in the ring's own."""
    _offer_table(driver, queue, [(0, 1, 0, 0)], flags=_NEXT)


@_misdeed("has not accepted VIRTIO_RING_F_INDIRECT_DESC", indirect_accepted=False)
def indirect_without_the_feature(driver: Driver, queue: int) -> None:
    """A lawful indirect table, of a driver that has not accepted them."""
    _offer_table(driver, queue, [(0, 1, _WRITE, 0)])


# Strategies


def descriptors(limit: int, num: int) -> SearchStrategy[Entry]:
    """Descriptors of a guest with `limit` bytes of memory: near to what they should be, and far from it.

    `num`: how many descriptors their table has.
    """
    from hypothesis import strategies as st  # noqa: PLC0415  who wants no strategies needs no hypothesis

    return st.tuples(
        st.one_of(
            st.integers(0, limit + 64),
            st.sampled_from([0xFFFFFFFF, 0xFFFFFFF0, 1 << 32, (1 << 64) - 1, (1 << 64) - 4096, limit]),
            st.integers(0, (1 << 64) - 1),
        ),
        st.one_of(
            st.integers(0, 64), st.sampled_from([16, 32, 48, 4096, 0xFFFFFFFF, 1 << 31]), st.integers(0, (1 << 32) - 1)
        ),
        st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
        st.one_of(st.integers(0, num + 1), st.integers(0, 0xFFFF)),
    )


def parts(most: int = 5, size: int = 300) -> SearchStrategy[list[bytes | int]]:
    """Parts of a request, as the shapes take them, one at least: up to `most` of each kind, each up to `size` bytes."""
    from hypothesis import strategies as st  # noqa: PLC0415

    outs = st.lists(st.binary(max_size=size), max_size=most)
    ins = st.lists(st.integers(0, size), max_size=most)
    return st.builds(lambda first, second: [*first, *second], outs, ins).filter(bool)


def shapes() -> SearchStrategy[Shape]:
    """All shapes, those of any layout too, each as likely as the other."""
    from hypothesis import strategies as st  # noqa: PLC0415

    return st.sampled_from(list(ANY_LAYOUT_SHAPES.values()))


def misdeeds() -> SearchStrategy[Misdeed]:
    """The misdeeds, each as likely as the other."""
    from hypothesis import strategies as st  # noqa: PLC0415

    return st.sampled_from(list(MISDEEDS.values()))
