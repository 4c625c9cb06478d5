"""How much memory a guest is given: the MEM argument, and which sizes can work at all."""

from __future__ import annotations

import re

from lgmp.errors import LgmpError
from lgmp.memory import DEVICE_PAGES, PAGE_SIZE

MIB = 1 << 20

# Linux i386 starts at 1 MiB and the smallest kernel that ever ran under lguest is about 2 MiB; less is a mistyped MEM.
MIN_MEMORY_BYTES = 4 * MIB
# The topmost 4 MiB of the 32-bit address space are the switcher's (lguest_data.reserve_mem); RAM and the device pages
# above it have to end below.
GUEST_PHYSICAL_END = 0xFFC00000
MAX_MEMORY_BYTES = GUEST_PHYSICAL_END - DEVICE_PAGES * PAGE_SIZE
# What a kernel without CONFIG_HIGHMEM can use: 1 GiB less 128 MiB of vmalloc space, less the switcher and guard pages.
LOWMEM_BYTES = 891 * MIB

_SIZE = re.compile(r"0*([0-9]+)(?:([MG])(?:I?B)?)?", re.IGNORECASE)
_MAX_DIGITS = 9
_UNITS = {"M": MIB, "G": 1 << 30}


def in_mib(size: int) -> int:
    """Return `size` bytes in MiB, rounded up: what to give as MEM to have that much."""
    return -(-size // MIB)


def parse_memory_size(text: str) -> int:
    """Return the bytes that the MEM argument asks for.

    A plain number counts MiB, as it did in every lguest launcher; `M` (`MB`, `MiB`) and `G` (`GB`, `GiB`) in either
    case are accepted. Raises LgmpError for anything else, and for 0; whether the size can work is check_memory_size's
    to say.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise LgmpError(
            f"{text!r} is not a memory size: give MEM in MiB, such as 64, or with a unit, such as 64M or 1G"
        )
    digits, unit = match.groups()
    if len(digits) > _MAX_DIGITS:
        raise LgmpError(f"MEM is too big for a 32-bit guest: give at most {MAX_MEMORY_BYTES // MIB} (MiB)")
    size = int(digits) * _UNITS[(unit or "M").upper()]
    if size == 0:
        raise LgmpError("a guest cannot have 0 bytes of memory: give MEM in MiB, such as 64")
    return size


def check_memory_size(size: int) -> None:
    """Raise LgmpError unless a guest can have `size` bytes of RAM: whole pages, and neither too few nor too many."""
    if size < MIN_MEMORY_BYTES:
        raise LgmpError(
            f"{size / MIB:.3g} MiB of memory is too little for a guest: give MEM {MIN_MEMORY_BYTES // MIB} or more"
        )
    if size > MAX_MEMORY_BYTES:
        raise LgmpError(
            f"{in_mib(size)} MiB of memory is too much for a 32-bit guest: give MEM {MAX_MEMORY_BYTES // MIB} or less"
        )
    if size % PAGE_SIZE:
        raise LgmpError(f"{size} bytes of memory are not whole pages of {PAGE_SIZE}: give MEM in MiB, such as 64")
