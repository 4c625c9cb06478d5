"""The initial RAM disk: at the very top of RAM, rounded up to whole pages."""

from __future__ import annotations

from lgmp.errors import LgmpError
from lgmp.loader.image import ImageFile, KernelImage, page_align
from lgmp.loader.memory_size import MAX_MEMORY_BYTES, in_mib
from lgmp.memory import GuestMemory


def check_initrd_fits(file: ImageFile, image: KernelImage, memory: GuestMemory) -> None:
    """Raise LgmpError, naming the MEM it takes, unless the initrd fits in RAM above all that the kernel claims."""
    needed = image.memory_end + page_align(file.size)
    if needed <= memory.ram_bytes:
        return
    if needed > MAX_MEMORY_BYTES:
        raise LgmpError(f"{file.name} is {in_mib(file.size)} MiB, too big for a 32-bit guest: make the initrd smaller")
    raise LgmpError(
        f"the initrd {file.name} does not fit above the kernel in {memory.ram_bytes >> 20} MiB of memory: "
        f"give MEM {in_mib(needed)} or more"
    )


def load_initrd(file: ImageFile, memory: GuestMemory) -> int:
    """Read the initrd to the top of RAM and return its guest-physical address, a multiple of 4096.

    The memory has to be fresh, so that the rest of its last page reads as zeros, and check_initrd_fits to have passed.
    Raises LgmpError where the file has shrunk meanwhile or cannot be read.
    """
    address = memory.ram_bytes - page_align(file.size)
    with memory.view[address : address + file.size] as target:
        file.read_into(target, 0, "content")
    return address
