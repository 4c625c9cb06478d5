"""What the guest kernel is told: boot_params, the command line and the initrd."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from images import CODE, MIB, BzImage, ElfSegment, elf_image, write

from lgmp.errors import LgmpError
from lgmp.loader import LoadedGuest, load_guest
from lgmp.memory import GuestMemory

RAM = 32 * MIB


def field(memory: GuestMemory, layout: str, offset: int) -> tuple[int, ...]:
    return struct.unpack_from(layout, memory.view, offset)


def test_boot_params_of_an_elf_kernel_are_these_bytes_and_no_others(tmp_path: Path) -> None:
    expected = bytearray(4096)
    expected[0x1E8] = 1
    struct.pack_into("<H", expected, 0x206, 0x207)
    expected[0x211] = 0x40
    struct.pack_into("<I", expected, 0x228, 0x1000)
    struct.pack_into("<I", expected, 0x230, 16 * MIB)
    struct.pack_into("<I", expected, 0x23C, 1)
    struct.pack_into("<QQI", expected, 0x2D0, 0, RAM, 1)
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, write(tmp_path, elf_image()), None, [])
        assert bytes(memory.view[:4096]) == bytes(expected)


def test_an_initrd_is_announced(tmp_path: Path) -> None:
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, write(tmp_path, elf_image()), write(tmp_path, b"r" * 5000, "initrd"), [])
        assert field(memory, "<B", 0x210) == (0xFF,)
        assert field(memory, "<II", 0x218) == (RAM - 8192, 8192)


@pytest.mark.parametrize(("version", "alignment"), [(0x20C, 16 * MIB), (0x20A, 16 * MIB), (0x209, 2 * MIB)])
def test_kernel_alignment_is_lguests_own_for_later_guests_only(tmp_path: Path, version: int, alignment: int) -> None:
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, write(tmp_path, BzImage(version=version).pack()), None, [])
        assert field(memory, "<I", 0x230) == (alignment,)


def test_a_bzimage_s_header_is_carried_over_but_for_what_is_the_loaders_to_say(tmp_path: Path) -> None:
    image = BzImage(init_size=0x123456).pack()
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, write(tmp_path, image), None, [])
        assert field(memory, "<I", 0x260) == (0x123456,)
        assert bytes(memory.view[0x202:0x206]) == b"HdrS"
        assert field(memory, "<H", 0x206) == (0x207,)
        assert field(memory, "<B", 0x211) == (0x41,)  # LOADED_HIGH is the image's, KEEP_SEGMENTS is ours
        assert field(memory, "<I", 0x23C) == (1,)
        sentinel, root_flags, vid_mode, root_dev = (
            field(memory, "<B", 0x1EF),
            field(memory, "<H", 0x1F2),
            field(memory, "<H", 0x1FA),
            field(memory, "<H", 0x1FC),
        )
    assert (sentinel, root_flags, vid_mode, root_dev) == ((0,), (0,), (0,), (0,))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], b""),
        (["root=/dev/vda", "quiet"], b"root=/dev/vda quiet"),
        ([os.fsdecode(b"name=\xff\xfe"), "ä"], b"name=\xff\xfe \xc3\xa4"),
    ],
)
def test_arguments_are_joined_and_terminated(tmp_path: Path, arguments: list[str], line: bytes) -> None:
    with GuestMemory.create(RAM) as memory:
        guest = load_guest(memory, write(tmp_path, elf_image()), None, arguments)
        assert bytes(memory.view[0x1000 : 0x1000 + len(line) + 1]) == line + b"\0"
    assert ("command line", 0x1000, len(line) + 1) in guest.segments


def test_arguments_may_be_as_long_as_the_kernel_keeps_and_no_longer(tmp_path: Path) -> None:
    # A kernel right above the longest command line would show if that ran into it.
    kernel = write(tmp_path, elf_image(ElfSegment(0x1800), entry=0x1800))
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, kernel, None, ["x" * 2047])
        assert bytes(memory.view[0x17FE:0x1800]) == b"x\0"
        assert bytes(memory.view[0x1800 : 0x1800 + len(CODE)]) == CODE
    with GuestMemory.create(RAM) as memory, pytest.raises(LgmpError, match="2048 bytes long and the kernel takes 2047"):
        load_guest(memory, kernel, None, ["x" * 2046, "y"])


def test_a_bzimage_that_keeps_less_is_not_given_more(tmp_path: Path) -> None:
    kernel = write(tmp_path, BzImage(cmdline_size=255).pack())
    with GuestMemory.create(RAM) as memory:
        load_guest(memory, kernel, None, ["x" * 255])
    with GuestMemory.create(RAM) as memory, pytest.raises(LgmpError, match="the kernel takes 255"):
        load_guest(memory, kernel, None, ["x" * 256])


def test_a_nul_in_an_argument_is_refused(tmp_path: Path) -> None:
    with GuestMemory.create(RAM) as memory, pytest.raises(LgmpError, match="NUL"):
        load_guest(memory, write(tmp_path, elf_image()), None, ["a\0b"])


def load_initrd(tmp_path: Path, kernel: bytes, initrd: bytes, ram: int) -> LoadedGuest:
    with GuestMemory.create(ram) as memory:
        return load_guest(memory, write(tmp_path, kernel), write(tmp_path, initrd, "initrd"), [])


@pytest.mark.parametrize(("size", "pages"), [(1, 1), (4096, 1), (4097, 2)])
def test_the_initrd_lies_at_the_top_of_ram_in_whole_pages(tmp_path: Path, size: int, pages: int) -> None:
    content = b"\xa5" * size
    with GuestMemory.create(RAM) as memory:
        guest = load_guest(memory, write(tmp_path, elf_image()), write(tmp_path, content, "initrd"), [])
        start = RAM - pages * 4096
        assert bytes(memory.view[start:RAM]) == content.ljust(pages * 4096, b"\0")
        assert bytes(memory.view[RAM : RAM + 4096]) == bytes(4096)
    assert guest.initrd_bytes == pages * 4096
    assert ("initrd", start, size) in guest.segments


def test_without_an_initrd_there_are_none_of_its_bytes(tmp_path: Path) -> None:
    with GuestMemory.create(RAM) as memory:
        assert load_guest(memory, write(tmp_path, elf_image()), None, []).initrd_bytes == 0


def test_an_initrd_may_touch_the_kernel_but_not_overlap_it(tmp_path: Path) -> None:
    kernel = elf_image(ElfSegment(memory_bytes=2 * MIB))
    assert load_initrd(tmp_path, kernel, bytes(MIB), 4 * MIB).initrd_bytes == MIB
    with pytest.raises(
        LgmpError, match=r"initrd .*initrd does not fit above the kernel in 4 MiB .*: give MEM 5 or more"
    ):
        load_initrd(tmp_path, kernel, bytes(MIB + 1), 4 * MIB)
    assert load_initrd(tmp_path, kernel, bytes(MIB + 1), 5 * MIB)


def test_an_initrd_keeps_clear_of_where_a_bzimage_unpacks_itself(tmp_path: Path) -> None:
    kernel = BzImage(init_size=2 * MIB).pack()
    with pytest.raises(LgmpError, match="give MEM 5 or more"):
        load_initrd(tmp_path, kernel, bytes(MIB + 1), 4 * MIB)


def test_a_kernel_that_does_not_fit_is_told_a_size_that_holds_the_initrd_too(tmp_path: Path) -> None:
    kernel = elf_image(ElfSegment(memory_bytes=8 * MIB))
    with pytest.raises(LgmpError, match="vmlinux does not fit in 4 MiB of memory: give MEM 11 or more"):
        load_initrd(tmp_path, kernel, bytes(2 * MIB), 4 * MIB)
    assert load_initrd(tmp_path, kernel, bytes(2 * MIB), 11 * MIB)


def test_an_initrd_bigger_than_any_guest_is_refused_without_a_size(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(1 << 40)
    with GuestMemory.create(RAM) as memory, pytest.raises(LgmpError, match="too big for a 32-bit guest"):
        load_guest(memory, write(tmp_path, elf_image()), str(initrd), [])
