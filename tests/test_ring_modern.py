"""Rings as modern front ends have them: begun and stopped anywhere, in batches, with event indexes, in several regions.

A ring is the device's side alone here; test_ring.py and test_ring_in_flight.py have what is older.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed_before_instruction

from lgmp.testing import Buffer, Driver, SharedMemory, SharedRegion, Used
from lgmp.vhost_user.messages import RegionDescription
from lgmp.vhost_user.regions import Regions
from lgmp.virtio.ids import VRING_AVAIL_F_NO_INTERRUPT
from lgmp.virtio.inflight import USED_IDX_U16, InflightRegion, inflight_bytes
from lgmp.virtio.ring import RingError, Virtqueue, VringLayout

NUM = 8
PAGE = 4096
FAR = 1 << 32


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver(num=NUM) as driver:
        yield driver


def fresh_region() -> InflightRegion:
    return InflightRegion(memoryview(bytearray(inflight_bytes(NUM))), NUM)


def ring(driver: Driver, region: InflightRegion | None = None, *, event_idx: bool = False) -> Virtqueue:
    return Virtqueue(
        driver.memory,
        driver.layouts[0],
        name="vda: queue 0",
        inflight=fresh_region() if region is None else region,
        event_idx=event_idx,
    )


def begun(driver: Driver, base: int, region: InflightRegion | None = None, *, event_idx: bool = False) -> Virtqueue:
    """A ring as a back end starts it: from `base`, with a region that may be somebody's."""
    queue = ring(driver, region, event_idx=event_idx)
    queue.begin(base)
    queue.resume()
    return queue


def offer(driver: Driver, count: int) -> list[int]:
    return [driver.queues[0].add([driver.buffer(1)]) for _ in range(count)]


def pop(queue: Virtqueue, most: int) -> list[int]:
    heads: list[int] = []
    while len(heads) < most and (chain := queue.pop()) is not None:
        heads.append(chain[0])
    return heads


def used_event(driver: Driver) -> memoryview:
    layout = driver.layouts[0]
    at = layout.avail + 4 + 2 * layout.num
    return driver.memory.view[at : at + 2].cast("H")


def avail_event(driver: Driver) -> memoryview:
    layout = driver.layouts[0]
    at = layout.used + 4 + 8 * layout.num
    return driver.memory.view[at : at + 2].cast("H")


def used_flags(driver: Driver) -> int:
    return driver.memory.view[driver.layouts[0].used]


# Begun


@pytest.mark.parametrize("start", [0, 5, 0x7FFF, 0xFFFE])
def test_a_ring_is_begun_where_its_indexes_are(start: int) -> None:
    with Driver(num=NUM, start=start) as driver:
        heads = offer(driver, 4)
        queue = begun(driver, start)
        assert pop(queue, 9) == heads
        queue.push(heads[0], 3)
        assert driver.queues[0].collect() == [Used(heads[0], 3)]


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_requests_before_the_base_are_left_alone_and_so_they_are_by_a_successor(start: int) -> None:
    with Driver(num=NUM, start=start) as driver:
        heads = offer(driver, 5)
        region = fresh_region()
        queue = begun(driver, start + 2 & 0xFFFF, region)
        assert queue.lag == 2
        assert pop(queue, 2) == heads[2:4]
        queue.push(heads[2], 0)
        successor = ring(driver, region)
        successor.lag = 2
        successor.resume()
        assert pop(successor, 9) == heads[3:]


def test_a_base_far_from_the_ring_is_a_broken_rule(driver: Driver) -> None:
    offer(driver, 1)
    for base in (NUM, 0x8000, 2, 0xFFFF - NUM):
        with pytest.raises(RingError, match="Guest moved used index from"):
            begun(driver, base).pop()


def test_what_somebody_left_in_flight_counts_more_than_the_base(driver: Driver) -> None:
    region = fresh_region()
    heads = offer(driver, 4)
    queue = begun(driver, 0, region)
    pop(queue, 3)
    queue.push(heads[1], 0)
    queue = begun(driver, 1, region)
    assert pop(queue, 9) == [heads[0], heads[2], heads[3]]


def test_a_region_of_an_earlier_use_of_the_ring_says_nothing_of_this_one(driver: Driver) -> None:
    region = fresh_region()
    queue = begun(driver, 0, region)
    for _ in range(3):
        (head,) = offer(driver, 1)
        pop(queue, 1)
        queue.push(head, 0)
        driver.queues[0].collect()
    queue.stop()
    driver.reset()
    heads = offer(driver, 2)
    assert pop(begun(driver, 0, region), 9) == heads


# Stopped


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_what_was_taken_last_goes_back_when_a_ring_is_stopped(start: int) -> None:
    with Driver(num=NUM, start=start) as driver:
        queue = begun(driver, start)
        heads = offer(driver, 5)
        pop(queue, 4)
        queue.push(heads[0], 0)
        base = queue.stop()
        assert base == (start + 1) & 0xFFFF
        # Somebody else goes on, who knows nothing but the base.
        assert pop(begun(driver, base), 9) == heads[1:]


def test_a_ring_with_nothing_in_flight_is_stopped_where_it_is(driver: Driver) -> None:
    queue = begun(driver, 0)
    heads = offer(driver, 3)
    pop(queue, 2)
    queue.push(heads[0], 0)
    queue.push(heads[1], 0)
    assert queue.stop() == 2
    assert pop(begun(driver, 2), 9) == heads[2:]


def test_what_was_answered_out_of_order_is_still_told_of_by_the_region(driver: Driver) -> None:
    region = fresh_region()
    queue = begun(driver, 0, region)
    heads = offer(driver, 4)
    pop(queue, 3)
    queue.push(heads[1], 0)
    base = queue.stop()
    assert base == 3
    assert region.heads() == [heads[0], heads[2]]
    assert pop(begun(driver, base, region), 9) == [heads[0], heads[2], heads[3]]


def test_a_stopped_ring_may_be_stopped_again(driver: Driver) -> None:
    queue = begun(driver, 0)
    offer(driver, 2)
    pop(queue, 2)
    assert queue.stop() == queue.stop() == 0


@pytest.mark.parametrize("in_order", [True, False])
def test_whichever_instruction_a_stop_is_killed_at_nothing_is_lost(in_order: bool) -> None:
    for instruction in count():
        with Driver(num=NUM) as driver:
            region = fresh_region()
            queue = begun(driver, 0, region)
            heads = offer(driver, 5)
            pop(queue, 4)
            queue.push(heads[0 if in_order else 1], 0)
            died = killed_before_instruction(queue.stop, instruction)
            # Who was not told a base begins from the used ring.
            left = [head for head in heads if head != heads[0 if in_order else 1]]
            assert pop(begun(driver, 1, region), 9) == left
        if not died:
            break


class Model:
    """A ring, whoever serves it, and what is to become of each chain: it is used once."""

    def __init__(self, start: int, fifo: bool) -> None:
        self.driver = Driver(num=NUM, start=start)
        self.region = fresh_region()
        self.queue = begun(self.driver, start, self.region)
        self.fifo = fifo
        self.waiting: list[int] = []
        self.taken: list[int] = []
        self.used: list[int] = []

    def step(self, what: int, which: int) -> None:
        driver = self.driver
        if what == 0 and driver.queues[0].free:
            driver.forget()
            self.waiting += offer(driver, 1)
        elif what == 1:
            found = pop(self.queue, 1)
            assert found == self.waiting[:1]
            self.taken += found
            del self.waiting[:1]
        elif what == 2 and self.taken:
            head = self.taken.pop(0 if self.fifo else which % len(self.taken))
            self.queue.push(head, head)
            self.used.append(head)
        elif what == 3 and self.taken:
            heads = self.taken[: 1 + which % len(self.taken)]
            if not self.fifo:
                heads.reverse()
            self.taken = [head for head in self.taken if head not in heads]
            self.queue.push_all([(head, head) for head in heads])
            self.used += heads
        elif what == 4:
            base = self.queue.stop()
            if self.fifo:
                self.region = fresh_region()  # somebody who knows the base alone
            self.go_on(base)
        elif what == 5:
            self.go_on(driver.queues[0].used_index())  # it was killed, and the region is all there is
        elif what == 6:
            self.collect()

    def go_on(self, base: int) -> None:
        self.queue = begun(self.driver, base, self.region)
        self.waiting = self.taken + self.waiting
        self.taken = []

    def collect(self) -> None:
        assert self.driver.queues[0].collect() == [Used(head, head) for head in self.used]
        self.used = []

    def end(self) -> None:
        self.collect()
        assert pop(self.queue, NUM + 1) == self.waiting
        for head in self.taken + self.waiting:
            self.queue.push(head, head)
        self.used = self.taken + self.waiting
        self.collect()
        assert self.driver.queues[0].outstanding == []
        self.driver.close()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([0, 7, 0xFFF9, 0xFFFF]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6]), st.integers(0, NUM)), max_size=60),
)
def test_whoever_serves_the_ring_each_chain_is_used_once_and_in_order_taken(
    start: int, fifo: bool, steps: list[tuple[int, int]]
) -> None:
    model = Model(start, fifo)
    for what, which in steps:
        model.step(what, which)
    model.end()


# In batches


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1,), ()])
@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_a_batch_is_given_back_in_its_order(order: tuple[int, ...], start: int) -> None:
    with Driver(num=NUM, start=start) as driver:
        region = fresh_region()
        queue = begun(driver, start, region)
        heads = offer(driver, 4)
        pop(queue, 3)
        queue.push_all([(heads[number], 100 + number) for number in order])
        assert driver.queues[0].collect() == [Used(heads[number], 100 + number) for number in order]
        left = [heads[number] for number in range(3) if number not in order]
        assert region.heads() == left
        assert pop(begun(driver, driver.queues[0].used_index(), region), 9) == [*left, heads[3]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_whichever_instruction_a_batch_is_killed_at_all_of_it_is_used_once_or_none_is_yet(size: int) -> None:
    outcomes = set()
    for instruction in count():
        with Driver(num=NUM, start=0xFFFF) as driver:
            region = fresh_region()
            queue = begun(driver, 0xFFFF, region)
            heads = offer(driver, 6)
            pop(queue, 5)
            queue.push(heads[3], 0)
            batch = [heads[number] for number in (4, 1, 0, 2)[:size]]
            died = killed_before_instruction(lambda: queue.push_all([(head, 3) for head in batch]), instruction)  # noqa: B023  at once
            published = driver.queues[0].used_index()
            assert published in (0, size)
            outcomes.add(published)
            used = {heads[3], *(batch if published else ())}
            queue = begun(driver, published, region)
            left = [head for head in heads if head not in used]
            assert pop(queue, 9) == left
            queue.push_all([(head, 3) for head in left])
            assert sorted(one.head for one in driver.queues[0].collect()) == sorted(heads)
            assert region.heads() == []
        if not died:
            break
    assert outcomes == {0, size}


def test_whichever_instruction_a_successor_of_half_a_batch_is_killed_at_its_own_goes_on() -> None:
    for instruction in count():
        with Driver(num=NUM) as driver:
            region = fresh_region()
            queue = begun(driver, 0, region)
            heads = offer(driver, 5)
            pop(queue, 4)
            queue.push_all([(heads[0], 0), (heads[2], 0)])
            # Killed right after the index was published.
            region.inflight[heads[0]] = region.inflight[heads[2]] = 1
            region.header[USED_IDX_U16] = 0
            died = killed_before_instruction(lambda: begun(driver, 2, region), instruction)  # noqa: B023  at once
            assert pop(begun(driver, 2, region), 9) == [heads[1], heads[3], heads[4]]
        if not died:
            break


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, NUM), max_size=NUM),
    st.lists(st.integers(0, 0xFFFF), min_size=NUM, max_size=NUM),
    st.lists(st.sampled_from([0, 1, 2, 1 << 61, 1 << 63]), min_size=NUM, max_size=NUM),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
)
def test_any_region_is_taken_over_or_refused(
    marked: list[int], links: list[int], counters: list[int], last: int, used: int
) -> None:
    with Driver(num=NUM) as driver:
        region = fresh_region()
        for head in marked:
            region.inflight[head % NUM] = 1
        for head in range(NUM):
            region.next[head] = links[head]
            region.counter[head] = counters[head]
        region.header[6] = last
        region.header[USED_IDX_U16] = used
        try:
            queue = begun(driver, 0, region)
            for head in pop(queue, NUM + 1):
                queue.push(head, 0)
        except RingError as error:
            assert str(error).startswith("vda: queue 0: ")


# Kicks and calls


@pytest.mark.parametrize("event_idx", [False, True])
def test_kicks_are_asked_for_beyond_what_was_seen(driver: Driver, event_idx: bool) -> None:
    queue = begun(driver, 0, event_idx=event_idx)
    offer(driver, 2)
    assert queue.look()
    assert not queue.look()
    queue.disable_kicks()
    assert used_flags(driver) == (0 if event_idx else 1)
    pop(queue, 2)
    assert not queue.enable_kicks()
    assert used_flags(driver) == 0
    assert avail_event(driver)[0] == (2 if event_idx else 0)


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_came_while_kicks_were_off_is_seen_when_they_are_asked_for(driver: Driver, event_idx: bool) -> None:
    queue = begun(driver, 0, event_idx=event_idx)
    queue.look()
    queue.disable_kicks()
    offer(driver, 1)
    assert queue.enable_kicks()
    assert queue.look()
    assert not queue.enable_kicks()


def test_who_waits_for_a_driver_that_goes_on_finds_so(driver: Driver) -> None:
    queue = begun(driver, 0)
    queue.look()
    assert not queue.spin(10)

    offer(driver, 1)

    assert queue.spin(1)
    assert not queue.spin(0)
    queue.look()
    assert not queue.spin(10)


def test_a_driver_that_wants_no_calls_gets_none_but_for_event_indexes_that_have_no_flags(driver: Driver) -> None:
    queue = begun(driver, 0)
    assert queue.needs_call()
    driver.queues[0].set_avail(VRING_AVAIL_F_NO_INTERRUPT, 0)
    assert not queue.needs_call()
    driver.queues[0].set_avail(0, 0)
    assert queue.needs_call()
    queue = begun(driver, 0, event_idx=True)
    driver.queues[0].set_avail(VRING_AVAIL_F_NO_INTERRUPT, 0)
    assert queue.needs_call()  # nobody knows what its predecessor has called for
    assert not queue.needs_call()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 0xFFFF) | st.sampled_from([0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]),
    st.integers(0, NUM),
    st.integers(-NUM - 2, NUM + 2) | st.integers(0, 0xFFFF),
)
def test_a_call_is_wanted_where_used_goes_beyond_the_event_index(start: int, pushed: int, distance: int) -> None:
    with Driver(num=NUM, start=start) as driver:
        queue = begun(driver, start, event_idx=True)
        queue.needs_call()
        event = (start + distance) & 0xFFFF
        used_event(driver)[0] = event
        heads = offer(driver, pushed)
        pop(queue, pushed)
        queue.push_all([(head, 0) for head in heads])
        # One after the other: has the element with that index been used since?
        wanted = any((start + number) & 0xFFFF == event for number in range(pushed))
        assert queue.needs_call() == wanted
        assert not queue.needs_call()  # for these it has been asked


def test_every_distance_of_an_event_index_around_every_wrap() -> None:
    for start in (0, 1, 0x7FFE, 0x8000, 0xFFF0, 0xFFFC, 0xFFFE, 0xFFFF):
        with Driver(num=NUM, start=start) as driver:
            queue = begun(driver, start, event_idx=True)
            queue.needs_call()
            at = start
            for distance in range(-12, 13):
                driver.forget()
                size = (distance % NUM) + 1
                used_event(driver)[0] = (at + distance) & 0xFFFF
                heads = offer(driver, size)
                pop(queue, size)
                for head in heads:
                    queue.push(head, 0)
                assert queue.needs_call() == (0 <= distance < size), (start, distance)
                at = (at + size) & 0xFFFF
                driver.queues[0].collect()


def test_event_indexes_need_room_of_their_own() -> None:
    memory = SharedMemory([SharedRegion(0, 3 * PAGE)], ring_bytes=PAGE)
    regions = _regions(memory)
    end = 3 * PAGE
    avail, used = end - 4 - 2 * NUM, end - 4 - 8 * NUM
    for layout in (VringLayout(NUM, 0x2000, avail, 0x2800), VringLayout(NUM, 0x2000, 0x2800, used)):
        Virtqueue(regions, layout, name="vda: queue 0", inflight=fresh_region())
        with pytest.raises(RingError, match="is not within guest memory"):
            Virtqueue(regions, layout, name="vda: queue 0", inflight=fresh_region(), event_idx=True)
    memory.close()


# In several regions


def _regions(memory: SharedMemory) -> Regions:
    table = [RegionDescription(one.start, one.size, one.user_address, one.offset) for one in memory.regions]
    return Regions().map_table(table, [memory.file_of(one) for one in memory.regions])


@pytest.fixture(params=[0, PAGE], ids=["as in its file", "elsewhere in its file"])
def spread(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """A guest whose memory is in three regions, of which the last two adjoin, in files of their own."""
    regions = [
        SharedRegion(0, 8 * PAGE, request.param),
        SharedRegion(FAR, PAGE, 9 * PAGE),
        SharedRegion(FAR + PAGE, PAGE, 0, 1),
    ]
    with Driver(num=NUM, memory=SharedMemory(regions, ring_bytes=4 * PAGE)) as driver:
        yield driver


def spread_ring(driver: Driver) -> Virtqueue:
    assert isinstance(driver.memory, SharedMemory)
    queue = Virtqueue(_regions(driver.memory), driver.layouts[0], name="vda: queue 0", inflight=fresh_region())
    queue.indirect = True
    queue.resume()
    return queue


def test_a_buffer_may_be_in_any_region_and_is_cut_where_one_ends(spread: Driver) -> None:
    view = spread.memory.view
    view[FAR + PAGE - 3 : FAR + PAGE + 3] = b"abcdef"
    spread.queues[0].add([Buffer(4, 2), Buffer(FAR + PAGE - 3, 6), Buffer(FAR + 2 * PAGE - 1, 1, True)])
    chain = spread_ring(spread).pop()
    assert chain is not None
    _head, readable, writable = chain
    assert [bytes(one) for one in readable] == [b"\0\0", b"abc", b"def"]
    writable[0][0] = 7
    assert view[FAR + 2 * PAGE - 1] == 7


def test_an_indirect_table_may_be_cut_as_well(spread: Driver) -> None:
    buffers = [Buffer(16 * number, 16) for number in range(5)]
    spread.queues[0].add(buffers, FAR + PAGE - 24)
    chain = spread_ring(spread).pop()
    assert chain is not None
    assert len(chain[1]) == 5


@pytest.mark.parametrize(
    ("address", "size"),
    [(8 * PAGE, 1), (8 * PAGE - 1, 2), (FAR - 1, 1), (FAR - 1, 2), (FAR + 2 * PAGE, 1), (FAR, 2 * PAGE + 1)],
)
def test_a_buffer_that_leaves_the_regions_is_a_broken_rule(spread: Driver, address: int, size: int) -> None:
    for table in (None, 2 * PAGE):
        spread.queues[0].add([Buffer(0, 16), Buffer(address, size, True), Buffer(64, 1, True)], table)
        with pytest.raises(RingError, match=f"Invalid address {address:#x}\\+{size} is outside guest memory"):
            spread_ring(spread).pop()
        spread.reset()


def test_nothing_is_written_between_the_regions(spread: Driver) -> None:
    assert isinstance(spread.memory, SharedMemory)
    spread.queues[0].add([Buffer(FAR, 2 * PAGE, True)])
    before = [os.pread(descriptor, 1 << 20, 0) for descriptor in spread.memory.files]
    queue = spread_ring(spread)
    chain = queue.pop()
    assert chain is not None
    for segment in chain[2]:
        segment[:] = b"\xff" * len(segment)
    queue.push(chain[0], 2 * PAGE)
    after = [bytearray(os.pread(descriptor, 1 << 20, 0)) for descriptor in spread.memory.files]
    assert after[0][9 * PAGE : 10 * PAGE] == after[1][:PAGE] == b"\xff" * PAGE
    after[0][9 * PAGE : 10 * PAGE] = after[1][:PAGE] = bytes(PAGE)
    used = spread.layouts[0].used + spread.memory.regions[0].offset
    assert struct.unpack_from("<HHII", after[0], used) == (0, 1, chain[0], 2 * PAGE)
    after[0][used : used + 12] = before[0][used : used + 12]
    assert after == before
