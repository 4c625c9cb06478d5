"""ELF kernels (vmlinux): headers and program headers only; sections and symbols are none of a launcher's business.

pyelftools knows the structures; it is handed the header and the table of program headers as bytes of known size, never
the file, so nothing an image says makes it seek, loop or allocate. It is imported late, because it takes 30 ms.
"""

from __future__ import annotations

import struct
from typing import Any

from lgmp.errors import LgmpError
from lgmp.loader.image import BOOT_AREA_END, ImageFile, KernelImage, Segment, loaded_bytes_contain
from lgmp.loader.memory_size import LOWMEM_BYTES
from lgmp.memory import GuestMemory

ELFMAG = b"\x7fELF"
EHDR_BYTES = 52  # sizeof(Elf32_Ehdr)
PHDR_BYTES = 32  # sizeof(Elf32_Phdr)
# As many as every lguest launcher took: 64 KiB of them.
PHNUM_MAX = 65536 // PHDR_BYTES
PN_XNUM = 0xFFFF

# A guest kernel names its hypervisor (pv_info.name), so one without this word anywhere was not built to be a guest.
GUEST_MARKER = b"lguest"
# arch/x86/mm/init_32.c: in a kernel only where it was built without CONFIG_HIGHMEM.
NO_HIGHMEM_MARKER = b"Use a HIGHMEM enabled kernel."

NEEDS_32_BIT = "is an x86-64 kernel: lguest runs 32-bit guests only; build it with ARCH=i386 and CONFIG_LGUEST_GUEST=y"
# In the words of the original launcher.
_MALFORMED = "Malformed elf header"
_BUILD_AGAIN = "copy or build it again"


def read_elf(file: ImageFile) -> KernelImage:
    """Return how to load an ELF kernel.

    Takes what the lguest launchers took: ELF32, little endian, EM_386, ET_EXEC, 1 to 2048 program headers of 32 bytes.
    File bytes go to p_paddr and the entry is e_entry, both guest-physical. Raises LgmpError for everything else.
    """
    header, program_headers = _read_headers(file)
    segments = tuple(
        _segment(file, number, each)
        for number, each in enumerate(program_headers)
        if each["p_type"] == "PT_LOAD" and (each["p_memsz"] or each["p_filesz"])
    )
    if not segments:
        raise LgmpError(f"{file.name} is malformed: it has no segment to load; give the kernel's vmlinux")
    entry: int = header["e_entry"]
    if not any(each.address <= entry < each.file_end for each in segments):
        raise LgmpError(
            f"{file.name} is malformed: its entry point {entry:#x} is in none of its segments; "
            "it must be a physical address"
        )
    return KernelImage(entry=entry, segments=segments, memory_end=max(each.end for each in segments))


def check_guest_kernel(file: ImageFile, image: KernelImage, memory: GuestMemory) -> None:
    """Look at a loaded ELF kernel for what its headers do not tell.

    Raises LgmpError for one that was not built as an lguest guest, and for one without CONFIG_HIGHMEM in a guest with
    more memory than it can use: the device page is right above RAM, where it would not find it.
    """
    if not loaded_bytes_contain(memory, image, GUEST_MARKER):
        raise LgmpError(f"{file.name} is not a guest kernel: build it with CONFIG_LGUEST_GUEST=y")
    if memory.ram_bytes > LOWMEM_BYTES and loaded_bytes_contain(memory, image, NO_HIGHMEM_MARKER):
        raise no_highmem(file.name)


def no_highmem(name: str) -> LgmpError:
    """Return the error for a kernel that was built without CONFIG_HIGHMEM and is given too much memory."""
    most = LOWMEM_BYTES >> 20
    return LgmpError(
        f"{name}: this kernel was built without CONFIG_HIGHMEM4G and can use at most {most} MiB: "
        f"give MEM {most} or less"
    )


def _read_headers(file: ImageFile) -> tuple[Any, list[Any]]:
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 - see the module's docstring
    from elftools.construct import ConstructError  # noqa: PLC0415
    from elftools.elf.structs import ELFStructs  # noqa: PLC0415

    structs = ELFStructs(little_endian=True, elfclass=32)
    raw = file.read_at(0, EHDR_BYTES, "ELF header", "kernel")
    try:
        structs.create_basic_structs()
        header = structs.Elf_Ehdr.parse(raw)
        _check_header(file, header)
        structs.create_advanced_structs(header["e_type"], header["e_machine"])
        count: int = header["e_phnum"]
        table = file.read_at(header["e_phoff"], count * PHDR_BYTES, "table of program headers", "program headers")
        return header, [
            structs.Elf_Phdr.parse(table[start : start + PHDR_BYTES]) for start in range(0, len(table), PHDR_BYTES)
        ]
    except (ELFError, ConstructError, struct.error, ValueError, OverflowError, LookupError, TypeError) as error:
        raise LgmpError(f"{file.name} is malformed: {error}; {_BUILD_AGAIN}") from error


def _check_header(file: ImageFile, header: Any) -> None:  # noqa: ANN401 - pyelftools' Container
    identity = header["e_ident"]
    machine = header["e_machine"]
    if machine == "EM_X86_64":
        raise LgmpError(f"{_MALFORMED}: {file.name} {NEEDS_32_BIT}")
    if (identity["EI_CLASS"], identity["EI_DATA"], machine) != ("ELFCLASS32", "ELFDATA2LSB", "EM_386"):
        described = ", ".join(str(each) for each in (identity["EI_CLASS"], identity["EI_DATA"], machine))
        raise LgmpError(
            f"{_MALFORMED}: {file.name} is not for the i386 ({described}): lguest needs a kernel built "
            "with ARCH=i386 and CONFIG_LGUEST_GUEST=y"
        )
    if header["e_type"] != "ET_EXEC":
        raise LgmpError(
            f"{_MALFORMED}: {file.name} is not an executable kernel ({header['e_type']}): "
            "give the kernel's vmlinux or bzImage"
        )
    count = header["e_phnum"]
    if not 1 <= count <= PHNUM_MAX:
        number = "PN_XNUM" if count == PN_XNUM else count
        raise LgmpError(
            f"{_MALFORMED}: {file.name}: it has {number} program headers, not 1 to {PHNUM_MAX}; {_BUILD_AGAIN}"
        )
    if header["e_phentsize"] != PHDR_BYTES:
        raise LgmpError(
            f"{_MALFORMED}: {file.name}: its program headers are {header['e_phentsize']} bytes each, not {PHDR_BYTES}; "
            f"{_BUILD_AGAIN}"
        )


def _segment(file: ImageFile, number: int, header: Any) -> Segment:  # noqa: ANN401 - pyelftools' Container
    segment = Segment(
        what=f"ELF segment {number}",
        file_offset=header["p_offset"],
        file_bytes=header["p_filesz"],
        address=header["p_paddr"],
        memory_bytes=header["p_memsz"],
    )
    if segment.file_bytes > segment.memory_bytes:
        raise LgmpError(
            f"{file.name} is malformed: {segment.what} has {segment.file_bytes} bytes in the file for "
            f"{segment.memory_bytes} in memory; {_BUILD_AGAIN}"
        )
    file.check_range(segment.file_offset, segment.file_bytes, segment.what)
    if segment.address < BOOT_AREA_END:
        raise LgmpError(
            f"{file.name}: {segment.what} at {segment.address:#x} would lie on the boot parameters and the command "
            f"line (0 to {BOOT_AREA_END - 1:#x}): link the kernel higher, as Linux is at 0x100000 or above"
        )
    return segment
