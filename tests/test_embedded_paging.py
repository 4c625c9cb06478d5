"""The host's own walk of a guest's page tables: right where they are right, and an end with a reason where not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded.paging import check_page_directory_entry, check_page_table_entry, guest_physical
from lgmp.hosts.embedded.state import GuestKilled

PAGES = 16
DIRECTORY = 0x2000
TABLE = 0x3000
entries = st.integers(0, 0xFFFFFFFF)


def memory(directory_entries: dict[int, int], table_entries: dict[int, int]) -> memoryview:
    words = memoryview(bytearray(PAGES * 4096)).cast("I")
    for index, entry in directory_entries.items():
        words[(DIRECTORY >> 2) + index] = entry
    for index, entry in table_entries.items():
        words[(TABLE >> 2) + index] = entry
    return words


@given(
    st.integers(0, 1022), st.integers(0, 1023), st.integers(0, 4095), st.integers(0, PAGES - 1), st.integers(0, 0x7F)
)
def test_an_address_is_found_through_both_levels(
    directory: int, table: int, offset: int, page: int, flags: int
) -> None:
    words = memory({directory: TABLE | 7}, {table: page << 12 | flags | 1})
    assert guest_physical(words, DIRECTORY, directory << 22 | table << 12 | offset, PAGES) == page << 12 | offset


def test_what_is_not_mapped_ends_the_guest_with_the_address() -> None:
    words = memory({0: TABLE | 7, 1: 0xFFFFF006}, {1: 0xFFFFF006})
    for address in (0x0, 0x1234, 0x2000, 0x400000, 0x80000000):
        with pytest.raises(GuestKilled, match=f"^Bad address {address:#x}$"):
            guest_physical(words, DIRECTORY, address, PAGES)


@pytest.mark.parametrize("address", [0xFFC00000, 0xFFC00FFF, 0xFFFFFFFF])
def test_addresses_of_the_host_are_bad_whatever_the_last_entry_says(address: int) -> None:
    words = memory({1023: TABLE | 7}, {0: 7, 1023: 7})
    with pytest.raises(GuestKilled, match=f"^Bad address {address:#x}$"):
        guest_physical(words, DIRECTORY, address, PAGES)


@pytest.mark.parametrize("page", [PAGES, PAGES + 1, 0x80000, 0xFFC00, 0xFFFFF])
def test_page_tables_and_pages_outside_the_guest_end_it(page: int) -> None:
    with pytest.raises(GuestKilled, match=r"^bad page directory entry$"):
        guest_physical(memory({0: page << 12 | 7}, {}), DIRECTORY, 0, PAGES)
    with pytest.raises(GuestKilled, match=r"^bad page table entry$"):
        guest_physical(memory({0: TABLE | 7}, {0: page << 12 | 7}), DIRECTORY, 0, PAGES)


@given(entries, entries, st.integers(0, 0xFFFFFFFF))
def test_any_tables_give_an_address_in_the_guest_or_its_end(upper: int, lower: int, address: int) -> None:
    raw = memoryview(bytearray(PAGES * 4096)).cast("I")
    # Wherever the walk goes within the guest, it finds these; half of them within the guest.
    for number in range(len(raw)):
        raw[number] = lower & 0xFFFF if number & 1 else lower
    raw[(DIRECTORY >> 2) + (address >> 22)] = upper & 0xFFFF if address & 1 else upper
    try:
        found = guest_physical(raw, DIRECTORY, address, PAGES)
    except GuestKilled:
        return
    assert 0 <= found < PAGES * 4096


def test_the_last_page_of_the_guest_may_be_mapped_and_the_next_not() -> None:
    check_page_table_entry((PAGES - 1) << 12 | 7, PAGES)
    with pytest.raises(GuestKilled, match=r"^bad page table entry$"):
        check_page_table_entry(PAGES << 12 | 7, PAGES)


@given(entries)
def test_a_page_table_entry_is_good_when_absent_or_a_small_page_of_the_guest(entry: int) -> None:
    good = not entry & abi.PAGE_PRESENT or (not entry & abi.PAGE_PSE and entry >> 12 < PAGES)
    try:
        check_page_table_entry(entry, PAGES)
    except GuestKilled as killed:
        assert (good, str(killed)) == (False, "bad page table entry")
    else:
        assert good


@given(entries)
def test_a_page_directory_entry_is_good_when_absent_or_plain_and_in_the_guest(entry: int) -> None:
    good = not entry & abi.PAGE_PRESENT or (not entry & 0xF98 and entry >> 12 < PAGES)
    try:
        check_page_directory_entry(entry, PAGES)
    except GuestKilled as killed:
        assert (good, str(killed)) == (False, "bad page directory entry")
    else:
        assert good
