"""The lguest bus, as the guest sees it and as the launcher does."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.bus import LguestBus, QueueConfig, QueueNotify, StatusNotify
from lgmp.errors import LgmpError
from lgmp.memory import GuestMemory

RAM = 1 << 20
NET, BLOCK, CONSOLE = 1, 2, 3


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create(RAM) as guest_memory:
        yield guest_memory


@dataclass
class SeenDevice:
    """What a guest's driver finds in the descriptor page."""

    address: int
    kind: int
    queues: list[tuple[int, int, int]]
    offered: int
    accepted: int
    config: bytes
    status: int


def walk(memory: GuestMemory) -> list[SeenDevice]:
    """Read the descriptor page as the guest's bus driver does."""
    seen = []
    at = RAM
    while at < RAM + 4096 and memory.view[at]:
        kind, num_vq, feature_len, config_len, status = struct.unpack_from("<5B", memory.view, at)
        features = at + 5 + 8 * num_vq
        config = features + 2 * feature_len
        seen.append(
            SeenDevice(
                address=at,
                kind=kind,
                queues=[struct.unpack_from("<HHI", memory.view, at + 5 + 8 * each) for each in range(num_vq)],
                offered=int.from_bytes(memory.view[features : features + feature_len], "little"),
                accepted=int.from_bytes(memory.view[features + feature_len : config], "little"),
                config=bytes(memory.view[config : config + config_len]),
                status=status,
            )
        )
        at = config + config_len
    assert at < RAM + 4096, "the list does not end in the page"
    return seen


def test_the_seeds_devices_have_the_seeds_layout(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    assert bus.guest_limit == RAM + 4096

    net = bus.add_device(NET, "net", [128, 128], 1 << 5, b"\x02macad")
    block = bus.add_device(BLOCK, "block", [128], 1 << 0 | 1 << 2, struct.pack("<QII", 2048, 0, 126))
    console = bus.add_device(CONSOLE, "console", [128, 128], 0, b"")

    # 29 and 31 bytes: the sizes of the seed's descriptors, one right after the other.
    assert [net.descriptor_address, block.descriptor_address, console.descriptor_address] == [RAM, RAM + 29, RAM + 60]
    pfn = RAM // 4096
    assert (
        bytes(memory.view[RAM : RAM + 29])
        == bytes([1, 2, 1, 6, 0]) + struct.pack("<HHIHHI", 128, 1, pfn + 1, 128, 2, pfn + 3) + b"\x20\x00\x02macad"
    )
    assert console.queues == [QueueConfig(128, 4, pfn + 7), QueueConfig(128, 5, pfn + 9)]
    assert bytes(memory.view[RAM + 60 + 21 : RAM + 4096]) == bytes(4096 - 81)
    assert bus.guest_limit == RAM + 11 * 4096
    assert bus.devices == [net, block, console]


@pytest.mark.parametrize(("num", "pages"), [(1, 2), (128, 2), (256, 3), (512, 5), (8192, 54)])
def test_rings_take_whole_pages(memory: GuestMemory, num: int, pages: int) -> None:
    bus = LguestBus(memory)
    queue = bus.add_device(CONSOLE, "console", [num], 0, b"").queues[0]
    assert (queue.address, queue.size) == (RAM + 4096, pages * 4096)
    assert bus.guest_limit == RAM + (1 + pages) * 4096


@pytest.mark.parametrize(("features", "length"), [(0, 0), (1, 1), (1 << 7, 1), (1 << 8, 2), (1 << 28, 4), (1 << 63, 8)])
def test_features_take_the_bytes_their_highest_bit_needs(memory: GuestMemory, features: int, length: int) -> None:
    LguestBus(memory).add_device(NET, "net", [], features, b"")
    assert memory.view[RAM + 2] == length
    assert walk(memory)[0].offered == features


def test_status_is_where_the_guest_writes_it(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    bus.add_device(CONSOLE, "console", [128, 128], 0, b"")
    device = bus.add_device(NET, "net", [128], 1, b"")
    memory.view[device.descriptor_address + 4] = 7
    assert device.status == 7
    device.status = 0x80
    assert [each.status for each in walk(memory)] == [0, 0x80]


def test_accepted_features_are_read_and_those_never_offered_ignored(memory: GuestMemory) -> None:
    device = LguestBus(memory).add_device(NET, "net", [128], 0x8001, b"")
    assert device.accepted_features == 0
    memory.view[RAM + 5 + 8 + 2 : RAM + 5 + 8 + 4] = b"\x03\x80"
    assert device.accepted_features == 0x8001


def test_reset_zeroes_the_device_and_no_other(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    first, device, last = (bus.add_device(NET, name, [128, 256], 0x81, b"cfg") for name in ("one", "two", "three"))
    offered_then_accepted = device.descriptor_address + 5 + 16
    for each in (first, device, last):
        each.status = 7
        memory.view[each.descriptor_address + 5 + 16 + 1] = 0x81
        for queue in each.queues:
            memory.view[queue.address : queue.address + queue.size] = b"\xff" * queue.size

    device.reset()

    assert (device.status, device.accepted_features) == (0, 0)
    assert bytes(memory.view[offered_then_accepted : offered_then_accepted + 5]) == b"\x81\0cfg"
    assert all(not any(memory.view[each.address : each.address + each.size]) for each in device.queues)
    for other in (first, last):
        assert (other.status, other.accepted_features) == (7, 0x81)
        for queue in other.queues:
            assert bytes(memory.view[queue.address : queue.address + queue.size]) == b"\xff" * queue.size


def test_notifications_find_descriptors_and_first_pages(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    net = bus.add_device(NET, "net", [128, 128], 0, b"")
    console = bus.add_device(CONSOLE, "console", [256, 256], 0, b"")

    assert bus.find(net.descriptor_address) == StatusNotify(net)
    assert bus.find(console.descriptor_address) == StatusNotify(console)
    for device in (net, console):
        for number, queue in enumerate(device.queues):
            assert bus.find(queue.address) == QueueNotify(device, number)
            assert bus.find(queue.address + 4095) == QueueNotify(device, number)
            assert bus.find(queue.address + 4096) is None
    for address in (0, RAM - 1, RAM + 1, console.descriptor_address + 21, bus.guest_limit, 0xFFFFFFFF):
        assert bus.find(address) is None


def test_what_the_guest_writes_into_the_descriptor_page_moves_nothing(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    device = bus.add_device(NET, "net", [128, 128], 1, b"")
    queues = list(device.queues)
    limit = bus.guest_limit
    memory.view[RAM : RAM + 4096] = b"\xff" * 4096

    assert device.queues == queues
    assert bus.guest_limit == limit
    assert bus.find(RAM) == StatusNotify(device)
    assert bus.find(queues[1].address) == QueueNotify(device, 1)
    assert device.accepted_features == 1
    device.reset()
    assert device.status == 0
    assert bytes(memory.view[limit : limit + 4096]) == bytes(4096)


def test_the_descriptor_page_keeps_a_byte_to_end_the_list(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    for _ in range(15):
        bus.add_device(BLOCK, "block", [], 0, bytes(255))
    # 15 * 260 bytes are taken: 196 remain, and a descriptor of 195 is the last that leaves one.
    with pytest.raises(LgmpError, match="Too many devices"):
        bus.add_device(BLOCK, "block", [], 0, bytes(191))
    bus.add_device(BLOCK, "block", [], 0, bytes(190))
    assert len(walk(memory)) == 16
    with pytest.raises(LgmpError, match="Too many devices"):
        bus.add_device(CONSOLE, "console", [], 0, b"")


def test_the_device_pages_run_out(memory: GuestMemory) -> None:
    bus = LguestBus(memory)
    # A ring of 16384 descriptors takes 106 pages; with the descriptor page two leave 43 of 256.
    bus.add_device(NET, "net", [16384, 16384], 0, b"")
    before = bus.guest_limit
    with pytest.raises(LgmpError, match="Not enough memory for devices"):
        bus.add_device(BLOCK, "block", [128, 8192], 0, b"")
    assert bus.guest_limit == before
    assert len(walk(memory)) == 1
    # Thirteen rings of 3 pages and two of 2 fill them to the last one.
    bus.add_device(BLOCK, "block", [256] * 13 + [128] * 2, 0, b"")
    assert bus.guest_limit == memory.limit
    with pytest.raises(LgmpError, match="Not enough memory for devices"):
        bus.add_device(CONSOLE, "console", [1], 0, b"")


@pytest.mark.parametrize("max_irqs", [15, 31])
def test_the_interrupt_lines_run_out(memory: GuestMemory, max_irqs: int) -> None:
    bus = LguestBus(memory, max_irqs=max_irqs)
    for _ in range(max_irqs - 1):
        last = bus.add_device(BLOCK, "block", [128], 0, b"")
    with pytest.raises(LgmpError, match=f"no interrupt line left for console, as the host has {max_irqs}"):
        bus.add_device(CONSOLE, "console", [128, 128], 0, b"")
    assert last.queues[0].irq == max_irqs - 1
    assert bus.add_device(BLOCK, "block", [128], 0, b"").queues[0].irq == max_irqs


@pytest.mark.parametrize(
    ("device_type", "queue_nums", "features", "config"),
    [
        (0, [], 0, b""),
        (256, [], 0, b""),
        (NET, [0], 0, b""),
        (NET, [100], 0, b""),
        (NET, [65536], 0, b""),
        (NET, [], 1 << 64, b""),
        (NET, [], -1, b""),
        (NET, [], 0, bytes(256)),
    ],
)
def test_what_no_descriptor_can_express_is_the_callers_mistake(
    memory: GuestMemory, device_type: int, queue_nums: list[int], features: int, config: bytes
) -> None:
    with pytest.raises(ValueError, match=" "):
        LguestBus(memory).add_device(device_type, "odd", queue_nums, features, config)
    assert walk(memory) == []


DEVICES = st.lists(
    st.tuples(
        st.integers(1, 255),
        st.lists(st.sampled_from([1, 2, 64, 128, 256, 1024, 4096]), max_size=6),
        st.integers(0, (1 << 64) - 1),
        st.binary(max_size=255),
    ),
    max_size=30,
)


@given(DEVICES)
def test_whatever_devices_fit_the_guest_finds_as_they_were_added(
    devices: list[tuple[int, list[int], int, bytes]],
) -> None:
    with GuestMemory.create(RAM) as memory:
        bus = LguestBus(memory)
        for device_type, nums, features, config in devices:
            before = (bus.guest_limit, bytes(memory.view[RAM : RAM + 4096]))
            try:
                bus.add_device(device_type, "any", nums, features, config)
            except LgmpError:
                assert (bus.guest_limit, bytes(memory.view[RAM : RAM + 4096])) == before

        seen = walk(memory)
        assert [each.address for each in seen] == [each.descriptor_address for each in bus.devices]
        queues = [queue for device in bus.devices for queue in device.queues]
        assert [queue for each in seen for queue in each.queues] == [(each.num, each.irq, each.pfn) for each in queues]
        assert [(each.offered, each.accepted, each.status) for each in seen] == [
            (each.features, 0, 0) for each in bus.devices
        ]
        assert [each.irq for each in queues] == list(range(1, len(queues) + 1))
        assert len(queues) <= 31
        # Page by page without gap or overlap from the descriptor page to the limit, and not beyond the device pages.
        end = RAM + 4096
        for queue in queues:
            assert queue.address == end
            # Descriptors, available ring, then the used ring on a page of its own: more than 26 bytes each.
            assert 26 * queue.num < queue.size <= 26 * queue.num + 3 * 4096
            end += queue.size
        assert end == bus.guest_limit <= memory.limit
        assert not any(memory.view[RAM + 4096 : memory.limit])
