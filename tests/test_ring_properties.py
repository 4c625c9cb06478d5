"""A driver model against the device side of a ring: what is offered is what is taken, and nothing else ever is."""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from random import Random

from driver import Buffer, Driver, Used
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.memory import GuestMemory
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import MAX_INDIRECT, RingError, Virtqueue, VringLayout

# Small enough for hypothesis to fill it with nonsense: descriptors, rings and room for buffers and tables.
SMALL_RAM = 4096
# The driver's buffers and tables in the model test: apart from each other, so that contents can be told.
TABLES = 1 << 20
TABLE_BYTES = 16 * 16

# What the driver offers: sizes of its readable and its writable buffers, and whether through an indirect table.
chains = st.tuples(
    st.lists(st.integers(0, 300), max_size=5), st.lists(st.integers(0, 300), max_size=5), st.booleans()
).filter(lambda chain: bool(chain[0] or chain[1]))

steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), chains),
        st.tuples(st.just("pop"), st.none()),
        st.tuples(st.just("push"), st.integers(0, 1 << 16)),
        st.tuples(st.just("collect"), st.none()),
        st.tuples(st.just("replace"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(steps, st.sampled_from([1, 2, 4, 8, 16]), st.integers(65500, 65535) | st.just(0))
def test_what_the_driver_offers_is_what_the_device_takes(
    script: list[tuple[str, object]], num: int, start: int
) -> None:
    """Any order of offering, taking, giving back (in any order) and collecting, over the wrap of both indexes."""
    driver = Driver(num=num, start=start)
    (queue,) = driver.device_queues()
    ring = driver.queues[0]
    offered: deque[tuple[int, list[Buffer]]] = deque()
    taken: list[tuple[int, int]] = []
    given_back: list[Used] = []
    for step, (what, argument) in enumerate(script):
        if what == "offer":
            assert isinstance(argument, tuple)
            outs, intos, indirect = argument
            buffers = [driver.buffer(size) for size in outs] + [driver.buffer(size, True) for size in intos]
            needed = 1 if indirect else len(buffers)
            if needed <= len(ring.free):
                table = TABLES + ring.free[0] * TABLE_BYTES if indirect else None
                offered.append((ring.add(buffers, table), buffers))
        elif what == "pop":
            chain = queue.pop()
            if not offered:
                assert chain is None
                continue
            assert chain is not None
            head, buffers = offered.popleft()
            assert chain[0] == head
            assert list(map(len, chain[1])) == [buffer.size for buffer in buffers if not buffer.writable]
            assert list(map(len, chain[2])) == [buffer.size for buffer in buffers if buffer.writable]
            for segment, buffer in zip(chain[1] + chain[2], buffers, strict=True):
                segment[:] = bytes([step]) * len(segment)
                assert driver.content(buffer) == bytes([step]) * buffer.size
            taken.append((head, step))
        elif what == "push" and taken:
            assert isinstance(argument, int)
            head, _ = taken.pop(argument % len(taken))
            queue.push(head, argument)
            given_back.append(Used(head, argument))
        elif what == "collect":
            assert ring.collect() == given_back
            given_back = []
        elif what == "replace":
            # Another worker takes over, with nothing but the control page to go by.
            (queue,) = driver.device_queues()
    assert ring.collect() == given_back
    driver.close()


def address_of(segment: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(segment))


# Numbers that come close to what they should be, and those that are far from it.
descriptors = st.tuples(
    st.one_of(
        st.integers(0, SMALL_RAM + 64),
        st.sampled_from([0xFFFFFFFF, 0xFFFFFFF0, 1 << 32, (1 << 64) - 1, (1 << 64) - 4096, SMALL_RAM]),
        st.integers(0, (1 << 64) - 1),
    ),
    st.one_of(
        st.integers(0, 64), st.sampled_from([16, 32, 48, 4096, 0xFFFFFFFF, 1 << 31]), st.integers(0, (1 << 32) - 1)
    ),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
)


def reference(memory: bytes, table: int, head: int, num: int, indirect: bool) -> list[tuple[int, int, bool]] | None:
    """The rules of lguest-abi.md and virtio 1.0 section 2.4, said slowly: the segments, or None for a broken rule."""
    segments: list[tuple[int, int, bool]] = []
    count, at, visited, inside = num, head, 0, False
    while True:
        visited += 1
        if visited > count:
            return None
        address, size, flags, follows = struct.unpack_from("<QIHH", memory, table + 16 * at)
        if address + size > len(memory):
            return None
        if flags & VRING_DESC_F_INDIRECT:
            if (
                not indirect
                or inside
                or flags & VRING_DESC_F_NEXT
                or size == 0
                or size % 16
                or size // 16 > MAX_INDIRECT
            ):
                return None
            table, count, at, visited, inside = address, size // 16, 0, 0, True
            continue
        writable = bool(flags & VRING_DESC_F_WRITE)
        if segments and segments[-1][2] and not writable:
            return None
        segments.append((address, size, writable))
        if not flags & VRING_DESC_F_NEXT:
            return segments
        if follows >= count:
            return None
        at = follows


@settings(max_examples=500, deadline=None)
@given(
    table=st.lists(descriptors, min_size=8, max_size=8),
    more=st.lists(descriptors, max_size=8),
    head=st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
    index=st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    indirect=st.booleans(),
)
def test_hostile_chains_give_the_reference_answer_or_a_ring_error(
    table: list[tuple[int, int, int, int]],
    more: list[tuple[int, int, int, int]],
    head: int,
    index: int,
    indirect: bool,
) -> None:
    with GuestMemory.create(SMALL_RAM, device_pages=0) as memory:
        layout = VringLayout.legacy(8, 0, align=64)
        # Tables that an INDIRECT may hit lie right behind the rings, and the rings themselves may be hit as well.
        for number, descriptor in enumerate(table):
            struct.pack_into("<QIHH", memory.view, 16 * number, *descriptor)
        for number, descriptor in enumerate(more):
            struct.pack_into("<QIHH", memory.view, 512 + 16 * number, *descriptor)
        struct.pack_into("<HHH", memory.view, layout.avail, 0, index, head)
        queue = Virtqueue(memory, layout, name="vda: queue 0", position=memoryview(bytearray(4)).cast("H"))
        queue.indirect = indirect
        expected = reference(bytes(memory.view), 0, head, 8, indirect) if head < 8 and 1 <= index <= 8 else None
        try:
            chain = queue.pop()
        except RingError as error:
            assert index != 0
            assert expected is None
            assert str(error).startswith("vda: queue 0: ")
            return
        if index == 0:
            assert chain is None
            return
        assert chain is not None
        assert expected is not None
        assert chain[0] == head
        base = address_of(memory.view)
        got = [(segment, False) for segment in chain[1]] + [(segment, True) for segment in chain[2]]
        assert len(got) == len(expected)
        for (segment, writable), (address, size, should_be_writable) in zip(got, expected, strict=True):
            assert (len(segment), writable) == (size, should_be_writable)
            if size:
                assert address_of(segment) == base + address
        chain = got = segment = None  # type: ignore[assignment]  # or the memory stays mapped


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.booleans(), st.sampled_from([1, 2, 16, 64]))
def test_noise_for_guest_memory_raises_nothing_but_ring_errors(seed: int, indirect: bool, num: int) -> None:
    noise = Random(seed).randbytes(SMALL_RAM)
    with GuestMemory.create(SMALL_RAM, device_pages=0) as memory:
        memory.view[:] = noise
        layout = VringLayout.legacy(num, 0, align=16)
        queue = Virtqueue(memory, layout, name="vda: queue 0", position=memoryview(bytearray(4)).cast("H"))
        queue.indirect = indirect
        # The guest may have whatever it likes in there, but an index that is near makes chains be looked at.
        struct.pack_into("<H", memory.view, layout.avail + 2, min(num, noise[0]))
        for _ in range(2 * num):
            try:
                chain = queue.pop()
            except RingError:
                continue
            if chain is None:
                break
            queue.push(chain[0], 0)


@given(st.sampled_from([1 << power for power in range(16)]), st.integers(0, 1 << 20), st.sampled_from([4, 16, 4096]))
def test_the_parts_of_a_legacy_ring_never_overlap(num: int, page: int, align: int) -> None:
    layout = VringLayout.legacy(num, page * 4096, align)
    assert layout.avail == layout.desc + 16 * num
    assert layout.used >= layout.avail + 2 * (3 + num)
    assert layout.used % align == 0
    assert layout.used + 6 + 8 * num == layout.desc + VringLayout.legacy_bytes(num, align)
