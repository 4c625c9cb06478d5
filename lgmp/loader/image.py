"""What every loader here shares: an image file that is only ever read within its bounds, and the plan to load it.

A loader parses an image's headers into a `KernelImage` first and touches guest memory only after the whole plan has
been checked, so that nothing an image says can make the launcher write where it should not.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from lgmp.closing import Closing
from lgmp.errors import LgmpError
from lgmp.loader.memory_size import MAX_MEMORY_BYTES, in_mib
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.vectors import preadv

# Boot information is at guest-physical 0 and the command line in the page after it, as in every lguest launcher.
BOOT_PARAMS_ADDRESS = 0
COMMAND_LINE_ADDRESS = 0x1000
# asm/setup.h: what a kernel keeps of its command line, terminating NUL included (i386 from 2.6.24 or so).
COMMAND_LINE_SIZE = 2048
# Nothing may be loaded below this.
BOOT_AREA_END = COMMAND_LINE_ADDRESS + COMMAND_LINE_SIZE

_ZEROS = bytes(1 << 20)


def page_align(size: int) -> int:
    """Return `size` bytes rounded up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def display_name(path: str) -> str:
    """Return a file's name as it can stand in a one-line message: quoted where it holds anything unprintable."""
    return path if path.isprintable() else repr(path)


class ImageFile(Closing):
    """An open kernel or initrd file: a non-empty regular file, read only within the size it had when opened.

    `name` is for messages, `size` is in bytes. A context manager: leaving it closes the file.
    """

    def __init__(self, path: str, what: str) -> None:
        """Open `path`, which is the `what` ("kernel", "initrd") of the guest.

        Raises LgmpError where there is no such file, or it is a directory, a device, a pipe, empty or unreadable.
        """
        self.name = display_name(path)
        try:
            # O_NONBLOCK: a pipe without a writer is to be refused, not waited for.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise LgmpError(f"Failed to open {self.name}: {error.strerror}") from error
        except ValueError as error:  # a NUL byte in the name
            raise LgmpError(f"Failed to open {self.name}: {error}") from error
        status = os.fstat(self.fd)
        self.size = status.st_size
        problem = None
        if stat.S_ISDIR(status.st_mode):
            problem = f"is a directory: give the {what}'s file in it"
        elif not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file: copy what it holds to a file first"
        elif self.size == 0:
            problem = f"is empty: give a whole {what}"
        if problem is not None:
            self.close()
            raise LgmpError(f"Reading {what}: {self.name} {problem}")

    def read_at(self, offset: int, length: int, what: str, reading: str = "") -> bytes:
        """Return `length` bytes at `offset`. Raises LgmpError, naming `what` they are, where the file ends early.

        `reading`: what is being read then in the words of the original launcher, where it had some.
        """
        self.check_range(offset, length, what, reading)
        content = bytearray(length)
        self.read_into(memoryview(content), offset, what)
        return bytes(content)

    def read_into(self, target: memoryview, offset: int, what: str) -> None:
        """Fill all of `target` from `offset` on, with no copy on the way. Raises LgmpError as read_at does."""
        self.check_range(offset, len(target), what)
        done = 0
        while done < len(target):
            try:
                count = preadv(self.fd, [target[done:]], offset + done)
            except OSError as error:
                raise LgmpError(f"cannot read {self.name}: {error.strerror}") from error
            if count == 0:
                raise self.truncated(what)
            done += count

    def check_range(self, offset: int, length: int, what: str, reading: str = "") -> None:
        """Raise LgmpError unless the file holds `length` bytes at `offset`."""
        if offset + length > self.size:
            raise self.truncated(
                what, reading or f"offset {offset} len {length} gave {max(0, min(length, self.size - offset))}"
            )

    def truncated(self, what: str, reading: str = "") -> LgmpError:
        """Return the error to raise where the file ends before its `what` does."""
        begin = f"Reading {reading}: " if reading else ""
        return LgmpError(f"{begin}{self.name} is truncated: its {what} is not all there; copy or build it again")

    def close(self) -> None:
        """Close the file; a second time is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Segment(NamedTuple):
    """A piece of an image: `file_bytes` at `file_offset` go to guest-physical `address`, zeros up to `memory_bytes`."""

    what: str
    file_offset: int
    file_bytes: int
    address: int
    memory_bytes: int

    @property
    def file_end(self) -> int:
        """The first guest-physical address after the bytes that come from the file."""
        return self.address + self.file_bytes

    @property
    def end(self) -> int:
        """The first guest-physical address after the segment."""
        return self.address + self.memory_bytes


class Payload(NamedTuple):
    """Where a bzImage's compressed kernel lies once it is loaded: guest-physical `address`, and `length` in bytes."""

    address: int
    length: int


class KernelImage(NamedTuple):
    """What to do to load a kernel: a plan, made from its headers alone.

    `memory_end`: the first guest-physical address above all the kernel takes before it knows how much memory there is;
    `command_line_max`: the longest command line it keeps, in bytes without the NUL; `setup_header`: the header of a
    bzImage from offset 0x1f1 on, empty for ELF; `later_guest`: the kernel belongs to boot protocol 2.10 (2.6.31) or
    later, or does not say; `payload`: a bzImage's compressed kernel where its header tells; `linux_version`: the first
    two or three numbers of the version that a bzImage's header tells.
    """

    entry: int
    segments: tuple[Segment, ...]
    memory_end: int
    command_line_max: int = COMMAND_LINE_SIZE - 1
    setup_header: bytes = b""
    later_guest: bool = True
    payload: Payload | None = None
    linux_version: tuple[int, ...] | None = None


def check_fits(image: KernelImage, name: str, initrd_bytes: int, memory: GuestMemory) -> None:
    """Raise LgmpError, naming the MEM it takes, unless all that the kernel claims lies in RAM.

    `name`: the kernel's; `initrd_bytes`: what an initrd will take besides, in whole pages.
    """
    if image.memory_end > MAX_MEMORY_BYTES:
        raise LgmpError(
            f"{name} wants memory up to {image.memory_end:#x}, more than a 32-bit guest can have: "
            "it is damaged, or not linked at a physical address"
        )
    if image.memory_end > memory.ram_bytes:
        raise LgmpError(
            f"{name} does not fit in {memory.ram_bytes >> 20} MiB of memory: "
            f"give MEM {in_mib(min(image.memory_end + initrd_bytes, MAX_MEMORY_BYTES))} or more"
        )
    # A few segments that overlap do no harm; thousands that each fill all of memory would keep us busy for hours.
    if sum(segment.memory_bytes for segment in image.segments) > memory.ram_bytes:
        raise LgmpError(f"{name} is malformed: its segments lie on top of each other; build it again")


def load_segments(file: ImageFile, image: KernelImage, memory: GuestMemory) -> None:
    """Put the segments into guest memory, which has to be fresh (zeros), in their order: a later one wins.

    The plan has to have passed check_fits. Raises LgmpError where the file has shrunk meanwhile or cannot be read.
    """
    overlapping = _overlap(image.segments)
    for segment in image.segments:
        with memory.view[segment.address : segment.file_end] as target:
            file.read_into(target, segment.file_offset, segment.what)
        if overlapping:
            # Fresh memory is zeros already, and to write them would only make the host find pages for them.
            for start in range(segment.file_end, segment.end, len(_ZEROS)):
                length = min(len(_ZEROS), segment.end - start)
                memory.view[start : start + length] = _ZEROS[:length]


def _overlap(segments: tuple[Segment, ...]) -> bool:
    highest = 0
    for segment in sorted(segments, key=lambda each: each.address):
        if segment.address < highest:
            return True
        highest = max(highest, segment.end)
    return False


def loaded_bytes_contain(memory: GuestMemory, image: KernelImage, marker: bytes) -> bool:
    """Tell whether `marker` occurs in what was loaded from the file, without copying any of it."""
    return any(memory.map.find(marker, each.address, each.file_end) >= 0 for each in image.segments)
