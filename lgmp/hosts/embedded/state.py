"""What the host knows of its guest besides the CPU's registers."""

from __future__ import annotations

from lgmp.hosts import Event
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded.descriptors import (
    FLAT_CODE_HIGH,
    FLAT_DATA_HIGH,
    FLAT_LOW,
    Gate,
    Segment,
    fix_descriptor,
    segment_of,
)


class GuestKilled(Exception):
    """The guest did something that ends it; the text is the reason, in lg's words where lg has some."""


class GuestState:
    """One guest: its memory as words, its lguest_data, gates, segments, stack and interrupts."""

    __slots__ = (
        "data",
        "directory",
        "esp1",
        "event",
        "gates",
        "halted",
        "irq_pending",
        "kernel_address",
        "limit",
        "memory",
        "next_hcall",
        "noirq_end",
        "noirq_start",
        "paging",
        "pending",
        "pfn_limit",
        "ss1",
        "words",
    )

    def __init__(self, memory: memoryview, limit: int) -> None:
        """A guest that has not run yet, of `limit` bytes (whole pages) of `memory`."""
        self.memory = memory[:limit]
        self.words = self.memory.cast("I")
        self.limit = limit
        self.pfn_limit = limit >> 12
        # Guest-physical address of struct lguest_data; None until LGUEST_INIT.
        self.data: int | None = None
        # Which of `words` is lguest_data.irq_pending; None until LGUEST_INIT, and in eras that have none.
        self.irq_pending: int | None = None
        self.kernel_address = 0xC0000000
        self.noirq_start = 0
        self.noirq_end = 0
        # Where the host will look next in the ring of asynchronous hypercalls.
        self.next_hcall = 0
        # Whether the guest has page tables of its own yet; until then addresses are linear.
        self.paging = False
        # Guest-physical address of its page directory. Not read from CR3: should a guest ever change that, it must
        # not lead the host astray.
        self.directory = 0
        self.gates: list[Gate | None] = [None] * 256
        # The ring-1 stack for traps from ring 3: selector and top.
        self.ss1 = abi.KERNEL_DS | abi.GUEST_PL
        self.esp1 = 0
        # Interrupts that are pending: bit n is interrupt n.
        self.pending = 0
        self.halted = False
        # What `run` must return next.
        self.event: Event | None = None

    def close(self) -> None:
        """Let go of guest memory, so that whoever owns it can unmap it."""
        self.words.release()
        self.memory.release()

    def check_range(self, address: int, size: int, what: str) -> None:
        """Raise GuestKilled, with lg's text, where not all `size` bytes at guest-physical `address` are the guest's."""
        if address + size > self.limit:
            raise GuestKilled(f"bad {what} address {address:#x} len {size}")


class DescriptorTable:
    """The live GDT of the guest's CPU, and its segments as the CPU would cache them."""

    def __init__(self, words: memoryview) -> None:
        """`words`: the table itself, two 32-bit words an entry. The kernel's two flat segments are there at start."""
        self._words = words
        self.segments = [Segment(0, 0, 0)] * abi.GDT_ENTRIES
        self.load(abi.GDT_ENTRY_KERNEL_CS, FLAT_LOW, FLAT_CODE_HIGH)
        self.load(abi.GDT_ENTRY_KERNEL_DS, FLAT_LOW, FLAT_DATA_HIGH)

    def load(self, index: int, low: int, high: int) -> None:
        """Put the guest's descriptor at `index`, made fit for it. Raises GuestKilled past the table's end."""
        if not 0 <= index < abi.GDT_ENTRIES:
            raise GuestKilled(f"too many gdt entries {index}")
        low, high = fix_descriptor(index, low, high)
        self._words[2 * index] = low
        self._words[2 * index + 1] = high
        self.segments[index] = segment_of(low, high)
