"""Guest memory: one shared file, mapped by the launcher and by every worker.

Guest-physical address = offset in the file. RAM is 0..ram_bytes; the pages of the devices (the
descriptor page, then the rings) lie right above it, as in every launcher lguest ever had. The file is
sealed against shrinking where there are seals, so that no process that holds it can make another's access a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import sys

from lgmp import shared_file
from lgmp.closing import Closing
from lgmp.errors import LgmpError

PAGE_SIZE = 4096
# The seed launcher's DEVICE_PAGES: the descriptor page and the rings share these.
DEVICE_PAGES = 256


class GuestMemory(Closing):
    """The memory of one guest.

    `view` is the whole of it as a writable memoryview of bytes; `limit` is its size in bytes, the first
    guest-physical address that is outside. Everything that takes an address from a guest checks it
    against `limit` first.
    """

    # Memory begins at guest-physical address 0.
    low = 0

    def __init__(self, fd: int, ram_bytes: int) -> None:
        """Map an existing guest memory file.

        `fd`: an open descriptor, which this object then owns; `ram_bytes`: where RAM ends and the device pages begin.
        Raises LgmpError where the file does not hold that much or cannot be mapped.
        """
        size = os.fstat(fd).st_size
        if size < ram_bytes or size == 0:
            raise LgmpError(f"guest memory is {size} bytes, too small for {ram_bytes} bytes of RAM")
        self.fd = fd
        self.ram_bytes = ram_bytes
        self.limit = size
        try:
            self.map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as error:
            raise LgmpError(f"cannot map {size >> 20} MiB of guest memory: {error}; try less MEM") from error
        self.view = memoryview(self.map)

    @classmethod
    def create(cls, ram_bytes: int, device_pages: int = DEVICE_PAGES) -> GuestMemory:
        """Make the memory of a new guest: `ram_bytes` (a multiple of 4096) of zeros and room for its device pages.

        Raises LgmpError where the kernel refuses, and for what a 32-bit Python cannot map.
        """
        if ram_bytes <= 0 or ram_bytes % PAGE_SIZE:
            raise ValueError(f"{ram_bytes} bytes of RAM is not a positive number of whole pages")
        size = ram_bytes + device_pages * PAGE_SIZE
        if size > sys.maxsize:
            raise LgmpError(
                f"cannot make {size >> 20} MiB of guest memory: a 32-bit Python can use less than "
                f"{(sys.maxsize >> 20) + 1} MiB; try less MEM"
            )
        try:
            fd = shared_file.create("lgmp-guest", size)
        except (OSError, OverflowError) as error:
            raise LgmpError(f"cannot make {size >> 20} MiB of guest memory: {error}; try less MEM") from error
        try:
            return cls(fd, ram_bytes)
        except LgmpError:
            os.close(fd)
            raise

    def pieces(self, address: int, size: int) -> list[memoryview] | None:
        """The `size` bytes from a guest-physical address on, in one piece; None where they are not all there."""
        end = address + size
        return [self.view[address:end]] if address >= 0 and end <= self.limit else None

    def close(self) -> None:
        """Unmap the memory and close its descriptor. Views that are still held elsewhere keep the mapping alive."""
        self.view.release()
        try:  # noqa: SIM105  contextlib is costly to import in a worker
            self.map.close()
        except BufferError:
            pass  # a slice of it lives on in somebody's hands; the mapping goes with that
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
