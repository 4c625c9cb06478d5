"""What becomes of ELF kernels, whole and broken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import (
    CODE,
    E_ENTRY,
    E_IDENT_CLASS,
    E_IDENT_DATA,
    E_MACHINE,
    E_PHENTSIZE,
    E_PHNUM,
    E_PHOFF,
    E_TYPE,
    EHDR,
    MIB,
    PT_NOTE,
    ElfSegment,
    elf_image,
    spoiled,
    write,
)

from lgmp.errors import LgmpError
from lgmp.loader import LoadedGuest, load_guest
from lgmp.memory import GuestMemory

RAM = 4 * MIB
BOOT_AREA_END = 0x1800
NO_HIGHMEM = b"Use a HIGHMEM enabled kernel.\n\0"


def load(directory: Path, image: bytes, ram: int = RAM) -> LoadedGuest:
    with GuestMemory.create(ram) as memory:
        return load_guest(memory, write(directory, image), None, [])


def test_file_bytes_go_to_physical_addresses(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(0x100000, CODE), ElfSegment(0x200000, b"data"), entry=0x100004)
    with GuestMemory.create(RAM) as memory:
        guest = load_guest(memory, write(tmp_path, image), None, [])
        assert bytes(memory.view[0x100000 : 0x100000 + len(CODE)]) == CODE
        assert bytes(memory.view[0x200000:0x200004]) == b"data"
    assert guest.entry == 0x100004
    assert guest.kernel_end == 0x200004
    assert ("ELF segment 1", 0x200000, 4) in guest.segments


def test_memory_beyond_the_file_bytes_reads_as_zeros_even_over_an_earlier_segment(tmp_path: Path) -> None:
    first = ElfSegment(0x100000, CODE + b"x" * 5000)
    second = ElfSegment(0x101000, b"data", memory_bytes=64)
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, write(tmp_path, elf_image(first, second)), None, [])
        assert bytes(memory.view[0x101000:0x101040]) == b"data" + bytes(60)
        assert bytes(memory.view[0x101040:0x101044]) == b"xxxx"


def test_segments_that_are_not_to_be_loaded_are_not(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(), ElfSegment(0, b"a note", kind=PT_NOTE), ElfSegment(0xFFFFF000, b"", kind=PT_NOTE))
    with GuestMemory.create(RAM) as memory:
        guest = load_guest(memory, write(tmp_path, image), None, [])
        assert bytes(memory.view[0:6]) == bytes(6)
    assert guest.kernel_end == 0x100000 + len(CODE)


def test_a_segment_may_end_where_memory_ends(tmp_path: Path) -> None:
    guest = load(tmp_path, elf_image(ElfSegment(memory_bytes=RAM - 0x100000)))
    assert guest.kernel_end == RAM


def test_too_little_memory_names_what_is_enough(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(memory_bytes=6 * MIB + 1))
    with pytest.raises(LgmpError, match=r"vmlinux does not fit in 4 MiB of memory: give MEM 8 or more"):
        load(tmp_path, image)
    with pytest.raises(LgmpError, match="MEM 8"):
        load(tmp_path, image, 7 * MIB)
    assert load(tmp_path, image, 8 * MIB).kernel_end == 7 * MIB + 1


@pytest.mark.parametrize("address", [0xC0100000, 0xFFFFFFF0])
def test_an_address_no_guest_has_is_not_answered_with_a_size(tmp_path: Path, address: int) -> None:
    with pytest.raises(LgmpError, match="not linked at a physical address"):
        load(tmp_path, elf_image(ElfSegment(address, memory_bytes=0x3FFFFFFF), entry=address))


@pytest.mark.parametrize("address", [0, 0xFFF, 0x1000, BOOT_AREA_END - 1])
def test_boot_parameters_and_command_line_are_not_overwritten(tmp_path: Path, address: int) -> None:
    with pytest.raises(LgmpError, match="boot parameters"):
        load(tmp_path, elf_image(ElfSegment(address), entry=address))


def test_right_above_the_command_line_a_kernel_may_lie(tmp_path: Path) -> None:
    assert load(tmp_path, elf_image(ElfSegment(BOOT_AREA_END), entry=BOOT_AREA_END)).entry == BOOT_AREA_END


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (E_IDENT_CLASS, "<B", 2, "not for the i386"),
        (E_IDENT_DATA, "<B", 2, "not for the i386"),
        (E_TYPE, "<H", 3, "not an executable kernel"),
        (E_TYPE, "<H", 0xABCD, "not an executable kernel"),
        (E_MACHINE, "<H", 62, "x86-64 kernel: lguest runs 32-bit guests only; build it with ARCH=i386"),
        (E_MACHINE, "<H", 40, "EM_ARM"),
        (E_MACHINE, "<H", 0xABCD, "not for the i386"),
        (E_PHENTSIZE, "<H", 56, "56 bytes each, not 32"),
        (E_PHNUM, "<H", 0, "0 program headers"),
        (E_PHNUM, "<H", 2049, "2049 program headers"),
        (E_PHNUM, "<H", 0xFFFF, "PN_XNUM program headers"),
        (E_PHNUM, "<H", 2048, "truncated: its table of program headers"),
        (E_PHOFF, "<I", 0xFFFFFFFF, "truncated: its table of program headers"),
        (E_ENTRY, "<I", 0xC0100000, "entry point 0xc0100000"),
        (E_ENTRY, "<I", 0x100000 + len(CODE), "entry point"),
        (EHDR.size, "<I", PT_NOTE, "no segment to load"),
        (EHDR.size + 4, "<I", 0xFFFFFFFF, "truncated: its ELF segment 0"),
        (EHDR.size + 16, "<I", 0xFFFFFFFF, "4294967295 bytes in the file"),
    ],
)
def test_a_header_lguest_cannot_take_is_one_clear_line(
    tmp_path: Path, offset: int, layout: str, value: int, message: str
) -> None:
    image = elf_image(ElfSegment(memory_bytes=8192))
    assert load(tmp_path, image)
    with pytest.raises(LgmpError, match=message) as caught:
        load(tmp_path, spoiled(image, offset, layout, value))
    assert "vmlinux" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_64_bit_header_is_told_apart(tmp_path: Path) -> None:
    image = spoiled(spoiled(elf_image(), E_IDENT_CLASS, "<B", 2), E_MACHINE, "<H", 62)
    with pytest.raises(LgmpError, match="lguest runs 32-bit guests only"):
        load(tmp_path, image)


def test_a_truncated_image_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(), ElfSegment(0x200000, b"data"))
    for length in range(4, len(image)):
        with pytest.raises(LgmpError, match="truncated"):
            load(tmp_path, image[:length])


def test_nothing_of_a_truncated_image_is_loaded(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(), ElfSegment(0x200000, b"data"))
    with GuestMemory.create(RAM) as memory:
        with pytest.raises(LgmpError, match="truncated: its ELF segment 1"):
            load_guest(memory, write(tmp_path, image[:-1]), None, [])
        assert not any(memory.view)


def test_a_kernel_that_is_no_guest_is_told_the_option(tmp_path: Path) -> None:
    with pytest.raises(LgmpError, match="CONFIG_LGUEST_GUEST=y"):
        load(tmp_path, elf_image(ElfSegment(content=b"an ordinary kernel")))


def test_more_memory_than_a_kernel_without_highmem_can_use_is_refused(tmp_path: Path) -> None:
    image = elf_image(ElfSegment(content=CODE + NO_HIGHMEM))
    assert load(tmp_path, image, 891 * MIB)
    with pytest.raises(LgmpError, match="CONFIG_HIGHMEM4G and can use at most 891 MiB: give MEM 891 or less"):
        load(tmp_path, image, 892 * MIB)


def test_a_highmem_kernel_may_have_much_memory(tmp_path: Path) -> None:
    assert load(tmp_path, elf_image(), 892 * MIB)


def test_thousands_of_segments_on_top_of_each_other_are_refused_at_once(tmp_path: Path) -> None:
    heap = [ElfSegment(content=b"", file_bytes=0, memory_bytes=800 * MIB) for _ in range(2047)]
    image = elf_image(ElfSegment(), *heap)
    start = time.monotonic()
    with pytest.raises(LgmpError, match="on top of each other"):
        load(tmp_path, image, 891 * MIB)
    # Zeroing them one by one would take minutes; parsing 2048 headers takes a fraction of a second.
    assert time.monotonic() - start < 5


VALID = elf_image(ElfSegment(memory_bytes=8192), ElfSegment(0x200000, b"data" * 8, memory_bytes=100))
TELLING = st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1000, 0x3FFFFF, 0x400000, 0x400001])
EDITS = st.lists(
    st.tuples(st.integers(0, EHDR.size + 60), st.sampled_from(["<B", "<H", "<I"]), st.one_of(st.integers(0), TELLING)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elf")


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, length=st.one_of(st.none(), st.integers(1, len(VALID))))
def test_a_corrupt_image_loads_within_ram_or_is_refused(
    directory: Path, edits: list[tuple[int, str, int]], length: int | None
) -> None:
    image = VALID
    for offset, layout, value in edits:
        image = spoiled(image, offset, layout, value % {"<B": 1 << 8, "<H": 1 << 16, "<I": 1 << 32}[layout])
    with GuestMemory.create(RAM, device_pages=2) as memory:
        try:
            guest = load_guest(memory, write(directory, image[:length]), None, [])
        except LgmpError as error:
            assert "\n" not in str(error)
        else:
            assert guest.entry < RAM
            for segment in guest.segments:
                if segment.what.startswith("ELF"):
                    assert BOOT_AREA_END <= segment.address <= segment.address + segment.size <= RAM
        assert bytes(memory.view[RAM:]) == bytes(memory.limit - RAM)
