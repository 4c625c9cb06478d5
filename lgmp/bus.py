"""The lguest bus: how a guest finds its devices.

One page right above RAM describes them, one after the other; the rings of their virtqueues lie in the pages above it.
The guest can write that page whenever it likes, so all that the launcher has to know of a device is kept here and never
read back; of the guest's writes only a device's status and the features it accepts are looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from lgmp.errors import LgmpError
from lgmp.memory import DEVICE_PAGES, PAGE_SIZE, GuestMemory
from lgmp.virtio.ring import MAX_RING, VringLayout

# struct lguest_device_desc: u8 type, num_vq, feature_len, config_len, status
DESCRIPTOR = struct.Struct("<5B")
DESCRIPTOR_STATUS = 4
# struct lguest_vqconfig: u16 num, u16 irq, u32 pfn
VQCONFIG = struct.Struct("<HHI")

# Interrupt line 0 is the timer.
FIRST_IRQ = 1
# The host takes lines below min(NR_IRQS, 32).
MAX_IRQS = 31


def vring_pages(num: int) -> int:
    """Return the pages that a ring of `num` descriptors takes: 2 for 128, 3 for 256."""
    return -(-VringLayout.legacy_bytes(num) // PAGE_SIZE)


class QueueConfig(NamedTuple):
    """A virtqueue as struct lguest_vqconfig has it: descriptors, interrupt line, guest page number of its ring."""

    num: int
    irq: int
    pfn: int

    @property
    def address(self) -> int:
        """The guest-physical address of the ring."""
        return self.pfn * PAGE_SIZE

    @property
    def size(self) -> int:
        """The bytes the ring takes, in whole pages."""
        return vring_pages(self.num) * PAGE_SIZE


class BusDevice:
    """A device on the bus.

    `index` counts from 0 in the order of creation; `descriptor_address` is guest-physical; `features` is the mask of
    those offered, `config` the configuration space. Made by LguestBus.add_device.
    """

    def __init__(  # noqa: PLR0913  as many as a device has properties
        self,
        memory: GuestMemory,
        *,
        name: str,
        device_type: int,
        index: int,
        descriptor_address: int,
        queues: list[QueueConfig],
        features: int,
        config: bytes = b"",
    ) -> None:
        """Describe the device; nothing is written here."""
        self.name = name
        self.device_type = device_type
        self.index = index
        self.descriptor_address = descriptor_address
        self.queues = queues
        self.features = features
        self.config = config
        self._view = memory.view
        self._status_address = descriptor_address + DESCRIPTOR_STATUS
        self._accepted_start = (
            descriptor_address + DESCRIPTOR.size + VQCONFIG.size * len(queues) + feature_bytes(features)
        )
        self._accepted_end = self._accepted_start + feature_bytes(features)

    def __repr__(self) -> str:
        """Say which device it is and where."""
        return f"<BusDevice {self.name} at {self.descriptor_address:#x}>"

    @property
    def status(self) -> int:
        """The device's status byte (VIRTIO_CONFIG_S_*), read from guest memory once for each use of this property."""
        return self._view[self._status_address]

    @status.setter
    def status(self, value: int) -> None:
        self._view[self._status_address] = value

    @property
    def accepted_features(self) -> int:
        """The mask of features the guest accepts, read from guest memory once; bits never offered do not count."""
        return int.from_bytes(self._view[self._accepted_start : self._accepted_end], "little") & self.features

    def reset(self) -> None:
        """Put the guest's view of the device back to its start: status 0, no feature accepted, every ring zeroed.

        Whoever works on the rings has to have stopped, and to start at position 0 again.
        """
        self.status = 0
        self._view[self._accepted_start : self._accepted_end] = bytes(self._accepted_end - self._accepted_start)
        for queue in self.queues:
            self._view[queue.address : queue.address + queue.size] = bytes(queue.size)


class StatusNotify(NamedTuple):
    """The guest notified a device's descriptor: it resets the device, or (3.x) has written its status."""

    device: BusDevice


class QueueNotify(NamedTuple):
    """The guest notified a virtqueue: there is something in the ring of `device.queues[queue]`."""

    device: BusDevice
    queue: int


Notify = StatusNotify | QueueNotify


def feature_bytes(features: int) -> int:
    """Return the bytes a feature mask takes in a descriptor: as many as reach its highest bit."""
    return (features.bit_length() + 7) // 8


class LguestBus:
    """Lays devices out in the descriptor page and hands out the pages above it, from a guest's fresh memory.

    `devices` are in the order of creation, which is the order in which the guest finds them (eth0, vda).
    """

    def __init__(self, memory: GuestMemory, *, max_irqs: int = MAX_IRQS) -> None:
        """Take the descriptor page.

        `max_irqs`: the interrupt lines the host has for devices (15 on hosts with 16 lines in all).
        """
        self.devices: list[BusDevice] = []
        self._memory = memory
        self._max_irqs = max_irqs
        self._page = memory.ram_bytes
        self._limit_max = min(memory.limit, memory.ram_bytes + DEVICE_PAGES * PAGE_SIZE)
        if self._page + PAGE_SIZE > self._limit_max:
            raise LgmpError("guest memory has no room for the descriptor page above RAM")
        self._next_descriptor = self._page
        self._next_irq = FIRST_IRQ
        self._guest_limit = self._page + PAGE_SIZE
        self._by_descriptor: dict[int, StatusNotify] = {}
        self._by_pfn: dict[int, QueueNotify] = {}

    @property
    def guest_limit(self) -> int:
        """The guest-physical address after the last page given out so far: nothing from there on is the guest's."""
        return self._guest_limit

    def add_device(
        self, device_type: int, name: str, queue_nums: Sequence[int], features: int, config: bytes
    ) -> BusDevice:
        """Append a device to the bus and return it.

        `device_type`: its virtio id; `queue_nums`: the descriptors of each of its virtqueues, powers of two;
        `features`: the mask of those offered, up to 64 bits; `config`: its configuration space, up to 255 bytes.

        Raises LgmpError, with the bus unchanged, where the descriptor page, the device pages or the interrupt lines
        are used up, and ValueError for what no descriptor can express.
        """
        _check_expressible(device_type, queue_nums, features, config)
        offered = features.to_bytes(feature_bytes(features), "little")
        size = DESCRIPTOR.size + VQCONFIG.size * len(queue_nums) + 2 * len(offered) + len(config)
        start = self._next_descriptor
        # The byte after the last descriptor has to be in the page as well: it is the type 0 that ends the list.
        if start + size >= self._page + PAGE_SIZE:
            raise LgmpError(f"Too many devices: no room in the descriptor page for {name}; give the guest fewer")
        if self._next_irq - FIRST_IRQ + len(queue_nums) > self._max_irqs:
            raise LgmpError(
                f"Too many devices: no interrupt line left for {name}, as the host has {self._max_irqs} for all of "
                "their virtqueues; give the guest fewer"
            )
        queues = []
        limit = self._guest_limit
        for irq, num in enumerate(queue_nums, self._next_irq):
            queues.append(QueueConfig(num=num, irq=irq, pfn=limit // PAGE_SIZE))
            limit += vring_pages(num) * PAGE_SIZE
        if limit > self._limit_max:
            raise LgmpError(
                f"Not enough memory for devices: no room for the rings of {name} in {DEVICE_PAGES} pages; "
                "give the guest fewer devices"
            )

        configs = b"".join(VQCONFIG.pack(each.num, each.irq, each.pfn) for each in queues)
        head = DESCRIPTOR.pack(device_type, len(queues), len(offered), len(config), 0)
        self._memory.view[start : start + size] = head + configs + offered + bytes(len(offered)) + config
        device = BusDevice(
            self._memory,
            name=name,
            device_type=device_type,
            index=len(self.devices),
            descriptor_address=start,
            queues=queues,
            features=features,
            config=config,
        )
        self._next_descriptor = start + size
        self._next_irq += len(queues)
        self._guest_limit = limit
        self.devices.append(device)
        self._by_descriptor[start] = StatusNotify(device)
        for number, queue in enumerate(queues):
            self._by_pfn[queue.pfn] = QueueNotify(device, number)
        return device

    def find(self, address: int) -> Notify | None:
        """Return what a notification of `address` is about.

        A device's descriptor: its status; anywhere in the first page of a virtqueue: that queue; else None, and the
        address is that of early console text, or bad.
        """
        return self._by_descriptor.get(address) or self._by_pfn.get(address // PAGE_SIZE)


def _check_expressible(device_type: int, queue_nums: Sequence[int], features: int, config: bytes) -> None:
    if not 1 <= device_type <= 0xFF:
        raise ValueError(f"device type {device_type} is not 1 to 255")
    if len(queue_nums) > 0xFF:
        raise ValueError(f"{len(queue_nums)} virtqueues are more than 255")
    for num in queue_nums:
        if not 1 <= num <= MAX_RING or num & (num - 1):
            raise ValueError(f"{num} descriptors is not a power of two up to {MAX_RING}")
    if not 0 <= features < 1 << 64:
        raise ValueError(f"features {features:#x} are not a mask of 64 bits")
    if len(config) > 0xFF:
        raise ValueError(f"{len(config)} bytes of configuration are more than 255")
