"""The backing of a block device, as the launcher opens it for the worker that inherits it."""

from __future__ import annotations

import os
import stat
from types import TracebackType

from lgmp.errors import LgmpError

SECTOR_BYTES = 512


class Disk:
    """An open disk image or block device; `sectors` is its size in whole 512-byte sectors."""

    def __init__(self, path: str, descriptor: int, sectors: int, *, read_only: bool) -> None:
        """`Disk.open` is what callers want."""
        self.path = path
        self.descriptor = descriptor
        self.sectors = sectors
        self.read_only = read_only

    @classmethod
    def open(cls, path: str, *, read_only: bool) -> Disk:
        """Open a regular file or a block device. Raises LgmpError, with the remedy, for what cannot be a disk."""
        try:
            # Not blocking: a FIFO would otherwise wait for its other end before we could refuse it.
            flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(path, flags)
        except (PermissionError, OSError) as error:
            hint = f"; to let the guest only read it, use --block {path},ro" if _writable_is_the_problem(path) else ""
            raise LgmpError(f"Failed to open {path}: {error.strerror}{hint}") from error
        except ValueError as error:
            raise LgmpError(f"Failed to open {path!r}: {error}") from error
        kind = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            os.close(descriptor)
            raise LgmpError(f"{path} is neither a file nor a block device: it cannot be a disk")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size < SECTOR_BYTES:
            os.close(descriptor)
            raise LgmpError(
                f"the disk {path} is {size} bytes, less than one sector: truncate -s 64M {path} makes it 64 MiB"
            )
        os.set_blocking(descriptor, True)
        return cls(path, descriptor, size // SECTOR_BYTES, read_only=read_only)

    def __enter__(self) -> Disk:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        os.close(self.descriptor)


def _writable_is_the_problem(path: str) -> bool:
    return os.access(path, os.R_OK) and not os.access(path, os.W_OK)
