"""Real worker processes, whose guest changes its rings while they read them: they may say BROKEN, and live on."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzzing.devices import FuzzedBlock, FuzzedConsole, FuzzedNet, FuzzedRng
from fuzzing.guest import BrokenPromise, HostileGuest
from lgmp.mailbox import ToLauncher
from lgmp.testing import Driver, WorkerProcess, direct
from lgmp.virtio.block import VIRTIO_BLK_T_IN
from lgmp.virtio.console import OUTPUT_QUEUE

_MUTATOR = str(Path(__file__).parent / "mutator.py")
_RAM_BYTES = 0x10000
_DISK_BYTES = 0x8000
_FRAME = bytes(60)


class _Worker(WorkerProcess):
    """A worker of which is counted how often it said that its driver broke a rule."""

    breaks = 0

    def next_message(self) -> list[int | str]:
        """As any."""
        message = super().next_message()
        self.breaks += message[0] == ToLauncher.BROKEN
        return message


class FuzzedProcess:
    """One worker process, for all cases; each is a few requests, and a reset."""

    def __init__(self, kind: type[FuzzedBlock | FuzzedNet | FuzzedConsole | FuzzedRng]) -> None:
        """`kind`: what serves the device in this process, and knows its requests."""
        self.name = f"{kind.name} process"
        self.chains = self.broken = 0
        with contextlib.ExitStack() as stack:
            self._like = kind()
            stack.callback(self._like.close)
            self._driver = Driver(queues=kind.queues, ram=_RAM_BYTES)
            stack.callback(self._driver.close)
            memory, layouts = self._driver.memory, self._driver.layouts
            self._guest = HostileGuest(memory.view, layouts, _RAM_BYTES, memory.limit)
            self._prove: Callable[[], None]
            self._worker = getattr(self, f"_start_{kind.name}")(stack)
            self._worker.ready()
            last = layouts[-1]
            self._mutator = subprocess.Popen(
                [
                    *(sys.executable, "-P", _MUTATOR, str(memory.fd), "1"),
                    *(str(layouts[0].desc), str(last.used + 4 + 8 * last.num), str(_RAM_BYTES)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[memory.fd],
            )
            stack.callback(self._mutator.wait)
            stack.callback(self._mutator.kill)
            self._stack = stack.pop_all()

    # The devices: how they are started, and how they show that they are well

    def _start(self, stack: contextlib.ExitStack, *options: str, fd: int) -> _Worker:
        return stack.enter_context(_Worker(f"workers.{self._like.name}", self._driver, options, pass_fds=[fd]))

    def _start_block(self, stack: contextlib.ExitStack) -> _Worker:
        disk = tempfile.TemporaryFile()  # noqa: SIM115  closed with the stack
        stack.callback(disk.close)
        disk.truncate(_DISK_BYTES)

        def prove() -> None:
            chain = direct(self._driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 3), 512, 1)
            self._answered()
            if chain.answer != os.pread(disk.fileno(), 512, 3 * 512) + b"\0":
                raise BrokenPromise("the disk does not hold what its file does")
            if os.fstat(disk.fileno()).st_size != _DISK_BYTES:
                raise BrokenPromise("the disk has another size")

        self._prove = prove
        return self._start(stack, f"--disk-fd={disk.fileno()}", fd=disk.fileno())

    def _start_net(self, stack: contextlib.ExitStack) -> _Worker:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        self._send = lambda: ours.sendall(struct.pack("!I", len(_FRAME)) + _FRAME)
        self._drained = ours.fileno()

        def prove() -> None:
            chain = direct(self._driver, 10, 1514)
            self._send()
            self._answered()
            if not chain.answer.startswith(bytes(10)):
                raise BrokenPromise("a frame without its header")

        self._prove = prove
        return self._start(stack, f"--stream-fd={theirs.fileno()}", fd=theirs.fileno())

    def _start_console(self, stack: contextlib.ExitStack) -> _Worker:
        reading, output = os.pipe()
        stack.callback(os.close, reading)
        stack.callback(os.close, output)
        self._drained = reading

        def prove() -> None:
            direct(self._driver, b"hello", queue=OUTPUT_QUEUE)
            self._answered(OUTPUT_QUEUE)
            if not self._drain().endswith(b"hello"):
                raise BrokenPromise("the console did not say hello")

        self._prove = prove
        return self._start(stack, f"--output-fd={output}", fd=output)

    def _start_rng(self, stack: contextlib.ExitStack) -> _Worker:
        source = os.open("/dev/zero", os.O_RDONLY)
        stack.callback(os.close, source)

        def prove() -> None:
            chain = direct(self._driver, 32)
            self._answered()
            if chain.answer != bytes(32):
                raise BrokenPromise("no bytes of the source's")

        self._prove = prove
        return self._start(stack, f"--source-fd={source}", fd=source)

    _drained = -1
    _send: Callable[[], None] = staticmethod(lambda: None)

    def _drain(self) -> bytes:
        """Take what the device has put out; the last of it."""
        said = b""
        if self._drained >= 0:
            os.set_blocking(self._drained, False)
            with contextlib.suppress(BlockingIOError):
                while found := os.read(self._drained, 1 << 20):
                    said = (said + found)[-100:]
        return said

    def _answered(self, queue: int = 0) -> None:
        self._worker.kick()
        self._worker.collect(1, queue)

    # A case

    def run(self, random: Random) -> None:
        """One case. Raises BrokenPromise, or Unexpected where the worker has ended or says what it should not."""
        guest, worker, driver = self._guest, self._worker, self._driver
        guest.begin()
        before = sum(region.taken() for region in driver.control.inflight)
        for queue in range(len(driver.layouts)):
            for _ in range(random.randrange(1, 12)):
                guest.offer(random, queue, self._like.request(random, queue))
            if random.random() < 0.5:
                guest.spoil(random, queue)
        if random.random() < 0.5:
            self._send()
        worker.kick()
        worker.reset()
        self._drain()
        self.broken = worker.breaks
        self.chains += sum(region.taken() for region in driver.control.inflight) - before

    def close(self) -> None:
        """Have it answer a good request, and end. Raises BrokenPromise where it does not."""
        with self._stack:
            self._mutator.kill()
            self._mutator.wait()
            self._worker.reset()
            self._drain()
            self._prove()
            code, said = self._worker.stop(), self._worker.errors()
            if code or "Traceback" in said:
                raise BrokenPromise(f"the worker ended with {code} and said {said}")
