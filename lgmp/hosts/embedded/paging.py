"""Page tables of the guest: two levels, 4 KiB pages, as the guest's CPU walks them in guest memory.

Pure: these functions read a view of guest memory and say what they find. All entries are hostile.
"""

from __future__ import annotations

from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded.state import GuestKilled
from lgmp.memory import PAGE_SIZE


def check_page_table_entry(entry: int, pfn_limit: int) -> None:
    """Raise GuestKilled for a present entry that names a page outside the guest, or a large page."""
    if entry & abi.PAGE_PRESENT and (entry & abi.PAGE_PSE or entry >> 12 >= pfn_limit):
        raise GuestKilled("bad page table entry")


def check_page_directory(directory: int, pfn_limit: int) -> None:
    """Raise GuestKilled unless this guest-physical address is that of a page of the guest's."""
    if directory & (PAGE_SIZE - 1) or directory >> 12 >= pfn_limit:
        raise GuestKilled(f"bad page directory {directory:#x}")


def check_page_directory_entry(entry: int, pfn_limit: int) -> None:
    """Raise GuestKilled for a present entry that names a page table outside the guest, or has unknown flags."""
    if entry & abi.PAGE_PRESENT and (entry & 0xFFF & ~abi.PAGE_TABLE or entry >> 12 >= pfn_limit):
        raise GuestKilled("bad page directory entry")


def guest_physical(words: memoryview, directory: int, address: int, pfn_limit: int) -> int:
    """The guest-physical address behind a guest-virtual one.

    `words`: guest memory as 32-bit words; `directory`: guest-physical address of the page directory, checked
    already. Raises GuestKilled, with lg's text, where nothing is mapped or what is mapped is outside the guest.
    """
    if address >= abi.SWITCHER_ADDRESS:
        raise GuestKilled(f"Bad address {address:#x}")
    entry = words[(directory >> 2) + (address >> 22)]
    if not entry & abi.PAGE_PRESENT:
        raise GuestKilled(f"Bad address {address:#x}")
    if entry >> 12 >= pfn_limit:
        raise GuestKilled("bad page directory entry")
    entry = words[((entry & 0xFFFFF000) >> 2) + (address >> 12 & 1023)]
    if not entry & abi.PAGE_PRESENT:
        raise GuestKilled(f"Bad address {address:#x}")
    if entry >> 12 >= pfn_limit:
        raise GuestKilled("bad page table entry")
    return (entry & 0xFFFFF000) | (address & 0xFFF)
