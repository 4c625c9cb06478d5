"""Builds a guest's memory from its kernel, its initrd and its kernel arguments.

`load_guest` is the one entry. A broken or hostile image ends in one LgmpError that names the file and the remedy;
nothing is ever written outside RAM, and nothing at all before all headers and sizes have been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lgmp.errors import LgmpError
from lgmp.loader import bzimage, elf
from lgmp.loader.boot_params import join_arguments, write_boot_params
from lgmp.loader.image import (
    BOOT_PARAMS_ADDRESS,
    COMMAND_LINE_ADDRESS,
    ImageFile,
    KernelImage,
    check_fits,
    load_segments,
    page_align,
)
from lgmp.loader.initrd import check_initrd_fits, load_initrd
from lgmp.loader.linux_version import find_version
from lgmp.loader.memory_size import check_memory_size, parse_memory_size
from lgmp.loader.page_tables import page_table_bytes, write_identity_page_tables
from lgmp.memory import PAGE_SIZE, GuestMemory

__all__ = [
    "LoadedGuest",
    "LoadedSegment",
    "check_memory_size",
    "load_guest",
    "map_memory",
    "parse_memory_size",
]

# What a kernel that was packed whole begins with, and what undoes it.
_PACKED = (
    (b"\x1f\x8b", "gunzip"),
    (b"BZh", "bunzip2"),
    (b"\xfd7zXZ\x00", "unxz"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"\x5d\x00\x00", "unlzma"),
)


class LoadedSegment(NamedTuple):
    """Something that was put into guest memory: what it is, its guest-physical address and its size in bytes."""

    what: str
    address: int
    size: int


class LoadedGuest(NamedTuple):
    """A guest whose memory is ready to run.

    `entry`: the guest-physical address to start at; `initrd_bytes`: what the initrd takes of the top of RAM, rounded up
    to pages, 0 without one; `kernel_end`: the first guest-physical address above all the kernel claims; `segments`:
    what was loaded where, for --verbose; `linux_version`: the first two or three numbers of the kernel's version, None
    where the image does not tell.
    """

    entry: int
    initrd_bytes: int
    kernel_end: int
    segments: list[LoadedSegment]
    linux_version: tuple[int, ...] | None = None


def load_guest(memory: GuestMemory, kernel: str, initrd: str | None, arguments: Sequence[str]) -> LoadedGuest:
    """Load a kernel and an initrd into a guest's fresh memory and write boot_params and the command line.

    `kernel`: the file of an ELF kernel or a bzImage; `initrd`: a file, or None; `arguments`: the kernel's, to be joined
    with spaces. Raises LgmpError for whatever is wrong with one of them or does not fit.
    """
    with ImageFile(kernel, "kernel") as kernel_file:
        if initrd is None:
            return _load(memory, kernel_file, None, arguments)
        with ImageFile(initrd, "initrd") as initrd_file:
            return _load(memory, kernel_file, initrd_file, arguments)


def _load(
    memory: GuestMemory, kernel_file: ImageFile, initrd_file: ImageFile | None, arguments: Sequence[str]
) -> LoadedGuest:
    is_elf, image = _read_kernel(kernel_file)
    initrd_bytes = 0 if initrd_file is None else page_align(initrd_file.size)
    check_fits(image, kernel_file.name, initrd_bytes, memory)
    if initrd_file is not None:
        check_initrd_fits(initrd_file, image, memory)
    command_line = join_arguments(arguments, image.command_line_max)

    load_segments(kernel_file, image, memory)
    if is_elf:
        elf.check_guest_kernel(kernel_file, image, memory)
        version = find_version(memory, image)
    else:
        version = image.linux_version
        bzimage.check_highmem(kernel_file, image, memory)
    loaded = [LoadedSegment(each.what, each.address, each.memory_bytes) for each in image.segments]
    if initrd_file is not None:
        loaded.append(LoadedSegment("initrd", load_initrd(initrd_file, memory), initrd_file.size))
    write_boot_params(memory, image, command_line, initrd_bytes)
    loaded.append(LoadedSegment("boot_params", BOOT_PARAMS_ADDRESS, PAGE_SIZE))
    loaded.append(LoadedSegment("command line", COMMAND_LINE_ADDRESS, len(command_line) + 1))
    return LoadedGuest(image.entry, initrd_bytes, image.memory_end, loaded, version)


def map_memory(memory: GuestMemory, guest: LoadedGuest) -> int:
    """Write the first page tables of a guest that starts with paging on; gives its page directory's address.

    They map RAM to itself, and lie right below the initrd. Raises LgmpError where the kernel leaves them no room.
    """
    directory = write_identity_page_tables(memory.view, memory.ram_bytes, guest.initrd_bytes, guest.kernel_end)
    size = page_table_bytes(memory.ram_bytes)
    guest.segments.append(LoadedSegment("page tables", directory + PAGE_SIZE - size, size))
    return directory


def _read_kernel(file: ImageFile) -> tuple[bool, KernelImage]:
    """Return whether the kernel is ELF, and how to load it."""
    start = file.read_at(0, min(file.size, 8), "content")
    if start.startswith(elf.ELFMAG):
        return True, elf.read_elf(file)
    for magic, remedy in _PACKED:
        if start.startswith(magic):
            raise LgmpError(
                f"{bzimage.NO_BZIMAGE}: {file.name} is compressed: {remedy} it first (a bzImage is taken as it is)"
            )
    return False, bzimage.read_bzimage(file)
