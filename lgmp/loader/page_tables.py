"""The first page tables of a guest that starts with paging on, as those before 3.1 do.

To 2.6.29 it was for the launcher to make them, and after that for the host, which put them in the same place. A guest
of 3.1 or later starts with linear memory, and nothing here is wanted.
"""

from __future__ import annotations

import struct

from lgmp.errors import LgmpError
from lgmp.loader.memory_size import in_mib
from lgmp.memory import PAGE_SIZE

ENTRIES_PER_PAGE = PAGE_SIZE // 4
# _PAGE_PRESENT | _PAGE_RW | _PAGE_USER
PAGE_FLAGS = 0x7


def page_table_bytes(ram_bytes: int) -> int:
    """Return the bytes that the identity page tables for `ram_bytes` of RAM take: the directory and its tables."""
    return (1 + _table_count(ram_bytes)) * PAGE_SIZE


def write_identity_page_tables(view: memoryview, ram_bytes: int, initrd_bytes: int, kernel_end: int = 0) -> int:
    """Map all of RAM to itself, and return the guest-physical address of the page directory (for INITIALIZE).

    `view` is guest memory; the directory goes right below the initrd (`initrd_bytes`: whole pages, at the top of RAM)
    and the page tables below it. Device pages are not mapped: the guest maps those itself. Raises LgmpError where that
    would reach below `kernel_end`.
    """
    directory = ram_bytes - initrd_bytes - PAGE_SIZE
    tables = directory - _table_count(ram_bytes) * PAGE_SIZE
    if tables < kernel_end:
        needed = kernel_end + page_table_bytes(ram_bytes) + initrd_bytes
        raise LgmpError(f"there is no room for the guest's page tables: give MEM {in_mib(needed)} or more")
    entries = [0] * ENTRIES_PER_PAGE
    for number in range(_table_count(ram_bytes)):
        table = tables + number * PAGE_SIZE
        entries[number] = table | PAGE_FLAGS
        first = number * ENTRIES_PER_PAGE * PAGE_SIZE
        last = min(first + ENTRIES_PER_PAGE * PAGE_SIZE, ram_bytes)
        mapped = range(first | PAGE_FLAGS, last, PAGE_SIZE)
        struct.pack_into(f"<{ENTRIES_PER_PAGE}I", view, table, *mapped, *[0] * (ENTRIES_PER_PAGE - len(mapped)))
    struct.pack_into(f"<{ENTRIES_PER_PAGE}I", view, directory, *entries)
    return directory


def _table_count(ram_bytes: int) -> int:
    return -(-ram_bytes // (ENTRIES_PER_PAGE * PAGE_SIZE))
