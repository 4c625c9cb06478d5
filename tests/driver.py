"""The other side of a device: a virtqueue driver in Python, and what a launcher does for a worker.

`Driver` lays out rings in guest memory and fills them as a guest's driver would, rightly or wrongly. `Recorder` takes
what a device tells its process. `WorkerProcess` starts a worker as the launcher does, and talks to it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

from lgmp.control import NEXT_AVAIL, NEXT_USED, ControlPage
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
from lgmp.memory import GuestMemory
from lgmp.virtio.ids import (
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTQUEUE_NUM,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from lgmp.virtio.ring import Virtqueue, VringLayout

RAM_BYTES = 4 << 20
# How long anything a test waits for may take before the test is wrong, in seconds: far more than it ever does.
PATIENCE = 30.0


@dataclass(frozen=True)
class Buffer:
    """A piece of guest memory for a descriptor."""

    address: int
    size: int
    writable: bool = False


@dataclass(frozen=True)
class Used:
    """A used element."""

    head: int
    written: int


class DriverQueue:
    """The driver's side of one ring."""

    def __init__(self, memory: GuestMemory, layout: VringLayout, start: int = 0) -> None:
        """`start`: the 16-bit index that both rings begin with (0 after a reset)."""
        self.memory = memory
        self.layout = layout
        self.next_avail = start
        self.next_used = start
        # Indexes are loaded and stored in one piece: struct.pack_into would store a 0 first, for the device to see.
        self._avail = memory.view[layout.avail : layout.avail + 4].cast("H")
        self._used = memory.view[layout.used : layout.used + 4].cast("H")
        self.free = list(range(layout.num))
        self._chains: dict[int, list[int]] = {}
        memory.view[layout.desc : layout.desc + 16 * layout.num] = bytes(16 * layout.num)
        self.set_avail(0, start)
        self._used[0] = 0
        self._used[1] = start

    def set_descriptor(self, index: int, address: int, size: int, flags: int, follows: int) -> None:
        struct.pack_into("<QIHH", self.memory.view, self.layout.desc + 16 * index, address, size, flags, follows)

    def set_avail(self, flags: int, index: int) -> None:
        self._avail[0] = flags
        self._avail[1] = index & 0xFFFF

    def offer(self, head: int) -> None:
        """Put a head into the available ring, and say so."""
        slot = self.layout.avail + 4 + 2 * (self.next_avail % self.layout.num)
        struct.pack_into("<H", self.memory.view, slot, head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        self._avail[1] = self.next_avail

    def add(self, buffers: Sequence[Buffer], table: int | None = None) -> int:
        """Offer a chain of `buffers`, through an indirect table at guest address `table` if given; gives its head."""
        if table is not None:
            view = self.memory.view
            for number, buffer in enumerate(buffers):
                flags, follows = _link(buffer, number + 1, number + 1 < len(buffers))
                struct.pack_into("<QIHH", view, table + 16 * number, buffer.address, buffer.size, flags, follows)
            head = self.free.pop(0)
            self.set_descriptor(head, table, 16 * len(buffers), VRING_DESC_F_INDIRECT, 0)
            self._chains[head] = [head]
        else:
            chain = [self.free.pop(0) for _ in buffers]
            for number, buffer in enumerate(buffers):
                last = number + 1 == len(buffers)
                flags, follows = _link(buffer, 0 if last else chain[number + 1], not last)
                self.set_descriptor(chain[number], buffer.address, buffer.size, flags, follows)
            head = chain[0]
            self._chains[head] = chain
        self.offer(head)
        return head

    def used_index(self) -> int:
        return self._used[1]

    def collect(self) -> list[Used]:
        """Take what the device has used since the last time."""
        taken = []
        while self.next_used != self.used_index():
            slot = self.layout.used + 4 + 8 * (self.next_used % self.layout.num)
            head, written = struct.unpack_from("<II", self.memory.view, slot)
            self.next_used = (self.next_used + 1) & 0xFFFF
            self.free.extend(self._chains.pop(head))
            taken.append(Used(head, written))
        return taken


def _link(buffer: Buffer, follows: int, more: bool) -> tuple[int, int]:
    flags = (VRING_DESC_F_WRITE if buffer.writable else 0) | (VRING_DESC_F_NEXT if more else 0)
    return flags, follows if more else 0


class Driver:
    """A guest's memory, the control page of one device, and the driver's side of its rings."""

    def __init__(self, queues: int = 1, num: int = VIRTQUEUE_NUM, start: int = 0, ram: int = RAM_BYTES) -> None:
        self.memory = GuestMemory.create(ram)
        self.control = ControlPage.create()
        self.layouts = []
        self._pages = ram
        for _ in range(queues):
            self.layouts.append(VringLayout.legacy(num, self._pages))
            self._pages += (VringLayout.legacy_bytes(num) + 4095) & ~4095
        self.queues = [DriverQueue(self.memory, layout, start) for layout in self.layouts]
        for number in range(queues):
            position = self.control.position(number)
            position[NEXT_AVAIL] = position[NEXT_USED] = start
        self._room = 0

    def buffer(self, content: bytes | int, writable: bool = False) -> Buffer:
        """Fresh guest memory, with a content or of a size; never given twice until `forget`."""
        size = content if isinstance(content, int) else len(content)
        address = self._room
        self._room += size
        if self._room > self.memory.ram_bytes:
            raise MemoryError("the test asks for more buffers than its guest has memory")
        if not isinstance(content, int):
            self.memory.view[address : address + size] = content
        return Buffer(address, size, writable)

    def forget(self) -> None:
        """All buffers may be given again."""
        self._room = 0

    def content(self, buffer: Buffer) -> bytes:
        return bytes(self.memory.view[buffer.address : buffer.address + buffer.size])

    def device_queues(self, name: str = "vda", indirect: bool = True) -> list[Virtqueue]:
        """The device's side of the rings, for a device in this process."""
        queues = []
        for number, layout in enumerate(self.layouts):
            queue = Virtqueue(
                self.memory, layout, name=f"{name}: queue {number}", position=self.control.position(number)
            )
            queue.indirect = indirect
            queues.append(queue)
        return queues

    def reset(self) -> None:
        """What launcher and driver do after RESET_DONE: rings zeroed, driver at its start again."""
        self.queues = [DriverQueue(self.memory, layout) for layout in self.layouts]

    def close(self) -> None:
        self.memory.close()
        self.control.close()


@dataclass
class Recorder:
    """Takes what a device tells its process."""

    used_queues: list[int] = field(default_factory=list)
    quits: int = 0

    def used(self, queue: int) -> None:
        self.used_queues.append(queue)

    def quit(self) -> None:
        self.quits += 1


class WorkerProcess:
    """A worker process, and the launcher's end of its message queues."""

    def __init__(
        self,
        module: str,
        driver: Driver,
        options: Sequence[str] = (),
        *,
        name: str = "vda",
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        features: int = 1 << VIRTIO_RING_F_INDIRECT_DESC,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.driver = driver
        driver.control.accepted_features = features
        # Tests run in one process after another's worker: the name has more than the pid in it.
        unique = f"{name}{id(self):x}"
        self.mailbox = Mailbox.create(queue_name(os.getpid(), unique), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
        self.completions = Mailbox.create(
            queue_name(os.getpid(), f"{unique}.done"), COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES
        )
        self._heard: list[list[int | str]] = []
        self.process = subprocess.Popen(
            [*wrapper, *worker_command(module, driver, self.mailbox.name, self.completions.name, name, options)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=(driver.memory.fd, driver.control.fd, *pass_fds),
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        for mailbox in (self.mailbox, self.completions):
            mailbox.unlink()
            mailbox.close()

    def send(self, kind: ToWorker) -> None:
        self.post(pack(kind))

    def post(self, raw: bytes) -> None:
        """Send what must not be lost; meanwhile hear what the worker says, as the launcher does, or both would wait."""
        deadline = monotonic() + PATIENCE
        while not self.mailbox.send(raw, 0.01):
            while (heard := self.completions.take()) is not None:
                self._heard.append(unpack(heard))
            ended = self.process.poll()
            assert ended is None, f"the worker ended with {ended} and said {self._heard}"
            assert monotonic() < deadline, f"the worker takes no messages, said {self._heard}, is {self._state()}"

    def _state(self) -> str:
        """What it is doing, where a test finds that it does nothing."""
        answer = []
        for name in ("wchan", "syscall", "status"):
            with open(f"/proc/{self.process.pid}/{name}") as file:
                answer.append(file.read())
        return "\n".join(answer)

    def next_message(self) -> list[int | str]:
        """The worker's next message; fails the test when it dies or says nothing."""
        if self._heard:
            return self._heard.pop(0)
        pidfd = os.pidfd_open(self.process.pid)
        poll = select.poll()
        poll.register(self.completions, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        poll.poll(PATIENCE * 1000)
        os.close(pidfd)
        raw = self.completions.take()
        if raw is None:
            self.process.poll()
            raise AssertionError(f"no message from the worker, exit code {self.process.returncode}")
        return unpack(raw)

    def next_word(self) -> list[int | str]:
        """The next message that is not USED: a test that saw the used ring move may not have waited for that."""
        while (message := self.next_message())[0] == ToLauncher.USED:
            pass
        return message

    def expect(self, *message: int | str) -> None:
        got = self.next_word()
        assert got == list(message), f"the worker said {got}, not {message}"

    def failure(self) -> str:
        """Wait for FAILED; gives its text."""
        kind, device, text = self.next_word()
        assert (kind, device) == (ToLauncher.FAILED, 0)
        return str(text)

    def ready(self) -> WorkerProcess:
        self.expect(ToLauncher.READY, 0)
        return self

    def kick(self) -> None:
        """As the launcher does: without waiting, since a full mailbox is as good as a kick."""
        self.mailbox.post(pack(ToWorker.KICK))

    def collect(self, count: int, queue: int = 0) -> list[Used]:
        """Wait for USED messages until the worker has used `count` chains of a ring."""
        taken = self.driver.queues[queue].collect()
        while len(taken) < count:
            message = self.next_message()
            assert message[0] == ToLauncher.USED, f"the worker said {message}"
            taken += self.driver.queues[queue].collect()
        return taken

    def reset(self) -> None:
        """Reset the device as the launcher does; what it says before RESET_DONE is of no interest."""
        self.send(ToWorker.RESET)
        while (message := self.next_message())[0] != ToLauncher.RESET_DONE:
            assert message[0] == ToLauncher.USED, f"the worker said {message}"
        self.driver.reset()

    def stop(self) -> int:
        self.send(ToWorker.STOP)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def errors(self) -> str:
        """What it wrote to stderr, once it has ended."""
        self.wait()
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


def worker_command(
    module: str, driver: Driver, mailbox: str, completions: str, name: str = "vda", options: Sequence[str] = ()
) -> list[str]:
    """The command line of a worker as the launcher writes it."""
    queues = [f"--queue={layout}" for layout in driver.layouts]
    return [
        *(sys.executable, "-P", "-m", module),
        *("--name", name, "--guest", "test", "--device", "0"),
        *("--memory-fd", str(driver.memory.fd), "--ram", str(driver.memory.ram_bytes)),
        *("--control-fd", str(driver.control.fd)),
        *("--mailbox", mailbox, "--completions", completions),
        *("--launcher", str(os.getpid())),
        *queues,
        *options,
    ]


class DoomedLauncher:
    """A launcher in a process of its own, to be killed. `start` runs in it and gives the workers it has started."""

    def __init__(self, start: Callable[[], Sequence[WorkerProcess]]) -> None:
        report, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                workers = start()
                names = [name for w in workers for name in (w.mailbox.name, w.completions.name)]
                os.write(told, json.dumps([[w.process.pid for w in workers], names]).encode())
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(told)
        with os.fdopen(report, "rb") as file:
            assert select.select([file], [], [], PATIENCE)[0], "the launcher did not start its workers"
            pids, self.queue_names = json.loads(os.read(report, 65536))
        self.pidfds = [os.pidfd_open(pid) for pid in pids]

    def kill(self) -> None:
        """Kill it as nothing can be prepared for."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def workers_end(self) -> bool:
        """Wait for the end of all workers; False where one outlives the test's patience."""
        ended = all(select.select([pidfd], [], [], PATIENCE)[0] for pidfd in self.pidfds)
        for pidfd in self.pidfds:
            if not ended:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        return ended


@contextmanager
def signals_held() -> Iterator[None]:
    """All signals blocked within, as the launcher has them while it starts a worker."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
