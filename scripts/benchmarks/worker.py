"""A real worker process, started by hand as the launcher starts one, without a guest: we write its rings ourselves."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from time import monotonic_ns
from types import TracebackType
from typing import Self

from lgmp.control import ControlPage
from lgmp.mailbox import ToLauncher, ToWorker, create_pair, pack, unpack
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.virtio.ids import VIRTQUEUE_NUM, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import VringLayout

RAM_BYTES = 1 << 20
# Where in guest memory we keep a request's header and status, and its data.
_HEADER = 0x1000
_STATUS = 0x1100
_DATA = 0x2000


class StartedWorker:
    """A worker and its rings. `started_ns`, `ready_ns`: the monotonic clock before its exec, and at its READY."""

    def __init__(
        self, module: str, options: Sequence[str], descriptor: int, *, queues: int, ram: int, features: int = 0
    ) -> None:
        """Start `module` and wait for its READY; it inherits `descriptor`, its driver has accepted `features`."""
        self.memory = GuestMemory.create(ram)
        ring_bytes = (VringLayout.legacy_bytes(VIRTQUEUE_NUM) + PAGE_SIZE - 1) & -PAGE_SIZE
        self.layouts = [VringLayout.legacy(VIRTQUEUE_NUM, ram + number * ring_bytes) for number in range(queues)]
        # The heads of the rings, as u16: flags, index. Stored in one piece, for the worker may look at any time.
        self.avail = [self.memory.view[layout.avail :][:4].cast("H") for layout in self.layouts]
        self.used = [self.memory.view[layout.used :][:4].cast("H") for layout in self.layouts]
        self._control = ControlPage.create([VIRTQUEUE_NUM] * queues)
        self._control.accepted_features = features
        self._mailbox, self._completions = create_pair("bench")
        self._kick = pack(ToWorker.KICK)
        command = [
            *(sys.executable, "-P", "-m", module),
            *("--name", "bench", "--device", "0"),
            *("--memory-fd", str(self.memory.fd), "--ram", str(self.memory.ram_bytes)),
            *("--control-fd", str(self._control.fd)),
            *("--mailbox", self._mailbox.name, "--completions", self._completions.name),
            *("--launcher", str(os.getpid())),
            *(word for layout in self.layouts for word in ("--queue", str(layout))),
            *options,
        ]
        self.started_ns = monotonic_ns()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(self.memory.fd, self._control.fd, descriptor),
        )
        self._expect(ToLauncher.READY)
        self.ready_ns = monotonic_ns()
        self._mailbox.unlink()
        self._completions.unlink()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have it finish, and give everything back."""
        while not self._mailbox.send(pack(ToWorker.STOP), 0.1):
            self._completions.take()  # it may wait for room there
        while True:
            try:
                self.process.wait(0.01)
                break
            except subprocess.TimeoutExpired:
                self._completions.take()
        self._mailbox.close()
        self._completions.close()
        self._control.close()
        self.memory.close()

    def kick(self) -> None:
        """Have the worker look at its rings."""
        self._mailbox.post(self._kick)

    def wait(self) -> None:
        """Wait until it says that it used something."""
        self._completions.receive()

    def round_trip(self) -> None:
        """Kick the worker, and wait until it says that it used what was offered."""
        self._mailbox.post(self._kick)
        self._completions.receive()

    def _expect(self, kind: ToLauncher) -> None:
        while (raw := self._completions.wait(5.0)) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode} instead of READY")
        if unpack(raw)[0] != kind:
            raise RuntimeError(f"the worker said {unpack(raw)} instead of {kind.name}")


class BlockWorker(StartedWorker):
    """A block worker with one ring."""

    def __init__(self, disk_fd: int) -> None:
        """Start it and wait for its READY. `disk_fd` is its disk."""
        options = ("--disk-fd", str(disk_fd), "--", "bench.img")
        super().__init__("workers.block", options, disk_fd, queues=1, ram=RAM_BYTES)

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
            struct.pack_into("<QIHH", view, self.layouts[0].desc + 16 * index, *descriptor)
        view[_STATUS] = 0xFF
        # Every ring entry is 0, the head of that chain, and stays so.
        self.avail[0][1] = (self.avail[0][1] + 1) & 0xFFFF

    def check(self) -> None:
        """Raise unless the last request was answered, with status OK."""
        used, offered, status = self.used[0][1], self.avail[0][1], self.memory.view[_STATUS]
        if used != offered or status != 0:
            raise RuntimeError(f"the worker has answered {used} of {offered} requests, status {status}")


assert _DATA + PAGE_SIZE <= RAM_BYTES
