"""bzImage kernels: the Linux/x86 32-bit boot protocol, as far as lguest has a part in it.

The guest is entered at code32_start, in protected mode, and unpacks itself; the 16-bit setup code is not run. Offsets
are those of Documentation/x86/boot.txt, which are the same in the file and in boot_params.
"""

from __future__ import annotations

import struct

from lgmp.errors import LgmpError
from lgmp.loader.elf import NEEDS_32_BIT, NO_HIGHMEM_MARKER, no_highmem
from lgmp.loader.image import COMMAND_LINE_SIZE, ImageFile, KernelImage, Payload, Segment
from lgmp.loader.linux_version import VERSION_BYTES, parse_version
from lgmp.loader.memory_size import LOWMEM_BYTES, MIB
from lgmp.memory import GuestMemory

# Where loadflags has LOADED_HIGH: the protected-mode code is loaded here.
LOAD_ADDRESS = 0x100000
SECTOR = 512
DEFAULT_SETUP_SECTS = 4

SETUP_HEADER_START = 0x1F1
# Protocol 2.07's header ends here; boot_params has other things from EDD_MBR_SIG on.
SETUP_HEADER_MIN_END = 0x248
EDD_MBR_SIG = 0x290

MAGIC = b"HdrS"
# In the words of the original launcher.
NO_BZIMAGE = "This doesn't look like a bzImage to me"
SETUP_SECTS = 0x1F1  # u8
SYSSIZE = 0x1F4  # u32, in paragraphs of 16 bytes
JUMP_OFFSET = 0x201  # u8: how far past 0x202 the header ends
HEADER = 0x202
VERSION = 0x206  # u16
KERNEL_VERSION = 0x20E  # u16: where the text of its version is, from 0x200 on
LOADFLAGS = 0x211  # u8
CODE32_START = 0x214  # u32
RELOCATABLE_KERNEL = 0x234  # u8
XLOADFLAGS = 0x236  # u16, 2.12
CMDLINE_SIZE = 0x238  # u32, 2.06, without the NUL
PAYLOAD_OFFSET = 0x248  # u32, 2.08, from the start of the protected-mode code
PAYLOAD_LENGTH = 0x24C  # u32, 2.08
PREF_ADDRESS = 0x258  # u64, 2.10
INIT_SIZE = 0x260  # u32, 2.10

LOADED_HIGH = 0x01
XLF_KERNEL_64 = 0x0001

KERNEL_VERSION_BASE = 0x200

PROTOCOL_SUBARCH = 0x207  # 2.6.24: hardware_subarch
PROTOCOL_PAYLOAD = 0x208  # 2.6.26
PROTOCOL_INIT_SIZE = 0x20A  # 2.6.31
PROTOCOL_XLOADFLAGS = 0x20C  # 3.8

# What boot_params.py gives a later guest as kernel_alignment, so where a relocatable kernel unpacks itself.
KERNEL_ALIGNMENT = 16 * MIB


def read_bzimage(file: ImageFile) -> KernelImage:
    """Return how to load a bzImage: its protected-mode code at 1 MiB, entered at code32_start.

    Raises LgmpError for what is no bzImage, or one that cannot be an lguest guest: boot protocol before 2.07 (which
    has no hardware_subarch), zImage, 64-bit.
    """
    header = file.read_at(0, min(file.size, EDD_MBR_SIG), "boot sector")
    if header[HEADER : HEADER + len(MAGIC)] != MAGIC:
        raise LgmpError(
            f"{NO_BZIMAGE}: {file.name} is neither ELF nor a bzImage; give the kernel's vmlinux or "
            "arch/x86/boot/bzImage"
        )
    if len(header) < EDD_MBR_SIG:
        raise file.truncated("setup header")
    _check_kind(file, header)

    start = ((header[SETUP_SECTS] or DEFAULT_SETUP_SECTS) + 1) * SECTOR
    size = file.size - start
    if size <= 0 or size + 15 < _u32(header, SYSSIZE) * 16:
        raise file.truncated("protected-mode code")
    entry = _u32(header, CODE32_START)
    if not LOAD_ADDRESS <= entry < LOAD_ADDRESS + size:
        raise LgmpError(
            f"{file.name} is malformed: its entry point code32_start {entry:#x} is not in the code loaded at "
            f"{LOAD_ADDRESS:#x}; copy or build it again"
        )

    version = _u16(header, VERSION)
    header_end = min(max(HEADER + header[JUMP_OFFSET], SETUP_HEADER_MIN_END), EDD_MBR_SIG)
    return KernelImage(
        entry=entry,
        segments=(Segment("bzImage", start, size, LOAD_ADDRESS, size),),
        memory_end=max(LOAD_ADDRESS + size, _unpacked_end(header, version)),
        command_line_max=min(_u32(header, CMDLINE_SIZE) or COMMAND_LINE_SIZE - 1, COMMAND_LINE_SIZE - 1),
        setup_header=header[SETUP_HEADER_START:header_end],
        later_guest=version >= PROTOCOL_INIT_SIZE,
        payload=_payload(header, version, size),
        linux_version=_linux_version(file, header, start),
    )


def check_highmem(file: ImageFile, image: KernelImage, memory: GuestMemory) -> None:
    """Unpack the payload of a loaded bzImage, if need be, to see whether the kernel can use all of the memory.

    Raises LgmpError where it cannot (built without CONFIG_HIGHMEM) and where the payload is damaged. Says nothing
    about kernels of before 2.6.26, whose header does not tell where the payload is, nor about LZO and LZ4 ones.
    """
    if memory.ram_bytes <= LOWMEM_BYTES or image.payload is None:
        return
    from lgmp.loader.payload import payload_contains  # noqa: PLC0415 - bz2 and lzma are seldom wanted

    address, length = image.payload.address, image.payload.length
    with memory.view[address : address + length] as packed:
        if payload_contains(packed, NO_HIGHMEM_MARKER, file.name):
            raise no_highmem(file.name)


def _check_kind(file: ImageFile, header: bytes) -> None:
    version = _u16(header, VERSION)
    if version < PROTOCOL_SUBARCH:
        raise LgmpError(
            f"{file.name} is too old for lguest: boot protocol {version >> 8}.{version & 0xFF:02} has no "
            "hardware_subarch, 2.07 is needed; give its vmlinux, or a kernel of 2.6.24 or later"
        )
    if version >= PROTOCOL_XLOADFLAGS and _u16(header, XLOADFLAGS) & XLF_KERNEL_64:
        raise LgmpError(f"{file.name} {NEEDS_32_BIT}")
    if not header[LOADFLAGS] & LOADED_HIGH:
        raise LgmpError(f"{file.name} is a zImage: lguest needs a bzImage (make bzImage) or the vmlinux")


def _unpacked_end(header: bytes, version: int) -> int:
    """Where the memory ends that the kernel needs to unpack itself and to start; 0 where the header does not say."""
    if version < PROTOCOL_INIT_SIZE:
        return 0
    (runtime_start,) = struct.unpack_from("<Q", header, PREF_ADDRESS)
    if header[RELOCATABLE_KERNEL]:
        # To the first multiple of kernel_alignment above where it was loaded, and from 3.14 on not below pref_address.
        runtime_start = max(-(-LOAD_ADDRESS // KERNEL_ALIGNMENT) * KERNEL_ALIGNMENT, runtime_start)
    return int(runtime_start) + _u32(header, INIT_SIZE)


def _payload(header: bytes, version: int, size: int) -> Payload | None:
    if version < PROTOCOL_PAYLOAD:
        return None
    offset, length = _u32(header, PAYLOAD_OFFSET), _u32(header, PAYLOAD_LENGTH)
    return Payload(LOAD_ADDRESS + offset, length) if length and offset + length <= size else None


def _linux_version(file: ImageFile, header: bytes, setup_end: int) -> tuple[int, ...] | None:
    pointer = _u16(header, KERNEL_VERSION)
    at = KERNEL_VERSION_BASE + pointer
    if not pointer or at >= setup_end:
        return None
    return parse_version(file.read_at(at, min(VERSION_BYTES, setup_end - at), "kernel version"))


def _u16(header: bytes, offset: int) -> int:
    return int.from_bytes(header[offset : offset + 2], "little")


def _u32(header: bytes, offset: int) -> int:
    return int.from_bytes(header[offset : offset + 4], "little")
