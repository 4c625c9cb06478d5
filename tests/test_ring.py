"""The device's side of a ring: what it takes, what it gives back, and what it refuses, rule by rule."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from lgmp.memory import GuestMemory
from lgmp.testing import RAM_BYTES, Buffer, Driver, Used
from lgmp.virtio.ids import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import MAX_INDIRECT, RingError, Virtqueue, VringLayout

NEXT = VRING_DESC_F_NEXT
WRITE = VRING_DESC_F_WRITE
INDIRECT = VRING_DESC_F_INDIRECT
NUM = 8  # few enough that a test can say every descriptor


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver(num=NUM)
    yield driver
    driver.close()


def limit_of(driver: Driver) -> int:
    return driver.memory.limit


# Where the parts lie


def test_a_legacy_ring_of_128_lies_as_in_the_seed_launcher() -> None:
    layout = VringLayout.legacy(128, 0x4001000)
    assert (layout.desc, layout.avail, layout.used) == (0x4001000, 0x4001800, 0x4002000)
    assert VringLayout.legacy_bytes(128) <= 2 * 4096


def test_a_legacy_ring_of_256_takes_three_pages() -> None:
    layout = VringLayout.legacy(256, 0)
    assert (layout.desc, layout.avail, layout.used) == (0, 0x1000, 0x2000)
    assert 2 * 4096 < VringLayout.legacy_bytes(256) <= 3 * 4096


def test_a_layout_survives_the_command_line() -> None:
    layout = VringLayout(64, 0x1000, 0x80000, 0x3000)
    assert VringLayout.parse(str(layout)) == layout
    assert VringLayout.parse("64:4096:524288:12288") == layout
    assert layout != VringLayout(64, 0x1000, 0x80000, 0x3004)


@pytest.mark.parametrize("text", ["", "8", "8:0:0", "8:0:0:0:0", "8:x:0:0"])
def test_a_layout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        VringLayout.parse(text)


@pytest.mark.parametrize(
    "layout",
    [
        VringLayout(0, 0, 4096, 8192),
        VringLayout(3, 0, 4096, 8192),
        VringLayout(65536, 0, 4096, 8192),
        VringLayout(8, 8, 4096, 8192),
        VringLayout(8, 0, 4097, 8192),
        VringLayout(8, 0, 4096, 8194),
        VringLayout(8, 1 << 40, 4096, 8192),
        VringLayout(8, 0, (1 << 64) - 4, 8192),
        VringLayout(8, 0, 4096, RAM_BYTES + 256 * 4096),
        VringLayout(8, 0, 4096, -4),
    ],
)
def test_a_ring_of_impossible_size_or_place_is_refused(driver: Driver, layout: VringLayout) -> None:
    with pytest.raises(RingError, match=r"^vda: queue 0: "):
        Virtqueue(driver.memory, layout, name="vda: queue 0", inflight=driver.control.inflight[0])


def test_a_ring_may_end_with_the_last_byte_of_guest_memory(driver: Driver) -> None:
    used = limit_of(driver) - 4 - 8 * NUM
    queue = Virtqueue(
        driver.memory, VringLayout(NUM, 0, 4096, used), name="vda: queue 0", inflight=driver.control.inflight[0]
    )
    queue.push(NUM - 1, 7)
    assert struct.unpack_from("<HHII", driver.memory.view, used) == (0, 1, NUM - 1, 7)


def test_the_parts_of_a_ring_may_lie_apart_and_in_any_order(driver: Driver) -> None:
    layout = VringLayout(NUM, 0x9000, 0x3002, 0x5004)
    queue = Virtqueue(driver.memory, layout, name="vda: queue 0", inflight=driver.control.inflight[0])
    struct.pack_into("<QIHH", driver.memory.view, 0x9000 + 16 * 5, 0x100, 3, 0, 0)
    struct.pack_into("<HHH", driver.memory.view, 0x3002, 0, 1, 5)
    assert queue.pop() == (5, [driver.memory.view[0x100:0x103]], [])
    queue.push(5, 9)
    assert struct.unpack_from("<HHII", driver.memory.view, 0x5004) == (0, 1, 5, 9)


# What is taken


def test_an_empty_ring_gives_nothing(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    assert queue.pop() is None
    assert queue.pop() is None


def test_segments_are_the_guests_own_memory(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    out, into = driver.buffer(b"hello"), driver.buffer(6, writable=True)
    head = driver.queues[0].add([out, into])
    chain = queue.pop()
    assert chain is not None
    assert chain[0] == head
    assert [bytes(segment) for segment in chain[1]] == [b"hello"]
    chain[2][0][:] = b"answer"
    assert driver.content(into) == b"answer"


@pytest.mark.parametrize("directions", ["r", "w", "rw", "rr", "ww", "rww", "rrw", "rrr", "www", "rrrrwwww"])
@pytest.mark.parametrize("table", [None, 0x20000])
def test_chains_of_every_shape_are_taken(driver: Driver, directions: str, table: int | None) -> None:
    (queue,) = driver.device_queues()
    buffers = [driver.buffer(number + 1, letter == "w") for number, letter in enumerate(directions)]
    head = driver.queues[0].add(buffers, table)
    chain = queue.pop()
    assert chain is not None
    assert chain[0] == head
    assert [len(segment) for segment in chain[1]] == [b.size for b in buffers if not b.writable]
    assert [len(segment) for segment in chain[2]] == [b.size for b in buffers if b.writable]
    assert queue.pop() is None


def test_a_chain_need_not_lie_side_by_side(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    ring = driver.queues[0]
    ring.set_descriptor(6, 0x1000, 16, NEXT, 2)
    ring.set_descriptor(2, 0x2000, 512, NEXT | WRITE, 7)
    ring.set_descriptor(7, 0x3000, 1, WRITE, 0)
    ring.offer(6)
    view = driver.memory.view
    assert queue.pop() == (6, [view[0x1000:0x1010]], [view[0x2000:0x2200], view[0x3000:0x3001]])


def test_what_follows_the_last_descriptor_of_a_chain_is_not_looked_at(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    ring = driver.queues[0]
    ring.set_descriptor(NUM - 1, 0x1000, 16, 0, 0xFFFF)
    ring.offer(NUM - 1)
    chain = queue.pop()
    assert chain is not None
    assert chain[0] == NUM - 1


def test_empty_segments_are_allowed(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    driver.queues[0].add([Buffer(0, 0), Buffer(0x1000, 0, True), Buffer(0x1000, 1, True)])
    chain = queue.pop()
    assert chain is not None
    assert [len(segment) for segment in chain[1] + chain[2]] == [0, 0, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_byte_of_guest_memory_is_within_it(driver: Driver, count: int) -> None:
    (queue,) = driver.device_queues()
    last = Buffer(limit_of(driver) - 1, 1)
    # The device pages are guest memory too; a chain of one and of three are taken in different ways.
    buffers = [last] if count == 1 else [last, last, Buffer(last.address, 1, True)]
    driver.queues[0].add(buffers)
    chain = queue.pop()
    assert chain is not None
    assert sum(map(len, chain[1])) == max(1, count - 1)


def test_a_full_ring_is_taken_in_order(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    heads = [driver.queues[0].add([driver.buffer(1)]) for _ in range(NUM)]
    taken = []
    while (chain := queue.pop()) is not None:
        taken.append(chain[0])
    assert taken == heads


def test_an_indirect_table_may_follow_direct_descriptors(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    ring = driver.queues[0]
    ring.set_descriptor(0, 0x1000, 16, NEXT, 5)
    ring.set_descriptor(5, 0x20000, 32, INDIRECT | WRITE, 0)  # WRITE means nothing here (virtio 1.0, section 2.4.5.3.2)
    struct.pack_into("<QIHHQIHH", driver.memory.view, 0x20000, 0x2000, 8, NEXT, 1, 0x3000, 4, WRITE, 0)
    ring.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert [[len(segment) for segment in part] for part in chain[1:]] == [[16, 8], [4]]


def test_the_longest_indirect_table_is_taken(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    driver.queues[0].add([Buffer(number, 1) for number in range(MAX_INDIRECT)], table=0x20000)
    chain = queue.pop()
    assert chain is not None
    assert len(chain[1]) == MAX_INDIRECT


def test_an_indirect_table_need_not_be_aligned(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    driver.queues[0].add([Buffer(0x1000, 5), Buffer(0x2000, 6), Buffer(0x3000, 7, True)], table=0x20003)
    chain = queue.pop()
    assert chain is not None
    assert [[len(segment) for segment in part] for part in chain[1:]] == [[5, 6], [7]]


def test_a_chain_that_leaves_the_row_is_followed(driver: Driver) -> None:
    """What lies behind the second descriptor looks as if it were the third, and is not."""
    (queue,) = driver.device_queues()
    ring = driver.queues[0]
    ring.set_descriptor(0, 0x1000, 16, NEXT, 1)
    ring.set_descriptor(1, 0x2000, 512, NEXT | WRITE, 6)
    ring.set_descriptor(2, 0x3000, 1, WRITE, 0)
    ring.set_descriptor(6, 0x4000, 1, WRITE, 0)
    ring.offer(0)
    view = driver.memory.view
    assert queue.pop() == (0, [view[0x1000:0x1010]], [view[0x2000:0x2200], view[0x4000:0x4001]])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_of_three_may_end_with_guest_memory_and_not_a_byte_later(driver: Driver, which: int) -> None:
    (queue,) = driver.device_queues()
    end = limit_of(driver)
    buffers = [Buffer(0, 16), Buffer(0, 16, True), Buffer(0, 16, True)]
    buffers[which] = Buffer(end - 16, 16, buffers[which].writable)
    driver.queues[0].add(buffers)
    assert queue.pop() is not None
    buffers[which] = Buffer(end - 15, 16, buffers[which].writable)
    driver.queues[0].add(buffers)
    with pytest.raises(RingError, match="Invalid address"):
        queue.pop()


# What is given back


def test_used_chains_come_back_with_their_length_in_the_order_of_their_end(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    first = driver.queues[0].add([driver.buffer(4, writable=True)])
    second = driver.queues[0].add([driver.buffer(4, writable=True)])
    queue.pop()
    queue.pop()
    queue.push(second, 4)
    queue.push(first, 0xFFFFFFFF)
    assert driver.queues[0].collect() == [Used(second, 4), Used(first, 0xFFFFFFFF)]


def test_notifications_are_never_suppressed(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    head = driver.queues[0].add([driver.buffer(1)])
    queue.pop()
    queue.push(head, 0)
    queue.pop()
    assert struct.unpack_from("<H", driver.memory.view, driver.layouts[0].used) == (0,)


def test_whether_interrupts_are_suppressed_is_the_drivers_word(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    assert not queue.interrupts_suppressed
    driver.queues[0].set_avail(1, 0)
    assert queue.interrupts_suppressed


def test_indexes_wrap_at_16_bits() -> None:
    driver = Driver(num=NUM, start=0xFFFD)
    (queue,) = driver.device_queues()
    for round_number in range(2 * NUM):
        head = driver.queues[0].add([driver.buffer(1)])
        chain = queue.pop()
        assert chain is not None
        queue.push(chain[0], round_number)
        assert driver.queues[0].collect() == [Used(head, round_number)]
    assert driver.control.position(0) == (2 * NUM - 3, 2 * NUM - 3)
    driver.close()


def test_a_successor_goes_on_where_the_worker_stopped(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    first = driver.queues[0].add([driver.buffer(1)])
    second = driver.queues[0].add([driver.buffer(2)])
    queue.pop()
    queue.push(first, 1)
    (successor,) = driver.device_queues()
    chain = successor.pop()
    assert chain is not None
    assert chain[0] == second
    successor.push(second, 2)
    assert driver.queues[0].collect() == [Used(first, 1), Used(second, 2)]


def test_the_position_is_advanced_as_things_happen(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    head = driver.queues[0].add([driver.buffer(1)])
    assert driver.control.position(0) == (0, 0)
    queue.pop()
    assert driver.control.position(0) == (1, 0)
    queue.push(head, 0)
    assert driver.control.position(0) == (1, 1)


def test_the_used_index_is_ours_and_not_read_back_from_the_guest(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    head = driver.queues[0].add([driver.buffer(1)])
    queue.pop()
    struct.pack_into("<H", driver.memory.view, driver.layouts[0].used + 2, 4711)
    queue.push(head, 0)
    assert driver.queues[0].used_index() == 1


def test_after_a_reset_the_ring_begins_anew(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    driver.queues[0].add([driver.buffer(1)])
    queue.pop()
    queue.reset()
    driver.reset()
    assert queue.pop() is None
    head = driver.queues[0].add([driver.buffer(2)])
    chain = queue.pop()
    assert chain is not None
    assert (chain[0], len(chain[1][0])) == (head, 2)
    assert not queue.indirect


# What is refused

END = RAM_BYTES + 256 * 4096  # where guest memory of the tests' driver ends


def chain_of(*descriptors: tuple[int, int, int, int, int], head: int = 0) -> Callable[[Driver], None]:
    def set_up(driver: Driver) -> None:
        for descriptor in descriptors:
            driver.queues[0].set_descriptor(*descriptor)
        driver.queues[0].offer(head)

    return set_up


def table_of(*entries: tuple[int, int, int, int], size: int | None = None, flags: int = 0) -> Callable[[Driver], None]:
    """A chain of descriptor 3 alone, whose indirect table has these entries."""

    def set_up(driver: Driver) -> None:
        for number, entry in enumerate(entries):
            struct.pack_into("<QIHH", driver.memory.view, 0x20000 + 16 * number, *entry)
        length = 16 * len(entries) if size is None else size
        driver.queues[0].set_descriptor(3, 0x20000, length, INDIRECT | flags, 0)
        driver.queues[0].offer(3)

    return set_up


def avail_index(index: int) -> Callable[[Driver], None]:
    return lambda driver: driver.queues[0].set_avail(0, index)


CRIMES = {
    "avail index beyond the ring": (
        avail_index(NUM + 1),
        "Guest moved used index from 0 to 9 (that of avail), the ring has 8",
    ),
    "avail index backwards": (
        avail_index(0xFFFF),
        "Guest moved used index from 0 to 65535 (that of avail), the ring has 8",
    ),
    "head outside the ring": (chain_of(head=NUM), "Guest says index 8 is available, the ring has 8"),
    "head far outside the ring": (chain_of(head=0xFFFF), "Guest says index 65535 is available, the ring has 8"),
    "address outside": (
        chain_of((0, END, 1, 0, 0)),
        f"descriptor 0: Invalid address {END:#x}+1 is outside guest memory ({END:#x})",
    ),
    "one byte too many": (
        chain_of((0, END - 4095, 4096, 0, 0)),
        f"descriptor 0: Invalid address {END - 4095:#x}+4096 is outside guest memory ({END:#x})",
    ),
    "address and length that wrap at 32 bits": (
        chain_of((0, 0xFFFFF000, 0x2000, 0, 0)),
        f"descriptor 0: Invalid address 0xfffff000+8192 is outside guest memory ({END:#x})",
    ),
    "address and length that wrap at 64 bits": (
        chain_of((0, 0xFFFFFFFFFFFFF000, 0x2000, 0, 0)),
        f"descriptor 0: Invalid address 0xfffffffffffff000+8192 is outside guest memory ({END:#x})",
    ),
    "length of everything": (
        chain_of((0, 0, 0xFFFFFFFF, 0, 0)),
        f"descriptor 0: Invalid address 0x0+4294967295 is outside guest memory ({END:#x})",
    ),
    "an empty segment outside": (
        chain_of((0, END + 1, 0, 0, 0)),
        f"descriptor 0: Invalid address {END + 1:#x}+0 is outside guest memory ({END:#x})",
    ),
    "second of three outside": (
        chain_of((0, 0, 16, NEXT, 1), (1, END, 512, NEXT | WRITE, 2), (2, 64, 1, WRITE, 0)),
        f"descriptor 1: Invalid address {END:#x}+512 is outside guest memory ({END:#x})",
    ),
    "last of three outside": (
        chain_of((0, 0, 16, NEXT, 1), (1, 0, 512, NEXT, 2), (2, END, 1, WRITE, 0)),
        f"descriptor 2: Invalid address {END:#x}+1 is outside guest memory ({END:#x})",
    ),
    "next outside the ring": (
        chain_of((5, 0, 1, NEXT, NUM), head=5),
        "descriptor 5: Desc next is 8, the table has 8",
    ),
    "out after in": (
        chain_of((0, 0, 1, NEXT | WRITE, 1), (1, 0, 1, 0, 0)),
        "descriptor 1: Descriptor has out after in",
    ),
    "a descriptor that follows itself": (
        chain_of((4, 0, 1, NEXT, 4), head=4),
        "descriptor 4: Looped descriptor, the chain is longer than 8",
    ),
    "a loop of three": (
        chain_of((0, 0, 1, NEXT, 1), (1, 0, 1, NEXT | WRITE, 2), (2, 0, 1, NEXT | WRITE, 1)),
        "Looped descriptor, the chain is longer than 8",
    ),
    "a table outside": (
        chain_of((2, END - 16, 32, INDIRECT, 0), head=2),
        f"descriptor 2: Invalid address {END - 16:#x}+32 is outside guest memory ({END:#x})",
    ),
    "an empty table": (
        table_of(size=0),
        "descriptor 3: Invalid size for indirect buffer table, 0 is not a multiple of 16",
    ),
    "a table and a half": (
        table_of((0, 1, 0, 0), size=24),
        "descriptor 3: Invalid size for indirect buffer table, 24 is not a multiple of 16",
    ),
    "a table too long": (
        table_of((0, 1, 0, 0), size=16 * (MAX_INDIRECT + 1)),
        "descriptor 3: an indirect table of 1025 descriptors, at most 1024 may be",
    ),
    "a table in a table": (
        table_of((0, 1, NEXT, 1), (0x20000, 32, INDIRECT, 0)),
        "descriptor 3: entry 1 of its indirect table: INDIRECT within an indirect table",
    ),
    "indirect and next": (
        table_of((0, 1, 0, 0), flags=NEXT),
        "descriptor 3: both INDIRECT and NEXT",
    ),
    "next outside the table": (
        table_of((0, 1, NEXT, 2), (0, 1, 0, 0)),
        "descriptor 3: entry 0 of its indirect table: Desc next is 2, the table has 2",
    ),
    "a loop in the table": (
        table_of((0, 1, NEXT, 1), (0, 1, NEXT, 0)),
        "descriptor 3: entry 0 of its indirect table: Looped descriptor, the chain is longer than 2",
    ),
    "an address outside in the table": (
        table_of((0, 1, NEXT, 1), (END, 1, 0, 0)),
        f"descriptor 3: entry 1 of its indirect table: Invalid address {END:#x}+1 is outside guest memory ({END:#x})",
    ),
    "out after in in the table": (
        table_of((0, 1, NEXT | WRITE, 1), (0, 1, 0, 0)),
        "descriptor 3: entry 1 of its indirect table: Descriptor has out after in",
    ),
}


@pytest.mark.parametrize("crime", CRIMES)
def test_a_broken_rule_is_named_with_its_descriptor(driver: Driver, crime: str) -> None:
    commit, sentence = CRIMES[crime]
    (queue,) = driver.device_queues()
    commit(driver)
    with pytest.raises(RingError) as caught:
        queue.pop()
    assert str(caught.value).startswith("vda: queue 0: ")
    assert str(caught.value).endswith(sentence)


def test_an_indirect_table_is_refused_unless_it_was_negotiated(driver: Driver) -> None:
    (queue,) = driver.device_queues(indirect=False)
    driver.queues[0].add([driver.buffer(1)], table=0x20000)
    with pytest.raises(RingError, match="descriptor 0: INDIRECT, but the driver has not accepted"):
        queue.pop()


def test_a_chain_as_long_as_the_ring_is_no_loop(driver: Driver) -> None:
    (queue,) = driver.device_queues()
    driver.queues[0].add([driver.buffer(1) for _ in range(NUM)])
    chain = queue.pop()
    assert chain is not None
    assert len(chain[1]) == NUM


def test_guest_memory_without_device_pages_is_as_good() -> None:
    memory = GuestMemory.create(1 << 20, device_pages=0)
    region = InflightRegion(memoryview(bytearray(inflight_bytes(2))), 2)
    queue = Virtqueue(memory, VringLayout(2, 0, 64, 128), name="x", inflight=region)
    assert queue.pop() is None
    assert queue.num == 2
    memory.close()
