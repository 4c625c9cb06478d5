"""What a guest kernel is told: boot_params (the "zero page") at guest-physical 0, its command line at 0x1000.

Offsets are those of struct boot_params in asm/bootparam.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from lgmp.errors import LgmpError
from lgmp.loader.bzimage import KERNEL_ALIGNMENT, SETUP_HEADER_START
from lgmp.loader.image import BOOT_PARAMS_ADDRESS, COMMAND_LINE_ADDRESS, KernelImage
from lgmp.memory import GuestMemory

E820_ENTRIES = 0x1E8  # u8
ROOT_FLAGS = 0x1F2  # u16
RAM_SIZE = 0x1F8  # u16
VID_MODE = 0x1FA  # u16
ROOT_DEV = 0x1FC  # u16
VERSION = 0x206  # u16
TYPE_OF_LOADER = 0x210  # u8
LOADFLAGS = 0x211  # u8
RAMDISK_IMAGE = 0x218  # u32
RAMDISK_SIZE = 0x21C  # u32
EXT_LOADER_VER = 0x226  # u8, and ext_loader_type after it
CMD_LINE_PTR = 0x228  # u32
KERNEL_ALIGNMENT_FIELD = 0x230  # u32
HARDWARE_SUBARCH = 0x23C  # u32
HARDWARE_SUBARCH_DATA = 0x240  # u64
SETUP_DATA = 0x250  # u64
E820_MAP = 0x2D0  # {u64 address, u64 size, u32 type} each

E820_RAM = 1
LOADER_UNDEFINED = 0xFF
KEEP_SEGMENTS = 0x40
BOOT_PROTOCOL = 0x207
X86_SUBARCH_LGUEST = 1

# What a boot loader decides, not the image: left at 0, as it is for an ELF kernel, so that the two forms of one kernel
# behave alike. (An image's root_flags would mount the root read-only, its root_dev name the root of the machine that
# built it.)
_LOADERS_OWN = (
    (ROOT_FLAGS, 2),
    (RAM_SIZE, 2),
    (VID_MODE, 2),
    (ROOT_DEV, 2),
    (TYPE_OF_LOADER, 1),
    (RAMDISK_IMAGE, 4),
    (RAMDISK_SIZE, 4),
    (EXT_LOADER_VER, 2),
    (HARDWARE_SUBARCH_DATA, 8),
    (SETUP_DATA, 8),
)


def join_arguments(arguments: Sequence[str], most: int) -> bytes:
    """Return the kernel's command line: the arguments joined with spaces, as the bytes they were given as.

    `most`: how many bytes of it the kernel keeps, without the NUL. Raises LgmpError where it is longer, since the
    kernel would drop the rest in silence, and where an argument holds a NUL.
    """
    line = b" ".join(os.fsencode(each) for each in arguments)
    if b"\0" in line:
        raise LgmpError("a kernel argument holds a NUL byte, which ends a command line: leave it out")
    if len(line) > most:
        raise LgmpError(f"the kernel arguments are {len(line)} bytes long and the kernel takes {most}: give fewer")
    return line


def write_boot_params(memory: GuestMemory, image: KernelImage, command_line: bytes, initrd_bytes: int) -> None:
    """Write boot_params and the command line into a guest's fresh memory.

    `initrd_bytes`: what the initrd takes of the top of RAM, in whole pages, or 0 where there is none; the kernel is
    told that size, not the file's, for hosts from 2.6.31 on put the first page directory right below it.

    A bzImage's setup header is carried over for its decompressor to look into, but for what is a loader's to say.
    kernel_alignment is 16 MiB, the most a kernel may be configured for, in later guests: their decompressor reads it
    here. (Those before 2.6.31 have it built in, and keep what their image says.)
    """
    view = memory.view
    header_start = BOOT_PARAMS_ADDRESS + SETUP_HEADER_START
    view[header_start : header_start + len(image.setup_header)] = image.setup_header
    for offset, size in _LOADERS_OWN:
        view[BOOT_PARAMS_ADDRESS + offset : BOOT_PARAMS_ADDRESS + offset + size] = bytes(size)

    def put(layout: str, offset: int, *values: int) -> None:
        struct.pack_into(layout, view, BOOT_PARAMS_ADDRESS + offset, *values)

    put("<B", E820_ENTRIES, 1)
    put("<QQI", E820_MAP, 0, memory.ram_bytes, E820_RAM)
    put("<H", VERSION, BOOT_PROTOCOL)
    put("<B", LOADFLAGS, view[BOOT_PARAMS_ADDRESS + LOADFLAGS] | KEEP_SEGMENTS)
    put("<I", CMD_LINE_PTR, COMMAND_LINE_ADDRESS)
    put("<I", HARDWARE_SUBARCH, X86_SUBARCH_LGUEST)
    if image.later_guest:
        put("<I", KERNEL_ALIGNMENT_FIELD, KERNEL_ALIGNMENT)
    if initrd_bytes:
        put("<B", TYPE_OF_LOADER, LOADER_UNDEFINED)
        put("<II", RAMDISK_IMAGE, memory.ram_bytes - initrd_bytes, initrd_bytes)
    view[COMMAND_LINE_ADDRESS : COMMAND_LINE_ADDRESS + len(command_line) + 1] = command_line + b"\0"
