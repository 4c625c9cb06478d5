"""Segment descriptors and interrupt gates: what the guest asks for, made fit for a guest in ring 1.

Pure: numbers in, numbers out. The rules are lg's (drivers/lguest/segments.c and interrupts_and_traps.c of the
3.x kernels), with one of our own: system descriptors (call gates, task states, LDTs) never reach the live GDT,
for through them a guest could give itself ring 0.
"""

from __future__ import annotations

from typing import NamedTuple

from lgmp.hosts.embedded import abi

# Fields of a descriptor's high word (Intel SDM volume 3, section 3.4.5).
_ACCESSED = 1 << 8
_WRITABLE = 1 << 9
_CODE = 1 << 11
_NOT_SYSTEM = 1 << 12
_DPL_SHIFT = 13
_DPL_MASK = 3 << _DPL_SHIFT
_PRESENT = 1 << 15
_GRANULARITY = 1 << 23

# A flat 4 GiB segment: base 0, limit 0xfffff pages, 32-bit, present; code or data.
FLAT_CODE_HIGH = 0x00CF9B00
FLAT_DATA_HIGH = 0x00CF9300
FLAT_LOW = 0x0000FFFF


class Segment(NamedTuple):
    """A segment as the CPU caches it: base address, limit in bytes, high word of the descriptor."""

    base: int
    limit: int
    flags: int

    @property
    def usable_code(self) -> bool:
        """Whether ring 1 may run in it."""
        wanted = _PRESENT | _NOT_SYSTEM | _CODE | (abi.GUEST_PL << _DPL_SHIFT)
        return self.flags & (_PRESENT | _NOT_SYSTEM | _CODE | _DPL_MASK) == wanted

    @property
    def usable_stack(self) -> bool:
        """Whether ring 1 may have its stack in it."""
        wanted = _PRESENT | _NOT_SYSTEM | _WRITABLE | (abi.GUEST_PL << _DPL_SHIFT)
        return self.flags & (_PRESENT | _NOT_SYSTEM | _CODE | _WRITABLE | _DPL_MASK) == wanted


def fix_descriptor(index: int, low: int, high: int) -> tuple[int, int]:
    """The descriptor that goes into the live GDT at `index` for what the guest asked for, as (low, high) words.

    Privilege 0 becomes 1, and the accessed bit is set since the guest's GDT is read-only to its CPU. Entries that
    are the host's own, and system descriptors, become not present.
    """
    if index in (
        abi.GDT_ENTRY_LGUEST_CS,
        abi.GDT_ENTRY_LGUEST_DS,
        abi.GDT_ENTRY_TSS,
        abi.GDT_ENTRY_DOUBLEFAULT_TSS,
    ):
        return 0, 0
    if not high & _NOT_SYSTEM:
        return 0, 0
    if not high & _DPL_MASK:
        high |= abi.GUEST_PL << _DPL_SHIFT
    return low, high | _ACCESSED


def segment_of(low: int, high: int) -> Segment:
    """What the CPU caches of a descriptor."""
    base = (low >> 16) | ((high & 0xFF) << 16) | (high & 0xFF000000)
    limit = (low & 0xFFFF) | (high & 0x000F0000)
    if high & _GRANULARITY:
        limit = (limit << 12) | 0xFFF
    return Segment(base, limit, high)


class Gate(NamedTuple):
    """An interrupt or trap gate of the guest."""

    handler: int  # guest-virtual address, always in the kernel's code segment
    disables_interrupts: bool  # an interrupt gate (type 0xE); a trap gate (0xF) leaves them on
    privilege: int  # the highest-numbered ring that may use `int n` on it


def gate_of(low: int, high: int) -> Gate | None:
    """The gate in two words of an IDT entry; None where it is not present.

    Raises ValueError, with lg's text, for a type that is neither interrupt nor trap gate.
    """
    if not high & _PRESENT:
        return None
    kind = (high >> 8) & 0xF
    if kind not in (0xE, 0xF):
        raise ValueError(f"bad IDT type {kind}")
    return Gate((low & 0xFFFF) | (high & 0xFFFF0000), kind == 0xE, (high >> _DPL_SHIFT) & 3)
