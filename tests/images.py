"""Kernel images for the loader's tests, packed field by field: as small as they can be and still be taken."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
PT_LOAD = 1
PT_NOTE = 4
EHDR = struct.Struct("<4s5B7xHHIIIIIHHHHHH")
PHDR = struct.Struct("<8I")

# Where the fields of an ELF header are, to spoil them.
E_IDENT_CLASS, E_IDENT_DATA = 4, 5
E_TYPE, E_MACHINE, E_ENTRY, E_PHOFF, E_PHENTSIZE, E_PHNUM = 16, 18, 24, 28, 42, 44

# A guest kernel names its hypervisor somewhere.
CODE = b"\x90" * 16 + b"this runs under lguest\0"


@dataclass
class ElfSegment:
    """A program header and its bytes; `memory_bytes` and `file_bytes` are those of `content` unless given."""

    address: int = 0x100000
    content: bytes = CODE
    memory_bytes: int | None = None
    file_bytes: int | None = None
    kind: int = PT_LOAD


def elf_image(*segments: ElfSegment, entry: int = 0x100000) -> bytes:
    """Return an ELF32 i386 executable of the segments, or of one at 1 MiB."""
    segments = segments or (ElfSegment(),)
    offset = EHDR.size + PHDR.size * len(segments)
    headers = EHDR.pack(
        *(b"\x7fELF", 1, 1, 1, 0, 0),
        *(2, 3, 1, entry, EHDR.size, 0, 0),
        *(EHDR.size, PHDR.size, len(segments), 0, 0, 0),
    )
    for each in segments:
        file_bytes = len(each.content) if each.file_bytes is None else each.file_bytes
        memory_bytes = file_bytes if each.memory_bytes is None else each.memory_bytes
        headers += PHDR.pack(
            each.kind, offset, each.address + 0xC0000000 & 0xFFFFFFFF, each.address, file_bytes, memory_bytes, 7, 4096
        )
        offset += len(each.content)
    return headers + b"".join(each.content for each in segments)


@dataclass
class BzImage:
    """The fields of a bzImage's setup header that matter to a launcher."""

    code: bytes = CODE
    setup_sects: int = 1
    magic: bytes = b"HdrS"
    version: int = 0x20C
    loadflags: int = 1
    code32_start: int = 0x100000
    kernel_alignment: int = 0x200000
    relocatable_kernel: int = 0
    xloadflags: int = 0
    cmdline_size: int = 2047
    payload_offset: int = 0
    payload_length: int = 0
    pref_address: int = 0x100000
    init_size: int = 0x100000
    syssize: int | None = None

    def pack(self) -> bytes:
        """Return the image's bytes."""
        sectors = (self.setup_sects or 4) + 1
        image = bytearray(sectors * 512)
        syssize = -(-len(self.code) // 16) if self.syssize is None else self.syssize
        # 0x1EF is boot_params.sentinel, which no loader may copy; the rest is as the kernel's build leaves it.
        struct.pack_into("<B", image, 0x1EF, 0xFF)
        struct.pack_into("<BHIHHHH", image, 0x1F1, self.setup_sects, 1, syssize, 0, 0xFFFF, 0x0801, 0xAA55)
        struct.pack_into("<BB4sH", image, 0x200, 0xEB, 0x66, self.magic, self.version)
        struct.pack_into("<BBHI", image, 0x210, 0, self.loadflags, 0x8000, self.code32_start)
        struct.pack_into("<IBBHI", image, 0x230, self.kernel_alignment, self.relocatable_kernel, 13, self.xloadflags,
                         self.cmdline_size)  # fmt: skip
        struct.pack_into("<II", image, 0x248, self.payload_offset, self.payload_length)
        struct.pack_into("<QQI", image, 0x250, 0, self.pref_address, self.init_size)
        return bytes(image) + self.code


def spoiled(image: bytes, offset: int, layout: str, value: int) -> bytes:
    """Return the image with one field overwritten."""
    changed = bytearray(image)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


def write(directory: Path, content: bytes, name: str = "vmlinux") -> str:
    """Write a file and return its path."""
    path = directory / name
    path.write_bytes(content)
    return str(path)
