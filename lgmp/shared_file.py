"""A shared memory file that no path leads to: what a launcher and its workers map alike.

It is a sealed memfd. Where the kernel has none (before Linux 3.17), or does not let us have one, it is a file on a
tmpfs that is unlinked as soon as it is there. Nobody can open that either, but there are no seals, and it takes its
memory from the tmpfs only as it is written: so the room for it must be there at its start.
"""

from __future__ import annotations

import errno
import fcntl
import os

from lgmp.errors import LgmpError

# linux/fcntl.h; Python's fcntl has the names only where its libc had them at build time.
F_ADD_SEALS = 1024 + 9
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004

# Where a tmpfs is usual: POSIX shared memory, now and in the time of Linux 3.x, before what may as well be a disk.
SHARED_MEMORY = "/dev/shm"
_DIRECTORIES = (SHARED_MEMORY, "/run/shm", "$XDG_RUNTIME_DIR", "/tmp", "/var/tmp")
_IN_MEMORY = (b"tmpfs", b"ramfs")
_MOUNTS = "/proc/self/mountinfo"
# Names that somebody else has taken already, before another directory is tried.
_NAMES = 1000
_MIB = 1 << 20


def create(name: str, size: int = 0) -> int:
    """A new file of `size` zero bytes, which stays that large; without a size it is empty, and grows.

    `name` is in what /proc shows. Gives its descriptor. Raises OSError where the kernel refuses, and LgmpError, with
    the remedy, where there is no room.
    """
    fd = _memfd(name)
    sealed = fd >= 0
    if not sealed:
        fd = _unlinked(name, size)
    try:
        if size:
            os.ftruncate(fd, size)
            if sealed:
                fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd(name: str) -> int:
    """A memfd; -1 where there are none, because of the kernel, Python's libc or a filter of system calls."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except AttributeError:
        return -1
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return -1
        raise


def _unlinked(name: str, size: int) -> int:
    """A file that is unlinked, in memory if that can be, with room for `size` bytes. Raises LgmpError."""
    directories = [os.path.expandvars(directory) for directory in _DIRECTORIES]
    for wanted in (True, False):
        for directory in directories:
            if _room(directory) >= size and _is_in_memory(directory) == wanted:
                fd = _open_unlinked(directory, name)
                if fd >= 0:
                    return fd
    raise LgmpError(f"no room for {_amount(size)} of shared memory: {_remedy(size)}, or try less MEM")


def _room(directory: str) -> int:
    """How many bytes can be written there; -1 where nothing can."""
    try:
        file_system = os.statvfs(directory)
    except OSError:
        return -1
    if not file_system.f_blocks:  # a tmpfs of any size
        return 1 << 62
    return file_system.f_bavail * file_system.f_frsize


def _is_in_memory(directory: str) -> bool:
    """Whether a directory, which exists, is on a tmpfs."""
    try:
        device = os.stat(directory).st_dev
        number = b"%d:%d" % (os.major(device), os.minor(device))
        with open(_MOUNTS, "rb") as mounts:
            for line in mounts:
                # proc(5): ids, major:minor, root, where, options and optional fields, a hyphen, the type, more.
                fields = line.split()
                if fields[2] == number:
                    return fields[fields.index(b"-") + 1] in _IN_MEMORY
    except (OSError, ValueError, IndexError):
        pass
    return False


def _open_unlinked(directory: str, name: str) -> int:
    """An open file in `directory`, its owner's alone and unlinked; -1 where none can be made."""
    for number in range(_NAMES):
        path = f"{directory}/.{name}.{os.getpid()}.{number}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        except OSError:
            return -1
        try:
            os.unlink(path)
        except OSError:  # it would stay
            os.close(fd)
            return -1
        return fd
    return -1


def _remedy(size: int) -> str:
    """What root can do so that there is room for `size` bytes."""
    room = _room(SHARED_MEMORY)
    if room < 0 or not _is_in_memory(SHARED_MEMORY):
        return f"{SHARED_MEMORY} is no tmpfs; mkdir -p {SHARED_MEMORY} && mount -t tmpfs tmpfs {SHARED_MEMORY} as root"
    if room >= size:
        return f"{SHARED_MEMORY} cannot be written to; chmod 1777 {SHARED_MEMORY} as root"
    file_system = os.statvfs(SHARED_MEMORY)
    wanted = file_system.f_blocks * file_system.f_frsize - room + size
    return (
        f"{SHARED_MEMORY} has {_amount(room)} left; "
        f"mount -o remount,size={(wanted + _MIB - 1) // _MIB}M {SHARED_MEMORY} as root"
    )


def _amount(size: int) -> str:
    return f"{size // _MIB} MiB" if size >= _MIB else f"{size // 1024} KiB"
