"""A real worker process, started by hand as the launcher starts one, without a guest: we write its rings ourselves."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from time import monotonic_ns
from types import TracebackType

from lgmp.control import ControlPage
from lgmp.mailbox import (
    COMPLETION_MESSAGE_BYTES,
    COMPLETION_MESSAGES,
    MAILBOX_MESSAGE_BYTES,
    MAILBOX_MESSAGES,
    Mailbox,
    ToLauncher,
    ToWorker,
    pack,
    queue_name,
    unpack,
)
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.virtio.ids import VIRTQUEUE_NUM, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import VringLayout

RAM_BYTES = 1 << 20
# Where in guest memory we keep a request's header and status, and its data.
_HEADER = 0x1000
_STATUS = 0x1100
_DATA = 0x2000


class BlockWorker:
    """A block worker with one ring. `started_ns`, `ready_ns`: the monotonic clock before its exec, and at its READY."""

    def __init__(self, disk_fd: int) -> None:
        """Start it and wait for its READY. `disk_fd` is its disk."""
        self.memory = GuestMemory.create(RAM_BYTES)
        self._layout = VringLayout.legacy(VIRTQUEUE_NUM, RAM_BYTES)
        # The heads of both rings, as u16: flags, index. Stored in one piece, for the worker may look at any time.
        self._avail = self.memory.view[self._layout.avail :][:4].cast("H")
        self._used = self.memory.view[self._layout.used :][:4].cast("H")
        self._control = ControlPage.create()
        self._mailbox = Mailbox.create(queue_name(os.getpid(), "bench"), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
        self._completions = Mailbox.create(
            queue_name(os.getpid(), "bench-done"), COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES
        )
        self._kick = pack(ToWorker.KICK)
        command = [
            *(sys.executable, "-P", "-m", "workers.block"),
            *("--name", "bench", "--device", "0"),
            *("--memory-fd", str(self.memory.fd), "--ram", str(self.memory.ram_bytes)),
            *("--control-fd", str(self._control.fd)),
            *("--mailbox", self._mailbox.name, "--completions", self._completions.name),
            *("--launcher", str(os.getpid()), "--queue", str(self._layout)),
            *("--disk-fd", str(disk_fd), "--", "bench.img"),
        ]
        self.started_ns = monotonic_ns()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(self.memory.fd, self._control.fd, disk_fd),
        )
        self._expect(ToLauncher.READY)
        self.ready_ns = monotonic_ns()
        self._mailbox.unlink()
        self._completions.unlink()

    def __enter__(self) -> BlockWorker:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have it finish, and give everything back."""
        self._mailbox.send(pack(ToWorker.STOP))
        self.process.wait()
        self._mailbox.close()
        self._completions.close()
        self._control.close()
        self.memory.close()

    def offer(self, kind: int, sector: int, data_bytes: int) -> None:
        """Put a request into the ring whose answer is `data_bytes` bytes of data and a status."""
        view = self.memory.view
        struct.pack_into("<IIQ", view, _HEADER, kind, 0, sector)
        chain: Sequence[tuple[int, int, int, int]] = (
            (_HEADER, 16, VRING_DESC_F_NEXT, 1),
            (_DATA, data_bytes, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 2),
            (_STATUS, 1, VRING_DESC_F_WRITE, 0),
        )
        for index, descriptor in enumerate(chain):
            struct.pack_into("<QIHH", view, self._layout.desc + 16 * index, *descriptor)
        view[_STATUS] = 0xFF
        # Every ring entry is 0, the head of that chain, and stays so.
        self._avail[1] = (self._avail[1] + 1) & 0xFFFF

    def round_trip(self) -> None:
        """Kick the worker, and wait until it says that it used what was offered."""
        self._mailbox.post(self._kick)
        self._completions.receive()

    def check(self) -> None:
        """Raise unless the last request was answered, with status OK."""
        used, offered, status = self._used[1], self._avail[1], self.memory.view[_STATUS]
        if used != offered or status != 0:
            raise RuntimeError(f"the worker has answered {used} of {offered} requests, status {status}")

    def _expect(self, kind: ToLauncher) -> None:
        while (raw := self._completions.wait(5.0)) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode} instead of READY")
        if unpack(raw)[0] != kind:
            raise RuntimeError(f"the worker said {unpack(raw)} instead of {kind.name}")


assert _DATA + PAGE_SIZE <= RAM_BYTES
