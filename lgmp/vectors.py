"""preadv and pwritev, also where a filter of system calls refuses them.

What Python calls is preadv2 (Linux 4.6). libc makes preadv of it where the kernel says that there is none (ENOSYS), but
old filters of containers say EPERM to calls that they do not know, and then it is lseek and readv. That moves the
file's offset, so it is for files that nobody else reads by it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def seek_and_readv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """As os.preadv, but that it moves the file's offset."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.readv(fd, buffers)


def seek_and_writev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """As os.pwritev, but that it moves the file's offset."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.writev(fd, buffers)


def _are_refused() -> bool:
    try:
        os.preadv(-1, [bytearray(1)], 0)
    except PermissionError:
        return True
    except OSError:
        pass  # EBADF
    return False


preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv
pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
if _are_refused():
    preadv, pwritev = seek_and_readv, seek_and_writev
