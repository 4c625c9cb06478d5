"""What the MEM argument may be."""

from __future__ import annotations

import pytest

from lgmp.errors import LgmpError
from lgmp.loader import check_memory_size, parse_memory_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64 * MIB),
        ("064", 64 * MIB),
        ("64M", 64 * MIB),
        ("64m", 64 * MIB),
        ("64MB", 64 * MIB),
        ("64MiB", 64 * MIB),
        ("1G", 1024 * MIB),
        ("2gb", 2048 * MIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-64", "+64", "64K", "1.5G", "64 M", "M", "0x40", "1e3", "64MM", "64\n", "٦٤", "vmlinux"]
)
def test_garbage_is_answered_with_an_example(text: str) -> None:
    with pytest.raises(LgmpError, match=r"give MEM in MiB, such as 64, or with a unit, such as 64M or 1G"):
        parse_memory_size(text)


@pytest.mark.parametrize("text", ["0", "000", "0M", "0G"])
def test_none_at_all_is_refused(text: str) -> None:
    with pytest.raises(LgmpError, match="0 bytes of memory"):
        parse_memory_size(text)


@pytest.mark.parametrize("text", ["9999999999", "9" * 5000])
def test_a_number_beyond_reason_is_too_big(text: str) -> None:
    with pytest.raises(LgmpError, match="too big for a 32-bit guest: give at most 4091"):
        parse_memory_size(text)


@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB, 4091 * MIB])
def test_sizes_a_guest_can_have(size: int) -> None:
    check_memory_size(size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4 * MIB - 4096, "give MEM 4 or more"),
        # 256 device pages above it would reach into the topmost 4 MiB, the switcher's.
        (4092 * MIB, "give MEM 4091 or less"),
        (4096 * MIB, "give MEM 4091 or less"),
        (64 * MIB + 1, "whole pages"),
    ],
)
def test_sizes_a_guest_cannot_have(size: int, message: str) -> None:
    with pytest.raises(LgmpError, match=message):
        check_memory_size(size)
