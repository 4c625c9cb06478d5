"""A FUSE server for a directory with one file in it, on the kernel's raw protocol.

Not on libfuse: this needs to hear of interrupted calls, to know the *thread* that calls, and to have calls that go on
at the same time on one file (FOPEN_PARALLEL_DIRECT_WRITES), and neither Debian 12's libfuse nor any binding for Python
gives all of that. With direct I/O each read(2) and write(2) is one request, sizes and offsets as the caller has them.

One thread takes all requests, in the order in which the kernel gives them; they are answered whenever their time has
come, from any thread. An INTERRUPT never comes before the request that it is about.

What is not as with a device: the file is a regular one; a write of no bytes does not arrive; an interrupted call is
EINTR even with SA_RESTART. And read(2) and write(2) move the file position by what they return, which the module does
not do: a call at such a position is taken for one at offset 0.

The structures are those of linux/fuse.h, in version 7.38.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .module import Call

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2


class _Op(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_NO_REPLY = (_Op.FORGET, _Op.BATCH_FORGET, _Op.INTERRUPT)

_FUSE_BIG_WRITES = 1 << 5
_FUSE_ATOMIC_O_TRUNC = 1 << 3
_FOPEN_DIRECT_IO = 1 << 0
_FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

_MAJOR, _MINOR = 7, 38
_ROOT, _FILE = 1, 2
_MAX_WRITE = 1 << 16
_REQUEST_BYTES = _MAX_WRITE + 4096

# Calls that write past the end of a file wait for each other; and this is as big as a file can be that an open without
# O_LARGEFILE takes.
_FILE_SIZE = 0x7FFFFFFF
# Names and attributes never change.
_FOREVER = 1 << 30

# len, opcode, unique, nodeid, uid, gid, pid (the thread's id), total_extlen, padding
_IN_HEADER = struct.Struct("=IIQQIIIHH")
# len, error, unique
_OUT_HEADER = struct.Struct("=IiQ")
# major, minor, max_readahead, flags
_INIT_IN = struct.Struct("=IIII")
# the same, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2, unused
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
# nodeid, generation, entry_valid, attr_valid, their nanoseconds; the attributes follow
_ENTRY_OUT = struct.Struct("=QQQQII")
# attr_valid, its nanoseconds, padding; the attributes follow
_ATTR_OUT = struct.Struct("=QII")
# fh, open_flags, padding
_OPEN_OUT = struct.Struct("=QII")
# fh, offset, size, flags, lock_owner, flags, padding: of READ and of WRITE
_IO_IN = struct.Struct("=QQIIQII")
# size, padding
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_UNIQUE = struct.Struct("=Q")

# How long the last files may take to be released once the end has come, in seconds.
_PATIENCE = 3.0
_LOOK_EVERY_MILLISECONDS = 10
# What takes that many seconds and should not wait for anybody, hangs.
_STUCK = 15


class File(Protocol):
    """What an open gives. Its methods are called in the server's thread and must not wait."""

    def read(self, call: Call, size: int) -> None:
        """A read(2) of up to `size` bytes."""

    def write(self, call: Call, data: bytes) -> None:
        """A write(2)."""

    def interrupt(self, call: Call) -> None:
        """A signal came for the caller of a call that has not been answered."""

    def release(self, done: Callable[[], None]) -> None:
        """The last descriptor was closed. Calls `done` in the end."""


class _Handle:
    """An open file, and where its position may be if it is read and written without offsets."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.positions = {0}


class FuseServer:
    """Serves `directory`/`name`; `open_file(thread)` gives what is opened, or raises OSError."""

    def __init__(self, directory: str, name: str, open_file: Callable[[int], File], *, parallel: bool) -> None:
        """Mount it. Raises OSError. `parallel`: that writes can go on at the same time is indispensable."""
        self._directory = os.fsencode(directory)
        self._name = os.fsencode(name)
        self._open_file = open_file
        self._parallel = parallel
        self._handles: dict[int, _Handle] = {}
        self._calls: dict[int, tuple[File, Call]] = {}
        # Calls whose callers want to go, by when they are to be answered.
        self._interrupted: dict[int, float] = {}
        self._opened = 0
        self._too_old = False
        self._on_ready: Callable[[], None] = lambda: None
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
        if _LIBC.mount(b"lguest", self._directory, b"fuse", flags, options):
            number = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(number, f"mounting on {directory}: {os.strerror(number)}")

    def unmount(self) -> None:
        """Take the file's name away. Who has it open still has it."""
        _LIBC.umount2(self._directory, _MNT_DETACH)

    @property
    def open_files(self) -> int:
        """How many files are open, or not yet cleared away."""
        return len(self._handles)

    def serve(self, until: Sequence[int], on_ready: Callable[[], None]) -> None:
        """Serve until one of the descriptors `until` is readable, and all files are released or will not be."""
        self._on_ready = on_ready
        poll = select.poll()
        for descriptor in (self._fd, *until):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(self._look_after_interrupted())}
            if self._fd in ready and not self._take():
                return
            if ready - {self._fd}:
                break
        for descriptor in until:
            poll.unregister(descriptor)
        # Not unmounted before, which would have the kernel forget releases that it has yet to tell of. And the guests'
        # threads end without a word to this one.
        deadline = time.monotonic() + _PATIENCE
        while self._handles and time.monotonic() < deadline:
            if poll.poll(_LOOK_EVERY_MILLISECONDS) and not self._take():
                return

    def _look_after_interrupted(self) -> float | None:
        """When to do so again, in milliseconds. Ends the process, and so their calls, where callers wait in vain."""
        self._interrupted = {unique: late for unique, late in self._interrupted.items() if unique in self._calls}
        if any(late < time.monotonic() for late in self._interrupted.values()):
            print("lguest_device: an interrupted call does not end", file=sys.stderr, flush=True)
            os._exit(1)
        return 1000.0 if self._interrupted else None

    def _take(self) -> bool:
        """Take one request; False where there will be none any more."""
        try:
            request = os.read(self._fd, _REQUEST_BYTES)
        except OSError as error:
            # ENOENT: its caller was killed just now; ENODEV: nothing is mounted, and no file open, any more.
            return error.errno in (errno.ENOENT, errno.EAGAIN, errno.EINTR)
        length, opcode, unique, node, _uid, _gid, thread, *_ = _IN_HEADER.unpack_from(request)
        body = request[_IN_HEADER.size : length]
        # Its callers cannot be killed while this thread hangs; it is killed, then.
        signal.alarm(_STUCK)
        try:
            self._dispatch(opcode, unique, node, thread, body)
        except OSError as error:
            if opcode not in _NO_REPLY:
                self._reply(unique, -(error.errno or errno.EIO))
        finally:
            signal.alarm(0)
        return not self._too_old

    def _dispatch(self, opcode: int, unique: int, node: int, thread: int, body: bytes) -> None:
        match opcode:
            case _Op.READ | _Op.WRITE:
                self._transfer(opcode, unique, thread, body)
            case _Op.INTERRUPT:
                # One that is not there was answered meanwhile.
                number = _UNIQUE.unpack_from(body)[0]
                if found := self._calls.get(number):
                    self._interrupted[number] = time.monotonic() + _STUCK
                    found[0].interrupt(found[1])
            case _Op.OPEN:
                self._reply(unique, 0, self._open(node, thread))
            case _Op.RELEASE:
                number = _UNIQUE.unpack_from(body)[0]
                self._handles[number].file.release(lambda: self._released(number, unique))
            case _Op.LOOKUP if body.rstrip(b"\0") == self._name:
                self._reply(unique, 0, _ENTRY_OUT.pack(_FILE, 0, _FOREVER, _FOREVER, 0, 0) + _attributes(_FILE))
            case _Op.LOOKUP:
                raise OSError(errno.ENOENT, "no such file")
            case _Op.GETATTR | _Op.SETATTR:
                self._reply(unique, 0, _ATTR_OUT.pack(_FOREVER, 0, 0) + _attributes(node))
            case _Op.INIT:
                self._reply(unique, 0, self._init(body))
                self._on_ready()
            case _Op.STATFS:
                self._reply(unique, 0, _STATFS_OUT.pack(0, 0, 0, 2, 0, 4096, 255, 4096, 0))
            case _Op.FLUSH | _Op.ACCESS | _Op.DESTROY:
                self._reply(unique, 0)
            case _:
                raise OSError(errno.ENOSYS, "not here")

    def _init(self, body: bytes) -> bytes:
        major, minor, read_ahead, flags = _INIT_IN.unpack_from(body)
        if major != _MAJOR or (self._parallel and minor < _MINOR):
            print(f"lguest_device: FUSE {major}.{minor} is too old: BREAK wants Linux 6.2", file=sys.stderr, flush=True)
            self._too_old = True
            raise OSError(errno.EPROTO, "too old")
        flags &= _FUSE_BIG_WRITES | _FUSE_ATOMIC_O_TRUNC
        return _INIT_OUT.pack(_MAJOR, min(minor, _MINOR), read_ahead, flags, 12, 9, _MAX_WRITE, 1, 0, 0, 0)

    def _open(self, node: int, thread: int) -> bytes:
        if node != _FILE:
            raise OSError(errno.EISDIR, "a directory")
        handle = _Handle(self._open_file(thread))
        self._opened += 1
        self._handles[self._opened] = handle
        return _OPEN_OUT.pack(self._opened, _FOPEN_DIRECT_IO | _FOPEN_PARALLEL_DIRECT_WRITES, 0)

    def _released(self, number: int, unique: int) -> None:
        del self._handles[number]
        self._reply(unique, 0)

    def _transfer(self, opcode: int, unique: int, thread: int, body: bytes) -> None:
        number, position, size, *_ = _IO_IN.unpack_from(body)
        handle = self._handles[number]
        offset = 0 if position in handle.positions else position

        def answer(result: int | bytes) -> None:
            del self._calls[unique]
            count = result if isinstance(result, int) else len(result)
            if count < 0:
                self._reply(unique, count)
                return
            handle.positions.add(position + count)
            self._reply(unique, 0, result if isinstance(result, bytes) else _WRITE_OUT.pack(count, 0))

        call = Call(thread, offset, answer)
        self._calls[unique] = handle.file, call
        if opcode == _Op.READ:
            handle.file.read(call, size)
        else:
            handle.file.write(call, body[_IO_IN.size : _IO_IN.size + size])

    def _reply(self, unique: int, error: int, data: bytes = b"") -> None:
        try:
            os.write(self._fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(data), error, unique) + data)
        except OSError as failure:
            # ENOENT: the caller was killed, and nobody waits for it. ENODEV: nothing is mounted any more.
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                print(f"lguest_device: an answer is refused: {failure}", file=sys.stderr, flush=True)


def _attributes(node: int) -> bytes:
    mode, size, links = stat.S_IFDIR | 0o755, 0, 2
    if node == _FILE:
        mode, size, links = stat.S_IFREG | 0o666, _FILE_SIZE, 1
    return _ATTR.pack(node, size, 0, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)
