"""What a module of the kernel has at hand and a process has not: the memory and the descriptors of its caller.

Threads are named by their ids, as FUSE tells them. All of this asks for the rights that a debugger has.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import NamedTuple

from lgmp.memory import PAGE_SIZE, GuestMemory

_LIBC = ctypes.CDLL(None, use_errno=True)
# The same number on every architecture.
_SYS_PIDFD_GETFD = 438
_EVENTFD = "anon_inode:[eventfd]"


class _Mapping(NamedTuple):
    """A line of /proc/TID/maps; `key` is the file, as device and inode."""

    range: str
    start: int
    end: int
    permissions: str
    offset: int
    key: tuple[str, str]


class CallerMemory(GuestMemory):
    """Guest memory in another process: the same pages of the same file, mapped here too."""

    def __init__(self, thread: int, base: int, pages: int) -> None:
        """Map `pages` pages that thread `thread` has at its address `base`.

        Raises OSError: EFAULT where that is not all mapped, writable and shared, from one file without a gap.
        """
        size = pages * PAGE_SIZE
        fd, offset = _open_mapping(thread, base, size)
        self.fd = fd
        self.ram_bytes = self.limit = size
        if os.fstat(fd).st_size < offset + size:
            os.close(fd)
            raise OSError(errno.EFAULT, "the file ends before the guest's memory does")
        try:
            self.map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except OSError:
            os.close(fd)
            raise
        self.view = memoryview(self.map)


def _open_mapping(thread: int, base: int, size: int) -> tuple[int, int]:
    """The file behind a caller's memory, and where in it that begins."""
    if not size or base % PAGE_SIZE:
        raise OSError(errno.EFAULT, "no pages")
    first: _Mapping | None = None
    reached = base
    for each in _mappings(thread):
        if each.end <= base or reached >= base + size:
            continue
        if first is None:
            first = each
        # One range of memory may be several mappings, of which each goes on where the last one ended.
        in_line = each.start <= reached and each.key == first.key
        if not in_line or each.offset - each.start != first.offset - first.start or each.permissions[:2] != "rw":
            break
        if each.permissions[3] != "s" or each.key[1] == "0":
            break
        reached = each.end
    if first is None or reached < base + size:
        raise OSError(errno.EFAULT, f"{base:#x}-{base + size:#x} is not memory that the guest can have")
    return _open_file(thread, first), first.offset + base - first.start


def _mappings(thread: int) -> list[_Mapping]:
    found = []
    with open(f"/proc/{thread}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, permissions, offset, device, inode = line.split(maxsplit=5)[:5]
            start, _, end = addresses.partition("-")
            found.append(
                _Mapping(addresses, int(start, 16), int(end, 16), permissions, int(offset, 16), (device, inode))
            )
    return found


def _open_file(thread: int, mapping: _Mapping) -> int:
    """Open what is mapped there, which may have no name any more."""
    try:
        return os.open(f"/proc/{thread}/map_files/{mapping.range}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        pass  # that is for the first user namespace's root; descriptors are for any debugger
    directory = f"/proc/{thread}/fd"
    for name in os.listdir(directory):
        # Not stat(2) of each: one of them is our own file, which would have us wait for ourselves.
        with contextlib.suppress(OSError):
            target = os.readlink(f"{directory}/{name}")
            if not target.startswith(("/memfd:", "/dev/shm/")) and not target.endswith("(deleted)"):
                continue
            descriptor = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CLOEXEC)
            if str(os.fstat(descriptor).st_ino) == mapping.key[1]:
                return descriptor
            os.close(descriptor)
    raise OSError(errno.EFAULT, "the file of the guest's memory cannot be opened")


def take_eventfd(thread: int, descriptor: int) -> int:
    """An eventfd of the caller's, as a descriptor here. Raises OSError: EBADF, and EINVAL for any other file."""
    # Looked at before it is taken: our own file we could not even close again, for that would wait for ourselves.
    try:
        target = os.readlink(f"/proc/{thread}/fd/{descriptor}")
    except FileNotFoundError:
        raise OSError(errno.EBADF, "no descriptor") from None
    if target != _EVENTFD:
        raise OSError(errno.EINVAL, "no eventfd")
    pidfd = os.pidfd_open(_process_of(thread))
    try:
        taken: int = _LIBC.syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(pidfd)
    return taken


def _process_of(thread: int) -> int:
    with open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as status:
        for line in status:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    raise ProcessLookupError(errno.ESRCH, f"no thread {thread}")
