"""The back end's side of a connection: what follows from each message, for the answer, the rings and the descriptors.

There is no socket here and no device: messages are handed over, and the rings that are running are looked at.
"""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.testing import Driver, SharedMemory, SharedRegion, Used
from lgmp.testing.front_end import table
from lgmp.vhost_user.backend import PROTOCOL_FEATURES, Backend
from lgmp.vhost_user.messages import (
    CONFIG,
    HEADER,
    HEADER_BYTES,
    INFLIGHT,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VRING_ADDR,
    VRING_STATE,
    Message,
    ProtocolError,
    Request,
)
from lgmp.vhost_user.regions import MAX_REGIONS
from lgmp.virtio.ids import VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import RingError, Virtqueue

NUM = 8
QUEUES = 2
PAGE = 4096
OFFERED = 1 << 32 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << 5
PROTOCOL = 1 << VHOST_USER_F_PROTOCOL_FEATURES
CONFIG_SPACE = bytes(range(1, 61))
NONE = 0x100


def state(index: int, number: int) -> bytes:
    return VRING_STATE.pack(index, number)


class Connection:
    """A back end, a front end's memory, and who runs the device: he touches the rings whenever he has to let go."""

    def __init__(self, start: int = 0) -> None:
        self.said: list[str] = []
        self.suspends = self.resets = 0
        self.backend = Backend(self, name="dev", features=OFFERED, config=CONFIG_SPACE, queues=QUEUES)
        self.memory = SharedMemory(
            [SharedRegion(0, 0x20000), SharedRegion(1 << 32, PAGE, 0x30000), SharedRegion(1 << 33, PAGE, 0, 1)],
            ring_bytes=0x10000,
        )
        self.driver = Driver(queues=QUEUES, num=NUM, start=start, memory=self.memory)
        self.kicks = [os.eventfd(0) for _ in range(QUEUES)]

    # As the backend's host

    def suspend(self) -> None:
        self.suspends += 1
        for ring in self.backend.running():
            assert ring.queue is not None
            ring.queue.look()  # it is all there still

    def reset(self) -> None:
        self.resets += 1
        self.suspend()

    def say(self, text: str) -> None:
        self.said.append(text)

    # As the front end

    def tell(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = (), flags: int = VERSION) -> bytes:
        """Hand a message over; gives the payload of the answer. The descriptors are sent, that is, doubled."""
        message = Message(request, flags, payload, [os.dup(descriptor) for descriptor in descriptors])
        answer = self.backend.handle(message)
        assert message.descriptors == []
        if answer is None:
            return b""
        data, descriptor = answer
        assert HEADER.unpack_from(data) == (request, VERSION | REPLY, len(data) - HEADER_BYTES)
        if descriptor is not None:
            os.close(descriptor)
        return data[HEADER_BYTES:]

    def refuses(self, says: str, request: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        before = belongings()
        with pytest.raises(ProtocolError, match=says):
            self.tell(request, payload, descriptors)
        assert belongings() == before

    def refuses_to_start(self, says: str, number: int = 0) -> None:
        """A kick that comes too early, or for no good ring. Its descriptor goes with the connection, which is next."""
        with pytest.raises(ProtocolError, match=says):
            self.kick(number)
        assert self.running() == []

    def share(self, *numbers: int) -> None:
        regions = [self.memory.regions[number] for number in numbers or range(len(self.memory.regions))]
        self.tell(Request.SET_MEM_TABLE, table(regions), [self.memory.file_of(region) for region in regions])

    def add(self, number: int) -> None:
        region = self.memory.regions[number]
        self.tell(Request.ADD_MEM_REG, bytes(8) + region.pack(), [self.memory.file_of(region)])

    def remove(self, number: int) -> None:
        self.tell(Request.REM_MEM_REG, bytes(8) + self.memory.regions[number].pack())

    def addresses(self, number: int) -> bytes:
        layout = self.driver.layouts[number]
        user = self.memory.user_address
        return VRING_ADDR.pack(number, 0, user(layout.desc), user(layout.used), user(layout.avail), 0)

    def describe(self, number: int = 0, base: int = 0) -> None:
        self.tell(Request.SET_VRING_NUM, state(number, NUM))
        self.tell(Request.SET_VRING_BASE, state(number, base))
        self.tell(Request.SET_VRING_ADDR, self.addresses(number))

    def kick(self, number: int = 0) -> None:
        self.tell(Request.SET_VRING_KICK, U64.pack(number), [self.kicks[number]])

    def start(self, number: int = 0, base: int = 0) -> Virtqueue:
        self.describe(number, base)
        self.kick(number)
        self.tell(Request.SET_VRING_ENABLE, state(number, 1))
        return self.queue(number)

    def begin(self, features: int = OFFERED | PROTOCOL) -> Virtqueue:
        self.tell(Request.SET_FEATURES, U64.pack(features))
        self.share()
        return self.start()

    def stop(self, number: int = 0) -> int:
        index, base = VRING_STATE.unpack(self.tell(Request.GET_VRING_BASE, state(number, 0)))
        assert index == number
        return int(base)

    def running(self) -> list[int]:
        return [ring.index for ring in self.backend.running()]

    def queue(self, number: int = 0) -> Virtqueue:
        """The ring as who runs the device takes it, after whatever message."""
        queue = self.backend.vrings[number].queue
        assert queue is not None
        queue.resume()
        return queue

    def offer(self, count: int = 1, number: int = 0) -> list[int]:
        return [self.driver.queues[number].add([self.driver.buffer(1)]) for _ in range(count)]

    def close(self) -> None:
        self.backend.close()
        self.driver.close()
        for descriptor in self.kicks:
            os.close(descriptor)
        # The front end's own mapping goes with the last view of it.
        del self.driver, self.memory


def pop(queue: Virtqueue, most: int = NUM) -> list[int]:
    heads: list[int] = []
    while len(heads) < most and (chain := queue.pop()) is not None:
        heads.append(chain[0])
    return heads


def belongings() -> tuple[int, int]:
    """Descriptors, and mappings of guest memory and records of requests."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:lgmp-")


@pytest.fixture
def connection() -> Iterator[Connection]:
    gc.collect()  # what tests before this one have left to be collected is not ours
    before = belongings()
    made = Connection()
    yield made
    made.close()
    assert belongings() == before


# Features and questions


def test_what_is_offered_is_what_the_device_has_and_protocol_features(connection: Connection) -> None:
    assert U64.unpack(connection.tell(Request.GET_FEATURES)) == (OFFERED | PROTOCOL,)
    assert U64.unpack(connection.tell(Request.GET_PROTOCOL_FEATURES)) == (PROTOCOL_FEATURES,)
    assert U64.unpack(connection.tell(Request.GET_QUEUE_NUM)) == (QUEUES,)
    assert U64.unpack(connection.tell(Request.GET_MAX_MEM_SLOTS)) == (MAX_REGIONS,)
    assert connection.tell(Request.SET_OWNER) == b""
    assert PROTOCOL_FEATURES == 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16


def test_what_is_not_offered_cannot_be_accepted(connection: Connection) -> None:
    connection.refuses("SET_FEATURES 0x40000040, and", Request.SET_FEATURES, U64.pack(PROTOCOL | 1 << 6))
    connection.refuses("SET_PROTOCOL_FEATURES 0x2, and", Request.SET_PROTOCOL_FEATURES, U64.pack(2))
    connection.tell(Request.SET_FEATURES, U64.pack(1 << 32))
    assert connection.backend.features == 1 << 32


@pytest.mark.parametrize(("offset", "size"), [(0, 60), (0, 0), (59, 1), (20, 8), (58, 10), (60, 4), (0, 256), (255, 1)])
def test_the_configuration_space_is_read_anywhere_and_zeros_follow_it(
    connection: Connection, offset: int, size: int
) -> None:
    answer = connection.tell(Request.GET_CONFIG, CONFIG.pack(offset, size, 1) + bytes(size))
    assert answer == CONFIG.pack(offset, size, 1) + CONFIG_SPACE.ljust(256, b"\0")[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "size", "payload"),
    [(0, 257, 257), (256, 1, 1), (0xFFFFFFFF, 1, 1), (0, 0xFFFFFFFF, 0), (0, 8, 7), (0, 8, 9), (8, 8, 0)],
)
def test_a_configuration_space_has_an_end(connection: Connection, offset: int, size: int, payload: int) -> None:
    connection.refuses("GET_CONFIG of", Request.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(payload))
    connection.refuses("GET_CONFIG with 11 bytes", Request.GET_CONFIG, bytes(11))


def test_an_acknowledgement_is_given_where_it_is_asked_for_and_was_agreed_upon(connection: Connection) -> None:
    asking = VERSION | NEED_REPLY
    assert connection.tell(Request.SET_OWNER, flags=asking) == b""
    connection.tell(Request.SET_PROTOCOL_FEATURES, U64.pack(1 << VHOST_USER_PROTOCOL_F_REPLY_ACK))
    assert connection.tell(Request.SET_OWNER) == b""
    assert connection.tell(Request.SET_OWNER, flags=asking) == U64.pack(0)
    # What has an answer of its own has no other.
    assert connection.tell(Request.GET_QUEUE_NUM, flags=asking) == U64.pack(QUEUES)


@pytest.mark.parametrize("request_", [6, 7, 19, 20, 21, 22, 23, 25, 35])
def test_what_may_be_declined_is_with_a_line_and_without_its_descriptors(connection: Connection, request_: int) -> None:
    connection.tell(Request.SET_PROTOCOL_FEATURES, U64.pack(1 << VHOST_USER_PROTOCOL_F_REPLY_ACK))
    before = belongings()
    answer = connection.tell(request_, bytes(16), connection.kicks, VERSION | NEED_REPLY)
    assert answer == U64.pack(1)
    assert connection.tell(request_, bytes(16)) == b""
    assert belongings() == before
    name = Request(request_).name
    assert connection.said == [f"dev: the front end asks for {name}, which was not offered; declined"] * 2


@pytest.mark.parametrize("request_", [0, 26, 27, 28, 29, 30, 33, 41, 1000, 0xFFFFFFFF])
def test_what_nobody_may_ask_is_refused(connection: Connection, request_: int) -> None:
    connection.refuses("which was not offered", request_, b"", connection.kicks)


def test_surplus_descriptors_are_closed(connection: Connection) -> None:
    before = belongings()
    for request in (Request.SET_OWNER, Request.GET_FEATURES, Request.GET_STATUS, Request.RESET_DEVICE):
        connection.tell(request, b"", connection.kicks * 4)
    connection.tell(Request.SET_VRING_NUM, state(0, NUM), connection.kicks)
    assert belongings() == before


# Rings: started, enabled, stopped


def test_a_ring_runs_from_its_kick_on_while_it_is_enabled(connection: Connection) -> None:
    connection.tell(Request.SET_FEATURES, U64.pack(OFFERED | PROTOCOL))
    connection.share()
    connection.describe()
    connection.tell(Request.SET_VRING_ENABLE, state(0, 1))
    assert connection.running() == []
    connection.kick()
    assert connection.running() == [0]
    connection.tell(Request.SET_VRING_ENABLE, state(0, 0))
    assert connection.running() == []
    connection.tell(Request.SET_VRING_ENABLE, state(0, 1))
    connection.start(1)
    assert connection.running() == [0, 1]
    connection.stop(0)
    assert connection.running() == [1]


def test_who_knows_no_protocol_features_need_not_enable(connection: Connection) -> None:
    connection.tell(Request.SET_FEATURES, U64.pack(OFFERED))
    connection.share()
    connection.describe()
    connection.kick()
    assert connection.running() == [0]


def test_a_ring_cannot_be_started_before_it_is_described(connection: Connection) -> None:
    connection.refuses_to_start("SET_VRING_KICK for ring 0 without SET_VRING_NUM before it")
    connection.tell(Request.SET_VRING_NUM, state(0, NUM))
    connection.refuses_to_start("SET_VRING_KICK for ring 0 without SET_VRING_ADDR before it")
    connection.tell(Request.SET_VRING_ADDR, connection.addresses(0))
    connection.refuses_to_start("ring 0 at 0x7f.*is not in the memory that is shared")
    connection.share()
    connection.kick()


@pytest.mark.parametrize("num", [0, 3, 12, 32769, 65536, 0xFFFFFFFF])
def test_a_ring_of_an_impossible_size_is_refused(connection: Connection, num: int) -> None:
    connection.refuses(f"SET_VRING_NUM: a ring of {num} descriptors", Request.SET_VRING_NUM, state(0, num))


def test_a_started_ring_keeps_its_size_and_base(connection: Connection) -> None:
    connection.begin()
    connection.refuses("SET_VRING_NUM for ring 0 while it is started", Request.SET_VRING_NUM, state(0, NUM))
    connection.refuses("SET_VRING_BASE for ring 0 while it is started", Request.SET_VRING_BASE, state(0, 0))
    connection.tell(Request.SET_VRING_NUM, state(1, NUM))


@pytest.mark.parametrize(
    ("request_", "payload", "says"),
    [
        (Request.SET_VRING_NUM, state(QUEUES, NUM), "for ring 2, there are 2"),
        (Request.SET_VRING_NUM, state(0xFFFFFFFF, NUM), "for ring 4294967295, there are 2"),
        (Request.SET_VRING_BASE, state(0, 0x10000), "SET_VRING_BASE 0x10000, an index has 16 bits"),
        (Request.GET_VRING_BASE, state(QUEUES, 0), "GET_VRING_BASE for ring 2"),
        (Request.SET_VRING_ENABLE, state(0, 2), "SET_VRING_ENABLE 2 for ring 0, it is 0 or 1"),
        (Request.SET_VRING_ENABLE, state(QUEUES, 1), "for ring 2"),
        (Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 1, 0, 0, 0, 0), "with flags 0x1: a log was not offered"),
        (Request.SET_VRING_ADDR, VRING_ADDR.pack(9, 0, 0, 0, 0, 0), "for ring 9"),
        (Request.SET_STATUS, U64.pack(256), "SET_STATUS 0x100, it is a byte"),
        (Request.SET_VRING_KICK, U64.pack(NONE), "is to be polled, having no descriptor for kicks"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    connection: Connection, request_: Request, payload: bytes, says: str
) -> None:
    connection.refuses(says, request_, payload)


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_a_ring_is_given_one_descriptor_or_told_that_there_is_none(connection: Connection, request_: Request) -> None:
    one = connection.kicks[:1]
    name = request_.name
    connection.refuses(f"{name} with 0 descriptors, it has 1", request_, U64.pack(0))
    connection.refuses(f"{name} with 2 descriptors, it has 1", request_, U64.pack(0), one * 2)
    connection.refuses(f"{name} with 1 descriptors, it has 0", request_, U64.pack(NONE), one)
    connection.refuses(f"{name} 0x200", request_, U64.pack(0x200), one)
    connection.refuses(f"{name} 0x8000000000000000", request_, U64.pack(1 << 63), one)
    connection.refuses(f"{name} for ring 255", request_, U64.pack(255), one)
    connection.refuses(f"{name} with 4 bytes", request_, bytes(4), one)


def test_descriptors_of_a_ring_are_replaced_and_closed(connection: Connection) -> None:
    connection.begin()
    before = belongings()[0]
    for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for count in (1, 1):
            connection.tell(request, U64.pack(0), connection.kicks[:1])
            assert belongings()[0] == before + count
        connection.tell(request, U64.pack(NONE))
        assert belongings()[0] == before
    connection.kick()
    assert belongings()[0] == before
    connection.stop()
    assert belongings()[0] == before - 1


def test_a_ring_may_be_nowhere_near_memory(connection: Connection) -> None:
    connection.share()
    user = connection.memory.user_address
    layout = connection.driver.layouts[0]
    good = [user(layout.desc), user(layout.used), user(layout.avail)]
    connection.tell(Request.SET_VRING_NUM, state(0, NUM))
    end = user(0x1FFFF) + 1
    for part in range(3):
        for address, says in (
            (0, "is not in the memory that is shared"),
            ((1 << 64) - 1, "is not in the memory that is shared"),
            (end, "is not in the memory that is shared"),
            (good[part] + 1, "not a multiple of"),
            (end - 16, "is not within guest memory"),
        ):
            addresses = list(good)
            addresses[part] = address
            connection.tell(Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, *addresses, 0))
            connection.refuses_to_start(says)


# Going on elsewhere


@pytest.mark.parametrize("start", [0, 0xFFFD])
def test_a_ring_goes_on_from_where_it_was_stopped(start: int) -> None:
    connection = Connection(start)
    connection.tell(Request.SET_FEATURES, U64.pack(OFFERED | PROTOCOL))
    connection.share()
    queue = connection.start(base=start)
    heads = connection.offer(6)
    assert pop(queue, 4) == heads[:4]
    queue.push(heads[0], 0)
    base = connection.stop()
    assert base == (start + 1) & 0xFFFF
    queue = connection.start(base=base)
    assert pop(queue) == heads[1:]
    for head in heads[1:]:
        queue.push(head, 0)
    assert connection.driver.queues[0].collect() == [Used(head, 0) for head in heads]
    connection.close()


def test_memory_may_change_under_a_ring_that_runs(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(4)
    assert pop(queue, 2) == heads[:2]
    queue.push(heads[0], 0)
    changes: list[tuple[Callable[..., None], tuple[int, ...]]] = [
        (connection.share, ()),
        (connection.remove, (2,)),
        (connection.add, (2,)),
    ]
    for change, which in changes:
        before = connection.suspends
        change(*which)
        assert connection.suspends > before
        queue = connection.queue()
        assert pop(queue, 9) == heads[1:]
    assert belongings()[1] > 0


def test_a_ring_without_memory_waits_for_it(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(4)
    pop(queue, 3)
    queue.push(heads[0], 0)
    connection.remove(0)
    assert connection.running() == []
    connection.share(1, 2)
    assert connection.running() == []
    connection.add(0)
    assert connection.running() == [0]
    assert pop(connection.queue()) == heads[1:]


def test_a_ring_that_is_stopped_without_memory_says_where_it_was(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(4)
    pop(queue, 3)
    queue.push(heads[0], 0)
    connection.remove(0)
    assert connection.stop() == 1
    connection.share()
    assert pop(connection.start(base=1)) == heads[1:]


def test_memory_that_was_removed_is_unmapped(connection: Connection) -> None:
    connection.begin()
    before = belongings()
    connection.remove(2)
    assert belongings()[1] == before[1] - 1
    connection.add(2)
    assert belongings() == before
    connection.refuses("overlap", Request.ADD_MEM_REG, bytes(8) + connection.memory.regions[2].pack(), [
        connection.memory.files[1]
    ])  # fmt: skip
    assert connection.running() == [0]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_regions_have_a_descriptor_each(connection: Connection, count: int) -> None:
    descriptors = (connection.memory.files * 2)[:count]
    says = f"SET_MEM_TABLE with {count} descriptors, it has 3"
    connection.refuses(says, Request.SET_MEM_TABLE, table(connection.memory.regions), descriptors)
    region = bytes(8) + connection.memory.regions[1].pack()
    if count != 1:
        connection.refuses("ADD_MEM_REG with", Request.ADD_MEM_REG, region, descriptors)


def test_what_cannot_be_shared_changes_nothing(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(2)
    pop(queue, 1)
    suspends = connection.suspends
    regions = connection.memory.regions
    overlapping = [regions[0], SharedRegion(PAGE, PAGE, 0, 1)]
    connection.refuses("overlap", Request.SET_MEM_TABLE, table(overlapping), connection.memory.files)
    assert connection.suspends == suspends
    assert pop(connection.queue()) == heads


def test_features_may_change_under_a_ring(connection: Connection) -> None:
    queue = connection.begin()
    assert queue.indirect
    connection.tell(Request.SET_FEATURES, U64.pack(1 << 32 | PROTOCOL))
    queue = connection.queue()
    assert not queue.indirect
    queue.look()
    queue.disable_kicks()
    assert connection.memory.view[connection.driver.layouts[0].used] == 1  # so no event indexes


def test_a_ring_may_move(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(3)
    pop(queue, 2)
    queue.push(heads[0], 0)
    # The guest's memory is elsewhere in the front end now, with all that is in it.
    moved = [region._replace(user=(5 << 40) + region.start) for region in connection.memory.regions]
    connection.tell(Request.SET_MEM_TABLE, table(moved), [connection.memory.file_of(region) for region in moved])
    assert connection.running() == []
    connection.memory.regions = moved
    connection.tell(Request.SET_VRING_ADDR, connection.addresses(0))
    assert pop(connection.queue()) == heads[1:]


# Resets


def test_a_reset_stops_all_rings_and_another_driver_begins(connection: Connection) -> None:
    queue = connection.begin()
    connection.start(1)
    connection.tell(Request.SET_STATUS, U64.pack(15))
    connection.offer(3)
    pop(queue)
    connection.tell(Request.RESET_DEVICE)
    assert connection.running() == []
    assert connection.resets == 1
    assert connection.tell(Request.GET_STATUS) == U64.pack(0)
    connection.driver.reset()
    heads = connection.offer(2)
    assert pop(connection.start()) == heads


def test_a_status_of_zero_halts_the_rings_where_they_are(connection: Connection) -> None:
    # QEMU sends it before it asks for the base, also where the guest is merely paused.
    queue = connection.begin()
    connection.tell(Request.SET_STATUS, U64.pack(15))
    heads = connection.offer(3)
    pop(queue, 2)
    queue.push(heads[0], 0)
    connection.tell(Request.SET_STATUS, U64.pack(0))
    assert connection.running() == []
    assert connection.tell(Request.GET_STATUS) == U64.pack(0)
    base = connection.stop()
    assert base == 1
    assert pop(connection.start(base=base)) == heads[1:]
    assert connection.resets == 0


@pytest.mark.parametrize("asks_for_the_base", [True, False])
def test_a_device_whose_rings_begin_anew_after_a_status_of_zero_was_reset(
    connection: Connection, asks_for_the_base: bool
) -> None:
    queue = connection.begin()
    connection.offer(3)
    pop(queue, 2)
    connection.tell(Request.SET_STATUS, U64.pack(0))
    if asks_for_the_base:
        connection.stop()
    assert connection.resets == 0
    connection.driver.reset()
    heads = connection.offer(2)
    assert pop(connection.start(base=0)) == heads
    assert connection.resets == 1


def test_the_owners_end_stops_nothing_but_service(connection: Connection) -> None:
    queue = connection.begin()
    heads = connection.offer(2)
    pop(queue, 1)
    connection.tell(Request.RESET_OWNER)
    assert connection.running() == []
    connection.tell(Request.SET_VRING_ENABLE, state(0, 1))
    assert pop(connection.queue()) == heads


def test_a_broken_device_is_left_alone_until_its_reset(connection: Connection) -> None:
    connection.begin()
    connection.start(1)
    connection.tell(Request.SET_STATUS, U64.pack(15))
    connection.backend.broken()
    assert connection.running() == []
    assert connection.tell(Request.GET_STATUS) == U64.pack(15 | VIRTIO_CONFIG_S_NEEDS_RESET)
    for payload in (state(0, 0), state(0, 1)):
        connection.tell(Request.SET_VRING_ENABLE, payload)
    connection.share()
    assert connection.running() == []
    connection.tell(Request.SET_STATUS, U64.pack(7))
    assert connection.tell(Request.GET_STATUS) == U64.pack(7 | VIRTIO_CONFIG_S_NEEDS_RESET)
    connection.tell(Request.SET_STATUS, U64.pack(0))
    assert connection.tell(Request.GET_STATUS) == U64.pack(0)
    connection.driver.reset()
    connection.start()
    assert connection.running() == [0]


def test_a_ring_of_a_broken_device_may_also_be_stopped_and_started(connection: Connection) -> None:
    connection.begin()
    connection.start(1)
    connection.backend.broken()
    base = connection.stop()
    connection.start(base=base)
    assert connection.running() == [0]


# Requests in flight


def get_inflight(connection: Connection, queues: int = QUEUES, num: int = NUM) -> tuple[int, int]:
    """A region as the back end makes it: its descriptor and its size."""
    message = Message(Request.GET_INFLIGHT_FD, VERSION, INFLIGHT.pack(0, 0, queues, num) + bytes(4))
    answer = connection.backend.handle(message)
    assert answer is not None
    assert answer[1] is not None
    assert len(answer[0]) == HEADER_BYTES + INFLIGHT.size + 4
    size, offset, *rest = INFLIGHT.unpack_from(answer[0], HEADER_BYTES)
    assert (offset, rest) == (0, [queues, num])
    assert os.fstat(answer[1]).st_size >= size >= queues * inflight_bytes(num)
    return answer[1], size


def set_inflight(connection: Connection, descriptor: int, size: int, offset: int = 0, num: int = NUM) -> None:
    connection.tell(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, offset, QUEUES, num) + bytes(4), [descriptor])


@pytest.mark.parametrize("offset", [0, 64, 4096 + 64])
def test_another_back_end_goes_on_with_what_the_region_tells(connection: Connection, offset: int) -> None:
    made, size = get_inflight(connection)
    os.close(made)
    descriptor = os.memfd_create("region")
    os.ftruncate(descriptor, offset + size)
    set_inflight(connection, descriptor, size, offset)
    connection.begin()
    queue = connection.start(1)
    heads = connection.offer(5, 1)
    pop(queue, 4)
    queue.push(heads[1], 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    region = InflightRegion(memoryview(bytearray(os.pread(descriptor, size, offset)[size // QUEUES :])), NUM)
    assert region.heads() == [heads[0], heads[2], heads[3]]
    # The back end has died, and with it all but the region.
    connection.backend.close()
    connection.backend = Backend(connection, name="dev", features=OFFERED, config=b"", queues=QUEUES)
    connection.tell(Request.SET_FEATURES, U64.pack(OFFERED | PROTOCOL))
    set_inflight(connection, descriptor, size, offset)
    connection.share()
    queue = connection.start(1, base=1)
    assert pop(queue) == [heads[0], *heads[2:]]
    for head in (heads[0], *heads[2:]):
        queue.push(head, 0)
    assert len(connection.driver.queues[1].collect()) == 5
    os.close(descriptor)


def test_a_reset_clears_the_record_of_what_was_answered_out_of_order(connection: Connection) -> None:
    descriptor, size = get_inflight(connection)
    set_inflight(connection, descriptor, size)
    queue = connection.begin()
    heads = connection.offer(3)
    pop(queue)
    queue.push(heads[1], 0)
    connection.tell(Request.RESET_DEVICE)
    connection.driver.reset()
    heads = connection.offer(2)
    assert pop(connection.start()) == heads
    os.close(descriptor)


@pytest.mark.parametrize("kept_by_front_end", [True, False])
def test_what_was_answered_out_of_order_survives_a_stop(connection: Connection, kept_by_front_end: bool) -> None:
    if kept_by_front_end:
        descriptor, size = get_inflight(connection)
        set_inflight(connection, descriptor, size)
        os.close(descriptor)
    queue = connection.begin()
    heads = connection.offer(5)
    pop(queue, 4)
    queue.push(heads[1], 0)
    base = connection.stop()
    # QEMU says so at every pause, when all rings are stopped.
    connection.tell(Request.SET_STATUS, U64.pack(0))
    queue = connection.start(base=base)
    left = [heads[0], *heads[2:]]
    assert pop(queue) == left
    for head in left:
        queue.push(head, 0)
    assert len(connection.driver.queues[0].collect()) == 5
    # But not where another driver begins anew.
    connection.offer(3)
    pop(queue, 3)
    queue.push(connection.driver.queues[0].outstanding[1], 0)
    connection.stop()
    if not kept_by_front_end:
        connection.driver.reset()
        heads = connection.offer(1)
        assert pop(connection.start(base=0)) == heads


def test_an_inflight_region_that_cannot_be_is_refused(connection: Connection) -> None:
    request = Request.SET_INFLIGHT_FD
    descriptor, size = get_inflight(connection)
    read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    good = INFLIGHT.pack(size, 0, QUEUES, NUM)
    connection.refuses("SET_INFLIGHT_FD with 0 descriptors, it has 1", request, good)
    connection.refuses("SET_INFLIGHT_FD with 19 bytes, it has 20", request, good[:-1], [descriptor])
    for queues, num in ((0, NUM), (QUEUES + 1, NUM), (0xFFFF, NUM), (QUEUES, 0), (QUEUES, 0x8001), (QUEUES, 0xFFFF)):
        payload = INFLIGHT.pack(size, 0, queues, num)
        connection.refuses(f"for {queues} rings of {num} descriptors", request, payload, [descriptor])
        connection.refuses(f"for {queues} rings of {num} descriptors", Request.GET_INFLIGHT_FD, payload)
    for wrong_size, offset in ((size - 1, 0), (0, 0), (size, 1), (size, 4096), (size, 1 << 63), (size, (1 << 64) - 1)):
        payload = INFLIGHT.pack(wrong_size, offset, QUEUES, NUM)
        connection.refuses("with too small a file", request, payload, [descriptor])
    connection.refuses("with too small a file", request, good, [null])
    connection.refuses("cannot map it: .*Permission denied", request, good, [read_only])
    connection.begin()
    connection.refuses("SET_INFLIGHT_FD while rings are started", request, good, [descriptor])
    for one in (descriptor, read_only, null):
        os.close(one)


def test_a_region_of_other_rings_is_refused_at_the_start(connection: Connection) -> None:
    descriptor, size = get_inflight(connection, num=NUM // 2)
    set_inflight(connection, descriptor, size, num=NUM // 2)
    connection.tell(Request.SET_FEATURES, U64.pack(OFFERED | PROTOCOL))
    connection.share()
    connection.describe()
    connection.refuses_to_start("a ring of 8 descriptors, and the in-flight region is of 4")
    os.pwrite(descriptor, struct.pack("<QHH", 0, 7, 4), 0)
    connection.refuses_to_start("ring 0: an in-flight region of version 7 for 4")
    os.close(descriptor)


def test_a_ring_beyond_the_region_has_a_record_of_its_own(connection: Connection) -> None:
    descriptor, size = get_inflight(connection, queues=1)
    connection.tell(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, 0, 1, NUM), [descriptor])
    connection.begin()
    queue = connection.start(1)
    heads = connection.offer(1, 1)
    assert pop(queue) == heads
    os.close(descriptor)


# At the end


def test_with_the_connection_all_of_it_ends(connection: Connection) -> None:
    before = belongings()
    descriptor, size = get_inflight(connection)
    set_inflight(connection, descriptor, size)
    os.close(descriptor)
    connection.begin()
    connection.start(1)
    for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        connection.tell(request, U64.pack(1), connection.kicks[:1])
    assert belongings() != before
    connection.backend.close()
    assert belongings() == before


@settings(max_examples=150, deadline=None)
@given(st.integers())
def test_whatever_is_said_in_whatever_order_nothing_is_left(seed: int) -> None:
    before = belongings()
    connection = Connection()
    try:
        _say_much(connection, Random(seed))
    except ProtocolError as error:
        assert str(error)
    except RingError as error:
        assert str(error).startswith("dev: queue ")
    connection.close()
    assert belongings() == before


def _say_much(connection: Connection, random: Random) -> None:
    for _ in range(random.randrange(60)):
        _say_something(connection, random)
        for ring in connection.backend.running():
            queue = connection.queue(ring.index)
            chain = queue.pop()
            if chain is not None and random.random() < 0.8:
                queue.push(chain[0], 0)


def _say_something(connection: Connection, random: Random) -> None:
    number = random.randrange(QUEUES)
    if random.random() < 0.5 and connection.driver.queues[number].free:
        connection.offer(1, number)
    what = random.randrange(12)
    if what < 2:
        connection.share()
    elif what == 2:
        connection.tell(Request.SET_FEATURES, U64.pack(random.choice((OFFERED, OFFERED | PROTOCOL, 1 << 32))))
    elif what < 6:
        connection.start(number, connection.driver.queues[number].used_index())
    elif what == 6:
        connection.stop(number)
    elif what == 7:
        connection.tell(Request.SET_VRING_ENABLE, state(number, random.randrange(2)))
    elif what == 8:
        connection.remove(random.randrange(3))
    elif what == 9:
        connection.add(random.randrange(3))
    elif what == 10:
        connection.backend.broken()
    else:
        connection.tell(Request.SET_STATUS, U64.pack(random.choice((0, 15))))


def test_requests_are_numbered_as_the_specification_has_it() -> None:
    assert all(other - one == 1 for one, other in pairwise(Request))
