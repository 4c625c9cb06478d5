"""What a ring has in flight: recorded as it happens, as vhost-user lays it out, and taken up by a successor."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from killing import killed_before_instruction

from lgmp.testing import Driver, Used
from lgmp.virtio.inflight import LAST_BATCH_HEAD_U16, USED_IDX_U16, InflightRegion, inflight_bytes
from lgmp.virtio.ring import RingError, Virtqueue

NUM = 8
# The region byte by byte, as vhost-user has it for split rings: the header, and the state of one descriptor.
HEADER = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
STATE = struct.Struct("<B5xHQ")  # inflight, next, counter


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver(num=NUM)
    yield driver
    driver.close()


def offer(driver: Driver, count: int) -> list[int]:
    return [driver.queues[0].add([driver.buffer(1)]) for _ in range(count)]


def pop(queue: Virtqueue, count: int) -> list[int]:
    heads = []
    for _ in range(count):
        chain = queue.pop()
        assert chain is not None
        heads.append(chain[0])
    return heads


def successor(driver: Driver) -> Virtqueue:
    """Whoever serves the ring next, with nothing but memory and the record to go by."""
    (queue,) = driver.device_queues()
    return queue


# The region


def test_a_region_lies_as_vhost_user_has_it() -> None:
    memory = bytearray(inflight_bytes(NUM))
    region = InflightRegion(memoryview(memory), NUM)
    driver = Driver(num=NUM, start=0xFFFF)
    region.header[USED_IDX_U16] = 0xFFFF
    queue = Virtqueue(driver.memory, driver.layouts[0], name="vda: queue 0", inflight=region)
    queue.resume()
    heads = offer(driver, 3)
    pop(queue, 3)
    queue.push(heads[1], 0)
    assert len(memory) == HEADER.size + NUM * STATE.size
    assert HEADER.unpack_from(memory) == (0, 1, NUM, heads[1], 0)
    states = [STATE.unpack_from(memory, HEADER.size + number * STATE.size) for number in range(NUM)]
    assert [(inflight, counter) for inflight, _, counter in states] == [(1, 1), (0, 2), (1, 3)] + [(0, 0)] * (NUM - 3)
    driver.close()


def test_regions_of_a_control_page_are_apart() -> None:
    driver = Driver(queues=3, num=NUM)
    for number, region in enumerate(driver.control.inflight):
        region.header[USED_IDX_U16] = 100 + number
        for head in range(NUM):
            region.inflight[head] = 1
            region.counter[head] = number << 32 | head
            region.next[head] = number << 8 | head
    for number, region in enumerate(driver.control.inflight):
        assert region.used_idx == 100 + number
        assert list(region.inflight) == [1] * NUM
        assert list(region.counter) == [number << 32 | head for head in range(NUM)]
        assert list(region.next) == [number << 8 | head for head in range(NUM)]
    driver.close()


def test_a_region_of_another_ring_or_version_is_refused() -> None:
    memory = bytearray(inflight_bytes(NUM))
    InflightRegion(memoryview(memory), NUM)
    with pytest.raises(ValueError, match="for 8 descriptors, not of version 1 for 4"):
        InflightRegion(memoryview(memory), 4)
    struct.pack_into("<H", memory, 8, 2)
    with pytest.raises(ValueError, match="of version 2"):
        InflightRegion(memoryview(memory), NUM)
    with pytest.raises(ValueError, match="are no in-flight region of a ring of 8"):
        InflightRegion(memoryview(memory)[:-1], NUM)


def test_the_page_tells_people_what_is_in_flight(driver: Driver) -> None:
    queue = successor(driver)
    heads = offer(driver, 3)
    pop(queue, 3)
    queue.push(heads[2], 0)
    assert driver.control.position(0) == (3, 1)
    assert driver.control.inflight[0].heads() == heads[:2]
    assert driver.control.inflight[0].taken() == 3


# A successor


def test_what_was_taken_and_not_given_back_is_taken_again_before_anything_new(driver: Driver) -> None:
    first = offer(driver, 3)
    pop(successor(driver), 3)
    new = offer(driver, 2)
    queue = successor(driver)
    assert pop(queue, 5) == first + new
    assert queue.pop() is None


def test_the_order_is_that_in_which_they_were_first_taken_whatever_was_given_back_between(driver: Driver) -> None:
    queue = successor(driver)
    heads = offer(driver, NUM)
    pop(queue, NUM)
    for head in (heads[6], heads[1], heads[0]):
        queue.push(head, 0)
    driver.queues[0].collect()
    driver.queues[0].free.reverse()
    again = offer(driver, 2)  # later, though their descriptors have low numbers
    pop(queue, 2)
    outstanding = [heads[number] for number in (2, 3, 4, 5, 7)] + again
    assert pop(successor(driver), 7) == outstanding
    assert pop(successor(driver), 7) == outstanding  # nor does it matter how often it happens


def test_a_chain_is_the_same_when_it_is_taken_again(driver: Driver) -> None:
    buffers = [driver.buffer(b"head"), driver.buffer(512, writable=True), driver.buffer(1, writable=True)]
    for table in (None, 0x20000):
        driver.queues[0].add(buffers, table)
        taken = successor(driver).pop()
        assert taken is not None
        queue = successor(driver)
        assert queue.pop() == taken
        queue.push(taken[0], 7)
        assert driver.queues[0].collect() == [Used(taken[0], 7)]


def test_what_is_given_back_by_a_successor_is_in_flight_no_more(driver: Driver) -> None:
    heads = offer(driver, 3)
    pop(successor(driver), 3)
    queue = successor(driver)
    pop(queue, 2)
    queue.push(heads[1], 1)
    assert pop(successor(driver), 2) == [heads[0], heads[2]]
    assert driver.queues[0].collect() == [Used(heads[1], 1)]


def test_a_successor_goes_on_over_the_wrap_of_the_indexes() -> None:
    driver = Driver(num=NUM, start=0xFFFE)
    queue = successor(driver)
    for _ in range(5):
        heads = offer(driver, 3)
        pop(queue, 3)
        queue = successor(driver)
        assert pop(queue, 3) == heads
        for head in reversed(heads):
            queue.push(head, 0)
        assert [used.head for used in driver.queues[0].collect()] == heads[::-1]
    assert driver.control.position(0) == (13, 13)
    driver.close()


def test_a_broken_chain_is_as_broken_for_a_successor(driver: Driver) -> None:
    driver.queues[0].set_descriptor(0, driver.memory.limit, 1, 0, 0)
    driver.queues[0].offer(0)
    for _ in range(2):
        with pytest.raises(RingError, match="descriptor 0: Invalid address"):
            successor(driver).pop()


# Killed between two stores of a push, or a pop


@pytest.mark.parametrize("marked", [True, False], ids=["still marked", "no longer marked"])
def test_a_death_between_the_used_index_and_the_end_of_its_record_is_healed(driver: Driver, marked: bool) -> None:
    queue = successor(driver)
    heads = offer(driver, 3)
    pop(queue, 3)
    queue.push(heads[0], 0)
    queue.push(heads[2], 5)
    # Back to where the used index had been stored, and what follows it had not.
    region = driver.control.inflight[0]
    region.inflight[heads[2]] = marked
    region.header[USED_IDX_U16] = 1
    queue = successor(driver)
    assert driver.control.position(0) == (3, 2)
    assert pop(queue, 1) == [heads[1]]
    assert queue.pop() is None
    queue.push(heads[1], 6)
    assert driver.queues[0].collect() == [Used(heads[0], 0), Used(heads[2], 5), Used(heads[1], 6)]


def test_a_death_before_the_used_index_has_the_chain_taken_again(driver: Driver) -> None:
    queue = successor(driver)
    heads = offer(driver, 2)
    pop(queue, 2)
    # A push that came as far as its used element and the head in the record.
    struct.pack_into("<II", driver.memory.view, driver.layouts[0].used + 4, heads[1], 9)
    driver.control.inflight[0].header[LAST_BATCH_HEAD_U16] = heads[1]
    queue = successor(driver)
    assert pop(queue, 2) == heads
    queue.push(heads[0], 1)
    queue.push(heads[1], 2)
    assert driver.queues[0].collect() == [Used(heads[0], 1), Used(heads[1], 2)]


def test_a_death_between_a_chains_number_and_its_mark_has_it_taken_as_if_anew(driver: Driver) -> None:
    heads = offer(driver, 2)
    pop(successor(driver), 1)
    driver.control.inflight[0].counter[heads[1]] = 2
    queue = successor(driver)
    assert pop(queue, 2) == heads
    assert driver.control.inflight[0].heads() == heads


def test_a_used_index_that_the_driver_moved_is_refused_by_a_successor(driver: Driver) -> None:
    offer(driver, 1)
    pop(successor(driver), 1)
    struct.pack_into("<H", driver.memory.view, driver.layouts[0].used + 2, 3)
    with pytest.raises(RingError, match="vda: queue 0: the index of used was moved from 0 to 3 by the driver"):
        successor(driver)


def test_a_successor_goes_on_behind_what_was_answered_without_a_record(driver: Driver) -> None:
    heads = offer(driver, 3)
    struct.pack_into("<H", driver.memory.view, driver.layouts[0].used + 2, 2)
    assert pop(successor(driver), 1) == heads[2:]


# Killed before any instruction


@pytest.mark.parametrize("which", [1, 2])
def test_whichever_instruction_a_push_is_killed_at_its_chain_is_used_once(which: int) -> None:
    def give_back(queue: Virtqueue, head: int) -> Callable[[], None]:
        return lambda: queue.push(head, 3)

    outcomes = set()
    for instruction in count():
        driver = Driver(num=NUM, start=0xFFFF)
        queue = successor(driver)
        heads = offer(driver, 3)
        pop(queue, 3)
        queue.push(heads[0], 3)
        died = killed_before_instruction(give_back(queue, heads[which]), instruction)
        published = driver.queues[0].used_index() == 1
        outcomes.add(published)
        queue = successor(driver)
        left = [head for head in heads[1:] if not published or head != heads[which]]
        assert pop(queue, len(left)) == left
        assert queue.pop() is None
        for head in left:
            queue.push(head, 3)
        assert {used.head for used in driver.queues[0].collect()} == set(heads)
        driver.close()
        if not died:
            break
    assert outcomes == {False, True}


@pytest.mark.parametrize("in_flight", [0, 2])
def test_whichever_instruction_a_pop_is_killed_at_its_chain_is_taken_next(in_flight: int) -> None:
    outcomes = set()
    for instruction in count():
        driver = Driver(num=NUM)
        queue = successor(driver)
        heads = offer(driver, in_flight + 2)
        pop(queue, in_flight)
        died = killed_before_instruction(queue.pop, instruction)
        outcomes.add(driver.control.position(0))
        queue = successor(driver)
        assert pop(queue, len(heads)) == heads
        assert queue.pop() is None
        driver.close()
        if not died:
            break
    assert outcomes == {(in_flight, 0), (in_flight + 1, 0)}


@pytest.mark.parametrize("half_pushed", [True, False])
def test_whichever_instruction_a_successor_is_killed_at_its_own_goes_on(half_pushed: bool) -> None:
    for instruction in count():
        driver = Driver(num=NUM)
        queue = successor(driver)
        heads = offer(driver, 4)
        pop(queue, 3)
        queue.push(heads[1], 0)
        if half_pushed:
            driver.control.inflight[0].inflight[heads[1]] = 1
            driver.control.inflight[0].header[USED_IDX_U16] = 0
        died = killed_before_instruction(lambda: successor(driver), instruction)  # noqa: B023  it is called at once
        queue = successor(driver)
        assert pop(queue, 3) == [heads[0], heads[2], heads[3]]
        assert queue.pop() is None
        driver.close()
        if not died:
            break


# What is refused, and what a reset leaves


def test_a_head_that_is_in_flight_may_not_be_offered_again(driver: Driver) -> None:
    queue = successor(driver)
    (head,) = offer(driver, 1)
    pop(queue, 1)
    driver.queues[0].offer(head)
    for reader in (queue, queue):
        with pytest.raises(RingError, match=f"^vda: queue 0: descriptor {head} is made available again while it is in"):
            reader.pop()


def test_nor_may_it_be_when_a_successor_has_it(driver: Driver) -> None:
    (head,) = offer(driver, 1)
    pop(successor(driver), 1)
    driver.queues[0].offer(head)
    queue = successor(driver)
    assert pop(queue, 1) == [head]
    with pytest.raises(RingError, match="is made available again while it is in flight"):
        queue.pop()


def test_a_head_that_was_given_back_may_be_offered_again(driver: Driver) -> None:
    queue = successor(driver)
    for _ in range(3 * NUM):
        (head,) = offer(driver, 1)
        driver.queues[0].free.clear()
        assert pop(queue, 1) == [head]
        queue.push(head, 0)
        driver.queues[0].collect()
    assert driver.control.inflight[0].taken() == 3 * NUM


def test_after_a_reset_nothing_is_in_flight_and_requests_are_numbered_on(driver: Driver) -> None:
    queue = successor(driver)
    offer(driver, 5)
    pop(queue, 5)
    queue.reset()
    driver.reset()
    assert driver.control.position(0) == (0, 0)
    assert driver.control.inflight[0].heads() == []
    assert queue.pop() is None
    heads = offer(driver, 2)
    assert pop(queue, 2) == heads
    assert driver.control.inflight[0].taken() == 7
    assert pop(successor(driver), 2) == heads


def test_requests_are_numbered_on_by_a_successor(driver: Driver) -> None:
    heads = offer(driver, 2)
    pop(successor(driver), 2)
    queue = successor(driver)
    pop(queue, 2)
    assert driver.control.inflight[0].taken() == 2  # they are the same requests
    queue.push(heads[0], 0)
    offer(driver, 1)
    pop(queue, 1)
    assert driver.control.inflight[0].taken() == 3
