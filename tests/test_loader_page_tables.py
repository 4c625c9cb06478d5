"""The first page tables of guests of the seed's era."""

from __future__ import annotations

import struct

import pytest

from lgmp.errors import LgmpError
from lgmp.loader.page_tables import page_table_bytes, write_identity_page_tables

MIB = 1 << 20


def translate(view: memoryview, directory: int, address: int) -> int | None:
    """Walk the tables as an i386 does."""
    (entry,) = struct.unpack_from("<I", view, directory + (address >> 22) * 4)
    if entry & 7 != 7:
        return None
    (entry,) = struct.unpack_from("<I", view, (entry & ~0xFFF) + (address >> 12 & 0x3FF) * 4)
    return None if entry & 7 != 7 else (entry & ~0xFFF) | address & 0xFFF


@pytest.mark.parametrize("ram", [4 * MIB, 5 * MIB, 16 * MIB + 4096])
def test_every_page_of_ram_is_mapped_to_itself_and_nothing_else_is(ram: int) -> None:
    view = memoryview(bytearray(b"\xff" * ram))
    directory = write_identity_page_tables(view, ram, 0)
    for page in range(0, ram, 4096):
        assert translate(view, directory, page + 5) == page + 5
    for page in range(ram, ram + 8 * MIB, 4096):
        assert translate(view, directory, page) is None
    assert translate(view, directory, 0xC0000000) is None


def test_they_lie_right_below_the_initrd() -> None:
    view = memoryview(bytearray(8 * MIB))
    view[8 * MIB - 8192 :] = b"i" * 8192
    directory = write_identity_page_tables(view, 8 * MIB, 8192)
    assert directory == 8 * MIB - 8192 - 4096
    assert bytes(view[8 * MIB - 8192 :]) == b"i" * 8192
    # Two tables for 8 MiB, below the directory; nothing below those.
    assert bytes(view[: directory - 2 * 4096]) == bytes(directory - 2 * 4096)
    assert struct.unpack_from("<3I", view, directory) == (directory - 8192 | 7, directory - 4096 | 7, 0)


def test_there_has_to_be_room_above_the_kernel() -> None:
    view = memoryview(bytearray(8 * MIB))
    room = 8 * MIB - page_table_bytes(8 * MIB)
    write_identity_page_tables(view, 8 * MIB, 0, kernel_end=room)
    with pytest.raises(LgmpError, match="give MEM 9 or more"):
        write_identity_page_tables(view, 8 * MIB, 0, kernel_end=room + 1)
