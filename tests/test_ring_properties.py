"""A driver model against the device side of a ring: what is offered is what is taken, and nothing else ever is."""

from __future__ import annotations

import ctypes
import struct
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed_before_store

from lgmp.memory import GuestMemory
from lgmp.testing import Chain, Driver, Shape, Used
from lgmp.testing import chains as kit
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import MAX_INDIRECT, RingError, Virtqueue, VringLayout

# Small enough for hypothesis to fill it with nonsense: descriptors, rings and room for buffers and tables.
SMALL_RAM = 4096

# What the driver offers: the parts of a request, through an indirect table or not, and how often.
chains = st.tuples(kit.parts(most=3), st.sampled_from([kit.direct, kit.indirect]), st.integers(1, 4))
# Where a device dies: before this store to memory, or behind its last one. A pop has 2, a push 6, a recovery 2.
stores = st.integers(0, 7)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), chains),
        st.tuples(st.just("pop"), st.integers(1, 4)),
        st.tuples(st.just("push"), st.integers(0, 1 << 16)),
        st.tuples(st.just("collect"), st.none()),
        st.tuples(st.just("die in pop"), stores),
        st.tuples(st.just("die in push"), st.tuples(st.integers(0, 1 << 16), stores)),
        st.tuples(st.just("die in resume"), stores),
    ),
    # Hypothesis makes most lists about twice as long as they must be.
    min_size=10,
    max_size=60,
)


class Model:
    """A driver, a device that dies now and then, and what has to hold: each chain is used once, and in order."""

    def __init__(self, num: int, start: int) -> None:
        self.driver = Driver(num=num, start=start)
        self.ring = self.driver.queues[0]
        (self.queue,) = self.driver.device_queues()
        # In the order in which they were offered: those that are not given back; how many the device has taken of them.
        self.outstanding: list[Chain] = []
        self.taken: list[Chain] = []
        self.given_back: list[Used] = []
        self.number = 0

    def offer(self, what: tuple[list[bytes | int], Shape, int]) -> None:
        parts, shape, count = what
        for _ in range(count):
            if (len(parts) if shape is kit.direct else 1) <= len(self.ring.free):
                self.outstanding.append(shape(self.driver, *parts))

    def pop(self, count: int = 1) -> None:
        for _ in range(count):
            self.pop_one()

    def pop_one(self) -> None:
        popped = self.queue.pop()
        left = [chain for chain in self.outstanding if chain not in self.taken]
        if not left:
            assert popped is None
            return
        assert popped is not None
        chain = left[0]
        head, readable, writable = popped
        assert head == chain.head
        assert list(map(len, readable)) == [buffer.size for buffer in chain.buffers if not buffer.writable]
        assert list(map(len, writable)) == [buffer.size for buffer in chain.buffers if buffer.writable]
        self.number += 1
        for segment, buffer in zip(readable + writable, chain.buffers, strict=True):
            segment[:] = bytes([self.number & 0xFF]) * len(segment)
            assert self.driver.content(buffer) == bytes(segment)
        self.taken.append(chain)

    def to_push(self, number: int) -> Chain:
        """One of the chains that the device has taken; there is one."""
        if not self.outstanding:
            if not self.ring.free:
                self.collect()
            self.offer(([b"one"], kit.direct, 1))
        if not self.taken:
            self.pop()
        return self.taken[number % len(self.taken)]

    def push(self, number: int) -> None:
        chain = self.to_push(number)
        self.queue.push(chain.head, number)
        self.pushed(chain, number)

    def pushed(self, chain: Chain, number: int) -> None:
        self.taken.remove(chain)
        self.outstanding.remove(chain)
        self.given_back.append(Used(chain.head, number))

    def collect(self, _: None = None) -> None:
        assert self.ring.collect() == self.given_back
        self.given_back = []

    def die_in_pop(self, store: int) -> None:
        killed_before_store(self.queue.pop, store)
        self.replace()

    def die_in_push(self, what: tuple[int, int]) -> None:
        number, store = what
        chain = self.to_push(number)
        before = self.ring.used_index()
        killed_before_store(lambda: self.queue.push(chain.head, number), store)
        if self.ring.used_index() != before:
            self.pushed(chain, number)
        self.replace()

    def die_in_resume(self, store: int) -> None:
        killed_before_store(self.driver.device_queues, store)
        self.replace()

    def replace(self) -> None:
        (self.queue,) = self.driver.device_queues()
        self.taken = []

    def finish(self) -> None:
        """A last device answers what is left."""
        self.replace()
        self.pop(len(self.outstanding) + 1)
        while self.taken:
            self.push(0)
        self.collect()
        assert self.ring.outstanding == []
        assert self.driver.control.inflight[0].heads() == []


@settings(max_examples=400, deadline=None)
@given(steps, st.sampled_from([1, 2, 4, 8, 16]), st.integers(65500, 65535) | st.just(0))
def test_what_the_driver_offers_is_what_the_device_takes_whenever_it_dies(
    script: list[tuple[str, object]], num: int, start: int
) -> None:
    """Any order of offering, taking, giving back, collecting and dying, over the wrap of both indexes."""
    model = Model(num, start)
    for what, argument in script:
        getattr(model, what.replace(" ", "_"))(argument)
    model.finish()
    model.driver.close()


def fresh_region(num: int) -> InflightRegion:
    return InflightRegion(memoryview(bytearray(inflight_bytes(num))), num)


def address_of(segment: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(segment))


descriptors = kit.descriptors(SMALL_RAM, num=8)


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
        queue = Virtqueue(memory, layout, name="vda: queue 0", inflight=fresh_region(8))
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
        queue = Virtqueue(memory, layout, name="vda: queue 0", inflight=fresh_region(num))
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
