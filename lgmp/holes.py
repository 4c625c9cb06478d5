"""Holes and zeros in the file under a disk: fallocate(2) for a file, ioctls for a block device.

Python's os has no fallocate with a mode, so libc's is called, with 64-bit offsets on a 32-bit machine too. All of it
raises OSError, and nothing here is touched until it is called.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from typing import Any

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fs.h
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F

# What a kernel, a file system, a block device or a filter of system calls says that has no such call, or not there.
CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ENOTTY, errno.EINVAL)

_calls: tuple[Any, Any] | None = None


def _libc() -> tuple[Any, Any]:
    """libc's fallocate with 64-bit offsets, and its ioctl."""
    global _calls  # noqa: PLW0603  it is looked up once
    if _calls is None:
        libc = ctypes.CDLL(None, use_errno=True)
        # glibc's fallocate has 32-bit offsets on a 32-bit machine. musl has 64 bits everywhere, under the one name.
        allocate = getattr(libc, "fallocate64", None) or libc.fallocate
        allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
        _calls = (allocate, libc.ioctl)
    return _calls


def _call(function: Any, *arguments: object) -> None:  # noqa: ANN401  ctypes gives its functions no type
    """Call it until no signal interrupts it. Raises OSError."""
    while function(*arguments):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2): `mode` of FALLOC_FL_*, `offset` and `size` in bytes."""
    _call(_libc()[0], fd, mode, offset, size)


def punch(fd: int, offset: int, size: int) -> None:
    """Make a hole of `size` bytes at `offset`, which is read as zeros; the file keeps its length.

    On a block device these bytes are unmapped where that leaves zeros for certain; otherwise it raises OSError.
    """
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


def zero(fd: int, offset: int, size: int) -> None:
    """Make zeros of `size` bytes at `offset` without writing each, and with no holes; a file keeps its length."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        _on_range(fd, BLKZEROOUT, offset, size)
    else:
        fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size)


def discard(fd: int, offset: int, size: int) -> None:
    """The content of `size` bytes at `offset` is of no use any more: free them. A file has a hole there afterwards."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        _on_range(fd, BLKDISCARD, offset, size)
    else:
        punch(fd, offset, size)


def _on_range(fd: int, request: int, offset: int, size: int) -> None:
    _call(_libc()[1], fd, request, ctypes.byref((ctypes.c_uint64 * 2)(offset, size)))


def can_punch(fd: int) -> bool:
    """Whether `discard` works on `fd`, a file or block device. Not where it is open for reading only.

    Nothing of its content is changed: a file is asked for a hole of one byte behind its end.
    """
    status = os.fstat(fd)
    try:
        if stat.S_ISBLK(status.st_mode):
            return _is_writable(fd) and _discards(status.st_rdev)
        punch(fd, status.st_size, 1)
    except OSError:
        return False
    return True


def _is_writable(fd: int) -> bool:
    import fcntl  # noqa: PLC0415  a worker does not ask

    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _discards(number: int) -> bool:
    """Whether block device `number` can discard, as sysfs has it; a partition does as the whole disk does."""
    place = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for queue in (f"{place}/queue", f"{place}/../queue"):
        try:
            with open(f"{queue}/discard_max_bytes", encoding="ascii") as file:
                return int(file.read()) > 0
        except FileNotFoundError:
            continue
    return False


def logical_block_size(fd: int) -> int:
    """The smallest transfer of a disk in bytes: what a block device says (BLKSSZGET), and 512 for a file."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return 512
    size = ctypes.c_int()
    _call(_libc()[1], fd, BLKSSZGET, ctypes.byref(size))
    return size.value
