"""The driver's side of virtqueues, in Python, over memory that a device's process shares.

`Driver` lays out rings in guest memory, and its queues fill them as a guest's driver would, rightly or wrongly: nothing
that is put into a ring is checked. `Recorder` takes what a device in this very process tells the process around it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lgmp.closing import Closing
from lgmp.control import ControlPage
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.virtio.ids import (
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTQUEUE_NUM,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from lgmp.virtio.inflight import USED_IDX_U16
from lgmp.virtio.ring import Virtqueue, VringLayout

if TYPE_CHECKING:
    from workers.device import Device

# The memory of a Driver's guest that is not said to have another size, in bytes.
RAM_BYTES = 4 << 20
# How long anything that is waited for may take before the test has failed, in seconds: far more than it ever does.
PATIENCE = 30.0
# What a driver accepts that is not said to accept something else: indirect tables.
FEATURES = 1 << VIRTIO_RING_F_INDIRECT_DESC


class Unexpected(AssertionError):
    """The device did what it may not do, or not what the test says that it does."""


@dataclass(frozen=True)
class Buffer:
    """A piece of guest memory for a descriptor: its guest address, its size in bytes, whether the device may write."""

    address: int
    size: int
    writable: bool = False


@dataclass(frozen=True)
class Used:
    """A used element: the first descriptor of the chain given back, and how many bytes the device says it wrote."""

    head: int
    written: int


class DriverQueue:
    """The driver's side of one ring. `free` are the descriptors that no chain uses, the next to be taken first."""

    def __init__(self, memory: GuestMemory, layout: VringLayout, start: int = 0) -> None:
        """Write an empty ring into `memory`. `start`: the 16-bit index both its rings begin with (0 after a reset)."""
        self.memory = memory
        self.layout = layout
        self.next_avail = start
        self.next_used = start
        # Indexes are loaded and stored in one piece: struct.pack_into would store a 0 first, for the device to see.
        self._avail = memory.view[layout.avail : layout.avail + 4].cast("H")
        self._used = memory.view[layout.used : layout.used + 4].cast("H")
        self.free = list(range(layout.num))
        self._chains: dict[int, list[int]] = {}
        memory.view[layout.desc : layout.desc + 16 * layout.num] = bytes(16 * layout.num)
        self.set_avail(0, start)
        self._used[0] = 0
        self._used[1] = start

    def set_descriptor(self, index: int, address: int, size: int, flags: int, follows: int) -> None:
        """Write one descriptor, whatever it says; `flags` are VRING_DESC_F_*."""
        struct.pack_into("<QIHH", self.memory.view, self.layout.desc + 16 * index, address, size, flags, follows)

    def set_avail(self, flags: int, index: int) -> None:
        """Write flags and index of the available ring, and leave `next_avail` as it is."""
        self._avail[0] = flags
        self._avail[1] = index & 0xFFFF

    def offer(self, head: int) -> None:
        """Put a head into the available ring, and say so."""
        slot = self.layout.avail + 4 + 2 * (self.next_avail % self.layout.num)
        struct.pack_into("<H", self.memory.view, slot, head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        self._avail[1] = self.next_avail

    def add(self, buffers: Sequence[Buffer], table: int | None = None) -> int:
        """Offer a chain of `buffers`, through an indirect table at guest address `table` if given; gives its head."""
        if table is not None:
            view = self.memory.view
            for number, buffer in enumerate(buffers):
                flags, follows = _link(buffer, number + 1, number + 1 < len(buffers))
                struct.pack_into("<QIHH", view, table + 16 * number, buffer.address, buffer.size, flags, follows)
            (head,) = self.take(1)
            self.set_descriptor(head, table, 16 * len(buffers), VRING_DESC_F_INDIRECT, 0)
        else:
            chain = self.take(len(buffers))
            for number, buffer in enumerate(buffers):
                last = number + 1 == len(buffers)
                flags, follows = _link(buffer, 0 if last else chain[number + 1], not last)
                self.set_descriptor(chain[number], buffer.address, buffer.size, flags, follows)
            head = chain[0]
        self.offer(head)
        return head

    def take(self, count: int) -> list[int]:
        """Take `count` free descriptors for a chain that begins with the first of them; its end frees them all.

        Raises MemoryError where there are not so many.
        """
        if count < 1:
            raise ValueError("a chain has at least one descriptor")
        if count > len(self.free):
            raise MemoryError(f"a chain of {count} descriptors, and {len(self.free)} are free: collect() frees others")
        chain, self.free = self.free[:count], self.free[count:]
        self._chains[chain[0]] = chain
        return chain

    @property
    def outstanding(self) -> list[int]:
        """The heads of the chains that were added and not collected yet, in the order in which they were added."""
        return list(self._chains)

    def used_index(self) -> int:
        """The index of the used ring, as the device has it now."""
        return self._used[1]

    def collect(self) -> list[Used]:
        """Take what the device has used since the last time; the descriptors are free again.

        Raises Unexpected where it has used what it was not given, or gives back again what it gave back before.
        """
        taken = []
        while self.next_used != self.used_index():
            slot = self.layout.used + 4 + 8 * (self.next_used % self.layout.num)
            head, written = struct.unpack_from("<II", self.memory.view, slot)
            chain = self._chains.pop(head, None)
            if chain is None:
                raise Unexpected(f"the device has used a chain with the head {head}; there is none, or no longer")
            self.next_used = (self.next_used + 1) & 0xFFFF
            self.free.extend(chain)
            taken.append(Used(head, written))
        return taken


def _link(buffer: Buffer, follows: int, more: bool) -> tuple[int, int]:
    flags = (VRING_DESC_F_WRITE if buffer.writable else 0) | (VRING_DESC_F_NEXT if more else 0)
    return flags, follows if more else 0


class Driver(Closing):
    """A guest's memory, the control page of one device, and the driver's side of its rings: `queues`."""

    def __init__(
        self,
        queues: int = 1,
        num: int = VIRTQUEUE_NUM,
        start: int = 0,
        ram: int = RAM_BYTES,
        *,
        memory: GuestMemory | None = None,
    ) -> None:
        """Make a guest of `ram` bytes whose device has `queues` rings of `num` descriptors.

        `start`: the 16-bit index that the rings begin with; near 0xFFFF, they soon wrap. `memory`: what the guest has
        already, which the driver then owns; the rings are put behind its `ram_bytes`.
        """
        self.memory = GuestMemory.create(ram) if memory is None else memory
        ram = self.memory.ram_bytes
        self.control = ControlPage.create([num] * queues)
        self.layouts = []
        end = ram
        for _ in range(queues):
            self.layouts.append(VringLayout.legacy(num, end))
            end += (VringLayout.legacy_bytes(num) + PAGE_SIZE - 1) & -PAGE_SIZE
        self.queues = [DriverQueue(self.memory, layout, start) for layout in self.layouts]
        for region in self.control.inflight:
            region.header[USED_IDX_U16] = start
        self._room = 0

    def buffer(self, content: bytes | int, writable: bool = False) -> Buffer:
        """Fresh guest memory, with a content or of a size; never given twice until `forget`.

        Raises MemoryError where the guest has no more.
        """
        size = content if isinstance(content, int) else len(content)
        address = self._room
        self._room += size
        if self._room > self.memory.ram_bytes:
            raise MemoryError("the test asks for more buffers than its guest has memory: see Driver.forget")
        if not isinstance(content, int):
            self.memory.view[address : address + size] = content
        return Buffer(address, size, writable)

    def forget(self) -> None:
        """All buffers may be given again."""
        self._room = 0

    def content(self, buffer: Buffer) -> bytes:
        """What is in a piece of guest memory now."""
        return bytes(self.memory.view[buffer.address : buffer.address + buffer.size])

    def device_queues(self, name: str = "vda", indirect: bool = True) -> list[Virtqueue]:
        """The device's side of the rings, for a device in this process that goes on where the last one stopped.

        `indirect`: whether the driver has accepted indirect tables.
        """
        queues = []
        for number, layout in enumerate(self.layouts):
            queue = Virtqueue(
                self.memory, layout, name=f"{name}: queue {number}", inflight=self.control.inflight[number]
            )
            queue.resume()
            queue.indirect = indirect
            queues.append(queue)
        return queues

    def attach(self, device: Device, name: str = "vda", features: int = FEATURES) -> Recorder:
        """Give a device in this process its rings and what the driver accepts; gives what takes its messages.

        Then `device.serve()` has it answer what is in the rings.
        """
        recorder = Recorder()
        device.attach(self.device_queues(name), recorder, statistics=self.control.statistics, state=self.control.state)
        device.accept(features)
        return recorder

    def reset(self) -> None:
        """What a launcher and a driver do once a device has been reset: nothing is in flight, the rings are empty."""
        self.control.reset()
        self.queues = [DriverQueue(self.memory, layout) for layout in self.layouts]

    def close(self) -> None:
        """Give memory and control page back. A process that still has them keeps them."""
        self.memory.close()
        self.control.close()


@dataclass
class Recorder:
    """Takes what a device in this process tells: `used_queues`, the ring of each USED; `quits`, how many QUITs."""

    used_queues: list[int] = field(default_factory=list)
    quits: int = 0

    def used(self, queue: int) -> None:
        """The device has added used elements to ring `queue`."""
        self.used_queues.append(queue)

    def quit(self) -> None:
        """The user asked for the end of the guest."""
        self.quits += 1
