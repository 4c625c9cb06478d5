"""The words of /dev/lguest, byte by byte, and which era's they are."""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.hosts.kernel import protocol
from lgmp.hosts.kernel.protocol import LGUEST_ABI_2_6_25, LGUEST_ABI_2_6_30, LGUEST_ABI_2_6_31, LguestAbi

# A machine's unsigned long, as the module reads it: i386 has 4 bytes of it, x86-64 would have 8.
WORD = {2**31 - 1: 4, 2**63 - 1: 8}[sys.maxsize]


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(WORD, "little") for number in numbers)


def test_a_word_is_the_hosts_unsigned_long() -> None:
    assert protocol.WORD_BYTES == WORD


@pytest.mark.parametrize("abi", [LGUEST_ABI_2_6_30, LGUEST_ABI_2_6_31])
def test_initialize_is_four_words_from_2_6_30_on(abi: LguestAbi) -> None:
    written = protocol.initialize(abi, 0x40000000, 0x1007, None, 0x100000)

    assert written == words(0, 0x40000000, 0x1007, 0x100000)


def test_initialize_is_five_words_before_with_the_page_directory_fourth() -> None:
    written = protocol.initialize(LGUEST_ABI_2_6_25, 0x40000000, 0x1007, 0xFFF000, 0x100000)

    assert written == words(0, 0x40000000, 0x1007, 0xFFF000, 0x100000)


def test_initialize_returns_the_bytes_of_its_arguments() -> None:
    taken = [abi.taken for abi in (LGUEST_ABI_2_6_25, LGUEST_ABI_2_6_30, LGUEST_ABI_2_6_31)]
    assert taken == [4 * WORD, 3 * WORD, 3 * WORD]


def test_the_other_requests() -> None:
    assert protocol.irq(15) == words(2, 15)
    assert protocol.break_out(True) == words(3, 1)
    assert protocol.break_out(False) == words(3, 0)
    assert protocol.eventfd(0x1001000, 9) == words(4, 0x1001000, 9)


def test_an_address_that_no_word_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        protocol.eventfd(1 << 8 * WORD, 9)


def test_a_notify_is_one_word() -> None:
    assert protocol.parse_notify(memoryview(words(0x1001000))) == 0x1001000


@pytest.mark.parametrize("size", [0, 1, WORD - 1, WORD + 1, 1024])
def test_anything_else_is_no_notify(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        protocol.parse_notify(memoryview(bytes(size)))


def test_the_reason_of_a_death_ends_at_its_nul() -> None:
    assert protocol.parse_reason(b"CRASH: Power down\0left over") == "CRASH: Power down"


@given(st.binary(max_size=2048))
def test_any_bytes_are_some_reason(raw: bytes) -> None:
    reason = protocol.parse_reason(raw)

    assert "\0" not in reason
    assert len(reason) < protocol.REASON_BYTES


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ((2, 6, 25), "2.6.25"),
        ((2, 6, 29), "2.6.25"),
        ((2, 6, 30), "2.6.30"),
        ((2, 6, 31), "2.6.31"),
        ((2, 6, 39), "2.6.31"),
        ((3, 0), "2.6.31"),
        ((3, 12, 17), "2.6.31"),
        ((3, 19, 8), "2.6.31"),
    ],
)
def test_the_era_goes_by_the_kernels_version(version: tuple[int, ...], name: str) -> None:
    abi = protocol.abi_of(version)

    assert abi is not None
    assert abi.name == name


@pytest.mark.parametrize("version", [(), (2, 4, 37), (2, 6, 24), (4, 0), (4, 13), (6, 18)])
def test_other_kernels_have_no_lguest_that_lgmp_could_use(version: tuple[int, ...]) -> None:
    assert protocol.abi_of(version) is None


def test_what_the_eras_allow() -> None:
    old, between, new = LGUEST_ABI_2_6_25, LGUEST_ABI_2_6_30, LGUEST_ABI_2_6_31

    assert (between.page_directory, between.breaks, between.eventfds) == (False, True, False)
    assert not between.irq_from_any_thread
    assert (old.page_directory, old.breaks, old.eventfds, old.irq_from_any_thread) == (True, True, False, False)
    assert (new.page_directory, new.breaks, new.eventfds, new.irq_from_any_thread) == (False, False, True, True)


def test_words_are_native() -> None:
    assert struct.pack("@L", 1) == words(1)
