"""Segment descriptors and gates: what a guest asks for is made fit for ring 1, and nothing gives it ring 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded.descriptors import Gate, Segment, fix_descriptor, gate_of, segment_of
from lgmp.hosts.embedded.state import DescriptorTable, GuestKilled

PRESENT = 0x8000
NOT_SYSTEM = 0x1000
DPL = 0x6000
ACCESSED = 0x0100
FLAT_CODE = 0x00CF9A00
FLAT_DATA = 0x00CF9200
OURS = (abi.GDT_ENTRY_LGUEST_CS, abi.GDT_ENTRY_LGUEST_DS, abi.GDT_ENTRY_TSS, abi.GDT_ENTRY_DOUBLEFAULT_TSS)

words = st.integers(0, 0xFFFFFFFF)
guest_indices = st.sampled_from([index for index in range(abi.GDT_ENTRIES) if index not in OURS])


def test_privilege_0_becomes_1_and_the_accessed_bit_is_set() -> None:
    assert fix_descriptor(12, 0xFFFF, FLAT_CODE) == (0xFFFF, 0x00CFBB00)
    assert fix_descriptor(13, 0xFFFF, FLAT_DATA) == (0xFFFF, 0x00CFB300)


@pytest.mark.parametrize("privilege", [1, 2, 3])
def test_other_privileges_stay(privilege: int) -> None:
    asked = FLAT_DATA | privilege << 13
    assert fix_descriptor(6, 0x1234, asked) == (0x1234, asked | ACCESSED)


@pytest.mark.parametrize("index", OURS)
def test_entries_of_the_host_stay_empty(index: int) -> None:
    assert fix_descriptor(index, 0xFFFF, FLAT_CODE | DPL) == (0, 0)


@pytest.mark.parametrize("kind", range(16))
@pytest.mark.parametrize("privilege", range(4))
def test_system_descriptors_become_not_present(kind: int, privilege: int) -> None:
    assert fix_descriptor(20, 0xFFFF, PRESENT | privilege << 13 | kind << 8) == (0, 0)


@given(st.integers(0, 31), words, words)
def test_whatever_is_asked_for_nothing_in_the_table_is_of_ring_0_or_a_system_descriptor(
    index: int, low: int, high: int
) -> None:
    _, fixed = fix_descriptor(index, low, high)
    assert not fixed & PRESENT or (fixed & DPL and fixed & NOT_SYSTEM)


@given(guest_indices, words, words)
def test_what_is_asked_for_is_otherwise_kept(index: int, low: int, high: int) -> None:
    fixed_low, fixed_high = fix_descriptor(index, low, high | NOT_SYSTEM)
    assert fixed_low == low
    assert (fixed_high ^ high) & ~(DPL | ACCESSED | NOT_SYSTEM) == 0
    if high & DPL:
        assert fixed_high & DPL == high & DPL


def test_a_segment_has_base_and_limit_in_bytes() -> None:
    assert segment_of(0x0000FFFF, 0x00CF9300) == Segment(0, 0xFFFFFFFF, 0x00CF9300)
    assert segment_of(0x5678_0FFF, 0x12_4_0_F3_34) == Segment(0x12345678, 0x0FFF, 0x1240F334)
    # 0x12345 pages: the limit is the last byte of the last of them.
    assert segment_of(0x2345, 0x00C1F300).limit == 0x12345FFF


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFF), st.booleans())
def test_base_and_limit_come_out_as_they_went_in(base: int, limit: int, pages: bool) -> None:
    low = limit & 0xFFFF | (base & 0xFFFF) << 16
    high = base >> 16 & 0xFF | base & 0xFF000000 | limit & 0xF0000 | pages << 23 | 0xF300
    assert segment_of(low, high)[:2] == (base, (limit + 1) * 4096 - 1 if pages else limit)


@pytest.mark.parametrize(
    ("high", "code", "stack"),
    [
        (0x00CFBB00, True, False),  # code, ring 1
        (0x00CFB300, False, True),  # writable data, ring 1
        (0x00CFB100, False, False),  # read-only data
        (0x00CF9B00, False, False),  # code of ring 0
        (0x00CFFB00, False, False),  # code of ring 3
        (0x00CFF300, False, False),  # data of ring 3
        (0x00CF3B00, False, False),  # not present
        (0x00CFAB00, False, False),  # a system descriptor
        (0, False, False),
    ],
)
def test_ring_1_runs_and_has_its_stack_in_segments_of_its_own_only(high: int, code: bool, stack: bool) -> None:
    segment = segment_of(0xFFFF, high)
    assert (segment.usable_code, segment.usable_stack) == (code, stack)


@given(words, words)
def test_a_gate_that_is_not_present_is_none_of_any_type(low: int, high: int) -> None:
    assert gate_of(low, high & ~PRESENT) is None


@given(words, st.integers(0, 3), st.booleans())
def test_a_gate_has_handler_kind_and_privilege(handler: int, privilege: int, interrupt: bool) -> None:
    high = handler & 0xFFFF0000 | PRESENT | privilege << 13 | (0xE if interrupt else 0xF) << 8
    assert gate_of(handler & 0xFFFF | 0x610000, high) == Gate(handler, interrupt, privilege)


@pytest.mark.parametrize("kind", range(0xE))
def test_only_interrupt_and_trap_gates_are_gates(kind: int) -> None:
    with pytest.raises(ValueError, match=f"^bad IDT type {kind}$"):
        gate_of(0, PRESENT | kind << 8)


def test_the_table_holds_the_fixed_descriptor_and_its_segment() -> None:
    live = memoryview(bytearray(8 * abi.GDT_ENTRIES)).cast("I")
    table = DescriptorTable(live)
    assert [table.segments[index].flags for index in (12, 13)] == [0x00CFBB00, 0x00CFB300]
    assert [live[2 * index + 1] for index in (12, 13)] == [0x00CFBB00, 0x00CFB300]
    table.load(6, 0x5678FFFF, 0x12CFF234)
    assert (live[12], live[13]) == (0x5678FFFF, 0x12CFF334)
    assert table.segments[6] == Segment(0x12345678, 0xFFFFFFFF, 0x12CFF334)


@pytest.mark.parametrize("index", [32, 33, 0x7FFFFFFF, 0xFFFFFFFF])
def test_there_are_32_descriptors(index: int) -> None:
    table = DescriptorTable(memoryview(bytearray(8 * abi.GDT_ENTRIES)).cast("I"))
    with pytest.raises(GuestKilled, match=f"^too many gdt entries {index}$"):
        table.load(index, 0, 0)
